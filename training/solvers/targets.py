"""Targets: what a solver is to predict, checked against its rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

ClassWeights = str | dict[Any, float] | None
"""`balanced` (each class weighs as much as another), a weight by class (others weigh 1), or none."""


def class_numbers(y: Any, num_rows: int) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """The classes of `y` in their order, and the number ``(N,)`` of each row's.

    Raises:
        ValueError: for another number of labels than of rows, missing ones, and for a single class.
    """
    labels = _one_a_row(y, num_rows, "labels")
    if labels.ndim != 1:
        raise ValueError(f"Labels have shape {labels.shape}; expected one label a row, ({num_rows},).")
    if labels.dtype.kind == "f":
        _check_finite(labels, "label")
    classes, numbers = np.unique(labels, return_inverse=True)
    if len(classes) < 2:
        raise ValueError(
            f"All {num_rows:,} rows are of one class, {classes[0]}; expected at least 2 classes. Add rows of another."
        )
    return classes, numbers.astype(np.int64)


def numbers_of(y: Any, num_rows: int) -> NDArray[np.float64]:
    """Targets ``(N, T)``, one column where `y` has none.

    Raises:
        ValueError: for another number of targets than of rows, and for what isn't finite.
    """
    values = _one_a_row(y, num_rows, "targets").astype(np.float64)
    if values.ndim > 2:
        raise ValueError(f"Targets have shape {values.shape}; expected (rows,) or (rows, targets).")
    _check_finite(values, "target")
    return values.reshape(num_rows, -1)


def row_weights(weights: Any, num_rows: int) -> NDArray[np.float64]:
    """What each row counts ``(N,)``; 1 where nobody says.

    Raises:
        ValueError: for another number of weights than of rows, for weights below 0 or not finite, and for no weight.
    """
    if weights is None:
        return np.ones(num_rows)
    values = _one_a_row(weights, num_rows, "weights").astype(np.float64).reshape(-1)
    if len(values) != num_rows:
        raise ValueError(f"Weights have {len(values):,} numbers for {num_rows:,} rows; expected one a row.")
    _check_finite(values, "weight")
    if (values < 0).any() or not values.any():
        raise ValueError(f"Weights go from {values.min():g} to {values.max():g}; expected 0 or more, and some above 0.")
    return values


def weights_by_class(
    class_weight: ClassWeights, classes: NDArray[Any], numbers: NDArray[np.int64], weights: NDArray[np.float64]
) -> NDArray[np.float64]:
    """`weights` ``(N,)`` times those of the rows' classes, as scikit-learn has them.

    Raises:
        ValueError: for a word other than `balanced`, and for classes that aren't there.
    """
    if class_weight is None:
        return weights
    if isinstance(class_weight, str):
        if class_weight != "balanced":
            raise ValueError(f"class_weight is {class_weight!r}; expected balanced, a weight by class, or None.")
        sums = np.bincount(numbers, weights, minlength=len(classes))
        by_class = weights.sum() / (len(classes) * np.where(sums > 0, sums, 1))
    else:
        if not isinstance(class_weight, dict):
            raise TypeError(
                f"class_weight is {class_weight!r}; expected balanced, a weight by class in a dict, or None."
            )
        strange = [label for label in class_weight if label not in classes]
        if strange:
            raise ValueError(f"class_weight names {strange[0]}, which no row is of; expected some of {classes!r}.")
        by_class = np.asarray([float(class_weight.get(label, 1.0)) for label in classes])
    found: NDArray[np.float64] = weights * by_class[numbers]
    return found


def strengths_of(name: str, given: Any) -> NDArray[np.float64]:
    """Strengths ``(S,)`` of a penalty, one or several.

    Raises:
        ValueError: for what isn't one number above 0, or several; `name` is what they are called.
    """
    expected = "expected one number above 0, or several in a list"
    try:
        strengths = np.atleast_1d(np.asarray(given, dtype=np.float64))
    except (TypeError, ValueError):
        raise ValueError(f"{name} is {given!r}; {expected}.") from None
    if strengths.ndim != 1 or not strengths.size:
        raise ValueError(f"{name} is of shape {strengths.shape}; {expected}.")
    bad = strengths[~(np.isfinite(strengths) & (strengths > 0))]
    if bad.size:
        raise ValueError(f"{name} is {bad[0]:g}; {expected}.")
    return strengths


def _one_a_row(given: Any, num_rows: int, name: str) -> NDArray[Any]:
    values = given.detach().cpu().numpy() if isinstance(given, Tensor) else np.asarray(given)
    if values.ndim == 0 or len(values) != num_rows:
        found = "none" if values.ndim == 0 else f"{len(values):,}"
        raise ValueError(f"There are {found} {name} for {num_rows:,} rows; expected one a row, in the rows' order.")
    return values


def _check_finite(values: NDArray[Any], name: str) -> None:
    bad = np.argwhere(~np.isfinite(values))
    if len(bad):
        raise ValueError(
            f"The {name} of row {int(bad[0][0])} is {values[tuple(bad[0])]}, and {len(bad):,} are not finite; expected "
            "numbers. Leave rows without a target out."
        )


def on(device: torch.device, values: NDArray[Any]) -> Tensor:
    """The values on a device, of their own type."""
    return torch.from_numpy(np.ascontiguousarray(values)).to(device)
