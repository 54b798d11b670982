"""The registry: runs say what decided their numbers, are found by it, and compare only on the same images."""

from __future__ import annotations

import csv
import json
import math
import shutil
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.processes import Processes
from support.tiny import arrays, pixels, staged
from torch.nn.functional import cross_entropy

from featstore import Augment, FeatureStore, ImageSet, extract
from featstore.digest import digest_json
from featstore.errors import DamagedFileError, FeatureStoreError
from featstore.models.runs import new_run, read_facts
from training import EMA, Learner, Mixup, Runs, Sidecar, runs
from training.experiments.registry import ListedRun
from training.scores.metrics import wilson_interval
from training.sidecar import Dealt, Score
from training.splits import dealt

OLD = Path(__file__).parents[2] / "data" / "run-0.1.0"


def learner(images: ImageSet | None = None, store: FeatureStore | None = None, **options: Any) -> Learner:
    images = arrays(24).split(valid=0.25) if images is None else images
    settings: dict[str, Any] = {"head": "linear", "quiet": True, "device": "cpu", **options}
    return Learner(staged(), images, store, **settings)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    store = FeatureStore(tmp_path_factory.mktemp("feats"))
    extract(staged(), arrays(24), store, cuts=["layer2"], device="cpu", progress=False)
    return store


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, store: FeatureStore) -> Path:
    """Runs: two heads of other rates, one of them fine-tuned, and one that was scored on other images."""
    root = tmp_path_factory.mktemp("work") / "runs"
    for rate in (1e-2, 3e-2):
        learn = learner(store=store)
        learn.fit(2, lr=rate)
        learn.save(root / f"lr-{rate:g}")
    tuned = Learner.load(root / "lr-0.01", arrays(24), module=staged(), quiet=True, device="cpu")
    tuned.unfreeze()
    tuned.fit(1, lr=(1e-5, 1e-3))
    tuned.save(root / "deep" / "tuned")
    other = learner(arrays(24, seed=1).split(valid=0.25), head="mlp")
    other.fit(1, lr=1e-3)
    other.save(root / "other")
    return root


# ---- what a run says of itself


def test_a_run_says_what_decided_its_numbers(folder: Path, store: FeatureStore) -> None:
    path, (each,) = folder / "lr-0.01", store.sets()
    facts = json.loads((path / "run.json").read_text())
    asked = facts["configuration"]
    expected = {"backbone": "net", "cut": "layer2", "reduce": "concat", "head": "linear", "num_classes": 2}
    fit = {"frozen_to": "layer2", "epochs": 2, "lr": 0.01, "schedule": "one_cycle", "weight_decay": 0.01, "seed": 0}
    assert {**asked, **expected, **fit} == asked
    assert (asked["optimizer"], asked["batch_size"], asked["augment"], asked["task"]) == ("adamw", 64, None, "single")
    assert (facts["kind"], facts["keys"]) == ("head", [each.key])
    assert facts["trunk"] == each.spec.trunk == read_facts(path)["model"]["digests"]["layer2"]
    assert facts["versions"]["torch"] == str(torch.__version__)
    assert facts["versions"]["numpy"] == np.__version__
    (made,) = facts["fits"]
    assert (made["reads"], made["epochs"], made["steps"], made["is_whole"]) == ("features", 2, 8, True)
    assert facts["seconds"] == made["seconds"] > 0


def test_scores_are_those_of_evaluate_with_wilson_s_interval_of_shares(folder: Path, store: FeatureStore) -> None:
    learn = Learner.load(folder / "lr-0.03", arrays(24), store, module=staged(), quiet=True, device="cpu")
    scored, sidecar = learn.evaluate(), Sidecar.read(folder / "lr-0.03")
    count = scored.pop("images")
    assert {name: each.value for name, each in sidecar.scores.items()} == scored
    accuracy = sidecar.scores["accuracy"]
    assert (accuracy.interval, accuracy.by) == (
        wilson_interval(round(scored["accuracy"] * count), int(count)),
        "wilson",
    )
    assert (sidecar.scores["f1"].interval, sidecar.scores["f1"].by) == (None, None)
    assert sidecar.scored_on is not None
    assert sidecar.scored_on.images == count


