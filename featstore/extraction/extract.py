"""Extraction: what is missing is planned, read, decoded, rendered, run through the trunk and filed."""

from __future__ import annotations

import errno
import math
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from featstore.digest import Json
from featstore.errors import FactsDifferError, FeatureStoreError, ImageError
from featstore.files.index import first_places, is_among
from featstore.images.contents import is_changed, overlap_note
from featstore.images.digests import Digests
from featstore.images.image_set import ImageSet
from featstore.images.render import Job, Rendered, render
from featstore.images.views import Augment, View
from featstore.models.names import DEFAULT_PRECISION, Precision
from featstore.models.probe import Probe, check_probe, take_probes
from featstore.models.purity import check_pure
from featstore.models.staged import StagedModel
from featstore.models.trunk import Output, Trunk, choose_device, default_batch_size, output_at
from featstore.store.sets import DTYPES, FeatureRequest, FeatureSet, digest_rows
from featstore.store.spec import FeatureSpec
from featstore.store.store import FeatureStore
from featstore.words import size_text

COMMIT_BYTES = 256 << 20
COMMIT_SECONDS = 60.0
"""A part is written when this much has been gathered, or this long after the last one."""

MERGE_BYTES = 1 << 30
"""Of the parts that a job has written, those of less are merged at its end."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PlannedSet:
    """One feature set of a plan.

    Attributes:
        cut: canonical name.
        output: cut and reduction.
        view: evaluation, or with one seed.
        spec: of the values.
        stored: the set as the store has it, or None.
        is_wanted: ``(N,)``, the images that were asked for.
        is_missing: ``(N,)``, those of them without a row.
        is_failed: ``(N,)``, those of them that failed before or can't be read now, though their files are there.
        row_bytes: size of one row.
    """

    cut: str
    output: Output
    view: View
    spec: FeatureSpec
    stored: FeatureSet | None
    is_wanted: NDArray[np.bool_]
    is_missing: NDArray[np.bool_]
    is_failed: NDArray[np.bool_]
    row_bytes: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """What an extraction would do: which rows of which sets are stored and which are missing.

    Attributes:
        model: whose trunk runs.
        images: in order.
        digests: of the images.
        sets: the evaluation view's and each seed's, for every cut; no two of one key.
        is_absent: ``(N,)``, images whose files aren't there.
        is_changed: ``(N,)``, images that the store knew by their ids, with another content.
        stage_digests: cut -> digest of the model up to it.
    """

    model: StagedModel
    images: ImageSet
    digests: Digests
    sets: tuple[PlannedSet, ...]
    is_absent: NDArray[np.bool_]
    is_changed: NDArray[np.bool_]
    stage_digests: dict[str, str]

    @cached_property
    def is_missing(self) -> NDArray[np.bool_]:
        """``(N,)``: images that lack a row in any set."""
        return _any([each.is_missing for each in self.sets])

    @cached_property
    def is_failed(self) -> NDArray[np.bool_]:
        """``(N,)``: images that lack a row because they have failed."""
        return _any([each.is_missing & each.is_failed for each in self.sets])

    def status(self, *, on_error: str = "raise") -> dict[str, Json]:
        """Images, stored, missing, changed (of the missing), failed and the bytes to write.

        With `raise` a failed image is one of the missing; with `skip` it isn't, and an absent file still is: a disk
        that isn't there must not pass for a finished job.
        """
        to_compute = self._to_compute(on_error)
        missing = _any(to_compute)
        return {
            "images": len(self.images),
            "stored": int((~self.is_missing).sum()),
            "missing": int(missing.sum()),
            "changed": int((missing & self.is_changed).sum()),
            "failed": int((self.is_failed & ~missing if on_error == "skip" else self.is_failed).sum()),
            "bytes": sum(int(rows.sum()) * each.row_bytes for rows, each in zip(to_compute, self.sets, strict=True)),
        }

    def describe(self) -> str:
        """One line: ``10,500 images: 10,000 stored, 500 to compute, 13.1 MB in 1 feature set``."""
        status = self.status()
        failed = f" ({status['failed']:,} of them failed before)" if status["failed"] else ""
        return (
            f"{status['images']:,} images: {status['stored']:,} stored, {self.to_compute()}{failed}, "
            f"{size_text(status['bytes'])} in {len(self.sets)} feature set{'' if len(self.sets) == 1 else 's'}"
        )

    def to_compute(self, *, on_error: str = "raise") -> str:
        """What `status` counts as missing: ``500 to compute``, or ``500 to compute (497 new, 3 changed: a, b, c)``."""
        missing = _any(self._to_compute(on_error))
        changed = np.flatnonzero(missing & self.is_changed).tolist()
        counted = f"{int(missing.sum()):,} to compute"
        if not changed:
            return counted
        named = f"{', '.join(self.images.ids[place] for place in changed[:3])}{', ...' * (len(changed) > 3)}"
        return f"{counted} ({int(missing.sum()) - len(changed):,} new, {len(changed):,} changed: {named})"

    def _to_compute(self, on_error: str) -> list[NDArray[np.bool_]]:
        return [each.is_missing & ~each.is_failed if on_error == "skip" else each.is_missing for each in self.sets]

    def notes(self) -> list[str]:
        """Sentences about the images that their owner should read."""
        notes = []
        absent = [self.images.ids[index] for index in np.flatnonzero(self.is_absent)]
        if absent:
            named = f"{', '.join(absent[:3])}{', ...' * (len(absent) > 3)}"
            words = "image file is" if len(absent) == 1 else "image files are"
            notes.append(f"{len(absent):,} {words} absent ({named})")
        overlap = overlap_note(self.images, self.digests)
        return notes if overlap is None else [*notes, overlap]


@dataclass(frozen=True, kw_only=True)
class ExtractReport:
    """What an extraction did.

    Attributes:
        computed: rows computed, over all sets. Images of equal content share a row.
        reused: images whose rows were stored already, over all sets.
        failed: images left out, with `on_error="skip"`.
        missing: images asked for that lack a row for another reason: their files are absent, or when their turn came
            they had vanished, had changed or couldn't be read. The next run computes them if it can.
        seconds: wall-clock time.
        keys: of the sets, in the order of cuts, each with the evaluation view first.
        sets: one record a set: key, cut, reduce, view, seed, rows (images that have one now), computed, reused, failed.
        failures: (image id, reason) of failed and missing images.
        notes: sentences about what could not be done afterwards; all rows are filed.
    """

    computed: int
    reused: int
    failed: int
    missing: int
    seconds: float
    keys: tuple[str, ...]
    sets: tuple[dict[str, Json], ...]
    failures: tuple[tuple[str, str], ...]
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        missing = f"{self.missing:,} missing, " if self.missing else ""
        done = (
            f"{self.reused:,} rows reused, {self.computed:,} computed, {self.failed:,} images failed, {missing}"
            f"{self.seconds:.1f} s"
        )
        return ". ".join([done, *self.notes])


def plan(
    model: StagedModel | nn.Module,
    images: ImageSet,
    store: FeatureStore,
    *,
    cuts: Sequence[str] | None = None,
    reduce: str = "auto",
    augment: Augment | None = None,
    view: View | None = None,
    dtype: str = "float16",
    precision: Precision = DEFAULT_PRECISION,
) -> Plan:
    """What `extract` with the same arguments would do. Reads images as far as their digests aren't known.

    Raises:
        ValueError: for an unknown cut, reduction, type or precision, a size the model can't take, no images, or a
            policy that has changed since it was made.
        TypeError: for cuts that are a text, not a list.
        ModelError: for a model that can't be keyed.
        DamagedFileError: for a damaged part or image table of what is asked for.
    """
    for name, value, kind, example in (
        ("model", model, nn.Module, 'backbone("resnet34")'),
        ("images", images, ImageSet, 'ImageSet.from_folder("photos")'),
        ("store", store, FeatureStore, 'FeatureStore("features")'),
    ):
        if not isinstance(value, kind):
            raise TypeError(f"{name} is {value!r}; expected what {example} gives.")
    if not len(images):
        raise ValueError(f"{images.name} holds no images. Expected some to extract. Give the set that has been dealt.")
    if isinstance(cuts, str):
        raise TypeError(f"cuts is {cuts!r}. Expected a list of cuts. Write [{cuts!r}].")
    if augment is not None:
        augment.policy.check_unchanged()
    staged = model if isinstance(model, StagedModel) else StagedModel.from_module(model, view=view and view.evaluation)
    geometry = (view or staged.view).evaluation
    staged.check_size(geometry)
    viewed = staged.with_(view=geometry)
    views = [geometry, *(augment.views(geometry) if augment else ())]
    stage_digests = viewed.digests()
    by_key: dict[str, tuple[FeatureSpec, Output, View]] = {}  # a cut named twice, or two of one value, is one set
    for output in [output_at(viewed, cut, reduce) for cut in cuts or [viewed.default_cut]]:
        for each in views:
            spec = FeatureSpec(
                trunk=stage_digests[output.cut],
                pool=output.pool.facts(),
                view=each.facts(),
                precision=precision,
                dtype=dtype,
            )
            by_key.setdefault(spec.key, (spec, output, each))
    known = store.known_digests(images)
    digests = images.digests(known)
    is_absent = _absent(images, digests)
    is_training = images.splits == "train"
    everything = np.ones(len(images), dtype=bool)
    planned = []
    for spec, output, each in by_key.values():
        request = FeatureRequest(trunk=spec.trunk, pool=spec.pool, view=each, dtype=dtype, precision=precision)
        stored = store.find_one(request)
        wanted = everything if each.is_evaluation or not is_training.any() else is_training
        shape = output.pool.shape(viewed.shape(output.cut))
        planned.append(
            PlannedSet(
                cut=output.cut,
                output=output,
                view=each,
                spec=spec,
                stored=stored,
                is_wanted=wanted,
                is_missing=wanted & store.missing(stored, digests),
                is_failed=wanted & store.is_failed(stored, digests) & ~is_absent,
                row_bytes=math.prod(shape) * DTYPES[dtype].itemsize,
            )
        )
    return Plan(
        model=staged,
        images=images,
        digests=digests,
        sets=tuple(planned),
        is_absent=is_absent,
        is_changed=is_changed(images, digests, known),
        stage_digests=stage_digests,
    )


def extract(
    model: StagedModel | nn.Module,
    images: ImageSet,
    store: FeatureStore,
    *,
    cuts: Sequence[str] | None = None,
    reduce: str = "auto",
    augment: Augment | None = None,
    view: View | None = None,
    on_error: Literal["raise", "skip"] = "raise",
    dtype: str = "float16",
    precision: Precision = DEFAULT_PRECISION,
    device: torch.device | str = "auto",
    batch_size: int | None = None,
    workers: int | None = None,
    progress: bool = False,
) -> ExtractReport:
    """Computes the rows that the store lacks: the evaluation view of all images, and `augment`'s seeds of the training.

    Args:
        model: whose trunk runs, in eval mode; never changed.
        images: whose features are wanted; without a split, seeds are computed for all of them.
        store: where the features go; its folder is made if needed.
        cuts: ``CUT`` or ``CUT:REDUCTION`` each; default: the model's default cut.
        reduce: reduction of the cuts that don't name one: auto, none, avg, max, concat, token or tokens.
        augment: policy and fixed seeds; each seed is a feature set of its own.
        view: geometry and normalisation; default: the model's.
        on_error: what an image that can't be read or decoded does: `raise` stops, after filing what is done; `skip`
            leaves it out and reports it.
        dtype: of the stored values: float16, float32 or bfloat16.
        precision: of the arithmetic: fp32, tf32, bf16 or fp16.
        device: auto, cpu, cuda or cuda:1.
        batch_size: images a pass; part of the profile, not of the key. Default: that of stored rows of the same set,
            else 32 on a CPU and 256 on a GPU.
        workers: threads that read and decode; 0 for none. Default: one a processor, up to 8.
        progress: shows a bar on stderr.

    Raises:
        ImageError: with `raise`, for an image that can't be read, decoded or rendered.
        ModelError: for a model that can't be keyed or isn't a function of one image.
        FactsDifferError: if the model computes other values than the rows already stored, or is changed meanwhile: then
            nothing is filed of what was computed since the last part.
        FeatureStoreError: for values the storage type can't hold.
        OSError: as the disk gave it.
    """
    started = time.perf_counter()
    planned = plan(
        model, images, store, cuts=cuts, reduce=reduce, augment=augment, view=view, dtype=dtype, precision=precision
    )
    return run_plan(
        planned,
        store,
        on_error=on_error,
        device=device,
        batch_size=batch_size,
        workers=workers,
        progress=progress,
        started=started,
    )


def run_plan(
    planned: Plan,
    store: FeatureStore,
    *,
    on_error: Literal["raise", "skip"] = "raise",
    device: torch.device | str = "auto",
    batch_size: int | None = None,
    workers: int | None = None,
    progress: bool = False,
    started: float | None = None,
) -> ExtractReport:
    """Carries out a plan; arguments, result and errors as in `extract`.

    The model must still be what it was when the plan was made: FactsDifferError if it isn't.
    """
    started = time.perf_counter() if started is None else started
    chosen = choose_device(device)
    _refuse_unreadable(planned, on_error)
    model = planned.model.with_(view=planned.sets[0].view.evaluation)
    outputs = list(dict.fromkeys(each.output for each in planned.sets))
    lacking = list(dict.fromkeys(each.output for each in planned.sets if each.is_missing.any()))
    trunk = Trunk(
        model,
        lacking or outputs,
        view=model.view,
        batch_size=_stored_batch_size(planned, chosen) if batch_size is None else batch_size,
        precision=planned.sets[0].spec.precision,
        device=chosen,
    )
    _refuse_changed(planned)
    if lacking:
        last = max((output.cut for output in lacking), key=model.index)
        check_pure(model, last, batch_size=trunk.batch_size, device=trunk.device)
    probes = _checked_probes(planned, model, outputs, trunk)
    if lacking:
        _refuse_changed(planned)  # the probes, too, must be those of the planned model
    notes = _noted_images(planned, store, is_needed=bool(lacking))
    job = _Job(planned, store, trunk, probes, _stage_facts(planned, model))
    job.notes += notes
    job.run(on_error=on_error, workers=workers, progress=_Progress(job.num_jobs, is_shown=progress))
    job.merge(is_shown=progress)
    return job.report(time.perf_counter() - started)


class _Job:
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
        self.drawn: deque[Job] = deque()  # jobs whose views are on their way; they come back in order
        self.gathered = [_Gathered() for _ in planned.sets]
        self.computed = [0] * len(planned.sets)
        self.failures: dict[str, str] = {}  # digest -> reason, of images that can't be decoded or rendered
        self.unread: dict[str, tuple[str, str]] = {}  # digest -> image and reason, of those that couldn't be read
        self.written: list[list[Path]] = [[] for _ in planned.sets]
        self.notes: list[str] = []
        self.last_commit = time.monotonic()

    @property
    def num_jobs(self) -> int:
        """Images to read."""
        return int(self.is_needed.any(axis=0).sum())

    def run(self, *, on_error: Literal["raise", "skip"], workers: int | None, progress: _Progress) -> None:
        """Computes what is missing; files what is done also when it ends in an error."""
        size = self.trunk.batch_size
        batch: list[_Item] = []
        try:
            with (
                progress,
                closing(render(self.planned.images, self._jobs(), workers=workers, on_error=on_error)) as rendered,
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
                self.notes.append(
                    f"The parts that were written of set {each.spec.key[:8]} could not be merged ({problem}). All rows "
                    "are filed; merge them later with featstore compact"
                )

    def report(self, seconds: float) -> ExtractReport:
        """What was done."""
        planned = self.planned
        is_failed = is_among(planned.digests.values, digest_rows(self.failures)) | planned.digests.is_failed
        is_unread = is_among(planned.digests.values, digest_rows(self.unread)) & ~is_failed
        is_left_out = is_failed | is_unread
        sets: list[dict[str, Json]] = []
        for each, computed in zip(planned.sets, self.computed, strict=True):
            reused = int((each.is_wanted & ~each.is_missing).sum())
            sets.append(
                {
                    "key": each.spec.key,
                    "cut": each.cut,
                    "reduce": each.spec.reduction,
                    "view": "evaluation" if each.view.policy is None else each.view.policy.name,
                    "seed": each.view.seed,
                    "rows": reused + int((each.is_missing & ~is_left_out).sum()),
                    "computed": computed,
                    "reused": reused,
                    "failed": int((each.is_missing & is_failed & ~planned.is_absent).sum()),
                }
            )
        return ExtractReport(
            computed=sum(self.computed),
            reused=sum(each["reused"] for each in sets),
            failed=int((is_failed & ~planned.is_absent).sum()),
            missing=int((is_unread | planned.is_absent).sum()),
            seconds=seconds,
            keys=tuple(each.spec.key for each in planned.sets),
            sets=tuple(sets),
            failures=tuple(
                (planned.images.ids[index], self._reason(index)) for index in np.flatnonzero(is_left_out).tolist()
            ),
            notes=tuple(self.notes),
        )

    def _reason(self, index: int) -> str:
        digests = self.planned.digests
        if index in digests.failed:
            return digests.failed[index]
        digest = bytes(digests.values[index]).hex()
        if digest in self.failures:
            return self.failures[digest]
        image, reason = self.unread[digest]
        return reason if image == self.planned.images.ids[index] else f"its content was to be read as {image}: {reason}"

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

    def _jobs(self) -> Iterator[Job]:
        """Drawn by the renderer as it goes, so that memory doesn't grow with the number of images."""
        for index in np.flatnonzero(self.is_needed.any(axis=0)).tolist():
            views = tuple(self.views[place] for place in np.flatnonzero(self.is_needed[:, index]))
            job = Job(index, bytes(self.planned.digests.values[index]), views)
            self.drawn.append(job)
            yield job

    def _items(self, rendered: Rendered) -> list[_Item]:
        job = self.drawn.popleft()
        assert job.index == rendered.index
        if rendered.views is None:
            self._record_failure(job, rendered)
            return []
        return [
            _Item(job.index, job.digest, int(place), image, rendered.decoder)
            for place, image in zip(np.flatnonzero(self.is_needed[:, job.index]), rendered.views, strict=True)
        ]

    def _record_failure(self, job: Job, rendered: Rendered) -> None:
        """Files what would fail again; an image that can't be read now has done nothing to be left out for good."""
        reason, digest = rendered.failure or "", job.digest.hex()
        if not rendered.is_lasting:
            self.unread[digest] = self.planned.images.ids[job.index], reason
            return
        self.failures[digest] = reason
        for each, gathered in zip(self.planned.sets, self.gathered, strict=True):
            if each.view in job.views and each.is_missing[job.index]:
                known = {} if each.stored is None else each.stored.failed
                if digest not in known:
                    gathered.failed[digest] = reason

    def _compute(self, items: Sequence[_Item]) -> None:
        if not items:
            return
        results = dict(zip(self.trunk.outputs, self.trunk(torch.stack([item.image for item in items])), strict=True))
        for place, (each, view) in enumerate(zip(self.planned.sets, self.view_of, strict=True)):
            rows = [row for row, item in enumerate(items) if item.view == view and each.is_missing[item.index]]
            if rows:
                chosen = [items[row] for row in rows]
                values = _narrowed(results[each.output][rows], each, chosen, self.planned.images)
                self.gathered[place].add(values, chosen)
                self.computed[place] += len(rows)

    def _commit_if_due(self) -> None:
        size = sum(gathered.num_bytes for gathered in self.gathered)
        if size >= COMMIT_BYTES or time.monotonic() - self.last_commit >= COMMIT_SECONDS:
            self._commit()

    def _commit(self) -> None:
        if self.trunk.is_live and any(each.rows for each in self.gathered):
            self._check_model()
        for place, each in enumerate(self.planned.sets):
            if self.gathered[place].rows or self.gathered[place].failed:
                self.written[place].append(self._write(each, self.gathered[place]))
                # Forgotten only now: after an interrupt while a part is written, its rows are written again.
                self.gathered[place] = _Gathered()
        self.last_commit = time.monotonic()

    def _check_model(self) -> None:
        try:
            _refuse_changed(self.planned)
        except FeatureStoreError:
            self.gathered = [_Gathered() for _ in self.planned.sets]  # of nobody knows which weights
            raise

    def _write(self, each: PlannedSet, gathered: _Gathered) -> Path:
        shape = each.output.pool.shape(tuple(self.stages[each.cut][-1]["shape"]))
        items = [item for _, items in gathered.rows for item in items]
        return self.store.write(
            each.spec,
            features=[values for values, _ in gathered.rows]
            or [torch.empty((0, *shape), dtype=DTYPES[each.spec.dtype])],
            digests=np.frombuffer(b"".join(digest for digest, _ in items), np.uint8).reshape(-1, 32),
            decoders=np.array([decoder for _, decoder in items], np.uint8),
            facts={
                "backbone": self.planned.model.name,
                "cut": each.cut,
                "stages": self.stages[each.cut],
                "class_tokens": self.planned.model.class_tokens,
                "profile": self.trunk.profile(),
                "probe": self.probes[each.output].facts(),
                "failed": gathered.failed,
            },
        )


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


