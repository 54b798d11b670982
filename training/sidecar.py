"""Sidecar: what run.json says of one run - what decided its numbers, what it scored, and on which images.

docs/runs.md describes the file. It is small and whole by itself, so that hundreds of runs can be compared without their
tensors, and this module loads neither torch nor numpy.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from featstore.digest import Json, digest_json
from featstore.errors import DamagedFileError, FeatureStoreError
from featstore.files.disk import whole_or_nothing, write_at

FILE = "run.json"

FORMAT = 1
"""Of the file. Runs of before it had a number have no kind, configuration, split and scores; they are read too."""

Kind: TypeAlias = Literal["head", "finetune", "learner", "sweep-member", "probe"]
"""What a run is of: a head that was trained alone; a head and stages before it; a model of which nothing was trained;
one of the settings of a sweep; what an exact solver found."""

KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True)
class Score:
    """One number that a run scored.

    Attributes:
        value: None where it isn't finite.
        interval: where it lies with 95 % confidence; None where that isn't known.
        by: how the interval was found: ``wilson``, ``bootstrap``, ``student``; None without one.
    """

    value: float | None
    interval: tuple[float, float] | None = None
    by: str | None = None

    def facts(self) -> Json:
        """As JSON."""
        interval = None if self.interval is None else list(self.interval)
        return {"value": self.value, "interval": interval, "by": self.by}


@dataclass(frozen=True)
class Dealt:
    """The labelled images of one split.

    Attributes:
        images: how many.
        digest: over their contents and labels, in any order: of two runs it is equal where these images are the same.
    """

    images: int
    digest: str

    def facts(self) -> Json:
        """As JSON."""
        return {"images": self.images, "digest": self.digest}


@dataclass(frozen=True, kw_only=True)
class Sidecar:
    """What is known of a run beside its tensors. What an older run doesn't tell is None or empty.

    Attributes:
        kind: one of `KINDS`.
        configuration: what decided its numbers, flat: name -> number, text, truth value, list of these, or None.
        fits: the same of each fit by itself, in order, with what came of it.
        keys: of the feature sets that were read, whole.
        trunk: digest of the trunk up to the head's cut.
        versions: of featstore and of the libraries that decide numbers.
        split: the images, by split: ``train``, ``valid``.
        scored: the split that `scores` are of.
        scores: by name.
        seconds: that training took.
        when: the time at which it was written, ISO 8601.
        start: the run that it went on from: its folder and its identity; None where there was none.
        more: further facts, for people and for what reads runs: device, epochs, inputs, store.
    """

    kind: Kind | None = None
    configuration: Mapping[str, Json] = field(default_factory=dict)
    fits: Sequence[Mapping[str, Json]] = ()
    keys: Sequence[str] = ()
    trunk: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    split: Mapping[str, Dealt] = field(default_factory=dict)
    scored: str | None = None
    scores: Mapping[str, Score] = field(default_factory=dict)
    seconds: float | None = None
    when: str | None = None
    start: Mapping[str, Json] | None = None
    more: Mapping[str, Json] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.kind is not None and self.kind not in KINDS:
            raise ValueError(f"The kind of a run is {self.kind!r}; expected one of {', '.join(KINDS)}.")
        nested = [name for name, value in self.configuration.items() if isinstance(value, Mapping)]
        if nested:
            raise ValueError(
                f"The configuration has {nested[0]!r} of several names, and it is flat: runs are found by its values. "
                "Expected a number, a text or a list. Give each a name of its own."
            )
        wrong = self.more.keys() & {*_FIELDS, "format", "checksum"}
        if wrong:
            raise ValueError(f"{min(wrong)} is a field of its own; expected it not among further facts. Leave it out.")

    @property
    def scored_on(self) -> Dealt | None:
        """The images that `scores` are of; None where that isn't known."""
        return None if self.scored is None else self.split.get(self.scored)

    def facts(self) -> dict[str, Json]:
        """As JSON, with a checksum over all of it."""
        facts: dict[str, Json] = {
            "format": FORMAT,
            "kind": self.kind,
            "configuration": dict(self.configuration),
            "fits": [dict(each) for each in self.fits],
            "keys": list(self.keys),
            "trunk": self.trunk,
            "versions": dict(self.versions),
            "split": {name: each.facts() for name, each in self.split.items()},
            "scored": self.scored,
            "scores": {name: each.facts() for name, each in self.scores.items()},
            "seconds": self.seconds,
            "start": None if self.start is None else dict(self.start),
            **self.more,
            "when": self.when or datetime.now(UTC).isoformat(timespec="seconds"),
        }
        return {**facts, "checksum": digest_json(facts)}

    def write(self, folder: str | os.PathLike[str]) -> Path:
        """Writes run.json into an existing folder, whole or not at all; one that is there is replaced."""
        path = Path(folder) / FILE
        content = (json.dumps(self.facts(), indent=1) + "\n").encode("ascii")
        with whole_or_nothing(path, len(content), replaces=True) as fd:
            write_at(fd, memoryview(content), 0)
        return path

    @classmethod
    def read(cls, folder: str | os.PathLike[str]) -> Sidecar:
        """That of the run in a folder.

        Raises:
            DamagedFileError: if it isn't what was written.
            FeatureStoreError: if it is of a newer format.
            OSError: as the disk gave it.
        """
        path = Path(folder) / FILE
        return cls.parsed(path.read_bytes(), path)

    @classmethod
    def parsed(cls, content: bytes, path: Path) -> Sidecar:
        """What the bytes of run.json say; `path` is for the words of an error, as of `read`."""
        facts = _checked(content, path)
        try:
            return cls._of(facts)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DamagedFileError(f"{path} is damaged ({error!r}). {_REMEDY}") from error

    @classmethod
    def _of(cls, facts: Mapping[str, Json]) -> Sidecar:
        versions = {name: str(facts[name]) for name in ("featstore", "torch") if name in facts}
        configuration = dict(facts.get("configuration") or {})
        if "format" not in facts:  # what runs told before
            configuration |= {name: facts[name] for name in ("batch_size", "epochs") if name in facts}
        interval = facts.get("seconds")
        return cls(
            kind=facts.get("kind"),
            configuration=configuration,
            fits=tuple(dict(each) for each in facts.get("fits") or ()),
            keys=tuple(map(str, facts.get("keys") or ())),
            trunk=facts.get("trunk"),
            versions={**versions, **(facts.get("versions") or {})},
            split={name: Dealt(int(each["images"]), str(each["digest"])) for name, each in _given(facts, "split")},
            scored=facts.get("scored"),
            scores={name: _score(each) for name, each in _given(facts, "scores")},
            seconds=None if interval is None else float(interval),
            when=facts.get("when"),
            start=facts.get("start"),
            more={name: value for name, value in facts.items() if name not in _KNOWN},
        )


