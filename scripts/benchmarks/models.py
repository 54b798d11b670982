"""What making a StagedModel costs: tracing and keying a network against its forward pass of 32 images.

    .venv/bin/python scripts/benchmarks/models.py [NAME ...] [--rounds 5] [--batch 32]

Of each of torchvision's families the member with the fewest parameters, on images of its weights' own size, in turns.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torchvision
from measuring import ratio, report, speeds
from torch import nn

from featstore import StagedModel, View
from featstore.models.backbones import about
from featstore.models.shapes import measured
from featstore.models.torchvision_models import FAMILIES

TARGET = 0.5
"""How often tracing and keying fit into the forward pass: they take twice its time at most."""

FORWARD, MADE, TRACED, SHAPES = "forward", "made", "traced", "shapes"


def main() -> None:
    smallest = [min(family.names, key=lambda name: int(about(name)["parameters"])) for family in FAMILIES]
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"default: {' '.join(smallest)}")
    parser.add_argument("--rounds", type=int, default=5, help="of which medians are taken; default: 5")
    parser.add_argument("--batch", type=int, default=32, help="images of the forward pass; default: 32")
    options = parser.parse_args()
    ratios, notes = {}, {}
    for name in options.names or smallest:
        found = speeds(contenders(name, options.batch), rounds=options.rounds)
        ratios[name] = ratio(found, MADE, FORWARD)
        seconds = {each: statistics.median(1 / speed for speed in rounds) for each, rounds in found.items()}
        notes[name] = (
            f"forward {seconds[FORWARD]:.2f} s; traced in {seconds[TRACED]:.2f} s, traced and keyed in "
            f"{seconds[MADE]:.2f} s; shapes {seconds[SHAPES]:.2f} s"
        )
        print(f"{name}: {ratios[name]:.2f}; {notes[name]}", flush=True)
    report("models", ratios, dict.fromkeys(ratios, TARGET), notes)


def contenders(name: str, batch: int) -> dict[str, Callable[[], float]]:
    """What is measured of one network: how many there would be in a second."""
    initial = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}  # that takes half a minute
    module: nn.Module = torchvision.models.get_model(name, weights=None, **initial).eval()
    size = int(about(name)["size"])
    view = View(size=size, resize=size)
    images = torch.rand((batch, 3, size, size), generator=torch.Generator().manual_seed(0))

    def forward() -> None:
        with torch.no_grad():
            module(images)

    def traced() -> StagedModel:
        return StagedModel.from_module(module, view=view)

    model = traced()
    return {
        FORWARD: lambda: speed(forward),
        TRACED: lambda: speed(traced),
        MADE: lambda: speed(lambda: traced().digests()),
        SHAPES: lambda: speed(lambda: measured(model.ordered, model.view.channels, size, name)),
    }


def speed(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return 1 / (time.perf_counter() - started)


if __name__ == "__main__":
    main()
