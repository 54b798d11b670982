"""Sweep: many head settings tried on stored features, as one table, and the best of them as a learner to go on with.

Long, since it is one thing told in order: what is tried, the fits that it is tried by, and the table that it comes to.
"""

from __future__ import annotations

import difflib
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from inspect import signature
from itertools import groupby
from pathlib import Path
from statistics import NormalDist, fmean
from typing import Any

import torch
from torch import nn

from featstore.digest import Json, digest_bytes
from featstore.errors import FeatureStoreError
from featstore.extraction.remedy import seed_ranges
from featstore.html import titled_table
from featstore.images.contents import overlap_note
from featstore.images.digests import KnownDigests
from featstore.images.image_set import ImageSet
from featstore.images.views import Augment
from featstore.machine import available_bytes
from featstore.models.staged import StagedModel
from featstore.notes import logger_of
from featstore.store.store import FeatureStore
from featstore.words import counted
from training.experiments.grid import (
    NAMES,
    Setting,
    Settings,
    as_settings,
    check_names,
    setting_digest,
    setting_facts,
    unnamed,
)
from training.experiments.sweep_folder import SweepFolder
from training.heads import HEAD_OPTIONS, head_word, linear_head_of, read_head
from training.inputs.derive import labelled
from training.learner import Learner
from training.loop import settings as of_learner
from training.loop.fitting import Begun
from training.loop.history import Record
from training.loop.monitor import Monitor
from training.loop.packed import Together, likeness
from training.loop.plan import FitOptions, Plan
from training.placement import reduction_of
from training.provenance import keys_of
from training.scores.metrics import default_metrics, student_interval, wilson_interval
from training.sidecar import Dealt, Score, finite
from training.splits import dealt, grouped_by_content

_OF_FIT = {*FitOptions.__annotations__}
_OF_HEAD = ("hidden", "dropout", "queries")
_OF_NO_SCORE = ("device", "quiet", "workers", "on_missing", "allow_leak", "asked")
"""Options of a learner that decide how it works, or whether, and no number."""
_REFUSED = ("on_epoch_end", "checkpoint", "resume", "monitor", "note")
_MOST_TOGETHER = 128
"""Fits that begin together: wider products gain little, and what is finished is saved between."""
_ADAM_COPIES = 5
"""Of the weights of a head while it trains: its own, those in the stack, their gradient, two averages."""

Models = StagedModel | nn.Module | Mapping[str, StagedModel | nn.Module]


