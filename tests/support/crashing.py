"""Crashes of all that changes a store: its file operations recorded, what is left of them, and real kills.

The simulated disk is as unkind as POSIX allows. What was written to a file may be lost, in any order and torn into
sectors, until the file is synced; a name that a folder was given or lost, until the folder is synced, each by itself.

Long, since the simulated disk, the scenarios that run on it and what is checked afterwards belong together.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import secrets
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn, Self

import numpy as np
import pytest
import torch
from torch import Tensor

from featstore import (
    ExtractReport,
    FeatureSpec,
    FeatureStore,
    FeatureStoreError,
    ImageSet,
    MissingFeaturesError,
    extract,
)
from featstore.errors import DamagedFileError
from featstore.extraction import filed, job
from featstore.files import disk
from featstore.files.part import Part
from featstore.store import compaction, removal, verification
from featstore.store import store as store_module
from featstore.store.access import Access
from featstore.store.catalogue import Catalogue, part_paths
from featstore.store.features import Features
from featstore.store.removal import RemoveReport
from featstore.store.sets import FeatureSet
from featstore.store.verification import VerifyReport
from support.operations import replace_operation, watch
from support.tiny import VIEW, arrays, staged

SECTOR_BYTES = 512
_FOLDERS = Path(__file__).parents[1:3]  # of the tests, and of the packages
_PATH = [os.environ["PYTHONPATH"]] if os.environ.get("PYTHONPATH") else []

ROOT = "features"
"""Of the store, below the folder in which a crash happens."""

CUTS = ("layer1:none", "layer2")

RowName = tuple[str, bytes]
"""(key of the set, digest of the image)"""

Rows = dict[RowName, Tensor]
"""-> its activations."""

# ---- what a store gives


def rows_in(folder: Path) -> Rows:
    """What the store below `folder` gives for each image of each of its sets.

    Raises:
        AssertionError: for a file under a final name that isn't whole, and an image with two rows, or none where the
            set says that it has one.
    """
    if not (folder / ROOT).exists():
        return {}
    store = FeatureStore(folder / ROOT)
    assert store.damaged() == []
    rows: Rows = {}
    for found in store.sets():
        assert [part.path for part in found.parts if part.verify()] == []
        images = _images_of(found)
        assert len(images) == found.index.num_images
        features = store.features(images, found)
        assert len(features) == len(images)
        names = [(found.key, bytes(digest)) for digest in images.digests().values]
        rows |= dict(zip(names, features[:], strict=True))
    return rows


def _images_of(found: FeatureSet) -> ImageSet:
    return IMAGES.select(found.index.find(DIGESTS)[0] >= 0)


def accepted_rows(folder: Path) -> tuple[Rows, set[Path], set[Path]]:
    """Rows below `folder` that no check refuses, and the parts that were refused when opened and by `verify`."""
    rows: Rows = {}
    unopened, unverified = set[Path](), set[Path]()
    for path in final_names(folder):
        if path.parent.name == "images":
            continue
        try:
            part = Part.open(folder / path)
        except DamagedFileError:
            unopened.add(path)
            continue
        damaged = {row for rows_of_block in part.verify() for row in rows_of_block}
        if damaged:
            unverified.add(path)
        for row in set(range(part.num_rows)) - damaged:
            rows[str(part.facts["key"]), bytes(part.digests[row])] = part.features[row]
    return rows, unopened, unverified


def assert_same(rows: Rows, expected: Rows) -> None:
    assert rows.keys() == expected.keys()
    assert_right(rows, expected)


def assert_right(rows: Rows, expected: Rows) -> None:
    assert rows.keys() <= expected.keys()
    assert [name for name, row in rows.items() if not torch.equal(row, expected[name])] == []


def assert_no_garbage(folder: Path) -> None:
    """Checks that a collection leaves below `folder` what readers read, and no other file or folder."""
    store = FeatureStore(folder / ROOT)
    assert store.gc(older_than=0).left == ()
    read = {part.path for found in store.sets() for part in found.parts} | set(store.root.glob("images/*.h5"))
    assert {path for path in store.root.rglob("*") if path.is_file()} == read
    folders = {folder for path in read for folder in path.parents if store.root in folder.parents}
    assert {path for path in store.root.rglob("*") if path.is_dir()} == folders


def assert_compact(folder: Path) -> None:
    """Checks that a compaction leaves each row once below `folder`."""
    compact(folder)
    for found in FeatureStore(folder / ROOT).sets():
        assert sum(part.num_rows for part in found.parts) == found.index.num_images


def final_names(folder: Path) -> set[Path]:
    """Parts and image tables below `folder`, whether sound or not; relative to it."""
    paths = (path.relative_to(folder) for path in folder.rglob("*.h5"))
    return {path for path in paths if not _is_hidden(path)}


def temporary_names(folder: Path) -> set[Path]:
    """What killed writers have left below `folder`; relative to it."""
    return {path.relative_to(folder) for path in folder.rglob(".*.tmp-*")}


Tree = Mapping[Path, bytes | None]
"""Path -> content of each file; folders have none, and stand before what is in them."""


def tree_of(folder: Path) -> Tree:
    """What is below `folder`; paths are relative to it."""
    return {
        path.relative_to(folder): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))
    }


def place(tree: Tree, folder: Path) -> Path:
    """Makes `folder`, and the tree in it."""
    folder.mkdir()
    for path, content in tree.items():
        if content is None:
            (folder / path).mkdir()
        else:
            (folder / path).write_bytes(content)
    return folder


def _is_hidden(path: Path) -> bool:
    return any(name.startswith(".") for name in path.parts)


# ---- what is done to a store

MODEL = staged()
IMAGES = arrays(240)
DIGESTS = IMAGES.digests().values


def extraction(folder: Path, images: ImageSet, *, cuts: Sequence[str] = CUTS, merges: bool = False) -> ExtractReport:
    """Files `images` in the store below `folder`: two sets, four rows a part. A row of the first one is four sectors.

    Args:
        merges: its own parts into one a set at the end; else no file that was filed ever goes.
    """
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(job, "COMMIT_BYTES", 1)
        if not merges:
            patched.setattr(filed, "MERGE_BYTES", 0)
        return extract(
            MODEL,
            images,
            FeatureStore(folder / ROOT),
            cuts=cuts,
            dtype="float32",
            device="cpu",
            batch_size=4,
            workers=0,
        )


def extract_rest(folder: Path, num_images: int, *, cuts: Sequence[str] = CUTS, merges: bool = False) -> None:
    """The extraction of the first `num_images`, whatever is there of them already.

    Raises:
        AssertionError: if it computes a row that is there, or touches a file that is: its own parts alone may go.
    """
    before, num_before = tree_of(folder), len(rows_in(folder))
    report = extraction(folder, IMAGES.select(range(num_images)), cuts=cuts, merges=merges)
    assert report.notes == ()
    assert report.computed == len(rows_in(folder)) - num_before
    assert before.items() <= tree_of(folder).items()
    assert len(FeatureStore(folder / ROOT).images()) == num_images


SPECS = [
    FeatureSpec(trunk=digit * 64, pool={"reduction": "none"}, view=VIEW.facts(), precision="fp32", dtype="float32")
    for digit in "01"
]


def file_part(folder: Path, numbers: Sequence[int], *, spec: FeatureSpec = SPECS[0], device: str = "cpu") -> Path:
    """Files a part with rows of two sectors for some images, without a network; devices differ in the last bits."""
    last_bits = {"cpu": 0.0, "cuda": 2.0**-20}[device]
    values = torch.stack([torch.linspace(number, number + 1, 2 * SECTOR_BYTES // 4) for number in numbers])
    return FeatureStore(folder / ROOT).write(
        spec,
        features=[values + last_bits],
        digests=np.ascontiguousarray(DIGESTS[list(numbers)]),
        decoders=np.zeros(len(numbers), np.uint8),
        facts={
            "backbone": "net",
            "cut": "layer2",
            "stages": [{"name": "layer2", "layout": "NC", "shape": [values.shape[1]], "digest": spec.trunk}],
            "class_tokens": 0,
            "profile": {"batch_size": 32, "device": device, "torch": "2"},
            "probe": {"values": [[0.0], [0.0]], "largest": 1.0},
            "failed": {},
        },
    )


def compact(folder: Path) -> None:
    """Merges what can be merged."""
    assert FeatureStore(folder / ROOT).compact().left == ()


def collect(folder: Path) -> None:
    """Deletes all garbage."""
    assert FeatureStore(folder / ROOT).gc(older_than=0).left == ()


def remove(folder: Path, cut: str) -> None:
    """Deletes the set of a cut, if there is one."""
    store = FeatureStore(folder / ROOT)
    for found in store.sets():
        if found.facts["cut"] == cut:
            store.remove(found.key)


def repair(folder: Path) -> None:
    """Sets aside what is damaged."""
    FeatureStore(folder / ROOT).verify(repair=True)


def flip_bit(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


# ---- scenarios


@dataclass(frozen=True, kw_only=True, eq=False)
class Scenario:
    """What is done to a store.

    Attributes:
        arrange: makes what is there before in an empty folder; it is all on the disk when the first step begins.
        steps: done one after the other in that folder; one that was broken off is done again, and then the others.
    """

    arrange: Callable[[Path], object]
    steps: Sequence[Callable[[Path], object]]


def _arrange_nothing(folder: Path) -> None:
    pass


def _arrange_small_parts(folder: Path) -> None:
    """One set with superseded parts, duplicates, and rows of two devices; another one that is only small."""
    for numbers in ([0, 1], [1, 2]):
        file_part(folder, numbers)
    compact(folder)
    for numbers in ([3], [4, 0]):
        file_part(folder, numbers)
    for numbers in ([1, 5], [6, 4]):
        file_part(folder, numbers, device="cuda")
    for numbers in ([0, 1], [2]):
        file_part(folder, numbers, spec=SPECS[1])


def _file_late_part(folder: Path) -> None:
    if (SPECS[0].key, bytes(DIGESTS[7])) not in rows_in(folder):
        file_part(folder, [7])


def _arrange_garbage(folder: Path) -> None:
    """A set with superseded parts and one more to merge; what a killed writer, a repair and a removal have left."""
    for numbers in ([0, 1], [1, 2]):
        file_part(folder, numbers)
    compact(folder)
    file_part(folder, [3, 0])
    damaged = file_part(folder, [4])
    damaged.with_name(".part-0123456789abcdef.h5.tmp-0123456789abcdef").write_bytes(damaged.read_bytes())
    disk.set_aside(damaged)
    for numbers in ([0, 1], [2]):
        removed = file_part(folder, numbers, spec=SPECS[1])
    disk.move_aside(removed.parent)


def _compact_and_die(folder: Path) -> None:
    """A compaction that ends when its part has its name, before that is safe on the disk."""

    class DiedError(Exception):
        pass

    def die(operation: Callable[..., Any], path: Path) -> NoReturn:
        raise DiedError

    with pytest.MonkeyPatch.context() as patched, suppress(DiedError):
        replace_operation(patched, "sync_folder", die)
        compact(folder)


def _arrange_two_sets(folder: Path) -> None:
    """The second one in two folders."""
    extract_rest(folder, 4)
    (second,) = (found for found in FeatureStore(folder / ROOT).sets() if found.facts["cut"] == "layer2")
    second.folder.rename(second.folder.with_name("mine"))
    extract_rest(folder, 12)


def _arrange_damage(folder: Path) -> None:
    """A flipped bit in a row, which only `verify` sees, and one in a digest, for which a part isn't even opened."""
    extract_rest(folder, 8)
    first, second = (found.parts[0] for found in FeatureStore(folder / ROOT).sets())
    flip_bit(first.path, first.features_offset + SECTOR_BYTES)
    flip_bit(second.path, second.path.read_bytes().index(bytes(second.digests[0])))


