"""Monitor: which number on record says how good an epoch was, and whether more or less of it is better."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

Direction: TypeAlias = Literal["min", "max"]

DIRECTIONS: dict[str, Direction] = {
    "valid_loss": "min",
    "train_loss": "min",
    "accuracy": "max",
    "top5": "max",
    "f1": "max",
    "map": "max",
    "r2": "max",
    "mae": "min",
    "rmse": "min",
}
"""Of the numbers that records hold by themselves."""


@dataclass(frozen=True)
class Monitor:
    """A number on record, and its better direction.

    Attributes:
        name: of the number.
        direction: max: more is better.
    """

    name: str = "valid_loss"
    direction: Direction = "min"

    @classmethod
    def of(cls, given: str | tuple[str, str], metrics: Iterable[str]) -> Monitor:
        """What a person's `given` means: a name, or (name, direction) for a metric of their own.

        Raises:
            ValueError: for a number that isn't on record, or whose better direction nobody knows.
        """
        name, direction = (given, None) if isinstance(given, str) else given
        known = ["valid_loss", "train_loss", *metrics]
        if name not in known:
            raise ValueError(f"monitor is {name!r}, which isn't on record; expected one of {', '.join(known)}.")
        own = DIRECTIONS.get(name)
        if direction not in (None, "min", "max") or (None not in (own, direction) and own != direction):
            raise ValueError(f"monitor is {given!r}; of {name} expected the direction {own or 'min or max'}.")
        if direction is None and own is None:
            raise ValueError(
                f"monitor is {name!r}, a metric of your own; whether more of it is better isn't known. Say it: "
                f'monitor=("{name}", "max").'
            )
        return cls(name, "max" if "max" in (own, direction) else "min")

    def loss(self, record: Mapping[str, float]) -> float:
        """The number of a record turned so that less is better; infinite where there is none, or no number."""
        value = record.get(self.name, math.nan)
        return math.inf if math.isnan(value) else value if self.direction == "min" else -value