@dataclass(frozen=True, kw_only=True, eq=False)
class Member:
    """One setting of a sweep, and what came of it.

    Attributes:
        setting: as it was asked for.
        parts: of each fold or seed the record that counts: of the last epoch, or with ``keep="best"`` of the best.
        curves: of each the monitored number after each epoch.
        epochs: that were trained.
        planned: that were asked for.
        seconds: that training took; of heads that trained together their shares.
        failure: why there is no score; None if there is one.
        num_images: that a part was scored on.
        is_whole: whether it went as far as was asked for, patience included: else halving dropped it.
    """

    setting: Setting
    parts: tuple[Record, ...]
    curves: tuple[tuple[float, ...], ...]
    epochs: int
    planned: int
    seconds: float
    failure: str | None = None
    num_images: int = 0
    is_whole: bool = True

    @property
    def name(self) -> str:
        """A digest of its setting."""
        return setting_digest(self.setting)

    def mean(self, name: str) -> float:
        """Of a score over the parts; NaN where there is none."""
        values = [each[name] for each in self.parts if name in each]
        return fmean(values) if values and self.failure is None else math.nan

    def score(self, name: str) -> Score:
        """A score, where it lies with 95 % confidence, and by what: over several parts by Student's t, else Wilson."""
        value = finite(self.mean(name))
        values = [each[name] for each in self.parts if name in each]
        if value is None:
            return Score(None)
        if len(values) > 1:
            return Score(value, student_interval(name, values), "student")
        if name in ("accuracy", "top5") and self.num_images:
            return Score(value, wilson_interval(round(value * self.num_images), self.num_images), "wilson")
        return Score(value)

    def interval(self, name: str) -> tuple[float, float] | None:
        """Where a score lies with 95 % confidence; None where that isn't known."""
        return self.score(name).interval


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Sweep:
    """What a sweep came to; made by `sweep`. Prints as a table, the best first.

    Attributes:
        members: the settings that were tried, the best first: whole ones before those that were dropped.
        monitor: the number that they are judged by.
        told: what decided the scores beside the settings, in words.
        num_missing: settings that have no result yet: of other shares.
    """

    members: tuple[Member, ...]
    monitor: Monitor
    told: str
    num_missing: int = 0
    _learner: Callable[[Member], Learner] = field(kw_only=True)

    @property
    def table(self) -> list[dict[str, Any]]:
        """A row a setting: its values, the score with its interval, epochs and seconds, and what ended it early."""
        names = [*dict.fromkeys(name for each in self.members for name in each.setting)]
        rows = []
        for each in self.members:
            ends = each.interval(self.monitor.name) or (None, None)
            ended = each.failure or ("" if each.is_whole else f"dropped after {each.epochs} of {each.planned} epochs")
            rows.append(
                {
                    **{name: _shown(each.setting.get(name)) for name in names},
                    self.monitor.name: each.mean(self.monitor.name),
                    "from": ends[0],
                    "to": ends[1],
                    "epochs": each.epochs,
                    "seconds": round(each.seconds, 3),
                    "ended": ended,
                }
            )
        return rows

    def frame(self) -> dict[str, list[Any]]:
        """Column -> values, one a setting: what ``pandas.DataFrame`` takes."""
        rows = self.table
        return {name: [row[name] for row in rows] for name in (rows[0] if rows else ())}

    @property
    def foot(self) -> str:
        """What the scores are of, and how far the best one is too good."""
        lines = [self.told]
        if self.num_missing:
            lines.append(f"{counted(self.num_missing, 'setting')} without a result yet (other shares)")
        whole = [each for each in self.members if each.failure is None]
        if len(whole) > 1:
            lines.append(
                f"the best of {len(whole)} is chosen by the images that score it, so its score is optimistic"
                f"{self._optimism(whole)}: score it on others before you tell it"
            )
        return "; ".join(lines)

    def _optimism(self, scored: Sequence[Member]) -> str:
        """By how much the best of so many equal settings would lie above their common mean, in words."""
        interval = scored[0].interval(self.monitor.name)
        if interval is None:
            return ""
        error = (interval[1] - interval[0]) / (2 * NormalDist().inv_cdf(0.975))
        highest = NormalDist().inv_cdf((len(scored) - 0.375) / (len(scored) + 0.25))  # Blom's expected maximum
        return f", by up to about {error * highest:.2g}"

    def __repr__(self) -> str:
        rows = [{name: _cell(value) for name, value in row.items()} for row in self.table]
        if not rows:
            return f"Sweep(no settings; {self.told})"
        names = [name for name in rows[0] if name != "ended" or any(row["ended"] for row in rows)]
        widths = {name: max(len(name), *(len(row[name]) for row in rows)) for name in names}
        lines = ["  ".join(f"{name:>{widths[name]}}" for name in names)]
        lines += ["  ".join(f"{row[name]:>{widths[name]}}" for name in names) for row in rows]
        return "\n".join([*lines, self.foot])

    def _repr_html_(self) -> str:
        return titled_table(self.foot, self.table)

    def best(self) -> Learner:
        """The learner of the best setting, to go on with: ``learn.unfreeze(); learn.fit(...)``.

        Its weights are those that were scored, of several seeds the first one's. Of folds, whose heads each lack some
        images, it is fitted anew to the training images of the split that the images have.

        Raises:
            FeatureStoreError: if no setting has a score.
        """
        if not self.members or self.members[0].failure is not None:
            why = self.members[0].failure if self.members else "none was tried here"
            raise FeatureStoreError(f"No setting has a score: {why}. Try others.")
        return self._learner(self.members[0])


