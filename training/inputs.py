"""Inputs: where the next fit reads from, derived from what is frozen and which augmentation was asked for, and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from featstore.commands import extract_remedy, seed_ranges
from featstore.digest import Json
from featstore.errors import FactsDifferError, FeatureStoreError, MissingFeaturesError
from featstore.extract import extract
from featstore.features import Features
from featstore.images import AbsentSource, ImageSet
from featstore.pool import Pool, automatic
from featstore.probe import check_probe, take_probes
from featstore.staged import AbsentStage, HeadStage, PoolStage, Stage, StagedModel
from featstore.store import FeatureRequest, FeatureSet, FeatureStore
from featstore.trunk import Output, Trunk
from featstore.views import Augment, View

OnMissing = Literal["error", "images", "extract"]
OnError = Literal["raise", "skip"]


@dataclass(frozen=True, kw_only=True, eq=False)
class FeatureSource:
    """Stored activations: one set of rows for each view, for the same images in the same order.

    Attributes:
        images: whose activations these are.
        features: one for each view.
        start: number of stages that have been run already.
        words: what it is, for people.
    """

    images: ImageSet
    features: tuple[Features, ...]
    start: int
    words: str
    kind: Literal["features"] = "features"


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageSource:
    """Images that are decoded and rendered in each epoch.

    Attributes:
        images: in order.
        digests: ``(N, 32)``, of their contents.
        views: the fixed views, or those of one policy with new seeds in each epoch.
        words: what it is, for people.
    """

    images: ImageSet
    digests: NDArray[np.uint8]
    views: tuple[View, ...] | Augment
    words: str
    kind: Literal["images"] = "images"
    start: int = 0


Source = FeatureSource | ImageSource


@dataclass(frozen=True, eq=False)
class Origin:
    """How a command names a trunk, and the digests for which that is true.

    Attributes:
        facts: `StagedModel.origin`; empty for a model made in Python.
        digests: cut -> digest, when it was named.
        view: that a command would use without view flags.
    """

    facts: dict[str, Json]
    digests: dict[str, str]
    view: View


@dataclass(frozen=True, kw_only=True, eq=False)
class Situation:
    """Everything that decides where inputs come from.

    Attributes:
        model: as it is now.
        origins: ways to name the trunk; the last whose weights it still has is used.
        images: the whole set.
        store: or None.
        view: geometry and normalisation.
        key: start of the key that the caller chose, or None.
        on_missing: what happens if the store could serve the model but doesn't hold the rows.
        on_error: what happens to images that can't be read or decoded.
        device: where the model lies.
        probed: sets that the model has been compared with; filled here.
    """

    model: StagedModel
    origins: tuple[Origin, ...]
    images: ImageSet
    store: FeatureStore | None
    view: View
    key: str | None
    on_missing: OnMissing
    on_error: OnError
    device: torch.device
    probed: set[tuple[str, str]] = field(default_factory=set)


@dataclass(frozen=True, kw_only=True, eq=False)
class Inputs:
    """Where the next fit reads from. Prints as sentences.

    Attributes:
        train: the source, or None where there is none or `problem` says what is missing.
        valid: likewise, for the images held out.
        why: the reason, in words.
        problem: the error that `fit` would raise, or None.
    """

    train: Source | None
    valid: Source | None
    why: str
    problem: FeatureStoreError | None

    def __str__(self) -> str:
        lines = []
        for name, source in (("train", self.train), ("valid", self.valid)):
            if source is not None:
                lines.append(f"{name}: {len(source.images):,} images from {source.words}")
        if self.problem is not None:
            lines.append(f"nothing can be trained: {self.problem}")
        lines.append(f"why: {self.why}")
        return "\n".join(lines)

    __repr__ = __str__


def derive(situation: Situation, augment: Augment | None) -> Inputs:
    """The inputs of the next fit: of the training images with `augment`, and of the held-out ones without."""
    images = situation.images
    train_images, valid_images = labelled(training_part(images)), labelled(images.valid)
    train = valid = None
    problem: FeatureStoreError | None = None
    try:
        train = find(situation, train_images, augment)
        valid = find(situation, valid_images, None) if len(valid_images) else None
    except FeatureStoreError as error:
        problem = error
    return Inputs(train=train, valid=valid, why=_why(situation, augment, train), problem=problem)


def training_part(images: ImageSet) -> ImageSet:
    """The images to train on: those of the split "train", or all where nothing was dealt."""
    return images.train if (images.splits != "").any() else images


def labelled(images: ImageSet) -> ImageSet:
    """The images that have a target."""
    if images.targets is None or images.task == "multi":
        return images
    return images if (images.targets >= 0).all() else images.select(images.targets >= 0)


def find(situation: Situation, images: ImageSet, augment: Augment | None) -> Source:
    """Where the activations of `images` in the views of `augment` (None: the evaluation view) come from.

    Raises:
        FeatureStoreError: if they can't be had; the message says which fact is in the way and what to do.
    """
    if live_reason(situation, augment) is not None:
        return _live(situation, images, augment)
    search = _Search(situation, images, augment)
    found = search.stored()
    if found is not None:
        return found
    if situation.on_missing == "images":
        return _live(situation, images, augment)
    if situation.on_missing == "extract":
        _extract(situation, augment)
        return find(replace(situation, on_missing="error"), images, augment)
    raise search.problem()


def live_reason(situation: Situation, augment: Augment | None) -> str | None:
    """Why stored features can't be used whatever the store holds, in words; None if they can."""
    model = situation.model
    if not any(_has_weights(stage) for stage in _stages(model)[: model.num_frozen]):
        return "nothing is frozen, so every stage trains"
    if augment is not None and augment.is_fresh:
        return f"seeds are fresh, new views in each epoch; the frozen {frozen_words(model)} runs on each of them"
    if situation.store is None:
        return f"there is no store; the frozen {frozen_words(model)} runs in each epoch"
    return None


