"""Sweeps: each setting comes to what it comes to alone; what is finished stays finished; another sweep is refused."""

from __future__ import annotations

import json
import math
import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from scipy.stats import ttest_1samp  # type: ignore[import-untyped]
from support.processes import Processes
from support.tiny import pixels, staged

from featstore import Augment, FactsDifferError, FeatureStore, FeatureStoreError, ImageSet, extract
from training import FeatureNoise, Grid, Learner, Mixup, Sample, Sweep, log_uniform, sweep, try_settings, uniform
from training.grid import as_settings, setting_digest
from training.metrics import wilson_interval
from training.sweeps import rungs

COUNT, VALID = 40, 12
OPTIONS: dict[str, Any] = {"cut": "layer2", "batch_size": 8, "device": "cpu", "workers": 0, "quiet": True, "epochs": 2}
CLOSE: dict[str, Any] = {"rel": 1e-5, "abs": 1e-5}  # heads that train together sum in another order


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> tuple[ImageSet, FeatureStore]:
    splits = ["train"] * (COUNT - VALID) + ["valid"] * VALID
    images = ImageSet.from_arrays(pixels(COUNT), [row % 3 for row in range(COUNT)], splits=splits)
    store = FeatureStore(tmp_path_factory.mktemp("features"))
    options: dict[str, Any] = {"dtype": "float32", "device": "cpu", "workers": 0}
    extract(staged(), images, store, cuts=["layer1", "layer2", "layer2:none"], **options)
    extract(staged(), images, store, cuts=["layer2"], augment=Augment("flip", seeds=range(2)), **options)
    return images, store


def alone(
    stored: tuple[ImageSet, FeatureStore], lr: float, epochs: int = 2, fit: Any = None, **options: Any
) -> Learner:
    images, store = stored
    given: dict[str, Any] = {**OPTIONS, **options}
    del given["epochs"]
    learn = Learner(staged(), given.pop("images", images), store, **given)
    learn.fit(epochs, lr, **(fit or {}))
    return learn


def test_a_grid_of_everything_is_a_row_each_as_it_comes_to_alone(stored: tuple[ImageSet, FeatureStore]) -> None:
    flip = Augment("flip", seeds=range(2))
    settings: list[dict[str, Any]] = [
        {"head": "linear", "lr": 1e-3},
        {"head": "linear", "lr": 1e-2, "weight_decay": 0.1},
        {"head": "linear", "lr": 1e-2, "seed": 3},
        {"head": "mlp", "lr": 1e-2, "hidden": 5, "dropout": 0.2},
        {"head": "mlp", "lr": 1e-2, "hidden": (5,), "dropout": 0.4},
        {"head": "mlp", "lr": 1e-2, "hidden": (6, 4), "schedule": "cosine"},
        {"head": "concat", "lr": 1e-2, "hidden": (), "batch_size": 14, "epochs": 3},
        {"head": "attention", "lr": 1e-2, "queries": 2},
        {"head": "linear", "lr": 1e-2, "cut": "layer1", "label_smoothing": 0.1},
        {"head": "linear", "lr": 1e-2, "mix": Mixup(0.4)},
        {"head": "linear", "lr": 1e-2, "mix": FeatureNoise(0.4), "optimizer": "sgd"},
        {"head": "concat", "lr": 1e-2, "augment": flip, "clip": 1.0},
    ]
    words = [
        "linear", "linear", "linear", "mlp:hidden=5,dropout=0.2", "mlp:hidden=5,dropout=0.4", "mlp:hidden=6+4",
        "concat:hidden=", "attention:queries=2", "linear", "linear", "linear", "concat",
    ]  # fmt: skip
    found = sweep(staged(), *stored, settings, **OPTIONS)
    assert len(found.members) == len(settings)
    scores = [row["accuracy"] for row in found.table]
    assert scores == sorted(scores, reverse=True)
    of_name = {each.name: each for each in found.members}
    for setting, word in zip(settings, words, strict=True):
        given = {name: value for name, value in setting.items() if name not in ("hidden", "dropout", "queries")}
        fit = {
            name: given.pop(name)
            for name in ("weight_decay", "schedule", "label_smoothing", "mix", "clip")
            if name in given
        }
        learn = alone(stored, fit=fit, **{**given, "head": word})
        member = of_name[setting_digest(setting)]
        expected = {name: value for name, value in learn.history.last.items() if name != "seconds"}
        assert {name: member.parts[0][name] for name in expected} == pytest.approx(expected, **CLOSE), setting
        assert member.interval("accuracy") == wilson_interval(round(expected["accuracy"] * VALID), VALID)
    assert [*found.frame()] == [*found.table[0]]
    assert "the best of 12 is chosen by the images that score it" in repr(found)
    assert "<table>" in found._repr_html_()


