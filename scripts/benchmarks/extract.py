"""How fast an extraction is against its own parts: decoding alone, and the forward pass alone.

    .venv/bin/python scripts/benchmarks/extract.py [--backbone resnet50] [--images 256] [--sizes 500x375 1600x1200]
        [--device auto] [--precision fp32] [--rounds 5] [--pixels]

Images are JPEGs (quality 90) put together from pieces of scikit-image's photographs at their own scale. Where both
parts share the processors, the reference is 1 / (1/a + 1/b) of their rates, each alone on all of them; where a GPU
computes, it is the smaller of the two. From stored pixels it is the forward pass alone. Of a GPU it is also told how
much of a job's time some kernel ran, and what memory torch took.
"""

from __future__ import annotations

import argparse
import io
import math
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import skimage.data
import torch
from measuring import ratio, report, speeds
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import nn

from featstore import FeatureStore, ImageSet, StagedModel, View, backbone, extract, plan
from featstore.extraction.failures import Failing
from featstore.extraction.job import Job, Session
from featstore.extraction.opening import open_plan
from featstore.extraction.progress import Progress
from featstore.images.render import Rendered
from featstore.models.names import PRECISIONS, Precision
from featstore.words import size_text

PIECE = 250  # pixels, of photographs at their own scale
DISTINCT = 512  # pictures; further files have the same pixels and other bytes
TARGETS = {"cpu": 0.95, "cuda": 0.90}
TINY, TINY_TARGET = "tiny", 0.85


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--backbone", action="append", help="default: resnet50 and tiny, two convolutions")
    parser.add_argument("--images", type=int, default=256, help="of each size; default: 256")
    parser.add_argument("--sizes", nargs="+", default=["500x375", "1600x1200"])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32")
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--workers", type=int)
    parser.add_argument("--rounds", type=int, default=5, help="of which medians are taken; default: 5")
    parser.add_argument("--pixels", action="store_true", help="also from stored pixels, of the first size")
    options = parser.parse_args()
    ratios: dict[str, float] = {}
    targets: dict[str, float] = {}
    notes: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        for size in options.sizes:
            width, height = map(int, size.split("x"))
            images = photographs(Path(folder) / size, options.images, width, height)
            for name in options.backbone or ["resnet50", TINY]:
                model = tiny() if name == TINY else backbone(name, "none")
                bench = Bench(
                    model, images, Path(folder), options, has_pixels=options.pixels and size == options.sizes[0]
                )
                found = speeds(bench.contenders(), rounds=options.rounds)
                entry = f"{name}, {size}"
                reference = [bench.reference(*pair) for pair in zip(found["forward"], found["decode"], strict=True)]
                ratios[entry] = statistics.median(
                    ours / best for ours, best in zip(found["together"], reference, strict=True)
                )
                binds = statistics.median(found["decode"]) < statistics.median(found["forward"])
                targets[entry] = (
                    TINY_TARGET if binds and not bench.is_gpu else TARGETS["cuda" if bench.is_gpu else "cpu"]
                )
                rates = {what: statistics.median(values) for what, values in found.items()}
                notes[entry] = ", ".join(f"{what} {value:,.1f}" for what, value in rates.items()) + " images a second"
                if bench.is_gpu:
                    notes[entry] += f"; {bench.gpu_use(bench.together)}"
                print(f"{entry}: {ratios[entry]:.2f}; {notes[entry]}", flush=True)
                if bench.from_pixels is None:
                    continue
                entry = f"{name}, stored pixels"
                ratios[entry] = ratio(found, "from pixels", "forward")
                notes[entry] = "against forward alone"
                if bench.is_gpu:
                    targets[entry] = TARGETS["cuda"]
                    notes[entry] += f"; {bench.gpu_use(bench.together_from_pixels)}"
                print(f"{entry}: {ratios[entry]:.2f}; {notes[entry]}", flush=True)
    report("extract", ratios, targets, notes)


