"""Sweeps: each setting comes to what it comes to alone; what is finished stays finished; another sweep is refused.

Long, since what a sweep tries, keeps and tells is tested on the same stored features.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import math
import os
import re
import shutil
import signal
import sys
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
from support.tiny import VIEW, net, pixels, staged

from featstore import Augment, DamagedFileError, FactsDifferError, FeatureStore, FeatureStoreError, ImageSet, extract
from training import FeatureNoise, Grid, Learner, Mixup, Sample, Sweep, log_uniform, sweep, try_settings, uniform
from training.experiments.grid import as_settings, setting_digest
from training.experiments.sweep_folder import SweepFolder
from training.experiments.sweeps import rungs
from training.scores.metrics import wilson_interval
from training.sidecar import Dealt

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
        {"head": "linear", "lr": 1e-2, "sampling": "balanced"},
    ]
    words = [
        "linear", "linear", "linear", "mlp:hidden=5,dropout=0.2", "mlp:hidden=5,dropout=0.4", "mlp:hidden=6+4",
        "concat:hidden=", "attention:queries=2", "linear", "linear", "linear", "concat", "linear",
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
            for name in ("weight_decay", "schedule", "label_smoothing", "mix", "clip", "sampling")
            if name in given
        }
        learn = alone(stored, fit=fit, **{**given, "head": word})
        member = of_name[setting_digest(setting)]
        expected = {name: value for name, value in learn.history.last.items() if name != "seconds"}
        assert {name: member.parts[0][name] for name in expected} == pytest.approx(expected, **CLOSE), setting
        assert member.interval("accuracy") == wilson_interval(round(expected["accuracy"] * VALID), VALID)
    assert [*found.frame()] == [*found.table[0]]
    assert "the best of 13 is chosen by the images that score it" in repr(found)
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
    pairs = [row // 2 for row in range(COUNT)]
    (folded,) = sweep(staged(), images, store, [setting], folds=3, split_seed=4, groups=pairs, **OPTIONS).members
    values = [
        alone(stored, 1e-2, head="linear", images=fold).evaluate()["accuracy"]
        for fold in images.folds(3, seed=4, groups=pairs)
    ]
    assert [each["accuracy"] for each in folded.parts] == values
    ends = ttest_1samp(values, 0).confidence_interval(0.95)
    assert folded.interval("accuracy") == pytest.approx((ends.low, ends.high))
    assert folded.score("accuracy").by == "student"
    found = sweep(staged(), images, store, [{**setting, "head": "mlp", "seed": 5}], repeats=2, **OPTIONS)
    scores = [alone(stored, 1e-2, head="mlp", seed=seed).evaluate() for seed in (5, 6)]
    for part, score in zip(found.members[0].parts, scores, strict=True):
        assert part["accuracy"] == score["accuracy"]
        assert part["valid_loss"] == pytest.approx(score["loss"])
    assert found.table[0]["accuracy"] == pytest.approx(np.mean([each["accuracy"] for each in scores]))


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
    stored: tuple[ImageSet, FeatureStore], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Grid({"head": ["linear", "mlp"], "lr": [1e-3, 1e-2]})
    found = sweep(staged(), *stored, settings, out=tmp_path, **OPTIONS)
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    again = sweep(staged(), *stored, settings, out=os.path.relpath(tmp_path), **OPTIONS)
    monkeypatch.chdir("/")  # its folder stays where it was
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == written
    assert repr(again) == repr(found)
    assert torch.equal(
        torch.from_numpy(again.best().predict_proba(stored[0])), torch.from_numpy(found.best().predict_proba(stored[0]))
    )
    expected = alone(stored, found.members[0].setting["lr"], head=found.members[0].setting["head"]).history
    for learn in (found.best(), again.best()):
        for own, other in zip(learn.history.records, expected.records, strict=True):
            assert {**own, "seconds": 0} == pytest.approx({**other, "seconds": 0}, **CLOSE)
        assert learn.history.monitor.name == "accuracy"
        for steps, others in zip(learn.history.steps().values(), expected.steps().values(), strict=True):
            assert steps == pytest.approx(others, **CLOSE)
    told = json.loads((tmp_path / f"member-{found.members[0].name}" / "run.json").read_text())
    assert told["scores"]["accuracy"]["by"] == "wilson"
    assert told["kind"] == "sweep-member"
    assert told["scores"]["accuracy"]["value"] == found.table[0]["accuracy"]
    assert told["keys"] == [stored[1].set(told["keys"][0]).key]
    with pytest.raises(FeatureStoreError, match="holds a sweep already"):
        sweep(staged(), *stored, settings, out=tmp_path, resume=False, **OPTIONS)
    best, second = (tmp_path / f"member-{each.name}" for each in found.members[:2])
    with pytest.raises(FeatureStoreError, match="one setting of a sweep, of which the head alone is kept"):
        Learner.load(best)
    shutil.rmtree(best)
    second.rename(best)
    with pytest.raises(DamagedFileError, match="doesn't hold the setting that it is named after"):
        sweep(staged(), *stored, settings, out=tmp_path, **OPTIONS)
    for content in ("null", "[1]"):
        (tmp_path / "sweep.json").write_text(content)
        with pytest.raises(DamagedFileError, match=re.escape(f"it holds {content}, no facts by name")):
            sweep(staged(), *stored, settings, out=tmp_path, **OPTIONS)


def test_a_folder_of_another_sweep_is_refused_by_what_differs(
    stored: tuple[ImageSet, FeatureStore], tmp_path: Path
) -> None:
    images, store = stored
    setting = [{"head": "linear", "lr": 1e-2}]
    sweep(staged(), images, store, setting, out=tmp_path, **OPTIONS)
    changes: dict[str, dict[str, Any]] = {
        "folds": {"folds": 2},
        "repeats": {"repeats": 2},
        "split_seed": {"split_seed": 3},
        "monitor": {"monitor": "valid_loss"},
        "halving": {"halving": 2},
        "options: weight_decay": {"weight_decay": 0.5},
    }
    for name, options in changes.items():
        with pytest.raises(FactsDifferError, match=rf"differs in: {name}"):
            sweep(staged(), images, store, setting, out=tmp_path, **OPTIONS, **options)
    others = {
        "split": images.with_splits(["valid"] * VALID + ["train"] * (COUNT - VALID)),
        "labels": replace(images, targets=np.roll(np.asarray(images.targets), 1)),
        "classes": replace(images, classes=("a", "b", "c")),
    }
    for name, other in others.items():
        with pytest.raises(FactsDifferError, match=rf"differs in: {name} "):
            sweep(staged(), other, store, setting, out=tmp_path, **OPTIONS)
    extract(staged(7), images, store, cuts=["layer2"], dtype="float32", device="cpu", workers=0)
    with pytest.raises(FactsDifferError, match=r"differs in: features: cut layer2 \("):
        sweep(staged(7), images, store, setting, out=tmp_path, **OPTIONS)
    assert len(sweep(staged(), images, store, setting, out=tmp_path, **OPTIONS).members) == 1
    folded = {"folds": 2, "out": tmp_path / "folded", **OPTIONS}
    sweep(staged(), images, store, setting, **folded)
    pairs = [str(place // 2) for place in range(COUNT)]
    for other, groups in ((replace(images, groups=tuple(pairs)), None), (images, pairs)):
        with pytest.raises(FactsDifferError, match="differs in: folds_dealt"):
            sweep(staged(), other, store, setting, groups=groups, **folded)
    with pytest.raises(ValueError, match="groups are for folds, and there are none"):
        sweep(staged(), images, store, setting, groups=pairs, **OPTIONS)


def test_a_sweep_of_images_is_of_its_view_and_one_of_kept_heads_of_their_weights(tmp_path: Path) -> None:
    images, model = ImageSet.from_arrays(pixels(9), [0, 1, 2] * 3).split(valid=0.34), staged()
    setting: list[dict[str, Any]] = [{"lr": 1e-3}]
    options: dict[str, Any] = {"epochs": 1, "quiet": True, "device": "cpu", "workers": 0}
    sweep(model, images, None, setting, out=tmp_path / "views", head="linear", **options)
    smaller = model.with_(view=model.view.resized(size=VIEW.size // 2))
    with pytest.raises(FactsDifferError, match="differs in: features: default"):
        sweep(smaller, images, None, setting, out=tmp_path / "views", head="linear", **options)
    module = net()
    sweep(module, images, None, setting, out=tmp_path / "kept", head="keep", **options)
    with torch.no_grad():
        [*module.parameters()][-1].add_(1)
    with pytest.raises(FactsDifferError, match="differs in: features: default, head kept"):
        sweep(module, images, None, setting, out=tmp_path / "kept", head="keep", **options)


def test_settings_and_cuts_can_be_added_to_a_sweep_and_those_that_are_done_are_not_trained_again(
    stored: tuple[ImageSet, FeatureStore], tmp_path: Path
) -> None:
    rates: dict[str, Any] = {"head": ["linear"], "lr": [1e-3, 1e-2]}
    first = sweep(staged(), *stored, Grid(rates), out=tmp_path, **OPTIONS)
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("run.json")}
    more = [*Grid(rates).settings(), {"head": "linear", "lr": 1e-2, "cut": "layer1"}]
    grown = sweep(staged(), *stored, more, out=tmp_path, **OPTIONS)
    assert {path: path.stat().st_mtime_ns for path in written} == written
    assert {each.name for each in grown.members} > {each.name for each in first.members}
    assert same_scores(grown, sweep(staged(), *stored, more, **OPTIONS))
    halved = {**OPTIONS, "out": tmp_path / "halved", "halving": 2}
    sweep(staged(), *stored, Grid(rates), **halved)
    with pytest.raises(FactsDifferError, match=r"settings: .* there, .* here.*none can be added to it"):
        sweep(staged(), *stored, more, **halved)
    anew = sweep(staged(), *stored, more, overwrite=True, **halved)
    assert same_scores(anew, sweep(staged(), *stored, more, **{**halved, "out": None}))
    sweep(staged(), *stored, more[2:], out=tmp_path, **OPTIONS)  # fewer, of which the others' places are kept
    assert {*json.loads((tmp_path / "sweep.json").read_text())["features"]} == {"cut layer1", "cut layer2"}


def test_what_is_refused_leaves_the_folder_as_it_was_and_a_sweep_can_begin_anew(
    stored: tuple[ImageSet, FeatureStore], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    options: dict[str, Any] = {**OPTIONS, "out": out, "resume": False}
    good = [{"head": "linear", "lr": 1e-2}]
    for wrong in ({"head": "mlp", "dropout": 2.0}, {"head": "linear", "lr": {"nowhere": 1e-3}}):
        with pytest.raises(ValueError, match=r"dropout|nowhere"):
            sweep(staged(), *stored, [*good, wrong], **options)
        assert not out.exists()
    with pytest.raises(ValueError, match="class_weights"):  # which only a fit sees
        sweep(staged(), *stored, [{**good[0], "class_weights": [1.0, 2.0]}], weight_decay=0.5, **options)
    sweep(staged(), *stored, good, **options)
    with pytest.raises(FeatureStoreError, match=r"holds a sweep already.*overwrite=True"):
        sweep(staged(), *stored, good, weight_decay=0.5, **options)
    (out / "best").mkdir()
    with pytest.raises(ValueError, match="weight_decay"):
        sweep(staged(), *stored, good, overwrite=True, weight_decay=-1.0, **options)
    assert len([*out.iterdir()]) == 3
    other = sweep(staged(), *stored, [{"head": "linear", "lr": 3e-3}], overwrite=True, weight_decay=0.5, **options)
    assert {each.name for each in out.iterdir()} == {"sweep.json", f"member-{other.members[0].name}"}


def test_a_sweep_in_whose_folder_another_has_begun_writes_nothing_more(
    stored: tuple[ImageSet, FeatureStore], tmp_path: Path
) -> None:
    first, second = SweepFolder(tmp_path), SweepFolder(tmp_path)
    first.begin({"folds": 2, "features": {}}, resume=True)
    second.begin({"folds": 3, "features": {}}, resume=True)  # nothing is done yet
    learn = alone(stored, 1e-2, head="linear")
    given: dict[str, Any] = {"learner": learn, "weights": learn.model.unfrozen, "result": {"setting": {}}, "scores": {}}
    given |= {"seconds": 0.0, "scored_on": Dealt(1, "0")}
    with pytest.raises(FactsDifferError, match="Another sweep has begun"):
        first.write("one", **given)
    second.write("one", **given)


def test_shares_of_a_sweep_make_one_table(stored: tuple[ImageSet, FeatureStore], tmp_path: Path) -> None:
    settings = Grid({"head": ["linear"], "lr": [1e-3, 2e-3, 5e-3, 1e-2, 2e-2]})
    whole = sweep(staged(), *stored, settings, **OPTIONS)
    first = sweep(staged(), *stored, settings, out=tmp_path, shard=(0, 2), **OPTIONS)
    assert 0 < first.num_missing < 5
    assert f"{first.num_missing} setting" in first.foot
    both = sweep(staged(), *stored, settings, out=tmp_path, shard=(1, 2), **OPTIONS)
    assert same_scores(both, whole)


def same_tables(one: Sweep, other: Sweep) -> bool:
    """The scores of settings that failed are none."""
    assert [each["ended"] for each in one.table] == [each["ended"] for each in other.table]
    own, expected = ([each.mean(one.monitor.name) for each in table.members] for table in (one, other))
    assert_allclose(own, expected, rtol=CLOSE["rel"])
    assert [(each.name, each.epochs) for each in one.members] == [(each.name, each.epochs) for each in other.members]
    return True


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
from training.experiments import trials

trials._MOST_TOGETHER = 2  # a wave of two settings, so that some are done before the others
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


def test_a_halved_sweep_that_is_killed_anywhere_ends_with_the_table_of_one_that_was_not(
    stored: tuple[ImageSet, FeatureStore], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: list[dict[str, Any]] = [
        {"head": "mlp", "lr": 1e35, "schedule": "constant"},  # fails in its first epoch
        {"head": "linear", "lr": 1e-6, "epochs": 9},
        {"head": "linear", "lr": 3e-2, "epochs": 2},
        {"head": "linear", "lr": 3e-3},
        {"head": "linear", "lr": 1e-2},
    ]
    options = {**OPTIONS, "epochs": 4, "halving": 2, "monitor": "valid_loss"}
    whole = sweep(staged(), *stored, settings, **options)
    assert len({each.epochs for each in whole.members}) > 3
    write, decide = SweepFolder.write, SweepFolder.decide

    def killed_at(number: int) -> list[str]:
        steps: list[str] = []

        def counted(self: SweepFolder, *given: Any, **named: Any) -> None:
            if len(steps) == number:
                raise KeyboardInterrupt
            step = decide if not named else write
            step(self, *given, **named)
            steps.append(step.__name__)

        monkeypatch.setattr(SweepFolder, "write", counted)
        monkeypatch.setattr(SweepFolder, "decide", counted)
        with pytest.raises(KeyboardInterrupt) as ended:
            sweep(staged(), *stored, settings, out=tmp_path / str(number), **options)
        monkeypatch.undo()
        assert f"{steps.count('write')} setting" in ended.value.__notes__[0]
        assert "--resume (in Python: resume=True) goes on from there" in ended.value.__notes__[0]
        return steps

    for number in (2, 4, 7):  # within the first rung, before the last decision, within what is left at the end
        steps = killed_at(number)
        assert steps == ["decide", "write", "write", "decide", "write", "decide", "write", "write"][:number]
        found = sweep(staged(), *stored, settings, out=tmp_path / str(number), **options)
        assert same_tables(found, whole), f"killed after {', '.join(steps)}"


def test_a_tuner_tries_one_setting_and_sees_each_epoch(stored: tuple[ImageSet, FeatureStore]) -> None:
    seen: list[float] = []
    scores = try_settings(
        staged(), *stored, {"head": "mlp", "lr": 1e-2}, report=lambda record: seen.append(record["accuracy"]), **OPTIONS
    )
    learn = alone(stored, 1e-2, head="mlp")
    assert seen == [each["accuracy"] for each in learn.history.records]
    assert scores["valid_loss"] == learn.history.last["valid_loss"]


def test_one_monitor_holds_for_what_is_kept_and_what_is_waited_for(stored: tuple[ImageSet, FeatureStore]) -> None:
    options: dict[str, Any] = {**OPTIONS, "epochs": 9, "keep": "best", "patience": 2, "schedule": "constant"}
    setting, fit = {"head": "mlp", "lr": 3e-2}, {name: options[name] for name in ("keep", "patience", "schedule")}
    lengths = set()
    for name in ("train_loss", "valid_loss", "accuracy"):
        seen: list[Any] = []
        scores = try_settings(staged(), *stored, setting, monitor=name, report=seen.append, **options)
        learn = alone(stored, 3e-2, 9, head="mlp", fit={**fit, "monitor": name})
        assert {**scores, "seconds": 0} == {
            **{key: value for key, value in learn.history.best.items() if key not in ("epoch", "lr")},
            "seconds": 0,
        }
        assert len(seen) == len(learn.history.records)
        lengths.add((len(seen), learn.history.best_epoch))
    assert len(lengths) > 1


@pytest.mark.parametrize("folds", [None, 3])
def test_what_should_be_known_of_the_images_is_told_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], folds: int | None
) -> None:
    labels = [0] * 30 + [1] * 3 + [0] * 15 + [1]  # of folds some hold out two of the rare, and others one
    images = ImageSet.from_arrays(pixels(49), labels, splits=["train"] * 33 + ["valid"] * 16)
    settings = Grid({"head": ["linear", "mlp"], "lr": [1e-2], "dropout": [0.0, 0.5]})
    options = {**OPTIONS, "epochs": 1, "folds": folds, "quiet": False}
    found = sweep(staged(), images, None, settings, out=tmp_path / "out", **options)
    said = capsys.readouterr().err
    assert said.count("which counts for little beside it") == 1
    assert "4 of 4 settings done" in said
    assert "1 of 4 settings: equal to another one but for dropout, which their head doesn't have" in said
    assert len({each.mean("valid_loss") for each in found.members}) == 3
    assert "optimizer steps a fit, which may be too few for a head with hidden layers" in said
    found = sweep(staged(), images, None, settings, **{**options, "quiet": True})
    assert not capsys.readouterr().err
    found.best().fit(1, 1e-2)
    assert "which counts for little beside it" in capsys.readouterr().err


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
        ({"head": torch.nn.Linear(4, 3), "hidden": 8}, "a Linear of your own, .* so hidden would change nothing"),
        ({"head": "mlp:hidden=4", "hidden": 8}, "says its hidden, and hidden is set to 8"),
    ]
    for options, why in refused:
        with pytest.raises(ValueError, match=why):
            sweep(staged(), images, store, setting, **{**OPTIONS, **options})
    with pytest.raises(TypeError, match=r"A sweep has no option 'epoch'. Did you mean epochs\?"):
        sweep(staged(), images, store, setting, **OPTIONS, epoch=3)
    with pytest.raises(TypeError, match=r"images are FeatureStore.* expected an image set"):
        sweep(staged(), store, images, setting, **OPTIONS)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no setting 'rate'"):
        try_settings(staged(), images, store, {"rate": 1e-2}, **OPTIONS)
    with pytest.raises(ValueError, match="No image is held out"):
        sweep(staged(), images.with_splits(["train"] * COUNT), store, setting, **OPTIONS)


def test_folds_hold_copies_of_an_image_out_together(tmp_path: Path) -> None:
    labels = np.random.default_rng(0).integers(0, 2, 20)  # which nothing in the images tells
    images = ImageSet.from_arrays(pixels(20)[[*range(20), *range(20)]], [*labels, *labels])
    store = FeatureStore(tmp_path)
    extract(staged(), images, store, cuts=["layer2"], device="cpu", workers=0)
    options = {**OPTIONS, "epochs": 20, "split_seed": 1}
    (found,) = sweep(staged(), images, store, [{"head": "linear", "lr": 3e-2}], folds=4, **options).members
    assert found.mean("accuracy") < 0.7  # more where copies are trained on


class Faster:
    """Makes optimizers, and doesn't show how."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def __call__(self, groups: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(groups, lr=1e-3 * self.factor)


