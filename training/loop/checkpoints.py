"""Checkpoints: a fit as it was after one of its steps, from which it goes on to the same bits.

A checkpoint is a folder, written as a saved run is: whole or not at all, with checksums, the earlier one there until
the later one is. It holds the tensors that train, the optimizer's, the history, and where in which epoch the fit was;
order, views and rates follow from that. It says what the fit is of, and only the same fit goes on from it. Frozen
stages aren't in it, only their digest.
"""

from __future__ import annotations

import dis
import json
import math
import re
import shutil
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import CodeType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from featstore.digest import Json, digest_bytes, digest_json, digest_tensor
from featstore.errors import FactsDifferError, FeatureStoreError
from featstore.models.runs import check_free, located, new_run, read_facts, read_run, write_run
from featstore.source_code import closure_of
from featstore.words import printable
from training.inputs.batches import Batches
from training.inputs.derive import ImageSource
from training.inputs.situation import training_words
from training.loop.averages import Average
from training.loop.copies import put_back, tensors_of
from training.loop.fit import Progress
from training.loop.history import History
from training.loop.interrupts import held_back
from training.loop.monitor import Monitor
from training.loop.ranks import Ranks
from training.loop.steps import Steps

VERSION = 1

_START = "starting weights"
_AS_BEGUN = "Ask for the fit as it was begun"


@dataclass(frozen=True, kw_only=True, eq=False)
class SavedFit:
    """What a checkpoint holds.

    Attributes:
        path: of its folder.
        facts: what the fit is of, by names for people.
        state: the rest of it that isn't tensors.
        tensors: by name.
    """

    path: Path
    facts: Mapping[str, Json]
    state: Mapping[str, Json]
    tensors: Mapping[str, Tensor]

    @property
    def lrs(self) -> list[float]:
        """The highest rate of each parameter group."""
        return list(self.state["lrs"])

    @property
    def first_pass(self) -> int:
        """Passes over training images that were made before the fit."""
        return int(self.state["first_pass"])

    @property
    def is_whole(self) -> bool:
        """Whether no epoch is left to do."""
        return bool(self.state["epoch"] == sum(self.facts["epochs"]))

    def in_words(self) -> str:
        """How far it is."""
        done, all_ = self.state["epoch"], sum(self.facts["epochs"])
        steps = len(self.state["epoch_losses"])
        return f"{done:,} of {all_:,} epochs{f' and {steps:,} steps' * (steps > 0)}"

    def check(self, facts: Mapping[str, Json], tail: nn.Module) -> None:
        """Checks that a fit of `facts` is this one.

        The tail may also be as the checkpoint has it: its owner was interrupted, and goes on.

        Raises:
            FactsDifferError: names the facts that differ.
        """
        own = {name.removeprefix("tail."): each for name, each in self.tensors.items() if name.startswith("tail.")}
        is_there = not self.is_whole and _digest(own) == _digest(dict(tensors_of(tail)))
        differing = [
            f"{name} ({_shown(self.facts.get(name))} there, {_shown(facts.get(name))} here)"
            for name in dict.fromkeys((*self.facts, *facts))
            if self.facts.get(name) != facts.get(name) and not (name == _START and is_there)
        ]
        if differing:
            is_moved = len(differing) == 1 and differing[0].startswith(_START)
            remedy = "Make the learner anew (or load its run), then resume=True" if is_moved else _AS_BEGUN
            raise FactsDifferError(
                f"The checkpoint {self.path} is of another fit than this one; it differs in: {'; '.join(differing)}. "
                f"{remedy}, or delete the checkpoint to begin anew."
            )

    def check_processes(self, ranks: Ranks | None) -> None:
        """Checks that the processes that share the fit are those to go on with; at the end of an epoch any are.

        Raises:
            FactsDifferError: if they are more or fewer within an epoch, of which each has a share.
        """
        before, now = self.state.get("processes", 1), 1 if ranks is None else ranks.count
        if before != now and self.state["epoch_losses"]:
            raise FactsDifferError(
                f"The checkpoint {self.path} is of a fit that ended within an epoch; it differs in: processes "
                f"({before} there, {now} here). Start {before} (torchrun --nproc-per-node {before}), or delete the "
                "checkpoint to begin anew."
            )

    def put_into(
        self,
        tail: nn.Module,
        optimizer: Optimizer,
        train: Batches,
        valid: Batches | None,
        monitor: Monitor,
        *,
        rank: int = 0,
    ) -> Progress:
        """Puts tensors and notes back where they were; the result is where to go on.

        The random states are those of the process `rank`.
        """
        state = self.state
        put_back(tail, self._part("tail."))
        _put_into(optimizer, state["optimizer"], self._part("optimizer."))
        for batches, left_out in zip((train, valid), state["left_out"], strict=True):
            if batches is not None:
                batches.failures |= left_out["failures"]
                batches.doubts |= left_out["doubts"]
        return Progress(
            epoch=state["epoch"],
            first_epoch=state["first_epoch"],
            history=History(
                records=state["records"],
                best_epoch=state["best_epoch"],
                losses=self.tensors["losses"].tolist(),
                monitor=monitor,
                lrs=self._steps("lrs"),
                momenta=self._steps("momenta"),
            ),
            epoch_losses=[(loss, count) for loss, count in state["epoch_losses"]],
            cycle_start=state["cycle_start"],
            lowest=state["lowest"],
            best=self._part("best.") or None,
            random=[*self._part(f"random{_of_rank(rank)}.").values()],
            seconds=state["seconds"],
        )

    def put_beside(self, steps: Steps, average: Average | None) -> None:
        """Puts back what is kept beside weights and optimizer."""
        steps.put_back(self.state.get("scale", {}))
        if average is not None:
            average.put_back(self._part("average."))

    def _steps(self, name: str) -> array[float]:
        """A number of each step so far; NaN where an earlier version didn't keep it."""
        nothing = torch.full_like(self.tensors["losses"], math.nan)
        return array("d", self.tensors.get(name, nothing).tolist())

    def _part(self, prefix: str) -> dict[str, Tensor]:
        found = {name.removeprefix(prefix): each for name, each in self.tensors.items() if name.startswith(prefix)}
        return dict(sorted(found.items()))


