"""Plan: what one fit is asked for, checked before anything is read or computed."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from featstore.digest import Json
from featstore.models.runs import check_free
from training import schedules, settings
from training.optim import LearningRate, numbers


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What `Learner.fit` describes.

    Attributes:
        cycles: epochs of each cycle; a fit without cycles is one.
        lr: None: what the finder suggests.
        schedule: gone through once a cycle.
        weight_decay: of every parameter.
        keep: the weights that remain.
        checkpoint: folder that the fit is kept in, or None.
        resume: whether it goes on from there, if there is something.
        snapshot: folder of the runs that are saved at the ends of cycles, or None.
    """

    cycles: tuple[int, ...]
    lr: LearningRate | None
    schedule: str
    weight_decay: float
    keep: Literal["last", "best"]
    checkpoint: str | os.PathLike[str] | None = None
    resume: bool = False
    snapshot: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "cycles", tuple(settings.checked("epochs", each) for each in self.cycles))
        object.__setattr__(self, "weight_decay", float(settings.checked("weight_decay", self.weight_decay)))
        for name in ("keep", "checkpoint", "snapshot"):
            settings.checked(name, getattr(self, name))
        schedules.check(self.schedule)
        if self.resume and self.checkpoint is None:
            raise ValueError("resume needs a checkpoint to go on from. Give it: checkpoint=.")

    @property
    def folder(self) -> Path | None:
        """Of the checkpoint."""
        return None if self.checkpoint is None else Path(self.checkpoint)

    def run_of(self, cycle: int) -> Path:
        """Where the snapshot at the end of a cycle, from 1, is saved."""
        assert self.snapshot is not None
        return Path(self.snapshot) / f"cycle-{cycle}"

    def check_snapshots(self, *, goes_on: bool) -> None:
        """Checks that they can be saved; what a fit that goes on has saved before may be there.

        Raises:
            FeatureStoreError: if runs are there.
        """
        if self.snapshot is not None:
            for cycle in range(1, len(self.cycles) + 1):
                check_free(self.run_of(cycle), overwrite=goes_on)

    def facts(self) -> dict[str, Json]:
        """What of it decides values, as JSON values."""
        return {
            "epochs": list(self.cycles),
            "lr": None if self.lr is None else numbers(self.lr),
            "schedule": self.schedule,
            "weight_decay": self.weight_decay,
            "keep": self.keep,
        }
