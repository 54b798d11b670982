"""Standardised: the linear head, whose inputs have one spread, and the head for regression, whose targets do."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from featstore.models.modes import mode_of
from featstore.models.stages import HeadStage

SPREAD = 10.0
"""The standard deviation of what the weights of a linear head see; with `DAMPING` it decides how its rates act."""

DAMPING = 1.0
"""Adam's epsilon for a linear head.

At torch's 1e-8 each weight moves by the rate whatever its gradient, noise as far as signal: with five images a class
that cost 5 points of accuracy against logistic regression at every rate. A tenth of the spread keeps steps in
proportion to the gradients, which are below 1 times the spread; the spread of 10 then gives back their size, so that
usual rates (1e-3 to 3e-2) serve. Measured on standardised inputs of 64 to 1024 values, 50 to 2,000 images: points of
accuracy below logistic regression at the best rate with 1e-8, and with this, 0.5 and 0.4 (digits), 5.4 and 0.0 (five
images a class), 0.5 and 0.2 (unscaled features), 0.5 and -0.3 (245 images).
"""

_STEPS, _PASSES = 100, 4
"""Steps that an epoch of a linear head has at least, and the most passes over the images that it takes for them.

The optimum is one that can be reached, and ten epochs of twenty or thirty batches stop short of it. Measured, in points
of accuracy below logistic regression after 10, 30 and 100 passes at one rate: digits 0.6, 0.2, 0.0; unscaled features
1.2, 0.2, 0.0.
"""

_FEWEST_STEPS = 100
"""Of float32 within the spread of targets; with fewer, rounding is as large as a good model's error."""


class LinearHead(nn.Linear):
    """One linear layer on standardised inputs: what logistic regression is, of features on any scale.

    Weights start at zero, where every class is as likely as any other: the problem has a single optimum, and a random
    start stays visible in each direction that a few training images say nothing about.

    Attributes:
        mean: of the training rows, ``(F,)``; 0 before `standardise`.
        scale: `SPREAD` over their standard deviation, ``(F,)``; 1 before, and `SPREAD` for a value that doesn't vary,
            whose weights then never move.
        num_rows: how many rows these are of; 0 before.
    """

    mean: Tensor
    scale: Tensor
    num_rows: Tensor

    def __init__(self, in_features: int, num_classes: int) -> None:
        # By way of the meta device, where the layer's own initialisation draws nothing from the global generator.
        super().__init__(in_features, num_classes, device="meta")
        self.to_empty(device="cpu")
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)
        for name, value in unstandardised(in_features).items():
            self.register_buffer(name, value)

    def forward(self, vectors: Tensor) -> Tensor:
        """Logits ``(N, K)``."""
        return F.linear((vectors - self.mean) * self.scale, self.weight, self.bias)

    def standardise(self, batches: Iterable[Tensor]) -> None:
        """Takes mean and spread of all rows of `batches` ``(n, F)``, in one pass; its logits stay what they were.

        Raises:
            FloatingPointError: if a value isn't finite; nothing is changed then.
        """
        count, mean, squares = _moments(batches, self.in_features)
        if not count:
            return
        std = (squares / count).sqrt()
        # What lies within the rounding of float32 is no variation; scaled up, it would be noise as large as a signal.
        std[(std <= torch.finfo(torch.float32).eps * mean.abs()) | (std < 1e-30)] = 1.0
        self._rescale(mean, SPREAD / std, count)

    def standardise_as(self, other: LinearHead) -> None:
        """Takes the statistics that `other` has of the same rows; what it comes to is what `standardise` would."""
        self._rescale(other.mean, other.scale, int(other.num_rows))

    def _rescale(self, mean: Tensor, scale: Tensor, num_rows: int) -> None:
        plain = self.folded()
        with torch.no_grad():
            self.mean.copy_(mean)
            self.scale.copy_(scale)
            self.num_rows.fill_(num_rows)
            weight, mean, scale = plain.weight.double(), self.mean.double(), self.scale.double()
            self.bias.copy_(plain.bias.double() + weight @ mean)
            self.weight.copy_(weight / scale)

    def folded(self) -> nn.Linear:
        """A plain linear layer with the same logits, up to rounding: mean and scale are in its weights."""
        plain = empty_linear(self.in_features, self.out_features).to(self.weight.device)
        with torch.no_grad():
            weight = self.weight.double() * self.scale.double()
            plain.weight.copy_(weight)
            plain.bias.copy_(self.bias.double() - weight @ self.mean.double())
        return plain


class ValueHead(nn.Module):
    """A head for regression: what `head` gives, in units of the training targets' spread from their mean on.

    Attributes:
        head: from vectors to K numbers of spread 1 around 0.
        mean: of the training targets, ``(K,)``; 0 before `standardise`.
        scale: their standard deviation, ``(K,)``; 1 before, and of a value that doesn't vary.
        num_rows: how many rows these are of; 0 before.
    """

    mean: Tensor
    scale: Tensor
    num_rows: Tensor

    def __init__(self, head: nn.Module, num_values: int) -> None:
        super().__init__()
        self.head = head
        for name, value in unstandardised(num_values).items():
            self.register_buffer(name, value)

    def forward(self, vectors: Tensor) -> Tensor:
        """Numbers ``(N, K)`` in the targets' units."""
        values: Tensor = self.head(vectors)
        return values * self.scale + self.mean

    def standardise(self, targets: Tensor) -> None:
        """Takes mean and spread of the training targets ``(N, K)``."""
        wide = targets.double()
        std = wide.std(0, correction=0)
        mean = wide.mean(0)
        std[std <= torch.finfo(torch.float32).eps * mean.abs()] = 1.0
        with torch.no_grad():
            self.mean.copy_(mean)
            self.scale.copy_(std.clamp(min=torch.finfo(torch.float32).tiny))
            self.num_rows.fill_(len(targets))