SCENARIOS = {
    "extraction": Scenario(arrange=_arrange_nothing, steps=[partial(extract_rest, num_images=8)]),
    "extraction that merges": Scenario(
        arrange=_arrange_nothing, steps=[partial(extract_rest, num_images=12, merges=True)]
    ),
    "compactions": Scenario(arrange=_arrange_small_parts, steps=[compact, _file_late_part, compact, collect]),
    "collection": Scenario(arrange=_arrange_garbage, steps=[_compact_and_die, collect]),
    "removal": Scenario(
        arrange=_arrange_two_sets, steps=[partial(remove, cut="layer2"), partial(extract_rest, num_images=12)]
    ),
    "repair": Scenario(arrange=_arrange_damage, steps=[repair, partial(extract_rest, num_images=8)]),
}

# ---- recording


@dataclass(frozen=True)
class MakeFolder:
    """A folder was made."""

    path: Path


@dataclass(frozen=True)
class Create:
    """An empty file was made. Its name tells it from all others, for it has something random in it."""

    path: Path


@dataclass(frozen=True)
class Allocate:
    """A file has this length at least."""

    file: Path
    length: int


@dataclass(frozen=True)
class Write:
    """Bytes were written into a file."""

    file: Path
    offset: int
    data: bytes


@dataclass(frozen=True)
class Sync:
    """All that was written to a file is on the disk."""

    file: Path


