"""Image sources: how the bytes of an image are had, and the digests of many images at once."""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import stat
import struct
import time
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from featstore.errors import ImageError
from featstore.images.decoders import MAX_FILE_BYTES
from featstore.images.digests import (
    Digests,
    DigestTable,
    Found,
    KnownDigest,
    KnownDigests,
    Memo,
    content_digest,
    no_stats,
)
from featstore.words import size_text


class ImageSource(Protocol):
    """How the bytes and the digests of the images of a set are had, by id; whoever has such an object can make a set.

    Sets, stores and programs ask nothing else of one. It pickles and holds no open file; its methods are called from
    many threads. An image table files the digests alone, with the facts of files where there are any, so that a set
    that comes back from a store knows nothing of the source that it had.
    """

    @property
    def absence(self) -> str | None:
        """Why none of the images is to be had, as the end of a sentence; None where they are, as far as one knows."""

    @property
    def known(self) -> Mapping[str, KnownDigest]:
        """Digests that came with the source, of images whose files may be found in another place."""

    def read(self, image: str) -> bytes | NDArray[np.uint8]:
        """The encoded bytes, or the `(H, W[, 3])` array; `ImageError` if the image can't be had."""

    def digests(self, ids: tuple[str, ...], memo: Memo, known: KnownDigests) -> Digests:
        """The content digest of each image, with the reason where there is none.

        Args:
            ids: the images.
            memo: what this process has learned of them; gets what is trusted or taken.
            known: digests from image tables.
        """

    def has(self, image: str) -> bool:
        """Whether the image is there; nothing is read."""

    def moved(self, root: str) -> ImageSource | None:
        """The source of the same images below the absolute folder `root`; None where they lie in memory."""


@dataclass(frozen=True, kw_only=True)
class FolderSource:
    """Image files below an absolute folder; an id is a path below it, or an absolute path of its own.

    Attributes:
        root: the folder.
        strip: what is cut off ids that begin with it, which then lie below `root`; None: nothing.
    """

    root: str
    strip: str | None = None

    @property
    def absence(self) -> str | None:
        """None: whether a file is there shows when it is looked for."""
        return None

    @property
    def known(self) -> Mapping[str, KnownDigest]:
        """None: files in another place are others."""
        return KnownDigests()

    def read(self, image: str) -> bytes:
        """The file's bytes; `ImageError` if there is none, or it can't be read."""
        try:
            path, facts = self._found(image)
            _check_size(facts.st_size)
            with open(path, "rb") as file:
                return file.read()
        except (OSError, ValueError) as error:
            raise ImageError(image, self._reason(image, error)) from error

    def digests(self, ids: tuple[str, ...], memo: Memo, known: KnownDigests) -> Digests:
        """The files' digests; a file is read only if neither `memo` nor `known` has one that is certain still to hold.

        `memo` gets what is trusted or taken.
        """
        looked, _ = _in_threads(self._look, ids, otherwise=_NO_FACTS)
        now, held = looked.view(np.int64), Found.nothing(len(ids))
        for candidates in (memo.taken, memo.known, known):
            then = candidates.find(ids)
            holds = then.is_known & ~held.is_known & _is_unchanged(then.stats, now)
            if candidates is not memo.taken:
                holds &= _has_clock(then.stats)
            if holds.any():
                held.put(holds, then.values[holds], then.stats[holds])
                if candidates is known:
                    memo.trust(known)
        return _completed(ids, held, self._take, memo)

    def has(self, image: str) -> bool:
        """Whether the file is there."""
        try:
            self._found(image)
        except (OSError, ValueError):
            return False
        return True

    def moved(self, root: str) -> FolderSource:
        """The files of the same paths below `root`; those with an absolute path of their own stay."""
        return FolderSource(root=root, strip=self.strip)

    def _look(self, image: str) -> bytes:
        try:
            _, facts = self._found(image)
            return _packed(facts, hashed_at_ns=0)
        except (OSError, ValueError) as error:
            raise ImageError(image, self._reason(image, error)) from error

    def _take(self, ids: tuple[str, ...]) -> Digests:
        taken, failed = _in_threads(self._hash, ids, otherwise=bytes(32) + _NO_FACTS)
        values, stats = np.ascontiguousarray(taken[:, :32]), np.ascontiguousarray(taken[:, 32:])
        return Digests(values=values, failed=failed, stats=stats.view(np.int64))

    def _hash(self, image: str) -> bytes:
        """Digest and facts of a file."""
        try:
            path, facts = self._found(image)
            _check_size(facts.st_size)
            hashed_at_ns = time.time_ns()
            with open(path, "rb", buffering=0) as file:
                _let_writes_show(file.fileno())
                before = os.fstat(file.fileno())
                if before.st_size <= _MOST_BYTES_AT_ONCE:
                    value = hashlib.sha256(file.read()).digest()
                else:
                    value = hashlib.file_digest(file, "sha256").digest()
                after = os.fstat(file.fileno())
        except (OSError, ValueError) as error:
            raise ImageError(image, self._reason(image, error)) from error
        if _facts(before) != _facts(after):
            raise ImageError(image, "the file changed while it was read; wait until it is written, then run again")
        return value + _packed(after, hashed_at_ns)

    def _found(self, image: str) -> tuple[str, os.stat_result]:
        """The path of an image's file, maybe in another Unicode spelling than the id, and the facts of it."""
        image = image if self.strip is None else without_start(image, self.strip)
        path = os.path.join(self.root, image)
        try:
            facts = os.stat(path)
        except (FileNotFoundError, NotADirectoryError):
            other = None if image.isascii() else self._spelled_otherwise(image)
            if other is None:
                raise
            path, facts = other, os.stat(other)
        if not stat.S_ISREG(facts.st_mode):  # opening a pipe would wait for ever
            raise ValueError("it is not a file")
        return path, facts

    def _spelled_otherwise(self, image: str) -> str | None:
        """The path of an image whose folders and file are written in NFC or NFD, each by itself."""
        path = "/" if image.startswith("/") else self.root
        for part in filter(None, image.split("/")):
            forms = (part, unicodedata.normalize("NFC", part), unicodedata.normalize("NFD", part))
            there = (os.path.join(path, form) for form in forms)
            found = next((each for each in there if os.path.lexists(each)), None)
            if found is None:
                return None
            path = found
        return path

    def _reason(self, image: str, error: Exception) -> str:
        if isinstance(error, FileNotFoundError | NotADirectoryError):
            if is_absolute(image) and self.strip is None:
                return f"there is no such file; {moved_remedy([image])}"
            return (
                f"there is no such file in {self.root}; give the images' folder with --root (in Python: "
                "images.with_root(...))"
            )
        return f"the file can't be read ({getattr(error, 'strerror', None) or error})"


