"""Extraction: what is missing is planned, read, decoded, rendered, run through the trunk and filed."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from featstore.digest import Json
from featstore.errors import FeatureStoreError, ImageError
from featstore.images import Digests, ImageSet, split_overlap
from featstore.pool import REDUCTIONS
from featstore.probe import Probe, check_probe, take_probes
from featstore.purity import check_pure
from featstore.render import Job, Rendered, render
from featstore.spec import FeatureSpec
from featstore.staged import StagedModel
from featstore.store import DTYPES, FeatureRequest, FeatureSet, FeatureStore
from featstore.trunk import Output, Precision, Trunk, choose_device, default_batch_size
from featstore.views import Augment, View

COMMIT_BYTES = 256 << 20
COMMIT_SECONDS = 60.0
"""A part is written when this much has been gathered, or this long after the last one."""


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
        is_failed: ``(N,)``, those of them that can't be read or have failed before.
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
        sets: the evaluation view's and each seed's, for every cut.
    """

    model: StagedModel
    images: ImageSet
    digests: Digests
    sets: tuple[PlannedSet, ...]

    @cached_property
    def is_missing(self) -> NDArray[np.bool_]:
        """``(N,)``: images that lack a row in any set."""
        return _any([each.is_missing for each in self.sets])

    @cached_property
    def is_failed(self) -> NDArray[np.bool_]:
        """``(N,)``: images that lack a row because they have failed."""
        return _any([each.is_missing & each.is_failed for each in self.sets])

    def status(self, *, on_error: str = "raise") -> dict[str, Json]:
        """Images, stored, missing, failed and the bytes to write; with `skip`, failed ones don't count as missing."""
        missing = self.is_missing & ~self.is_failed if on_error == "skip" else self.is_missing
        return {
            "images": len(self.images),
            "stored": int((~self.is_missing).sum()),
            "missing": int(missing.sum()),
            "failed": int(self.is_failed.sum()),
            "bytes": sum(int(each.is_missing.sum()) * each.row_bytes for each in self.sets),
        }

    def describe(self) -> str:
        """One line: ``10,500 images: 10,000 stored, 500 to compute, 0.01 GB``."""
        status = self.status()
        failed = f" ({status['failed']:,} of them failed before)" if status["failed"] else ""
        return (
            f"{status['images']:,} images: {status['stored']:,} stored, {status['missing']:,} to compute{failed}, "
            f"{status['bytes'] / 1e9:.2f} GB in {len(self.sets)} feature sets"
        )

    def notes(self) -> list[str]:
        """Sentences about the images that their owner should read."""
        pairs = split_overlap(self.images, self.digests)
        if not pairs:
            return []
        named = ", ".join(f"{seen} = {held_out}" for seen, held_out in pairs[:3])
        return [
            f"{len(pairs):,} held-out images are byte for byte the same as images in another split ({named}"
            f"{', ...' if len(pairs) > 3 else ''}); scores on them say nothing about new images"
        ]