def sweep(
    models: Models,
    images: ImageSet,
    store: FeatureStore | None,
    settings: Settings,
    *,
    folds: int | None = None,
    repeats: int = 1,
    groups: Sequence[Any] | None = None,
    split_seed: int = 0,
    halving: int | None = None,
    monitor: str | tuple[str, str] | None = None,
    out: str | os.PathLike[str] | None = None,
    resume: bool = True,
    overwrite: bool = False,
    shard: tuple[int, int] = (0, 1),
    device: torch.device | str = "auto",
    quiet: bool = False,
    **options: Any,
) -> Sweep:
    """Tries settings of a head on stored features: heads of like shape train together, each as it would alone.

    Args:
        models: the backbone; or several by name, which the setting ``backbone`` chooses from.
        images: labelled, with a split, or to be dealt into folds.
        store: as in `Learner`.
        settings: a `Grid`, a `Sample`, or a list of settings; `grid.NAMES` are what they may set.
        folds: each image is held out once, and each setting scored by the mean over so many fits.
        repeats: each setting is fitted with so many seeds, from its own on, and scored by their mean.
        groups: of the folds, one an image: those of a group are held out together.
        split_seed: of the folds.
        halving: drops settings early (successive halving): of so many only the best one goes on, once after each of
            the powers of it that the epochs have. Scores of early epochs are those of high rates, so it may be wrong.
        monitor: the number that settings are judged by, as `FitOptions` has it; default: accuracy, of several labels
            mean average precision, of regression the mean absolute error.
        out: a folder in which each finished setting is kept at once; the same call goes on from there, also with more
            settings, of which those that are there aren't trained again.
        resume: whether to go on where `out` has results; else it must have none.
        overwrite: begins anew where `out` has results of whatever sweep, once nothing speaks against this one.
        shard: (i, n): tries only the settings that are the i-th's of n jobs, counted from 0, with the same `out`.
        device: as in `Learner`.
        quiet: prints nothing while it works.
        options: what all settings have in common: further names of `grid.NAMES`, and arguments of `Learner`.

    Raises:
        ValueError: for settings, options or numbers that make no sense together.
        FactsDifferError: if `out` has results of another sweep; names what differs.
        FeatureStoreError: if the inputs of a fit can't be had.
    """
    say = _Say(is_quiet=quiet)
    given = {"device": device, "quiet": True, **options}
    trials = _Trials(models, images, store, folds, repeats, groups, split_seed, monitor, given, say.once)
    found = as_settings(settings)
    trials.check(found)
    if halving is not None and halving < 2:
        raise ValueError(f"halving is {halving}; expected at least 2: one of so many goes on.")
    if not 0 <= shard[0] < shard[1]:
        raise ValueError(f"shard is {shard}; expected (i, n) with i from 0 to n - 1.")
    if shard[1] > 1 and halving is not None:
        raise ValueError("halving compares all settings, and a share of them can't. Leave out halving, or shard.")
    if shard[1] > 1 and overwrite:
        raise ValueError(
            "Each share would delete what the others have done. Leave out overwrite, and delete the folder."
        )
    own = [each for each in found if int(setting_digest(each), 16) % shard[1] == shard[0]]
    folder = None
    if out is not None:
        more: dict[str, Json] = {"halving": halving}
        if halving is not None:
            more["settings"] = [setting_digest(each) for each in found]
        folder = SweepFolder(Path(out))
        facts = {**trials.facts(found), **more}
        nameless = unnamed([facts, *map(setting_facts, found)])
        folder.begin(facts, resume=resume, overwrite=overwrite, nameless=nameless)
    done: dict[str, Member] = {}
    if folder is not None:
        for each in found:
            if (kept := folder.read(setting_digest(each))) is not None:
                done[setting_digest(each)] = _member_of(each, kept)
        if done:
            say(
                f"{len(done):,} of {len(found):,} settings are done in {folder.path}, {len(found) - len(done):,} to try"
            )
    run = _Run(trials, folder, done, say, total=len(found))
    waiting = [each for each in own if setting_digest(each) not in done]
    try:
        if halving is None:
            for wave in trials.waves(waiting):
                run.try_all(wave)
        elif waiting:
            run.try_by_halving(found, halving)
    except KeyboardInterrupt as interrupt:
        interrupt.add_note(run.interrupted)
        raise
    rank = trials.monitor
    members = sorted(run.done.values(), key=lambda each: _place(rank, each))
    return Sweep(
        members=tuple(members),
        monitor=rank,
        told=trials.in_words(halving),
        num_missing=len(found) - len(members),
        _learner=run.learner,
    )


def try_settings(
    model: StagedModel | nn.Module,
    images: ImageSet,
    store: FeatureStore | None,
    setting: Mapping[str, Any],
    *,
    monitor: str | tuple[str, str] | None = None,
    report: Callable[[Record], Any] | None = None,
    **options: Any,
) -> dict[str, float]:
    """Scores of one setting, for a tuner that chooses the next one by it: of the epoch whose weights remain.

    Args:
        model: the backbone.
        images: labelled, with a split.
        store: as in `Learner`.
        setting: names of `grid.NAMES`.
        monitor: the number that ``keep="best"`` and patience go by, as in `sweep`.
        report: gets each epoch's record; what it raises ends the fit, as tuners prune.
        options: as in `sweep`.

    Raises:
        FloatingPointError: if the loss is no longer finite.
    """
    check_names(setting)
    trials = _Trials(model, images, store, None, 1, None, 0, monitor, {"quiet": True, **options})
    trials.check([dict(setting)])
    learn, plan = trials.made(dict(setting), 0)
    learn.fit(plan.cycles[0], plan.lr, **{**trials.fit_options(setting), "on_epoch_end": report})
    record = learn.history.best if plan.keep == "best" else learn.history.last
    return {name: value for name, value in record.items() if name not in ("epoch", "lr")}


