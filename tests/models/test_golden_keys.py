"""The keys of torchvision's networks, a member of each family: what they have always been, in each version of torch."""

from __future__ import annotations

import math

import pytest
import torch
import torchvision
from torch import Tensor, nn

from featstore import StagedModel, View
from featstore.models.modes import WithoutValues
from featstore.models.torchvision_models import FAMILIES

GOLDEN = {
    "resnet18": {"layer1": "f0a632b34dd67afd", "layer4": "acc1502a315c120f"},
    "resnext50_32x4d": {"layer1": "6d0f3c6ea21e9571", "layer4": "87bed31cb9fed130"},
    "wide_resnet50_2": {"layer1": "0ba697fcab4b7f80", "layer4": "9deb204e6199b247"},
    "alexnet": {"features.2": "09237776ccdfa5c4", "features.12": "aa048e8507e0832d"},
    "vgg11": {"features.5": "ae846af461546698", "features.20": "a92f1de8dc44a72a"},
    "vgg11_bn": {"features.7": "d17f2654e9a2e2be", "features.28": "ffbb4f4cf7d27bc8"},
    "squeezenet1_1": {"features.5": "279aeea46b8060d3", "features.12": "d38cc68338fecf88"},
    "densenet121": {"features.transition1": "509959975c73908f", "relu": "934d192f36c5f7df"},
    "googlenet": {"inception3b": "b70e3bcc9ca2d1b0", "inception5b": "b040081e3f329c44"},
    "inception_v3": {"maxpool2": "6a622e40dc7c2621", "Mixed_7c": "f6037121304113dc"},
    "mobilenet_v2": {"features.4": "cc685c927712e4ff", "features.18": "c57059e9c1172662"},
    "mobilenet_v3_small": {"features.4": "b5e30956ccc1fd77", "features.12": "c327084aa551be49"},
    "mnasnet0_5": {"layers.8": "814d84b73f085330", "layers.16": "625e1af7ed700d06"},
    "shufflenet_v2_x0_5": {"stage2": "c27eae547f52052d", "conv5": "d203f2b44a70707b"},
    "efficientnet_b0": {"features.3": "f6e7e1973a801498", "features.8": "ad37e0dc2883746c"},
    "efficientnet_v2_s": {"features.2": "213f4fc7526c3ab3", "features.7": "5e7da3c7b1d834aa"},
    "regnet_x_400mf": {"trunk_output.block2": "0dbd2c5c865e03b0", "trunk_output.block4": "4292c0cf7bad770f"},
    "regnet_y_400mf": {"trunk_output.block2": "a03913d266ee3816", "trunk_output.block4": "ce529eae62e9e873"},
    "convnext_tiny": {"features.2": "2899dcd3ebe9a84a", "features.7": "935fcbaf0426275a"},
    "vit_b_32": {"encoder.layers.encoder_layer_1": "fda0031b21a90374", "encoder.ln": "a933c91685f6cad3"},
    "swin_t": {"features.2": "d99355bc8b921df0", "permute": "7b9b6e2dc5fcb3e9"},
    "swin_v2_t": {"features.2": "d11efdd22b208ed8", "permute": "d37ef406be38e971"},
    "maxvit_t": {"blocks.0": "d92aa9185c970e75", "blocks.3": "e83107e333cfad93"},
}
"""Name -> cut -> the first digits of the digest of the trunk up to there: at an early cut and at the default one.

A change here makes every stored feature unreachable: raise the number in `featstore.models.digests.START` and say so in
the changelog. The oldest versions of torch and torchvision that are supported give the same: `scripts/oldest`.
"""


def test_a_member_of_each_family_has_golden_keys() -> None:
    families = [family for family in FAMILIES if any(name in family.names for name in GOLDEN)]
    assert families == list(FAMILIES)


@pytest.mark.parametrize("name", GOLDEN)
def test_the_keys_of_a_network_are_what_they_have_always_been(name: str) -> None:
    family = next(family for family in FAMILIES if name in family.names)
    size = None if family.fixed_size is None else View().size
    model = StagedModel.from_module(numbered(name), containers=family.containers, fixed_size=size)
    assert model.default_cut == model.canonical([*GOLDEN[name]][-1])
    assert {cut: model.digest(cut)[:16] for cut in GOLDEN[name]} == GOLDEN[name]


def numbered(name: str) -> nn.Module:
    """The network `name` with numbers in its parameters and statistics that no generator has a part in."""
    initial = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    with WithoutValues():  # what it computes while it is made (positions in a window) has its values
        module: nn.Module = torchvision.models.get_model(name, weights=None, **initial)
    for seed, (path, tensor) in enumerate(module.state_dict().items()):
        if tensor.is_meta:
            owner, _, attribute = path.rpartition(".")
            kind = nn.Parameter if attribute in module.get_submodule(owner)._parameters else torch.clone
            setattr(module.get_submodule(owner), attribute, kind(numbers(tensor, seed)))
    return module.eval()


def numbers(like: Tensor, seed: int) -> Tensor:
    """Fractions from -0.5 to 0.5 with ten binary digits, in a tensor of the shape and kind of `like`."""
    if not like.is_floating_point():
        return torch.zeros(like.shape, dtype=like.dtype)
    period = 65_521
    row = (torch.arange(period) * 40_503 + seed * 7_919) % 1_021 - 510
    repeated = (row / 1024).repeat(math.ceil(like.numel() / period))[: like.numel()]
    return repeated.reshape(like.shape).to(like.dtype)
