"""One part: an HDF5 file with the features of one feature set, written whole or not at all, checked when opened.

An image table is the same frame around other columns, without features. `docs/format.md` says what each byte means.

The HDF5 library never gets a path here, only Python file objects: it makes the structure of a new file in memory, and
reads finished files. So it takes no lock, leaves no handle that a forked child could close, and a full disk is met by
our own writes, as an `OSError`; met inside the library it ends the interpreter.
"""

from __future__ import annotations

import errno
import io
import json
import math
import os
import re
import secrets
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, Literal

import h5py
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from featstore.digest import Json, canonical_json
from featstore.errors import DamagedFileError

FORMAT_VERSION = 1
"""The version of `docs/format.md` that is written; every version from 1 up to this one can be read."""


def write_part(
    path: Path,
    *,
    features: Tensor | Sequence[Tensor],
    digests: NDArray[np.uint8],
    decoders: NDArray[np.uint8],
    facts: Mapping[str, Json],
) -> None:
    """Write a part that appears at `path` whole and synced, or not at all.

    It grows under a temporary name in the same folder, which must exist. Beside `features` the writer holds about 33
    bytes a row in memory.

    Args:
        path: the final name, which must be free. The check and the rename are two steps, so names that several
            processes choose need something random in them.
        features: activations `(n, *F)`, contiguous, on the CPU, float16, float32 or bfloat16; or the same rows in
            chunks, of which there must be one even if it has no rows. That values are finite is the caller's check.
        digests: `(n, 32)`, the SHA-256 of each row's image.
        decoders: `(n,)`, which decoder read each row's image.
        facts: everything else there is to say.

    Raises:
        ValueError: for arrays that don't fit together.
        TypeError: for dtypes that can't be stored, and facts that are not JSON.
        FileExistsError: if `path` is taken.
        OSError: as the system gave it (disk full, read-only folder); no file is left then.
    """
    chunks = [features] if isinstance(features, Tensor) else list(features)
    rows = _check_features(chunks)
    _check_row_facts("digests", digests, (rows.num_rows, _DIGEST_BYTES))
    _check_row_facts("decoders", decoders, (rows.num_rows,))
    checksums = np.zeros(rows.num_blocks, "<u4")
    frame = _make_frame("part", {"digest": digests, "decoder": decoders, "crc": checksums}, facts, rows)
    with _whole_or_nothing(path, frame.user_block.length) as fd:
        checksums[:] = _write_features(fd, chunks, frame.user_block.features_offset, rows.block_rows * rows.row_bytes)
        frame.image[frame.checksums_offset :][: checksums.nbytes] = checksums.tobytes()
        _write_frame(fd, frame)


def write_table(path: Path, *, columns: Mapping[str, NDArray[Any]], facts: Mapping[str, Json]) -> None:
    """Write an image table that appears at `path` whole and synced, or not at all.

    Args:
        path: the final name, which must be free, in a folder that exists (see `write_part`).
        columns: arrays of integers or floats, of any shape; their names are made of `a-z` and `_`, and not `facts`.
        facts: everything else there is to say.

    Raises:
        ValueError: for other names.
        TypeError: for other dtypes, and facts that are not JSON.
        FileExistsError: if `path` is taken.
        OSError: as the system gave it; no file is left then.
    """
    for name, column in columns.items():
        _check_table_column(name, column)
    frame = _make_frame("images", columns, facts, rows=None)
    with _whole_or_nothing(path, frame.user_block.length) as fd:
        _write_frame(fd, frame)


def make_folder(path: Path, *, root: Path) -> None:
    """Make the folder `path`, and those above it, such that no power loss takes it away with the files in it.

    A folder's name is safe once the folder above it is synced. Below `root` that is done for those that were there as
    well: whoever made them may have been killed before the sync. Above it not everyone may read the folders.

    Args:
        path: below `root`.
        root: of the store; made as well.

    Raises:
        OSError: as the system gave it.
    """
    for folder in (*reversed(path.parents), path):
        is_new = not folder.is_dir()
        if is_new:
            try:
                folder.mkdir()
            except FileExistsError:  # another process may be as far; but a file there stays one
                if not folder.is_dir():
                    raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), os.fspath(folder)) from None
        if is_new or root in folder.parents:
            _sync_folder(folder.parent)


