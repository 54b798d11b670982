"""Ray: a plan computed by actors of a Ray cluster, each with a session of its own, that are dealt images in pieces.

Rows never pass through Ray: an actor writes parts of its own into the store, which all nodes reach under one path, and
sends back what came of a piece (`Filed`). So a piece may be computed twice: of equal rows the store takes one.
"""

from __future__ import annotations

import logging
import os
import pickle
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from featstore.digest import Json
from featstore.errors import Doubtful, FactsDifferError, FeatureStoreError, ImageError, OnError
from featstore.extraction.failures import Failing
from featstore.extraction.filed import Filed
from featstore.extraction.job import Session
from featstore.extraction.opening import open_plan
from featstore.extraction.plan import Plan
from featstore.extraction.progress import Progress, ProgressReport
from featstore.images.pixel_digest import pixel_digest
from featstore.images.sources import ArraySource
from featstore.machine import keep_freed_memory
from featstore.models import own_file
from featstore.models.names import Precision
from featstore.models.probe import TOLERANCES, Probe
from featstore.models.trunk import check_batch_size, default_batch_size
from featstore.notes import logger_of
from featstore.store.sets import batching_for
from featstore.store.store import FeatureStore
from featstore.words import counted

PIECES_AN_ACTOR = 8
"""So many at least, where there are images for them: who ends last keeps the others waiting."""

MOST_PASSES = 16
"""Of one piece: what is computed again when an actor ends."""

MOST_ENDED = 2
"""Actors that end at one piece before it is halved, or, with a single image, given up."""

MOST_STARTS = 3
"""Actors that end one after another while they open the plan before it is given up."""

SECONDS_TO_END = 8.0
"""A job that fails or is interrupted waits so long for actors to file what they have computed."""

SECONDS_TO_BE_PLACED = 30.0
"""After so many without any actor it is said what they wait for."""


@dataclass(frozen=True, kw_only=True)
class Ray:
    """Actors of a Ray cluster that share an extraction. Needs the extra ``ray``.

    Attributes:
        actors: how many.
        gpus_per_actor: of each, as Ray counts them; with 0 they compute on processors.
        address: of the cluster, such as ``auto`` or ``ray://head:10001``; None takes the one that this process has
            joined, or starts one on this machine.
    """

    actors: int
    gpus_per_actor: float = 0
    address: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.actors, int) or isinstance(self.actors, bool) or self.actors < 1:
            raise ValueError(f"actors is {self.actors!r}; expected a number of actors, 1 or more.")
        if not self.gpus_per_actor >= 0:
            raise ValueError(f"gpus_per_actor is {self.gpus_per_actor!r}; expected 0, a share of a GPU, or more.")


def run_by_ray(
    engine: Ray,
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
) -> Filed:
    """Computes what is missing of a plan, by actors. Arguments are those of `extract`; `workers` are of each actor.

    An actor that ends takes nothing with it but the piece that it was at, which another one computes. A piece at which
    two have ended is halved, until the image is known: it has failed, and the next run tries it again.

    Raises:
        ModuleNotFoundError: without Ray.
        ValueError: for a cluster that hasn't so many GPUs, and a store that actors can't reach.
        FactsDifferError: where actors don't compute alike: they have other GPUs, or another torch.
        FeatureStoreError: where actors can't open the plan.
        ImageError, TooManyFailedError: as `Session.run`.
    """
    check_batch_size(batch_size)
    chosen = _device(engine, device)
    if str(store.folder).startswith("memory://"):
        raise ValueError(f"{store.folder} lies in this process, where no actor reaches it. Take another store for Ray.")
    rows = np.flatnonzero(planned.is_to_read).tolist()
    pieces = deque(_dealt(rows, engine.actors, _batch_size(planned, chosen, batch_size)))
    failing, filed = Failing(planned, max_errors), Filed.nothing(planned)
    failing.check(filed)
    with joined(engine) as ray, Progress(len(rows), is_shown=progress, on_progress=on_progress) as shown:
        num_processors = _processors_each(ray, engine)
        threads = max(1, int(num_processors))
        told = _Told(
            folder=os.getcwd(),
            sources=_sources(planned),
            planned=_pickled(planned),
            store=str(store.folder),
            options={
                "on_error": on_error,
                "doubtful": doubtful,
                "device": chosen,
                "batch_size": batch_size,
                "compile": compile,
                "workers": threads if workers is None else workers,
                "is_alone": False,
            },
            threads=threads,
        )
        crew = _Crew(ray, engine, num_processors, told)
        try:
            while pieces or crew.is_busy:
                crew.start(len(pieces))
                crew.give(pieces)
                found = crew.next_answer()
                if found is None:
                    continue
                done, answer = found
                if isinstance(answer, Exception):
                    raise answer
                if answer is None:  # the actor has ended
                    pieces.extendleft(reversed(done.halves()))
                    if done.is_given_up:
                        answer = _given_up(planned, done.rows[0], on_error)
                if answer is not None:
                    filed.add(answer)
                    failing.add_all(answer)
                    failing.check(filed)
                    for _ in done.rows:
                        shown.step(filed)
        finally:
            crew.end()
    shown.end(filed)
    return filed


