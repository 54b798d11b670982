"""Plain reads: bytes of a file and their checksums, and what is said of a file that hasn't got them."""

from __future__ import annotations

import errno
import io
import os
import stat
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, cast

from featstore.errors import DamagedFileError
from featstore.machine import num_processors
from featstore.objects import ObjectPath, ranges_of, start_of

MAX_BUFFERS = 1024
"""What Linux and macOS take in one call."""

REMEDY = (
    "Move a sound copy into its place (mv: cp would write over what readers have mapped), or set it aside (featstore "
    "verify --repair) and extract or import again, which files only what is then missing."
)
"""For a damaged file."""

Read = tuple[int, list[memoryview]]
"""Where bytes begin in a file, and up to `MAX_BUFFERS` buffers that they go to, one after the other."""

_START_BYTES = 1 << 20
"""Of an object that are read first: with them most are opened by one request."""

_IS_NO_FILE = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


@contextmanager
def opened(path: Path) -> Iterator[Opened]:
    """The file at `path`, to be read; what else may be there under its name is refused without waiting."""
    if isinstance(path, ObjectPath):
        yield OpenObject(path)
        return
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)  # a pipe would wait for someone who writes
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO):  # ENXIO: a socket
            raise DamagedFileError(f"{path} can't be opened: {error.strerror}. {_NO_FILE_REMEDY}") from error
        raise
    try:
        if what := _IS_NO_FILE.get(stat.S_IFMT(os.fstat(fd).st_mode)):
            raise DamagedFileError(f"{path} is {what}, where a file was expected. {_NO_FILE_REMEDY}")
        yield OpenFile(path, fd)
    finally:
        os.close(fd)


class Opened(ABC):
    """A file that is open for reading.

    Attributes:
        path: its name.
        read_bytes: how much to ask for at once, where that is free.
        num_readers: threads that may well read at once.
    """

    path: Path
    read_bytes: int
    num_readers: int

    @property
    @abstractmethod
    def size(self) -> int:
        """In bytes, now."""

    @abstractmethod
    def read(self, reads: Iterable[Read]) -> None:
        """Fills buffers.

        Raises:
            DamagedFileError: if the file ends before, or the disk can't read it.
            FileNotFoundError: if the file was deleted where it lies.
            OSError: as the system gave it otherwise, with the file's name.
        """

    @abstractmethod
    def blocks_at_once(self, num_bytes: int) -> int:
        """How many blocks of so many bytes to read at once, at least one."""

    @abstractmethod
    def hold(self, extents: Sequence[range]) -> None:
        """Says that all `extents` will be read, maybe several times, each maybe in pieces."""

    def new_buffer(self) -> memoryview:
        """Memory for `crc_of`."""
        return memoryview(bytearray(self.read_bytes))

    @abstractmethod
    def stream(self) -> BinaryIO:
        """The whole as a file object of Python's, which is to be closed before this one."""

    @abstractmethod
    def check_reaches(self, end: int) -> None:
        """Checks, where that costs nothing, that a file which did when it was opened first still has `end` bytes."""


class OpenFile(Opened):
    """A file on a disk."""

    read_bytes = 1 << 18  # stays in the processor's cache between the read and the checksum
    num_readers = min(4, num_processors())

    def __init__(self, path: Path, fd: int) -> None:
        self.path, self.fd = path, fd

    @property
    def size(self) -> int:  # noqa: D102
        return os.fstat(self.fd).st_size

    def read(self, reads: Iterable[Read]) -> None:  # noqa: D102
        for offset, buffers in reads:
            _read_at(self.path, self.fd, buffers, offset)

    def hold(self, extents: Sequence[range]) -> None:  # noqa: D102
        pass  # the system's cache does

    def blocks_at_once(self, num_bytes: int) -> int:  # noqa: D102
        return 1

    def stream(self) -> BinaryIO:  # noqa: D102
        return os.fdopen(self.fd, "rb", closefd=False)

    def check_reaches(self, end: int) -> None:  # noqa: D102
        if self.size < end:
            raise truncated(self.path, missing=end - self.size)