@dataclass(eq=False)
class _Gathered:
    """Rows of one set that wait to be written."""

    rows: list[tuple[Tensor, list[tuple[bytes, int]]]] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    num_bytes: int = 0

    def add(self, values: Tensor, items: Sequence[_Item]) -> None:
        """Rows with their digests and decoders; in one step, so that no interrupt can leave one without the other."""
        self.rows.append((values, [(item.digest, item.decoder) for item in items]))
        self.num_bytes += values.nbytes


class _Progress:
    """How far a job is and what its time goes into, on stderr: a bar on a terminal, else a line every ten seconds."""

    SECONDS_A_LINE = 10.0

    def __init__(self, total: int, *, is_shown: bool) -> None:
        self.total, self.done = total, 0
        self.is_terminal = sys.stderr.isatty()
        self.prints_lines = is_shown and not self.is_terminal
        self.bar = tqdm(total=total, unit="image", disable=not (is_shown and self.is_terminal), file=sys.stderr)
        self.seconds: dict[str, float] = {}
        self.started = self.last_line = time.monotonic()

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    @contextmanager
    def timing(self, what: str) -> Iterator[None]:
        """Counts the block's time under `what`."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[what] = self.seconds.get(what, 0.0) + time.perf_counter() - started

    def timed(self, what: str, values: Iterator[Rendered]) -> Iterator[Rendered]:
        """`values`; the time spent waiting for each is counted under `what`."""
        while True:
            with self.timing(what):
                value = next(values, None)
            if value is None:
                return
            yield value

    def step(self) -> None:
        """One image more."""
        self.done += 1
        if not self.bar.disable:
            self.bar.set_postfix_str(self._shares(), refresh=False)
            self.bar.update()
        elif self.prints_lines and time.monotonic() - self.last_line >= self.SECONDS_A_LINE:
            self.last_line = time.monotonic()
            rate = self.done / (self.last_line - self.started)
            print(f"{self.done:,} of {self.total:,} images, {rate:.1f} a second; {self._shares()}", file=sys.stderr)

    def _shares(self) -> str:
        """Why it isn't faster: reading and decoding are waited for, as they go on beside the forward pass."""
        total = sum(self.seconds.values()) or 1.0
        return ", ".join(f"{what} {seconds / total:.0%}" for what, seconds in self.seconds.items())