@dataclass(frozen=True, kw_only=True, eq=False)
class Part:
    """A part that `Part.open` found sound. It holds no file handle, pickles, and works in other processes.

    Attributes:
        path: the file.
        num_rows: n, which may be 0.
        shape: `F`, the shape of one row.
        dtype: torch.float16, torch.float32 or torch.bfloat16.
        facts: the JSON facts.
        digests: `(n, 32)` uint8, the SHA-256 of each row's image.
        decoders: `(n,)` uint8, which decoder read each row's image.
        checksums: uint32, the CRC-32 of each block of `block_rows` rows.
        block_rows: rows in a block of features; the last block may have fewer.
        features_offset: where in the file the features begin, in bytes.
    """

    path: Path
    num_rows: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    facts: dict[str, Json]
    digests: NDArray[np.uint8]
    decoders: NDArray[np.uint8]
    checksums: NDArray[np.uint32]
    block_rows: int
    features_offset: int

    @classmethod
    def open(cls, path: Path) -> Part:
        """The part at `path`, once its version, its length and every byte outside the features are checked.

        Raises:
            FileNotFoundError: if there is no such file.
            DamagedFileError: if it is not a part, of a newer version, truncated, or altered outside its features.
        """
        with _open_checked(path, "part") as (user_block, hdf5):
            rows = _read_features_type(hdf5, user_block)
            block_rows = _read_block_rows(hdf5)
            return cls(
                path=path,
                num_rows=rows.num_rows,
                shape=rows.shape,
                dtype=rows.dtype,
                facts=_read_facts(hdf5),
                digests=_read_column(hdf5, "digest", "u1", (rows.num_rows, _DIGEST_BYTES)),
                decoders=_read_column(hdf5, "decoder", "u1", (rows.num_rows,)),
                checksums=_read_column(hdf5, "crc", "<u4", (math.ceil(rows.num_rows / block_rows),)),
                block_rows=block_rows,
                features_offset=user_block.features_offset,
            )

    @cached_property
    def features(self) -> Tensor:
        """Activations `(n, *F)`, mapped: read from the disk when touched, their pages shared between processes.

        Writing into the tensor changes this process' copy of a page, never the file.

        Raises:
            FileNotFoundError: if the file is gone.
            DamagedFileError: if it has become too short to map.
        """
        if not self.num_rows:
            return torch.empty((0, *self.shape), dtype=self.dtype)
        end = self.features_offset + self._rows.num_bytes
        size = self.path.stat().st_size
        if size < end:  # Touching a mapped page behind the end of its file kills the process.
            raise _truncated(self.path, missing=end - size)
        # A private mapping of torch's is copy-on-write and keeps no descriptor open; Python's mmap keeps one a part.
        file_bytes = torch.from_file(os.fspath(self.path), shared=False, size=end, dtype=torch.uint8)
        return file_bytes[self.features_offset :].view(self.dtype).view(self.num_rows, *self.shape)

    def verify(self) -> list[range]:
        """The rows of each block whose checksum no longer fits its features; an empty list for a sound part.

        Reads all features with plain reads, past the mapping.

        Raises:
            FileNotFoundError: if the file is gone.
            DamagedFileError: if it has become too short.
        """
        damaged = []
        with self.path.open("rb") as file:
            for block, checksum in enumerate(self.checksums):
                rows = range(self.num_rows)[block * self.block_rows :][: self.block_rows]
                start = self.features_offset + rows.start * self._rows.row_bytes
                if _crc_of_file(self.path, file, range(start, start + len(rows) * self._rows.row_bytes)) != checksum:
                    damaged.append(rows)
        return damaged

    @property
    def _rows(self) -> _Rows:
        return _Rows(num_rows=self.num_rows, shape=self.shape, dtype=self.dtype)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "features"}  # mapped anew when used


