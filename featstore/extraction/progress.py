"""Progress: how far a job is and what its time goes into, shown while it runs."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm

from featstore.images.render import Rendered


class Progress:
    """How far a job is and what its time goes into, on stderr: a bar on a terminal, else a line every ten seconds."""

    SECONDS_A_LINE = 10.0

    def __init__(self, total: int, *, is_shown: bool) -> None:
        self.total, self.done = total, 0
        self.is_terminal = sys.stderr.isatty()
        self.prints_lines = is_shown and not self.is_terminal
        self.bar = tqdm(total=total, unit="image", disable=not (is_shown and self.is_terminal), file=sys.stderr)
        self.seconds: dict[str, float] = {}
        self.started = self.last_line = time.monotonic()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    @contextmanager
    def timing(self, what: str) -> Iterator[None]:
        """Counts the block's time under `what`."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[what] = self.seconds.get(what, 0.0) + time.perf_counter() - started

    def timed(self, what: str, values: Iterator[Rendered]) -> Iterator[Rendered]:
        """`values`; the time spent waiting for each is counted under `what`."""
        while True:
            with self.timing(what):
                value = next(values, None)
            if value is None:
                return
            yield value

    def step(self) -> None:
        """One image more."""
        self.done += 1
        if not self.bar.disable:
            self.bar.set_postfix_str(self._shares(), refresh=False)
            self.bar.update()
        elif self.prints_lines and time.monotonic() - self.last_line >= self.SECONDS_A_LINE:
            self.last_line = time.monotonic()
            rate = self.done / (self.last_line - self.started)
            print(f"{self.done:,} of {self.total:,} images, {rate:.1f} a second; {self._shares()}", file=sys.stderr)

    def _shares(self) -> str:
        """Why it isn't faster: reading and decoding are waited for, as they go on beside the forward pass."""
        total = sum(self.seconds.values()) or 1.0
        return ", ".join(f"{what} {seconds / total:.0%}" for what, seconds in self.seconds.items())
