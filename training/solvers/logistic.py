"""Logistic regression: multinomial, with an L2 penalty: the whole path of strengths, or a grid with folds, at once."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from featstore.models.modes import numerics
from featstore.models.trunk import choose_device
from training.solvers.newton import CentredRows, Point, Problems, approach, minimise
from training.solvers.rows import Rows
from training.solvers.targets import ClassWeights, class_numbers, on, row_weights, strengths_of, weights_by_class

Array = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class LogisticPath:
    """Logistic regressions of S strengths of the penalty.

    Two classes are the binomial regression of scikit-learn, whose one row w is -w/2 and w/2 here: the probabilities and
    the objective are its.

    Attributes:
        classes: ``(K,)``, the labels in the order of the coefficients.
        C: ``(S,)``, the inverse strengths, as they were given.
        coefficients: ``(S, K, F)``.
        intercepts: ``(S, K)``.
        objectives: ``(S,)``, the sum of the losses times C, and half of the squared norm of the coefficients.
        num_iterations: ``(S,)``, Newton steps, each one pass over the rows in float32.
        num_products: ``(S,)``, products of the Hessian within them, each a pass that may be rough.
        is_converged: ``(S,)``, whether the tolerance was reached.
    """

    classes: NDArray[Any]
    C: Array
    coefficients: Array
    intercepts: Array
    objectives: Array
    num_iterations: NDArray[np.int64]
    num_products: NDArray[np.int64]
    is_converged: NDArray[np.bool_]

    def decision_function(self, X: Any, which: int = -1) -> NDArray[np.float32]:  # noqa: N803
        """Logits ``(N, K)`` of rows, by the strength at place `which` of `C`."""
        return _products(Rows.of(X), self.coefficients[which], self.intercepts[which])

    def predict_proba(self, X: Any, which: int = -1) -> NDArray[np.float32]:  # noqa: N803
        """The probability of each class ``(N, K)``, by the strength at place `which` of `C`."""
        logits = torch.from_numpy(self.decision_function(X, which))
        chances: NDArray[np.float32] = torch.softmax(logits, 1).numpy()
        return chances

    def predict(self, X: Any, which: int = -1) -> NDArray[Any]:  # noqa: N803
        """The likeliest label of each row ``(N,)``, by the strength at place `which` of `C`."""
        labels: NDArray[Any] = self.classes[self.decision_function(X, which).argmax(1)]
        return labels


def logistic_path(
    X: Any,  # noqa: N803
    y: Any,
    *,
    C: float | Sequence[float],  # noqa: N803
    standardised: bool = False,
    weights: Any = None,
    class_weight: ClassWeights = None,
    tol: float = 1e-5,
    max_iterations: int = 100,
    device: str = "auto",
    warm: bool = True,
) -> LogisticPath:
    """Multinomial logistic regressions with an L2 penalty and free intercepts, one for each C.

    The objective is that of scikit-learn's ``LogisticRegression(C=C)``: C times the sum of the (weighted) losses, and
    half of the squared norm of the coefficients. It is solved by Newton steps (see `training.solvers.newton`).

    Args:
        X: ``(N, F)``: an array, a tensor or `Features`. What doesn't fit into memory is read again at each pass.
        y: ``(N,)``, labels.
        C: inverse strengths of the penalty, in any order.
        standardised: penalises coefficients of rows whose columns have mean 0 and deviation 1; the ones returned are of
            the rows as they are.
        weights: ``(N,)``, what each row's loss counts.
        class_weight: the same by class, times `weights`.
        tol: ends when the objective is estimated to lie no more than about this share of it above the least.
        max_iterations: most Newton steps for one C; `LogisticPath.is_converged` says where they were too few.
        device: where to compute.
        warm: starts from the solution for the next smaller C; otherwise each from 0.

    Warns:
        ConvergenceWarning: scikit-learn's, where steps were too few.

    Raises:
        ValueError: for rows that aren't finite, a single class, labels of another number, C or tol not above 0.
    """
    rows = Rows.of(X)
    strengths = strengths_of("C", C)
    _check_options(tol, max_iterations)
    classes, numbers = class_numbers(y, len(rows))
    counted = weights_by_class(class_weight, classes, numbers, row_weights(weights, len(rows)))
    _check_each_counts(classes, numbers, counted)
    chosen = choose_device(device)
    by_row = on(chosen, counted)
    found: dict[int, tuple[Array, Array, float, int, int, bool]] = {}
    with torch.no_grad(), numerics("fp32", chosen):
        centred = CentredRows(rows, by_row, standardised=standardised, device=chosen, columns=len(classes))
        problems = Problems(centred, numbers, len(classes), by_row[:, None])
        total = float(counted.sum())
        point: Point | None = None
        for place in np.argsort(strengths, kind="stable"):
            penalty = _penalty(strengths[place], [total], len(classes), chosen)
            if point is None or not warm:
                point = approach(problems, penalty, max_iterations=max_iterations)
            solved = minimise(problems, point, penalty, tol=tol, max_iterations=max_iterations)
            point = solved.point
            coefficients, intercepts = _of_rows(centred, point)
            norm = float(point.values[:, :-1].double().square().sum()) * (2 if len(classes) == 2 else 1)
            objective = strengths[place] * total * float(point.losses) + norm / 2
            counts = solved.num_iterations, solved.num_products, solved.is_converged
            found[int(place)] = coefficients, intercepts, objective, *counts
    columns = [np.stack(each) for each in zip(*(found[place] for place in range(len(strengths))), strict=True)]
    names = ("coefficients", "intercepts", "objectives", "num_iterations", "num_products", "is_converged")
    _warn_unless(columns[-1], strengths, max_iterations)
    return LogisticPath(classes=classes, C=strengths, **dict(zip(names, columns, strict=True)))


def cross_validated(
    X: Any,  # noqa: N803
    y: Any,
    *,
    C: Sequence[float],  # noqa: N803
    folds: int | Sequence[int] | NDArray[Any] = 5,
    weights: Any = None,
    class_weight: ClassWeights = None,
    tol: float = 1e-4,
    max_iterations: int = 100,
    device: str = "auto",
) -> Array:
    """The accuracy ``(S, folds)`` of each C on the rows that each fold holds out.

    All folds of one C are one problem, whose products are shared, and each C starts from the solution of the next
    smaller one.

    Args:
        X: as `logistic_path` has it.
        y: ``(N,)``, labels.
        C: S inverse strengths.
        folds: how many, dealt as scikit-learn's ``StratifiedKFold`` deals them; or the number of each row's ``(N,)``.
        weights: ``(N,)``, what each row's loss counts, and a row in an accuracy.
        class_weight: the same by class.
        tol: ends when the objective is estimated to lie no more than about this share of what coefficients take off it
            above the least; accuracies need less than coefficients.
        max_iterations: most Newton steps for one C.
        device: where to compute.

    Warns:
        ConvergenceWarning: as `logistic_path`.

    Raises:
        ValueError: as `logistic_path`; for fewer than two folds, and a fold that leaves no row of a class to train on.
    """
    rows = Rows.of(X)
    strengths = strengths_of("C", C)
    _check_options(tol, max_iterations)
    classes, numbers = class_numbers(y, len(rows))
    fold_of, num_folds = _folds(folds, numbers)
    counted = row_weights(weights, len(rows))
    of_folds = np.empty((len(rows), num_folds))
    for fold in range(num_folds):
        given = np.where(fold_of == fold, 0.0, counted)
        of_folds[:, fold] = weights_by_class(class_weight, classes, numbers, given)
        _check_each_counts(classes, numbers, of_folds[:, fold], where=f" outside fold {fold}")
    chosen = choose_device(device)
    scores, has_ended = np.empty((len(strengths), num_folds)), np.zeros(len(strengths), bool)
    with torch.no_grad(), numerics("fp32", chosen):
        by_row, columns = on(chosen, counted), num_folds * len(classes)
        centred = CentredRows(rows, by_row, standardised=False, device=chosen, columns=columns)
        problems = Problems(centred, numbers, len(classes), on(chosen, of_folds))
        held_out, truth = on(chosen, fold_of), on(chosen, numbers)
        sizes = torch.bincount(held_out, by_row, minlength=num_folds)
        if not bool(sizes.all()):
            raise ValueError(
                f"Fold {int(sizes.argmin())} holds out no row that counts; expected one or more. Leave rows of weight "
                "0 out, or deal fewer folds."
            )
        point: Point | None = None
        for place in np.argsort(strengths, kind="stable"):
            penalty = _penalty(strengths[place], of_folds.sum(0), len(classes), chosen)
            if point is None:
                point = approach(problems, penalty, max_iterations=max_iterations)
            solved = minimise(problems, point, penalty, tol=tol, max_iterations=max_iterations, of_gain=True)
            point, has_ended[place] = solved.point, solved.is_converged
            is_right = problems.chosen(point, held_out) == truth
            right = torch.bincount(held_out, is_right * by_row, minlength=num_folds)
            scores[place] = (right / sizes).cpu().numpy()
    _warn_unless(has_ended, strengths, max_iterations)
    return scores


def _warn_unless(has_ended: NDArray[np.bool_], strengths: Array, max_iterations: int) -> None:
    if not has_ended.all():
        from sklearn.exceptions import ConvergenceWarning

        left = ", ".join(f"{each:g}" for each in strengths[~has_ended][:3])
        warnings.warn(
            f"Logistic regression isn't solved to the tolerance for C {left}, after up to {max_iterations} steps. "
            "Scale the rows (standardised=True), take a smaller C, or more steps.",
            ConvergenceWarning,
            stacklevel=3,
        )


def _check_options(tol: float, max_iterations: int) -> None:
    if not isinstance(tol, int | float | np.number) or not tol > 0:
        raise ValueError(f"tol is {tol!r}; expected a share of the objective above 0, as 1e-5.")
    if not isinstance(max_iterations, int | np.integer) or max_iterations < 1:
        raise ValueError(f"max_iterations is {max_iterations!r}; expected a whole number of at least 1.")


def _check_each_counts(classes: NDArray[Any], numbers: NDArray[np.int64], weights: Array, where: str = "") -> None:
    """The intercept of a class without a row has no best value."""
    sums = np.bincount(numbers, weights, minlength=len(classes))
    if not sums.all():
        missing = classes[int(np.flatnonzero(sums == 0)[0])]
        raise ValueError(f"Class {missing} has no row{where} that counts; expected one or more. Leave the class out.")


def _folds(folds: int | Sequence[int] | NDArray[Any], numbers: NDArray[np.int64]) -> tuple[NDArray[np.int64], int]:
    """The number of each row's fold, and how many there are."""
    if isinstance(folds, int | np.integer):
        from sklearn.model_selection import StratifiedKFold

        if folds < 2 or folds > len(numbers):
            raise ValueError(f"folds is {folds}; expected 2 or more, and at most the {len(numbers):,} rows.")
        scarce = np.bincount(numbers)
        if scarce.min() < 2:
            raise ValueError(f"Class number {scarce.argmin()} has a single row; expected 2 or more, to hold one out.")
        fold_of = np.empty(len(numbers), np.int64)
        dealt = StratifiedKFold(int(min(folds, scarce.max())))
        if dealt.n_splits < folds:
            raise ValueError(f"folds is {folds}; expected at most {scarce.max()}, the rows of the commonest class.")
        import warnings

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of a class with fewer rows than folds, which is fine here
            for fold, (_, rows) in enumerate(dealt.split(numbers, numbers)):
                fold_of[rows] = fold
        return fold_of, int(folds)
    given = np.asarray(folds)
    names, fold_of = np.unique(given, return_inverse=True)
    if given.shape != numbers.shape or len(names) < 2:
        raise ValueError(
            f"folds has shape {given.shape} and {len(names)} different numbers; expected one a row, "
            f"({len(numbers)},), and two or more."
        )
    return fold_of.astype(np.int64), len(names)


