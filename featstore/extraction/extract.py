"""Extraction: what is missing is planned, read, decoded, rendered, run through the trunk and filed."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from featstore.digest import Json
from featstore.errors import Doubtful, OnError
from featstore.extraction.failures import (
    Failing,
    TooManyFailedError,
    check_max_errors,
    failures,
    refuse_unreadable,
    write_report,
)
from featstore.extraction.filed import Filed, merge_parts, refuse_contradictions
from featstore.extraction.job import refuse_changed
from featstore.extraction.opening import check_can_compile, open_plan
from featstore.extraction.plan import Models, Plan, plan
from featstore.extraction.progress import ProgressReport
from featstore.extraction.rates import StageName, StageRate, bound_by
from featstore.extraction.ray_actors import Ray, run_by_ray
from featstore.extraction.shards import Shard
from featstore.files.index import is_among
from featstore.images.image_set import ImageSet
from featstore.images.render import check_workers
from featstore.images.views import Augment, View
from featstore.models.names import DEFAULT_PRECISION, Precision
from featstore.models.trunk import check_batch_size, choose_device
from featstore.notes import logger_of
from featstore.store.sets import digest_rows
from featstore.store.store import FeatureStore
from featstore.timing import timed
from featstore.words import counted


@dataclass(frozen=True, kw_only=True)
class ExtractReport:
    """What an extraction did.

    Attributes:
        computed: rows computed, over all sets. Images of equal content share a row.
        reused: images whose rows were stored already, over all sets.
        failed: images left out of some set, with `on_error="skip"`.
        missing: images asked for that lack a row for another reason: their files are absent, or when their turn came
            they had vanished, had changed or couldn't be read, or they had no turn: a run was stopped, or of a plan in
            pieces `finish` was given some. The next run computes them if it can.
        seconds: wall-clock time.
        keys: of the sets, in the order of models and cuts, each with the evaluation view first.
        sets: one record a set: key, backbone, cut, reduce, view, seed, rows (images that have one now), computed,
            reused, failed.
        failures: (image id, reason) of failed and missing images; `notes` count those that had no turn.
        notes: sentences about what its owner should know, or that could not be done afterwards; all rows are filed.
        doubts: (image id, reason) of images that were decoded now and may not look as their owner expects: damaged in a
            way that decoders pass over, or 16-bit values that leave the upper bits unused. They have rows all the same.
        shard: of several jobs the one that this was; all counts are of its images. None for one job.
        rates: what each stage did, and how long it was busy; empty where nothing was computed.
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
    doubts: tuple[tuple[str, str], ...] = ()
    shard: Shard | None = None
    rates: tuple[StageRate, ...] = ()

    @property
    def bound_by(self) -> StageName | None:
        """The stage that all others waited for; None where nothing was computed."""
        return bound_by(self.rates)

    def __str__(self) -> str:
        missing = f"{self.missing:,} missing, " if self.missing else ""
        shard = "" if self.shard is None else f"{self.shard}: "
        done = (
            f"{shard}{self.reused:,} rows reused, {self.computed:,} computed, {self.failed:,} images failed, {missing}"
            f"{self.seconds:.1f} s"
        )
        return ". ".join([done, *self.notes])


