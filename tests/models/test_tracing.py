"""Tracing finds a module's tensors as torch.fx does."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn

from featstore.models.tracing import _Tracer, traced


class Linear(nn.Linear):
    second: nn.Parameter


class Held(nn.Module):
    """Tensors under two names, of a leaf, of no file, without a gradient, and one that belongs to nothing."""

    kept: Tensor
    left: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.ones(3))
        self.inner = Linear(3, 3)
        self.also = self.inner
        self.inner.second = self.first
        self.register_buffer("kept", torch.ones(3))
        self.register_buffer("left", torch.zeros(3), persistent=False)
        self.plain = torch.full((3,), 2.0)
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.inner.second + self.kept * self.left + self.plain * self.first
        x = nn.functional.linear(x, self.also.weight, self.inner.bias) * self.frozen
        result: Tensor = self.inner(x) + self.inner.weight.sum(dim=0) - self.first
        return result


def test_a_tensor_has_the_name_that_fx_gives_it(monkeypatch: pytest.MonkeyPatch) -> None:
    module = Held().eval()

    def operations() -> list[str]:
        trace, opaque = traced(module, training=False, opaque=frozenset())
        assert not opaque
        return [node.format_node() or "" for node in trace.output.graph.nodes]

    found = operations()
    monkeypatch.setattr(_Tracer, "getattr", fx.Tracer.getattr)
    assert found == operations()
    assert any("get_attr" in line and "target=inner.weight" in line for line in found)
