"""How fast training is: heads on stored features against bare arithmetic and live trunks, fine-tuning against a loop.

    .venv/bin/python scripts/benchmarks/train.py [--measure heads live finetune] [--rows 50000] [--images 128]
        [--size 224] [--device cpu] [--rounds 5]

``heads``: an epoch of a head on stored rows, against the same arithmetic on a tensor in memory with nothing around it,
and (linear head) against DataLoader over a per-row dataset. ``live``: images a second of those epochs against one whose
frozen trunk runs on the images (resnet18), and of a tail from stored layer3 against one from images. ``finetune``: an
epoch of all of resnet18 against a plain loop over ImageFolder and DataLoader with the same settings. On a GPU ``heads``
is a 1000-way linear head on rows of 2048, against its matrix products alone.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from extract import photographs
from measuring import ratio, report, speeds
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import ImageFolder
from torchvision.models import resnet18
from torchvision.transforms import v2

from featstore import FeatureStore, ImageSet, StagedModel, View, backbone, extract
from featstore.exchange.imports import import_features
from featstore.images.fileless import images_by_id
from training import Learner, build_head

BATCH, TUNED_BATCH = 256, 32
CLASSES = 10
TARGETS = {
    "concat head against bare arithmetic": 0.90,
    "linear head against bare arithmetic": 0.90,
    "linear head against DataLoader": 3.0,
    "concat head, stored against live": 250.0,
    "linear head, stored against live": 2500.0,
    "tail, stored layer3 against live": 2.7,
    "fine-tuning against a plain loop": 0.95,
    "1000-way linear head against its products": 0.5,
}
MEASURES = ("heads", "live", "finetune")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--measure", nargs="+", choices=MEASURES, default=[*MEASURES])
    parser.add_argument("--rows", type=int, help="of stored features; default: 50,000, on a GPU 1,281,167")
    parser.add_argument("--images", type=int, default=128, help="JPEGs of 500x375; default: 128")
    parser.add_argument("--size", type=int, default=224, help="of views; default: 224")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=5, help="of which medians are taken; default: 5")
    options = parser.parse_args()
    ratios: dict[str, float] = {}
    notes: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        if options.device != "cpu" and "heads" in options.measure:
            told(resident_head(Path(folder), options), ratios, notes)
        elif {"heads", "live"} & {*options.measure}:
            told(heads(Path(folder), options), ratios, notes)
        if "live" in options.measure and options.device == "cpu":
            told(tails(Path(folder), options), ratios, notes)
        if "finetune" in options.measure:
            told(finetuning(Path(folder), options), ratios, notes)
    report("train", ratios, {name: target for name, target in TARGETS.items() if name in ratios}, notes)


def told(found: tuple[dict[str, float], dict[str, str]], ratios: dict[str, float], notes: dict[str, str]) -> None:
    """Adds what was found, and prints it: a program that is ended early has said what it knew."""
    ratios |= found[0]
    notes |= found[1]
    for name, value in found[0].items():
        print(f"{name}: {value:,.2f}", flush=True)


# ------------------------------------------------------------------------------------------------------ stored features


def heads(folder: Path, options: argparse.Namespace) -> tuple[dict[str, float], dict[str, str]]:
    """Heads on rows of 1024 numbers, as resnet18's two pools give."""
    values, labels = made(options.rows or 50_000, 1024, CLASSES)
    contenders: dict[str, Callable[[], float]] = {}
    for head in ("concat", "linear"):
        contenders[head] = stored_epoch(folder / head, values, labels, head, options.device)
        contenders[f"{head}, bare"] = bare_epoch(values, labels, head)
    if "heads" in options.measure:
        for workers in (0, 2):
            contenders[f"loader, {workers} workers"] = loader_epoch(values, labels, workers)
    with live_epochs(folder, options, needed="live" in options.measure) as live:
        contenders |= live
        found = speeds(contenders, rounds=options.rounds)
    rates = {name: statistics.median(each) for name, each in found.items()}
    ratios = {
        f"{head} head against bare arithmetic": ratio(found, head, f"{head}, bare") for head in ("concat", "linear")
    }
    if "heads" in options.measure:
        best = max((name for name in found if name.startswith("loader")), key=lambda name: rates[name])
        ratios["linear head against DataLoader"] = ratio(found, "linear", best)
    for head in ("concat", "linear") if "live" in options.measure else ():
        ratios[f"{head} head, stored against live"] = ratio(found, head, f"{head}, live")
    return ratios, {"heads": ", ".join(f"{name} {value:,.0f}" for name, value in rates.items()) + " images a second"}