def frozen_words(model: StagedModel) -> str:
    """The frozen stages, as ``conv1...layer4``; ``nothing`` if none is."""
    names = [stage.name for stage in _stages(model)[: model.num_frozen] if not isinstance(stage, PoolStage)]
    return _range(names) if names else "nothing"


def training_words(model: StagedModel) -> str:
    """The stages that train and have parameters, as ``layer4, head``; ``nothing`` if none has."""
    stages = _stages(model)
    of_group: dict[str, list[Stage]] = {}
    for stage in stages[model.num_frozen :]:
        of_group.setdefault(_group(stage.name), []).append(stage)
    words = []
    for group, members in of_group.items():
        if any(True for member in members for _ in member.parameters()):
            is_whole = len(members) == sum(_group(stage.name) == group for stage in stages)
            words.append(group if is_whole else _range([member.name for member in members]))
    return ", ".join(words) or "nothing"


def needed_output(model: StagedModel) -> tuple[str, Pool]:
    """Cut and reduction of the activations that the frozen part of `model` ends in."""
    stages = _stages(model)[: model.num_frozen]
    if isinstance(stages[-1], PoolStage):
        return stages[-2].name, stages[-1].pool
    return stages[-1].name, Pool("none", "other")


def frozen_trunk(situation: Situation, batch_size: int | None) -> Trunk | None:
    """The frozen part of the model as a trunk over uint8 views, or None if nothing is frozen."""
    model = situation.model
    if not model.num_frozen:
        return None
    cut, pool = needed_output(model)
    return Trunk(model, [Output(cut, pool)], view=situation.view, batch_size=batch_size, device=situation.device)


def stored_batch_size(situation: Situation) -> int | None:
    """B of the newest part of this model's features in the store, so that a live trunk gives the same bits."""
    if situation.store is None or not situation.store.root.is_dir():
        return None
    digests = set(situation.model.digests().values())
    fitting = [each for each in situation.store.sets() if each.spec.trunk in digests]
    on_device = [each for each in fitting if each.facts["profile"]["device"] == situation.device.type]
    newest = max(on_device, key=lambda each: str(each.facts["when"]), default=None)
    return None if newest is None else int(newest.facts["profile"]["batch_size"])


