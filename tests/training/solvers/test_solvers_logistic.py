"""Logistic regression is scikit-learn's: objective, probabilities and the grid's scores."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedKFold

from featstore import FeatureStore, ImageSet
from featstore.exchange.imports import import_features
from featstore.images.fileless import images_by_id
from featstore.store.features import Features
from training.solvers.logistic import cross_validated, logistic_path
from training.solvers.newton import CentredRows, Problems
from training.solvers.rows import Rows

Floats = NDArray[np.float32]
GIVEN: dict[str, Any] = {"C": 1.0, "device": "cpu"}


def made(num_rows: int = 300, width: int = 20, num_classes: int = 4) -> tuple[Floats, NDArray[np.int64]]:
    """Rows of classes that overlap, whose columns differ in spread and lie far from 0."""
    rng = np.random.default_rng(0)
    labels = np.arange(num_rows) % num_classes
    values = rng.standard_normal((num_rows, width)) + rng.standard_normal((num_classes, width))[labels] * 0.7
    values = values * np.geomspace(3, 0.1, width) @ np.linalg.qr(rng.standard_normal((width, width)))[0] + 5
    return values.astype(np.float32), labels


def stored(folder: Path, values: Floats, memory_bytes: int | None = None) -> Features:
    """The same rows in a store, as features of images by name."""
    store = FeatureStore(folder, memory_bytes=memory_bytes)
    ids = [f"image{row:04d}" for row in range(len(values))]
    key = import_features(store, values, images_by_id(ids, where="made", name="made"), name="made").key
    return store.features(ImageSet.from_store(store), key)


def reference(values: Floats, labels: Any, strength: float, **options: Any) -> LogisticRegression:
    """scikit-learn's own, in float64, to the end."""
    return LogisticRegression(C=strength, solver="newton-cg", tol=1e-9, max_iter=1000, **options).fit(
        values.astype(np.float64), labels
    )


def objective(model: LogisticRegression, values: Floats, labels: Any, strength: float, weights: Any = 1.0) -> float:
    """What scikit-learn says that it minimises."""
    chances = model.predict_proba(values.astype(np.float64))
    losses = -np.log(chances[np.arange(len(labels)), np.searchsorted(model.classes_, labels)])
    return float(strength * (weights * losses).sum() + (model.coef_**2).sum() / 2)


@pytest.mark.parametrize("num_classes", [2, 4])
@pytest.mark.parametrize("warm", [True, False])
def test_each_strength_has_scikit_learns_objective_and_probabilities(num_classes: int, warm: bool) -> None:
    values, labels = made(num_classes=num_classes)
    strengths = [100, 0.01, 1]
    path = logistic_path(values, labels, C=strengths, tol=1e-8, warm=warm, device="cpu")
    assert path.coefficients.shape == (3, num_classes, 20)
    assert path.is_converged.all()
    for place, strength in enumerate(strengths):
        model = reference(values, labels, strength)
        # The objective is computed from float32 logits: 1e-6 is ten times their rounding, of about 1e-7.
        assert path.objectives[place] == pytest.approx(objective(model, values, labels, strength), rel=1e-6)
        # An objective within 1e-7 leaves coefficients, and with them probabilities, within about its root.
        assert np.abs(path.predict_proba(values, place) - model.predict_proba(values)).max() < 2e-3
        assert path.coefficients[place] == pytest.approx(
            model.coef_ if num_classes > 2 else np.stack([-model.coef_[0], model.coef_[0]]) / 2,
            abs=3e-3 * np.abs(model.coef_).max(),
        )


@pytest.mark.parametrize("standardised", [False, True])
def test_fewer_rows_than_numbers_are_solved_in_the_space_that_they_span(standardised: bool) -> None:
    values, labels = made(num_rows=40, width=120)
    path = logistic_path(values, labels, C=[0.1, 10.0], standardised=standardised, tol=1e-8, device="cpu")
    centred = CentredRows(
        Rows.of(values), torch.ones(40).double(), standardised=False, device=torch.device("cpu"), columns=4
    )
    assert centred.basis is not None
    assert centred.basis.shape == (120, 40)
    shown = (values - values.mean(0)) / values.std(0) if standardised else values
    for place, strength in enumerate(path.C):
        model = reference(shown, labels, strength)
        # Logits of so many more numbers, of rows that nearly part the classes: three times the rounding of those above.
        assert path.objectives[place] == pytest.approx(objective(model, shown, labels, strength), rel=3e-6)
        assert np.abs(path.predict_proba(values, place) - model.predict_proba(shown)).max() < 1e-3  # as above