@dataclass(eq=False)
class _Fit:
    """One fit of a setting: of a fold, or with a seed."""

    setting: Setting
    part: int
    learn: Learner
    plan: Plan
    begun: Begun | None = None
    failure: str | None = None

    @cached_property
    def name(self) -> str:
        """Its setting's."""
        return setting_digest(self.setting)

    @property
    def curve(self) -> tuple[float, ...]:
        """The monitored number after each epoch."""
        assert self.begun is not None
        history = self.begun.progress.history
        return tuple(each.get(history.monitor.name, math.nan) for each in history.records)


class _Trials:
    """What a sweep's fits are made of."""

    def __init__(
        self,
        models: Models,
        images: ImageSet,
        store: FeatureStore | None,
        folds: int | None,
        repeats: int,
        groups: Sequence[Any] | None,
        split_seed: int,
        monitor: str | tuple[str, str] | None,
        options: Mapping[str, Any],
        note: Callable[[str], None] | None = None,
    ) -> None:
        named = models if isinstance(models, Mapping) else {"": models}
        for model in named.values():
            of_learner.check_given(model, images, store)
        _check_options(options)
        # Once here, so that all learners share its stages.
        self.models = {
            name: each if isinstance(each, StagedModel) else StagedModel.from_module(each)
            for name, each in named.items()
        }
        if folds is not None and repeats != 1:
            raise ValueError(f"folds={folds} and repeats={repeats} are two kinds of several fits. Give one of them.")
        if repeats < 1:
            raise ValueError(f"repeats is {repeats}; expected at least 1.")
        if folds is None and not len(images.valid):
            raise ValueError(
                "No image is held out to score settings on. Hold some out with --valid 0.2 (in Python: "
                "images.split(valid=0.2)), or each once with --folds 5 (folds=5)."
            )
        self.images, self.store = images, store
        self.folds, self.repeats, self.split_seed, self.groups = folds, repeats, split_seed, groups
        self.sets = [images]
        if folds is not None:
            together = grouped_by_content(images, images.digests(self._known), groups)
            self.sets = images.folds(folds, seed=split_seed, groups=together)
        self.options, self._note = dict(options), note
        default = {"single": "accuracy", "multi": "map", "regression": "mae"}[images.task]
        own = [getattr(each, "__name__", "") for each in options.get("metrics") or ()]
        self.monitor = Monitor.of(monitor or default, [*default_metrics(images.task, len(images.classes)), *own])
        self._asked_monitor = monitor or default

    @cached_property
    def scored_on(self) -> Dealt:
        """The images that a setting's score is of."""
        images = labelled(self.images.select(self.images.splits != "test") if self.folds else self.images.valid)
        return dealt(images, images.digests(self._known))

    @property
    def _known(self) -> KnownDigests:
        return KnownDigests.of({} if self.store is None else self.store.known_digests(self.images))

    @property
    def num_parts(self) -> int:
        """Fits of a setting."""
        return self.folds or self.repeats

    def check(self, settings: Sequence[Setting]) -> None:
        """Checks what can be said before anything is trained.

        Raises:
            ValueError: names what is wrong.
        """
        for each in settings:
            if each.get("backbone", self.options.get("backbone", next(iter(self.models)))) not in self.models:
                raise ValueError(
                    f"A setting has the backbone {each.get('backbone')!r}; expected one of {', '.join(self.models)}."
                )
            for name in ("keep", "patience") if self.folds is not None else ():
                if self._all(each).get(name) not in (None, "last"):
                    raise ValueError(f"{name} would choose by the images held out, in folds. Leave it out.")
            _check_head(self._all(each))
            self.plan(each)
        for _, alike in groupby(sorted(settings, key=_head_of), key=_head_of):
            several = [*alike]
            learn, _ = self.made(several[0], 0)
            for each in several:
                learn.check(self.plan(each))

    def _all(self, setting: Mapping[str, Any]) -> dict[str, Any]:
        return {**self.options, **setting}

    def fit_options(self, setting: Mapping[str, Any]) -> dict[str, Any]:
        """Those of a fit that a setting has, or all of them."""
        found = {name: value for name, value in self._all(setting).items() if name in _OF_FIT}
        return {**found, "monitor": self._asked_monitor}

    def plan(self, setting: Mapping[str, Any]) -> Plan:
        """What each fit of a setting is asked for."""
        given = self._all(setting)
        return Plan(cycles=(given.get("epochs", 10),), lr=given.get("lr"), **self.fit_options(setting))

    def made(self, setting: Setting, part: int, images: ImageSet | None = None) -> tuple[Learner, Plan]:
        """A new learner for one fit of a setting, and what that is asked for."""
        given = self._all(setting)
        other = {
            name: value
            for name, value in given.items()
            if name not in _OF_FIT and name not in _OF_HEAD and name not in ("lr", "epochs", "backbone")
        }
        head = given.get("head", "concat")
        other["head"] = _head_word(head, given) if isinstance(head, str) else head
        if self.repeats > 1:
            other["seed"] = given.get("seed", 0) + part
        if self._note is not None:  # the parts are of the same images
            other["note"] = self._note if part == 0 else _nothing
        if images is None:
            images = self.sets[part if self.folds is not None else 0]
        name = given.get("backbone", next(iter(self.models)))
        return Learner(self.models[name], images, self.store, **other), self.plan(setting)

    def waves(self, settings: Sequence[Setting]) -> Iterator[list[Setting]]:
        """Settings that begin together: those that are alike side by side, as many as memory has room for."""
        ordered = sorted(settings, key=lambda each: str([_fact_of(each, name) for name in _ALIKE]))
        wave: list[Setting] = []
        taken = 0
        room = available_bytes() // 4
        for each in ordered:
            learn, _ = self.made(each, 0)
            size = self.num_parts * _ADAM_COPIES * sum(4 * p.numel() for p in learn.model.unfrozen.parameters())
            if wave and (taken + size > room or len(wave) * self.num_parts >= _MOST_TOGETHER):
                yield wave
                wave, taken = [], 0
            wave.append(each)
            taken += size
        if wave:
            yield wave

    def facts(self, settings: Sequence[Setting]) -> dict[str, Json]:
        """What scores of one setting depend on beside it, by names for people."""
        places: dict[str, Json] = {}
        for each in settings:
            given = self._all(each)
            place = {name: given.get(name) for name in ("backbone", "cut", "reduce", "augment")}
            words = ", ".join(f"{name} {_shown(value)}" for name, value in place.items() if value is not None)
            is_pool = str(given.get("head")).startswith("attention")
            key = f"{words or 'default'}{', attention' * is_pool}"
            if key not in places:
                learn, plan = self.made(each, 0)
                source = learn.ready(plan).train
                places[key] = {
                    "trunk": learn.model.digests()[learn.cut],
                    "keys": None if source is None else list(keys_of(source)),
                }
        digests = self.images.digests(self._known)
        targets = self.images.targets
        assert targets is not None
        return {
            "images": digest_bytes(digests.values.tobytes()),
            "labels": digest_bytes(targets.tobytes()),
            "classes": list(self.images.classes),
            "task": self.images.task,
            "split": digest_bytes("\0".join(self.images.splits.tolist()).encode()),
            "groups": None if self.groups is None else digest_bytes("\0".join(map(str, self.groups)).encode()),
            "folds": self.folds,
            "repeats": self.repeats,
            "split_seed": self.split_seed,
            "monitor": [self.monitor.name, self.monitor.direction],
            "features": places,
            "options": setting_facts({name: v for name, v in self.options.items() if name not in _OF_NO_SCORE}),
        }

    def in_words(self, halving: int | None) -> str:
        """What scores are of."""
        if self.folds is not None:
            words = f"{self.monitor.name}: mean over {self.folds} folds, each image held out once"
        else:
            count = len(labelled(self.images.valid))
            seeds = f", mean over {self.repeats} seeds" if self.repeats > 1 else ""
            words = f"{self.monitor.name} of {counted(count, 'validation image')}{seeds}"
        dropped = f"; successive halving: one of {halving} went on from each rung" if halving is not None else ""
        overlap = overlap_note(self.images, self.images.digests(self._known)) if self.folds is None else None
        return f"{words}{dropped}" + ("" if overlap is None else f"; {overlap}")