@dataclass(frozen=True)
class Rename:
    """A file or a folder was given another name in its folder."""

    path: Path
    target: Path


@dataclass(frozen=True)
class Remove:
    """A file, or an empty folder, was deleted."""

    path: Path


@dataclass(frozen=True)
class SyncFolder:
    """The names in a folder are on the disk."""

    path: Path


@dataclass(frozen=True)
class Filed:
    """The writer of a part or a table has returned: whoever called it takes the file for safe, with these rows."""

    path: Path
    rows: frozenset[RowName]


@dataclass(frozen=True)
class Removing:
    """A set is being removed: of the files of each folder all are there from now on, or none."""

    key: str
    folders: tuple[frozenset[Path], ...]


@dataclass(frozen=True)
class Gone:
    """A removal or a repair has returned: whoever called it takes it that nobody reads these files again."""

    paths: frozenset[Path]


@dataclass(frozen=True)
class Done:
    """A step of a scenario is done."""

    step: int


Operation = (
    MakeFolder | Create | Allocate | Write | Sync | Rename | Remove | SyncFolder | Filed | Removing | Gone | Done
)
"""The last four change nothing on the disk: they tell what must be there."""


@contextmanager
def recorded(folder: Path) -> Iterator[list[Operation]]:
    """All that the block does to the files below `folder`, in order; it is also done."""
    log: list[Operation] = []
    files: dict[int, Path] = {}  # by descriptor

    def below(path: Path) -> Path:
        return path.relative_to(folder)

    def filed(path: Path, **_: Any) -> Filed:
        is_part = path.name.startswith("part-")
        rows = [(Part.open(path).facts["key"], bytes(digest)) for digest in Part.open(path).digests] if is_part else []
        return Filed(below(path), frozenset(rows))

    operations: dict[str, Callable[..., Operation]] = {
        "mkdir": lambda path: MakeFolder(below(path)),
        "allocate": lambda fd, length: Allocate(files[fd], length),
        "write_at": lambda fd, data, offset: Write(files[fd], offset, bytes(data)),
        "sync": lambda fd: Sync(files[fd]),
        "rename": lambda path, target: Rename(below(path), below(target)),
        "unlink": lambda path: Remove(below(path)),
        "remove_folder": lambda path: Remove(below(path)),
        "sync_folder": lambda path: SyncFolder(below(path)),
    }

    def noted(name: str, operation: Callable[..., Any], *arguments: Any) -> Any:
        was_there = name != "remove_folder" or arguments[0].exists()
        result = operation(*arguments)
        if name == "create":
            files[result] = below(arguments[0])
            log.append(Create(files[result]))
        elif was_there and result is not False:  # as a folder says that isn't empty
            log.append(operations[name](*arguments))
        return result

    def removed(catalogue: Catalogue, spec: FeatureSpec, folders: Sequence[Path]) -> RemoveReport:
        parts = tuple(frozenset(map(below, part_paths(folder))) for folder in folders)
        log.append(Removing(spec.key, parts))
        report = removal.remove(catalogue, spec, folders)
        log.append(Gone(frozenset().union(*parts)))
        return report

    def verified(*arguments: Any, **options: Any) -> VerifyReport:
        report = verification.verify(*arguments, **options)
        log.append(Gone(frozenset(below(each.path) for each in report.damaged if each.set_aside)))
        return report

    with pytest.MonkeyPatch.context() as patched:

        def note(module: ModuleType) -> None:
            writers = {name: getattr(module, name) for name in ("write_part", "write_table") if hasattr(module, name)}
            for name, real in writers.items():

                def written(*arguments: Any, real: Callable[..., None] = real, **options: Any) -> None:
                    real(*arguments, **options)
                    log.append(filed(*arguments, **options))

                patched.setattr(module, name, written)

        watch(patched, noted)
        patched.setattr(store_module, "remove", removed)
        patched.setattr(store_module, "verify", verified)
        note(store_module)
        note(compaction)
        yield log