def finite(value: float) -> float | None:
    """A number as JSON has it: None where it isn't finite."""
    return value if math.isfinite(value) else None


_FIELDS = (
    "kind", "configuration", "fits", "keys", "trunk", "versions", "split", "scored", "scores", "seconds", "when",
    "start",
)  # fmt: skip
_KNOWN = {*_FIELDS, "format", "checksum", "featstore", "torch"}
_REMEDY = "Restore it, or delete it: a model beside it is whole without it."


def _checked(content: bytes, path: Path) -> dict[str, Json]:
    """The facts as they were written; runs of before this format have no checksum here."""
    try:
        facts = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DamagedFileError(f"{path} is damaged ({error}). {_REMEDY}") from error
    if not isinstance(facts, dict) or not {"format", "featstore"} & facts.keys():
        raise DamagedFileError(f"{path} is no run's: it has neither a format nor a version of featstore. {_REMEDY}")
    if "format" not in facts:
        return facts
    version, checksum = facts["format"], facts.get("checksum")
    if isinstance(version, int) and version > FORMAT and checksum != _checksum({**facts, "format": FORMAT}):
        raise FeatureStoreError(
            f"{path} has format {version}; this featstore reads up to {FORMAT}. Upgrade featstore to see the run."
        )
    if version != FORMAT or checksum is None or checksum != _checksum(facts):
        raise DamagedFileError(
            f"{path} is damaged: its facts don't fit their checksum ({_short(checksum)} expected). {_REMEDY}"
        )
    return facts


def _short(checksum: Json) -> str:
    return "one is" if checksum is None else f"SHA-256 {str(checksum)[:8]}..."


def _checksum(facts: Mapping[str, Json]) -> str | None:
    """None for what was never written: JSON's NaN, which Python reads, has no canonical form."""
    try:
        return digest_json({name: value for name, value in facts.items() if name != "checksum"})
    except TypeError:
        return None


def _given(facts: Mapping[str, Json], name: str) -> list[tuple[str, Any]]:
    return list((facts.get(name) or {}).items())


def _score(facts: Mapping[str, Json]) -> Score:
    interval = facts.get("interval")
    return Score(
        value=None if facts["value"] is None else float(facts["value"]),
        interval=None if interval is None else (float(interval[0]), float(interval[1])),
        by=facts.get("by"),
    )