def _narrowed(values: Tensor, each: PlannedSet, items: Sequence[_Item], images: ImageSet) -> Tensor:
    """`values` in the storage type, on the CPU; refused if that loses a value to infinity."""
    stored = values.to(DTYPES[each.spec.dtype])
    finite = stored.reshape(len(stored), -1).isfinite().all(dim=1)
    if not finite.all():
        row = int(torch.nonzero(~finite)[0])
        largest, image = float(values[row].abs().max()), images.ids[items[row].index]
        if bool(values[row].isfinite().all()):
            raise FeatureStoreError(
                f"{image}: its activations at {each.cut} reach {largest:.6g}, more than {each.spec.dtype} can hold "
                f"({torch.finfo(DTYPES[each.spec.dtype]).max:.6g}). Store them as bfloat16 or float32 (--dtype)."
            )
        raise FeatureStoreError(
            f"{image}: its activations at {each.cut} aren't finite. The weights may be damaged, or "
            f"{each.spec.precision} too narrow for this model (--precision fp32)."
        )
    return stored.cpu()


def _any(masks: Sequence[NDArray[np.bool_]]) -> NDArray[np.bool_]:
    result: NDArray[np.bool_] = np.logical_or.reduce(masks)
    return result


def _absent(images: ImageSet, digests: Digests) -> NDArray[np.bool_]:
    absent = np.zeros(len(images), dtype=bool)
    unread = np.array(sorted(digests.failed), dtype=np.int64)
    absent[unread[images.select(unread).absent()]] = True
    return absent