class _Run:
    """The fits of a sweep as they are made, and the results there are."""

    def __init__(
        self, trials: _Trials, folder: SweepFolder | None, done: dict[str, Member], say: _Say, *, total: int
    ) -> None:
        self.trials, self.folder, self.done, self._say, self._total = trials, folder, done, say, total
        self._learners: dict[str, Learner] = {}

    @property
    def interrupted(self) -> str:
        """What is kept of a sweep that is interrupted here, what isn't, and how to go on."""
        if self.folder is None:
            return "Nothing of the sweep is kept, as it has no folder. Give it one to go on from: out=."
        left = self._total - len(self.done)
        return (
            f"{counted(len(self.done), 'setting')} of {self._total:,} are done and kept in {self.folder.path}; of the "
            f"other {left:,} nothing is, also of those that were under way: they are trained from their first epoch. "
            "The same again with --resume (in Python: resume=True) goes on from there."
        )

    def try_all(self, settings: Sequence[Setting]) -> None:
        """Trains settings to their ends."""
        fits = self._begun(settings)
        for packed, alone in self._together(fits):
            self._go_on(packed, alone, None)
        self._finish(settings, fits)

    def try_by_halving(self, settings: Sequence[Setting], factor: int) -> None:
        """Trains settings from rung to rung, and drops the worst at each.

        All are given, those that are done too: which rungs there are and who goes on is of all of them. What an
        earlier run has decided holds, so that one that was killed drops what it would have dropped.

        Raises:
            FeatureStoreError: if settings are done, and nothing says who went on.
        """
        alive = {setting_digest(each): each for each in settings}
        waiting = {name: each for name, each in alive.items() if name not in self.done}
        longest = max(self.trials.plan(each).cycles[0] for each in settings)
        heights = rungs(longest, factor, len(settings))
        decided = {} if self.folder is None else self.folder.decided()
        if self.folder is not None and self.done and not {*heights[:1]} <= decided.keys():
            raise FeatureStoreError(
                f"{self.folder.path} has settings that halving dropped, and lacks halving.json, which says when. "
                "Restore it, choose another folder, or begin anew with --overwrite (in Python: overwrite=True)."
            )
        fits = self._begun([*waiting.values()])
        groups = self._together(fits)
        for until in heights:
            for packed, alone in groups:
                self._go_on(packed, alone, until)
            if until not in decided:
                decided[until] = self._best_at(until, alive, fits, factor)
                if self.folder is not None:
                    self.folder.decide(until, decided[until])
            dropped = alive.keys() - decided[until]
            for packed, alone in groups:
                if packed is not None:
                    together, numbered = packed
                    together.end([place for place, fit in enumerate(numbered) if fit.name in dropped])
                alone[:] = [fit for fit in alone if fit.name not in dropped]
            self._finish([each for name, each in waiting.items() if name in dropped], fits)
            alive = {name: each for name, each in alive.items() if name not in dropped}
            self._say(f"epoch {until}: {len(alive):,} of {self._total:,} settings go on")
        for packed, alone in groups:
            self._go_on(packed, alone, None)
        self._finish([each for name, each in waiting.items() if name in alive], fits)

    def learner(self, member: Member) -> Learner:
        """The learner of a member, with its weights."""
        trials = self.trials
        if trials.folds is not None:
            learn, plan = trials.made(member.setting, 0, images=trials.images)
            learn.fit(plan.cycles[0], plan.lr, **trials.fit_options(member.setting))
        elif member.name in self._learners:
            learn = self._learners[member.name]
        else:
            assert self.folder is not None
            learn, _ = trials.made(member.setting, 0)
            learn.take_head(*self.folder.head(member.name))
        learn.quiet, learn.note = False, None  # what comes next is said by itself
        return learn

    # ------------------------------------------------------------------------------------------------------- inside

    def _begun(self, settings: Sequence[Setting]) -> list[_Fit]:
        """Fits of settings, begun; those on the same batches share them."""
        fits = [
            _Fit(setting, part, *self.trials.made(setting, part))
            for setting in settings
            for part in range(self.trials.num_parts)
        ]
        for _, several in groupby(sorted(fits, key=_batches_of), key=_batches_of):
            first: Learner | None = None
            for fit in several:
                try:
                    fit.begun = fit.learn.begin(fit.plan, beside=first)
                except FloatingPointError as error:  # the finder, or a row that isn't finite
                    fit.failure = str(error)
                else:
                    first = first or fit.learn
        return fits

    def _together(self, fits: Sequence[_Fit]) -> list[tuple[tuple[Together, list[_Fit]] | None, list[_Fit]]]:
        """By the batches that they read: fits that are packed, and those that are trained alone."""
        groups: list[tuple[tuple[Together, list[_Fit]] | None, list[_Fit]]] = []
        sound = sorted((fit for fit in fits if fit.begun is not None), key=_batches_of)
        for _, several in groupby(sound, key=_batches_of):
            alike: dict[object, list[_Fit]] = {}
            for fit in several:
                assert fit.begun is not None
                alike.setdefault(likeness(fit.begun), []).append(fit)
            packed = [fit for key, own in alike.items() if key is not None and len(own) > 1 for fit in own]
            alone = [fit for key, own in alike.items() if key is None or len(own) == 1 for fit in own]
            together = (Together([fit.begun for fit in packed if fit.begun is not None]), packed) if packed else None
            groups.append((together, alone))
        return groups

    def _go_on(self, packed: tuple[Together, list[_Fit]] | None, alone: list[_Fit], until: int | None) -> None:
        if packed is not None:
            together, fits = packed
            together.go_on(until)
            for place, error in together.failures.items():
                fits[place].failure = str(error)
        for fit in alone:
            assert fit.begun is not None
            if fit.failure is not None or fit.begun.is_over:
                continue
            try:
                fit.begun.go_on(until)
            except FloatingPointError as error:
                fit.failure = str(error)

    def _best_at(self, until: int, alive: Iterable[str], fits: Sequence[_Fit], factor: int) -> list[str]:
        """Names of the settings that go on; one that failed was there as well, and is worse than any other."""
        rank = self.trials.monitor
        reached: dict[str, float] = {}
        for name in alive:
            own = [fit for fit in fits if fit.name == name]
            values = [fit.curve[:until][-1] if fit.failure is None and fit.curve else math.nan for fit in own]
            reached[name] = rank.loss({rank.name: fmean(values)})
        count = math.ceil(len(reached) / factor)
        return sorted(reached, key=lambda name: (reached[name], name))[:count]

    def _finish(self, settings: Sequence[Setting], fits: Sequence[_Fit]) -> None:
        for each in settings:
            own = [fit for fit in fits if fit.setting is each]
            member = _member(each, own, len(labelled(self.trials.images.valid)))
            for fit in own:
                if fit.begun is not None:
                    fit.learn.end(fit.begun)
            if self.folder is not None:
                self._save(member, own)
            elif self.trials.folds is None:
                self._learners[member.name] = own[0].learn
            self.done[member.name] = member
        if settings:
            self._say(f"{len(self.done):,} of {self._total:,} settings done")

    def _save(self, member: Member, fits: Sequence[_Fit]) -> None:
        assert self.folder is not None
        names = dict.fromkeys([self.trials.monitor.name, *(name for each in member.parts for name in each)])
        scores = {name: member.score(name) for name in names if name not in _NO_SCORES and member.failure is None}
        self.folder.write(
            member.name,
            learner=fits[0].learn,
            weights=None if self.trials.folds is not None else fits[0].learn.model.unfrozen,
            result=_as_json(member),
            scores=scores,
            seconds=member.seconds,
            scored_on=self.trials.scored_on,
        )


