"""The store beside a model of it in plain sets: whatever is done to both, in whatever order, they say the same.

`StoreMachine` edits photographs, extracts, compacts, collects garbage, removes, damages and repairs as hypothesis has
it, and stops any of that at any operation on the disk. After each step readers that have just come, and readers that
were there from the start, must find exactly what the model says. The same sequences run each time; others with::

    FEATSTORE_EXAMPLES=1000 pytest tests/promises/test_store_model.py --hypothesis-seed=1

Long, since hypothesis draws from the rules of one machine: a rule in another file would never meet these.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import pickle
import random
import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache, lru_cache, partial
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, NamedTuple, TypeVar, get_args

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from PIL import Image
from support.operations import watch
from support.tiny import VIEW, arrays, net, pixels, rows_by_hand, staged
from torch import Tensor, nn

from featstore import (
    AmbiguousRequestError,
    Augment,
    DamagedFileError,
    ExtractReport,
    FeatureRequest,
    FeatureSet,
    FeatureSpec,
    FeatureStore,
    FeatureStoreError,
    ImageError,
    ImageSet,
    MissingFeaturesError,
    plan,
)
from featstore.errors import OnError
from featstore.extraction import filed as filed_module
from featstore.extraction import job as job_module
from featstore.extraction.extract import run_plan
from featstore.extraction.plan import Plan
from featstore.files.part import Part, write_part
from featstore.store import compaction
from featstore.store import store as store_module  # its name write_part is replaced, to see what is published
from featstore.store.access import Access
from featstore.store.features import Features

EXAMPLES = int(os.environ.get("FEATSTORE_EXAMPLES", "0"))
"""Sequences to try; 0: a few, the same each time."""

BATCH_SIZE = 3
NUM_SOUND = 10
NAMES = [f"{number}.png" for number in range(10)]
LABELS = ["cat", "dog", "ant", ""]
SPLITS = ["", "train", "valid"]
CUTS = ("layer1", "layer2")
MODEL = staged()

T = TypeVar("T")


class SetName(NamedTuple):
    """A feature set as the model calls it."""

    cut: str
    seed: int | None


SET_NAMES = [SetName(cut, seed) for cut in CUTS for seed in (None, 0, 1)]


@cache
def contents() -> list[bytes]:
    """What an image file may hold: `NUM_SOUND` images, all of one size in bytes, and two that can't be decoded."""
    sound = []
    for number in range(NUM_SOUND):
        file = io.BytesIO()
        Image.fromarray(pixels(1, number)[0]).save(file, "PNG", compress_level=0)
        sound.append(file.getvalue())
    return [*sound, sound[0][:-200], b"no image at all"]


@cache
def content_of() -> dict[bytes, int]:
    """SHA-256 -> place in `contents()`."""
    return {hashlib.sha256(data).digest(): number for number, data in enumerate(contents())}


@cache
def specs() -> dict[SetName, FeatureSpec]:
    """What decides the values of each set."""
    planned = planned_for(arrays(1), FeatureStore("nowhere"), CUTS, (0, 1))
    return {SetName(each.cut, each.view.seed): each.spec for each in planned.sets}


@cache
def name_of() -> dict[str, SetName]:
    """Key -> name."""
    return {spec.key: name for name, spec in specs().items()}


@cache
def values() -> dict[SetName, Tensor]:
    """What the plain network gives for each sound content: ``(NUM_SOUND, *F)``."""
    network = net()
    trunks = {"layer1": network.layer1, "layer2": nn.Sequential(network.layer1, network.layer2)}
    with TemporaryDirectory() as folder:
        for number in range(NUM_SOUND):
            Path(folder, f"{number:02}.png").write_bytes(contents()[number])
        images = ImageSet.from_folder(folder)
        return {
            name: rows_by_hand(trunks[name.cut], images, spec.rendered, batch_size=BATCH_SIZE)
            for name, spec in specs().items()
        }


def planned_for(images: ImageSet, store: FeatureStore, cuts: Sequence[str], seeds: Sequence[int]) -> Plan:
    return plan(
        MODEL,
        images,
        store,
        cuts=[f"{cut}:none" for cut in cuts],
        augment=Augment("random_resized_crop", seeds=seeds) if seeds else None,
        view=VIEW,
        dtype="float32",
    )


# ---- the model


class Photo(NamedTuple):
    """A photograph in the table of them; `content` is a place in `contents()`, or None if there is no such file."""

    content: int | None
    label: str
    split: str

    @property
    def is_damaged(self) -> bool:
        return self.content is not None and self.content >= NUM_SOUND


Photos = dict[str, Photo]