@dataclass(frozen=True, kw_only=True)
class ExtractReport:
    """What an extraction did.

    Attributes:
        computed: rows computed, over all sets.
        reused: rows that were stored already.
        failed: images left out, with `on_error="skip"`.
        missing: images asked for that lack a row for another reason: their files are absent.
        seconds: wall-clock time.
        keys: of the sets, in the order of cuts, each with the evaluation view first.
        sets: one record a set: key, cut, reduce, view, seed, rows, computed, reused, failed.
        failures: (image id, reason).
    """

    computed: int
    reused: int
    failed: int
    missing: int
    seconds: float
    keys: tuple[str, ...]
    sets: tuple[dict[str, Json], ...]
    failures: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        return (
            f"{self.reused:,} rows reused, {self.computed:,} computed, {self.failed:,} images failed, "
            f"{self.seconds:.1f} s"
        )


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
    precision: Precision = "fp32",
) -> Plan:
    """What `extract` with the same arguments would do. Reads images as far as their digests aren't known.

    Raises:
        ValueError: for an unknown cut, reduction, type or precision, or a size the model can't take.
        ModelError: for a model that can't be keyed.
    """
    staged = model if isinstance(model, StagedModel) else StagedModel.from_module(model)
    geometry = (view or staged.view).evaluation
    check_size(staged, geometry)
    outputs = [output_at(staged, cut, reduce) for cut in cuts or [staged.default_cut]]
    views = [geometry, *(augment.views(geometry) if augment else ())]
    digests = images.digests(store.known_digests(images))
    model_digests = staged.digests()
    is_training = images.splits == "train"
    planned = []
    for output in dict.fromkeys(outputs):
        for each in views:
            spec = FeatureSpec(
                trunk=model_digests[output.cut],
                pool=output.pool.facts(),
                view=each.facts(),
                precision=precision,
                dtype=dtype,
            )
            request = FeatureRequest(trunk=spec.trunk, pool=spec.pool, view=each, dtype=dtype, precision=precision)
            stored = store.find_one(request)
            everything = np.ones(len(images), dtype=bool)
            wanted = everything if each.is_evaluation or not is_training.any() else is_training
            shape = output.pool.shape(staged.shape(output.cut, each.size))
            planned.append(
                PlannedSet(
                    cut=output.cut,
                    output=output,
                    view=each,
                    spec=spec,
                    stored=stored,
                    is_wanted=wanted,
                    is_missing=wanted & store.missing(stored, digests),
                    is_failed=wanted & store.is_failed(stored, digests),
                    row_bytes=int(np.prod(shape, dtype=np.int64)) * DTYPES[dtype].itemsize,
                )
            )
    return Plan(model=staged, images=images, digests=digests, sets=tuple(planned))


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
    precision: Precision = "fp32",
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
        FactsDifferError: if the model computes other values than the rows already stored.
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
    """Carries out a plan; arguments, result and errors as in `extract`."""
    started = time.perf_counter() if started is None else started
    chosen = choose_device(device)
    _refuse_unreadable(planned, on_error)
    outputs = list(dict.fromkeys(each.output for each in planned.sets))
    trunk = Trunk(
        planned.model,
        outputs,
        view=planned.sets[0].view,
        batch_size=batch_size or _stored_batch_size(planned, chosen),
        precision=planned.sets[0].spec.precision,
        device=chosen,
    )
    probes = _checked_probes(planned, outputs, trunk)
    if planned.is_missing.any():
        check_pure(planned.model, outputs[_deepest(planned.model, outputs)].cut)
    store.save_images(planned.images, planned.digests)
    job = _Job(planned, store, trunk, probes, outputs)
    job.run(on_error=on_error, workers=workers, progress=progress)
    return job.report(time.perf_counter() - started)


def output_at(model: StagedModel, cut: str, reduce: str = "auto") -> Output:
    """What ``CUT`` or ``CUT:REDUCTION`` means for a model."""
    name, _, own = cut.partition(":")
    reduction = own or reduce
    if reduction not in ("auto", *REDUCTIONS):
        raise ValueError(f"{reduction!r} is no reduction. The reductions are auto, {', '.join(REDUCTIONS)}.")
    return Output(model.canonical(name), model.pool(name, reduction))


def check_size(model: StagedModel, view: View) -> None:
    """Raises ValueError if `model` takes images of another size only."""
    if model.fixed_size is not None and view.size != model.fixed_size:
        raise ValueError(
            f"{model.name} takes images of {model.fixed_size} pixels only, not {view.size}: its position embeddings "
            "are made for that size. Leave out --size, or choose a backbone without them."
        )


