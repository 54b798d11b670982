"""Interrupts: Ctrl-C, SIGTERM and SIGHUP held back while there is work that can be kept once its step has ended."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

TWICE_SECONDS = 0.25
"""Two signals in less are one: `timeout` sends its own to the process, and then to the group that it is in."""


@dataclass
class Held:
    """The signal that is held back, by its number; None before there is one."""

    number: int | None = None

    def is_there(self) -> bool:
        """Whether there is one."""
        return self.number is not None


@contextmanager
def held_back(note: str) -> Iterator[Held]:
    """Holds back the first signal, which takes effect when the block ends; a second one takes effect at once.

    Its effect is that which it had before. What would go on then ends by KeyboardInterrupt all the same. A signal that
    whoever started the program wants ignored (nohup) stays ignored.

    Args:
        note: what is added to the interrupt when the block has ended well.
    """
    held = Held()
    if threading.current_thread() is not threading.main_thread():  # no other may set what signals do
        yield held
        return
    ends = [signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]
    before = {each: signal.getsignal(each) for each in ends if signal.getsignal(each) != signal.SIG_IGN}
    since = 0.0

    def restore() -> None:
        for each, handler in reversed(before.items()):  # SIGINT last: it may raise in here
            signal.signal(each, signal.SIG_DFL if handler is None else handler)  # None: not set from Python

    def hold(number: int, _: object) -> None:
        nonlocal since
        if held.number is None:
            held.number, since = number, time.monotonic()
        elif time.monotonic() - since > TWICE_SECONDS:
            restore()
            signal.raise_signal(number)

    has_ended_well = False
    try:
        for each in before:
            signal.signal(each, hold)
        yield held
        has_ended_well = True
    finally:
        restore()
        if held.number is not None:
            try:
                signal.raise_signal(held.number)
                raise KeyboardInterrupt
            except KeyboardInterrupt as interrupt:
                if has_ended_well:
                    interrupt.add_note(note)
                raise
