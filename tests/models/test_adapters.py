"""Adapters: networks of several inputs or outputs are refused with three lines that work as they are printed."""

from __future__ import annotations

import textwrap
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import pytest
import torch
from support.tiny import VIEW, net
from torch import Tensor, nn

from featstore import ModelError, StagedModel, backbone

Named = namedtuple("Named", "logits maps")


@dataclass
class Record:
    logits: Tensor
    maps: Tensor


@dataclass
class ModelOutput(OrderedDict[str, Any]):
    """As Hugging Face's: fields that aren't None are items, and a number takes the items in order."""

    logits: Any = None
    maps: Any = None

    def __post_init__(self) -> None:
        self.update(
            {each.name: getattr(self, each.name) for each in fields(self) if getattr(self, each.name) is not None}
        )

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(key) if isinstance(key, str) else tuple(self.values())[key]


class Several(nn.Module):
    def __init__(self, pack: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.net, self.pack = net(), pack

    def forward(self, images: Tensor) -> Any:
        maps = self.net.layer1(images)
        return self.pack(self.net.fc(self.net.layer2(maps).mean((2, 3))), maps)


class Untraceable(Several):
    def forward(self, images: Tensor) -> Any:
        return super().forward(images) if images.sum() != 0 else None


class Plain(Several):
    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = super().forward(images)[0]
        return logits


def adapted(module: nn.Module, refusal: pytest.ExceptionInfo[ModelError]) -> StagedModel:
    """What comes of running the lines that a refusal prints."""
    names: dict[str, Any] = {"net": module, "torch": torch}
    exec(textwrap.dedent(str(refusal.value).partition("\n")[2]), names)
    return StagedModel.from_module(names["net"], view=VIEW)


@pytest.mark.parametrize(
    ("pack", "kind", "tensors"),
    [
        (lambda logits, maps: (logits, maps), "tuple", ["[0]", "[1]"]),
        (lambda logits, maps: [None, logits], "list", ["[1]"]),
        (lambda logits, maps: {"logits": logits, "maps": maps}, "dict", ["['logits']", "['maps']"]),
        (lambda logits, maps: {"all": {"n": 3, "all": [logits]}}, "dict", ["['all']['all'][0]"]),
        (Named, "Named", [".logits", ".maps"]),
        (Record, "Record", [".logits", ".maps"]),
        (ModelOutput, "dict", ["['logits']", "['maps']"]),
    ],
)
def test_of_several_outputs_the_refusal_names_each_tensor_and_its_lines_pick_one(
    pack: Any, kind: str, tensors: list[str]
) -> None:
    module = Several(pack).eval()
    with pytest.raises(ModelError, match=rf"Several returns a value of type {kind} in eval mode") as refusal:
        StagedModel.from_module(module)
    assert f"self.net(images){tensors[0]}\n" in str(refusal.value)
    assert len(tensors) == 1 or f"(its tensors: {', '.join(tensors)})" in str(refusal.value)
    expected = StagedModel.from_module(Plain(lambda *each: each).eval(), view=VIEW)
    assert list(adapted(module, refusal).digests().values()) == list(expected.digests().values())


@pytest.mark.parametrize("pack", [ModelOutput, lambda logits, maps: (logits, maps), Record])
def test_what_a_whole_module_returns_is_seen_where_it_is_taken(pack: Any) -> None:
    module = nn.Sequential(Untraceable(pack)).eval()
    images = torch.randn((2, 3, 16, 16), generator=torch.Generator().manual_seed(0))
    model = StagedModel.from_module(module, view=VIEW)
    with pytest.raises(
        ModelError, match=r"only tensors can be activations. Hand over a module that returns"
    ) as refusal:
        model.activations(images, ["0"])
    assert torch.equal(adapted(module, refusal)(images), net()(images))


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, mask: Tensor | None, images: Tensor, scale: int = 1) -> Tensor:
        scores: Tensor = self.net(images) if mask is None else self.net(images) * mask
        return scores


class ByName(Masked):
    def forward(self, *, x: Tensor) -> Tensor:  # type: ignore[override]
        scores: Tensor = self.net(x)
        return scores


class ByPlace(Masked):
    def forward(self, x: Tensor, mask: None, /) -> Tensor:  # type: ignore[override]
        scores: Tensor = self.net(x)
        return scores


@pytest.mark.parametrize(
    ("kind", "said", "call"),
    [
        (Masked, "needs mask besides images", "self.net(mask=None, images=images)"),
        (ByName, "takes x by that name alone", "self.net(x=images)"),
        (ByPlace, "needs mask besides images", "self.net(images, None)"),
    ],
)
def test_of_several_inputs_the_refusal_names_the_others_and_its_lines_give_them(
    kind: Any, said: str, call: str
) -> None:
    module = kind()
    with pytest.raises(ModelError, match=said) as refusal:
        StagedModel.from_module(module)
    assert call in str(refusal.value)
    assert list(adapted(module, refusal).digests().values()) == list(StagedModel.from_module(net()).digests().values())


def test_a_forward_without_input_is_refused() -> None:
    class Constant(nn.Module):
        def forward(self) -> Tensor:
            return torch.zeros(1)

    with pytest.raises(ModelError, match="The forward of Constant takes nothing; a staged model's takes images"):
        backbone(Constant())
