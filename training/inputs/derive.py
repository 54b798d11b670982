"""Inputs: where the next fit reads from, derived from what is frozen and which augmentation was asked for, and why."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from featstore.errors import (
    AmbiguousRequestError,
    DamagedFileError,
    FactsDifferError,
    FeatureStoreError,
    ImageError,
    MissingFeaturesError,
)
from featstore.extraction.extract import extract
from featstore.html import titled_table
from featstore.images.image_set import ImageSet
from featstore.images.origins import made_by
from featstore.images.pixel_digest import check_pixels
from featstore.images.views import Augment, View
from featstore.models.names import DEFAULT_PRECISION, Batching, Precision
from featstore.models.probe import check_probe, take_probes
from featstore.models.stages import PoolStage, has_weights
from featstore.models.trunk import Output, Trunk
from featstore.store.features import Features
from featstore.store.sets import FeatureSet
from training.inputs.explain import images_absent, why_not
from training.inputs.held import HeldSource
from training.inputs.search import Search
from training.inputs.situation import (
    Entry,
    Situation,
    frozen_words,
    is_or_are,
    name_range,
    run_or_runs,
    views_words,
)


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


Source = FeatureSource | ImageSource | HeldSource


@dataclass(frozen=True, kw_only=True, eq=False)
class Inputs:
    """Where the next fit reads from. Prints as sentences.

    Attributes:
        train: the source, or None where there is none yet.
        valid: likewise, for the images held out.
        why: the reason, in words.
        first: what `fit` computes before it reads, in words; None if nothing.
        problem: the error that `fit` would raise, or None.
    """

    train: Source | None
    valid: Source | None
    why: str
    first: str | None
    problem: FeatureStoreError | None

    def __str__(self) -> str:
        lines = []
        for name, source in (("train", self.train), ("valid", self.valid)):
            if source is not None:
                lines.append(f"{name}: {len(source.images):,} images from {source.words}")
        if self.first is not None:
            lines.append(f"first: {self.first}")
        if self.problem is not None:
            lines.append(f"nothing can be trained: {self.problem}")
        return "\n".join([*lines, f"why: {self.why}"])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return titled_table(str(self))

    def left_out_note(self, images: ImageSet) -> str | None:
        """How many labelled images of `images` that were to be read can't be, in words; None if all can."""
        kept = {name for source in (self.train, self.valid) if source is not None for name in source.images.ids}
        wanted = (training_part(images), labelled(images.valid))
        left_out = [name for part in wanted for name in labelled(part).ids if name not in kept]
        if not left_out:
            return None
        named = f"{', '.join(left_out[:3])}{', ...' * (len(left_out) > 3)}"
        return f"{len(left_out):,} image{'s' * (len(left_out) > 1)} can't be read, left out: {named}"


def derive(situation: Situation, augment: Augment | None) -> Inputs:
    """The inputs of the next fit: of the training images with `augment`, and of the held-out ones without.

    Nothing is extracted; `Inputs.first` says what would be, and `extract_missing` does it.
    """
    images = situation.images
    training = training_part(images)
    train = valid = first = None
    problem: FeatureStoreError | None = None
    if not len(labelled(training)) or training.targets is None:
        problem = FeatureStoreError("There are no labelled images to train on. Give an image set with classes.")
        why = "no labelled images were given; files can be predicted all the same"
        return Inputs(train=None, valid=None, why=why, first=None, problem=problem)
    try:
        train = find(situation, labelled(training), augment, asked=images if augment is None else training)
        held_out = labelled(images.valid)
        # With fresh seeds the images are read anyway, so nothing is missing.
        is_fresh = augment is not None and augment.is_fresh
        scoring = replace(situation, on_missing="images") if is_fresh else situation
        valid = find(scoring, held_out, None, asked=images) if len(held_out) else None
    except (MissingFeaturesError, FactsDifferError) as error:
        if situation.on_missing == "extract":
            entry, words = situation.entries[0], views_words(augment)
            first = (
                f"fit extracts {situation.model.name}@{entry.cut} {entry.pool.reduction}, {words}, as far as missing"
            )
        else:
            problem = error
    except FeatureStoreError as error:
        problem = error
    return Inputs(train=train, valid=valid, why=_why(situation, augment, train), first=first, problem=problem)


