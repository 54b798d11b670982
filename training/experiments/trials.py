"""Trials: what the fits of a sweep are made of: backbones, images, folds, and what each setting asks for."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import groupby
from typing import Any

from torch import nn

from featstore.digest import Json, digest_bytes, digest_json, digest_tensor
from featstore.images.contents import overlap_note
from featstore.images.digests import KnownDigests
from featstore.images.image_set import ImageSet
from featstore.machine import available_bytes
from featstore.models.staged import StagedModel
from featstore.store.store import FeatureStore
from featstore.words import counted
from training.choices import FEW_STEPS, SMALL_BATCH
from training.experiments.grid import Setting, setting_digest, setting_facts
from training.experiments.swept import shown
from training.heads import HEAD_OPTIONS, head_word, read_head
from training.inputs.derive import labelled, training_part
from training.learner import Learner
from training.loop import settings as of_learner
from training.loop.copies import tensors_of
from training.loop.monitor import Monitor
from training.loop.plan import FitOptions, Plan
from training.provenance import keys_of
from training.scores.metrics import default_metrics
from training.sidecar import Dealt
from training.splits import dealt, grouped_by_content

_OF_FIT = {*FitOptions.__annotations__}
_OF_HEAD = ("hidden", "dropout", "queries")
_OF_NO_SCORE = ("device", "quiet", "workers", "on_missing", "allow_leak", "asked")
"""Options of a learner that decide how it works, or whether, and no number."""
_ALIKE = ("backbone", "cut", "reduce", "augment", "mix", "batch_size", "seed", "head", "hidden", "optimizer")
_MOST_TOGETHER = 128
"""Fits that begin together: wider products gain little, and what is finished is saved between."""
_ADAM_COPIES = 5
"""Of the weights of a head while it trains: its own, those in the stack, their gradient, two averages."""

Models = StagedModel | nn.Module | Mapping[str, StagedModel | nn.Module]


class Trials:
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
        # Once here, so that all learners share its stages.
        self.models = {
            name: each if isinstance(each, StagedModel) else StagedModel.from_module(each)
            for name, each in named.items()
        }
        if folds is not None and repeats != 1:
            raise ValueError(f"folds={folds} and repeats={repeats} are two kinds of several fits. Give one of them.")
        if groups is not None and folds is None:
            raise ValueError("groups are for folds, and there are none. Give folds=5 beside them, or leave them out.")
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

    def notes(self, settings: Sequence[Setting]) -> Iterator[str]:
        """What their owner should know of settings before they are tried."""
        idle = [{name for name in each if self._says_nothing(each, name)} for each in settings]
        kept = {
            setting_digest({name: value for name, value in each.items() if name not in of})
            for each, of in zip(settings, idle, strict=True)
        }
        if any(idle) and (num_equal := len(settings) - len(kept)):
            names = " and ".join(sorted(set[str]().union(*idle)))
            yield (
                f"{num_equal:,} of {len(settings):,} settings: equal to another one but for {names}, which their head "
                "doesn't have, so they come to the same"
            )
        steps = [self._num_steps(each) for each in settings if _kind_of(self._all(each)) != "linear"]
        if steps and min(steps) < FEW_STEPS:
            yield (
                f"{min(steps):,} optimizer steps a fit, which may be too few for a head with hidden layers: more "
                f"epochs, or batches of {SMALL_BATCH}"
            )

    def _says_nothing(self, setting: Setting, name: str) -> bool:
        options = HEAD_OPTIONS.get(_kind_of(self._all(setting)))
        return name in _OF_HEAD and options is not None and name not in options

    def _num_steps(self, setting: Setting) -> int:
        given = self._all(setting)
        epochs, size = int(given.get("epochs", 10)), int(given.get("batch_size", 64))
        batches = math.ceil(len(labelled(training_part(self.sets[0]))) / size)
        return epochs * math.ceil(batches / int(given.get("accumulate") or 1))

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
            words = ", ".join(f"{name} {shown(value)}" for name, value in place.items() if value is not None)
            head = given.get("head")
            is_pool, is_kept = str(head).startswith("attention"), head == "keep"
            key = f"{words or 'default'}{', attention' * is_pool}{', head kept' * is_kept}"
            if key not in places:
                learn, plan = self.made(each, 0)
                source = learn.ready(plan).train
                keys = [] if source is None else list(keys_of(source))
                places[key] = {"trunk": learn.model.digests()[learn.cut], "keys": keys}
                if not keys:  # which say it of features
                    places[key]["view"] = learn.view.facts()
                if is_kept:
                    tensors = dict(tensors_of(learn.model.unfrozen))
                    places[key]["head"] = digest_json({name: digest_tensor(each) for name, each in tensors.items()})
        digests = self.images.digests(self._known)
        targets = self.images.targets
        assert targets is not None
        return {
            "images": digest_bytes(digests.values.tobytes()),
            "labels": digest_bytes(targets.tobytes()),
            "classes": list(self.images.classes),
            "task": self.images.task,
            "split": digest_bytes("\0".join(self.images.splits.tolist()).encode()),
            "folds": self.folds,
            "folds_dealt": None if self.folds is None else digest_json([each.splits.tolist() for each in self.sets]),
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


def _kind_of(given: Mapping[str, Any]) -> str:
    head = given.get("head", "concat")
    return head.partition(":")[0] if isinstance(head, str) else ""


def _nothing(text: str) -> None:
    """What is told to nobody."""


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


def _fact_of(setting: Mapping[str, Any], name: str) -> Json:
    return setting_facts(setting).get(name)
