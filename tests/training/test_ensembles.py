"""Cycles leave snapshots of what their last step made, and runs predict together by the mean of their probabilities."""

from __future__ import annotations

import csv
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.programs import Run
from support.tiny import arrays, staged
from torch import Tensor

from featstore import FeatureStore, FeatureStoreError, ImageSet, extract
from training import Ensemble, Learner


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> tuple[ImageSet, FeatureStore]:
    images, store = arrays(12).split(valid=0.25), FeatureStore(tmp_path_factory.mktemp("features"))
    extract(staged(), images, store, cuts=["layer2"], dtype="float32", device="cpu", workers=0)
    return images, store


def learner(stored: tuple[ImageSet, FeatureStore], **options: Any) -> Learner:
    return Learner(staged(), *stored, **{"batch_size": 4, "device": "cpu", "workers": 0, "quiet": True, **options})


def loaded(run: Path, images: ImageSet | None = None) -> Learner:
    return Learner.load(run, images, module=staged(), device="cpu", workers=0, quiet=True)


def same(one: Learner, other: Learner) -> bool:
    theirs = other.model.tensors()
    return all(torch.equal(value, theirs[name]) for name, value in one.model.tensors().items())


def test_a_snapshot_holds_the_weights_after_the_last_step_of_its_cycle(
    stored: tuple[ImageSet, FeatureStore], tmp_path: Path
) -> None:
    learn = learner(stored)
    history = learn.fit_cycles(2, lr=1e-2, cycle_mult=2, snapshot=tmp_path / "cycles")
    assert sorted(path.name for path in (tmp_path / "cycles").iterdir()) == ["cycle-1", "cycle-2"]
    alone = learner(stored)
    alone.fit(1, lr=1e-2, schedule="cosine")
    assert same(loaded(tmp_path / "cycles/cycle-1"), alone)
    assert same(loaded(tmp_path / "cycles/cycle-2"), learn)
    # Two steps an epoch: the second of two in the first cycle, then the second and the fourth of four.
    shares = [(1 + np.cos(np.pi * share)) / 2 for share in (1 / 2, 1 / 4, 3 / 4)]
    assert [record["lr"] for record in history.records] == pytest.approx([1e-2 * share for share in shares])
    with (tmp_path / "cycles/cycle-1/history.csv").open(newline="", encoding="utf-8") as file:
        [row] = csv.DictReader(file)
    assert float(row["valid_loss"]) == history.records[0]["valid_loss"]


def test_a_snapshot_of_a_fit_on_features_is_fine_tuned_from_images(
    stored: tuple[ImageSet, FeatureStore], tmp_path: Path
) -> None:
    learner(stored).fit_cycles(1, lr=1e-2, snapshot=tmp_path / "cycles")
    learn = loaded(tmp_path / "cycles/cycle-1", stored[0])
    learn.unfreeze()
    before = {name: value.clone() for name, value in learn.model.tensors().items()}
    learn.fit(1, lr=1e-3)
    assert learn.read_from == "images"
    assert not torch.equal(learn.model.tensors()["layer1.0.weight"], before["layer1.0.weight"])


@pytest.mark.usefixtures("heeds_signals")
def test_cycles_that_were_interrupted_leave_the_same_snapshots(
    stored: tuple[ImageSet, FeatureStore], tmp_path: Path
) -> None:
    def fitted(name: str, at: int | None, **more: Any) -> Learner:
        left = at or -1

        def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
            nonlocal left
            left -= logits.requires_grad
            if left == 0 and logits.requires_grad:
                signal.raise_signal(signal.SIGINT)
            return F.cross_entropy(logits, targets)

        learn = learner(stored, loss=cross_entropy)
        learn.fit_cycles(3, lr=1e-2, snapshot=tmp_path / name, checkpoint=tmp_path / f"{name}.checkpoint", **more)
        return learn

    expected = fitted("unbroken", None)
    for at in (3, 2):  # of six steps, two each: the first of the second cycle, and of the third
        with pytest.raises(KeyboardInterrupt):
            fitted("cycles", at, resume=True)
    assert same(fitted("cycles", None, resume=True), expected)
    for cycle in ("cycle-1", "cycle-2", "cycle-3"):
        assert same(loaded(tmp_path / "cycles" / cycle), loaded(tmp_path / "unbroken" / cycle))
    with pytest.raises(FeatureStoreError, match="cycle-1 holds a saved run already"):
        learner(stored).fit_cycles(1, lr=1e-2, snapshot=tmp_path / "cycles")