class OpenObject(Opened):
    """An object of an object store, in few requests: each takes as long as a megabyte."""

    read_bytes = 8 << 20
    num_readers = 8

    def __init__(self, path: ObjectPath) -> None:
        self.path = self._object = path
        self._held: dict[range, memoryview] = {}

    @cached_property
    def size(self) -> int:  # noqa: D102
        start, size = start_of(self._object, _START_BYTES)
        self._held[range(len(start))] = start
        return size

    def read(self, reads: Iterable[Read]) -> None:  # noqa: D102
        asked = [(range(offset, offset + sum(map(len, buffers))), buffers) for offset, buffers in reads]
        fetched = self._fetched([extent for extent, _ in asked if self._among_held(extent) is None])
        for extent, buffers in asked:
            held = self._among_held(extent)
            content = fetched[extent] if held is None else held
            for buffer in buffers:
                buffer[:], content = content[: len(buffer)], content[len(buffer) :]

    def hold(self, extents: Sequence[range]) -> None:  # noqa: D102
        self._held |= self._fetched([extent for extent in extents if self._among_held(extent) is None])

    def blocks_at_once(self, num_bytes: int) -> int:  # noqa: D102
        return max(1, self.read_bytes // max(1, num_bytes))

    def stream(self) -> BinaryIO:  # noqa: D102
        return cast(BinaryIO, _Stream(self))

    def check_reaches(self, end: int) -> None:  # noqa: D102
        pass  # an object never changes, and a short answer is told as such

    def _among_held(self, extent: range) -> memoryview | None:
        if not extent:
            return memoryview(b"")
        for held, content in self._held.items():
            if held.start <= extent.start and extent.stop <= held.stop:
                return content[extent.start - held.start : extent.stop - held.start]
        return None

    def _fetched(self, extents: Sequence[range]) -> dict[range, memoryview]:
        found = ranges_of(self._object, extents) if extents else []
        for extent, content in zip(extents, found, strict=True):
            if len(content) < len(extent):
                raise truncated(self.path, missing=len(extent) - len(content))
        return dict(zip(extents, found, strict=True))


class _Stream(io.RawIOBase):
    """A file as HDF5 reads it."""

    def __init__(self, file: Opened) -> None:
        self._file, self._place = file, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._place = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._file.size}[whence]
        return self._place

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        view = view[: max(0, min(len(view), self._file.size - self._place))]
        self._file.read([(self._place, [view])])
        self._place += len(view)
        return len(view)


def crc_of(file: Opened, extents: Iterable[range], buffer: memoryview, crc: int = 0) -> int:
    """CRC-32 of the bytes of all `extents`, continued from `crc`; they pass through `buffer`."""
    for extent in extents:
        for start in range(extent.start, extent.stop, len(buffer)):
            piece = buffer[: extent.stop - start]
            file.read([(start, [piece])])
            crc = zlib.crc32(piece, crc)
    return crc


def _read_at(path: Path, fd: int, buffers: list[memoryview], offset: int) -> None:
    """Fills up to `MAX_BUFFERS` buffers, one after the other, from the bytes at `offset`."""
    end = offset + sum(map(len, buffers))
    while offset < end:
        try:
            count = os.preadv(fd, buffers, offset)
        except OSError as error:
            raise _unreadable(path, range(offset, end), error) from error
        if not count:
            raise truncated(path, missing=end - offset)
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
    "Move a sound copy into its place, or delete it and extract or import again, which files only what is then missing."
)


def damaged(path: Path, what: str) -> DamagedFileError:
    """What is to be raised about a damaged file, with the remedy."""
    return DamagedFileError(f"{path} is damaged: {what}. {REMEDY}")


def truncated(path: Path, missing: int) -> DamagedFileError:
    """What is to be raised about a file that lacks `missing` bytes at its end."""
    return damaged(path, f"it is truncated, {missing} bytes are missing at its end")


def _unreadable(path: Path, extent: range, error: OSError) -> OSError | DamagedFileError:
    where = f"its bytes {extent.start} to {extent.stop - 1} can't be read ({error.strerror})"
    if error.errno == errno.EIO:
        return damaged(path, where)
    if error.errno == errno.ESTALE:  # how a network file system says that an open file has been deleted
        return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), os.fspath(path))
    return OSError(error.errno, where, os.fspath(path))