# ---- what is left


@dataclass(eq=False)
class _File:
    """What of a file is on the disk, and what may still be lost."""

    synced: bytes = b""
    pending: list[Allocate | Write] = field(default_factory=list)

    def sync(self) -> None:
        self.synced, self.pending = self.surviving(None), []

    def surviving(self, rng: random.Random | None) -> bytes:
        content = bytearray(self.synced)
        for operation in self.pending:
            if isinstance(operation, Allocate):
                if rng is None or rng.random() < 0.5:
                    content.extend(bytes(max(0, operation.length - len(content))))
                continue
            for offset, data in _surviving_pieces(operation, rng):
                content.extend(bytes(max(0, offset - len(content))))
                content[offset : offset + len(data)] = data
        return bytes(content)


def _surviving_pieces(write: Write, rng: random.Random | None) -> Iterator[tuple[int, bytes]]:
    """All of a write, nothing, or some of its sectors, with where they lie in the file."""
    fate = "whole" if rng is None else rng.choice(["whole", "lost", "torn"])
    if fate == "whole":
        yield write.offset, write.data
    elif fate == "torn" and rng is not None:
        for start in range(0, len(write.data), SECTOR_BYTES):
            if rng.random() < 0.5:
                yield write.offset + start, write.data[start : start + SECTOR_BYTES]


@dataclass(eq=False)
class _Folder:
    """The names in a folder as processes see them, those on the disk, and the changes between that may be lost."""

    now: dict[str, _File | _Folder] = field(default_factory=dict)
    synced: dict[str, _File | _Folder] = field(default_factory=dict)
    pending: list[_Change] = field(default_factory=list)

    def change(self, change: _Change) -> None:
        self.pending.append(change)
        change.apply(self.now)

    def sync(self) -> None:
        self.synced, self.pending = dict(self.now), []

    def surviving(self, rng: random.Random | None) -> dict[str, _File | _Folder]:
        names = dict(self.synced)
        for change in self.pending:
            if rng is None or rng.random() < 0.5:
                change.apply(names)
        return names


@dataclass(frozen=True, eq=False)
class _Change:
    """One name less in a folder, one more, or both."""

    lost: str | None = None
    given: str | None = None
    to: _File | _Folder | None = None

    def apply(self, names: dict[str, _File | _Folder]) -> None:
        if self.lost is not None:
            names.pop(self.lost, None)
        if self.given is not None and self.to is not None:
            names[self.given] = self.to


