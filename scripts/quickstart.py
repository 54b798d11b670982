"""The quickstart: the main job from images to predictions, told command by command, and what it promises checked.

Run it by scripts/quickstart, which makes the Python environment first. Exits 1 unless training on cached features gives
the losses of training with the trunk run live, bit for bit; unfreezing moves the first stage; and a second extraction
computes nothing.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import shlex
import shutil
import statistics
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import skimage.data
from PIL import Image
from sklearn.datasets import load_digits
from torch import nn
from torchvision.models import ResNet18_Weights

import featstore.cli.app
import training.cli.app
from featstore import Augment, FeatureStore, ImageSet, StagedModel
from featstore.cli.models import load_model
from featstore.cli.program import DONE, FAILED, INCOMPLETE, table
from featstore.digest import Json
from featstore.models.runs import read_run
from training import Learner, plots
from training.loop.history import Record
from training.predict import as_images

BACKBONE = Path(__file__).with_name("efficientnet_lite0.py")
CATS = {"tabby", "tiger cat", "Persian cat", "Siamese cat", "Egyptian cat"}
PHOTOGRAPHS = {"chelsea": CATS, "coffee": {"espresso", "cup", "coffee mug"}, "rocket": {"missile", "space shuttle"}}
"""Photograph of scikit-image -> what of ImageNet's classes it may be called."""
NUM_DIGITS = 800
DIGIT_SIDE = 64  # pixels; scikit-learn's are 8 wide and high, and the network halves them five times
MADE_HERE = ".made-by-quickstart"  # marks a folder that may be replaced
SEEDS = "0-3"
BATCH_SIZE = 16  # a few hundred images in batches of 64 are too few steps

