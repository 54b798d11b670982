"""The learning-rate finder: a short run with a rising rate, in memory, that leaves everything as it was."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch.optim import Optimizer

from training.fit import check_any, copied_tensors, put_back, seeded, training_mode
from training.inputs.batches import Batches
from training.metrics import Loss

if TYPE_CHECKING:
    from training.plots import Plot

START, END, STEPS = 1e-5, 10.0, 100
# Of the smoothed loss. fastai's 0.98 lags so far behind over 100 steps that what it suggests is too high. Measured on 9
# small problems (digits and photographs; concat, linear and MLP heads; AdamW): with 0.8, 0.9, 0.95 and 0.98 the
# validation loss after 5 one-cycle epochs at the suggestion was 1.22, 1.19, 1.32 and 1.38 times (geometric mean; at
# worst 2.1, 2.1, 2.3 and 3.0 times) that at the best rate of a grid.
_MOMENTUM = 0.9
_STOP = 4.0  # times the lowest smoothed loss


@dataclass(frozen=True, repr=False)
class LearningRates:
    """What the finder saw.

    Attributes:
        lrs: the rate of each step, of the last layer group.
        losses: the training loss of each step.
        smoothed: their debiased exponential mean.
        suggestion: the rate where the smoothed loss is lowest, divided by 10.
    """

    lrs: tuple[float, ...]
    losses: tuple[float, ...]
    smoothed: tuple[float, ...]
    suggestion: float

    def __repr__(self) -> str:
        span = f"{self.lrs[0]:.2g} to {self.lrs[-1]:.2g}"
        return f"LearningRates({len(self.lrs)} steps, {span}; suggestion {self.suggestion:.2g})"

    def plot(self) -> Plot:
        """Loss against rate, the suggestion marked."""
        from training.plots import learning_rates  # matplotlib loads only where a plot is wanted

        return learning_rates(self.lrs, self.losses, self.smoothed, self.suggestion)


def find_lr(
    tail: nn.Module,
    train: Batches,
    make_optimizer: Callable[[], Optimizer],
    *,
    loss: Loss,
    seed: int,
    start: float = START,
    end: float = END,
    steps: int = STEPS,
) -> LearningRates:
    """Trains for `steps` batches while the rate rises geometrically, then puts weights, statistics and modes back.

    Epochs are repeated as needed. It stops early when the smoothed loss exceeds 4 times its lowest value or is no
    longer finite. Also when it is interrupted, the tail is as it was before.

    Args:
        tail: the stages that train.
        train: batches.
        make_optimizer: makes the optimizer; the proportions between its groups' rates are kept.
        loss: of logits and targets.
        seed: of order, views and dropout.
        start: the first rate of the last group.
        end: the last one.
        steps: at most so many batches.

    Raises:
        ValueError: for rates or steps that make no rising sequence.
        FloatingPointError: if the very first loss isn't finite.
        FeatureStoreError: if not one image can be read.
    """
    if not 0 < start < end or steps < 2:
        raise ValueError(f"The finder needs 0 < start < end and 2 or more steps, not {start}, {end} and {steps}.")
    before = copied_tensors(tail)
    optimizer = make_optimizer()
    shares = [group["lr"] / optimizer.param_groups[-1]["lr"] for group in optimizer.param_groups]
    planned = [start * (end / start) ** (number / (steps - 1)) for number in range(steps)]
    lrs: list[float] = []
    losses: list[float] = []
    smoothed: list[float] = []
    mean = 0.0
    try:
        with seeded(seed, 0, train.device), training_mode(tail):
            for lr, (inputs, targets) in zip(planned, _repeated(train, seed), strict=False):
                for group, share in zip(optimizer.param_groups, shares, strict=True):
                    group["lr"] = lr * share
                optimizer.zero_grad(set_to_none=True)
                value = loss(tail(inputs), targets)
                number = float(value.detach())
                mean = _MOMENTUM * mean + (1 - _MOMENTUM) * number
                debiased = mean / (1 - _MOMENTUM ** (len(losses) + 1))
                if not math.isfinite(debiased) or (len(losses) > 10 and debiased > _STOP * min(smoothed)):
                    break
                lrs.append(lr)
                losses.append(number)
                smoothed.append(debiased)
                value.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
    finally:
        put_back(tail, before)
        optimizer.zero_grad(set_to_none=True)
    if not losses:
        raise FloatingPointError(
            f"The loss isn't finite at the rate {start:g} already. Check the images' normalisation and the labels."
        )
    return LearningRates(
        lrs=tuple(lrs),
        losses=tuple(losses),
        smoothed=tuple(smoothed),
        suggestion=lrs[smoothed.index(min(smoothed))] / 10,
    )


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