@dataclass(frozen=True, kw_only=True, eq=False)
class Table:
    """An image table that `Table.open` found sound, in memory.

    Attributes:
        path: the file.
        columns: the arrays by name.
        facts: the JSON facts.
    """

    path: Path
    columns: dict[str, NDArray[Any]]
    facts: dict[str, Json]

    @classmethod
    def open(cls, path: Path) -> Table:
        """The image table at `path`, once its version, its length and every byte are checked.

        Raises:
            FileNotFoundError: if there is no such file.
            DamagedFileError: if it is not an image table, of a newer version, truncated, or altered.
        """
        with _open_checked(path, "images") as (_, hdf5):
            columns = {name: np.asarray(_dataset(hdf5, name)[()]) for name in hdf5 if name != "facts"}
            return cls(path=path, columns=columns, facts=_read_facts(hdf5))


# ---- what features are made of

_DIGEST_BYTES = 32
_BLOCK_BYTES = 1 << 20
_DTYPES = (torch.float16, torch.float32, torch.bfloat16)


@dataclass(frozen=True, kw_only=True)
class _Rows:
    """The features of a part as an array of rows."""

    num_rows: int
    shape: tuple[int, ...]  # of one row
    dtype: torch.dtype

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def num_bytes(self) -> int:
        return self.num_rows * self.row_bytes

    @property
    def block_rows(self) -> int:
        return max(1, _BLOCK_BYTES // self.row_bytes)

    @property
    def num_blocks(self) -> int:
        return math.ceil(self.num_rows / self.block_rows)


def _hdf5_type(dtype: torch.dtype) -> h5py.h5t.TypeFloatID:
    if dtype == torch.float16:
        return h5py.h5t.IEEE_F16LE
    if dtype == torch.float32:
        return h5py.h5t.IEEE_F32LE
    bfloat16 = h5py.h5t.IEEE_F32LE.copy()
    bfloat16.set_fields(15, 7, 8, 0, 7)  # the sign's bit; first bit and bits of the exponent, then of the mantissa
    bfloat16.set_size(2)
    bfloat16.set_ebias(127)
    return bfloat16


# ---- what a caller may pass


def _check_features(chunks: Sequence[Tensor]) -> _Rows:
    if not chunks:
        raise ValueError("there are no chunks of features, hence no row shape; for a part without rows pass (0, *F)")
    first = chunks[0]
    if first.dtype not in _DTYPES:
        raise TypeError(f"features of {first.dtype} can't be stored; convert them to float16, float32 or bfloat16")
    if first.ndim == 0 or 0 in first.shape[1:]:
        raise ValueError(f"features of shape {tuple(first.shape)} are not rows of values; pass (n, *F), no zeros in F")
    for chunk in chunks:
        if (chunk.dtype, chunk.ndim, chunk.shape[1:]) != (first.dtype, first.ndim, first.shape[1:]):
            raise ValueError(
                f"a chunk of features is {chunk.dtype} {tuple(chunk.shape)}, the first one {first.dtype} "
                f"{tuple(first.shape)}; all rows of a part must have one dtype and shape"
            )
        if chunk.device.type != "cpu" or not chunk.is_contiguous():
            raise ValueError(f"a chunk of features on {chunk.device} is not contiguous on the CPU; pass a copy that is")
    return _Rows(num_rows=sum(map(len, chunks)), shape=tuple(first.shape[1:]), dtype=first.dtype)


def _check_row_facts(name: str, array: NDArray[np.uint8], shape: tuple[int, ...]) -> None:
    if array.dtype != np.uint8 or array.shape != shape:
        raise ValueError(f"{name} are {array.dtype} {array.shape}; beside these features they must be uint8 {shape}")


def _check_table_column(name: str, column: NDArray[Any]) -> None:
    if not re.fullmatch("[a-z_]+", name) or name == "facts":
        raise ValueError(f"a column can't be named {name!r}; use the letters a-z and _, and not 'facts'")
    if column.dtype.kind not in "iuf" or column.dtype.itemsize > 8:
        raise TypeError(
            f"column {name} is {column.dtype}; store integers or floats of at most 8 bytes (text as uint8 with offsets)"
        )


# ---- the user block, which lies before the HDF5 file

_MAGIC = b"featstore; HDF5 from byte 4096.\n"
_USER_BLOCK_BYTES = 4096
_FEATURES_ALIGNMENT = 4096
_USER_BLOCK = struct.Struct("<32sI12sQQQI")  # magic, version, kind, file length, features offset, their bytes, CRC-32
_CRC_FIELD = slice(_USER_BLOCK.size - 4, _USER_BLOCK.size)

_Kind = Literal["part", "images"]


@dataclass(frozen=True, kw_only=True)
class _UserBlock:
    kind: _Kind
    length: int
    features_offset: int = 0
    features_bytes: int = 0

    def pack(self, crc: int) -> bytes:
        extents = (self.length, self.features_offset, self.features_bytes)
        head = _USER_BLOCK.pack(_MAGIC, FORMAT_VERSION, self.kind.encode(), *extents, crc)
        return head.ljust(_USER_BLOCK_BYTES, b"\0")

    @property
    def rest(self) -> list[range]:
        """The bytes of the file that belong neither to the user block nor to the features, in file order."""
        features_end = self.features_offset + self.features_bytes
        before = range(_USER_BLOCK_BYTES, self.features_offset)
        behind = range(max(_USER_BLOCK_BYTES, features_end), self.length)
        return [extent for extent in (before, behind) if extent]


# ---- making the frame: every byte of a file outside its features


@dataclass(frozen=True, kw_only=True)
class _Frame:
    """A file in memory, without its features: as they lie last, `image` ends where they begin.

    Should a version of HDF5 put something behind the features, `image` has their whole length as a gap, and the file
    is as good; it only takes the memory.
    """

    user_block: _UserBlock
    image: memoryview  # its first 4096 bytes are still empty
    checksums_offset: int


def _make_frame(
    kind: _Kind, columns: Mapping[str, NDArray[Any]], facts: Mapping[str, Json], rows: _Rows | None
) -> _Frame:
    text = canonical_json(dict(facts)).encode("ascii")
    features_bytes = rows.num_bytes if rows else 0
    features_offset = checksums_offset = 0
    image = io.BytesIO()
    with h5py.File(
        image,
        "w",
        libver=("v110", "v110"),  # older tools read it; see docs/format.md
        userblock_size=_USER_BLOCK_BYTES,
        # What is smaller than the features is packed; the features begin on a page, for mapping.
        alignment_threshold=max(1, features_bytes),
        alignment_interval=_FEATURES_ALIGNMENT if features_bytes else 1,
    ) as hdf5:
        for name, column in columns.items():
            values = np.asarray(column, column.dtype.newbyteorder("<"))
            _add_dataset(hdf5, name, h5py.h5t.py_create(values.dtype), values.shape)[...] = values
        text_type = h5py.h5t.py_create(h5py.string_dtype("utf-8", len(text)), logical=True)
        _add_dataset(hdf5, "facts", text_type, ())[()] = text
        if rows:
            hdf5["crc"].attrs["block_rows"] = np.uint64(rows.block_rows)
            checksums_offset = _offset(hdf5["crc"])
            features_offset = _offset(_add_features(hdf5, rows))
    image.seek(0, io.SEEK_END)
    image.write(bytes(max(0, features_offset - image.tell())))  # up to the page where the features begin
    user_block = _UserBlock(
        kind=kind,
        length=max(image.tell(), features_offset + features_bytes),
        features_offset=features_offset,
        features_bytes=features_bytes,
    )
    return _Frame(user_block=user_block, image=image.getbuffer(), checksums_offset=checksums_offset)


def _add_features(hdf5: h5py.File, rows: _Rows) -> h5py.Dataset:
    # A new name may need one more piece of the root group, which would lie behind the features; so make room before.
    hdf5["features"] = hdf5["facts"]
    del hdf5["features"]
    return _add_dataset(hdf5, "features", _hdf5_type(rows.dtype), (rows.num_rows, *rows.shape))


def _add_dataset(hdf5: h5py.File, name: str, hdf5_type: h5py.h5t.TypeID, shape: tuple[int, ...]) -> h5py.Dataset:
    """An unfiltered, contiguous dataset whose place in the file is taken at once, but not written."""
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_layout(h5py.h5d.CONTIGUOUS)
    properties.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    properties.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    properties.set_obj_track_times(False)  # equal content makes equal files
    space = h5py.h5s.create_simple(shape) if shape else h5py.h5s.create(h5py.h5s.SCALAR)
    return h5py.Dataset(h5py.h5d.create(hdf5.id, name.encode("ascii"), hdf5_type, space, properties))


def _offset(dataset: h5py.Dataset) -> int:
    """Where the dataset's values begin in the file; 0 for one without values, for which HDF5 has no answer."""
    return int(dataset.id.get_offset()) if dataset.size else 0


# ---- writing


def _write_features(fd: int, chunks: Sequence[Tensor], offset: int, block_bytes: int) -> list[int]:
    """Write all chunks from `offset` on; the CRC-32 of each block, which chunks may share."""
    checksums: list[int] = []
    written = 0
    for chunk in chunks:
        rest = chunk.reshape(-1).view(torch.uint8).numpy().data
        while rest:
            piece = rest[: block_bytes - written % block_bytes]
            if written % block_bytes == 0:
                checksums.append(0)
            checksums[-1] = zlib.crc32(piece, checksums[-1])
            _write_at(fd, piece, offset + written)
            written += len(piece)
            rest = rest[len(piece) :]
    return checksums


def _write_frame(fd: int, frame: _Frame) -> None:
    """Write everything but the features, the user block last."""
    crc = zlib.crc32(frame.user_block.pack(crc=0))
    for extent in frame.user_block.rest:
        piece = frame.image[extent.start : extent.stop]
        crc = zlib.crc32(piece, crc)
        _write_at(fd, piece, extent.start)
    _write_at(fd, memoryview(frame.user_block.pack(crc)), 0)


@contextmanager
def _whole_or_nothing(path: Path, length: int) -> Iterator[int]:
    """A descriptor to write `length` bytes to; on leaving they are at `path`, or nothing is."""
    if os.path.lexists(path):
        raise FileExistsError(errno.EEXIST, "a written file is never replaced, choose another name", os.fspath(path))
    temporary = path.with_name(f".{path.name}.tmp-{secrets.token_hex(8)}")
    fd = _create(temporary)
    try:
        try:
            _allocate(fd, length)
            yield fd
            _sync(fd)
        finally:
            os.close(fd)
        _rename(temporary, path)
    except BaseException:
        with suppress(OSError):  # the first error is the one to tell
            temporary.unlink()
        raise
    _sync_folder(path.parent)


# ---- every operation that changes the disk, so that a test can fail, record or stop at any of them

_MAX_WRITE_BYTES = 64 << 20


def _create(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)


def _allocate(fd: int, length: int) -> None:
    """Take the space for the whole file, so that a full disk is found before anything is written."""
    if not hasattr(os, "posix_fallocate"):  # macOS
        return
    try:
        os.posix_fallocate(fd, 0, length)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):  # what file systems without it answer
            raise


