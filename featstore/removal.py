"""Removal: a whole feature set deleted, so that whenever it stops, nobody reads a part of it for the whole."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from featstore import disk
from featstore.catalogue import Catalogue, listed, misplaced, part_paths
from featstore.errors import DamagedFileError, FeatureStoreError
from featstore.index import RowIndex
from featstore.sets import PART_NAME, short_key, superseded_names
from featstore.spec import FeatureSpec


@dataclass(frozen=True, kw_only=True)
class RemoveReport:
    """What a removal deleted.

    Attributes:
        key: of the set.
        rows: images that had a row, as far as its parts could be opened.
        parts: files, also those that others superseded.
        bytes: size of those files.
    """

    key: str
    rows: int
    parts: int
    bytes: int

    def __str__(self) -> str:
        return (
            f"set {short_key(self.key)} removed: {self.rows:,} rows in {self.parts:,} parts, {self.bytes / 1e9:.2f} GB"
        )


def remove(catalogue: Catalogue, spec: FeatureSpec, folders: Sequence[Path]) -> RemoveReport:
    """Deletes the set `spec`, which lies in `folders`; see `FeatureStore.remove`."""
    for folder in folders:
        _check_nothing_else(folder, spec)
    report = _report(catalogue, spec, folders)
    for folder in folders:
        with suppress(FileNotFoundError):  # another process removes it as well
            clear(disk.move_aside(folder))
        if folder.parent != catalogue.root:
            disk.remove_folder(folder.parent)
    return report


def clear(folder: Path) -> None:
    """Deletes a folder that was moved aside, and all files in it."""
    for path in files_in(folder):
        with suppress(FileNotFoundError):  # another process clears it as well
            disk.unlink(path)
    disk.remove_folder(folder)


def files_in(folder: Path) -> list[Path]:
    """The files that `clear` deletes."""
    return sorted(path for name in listed(folder) if (path := folder / name).is_symlink() or not path.is_dir())


def _check_nothing_else(folder: Path, spec: FeatureSpec) -> None:
    others = sorted(name for name in listed(folder) if not name.startswith(".") and not PART_NAME.fullmatch(name))
    if others:
        raise FeatureStoreError(
            f"{folder} holds {others[0]!r}, which is no part of set {short_key(spec.key)}. The whole folder goes when "
            "the set is removed: move everything else out of it first."
        )


def _report(catalogue: Catalogue, spec: FeatureSpec, folders: Sequence[Path]) -> RemoveReport:
    opened, num_parts, num_bytes = [], 0, 0
    for path in [path for folder in folders for path in part_paths(folder)]:
        with suppress(FileNotFoundError):  # superseded, and unlinked since it was listed
            num_bytes += path.lstat().st_size
            num_parts += 1
            with suppress(DamagedFileError):
                opened.append(catalogue.part(path))
    for each in opened:
        if each.spec.key != spec.key:
            raise DamagedFileError(misplaced(each.part.path, each.spec.key, spec.key))
    superseded = superseded_names(opened)
    index = RowIndex([each.part for each in opened if each.name not in superseded])
    return RemoveReport(key=spec.key, rows=index.num_images, parts=num_parts, bytes=num_bytes)
