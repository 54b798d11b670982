"""Checksums: what an exported ``.safetensors`` file says about its own tensors and metadata, as the format has none."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from featstore.digest import canonical_json

if TYPE_CHECKING:
    from hashlib import _Hash

CHECKSUMS = "checksums"
"""The entry of the metadata that holds them: JSON ``{"metadata": SHA-256, "tensors": {name: SHA-256}}``."""


def tensor_checksum(kind: str, shape: Sequence[int]) -> _Hash:
    """A SHA-256 that has seen the type, as safetensors calls it, and the shape; the values' bytes follow."""
    return hashlib.sha256(canonical_json([kind, list(shape)]).encode("ascii"))


def metadata_checksum(metadata: Mapping[str, str]) -> str:
    """The SHA-256 of all other entries, in hexadecimal digits."""
    others = {name: text for name, text in metadata.items() if name != CHECKSUMS}
    return hashlib.sha256(canonical_json(others).encode("ascii")).hexdigest()
