"""Contents: what the digests of an image set tell of it, beside one another and beside what was known before."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from featstore.images.digests import Digests, KnownDigest, KnownDigests
from featstore.images.image_set import ImageSet
from featstore.images.names import SPLITS
from featstore.words import counted


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


def repeats_note(images: ImageSet, digests: Digests) -> str | None:
    """A sentence that counts and names byte-identical images, which may be placeholders; None if there are none."""
    return _repeats_note(images, digests.duplicates(), "byte for byte")


def looks_note(images: ImageSet, looks: NDArray[np.uint64]) -> str | None:
    """The same of files that differ and whose pixels don't: a tile saved as PNG and as GIF.

    Args:
        images: whose they are.
        looks: ``(N,)``, a hash of what was rendered of each image; 0 where nothing was.
    """
    groups: dict[int, list[int]] = {}
    _, first, counts = np.unique(looks, return_index=True, return_counts=True)
    repeated = set(looks[first[counts > 1]].tolist()) - {0}
    for index in np.flatnonzero(np.isin(looks, np.array(sorted(repeated), np.uint64))).tolist():
        groups.setdefault(int(looks[index]), []).append(index)
    return _repeats_note(images, [tuple(group) for group in groups.values()], "pixel for pixel")


def _repeats_note(images: ImageSet, groups: Sequence[tuple[int, ...]], how: str) -> str | None:
    if not groups:
        return None
    num_repeats = sum(len(group) for group in groups) - len(groups)
    across = [group for group in groups if _num_classes(images, group) > 1]
    named = sorted(groups, key=len, reverse=True)[:3]
    words = ", ".join(f"{images.ids[group[0]]} {len(group):,} times" for group in named) + ", ..." * (len(groups) > 3)
    in_classes = f", {len(across):,} of them under several classes ({images.ids[across[0][0]]})" if across else ""
    return (
        f"{counted(num_repeats, 'image')} {'repeats' if num_repeats == 1 else 'repeat'} another {how}: "
        f"{counted(len(groups), 'content')} ({words}){in_classes}; copies, or placeholders for missing images?"
    )


def lone_formats_note(images: ImageSet) -> str | None:
    """A sentence that names images which alone have their format in a folder of several of another; None without."""
    formats: dict[str, Counter[str]] = {}
    for image in images.ids:
        folder, _, name = image.rpartition("/")
        formats.setdefault(folder, Counter())[_format(name)] += 1
    lone_in = {
        folder: {each for each, count in counts.items() if count == 1}
        for folder, counts in formats.items()
        if max(counts.values()) >= _SEVERAL and min(counts.values()) == 1
    }
    if not lone_in:
        return None
    lone = [
        image for image in images.ids if _format(image.rpartition("/")[2]) in lone_in.get(image.rpartition("/")[0], ())
    ]
    named = ", ".join(lone[:3]) + ", ..." * (len(lone) > 3)
    return (
        f"{counted(len(lone), 'image')} {'has' if len(lone) == 1 else 'have'} another format than all others in the "
        f"folder ({named}): a placeholder?"
    )


_SEVERAL = 3
"""Images of one format, beside which a single one of another is worth a look."""


def _format(name: str) -> str:
    suffix = name.rpartition(".")[2].lower()
    return (
        {"jpeg": "jpg", "jpe": "jpg", "jfif": "jpg", "tiff": "tif", "heif": "heic"}.get(suffix, suffix)
        if "." in name
        else ""
    )


def _num_classes(images: ImageSet, group: tuple[int, ...]) -> int:
    if images.targets is None or images.task == "regression":
        return 0
    targets = images.targets[list(group)]
    return len(np.unique(targets[targets >= 0] if images.task == "single" else targets, axis=0))


def is_changed(images: ImageSet, digests: Digests, known: Mapping[str, KnownDigest]) -> NDArray[np.bool_]:
    """`(N,)`: images whose ids are `known` with another content than they have now."""
    before = KnownDigests.of(known).find(images.ids)
    is_other: NDArray[np.bool_] = (before.values != digests.values).any(axis=1)
    return before.is_known & is_other & ~digests.is_failed
