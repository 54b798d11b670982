"""Image digests: the content digest of each image of a set, and what is known of images from before.

Making an object for each of a million images takes seconds and half a gigabyte, so all of this lies in arrays.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, compress, repeat
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from featstore.digest import canonical_json
from featstore.machine import available_bytes


class StatFacts(NamedTuple):
    """What the file system said about a file when its bytes were hashed; times in nanoseconds since 1970."""

    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int
    hashed_at_ns: int

    @classmethod
    def of_row(cls, row: Sequence[int]) -> StatFacts | None:
        """The facts in a row of `Digests.stats`; None if it holds none."""
        facts = cls(*row)
        return facts._replace(inode=facts.inode % (1 << 64)) if facts.size >= 0 else None


class KnownDigest(NamedTuple):
    """The SHA-256 (32 bytes) of an image's content, and the file's facts at that time; None where there was no file."""

    digest: bytes
    stat: StatFacts | None


@dataclass(frozen=True, kw_only=True, eq=False)
class Digests:
    """The content digests of one image set, row i for its image i.

    Attributes:
        values: `(N, 32)` uint8; zeros where the image could not be read. Read-only, as is `stats`.
        failed: why, for each such index, in rising order.
        stats: `(N, 5)` int64, the `StatFacts` of each file, which let a later run trust the digest; an inode, which is
            a uint64, as the int64 of the same bits. All -1 for arrays and failed images.
    """

    values: NDArray[np.uint8]
    failed: dict[int, str]
    stats: NDArray[np.int64]

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", _read_only(self.values))
        object.__setattr__(self, "stats", _read_only(self.stats))

    def __len__(self) -> int:
        return len(self.values)

    @property
    def is_failed(self) -> NDArray[np.bool_]:
        """`(N,)` True where there is no digest."""
        mask = np.zeros(len(self), dtype=bool)
        mask[list(self.failed)] = True
        return mask

    def duplicates(self) -> list[tuple[int, ...]]:
        """Indices of images with equal content, two or more at a time, each in rising order; failed images excluded."""
        places: dict[bytes, list[int]] = {}
        for index in np.flatnonzero(_shares_prefix(self.values) & ~self.is_failed).tolist():
            places.setdefault(self.values[index].tobytes(), []).append(index)
        return [tuple(group) for group in places.values() if len(group) > 1]


@dataclass(frozen=True, eq=False)
class DigestTable:
    """Digests of images by id; of each image there is one.

    Attributes:
        ids: each once.
        values: `(N, 32)`, as in `Digests`.
        stats: `(N, 5)`, as in `Digests`.
    """

    ids: tuple[str, ...]
    values: NDArray[np.uint8]
    stats: NDArray[np.int64]

    @classmethod
    def of(cls, ids: tuple[str, ...], digests: Digests) -> DigestTable:
        """Those of images that didn't fail; where none did, nothing is copied."""
        if not digests.failed:
            return cls(ids, digests.values, digests.stats)
        has_digest = ~digests.is_failed
        return cls(tuple(compress(ids, has_digest.tolist())), digests.values[has_digest], digests.stats[has_digest])

    @classmethod
    def without_files(cls, ids: tuple[str, ...], values: NDArray[np.uint8]) -> DigestTable:
        """Digests of images that are no files, or whose files nobody can look at."""
        return cls(ids, values, no_stats(len(ids)))

    def __post_init__(self) -> None:
        assert len(self.ids) == len(self.values) == len(self.stats)
        object.__setattr__(self, "values", _read_only(self.values))
        object.__setattr__(self, "stats", _read_only(self.stats))

    def rows(self, ids: Sequence[str]) -> NDArray[np.int64]:
        """`(M,)` the row of each id; -1 where there is none."""
        return np.fromiter(map(self.row_of.get, ids, repeat(-1)), np.int64, len(ids))

    @cached_property
    def row_of(self) -> dict[str, int]:
        """Id -> row; made on first need, as it takes 75 bytes an image."""
        return dict(zip(self.ids, range(len(self.ids)), strict=True))

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "row_of"}


class Found(NamedTuple):
    """What is known of N images; where all are known, the arrays may be those of a table.

    Attributes:
        is_known: `(N,)`.
        values: `(N, 32)`, as in `Digests`; zeros of images that aren't known.
        stats: `(N, 5)`, as in `Digests`; -1 of images that aren't known.
    """

    is_known: NDArray[np.bool_]
    values: NDArray[np.uint8]
    stats: NDArray[np.int64]

    @classmethod
    def nothing(cls, count: int) -> Found:
        """So far nothing, of `count` images."""
        return cls(np.zeros(count, bool), np.zeros((count, 32), np.uint8), no_stats(count).copy())

    def put(self, where: NDArray[Any], values: NDArray[np.uint8], stats: NDArray[np.int64]) -> None:
        """Fills in some images, chosen by a mask or places."""
        self.is_known[where], self.values[where], self.stats[where] = True, values, stats


