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
import stat
import struct
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

import h5py
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from featstore.digest import Json, canonical_json
from featstore.errors import DamagedFileError, NewerFormatError
from featstore.machine import num_processors

FORMAT_VERSION = 2
"""The version of `docs/format.md` that is written; every version from 1 up to this one can be read."""


def write_part(
    path: Path,
    *,
    features: Tensor | Sequence[Tensor] | Iterator[Tensor],
    digests: NDArray[np.uint8],
    decoders: NDArray[np.uint8],
    facts: Mapping[str, Json],
    columns: Mapping[str, NDArray[Any]] | None = None,
) -> None:
    """Write a part that appears at `path` whole and synced, or not at all.

    It grows under a temporary name in the same folder, which must exist. Beside `features` the writer holds about 33
    bytes a row in memory, at the start twice that.

    Args:
        path: the final name, which must be free. The check and the rename are two steps, so names that several
            processes choose need something random in them.
        features: activations `(n, *F)`, contiguous, on the CPU, float16, float32 or bfloat16; or the same rows in
            chunks, of which there must be one even if it has no rows. That values are finite is the caller's check.
            An iterator's chunks are drawn while the file is written, each once the one before it is on its way.
        digests: `(n, 32)`, the SHA-256 of each row's image.
        decoders: `(n,)`, which decoder read each row's image.
        facts: everything else there is to say.
        columns: more datasets, for other tools: arrays as `write_table` takes them, and byte strings of one length.
            `Part` leaves them alone; `opened_hdf5` reads them.

    Raises:
        ValueError: for arrays that don't fit together, and columns whose names are taken or can't be used.
        TypeError: for dtypes that can't be stored, and facts that are not JSON.
        FileExistsError: if `path` is taken.
        OSError: as the system gave it (disk full, read-only folder); no file is left then.
    """
    chunks: Iterable[Tensor]
    if isinstance(features, Iterator):
        first = list(islice(features, 1))
        rows = _check_features(first, num_rows=len(digests))
        chunks = _check_drawn(chain(first, features), rows)
    else:
        chunks = [features] if isinstance(features, Tensor) else features
        rows = _check_features(chunks)
    _check_row_facts("digests", digests, (rows.num_rows, _DIGEST_BYTES))
    _check_row_facts("decoders", decoders, (rows.num_rows,))
    checksums = np.zeros(rows.num_blocks, "<u4")
    own: dict[str, NDArray[Any]] = {"digest": digests, "decoder": decoders, "crc": checksums}
    more = dict(columns or {})
    _check_more_columns(more, taken={"features", *own})
    frame = _make_frame("part", {**own, **more}, facts, rows)
    layout = frame.layout
    with _whole_or_nothing(path, layout.length) as fd:
        checksums[:] = _write_features(fd, chunks, layout.features.start, rows.block_rows * rows.row_bytes)
        if rows.num_rows:
            frame.bytes_of(layout.regions["crc"])[:] = checksums.tobytes()
        _write_frame(fd, frame)


def write_table(path: Path, *, columns: Mapping[str, NDArray[Any]], facts: Mapping[str, Json]) -> None:
    """Write an image table that appears at `path` whole and synced, or not at all.

    Args:
        path: the final name, which must be free, in a folder that exists (see `write_part`).
        columns: up to 61 arrays of integers or floats, of any shape; their names are up to 40 of `a-z` and `_`, and
            not `facts`.
        facts: everything else there is to say.

    Raises:
        ValueError: for other names, and more columns.
        TypeError: for other dtypes, and facts that are not JSON.
        FileExistsError: if `path` is taken.
        OSError: as the system gave it; no file is left then.
    """
    _check_table_columns(columns)
    frame = _make_frame("images", columns, facts, rows=None)
    with _whole_or_nothing(path, frame.layout.length) as fd:
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


def is_part(path: Path) -> bool:
    """Whether the file at `path` begins as a part does; it may be damaged."""
    with path.open("rb") as file:
        head = file.read(_FIELDS.size)
    return head.startswith(_MAGIC) and len(head) == _FIELDS.size and _FIELDS.unpack(head)[2].startswith(b"part")


