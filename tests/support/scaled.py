"""Rows of values of all sizes, and what whole numbers and scales stand for, by numpy alone."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def some_values(num_rows: int, shape: tuple[int, ...] = (5,)) -> NDArray[np.float32]:
    """Rows of magnitudes from 1e-38 to 1e38, every seventh of zeros and every fifth without negative values."""
    rng = np.random.default_rng(0)
    values = rng.standard_normal((num_rows, *shape)) * 10 ** rng.uniform(-38, 37, (num_rows, *[1] * len(shape)))
    values[::7] = 0
    values[::5] = np.abs(values[::5])
    return values.astype(np.float32)


def rounded(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """What is read of values ``(n, *F)``, of rows that aren't zero, that were stored as whole numbers."""
    rows = values.reshape(len(values), -1)
    scales = np.abs(rows).max(axis=1) / np.float32(127)
    return unscaled(np.rint(rows / scales[:, None]), scales).reshape(values.shape)


def unscaled(numbers: NDArray[Any], scales: NDArray[Any]) -> NDArray[np.float32]:
    """The values of whole numbers ``(n, *F)`` and scales ``(n,)``."""
    products: NDArray[np.float32] = numbers.astype(np.float32) * scales.reshape(-1, *[1] * (numbers.ndim - 1))
    return products
