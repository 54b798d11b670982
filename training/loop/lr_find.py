"""The learning-rate finder: a short run with a rising rate, in memory, that leaves everything as it was."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count, islice, pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from featstore.models.modes import mode_of
from training.inputs.batches import Batches
from training.loop.copies import copied_tensors, put_back
from training.loop.fit import Draws, check_any, training_mode
from training.loop.optim import sensible_rates
from training.loop.steps import StepOptions, Steps
from training.scores.metrics import Loss, loss_number

if TYPE_CHECKING:
    from training.plots import Axes

START, END, STEPS = 1e-5, 10.0, 100
# Of the smoothed loss. fastai's 0.98 lags so far behind over 100 steps that what it suggests is too high. Measured on 9
# small problems (digits and photographs; concat, linear and MLP heads; AdamW): with 0.8, 0.9, 0.95 and 0.98 the
# validation loss after 5 one-cycle epochs at the suggestion was 1.22, 1.19, 1.32 and 1.38 times (geometric mean; at
# worst 2.1, 2.1, 2.3 and 3.0 times) that at the best rate of a grid.
_MOMENTUM = 0.9
_STOP = 4.0  # times the lowest smoothed loss
_FEW = 10
"""Batches a pass: with fewer, 100 steps are over ten passes, and a low loss says that they were learnt by heart."""
_TOO_LOW = 100.0  # times below an optimizer's default, where a noisy loss was lowest before the rate did anything
_JUDGES = 4  # batches at most
_MARGIN = 3.0
"""Times its rate is what a trial of it runs at: the fit's own epoch has another order, and may have less luck."""
_LOOKS = 10  # at the loss, in a trial
_LOWER = 3.0
"""What a rate is divided by when a trial at it made the loss worse."""


@dataclass(frozen=True, repr=False)
class LearningRates:
    """What the finder saw.

    `suggestion` alone has been tried. `minimum`, `steepest` and `valley` are rules that others use, read off the curve
    as it is; the fit at such a rate may diverge. They are None without a curve.

    Attributes:
        lrs: the rate of each step, of the last layer group.
        losses: the training loss of each step.
        smoothed: their debiased exponential mean.
        suggestion: the rate where the smoothed loss is lowest, divided by 10, within what is sensible for the
            optimizer; lower where a trial of it made the loss worse; the optimizer's default for a few batches.
        note: why the suggestion isn't that of the curve, as a sentence; None if it is.
    """

    lrs: tuple[float, ...]
    losses: tuple[float, ...]
    smoothed: tuple[float, ...]
    suggestion: float
    note: str | None = None

    @property
    def rate(self) -> float:
        """The suggestion, rounded to what is shown."""
        return float(f"{self.suggestion:.2g}")

    @property
    def minimum(self) -> float | None:
        """A tenth of the rate where the smoothed loss is lowest."""
        return self.lrs[self.smoothed.index(min(self.smoothed))] / 10 if self.lrs else None

    @property
    def steepest(self) -> float | None:
        """The rate from which the smoothed loss falls most until the next."""
        falls = [before - after for before, after in pairwise(self.smoothed)]  # the rates are equally far apart
        return self.lrs[falls.index(max(falls))] if falls else None

    @property
    def valley(self) -> float | None:
        """The rate in the middle of the longest valley of the smoothed loss, as fastai 2 has it.

        A valley is a sequence of falling losses with or without higher ones in between; it is taken to be as many
        steps long as it has losses.
        """
        if not self.lrs:
            return None
        longest: list[int] = []  # sequence of falling losses that ends at each step
        for place, loss in enumerate(self.smoothed):
            before = [longest[each] for each in range(place) if loss < self.smoothed[each]]
            longest.append(1 + max(before, default=0))
        length = max(longest)
        third = length / 3
        return self.lrs[max(longest.index(length) - length, 0) + int(third) + int(third / 2)]

    def in_words(self) -> str:
        """The rate, where it comes from, and how to use it again."""
        again = f"(to use it again: --lr {self.rate:g})"
        if self.note is None:
            return f"learning rate {self.rate:g}, the finder's suggestion {again}"
        return f"learning rate {self.rate:g} {again}: {self.note}"

    def __repr__(self) -> str:
        span = f"{self.lrs[0]:.2g} to {self.lrs[-1]:.2g}" if self.lrs else "no curve"
        return f"LearningRates({len(self.lrs)} steps, {span}; suggestion {self.suggestion:.2g})"

    def plot(self, axes: Axes | None = None) -> Axes:
        """Loss against rate, the suggestion marked."""
        from training.plots import learning_rates  # matplotlib loads only where a plot is wanted

        return learning_rates(self.lrs, self.losses, self.smoothed, self.suggestion, axes)


