"""Optimizers: layer groups, learning rates spread over them, and the optimizer of what trains."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from featstore.errors import FeatureStoreError
from featstore.models.layer_groups import layer_groups
from featstore.models.modes import check_trainable
from featstore.models.staged import StagedModel
from training.heads import DAMPING, SPREAD, linear_head_of

LearningRate = float | Sequence[float]
"""One rate for all groups; one for each group; or two, (low, high), spread geometrically over all groups."""

MakeOptimizer = Callable[[Iterable[dict[str, Any]]], Optimizer]

OPTIMIZERS: dict[str, MakeOptimizer] = {
    "adamw": torch.optim.AdamW,
    "adam": torch.optim.Adam,
    "sgd": lambda groups: torch.optim.SGD(groups, lr=1e-3, momentum=0.9),  # each group brings its own rate
}


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Which learning rates of the last layer group are sensible with an optimizer.

    Attributes:
        scale: all of them are so many times those of a layer on inputs of standard deviation 1.
        floor: below it nothing is learnt.
        default: safe where nothing is known.
        ceiling: above it small problems may look good and then fall apart.
    """

    floor: float
    default: float
    ceiling: float
    scale: float = 1.0

    def scaled(self, by: float) -> Rates:
        """The same for a layer whose inputs make a rate act `1 / by` times as much."""
        return Rates(floor=by * self.floor, default=by * self.default, ceiling=by * self.ceiling, scale=by * self.scale)


_ADAM = Rates(floor=1e-6, default=3e-3, ceiling=3e-2)
_SGD = Rates(floor=1e-5, default=1e-2, ceiling=0.1)
_OTHER = Rates(floor=1e-6, default=1e-3, ceiling=3e-2)


def sensible_rates(optimizer: Optimizer, tail: nn.Sequential) -> Rates:
    """The rates to choose from with `optimizer` for the stages `tail`."""
    if isinstance(optimizer, torch.optim.Adam):  # AdamW is one
        return _ADAM
    if not isinstance(optimizer, torch.optim.SGD):
        return _OTHER
    # The spread of a linear head's inputs is in its gradients, and in what a step of its weights does to the logits.
    return _SGD.scaled(1 / SPREAD**2) if len(tail) and linear_head_of(tail[-1]) is not None else _SGD


def spread(lr: LearningRate, num_groups: int) -> list[float]:
    """The rate of each group.

    >>> [round(rate, 6) for rate in spread((1e-5, 1e-3), 3)]
    [1e-05, 0.0001, 0.001]

    Raises:
        ValueError: for a rate that isn't positive, or a number of rates that is neither 1, 2 nor `num_groups`.
    """
    rates = numbers(lr)
    if not rates or any(not 0 < rate < math.inf for rate in rates):
        raise ValueError(f"lr is {lr!r}; expected positive numbers, for example 3e-3 or (1e-5, 1e-3).")
    if len(rates) == 1:
        return rates * num_groups
    if len(rates) == num_groups:
        return rates
    if len(rates) == 2:
        if num_groups == 1:
            return [rates[1]]
        low, high = rates
        return [low * (high / low) ** (place / (num_groups - 1)) for place in range(num_groups)]
    raise ValueError(
        f"lr has {len(rates)} rates; this model has {num_groups} layer groups, frozen ones included. Give one rate, "
        f"{num_groups} rates, or (low, high)."
    )


def build(model: StagedModel, lr: LearningRate, *, optimizer: str | MakeOptimizer, weight_decay: float) -> Optimizer:
    """The optimizer of the stages that aren't frozen, one parameter group for each layer group that trains.

    Freezing a group never changes another group's rate: rates are spread over all groups first.

    Args:
        model: whose stages train.
        lr: as in `spread`.
        optimizer: a key of `OPTIMIZERS`, or a callable that takes parameter groups, each with its rate, weight decay
            and name.
        weight_decay: of every parameter. With an optimizer by name a linear head's is ten times that, since its inputs
            are ten times as spread; and Adam's epsilon is `heads.DAMPING` there.

    Raises:
        ValueError: if nothing trains, for an unknown optimizer, or for rates that don't fit.
        FeatureStoreError: if gradients are switched off, or a parameter can never have one.
    """
    if not torch.is_grad_enabled():
        raise FeatureStoreError(
            "Gradients are switched off here, by torch.no_grad, torch.inference_mode or torch.set_grad_enabled(False), "
            "and training needs them. Call fit and lr_find outside of that block."
        )
    if isinstance(optimizer, str) and optimizer not in OPTIMIZERS:
        raise ValueError(
            f"{optimizer!r} is no optimizer. The optimizers are {', '.join(OPTIMIZERS)}; or pass a callable."
        )
    groups = layer_groups(model)
    parameter_groups: list[dict[str, Any]] = []
    for group, rate in zip(groups, spread(lr, len(groups)), strict=True):
        parameters = [
            parameter
            for place in group.stages
            if place >= model.num_frozen
            for parameter in model.stages[place].parameters()
            if parameter.requires_grad
        ]
        check_trainable(parameters, model.name)
        if parameters:
            parameter_groups.append(
                {"params": parameters, "lr": rate, "weight_decay": weight_decay, "name": group.name}
            )
            if isinstance(optimizer, str) and linear_head_of(model.stages[group.stages[-1]]) is not None:
                # Its inputs have that spread, so its weights are smaller, and so is what decay does to them.
                parameter_groups[-1]["weight_decay"] *= SPREAD
                if optimizer in ("adam", "adamw"):
                    parameter_groups[-1]["eps"] = DAMPING
    if not parameter_groups:
        raise ValueError(
            "Everything is frozen, so there is nothing to train. Freeze less: freeze_to(...) or unfreeze()."
        )
    return (OPTIMIZERS[optimizer] if isinstance(optimizer, str) else optimizer)(parameter_groups)


def numbers(lr: LearningRate) -> list[float]:
    """The rates that `lr` names.

    Raises:
        ValueError: if it isn't of numbers.
    """
    try:
        return [float(lr)] if isinstance(lr, Real | str) else [float(rate) for rate in lr]  # type: ignore[union-attr]
    except (TypeError, ValueError) as error:
        raise ValueError(f"lr is {lr!r}; expected numbers, for example 3e-3 or (1e-5, 1e-3).") from error
