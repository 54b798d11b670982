"""Captions: what an image is labelled as, in words, and of which group it is on a map."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from featstore.images.image_set import ImageSet


def label_of(images: ImageSet, place: int) -> str:
    """What an image is labelled as, and its split: ``cat · valid``."""
    return " · ".join(filter(None, [_label(images, place), str(images.splits[place])]))


def groups_of(images: ImageSet) -> list[str] | NDArray[np.float64]:
    """What each image's colour on a map stands for: its class, the first of its numbers, or, of several labels, split.

    Unlabelled images have their splits, too.
    """
    if images.targets is None or images.task == "multi":
        return [str(split) or "not dealt" for split in images.splits]
    if images.task == "regression":
        return images.targets[:, 0].astype(np.float64)
    return [_label(images, place) for place in range(len(images))]


def _label(images: ImageSet, place: int) -> str:
    if images.targets is None:
        return ""
    target = images.targets[place]
    if images.task == "single":
        return images.classes[target] if target >= 0 else "unlabelled"
    if images.task == "multi":
        return ", ".join(images.classes[each] for each in np.flatnonzero(target)) or "no label"
    return ", ".join(f"{name} {value:.4g}" for name, value in zip(images.classes, target, strict=True))