@contextmanager
def opened_hdf5(path: Path) -> Iterator[Any]:
    """Any HDF5 file for reading, as h5py's `File`: what other programs have written, and columns beside a part's own.

    Raises:
        FileNotFoundError: if there is no such file.
        DamagedFileError: if it is no HDF5 file.
        OSError: from what h5py reads inside the block, for damage deeper in the file.
    """
    with path.open("rb") as file:
        try:
            hdf5 = h5py.File(file, "r")
        except (OSError, RuntimeError) as error:
            raise DamagedFileError(
                f"{path} can't be read as HDF5 ({error}). Expected a sound HDF5 file. Give an undamaged copy."
            ) from error
        with hdf5:
            yield hdf5


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
        with _open_checked(path, "part") as (layout, hdf5):
            rows = _read_features_type(hdf5, layout)
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
                features_offset=layout.features.start,
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
        with self._open_features() as fd:  # and its size checked: touching a page behind the end kills the process
            # By the descriptor, which a file keeps that has lost its name, and whose name is always text.
            link = f"/dev/fd/{fd}"
            name = link if os.path.exists(link) else os.fspath(self.path)
            # A private mapping of torch's is copy-on-write and keeps no descriptor; Python's mmap keeps one a part.
            file_bytes = torch.from_file(name, shared=False, size=self._features_end, dtype=torch.uint8)
        return file_bytes[self.features_offset :].view(self.dtype).view(self.num_rows, *self.shape)

    def read_blocks(self, blocks: Iterable[int], *, verify: bool = True) -> Iterator[tuple[range, Tensor]]:
        """For each of `blocks` the range of its rows and their activations `(rows, *F)`, by plain reads.

        All tensors are one piece of memory: each holds its block until the next step, and who keeps rows copies them.
        The file is opened at the first step, and closed after the last one or with the iterator.

        Args:
            blocks: numbers below `len(checksums)`, in any order; block b begins at row b * `block_rows`.
            verify: whether each block must fit its checksum.

        Raises:
            IndexError: for a block that isn't there.
            FileNotFoundError: if the file is gone.
            DamagedFileError: for a block that doesn't fit its checksum, and bytes that can't be read: it names the
                rows or bytes; and if the file has become too short.
        """
        memory = torch.empty(min(self.num_rows, self.block_rows) * self._rows.row_bytes, dtype=torch.uint8)
        with self._open_features() as fd:
            for block in blocks:
                if not 0 <= block < len(self.checksums):
                    raise IndexError(f"there is no block {block} in {self.path}; it has {len(self.checksums)}, from 0")
                rows, extent = self._rows_of(block), self._extent(block)
                content = memory[: len(extent)]
                _read_at(self.path, fd, [content.numpy().data], extent.start)
                if verify and zlib.crc32(content.numpy().data) != self.checksums[block]:
                    raise _damaged(self.path, f"its rows {rows.start} to {rows.stop - 1} don't fit their checksum")
                yield rows, content.view(self.dtype).view(len(rows), *self.shape)

    def read_rows(self, rows: NDArray[np.int64], out: Tensor | None = None) -> Tensor:
        """Activations `(n, *F)` of `rows` by plain reads: for files that may shrink, which kills whoever maps them.

        Rows that lie side by side are read at once, and repeated ones only once. No checksum is looked at.

        Args:
            rows: `(n,)`, in any order, with repeats.
            out: where to put them: contiguous `(n, *F)` of the part's dtype, on the CPU; a new tensor if None.

        Raises:
            IndexError: for a row that isn't there.
            ValueError: for another `out`.
            FileNotFoundError: if the file is gone.
            DamagedFileError: for bytes that can't be read, and if the file has become too short.
        """
        if len(rows) and not 0 <= rows.min() <= rows.max() < self.num_rows:
            raise IndexError(
                f"rows from {rows.min()} to {rows.max()} of {self.path}; it has {self.num_rows} rows, counted from 0"
            )
        out = torch.empty((len(rows), *self.shape), dtype=self.dtype) if out is None else self._checked(out, len(rows))
        distinct, places, which = np.unique(rows, return_index=True, return_inverse=True)
        memory, row_bytes = out.view(-1).view(torch.uint8).numpy().data, self._rows.row_bytes
        with self._open_features() as fd:
            for row, stretches in _reads(distinct, places):
                buffers = [memory[each.start * row_bytes : each.stop * row_bytes] for each in stretches]
                _read_at(self.path, fd, buffers, self.features_offset + row * row_bytes)
        sources = places[which]
        repeats = np.flatnonzero(sources != np.arange(len(rows)))
        out[torch.from_numpy(repeats)] = out[torch.from_numpy(sources[repeats])]
        return out

    def verify(self) -> list[range]:
        """The rows of each block whose checksum no longer fits its features; an empty list for a sound part.

        Reads all features with plain reads, past the mapping, in a few threads that hold 256 KiB each.

        Raises:
            FileNotFoundError: if the file is gone.
            DamagedFileError: for bytes that can't be read, and if the file has become too short.
        """
        blocks = range(len(self.checksums))
        shares = [blocks[start : start + _SHARE_BLOCKS] for start in blocks[::_SHARE_BLOCKS]]
        with self._open_features() as fd, ThreadPoolExecutor(min(4, num_processors())) as pool:
            damaged = chain.from_iterable(pool.map(partial(self._damaged_among, fd), shares))
            return [self._rows_of(block) for block in damaged]

    @property
    def _rows(self) -> _Rows:
        return _Rows(num_rows=self.num_rows, shape=self.shape, dtype=self.dtype)

    @property
    def _features_end(self) -> int:
        return self.features_offset + self._rows.num_bytes

    def _rows_of(self, block: int) -> range:
        return range(self.num_rows)[block * self.block_rows :][: self.block_rows]

    def _extent(self, block: int) -> range:
        """The bytes of the file that hold a block."""
        rows, row_bytes = self._rows_of(block), self._rows.row_bytes
        return range(self.features_offset + rows.start * row_bytes, self.features_offset + rows.stop * row_bytes)

    def _damaged_among(self, fd: int, blocks: range) -> list[int]:
        buffer = _new_buffer()
        return [
            block
            for block in blocks
            if _crc_of_file(self.path, fd, [self._extent(block)], buffer) != self.checksums[block]
        ]

    @contextmanager
    def _open_features(self) -> Iterator[int]:
        """A descriptor of the file, which reaches behind its features."""
        with _opened(self.path) as fd:
            self._check_size(os.fstat(fd).st_size)
            yield fd

    def _check_size(self, size: int) -> None:
        if size < self._features_end:
            raise _truncated(self.path, missing=self._features_end - size)

    def _checked(self, out: Tensor, num_rows: int) -> Tensor:
        """`out`, if it has place for so many rows, and for nothing else."""
        shape = (num_rows, *self.shape)
        if (out.dtype, out.shape) != (self.dtype, shape) or out.device.type != "cpu" or not out.is_contiguous():
            raise ValueError(
                f"out is {out.dtype} {tuple(out.shape)} with strides {out.stride()} on {out.device}; for these rows "
                f"pass one of {self.dtype} {shape}, contiguous on the CPU"
            )
        return out

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

    @classmethod
    def read_facts(cls, path: Path) -> dict[str, Json]:
        """The facts alone, which fit their own checksum; of a file of version 1, which has none, all is checked.

        Raises:
            FileNotFoundError: if there is no such file.
            DamagedFileError: if it is not an image table, of a newer version, or its facts are truncated or altered.
        """
        with _opened(path) as fd:
            head = _read_user_block(path, fd)
            _check_kind(path, head, "images")
            found = [(extent, crc) for name, extent, crc in _read_regions(head) if name == "facts"]
            if not found:  # version 1
                return cls.open(path).facts
            ((extent, crc),) = found
            text = bytearray(len(extent))
            _read_at(path, fd, [memoryview(text)], extent.start)
            if zlib.crc32(text) != crc:
                raise _damaged(path, "bytes are altered in its facts")
            facts: dict[str, Json] = json.loads(text.rstrip(b"\0"))
            return facts


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


