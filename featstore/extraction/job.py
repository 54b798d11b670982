"""Job: a plan carried out - rows computed, gathered and filed in parts, and the parts merged at the end."""

from __future__ import annotations

import hashlib
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from featstore.digest import Json
from featstore.errors import Doubtful, FactsDifferError, FeatureStoreError, ImageError, OnError
from featstore.extraction.narrowing import lost_note, narrowed
from featstore.extraction.plan import Plan, PlannedSet
from featstore.extraction.progress import Progress
from featstore.files.index import first_places
from featstore.images.contents import looks_note
from featstore.images.render import Job as ImageJob
from featstore.images.render import Rendered, doubts_note, render
from featstore.models.probe import Probe
from featstore.models.trunk import Output, Trunk
from featstore.store.gathering import PART_BYTES, Gathered
from featstore.store.part_facts import part_facts
from featstore.store.store import FeatureStore

COMMIT_BYTES = PART_BYTES
COMMIT_SECONDS = 60.0
"""A part is written when this much has been gathered, or this long after the last one."""

MERGE_BYTES = 1 << 30
"""Of the parts that a job has written, those of less are merged at its end."""


@dataclass(kw_only=True)
class Outcome:
    """What has come of a plan so far.

    Attributes:
        computed: rows of each set.
        unfit: for each set digest -> reason, of images whose rows it can't hold.
        num_values: of each set, other than zero, where its type can't hold all of them (see Narrowed).
        num_lost: those of them that became zero.
        failures: digest -> reason, of images that can't be decoded or rendered.
        unread: digest -> image and reason, of those that couldn't be read.
        doubts: image -> why it may not look as its owner expects, though it was decoded.
        notes: sentences about what went otherwise.
    """

    computed: list[int]
    unfit: list[dict[str, str]]
    num_values: list[int]
    num_lost: list[int]
    failures: dict[str, str] = field(default_factory=dict)
    unread: dict[str, tuple[str, str]] = field(default_factory=dict)
    doubts: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @classmethod
    def none(cls, planned: Plan) -> Outcome:
        """Of a plan that nobody has begun."""
        nothing = [0] * len(planned.sets)
        return cls(computed=nothing[:], unfit=[{} for _ in planned.sets], num_values=nothing[:], num_lost=nothing[:])