def read_fit(path: Path, *, resume: bool) -> SavedFit | None:
    """The fit to go on with, which the checkpoint `path` holds; None if there is no checkpoint.

    Long work should learn first that it can't be written.

    Raises:
        FeatureStoreError: if there is one and it isn't to be gone on with, or something else lies there.
        DamagedFileError: if it isn't what was saved.
    """
    place = located(path)
    if not place.exists() or (place.is_dir() and not any(place.iterdir())):
        check_free(path, overwrite=False)
        return None
    run = read_run(path)
    if "checkpoint" not in run.facts:
        raise FeatureStoreError(f"{path} is a saved run and no checkpoint. Choose another place for the checkpoint.")
    if run.facts["checkpoint"] > VERSION:
        raise FeatureStoreError(
            f"{path} is a checkpoint of version {run.facts['checkpoint']}; this featstore reads up to {VERSION}. "
            "Upgrade featstore."
        )
    saved = SavedFit(path=path, facts=run.facts["fit"], state=json.loads(run.facts["state"]), tensors=run.tensors)
    if not resume:
        raise FeatureStoreError(
            f"{path} holds a fit, {saved.in_words()} done. Go on with it: --resume (in Python: resume=True); or delete "
            "it to begin anew."
        )
    check_free(path, overwrite=True)
    return saved


def holds_fit(path: Path) -> bool:
    """Whether `path` is a checkpoint, whole or damaged.

    Raises:
        FeatureStoreError: if something is there that is no run either.
    """
    place = located(path)
    return place.is_dir() and any(place.iterdir()) and "checkpoint" in read_facts(path)


def delete_fit(path: Path) -> None:
    """Deletes the checkpoint `path`, if there is one; anything else that lies there stays."""
    if holds_fit(path):
        shutil.rmtree(located(path))


@contextmanager
def interruptible(
    path: Path | None,
    facts: Mapping[str, Json],
    tail: nn.Module,
    steps: Steps,
    average: Average | None,
    lrs: list[float],
    train: Batches,
    valid: Batches | None,
    ranks: Ranks | None = None,
) -> Iterator[dict[str, Any]]:
    """How `run_epochs` keeps a fit in the checkpoint `path`: its arguments `save` and `should_stop`.

    Without a path there are none, and signals do what they did. Of several processes the first one writes, and all stop
    where one is to.
    """
    if path is None:
        yield {}
        return

    def save(progress: Progress) -> None:
        states = [progress.random] if ranks is None else ranks.gathered(progress.random)
        if ranks is None or not ranks.rank:
            write_fit(
                path,
                facts,
                progress,
                tail=tail,
                steps=steps,
                average=average,
                lrs=lrs,
                train=train,
                valid=valid,
                states=states,
            )

    _kept_by(steps.optimizer)  # what can't be written is said before the first step
    note = f"The fit so far is in {path}: the same again with --resume (in Python: resume=True) goes on from there."
    with held_back(note) as signal:
        yield {"save": save, "should_stop": signal.is_there if ranks is None else lambda: ranks.any(signal.is_there())}