def _check_features(chunks: Sequence[Tensor], *, num_rows: int | None = None) -> _Rows:
    """What the chunks hold together, or the first of those that `num_rows` rows come in."""
    if not chunks:
        raise ValueError("there are no chunks of features, hence no row shape; for a part without rows pass (0, *F)")
    first = chunks[0]
    if first.dtype not in _DTYPES:
        raise TypeError(f"features of {first.dtype} can't be stored; convert them to float16, float32 or bfloat16")
    if first.ndim == 0 or 0 in first.shape[1:]:
        raise ValueError(f"features of shape {tuple(first.shape)} are not rows of values; pass (n, *F), no zeros in F")
    for chunk in chunks:
        _check_chunk(chunk, first)
    return _Rows(
        num_rows=sum(map(len, chunks)) if num_rows is None else num_rows,
        shape=tuple(first.shape[1:]),
        dtype=first.dtype,
    )


def _check_chunk(chunk: Tensor, first: Tensor) -> None:
    if (chunk.dtype, chunk.ndim, chunk.shape[1:]) != (first.dtype, first.ndim, first.shape[1:]):
        raise ValueError(
            f"a chunk of features is {chunk.dtype} {tuple(chunk.shape)}, the first one {first.dtype} "
            f"{tuple(first.shape)}; all rows of a part must have one dtype and shape"
        )
    if chunk.device.type != "cpu" or not chunk.is_contiguous():
        raise ValueError(f"a chunk of features on {chunk.device} is not contiguous on the CPU; pass a copy that is")