@dataclass(frozen=True, kw_only=True)
class _Candidate:
    """A place where the frozen part may be entered with stored activations."""

    start: int
    cut: str
    trunk: str
    pool: Pool


class _Search:
    """One search for stored activations, and the explanation if it fails."""

    def __init__(self, situation: Situation, images: ImageSet, augment: Augment | None) -> None:
        assert situation.store is not None
        self.situation, self.images, self.augment = situation, images, augment
        self.model, self.store = situation.model, situation.store
        self.views = augment.views(situation.view) if augment is not None else (situation.view,)
        self.known = self.store.known_digests(situation.images)
        self.digests = images.digests(self.known)
        self.model_digests = self.model.digests()
        key = situation.key
        self.chosen = self.store.set(key) if key is not None else None
        self.candidates = list(self._candidates())

    def stored(self) -> FeatureSource | None:
        """Rows of all views at the deepest place that has them, or None."""
        for candidate in self.candidates:
            sets = [self._set(candidate, view) for view in self.views]
            complete = [each for each in sets if each is not None and not self._lacking(each).any()]
            if len(complete) == len(self.views):
                for each in complete:
                    self._check_probe(candidate, each)
                features = self._joined(complete)
                return FeatureSource(
                    images=features[0].images,
                    features=features,
                    start=candidate.start,
                    words=self._words(candidate, complete),
                )
        return None

    def problem(self) -> FeatureStoreError:
        """Why there are no rows: the first fact that is in the way, with its remedy."""
        for candidate in self.candidates:
            evaluation = self._set(candidate, self.situation.view)
            sets = [self._set(candidate, view) for view in self.views]
            if all(each is not None for each in sets):
                return self._rows_missing(candidate, [each for each in sets if each is not None])
            if evaluation is not None:
                return self._views_missing(candidate, evaluation, sets)
        behind = [each for each in self._all_sets() if self._is_behind(each)]
        if behind:
            return self._too_deep(behind)
        return self._facts_differ()

    def _candidates(self) -> list[_Candidate]:
        stages, found = _stages(self.model), []
        for place in range(self.model.num_frozen - 1, -1, -1):
            stage = stages[place]
            if isinstance(stage, PoolStage):
                cut, pool = stages[place - 1].name, stage.pool
            else:
                cut, pool = stage.name, Pool("none", "other")
            if not isinstance(stage, HeadStage):
                found.append(_Candidate(start=place + 1, cut=cut, trunk=self.model_digests[cut], pool=pool))
        return found

    def _request(self, candidate: _Candidate, view: View) -> FeatureRequest:
        spec = None if self.chosen is None else self.chosen.spec
        return FeatureRequest(
            trunk=candidate.trunk,
            pool=candidate.pool.facts(),
            view=view,
            dtype=None if spec is None else spec.dtype,
            precision=None if spec is None else spec.precision,
        )

    def _set(self, candidate: _Candidate, view: View) -> FeatureSet | None:
        if self.chosen is not None and (
            candidate.trunk != self.chosen.spec.trunk or candidate.pool.facts() != self.chosen.spec.pool
        ):
            return None
        return self.store.find_one(self._request(candidate, view))

    def _lacking(self, each: FeatureSet) -> NDArray[np.bool_]:
        missing = self.store.missing(each, self.digests)
        if self.situation.on_error == "skip":
            missing = missing & ~self.store.is_failed(each, self.digests)
        return missing

    def _joined(self, sets: Sequence[FeatureSet]) -> tuple[Features, ...]:
        on_error = self.situation.on_error
        joined = [self.store.features(self.images, each, on_error=on_error) for each in sets]
        if len({each.ids for each in joined}) > 1:  # an image may have failed in one view only
            common = set.intersection(*({*each.ids} for each in joined))
            images = self.images.select([name in common for name in self.images.ids])
            joined = [self.store.features(images, each, on_error=on_error) for each in sets]
        return tuple(joined)

    def _words(self, candidate: _Candidate, sets: Sequence[FeatureSet]) -> str:
        named = f"{self.model.name}@{candidate.cut} {candidate.pool.reduction}"
        keys = ", ".join(each.key[:8] for each in sets)
        return f"features, {named}, {_views_words(self.augment)} ({'set' if len(sets) == 1 else 'sets'} {keys})"

    def _check_probe(self, candidate: _Candidate, each: FeatureSet) -> None:
        """Compares the live trunk with the stored set, once for each set and model digest."""
        if self.model.is_absent or (each.key, candidate.trunk) in self.situation.probed:
            return
        output = Output(candidate.cut, candidate.pool)
        view, precision, device = self.situation.view, each.spec.precision, self.situation.device
        (live,) = take_probes(self.model, [output], view=view, precision=precision, device=device)
        trunk = Trunk(self.model, [output], view=view, device=device)
        check_probe(
            each.facts["probe"],
            live,
            precision=precision,
            what=f"set {each.key[:8]} ({candidate.cut} {candidate.pool.reduction})",
            profile=each.facts["profile"],
            now=trunk.profile(),
        )
        self.situation.probed.add((each.key, candidate.trunk))

    # ------------------------------------------------------------------------------------------------ explanations

    def _rows_missing(self, candidate: _Candidate, sets: Sequence[FeatureSet]) -> FeatureStoreError:
        lacking = np.logical_or.reduce([self._lacking(each) for each in sets])
        failed = lacking & np.logical_or.reduce([self.store.is_failed(each, self.digests) for each in sets])
        changed = np.array(
            [
                name in self.known and self.known[name].digest != bytes(digest)
                for name, digest in zip(self.images.ids, self.digests.values, strict=True)
            ],
            dtype=bool,
        )
        counts = [
            (int((lacking & ~failed & ~changed).sum()), "new"),
            (int((lacking & ~failed & changed).sum()), "changed since"),
            (int(failed.sum()), "unreadable, which --on-error skip leaves out"),
        ]
        parts = ", ".join(f"{count:,} {_are(count)} {what}" for count, what in counts if count)
        names = [self.images.ids[place] for place in np.flatnonzero(lacking)[:3]]
        total = int(lacking.sum())
        return MissingFeaturesError(
            f"{self.store.root} holds {len(lacking) - total:,} of the {len(lacking):,} images asked for "
            f"({self.model.name}@{candidate.cut} {candidate.pool.reduction}, {_views_words(self.augment)}): {parts} "
            f"({', '.join(names)}{', ...' if total > 3 else ''}). Nothing was trained. Compute the {total:,}: "
            f"{self._remedy(candidate.cut, candidate.pool, sets[0])} - or pass --extract (in Python: "
            'on_missing="extract").'
        )

    def _views_missing(
        self, candidate: _Candidate, evaluation: FeatureSet, sets: Sequence[FeatureSet | None]
    ) -> FeatureStoreError:
        assert self.augment is not None
        assert self.augment.seeds != "fresh"
        policy = self.augment.policy
        absent = [seed for seed, each in zip(self.augment.seeds, sets, strict=True) if each is None]
        stored = {
            each.spec.rendered.seed: each.key[:8]
            for each in self._sets_like(candidate, evaluation)
            if each.spec.rendered.policy == policy and each.spec.rendered.seed is not None
        }
        seeds = sorted(seed for seed in stored if seed is not None)
        holds = f"the evaluation view and seeds {seed_ranges(seeds)}" if seeds else "the evaluation view only"
        keys = (
            f"set {evaluation.key[:8]}"
            if not seeds
            else (f"sets {evaluation.key[:8]} and {', '.join(stored[seed] for seed in seeds)}")
        )
        missing = Augment(policy, seeds=absent)
        fewer = f"or use --seeds {seed_ranges(seeds)}; " if seeds else "or leave the augmentation out; "
        return MissingFeaturesError(
            f"You asked for augmentation {policy.name}, seeds {seed_ranges(self.augment.seeds)}; "
            f"{self.store.root} holds {holds} ({keys}). Augmentation can't be applied to stored features afterwards. "
            "Either add the views: "
            f"{self._remedy(candidate.cut, candidate.pool, evaluation, missing)}; {fewer}or train from images with "
            "--seeds fresh (the trunk then runs every epoch)."
        )

    def _too_deep(self, behind: Sequence[FeatureSet]) -> FeatureStoreError:
        cut, pool = needed_output(self.model)
        listed = ", ".join(dict.fromkeys(f"{each.facts['cut']}{_pooled(each)}" for each in behind))
        deepest = max(behind, key=lambda each: self.model.index(each.facts["cut"]))
        shape = pool.shape(self.model.shape(cut, self.situation.view.size))
        count = len(self.situation.images)
        size = count * int(np.prod(shape, dtype=np.int64)) * 2 / 1e9
        serves = (
            "the head alone" if self.model.index(deepest.facts["cut"]) == self._head_cut() else "later stages alone"
        )
        return MissingFeaturesError(
            f'freeze_to("{cut}") trains {training_words(self.model)}, so it needs {_maps(shape)} at {cut}; '
            f"{self.store.root} holds only {listed}, which can train {serves}. Extract them ({count:,} x "
            f"{'x'.join(map(str, shape))} float16 = {size:.2g} GB): {self._remedy(cut, pool, None, self.augment)}; or "
            f'freeze_to("{deepest.facts["cut"]}"); or on_missing="images".'
        )

    def _facts_differ(self) -> FeatureStoreError:
        cut, pool = needed_output(self.model)
        remedy = self._remedy(cut, pool, None, self.augment)
        sets = self._all_sets()
        if not sets:
            return MissingFeaturesError(
                f"{self.store.root} holds no features yet. Extract them: {remedy} - or pass --extract (in Python: "
                'on_missing="extract").'
            )
        counted = [
            (self._differences(each, cut, pool), int((~self.store.missing(each, self.digests)).sum()), each)
            for each in sets
            if each.spec.rendered.is_evaluation
        ] or [(self._differences(sets[0], cut, pool), 0, sets[0])]
        differences, rows, nearest = min(counted, key=lambda item: (len(item[0]), -item[1]))
        still = self._still_valid(nearest)
        return FactsDifferError(
            f"No stored features fit this request in {self.store.root}. Nearest is set {nearest.key[:8]} ({rows:,} of "
            f"{len(self.images):,} images); it differs in: {'; '.join(differences)}. "
            f"{still}Extract what you ask for: {remedy}."
        )

    def _differences(self, each: FeatureSet, cut: str, pool: Pool) -> list[str]:
        found = []
        if each.spec.trunk != self.model_digests[cut]:
            found.append(self._trunk_difference(each, cut))
        if each.spec.pool != pool.facts():
            found.append(f"reduction (stored {each.spec.reduction}, yours {pool.reduction})")
        stored_view = each.spec.rendered
        for name, stored, mine in stored_view.evaluation.differences(self.situation.view):
            found.append(f"{name} (stored {stored}, yours {mine})")
        if self.chosen is not None:
            for name in ("dtype", "precision"):
                stored, mine = getattr(each.spec, name), getattr(self.chosen.spec, name)
                if stored != mine:
                    found.append(f"{name} (stored {stored}, yours {mine})")
        return found

    def _trunk_difference(self, each: FeatureSet, cut: str) -> str:
        stored_cut = str(each.facts["cut"])
        if self.model_digests.get(stored_cut) == each.spec.trunk:
            return f"cut (stored {stored_cut}, yours {cut})"
        stored = {stage["name"]: stage["digest"] for stage in each.facts["stages"]}
        shared = [name for name in stored if name in self.model_digests]
        is_other = each.facts["backbone"] != self.model.name
        if not shared or (is_other and stored[shared[0]] != self.model_digests[shared[0]]):
            return f"model (stored {each.facts['backbone']}@{stored_cut}, yours {self.model.name}@{cut})"
        first = next((name for name in shared if stored[name] != self.model_digests[name]), None)
        if first is None:  # as far as both go they are equal
            return f"cut (stored {stored_cut}, yours {cut})"
        equal = shared[: shared.index(first)]
        equals = f"; {_range([self._coarse(equal[0]), equal[-1]])} are equal" if equal else ""
        mine = self.model_digests[first]
        return f"weights of stage {self._coarse(first)} (stored {stored[first][:8]}, yours {mine[:8]}{equals})"

    def _still_valid(self, each: FeatureSet) -> str:
        stored = {stage["name"]: stage["digest"] for stage in each.facts["stages"]}
        shared = [name for name in stored if name in self.model_digests]
        equal = [name for name in shared if self.model_digests[name] == stored[name]]
        if not equal or equal == shared:
            return ""
        return f"Features at {equal[-1]} would still be valid. "

    def _coarse(self, name: str) -> str:
        """The name of the group a stage is in, if that is itself the name of a cut (``layer4``)."""
        group = _group(name)
        return group if group in self.model_digests else name

    def _all_sets(self) -> list[FeatureSet]:
        return self.store.sets() if self.store.root.is_dir() else []

    def _sets_like(self, candidate: _Candidate, evaluation: FeatureSet) -> list[FeatureSet]:
        view = evaluation.spec.rendered
        return [
            each
            for each in self.store.sets(candidate.trunk)
            if each.spec.pool == evaluation.spec.pool
            and each.spec.dtype == evaluation.spec.dtype
            and each.spec.precision == evaluation.spec.precision
            and each.spec.rendered.evaluation == view
        ]

    def _is_behind(self, each: FeatureSet) -> bool:
        """Whether a set is this model's, in this geometry, but deeper than the freeze point or pooled before it."""
        cut = str(each.facts["cut"])
        return self.model_digests.get(cut) == each.spec.trunk and each.spec.rendered.evaluation == self.situation.view

    def _head_cut(self) -> int:
        places = [place for place, stage in enumerate(_stages(self.model)) if isinstance(stage, PoolStage)]
        return places[-1] - 1 if places else -1

    def _remedy(self, cut: str, pool: Pool, like: FeatureSet | None, augment: Augment | None = None) -> str:
        """The command or call that computes activations at `cut`, with the facts of `like` where there is one."""
        augment = augment if augment is not None else self.augment
        named = _as_named(self.situation, cut)
        default = automatic(self.model.layout(cut), self.model.class_tokens)
        text = extract_remedy(
            named or _nameless(self.model),
            self.situation.images,
            self.store.root,
            cuts=[cut if pool.reduction == default else f"{cut}:{pool.reduction}"],
            view=self.situation.view,
            augment=None if augment is None or augment.is_fresh else augment,
            dtype=None if like is None else like.spec.dtype,
            precision=None if like is None else like.spec.precision,
            on_error=self.situation.on_error,
        )
        return text if named is not None else text.replace("extract(model,", "extract(learn.model,", 1)


