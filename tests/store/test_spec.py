"""FeatureSpec: one key for equal facts, another for any other fact, and differences in words."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from typing import Any

import pytest
from support.processes import Processes

from featstore import FeatureSpec, Pool, View

VIEW = View(size=32, resize=40)
SPEC = FeatureSpec(
    trunk="ab" * 32, pool=Pool("concat", "NCHW").facts(), view=VIEW.facts(), precision="fp32", dtype="float16"
)
OTHERS: dict[str, dict[str, Any]] = {
    "trunk": {"trunk": "cd" * 32},
    "reduction": {"pool": Pool("avg", "NCHW").facts()},
    "layout of the reduction": {"pool": Pool("concat", "NHWC").facts()},
    "precision": {"precision": "tf32"},
    "storage type": {"dtype": "float32"},
    "size": {"view": replace(VIEW, size=31).facts()},
    "resize": {"view": replace(VIEW, resize=41).facts()},
    "interpolation": {"view": replace(VIEW, interpolation="bicubic").facts()},
    "antialiasing": {"view": replace(VIEW, antialias=False).facts()},
    "mean": {"view": replace(VIEW, mean=(0.5, 0.5, 0.5)).facts()},
    "std": {"view": replace(VIEW, std=(0.5, 0.5, 0.5)).facts()},
    "EXIF orientation": {"view": replace(VIEW, apply_exif=False).facts()},
    "decode policy": {"view": replace(VIEW, decode="reduced").facts()},
    "policy": {"view": VIEW.with_seed("flip", 0).facts()},
    "seed": {"view": VIEW.with_seed("flip", 1).facts()},
}


@pytest.mark.parametrize("facts", OTHERS.values(), ids=OTHERS.keys())
def test_any_other_fact_is_another_key(facts: dict[str, Any]) -> None:
    assert replace(SPEC, **facts).key != SPEC.key


def test_no_two_of_these_specs_share_a_key() -> None:
    assert len({replace(SPEC, **facts).key for facts in OTHERS.values()}) == len(OTHERS)


def test_the_key_is_the_sha_256_of_the_facts_as_canonical_json() -> None:
    text = json.dumps(SPEC.facts(), sort_keys=True, separators=(",", ":"))
    assert SPEC.key == hashlib.sha256(text.encode("ascii")).hexdigest()


def test_the_key_stays_the_same_from_release_to_release() -> None:
    # Of version 1 for ever: another value here means that every stored feature is out of reach.
    assert SPEC.key == "13051b3be93db0f9883bb0ef2cfe4b9ecbd3afa9b3705a6b82add40ae1a2dcc2"


def test_the_key_of_a_reduced_decode_stays_too() -> None:
    assert (
        replace(SPEC, **OTHERS["decode policy"]).key
        == "cda46b5e1eaa2d4902405e1c218aefb519b1fa26d28533f8042a4f3fcc263d42"
    )


def test_the_key_is_the_same_in_every_process(processes: Processes) -> None:
    assert processes.call(key_of, SPEC.facts()) == SPEC.key


def key_of(facts: dict[str, Any]) -> str:
    return FeatureSpec.from_facts(facts).key


def test_names_of_backbones_and_cuts_are_no_facts() -> None:
    assert set(SPEC.facts()) == {"version", "trunk", "pool", "view", "precision", "dtype"}


def test_facts_give_the_spec_again() -> None:
    for facts in OTHERS.values():
        spec = replace(SPEC, **facts)
        again = FeatureSpec.from_facts(json.loads(json.dumps(spec.facts())))
        assert (again, again.key, again.rendered) == (spec, spec.key, spec.rendered)
    assert SPEC.reduction == "concat"
    assert SPEC.rendered == VIEW


@pytest.mark.parametrize(
    "change", [{"version": 2}, {"normalised": True}, {"version": None}], ids=["newer", "unknown fact", "no version"]
)
def test_facts_that_are_not_understood_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="this featstore knows version 1"):
        FeatureSpec.from_facts(SPEC.facts() | change)


def test_an_unknown_precision_or_storage_type_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'fp8' is no precision. The precisions are fp32, tf32, bf16, fp16\."):
        replace(SPEC, precision="fp8")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"'int4' is no storage type .* float16, float32, bfloat16, int8\."):
        replace(SPEC, dtype="int4")


def test_equal_specs_have_no_differences() -> None:
    assert SPEC.differences(FeatureSpec.from_facts(SPEC.facts())) == []


@pytest.mark.parametrize("name", OTHERS)
def test_a_difference_is_named_with_both_values(name: str) -> None:
    other = replace(SPEC, **OTHERS[name])
    found = SPEC.differences(other)
    words = {"layout of the reduction": "reduction", "policy": "augmentation"}.get(name, name)
    assert words in [difference[0] for difference in found]
    assert all(mine != others for _, mine, others in found)
    assert found == [(each, mine, others) for each, others, mine in other.differences(SPEC)]


def test_differences_in_words() -> None:
    other = replace(SPEC, trunk="cd" * 32, pool=Pool("none", "NCHW").facts(), view=replace(VIEW, size=24).facts())
    assert SPEC.differences(other) == [
        ("trunk", "abababab", "cdcdcdcd"),
        ("reduction", "concat (layout NCHW)", "none"),
        ("size", "32", "24"),
    ]
