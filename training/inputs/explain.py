"""Explain: why stored features can't serve a fit, as an error that names the fact in the way and what to run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from featstore.errors import FactsDifferError, FeatureStoreError, MissingFeaturesError
from featstore.extraction.remedy import extract_remedy, seed_ranges
from featstore.files.storage_types import DEFAULT_STORAGE_TYPE, STORAGE_TYPES
from featstore.images.contents import is_changed
from featstore.images.image_set import ImageSet
from featstore.images.views import Augment
from featstore.remedies import Call, Command, Remedy, Steps
from featstore.store.sets import FeatureSet
from featstore.words import size_text
from training.inputs.search import Search
from training.inputs.situation import Entry, Situation, group_of, is_or_are, name_range, training_words, views_words


def why_not(search: Search, asked: ImageSet) -> FeatureStoreError:
    """Why `search` found nothing: the first fact that is in the way, with its remedy.

    Args:
        search: without a complete result.
        asked: the images that an extraction would compute, among them those searched for.
    """
    situation = search.situation
    for entry in situation.entries:
        evaluation = search.set_at(entry, situation.view)
        sets = search.sets_at(entry, evaluation)
        present = [each for each in sets if each is not None]
        if len(present) == len(sets):
            return _rows_missing(search, entry, present, asked)
        if evaluation is not None:
            return _views_missing(search, entry, evaluation, sets)
    deeper = {
        cut: each
        for cut, each in situation.servable().items()
        if situation.model.index(cut) > situation.model.index(situation.entries[0].cut)
    }
    return _too_deep(search, deeper) if deeper else _facts_differ(search, asked)


def images_absent(
    situation: Situation, images: ImageSet, augment: Augment | None, absent: Sequence[int]
) -> FeatureStoreError:
    """Why images can't be read: their files aren't here."""
    reason = "the images have to be read here"
    instead = ""
    if augment is not None and augment.is_fresh:
        reason, instead = "fresh seeds make fit read images", "leave the augmentation out (learn.augment = None)"
    if not situation.model.num_frozen and not situation.is_scoring:
        reason = "unfreeze() makes fit read images"
        deepest = max(situation.servable(), key=situation.model.index, default=None)
        instead = f'train what features can serve: freeze_to("{deepest}")' if deepest else ""
    origin = images.source.absence or "some files are gone"
    return FeatureStoreError(
        f"{reason}, and {origin}: {len(absent):,} of {len(images):,} files are absent (first: "
        f'{images.ids[absent[0]]}). Give their folder with images.with_root("/new/place") (for a table of images on '
        f"the command line: --root /new/place){f', or {instead}' if instead else ''}."
    )


def _rows_missing(search: Search, entry: Entry, sets: Sequence[FeatureSet], asked: ImageSet) -> FeatureStoreError:
    situation, store = search.situation, search.store
    digests = asked.digests(situation.known)
    lacking = np.logical_or.reduce([search.lacking(each, digests) for each in sets])
    failed = lacking & np.logical_or.reduce([store.is_failed(each, digests) for each in sets])
    is_known = asked.source is situation.images.source  # ids of other images say nothing
    changed = is_changed(asked, digests, situation.known if is_known else {})
    absent = np.zeros(len(asked), bool)
    unread = np.flatnonzero(lacking & digests.is_failed)
    absent[unread[asked.select(unread).absent()]] = True
    counted = [
        (int((lacking & ~failed & ~changed).sum()), "new"),
        (int((lacking & ~failed & changed).sum()), "changed since"),
        (int((failed & ~absent).sum()), "unreadable"),
        (int(absent.sum()), "absent"),
    ]
    (first, word), *others = [(count, word) for count, word in counted if count]
    counts = ", ".join([f"{first:,} {'is' if first == 1 else 'are'} {word}", *(f"{n:,} {w}" for n, w in others)])
    changed &= lacking & ~failed
    places = np.flatnonzero(changed if changed.any() else lacking)  # what has changed surprises its owner most
    names = [asked.ids[place] for place in places[:3]]
    total = int(lacking.sum())
    remedy = f"Compute the {total:,}: {_remedy(search, entry, sets[0])}"
    if not situation.is_scoring:  # which extracts nothing
        remedy += ' - or pass --extract (in Python: on_missing="extract").'
    if (lacking == failed).all():
        mend = "Bring back the files that are absent" if absent.any() else "Repair or remove what can't be read"
        leave = f"leave {'it' if total == 1 else 'them'} out"
        remedy = f'{mend}, or {leave}: --on-error skip (in Python: learn.on_error = "skip").'
    undone = "scored" if situation.is_scoring else "trained"
    return MissingFeaturesError(
        f"{store.root} holds {len(asked) - total:,} of the {len(asked):,} images asked for "
        f"({situation.model.name}@{entry.cut} {entry.pool.reduction}, {views_words(search.augment)}): {counts} "
        f"({', '.join(names)}{', ...' if len(places) > 3 else ''}). Nothing was {undone}. {remedy}"
    )


def _views_missing(
    search: Search, entry: Entry, evaluation: FeatureSet, sets: Sequence[FeatureSet | None]
) -> FeatureStoreError:
    situation, augment = search.situation, search.augment
    assert augment is not None
    assert augment.seeds != "fresh"
    policy = augment.policy
    absent = Augment(policy, [seed for seed, each in zip(augment.seeds, sets, strict=True) if each is None])
    stored = _stored_seeds(search, evaluation, augment)
    seeds, keys = seed_ranges(list(stored)), ", ".join(each.key[:8] for each in stored.values())
    asked, holds = policy.label, f"the evaluation view only (set {evaluation.key[:8]})"
    if stored:
        holds = f"the evaluation view and seeds {seeds} (sets {evaluation.key[:8]} and {keys})"
    elif others := _other_policies(search, evaluation):
        asked, holds = policy.describe(), f"the evaluation view (set {evaluation.key[:8]}) and views of {others}"
    remedy = _remedy(search, entry, evaluation, absent)
    fewer = "leave the augmentation out"
    if isinstance(remedy, Command):
        fewer, fresh = f"use --seeds {seeds}" if stored else fewer, "--seeds fresh"
    else:
        fewer, fresh = f"use seeds={list(stored)}" if stored else fewer, 'seeds="fresh"'
    instead = f"train from images with {fresh} (the trunk then runs every epoch)"
    if situation.is_scoring:
        instead = 'give the images\' files, which are read then: images.with_root("/new/place")'
    return MissingFeaturesError(
        f"You asked for augmentation {asked}, seeds {seed_ranges(augment.seeds)}; {search.store.root} holds "
        f"{holds}. Augmentation can't be applied to stored features afterwards. Either add the views: {remedy}; or "
        f"{fewer}; or {instead}."
    )


def _stored_seeds(search: Search, evaluation: FeatureSet, augment: Augment) -> dict[int, FeatureSet]:
    """Seed -> set, of the same policy and otherwise like the evaluation view's set; seeds rising."""
    found = {
        each.spec.rendered.seed: each
        for each in _like(search, evaluation)
        if each.spec.rendered.policy == augment.policy and each.spec.rendered.seed is not None
    }
    return dict(sorted(found.items()))


