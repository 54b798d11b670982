"""Measures what augmentation is worth to a head, from so many stored views an image, from fresh ones, and from none.

    .venv/bin/python scripts/augmentation_pays.py                           on scikit-learn's digits
    .venv/bin/python scripts/augmentation_pays.py --images DIR --name pets  on photographs, a folder for each class
    .venv/bin/python scripts/augmentation_pays.py --draw                    table and plot from the records alone

The network is the quickstart's, with ImageNet's weights, and stays frozen. Each run deals the images anew and trains a
concat head in each of the ways. What came out is in docs/guides/augmentation_pays.csv, a line a run; the page beside it
has a table and a plot of these lines.
"""

from __future__ import annotations

import argparse
import csv
import math
import statistics
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from scipy import stats  # type: ignore[import-untyped]
from sklearn.datasets import load_digits

from featstore import Augment, FeatureStore, ImageSet, StagedModel, backbone, extract
from training import Learner
from training.plots import Plot

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "guides" / "augmentation_pays.md"
RECORDS, PLOT = PAGE.with_suffix(".csv"), PAGE.with_suffix(".png")
BEGIN, END = "<!-- written by scripts/augmentation_pays.py -->", "<!-- /written -->"
BACKBONE = f"{ROOT / 'scripts' / 'efficientnet_lite0.py'}:make"
DIGIT_SIDE = 64  # pixels; scikit-learn's are 8 wide and high, and the network halves them five times
LEARNING_RATE = 3e-3
BATCH_SIZE = 32  # a few hundred images in batches of 64 are too few steps


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one run came to, on the images that it held out, after its last epoch.

    Attributes:
        images: what they are called.
        views: number of stored views of each training image; or ``none``, the evaluation view; or ``fresh``.
        run: seed of how the images were dealt, of the head and of the order.
    """

    images: str
    views: str
    run: int
    accuracy: float
    loss: float


def main() -> None:
    """Measures and writes the records, or draws what they say."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draw", action="store_true", help="write the page's table and plot; measure nothing")
    parser.add_argument("--images", type=Path, metavar="DIR", help="photographs; default: scikit-learn's digits")
    parser.add_argument("--name", default="photographs", help="what the table calls them")
    parser.add_argument("--digits", type=int, default=1000, metavar="N", help="how many of them, without --images")
    parser.add_argument("--train", type=int, default=200, metavar="N", help="images to train on; the others validate")
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 2, 4, 8, 16], metavar="K", help="of stored views")
    parser.add_argument("--epochs", type=int, default=32, help="more than there are views, else they are as fresh ones")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--records", type=Path, default=RECORDS, metavar="CSV", help="other images' lines stay")
    options = parser.parse_args()
    if options.draw:
        draw(options.records)
        return
    torch.set_num_threads(1)
    model = backbone(BACKBONE)
    if options.images is None:
        name, images, policy = "digits", digits(options.digits), "basic:max_zoom=1.1"  # not mirrored
        model = model.with_(view=model.view.resized(size=DIGIT_SIDE, resize=DIGIT_SIDE))
    else:
        name, images, policy = options.name, ImageSet.from_folder(options.images), "side_on:max_zoom=1.1"
    kept = [each for each in read(options.records) if each.images != name]
    ways = {
        "none": None,
        **{str(count): Augment(policy, seeds=range(count)) for count in sorted(options.counts)},
        "fresh": Augment(policy, seeds="fresh"),
    }
    measured = []
    with tempfile.TemporaryDirectory() as folder:
        for run in range(options.runs):
            dealt = images.split(valid=1 - options.train / len(images), seed=run)
            for views, scored in scores(model, dealt, FeatureStore(folder), ways, epochs=options.epochs, seed=run):
                measured.append(
                    Outcome(images=name, views=views, run=run, accuracy=scored["accuracy"], loss=scored["loss"])
                )
                print(measured[-1], flush=True)
    write(options.records, [*kept, *measured])
    print(table(measured))


def scores(
    model: StagedModel,
    images: ImageSet,
    store: FeatureStore,
    ways: Mapping[str, Augment | None],
    *,
    epochs: int,
    seed: int,
) -> Iterator[tuple[str, dict[str, float]]]:
    """What a head comes to on the images held out, in each way of training; what is read from the store is filed."""
    stored = [augment for augment in ways.values() if augment is not None and not augment.is_fresh]
    most = max(stored, key=lambda augment: len(augment.seeds))
    extract(model, images, store, augment=most, dtype="float32", device="cpu", workers=0, progress=False)
    for views, augment in ways.items():
        yield views, trained(model, images, store, augment, epochs=epochs, seed=seed)


def trained(
    model: StagedModel, images: ImageSet, store: FeatureStore, augment: Augment | None, *, epochs: int, seed: int
) -> dict[str, float]:
    """What a head comes to; all ways have the same first weights, and as many steps at the same rates."""
    learn = Learner(
        model, images, store, augment=augment, batch_size=BATCH_SIZE, seed=seed, device="cpu", workers=0, quiet=True
    )
    learn.fit(epochs, LEARNING_RATE)
    return learn.evaluate("valid")