def _nameless(model: StagedModel) -> StagedModel:
    nameless = model.sharing()
    nameless.origin = {}
    return nameless


def _live(situation: Situation, images: ImageSet, augment: Augment | None) -> ImageSource:
    """The images themselves.

    Raises:
        FeatureStoreError: if their files aren't here, or the trunk isn't.
    """
    model = situation.model
    if model.is_absent:
        raise FeatureStoreError(
            f"The trunk of {model.name} isn't here, only its digests, so images can't be run through it. Attach it "
            "with learn.attach(model), or train what features can serve."
        )
    absent = images.absent()
    if absent and (situation.on_error == "raise" or len(absent) == len(images)):
        raise _images_absent(situation, images, absent)
    known = {} if situation.store is None else situation.store.known_digests(situation.images)
    digests = images.digests(known)
    if digests.failed and situation.on_error == "raise":
        place, reason = next(iter(digests.failed.items()))
        raise FeatureStoreError(f"{images.ids[place]}: {reason}.")
    if digests.failed:
        keep = ~digests.is_failed
        images, digests = images.select(keep), images.select(keep).digests(known)
    views: tuple[View, ...] | Augment = (situation.view,)
    if augment is not None:
        views = augment if augment.is_fresh else augment.views(situation.view)
    runs = f"; {frozen_words(model)} runs on them" if model.num_frozen else ""
    return ImageSource(
        images=images, digests=digests.values, views=views, words=f"images, {_views_words(augment)}{runs}"
    )


