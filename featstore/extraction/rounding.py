"""Rounding: how far scaled rows lie from the activations that they stand for, measured before any of them is filed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from featstore.digest import Json
from featstore.extraction.plan import Plan, PlannedSet
from featstore.files.scaled import ScaledRows
from featstore.images.render import Job, render
from featstore.models.trunk import Output, Trunk
from featstore.timing import timed
from featstore.words import counted

NUM_SAMPLED = 64
"""Images that it is measured on, at most."""


@dataclass(frozen=True)
class Rounding:
    """Of the rows of some images at one output.

    Attributes:
        error: the root of the sum of all squared differences from the float32 values, through that of these squared.
        images: how many.
    """

    error: float
    images: int

    def facts(self) -> Json:
        """As JSON."""
        return {"error": self.error, "images": self.images}

    def note(self, model: str, output: Output, dtype: str) -> str:
        """What is said of it."""
        return (
            f"{dtype} at {output.label} of {model}: relative error {self.error:.2g} against float32 "
            f"({counted(self.images, 'image')})"
        )


def sampled_roundings(
    planned: Plan, sets: Sequence[PlannedSet], trunk: Trunk, *, workers: int | None
) -> dict[Output, Rounding]:
    """Of each output of the trunk: on images that are to be computed, in the first view of `sets` that lacks rows.

    Empty where the rows aren't scaled, and where none of the sampled images can be read, which the job will say.

    Args:
        planned: what is computed.
        sets: those of the trunk's model.
        trunk: what computes them.
        workers: threads that read and decode.
    """
    if not sets[0].spec.storage_type.is_scaled:
        return {}
    squares = np.zeros((len(trunk.outputs), 2))
    num_images = 0
    with timed("rounding"):
        for images in _sampled(planned, sets, trunk.batch_size, workers):
            num_images += len(images)
            for place, values in enumerate(trunk(images)):
                squares[place] += _squares(values)
    if not num_images:
        return {}
    return {
        output: Rounding(math.sqrt(difference / whole) if whole else 0.0, num_images)
        for output, (difference, whole) in zip(trunk.outputs, squares.tolist(), strict=True)
    }


def _sampled(planned: Plan, sets: Sequence[PlannedSet], batch_size: int, workers: int | None) -> Iterator[Tensor]:
    """Views of images spread evenly over those to compute, in passes; without those that can't be rendered."""
    lacking = [(each.view, np.flatnonzero(each.is_missing & ~planned.digests.is_failed)) for each in sets]
    view, places = next((each for each in lacking if len(each[1])), lacking[0])
    places = places[np.linspace(0, len(places) - 1, min(NUM_SAMPLED, len(places))).round().astype(np.int64)]
    jobs = (Job(int(place), planned.digests.values[place].tobytes(), (view,)) for place in places)
    held: list[Tensor] = []
    with closing(render(planned.images, jobs, workers=workers, on_error="skip")) as rendered:
        for each in rendered:
            held += each.views or ()
            if len(held) == batch_size:
                yield torch.stack(held)
                held = []
    if held:
        yield torch.stack(held)


def _squares(values: Tensor) -> tuple[float, float]:
    """The sums of the squared differences of rounded values, and of the values squared, of rows that can be rounded."""
    differences, whole = 0.0, 0.0
    for row, rounded in zip(values, ScaledRows.of(values).values(), strict=True):  # one by one, as they become wider
        if rounded.isfinite().all():
            differences += float((rounded.double() - row).square().sum())
            whole += float(row.double().square().sum())
    return differences, whole
