"""Filed: what has come of a plan, or of some of its images; what is said of it, and its parts merged."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featstore.digest import Json
from featstore.errors import FactsDifferError
from featstore.extraction.narrowing import lost_note
from featstore.extraction.plan import Plan, PlannedSet
from featstore.extraction.rates import StageRate, joined
from featstore.files import disk
from featstore.files.part import Part
from featstore.images.contents import looks_note
from featstore.images.render import doubts_note
from featstore.models.probe import TOLERANCES, Probe
from featstore.notes import logger_of
from featstore.store.part_facts import pixels_of
from featstore.store.sets import FeatureSet
from featstore.store.store import FeatureStore
from featstore.words import counted

MERGE_BYTES = 1 << 30
"""Of the parts that a job has written, those of less are merged at its end."""


@dataclass(kw_only=True)
class Filed:
    """What has come of a plan, or of some of its images. It pickles: other processes send theirs, and `add` joins them.

    Attributes:
        parts: of each set, those written, in their order.
        computed: rows of each set.
        unfit: for each set digest -> reason, of images whose rows it can't hold.
        num_values: of each set, other than zero, where its type can't hold all of them (see Narrowed).
        num_lost: those of them that became zero.
        has_row: ``(S, N)``, of each set the images whose rows were computed; of those of equal content one.
        looks: ``(N,)``, of the evaluation view of each image of the plan: equal pixels, equal numbers; 0 without one.
        failures: digest -> reason, of images that can't be decoded or rendered.
        unread: digest -> image and reason, of those that couldn't be read.
        doubts: image -> why it may not look as its owner expects, though it was decoded.
        rates: what each stage did, and how long it was busy.
        said: what its owner should know before the first row, by each session.
        is_stopped: whether a run was ended by `Session.stop`, before all of its images had their turn.
    """

    parts: list[list[Path]]
    computed: list[int]
    unfit: list[dict[str, str]]
    num_values: list[int]
    num_lost: list[int]
    has_row: NDArray[np.bool_]
    looks: NDArray[np.uint64]
    failures: dict[str, str] = field(default_factory=dict)
    unread: dict[str, tuple[str, str]] = field(default_factory=dict)
    doubts: dict[str, str] = field(default_factory=dict)
    rates: tuple[StageRate, ...] = ()
    said: list[str] = field(default_factory=list)
    is_stopped: bool = False

    def __getstate__(self) -> dict[str, Any]:
        looked, computed = np.flatnonzero(self.looks), np.flatnonzero(self.has_row.any(axis=0))
        return vars(self) | {  # of a piece of the images alone
            "looks": (len(self.looks), looked, self.looks[looked]),
            "has_row": (computed, self.has_row[:, computed]),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        count, looked, looks = state["looks"]
        self.looks, self.has_row = np.zeros(count, np.uint64), np.zeros((len(self.parts), count), bool)
        self.looks[looked] = looks
        computed, has_row = state["has_row"]
        self.has_row[:, computed] = has_row

    @classmethod
    def nothing(cls, planned: Plan) -> Filed:
        """Of a plan that nobody has begun."""
        none = [0] * len(planned.sets)
        return cls(
            parts=[[] for _ in none],
            computed=none[:],
            unfit=[{} for _ in none],
            num_values=none[:],
            num_lost=none[:],
            has_row=np.zeros((len(none), len(planned.images)), bool),
            looks=np.zeros(len(planned.images), np.uint64),
        )

    @classmethod
    def together(cls, planned: Plan, pieces: Iterable[Filed]) -> Filed:
        """What has come of all pieces of a plan."""
        whole = cls.nothing(planned)
        for piece in pieces:
            whole.add(piece)
        return whole

    def add(self, piece: Filed) -> None:
        """Adds what has come of some more images."""
        for place in range(len(self.parts)):
            self.parts[place] += piece.parts[place]
            self.computed[place] += piece.computed[place]
            self.unfit[place] |= piece.unfit[place]
            self.num_values[place] += piece.num_values[place]
            self.num_lost[place] += piece.num_lost[place]
        self.has_row |= piece.has_row
        np.copyto(self.looks, piece.looks, where=piece.looks != 0)
        self.failures |= piece.failures
        self.unread |= piece.unread
        self.doubts |= piece.doubts
        self.rates = joined([self.rates, piece.rates])
        self.said = list(dict.fromkeys([*self.said, *piece.said]))
        self.is_stopped |= piece.is_stopped

    @property
    def num_failed(self) -> int:
        """Images, those of equal content once, that were left out of some set."""
        return len({*self.failures, *self.unread}.union(*self.unfit))

    def notes(self, planned: Plan) -> list[str]:
        """What its owner should know, in sentences."""
        lost = [
            lost_note(each.spec, each.cut, num_values, num_lost)
            for each, num_values, num_lost in zip(planned.sets, self.num_values, self.num_lost, strict=True)
        ]
        notes = (*self.said, doubts_note(self.doubts), looks_note(planned.images, self.looks), *lost)
        return list(dict.fromkeys(note for note in notes if note is not None))


def refuse_contradictions(planned: Plan, store: FeatureStore, filed: Filed) -> None:
    """Compares what a job has written of each set with what others have meanwhile: see `refuse_contradiction`."""
    refused = []
    for each, paths in zip(planned.sets, filed.parts, strict=True):
        try:
            if paths:
                refuse_contradiction(store, each, paths)
        except FactsDifferError as error:
            refused.append(error)  # once all are looked at
    if refused:
        raise refused[0]


def refuse_contradiction(store: FeatureStore, each: PlannedSet, paths: list[Path]) -> None:
    """Compares parts of a set with those that others have written since the plan was made.

    Jobs that begin at once on a new set find nothing to agree with. Each writes first and looks then, so that of two
    that disagree one at least sees the other's part.

    Args:
        store: which has the set.
        each: the set.
        paths: of our parts; where they contradict others', all are set aside, and none is left here.

    Raises:
        FactsDifferError: for rows of other pixels or other arithmetic; names both parts.
    """
    stored = {part.path for part in (() if each.stored is None else each.stored.parts)}
    others = store.beside(each.spec, stored.union(paths))
    if others is None:
        return
    ours = store.beside(each.spec, stored.union(part.path for part in others.parts))
    found = None if ours is None else _contradiction(each, ours, others)
    if found is None:
        return
    mine, other, why = found
    count = len(paths)
    while paths:
        with suppress(FileNotFoundError):  # others have merged it, or removed the set
            disk.set_aside(paths[-1])
        paths.pop()
    raise FactsDifferError(
        f"{mine.path} ({mine.facts['who']}) and {other.path} ({other.facts['who']}) hold rows of one set that don't go "
        f"together, although all keys agree: {why}. Two jobs wrote them at one time. What this one has written of set "
        f"{each.spec.key[:8]} ({counted(count, 'part')}) is set aside, where nobody reads. Expected jobs that decode "
        "and compute alike: featstore doctor tells what decodes on each machine. Run this job again on one like the "
        "other's, or extract into another store."
    )


def _contradiction(each: PlannedSet, ours: FeatureSet, others: FeatureSet) -> tuple[Part, Part, str] | None:
    """A part of ours and one of the others that don't go together, and why."""
    if ours.pixels and others.pixels and ours.pixels != others.pixels:
        mine, other = ours.parts[0], next(part for part in others.parts if {pixels_of(part.facts)} != ours.pixels)
        digests = f"{pixels_of(mine.facts)[:8]} and {pixels_of(other.facts)[:8]}"
        return mine, other, f"the digests of the pixels that their decoders give for the sample files are {digests}"
    allowed = TOLERANCES[each.spec.precision]
    for mine, other in product(ours.probed, others.probed):
        probes = [Probe.from_facts(part.facts["probe"]) for part in (other, mine)]
        difference = probes[0].difference(probes[1])
        if not difference <= allowed:
            changed = [f"{name} is {here} and {there}" for name, here, there in _unlike_profiles(mine, other)]
            why = f"on the probe images they differ by {difference:.2g} of the largest value; {each.spec.precision}"
            return mine, other, "; ".join([f"{why} allows {allowed:g}", *changed])
    return None


