"""Compaction: the small parts of a set become few large ones, and every reader finds the rows it found before.

Nothing is locked, and several compactions may run at once. What they may not do to each other follows from two rules:

* A merged part has a smaller name than all parts that it supersedes. Of duplicate rows that of the smallest part name
  counts, so what a merged part took over still wins against what it won against before.
* A row is left out only if a part with a smaller name than the row's own has it too.

Wherever a row goes, it goes to a smaller name: no chain of compactions, each trusting a part that another one is just
replacing, can come back to where it began with the row left out by all of them.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from featstore.digest import Json, canonical_json
from featstore.errors import DamagedFileError
from featstore.files import disk
from featstore.files.index import RowIndex
from featstore.files.part import Part, write_part
from featstore.files.provenance import signature
from featstore.files.scaled import ScaledRows, no_rows
from featstore.store.part_facts import pixels_of
from featstore.store.sets import FeatureSet, digest_rows, newest
from featstore.words import size_text

if TYPE_CHECKING:
    from torch import Tensor

MAX_PART_BYTES = 4 << 30
"""Features of a merged part, at most; parts of more than half of it are left as they are."""

MAX_PART_ROWS = 1 << 24
"""Rows of a merged part, at most, which rows of less than 256 bytes reach first. Who writes a part holds 33 bytes a row
in memory, half a gigabyte then, and so does who opens it: however many parts a machine can read, one has to fit."""


@dataclass(frozen=True, kw_only=True)
class Merge:
    """One part that was made of several.

    Attributes:
        key: of the set.
        part: as it was published.
        replaced: the parts that it supersedes.
    """

    key: str
    part: Part
    replaced: tuple[Part, ...]


@dataclass(frozen=True, kw_only=True)
class LeftAlone:
    """A set, or a superseded part, that was left as it is.

    Attributes:
        key: of the set.
        reason: a sentence, which names the file.
    """

    key: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class CompactReport:
    """What a compaction did.

    Attributes:
        merges: one for each new part.
        left: sets that hold something damaged, which no merge may turn into something sound, or whose new part turned
            out to be.
    """

    merges: tuple[Merge, ...] = ()
    left: tuple[LeftAlone, ...] = ()

    @property
    def replaced(self) -> int:
        """Parts that are superseded now; their files stay for `gc`."""
        return sum(len(each.replaced) for each in self.merges)

    @property
    def bytes(self) -> int:
        """Size of the new parts' activations."""
        return sum(each.part.num_bytes for each in self.merges)

    def __add__(self, other: CompactReport) -> CompactReport:
        return CompactReport(merges=self.merges + other.merges, left=self.left + other.left)

    def __str__(self) -> str:
        left = f"; {len(self.left):,} sets left alone" if self.left else ""
        return f"{self.replaced:,} parts merged into {len(self.merges):,}, {size_text(self.bytes)} written{left}"