class _Job:
    """One run of a plan: gathers rows and writes parts."""

    def __init__(
        self,
        planned: Plan,
        store: FeatureStore,
        trunk: Trunk,
        probes: dict[Output, Probe],
        outputs: Sequence[Output],
    ) -> None:
        self.planned, self.store, self.trunk, self.probes, self.outputs = planned, store, trunk, probes, list(outputs)
        self.gathered = [_Gathered() for _ in planned.sets]
        self.computed = [0] * len(planned.sets)
        self.failures: dict[int, str] = dict(planned.digests.failed)
        self.stages = _stage_facts(planned)
        self.asked: dict[int, Job] = {}
        self.last_commit = time.monotonic()

    def run(self, *, on_error: Literal["raise", "skip"], workers: int | None, progress: bool) -> None:
        """Computes what is missing; files what is done also when it ends in an error."""
        jobs = list(self._jobs())
        self.asked = {job.index: job for job in jobs}
        batch: list[_Item] = []
        bar = tqdm(
            total=len(jobs),
            unit="image",
            disable=not progress,
            file=sys.stderr,
            mininterval=0.1 if sys.stderr.isatty() else 10,
        )
        try:
            for rendered in render(self.planned.images, jobs, workers=workers, on_error=on_error):
                batch += self._items(rendered)
                while len(batch) >= self.trunk.batch_size:
                    self._compute(batch[: self.trunk.batch_size])
                    batch = batch[self.trunk.batch_size :]
                self._commit_if_due()
                bar.update()
            if batch:
                self._compute(batch)
        finally:
            bar.close()
            self._commit()

    def report(self, seconds: float) -> ExtractReport:
        """What was done."""
        planned = self.planned
        sets: list[dict[str, Json]] = []
        failed = np.zeros(len(planned.images), dtype=bool)
        failed[list(self.failures)] = True
        for each, computed in zip(planned.sets, self.computed, strict=True):
            rows = int((each.is_wanted & ~each.is_missing).sum())
            done = int((each.is_missing & ~failed).sum())
            sets.append(
                {
                    "key": each.spec.key,
                    "cut": each.cut,
                    "reduce": each.spec.reduction,
                    "view": "evaluation" if each.view.policy is None else each.view.policy.name,
                    "seed": each.view.seed,
                    "rows": rows + done,
                    "computed": computed,
                    "reused": rows,
                    "failed": int((each.is_missing & failed).sum()),
                }
            )
        absent = len(set(planned.images.absent()) & set(planned.digests.failed))
        return ExtractReport(
            computed=sum(self.computed),
            reused=sum(int((each.is_wanted & ~each.is_missing).sum()) for each in planned.sets),
            failed=len(self.failures),
            missing=absent,
            seconds=seconds,
            keys=tuple(each.spec.key for each in planned.sets),
            sets=tuple(sets),
            failures=tuple((planned.images.ids[index], reason) for index, reason in sorted(self.failures.items())),
        )

    def _jobs(self) -> Iterator[Job]:
        """One job an image content: the views in which any set lacks its row."""
        digests = self.planned.digests
        seen: set[tuple[bytes, View]] = set()
        views = list(dict.fromkeys(each.view for each in self.planned.sets))
        lacking = {view: _any([each.is_missing for each in self.planned.sets if each.view == view]) for view in views}
        for index in np.flatnonzero(self.planned.is_missing & ~digests.is_failed).tolist():
            digest = bytes(digests.values[index])
            needed = tuple(view for view in views if lacking[view][index])
            # The same content in two splits may need seeds in one of them only, so it may come twice.
            needed = tuple(view for view in needed if (digest, view) not in seen)
            seen.update((digest, view) for view in needed)
            if needed:
                yield Job(index, digest, needed)

    def _items(self, rendered: Rendered) -> list[_Item]:
        if rendered.views is None:
            self.failures[rendered.index] = rendered.failure or ""
            for each, gathered in zip(self.planned.sets, self.gathered, strict=True):
                digest = bytes(self.planned.digests.values[rendered.index]).hex()
                known = {} if each.stored is None else each.stored.failed
                if each.is_missing[rendered.index] and digest not in known:
                    gathered.failed[digest] = rendered.failure or ""
            return []
        job = self.asked.pop(rendered.index)
        return [
            _Item(rendered.index, job.digest, view, image, rendered.decoder)
            for view, image in zip(job.views, rendered.views, strict=True)
        ]

    def _compute(self, items: Sequence[_Item]) -> None:
        results = dict(zip(self.outputs, self.trunk(torch.stack([item.image for item in items])), strict=True))
        for place, each in enumerate(self.planned.sets):
            rows = [row for row, item in enumerate(items) if item.view == each.view and each.is_missing[item.index]]
            if not rows:
                continue
            values = _narrowed(results[each.output][rows], each, [items[row] for row in rows], self.planned.images)
            gathered = self.gathered[place]
            gathered.chunks.append(values)
            gathered.digests += [items[row].digest for row in rows]
            gathered.decoders += [items[row].decoder for row in rows]
            self.computed[place] += len(rows)

    def _commit_if_due(self) -> None:
        size = sum(chunk.nbytes for gathered in self.gathered for chunk in gathered.chunks)
        if size >= COMMIT_BYTES or time.monotonic() - self.last_commit >= COMMIT_SECONDS:
            self._commit()

    def _commit(self) -> None:
        for place, each in enumerate(self.planned.sets):
            gathered, self.gathered[place] = self.gathered[place], _Gathered()
            if gathered.chunks or gathered.failed:
                self._write(each, gathered)
        self.last_commit = time.monotonic()

    def _write(self, each: PlannedSet, gathered: _Gathered) -> None:
        shape = each.output.pool.shape(self.planned.model.shape(each.cut, each.view.size))
        empty = torch.empty((0, *shape), dtype=DTYPES[each.spec.dtype])
        self.store.write(
            each.spec,
            features=gathered.chunks or [empty],
            digests=np.frombuffer(b"".join(gathered.digests), np.uint8).reshape(-1, 32),
            decoders=np.array(gathered.decoders, np.uint8),
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


@dataclass(frozen=True, eq=False)
class _Item:
    """One view of one image on its way to the trunk."""

    index: int
    digest: bytes
    view: View
    image: Tensor
    decoder: int


@dataclass(eq=False)
class _Gathered:
    """Rows of one set that wait to be written."""

    chunks: list[Tensor] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)
    decoders: list[int] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)


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


