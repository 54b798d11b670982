"""Progress: how far a job is and what each stage does, shown while it runs and told to who asks."""

from __future__ import annotations

import sys
import time
import warnings
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

from featstore.extraction.filed import Filed
from featstore.extraction.rates import Mark, Rates, StageName, StageRate, bound_by, rate_text, rates_text
from featstore.notes import logger_of
from featstore.words import duration_text, size_text

WINDOW = 60
"""Moments, a second or more apart, over which rates are taken while a job runs."""


@dataclass(frozen=True, kw_only=True)
class ProgressReport:
    """How far a job is.

    Attributes:
        done: images, with those that failed.
        total: images that it will have done.
        rate: images a second, of late; of the whole job in the last report.
        eta_seconds: to its end at this rate; None where it has none.
        rates: of each stage, over the same time.
        gpu_bytes: memory that this process holds on its GPU; None without one.
        errors: images left out so far.
    """

    done: int
    total: int
    rate: float
    eta_seconds: float | None
    rates: tuple[StageRate, ...]
    gpu_bytes: int | None
    errors: int

    @property
    def bound_by(self) -> StageName | None:
        """The stage that all others wait for."""
        return bound_by(self.rates)

    @property
    def queue(self) -> float:
        """How full the queue before the forward pass is, 0 to 1: full where passes bind, empty where reading does."""
        return next((each.queue for each in self.rates if each.queue is not None), 0.0)

    def __str__(self) -> str:
        eta = "" if self.eta_seconds is None else f", {duration_text(self.eta_seconds)} left"
        done = f"{self.done:,} of {self.total:,} images, {rate_text(self.rate)} a second{eta}"
        return "; ".join([done, *self.lines])

    @property
    def lines(self) -> tuple[str, str]:
        """What a bar doesn't say."""
        memory = "" if self.gpu_bytes is None else f", GPU {size_text(self.gpu_bytes)}"
        errors = f", {self.errors:,} failed" if self.errors else ""
        return rates_text(self.rates), f"queue {100 * self.queue:.0f} % full{memory}{errors}"


class Progress:
    """How far a job is, on stderr: a bar on a terminal or in a notebook, else a line now and then.

    Args:
        total: images of the job.
        is_shown: whether anything is printed.
        on_progress: called with a report, about once a second and at the end.
        rates: what the job's stages count; None where others compute, whose rates come with what they have filed.
        device: where its passes are computed.
    """

    SECONDS = 1.0
    SECONDS_A_LINE = 30.0

    def __init__(
        self,
        total: int,
        *,
        is_shown: bool,
        on_progress: Callable[[ProgressReport], None] | None = None,
        rates: Rates | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.total, self.done = total, 0
        self.is_shown, self.on_progress, self.device = is_shown, on_progress, device
        self.rates, self.is_counted = rates or Rates(), rates is not None
        self.moments: deque[tuple[int, Mark]] = deque([(0, self.rates.start)], maxlen=WINDOW)
        self.last = self.last_line = time.monotonic()
        self.bars = _bars(total) if is_shown else []

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        for bar in self.bars[:1]:
            bar.update(self.done - bar.n)
        for bar in reversed(self.bars):
            bar.close()

    def step(self, filed: Filed) -> None:
        """One image more; `filed` is what has come of them."""
        self.done += 1
        now = time.monotonic()
        if now - self.last >= self.SECONDS:
            self.last = now
            self._tell(self._report(filed, *self.moments[0]))
            self.moments.append((self.done, self.rates.mark()))

    def end(self, filed: Filed) -> None:
        """All is written: says what the job's time went into."""
        if self.total:
            report = self._report(filed, 0, self.rates.start)
            if self.on_progress is not None:
                self.on_progress(report)
            if self.is_shown:
                logger_of("featstore").info("%s", rates_text(report.rates))

    def _report(self, filed: Filed, done: int, since: Mark) -> ProgressReport:
        """Of the time since then, when so many images were done."""
        rates = self.rates.since(since) if self.is_counted else filed.rates
        rate = (self.done - done) / (time.perf_counter() - since.time)
        is_on_gpu = self.device is not None and self.device.type == "cuda"
        return ProgressReport(
            done=self.done,
            total=self.total,
            rate=rate,
            eta_seconds=(self.total - self.done) / rate if rate else None,
            rates=rates,
            gpu_bytes=torch.cuda.memory_reserved(self.device) if is_on_gpu else None,
            errors=filed.num_failed,
        )

    def _tell(self, report: ProgressReport) -> None:
        if self.on_progress is not None:
            self.on_progress(report)
        if self.bars:
            for bar, line in zip(self.bars[1:], report.lines, strict=False):
                bar.set_description_str(line)
            if len(self.bars) == 1:
                self.bars[0].set_postfix_str("; ".join(report.lines), refresh=False)
            self.bars[0].update(self.done - self.bars[0].n)
        elif self.is_shown and time.monotonic() - self.last_line >= self.SECONDS_A_LINE:
            self.last_line = time.monotonic()
            logger_of("featstore").info("%s", report)


def bar_class() -> Any:
    """What shows a bar here: tqdm's for a notebook, or for a terminal; None where neither would show one."""
    if _is_notebook():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # without ipywidgets it is a bar of text, which is one too
            from tqdm.auto import tqdm as notebook_bar
        return notebook_bar
    return tqdm if sys.stderr.isatty() else None


def _bars(total: int) -> list[Any]:
    """On a terminal a bar and two lines below it, which are gone at the end; in a notebook a bar; else nothing."""
    options: dict[str, Any] = {"total": total, "unit": "image", "file": sys.stderr, "dynamic_ncols": True}
    options |= {"mininterval": 0.0}  # who updates it decides when
    bar = bar_class()
    if bar is not tqdm:
        return [] if bar is None else [bar(**options)]
    lines = [tqdm(bar_format="{desc}", position=place, leave=False, **options) for place in (1, 2)]
    return [tqdm(position=0, **options), *lines]


def _is_notebook() -> bool:
    """Whether this process is what a notebook's cells run in."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return shell is not None and "IPKernelApp" in shell.config
