"""Schedules: the learning rate, and the momentum, of each optimizer step, as pure functions of the step's number.

A new one is a function of the form of `Schedule`, with a name in `SCHEDULES`; what takes a schedule by name, and
errors about names, read that table. A fit goes through its schedule once, a fit of cycles once a cycle (`Course`).
Nothing here is kept from one step to the next, so a fit that goes on needs to know no more than where it was.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:  # a program offers the names without torch
    from torch.optim import Optimizer


class Setting(NamedTuple):
    """What one step of a parameter group runs at."""

    lr: float
    momentum: float | None = None
    """Of SGD, or Adam's beta1; None: as the optimizer has it."""


class Schedule(Protocol):
    """What `SCHEDULES` holds."""

    def __call__(self, max_lr: float, step: int, num_steps: int, /) -> Setting:
        """The setting of a step, numbered from 0, of `num_steps` (at least 1) whose highest rate is `max_lr`."""


def constant(max_lr: float, step: int, num_steps: int) -> Setting:
    """The highest rate at every step; momentum stays as it is."""
    return Setting(max_lr)


def cosine(max_lr: float, step: int, num_steps: int) -> Setting:
    """Falls along half a cosine, towards 0 after the last step; in cycles this is SGDR.

    It is a cycle of torch's ``CosineAnnealingWarmRestarts``. The first step runs at the highest rate: there is no
    hidden twentieth at a hundredth of it, as in fastai 0.7.

    >>> [round(cosine(1.0, step, 10).lr, 6) for step in range(4)]
    [1.0, 0.975528, 0.904508, 0.793893]
    """
    return Setting(max_lr * (1 + math.cos(math.pi * step / num_steps)) / 2)


def one_cycle(max_lr: float, step: int, num_steps: int) -> Setting:
    """The ``OneCycleLR`` of torch with its defaults; a cycle of a single step is that step at the highest rate.

    The rate rises along a cosine from max / 25 during the first 30 % of the steps, then falls to max / 250,000, while
    momentum (Adam's beta1) goes from 0.95 to 0.85 and back.
    """
    if num_steps == 1:
        # OneCycleLR would give this only step its last rate, max / 250,000: it would train nothing and not say so.
        return Setting(max_lr)
    low = max_lr / 25
    peak, last = 0.3 * num_steps - 1, num_steps - 1
    if step <= peak:
        return Setting(_along_cosine(low, max_lr, step / peak), _along_cosine(0.95, 0.85, step / peak))
    share = (step - peak) / (last - peak)
    return Setting(_along_cosine(max_lr, low / 1e4, share), _along_cosine(0.85, 0.95, share))


