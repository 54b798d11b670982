"""Digests: SHA-256 of JSON values, tensors and bytes, the same on every machine and in every process."""

from __future__ import annotations

import hashlib
import json
import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

Json = Any
"""A value made of dict (str keys), list, tuple, str, bool, int, float and None."""


def canonical_json(value: Json) -> str:
    """The one JSON text of `value`: sorted keys, no spaces, ASCII; floats as their shortest exact decimal.

    Raises:
        TypeError: for anything that JSON has no exact form of (a set, a tensor, NaN, a non-string key): a key that
            can't be computed is an error, never a `repr`.

    >>> canonical_json({"b": (1, 2.5), "a": None})
    '{"a":null,"b":[1,2.5]}'
    """
    _check_json(value, "value")
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def digest_bytes(data: bytes) -> str:
    """SHA-256 of `data`, 64 hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def digest_json(value: Json) -> str:
    """SHA-256 of the canonical JSON of `value`, 64 hexadecimal digits."""
    return digest_bytes(canonical_json(value).encode("ascii"))


def digest_tensor(tensor: Tensor) -> str:
    """SHA-256 of a tensor's dtype, shape and elements (row-major, little-endian), 64 hexadecimal digits.

    Device, strides, `requires_grad` and being an `nn.Parameter` don't matter.

    Raises:
        TypeError: for tensors without plain elements (sparse, quantized, on the meta device).
    """
    import torch

    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
        raise TypeError(f"a {tensor.layout} tensor of dtype {tensor.dtype} on {tensor.device} has no digest")
    flat = tensor.detach().to("cpu").resolve_conj().resolve_neg().contiguous().reshape(-1)
    digest = hashlib.sha256(canonical_json([str(tensor.dtype), list(tensor.shape)]).encode("ascii"))
    digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _check_json(value: Json, where: str) -> None:
    if value is None or isinstance(value, bool | int | str):
        return
    if isinstance(value, float):
        if not math.isfinite(value):
            raise TypeError(f"{where} is {value}, which JSON can't hold exactly")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            _check_json(item, f"{where}[{index}]")
    elif isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise TypeError(f"{where} has the key {key!r}; keys must be strings")
            _check_json(item, f"{where}[{key!r}]")
    else:
        raise TypeError(f"{where} is a {type(value).__name__}, which has no canonical form")
