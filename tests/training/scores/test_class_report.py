"""Scores of each class: scikit-learn's report of the same numbers, with intervals."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_allclose
from sklearn.metrics import classification_report
from support.programs import Run

from featstore import ImageSet
from training import ClassReport, Learner
from training.scores.class_report import ClassScores
from training.scores.metrics import wilson_interval

NAMES = ("ant", "bee", "cow", "dog")


def one_hot(classes: Any) -> Any:
    return np.asarray(classes)[:, None] == np.arange(len(NAMES))


@pytest.fixture(scope="module")
def labels() -> tuple[Any, Any]:
    """What 90 images are, and what was said of them; none is a dog, and none was taken for a cow."""
    random = np.random.default_rng(0)
    actual = random.integers(0, 3, 90)
    said = np.where(random.random(90) < 0.6, actual, 1)
    said[said == 2] = 0
    said[5] = 3
    return actual, said


def test_a_report_is_scikit_learn_s(labels: tuple[Any, Any]) -> None:
    actual, said = labels
    report = ClassReport.of(NAMES, one_hot(actual), one_hot(said))
    expected = classification_report(
        actual, said, labels=range(4), target_names=NAMES, output_dict=True, zero_division=np.nan
    )
    for row in report.table():
        own = expected[row["class"]]
        for column in ("precision", "recall", "f1"):
            value = own["f1-score" if column == "f1" else column]
            assert row[column] == (None if np.isnan(value) else pytest.approx(value, rel=1e-12))
        assert row["support"] == own["support"]
    assert [each.predicted for each in report.classes] == np.bincount(said, minlength=4).tolist()
    for name in ("macro", "weighted"):
        for column in ("precision", "recall", "f1"):
            known = [(row[column], row["support"]) for row in report.table() if row[column] is not None]
            weights = [1 if name == "macro" else support for _, support in known]
            mean = np.average([value for value, _ in known], weights=weights)
            assert report.means[name][column] == pytest.approx(mean, rel=1e-12)


def test_several_labels_an_image_are_counted_class_by_class() -> None:
    random = np.random.default_rng(1)
    actual, said = random.random((2, 60, 4)) < 0.4
    report = ClassReport.of(NAMES, actual, said)
    expected = classification_report(actual, said, target_names=NAMES, output_dict=True, zero_division=0)
    for row in report.table():
        assert_allclose([row[name] for name in ("precision", "recall", "f1")], [*expected[row["class"]].values()][:3])
    for name in ("macro", "weighted"):
        means = [report.means[name][column] for column in ("precision", "recall", "f1")]
        assert means == pytest.approx([*expected[f"{name} avg"].values()][:3], rel=1e-12)


def test_intervals_are_wilson_s_of_shares_and_f1_s_follow_from_one() -> None:
    found = ClassScores.of("ant", both=8, support=10, predicted=16)
    assert found.intervals["precision"] == wilson_interval(8, 16)
    assert found.intervals["recall"] == wilson_interval(8, 10)
    low, high = wilson_interval(8, 18)
    assert found.intervals["f1"] == (2 * low / (1 + low), 2 * high / (1 + high))
    assert found.f1 == pytest.approx(2 * 0.5 * 0.8 / 1.3)
    nothing = ClassScores.of("bee", both=0, support=0, predicted=0)
    assert (nothing.precision, nothing.recall, nothing.f1, nothing.intervals) == (None, None, None, {})


def test_the_interval_of_f1_holds_the_truth_as_often_as_it_says() -> None:
    """400 trials of 300 images are uncertain by 2.2 points."""
    random, held = np.random.default_rng(3), 0
    truth = 2 * 0.3 * 0.8 / (0.3 + 0.3 * 0.8 + 0.7 * 0.1)  # a third is of the class; 0.8 of it found, 0.1 of others
    for _ in range(400):
        actual = random.random(300) < 0.3
        said = np.where(actual, random.random(300) < 0.8, random.random(300) < 0.1)
        low, high = ClassScores.of(
            "ant", both=int((actual & said).sum()), support=int(actual.sum()), predicted=int(said.sum())
        ).intervals["f1"]
        held += low <= truth <= high
    assert 0.92 < held / 400 < 0.98


def test_a_report_prints_and_names_the_worst(labels: tuple[Any, Any], tmp_path: Path) -> None:
    actual, said = labels
    report = ClassReport.of(("<b>", "b\x1b[2J", "cow", "dog"), one_hot(actual), one_hot(said))
    lines = str(report).splitlines()
    assert [line.split()[0] for line in lines] == ["class", "<b>", "b\\x1b[2J", "cow", "dog", "macro", "weighted"]
    first = report.classes[0]
    assert f"{first.recall:.3f} ({first.intervals['recall'][0]:.3f}-{first.intervals['recall'][1]:.3f})" in lines[1]
    assert lines[3].split()[1] == "-"  # nothing was taken for a cow
    assert len(report) == 4
    assert "<b>" not in report._repr_html_()
    assert "\x1b" not in str(report) + report._repr_html_()
    scores = [each.recall for each in report.worst(2, "recall")]
    assert scores == sorted(each.recall for each in report.classes if each.recall is not None)[:2]
    with pytest.raises(ValueError, match="is no score of a class"):
        report.worst(by="support")
    report.to_csv(tmp_path / "classes.csv")
    with (tmp_path / "classes.csv").open(newline="") as file:
        assert [row["support"] for row in csv.DictReader(file)] == [str(each.support) for each in report.classes]


def test_the_command_shows_what_the_library_says_of_each_class(run: Run, here: Path) -> None:
    flags = ["--images", "photos", "--store", "feats", "--backbone", "tiny.py:make_model", "--size", "32", "--extract"]
    assert run("featstore-train", "head", *flags, "--epochs", "1", "--lr", "1e-2", "--out", "runs/head").code == 0
    evaluate = ["evaluate", "--model", "runs/head", "--images", "photos", "--split", "train", "--per-class"]
    learn = Learner.load("runs/head", ImageSet.from_folder("photos"), Learner.store_of("runs/head"), quiet=True)
    report = learn.outcomes("train").per_class()
    found = run("featstore-train", *evaluate, "--json").json
    assert found["per_class"] == report.table()
    assert found["means"] == report.means
    assert found["train"] == learn.evaluate("train")
    shown = run("featstore-train", *evaluate).out
    assert shown.startswith(f"{report}\ntrain accuracy ")
    scored, outcomes = learn.evaluated("train")
    assert (scored, outcomes.is_right.mean()) == (learn.evaluate("train"), scored["accuracy"])
