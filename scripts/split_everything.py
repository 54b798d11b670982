"""Checks the split of the big backbones at every cut: too slow for the tests, which check the small ones.

    .venv/bin/python scripts/split_everything.py [NAME ...]

Prints a line per cut, and ends with an error at the first one that fails.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch
import torchvision
from torch import nn

from featstore import StagedModel, backbone, backbone_names

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from support.splitting import checked_cuts, randomise

BIG = ("resnet101", "resnet152", "vit_l_16", "vit_l_32", "vit_h_14")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"default: {' '.join(BIG)}")
    names = parser.parse_args().names or BIG
    unknown = sorted(set(names) - set(backbone_names()))
    if unknown:
        parser.error(f"no backbone is called {', '.join(unknown)}; expected some of {', '.join(backbone_names())}")
    for name in names:
        check(name)


def check(name: str) -> None:
    start = time.monotonic()
    model = backbone(name, "none")
    randomise(model, seed=1)
    size = model.view.size
    images = torch.randn((2, 3, size, size), generator=torch.Generator().manual_seed(0))
    num_cuts = 0
    for cut in checked_cuts(model, images, original(name, model)):
        num_cuts += 1
        shape = "x".join(str(length) for length in cut.shape)
        print(f"{name:10} {cut.name:40} {shape:>12}  equal; its stage moves logits by {cut.change:.0%}", flush=True)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    seconds = time.monotonic() - start
    print(f"{name}: all {num_cuts} cuts pass ({num_parameters / 1e6:.0f} M parameters, {seconds:.0f} s)", flush=True)


def original(name: str, model: StagedModel) -> nn.Module:
    """The module as torchvision runs it, with the memory of `model`'s tensors: what the stages together must equal."""
    with torch.device("meta"):
        module: nn.Module = torchvision.models.get_model(name, weights=None)
    module.load_state_dict(model.tensors(), assign=True)
    return module


if __name__ == "__main__":
    main()
