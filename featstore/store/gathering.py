"""Gathering: rows of one set on their way into a part."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from featstore.digest import Json
from featstore.files.scaled import ScaledRows, no_rows
from featstore.store.spec import FeatureSpec
from featstore.store.store import FeatureStore

_BLOCK_BYTES = 1 << 20
"""Of memory in which rows of few bytes lie one behind the other."""

PART_BYTES = 256 << 20
"""Of rows that are worth a part."""


@dataclass(eq=False)
class Gathered:
    """Rows that wait to be written, and images that failed instead.

    Attributes:
        spec: of their set.
        shape: of one row.
        failed: digest (hexadecimal) -> reason.
        num_bytes: of the rows.
    """

    spec: FeatureSpec
    shape: tuple[int, ...]
    failed: dict[str, str] = field(default_factory=dict)
    num_bytes: int = 0
    _chunks: list[tuple[Tensor | ScaledRows, NDArray[np.uint8], NDArray[np.uint8]]] = field(default_factory=list)
    _room: tuple[Tensor, NDArray[np.uint8], NDArray[np.uint8]] | None = None

    def add(self, values: Tensor | ScaledRows, digests: NDArray[np.uint8], decoders: NDArray[np.uint8]) -> None:
        """Rows with their digests and decoders; in one step, so that no interrupt can leave one without the other.

        Rows of few bytes are copied one behind the other: thousands of small pieces of memory would lie between the
        large ones of passes, which can't be used again as a whole then (1 KB an image, for rows of 64 bytes).
        """
        if isinstance(values, Tensor) and 0 < values.nbytes <= _BLOCK_BYTES // 8:
            self._add_few(values, digests, decoders)
        else:
            self._room = None
            self._chunks.append((values, digests, decoders))
        self.num_bytes += values.nbytes

    def _add_few(self, values: Tensor, digests: NDArray[np.uint8], decoders: NDArray[np.uint8]) -> None:
        begin = 0 if self._room is None else len(self._chunks[-1][0])
        end = begin + len(values)
        if self._room is None or end > len(self._room[0]):
            many = _BLOCK_BYTES // (values.nbytes // len(values))
            room = values.new_empty((many, *values.shape[1:])), np.empty((many, 32), np.uint8), np.empty(many, np.uint8)
            self._chunks.append((room[0][:0], room[1][:0], room[2][:0]))
            self._room = room  # only now: it is that of the last chunk
            begin, end = 0, len(values)
        rows, marks, numbers = self._room
        rows[begin:end], marks[begin:end], numbers[begin:end] = values, digests, decoders
        self._chunks[-1] = rows[:end], marks[:end], numbers[:end]

    def sized(self, num_rows: int) -> Gathered:
        """So many of the same rows, each as often as it takes, in no more memory; none of none."""
        found = Gathered(self.spec, self.shape)
        for values, digests, decoders in cycle(chunk for chunk in self._chunks if len(chunk[0])):
            if num_rows <= 0:
                break
            found._chunks.append((values[:num_rows], digests[:num_rows], decoders[:num_rows]))
            found.num_bytes += found._chunks[-1][0].nbytes
            num_rows -= len(values)
        return found

    @property
    def num_rows(self) -> int:
        """Rows that wait."""
        return sum(len(values) for values, _, _ in self._chunks)

    @property
    def is_enough(self) -> bool:
        """Whether they are worth a part."""
        return self.num_bytes >= PART_BYTES

    def write(self, store: FeatureStore, facts: Mapping[str, Json]) -> Path:
        """Publishes them as one part, which may have no rows; `facts` as `FeatureStore.write` takes them."""
        none = np.zeros((0, 32), np.uint8)
        return store.write(
            self.spec,
            features=[values for values, _, _ in self._chunks] or [no_rows(self.shape, self.spec.storage_type)],
            digests=np.concatenate([none, *(digests for _, digests, _ in self._chunks)]),
            decoders=np.concatenate([none[:, 0], *(decoders for _, _, decoders in self._chunks)]),
            facts={**facts, "failed": self.failed},
        )
