"""Storage types: the kinds of numbers that features are stored as. What there is to say of one stands here alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # a program's help lists these, and waits for no arrays
    import numpy as np
    import torch
    from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class StorageType:
    """Numbers, little-endian: binary floating-point as IEEE 754 lays it out, or whole ones.

    A row of whole ones with a sign has a scale, a float32: its values are the numbers times it (see `ScaledRows`).
    Those without are pixels, and values as they are.

    Attributes:
        name: as requests, specs, folders and torch call it.
        exponent_bits: with a bias of half their range; none of whole numbers.
        mantissa_bits: stored ones, without the leading one.
        numpy: the name of the narrowest one that numpy has too and that holds each of the values.
        safetensors: what safetensors files call the one that rows are read as.
        has_sign: whether there is a bit for the sign.
    """

    name: str
    exponent_bits: int
    mantissa_bits: int
    numpy: str
    safetensors: str
    has_sign: bool = True

    @property
    def itemsize(self) -> int:
        """Bytes of one number."""
        return (self.has_sign + self.exponent_bits + self.mantissa_bits) // 8

    @property
    def is_float(self) -> bool:
        """Whether its numbers are floating-point ones."""
        return self.exponent_bits > 0

    @property
    def is_scaled(self) -> bool:
        """Whether it is of whole numbers, which are nothing without their rows' scales."""
        return not self.is_float and self.has_sign

    @property
    def read_as(self) -> StorageType:
        """That of the rows that readers get: itself, or what holds the products of numbers and scale."""
        return FLOATS["float32"] if self.is_scaled else self

    @property
    def in_numpy(self) -> StorageType:
        """Itself, or the narrowest one that numpy has too and that holds each of the values."""
        return KNOWN_TYPES[self.numpy]

    def numbers(self, rows: NDArray[np.uint8], scales: NDArray[np.float32] | None = None) -> NDArray[np.float64]:
        """The values ``(n, values)`` of rows of stored bytes ``(n, row_bytes)``, contiguous, and of their scales."""
        import numpy as np

        if scales is not None:
            return (rows.view(np.int8) * scales[:, None]).astype(np.float64)
        if not self.is_float:
            return rows.astype(np.float64)
        wide = self.in_numpy
        bits = rows.view(f"<u{self.itemsize}")
        if wide != self:  # what numpy lacks has the exponent of a wider one that it has, and fewer bits behind it
            bits = bits.astype(f"<u{wide.itemsize}") << (wide.mantissa_bits - self.mantissa_bits)
        with np.errstate(invalid="ignore"):  # a signalling NaN is as good as another
            return bits.view(f"<f{wide.itemsize}").astype(np.float64)

    @property
    def torch_dtype(self) -> torch.dtype:
        """As torch's type; of whole numbers without their scales."""
        import torch  # only who computes waits for it

        dtype: torch.dtype = getattr(torch, self.name)
        return dtype


STORAGE_TYPES: Mapping[str, StorageType] = {
    each.name: each
    for each in (
        StorageType(name="float16", exponent_bits=5, mantissa_bits=10, numpy="float16", safetensors="F16"),
        StorageType(name="float32", exponent_bits=8, mantissa_bits=23, numpy="float32", safetensors="F32"),
        StorageType(name="bfloat16", exponent_bits=8, mantissa_bits=7, numpy="float32", safetensors="BF16"),
        StorageType(name="int8", exponent_bits=0, mantissa_bits=7, numpy="float32", safetensors="F32"),
    )
}
"""Those that features are stored as, by name."""

FLOATS: Mapping[str, StorageType] = {name: each for name, each in STORAGE_TYPES.items() if each.is_float}
"""Those of them whose numbers are the values."""

PIXELS = StorageType(name="uint8", exponent_bits=0, mantissa_bits=8, numpy="uint8", safetensors="U8", has_sign=False)
"""That of views which are stored as they are."""

KNOWN_TYPES: Mapping[str, StorageType] = {**STORAGE_TYPES, PIXELS.name: PIXELS}
"""All of them."""

DEFAULT_STORAGE_TYPE = "float16"
"""Where nobody says."""


def storage_type_of(dtype: torch.dtype) -> StorageType | None:
    """The storage type of tensors of such a type; None where they can't be stored as they are."""
    found = KNOWN_TYPES.get(str(dtype).removeprefix("torch."))
    return None if found is None or found.is_scaled else found