def _images_absent(situation: Situation, images: ImageSet, absent: Sequence[int]) -> FeatureStoreError:
    model, store = situation.model, situation.store
    reason = "unfreeze() makes fit read images" if not model.num_frozen else "fit reads images here"
    origin = "their folder lacks some"
    if isinstance(images.source, AbsentSource):
        origin = f"this image set came from a store ({images.source.where}), which has none"
    served = []
    if store is not None and store.root.is_dir():
        digests = model.digests()
        served = [str(each.facts["cut"]) for each in store.sets() if digests.get(each.facts["cut"]) == each.spec.trunk]
    deepest = max(served, key=model.index, default=None)
    instead = f', or train what features can serve: freeze_to("{deepest}")' if deepest else ""
    return FeatureStoreError(
        f"{reason}, and {origin}: {len(absent):,} of {len(images):,} files are absent (first: "
        f"{images.ids[absent[0]]}). "
        f'Give their folder with images.with_root("/new/place"){instead}.'
    )


def _extract(situation: Situation, augment: Augment | None) -> None:
    assert situation.store is not None
    cut, pool = needed_output(situation.model)
    extract(
        situation.model,
        situation.images,
        situation.store,
        cuts=[f"{cut}:{pool.reduction}"],
        augment=augment,
        view=situation.view,
        on_error=situation.on_error,
        device=situation.device,
        progress=True,
    )


