"""Difference: in what two feature sets differ, in their facts, their images and their values."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from featstore.files.index import first_places
from featstore.files.reading import Places, Plain
from featstore.store.folders import short_key
from featstore.store.part_facts import pixels_of
from featstore.store.sets import FeatureSet

NUM_COMPARED = 1000
"""Rows whose values are compared, at most."""

_PIECE_BYTES = 4 << 20
"""Of float64 values that are compared at once: a row of maps may have a million values."""


@dataclass(frozen=True, kw_only=True)
class ValueDifference:
    """How far the rows of two sets lie apart.

    Attributes:
        rows: that were compared, of images that both sets have.
        is_equal: whether all of them are equal bit for bit; never for two storage types.
        largest: the largest absolute difference of two numbers.
        share: `largest`, as a share of the largest absolute value in these rows; 0 where all are 0.
    """

    rows: int
    is_equal: bool
    largest: float
    share: float

    def __str__(self) -> str:
        if self.is_equal:
            return f"values of {self.rows:,} images: equal bit for bit"
        return f"values of {self.rows:,} images: {self.largest:.3g} apart at most, {self.share:.2g} of the largest"


@dataclass(frozen=True, kw_only=True)
class SetDifference:
    """In what the sets a and b differ.

    Attributes:
        keys: of a and of b.
        facts: of the specs: (name, in a, in b), in words.
        labels: backbone and cut, where they are called differently: (name, in a, in b).
        stage: of trunks that differ, the first stage of one name where they do; None where no stage tells.
        profile: of the newest parts, with their pixel digests: (name, in a, in b).
        num_both: images that have a row in both.
        num_only_a: images that have one in a alone.
        num_only_b: images that have one in b alone.
        values: of images in both; None where there are none, or the rows have different shapes.
    """

    keys: tuple[str, str]
    facts: tuple[tuple[str, str, str], ...]
    labels: tuple[tuple[str, str, str], ...]
    stage: str | None
    profile: tuple[tuple[str, str, str], ...]
    num_both: int
    num_only_a: int
    num_only_b: int
    values: ValueDifference | None

    def __str__(self) -> str:
        a, b = map(short_key, self.keys)
        facts = [f"{name}: {mine} in {a}, {others} in {b}" for name, mine, others in self.labels + self.facts]
        facts += [f"first stage that differs: {self.stage}"] * (self.stage is not None)
        facts += [f"profile, {name}: {mine} in {a}, {others} in {b}" for name, mine, others in self.profile]
        images = f"images: {self.num_both:,} in both, {self.num_only_a:,} only in {a}, {self.num_only_b:,} only in {b}"
        return "\n".join([*facts, images, *([] if self.values is None else [str(self.values)])])


def diff(a: FeatureSet, b: FeatureSet) -> SetDifference:
    """In what two sets differ; see `FeatureStore.diff`."""
    in_a, in_b = _images(a), _images(b)
    is_in_b = b.index.find(in_a)[0] >= 0
    common = in_a[is_in_b]
    names = ("backbone", "cut")
    return SetDifference(
        keys=(a.key, b.key),
        facts=tuple(a.spec.differences(b.spec)),
        labels=_differing({name: a.facts[name] for name in names}, {name: b.facts[name] for name in names}),
        stage=_first_differing_stage(a, b),
        profile=_differing(*({**each.facts["profile"], "pixels": pixels_of(each.facts)} for each in (a, b))),
        num_both=len(common),
        num_only_a=len(in_a) - len(common),
        num_only_b=len(in_b) - len(common),
        values=_compared(a, b, _chosen(common)) if len(common) and a.parts[0].shape == b.parts[0].shape else None,
    )


def _images(found: FeatureSet) -> NDArray[np.uint8]:
    """The digests ``(N, 32)`` of the images that have a row, each once."""
    digests = np.concatenate([part.digests for part in found.parts])
    return digests[first_places(digests)]


def _chosen(digests: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Some of the digests: spread evenly over all in their own order, so that the same are chosen in any store."""
    order = np.argsort(np.ascontiguousarray(digests).view("S32").reshape(-1))
    places = np.linspace(0, len(order) - 1, min(len(order), NUM_COMPARED)).round().astype(np.int64)
    return digests[order[places]]


def _compared(a: FeatureSet, b: FeatureSet, digests: NDArray[np.uint8]) -> ValueDifference:
    type_a, type_b = a.parts[0].storage_type, b.parts[0].storage_type
    is_equal, largest, reached = type_a == type_b, 0.0, 0.0
    stored = [_stored(each, digests) for each in (a, b)]
    num_rows = max(1, _PIECE_BYTES // (8 * math.prod(a.parts[0].shape)))
    for start in range(0, len(digests), num_rows):
        (rows_a, scales_a), (rows_b, scales_b) = (_rows(each, slice(start, start + num_rows)) for each in stored)
        is_equal = is_equal and np.array_equal(rows_a, rows_b)
        if scales_a is not None and scales_b is not None:
            is_equal = is_equal and np.array_equal(scales_a, scales_b)
        values_a, values_b = type_a.numbers(rows_a, scales_a), type_b.numbers(rows_b, scales_b)
        with np.errstate(invalid="ignore"):  # the difference of two infinities
            largest = max(largest, float(np.abs(values_a - values_b).max()))
        reached = max(reached, float(np.abs(values_a).max()), float(np.abs(values_b).max()))
    return ValueDifference(
        rows=len(digests),
        is_equal=is_equal,
        largest=largest,
        share=largest / reached if reached else 0.0,
    )


def _stored(found: FeatureSet, digests: NDArray[np.uint8]) -> Plain:
    """The rows of images that all have one. A difference is no damage: each block is checked before it is read."""
    part_of, row_in = found.index.find(digests)
    return Plain(Places(parts=found.index.parts, part_of=part_of, row_in=row_in))


def _rows(stored: Plain, which: slice) -> tuple[NDArray[np.uint8], NDArray[np.float32] | None]:
    """The bytes of some of the rows, and their scales."""
    rows = np.empty((len(stored.places.row_in[which]), stored.places.row_bytes), np.uint8)
    stored.take(which, rows)
    scales = stored.places.scales
    return rows, None if scales is None else scales[which]


def _first_differing_stage(a: FeatureSet, b: FeatureSet) -> str | None:
    stages = {stage["name"]: stage["digest"] for stage in b.facts["stages"]}
    return next(
        (
            str(stage["name"])
            for stage in a.facts["stages"]
            if stages.get(stage["name"], stage["digest"]) != stage["digest"]
        ),
        None,
    )


def _differing(mine: dict[str, object], others: dict[str, object]) -> tuple[tuple[str, str, str], ...]:
    names = [*mine, *(name for name in others if name not in mine)]
    return tuple(
        (name, str(mine.get(name, "none")), str(others.get(name, "none")))
        for name in names
        if mine.get(name) != others.get(name)
    )
