"""Ridge regression is scikit-learn's: coefficients of each strength, leave-one-out errors, classes."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.linear_model import Ridge, RidgeClassifier, RidgeCV

from training.solvers.ridge import leave_one_out_predictions, ridge_classifier_path, ridge_path
from training.solvers.rows import Rows

STRENGTHS = [0.1, 3.0, 1000.0]
GIVEN: dict[str, Any] = {"strengths": STRENGTHS, "device": "cpu"}


def made(num_rows: int, width: int, num_targets: int = 2) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    rng = np.random.default_rng(0)
    values = (rng.standard_normal((num_rows, width)) * np.geomspace(2, 0.1, width) + 100).astype(np.float32)
    targets = (values - 100) @ rng.standard_normal((width, num_targets)) + rng.standard_normal((num_rows, num_targets))
    return values, targets + 7


SHAPES = [(80, 12), (15, 40)]  # by the Gram matrix, and by the rows' products


@pytest.mark.parametrize(("num_rows", "width"), SHAPES)
@pytest.mark.parametrize("weighted", [False, True])
def test_each_strength_is_scikit_learns_ridge(num_rows: int, width: int, weighted: bool) -> None:
    values, targets = made(num_rows, width)
    weights = np.random.default_rng(1).uniform(0.1, 3, num_rows) if weighted else None
    path = ridge_path(values, targets, STRENGTHS, weights=weights, device="cpu")
    assert path.coefficients.shape == (3, width, 2)
    for place, strength in enumerate(STRENGTHS):
        model = Ridge(alpha=strength, solver="svd").fit(values.astype(np.float64), targets, weights)
        # Both in float64; a Gram matrix squares the rows' condition, of about 1e3.
        assert pytest.approx(model.coef_, rel=1e-7, abs=1e-9) == path.coefficients[place].T
        assert path.predict(values, strength) == pytest.approx(model.predict(values.astype(np.float64)), rel=1e-8)


@pytest.mark.parametrize(("num_rows", "width"), SHAPES)
def test_leave_one_out_errors_are_those_of_ridge_cv(num_rows: int, width: int) -> None:
    values, targets = made(num_rows, width)
    path = ridge_path(values, targets, STRENGTHS, device="cpu")
    theirs = RidgeCV(alphas=STRENGTHS, store_cv_results=True).fit(values.astype(np.float64), targets)
    assert path.errors == pytest.approx(theirs.cv_results_.mean(0).T, rel=1e-6)
    assert path.best == theirs.alpha_


@pytest.mark.parametrize(("num_rows", "width"), SHAPES)
def test_a_row_left_out_is_predicted_by_a_fit_without_it(num_rows: int, width: int) -> None:
    values, targets = made(num_rows, width)
    weights = np.random.default_rng(1).uniform(0.1, 3, num_rows)
    predicted = leave_one_out_predictions(values, targets, 3.0, weights=weights, device="cpu")
    errors = ridge_path(values, targets, [3.0], weights=weights, device="cpu").errors
    for row in (0, 7, num_rows - 1):
        others = np.arange(num_rows) != row
        model = Ridge(alpha=3.0, solver="svd").fit(values[others].astype(np.float64), targets[others], weights[others])
        assert predicted[row] == pytest.approx(model.predict(values[row : row + 1].astype(np.float64))[0], rel=1e-7)
    assert errors == pytest.approx((weights @ (predicted - targets) ** 2 / weights.sum())[None], rel=1e-10)


@pytest.mark.parametrize("num_rows", [13, 40, 41])  # fewer rows than numbers a row; as many; one more
@pytest.mark.parametrize("strength", [1e-8, 1e-10])
def test_a_penalty_of_next_to_nothing_leaves_errors_that_are_no_noise(num_rows: int, strength: float) -> None:
    values, targets = made(num_rows, 40, num_targets=1)
    values[3] = values[5]  # of these the fits keep what they don't share
    weights = np.random.default_rng(1).uniform(0.1, 3, num_rows)
    weights[7] = 0
    predicted = leave_one_out_predictions(values, targets, strength, weights=weights, device="cpu")
    for row in (0, 3, 7, num_rows - 1):
        others = np.arange(num_rows) != row
        exact = values.astype(np.float64) - 100  # a solver's own digits are for what isn't their common mean
        model = Ridge(alpha=strength, solver="svd").fit(exact[others], targets[others], weights[others])
        assert predicted[row] == pytest.approx(model.predict(exact[row : row + 1])[0], rel=1e-4)


@pytest.mark.parametrize(("num_rows", "width"), SHAPES)
def test_errors_of_folds_are_those_of_fits_that_lack_them(num_rows: int, width: int) -> None:
    values, _ = made(num_rows, width)
    labels, folds = np.arange(num_rows) % 3, np.random.default_rng(2).integers(0, 3, num_rows)
    weights = np.random.default_rng(1).uniform(0.1, 3, num_rows)
    path = ridge_classifier_path(values, labels, STRENGTHS, weights=weights, folds=folds, device="cpu")
    aims = np.where(labels[:, None] == np.arange(3), 1.0, -1.0)
    for place, strength in enumerate(STRENGTHS):
        squares = np.zeros_like(aims)
        for fold in range(3):
            of, out = folds != fold, folds == fold
            model = Ridge(alpha=strength, solver="svd").fit(values[of].astype(np.float64), aims[of], weights[of])
            squares[out] = (model.predict(values[out].astype(np.float64)) - aims[out]) ** 2
        assert path.errors is not None
        assert path.errors[place] == pytest.approx(weights @ squares / weights.sum(), rel=1e-6)


@pytest.mark.parametrize("num_classes", [2, 5])
def test_classes_are_scikit_learns_ridge_classifier(num_classes: int) -> None:
    values, _ = made(100, 12)
    labels = np.array(list("dbeac"))[np.random.default_rng(3).integers(0, num_classes, 100)]
    path = ridge_classifier_path(values, labels, STRENGTHS, device="cpu")
    for strength in STRENGTHS:
        model = RidgeClassifier(alpha=strength, solver="svd").fit(values.astype(np.float64), labels)
        expected = model.decision_function(values.astype(np.float64)).reshape(100, -1)
        assert path.decision_function(values, strength) == pytest.approx(expected, rel=1e-6, abs=1e-9)
        assert np.array_equal(path.predict(values, strength), model.predict(values.astype(np.float64)))


def test_blocks_give_what_all_rows_give_at_once() -> None:
    values, targets = made(5000, 12)
    rows = Rows.of(values)
    pieces = Rows.of(values)
    blocks = pieces.blocks
    pieces.blocks = (  # type: ignore[method-assign]
        lambda device="cpu", block_rows=None, *, exact=False: blocks(device, 77, exact=exact)
    )
    whole, cut = (ridge_path(each, targets, STRENGTHS, device="cpu") for each in (rows, pieces))
    # The order of float64 sums.
    assert cut.coefficients == pytest.approx(whole.coefficients, rel=1e-9, abs=1e-11)
    assert cut.errors == pytest.approx(whole.errors, rel=1e-10)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"strengths": [1.0, 0.0]}, "strengths is 0"),
        ({"strengths": []}, r"of shape \(0,\)"),
        ({"y": np.zeros(79)}, "79 targets for 80 rows"),
        ({"y": np.full(80, np.nan)}, "target of row 0 is nan"),
        ({"weights": np.zeros(80)}, "Weights go from 0 to 0"),
        ({"X": np.full((80, 12), np.nan)}, "Row 0 has nan"),
    ],
)
def test_what_has_no_ridge_is_refused_by_name(change: dict[str, Any], named: str) -> None:
    values, targets = made(80, 12)
    with pytest.raises(ValueError, match=named):
        ridge_path(**GIVEN | {"X": values, "y": targets} | change)


def test_a_path_says_what_it_lacks() -> None:
    values, targets = made(80, 12)
    path = ridge_path(values, targets, STRENGTHS, leave_one_out=False, device="cpu")
    with pytest.raises(ValueError, match="leave_one_out=True"):
        _ = path.best
    with pytest.raises(ValueError, match=r"strength 2.0 is on this path; expected one of 0.1, 3, 1000"):
        path.predict(values, 2.0)
    with pytest.raises(ValueError, match="Rows hold 3 numbers; expected 12"):
        path.predict(values[:, :3], 3.0)


@pytest.mark.cuda
@pytest.mark.parametrize(("num_rows", "width"), SHAPES)
def test_a_gpu_finds_the_same_ridge(num_rows: int, width: int) -> None:
    values, targets = made(num_rows, width)
    here, there = (ridge_path(values, targets, STRENGTHS, device=device) for device in ("cpu", "cuda"))
    assert there.coefficients == pytest.approx(here.coefficients, rel=1e-7, abs=1e-9)
    assert there.errors == pytest.approx(here.errors, rel=1e-7)