def _check_drawn(chunks: Iterator[Tensor], rows: _Rows) -> Iterator[Tensor]:
    """`chunks`, each checked when it is drawn; together they must be `rows`."""
    first, drawn = None, 0
    for chunk in chunks:
        first = chunk[:0] if first is None else first
        _check_chunk(chunk, first)
        drawn += len(chunk)
        if drawn > rows.num_rows:
            break
        yield chunk
    if drawn != rows.num_rows:
        raise ValueError(f"the chunks of features have not the {rows.num_rows} rows that there are digests of: {drawn}")


def _check_row_facts(name: str, array: NDArray[np.uint8], shape: tuple[int, ...]) -> None:
    if array.dtype != np.uint8 or array.shape != shape:
        raise ValueError(f"{name} are {array.dtype} {array.shape}; beside these features they must be uint8 {shape}")


def _check_table_columns(columns: Mapping[str, NDArray[Any]]) -> None:
    if len(columns) >= _MAX_REGIONS:
        raise ValueError(f"a table of {len(columns)} columns; its user block has room for {_MAX_REGIONS - 1}")
    for name, column in columns.items():
        if not re.fullmatch(f"[a-z_]{{1,{_MAX_NAME_BYTES}}}", name) or name == "facts":
            raise ValueError(
                f"a column can't be named {name!r}; use up to {_MAX_NAME_BYTES} of a-z and _, and not 'facts'"
            )
        if column.dtype.kind not in "iuf" or column.dtype.itemsize > 8:
            raise TypeError(
                f"column {name} is {column.dtype}; store integers or floats of at most 8 bytes (text as uint8 with "
                "offsets)"
            )


def _check_more_columns(columns: Mapping[str, NDArray[Any]], *, taken: Collection[str]) -> None:
    room = _MAX_REGIONS - len(taken)  # the features need none there, and the facts one
    if len(columns) > room:
        raise ValueError(f"{len(columns)} columns beside a part's own; its user block has room for {room}")
    for name in columns:
        if name in taken:
            raise ValueError(f"a part has a dataset {name!r} of its own; give that column another name")
    # To the format a string is so many bytes: their names and number are checked as those of bytes.
    _check_table_columns(
        {name: np.zeros(0, np.uint8) if column.dtype.kind == "S" else column for name, column in columns.items()}
    )


# ---- the user block, which lies before the HDF5 file

_MAGIC = b"featstore; HDF5 from byte 4096.\n"
_USER_BLOCK_BYTES = 4096
_FEATURES_ALIGNMENT = 4096
_FIELDS = struct.Struct("<32sI12sQQQI")  # magic, version, kind, file length, features offset, their bytes, CRC-32
_REGION_FIELDS = struct.Struct("<III")  # since version 2: CRC-32 of the user block and of the structure, regions
_REGION = struct.Struct("<40sQQI4x")  # dataset, offset, bytes, CRC-32
_CRC_OFFSET, _HEADER_CRC_OFFSET, _REGIONS_OFFSET = 72, 76, 128
_MAX_REGIONS = (_USER_BLOCK_BYTES - _REGIONS_OFFSET) // _REGION.size
_MAX_NAME_BYTES = 40

_Kind = Literal["part", "images"]


@dataclass(frozen=True, kw_only=True)
class _Layout:
    """Where everything lies in a file, as its user block says.

    Attributes:
        kind: of the file.
        length: of the file, in bytes.
        features: their bytes; none at 0 if there are none.
        regions: the bytes of each dataset beside the features that has any, in the order of the file.
    """

    kind: _Kind
    length: int
    features: range
    regions: Mapping[str, range]

    @property
    def rest(self) -> list[range]:
        """The bytes that belong neither to the user block nor to the features."""
        before = range(_USER_BLOCK_BYTES, self.features.start)
        behind = range(max(_USER_BLOCK_BYTES, self.features.stop), self.length)
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


