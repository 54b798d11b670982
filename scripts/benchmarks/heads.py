"""A linear head with default settings against scikit-learn's logistic regression, and what the finder's rates do first.

    .venv/bin/python scripts/benchmarks/heads.py [--only heads|finder] [--seeds 5] [--scale 1.0] [--problems 20]
        [--folder DIR]

scikit-learn fits standardised features with C by cross-validation. Our head is trained as `featstore-train head --head
linear` does: 10 epochs, AdamW, one cycle, the finder's rate. The finder's problems are made: the validation loss after
the first epoch, of 10 and of 1, is compared with the loss before training.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from measuring import report
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

from featstore import FeatureStore, ImageSet, StagedModel, View
from featstore.exchange.imports import import_features
from featstore.images.fileless import images_by_id
from training import Learner

sys.path.insert(0, str(Path(__file__).parents[1]))
from digits_backbone import SIZE, make_model

STRENGTHS = np.logspace(-4, 4, 9)
"""Of C, inverse to the regularisation."""

Array = NDArray[np.float32]
Labels = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Features and labels; the first rows are to learn from, the others to score."""

    features: Array
    labels: Labels
    num_train: int


def digits(seed: int, num_train: int) -> Problem:
    """scikit-learn's digits behind the three stages of the quickstart's backbone, with weights drawn from seed 0."""
    found = load_digits()
    pixels = torch.from_numpy(found.images).float()[:, None].expand(-1, 3, -1, -1) / 16
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = make_model().eval()
        maps = F.interpolate(pixels, size=SIZE)
        for stage in list(model.stages)[: model.index("layer3") + 1]:
            maps = stage(maps)
    order = np.random.default_rng(seed).permutation(len(maps))
    features = torch.cat([maps.mean((2, 3)), maps.amax((2, 3))], dim=1).numpy()
    return Problem(features=features[order], labels=found.target[order], num_train=num_train)


def unscaled(seed: int, num_train: int) -> Problem:
    """Ten classes whose features have means and spreads from 0.1 to 100."""
    return made(seed, num_train=num_train, width=64, contrast=0.35)


def few(seed: int, num_train: int) -> Problem:
    """Five images of each of ten classes, where there are 50, with more features than images."""
    return made(seed, num_train=num_train, width=256, contrast=0.3)


def made(seed: int, *, num_train: int, width: int, contrast: float, classes: int = 10, num_test: int = 2000) -> Problem:
    """Correlated features of classes that overlap."""
    rng = np.random.default_rng(seed)
    centres = contrast * rng.normal(size=(classes, width))
    mixed = np.eye(width) + 0.9 * rng.normal(size=(width, width)) / math.sqrt(width)
    labels = np.concatenate([np.arange(num_train) % classes, rng.integers(0, classes, num_test)])
    features = (centres[labels] + rng.normal(size=(len(labels), width))) @ mixed
    features = 10 ** rng.uniform(-1, 2, width) + 10 ** rng.uniform(-1, 2, width) * features
    return Problem(features=features.astype(np.float32), labels=labels, num_train=num_train)


SETS: dict[str, tuple[Callable[[int, int], Problem], int]] = {
    "digits": (digits, 1400),
    "unscaled features": (unscaled, 2000),
    "5 images a class": (few, 50),
}
"""What makes a set's problem of a seed, and how many rows there are to learn from."""


def heads(options: argparse.Namespace) -> tuple[dict[str, float], dict[str, float]]:
    """Points of accuracy that our head lacks, in standard errors of scikit-learn's mean, as ratios and targets."""
    ratios, targets = {}, {}
    print(f"{'':<20} {'scikit-learn':>18} {'linear head':>18} {'difference':>10}")
    for name, (make, most) in SETS.items():
        num_train = max(min(100, most), int(most * options.scale))  # of each digit some, for cross-validation
        problems = [make(seed, num_train) for seed in range(options.seeds)]
        theirs = [logistic_regression(each) for each in problems]
        ours = [linear_head(each, seed, options.folder) for seed, each in enumerate(problems)]
        difference = statistics.mean(ours) - statistics.mean(theirs)
        print(f"{name:<20} {_mean(theirs):>18} {_mean(ours):>18} {difference:>+10.4f}")
        ratios[f"{name}: difference in standard errors"] = difference / _error(theirs)
        targets[f"{name}: difference in standard errors"] = -1.0
    return ratios, targets


