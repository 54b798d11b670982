"""What one job saves that shares its work: several seeds, backbones or cuts of an image, against jobs of their own.

    .venv/bin/python scripts/benchmarks/sharing.py [--images 192] [--rounds 5] [--measure seeds cuts]

Each contender is whole extractions into an empty store, plan and filing included, of the JPEGs that extract.py makes.
Ratios are of speeds: 2 for half the time.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from extract import photographs, tiny
from measuring import ratio, report, speeds

from featstore import Augment, ExtractReport, FeatureStore, ImageSet, StagedModel, backbone, extract
from featstore.models.names import Precision

SEEDS = range(4)
TARGETS = {
    "4 seeds of random_resized_crop, 500x375, against 4 jobs": 1 / 0.65,
    "4 seeds of side_on, 1600x1200, against 4 jobs": 1 / 0.52,
    "3 backbones against the slowest alone": 1 / 1.15,
    "4 cuts against the deepest alone": 1 / 1.10,
    "bf16 against fp32": 1.8,
    "stored pixels against 1600x1200 JPEGs": 5.0,
}
MEASURES = ("seeds", "backbones", "cuts", "precision", "pixels")

Contenders = Mapping[str, Callable[[FeatureStore], object]]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=int, default=192, help="of each size; default: 192")
    parser.add_argument("--rounds", type=int, default=5, help="of which medians are taken; default: 5")
    parser.add_argument("--measure", nargs="+", choices=MEASURES, default=MEASURES)
    parser.add_argument("--backbone", default="resnet50", help="of cuts and precision; default: resnet50")
    parser.add_argument("--sizes", nargs=2, default=["500x375", "1600x1200"], help="of the images; default: those")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        small, large = (
            photographs(folder / each, options.images, *map(int, each.split("x"))) for each in options.sizes
        )
        compared: dict[str, Contenders] = {}
        if "seeds" in options.measure:
            names = [name for name in TARGETS if name.startswith("4 seeds")]
            compared[names[0]] = _of_seeds(small, "random_resized_crop")
            compared[names[1]] = _of_seeds(large, "side_on")
        if "backbones" in options.measure:
            compared["3 backbones against the slowest alone"] = _of_backbones(large)
        if "cuts" in options.measure:
            compared["4 cuts against the deepest alone"] = _of_cuts(small, options.backbone)
        if "precision" in options.measure and _has_bf16():
            compared["bf16 against fp32"] = _of_precisions(small, options.backbone)
        if "pixels" in options.measure:
            compared["stored pixels against 1600x1200 JPEGs"] = _of_pixels(large, folder / "pixels")
        ratios: dict[str, float] = {}
        notes: dict[str, str] = {}
        for name, contenders in compared.items():
            seconds = {each: partial(_seconds, run, folder / "store") for each, run in contenders.items()}
            found = speeds({each: partial(_speed, run) for each, run in seconds.items()}, rounds=options.rounds)
            ours, theirs = list(contenders)
            ratios[name] = ratio(found, ours, theirs)
            print(f"{name}: {ratios[name]:.2f}", flush=True)
            notes[name] = ", ".join(
                f"{each} {1 / sorted(values)[len(values) // 2]:.2f} s" for each, values in found.items()
            )
        report("sharing", ratios, {name: TARGETS[name] for name in ratios}, notes)


def _of_seeds(images: ImageSet, policy: str) -> Contenders:
    def together(store: FeatureStore) -> None:
        _extract(tiny(), images, store, augment=Augment(policy, seeds=SEEDS))

    def alone(store: FeatureStore) -> None:
        for seed in SEEDS:
            _extract(tiny(), images, store, augment=Augment(policy, seeds=[seed]))

    return {"one job": together, "four jobs": alone}


def _of_backbones(images: ImageSet) -> Contenders:
    models = [tiny(width) for width in (16, 24, 32)]
    return {
        "all in one job": lambda store: _extract([(each, None) for each in models], images, store),
        "the slowest alone": lambda store: _extract(models[-1], images, store),
    }


def _of_cuts(images: ImageSet, name: str) -> Contenders:
    model = backbone(name, "none")
    deepest = model.cut_points.index(model.default_cut)
    four = [model.cut_points[deepest * place // 4] for place in (1, 2, 3, 4)]
    return {
        "four cuts": lambda store: _extract(model, images, store, cuts=four, reduce="avg"),
        "the deepest": lambda store: _extract(model, images, store, cuts=four[-1:], reduce="avg"),
    }


def _of_precisions(images: ImageSet, name: str) -> Contenders:
    model = backbone(name, "none")

    def run(precision: Precision, store: FeatureStore) -> None:
        _extract(model, images, store, precision=precision)

    return {"bf16": partial(run, "bf16"), "fp32": partial(run, "fp32")}


def _of_pixels(images: ImageSet, root: Path) -> Contenders:
    extract(tiny(), images, FeatureStore(root), cuts=["pixels"])

    def stored(store: FeatureStore) -> None:
        shutil.copytree(root, store.root, copy_function=os.link)
        _extract(tiny(), images, store)

    return {"from pixels": stored, "from JPEGs": lambda store: _extract(tiny(), images, store)}


def _extract(
    model: StagedModel | Sequence[tuple[StagedModel, None]],
    images: ImageSet,
    store: FeatureStore,
    *,
    cuts: Sequence[str] | None = None,
    reduce: str = "auto",
    augment: Augment | None = None,
    precision: Precision = "fp32",
) -> ExtractReport:
    return extract(model, images, store, cuts=cuts, reduce=reduce, augment=augment, precision=precision)


def _seconds(run: Callable[[FeatureStore], object], root: Path) -> float:
    started = time.perf_counter()
    run(FeatureStore(root))
    seconds = time.perf_counter() - started
    shutil.rmtree(root)
    return seconds


def _speed(seconds: Callable[[], float]) -> float:
    return 1 / seconds()


def _has_bf16() -> bool:
    """Whether the processor, or the GPU, multiplies bfloat16 itself."""
    return torch.cuda.is_available() or bool(torch.cpu.get_capabilities()["avx512_bf16"])


if __name__ == "__main__":
    main()
