"""Sections: what a report shows of runs, of the epochs of a fit, of what a model said, and of features."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from featstore.digest import Json
from featstore.images.image_set import ImageSet
from featstore.pages.captions import groups_of
from featstore.pages.figures import confusion, curves, point_map, reliability
from featstore.pages.page import Block, Drawing, Gallery, Section, Table
from featstore.pages.projection import Projection
from featstore.words import counted
from training.scores.suspects import label_suspects

if TYPE_CHECKING:
    from training.loop.history import Record
    from training.loop.lr_find import LearningRates
    from training.scores.outcomes import Outcomes

MOST_CURVES = 12
"""Runs whose curves can be told apart."""
NUM_SHOWN = 24
"""Images of a gallery."""
NEARLY_THE_SAME = 0.97
"""Cosine from which on images are called so; what `near_duplicates` takes unless told otherwise."""
MOST_IN_MATRIX = 200
"""Classes of a confusion matrix; of more the pairs that were confused most are left."""
_NOT_SCORES = ("epoch", "lr", "seconds", "train_loss", "valid_loss")


def runs_section(rows: Sequence[Mapping[str, Json]], words: str) -> Section:
    """A table of runs, in columns of all that any of them has."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    cells = [[_cell(row.get(name)) for name in columns] for row in rows]
    return Section(title="Runs", blocks=[words, Table(columns=columns, rows=cells)])


def curves_section(histories: Mapping[str, Sequence[Record]]) -> Section | None:
    """Losses and scores by epoch; of several runs the validation loss and the first score, of at most `MOST_CURVES`.

    None where no run has an epoch on record.
    """
    known = {name: records for name, records in histories.items() if records}
    if not known:
        return None
    shown = dict(list(known.items())[:MOST_CURVES])
    blocks: list[Block] = []
    if len(shown) < len(known):
        blocks.append(f"Of {len(known):,} runs the first {len(shown)}, in the order of the table.")
    if len(shown) == 1:
        ((_, records),) = shown.items()
        losses = {name.replace("_", " "): _curve(records, name) for name in ("train_loss", "valid_loss")}
        scores = {name: _curve(records, name) for name in _score_names(records)}
        kind = "score"
    else:
        losses = {name: _curve(records, _loss_name(records)) for name, records in shown.items()}
        names = [name for records in shown.values() for name in _score_names(records)]
        kind = names[0] if names else ""
        scores = {name: _curve(records, kind) for name, records in shown.items()}
        blocks.append("Losses are those of validation images; of a run without any, of training images.")
    drawn = [curves(_with_values(losses), x="epoch", y="loss")]
    if _with_values(scores):
        drawn.append(curves(_with_values(scores), x="epoch", y=kind))
    return Section(title="Learning curves", blocks=[*blocks, *(Drawing(figure=each) for each in drawn)])


