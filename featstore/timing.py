"""Timing: how long named steps took, for who asks; who doesn't pays nothing."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_asked: ContextVar[dict[str, float] | None] = ContextVar("_asked", default=None)


@contextmanager
def step_seconds() -> Iterator[dict[str, float]]:
    """Step -> seconds of all blocks of that `timed` that end before this one does, in this thread."""
    seconds: dict[str, float] = {}
    token = _asked.set(seconds)
    try:
        yield seconds
    finally:
        _asked.reset(token)


@contextmanager
def timed(step: str) -> Iterator[None]:
    """Counts the block's time under `step`; no such block is within another."""
    started = time.perf_counter()
    try:
        yield
    finally:
        seconds = _asked.get()
        if seconds is not None:
            seconds[step] = seconds.get(step, 0.0) + time.perf_counter() - started