def _own_crc(user_block: bytes | bytearray) -> int:
    """CRC-32 of a user block, the fields of this one and of the whole file's taken as zero."""
    end = _HEADER_CRC_OFFSET + 4
    return zlib.crc32(user_block[:_CRC_OFFSET] + bytes(end - _CRC_OFFSET) + user_block[end:])


# ---- making the frame: every byte of a file outside its features


@dataclass(frozen=True, kw_only=True)
class _Frame:
    """A file in memory, without its features: as they lie last, `image` ends where they begin.

    Should a version of HDF5 put something behind the features, `image` has their whole length as a gap, and the file
    is as good; it only takes the memory.
    """

    layout: _Layout
    image: memoryview  # its first 4096 bytes are still empty

    def bytes_of(self, extent: range) -> memoryview:
        return self.image[extent.start : extent.stop]

    def user_block(self) -> bytes:
        """The user block, for `image` as it is now."""
        layout = self.layout
        block = bytearray(_USER_BLOCK_BYTES)
        extents = (layout.length, layout.features.start, len(layout.features))
        _FIELDS.pack_into(block, 0, _MAGIC, FORMAT_VERSION, layout.kind.encode(), *extents, 0)
        _REGION_FIELDS.pack_into(block, _FIELDS.size, 0, self._crc(layout.structure), len(layout.regions))
        for number, (name, extent) in enumerate(layout.regions.items()):
            place = _REGIONS_OFFSET + number * _REGION.size
            _REGION.pack_into(block, place, name.encode(), extent.start, len(extent), self._crc([extent]))
        struct.pack_into("<I", block, _HEADER_CRC_OFFSET, _own_crc(block))
        struct.pack_into("<I", block, _CRC_OFFSET, self._crc(layout.rest, zlib.crc32(block)))
        return bytes(block)

    def _crc(self, extents: Iterable[range], crc: int = 0) -> int:
        for extent in extents:
            crc = zlib.crc32(self.bytes_of(extent), crc)
        return crc


def _make_frame(
    kind: _Kind, columns: Mapping[str, NDArray[Any]], facts: Mapping[str, Json], rows: _Rows | None
) -> _Frame:
    text = canonical_json(dict(facts)).encode("ascii")
    features_bytes = rows.num_bytes if rows else 0
    features_offset = 0
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
            is_text = column.dtype.kind == "S"
            dtype = h5py.string_dtype("utf-8", column.itemsize) if is_text else column.dtype.newbyteorder("<")
            values = np.asarray(column, dtype)
            _add_dataset(hdf5, name, h5py.h5t.py_create(dtype, logical=True), values.shape)[...] = values
        text_type = h5py.h5t.py_create(h5py.string_dtype("utf-8", len(text)), logical=True)
        _add_dataset(hdf5, "facts", text_type, ())[()] = text
        if rows:
            hdf5["crc"].attrs["block_rows"] = np.uint64(rows.block_rows)
            features_offset = _extent_of(_add_features(hdf5, rows)).start
        regions = [(name, _extent_of(hdf5[name])) for name in (*columns, "facts") if hdf5[name].size]
    image.seek(0, io.SEEK_END)
    image.write(bytes(max(0, features_offset - image.tell())))  # up to the page where the features begin
    features = range(features_offset, features_offset + features_bytes)
    layout = _Layout(
        kind=kind,
        length=max(image.tell(), features.stop),
        features=features,
        regions=dict(sorted(regions, key=lambda region: region[1].start)),
    )
    # A copy, for a buffer of `image` must not outlive it: the traceback of a failed write keeps both for the collector,
    # which from Python 3.13 on complains about that to stderr.
    return _Frame(layout=layout, image=memoryview(bytearray(image.getbuffer())))


def _add_features(hdf5: h5py.File, rows: _Rows) -> h5py.Dataset:
    # A new name may need one more piece of the root group, which would lie behind the features; so make room before,
    # and have it take its place: from 9 datasets on the pieces get theirs when they are written.
    hdf5["features"] = hdf5["facts"]
    hdf5.flush()
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


def _extent_of(dataset: h5py.Dataset) -> range:
    """The bytes of the file that hold the dataset's values; none at 0 if it has none, for which HDF5 has no answer."""
    if not dataset.size:
        return range(0)
    start = dataset.id.get_offset()
    if start is None:
        raise ValueError(f"{dataset.name} is not contiguous")
    return range(start, start + dataset.id.get_storage_size())


# ---- writing