def test_a_run_says_from_which_run_it_went_on_and_that_stages_were_trained(folder: Path) -> None:
    sidecar, start = Sidecar.read(folder / "deep/tuned"), folder / "lr-0.01"
    assert sidecar.kind == "finetune"
    assert sidecar.start == {"run": str(start), "identity": digest_json(read_facts(start))}
    assert sidecar.configuration["frozen_to"] is None
    assert sidecar.configuration["lr"] == [1e-5, 1e-3]
    assert (sidecar.keys, sidecar.fits[0]["reads"]) == ((), "images")
    assert sidecar.split == Sidecar.read(start).split  # whose split it got


def test_a_learner_that_was_fitted_twice_says_both(tmp_path: Path) -> None:
    learn = learner(augment=Augment("flip", seeds="fresh"))
    learn.fit(2, lr=1e-2, average=EMA(0.9), mix=Mixup(0.4))
    learn.augment, learn.batch_size = None, 8
    learn.unfreeze()
    learn.fit(1, lr={"layer1": 1e-5, "layer2": 1e-4, "head": 1e-3}, label_smoothing=0.1, class_weights=[1, 2])
    sidecar = Sidecar.read(learn.save(tmp_path / "run"))
    asked = sidecar.configuration
    assert sidecar.kind == "finetune"
    assert (asked["num_fits"], asked["epochs"], asked["seed"]) == (2, 3, 0)
    assert asked["lr"] == "0.01 then layer1=1e-05, layer2=0.0001, head=0.001"
    assert asked["augment"] == "flip, fresh seeds then none"
    assert asked["batch_size"] == "64 then 8"
    assert asked["class_weights"] == "none then 1,2"
    assert asked["average"] == f"{EMA(0.9)!r} then none"
    assert asked["label_smoothing"] == "0 then 0.1"
    assert [fit["configuration"]["mix"] for fit in sidecar.fits] == [[repr(Mixup(0.4))], None]
    assert [fit["trains"] for fit in sidecar.fits] == ["head", "layer1, layer2, head"]


def test_a_rate_that_was_found_is_on_record_and_nothing_is_where_nothing_was_fitted(tmp_path: Path) -> None:
    learn = learner()
    saved = Sidecar.read(learn.save(tmp_path / "new"))
    assert (saved.kind, saved.seconds, [*saved.fits], "lr" in saved.configuration) == ("learner", None, [], False)
    rate = learn.lr_find().rate
    learn.fit(1)
    assert Sidecar.read(learn.save(tmp_path / "found")).configuration["lr"] == rate


def test_a_fit_that_was_interrupted_is_on_record_as_one_that_is_not_whole(tmp_path: Path) -> None:
    def stop(record: dict[str, float]) -> None:
        raise KeyboardInterrupt

    learn = learner()
    with pytest.raises(KeyboardInterrupt):
        learn.fit(3, lr=1e-2, on_epoch_end=stop)
    (fit,) = Sidecar.read(learn.save(tmp_path / "run")).fits
    assert (fit["epochs"], fit["is_whole"], fit["configuration"]["epochs"]) == (1, False, 3)


def test_a_snapshot_says_how_far_its_fit_was(tmp_path: Path) -> None:
    learner().fit_cycles(2, lr=1e-2, snapshot=tmp_path)
    fits = [Sidecar.read(each.folder).fits[0] for each in runs(tmp_path)]
    assert [(fit["epochs"], fit["is_whole"]) for fit in fits] == [(1, False), (2, True)]
    assert fits[0]["configuration"]["cycles"] == [1, 1]


def test_a_fit_that_its_own_learner_goes_on_with_is_on_record_once(tmp_path: Path) -> None:
    def stop(record: dict[str, float]) -> None:
        if record["epoch"] == 1:
            raise KeyboardInterrupt

    learn = learner()
    with pytest.raises(KeyboardInterrupt):
        learn.fit(3, lr=1e-2, on_epoch_end=stop, checkpoint=tmp_path / "fit")
    learn.fit(3, lr=1e-2, checkpoint=tmp_path / "fit", resume=True)
    sidecar = Sidecar.read(learn.save(tmp_path / "run"))
    ((fit,), configuration) = sidecar.fits, sidecar.configuration
    assert (fit["epochs"], fit["is_whole"], configuration["num_fits"], configuration["epochs"]) == (3, True, 1, 3)
    assert sidecar.seconds == pytest.approx(sum(each["seconds"] for each in learn.history.records), abs=1e-3)


