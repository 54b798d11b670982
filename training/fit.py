"""The one training loop: it sees (inputs, targets) and the stages that train, never where the inputs come from."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from featstore.graph import mode_of
from training.batches import Batches
from training.metrics import Loss, Metric

Record = dict[str, float]
"""What is known of one epoch: epoch (from 1), train_loss, valid_loss, the metrics, lr (of the last group), seconds."""


@dataclass(eq=False)
class History:
    """The epochs of one fit.

    Attributes:
        records: one an epoch.
        best_epoch: place of the epoch with the lowest validation loss; of the last one without validation.
        losses: of each training step.
    """

    records: list[Record] = field(default_factory=list)
    best_epoch: int = -1
    losses: list[float] = field(default_factory=list)

    @property
    def last(self) -> Record:
        """The last epoch's record."""
        return self.records[-1]

    @property
    def best(self) -> Record:
        """The record of the best epoch."""
        return self.records[self.best_epoch]

    def frame(self) -> dict[str, list[float]]:
        """Column -> values, one an epoch: what ``pandas.DataFrame`` takes."""
        return {name: [record[name] for record in self.records] for name in self.records[0]} if self.records else {}


def run_epochs(
    tail: nn.Module,
    train: Batches,
    valid: Batches | None,
    *,
    optimizer: Optimizer,
    scheduler: LRScheduler,
    loss: Loss,
    metrics: Mapping[str, Metric],
    epochs: int,
    seed: int,
    first_epoch: int,
    keep: Literal["last", "best"] = "last",
    on_epoch_end: Callable[[Record], Any] | None = None,
) -> History:
    """Trains `tail` for some epochs and scores it after each.

    Global random state, training flags and the device's settings are as before when it ends, also by an error.

    Args:
        tail: the stages that aren't frozen.
        train: batches to learn from.
        valid: batches to score, or None.
        optimizer: of the tail's parameters.
        scheduler: stepped between two batches.
        loss: of logits and targets.
        metrics: by name, over all rows at once.
        epochs: how many.
        seed: of order, views and dropout.
        first_epoch: number of epochs trained before; another epoch has another order.
        keep: the weights that remain: of the last epoch, or of the one with the lowest validation loss.
        on_epoch_end: gets each record.

    Raises:
        FloatingPointError: when the loss is no longer finite.
    """
    history = History()
    best: dict[str, Tensor] | None = None
    lowest = math.inf
    optimizer_steps = 0
    for number in range(epochs):
        started = time.perf_counter()
        losses = []
        with seeded(seed, first_epoch + number, train.device), mode_of(tail, training=True):
            tail.train()
            for inputs, targets in train.epoch(seed, first_epoch + number):
                if optimizer_steps:
                    scheduler.step()  # between steps, so that the rate on record is the one that was used
                losses.append((step(tail, inputs, targets, loss, optimizer), len(targets)))
                optimizer_steps += 1
        rows = sum(count for _, count in losses)
        history.losses += [value for value, _ in losses]
        record: Record = {
            "epoch": first_epoch + number + 1,
            "train_loss": sum(value * count for value, count in losses) / rows,
            "lr": float(optimizer.param_groups[-1]["lr"]),
        }
        if valid is not None:
            logits, targets = outputs(tail, valid)
            record["valid_loss"] = float(loss(logits, targets))
            record |= {name: metric(logits, targets) for name, metric in metrics.items()}
        record["seconds"] = time.perf_counter() - started
        history.records.append(record)
        if valid is None or record["valid_loss"] < lowest or history.best_epoch < 0:
            lowest = record.get("valid_loss", math.inf)
            history.best_epoch = number
            best = copy.deepcopy(tail.state_dict()) if keep == "best" and valid is not None else None
        if on_epoch_end is not None:
            on_epoch_end(dict(record))
    if best is not None and history.best_epoch != epochs - 1:
        tail.load_state_dict(best)
    return history


def step(tail: nn.Module, inputs: Tensor, targets: Tensor, loss: Loss, optimizer: Optimizer) -> float:
    """One step of gradient descent; returns the loss before it."""
    optimizer.zero_grad(set_to_none=True)
    value = loss(tail(inputs), targets)
    number = float(value.detach())
    if not math.isfinite(number):
        raise FloatingPointError(
            f"The training loss became {number}. Lower the learning rate (--lr), or find one: lr_find()."
        )
    value.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    return number


def outputs(tail: nn.Module, batches: Batches) -> tuple[Tensor, Tensor]:
    """Logits ``(N, K)`` and targets of all rows, on the CPU, in eval mode and without gradient."""
    logits, rows = predicted(tail, batches)
    if batches.targets is None:
        raise ValueError("These images have no labels, so they can't be scored.")
    return logits, batches.targets[rows]


def predicted(tail: nn.Module, batches: Batches) -> tuple[Tensor, Tensor]:
    """Logits ``(N, K)`` and the row numbers ``(N,)`` they belong to, on the CPU."""
    logits: list[Tensor] = []
    rows: list[Tensor] = []
    with torch.no_grad(), mode_of(tail, training=False):
        for inputs, numbers in batches.in_order():
            logits.append(tail(inputs).float().cpu())
            rows.append(torch.from_numpy(numbers))
    if not logits:
        raise ValueError("There is no image to run the model on.")
    return torch.cat(logits), torch.cat(rows)


@contextmanager
def seeded(seed: int, epoch: int, device: torch.device) -> Iterator[None]:
    """Dropout's random state for one epoch; the caller's comes back afterwards."""
    devices: Sequence[torch.device] = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed((seed * 1_000_003 + epoch) % 2**63)
        yield
