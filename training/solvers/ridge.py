"""Ridge regression: all strengths of the penalty from one decomposition, with what each row's absence would predict."""

from __future__ import annotations

from collections.abc import Sequence
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
from training.solvers.targets import class_numbers, numbers_of, on, row_weights, strengths_of

Array = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class RidgePath:
    """Ridge regressions of S strengths.

    Attributes:
        strengths: ``(S,)``, as they were given: scikit-learn's alpha.
        coefficients: ``(S, F, T)``.
        intercepts: ``(S, T)``, which aren't penalised.
        errors: ``(S, T)``, the (weighted) mean of the squared leave-one-out errors; None where they weren't asked for.
        classes: ``(K,)``, the labels that targets of -1 and 1 stand for, None of a regression. Two classes have one
            target, more have one each.
    """

    strengths: Array
    coefficients: Array
    intercepts: Array
    errors: Array | None
    classes: NDArray[Any] | None

    @property
    def best(self) -> float:
        """The strength with the least leave-one-out error, over all targets.

        Raises:
            ValueError: where errors weren't asked for.
        """
        if self.errors is None:
            raise ValueError("This path has no leave-one-out errors; expected them. Make it with leave_one_out=True.")
        return float(self.strengths[self.errors.mean(1).argmin()])

    def decision_function(self, X: Any, strength: float) -> Array:  # noqa: N803
        """What is predicted for rows ``(N, T)``, by the regression of that strength.

        Raises:
            ValueError: for a strength that isn't one of the path's, and for rows of another width.
        """
        rows, which = Rows.of(X), self._which(strength)
        coefficients, intercepts = self.coefficients[which], self.intercepts[which]
        if rows.width != len(coefficients):
            raise ValueError(
                f"Rows hold {rows.width} numbers; expected {len(coefficients)}, as those that were fitted."
            )
        predicted = np.empty((len(rows), len(intercepts)))
        for where, block in rows.blocks(exact=True):
            predicted[where] = block.double().numpy() @ coefficients + intercepts
        return predicted

    def predict(self, X: Any, strength: float) -> NDArray[Any]:  # noqa: N803
        """Targets ``(N, T)`` of a regression, labels ``(N,)`` of classes; errors as in `decision_function`."""
        predicted = self.decision_function(X, strength)
        if self.classes is None:
            return predicted
        places = predicted.argmax(1) if len(self.classes) > 2 else (predicted[:, 0] > 0).astype(np.int64)
        labels: NDArray[Any] = self.classes[places]
        return labels

    def _which(self, strength: float) -> int:
        found = np.flatnonzero(self.strengths == strength)
        if not len(found):
            known = ", ".join(f"{each:g}" for each in self.strengths)
            raise ValueError(f"No regression of strength {strength} is on this path; expected one of {known}.")
        return int(found[0])


def ridge_path(
    X: Any,  # noqa: N803
    y: Any,
    strengths: Sequence[float],
    *,
    weights: Any = None,
    leave_one_out: bool = True,
    device: str = "auto",
) -> RidgePath:
    """Ridge regressions with free intercepts, one for each strength, all from one decomposition in float64.

    Each is scikit-learn's ``Ridge(alpha=strength)``. Where there are more rows than numbers a row, one pass over the
    rows makes their Gram matrix, block by block, and so it doesn't matter whether they fit into memory; otherwise the
    smaller matrix of the rows' products with each other is decomposed. The errors take a second pass.

    Args:
        X: ``(N, F)``: an array, a tensor or `Features`.
        y: ``(N,)`` or ``(N, T)``, numbers.
        strengths: S numbers above 0.
        weights: ``(N,)``, what each row's squared error counts.
        leave_one_out: whether to say the errors of predictions of each row by the others.
        device: where to compute.

    Raises:
        ValueError: for rows or targets that aren't finite, targets of another number, strengths not above 0.
    """
    rows = Rows.of(X)
    aims = numbers_of(y, len(rows))
    return _path(rows, aims, strengths, weights, leave_one_out=leave_one_out, device=device, classes=None)