def test_a_head_of_ones_own_is_told_from_others_by_what_it_computes() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        one, other = (torch.nn.Sequential(torch.nn.Linear(4, 3)) for _ in range(2))
    same = torch.nn.Sequential(torch.nn.Linear(4, 3))
    same.load_state_dict(one.state_dict())
    digests = [setting_digest({"head": head}) for head in (one, other, same)]
    assert digests[0] == digests[2] != digests[1]
    held = [setting_digest({"optimizer": Faster(factor)}) for factor in (2.0, 3.0, 2.0)]
    assert held[0] == held[2] != held[1]


OWN = """
import torch

def fast(groups):
    return torch.optim.AdamW(groups, betas=(0.8, 0.99))

def flipped(image, generator):
    return image.flip(-1)
"""


def own_code(path: Path, text: str) -> Any:
    """Code in a file as a new process imports it."""
    path.write_text(text)
    spec = importlib.util.spec_from_file_location("own_code_of_a_sweep", path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_code_of_ones_own_is_known_again_by_its_name_and_source(
    stored: tuple[ImageSet, FeatureStore], tmp_path: Path
) -> None:
    options = {**OPTIONS, "out": tmp_path / "out", "loss": torch.nn.CrossEntropyLoss(label_smoothing=0.1)}
    setting = [{"head": "linear", "lr": 1e-2, "mix": [FeatureNoise(0.1)]}]
    before: list[tuple[Path, int]] = []
    for workers in (0, 1):  # which decide no number
        own = own_code(tmp_path / "own.py", OWN)
        options |= {"workers": workers, "optimizer": functools.partial(own.fast)}
        sweep(staged(), *stored, setting, **options)
        written = [(path, path.stat().st_mtime_ns) for path in tmp_path.rglob("run.json")]
        before = before or written
    assert len(written) == 1
    assert written == before
    options["optimizer"] = functools.partial(own_code(tmp_path / "later.py", OWN.replace("0.8", "0.7")).fast)
    with pytest.raises(FactsDifferError, match="differs in: options: optimizer"):
        sweep(staged(), *stored, setting, **options)
    options["optimizer"] = eval("lambda groups: torch.optim.AdamW(groups)")  # of which no file has the source
    with pytest.raises(FeatureStoreError, match="nothing names <lambda>"):
        sweep(staged(), *stored, setting, **options)
    options["out"] = tmp_path / "another"
    assert len(sweep(staged(), *stored, setting, **options).members) == 1


def test_two_policies_of_one_name_have_batches_of_their_own(
    stored: tuple[ImageSet, FeatureStore], tmp_path: Path
) -> None:
    images, _ = stored
    as_is = own_code(tmp_path / "as_is.py", OWN.replace("image.flip(-1)", "image * 0")).flipped
    policies = [own_code(tmp_path / "own.py", OWN).flipped, as_is]
    augments = [Augment(each, seeds=[0]) for each in policies]
    settings = [{"head": "linear", "lr": 1e-2, "augment": each} for each in augments]
    found = sweep(staged(), images, None, settings, **OPTIONS)
    losses = {each.name: each.parts[0]["train_loss"] for each in found.members}
    assert len(losses) == 2
    for setting, augment in zip(settings, augments, strict=True):
        learn = alone((images, None), 1e-2, head="linear", augment=augment)  # type: ignore[arg-type]
        assert losses[setting_digest(setting)] == pytest.approx(learn.history.last["train_loss"], **CLOSE)


def test_a_share_and_a_backbone_that_there_are_not_are_refused(stored: tuple[ImageSet, FeatureStore]) -> None:
    setting = [{"head": "linear", "lr": 1e-2}]
    with pytest.raises(ValueError, match=r"shard is \(3, 2\); expected"):
        sweep(staged(), *stored, setting, shard=(3, 2), **OPTIONS)
    with pytest.raises(ValueError, match="other"):
        sweep(staged(), *stored, [{**setting[0], "backbone": "other"}], **OPTIONS)


def test_a_fit_that_patience_ended_is_whole_and_one_that_halving_dropped_is_not(
    stored: tuple[ImageSet, FeatureStore], tmp_path: Path
) -> None:
    options = {**OPTIONS, "epochs": 8, "patience": 1, "keep": "best", "monitor": "valid_loss", "out": tmp_path / "out"}
    settings = Grid({"head": ["linear"], "lr": [1e-5, 0.3]})
    for _ in range(2):  # as it was trained, and as it is read back
        patient = sweep(staged(), *stored, settings, **options)
        assert min(each.epochs for each in patient.members) < 8
        assert all(each.is_whole for each in patient.members)
        losses = [each.mean("valid_loss") for each in patient.members]
        assert losses == [min(each.curves[0]) for each in patient.members]
        assert any(each.curves[0][-1] > loss for each, loss in zip(patient.members, losses, strict=True))
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
