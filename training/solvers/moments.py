"""Moments: weighted sums over rows, of the rows, their products and their products with targets, from one pass."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from training.solvers.rows import Rows


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

    Rows are first moved by the mean of the first block, so that a mean far from 0 costs no digits.

    Args:
        rows: ``(N, F)``.
        targets: ``(N, T)`` float64, on the device that computes; T may be 0.
        weights: ``(N,)`` float64, there too.
    """
    device, width, num_targets = targets.device, rows.width, targets.shape[1]
    sums = torch.zeros(width + num_targets, dtype=torch.float64, device=device)
    gram = torch.zeros((width, width), dtype=torch.float64, device=device)
    cross = torch.zeros((width, num_targets), dtype=torch.float64, device=device)
    shift: Tensor | None = None
    is_plain = bool((weights == 1).all())
    middle = targets.mean(0)
    for where, block in rows.blocks(device, exact=True):
        values, aims, weight = block.double(), targets[where] - middle, weights[where, None]
        shift = values.mean(0) if shift is None else shift
        values = values - shift if values is block else values.sub_(shift)  # a block isn't ours to write to
        root = weight.sqrt()
        weighted, aimed = (values, aims) if is_plain else (values.mul_(root), aims * root)
        gram += _gram(weighted)
        cross += weighted.T @ aimed
        sums += (root.T @ torch.cat([weighted, aimed], 1))[0]
    assert shift is not None
    total = float(weights.sum())
    moved, aims = sums[:width] / total, sums[width:] / total
    return Moments(
        total=total,
        mean=moved + shift,
        gram=gram - total * torch.outer(moved, moved),
        target_mean=aims + middle,
        cross=cross - total * torch.outer(moved, aims),
    )


def _gram(values: Tensor) -> Tensor:
    """The products of columns ``(F, F)``: numpy computes a half of them and mirrors it, torch all."""
    if values.device.type != "cpu":
        return values.T @ values
    array = values.numpy()
    return torch.from_numpy(array.T @ array)