def _refuse_unreadable(planned: Plan, on_error: str) -> None:
    if on_error not in ("raise", "skip"):
        raise ValueError(f"on_error is {on_error!r}; expected raise or skip.")
    if planned.digests.failed and on_error == "raise":
        index, reason = next(iter(planned.digests.failed.items()))
        raise ImageError(planned.images.ids[index], reason)


def _stored_batch_size(planned: Plan, device: torch.device) -> int:
    """B of rows already stored on this kind of device, so that one set has one profile; else the default."""
    for each in planned.sets:
        if each.stored is not None and each.stored.facts["profile"]["device"] == device.type:
            return int(each.stored.facts["profile"]["batch_size"])
    return default_batch_size(device)


def _checked_probes(planned: Plan, outputs: list[Output], trunk: Trunk) -> dict[Output, Probe]:
    precision = trunk.precision
    taken = take_probes(planned.model, outputs, view=trunk.view, precision=precision, device=trunk.device)
    probes = dict(zip(outputs, taken, strict=True))
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


def _deepest(model: StagedModel, outputs: Sequence[Output]) -> int:
    return max(range(len(outputs)), key=lambda place: model.index(outputs[place].cut))


def _stage_facts(planned: Plan) -> dict[str, list[Json]]:
    """Cut -> name, layout, shape and digest of each stage up to it."""
    model, size = planned.model, planned.sets[0].view.size
    digests = model.digests()
    facts: list[Json] = [
        {"name": name, "layout": model.layout(name), "shape": list(model.shape(name, size)), "digest": digests[name]}
        for name in model.cut_points
    ]
    return {each.cut: facts[: model.index(each.cut) + 1] for each in planned.sets}
