"""Verification: every checksum of every file of a store, and damaged files set aside."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from tqdm import tqdm

from featstore import disk
from featstore.catalogue import Catalogue, dangling, misplaced, part_paths
from featstore.errors import DamagedFileError, FeatureStoreError, NewerFormatError
from featstore.part import Part, Table
from featstore.sets import SetPart, key_in, short_key
from featstore.tables import ImageTables


@dataclass(frozen=True, kw_only=True)
class BadFile:
    """A part or an image table that can't be used as it is.

    Attributes:
        path: the file.
        reason: a sentence: what is wrong with which of its bytes or rows, and what to do.
        set_aside: its name now, where nobody reads it, if it was renamed for being damaged.
    """

    path: Path
    reason: str
    set_aside: Path | None = None


@dataclass(frozen=True, kw_only=True)
class VerifyReport:
    """What a verification found.

    Attributes:
        parts: that were checked.
        tables: image tables that were checked.
        bytes: size of all of them.
        damaged: what can't be used. Also files that may not be read, that a newer featstore wrote or that lie in
            another set's folder; those are never set aside.
    """

    parts: int
    tables: int
    bytes: int
    damaged: tuple[BadFile, ...]

    def __str__(self) -> str:
        aside = sum(each.set_aside is not None for each in self.damaged)
        found = f"{len(self.damaged):,} can't be used" if self.damaged else "all sound"
        moved = f", {aside:,} set aside" if aside else ""
        return f"{self.parts:,} parts and {self.tables:,} image tables, {self.bytes / 1e9:.2f} GB: {found}{moved}"


def verify(catalogue: Catalogue, tables: ImageTables, *, repair: bool, progress: bool) -> VerifyReport:
    """Checks every byte of all parts and image tables, each opened anew; see `FeatureStore.verify`.

    Raises:
        OSError: if a damaged file can't be renamed.
    """
    parts = [path for folder in catalogue.folders() for path in part_paths(folder)]
    checked = _checked(parts, _check_part, progress=progress)
    checked_tables = _checked(tables.paths(), _check_table, progress=False)  # small
    faults = _misplaced(checked) | {
        path: each for path, each in (checked | checked_tables).items() if each.reason is not None
    }
    damaged = []
    for path, each in sorted(faults.items()):
        aside = None
        if repair and each.is_damage:
            with suppress(FileNotFoundError):  # removed meanwhile
                aside = disk.set_aside(path)
        catalogue.forget(path)  # as a sound copy may be put in its place
        tables.forget(path)
        damaged.append(BadFile(path=path, reason=str(each.reason), set_aside=aside))
    return VerifyReport(
        parts=len(checked),
        tables=len(checked_tables),
        bytes=sum(each.num_bytes for each in (checked | checked_tables).values()),
        damaged=tuple(damaged),
    )


@dataclass(frozen=True, kw_only=True)
class _Checked:
    """What was found of one file."""

    num_bytes: int
    key: str = ""  # of a part's set
    reason: str | None = None
    is_damage: bool = False  # what is only not understood, or not to be read here, is no damage


def _checked(paths: Sequence[Path], check: Callable[[Path], str], *, progress: bool) -> dict[Path, _Checked]:
    """What is found at each of `paths`; those are left out that have gone since they were listed."""
    found = {}
    total = sum(_num_bytes(path) for path in paths) if progress else 0
    with tqdm(total=total, unit="B", unit_scale=True, disable=not progress, file=sys.stderr) as bar:
        for path in paths:
            num_bytes = _num_bytes(path)
            try:
                found[path] = _Checked(num_bytes=num_bytes, key=check(path))
            except FileNotFoundError:
                if path.is_symlink():
                    found[path] = _Checked(num_bytes=0, reason=dangling(path))
            except _NoDamageError as error:
                found[path] = _Checked(num_bytes=num_bytes, reason=str(error))
            except DamagedFileError as error:
                found[path] = _Checked(num_bytes=num_bytes, reason=str(error), is_damage=True)
            except OSError as error:
                reason = (
                    f"{path} can't be read ({error.strerror}). Make it readable, or copy the store to a sound disk."
                )
                found[path] = _Checked(num_bytes=num_bytes, reason=reason)
            bar.update(num_bytes)
    return found


def _check_part(path: Path) -> str:
    """The key of a part's set, if all its bytes fit their checksums and its facts are understood."""
    try:
        part = Part.open(path)
    except NewerFormatError as error:
        raise _NoDamageError(str(error)) from error
    if blocks := part.verify():
        raise DamagedFileError(_altered_rows(path, blocks))
    try:
        return SetPart.of(part).spec.key
    except DamagedFileError as error:
        raise _NoDamageError(str(error)) from error


def _check_table(path: Path) -> str:
    try:
        Table.open(path)
    except NewerFormatError as error:
        raise _NoDamageError(str(error)) from error
    return ""


class _NoDamageError(FeatureStoreError):
    """The file is as it was written, and yet it can't be used here."""


def _altered_rows(path: Path, blocks: Sequence[range]) -> str:
    stretches = [f"{rows.start:,} to {rows.stop - 1:,}" for rows in blocks[:3]]
    listed = f"{', '.join(stretches)}{', ...' * (len(blocks) > 3)}"
    return (
        f"{path} is damaged: {sum(map(len, blocks)):,} rows of its features ({listed}) don't fit their checksums. "
        "Put a sound copy in its place, or set it aside (featstore verify --repair) and extract again, which computes "
        "only what is then missing."
    )


def _misplaced(checked: Mapping[Path, _Checked]) -> dict[Path, _Checked]:
    """The sound parts in folders of other sets, with the reason."""
    folders: dict[Path, dict[Path, _Checked]] = {}
    for path, each in checked.items():
        if each.key:
            folders.setdefault(path.parent, {})[path] = each
    found = {}
    for folder, parts in folders.items():
        keys = [each.key for each in parts.values()]
        of_folder = next((key for key in keys if short_key(key) == key_in(folder.name)), keys[0])
        for path, each in parts.items():
            if each.key != of_folder:
                found[path] = replace(each, reason=misplaced(path, each.key, of_folder))
    return found


def _num_bytes(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # which the check will meet as well
        return 0