def find_lr(
    tail: nn.Sequential,
    train: Batches,
    make_optimizer: Callable[[], Optimizer],
    *,
    loss: Loss,
    seed: int,
    options: StepOptions | None = None,
    start: float = START,
    end: float = END,
    steps: int = STEPS,
    needs_curve: bool = True,
) -> LearningRates:
    """Trains for `steps` batches while the rate rises geometrically, then puts weights, statistics and modes back.

    Epochs are repeated as needed. It stops early when the smoothed loss exceeds 4 times its lowest value or is no
    longer finite. What the curve suggests is then tried: an epoch (at most `steps` batches) at three times that rate,
    from the same weights, may not make the loss of batches that it leaves out worse, else a third of it is tried. Also
    when it is interrupted, the tail is as it was before.

    Args:
        tail: the stages that train.
        train: batches.
        make_optimizer: makes the optimizer; the proportions between its groups' rates are kept.
        loss: of logits and targets.
        seed: of order, views and dropout.
        options: how steps are made; each of one batch, whatever it accumulates.
        start: the first rate of the last group; with SGD and a linear head a hundredth of it, as of all rates.
        end: the last one, likewise.
        steps: at most so many batches.
        needs_curve: False where the rate alone is asked for: few batches, which the curve decides nothing about, are
            not run for it then.

    Raises:
        ValueError: for rates or steps that make no rising sequence.
        FloatingPointError: if the very first loss isn't finite.
        FeatureStoreError: if not one image can be read.
    """
    if not 0 < start < end or steps < 2:
        raise ValueError(f"The finder needs 0 < start < end and 2 or more steps, not {start}, {end} and {steps}.")
    options = replace(options or StepOptions(), accumulate=1)
    optimizer = make_optimizer()
    rates = sensible_rates(optimizer, tail)
    a_pass = len(train) // train.passes
    lrs: list[float] = []
    losses: list[float] = []
    smoothed: list[float] = []
    if needs_curve or a_pass >= _FEW:
        scaled = (rates.scale * start, rates.scale * end)
        lrs, losses, smoothed = _curve(
            tail, train, optimizer, scaled, loss=loss, seed=seed, options=options, steps=steps
        )
    curve = lrs[smoothed.index(min(smoothed))] / 10 if lrs else None
    if a_pass < _FEW or curve is None:
        first, why = rates.default, f"{a_pass} batch{'es are' if a_pass != 1 else ' is'} too few to find a rate by"
    elif curve < rates.default / _TOO_LOW:
        first, why = rates.default, "the loss was lowest at the start, which says nothing of a rate"
    else:
        first, why = min(max(curve, rates.floor), rates.ceiling), f"the curve's own {curve:.2g} isn't safe"
    chosen, helps = _first_that_helps(
        first,
        rates.floor,
        lambda lr: _trial(
            tail, train, make_optimizer, _MARGIN * lr, loss=loss, seed=seed, options=options, steps=steps
        ),
    )
    if not helps:
        origin = "what made the loss worse by least, as every rate that was tried did,"
    elif chosen != first:
        origin = "what a trial found safe"
    else:
        origin = "a safe default" if first == rates.default else "as far as is safe"
    return LearningRates(
        lrs=tuple(lrs),
        losses=tuple(losses),
        smoothed=tuple(smoothed),
        suggestion=chosen,
        note=None if chosen == curve and helps else f"{why}: {chosen:.2g} is {origin} with {type(optimizer).__name__}",
    )


