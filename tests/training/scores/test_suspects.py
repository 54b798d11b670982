"""Suspects: planted label errors are found, by the rule of confident learning."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_predict

from featstore import ImageSet
from training import Outcomes, label_suspects

DIGITS = tuple("0123456789")


def outcomes_of(said: NDArray[np.float64], targets: NDArray[np.int64], classes: tuple[str, ...]) -> Outcomes:
    pixels = np.random.default_rng(0).integers(0, 256, (len(targets), 4, 4, 3), dtype=np.uint8)
    images = ImageSet.from_arrays(pixels, targets, classes=classes)
    losses = -np.log(said[np.arange(len(targets)), targets])
    return Outcomes(images=images, classes=classes, probabilities=said, targets=targets, losses=losses)


@pytest.fixture(scope="module")
def flipped() -> tuple[Outcomes, NDArray[np.int64]]:
    """Digits of which 3 in 100 have another label, scored out of fold; and which they are."""
    rows, classes = load_digits(return_X_y=True)
    rng = np.random.default_rng(0)
    wrong = rng.choice(len(classes), 3 * len(classes) // 100, replace=False)
    labels = classes.astype(np.int64)
    labels[wrong] = (labels[wrong] + rng.integers(1, 10, len(wrong))) % 10
    folds = StratifiedKFold(5, shuffle=True, random_state=0)
    said = cross_val_predict(LogisticRegression(max_iter=200), rows / 16, labels, cv=folds, method="predict_proba")
    return outcomes_of(said, labels, DIGITS), np.sort(wrong)


def test_planted_label_errors_come_first(flipped: tuple[Outcomes, NDArray[np.int64]]) -> None:
    outcomes, wrong = flipped
    found = label_suspects(outcomes)
    hits = np.isin(found.places, wrong)
    assert hits[:20].all()  # by chance 3 in 100 were
    assert hits.mean() >= 0.9
    assert hits.sum() >= 0.75 * len(wrong)
    truth = load_digits().target
    assert (found.proposed[hits] == truth[found.places[hits]]).mean() >= 0.9


def test_suspects_are_those_of_the_rule_written_out(flipped: tuple[Outcomes, NDArray[np.int64]]) -> None:
    outcomes, _ = flipped
    said, labels = outcomes.probabilities, outcomes.targets
    threshold = [np.mean([row[k] for row, label in zip(said, labels, strict=True) if label == k]) for k in range(10)]
    expected = {}
    for place, (row, label) in enumerate(zip(said, labels, strict=True)):
        likely = [(row[k], k) for k in range(10) if row[k] >= threshold[k]]
        if likely and max(likely)[1] != label:
            expected[place] = (row[label] - max(row[k] for k in range(10) if k != label), max(likely)[1])
    found = label_suspects(outcomes)
    assert found.places.tolist() == sorted(expected, key=lambda place: expected[place][0])
    assert found.margins.tolist() == [expected[place][0] for place in found.places.tolist()]
    assert found.proposed.tolist() == [expected[place][1] for place in found.places.tolist()]


def test_each_suspect_has_its_id_and_both_classes(flipped: tuple[Outcomes, NDArray[np.int64]]) -> None:
    outcomes, _ = flipped
    found = label_suspects(outcomes)
    assert found.ids == tuple(outcomes.images.ids[place] for place in found.places)
    row = found.table[0]
    assert row["given"] == DIGITS[outcomes.targets[found.places[0]]] != row["proposed"]
    assert repr(found) == f"Suspects({len(found)} suspected labels among 1,797 images)"
    assert "margin" in found._repr_html_()


def test_a_class_that_no_image_is_labelled_as_is_proposed_by_none() -> None:
    said = np.array([[0.2, 0.1, 0.7], [0.3, 0.6, 0.1], [0.9, 0.1, 0.0]])  # thresholds 0.25, 0.1 and none
    found = label_suspects(outcomes_of(said, np.array([0, 0, 1]), ("a", "b", "c")))
    assert found.table == [
        {"id": found.ids[0], "given": "b", "proposed": "a", "margin": pytest.approx(-0.8)},
        {"id": found.ids[1], "given": "a", "proposed": "b", "margin": pytest.approx(-0.5)},
        {"id": found.ids[2], "given": "a", "proposed": "b", "margin": pytest.approx(-0.3)},
    ]


def test_nothing_is_suspected_where_a_model_agrees_with_all_labels() -> None:
    found = label_suspects(outcomes_of(np.array([[0.9, 0.1], [0.2, 0.8]]), np.array([0, 1]), ("a", "b")))
    assert len(found) == 0
    assert found.table == []


def test_other_tasks_are_refused_by_name() -> None:
    pixels = np.zeros((2, 4, 4, 3), np.uint8)
    images = ImageSet.from_arrays(pixels, np.array([[1, 0], [0, 1]]), classes=("a", "b"), task="multi")
    said = np.full((2, 2), 0.5)
    outcomes = Outcomes(images=images, classes=("a", "b"), probabilities=said, targets=said, losses=said[:, 0])
    with pytest.raises(ValueError, match="task multi"):
        label_suspects(outcomes)