def _write_features(fd: int, chunks: Iterable[Tensor], offset: int, block_bytes: int) -> list[int]:
    """Write all chunks from `offset` on; the CRC-32 of each block, which chunks may share."""
    checksums: list[int] = []
    written = 0
    with ThreadPoolExecutor(min(_MAX_SUMMING, num_processors())) as pool:
        for chunk in chunks:
            content = chunk.reshape(-1).view(torch.uint8).numpy().data
            pieces = _pieces(content, written, block_bytes)
            before = checksums.pop() if pieces and written % block_bytes else 0
            shares = [pieces[start : start + _SHARE_BLOCKS] for start in range(0, len(pieces), _SHARE_BLOCKS)]
            befores = [before, *(0 for _ in shares[1:])]
            # Summed up while the system copies it; threads cost more than they save for less.
            summed = (pool.map if len(content) >= _BLOCK_BYTES else map)(_checksums, shares, befores)
            _write_at(fd, content, offset + written)
            checksums += [crc for share in summed for crc in share]
            written += len(content)
    return checksums


def _pieces(content: memoryview, written: int, block_bytes: int) -> list[memoryview]:
    """`content` by blocks, where `written` bytes lie before it: the first piece may go on with a block."""
    head = min(-written % block_bytes, len(content))
    pieces = [content[start : start + block_bytes] for start in range(head, len(content), block_bytes)]
    return [content[:head], *pieces] if head else pieces


def _checksums(pieces: Sequence[memoryview], before: int) -> list[int]:
    """The CRC-32 of each piece; the first one goes on from `before`."""
    return [zlib.crc32(piece, 0 if place else before) for place, piece in enumerate(pieces)]


def _write_frame(fd: int, frame: _Frame) -> None:
    """Write everything but the features, the user block last."""
    for extent in frame.layout.rest:
        _write_at(fd, frame.bytes_of(extent), extent.start)
    _write_at(fd, memoryview(frame.user_block()), 0)


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
    except BaseException as error:
        if isinstance(error, OSError) and error.filename is None and error.errno in _FULL:
            error.filename = os.fspath(path)  # operations on descriptors name none
        with suppress(OSError):  # the first error is the one to tell
            temporary.unlink()
        raise
    _sync_folder(path.parent)


# ---- every operation that changes the disk, so that a test can fail, record or stop at any of them

_MAX_WRITE_BYTES = 64 << 20
_MAX_SUMMING = 3  # threads, beside the one that writes
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


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
def _open_checked(path: Path, kind: _Kind) -> Iterator[tuple[_Layout, h5py.File]]:
    """The file's layout and HDF5 structure, open for reading, after every check that needs no structure.

    `ValueError`, and what h5py raises about files, becomes a `DamagedFileError` about the structure.
    """
    with _opened(path) as fd:
        layout = _read_layout(path, fd, kind)
        try:
            with os.fdopen(fd, "rb", closefd=False) as file, h5py.File(file, "r") as hdf5:
                yield layout, hdf5
        except (KeyError, OSError, RuntimeError, ValueError) as error:
            raise _damaged(path, f"its HDF5 structure is not that of the format ({error})") from error


def _read_layout(path: Path, fd: int, kind: _Kind) -> _Layout:
    """The file's layout, once every byte outside the features is what was written."""
    head = _read_user_block(path, fd)
    size = os.fstat(fd).st_size
    _, version, _, length, features_offset, features_bytes, crc_expected = _FIELDS.unpack_from(head)
    if size < length:
        raise _truncated(path, missing=length - size)
    _check_kind(path, head, kind)
    if size > length or features_offset + features_bytes > length:
        raise _damaged(path, f"it has {size} bytes, which its user block contradicts")
    layout = _Layout(
        kind=kind,
        length=length,
        features=range(features_offset, features_offset + features_bytes),
        regions={name: extent for name, extent, _ in _read_regions(head)} if version > 1 else {},
    )
    crc = zlib.crc32(head[:_CRC_OFFSET] + bytes(4) + head[_CRC_OFFSET + 4 :])
    crc = _crc_of_file(path, fd, layout.rest, _new_buffer(), crc)
    if crc != crc_expected:
        where = "outside its features" if version == 1 else f"in its {_altered(path, fd, head, layout)}"
        found = f"the checksum of all outside the features is {crc:08x}, not {crc_expected:08x}"
        raise _damaged(path, f"bytes are altered {where} ({found})")
    return layout


