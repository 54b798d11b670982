"""Features that another program has made."""

import numpy as np
from numpy.typing import NDArray

NUM = 8


def values(num_rows: int = NUM, shape: tuple[int, ...] = (6,), seed: int = 0) -> NDArray[np.float32]:
    """Rows ``(num_rows, *shape)``."""
    return np.random.default_rng(seed).standard_normal((num_rows, *shape)).astype(np.float32)