@dataclass(frozen=True, kw_only=True)
class _Told:
    """What an actor is told.

    Attributes:
        folder: the driver's, where relative paths start.
        sources: ``path/to/file.py:function`` of models that files make, whose classes are known once that is loaded.
        planned: the plan, pickled.
        store: path or address of the store.
        options: of `open_plan`.
        threads: of torch's.
    """

    folder: str
    sources: tuple[str, ...]
    planned: bytes
    store: str
    options: dict[str, Any]
    threads: int


@dataclass(frozen=True, kw_only=True)
class _Means:
    """By what an actor computes the rows of one set.

    Attributes:
        name: of the set.
        precision: of its arithmetic.
        profile: of its trunk.
        pixels: what its decoders give; None where images are arrays.
        probe: what its trunk gives.
    """

    name: str
    precision: Precision
    profile: Json
    pixels: str | None
    probe: Probe

    def differences(self, first: _Means) -> Iterator[str]:
        """Why these aren't those of the first actor, in words."""
        for name in {**self.profile, **first.profile}:
            if self.profile.get(name) != first.profile.get(name):
                yield f"{name} {self.profile.get(name)}, expected {first.profile.get(name)} as of the first"
        if self.pixels != first.pixels:
            yield (
                f"its decoders give the sample files pixels of the digest {str(self.pixels)[:8]}, expected "
                f"{str(first.pixels)[:8]} as of the first (featstore doctor tells which decoders are there)"
            )
        difference, allowed = first.probe.difference(self.probe), TOLERANCES[self.precision]
        if not difference <= allowed:
            yield (
                f"on the probe images {self.name} differs by {difference:.2g} of the largest value from the first; "
                f"{self.precision} allows {allowed:g}"
            )


def _means(session: Session) -> list[_Means]:
    planned = session.planned
    is_decoded = not isinstance(planned.images.source, ArraySource)
    return [
        _Means(
            name=f"set {each.spec.key[:8]} ({each.cut} {each.spec.reduction})",
            precision=each.spec.precision,
            profile=opened.trunk.profile(),
            pixels=pixel_digest(each.view.decode) if is_decoded else None,
            probe=opened.probes[each.output],
        )
        for opened in session.opened
        for each in (planned.sets[place] for place in opened.places)
    ]


class _Worker:
    """What runs as an actor."""

    _session: Session

    def open(self, told: _Told) -> list[_Means] | Exception:
        """Opens the plan: by what its rows are computed, of each set; or the error, which Ray would wrap."""
        try:
            with suppress(FileNotFoundError):  # which only relative paths need
                os.chdir(told.folder)
            keep_freed_memory()
            torch.set_num_threads(told.threads)  # else as many as Ray says, by OMP_NUM_THREADS
            for source in told.sources:
                own_file.load(source)
            self._session = open_plan(_unpickled(told.planned), FeatureStore(told.store), **told.options)
            return _means(self._session)
        except Exception as error:
            return error

    def run(self, rows: list[int]) -> Filed | Exception:
        """What came of the images; or the error."""
        try:
            return self._session.run(rows)
        except Exception as error:
            return error

    def stop(self) -> None:
        """Ends the run under way, beside it: what is computed is filed."""
        self._session.stop()


@dataclass(frozen=True)
class _Piece:
    """Images for one actor; `num_ended` actors have ended at them."""

    rows: list[int]
    num_ended: int = 0

    @property
    def is_given_up(self) -> bool:
        """Whether, of a piece at which one more has ended, no more is to be tried."""
        return len(self.rows) == 1 and self.num_ended + 1 >= MOST_ENDED

    def halves(self) -> list[_Piece]:
        """What to try next of a piece at which one more has ended."""
        if self.is_given_up:
            return []
        if self.num_ended + 1 < MOST_ENDED:
            return [_Piece(self.rows, self.num_ended + 1)]
        middle = len(self.rows) // 2
        halves = self.rows[:middle], self.rows[middle:]
        return [_Piece(each, MOST_ENDED - 1 if len(each) > 1 else 0) for each in halves]


