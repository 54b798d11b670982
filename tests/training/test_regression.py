"""Regression: numbers of images, from the table's columns to predictions in the same units."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from sklearn.linear_model import LinearRegression
from support.programs import Run
from support.tiny import staged
from torch import nn

from featstore import FeatureStore, ImageSet, extract
from featstore.errors import FeatureStoreError
from featstore.exchange.export import export
from featstore.extraction.remedy import image_flags
from training import Learner
from training.scores.metrics import mean_absolute_error, r2, root_mean_squared_error
from training.standardised import steps_note


def shades(count: int = 40) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Images of one shade with some noise; two numbers of each in units that lie far apart and far from 0."""
    drawn = np.random.default_rng(0)
    shade = drawn.uniform(30, 220, count)
    pixels = np.clip(shade[:, None, None, None] + drawn.normal(0, 8, (count, 24, 24, 3)), 0, 255).astype(np.uint8)
    return pixels, np.stack([5000 + 100 * shade, -shade / 1e4], axis=1).astype(np.float32)


@pytest.fixture
def images() -> ImageSet:
    pixels, numbers = shades()
    return ImageSet.from_arrays(pixels, numbers, classes=["weight", "tilt"], task="regression").split(0.25)


def learner(images: ImageSet, store: FeatureStore | None = None, **options: object) -> Learner:
    return Learner(staged(), images, store, **{"head": "linear", "quiet": True, "batch_size": 8, **options})  # type: ignore[arg-type]


def test_numbers_whose_digits_float32_loses_are_told_before_they_are_learnt(
    capsys: pytest.CaptureFixture[str],
) -> None:
    pixels, _ = shades(12)
    drawn = np.random.default_rng(0).normal(0, 3600, 12)
    seconds = ImageSet.from_arrays(
        pixels, np.stack([drawn / 3600, 1.7e9 + drawn], 1), classes=["hours", "time"], task="regression"
    )
    learner(seconds, quiet=False, device="cpu").fit(1, lr=1e-2)
    told = capsys.readouterr().err
    assert "time is around 1.7e+09 and spreads by 2561, where float32 has steps of 128: digits are lost" in told
    few = np.array([[16777216.0], [16777215.0], [16777200.0]], np.float32)  # from here on steps of 2
    assert steps_note(few, ["x"]) is not None
    assert steps_note(few - 16777200, ["x"]) is None
    assert steps_note(np.full((3, 1), 1.7e9, np.float32), ["x"]) is None  # nothing is lost of what doesn't vary


def test_numbers_are_learnt_in_whatever_units_and_predicted_in_these(images: ImageSet, tmp_path: Path) -> None:
    store = FeatureStore(tmp_path / "features")
    (key,) = extract(staged(), images, store, cuts=["layer2"], dtype="float32").keys
    learn = learner(images, store)
    learn.fit(10, lr=1e-2)

    features = store.features(images, key)
    train, valid = (np.flatnonzero(images.splits == split) for split in ("train", "valid"))
    assert images.targets is not None
    rows = features.numpy()
    best = LinearRegression().fit(rows[train], images.targets[train]).predict(rows[valid])
    scored = learn.evaluate("valid")
    assert learn.read_from == "features"
    assert scored["r2"] > 0.95
    assert scored["r2"] > r2(torch.from_numpy(best), torch.from_numpy(images.targets[valid])) - 0.05
    predicted = learn.predict(images.valid)
    assert [name for name, _ in predicted[0].values] == ["weight", "tilt"]
    numbers = np.array([[value for _, value in each.values] for each in predicted])
    np.testing.assert_array_equal(numbers, learn.predict_proba(images.valid))
    assert scored["mae"] == pytest.approx(np.abs(numbers - images.targets[valid]).mean(), rel=1e-5)
    spread = images.targets[train].astype(float).std(axis=0)
    assert scored["loss"] == pytest.approx((((numbers - images.targets[valid]) / spread) ** 2).mean(), rel=1e-4)


