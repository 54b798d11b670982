"""Transferability: how much features say of labels, scored without training a head."""

from __future__ import annotations

import math
import warnings
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

Score = Literal["logme", "nleep", "hscore"]
SCORES: tuple[Score, ...] = get_args(Score)

_WEAKEST, _STRONGEST = 1e-12, 1e6
"""Priors in question, as shares of the largest squared singular value: under the one rounding decides, and over the
other nothing is left of a fit."""
_GRID, _FINER = 64, 5


def transfer_scores(
    features: ArrayLike, targets: ArrayLike, task: str = "single", *, seed: int = 0
) -> dict[Score, float | None]:
    """Each score by its name; None where it isn't defined for the task, for so few images or for such features.

    Args:
        features: ``(N, D)``.
        targets: ``(N,)`` class numbers; ``(N, K)`` n-hot of several labels, or numbers.
        task: single, multi or regression.
        seed: of the mixture that `nleep` fits.
    """
    if task != "single":
        return {"logme": logme(features, targets, task), "nleep": None, "hscore": None}
    return {
        "logme": logme(features, targets),
        "nleep": nleep(features, targets, seed=seed),
        "hscore": hscore(features, targets),
    }


def logme(features: ArrayLike, targets: ArrayLike, task: str = "single") -> float:
    """The log evidence an image of linear models of the targets: You et al., arXiv:2102.11005. Greater is better.

    Of each column of the targets (of classes: whether an image is of it) the model is Bayesian and linear, without an
    intercept. The precisions of its prior and of its noise are those under which the column is likeliest; the score is
    the mean over the columns. The paper finds these by a fixed point, which may be slow or stop early. Here the noise
    is eliminated, so that the evidence depends on the ratio of both alone, and its greatest value is looked for over
    all ratios. The features enter once, by the singular values of a triangle.

    It stays the same for rotated features and for those multiplied by a number.

    Args:
        features: ``(N, D)``.
        targets: ``(N,)`` class numbers; ``(N, K)`` n-hot of several labels, or numbers.
        task: single, multi or regression.

    Raises:
        ValueError: for features or targets of other shapes, or that aren't finite; for a single class.
    """
    rows = _rows(features)
    columns = _columns(targets, len(rows), task)
    num_rows, width = rows.shape
    # One triangle holds all that counts of both: features are its first columns, and what is below is no feature's.
    triangle: NDArray[np.float64] = np.asarray(np.linalg.qr(np.hstack([rows, columns]), mode="r"))
    left, singular, _ = np.linalg.svd(triangle[:width, :width], full_matrices=False)
    along = (left.T @ triangle[:width, width:]) ** 2  # (R, K): of each column's square, what lies along each direction
    outside = (triangle[width:, width:] ** 2).sum(0)  # (K,): what no features reach
    squares = singular**2
    if not squares[0]:
        raise ValueError("All features are 0, and say nothing of any target. Expected those of a network that ran.")

    grid = np.linspace(math.log(squares[0] * _WEAKEST), math.log(squares[0] * _STRONGEST), _GRID)
    step = grid[1] - grid[0]
    shares = np.exp(grid)[:, None] / (np.exp(grid)[:, None] + squares)  # (G, R): of a direction, what is left over
    best = grid[_evidence(shares @ along + outside, np.log(shares).sum(1)[:, None], num_rows).argmax(0)]  # (K,)
    for _ in range(_FINER):
        step /= 4
        finer = best + step * np.arange(-4, 5)[:, None]  # (9, K)
        shares = np.exp(finer)[..., None] / (np.exp(finer)[..., None] + squares)  # (9, K, R)
        values = _evidence(np.einsum("gkr,rk->gk", shares, along) + outside, np.log(shares).sum(2), num_rows)
        best = np.take_along_axis(finer, values.argmax(0)[None], 0)[0]
    return float(values.max(0).mean() / num_rows)


