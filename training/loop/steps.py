"""Steps: one step of gradient descent, of one batch or of several, on one processor or shared by some."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from training.loop.losses import batch_weight
from training.loop.ranks import Ranks, together
from training.scores.metrics import Loss, loss_value

TrainingPrecision: TypeAlias = Literal["fp32", "bf16", "fp16"]
TRAINING_PRECISIONS: tuple[TrainingPrecision, ...] = get_args(TrainingPrecision)
_NARROW: dict[TrainingPrecision, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class StepOptions:
    """How steps are made; the defaults are the plain step of a tutorial.

    Attributes:
        clip: highest norm of all gradients together.
        accumulate: batches a step.
        precision: of the forward and backward pass; weights, and the loss of given logits, are float32 in all.
        batch_norm: whether that of thawed stages before the head takes each batch's statistics, or keeps its own.
    """

    clip: float | None = None
    accumulate: int = 1
    precision: TrainingPrecision = "fp32"
    batch_norm: Literal["train", "frozen"] = "train"


class Steps:
    """The steps of a fit.

    Where a step has several batches, or several processes share it, its loss is that of all its rows together: their
    mean, by the weights of their classes where the loss has some. A person's own loss counts as a mean over rows.

    Args:
        tail: what trains.
        optimizer: of its parameters.
        loss: of logits and targets.
        device: that batches lie on.
        options: how.
        ranks: the processes that share each batch; None: this one is alone.
        is_deferred: whether losses stay on the device, where they are numbers only once somebody asks. On a GPU, a
            step that asked would wait for it.
    """

    def __init__(
        self,
        tail: nn.Module,
        optimizer: Optimizer,
        loss: Loss,
        *,
        device: torch.device,
        options: StepOptions | None = None,
        ranks: Ranks | None = None,
        is_deferred: bool | None = None,
    ) -> None:
        self.options, self.optimizer = options or StepOptions(), optimizer
        self._forward: Callable[[Tensor], Tensor] = tail if ranks is None else ranks.wrapped(tail)
        self.loss, self._ranks, self._device = loss, ranks, device
        self._parameters = [each for group in optimizer.param_groups for each in group["params"]]
        self.num_batches = 0
        self._losses: list[tuple[Tensor | float, Tensor | float]] = []  # of the batches so far, and their weights
        self._has_sum = self.options.accumulate > 1 or ranks is not None  # of gradients, to be divided by all weights
        self._is_deferred = (device.type == "cuda") if is_deferred is None else is_deferred
        self._scaler = GradScaler(device.type, enabled=self.options.precision == "fp16")

    @property
    def is_whole(self) -> bool:
        """Whether all batches of a step are there."""
        return self.num_batches == self.options.accumulate

    def add(self, inputs: Tensor, targets: Tensor) -> tuple[float | Tensor, int]:
        """One batch of the step under way; its loss, a tensor where losses are deferred, and number of rows.

        Raises:
            FloatingPointError: before anything moves, if the loss isn't finite and not deferred.
        """
        with self._narrow(), nullcontext() if self._ranks is None else together():  # buffers are the first one's
            logits = self._forward(inputs)
        logits = logits.float() if self.options.precision in _NARROW else logits
        value = loss_value(self.loss, logits, targets)
        seen, num_rows = value.detach(), len(targets)
        number: float | Tensor = seen if self._is_deferred and self._ranks is None else float(seen)
        weight: float | Tensor = num_rows
        if self._has_sum:
            weight = batch_weight(self.loss, targets)
            value = value * weight
            weight = weight if isinstance(number, Tensor) else float(weight)
        if self._ranks is not None:
            total, weight, rows = self._ranks.totals(float(number * weight), float(weight), num_rows)
            number, num_rows = total / weight, round(rows)
            value = value * self._ranks.count  # the processes' gradients are averaged, not added
        if not isinstance(number, Tensor):
            check_finite(number)
        if not self.num_batches:
            self._forget()
        with nullcontext() if self._ranks is None else together():
            self._scaler.scale(value).backward()  # type: ignore[no-untyped-call]
        self._losses.append((number, weight))
        self.num_batches += 1
        return number, num_rows

    def make(self) -> float | Tensor:
        """The step, of the batches since the last one; no gradient is left. Its loss, as those of `add`."""
        weight = sum(weight for _, weight in self._losses)
        loss = self._losses[0][0]
        if len(self._losses) > 1:
            loss = sum(number * weight for number, weight in self._losses) / weight
        options = self.options
        if options.clip is not None or self._has_sum:
            self._scaler.unscale_(self.optimizer)
        if self._has_sum:
            torch._foreach_div_([each.grad for each in self._parameters if each.grad is not None], weight)
        if options.clip is not None:
            nn.utils.clip_grad_norm_(self._parameters, options.clip)
        self._scaler.step(self.optimizer)
        self._scaler.update()
        self._forget()
        self._losses, self.num_batches = [], 0
        return loss

    def scale(self) -> dict[str, float]:
        """How far gradients of fp16 are scaled up, to be kept; nothing of other precisions."""
        return dict(self._scaler.state_dict())

    def put_back(self, scale: dict[str, float]) -> None:
        """Takes back what `scale` gave."""
        if scale:
            self._scaler.load_state_dict(scale)

    def _narrow(self) -> AbstractContextManager[object]:
        dtype = _NARROW.get(self.options.precision)
        return nullcontext() if dtype is None else torch.autocast(self._device.type, dtype)

    def _forget(self) -> None:
        for each in self._parameters:
            each.grad = None


def check_finite(*losses: float) -> None:
    """Checks losses of training steps.

    Raises:
        FloatingPointError: names the first that isn't finite.
    """
    for number in losses:
        if not math.isfinite(number):
            raise FloatingPointError(
                f"The training loss became {number}. Lower the learning rate (--lr), or find one: lr_find()."
            )


def settled(losses: Sequence[float | Tensor]) -> list[float]:
    """Losses as numbers: those on a device are fetched together."""
    waiting = [each for each in losses if isinstance(each, Tensor)]
    fetched = iter(torch.stack(waiting).tolist() if waiting else [])
    return [next(fetched) if isinstance(each, Tensor) else each for each in losses]
