"""The same job by other libraries: thingsvision, Ray Data and Daft, each as a whole process of its own.

    .venv/bin/python scripts/benchmarks/peers.py --peers FOLDER [--of thingsvision ray daft] [--networks resnet18 tiny]
        [--images 400] [--few 100] [--rounds 3]

The project needs none of them. thingsvision's pins name older libraries, so it and Daft are installed without, into
folders of their own that come behind what is here; what isn't there is left out:

    pip install --no-deps --target FOLDER/thingsvision thingsvision torchtyping 'typeguard<3' tensorflow-cpu absl-py \
        astunparse flatbuffers gast google-pasta opt-einsum protobuf termcolor wrapt grpcio keras ml_dtypes namex \
        optree ftfy wcwidth regex numba llvmlite open-clip-torch dreamsim peft six rich huggingface_hub transformers \
        tokenizers safetensors markdown-it-py mdurl pygments
    pip install --no-deps --target FOLDER/daft daft
    pip install 'featstore[ray]'

The job: JPEGs of 500x375 in a folder, made by extract.py, become the pooled activations of a network on disk as
float32; torchvision's views for all. thingsvision's features must be featstore's; of the others, whose decoders or
order of sums may differ, it is said how far they are. Beside the whole jobs stand images a second and processor beyond
the start, by what a job over all images takes more than one over a few.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import statistics
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from extract import photographs
from measuring import rates_beyond_start, ratio, report, run, speeds
from numpy.typing import NDArray

from featstore import FeatureStore, ImageSet

CUTS = {"resnet18": "layer4:avg", "tiny": "relu:avg"}
NETWORKS = """
from collections import OrderedDict

import torch
from torch import nn
from torchvision import models


def drawn(module):
    generator = torch.Generator().manual_seed(0)  # torch's own is that of all threads, and in Daft several draw
    for weight in module.parameters():
        if weight.ndim > 1:
            nn.init.kaiming_normal_(weight, generator=generator)
    return module.eval()


def resnet18():
    parts = OrderedDict(models.resnet18().named_children())
    fc = parts.pop("fc")
    return drawn(nn.Sequential(parts | {"flat": nn.Flatten(), "fc": fc}))


def tiny():
    parts = {"conv": nn.Conv2d(3, 16, 8, stride=8, bias=False), "relu": nn.ReLU(), "avgpool": nn.AdaptiveAvgPool2d(1)}
    return drawn(nn.Sequential(OrderedDict(parts | {"flat": nn.Flatten(), "fc": nn.Linear(16, 2)})))
"""

VIEWS = """
import sys

import numpy
from torchvision.transforms import v2

_, network, folder, out, peer = sys.argv
sys.path.append(peer)  # behind the libraries that featstore has
views = v2.Compose([
    v2.ToImage(), v2.Resize(256, antialias=True), v2.CenterCrop(224), v2.ToDtype(torch.float32, scale=True),
    v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
])
make = {"resnet18": resnet18, "tiny": tiny}[network]


class Features:
    def __init__(self):
        self.model = make()[:-1]

    def __call__(self, images):
        with torch.inference_mode():
            return self.model(torch.stack([views(image) for image in images])).numpy()
"""

THINGSVISION = """
numpy.AxisError = numpy.exceptions.AxisError  # its name in numpy 1, for which thingsvision is made
from thingsvision import get_extractor_from_model
from thingsvision.utils.data import DataLoader, ImageDataset

extractor = get_extractor_from_model(model=make(), device="cpu", backend="pt")
images = ImageDataset(root=folder, out_path=out, backend="pt", transforms=views)
batches = DataLoader(dataset=images, batch_size=32, backend="pt")
features = extractor.extract_features(batches=batches, module_name="avgpool", flatten_acts=True)
numpy.save(f"{out}/features.npy", features)
"""

RAY = """
import os

import ray

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_worker_niceness"] = "0"  # else whatever else runs comes first
ray.init(include_dashboard=False)


class OfBatches(Features):
    def __call__(self, batch):
        return {"path": batch["path"], "features": super().__call__(batch["image"])}


