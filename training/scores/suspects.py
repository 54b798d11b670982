"""Suspects: images whose label is likelier wrong than the model, by what it said of them while they were held out."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from featstore.html import titled_table
from featstore.images.image_set import ImageSet
from featstore.words import counted
from training.scores.outcomes import Outcomes


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Suspects:
    """The images suspected of a wrong label, the likeliest first; made by `label_suspects`.

    Attributes:
        images: these images, in this order.
        classes: the class table.
        given: ``(M,)`` the class that each is labelled as.
        proposed: ``(M,)`` the class that it seems to be of.
        margins: ``(M,)`` the probability of the given class less that of the likeliest other one: -1 to 1, rising.
        places: ``(M,)`` of each, which of the outcomes is its own.
        num_images: how many were looked at.
    """

    images: ImageSet
    classes: tuple[str, ...]
    given: NDArray[np.int64]
    proposed: NDArray[np.int64]
    margins: NDArray[np.float64]
    places: NDArray[np.int64]
    num_images: int

    def __len__(self) -> int:
        return len(self.margins)

    @property
    def ids(self) -> tuple[str, ...]:
        """The images' ids."""
        return self.images.ids

    @property
    def table(self) -> list[dict[str, str | float]]:
        """A row an image: id, given, proposed, margin."""
        columns = zip(self.ids, self.given.tolist(), self.proposed.tolist(), self.margins.tolist(), strict=True)
        return [
            {"id": name, "given": self.classes[given], "proposed": self.classes[proposed], "margin": margin}
            for name, given, proposed, margin in columns
        ]

    def in_words(self) -> str:
        """How many of how many."""
        return f"{counted(len(self), 'suspected label')} among {counted(self.num_images, 'image')}"

    def __repr__(self) -> str:
        return f"Suspects({self.in_words()})"

    def _repr_html_(self) -> str:
        return titled_table(self.in_words(), self.table)


def label_suspects(outcomes: Outcomes) -> Suspects:
    """The images whose label is suspected: confident learning (Northcutt, Jiang and Chuang, arXiv:1911.00068).

    A class is confidently that of an image where its probability reaches what it is on average for the images labelled
    so. An image is suspected where the likeliest of its confident classes isn't its label. They are ordered by the
    margin of their label, the lowest first.

    Args:
        outcomes: of images that had no part in the fit that scored them, such as `CrossValidation.outcomes()` or
            `learn.outcomes("valid")`. What a model says of images that it was trained on repeats their labels.

    Raises:
        ValueError: for images that haven't one class each, and for fewer than two classes.
    """
    if outcomes.images.task != "single" or outcomes.probabilities.shape[1] < 2:
        raise ValueError(
            f"The outcomes are of the task {outcomes.images.task} with {counted(len(outcomes.classes), 'class')}. "
            "Expected one class an image, of two or more. Look at places('loss') of other tasks."
        )
    said, given = outcomes.probabilities, outcomes.targets.astype(np.int64)
    every = np.arange(len(given))
    own = said[every, given]
    counts = np.bincount(given, minlength=said.shape[1])
    sums = np.bincount(given, own, minlength=said.shape[1])
    # A class that no image is labelled as has no threshold, and is proposed by none.
    thresholds = np.where(counts > 0, sums / np.maximum(counts, 1), np.inf)
    confident = np.where(said >= thresholds, said, -1.0)  # (N, K)
    proposed = confident.argmax(1)
    is_suspected = (confident.max(1) >= 0) & (proposed != given)
    others = said.copy()
    others[every, given] = -np.inf
    margins = own - others.max(1)
    places = np.flatnonzero(is_suspected)
    places = places[np.argsort(margins[places], kind="stable")]
    return Suspects(
        images=outcomes.images.select(places),
        classes=outcomes.classes,
        given=given[places],
        proposed=proposed[places],
        margins=margins[places],
        places=places,
        num_images=len(given),
    )