@dataclass(frozen=True)
class Kept:
    """What a feature set holds: contents with a row, and contents that failed when they were extracted."""

    rows: frozenset[int] = frozenset()
    failed: frozenset[int] = frozenset()

    def __or__(self, other: Kept) -> Kept:
        return Kept(self.rows | other.rows, self.failed | other.failed)

    def __sub__(self, other: Kept) -> Kept:
        return Kept(self.rows - other.rows, self.failed - other.failed)

    def __le__(self, other: Kept) -> bool:
        return self.rows <= other.rows and self.failed <= other.failed


NOTHING = Kept()
Sets = dict[SetName, Kept]


class FiledPhotos(NamedTuple):
    """An image set as a store knows it, and the files that were the newest of its name before."""

    photos: Photos
    parents: list[str]


@dataclass
class Model:
    """What a store must hold.

    Attributes:
        photos: as they are now, in their order.
        sets: what each feature set holds.
        ever: what each has held since it was last removed.
        tables: name of the file -> image set, in the order in which they were filed.
    """

    photos: Photos = field(default_factory=dict)
    sets: Sets = field(default_factory=lambda: dict.fromkeys(SET_NAMES, NOTHING))
    ever: Sets = field(default_factory=lambda: dict.fromkeys(SET_NAMES, NOTHING))
    tables: dict[str, FiledPhotos] = field(default_factory=dict)

    def existing(self) -> list[SetName]:
        return [name for name, kept in self.sets.items() if kept != NOTHING]

    def lacking(self, name: SetName) -> set[str]:
        """Photographs that lack a row."""
        return {key for key, photo in self.photos.items() if photo.content not in self.sets[name].rows}

    def failed(self, name: SetName) -> set[str]:
        """Photographs that failed when they were extracted."""
        return {key for key, photo in self.photos.items() if photo.content in self.sets[name].failed}

    def newest_tables(self) -> list[str]:
        parents = {parent for table in self.tables.values() for parent in table.parents}
        return [name for name in self.tables if name not in parents]

    def unlike_tables(self, photos: Photos) -> list[str]:
        """Newest tables that have none of these photographs."""
        newest = self.newest_tables()
        return [name for name in newest if photos and photos.keys().isdisjoint(self.tables[name].photos)]

    def changed(self) -> set[str]:
        """Photographs of which the store knows another content."""
        known: dict[str, int] = {}
        for table in sorted(self.newest_tables()):
            photos = self.tables[table].photos.items()
            known |= {key: photo.content for key, photo in photos if photo.content is not None}
        now = {key: photo.content for key, photo in self.photos.items() if photo.content is not None}
        return {key for key in known.keys() & now if known[key] != now[key]}

    def superseded(self, name: SetName) -> frozenset[int]:
        """Rows of images that are in no image set any more; none as long as no image set is filed."""
        newest = [self.tables[table].photos for table in self.newest_tables()]
        return self.sets[name].rows.difference(*map(contents_in, newest)) if newest else frozenset()


@dataclass(frozen=True)
class Job:
    """An extraction as it was planned: of these photographs into these sets, which held `stored` then."""

    photos: Photos
    names: list[SetName]
    stored: Sets
    is_skipping: bool

    @property
    def stops_at(self) -> str | None:
        """The photograph that ends it with an error: the first that isn't there, else the first damaged one."""
        absent = [key for key, photo in self.photos.items() if photo.content is None]
        damaged = [key for key, photo in self.photos.items() if photo.is_damaged]
        return None if self.is_skipping else next(iter([*absent, *damaged]), None)

    @property
    def files_photos(self) -> bool:
        """Whether it files the image set: before it reads images, but after it has seen that they are there."""
        return self.is_skipping or all(photo.content is not None for photo in self.photos.values())

    def wanted(self, name: SetName) -> Photos:
        """Of which it computes rows: seeds are for the training split, where there is one."""
        training = {key: photo for key, photo in self.photos.items() if photo.split == "train"}
        return training if name.seed is not None and training else self.photos

    def adds(self, name: SetName) -> Kept:
        """What it files in a set: all that is missing, or what comes before the photograph at which it stops."""
        if not self.files_photos or name not in self.names:
            return NOTHING
        keys = list(self.photos)
        reached = keys if self.stops_at is None else keys[: keys.index(self.stops_at)]
        wanted = self.wanted(name)
        tried = contents_in({key: wanted[key] for key in reached if key in wanted}) - self.stored[name].rows
        failed = frozenset(content for content in tried if content >= NUM_SOUND)
        return Kept(tried - failed, failed - self.stored[name].failed)

    def reused(self, name: SetName) -> int:
        """Photographs that had their rows."""
        return sum(photo.content in self.stored[name].rows for photo in self.wanted(name).values())


def contents_in(photos: Photos) -> frozenset[int]:
    return frozenset(photo.content for photo in photos.values() if photo.content is not None)


