"""What a notebook shows of our objects: tables whose every cell is text, whatever names files have."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
from support.tiny import pixels, staged

from featstore import FeatureStore, ImageSet, extract
from training import History, Learner

EVIL = "<script>alert('$x$')</script>&amp;"


class Shown(HTMLParser):
    """The texts of HTML, by tag; refuses tags that aren't closed and all that isn't of a table."""

    def __init__(self, value: Any) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: dict[str, list[str]] = {"pre": [], "th": [], "td": []}
        self.rows: list[list[str]] = []
        self.feed(value._repr_html_())
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert (tag in ("div", "pre", "table", "tr", "th", "td"), attrs) == (True, [])
        self.open.append(tag)
        if tag == "tr":
            self.rows.append([])

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts[self.open[-1]].append(data)
        if self.open[-1] in ("th", "td"):
            self.rows[-1].append(data)


def images() -> ImageSet:
    labels = [EVIL, "dog", "cat"] * 4
    splits = ["train"] * 9 + ["valid"] * 3
    return ImageSet.from_arrays(pixels(12), labels, splits=splits, name=EVIL)


def test_an_image_set_shows_how_many_images_of_each_class_each_split_has() -> None:
    assert Shown(images()).rows == [["class", "train", "valid"], [EVIL, "3", "1"], ["cat", "3", "1"], ["dog", "3", "1"]]
    assert Shown(images()).texts["pre"] == [repr(images())]
    many = np.array([[1, 0], [1, 1], [0, 1]])
    several = ImageSet.from_arrays(pixels(3), many, classes=("a", "b"), task="multi")
    assert Shown(several).rows == [["class", "not dealt"], ["a", "2"], ["b", "2"]]
    assert Shown(ImageSet.from_arrays(pixels(3), [0.5, 1.5, 2.5], task="regression")).rows == []
    assert Shown(ImageSet.from_arrays(pixels(3))).rows == []
    assert Shown(ImageSet.from_arrays(pixels(25), [str(row) for row in range(25)])).rows[-1] == ["... 5 more"]


def test_a_learner_its_inputs_its_history_and_its_store_are_shown(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path / "<b>")
    extract(staged(), images(), store, cuts=["layer2"], device="cpu", workers=0, dtype="float32")
    learn = Learner(staged(), images(), store, cut="layer2", head="linear", device="cpu", workers=0, quiet=True)
    assert (Shown(learn).texts["pre"], Shown(learn).rows) == ([repr(learn)], [])
    learn.fit(2, lr=1e-2)
    columns, *epochs = Shown(learn.history).rows
    assert columns == list(learn.history.frame())
    assert [row[0] for row in epochs] == ["1", "2"]
    assert epochs[1][1] == f"{learn.history.last['train_loss']:.4g}"
    assert Shown(learn).rows == [columns, *epochs]
    assert Shown(learn.inputs).texts["pre"] == [str(learn.inputs)]
    assert Shown(learn.compare_inputs()).rows[0] == ["score", "features", "images", "difference"]
    assert Shown(History()).texts["pre"] == ["History(no epochs)"]
    (_, row) = Shown(store).rows
    assert (row[0], row[1], row[-2]) == (store.sets()[0].key[:8], "net", "12")
    assert Shown(store).texts["pre"] == [repr(store)]
