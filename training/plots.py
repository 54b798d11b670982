"""Plots: what a person looks at while training, as figures that show themselves in a notebook and save themselves.

The only module that imports matplotlib. Figures are made without pyplot, so that no window system is chosen, no figure
is kept alive in a global list, and the caller's matplotlib settings are only read. `figure.savefig("views.png")` saves.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from io import BytesIO

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from featstore.images.image_set import ImageSet
from featstore.images.render import Job, render
from featstore.images.views import Augment, GivenPolicy, View
from training.outcomes import Order, Outcomes


class Plot(Figure):
    """A matplotlib figure that a notebook shows whether or not pyplot was ever imported."""

    def _repr_png_(self) -> bytes:
        buffer = BytesIO()
        self.savefig(buffer, format="png")
        return buffer.getvalue()


def views(
    images: ImageSet,
    view: View,
    augment: GivenPolicy | Augment,
    seeds: Sequence[int | None] | None = None,
    *,
    num_images: int = 4,
) -> Plot:
    """What a backbone sees: a row for each of the first `num_images` images, a column for each of `seeds`.

    The title is the policy with its parameters. The pixels are those that extraction and live training get, before
    normalisation. Of a learner: ``views(learn.images.train, learn.view, learn.augment)``.

    Args:
        images: the first of these are shown.
        view: size, geometry and the like.
        augment: a policy, or an augmentation with its seeds.
        seeds: None among them is the evaluation view. Default: that and three seeds, the first that `augment` has.
        num_images: at most so many rows.

    Raises:
        ImageError: naming the first image that can't be read or rendered.
    """
    given = augment if isinstance(augment, Augment) else Augment(augment, "fresh")
    if seeds is None:
        seeds = (None, *range(3)) if given.seeds == "fresh" else (None, *given.seeds[:3])
    shown = images.select(range(min(num_images, len(images))))
    if len(shown) == 0 or len(seeds) == 0:
        raise ValueError(f"There is nothing to show of {len(shown)} images and {len(seeds)} seeds; pass one at least.")
    columns = tuple(view.evaluation if seed is None else view.with_seed(given.policy, seed) for seed in seeds)
    jobs = [Job(index, digest.tobytes(), columns) for index, digest in enumerate(shown.digests().values)]
    figure = Plot(figsize=(2.2 * len(columns), 2.2 * len(shown) + 0.8), layout="constrained")
    figure.suptitle(given.policy.label, fontsize="medium", parse_math=False)
    grid = figure.subplots(len(shown), len(columns), squeeze=False)
    for axes, seed in zip(grid[0], seeds, strict=True):
        axes.set_title("evaluation view" if seed is None else f"seed {seed}", fontsize="small")
    for row, image_id, rendered in zip(grid, shown.ids, render(shown, jobs, workers=0), strict=True):
        assert rendered.views is not None  # render raises for an image that fails
        row[0].set_ylabel(_short(image_id), fontsize="small", parse_math=False)  # a "$" in a file name is a "$"
        for axes, pixels in zip(row, rendered.views, strict=True):
            axes.imshow(pixels.permute(1, 2, 0).numpy(), cmap="gray", vmin=0, vmax=255)  # (C, H, W) -> (H, W, C)
            axes.set(xticks=[], yticks=[])
    return figure


def learning_rates(
    lrs: Sequence[float], losses: Sequence[float], smoothed: Sequence[float], suggestion: float | None = None
) -> Plot:
    """The training loss against the learning rate on a logarithmic axis, every finite point of it.

    Args:
        lrs: the learning rate of each step.
        losses: the training loss of each step's batch; the title counts those that aren't finite.
        smoothed: the smoothed training loss after each step.
        suggestion: a learning rate to mark.
    """
    if not len(lrs) == len(losses) == len(smoothed) or len(lrs) == 0:
        raise ValueError(
            f"{len(lrs)} learning rates, {len(losses)} losses and {len(smoothed)} smoothed losses came; pass one of "
            "each for every step, and at least one step."
        )
    figure = Plot(layout="constrained")
    axes = figure.subplots()
    axes.set_xscale("log")
    axes.plot(lrs, losses, ".", alpha=0.4, label="each batch")
    axes.plot(lrs, smoothed, marker="." if len(lrs) == 1 else None, label="smoothed")
    if suggestion is not None:
        axes.axvline(suggestion, color="black", linestyle="--", label=f"suggestion {suggestion:.2g}")
    num_undrawn = sum(not math.isfinite(loss) for loss in losses)
    if num_undrawn:
        axes.set_title(f"{num_undrawn} of {len(losses)} losses are not finite and not drawn", fontsize="small")
    axes.set(xlabel="learning rate", ylabel="training loss")
    axes.legend()
    return figure


def history(records: Sequence[Mapping[str, object]]) -> Plot:
    """How a fit went: training and validation loss by epoch, and beside them the validation metrics if there are any.

    Args:
        records: one an epoch. `train_loss` and `valid_loss` are the losses, `epoch` is the position (counted from 1
            where it is missing), `seconds`, `images` and `lr` are not drawn, and every other number is a metric.
    """
    if len(records) == 0:
        raise ValueError("The history has no epochs, so there is nothing to draw; fit for at least one epoch.")
    epochs = [_number(record.get("epoch", position)) for position, record in enumerate(records, start=1)]
    metrics = _metric_names(records)
    figure = Plot(figsize=(9.6 if metrics else 4.8, 3.6), layout="constrained")
    panels = figure.subplots(1, 2 if metrics else 1, squeeze=False)[0]
    _draw_lines(panels[0], epochs, records, {"train_loss": "training", "valid_loss": "validation"})
    panels[0].set_ylabel("loss")
    if metrics:
        _draw_lines(panels[1], epochs, records, {name: name for name in metrics})
        panels[1].set_ylabel("validation metric")
    return figure


def confusion_matrix(outcomes: Outcomes) -> Plot:
    """How many images of each class (a row) were taken for each (a column); in numbers too, up to 20 classes."""
    counts, classes = outcomes.confusion(), [_short(name) for name in outcomes.classes]
    size = max(3.2, min(12.0, 1.6 + 0.45 * len(classes)))
    figure = Plot(figsize=(size + 0.8, size), layout="constrained")
    axes = figure.subplots()
    drawn = axes.imshow(counts, cmap="Blues", vmin=0)
    figure.colorbar(drawn, ax=axes, shrink=0.7, label="images")
    places = range(len(classes))
    axes.set_xticks(places, classes, rotation=90, parse_math=False)
    axes.set_yticks(places, classes, parse_math=False)
    axes.set(xlabel="predicted", ylabel="actual")
    if len(classes) <= _MOST_WRITTEN:
        for row, column in np.ndindex(counts.shape):
            is_dark = counts[row, column] > counts.max() / 2
            axes.text(
                column, row, f"{counts[row, column]}", ha="center", va="center", color="white" if is_dark else "black"
            )
    return figure


def samples(
    outcomes: Outcomes, view: View, *, by: Order = "loss", is_right: bool | None = None, num_images: int = 9
) -> Plot:
    """Images with what was said of them: those with the largest loss, or the least or most sure ones.

    The pixels are those that the model gets, before normalisation. Of a learner:
    ``samples(learn.outcomes(), learn.view)``.

    Args:
        outcomes: of the images.
        view: what is shown of each.
        by: ``loss``, ``uncertain`` or ``sure``, as in `Outcomes.places`.
        is_right: only of those that were predicted rightly (True) or wrongly (False).
        num_images: at most so many.

    Raises:
        ImageError: naming the first image that can't be read or rendered.
    """
    places = outcomes.places(by, is_right=is_right)[:num_images]
    if not len(places):
        raise ValueError("There is no such image to show: none was predicted so, or num_images is 0.")
    shown = outcomes.images.select(places)
    jobs = [Job(at, digest.tobytes(), (view.evaluation,)) for at, digest in enumerate(shown.digests().values)]
    num_columns = math.ceil(math.sqrt(len(shown)))
    num_rows = math.ceil(len(shown) / num_columns)
    figure = Plot(figsize=(2.4 * num_columns, 2.7 * num_rows), layout="constrained")
    grid = figure.subplots(num_rows, num_columns, squeeze=False).ravel()
    for axes in grid:
        axes.set_axis_off()
    for axes, place, rendered in zip(grid, places.tolist(), render(shown, jobs, workers=0), strict=False):
        assert rendered.views is not None  # render raises for an image that fails
        axes.imshow(rendered.views[0].permute(1, 2, 0).numpy(), cmap="gray", vmin=0, vmax=255)
        said = f"{_short(outcomes.images.ids[place])}\n{outcomes.words(place)}"
        axes.set_title(said, fontsize="x-small", parse_math=False)
    return figure


def _short(image_id: str) -> str:
    """The end of an id, as long as a panel is high; what is no valid text in it becomes a question mark."""
    text = image_id.encode("utf-8", "replace").decode("utf-8")
    return text if len(text) <= 28 else f"…{text[-27:]}"


_MOST_WRITTEN = 20

_NOT_METRICS = frozenset({"epoch", "train_loss", "valid_loss", "seconds", "images", "lr"})


def _metric_names(records: Sequence[Mapping[str, object]]) -> list[str]:
    names = {name: None for record in records for name, value in record.items() if isinstance(value, int | float)}
    return [name for name in names if name not in _NOT_METRICS]


def _draw_lines(
    axes: Axes, epochs: Sequence[float], records: Sequence[Mapping[str, object]], labels: Mapping[str, str]
) -> None:
    """A line for each key of `labels` that a record holds; an epoch without the key leaves a gap."""
    for name, label in labels.items():
        values = [record.get(name) for record in records]
        if any(value is not None for value in values):
            axes.plot(epochs, [_number(value) for value in values], marker=".", label=label)
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend()


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else math.nan