def training_part(images: ImageSet) -> ImageSet:
    """The images to train on: those of the split "train", or all where nothing was dealt."""
    return images.train if (images.splits != "").any() else images


def labelled(images: ImageSet) -> ImageSet:
    """The images that have a target."""
    if images.targets is None:
        return images.select([])
    if images.task == "multi":
        return images
    if images.task == "regression":
        return images.select(~np.isnan(images.targets).any(axis=1))
    return images if (images.targets >= 0).all() else images.select(images.targets >= 0)


def to_train(images: ImageSet) -> ImageSet:
    """The labelled images to train on.

    Raises:
        ValueError: if there are none; or if images are held out to choose by, and not one of them has a label.
    """
    training = labelled(training_part(images))
    if not len(training) or training.targets is None:
        raise ValueError("There are no labelled images to train on. Give an image set with classes.")
    if len(images.valid) and not len(labelled(images.valid)):
        raise ValueError(
            f"None of the {len(images.valid):,} images of the split valid has a label (first: {images.valid.ids[0]}), "
            "so no epoch can be scored on them. Expected labels as those of the training images have: a folder for "
            f"each class, or a value in the column of labels. Add them; or {_without_split(images)}."
        )
    return training


def _without_split(images: ImageSet) -> str:
    """What to give instead where the held-out images of a set can't be scored."""
    origin = made_by(images)
    if origin is None:
        return "give the training images alone (learn.images = learn.images.train), and no epoch is scored"
    return origin.without_valid(images)


def to_score(images: ImageSet, split: str) -> ImageSet:
    """The labelled images of a split: train, valid or test.

    Raises:
        ValueError: if there are none.
    """
    if split not in ("train", "valid", "test"):
        raise ValueError(f"{split!r} is no split; expected train, valid or test.")
    chosen = labelled(training_part(images) if split == "train" else getattr(images, split))
    if not len(images):
        raise ValueError(
            "This learner has no images, so it can predict but not score. Expected labelled ones. Give them when "
            "it is loaded: Learner.load(run, images, store)."
        )
    if not len(chosen) or chosen.targets is None:
        raise ValueError(
            f"The split {split} has no labelled images. Expected some to score among {images.describe()}. "
            "Score another split (--split), or give other images (in Python: learn.images = images)."
        )
    return chosen


def find(situation: Situation, images: ImageSet, augment: Augment | None, *, asked: ImageSet | None = None) -> Source:
    """Where the activations of `images` in the views of `augment` (None: the evaluation view) come from.

    Args:
        situation: with on_missing "images" they are read where they aren't stored.
        images: in order.
        augment: the views.
        asked: the images that an error counts; default: `images`.

    Raises:
        FeatureStoreError: if they can't be had; the message says which fact is in the way and what to do.
    """
    if _live_reason(situation, augment) is not None:
        return from_images(situation, images, augment)
    search = Search(situation, images, augment)
    found = search.complete()
    if found is not None:
        return _stored(search, *found)
    if situation.on_missing == "images":
        return from_images(situation, images, augment)
    raise why_not(search, images if asked is None else asked)


def find_to_score(
    situation: Situation, images: ImageSet, augment: Augment | None, *, say: Callable[[str], None]
) -> tuple[Situation, Source]:
    """Where `images` come from for scores and predictions, and the situation for that source.

    Their numbers are right wherever they are read: what isn't stored is read from images, and neither several fitting
    sets nor a damaged one are a reason to stop, unless there is nothing to read.

    Args:
        situation: its on_missing doesn't count.
        images: in order.
        augment: the views, of fixed seeds; None: the evaluation view.
        say: gets a sentence about a set that isn't used.

    Raises:
        FeatureStoreError: if they can't be had.
    """
    absent = images.absent(None if situation.on_error == "skip" else 1)
    is_readable = not situation.model.is_absent and (
        not absent or (situation.on_error == "skip" and len(absent) < len(images))
    )
    situation = replace(situation, on_missing="images" if is_readable else "error", is_scoring=True)
    try:
        return situation, find(situation, images, augment)
    except (AmbiguousRequestError, DamagedFileError, FactsDifferError) as error:
        if not is_readable:
            raise
        if not isinstance(error, AmbiguousRequestError):
            say(f"images are read instead of features: {error}")
        situation = replace(situation, store=None)
        return situation, find(situation, images, augment)