def triangular(
    max_lr: float,
    step: int,
    num_steps: int,
    *,
    div: float = 4.0,
    cut_div: int = 8,
    high: float = 0.95,
    low: float = 0.85,
) -> Setting:
    """Rises linearly from max / `div` for a part in `cut_div` of the steps, and falls back over the others.

    Momentum goes the other way, from `high` to `low` and back, in step with the rate. The rates are those of fastai
    0.7's ``use_clr``, whose momentum was a step ahead of them and which failed on fewer than `cut_div` steps.
    """
    if num_steps == 1:
        return Setting(max_lr)
    cut = max(1, num_steps // cut_div)
    share = step / cut if step <= cut else 1 - (step - cut) / (num_steps - cut)
    return Setting(max_lr * (1 + share * (div - 1)) / div, high - (high - low) * share)


def linear_warmup(max_lr: float, step: int, num_steps: int) -> Setting:
    """Rises linearly over the first tenth of the steps, then falls linearly, towards 0 after the last."""
    start = num_steps // 10
    if step < start:
        return Setting(max_lr * _risen(step, start))
    return Setting(max_lr * (num_steps - step) / (num_steps - start))


def cosine_warmup(max_lr: float, step: int, num_steps: int) -> Setting:
    """Rises linearly over the first tenth of the steps, then falls along half a cosine, towards 0 after the last."""
    start = num_steps // 10
    if step < start:
        return Setting(max_lr * _risen(step, start))
    return cosine(max_lr, step - start, num_steps - start)


def step_down(max_lr: float, step: int, num_steps: int) -> Setting:
    """The highest rate for a third of the steps, a tenth of it for the next, a hundredth for the last."""
    return Setting(max_lr * 0.1 ** (3 * step // num_steps))


def _along_cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) / 2.0 * (math.cos(math.pi * share) + 1)  # in torch's order, for its bits


def _risen(step: int, start: int) -> float:
    """No step is wasted at a rate of 0."""
    return (step + 1) / (start + 1)


SCHEDULES: dict[str, Schedule] = {
    "constant": constant,
    "cosine": cosine,
    "one_cycle": one_cycle,
    "triangular": triangular,
    "linear_warmup": linear_warmup,
    "cosine_warmup": cosine_warmup,
    "step": step_down,
}
"""The schedules by name."""


def check(name: str) -> None:
    """Checks that there is a schedule `name`.

    Raises:
        ValueError: if there is none.
    """
    if name not in SCHEDULES:
        raise ValueError(f"The schedule {name!r} is unknown; pass one of {', '.join(SCHEDULES)}.")


def cycle_lengths(num_cycles: int, length: int, factor: int) -> tuple[int, ...]:
    """Epochs of each of some cycles, of which each is `factor` times as long as the one before.

    >>> cycle_lengths(3, 1, 2)
    (1, 2, 4)
    """
    return tuple(length * factor**number for number in range(num_cycles))


@dataclass(frozen=True, kw_only=True)
class Course:
    """The rates of a whole fit: a schedule, gone through once in each cycle.

    Attributes:
        schedule: a key of `SCHEDULES`.
        max_lrs: the highest rate of each parameter group, in the optimizer's order.
        cycles: epochs of each cycle.
        num_steps: of an epoch, at least 1; where an epoch has fewer, its cycle ends early and nothing else.
    """

    schedule: str
    max_lrs: Sequence[float]
    cycles: tuple[int, ...]
    num_steps: int

    def __post_init__(self) -> None:
        check(self.schedule)
        if not self.cycles or min(self.cycles) < 1 or self.num_steps < 1:
            raise ValueError(
                f"cycles of {self.cycles} epochs, of {self.num_steps} steps each, were asked for; each needs at least "
                "1: is there a training batch?"
            )

    @property
    def num_epochs(self) -> int:
        """Of all cycles."""
        return sum(self.cycles)

    def cycle_ended(self, epoch: int) -> int | None:
        """The number, from 1, of the cycle that ends with so many epochs done; None if none does."""
        ends = [*accumulate(self.cycles)]
        return ends.index(epoch) + 1 if epoch in ends else None

    def begins_cycle(self, epoch: int) -> bool:
        """Whether an epoch, from 0, is the first of a cycle."""
        return epoch == 0 or self.cycle_ended(epoch) is not None

    def at(self, epoch: int, step: int) -> list[Setting]:
        """What each group runs at in the `step` of its cycle, from 0, in an epoch, from 0."""
        ends = accumulate(self.cycles)
        num_steps = self.num_steps * next(length for length, end in zip(self.cycles, ends, strict=True) if epoch < end)
        return [SCHEDULES[self.schedule](lr, step, num_steps) for lr in self.max_lrs]

    def set(self, optimizer: Optimizer, epoch: int, step: int) -> None:
        """Gives the optimizer's groups what they run at; one without momentum, or with one of 0, gets its rate alone.

        Raises:
            ValueError: for another number of groups than of rates.
        """
        groups = optimizer.param_groups
        if len(self.max_lrs) != len(groups):
            raise ValueError(
                f"{len(self.max_lrs)} learning rates came for an optimizer of {len(groups)} parameter groups; pass one "
                "a group."
            )
        for group, (lr, momentum) in zip(groups, self.at(epoch, step), strict=True):
            group["lr"] = lr
            if momentum is None:
                continue
            if "betas" in group:
                group["betas"] = (momentum, *group["betas"][1:])
            elif group.get("momentum"):
                group["momentum"] = momentum