class Disk:
    """What is on a disk, and what is only in the memory of the machine, after some operations.

    Args:
        before: what was on the disk.
        operations: done since then.
    """

    def __init__(self, before: Tree, operations: Sequence[Operation]) -> None:
        self.root = _Folder()
        self.files: dict[Path, _File] = {}  # by the names under which they were made: writers hold them open
        for path, content in before.items():
            self._folder(path.parent).now[path.name] = _Folder() if content is None else _File(synced=content)
            self._folder(path.parent).sync()
        for operation in operations:
            self._apply(operation)

    def after_kill(self) -> Tree:
        """What a killed process leaves: everything it did."""
        return dict(_tree(self.root, None))

    def after_power_loss(self, rng: random.Random) -> Tree:
        """What may be left when the machine stops: what was synced, and at random parts of the rest."""
        return dict(_tree(self.root, rng))

    def _folder(self, path: Path) -> _Folder:
        folder = self.root
        for name in path.parts:
            inner = folder.now[name]
            assert isinstance(inner, _Folder)
            folder = inner
        return folder

    def _apply(self, operation: Operation) -> None:
        match operation:
            case MakeFolder(path):
                self._folder(path.parent).change(_Change(given=path.name, to=_Folder()))
            case Create(path):
                self.files[path] = _File()
                self._folder(path.parent).change(_Change(given=path.name, to=self.files[path]))
            case Allocate(file) | Write(file):
                self.files[file].pending.append(operation)
            case Sync(file):
                self.files[file].sync()
            case Rename(path, target):
                folder = self._folder(path.parent)
                folder.change(_Change(lost=path.name, given=target.name, to=folder.now[path.name]))
            case Remove(path):
                self._folder(path.parent).change(_Change(lost=path.name))
            case SyncFolder(path):
                self._folder(path).sync()
            case Filed() | Removing() | Gone() | Done():
                pass


def _tree(folder: _Folder, rng: random.Random | None, path: Path = Path()) -> Iterator[tuple[Path, bytes | None]]:
    for name, inner in folder.surviving(rng).items():
        if isinstance(inner, _File):
            yield path / name, inner.surviving(rng)
        else:
            yield path / name, None
            yield from _tree(inner, rng, path / name)


# ---- simulated crashes


