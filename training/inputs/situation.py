"""Situation: everything that decides where a fit's inputs come from, and the words for what is frozen and asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import torch

from featstore.digest import Json
from featstore.errors import OnError
from featstore.extraction.remedy import seed_ranges
from featstore.images.digests import KnownDigests
from featstore.images.image_set import ImageSet
from featstore.images.views import Augment, View
from featstore.models.names import Precision
from featstore.models.pool import Pool
from featstore.models.staged import StagedModel
from featstore.models.stages import HeadStage, PoolStage, Stage, has_weights
from featstore.store.sets import FeatureSet
from featstore.store.store import FeatureStore

OnMissing = Literal["error", "images", "extract"]


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

    @classmethod
    def of(cls, model: StagedModel) -> Origin:
        """How `model` is named now, with the weights that it has now."""
        return cls(dict(model.origin), model.digests(), model.named_view)


@dataclass(frozen=True)
class Entry:
    """A place where the frozen part of a model may be entered with stored activations.

    Attributes:
        start: how many stages have been run already.
        cut: where the activations were taken.
        pool: their reduction.
    """

    start: int
    cut: str
    pool: Pool


@dataclass(frozen=True, kw_only=True, eq=False)
class Situation:
    """What is known at one moment; the model isn't trained while it is in use.

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
        probed: (set, trunk) that have been compared by their probes; filled here.
        precision: of the frozen part's arithmetic in what was trained on; None where nothing was.
        is_scoring: whether it is scores or predictions that are wanted, and nothing trains; for words.
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
    precision: Precision | None = None
    is_scoring: bool = False

    @classmethod
    def of(
        cls,
        model: StagedModel,
        images: ImageSet,
        store: FeatureStore | None = None,
        *,
        view: View | None = None,
        key: str | None = None,
        on_missing: OnMissing | None = None,
        on_error: OnError = "raise",
        device: torch.device | None = None,
        origins: Sequence[Origin] | None = None,
        probed: set[tuple[str, str]] | None = None,
        precision: Precision | None = None,
    ) -> Situation:
        """The situation of `model` as it is now; what isn't given is as in a new `Learner`.

        Args:
            model: with its head and its freeze point.
            images: to train on and to score, dealt or not.
            store: where features are looked up.
            view: default: the model's own.
            key: as `features` of `Learner`.
            on_missing: default: ``error`` with a store, else ``images``.
            on_error: as in `Learner`.
            device: where the model lies; default: where its first parameter does.
            origins: default: the name that the model has now.
            probed: what was compared before, which is added to.
            precision: of the frozen part's arithmetic in what was trained on.
        """
        if device is None:
            device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
        return cls(
            model=model,
            origins=(Origin.of(model),) if origins is None else tuple(origins),
            images=images,
            store=store,
            view=(view or model.view).evaluation,
            key=key,
            on_missing=on_missing or default_on_missing(store),
            on_error=on_error,
            device=device,
            probed=set() if probed is None else probed,
            precision=precision,
        )

    @cached_property
    def digests(self) -> dict[str, str]:
        """Cut -> digest; taken once, as it hashes all weights (0.1 s for a resnet50)."""
        every = self.model.digests()
        return {cut: every[cut] for cut in self.model.cut_points}

    @cached_property
    def known(self) -> KnownDigests:
        """What the store knows of the image files."""
        return KnownDigests() if self.store is None else self.store.known_digests(self.images)

    @cached_property
    def chosen(self) -> FeatureSet | None:
        """The set that `key` names."""
        return None if self.key is None or self.store is None else self.store.set(self.key)

    @cached_property
    def sets(self) -> list[FeatureSet]:
        """All sets of features in the store; none where there is no folder yet."""
        stored = self.store.sets() if self.store is not None and self.store.folder.is_dir() else []
        return [each for each in stored if not each.spec.is_pixels]

    @cached_property
    def entries(self) -> tuple[Entry, ...]:
        """Where the frozen part may be entered, the deepest first; empty if nothing is frozen."""
        stages = self.model.ordered
        places = range(self.model.num_frozen - 1, -1, -1)
        return tuple(_entry(stages, place) for place in places if not isinstance(stages[place], HeadStage))

    def servable(self) -> dict[str, FeatureSet]:
        """Cut -> a stored set that could serve this model if it were frozen to that cut, in the evaluation view."""
        found = {}
        stages = self.model.ordered
        for place, stage in enumerate(stages[:-1]):
            entries = [_entry(stages, place)]
            if isinstance(stages[place + 1], PoolStage):  # freezing to the value before a pool freezes the pool
                entries.append(_entry(stages, place + 1))
            for each in self.sets:
                facts = [entry.pool.facts() for entry in entries]
                is_same = each.spec.trunk == self.digests.get(stage.name) and each.spec.pool in facts
                if is_same and each.spec.rendered == self.view:
                    found[stage.name] = each
        return found

    def named_model(self, cut: str) -> StagedModel | None:
        """The model under the last name whose weights up to `cut` are those that will run; None if they changed."""
        for origin in reversed(self.origins):
            if origin.digests.get(cut) == self.digests[cut]:
                return self.model.with_(view=origin.view, origin=origin.facts)
        return None