def test_losses_of_different_functions_or_units_have_no_best(tmp_path: Path) -> None:
    for place, loss in enumerate((None, partial(cross_entropy, label_smoothing=0.1))):
        learn = learner(loss=loss)
        learn.fit(1, lr=1e-2)
        learn.save(tmp_path / "losses" / str(place))
    found = runs(tmp_path / "losses")
    with pytest.raises(FeatureStoreError, match="losses of 2 runs are of different functions"):
        found.best("loss")
    assert found.best("accuracy")["accuracy"] == max(each["accuracy"] for each in found)
    numbers = ImageSet.from_arrays(pixels(24), np.arange(24.0)[:, None], task="regression").split(valid=0.25)
    for place, images in enumerate((numbers, numbers.with_splits([*numbers.splits[:-2], "test", "test"]))):
        learn = learner(images)
        learn.fit(1, lr=1e-2)
        learn.images = numbers
        learn.save(tmp_path / "values" / str(place))
    found = runs(tmp_path / "values")
    with pytest.raises(FeatureStoreError, match="in units of the spread of what each was trained on"):
        found.best("loss")
    assert found.best("mae")["mae"] == min(each["mae"] for each in found)


# ---- the same images


def test_the_digest_of_a_split_is_of_contents_and_labels_whatever_their_order_names_and_table() -> None:
    shown, labels = pixels(6), ["b", "a", "b", "c", "a", "c"]
    images = ImageSet.from_arrays(shown, labels)
    expected = dealt(images, images.digests())
    order = [3, 1, 5, 0, 2, 4]
    moved = ImageSet.from_arrays(shown[order], [labels[place] for place in order], classes=["d", "c", "a", "b"])
    assert dealt(moved, moved.digests()) == expected
    for changed, named in ((shown, [*labels[:5], "a"]), (pixels(6, seed=1), labels)):
        other = ImageSet.from_arrays(changed, named)
        assert dealt(other, other.digests()) != expected
    fewer = images.select(range(5))
    assert dealt(fewer, fewer.digests()).images == 5


@pytest.mark.parametrize(("task", "labels"), [("multi", [["a"], ["a", "b"], []]), ("regression", [1.5, -2.0, 0.0])])
def test_the_digest_of_a_split_is_of_several_labels_and_of_numbers_too(task: Any, labels: list[Any]) -> None:
    classes = ["a", "b"] if task == "multi" else None
    images = ImageSet.from_arrays(pixels(3), labels, task=task, classes=classes)
    backward = ImageSet.from_arrays(pixels(3)[::-1], labels[::-1], task=task, classes=classes and classes[::-1])
    assert dealt(images, images.digests()) == dealt(backward, backward.digests())
    swapped = ImageSet.from_arrays(pixels(3), labels[::-1], task=task, classes=classes)
    assert dealt(images, images.digests()) != dealt(swapped, swapped.digests())


def test_scores_of_other_images_are_marked_and_no_best_is_named_among_them(folder: Path) -> None:
    found = runs(folder).query(sort="accuracy")
    marked = {row["run"]: row["note"] for row in found.table}
    assert marked == {"lr-0.01": None, "lr-0.03": None, "deep/tuned": None, "other": "scored on other images"}
    ours = runs(folder)[1]["scored_on"]
    assert f'their scores don\'t compare. Look at those of one set: query(scored_on="{ours}")' in str(found)
    trained = {each.name: each["trained_on"] for each in found}
    assert trained["lr-0.01"] == trained["lr-0.03"] == trained["deep/tuned"] != trained["other"]
    assert {"scored_on", "trained_on"} < {*str(found).splitlines()[0].split()}
    with pytest.raises(FeatureStoreError, match=rf'2 different sets of images .*query\(scored_on="{ours}"\)'):
        found.best("accuracy")
    alone = found.query(scored_on=ours)
    assert "note" not in alone.table[0]
    assert "_on" not in str(alone).splitlines()[0]
    assert alone.best("accuracy")["accuracy"] == max(each["accuracy"] for each in alone)
    assert alone.best("loss")["loss"] == min(each["loss"] for each in alone)
    assert found.best("loss", whatever_images=True)["loss"] == min(each["loss"] for each in found)


