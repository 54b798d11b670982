"""Settings: what may be set on a learner, and how a wrong name or value is refused."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from featstore.images.views import Augment, View
from featstore.store.store import FeatureStore

FIXED = ("classes", "task", "device")
"""What is set once, when a learner is made."""

_CHOICES = {"on_missing": ("error", "images", "extract"), "on_error": ("raise", "skip")}
_MAY_BE_NONE = ("store", "augment")
_KINDS: dict[str, tuple[type, str]] = {
    "store": (FeatureStore, 'a store, FeatureStore("features")'),
    "augment": (Augment, 'an augmentation with its seeds, Augment("flip", seeds=range(4))'),
    "view": (View, "a view, model.view.resized(size=64) for example"),
    "batch_size": (int, "a number of images"),
}


def unknown(name: str, known: Iterable[str]) -> AttributeError:
    """Why a learner has no attribute `name`; `known` are those it has."""
    hint = f"Its attributes are {', '.join(known)}."
    if name == "precompute":
        hint = (
            "There is no precompute mode: stored features are used where what is frozen and the augmentation "
            "allow it, and learn.inputs says so. See freeze_to(...), unfreeze() and augment."
        )
    return AttributeError(f"A Learner has no attribute {name!r}. {hint}")


def checked(name: str, value: Any) -> Any:
    """`value` as the setting `name` keeps it; names without a rule take anything.

    Raises:
        TypeError: if it is of another kind.
        ValueError: if it is none of the choices, or too small.
    """
    if name in _CHOICES and value not in _CHOICES[name]:
        *others, last = _CHOICES[name]
        raise ValueError(f"{name} is {value!r}; expected {', '.join(others)} or {last}.")
    is_none = value is None and name in _MAY_BE_NONE
    if name in _KINDS and not is_none and not isinstance(value, _KINDS[name][0]):
        raise TypeError(f"{name} is {value!r}; expected {_KINDS[name][1]}{', or None' * (name in _MAY_BE_NONE)}.")
    if name == "batch_size" and value < 1:
        raise ValueError(f"batch_size is {value}; expected at least 1.")
    return value.evaluation if name == "view" else value