def test_the_best_is_a_learner_to_go_on_with(stored: tuple[ImageSet, FeatureStore]) -> None:
    found = sweep(staged(), *stored, Grid({"lr": [1e-3, 3e-2], "head": ["linear"]}), **OPTIONS)
    learn = found.best()
    assert learn.evaluate()["accuracy"] == found.table[0]["accuracy"]
    expected = alone(stored, found.members[0].setting["lr"], head="linear")
    assert_allclose(learn.predict_proba(stored[0]), expected.predict_proba(stored[0]), atol=1e-5)
    learn.quiet = True
    learn.unfreeze()
    learn.fit(1, lr=(1e-5, 1e-3))
    assert learn.read_from == "images"


def test_folds_and_seeds_give_a_mean_and_students_interval(stored: tuple[ImageSet, FeatureStore]) -> None:
    images, store = stored
    setting = {"head": "linear", "lr": 1e-2}
    (folded,) = sweep(staged(), images, store, [setting], folds=3, split_seed=4, **OPTIONS).members
    values = [
        alone(stored, 1e-2, head="linear", images=fold).evaluate()["accuracy"] for fold in images.folds(3, seed=4)
    ]
    assert [each["accuracy"] for each in folded.parts] == values
    ends = ttest_1samp(values, 0).confidence_interval(0.95)
    assert folded.interval("accuracy") == pytest.approx((ends.low, ends.high))
    found = sweep(staged(), images, store, [{**setting, "head": "mlp", "seed": 5}], repeats=2, **OPTIONS)
    accuracies = [alone(stored, 1e-2, head="mlp", seed=seed).evaluate()["accuracy"] for seed in (5, 6)]
    assert [each["accuracy"] for each in found.members[0].parts] == accuracies
    assert found.table[0]["accuracy"] == pytest.approx(np.mean(accuracies))


def test_of_folds_the_best_is_fitted_anew(stored: tuple[ImageSet, FeatureStore]) -> None:
    found = sweep(staged(), *stored, [{"head": "linear", "lr": 1e-2}], folds=2, **OPTIONS)
    expected = alone(stored, 1e-2, head="linear").predict_proba(stored[0])
    assert_allclose(found.best().predict_proba(stored[0]), expected, atol=1e-5)


def test_several_backbones_are_chosen_from_by_name(stored: tuple[ImageSet, FeatureStore]) -> None:
    images, store = stored
    extract(staged(1), images, store, cuts=["layer2"], dtype="float32", device="cpu", workers=0)
    models = {"one": staged(), "two": staged(1)}
    found = sweep(
        models, images, store, Grid({"backbone": ["one", "two"], "lr": [1e-2], "head": ["linear"]}), **OPTIONS
    )
    own = {each.setting["backbone"]: each.parts[0]["valid_loss"] for each in found.members}
    for name, model in models.items():
        options = {key: value for key, value in OPTIONS.items() if key != "epochs"}
        learn = Learner(model, images, store, head="linear", **options)
        assert own[name] == pytest.approx(learn.fit(2, 1e-2).last["valid_loss"], **CLOSE)
    with pytest.raises(ValueError, match="backbone 'three'; expected one of one, two"):
        sweep(models, images, store, [{"backbone": "three"}], **OPTIONS)


def test_halving_drops_the_worst_at_each_rung_and_says_so(stored: tuple[ImageSet, FeatureStore]) -> None:
    settings: list[dict[str, Any]] = [
        {"head": head, "lr": lr} for head in ("linear", "mlp", "concat:hidden=") for lr in (1e-6, 1e-3, 1e-2)
    ]
    settings[-1]["clip"] = 1.0  # trained alone
    options = {**OPTIONS, "epochs": 9}
    whole = {each.name: each for each in sweep(staged(), *stored, settings, monitor="valid_loss", **options).members}
    found = sweep(staged(), *stored, settings, halving=3, monitor="valid_loss", **options)
    assert rungs(9, 3, 9) == [1, 3]
    assert sorted(each.epochs for each in found.members) == [1] * 6 + [3] * 2 + [9]
    for each in found.members:  # as far as it went, it went as it goes alone
        assert each.curves[0] == pytest.approx(whole[each.name].curves[0][: each.epochs], **CLOSE)
    first = sorted(whole.values(), key=lambda each: each.curves[0][0])[:3]
    assert {each.name for each in found.members if each.epochs > 1} == {each.name for each in first}
    assert found.table[-1]["ended"] == "dropped after 1 of 9 epochs"
    assert "successive halving: one of 3 went on" in found.foot
    assert found.members[0].is_whole