def made(num_rows: int, width: int, num_classes: int) -> tuple[NDArray[np.float16], NDArray[np.int64]]:
    """Rows of classes that overlap, and their labels."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, num_classes, num_rows)
    values = rng.standard_normal((num_rows, width), dtype=np.float32)
    values += 0.1 * rng.standard_normal((num_classes, width), dtype=np.float32)[labels]
    return values.astype(np.float16), labels


def stored_learner(
    folder: Path,
    values: NDArray[np.float16],
    labels: NDArray[np.int64],
    head: str,
    device: str,
    batch_size: int = BATCH,
) -> Learner:
    """A learner of rows in a store of its own, all of which train."""
    store = FeatureStore(folder)
    ids = [f"image{row:07d}" for row in range(len(labels))]
    key = import_features(store, values, images_by_id(ids, where="made", name="made"), name="made").key
    images = replace(
        ImageSet.from_store(store),
        targets=labels,
        classes=tuple(f"class{place:04d}" for place in range(labels.max() + 1)),
        splits=np.full(len(ids), "train"),
    )
    model = store.model(key)
    return Learner(model, images, store, head=head, features=key, device=device, batch_size=batch_size, quiet=True)


def stored_epoch(
    folder: Path, values: NDArray[np.float16], labels: NDArray[np.int64], head: str, device: str
) -> Callable[[], float]:
    """Images a second of one epoch of ours."""
    learn = stored_learner(folder, values, labels, head, device)
    return lambda: epoch_rate(learn)


def epoch_rate(learn: Learner) -> float:
    """Images a second of an epoch: of a second one, so that what is read once is no part of it."""
    num_steps = -len(learn.history.losses)
    history = learn.fit(2, lr=1e-3)
    num_steps += len(learn.history.losses)
    passes = max(1, round(num_steps / 2 / max(1, len(learn.images.train) // learn.batch_size)))
    return passes * len(learn.images.train) / history.last["seconds"]


def bare_epoch(values: NDArray[np.float16], labels: NDArray[np.int64], head: str) -> Callable[[], float]:
    """The same arithmetic: rows of a tensor, the head, its loss, AdamW and one cycle."""
    rows, targets = torch.from_numpy(values), torch.from_numpy(labels)
    model = build_head(head, rows.shape[1], CLASSES).train()
    num_steps = len(rows) // BATCH

    def run() -> float:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-3, total_steps=num_steps + 1)
        started = time.perf_counter()
        order = torch.randperm(len(rows))
        for step in range(num_steps):
            chosen = order[step * BATCH : (step + 1) * BATCH]
            descend(model, rows[chosen].float(), targets[chosen], optimizer)
            schedule.step()
        return num_steps * BATCH / (time.perf_counter() - started)

    return run


def descend(model: nn.Module, inputs: Tensor, targets: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """One step, with its loss looked at, as any loop does."""
    loss = F.cross_entropy(model(inputs), targets)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    loss.item()


class Rows(Dataset[tuple[Tensor, int]]):
    """Rows one by one, as tutorials have them."""

    def __init__(self, values: NDArray[np.float16], labels: NDArray[np.int64]) -> None:
        self.values, self.labels = torch.from_numpy(values), labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        return self.values[row].float(), int(self.labels[row])


def loader_epoch(values: NDArray[np.float16], labels: NDArray[np.int64], workers: int) -> Callable[[], float]:
    """A linear head on batches of DataLoader."""
    model = build_head("linear", values.shape[1], CLASSES).train()

    def run() -> float:
        loader = DataLoader(Rows(values, labels), batch_size=BATCH, shuffle=True, num_workers=workers, drop_last=True)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
        started = time.perf_counter()
        for inputs, targets in loader:
            descend(model, inputs, targets, optimizer)
        return len(loader) * BATCH / (time.perf_counter() - started)

    return run


def resident_head(folder: Path, options: argparse.Namespace) -> tuple[dict[str, float], dict[str, str]]:
    """A 1000-way linear head on as many rows of 2048 as ImageNet has images."""
    num_rows, batch = options.rows or 1_281_167, 4096
    values, labels = made(num_rows, 2048, 1000)
    learn = stored_learner(folder / "resident", values, labels, "linear", options.device, batch_size=batch)
    inputs = torch.randn(batch, 2048, device=options.device)
    weight = torch.randn(1000, 2048, device=options.device)
    gradient = torch.randn(batch, 1000, device=options.device)

    def products() -> float:
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(200):
            inputs @ weight.T
            gradient.T @ inputs
        torch.cuda.synchronize()
        return 200 * batch / (time.perf_counter() - started)

    found = speeds({"epoch": lambda: epoch_rate(learn), "products": products}, rounds=options.rounds)
    seconds = num_rows / statistics.median(found["epoch"])
    name = "1000-way linear head against its products"
    return {name: ratio(found, "epoch", "products")}, {name: f"{num_rows:,} rows of 2048: an epoch in {seconds:.2f} s"}


# --------------------------------------------------------------------------------------------------------------- images


def network() -> StagedModel:
    """resnet18 with weights drawn anew; what they are changes no speed."""
    return backbone("resnet18", "none")


def view_of(options: argparse.Namespace) -> View:
    """Views of the size asked for."""
    return network().view.resized(size=options.size)


@contextmanager
def live_epochs(folder: Path, options: argparse.Namespace, *, needed: bool) -> Iterator[dict[str, Callable[[], float]]]:
    """Images a second of heads whose frozen trunk runs on every image."""
    if not needed:
        yield {}
        return
    images = trained(photographs(folder / "live", options.images, 500, 375))

    def epoch(head: str) -> Callable[[], float]:
        learn = Learner(network(), images, head=head, view=view_of(options), device=options.device, quiet=True)
        return lambda: epoch_rate(learn)

    yield {f"{head}, live": epoch(head) for head in ("concat", "linear")}


def trained(images: ImageSet) -> ImageSet:
    """All of them to train on, of two classes."""
    return replace(
        images,
        targets=np.arange(len(images)) % 2,
        classes=("one", "two"),
        splits=np.full(len(images), "train"),
    )


def tails(folder: Path, options: argparse.Namespace) -> tuple[dict[str, float], dict[str, str]]:
    """layer4 and head, from stored maps of layer3 and from images."""
    images, store = trained(photographs(folder / "tails", options.images, 500, 375)), FeatureStore(folder / "maps")
    model, view = network(), view_of(options)
    extract(model, images, store, cuts=["layer3"], reduce="none", view=view)
    contenders = {}
    for name, given in {"stored": store, "live": None}.items():
        learn = Learner(model, images, given, cut="layer4", view=view, device=options.device, quiet=True)
        learn.freeze_to("layer3")
        contenders[name] = partial(epoch_rate, learn)
    found = speeds(contenders, rounds=options.rounds)
    rates = ", ".join(f"{name} {statistics.median(each):,.1f}" for name, each in found.items())
    name = "tail, stored layer3 against live"
    return {name: ratio(found, "stored", "live")}, {name: f"{rates} images a second"}


def finetuning(folder: Path, options: argparse.Namespace) -> tuple[dict[str, float], dict[str, str]]:
    """All of resnet18, against a plain loop."""
    root = folder / "finetune"
    for name in ("one", "two"):
        photographs(root / name, options.images // 2, 500, 375)
    images = ImageSet.from_folder(root)
    learn = Learner(
        network(),
        replace(images, splits=np.full(len(images), "train")),
        head="linear",
        reduce="avg",
        view=view_of(options),
        device=options.device,
        batch_size=TUNED_BATCH,
        quiet=True,
    )
    learn.unfreeze()
    contenders: dict[str, Callable[[], float]] = {"ours": partial(epoch_rate, learn)}
    for workers in (0, 2):
        contenders[f"plain loop, {workers} workers"] = partial(plain_epoch, root, options, workers)
    found = speeds(contenders, rounds=options.rounds)
    rates = {name: statistics.median(each) for name, each in found.items()}
    best = max((name for name in found if name != "ours"), key=lambda name: rates[name])
    name = "fine-tuning against a plain loop"
    return (
        {name: ratio(found, "ours", best)},
        {name: ", ".join(f"{each} {value:,.1f}" for each, value in rates.items()) + " images a second"},
    )


def plain_epoch(root: Path, options: argparse.Namespace, workers: int) -> float:
    """Images a second of an epoch as tutorials write it."""
    view = view_of(options)
    transform = v2.Compose(
        [
            v2.Resize(view.resize),
            v2.CenterCrop(view.size),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(view.mean, view.std),
        ]
    )
    loader = DataLoader(
        ImageFolder(root, transform),
        batch_size=TUNED_BATCH,
        shuffle=True,
        num_workers=workers,
        persistent_workers=workers > 0,
    )
    model = resnet18()
    model.fc = nn.Linear(model.fc.in_features, 2)
    model = model.to(options.device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-3, total_steps=2 * len(loader))
    seconds = 0.0
    for _ in range(2):  # of the second, when workers are there
        started = time.perf_counter()
        for inputs, targets in loader:
            descend(model, inputs.to(options.device), targets.to(options.device), optimizer)
            schedule.step()
        seconds = time.perf_counter() - started
    return len(loader.dataset) / seconds  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