def test_a_score_of_images_that_were_trained_on_is_marked_and_is_not_the_best(tmp_path: Path) -> None:
    images = arrays(24)
    first, second = images.split(valid=0.25), images.split(valid=0.25, seed=3)
    leaked = sum(a == "train" and b == "valid" for a, b in zip(first.splits, second.splits, strict=True))
    learn = learner(first, allow_leak=True)
    for dealt_now in (first, second):
        learn.images = dealt_now
        learn.fit(1, lr=1e-2)
    learn.save(tmp_path / "leaky")
    fair = learner(second)
    fair.fit(1, lr=1e-2)
    fair.save(tmp_path / "fair")
    found = runs(tmp_path)
    assert {row["run"]: row["note"] for row in found.table} == {
        "fair": None,
        "leaky": f"trained on {leaked} of these images",
    }
    assert found[1]["scored_on"] == found[0]["scored_on"]
    either: list[tuple[str, Any]] = [("loss", "min"), ("loss", "max")]
    assert [found.best(score).name for score in either] == ["fair", "fair"]
    fair.save(tmp_path / "also")  # of as many runs that are fair and were scored on other images none is the best
    both = {found.best(score, whatever_images=True).name for score in either}
    assert both == {"fair", "leaky"}
    again = Learner.load(tmp_path / "leaky", second, module=staged(), quiet=True, device="cpu")
    assert Sidecar.read(again.save(tmp_path / "again")).more["scored_trained_on"] == leaked


# ---- the table


def test_runs_are_found_filtered_and_sorted(folder: Path) -> None:
    found = runs(folder)
    assert [each.name for each in found] == ["deep/tuned", "lr-0.01", "lr-0.03", "other"]

    def names(chosen: Runs) -> list[str]:
        return [each.name for each in chosen]

    assert names(found.query(lr=0.03)) == ["lr-0.03"]
    assert names(found.query(lr=(1e-5, 1e-3))) == ["deep/tuned"]
    assert names(found.query(head={"mlp", "attention"})) == ["other"]
    assert names(found.query(kind="head", frozen_to="layer2", sort="lr")) == ["other", "lr-0.01", "lr-0.03"]
    assert names(found.query(sort=("lr", "max")))[:2] == ["lr-0.03", "lr-0.01"]
    assert names(found.query(at_least={"lr": 0.01}, at_most={"lr": 0.02})) == ["lr-0.01"]
    for bound in ({"at_most": {"lr": 1}}, {"at_least": {"lr": 0}}):  # a run with several rates has no number there
        assert names(found.query(**bound)) == ["lr-0.01", "lr-0.03", "other"]  # type: ignore[arg-type]
    assert names(found.query(where=lambda run: run.sidecar.start is not None)) == ["deep/tuned"]
    losses = [each["loss"] for each in found.query(sort="loss")]
    assert losses == sorted(losses)
    assert names(found[1:3]) == ["lr-0.01", "lr-0.03"]


def test_a_column_that_no_run_has_is_named_with_what_may_have_been_meant(folder: Path) -> None:
    found = runs(folder)
    for ask in (
        lambda: found.query(acuracy=1),
        lambda: found.query(sort="acuracy"),
        lambda: found.query(at_least={"acuracy": 0.5}),
        lambda: found.best("acuracy"),
        lambda: found.in_words(["acuracy"]),
    ):
        with pytest.raises(
            ValueError, match=r"No run here has 'acuracy'\. Did you mean accuracy\? What they have: run,"
        ):
            ask()