def _other_policies(search: Search, evaluation: FeatureSet) -> str:
    """The policies whose views are stored, each told from others of its name, and otherwise like those asked for."""
    policies = [each.spec.rendered.policy for each in _like(search, evaluation)]
    return ", ".join(sorted({policy.describe() for policy in policies if policy is not None}))


def _like(search: Search, evaluation: FeatureSet) -> list[FeatureSet]:
    """The sets that differ from the evaluation view's in their augmentation alone."""

    def facts(each: FeatureSet) -> tuple[object, ...]:
        spec = each.spec
        return spec.trunk, spec.pool, spec.dtype, spec.precision, spec.rendered.evaluation

    return [each for each in search.situation.sets if facts(each) == facts(evaluation)]


def _too_deep(search: Search, deeper: dict[str, FeatureSet]) -> FeatureStoreError:
    situation, model = search.situation, search.situation.model
    needed = situation.entries[0]
    cut = max(deeper, key=model.index)
    listed = ", ".join(f"{name}{_pooled(each)}" for name, each in deeper.items())
    shape = needed.pool.shape(model.shape(needed.cut, situation.view.size))
    kind = {3: "maps", 2: "tokens"}.get(len(shape), "vectors")
    count = len(situation.images)
    dtype = DEFAULT_STORAGE_TYPE if situation.chosen is None else situation.chosen.spec.dtype
    num_bytes = count * int(np.prod(shape, dtype=np.int64)) * STORAGE_TYPES[dtype].itemsize
    remedy = _remedy(search, needed, situation.chosen)
    instead = f'freeze_to("{cut}"); or on_missing="images"'
    if isinstance(remedy, Command):
        instead = f'--freeze-to {cut} (in Python: freeze_to("{cut}"), or learn.on_missing = "images")'
    serves = "the head alone" if cut == model.cut_points[-1] else f"what follows {cut}"
    return MissingFeaturesError(
        f'freeze_to("{needed.cut}") trains {training_words(model, with_head=False)}, so it needs {kind} at '
        f"{needed.cut}; {search.store.root} holds only {listed}, which can train {serves}. Extract {kind} "
        f"({count:,} x {'x'.join(map(str, shape))} {dtype} = {size_text(num_bytes)}): {remedy}; or {instead}."
    )


def _facts_differ(search: Search, asked: ImageSet) -> FeatureStoreError:
    situation, root = search.situation, search.store.root
    needed = situation.entries[0]
    remedy = _remedy(search, needed, situation.chosen)
    sets = [situation.chosen] if situation.chosen is not None else situation.sets
    if not sets:
        return MissingFeaturesError(
            f"{root} holds no features yet. Extract them: {remedy} - or pass --extract (in Python: "
            'on_missing="extract").'
        )
    digests = asked.digests(situation.known)
    compared = [(_differences(situation, each, needed), _num_held(search, each, asked), each) for each in sets]
    # Of sets that differ in as many facts, those of this very backbone and cut are nearer than a stranger's.
    differences, rows, nearest = min(
        compared, key=lambda item: (len(item[0]), _is_a_strangers(situation, item[2], needed), -item[1])
    )
    still, subject = "", "what you ask for"
    if nearest.spec.trunk != situation.digests[needed.cut]:
        still, subject = _still_valid(situation, nearest), "for these weights"
    return FactsDifferError(
        f"No stored features fit this request in {root}. Nearest is set {nearest.key[:8]} ({rows:,} of "
        f"{len(digests):,} images); it differs in: {'; '.join(differences)}. {still}Extract {subject}:",
        remedy=remedy,
    )