def _check_kind(path: Path, user_block: bytes, kind: _Kind) -> None:
    found = _FIELDS.unpack_from(user_block)[2]
    if found != kind.encode().ljust(len(found), b"\0"):
        named = found.rstrip(b"\0").decode("ascii", "backslashreplace")
        raise DamagedFileError(f"{path} is of the kind {named!r}, where {kind!r} was expected. {_REMEDY}")


def _read_user_block(path: Path, fd: int) -> bytes:
    """The user block of a file of a version that can be read; from version 2 on it fits its own checksum."""
    buffer = bytearray(min(_USER_BLOCK_BYTES, os.fstat(fd).st_size))
    _read_at(path, fd, [memoryview(buffer)], 0)
    head = bytes(buffer)
    start = _MAGIC + struct.pack("<I", FORMAT_VERSION)
    is_sealed = len(head) == _USER_BLOCK_BYTES and _fits_own_crc(start + head[len(start) :])
    if is_sealed and not head.startswith(start):
        raise _damaged(path, "bytes are altered in its header, in the first line or the version")
    if not head.startswith(_MAGIC[: len(head)]):
        raise DamagedFileError(
            f"{path} is not a file of featstore's, or damaged: it begins with {head[: len(_MAGIC)]!r}, "
            f"where {_MAGIC!r} was expected. {_REMEDY}"
        )
    if len(head) < _USER_BLOCK_BYTES:
        raise _truncated(path, missing=_USER_BLOCK_BYTES - len(head))
    (version,) = struct.unpack_from("<I", head, len(_MAGIC))
    if not 1 <= version <= FORMAT_VERSION:
        raise NewerFormatError(
            f"{path} has format version {version}; this featstore reads versions up to {FORMAT_VERSION}. "
            "Upgrade featstore to read it."
        )
    if version > 1 and not is_sealed:
        raise _damaged(path, "bytes are altered in its header (it doesn't fit its checksum)")
    return head


def _fits_own_crc(user_block: bytes) -> bool:
    (expected,) = struct.unpack_from("<I", user_block, _HEADER_CRC_OFFSET)
    return bool(_own_crc(user_block) == expected)


def _read_regions(user_block: bytes) -> list[tuple[str, range, int]]:
    """Each region's dataset, bytes and CRC-32."""
    _, _, count = _REGION_FIELDS.unpack_from(user_block, _FIELDS.size)
    found = []
    for number in range(min(count, _MAX_REGIONS)):
        name, start, length, crc = _REGION.unpack_from(user_block, _REGIONS_OFFSET + number * _REGION.size)
        found.append((name.rstrip(b"\0").decode("ascii", "backslashreplace"), range(start, start + length), crc))
    return found


_REGION_WORDS: dict[_Kind, dict[str, str]] = {
    "part": {"digest": "digests", "decoder": "decoders", "crc": "checksums", "facts": "facts"},
    "images": {"facts": "facts"},
}


def _altered(path: Path, fd: int, user_block: bytes, layout: _Layout) -> str:
    """What of a file from version 2 on is altered, in words, when all outside the features doesn't fit its checksum."""
    buffer = _new_buffer()
    found = []
    for name, extent, crc in _read_regions(user_block):
        if _crc_of_file(path, fd, [extent], buffer) != crc:
            found.append(_REGION_WORDS[layout.kind].get(name, f"column {name}"))
    _, structure_crc, _ = _REGION_FIELDS.unpack_from(user_block, _FIELDS.size)
    if _crc_of_file(path, fd, layout.structure, buffer) != structure_crc:
        found.append("structure")
    return " and ".join(found) or "header"  # if all else is sound, the checksum that didn't fit is not


def _read_features_type(hdf5: h5py.File, layout: _Layout) -> _Rows:
    features = _dataset(hdf5, "features")
    stored_type = features.id.get_type()
    dtype = next((dtype for dtype in _DTYPES if stored_type.equal(_hdf5_type(dtype))), None)
    if dtype is None or features.ndim == 0 or 0 in features.shape[1:]:
        raise ValueError(f"/features is {features.dtype} {features.shape}")
    rows = _Rows(num_rows=features.shape[0], shape=features.shape[1:], dtype=dtype)
    extent = _extent_of(features)
    if (extent.start, extent.stop) != (layout.features.start, layout.features.stop):  # empty ranges are all equal
        raise ValueError("/features lies elsewhere than the user block says")
    if layout.features.start % _FEATURES_ALIGNMENT:
        raise ValueError(f"/features begins at byte {layout.features.start}, no multiple of {_FEATURES_ALIGNMENT}")
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


# ---- bytes of a file, by plain reads

