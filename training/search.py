"""Search: the stored sets that could serve one request for activations of some images in some views."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from featstore.images import Digests, ImageSet
from featstore.store import FeatureRequest, FeatureSet
from featstore.views import Augment, View
from training.situation import Entry, Situation


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

        Raises:
            AmbiguousRequestError: where several sets fit a view.
        """
        for entry in self.situation.entries:
            sets = [each for each in self.sets_at(entry) if each is not None and not self.lacking(each).any()]
            if len(sets) == len(self.views):
                return entry, sets
        return None

    def sets_at(self, entry: Entry) -> list[FeatureSet | None]:
        """For each view the set of activations at `entry`, complete or not; None where there is none."""
        return [self.set_at(entry, view) for view in self.views]

    def set_at(self, entry: Entry, view: View) -> FeatureSet | None:
        """The set of activations at `entry` in one view, or None. A chosen key fixes all but policy and seed."""
        chosen, trunk = self.situation.chosen, self.situation.digests[entry.cut]
        request = FeatureRequest(
            trunk=trunk,
            pool=entry.pool.facts(),
            view=view,
            dtype=None if chosen is None else chosen.spec.dtype,
            precision=None if chosen is None else chosen.spec.precision,
        )
        if chosen is not None and (chosen.spec.trunk, chosen.spec.pool) != (trunk, request.pool):
            return None
        return self.store.find_one(request)

    def lacking(self, each: FeatureSet, digests: Digests | None = None) -> NDArray[np.bool_]:
        """``(N,)``: images without a row in a set; failed ones count unless they are to be skipped."""
        digests = self.digests if digests is None else digests
        missing = self.store.missing(each, digests)
        return missing & ~self.store.is_failed(each, digests) if self.situation.on_error == "skip" else missing
