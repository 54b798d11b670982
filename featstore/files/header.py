"""The user block of a file: its version, its kind, where everything lies, and checksums that tell damage by region."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from featstore.errors import DamagedFileError, NewerFormatError
from featstore.files.plain_reads import REMEDY, Opened, crc_of, damaged, truncated

if TYPE_CHECKING:
    from featstore.files.storage_types import StorageType

FORMAT_VERSION = 2
"""The version of `docs/format.md` that is written, but for rows of whole numbers."""

WHOLE_VERSION = 3
"""That of parts with rows of whole numbers, which older readers would take for damage: else as the one before it.

Every version from 1 up to this one can be read.
"""

USER_BLOCK_BYTES = 4096
FEATURES_ALIGNMENT = 4096
MAX_NAME_BYTES = 40
"""Of a dataset."""

Kind = Literal["part", "images"]

_MAGIC = b"featstore; HDF5 from byte 4096.\n"
_FIELDS = struct.Struct("<32sI12sQQQI")  # magic, version, kind, file length, features offset, their bytes, CRC-32
_REGION_FIELDS = struct.Struct("<III")  # since version 2: CRC-32 of the user block and of the structure, regions
_REGION = struct.Struct("<40sQQI4x")  # dataset, offset, bytes, CRC-32
_CRC_OFFSET, _HEADER_CRC_OFFSET, _REGIONS_OFFSET = 72, 76, 128

MAX_REGIONS = (USER_BLOCK_BYTES - _REGIONS_OFFSET) // _REGION.size
"""Datasets beside the features that have a checksum each."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where everything lies in a file, as its user block says.

    Attributes:
        kind: of the file.
        version: of the format.
        length: of the file, in bytes.
        features: their bytes; none at 0 if there are none.
        regions: the bytes of each dataset beside the features that has any, in the order of the file.
    """

    kind: Kind
    version: int
    length: int
    features: range
    regions: Mapping[str, range]

    @property
    def rest(self) -> list[range]:
        """The bytes that belong neither to the user block nor to the features."""
        before = range(USER_BLOCK_BYTES, self.features.start)
        behind = range(max(USER_BLOCK_BYTES, self.features.stop), self.length)
        return [extent for extent in (before, behind) if extent]

    @property
    def structure(self) -> list[range]:
        """The bytes of the rest that belong to no region."""
        found = []
        for extent in self.rest:
            start = extent.start
            for region in self.regions.values():
                if region.start in extent:
                    found.append(range(start, region.start))
                    start = region.stop
            found.append(range(start, extent.stop))
        return [extent for extent in found if extent]


def version_for(storage_type: StorageType | None) -> int:
    """The version of a new file, by the type of its rows, where it has some."""
    return FORMAT_VERSION if storage_type is None or storage_type.is_float else WHOLE_VERSION


def make_user_block(layout: Layout, image: memoryview) -> bytes:
    """The user block of a file that `image` holds, which may end where the features begin, if these lie last."""
    block = bytearray(USER_BLOCK_BYTES)
    extents = (layout.length, layout.features.start, len(layout.features))
    _FIELDS.pack_into(block, 0, _MAGIC, layout.version, layout.kind.encode(), *extents, 0)
    _REGION_FIELDS.pack_into(block, _FIELDS.size, 0, _crc_in(image, layout.structure), len(layout.regions))
    for number, (name, extent) in enumerate(layout.regions.items()):
        place = _REGIONS_OFFSET + number * _REGION.size
        _REGION.pack_into(block, place, name.encode(), extent.start, len(extent), _crc_in(image, [extent]))
    struct.pack_into("<I", block, _HEADER_CRC_OFFSET, _own_crc(block))
    struct.pack_into("<I", block, _CRC_OFFSET, _crc_in(image, layout.rest, zlib.crc32(block)))
    return bytes(block)


def read_layout(file: Opened, kind: Kind) -> Layout:
    """The file's layout, once every byte outside the features is what was written."""
    head, path = read_user_block(file), file.path
    size = file.size
    _, version, _, length, features_offset, features_bytes, crc_expected = _FIELDS.unpack_from(head)
    if size < length:
        raise truncated(path, missing=length - size)
    check_kind(path, head, kind)
    if size > length or features_offset + features_bytes > length:
        raise damaged(path, f"it has {size} bytes, which its user block contradicts")
    layout = Layout(
        kind=kind,
        version=version,
        length=length,
        features=range(features_offset, features_offset + features_bytes),
        regions={name: extent for name, extent, _ in read_regions(head)} if version > 1 else {},
    )
    crc = zlib.crc32(head[:_CRC_OFFSET] + bytes(4) + head[_CRC_OFFSET + 4 :])
    file.hold(layout.rest)
    crc = crc_of(file, layout.rest, file.new_buffer(), crc)
    if crc != crc_expected:
        where = "outside its features" if version == 1 else f"in its {_altered(file, head, layout)}"
        found = f"the checksum of all outside the features is {crc:08x}, not {crc_expected:08x}"
        raise damaged(path, f"bytes are altered {where} ({found})")
    return layout