def test_a_run_gives_the_same_numbers_when_it_is_loaded(images: ImageSet, tmp_path: Path) -> None:
    learn = learner(images, head="concat")
    learn.fit(2, lr=1e-2)
    learn.save(tmp_path / "run")
    model = staged()
    again = Learner.load(tmp_path / "run", images, module=model, quiet=True, batch_size=8)
    np.testing.assert_array_equal(again.predict_proba(images), learn.predict_proba(images))
    assert again.evaluate() == learn.evaluate()
    table = (tmp_path / "run" / "valid_predictions.csv").read_text(encoding="utf-8").splitlines()
    assert table[0] == "image,actual weight,actual tilt,weight,tilt"
    assert len(table) == 1 + len(images.valid)
    other, numbers = shades()
    swapped = ImageSet.from_arrays(other, numbers[:, ::-1], classes=["tilt", "weight"], task="regression")
    turned = Learner.load(tmp_path / "run", swapped, module=model, quiet=True, batch_size=8)
    assert turned.evaluate() == learn.evaluate()
    with pytest.raises(
        FeatureStoreError, match=r"have the values tilt, height, and the model of .* gives weight, tilt"
    ):
        Learner.load(
            tmp_path / "run",
            ImageSet.from_arrays(other, numbers, classes=["tilt", "height"], task="regression"),
            module=model,
        )
    with pytest.raises(FeatureStoreError, match="task regression, and these images are labelled for single"):
        Learner.load(tmp_path / "run", ImageSet.from_arrays(other, [0, 1] * 20), module=model)


def test_images_without_numbers_are_neither_trained_on_nor_scored(images: ImageSet) -> None:
    pixels, numbers = shades()
    numbers[::4] = np.nan
    some = ImageSet.from_arrays(pixels, numbers, task="regression", splits=images.splits)
    assert some.describe().endswith("10 unlabelled; train 30, valid 10")
    learn = learner(some)
    learn.fit(1, lr=1e-2)
    assert learn.evaluate()["images"] == np.isfinite(numbers[images.splits == "valid", 0]).sum()


def test_a_loss_and_a_head_of_ones_own_see_the_numbers_as_they_are(images: ImageSet) -> None:
    learn = learner(images, loss=F.l1_loss)
    learn.fit(1, lr=1e-2)
    scored = learn.evaluate()
    assert scored["loss"] == pytest.approx(scored["mae"], rel=1e-6)
    own = learner(images, head=nn.Linear(24, 2))
    scored = own.evaluate()
    assert images.targets is not None
    errors = own.predict_proba(images.valid) - images.targets[images.splits == "valid"]
    assert scored["loss"] == pytest.approx((errors**2).mean(), rel=1e-5)


def test_scores_of_numbers_are_those_of_numpy() -> None:
    drawn = np.random.default_rng(1)
    values, targets = drawn.normal(size=(2, 9, 3)) * [1, 10, 100]
    given = torch.from_numpy(values).float(), torch.from_numpy(targets).float()
    squared = (values - targets) ** 2
    assert mean_absolute_error(*given) == pytest.approx(np.abs(values - targets).mean(), rel=1e-6)
    assert root_mean_squared_error(*given) == pytest.approx(np.sqrt(squared.mean(axis=0)).mean(), rel=1e-6)
    explained = 1 - squared.sum(axis=0) / ((targets - targets.mean(axis=0)) ** 2).sum(axis=0)
    assert r2(*given) == pytest.approx(explained.mean(), rel=1e-5)
    assert np.isnan(r2(given[0][:1], given[1][:1]))
    with pytest.raises(ValueError, match=r"finite targets of the same shape\. Leave unlabelled rows \(NaN\) out"):
        r2(given[0], given[1] * torch.nan)