class _Crew:
    """The actors, and what each is at."""

    def __init__(self, ray: Any, engine: Ray, num_processors: float, told: _Told) -> None:
        self._ray, self._engine = ray, engine
        self._class = ray.remote(_Worker).options(
            num_cpus=num_processors,
            num_gpus=engine.gpus_per_actor,
            max_restarts=0,
            max_task_retries=0,
            max_concurrency=2,  # `stop` comes beside `run`
        )
        self._wanted = {"CPU": num_processors, "GPU": engine.gpus_per_actor}
        self._told = ray.put(told)
        self._idle: list[Any] = []
        self._opening: dict[Any, Any] = {}  # answer to come -> actor
        self._computing: dict[Any, tuple[Any, _Piece]] = {}
        self._first: list[_Means] | None = None
        self._num_failed = 0

    @property
    def is_busy(self) -> bool:
        """Whether a piece is being computed."""
        return bool(self._computing)

    def start(self, num_pieces: int) -> None:
        """Starts actors in the place of those that have ended, as far as there are pieces for them."""
        num_actors = len(self._idle) + len(self._opening) + len(self._computing)
        for _ in range(min(self._engine.actors, len(self._computing) + num_pieces) - num_actors):
            actor = self._class.remote()
            self._opening[actor.open.remote(self._told)] = actor

    def give(self, pieces: deque[_Piece]) -> None:
        """Gives each actor that waits a piece."""
        while pieces and self._idle:
            actor, piece = self._idle.pop(), pieces.popleft()
            self._computing[actor.run.remote(piece.rows)] = actor, piece

    def next_answer(self) -> tuple[_Piece, Filed | Exception | None] | None:
        """A piece, and what came of it, which is None where the actor ended at it; None where an actor is ready now.

        Raises:
            FactsDifferError: for an actor that computes on something else than the others.
            FeatureStoreError: for actors that can't open the plan, or end before they have.
        """
        reference = self._next()
        try:
            answer = self._ray.get(reference)
        except self._ray.exceptions.RayError as error:
            if reference in self._computing:
                return self._computing.pop(reference)[1], None
            del self._opening[reference]
            self._num_failed += 1
            if self._num_failed >= MOST_STARTS:
                raise FeatureStoreError(
                    f"{self._num_failed} actors of Ray ended one after another while they opened the plan ({error}). "
                    "Expected them to live. Look into Ray's logs; memory may be short: use fewer actors."
                ) from error
            return None
        if reference in self._computing:
            actor, piece = self._computing.pop(reference)
            self._idle.append(actor)
            return piece, answer
        self._idle.append(self._opening.pop(reference))
        self._num_failed = 0
        if isinstance(answer, Exception):
            raise answer
        self._check_alike(answer)
        return None

    def _next(self) -> Any:
        """The next answer that has come; says it where none comes since no actor finds a place."""
        while True:
            patience = SECONDS_TO_BE_PLACED if self._opening and not self._computing else None
            answers, _ = self._ray.wait([*self._opening, *self._computing], num_returns=1, timeout=patience)
            if answers:
                return answers[0]
            logger_of("featstore").info(
                "%s of Ray not ready yet. Each wants %s; free in the cluster: %s",
                counted(len(self._opening), "actor"),
                self._wanted,
                self._ray.available_resources(),
            )

    def _check_alike(self, means: list[_Means]) -> None:
        if self._first is None:
            self._first = means
        found = {
            difference: None
            for mine, first in zip(means, self._first, strict=True)
            for difference in mine.differences(first)
        }
        if found:
            raise FactsDifferError(
                f"An actor of Ray doesn't compute as the others do: {'; '.join(found)}. One feature set has rows of "
                "one kind of machine. Let the job have nodes of one kind alone, and continue it with the same command."
            )

    def end(self) -> None:
        """Ends all actors; those that compute file what they have first."""
        references = [*self._computing]
        if references:
            for actor, _ in self._computing.values():
                actor.stop.remote()
            self._ray.wait(references, num_returns=len(references), timeout=SECONDS_TO_END)
        for actor in (*self._idle, *self._opening.values(), *(actor for actor, _ in self._computing.values())):
            with suppress(Exception):  # it has ended
                self._ray.kill(actor)


_REPORTS = "RAY_USAGE_STATS_ENABLED"