def ridge_classifier_path(
    X: Any,  # noqa: N803
    y: Any,
    strengths: Sequence[float],
    *,
    weights: Any = None,
    leave_one_out: bool = True,
    folds: NDArray[np.int64] | None = None,
    relative: bool = False,
    device: str = "auto",
) -> RidgePath:
    """The same for labels ``(N,)``, as targets of -1 and 1: scikit-learn's ``RidgeClassifier``.

    Args:
        X: as in `ridge_path`, as are `strengths`, `weights`, `leave_one_out` and `device`.
        y: labels.
        strengths: likewise.
        weights: likewise.
        leave_one_out: likewise.
        folds: ``(N,)``, the fold of each row: errors are then of predictions by fits that lack its whole fold, each of
            which takes a decomposition of its own.
        relative: whether strengths are in units of the mean square of the (centred) rows' singular values, so that they
            mean the same on rows of any scale and number; the path's own are absolute.
        device: likewise.

    Raises:
        ValueError: as `ridge_path`, and for a single class.
    """
    rows = Rows.of(X)
    classes, numbers = class_numbers(y, len(rows))
    columns = np.arange(len(classes)) if len(classes) > 2 else np.array([1])
    aims = np.where(numbers[:, None] == columns, 1.0, -1.0)
    return _path(
        rows,
        aims,
        strengths,
        weights,
        leave_one_out=leave_one_out,
        device=device,
        classes=classes,
        folds=folds,
        relative=relative,
    )


def leave_one_out_predictions(
    X: Any,  # noqa: N803
    y: Any,
    strength: float,
    *,
    weights: Any = None,
    device: str = "auto",
) -> Array:
    """What a ridge regression of all other rows predicts for each row ``(N, T)``; all else is as in `ridge_path`."""
    rows, chosen = Rows.of(X), choose_device(device)
    aims, counted = on(chosen, numbers_of(y, len(rows))), on(chosen, row_weights(weights, len(rows)))
    (alone,) = strengths_of("strength", [strength])
    with torch.no_grad(), numerics("fp32", chosen):
        spectrum = _Spectrum.of(rows, aims, counted)
        missing = [left for _, left in spectrum.left_out(rows, aims, counted, on(chosen, np.array([alone])))]
    found: Array = (aims - torch.cat(missing)[:, 0]).cpu().numpy()
    return found


def _path(
    rows: Rows,
    aims: Array,
    strengths: Sequence[float],
    weights: Any,
    *,
    leave_one_out: bool,
    device: str,
    classes: NDArray[Any] | None,
    folds: NDArray[np.int64] | None = None,
    relative: bool = False,
) -> RidgePath:
    given, chosen = strengths_of("strengths", strengths), choose_device(device)
    targets, counted = on(chosen, aims), on(chosen, row_weights(weights, len(rows)))
    with torch.no_grad(), numerics("fp32", chosen):
        spectrum = _Spectrum.of(rows, targets, counted)
        if relative:
            given = given * max(float(spectrum.values.sum()) / min(rows.shape), float(np.finfo(np.float32).tiny))
        penalties = on(chosen, given)
        coefficients, errors = spectrum.coefficients(penalties), None
        intercepts = spectrum.target_mean - spectrum.mean @ coefficients
        if leave_one_out or folds is not None:
            squares = torch.zeros((len(given), targets.shape[1]), dtype=torch.float64, device=chosen)
            for fold in [None] if folds is None else np.unique(folds):
                # Rows of weight 0 are predicted by a fit of all others.
                is_out = torch.ones_like(counted) if fold is None else on(chosen, (folds == fold).astype(np.float64))
                fitted = counted if fold is None else counted * (1 - is_out)
                of_fold = spectrum if fold is None else _Spectrum.of(rows, targets, fitted)
                for where, left in of_fold.left_out(rows, targets, fitted, penalties):
                    squares += torch.einsum("n,nst->st", (counted * is_out)[where], left.square())
            errors = (squares / counted.sum()).cpu().numpy()
    return RidgePath(
        strengths=given,
        coefficients=coefficients.cpu().numpy(),
        intercepts=intercepts.cpu().numpy(),
        errors=errors,
        classes=classes,
    )


