"""Near-duplicates: images whose stored rows point the same way, above all those in different splits."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from featstore.html import titled_table
from featstore.images.image_set import ImageSet
from featstore.machine import available_bytes
from featstore.store.features import Features
from featstore.words import counted

_BLOCK = 2048


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Duplicates:
    """Pairs of images that are nearly the same, the most alike first; made by `near_duplicates`.

    Attributes:
        images: all images that were compared.
        places: ``(M, 2)`` of each pair the places of its images among them, the lower first.
        similarity: ``(M,)`` the cosine of the angle between their rows, falling.
        threshold: no pair below it is listed.
        most: pairs that an image may have with those behind it; where one has as many, there may be more.
    """

    images: ImageSet
    places: NDArray[np.int64]
    similarity: NDArray[np.float64]
    threshold: float
    most: int

    def __len__(self) -> int:
        return len(self.similarity)

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """The ids of each pair."""
        ids = self.images.ids
        return [(ids[one], ids[other]) for one, other in self.places.tolist()]

    @property
    def splits(self) -> list[tuple[str, str]]:
        """The splits of each pair's images: ``train``, ``valid``, ``test``, or nothing where they aren't dealt."""
        splits = self.images.splits
        return [(str(splits[one]), str(splits[other])) for one, other in self.places.tolist()]

    @property
    def is_across(self) -> NDArray[np.bool_]:
        """``(M,)`` whether the images of a pair are dealt, and to different splits."""
        return np.array([one != other and "" not in (one, other) for one, other in self.splits], bool)

    @property
    def table(self) -> list[dict[str, str | float]]:
        """A row a pair: both ids and their splits, and the similarity."""
        rows = zip(self.pairs, self.splits, self.similarity.tolist(), strict=True)
        return [
            {"image": one, "split": here, "other": other, "its split": there, "similarity": similarity}
            for (one, other), (here, there), similarity in rows
        ]

    def in_words(self) -> str:
        """How many pairs, and how many of them lie across splits; whether there may be more."""
        across = int(self.is_across.sum())
        is_cut = len(self) > 0 and int(np.bincount(self.places[:, 0]).max()) >= self.most
        end = f"; an image has at most {self.most:,} here, and may have more: give a larger k" * is_cut
        return (
            f"{'at least ' * is_cut}{counted(len(self), 'pair')} of nearly equal images among "
            f"{counted(len(self.images), 'image')}, {across:,} of them in different splits (similarity "
            f"{self.threshold:g} or more{end})"
        )

    def __repr__(self) -> str:
        return f"Duplicates({self.in_words()})"

    def _repr_html_(self) -> str:
        return titled_table(self.in_words(), self.table)


def near_duplicates(
    features: Features,
    threshold: float = 0.97,
    k: int = 5,
    *,
    across_splits: bool = False,
    device: torch.device | str = "cpu",
) -> Duplicates:
    """The pairs of images whose rows are at least so similar.

    How similar photographs of different things are depends on the backbone: look at some pairs before you trust a
    threshold. Rows are compared block by block, each pair of images once; so N images cost N * N * D products, and the
    memory of all rows in float32, or of two blocks where that is too much.

    Args:
        features: vectors, one an image.
        threshold: the least cosine of the angle between two rows.
        k: an image is paired with at most so many of the images behind it, those most like it; of equal ones with the
            first.
        across_splits: only of images in different splits, which make scores too good.
        device: where rows are compared.

    Raises:
        ValueError: for maps and tokens, for a threshold that isn't above 0 and at most 1, and for k below 1.
    """
    if len(features.shape) != 2:
        shape = "x".join(map(str, features.shape[1:]))
        raise ValueError(
            f"Set {features.key[:8]} holds {shape} an image. Expected vectors to compare. Extract reduced features: "
            "reduce='avg' or 'token'."
        )
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold is {threshold}. Expected a cosine above 0 and at most 1, such as 0.97.")
    if k < 1:
        raise ValueError(f"k is {k}. Expected at least 1 pair an image.")
    kept = _Directions(features, torch.device(device))
    splits = torch.from_numpy(np.unique(features.images.splits, return_inverse=True)[1]).to(device)
    is_dealt = torch.from_numpy(np.asarray(features.images.splits) != "").to(device)
    places, similarity = [], []
    for start, rows in kept.blocks(0):
        best = torch.full((len(rows), k), -1.0, device=device)
        whose = torch.zeros((len(rows), k), dtype=torch.int64, device=device)
        here = torch.arange(start, start + len(rows), device=device)
        for other, columns in kept.blocks(start):
            there = torch.arange(other, other + len(columns), device=device)
            cosines = rows @ columns.T
            is_pair = (here[:, None] < there) & (cosines >= threshold - _ROUNDING)
            if across_splits:
                is_pair &= (splits[here][:, None] != splits[there]) & is_dealt[here][:, None] & is_dealt[there]
            some = is_pair.any(1).nonzero()[
                :, 0
            ]  # few rows, which are sorted; of a whole block that would take longest
            if len(some):
                found = cosines[some].masked_fill(~is_pair[some], -1.0)
                best[some], whose[some] = _best(best[some], whose[some], found, there, k)
        at, column = torch.nonzero(best > 0, as_tuple=True)
        places.append(torch.stack([here[at], whose[at, column]], 1).cpu())
        similarity.append(best[at, column].cpu())
    pairs, values = torch.cat(places).numpy(), torch.cat(similarity).double().clamp(max=1.0).numpy()
    order = np.lexsort((pairs[:, 1], pairs[:, 0], -values))
    return Duplicates(
        images=features.images, places=pairs[order], similarity=values[order], threshold=threshold, most=k
    )


_ROUNDING = 1e-6
"""What the cosine of two equal rows lies below 1 in float32."""


def _best(best: Tensor, whose: Tensor, cosines: Tensor, there: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The `k` greatest of each row of both, the earlier of equal ones first."""
    values = torch.cat([best, cosines], 1)
    places = torch.cat([whose, there.expand(len(cosines), -1)], 1)
    order = values.argsort(dim=1, descending=True, stable=True)[:, :k]
    return values.gather(1, order), places.gather(1, order)


class _Directions:
    """The rows at length 1, in blocks; in memory where there is room for all."""

    def __init__(self, features: Features, device: torch.device) -> None:
        self._features, self._device = features, device
        num_bytes = math.prod(features.shape) * 4
        is_held = device.type == "cpu" and num_bytes <= available_bytes() // 2
        self._held = _unit(features.tensor(dtype=torch.float32)) if is_held else None

    def blocks(self, start: int) -> Iterator[tuple[int, Tensor]]:
        """(Its first row, its rows ``(n, D)``) of each block from the row `start` on."""
        for first in range(start, len(self._features), _BLOCK):
            some = slice(first, first + _BLOCK)
            if self._held is not None:
                yield first, self._held[some]
            else:
                yield first, _unit(self._features[some].to(self._device, torch.float32))


def _unit(rows: Tensor) -> Tensor:
    """Rows at length 1, those of zeros as they are: the squares of very large or small numbers fit in no float32."""
    largest = torch.linalg.vector_norm(rows, ord=torch.inf, dim=1, keepdim=True)
    unit = rows / torch.where(largest > 0, largest, 1)
    # In place, as these may be all rows. Lengths are 1 or more by now, or 0.
    return unit.div_(torch.linalg.vector_norm(unit, dim=1, keepdim=True).clamp_min(0.5))