def extract(
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
    progress: bool = False,
    on_progress: Callable[[ProgressReport], None] | None = None,
    shard: Shard | str | None = None,
    engine: Ray | None = None,
) -> ExtractReport:
    """Computes the rows that the store lacks: the evaluation view of all images, and `augment`'s seeds of the training.

    Args:
        model: whose trunk runs, in eval mode; never changed. Or several, each with its cuts, as ``[(model, ["layer4"]),
            (other, None)]``: an image is read and decoded once for all of them.
        images: whose features are wanted; without a split, seeds are computed for all of them.
        store: where the features go; its folder is made if needed.
        cuts: ``CUT`` or ``CUT:REDUCTION`` each; default: the model's default cut. None beside several models.
            ``pixels`` stands for the views that the model is given, stored as uint8 whatever `dtype` and `reduce` say;
            later extractions of the same views read these.
        reduce: reduction of the cuts that don't name one: auto, none, avg, max, concat, token or tokens.
        augment: policy and fixed seeds; each seed is a feature set of its own.
        view: geometry and normalisation; default: the model's.
        on_error: what an image that can't be read or decoded does, or one whose values the storage type can't hold:
            `raise` stops, after filing what is done; `skip` leaves it out and reports it, beside the store as well.
        max_errors: with `skip`, more images than this that fail stop the job, after filing what is done; default: any
            number is left out.
        doubtful: what an image does that is decoded with a doubt: `note` names it; `refuse` treats it as one that can't
            be decoded. Of rows that are stored already nobody knows.
        dtype: of the stored values: float16, float32, bfloat16, or int8, whole numbers and a scale for each row. Of
            int8 the error is measured on up to 64 of the images before the first row is filed, and said.
        precision: of the arithmetic: fp32, tf32, bf16 or fp16.
        device: auto, cpu, cuda or cuda:1.
        batch_size: images a pass; part of the profile, not of the key. Default: that of stored rows of the same set,
            else 32 on a CPU and 256 on a GPU, where that of a new set is halved, which is noted, until memory has room.
        compile: whether the trunk runs as compiled code, up to twice as fast, which takes up to a minute to make: it
            pays for thousands of images. Part of the profile, not of the key. Default: as stored rows of the same set
            were computed, else not.
        workers: threads that read and decode; 0 for none; more than four of them for many images are processes.
            Default: one a processor, up to 8; as processes, one a processor but for one.
        progress: shows on stderr how it goes - on a terminal or in a notebook by a bar, else by a line every 30 seconds
            - and at the end what its time went into.
        on_progress: called about once a second and at the end, in the caller's thread (with an `engine`, when a piece
            has been computed). An error in it ends the job, as others do, after filing what is done.
        shard: of several jobs with the same arguments the one that this is, each of which computes its own images:
            ``i/n``, or where that is told by the environment ``slurm``, ``kubernetes/n`` or ``torchrun``. Any number of
            them, and another one next time, leaves the rows of one job; none waits for another. The device is as given,
            and so are torch's threads.
        engine: actors of a Ray cluster that compute it, ``Ray(actors=8, gpus_per_actor=1)``; default: this process.

    Raises:
        ImageError: with `raise`, for an image that can't be read, decoded or rendered.
        ModelError: for a model that can't be keyed, isn't a function of one image, or is to be compiled and can't be.
        FactsDifferError: if the model computes other values than the rows already stored, or is changed meanwhile: then
            nothing is filed of what was computed since the last part.
        FeatureStoreError: for values the storage type can't hold: with `raise`, too large or no numbers; all of them
            too small. For more than `max_errors` images that fail. For memory without room for a pass of the size that
            rows of the set have, or that jobs share.
        OSError: as the disk gave it.
    """
    started = time.perf_counter()
    if engine is None:
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
    return run_plan(
        planned,
        store,
        on_error=on_error,
        max_errors=max_errors,
        doubtful=doubtful,
        device=device,
        batch_size=batch_size,
        compile=compile,
        workers=workers,
        progress=progress,
        on_progress=on_progress,
        started=started,
        engine=engine,
    )


