"""Transferability: the scores are those of the papers' formulas, written out, and rank features by their noise."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.optimize import minimize  # type: ignore[import-untyped]
from sklearn.covariance import LedoitWolf
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from sklearn.mixture import GaussianMixture

from training.scores.transferability import SCORES, hscore, logme, nleep, transfer_scores

Array = NDArray[np.float64]


@pytest.fixture(scope="module")
def digits() -> tuple[Array, NDArray[np.int64]]:
    rows, classes = load_digits(return_X_y=True)
    return rows[:300], classes[:300].astype(np.int64)


def evidence_by_hand(rows: Array, column: Array) -> float:
    """The greatest log density of a column whose covariance is ``F F' / alpha + I / beta``, over both, per image."""

    def negative(logs: Array) -> float:
        alpha, beta = np.exp(logs)
        covariance = rows @ rows.T / alpha + np.eye(len(rows)) / beta
        spread = np.linalg.slogdet(covariance)[1] + column @ np.linalg.solve(covariance, column)
        return float(spread + len(rows) * np.log(2 * np.pi)) / 2

    starts = [np.array([first, 1.0]) for first in (0.0, 4.0, 8.0)]
    options = {"xatol": 1e-8, "fatol": 1e-10, "maxiter": 2000}
    found = [minimize(negative, each, method="Nelder-Mead", options=options).fun for each in starts]
    return -float(min(found)) / len(rows)


def fixed_point(rows: Array, column: Array, rounds: int) -> float:
    """The paper's own iteration (algorithm 1): evidence of a column, by the inverse of a matrix in each round."""
    num_rows, width = rows.shape
    alpha: Any = 1.0
    beta: Any = 1.0
    for _ in range(rounds):
        inverse = np.linalg.inv(alpha * np.eye(width) + beta * rows.T @ rows)
        mean = beta * inverse @ rows.T @ column
        gamma = width - alpha * np.trace(inverse)
        alpha = gamma / (mean @ mean)
        beta = (num_rows - gamma) / ((rows @ mean - column) ** 2).sum()
    precision = alpha * np.eye(width) + beta * rows.T @ rows
    mean = beta * np.linalg.solve(precision, rows.T @ column)
    evidence = (
        width / 2 * np.log(alpha)
        + num_rows / 2 * np.log(beta / (2 * np.pi))
        - beta / 2 * ((rows @ mean - column) ** 2).sum()
        - alpha / 2 * mean @ mean
        - np.linalg.slogdet(precision)[1] / 2
    )
    return float(evidence / num_rows)


def test_logme_is_the_greatest_evidence_and_that_of_the_papers_iteration(digits: Any) -> None:
    rows, classes = digits[0][:60, 20:30], digits[1][:60]
    columns = np.eye(10)[classes]
    dense = np.mean([evidence_by_hand(rows, column) for column in columns.T])
    # The ratio is found to within a part in a hundred of its logarithm, where the evidence is flat to second order.
    assert logme(rows, classes) == pytest.approx(dense, abs=1e-5)
    assert logme(rows, classes) == pytest.approx(
        np.mean([fixed_point(rows, each, 300) for each in columns.T]), abs=1e-5
    )


def test_logme_of_more_features_than_images_is_the_greatest_evidence_too(digits: Any) -> None:
    rows, classes = digits[0][:30], digits[1][:30] % 2
    expected = np.mean([evidence_by_hand(rows, column) for column in np.eye(2)[classes].T])
    assert logme(rows, classes) == pytest.approx(expected, abs=1e-5)


def test_logme_stays_the_same_for_rotated_and_for_multiplied_features(digits: Any) -> None:
    rows, classes = digits
    turned = rows @ np.linalg.qr(np.random.default_rng(0).standard_normal((64, 64)))[0]
    # Two columns of digits are 0 everywhere: rounding alone tells them apart once they are rotated.
    assert logme(turned, classes) == pytest.approx(logme(rows, classes), abs=1e-9)
    assert logme(7.0 * rows, classes) == pytest.approx(logme(rows, classes), abs=1e-9)


def test_logme_of_numbers_and_of_several_labels_is_the_mean_over_their_columns(digits: Any) -> None:
    rows, classes = digits
    numbers = np.stack([classes, classes**2.0], 1)
    each = [logme(rows, numbers[:, place], "regression") for place in range(2)]
    assert logme(rows, numbers, "regression") == pytest.approx(np.mean(each), abs=1e-12)
    hot = np.eye(10)[classes]
    assert logme(rows, hot, "multi") == pytest.approx(logme(rows, classes), abs=1e-12)


