"""Disk: all that changes files and folders of a store, by operations of which a test can record, fail or stop any.

Each goes through `perform`, and nothing else here or elsewhere in a store writes to the disk, or to an object store.
There a put is what a rename is here, and no folders are made or taken away: they are beginnings of names.
"""

from __future__ import annotations

import errno
import mmap
import os
import re
import secrets
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import wraps
from pathlib import Path
from typing import ParamSpec, TypeVar

from featstore import objects
from featstore.objects import ObjectPath

P = ParamSpec("P")
T = TypeVar("T")


@contextmanager
def whole_or_nothing(path: Path, length: int, *, replaces: bool = False) -> Iterator[int]:
    """A descriptor to write `length` bytes to; on leaving they are at `path` and synced, or nothing is.

    Args:
        path: the final name.
        length: more than 0.
        replaces: what is at `path`, in one step: for what is no part of the store's format.

    Raises:
        FileExistsError: if `path` is taken, and not to be replaced.
        OSError: as the system gave it; that the disk is full, or may not be written, it says of `path`.
    """
    if isinstance(path, ObjectPath):
        with _put_when_whole(path, length, replaces) as fd:
            yield fd
        return
    if not replaces and os.path.lexists(path):
        raise FileExistsError(errno.EEXIST, "a written file is never replaced, choose another name", os.fspath(path))
    temporary = path.with_name(f".{path.name}.tmp-{secrets.token_hex(8)}")
    try:
        fd = create(temporary)
    except OSError as error:  # a disk that may only be read; the hidden name tells nobody anything
        error.filename = os.fspath(path)
        raise
    try:
        try:
            allocate(fd, length)
            yield fd
            sync(fd)
        finally:
            os.close(fd)
        rename(temporary, path)
    except BaseException as error:
        if isinstance(error, OSError) and error.filename is None and error.errno in _FULL:
            error.filename = os.fspath(path)  # operations on descriptors name none
        with suppress(OSError):  # the first error is the one to tell
            unlink(temporary)
        raise
    sync_folder(path.parent)


@contextmanager
def _put_when_whole(path: ObjectPath, length: int, replaces: bool) -> Iterator[int]:
    """`whole_or_nothing` for an object, whose bytes wait in a file of this machine without a name."""
    with tempfile.TemporaryFile() as file:
        try:
            allocate(file.fileno(), length)
            yield file.fileno()
        except OSError as error:
            if error.filename is None and error.errno in _FULL:
                error.filename = tempfile.gettempdir()
            raise
        put(path, file.fileno(), length, replaces)


def make_folder(path: Path, *, root: Path) -> None:
    """Makes the folder `path`, and those above it, such that no power loss takes it away with the files in it.

    A folder's name is safe once the folder above it is synced. Below `root` that is done for those that were there as
    well: whoever made them may have been killed before the sync. Above it not everyone may read the folders.

    Args:
        path: below `root`.
        root: of the store; made as well.

    Raises:
        OSError: as the system gave it.
    """
    if isinstance(path, ObjectPath):
        return
    for folder in (*reversed(path.parents), path):
        is_new = not folder.is_dir()
        if is_new:
            try:
                mkdir(folder)
            except FileExistsError:  # another process may be as far; but a file there stays one
                if not folder.is_dir():
                    raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), os.fspath(folder)) from None
        if is_new or root in folder.parents:
            sync_folder(folder.parent)


def set_aside(path: Path) -> Path:
    """Gives a damaged file a hidden name in its folder, where nobody reads it, on the disk when this returns."""
    hidden = f".{path.name}{_DAMAGED}{secrets.token_hex(8)}"
    if isinstance(path, ObjectPath):
        copy(path, path.with_name(hidden))
        unlink(path)
        return path.with_name(hidden)
    aside = path.with_name(hidden)
    rename(path, aside)
    sync_folder(path.parent)
    return aside


def move_aside(folder: Path) -> Path:
    """Gives a folder that is to be deleted a hidden name beside it, on the disk when this returns."""
    aside = folder.with_name(f"{_REMOVED}{secrets.token_hex(8)}")
    rename(folder, aside)
    sync_folder(folder.parent)
    return aside


def estimate_name() -> str:
    """A hidden name for what an estimate writes, and deletes again."""
    return f"{_ESTIMATE}{secrets.token_hex(8)}"


