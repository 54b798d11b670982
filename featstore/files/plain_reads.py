"""Plain reads: bytes of a file and their checksums, and what is said of a file that hasn't got them."""

from __future__ import annotations

import errno
import os
import stat
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from featstore.errors import DamagedFileError

MAX_BUFFERS = 1024
"""What Linux and macOS take in one call."""

REMEDY = (
    "Move a sound copy into its place (mv: cp would write over what readers have mapped), or set it aside (featstore "
    "verify --repair) and extract or import again, which files only what is then missing."
)
"""For a damaged file."""

_BUFFER_BYTES = 1 << 18  # stays in the processor's cache between the read and the checksum
_IS_NO_FILE = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


@contextmanager
def opened(path: Path) -> Iterator[int]:
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


def crc_of(path: Path, fd: int, extents: Iterable[range], buffer: memoryview, crc: int = 0) -> int:
    """CRC-32 of the bytes of all `extents`, continued from `crc`; they pass through `buffer`."""
    for extent in extents:
        for start in range(extent.start, extent.stop, len(buffer)):
            piece = buffer[: extent.stop - start]
            read_at(path, fd, [piece], start)
            crc = zlib.crc32(piece, crc)
    return crc


def new_buffer() -> memoryview:
    """Memory for `crc_of`."""
    return memoryview(bytearray(_BUFFER_BYTES))


def read_at(path: Path, fd: int, buffers: list[memoryview], offset: int) -> None:
    """Fills up to `MAX_BUFFERS` buffers, one after the other, from the bytes at `offset`.

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