def without_start(image: str, start: str) -> str:
    """A path without the folders that it begins with; as it is, if it doesn't.

    >>> without_start("/data/photos/cat/1.jpg", "/data/photos"), without_start("C:/photos/1.jpg", "C:/photos/")
    ('cat/1.jpg', '1.jpg')
    """
    before = start.replace("\\", "/").rstrip("/") + "/"
    return image.removeprefix(before).lstrip("/") if image.startswith(before) else image


def is_absolute(image: str) -> bool:
    """Whether an id is a path of its own, here or on Windows."""
    return re.match(r"([A-Za-z]:)?/", image) is not None


def moved_remedy(images: Sequence[str]) -> str:
    """What to do about files with absolute paths that aren't there, as the end of a sentence."""
    folders = {image.rpartition("/")[0] or "/" for image in images}
    drives = {folder.partition("/")[0] for folder in folders}
    start = os.path.commonpath(sorted(folders)) if len(drives) == 1 else sorted(folders)[0]
    return (
        "if the files were moved, say what to cut off their absolute paths and where they are now: "
        f"--strip {shlex.quote(start)} --root DIR (in Python: images.with_root(DIR, strip={start!r}))"
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class ArraySource:
    """Images in one read-only array `(N, H, W[, 3])` uint8; an id is an index.

    Attributes:
        images: the array.
        is_own: nobody else has it, so it never changes. The file of a mapped one may be written to.
    """

    images: NDArray[np.uint8]
    is_own: bool = False

    @classmethod
    def of(cls, images: NDArray[np.uint8]) -> ArraySource:
        """The source of `images`; of a copy, unless nobody can write to them.

        Raises:
            TypeError: for anything but a uint8 array.
            ValueError: for another shape.
        """
        array = _checked_images(images)
        return cls(images=array, is_own=array is not images)

    @property
    def absence(self) -> str | None:
        """None: arrays are here."""
        return None

    @property
    def known(self) -> Mapping[str, KnownDigest]:
        """None."""
        return KnownDigests()

    def read(self, image: str) -> NDArray[np.uint8]:
        """The `(H, W[, 3])` array, not to be written to."""
        array = np.asarray(self.images[int(image)])
        array.flags.writeable = False  # of this view: pickle forgets that the whole is read-only
        return array

    def digests(self, ids: tuple[str, ...], memo: Memo, known: KnownDigests) -> Digests:
        """The arrays' digests. A table's are not trusted: nothing says that its image 7 was this one."""
        if not self.is_own:
            memo = Memo()
        return _completed(ids, memo.taken.find(ids), self._take, memo)

    def has(self, image: str) -> bool:
        """True: arrays are here."""
        return True

    def moved(self, root: str) -> None:
        """None: no file holds them."""

    def _take(self, ids: tuple[str, ...]) -> Digests:
        values, failed = _in_threads(lambda image: content_digest(self.read(image)), ids, otherwise=bytes(32))
        return Digests(values=values, failed=failed, stats=no_stats(len(ids)))


@dataclass(frozen=True, kw_only=True, eq=False)
class AbsentSource:
    """Images of which only the digests are here: a set that came from a store without its images.

    Attributes:
        where: the image table, for messages.
        known: what the table says of each id; best as `KnownDigests`, which need no object for an image.
    """

    where: str
    known: Mapping[str, KnownDigest] = field(default_factory=KnownDigests)

    @property
    def absence(self) -> str | None:
        """Where the set came from."""
        return f"this image set came from a store ({self.where}), which has none"

    def read(self, image: str) -> bytes:
        """Nothing: `ImageError`."""
        raise ImageError(
            image,
            f"this image set came from a store ({self.where}), which has no images; "
            "give their folder with --root (in Python: images.with_root(...))",
        )

    def digests(self, ids: tuple[str, ...], memo: Memo, known: KnownDigests) -> Digests:
        """The digests that were filed with them. No other table is trusted: its images of these ids may be others."""
        found = KnownDigests.of(self.known).find(ids)
        reason = f"{self.where} has no digest of it; give its folder with --root (in Python: images.with_root(...))"
        failed = dict.fromkeys(np.flatnonzero(~found.is_known).tolist(), reason)
        return Digests(values=found.values, failed=failed, stats=found.stats)

    def has(self, image: str) -> bool:
        """False: the images are elsewhere."""
        return False

    def moved(self, root: str) -> FolderSource:
        """The files below `root`, which are those of the table if their facts still are."""
        return FolderSource(root=root)


# ---- Arrays


def _checked_images(images: object) -> NDArray[np.uint8]:
    """The array, if it is one of images; a copy unless nobody can write to it."""
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8:
        what = f"an array of {images.dtype}" if isinstance(images, np.ndarray) else f"a {type(images).__name__}"
        raise TypeError(
            f"images is {what}. Expected a numpy array of uint8, (N, H, W) or (N, H, W, 3). "
            "Convert it: values 0 to 255, then .astype(np.uint8)."
        )
    if not (images.ndim == 3 or (images.ndim == 4 and images.shape[3] == 3)) or 0 in images.shape:
        raise ValueError(
            f"images has the shape {images.shape}. Expected (N, H, W) or (N, H, W, 3), none of them 0. "
            "Reshape it; colours come last, in the order red, green, blue."
        )
    if not _is_writable(images):
        return images
    copy = images.copy()
    copy.flags.writeable = False
    return copy


def _is_writable(array: NDArray[Any]) -> bool:
    base: object = array
    while isinstance(base, np.ndarray):
        if base.flags.writeable:
            return True
        base = base.base
    return False


# ---- What holds still, and what is taken anew


def _is_unchanged(then: NDArray[np.int64], now: NDArray[np.int64]) -> NDArray[np.bool_]:
    """`(N,)` whether each file is certainly the one that was hashed; both `(N, 5)`, as in `Digests.stats`.

    A write within the clock tick of the hash would leave the times as they were; the coarsest tick in use is 2 s (FAT).
    """
    _, mtime_ns, ctime_ns, _, hashed_at_ns = then.T
    is_safe = np.maximum(mtime_ns, ctime_ns) <= hashed_at_ns - 2_000_000_000
    is_unchanged: NDArray[np.bool_] = is_safe & (then[:, :4] == now[:, :4]).all(axis=1)
    return is_unchanged


def _has_clock(stats: NDArray[np.int64]) -> NDArray[np.bool_]:
    """`(N,)` whether each file's inode has a time of its own; of others a digest holds only in the process it is of.

    File systems that are built once (squashfs, erofs) have the times of their files from their builder, often all the
    same, so that the next version may look like this one. There the time of the inode is that of the content, in whole
    seconds; a clock of nanoseconds shows those once in 1e9 times.
    """
    _, mtime_ns, ctime_ns, _, _ = stats.T
    has_clock: NDArray[np.bool_] = (ctime_ns % 1_000_000_000 != 0) | (ctime_ns != mtime_ns)
    return has_clock


def _completed(ids: tuple[str, ...], held: Found, take: Callable[[tuple[str, ...]], Digests], memo: Memo) -> Digests:
    """The digests that are held, and those that `take` gives of all other images."""
    places = np.flatnonzero(~held.is_known)
    failed = {}
    if len(places):
        others = tuple(map(ids.__getitem__, places.tolist()))
        taken = take(others)
        held.put(places, taken.values, taken.stats)
        memo.add(DigestTable.of(others, taken))
        failed = {int(places[at]): reason for at, reason in taken.failed.items()}
    return Digests(values=held.values, failed=failed, stats=held.stats)


# ---- Files

_MOST_BYTES_AT_ONCE = 16 << 20
"""Of a file that is read whole, which takes half the time for small ones; one larger is hashed piece by piece."""

_STAT = struct.Struct("=qqqQq")
"""A row of `Digests.stats`; an inode may use all 64 bits."""

_NO_FACTS = struct.pack("=5q", -1, -1, -1, -1, -1)

_WRITTEN_BACK_AFTER_SECONDS = 60.0
"""Twice what Linux takes by default until it writes a changed page to the disk."""


def _check_size(num_bytes: int) -> None:
    """ValueError for a file that is no image by its size: reading it would fill the memory before anything is known."""
    if num_bytes > MAX_FILE_BYTES:
        raise ValueError(
            f"it has {size_text(num_bytes)}, and no image that is decoded has more than {size_text(MAX_FILE_BYTES)}; "
            "is it an image? Move it away"
        )


def _facts(facts: os.stat_result) -> tuple[int, int, int, int]:
    return facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns, facts.st_ino


def _let_writes_show(file: int) -> None:
    """Makes a write through a mapping of the file move its time, as any other write does.

    Only the first write to a page does so until the page has been written to the disk. Files that were left alone for
    a minute have been; of others it takes about a quarter of a millisecond. Files in memory (tmpfs) never are.
    """
    facts = os.fstat(file)
    if time.time() - max(facts.st_mtime, facts.st_ctime) < _WRITTEN_BACK_AFTER_SECONDS:
        with suppress(OSError):  # not every file system can; an error of the disk shows when the file is read
            os.fsync(file)


def _packed(facts: os.stat_result, hashed_at_ns: int) -> bytes:
    """A row of `Digests.stats`; facts that are never trusted, if a time is out of range (before 1678, after 2262)."""
    try:
        return _STAT.pack(*_facts(facts), hashed_at_ns)
    except struct.error:
        return _NO_FACTS


# ---- Threads

_NUM_THREADS = 8
_MOST_AT_ONCE = 64
_WORTH_A_THREAD_SECONDS = 50e-6
"""An image. Looking at a file in the system's cache takes 3 microseconds and hashing a small one 8; threads that do
so wait for the interpreter's lock most of the time, and take twice as long as one."""


def _in_threads(
    work: Callable[[str], bytes], ids: tuple[str, ...], *, otherwise: bytes
) -> tuple[NDArray[np.uint8], dict[int, str]]:
    """The bytes that `work` makes of each image, a row for each, and the reasons of those that failed, by place.

    After images that took long (large files, disks, networks) several threads share the next ones.

    Args:
        work: gives as many bytes as `otherwise` has, or raises `ImageError`.
        ids: of the images.
        otherwise: stands for those that failed.
    """
    rows = np.empty((len(ids), len(otherwise)), np.uint8)
    failed: dict[int, str] = {}

    def work_through(start: int) -> None:
        made = []
        for place, image in enumerate(ids[start : start + size], start):
            try:
                made.append(work(image))
            except ImageError as error:
                failed[place] = error.reason
                made.append(otherwise)
        rows[start : start + size] = np.frombuffer(b"".join(made), np.uint8).reshape(len(made), -1)

    # In blocks, as a future for each of a million images is slow; of few images in small ones, for all threads to work.
    size = max(1, min(_MOST_AT_ONCE, len(ids) // (16 * _NUM_THREADS)))
    starts = iter(range(0, len(ids), size))
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        for start in starts:
            started = time.perf_counter()
            work_through(start)
            if time.perf_counter() - started > size * _WORTH_A_THREAD_SECONDS:
                for _ in pool.map(work_through, islice(starts, 32 * _NUM_THREADS)):  # raises what was raised there
                    pass
    return rows, dict(sorted(failed.items()))
