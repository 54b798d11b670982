"""The facts of a part beside its rows: what whoever computed these says, and what the store adds."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from featstore.digest import Json
from featstore.files.provenance import signature
from featstore.images.decoders import PIXEL_DIGEST
from featstore.store.spec import FeatureSpec

if TYPE_CHECKING:
    from featstore.models.staged import StagedModel


def part_facts(
    *,
    backbone: str,
    stages: Sequence[Json],
    class_tokens: int,
    prefix_tokens: int | None = None,
    profile: Json,
    probe: Json,
    pixels: str | None = None,
    rounding: Json = None,
    failed: Mapping[str, str] | None = None,
) -> dict[str, Json]:
    """What `FeatureStore.write` takes.

    Args:
        backbone: what people call the model.
        stages: up to the cut, which is the last one: see `stage_facts`.
        class_tokens: at the cut, see `StagedModel.tokens`.
        prefix_tokens: the same; default: the class tokens.
        profile: on what the rows were computed, `Trunk.profile()`.
        probe: `Probe.facts()`.
        pixels: `pixel_digest` by the view's decode policy, where images were read; default: none were.
        rounding: of scaled rows what is known of their error, `Rounding.facts()`; else None.
        failed: digest (hexadecimal) -> reason, of images that have no row because they failed; default: none.
    """
    return {
        "backbone": backbone,
        "cut": stages[-1]["name"],
        "stages": list(stages),
        "class_tokens": class_tokens,
        **({} if prefix_tokens in (None, class_tokens) else {"prefix_tokens": prefix_tokens}),
        "profile": profile,
        "probe": probe,
        **({} if pixels is None else {"pixels": pixels}),
        **({} if rounding is None else {"rounding": rounding}),
        "failed": dict(failed or {}),
    }


def stage_facts(model: StagedModel, digests: Mapping[str, str], *, size: int | None = None) -> list[Json]:
    """Of each stage of a model that one can cut after; `digests` by their names, `size` of images as in `shape`."""
    return [stage_fact(name, model.layout(name), model.shape(name, size), digests[name]) for name in model.cut_points]


def stage_fact(name: str, layout: str, shape: Sequence[int], digest: str) -> Json:
    """Of one stage: layout and shape of one image's activations behind it, and the digest of the model up to there."""
    return {"name": name, "layout": layout, "shape": list(shape), "digest": digest}


def stamped(facts: Mapping[str, Json], spec: FeatureSpec) -> dict[str, Json]:
    """All facts of a new part, which is written now."""
    return {**facts, "spec": spec.facts(), "key": spec.key, "view": spec.view, "supersedes": [], **signature()}


FACTS = frozenset(
    {
        "spec",
        "key",
        "view",
        "backbone",
        "cut",
        "stages",
        "class_tokens",
        "profile",
        "probe",
        "failed",
        "supersedes",
        "who",
        "when",
    }
)
"""What readers of a part rely on: all that `docs/format.md` lists, which every version of it has had."""


def pixels_of(facts: Mapping[str, Json]) -> str:
    """The pixel digest of the decoders that a part's images were read with."""
    return str(facts.get("pixels", PIXEL_DIGEST))


def check_facts(facts: Mapping[str, Json]) -> None:
    """Checks that the facts which a store relies on are of the kinds that `docs/format.md` gives them.

    Raises:
        ValueError: names the first one that isn't.
    """
    texts, mappings = ("key", "backbone", "cut", "who", "when"), ("spec", "view", "profile", "probe", "failed")
    is_as_expected = {
        **{name: isinstance(facts[name], str) for name in texts},
        **{name: isinstance(facts[name], dict) for name in mappings},
        "class_tokens": isinstance(facts["class_tokens"], int),
        **{name: isinstance(facts[name], int) for name in ("prefix_tokens",) if name in facts},
        **{name: _is_digest(facts[name]) for name in ("pixels",) if name in facts},
        "supersedes": _are_texts(facts["supersedes"]),
        "stages": are_stages(facts["stages"]),
    }
    if is_as_expected["failed"]:
        failed = facts["failed"]
        is_as_expected["failed"] = _are_texts([*failed, *failed.values()]) and all(map(_is_digest, failed))
    for name, is_so in is_as_expected.items():
        if not is_so:
            raise ValueError(f"its fact {name} is {facts[name]!r:.60}, which the format doesn't allow")


def _is_digest(value: Json) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def _are_texts(values: Json) -> bool:
    return isinstance(values, list) and all(isinstance(value, str) for value in values)


def are_stages(stages: Json) -> bool:
    """Whether `stages`, as a file gave them, are of the form of `stage_facts`."""
    if not isinstance(stages, list) or not stages:
        return False
    return all(
        isinstance(stage, dict)
        and all(isinstance(stage.get(name), str) for name in ("name", "layout", "digest"))
        and isinstance(stage.get("shape"), list)
        and all(isinstance(size, int) for size in stage["shape"])
        for stage in stages
    )
