"""Hashing: which digests of files still hold, and how others are taken, by threads where that pays."""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from featstore.errors import ImageError
from featstore.images.decoders import MAX_FILE_BYTES
from featstore.images.digests import Digests, DigestTable, Found, KnownDigests, Memo
from featstore.words import size_text


def file_digests(
    ids: tuple[str, ...],
    now: NDArray[np.int64],
    take: Callable[[tuple[str, ...]], Digests],
    memo: Memo,
    known: KnownDigests,
) -> Digests:
    """The digests of images that lie in files; those that nobody is certain still to hold are taken.

    Args:
        ids: the images.
        now: `(N, 5)`, as in `Digests.stats`: the facts of each image's file at this moment, -1 where it has none.
        take: hashes images.
        memo: what this process knows; gets what is trusted or taken.
        known: digests from image tables.
    """
    held = Found.nothing(len(ids))
    for candidates in (memo.taken, memo.known, known):
        then = candidates.find(ids)
        holds = then.is_known & ~held.is_known & _is_unchanged(then.stats, now)
        if candidates is not memo.taken:
            holds &= _has_clock(then.stats)
        if holds.any():
            held.put(holds, then.values[holds], then.stats[holds])
            if candidates is known:
                memo.trust(known)
    return completed(ids, held, take, memo)


def completed(ids: tuple[str, ...], held: Found, take: Callable[[tuple[str, ...]], Digests], memo: Memo) -> Digests:
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


def is_settled(stats: NDArray[np.int64]) -> NDArray[np.bool_]:
    """`(N,)` whether each file was hashed so long after it was written that a later write shows in its times.

    A write within the clock tick of the hash would leave the times as they were; the coarsest tick in use is 2 s (FAT).
    """
    _, mtime_ns, ctime_ns, _, hashed_at_ns = stats.T
    settled: NDArray[np.bool_] = np.maximum(mtime_ns, ctime_ns) <= hashed_at_ns - 2_000_000_000
    return settled


def _is_unchanged(then: NDArray[np.int64], now: NDArray[np.int64]) -> NDArray[np.bool_]:
    """`(N,)` whether each file is certainly the one that was hashed; both `(N, 5)`, as in `Digests.stats`."""
    is_unchanged: NDArray[np.bool_] = is_settled(then) & (then[:, :4] == now[:, :4]).all(axis=1)
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


# ---- Files

MOST_BYTES_AT_ONCE = 16 << 20
"""Of a file that is read whole, which takes half the time for small ones; one larger is hashed piece by piece."""

_STAT = struct.Struct("=qqqQq")
"""A row of `Digests.stats`; an inode may use all 64 bits."""

NO_FACTS = struct.pack("=5q", -1, -1, -1, -1, -1)

_WRITTEN_BACK_AFTER_SECONDS = 60.0
"""Twice what Linux takes by default until it writes a changed page to the disk."""


def check_file_size(num_bytes: int) -> None:
    """ValueError for a file that is no image by its size: reading it would fill the memory before anything is known."""
    if num_bytes > MAX_FILE_BYTES:
        raise ValueError(
            f"it has {size_text(num_bytes)}, and no image that is decoded has more than {size_text(MAX_FILE_BYTES)}; "
            "is it an image? Move it away"
        )


def facts_of(facts: os.stat_result) -> tuple[int, int, int, int]:
    """What tells an unchanged file."""
    return facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns, facts.st_ino


def let_writes_show(file: int) -> None:
    """Makes a write through a mapping of the file move its time, as any other write does.

    Only the first write to a page does so until the page has been written to the disk. Files that were left alone for
    a minute have been; of others it takes about a quarter of a millisecond. Files in memory (tmpfs) never are.
    """
    facts = os.fstat(file)
    if time.time() - max(facts.st_mtime, facts.st_ctime) < _WRITTEN_BACK_AFTER_SECONDS:
        with suppress(OSError):  # not every file system can; an error of the disk shows when the file is read
            os.fsync(file)


def packed(facts: os.stat_result, hashed_at_ns: int) -> bytes:
    """A row of `Digests.stats`; facts that are never trusted, if a time is out of range (before 1678, after 2262)."""
    try:
        return _STAT.pack(*facts_of(facts), hashed_at_ns)
    except struct.error:
        return NO_FACTS


# ---- Threads

_NUM_THREADS = 8
_MOST_AT_ONCE = 64
_WORTH_A_THREAD_SECONDS = 50e-6
"""An image. Looking at a file in the system's cache takes 3 microseconds and hashing a small one 8; threads that do
so wait for the interpreter's lock most of the time, and take twice as long as one."""


def in_threads(
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