def _unlike_profiles(mine: Part, other: Part) -> Iterator[tuple[str, Json, Json]]:
    profiles = mine.facts["profile"], other.facts["profile"]
    for name in sorted({*profiles[0], *profiles[1]}):
        here, there = (profile.get(name, "unknown") for profile in profiles)
        if here != there:
            yield name, here, there


def merge_parts(planned: Plan, store: FeatureStore, filed: Filed, *, is_shown: bool) -> list[str]:
    """Makes few parts of the many that were written. What goes wrong costs time when reading, no rows: it is noted."""
    notes = []
    for each, paths in zip(planned.sets, filed.parts, strict=True):
        try:
            small = list(_small(paths))
            if len(small) < 2:
                continue
            if is_shown:
                logger_of("featstore").info("merging %s parts of set %s", f"{len(small):,}", each.spec.key[:8])
            left = store.merge(each.spec.key, small).left
            problem = left[0].reason if left else None
        except Exception as error:  # the disk may be full: the rows are filed all the same
            problem = str(error)
        if problem:
            notes.append(
                f"The parts that were written of set {each.spec.key[:8]} could not be merged ({problem}). All rows "
                "are filed; merge them later with featstore compact"
            )
    return notes


def _small(paths: Sequence[Path]) -> Iterator[Path]:
    for path in paths:
        with suppress(FileNotFoundError):  # others have merged it already, or removed the set
            if path.stat().st_size < MERGE_BYTES:
                yield path