def run_plan(
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
    progress: bool = False,
    on_progress: Callable[[ProgressReport], None] | None = None,
    started: float | None = None,
    engine: Ray | None = None,
) -> ExtractReport:
    """Carries out a plan; arguments, result and errors as in `extract`.

    The model must still be what it was when the plan was made: FactsDifferError if it isn't. With nothing to compute
    that is all that is asked of it: its key is that of the stored rows, and that they were computed by a function of
    one image was checked then.
    """
    started = time.perf_counter() if started is None else started
    if engine is None:  # whose actors have devices and compilers of their own
        choose_device(device)
        check_can_compile(compile, device)
    check_batch_size(batch_size)
    check_workers(workers)
    check_max_errors(max_errors, on_error)
    refuse_unreadable(planned, on_error)
    with timed("key"):
        refuse_changed(planned)
    try:
        filed = Filed.nothing(planned)
        Failing(planned, max_errors).check(filed)
        if not planned.is_to_read.any():
            notes = _noted_images(planned, store, is_needed=bool(planned.is_missing.any()))
        elif engine is not None:
            planned.images.contents.clear()  # which no actor has
            notes = _noted_images(planned, store, is_needed=True)
            filed = run_by_ray(
                engine,
                planned,
                store,
                on_error=on_error,
                max_errors=max_errors,
                doubtful=doubtful,
                device=device,
                batch_size=batch_size,
                compile=compile,
                workers=workers,
                progress=progress,
                on_progress=on_progress,
            )
            notes += _ended(planned, store, filed, progress)
        else:
            session = open_plan(
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
            with session:
                notes = _noted_images(planned, store, is_needed=True)  # before the first row: it stays if we are killed
                if progress:
                    for note in session.notes():
                        logger_of("featstore").info("%s", note)
                filed = session.run(progress=progress, on_progress=on_progress)
            notes += _ended(planned, store, filed, progress)
    except TooManyFailedError as error:
        reported = write_report(planned, store, failures(planned, error.filed or filed))
        raise TooManyFailedError(" ".join([str(error), *(f"{note}." for note in reported)]), error.filed) from error
    finally:
        planned.images.contents.clear()
    return _reported(planned, store, filed, notes, started)


def finish(
    planned: Plan,
    store: FeatureStore,
    pieces: Iterable[Filed],
    *,
    progress: bool = False,
    started: float | None = None,
) -> ExtractReport:
    """Brings together what sessions have filed of a plan, in other processes too: their parts are merged.

    Args:
        planned: the plan.
        store: where the rows are; gets the image table.
        pieces: what each `Session.run` returned.
        progress: says what is merged, on stderr.
        started: `time.perf_counter()` then; default: now.

    Raises:
        FactsDifferError: where another job has written rows of other pixels or arithmetic meanwhile.
    """
    started = time.perf_counter() if started is None else started
    filed = Filed.together(planned, pieces)
    notes = _noted_images(planned, store, is_needed=True) + _ended(planned, store, filed, progress)
    return _reported(planned, store, filed, notes, started)


def _ended(planned: Plan, store: FeatureStore, filed: Filed, is_shown: bool) -> list[str]:
    """Looks once more whether all rows go together, and merges the parts; what its owner should know."""
    refuse_contradictions(planned, store, filed)
    return [*filed.notes(planned), *merge_parts(planned, store, filed, is_shown=is_shown)]


def _reported(planned: Plan, store: FeatureStore, filed: Filed, notes: Sequence[str], started: float) -> ExtractReport:
    """What was done; what was left out is reported beside the store as well."""
    left_out = failures(planned, filed)
    notes = [*notes, *write_report(planned, store, left_out)]
    is_undecoded = is_among(planned.digests.values, digest_rows(filed.failures))
    is_undecoded |= planned.is_owned & planned.digests.is_failed
    is_unread = is_among(planned.digests.values, digest_rows(filed.unread)) & ~is_undecoded
    is_unfit = [
        each.is_missing & is_among(planned.digests.values, digest_rows(unfit))
        for each, unfit in zip(planned.sets, filed.unfit, strict=True)
    ]
    first = _first_of_content(planned)
    is_lacking = np.zeros(len(planned.images), bool)
    sets: list[dict[str, Json]] = []
    for each, unfit, has_row, computed in zip(planned.sets, is_unfit, filed.has_row, filed.computed, strict=True):
        has_first = np.zeros(len(first), bool)
        has_first[first[has_row]] = True
        is_filed = each.is_missing & has_first[first]
        reused = int((each.is_wanted & ~each.is_missing).sum())
        is_failed = is_undecoded | unfit
        is_lacking |= each.is_missing & ~is_failed & ~is_filed
        sets.append(
            {
                "key": each.spec.key,
                "backbone": each.source.model.name,
                "cut": each.cut,
                "reduce": each.spec.reduction,
                "view": "evaluation" if each.view.policy is None else each.view.policy.label,
                "seed": each.view.seed,
                "rows": reused + int(is_filed.sum()),
                "computed": computed,
                "reused": reused,
                "failed": int((each.is_missing & is_failed & ~planned.is_absent).sum()),
            }
        )
    num_left = int((is_lacking & ~is_unread).sum())
    if num_left:
        why = "the run was stopped" if filed.is_stopped else "no run was given them"
        notes.append(f"{counted(num_left, 'image')} not computed, since {why}: run it again")
    is_failed = np.logical_or.reduce([is_undecoded, *is_unfit])
    reasons = {each.image: each.reason for each in reversed(left_out)}  # of one with several the first
    return ExtractReport(
        computed=sum(filed.computed),
        reused=sum(each["reused"] for each in sets),
        failed=int((is_failed & ~planned.is_absent).sum()),
        missing=int((is_lacking | is_unread | planned.is_absent).sum()),
        seconds=time.perf_counter() - started,
        keys=tuple(each.spec.key for each in planned.sets),
        sets=tuple(sets),
        failures=tuple(reversed(reasons.items())),
        notes=tuple(notes),
        doubts=tuple(filed.doubts.items()),
        shard=planned.shard,
        rates=filed.rates,
    )


def _first_of_content(planned: Plan) -> NDArray[np.int64]:
    """``(N,)``: of each image the place of the first one of equal content, which may be its own."""
    first = np.arange(len(planned.images))
    for place, places in planned.copies.items():
        first[place] = places[0]
    return first


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
