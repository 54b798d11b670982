"""Optimizers: layer groups, learning rates spread over them, and the optimizer of what trains."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from featstore.digest import Json
from featstore.errors import FeatureStoreError
from featstore.models.layer_groups import LayerGroup, layer_groups
from featstore.models.modes import check_trainable
from featstore.models.staged import StagedModel
from featstore.models.stages import Stage, has_weights
from featstore.words import some
from training.standardised import DAMPING, SPREAD, linear_head_of

LearningRate = float | Sequence[float] | Mapping[str, float]
"""One rate for all layer groups; one for each; two, (low, high), spread geometrically over all; or by name.

A name is that of a layer group or of a stage, and stands for all stages below it: ``layer4`` for ``layer4.0.add``. The
longest name counts. What trains must be named.
"""

WeightDecay = float | Sequence[float] | Mapping[str, float]
"""One number for all layer groups, one for each, or by name, as a rate."""

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


def build(
    model: StagedModel,
    lr: LearningRate,
    *,
    optimizer: str | MakeOptimizer,
    weight_decay: WeightDecay,
    decay_norms: bool = False,
) -> Optimizer:
    """The optimizer of the stages that aren't frozen, one parameter group for each layer group or name that trains.

    Freezing a group never changes another group's rate: rates are spread over all groups first. Biases and the scales
    and shifts of norms, which are the parameters of one dimension, aren't decayed: they are a second parameter group of
    the same rate, where others are decayed.

    Args:
        model: whose stages train.
        lr: see `LearningRate`.
        optimizer: a key of `OPTIMIZERS`, or a callable that takes parameter groups, each with its rate, weight decay
            and name.
        weight_decay: with an optimizer by name a linear head's is ten times that, since its inputs are ten times as
            spread; and Adam's epsilon is `standardised.DAMPING` there. adam and sgd decay as L2 in the loss does (its
            optimum is that of logistic regression with ``C = 10 / (weight_decay * images)`` on standardised features),
            adamw apart from the gradients, which has no such optimum.
        decay_norms: whether biases and norms are decayed as all else.

    Raises:
        ValueError: if nothing trains, for an unknown optimizer, for rates or names that don't fit, or where the
            callable fails, makes an optimizer that calls the loss itself, leaves groups out or gives them rates of
            its own.
        TypeError: if it makes no optimizer.
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
    rates, decays = _by_stage(model, groups, lr, "lr"), _by_stage(model, groups, weight_decay, "weight_decay")
    parameter_groups: dict[tuple[object, ...], dict[str, Any]] = {}
    for place, stage in enumerate(model.ordered):
        parameters = [each for each in stage.parameters() if each.requires_grad] if place >= model.num_frozen else []
        check_trainable(parameters, model.name)
        if not parameters:
            continue
        (name, rate), (named, decay) = rates[place], decays[place]
        settings: dict[str, Any] = {"lr": rate, "weight_decay": decay, "name": name}
        if isinstance(optimizer, str) and linear_head_of(stage) is not None:
            # Its inputs have that spread, so its weights are smaller, and so is what decay does to them.
            settings["weight_decay"] *= SPREAD
            if optimizer in ("adam", "adamw"):
                settings["eps"] = DAMPING
        for each in parameters:
            own = dict(settings)
            if each.ndim <= 1 and not decay_norms:
                own["weight_decay"] = 0.0
            group = parameter_groups.setdefault((name, named, *own.items()), {"params": [], **own})
            group["params"].append(each)
    if not parameter_groups:
        raise ValueError(
            "Everything is frozen, so there is nothing to train. Freeze less: freeze_to(...) or unfreeze()."
        )
    given = [*parameter_groups.values()]
    if isinstance(optimizer, str):
        return OPTIMIZERS[optimizer](given)
    made = _made_by(optimizer, given)
    _check_made(made, given)
    return made


