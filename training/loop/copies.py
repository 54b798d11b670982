"""Copies: the tensors of a module, copied and put back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn


def copied_tensors(module: nn.Module) -> dict[str, Tensor]:
    """A copy of each parameter and buffer, those that are never saved among them."""
    return {name: tensor.detach().clone() for name, tensor in tensors_of(module)}


def put_back(module: nn.Module, copied: Mapping[str, Tensor]) -> None:
    """Writes what `copied_tensors` copied into the module's own tensors."""
    with torch.no_grad():
        for name, tensor in tensors_of(module):
            tensor.copy_(copied[name])


def tensors_of(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Each parameter and buffer by name, those that are never saved among them."""
    yield from module.named_parameters()
    yield from module.named_buffers()
