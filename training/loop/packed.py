"""Packed: heads of like shape trained together, their weights stacked and each batch read once for all of them.

What each comes to is what it comes to alone, up to rounding: of wider products sums are taken in another order.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featstore.models.stages import HeadStage
from training.inputs.batches import Batches
from training.loop.copies import put_back, tensors_of
from training.loop.fit import Draws, check_any
from training.loop.fitting import Begun
from training.loop.history import Record
from training.loop.losses import separate
from training.loop.optim import OPTIMIZERS
from training.loop.steps import check_finite
from training.schedules import Setting
from training.scores.metrics import Loss, loss_number, metric_values
from training.standardised import LinearHead, ValueHead

_SCORED_BYTES = 1 << 30
"""Logits that are held at a time while heads are scored; the images are read again for more."""

Scalars = float | Tensor
"""One number for all heads, or one for each, ``(H, 1)``."""


def likeness(fit: Begun) -> tuple[object, ...] | None:
    """What a fit has in common with those that it can be packed with; None for one that can't be packed.

    Packed are linear heads, and those of linear layers, batch norm, dropout and ReLU in sequence, by a plain step of
    one of `OPTIMIZERS`, alone behind what is frozen.
    """
    fitting, plan = fit.fitting, fit.fitting.plan
    layers = _layers(fitting.tail)
    is_plain = (plan.accumulate, plan.clip, plan.average, plan.checkpoint, plan.snapshot) == (1, None, None, None, None)
    if layers is None or not is_plain or fit.ranks is not None or plan.precision == "fp16":
        return None
    if not isinstance(fitting.optimizer, str) or fitting.optimizer not in OPTIMIZERS:
        return None
    shapes = [(name, tuple(each.shape), each.dtype) for name, each in tensors_of(fitting.tail)]
    return (fitting.optimizer, plan.precision, *shapes, *(_settings(each) for _, each in layers))


class Together:
    """Several fits that read the same batches, under way; those that are alike are packed.

    Args:
        fits: at their start, each with a `likeness`; the first one's batches are those of all.
    """

    def __init__(self, fits: Sequence[Begun]) -> None:
        self._train, self._seed, self._epoch = fits[0].fitting.train, fits[0].fitting.seed, 0
        self.failures: dict[int, FloatingPointError] = {}
        """Why the fits, by their place, ended whose loss was no longer finite."""
        # Heads of one loss lie side by side in a pack, for what computes it of them together.
        numbered = sorted(
            enumerate(fits), key=lambda each: (repr(likeness(each[1])), str(_LossKey(each[1].steps.loss).facts))
        )
        packs = groupby(numbered, key=lambda each: likeness(each[1]))
        self._packs = [_Pack([*pack]) for _, pack in packs]

    @property
    def places(self) -> list[int]:
        """The fits that are under way, by their places."""
        return sorted(place for pack in self._packs for place in pack.places)

    def go_on(self, until: int | None = None) -> None:
        """The epochs up to the number `until`, from 1, or all that are left.

        A fit that is over has its weights in its model then, and is under way no more.

        Raises:
            FeatureStoreError: when not one image of an epoch could be read.
        """
        while self.places and (until is None or self._epoch < until):
            self._run_epoch()
            self.end([place for pack in self._packs for place in pack.places if pack.fit_at(place).is_over])

    def end(self, places: Iterable[int]) -> None:
        """Ends fits where they are, as if this had been their last epoch."""
        ended = {*places}
        for pack in self._packs:
            pack.settle(ended & {*pack.places})
        self._packs = [pack for pack in self._packs if pack.places]

    def _run_epoch(self) -> None:
        train, started, count = self._train, time.perf_counter(), len(self.places)
        device, number = train.device, train.pass_before(self._epoch)
        num_rows: list[int] = []
        for pack in self._packs:
            pack.begin_epoch(lambda: Draws.seeded(self._seed, number, device))
        for inputs, targets in train.epoch(self._seed, self._epoch):
            num_rows.append(len(targets))
            for pack in self._packs:
                pack.step(inputs, targets)
        check_any(len(num_rows), train)
        for pack in self._packs:
            self.failures |= pack.take_losses(num_rows)
        self.end(self.failures)
        scores = [pack.scores() for pack in self._packs]
        seconds = (time.perf_counter() - started) / count
        for pack, found in zip(self._packs, scores, strict=True):
            pack.end_epoch(found, seconds)
        self._epoch += 1


@dataclass(eq=False, kw_only=True)
class _Moments:
    """What an optimizer keeps of a parameter: averages of its gradients and of their squares, or a velocity."""

    first: Tensor
    second: Tensor | None


class _Pack:
    """Fits that are alike, under way: each tensor of their heads stacked, ``(H, ...)``.

    Attributes:
        places: numbers of the fits, in the order of the stack.
    """

    def __init__(self, fits: Sequence[tuple[int, Begun]]) -> None:
        self.places = [place for place, _ in fits]
        self._fits = [fit for _, fit in fits]
        first = self._fits[0].fitting
        layers = _layers(first.tail)
        assert layers is not None
        self._layers, self._device = layers, first.train.device
        self._optimizer, self._precision = first.optimizer, first.plan.precision
        tails = [dict(tensors_of(fit.fitting.tail)) for fit in self._fits]
        self._tensors = {name: torch.stack([tail[name].detach() for tail in tails]) for name in tails[0]}
        self._parameters = [name for name, _ in first.tail.named_parameters()]
        for name in self._parameters:
            self._tensors[name].requires_grad_()
        self._moments = {name: self._unmoved(self._tensors[name]) for name in self._parameters}
        self._num_steps = 0
        self._drawn: list[tuple[tuple[float, ...], Draws]] = []
        self._losses: list[Tensor] = []
        self._regroup()

    def fit_at(self, place: int) -> Begun:
        """A fit by its number."""
        return self._fits[self.places.index(place)]

    def begin_epoch(self, seeded: Callable[[], Draws]) -> None:
        """Before an epoch; `seeded` gives what a head's dropout draws from in it."""
        self._drawn = [(rates, seeded()) for rates in dict.fromkeys(self._rates)]
        for fit in self._fits:
            if fit.course.begins_cycle(fit.progress.epoch):
                fit.progress.cycle_start = self._num_steps

    def step(self, inputs: Tensor, targets: Tensor) -> None:
        """One step of each head on a batch."""
        with self._narrow():
            logits = self._forward(inputs, self._masks(inputs))
        losses = self._separate(logits.float(), targets)
        losses.sum().backward()  # type: ignore[no-untyped-call]
        settings = [fit.course.at(fit.progress.epoch, self._num_steps - fit.progress.cycle_start) for fit in self._fits]
        self._num_steps += 1
        with torch.no_grad():
            for name in self._parameters:
                self._move(name, [own[of[name]] for own, of in zip(settings, self._group_of, strict=True)])
        self._losses.append(losses.detach())
        for fit, own in zip(self._fits, settings, strict=True):
            fit.progress.history.ran_at(_ran(fit.steps.optimizer.param_groups[-1], own[-1]))

    def take_losses(self, num_rows: Sequence[int]) -> dict[int, FloatingPointError]:
        """Puts the epoch's losses on record, of batches of `num_rows`; of each fit that has lost its way, why."""
        failures = {}
        by_head = torch.stack(self._losses, dim=1).tolist()
        self._losses.clear()
        for place, fit, losses in zip(self.places, self._fits, by_head, strict=True):
            fit.progress.epoch_losses = [*zip(losses, num_rows, strict=True)]
            fit.progress.history.losses += losses
            try:
                check_finite(*losses)
            except FloatingPointError as error:
                failures[place] = error
        return failures

    def scores(self) -> list[Record]:
        """What the validation images give of each head: loss and metrics; nothing without such images."""
        first = self._fits[0].fitting
        valid = first.valid
        if valid is None:
            return [{} for _ in self._fits]
        assert valid.targets is not None
        several = max(1, _SCORED_BYTES // (4 * valid.num_images * self._num_logits))
        found: list[Record] = []
        for start in range(0, len(self._fits), several):
            own = self._fits[start : start + several]
            logits, targets = self._outputs(valid, slice(start, start + several))
            for fit, each in zip(own, logits.unbind(1), strict=True):
                fitting, each = fit.fitting, each.contiguous()
                loss = loss_number(fitting.loss, each, targets)
                found.append({"valid_loss": loss, **metric_values(fitting.metrics, each, targets)})
        return found

    def end_epoch(self, scores: Sequence[Record], seconds: float) -> None:
        """Puts the epoch of each fit on record, and tells who listens."""
        for place, (fit, scored) in enumerate(zip(self._fits, scores, strict=True)):
            progress, plan = fit.progress, fit.fitting.plan
            rows = sum(count for _, count in progress.epoch_losses)
            record: Record = {
                "epoch": progress.first_epoch + progress.epoch + 1,
                "train_loss": sum(loss * count for loss, count in progress.epoch_losses) / rows,
                "lr": progress.history.lrs[-1],
                **scored,
                "seconds": seconds,
            }
            progress.add(record, plan.keep, partial(self._of, place))
            for listener in plan.listeners:
                listener(dict(record))

    def settle(self, places: Collection[int]) -> None:
        """Gives the models of some fits the weights that remain, and takes them out of the stack."""
        if not places:
            return
        for where in map(self.places.index, places):
            fit = self._fits[where]
            put_back(fit.fitting.tail, fit.progress.best or self._of(where))
        kept = [where for where, place in enumerate(self.places) if place not in places]
        self.places = [self.places[each] for each in kept]
        self._fits = [self._fits[each] for each in kept]
        for name, stacked in self._tensors.items():
            self._tensors[name] = stacked.detach()[kept].requires_grad_(stacked.requires_grad)
        for name, moments in self._moments.items():
            second = None if moments.second is None else moments.second[kept]
            self._moments[name] = _Moments(first=moments.first[kept], second=second)
        self._regroup()

    # ------------------------------------------------------------------------------------------------------- inside

    def _regroup(self) -> None:
        """Takes what follows from which heads there are."""
        self._rates = [tuple(each.p for _, each in _dropouts(fit)) for fit in self._fits]
        self._group_of = [_group_of(fit) for fit in self._fits]
        self._options = [fit.steps.optimizer.param_groups for fit in self._fits]
        self._losses_of = [_LossKey(fit.steps.loss) for fit in self._fits]
        self._are_standardised_alike = all(
            bool((self._tensors[f"{name}{what}"] == self._tensors[f"{name}{what}"][:1]).all())
            for name, module in self._layers
            if isinstance(module, LinearHead)
            for what in ("mean", "scale")
        )

    @property
    def _num_logits(self) -> int:
        return max(1, *(each.out_features for _, each in self._layers if isinstance(each, nn.Linear)))

    def _of(self, place: int) -> dict[str, Tensor]:
        """A copy of the tensors of one head."""
        return {name: stacked.detach()[place].clone() for name, stacked in self._tensors.items()}

    def _narrow(self) -> AbstractContextManager[object]:
        return torch.autocast(self._device.type, torch.bfloat16) if self._precision == "bf16" else nullcontext()

    def _masks(self, inputs: Tensor) -> Iterator[Tensor]:
        """Of each layer of dropout what it multiplies by, drawn as each head alone draws it.

        ``(n, F)`` where that is one for all heads, else ``(H, n, F)``.
        """
        widths = [width for _, width in self._dropout_widths(inputs.shape[-1])]
        if not widths:
            return iter(())
        by_rates = {}
        for rates, draws in self._drawn:
            with draws.taken():
                by_rates[rates] = [
                    F.dropout(torch.ones(len(inputs), width, device=self._device), rate)
                    for rate, width in zip(rates, widths, strict=True)
                ]
        if len(by_rates) == 1:
            return iter(next(iter(by_rates.values())))
        return (torch.stack([by_rates[rates][layer] for rates in self._rates]) for layer in range(len(widths)))

    def _dropout_widths(self, width: int) -> Iterator[tuple[str, int]]:
        for name, module in self._layers:
            if isinstance(module, nn.Linear):
                width = module.out_features
            if isinstance(module, nn.Dropout):
                yield name, width

    def _forward(self, rows: Tensor, masks: Iterator[Tensor] | None, some: slice = slice(None)) -> Tensor:
        """Logits ``(n, H, K)`` of heads for rows ``(n, F)``; with masks as in training, else as in eval mode."""
        for name, module in self._layers:
            own = {
                each.removeprefix(name): tensor[some]
                for each, tensor in self._tensors.items()
                if each.startswith(name) and "." not in each.removeprefix(name)
            }
            if isinstance(module, nn.BatchNorm1d):
                rows = _normed(module, own, rows, is_training=masks is not None)
            elif isinstance(module, nn.Dropout):
                rows = rows if masks is None else rows * next(masks)
            elif isinstance(module, nn.ReLU):
                rows = F.relu(rows)
            elif isinstance(module, nn.Linear):
                if isinstance(module, LinearHead):
                    rows = self._standardised(own, rows)
                rows = _products(own, rows)
            else:  # a head for regression, whose numbers are in units of the targets' spread
                rows = rows * own["scale"][:, None] + own["mean"][:, None]
        return rows.transpose(0, 1)

    def _standardised(self, own: dict[str, Tensor], rows: Tensor) -> Tensor:
        if self._are_standardised_alike:
            return (rows - own["mean"][0]) * own["scale"][0]
        return (rows - own["mean"][:, None]) * own["scale"][:, None]

    def _separate(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The loss of each head."""
        losses: list[Tensor] = []
        start = 0
        for key, several in groupby(self._losses_of):
            count = len([*several])
            losses.append(separate(key.loss, logits[:, start : start + count], targets))
            start += count
        return losses[0] if len(losses) == 1 else torch.cat(losses)

    def _outputs(self, valid: Batches, some: slice) -> tuple[Tensor, Tensor]:
        logits: list[Tensor] = []
        rows: list[Tensor] = []
        with torch.no_grad():
            for inputs, numbers in valid.in_order():
                logits.append(self._forward(inputs, None, some).float())
                rows.append(torch.from_numpy(numbers))
        check_any(len(rows), valid)
        assert valid.targets is not None
        return torch.cat(logits), valid.targets[torch.cat(rows)].to(valid.device)

    # ---------------------------------------------------------------------------------------------------- optimizers

    def _unmoved(self, parameter: Tensor) -> _Moments:
        zeros = torch.zeros_like(parameter)
        return _Moments(first=zeros, second=None if self._optimizer == "sgd" else torch.zeros_like(parameter))

    def _move(self, name: str, settings: Sequence[Setting]) -> None:
        """A step of one parameter of all heads, by its gradient; each head at its own setting."""
        parameter, moments = self._tensors[name], self._moments[name]
        assert parameter.grad is not None
        groups = [options[of[name]] for options, of in zip(self._options, self._group_of, strict=True)]
        values, gradient, first = (
            each.view(len(parameter), -1) for each in (parameter.detach(), parameter.grad, moments.first)
        )
        numbers = _Numbers(groups, settings, values)
        if moments.second is None:
            _move_by_sgd(values, gradient, first, numbers, is_first=self._num_steps == 1)
        else:
            second, is_decoupled = moments.second.view(len(parameter), -1), self._optimizer == "adamw"
            _move_by_adam(values, gradient, first, second, numbers, self._num_steps, is_decoupled)
        parameter.grad = None


class _LossKey:
    """A loss by what it computes: those of one setting are equal, though each learner has made its own."""

    def __init__(self, loss: Loss) -> None:
        self.loss = loss
        options = loss.keywords if isinstance(loss, partial) else {}
        self.facts = (
            loss.func if isinstance(loss, partial) else loss,
            [(name, each.tolist() if isinstance(each, Tensor) else each) for name, each in sorted(options.items())],
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _LossKey) and self.facts == other.facts

    def __hash__(self) -> int:
        return hash(self.facts[0])


class _Numbers:
    """The settings of a step of several heads: each a number where it is the same for all, else a column."""

    def __init__(self, groups: Sequence[dict[str, Any]], settings: Sequence[Setting], like: Tensor) -> None:
        self._groups, self._settings, self._like = groups, settings, like

    def of(self, number: Callable[[dict[str, Any], Setting], float]) -> Scalars:
        """What `number` says of each head's parameter group and setting."""
        found = [number(group, setting) for group, setting in zip(self._groups, self._settings, strict=True)]
        if all(each == found[0] for each in found):
            return found[0]
        return torch.tensor(found, dtype=self._like.dtype).to(self._like.device, non_blocking=True)[:, None]


def _move_by_adam(
    values: Tensor,
    gradient: Tensor,
    first: Tensor,
    second: Tensor,
    numbers: _Numbers,
    step: int,
    is_decoupled: bool,
) -> None:
    """A step of Adam or AdamW in place, the operations in torch's order."""

    def beta(group: dict[str, Any], setting: Setting) -> float:
        return float(group["betas"][0] if setting.momentum is None else setting.momentum)

    decay = numbers.of(lambda group, setting: group["weight_decay"])
    if is_decoupled:
        values.mul_(numbers.of(lambda group, setting: 1 - setting.lr * group["weight_decay"]))
    elif isinstance(decay, Tensor) or decay:
        gradient = gradient + decay * values
    # The share of the new gradient; `lerp_` takes a tensor or a number.
    first.lerp_(gradient, numbers.of(lambda group, setting: 1 - beta(group, setting)))
    late = numbers.of(lambda group, setting: group["betas"][1])
    assert not isinstance(late, Tensor)  # nothing sets it
    second.mul_(late).addcmul_(gradient, gradient, value=1 - late)
    scale = second.sqrt()
    scale.div_(math.sqrt(1 - late**step)).add_(numbers.of(lambda group, setting: group["eps"]))
    size = numbers.of(lambda group, setting: -setting.lr / (1 - beta(group, setting) ** step))
    if isinstance(size, Tensor):
        values.add_(torch.div(first, scale, out=scale).mul_(size))
    else:
        values.addcdiv_(first, scale, value=size)


def _move_by_sgd(values: Tensor, gradient: Tensor, velocity: Tensor, numbers: _Numbers, *, is_first: bool) -> None:
    """A step of SGD with momentum in place, as torch's: the first gradient is the first velocity."""
    decay = numbers.of(lambda group, setting: group["weight_decay"])
    if isinstance(decay, Tensor) or decay:
        gradient = gradient + decay * values
    if is_first:
        velocity.copy_(gradient)
    else:
        velocity.mul_(
            numbers.of(
                lambda group, setting: float(group["momentum"] if setting.momentum is None else setting.momentum)
            )
        ).add_(gradient)
    values.sub_(velocity * numbers.of(lambda group, setting: setting.lr))


def _products(own: dict[str, Tensor], rows: Tensor) -> Tensor:
    """``(H, n, out)`` of a linear layer: one wide product where all heads are given the same rows ``(n, F)``."""
    weight, bias = own["weight"], own.get("bias")
    num_heads, width, _ = weight.shape
    if rows.ndim == 2:
        flat = None if bias is None else bias.reshape(-1)
        return F.linear(rows, weight.reshape(num_heads * width, -1), flat).view(-1, num_heads, width).transpose(0, 1)
    if bias is None:
        return torch.bmm(rows, weight.transpose(1, 2))
    return torch.baddbmm(bias[:, None], rows, weight.transpose(1, 2))


def _normed(module: nn.BatchNorm1d, own: dict[str, Tensor], rows: Tensor, *, is_training: bool) -> Tensor:
    """``(H, n, F)`` behind a batch norm; the statistics of each head move as torch moves them."""
    mean, var = own["running_mean"], own["running_var"]
    num_heads, width = mean.shape
    if is_training:
        own["num_batches_tracked"] += 1
    wide = rows.expand(num_heads, *rows.shape) if rows.ndim == 2 else rows
    channels = wide.transpose(0, 1).reshape(-1, num_heads * width)
    weight, bias = (own[name].reshape(-1) for name in ("weight", "bias"))
    moving = mean.view(-1), var.view(-1)
    momentum = 0.0 if module.momentum is None else module.momentum
    values = F.batch_norm(channels, *moving, weight, bias, is_training, momentum, module.eps)
    return values.view(-1, num_heads, width).transpose(0, 1)


def _layers(tail: nn.Module) -> list[tuple[str, nn.Module]] | None:
    """The layers of a head that is all of `tail`, in order, with what the names of their tensors begin with."""
    if not _is_plain(tail):
        return None
    stages = [*tail.named_children()]
    name, stage = stages[0] if len(stages) == 1 else ("", None)
    return _layers_of(stage.module, f"{name}.module.") if isinstance(stage, HeadStage) else None


def _layers_of(module: nn.Module, name: str) -> list[tuple[str, nn.Module]] | None:
    if type(module) is ValueHead:
        inner = _layers_of(module.head, f"{name}head.")
        return None if inner is None else [*inner, (name, module)]
    if type(module) is nn.Sequential:
        repeated = module.named_modules(remove_duplicate=False)  # a layer that is used twice runs twice
        found = [(f"{name}{child}.", layer) for child, layer in repeated if child]
        return found if all(_is_known(layer) for _, layer in found) else None
    return [(name, module)] if type(module) is LinearHead else None


def _is_plain(tail: nn.Module) -> bool:
    """Whether each parameter trains, in one place, and nothing is hooked in between."""
    parameters = [*tail.parameters()]
    is_shared = len([*tail.named_parameters(remove_duplicate=False)]) > len(parameters)
    is_hooked = any(each._forward_hooks or each._forward_pre_hooks for each in tail.modules())
    return not is_shared and not is_hooked and all(each.requires_grad for each in parameters)


def _is_known(layer: nn.Module) -> bool:
    if type(layer) is nn.BatchNorm1d:
        return layer.affine and layer.track_running_stats and layer.momentum is not None
    return type(layer) in (nn.Linear, nn.Dropout, nn.ReLU)


def _settings(layer: nn.Module) -> tuple[object, ...]:
    """What of a layer isn't in its tensors, but for the rate of a dropout, which may differ."""
    return type(layer), getattr(layer, "eps", None), getattr(layer, "momentum", None)


def _dropouts(fit: Begun) -> list[tuple[str, nn.Dropout]]:
    return [(name, each) for name, each in _layers(fit.fitting.tail) or () if isinstance(each, nn.Dropout)]


def _group_of(fit: Begun) -> dict[str, int]:
    """Name of a parameter -> the place of its group in the fit's optimizer."""
    place_of = {
        id(each): place for place, group in enumerate(fit.steps.optimizer.param_groups) for each in group["params"]
    }
    return {name: place_of[id(each)] for name, each in fit.fitting.tail.named_parameters()}


def _ran(group: dict[str, Any], setting: Setting) -> dict[str, Any]:
    """A parameter group as it is while a step runs at `setting`."""
    ran = {**group, "lr": setting.lr}
    if setting.momentum is not None and "betas" in group:
        ran["betas"] = (setting.momentum, group["betas"][1])
    elif setting.momentum is not None and group.get("momentum"):
        ran["momentum"] = setting.momentum
    return ran