def compact(found: FeatureSet) -> CompactReport:
    """Merges all parts of a set that are small enough; see `FeatureStore.compact`."""
    small = (part for part in found.parts if part.num_bytes <= MAX_PART_BYTES // 2)
    return merge(found, [part for part in small if part.num_rows <= MAX_PART_ROWS // 2])


def merge(found: FeatureSet, parts: Iterable[Part]) -> CompactReport:
    """Merges some parts of a set with each other, as far as they are alike.

    A part that another process has superseded and unlinked meanwhile, and a set that it has removed, need no merging.

    Raises:
        OSError: as the disk gave it, while a new part was written; the parts are as they were, then.
    """
    report = CompactReport()
    for alike in _batches(parts):
        try:
            report += CompactReport(merges=(_merged(found, alike),))
        except FileNotFoundError:
            continue
        except DamagedFileError as error:
            return report + CompactReport(left=(LeftAlone(key=found.key, reason=str(error)),))
    return report


def delete_replaced(made: Merge) -> None:
    """Deletes the parts that a sound merged part has replaced, as far as it has all their rows.

    Those that lack some stay: the rows are in another part, and whether that one is sound is for `gc` to find out.
    """
    index = RowIndex([made.part])
    for part in made.replaced:
        if (index.find(part.digests)[0] >= 0).all():
            with suppress(FileNotFoundError):  # another process has compacted as well, and collected the garbage
                disk.unlink(part.path)


# ---- which parts become one

_NAME = re.compile(r"part-([0-9a-f]{16})\.h5")
_STEP = 1 << 40
"""How far below another a name is drawn, at most: 2^64 names leave room for millions of merges of merged parts."""

_OF_THE_NEWEST = frozenset(
    {"backbone", "cut", "stages", "class_tokens", "prefix_tokens", "probe", "rounding", "who", "when"}
)
_COMBINED = frozenset({"failed", "supersedes", "merged"})


def _batches(parts: Iterable[Part]) -> Iterator[list[Part]]:
    """Parts that one part can take the place of, several each.

    They are in the order in which they were written, so that the images of a job stay in theirs: whoever reads them in
    that order reads the file from front to back.
    """
    kinds: dict[str, list[Part]] = {}
    for part in sorted(parts, key=lambda part: (str(part.facts["when"]), part.path.name)):
        if _has_room_below(part.path.name):
            kinds.setdefault(_kind(part), []).append(part)
    for kind in kinds.values():
        for alike in _of_one_arithmetic(kind):
            yield from (batch for batch in _filled(alike) if len(batch) > 1)


def _of_one_arithmetic(parts: Sequence[Part]) -> list[list[Part]]:
    """Parts whose probes fit: a merged part has the newest one's alone, which must hide no other that contradicts."""
    found: list[list[Part]] = []
    for part in parts:
        alike = next((each for each in found if _probes_fit(each[0], part)), None)
        if alike is None:
            found.append([part])
        else:
            alike.append(part)
    return found


def _probes_fit(one: Part, other: Part) -> bool:
    if one.facts["probe"] == other.facts["probe"]:
        return True
    from featstore.models.probe import TOLERANCES, Probe  # torch, for which only who merges waits

    difference = Probe.from_facts(one.facts["probe"]).difference(Probe.from_facts(other.facts["probe"]))
    return difference <= TOLERANCES[one.facts["spec"]["precision"]]


def _filled(parts: Sequence[Part]) -> Iterator[list[Part]]:
    batch: list[Part] = []
    num_bytes, num_rows = 0, 0
    for part in parts:
        num_bytes, num_rows = num_bytes + part.num_bytes, num_rows + part.num_rows
        if batch and (num_bytes > MAX_PART_BYTES or num_rows > MAX_PART_ROWS):
            yield batch
            batch, num_bytes, num_rows = [], part.num_bytes, part.num_rows
        batch.append(part)
    yield batch


def _kind(part: Part) -> str:
    """Equal for parts whose facts say the same of all their rows: above all, computed on one profile."""
    others = part.facts.keys() - _OF_THE_NEWEST - _COMBINED
    return canonical_json({name: part.facts[name] for name in others} | {"pixels": pixels_of(part.facts)})


def _has_room_below(name: str) -> bool:
    found = _NAME.fullmatch(name)
    return found is not None and int(found[1], 16) >= _STEP


def _name_below(name: str) -> str:
    found = _NAME.fullmatch(name)
    assert found is not None
    return f"part-{int(found[1], 16) - 1 - secrets.randbelow(_STEP):016x}.h5"


# ---- one merge


def _merged(found: FeatureSet, parts: Sequence[Part]) -> Merge:
    """Publishes a part in the place of `parts`, with their rows in this order.

    Raises:
        DamagedFileError: for a block of rows that doesn't fit its checksum: nothing is published then.
        FileNotFoundError: if one of `parts` or the folder is gone.
        OSError: as the disk gave it.
    """
    kept = _kept(found, parts)
    folders = {part.path.parent for part in parts}
    folder = found.folder if len(folders) > 1 else folders.pop()
    path = folder / _name_below(min(part.path.name for part in parts))
    write_part(
        path,
        features=_chunks(parts, kept),
        digests=np.concatenate([part.digests[rows] for part, rows in zip(parts, kept, strict=True)]),
        decoders=np.concatenate([part.decoders[rows] for part, rows in zip(parts, kept, strict=True)]),
        facts=_facts(found, parts),
    )
    return Merge(key=found.key, part=Part.open(path), replaced=tuple(parts))


def _kept(found: FeatureSet, parts: Sequence[Part]) -> list[NDArray[np.bool_]]:
    """For each part ``(n,)``: its rows that readers see. The others have a duplicate in a part with a smaller name.

    Raises:
        DamagedFileError: if such a duplicate isn't sound.
    """
    kept = []
    place_of = {part: place for place, part in enumerate(found.index.parts)}
    for part in parts:
        part_of, row_in = found.index.find(part.digests)
        is_seen = (part_of == place_of[part]) & (row_in == np.arange(part.num_rows))
        for place in np.unique(part_of[~is_seen]).tolist():
            _check_rows(found.index.parts[place], row_in[~is_seen & (part_of == place)])
        kept.append(is_seen)
    return kept


def _check_rows(part: Part, rows: NDArray[np.int64]) -> None:
    for _ in part.read_blocks(np.unique(rows // part.block_rows).tolist()):
        pass


def _chunks(parts: Sequence[Part], kept: Sequence[NDArray[np.bool_]]) -> Iterator[Tensor | ScaledRows]:
    """The rows that are kept, block by block, each checked; a chunk is good until the next one is drawn."""
    import torch  # only who merges waits for it

    yield no_rows(parts[0].shape, parts[0].storage_type)  # there may be no other
    for part, is_kept in zip(parts, kept, strict=True):
        blocks = np.unique(np.flatnonzero(is_kept) // part.block_rows)
        for rows, values in part.read_chunks(blocks.tolist()):
            chosen = torch.from_numpy(is_kept[rows.start : rows.stop])
            yield values if chosen.all() else values[chosen]


def _facts(found: FeatureSet, parts: Sequence[Part]) -> dict[str, Json]:
    reasons = {digest: reason for part in parts for digest, reason in part.facts["failed"].items()}
    has_row = found.index.find(digest_rows(reasons))[0] >= 0
    return {
        **newest(parts).facts,
        "failed": {digest: reason for (digest, reason), has in zip(reasons.items(), has_row, strict=True) if not has},
        "supersedes": _superseded(found, parts),
        "merged": signature(),
    }


def _superseded(found: FeatureSet, parts: Sequence[Part]) -> list[str]:
    """Names of `parts` and, as far as they are still there, of what these supersede themselves.

    In whatever order the files are deleted later, no row comes back that was replaced.
    """
    before = {name for part in parts for name in part.facts["supersedes"]}
    still_there = {name for name in before if any((folder / name).exists() for folder in found.folders)}
    return sorted({part.path.name for part in parts} | still_there)