def rows_of(name: SetName, photos: Photos) -> Tensor:
    """What the store must give for sound photographs: ``(N, *F)``."""
    return values()[name][[photo.content for photo in photos.values() if photo.content is not None]]


def targets_of(chosen: Photos, photos: Photos) -> list[int] | None:
    """Of some of the photographs."""
    classes = classes_of(photos)
    targets = [classes.index(photo.label) if photo.label else -1 for photo in chosen.values()]
    return None if not classes or set(targets) == {-1} else targets


def classes_of(photos: Photos) -> list[str]:
    return sorted({photo.label for photo in photos.values()} - {""})


# ---- the disk


class PhotoFolder:
    """Image files, and a table of them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._lines: list[str] = []
        self._images: ImageSet | None = None

    def put(self, name: str, content: int | None, *, in_place: bool = False) -> None:
        """Makes the file `name` hold some content, or deletes it.

        In place it keeps inode and time of change, and its size where both contents are sound images. What always
        changes is the time of the inode's change: the system counts that in steps of up to 10 ms.
        """
        path = self.root / name
        before = path.stat() if path.exists() else None
        if not in_place:
            path.unlink(missing_ok=True)
        if content is None:
            return
        path.write_bytes(contents()[content])
        while before is not None and in_place:
            os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
            if path.stat().st_ctime_ns > before.st_ctime_ns:
                break

    def images(self, photos: Photos) -> ImageSet:
        """The photographs as a program sees them, which keeps its image set as long as only files change."""
        lines = ["path,label,split", *(f"{key},{photo.label},{photo.split}" for key, photo in photos.items())]
        if self._images is None or self._lines != lines:
            table = self.root / "photos.csv"
            table.write_text("\n".join(lines))
            self._lines = lines
            self._images = ImageSet.from_csv(table, split_column="").with_splits(
                [photo.split for photo in photos.values()]
            )
        return self._images


class StoppedError(BaseException):
    """The process was killed or interrupted."""


class Fault(NamedTuple):
    """What happens after `num_done` operations on the disk.

    Who was killed does nothing any more; who was interrupted clears up, and so does who had an error.
    """

    kind: Literal["kill", "interrupt", "error"]
    num_done: int


class Operations:
    """The operations by which the store changes the disk, of which one may fail.

    Nothing is synced: it is processes that stop here, not the machine.
    """

    def __init__(self, patched: pytest.MonkeyPatch) -> None:
        self._fault: Fault | None = None
        self._num_done = 0
        self.has_failed = False
        watch(patched, self._counted)

    @contextmanager
    def failing(self, fault: Fault | None) -> Iterator[None]:
        """The block's operations fail as `fault` says; whether it came to that, `has_failed` tells."""
        self._fault, self._num_done, self.has_failed = fault, 0, False
        try:
            yield
        finally:
            self._fault = None

    def _counted(self, name: str, operation: Callable[..., Any], *args: Any) -> Any:
        if self._fault is not None and self._fault.kind == "kill" and self.has_failed:
            raise StoppedError
        if self._fault is not None and not self.has_failed and self._num_done == self._fault.num_done:
            self.has_failed = True
            if self._fault.kind == "error":
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            raise StoppedError
        self._num_done += 1
        return None if name in ("sync", "sync_folder") else operation(*args)


def kept_in(parts: Iterable[Part]) -> Kept:
    """What some parts say that they hold."""
    kept = NOTHING
    for part in parts:
        rows = frozenset(content_of()[bytes(digest)] for digest in part.digests)
        kept |= Kept(rows, frozenset(content_of()[bytes.fromhex(digest)] for digest in part.facts["failed"]))
    return kept


def kept_on_disk(root: Path) -> Sets:
    """What readers must find, by `docs/format.md` alone: what sound parts hold that no sound part supersedes.

    Raises:
        AssertionError: for a wrong row in any of them.
    """
    sound = [part for path in part_paths(root) if (part := sound_part(path, path.stat().st_mtime_ns)) is not None]
    superseded = {name for part in sound for name in part.facts["supersedes"]}
    current = [part for part in sound if part.path.name not in superseded]
    return {name: kept_in(part for part in current if part.facts["key"] == spec.key) for name, spec in specs().items()}


@lru_cache(1000)
def sound_part(path: Path, _: int) -> Part | None:
    """The part at `path`, or None if it is damaged; looked at once for each time at which it was written."""
    try:
        part = Part.open(path)
    except DamagedFileError:
        return None
    if part.verify():
        return None
    contents_of_rows = [content_of()[bytes(digest)] for digest in part.digests]
    assert torch.equal(part.features, values()[name_of()[part.facts["key"]]][contents_of_rows])
    return part