_BUFFER_BYTES = 1 << 18  # stays in the processor's cache between the read and the checksum
_SHARE_BLOCKS = 4  # a share takes about a millisecond, which is much beside handing it to a thread
_MAX_BUFFERS = 1024  # what Linux and macOS take in one call
_IS_NO_FILE = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    """A descriptor to read the file at `path`; what else may be there under its name is refused without waiting."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)  # a pipe would wait for someone who writes
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO):  # ENXIO: a socket
            raise DamagedFileError(f"{path} can't be opened: {error.strerror}. {_NO_FILE_REMEDY}") from error
        raise
    try:
        if what := _IS_NO_FILE.get(stat.S_IFMT(os.fstat(fd).st_mode)):
            raise DamagedFileError(f"{path} is {what}, where a file was expected. {_NO_FILE_REMEDY}")
        yield fd
    finally:
        os.close(fd)


def _reads(rows: NDArray[np.int64], places: NDArray[np.int64]) -> Iterator[tuple[int, list[range]]]:
    """What to read at once: its first row, and the stretches of places that its rows go to one after the other.

    Args:
        rows: rising.
        places: where each of them goes.
    """
    is_next_row = np.diff(rows, prepend=-2) == 1
    starts = np.flatnonzero(~(is_next_row & (np.diff(places, prepend=-2) == 1)))
    lengths = np.diff(starts, append=len(rows))
    columns = (rows[starts], places[starts], lengths, is_next_row[starts])
    first_row, stretches = 0, list[range]()
    for row, place, length, continues in zip(*(column.tolist() for column in columns), strict=True):
        if stretches and (not continues or len(stretches) == _MAX_BUFFERS):
            yield first_row, stretches
            stretches = []
        if not stretches:
            first_row = row
        stretches.append(range(place, place + length))
    if stretches:
        yield first_row, stretches


def _crc_of_file(path: Path, fd: int, extents: Iterable[range], buffer: memoryview, crc: int = 0) -> int:
    """CRC-32 of the bytes of all `extents`, continued from `crc`; they pass through `buffer`."""
    for extent in extents:
        for start in range(extent.start, extent.stop, len(buffer)):
            piece = buffer[: extent.stop - start]
            _read_at(path, fd, [piece], start)
            crc = zlib.crc32(piece, crc)
    return crc


def _new_buffer() -> memoryview:
    return memoryview(bytearray(_BUFFER_BYTES))


def _read_at(path: Path, fd: int, buffers: list[memoryview], offset: int) -> None:
    """Fill up to 1024 `buffers`, one after the other, from the bytes at `offset`.

    Raises:
        DamagedFileError: if the file ends before, or the disk can't read it.
        FileNotFoundError: if the file was deleted on the file server that holds it.
        OSError: as the system gave it otherwise, with the file's name.
    """
    end = offset + sum(map(len, buffers))
    while offset < end:
        try:
            count = os.preadv(fd, buffers, offset)
        except OSError as error:
            raise _unreadable(path, range(offset, end), error) from error
        if not count:
            raise _truncated(path, missing=end - offset)
        offset += count
        buffers = _unfilled(buffers, count)


def _unfilled(buffers: list[memoryview], count: int) -> list[memoryview]:
    """What is left to fill of `buffers` after `count` bytes."""
    for place, buffer in enumerate(buffers):
        if count < len(buffer):
            return [buffer[count:], *buffers[place + 1 :]]
        count -= len(buffer)
    return []


# ---- what is said about a file


_NO_FILE_REMEDY = (
    "Put a sound copy in its place, or delete it and extract or import again, which files only what is then missing."
)
_REMEDY = (
    "Put a sound copy in its place, or set it aside (featstore verify --repair) and extract or import again, which "
    "files only what is then missing."
)


def _damaged(path: Path, what: str) -> DamagedFileError:
    return DamagedFileError(f"{path} is damaged: {what}. {_REMEDY}")


def _truncated(path: Path, missing: int) -> DamagedFileError:
    return _damaged(path, f"it is truncated, {missing} bytes are missing at its end")


def _unreadable(path: Path, extent: range, error: OSError) -> OSError | DamagedFileError:
    where = f"its bytes {extent.start} to {extent.stop - 1} can't be read ({error.strerror})"
    if error.errno == errno.EIO:
        return _damaged(path, where)
    if error.errno == errno.ESTALE:  # how a network file system says that an open file has been deleted
        return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), os.fspath(path))
    return OSError(error.errno, where, os.fspath(path))