PROGRAMS = {"featstore": featstore.cli.app.main, "featstore-train": training.cli.app.main}


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is trained on which images; digits and photographs take the same steps.

    Attributes:
        images: folder with a folder for each class.
        backbone: as in ``--backbone``.
        weights: as in ``--weights``, or None.
        model: the backbone, which sees images as `view_flags` say.
        size: side of the images that the backbone sees; None: its own.
        cut: where the head sits.
        early_cut: the last frozen stage of the second step.
        policy: augmentation.
        rates: learning rates of the earliest and the last layer group once more than a head trains.
        head_epochs: of the first step.
        epochs: of the second and third step.
        device: as in ``--device``.
        out: folder of the store, the runs and the plots.
    """

    images: Path
    backbone: str
    weights: str | None
    model: StagedModel
    size: int | None
    cut: str
    early_cut: str
    policy: str
    rates: tuple[float, float]
    head_epochs: int
    epochs: int
    device: str
    out: Path

    @property
    def store(self) -> Path:
        """Where features are filed."""
        return self.out / "features"

    def run(self, name: str) -> Path:
        """Folder of the run `name`."""
        return self.out / "runs" / name

    @property
    def image_flags(self) -> list[str]:
        """Which images, for all programs."""
        return ["--images", str(self.images)]

    @property
    def model_flags(self) -> list[str]:
        """Store, backbone and weights."""
        weights = [] if self.weights is None else ["--weights", self.weights]
        return ["--store", str(self.store), "--backbone", self.backbone, *weights]

    @property
    def view_flags(self) -> list[str]:
        """Size of the images; whole ones, as a digit fills its image."""
        return [] if self.size is None else ["--size", str(self.size), "--resize", str(self.size)]

    @property
    def augment_flags(self) -> list[str]:
        """Augmentation by stored views."""
        return ["--augment", self.policy, "--seeds", SEEDS]

    @property
    def rate_flags(self) -> list[str]:
        """Learning rates of more than a head."""
        return ["--lr", ",".join(f"{rate:g}" for rate in self.rates)]

    @property
    def training_flags(self) -> list[str]:
        """How it is trained, and where."""
        return ["--batch-size", str(BATCH_SIZE), *self.device_flags]

    @property
    def device_flags(self) -> list[str]:
        """Where it runs."""
        return ["--device", self.device]

    def image_set(self) -> ImageSet:
        """The images, dealt as the programs deal them."""
        images = ImageSet.from_folder(self.images)
        return images if (images.splits != "").any() else images.split(valid=0.2, seed=0)

    def augment(self) -> Augment:
        """What `augment_flags` ask for."""
        return Augment(self.policy, seeds=range(4))


@dataclass(frozen=True, kw_only=True)
class Step:
    """One line of the table: what a step of training reached, and how long its epochs took."""

    name: str
    run: Path
    live: Learner | None  # the same step with the trunk run live; None where nothing is cached

    def records(self) -> list[dict[str, str]]:
        """The epochs that the program wrote down, numbers as text."""
        with (self.run / "history.csv").open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))

    def is_as_live(self) -> bool:
        """Whether every loss and metric of every epoch equals the live one to the last bit."""
        return self.live is None or [_numbers(each) for each in self.records()] == [
            _numbers(each) for each in self.live.history.records
        ]

    def row(self) -> dict[str, Json]:
        """The line of the table."""
        metrics = self.run / "metrics.json"
        scores = json.loads(metrics.read_text(encoding="utf-8"))["valid"] if metrics.is_file() else {}
        accuracy = scores.get("accuracy")
        own = _seconds([float(each["seconds"]) for each in self.records()])
        is_cached = self.live is not None
        return {
            "step": self.name,
            "valid accuracy": "-" if accuracy is None else f"{accuracy:.3f}",
            "seconds an epoch, cached": own if is_cached else "-",
            "live": own if self.live is None else _seconds([each["seconds"] for each in self.live.history.records]),
        }


def main() -> int:
    arguments = _arguments()
    try:
        _make_folder(arguments.out, keep=arguments.images)
        job = _job(arguments)
        steps, num_recomputed = _train(job)
        return _verdict(job, steps, num_recomputed)
    except _FailedError as error:
        print(f"quickstart: {error}", file=sys.stderr)
        return FAILED


def _train(job: Job) -> tuple[list[Step], int]:
    """The job itself: three steps of training, and the number of rows that a second extraction computed."""
    _say(f"Features of {job.images} at two cuts: pooled for a head, and whole maps for training more than a head")
    wanted = [*job.image_flags, *job.model_flags, "--cut", f"{job.early_cut}:none", "--cut", job.cut]
    wanted += [*job.view_flags, *job.augment_flags, "--dtype", "float32"]
    _check_disk(wanted, job.out)
    _run("featstore", "extract", *wanted, *job.device_flags)
    _say("Again: nothing is left to do")
    again = json.loads(_run("featstore", "extract", *wanted, *job.device_flags, "--json", is_shown=False))
    _run("featstore", "ls", "--store", str(job.store))

    _say("A head, from cached features; first a look at views and learning rates")
    images, model, store = job.image_set(), job.model, FeatureStore(job.store)
    plots.views(_few(images.train), model.view, job.policy).savefig(job.out / "views.png", dpi=150)
    learn = _learner(job, images, model, store)
    rates = learn.lr_find()
    figure = rates.plot().get_figure(root=True)
    assert figure is not None
    figure.savefig(job.out / "learning-rates.png", dpi=150)
    lr = f"{rates.suggestion:.2g}"
    own = ["--cut", job.cut, *job.view_flags, *job.augment_flags, "--epochs", str(job.head_epochs), "--lr", lr]
    out = ["--out", str(job.run("head"))]
    _run("featstore-train", "head", *job.image_flags, *job.model_flags, *own, *job.training_flags, *out)
    live = _learner(job, images, model, None)
    live.fit(job.head_epochs, float(lr))
    steps = [Step(name=f"head at {job.cut}", run=job.run("head"), live=live)]

    _say(f"The stages behind {job.early_cut} too, from cached maps")
    own = ["--freeze-to", job.early_cut, *job.augment_flags, "--store", str(job.store), *job.rate_flags]
    _finetune(job, "head", "tail", own)
    options: dict[str, Any] = {"batch_size": BATCH_SIZE, "device": job.device, "quiet": True}
    live = Learner.load(job.run("head"), images, augment=job.augment(), **options)
    live.freeze_to(job.early_cut)
    live.fit(job.epochs, job.rates)
    steps.append(Step(name=f"tail from {job.early_cut}", run=job.run("tail"), live=live))

    _say("All stages, from images, with new views in each epoch")
    _finetune(job, "tail", "tuned", ["--augment", job.policy, "--seeds", "fresh", *job.rate_flags])
    steps.append(Step(name="all stages", run=job.run("tuned"), live=None))

    _say("What the model is worth, and what it says")
    tuned = ["--model", str(job.run("tuned"))]
    _run("featstore-train", "evaluate", *tuned, *job.image_flags, *job.device_flags)
    some = _few(images.valid if len(images.valid) else images)
    _run("featstore-train", "predict", *tuned, *(str(job.images / name) for name in some.ids), *job.device_flags)
    table_of_all = ["--csv", str(job.out / "predictions.csv"), "--overwrite"]
    _run("featstore-train", "predict", *tuned, str(job.images), *table_of_all, *job.device_flags)
    return steps, sum(each["computed"] for each in again["sets"])


def _verdict(job: Job, steps: Sequence[Step], num_recomputed: int) -> int:
    """Prints the table and the promises, and returns the exit code."""
    _plot_history(steps, job.out / "history.png")
    _say("What came of it")
    print(table([each.row() for each in steps]))
    before, after = (read_run(job.run(name)).tensors for name in ("tail", "tuned"))
    moved = any(not before[name].equal(after[name]) for name in _first_parameters(job.model))
    promises = {
        "a second extraction computed no row": num_recomputed == 0,
        "cached and live losses are equal, bit for bit": all(each.is_as_live() for each in steps),
        "unfreezing moved the first stage": moved,
    }
    print()
    for claim, holds in promises.items():
        print(f"{'yes' if holds else 'NO ':3}  {claim}")
    print(f"\nPlots, runs, features and predictions are in {job.out}.")
    return DONE if all(promises.values()) else FAILED


# --------------------------------------------------------------------------------------------------- what it works on


def _job(arguments: argparse.Namespace) -> Job:
    """The photographs and the backbone that were given; else digits, and the network with ImageNet's weights."""
    out: Path = arguments.out
    is_of_digits = arguments.images is None
    images = out / "digits" if is_of_digits else arguments.images
    source = arguments.backbone or f"{os.path.relpath(BACKBONE)}:make"
    model = load_model(source, arguments.weights, [] if arguments.cut is None else [arguments.cut])
    if arguments.backbone is None:
        _name_photographs(model, arguments.device, out)
    if is_of_digits:
        _say("scikit-learn's digits as PNG files, in a folder for each class")
        _write_digits(images)
    size = DIGIT_SIDE if is_of_digits else None
    cut = model.canonical(arguments.cut or model.default_cut)
    return Job(
        images=images,
        backbone=source,
        weights=arguments.weights,
        model=model.with_(view=model.view.resized(size=size, resize=size)),
        size=size,
        cut=cut,
        # Digits are no photographs: more of the network has more to learn than their classes.
        early_cut="stage3" if is_of_digits else _early_cut(model, cut),
        policy="basic" if is_of_digits else "side_on",
        rates=(1e-3, 3e-3) if is_of_digits else (1e-4, 1e-3),
        head_epochs=arguments.epochs or 5,
        epochs=arguments.epochs or 4,
        device=arguments.device,
        out=out,
    )