def _penalty(strength: float, totals: Any, num_classes: int, device: torch.device) -> torch.Tensor:
    """The penalty of each problem; of two classes, both rows carry half of scikit-learn's, so half of its square."""
    factor = 2 if num_classes == 2 else 1
    return torch.tensor(factor / (strength * np.asarray(totals)), dtype=torch.float32, device=device)


def _of_rows(centred: CentredRows, point: Point) -> tuple[Array, Array]:
    """Coefficients ``(K, F)`` and intercepts ``(K,)`` of the rows as they are."""
    values = point.values[0].double()
    basis = centred.basis
    along = values[:-1] if basis is None else basis.double() @ values[:-1]
    coefficients = (along / centred.scale.double()[:, None]).T
    intercepts = values[-1] - coefficients @ centred.mean.double()
    return coefficients.cpu().numpy(), intercepts.cpu().numpy()


def _products(rows: Rows, coefficients: Array, intercepts: Array) -> NDArray[np.float32]:
    if rows.width != coefficients.shape[1]:
        raise ValueError(
            f"Rows hold {rows.width} numbers; expected {coefficients.shape[1]}, as those that were fitted."
        )
    matrix, offset = (torch.from_numpy(each.copy()).to(rows.dtype) for each in (coefficients.T, intercepts))
    logits = np.empty((len(rows), len(coefficients)), np.float32)
    with torch.no_grad(), numerics("fp32", torch.device("cpu")):
        for where, block in rows.blocks(exact=True):
            logits[where] = torch.addmm(offset, block, matrix).numpy()
    return logits