def _refuse_unreadable(planned: Plan, on_error: str) -> None:
    if on_error not in ("raise", "skip"):
        raise ValueError(f"on_error is {on_error!r}; expected raise or skip.")
    if planned.digests.failed and on_error == "raise":
        index, reason = next(iter(planned.digests.failed.items()))
        raise ImageError(planned.images.ids[index], reason)


def _refuse_changed(planned: Plan) -> None:
    """Rows are filed under the digests of the plan, so they must be of that model still."""
    last = max((each.cut for each in planned.sets), key=planned.model.index)
    for stage, digest in planned.model.up_to(last).digests().items():
        if digest != planned.stage_digests[stage]:
            raise FactsDifferError(
                f"{planned.model.name} was changed after the extraction was planned: up to stage {stage} its digest is "
                f"{digest[:8]}, expected {planned.stage_digests[stage][:8]}. None of what it computes now was filed. "
                "Plan and extract anew; what is trained while that runs must be a copy: copy.deepcopy(model)."
            )


def _noted_images(planned: Plan, store: FeatureStore, *, is_needed: bool) -> list[str]:
    """Files the image set, and says what its owner should read about it.

    Where nothing is to be computed, a store that can't be written is as good without.
    """
    images = planned.images
    unlike = store.unlike_images(images)
    try:
        store.save_images(images, planned.digests)
    except OSError as error:
        if is_needed or error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise
        return [f"the image set isn't noted in {store.root} ({error.strerror})"]
    return [
        f"{store.root} had an image set called {images.name} of other images; this one is the newest of that name now, "
        f"and ImageSet.from_store(store, {stem!r}) still gives the other"
        for stem in unlike
    ]


