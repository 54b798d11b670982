"""Held rows: activations that somebody has in an array, read as stored ones are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from featstore.images.image_set import ImageSet
from featstore.store.features import Features


class HeldRows:
    """Rows ``(N, *F)`` of an array, which may be mapped from a file; they are read as those of `Features`.

    Args:
        values: of real numbers; nobody writes to it meanwhile. It isn't copied, and what is given of it is.
    """

    dtype = torch.float32

    def __init__(self, values: NDArray[Any]) -> None:
        self.values = values

    def __len__(self) -> int:
        return len(self.values)

    @property
    def shape(self) -> tuple[int, ...]:
        """``(N, *F)``."""
        return self.values.shape

    def __getitem__(self, rows: slice | Sequence[int] | NDArray[np.int64]) -> Tensor:
        """A new tensor ``(n, *F)``, float32."""
        return torch.from_numpy(np.array(self.values[rows], dtype=np.float32, order="C"))


class RepeatedRows:
    """Rows of an array or of features, each of them there so often; they aren't copied.

    Args:
        rows: ``(N, *F)``.
        counts: ``(N,)``, how often; copies follow each other.
    """

    dtype = torch.float32

    def __init__(self, rows: HeldRows | Features, counts: NDArray[np.int64]) -> None:
        self._rows, self._places = rows, np.repeat(np.arange(len(rows)), counts)

    def __len__(self) -> int:
        return len(self._places)

    @property
    def shape(self) -> tuple[int, ...]:
        """``(M, *F)``."""
        return (len(self), *self._rows.shape[1:])

    def __getitem__(self, rows: slice | Sequence[int] | NDArray[np.int64]) -> Tensor:
        """A new tensor ``(n, *F)``, float32."""
        return self._rows[self._places[rows]].float()


@dataclass(frozen=True, kw_only=True, eq=False)
class HeldSource:
    """Held rows as a fit reads them; what isn't described here is as in `derive.FeatureSource`.

    Attributes:
        images: that the rows stand for: their targets.
        features: the rows; there is one view.
        start: number of stages that have been run already: all that are frozen.
        words: what it is, for people.
    """

    images: ImageSet
    features: tuple[HeldRows | RepeatedRows]
    start: int
    words: str = "an array"
    kind: Literal["features"] = "features"
