"""Provenance: what a run's numbers come from, as its sidecar tells it: taken from the fits that were made."""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch

from featstore import __version__
from featstore.digest import Json
from featstore.images.digests import KnownDigests
from featstore.images.views import Augment
from featstore.models.staged import StagedModel
from featstore.store.features import Features
from training.inputs.derive import Source
from training.inputs.situation import training_words
from training.loop.fitting import Begun
from training.scores.metrics import wilson_interval
from training.sidecar import Dealt, Score, Sidecar, finite
from training.splits import dealt
from training.tta import Scored


@dataclass(frozen=True, kw_only=True, eq=False)
class FitRecord:
    """What is known of one fit.

    Attributes:
        asked: what decided its numbers, see `Begun.asked`.
        trains: the stages that did, in words.
        is_of_head: whether the head alone did.
        reads: ``features`` or ``images``.
        keys: of the feature sets that were read.
        train: the images that it trained on.
        made: what has come of it, see `Begun.made`.
    """

    asked: Mapping[str, Json]
    trains: str
    is_of_head: bool
    reads: str
    keys: tuple[str, ...]
    train: Dealt
    made: Mapping[str, Json] = field(default_factory=dict)

    @classmethod
    def of(cls, begun: Begun, augment: Augment | None, known: KnownDigests) -> FitRecord:
        """That of a fit that begins."""
        fitting = begun.fitting
        train, valid = fitting.train.source, fitting.valid
        return cls(
            asked=begun.asked(augment),
            trains=training_words(fitting.model),
            is_of_head=training_words(fitting.model, with_head=False) == "nothing",
            reads=train.kind,
            keys=(*keys_of(train), *(() if valid is None else keys_of(valid.source))),
            train=dealt(train.images, train.images.digests(known)),
            made=begun.made(),
        )

    @classmethod
    def kept(cls, facts: Mapping[str, Json]) -> FitRecord:
        """That of a head's fit of which `facts` were written."""
        given = dict(facts)
        asked, train = given.pop("configuration"), given.pop("train")
        return cls(
            asked=asked,
            trains=given.pop("trains"),
            is_of_head=True,
            reads=given.pop("reads"),
            keys=tuple(given.pop("keys")),
            train=Dealt(train["images"], train["digest"]),
            made=given,
        )

    def beside(self, begun: Begun, augment: Augment | None) -> FitRecord:
        """That of another fit, which begins on the same batches: the images needn't be looked at again."""
        return replace(self, asked=begun.asked(augment), made=begun.made())

    def after(self, begun: Begun) -> FitRecord:
        """The same fit where it has come to."""
        return replace(self, made=begun.made())

    def facts(self) -> dict[str, Json]:
        """As JSON."""
        return {
            "configuration": dict(self.asked),
            "trains": self.trains,
            "reads": self.reads,
            "keys": [*dict.fromkeys(self.keys)],
            "train": self.train.facts(),
            **self.made,
        }


def keys_of(source: Source) -> tuple[str, ...]:
    """Of the feature sets that a source reads; none of images, or of arrays."""
    rows = source.features if source.kind == "features" else ()
    return tuple(each.key for each in rows if isinstance(each, Features))


def start_of(backbone: StagedModel) -> dict[str, Json] | None:
    """The run that a backbone comes from; None if it comes from none."""
    run = backbone.origin.get("run")
    return None if run is None else {"run": run, "identity": backbone.origin["run_identity"]}


