"""One part: an HDF5 file with the features of one feature set, written whole or not at all, checked when opened.

`docs/format.md` says what each byte means. Torch is loaded by what gives or takes tensors, not by who only asks what a
part holds.
"""

from __future__ import annotations

import math
import os
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from featstore.digest import Json
from featstore.files import disk
from featstore.files.hdf5 import BLOCK_BYTES, Frame, StoredRows, check_columns, opened_checked
from featstore.files.header import MAX_REGIONS
from featstore.files.plain_reads import MAX_BUFFERS, Opened, OpenFile, crc_of, damaged, opened
from featstore.files.scaled import ScaledRows
from featstore.files.storage_types import FLOATS, STORAGE_TYPES, StorageType, storage_type_of
from featstore.machine import num_processors

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_DIGEST_BYTES = 32
_SHARE_BLOCKS = 4  # a share takes about a millisecond, which is much beside handing it to a thread
_MAX_SUMMING = 3  # threads, beside the one that writes


def write_part(
    path: Path,
    *,
    features: Tensor | ScaledRows | Sequence[Tensor | ScaledRows] | Iterator[Tensor | ScaledRows],
    digests: NDArray[np.uint8],
    decoders: NDArray[np.uint8],
    facts: Mapping[str, Json],
    columns: Mapping[str, NDArray[Any]] | None = None,
) -> None:
    """Writes a part that appears at `path` whole and synced, or not at all.

    It grows under a temporary name in the same folder, which must exist. Beside `features` the writer holds about 33
    bytes a row in memory, at the start twice that.

    Args:
        path: the final name, which must be free. The check and the rename are two steps, so names that several
            processes choose need something random in them.
        features: activations `(n, *F)`, contiguous, on the CPU, float16, float32 or bfloat16, or scaled; or the same
            rows in chunks, of which there must be one even if it has no rows. That values are finite is the caller's
            check. An iterator's chunks are drawn while the file is written, each once the one before it is on its way.
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
    from torch import Tensor

    scales = np.zeros(len(digests), "<f4")
    chunks: Iterable[Tensor]
    if isinstance(features, Iterator):
        first = list(islice(features, 1))
        rows = _check_features(first, num_rows=len(digests))
        chunks = _check_drawn(_without_scales(chain(first, features), rows, scales), rows)
    else:
        whole = [features] if isinstance(features, Tensor | ScaledRows) else features
        rows = _check_features(whole)
        chunks = _without_scales(whole, rows, scales)
    _check_row_facts("digests", digests, (rows.num_rows, _DIGEST_BYTES))
    _check_row_facts("decoders", decoders, (rows.num_rows,))
    checksums = np.zeros(rows.num_blocks, "<u4")
    own: dict[str, NDArray[Any]] = {"digest": digests, "decoder": decoders, "crc": checksums}
    if rows.storage_type.is_scaled:
        own["scale"] = scales
    more = dict(columns or {})
    _check_more_columns(more, taken={"features", *own})
    frame = Frame.of("part", {**own, **more}, facts, rows)
    layout = frame.layout
    with disk.whole_or_nothing(path, layout.length) as fd:
        checksums[:] = _write_features(fd, chunks, layout.features.start, rows.block_rows * rows.row_bytes)
        if rows.num_rows:
            frame.put("crc", checksums)
            if rows.storage_type.is_scaled:
                frame.put("scale", scales)
        frame.write(fd)


@dataclass(frozen=True, kw_only=True, eq=False)
class Part:
    """A part that `Part.open` found sound. It holds no file handle, pickles, and works in other processes.

    Attributes:
        path: the file.
        num_rows: n, which may be 0.
        shape: `F`, the shape of one row.
        storage_type: of its numbers.
        facts: the JSON facts.
        digests: `(n, 32)` uint8, the SHA-256 of each row's image.
        decoders: `(n,)` uint8, which decoder read each row's image.
        scales: `(n,)` float32, of scaled rows; else None.
        checksums: uint32, the CRC-32 of each block of `block_rows` rows.
        block_rows: rows in a block of features; the last block may have fewer.
        features_offset: where in the file the features begin, in bytes.
        length: of the file, in bytes.
    """

    path: Path
    num_rows: int
    shape: tuple[int, ...]
    storage_type: StorageType
    facts: dict[str, Json]
    digests: NDArray[np.uint8]
    decoders: NDArray[np.uint8]
    scales: NDArray[np.float32] | None
    checksums: NDArray[np.uint32]
    block_rows: int
    features_offset: int
    length: int

    @classmethod
    def open(cls, path: Path) -> Part:
        """The part at `path`, once its version, its length and every byte outside the features are checked.

        Raises:
            FileNotFoundError: if there is no such file.
            DamagedFileError: if it is not a part, of a newer version, truncated, or altered outside its features.
        """
        with opened_checked(path, "part") as structure:
            rows, block_rows = structure.rows(), structure.block_rows()
            return cls(
                path=path,
                num_rows=rows.num_rows,
                shape=rows.shape,
                storage_type=rows.storage_type,
                facts=structure.facts(),
                digests=structure.column("digest", "u1", (rows.num_rows, _DIGEST_BYTES)),
                decoders=structure.column("decoder", "u1", (rows.num_rows,)),
                scales=structure.column("scale", "<f4", (rows.num_rows,)) if rows.storage_type.is_scaled else None,
                checksums=structure.column("crc", "<u4", (math.ceil(rows.num_rows / block_rows),)),
                block_rows=block_rows,
                features_offset=structure.layout.features.start,
                length=structure.layout.length,
            )

    @property
    def dtype(self) -> torch.dtype:
        """Of the features as they are stored: torch.float16, float32, bfloat16, or int8 of scaled ones."""
        return self.storage_type.torch_dtype

    @property
    def row_bytes(self) -> int:
        """Size of one row."""
        return self._rows.row_bytes

    @property
    def num_bytes(self) -> int:
        """Size of all features."""
        return self._rows.num_bytes

    @cached_property
    def features(self) -> Tensor:
        """Activations `(n, *F)`, mapped: read from the disk when touched, their pages shared between processes.

        Writing into the tensor changes this process' copy of a page, never the file.

        Raises:
            FileNotFoundError: if the file is gone.
            DamagedFileError: if it has become too short to map.
            ValueError: for an object of an object store.
        """
        import torch

        if not self.num_rows:
            return torch.empty((0, *self.shape), dtype=self.dtype)
        with self._open_features() as file:  # and its size checked: touching a page behind the end kills the process
            if not isinstance(file, OpenFile):
                raise ValueError(f"{self.path} is no file of this machine and can't be mapped. Read it plainly.")
            # By the descriptor, which a file keeps that has lost its name, and whose name is always text.
            link = f"/dev/fd/{file.fd}"
            name = link if os.path.exists(link) else os.fspath(file.path)
            # A private mapping of torch's is copy-on-write and keeps no descriptor; Python's mmap keeps one a part.
            file_bytes = torch.from_file(name, shared=False, size=self._features_end, dtype=torch.uint8)
        return file_bytes[self.features_offset :].view(self.dtype).view(self.num_rows, *self.shape)

    def read_chunks(self, blocks: Iterable[int]) -> Iterator[tuple[range, Tensor | ScaledRows]]:
        """As `read_blocks`, checked, and scaled rows with their scales: what `write_part` takes."""
        import torch

        for rows, numbers in self.read_blocks(blocks):
            if self.scales is None:
                yield rows, numbers
            else:
                yield rows, ScaledRows(numbers, torch.from_numpy(self.scales[rows.start : rows.stop]))

    def read_blocks(self, blocks: Iterable[int], *, verify: bool = True) -> Iterator[tuple[range, Tensor]]:
        """For each of `blocks` the range of its rows and their activations `(rows, *F)`, by plain reads.

        Of scaled rows it is the numbers alone, here as in `features` and `read_rows`.

        As `read_block_bytes`, whose arguments and errors these are.
        """
        import torch

        for rows, content in self.read_block_bytes(blocks, verify=verify):
            yield rows, torch.from_numpy(content).reshape(-1).view(self.dtype).view(len(rows), *self.shape)

    def read_block_bytes(
        self, blocks: Iterable[int], *, verify: bool = True
    ) -> Iterator[tuple[range, NDArray[np.uint8]]]:
        """For each of `blocks` the range of its rows and their bytes `(rows, row_bytes)`, by plain reads.

        All arrays share memory: each holds its block until the next step, and who keeps rows copies them.
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
        num_rows, wanted = min(self.num_rows, self.block_rows), iter(blocks)
        with self._open_features() as file:
            memory = np.empty((file.blocks_at_once(num_rows * self.row_bytes), num_rows, self.row_bytes), np.uint8)
            while some := list(islice(wanted, len(memory))):
                for block in some:
                    if not 0 <= block < len(self.checksums):
                        raise IndexError(
                            f"there is no block {block} in {self.path}; it has {len(self.checksums)}, from 0"
                        )
                contents = [content[: len(self._rows_of(block))] for block, content in zip(some, memory, strict=False)]
                starts = [self._extent(block).start for block in some]
                file.read([(at, [each.reshape(-1).data]) for at, each in zip(starts, contents, strict=True)])
                for block, content in zip(some, contents, strict=True):
                    rows = self._rows_of(block)
                    if verify and zlib.crc32(content.data) != self.checksums[block]:
                        raise damaged(self.path, f"its rows {rows.start} to {rows.stop - 1} don't fit their checksum")
                    yield rows, content

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
        import torch

        out = torch.empty((len(rows), *self.shape), dtype=self.dtype) if out is None else self._checked(out, len(rows))
        self.read_row_bytes(rows, out.view(-1).view(torch.uint8).numpy().reshape(len(rows), self.row_bytes))
        return out

    def read_row_bytes(self, rows: NDArray[np.int64], out: NDArray[np.uint8]) -> None:
        """Puts the bytes of `rows` into `out` `(n, row_bytes)`, contiguous; as `read_rows`, whose errors these are."""
        if len(rows) and not 0 <= rows.min() <= rows.max() < self.num_rows:
            raise IndexError(
                f"rows from {rows.min()} to {rows.max()} of {self.path}; it has {self.num_rows} rows, counted from 0"
            )
        distinct, places, which = np.unique(rows, return_index=True, return_inverse=True)
        memory, row_bytes = out.reshape(-1).data, self.row_bytes
        with self._open_features() as file:
            file.read(
                (
                    self.features_offset + row * row_bytes,
                    [memory[each.start * row_bytes : each.stop * row_bytes] for each in stretches],
                )
                for row, stretches in _reads(distinct, places)
            )
        sources = places[which]
        repeats = np.flatnonzero(sources != np.arange(len(rows)))
        out[repeats] = out[sources[repeats]]

    def verify(self) -> list[range]:
        """The rows of each block whose checksum no longer fits its features; an empty list for a sound part.

        Reads all features with plain reads, past the mapping, in a few threads that hold 256 KiB each.

        Raises:
            FileNotFoundError: if the file is gone.
            DamagedFileError: for bytes that can't be read, and if the file has become too short.
        """
        blocks = range(len(self.checksums))
        shares = [blocks[start : start + _SHARE_BLOCKS] for start in blocks[::_SHARE_BLOCKS]]
        with self._open_features() as file, ThreadPoolExecutor(file.num_readers) as pool:
            damaged = chain.from_iterable(pool.map(partial(self._damaged_among, file), shares))
            return [self._rows_of(block) for block in damaged]

    @property
    def _rows(self) -> StoredRows:
        return StoredRows(num_rows=self.num_rows, shape=self.shape, storage_type=self.storage_type)

    @property
    def _features_end(self) -> int:
        return self.features_offset + self.num_bytes

    def _rows_of(self, block: int) -> range:
        return range(self.num_rows)[block * self.block_rows :][: self.block_rows]

    def _extent(self, block: int) -> range:
        """The bytes of the file that hold a block."""
        rows, row_bytes = self._rows_of(block), self.row_bytes
        return range(self.features_offset + rows.start * row_bytes, self.features_offset + rows.stop * row_bytes)

    def _damaged_among(self, file: Opened, blocks: range) -> list[int]:
        buffer = file.new_buffer()
        return [block for block in blocks if crc_of(file, [self._extent(block)], buffer) != self.checksums[block]]

    @contextmanager
    def _open_features(self) -> Iterator[Opened]:
        """The file, which reaches behind its features."""
        with opened(self.path) as file:
            file.check_reaches(self._features_end)
            yield file

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


