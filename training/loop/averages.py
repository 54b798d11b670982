"""Averages: the mean of a model's weights along a fit, by torch's own `swa_utils`, which is scored and remains."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Real
from typing import TypeAlias

from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

from training.loop.copies import copied_tensors, put_back, tensors_of


@dataclass(frozen=True)
class EMA:
    """An exponential mean of the weights after every step; statistics of batch norm are averaged likewise.

    The averaged weights are scored after each epoch, and remain.

    Attributes:
        decay: what the mean keeps at each step, above 0 and below 1. It looks back over about 1 / (1 - decay) steps,
            so a fit should have several times as many: 0.99 for a few hundred.
    """

    decay: float = 0.99

    def __post_init__(self) -> None:
        if not _is_number(self.decay) or not 0 < self.decay < 1:
            raise ValueError(f"The decay of EMA is {self.decay!r}; expected above 0 and below 1, such as 0.99.")


@dataclass(frozen=True)
class SWA:
    """The mean of the weights at the ends of a fit's last epochs: stochastic weight averaging.

    Before the last epoch the weights of each are scored; then the mean is, after one more pass over the training
    images for the statistics of its batch norm. The rate should not end near 0: ``schedule="constant"``.

    Attributes:
        start: share of the epochs after which the mean begins, at least 0 and below 1.
    """

    start: float = 0.75

    def __post_init__(self) -> None:
        if not _is_number(self.start) or not 0 <= self.start < 1:
            raise ValueError(
                f"SWA starts after {self.start!r} of the epochs; expected at least 0 and below 1, such as 0.75."
            )


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


Averaging: TypeAlias = EMA | SWA


class Average:
    """The mean of a tail's weights during a fit.

    Attributes:
        how: EMA or SWA.
        model: what torch keeps of it.
    """

    def __init__(self, how: Averaging, tail: nn.Module) -> None:
        self.how = how
        if isinstance(how, EMA):
            mean = get_ema_multi_avg_fn(how.decay)  # type: ignore[no-untyped-call]
            self.model = AveragedModel(tail, multi_avg_fn=mean, use_buffers=True)
        else:
            self.model = AveragedModel(tail)

    def after_step(self, tail: nn.Module) -> None:
        """Takes the weights after a step."""
        if isinstance(self.how, EMA):
            self.model.update_parameters(tail)
            for own, other in zip(self.model.module.buffers(), tail.buffers(), strict=True):
                if not own.is_floating_point():  # a count has no mean
                    own.copy_(other)

    def after_epoch(self, tail: nn.Module, epoch: int, num_epochs: int) -> None:
        """Takes the weights after an epoch, from 0."""
        if isinstance(self.how, SWA) and epoch >= int(self.how.start * num_epochs):
            self.model.update_parameters(tail)

    def is_ready(self, epoch: int, num_epochs: int) -> bool:
        """Whether it is the mean that counts after an epoch, from 0."""
        return isinstance(self.how, EMA) or epoch == num_epochs - 1

    def with_statistics(self, inputs: Iterable[Tensor]) -> None:
        """Gives SWA's batch norm the statistics of these inputs; nothing where there is none of it."""
        if isinstance(self.how, SWA):
            update_bn(inputs, self.model)

    def tensors(self) -> dict[str, Tensor]:
        """All that it keeps, by name, as it is."""
        return {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}

    def put_back(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes back what `tensors` gave."""
        for name, tensor in self.tensors().items():
            tensor.detach().copy_(tensors[name])


@contextmanager
def averaged(tail: nn.Module, average: Average | None, epoch: int, num_epochs: int) -> Iterator[None]:
    """`tail` with the mean of its weights, where that is what counts after an epoch, from 0; its own come back."""
    if average is None or not average.is_ready(epoch, num_epochs):
        yield
        return
    before = copied_tensors(tail)
    try:
        put_back(tail, dict(tensors_of(average.model.module)))
        yield
    finally:
        put_back(tail, before)
