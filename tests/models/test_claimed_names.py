"""What only says that it is torch's (a function, a tensor, a layer) isn't keyed by the name it has."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from featstore import ModelError, StagedModel
from featstore.models.digests import _home, _is_allowed_home, _is_what_it_says
from featstore.models.tracing import is_library_class


def digest(module: nn.Module) -> str:
    model = StagedModel.from_module(module)
    return model.digest(model.cut_points[-1])


def seeded(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for tensor in module.state_dict().values():
            tensor.copy_(torch.linspace(-1, 1, tensor.numel()).reshape(tensor.shape))
    return module


class Whole(nn.Module):
    def __init__(self, setting: Any) -> None:
        super().__init__()
        self.setting = setting

    def forward(self, values: Tensor) -> Tensor:
        activated: Tensor = self.setting(values)
        return values if values.sum() > 1e9 else activated


def closed(gain: Callable[[Tensor], Tensor]) -> nn.Module:
    class Closed(nn.Module):
        def forward(self, values: Tensor) -> Tensor:
            return values if values.sum() > 1e9 else values * gain(values)

    return nn.Sequential(Closed())


def named_as(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(values: Tensor) -> Tensor:
        twice: Tensor = function(values) * 2
        return twice

    return wrapper


def scripted() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates it
        return torch.jit.script(bypassing)


def bypassing(values: Tensor) -> Tensor:
    return values * values


CLAIMED = [
    (scripted, r"torch\.jit\._script\.(ScriptFunction|bypassing)|torch\.jit\.ScriptFunction"),
    (lambda: named_as(F.relu), "torch.nn.functional.relu"),
    (lambda: named_as(torch.relu), "torch.relu"),
    (lambda: nn.LeakyReLU(0.5).forward, "torch.nn.modules.activation.forward"),
    (lambda: nn.LeakyReLU.forward, "torch.nn.modules.activation.forward"),
]


@pytest.mark.parametrize(("make", "name"), CLAIMED)
def test_a_function_that_only_has_the_name_of_torchs_is_refused(make: Callable[[], Any], name: str) -> None:
    wholes = [nn.Sequential(Whole(make()))]
    if "LeakyReLU.forward" not in str(make()):
        wholes.append(nn.Sequential(nn.Flatten(2), nn.TransformerEncoderLayer(16, 2, 4, activation=make())))
    for module in wholes:
        with pytest.raises(ModelError, match=rf"calls what is named ({name}) and isn't the function of that name"):
            digest(module)


def test_a_wrapper_of_torchs_that_code_reads_is_followed_as_ones_own() -> None:
    def make(factor: float) -> nn.Module:
        @functools.wraps(F.relu)
        def scaled(values: Tensor) -> Tensor:
            return values * factor

        return closed(scaled)

    assert digest(make(1.0)) == digest(make(1.0)) != digest(make(2.0))


def test_torchs_own_functions_are_what_they_say() -> None:
    for space in (torch, F, torchvision.ops, torch.special, torch.linalg):
        for function in vars(space).values():
            if callable(function) and not isinstance(function, type):
                name = getattr(function, "__name__", "")
                if name != "manual_seed" and _is_allowed_home(_home(function)):  # no operation
                    assert _is_what_it_says(function), name
    for kind in vars(nn).values():
        if isinstance(kind, type) and issubclass(kind, nn.Module) and kind is not nn.Module:
            assert is_library_class(kind)


class Doubling(Tensor):
    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_function__(function, types, args, kwargs or {})  # type: ignore[no-untyped-call]
        return result * 2 if function is torch.conv2d else result


def test_a_tensor_of_another_kind_is_refused_and_the_advice_works() -> None:
    conv = nn.Conv2d(3, 2, 1)
    expected = digest(conv)
    conv.weight = nn.Parameter(conv.weight.detach().as_subclass(Doubling))
    model = StagedModel.from_module(nn.Sequential(conv))
    with pytest.raises(ModelError, match=r"weight is a .*\.Doubling, a kind of tensor .*as_subclass\(torch.Tensor\)"):
        model.digests()
    with pytest.raises(ModelError, match=r"it uses gain, a Doubling"):
        digest(closed(torch.ones(1).as_subclass(Doubling)))  # type: ignore[arg-type]
    conv.weight = nn.Parameter(conv.weight.detach().as_subclass(Tensor))
    assert digest(conv) == expected


def test_a_class_that_only_has_the_name_of_torchs_is_no_layer_of_torchs() -> None:
    def make(factor: float) -> nn.Module:
        facts = {"forward": lambda self, values: nn.Conv2d.forward(self, values) * factor}
        kind = type("Conv2d", (nn.Conv2d,), {**facts, "__module__": nn.Conv2d.__module__})
        return seeded(nn.Sequential(kind(3, 4, 3)))

    keys = {digest(make(2.0)), digest(make(3.0)), digest(seeded(nn.Sequential(nn.Conv2d(3, 4, 3))))}
    assert len(keys) == 3
    assert digest(nn.Sequential(Whole(make(2.0)))) != digest(nn.Sequential(Whole(make(3.0))))
