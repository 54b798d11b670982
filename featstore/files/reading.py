"""Reading rows of parts: from memory, from mapped files or by plain reads; by threads, ahead of whoever wants them."""

from __future__ import annotations

import math
import os
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from numpy.typing import NDArray

from featstore.files.part import Part
from featstore.machine import num_processors
from featstore.objects import ObjectPath

if TYPE_CHECKING:
    from torch import Tensor

NUM_THREADS = min(4, num_processors())
"""That read at once, with the one that waits for what is read. A few ask for all that a memory bus gives."""

Rows = NDArray[np.int64] | slice
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, eq=False)
class Places:
    """Where N rows lie.

    Attributes:
        parts: the files.
        part_of: ``(N,)``, the place of each row's part among them.
        row_in: ``(N,)``, the row in that part.
    """

    parts: Sequence[Part]
    part_of: NDArray[np.int64]
    row_in: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.row_in)

    @property
    def row_bytes(self) -> int:
        """Size of one row."""
        return self.parts[0].row_bytes

    @cached_property
    def scales(self) -> NDArray[np.float32] | None:
        """``(N,)``, of scaled rows; else None."""
        if not self.parts[0].storage_type.is_scaled:
            return None
        found = np.empty(len(self), np.float32)
        for part, where in self.by_part():
            scales = self.parts[part].scales
            assert scales is not None
            found[where] = scales[self.row_in[where]]
        return found

    def of(self, rows: Rows) -> Places:
        """Where some of the rows lie."""
        return Places(parts=self.parts, part_of=self.part_of[rows], row_in=self.row_in[rows])

    def by_part(self) -> Iterator[tuple[int, NDArray[np.int64]]]:
        """Each part's place with the places of its rows ``(n,)``, in the order of the file."""
        if not len(self):
            return
        order = np.lexsort((self.row_in, self.part_of))
        used, starts = np.unique(self.part_of[order], return_index=True)
        yield from zip(used.tolist(), np.split(order, starts[1:]), strict=True)


class Source(ABC):
    """Something that gives rows as bytes; may be used by several threads.

    Args:
        places: where they lie.
    """

    def __init__(self, places: Places) -> None:
        self.places = places

    @abstractmethod
    def take(self, rows: Rows, out: NDArray[np.uint8]) -> None:
        """Puts `rows` into `out` ``(n, row_bytes)``.

        Raises:
            OSError: if a file is gone or can't be read.
            DamagedFileError: if a file has changed.
        """


class InMemory(Source):
    """Rows ``(N, *F)``, as they are stored, that were read before."""

    def __init__(self, places: Places, values: Tensor) -> None:
        super().__init__(places)
        self.values = values
        self._bytes = as_bytes(values)

    def take(self, rows: Rows, out: NDArray[np.uint8]) -> None:  # noqa: D102
        _copy_rows(self._bytes, rows, out)


class InFiles(Source):
    """Rows in parts. A block is checked against its checksum before the first row of it is given, and once only."""

    def __init__(self, places: Places) -> None:
        super().__init__(places)
        self._checked = [np.zeros(len(part.checksums), bool) for part in places.parts]

    def check(self, part: int, row_in: NDArray[np.int64]) -> None:
        """Reads the blocks of these rows that nobody has asked for before.

        Raises:
            DamagedFileError: for one that doesn't fit its checksum; it names the file and the rows.
        """
        opened, checked = self.places.parts[part], self._checked[part]
        blocks = row_in // opened.block_rows
        unknown = np.unique(blocks[~checked[blocks]])
        if len(unknown):
            for _ in opened.read_block_bytes(unknown.tolist()):
                pass
            checked[unknown] = True


