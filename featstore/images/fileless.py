"""Fileless image sets: images of which the ids or the contents are known, and whose files are nowhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from featstore.images.digests import DigestTable, KnownDigests
from featstore.images.image_set import ImageSet
from featstore.images.sources import AbsentSource


def images_by_id(ids: Sequence[str], *, where: str, name: str) -> ImageSet:
    """Unlabelled images of which nothing is here but their ids.

    Args:
        ids: each once.
        where: they came from, for messages.
        name: of the set.
    """
    return ImageSet(
        name=name,
        ids=tuple(ids),
        targets=None,
        classes=(),
        splits=np.full(len(ids), ""),
        groups=None,
        task="single",
        source=AbsentSource(where=where),
    )


def images_by_digest(digests: NDArray[np.uint8], *, where: str, name: str) -> ImageSet:
    """Unlabelled images of which only the content is known: the hexadecimal digits of the digests are their ids.

    Args:
        digests: ``(N, 32)``, each once.
        where: they came from, for messages.
        name: of the set.
    """
    images = images_by_id([row.tobytes().hex() for row in digests], where=where, name=name)
    return without_files(images, where=where, digests=digests)


def without_files(images: ImageSet, *, where: str, digests: NDArray[np.uint8] | None = None) -> ImageSet:
    """The same images with their labels and splits, known by their ids, and by the digests of their contents if given.

    Args:
        images: for example of a table whose files aren't here.
        where: the table, for messages.
        digests: ``(N, 32)``, SHA-256 of each image's content.
    """
    known = KnownDigests([] if digests is None else [DigestTable.without_files(images.ids, digests)])
    return replace(images, source=AbsentSource(where=where, known=known), origin={})