def test_weights_of_rows_and_of_classes_are_scikit_learns() -> None:
    values, labels = made()
    names = np.array(["d", "a", "c", "b"])[labels]
    weights = np.random.default_rng(1).uniform(0.1, 3, len(labels))
    path = logistic_path(
        values, names, C=0.3, weights=weights, class_weight={"a": 5.0, "b": 0.2}, tol=1e-8, device="cpu"
    )
    model = LogisticRegression(C=0.3, solver="newton-cg", tol=1e-9, class_weight={"a": 5.0, "b": 0.2})
    model.fit(values.astype(np.float64), names, weights)
    assert path.classes.tolist() == ["a", "b", "c", "d"]
    assert np.abs(path.predict_proba(values) - model.predict_proba(values)).max() < 1e-3  # as above
    assert (path.predict(values) == model.predict(values)).mean() > 0.99
    few = labels > 0
    balanced = logistic_path(values[few], labels[few], C=0.3, class_weight="balanced", tol=1e-8, device="cpu")
    model = reference(values[few], labels[few], 0.3, class_weight="balanced")
    assert np.abs(balanced.predict_proba(values) - model.predict_proba(values)).max() < 1e-3


def test_standardised_is_scikit_learn_behind_a_scaler() -> None:
    values, labels = made()
    values[:, 3] = 7  # a column of one value has no deviation
    path = logistic_path(values, labels, C=0.1, standardised=True, tol=1e-8, device="cpu")
    scaled = values.astype(np.float64) - values.mean(0, dtype=np.float64)
    deviation = scaled.std(0)
    deviation[3] = 1
    model = reference((scaled / deviation).astype(np.float32), labels, 0.1)
    assert np.abs(path.predict_proba(values) - model.predict_proba(scaled / deviation)).max() < 1e-3


def test_rows_read_again_from_a_store_give_what_rows_in_memory_give(tmp_path: Path) -> None:
    values, labels = made()
    inside = logistic_path(values, labels, C=[0.1, 10], tol=1e-8, device="cpu")
    features = stored(tmp_path, values)
    for source in (features, Rows.of(features, memory_bytes=100), Rows.of(torch.from_numpy(values), memory_bytes=0)):
        outside = logistic_path(source, labels, C=[0.1, 10], tol=1e-8, device="cpu")
        # The same operations on the same blocks; products of blocks that lie elsewhere may round otherwise.
        assert outside.coefficients == pytest.approx(inside.coefficients, rel=1e-3, abs=1e-3)
        assert outside.objectives == pytest.approx(inside.objectives, rel=1e-6)
    scores = [
        cross_validated(source, labels, C=[0.1, 10], folds=3, tol=1e-7, device="cpu")
        for source in (values, Rows.of(values, memory_bytes=0))
    ]
    assert np.abs(scores[0] - scores[1]).max() <= 1 / 100 + 1e-9  # of a hundred rows held out one may lie on the border


