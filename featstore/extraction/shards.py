"""Shards: the images that one of several jobs computes, and which of them a launcher has started this process as."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Shard:
    """One of `count` jobs, counted from 0, that share the images of one extraction and know nothing of each other."""

    index: int
    count: int

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise ValueError(
                f"There is no shard {self.index} of {self.count}. Expected one of 0 to n - 1 of n, such as 0/4 to 3/4."
            )

    def __str__(self) -> str:
        return f"shard {self.index} of {self.count}"

    def owned(self, ids: Sequence[str]) -> NDArray[np.bool_]:
        """``(N,)``: which images are this job's; each is one job's, whatever else is in the set."""
        # With the bytes that file names have which aren't valid UTF-8.
        hashes = (hashlib.sha256(each.encode("utf-8", "surrogateescape")).digest()[:8] for each in ids)
        owners = np.frombuffer(b"".join(hashes), ">u8") % np.uint64(self.count)
        is_owned: NDArray[np.bool_] = owners == self.index
        return is_owned


def shard_of(text: str, environment: Mapping[str, str], *, flag: str = "shard") -> Shard:
    """The shard that a text names.

    Args:
        text: ``i/n``; or what started this process, and tells it by its environment: ``slurm`` (a task of an array
            job), ``kubernetes/n`` (a pod of an indexed job of n completions), ``torchrun``.
        environment: variables, as in `os.environ`.
        flag: what errors call the text.

    Raises:
        ValueError: for another text, variables that are missing or no numbers, and a shard that there can't be.
    """
    launcher, _, count = text.partition("/")
    read = _Variables(environment, f"{flag} is {text!r}")
    if text == "slurm":
        return _of_slurm(read)
    if text == "torchrun":
        asked = "a process that torchrun started. Start it so, or give its number, such as 0/8"
        return Shard(read.number("RANK", asked), read.number("WORLD_SIZE", asked))
    if launcher == "kubernetes":
        if not _is_number(count):
            raise ValueError(
                f"{read.given}, and Kubernetes doesn't tell a pod how many there are. Expected the completions of the "
                "job. Add them, such as kubernetes/8."
            )
        asked = "a pod of a job with completionMode: Indexed. Make it one, or give its number, such as 0/8"
        return Shard(read.number("JOB_COMPLETION_INDEX", asked), int(count))
    if not (_is_number(launcher) and _is_number(count) and int(launcher) < int(count)):
        raise ValueError(
            f"{read.given}. Expected i/n with i from 0 to n - 1, such as 0/4, or what started the jobs: slurm, "
            "kubernetes/n or torchrun. Give each job another i, and all the same n."
        )
    return Shard(int(launcher), int(count))


def local_device(device: str, environment: Mapping[str, str], *, num_gpus: int) -> str:
    """The GPU of a process that torchrun started beside others on its machine; `device` where that names one, or none.

    Where each process sees one GPU alone (CUDA_VISIBLE_DEVICES), that is number 0 in all of them.
    """
    if device not in ("auto", "cuda") or not num_gpus or not _is_number(environment.get("LOCAL_RANK", "")):
        return device
    return f"cuda:{int(environment['LOCAL_RANK']) % num_gpus}"


def local_workers(environment: Mapping[str, str], *, num_processors: int) -> int | None:
    """Threads for a process that torchrun started, as many as leave the others on its machine theirs; None if alone."""
    count = environment.get("LOCAL_WORLD_SIZE", "")
    return max(1, num_processors // int(count)) if _is_number(count) and int(count) > 1 else None


def local_threads(device: str, environment: Mapping[str, str], *, num_processors: int) -> int | None:
    """Threads of torch, as many as `local_workers`; None beside a GPU, and where somebody has said how many there are.

    A 1 in OMP_NUM_THREADS is what torchrun sets for processes beside others, where nobody has said another number. Who
    wants a single thread says so by MKL_NUM_THREADS, which torch heeds and torchrun sets for nobody.
    """
    given = environment.get("OMP_NUM_THREADS")
    is_torchruns = given == "1" and "TORCHELASTIC_RUN_ID" in environment
    is_said = environment.get("MKL_NUM_THREADS") or (given and not is_torchruns)
    if is_said or device.startswith("cuda"):
        return None
    return local_workers(environment, num_processors=num_processors)


@dataclass(frozen=True)
class _Variables:
    """The environment of a launcher, and how an error about it begins."""

    environment: Mapping[str, str]
    given: str

    def number(self, name: str, asked: str) -> int:
        value = self.environment.get(name)
        if value is None or not _is_number(value):
            state = "isn't set here" if value is None else f"is {value!r} here, no number"
            raise ValueError(f"{self.given}, and {name} {state}. Expected {asked}.")
        return int(value)


def _of_slurm(read: _Variables) -> Shard:
    asked = "a task of an array job. Submit it with sbatch --array=0-7, or give the task's number, such as 0/8"
    task, first, last, count = (
        read.number(f"SLURM_ARRAY_TASK_{name}", asked) for name in ("ID", "MIN", "MAX", "COUNT")
    )
    if last - first + 1 != count:
        raise ValueError(
            f"{read.given}, and the array has {count} tasks from {first} to {last}, so some numbers are left out. "
            f"Expected all. Submit it with --array=0-{count - 1}, or, for a few tasks of a larger array, give the "
            "numbers of that one: --shard $SLURM_ARRAY_TASK_ID/8."
        )
    return Shard(task - first, count)


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit()
