"""Sweep: many head settings tried on stored features, those of like shape together, and dropped early where asked."""

from __future__ import annotations

import difflib
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from inspect import signature
from itertools import groupby
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import nn

from featstore.digest import Json
from featstore.errors import FeatureStoreError
from featstore.images.image_set import ImageSet
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
from training.experiments.swept import Member, Sweep
from training.experiments.trials import Models, Trials
from training.inputs.derive import labelled
from training.learner import Learner
from training.loop.fitting import Begun
from training.loop.history import Record
from training.loop.packed import Together, likeness
from training.loop.plan import FitOptions, Plan
from training.placement import reduction_of
from training.standardised import linear_head_of

_REFUSED = ("on_epoch_end", "checkpoint", "resume", "monitor", "note")


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
    _check_options(options)
    say = _Say(is_quiet=quiet)
    given = {"device": device, "quiet": True, **options}
    trials = Trials(models, images, store, folds, repeats, groups, split_seed, monitor, given, say.once)
    found = as_settings(settings)
    trials.check(found)
    for note in trials.notes(found):
        say.once(note)
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
                done[setting_digest(each)] = Member.kept(each, kept)
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
    members = sorted(run.done.values(), key=lambda each: each.place(rank))
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
    _check_options(options)
    trials = Trials(model, images, store, None, 1, None, 0, monitor, {"quiet": True, **options})
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


class _Run:
    """The fits of a sweep as they are made, and the results there are."""

    def __init__(
        self, trials: Trials, folder: SweepFolder | None, done: dict[str, Member], say: _Say, *, total: int
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
            result=member.facts(),
            scores=scores,
            seconds=member.seconds,
            scored_on=self.trials.scored_on,
        )


_NO_SCORES = ("epoch", "train_loss", "lr", "seconds")


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