def fit_facts(
    asked: Mapping[str, Json],
    tail: nn.Module,
    train: Batches,
    valid: Batches | None,
    *,
    seed: int,
    optimizer: Optimizer,
    loss: object,
    metrics: Iterable[str],
    classes: tuple[str, ...],
) -> dict[str, Json]:
    """What decides every bit of a fit, by names for people.

    Args:
        asked: what the fit was given, its `epochs` among it.
        tail: what trains, before the fit moves it.
        train: batches of the fit, before the first of them.
        valid: or None.
        seed: of order, views and dropout.
        optimizer: a new one, of whatever rate and weight decay: these are in `asked`.
        loss: a person's own, or None.
        metrics: names.
        classes: in order.
    """
    model = train.situation.model
    frozen = model.ordered[model.num_frozen - 1].name if model.num_frozen else None
    return {
        **asked,
        "classes": list(classes),
        "training images": _images_fact(train),
        "validation images": None if valid is None else _images_fact(valid),
        "trained stages": training_words(model),
        "trained modules": digest_json(_without_places(repr(tail)))[:16],
        "trained parameters": _parameters_fact(tail, optimizer),
        _START: _digest(dict(tensors_of(tail))),
        "frozen weights": None if frozen is None else model.digest(frozen)[:16],
        "rows a frozen pass": None if frozen is None else train.fixed_size,
        "optimizer": _optimizer_fact(optimizer),
        "loss": None if loss is None else _code_fact(loss),
        "metrics": list(metrics),
        "batch_size": train.batch_size,
        "seed": seed,
        "device": train.device.type,
    }


def write_fit(
    path: Path,
    facts: Mapping[str, Json],
    progress: Progress,
    *,
    tail: nn.Module,
    steps: Steps,
    average: Average | None,
    lrs: list[float],
    train: Batches,
    valid: Batches | None,
    states: Sequence[Sequence[Tensor]],
) -> None:
    """Writes the checkpoint `path`, in the place of the one before; `states` are the random ones of each process.

    Raises:
        FeatureStoreError: if the optimizer keeps what can't be written.
    """
    kept, tensors = _kept_by(steps.optimizer)
    state = {
        "epoch": progress.epoch,
        "first_epoch": progress.first_epoch,
        "records": progress.history.records,
        "best_epoch": progress.history.best_epoch,
        "epoch_losses": progress.epoch_losses,
        "cycle_start": progress.cycle_start,
        "lowest": progress.lowest,
        "seconds": progress.seconds,
        "processes": len(states),
        "lrs": lrs,
        "first_pass": train.first_pass,
        "left_out": [
            {"failures": {}, "doubts": {}} if each is None else {"failures": each.failures, "doubts": each.doubts}
            for each in (train, valid)
        ],
        "optimizer": kept,
        "scale": steps.scale(),
    }
    tensors |= {f"tail.{name}": tensor for name, tensor in tensors_of(tail)}
    tensors |= {f"best.{name}": tensor for name, tensor in (progress.best or {}).items()}
    if average is not None:
        tensors |= {f"average.{name}": tensor.detach() for name, tensor in average.tensors().items()}
    tensors |= {
        f"random{_of_rank(rank)}.{place}": each for rank, own in enumerate(states) for place, each in enumerate(own)
    }
    history = progress.history
    for name, values in {"losses": history.losses, "lrs": history.lrs, "momenta": history.momenta}.items():
        tensors[name] = torch.tensor(values, dtype=torch.float64)
    with new_run(path, overwrite=True) as made:
        # As text, since a loss may be infinite or no number, for which a run's facts have no form.
        write_run(made, {"checkpoint": VERSION, "fit": dict(facts), "state": json.dumps(state)}, tensors)


def _of_rank(rank: int) -> str:
    """What the names of a process's own tensors have; nothing of the first, which is the only one of most fits."""
    return f"-{rank}" if rank else ""


def _kept_by(optimizer: Optimizer) -> tuple[dict[str, Json], dict[str, Tensor]]:
    """What an optimizer keeps: values, and tensors under names of ours."""
    found = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    values: dict[str, dict[str, Json]] = {}
    for place, kept in found["state"].items():
        for name, value in kept.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{place}.{name}"] = value
            else:
                values.setdefault(str(place), {})[name] = value
    groups = [{name: value for name, value in group.items() if name != "params"} for group in found["param_groups"]]
    try:
        json.dumps([values, groups])
    except TypeError as error:
        raise FeatureStoreError(
            f"The optimizer {type(optimizer).__name__} keeps what a checkpoint can't hold ({error}). Expected tensors, "
            "numbers and texts. Fit without a checkpoint, or with another optimizer."
        ) from error
    return {"values": values, "groups": groups}, tensors


