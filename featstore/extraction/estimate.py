"""Estimate: what an extraction would write, how fast each of its stages is, and how long it would take."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace

import numpy as np
import torch

from featstore.digest import Json
from featstore.errors import Doubtful, FeatureStoreError, OnError
from featstore.extraction.failures import refuse_unreadable
from featstore.extraction.opening import check_can_compile, open_plan
from featstore.extraction.plan import Models, Plan, PlannedSet, plan
from featstore.extraction.rates import RENDERING, StageName, StageRate
from featstore.extraction.shards import Shard
from featstore.files import disk
from featstore.files.index import first_places
from featstore.images.image_set import ImageSet
from featstore.images.processes import SLICE
from featstore.images.views import Augment, View
from featstore.models.names import DEFAULT_PRECISION, Precision
from featstore.objects import ObjectPath, facts_below
from featstore.store.store import FeatureStore
from featstore.words import counted

SAMPLE = 64
"""Images that are tried; of processes that render, two slices each, so that none has nothing to do."""

PASSES = {"cpu": 2, "cuda": 8}
"""Of a model, with one view an image; a GPU's are short."""

WRITTEN_BYTES = 64 << 20
"""That are written at most, of all sets together, or a row of each: what a part takes beside its rows then hardly
counts."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What an extraction would write, and how fast.

    Attributes:
        images: that would be read, those of equal content once.
        sets: one record a set of what would be written: key, backbone, cut, reduce, view, seed, rows, bytes.
        sample: images that were tried; 0 where nothing is missing.
        device: what passes run on, `cpu` or `cuda`; none were run where nothing is missing.
        start_seconds: what it takes before the first row: digests of images that the store doesn't know, and judging
            the model.
        compile_seconds: how much of that is compiling; 0 where nothing is compiled.
        rates: of each stage, alone on the machine. The files of the sample may be in memory, from when they were read
            to see what is missing.
    """

    images: int
    sets: tuple[dict[str, Json], ...]
    sample: int
    device: str
    start_seconds: float
    rates: tuple[StageRate, ...]
    compile_seconds: float = 0.0

    @property
    def num_bytes(self) -> int:
        """Of the rows that would be written."""
        return sum(each["bytes"] for each in self.sets)

    @property
    def bound_by(self) -> StageName | None:
        """The slowest stage, on one device; None where nothing is missing."""
        return _slowest(self._alone(1)) if self.rates else None

    def seconds(self, devices: int = 1, *, machines: int = 1) -> float:
        """How long it would take, start included.

        Args:
            devices: that compute passes, on all machines together, each as fast as the one here. Those of one machine
                share its processors, for reading and decoding; CPUs are one device a machine, however many there are.
            machines: like this one.
        """
        if not self.rates:
            return 0.0
        alone = self._alone(1 if self.device == "cpu" else devices / machines)
        computing = [sum(1 / alone[stage] for stage in RENDERING), 1 / alone["forward"]]
        # On a CPU both take the same processors; beside a GPU the slower one is waited for.
        an_image = max(sum(computing) if self.device == "cpu" else max(computing), 1 / alone["write"])
        return self.start_seconds + self.images * an_image / machines

    def _alone(self, devices: float) -> dict[StageName, float]:
        rates = {each.stage: each.rate or math.inf for each in self.rates}
        return rates | {"forward": rates["forward"] * devices}


def _slowest(alone: dict[StageName, float]) -> StageName:
    """Of reading and decoding, where both together are the slowest, what takes longer."""
    slower = min(RENDERING, key=lambda stage: alone[stage])
    together = alone | {slower: 1 / sum(1 / alone[stage] for stage in RENDERING)}
    return min(together, key=lambda stage: together[stage])


def estimate(
    model: Models,
    images: ImageSet,
    store: FeatureStore,
    *,
    cuts: Sequence[str] | None = None,
    reduce: str = "auto",
    augment: Augment | None = None,
    view: View | None = None,
    on_error: OnError = "raise",
    max_errors: int | None = None,
    doubtful: Doubtful = "note",
    dtype: str = "float16",
    precision: Precision = DEFAULT_PRECISION,
    device: torch.device | str = "auto",
    batch_size: int | None = None,
    compile: bool | None = None,
    workers: int | None = None,
    shard: Shard | str | None = None,
) -> Estimate:
    """What `extract` with the same arguments would do, and how fast: some of the missing images are tried.

    Nothing is filed; what is written to see how fast that goes lies in the store's file system, and is deleted again.
    Arguments and errors are those of `extract`.
    """
    started = time.perf_counter()
    check_can_compile(compile, device)
    planned = plan(
        model,
        images,
        store,
        cuts=cuts,
        reduce=reduce,
        augment=augment,
        view=view,
        dtype=dtype,
        precision=precision,
        shard=shard,
    )
    return estimate_plan(
        planned,
        store,
        on_error=on_error,
        max_errors=max_errors,
        doubtful=doubtful,
        device=device,
        batch_size=batch_size,
        compile=compile,
        workers=workers,
        started=started,
    )


