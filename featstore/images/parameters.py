"""Parameters: what a policy can be told, of which kind and in which range, and how a flag has it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from featstore.digest import Json

UNTIL = ".."
"""Between the two ends of a `Span`, as a flag has it."""


@dataclass(frozen=True)
class Number:
    """A float from `low` to `high`."""

    default: float
    low: float = 0.0
    high: float = 1.0

    def checked(self, value: Any) -> float:
        """`value` as the one float that it stands for. ValueError without text where it is none in the range."""
        if isinstance(value, bool) or not isinstance(value, Real) or not self.low <= (number := float(value)):
            raise ValueError
        if number > self.high:
            raise ValueError
        return number + 0.0  # -0.0 is equal to 0.0, and in JSON it isn't

    def parsed(self, text: str) -> Any:
        """What a flag's text stands for, not yet checked; ValueError for none."""
        return float(text)

    def text(self, value: Json) -> str:
        """A checked value as a flag has it."""
        return f"{value!r}".removesuffix(".0")

    @property
    def expected(self) -> str:
        """What a value may be, in words."""
        return f"a number from {self.low:g} to {self.high:g}"


@dataclass(frozen=True)
class Whole:
    """An integer from `low` to `high`."""

    default: int
    low: int = 0
    high: int = 1

    def checked(self, value: Any) -> int:
        """As `Number.checked`."""
        if isinstance(value, bool) or not isinstance(value, Integral) or not self.low <= int(value) <= self.high:
            raise ValueError
        return int(value)

    def parsed(self, text: str) -> Any:
        """As `Number.parsed`."""
        return int(text)

    def text(self, value: Json) -> str:
        """As `Number.text`."""
        return str(value)

    @property
    def expected(self) -> str:
        """As `Number.expected`."""
        return f"a whole number from {self.low} to {self.high}"


@dataclass(frozen=True)
class Span:
    """Two values of one kind, the first no greater than the second; `end` says of which kind both are."""

    default: tuple[float, float]
    end: Number | Whole

    def checked(self, value: Any) -> list[Json]:
        """As `Number.checked`."""
        if isinstance(value, str) or not isinstance(value, Sequence) or len(value) != 2:
            raise ValueError
        low, high = (self.end.checked(each) for each in value)
        if low > high:
            raise ValueError
        return [low, high]

    def parsed(self, text: str) -> Any:
        """As `Number.parsed`."""
        low, _, high = text.partition(UNTIL)
        return [self.end.parsed(low), self.end.parsed(high)]

    def text(self, value: Json) -> str:
        """As `Number.text`."""
        return UNTIL.join(map(self.end.text, value))

    @property
    def expected(self) -> str:
        """As `Number.expected`."""
        kind = self.end.expected.partition(" ")[2].replace("number", "numbers")
        return f"two {kind}, the smaller first"


@dataclass(frozen=True)
class Word:
    """One of `words`."""

    default: str
    words: tuple[str, ...]

    def checked(self, value: Any) -> str:
        """As `Number.checked`."""
        if value not in self.words:
            raise ValueError
        return str(value)

    def parsed(self, text: str) -> Any:
        """As `Number.parsed`."""
        return text

    def text(self, value: Json) -> str:
        """As `Number.text`."""
        return str(value)

    @property
    def expected(self) -> str:
        """As `Number.expected`."""
        return f"{', '.join(self.words[:-1])} or {self.words[-1]}"


Parameter = Number | Whole | Span | Word
