"""Rendering: images to uint8 views, read and decoded by threads, delivered in order, each image decoded once."""

from __future__ import annotations

import hashlib
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import NamedTuple, Protocol, get_args

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from featstore.errors import Doubtful, ImageError, OnError, check_choice
from featstore.images.decode import Budget, Decoded, decode
from featstore.images.decoders import REDUCED
from featstore.images.digests import content_digest
from featstore.images.headers import DecodeError, MissingDecoderError
from featstore.images.views import RenderError, View
from featstore.machine import num_processors

MOST_NAMED = 3
"""Of the images that a note is about."""


class Readable(Protocol):
    """Images that can be read by place; an `ImageSet` is one."""

    @property
    def ids(self) -> Sequence[str]:
        """The images' names."""

    def read(self, index: int) -> bytes | NDArray[np.uint8]:
        """The encoded bytes, or the array, of one image; `ImageError` where it can't be read."""


@dataclass(frozen=True)
class Job:
    """One image and the views that are wanted of it.

    Attributes:
        index: its place among the images.
        digest: the SHA-256 of its content, as it was when the work was planned.
        views: in any number; the image is decoded once for all of them.
    """

    index: int
    digest: bytes
    views: tuple[View, ...]


class Cost(NamedTuple):
    """What one image took, by the clock of the thread that rendered it.

    Attributes:
        num_bytes: that were read.
        read_seconds: for reading and digesting them.
        decode_seconds: for decoding and rendering.
        ended: when that was over, as `time.perf_counter` has it, in all processes of a machine.
    """

    num_bytes: int = 0
    read_seconds: float = 0.0
    decode_seconds: float = 0.0
    ended: float = 0.0


NOTHING = Cost()


@dataclass(frozen=True, eq=False)
class Rendered:
    """What became of one job.

    Attributes:
        index: the image's place.
        views: one uint8 `(channels, size, size)` for each view asked for; None after a failure.
        decoders: of each view which decoder read its image, see `featstore.images.decoders.DECODERS`; none after a
            failure. Views of two decode policies may have two.
        failure: why there are no views, without the image's name; None where there are.
        is_lasting: whether every image of this content fails so; False where the content wasn't had: the file has
            vanished, can't be read, or was changed, or there was too little memory.
        doubt: why the image may not look as its owner expects, though it was decoded (see `decode`); of several decodes
            what the first that has one says.
        look: of the first view, if that is an evaluation view: equal pixels, equal numbers; else 0.
        cost: what it took.
    """

    index: int
    views: tuple[Tensor, ...] | None
    decoders: tuple[int, ...]
    failure: str | None
    is_lasting: bool = False
    doubt: str | None = None
    look: int = 0
    cost: Cost = NOTHING


def render(
    images: Readable,
    jobs: Iterable[Job],
    *,
    workers: int | None = None,
    on_error: OnError = "raise",
    doubtful: Doubtful = "note",
    ahead: int = 0,
) -> Generator[Rendered]:
    """The views of each job, in the order of the jobs, which are drawn as they are needed.

    The images that are ahead of the caller have a limit, so memory does not grow with the number of jobs. When the
    iterator is closed, or an image is refused, the images in hand are finished and all threads end.

    Args:
        images: what is rendered.
        jobs: which of the images, and how.
        workers: threads that read, decode and render; 0 does it in the calling thread, with equal results. The default
            is one for each processor that the process may use, up to 8.
        on_error: "raise" stops at the first image that fails; "skip" delivers it with its `failure`.
        doubtful: "refuse" makes a lasting failure of an image with a `doubt`.
        ahead: how many images may wait for the caller; two a worker at least.

    Raises:
        ImageError: with "raise", naming the image: when it can't be read or decoded, is refused as doubtful, is no
            longer the one whose digest the job holds, or a policy fails on it, which is then named too.
    """
    check_choice("on_error", on_error, get_args(OnError))
    check_choice("doubtful", doubtful, get_args(Doubtful))
    check_workers(workers)
    workers = default_threads() if workers is None else workers
    one = partial(rendered_one, images, memory=Budget(), doubtful=doubtful)
    ahead = max(ahead, 2 * workers)
    rendered = _in_threads(one, jobs, workers, ahead) if workers else (one(job) for job in jobs)
    return refusing(rendered, images) if on_error == "raise" else rendered


def decode_for(view: View, data: bytes | NDArray[np.uint8], memory: Budget | None = None) -> Decoded:
    """An image decoded as a view of it asks for; otherwise as `decode`."""
    return decode(data, policy=view.decode, apply_exif=view.apply_exif, resize=view.resize, memory=memory)


def default_threads() -> int:
    """How many threads render where nobody says."""
    return min(8, num_processors())