def part_paths(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("part-*.h5") if not is_hidden(path.parent, root))


def is_hidden(path: Path, root: Path) -> bool:
    return any(name.startswith(".") for name in path.relative_to(root).parts)


# ---- what is done

places = st.integers(0, 19)
"""Which of several things, however many there are."""
anything = st.integers(0, NUM_SOUND + 1)
"""A place in `contents()`."""
faults = st.none() | st.builds(Fault, st.sampled_from(["kill", "interrupt", "error"]), st.integers(0, 30))
some_seeds = st.sampled_from([(), (0,), (1,), (0, 1)])
photographs = st.builds(Photo, anything, st.sampled_from(LABELS), st.sampled_from(SPLITS))


EditKind = Literal["add", "change", "change in place", "lose", "rename", "delete", "relabel", "move to the end"]


class Edit(NamedTuple):
    """What is done to one of the photographs, with the facts of another."""

    kind: EditKind
    which: int
    photo: Photo


class Held(NamedTuple):
    """Features that somebody holds, and whose they are."""

    features: Features
    name: SetName
    photos: Photos


class StoreMachine(RuleBasedStateMachine):
    """What is done to a store and to the model of it."""

    @initialize(
        seed=st.integers(0, 9),
        access=st.sampled_from(["auto", "memory", "map", "stream"]),
        photos=st.lists(photographs, min_size=3, max_size=6),
        seeds=st.none() | some_seeds,
    )
    def begin(self, seed: int, access: Access, photos: list[Photo], seeds: Sequence[int] | None) -> None:
        self.patched = pytest.MonkeyPatch()
        draws = random.Random(seed)  # names of parts decide which of two equal rows is read
        self.patched.setattr(secrets, "token_hex", lambda num_bytes: draws.randbytes(num_bytes).hex())
        self.patched.setattr(secrets, "randbelow", draws.randrange)
        # Each file passes for older than two seconds when it is hashed, so that digests are trusted afterwards.
        now = time.time_ns
        self.patched.setattr(time, "time_ns", lambda: now() + 10**10)
        self.patched.setattr(job_module, "COMMIT_BYTES", 1)  # each batch makes a part
        self.patched.setattr(store_module, "write_part", self._recorded(write_part))

        self.folder = TemporaryDirectory()
        self.photo_folder = PhotoFolder(Path(self.folder.name))
        self.root = Path(self.folder.name) / "features"
        self.old = FeatureStore(self.root, access=access)
        self.operations = Operations(self.patched)
        self.written: list[tuple[SetName, int]] = []  # rows that the last job has published
        self.was_damaged = False
        self.num_steps = 0
        # What others have looked up, and use later.
        self.held: list[Held] = []
        self.seen: FeatureSet | None = None

        self.model = Model()
        for name, photo in zip(NAMES, photos, strict=False):
            self._put(name, photo)
        if seeds is not None:
            self.extract_into_small_parts(seeds=seeds, fault=None, is_new=True)

    def teardown(self) -> None:
        self.patched.undo()
        self.folder.cleanup()

    # ---- photographs

    @rule(
        edits=st.lists(
            st.builds(Edit, st.sampled_from(get_args(EditKind)), places, photographs), min_size=1, max_size=4
        )
    )
    def edit(self, edits: list[Edit]) -> None:
        for each in edits:
            photos = self.model.photos
            name, photo = list(photos.items())[each.which % len(photos)]
            free = [other for other in NAMES if other not in photos]
            match each.kind:
                case "add" if len(free) > 1:
                    self._put(free[0], each.photo)
                case "change" | "change in place":
                    changed = photo._replace(content=each.photo.content)
                    self._put(name, changed, in_place=each.kind == "change in place")
                case "lose":
                    self._put(name, photo._replace(content=None))
                case "rename":
                    self._take_away(name)
                    self._put(free[-1], photo)
                case "delete" if len(photos) > 1:
                    self._take_away(name)
                case "relabel":
                    photos[name] = each.photo._replace(content=photo.content)
                case "move to the end":
                    photos[name] = photos.pop(name)

    # ---- extraction

    @rule(
        cuts=st.sampled_from([("layer1",), ("layer2",), CUTS]),
        seeds=some_seeds,
        is_skipping=st.booleans(),
        fault=faults,
        is_new=st.booleans(),
    )
    def extract(
        self, cuts: Sequence[str], seeds: Sequence[int], is_skipping: bool, fault: Fault | None, is_new: bool
    ) -> None:
        """As it comes: a job merges at its end what it has written."""
        store = self._store(is_new)
        self._run(store, *self._planned(store, cuts, seeds, is_skipping), fault)

    @rule(seeds=some_seeds, fault=faults, is_new=st.booleans())
    def extract_into_small_parts(self, seeds: Sequence[int], fault: Fault | None, is_new: bool) -> None:
        store = self._store(is_new)
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(filed_module, "MERGE_BYTES", 0)
            self._run(store, *self._planned(store, CUTS, seeds, True), fault)

    @rule(
        seeds=some_seeds,
        is_skipping=st.booleans(),
        meanwhile=st.sampled_from(["nothing", "compact", "gc", "remove"]),
        fault=faults,
        is_new=st.booleans(),
    )
    def extract_by_two_jobs_at_once(
        self, seeds: Sequence[int], is_skipping: bool, meanwhile: str, fault: Fault | None, is_new: bool
    ) -> None:
        """Both find the same rows missing, and file them; the second one when something else has been done, too."""
        first, second = (self._planned(self._store(is_new), CUTS, seeds, is_skipping) for is_new in (True, False))
        self._run(self._store(True), *first, None)
        match meanwhile:
            case "compact" if self.root.exists():  # not where the first job found nothing that it could file
                self.old.compact()
            case "gc" if self.root.exists():
                self.old.gc(older_than=0)
            case "remove" if self.model.existing():
                self.remove(which=0, fault=None, is_new=True)
        self._run(self._store(is_new), *second, fault)

    # ---- upkeep

    @precondition(lambda self: self.root.exists())
    @rule(which=st.none() | places, fault=faults, is_new=st.booleans())
    def compact(self, which: int | None, fault: Fault | None, is_new: bool) -> None:
        store, names = self._store(is_new), self.model.existing()
        if which is not None and names:
            names = [names[which % len(names)]]
        key = specs()[names[0]].key if len(names) == 1 else None
        report = self._attempted(lambda: store.compact(key), fault)
        self._settle()
        if report is not None:
            assert not report.left
            assert [len(FeatureStore(self.root).set(specs()[name].key).parts) for name in names] == [1] * len(names)

    @precondition(lambda self: self.seen is not None or self.model.existing())
    @rule(which=places, fault=faults)
    def look_now_and_compact_later(self, which: int, fault: Fault | None) -> None:
        """Two compactions at once: one works on what the other has replaced."""
        if self.seen is None:
            self.seen = self.old.set(specs()[self._existing(which)].key)
        else:
            seen, self.seen = self.seen, None
            self._attempted(lambda: compaction.compact(seen), fault)
            self._settle()

    @precondition(lambda self: self.root.exists())
    @rule(fault=faults, is_new=st.booleans())
    def gc(self, fault: Fault | None, is_new: bool) -> None:
        store = self._store(is_new)
        foreseen = store.gc(older_than=0, dry_run=True)
        report = self._attempted(lambda: store.gc(older_than=0), fault)
        self._settle()
        if report is not None:
            assert set(report.paths) == set(foreseen.paths)
            self._check_nothing_unread({each.reason.partition(" was replaced")[0] for each in report.left})

    @precondition(lambda self: self.model.existing())
    @rule(which=places, fault=faults, is_new=st.booleans())
    def remove(self, which: int, fault: Fault | None, is_new: bool) -> None:
        name, store, sets = self._existing(which), self._store(is_new), self.model.sets
        found = store.set(specs()[name].key)
        num_parts = sum(len(part_paths(folder)) for folder in found.folders)
        report = self._attempted(lambda: store.remove(found.key), fault)
        if report is not None:
            assert (report.rows, report.parts) == (len(sets[name].rows), num_parts)
        at_most = sets[name] if report is None else NOTHING
        self._settle(at_least={**sets, name: NOTHING}, at_most={**sets, name: at_most})
        assert self.model.sets[name] in (NOTHING, sets[name]) or len(found.folders) > 1
        self.model.ever[name] = self.model.sets[name]

    @precondition(lambda self: self.model.existing())
    @rule(which=places, is_copied_alone=st.booleans())
    def rename_folder(self, which: int, is_copied_alone: bool) -> None:
        """A person calls a set's folder something else; what is extracted next goes to a folder of its own."""
        folder = FeatureStore(self.root).set(specs()[self._existing(which)].key).folder
        above = self.root if is_copied_alone else folder.parent
        folder.rename(next(path for number in count() if not (path := above / f"mine{number}").exists()))

    # ---- damage

    @precondition(lambda self: self.root.exists())
    @rule(is_new=st.booleans())
    def verify(self, is_new: bool) -> None:
        """A repair of what is sound changes nothing."""
        report = self._store(is_new).verify(repair=True)
        assert (report.damaged, report.parts + report.tables) == ((), len(self._files()))

    @precondition(lambda self: self._files())
    @rule(
        before=st.sampled_from(["nothing", "compact"]),
        which=places,
        place=st.integers(0, 999) | st.just(999),
        bit=st.integers(0, 7),
        meanwhile=st.lists(st.sampled_from(["compact", "gc"]), max_size=2),
        fault=faults,
        is_new=st.booleans(),
    )
    def flip_a_bit_and_repair(
        self, before: str, which: int, place: int, bit: int, meanwhile: list[str], fault: Fault | None, is_new: bool
    ) -> None:
        """Of a part or an image table: what only that file holds is lost, and not more, whatever is done meanwhile.

        Where `place` is 999 it is the last byte of a part's features.
        """
        files, store = self._files(), self._store(is_new)
        if before == "compact" and self.model.existing():  # a merged part, beside which lie those that it replaced
            self.compact(which=None, fault=None, is_new=is_new)
            files = [part.path for found in store.sets() for part in found.parts]
        path = files[which % len(files)]
        held = self._held_by(path)
        flip(path, place, bit)
        self.held = []  # who has mapped the file reads what is there now
        self.was_damaged = True
        self._settle(
            at_least={name: kept - held[name] for name, kept in self.model.sets.items()}, at_most=self.model.ever
        )
        for work in ["nothing", *meanwhile]:
            if work == "compact":
                self._attempted(store.compact, fault)
            elif work == "gc":
                self._attempted(lambda: store.gc(older_than=0), fault)
            # Who has opened the file while it was sound may save what lies outside the damage.
            self._settle(at_most={name: kept | held[name] for name, kept in self.model.sets.items()})
            self._check_refusals()
        assert [each.path for each in store.verify().damaged] == [path] * path.exists()
        self._attempted(lambda: store.verify(repair=True), fault)
        report = store.verify(repair=True)
        assert not path.exists()
        assert all(each.set_aside is not None and each.set_aside.exists() for each in report.damaged)
        self.model.tables.pop(path.stem, None)
        self._settle()

    # ---- readers

    @precondition(lambda self: self.model.existing())
    @rule(which=places, is_new=st.booleans())
    def hold(self, which: int, is_new: bool) -> None:
        name, photos = self._existing(which), self.model.photos
        found = {key: photo for key, photo in photos.items() if key not in self.model.lacking(name)}
        images = self._images().select([key in found for key in photos])
        features = self._store(is_new).features(images, specs()[name].key)
        self.held = [*self.held[-1:], Held(features, name, found)]

    @invariant()
    def who_holds_features_reads_on_whatever_has_become_of_the_files(self) -> None:
        for held in self.held:
            try:
                check_rows(held.features, rows_of(held.name, held.photos))
                assert torch.equal(held.features.tensor(), rows_of(held.name, held.photos))
            except FeatureStoreError:
                assert not contents_in(held.photos) <= self.model.sets[held.name].rows

    @invariant()
    def who_looks_anew_finds_what_the_model_says(self) -> None:
        """In turns: who has looked before, and who has just come."""
        self.num_steps += 1
        store = self._store(is_new=self.num_steps % 2 == 0)
        if not self.root.exists():
            assert not self.model.existing()
            return
        check_sets(store, self.model)
        check_image_set(store, self.model)
        self._check_plan(store)
        for name in SET_NAMES:
            self._check_features(store, name)

    def _check_plan(self, store: FeatureStore) -> None:
        planned, job = self._planned(store, CUTS, (0, 1), is_skipping=True)
        lacking = {name: self.model.lacking(name) & job.wanted(name).keys() for name in job.names}
        tried = {name: lacking[name] & self.model.failed(name) for name in job.names}
        failed = set().union(*tried.values())
        for on_error in ("raise", "skip"):
            left = {name: lacking[name] - tried[name] if on_error == "skip" else lacking[name] for name in job.names}
            missing = set().union(*left.values())
            assert planned.status(on_error=on_error) == {
                "images": len(job.photos),
                "stored": len(job.photos.keys() - set().union(*lacking.values())),
                "missing": len(missing),
                "changed": len(missing & self.model.changed()),
                "failed": len(failed - missing if on_error == "skip" else failed),
                "bytes": sum(len(keys) * values()[name][0].nbytes for name, keys in left.items()),
            }

    def _check_features(self, store: FeatureStore, name: SetName) -> None:
        """By key from one store, and from the other as programs ask."""
        spec, photos, images = specs()[name], self.model.photos, self._images()
        request = FeatureRequest(trunk=spec.trunk, pool=spec.pool, view=spec.rendered)
        ask = partial(store.features, which=spec.key[:8] if store is self.old else request)
        if self.model.sets[name] == NOTHING:
            with pytest.raises(FeatureStoreError):
                ask(images)
            return
        lacking = self.model.lacking(name)
        failed = self.model.failed(name) | {key for key, photo in photos.items() if photo.content is None}
        if lacking:
            words = "failed when they were extracted" if lacking <= self.model.failed(name) else "are missing"
            with pytest.raises(MissingFeaturesError, match=f"; {len(lacking)} {words} "):
                ask(images)
        if lacking <= failed:
            features = ask(images, on_error="skip")
        else:
            with pytest.raises(MissingFeaturesError, match=f"; {len(lacking - failed)} are missing "):
                ask(images, on_error="skip")
            features = ask(images.select([key not in lacking for key in photos]))
        with_row = {key: photo for key, photo in photos.items() if key not in lacking}
        assert features.ids == tuple(with_row)
        assert as_list(features.targets) == targets_of(with_row, photos)
        check_rows(features, rows_of(name, with_row))

    def _check_refusals(self) -> None:
        """Where a file is damaged, readers get an error or the right values."""
        for store in (self.old, FeatureStore(self.root)):
            for name, spec in specs().items():
                with suppress(FeatureStoreError):
                    features = store.features(self._images(), spec.key)
                    assert torch.equal(features.tensor(), rows_of(name, self.model.photos))

    def _check_nothing_unread(self, left: set[str]) -> None:
        """After a collection: each file is one that somebody reads, or `left` because it may be the only copy."""
        read = {str(part.path) for found in FeatureStore(self.root).sets() for part in found.parts}
        read |= {str(self.root / "images" / f"{name}.h5") for name in self.model.tables}
        read |= {str(path) for path in self.root.glob("failures/*.jsonl")}  # by people
        assert {str(path) for path in self.root.rglob("*") if path.is_file()} == read | left
        assert not left or self.was_damaged

    # ---- how it is done

    def _store(self, is_new: bool) -> FeatureStore:
        return FeatureStore(self.root) if is_new else self.old

    def _images(self) -> ImageSet:
        return self.photo_folder.images(self.model.photos)

    def _put(self, name: str, photo: Photo, *, in_place: bool = False) -> None:
        self.photo_folder.put(name, photo.content, in_place=in_place)
        self.model.photos[name] = photo

    def _take_away(self, name: str) -> None:
        self.photo_folder.put(name, None)
        del self.model.photos[name]

    def _existing(self, which: int) -> SetName:
        existing = self.model.existing()
        return existing[which % len(existing)]

    def _files(self) -> list[Path]:
        """Of the store, in an order that is the same each time."""
        tables = [self.root / "images" / f"{name}.h5" for name in self.model.tables]
        return [*part_paths(self.root), *tables]

    def _planned(
        self, store: FeatureStore, cuts: Sequence[str], seeds: Sequence[int], is_skipping: bool
    ) -> tuple[Plan, Job]:
        names = [SetName(cut, seed) for cut in cuts for seed in (None, *seeds)]
        job = Job(dict(self.model.photos), names, dict(self.model.sets), is_skipping)
        return planned_for(self._images(), store, cuts, seeds), job

    def _run(self, store: FeatureStore, planned: Plan, job: Job, fault: Fault | None) -> None:
        def work() -> ExtractReport | ImageError:
            on_error: OnError = "skip" if job.is_skipping else "raise"
            try:
                return run_plan(planned, store, on_error=on_error, device="cpu", batch_size=BATCH_SIZE, workers=0)
            except ImageError as error:
                return error

        self.written = []
        before, unlike = self.model.sets, self.model.unlike_tables(job.photos)
        after = {name: kept | job.adds(name) for name, kept in before.items()}
        report = self._attempted(work, fault)
        self.model.ever = {name: kept | after[name] for name, kept in self.model.ever.items()}
        self._note_photos(job, is_done=report is not None)
        if report is None:
            safe = {name: Kept(frozenset(row for each, row in self.written if each == name)) for name in SET_NAMES}
            self._settle(at_least={name: kept | safe[name] for name, kept in before.items()}, at_most=after)
            return
        self._settle(at_least=after, at_most=after)
        assert Counter(self.written) == Counter((name, row) for name in SET_NAMES for row in job.adds(name).rows)
        if isinstance(report, ImageError):
            assert report.image == job.stops_at
        else:
            assert job.stops_at is None
            notes = [note for note in report.notes if not note.startswith("What was left out, and why, is in ")]
            of_others = [note for note in notes if "of other images" in note]
            assert len(of_others) == len(unlike)
            assert all(any(repr(table) in note for note in of_others) for table in unlike)
            assert (len(notes) > len(of_others)) == self.operations.has_failed
            self._check_report(report, job)

    def _check_report(self, report: ExtractReport, job: Job) -> None:
        absent = {key for key, photo in job.photos.items() if photo.content is None}
        damaged = {key for key, photo in job.photos.items() if photo.is_damaged}
        assert report.keys == tuple(specs()[name].key for name in job.names)
        assert report.computed == sum(len(job.adds(name).rows) for name in job.names)
        assert report.reused == sum(job.reused(name) for name in job.names)
        assert (report.failed, report.missing) == (len(damaged), len(absent))
        assert {key for key, _ in report.failures} == damaged | absent
        for name, each in zip(job.names, report.sets, strict=True):
            wanted = job.wanted(name).keys()
            assert (each["computed"], each["reused"]) == (len(job.adds(name).rows), job.reused(name))
            assert (each["rows"], each["failed"]) == (len(wanted - damaged - absent), len(wanted & damaged))

    def _note_photos(self, job: Job, *, is_done: bool) -> None:
        """Takes up the image table that a job has filed, if it has."""
        newest = self.model.newest_tables()
        new = {path.stem for path in (self.root / "images").glob("[!.]*.h5")} - self.model.tables.keys()
        if new:
            (name,) = new
            assert job.files_photos
            self.model.tables[name] = FiledPhotos(job.photos, newest)
        elif is_done and job.files_photos:
            assert [list(self.model.tables[name].photos.items()) for name in newest] == [list(job.photos.items())]

    def _attempted(self, work: Callable[[], T], fault: Fault | None) -> T | None:
        """What `work` returns, or None if `fault` ended it."""
        with self.operations.failing(fault):
            try:
                return work()
            except (StoppedError, OSError):
                if not self.operations.has_failed:
                    raise
                return None

    def _settle(self, *, at_least: Sets | None = None, at_most: Sets | None = None) -> None:
        """Takes up what is on the disk, if that is between two bounds: without them, as it was before."""
        found = kept_on_disk(self.root)
        least, most = at_least or self.model.sets, at_most or self.model.sets
        for name, kept in found.items():
            assert least[name] <= kept, f"{name}: lost {least[name] - kept}"
            assert kept <= most[name], f"{name}: {kept - most[name]} too much"
        self.model.sets = found

    def _held_by(self, path: Path) -> Sets:
        """What a file of the store holds of each set."""
        held = dict.fromkeys(SET_NAMES, NOTHING)
        if path.parent.name != "images":
            part = Part.open(path)
            held[name_of()[part.facts["key"]]] = kept_in([part])
        return held

    def _recorded(self, write: Callable[..., None]) -> Callable[..., None]:
        def written(path: Path, **content: Any) -> None:
            write(path, **content)
            name = name_of()[content["facts"]["key"]]
            self.written += [(name, content_of()[bytes(digest)]) for digest in content["digests"]]

        return written


