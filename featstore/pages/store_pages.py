"""Pages over a store: its sets, its images and their labels, a map of each set, and the neighbours of an image."""

from __future__ import annotations

import math
import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlencode

import numpy as np
from numpy.typing import NDArray

from featstore.digest import Json
from featstore.images.image_set import ImageSet
from featstore.images.labels import label_counts
from featstore.images.names import SPLITS
from featstore.pages.captions import groups_of, label_of
from featstore.pages.figures import bars, point_map
from featstore.pages.neighbours import nearest
from featstore.pages.page import Block, Drawing, Gallery, Link, Links, Page, Pictures, Section, Table
from featstore.pages.projection import projected
from featstore.pages.thumbnails import Thumbnail, thumbnail
from featstore.store.features import Features
from featstore.store.image_tables import ImageTables
from featstore.store.sets import FeatureSet
from featstore.store.store import FeatureStore
from featstore.words import counted, size_text

A_PAGE = 120
"""Images."""
MOST_POINTS = 5_000
NUM_NEAR = 12
MOST_CLASSES = 60
"""That are links above a gallery."""
_SAMPLE_BYTES = 1 << 28
_BATCH_BYTES = 1 << 26
_THUMBNAIL_BYTES = 1 << 26
_SIDE = 128

T = TypeVar("T")