_NO_SCORES = ("epoch", "train_loss", "lr", "seconds")
_ALIKE = ("backbone", "cut", "reduce", "augment", "mix", "batch_size", "seed", "head", "hidden", "optimizer")


class _Say:
    """Tells a person how far it is."""

    def __init__(self, *, is_quiet: bool) -> None:
        self._is_quiet, self._started = is_quiet, time.perf_counter()
        self._said: set[str] = set()

    def once(self, text: str) -> None:
        """Tells what learners should tell, each thing once, whichever tell it."""
        if not self._is_quiet and text not in self._said:
            self._said.add(text)
            logger_of("training").info("%s", text)

    def __call__(self, text: str) -> None:
        if not self._is_quiet:
            logger_of("training").info("%s (%.1f s)", text, time.perf_counter() - self._started)


def _nothing(text: str) -> None:
    """What is told to nobody."""


def rungs(epochs: int, factor: int, num_settings: int) -> list[int]:
    """Epochs after which settings are dropped: such that one of `factor` goes on from each, and no more than needed.

    >>> rungs(27, 3, 9), rungs(10, 2, 100)
    ([3, 9], [1, 2, 3, 5])
    """
    found = []
    budget, left = epochs / factor, num_settings
    while budget >= 0.5 and left > 1:
        found.append(max(1, math.ceil(budget)))
        budget, left = budget / factor, math.ceil(left / factor)
    return sorted(each for each in {*found} if each < epochs)