def _is_a_strangers(situation: Situation, each: FeatureSet, needed: Entry) -> tuple[bool, bool]:
    return each.facts["backbone"] != situation.model.name, each.facts["cut"] != needed.cut


def _num_held(search: Search, each: FeatureSet, asked: ImageSet) -> int:
    return int((~search.store.missing(each, asked.digests(search.situation.known))).sum())


def _differences(situation: Situation, each: FeatureSet, needed: Entry) -> list[str]:
    """The facts in which a set differs from the evaluation view of what is needed."""
    found = []
    if each.spec.trunk != situation.digests[needed.cut]:
        found.append(_trunk_difference(situation, each, needed.cut))
    if each.spec.pool != needed.pool.facts():
        found.append(f"reduction (stored {each.spec.reduction}, yours {needed.pool.reduction})")
    views = each.spec.rendered.differences(situation.view)
    return found + [f"{name} (stored {stored}, yours {mine})" for name, stored, mine in views]


def _trunk_difference(situation: Situation, each: FeatureSet, cut: str) -> str:
    stored_cut, mine = str(each.facts["cut"]), situation.digests
    if mine.get(stored_cut) == each.spec.trunk:
        return f"cut (stored {stored_cut}, yours {cut})"
    stored = {stage["name"]: stage["digest"] for stage in each.facts["stages"]}
    shared = [name for name in stored if name in mine]
    is_other = each.facts["backbone"] != situation.model.name
    if not shared or (is_other and stored[shared[0]] != mine[shared[0]]):
        return f"model (stored {each.facts['backbone']}@{stored_cut}, yours {situation.model.name}@{cut})"
    first = next((name for name in shared if stored[name] != mine[name]), None)
    if first is None:  # as far as both go they are equal
        return f"cut (stored {stored_cut}, yours {cut})"
    before = shared[: shared.index(first)]
    equal = name_range(before) if before else ""
    equals = f"; {equal} {is_or_are(equal)} equal" if equal else ""
    named = _coarse(situation, first)
    return f"weights of stage {named} (stored {stored[first][:8]}, yours {mine[first][:8]}{equals})"


def _still_valid(situation: Situation, each: FeatureSet) -> str:
    """The last stage at which features of the set's model would be this model's as well."""
    stored = {stage["name"]: stage["digest"] for stage in each.facts["stages"]}
    shared = [name for name in stored if name in situation.digests]
    equal = [name for name in shared if situation.digests[name] == stored[name]]
    return f"Features at {equal[-1]} would still be valid. " if equal and equal != shared else ""


def _coarse(situation: Situation, name: str) -> str:
    """The name of the group a stage is in, if that is itself the name of a cut (``layer4``)."""
    group = group_of(name)
    return group if group in situation.digests else name


def _remedy(search: Search, entry: Entry, like: FeatureSet | None, augment: Augment | None = None) -> Remedy:
    """The command or call that computes activations at `entry`, with type and precision of `like` where there is one.

    Args:
        search: for the images, the store and, unless `augment` is given, the views.
        entry: where.
        like: a set whose rows it adds to.
        augment: the views that are missing.
    """
    situation = search.situation
    augment = search.augment if augment is None else augment
    default = situation.model.pool(entry.cut).reduction
    named = situation.named_model(entry.cut)
    # Of dealt images extraction computes augmented views of the training images alone.
    is_of_all = situation.is_scoring and augment is not None
    remedy = extract_remedy(
        situation.model.with_(origin={}) if named is None else named,
        search.images.with_splits([""] * len(search.images)) if is_of_all else situation.images,
        search.store.root,
        cuts=[entry.cut if entry.pool.reduction == default else f"{entry.cut}:{entry.pool.reduction}"],
        view=situation.view,
        augment=augment,
        dtype=None if like is None else like.spec.dtype,
        precision=None if like is None else like.spec.precision,
        on_error=situation.on_error,
    )
    if isinstance(remedy, Call) and is_of_all:
        remedy = replace(remedy, others=('images.with_splits([""] * len(images))', "store"))
    if isinstance(remedy, Call) and (named is None or situation.model.is_absent):
        remedy = replace(remedy, model="learn.model")  # the caller's `model` has other weights by now
    return Steps(first=Call(function="learn.attach"), then=remedy) if situation.model.is_absent else remedy


def _pooled(each: FeatureSet) -> str:
    return "" if each.spec.reduction == "none" else f", pooled ({each.spec.reduction})"