def _evidence(left_over: Any, shrinking: Any, num_rows: int) -> NDArray[np.float64]:
    """Log evidence at the likeliest noise.

    Args:
        left_over: the squares that a fit leaves over, with its prior's.
        shrinking: the sum of the logarithms of what it leaves of each direction.
        num_rows: how many images.
    """
    left_over = np.maximum(left_over, np.finfo(float).tiny)
    found: NDArray[np.float64] = 0.5 * (shrinking - num_rows * (np.log(2 * np.pi * left_over / num_rows) + 1))
    return found


def hscore(features: ArrayLike, targets: ArrayLike) -> float | None:
    """The regularised H-score: Ibrahim, Ponomareva and Mazumder, arXiv:2110.06893. Greater is better.

    The trace of the covariance of the classes' means in units of the features' own, which is shrunk as Ledoit and Wolf
    do, since it is of many features and few images: 0 where all classes have one mean, at most one less than there are
    classes.

    Args:
        features: ``(N, D)``.
        targets: ``(N,)`` class numbers.

    Returns:
        None for features that are all equal.
    """
    from scipy.linalg import cho_factor, cho_solve  # type: ignore[import-untyped]  # scikit-learn brings it

    rows = _rows(features)
    classes = _classes(targets, len(rows))
    width = rows.shape[1]
    rows = _coordinates(rows - rows.mean(0))
    covariance = rows.T @ rows / len(rows)
    mean_variance = np.trace(covariance) / width
    if not mean_variance > 0:
        return None
    shrinkage = _shrinkage(rows, covariance, width)
    shrunk = (1 - shrinkage) * covariance
    # Where nothing needs shrinking, the least that a triangle needs to be found: features may depend on each other.
    shrunk.flat[:: len(shrunk) + 1] += max(shrinkage, 1e-10) * mean_variance
    members = np.eye(classes.max() + 1)[classes]  # (N, K)
    counts = members.sum(0)
    means = (members.T @ rows)[counts > 0] / np.sqrt(counts[counts > 0] * len(rows))[
        :, None
    ]  # times their shares' root
    solved = cho_solve(cho_factor(shrunk, lower=True), means.T)  # (D, K)
    return float((1 - shrinkage) * np.sum(means.T * solved))