def test_a_metric_of_ones_own_is_sorted_only_in_a_direction_that_was_said(tmp_path: Path) -> None:
    for place, value in enumerate((3.0, 1.0, math.nan, 2.0)):
        (tmp_path / f"run-{place}").mkdir()
        scores = {"regret": Score(None if math.isnan(value) else value)}
        Sidecar(scores=scores, split={"valid": Dealt(4, "a" * 64)}, scored="valid").write(tmp_path / f"run-{place}")
    found = runs(tmp_path)
    with pytest.raises(
        ValueError, match=r'whether more of it is better isn\'t known\. Say it: sort=\("regret", "max"\)'
    ):
        found.query(sort="regret")
    assert [each.name for each in found.query(sort=("regret", "min"))] == ["run-1", "run-3", "run-0", "run-2"]
    assert [each.name for each in found.query(sort=("regret", "max"))] == ["run-0", "run-3", "run-1", "run-2"]
    assert found.best(("regret", "min")).name == "run-1"


def test_a_quantity_has_one_name_and_a_number_is_one_however_a_run_wrote_it(tmp_path: Path) -> None:
    split: dict[str, Any] = {"split": {"valid": Dealt(4, "a" * 64)}, "scored": "valid"}
    for name, rate, scores in (
        ("member", "1e-2", {"valid_loss": Score(0.2, (0.1, 0.3), "student")}),
        ("run", 1e-2, {"loss": Score(0.4)}),
        ("worse", 1e-1, {"loss": Score(0.6), "valid_loss": Score(0.7)}),
    ):
        (tmp_path / name).mkdir()
        Sidecar(configuration={"lr": rate}, scores=scores, **split).write(tmp_path / name)
    found = runs(tmp_path)
    assert [(each.name, each["loss"]) for each in found.query(sort="loss")] == [
        ("member", 0.2), ("run", 0.4), ("worse", 0.6),
    ]  # fmt: skip
    assert (found[0]["loss_to"], found[0].score_columns, found[2]["valid_loss"]) == (0.3, ("loss",), 0.7)
    with pytest.raises(ValueError, match=r"No run here has 'valid_loss'\. Did you mean loss\?"):
        found[:2].query(sort="valid_loss")
    asked: list[Any] = [0.01, "0.01", "1e-2", {"1e-2"}]
    assert all([each.name for each in found.query(lr=rate)] == ["member", "run"] for rate in asked)


def test_a_row_has_scores_with_intervals_and_a_table_is_the_same_everywhere(folder: Path, tmp_path: Path) -> None:
    found = runs(folder).query(kind="head")
    frame = found.frame()
    assert list(frame.columns) == list(found.table[0])
    assert list(frame["accuracy"]) == [each.sidecar.scores["accuracy"].value for each in found]
    assert [*frame["accuracy_from"]] == [each.sidecar.scores["accuracy"].interval[0] for each in found]  # type: ignore[index]
    found.to_csv(tmp_path / "runs.csv")
    with (tmp_path / "runs.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["accuracy"]) for row in rows] == list(frame["accuracy"])
    low, high = frame["accuracy_from"][0], frame["accuracy_to"][0]
    assert f"{frame['accuracy'][0]:.3f} ({low:.3f}-{high:.3f})" in str(found)
    html = found._repr_html_()
    assert html.count("<tr>") == 1 + len(found)


def test_names_and_texts_are_shown_and_neither_run_nor_obeyed(tmp_path: Path) -> None:
    run = tmp_path / "<script>\x1b[2J"
    run.mkdir()
    Sidecar(kind="probe", configuration={"head": "=1+1", "note_": "a"}).write(run)
    (tmp_path / "b").mkdir()
    Sidecar(kind="probe", configuration={"head": "b"}).write(tmp_path / "b")
    found = runs(tmp_path)
    assert "<script>" not in found._repr_html_()
    assert "\x1b" not in str(found) + found._repr_html_()
    found.to_csv(tmp_path / "runs.csv")
    assert "'=1+1" in (tmp_path / "runs.csv").read_text()


def test_a_configuration_is_flat_and_a_kind_is_known() -> None:
    with pytest.raises(ValueError, match=r"of several names, and it is flat"):
        Sidecar(configuration={"optimizer": {"name": "sgd"}})
    with pytest.raises(ValueError, match=r"kind of a run is 'heads'; expected one of head, finetune"):
        Sidecar(kind="heads")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"seconds is a field of its own"):
        Sidecar(more={"seconds": 3})