class Mapped(InFiles):
    """Rows in mapped parts.

    Args:
        places: where they lie.
        kept_bytes: pages are let go after about this much has been taken, so that they don't count as this process's
            memory for ever; None: they are kept.
    """

    def __init__(self, places: Places, *, kept_bytes: int | None = None) -> None:
        super().__init__(places)
        self.kept_bytes = kept_bytes
        self._mapped: dict[int, NDArray[np.uint8]] = {}
        self._taken = 0

    def take(self, rows: Rows, out: NDArray[np.uint8]) -> None:  # noqa: D102
        part_of, row_in = self.places.part_of[rows], self.places.row_in[rows]
        if len(row_in) == 0:
            return
        if (part_of == part_of[0]).all():
            self._copy(int(part_of[0]), row_in, out)
        else:
            self._gather(part_of, row_in, out)
        if self.kept_bytes is not None:
            self._taken += out.nbytes
            if self._taken >= self.kept_bytes:
                self._mapped, self._taken = {}, 0

    def _gather(self, part_of: NDArray[np.int64], row_in: NDArray[np.int64], out: NDArray[np.uint8]) -> None:
        """Part by part into memory that stays in the processor's cache, from where the rows go to their places."""
        order = np.argsort(part_of, kind="stable")
        used, starts = np.unique(part_of[order], return_index=True)
        near = np.empty_like(out)
        for part, start, end in zip(used.tolist(), starts, [*starts[1:], len(order)], strict=True):
            self._copy(part, row_in[order[start:end]], near[start:end])
        back = np.empty_like(order)
        back[order] = np.arange(len(order))
        _copy_rows(near, back, out)

    def _copy(self, part: int, row_in: NDArray[np.int64], out: NDArray[np.uint8]) -> None:
        self.check(part, row_in)
        _copy_rows(self._bytes_of(part), _as_slice(row_in), out)

    def _bytes_of(self, part: int) -> NDArray[np.uint8]:
        mapped = self._mapped  # another thread may let go of it meanwhile
        found = mapped.get(part)
        if found is None:
            opened = self.places.parts[part]
            fresh = opened if self.kept_bytes is None else replace(opened)  # a mapping of its own, to let go of
            found = mapped[part] = as_bytes(fresh.features)
        return found


class Plain(InFiles):
    """Rows in parts, by plain reads: for files that may be made shorter meanwhile."""

    def take(self, rows: Rows, out: NDArray[np.uint8]) -> None:  # noqa: D102
        wanted = self.places.of(rows)
        for part, where in wanted.by_part():
            row_in = wanted.row_in[where]
            blocks = row_in // self.places.parts[part].block_rows
            is_checked = self._checked[part][blocks]
            if not is_checked.all():
                # With the blocks that are read to be checked their rows are here.
                is_new = ~is_checked
                unknown = np.unique(blocks[is_new])
                _load_blocks(self.places.parts[part], unknown, row_in[is_new], where[is_new], out)
                self._checked[part][unknown] = True
            if is_checked.any():
                self._read(part, row_in[is_checked], _as_slice(where[is_checked]), out)

    def _read(self, part: int, row_in: NDArray[np.int64], where: Rows, out: NDArray[np.uint8]) -> None:
        opened = self.places.parts[part]
        if isinstance(where, slice):
            opened.read_row_bytes(row_in, out[where])
        else:
            read = np.empty((len(row_in), opened.row_bytes), np.uint8)
            opened.read_row_bytes(row_in, read)
            out[where] = read


def load(places: Places, out: Tensor) -> Tensor:
    """Puts all rows into `out` ``(N, *F)``; each block that holds some is read once and must fit its checksum.

    Raises:
        OSError: if a file is gone or can't be read.
        DamagedFileError: for a block that doesn't fit its checksum; it names the file and the rows.
    """
    for _ in ahead(_loading(places, as_bytes(out)), depth=2 * NUM_THREADS):
        pass
    return out


def as_bytes(values: Tensor) -> NDArray[np.uint8]:
    """The bytes ``(n, row_bytes)`` of the rows of a contiguous tensor ``(n, *F)``; they share their memory."""
    import torch

    array: NDArray[np.uint8] = values.reshape(len(values), math.prod(values.shape[1:])).view(torch.uint8).numpy()
    return array


def ahead(tasks: Iterable[Callable[[], T]], *, depth: int) -> Iterator[T]:
    """Results of `tasks` in their order; threads carry out up to `depth` of them before their results are wanted.

    Who has to wait for a result carries out tasks too. With two processors that is half of all hands.
    """
    with ThreadPoolExecutor(max(1, NUM_THREADS - 1), thread_name_prefix="featstore-read") as pool:
        pending: deque[tuple[Callable[[], T], Future[T]]] = deque()
        try:
            for task in tasks:
                pending.append((task, pool.submit(task)))
                if len(pending) >= depth:
                    yield _first_result(pending)
            while pending:
                yield _first_result(pending)
        finally:
            for _, future in pending:
                future.cancel()


@cache
def keep_freed_batches() -> None:
    """Lets the C library keep up to 62 MB that batches free, for the next ones.

    It would give them back to the system, which zeroes every page anew: a third of the time of a batch of 13 MB. glibc
    raises both of its thresholds when a large block is freed; to others this does nothing.
    """
    import torch

    torch.empty(31 << 20, dtype=torch.uint8)


def _first_result(pending: deque[tuple[Callable[[], T], Future[T]]]) -> T:
    """The result of the first pending task, and meanwhile those of tasks that no thread has begun."""
    while not pending[0][1].done():
        for place, (task, future) in enumerate(pending):
            if future.cancel():
                pending[place] = task, _carried_out(task)
                break
        else:
            break
    return pending.popleft()[1].result()


