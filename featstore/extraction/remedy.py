"""Remedy: a request as the command line that fulfils it, or as the Python call where no command can say it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from featstore.digest import Json
from featstore.extraction.defaults import DEFAULT_SPLIT_SEED, DEFAULT_VALID
from featstore.files.storage_types import DEFAULT_STORAGE_TYPE
from featstore.images.augmentation import Policy
from featstore.images.decoders import POLICIES
from featstore.images.image_set import ImageSet
from featstore.images.origins import made_by
from featstore.images.views import Augment, View
from featstore.models.names import DEFAULT_PRECISION
from featstore.models.staged import StagedModel
from featstore.remedies import Call, Command


def extract_remedy(
    model: StagedModel,
    images: ImageSet,
    store: Path,
    *,
    cuts: Sequence[str],
    view: View | None = None,
    augment: Augment | None = None,
    dtype: str | None = None,
    precision: str | None = None,
    on_error: str = "raise",
) -> Command | Call:
    """How to extract `cuts` (each ``CUT`` or ``CUT:REDUCTION``): a command, else the Python call.

    A command needs images from a kind of source that a flag can name (`origins`), a backbone that a name, a file's
    function or a run gives, and a policy with a spelling (no function of a person's own). It holds every flag that
    differs from its default.
    """
    flags = _flags(model, images, view, augment)
    if flags is None:
        return _python_call(
            model, cuts=cuts, view=view, augment=augment, dtype=dtype, precision=precision, on_error=on_error
        )
    of_images, of_model, of_view, of_augment = flags
    words = ["featstore", "extract", *of_images, "--store", str(store), *of_model]
    for cut in cuts:
        words += ["--cut", cut]
    words += [*of_view, *of_augment]
    words += _unless("--dtype", dtype, DEFAULT_STORAGE_TYPE) + _unless("--precision", precision, DEFAULT_PRECISION)
    words += _unless("--on-error", on_error, "raise")
    return Command(*words)


def image_flags(images: ImageSet) -> list[str] | None:
    """The image flags that make this set, or the one it was selected from; None where no flags can.

    Splits that were dealt in Python in another way than the programs deal (folds, `with_splits`) have none.
    """
    origin = made_by(images)
    if origin is None:
        return None
    flags, own_splits = origin.flags(images), origin.own_splits(images)
    split = images.origin.get("split")
    if own_splits is not None:
        return flags if split is None and own_splits == images.splits.tolist() else None
    if split is None:
        return None if any(images.splits != "") else [*flags, "--valid", "0"]
    if split["groups"] or not split["stratify"]:
        return None
    flags += _unless("--valid", split["valid"], DEFAULT_VALID) + _unless("--test", split["test"], 0)
    return flags + _unless("--split-seed", split["seed"], DEFAULT_SPLIT_SEED)


def model_flags(model: StagedModel) -> list[str] | None:
    """The flags that make this model, or None where no flags can."""
    if "backbone" not in model.origin:
        return None
    flags = ["--backbone", str(model.origin["backbone"]), *_unless("--weights", model.origin.get("weights"), "DEFAULT")]
    return flags + _unless("--weights-prefix", model.origin.get("weights_prefix"), None)


def view_flags(view: View, default: View) -> list[str] | None:
    """The flags that turn the evaluation view `default` into `view`'s, or None where no flags can."""
    wanted, start = view.evaluation, default.evaluation
    turned = replace(start, interpolation=wanted.interpolation)  # the nearest pixel has no antialiasing
    unflagged = (start.apply_exif, turned.antialias, start.channels, start.squash)
    if (wanted.apply_exif, wanted.antialias, wanted.channels, wanted.squash) != unflagged:
        return None
    flags = _unless("--size", wanted.size, start.size)
    scaled = start.resized(size=wanted.size) if wanted.size != start.size else start
    flags += _unless("--resize", wanted.resize, scaled.resize)
    flags += _unless("--mean", _numbers(wanted.mean), _numbers(start.mean))
    flags += _unless("--std", _numbers(wanted.std), _numbers(start.std))
    flags += _unless("--interpolation", wanted.interpolation, start.interpolation)
    words = {policy: word for word, policy in POLICIES.items()}
    return flags + _unless("--decode", words[wanted.decode], words[start.decode])


def seed_ranges(seeds: Sequence[int]) -> str:
    """Seeds as a flag says them.

    >>> seed_ranges([0, 1, 2, 3, 7, 9, 10])
    '0-3,7,9-10'
    """
    runs: list[list[int]] = []
    for seed in sorted(seeds):
        if runs and seed == runs[-1][-1] + 1:
            runs[-1].append(seed)
        else:
            runs.append([seed])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _flags(
    model: StagedModel, images: ImageSet, view: View | None, augment: Augment | None
) -> tuple[list[str], list[str], list[str], list[str]] | None:
    of_images, of_model = image_flags(images), model_flags(model)
    of_view = view_flags(view or model.view, model.named_view)
    if of_images is None or of_model is None or of_view is None:
        return None
    of_augment: list[str] = []
    if augment is not None:
        if augment.policy.spelled is None or augment.seeds == "fresh":
            return None
        of_augment = ["--augment", augment.policy.spelled, "--seeds", seed_ranges(augment.seeds)]
    return of_images, of_model, of_view, of_augment


def _python_call(
    model: StagedModel,
    *,
    cuts: Sequence[str],
    view: View | None,
    augment: Augment | None,
    dtype: str | None,
    precision: str | None,
    on_error: str,
) -> Call:
    """A call in the words of the documentation: `model`, `images`, `store`, `view` and `augment` are the caller's."""
    arguments: dict[str, str] = {"cuts": repr(list(cuts))}
    if view is not None and view.evaluation != model.view.evaluation:
        arguments["view"] = "view"
    if augment is not None and augment.seeds != "fresh":
        policy = _in_python(augment.policy)
        arguments["augment"] = "augment" if policy is None else f"Augment({policy}, seeds={list(augment.seeds)})"
    if dtype not in (None, DEFAULT_STORAGE_TYPE):
        arguments["dtype"] = repr(dtype)
    if precision not in (None, DEFAULT_PRECISION):
        arguments["precision"] = repr(precision)
    if on_error != "raise":
        arguments["on_error"] = repr(on_error)
    return Call(function="extract", others=("images", "store"), options=arguments)


def _in_python(policy: Policy) -> str | None:
    """What `Augment` takes for this policy; None where a function has no name that could be written."""
    if policy.spelled is not None:
        return repr(policy.spelled)
    if policy.parts:
        parts = [_in_python(part) for part in policy.parts]
        return None if None in parts else f"[{', '.join(map(str, parts))}]"
    name = getattr(policy.function, "__name__", "")
    return name if name.isidentifier() else None


def _unless(flag: str, value: Json, default: Json) -> list[str]:
    return [] if value is None or value == default else [flag, str(value)]


def _numbers(values: Sequence[float]) -> str:
    return ",".join(str(value) for value in values)