def test_probabilities_that_are_too_many_to_keep_are_computed_again_to_the_same_products() -> None:
    values, labels = made()
    weights = torch.rand((300, 2), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = []
    for memory_bytes in (None, 0):
        rows = Rows.of(values, memory_bytes=memory_bytes)
        centred = CentredRows(rows, weights[:, 0], standardised=False, device=torch.device("cpu"), columns=8)
        problems = Problems(centred, labels, 4, weights)
        spot, direction = torch.randn((2, 2, 21, 4), generator=torch.Generator().manual_seed(1))
        point = problems.at(spot)
        assert (point.chances is None) == (memory_bytes == 0)
        found.append((problems.product(point, direction), problems.chosen(point, torch.arange(300) % 2)))
    # Where products are rough, the probabilities of those computed again are as rough as they.
    assert torch.allclose(found[0][0], found[1][0], atol=3e-2 * float(found[0][0].abs().max()))
    assert torch.equal(found[0][1], found[1][1])


def test_a_rough_product_is_the_hessian_of_torch() -> None:
    values, labels = made(50, 5, 3)
    device = torch.device("cpu")
    weights = torch.ones(50, 1, dtype=torch.float64)
    centred = CentredRows(Rows.of(values), weights[:, 0], standardised=False, device=device, columns=3)
    problems = Problems(centred, labels, 3, weights)
    generator = torch.Generator().manual_seed(0)
    spot, direction = torch.randn((2, 1, 6, 3), generator=generator)
    inputs = torch.cat([torch.from_numpy(values) - centred.mean, torch.ones(50, 1)], 1)
    assert centred.basis is not None
    turn = torch.eye(6)
    turn[:5, :5] = centred.basis

    def loss(along: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(inputs @ turn @ along[0], torch.from_numpy(labels))

    point = problems.at(spot)
    assert float(point.losses) == pytest.approx(float(loss(spot)), rel=1e-6)
    spot.requires_grad_()
    (gradient,) = torch.autograd.grad(loss(spot), spot, create_graph=True)
    assert torch.allclose(point.gradients, gradient, atol=1e-5)
    (expected,) = torch.autograd.grad(gradient, spot, direction)
    # Rows rounded to bfloat16 (where the machine is fast at it) are off by up to 1/256.
    assert torch.allclose(problems.product(point, direction), expected, atol=2e-2 * float(expected.abs().max()))


def test_a_grid_with_folds_scores_as_grid_search_does() -> None:
    values, labels = made()
    strengths = [1e-3, 0.03, 1.0, 30.0]
    scores = cross_validated(values, labels, C=strengths, folds=5, tol=1e-7, device="cpu")
    search = GridSearchCV(LogisticRegression(solver="newton-cg", tol=1e-8), {"C": strengths}, cv=StratifiedKFold(5))
    search.fit(values.astype(np.float64), labels)
    expected = np.stack([search.cv_results_[f"split{fold}_test_score"] for fold in range(5)], axis=1)
    assert np.abs(scores - expected).max() <= 1 / 60 + 1e-9  # of 60 rows held out at most one lies on the border
    assert (scores == expected).mean() >= 0.8


def test_under_a_strong_penalty_scores_are_grid_searchs_too() -> None:
    values, labels = made(600, 20, 7)
    strengths = [1e-7, 1e-6, 1e-5]
    scores = cross_validated(values, labels, C=strengths, folds=5, device="cpu")
    search = GridSearchCV(LogisticRegression(solver="newton-cg", tol=1e-10), {"C": strengths}, cv=StratifiedKFold(5))
    expected = search.fit(values.astype(np.float64), labels).cv_results_["mean_test_score"]
    # All probabilities are nearly equal there, and of six hundred rows three may lie on the border.
    assert np.abs(scores.mean(1) - expected).max() <= 3 / 600 + 1e-9


def test_folds_may_be_given_and_balanced() -> None:
    values, labels = made(120)
    fold_of = np.arange(120) // 4 % 3 * 10
    scores = cross_validated(values, labels, C=[0.1], folds=fold_of, class_weight="balanced", tol=1e-7, device="cpu")
    for place, fold in enumerate((0, 10, 20)):
        inside = fold_of != fold
        model = reference(values[inside], labels[inside], 0.1, class_weight="balanced")
        assert abs(model.score(values[~inside], labels[~inside]) - scores[0, place]) <= 1 / 40 + 1e-9


def test_a_weight_counts_in_a_fold_as_rows_that_are_there_so_often() -> None:
    values, labels = made(120)
    fold_of, often = np.arange(120) // 4 % 3, np.arange(120) % 5
    weighted = cross_validated(values, labels, C=[0.1], folds=fold_of, weights=often, tol=1e-7, device="cpu")
    repeated = cross_validated(
        *(np.repeat(each, often, axis=0) for each in (values, labels)),
        C=[0.1],
        folds=np.repeat(fold_of, often),
        tol=1e-7,
        device="cpu",
    )
    assert weighted == pytest.approx(repeated, rel=1e-12)
    with pytest.raises(ValueError, match="Fold 1 holds out no row that counts"):
        cross_validated(values, labels, C=[0.1], folds=fold_of, weights=fold_of != 1, device="cpu")


def test_the_same_problem_gives_the_same_bits() -> None:
    values, labels = made()
    first, second = (logistic_path(values, labels, C=[0.1, 10], device="cpu") for _ in range(2))
    assert np.array_equal(first.coefficients, second.coefficients)


@pytest.mark.parametrize(("num_rows", "strength"), [(300, 1e3), (100, 1e5)])
def test_a_weak_penalty_alone_is_solved_from_stronger_ones(num_rows: int, strength: float) -> None:
    """From 0 the first step leads to where all classes are certain, and the second nowhere: accuracies of a third."""
    digits = load_digits()
    values, labels = digits.data[:num_rows].astype(np.float32), digits.target[:num_rows]
    path = logistic_path(values, labels, C=strength, device="cpu")
    theirs = LogisticRegression(C=strength, max_iter=5000).fit(values, labels)
    assert path.is_converged.all()
    assert path.objectives[0] < 1.001 * objective(theirs, values, labels, strength)  # lbfgs ends earlier
    assert (path.predict(values) == labels).all()
    others, truth = digits.data[1000:], digits.target[1000:]
    assert (path.predict(others) == truth).mean() > theirs.score(others, truth) - 0.02


def test_too_few_steps_are_said() -> None:
    values, labels = made()
    with pytest.warns(ConvergenceWarning, match="for C 100, after up to 1 steps"):
        path = logistic_path(values, labels, C=100, tol=1e-8, max_iterations=1, device="cpu")
    assert not path.is_converged[0]
    assert path.num_iterations[0] == 1


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"y": np.zeros(300)}, "one class, 0.0"),
        ({"y": np.arange(299) % 4}, "299 labels for 300 rows"),
        ({"y": np.full(300, np.nan)}, "label of row 0 is nan"),
        ({"X": np.full((300, 20), np.inf)}, "Row 0 has inf at place 0"),
        ({"X": np.zeros((300, 2, 2))}, r"shape \(300, 2, 2\)"),
        ({"X": np.full((300, 2), "a")}, "type <U1"),
        ({"C": 0.0}, "C is 0"),
        ({"tol": 0.0}, "tol is 0"),
        ({"max_iterations": 0}, "max_iterations is 0"),
        ({"class_weight": {9: 1.0}}, "class_weight names 9"),
        ({"class_weight": {3: 0.0}}, "has no row that counts"),
        ({"class_weight": "equal"}, "class_weight is 'equal'"),
        ({"weights": -np.ones(300)}, "Weights go from -1"),
    ],
)
def test_what_has_no_solution_is_refused_by_name(change: dict[str, Any], named: str) -> None:
    values, labels = made()
    with pytest.raises((TypeError, ValueError), match=named):
        logistic_path(**GIVEN | {"X": values, "y": labels} | change)


def test_folds_that_leave_nothing_to_train_on_are_refused() -> None:
    values, labels = made(40)
    for folds, named in (
        (1, "folds is 1"),
        (41, "folds is 41"),
        (11, "at most 10"),
        (labels, "Class 0 has no row out"),
    ):
        with pytest.raises(ValueError, match=named):
            cross_validated(values, labels, C=[1.0], folds=folds, device="cpu")


@pytest.mark.cuda
def test_a_gpu_finds_the_same() -> None:
    values, labels = made()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        there = logistic_path(values, labels, C=[0.1, 10], tol=1e-8, device="cuda")
    here = logistic_path(values, labels, C=[0.1, 10], tol=1e-8, device="cpu")
    assert there.objectives == pytest.approx(here.objectives, rel=1e-6)
    assert np.abs(there.predict_proba(values) - here.predict_proba(values)).max() < 2e-3
