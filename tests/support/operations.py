"""The operations on the disk, seen and replaced at the one place that all of them go through."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from featstore.files import disk


def watch(patched: pytest.MonkeyPatch, act: Callable[..., Any]) -> None:
    """Has ``act(name, operation, *args)`` called in the place of each operation; it calls `operation`, or doesn't."""
    earlier = disk.perform

    def perform(operation: Callable[..., Any], *args: Any) -> Any:
        return act(operation.__name__, partial(earlier, operation), *args)

    patched.setattr(disk, "perform", perform)


def replace_operation(patched: pytest.MonkeyPatch, name: str, act: Callable[..., Any]) -> None:
    """Has ``act(operation, *args)`` called in the place of the operation of that name."""
    assert hasattr(disk, name)
    watch(patched, lambda each, operation, *args: act(operation, *args) if each == name else operation(*args))
