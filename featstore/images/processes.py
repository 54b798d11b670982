"""Processes: images rendered by several of them, which many processors need: threads wait for the interpreter's lock.

Measured with 16 processors on JPEGs of 500 x 375: 1,600 images a second by threads, of which no number gave more, as
each call into a library gives the lock away and waits to have it back; 6,450 by processes.

One process is started, which loads what is needed and forks as many as are asked for. It doesn't run the caller's
script again, so that one needs no ``if __name__ == "__main__"``; policies and sources of a module are imported, and
must be there what they are here. Each process has a pipe; what it renders it writes into memory that all share.
"""

from __future__ import annotations

import mmap
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from multiprocessing import Pipe
from multiprocessing.connection import Connection

import numpy as np
import torch
from numpy.typing import NDArray

from featstore.errors import Doubtful, FeatureStoreError, OnError
from featstore.images.decode import Budget
from featstore.images.image_set import ImageSet
from featstore.images.render import Cost, Job, Rendered, refusing, rendered_one
from featstore.images.sources import ImageSource
from featstore.images.views import View
from featstore.machine import available_bytes, num_processors

SLICE = 8
"""Images that are handed over at once."""

MOST_WAITING = 16
"""Slices with each process: their messages have room in its pipe, so that nobody waits for the other to read."""

_Task = tuple[str, int, bytes, list[int], int]
"""An image, the length of its content if that lies in the memory, its digest, the places of its views, and where in the
memory they go."""

_Answer = tuple[tuple[int, ...], str | None, bool, str | None, int, Cost]
"""The fields of `Rendered` from `decoders` on."""

MOST_THREADS = 4
"""More of them wait for the interpreter's lock most of their time."""

_LOOKS_EVERY_SECONDS = 1.0

MANY_IMAGES = 2000
"""From so many on, processes are worth the seconds that they take to start."""


