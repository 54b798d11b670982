"""torchvision's own classes with few layers and channels: its kinds of networks at a fraction of their size."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from torchvision.models import ConvNeXt, DenseNet, EfficientNet, SwinTransformer
from torchvision.models.convnext import CNBlockConfig
from torchvision.models.efficientnet import MBConvConfig

from featstore import StagedModel, View
from featstore.models.torchvision_models import FAMILIES


def convnext() -> nn.Module:
    """Its maps lie in memory with their channels last."""
    blocks = [CNBlockConfig(8, 12, 1), CNBlockConfig(12, 16, 1), CNBlockConfig(16, 24, 2), CNBlockConfig(24, None, 1)]
    module: nn.Module = ConvNeXt(blocks, num_classes=5)
    return module


def efficientnet() -> nn.Module:
    """Squeeze-and-excitation, SiLU, stochastic depth."""
    block = partial(MBConvConfig, width_mult=1.0, depth_mult=1.0)
    sizes = [(1, 3, 1, 16, 8), (6, 3, 2, 8, 16), (6, 5, 2, 16, 24)]
    module: nn.Module = EfficientNet([block(*each, num_layers=2) for each in sizes], dropout=0.2, num_classes=5)
    return module


SMALL: dict[str, Callable[[], nn.Module]] = {
    "convnext_tiny": convnext,
    "densenet121": lambda: DenseNet(8, (2, 2, 2, 2), 16, num_classes=5),
    "efficientnet_b0": efficientnet,
    "swin_t": lambda: SwinTransformer([4, 4], 16, [2, 2, 2, 2], [2, 2, 2, 2], [7, 7], num_classes=5),
}
"""By the name of a network of the same class."""


def small(name: str, size: int) -> StagedModel:
    """The staged model of a network like `name`, with what `backbone` says of that, for images of `size` pixels."""
    (family,) = (family for family in FAMILIES if name in family.names)
    with torch.random.fork_rng(devices=[]):
        module = SMALL[name]().eval()
    view = View(size=size, resize=size)
    return StagedModel.from_module(module, view=view, layouts=dict(family.layouts), containers=family.containers)