def _name_photographs(model: StagedModel, device: str, out: Path) -> None:
    """Names photographs by ImageNet's classes: preprocessing that is wrong shows here, and hardly in a head's score."""
    _say("ImageNet's classes for photographs of scikit-image, to see that weights and preprocessing belong together")
    files = [out / "photographs" / f"{name}.png" for name in PHOTOGRAPHS]
    files[0].parent.mkdir()
    for file in files:
        Image.fromarray(getattr(skimage.data, file.stem)()).save(file)
    classes = ResNet18_Weights.DEFAULT.meta["categories"]  # all networks have ImageNet's in one order
    learn = Learner(model, as_images(files), head="keep", classes=classes, device=device, quiet=True)
    run = learn.save(out / "runs" / "imagenet")
    _run("featstore-train", "predict", "--model", str(run), *map(str, files), "--device", device)
    for said in learn.predict(files):
        if said.label not in (expected := PHOTOGRAPHS[Path(said.image).stem]):
            raise _FailedError(f"{said.image} is called {said.label}; expected {', '.join(sorted(expected))}.")


def _early_cut(model: StagedModel, cut: str) -> str:
    """A cut before `cut` with a fair part of the trunk's parameters between the two; a plain name before a dotted one.

    resnet layer4 -> layer3, squeezenet features.12 -> features.11, vit encoder.ln -> encoder.layers.encoder_layer_10.
    """
    names = model.cut_points[: model.index(cut) + 1]
    sizes = [_num_parameters(model.stages[place]) for place in range(len(names))]
    shares = {name: sum(sizes[place + 1 :]) / max(sum(sizes), 1) for place, name in enumerate(names[:-1])}
    fair = [name for name, share in shares.items() if 0.05 <= share <= 0.8]
    some = [name for name, share in shares.items() if share > 0]
    if not some:
        raise _FailedError(f"{model.name} has no stage with parameters before {cut}. Give a later --cut.")
    return min(reversed(fair or some), key=lambda name: name.count("."))


def _num_parameters(stage: nn.Module) -> int:
    return sum(parameter.numel() for parameter in stage.parameters())


def _write_digits(folder: Path) -> None:
    digits = load_digits()
    for place, (pixels, label) in enumerate(zip(digits.images[:NUM_DIGITS], digits.target, strict=False)):
        of_class = folder / str(label)
        of_class.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray((pixels * 255 / 16).astype("uint8"))  # scikit-learn's values are 0 ... 16
        image.resize((DIGIT_SIDE, DIGIT_SIDE), Image.Resampling.BICUBIC).save(of_class / f"{place:04}.png")


# ---------------------------------------------------------------------------------------------------- steps and looks


def _learner(job: Job, images: ImageSet, model: StagedModel, store: FeatureStore | None) -> Learner:
    options: dict[str, Any] = {"batch_size": BATCH_SIZE, "device": job.device, "quiet": True}
    return Learner(model, images, store, cut=job.cut, augment=job.augment(), **options)


