"""Moments: weighted sums over rows, of the rows, their products and their products with targets, from one pass."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from training.solvers.rows import Rows

_PIECE_BYTES = 4 << 20
"""Of rows in float64 at a time: what a CPU's cache holds, and enough for products to be fast."""
_SHIFT_ROWS = 512
"""Whose mean rows are moved by."""


@dataclass(frozen=True, kw_only=True)
class Moments:
    """What a pass over rows knows of them, in float64, about their own means.

    Attributes:
        total: the sum of the rows' weights.
        mean: ``(F,)``, of the rows.
        gram: ``(F, F)``, the weighted sum of products of rows less their mean.
        target_mean: ``(T,)``.
        cross: ``(F, T)``, the weighted sum of products of rows and targets, each less its mean.
    """

    total: float
    mean: Tensor
    gram: Tensor
    target_mean: Tensor
    cross: Tensor


def moments(rows: Rows, targets: Tensor, weights: Tensor) -> Moments:
    """Moments of rows and their targets, from one pass; products are taken and summed in float64.

    Rows are first moved by the mean of the first few, so that a mean far from 0 costs no digits.

    Args:
        rows: ``(N, F)``.
        targets: ``(N, T)`` float64, on the device that computes; T may be 0.
        weights: ``(N,)`` float64, there too.
    """
    device, width, num_targets = targets.device, rows.width, targets.shape[1]
    gram, shift = _Gram(width, device), torch.zeros(width, dtype=torch.float64, device=device)
    cross = torch.zeros((num_targets + 1, width), dtype=torch.float64, device=device)  # and the rows' sums
    target_sums = torch.zeros(num_targets, dtype=torch.float64, device=device)
    is_plain = bool((weights == 1).all())
    middle = targets.mean(0)
    for where, block in rows.blocks(device):
        if where.start == 0:
            shift = block[:_SHIFT_ROWS].double().mean(0)
        for start, values in _moved(block, shift):
            piece = slice(where.start + start, where.start + start + len(values))
            roots = weights[piece, None].sqrt()
            aims = (targets[piece] - middle) * roots
            gram.add(values if is_plain else values.mul_(roots))
            cross.addmm_(torch.cat([aims, roots], 1).T, values)
            target_sums += (roots.T @ aims)[0]
    total = float(weights.sum())
    moved, aims = cross[-1] / total, target_sums / total
    return Moments(
        total=total,
        mean=moved + shift,
        gram=gram.whole().sub_(total * torch.outer(moved, moved)),
        target_mean=aims + middle,
        cross=(cross[:-1] - total * torch.outer(aims, moved)).T.contiguous(),
    )


def _moved(block: Tensor, shift: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Where each piece of a block begins, and its rows less `shift` in float64; a CPU's lie in the same memory.

    Pages that are new each time cost a CPU as much as the products do.
    """
    if block.device.type != "cpu":
        yield 0, block.double() - shift
        return
    several = min(len(block), max(256, _PIECE_BYTES // (8 * len(shift))))
    memory = torch.empty((several, len(shift)), dtype=torch.float64)
    for start in range(0, len(block), several):
        piece = block[start : start + several]
        yield start, memory[: len(piece)].copy_(piece).sub_(shift)  # an operation on both types at once is slower


class _Gram:
    """The sum of products of columns ``(F, F)``, of which a CPU computes a half."""

    def __init__(self, width: int, device: torch.device) -> None:
        self._is_half = device.type == "cpu"
        self._sum = torch.zeros((width, width), dtype=torch.float64, device=device)

    def add(self, values: Tensor) -> None:
        """Adds those of rows ``(n, F)``."""
        if not self._is_half:
            self._sum.addmm_(values.T, values)
            return
        from scipy.linalg.blas import dsyrk  # type: ignore[import-untyped]  # scikit-learn brings it

        # What BLAS takes for columns are these rows, as neither array is in its order: so the sum is written in place.
        dsyrk(1.0, values.numpy().T, beta=1.0, c=self._sum.numpy().T, lower=1, overwrite_c=1)

    def whole(self) -> Tensor:
        """All of it."""
        return self._sum.triu() + self._sum.triu(1).T if self._is_half else self._sum