def check_sets(store: FeatureStore, model: Model) -> None:
    assert store.damaged() == []
    found = {name_of()[each.key]: each for each in store.sets()}
    for name, kept in model.sets.items():
        assert name in found or kept == NOTHING
        if name in found:
            assert kept_in(found[name].parts) == kept
            assert found[name].index.num_images == len(kept.rows)
            assert len(found[name].failed) == len(kept.failed)
            assert store.num_superseded(found[name]) == len(model.superseded(name))


def check_image_set(store: FeatureStore, model: Model) -> None:
    newest = model.newest_tables()
    if len(newest) != 1:
        with pytest.raises(AmbiguousRequestError if newest else FeatureStoreError):
            ImageSet.from_store(store)
        return
    images, photos = ImageSet.from_store(store), model.tables[newest[0]].photos
    assert images.ids == tuple(photos)
    assert images.splits.tolist() == [photo.split for photo in photos.values()]
    assert images.classes == tuple(classes_of(photos))
    assert as_list(images.targets) == targets_of(photos, photos)
    digests = images.digests()
    assert {images.ids[place] for place in digests.failed} == {
        key for key, photo in photos.items() if photo.content is None
    }
    assert [content_of().get(bytes(digest)) for digest in digests.values] == [
        photo.content for photo in photos.values()
    ]


def flip(path: Path, place: int, bit: int) -> None:
    """Flips a bit of the byte that lies after `place` thousandths of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) * place // 1000] ^= 1 << bit
    path.write_bytes(content)


def check_rows(features: Features, expected: Tensor) -> None:
    """From the last to the first, by someone to whom the features were passed on."""
    passed_on = pickle.loads(pickle.dumps(features))
    assert torch.equal(passed_on[list(reversed(range(len(features))))], expected.flip(0))


def as_list(targets: Any) -> list[int] | None:
    return None if targets is None else list(targets.tolist())


TestStore = StoreMachine.TestCase
TestStore.settings = settings(
    max_examples=EXAMPLES or 8,
    stateful_step_count=25,
    derandomize=EXAMPLES == 0,
    database=None,
    deadline=None,
    report_multiple_bugs=False,
    phases=[Phase.generate, Phase.shrink],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