class KnownDigests(Mapping[str, KnownDigest]):
    """Digests of images by id, from any number of tables; of those that have an id, the last one counts.

    A `KnownDigest` is made when it is asked for. `find` looks up many images at once.
    """

    def __init__(self, tables: Iterable[DigestTable] = ()) -> None:
        self.tables = tuple(dict.fromkeys(tables))

    @classmethod
    def of(cls, known: Mapping[str, KnownDigest]) -> KnownDigests:
        """`known` in arrays; itself if it is that already."""
        if isinstance(known, cls):
            return known
        values = np.frombuffer(b"".join(each.digest for each in known.values()), np.uint8).reshape(-1, 32)
        return cls([DigestTable(tuple(known), values, stat_rows([each.stat for each in known.values()]))])

    def find(self, ids: tuple[str, ...]) -> Found:
        """What is known of the images with these ids."""
        if len(self.tables) == 1 and ids == self.tables[0].ids:
            return Found(np.ones(len(ids), bool), self.tables[0].values, self.tables[0].stats)
        found = Found.nothing(len(ids))
        for table in self.tables:
            row = table.rows(ids)
            is_here = row >= 0
            found.put(is_here, table.values[row[is_here]], table.stats[row[is_here]])
        return found

    def __getitem__(self, image: str) -> KnownDigest:
        for table in reversed(self.tables):
            row = table.row_of.get(image)
            if row is not None:
                return KnownDigest(table.values[row].tobytes(), StatFacts.of_row(table.stats[row].tolist()))
        raise KeyError(image)

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys(chain.from_iterable(table.ids for table in self.tables)))

    def __len__(self) -> int:
        return len(set().union(*(table.ids for table in self.tables)))


class Contents:
    """What was read to be hashed and waits to be decoded, so that images of another machine come over once.

    It has a limit: a quarter of the memory that was free when it was opened, and 4 GB; what is more is read again.
    """

    def __init__(self) -> None:
        self._held: dict[str, bytes] = {}
        self._room = 0
        self._is_open = False  # else nobody will decode what is hashed now
        self._wanted: Set[str] | None = None
        self._lock = threading.Lock()

    @contextmanager
    def kept(self, wanted: Set[str] | None) -> Iterator[None]:
        """What is read within, to be hashed, of these images (None: of all) is held, and nothing that was before."""
        self.clear()
        self._room, self._wanted = min(available_bytes() // 4, _MOST_HELD_BYTES), wanted
        self._is_open = True
        try:
            yield
        finally:
            self._is_open, self._wanted = False, None

    def keep(self, image: str, content: bytes) -> None:
        """Holds the content of an image that is wanted, if there is room, in the place of an earlier one."""
        if not self._is_open or (self._wanted is not None and image not in self._wanted):
            return
        self.taken(image)
        with self._lock:
            if len(content) <= self._room:
                self._held[image] = content
                self._room -= len(content)

    def taken(self, image: str) -> bytes | None:
        """The content of an image, which is no longer held; None where it wasn't."""
        with self._lock:
            content = self._held.pop(image, None)
            if content is not None:
                self._room += len(content)
            return content

    def keep_only(self, images: Iterable[str]) -> None:
        """Holds nothing of other images any more."""
        if self._held:
            for image in self._held.keys() - set(images):
                self.taken(image)

    def clear(self) -> None:
        """Holds nothing any more."""
        with self._lock:
            self._held = {}


@dataclass(eq=False)
class Memo:
    """What one process has learned of an image set's contents, so that it hashes no image twice.

    Attributes:
        known: digests that others took.
        taken: digests that it took itself; these count first.
        contents: of images that are slow to read.
    """

    known: KnownDigests = field(default_factory=KnownDigests)
    taken: KnownDigests = field(default_factory=KnownDigests)
    contents: Contents = field(default_factory=Contents)

    def trust(self, known: KnownDigests) -> None:
        """Keeps digests that others took, some of which still hold."""
        self.known = _in_few_tables(KnownDigests((*known.tables, *self.known.tables)))

    def add(self, taken: DigestTable) -> None:
        """Keeps digests that were taken just now."""
        self.taken = _in_few_tables(KnownDigests((*self.taken.tables, taken)))


def stat_rows(facts: Sequence[StatFacts | None]) -> NDArray[np.int64]:
    """`(N, 5)`, as in `Digests.stats`."""
    rows = [(-1,) * 5 if each is None else each._replace(inode=each.inode - (each.inode >> 63 << 64)) for each in facts]
    return np.array(rows, np.int64).reshape(-1, 5)


def no_stats(count: int) -> NDArray[np.int64]:
    """`(N, 5)`, as in `Digests.stats`, of images that are no files; takes no memory, and is not to be written to."""
    return np.broadcast_to(np.int64(-1), (count, 5))


def content_digest(data: bytes | NDArray[np.uint8]) -> bytes:
    """SHA-256 (32 bytes) of an image as `ImageSet.read` gives it; of an array with its shape, unlike any file's."""
    if isinstance(data, bytes):
        return hashlib.sha256(data).digest()
    digest = hashlib.sha256(canonical_json(["array", str(data.dtype), list(data.shape)]).encode("ascii"))
    digest.update(np.ascontiguousarray(data).data)
    return digest.digest()


_MOST_TABLES = 8
_MOST_HELD_BYTES = 4_000_000_000


def _in_few_tables(known: KnownDigests) -> KnownDigests:
    """The same digests; each look-up asks all tables."""
    if len(known.tables) <= _MOST_TABLES:
        return known
    ids = tuple(known)
    found = known.find(ids)
    return KnownDigests([DigestTable(ids, found.values, found.stats)])


def _read_only(array: NDArray[Any]) -> NDArray[Any]:
    view = array.view()
    view.flags.writeable = False
    return view


def _shares_prefix(values: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """`(N,)` which rows have the same first 8 bytes as another: quick to find, and hardly ever without being equal."""
    prefixes = np.ascontiguousarray(values[:, :8]).view(np.uint64).reshape(-1)
    order = np.argsort(prefixes)
    is_like_next = prefixes[order[1:]] == prefixes[order[:-1]]
    shares = np.zeros(len(values), bool)
    shares[order[1:][is_like_next]] = shares[order[:-1][is_like_next]] = True
    return shares