def test_a_setting_that_fails_is_told_and_the_others_go_on(
    stored: tuple[ImageSet, FeatureStore], tmp_path: Path
) -> None:
    settings = [{"head": "mlp", "lr": lr, "schedule": "constant"} for lr in (1e-2, 1e35)]
    found = sweep(staged(), *stored, settings, out=tmp_path, **{**OPTIONS, "epochs": 3})
    assert found.table[-1]["ended"].startswith("The training loss became")
    assert math.isnan(found.table[-1]["accuracy"])
    again = sweep(staged(), *stored, settings, out=tmp_path, **{**OPTIONS, "epochs": 3})
    assert repr(again) == repr(found)


def test_finished_settings_are_kept_and_never_trained_again(
    stored: tuple[ImageSet, FeatureStore], tmp_path: Path
) -> None:
    settings = Grid({"head": ["linear", "mlp"], "lr": [1e-3, 1e-2]})
    found = sweep(staged(), *stored, settings, out=tmp_path, **OPTIONS)
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    again = sweep(staged(), *stored, settings, out=tmp_path, **OPTIONS)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == written
    assert repr(again) == repr(found)
    assert torch.equal(
        torch.from_numpy(again.best().predict_proba(stored[0])), torch.from_numpy(found.best().predict_proba(stored[0]))
    )
    told = json.loads((tmp_path / f"member-{found.members[0].name}" / "run.json").read_text())
    assert told["kind"] == "sweep-member"
    assert told["scores"]["accuracy"]["value"] == found.table[0]["accuracy"]
    assert told["keys"] == [stored[1].set(told["keys"][0]).key]
    with pytest.raises(FeatureStoreError, match="holds a sweep already"):
        sweep(staged(), *stored, settings, out=tmp_path, resume=False, **OPTIONS)
    with pytest.raises(FeatureStoreError, match="one setting of a sweep, of which the head alone is kept"):
        Learner.load(tmp_path / f"member-{found.members[0].name}")


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"folds": 2}, "folds"),
        ({"split": True}, "split"),
        ({"labels": True}, "labels"),
        ({"model": True}, "features"),
        ({"weight_decay": 0.5}, "options"),
    ],
)
def test_a_folder_of_another_sweep_is_refused_by_what_differs(
    stored: tuple[ImageSet, FeatureStore], tmp_path: Path, change: dict[str, Any], name: str
) -> None:
    images, store = stored
    setting = [{"head": "linear", "lr": 1e-2}]
    sweep(staged(), images, store, setting, out=tmp_path, **OPTIONS)
    options = {**OPTIONS, **change}
    if options.pop("split", False):
        images = images.with_splits(["valid"] * VALID + ["train"] * (COUNT - VALID))
    if options.pop("labels", False):
        images = replace(images, targets=np.roll(np.asarray(images.targets), 1))
    if options.pop("model", False):
        extract(staged(7), images, store, cuts=["layer2"], dtype="float32", device="cpu", workers=0)
        with pytest.raises(FactsDifferError, match=rf"differs in: {name} \("):
            sweep(staged(7), images, store, setting, out=tmp_path, **options)
        return
    with pytest.raises(FactsDifferError, match=rf"differs in: {name}"):
        sweep(staged(), images, store, setting, out=tmp_path, **options)


def test_shares_of_a_sweep_make_one_table(stored: tuple[ImageSet, FeatureStore], tmp_path: Path) -> None:
    settings = Grid({"head": ["linear"], "lr": [1e-3, 2e-3, 5e-3, 1e-2, 2e-2]})
    whole = sweep(staged(), *stored, settings, **OPTIONS)
    first = sweep(staged(), *stored, settings, out=tmp_path, shard=(0, 2), **OPTIONS)
    assert 0 < first.num_missing < 5
    assert f"{first.num_missing} setting" in first.foot
    both = sweep(staged(), *stored, settings, out=tmp_path, shard=(1, 2), **OPTIONS)
    assert same_scores(both, whole)