def _as_named(situation: Situation, cut: str) -> StagedModel | None:
    """The model under the last name whose weights up to `cut` are those that will run; None if they have changed."""
    digest = situation.model.digest(cut)
    for origin in reversed(situation.origins):
        if origin.digests.get(cut) == digest:
            named = situation.model.sharing()
            named.origin, named.view = dict(origin.facts), origin.view
            return named
    return None


def _why(situation: Situation, augment: Augment | None, train: Source | None) -> str:
    reason = live_reason(situation, augment)
    if reason is not None:
        return reason
    frozen = frozen_words(situation.model)
    if train is None:
        return f"{frozen} {_are_of(frozen)} frozen, so stored features could serve"
    if isinstance(train, ImageSource):
        assert situation.store is not None
        holds = f"{situation.store.root} lacks what was asked for"
        return f'{frozen} {_are_of(frozen)} frozen, but {holds}, and on_missing is "images"'
    behind = _stages(situation.model)[train.start : situation.model.num_frozen]
    names = [stage.name for stage in behind if not isinstance(stage, PoolStage)]
    more = f"; {_range(names)} {_are_of(_range(names))} run on the stored activations" if names else ""
    return f"{frozen} {_are_of(frozen)} frozen{more}"


def _views_words(augment: Augment | None) -> str:
    if augment is None:
        return "evaluation view"
    if augment.seeds == "fresh":
        return f"{augment.policy.name}, fresh seeds"
    return f"{augment.policy.name}, seeds {seed_ranges(augment.seeds)}"


def _stages(model: StagedModel) -> list[Stage]:
    return list(model.stages)  # type: ignore[arg-type]


def _has_weights(stage: Stage) -> bool:
    return isinstance(stage, AbsentStage) or next(stage.parameters(), None) is not None


def _group(name: str) -> str:
    return name.partition(".")[0]


def _range(names: Sequence[str]) -> str:
    return names[0] if names[0] == names[-1] else f"{names[0]}...{names[-1]}"


def _pooled(each: FeatureSet) -> str:
    return "" if each.spec.reduction == "none" else f", pooled ({each.spec.reduction})"


def _maps(shape: tuple[int, ...]) -> str:
    return {3: "maps", 2: "tokens", 1: "vectors"}.get(len(shape), "activations")


def _are(count: int) -> str:
    return "is" if count == 1 else "are"


def _are_of(names: str) -> str:
    return "are" if "..." in names or "," in names else "is"
