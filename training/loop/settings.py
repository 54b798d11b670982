"""Settings: what may be set on a learner or given to a fit, and how a wrong name or value is refused."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Set
from numbers import Integral, Real
from os import PathLike
from typing import Any, get_args

from torch import nn

from featstore.errors import OnError, check_choice
from featstore.images.image_set import ImageSet
from featstore.images.views import Augment, View
from featstore.store.store import FeatureStore
from training.loop.averages import EMA, SWA
from training.loop.steps import TRAINING_PRECISIONS

FIXED = ("classes", "task", "device")
"""What is set once, when a learner is made."""

_CHOICES = {
    "on_missing": ("error", "images", "extract"),
    "on_error": get_args(OnError),
    "keep": ("last", "best"),
    "precision": TRAINING_PRECISIONS,
    "sampling": ("shuffled", "balanced"),
    "batch_norm": ("train", "frozen"),
}
_MAY_BE_NONE = (
    "store",
    "augment",
    "workers",
    "loss",
    "checkpoint",
    "snapshot",
    "patience",
    "class_weights",
    "clip",
    "average",
)
_WEIGHTS = '"balanced", or a number a class, in their order or by name, {"cat": 1.0, "dog": 2.5}'
_KINDS: dict[str, tuple[Any, str]] = {
    "store": (FeatureStore, 'a store, FeatureStore("features")'),
    "augment": (Augment, 'an augmentation with its seeds, Augment("flip", seeds=range(4))'),
    "view": (View, "a view, model.view.resized(size=64) for example"),
    "loss": (Callable, "a function of (logits, targets), torch.nn.functional.cross_entropy for example"),
    "optimizer": ((str, Callable), "adamw, adam, sgd, or a function that takes parameter groups"),
    "on_epoch_end": (Callable, "a function that takes an epoch's record, or a list of such"),
    "checkpoint": ((str, PathLike), "a folder's name"),
    "snapshot": ((str, PathLike), "a folder's name"),
    "monitor": ((str, tuple), 'the name of a number on record, or ("name", "max")'),
    "patience": (Integral, "a number of epochs"),
    "label_smoothing": (Real, "a number of at least 0 and below 1"),
    "class_weights": ((str, Iterable), _WEIGHTS),
    "clip": (Real, "a number above 0"),
    "accumulate": (Integral, "a number of batches"),
    "average": ((EMA, SWA), "EMA(decay) or SWA(start)"),
    "num_cycles": (Integral, "a number of cycles"),
    "cycle_len": (Integral, "a number of epochs"),
    "cycle_mult": (Integral, "a whole number"),
    "batch_size": (Integral, "a number of images"),
    "epochs": (Integral, "a number of epochs"),
    "seed": (Integral, "a whole number"),
    "workers": (Integral, "a number of threads"),
    "weight_decay": (Real, "a number, 0.01 for example"),
}
_LOWEST = {
    "batch_size": 1,
    "epochs": 1,
    "num_cycles": 1,
    "cycle_len": 1,
    "cycle_mult": 1,
    "seed": 0,
    "workers": 0,
    "weight_decay": 0,
    "patience": 1,
    "label_smoothing": 0,
    "clip": 0,
    "accumulate": 1,
}
_EPOCHS = 1_000_000  # more is a slip of the pen, and would end nowhere
_HIGHEST = {
    "seed": 2**63 - 1,  # that torch's generators take
    "label_smoothing": 1,  # all of it
    "epochs": _EPOCHS,
    "num_cycles": _EPOCHS,
    "cycle_len": _EPOCHS,
}


def check_given(model: object, images: object, store: object) -> None:
    """Checks what a learner is made of.

    Raises:
        TypeError: names what is of another kind.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f'model is {model!r}; expected a model, backbone("resnet34") for example.')
    if not isinstance(images, ImageSet):
        raise TypeError(f'images are {images!r}; expected an image set, ImageSet.from_folder("photos") for example.')
    if store is not None and not isinstance(store, FeatureStore):
        raise TypeError(f'store is {store!r}; expected a store, FeatureStore("features") for example.')


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
    """`value` as the setting or argument `name` keeps it; names without a rule take anything.

    Raises:
        TypeError: if it is of another kind.
        ValueError: if it is none of the choices, or too small.
    """
    if name in _CHOICES:
        check_choice(name, value, _CHOICES[name])
    if name not in _KINDS or (value is None and name in _MAY_BE_NONE):
        return value
    kind, words = _KINDS[name]
    if not isinstance(value, kind) or isinstance(value, bool):  # True would pass for 1
        raise TypeError(f"{name} is {value!r}; expected {words}{', or None' * (name in _MAY_BE_NONE)}.")
    if name in _LOWEST and not _LOWEST[name] <= value < math.inf:
        raise ValueError(f"{name} is {value}; expected at least {_LOWEST[name]}{', and finite' * (kind is Real)}.")
    if name == "clip" and not value:
        raise ValueError("clip is 0, which leaves nothing of any gradient; expected more than 0.")
    if name in _HIGHEST and value > _HIGHEST[name]:
        raise ValueError(f"{name} is {value}; expected at most {_HIGHEST[name]}.")
    if kind in (Integral, Real):  # numpy's go into no JSON
        return int(value) if kind is Integral else float(value)
    if name == "class_weights":
        return _class_weights(value)
    return value.evaluation if name == "view" else value


def _class_weights(value: Any) -> Any:
    """Numbers in the order given, or by the names of classes; a set has neither."""
    if value == "balanced":
        return value
    try:
        if isinstance(value, Mapping):
            return {str(name): float(each) for name, each in value.items()}
        if not isinstance(value, str | Set):
            return tuple(float(each) for each in value)
    except (TypeError, ValueError):  # what isn't a number
        pass
    raise ValueError(f"class_weights is {value!r}; expected {_WEIGHTS}.")