@dataclass(frozen=True, kw_only=True)
class _Spectrum:
    """Rows and targets about their means, in the eigenvectors of the Gram matrix; R of them have a value above 0.

    Attributes:
        total: sum of weights.
        mean: ``(F,)``.
        target_mean: ``(T,)``.
        basis: ``(F, R)``.
        values: ``(R,)``, of the Gram matrix.
        cross: ``(R, T)``, sums of products of rows along the basis and targets.
        shares: ``(N, R)``, the weighted rows along the basis, each column of length 1; of few rows alone: there a small
            penalty leaves next to nothing of a row's error, and a difference from 1 would be noise.
    """

    total: float
    mean: Tensor
    target_mean: Tensor
    basis: Tensor
    values: Tensor
    cross: Tensor
    shares: Tensor | None = None

    @classmethod
    def of(cls, rows: Rows, targets: Tensor, weights: Tensor) -> _Spectrum:
        if len(rows) <= rows.width + 1:
            return cls._of_products(rows, targets, weights)
        known = moments(rows, targets, weights)
        values, basis = torch.linalg.eigh(known.gram)
        return cls(
            total=known.total,
            mean=known.mean,
            target_mean=known.target_mean,
            basis=basis,
            values=values.clamp_min(0),
            cross=basis.T @ known.cross,
        )

    @classmethod
    def _of_products(cls, rows: Rows, targets: Tensor, weights: Tensor) -> _Spectrum:
        """From the products of rows with each other, of which there are fewer."""
        total = float(weights.sum())
        whole = torch.cat([block.double() for _, block in rows.blocks(targets.device, exact=True)])
        mean, target_mean = weights @ whole / total, weights @ targets / total
        root = weights.sqrt()[:, None]
        centred, aims = (whole - mean) * root, (targets - target_mean) * root
        squares, vectors = torch.linalg.eigh(centred @ centred.T)
        is_there = squares > squares[-1].clamp_min(0) * len(rows) * torch.finfo(torch.float64).eps
        squares, vectors = squares[is_there], vectors[:, is_there]
        return cls(
            total=total,
            mean=mean,
            target_mean=target_mean,
            basis=centred.T @ vectors / squares.sqrt(),
            values=squares,
            cross=squares.sqrt()[:, None] * (vectors.T @ aims),
            shares=vectors,
        )

    def coefficients(self, penalties: Tensor) -> Tensor:
        """``(S, F, T)``."""
        along = self.cross[:, None] / (self.values[:, None, None] + penalties[:, None])  # (R, S, T)
        return (self.basis @ along.flatten(1)).view(-1, *along.shape[1:]).permute(1, 0, 2).contiguous()

    def left_out(self, rows: Rows, targets: Tensor, weights: Tensor, penalties: Tensor) -> Any:
        """(which rows, errors ``(n, S, T)`` of what the other rows predict of each), block by block."""
        inverse = 1 / (self.values[:, None] + penalties)  # (R, S)
        along = (self.cross[:, None] * inverse[..., None]).flatten(1)
        several = max(1, (32 << 20) // (8 * max(rows.width, along.shape[1])))
        for where, block in rows.blocks(targets.device, several, exact=True):
            turned = (block.double() - self.mean) @ self.basis
            if self.shares is not None:
                yield where, self._left_out_of_few(where, turned, targets[where], weights[where], penalties)
                continue
            shares = weights[where, None] * (1 / self.total + turned.square() @ inverse)
            predicted = (turned @ along).view(len(turned), len(penalties), -1)
            yield where, (targets[where, None] - self.target_mean - predicted) / (1 - shares)[..., None]

    def _left_out_of_few(
        self, where: slice, turned: Tensor, targets: Tensor, weights: Tensor, penalties: Tensor
    ) -> Tensor:
        """The same, from what the penalty leaves of a row's own error and of its own weight in it.

        Both are sums over the basis and what no row of it reaches; that is nothing where rows are independent.
        """
        assert self.shares is not None
        root, lengths = weights.sqrt()[:, None], self.values.sqrt()
        own = torch.where(root > 0, self.shares[where] / root, turned / lengths)  # (n, R)
        left = penalties / (self.values[:, None] + penalties)  # (R, S)
        beyond = 1 - weights * (1 / self.total + own.square().sum(1))
        is_beyond = beyond > 8 * len(self.shares) * torch.finfo(torch.float64).eps
        along = self.cross / lengths[:, None]
        rest = (targets - self.target_mean - own @ along) * is_beyond[:, None]
        errors = (own @ (along[:, None] * left[..., None]).flatten(1)).view(len(own), len(penalties), -1)
        free = weights[:, None] * (own.square() @ left) + (beyond * is_beyond)[:, None]
        return (errors + rest[:, None]) / free[..., None]