class Job:
    """One run of a plan: gathers rows and writes parts."""

    def __init__(
        self,
        planned: Plan,
        store: FeatureStore,
        trunk: Trunk,
        probes: dict[Output, Probe],
        stages: dict[str, list[Json]],
    ) -> None:
        self.planned, self.store, self.trunk, self.probes, self.stages = planned, store, trunk, probes, stages
        self.views = list(dict.fromkeys(each.view for each in planned.sets))
        self.view_of = [self.views.index(each.view) for each in planned.sets]
        self.is_needed = self._needed()
        self.on_error: OnError = "raise"
        self.drawn: deque[ImageJob] = deque()  # jobs whose views are on their way; they come back in order
        self.gathered = [self._nothing(each) for each in planned.sets]
        self.outcome = Outcome.none(planned)
        self.looks = np.zeros(len(planned.images), np.uint64)  # of evaluation views: equal pixels, equal numbers
        self.written: list[list[Path]] = [[] for _ in planned.sets]
        self.last_commit = time.monotonic()

    @property
    def num_jobs(self) -> int:
        """Images to read."""
        return int(self.is_needed.any(axis=0).sum())

    def run(self, *, on_error: OnError, doubtful: Doubtful, workers: int | None, progress: Progress) -> None:
        """Computes what is missing; files what is done also when it ends in an error."""
        size = self.trunk.batch_size
        self.on_error = on_error
        batch: list[_Item] = []
        try:
            with (
                progress,
                closing(
                    render(self.planned.images, self._jobs(), workers=workers, on_error=on_error, doubtful=doubtful)
                ) as rendered,
            ):
                for each in progress.timed("reading and decoding", rendered):
                    batch += self._items(each)
                    while len(batch) >= size:
                        with progress.timing("the forward pass"):
                            self._compute(batch[:size])
                        batch = batch[size:]
                        with progress.timing("writing"):
                            self._commit_if_due()
                    progress.step()
                self._compute(batch)
            self.outcome.notes += self._job_notes()
        except ImageError:
            self._compute(batch)  # what is decoded already needn't be read again by the next run
            raise
        finally:
            self._commit()

    def merge(self, *, is_shown: bool) -> None:
        """Makes few parts of the many that this job has written. What goes wrong costs time when reading, no rows."""
        for each, paths in zip(self.planned.sets, self.written, strict=True):
            try:
                small = list(_small(paths))
                if len(small) < 2:
                    continue
                if is_shown:
                    print(f"merging {len(small):,} parts of set {each.spec.key[:8]}", file=sys.stderr)
                left = self.store.merge(each.spec.key, small).left
                problem = left[0].reason if left else None
            except Exception as error:  # the disk may be full: the rows are filed all the same
                problem = str(error)
            if problem:
                self.outcome.notes.append(
                    f"The parts that were written of set {each.spec.key[:8]} could not be merged ({problem}). All rows "
                    "are filed; merge them later with featstore compact"
                )

    def _needed(self) -> NDArray[np.bool_]:
        """``(V, N)``: for each view the images to render: those without a row in some set, each content once.

        The same content in two splits may need seeds in one of them only, so its views may come from two images.
        """
        planned = self.planned
        needed = np.zeros((len(self.views), len(planned.images)), dtype=bool)
        for each, view in zip(planned.sets, self.view_of, strict=True):
            needed[view] |= each.is_missing & ~planned.digests.is_failed
        for row in needed:
            places = np.flatnonzero(row)
            row[places] = False
            row[places[first_places(planned.digests.values[places])]] = True
        return needed

    def _jobs(self) -> Iterator[ImageJob]:
        """Drawn by the renderer as it goes, so that memory doesn't grow with the number of images."""
        for index in np.flatnonzero(self.is_needed.any(axis=0)).tolist():
            views = tuple(self.views[place] for place in np.flatnonzero(self.is_needed[:, index]))
            job = ImageJob(index, bytes(self.planned.digests.values[index]), views)
            self.drawn.append(job)
            yield job

    def _items(self, rendered: Rendered) -> list[_Item]:
        job = self.drawn.popleft()
        assert job.index == rendered.index
        if rendered.views is None:
            self._record_failure(job, rendered)
            return []
        if rendered.doubt is not None:
            self.outcome.doubts[self.planned.images.ids[job.index]] = rendered.doubt
        if job.views[0].is_evaluation:
            self.looks[job.index] = _look(rendered.views[0])
        return [
            _Item(job.index, job.digest, int(place), image, rendered.decoder)
            for place, image in zip(np.flatnonzero(self.is_needed[:, job.index]), rendered.views, strict=True)
        ]

    def _record_failure(self, job: ImageJob, rendered: Rendered) -> None:
        """Files what would fail again; an image that can't be read now has done nothing to be left out for good."""
        reason, digest = rendered.failure or "", job.digest.hex()
        if not rendered.is_lasting:
            self.outcome.unread[digest] = self.planned.images.ids[job.index], reason
            return
        self.outcome.failures[digest] = reason
        for place, each in enumerate(self.planned.sets):
            if each.view in job.views and each.is_missing[job.index]:
                self._file_failure(place, digest, reason)

    def _compute(self, items: Sequence[_Item]) -> None:
        if not items:
            return
        results = dict(zip(self.trunk.outputs, self.trunk(torch.stack([item.image for item in items])), strict=True))
        for place, (each, view) in enumerate(zip(self.planned.sets, self.view_of, strict=True)):
            rows = [row for row, item in enumerate(items) if item.view == view and each.is_missing[item.index]]
            if rows:
                self._gather(place, [items[row] for row in rows], results[each.output][rows])

    def _gather(self, place: int, items: Sequence[_Item], values: Tensor) -> None:
        each = self.planned.sets[place]
        result = narrowed(values, each.spec, each.cut)
        for row, reason in result.unfit.items():
            self._record_unfit(place, items[row], reason)
        kept = [item for row, item in enumerate(items) if row not in result.unfit]
        if kept:
            digests = np.frombuffer(b"".join(item.digest for item in kept), np.uint8).reshape(-1, 32)
            self.gathered[place].add(result.rows, digests, np.array([item.decoder for item in kept], np.uint8))
        self.outcome.computed[place] += len(kept)
        self.outcome.num_values[place] += result.num_values
        self.outcome.num_lost[place] += result.num_lost

    def _record_unfit(self, place: int, item: _Item, reason: str) -> None:
        """Files, in one set, an image whose row the set can't hold: with other weights or another type it is another.

        Raises:
            FeatureStoreError: unless such images are skipped.
        """
        if self.on_error == "raise":
            raise FeatureStoreError(
                f"{self.planned.images.ids[item.index]}: {reason}. Or leave such images out with --on-error skip."
            )
        self.outcome.unfit[place][item.digest.hex()] = reason
        self._file_failure(place, item.digest.hex(), reason)

    def _file_failure(self, place: int, digest: str, reason: str) -> None:
        stored = self.planned.sets[place].stored
        if stored is None or digest not in stored.failed:
            self.gathered[place].failed[digest] = reason

    def _job_notes(self) -> list[str]:
        lost = [
            lost_note(each.spec, each.cut, num_values, num_lost)
            for each, num_values, num_lost in zip(
                self.planned.sets, self.outcome.num_values, self.outcome.num_lost, strict=True
            )
        ]
        notes = (doubts_note(self.outcome.doubts), looks_note(self.planned.images, self.looks), *lost)
        return list(dict.fromkeys(note for note in notes if note is not None))

    def _commit_if_due(self) -> None:
        size = sum(gathered.num_bytes for gathered in self.gathered)
        if size >= COMMIT_BYTES or time.monotonic() - self.last_commit >= COMMIT_SECONDS:
            self._commit()

    def _commit(self) -> None:
        if self.trunk.is_live and any(each.num_rows for each in self.gathered):
            self._check_model()
        for place, each in enumerate(self.planned.sets):
            if self.gathered[place].num_rows or self.gathered[place].failed:
                self.written[place].append(self.gathered[place].write(self.store, self._facts(each)))
                # Forgotten only now: after an interrupt while a part is written, its rows are written again.
                self.gathered[place] = self._nothing(each)
        self.last_commit = time.monotonic()

    def _check_model(self) -> None:
        try:
            refuse_changed(self.planned)
        except FeatureStoreError:
            self.gathered = [self._nothing(each) for each in self.planned.sets]  # of nobody knows which weights
            raise

    def _nothing(self, each: PlannedSet) -> Gathered:
        return Gathered(each.spec, each.output.pool.shape(tuple(self.stages[each.cut][-1]["shape"])))

    def _facts(self, each: PlannedSet) -> dict[str, Json]:
        class_tokens, prefix_tokens = self.planned.model.tokens(each.cut)
        return part_facts(
            backbone=self.planned.model.name,
            stages=self.stages[each.cut],
            class_tokens=class_tokens,
            prefix_tokens=prefix_tokens,
            profile=self.trunk.profile(),
            probe=self.probes[each.output].facts(),
        )