def same_scores(one: Sweep, other: Sweep) -> bool:
    assert [each.name for each in one.members] == [each.name for each in other.members]
    for each, its in zip(one.members, other.members, strict=True):
        assert {**each.parts[0], "seconds": 0} == pytest.approx({**its.parts[0], "seconds": 0}, **CLOSE)
        assert each.epochs == its.epochs
    return True


KILLED = """
import sys
from featstore import FeatureStore, ImageSet
from support.tiny import pixels, staged
from training import Grid, sweep
from training import sweeps

sweeps._MOST_TOGETHER = 2  # a wave of two settings, so that some are done before the others
images = ImageSet.from_arrays(pixels({count}), [row % 3 for row in range({count})],
    splits=["train"] * {train} + ["valid"] * {valid})
settings = Grid({{"head": ["linear"], "lr": [1e-3 * 1.5**n for n in range(8)]}})
found = sweep(staged(), images, FeatureStore(sys.argv[1]), settings, out=sys.argv[2], cut="layer2", batch_size=8,
    device="cpu", workers=0, quiet=True, epochs=2)
print(len(found.members))
"""


def test_a_killed_sweep_goes_on_without_repeating_and_ends_with_the_same_table(
    stored: tuple[ImageSet, FeatureStore], tmp_path: Path, processes: Processes
) -> None:
    images, store = stored
    code = KILLED.format(count=COUNT, train=COUNT - VALID, valid=VALID)
    started = processes.start(code, str(store.folder), str(tmp_path / "out"))
    deadline = time.monotonic() + 120
    while not [*(tmp_path / "out").glob("member-*/run.json")]:
        assert time.monotonic() < deadline, started.err.read_text(encoding="utf-8")
        time.sleep(0.001)
    os.kill(started.pid, signal.SIGKILL)
    assert processes.end(started).returncode == -signal.SIGKILL
    done = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("member-*/run.json")}
    assert 0 < len(done) < 8
    settings = Grid({"head": ["linear"], "lr": [1e-3 * 1.5**n for n in range(8)]})
    found = sweep(staged(), images, store, settings, out=tmp_path / "out", **OPTIONS)
    assert {path: path.stat().st_mtime_ns for path in done} == done
    assert same_scores(found, sweep(staged(), images, store, settings, **OPTIONS))


def test_a_tuner_tries_one_setting_and_sees_each_epoch(stored: tuple[ImageSet, FeatureStore]) -> None:
    seen: list[float] = []
    scores = try_settings(
        staged(), *stored, {"head": "mlp", "lr": 1e-2}, report=lambda record: seen.append(record["accuracy"]), **OPTIONS
    )
    learn = alone(stored, 1e-2, head="mlp")
    assert seen == [each["accuracy"] for each in learn.history.records]
    assert scores["valid_loss"] == learn.history.last["valid_loss"]


def test_samples_are_drawn_by_their_seed_within_their_ranges() -> None:
    values: dict[str, Any] = {"lr": log_uniform(1e-4, 1e-1), "weight_decay": uniform(0, 1), "head": ["linear", "mlp"]}
    for method in ("random", "sobol"):
        drawn = Sample(values, n=50, method=method, seed=1).settings()
        assert drawn == Sample(values, n=50, method=method, seed=1).settings()
        assert drawn != Sample(values, n=50, method=method, seed=2).settings()
        rates = np.array([each["lr"] for each in drawn])
        assert 1e-4 <= rates.min() < 5e-4
        assert 5e-2 < rates.max() < 1e-1
        assert {each["head"] for each in drawn} == {"linear", "mlp"}
    halves = [each["head"] for each in Sample(values, n=32, method="sobol").settings()]
    assert halves.count("mlp") == 16  # a sequence of points leaves no gaps


def test_grids_say_what_they_cant_vary() -> None:
    with pytest.raises(ValueError, match=r"no setting 'weight_decai'.* Did you mean weight_decay"):
        Grid({"weight_decai": [0.1]})
    with pytest.raises(ValueError, match="lr is a range"):
        Grid({"lr": uniform(0, 1)})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="expected the values to try in a list"):
        Grid({"head": "linear"})
    with pytest.raises(ValueError, match="expected a number above 0"):
        log_uniform(0, 1)
    assert as_settings({"lr": [1, 2, 1]}) == [{"lr": 1}, {"lr": 2}]


