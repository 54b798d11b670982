"""Garbage: files of a store that nobody reads any more, deleted once they are old enough to be nobody's work."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np

from featstore.errors import DamagedFileError
from featstore.files import disk
from featstore.files.index import RowIndex
from featstore.files.part import Part
from featstore.objects import ObjectPath, facts_below
from featstore.store.catalogue import Catalogue, listed, part_paths
from featstore.store.compaction import LeftAlone
from featstore.store.folders import is_trunk_folder, key_in
from featstore.store.image_tables import IMAGES
from featstore.store.removal import files_in
from featstore.store.sets import SetPart, superseded_names
from featstore.store.spec import FeatureSpec
from featstore.words import size_text


@dataclass(frozen=True, kw_only=True)
class GcReport:
    """What a collection deleted, or would delete.

    Attributes:
        files: their number.
        bytes: their size.
        paths: the files.
        left: superseded parts that stay, because what took their place isn't sound.
    """

    files: int
    bytes: int
    paths: tuple[Path, ...]
    left: tuple[LeftAlone, ...]

    def __str__(self) -> str:
        left = f"; {len(self.left):,} superseded parts kept, as what took their place is damaged" if self.left else ""
        return f"{self.files:,} files, {size_text(self.bytes)}{left}"


def gc(catalogue: Catalogue, *, older_than: float, dry_run: bool) -> GcReport:
    """Deletes what nobody reads; see `FeatureStore.gc`."""
    if not (math.isfinite(older_than) and older_than >= 0):
        raise ValueError(f"older_than is {older_than!r}. Expected seconds, 0 or more; a day is {24 * 3600}.")
    rubbish = _Rubbish(oldest=time.time() - older_than, is_dry=dry_run)
    folders = catalogue.folders()
    for spec, holding in catalogue.specs(folders):
        rubbish.take_superseded(spec, holding)
    for folder in [catalogue.root, catalogue.root / IMAGES, *folders]:
        rubbish.take_leftovers(folder)
    if not dry_run:
        for folder in reversed(folders):  # sets' folders before those they lie in
            if key_in(folder.name) or is_trunk_folder(folder.name):
                with suppress(PermissionError):  # somebody else's, and there is nothing in it for us to delete
                    disk.remove_folder(folder)
    return rubbish.report()


class _Rubbish:
    """What is deleted on the way.

    Args:
        oldest: what was written, replaced or set aside after this time, in seconds since 1970, stays.
        is_dry: says only what would be deleted.
    """

    def __init__(self, *, oldest: float, is_dry: bool) -> None:
        self.oldest, self.is_dry = oldest, is_dry
        self.sizes: dict[Path, int] = {}
        self.left: list[LeftAlone] = []

    def report(self) -> GcReport:
        return GcReport(
            files=len(self.sizes),
            bytes=sum(self.sizes.values()),
            paths=tuple(self.sizes),
            left=tuple(self.left),
        )

    def take_superseded(self, spec: FeatureSpec, folders: Sequence[Path]) -> None:
        """Deletes the parts of a set that were replaced long ago by sound ones, which have all their rows."""
        opened = [each for each in _opened(folders) if each.spec.key == spec.key]
        names = superseded_names(opened)
        superseded = sorted((each for each in opened if each.name in names), key=_published)
        if not superseded:
            return
        current = [each for each in opened if each.name not in names]
        index = RowIndex([each.part for each in current])
        faults: dict[Part, str | None] = {}
        # What was replaced goes before what replaced it, which may be replaced itself: its list of names hides it.
        for each in superseded:
            if all(_published(other) > self.oldest for other in opened if each.name in other.supersedes):
                continue
            part_of, _ = index.find(each.part.digests)
            heirs = {index.parts[place] for place in np.unique(part_of[part_of >= 0]).tolist()}
            heirs |= {other.part for other in current if each.name in other.supersedes}
            faults |= {heir: fault(heir) for heir in heirs - faults.keys()}
            reasons = [found for heir in heirs if (found := faults[heir])]
            if (part_of < 0).any():
                reasons.append("some of its rows are in no other part")
            if reasons:
                self.left.append(
                    LeftAlone(key=spec.key, reason=f"{each.part.path} was replaced and stays: {reasons[0]}")
                )
            else:
                with suppress(FileNotFoundError):  # another process removes the set
                    self._sync({heir.path.parent for heir in heirs})
                    self._take(each.part.path)

    def take_leftovers(self, folder: Path) -> None:
        """Deletes what killed writers, estimates, repairs and removals have left in a folder."""
        try:
            names = sorted(listed(folder))
        except DamagedFileError:  # not to be read here: `verify` tells about it
            return
        for name in names:
            path = folder / name
            if disk.is_of_estimate(name):
                self._take_estimate(path)
            if not (disk.is_temporary(name) or disk.is_set_aside(name) or disk.is_moved_aside(name)):
                continue
            with suppress(FileNotFoundError):
                facts = path.lstat()
                # What was set or moved aside was renamed then; when its content was written doesn't matter.
                written, renamed = facts.st_mtime <= self.oldest, facts.st_ctime <= self.oldest
                if (disk.is_temporary(name) and written) or (disk.is_set_aside(name) and renamed):
                    self._take(path)
                elif disk.is_moved_aside(name) and renamed:
                    if path.is_symlink():  # what it leads to is whoever's who made the link
                        self._take(path)
                    else:
                        self._take_folder(path)

    def _take_estimate(self, folder: Path) -> None:
        """Deletes what an estimate that was killed has left, if all of it is old."""
        if folder.is_symlink():
            return
        paths, folders = _everything_below(folder)
        with suppress(FileNotFoundError, PermissionError):  # it ends just now, or is somebody else's
            if any(each.lstat().st_mtime > self.oldest for each in [*paths, *folders]):
                return
            for path in paths:
                self._take(path)
            for each in reversed(folders if not self.is_dry else []):
                disk.remove_folder(each)

    def _take_folder(self, folder: Path) -> None:
        for path in files_in(folder):
            self._take(path)
        if not self.is_dry:
            disk.remove_folder(folder)

    def _take(self, path: Path) -> None:
        with suppress(FileNotFoundError):  # another process deletes it as well
            size = path.lstat().st_size
            if not self.is_dry:
                disk.unlink(path)
            self.sizes[path] = size

    def _sync(self, folders: Iterable[Path]) -> None:
        """Makes the names of files safe that take another's place: who published them may have died just before."""
        for folder in folders if not self.is_dry else ():
            disk.sync_folder(folder)