def nleep(
    features: ArrayLike, targets: ArrayLike, *, kept: float = 0.8, components: int | None = None, seed: int = 0
) -> float | None:
    """LEEP by a mixture in place of a head's classes: Li et al., arXiv:2011.11200. At most 0; greater is better.

    The features' principal components, as many as hold the share `kept` of their variance, are described by a mixture
    of Gaussians. The score is the mean log probability of an image's class, by the classes that its components' images
    have. The paper leaves the kind of Gaussians open: here they are along the axes, since so many full ones would have
    more numbers than there are images.

    Args:
        features: ``(N, D)``.
        targets: ``(N,)`` class numbers.
        kept: share of the variance.
        components: of the mixture; default: five a class, but no more than a fifth of the images.
        seed: of the mixture's start.

    Returns:
        None where there are fewer images than components, or all features are equal.
    """
    from sklearn.decomposition import PCA
    from sklearn.mixture import GaussianMixture

    rows = _rows(features)
    classes = _classes(targets, len(rows))
    num_classes = int(classes.max()) + 1
    components = components or max(num_classes, min(5 * num_classes, len(rows) // 5))
    if len(rows) < components or not (rows.var(0) > 0).any():
        return None
    solver = "covariance_eigh" if len(rows) > rows.shape[1] else "full"  # the quicker one
    reduced = PCA(n_components=kept, svd_solver=solver).fit_transform(rows)
    reduced /= reduced[:, 0].std()  # the mixture's floor of a variance is a number of its own, in these units
    mixture = _fitted(GaussianMixture(components, covariance_type="diag", random_state=seed), reduced)
    parts = mixture.predict_proba(reduced)  # (N, V)
    joint = np.eye(num_classes)[classes].T @ parts  # (K, V)
    by_part = joint / np.maximum(joint.sum(0), np.finfo(float).tiny)
    likelihood = (by_part[classes] * parts).sum(1)
    return float(np.log(np.maximum(likelihood, np.finfo(float).tiny)).mean())


def _fitted(mixture: Any, rows: NDArray[np.float64]) -> Any:
    """`mixture` of `rows`: what it says when it hasn't settled is no matter for a score."""
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return mixture.fit(rows)


def _coordinates(centred: NDArray[np.float64]) -> NDArray[np.float64]:
    """Rows ``(N, D)`` in the axes of the space that they span, where that is smaller: lengths and angles stay."""
    if len(centred) >= centred.shape[1]:
        return centred
    squares, vectors = np.linalg.eigh(centred @ centred.T)
    turned: NDArray[np.float64] = vectors * np.sqrt(np.maximum(squares, 0))
    return turned


def _shrinkage(centred: NDArray[np.float64], covariance: NDArray[np.float64], width: int) -> float:
    """Ledoit and Wolf's share of the identity (J. Multivariate Analysis 88, 2004), of centred rows of D features."""
    num_rows = len(centred)
    squared = float((covariance**2).sum())
    distance = squared - np.trace(covariance) ** 2 / width  # from the multiple of the identity that is nearest
    fourth = float(((centred**2).sum(1) ** 2).mean())
    error = (fourth - squared) / num_rows  # of the covariance, expected
    if width == 1 or error <= 0:  # one feature's covariance is a multiple of the identity as it is
        return 0.0
    return 1.0 if distance <= error else error / distance


def _rows(features: ArrayLike) -> NDArray[np.float64]:
    rows = np.asarray(features, np.float64)
    if rows.ndim != 2 or 0 in rows.shape:
        raise ValueError(
            f"Features are of shape {rows.shape}; expected (N, D), a vector for each image. Reduce maps first, or "
            "extract vectors (reduce='avg')."
        )
    if not np.isfinite(rows).all():
        place = int(np.flatnonzero(~np.isfinite(rows).all(1))[0])
        raise ValueError(f"Row {place:,} of the features isn't finite. Expected numbers. Leave such images out.")
    return rows


def _columns(targets: ArrayLike, num_rows: int, task: str) -> NDArray[np.float64]:
    """``(N, K)`` the columns that a linear model is to give."""
    if task == "single":
        classes = _classes(targets, num_rows)
        columns: NDArray[np.float64] = np.eye(classes.max() + 1)[classes]
        return columns[:, columns.any(0)]
    if task not in ("multi", "regression"):
        raise ValueError(f"The task {task!r} is unknown. Expected single, multi or regression.")
    columns = np.asarray(targets, np.float64)
    columns = columns[:, None] if columns.ndim == 1 else columns
    if columns.ndim != 2 or len(columns) != num_rows or not np.isfinite(columns).all():
        raise ValueError(
            f"Targets are of shape {columns.shape}; expected finite numbers, a row for each of {num_rows:,} rows of "
            "features. Leave images without a target out."
        )
    return columns[:, columns.any(0)] if columns.any() else columns[:, :1]


def _classes(targets: ArrayLike, num_rows: int) -> NDArray[np.int64]:
    """``(N,)`` class numbers, checked."""
    classes = np.asarray(targets)
    if classes.shape != (num_rows,) or classes.dtype.kind not in "iu":
        raise ValueError(
            f"Targets are {classes.dtype} of shape {classes.shape}; expected class numbers of shape ({num_rows},), "
            "one for each row of features."
        )
    if classes.min() < 0:
        raise ValueError(f"A target is {classes.min()}. Expected class numbers from 0. Leave unlabelled images out.")
    if (classes == classes[0]).all():
        raise ValueError(f"All {num_rows:,} targets are {classes[0]}. Expected at least two classes to tell apart.")
    return classes.astype(np.int64)