def _put_into(optimizer: Optimizer, kept: Mapping[str, Json], tensors: Mapping[str, Tensor]) -> None:
    state: dict[int, dict[str, Any]] = {int(place): dict(values) for place, values in kept["values"].items()}
    for each, tensor in tensors.items():
        place, _, name = each.partition(".")
        state.setdefault(int(place), {})[name] = tensor
    groups = [
        {
            name: tuple(saved[name]) if isinstance(value, tuple) else saved.get(name, value)
            for name, value in group.items()
        }
        for group, saved in zip(optimizer.state_dict()["param_groups"], kept["groups"], strict=True)
    ]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _images_fact(batches: Batches) -> str:
    """How many, and a digest of their contents, targets and views, in order."""
    source = batches.source
    images = source.images
    contents = images.digests(batches.situation.known).values
    targets = b"" if images.targets is None else images.targets.tobytes()
    views: Json = source.words
    if isinstance(source, ImageSource):
        own = batches.situation.view
        shown = source.views if isinstance(source.views, tuple) else (own.with_seed(source.views.policy, 0),)
        views = [views, [view.facts() for view in shown]]
    whole = digest_json([digest_bytes(contents.tobytes() + targets), views])
    return f"{len(images):,} images from {source.words}, {whole[:16]}"


def _digest(tensors: Mapping[str, Tensor]) -> str:
    return digest_json({name: digest_tensor(tensor) for name, tensor in tensors.items()})[:16]


def _parameters_fact(tail: nn.Module, optimizer: Optimizer) -> str:
    """How many the optimizer moves, and a digest of their names, group by group."""
    names = {id(parameter): name for name, parameter in tail.named_parameters()}
    groups = [[names.get(id(parameter)) for parameter in group["params"]] for group in optimizer.param_groups]
    return f"{sum(map(len, groups)):,} in {len(groups)} groups, {digest_json(groups)[:16]}"


def _optimizer_fact(optimizer: Optimizer) -> str:
    """Its class, and a digest of the settings of its groups."""
    kind = type(optimizer)
    return f"{kind.__qualname__}, {digest_json([kind.__module__, _without_places(repr(optimizer))])[:16]}"


def _code_fact(value: object) -> str:
    """The name of a person's own function or object, and a digest of code and settings."""
    named: Any = value
    while isinstance(named, partial):
        named = named.func
    return f"{getattr(named, '__qualname__', type(named).__qualname__)}, {digest_json(_parts(value, ()))[:16]}"


def _parts(value: object, around: tuple[object, ...]) -> Json:
    """What tells a function or module from another of its name, as JSON.

    Left out are globals, what a function assigns itself, and what objects hold that aren't modules: they may count.
    """
    if any(value is each for each in around):
        return "around"
    around = (*around, value)
    if value is None or isinstance(value, str | int | float):
        return repr(value)
    if isinstance(value, Tensor):
        return digest_tensor(value)
    if isinstance(value, list | tuple):
        return [_parts(each, around) for each in value]
    if isinstance(value, dict):
        return [[repr(name), _parts(each, around)] for name, each in value.items()]
    if isinstance(value, partial):
        return [_parts(each, around) for each in (value.func, value.args, value.keywords)]
    if isinstance(value, MethodType):
        return [_parts(each, around) for each in (value.__func__, value.__self__)]
    kind = value if hasattr(value, "__qualname__") else type(value)
    name = f"{kind.__module__}.{kind.__qualname__}"
    if isinstance(value, nn.Module):  # torch's losses don't show their settings
        settings = [{key: each for key, each in vars(module).items() if key[0] != "_"} for module in value.modules()]
        return [name, _without_places(repr(value)), _digest(dict(tensors_of(value))), _parts(settings, around)]
    if isinstance(value, FunctionType):
        code = value.__code__
        assigned = {each.argval for each in dis.get_instructions(code) if each.opname == "STORE_DEREF"}
        taken = {each: held for each, held in closure_of(value) if each not in assigned}
        return [name, _code_parts(code), _parts([value.__defaults__, value.__kwdefaults__, taken], around)]
    return name


def _code_parts(code: CodeType) -> Json:
    constants = [
        _code_parts(each)
        if isinstance(each, CodeType)
        else sorted(map(repr, each))  # whose order differs from process to process
        if isinstance(each, frozenset)
        else repr(each)
        for each in code.co_consts
    ]
    return [code.co_code.hex(), list(code.co_names), constants]


def _without_places(text: str) -> str:
    """A `repr` without addresses in memory."""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", text)


def _shown(value: Json) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return printable(text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}...", is_one_line=True)


_MOST_SHOWN = 120