@dataclass(frozen=True, kw_only=True, eq=False)
class UnbrokenRun:
    """What a scenario that nothing disturbs does to the disk, and the rows that the store gives then.

    Attributes:
        scenario: what is done.
        before: what is on the disk when its first step begins.
        damaged: parts that aren't sound then.
        rows_before: those in the other parts.
        operations: of its steps, in their order.
        rows: what the store gives at the end.
        recovered: the crashes that were followed to the end, with the rows that each had left.
    """

    scenario: Scenario
    before: Tree
    damaged: frozenset[Path]
    rows_before: frozenset[RowName]
    operations: Sequence[Operation]
    rows: Rows
    recovered: dict[Case, frozenset[RowName]] = field(default_factory=dict)

    @classmethod
    def in_folder(cls, scenario: Scenario, folder: Path, *, seed: int = 0) -> Self:
        """Does it in the empty `folder`; files get names that `seed` decides, and with them their order."""
        rng = random.Random(seed)
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(secrets, "token_hex", lambda num_bytes: rng.randbytes(num_bytes).hex())
            patched.setattr(secrets, "randbelow", rng.randrange)
            scenario.arrange(folder)
            before = tree_of(folder)
            rows_before, unopened, unverified = accepted_rows(folder)
            with recorded(folder) as operations:
                _finish(scenario, folder, 0, operations)
        return cls(
            scenario=scenario,
            before=before,
            damaged=frozenset(unopened | unverified),
            rows_before=frozenset(rows_before),
            operations=operations,
            rows=rows_in(folder),
        )

    def expected(self, operations: Sequence[Operation]) -> Expected:
        """What must be there, and what must not, when these operations were done."""
        rows, gone, together, step = set(self.rows_before), set[Path](), list[frozenset[Path]](), 0
        files = {path for path in self.before if path.parent.name == "images"}
        for operation in operations:
            match operation:
                case Filed(path, filed):
                    rows |= filed
                    files |= {path} if path.parent.name == "images" else set()
                case Removing(key, folders):
                    rows = {name for name in rows if name[0] != key}
                    together += folders
                case Gone(paths):
                    gone |= paths
                case Done(number):
                    step = number + 1
        return Expected(rows=rows, files=files, gone=gone, together=together, step=step)

    def check(self, operations: Sequence[Operation], tree: Tree, folder: Path) -> None:
        """Checks what a crash has left, and that whoever does the rest then gets what an unbroken run gets.

        What readers see in the tree is all that decides what follows. Where that was checked before it isn't again.

        Args:
            operations: done before the crash.
            tree: left by it.
            folder: made here, if the tree has to be looked at.

        Raises:
            AssertionError: for a row or a file that is lost, not whole, wrong, or there again after it was deleted, and
                for whatever goes wrong in the rest.
        """
        expected = self.expected(operations)
        expected.check_files(tree)
        visible = {path: content for path, content in tree.items() if not _is_hidden(path)}
        case = expected.step, frozenset((path, content and _digest(content)) for path, content in visible.items())
        if case not in self.recovered:
            self.recovered[case] = self._check_recovery(place(tree, folder), expected.step)
        assert expected.rows <= self.recovered[case]

    def _check_recovery(self, folder: Path, step: int) -> frozenset[RowName]:
        """Checks all that follows a crash; the names of the rows that it had left."""
        left = self._left(folder)
        assert_right(left, self.rows)
        _finish(self.scenario, folder, step)
        assert_same(rows_in(folder), self.rows)
        assert_no_garbage(folder)
        assert_compact(folder)
        assert_same(rows_in(folder), self.rows)
        return frozenset(left)

    def _left(self, folder: Path) -> Rows:
        if not self.damaged & final_names(folder):
            return rows_in(folder)
        rows, unopened, unverified = accepted_rows(folder)
        assert unopened | unverified <= self.damaged
        return rows

    def kill_everywhere(self, folder: Path) -> None:
        """Kills it at each operation, and in the middle of each write; `folder` is made here. Errors as in `check`."""
        folder.mkdir()
        for number, operations in enumerate(kills(self.operations)):
            self.check(operations, Disk(self.before, operations).after_kill(), folder / str(number))

    def lose_power(self, folder: Path, rng: random.Random) -> None:
        """Stops the machine at a random moment; `folder` may be made here. Errors as in `check`."""
        operations = _until_random_moment(self.operations, rng)
        self.check(operations, Disk(self.before, operations).after_power_loss(rng), folder)

    def lose_power_in_second_run(
        self, folder: Path, rng: random.Random, *, killed: Sequence[Operation] | None = None
    ) -> None:
        """Kills it, does the rest, and stops the machine at a random moment of that.

        Args:
            folder: made here.
            rng: chooses the moment.
            killed: what was done before the kill; default: what was until a random moment.

        Raises:
            AssertionError: as in `check`.
        """
        killed = _until_random_moment(self.operations, rng) if killed is None else killed
        folder.mkdir()
        second = place(Disk(self.before, killed).after_kill(), folder / "second")
        with recorded(second) as operations:
            _finish(self.scenario, second, self.expected(killed).step, operations)
        operations = [*killed, *_until_random_moment(operations, rng)]
        self.check(operations, Disk(self.before, operations).after_power_loss(rng), folder / "left")


