"""Ensembles: several saved runs that predict as one, by the mean of their probabilities."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Unpack

import numpy as np
from numpy.typing import NDArray

from featstore.errors import FeatureStoreError
from featstore.models.runs import FACTS, located
from training.learner import Learner
from training.predict import Items, Prediction, as_images, predictions
from training.tta import TtaOptions


class Ensemble:
    """Learners of one class table, whose probabilities (in regression: numbers) are averaged.

    Each counts as much as any other. Snapshots of `Learner.fit_cycles` and the folds of one set are such learners.

    Raises:
        ValueError: if there is none.
        FeatureStoreError: if they tell different things of an image; the first that differs is named.
    """

    def __init__(self, learners: Sequence[Learner]) -> None:
        """Takes the learners as they are; the class describes them."""
        if not learners:
            raise ValueError("An ensemble of no models predicts nothing. Give at least one.")
        self.learners = tuple(learners)
        first = self.learners[0]
        self.classes, self.task = first.classes, first.task
        for number, each in enumerate(self.learners[1:], start=2):
            if (each.classes, each.task) != (self.classes, self.task):
                raise FeatureStoreError(
                    f"Model {number} of the ensemble is for the classes {', '.join(each.classes)} ({each.task}), and "
                    f"the first for {', '.join(self.classes)} ({self.task}). Give models of one class table."
                )

    @classmethod
    def load(cls, runs: str | os.PathLike[str] | Iterable[str | Path], **options: Any) -> Ensemble:
        """The ensemble of saved runs.

        Args:
            runs: their folders; or one folder that holds them, as `Learner.fit_cycles` fills one with snapshots.
            options: further arguments of `Learner.load`.

        Raises:
            ValueError: for a folder without runs.
        """
        if isinstance(runs, str | os.PathLike):
            folder = Path(runs)
            found = [file.parent for file in located(folder).glob(f"*/{FACTS}")]
            runs = sorted(each for each in found if not each.name.startswith("."))  # what a killed process left
            if not runs:
                raise ValueError(
                    f"{folder} holds no saved runs. Expected a folder of runs, such as fit_cycles(snapshot=...) fills, "
                    "or a list of runs' folders."
                )
        return cls([Learner.load(run, **options) for run in runs])

    def predict(self, items: Items, **tta: Unpack[TtaOptions]) -> list[Prediction]:
        """As `Learner.predict`, of the means."""
        ids, values = self.scored(items, **tta)
        return predictions(ids, values, self.classes, self.task)

    def predict_proba(self, items: Items, **tta: Unpack[TtaOptions]) -> NDArray[np.float64]:
        """As `Learner.predict_proba`, the mean over the learners."""
        return self.scored(items, **tta)[1]

    def scored(self, items: Items, **tta: Unpack[TtaOptions]) -> tuple[tuple[str, ...], NDArray[np.float64]]:
        """Ids and mean probabilities ``(N, K)``, as `Learner.scored`.

        Raises:
            FeatureStoreError: if an image could be read for one learner and not for another.
        """
        images = as_images(items)
        scored = [learner.scored(images, **tta) for learner in self.learners]
        ids = scored[0][0]
        differing = sorted({*ids}.symmetric_difference(name for other, _ in scored for name in other))
        if differing:
            raise FeatureStoreError(
                f"{differing[0]} could be read for some models of the ensemble and not for others. Expected files that "
                "stay as they are while they are read. Predict again, without such files."
            )
        return ids, np.mean([values for _, values in scored], axis=0)
