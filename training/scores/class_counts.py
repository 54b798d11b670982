"""Class counts: how many images each class is trained on, and a word where one is rare beside another."""

from __future__ import annotations

import numpy as np

from featstore.images.image_set import ImageSet

IMBALANCE = 10
"""From so many times as many images as the rarest class has, the commonest is worth a sentence."""


def imbalance_note(training: ImageSet) -> str | None:
    """The commonest and the rarest class of labelled images to train on, and what helps; None where they are close.

    Classes without an image don't count, as no weight helps them; nor do several labels an image, or numbers.
    """
    if training.task != "single" or training.targets is None:
        return None
    counts = np.bincount(training.targets.astype(np.int64), minlength=len(training.classes))
    most, least = counts.argmax(), np.where(counts > 0, counts, len(training) + 1).argmin()
    if counts[most] < IMBALANCE * counts[least]:
        return None
    return (
        f"of the images to train on {counts[most]:,} are of the class {training.classes[most]} and {counts[least]:,} "
        f"of {training.classes[least]}, which counts for little beside it; each counts alike with --class-weights "
        'balanced (in Python: class_weights="balanced")'
    )
