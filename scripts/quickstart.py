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

import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor, nn

import featstore.cli.app
import training.cli
from featstore import Augment, FeatureStore, ImageSet, StagedModel, backbone
from featstore.cli.flags import load_model
from featstore.cli.program import DONE, FAILED, INCOMPLETE, table
from featstore.digest import Json
from training import Learner, plots
from training.fit import Record

DIGITS_BACKBONE = Path(__file__).with_name("digits_backbone.py")
DIGIT_SIDE = 32  # pixels; scikit-learn's are 8 wide and high, and would lose their edges in a stride or two
MADE_HERE = ".made-by-quickstart"  # marks a folder that may be replaced
SEEDS = "0-3"
TUNING_RATES = (1e-4, 1e-3)
"""Learning rates of the earliest and the last layer group once more than a head trains."""

PROGRAMS = {"featstore": featstore.cli.app.main, "featstore-train": training.cli.main}


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is trained on which images; digits and photographs take the same steps.

    Attributes:
        images: folder with a folder for each class.
        backbone: as in ``--backbone``.
        weights: as in ``--weights``, or None.
        cut: where the head sits.
        early_cut: the last frozen stage of the second step.
        policy: augmentation.
        head_epochs: of the first step.
        epochs: of the second and third step.
        device: as in ``--device``.
        out: folder of the store, the runs and the plots.
    """

    images: Path
    backbone: str
    weights: str | None
    cut: str
    early_cut: str
    policy: str
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
    def augment_flags(self) -> list[str]:
        """Augmentation by stored views."""
        return ["--augment", self.policy, "--seeds", SEEDS]

    @property
    def device_flags(self) -> list[str]:
        """Where it runs."""
        return ["--device", self.device]

    def image_set(self) -> ImageSet:
        """The images, dealt as the programs deal them."""
        images = ImageSet.from_folder(self.images)
        return images if (images.splits != "").any() else images.split(valid=0.2, seed=0)

    def model(self) -> StagedModel:
        """The backbone."""
        return load_model(self.backbone, self.weights, [self.cut])

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
        job = _digits_job(arguments) if arguments.images is None else _own_job(arguments)
        steps, has_recomputed = _train(job)
        return _verdict(job, steps, has_recomputed)
    except _FailedError as error:
        print(f"quickstart: {error}", file=sys.stderr)
        return FAILED


def _train(job: Job) -> tuple[list[Step], int]:
    """The job itself: three steps of training, and the number of rows that a second extraction computed."""
    _say(f"Features of {job.images} at two cuts: pooled for a head, and whole maps for training more than a head")
    wanted = [*job.image_flags, *job.model_flags, "--cut", f"{job.early_cut}:none", "--cut", job.cut]
    wanted += [*job.augment_flags, "--dtype", "float32"]
    _check_disk(wanted, job.out)
    _run("featstore", "extract", *wanted, *job.device_flags)
    _say("Again: nothing is left to do")
    again = json.loads(_run("featstore", "extract", *wanted, *job.device_flags, "--json", is_shown=False))
    _run("featstore", "ls", "--store", str(job.store))

    _say("A head, from cached features; first a look at views and learning rates")
    images, model, store = job.image_set(), job.model(), FeatureStore(job.store)
    plots.views(_few(images.train), model.view, job.policy).savefig(job.out / "views.png", dpi=150)
    learn = _learner(job, images, model, store)
    rates = learn.lr_find()
    rates.plot().savefig(job.out / "learning-rates.png", dpi=150)
    lr = f"{rates.suggestion:.2g}"
    own = ["--cut", job.cut, *job.augment_flags, "--epochs", str(job.head_epochs), "--lr", lr]
    out = ["--out", str(job.run("head"))]
    _run("featstore-train", "head", *job.image_flags, *job.model_flags, *own, *job.device_flags, *out)
    live = _learner(job, images, model, None)
    live.fit(job.head_epochs, float(lr))
    steps = [Step(name=f"head at {job.cut}", run=job.run("head"), live=live)]

    _say(f"The stages behind {job.early_cut} too, from cached maps")
    own = ["--freeze-to", job.early_cut, *job.augment_flags, "--store", str(job.store)]
    _finetune(job, "head", "tail", [*own, "--lr", ",".join(f"{rate:g}" for rate in TUNING_RATES)])
    live = Learner.load(job.run("head"), images, augment=job.augment(), device=job.device, quiet=True)
    live.freeze_to(job.early_cut)
    live.fit(job.epochs, TUNING_RATES)
    steps.append(Step(name=f"tail from {job.early_cut}", run=job.run("tail"), live=live))

    _say("All stages, from images, with new views in each epoch")
    own = ["--augment", job.policy, "--seeds", "fresh", "--lr", ",".join(f"{rate:g}" for rate in TUNING_RATES)]
    _finetune(job, "tail", "tuned", own)
    steps.append(Step(name="all stages", run=job.run("tuned"), live=None))

    _say("What the model is worth, and what it says")
    tuned = ["--model", str(job.run("tuned"))]
    _run("featstore-train", "evaluate", *tuned, *job.image_flags, *job.device_flags)
    some = _few(images.valid if len(images.valid) else images)
    _run("featstore-train", "predict", *tuned, *(str(job.images / name) for name in some.ids), *job.device_flags)
    table_of_all = ["--csv", str(job.out / "predictions.csv")]
    _run("featstore-train", "predict", *tuned, str(job.images), *table_of_all, *job.device_flags)
    return steps, sum(each["computed"] for each in again["sets"])


def _verdict(job: Job, steps: Sequence[Step], num_recomputed: int) -> int:
    """Prints the table and the promises, and returns the exit code."""
    _plot_history(steps, job.out / "history.png")
    _say("What came of it")
    print(table([each.row() for each in steps]))
    moved = any(
        bool((before != after).any())
        for before, after in zip(_first_stage(job.run("tail")), _first_stage(job.run("tuned")), strict=True)
    )
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


# ------------------------------------------------------------------------------------------------------ the two jobs


def _digits_job(arguments: argparse.Namespace) -> Job:
    """Digits 5-9, with a backbone that is trained on digits 0-4 first."""
    out: Path = arguments.out
    _say("scikit-learn's digits as PNG files, in a folder for each class")
    _write_digits(range(5), out / "digits" / "0-4")
    _write_digits(range(5, 10), out / "digits" / "5-9")
    source = f"{os.path.relpath(DIGITS_BACKBONE)}:make_model"
    run = out / "runs" / "backbone"
    _say("A small backbone, trained on the digits 0-4 (yours would come with its weights)")
    epochs = str(arguments.epochs or 8)
    training_flags = ["--epochs", epochs, "--lr", "1e-2", "--device", arguments.device, "--out", str(run)]
    _run("featstore-train", "finetune", "--images", str(out / "digits" / "0-4"), "--backbone", source, *training_flags)
    weights = out / "digits_backbone.pth"
    torch.save(backbone(run).tensors(), weights)  # without the head of that run
    return Job(
        images=out / "digits" / "5-9",
        backbone=source,
        weights=str(weights),
        cut="layer3",
        early_cut="layer2",
        policy="flip",  # random crops of a digit are other digits
        head_epochs=arguments.epochs or 10,
        epochs=arguments.epochs or 5,
        device=arguments.device,
        out=out,
    )


def _own_job(arguments: argparse.Namespace) -> Job:
    """A person's photographs and backbone."""
    model = load_model(arguments.backbone, arguments.weights, [] if arguments.cut is None else [arguments.cut])
    cut = model.canonical(arguments.cut or model.default_cut)
    return Job(
        images=arguments.images,
        backbone=arguments.backbone,
        weights=arguments.weights,
        cut=cut,
        early_cut=_early_cut(model, cut),
        policy="flip",
        head_epochs=arguments.epochs or 5,
        epochs=arguments.epochs or 2,
        device=arguments.device,
        out=arguments.out,
    )


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