class CannotShareError(Exception):
    """What would have to be known to other processes can't be; threads render it."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Work:
    """What processes must know to render images: it pickles.

    Attributes:
        source: where the images are.
        views: all that jobs may ask for.
        doubtful: as in `render`.
        memory_bytes: what the decoder of one process may take.
    """

    source: ImageSource
    views: tuple[View, ...]
    doubtful: Doubtful
    memory_bytes: int

    @cached_property
    def slot_bytes(self) -> int:
        """Of the views of one job."""
        return sum(view.channels * view.size**2 for view in self.views)


class _Memory(Budget):
    """What one of several processes may take; whoever needs more than its share takes it alone among all of them."""

    def __init__(self, limit: int, lock_file: int) -> None:
        super().__init__(limit)
        self._most, self._lock_file = limit, lock_file

    @contextmanager
    def taken(self, count: int, kind: str) -> Iterator[None]:
        """See `Budget.taken`."""
        import fcntl  # which not every system has; nor has it processes that fork

        if count > self._most:
            fcntl.lockf(self._lock_file, fcntl.LOCK_EX)
        try:
            with super().taken(count, kind):
                yield
        finally:
            if count > self._most:
                fcntl.lockf(self._lock_file, fcntl.LOCK_UN)


def renderers_for(
    source: ImageSource,
    views: Sequence[View],
    *,
    num_images: int,
    workers: int | None = None,
    doubtful: Doubtful = "note",
    ahead: int = 0,
) -> Renderers | None:
    """Processes that render images; None where threads are as good, or the images lie in this one's memory.

    Args:
        source: of the images.
        views: all that jobs may ask for.
        num_images: how many there are to be.
        workers: processes; default: as many as processors, less one for the caller.
        doubtful: as in `render`.
        ahead: how many images may be with them, or wait for the caller.
    """
    count = num_processors() - 1 if workers is None else workers
    if count <= MOST_THREADS or num_images < MANY_IMAGES or source.moved(os.sep) is None or not hasattr(os, "fork"):
        return None
    memory_bytes = available_bytes() // 2 // count
    work = Work(source=source, views=tuple(views), doubtful=doubtful, memory_bytes=memory_bytes)
    with suppress(CannotShareError):
        return Renderers(work, count=count, ahead=ahead)
    return None


class Renderers:
    """Processes that render images, until they are closed; they start while the caller goes on.

    Args:
        work: what they do.
        count: how many.
        ahead: how many images may be with them, or wait for the caller.

    Raises:
        CannotShareError: where what they are told doesn't pickle.
    """

    def __init__(self, work: Work, *, count: int, ahead: int = 0) -> None:
        try:
            told = pickle.dumps(work)
        except Exception as error:
            raise CannotShareError(str(error)) from error
        # Of large views few are ahead, so few are handed over at once.
        self._slice = max(1, min(SLICE, ahead // (2 * count))) if ahead else SLICE
        self.work, self.count, self.ahead = work, count, max(ahead, 2 * self._slice * count)
        self._num_slots = 3 * self.ahead
        self._free = list(range(self._num_slots))
        self._answered, self._left_over = False, False
        try:
            self._start(count)
        except (OSError, ValueError) as error:  # no memory, no more files, no program to start
            raise CannotShareError(str(error)) from error
        with suppress(OSError):  # it has ended, which shows when it is asked for anything
            self._pipes[0].send_bytes(told)

    def _start(self, count: int) -> None:
        num_bytes = self._num_slots * self.work.slot_bytes
        with ExitStack() as theirs:
            file = _shared_file(num_bytes)
            theirs.callback(os.close, file)
            self._memory = np.frombuffer(mmap.mmap(file, num_bytes), np.uint8)
            self._address = self._memory.ctypes.data
            self._pipes, fds = [], []
            for _ in range(count):
                ours, other = Pipe()
                theirs.enter_context(other)
                self._pipes.append(ours)
                fds.append(other.fileno())
            program = (
                f"import sys; sys.path[:] = {[os.fspath(each) for each in sys.path]!r}; "
                f"from featstore.images.processes import serve; serve({fds!r}, {file}, {os.getpid()})"
            )
            self._process = subprocess.Popen(
                [sys.executable, "-c", program],
                stdin=subprocess.DEVNULL,
                pass_fds=[*fds, file],
                start_new_session=True,  # an interrupt from a terminal is the caller's alone, who then ends them
            )

    def __enter__(self) -> Renderers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the processes, which have nothing to lose."""
        for pipe in self._pipes:
            pipe.close()
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    @property
    def is_idle(self) -> bool:
        """Whether all that was handed over has come back: else they can't be used again."""
        return not self._left_over

    def rendered(self, images: ImageSet, jobs: Iterable[Job], *, on_error: OnError = "raise") -> Generator[Rendered]:
        """The views of each job, in the order of the jobs, which are drawn as they are needed: as `render`.

        Args:
            images: those of `work.source`.
            jobs: which of them, and how.
            on_error: as in `render`.

        Raises:
            CannotShareError: before anything is drawn, where another process doesn't know what `work` is made of.
            ImageError: as `render`.
            FeatureStoreError: for a process that ends by itself; what was rendered before it has come.
        """
        if not self._answered:
            problem = self._problem()
            if problem is not None:
                raise CannotShareError(problem)
            self._answered = True
        if self._left_over:
            raise RuntimeError(
                "These processes are still with what another iterator asked for. Close them, start others."
            )
        self._left_over = True
        found = self._rendered(images, iter(jobs))
        return refusing(found, images) if on_error == "raise" else found

    def _problem(self) -> str | None:
        try:
            problem: str | None = self._pipes[0].recv()
        except (EOFError, OSError):
            return "the process ended"
        return problem

    def _rendered(self, images: ImageSet, jobs: Iterator[Job]) -> Generator[Rendered]:
        under_way, number = deque[tuple[int, list[Job], list[int]]](), 0
        while True:
            most = min(self.ahead // self._slice, MOST_WAITING * len(self._pipes))
            while len(under_way) < most and len(self._free) >= self._slice:
                some = list(islice(jobs, self._slice))
                if not some:
                    break
                slots = [self._free.pop() for _ in some]
                who = number % len(self._pipes)
                number += 1
                self._hand(who, images, some, slots)
                under_way.append((who, some, slots))
            if not under_way:
                self._left_over = False
                return
            who, some, slots = under_way.popleft()
            for job, slot, answer in zip(some, slots, self._answers(who, some, images.ids), strict=True):
                yield self._delivered(job, slot, answer)

    def _hand(self, who: int, images: ImageSet, jobs: list[Job], slots: list[int]) -> None:
        tasks = []
        for job, slot in zip(jobs, slots, strict=True):
            name = images.ids[job.index]
            length = self._put(images.contents.taken(name), slot)
            tasks.append((name, length, job.digest, [self.work.views.index(view) for view in job.views], slot))
        with suppress(OSError):  # it has ended, which shows when its answer is asked for
            self._pipes[who].send(tasks)

    def _put(self, content: bytes | None, slot: int) -> int:
        """Puts what the caller has of an image where its views will lie; its length, 0 where it has to be read there.

        A pipe has no room for it, so that the caller would wait.
        """
        if content is None or len(content) > self.work.slot_bytes:
            return 0
        start = slot * self.work.slot_bytes
        self._memory[start : start + len(content)] = np.frombuffer(content, np.uint8)
        return len(content)

    def _answers(self, who: int, jobs: list[Job], names: Sequence[str]) -> list[_Answer]:
        try:
            answers: list[_Answer] | Exception = self._pipes[who].recv()
        except (EOFError, OSError) as error:
            raise FeatureStoreError(
                f"A process that rendered images ended by itself, at one of {names[jobs[0].index]} and the "
                f"{len(jobs) - 1} after it: it was killed, maybe for the memory it took, or a decoder crashed. Run it "
                "again with fewer workers (--workers); with --workers 0 the system says what it was."
            ) from error
        if isinstance(answers, Exception):
            raise answers
        return answers

    def _delivered(self, job: Job, slot: int, answer: _Answer) -> Rendered:
        """The answer with its views, which lie in the shared memory as long as anybody has them."""
        decoders, failure, is_lasting, doubt, look, cost = answer
        if failure is not None:
            self._free.append(slot)
            return Rendered(job.index, None, decoders, failure, is_lasting, doubt, look, cost)
        is_scarce = len(self._free) < self._num_slots // 4  # a caller who keeps what it gets must not stop all
        address = self._address + slot * self.work.slot_bytes
        memory = np.asarray(_Slot(slot, self._free, self._memory, address, self.work.slot_bytes))
        start, views = 0, []
        for view in job.views:
            num_bytes = view.channels * view.size**2
            array = memory[start : start + num_bytes].reshape(view.channels, view.size, view.size)
            views.append(torch.from_numpy(array.copy() if is_scarce else array))
            start += num_bytes
        return Rendered(job.index, tuple(views), decoders, None, is_lasting, doubt, look, cost)


class _Slot:
    """A piece of the shared memory, which is free again when nobody has an array or a tensor of it."""

    __slots__ = ("__array_interface__", "_free", "_memory", "_number")

    def __init__(self, number: int, free: list[int], memory: object, address: int, num_bytes: int) -> None:
        self._number, self._free, self._memory = number, free, memory  # which stays as long as this does
        self.__array_interface__ = {"shape": (num_bytes,), "typestr": "|u1", "data": (address, False), "version": 3}

    def __del__(self) -> None:
        self._free.append(self._number)


def serve(pipes: list[int], memory: int, caller: int) -> None:
    """What the started process runs: it learns its work, and forks a process for each pipe; ends with its caller."""
    connections = [Connection(each) for each in pipes]
    try:
        work: Work = pickle.loads(connections[0].recv_bytes())
        for view in work.views:
            if view.policy is not None:
                view.policy.check_unchanged()  # what its code reads may be another value here
        problem = None
    except Exception as error:
        problem = f"{type(error).__name__}: {error}"
    with suppress(OSError):  # the caller has ended meanwhile
        connections[0].send(problem)
    if problem is not None:
        return
    torch.set_num_threads(1)  # each of them has a processor
    shared = mmap.mmap(memory, os.fstat(memory).st_size)
    for number, connection in enumerate(connections):
        if not os.fork():
            for other in connections[number + 1 :]:
                other.close()
            budget = _Memory(work.memory_bytes, memory)
            with suppress(EOFError, OSError):  # the caller has ended, or wants no more
                while True:
                    connection.send(_answers(connection.recv(), work, budget, shared))
            os._exit(0)
        connection.close()
    with suppress(ChildProcessError):
        # Whoever was forked from the caller has its pipes too, so that their end doesn't tell that of the caller.
        while os.getppid() == caller:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
            time.sleep(_LOOKS_EVERY_SECONDS)
        os.killpg(0, signal.SIGKILL)
    os._exit(0)


def _answers(tasks: list[_Task], work: Work, budget: Budget, shared: mmap.mmap) -> list[_Answer] | Exception:
    answers: list[_Answer] = []
    try:
        for name, length, digest, numbers, slot in tasks:
            job = Job(0, digest, tuple(work.views[number] for number in numbers))
            start = slot * work.slot_bytes
            content = shared[start : start + length] or None
            answer = rendered_one(_Named(work.source, [name], content), job, memory=budget, doubtful=work.doubtful)
            for view in answer.views or ():
                pixels: NDArray[np.uint8] = view.numpy()
                np.frombuffer(shared, np.uint8, pixels.size, start).reshape(pixels.shape)[:] = pixels
                start += pixels.size
            is_lasting, doubt = answer.is_lasting, answer.doubt
            answers.append((answer.decoders, answer.failure, is_lasting, doubt, answer.look, answer.cost))
    except Exception as error:
        return _sendable(error)
    return answers


@dataclass(frozen=True, eq=False)
class _Named:
    """An image of a source; its content, where the caller had it."""

    source: ImageSource
    ids: Sequence[str]
    content: bytes | None

    def read(self, index: int) -> bytes | NDArray[np.uint8]:
        return self.source.read(self.ids[index]) if self.content is None else self.content


def _sendable(error: Exception) -> Exception:
    """An error with its traceback as a note, or one that says the same where it doesn't pickle."""
    error.add_note("".join(traceback.format_tb(error.__traceback__)).rstrip())
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError("".join(traceback.format_exception(error)).rstrip())
    return error


def _shared_file(num_bytes: int) -> int:
    """The descriptor of a file in memory without a name."""
    if hasattr(os, "memfd_create"):
        file = os.memfd_create("featstore-views")
    else:
        with tempfile.TemporaryFile() as temporary:
            file = os.dup(temporary.fileno())
    os.ftruncate(file, max(num_bytes, 1))
    return file
