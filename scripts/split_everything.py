"""Checks the split of torchvision's backbones, and of timm's by name, at every cut: the tests check some of small ones.

    .venv/bin/python scripts/split_everything.py [NAME ...] [--every N]
    .venv/bin/python scripts/split_everything.py [NAME ...] --write

Images have the smallest size that a backbone takes. Prints a line a cut, and ends with an error at the first one that
fails. `--write` checks nothing: it writes the golden list of cuts (`tests/support/cuts.py`), all or those of the names
given, after a change of cuts that is meant.
"""

from __future__ import annotations

import argparse
import sys
import time
from importlib import import_module
from pathlib import Path

import torch
import torchvision
from torch import nn

from featstore import ModelError, StagedModel, View, backbone, backbone_names
from featstore.models.backbones import is_named, outline

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from support.cuts import described_cuts, golden_cuts, write
from support.splitting import checked_cuts, randomise_for

SIZES = (32, 48, 64, 80, 96, 128, 160)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("names", nargs="*", metavar="NAME", help="default: all of torchvision's")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="check every Nth cut; default: all")
    parser.add_argument("--write", action="store_true", help="write the golden list of cuts instead")
    options = parser.parse_args()
    unknown = sorted(name for name in set(options.names) if not is_named(name))
    if unknown:
        parser.error(f"no backbone is called {', '.join(unknown)}; featstore backbones lists those that are")
    if options.write:
        known = golden_cuts()
        named = dict.fromkeys(options.names or [*backbone_names(), *known])
        write(known | {name: described_cuts(outline(name)) for name in named})
        return
    for name in options.names or backbone_names():
        check(name, every=options.every)


def check(name: str, *, every: int) -> None:
    start = time.monotonic()
    model = backbone(name, "none")
    size = smallest_size(model)
    model = model.with_(view=View(size=size, resize=size))
    images = torch.randn((2, 3, size, size), generator=torch.Generator().manual_seed(0))
    randomise_for(model, images)
    num_cuts = 0
    for cut in checked_cuts(model, images, original(name, model), every=every):
        num_cuts += 1
        shape = "x".join(str(length) for length in cut.shape)
        print(f"{name:10} {cut.name:40} {shape:>12}  equal; its stage moves logits by {cut.change:.0%}", flush=True)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    seconds = time.monotonic() - start
    print(
        f"{name}: {num_cuts} of {len(model.cut_points)} cuts pass at {size} pixels ({num_parameters / 1e6:.0f} M "
        f"parameters, {seconds:.0f} s)",
        flush=True,
    )


def smallest_size(model: StagedModel) -> int:
    """Of `SIZES` the first that it takes; else its own."""
    for size in SIZES if model.fixed_size is None else ():
        try:
            model.shape(model.cut_points[-1], size)
        except ModelError:
            continue
        return size
    return model.view.size


def original(name: str, model: StagedModel) -> nn.Module:
    """The module as its library runs it, with the memory of `model`'s tensors: what the stages together must equal."""
    tensors = model.tensors()
    tensors |= {other: tensors[name] for other, name in model.other_names.items()}
    if name.startswith("timm:"):
        arguments = {**model.origin["architecture"]}
        made = import_module("timm").create_model(arguments.pop("name").removeprefix("timm:"), **arguments).eval()
        made.load_state_dict(tensors, assign=True)
        return made  # type: ignore[no-any-return]
    weights = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    module: nn.Module = torchvision.models.get_model(name, weights=None, **weights)
    state = module.state_dict()  # which says mnasnet's version
    assert state.keys() - model.unused == tensors.keys()
    state.update(tensors)
    module.load_state_dict(state, assign=True)
    return module


if __name__ == "__main__":
    main()
