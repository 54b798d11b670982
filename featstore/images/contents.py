"""Contents: what the digests of an image set tell of it, beside one another and beside what was known before."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from featstore.images.digests import Digests, KnownDigest, KnownDigests
from featstore.images.image_set import ImageSet
from featstore.images.labels import SPLITS


def split_overlap(images: ImageSet, digests: Digests) -> list[tuple[str, str]]:
    """Byte-identical images in different splits, as pairs of ids: one seen earlier (train, then valid), one held out.

    Each held-out image is named once, beside the first image of the earliest split that has its content.
    """
    if len(images) != len(digests):
        raise ValueError(
            f"there are {len(digests):,} digests for {len(images):,} images. "
            "Expected the digests of these images. Pass images.digests()."
        )
    pairs = []
    for group in digests.duplicates():
        dealt = [index for index in group if images.splits[index] != ""]
        first = min(dealt, key=lambda index: SPLITS.index(images.splits[index]), default=None)
        if first is not None:
            pairs += [(images.ids[first], images.ids[i]) for i in dealt if images.splits[i] != images.splits[first]]
    return pairs


def overlap_note(images: ImageSet, digests: Digests) -> str | None:
    """A sentence that counts and names byte-identical images in different splits; None if there are none."""
    pairs = split_overlap(images, digests)
    if not pairs:
        return None
    named = ", ".join(f"{seen} = {held_out}" for seen, held_out in pairs[:3]) + ", ..." * (len(pairs) > 3)
    return (
        f"{len(pairs):,} held-out images are byte for byte the same as images in another split ({named}); "
        "scores on them say nothing about new images"
    )


def is_changed(images: ImageSet, digests: Digests, known: Mapping[str, KnownDigest]) -> NDArray[np.bool_]:
    """`(N,)`: images whose ids are `known` with another content than they have now."""
    before = KnownDigests.of(known).find(images.ids)
    is_other: NDArray[np.bool_] = (before.values != digests.values).any(axis=1)
    return before.is_known & is_other & ~digests.is_failed