# ---- what a caller may pass


def _check_features(features: Sequence[Tensor | ScaledRows], *, num_rows: int | None = None) -> StoredRows:
    """What the chunks hold together, or the first of those that `num_rows` rows come in."""
    if not features:
        raise ValueError("there are no chunks of features, hence no row shape; for a part without rows pass (0, *F)")
    chunks = [chunk.numbers if isinstance(chunk, ScaledRows) else chunk for chunk in features]
    first = chunks[0]
    storage_type = STORAGE_TYPES["int8"] if isinstance(features[0], ScaledRows) else storage_type_of(first.dtype)
    if storage_type is None:
        *names, last = FLOATS
        raise TypeError(f"features of {first.dtype} can't be stored; convert them to {', '.join(names)} or {last}")
    if first.ndim == 0 or 0 in first.shape[1:]:
        raise ValueError(f"features of shape {tuple(first.shape)} are not rows of values; pass (n, *F), no zeros in F")
    for chunk in chunks:
        _check_chunk(chunk, first)
    return StoredRows(
        num_rows=sum(map(len, chunks)) if num_rows is None else num_rows,
        shape=tuple(first.shape[1:]),
        storage_type=storage_type,
    )


def _check_chunk(chunk: Tensor, first: Tensor) -> None:
    if (chunk.dtype, chunk.ndim, chunk.shape[1:]) != (first.dtype, first.ndim, first.shape[1:]):
        raise ValueError(
            f"a chunk of features is {chunk.dtype} {tuple(chunk.shape)}, the first one {first.dtype} "
            f"{tuple(first.shape)}; all rows of a part must have one dtype and shape"
        )
    if chunk.device.type != "cpu" or not chunk.is_contiguous():
        raise ValueError(f"a chunk of features on {chunk.device} is not contiguous on the CPU; pass a copy that is")