class StorePages:
    """What `featstore view` shows. It reads a store and images, and writes nothing; several threads may ask at once.

    Feature sets are asked for by their whole keys, image sets and images by their numbers: what isn't there is a
    LookupError, and no text that was asked for comes near a file system. A page shows the store as it is when it is
    asked for; image sets keep their numbers, as pages that are open ask for images by them.

    Args:
        store: whose sets and image tables.
        images: image files to show, in the place of the store's table of their name; else names stand for images.
        root: what all addresses of these pages begin with.
    """

    def __init__(self, store: FeatureStore, images: ImageSet | None = None, *, root: str = "") -> None:
        self.store, self.root = store, root
        self.sets: dict[str, FeatureSet] = {}
        self.image_sets: list[ImageSet] = [] if images is None else [images]
        self._own = None if images is None else images.name
        self._numbers: dict[str, int] = {}  # table -> that of its image set
        self._shown: list[int] = []  # of these, what the store has now
        self._seen: list[tuple[str, int, list[str]]] | None = None
        self._thumbnails = _Kept(_THUMBNAIL_BYTES)
        self._rows: dict[tuple[str, int], _Rows] = {}
        self._lock = threading.Lock()
        self._look()

    # ---- pages

    def overview(self) -> Page:
        """All sets and image sets of the store."""
        self._look()
        sets = []
        for key, found in self.sets.items():
            facts = found.describe()
            names = ("backbone", "cut", "reduce", "view", "seed", "dtype", "rows", "failed")
            link = Link(text=key[:8], address=self._set_address(key, 0))
            sets.append((link, *(facts[name] for name in names), size_text(facts["bytes"])))
        columns = ("set", "backbone", "cut", "reduce", "view", "seed", "dtype", "rows", "failed", "size")
        images = [
            (
                Link(text=each.name, address=f"{self.root}/images/{number}"),
                len(each),
                len(each.classes) or None,
                each.task,
            )
            for number, each in self._images_now()
        ]
        return self._page(
            f"Store {self.store.root}",
            f"{counted(len(self.sets), 'feature set')}, {counted(len(images), 'image set')}.",
            [
                Section(title="Feature sets", blocks=[Table(columns=columns, rows=sets)]),
                Section(title="Images", blocks=[Table(columns=("images", "number", "classes", "task"), rows=images)]),
            ],
        )

    def images(self, number: int, *, split: str | None = None, label: int | None = None, page: int = 0) -> Page:
        """The images of a set, a page at a time, and how many each class has.

        Args:
            number: of the image set.
            split: only those of one.
            label: only those of the class of this number; of several labels, those that have it.
            page: from 0.
        """
        self._look()
        images = self._image_set(number)
        chosen = self._chosen(images, split, label)
        last = max(0, math.ceil(len(chosen) / A_PAGE) - 1)
        if not 0 <= page <= last:
            raise LookupError(f"page {page} of {last + 1}")
        places = chosen[page * A_PAGE : (page + 1) * A_PAGE].tolist()
        address = partial(self._images_address, number)
        blocks: list[Block] = [
            Links(links=[_link(name or "all splits", address(split=name, label=label), name == split)
                         for name in (None, *(each for each in SPLITS if (images.splits == each).any()))])
        ]  # fmt: skip
        if images.task != "regression" and 1 < len(images.classes) <= MOST_CLASSES:
            classes = [(None, "all classes"), *enumerate(images.classes)]
            blocks.append(
                Links(links=[_link(name, address(split=split, label=each), each == label) for each, name in classes])
            )
        blocks.append(Gallery(pictures=[(place, label_of(images, place)) for place in places]))
        if last:
            near = [each for each in (0, page - 1, page, page + 1, last) if 0 <= each <= last]
            blocks.append(
                Links(
                    links=[
                        _link(f"page {each + 1}", address(split=split, label=label, page=each), each == page)
                        for each in sorted({*near})
                    ]
                )
            )
        sets = [key for key in self.sets if len(self._rows_of(key, number).places)]
        maps = [_link(self._words(key), self._set_address(key, number), False) for key in sets]
        sections = [
            Section(title=f"{len(chosen):,} images", blocks=blocks),
            *_label_sections(images),
            Section(title="Maps", blocks=[Links(links=maps) if maps else "No set has features of these images."]),
        ]
        near_at = f"{self.root}/near/{sets[0]}/{number}" if sets else None
        about = images.describe() + "."
        if sets:
            about += f" Neighbours are by {self._words(sets[0])}."
        return self._page(f"Images {images.name}", about, sections, number, places, near_at)

    def set(self, key: str, number: int) -> Page:
        """A map of a feature set's rows for the images of a set, and its facts."""
        self._look()
        images, rows = self._image_set(number), self._rows_of(key, number)
        facts = self.sets[key].describe()
        table = Table(columns=("fact", "value"), rows=[(name, _in_words(value)) for name, value in facts.items()])
        others = [
            _link(each.name, self._set_address(key, place), place == number) for place, each in self._images_now()
        ]
        blocks: list[Block] = [Links(links=others)] if len(others) > 1 else []
        places: list[int] = []
        if not len(rows.places):
            blocks.append(f"The set has no features of the images of {images.name}.")
        else:
            chosen = _sample(len(rows.places), min(MOST_POINTS, _SAMPLE_BYTES // (4 * rows.width)))
            found = projected(rows.features[chosen].float().numpy())
            places = rows.places[chosen].tolist()
            some = f"A sample of {len(chosen):,} of" if len(chosen) < len(rows.places) else "All"
            blocks.append(
                f"{some} {counted(len(rows.places), 'image')} of {images.name} that have a row. {found.words} Hovering "
                f"shows an image, a click its neighbours among all {len(rows.places):,}."
            )
            shown = images.select(rows.places[chosen])
            blocks.append(Drawing(figure=point_map(found.points, rows.places[chosen], groups_of(shown)), is_map=True))
        sections = [Section(title="Map", blocks=blocks), Section(title="Facts", blocks=[table])]
        near_at = f"{self.root}/near/{key}/{number}"
        return self._page(f"Set {key[:8]}", f"{self._words(key)}.", sections, number, places, near_at)

    # ---- what the script of a page asks for

    def thumbnail(self, number: int, place: int) -> Thumbnail:
        """That of an image; those asked for last are kept, up to 64 MiB."""
        images = self._image_set(number)
        if not 0 <= place < len(images):
            raise LookupError(f"image {place} of {len(images)}")
        return self._thumbnails.of((number, place), partial(thumbnail, images, place, _SIDE))

    def near(self, key: str, number: int, place: int) -> dict[str, Json]:
        """The nearest neighbours of an image among all that have a row, as the page's script reads them."""
        images, rows = self._image_set(number), self._rows_of(key, number)
        row = int(np.searchsorted(rows.places, place))
        if row == len(rows.places) or rows.places[row] != place:
            raise LookupError(f"image {place} has no row")
        own = np.array([row])
        batch = max(1, min(8_192, _BATCH_BYTES // (4 * rows.width)))
        found, similarities = nearest(rows.features[own], rows.features.batches(batch), NUM_NEAR, left_out=own)
        pairs = [
            (int(rows.places[each]), float(similarity))
            for each, similarity in zip(found[0].tolist(), similarities[0].tolist(), strict=True)
            if each >= 0
        ]
        shown = Pictures(
            names={each: images.ids[each] for each, _ in pairs},
            labels={each: label_of(images, each) for each, _ in pairs},
            near={place: pairs},
        ).facts()
        return {"near": shown["near"][str(place)], "names": shown["names"], "labels": shown["labels"]}

    # ---- inside

    def _look(self) -> None:
        """Reads the store anew, if its folders hold other files than when it was read last.

        Raises:
            LookupError: if the store went away.
        """
        try:
            seen = _listing(
                self.store.folder
            )  # before the store is read: what comes meanwhile is seen by the next page
            with self._lock:
                if seen == self._seen:
                    return
                self.sets = {each.key: each for each in self.store.sets()}
                tables = ImageTables(self.store.folder).newest(lambda name: name != self._own)
                for table in tables:
                    if table.stem not in self._numbers:
                        self._numbers[table.stem] = len(self.image_sets)
                        self.image_sets.append(table.image_set(where=f"{self.store.root}, table {table.stem}"))
                self._shown = [*([] if self._own is None else [0]), *(self._numbers[each.stem] for each in tables)]
                self._rows.clear()
                self._seen = seen
        except FileNotFoundError as error:
            raise LookupError(f"the store is gone: {error}") from error

    def _images_now(self) -> list[tuple[int, ImageSet]]:
        return [(number, self.image_sets[number]) for number in self._shown]

    def _page(
        self,
        title: str,
        about: str,
        sections: list[Section],
        number: int = 0,
        places: list[int] | None = None,
        near_at: str | None = None,
    ) -> Page:
        if places is None:
            return Page(title=title, about=about, sections=sections)
        images = self.image_sets[number]
        pictures = Pictures(
            names={place: images.ids[place] for place in places},
            labels={place: label_of(images, place) for place in places},
            thumbnails_at=f"{self.root}/thumbnails/{number}",
            near_at=near_at,
            near_words="By the cosine of their features, among all images that have a row.",
        )
        home = Section(title="Store", blocks=[Links(links=[Link(text="All sets and images", address=f"{self.root}/")])])
        return Page(title=title, about=about, sections=[*sections, home], pictures=pictures)

    def _image_set(self, number: int) -> ImageSet:
        if not 0 <= number < len(self.image_sets):
            raise LookupError(f"image set {number} of {len(self.image_sets)}")
        return self.image_sets[number]

    def _chosen(self, images: ImageSet, split: str | None, label: int | None) -> NDArray[np.int64]:
        if split is not None and split not in SPLITS:
            raise LookupError("a split that there isn't")
        is_chosen = np.ones(len(images), bool) if split is None else images.splits == split
        if label is not None:
            if images.targets is None or images.task == "regression" or not 0 <= label < len(images.classes):
                raise LookupError(f"class {label}")
            has_label = images.targets == label if images.task == "single" else images.targets[:, label] > 0
            is_chosen = is_chosen & has_label
        return np.flatnonzero(is_chosen)

    def _rows_of(self, key: str, number: int) -> _Rows:
        if key not in self.sets:
            raise LookupError("a set that there isn't")
        images = self._image_set(number)
        with self._lock:
            if (key, number) not in self._rows:
                self._rows[key, number] = _Rows.of(self.store, self.sets[key], images)
            return self._rows[key, number]

    def _words(self, key: str) -> str:
        facts = self.sets[key].describe()
        seed = "" if facts["seed"] is None else f", seed {facts['seed']}"
        return f"{facts['backbone']}@{facts['cut']} {facts['reduce']}, {facts['view']} view{seed}, {facts['dtype']}"

    def _set_address(self, key: str, number: int) -> str:
        return f"{self.root}/sets/{key}/{number}"

    def _images_address(self, number: int, *, split: str | None, label: int | None, page: int = 0) -> str:
        given = {"split": split, "label": label, "page": page or None}
        asked = urlencode({name: value for name, value in given.items() if value is not None})
        return f"{self.root}/images/{number}{'?' if asked else ''}{asked}"


@dataclass(frozen=True, kw_only=True, eq=False)
class _Rows:
    """The rows of a feature set for an image set.

    Attributes:
        features: of the images that have a row.
        places: ``(N,)`` rising, the images' places in their set.
    """

    features: Features
    places: NDArray[np.int64]

    @classmethod
    def of(cls, store: FeatureStore, found: FeatureSet, images: ImageSet) -> _Rows:
        digests = images.digests(store.known_digests(images))
        has_row = ~store.missing(found, digests)
        return cls(features=store.features(images.select(has_row), found), places=np.flatnonzero(has_row))

    @property
    def width(self) -> int:
        return math.prod(self.features.shape[1:])


class _Kept:
    """Thumbnails that were made lately, up to a number of bytes."""

    def __init__(self, most_bytes: int) -> None:
        self._most, self._bytes, self._lock = most_bytes, 0, threading.Lock()
        self._made: OrderedDict[tuple[int, int], Thumbnail] = OrderedDict()

    def of(self, which: tuple[int, int], make: Callable[[], Thumbnail]) -> Thumbnail:
        with self._lock:
            if which in self._made:
                self._made.move_to_end(which)
                return self._made[which]
        made = make()
        if made.failure is not None:  # the file may come back
            return made
        with self._lock:
            if which not in self._made:
                self._made[which] = made
                self._bytes += len(made.data)
            while self._bytes > self._most:
                _, oldest = self._made.popitem(last=False)
                self._bytes -= len(oldest.data)
        return made


def _label_sections(images: ImageSet) -> list[Section]:
    counts = label_counts(images.targets, images.classes, images.task, images.splits)
    if not counts:
        return []
    columns = [*counts[0]]
    table = Table(columns=columns, rows=[[row[name] for name in columns] for row in counts])
    names = [str(row["class"]) for row in counts]
    figure = bars({name: [float(str(row[name])) for row in counts] for name in columns[1:]}, names, y="images")
    return [Section(title="Labels", blocks=[Drawing(figure=figure), table])]


def _link(text: str, address: str, is_here: bool) -> Link | str:
    return text if is_here else Link(text=text, address=address)


def _in_words(value: Json) -> str | int | float | None:
    return "x".join(map(str, value)) if isinstance(value, list) else value


def _listing(folder: Path) -> list[tuple[str, int, list[str]]]:
    """Each folder below one with its time and the names in it: files come and go whole, and none is written twice."""
    found, folders = [], [os.fspath(folder)]
    while folders:
        path = folders.pop()
        when = os.stat(path).st_mtime_ns
        with os.scandir(path) as entries:
            kept = sorted((each.name, each.is_dir(follow_symlinks=False)) for each in entries if each.name[0] != ".")
        found.append((path, when, [name for name, _ in kept]))
        folders += [os.path.join(path, name) for name, is_folder in kept if is_folder]
    return found


def _sample(count: int, most: int) -> NDArray[np.int64]:
    if count <= most:
        return np.arange(count)
    return np.sort(np.random.default_rng(0).choice(count, max(3, most), replace=False))
