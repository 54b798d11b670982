"""Plots: what a person looks at while training, as figures that show themselves in a notebook and save themselves.

The only module that imports matplotlib. Figures are made without pyplot, so that no window system is chosen, no figure
is kept alive in a global list, and the caller's matplotlib settings are only read. A plot of one panel takes the axes
to draw on, and returns them; by itself it is a `Panel`. One of several panels is a `Plot`. `savefig("views.png")` saves
either.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import Any

import numpy as np
from matplotlib.axes import Axes as Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from featstore.images.image_set import ImageSet
from featstore.images.render import Job, render
from featstore.images.views import Augment, GivenPolicy, View


class Plot(Figure):
    """A matplotlib figure that a notebook shows whether or not pyplot was ever imported."""

    def _repr_png_(self) -> bytes:
        buffer = BytesIO()
        self.savefig(buffer, format="png")
        return buffer.getvalue()


class Panel(Axes):
    """Axes of a `Plot` of their own, which is shown and saved in their name."""

    def _repr_png_(self) -> bytes:
        return self._plot._repr_png_()

    def savefig(self, *args: Any, **options: Any) -> None:
        """Saves the figure, as matplotlib's method of that name does."""
        self._plot.savefig(*args, **options)

    @property
    def _plot(self) -> Plot:
        assert isinstance(self.figure, Plot)
        return self.figure


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
    lrs: Sequence[float],
    losses: Sequence[float],
    smoothed: Sequence[float],
    suggestion: float | None = None,
    axes: Axes | None = None,
) -> Axes:
    """The training loss against the learning rate on a logarithmic axis, every finite point of it.

    Args:
        lrs: the learning rate of each step.
        losses: the training loss of each step's batch; the title counts those that aren't finite.
        smoothed: the smoothed training loss after each step.
        suggestion: a learning rate to mark.
        axes: to draw on; default: new ones.
    """
    if not len(lrs) == len(losses) == len(smoothed) or len(lrs) == 0:
        raise ValueError(
            f"{len(lrs)} learning rates, {len(losses)} losses and {len(smoothed)} smoothed losses came; pass one of "
            "each for every step, and at least one step."
        )
    axes = axes or _panel()
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
    return axes


def history(records: Sequence[Mapping[str, object]]) -> Plot:
    """How a fit went: training and validation loss by epoch, and beside them the validation metrics if there are any.

    Args:
        records: one an epoch. `train_loss` and `valid_loss` are the losses, `epoch` is the position (counted from 1
            where it is missing), `seconds`, `images` and `lr` are not drawn, and every other number is a metric.
    """
    if len(records) == 0:
        raise ValueError("The history has no epochs, so there is nothing to draw; fit for at least one epoch.")
    has_metrics = bool(_metric_names(records))
    figure = Plot(figsize=(9.6 if has_metrics else 4.8, 3.6), layout="constrained")
    panels = figure.subplots(1, 2 if has_metrics else 1, squeeze=False)[0]
    losses(records, panels[0])
    if has_metrics:
        metrics(records, panels[1])
    return figure


def losses(records: Sequence[Mapping[str, object]], axes: Axes | None = None) -> Axes:
    """Training and validation loss by epoch, of such records as `history` takes."""
    axes = axes or _panel()
    _draw_lines(axes, records, {"train_loss": "training", "valid_loss": "validation"})
    axes.set_ylabel("loss")
    return axes


def metrics(records: Sequence[Mapping[str, object]], axes: Axes | None = None) -> Axes:
    """The validation metrics by epoch, of such records as `history` takes."""
    names = _metric_names(records)
    if not names:
        raise ValueError("No epoch has a metric, so there is nothing to draw; fit images that have a split valid.")
    axes = axes or _panel()
    _draw_lines(axes, records, {name: name for name in names})
    axes.set_ylabel("validation metric")
    return axes


def step_losses(losses: Sequence[float], axes: Axes | None = None) -> Axes:
    """The training loss of each step, from the first to the last."""
    axes = axes or _panel()
    _draw_steps(axes, losses)
    axes.set_ylabel("training loss")
    return axes