def test_features_that_say_nothing_have_the_evidence_of_noise_alone() -> None:
    column = np.array([1.0, -1.0] * 20)
    rows = np.ones((40, 1))  # at a right angle to the column
    assert logme(rows, column, "regression") == pytest.approx(-0.5 * (np.log(2 * np.pi) + 1), abs=1e-4)


@pytest.mark.parametrize("count", [300, 30])  # more and fewer than there are features
def test_the_h_score_is_that_of_scikit_learns_shrunk_covariance(digits: Any, count: int) -> None:
    rows, classes = digits[0][:count], digits[1][:count]
    fitted = LedoitWolf().fit(rows)
    means = np.stack([rows[classes == each].mean(0) for each in classes])  # of each image its class's
    between = np.cov(means.T, bias=True)
    expected = np.trace(np.linalg.inv(fitted.covariance_) @ between) * (1 - fitted.shrinkage_)
    assert hscore(rows, classes) == pytest.approx(expected, rel=1e-9)


def test_the_h_score_of_noise_that_shrinks_to_nothing_is_zero() -> None:
    rows = np.random.default_rng(1).standard_normal((12, 4))
    assert LedoitWolf().fit(rows).shrinkage_ == 1
    assert hscore(rows, np.arange(12) % 2) == 0


def test_the_h_score_of_two_far_classes_is_nearly_one_and_of_equal_means_zero() -> None:
    noise = np.random.default_rng(0).standard_normal((4000, 3))
    classes = np.arange(4000) % 2
    far = noise + 1000 * classes[:, None] * np.array([1.0, 0, 0])
    assert hscore(far[:, :1], classes) == pytest.approx(1, abs=1e-3)  # one less than there are classes
    mirrored = np.concatenate([noise, noise])
    assert hscore(mirrored, np.repeat([0, 1], 4000)) == pytest.approx(0, abs=1e-12)


def test_the_h_score_takes_features_that_depend_on_each_other_and_none_that_are_equal(digits: Any) -> None:
    rows, classes = digits
    doubled = hscore(np.hstack([rows, rows]), classes)
    assert doubled is not None
    assert 0 < doubled < 9
    assert hscore(np.ones((300, 4)), classes) is None


def test_nleep_is_the_papers_formula_written_out(digits: Any) -> None:
    rows, classes = digits
    reduced = PCA(0.8, svd_solver="full").fit_transform(rows)
    mixture = GaussianMixture(20, covariance_type="diag", random_state=3).fit(reduced / reduced[:, 0].std())
    parts = mixture.predict_proba(reduced / reduced[:, 0].std())
    total = 0.0
    for image, label in enumerate(classes):
        given = 0.0
        for part in range(20):
            alike = sum(parts[other, part] for other in range(300) if classes[other] == label)
            given += parts[image, part] * alike / parts[:, part].sum()
        total += np.log(given)
    # The components' signs follow from rounding, and with them the start of the mixture's sums.
    assert nleep(rows, classes, components=20, seed=3) == pytest.approx(total / 300, abs=1e-6)


def test_nleep_of_one_component_is_the_entropy_of_the_classes(digits: Any) -> None:
    rows, classes = digits
    shares = np.bincount(classes) / len(classes)
    assert nleep(rows, classes, components=1) == pytest.approx((shares * np.log(shares)).sum(), abs=1e-12)


def test_nleep_needs_as_many_images_as_components(digits: Any) -> None:
    assert nleep(digits[0][:8], np.arange(8) % 2 * 9) is None
    assert nleep(np.ones((40, 2)), np.arange(40) % 2) is None


def test_each_score_ranks_features_by_how_much_noise_they_hold(digits: Any) -> None:
    rows, classes = digits
    noise = np.random.default_rng(1).standard_normal(rows.shape)
    found = [transfer_scores(rows + deviation * noise, classes) for deviation in (0, 8, 40)]
    for name in SCORES:
        values = [each[name] or 0.0 for each in found]
        assert values == sorted(values, reverse=True), name


def test_what_has_no_score_is_refused_by_its_value(digits: Any) -> None:
    rows, classes = digits
    with pytest.raises(ValueError, match=r"shape \(300, 64, 1\)"):
        logme(rows[..., None], classes)
    with pytest.raises(ValueError, match="Row 7"):
        hscore(np.where(np.arange(300)[:, None] == 7, np.nan, rows), classes)
    with pytest.raises(ValueError, match="All 300 targets are 0"):
        nleep(rows, np.zeros(300, int))
    with pytest.raises(ValueError, match="A target is -1"):
        logme(rows, classes - 1)
    with pytest.raises(ValueError, match="task 'both'"):
        logme(rows, classes, "both")