def extract_missing(situation: Situation, augment: Augment | None, *, progress: bool) -> tuple[str, ...]:
    """Computes what the store lacks of the activations that the frozen part ends in.

    Rows are added to the set that is there; a new set has the type and precision of the chosen key, if any. The result
    is what its owner should read about it.
    """
    assert situation.store is not None
    entry = situation.entries[0]
    search = Search(situation, situation.images, augment)
    sets = [search.set_at(entry, situation.view), *search.sets_at(entry), situation.chosen]
    like = next((each for each in sets if each is not None), None)
    settings = {} if like is None else {"dtype": like.spec.dtype, "precision": like.spec.precision}
    report = extract(
        situation.model,
        situation.images,
        situation.store,
        cuts=[f"{entry.cut}:{entry.pool.reduction}"],
        augment=augment,
        view=situation.view,
        on_error=situation.on_error,
        device=situation.device,
        progress=progress,
        **settings,  # type: ignore[arg-type]
    )
    return report.notes


def frozen_trunk(situation: Situation, batching: Batching) -> Trunk | None:
    """The frozen part of the model as a trunk over uint8 views, or None if nothing is frozen."""
    if not situation.entries:
        return None
    entry = situation.entries[0]
    return Trunk(
        situation.model,
        [Output(entry.cut, entry.pool)],
        view=situation.view,
        batching=batching,
        precision=live_precision(situation),
        device=situation.device,
    )


def live_precision(situation: Situation) -> Precision:
    """The precision of a live frozen trunk.

    That of the chosen set, or of all that are stored of it; else that in which was computed what was trained on, or
    fp32.
    """
    trunks = {situation.digests[entry.cut] for entry in situation.entries}
    specs = [each.spec for each in situation.sets if each.spec.trunk in trunks]
    stored = {spec.precision for spec in specs if spec.rendered.evaluation == situation.view}
    if situation.chosen is not None:
        stored = {situation.chosen.spec.precision}
    return stored.pop() if len(stored) == 1 else situation.precision or DEFAULT_PRECISION


def precision_of(source: Source, situation: Situation) -> Precision:
    """The precision in which the frozen part of what `source` gives was or will be computed."""
    rows = source.features if source.kind == "features" else ()
    stored = {each.spec.precision for each in rows if isinstance(each, Features)}
    return stored.pop() if len(stored) == 1 else live_precision(situation)


def stored_batching(situation: Situation) -> Batching:
    """That of the newest part of this model's features in the store, so that a live trunk gives the same bits.

    Not of compiled ones: each fit would wait for its code, which has other bits beside other cuts. That is said.
    """
    return _newest_batching(situation)._replace(compiled=False)


def _newest_batching(situation: Situation) -> Batching:
    digests = set(situation.digests.values())
    fitting = [each for each in situation.sets if each.spec.trunk in digests]
    on_device = [each for each in fitting if each.batching_on(situation.device.type)]
    newest = max(on_device, key=lambda each: str(each.facts["when"]), default=None)
    return (newest and newest.batching_on(situation.device.type)) or Batching()


def _live_reason(situation: Situation, augment: Augment | None) -> str | None:
    """Why stored features can't be used whatever the store holds, in words; None if they can."""
    model = situation.model
    if not any(has_weights(stage) for stage in model.ordered[: model.num_frozen]):
        return "nothing is frozen, so every stage trains"
    frozen, runs = frozen_words(model), run_or_runs(frozen_words(model))
    if augment is not None and augment.is_fresh:
        return f"seeds are fresh, new views in each epoch; the frozen {frozen} {runs} on each of them"
    if situation.store is None:
        return f"there is no store; the frozen {frozen} {runs} in each epoch"
    return None