def step_rates(lrs: Sequence[float], momenta: Sequence[float], axes: Axes | None = None) -> Axes:
    """The learning rate of each step, and its momentum on the right, where the optimizer has one."""
    axes = axes or _panel()
    _draw_steps(axes, lrs)
    axes.set_ylabel("learning rate")
    if any(momentum > 0 for momentum in momenta):
        right = axes.twinx()
        _draw_steps(right, momenta, color="C1", linestyle="--")
        right.set_ylabel("momentum", color="C1")
    return axes


def learning_curve(columns: Mapping[str, Sequence[float]], label: str, axes: Axes | None = None) -> Axes:
    """Accuracy by number of training images, and its interval where there is one; a further one is drawn beside it."""
    axes = axes or _panel(figsize=(5.2, 3.6))
    (line,) = axes.plot(columns["images"], columns["accuracy"], marker="o", label=label)
    axes.fill_between(columns["images"], columns["from"], columns["to"], color=line.get_color(), alpha=0.2, linewidth=0)
    axes.set_xscale("log")
    axes.set(xlabel="images to train on", ylabel="accuracy")
    axes.legend(fontsize="small")
    return axes


def most_confused(pairs: Sequence[tuple[str, str, int]], axes: Axes | None = None, *, num_pairs: int = 20) -> Axes:
    """A bar for each (class, what it was taken for, how often), the first on top; the title counts those not drawn."""
    shown = pairs[:num_pairs]
    if not shown:
        raise ValueError("No class was taken for another so often, or num_pairs is 0: there is nothing to draw.")
    axes = axes or _panel(figsize=(6.4, 1.2 + 0.26 * len(shown)))
    places = range(len(shown))
    axes.barh(places, [count for *_, count in shown])
    axes.set_yticks(places, [f"{_short(actual)} as {_short(taken)}" for actual, taken, _ in shown], parse_math=False)
    axes.invert_yaxis()
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("images")
    if len(shown) < len(pairs):
        axes.set_title(f"{len(shown)} of {len(pairs)} pairs", fontsize="small")
    return axes


def confusion_matrix(counts: NDArray[np.int64], classes: Sequence[str], axes: Axes | None = None) -> Axes:
    """How many images of each class (a row) were taken for each (a column); in numbers too, up to 20 classes."""
    names, size = [_short(name) for name in classes], max(3.2, min(12.0, 1.6 + 0.45 * len(classes)))
    axes = axes or _panel(figsize=(size + 0.8, size))
    drawn = axes.imshow(counts, cmap="Blues", vmin=0)
    assert axes.figure is not None
    axes.figure.colorbar(drawn, ax=axes, shrink=0.7, label="images")
    places = range(len(classes))
    axes.set_xticks(places, names, rotation=90, parse_math=False)
    axes.set_yticks(places, names, parse_math=False)
    axes.set(xlabel="predicted", ylabel="actual")
    if len(classes) <= _MOST_WRITTEN:
        for row, column in np.ndindex(counts.shape):
            is_dark = counts[row, column] > counts.max() / 2
            axes.text(
                column, row, f"{counts[row, column]}", ha="center", va="center", color="white" if is_dark else "black"
            )
    return axes


def reliability(rows: Sequence[Mapping[str, float]], axes: Axes | None = None, *, error: float | None = None) -> Axes:
    """The share that is right against the probability it was said with, with its 95 % interval, beside the diagonal.

    Args:
        rows: as `Outcomes.reliability` gives them.
        axes: to draw on; default: new ones.
        error: the calibration error, for the title.
    """
    if not rows:
        raise ValueError("Nothing was predicted, so there is nothing to draw. Give outcomes of at least one image.")
    axes = axes or _panel(figsize=(4.8, 4.8))
    axes.plot([0, 1], [0, 1], color="black", linestyle="--", linewidth=1, label="as sure as right")
    shares = [row["share"] for row in rows]
    ends = [
        [max(0.0, row["share"] - row["share_from"]) for row in rows],
        [max(0.0, row["share_to"] - row["share"]) for row in rows],
    ]
    said = [row["probability"] for row in rows]
    axes.errorbar(said, shares, yerr=ends, marker="o", capsize=3, label="images, 95 % interval")
    axes.set(xlabel="probability of what was predicted", ylabel="share that is right", xlim=(0, 1), ylim=(0, 1))
    if error is not None:
        axes.set_title(f"calibration error {error:.3f}", fontsize="small")
    axes.legend()
    return axes