def logistic_regression(problem: Problem) -> float:
    """Accuracy of scikit-learn's optimum, with C chosen by cross-validation."""
    first, labels = problem.num_train, problem.labels
    fitted = GridSearchCV(
        make_pipeline(StandardScaler(), LogisticRegression(max_iter=5000)),
        {"logisticregression__C": STRENGTHS},
        cv=min(5, int(np.bincount(labels[:first]).min())),
    ).fit(problem.features[:first], labels[:first])
    return float(fitted.score(problem.features[first:], labels[first:]))


def linear_head(problem: Problem, seed: int, folder: Path | None) -> float:
    """Accuracy of our head with default settings."""
    with learner(problem, folder, head="linear", seed=seed) as learn:
        learn.fit(10)
        return learn.evaluate("valid")["accuracy"]


@contextmanager
def learner(problem: Problem, folder: Path | None, **options: Any) -> Iterator[Learner]:
    """A learner of stored features."""
    count, first = len(problem.labels), problem.num_train
    with tempfile.TemporaryDirectory(dir=folder) as root:
        store = FeatureStore(root)
        ids = [f"image{row:05d}" for row in range(count)]
        key = import_features(store, problem.features, images_by_id(ids, where="made", name="made"), name="made").key
        images = replace(
            ImageSet.from_store(store),
            targets=problem.labels,
            classes=tuple(map(str, range(problem.labels.max() + 1))),
            splits=np.array(["train"] * first + ["valid"] * (count - first)),
        )
        yield Learner(store.model(key), images, store, features=key, device="cpu", quiet=True, **options)


