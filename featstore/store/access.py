"""Access: the ways in which rows of a store are read."""

from __future__ import annotations

from typing import Literal

Access = Literal["memory", "map", "stream"]

ACCESSES = ("auto", "memory", "map", "stream")


def check_access(access: str) -> None:
    """Raises ValueError for another way, unless it is auto."""
    if access not in ACCESSES:
        raise ValueError(f"access is {access!r}; expected {', '.join(ACCESSES)}.")
