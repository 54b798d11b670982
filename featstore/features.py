"""Features: rows of one feature set for one image set, in mapped parts, joined by image and never by position."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from featstore.images import ImageSet
from featstore.part import Part
from featstore.spec import FeatureSpec


class RowIndex:
    """Where each image's row lies among several parts: by the first 64 bits of its digest, all 256 verified."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = tuple(sorted(parts, key=lambda part: part.path.name))
        counts = [part.num_rows for part in self.parts]
        self._part_of = np.repeat(np.arange(len(self.parts)), counts)
        self._row_in = np.concatenate([np.arange(count) for count in counts] or [np.zeros(0, np.int64)])
        digests = [part.digests for part in self.parts] or [np.zeros((0, 32), np.uint8)]
        self._digests = np.concatenate(digests)
        # Stable: among equal digests the row of the smallest part name comes first, for every reader the same one.
        self._order = np.argsort(_prefixes(self._digests), kind="stable")
        self._sorted = _prefixes(self._digests)[self._order]

    @cached_property
    def num_images(self) -> int:
        """Distinct images that have a row."""
        return len(first_places(self._digests))  # 0.4 s for a million rows

    def find(self, digests: NDArray[np.uint8]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """For digests ``(N, 32)``: the part's place and the row in it, each ``(N,)``; -1 where there is no row."""
        wanted = _prefixes(digests)
        place = np.searchsorted(self._sorted, wanted)
        found = np.full(len(digests), -1, np.int64)
        open_rows = np.arange(len(digests))
        while len(open_rows):  # more than once only where two digests share their first 64 bits
            inside = place[open_rows] < len(self._sorted)
            open_rows = open_rows[inside]
            open_rows = open_rows[self._sorted[place[open_rows]] == wanted[open_rows]]
            candidates = self._order[place[open_rows]]
            same = (self._digests[candidates] == digests[open_rows]).all(axis=1)
            found[open_rows[same]] = candidates[same]
            open_rows = open_rows[~same]
            place[open_rows] += 1
        has_row = found >= 0
        part, row = np.full(len(digests), -1, np.int64), np.full(len(digests), -1, np.int64)
        part[has_row], row[has_row] = self._part_of[found[has_row]], self._row_in[found[has_row]]
        return part, row


class Features:
    """Activations ``(N, *F)`` of the N images of `images`, in their order.

    Holds no file handle, pickles, and may be used from several threads and processes.

    Attributes:
        images: whose features these are; images without a row (failed ones, where that was allowed) are left out.
        spec: what decided the values.
        parts: the files that hold them.
    """

    def __init__(
        self,
        images: ImageSet,
        spec: FeatureSpec,
        parts: Sequence[Part],
        part_of: NDArray[np.int64],
        row_in: NDArray[np.int64],
    ) -> None:
        self.images, self.spec, self.parts = images, spec, tuple(parts)
        self._part_of, self._row_in = part_of, row_in

    def __len__(self) -> int:
        return len(self._row_in)

    @property
    def key(self) -> str:
        """The key of the feature set."""
        return self.spec.key

    @property
    def shape(self) -> tuple[int, ...]:
        """``(N, *F)``."""
        return (len(self), *self.parts[0].shape)

    @property
    def dtype(self) -> torch.dtype:
        """As stored: torch.float16, float32 or bfloat16."""
        return self.parts[0].dtype

    @property
    def ids(self) -> tuple[str, ...]:
        """The images' ids."""
        return self.images.ids

    @property
    def targets(self) -> NDArray[Any] | None:
        """The images' targets, as `ImageSet.targets`."""
        return self.images.targets

    def __getitem__(self, rows: int | slice | Sequence[int] | NDArray[Any] | Tensor) -> Tensor:
        """Activations of `rows`, which may repeat and come in any order: a new tensor ``(n, *F)`` in the stored type.

        One whole number gives one row ``(*F)``; a slice, a boolean mask and negative numbers mean what they mean in
        numpy.

        Raises:
            IndexError: for a row that isn't there, and for anything but whole numbers, slices and masks of rows.
        """
        if isinstance(rows, Tensor):
            rows = rows.cpu().numpy()
        part_of, row_in = np.asarray(self._part_of[rows]), np.asarray(self._row_in[rows])
        if part_of.ndim > 1:
            raise IndexError(f"rows have {part_of.ndim} dimensions; expected whole numbers in one, a slice or a mask.")
        gathered = self._gathered(part_of.reshape(-1), row_in.reshape(-1))
        return gathered if part_of.ndim else gathered[0]

    def batches(
        self, batch_size: int, *, shuffle: bool = False, seed: int = 0, drop_last: bool = False
    ) -> Iterator[tuple[Tensor, NDArray[np.int64]]]:
        """Batches of (activations ``(n, *F)``, row numbers ``(n,)``), each row once.

        Args:
            batch_size: rows a batch; the last may have fewer.
            shuffle: a uniformly random order, the same for the same seed.
            seed: of that order.
            drop_last: leaves a short last batch out.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; expected at least 1 row a batch.")
        order = np.random.default_rng(seed).permutation(len(self)) if shuffle else np.arange(len(self))
        end = len(self) // batch_size * batch_size if drop_last else len(self)
        for start in range(0, end, batch_size):
            rows = order[start : start + batch_size]
            yield self[rows], rows

    def tensor(self, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> Tensor:
        """All activations ``(N, *F)`` in memory, on `device`, in the stored type or in `dtype`."""
        return self[:].to(device=device, dtype=dtype or self.dtype)

    def numpy(self) -> NDArray[Any]:
        """All activations ``(N, *F)`` in memory; bfloat16, which numpy lacks, as float32."""
        values = self[:]
        array: NDArray[Any] = (values.float() if values.dtype == torch.bfloat16 else values).numpy()
        return array

    def __repr__(self) -> str:
        return (
            f"Features({'x'.join(map(str, self.shape))} {str(self.dtype).removeprefix('torch.')}, set {self.key[:4]})"
        )

    def _gathered(self, part_of: NDArray[np.int64], row_in: NDArray[np.int64]) -> Tensor:
        used, rows = np.unique(part_of), torch.from_numpy(row_in.copy())
        if len(used) == 1:
            only: Tensor = self.parts[used[0]].features.index_select(0, rows)
            return only
        gathered = torch.empty((len(rows), *self.shape[1:]), dtype=self.dtype)
        for place in used:
            here = torch.from_numpy(np.flatnonzero(part_of == place))
            gathered.index_copy_(0, here, self.parts[place].features.index_select(0, rows[here]))
        return gathered


def is_among(digests: NDArray[np.uint8], others: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """``(N,)``: which of the digests ``(N, 32)`` are among the (few) others ``(M, 32)``."""
    found: NDArray[np.bool_] = np.isin(_prefixes(digests), _prefixes(others))
    known = {bytes(row) for row in others}
    candidates = np.flatnonzero(found)
    found[candidates] = [bytes(row) in known for row in digests[candidates]]
    return found


def first_places(digests: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Places ``(M,)``, rising, at which each distinct digest of ``(N, 32)`` stands first."""
    # As byte strings, which numpy sorts three times as fast as rows. They are filled up with zeros to 32 bytes, and
    # compared as if filled up, so all 32 bytes count.
    _, places = np.unique(np.ascontiguousarray(digests).view("S32").reshape(-1), return_index=True)
    return np.sort(places).astype(np.int64)


def _prefixes(digests: NDArray[np.uint8]) -> NDArray[np.uint64]:
    first: NDArray[np.uint64] = np.ascontiguousarray(digests[:, :8]).view(np.uint64).reshape(-1)
    return first
