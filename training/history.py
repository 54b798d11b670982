"""History: what is known of the epochs and steps of a fit, and how a person reads it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

from training.monitor import Monitor

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
        monitor: the number that epochs are judged by; of several fits the last one's.
    """

    records: list[Record] = field(default_factory=list)
    best_epoch: int = -1
    losses: list[float] = field(default_factory=list)
    monitor: Monitor = field(default_factory=Monitor)

    def __repr__(self) -> str:
        if not self.records:
            return "History(no epochs)"
        scores = ", ".join(f"{name} {value:.4g}" for name, value in self.best.items() if name != "seconds")
        return f"History({len(self.records)} epochs; best: {scores})"

    def extend(self, later: History) -> None:
        """Adds the epochs of a later fit; the best is then the best of all."""
        start = len(self.records)
        self.records += later.records
        self.losses += later.losses
        mine, others = (
            later.monitor.loss(self.records[place]) for place in (self.best_epoch, start + later.best_epoch)
        )
        if not start or self.monitor != later.monitor or not mine < others:
            self.best_epoch = start + later.best_epoch
        self.monitor = later.monitor

    def joined(self, later: History) -> History:
        """These epochs and those of a later fit, in a history of its own."""
        both = replace(self, records=[*self.records], losses=[*self.losses])
        both.extend(later)
        return both

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