class Bench:
    """One network over one folder of images."""

    def __init__(
        self, model: StagedModel, images: ImageSet, folder: Path, options: argparse.Namespace, *, has_pixels: bool
    ) -> None:
        self.images, self.root, self.options = images, folder / "store", options
        precision: Precision = options.precision
        self.planned = plan(model, images, FeatureStore(self.root), precision=precision)
        self.session = self._opened(FeatureStore(self.root))
        self.is_gpu = self.session.device.type == "cuda"
        self.from_pixels: Session | None = None
        if has_pixels:
            pixels = FeatureStore(folder / "pixels")
            extract(model, images, pixels, cuts=["pixels"])
            self.from_pixels = replace(self._opened(pixels), store=FeatureStore(self.root))
            assert self.from_pixels.has_pixels.all()
        self.views = torch.stack([each.views[0] for each in self._rendered() if each.views])

    def contenders(self) -> dict[str, Callable[[], float]]:
        """Each gives images a second."""
        alone = {"forward": self.forward, "decode": self.decode, "together": self.together}
        return alone if self.from_pixels is None else alone | {"from pixels": self.together_from_pixels}

    def reference(self, forward: float, decode: float) -> float:
        """The best rate that two parts allow."""
        return min(forward, decode) if self.is_gpu else 1 / (1 / forward + 1 / decode)

    def forward(self) -> float:
        """Passes over views that lie in memory, their results on the host."""
        trunk = self.session.opened[0].trunk
        size = trunk.batch_size
        views = self.views[: len(self.views) // size * size or None]
        views = views.pin_memory() if self.is_gpu else views
        started = time.perf_counter()
        results = [trunk(views[start : start + size])[0] for start in range(0, len(views), size)]
        for each in results:
            each.to("cpu", torch.float16)
        return len(views) / (time.perf_counter() - started)

    def decode(self) -> float:
        """Files read, digested, decoded and rendered, as an extraction does it."""
        started = time.perf_counter()
        count = sum(1 for _ in self._rendered())
        return count / (time.perf_counter() - started)

    def together(self) -> float:
        """All of it, and the rows filed."""
        return self._run(self.session)

    def together_from_pixels(self) -> float:
        """The same, from pixels that are stored."""
        assert self.from_pixels is not None
        return self._run(self.from_pixels)

    def gpu_use(self, run: Callable[[], float]) -> str:
        """How much of the time of one run the GPU computes, and the most memory that torch has of it."""
        torch.cuda.reset_peak_memory_stats()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            seconds = len(self.images) / run()
        kernels = [
            (each.time_range.start, each.time_range.end)
            for each in profiler.events() or ()
            if each.device_type.name == "CUDA" and not each.name.startswith(("Memcpy", "Memset"))
        ]
        memory = size_text(torch.cuda.max_memory_reserved())
        return f"GPU busy {100 * covered(kernels) / (1e6 * seconds):.0f} % of the time, {memory} of its memory"

    def _opened(self, store: FeatureStore) -> Session:
        return open_plan(
            self.planned,
            store,
            device=self.options.device,
            batch_size=self.options.batch_size,
            workers=self.options.workers,
        )

    def _run(self, session: Session) -> float:
        started = time.perf_counter()
        filed = session.run()
        elapsed = time.perf_counter() - started
        assert sum(filed.computed) == len(self.images)
        shutil.rmtree(self.root)
        return len(self.images) / elapsed

    def _rendered(self) -> Iterator[Rendered]:
        progress = Progress(len(self.images), is_shown=False)
        return Job(self.session, self.session.is_needed, Failing(self.planned, None), progress).rendered()


def covered(stretches: Iterable[tuple[float, float]]) -> float:
    """The length of what some stretch covers.

    >>> covered([(5, 7), (0, 2), (1, 3)])
    5.0
    """
    whole, end = 0.0, -math.inf
    for start, stop in sorted(stretches):
        whole += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return whole


def tiny(width: int = 16) -> StagedModel:
    """A network that takes less time than decoding."""
    layers = [nn.Conv2d(3, width, 8, stride=8), nn.ReLU(), nn.Conv2d(width, 64, 3, stride=2), nn.ReLU()]
    return StagedModel.from_module(nn.Sequential(*layers).eval(), view=View(), name=TINY)


def photographs(folder: Path, count: int, width: int, height: int) -> ImageSet:
    """So many different JPEGs of that size, each put together from pieces of photographs, which keep their detail."""
    folder.mkdir(parents=True)
    whole = [getattr(skimage.data, name)() for name in ("astronaut", "coffee", "chelsea", "rocket")]
    whole += load_sample_images().images
    random = np.random.default_rng(0)
    encoded: list[bytes] = []
    for _ in range(min(count, DISTINCT)):
        canvas = np.zeros((height, width, 3), np.uint8)
        for top in range(0, height, PIECE):
            for left in range(0, width, PIECE):
                place = canvas[top : top + PIECE, left : left + PIECE]
                place[:] = _piece(whole[random.integers(len(whole))], place.shape, random)
        file = io.BytesIO()
        Image.fromarray(canvas).save(file, "JPEG", quality=90)
        encoded.append(file.getvalue())
    for number in range(count):
        start, rest = encoded[number % len(encoded)][:2], encoded[number % len(encoded)][2:]
        comment = b"\xff\xfe\x00\x0a" + number.to_bytes(8)  # which makes it another file
        (folder / f"{number:06}.jpg").write_bytes(start + comment + rest)
    return ImageSet.from_folder(folder)


def _piece(photograph: NDArray[np.uint8], shape: tuple[int, ...], random: np.random.Generator) -> NDArray[np.uint8]:
    top, left = (int(random.integers(photograph.shape[axis] - shape[axis] + 1)) for axis in (0, 1))
    return photograph[top : top + shape[0], left : left + shape[1]]


if __name__ == "__main__":
    main()
