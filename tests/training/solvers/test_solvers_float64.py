"""Rows in float64 that differ by less than float32 can tell are solved as if their common part weren't there."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from training.solvers.class_means import discriminant_analysis, nearest_mean
from training.solvers.logistic import logistic_path
from training.solvers.neighbors import KNearest
from training.solvers.ridge import ridge_classifier_path
from training.solvers.rows import Rows

SECONDS = 1.7e9
"""Since 1970, of a day in 2023: float32 tells 128 seconds apart."""


def ridge(rows: Any, labels: NDArray[Any], asked: Any) -> NDArray[Any]:
    return ridge_classifier_path(rows, labels, [1.0], device="cpu").decision_function(asked, 1.0)


def logistic(rows: Any, labels: NDArray[Any], asked: Any) -> NDArray[Any]:
    return logistic_path(rows, labels, C=1.0, device="cpu").predict_proba(asked)


def neighbors(rows: Any, labels: NDArray[Any], asked: Any) -> NDArray[Any]:
    return KNearest(rows, labels, k=5, metric="euclidean", device="cpu").neighbors(asked)[0]


def discriminants(rows: Any, labels: NDArray[Any], asked: Any) -> NDArray[Any]:
    return discriminant_analysis(rows, labels, device="cpu").decision_function(asked)


def means(rows: Any, labels: NDArray[Any], asked: Any) -> NDArray[Any]:
    return nearest_mean(rows, labels, device="cpu").predict(asked)


@pytest.mark.parametrize("memory_bytes", [None, 0])  # kept, and read at every pass
@pytest.mark.parametrize("solver", [ridge, logistic, neighbors, discriminants, means])
def test_a_common_part_changes_nothing(solver: Callable[..., NDArray[Any]], memory_bytes: int | None) -> None:
    rng = np.random.default_rng(0)
    near = rng.integers(-8, 9, (120, 6)).astype(np.float64)  # whole numbers: float64 holds both sums exactly
    labels = (near[:, 0] + near[:, 1] + 4 * rng.standard_normal(120) > 0).astype(np.int64)
    expected = solver(Rows.of(near, memory_bytes=memory_bytes), labels, near[:50])
    far = near + SECONDS
    found = solver(Rows.of(far, memory_bytes=memory_bytes), labels, far[:50])
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-4)
    assert np.array_equal(far, near + SECONDS)  # nobody writes to a caller's array


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.int32])
def test_a_tensor_of_wide_numbers_is_read_exactly_where_that_is_asked_for(dtype: torch.dtype) -> None:
    rows = torch.tensor([[1_700_000_001], [1_700_000_002]], dtype=dtype)
    ((_, exact),) = Rows.of(rows).blocks(exact=True)
    ((_, rounded),) = Rows.of(rows).blocks()
    assert exact.tolist() == [[1_700_000_001.0], [1_700_000_002.0]]
    assert rounded.dtype == torch.float32
    assert Rows.of(rows).take(np.array([1])).tolist() == [[1_700_000_002.0]]


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.int16, np.uint8, np.bool_])
def test_narrow_numbers_are_no_wider_for_it(dtype: type) -> None:
    ((_, exact),) = Rows.of(np.ones((2, 3), dtype)).blocks(exact=True)
    assert exact.dtype == torch.float32