def _made_by(make: MakeOptimizer, groups: Sequence[dict[str, Any]]) -> Optimizer:
    """What a person's callable makes of parameter groups.

    Raises:
        ValueError: if it fails, or makes an optimizer that computes the loss several times a step: here a step is of a
            loss that is there.
        TypeError: if it makes something else.
    """
    name = getattr(make, "__name__", type(make).__name__)
    try:
        made: object = make(groups)
    except Exception as error:  # a person's own code may raise anything
        raise ValueError(
            f"The optimizer {name} fails on the parameter groups ({error}). Expected what takes a list of groups, each "
            "with params, lr, weight_decay and name, as torch.optim.AdamW does. Make it take them, or choose another: "
            f"{', '.join(OPTIMIZERS)}."
        ) from error
    if not isinstance(made, Optimizer):
        raise TypeError(
            f"The optimizer {name} made {made!r}; expected an instance of torch.optim.Optimizer. Return one: lambda "
            "groups: torch.optim.AdamW(groups)."
        )
    closure = inspect.signature(made.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ValueError(
            f"The optimizer {type(made).__name__} computes the loss itself, several times a step (closure), and a fit "
            "gives it the gradients of one batch. Expected one that steps without. Choose another, such as adamw; of "
            "a linear head training.solvers.logistic_path finds the optimum."
        )
    return made


def _check_made(made: Optimizer, groups: Sequence[dict[str, Any]]) -> None:
    """Checks that a person's optimizer moves what it was given, and at rates that it was given.

    Raises:
        ValueError: if it lacks a parameter, or runs at other rates alone: nothing would show in a fit.
    """
    held = {id(each) for group in made.param_groups for each in group["params"]}
    lacking = sum(each.numel() for group in groups for each in group["params"] if id(each) not in held)
    given, own = ({float(group["lr"]) for group in every} for every in (groups, made.param_groups))
    if not lacking and given & own:
        return
    wrong = (
        f"lacks {lacking:,} of the parameters that train" if lacking else f"runs at {some([*map(str, sorted(own))])}"
    )
    raise ValueError(
        f"The optimizer {type(made).__name__} {wrong}. Expected all groups as they are given, each with its rate "
        f"(here {some([*map(str, sorted(given))])}). Pass them on: lambda groups: "
        f"{type(made).__name__}(groups)."
    )


def _by_stage(
    model: StagedModel, groups: Sequence[LayerGroup], given: LearningRate | WeightDecay, what: str
) -> list[tuple[str, float]]:
    """For each stage the name under which it was given a number, and the number.

    Raises:
        ValueError: for a name that there isn't, and where what trains has none.
    """
    group_of = {place: group for group in groups for place in group.stages}
    # Stages outside of any group have no parameters.
    labels = [group_of[place].name if place in group_of else "" for place in range(len(model.stages))]
    if not isinstance(given, Mapping):
        spread_ = spread(given, len(groups)) if what == "lr" else _one_each(given, groups)
        by_group = {group.name: number for group, number in zip(groups, spread_, strict=True)}
        return [(label, by_group.get(label, 0.0)) for label in labels]
    rates = {name: float(number) for name, number in zip(given, numbers(given), strict=True)}
    if what == "lr":
        spread([*rates.values()], len(rates))  # positive
    names = [
        [name for name in (*_paths(stage), label) if name in rates]
        for stage, label in zip(model.ordered, labels, strict=True)
    ]
    unknown = [name for name in rates if not any(name in own for own in names)]
    if unknown:
        stages = [*dict.fromkeys(stage.name.split(".")[0] for stage in model.ordered if has_weights(stage))]
        raise ValueError(
            f"{what} names {some(unknown)}, which {model.name} has neither as a layer group ("
            f"{', '.join(group.name for group in groups)}) nor as a stage: {some(stages)}. Correct it."
        )
    missing = [
        stage.name
        for place, stage in enumerate(model.ordered)
        if place >= model.num_frozen and has_weights(stage) and not names[place]
    ]
    if missing:
        raise ValueError(
            f"{what} says nothing of {some(missing)}, which {'trains' if len(missing) == 1 else 'train'}. Name all "
            "that trains, by stage or by layer group, or freeze more."
        )
    return [(own[0], rates[own[0]]) if own else ("", 0.0) for own in names]


def _paths(stage: Stage) -> list[str]:
    """The names that stand for a stage, the longest first: its own, its aliases, and what these lie below."""
    names = {
        ".".join(parts[:end])
        for parts in (name.split(".") for name in (stage.name, *stage.aliases))
        for end in range(1, len(parts) + 1)
    }
    return sorted(names, key=lambda name: (-len(name), name))


def _one_each(weight_decay: float | Sequence[float], groups: Sequence[LayerGroup]) -> list[float]:
    decays = numbers(weight_decay)
    if len(decays) == 1:
        return decays * len(groups)
    if len(decays) != len(groups):
        raise ValueError(
            f"weight_decay has {len(decays)} numbers; this model has {len(groups)} layer groups, frozen ones included: "
            f"{', '.join(group.name for group in groups)}. Give one, or {len(groups)}."
        )
    return decays


def numbers(lr: LearningRate) -> list[float]:
    """The rates that `lr` names.

    Raises:
        ValueError: if it isn't of numbers.
    """
    try:
        if isinstance(lr, Mapping):
            return [float(rate) for rate in lr.values()]
        return [float(lr)] if isinstance(lr, Real | str) else [float(rate) for rate in lr]  # type: ignore[union-attr]
    except (TypeError, ValueError) as error:
        raise ValueError(f"lr is {lr!r}; expected numbers, for example 3e-3 or (1e-5, 1e-3).") from error


def as_fact(given: LearningRate | WeightDecay) -> Json:
    """Rates or weight decays as a JSON value."""
    if isinstance(given, Mapping):
        return dict(zip(given, numbers(given), strict=True))
    return numbers(given)
