"""The errors that featstore raises about files, stores, models and images.

Wrong arguments are ``ValueError`` and ``TypeError``; everything here is about the state of something outside the call:
a store that lacks rows, a file that is damaged, an image that can't be read. Each message says what is wrong, what was
expected and what to do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from featstore.remedies import Remedy

OnError = Literal["raise", "skip"]
"""What an image that can't be read or decoded does to the work: `raise` stops it; `skip` leaves the image out."""

Doubtful = Literal["note", "refuse"]
"""What an image does that was decoded, but looks damaged or too dark: it is named, or counts as one that can't be
decoded."""


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """ValueError that names the argument and lists its choices, unless `value` is one of them.

    >>> check_choice("on_error", "ignore", ["raise", "skip"])
    Traceback (most recent call last):
    ValueError: on_error is 'ignore'; expected raise or skip.
    """
    if value not in choices:
        *others, last = choices
        raise ValueError(f"{name} is {value!r}; expected {', '.join(others)} or {last}.")


class FeatureStoreError(Exception):
    """Anything featstore refuses to guess about; the parent of all errors here.

    Args:
        message: what is wrong, what was expected and what to do; with a remedy, as far as the words that lead to it.
        remedy: what to run. The text of the error ends with it and a full stop.

    Attributes:
        lead: the message without the remedy.
        remedy: or None, where the message says in words what to do.
    """

    def __init__(self, message: str = "", *, remedy: Remedy | None = None) -> None:
        super().__init__(message if remedy is None else f"{message} {remedy}.")
        self.lead, self.remedy = message, remedy


class MissingFeaturesError(FeatureStoreError):
    """The store holds a fitting feature set, but not all the rows that were asked for."""


class FactsDifferError(FeatureStoreError):
    """What was stored, asked for or planned isn't what is there; the message names the facts that differ."""


class AmbiguousRequestError(FeatureStoreError):
    """Several stored things fit a request that left facts open; the message lists them."""


class DamagedFileError(FeatureStoreError):
    """A part or an image table that is truncated, altered, or of an unknown newer format."""


class NewerFormatError(DamagedFileError):
    """A part or an image table of a format version that this featstore doesn't know; the file itself may be sound."""


class ImageError(FeatureStoreError):
    """One image that can't be read, decoded or rendered.

    Attributes:
        image: the image's id or path.
        reason: why it failed, without the image's name.
    """

    def __init__(self, image: str, reason: str) -> None:
        super().__init__(f"{image}: {reason}")
        self.image = image
        self.reason = reason

    def __reduce__(self) -> tuple[Any, ...]:
        # An exception pickles as its class and the arguments of its parent's `__init__`, here the message alone.
        return type(self), (self.image, self.reason), vars(self)


class ModelError(FeatureStoreError):
    """A model that can't be cut, keyed, or cached as a pure function of one image; the message names the module."""


class WeightsError(FeatureStoreError):
    """A weights file that is absent, unreadable, or doesn't fit the model."""