def test_the_whole_way_on_the_command_line(run: Run, here: Path) -> None:
    pixels, numbers = shades(20)
    rows = ["file,weight,tilt"]
    for place, (picture, row) in enumerate(zip(pixels, numbers.tolist(), strict=True)):
        Image.fromarray(picture).save(f"{place}.png")
        rows.append(f"{place}.png,{row[0]!r},{row[1]!r}")
    Path("t.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    asked = ["--path-column", "file", "--task", "regression", "--label-column", "weight,tilt"]
    given = ["--images", "t.csv", *asked]
    columns = {"path_column": "file", "label_column": ["weight", "tilt"], "task": "regression"}
    in_python = ImageSet.from_table("t.csv", **columns).split()  # type: ignore[arg-type]
    np.testing.assert_array_equal(in_python.targets, numbers)
    assert image_flags(in_python) == [*given[:4], "--label-column", "weight,tilt", "--task", "regression"]

    made = ["--store", "feats", "--backbone", "tiny.py:make_model", "--size", "32"]
    ran = run(
        "featstore-train", "head", *given, *made, "--extract", "--head", "linear", "--epochs", "3", "--out", "run"
    )
    assert ran.code == 0, ran.err
    assert ran.out.startswith("valid mean absolute error ")
    saved = json.loads(Path("run/metrics.json").read_text(encoding="utf-8"))["valid"]
    assert {"mae", "rmse", "r2", "loss", "images"} == {*saved}
    evaluated = run("featstore-train", "evaluate", "--model", "run", *given, "--json").json
    assert evaluated["valid"] == saved
    evaluated = run("featstore-train", "evaluate", "--model", "run", *given[:4], "--json").json
    assert evaluated["valid"] == saved, "the run knows its task and its numbers' names"
    predicted = run("featstore-train", "predict", "--model", "run", "0.png", "--csv", "p.csv", "--json").json
    with open("p.csv", encoding="utf-8", newline="") as file:
        ((name, *cells),) = list(csv.reader(file))[1:]
    assert name == predicted[0]["image"] == "0.png"
    np.testing.assert_allclose([float(cell) for cell in cells], [*predicted[0]["values"].values()], rtol=1e-6)
    assert "weight" in run("featstore-train", "predict", "--model", "run", "0.png").out
    refused = run("featstore-train", "head", "--images", "t.csv", *asked[:-1], "weight,age", *made, "--out", "no")
    assert "has no column 'age'; it has 'file', 'weight', 'tilt'. Expected a column of numbers." in refused.err


def test_exported_numbers_come_back(images: ImageSet, tmp_path: Path) -> None:
    store = FeatureStore(tmp_path / "features")
    (key,) = extract(staged(), images, store, cuts=["layer2"]).keys
    filed = ImageSet.from_store(store)
    assert (filed.task, filed.classes) == ("regression", ("weight", "tilt"))
    np.testing.assert_array_equal(filed.targets, images.targets)
    export(store, key, tmp_path / "out.npy", images=filed)
    with open(tmp_path / "out.csv", encoding="utf-8", newline="") as file:
        labels = [row["label"] for row in csv.DictReader(file)]
    np.testing.assert_array_equal(np.array([label.split("|") for label in labels], np.float32), images.targets)
    export(store, key, tmp_path / "out.parquet", images=filed)


@pytest.mark.parametrize(
    ("columns", "cell", "said"),
    [
        (["size", "size"], "7", "The column size is named twice in label_column size, size. Name it once"),
        ("size", "1_0", "has '1_0' in the column size. Expected a number"),
        ("size", "ten", "has 'ten' in the column size. Expected a number"),
    ],
)
def test_columns_and_cells_that_are_no_numbers_are_named(
    tmp_path: Path, columns: str | list[str], cell: str, said: str
) -> None:
    (tmp_path / "t.csv").write_text(f"path,size\na.png,{cell}\n", encoding="utf-8")
    with pytest.raises(ValueError, match=re.escape(said)):
        ImageSet.from_table(tmp_path / "t.csv", label_column=columns, task="regression")