def accuracy_against_cost(
    names: Sequence[str],
    values: Sequence[float],
    intervals: Sequence[tuple[float, float] | None],
    seconds: Sequence[float | None],
    num_bytes: Sequence[int],
    label: str,
    axes: Axes | None = None,
) -> Axes:
    """What each backbone came to against the milliseconds it takes for an image, as large as its bytes in the store.

    Backbones without a time are left out, and counted in the title; where none has one, it is against the bytes.
    """
    if not names:
        raise ValueError("Nothing was compared, so there is nothing to draw.")
    axes = axes or _panel(figsize=(6.4, 4.4))
    is_timed = any(each is not None for each in seconds)
    most = max(num_bytes)
    for place, name in enumerate(names):
        cost = seconds[place] if is_timed else num_bytes[place]
        if cost is None:
            continue
        x, y, interval = cost * 1000 if is_timed else cost, values[place], intervals[place]
        if interval is not None:
            axes.errorbar(x, y, [[y - interval[0]], [interval[1] - y]], color="gray", linewidth=1, capsize=2, zorder=1)
        axes.scatter(x, y, s=30 + 270 * num_bytes[place] / most, alpha=0.7, zorder=2)
        axes.annotate(_short(name), (x, y), (6, 6), textcoords="offset points", fontsize="small", parse_math=False)
    num_undrawn = sum(each is None for each in seconds) if is_timed else 0
    if num_undrawn:
        axes.set_title(f"{num_undrawn} of {len(names)} were reused, and have no time", fontsize="small")
    axes.set_xscale("log")
    axes.set(xlabel="milliseconds an image" if is_timed else "bytes an image", ylabel=label)
    return axes


def samples(images: ImageSet, view: View, titles: Sequence[str]) -> Plot:
    """All `images` in `view`, before normalisation, and above each its id and its title.

    Raises:
        ImageError: naming the first image that can't be read or rendered.
    """
    if not len(images):
        raise ValueError("There is no such image to show: none was predicted so, or num_images is 0.")
    jobs = [Job(at, digest.tobytes(), (view.evaluation,)) for at, digest in enumerate(images.digests().values)]
    num_columns = math.ceil(math.sqrt(len(images)))
    num_rows = math.ceil(len(images) / num_columns)
    figure = Plot(figsize=(2.4 * num_columns, 2.7 * num_rows), layout="constrained")
    grid = figure.subplots(num_rows, num_columns, squeeze=False).ravel()
    for axes in grid:
        axes.set_axis_off()
    shown = zip(images.ids, titles, render(images, jobs, workers=0), strict=True)
    for axes, (image_id, title, rendered) in zip(grid, shown, strict=False):
        assert rendered.views is not None  # render raises for an image that fails
        axes.imshow(rendered.views[0].permute(1, 2, 0).numpy(), cmap="gray", vmin=0, vmax=255)
        axes.set_title(f"{_short(image_id)}\n{title}", fontsize="x-small", parse_math=False)
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


def _panel(**options: Any) -> Axes:
    return Plot(layout="constrained", **options).add_subplot(axes_class=Panel)


def _draw_steps(axes: Axes, values: Sequence[float], **options: Any) -> None:
    if not values:
        raise ValueError("The history has no steps, so there is nothing to draw; fit for at least one epoch.")
    axes.plot(range(1, len(values) + 1), values, marker="." if len(values) == 1 else None, **options)
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _draw_lines(axes: Axes, records: Sequence[Mapping[str, object]], labels: Mapping[str, str]) -> None:
    """A line for each key of `labels` that a record holds; an epoch without the key leaves a gap."""
    epochs = [_number(record.get("epoch", position)) for position, record in enumerate(records, start=1)]
    for name, label in labels.items():
        values = [record.get(name) for record in records]
        if any(value is not None for value in values):
            axes.plot(epochs, [_number(value) for value in values], marker=".", label=label)
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend()


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else math.nan