def _curve(
    tail: nn.Sequential,
    train: Batches,
    optimizer: Optimizer,
    span: tuple[float, float],
    *,
    loss: Loss,
    seed: int,
    options: StepOptions,
    steps: int,
) -> tuple[list[float], list[float], list[float]]:
    """Rate, loss and smoothed loss of each step while the rate rises from one end of `span` to the other."""
    before = copied_tensors(tail)
    start, end = span
    shares = [group["lr"] / optimizer.param_groups[-1]["lr"] for group in optimizer.param_groups]
    made = Steps(tail, optimizer, loss, device=train.device, options=options, is_deferred=False)
    planned = [start * (end / start) ** (number / (steps - 1)) for number in range(steps)]
    lrs: list[float] = []
    losses: list[float] = []
    smoothed: list[float] = []
    mean = 0.0
    try:
        draws = Draws.seeded(seed, 0, train.device)
        with training_mode(tail, options):
            for lr, (inputs, targets) in zip(planned, _repeated(train, seed), strict=False):
                for group, share in zip(optimizer.param_groups, shares, strict=True):
                    group["lr"] = lr * share
                with draws.taken():
                    number = float(made.add(inputs, targets)[0])
                mean = _MOMENTUM * mean + (1 - _MOMENTUM) * number
                debiased = mean / (1 - _MOMENTUM ** (len(losses) + 1))
                if len(losses) > 10 and debiased > _STOP * min(smoothed):
                    break
                lrs.append(lr)
                losses.append(number)
                smoothed.append(debiased)
                with draws.taken():
                    made.make()
    except FloatingPointError:
        pass
    finally:
        put_back(tail, before)
        optimizer.zero_grad(set_to_none=True)
    if not losses:
        raise FloatingPointError(
            f"The loss isn't finite at the rate {start:g} already. Check the images' normalisation and the labels."
        )
    return lrs, losses, smoothed


def _first_that_helps(first: float, floor: float, trial: Callable[[float], tuple[float, float]]) -> tuple[float, bool]:
    """The highest rate, from `first` down, that never makes the loss worse than the start, and True.

    If all do, the one that does so by least, and False.

    With batch norm the loss may rise at any rate, as the statistics move: the lowest rate is no remedy then.
    """
    tried: dict[float, float] = {}
    lr = first
    while True:
        start, after = trial(lr)
        if after <= start:
            return lr, True
        tried[lr] = after
        if lr <= floor:
            return min(tried, key=lambda each: (tried[each], each)), False
        lr = max(lr / _LOWER, floor)


def _trial(
    tail: nn.Module,
    train: Batches,
    make_optimizer: Callable[[], Optimizer],
    lr: float,
    *,
    loss: Loss,
    seed: int,
    options: StepOptions,
    steps: int,
) -> tuple[float, float]:
    """The loss, in eval mode, of batches that it leaves out: before an epoch at a rate, and worst in its later half.

    A loss that swings is low now and then, so the end alone says little; a bump at the start does no harm.
    """
    before = copied_tensors(tail)
    optimizer = make_optimizer()
    last = optimizer.param_groups[-1]["lr"]
    for group in optimizer.param_groups:
        group["lr"] *= lr / last
    made = Steps(tail, optimizer, loss, device=train.device, options=options, is_deferred=False)
    epoch = train.epoch(seed, 0)
    # They lie in memory, so they are few. Of a single batch there is none to leave out.
    a_pass = len(train) // train.passes
    judges = list(islice(epoch, max(1, min(_JUDGES, a_pass // 5))))
    start = _mean_loss(tail, judges, loss)
    try:
        draws = Draws.seeded(seed, 0, train.device)
        num_steps = min(a_pass - len(judges), steps) if a_pass > 1 else 1
        worst = -math.inf
        for number, (inputs, targets) in enumerate(islice(epoch, num_steps) if a_pass > 1 else judges, start=1):
            with training_mode(tail, options), draws.taken():
                made.add(inputs.clone(), targets.clone())
                made.make()
            if number == num_steps or (2 * number > num_steps and number % max(num_steps // _LOOKS, 1) == 0):
                seen = _mean_loss(tail, judges, loss)
                worst = math.inf if math.isnan(seen) else max(worst, seen)
        return start, worst
    except FloatingPointError:
        return start, math.inf
    finally:
        put_back(tail, before)
        optimizer.zero_grad(set_to_none=True)


def _mean_loss(tail: nn.Module, batches: Sequence[tuple[Tensor, Tensor]], loss: Loss) -> float:
    with torch.no_grad(), mode_of(tail, training=False):
        # Copies, as a stage may write into its input.
        values = [loss_number(loss, tail(inputs.clone()), targets) * len(targets) for inputs, targets in batches]
    return sum(values) / sum(len(targets) for _, targets in batches)


def _repeated(train: Batches, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of one epoch after the other, without end.

    Raises:
        FeatureStoreError: if an epoch has none.
    """
    for epoch in count():
        num_batches = 0
        for num_batches, batch in enumerate(train.epoch(seed, epoch), start=1):  # noqa: B007 - counted for the check
            yield batch
        check_any(num_batches, train)