def _write_digits(labels: range, folder: Path) -> None:
    digits = load_digits()
    for place, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        if label in labels:
            of_class = folder / str(label)
            of_class.mkdir(parents=True, exist_ok=True)
            image = Image.fromarray((pixels * 255 / 16).astype("uint8"))  # scikit-learn's values are 0 ... 16
            image.resize((DIGIT_SIDE, DIGIT_SIDE), Image.Resampling.BICUBIC).save(of_class / f"{place:04}.png")


# ---------------------------------------------------------------------------------------------------- steps and looks


def _learner(job: Job, images: ImageSet, model: StagedModel, store: FeatureStore | None) -> Learner:
    return Learner(model, images, store, cut=job.cut, augment=job.augment(), device=job.device, quiet=True)


def _finetune(job: Job, start: str, name: str, flags: Sequence[str]) -> None:
    run_flags = ["--epochs", str(job.epochs), *job.device_flags, "--out", str(job.run(name))]
    _run("featstore-train", "finetune", *job.image_flags, "--from", str(job.run(start)), *flags, *run_flags)


def _few(images: ImageSet) -> ImageSet:
    """Four images from all over the set, so that they show more than one class."""
    return images.select(range(0, len(images), max(len(images) // 4, 1))[:4])


def _first_stage(run: Path) -> list[Tensor]:
    """The parameters of a run's first stage that has some."""
    stages = backbone(run).stages
    return next(found for stage in stages if (found := [each.detach() for each in stage.parameters()]))


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
    parser.add_argument("--weights", metavar="FILE", help="with --images: as for featstore extract")
    parser.add_argument("--cut", metavar="CUT", help="with --images: where the head sits")
    parser.add_argument("--epochs", type=int, metavar="N", help="of each step")
    parser.add_argument("--device", default="cpu", help="default: cpu, where equality to the last bit is promised")
    parser.add_argument(
        "--out", type=Path, default=Path("quickstart-out"), metavar="DIR", help="default: quickstart-out; made anew"
    )
    arguments = parser.parse_args()
    if (arguments.images is None) != (arguments.backbone is None):
        parser.error("--images and --backbone belong together")
    if arguments.images is None and (arguments.weights is not None or arguments.cut is not None):
        parser.error("--weights and --cut belong to --images")
    if arguments.epochs is not None and arguments.epochs < 1:
        parser.error(f"--epochs is {arguments.epochs}; expected at least 1")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
