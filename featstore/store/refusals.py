"""Refusals: why a store doesn't give what is asked for, as the error to raise, with what is nearest and what to run.

Functions of values: `root` is the store's folder as it was given.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from featstore.errors import (
    AmbiguousRequestError,
    DamagedFileError,
    FactsDifferError,
    FeatureStoreError,
    MissingFeaturesError,
)
from featstore.images.digests import Digests
from featstore.images.image_set import ImageSet
from featstore.remedies import Command
from featstore.store.folders import short_key
from featstore.store.image_tables import ImageTable
from featstore.store.sets import FeatureRequest, FeatureSet


def no_store(root: Path) -> FeatureStoreError:
    """There is no folder."""
    return FeatureStoreError(
        f"There is no store {root}. Give the folder of an existing one (in a program: --store), or make "
        "one with extract(model, images, store); on the command line:",
        remedy=Command("featstore", "extract", "--images", "FOLDER", "--store", str(root), "--backbone", "NAME"),
    )


def check_key(key: str) -> None:
    """Refuses an empty key: a variable of a shell that isn't set would remove the only set of a store."""
    if not key:  # all keys start with it
        raise FeatureStoreError(
            "The key is empty. Expected the first digits of one, as featstore ls lists them. Give some."
        )


def holds_no_set(root: Path, key: str) -> FeatureStoreError:
    """No key starts with `key`."""
    return FeatureStoreError(f"{root} holds no feature set {key}. List what it holds:", remedy=_ls(root))


def several_sets(root: Path, found: Sequence[FeatureSet], how: str, remedy: str) -> AmbiguousRequestError:
    """Several sets are meant, as `how` says; lists in what they differ."""
    differing = {name: None for each in found for name, _, _ in found[0].spec.differences(each.spec)}
    listed = []
    for each in found:
        # Against another one: a fact's value stands in the words of a difference.
        others = [other.spec for other in found if other is not each]
        facts = {name: value for other in others for name, value, _ in each.spec.differences(other)}
        words = ", ".join(f"{name} {facts[name]}" for name in differing if name in facts)
        listed.append(f"{each.key[:8]} ({words})")
    return AmbiguousRequestError(f"{len(found)} feature sets in {root} {how}: {'; '.join(listed)}. {remedy}")


def several_keys(root: Path, start: str, keys: Sequence[str]) -> AmbiguousRequestError:
    """Several keys, maybe of sets without a sound part, begin with `start`."""
    return AmbiguousRequestError(
        f"{len(keys)} feature sets in {root} have keys that start with {start}: {', '.join(map(short_key, keys))}. "
        f"Give more of the one that is meant; {_ls(root)} lists in what they differ."
    )


def none_fits(
    root: Path, request: FeatureRequest, sets: Iterable[FeatureSet], damaged: Sequence[DamagedFileError]
) -> FactsDifferError:
    """None of the store's `sets` fits: in what the nearest one differs; where there are none, what is `damaged`."""
    compared = [(request.differences(each.spec), each) for each in sets]
    if not compared and damaged:
        return FactsDifferError(f"{root} holds no features that can be used. {damaged[0]}")
    if not compared:
        return FactsDifferError(
            f"{root} holds no features yet. Compute them with", remedy=Command("featstore", "extract")
        )
    differences, nearest = min(compared, key=lambda item: (len(item[0]), -item[1].index.num_images))
    listed = "; ".join(f"{name} (stored {stored}, yours {yours})" for name, stored, yours in differences)
    return FactsDifferError(
        f"No stored features fit this request in {root}. Nearest is set {nearest.key[:8]} "
        f"({nearest.facts['backbone']}@{nearest.facts['cut']}); it differs in: {listed}. Compute what you ask for "
        "with featstore extract, or ask for what is there:",
        remedy=_ls(root),
    )


def lacks_rows(
    root: Path,
    chosen: FeatureSet,
    images: ImageSet,
    digests: Digests,
    missing: NDArray[np.bool_],
    is_changed: NDArray[np.bool_],
) -> MissingFeaturesError:
    """Images that are `missing` ``(N,)`` in a set, of which some have changed since they were extracted."""
    count = int(missing.sum())
    changed = missing & is_changed
    kinds = {
        "new": missing & ~changed & ~digests.is_failed,
        "changed since": changed,
        "unreadable": missing & digests.is_failed,
    }
    which = _named(images, digests, missing)
    if changed.any():
        listed = {word: mask for word, mask in kinds.items() if mask.any()}
        which = "; ".join(
            f"{int(mask.sum()):,} {word}: {_named(images, digests, mask)}" for word, mask in listed.items()
        )
    lead = (
        f"{root} holds {len(images) - count:,} of the {len(images):,} images asked for "
        f"({chosen.facts['backbone']}@{chosen.facts['cut']} {chosen.spec.reduction}, "
        f"{chosen.spec.rendered.label()}, set {chosen.key[:8]})"
    )
    if all(bytes(digests.values[place]).hex() in chosen.failed for place in np.flatnonzero(missing)):
        reasons = dict.fromkeys(chosen.failed[bytes(digests.values[place]).hex()] for place in np.flatnonzero(missing))
        return MissingFeaturesError(
            f"{lead}; {count:,} failed when they were extracted ({which}: {'; '.join([*reasons][:3])}). Mend the files "
            'and extract again, or leave such images out: --on-error skip (in Python: on_error="skip").'
        )
    return MissingFeaturesError(
        f"{lead}; {count:,} are missing ({which}). {_how_to_add(chosen)}, or ask for the images that are there."
    )


def holds_no_images(root: Path, name: str | None, names: Collection[str]) -> FeatureStoreError:
    """No image set is called `name`, but `names`."""
    called = f" called {name}" if name else ""
    return FeatureStoreError(
        f"{root} holds no image set{called}; those it holds: {', '.join(sorted(names)) or 'none'}. Extract features of "
        "it first."
    )


def several_images(root: Path, newest: Iterable[ImageTable]) -> AmbiguousRequestError:
    """Several image tables are meant."""
    listed = ", ".join(f"{table.stem} ({table.num_images:,} images)" for table in newest)
    return AmbiguousRequestError(
        f"{root} holds several image sets: {listed}. Name one: ImageSet.from_store(store, name=...)."
    )


def _ls(root: Path) -> Command:
    return Command("featstore", "ls", "--store", str(root))


def _named(images: ImageSet, digests: Digests, mask: NDArray[np.bool_]) -> str:
    """The first of some images by their ids, with the reason where one can't be read."""
    places = np.flatnonzero(mask).tolist()
    names = [
        f"{images.ids[place]}: {digests.failed[place]}" if place in digests.failed else images.ids[place]
        for place in places[:3]
    ]
    return "; ".join([*names, *["..."] * (len(places) > 3)])


def _how_to_add(chosen: FeatureSet) -> str:
    """What to do about images without a row in a set."""
    if "imported" in chosen.facts:  # nobody here can compute them, and more rows have another key
        return "Its features were made elsewhere: make those of all images there, and featstore import them"
    return "Compute them with featstore extract"