def refuse_changed(planned: Plan) -> None:
    """Rows are filed under the digests of the plan, so they must be of that model still."""
    last = max((each.cut for each in planned.sets), key=planned.model.index)
    for stage, digest in planned.model.up_to(last).digests().items():
        if digest != planned.stage_digests[stage]:
            raise FactsDifferError(
                f"{planned.model.name} was changed after the extraction was planned: up to stage {stage} its digest is "
                f"{digest[:8]}, expected {planned.stage_digests[stage][:8]}. None of what it computes now was filed. "
                "Plan and extract anew; what is trained while that runs must be a copy: copy.deepcopy(model)."
            )


def _look(view: Tensor) -> int:
    """A number that differs for views that differ, but for one pair in 2 ** 64; not 0."""
    return int.from_bytes(hashlib.sha256(view.numpy().data).digest()[:8]) or 1


def _small(paths: Sequence[Path]) -> Iterator[Path]:
    for path in paths:
        with suppress(FileNotFoundError):  # others have merged it already, or removed the set
            if path.stat().st_size < MERGE_BYTES:
                yield path


@dataclass(frozen=True, eq=False)
class _Item:
    """One view of one image on its way to the trunk; the view by its place among the job's."""

    index: int
    digest: bytes
    view: int
    image: Tensor
    decoder: int
