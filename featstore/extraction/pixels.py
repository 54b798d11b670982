"""Pixels: views filed as they are, under a key without a model; and images whose views are had from there again."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from featstore.digest import Json
from featstore.files import storage_types
from featstore.images.image_set import ImageSet
from featstore.images.pixel_digest import pixel_digest
from featstore.images.render import Cost, Rendered, look_of
from featstore.images.render import Job as ImageJob
from featstore.images.views import View
from featstore.models.names import PIXELS
from featstore.models.pool import Pool
from featstore.models.probe import Probe
from featstore.models.staged import StagedModel
from featstore.models.trunk import Output, choose_device
from featstore.store.features import Features
from featstore.store.sets import FeatureRequest, FeatureSet
from featstore.store.spec import FeatureSpec
from featstore.store.store import FeatureStore

CUT = PIXELS
OUTPUT = Output(CUT, Pool("none", layout="NCHW"))

NO_PROBE = Probe(values=((), ()), largest=0.0)
"""Of what no arithmetic has made."""

_READ_ROWS = 32
"""Views that are read at once."""


@cache
def pixel_model(view: View) -> StagedModel:
    """What stands for the model whose features are the pixels of a view: it gives what it gets."""
    return StagedModel.from_module(nn.Sequential(OrderedDict([(CUT, nn.Identity())])), view=view.pixels, name=CUT)


def pixel_spec(view: View) -> FeatureSpec:
    """Of the pixels of a view, whatever mean and deviation follow."""
    pixels = view.pixels
    return FeatureSpec(
        trunk=pixel_model(pixels.evaluation).digest(CUT),
        pool=OUTPUT.pool.facts(),
        view=pixels.facts(),
        precision="fp32",
        dtype=storage_types.PIXELS.name,
    )


class PixelTrunk:
    """In the place of a `Trunk`: gives views as they are.

    Args:
        batch_size: views that are gathered at once.
    """

    outputs = (OUTPUT,)
    is_live = False

    def __init__(self, batch_size: int) -> None:
        self.batch_size, self.device = batch_size, choose_device("cpu")

    def __call__(self, images: Tensor) -> list[Tensor]:
        """The uint8 views ``(N, C, S, S)``."""
        return [images]

    def profile(self) -> Json:
        """What may move the last bits: nothing."""
        return {"batch_size": self.batch_size, "device": "cpu"}


@dataclass(frozen=True, kw_only=True, eq=False)
class StoredPixels:
    """The pixels of some images' views, as far as a store has them.

    Attributes:
        images: whose views they are.
        digests: ``(N, 32)``, of the images.
        store: which has them.
        sets: of each view that has pixels stored.
    """

    images: ImageSet
    digests: NDArray[np.uint8]
    store: FeatureStore
    sets: dict[View, FeatureSet]

    @classmethod
    def of(
        cls, images: ImageSet, digests: NDArray[np.uint8], store: FeatureStore, views: Iterable[View]
    ) -> StoredPixels:
        """Those of `views`, which are `View.pixels`, as far as today's decoders give the same."""
        found = {view: store.find_one(FeatureRequest.of(pixel_spec(view))) for view in views}
        sets = {
            view: each
            for view, each in found.items()
            if each is not None and each.pixels <= {pixel_digest(view.decode)}
        }
        return cls(images=images, digests=digests, store=store, sets=sets)

    def has(self, view: View) -> NDArray[np.bool_]:
        """``(N,)``: which images have their view here."""
        if view not in self.sets:
            return np.zeros(len(self.images), dtype=bool)
        part_of, _ = self.sets[view].index.find(self.digests)
        is_there: NDArray[np.bool_] = part_of >= 0
        return is_there

    def rendered(self, jobs: Iterable[ImageJob], wanted: dict[View, NDArray[np.int64]]) -> Generator[Rendered]:
        """The views of each job, as `render` gives them; nothing is decoded.

        Args:
            jobs: in order.
            wanted: of each view the places of the images that the jobs want it of, in order.

        Raises:
            FeatureStoreError: for rows that are damaged, or gone meanwhile.
            OSError: as the disk gave it.
        """
        rows = {view: self._rows(view, places) for view, places in wanted.items() if len(places)}
        for job in jobs:
            started = time.perf_counter()
            found = [next(rows[view]) for view in job.views]
            views, ended = tuple(view for view, _ in found), time.perf_counter()
            cost = Cost(sum(view.nbytes for view in views), ended - started, 0.0, ended)
            look = look_of(views[0]) if job.views[0].is_evaluation else 0
            yield Rendered(job.index, views, tuple(decoder for _, decoder in found), None, look=look, cost=cost)

    def _rows(self, view: View, places: Sequence[int] | NDArray[np.int64]) -> Iterator[tuple[Tensor, int]]:
        """Each row with the code of its decoder."""
        chosen = self.sets[view]
        part_of, row_in = chosen.index.find(self.digests[places])
        features = Features(
            self.images.select(places),
            chosen.spec,
            chosen.index,
            part_of,
            row_in,
            access="stream",
            lookup=lambda: self.store.set(chosen.key).index,
        )
        decoders = np.zeros(len(places), np.uint8)
        for part in np.unique(part_of):
            is_here = part_of == part
            decoders[is_here] = chosen.index.parts[part].decoders[row_in[is_here]]
        batches = (zip(rows, decoders[places].tolist(), strict=True) for rows, places in features.batches(_READ_ROWS))
        return chain.from_iterable(batches)