def _everything_below(folder: Path) -> tuple[list[Path], list[Path]]:
    """All files below a folder, and all folders, itself first; an object store has none of these."""
    if isinstance(folder, ObjectPath):
        return [folder / name for name in facts_below(folder)], []
    found = [(Path(above), names) for above, _, names in os.walk(folder)]
    return [above / name for above, names in found for name in names], [above for above, _ in found]


def _opened(folders: Sequence[Path]) -> Iterator[SetPart]:
    """The parts in `folders` that can be used, each opened anew."""
    for path in [path for folder in folders for path in part_paths(folder)]:
        with suppress(DamagedFileError, OSError):  # `verify` tells about those
            yield SetPart.of(Part.open(path))


def _published(part: SetPart) -> float:
    """When a part appeared, in seconds since 1970: for a merged one that isn't when its rows were computed."""
    facts = part.part.facts
    return datetime.fromisoformat(facts.get("merged", facts)["when"]).timestamp()


def fault(part: Part) -> str | None:
    """What is wrong with the features of a part that took others' place, as a sentence; None if they are sound."""
    try:
        blocks = part.verify()
    except (DamagedFileError, OSError) as error:
        return str(error)
    if not blocks:
        return None
    return (
        f"{part.path}, which took the place of others, is damaged in {sum(map(len, blocks)):,} rows. Set it aside "
        "(featstore verify --repair): what it replaced is then read again."
    )