def _carried_out(task: Callable[[], T]) -> Future[T]:
    done: Future[T] = Future()
    try:
        done.set_result(task())
    except Exception as error:
        done.set_exception(error)
    return done


class Blocks:
    """Rows by the blocks of files in which they lie, for reading stretches of files in random order."""

    def __init__(self, places: Places) -> None:
        self.places = places
        sizes = np.array([part.block_rows for part in places.parts])
        before = np.cumsum([0, *(len(part.checksums) for part in places.parts)])
        block_of = before[places.part_of] + places.row_in // sizes[places.part_of]
        counts = np.bincount(block_of, minlength=before[-1])
        self._rows = np.argsort(block_of, kind="stable")
        self._ends = np.cumsum(counts)
        self._counts, self._before = counts, before

    def windows(self, rng: np.random.Generator, *, num_rows: int) -> Iterator[NDArray[np.int64]]:
        """All rows in a random order: windows of whole blocks, about `num_rows` each, with their rows well mixed.

        While a window is in use the system reads the next one.
        """
        order = rng.permutation(np.flatnonzero(self._counts))
        ends = np.cumsum(self._counts[order])
        window_of = (ends - 1) // num_rows
        following: NDArray[np.int64] | None = None
        for blocks in np.split(order, np.flatnonzero(np.diff(window_of)) + 1):
            self._announce(np.sort(blocks))
            if following is not None:
                yield following
            rows = [self._rows[self._ends[block] - self._counts[block] : self._ends[block]] for block in blocks]
            following = rng.permutation(np.concatenate(rows)) if rows else np.zeros(0, np.int64)
        if following is not None and len(following):
            yield following

    def largest_window(self, *, num_rows: int) -> int:
        """No window of `num_rows` has more than so many."""
        return min(len(self.places), num_rows + int(self._counts.max(initial=0)))

    def _announce(self, blocks: NDArray[np.int64]) -> None:
        """Tells the system to begin reading these blocks."""
        if not hasattr(os, "posix_fadvise"):  # macOS
            return
        part_of = np.searchsorted(self._before, blocks, side="right") - 1
        for part in np.unique(part_of).tolist():
            opened = self.places.parts[part]
            if isinstance(opened.path, ObjectPath):
                continue
            block_bytes = opened.block_rows * self.places.row_bytes
            with suppress(OSError), opened.path.open("rb") as file:  # one that has vanished is missed when it is read
                for start, stop in _stretches(blocks[part_of == part] - self._before[part]):
                    offset, length = opened.features_offset + start * block_bytes, (stop - start) * block_bytes
                    os.posix_fadvise(file.fileno(), offset, length, os.POSIX_FADV_WILLNEED)


_BLOCKS_A_TASK = 8


def _loading(places: Places, values: NDArray[np.uint8]) -> Iterator[Callable[[], None]]:
    for part, where in places.by_part():
        opened = places.parts[part]
        rows = places.row_in[where]
        blocks = np.unique(rows // opened.block_rows)
        for start in range(0, len(blocks), _BLOCKS_A_TASK):
            yield partial(_load_blocks, opened, blocks[start : start + _BLOCKS_A_TASK], rows, where, values)


def _load_blocks(
    opened: Part,
    blocks: NDArray[np.int64],
    rows: NDArray[np.int64],
    where: NDArray[np.int64],
    values: NDArray[np.uint8],
) -> None:
    """Reads blocks; the rising `rows` of the part go to the places `where` of `values`."""
    for extent, block in opened.read_block_bytes(blocks.tolist()):
        first, last = np.searchsorted(rows, [extent.start, extent.stop])
        values[_as_slice(where[first:last])] = block[_as_slice(rows[first:last] - extent.start)]


def _copy_rows(values: NDArray[np.uint8], rows: Rows, out: NDArray[np.uint8]) -> None:
    if isinstance(rows, slice):
        out[...] = values[rows]
    else:
        np.take(values, rows, axis=0, out=out, mode="clip")  # rows are known to be there; other modes copy twice


def _as_slice(rows: NDArray[np.int64]) -> Rows:
    """Rows that follow one another, as a slice, which is copied at once."""
    if len(rows) and rows[-1] - rows[0] == len(rows) - 1 and (np.diff(rows) == 1).all():
        return slice(int(rows[0]), int(rows[-1]) + 1)
    return rows


def _stretches(numbers: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """First and behind the last of each stretch of rising numbers that follow one another."""
    breaks = np.flatnonzero(np.diff(numbers) != 1) + 1
    for stretch in np.split(numbers, breaks):
        if len(stretch):
            yield int(stretch[0]), int(stretch[-1]) + 1
