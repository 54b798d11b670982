"""Schedules: how each group's learning rate moves from the first optimizer step to the last.

A schedule is one of torch's own schedulers, made for a known number of steps. Call its `step()` after each
`optimizer.step()`. A new one is a function of the form of `Schedule`, with a name in `SCHEDULES`; what takes a schedule
by name, and errors about names, read that table.

torch loads only where a schedule is made, so that a program can offer the names without it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler


class Schedule(Protocol):
    """What `SCHEDULES` holds."""

    def __call__(self, optimizer: Optimizer, max_lrs: list[float], total_steps: int, /) -> LRScheduler:
        """A scheduler over `total_steps` steps, at least 1, with the peak rate of each parameter group.

        It sets the groups' rates for the first step.
        """


def check(name: str) -> None:
    """Checks that there is a schedule `name`.

    Raises:
        ValueError: if there is none.
    """
    if name not in SCHEDULES:
        raise ValueError(f"The schedule {name!r} is unknown; pass one of {', '.join(SCHEDULES)}.")


def build(name: str, optimizer: Optimizer, max_lrs: Sequence[float], total_steps: int) -> LRScheduler:
    """The schedule `name` over `total_steps` steps of `optimizer`, whose learning rates it sets for the first step.

    Args:
        name: a key of `SCHEDULES`.
        optimizer: what is stepped; all its parameter groups get a rate, trainable or not.
        max_lrs: the peak learning rate of each parameter group, in the optimizer's order.
        total_steps: the number of optimizer steps, at least 1.

    Raises:
        ValueError: for an unknown name, another number of rates than groups, or no steps.
    """
    check(name)
    num_groups = len(optimizer.param_groups)
    if len(max_lrs) != num_groups:
        raise ValueError(
            f"{len(max_lrs)} learning rates came for an optimizer of {num_groups} parameter groups; pass one a group."
        )
    if total_steps < 1:
        raise ValueError(f"total_steps is {total_steps}; a schedule needs at least 1: is there a training batch?")
    return SCHEDULES[name](optimizer, list(max_lrs), total_steps)


def constant(optimizer: Optimizer, max_lrs: list[float], total_steps: int) -> LRScheduler:
    """Every group at its peak learning rate at every step; momentum stays as it is."""
    from torch.optim.lr_scheduler import LambdaLR

    for group, lr in zip(optimizer.param_groups, max_lrs, strict=True):
        group["initial_lr"] = lr  # what LambdaLR multiplies; an earlier schedule of this optimizer left its own here
    return LambdaLR(optimizer, lambda step: 1.0)


def one_cycle(optimizer: Optimizer, max_lrs: list[float], total_steps: int) -> LRScheduler:
    """The `OneCycleLR` of torch with its defaults; a cycle of a single step is that step at the peak rate.

    The rate rises along a cosine from max / 25 during the first 30 % of the steps, then falls to max / 250,000, while
    momentum (Adam's beta1) goes from 0.95 to 0.85 and back. An optimizer that has neither cycles its rate alone.
    """
    from torch.optim.lr_scheduler import OneCycleLR

    if total_steps == 1:
        # OneCycleLR would give this only step its last rate, max / 250,000: it would train nothing and not say so.
        return constant(optimizer, max_lrs, total_steps)
    has_momentum = "momentum" in optimizer.defaults or "betas" in optimizer.defaults
    return OneCycleLR(optimizer, max_lrs, total_steps=total_steps, cycle_momentum=has_momentum)


SCHEDULES: dict[str, Schedule] = {"constant": constant, "one_cycle": one_cycle}
"""The schedules by name."""
