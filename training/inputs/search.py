"""Search: the stored sets that could serve one request for activations of some images in some views."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from featstore.images.digests import Digests
from featstore.images.image_set import ImageSet
from featstore.images.views import Augment, View
from featstore.store.sets import FeatureRequest, FeatureSet
from training.inputs.situation import Entry, Situation


class Search:
    """One request, at every place where the frozen part of the model may be entered.

    Args:
        situation: with a store.
        images: whose activations are wanted.
        augment: in which views; None: the evaluation view.
    """

    def __init__(self, situation: Situation, images: ImageSet, augment: Augment | None) -> None:
        assert situation.store is not None
        self.situation, self.images, self.augment, self.store = situation, images, augment, situation.store
        self.views = (situation.view,) if augment is None else augment.views(situation.view)
        self.digests = images.digests(situation.known)

    def complete(self) -> tuple[Entry, list[FeatureSet]] | None:
        """The deepest entry where all rows of all views are stored, and the set of each view; None if there is none.

        The sets have one storage type and one precision: views of one image differ by their pixels only.

        Raises:
            AmbiguousRequestError: where that fits several storage types or precisions.
        """
        for entry in self.situation.entries:
            complete = [
                sets
                for sets in self._alike(entry)
                if all(each is not None and not self.lacking(each).any() for each in sets)
            ]
            if len(complete) > 1:
                self.set_at(entry, self.views[0])  # raises: each of them has a set of this view
            if complete:
                return entry, [each for each in complete[0] if each is not None]
        return None

    def sets_at(self, entry: Entry, like: FeatureSet | None = None) -> list[FeatureSet | None]:
        """For each view the set of activations at `entry`, complete or not; None where there is none.

        Args:
            entry: where.
            like: has the storage type and precision; None: those that most of the views are stored in.
        """
        if like is not None:
            return [self.set_at(entry, view, like) for view in self.views]
        return max(self._alike(entry), key=lambda sets: len(sets) - sets.count(None), default=[None] * len(self.views))

    def set_at(self, entry: Entry, view: View, like: FeatureSet | None = None) -> FeatureSet | None:
        """The set of activations at `entry` in one view, or None. A chosen key fixes all but policy and seed.

        Raises:
            AmbiguousRequestError: where several sets fit the view, and `like` doesn't say in which type and precision.
        """
        request = self._request(entry, view, self.situation.chosen or like)
        return None if request is None else self.store.find_one(request)

    def _alike(self, entry: Entry) -> list[list[FeatureSet | None]]:
        """For each storage type and precision that is stored, what `sets_at` gives in it."""
        requests = [self._request(entry, view, self.situation.chosen) for view in self.views]
        found = [each for request in requests if request is not None for each in self.store.find(request)]
        kinds = {(each.spec.dtype, each.spec.precision): each for each in found}
        return [self.sets_at(entry, like) for like in kinds.values()]

    def _request(self, entry: Entry, view: View, like: FeatureSet | None) -> FeatureRequest | None:
        """For activations at `entry` in one view; None where the chosen set lies elsewhere."""
        chosen, trunk, pool = self.situation.chosen, self.situation.digests[entry.cut], entry.pool.facts()
        if chosen is not None and (chosen.spec.trunk, chosen.spec.pool) != (trunk, pool):
            return None
        dtype, precision = (None, None) if like is None else (like.spec.dtype, like.spec.precision)
        return FeatureRequest(trunk=trunk, pool=pool, view=view, dtype=dtype, precision=precision)

    def lacking(self, each: FeatureSet, digests: Digests | None = None) -> NDArray[np.bool_]:
        """``(N,)``: images without a row in a set; failed ones count unless they are to be skipped."""
        digests = self.digests if digests is None else digests
        missing = self.store.missing(each, digests)
        return missing & ~self.store.is_failed(each, digests) if self.situation.on_error == "skip" else missing
