"""Neighbours: the images whose features point where those of an asked one do, found in one pass over blocks of rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_BLOCK_BYTES = 1 << 26
"""Of similarities that are held at a time."""


def nearest(
    queries: Tensor,
    blocks: Iterable[tuple[Tensor, NDArray[np.int64]]],
    k: int,
    *,
    left_out: NDArray[np.int64] | None = None,
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The `k` rows of greatest cosine similarity to each query, greatest first: row numbers, similarities ``(M, k)``.

    Of equal ones the lower number comes first. Where there are fewer than `k`, the rest is -1, of similarity -inf. Of a
    row of zeros every similarity is 0. Memory doesn't grow with the number of rows.

    Args:
        queries: ``(M, *F)``.
        blocks: (rows ``(n, *F)``, their numbers ``(n,)``), as `Features.batches` gives them.
        k: at least 1.
        left_out: ``(M,)``, one row number a query that isn't to be found: its own.
    """
    if k < 1:
        raise ValueError(f"k is {k}. Expected at least 1 neighbour.")
    asked = _unit(queries)
    values = torch.full((len(asked), k), -torch.inf)
    numbers = torch.full((len(asked), k), -1, dtype=torch.int64)
    own = None if left_out is None else torch.from_numpy(np.ascontiguousarray(left_out, dtype=np.int64))
    for rows, row_numbers in blocks:
        here = torch.from_numpy(np.ascontiguousarray(row_numbers, dtype=np.int64))
        unit = _unit(rows)
        for part in _parts(len(asked), len(unit)):
            similar = asked[part] @ unit.T  # (m, n)
            if own is not None:
                similar[own[part, None] == here[None]] = -torch.inf
            values[part], numbers[part] = _best(values[part], numbers[part], similar, here, k)
    numbers[values == -torch.inf] = -1
    return numbers.numpy(), values.numpy()


def as_blocks(rows: Tensor, size: int = 8_192) -> Iterator[tuple[Tensor, NDArray[np.int64]]]:
    """Rows in memory ``(N, *F)``, numbered from 0, as `nearest` takes them."""
    for start in range(0, len(rows), size):
        yield rows[start : start + size], np.arange(start, min(start + size, len(rows)))


def _best(values: Tensor, numbers: Tensor, similar: Tensor, here: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The best `k` of what is known ``(m, k)`` and of `similar` ``(m, n)``; ties by the lower number."""
    if similar.shape[1] > 4 * k:  # few of many: the k-th largest first, and all that are as large
        least = similar.topk(k, dim=1).values[:, -1:]
        width = int((similar >= least).sum(1).max())
        similar, places = similar.topk(min(width, similar.shape[1]), dim=1)
        here = here[places]
    else:
        here = here.expand(len(similar), -1)
    all_values, all_numbers = torch.cat([values, similar], 1), torch.cat([numbers, here], 1)
    by_number = all_numbers.argsort(dim=1, stable=True)
    order = by_number.gather(1, all_values.gather(1, by_number).argsort(dim=1, descending=True, stable=True))[:, :k]
    return all_values.gather(1, order), all_numbers.gather(1, order)


def _unit(rows: Tensor) -> Tensor:
    """Rows ``(n, *F)`` as vectors of length 1; of zeros they stay zeros."""
    flat = rows.reshape(len(rows), -1).float()
    unit: Tensor = flat / flat.norm(dim=1, keepdim=True).clamp_min(1e-12)
    return unit


def _parts(num_queries: int, num_rows: int) -> Iterator[slice]:
    several = max(1, _BLOCK_BYTES // (4 * max(1, num_rows)))
    return (slice(start, start + several) for start in range(0, num_queries, several))