def finder(options: argparse.Namespace) -> tuple[dict[str, float], dict[str, float]]:
    """Over made problems, the largest ratio of the loss after the first epoch to that before, turned round."""
    worst = 0.0
    print(f"\n{'problem':<52} {'rate':>9} {'start':>9} {'1st of 10':>9} {'1 epoch':>9}")
    problems = list(finder_problems(options))
    for name, make in problems[:: max(1, len(problems) // options.problems)]:
        with make() as learn:
            start = learn.evaluate("valid")["loss"]
            suggested = learn.lr_find()
        after = []
        for epochs in (10, 1):
            with make() as learn:
                after.append(first_epoch(learn, epochs))
        worst = max([worst, *(loss / start for loss in after)], key=lambda ratio: math.inf if ratio != ratio else ratio)
        marked = f"{suggested.suggestion:.2g}{'' if suggested.note is None else '*'}"
        print(f"{name:<52} {marked:>9} {start:>9.3f} {after[0]:>9.3f} {after[1]:>9.3f}", flush=True)
    print("* not the curve's own: a default, or lowered")
    return {"start / first epoch, worst": 1 / worst}, {"start / first epoch, worst": 1.0}


def finder_problems(options: argparse.Namespace) -> Iterator[tuple[str, Callable[[], AbstractContextManager[Learner]]]]:
    """Twenty: 2 to 1,000 batches, scaled and unscaled, AdamW and SGD, a head, a tail, the whole network."""
    for place, (head, optimizer, is_scaled) in enumerate(
        product(("linear", "concat", "mlp"), ("adamw", "sgd"), (True, False))
    ):
        num_batches = max(2, int((2, 4, 12, 100, 1000)[place % 5] * options.scale))
        problem = made(place, num_train=8 * num_batches, width=32, contrast=0.5, classes=4, num_test=400)
        if is_scaled:
            problem = replace(problem, features=StandardScaler().fit_transform(problem.features))
        name = f"{head} head, {optimizer}, {num_batches} batches, {'scaled' if is_scaled else 'unscaled'}"
        yield name, partial(learner, problem, options.folder, head=head, optimizer=optimizer, batch_size=8)
    for place, (part, optimizer, is_scaled) in enumerate(
        product(("tail", "whole network"), ("adamw", "sgd"), (True, False))
    ):
        num_batches = max(2, int((3, 250, 20, 2, 60, 7, 1000, 30)[place] * options.scale))
        name = f"{part}, {optimizer}, {num_batches} batches, {'scaled' if is_scaled else 'unscaled'}"
        yield name, partial(tuned, num_batches, part, optimizer, is_scaled=is_scaled)


@contextmanager
def tuned(num_batches: int, part: str, optimizer: str, *, is_scaled: bool) -> Iterator[Learner]:
    """A learner of a small network, of which more than the head trains, from images."""
    rng = np.random.default_rng(num_batches)
    count = 4 * num_batches + 200
    labels = rng.integers(0, 3, count)
    pixels = np.clip(rng.normal(110, 50, (count, 16, 16, 3)) + 20 * (labels[:, None, None, None] - 1), 0, 255)
    images = ImageSet.from_arrays(
        pixels.astype(np.uint8), labels.tolist(), splits=["train"] * (count - 200) + ["valid"] * 200
    )
    learn = Learner(
        network(1.0 if is_scaled else 30.0),
        images,
        cut="layer2",
        optimizer=optimizer,
        batch_size=4,
        device="cpu",
        workers=0,
        quiet=True,
    )
    if part == "tail":
        learn.freeze_to("layer1")
    else:
        learn.unfreeze()
    yield learn


def network(gain: float) -> StagedModel:
    """Two stages of maps, whose inputs are as large as `gain` makes them; batch norm knows them, as in trained weights.

    Statistics that are still those of no image make any first epoch differ from the start, whatever the rate.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        norm = nn.BatchNorm2d(16, momentum=None)  # the mean of all batches, here of one
        stages = {
            "layer1": nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.ReLU()),
            "layer2": nn.Sequential(nn.Conv2d(8, 16, 3, stride=2), norm, nn.ReLU()),
        }
    view = View(size=16, resize=16)
    red, green, blue = view.std
    view = replace(view, std=(red / gain, green / gain, blue / gain))
    noise = np.random.default_rng(0).normal(110, 50, (64, 16, 16, 3)).clip(0, 255)
    with torch.no_grad():
        stages["layer2"](stages["layer1"](view.normalise(torch.from_numpy(noise.astype(np.uint8)).permute(0, 3, 1, 2))))
    norm.momentum = 0.1
    return StagedModel.from_stages(stages, view=view, name="small")


class _FirstEpochError(Exception):
    """One epoch is over; the others need not be seen."""


def first_epoch(learn: Learner, epochs: int) -> float:
    """The validation loss after the first epoch of a fit at the finder's rate."""
    losses = []

    def stop(record: dict[str, float]) -> None:
        losses.append(record["valid_loss"])
        raise _FirstEpochError

    try:
        learn.fit(epochs, on_epoch_end=stop)
    except _FirstEpochError:
        pass
    except FloatingPointError:
        return math.inf
    return losses[0]


def _mean(values: list[float]) -> str:
    return f"{statistics.mean(values):.4f} +- {_error(values):.4f}"


def _error(values: list[float]) -> float:
    return statistics.stdev(values) / math.sqrt(len(values))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", choices=["heads", "finder"])
    parser.add_argument("--seeds", type=int, default=5, help="of each set, at least 2; default: 5")
    parser.add_argument(
        "--scale", type=float, default=1.0, help="of rows to learn from and of batches, at most and by default 1"
    )
    parser.add_argument("--problems", type=int, default=20, help="for the finder, spread over all 20; default: 20")
    parser.add_argument("--folder", type=Path, help="where files are made; default: the system's temporary folder")
    options = parser.parse_args()
    ratios: dict[str, float] = {}
    targets: dict[str, float] = {}
    for name, measure in {"heads": heads, "finder": finder}.items():
        if options.only in (None, name):
            found = measure(options)
            ratios |= found[0]
            targets |= found[1]
    report("heads", ratios, targets)


if __name__ == "__main__":
    main()
