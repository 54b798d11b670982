"""Rows: what a solver reads, in order, as often as it needs: kept in memory where they fit, else read again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from featstore.machine import available_bytes
from featstore.store.features import Features

_BLOCK_BYTES = 32 << 20
_SHARE = 0.5
"""Of free memory, that the rows of a solver may take: the rest is what it computes."""

Block = tuple[slice, Tensor]
"""Which rows, and their values ``(n, F)``, contiguous, which nobody writes to: they may be the rows' own memory."""


class Rows:
    """Rows ``(N, F)`` of an array, a tensor or `Features`, as float32; to whom asks for them exactly, as they are.

    An array or a tensor lies in memory already; features are read in blocks, a few ahead, which need memory only while
    somebody holds them.

    Attributes:
        num_rows: N.
        width: F.
        dtype: float64 where float32 can't hold the rows' numbers, else float32.
    """

    def __init__(self, source: NDArray[Any] | Tensor | Features, memory_bytes: int | None = None) -> None:
        self._source, self._memory_bytes = source, memory_bytes
        self.num_rows, self.width = map(int, source.shape)
        self.dtype = _exact_type(source)

    @classmethod
    def of(cls, X: Any, *, memory_bytes: int | None = None) -> Rows:  # noqa: N803, the field's name of rows
        """Rows of `X`, or `X` itself if it is some.

        Args:
            X: ``(N, F)``: `Features` of vectors, a tensor, or what numpy makes an array of numbers of.
            memory_bytes: most that a solver may keep of them in memory, and as much again of what it computes of each;
                default: half of what is free.

        Raises:
            TypeError: for what holds no real numbers.
            ValueError: for other shapes, no rows or no numbers a row.
        """
        if isinstance(X, Rows):
            return X
        source = X if isinstance(X, Tensor | Features) else np.asarray(X)
        if isinstance(source, Features):
            advice = " Extract vectors (reduce avg, concat or token), or flatten the maps."
        else:
            advice = " Put one row an image."
            if not _is_real(source):
                raise TypeError(f"Rows are of type {source.dtype}; expected real numbers.")
        if len(source.shape) != 2 or 0 in source.shape:
            raise ValueError(f"Rows have shape {tuple(source.shape)}; expected (rows, numbers a row).{advice}")
        return cls(source.detach() if isinstance(source, Tensor) else source, memory_bytes)

    def __len__(self) -> int:
        return self.num_rows

    @property
    def shape(self) -> tuple[int, int]:
        """``(N, F)``."""
        return self.num_rows, self.width

    @property
    def num_bytes(self) -> int:
        """Size of all rows as float32."""
        return 4 * self.num_rows * self.width

    def fit(self, device: torch.device, *, copies: float = 1.0) -> bool:
        """Whether so many copies of all rows, as float32, may be kept in the memory of `device`."""
        return copies * self.num_bytes <= self._most(device)

    def leave_room(self, device: torch.device, num_bytes: int) -> bool:
        """Whether as much may be kept there beside them, of what is computed of each row."""
        return num_bytes <= self._most(device)

    def blocks(
        self, device: torch.device | str = "cpu", block_rows: int | None = None, *, exact: bool = False
    ) -> Iterator[Block]:
        """All rows in order, in blocks on `device`.

        Args:
            device: where blocks are wanted.
            block_rows: rows a block; default: 32 MB of float32.
            exact: in `dtype` rather than float32. Who takes rows' mean from them needs that: times of day in seconds
                since 1970 differ by less than float32 can tell.

        Raises:
            ValueError: for numbers that aren't finite, with the place and value of the first.
        """
        several = block_rows or max(1, _BLOCK_BYTES // (4 * self.width))
        dtype = self.dtype if exact else torch.float32
        for where, values in self._pieces(several, dtype):
            block = values.to(device=device, dtype=dtype).contiguous()
            _check_finite(block, where.start)
            yield where, block

    def kept(
        self, device: torch.device | str, change: Callable[[Tensor], Tensor] | None = None, *, copies: float = 1.0
    ) -> Tensor | None:
        """All rows on `device` in float32, each exact block as `change` makes it; None where `copies` don't fit."""
        device = torch.device(device)
        if not self.fit(device, copies=copies):
            return None
        whole = torch.empty(self.shape, dtype=torch.float32, device=device)
        for where, block in self.blocks(device, exact=change is not None):
            whole[where] = block if change is None else change(block)
        return whole

    def take(self, numbers: NDArray[np.int64]) -> Tensor:
        """The rows of these numbers ``(n, F)``, in `dtype`, on the CPU."""
        taken = self._source[torch.from_numpy(numbers) if isinstance(self._source, Tensor) else numbers]
        return (taken if isinstance(taken, Tensor) else _as_tensor(taken, self.dtype)).to("cpu", self.dtype)

    def _pieces(self, several: int, dtype: torch.dtype) -> Iterator[Block]:
        if isinstance(self._source, Features):
            for values, numbers in self._source.batches(several):
                yield slice(int(numbers[0]), int(numbers[-1]) + 1), values
            return
        for start in range(0, self.num_rows, several):
            where = slice(start, min(start + several, self.num_rows))
            piece = self._source[where]
            yield where, piece if isinstance(piece, Tensor) else _as_tensor(piece, dtype)

    def _most(self, device: torch.device) -> float:
        if self._memory_bytes is not None:
            return self._memory_bytes
        if device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(device)
            free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # kept by torch for later
            return _SHARE * free
        return _SHARE * available_bytes()


def _is_real(source: NDArray[Any] | Tensor) -> bool:
    if isinstance(source, Tensor):
        return not source.is_complex()
    return source.dtype.kind in "fiub"


def _exact_type(source: NDArray[Any] | Tensor | Features) -> torch.dtype:
    """The type that holds such numbers: float32 has 24 bits for their digits."""
    if isinstance(source, Features):
        return torch.float32
    is_narrow = source.dtype.itemsize < 4 or source.dtype in (torch.float32, np.float32)
    return torch.float32 if is_narrow else torch.float64


def _as_tensor(piece: NDArray[Any], dtype: torch.dtype) -> Tensor:
    """Of native bytes in an order that torch takes; it refuses to share what can't be written to, so that is copied."""
    made = np.ascontiguousarray(piece, dtype=np.float64 if dtype == torch.float64 else np.float32)
    return torch.from_numpy(made if made.flags.writeable else made.copy())


def _check_finite(block: Tensor, start: int) -> None:
    if bool(torch.isfinite(block.sum().float())):  # one number that isn't finite makes it so; a sum may also overflow
        return
    bad = (~torch.isfinite(block.float())).nonzero()
    if len(bad):
        row, column = map(int, bad[0])
        raise ValueError(
            f"Row {start + row} has {block[row, column]:g} at place {column} ({len(bad)} such numbers in this block); "
            "expected finite numbers that float32 can hold. Leave such rows out, or extract them anew."
        )