def estimate_plan(
    planned: Plan,
    store: FeatureStore,
    *,
    on_error: OnError = "raise",
    max_errors: int | None = None,
    doubtful: Doubtful = "note",
    device: torch.device | str = "auto",
    batch_size: int | None = None,
    compile: bool | None = None,
    workers: int | None = None,
    started: float | None = None,
) -> Estimate:
    """What `run_plan` with the same arguments would do, and how fast."""
    started = time.perf_counter() if started is None else started
    refuse_unreadable(planned, on_error)
    num_rows = [_num_rows(planned, each) for each in planned.sets]
    sets = tuple(_described(each, count) for each, count in zip(planned.sets, num_rows, strict=True))
    if not planned.is_to_read.any():
        return Estimate(images=0, sets=sets, sample=0, device="", start_seconds=0.0, rates=())
    with ExitStack() as stack:
        beside = stack.enter_context(_beside(store))  # which may be refused, before there are processes that render
        opened = open_plan(
            planned,
            store,
            on_error=on_error,
            max_errors=max_errors,
            doubtful=doubtful,
            device=device,
            batch_size=batch_size,
            compile=compile,
            workers=workers,
        )
        session = stack.enter_context(replace(opened, store=beside))
        start_seconds = time.perf_counter() - started
        places = np.flatnonzero(session.is_needed.any(axis=0))
        most = max(SAMPLE, 2 * SLICE * session.renderers.count) if session.renderers else SAMPLE
        sample = np.unique(np.linspace(0, len(places) - 1, most).astype(int))
        sizes, device_type = [each.trunk.batch_size for each in session.opened], session.device.type
        passed = max(SAMPLE, PASSES.get(device_type, 2) * max(sizes))
        passed = passed * len(sizes) * len(places) // int(session.is_needed.sum())  # of several views fewer images
        written = [
            max(1, min(count, WRITTEN_BYTES // (len(sets) * each.row_bytes)))
            for each, count in zip(planned.sets, num_rows, strict=True)
        ]
        cold = session.rehearse(places[sample], passed=1, num_rows=[1] * len(sets))
        warm = session.rehearse(places[sample], passed=passed, num_rows=written)
    start_seconds += cold[0].seconds - sum(each.busy_seconds / each.workers for each in cold)  # processes start, too
    rates = tuple(cold[:1] + warm[1:])  # files are read but once; all else has a first time that counts for little
    if not warm[-1].images:
        raise FeatureStoreError(
            f"None of {counted(len(sample), 'image')} that were tried could be read and decoded, so there is nothing "
            "to say of the rest. See what is wrong with them: leave out --on-error skip."
        )
    return Estimate(
        images=len(places),
        sets=sets,
        sample=len(sample),
        device=device_type,
        start_seconds=start_seconds,
        rates=rates,
        compile_seconds=sum(each.compile_seconds for each in session.opened),
    )


def _num_rows(planned: Plan, each: PlannedSet) -> int:
    """That would be computed, one for each content."""
    return len(first_places(planned.digests.values[each.is_missing & ~planned.digests.is_failed]))


def _described(each: PlannedSet, num_rows: int) -> dict[str, Json]:
    return {
        "key": each.spec.key,
        "backbone": each.source.model.name,
        "cut": each.cut,
        "reduce": each.spec.reduction,
        "view": "evaluation" if each.view.policy is None else each.view.policy.label,
        "seed": each.view.seed,
        "rows": num_rows,
        "bytes": num_rows * each.row_bytes,
    }


@contextmanager
def _beside(store: FeatureStore) -> Iterator[FeatureStore]:
    """A store of its own in a hidden folder of the store's, where nobody looks but `gc`; gone afterwards.

    So are the folders of a store that isn't there yet, unless somebody has begun to fill it meanwhile.
    """
    name = disk.estimate_name()
    if isinstance(store.folder, ObjectPath):
        beside = store.folder / name
        try:
            yield FeatureStore(beside)
        finally:
            for each in facts_below(beside):
                disk.unlink(beside / each)
        return
    made = [folder for folder in (store.folder, *store.folder.parents) if not folder.is_dir()]
    try:
        disk.make_folder(store.folder, root=store.folder)
        disk.mkdir(store.folder / name)
        yield FeatureStore(store.folder / name)
    finally:
        with suppress(FileNotFoundError):  # by `gc`, while it was at work
            shutil.rmtree(store.folder / name)
        for folder in made:
            disk.remove_folder(folder)