Case = tuple[int, frozenset[tuple[Path, bytes | None]]]
"""The step to do next, and what readers see."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Expected:
    """What must be there after a crash, and what must not.

    Attributes:
        rows: that must be there.
        files: image tables that must be there.
        gone: files that must not.
        together: files of which all must be there, or none.
        step: the first that isn't done.
    """

    rows: set[RowName]
    files: set[Path]
    gone: set[Path]
    together: Sequence[frozenset[Path]]
    step: int

    def check_files(self, tree: Tree) -> None:
        """Checks all but the rows.

        Raises:
            AssertionError: for what is lost, or back.
        """
        assert self.files <= tree.keys()
        assert not self.gone & tree.keys()
        for files in self.together:
            assert not files & tree.keys() or files <= tree.keys()


def _finish(scenario: Scenario, folder: Path, step: int, log: list[Operation] | None = None) -> None:
    """Does the steps from `step` on; tells the `log` of each that is done."""
    for number, do in list(enumerate(scenario.steps))[step:]:
        do(folder)
        if log is not None:
            log.append(Done(number))


def kills(operations: Sequence[Operation]) -> Iterator[Sequence[Operation]]:
    """What was done before each possible kill: between any two operations, and in the middle of each write."""
    for number, operation in enumerate(operations):
        yield operations[:number]
        if isinstance(operation, Write):
            half = operation.data[: len(operation.data) // 2]
            yield [*operations[:number], replace(operation, data=half)]
    yield operations


def _until_random_moment(operations: Sequence[Operation], rng: random.Random) -> Sequence[Operation]:
    return operations[: rng.randint(0, len(operations))]


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()


# ---- real kills


class Forker:
    """A process that has imported everything and does each piece of work in a fork of itself, on one thread.

    A new interpreter takes seconds to start, in which most kills would come before the first file. Whoever is still at
    work when this one ends is killed.
    """

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "support.crashing"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(map(str, [*_FOLDERS, *_PATH]))},
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()

    def start(self, work: str, folder: Path, **options: Any) -> int:
        """Starts one of `WORK`; `end` must follow. The number of its process."""
        pid: int = self._answer("start", work, str(folder), options)
        return pid

    def end(self, pid: int) -> bool:
        """Waits for a process; whether it has finished, and was not killed.

        Raises:
            AssertionError: if it failed; stderr says why.
        """
        status = self._answer("end", pid)  # only now may the process be reaped, and its number be another's
        assert status in (0, -signal.SIGKILL), f"the process ended with status {status}"
        return bool(status == 0)

    def run(self, work: str, folder: Path, **options: Any) -> None:
        """Does one of `WORK`, undisturbed."""
        assert self.end(self.start(work, folder, **options))

    def _answer(self, *question: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{json.dumps(question)}\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


def kill_and_check(forker: Forker, folder: Path, num_images: int, whole: Rows, rng: random.Random) -> bool:
    """Kills an extraction in the empty `folder` at a random instant, runs it again, and checks what is there each time.

    Args:
        forker: runs it.
        folder: made here.
        num_images: of the extraction.
        whole: the rows that an unbroken run files.
        rng: chooses the instant.

    Returns:
        Whether the kill came before the extraction had finished.

    Raises:
        AssertionError: for whatever a kill must not do.
    """
    folder.mkdir()
    pid = forker.start("extract", folder, num_images=num_images)
    # The instant is counted in files, so that the speed of the machine doesn't decide how far the extraction gets.
    num_files, moment = rng.randrange(1 + len(whole) // 4), rng.random() * 0.02
    deadline = time.monotonic() + 60  # for one that fails before; `end` then says so
    while len(final_names(folder)) < num_files and time.monotonic() < deadline:
        time.sleep(0.002)
    time.sleep(moment)
    seen = final_names(folder)
    os.kill(pid, signal.SIGKILL)  # whoever has finished is a zombie until `end`, so the number is still his
    is_killed = not forker.end(pid)

    assert seen <= final_names(folder)
    assert_right(rows_in(folder), whole)
    forker.run("extract", folder, num_images=num_images)
    assert_same(rows_in(folder), whole)
    return is_killed


# ---- many processes at once

REMOVED_CUT = "layer1:avg"
"""Of a set that is removed again and again."""

CROWD = ("write", "write", "compact", "compact", "collect", "remove", "read", "read")
"""The processes that are at work on one store at once."""

_STOP, _COMMITTED = "stop", "committed"
"""Files beside the store: the first one ends all; the second one lists the images whose extraction has returned."""


def extract_reference(folder: Path) -> None:
    """Files all images in all sets of the crowd, undisturbed."""
    extraction(folder, IMAGES, cuts=[*CUTS, REMOVED_CUT], merges=True)


def crowd_and_check(forker: Forker, folder: Path, reference: Path, num_kills: int, rng: random.Random) -> Counter[str]:
    """Has a `CROWD` work in the empty `folder`, kills one of them (but the readers) at a time, at random instants.

    Args:
        forker: runs them.
        folder: made here.
        reference: the folder of `extract_reference`.
        num_kills: until all are told to end.
        rng: chooses whom, and the instants.

    Returns:
        How many of each kind were killed.

    Raises:
        AssertionError: for a reader, or anyone else, who meets what can't be, and for another end than an undisturbed
            extraction's.
    """
    folder.mkdir()
    forker.run("write", folder, seed=0, num_times=1)

    def start(work: str) -> int:
        options = {"reference": str(reference)} if work == "read" else {}
        return forker.start(work, folder, seed=rng.randrange(1 << 32), **options)

    crowd = [(work, start(work)) for work in CROWD]
    killed: Counter[str] = Counter()
    for _ in range(num_kills):
        time.sleep(rng.random() * 0.4)
        victim = rng.choice([number for number, (work, _) in enumerate(crowd) if work != "read"])
        work, pid = crowd[victim]
        os.kill(pid, signal.SIGKILL)
        assert not forker.end(pid)
        crowd[victim] = work, start(work)
        killed[work] += 1
    (folder / _STOP).touch()
    for _, pid in crowd:
        assert forker.end(pid)

    whole, left = rows_in(reference), rows_in(folder)
    assert_right(left, whole)
    kept = [found.key for found in FeatureStore(reference / ROOT).sets() if not _is_removed(found)]
    assert {(key, bytes(DIGESTS[number])) for key in kept for number in _committed(folder)} <= left.keys()
    forker.run("extract", folder, num_images=len(IMAGES), cuts=[*CUTS, REMOVED_CUT], merges=True)
    assert_same(rows_in(folder), whole)
    assert_compact(folder)
    assert_no_garbage(folder)
    assert_same(rows_in(folder), whole)
    return killed


def write_on(folder: Path, *, seed: int, num_times: int = sys.maxsize) -> None:
    """Extracts a few images at a time, often some that others extract as well."""
    rng = random.Random(seed)
    for _ in range(num_times):
        if not _goes_on(folder):
            break
        numbers = rng.sample(range(len(IMAGES)), k=rng.randint(2, 9))
        extraction(folder, IMAGES.select(numbers), cuts=[*CUTS, REMOVED_CUT], merges=True)
        with (folder / _COMMITTED).open("a") as file:
            file.write(f"{json.dumps(numbers)}\n")


def compact_on(folder: Path, *, seed: int) -> None:
    """Merges parts, again and again."""
    rng, store = random.Random(seed), FeatureStore(folder / ROOT)
    while _goes_on(folder):
        assert store.compact().left == ()
        time.sleep(rng.random() * 0.05)


def collect_on(folder: Path, *, seed: int) -> None:
    """Deletes garbage, however young, again and again."""
    rng, store = random.Random(seed), FeatureStore(folder / ROOT)
    while _goes_on(folder):
        store.gc(older_than=0)  # it leaves what others are just replacing; `assert_no_garbage` looks when all is quiet
        time.sleep(rng.random() * 0.05)


def remove_on(folder: Path, *, seed: int) -> None:
    """Removes one of the sets, again and again."""
    rng, store = random.Random(seed), FeatureStore(folder / ROOT)
    while _goes_on(folder):
        for found in store.sets():
            if _is_removed(found):
                store.remove(found.key)
        time.sleep(rng.random() * 0.3)


def read_on(folder: Path, *, reference: str, seed: int) -> None:
    """Reads random rows of images that were committed, in all ways, from sets just opened and from long ago."""
    rng, stored = random.Random(seed), FeatureStore(Path(reference) / ROOT)
    expected = {found.key: stored.features(IMAGES, found).tensor() for found in stored.sets()}
    (removed,) = (found.key for found in stored.sets() if _is_removed(found))
    held = deque[tuple[Features, list[int]]](maxlen=20)
    stores: dict[Access, FeatureStore] = {}
    while _goes_on(folder):
        access: Access = rng.choice(["memory", "map", "stream"])
        if access not in stores or rng.random() < 0.3:
            stores[access] = FeatureStore(folder / ROOT, access=access)
        committed = sorted(_committed(folder))
        numbers = rng.sample(committed, k=rng.randint(1, len(committed)))
        for key in expected:
            try:
                held.append((stores[access].features(IMAGES.select(numbers), key), numbers))
            except MissingFeaturesError:
                if key != removed:
                    raise
            except FeatureStoreError as error:
                if key != removed or "holds no feature set" not in str(error):
                    raise
        for features, numbers in [held[-1], *rng.choices(held, k=3)]:
            try:
                read_and_check(features, expected[features.key][numbers], rng)
            except MissingFeaturesError:
                if features.key != removed:
                    raise
    assert held


def read_and_check(features: Features, expected: Tensor, rng: random.Random) -> None:
    """Checks some rows, an epoch, or all rows: what was read before decides what is mapped or in memory by then."""

    def check_some() -> None:
        rows = rng.choices(range(len(expected)), k=rng.randint(1, 2 * len(expected)))
        assert torch.equal(features[rows], expected[rows])

    def check_epoch() -> None:
        num_rows = 0
        for values, rows in features.batches(rng.randint(1, 9), shuffle=True, seed=rng.randrange(100)):
            assert torch.equal(values, expected[rows])
            num_rows += len(rows)
        assert num_rows == len(expected)

    def check_all() -> None:
        assert torch.equal(features.tensor(), expected)

    rng.choice([check_some, check_some, check_epoch, check_all])()


def _goes_on(folder: Path) -> bool:
    return not (folder / _STOP).exists()


def _committed(folder: Path) -> set[int]:
    lines = (folder / _COMMITTED).read_text().splitlines(keepends=True)
    return {number for line in lines if line.endswith("\n") for number in json.loads(line)}


def _is_removed(found: FeatureSet) -> bool:
    return f"{found.facts['cut']}:{found.spec.reduction}" == REMOVED_CUT


# ---- the process that forks

WORK: dict[str, Callable[..., None]] = {
    "extract": extract_rest,
    "extract reference": extract_reference,
    "write": write_on,
    "compact": compact_on,
    "collect": collect_on,
    "remove": remove_on,
    "read": read_on,
}


def main() -> None:
    """Does the work that a `Forker` asks for, until it closes the pipe."""
    torch.set_num_threads(1)
    running: set[int] = set()
    for line in sys.stdin:
        match json.loads(line):
            case ["start", work, folder, options]:
                pid = os.fork()
                if pid == 0:
                    _work(work, Path(folder), options)
                running.add(pid)
                answer = pid
            case ["end", pid]:
                answer = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                running.remove(pid)
        print(json.dumps(answer), flush=True)
    for pid in running:
        os.kill(pid, signal.SIGKILL)


def _work(work: str, folder: Path, options: Mapping[str, Any]) -> NoReturn:
    try:
        WORK[work](folder, **options)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


if __name__ == "__main__":
    main()