def sidecar_of(
    facts: Mapping[str, Json],
    fits: Sequence[FitRecord],
    *,
    named: Mapping[str, Json],
    start: Mapping[str, Json] | None,
    before: Sidecar | None,
    scored: tuple[Scored, Mapping[str, float]] | None,
    known: KnownDigests,
    trained_on: int | None,
    **more: Json,
) -> Sidecar:
    """What run.json says of a learner that is saved.

    Args:
        facts: of the run, as `saved.run_facts` gives them.
        fits: that were made, in order.
        named: how the backbone was named when the learner was made, its `origin`.
        start: the run that the learner went on from.
        before: what that run says, if the learner was loaded from it: where none was made since, its fits count.
        scored: what the model says of the images held out, and its scores; None where there are none.
        known: of the images' contents.
        trained_on: how many of the images held out some fit of this model has trained on; None without such.
        more: further facts.
    """
    made = _again(before, facts, named) if not fits and before is not None else _of_fits(fits, facts, named)
    keys, split = [*made.keys], {name: each for name, each in made.split.items() if name == "train"}
    if not fits:
        more = {**made.more, **{name: value for name, value in more.items() if value}}
    scores: dict[str, Score] = {}
    if scored is not None:
        found, numbers = scored
        keys += keys_of(found.source)
        split["valid"] = dealt(found.images, found.images.digests(known))
        scores = scores_of(numbers)
    model = facts["model"]
    return replace(
        made,
        keys=tuple(dict.fromkeys(keys)),
        trunk=model["digests"].get(model["default_cut"]),
        versions=versions(),
        split=split,
        scored=None if scored is None else "valid",
        scores=scores,
        start=start,
        when=None,
        more={**more, "calibration": facts.get("calibration"), "scored_trained_on": trained_on},
    )


def _of_fits(fits: Sequence[FitRecord], facts: Mapping[str, Json], named: Mapping[str, Json]) -> Sidecar:
    return Sidecar(
        kind="learner" if not fits else "head" if all(each.is_of_head for each in fits) else "finetune",
        configuration=configuration(facts, named, [each.asked for each in fits]),
        fits=[each.facts() for each in fits],
        keys=[key for each in fits for key in each.keys],
        split={"train": fits[-1].train} if fits else {},
        seconds=round(sum(each.made["seconds"] for each in fits), 3) if fits else None,
    )


def _again(before: Sidecar, facts: Mapping[str, Json], named: Mapping[str, Json]) -> Sidecar:
    """What a run says whose model was loaded from another and is saved once more: the other's fits made it."""
    now = configuration(facts, named, ())
    changed = {name: now[name] for name in ("image_size", "num_classes", "temperature")}
    return replace(before, kind=before.kind or "learner", configuration={**now, **before.configuration, **changed})


def configuration(
    facts: Mapping[str, Json], named: Mapping[str, Json], fits: Sequence[Mapping[str, Json]]
) -> dict[str, Json]:
    """What decided a run's numbers, flat: of the model, then of its fits.

    A setting in which several fits differ is a text, ``0.003 then 1e-05``; epochs are those of all together.
    """
    model, made_by = facts["model"], named.get("architecture") or {}
    of_model = {
        "backbone": made_by.get("name") or (_own_file(made_by) if made_by else model["name"]),
        "weights": named.get("weights", named.get("run")),
        "cut": model["default_cut"],
        "reduce": model["reduction"],
        "head": facts["head"]["name"],
        "image_size": model["view"]["size"],
        "task": facts["task"],
        "num_classes": len(facts["classes"]),
        "temperature": (facts.get("calibration") or {}).get("temperature"),
        "num_fits": len(fits),
    }
    return {**of_model, **{name: _over(fits, name) for name in dict.fromkeys(name for fit in fits for name in fit)}}


def versions() -> dict[str, str]:
    """Of what decides numbers, as it runs here."""
    found = {"featstore": __version__, "python": platform.python_version(), "torch": str(torch.__version__)}
    with suppress(PackageNotFoundError):  # not imported for the sake of its number
        found["torchvision"] = version("torchvision")
    return {**found, "numpy": np.__version__}


def scores_of(scored: Mapping[str, float]) -> dict[str, Score]:
    """Scores of so many ``images``, with their intervals: shares of images have Wilson's, others have none."""
    count = int(scored["images"])
    found = {}
    for name, value in scored.items():
        if name in _SHARES and math.isfinite(value):
            found[name] = Score(value, wilson_interval(round(value * count), count), "wilson")
        elif name != "images":
            found[name] = Score(finite(value))
    return found


_SHARES = ("accuracy", "top5")


def _own_file(made_by: Mapping[str, Json]) -> str:
    return f"{Path(made_by['file']).name}:{made_by['function']}"


def _over(fits: Sequence[Mapping[str, Json]], name: str) -> Json:
    values = [each.get(name) for each in fits]
    if name == "epochs":
        return sum(values)
    return values[0] if all(value == values[0] for value in values) else " then ".join(map(_in_words, values))


def _in_words(value: Json) -> str:
    if isinstance(value, list):
        return ",".join(map(_in_words, value))
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
