"""Walks 2, 3 and 10 of a user: a job of many tasks, several labels an image, a model for other programs."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import average_precision_score, f1_score
from support.programs import Run

from featstore import FeatureStore, ImageSet
from training import Learner
from training.scores.metrics import f1_multi

SMALL = ["--backbone", "tiny.py:make_model", "--size", "32"]
RATE = ["--epochs", "1", "--lr", "1e-3"]

# ---- 2. Many images, an array job


def test_walk_2_tasks_of_an_array_job_leave_what_one_job_would(
    run: Run, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["--images", "photos", "--store", "feats", *SMALL]
    assert run("featstore", "estimate", *flags).code == 0
    status = run("featstore", "status", *flags)
    assert status.code == 3
    assert re.match(r"20 images, 0 stored, 20 to compute, \S+ bytes$", status.out)

    monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "3")
    monkeypatch.setenv("SLURM_ARRAY_TASK_MIN", "0")
    monkeypatch.setenv("SLURM_ARRAY_TASK_MAX", "2")
    computed = []
    for task in (0, 2, 0, 1):  # the first is queued again
        assert run("featstore", "status", *flags).code == 3  # not complete
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", str(task))
        ran = run("featstore", "extract", "--shard", "slurm", *flags, "--json")
        assert ran.code == 0
        computed.append(ran.json["sets"][0]["computed"])
    assert computed[2] == 0
    assert sum(computed) == 20
    assert run("featstore", "status", *flags).code == 0

    run("featstore", "extract", "--images", "photos", "--store", "alone", *SMALL)
    images = ImageSet.from_folder("photos")
    rows, expected = (
        FeatureStore(each).features(images, FeatureStore(each).sets()[0].key).numpy() for each in ("feats", "alone")
    )
    assert np.array_equal(rows, expected)
    ran = run("featstore-train", "head", *flags, *RATE, "--out", "runs/head", "--json")
    assert (ran.code, ran.json["inputs"]) == (0, "features")


# ---- 3. A table, several labels an image


@pytest.fixture
def table(here: Path) -> list[str]:
    """Flags for a table with names of its own; a patient's images stay together, one image has none of the labels."""
    lines = ["file,tags,fold,patient"]
    for number in range(10):
        for name, tags in (("cat", "cat;pet" if number % 2 else "cat"), ("dog", "" if number == 4 else "dog;pet")):
            fold = "train" if number < 6 else "valid" if number < 8 else "test"
            lines.append(f"{name}/{number:03}.jpg,{tags},{fold},p{number}")
    (here / "table.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    columns = ["--path-column", "file", "--label-column", "tags", "--label-sep", ";", "--task", "multi"]
    return [
        "--images",
        "table.csv",
        *columns,
        "--split-column",
        "fold",
        "--group-column",
        "patient",
        "--root",
        "photos",
    ]


def test_walk_3_several_labels_from_a_table_to_scores(run: Run, here: Path, table: list[str]) -> None:
    assert run("featstore", "extract", *table, "--store", "feats", *SMALL).code == 0
    ran = run("featstore-train", "head", *table, "--store", "feats", *SMALL, *RATE, "--out", "runs/head", "--json")
    assert (ran.code, ran.json["inputs"]) == (0, "features")
    scores = run("featstore-train", "evaluate", "--model", "runs/head", *table, "--split", "test", "--json").json[
        "test"
    ]

    images = ImageSet.from_table(
        "table.csv",
        path_column="file",
        label_column="tags",
        label_sep=";",
        task="multi",
        split_column="fold",
        group_column="patient",
        root="photos",
    )
    assert images.classes == ("cat", "dog", "pet")
    assert (len(images.train), len(images.valid), len(images.test)) == (12, 4, 4)
    assert np.asarray(images.targets).sum(axis=1).min() == 0  # the empty cell: none of the classes
    learn = Learner.load("runs/head", images, quiet=True, device="cpu")
    truth, found = np.asarray(images.test.targets), learn.predict_proba(images.test)
    assert found.shape == (4, 3)
    assert scores["map"] == pytest.approx(average_precision_score(truth, found, average="macro"))
    assert scores["f1"] == pytest.approx(f1_score(truth, found >= 0.5, average="macro", zero_division=0))
    logits = torch.from_numpy(np.log(found / (1 - found)))
    assert f1_multi(logits, torch.tensor(truth), threshold=0.4) == pytest.approx(
        f1_score(truth, found >= 0.4, average="macro", zero_division=0)
    )
    groups = {split: {name[-7:-4] for name in getattr(images, split).ids} for split in ("train", "valid", "test")}
    assert not groups["train"] & groups["valid"]

    dealt = [each for each in table if each not in ("--split-column", "fold")]
    (here / "table.csv").write_text((here / "table.csv").read_text().replace(",fold,", ",then,"), encoding="utf-8")
    assert run("featstore-train", "head", *dealt, "--store", "feats", *SMALL, *RATE, "--out", "runs/dealt").code == 0
    with open("runs/dealt/valid_predictions.csv", newline="", encoding="utf-8") as file:
        held_out = [row["image"] for row in csv.DictReader(file)]
    assert sorted(name[-7:-4] for name in held_out if "cat" in name) == sorted(
        name[-7:-4] for name in held_out if "dog" in name
    )


def test_walk_3_a_column_for_each_label_is_the_same(run: Run, here: Path, table: list[str]) -> None:
    with open("table.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    lines = ["path,split,cat,dog,pet"]
    for row in rows:
        marks = ["1" if name in row["tags"].split(";") else "0" for name in ("cat", "dog", "pet")]
        lines.append(",".join([row["file"], row["fold"], *marks]))
    Path("columns.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    run("featstore", "extract", *table, "--store", "feats", *SMALL)
    columns = ["--images", "columns.csv", "--task", "multi", "--one-hot", "cat,dog,pet", "--root", "photos"]
    ran = [
        run("featstore-train", "head", *each, "--store", "feats", *SMALL, *RATE, "--out", out, "--json")
        for each, out in ((table, "runs/cells"), (columns, "runs/columns"))
    ]
    assert [each.code for each in ran] == [0, 0]
    assert ran[0].json["valid"] == ran[1].json["valid"]


# ---- 10. Serving


def test_walk_10_what_is_exported_says_what_the_model_says(run: Run, here: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    run(
        "featstore-train", "head", "--images", "photos", "--store", "feats", *SMALL, "--extract", *RATE, "--out", "head"
    )
    tuning = ["--from", "head", "--lr", "1e-4,1e-3", "--epochs", "1", "--out", "tuned"]
    assert run("featstore-train", "finetune", "--images", "photos", *tuning).code == 0
    for name in ("net.onnx", "net.pt2", "net.safetensors"):
        ran = run("featstore-train", "export", "--model", "tuned", "--out", name, "--images", "photos")
        assert ran.code == 0
        assert "its outputs differ from the model's by at most" in ran.out

    about: dict[str, Any] = json.loads(Path("net.onnx.json").read_text(encoding="utf-8"))
    files = ["photos/cat/003.jpg", "photos/dog/007.jpg", "photos/dog/008.jpg"]
    pixels = np.stack([prepared(Path(each), about["view"]) for each in files])
    learn = Learner.load("tuned", quiet=True, device="cpu")
    expected = learn.predict_proba(files)

    session = onnxruntime.InferenceSession("net.onnx", providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {session.get_inputs()[0].name: pixels})
    inside = json.loads(session.get_modelmeta().custom_metadata_map["featstore"])
    assert inside["classes"] == about["classes"] == list(learn.classes)
    np.testing.assert_allclose(softmax(logits), expected, atol=0.02)  # Pillow's pixels may be one level off
    loaded = torch.export.load("net.pt2").module()(torch.from_numpy(pixels)).detach().numpy()
    np.testing.assert_allclose(loaded, logits, atol=1e-4)
    (alone,) = session.run(None, {session.get_inputs()[0].name: pixels[:1]})
    np.testing.assert_allclose(alone, logits[:1], atol=1e-4)  # any number of images


def prepared(file: Path, view: dict[str, Any]) -> np.ndarray:
    """As a person would who has read what stands beside the model: ``(3, S, S)`` uint8, by Pillow alone."""
    image = Image.open(file).convert("RGB")
    size, resize = view["size"], view["resize"]
    scale = resize / min(image.size)
    image = image.resize([round(side * scale) for side in image.size], Image.Resampling.BILINEAR)
    left, top = ((side - size) // 2 for side in image.size)
    return np.asarray(image.crop((left, top, left + size, top + size))).transpose(2, 0, 1)


def softmax(logits: np.ndarray) -> np.ndarray:
    shares = np.exp(logits - logits.max(1, keepdims=True))
    return np.asarray(shares / shares.sum(1, keepdims=True))