def _without_scales(
    chunks: Iterable[Tensor | ScaledRows], rows: StoredRows, scales: NDArray[np.float32]
) -> Iterator[Tensor]:
    """The tensors to write, one a chunk; each chunk's scales are put into `scales` when it is drawn."""
    start = 0
    for chunk in chunks:
        if isinstance(chunk, ScaledRows) != rows.storage_type.is_scaled:
            raise ValueError("some chunks of features are scaled rows and others aren't; pass all as the first")
        if isinstance(chunk, ScaledRows):
            own = chunk.scales.numpy()[: len(scales) - start]  # more rows than there are digests of are refused next
            scales[start : start + len(own)] = own
            start += len(own)
            yield chunk.numbers
        else:
            yield chunk


def _check_drawn(chunks: Iterator[Tensor], rows: StoredRows) -> Iterator[Tensor]:
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


def _check_more_columns(columns: Mapping[str, NDArray[Any]], *, taken: Collection[str]) -> None:
    room = MAX_REGIONS - len(taken)  # the features need none there, and the facts one
    if len(columns) > room:
        raise ValueError(f"{len(columns)} columns beside a part's own; its user block has room for {room}")
    for name in columns:
        if name in taken:
            raise ValueError(f"a part has a dataset {name!r} of its own; give that column another name")
    # To the format a string is so many bytes: their names and number are checked as those of bytes.
    check_columns(
        {name: np.zeros(0, np.uint8) if column.dtype.kind == "S" else column for name, column in columns.items()}
    )


# ---- writing


def _write_features(fd: int, chunks: Iterable[Tensor], offset: int, block_bytes: int) -> list[int]:
    """Writes all chunks from `offset` on; the CRC-32 of each block, which chunks may share."""
    import torch

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
            summed = (pool.map if len(content) >= BLOCK_BYTES else map)(_checksums, shares, befores)
            disk.write_at(fd, content, offset + written)
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


# ---- reading


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
        if stretches and (not continues or len(stretches) == MAX_BUFFERS):
            yield first_row, stretches
            stretches = []
        if not stretches:
            first_row = row
        stretches.append(range(place, place + length))
    if stretches:
        yield first_row, stretches