@pytest.mark.parametrize("name", ["num_cycles", "cycle_len", "cycle_mult"])
def test_numbers_of_cycles_are_checked(stored: tuple[ImageSet, FeatureStore], name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is 0; expected at least 1"):
        learner(stored).fit_cycles(**options(name, 0))
    with pytest.raises(TypeError, match=f"{name} is 1.5; expected a "):
        learner(stored).fit_cycles(**options(name, 1.5))


def options(name: str, value: object) -> dict[str, Any]:
    return {"num_cycles": 1, "lr": 1e-2, name: value}


def test_an_ensemble_predicts_by_the_mean_of_probabilities(
    stored: tuple[ImageSet, FeatureStore], tmp_path: Path
) -> None:
    learner(stored).fit_cycles(2, lr=1e-2, snapshot=tmp_path)
    runs = [tmp_path / "cycle-1", tmp_path / "cycle-2"]
    one, other = (loaded(run).predict_proba(stored[0]) for run in runs)
    assert np.abs(one - other).max() > 1e-4
    ensemble = Ensemble.load(runs, module=staged(), device="cpu", workers=0, quiet=True)
    below = Ensemble.load(runs[0].parent, module=staged(), device="cpu", workers=0, quiet=True)
    assert len(below.learners) == len(runs)
    shutil.copytree(runs[0], runs[0].with_name(".cycle-1.old-0123456789abcdef"))  # as a killed process leaves one
    beside = Ensemble.load(runs[0].parent, module=staged(), device="cpu", workers=0, quiet=True)
    assert len(beside.learners) == len(runs)
    with pytest.raises(ValueError, match="holds no saved runs"):
        Ensemble.load(str(runs[0]))
    mean = ensemble.predict_proba(stored[0])
    assert np.array_equal(mean, (one + other) / 2)
    best = [ensemble.classes[place] for place in mean.argmax(axis=1)]
    assert [each.label for each in ensemble.predict(stored[0])] == best


def test_models_of_different_classes_are_no_ensemble(stored: tuple[ImageSet, FeatureStore]) -> None:
    images, _ = stored
    assert images.targets is not None
    other = ImageSet.from_arrays(np.zeros((4, 8, 8, 3), np.uint8), [0, 1, 0, 1], classes=["x", "y"])
    second = Learner(staged(), other, device="cpu", quiet=True)
    with pytest.raises(FeatureStoreError, match="Model 2 of the ensemble is for the classes x, y"):
        Ensemble([learner(stored), second])
    with pytest.raises(ValueError, match="Give at least one"):
        Ensemble([])


def test_predict_takes_several_models(run: Run, here: Path) -> None:
    model = ["--images", "photos", "--store", "feats", "--backbone", "tiny.py:make_model", "--size", "32", "--extract"]
    for name, lr in (("a", "1e-2"), ("b", "2e-2")):
        run("featstore-train", "head", *model, "--epochs", "2", "--lr", lr, "--out", f"runs/{name}")
    found = {}
    for names in ("a", "b", "ab"):
        models = [each for name in names for each in ("--model", f"runs/{name}")]
        ran = run("featstore-train", "predict", *models, "photos", "--json")
        assert ran.code == 0
        found[names] = [{each["label"]: each["probability"] for each in row["top"]} for row in ran.json]
    for one, other, both in zip(found["a"], found["b"], found["ab"], strict=True):
        assert both == {name: (one[name] + other[name]) / 2 for name in one}
