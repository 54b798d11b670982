"""History: what is known of the epochs and steps of a fit, and how a person reads it."""

from __future__ import annotations

import csv
import json
import math
import os
from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featstore.html import titled_table
from training.loop.monitor import Monitor

if TYPE_CHECKING:
    from training.plots import Axes, Plot

Record = dict[str, float]
"""What is known of one epoch: epoch (from 1), train_loss, valid_loss, the metrics, lr (of the last group), seconds."""


def record_line(record: Record) -> str:
    """One epoch as a line of text."""
    words = [f"{name} {value:.4g}" for name, value in record.items() if name not in ("epoch", "seconds")]
    return f"epoch {int(record['epoch'])}: {', '.join(words)}, {record['seconds']:.1f} s"


@dataclass(eq=False, repr=False)
class History:
    """The epochs of one fit, or of all fits of a learner.

    Attributes:
        records: one an epoch.
        best_epoch: place in `records`, from 0, of the epoch that is best by `monitor`; of the last one where that isn't
            on record.
        losses: of each training step.
        lrs: the learning rate of each step, of the last parameter group; NaN where that isn't known.
        momenta: of each step likewise, of SGD its momentum and of Adam its beta1; NaN of an optimizer without.
        monitor: the number that epochs are judged by; of several fits the last one's.
    """

    records: list[Record] = field(default_factory=list)
    best_epoch: int = -1
    losses: list[float] = field(default_factory=list)
    lrs: array[float] = field(default_factory=lambda: array("d"))  # a quarter of a list's memory
    momenta: array[float] = field(default_factory=lambda: array("d"))
    monitor: Monitor = field(default_factory=Monitor)

    def __repr__(self) -> str:
        if not self.records:
            return "History(no epochs)"
        scores = ", ".join(f"{name} {value:.4g}" for name, value in self.best.items() if name != "seconds")
        return f"History({len(self.records)} epochs; best: {scores})"

    def _repr_html_(self) -> str:
        return titled_table(repr(self), self.records)

    def extend(self, later: History) -> None:
        """Adds the epochs of a later fit; the best is then the best of all."""
        start = len(self.records)
        num_steps = len(self.losses)
        self.records += later.records
        self.losses += later.losses
        for own, added in ((self.lrs, later.lrs), (self.momenta, later.momenta)):
            own.extend([math.nan] * (num_steps - len(own)))
            own.extend(added)
        mine, others = (
            later.monitor.loss(self.records[place]) for place in (self.best_epoch, start + later.best_epoch)
        )
        if not start or self.monitor != later.monitor or not mine < others:
            self.best_epoch = start + later.best_epoch
        self.monitor = later.monitor

    def joined(self, later: History) -> History:
        """These epochs and those of a later fit, in a history of its own."""
        both = replace(self, records=[*self.records], losses=[*self.losses], lrs=self.lrs[:], momenta=self.momenta[:])
        both.extend(later)
        return both

    def ran_at(self, group: Mapping[str, Any]) -> None:
        """Adds what a step ran at, of an optimizer's parameter group."""
        self.lrs.append(float(group["lr"]))
        self.momenta.append(float(group["betas"][0] if "betas" in group else group.get("momentum", math.nan)))

    @property
    def last(self) -> Record:
        """The last epoch's record."""
        return self.records[-1]

    @property
    def best(self) -> Record:
        """The record of the best epoch."""
        return self.records[self.best_epoch]

    def frame(self) -> dict[str, list[float]]:
        """Column -> values, one an epoch, NaN where an epoch lacks it: what ``pandas.DataFrame`` takes."""
        names = dict.fromkeys(name for record in self.records for name in record)
        return {name: [record.get(name, math.nan) for record in self.records] for name in names}

    def steps(self) -> dict[str, list[float]]:
        """Column -> values, one a training step: ``loss``, ``lr`` and ``momentum``."""
        unknown = [math.nan] * len(self.losses)
        columns = {"loss": self.losses, "lr": self.lrs, "momentum": self.momenta}
        return {name: [*values, *unknown[len(values) :]] for name, values in columns.items()}

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Writes a table, a row an epoch, its columns those of `frame`."""
        columns = self.frame()
        with Path(path).open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(columns)
            writer.writerows(zip(*columns.values(), strict=True))

    def to_jsonl(self, path: str | os.PathLike[str]) -> None:
        """Writes an object of JSON a line, each an epoch; null where a number isn't finite, as JSON has no other."""
        with Path(path).open("w", encoding="utf-8") as file:
            for record in self.records:
                kept = {name: value if math.isfinite(value) else None for name, value in record.items()}
                file.write(json.dumps(kept) + "\n")

    # matplotlib loads only where a plot is wanted

    def plot(self) -> Plot:
        """Losses by epoch, and the validation metrics beside them, if there are any."""
        from training.plots import history

        return history(self.records)

    def plot_losses(self, axes: Axes | None = None) -> Axes:
        """Training and validation loss by epoch."""
        from training.plots import losses

        return losses(self.records, axes)

    def plot_metrics(self, axes: Axes | None = None) -> Axes:
        """The validation metrics by epoch."""
        from training.plots import metrics

        return metrics(self.records, axes)

    def plot_steps(self, axes: Axes | None = None) -> Axes:
        """The training loss of each step."""
        from training.plots import step_losses

        return step_losses(self.losses, axes)

    def plot_lr(self, axes: Axes | None = None) -> Axes:
        """The learning rate of each step, and the momentum on a scale of its own, where there is one."""
        from training.plots import step_rates

        return step_rates(self.lrs, self.momenta, axes)
