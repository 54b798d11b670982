"""Pages over a store: what they show is what the store holds, and what isn't there is no page."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.neighbors import NearestNeighbors
from support.extracting import run
from support.tiny import photos

from featstore import FeatureStore, ImageSet
from featstore.pages import store_pages
from featstore.pages.page import Drawing, Gallery, Page, Table
from featstore.pages.store_pages import StorePages

pytest.importorskip("plotly", reason="plotly isn't installed")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> ImageSet:
    return ImageSet.from_folder(photos(tmp_path_factory.mktemp("pages") / "photos", 12)).split(0.3)


@pytest.fixture(scope="module")
def store(images: ImageSet, tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    store = FeatureStore(tmp_path_factory.mktemp("store") / "feats")
    run(images, store)
    return store


@pytest.fixture
def pages(store: FeatureStore, images: ImageSet) -> StorePages:
    return StorePages(store, images, root="/secret")


def of(page: Page, kind: type) -> list[Any]:
    return [block for section in page.sections for block in section.blocks if isinstance(block, kind)]


def test_the_first_page_lists_sets_and_images(pages: StorePages, store: FeatureStore, images: ImageSet) -> None:
    sets, sources = of(pages.overview(), Table)
    (found,) = store.sets()
    assert [row[0].text for row in sets.rows] == [found.key[:8]]
    assert dict(zip(sets.columns, sets.rows[0], strict=True))["rows"] == 12
    assert [(row[0].text, row[1]) for row in sources.rows] == [(images.name, 12)]


def test_images_of_a_class_and_split_are_those_of_the_set(pages: StorePages, images: ImageSet) -> None:
    (gallery,) = of(pages.images(0), Gallery)
    assert [place for place, _ in gallery.pictures] == list(range(12))
    (gallery,) = of(pages.images(0, split="valid", label=1), Gallery)
    expected = np.flatnonzero((images.splits == "valid") & (images.targets == 1))
    assert [place for place, _ in gallery.pictures] == expected.tolist()
    assert all(words == f"{images.classes[1]} · valid" for _, words in gallery.pictures)


def test_images_come_a_page_at_a_time(pages: StorePages, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_pages, "A_PAGE", 5)
    shown = [place for page in range(3) for place, _ in of(pages.images(0, page=page), Gallery)[0].pictures]
    assert shown == list(range(12))
    with pytest.raises(LookupError):
        pages.images(0, page=3)


def test_labels_are_counted_by_split(pages: StorePages, images: ImageSet) -> None:
    (table,) = of(pages.images(0), Table)
    assert list(table.columns) == ["class", "train", "valid"]
    for place, (name, *counts) in enumerate(table.rows):
        assert name == images.classes[place]
        assert counts == [
            int(((images.targets == place) & (images.splits == split)).sum()) for split in table.columns[1:]
        ]


def test_neighbours_are_those_of_scikit_learn_among_all_rows(
    pages: StorePages, store: FeatureStore, images: ImageSet
) -> None:
    (found,) = store.sets()
    rows = store.features(images, found).numpy().reshape(12, -1)
    _, expected = NearestNeighbors(n_neighbors=12, metric="cosine").fit(rows).kneighbors(rows[[4]])
    near = pages.near(found.key, 0, 4)
    assert [place for place, _ in near["near"]] == expected[0, 1:].tolist()
    assert near["names"] == {str(place): images.ids[place] for place in expected[0, 1:]}


def test_a_map_is_of_the_images_that_have_a_row(store: FeatureStore, images: ImageSet, tmp_path: Path) -> None:
    more = ImageSet.from_folder(photos(tmp_path / "photos", 16))
    pages = StorePages(store, more)
    (found,) = store.sets()
    has_row = ~store.missing(found, more.digests())
    assert 0 < has_row.sum() < len(more)
    (drawn,) = of(pages.set(found.key, 0), Drawing)
    shown = sorted(place for trace in drawn.figure.data for place in trace.customdata)
    assert shown == np.flatnonzero(has_row).tolist()
    missing = int(np.flatnonzero(~has_row)[0])
    with pytest.raises(LookupError):
        pages.near(found.key, 0, missing)


def test_a_page_shows_the_store_as_it_is_when_it_is_asked_for(images: ImageSet, tmp_path: Path) -> None:
    store = FeatureStore(tmp_path / "feats")
    run(images.select(range(6)), store)
    pages = StorePages(FeatureStore(tmp_path / "feats"))
    (row,) = of(pages.overview(), Table)[0].rows
    (first,) = store.sets()
    before = of(pages.set(first.key, 0), Drawing)
    run(images, store, cuts=["layer1", "layer2"])  # more rows, another set, another image table
    sets, sources = of(pages.overview(), Table)
    rows = {each[0].text: dict(zip(sets.columns, each, strict=True))["rows"] for each in sets.rows}
    assert rows == {each.key[:8]: 12 for each in store.sets()}
    assert len(rows) == 2 > len([row])
    # Open pages ask for images by the numbers that they have.
    numbers = [int(each[0].address.rsplit("/", 1)[1]) for each in sources.rows]
    whole = next(number for number, each in zip(numbers, sources.rows, strict=True) if each[1] == 12)
    assert whole > 0
    assert pages.thumbnail(0, 3).media_type == pages.thumbnail(whole, 11).media_type
    points = [
        len(trace.customdata) for drawn in of(pages.set(first.key, whole), Drawing) for trace in drawn.figure.data
    ]
    assert sum(points) == 12 > sum(len(trace.customdata) for drawn in before for trace in drawn.figure.data)
    seen = pages._seen
    pages.overview()
    assert pages._seen is seen  # nothing is read again where nothing came
    shutil.rmtree(tmp_path / "feats")
    with pytest.raises(LookupError, match="the store is gone"):
        pages.overview()


def test_without_files_names_stand_for_images(store: FeatureStore, images: ImageSet) -> None:
    pages = StorePages(store)
    assert [each.name for each in pages.image_sets] == [images.name]
    assert pages.thumbnail(0, 3).media_type == "image/svg+xml"
    assert of(pages.set(store.sets()[0].key, 0), Drawing)


def test_what_is_not_there_is_no_page(pages: StorePages, store: FeatureStore) -> None:
    key = store.sets()[0].key
    for asked in (
        lambda: pages.images(1), lambda: pages.images(-1), lambda: pages.images(0, split="none"),
        lambda: pages.images(0, label=9), lambda: pages.images(0, label=-1), lambda: pages.images(0, page=-1),
        lambda: pages.set("../../etc", 0), lambda: pages.set(key[:8], 0), lambda: pages.set(key, 1),
        lambda: pages.thumbnail(0, 12), lambda: pages.thumbnail(0, -1), lambda: pages.thumbnail(1, 0),
        lambda: pages.near(key, 0, 12), lambda: pages.near(key, 0, -1), lambda: pages.near("", 0, 0),
    ):  # fmt: skip
        with pytest.raises(LookupError):
            asked()


def test_thumbnails_are_kept_up_to_a_number_of_bytes(pages: StorePages, monkeypatch: pytest.MonkeyPatch) -> None:
    first = pages.thumbnail(0, 0)
    assert pages.thumbnail(0, 0) is first
    monkeypatch.setattr(pages._thumbnails, "_most", len(first.data) + 10)
    pages.thumbnail(0, 1)
    assert pages.thumbnail(0, 0) is not first
