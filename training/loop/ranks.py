"""Ranks: processes that fit one model together, each on its share of every batch; the one door to torch.distributed.

A batch size is that of all of them together, so their number changes no rate; nor the number of steps, but where a pass
ends in fewer images than two for each process, which join the batch before. Batch norm takes the statistics of each
process's share, of which the first one's remain.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from featstore.errors import FeatureStoreError
from featstore.extraction.shards import local_device, local_threads, local_workers
from featstore.machine import num_processors
from featstore.models.trunk import choose_device


@dataclass(frozen=True)
class Ranks:
    """The processes of a fit, as one of them sees them.

    Attributes:
        rank: of this one, from 0.
        count: of all.
        device: that this one computes on.
    """

    rank: int
    count: int
    device: torch.device

    @classmethod
    def present(cls, device: torch.device) -> Ranks | None:
        """Those that torch.distributed knows, where these are several; None for a process alone."""
        if not _are_several():
            return None
        return cls(dist.get_rank(), dist.get_world_size(), device)

    def wrapped(self, tail: nn.Module) -> nn.Module:
        """`tail` with the same weights in all processes, whose backward pass takes the mean of all gradients."""
        return DistributedDataParallel(tail, device_ids=None if self.device.index is None else [self.device.index])

    def totals(self, *numbers: float) -> list[float]:
        """The sum over all processes of each number."""
        values = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        with together():
            dist.all_reduce(values)
            return values.tolist()

    def firsts(self, number: float) -> float:
        """The first process's number."""
        value = torch.tensor(number, dtype=torch.float64, device=self.device)
        with together():
            dist.broadcast(value, src=0)
            return float(value)

    def any(self, holds: bool) -> bool:
        """Whether it holds in any process."""
        return self.totals(float(holds))[0] > 0

    def check_alike(self, found: str, path: Path) -> None:
        """Checks that all processes have found the same at `path`.

        Raises:
            FeatureStoreError: if not: some of them are on another machine, whose disk hasn't what the first one wrote.
        """
        everywhere: list[str] = [""] * self.count
        with together():
            dist.all_gather_object(everywhere, found)
        if len({*everywhere}) > 1:
            raise FeatureStoreError(
                f"The {self.count} processes of this fit find different checkpoints at {path}: "
                f"{', '.join(each or 'none' for each in everywhere)}. Expected one that all of them see. Give a folder "
                "that their machines share."
            )

    def share_buffers(self, tail: nn.Module) -> None:
        """Gives all processes the first one's statistics: each has seen other images."""
        with together():
            for buffer in tail.buffers():
                dist.broadcast(buffer, src=0)

    def gathered(self, tensors: Sequence[Tensor]) -> list[list[Tensor]]:
        """The tensors of each process, in their order."""
        found: list[list[Tensor]] = [[]] * self.count
        with together():
            dist.all_gather_object(found, [*tensors])
        return found

    def joined(self, logits: Sequence[Tensor], rows: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Logits ``(n, K)`` and row numbers ``(n,)`` of all processes' batches, in the order of the rows; on the CPU.

        One batch, or none where no process has any.
        """
        found: list[list[tuple[Tensor, Tensor]]] = [[]] * self.count
        with together():
            dist.all_gather_object(found, [*zip(logits, rows, strict=True)])
        batches = [batch for each in found for batch in each]
        if not batches:
            return [], []
        all_rows = torch.cat([each for _, each in batches])
        order = all_rows.argsort()
        return [torch.cat([each for each, _ in batches])[order]], [all_rows[order]]


@contextmanager
def together() -> Iterator[None]:
    """What processes do together; that one of them is gone is said by a sentence.

    Raises:
        FeatureStoreError: if another process has ended, or doesn't answer.
    """
    try:
        yield
    except RuntimeError as error:  # of gloo a plain one
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        raise FeatureStoreError(
            "Another process of this fit has ended, or doesn't answer; its own error says why. Start all of them "
            "again, with --resume (in Python: resume=True) where the fit is kept in a checkpoint."
        ) from error


def is_first() -> bool:
    """Whether this process is alone, or the first of several."""
    return not _are_several() or dist.get_rank() == 0


def check_alone(what: str) -> None:
    """Checks that no other process does the same at this moment.

    Raises:
        FeatureStoreError: if there are several; `what` says what can't be shared.
    """
    if _are_several():
        raise FeatureStoreError(
            f"{dist.get_world_size()} processes share this fit, and one alone {what}. Extract first (featstore "
            'extract), or train from images: on_missing="images".'
        )


@contextmanager
def written_by_first(path: Path) -> Iterator[bool]:
    """Whether this process is the one to write `path`; all go on once that has ended.

    Raises:
        FeatureStoreError: in the other processes, where the first one failed.
    """
    if not _are_several():
        yield True
        return
    has_failed = True
    try:
        yield is_first()
        has_failed = False
    finally:
        told = [has_failed]
        with together():
            dist.broadcast_object_list(told, src=0)
    if told[0]:
        raise FeatureStoreError(f"The first process couldn't write {path}; its own error says why.")


def _are_several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


@contextmanager
def joined(device: torch.device | str = "auto", workers: int | None = None) -> Iterator[dict[str, Any]]:
    """Joins the processes that torchrun has started beside this one, while the block lasts; alone it does nothing.

    It gives arguments of `Learner`: of several GPUs of a machine each process has its own, and a share of the
    processors.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or not dist.is_available() or dist.is_initialized():
        yield {"device": device, "workers": workers}
        return
    own = local_device(str(device), os.environ, num_gpus=torch.cuda.device_count())
    if workers is None:
        workers = local_workers(os.environ, num_processors=num_processors())
    chosen = choose_device(own)
    threads = local_threads(chosen.type, os.environ, num_processors=num_processors())
    if threads is not None:
        torch.set_num_threads(threads)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    try:
        yield {"device": own, "workers": workers}
    finally:
        dist.destroy_process_group()