@contextmanager
def joined(engine: Ray) -> Iterator[Any]:
    """Ray, with a cluster; one that is started here ends here."""
    try:
        import ray
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        raise ModuleNotFoundError(
            "The engine ray needs Ray, which isn't installed. Run pip install 'featstore[ray]'.", name="ray"
        ) from error
    if ray.is_initialized():
        yield ray
        return
    # Ray takes the handler of SIGTERM for its own, which ends the process where nothing is filed.
    is_main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGTERM)
    said = os.environ.get(_REPORTS)
    os.environ.setdefault(_REPORTS, "0")  # a cluster of this machine reports to nobody
    try:
        ray.init(address=engine.address, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    finally:
        if said is None:
            del os.environ[_REPORTS]
    try:
        if is_main and handler is not None:
            signal.signal(signal.SIGTERM, handler)
        yield ray
    finally:
        ray.shutdown()


def _processors_each(ray: Any, engine: Ray) -> float:
    """Of each actor: as many as leave room for all of them on the cluster's nodes; shares of one where need be."""
    nodes = [each["Resources"] for each in ray.nodes() if each["Alive"]]
    num_gpus = sum(each.get("GPU", 0) for each in nodes)
    if engine.gpus_per_actor and _num_placed(nodes, 0, engine.gpus_per_actor) < engine.actors:
        raise ValueError(
            f"{engine.actors} actors with {engine.gpus_per_actor:g} GPUs each want more than the {num_gpus:g} that the "
            "cluster has. Expected as many at most. Use fewer actors, or a smaller share for each."
        )
    most = int(max((each.get("CPU", 0) for each in nodes), default=0))
    shares = [*map(float, range(most, 0, -1)), *(1 / part for part in range(2, 65))]
    return next((each for each in shares if _num_placed(nodes, each, engine.gpus_per_actor) >= engine.actors), 0.0)


def _num_placed(nodes: Sequence[Mapping[str, float]], processors: float, gpus: float) -> int:
    """How many actors find a place, each on one node."""
    wanted = {name: share for name, share in (("CPU", processors), ("GPU", gpus)) if share}
    return sum(min(int(node.get(name, 0) / share + 1e-6) for name, share in wanted.items()) for node in nodes)


def _device(engine: Ray, device: torch.device | str) -> torch.device:
    """Where actors compute: Ray gives each its GPUs, and those without any see none."""
    kind = str(device).partition(":")[0]
    if kind not in ("auto", "cpu", "cuda") or (kind == "cpu" and engine.gpus_per_actor):
        raise ValueError(
            f"device is {device}, and actors have {engine.gpus_per_actor:g} GPUs each. Leave the device out."
        )
    if kind == "cuda" and not engine.gpus_per_actor:
        raise ValueError(f"device is {device}, and actors have no GPUs. Give them some: gpus_per_actor=1.")
    return torch.device("cuda" if engine.gpus_per_actor else "cpu")


def _batch_size(planned: Plan, device: torch.device, batch_size: int | None) -> int:
    stored = [each.stored for each in planned.sets]
    return batching_for(stored, device.type, batch_size).batch_size or default_batch_size(device)


def _dealt(rows: Sequence[int], num_actors: int, batch_size: int) -> Iterator[_Piece]:
    """Pieces of whole passes, in order."""
    passes = len(rows) // (batch_size * num_actors * PIECES_AN_ACTOR)
    size = batch_size * min(MOST_PASSES, max(1, passes))
    for start in range(0, len(rows), size):
        yield _Piece(list(rows[start : start + size]))


def _given_up(planned: Plan, index: int, on_error: OnError) -> Filed:
    """An image at which actors end has failed."""
    image, reason = planned.images.ids[index], "the process that computed it ended each time, by a crash or for memory"
    if on_error == "raise":
        raise ImageError(image, reason)
    filed = Filed.nothing(planned)
    filed.unread[planned.digests.values[index].tobytes().hex()] = image, reason
    return filed


def _sources(planned: Plan) -> tuple[str, ...]:
    made = [source.model.origin.get("architecture") for source in planned.models]
    return tuple(f"{each['file']}:{each['function']}" for each in made if isinstance(each, dict) and "file" in each)


def _pickled(planned: Plan) -> bytes:
    try:
        return pickle.dumps(planned)
    except Exception as error:
        raise FeatureStoreError(
            f"What is to be computed can't be told to Ray's actors ({type(error).__name__}: {error}). Expected models, "
            "policies and image sources of modules that can be imported. Put what you have defined in a script or a "
            "notebook into a file."
        ) from error


def _unpickled(planned: bytes) -> Plan:
    try:
        plan: Plan = pickle.loads(planned)
    except (AttributeError, ImportError) as error:
        raise FeatureStoreError(
            f"Ray's actors can't load what is to be computed ({error}). Expected models, policies and image sources of "
            "modules that each node can import, and files of models that are the same on each. Put what you have "
            "defined in a script or a notebook into a file."
        ) from error
    return plan
