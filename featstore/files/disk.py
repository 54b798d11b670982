"""Disk: the operations by which upkeep changes a store, each by itself, so that a test can record or stop at any."""

from __future__ import annotations

import errno
import os
import re
import secrets
from pathlib import Path


def unlink(path: Path) -> None:
    """Deletes a file.

    Raises:
        FileNotFoundError: if it is gone already.
    """
    os.unlink(path)


def rename(path: Path, target: Path) -> None:
    """Gives a file or folder another name in its folder; on the disk only once that folder is synced."""
    os.rename(path, target)


def remove_folder(path: Path) -> bool:
    """Deletes a folder if it is empty; whether it is gone."""
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


def sync_folder(path: Path) -> None:
    """Sees to it that the names in a folder are on the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def set_aside(path: Path) -> Path:
    """Gives a damaged file a hidden name in its folder, where nobody reads it, on the disk when this returns."""
    aside = path.with_name(f".{path.name}{_DAMAGED}{secrets.token_hex(8)}")
    rename(path, aside)
    sync_folder(path.parent)
    return aside


def move_aside(folder: Path) -> Path:
    """Gives a folder that is to be deleted a hidden name beside it, on the disk when this returns."""
    aside = folder.with_name(f"{_REMOVED}{secrets.token_hex(8)}")
    rename(folder, aside)
    sync_folder(folder.parent)
    return aside


def is_temporary(name: str) -> bool:
    """Whether a file is called as those that writers rename when they are whole."""
    return _TEMPORARY.fullmatch(name) is not None


def is_set_aside(name: str) -> bool:
    """Whether `set_aside` has named a file."""
    return _SET_ASIDE.fullmatch(name) is not None


def is_moved_aside(name: str) -> bool:
    """Whether `move_aside` has named a folder."""
    return _MOVED_ASIDE.fullmatch(name) is not None


_DAMAGED, _REMOVED = ".damaged-", ".removed-"

# Whole names, so that nobody else's hidden file is taken for one of ours.
_TEMPORARY = re.compile(r"\..+\.h5\.tmp-[0-9a-f]{16}", re.DOTALL)
_SET_ASIDE = re.compile(rf"\..+\.h5{re.escape(_DAMAGED)}[0-9a-f]{{16}}", re.DOTALL)
_MOVED_ASIDE = re.compile(rf"{re.escape(_REMOVED)}[0-9a-f]{{16}}")