def default_on_missing(store: FeatureStore | None) -> OnMissing:
    """What a store that lacks rows does to a fit, if nobody says."""
    return "error" if store is not None else "images"


def frozen_words(model: StagedModel) -> str:
    """The frozen stages, as ``conv1...layer4``; ``nothing`` if none is."""
    names = [stage.name for stage in model.ordered[: model.num_frozen] if not isinstance(stage, PoolStage)]
    return name_range(names) if names else "nothing"


def training_words(model: StagedModel, *, with_head: bool = True) -> str:
    """The stages that train and have parameters, as ``layer4, head``; ``nothing`` if none has."""
    stages = model.ordered
    of_group: dict[str, list[Stage]] = {}
    for stage in stages[model.num_frozen :]:
        if with_head or not isinstance(stage, HeadStage):
            of_group.setdefault(group_of(stage.name), []).append(stage)
    words = []
    for group, members in of_group.items():
        if any(has_weights(member) for member in members):
            is_whole = len(members) == sum(group_of(stage.name) == group for stage in stages)
            words.append(group if is_whole else name_range([member.name for member in members]))
    return ", ".join(words) or "nothing"


def freezing_words(model: StagedModel) -> str:
    """What is frozen and what trains, with its number of parameters, in a line."""
    count = sum(parameter.numel() for parameter in model.trained_parameters())
    return (
        f"frozen: {frozen_words(model)}; training: {training_words(model)} "
        f"({f'{count / 1e6:.1f} M' if count >= 100_000 else f'{count:,}'} parameters)"
    )


def images_words(images: ImageSet) -> str:
    """How many images there are, and how they are dealt."""
    if not len(images):
        return "no images"
    parts = [(name, int((images.splits == name).sum())) for name in ("train", "valid", "test")]
    dealt = ", ".join(f"{name} {count:,}" for name, count in parts if count)
    return f"{len(images):,} images" + (f": {dealt}" if dealt else "")


def views_words(augment: Augment | None) -> str:
    """The views that `augment` asks for."""
    if augment is None:
        return "evaluation view"
    if augment.seeds == "fresh":
        return f"{augment.policy.label}, fresh seeds"
    return f"{augment.policy.label}, seeds {seed_ranges(augment.seeds)}"


def group_of(name: str) -> str:
    """The first part of a cut's name: ``layer4`` of ``layer4.1``."""
    return name.partition(".")[0]


def name_range(names: Sequence[str]) -> str:
    """The first and last of names in order, as ``conv1...layer3``."""
    group = group_of(names[0])
    first = group if group in names else names[0]  # a whole group goes by its name
    return first if first == names[-1] else f"{first}...{names[-1]}"


def is_or_are(names: str) -> str:
    """The verb for what `name_range` gave."""
    return "are" if "..." in names or "," in names else "is"


def run_or_runs(names: str) -> str:
    """Another verb for it."""
    return "run" if "..." in names or "," in names else "runs"


def _entry(stages: Sequence[Stage], place: int) -> Entry:
    stage = stages[place]
    if isinstance(stage, PoolStage):
        return Entry(place + 1, stages[place - 1].name, stage.pool)
    return Entry(place + 1, stage.name, Pool("none", "other"))
