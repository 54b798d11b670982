"""Swept: the settings of a sweep with what came of them, and the table of all of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import NormalDist, fmean
from typing import Any

from featstore.digest import Json
from featstore.errors import FeatureStoreError
from featstore.extraction.remedy import seed_ranges
from featstore.html import titled_table
from featstore.images.views import Augment
from featstore.words import counted
from training.experiments.grid import Setting, setting_digest, setting_facts
from training.learner import Learner
from training.loop.history import Record
from training.loop.monitor import Monitor
from training.scores.metrics import student_interval, wilson_interval
from training.sidecar import Score, finite


@dataclass(frozen=True, kw_only=True, eq=False)
class Member:
    """One setting of a sweep, and what came of it.

    Attributes:
        setting: as it was asked for.
        parts: of each fold or seed the record that counts: of the last epoch, or with ``keep="best"`` of the best.
        curves: of each the monitored number after each epoch.
        epochs: that were trained.
        planned: that were asked for.
        seconds: that training took; of heads that trained together their shares.
        failure: why there is no score; None if there is one.
        num_images: that a part was scored on.
        is_whole: whether it went as far as was asked for, patience included: else halving dropped it.
    """

    setting: Setting
    parts: tuple[Record, ...]
    curves: tuple[tuple[float, ...], ...]
    epochs: int
    planned: int
    seconds: float
    failure: str | None = None
    num_images: int = 0
    is_whole: bool = True

    @property
    def name(self) -> str:
        """A digest of its setting."""
        return setting_digest(self.setting)

    def mean(self, name: str) -> float:
        """Of a score over the parts; NaN where there is none."""
        values = [each[name] for each in self.parts if name in each]
        return fmean(values) if values and self.failure is None else math.nan

    def score(self, name: str) -> Score:
        """A score, where it lies with 95 % confidence, and by what: over several parts by Student's t, else Wilson."""
        value = finite(self.mean(name))
        values = [each[name] for each in self.parts if name in each]
        if value is None:
            return Score(None)
        if len(values) > 1:
            return Score(value, student_interval(name, values), "student")
        if name in ("accuracy", "top5") and self.num_images:
            return Score(value, wilson_interval(round(value * self.num_images), self.num_images), "wilson")
        return Score(value)

    def interval(self, name: str) -> tuple[float, float] | None:
        """Where a score lies with 95 % confidence; None where that isn't known."""
        return self.score(name).interval

    @classmethod
    def kept(cls, setting: Setting, facts: Mapping[str, Any]) -> Member:
        """That of which `facts` were written."""

        def number(value: Any) -> float:
            return math.nan if value is None else float(value)

        return cls(
            setting=setting,
            parts=tuple({name: number(value) for name, value in each.items()} for each in facts["parts"]),
            curves=tuple(tuple(number(value) for value in each) for each in facts["curves"]),
            epochs=int(facts["epochs"]),
            planned=int(facts["planned"]),
            seconds=float(facts["seconds"]),
            failure=facts["failure"],
            num_images=int(facts["num_images"]),
            is_whole=bool(facts["is_whole"]),
        )

    def facts(self) -> dict[str, Json]:
        """As JSON, which has no numbers that aren't finite."""

        def number(value: float) -> Json:
            return value if math.isfinite(value) else None

        return {
            "setting": setting_facts(self.setting),
            "parts": [{name: number(value) for name, value in each.items()} for each in self.parts],
            "curves": [[number(value) for value in each] for each in self.curves],
            "epochs": self.epochs,
            "planned": self.planned,
            "seconds": self.seconds,
            "failure": self.failure,
            "num_images": self.num_images,
            "is_whole": self.is_whole,
        }

    def place(self, monitor: Monitor) -> tuple[object, ...]:
        """What members are sorted by: whole ones first, then those that came farther; then by loss, then by name."""
        loss = monitor.loss({monitor.name: self.mean(monitor.name)})
        is_whole = self.is_whole and self.failure is None
        second = Monitor().loss({"valid_loss": self.mean("valid_loss")})  # of few images many scores are equal
        return self.failure is not None, not is_whole, 0 if is_whole else -self.epochs, loss, second, self.name


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Sweep:
    """What a sweep came to; made by `sweep`. Prints as a table, the best first.

    Attributes:
        members: the settings that were tried, the best first: whole ones before those that were dropped.
        monitor: the number that they are judged by.
        told: what decided the scores beside the settings, in words.
        num_missing: settings that have no result yet: of other shares.
    """

    members: tuple[Member, ...]
    monitor: Monitor
    told: str
    num_missing: int = 0
    _learner: Callable[[Member], Learner] = field(kw_only=True)

    @property
    def table(self) -> list[dict[str, Any]]:
        """A row a setting: its values, the score with its interval, epochs and seconds, and what ended it early."""
        names = [*dict.fromkeys(name for each in self.members for name in each.setting)]
        rows = []
        for each in self.members:
            ends = each.interval(self.monitor.name) or (None, None)
            ended = each.failure or ("" if each.is_whole else f"dropped after {each.epochs} of {each.planned} epochs")
            rows.append(
                {
                    **{name: shown(each.setting.get(name)) for name in names},
                    self.monitor.name: each.mean(self.monitor.name),
                    "from": ends[0],
                    "to": ends[1],
                    "epochs": each.epochs,
                    "seconds": round(each.seconds, 3),
                    "ended": ended,
                }
            )
        return rows

    def frame(self) -> dict[str, list[Any]]:
        """Column -> values, one a setting: what ``pandas.DataFrame`` takes."""
        rows = self.table
        return {name: [row[name] for row in rows] for name in (rows[0] if rows else ())}

    @property
    def foot(self) -> str:
        """What the scores are of, and how far the best one is too good."""
        lines = [self.told]
        if self.num_missing:
            lines.append(f"{counted(self.num_missing, 'setting')} without a result yet (other shares)")
        whole = [each for each in self.members if each.failure is None]
        if len(whole) > 1:
            lines.append(
                f"the best of {len(whole)} is chosen by the images that score it, so its score is optimistic"
                f"{self._optimism(whole)}: score it on others before you tell it"
            )
        return "; ".join(lines)

    def _optimism(self, scored: Sequence[Member]) -> str:
        """By how much the best of so many equal settings would lie above their common mean, in words."""
        interval = scored[0].interval(self.monitor.name)
        if interval is None:
            return ""
        error = (interval[1] - interval[0]) / (2 * NormalDist().inv_cdf(0.975))
        highest = NormalDist().inv_cdf((len(scored) - 0.375) / (len(scored) + 0.25))  # Blom's expected maximum
        return f", by up to about {error * highest:.2g}"

    def __repr__(self) -> str:
        rows = [{name: _cell(value) for name, value in row.items()} for row in self.table]
        if not rows:
            return f"Sweep(no settings; {self.told})"
        names = [name for name in rows[0] if name != "ended" or any(row["ended"] for row in rows)]
        widths = {name: max(len(name), *(len(row[name]) for row in rows)) for name in names}
        lines = ["  ".join(f"{name:>{widths[name]}}" for name in names)]
        lines += ["  ".join(f"{row[name]:>{widths[name]}}" for name in names) for row in rows]
        return "\n".join([*lines, self.foot])

    def _repr_html_(self) -> str:
        return titled_table(self.foot, self.table)

    def best(self) -> Learner:
        """The learner of the best setting, to go on with: ``learn.unfreeze(); learn.fit(...)``.

        Its weights are those that were scored, of several seeds the first one's. Of folds, whose heads each lack some
        images, it is fitted anew to the training images of the split that the images have.

        Raises:
            FeatureStoreError: if no setting has a score.
        """
        if not self.members or self.members[0].failure is not None:
            why = self.members[0].failure if self.members else "none was tried here"
            raise FeatureStoreError(f"No setting has a score: {why}. Try others.")
        return self._learner(self.members[0])


def shown(value: Any) -> Any:
    """A value of a setting as a cell of a table."""
    if value is None or isinstance(value, str | int | float | bool):
        return value
    if isinstance(value, Augment):
        return f"{value.policy.describe()}, seeds {'fresh' if value.seeds == 'fresh' else seed_ranges(value.seeds)}"
    return "+".join(map(str, value)) if isinstance(value, list | tuple) else repr(value)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