# ---- what is and isn't a run


def test_old_runs_load_and_are_listed_with_gaps(tmp_path: Path, folder: Path) -> None:
    shutil.copytree(OLD, tmp_path / "old")
    shutil.copytree(folder / "lr-0.01", tmp_path / "new")
    shutil.copytree(folder / "lr-0.03", tmp_path / "bare")
    (tmp_path / "bare" / "run.json").unlink()  # a report may go
    found = runs(tmp_path)
    bare, new, old = found
    assert (found.damaged, old["kind"], old["accuracy"], old["scored_on"]) == ({}, None, None, None)
    assert (old["epochs"], old["batch_size"], old.sidecar.versions["featstore"]) == (3, 64, "0.1.0")
    assert (bare["cut"], bare["head"], bare["accuracy"]) == ("layer2", "linear", None)
    assert [each.name for each in found.query(sort="accuracy")] == ["new", "bare", "old"]
    assert old.load(module=staged(), quiet=True).classes == new.load(module=staged(), quiet=True).classes
    np.testing.assert_array_equal(
        found.load(1, module=staged(), quiet=True).predict_proba(arrays(3)),
        Learner.load(folder / "lr-0.01", module=staged(), quiet=True).predict_proba(arrays(3)),
    )


def test_checkpoints_hidden_and_half_written_folders_are_no_runs(tmp_path: Path, folder: Path) -> None:
    shutil.copytree(folder / "lr-0.01", tmp_path / "run")
    shutil.copytree(folder / "lr-0.01", tmp_path / ".run.new-0123456789abcdef")
    shutil.copytree(folder / "lr-0.01", tmp_path / ".cache" / "run")
    learner().fit(1, lr=1e-2, checkpoint=tmp_path / "run.checkpoint")
    learner().fit(1, lr=1e-2, checkpoint=tmp_path / "kept")
    (tmp_path / "again").symlink_to(tmp_path)  # leads up again
    (tmp_path / "notes").mkdir()
    found = runs(tmp_path)
    assert ([each.name for each in found], found.damaged) == (["run"], {})
    (tmp_path / "run").rename(tmp_path / ".run.old-0123456789abcdef")  # so a killed process may leave it
    (again,) = runs(tmp_path)
    assert (again.name, again.has_model) == ("run", True)
    assert again.load(module=staged(), quiet=True).classes == ("0", "1")


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (lambda text: text.replace('"lr": 0.01', '"lr": 0.02'), "don't fit their checksum"),
        (lambda text: text[:100], "is damaged"),
        (lambda text: "[]", "is no run's"),
        (lambda text: '{"task": "of another program"}', "is no run's"),
        (lambda text: "", "is damaged"),
        (lambda text: text.replace('"format": 1', '"format": 7'), "don't fit their checksum"),
        (lambda text: '{"format": 1, "kind": "head", "x": NaN}', "don't fit their checksum"),
    ],
)
def test_a_damaged_run_is_listed_with_the_reason_and_stays_in_every_table(
    tmp_path: Path, folder: Path, harm: Any, reason: str
) -> None:
    shutil.copytree(folder, tmp_path / "runs")
    file = tmp_path / "runs/lr-0.01/run.json"
    file.write_text(harm(file.read_text()))
    found = runs(tmp_path / "runs").query(head="linear", sort="accuracy")
    assert [*found.damaged] == ["lr-0.01"]
    assert reason in found.damaged["lr-0.01"]
    assert "lr-0.01" not in [each.name for each in found]
    assert f"1 run can't be read:\n  lr-0.01: {found.damaged['lr-0.01']}" in str(found)
    found.to_csv(tmp_path / "runs.csv")
    assert "lr-0.01" in (tmp_path / "runs.csv").read_text()
    with pytest.raises(DamagedFileError):
        Sidecar.read(file.parent)