def steps_note(targets: NDArray[Any] | None, names: Sequence[str]) -> str | None:
    """What float32 leaves of numbers to learn ``(N, K)`` that lie far from 0 beside their spread; None if enough.

    Targets, and what a head says, are float32: 24 bits, from 0 on, whatever the head is standardised by.
    """
    if targets is None or len(targets) < 2:
        return None
    wide = targets.astype(np.float64)
    steps, spreads = np.spacing(np.abs(targets).max(0).astype(np.float32)), wide.std(0)
    coarse = [place for place in range(len(names)) if 0 < spreads[place] < _FEWEST_STEPS * steps[place]]
    if not coarse:
        return None
    first = coarse[0]
    return (
        f"{names[first]} is around {wide[:, first].mean():.4g} and spreads by {spreads[first]:.4g}, where float32 has "
        f"steps of {steps[first]:.4g}: digits are lost. Give numbers from their middle on: subtract it, and add it to "
        "what is predicted"
    )


def linear_head_of(stage: nn.Module) -> LinearHead | None:
    """The linear head that a stage is, or holds; None if there is none."""
    head = stage.module if isinstance(stage, HeadStage) else stage
    head = head.head if isinstance(head, ValueHead) else head
    return head if isinstance(head, LinearHead) else None


def unstandardised(in_features: int) -> dict[str, Tensor]:
    """The statistics of a linear head that has none: its inputs are taken as they are."""
    return {
        "mean": torch.zeros(in_features),
        "scale": torch.ones(in_features),
        "num_rows": torch.zeros((), dtype=torch.int64),
    }


def standardise(
    tail: nn.Module, batches: Iterable[Tensor], targets: Tensor | None = None, like: nn.Module | None = None
) -> None:
    """Gives a linear head at the end of `tail` the statistics of its training rows, if it has none yet.

    Likewise a head for regression those of its targets.

    Args:
        tail: the stages that train, in order. Those before the head run in eval mode.
        batches: what the tail is given in training, in one pass over the training images.
        targets: of all training images.
        like: stages that train on the same images: where they are a linear head alone too, its statistics serve.
    """
    *before, last = tail.children()
    values = last.module if isinstance(last, HeadStage) else last
    if isinstance(values, ValueHead) and targets is not None and not values.num_rows:
        values.standardise(targets)
    head = linear_head_of(last)
    if head is None or head.num_rows:
        return
    known = None if like is None else _lone_linear_head(like)
    if known is not None and known.num_rows and not before:
        head.standardise_as(known)
        return
    rest = nn.Sequential(*before)
    with torch.no_grad(), mode_of(rest, training=False):
        head.standardise(rest(batch) for batch in batches)


def passes_an_epoch(tail: nn.Module, num_batches: int) -> int:
    """How often an epoch goes over the images: several times for a linear head that trains alone on a small set."""
    is_alone = _lone_linear_head(tail) is not None
    return min(_PASSES, math.ceil(_STEPS / max(num_batches, 1))) if is_alone else 1


def _lone_linear_head(tail: nn.Module) -> LinearHead | None:
    """The linear head that is all that `tail` holds; None if there is none, or more."""
    children = list(tail.children())
    return linear_head_of(children[0]) if len(children) == 1 else None


def _moments(batches: Iterable[Tensor], width: int) -> tuple[int, Tensor, Tensor]:
    """Number, mean and sum of squared deviations of rows: float64, by Chan's update, batch after batch.

    Raises:
        FloatingPointError: if a value isn't finite.
    """
    count, mean, squares = 0, torch.zeros(width, dtype=torch.float64), torch.zeros(width, dtype=torch.float64)
    for batch in batches:
        rows = batch.detach().double().cpu()
        if not rows.isfinite().all():
            row, column = (~rows.isfinite()).nonzero()[0].tolist()
            raise FloatingPointError(
                f"Value {column} of training row {count + row} is {rows[row, column]:g}; a linear head needs finite "
                "inputs. Extract the features again with --dtype float32, or leave that image out."
            )
        centre = rows.mean(0)
        total = count + len(rows)
        delta = centre - mean
        squares += ((rows - centre) ** 2).sum(0) + delta**2 * (count * len(rows) / total)
        mean += delta * (len(rows) / total)
        count = total
    return count, mean, squares


def empty_linear(fan_in: int, fan_out: int) -> nn.Linear:
    """A linear layer whose weights are whatever lay there."""
    # By way of the meta device, where the layer's own initialisation draws nothing from the global generator.
    return nn.Linear(fan_in, fan_out, device="meta").to_empty(device="cpu")