def read_user_block(file: Opened) -> bytes:
    """The user block of a file of a version that can be read; from version 2 on it fits its own checksum."""
    path, buffer = file.path, bytearray(min(USER_BLOCK_BYTES, file.size))
    file.read([(0, [memoryview(buffer)])])
    head = bytes(buffer)
    starts = [_MAGIC + struct.pack("<I", version) for version in range(2, WHOLE_VERSION + 1)]
    is_whole = len(head) == USER_BLOCK_BYTES
    sealed = next((start for start in starts if is_whole and _fits_own_crc(start + head[len(start) :])), None)
    if sealed is not None and not head.startswith(sealed):
        raise damaged(path, "bytes are altered in its header, in the first line or the version")
    if not head.startswith(_MAGIC[: len(head)]):
        raise DamagedFileError(
            f"{path} is not a file of featstore's, or damaged: it begins with {head[: len(_MAGIC)]!r}, "
            f"where {_MAGIC!r} was expected. {REMEDY}"
        )
    if len(head) < USER_BLOCK_BYTES:
        raise truncated(path, missing=USER_BLOCK_BYTES - len(head))
    (version,) = struct.unpack_from("<I", head, len(_MAGIC))
    if not 1 <= version <= WHOLE_VERSION:
        raise NewerFormatError(
            f"{path} has format version {version}; this featstore reads versions up to {WHOLE_VERSION}. "
            "Upgrade featstore to read it."
        )
    if version > 1 and sealed is None:
        raise damaged(path, "bytes are altered in its header (it doesn't fit its checksum)")
    return head


def check_kind(path: Path, user_block: bytes, kind: Kind) -> None:
    """Refuses a file of another kind, by its user block."""
    found = _FIELDS.unpack_from(user_block)[2]
    if found != kind.encode().ljust(len(found), b"\0"):
        named = found.rstrip(b"\0").decode("ascii", "backslashreplace")
        raise DamagedFileError(f"{path} is of the kind {named!r}, where {kind!r} was expected. {REMEDY}")


def read_regions(user_block: bytes) -> list[tuple[str, range, int]]:
    """Each region's dataset, bytes and CRC-32."""
    _, _, count = _REGION_FIELDS.unpack_from(user_block, _FIELDS.size)
    found = []
    for number in range(min(count, MAX_REGIONS)):
        name, start, length, crc = _REGION.unpack_from(user_block, _REGIONS_OFFSET + number * _REGION.size)
        found.append((name.rstrip(b"\0").decode("ascii", "backslashreplace"), range(start, start + length), crc))
    return found


def is_part(path: Path) -> bool:
    """Whether the file at `path` begins as a part does; it may be damaged."""
    with path.open("rb") as file:
        head = file.read(_FIELDS.size)
    return head.startswith(_MAGIC) and len(head) == _FIELDS.size and _FIELDS.unpack(head)[2].startswith(b"part")


_REGION_WORDS: dict[Kind, dict[str, str]] = {
    "part": {"digest": "digests", "decoder": "decoders", "crc": "checksums", "scale": "scales", "facts": "facts"},
    "images": {"facts": "facts"},
}


def _altered(file: Opened, user_block: bytes, layout: Layout) -> str:
    """What of a file from version 2 on is altered, in words, when all outside the features doesn't fit its checksum."""
    buffer = file.new_buffer()
    found = []
    for name, extent, crc in read_regions(user_block):
        if crc_of(file, [extent], buffer) != crc:
            found.append(_REGION_WORDS[layout.kind].get(name, f"column {name}"))
    _, structure_crc, _ = _REGION_FIELDS.unpack_from(user_block, _FIELDS.size)
    if crc_of(file, layout.structure, buffer) != structure_crc:
        found.append("structure")
    return " and ".join(found) or "header"  # if all else is sound, the checksum that didn't fit is not


def _fits_own_crc(user_block: bytes) -> bool:
    (expected,) = struct.unpack_from("<I", user_block, _HEADER_CRC_OFFSET)
    return bool(_own_crc(user_block) == expected)


def _crc_in(image: memoryview, extents: Iterable[range], crc: int = 0) -> int:
    for extent in extents:
        crc = zlib.crc32(image[extent.start : extent.stop], crc)
    return crc


def _own_crc(user_block: bytes | bytearray) -> int:
    """CRC-32 of a user block, the fields of this one and of the whole file's taken as zero."""
    end = _HEADER_CRC_OFFSET + 4
    return zlib.crc32(user_block[:_CRC_OFFSET] + bytes(end - _CRC_OFFSET) + user_block[end:])
