"""Verification: every checksum of every file of a store, and damaged files set aside."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from tqdm import tqdm

from featstore.errors import DamagedFileError, FeatureStoreError, NewerFormatError
from featstore.files import disk
from featstore.files.part import Part
from featstore.files.plain_reads import opened
from featstore.files.table import Table
from featstore.objects import names_in
from featstore.store.catalogue import Catalogue, dangling, listed, misplaced, part_paths, unreadable
from featstore.store.folders import key_in, short_key
from featstore.store.image_tables import ImageTable, ImageTables
from featstore.store.sets import SetPart, made_by
from featstore.words import counted, size_text


@dataclass(frozen=True, kw_only=True)
class BadFile:
    """A part or an image table that can't be used as it is.

    Attributes:
        path: the file, or a folder that may not be read.
        reason: a sentence: what is wrong with which of its bytes or rows, and what to do.
        is_damage: whether a repair sets it aside; else it may well be sound, or no file of featstore's.
        set_aside: its name now, where nobody reads it, if it was renamed for being damaged.
    """

    path: Path
    reason: str
    is_damage: bool
    set_aside: Path | None = None


@dataclass(frozen=True, kw_only=True)
class VerifyReport:
    """What a verification found.

    Attributes:
        parts: that were checked.
        tables: image tables that were checked.
        bytes: size of all of them.
        damaged: what can't be used. Also files and folders that may not be read, and files that a newer featstore
            or another program wrote or that lie in another set's folder; those are never set aside.
    """

    parts: int
    tables: int
    bytes: int
    damaged: tuple[BadFile, ...]

    def __str__(self) -> str:
        aside = sum(each.set_aside is not None for each in self.damaged)
        found = f"{len(self.damaged):,} can't be used" if self.damaged else "all sound"
        moved = f", {aside:,} set aside" if aside else ""
        checked = f"{counted(self.parts, 'part')} and {counted(self.tables, 'image table')}"
        return f"{checked}, {size_text(self.bytes)}: {found}{moved}"


def verify(catalogue: Catalogue, tables: ImageTables, *, repair: bool, progress: bool) -> VerifyReport:
    """Checks every byte of all parts and image tables, each opened anew; see `FeatureStore.verify`.

    Raises:
        OSError: if a damaged file can't be renamed.
    """
    if repair:
        _sync_set_aside([*catalogue.folders(), tables.folder])
    parts, closed = _listed(catalogue)
    closed |= _closed(tables.folder)
    checked = _checked(parts, _check_part, progress=progress)
    checked_tables = _checked(tables.paths(), _check_table, progress=False)  # small
    faults = (
        closed
        | _misplaced(checked)
        | {path: each for path, each in (checked | checked_tables).items() if each.reason is not None}
    )
    damaged = []
    for path, each in sorted(faults.items()):
        aside = None
        if repair and each.is_damage:
            with suppress(FileNotFoundError):  # removed meanwhile
                aside = disk.set_aside(path)
        catalogue.forget(path)  # as a sound copy may be put in its place
        tables.forget(path)
        damaged.append(BadFile(path=path, reason=str(each.reason), is_damage=each.is_damage, set_aside=aside))
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


def _sync_set_aside(folders: Sequence[Path]) -> None:
    """Makes safe what a repair has renamed that was killed before it could: else a power loss brings it back."""
    for folder in folders:
        with suppress(DamagedFileError, FileNotFoundError):  # not to be read here; removed
            if any(disk.is_set_aside(name) for name in listed(folder)):
                disk.sync_folder(folder)


def _listed(catalogue: Catalogue) -> tuple[list[Path], dict[Path, _Checked]]:
    """The parts, and the folders that may not be read, with the reason."""
    parts, closed = [], {}
    for folder in catalogue.folders():
        try:
            parts += part_paths(folder)
        except DamagedFileError as error:
            closed[folder] = _Checked(num_bytes=0, reason=str(error))
    return parts, closed


def _closed(folder: Path) -> dict[Path, _Checked]:
    """The folder of the image tables, with the reason, if it can't be listed; it need not be there."""
    try:
        names_in(folder)
    except FileNotFoundError:
        return {}
    except OSError as error:
        return {folder: _Checked(num_bytes=0, reason=unreadable(folder, error))}
    return {}


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
                found[path] = _Checked(num_bytes=num_bytes, reason=unreadable(path, error))
            bar.update(num_bytes)
    return found


def _check_part(path: Path) -> str:
    """The key of a part's set, if all its bytes fit their checksums and its facts are understood."""
    with _told_from_damage(path):
        part = Part.open(path)
    if blocks := part.verify():
        raise DamagedFileError(_altered_rows(part, blocks))
    try:
        return SetPart.of(part).spec.key
    except DamagedFileError as error:
        raise _NoDamageError(str(error)) from error


def _check_table(path: Path) -> str:
    with _told_from_damage(path):
        table = Table.open(path)
    try:
        ImageTable.of(table)
    except DamagedFileError as error:
        raise _NoDamageError(str(error)) from error
    return ""


class _NoDamageError(FeatureStoreError):
    """The file is as it was written, and yet it can't be used here."""


@contextmanager
def _told_from_damage(path: Path) -> Iterator[None]:
    try:
        yield
    except NewerFormatError as error:
        raise _NoDamageError(str(error)) from error
    except DamagedFileError as error:
        if path.is_file() and _is_of_others(path):
            raise _NoDamageError(
                f"{path} is no file of featstore's, and left alone, though it is called as one. Move it elsewhere."
            ) from error
        raise


_FIRST_WORD = b"featstore"
"""Of every file of featstore's."""


def _is_of_others(path: Path) -> bool:
    """Whether a file doesn't begin as ours do, nor as damaged ones: with a few bytes altered, or with zeros."""
    with opened(path) as file:
        head = bytearray(min(len(_FIRST_WORD), file.size))
        file.read([(0, [memoryview(head)])])
    num_equal = sum(mine == theirs for mine, theirs in zip(_FIRST_WORD, head, strict=False))
    return any(head) and 2 * num_equal < len(head)


def _altered_rows(part: Part, blocks: Sequence[range]) -> str:
    stretches = [f"{rows.start:,} to {rows.stop - 1:,}" for rows in blocks[:3]]
    listed = f"{', '.join(stretches)}{', ...' * (len(blocks) > 3)}"
    return (
        f"{part.path} is damaged: {sum(map(len, blocks)):,} rows of its features ({listed}) don't fit their checksums. "
        "Move a sound copy into its place (mv: cp would write over what readers have mapped), or set it aside "
        f"(featstore verify --repair) and run {made_by(part)} again, which adds only what is then missing."
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
