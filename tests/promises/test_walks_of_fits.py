"""Walks 6 and 9 of a user: k folds of a few patients; head, fine-tuning, cycles, and predictions by several views."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from support.programs import Run

from featstore import Augment, FeatureStore, ImageSet, View, backbone, extract
from training import Ensemble, Learner, cross_validate

SMALL = ["--backbone", "tiny.py:make_model", "--size", "32"]
VIEW = View().resized(size=32)


# ---- 6. K folds


def test_walk_6_folds_are_a_loop_of_a_line_or_one_call_and_keep_patients_together(run: Run, here: Path) -> None:
    images, store, model = ImageSet.from_folder("photos"), FeatureStore("feats"), backbone("tiny.py:make_model")
    patients = [int(Path(name).stem) // 2 for name in images.ids]
    extract(model, images, store, view=VIEW, dtype="float32", device="cpu")
    dealt = images.folds(5, seed=0, groups=patients)
    looped = [
        Learner(model, fold, store, view=VIEW, device="cpu", quiet=True).fit(2, lr=1e-2).last["accuracy"]
        for fold in dealt
    ]
    found = cross_validate(
        model, images, store, folds=5, groups=patients, epochs=2, lr=1e-2, view=VIEW, device="cpu", quiet=True
    )
    assert [each["accuracy"] for each in found.scores] == looped
    assert found.mean["accuracy"] == pytest.approx(np.mean(looped))

    outcomes = found.outcomes()
    assert outcomes.images.ids == images.ids  # each image once, while it was held out
    for learn, fold in zip(found.learners, dealt, strict=True):
        ids = fold.valid.ids
        held_out = {patients[images.ids.index(name)] for name in ids}
        assert held_out.isdisjoint(patients[images.ids.index(name)] for name in fold.train.ids)
        places = [outcomes.images.ids.index(name) for name in ids]
        assert np.array_equal(outcomes.probabilities[places], learn.predict_proba(fold.valid))


def test_walk_6_at_the_command_line(run: Run, here: Path) -> None:
    flags = ["--images", "photos", "--store", "feats", *SMALL, "--extract", "--epochs", "2", "--lr", "1e-2"]
    ran = run("featstore-train", "head", *flags, "--folds", "4", "--out", "runs/folds")
    assert ran.code == 0
    assert "4 folds, 20 images, each scored while it was held out: accuracy " in ran.out
    with open("runs/folds/predictions.csv", newline="", encoding="utf-8") as file:
        assert len({row["image"] for row in csv.DictReader(file)}) == 20
    assert len(Ensemble.load("runs/folds", quiet=True).learners) == 4


# ---- 9. Head, then fine-tuning, SGDR, TTA


def test_walk_9_in_python_one_learner_goes_the_whole_way(here: Path) -> None:
    images = ImageSet.from_folder("photos").split(valid=0.2, test=0.2, seed=0)
    store, model, two = FeatureStore("feats"), backbone("tiny.py:make_model"), Augment("flip", seeds=range(2))
    extract(model, images, store, view=VIEW, augment=two, dtype="float32", device="cpu")
    learn = Learner(model, images, store, view=VIEW, augment=two, device="cpu", quiet=True)
    learn.fit(2, lr=1e-2)
    assert learn.read_from == "features"
    learn.unfreeze()
    learn.augment = Augment("flip", seeds="fresh")
    history = learn.fit_cycles(3, cycle_len=1, cycle_mult=2, lr=(1e-5, 1e-3), snapshot="all")
    assert (learn.read_from, len(history.records)) == ("images", 1 + 2 + 4)
    assert sorted(path.name for path in Path("all").iterdir()) == ["cycle-1", "cycle-2", "cycle-3"]

    plain, several = learn.predict_proba(images.test), learn.predict_proba(images.test, tta=8)
    assert several.shape == (len(images.test), 2)
    np.testing.assert_allclose(several.sum(1), 1)
    assert not np.array_equal(several, plain)
    alone = [learn.predict_proba(images.test, tta=Augment("flip", seeds=[seed]), tta_weight=0) for seed in range(8)]
    np.testing.assert_allclose(several, np.mean([plain, *alone], axis=0), rtol=1e-6)
    members = [Learner.load(f"all/cycle-{cycle}", quiet=True, device="cpu") for cycle in (1, 2, 3)]
    np.testing.assert_allclose(
        Ensemble.load("all", device="cpu", quiet=True).predict_proba(images.test),
        np.mean([each.predict_proba(images.test) for each in members], axis=0),
    )


def test_walk_9_at_the_command_line(run: Run, here: Path) -> None:
    flip = ["--augment", "flip"]
    head = ["--images", "photos", "--store", "feats", *SMALL, "--epochs", "1", "--lr", "1e-2", "--out", "runs/head"]
    seeds = [*flip, "--seeds", "0-1", "--extract"]
    assert run("featstore-train", "head", *head, *seeds).code == 0
    tuning = ["--from", "runs/head", "--lr", "1e-5,1e-3", *flip, "--seeds", "fresh", "--out", "runs/tuned"]
    cycles = ["--cycles", "3", "--cycle-len", "1", "--cycle-mult", "2", "--snapshots", "all"]
    ran = run("featstore-train", "finetune", "--images", "photos", *tuning, *cycles)
    assert ran.code == 0
    assert ran.err.count("snapshot: all/cycle-") == 3
    ran = run("featstore-train", "predict", "--model", "runs/tuned", "photos", "--tta", "8", *flip, "--csv", "all.csv")
    assert ran.code == 0
    learn = Learner.load("runs/tuned", quiet=True)
    expected = learn.predict_proba(["photos"], tta=Augment("flip", seeds=range(8)))
    with open("all.csv", newline="", encoding="utf-8") as file:
        said = [[float(row["cat"]), float(row["dog"])] for row in csv.DictReader(file)]
    np.testing.assert_allclose(said, expected, atol=1e-6)
