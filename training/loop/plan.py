"""Plan: what one fit is asked for, checked before anything is read or computed.

A new option is a line of `FitOptions` and a field of `Plan`: `Learner.fit`, `fit_cycles` and `lr_find` take it then.
"""

from __future__ import annotations

import difflib
import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypedDict, TypeVar

from featstore.digest import Json
from featstore.models.runs import check_free
from training import schedules
from training.loop import settings
from training.loop.averages import SWA, Averaging
from training.loop.history import Record
from training.loop.losses import ClassWeights
from training.loop.optim import LearningRate, WeightDecay, as_fact
from training.loop.steps import StepOptions, TrainingPrecision
from training.mixing import BatchChange, as_changes

Listener: TypeAlias = Callable[[Record], Any]
AnyCallable = TypeVar("AnyCallable", bound=Callable[..., Any])


class FitOptions(TypedDict, total=False):
    """How a fit is done, beside its epochs and its rate; `Learner.lr_find` takes the same, and heeds what changes it.

    Attributes:
        schedule: a key of `schedules.SCHEDULES`: one_cycle (torch's defaults), cosine, constant, and more; gone through
            once a cycle. Default: one_cycle of `Learner.fit`, cosine of `Learner.fit_cycles`.
        weight_decay: 0.01 of all but biases and norms; one number, one a layer group, or by the names of layer groups
            or stages, as a rate. `optim.build` says what it is of a linear head.
        decay_norms: whether biases and norms are decayed too.
        on_epoch_end: gets each epoch's record; a function, or several in a list. `training.trackers` has some.
        keep: the weights that remain: of the ``last`` epoch, or of the ``best`` by `monitor`.
        monitor: the number on record that says how good an epoch was: valid_loss, train_loss or a metric; of a metric
            of your own with its better direction, ("name", "max") or ("name", "min").
        patience: ends the fit after so many epochs in a row that weren't better than the best; None: never.
        label_smoothing: share of each target that goes to all classes alike, in training steps; losses of scores are
            without it.
        class_weights: of training steps, one a class in their order or by name, ``{"cat": 1.0, "dog": 2.5}``; or
            ``balanced``: as often as a class is rarer.
        clip: highest norm of all gradients of a step together; None: any.
        accumulate: batches a step. Their gradients are those of one batch so many times as large (with class weights
            nearly: each batch counts by its rows); the schedule counts steps.
        precision: of training steps: fp32, or mixed with bf16 or fp16 (`torch.autocast`). Scores are computed in fp32.
        batch_norm: of thawed stages before the head: ``train``, by the statistics of each batch, or ``frozen``, by
            those that it has, which stay; its weights train in either. That of frozen stages is always frozen.
        average: `EMA` or `SWA`: a mean of the weights, which is scored and remains.
        mix: `Mixup`, `CutMix`, `FeatureNoise`, `FeatureBrightness`: changes of each batch in training, one or several
            in a list. A loss of your own is given the mixed targets: probabilities ``(n, K)`` instead of class
            numbers; mixed n-hot targets or numbers.
        sampling: the images of a pass: ``shuffled``, or as many drawn so that each class is as likely as any other,
            ``balanced``.
        checkpoint: a folder that the fit is kept in, after each epoch and where Ctrl-C, SIGTERM or SIGHUP ends it
            (after the step; a second signal ends it at once). It stays when the fit is done: delete it.
        resume: goes on from the checkpoint, if there is one, to the weights and history that the fit would have
            come to without interruption: bit for bit on the same CPU, with as many threads and the same torch.
    """

    schedule: str
    weight_decay: WeightDecay
    decay_norms: bool
    on_epoch_end: Listener | Sequence[Listener] | None
    keep: Literal["last", "best"]
    monitor: str | tuple[str, str]
    patience: int | None
    label_smoothing: float
    class_weights: ClassWeights | None
    clip: float | None
    accumulate: int
    precision: TrainingPrecision
    batch_norm: Literal["train", "frozen"]
    average: Averaging | None
    mix: BatchChange | Sequence[BatchChange] | None
    sampling: Literal["shuffled", "balanced"]
    checkpoint: str | os.PathLike[str] | None
    resume: bool


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a fit is asked for. What isn't described here is as in `FitOptions`.

    Attributes:
        cycles: epochs of each cycle; a fit without cycles is one.
        lr: None: what the finder suggests.
        snapshot: folder of the runs that are saved at the ends of cycles, or None.
    """

    cycles: tuple[int, ...] = (1,)
    lr: LearningRate | None = None
    snapshot: str | os.PathLike[str] | None = None
    schedule: str = "one_cycle"
    weight_decay: WeightDecay = 0.01
    decay_norms: bool = False
    on_epoch_end: Listener | Sequence[Listener] | None = None
    keep: Literal["last", "best"] = "last"
    monitor: str | tuple[str, str] = "valid_loss"
    patience: int | None = None
    label_smoothing: float = 0.0
    class_weights: ClassWeights | None = None
    clip: float | None = None
    accumulate: int = 1
    precision: TrainingPrecision = "fp32"
    batch_norm: Literal["train", "frozen"] = "train"
    average: Averaging | None = None
    mix: BatchChange | Sequence[BatchChange] | None = ()
    sampling: Literal["shuffled", "balanced"] = "shuffled"
    checkpoint: str | os.PathLike[str] | None = None
    resume: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "cycles", tuple(settings.checked("epochs", each) for each in self.cycles))
        object.__setattr__(self, "weight_decay", _checked_decay(self.weight_decay))
        for name in (*_LATER, "keep", "checkpoint", "snapshot"):
            object.__setattr__(self, name, settings.checked(name, getattr(self, name)))
        for listener in self.listeners:
            settings.checked("on_epoch_end", listener)
        if not isinstance(self.decay_norms, bool):  # any text would be true
            raise TypeError(f"decay_norms is {self.decay_norms!r}; expected True or False.")
        object.__setattr__(self, "mix", as_changes(self.mix))
        schedules.check(self.schedule)
        if self.resume and self.checkpoint is None:
            raise ValueError("resume needs a checkpoint to go on from. Give it: checkpoint=.")
        if isinstance(self.average, SWA) and self.batch_norm == "frozen":
            raise ValueError(
                "SWA takes the statistics of batch norm anew for the mean of the weights, and batch_norm is frozen. "
                'Take EMA, or batch_norm="train".'
            )
        if isinstance(self.average, SWA) and (self.keep, self.patience) != ("last", None):
            raise ValueError(
                "SWA is the mean of a fit's last epochs, so there is no best of them to keep or to wait for. Leave "
                "keep and patience out, or take EMA."
            )

    @property
    def changes(self) -> tuple[BatchChange, ...]:
        """Those of each batch."""
        return as_changes(self.mix)

    @property
    def steps(self) -> StepOptions:
        """How steps are made."""
        return StepOptions(
            clip=self.clip, accumulate=self.accumulate, precision=self.precision, batch_norm=self.batch_norm
        )

    @property
    def listeners(self) -> tuple[Listener, ...]:
        """What gets each epoch's record, in the order given."""
        given = self.on_epoch_end
        if given is None:
            return ()
        return tuple(given) if isinstance(given, Sequence) else (given,)

    @property
    def folder(self) -> Path | None:
        """Of the checkpoint."""
        return None if self.checkpoint is None else Path(self.checkpoint)

    def run_of(self, cycle: int) -> Path:
        """Where the snapshot at the end of a cycle, from 1, is saved."""
        assert self.snapshot is not None
        return Path(self.snapshot) / f"cycle-{cycle}"

    def check_snapshots(self, *, goes_on: bool) -> None:
        """Checks that they can be saved; what a fit that goes on has saved before may be there.

        Raises:
            FeatureStoreError: if runs are there.
        """
        if self.snapshot is not None:
            for cycle in range(1, len(self.cycles) + 1):
                check_free(self.run_of(cycle), overwrite=goes_on)

    def settings(self) -> dict[str, Json]:
        """All of it that decides values, by names without levels, defaults too: by these a run is found again."""
        names = [each.name for each in fields(self) if each.name not in _NOT_SETTINGS]
        epochs: dict[str, Json] = {"epochs": sum(self.cycles)}
        cycles: dict[str, Json] = {"cycles": list(self.cycles)} if len(self.cycles) > 1 else {}
        return {**epochs, **cycles, **{name: _flat(getattr(self, name)) for name in names}}

    def facts(self) -> dict[str, Json]:
        """What of it decides values, as JSON values; options that came later, only where they aren't the default."""
        later = {name: getattr(self, name) for name, default in _LATER.items() if getattr(self, name) != default}
        return {
            "epochs": list(self.cycles),
            "lr": None if self.lr is None else as_fact(self.lr),
            "schedule": self.schedule,
            "weight_decay": self.weight_decay if isinstance(self.weight_decay, float) else as_fact(self.weight_decay),
            "keep": self.keep,
            **{name: value if isinstance(value, str | int | float) else repr(value) for name, value in later.items()},
        }