def _finetune(job: Job, start: str, name: str, flags: Sequence[str]) -> None:
    run_flags = ["--epochs", str(job.epochs), *job.training_flags, "--out", str(job.run(name))]
    _run("featstore-train", "finetune", *job.image_flags, "--from", str(job.run(start)), *flags, *run_flags)


def _few(images: ImageSet) -> ImageSet:
    """Four images from all over the set, so that they show more than one class."""
    return images.select(range(0, len(images), max(len(images) // 4, 1))[:4])


def _first_parameters(model: StagedModel) -> list[str]:
    """The names of the parameters of the first stage that has some."""
    stage = next(each for each in model.ordered if any(True for _ in each.parameters()))
    places = {each.data_ptr() for each in stage.parameters()}
    return [name for name, tensor in stage.tensors().items() if tensor.data_ptr() in places]


def _plot_history(steps: Sequence[Step], file: Path) -> None:
    """All steps in one figure, a line where the next begins."""
    records = [{name: float(value) for name, value in each.items()} for step in steps for each in step.records()]
    figure = plots.history([{**each, "epoch": place} for place, each in enumerate(records, start=1)])
    ends = [len(steps[0].records()), len(steps[0].records()) + len(steps[1].records())]
    for axes in figure.axes:
        for end in ends:
            axes.axvline(end + 0.5, color="0.6", linestyle=":", zorder=0)
    figure.suptitle(" | ".join(each.name for each in steps), fontsize="medium")
    figure.savefig(file, dpi=150)


def _numbers(record: Record | dict[str, str]) -> dict[str, str]:
    return {name: str(value) for name, value in record.items() if name != "seconds"}


def _seconds(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2f}"


# ------------------------------------------------------------------------------------------------ commands and folders


class _FailedError(Exception):
    """Ends the quickstart with a sentence."""


def _run(program: str, *arguments: str, expected: tuple[int, ...] = (DONE,), is_shown: bool = True) -> str:
    """Runs a command, shown as a person would type it, and returns its result; prints that too if `is_shown`."""
    print(f"$ {shlex.join([program, *arguments])}", flush=True)
    printed = io.StringIO()
    with redirect_stdout(printed):
        code = PROGRAMS[program](arguments)
    print(printed.getvalue() if is_shown else "", flush=True)
    if code not in expected:
        raise _FailedError(f"the command above ended with exit code {code}")
    return printed.getvalue()


def _check_disk(wanted: Sequence[str], out: Path) -> None:
    """Says how much disk the features take, and refuses what doesn't fit."""
    status = json.loads(_run("featstore", "status", *wanted, "--json", expected=(DONE, INCOMPLETE)))
    needed, free = status["bytes"], shutil.disk_usage(out).free
    if needed > free:
        raise _FailedError(
            f"these features take {needed / 1e9:.1f} GB, and {out} has {free / 1e9:.1f} GB left. Give fewer images, or "
            "--out on a larger disk."
        )


def _make_folder(folder: Path, keep: Path | None) -> None:
    """Makes `folder` anew; one that wasn't made here, or that holds the images, is left alone."""
    if folder.exists() and not (folder / MADE_HERE).is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise _FailedError(f"{folder} exists and wasn't made by the quickstart. Give another folder with --out.")
    if keep is not None and keep.resolve().is_relative_to(folder.resolve()):
        raise _FailedError(f"{keep} lies in {folder}, which is made anew. Give another folder with --out.")
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    (folder / MADE_HERE).touch()


def _say(text: str) -> None:
    print(f"\n== {text}", flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/quickstart", description="From images to predictions, step by step.")
    parser.add_argument("--images", type=Path, metavar="DIR", help="your photographs, in a folder for each class")
    parser.add_argument("--backbone", metavar="NAME", help="with --images: a backbone's name, FILE.py:FN or RUN_DIR")
    parser.add_argument("--weights", metavar="FILE", help="with --backbone: as for featstore extract")
    parser.add_argument("--cut", metavar="CUT", help="with --images: where the head sits")
    parser.add_argument("--epochs", type=int, metavar="N", help="of each step")
    parser.add_argument("--device", default="cpu", help="default: cpu, where equality to the last bit is promised")
    parser.add_argument(
        "--out", type=Path, default=Path("quickstart-out"), metavar="DIR", help="default: quickstart-out; made anew"
    )
    arguments = parser.parse_args()
    if arguments.images is None and (arguments.backbone is not None or arguments.cut is not None):
        parser.error("--backbone and --cut belong to --images")
    if arguments.backbone is None and arguments.weights is not None:
        parser.error("--weights belongs to --backbone")
    if arguments.epochs is not None and arguments.epochs < 1:
        parser.error(f"--epochs is {arguments.epochs}; expected at least 1")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