def _write_at(fd: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(fd, data[:_MAX_WRITE_BYTES], offset)
        data = data[written:]
        offset += written


def _sync(fd: int) -> None:
    os.fsync(fd)


def _rename(source: Path, target: Path) -> None:
    os.rename(source, target)


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


# ---- reading


@contextmanager
def _open_checked(path: Path, kind: _Kind) -> Iterator[tuple[_UserBlock, h5py.File]]:
    """The file's user block and HDF5 structure, open for reading, after every check that needs no structure.

    `ValueError`, and what h5py raises about files, becomes a `DamagedFileError` about the structure.
    """
    with path.open("rb") as file:
        user_block = _read_user_block(path, file, kind)
        try:
            with h5py.File(file, "r") as hdf5:
                yield user_block, hdf5
        except (KeyError, OSError, RuntimeError, ValueError) as error:
            raise _damaged(
                path, f"its HDF5 structure is not that of format version {FORMAT_VERSION} ({error})"
            ) from error


def _read_user_block(path: Path, file: BinaryIO, kind: _Kind) -> _UserBlock:
    size = os.fstat(file.fileno()).st_size
    head = file.read(_USER_BLOCK_BYTES)
    if not head.startswith(_MAGIC[: len(head)]):
        raise DamagedFileError(
            f"{path} is not a file of featstore's, or damaged: it begins with {head[: len(_MAGIC)]!r}, "
            f"where {_MAGIC!r} was expected. {_REMEDY}"
        )
    if len(head) < _USER_BLOCK_BYTES:
        raise _truncated(path, missing=_USER_BLOCK_BYTES - len(head))
    _, version, kind_found, length, features_offset, features_bytes, crc_expected = _USER_BLOCK.unpack_from(head)
    if not 1 <= version <= FORMAT_VERSION:
        raise DamagedFileError(
            f"{path} has format version {version}; this featstore reads versions up to {FORMAT_VERSION}. "
            "Upgrade featstore to read it."
        )
    if size < length:
        raise _truncated(path, missing=length - size)
    if kind_found != kind.encode().ljust(len(kind_found), b"\0"):
        found = kind_found.rstrip(b"\0").decode("ascii", "backslashreplace")
        raise DamagedFileError(f"{path} is of the kind {found!r}, where {kind!r} was expected. {_REMEDY}")
    if size > length or features_offset + features_bytes > length:
        raise _damaged(path, f"it has {size} bytes, which its user block contradicts")
    user_block = _UserBlock(kind=kind, length=length, features_offset=features_offset, features_bytes=features_bytes)
    crc = zlib.crc32(head[: _CRC_FIELD.start] + bytes(4) + head[_CRC_FIELD.stop :])
    for extent in user_block.rest:
        crc = _crc_of_file(path, file, extent, crc)
    if crc != crc_expected:
        raise _damaged(path, f"the checksum of its bytes outside the features is {crc:08x}, not {crc_expected:08x}")
    return user_block


def _read_features_type(hdf5: h5py.File, user_block: _UserBlock) -> _Rows:
    features = _dataset(hdf5, "features")
    stored_type = features.id.get_type()
    dtype = next((dtype for dtype in _DTYPES if stored_type.equal(_hdf5_type(dtype))), None)
    if dtype is None or features.ndim == 0 or 0 in features.shape[1:]:
        raise ValueError(f"/features is {features.dtype} {features.shape}")
    rows = _Rows(num_rows=features.shape[0], shape=features.shape[1:], dtype=dtype)
    offset = _offset(features)
    if (offset, rows.num_bytes) != (user_block.features_offset, user_block.features_bytes):
        raise ValueError("/features lies elsewhere than the user block says")
    if offset % _FEATURES_ALIGNMENT:
        raise ValueError(f"/features begins at byte {offset}, no multiple of {_FEATURES_ALIGNMENT}")
    return rows


def _read_block_rows(hdf5: h5py.File) -> int:
    block_rows = int(_dataset(hdf5, "crc").attrs["block_rows"])
    if block_rows < 1:
        raise ValueError(f"/crc has block_rows {block_rows}")
    return block_rows


def _read_column(hdf5: h5py.File, name: str, dtype: str, shape: tuple[int, ...]) -> NDArray[Any]:
    column = _dataset(hdf5, name)
    if column.dtype != np.dtype(dtype) or column.shape != shape:
        raise ValueError(f"/{name} is {column.dtype} {column.shape}, not {np.dtype(dtype)} {shape}")
    values: NDArray[Any] = column[()]
    return values


def _read_facts(hdf5: h5py.File) -> dict[str, Json]:
    facts = json.loads(_dataset(hdf5, "facts").asstr()[()])
    if not isinstance(facts, dict):
        raise ValueError("/facts is not a JSON object")
    return facts


def _dataset(hdf5: h5py.File, name: str) -> h5py.Dataset:
    dataset = hdf5[name]
    if not isinstance(dataset, h5py.Dataset):
        raise ValueError(f"/{name} is not a dataset")
    return dataset


def _crc_of_file(path: Path, file: BinaryIO, extent: range, crc: int = 0) -> int:
    """CRC-32 of the bytes of `extent`, continued from `crc`."""
    file.seek(extent.start)
    missing = len(extent)
    while missing:
        piece = file.read(min(missing, _BLOCK_BYTES))
        if not piece:
            raise _truncated(path, missing)
        crc = zlib.crc32(piece, crc)
        missing -= len(piece)
    return crc


_REMEDY = "Put a sound copy in its place, or delete it and extract again, which computes only what is then missing."


def _damaged(path: Path, what: str) -> DamagedFileError:
    return DamagedFileError(f"{path} is damaged: {what}. {_REMEDY}")


def _truncated(path: Path, missing: int) -> DamagedFileError:
    return _damaged(path, f"it is truncated, {missing} bytes are missing at its end")