_NOT_SETTINGS = ("cycles", "lr", "snapshot", "on_epoch_end", "checkpoint", "resume")
"""What decides no value, or is told in other words: a rate that wasn't given was found."""


def _flat(value: Any) -> Json:
    """A setting as a value without levels: names and their numbers are a text, objects what makes them again."""
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, Mapping):
        return ", ".join(f"{name}={number:g}" for name, number in value.items())
    if isinstance(value, list | tuple):
        return [_flat(each) for each in value] or None
    return repr(value)


def flat_lr(lr: LearningRate) -> Json:
    """A rate as a value without levels: a number, a list, or names and numbers as a text."""
    given = as_fact(lr)
    return given[0] if isinstance(given, list) and len(given) == 1 else _flat(given)


def _checked_decay(given: Any) -> WeightDecay:
    if isinstance(given, Mapping):
        return {name: float(settings.checked("weight_decay", each)) for name, each in given.items()}
    if isinstance(given, list | tuple):
        return tuple(float(settings.checked("weight_decay", each)) for each in given)
    return float(settings.checked("weight_decay", given))


_LATER: dict[str, object] = {
    each.name: each.default
    for each in fields(Plan)
    if each.name in FitOptions.__annotations__
    and each.name not in ("schedule", "weight_decay", "decay_norms", "on_epoch_end", "keep", "checkpoint", "resume")
}


def takes_fit_options(**defaults: object) -> Callable[[AnyCallable], AnyCallable]:
    """Gives a method that takes `FitOptions` the signature that says so: notebooks complete names by it.

    `defaults` are those that the method has and `Plan` hasn't.
    """
    options = [
        inspect.Parameter(
            each.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=defaults.get(each.name, each.default),
            annotation=each.type,
        )
        for each in fields(Plan)
        if each.name in FitOptions.__annotations__
    ]

    def told(method: AnyCallable) -> AnyCallable:
        own = [each for each in inspect.signature(method).parameters.values() if each.kind is not each.VAR_KEYWORD]
        method.__signature__ = inspect.Signature([*own, *options], return_annotation=method.__annotations__["return"])  # type: ignore[attr-defined]
        return method

    return told


def check_options(options: dict[str, Any]) -> None:
    """Checks that each of `options` is one that a fit has.

    Raises:
        TypeError: names what isn't, and what may have been meant.
    """
    known = [*FitOptions.__annotations__]
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise TypeError(f"A fit has no option {name!r}.{hint} Its options are {', '.join(known)}.")