def rates_section(found: LearningRates) -> Section | None:
    """The finder's loss against the learning rate, what it suggests marked; None without a curve."""
    if not found.lrs:
        return None
    lines = {"each batch": (found.lrs, found.losses), "smoothed": (found.lrs, found.smoothed)}
    marks = {f"suggestion {found.rate:g}": found.suggestion} if math.isfinite(found.suggestion) else {}
    figure = curves(lines, x="learning rate", y="training loss", is_log=True, marks=marks)
    # What comes before the loss rises is what is looked at.
    low, high = np.nanmin(found.smoothed), np.nanmax(found.smoothed[: max(2, len(found.smoothed) // 2)])
    figure.update_yaxes(range=[low - 0.1 * (high - low), high + 0.5 * (high - low)])
    words = [found.in_words()] if math.isfinite(found.suggestion) else []
    return Section(title="Learning-rate finder", blocks=[*words, Drawing(figure=figure)])


def scores_section(outcomes: Outcomes, split: str) -> Section | None:
    """What was confused, and scores by class; None of a task that has neither."""
    task = outcomes.images.task
    if task == "regression":
        return None
    blocks: list[Block] = []
    if task == "single":
        right = int(outcomes.is_right.sum())
        blocks.append(f"{right:,} of {len(outcomes):,} {split} images are taken for their class.")
        if len(outcomes.classes) <= MOST_IN_MATRIX:
            blocks.append(Drawing(figure=confusion(outcomes.confusion(), outcomes.classes)))
        pairs = outcomes.most_confused()[:NUM_SHOWN]
        if pairs:
            blocks.append(Table(columns=("class", "taken for", "images"), rows=pairs))
    by_class = outcomes.by_class()
    columns = ("class", "images", "precision", "recall", "f1")
    rows = [
        (name, int(each["support"]), each["precision"], each["recall"], each["f1"]) for name, each in by_class.items()
    ]
    blocks.append(Table(columns=columns, rows=rows))
    return Section(title="Classes", blocks=blocks)


def calibration_section(outcomes: Outcomes) -> Section | None:
    """How often the model is right where it is so sure; None but for images of one class each."""
    if outcomes.images.task != "single":
        return None
    words = (
        f"Expected calibration error {outcomes.calibration_error():.3f}: how far, on the mean, the share that is right "
        "lies from the probability that was said. Below the dotted line the model is surer than it is right."
    )
    figure = reliability(outcomes.probabilities.max(1), outcomes.is_right)
    return Section(title="Calibration", blocks=[words, Drawing(figure=figure)])


def gallery_sections(outcomes: Outcomes, places: Mapping[str, int]) -> Iterator[Section]:
    """The images with the largest losses, and those of which the model is least sure.

    Args:
        outcomes: of some images.
        places: id -> the image's place on the page.
    """
    orders = [("loss", "Largest losses", "What the model is most wrong about: a hard image, or a wrong label.")]
    if outcomes.images.task == "single":
        orders.append(("uncertain", "Least sure", "The least probability of what was predicted."))
    for order, title, words in orders:
        chosen = outcomes.places(order)[:NUM_SHOWN].tolist()  # type: ignore[arg-type]
        shown = [(places[outcomes.images.ids[each]], outcomes.words(each)) for each in chosen]
        yield Section(title=title, blocks=[f"{words} A click shows the nearest images.", Gallery(pictures=shown)])


def suspects_section(outcomes: Outcomes, places: Mapping[str, int]) -> Section | None:
    """The images whose label is likelier wrong than the model; None of tasks without one class an image.

    Args:
        outcomes: of images that had no part in the fit.
        places: id -> the image's place on the page.
    """
    if outcomes.images.task != "single" or len(outcomes.classes) < 2:
        return None
    found = label_suspects(outcomes)
    shown = [
        (places[row["id"]], f"{row['given']}, seems {row['proposed']}, {row['margin']:.2f}")  # type: ignore[index]
        for row in found.table[:NUM_SHOWN]
    ]
    words = (
        f"{found.in_words()}, by confident learning: what the model says of images that it wasn't trained on, with the "
        "margin by which the label is likelier than any other class."
    )
    return Section(title="Suspected labels", blocks=[words, *([Gallery(pictures=shown)] if shown else [])])


def duplicates_section(pairs: Sequence[tuple[int, int, float]], most: int | None, images: ImageSet) -> Section | None:
    """Pairs of nearly equal images in different splits; None where images aren't dealt.

    Args:
        pairs: (place, place, similarity), the most alike first.
        most: an image is in at most so many with images of later splits, and may have more; None: these are all.
        images: of the page.
    """
    if len(set(images.splits[images.splits != ""])) < 2:
        return None
    shown = [
        (place, f"pair {number}, {similarity:.3f} · {images.splits[place]}")
        for number, (one, other, similarity) in enumerate(pairs[: NUM_SHOWN // 2], start=1)
        for place in (one, other)
    ]
    words = (
        f"{'At least ' * (most is not None)}{counted(len(pairs), 'pair')} of images in different splits whose features "
        f"are nearly the same (cosine {NEARLY_THE_SAME:g} or more). Where they show the same thing, scores are too "
        "good. How alike photographs of different things are depends on the backbone."
    )
    if most is not None:
        words += f" An image is paired with at most {most:,} here, and may have more: near_duplicates lists them."
    title = "Near-duplicates across splits"
    return Section(title=title, blocks=[words, *([Gallery(pictures=shown)] if shown else [])])


def map_section(
    projection: Projection, places: NDArray[np.int64], images: ImageSet, num_all: int, where: str
) -> Section:
    """A map of images, coloured by class, by the first number, or, of several labels, by split.

    Args:
        projection: of the images that are shown.
        places: ``(N,)``, their places on the page.
        images: they themselves.
        num_all: of which they are a sample.
        where: the features' origin, in words.
    """
    sample = f"A sample of {len(images):,} of {num_all:,} images" if len(images) < num_all else f"{num_all:,} images"
    words = f"{sample}, by {where}. {projection.words} Hovering shows an image, a click its neighbours."
    figure = point_map(projection.points, places, groups_of(images))
    return Section(title=f"Map ({projection.method})", blocks=[words, Drawing(figure=figure, is_map=True)])


def _loss_name(records: Sequence[Record]) -> str:
    return "valid_loss" if "valid_loss" in records[0] else "train_loss"


def _score_names(records: Sequence[Record]) -> list[str]:
    return [name for name in records[0] if name not in _NOT_SCORES]


def _curve(records: Sequence[Record], name: str) -> tuple[list[float], list[float]]:
    return [each["epoch"] for each in records], [each.get(name, math.nan) for each in records]


def _with_values(lines: Mapping[str, tuple[list[float], list[float]]]) -> dict[str, tuple[list[float], list[float]]]:
    return {name: line for name, line in lines.items() if any(map(math.isfinite, line[1]))}


def _cell(value: Any) -> str | int | float | None:
    if isinstance(value, bool) or not isinstance(value, str | int | float | None):
        return str(value)
    return value