def _check_options(options: Mapping[str, Any]) -> None:
    """Checks that each of `options` is one that all settings can have in common.

    Raises:
        ValueError: for one of a single fit.
        TypeError: for one that there isn't, naming what may have been meant.
    """
    of_learner = [each.name for each in signature(Learner).parameters.values() if each.kind is each.KEYWORD_ONLY]
    of_sweep = [each.name for each in signature(sweep).parameters.values() if each.kind is each.KEYWORD_ONLY]
    known = [*dict.fromkeys([*NAMES, *of_learner, *FitOptions.__annotations__])]
    for name in options:
        if name in _REFUSED:
            raise ValueError(f"{name} is of a single fit, and a sweep makes many. Leave it out.")
        if name not in known:
            near = difflib.get_close_matches(name, [*known, *of_sweep], n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            shown = ", ".join(each for each in known if each not in _REFUSED)
            raise TypeError(f"A sweep has no option {name!r}.{hint} What all settings can have in common: {shown}.")


def _head_word(head: str, given: Mapping[str, Any]) -> str:
    """A named head with what is set of its kind, in one word; what is set of other kinds says nothing of it.

    Raises:
        ValueError: if the word says already what is set.
    """
    kind = head.partition(":")[0]
    if kind not in HEAD_OPTIONS:  # kept, or refused by its name where it's made
        return head
    said = read_head(head)[1]
    own = {name: given[name] for name in HEAD_OPTIONS[kind] if given.get(name) is not None}
    if twice := said.keys() & own.keys():
        name = min(twice)
        raise ValueError(f"The head {head!r} says its {name}, and {name} is set to {own[name]!r}. Leave one out.")
    return head_word(kind, **said, **own)


def _check_head(given: Mapping[str, Any]) -> None:
    """Checks that what is set of a head is of one that is made here.

    Raises:
        ValueError: if it is there already.
    """
    head = given.get("head", "concat")
    idle = [name for name in _OF_HEAD if given.get(name) is not None]
    if idle and (head == "keep" or not isinstance(head, str)):
        what = "the model's own" if head == "keep" else f"a {type(head).__name__} of your own"
        raise ValueError(
            f"The head is {what}, whose layers are there, so {' and '.join(idle)} would change nothing. Leave that "
            "out, or give a list of settings in which only named heads have it."
        )


def _head_of(setting: Setting) -> str:
    """What decides how the learner of a setting is made: equal for those whose fits alone differ."""
    return setting_digest({name: value for name, value in setting.items() if name not in {*_OF_FIT, "lr", "epochs"}})


def _batches_of(fit: _Fit) -> str:
    """What decides which batches a fit reads, in which order: equal for those that can share them."""
    learn, plan = fit.learn, fit.plan
    is_linear = linear_head_of(learn.model.unfrozen[-1]) is not None  # makes several passes an epoch
    facts = [
        fit.part,
        fit.setting.get("backbone"),
        learn.cut,
        reduction_of(learn.model),
        setting_facts({"augment": learn.augment}),  # two of one's own may have one name
        learn.batch_size,
        learn.seed,
        is_linear,
        plan.accumulate if is_linear else 1,
        plan.sampling,
        repr(plan.changes),
    ]
    return repr(facts)


def _member(setting: Setting, fits: Sequence[_Fit], num_images: int) -> Member:
    failure = next((fit.failure for fit in fits if fit.failure is not None), None)
    begun = [fit.begun for fit in fits if fit.begun is not None]
    histories = [each.progress.history for each in begun]
    is_best = fits[0].plan.keep == "best"
    records = [(each.best if is_best else each.last) for each in histories if each.records]
    return Member(
        setting=setting,
        parts=tuple(dict(each) for each in records),
        curves=tuple(fit.curve for fit in fits if fit.begun is not None),
        epochs=max((len(each.records) for each in histories), default=0),
        planned=fits[0].plan.cycles[0],
        seconds=sum(record["seconds"] for each in histories for record in each.records),
        failure=failure,
        num_images=num_images,
        is_whole=all(each.is_over for each in begun),
    )


def _as_json(member: Member) -> dict[str, Json]:
    """A member as JSON, which has no numbers that aren't finite."""

    def number(value: float) -> Json:
        return value if math.isfinite(value) else None

    return {
        "setting": setting_facts(member.setting),
        "parts": [{name: number(value) for name, value in each.items()} for each in member.parts],
        "curves": [[number(value) for value in each] for each in member.curves],
        "epochs": member.epochs,
        "planned": member.planned,
        "seconds": member.seconds,
        "failure": member.failure,
        "num_images": member.num_images,
        "is_whole": member.is_whole,
    }


def _member_of(setting: Setting, kept: Mapping[str, Any]) -> Member:
    """What `_as_json` gave."""

    def number(value: Any) -> float:
        return math.nan if value is None else float(value)

    return Member(
        setting=setting,
        parts=tuple({name: number(value) for name, value in each.items()} for each in kept["parts"]),
        curves=tuple(tuple(number(value) for value in each) for each in kept["curves"]),
        epochs=int(kept["epochs"]),
        planned=int(kept["planned"]),
        seconds=float(kept["seconds"]),
        failure=kept["failure"],
        num_images=int(kept["num_images"]),
        is_whole=bool(kept["is_whole"]),
    )


def _place(monitor: Monitor, member: Member) -> tuple[object, ...]:
    """What members are sorted by: whole ones first, then those that came farther; equal ones by loss, then by name."""
    loss = monitor.loss({monitor.name: member.mean(monitor.name)})
    is_whole = member.is_whole and member.failure is None
    second = Monitor().loss({"valid_loss": member.mean("valid_loss")})  # of few images many scores are equal
    return member.failure is not None, not is_whole, 0 if is_whole else -member.epochs, loss, second, member.name


def _fact_of(setting: Mapping[str, Any], name: str) -> Json:
    return setting_facts(setting).get(name)


def _shown(value: Any) -> Any:
    """A value of a setting as a cell of a table."""
    if value is None or isinstance(value, str | int | float | bool):
        return value
    if isinstance(value, Augment):
        return f"{value.policy.describe()}, seeds {'fresh' if value.seeds == 'fresh' else seed_ranges(value.seeds)}"
    return "+".join(map(str, value)) if isinstance(value, list | tuple) else repr(value)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
