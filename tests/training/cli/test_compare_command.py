"""The comparison of backbones as a command says what the library's says."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from PIL import Image
from support.programs import Run

FLAGS = ["--images", "photos", "--store", "feats", "--backbone", "tiny.py:make_model", "--size", "32"]


def test_the_command_extracts_probes_and_writes_what_was_asked_for(run: Run, here: Path) -> None:
    cuts = ["--cut", "conv1", "--cut", "pool"]
    ran = run("featstore-train", "compare", *FLAGS, *cuts, "--csv", "table.csv", "--plot", "plot.png", "--json")
    found = ran.json
    assert ran.code == 0
    assert {entry["cut"] for entry in found["entries"]} == {"conv1 concat", "pool concat"}
    assert found["by"] == "linear"
    assert found["images"] == 4
    assert all(entry["seconds"] > 0 for entry in found["entries"])
    with (here / "table.csv").open(newline="", encoding="utf-8") as file:
        assert [row["key"] for row in csv.DictReader(file)] == [entry["key"] for entry in found["entries"]]
    with Image.open(here / "plot.png") as picture:
        assert min(picture.size) > 100
    shown = run("featstore-train", "compare", *FLAGS, *cuts, "--stored-only", "--probe", "knn", "--folds", "4")
    assert shown.code == 0
    assert shown.out.startswith("backbone")
    assert "20 images each held out once in 4 folds" in shown.out


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--probe", "svm"], "--probe is 'svm'. Expected knn, ridge or linear."),
        (["--plot", "plot.bmp"], "--plot is 'plot.bmp'"),
        (["--cut", "conv9"], "conv9"),
        (["--stored-only"], "featstore extract"),
    ],
)
def test_wrong_usage_is_a_sentence(flags: list[str], sentence: str, run: Run) -> None:
    ran = run("featstore-train", "compare", *FLAGS, *flags)
    assert ran.code != 0
    assert sentence in ran.err
    assert "Traceback" not in ran.err