def test_a_run_of_a_newer_format_says_so(tmp_path: Path) -> None:
    facts = {**Sidecar().facts(), "format": 2}
    facts["checksum"] = digest_json({name: value for name, value in facts.items() if name != "checksum"})
    (tmp_path / "run.json").write_text(json.dumps(facts))
    with pytest.raises(FeatureStoreError, match=r"has format 2; this featstore reads up to 1\. Upgrade featstore"):
        Sidecar.read(tmp_path)


def test_a_model_is_loaded_though_its_sidecar_is_of_a_newer_format(tmp_path: Path, folder: Path) -> None:
    with new_run(tmp_path / "run") as made:
        for file in (folder / "lr-0.01").iterdir():
            shutil.copy(file, made)
        (made / "model.json").write_text(json.dumps(read_facts(made)))  # sealed anew
        facts = {**json.loads((made / "run.json").read_text()), "format": 2}
        facts["checksum"] = digest_json({name: value for name, value in facts.items() if name != "checksum"})
        (made / "run.json").write_text(json.dumps(facts))
    found = runs(tmp_path)
    assert "Upgrade featstore to see the run" in found.damaged["run"]
    loaded = Learner.load(tmp_path / "run", module=staged(), quiet=True)
    expected = Learner.load(folder / "lr-0.01", module=staged(), quiet=True)
    np.testing.assert_array_equal(loaded.predict_proba(arrays(3)), expected.predict_proba(arrays(3)))


def test_a_record_without_a_model_is_listed_and_loads_nothing(tmp_path: Path) -> None:
    (tmp_path / "member").mkdir()
    written = Sidecar(
        kind="sweep-member",
        configuration={"lr": 1e-3, "hidden": [64, 32], "is_best": True, "mix": None},
        keys=("7c41",),
        versions={"featstore": "0.1.0"},
        split={"valid": Dealt(4, "a" * 64)},
        scored="valid",
        scores={"accuracy": Score(0.5, (0.1, 0.9), "student"), "seconds": Score(2.0)},
        seconds=1.5,
        when="2026-01-01T00:00:00+00:00",
        more={"fold": 3},
    )
    written.write(tmp_path / "member")
    written.write(tmp_path / "member")  # whole, in the place of the one before
    assert [path.name for path in (tmp_path / "member").iterdir()] == ["run.json"]
    (run,) = runs(tmp_path)
    assert run.sidecar == replace(written, fits=())
    assert (run["accuracy_to"], run["seconds"], run["score_seconds"]) == (0.9, 1.5, 2.0)
    with pytest.raises(FeatureStoreError, match="keeps what was scored, and no whole model"):
        run.load()


def test_a_folder_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="There is no folder"):
        runs(tmp_path / "nowhere")
    empty = runs(tmp_path)
    assert (len(empty), str(empty), empty.query(cut="x").table) == (0, "0 runs", [])


def test_a_thousand_runs_are_listed_quickly_and_by_their_sidecars_alone(
    tmp_path: Path, folder: Path, new_processes: Processes
) -> None:
    content = (folder / "lr-0.01" / "run.json").read_bytes()
    for place in range(1000):
        run = tmp_path / f"run-{place}"
        run.mkdir()
        (run / "run.json").write_bytes(content)
        (run / "model.json").write_text("never read")
    started = time.process_time()
    found: Runs = runs(tmp_path).query(cut="layer2", sort="accuracy")
    assert str(found).splitlines()[-2].startswith("1,000 runs")
    assert time.process_time() - started < 3  # of this process: measured 0.27 s, whatever else the machine does
    assert [each.name for each in found][:3] == ["run-0", "run-1", "run-2"]
    program = """
        import sys
        from training import runs
        print(len(runs(sys.argv[1])), *sorted({"torch", "numpy", "sklearn", "pandas"} & {*sys.modules}))
    """
    assert new_processes.answer(program, str(tmp_path)).split() == ["1000"]


def test_a_listed_run_prints_its_scores(folder: Path) -> None:
    run: ListedRun = runs(folder)[1]
    assert repr(run).startswith("ListedRun(lr-0.01: loss ")
