"""Rates: what each stage of an extraction has done and how long it was busy, and so which one sets the pace."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, get_args

from featstore.images.render import Cost

StageName = Literal["read", "decode", "forward", "write"]
STAGES: tuple[StageName, ...] = get_args(StageName)
RENDERING: tuple[StageName, StageName] = ("read", "decode")
"""What the same workers do, one after the other; all others are done beside each other."""


@dataclass(frozen=True, kw_only=True)
class StageRate:
    """What one stage did in a stretch of time.

    Attributes:
        stage: read (and digest), decode (and render), forward (to the device, through the trunk and back) or write.
        images: that it did; of several views, or rows of several sets, as many parts of an image.
        num_bytes: that it read or wrote; 0 where that isn't what it does.
        busy_seconds: by the clock, of all its workers together.
        seconds: how long the stretch was.
        workers: who do it at once; those that read are those that decode.
        queue: how full the queue before it was, 0 to 1, over the stretch; None for a stage without one.
    """

    stage: StageName
    images: float
    num_bytes: int
    busy_seconds: float
    seconds: float
    workers: int
    queue: float | None = None

    @property
    def rate(self) -> float | None:
        """Images a second while all its workers are busy with it; None if none was."""
        return self.images * self.workers / self.busy_seconds if self.busy_seconds else None

    @property
    def share(self) -> float:
        """Of its workers' time, how much it was busy: 0 to 1."""
        return self.busy_seconds / (self.workers * self.seconds) if self.seconds else 0.0


def bound_by(rates: Sequence[StageRate]) -> StageName | None:
    """The stage that all others wait for: the busiest. Workers that read and decode are busy with both."""
    return max(rates, key=lambda each: _shares(rates)[each.stage]).stage if any(each.images for each in rates) else None


def _shares(rates: Sequence[StageRate]) -> dict[StageName, float]:
    """How busy each stage's workers are; of those who read and decode it is said for what takes them longer."""
    share = {each.stage: each.share for each in rates}
    longer = max(RENDERING, key=lambda stage: share[stage])
    return share | {longer: sum(share[stage] for stage in RENDERING)}


def joined(pieces: Iterable[Sequence[StageRate]]) -> tuple[StageRate, ...]:
    """The rates over all pieces of a job: those of one process, on average, where several worked at once."""
    whole: dict[StageName, StageRate] = {}
    for each in (rate for piece in pieces for rate in piece):
        whole[each.stage] = each if each.stage not in whole else _sum(whole[each.stage], each)
    return tuple(whole.values())


def _sum(one: StageRate, other: StageRate) -> StageRate:
    seconds = one.seconds + other.seconds
    waiting = [each.queue * each.seconds for each in (one, other) if each.queue is not None]
    return replace(
        one,
        images=one.images + other.images,
        num_bytes=one.num_bytes + other.num_bytes,
        busy_seconds=one.busy_seconds + other.busy_seconds,
        seconds=seconds,
        workers=max(one.workers, other.workers),
        queue=sum(waiting) / seconds if waiting and seconds else None,
    )


def rates_text(rates: Sequence[StageRate]) -> str:
    """``read 3,200, decode 180, forward 96.2, write 12,000 images a second when busy; forward binds, 97 % busy``."""
    named = ", ".join(f"{each.stage} {rate_text(each.rate)}" for each in rates if each.rate is not None)
    binding = bound_by(rates)
    if binding is None:
        return "nothing is done yet"
    return f"{named} images a second when busy; {binding} binds, {100 * min(_shares(rates)[binding], 1.0):.0f} % busy"


def rate_text(rate: float) -> str:
    """Images a second.

    >>> rate_text(3184.2), rate_text(96.23), rate_text(0.5)
    ('3,184', '96.2', '0.5')
    """
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"


class Mark(NamedTuple):
    """A moment of a job, and what each stage had done by then."""

    time: float
    totals: dict[StageName, list[float]]


class Rates:
    """Counts what the stages of one job do. Each stage is counted by one thread alone.

    Args:
        an_image: how much of a stage's own counts one image is: two rows, if each image has two; default: 1.

    Attributes:
        workers: who read and decode.
        room: how many images may wait for the forward pass.
        start: of the job.
    """

    def __init__(self, an_image: Mapping[StageName, float] | None = None) -> None:
        self.workers, self.room = 1, 1
        self._an_image = {stage: (an_image or {}).get(stage) or 1.0 for stage in STAGES}
        # Of each: images, bytes, seconds busy, seconds that images have waited for it.
        self._totals: dict[StageName, list[float]] = {stage: [0.0] * 4 for stage in STAGES}
        self.start = self.mark()

    def mark(self) -> Mark:
        """This moment."""
        return Mark(time.perf_counter(), {stage: done[:] for stage, done in self._totals.items()})

    def add(self, stage: StageName, count: float, seconds: float, num_bytes: int = 0) -> None:
        """So much was done, in so long a time."""
        done = self._totals[stage]
        done[0] += count / self._an_image[stage]
        done[1] += num_bytes
        done[2] += seconds

    def add_cost(self, cost: Cost) -> None:
        """An image was read and decoded, and is taken from the queue now."""
        self.add("read", 1, cost.read_seconds, cost.num_bytes)
        self.add("decode", 1, cost.decode_seconds)
        self._totals["forward"][3] += time.perf_counter() - cost.ended

    @contextmanager
    def timing(self, stage: StageName, count: int, num_bytes: int = 0) -> Iterator[None]:
        """Counts the block."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.add(stage, count, time.perf_counter() - started, num_bytes)

    def since(self, before: Mark) -> tuple[StageRate, ...]:
        """Of each stage what was done since then."""
        now = self.mark()
        return tuple(self._stretch(stage, before, now) for stage in STAGES)

    def _stretch(self, stage: StageName, before: Mark, now: Mark) -> StageRate:
        done = zip(now.totals[stage], before.totals[stage], strict=True)
        images, num_bytes, busy, waited = (after - earlier for after, earlier in done)
        seconds = now.time - before.time
        return StageRate(
            stage=stage,
            images=images,
            num_bytes=int(num_bytes),
            busy_seconds=busy,
            seconds=seconds,
            workers=self.workers if stage in RENDERING else 1,
            # As many wait, on average, as come in a second times the seconds that each of them waits (Little's law).
            queue=min(1.0, waited / (seconds * self.room)) if stage == "forward" else None,
        )
