"""Features: rows of one feature set for one image set, joined by image and never by position.

Long, since each way to take rows has its own needs of memory, and all choose among the same three of reading.
"""

from __future__ import annotations

import errno
import math
import operator
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import cycle
from pathlib import Path
from types import EllipsisType
from typing import Any, Literal, TypeAlias, overload
from weakref import WeakSet

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from featstore.errors import MissingFeaturesError
from featstore.files.index import RowIndex
from featstore.files.part import Part
from featstore.files.reading import (
    NUM_THREADS,
    Blocks,
    InMemory,
    Mapped,
    Places,
    Plain,
    Rows,
    Source,
    ahead,
    as_bytes,
    keep_freed_batches,
    load,
)
from featstore.files.scaled import ScaledRows
from featstore.files.storage_types import StorageType
from featstore.images.image_set import ImageSet
from featstore.machine import available_bytes, file_system, is_local
from featstore.objects import ObjectPath
from featstore.remedies import Command
from featstore.store.access import Access
from featstore.store.spec import FeatureSpec
from featstore.words import size_text

_Batch = tuple[Tensor, NDArray[np.int64]]
_Chosen: TypeAlias = int | slice | Sequence[int] | NDArray[Any] | Tensor


class Features:
    """Activations ``(N, *F)`` of the N images of `images`, in their order.

    They are read in one of three ways. Which one is chosen by size when the first rows are wanted, and `access` says
    it:

    * ``memory``: all rows are read once, where they take no more than half of the memory that is free. Single rows are
      read from the files until a tenth of all has been asked for.
    * ``map``: rows are copied out of mapped files, which stay in the system's cache; where they fit into free memory.
    * ``stream``: for what is larger than memory. A shuffled epoch reads whole stretches of the files, in random order,
      and mixes rows within a window of many stretches: `shuffling` says how well. Memory stays bounded.

    In each of them a block of rows (about 1 MB) is checked against its checksum before the first row of it is given.
    Files that another machine might make shorter meanwhile are never mapped, but read plainly: on Linux, all that lie
    on a file system that isn't known to be local, whichever way was asked for. Other systems don't say what a file
    system is; there all count as local. Where memory is limited nothing is mapped either, unless ``map`` was asked for.

    Holds no file handle, pickles (without rows in memory), and may be used from several threads and processes.

    Args:
        images: whose features these are; images without a row (failed ones, where that was allowed) are left out.
        spec: what decided the values.
        index: of the feature set.
        part_of: ``(N,)``, the place of each image's part in the index.
        row_in: ``(N,)``, its row in that part.
        access: auto, or one of the ways.
        memory_bytes: most memory that rows may take: all of them in the way ``memory``, or the two windows of a
            stream, of up to 256 MiB and a quarter of this each. Default: half of what is free. On top come, measured,
            up to eight batches (handed out, or ahead of that), up to 35 MB that threads work with or the C library
            keeps, and 50 bytes a row.
        lookup: gives an index of the set as it is now, for when a file has vanished: compaction replaces files.

    Attributes:
        images: as above.
        spec: as above.
    """

    def __init__(
        self,
        images: ImageSet,
        spec: FeatureSpec,
        index: RowIndex,
        part_of: NDArray[np.int64],
        row_in: NDArray[np.int64],
        *,
        access: Access | Literal["auto"] = "auto",
        memory_bytes: int | None = None,
        lookup: Callable[[], RowIndex] | None = None,
    ) -> None:
        self.images, self.spec = images, spec
        self._places = Places(parts=index.parts, part_of=part_of, row_in=row_in)
        self._access, self._memory_bytes, self._lookup = access, memory_bytes, lookup
        self._forget()

    def __len__(self) -> int:
        return len(self._places)

    @property
    def parts(self) -> Sequence[Part]:
        """The files that hold the rows."""
        return self._places.parts

    @property
    def key(self) -> str:
        """The key of the feature set."""
        return self.spec.key

    @property
    def shape(self) -> tuple[int, ...]:
        """``(N, *F)``."""
        return (len(self), *self.parts[0].shape)

    @property
    def storage_type(self) -> StorageType:
        """Of the stored values."""
        return self.parts[0].storage_type

    @property
    def dtype(self) -> torch.dtype:
        """Of the rows that are given: as stored, torch.float16, float32 or bfloat16; float32 where that is int8."""
        return self.storage_type.read_as.torch_dtype

    @property
    def num_bytes(self) -> int:
        """Size of all rows, as stored."""
        return len(self) * self._places.row_bytes

    @property
    def ids(self) -> tuple[str, ...]:
        """The images' ids."""
        return self.images.ids

    @property
    def targets(self) -> NDArray[Any] | None:
        """The images' targets, as `ImageSet.targets`."""
        return self.images.targets

    @property
    def access(self) -> str:
        """How rows are read, in words."""
        size = size_text(self.num_bytes)
        if self._way == "memory":
            return f"memory: {size}, read once"
        kinds = {_kind_of_place(part.path) for part in self.parts}
        how = "mapped" if self._is_mapped else f"read plainly from {', '.join(sorted(kinds))}"
        if self._way == "map":
            return f"map: {size}, {how}"
        return f"stream: {size}, {how} in windows of {size_text(self._window_bytes)}"

    @property
    def shuffling(self) -> str:
        """How well a shuffled epoch is mixed, in words."""
        if self._way != "stream":
            return "uniform: every order of the rows is equally likely"
        stretch = max(part.block_rows for part in self.parts)
        window = min(max(self._window_bytes // self._places.row_bytes, stretch), len(self))
        return (
            f"by blocks: stretches of {stretch:,} rows in random order, and rows mix uniformly within windows of "
            f"{math.ceil(window / stretch):,} stretches, about {window:,} of {len(self):,} rows"
        )

    @overload
    def __getitem__(self, rows: tuple[_Chosen, EllipsisType]) -> NDArray[np.float32]: ...  # type: ignore[overload-overlap]

    @overload
    def __getitem__(self, rows: _Chosen) -> Tensor: ...

    def __getitem__(self, rows: _Chosen | tuple[_Chosen, EllipsisType]) -> Tensor | NDArray[np.float32]:
        """Activations of `rows`, which may repeat and come in any order: a new tensor ``(n, *F)`` of `dtype`.

        One whole number gives one row ``(*F)``; a slice, a boolean mask and negative numbers mean what they mean in
        numpy. ``features[rows, ...]``, which is how scikit-learn takes the rows of a fold, is an array of float32.

        Raises:
            IndexError: for a row that isn't there, and for anything but whole numbers, slices and masks of rows.
        """
        if isinstance(rows, tuple):
            if len(rows) != 2 or rows[1] is not Ellipsis:
                raise IndexError(
                    f"features[{', '.join(map(repr, rows))}] picks within rows, and features are chosen by row alone; "
                    "expected features[rows]. Pick within what that gives."
                )
            wide: NDArray[np.float32] = self[rows[0]].float().numpy()
            return wide
        chosen = _numbers(rows.cpu().numpy() if isinstance(rows, Tensor) else rows, len(self))
        if chosen.ndim > 1:
            raise IndexError(f"rows have {chosen.ndim} dimensions; expected whole numbers in one, a slice or a mask.")
        wanted, out = chosen.reshape(-1), self._empty(chosen.size)
        several = max(1, self._task_bytes // self._given_bytes)
        if len(wanted) < 2 * several:
            self._fill(wanted, out)
        else:
            pieces = range(0, len(wanted), several)
            tasks = (partial(self._fill, wanted[at : at + several], out[at : at + several]) for at in pieces)
            for _ in ahead(tasks, depth=NUM_THREADS + 2):
                pass
        return out if chosen.ndim else out[0]

    def batches(
        self, batch_size: int, *, shuffle: bool = False, seed: int = 0, drop_last: bool = False
    ) -> Iterator[tuple[Tensor, NDArray[np.int64]]]:
        """Batches of (activations ``(n, *F)``, row numbers ``(n,)``), each row once; threads read ahead.

        Nobody writes to a batch's memory again. Small batches that follow one another are views of one tensor of a few
        megabytes: who keeps one for long keeps all of that, or clones it.

        Args:
            batch_size: rows a batch; the last may have fewer.
            shuffle: a random order; `shuffling` says how random.
            seed: of that order. In the ways ``memory`` and ``map`` it is the same for the same seed and number of
                images. In a stream it depends on `memory_bytes` too, and on how the rows lie in files, which compaction
                changes; and ``auto`` chooses by the memory that is free. So who needs one order for good asks for
                ``memory`` or ``map``. The size of batches changes nothing.
            drop_last: leaves a short last batch out.
        """
        batch_size = operator.index(batch_size)
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; expected at least 1 row a batch.")
        batches = self._shuffled(batch_size, seed) if shuffle else self._in_order(batch_size)
        return (batch for batch in batches if len(batch[1]) == batch_size) if drop_last else batches

    def stored(self, rows: slice) -> Tensor | ScaledRows:
        """Rows as they are stored: what another file of the same storage type gets."""
        num_rows = len(range(*rows.indices(len(self))))
        numbers, scales = self._taken(rows, self._empty_stored(num_rows))
        return numbers if scales is None else ScaledRows(numbers, torch.from_numpy(scales))

    def dataset(self) -> FeatureDataset:
        """The rows as a `torch.utils.data.Dataset`, for a DataLoader; `batches` is faster."""
        return FeatureDataset(self)

    def tensor(self, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> Tensor:
        """All activations ``(N, *F)`` in memory, on `device`, in their own type or in `dtype`.

        Raises:
            DamagedFileError: for rows that don't fit their checksum.
        """
        return self._all().to(device=device, dtype=dtype or self.dtype)

    def numpy(self) -> NDArray[Any]:
        """All activations ``(N, *F)`` in memory; bfloat16, which numpy lacks, as float32. Errors as in `tensor`."""
        values = self._all()
        array: NDArray[Any] = values.to(self.storage_type.in_numpy.torch_dtype).numpy()
        return array

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        """All activations ``(N, *F)`` as ``np.asarray(features)``, float32 whatever they are stored as.

        So other libraries compute with them as they should: in float16 sums overflow at 65,504.

        Raises:
            ValueError: with ``copy=False``, as they are read anew each time.
        """
        if copy is False:
            raise ValueError("copy is False, and an array of features is made of what is read. Leave it out.")
        array = self.tensor(dtype=torch.float32).numpy()
        return array if dtype is None else array.astype(dtype, copy=False)

    def __repr__(self) -> str:
        return f"Features({'x'.join(map(str, self.shape))} {self.storage_type.name}, set {self.key[:4]})"

    def __getstate__(self) -> dict[str, Any]:
        dropped = {"_lock", "_memory", "_files", "_chosen", "_local", "_blocks"}
        return {name: value for name, value in self.__dict__.items() if name not in dropped}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    # -------------------------------------------------------------------------------------------- which way to read

    def _forget(self) -> None:
        self._lock = threading.Lock()
        _ALIVE.add(self)
        self._memory: InMemory | None = None
        self._files: Source | None = None
        self._chosen: Access | None = None
        self._local: tuple[Places, bool] | None = None
        self._blocks: Blocks | None = None
        self._asked = 0  # rows, one by one

    @property
    def _way(self) -> Access:
        """Chosen once, as free memory changes."""
        if self._chosen is None:
            self._chosen = self._way_by_size() if self._access == "auto" else self._access
        return self._chosen

    def _way_by_size(self) -> Access:
        if self._is_mapped and get_worker_info() is not None:
            return "map"  # each worker of a DataLoader would load all rows for itself; they share what is mapped
        free = available_bytes()
        if self.num_bytes <= (free // 2 if self._memory_bytes is None else self._memory_bytes):
            return "memory"
        return "map" if self._is_mapped and self.num_bytes <= free else "stream"

    @property
    def _is_mapped(self) -> bool:
        """Whether rows are copied out of mapped files where they aren't in memory.

        Not where memory is limited, unless someone says so: the system maps 64 KB and more around each row that is
        touched, which counts as this process's memory.
        """
        return (self._memory_bytes is None or self._access == "map") and self._may_map

    @property
    def _may_map(self) -> bool:
        """Whether each file itself, which may be linked here, is local; asked again of the files that replace them."""
        known, places = self._local, self._places
        if known is None or known[0] is not places:
            known = self._local = places, all(_may_be_mapped(part.path) for part in places.parts)
        return known[1]

    @property
    def _window_bytes(self) -> int:
        """Of a stream, which holds two at a time, beside batches."""
        return _WINDOW_BYTES if self._memory_bytes is None else max(1, min(_WINDOW_BYTES, self._memory_bytes // 4))

    @property
    def _window_rows(self) -> int:
        """About as many; the last block of a window is whole."""
        return max(1, self._window_bytes // self._places.row_bytes)

    @property
    def _task_bytes(self) -> int:
        """Rows that a thread takes at once: enough to be worth its while, and a few times this in all."""
        return _TASK_BYTES if self._memory_bytes is None else min(_TASK_BYTES, self._memory_bytes // 16)

    def _source(self, num_rows: int) -> Source:
        """Where to take `num_rows` rows from; all rows are loaded once so many have been asked for that it pays."""
        if self._memory is not None:
            return self._memory
        with self._lock:
            self._asked += num_rows
            if self._way == "memory" and self._asked * _LOAD_SHARE >= len(self) and self._memory is None:
                self._memory = InMemory(self._places, load(self._places, self._empty_stored(len(self))))
            if self._memory is not None:
                return self._memory
            if self._files is None:
                kept = _KEPT_BYTES if self._way == "stream" else None
                self._files = Mapped(self._places, kept_bytes=kept) if self._is_mapped else Plain(self._places)
            return self._files

    # ------------------------------------------------------------------------------------------------- taking rows

    def _empty(self, num_rows: int) -> Tensor:
        return torch.empty((num_rows, *self.parts[0].shape), dtype=self.dtype)

    def _empty_stored(self, num_rows: int) -> Tensor:
        return torch.empty((num_rows, *self.parts[0].shape), dtype=self.storage_type.torch_dtype)

    @property
    def _given_bytes(self) -> int:
        """Size of a row as it is given."""
        return math.prod(self.parts[0].shape) * self.dtype.itemsize

    def _fill(self, rows: Rows, out: Tensor) -> None:
        if self.storage_type.is_scaled:
            _give(*self._taken(rows, self._empty_stored(len(out))), out)
        else:
            self._taken(rows, out)

    def _taken(self, rows: Rows, out: Tensor) -> tuple[Tensor, NDArray[np.float32] | None]:
        """`out`, which has rows as they are stored now, and their scales, if they have some."""

        def take() -> NDArray[np.float32] | None:
            source = self._source(len(out))
            source.take(rows, as_bytes(out))
            scales = source.places.scales
            return None if scales is None else scales[rows]

        return out, self._retried(take)

    def _load(self, rows: Rows, out: Tensor) -> NDArray[np.float32] | None:
        """Puts rows into `out` as they are stored; gives their scales, if they have some."""

        def read() -> NDArray[np.float32] | None:
            places = self._places.of(rows)
            load(places, out)
            return places.scales

        scales: NDArray[np.float32] | None = self._retried(read)
        return scales

    def _all(self) -> Tensor:
        """All rows, the caller's own."""
        memory, everything = self._memory, self._empty(len(self))
        if memory is not None:
            _give(memory.values, memory.places.scales, everything)
        elif self.storage_type.is_scaled:
            numbers = self._empty_stored(len(self))
            _give(numbers, self._load(slice(None), numbers), everything)
        else:
            self._load(slice(None), everything)
        return everything

    def _retried(self, read: Callable[[], Any]) -> Any:
        """What `read` gives, after vanished files have been looked up again."""
        for _ in range(_LOOKUPS):
            places = self._places
            try:
                return read()
            except OSError as error:
                if self._lookup is None or error.errno not in (errno.ENOENT, errno.ESTALE):
                    raise
                self._look_up_again(places, error)
        return read()

    def _look_up_again(self, places: Places, error: OSError) -> None:
        with self._lock:
            if self._places is not places:  # another thread was faster
                return
            assert self._lookup is not None
            digests = np.empty((len(places), 32), np.uint8)
            for part, where in places.by_part():
                digests[where] = places.parts[part].digests[places.row_in[where]]
            index = self._lookup()
            part_of, row_in = index.find(digests)
            if (part_of < 0).any():
                raise MissingFeaturesError(
                    f"{error.filename} is gone, and with it the rows of {int((part_of < 0).sum()):,} of the "
                    f"{len(places):,} images of {self.images.name} in set {self.key[:8]}. Someone has removed them. "
                    "Compute them again with",
                    remedy=Command("featstore", "extract"),
                ) from error
            self._places = Places(parts=index.parts, part_of=part_of, row_in=row_in)
            self._files = None

    # ----------------------------------------------------------------------------------------------------- batches

    def _in_order(self, batch_size: int) -> Iterator[_Batch]:
        several = self._several(batch_size)
        everything = np.arange(len(self))
        pieces = (slice(start, min(start + several, len(self))) for start in range(0, len(self), several))
        return self._gathered(((piece, everything[piece]) for piece in pieces), batch_size)

    def _shuffled(self, batch_size: int, seed: int) -> Iterator[_Batch]:
        rng, several = np.random.default_rng(seed), self._several(batch_size)
        if self._way != "stream":
            order = rng.permutation(len(self))
            pieces = (order[start : start + several] for start in range(0, len(self), several))
            return self._gathered(((piece, piece) for piece in pieces), batch_size)
        blocks = self._by_block
        windows = blocks.windows(rng, num_rows=self._window_rows)
        if not self._is_mapped:
            return self._read(windows, blocks.largest_window(num_rows=self._window_rows), batch_size)
        return self._gathered(((piece, piece) for piece in _cut(windows, several)), batch_size)

    def _several(self, batch_size: int) -> int:
        """Rows of the batches that one thread takes at once."""
        return max(1, self._task_bytes // (batch_size * self._given_bytes)) * batch_size

    @property
    def _by_block(self) -> Blocks:
        blocks = self._blocks
        if blocks is None or blocks.places is not self._places:
            blocks = self._blocks = Blocks(self._places)
        return blocks

    def _gathered(self, pieces: Iterator[tuple[Rows, NDArray[np.int64]]], batch_size: int) -> Iterator[_Batch]:
        """Batches of rows and their numbers that come in pieces; each piece but the last holds whole batches."""
        self._retried(lambda: self._source(len(self)))  # loads once, before threads want rows
        for batches in ahead(self._tasks(pieces), depth=NUM_THREADS + 2):
            if batches is None:
                continue
            values, numbers = batches
            for first in range(0, len(numbers), batch_size):
                yield values[first : first + batch_size], numbers[first : first + batch_size]

    def _tasks(self, pieces: Iterator[tuple[Rows, NDArray[np.int64]]]) -> Iterator[Callable[[], _Batch | None]]:
        """What threads do: fill the memory of a piece, a few megabytes each; the last of them gives the piece."""
        step = max(1, self._task_bytes // self._given_bytes)

        def fill(rows: Rows, values: Tensor, piece: _Batch | None) -> _Batch | None:
            self._fill(rows, values)
            return piece

        if self._memory_bytes is None:
            keep_freed_batches()
        for rows, numbers in pieces:
            # Made here and not in the threads, whose memory goes back to the system and comes zeroed each time.
            values = self._empty(len(numbers))
            for start in range(0, len(numbers), step):
                end = min(start + step, len(numbers))
                is_last = end == len(numbers)
                some = slice(rows.start + start, rows.start + end) if isinstance(rows, slice) else rows[start:end]
                yield partial(fill, some, values[start:end], (values, numbers) if is_last else None)

    def _read(self, windows: Iterator[NDArray[np.int64]], most: int, batch_size: int) -> Iterator[_Batch]:
        """Batches out of windows of up to `most` rows, read plainly, each block checked against its checksum."""
        # In two pieces of memory by turns: when the window after the next is begun, this one's rows are in batches.
        # The C library would keep much of what was freed and taken anew for each.
        memory = cycle([self._empty_stored(most), self._empty_stored(most)])
        tasks = (partial(self._load_window, rows, next(memory)[: len(rows)]) for rows in windows)
        size, filled = min(batch_size, len(self)), 0
        batch, numbers = self._empty(size), np.empty(size, np.int64)
        for stored, scales, rows in ahead(tasks, depth=2):
            first = 0
            while first < len(rows):
                count = min(size - filled, len(rows) - first)
                some = slice(first, first + count)
                _give(stored[some], None if scales is None else scales[some], batch[filled : filled + count])
                numbers[filled : filled + count] = rows[first : first + count]
                first, filled = first + count, filled + count
                if filled == size:
                    yield batch, numbers
                    batch, numbers, filled = self._empty(size), np.empty(size, np.int64), 0
        if filled:
            yield batch[:filled], numbers[:filled]

    def _load_window(
        self, rows: NDArray[np.int64], window: Tensor
    ) -> tuple[Tensor, NDArray[np.float32] | None, NDArray[np.int64]]:
        return window, self._load(rows, window), rows


class FeatureDataset(Dataset[Any]):
    """`(activations (*F), target)` of each image, or activations alone where the images have no labels.

    A DataLoader takes all rows of a batch at once. Works in worker processes however they are started; where rows lie
    in an object store, and this process has asked it, they must be spawned.
    """

    def __init__(self, features: Features) -> None:
        self.features = features

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, row: int) -> Any:
        return self.__getitems__([row])[0]

    def __getitems__(self, rows: list[int]) -> list[Any]:
        """The items of several rows; torch's fetcher calls this."""
        values, targets = self.features[rows], self.features.targets
        if targets is None:
            return list(values)
        return list(zip(values, torch.from_numpy(np.asarray(targets[rows])), strict=True))


def _give(stored: Tensor, scales: NDArray[np.float32] | None, out: Tensor) -> None:
    """Puts the values of rows, as they are stored, into `out`."""
    if scales is None:
        out.copy_(stored)
    else:
        ScaledRows(stored, torch.from_numpy(scales)).values(out)


def _kind_of_place(path: Path) -> str:
    if isinstance(path, ObjectPath):
        return path.bucket
    return file_system(path) or "an unknown file system"


def _may_be_mapped(path: Path) -> bool:
    return not isinstance(path, ObjectPath) and is_local(path)


def _cut(windows: Iterator[NDArray[np.int64]], size: int) -> Iterator[NDArray[np.int64]]:
    """The rows of all windows, in pieces of `size`; the last one may have fewer."""
    held = np.zeros(0, np.int64)
    for window in windows:
        held = np.concatenate([held, window])
        whole = len(held) // size * size
        for start in range(0, whole, size):
            yield held[start : start + size]
        held = held[whole:]
    if len(held):
        yield held


def _start_in_child() -> None:
    """Starts anew, in a forked child, what its parent had locked or chosen.

    A thread of the parent may have held a lock, and isn't here to release it. And what the parent would have read into
    memory is chosen anew: each worker of a DataLoader would read it all for itself.
    """
    for features in _ALIVE:
        features._lock = threading.Lock()
        if features._memory is None:
            features._chosen = None


_ALIVE: WeakSet[Features] = WeakSet()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_in_child)

_WINDOW_BYTES = 256 << 20
_KEPT_BYTES = 1 << 30
_TASK_BYTES = 4 << 20
_LOAD_SHARE = 10
_LOOKUPS = 5


def _numbers(rows: Any, length: int) -> NDArray[np.int64]:
    """The rows that numpy would choose of `length`; none or one dimension where `rows` are what they should be."""
    numbers = None if isinstance(rows, slice) else np.asarray(rows)
    if numbers is None or numbers.dtype.kind not in "iu":
        return np.asarray(np.arange(length)[rows])
    if numbers.size and not -length <= int(numbers.min()) <= int(numbers.max()) < length:
        raise IndexError(f"rows from {numbers.min():,} to {numbers.max():,} of {length:,}; they are counted from 0.")
    numbers = numbers.astype(np.int64)
    return np.where(numbers < 0, numbers + length, numbers)  # in place of all numbers, for speed
