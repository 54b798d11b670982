"""A person's own file with functions that make models, and a module beside it that it imports."""

from __future__ import annotations

from pathlib import Path

OWN = """
import random
import numpy as np
import torch
from torch import nn
from own_layers_{tag} import Block

def make():
    return nn.Sequential(Block(), nn.Flatten(), nn.Linear(4 * 14 * 14, 2))

def staged():
    from featstore import StagedModel, View
    return StagedModel.from_module(make(), view=View(size=16, resize=16), name="mine")

def drawn():
    conv = nn.Conv2d(3, 4, 3)
    conv.bias.data[:] = torch.tensor([random.random(), np.random.rand(), 0.0, 0.0])
    return nn.Sequential(conv, nn.ReLU())

def number():
    return 7
"""
LAYERS = """
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.mask = nn.Parameter(self.conv.bias.detach() * 0)

    def forward(self, x):
        return self.conv(x).relu()
"""


def write_own(folder: Path, tag: str) -> Path:
    """The file; `tag` names the module beside it, which Python loads once under each name."""
    folder.mkdir(exist_ok=True)
    (folder / f"own_layers_{tag}.py").write_text(LAYERS)
    path = folder / "own.py"
    path.write_text(OWN.format(tag=tag))
    return path