def check_workers(workers: int | None) -> None:
    """TypeError for what is no number of threads, ValueError for less than none; None is the default."""
    if workers is None:
        return
    if not isinstance(workers, int):
        raise TypeError(f"workers is {workers!r}; expected a number of threads, 0 for the calling thread")
    if workers < 0:
        raise ValueError(f"workers is {workers}; expected 0, for the calling thread, or more")


def doubts_note(doubts: Mapping[str, str]) -> str | None:
    """How many images were decoded with doubts, and what is doubtful about the first; None where there are none.

    Args:
        doubts: image -> reason.
    """
    if not doubts:
        return None
    named = "; ".join(f"{name}: {reason}" for name, reason in islice(doubts.items(), MOST_NAMED))
    words = "1 image was" if len(doubts) == 1 else f"{len(doubts):,} images were"
    return f"{words} decoded with doubts ({named}{'; ...' * (len(doubts) > MOST_NAMED)})"


def _in_threads(
    one: Callable[[Job], Rendered], jobs: Iterable[Job], workers: int, most_ahead: int
) -> Generator[Rendered]:
    # The workers leave torch's thread count alone. torch.set_num_threads(1) in a worker lasts beyond it: measured, the
    # caller keeps its count, but every thread started afterwards gets 1. Nor is it needed: decoding and resizing uint8
    # run in one thread each (wall and processor time equal, with 1 and 2 threads allowed), and so do numpy's copies.
    pool = ThreadPoolExecutor(workers, thread_name_prefix="featstore-render")
    ahead: deque[Future[Rendered]] = deque()
    try:
        for job in jobs:
            ahead.append(pool.submit(one, job))
            if len(ahead) == most_ahead:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def refusing(rendered: Generator[Rendered], images: Readable) -> Generator[Rendered]:
    """`rendered` up to the first image that failed; raises `ImageError` for that."""
    with closing(rendered):
        for each in rendered:
            if each.failure is not None:
                raise ImageError(images.ids[each.index], each.failure)
            yield each


def rendered_one(images: Readable, job: Job, *, memory: Budget, doubtful: Doubtful) -> Rendered:
    """What becomes of one job in this thread; `memory` is what all decodings at one time may take."""
    started, had = time.perf_counter(), _Had()
    rendered = _outcome(images, job, memory, doubtful, had)
    ended = time.perf_counter()
    read = had.read or ended
    return replace(rendered, cost=Cost(had.num_bytes, read - started, ended - read, ended))


@dataclass
class _Had:
    """What was read of an image, and when it was there; 0 until then."""

    num_bytes: int = 0
    read: float = 0.0


def _outcome(images: Readable, job: Job, memory: Budget, doubtful: Doubtful, had: _Had) -> Rendered:
    try:
        data = images.read(job.index)
        is_same = content_digest(data) == job.digest
        had.num_bytes, had.read = len(data) if isinstance(data, bytes) else data.nbytes, time.perf_counter()
        if not is_same:
            return Rendered(job.index, None, (), "it was changed while the job ran; run the job again")
        rendered = _views(data, job, memory)
        if doubtful == "refuse" and rendered.doubt is not None:
            return Rendered(job.index, None, (), f"doubtful: {rendered.doubt}", is_lasting=True)
        return rendered
    except ImageError as error:
        return Rendered(job.index, None, (), error.reason)
    except (DecodeError, RenderError) as error:
        return Rendered(job.index, None, (), str(error), is_lasting=not isinstance(error, MissingDecoderError))
    except MemoryError as error:  # no fault of the image, which the next run may have the memory for
        return Rendered(job.index, None, (), str(error) or "decoding it takes more memory than is free")
    except Exception as error:
        error.add_note(f"while rendering {images.ids[job.index]}")  # a fault of ours, or of the caller's images
        raise


def _views(data: bytes | NDArray[np.uint8], job: Job, memory: Budget) -> Rendered:
    decoded: dict[tuple[str, bool, int | None], Decoded] = {}
    views, decoders = [], []
    for view in job.views:
        resize = view.resize if view.decode == REDUCED else None  # one decode in full serves all
        rules = view.decode, view.apply_exif, resize
        if rules not in decoded:
            decoded[rules] = decode_for(view, data, memory)
        views.append(view.render(decoded[rules].pixels, job.digest))
        decoders.append(decoded[rules].decoder)
    doubt = next((each.doubt for each in decoded.values() if each.doubt is not None), None)
    look = look_of(views[0]) if views and job.views[0].is_evaluation else 0
    return Rendered(job.index, tuple(views), tuple(decoders), None, doubt=doubt, look=look)


def look_of(view: Tensor) -> int:
    """A number that differs for views that differ, but for one pair in 2 ** 64; not 0."""
    return int.from_bytes(hashlib.sha256(view.numpy().data).digest()[:8]) or 1