def digits(count: int) -> ImageSet:
    """The first of them, as images that the network can halve five times."""
    found = load_digits()
    scaled = [
        Image.fromarray((pixels * 255 / 16).round().astype(np.uint8)).resize((DIGIT_SIDE, DIGIT_SIDE))
        for pixels in found.images[:count]
    ]
    arrays = np.stack([np.asarray(each.convert("RGB")) for each in scaled])
    return ImageSet.from_arrays(arrays, found.target[:count].tolist())


# ----------------------------------------------------------------------------------------------------- what came of it


def read(file: Path) -> list[Outcome]:
    """The records of a file, if there is one."""
    if not file.exists():
        return []
    with file.open(newline="", encoding="utf-8") as opened:
        return [
            Outcome(
                images=row["images"],
                views=row["views"],
                run=int(row["run"]),
                accuracy=float(row["accuracy"]),
                loss=float(row["loss"]),
            )
            for row in csv.DictReader(opened)
        ]


def write(file: Path, outcomes: Iterable[Outcome]) -> None:
    with file.open("w", newline="", encoding="utf-8") as opened:
        writer = csv.DictWriter(opened, list(Outcome.__annotations__), lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(each) for each in outcomes)


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95 % interval by Student's t."""
    spread = statistics.stdev(values) / math.sqrt(len(values))
    return statistics.fmean(values), float(stats.t.ppf(0.975, len(values) - 1)) * spread


def by_views(outcomes: Iterable[Outcome]) -> dict[str, list[Outcome]]:
    found: dict[str, list[Outcome]] = {}
    for each in sorted(outcomes, key=lambda each: each.run):
        found.setdefault(each.views, []).append(each)
    return found


def table(outcomes: Sequence[Outcome]) -> str:
    """Means over runs; gaps are to fresh views, run by run."""
    lines = [
        "| images | views of each training image | accuracy, % | loss | gap in accuracy | gap in loss |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for name in dict.fromkeys(each.images for each in outcomes):
        ways = by_views(each for each in outcomes if each.images == name)
        fresh = ways["fresh"]
        for views, runs in ways.items():
            cells = [
                _words(interval([100 * each.accuracy for each in runs]), ".1f"),
                _words(interval([each.loss for each in runs]), ".3f"),
            ]
            pairs = list(zip(runs, fresh, strict=True))
            if views == "fresh":
                cells += ["", ""]
            else:
                cells += [
                    _words(interval([100 * (each.accuracy - other.accuracy) for each, other in pairs]), "+.1f"),
                    _words(interval([each.loss - other.loss for each, other in pairs]), "+.3f"),
                ]
            told = {"none": "the evaluation view", "fresh": "a fresh one in each epoch"}.get(views, views)
            lines.append(f"| {name} | {told} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _words(of: tuple[float, float], form: str) -> str:
    mean, half = of
    return f"{mean:{form}} ± {half:{form.removeprefix('+')}}"


def draw(records: Path = RECORDS) -> None:
    """Puts the table into the page and the plot beside it."""
    outcomes = read(records)
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{BEGIN}\n\n{table(outcomes)}\n\n{END}{after}", encoding="utf-8")
    plot(outcomes).savefig(PLOT, dpi=110)


def plot(outcomes: Sequence[Outcome]) -> Plot:
    """Accuracy and loss by the number of stored views, and those of no and of fresh augmentation as bands."""
    names = list(dict.fromkeys(each.images for each in outcomes))
    figure = Plot(figsize=(9, 3.2 * len(names)), layout="constrained")
    for row, name in zip(figure.subplots(len(names), 2, squeeze=False), names, strict=True):
        ways = by_views(each for each in outcomes if each.images == name)
        counts = [views for views in ways if views.isdigit()]
        for axes, measure in zip(row, ("accuracy", "loss"), strict=True):
            found = {views: interval([getattr(each, measure) for each in runs]) for views, runs in ways.items()}
            for views, colour in (("none", "C7"), ("fresh", "C2")):
                mean, half = found[views]
                axes.axhline(mean, color=colour, label=f"{views} augmentation" if views == "fresh" else "none")
                axes.axhspan(mean - half, mean + half, color=colour, alpha=0.15, linewidth=0)
            means, halves = zip(*(found[views] for views in counts), strict=True)
            axes.errorbar([int(views) for views in counts], means, halves, marker="o", capsize=3, label="stored views")
            axes.set_xscale("log", base=2)
            axes.set_xticks([int(views) for views in counts], counts)
            axes.set(xlabel="stored views an image", ylabel=f"validation {measure}", title=name)
        row[1].legend()
    return figure


if __name__ == "__main__":
    main()