def _why(situation: Situation, augment: Augment | None, train: Source | None) -> str:
    reason = _live_reason(situation, augment)
    if reason is not None:
        return reason
    model, frozen = situation.model, frozen_words(situation.model)
    is_frozen = f"{frozen} {is_or_are(frozen)} frozen"
    if train is None:
        return f"{is_frozen}, so stored features could serve"
    if isinstance(train, ImageSource):
        assert situation.store is not None
        return f'{is_frozen}, but {situation.store.root} lacks what was asked for, and on_missing is "images"'
    behind = model.ordered[train.start : model.num_frozen]
    names = [stage.name for stage in behind if not isinstance(stage, PoolStage)]
    if not names:
        return is_frozen
    return f"{is_frozen}; {name_range(names)} {run_or_runs(name_range(names))} on the stored activations"


def _stored(search: Search, entry: Entry, sets: Sequence[FeatureSet]) -> FeatureSource:
    for each in sets:
        _check_probe(search.situation, entry, each)
    features = _joined(search, sets)
    name = f"{search.situation.model.name}@{entry.cut} {entry.pool.reduction}"
    keys = f"{'set' if len(sets) == 1 else 'sets'} {', '.join(each.key[:8] for each in sets)}"
    return FeatureSource(
        images=features[0].images,
        features=features,
        start=entry.start,
        words=f"features, {name}{_in_words(sets[0].spec.precision)}, {views_words(search.augment)} ({keys})",
    )


def _in_words(precision: Precision) -> str:
    return "" if precision == DEFAULT_PRECISION else f" in {precision}"


def _joined(search: Search, sets: Sequence[FeatureSet]) -> tuple[Features, ...]:
    on_error = search.situation.on_error
    joined = [search.store.features(search.images, each, on_error=on_error) for each in sets]
    if len({each.ids for each in joined}) > 1:  # an image may have failed in one view only
        common = set.intersection(*({*each.ids} for each in joined))
        images = search.images.select([name in common for name in search.images.ids])
        joined = [search.store.features(images, each, on_error=on_error) for each in sets]
    return tuple(joined)


def _check_probe(situation: Situation, entry: Entry, each: FeatureSet) -> None:
    """Compares the live trunk, and the decoders, with a stored set, once for each set and trunk."""
    checked = (each.key, situation.digests[entry.cut])
    if situation.model.is_absent or checked in situation.probed:
        return
    what = f"set {each.key[:8]} ({entry.cut} {entry.pool.reduction})"
    check_pixels(each.pixels, policy=situation.view.decode, what=what)
    output, precision = Output(entry.cut, entry.pool), each.spec.precision
    view, device = situation.view, situation.device
    (live,) = take_probes(situation.model, [output], view=view, precision=precision, device=device)
    now = Trunk(situation.model, [output], view=view, precision=precision, device=device).profile()
    for part in each.probed:
        facts = part.facts
        check_probe(facts["probe"], live, precision=precision, what=what, profile=facts["profile"], now=now)
    situation.probed.add(checked)


def from_images(situation: Situation, images: ImageSet, augment: Augment | None) -> ImageSource:
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
        raise images_absent(situation, images, augment, absent)
    digests = images.digests(situation.known)
    if digests.failed and situation.on_error == "raise":
        place, reason = next(iter(digests.failed.items()))
        raise ImageError(images.ids[place], reason)
    views: tuple[View, ...] | Augment = (situation.view,)
    if augment is not None:
        views = augment if augment.is_fresh else augment.views(situation.view)
    frozen = frozen_words(model)
    runs = ""
    if model.num_frozen:
        runs = f"; {frozen} {run_or_runs(frozen)} on them{_in_words(live_precision(situation))}"
        if _newest_batching(situation).compiled:
            runs += ", not compiled as what is stored was"
    can_be_read = ~digests.is_failed
    return ImageSource(
        images=images if can_be_read.all() else images.select(can_be_read),
        digests=digests.values[can_be_read],
        views=views,
        words=f"images, {views_words(augment)}{runs}",
    )
