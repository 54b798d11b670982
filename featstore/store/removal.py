"""Removal: a whole feature set deleted.

Whenever it stops, each folder of the set is there as a whole or not at all for readers, and no file is deleted before
all its folders are out of their sight. An object store has no folders to rename: there readers may find some of the
rows, until it is done.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from featstore.errors import DamagedFileError, FeatureStoreError
from featstore.files import disk
from featstore.files.index import RowIndex
from featstore.objects import ObjectPath
from featstore.store.catalogue import Catalogue, UnsoundSet, listed, misplaced, part_paths
from featstore.store.folders import PART_NAME, short_key
from featstore.store.sets import superseded_names
from featstore.store.spec import FeatureSpec
from featstore.words import size_text


@dataclass(frozen=True, kw_only=True)
class RemoveReport:
    """What a removal deleted.

    Attributes:
        key: of the set; of one without a sound part its first digits.
        rows: images that had a row, as far as its parts could be opened.
        parts: files, also those that others superseded; none of a folder to which there was only a link.
        bytes: size of those files.
    """

    key: str
    rows: int
    parts: int
    bytes: int

    def __str__(self) -> str:
        return f"set {short_key(self.key)} removed: {self.rows:,} rows in {self.parts:,} parts, {size_text(self.bytes)}"


def remove(catalogue: Catalogue, chosen: FeatureSpec | UnsoundSet, folders: Sequence[Path]) -> RemoveReport:
    """Deletes the set `chosen`, which lies in `folders`; see `FeatureStore.remove`."""
    report = foreseen(catalogue, chosen, folders)
    aside = []
    for folder in folders:
        with suppress(FileNotFoundError):  # another process removes it as well
            if folder.is_symlink():
                disk.unlink(folder)  # what it leads to is whoever's who made the link
                disk.sync_folder(folder.parent)
            elif isinstance(folder, ObjectPath):  # which can't be renamed: readers find fewer and fewer rows
                clear(folder)
            else:
                aside.append(disk.move_aside(folder))
    for moved in aside:
        clear(moved)
    for folder in folders:
        if folder.parent != catalogue.root:
            disk.remove_folder(folder.parent)
    return report


def foreseen(catalogue: Catalogue, chosen: FeatureSpec | UnsoundSet, folders: Sequence[Path]) -> RemoveReport:
    """What `remove` would delete now.

    Raises:
        FeatureStoreError: where it would refuse.
    """
    for folder in folders:
        _check_is_of_this_store(catalogue, folder)
        if not folder.is_symlink():
            _check_nothing_else(folder, chosen.key)
    return _report(catalogue, chosen.key, folders)


def clear(folder: Path) -> None:
    """Deletes a folder that was moved aside, and all files in it; what others supersede, by larger names, first."""
    for path in reversed(files_in(folder)):
        with suppress(FileNotFoundError):  # another process clears it as well
            disk.unlink(path)
    disk.remove_folder(folder)


def files_in(folder: Path) -> list[Path]:
    """The files that `clear` deletes, in the order of their names."""
    if isinstance(folder, ObjectPath):
        return [folder / name for name in sorted(set(listed(folder)) - set(folder.folders()))]
    return sorted(path for name in listed(folder) if (path := folder / name).is_symlink() or not path.is_dir())


def _check_is_of_this_store(catalogue: Catalogue, folder: Path) -> None:
    if folder.parent != catalogue.root and folder.parent.is_symlink():
        raise FeatureStoreError(
            f"{folder} lies in {folder.parent.resolve()}, to which there is only a link here, and is not removed. "
            "Remove it from the store that it belongs to, or delete the link, which hides all that lies there."
        )


def _check_nothing_else(folder: Path, key: str) -> None:
    others = sorted(name for name in listed(folder) if not _goes_with_the_set(name))
    if others:
        raise FeatureStoreError(
            f"{folder} holds {others[0]!r}, which is no part of set {short_key(key)}. The whole folder goes when "
            "the set is removed: move everything else out of it first."
        )


def _goes_with_the_set(name: str) -> bool:
    is_of_the_system = name == ".DS_Store" or name.startswith((".nfs", ".fuse_hidden", "._part-"))
    is_left_over = disk.is_temporary(name) or disk.is_set_aside(name)
    return PART_NAME.fullmatch(name) is not None or is_left_over or is_of_the_system


def _report(catalogue: Catalogue, key: str, folders: Sequence[Path]) -> RemoveReport:
    opened, num_parts, num_bytes = [], 0, 0
    for path in [path for folder in folders for path in part_paths(folder)]:
        with suppress(FileNotFoundError):  # superseded, and unlinked since it was listed
            if not path.parent.is_symlink():
                num_bytes += path.lstat().st_size
                num_parts += 1
            with suppress(DamagedFileError):
                opened.append(catalogue.part(path))
    for each in opened:
        if not each.spec.key.startswith(key):
            raise DamagedFileError(misplaced(each.part.path, each.spec.key, key))
    superseded = superseded_names(opened)
    index = RowIndex([each.part for each in opened if each.name not in superseded])
    return RemoveReport(key=key, rows=index.num_images, parts=num_parts, bytes=num_bytes)
