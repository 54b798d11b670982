"""ClassReport: precision, recall and F1 of each class, with intervals - which classes a model gets wrong, and how."""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import numpy as np
from numpy.typing import NDArray

from featstore.digest import Json
from featstore.html import titled_table
from featstore.words import printable
from training.scores.metrics import wilson_interval

_COLUMNS = ("precision", "recall", "f1")


@dataclass(frozen=True, kw_only=True)
class ClassScores:
    """How one class is predicted. What nothing is known of (0 / 0) is None, and has no interval.

    Attributes:
        name: of the class.
        precision: share of the images predicted as it that are of it.
        recall: share of its images that are predicted as it.
        f1: their harmonic mean.
        intervals: of these by name: 95 %, Wilson's. F1 follows from the share of images of the class or predicted as it
            that are both, s, as 2 s / (1 + s), and so do its ends.
        support: its images.
        predicted: images predicted as it.
    """

    name: str
    precision: float | None
    recall: float | None
    f1: float | None
    intervals: dict[str, tuple[float, float]]
    support: int
    predicted: int

    @classmethod
    def of(cls, name: str, *, both: int, support: int, predicted: int) -> ClassScores:
        """Those of a class with `support` images, of which `both` are among the `predicted`."""
        either = support + predicted - both
        shares = {"precision": (both, predicted), "recall": (both, support), "f1": (both, either)}
        found = {name: None if not whole else _f1(name, part / whole) for name, (part, whole) in shares.items()}
        intervals = {}
        for column, (part, whole) in shares.items():
            if whole:
                low, high = wilson_interval(part, whole)
                intervals[column] = (_f1(column, low), _f1(column, high))
        return cls(name=name, **found, intervals=intervals, support=support, predicted=predicted)

    def row(self) -> dict[str, Json]:
        """As a row of a table, the ends of an interval in columns of their own."""
        found: dict[str, Json] = {"class": self.name}
        for column in _COLUMNS:
            low, high = self.intervals.get(column, (None, None))
            found |= {column: getattr(self, column), f"{column}_from": low, f"{column}_to": high}
        return {**found, "support": self.support, "predicted": self.predicted}


@dataclass(frozen=True, eq=False, repr=False)
class ClassReport:
    """The scores of each class, in the order of the class table. Prints as a table.

    Attributes:
        classes: of each.
    """

    classes: tuple[ClassScores, ...]

    @classmethod
    def of(cls, names: Sequence[str], actual: NDArray[np.bool_], said: NDArray[np.bool_]) -> ClassReport:
        """That of ``(N, K)`` what each image is and what was said of it."""
        both, support, predicted = (each.sum(0).tolist() for each in (actual & said, actual, said))
        counts = zip(names, both, support, predicted, strict=True)
        return cls(tuple(ClassScores.of(name, both=b, support=s, predicted=p) for name, b, s, p in counts))

    def __len__(self) -> int:
        return len(self.classes)

    @property
    def means(self) -> dict[str, dict[str, float | None]]:
        """``macro``: of each score the mean over the classes that have it; ``weighted``: by their number of images."""
        found: dict[str, dict[str, float | None]] = {"macro": {}, "weighted": {}}
        for column in _COLUMNS:
            known = [(value, each.support) for each in self.classes if (value := getattr(each, column)) is not None]
            total = sum(support for _, support in known)
            found["macro"][column] = fmean(value for value, _ in known) if known else None
            found["weighted"][column] = sum(value * support for value, support in known) / total if total else None
        return found

    def table(self) -> list[dict[str, Json]]:
        """A row a class."""
        return [each.row() for each in self.classes]

    def worst(self, num: int = 5, by: str = "f1") -> tuple[ClassScores, ...]:
        """The classes with the lowest score, the lowest first; those without one stay out."""
        if by not in _COLUMNS:
            raise ValueError(f"{by!r} is no score of a class. Expected {', '.join(_COLUMNS)}.")
        known = [each for each in self.classes if getattr(each, by) is not None]
        return tuple(sorted(known, key=lambda each: float(getattr(each, by)))[:num])

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Writes `table`, exact."""
        rows = self.table()
        with Path(path).open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)

    def __str__(self) -> str:
        widest = max(map(len, ["weighted", *(printable(each.name, is_one_line=True) for each in self.classes)]))
        lines = [f"{'class':{widest}}  {'precision':>19}  {'recall':>19}  {'F1':>19}  {'support':>7}  {'predicted':>9}"]
        for each in self.classes:
            cells = "  ".join(f"{_cell(each, column):>19}" for column in _COLUMNS)
            name = printable(each.name, is_one_line=True)
            lines.append(f"{name:{widest}}  {cells}  {each.support:7,}  {each.predicted:9,}")
        for name, values in self.means.items():
            cells = "  ".join(f"{'-' if value is None else f'{value:.3f}':>19}" for value in values.values())
            lines.append(f"{name:{widest}}  {cells}")
        return "\n".join(lines)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        rows = [
            {
                "class": each.name,
                **{column: _cell(each, column) for column in _COLUMNS},
                "support": each.support,
                "predicted": each.predicted,
            }
            for each in self.classes
        ]
        return titled_table("scores by class, with 95 % intervals", rows)


def _f1(column: str, share: float) -> float:
    return 2 * share / (1 + share) if column == "f1" else share


def _cell(scores: ClassScores, column: str) -> str:
    value = getattr(scores, column)
    if value is None:
        return "-"
    low, high = scores.intervals[column]
    return f"{value:.3f} ({low:.3f}-{high:.3f})"
