"""Stored rows on the GPU that trains on them, where it has room for all: no batch waits for the bus then."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from featstore.store.features import Features
from training.inputs.held import HeldRows, RepeatedRows

MOST = 0.5
"""Of a GPU's free memory, that rows may take: the rest is the model's."""
_BLOCK_BYTES = 64 << 20


def resident(features: Sequence[Features | HeldRows | RepeatedRows], device: torch.device) -> tuple[Tensor, ...] | None:
    """All rows of each view, as `rows_on` gives them; None on a CPU, or where they don't fit."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # what torch keeps for later
    if sum(math.prod(each.shape) * each.dtype.itemsize for each in features) > MOST * free:
        return None
    return tuple(rows_on(device, each) for each in features)


def rows_on(device: torch.device, features: Features | HeldRows | RepeatedRows) -> Tensor:
    """All rows ``(N, *F)`` on a device, brought there in pieces: the host needn't hold them."""
    rows = torch.empty(features.shape, dtype=features.dtype, device=device)
    several = max(1, _BLOCK_BYTES // max(1, rows[:1].nbytes))
    for start in range(0, len(rows), several):
        rows[start : start + several] = features[start : start + several]
    return rows