actors = max(1, len(os.sched_getaffinity(0)) // 2)
images = ray.data.read_images(folder, mode="RGB", include_paths=True)
images.map_batches(OfBatches, batch_size=32, concurrency=actors).write_parquet(out)
"""

DAFT = """
import daft
from daft.functions import decode_image, download


@daft.cls
class OfSeries(Features):
    @daft.method.batch(return_dtype=daft.DataType.list(daft.DataType.float32()), batch_size=32)
    def __call__(self, images):
        return list(super().__call__(images.to_pylist()))


images = daft.from_glob_path(f"{folder}/**/*.jpg").select("path")
decoded = decode_image(download(images["path"]), mode="RGB")
images.select("path", OfSeries()(decoded).alias("features")).write_parquet(out)
"""

PROGRAMS = {"thingsvision": THINGSVISION, "ray": RAY, "daft": DAFT}
TARGETS = {"thingsvision": 1.4}
MOST_DIFFERENCE = 1e-4  # of the largest activation
OURS = "featstore"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--peers", type=Path, required=True, help="folder with a folder for each of them")
    parser.add_argument("--of", nargs="+", choices=PROGRAMS, default=list(PROGRAMS))
    parser.add_argument("--networks", nargs="+", choices=CUTS, default=list(CUTS))
    parser.add_argument("--images", type=int, default=400, help="default: 400")
    parser.add_argument("--few", type=int, default=100, help="for the time of the start; default: 100")
    parser.add_argument("--rounds", type=int, default=3, help="of which medians are taken; default: 3")
    options = parser.parse_args()
    names = [OURS, *(name for name in options.of if _is_there(name, options.peers))]
    ratios: dict[str, float] = {}
    targets: dict[str, float] = {}
    notes: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as made:
        bench = Bench(Path(made), options)
        for network in options.networks:
            contenders = {
                (name, count): partial(bench.speed, name, network, count)
                for name in names
                for count in (options.images, options.few)
            }
            found = speeds({f"{name} {count}": run for (name, count), run in contenders.items()}, rounds=options.rounds)
            for name in names:
                many, few = found[f"{name} {options.images}"], found[f"{name} {options.few}"]
                rates = rates_beyond_start(many, few, options.images - options.few)
                each = statistics.median(rates) / len(os.sched_getaffinity(0))
                ratios[f"{network}: images a second and processor, {name}"] = each
                notes[f"{network}, {name}"] = (
                    f"{1 / statistics.median(many):.1f} s for {options.images:,} images, "
                    f"{1 / statistics.median(few):.1f} s for {options.few:,}{bench.said(name, network)}"
                )
                if name != OURS:
                    entry = f"{network}: {OURS} against {name}, whole jobs"
                    ratios[entry] = ratio(found, f"{OURS} {options.images}", f"{name} {options.images}")
                    targets |= {entry: TARGETS[name]} if name in TARGETS else {}
    report("peers", ratios, targets, notes)


class Bench:
    """The images, the programs, and what they made of all images."""

    def __init__(self, folder: Path, options: argparse.Namespace) -> None:
        self.folder, self.options = folder, options
        for count in (options.images, options.few):
            photographs(folder / str(count) / "all", count, 500, 375)
        (folder / "networks.py").write_text(NETWORKS, encoding="utf-8")
        for name, program in PROGRAMS.items():
            (folder / f"by_{name}.py").write_text(NETWORKS + VIEWS + program, encoding="utf-8")
        self.features: dict[tuple[str, str], NDArray[np.float32]] = {}

    def speed(self, name: str, network: str, count: int) -> float:
        """One over the seconds of a whole job, which leaves nothing behind but its features."""
        out, images = self.folder / "out", self.folder / str(count)
        seconds = run([sys.executable, *self._command(name, network, images, out)]).seconds
        if count == self.options.images and (name, network) not in self.features:
            self.features[name, network] = _read(name, images, out)
        shutil.rmtree(out)
        return 1 / seconds

    def said(self, name: str, network: str) -> str:
        """How far the features are from ours; RuntimeError where they must be equal, and aren't."""
        ours = self.features[OURS, network]
        difference = float(np.abs(self.features[name, network] - ours).max() / np.abs(ours).max())
        if name in TARGETS and difference > MOST_DIFFERENCE:
            raise RuntimeError(
                f"{name} has other features of {network}: they differ by {difference:.2g} of the largest"
            )
        return "" if name == OURS else f"; features differ by {difference:.2g} of the largest at most"

    def _command(self, name: str, network: str, images: Path, out: Path) -> list[str]:
        if name != OURS:
            return [str(self.folder / f"by_{name}.py"), network, str(images), str(out), str(self.options.peers / name)]
        program = ["-m", "featstore", "extract", "--images", str(images), "--store", str(out), "--device", "cpu"]
        made = ["--backbone", f"{self.folder / 'networks.py'}:{network}", "--cut", CUTS[network]]
        return [*program, *made, "--dtype", "float32"]


def _is_there(name: str, peers: Path) -> bool:
    found = importlib.util.find_spec("ray") is not None if name == "ray" else (peers / name).is_dir()
    if not found:
        print(f"{name} isn't installed, and is left out")
    return found


def _read(name: str, images: Path, out: Path) -> NDArray[np.float32]:
    """The rows that a job left, by the names of the images."""
    if name == "thingsvision":
        features: NDArray[np.float32] = np.load(out / "features.npy")
        return features
    if name == OURS:
        (stored,) = FeatureStore(out).sets()
        return FeatureStore(out).features(ImageSet.from_folder(images), stored.key)[:].numpy()
    import pyarrow.parquet

    rows: list[dict[str, Any]] = pyarrow.parquet.read_table(out).to_pylist()
    return np.array([row["features"] for row in sorted(rows, key=lambda row: str(row["path"]))], np.float32)


if __name__ == "__main__":
    main()
