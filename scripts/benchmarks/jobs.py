"""Whole jobs as processes: against the plain recipe, their memory as images grow, and one with nothing to do.

    .venv/bin/python scripts/benchmarks/jobs.py [--measure recipe many] [--images 400] [--many 100000] [--rounds 5]
    .venv/bin/python scripts/benchmarks/jobs.py --measure compile [--images 4000] [--rounds 3]

`recipe` runs `featstore extract` against the loop that one would write (ImageFolder, DataLoader with as many workers as
serve it best, channels as torch has them, `numpy.save`), each a process with all that it imports; `compile` likewise
`featstore extract --compile`, each time with nothing compiled before. `many` extracts many small images and a hundredth
of them by a tiny network, and looks at the most memory that each process had.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from extract import photographs
from measuring import Ran, ratio, report, run, speeds

RECIPE = """
import sys

import numpy
import torch
from torchvision.datasets import ImageFolder
from torchvision.models import get_model
from torchvision.transforms import v2

_, folder, name, workers, out = sys.argv
transforms = v2.Compose([
    v2.ToImage(), v2.Resize(256, antialias=True), v2.CenterCrop(224), v2.ToDtype(torch.float32, scale=True),
    v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
])
loader = torch.utils.data.DataLoader(ImageFolder(folder, transforms), batch_size=32, num_workers=int(workers))
model = get_model(name, weights=None).eval()
model.fc = torch.nn.Identity()
with torch.inference_mode():
    numpy.save(out, torch.cat([model(images) for images, _ in loader]).numpy())
"""

TINY = """
from collections import OrderedDict

from torch import nn


def make():
    layers = [("conv", nn.Conv2d(3, 16, 8, stride=8)), ("relu", nn.ReLU()), ("pool", nn.AdaptiveAvgPool2d(1))]
    return nn.Sequential(OrderedDict([*layers, ("flat", nn.Flatten()), ("fc", nn.Linear(16, 2))]))
"""

RECIPE_NAME, MEMORY = "a job against the plain recipe", "memory of few images against that of many"
COMPILED_NAME = "a compiled job against the plain recipe"
TARGETS = {RECIPE_NAME: 1.4, COMPILED_NAME: 1.9, MEMORY: 1 / 1.1}
AGAINST_RECIPE: dict[str, tuple[str, int, list[str]]] = {
    "recipe": (RECIPE_NAME, 400, []),
    "compile": (COMPILED_NAME, 4000, ["--compile"]),
}
MEASURES = (*AGAINST_RECIPE, "many")
TRIED = 400
"""Images by which the best number of workers is found."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--measure", nargs="+", choices=MEASURES, default=("recipe", "many"))
    parser.add_argument("--backbone", default="resnet50", help="of torchvision, with a layer fc; default: resnet50")
    parser.add_argument("--images", type=int, help="for recipe and compile, of 500x375; default: 400 and 4,000")
    parser.add_argument("--many", type=int, default=100_000, help="small ones; default: 100,000")
    parser.add_argument("--rounds", type=int, default=5, help="of which medians are taken; default: 5")
    options = parser.parse_args()
    ratios: dict[str, float] = {}
    notes: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for measure, (measured, num_images, flags) in AGAINST_RECIPE.items():
            if measure in options.measure:
                count = options.images or num_images
                ratios[measured], notes[measured] = _against_recipe(folder / measure, options, count, flags)
        if "many" in options.measure:
            _of_many(folder, options, ratios, notes)
        report("jobs", ratios, {name: TARGETS[name] for name in ratios if name in TARGETS}, notes)


def _against_recipe(
    folder: Path, options: argparse.Namespace, num_images: int, flags: Sequence[str]
) -> tuple[float, str]:
    images, tried = folder / "photos", folder / "tried"
    photographs(images / "all", num_images, 500, 375)
    photographs(tried / "all", min(num_images, TRIED), 500, 375)
    store, script = folder / "store", folder / "recipe.py"
    code = folder / "compiled"  # new each time
    script.write_text(RECIPE, encoding="utf-8")

    def ours() -> float:
        command = [*_extract(images, store, options.backbone, "layer4:avg"), *flags]
        seconds = run(command, TORCHINDUCTOR_CACHE_DIR=str(code)).seconds
        shutil.rmtree(store)
        shutil.rmtree(code, ignore_errors=True)
        return 1 / seconds

    def theirs(workers: int, images: Path = images) -> float:
        command = [sys.executable, str(script), str(images), options.backbone, str(workers)]
        return 1 / run([*command, str(folder / "features.npy")]).seconds

    choices = sorted({0, 1, 2, max(1, len(os.sched_getaffinity(0)) - 1), len(os.sched_getaffinity(0))})
    best = max(choices, key=lambda workers: theirs(workers, tried)) if options.rounds > 1 else 0
    contenders: dict[str, Callable[[], float]] = {"featstore": ours, "the recipe": partial(theirs, best)}
    found = speeds(contenders, rounds=options.rounds)
    seconds = {name: 1 / statistics.median(values) for name, values in found.items()}
    return ratio(found, "featstore", "the recipe"), (
        f"{options.backbone}, {num_images:,} images, {best} workers for the recipe; "
        f"{', '.join(f'{name} {value:.1f} s' for name, value in seconds.items())}"
    )


def _of_many(folder: Path, options: argparse.Namespace, ratios: dict[str, float], notes: dict[str, str]) -> None:
    (folder / "tiny.py").write_text(TINY, encoding="utf-8")
    ran: dict[int, Ran] = {}
    for count in (max(2, options.many // 100), options.many):
        images, store = folder / f"many{count}", folder / f"store{count}"
        photographs(images, count, 80, 60)
        command = [*_extract(images, store, f"{folder / 'tiny.py'}:make", "relu:avg"), "--size", "64"]
        ran[count] = run(command)
    few, many = ran.values()
    ratios[MEMORY] = few.most_bytes / many.most_bytes
    again = run(command)
    ratios["a job with nothing to do against the first"] = many.seconds / again.seconds
    notes["memory"] = ", ".join(f"{each.most_bytes >> 20:,} MiB for {count:,} images" for count, each in ran.items())
    notes["seconds"] = f"{many.seconds:.1f} for {options.many:,} images, {again.seconds:.1f} with nothing to do"


def _extract(images: Path, store: Path, backbone: str, cut: str) -> list[str]:
    program = [sys.executable, "-m", "featstore", "extract", "--images", str(images), "--store", str(store)]
    weights = [] if ":" in backbone else ["--weights", "none"]
    return [*program, "--backbone", backbone, *weights, "--cut", cut, "--dtype", "float32", "--device", "cpu"]


if __name__ == "__main__":
    main()
