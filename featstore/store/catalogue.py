"""Catalogue: which feature sets lie in the folders of a store, with the parts that were opened.

Other processes add parts, replace them by larger ones and remove sets meanwhile. Whatever is looked up is as the
folders were at one moment.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from featstore.errors import DamagedFileError
from featstore.files.part import Part
from featstore.objects import ObjectPath, look_again, names_in
from featstore.store.folders import PART_NAME, is_trunk_folder, key_in, short_key, short_trunk
from featstore.store.image_tables import IMAGES
from featstore.store.sets import FeatureSet, SetPart, superseded_names
from featstore.store.spec import FeatureSpec

_OPENING = 16
"""Objects opened at once."""

_PAUSES_SECONDS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)
"""Between two looks at a folder that goes on to list a file that is gone: a network file system's names may be old."""


@dataclass(frozen=True, kw_only=True)
class UnsoundSet:
    """A set without a sound part.

    Attributes:
        key: those digits of it that its folders are called by.
    """

    key: str


class Catalogue:
    """The feature sets below the folder `root`. Parts never change, so what was opened is kept.

    Several threads may use one.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._parts: dict[Path, dict[Path, SetPart]] = {}  # by folder
        self._sets: dict[str, FeatureSet] = {}

    def folders(self, trunk: str | None = None) -> list[Path]:
        """Folders that may hold a set of one trunk, or of any: below a trunk's folder, or copied here by themselves.

        Raises:
            DamagedFileError: if `root` may not be read. Folders below it that may not be are among the folders.
        """
        top = [folder for folder in subfolders(self.root) if folder.name != IMAGES]
        trunks = top
        if trunk is not None:
            trunks = [each for each in top if each.name.endswith(f"-{short_trunk(trunk)}")]
            top = [each for each in top if each in trunks or not is_trunk_folder(each.name)]
        below: list[Path] = []
        for each in trunks:
            with suppress(DamagedFileError):  # it may not be read: `part_paths` says so
                below += subfolders(each)
        return sorted([*top, *below])

    def specs(
        self, folders: Iterable[Path], *, asked: Collection[Path] = ()
    ) -> list[tuple[FeatureSpec, tuple[Path, ...]]]:
        """Each spec that has parts in `folders`, and where; a folder holds parts of one spec.

        One sound part says what a folder holds, and the others stay closed until someone wants them. A folder without
        one is left out, or, if it is in `asked`, is an error: it may hold what is asked for.

        Raises:
            DamagedFileError: for such a folder.
        """
        found: dict[str, tuple[FeatureSpec, list[Path]]] = {}
        for folder in folders:
            try:
                spec = self._spec_in(folder)
            except DamagedFileError:
                if folder in asked:
                    raise
                continue
            if spec is not None:
                found.setdefault(spec.key, (spec, []))[1].append(folder)
        return [(spec, tuple(holding)) for spec, holding in found.values()]

    def keyed(self, key: str) -> list[tuple[FeatureSpec, tuple[Path, ...]]]:
        """The specs whose keys start with `key`, with all their folders.

        Raises:
            DamagedFileError: for a folder that is called as such a set's and holds nothing sound.
        """
        folders, digits = self.folders(), short_key(key)
        # A set's folder is named with its key: looking there first spares opening a file of each set, which matters
        # with hundreds of them. The names are for people, though: a folder that was renamed may hold such a set too.
        named = [folder for folder in folders if key_in(folder.name).startswith(digits)]
        likely = [folder for folder in folders if key_in(folder.name).startswith(digits) or not key_in(folder.name)]
        for candidates in (likely, folders):
            found = [each for each in self.specs(candidates, asked=named) if each[0].key.startswith(key)]
            if found:
                return [(spec, self._all_of(spec, holding)) for spec, holding in found]
        return []

    def keyed_or_unsound(self, key: str) -> list[tuple[FeatureSpec | UnsoundSet, tuple[Path, ...]]]:
        """The sets whose keys start with `key`, with all their folders, also those that hold nothing sound.

        Where nothing else tells what such a folder is of, its name does.
        """
        found: dict[str, tuple[FeatureSpec | UnsoundSet, list[Path]]] = {}
        unsound = []
        for folder in self.folders():
            try:
                spec = self._spec_in(folder)
            except DamagedFileError:
                unsound.append(folder)
            else:
                if spec is not None and spec.key.startswith(key):
                    found.setdefault(spec.key, (spec, []))[1].append(folder)
        for folder in unsound:
            digits = key_in(folder.name)
            if digits and digits.startswith(short_key(key)):
                whole = next((each for each in found if short_key(each) == digits), digits)
                found.setdefault(whole, (UnsoundSet(key=digits), []))[1].append(folder)
        return [(chosen, tuple(holding)) for chosen, holding in found.values()]

    def set_of(self, spec: FeatureSpec, folders: Sequence[Path]) -> FeatureSet | None:
        """The set `spec`, which lies in `folders`; None if it was removed since it was seen there.

        Raises:
            DamagedFileError: for a part that can't be used and that no other replaces, and one of another set.
        """
        opened, damage = self._opened_in(folders)
        for each in opened:
            if each.spec.key != spec.key:
                raise DamagedFileError(misplaced(each.part.path, each.spec.key, spec.key))
        superseded = superseded_names(opened)
        for path, error in damage.items():
            if path.name not in superseded:
                raise error
        current = tuple(each.part for each in opened if each.name not in superseded)
        if not current:
            return None
        known = self._sets.get(spec.key)
        if known is None or known.parts != current:
            known = self._sets[spec.key] = FeatureSet(folders=tuple(folders), spec=spec, parts=current)
        return known

    def beside(self, spec: FeatureSpec, known: Collection[Path]) -> FeatureSet | None:
        """The sound parts of a set, in folders that are called as its, that are none of `known`; None where none is.

        They count as they are, superseded ones too. Of a large set it is cheap: what is known isn't opened, and each
        folder is listed once.
        """
        folders = [each for each in self.folders(spec.trunk) if key_in(each.name) == short_key(spec.key)]
        found: list[Part] = []
        for folder in folders:
            with suppress(DamagedFileError):  # who asks for the set is told
                opened, _, _ = self._opened([path for path in part_paths(folder) if path not in known])
                found += [each.part for each in opened if each.spec.key == spec.key]
        return FeatureSet(folders=tuple(folders), spec=spec, parts=tuple(found)) if found else None

    def part(self, path: Path) -> SetPart:
        """The part at `path`.

        Raises:
            FileNotFoundError: if there is no such file.
            DamagedFileError: if it can't be used, or may not be read.
        """
        beside = self._parts.setdefault(path.parent, {})
        opened = beside.get(path)
        if opened is None:
            with permitted(path):
                opened = beside[path] = SetPart.of(Part.open(path))
        return opened

    def folder_of(self, spec: FeatureSpec) -> Path | None:
        """The folder that holds the set already, whatever the model was called when it was made."""
        for folder in self.folders(spec.trunk):
            with suppress(DamagedFileError):  # what has been computed is filed all the same
                if key_in(folder.name) == short_key(spec.key) and self._spec_in(folder) == spec:
                    return folder
        return None

    def open_ahead(self, folders: Iterable[Path]) -> None:
        """Opens all parts in `folders` that are objects, many at once, as each takes as long as a megabyte.

        What is wrong with one is met again by whoever asks for it.
        """
        for folder in folders:
            if isinstance(folder, ObjectPath):
                with suppress(DamagedFileError):
                    self._open_at_once(part_paths(folder))

    def forget(self, path: Path) -> None:
        """Opens the part at `path` anew when it is asked for again."""
        self._parts.get(path.parent, {}).pop(path, None)

    def __getstate__(self) -> dict[str, Any]:
        return {"root": self.root, "_parts": {}, "_sets": {}}

    def _all_of(self, spec: FeatureSpec, holding: Sequence[Path]) -> tuple[Path, ...]:
        beside = {each.key: there for each, there in self.specs(self.folders(spec.trunk))}
        return tuple(sorted({*holding, *beside.get(spec.key, ())}))

    def _spec_in(self, folder: Path) -> FeatureSpec | None:
        """The spec of the parts in `folder`; where they are of several, that which the folder is named after."""
        damage: DamagedFileError | None = None
        first: FeatureSpec | None = None
        digits = key_in(folder.name)
        for path in part_paths(folder):
            try:
                spec = self.part(path).spec
            except FileNotFoundError:  # superseded, and unlinked since it was listed
                continue
            except DamagedFileError as error:
                damage = damage or error
                continue
            if not digits or short_key(spec.key) == digits:
                return spec
            first = first or spec
        if first is None and damage is not None:
            raise damage
        return first

    def _opened_in(self, folders: Sequence[Path]) -> tuple[list[SetPart], dict[Path, DamagedFileError]]:
        """The parts in `folders` in the order of their names, and what is wrong with those that can't be used.

        A listing isn't taken at one moment: it may miss a part that was published meanwhile and those that it
        replaces, unlinked meanwhile. Two equal listings one after the other miss no row: what the first one missed
        for having been published too late is in the second one, unless it is gone, and then its replacement is.
        """
        paths, pauses = _all_part_paths(folders), iter(_PAUSES_SECONDS)
        while True:
            opened, damage, gone = self._opened(paths)
            again = _all_part_paths(folders)
            if again != paths:
                paths = again
                continue
            if gone:
                look_again()
            if gone and (pause := next(pauses, None)) is not None:
                time.sleep(pause)
                continue
            known = set(paths)
            for path in chain.from_iterable(list(self._parts.get(folder, ())) for folder in folders):
                if path not in known:  # other threads open and forget parts meanwhile
                    self.forget(path)  # a deleted file takes up the disk for as long as somebody has it mapped
            damage |= {path: DamagedFileError(_listed_still(path)) for path in gone}
            return sorted(opened, key=lambda each: each.name), damage

    def _open_at_once(self, paths: Iterable[Path]) -> None:
        def open_one(path: Path) -> None:
            with suppress(DamagedFileError, OSError):
                self.part(path)

        closed = [
            path for path in paths if isinstance(path, ObjectPath) and path not in self._parts.get(path.parent, ())
        ]
        if len(closed) > 1:
            with ThreadPoolExecutor(min(_OPENING, len(closed)), thread_name_prefix="featstore-open") as pool:
                list(pool.map(open_one, closed))

    def _opened(self, paths: Sequence[Path]) -> tuple[list[SetPart], dict[Path, DamagedFileError], list[Path]]:
        """The parts at `paths`, what is wrong with those that can't be used, and which are not there."""
        self._open_at_once(paths)
        opened, damage, gone = [], {}, []
        for path in paths:
            try:
                opened.append(self.part(path))
            except DamagedFileError as error:
                damage[path] = error
            except FileNotFoundError:
                if path.is_symlink():
                    damage[path] = DamagedFileError(dangling(path))
                else:  # superseded, and unlinked since it was listed
                    gone.append(path)
        return opened, damage, gone


