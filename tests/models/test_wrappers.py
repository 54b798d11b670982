"""Wrappers: what runs a network and computes what it does is taken off, with one key; what makes tensors is refused."""

from __future__ import annotations

import copy
import textwrap
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny import VIEW, net
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.nn.utils.parametrize import is_parametrized

from featstore import ModelError, StagedModel, backbone


def distributed(module: nn.Module, store: Path) -> nn.Module:
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    try:
        return nn.parallel.DistributedDataParallel(module)
    finally:
        torch.distributed.destroy_process_group()


def compiled_in_place(module: nn.Module) -> nn.Module:
    module.compile()
    return module


WRAPPERS: dict[str, Callable[[nn.Module], Any]] = {
    "DataParallel": nn.DataParallel,
    "torch.compile": torch.compile,
    "compiled in place": compiled_in_place,
}


@pytest.mark.parametrize("kind", WRAPPERS)
@pytest.mark.parametrize("path", ["", "layer1"])
def test_a_wrapper_is_taken_off_and_said_and_the_keys_are_those_without_it(kind: str, path: str) -> None:
    module: Any = net()
    expected = StagedModel.from_module(net(), view=VIEW)
    if path:
        setattr(module, path, WRAPPERS[kind](module.get_submodule(path)))
    else:
        module = WRAPPERS[kind](module)
    before = [(name, part, part._compiled_call_impl) for name, part in module.named_modules()]
    model = StagedModel.from_module(module, view=VIEW)
    assert model.digests() == expected.digests()
    assert model.notes == (f"{path or 'the model'} ({kind}): taken off; the module inside is run and keyed as it is",)
    assert list(model.tensors()) == list(expected.tensors())
    assert model.name == "net"
    after = [(name, part, part._compiled_call_impl) for name, part in module.named_modules()]
    assert after == before  # the caller's stays as it was


def test_several_wrappers_around_each_other_are_taken_off(tmp_path: Path) -> None:
    module: Any = torch.compile(distributed(net(), tmp_path / "store"))
    model = backbone(module)
    assert model.digests() == StagedModel.from_module(net()).digests()
    assert [note.partition(":")[0] for note in model.notes] == [
        "the model (torch.compile)",
        "the model (DistributedDataParallel)",
    ]


def test_what_stays_compiled_is_refused_and_the_advice_works() -> None:
    module = net()
    module.fc.compile()  # a layer, which the stages hold
    with pytest.raises(ModelError, match=r"fc \(Linear\) was compiled in place \(net\.fc\.compile\(\)\), .*deepcopy"):
        StagedModel.from_module(module)
    assert StagedModel.from_module(copy.deepcopy(module)).digests() == StagedModel.from_module(net()).digests()


def test_a_hook_on_a_wrapper_is_refused() -> None:
    wrapped = nn.DataParallel(net())
    wrapped.register_forward_hook(lambda *_: None)
    with pytest.raises(ModelError, match=r"the model \(DataParallel\) has a forward hook"):
        StagedModel.from_module(wrapped)


def test_a_sharded_network_is_refused_by_name() -> None:
    kind = type("FullyShardedDataParallel", (nn.Module,), {"__module__": "torch.distributed.fsdp"})
    with pytest.raises(ModelError, match=r"1 \(FullyShardedDataParallel\) is sharded: .*full_state_dict=True"):
        StagedModel.from_module(nn.Sequential(net(), kind()))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_exported_and_scripted_networks_are_refused_with_what_to_hand_over() -> None:
    example = torch.zeros(2, 3, 16, 16)
    exported: Any = torch.export.export(nn.Sequential(nn.Conv2d(3, 2, 3), nn.ReLU()), (example,))
    for make in (backbone, StagedModel.from_module):
        with pytest.raises(TypeError, match=r"A ExportedProgram is no torch.nn.Module, .* hand over the module itself"):
            make(exported)
        with pytest.raises(ModelError, match=r"is of an exported program. Hand over the nn.Module it was exported"):
            make(exported.module())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.trace(net(), example)  # type: ignore[no-untyped-call]
    with pytest.raises(ModelError, match=r"is a TorchScript module, .* Hand over the nn.Module it was made from"):
        StagedModel.from_module(scripted)


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm`:FutureWarning")
@pytest.mark.parametrize(
    "make",
    [
        lambda layer: parametrizations.weight_norm(layer),
        lambda layer: parametrizations.spectral_norm(layer),
        lambda layer: nn.utils.weight_norm(layer),  # the older ones, by hooks
        lambda layer: nn.utils.spectral_norm(layer),
        lambda layer: prune.random_unstructured(layer, "weight", 0.5),  # type: ignore[no-untyped-call]
    ],
)
def test_a_weight_that_is_made_anew_each_time_is_refused_and_the_advice_gives_the_same_function(make: Any) -> None:
    with torch.random.fork_rng(devices=[]):
        module = net()
        make(module.layer1[0])
        make(module.fc)
    images = torch.randn((2, 3, 16, 16), generator=torch.Generator().manual_seed(0))
    expected = module.eval()(images)
    for _ in range(2):
        with pytest.raises(ModelError, match="anew each time it runs") as refusal:
            StagedModel.from_module(module)
        exec(textwrap.dedent(str(refusal.value).partition("\n")[2]), {"net": module, "torch": torch})
        if not any(part._forward_pre_hooks or is_parametrized(part) for part in module.modules()):
            break
    assert torch.equal(StagedModel.from_module(module)(images), expected)
