"""The learning-rate finder as a command says what the library's says, for heads and for whole models."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from support.programs import Run

from featstore import FeatureStore, ImageSet, backbone
from training import Learner

MODEL = ["--backbone", "tiny.py:make_model", "--size", "32"]


def test_the_finder_suggests_what_the_library_does_and_shows_its_curve(run: Run, here: Path) -> None:
    flags = ["--images", "photos", *MODEL, "--batch-size", "2"]
    found = run("featstore-train", "lr-find", *flags, "--csv", "curve.csv", "--plot", "curve.png", "--json").json
    model = backbone("tiny.py:make_model")
    images = ImageSet.from_folder("photos").split(valid=0.2, seed=0)
    view = model.view.resized(size=32)
    expected = Learner(model, images, view=view, batch_size=2, quiet=True).lr_find()
    assert found == {
        "lr": expected.rate,
        "note": expected.note,
        "minimum": expected.minimum,
        "steepest": expected.steepest,
        "valley": expected.valley,
        "inputs": "images",
    }
    with (here / "curve.csv").open(newline="", encoding="utf-8") as file:
        rows = [[float(cell) for cell in row] for row in [*csv.reader(file)][1:]]
    assert rows == [[*row] for row in zip(expected.lrs, expected.losses, expected.smoothed, strict=True)]
    with Image.open(here / "curve.png") as picture:
        assert min(picture.size) > 100
    shown = run("featstore-train", "lr-find", *flags).out.splitlines()
    assert shown[0] == expected.in_words()
    assert shown[1].startswith("other rules, which nothing has tried: minimum ")


def test_the_finder_reads_features_and_goes_on_with_a_run(run: Run, here: Path) -> None:
    flags = ["--images", "photos", "--store", "feats"]
    head = ["head", *flags, *MODEL, "--extract", "--epochs", "1", "--lr", "1e-2", "--out", "runs/head"]
    assert run("featstore-train", *head).code == 0
    assert run("featstore-train", "lr-find", *flags, *MODEL, "--json").json["inputs"] == "features"
    saved = ["lr-find", *flags, "--from", "runs/head", "--json"]
    options: dict[str, Any] = {"quiet": True, "on_missing": "images"}
    learn = Learner.load("runs/head", ImageSet.from_folder("photos"), FeatureStore("feats"), **options)
    kept = run("featstore-train", *saved, "--freeze-to", learn.cut).json
    assert (kept["lr"], kept["inputs"]) == (learn.lr_find().rate, "features")
    # What finetune --from would train: all of it.
    learn.unfreeze()
    found = run("featstore-train", *saved).json
    assert (found["lr"], found["inputs"]) == (learn.lr_find().rate, "images")
    assert run("featstore-train", *saved, "--unfreeze").json == found


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ([], "Give either --from RUN_DIR, to go on with a saved run, or --backbone, for a new head."),
        ([*MODEL, "--unfreeze", "--freeze-to", "conv1"], "--unfreeze and --freeze-to conv1 say two things"),
        ([*MODEL, "--plot", "curve.txt"], "--plot is 'curve.txt'. Expected a name that ends in .png, .svg, .pdf."),
        (["--from", "runs/head", "--head", "mlp"], "A run of --from brings its weights, its head and its view."),
    ],
)
def test_flags_that_dont_go_together_are_refused(run: Run, here: Path, flags: list[str], sentence: str) -> None:
    ran = run("featstore-train", "lr-find", "--images", "photos", *flags)
    assert (ran.code, ran.out) == (2, "")
    assert sentence in ran.last_words