def _stored_batch_size(planned: Plan, device: torch.device) -> int:
    """B of rows already stored on this kind of device, so that one set has one profile; else the default."""
    for each in planned.sets:
        if each.stored is not None and each.stored.facts["profile"]["device"] == device.type:
            return int(each.stored.facts["profile"]["batch_size"])
    return default_batch_size(device)


def _checked_probes(planned: Plan, model: StagedModel, outputs: list[Output], trunk: Trunk) -> dict[Output, Probe]:
    precision = trunk.precision
    taken = take_probes(model, outputs, view=trunk.view, precision=precision, device=trunk.device)
    probes = dict(zip(outputs, taken, strict=True))
    for output, probe in probes.items():
        if not math.isfinite(probe.largest):
            raise FeatureStoreError(
                f"{model.name} at {output.cut}: the activations of the two probe images aren't finite. The weights may "
                f"be damaged, or {precision} too narrow for this model (--precision fp32)."
            )
    for each in planned.sets:
        if each.stored is not None:
            facts = each.stored.facts
            check_probe(
                facts["probe"],
                probes[each.output],
                precision=precision,
                what=f"set {each.spec.key[:8]} ({each.cut} {each.spec.reduction})",
                profile=facts["profile"],
                now=trunk.profile(),
            )
    return probes


def _stage_facts(planned: Plan, model: StagedModel) -> dict[str, list[Json]]:
    """Cut -> name, layout, shape and digest of each stage up to it."""
    facts: list[Json] = [
        {
            "name": name,
            "layout": model.layout(name),
            "shape": list(model.shape(name)),
            "digest": planned.stage_digests[name],
        }
        for name in model.cut_points
    ]
    return {each.cut: facts[: model.index(each.cut) + 1] for each in planned.sets}
