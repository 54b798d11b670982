"""Session: what computes the images of a plan; and Job, one run of it over some of them, from views to parts.

Long, since a run is one thing told in order: views come, fill passes, whose rows are gathered and written.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass, field
from functools import cached_property
from itertools import cycle, islice

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from featstore.errors import Doubtful, FactsDifferError, FeatureStoreError, ImageError, OnError
from featstore.extraction.failures import Failing
from featstore.extraction.filed import Filed, refuse_contradiction
from featstore.extraction.narrowing import Narrowed, Narrowing
from featstore.extraction.opened import Input, Opened
from featstore.extraction.pixels import StoredPixels
from featstore.extraction.plan import Plan, PlannedSet
from featstore.extraction.progress import Progress, ProgressReport
from featstore.extraction.rates import Rates, StageName, StageRate
from featstore.images.processes import CannotShareError, Renderers
from featstore.images.render import Job as ImageJob
from featstore.images.render import Rendered, default_threads, render
from featstore.images.views import View
from featstore.models.trunk import Output
from featstore.store.gathering import PART_BYTES, Gathered
from featstore.store.store import FeatureStore
from featstore.words import counted

COMMIT_BYTES = PART_BYTES
COMMIT_SECONDS = 60.0
"""A part is written when this much has been gathered, or this long after the last one."""


@dataclass(kw_only=True, eq=False)
class Session:
    """What computes the images of a plan, one run at a time. Made by `open_plan`; close it, or use it in a `with`.

    Several sessions, in other processes and on other machines too, may run pieces of one plan at once.

    Attributes:
        planned: the plan.
        store: where rows go.
        opened: the models that lack rows, one several times where its sets were computed in passes of several kinds.
        inputs: distinct ones of their sets.
        input_of: set -> the place of its input, of each set of theirs.
        is_needed: ``(I, N)``, for each input the images to compute: those without a row in some set, each content once.
        stored: the pixels of their views, as far as the store has them.
        has_pixels: ``(N,)``, images of which all needed views are there: they are read instead of decoded.
        on_error: as in `extract`.
        max_errors: as in `extract`, of each run.
        doubtful: as in `extract`.
        workers: as in `extract`.
        ahead: how many images are read and rendered ahead of the passes.
        renderers: processes that render, where there are some; else threads do, of each run.
        running: held by the run under way.
        stopping: set where that is to end.
        agreed: places of the sets whose first part goes with those that others wrote meanwhile.
    """

    planned: Plan
    store: FeatureStore
    opened: list[Opened]
    inputs: list[Input]
    input_of: dict[int, int]
    is_needed: NDArray[np.bool_]
    stored: StoredPixels
    has_pixels: NDArray[np.bool_]
    on_error: OnError
    max_errors: int | None
    doubtful: Doubtful
    workers: int | None
    ahead: int
    renderers: Renderers | None
    running: threading.Lock = field(default_factory=threading.Lock)
    stopping: threading.Event = field(default_factory=threading.Event)
    agreed: set[int] = field(default_factory=set)

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.planned.images.contents.clear()
        self.close()

    def notes(self) -> list[str]:
        """What its owner should know before the first row."""
        notes = [each.lowering.note for each in self.opened if each.lowering.note is not None]
        notes += [f"{each.planned.model.name} runs as compiled code" for each in self.opened if each.compile_seconds]
        notes += [
            rounding.note(each.planned.model.name, output, self.planned.sets[each.places[0]].spec.dtype)
            for each in self.opened
            for output, rounding in each.roundings.items()
        ]
        num_stored = int((self.is_needed.any(axis=0) & self.has_pixels).sum())
        if not num_stored:
            return notes
        keys = ", ".join(each.key[:8] for each in self.stored.sets.values())
        return [*notes, f"{counted(num_stored, 'image')} read as stored pixels (set {keys}), not decoded"]

    @property
    def device(self) -> torch.device:
        """What passes run on; the GPU where some do."""
        return max((each.trunk.device for each in self.opened), key=lambda device: device.type == "cuda")

    def stop(self) -> None:
        """Has the run under way, in another thread, end after the image at hand; what is computed is filed.

        It ends one run: that, or where none is under way the next one, which may be about to begin.
        """
        self.stopping.set()

    def close(self) -> None:
        """Ends the processes that render."""
        if self.renderers is not None:
            self.renderers.close()
            self.renderers = None

    def run(
        self,
        rows: Iterable[int] | None = None,
        *,
        progress: bool = False,
        on_progress: Callable[[ProgressReport], None] | None = None,
    ) -> Filed:
        """Computes images and files them in parts of its own, also when it ends in an error.

        Args:
            rows: places among the plan's images; default: all of them. Those that need nothing are passed over, so any
                way to deal them out gives the same rows; each content is computed where it is met first in the plan.
            progress: as in `extract`.
            on_progress: as in `extract`.

        Raises:
            ImageError: with `on_error="raise"`, for an image that can't be read, decoded or rendered.
            TooManyFailedError: for more than `max_errors` of these images that fail; it has what was filed.
            FactsDifferError: if the model was changed meanwhile; nothing of it is filed since the last part. If another
                job has begun a set meanwhile, with other pixels or arithmetic; nothing is filed of that set.
            FeatureStoreError: for values that the storage type can't hold, with `on_error="raise"`.
            OSError: as the disk gave it.
        """
        is_asked = np.full(len(self.planned.images), rows is None)
        if rows is not None:
            if isinstance(rows, np.ndarray) and rows.dtype == bool:
                raise TypeError("rows are places, not a mask; give np.flatnonzero(mask).")
            is_asked[np.fromiter(rows, np.int64)] = True
        is_needed = self.is_needed & is_asked
        failing = Failing(self.planned, self.max_errors, is_asked)
        failing.check(Filed.nothing(self.planned))
        with self.running:
            progressing = Progress(
                int(is_needed.any(axis=0).sum()),
                is_shown=progress,
                on_progress=on_progress,
                rates=Rates(self._an_image(is_needed)),
                device=self.device,
            )
            try:
                return Job(self, is_needed, failing, progressing).run()
            finally:  # within the lock: both are of this run, not of one that waits for it
                self.stopping.clear()
                if self.renderers is not None and not self.renderers.is_idle:  # ended by an error
                    self.close()

    def rehearse(self, rows: NDArray[np.int64], *, passed: int, num_rows: Sequence[int]) -> tuple[StageRate, ...]:
        """What each stage does alone, with some of the plan's images: see `Job.rehearse`. Its rows go where `run`'s go.

        Args:
            rows: places among the plan's images.
            passed: as in `Job.rehearse`.
            num_rows: as in `Job.rehearse`.
        """
        is_needed = self.is_needed & np.isin(np.arange(len(self.planned.images)), rows)
        progress = Progress(len(rows), is_shown=False, rates=Rates(self._an_image(is_needed)))
        Job(self, is_needed, Failing(self.planned, None), progress).rehearse(passed=passed, num_rows=num_rows)
        return progress.rates.since(progress.rates.start)

    def _an_image(self, is_needed: NDArray[np.bool_]) -> dict[StageName, float]:
        """How many views of all models, and rows of all sets, are computed of an image, on average."""
        sets = [(self.planned.sets[place], is_needed[given]) for place, given in self.input_of.items()]
        num_rows = sum(int((each.is_missing & needed).sum()) for each, needed in sets)
        num_images = max(1, int(is_needed.any(axis=0).sum()))
        return {"forward": int(is_needed.sum()) / num_images, "write": num_rows / num_images}


class Job:
    """One run over some images of a session's plan.

    Three things go on at once: threads render views, the device computes a pass, and a thread writes a part. Rows of
    a pass are gathered after the model's next one has been launched, so that a GPU never waits for them; the batch of
    that one is copied to it meanwhile.

    Args:
        session: whose trunks compute.
        is_needed: ``(I, N)``, for each input the images to compute.
        failing: counts those of its images that fail.
        progress: is told how it goes, and how long each stage is busy.
    """

    def __init__(self, session: Session, is_needed: NDArray[np.bool_], failing: Failing, progress: Progress) -> None:
        self.session, self.planned = session, session.planned
        self.is_needed, self.failing, self.progress = is_needed, failing, progress
        # Jobs whose views, for those places among the session's inputs, are on their way; they come back in order.
        self.drawn: deque[tuple[ImageJob, list[int]]] = deque()
        self.gathered = [self._nothing(each) for each in self.planned.sets]
        self.batches: list[list[_Item]] = [[] for _ in session.opened]  # of each model those that wait for a pass
        self.launched: list[_Launched | None] = [None for _ in session.opened]
        self.writer = ThreadPoolExecutor(1, thread_name_prefix="featstore-write")
        self.writing: Future[None] | None = None
        self.lot = self._all_nothing()  # what the writer has, as far as it isn't written
        self.filed = Filed.nothing(self.planned)
        self.refused: dict[int, FactsDifferError] = {}  # sets of which no more is written
        self.last_commit = time.monotonic()

    def run(self) -> Filed:
        """Computes what is missing; files what is done also when it ends in an error."""
        rendered = self.rendered()
        try:
            with self.progress, closing(rendered):
                for each in rendered:
                    self._take(each)
                    self._launch_full()
                    self.progress.step(self.filed)
                    self.filed.is_stopped = self.session.stopping.is_set()
                    if self.failing.are_too_many or self.refused or self.filed.is_stopped:
                        break
                self._launch_rest()
        except ImageError:
            self._launch_rest()  # what is decoded already needn't be read again by the next run
            raise
        finally:
            with self.writer:
                try:
                    self._gather_rest()
                finally:
                    try:
                        self._commit_rest()
                    except KeyboardInterrupt:  # which may have come while it waited
                        self._commit_rest()
                        raise
        for error in self.refused.values():
            raise error
        self.filed.said = [*self.session.notes(), *self.filed.said]
        self.filed.rates = self.progress.rates.since(self.progress.rates.start)
        self.failing.check(self.filed)
        self.progress.end(self.filed)
        return self.filed

    def rehearse(self, *, passed: int, num_rows: Sequence[int]) -> None:
        """Does one stage after the other, each alone: renders its images, runs the trunks, writes the rows.

        Args:
            passed: images whose views go through the trunks, about: in full passes, and repeated for as many.
            num_rows: of each set, how many are written: those that were computed first, repeated for as many. Beside
                these, rows of one pass of each model are in memory at most.
        """
        num_rendered = 0
        for each in self.rendered():
            self._take(each)
            num_rendered += each.views is not None
        for model, (opened, batch) in enumerate(zip(self.session.opened, self.batches, strict=True)):
            size, views = opened.trunk.batch_size, cycle(batch)
            for _ in range(max(1, passed * len(batch) // (num_rendered * size)) if batch else 0):
                self._launch(model, list(islice(views, size)))
                for place in opened.places:
                    if self.gathered[place].num_rows > num_rows[place]:
                        self.gathered[place] = self.gathered[place].sized(num_rows[place])
        self._gather_rest()
        self._write([gathered.sized(wanted) for gathered, wanted in zip(self.gathered, num_rows, strict=True)])

    def rendered(self) -> Generator[Rendered]:
        """The views of its images: first of those whose pixels are stored, then of the others; each in order."""
        is_wanted = np.logical_or.reduce(self.is_needed)
        is_stored = is_wanted & self.session.has_pixels
        if is_stored.any():
            try:
                for each in self._read(is_stored):
                    yield each
                    is_wanted[each.index] = False
            except (OSError, FeatureStoreError) as error:
                self.drawn.clear()  # of what has not come
                left = int((is_wanted & is_stored).sum())
                self.filed.said.append(
                    f"Stored pixels can't be read ({error}): {counted(left, 'image')} decoded instead"
                )
        if is_wanted.any():
            with closing(self._decoded(is_wanted)) as rendered:
                yield from rendered

    def _read(self, is_stored: NDArray[np.bool_]) -> Generator[Rendered]:
        is_read: dict[View, NDArray[np.bool_]] = {}
        for given, needed in zip(self.session.inputs, self.is_needed, strict=True):
            pixels = given.view.pixels
            is_read[pixels] = is_read.get(pixels, False) | (needed & is_stored)
        wanted = {view: np.flatnonzero(each) for view, each in is_read.items()}
        return self.session.stored.rendered(self._jobs(is_stored), wanted)

    def _decoded(self, is_wanted: NDArray[np.bool_]) -> Generator[Rendered]:
        session, images, rates = self.session, self.planned.images, self.progress.rates
        if session.renderers is not None:
            with suppress(CannotShareError):
                rates.workers, rates.room = session.renderers.count, session.renderers.ahead
                return session.renderers.rendered(images, self._jobs(is_wanted), on_error=session.on_error)
            session.close()
        workers = default_threads() if session.workers is None else session.workers
        rates.workers, rates.room = max(1, workers), max(session.ahead, 2 * workers)
        return render(
            images,
            self._jobs(is_wanted),
            workers=session.workers,
            on_error=session.on_error,
            doubtful=session.doubtful,
            ahead=session.ahead,
        )

    def _jobs(self, is_wanted: NDArray[np.bool_]) -> Iterator[ImageJob]:
        """Drawn by the renderer as it goes, so that memory doesn't grow with the number of images."""
        digests, pixels = self.planned.digests.values, [each.view.pixels for each in self.session.inputs]
        for index in np.flatnonzero(is_wanted).tolist():
            places = [place for place, is_needed in enumerate(self.is_needed[:, index].tolist()) if is_needed]
            views = tuple(dict.fromkeys(pixels[place] for place in places))
            job = ImageJob(index, digests[index].tobytes(), views)
            self.drawn.append((job, places))
            yield job

    def _take(self, rendered: Rendered) -> None:
        """Has the views of an image wait for the passes of those models that need them."""
        self.progress.rates.add_cost(rendered.cost)
        job, places = self.drawn.popleft()
        assert job.index == rendered.index
        if rendered.views is None:
            self._record_failure(job, rendered)
            return
        if rendered.doubt is not None:
            self.filed.doubts[self.planned.images.ids[job.index]] = rendered.doubt
        self.filed.looks[job.index] = rendered.look
        images = dict(zip(job.views, zip(rendered.views, rendered.decoders, strict=True), strict=True))
        for place in places:
            given = self.session.inputs[place]
            item = _Item(job.index, job.digest, place, *images[given.view.pixels])
            self.batches[given.model].append(item)

    def _record_failure(self, job: ImageJob, rendered: Rendered) -> None:
        """Files what would fail again; an image that can't be read now has done nothing to be left out for good."""
        reason, digest = rendered.failure or "", job.digest.hex()
        self.failing.add(job.index, reason)
        if not rendered.is_lasting:
            self.filed.unread[digest] = self.planned.images.ids[job.index], reason
            return
        self.filed.failures[digest] = reason
        for place, each in enumerate(self.planned.sets):
            if each.view.pixels in job.views and each.is_missing[job.index]:
                self._file_failure(place, digest, reason)

    # ---- passes

    def _launch_full(self) -> None:
        """Launches what is full, and files what is due."""
        for model, (opened, batch) in enumerate(zip(self.session.opened, self.batches, strict=True)):
            while len(batch) >= (size := opened.trunk.batch_size):
                self._launch(model, batch[:size])
                del batch[:size]
                self._commit_if_due()
        self._commit_if_due()  # images that failed, too, which fill no pass

    def _launch_rest(self) -> None:
        for model, batch in enumerate(self.batches):
            if batch:
                self._launch(model, batch)
            self.batches[model] = []

    def _launch(self, model: int, items: Sequence[_Item]) -> None:
        """Begins a pass, and gathers the rows of the model's one before it; smaller ones where memory has no room."""
        opened = self.session.opened[model]
        try:
            self._begin(model, items)
            return
        except torch.OutOfMemoryError as error:
            opened.lowering.lower(error)
        # Behind the except clause, since an error keeps what its pass had in memory.
        items = [*self._taken_back(model), *items]
        self.progress.rates.add("forward", -len(items), 0.0)  # which have been counted
        opened.lowering.fitted(opened.judge)
        size = opened.trunk.batch_size
        for start in range(0, len(items), size):
            self._launch(model, items[start : start + size])

    def _begin(self, model: int, items: Sequence[_Item]) -> None:
        opened = self.session.opened[model]
        with self.progress.rates.timing("forward", len(items)):
            images = self._batch(items, opened.trunk.device)
            values = dict(zip(opened.trunk.outputs, opened.trunk(images), strict=True))
            like = {self.planned.sets[place].output: self.planned.sets[place].spec for place in opened.places}
            narrowing = {output: Narrowing(rows, like[output], output.cut) for output, rows in values.items()}
            launched = _Launched(items, narrowing)
            self._gather_launched(model)
            self.launched[model] = launched
            if opened.trunk.device.type == "cpu":  # where a pass is over when it has been called
                self._gather_launched(model)

    def _taken_back(self, model: int) -> Sequence[_Item]:
        """What a pass under way, of a size that has been lowered since, was to compute."""
        launched, self.launched[model] = self.launched[model], None
        return () if launched is None else launched.items

    def _batch(self, items: Sequence[_Item], device: torch.device) -> Tensor:
        first = items[0].image
        is_copied = device.type == "cuda"  # from pinned memory, while the device computes
        batch = torch.empty((len(items), *first.shape), dtype=first.dtype, pin_memory=is_copied)
        into = batch.numpy()  # torch would copy with all its threads, which wait for one another where others work
        for place, item in enumerate(items):
            into[place] = item.image.numpy()
        return self._copied(batch, device) if is_copied else batch

    @cached_property
    def _copying(self) -> torch.cuda.Stream:
        return torch.cuda.Stream(self.session.device)  # type: ignore[no-untyped-call]

    def _copied(self, batch: Tensor, device: torch.device) -> Tensor:
        """On the device, by a stream of its own: a copy in that of the passes would wait for the one under way.

        Nobody keeps the pinned batch: torch gives its memory to another one only when the copy is done.
        """
        passes = torch.cuda.current_stream(device)
        with torch.cuda.stream(self._copying):
            copied = batch.to(device, non_blocking=True)
        passes.wait_stream(self._copying)
        copied.record_stream(passes)  # whose pass reads it after it is freed here
        return copied

    def _gather_rest(self) -> None:
        with self.progress.rates.timing("forward", 0):
            for model in range(len(self.launched)):
                self._gather_launched(model)

    def _gather_launched(self, model: int) -> None:
        """Gathers the rows of a model's pass, once it has computed them."""
        launched = self.launched[model]
        if launched is None:
            return
        found = {output: narrowing.narrowed() for output, narrowing in launched.narrowing.items()}
        self.launched[model] = None  # only now: it is computed again where that takes more memory than there is
        self.session.opened[model].lowering.fix()
        for place in self.session.opened[model].places:
            each, given = self.planned.sets[place], self.session.input_of[place]
            if each.output not in found:
                continue
            places = [
                at for at, item in enumerate(launched.items) if item.given == given and each.is_missing[item.index]
            ]
            if places:
                self._gather(place, launched.items, found[each.output], places)

    def _gather(self, place: int, items: Sequence[_Item], found: Narrowed, places: list[int]) -> None:
        fit = [at for at in places if at not in found.unfit]
        for at in places:
            if at in found.unfit:
                self._record_unfit(place, items[at], found.unfit[at])
        if fit:
            digests = np.frombuffer(b"".join(items[at].digest for at in fit), np.uint8).reshape(-1, 32)
            decoders = np.array([items[at].decoder for at in fit], np.uint8)
            rows = found.rows.clone() if len(fit) == len(found.rows) else found.rows[fit]
            self.gathered[place].add(rows, digests, decoders)  # a copy, which leaves pinned memory free
            self.filed.has_row[place, [items[at].index for at in fit]] = True
        self.filed.computed[place] += len(fit)
        self.filed.num_values[place] += int(found.num_values[fit].sum())
        self.filed.num_lost[place] += int(found.num_lost[fit].sum())

    def _record_unfit(self, place: int, item: _Item, reason: str) -> None:
        """Files, in one set, an image whose row the set can't hold: with other weights or another type it is another.

        Raises:
            FeatureStoreError: unless such images are skipped.
        """
        if self.session.on_error == "raise":
            raise FeatureStoreError(
                f"{self.planned.images.ids[item.index]}: {reason}. Or leave such images out with --on-error skip."
            )
        self.failing.add(item.index, reason)
        self.filed.unfit[place][item.digest.hex()] = reason
        self._file_failure(place, item.digest.hex(), reason)

    def _file_failure(self, place: int, digest: str, reason: str) -> None:
        stored = self.planned.sets[place].stored
        if stored is None or digest not in stored.failed:
            self.gathered[place].failed[digest] = reason

    # ---- parts

    def _commit_if_due(self) -> None:
        size = sum(gathered.num_bytes for gathered in self.gathered)
        is_due = size >= COMMIT_BYTES or time.monotonic() - self.last_commit >= COMMIT_SECONDS
        if is_due and any(gathered.num_bytes or gathered.failed for gathered in self.gathered):
            self._commit()

    def _commit(self) -> None:
        """Has what is gathered written, once what was given before is; two such lots are in memory at most."""
        self._check_model()
        self._wait_for_writing()
        self.lot, self.gathered = self.gathered, self._all_nothing()
        self.writing = self.writer.submit(self._write, self.lot)
        self.last_commit = time.monotonic()

    def _commit_rest(self) -> None:
        """Has all written that isn't, and what could not be once more: an interrupt may have come anywhere.

        The writer does it, behind what it has: no interrupt comes to a thread.
        """
        rest = self.writer.submit(self._write_rest)
        try:
            self._wait_for_writing()
        finally:
            rest.result()

    def _write_rest(self) -> None:
        try:
            self._check_model()
        finally:
            for gathered in (self.lot, self.gathered):
                self._write(gathered)

    def _write(self, gathered: list[Gathered]) -> None:
        for opened in self.session.opened:
            for place in opened.places:
                each, rows = self.planned.sets[place], gathered[place]
                if place in self.refused or (not rows.num_rows and not rows.failed):
                    continue
                with self.progress.rates.timing("write", rows.num_rows, rows.num_bytes):
                    self.filed.parts[place].append(rows.write(self.session.store, opened.facts(each)))
                    gathered[place] = self._nothing(each)  # only now: who ends the job writes what is left
                if rows.num_rows and place not in self.session.agreed:
                    self._compare(place)

    def _compare(self, place: int) -> None:
        """Once, when a set has its first rows: who began it at the same time had nothing to agree with.

        No error is raised here, so that the parts of other sets are written.
        """
        try:
            refuse_contradiction(self.session.store, self.planned.sets[place], self.filed.parts[place])
            self.session.agreed.add(place)
        except FactsDifferError as error:
            self.refused[place] = error

    def _wait_for_writing(self) -> None:
        if self.writing is not None:
            writing, self.writing = self.writing, None
            writing.result()

    def _check_model(self) -> None:
        is_live = any(each.trunk.is_live for each in self.session.opened)
        if not is_live or not any(each.num_rows for each in self.gathered):
            return
        try:
            refuse_changed(self.planned)
        except FeatureStoreError:
            self.gathered = self._all_nothing()  # of nobody knows which weights
            raise

    def _all_nothing(self) -> list[Gathered]:
        return [self._nothing(each) for each in self.planned.sets]

    def _nothing(self, each: PlannedSet) -> Gathered:
        return Gathered(each.spec, each.shape)


def refuse_changed(planned: Plan) -> None:
    """Rows are filed under the digests of the plan, so they must be of those models still."""
    for source, places in planned.models.items():
        model = source.model
        last = max((planned.sets[place].cut for place in places), key=model.index)
        for stage, digest in model.up_to(last).digests().items():
            expected = source.stage_digests[stage]
            if digest != expected:
                raise FactsDifferError(
                    f"{model.name} was changed after the extraction was planned: up to stage {stage} its digest is "
                    f"{digest[:8]}, expected {expected[:8]}. None of what it computes now was filed. "
                    "Plan and extract anew; what is trained while that runs must be a copy: copy.deepcopy(model)."
                )


@dataclass(frozen=True, eq=False)
class _Item:
    """One view of one image on its way to a trunk; `given` is the place of the input among the session's."""

    index: int
    digest: bytes
    given: int
    image: Tensor
    decoder: int


@dataclass(frozen=True, eq=False)
class _Launched:
    """A pass that a device may still be computing."""

    items: Sequence[_Item]
    narrowing: dict[Output, Narrowing]