def test_what_makes_no_sense_together_is_refused_before_anything_is_trained(
    stored: tuple[ImageSet, FeatureStore],
) -> None:
    images, store = stored
    setting = [{"lr": 1e-2}]
    refused: list[tuple[dict[str, Any], str]] = [
        ({"folds": 2, "repeats": 2}, "two kinds of several fits"),
        ({"folds": 2, "keep": "best"}, "keep would choose by the images held out"),
        ({"checkpoint": "x"}, "checkpoint is of a single fit"),
        ({"halving": 1}, "halving is 1"),
        ({"monitor": "beauty"}, "monitor is 'beauty'"),
    ]
    for options, why in refused:
        with pytest.raises(ValueError, match=why):
            sweep(staged(), images, store, setting, **{**OPTIONS, **options})
    with pytest.raises(ValueError, match="No image is held out"):
        sweep(staged(), images.with_splits(["train"] * COUNT), store, setting, **OPTIONS)


def test_folds_hold_copies_of_an_image_out_together() -> None:
    labels = np.random.default_rng(0).integers(0, 2, 20)  # which nothing in the images tells
    images = ImageSet.from_arrays(pixels(20)[[*range(20), *range(20)]], [*labels, *labels])
    options = {**OPTIONS, "epochs": 20, "split_seed": 1}
    (found,) = sweep(staged(), images, None, [{"head": "linear", "lr": 3e-2}], folds=4, **options).members
    assert found.mean("accuracy") < 0.7  # more where copies are trained on


def test_a_head_of_ones_own_is_told_from_others_by_what_it_computes() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        one, other = (torch.nn.Sequential(torch.nn.Linear(4, 3)) for _ in range(2))
    same = torch.nn.Sequential(torch.nn.Linear(4, 3))
    same.load_state_dict(one.state_dict())
    digests = [setting_digest({"head": head}) for head in (one, other, same)]
    assert digests[0] == digests[2] != digests[1]


def test_a_share_and_a_backbone_that_there_are_not_are_refused(stored: tuple[ImageSet, FeatureStore]) -> None:
    setting = [{"head": "linear", "lr": 1e-2}]
    with pytest.raises(ValueError, match=r"shard is \(3, 2\); expected"):
        sweep(staged(), *stored, setting, shard=(3, 2), **OPTIONS)
    with pytest.raises(ValueError, match="other"):
        sweep(staged(), *stored, [{**setting[0], "backbone": "other"}], **OPTIONS)


def test_a_fit_that_patience_ended_is_whole_and_one_that_halving_dropped_is_not(
    stored: tuple[ImageSet, FeatureStore], tmp_path: Path
) -> None:
    options = {**OPTIONS, "epochs": 8, "patience": 1, "monitor": "valid_loss", "out": tmp_path / "patient"}
    settings = Grid({"head": ["linear"], "lr": [1e-5, 0.3]})
    for _ in range(2):  # as it was trained, and as it is read back
        patient = sweep(staged(), *stored, settings, **options)
        assert min(each.epochs for each in patient.members) < 8
        assert all(each.is_whole for each in patient.members)
        losses = [each.mean("valid_loss") for each in patient.members]
        assert losses == sorted(losses)
    rates = Grid({"head": ["linear"], "lr": [1e-4, 1e-3, 1e-2], "patience": [None]})
    halved = sweep(staged(), *stored, rates, halving=2, **{**OPTIONS, "epochs": 4})
    assert [each.is_whole for each in halved.members] == [each.epochs == 4 for each in halved.members]
    assert not halved.members[-1].is_whole


def test_images_that_are_held_out_and_trained_on_are_told_with_the_scores() -> None:
    images = ImageSet.from_arrays(
        pixels(12)[[*range(12), *range(6)]], [row % 2 for row in [*range(12), *range(6)]],
        splits=["train"] * 12 + ["valid"] * 6,
    )  # fmt: skip
    found = sweep(staged(), images, None, [{"head": "linear", "lr": 1e-2}], **OPTIONS)
    assert "6 held-out images are byte for byte the same as images in another split" in found.foot