def subfolders(folder: Path) -> list[Path]:
    """The folders in `folder`, but for hidden ones; none if it is gone.

    Raises:
        DamagedFileError: if it may not be read.
    """
    if isinstance(folder, ObjectPath):
        with permitted(folder):
            return [folder / name for name in folder.folders() if not name.startswith(".")]
    names = [name for name in listed(folder) if not name.startswith(".")]
    with permitted(folder):
        return [folder / name for name in names if (folder / name).is_dir()]


def part_paths(folder: Path) -> list[Path]:
    """The files in `folder` that are called as parts, in the order of their names; none if it is gone.

    Raises:
        DamagedFileError: if it may not be read, and is called as the folder of a set or a trunk. What else may not be
            read, such as a disk's `lost+found`, is taken for somebody else's.
    """
    try:
        names = listed(folder)
    except DamagedFileError:
        if key_in(folder.name) or is_trunk_folder(folder.name):
            raise
        return []
    return sorted(folder / name for name in names if PART_NAME.fullmatch(name))


def listed(folder: Path) -> list[str]:
    """All names in `folder`; none if it is gone, for others may remove it at any moment.

    Raises:
        DamagedFileError: if it may not be read.
    """
    try:
        with permitted(folder):
            return names_in(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []


@contextmanager
def permitted(path: Path) -> Iterator[None]:
    """Makes of a `PermissionError` an error about `path` alone: others' files stop nobody who doesn't need them.

    Raises:
        DamagedFileError: in its place.
    """
    try:
        yield
    except PermissionError as error:
        raise DamagedFileError(unreadable(path, error)) from error


def unreadable(path: Path, error: OSError) -> str:
    """What is said of a file or folder that the system doesn't let us read."""
    return f"{path} can't be read ({error.strerror}). Make it readable, or copy the store to a sound disk."


def misplaced(path: Path, key: str, key_of_folder: str) -> str:
    """What is said of a part of set `key` in the folder of another set."""
    return (
        f"{path} belongs to set {short_key(key)}, and others beside it to set {short_key(key_of_folder)}. A folder "
        "holds one set: move the file into the folder of its own, or delete it if it is a copy."
    )


def dangling(path: Path) -> str:
    """What is said of a link to nothing."""
    return (
        f"{path} is a link to a file that isn't there. Move a sound copy of the file into its place, or delete the "
        "link and extract (or import) again, which adds only what is then missing."
    )


def _listed_still(path: Path) -> str:
    return (
        f"{path} is listed in its folder, and isn't there, for {sum(_PAUSES_SECONDS):.0f} seconds now. A network file "
        "system may show for a while what another machine has deleted: try again in a minute."
    )


def _all_part_paths(folders: Sequence[Path]) -> list[Path]:
    return [path for folder in folders for path in part_paths(folder)]
