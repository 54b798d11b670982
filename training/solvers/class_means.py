"""Class means: the nearest mean, and linear discriminant analysis, from one pass over the rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from featstore.models.modes import numerics
from featstore.models.trunk import choose_device
from training.solvers.moments import moments
from training.solvers.rows import Rows
from training.solvers.targets import class_numbers, on

Array = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class LinearClassifier:
    """Classes that are told apart by logits linear in the rows.

    Attributes:
        classes: ``(K,)``, the labels in their order.
        means: ``(K, F)``, of each class.
        coefficients: ``(K, F)``.
        intercepts: ``(K,)``.
    """

    classes: NDArray[Any]
    means: Array
    coefficients: Array
    intercepts: Array

    def decision_function(self, X: Any) -> Array:  # noqa: N803
        """Logits ``(N, K)`` of rows; ValueError for rows of another width."""
        rows = Rows.of(X)
        if rows.width != self.coefficients.shape[1]:
            raise ValueError(
                f"Rows hold {rows.width} numbers; expected {self.coefficients.shape[1]}, as those that were fitted."
            )
        logits = np.empty((len(rows), len(self.classes)))
        for where, block in rows.blocks(exact=True):
            logits[where] = block.double().numpy() @ self.coefficients.T + self.intercepts
        return logits

    def predict_proba(self, X: Any) -> Array:  # noqa: N803
        """The softmax of the logits ``(N, K)``: probabilities where the classes are normal, with one covariance."""
        chances: Array = torch.softmax(torch.from_numpy(self.decision_function(X)), 1).numpy()
        return chances

    def predict(self, X: Any) -> NDArray[Any]:  # noqa: N803
        """The label with the largest logit of each row ``(N,)``."""
        labels: NDArray[Any] = self.classes[self.decision_function(X).argmax(1)]
        return labels


def nearest_mean(X: Any, y: Any, *, device: str = "auto") -> LinearClassifier:  # noqa: N803
    """The classifier by the nearest mean of a class, as scikit-learn's ``NearestCentroid``.

    Its logits are ``x m - |m|^2 / 2`` about the mean of all rows: the largest is the nearest's.

    Args:
        X: ``(N, F)``: an array, a tensor or `Features`, which are read once.
        y: ``(N,)``, labels.
        device: where to compute.

    Raises:
        ValueError: for rows that aren't finite, a single class, labels of another number.
    """
    rows = Rows.of(X)
    classes, numbers = class_numbers(y, len(rows))
    known = _of_classes(rows, numbers, len(classes), choose_device(device))
    return _classifier(classes, known, known.distances, torch.zeros_like(known.shares))


def discriminant_analysis(
    X: Any,  # noqa: N803
    y: Any,
    *,
    shrinkage: float | str | None = None,
    device: str = "auto",
) -> LinearClassifier:
    """Linear discriminant analysis, as scikit-learn's ``LinearDiscriminantAnalysis(solver="lsqr")``.

    The covariance is the classes' own, weighed by their shares of the rows, which are the priors too. Where it has no
    inverse, directions without variance are left out.

    Args:
        X: ``(N, F)``: an array, a tensor or `Features`; read once, and twice for ``auto``.
        y: ``(N,)``, labels.
        shrinkage: towards a multiple of the unit matrix, 0 to 1; ``auto`` by Ledoit and Wolf's rule, for each class on
            its own, whose rows must then fit into memory; None is 0.
        device: where to compute.

    Raises:
        ValueError: as `nearest_mean`, and for a shrinkage that is none.
    """
    _check_shrinkage(shrinkage)
    rows, chosen = Rows.of(X), choose_device(device)
    classes, numbers = class_numbers(y, len(rows))
    known = _of_classes(rows, numbers, len(classes), chosen)
    if shrinkage == "auto":
        with torch.no_grad():
            covariance = sum(
                float(share) * _ledoit_wolf(rows.take(np.flatnonzero(numbers == place)).to(chosen).double())
                for place, share in enumerate(known.shares)
            )
        assert isinstance(covariance, Tensor)
    else:
        covariance = _shrunk(known.covariance, float(shrinkage or 0))
    return _classifier(classes, known, _divided(known.distances, covariance), known.shares.log())


@dataclass(frozen=True, kw_only=True)
class _Classes:
    """What one pass knows of classes, in float64.

    Attributes:
        shares: ``(K,)``, of the rows.
        mean: ``(F,)``, of all rows.
        distances: ``(K, F)``, from it to the mean of each class.
        covariance: ``(F, F)``, within classes.
    """

    shares: Tensor
    mean: Tensor
    distances: Tensor
    covariance: Tensor


def _of_classes(rows: Rows, numbers: NDArray[np.int64], num_classes: int, device: torch.device) -> _Classes:
    labels = on(device, numbers)
    members = torch.nn.functional.one_hot(labels, num_classes).double()
    with torch.no_grad(), numerics("fp32", device):
        known = moments(rows, members, torch.ones(len(rows), dtype=torch.float64, device=device))
        sizes = known.total * known.target_mean
        distances = (known.cross / sizes).T
        between = (distances.T * sizes) @ distances
        return _Classes(
            shares=known.target_mean,
            mean=known.mean,
            distances=distances,
            covariance=(known.gram - between) / known.total,
        )


def _classifier(classes: NDArray[Any], known: _Classes, coefficients: Tensor, offsets: Tensor) -> LinearClassifier:
    """Logits ``(x - mean) c - d c / 2 + offset``, d the distance of the class's mean from that of all rows."""
    intercepts = offsets - (known.distances * coefficients).sum(1) / 2 - coefficients @ known.mean
    return LinearClassifier(
        classes=classes,
        means=(known.distances + known.mean).cpu().numpy(),
        coefficients=coefficients.cpu().numpy(),
        intercepts=intercepts.cpu().numpy(),
    )


def _divided(distances: Tensor, covariance: Tensor) -> Tensor:
    """``distances`` times the inverse of the covariance, or its pseudo-inverse."""
    values, vectors = torch.linalg.eigh(covariance)
    least = values[-1].clamp_min(0) * len(values) * torch.finfo(torch.float64).eps
    inverse = torch.where(values > least, 1 / values, 0)
    along: Tensor = distances @ vectors * inverse
    found: Tensor = along @ vectors.T
    return found


def _shrunk(covariance: Tensor, shrinkage: float) -> Tensor:
    unit = torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device)
    return (1 - shrinkage) * covariance + shrinkage * covariance.diagonal().mean() * unit


def _ledoit_wolf(values: Tensor) -> Tensor:
    """The covariance of rows ``(n, F)``, shrunk as its own noise asks for, measured in each column's deviation."""
    num_rows, width = values.shape
    centred = values - values.mean(0)
    scale = centred.square().mean(0).sqrt()
    scale = torch.where(scale > 0, scale, 1)
    centred = centred / scale
    covariance = centred.T @ centred / num_rows
    fourth = centred.square().sum(1).square().sum() / num_rows
    square = covariance.square().sum()
    noise = (fourth - square) / num_rows
    distance = square - covariance.diagonal().sum().square() / width
    shrinkage = float(torch.minimum(noise, distance) / distance) if noise > 0 and distance > 0 else 0.0
    found: Tensor = _shrunk(covariance, shrinkage) * torch.outer(scale, scale)
    return found


def _check_shrinkage(shrinkage: float | str | None) -> None:
    if shrinkage is None or shrinkage == "auto":
        return
    if isinstance(shrinkage, str) or not 0 <= shrinkage <= 1:
        raise ValueError(f"shrinkage is {shrinkage!r}; expected 0 to 1, auto, or None.")
