"""Scaled rows: activations as whole numbers of 8 bits, each row with the scale that makes them its values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from featstore.files.storage_types import StorageType

if TYPE_CHECKING:
    from torch import Tensor

LARGEST = 127
"""Of the whole numbers, which are as far from zero as that at most: -128 has no use."""


@dataclass(frozen=True, eq=False)
class ScaledRows:
    """Rows whose values are their numbers times their scale, in float32.

    Attributes:
        numbers: ``(n, *F)`` int8, from -127 to 127.
        scales: ``(n,)`` float32, from 0 on; 0 where all numbers are.
    """

    numbers: Tensor
    scales: Tensor

    def __post_init__(self) -> None:
        if self.scales.shape != self.numbers.shape[:1]:
            raise ValueError(f"{len(self.numbers)} rows with scales of shape {tuple(self.scales.shape)}")

    @classmethod
    def of(cls, values: Tensor) -> ScaledRows:
        """Float32 activations ``(n, *F)``, rounded: the scale is the largest absolute value through 127.

        Each number is the value through the scale, to the nearest whole one, a half to the even one. What isn't finite
        has no such numbers, and there the scale isn't finite either.
        """
        import torch

        rows = values.reshape(len(values), -1)
        largest = rows.abs().amax(dim=1)
        # Through a tensor: a GPU would multiply by the reciprocal of a number, to other last bits.
        scales = largest / torch.full_like(largest, LARGEST)
        divisors = torch.where(scales > 0, scales, 1)[:, None]
        numbers = (rows / divisors).round_().clamp_(-LARGEST, LARGEST)  # a scale in the subnormals may be too small
        return cls(numbers.to(torch.int8).view(values.shape), scales)

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, rows: Any) -> ScaledRows:
        """Some of the rows, as torch takes them out of both."""
        return ScaledRows(self.numbers[rows], self.scales[rows])

    @property
    def nbytes(self) -> int:
        """Size of the numbers."""
        return self.numbers.nbytes

    def clone(self) -> ScaledRows:
        """The same in memory of its own."""
        return ScaledRows(self.numbers.clone(), self.scales.clone())

    def values(self, out: Tensor | None = None) -> Tensor:
        """The values ``(n, *F)`` in float32, in `out` where that is given."""
        import torch

        out = torch.empty(self.numbers.shape, device=self.numbers.device) if out is None else out
        return out.copy_(self.numbers).mul_(self.scales.view(-1, *[1] * (out.ndim - 1)))


def no_rows(shape: tuple[int, ...], storage_type: StorageType) -> Tensor | ScaledRows:
    """None of `shape`, as they come in such a type."""
    import torch

    numbers = torch.empty((0, *shape), dtype=storage_type.torch_dtype)
    return ScaledRows(numbers, torch.empty(0)) if storage_type.is_scaled else numbers