def is_temporary(name: str) -> bool:
    """Whether a file is called as those that writers rename when they are whole."""
    return _TEMPORARY.fullmatch(name) is not None


def is_set_aside(name: str) -> bool:
    """Whether `set_aside` has named a file."""
    return _SET_ASIDE.fullmatch(name) is not None


def is_moved_aside(name: str) -> bool:
    """Whether `move_aside` has named a folder."""
    return _MOVED_ASIDE.fullmatch(name) is not None


def is_of_estimate(name: str) -> bool:
    """Whether `estimate_name` has named a folder."""
    return _OF_ESTIMATE.fullmatch(name) is not None


_DAMAGED, _REMOVED, _ESTIMATE = ".damaged-", ".removed-", ".estimate-"

# Whole names, so that nobody else's hidden file is taken for one of ours.
_TEMPORARY = re.compile(r"\..+\.(h5|jsonl)\.tmp-[0-9a-f]{16}", re.DOTALL)
_SET_ASIDE = re.compile(rf"\..+\.h5{re.escape(_DAMAGED)}[0-9a-f]{{16}}", re.DOTALL)
_MOVED_ASIDE = re.compile(rf"{re.escape(_REMOVED)}[0-9a-f]{{16}}")
_OF_ESTIMATE = re.compile(rf"{re.escape(_ESTIMATE)}[0-9a-f]{{16}}")

# ---- the operations

_MAX_WRITE_BYTES = 64 << 20
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def perform(operation: Callable[P, T], *args: P.args, **options: P.kwargs) -> T:
    """Carries out one operation, told by its `__name__`: what is put in the place of this function sees them all."""
    return operation(*args, **options)


def _operation(function: Callable[P, T]) -> Callable[P, T]:
    @wraps(function)
    def performed(*args: P.args, **options: P.kwargs) -> T:
        return perform(function, *args, **options)

    return performed


@_operation
def create(path: Path) -> int:
    """A descriptor to write to a new file."""
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)


@_operation
def allocate(fd: int, length: int) -> None:
    """Takes the space for a whole file, so that a full disk is found before anything is written."""
    if not hasattr(os, "posix_fallocate"):  # macOS
        return
    try:
        os.posix_fallocate(fd, 0, length)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):  # what file systems without it answer
            raise


@_operation
def write_at(fd: int, data: memoryview, offset: int) -> None:
    """Writes all of `data`."""
    while data:
        written = os.pwrite(fd, data[:_MAX_WRITE_BYTES], offset)
        data = data[written:]
        offset += written


@_operation
def sync(fd: int) -> None:
    """Sees to it that the content of a file is on the disk."""
    os.fsync(fd)


@_operation
def sync_folder(path: Path) -> None:
    """Sees to it that the names in a folder are on the disk."""
    if isinstance(path, ObjectPath):
        return
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@_operation
def rename(path: Path, target: Path) -> None:
    """Gives a file or folder another name in its folder; on the disk only once that folder is synced."""
    os.rename(path, target)


@_operation
def unlink(path: Path) -> None:
    """Deletes a file.

    Raises:
        FileNotFoundError: if it is gone already, and is no object.
    """
    if isinstance(path, ObjectPath):
        objects.delete(path)
    else:
        os.unlink(path)


@_operation
def mkdir(path: Path) -> None:
    """Makes a folder in one that is there."""
    os.mkdir(path)


@_operation
def put(path: ObjectPath, fd: int, length: int, replaces: bool) -> None:
    """Makes an object of the first bytes of a file; of a name that must be free, unless it `replaces` what it has."""
    objects.put(path, mmap.mmap(fd, length, access=mmap.ACCESS_READ), replaces=replaces)


@_operation
def copy(path: ObjectPath, target: ObjectPath) -> None:
    """Gives what an object holds a second name."""
    objects.copy(path, target)


@_operation
def remove_folder(path: Path) -> bool:
    """Deletes a folder if it is empty; whether it is gone."""
    if isinstance(path, ObjectPath):
        return True
    try:
        os.rmdir(path)
    except FileNotFoundError:
        return True
    except OSError as error:
        # ENOTDIR: a link to a folder elsewhere, which is whoever's who made it.
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
        return False
    return True
