"""Access: the ways in which rows of a store are read."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from featstore.objects import ObjectPath

Access = Literal["memory", "map", "stream"]

ACCESSES = ("auto", "memory", "map", "stream")


def check_access(access: str, place: Path) -> None:
    """Raises ValueError for another way, unless it is auto, and for one that a store at `place` can't be read in."""
    if access not in ACCESSES:
        raise ValueError(f"access is {access!r}; expected {', '.join(ACCESSES)}.")
    if access == "map" and isinstance(place, ObjectPath):
        raise ValueError(
            f"access is 'map', and {place} has no files of this machine, which alone can be mapped. Expected memory, "
            "stream or auto there."
        )
