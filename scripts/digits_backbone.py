"""A small convolutional backbone for pictures of digits: what `--backbone path/to/file.py:make_model` looks like."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from featstore import StagedModel, View

SIZE = 32


def make_model() -> StagedModel:
    """Three stages of maps, then five scores; images are taken as they are, `SIZE` pixels wide and high."""
    stages = {
        "layer1": _stage(3, 32),  # (N, 32, 16, 16)
        "layer2": _stage(32, 64),  # (N, 64, 8, 8)
        "layer3": _stage(64, 128),  # (N, 128, 4, 4)
        "pool": nn.AdaptiveAvgPool2d(1),
        "flatten": nn.Flatten(),
        "fc": nn.Linear(128, 5),
    }
    return StagedModel.from_stages(stages, view=View(size=SIZE, resize=SIZE), name="digits")


def _stage(channels_in: int, channels_out: int) -> nn.Module:
    layers = {
        "conv": nn.Conv2d(channels_in, channels_out, 3, stride=2, padding=1, bias=False),
        "norm": nn.BatchNorm2d(channels_out),
        "relu": nn.ReLU(),
    }
    return nn.Sequential(OrderedDict(layers))
