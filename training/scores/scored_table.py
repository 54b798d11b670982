"""ScoredTable: what a saved run said of each image that it held out, as its valid_predictions.csv has it - no torch."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from featstore.errors import DamagedFileError, FeatureStoreError
from featstore.models.runs import read_file
from featstore.words import some
from training.sidecar import FILE, Dealt, Sidecar

TABLE = "valid_predictions.csv"


@dataclass(frozen=True, kw_only=True, eq=False)
class ScoredTable:
    """What a run said of N images that it held out.

    Attributes:
        run: its folder.
        task: single, multi or regression.
        scored_on: digest of these images with their labels.
        ids: of the images.
        right: ``(N,)`` how right the run was on each, more is better: 1 or 0 of one class an image; of several labels
            the share that was decided rightly; of numbers the mean squared error, turned negative.
    """

    run: Path
    task: str
    scored_on: Dealt
    ids: tuple[str, ...]
    right: NDArray[np.float64]

    @classmethod
    def read(cls, run: str | os.PathLike[str]) -> ScoredTable:
        """That of the run in a folder.

        Raises:
            FeatureStoreError: if it is no run, or saved without such scores, or by an earlier featstore.
            DamagedFileError: if a file isn't what was saved.
        """
        folder = Path(run)
        about, content = read_file(folder, FILE), read_file(folder, TABLE)
        sidecar = None if about is None else Sidecar.parsed(about, folder / FILE)
        task = None if sidecar is None else sidecar.configuration.get("task")
        if content is None or sidecar is None or sidecar.scored_on is None or task is None:
            raise FeatureStoreError(
                f"{folder} doesn't say what it predicted for which labelled images: it held none out, its "
                "logits weren't finite, or an earlier featstore saved it. Train it again if they weren't; else save it "
                "anew with the images: Learner.load(run, images, store).save(another)."
            )
        try:
            rows = list(csv.reader(io.StringIO(content.decode("utf-8", "surrogateescape"), newline="")))
            right = _right(rows[0], rows[1:], task)
        except (ValueError, IndexError, UnicodeDecodeError, csv.Error) as error:
            raise DamagedFileError(
                f"{folder / TABLE} is damaged ({error}). Restore it, or save the run anew."
            ) from error
        ids = tuple(row[0] for row in rows[1:])
        return cls(run=folder, task=str(task), scored_on=sidecar.scored_on, ids=ids, right=right)

    def places_in(self, other: ScoredTable) -> NDArray[np.int64]:
        """``(N,)`` where each image stands in another run's table.

        Raises:
            FeatureStoreError: if the two were scored on different images or labels, or call them differently.
        """
        mine, theirs = self.scored_on, other.scored_on
        if (self.task, mine.digest) != (other.task, theirs.digest):
            raise FeatureStoreError(
                f"{self.run} was scored on {mine.images:,} images (digest {mine.digest[:8]}, {self.task}) and "
                f"{other.run} on {theirs.images:,} others (digest {theirs.digest[:8]}, {other.task}): images or labels "
                "differ, so the two don't compare. Score both on one image set with one split, and save them."
            )
        place_of = {name: place for place, name in enumerate(other.ids)}
        apart = sorted({*self.ids} ^ place_of.keys())
        if apart:
            raise FeatureStoreError(
                f"{self.run} and {other.run} were scored on the same images under different names (only one has "
                f"{some(apart)}), so it can't be told which is which. Save one anew with the other's image set."
            )
        return np.array([place_of[name] for name in self.ids], dtype=np.int64)


def _right(header: Sequence[str], rows: Sequence[Sequence[str]], task: str) -> NDArray[np.float64]:
    if not rows:
        raise ValueError("it has no rows")
    if task == "regression":
        count = (len(header) - 1) // 2
        numbers = np.array([[float(each) for each in row[1:]] for row in rows])
        return -((numbers[:, :count] - numbers[:, count:]) ** 2).mean(1)  # type: ignore[no-any-return]
    if header[1:4] != ["actual", "label", "probability"]:
        raise ValueError(f"its columns begin with {', '.join(header[:4])}")
    if task == "single":
        return np.array([float(row[1] == row[2]) for row in rows])
    classes = [_plain(name) for name in header[4:]]
    return np.array([1 - len(_labels(row[1], classes) ^ _labels(row[2], classes)) / len(classes) for row in rows])


def _plain(text: str) -> str:
    """Without the apostrophe that keeps a spreadsheet from taking a text for a formula."""
    return text[1:] if text[:1] == "'" and text[1:2] in tuple("=+-@\t\r") else text


def _labels(cell: str, classes: Sequence[str]) -> set[str]:
    """The classes that a cell names: by `training.predict.joined`, or unquoted, as earlier tables have them.

    Raises:
        ValueError: where these can be read in several ways, or in none.
    """
    text = _plain(cell)
    if not any(";" in name or '"' in name for name in classes):
        return {*text.split(";")} - {""}
    quoted = next(csv.reader([text], delimiter=";"), []) if text.startswith('"') else []
    if quoted and {*quoted} <= {*classes}:
        return {*quoted}
    readings = list(_readings(text, classes)) if text else [()]
    if len(readings) != 1:
        raise ValueError(f"the labels {cell!r} can be read in {len(readings)} ways")
    return {*readings[0]}


def _readings(text: str, classes: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """Each choice of classes, in their order, that joined by ``;`` gives `text`."""
    for place, name in enumerate(classes, start=1):
        if text == name:
            yield (name,)
        elif text.startswith(f"{name};"):
            for others in _readings(text[len(name) + 1 :], classes[place:]):
                yield (name, *others)
