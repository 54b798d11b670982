"""Feature sets: what a reader asks for, and the parts of one spec; known by what they say, not by their folders."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from featstore.digest import Json
from featstore.errors import DamagedFileError
from featstore.files.index import RowIndex
from featstore.files.part import Part
from featstore.files.storage_types import STORAGE_TYPES
from featstore.images.decoders import ARRAY
from featstore.images.views import View
from featstore.models.names import PRECISIONS, Batching, Precision
from featstore.store.part_facts import FACTS, check_facts, pixels_of
from featstore.store.spec import FeatureSpec
from featstore.words import size_text


@dataclass(frozen=True, kw_only=True)
class FeatureRequest:
    """What a reader asks for: the facts it fixes, and None for those it leaves open.

    Attributes:
        trunk: digest of the model up to the cut.
        pool: facts of the reduction.
        view: of the evaluation or of one seed.
        dtype: storage type, if it matters.
        precision: of the arithmetic, if it matters.
    """

    trunk: str
    pool: Json
    view: View
    dtype: str | None = None
    precision: Precision | None = None

    @classmethod
    def of(cls, spec: FeatureSpec) -> FeatureRequest:
        """The request that fixes every fact, so that only features of `spec` fit."""
        return cls(trunk=spec.trunk, pool=spec.pool, view=spec.rendered, dtype=spec.dtype, precision=spec.precision)

    def accepts(self, spec: FeatureSpec) -> bool:
        """Whether features of `spec` are what is asked for."""
        return spec.key in self.keys

    @cached_property
    def keys(self) -> frozenset[str]:
        """The keys of all specs that are what is asked for."""
        view = self.view.facts()
        return frozenset(
            FeatureSpec(trunk=self.trunk, pool=self.pool, view=view, precision=precision, dtype=dtype).key
            for precision in ([self.precision] if self.precision else PRECISIONS)
            for dtype in ([self.dtype] if self.dtype else STORAGE_TYPES)
        )

    def differences(self, spec: FeatureSpec) -> list[tuple[str, str, str]]:
        """Why `spec` isn't accepted: each fact that differs, its value there, and the one asked for, in words."""
        asked = FeatureSpec(
            trunk=self.trunk,
            pool=self.pool,
            view=self.view.facts(),
            precision=self.precision or spec.precision,
            dtype=self.dtype or spec.dtype,
        )
        return spec.differences(asked)


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class FeatureSet:
    """The parts of one spec: at least one, maybe without rows.

    Attributes:
        folders: where they lie; several, if jobs that call the model differently have made one each.
        spec: what decided their values.
        parts: in the order of their names, without those that another part supersedes.
    """

    folders: tuple[Path, ...]
    spec: FeatureSpec
    parts: tuple[Part, ...]

    def __repr__(self) -> str:
        facts = self.describe()
        named = f"{facts['backbone']}@{facts['cut']} {facts['reduce']}, {self.spec.rendered.label()}"
        return f"FeatureSet({self.key[:8]}: {named}, {self.spec.dtype}, {facts['rows']:,} rows)"

    @property
    def key(self) -> str:
        """The spec's key."""
        return self.spec.key

    @property
    def folder(self) -> Path:
        """The first of its folders."""
        return self.folders[0]

    @cached_property
    def facts(self) -> dict[str, Json]:
        """Facts of the newest part: stages, profile, probe, backbone and cut as people call them, who and when."""
        return newest(self.parts).facts

    @cached_property
    def pixels(self) -> frozenset[str]:
        """The pixel digests of the decoders that read its rows' images: one; of images that were arrays none counts."""
        return frozenset(pixels_of(part.facts) for part in self.parts if (part.decoders != ARRAY).any())

    @cached_property
    def probed(self) -> tuple[Part, ...]:
        """The newest part of each distinct probe: of one that machines agree on to the last bit a single one."""
        by_probe = {repr(part.facts["probe"]): part for part in sorted(self.parts, key=_written)}
        return tuple(by_probe.values())

    def batching_on(self, device_type: str) -> Batching | None:
        """That of the newest part, so that one set has one profile; None where that was computed on another device."""
        profile = self.facts["profile"]
        if profile["device"] != device_type:
            return None
        return Batching(
            int(profile["batch_size"]), profile.get("memory_format", "contiguous"), bool(profile.get("compiled"))
        )

    @cached_property
    def index(self) -> RowIndex:
        """Where each image's row lies."""
        return RowIndex(self.parts)

    @cached_property
    def failed(self) -> dict[str, str]:
        """Digest (hexadecimal) -> reason, of the images that have failed and have no row: a later success counts."""
        reasons = {digest: reason for part in self.parts for digest, reason in part.facts["failed"].items()}
        has_row = self.index.find(digest_rows(reasons))[0] >= 0
        return {digest: reason for (digest, reason), has in zip(reasons.items(), has_row, strict=True) if not has}

    def images_beside(self, known: Iterable[NDArray[np.uint8]]) -> NDArray[np.uint8]:
        """The digests ``(M, 32)`` of the images that have a row and are none of `known`, ``(N, 32)`` each."""
        parts = self.index.parts
        digests = np.concatenate([part.digests for part in parts])
        starts = np.cumsum([0, *(part.num_rows for part in parts)])

        def rows(asked: NDArray[np.uint8]) -> NDArray[np.int64]:
            part_of, row_in = self.index.find(asked)
            has_row = part_of >= 0
            found: NDArray[np.int64] = starts[part_of[has_row]] + row_in[has_row]
            return found

        is_known = np.zeros(len(digests), bool)
        for some in known:
            is_known[rows(some)] = True
        others = np.unique(rows(digests[~is_known]))  # of an image with several rows it is the first that is known
        return digests[others[~is_known[others]]]

    @property
    def num_bytes(self) -> int:
        """Size of its files, some of which may have been replaced by a merged one since."""
        return sum(part.length for part in self.parts)

    def describe(self) -> dict[str, Json]:
        """What `ls` lists."""
        view = self.spec.rendered
        is_known = "imported" not in self.facts  # the spec of what something else computed holds placeholders
        return {
            "key": self.key,
            "backbone": self.facts["backbone"],
            "cut": self.facts["cut"],
            "reduce": self.spec.reduction,
            "view": None if not is_known else "evaluation" if view.policy is None else view.policy.describe(),
            "seed": view.seed,
            "size": view.size if is_known else None,
            "dtype": self.spec.dtype,
            "precision": self.spec.precision if is_known else None,
            "rows": self.index.num_images,
            "failed": len(self.failed),
            "shape": list(self.parts[0].shape),
            "parts": len(self.parts),
            "bytes": self.num_bytes,
            "when": self.facts["when"],
            "folder": str(self.folder),
        }

    def in_brief(self) -> dict[str, Json]:
        """What a notebook shows of it."""
        facts = self.describe()
        names = ("key", "backbone", "cut", "reduce", "view", "seed", "size", "dtype", "rows", "bytes")
        return {**{name: facts[name] for name in names}, "key": self.key[:8], "bytes": size_text(self.num_bytes)}


@dataclass(frozen=True, eq=False)
class SetPart:
    """A part whose facts are those of the format, whole and understood."""

    part: Part
    spec: FeatureSpec

    @classmethod
    def of(cls, part: Part) -> SetPart:
        """`part` with its spec.

        Raises:
            DamagedFileError: for facts that are incomplete, contradict each other, or come from a newer featstore.
        """
        try:
            spec = FeatureSpec.from_facts(part.facts["spec"])
            if missing := FACTS - part.facts.keys():
                raise ValueError(f"its facts lack {', '.join(sorted(missing))}")
            check_facts(part.facts)
            if part.facts["key"] != spec.key or spec.rendered.facts() != spec.view:
                raise ValueError("its key isn't that of its spec")
            if part.storage_type != spec.storage_type:
                raise ValueError(f"it holds torch.{part.storage_type.name}, and its spec says {spec.dtype}")
        except (KeyError, TypeError, ValueError) as error:
            raise DamagedFileError(
                f"{part.path} can't be used by this featstore: {error}. If a newer one wrote it, upgrade; else move a "
                f"sound copy into its place, or delete it and run {made_by(part)} again."
            ) from error
        return cls(part, spec)

    @property
    def name(self) -> str:
        """Of the file; of duplicate rows that of the smallest name counts."""
        return self.part.path.name

    @property
    def supersedes(self) -> list[str]:
        """Names of the parts that this one replaces."""
        names: list[str] = self.part.facts["supersedes"]
        return names


def batching_for(
    sets: Iterable[FeatureSet | None], device_type: str, batch_size: int | None, compile: bool | None = None
) -> Batching:
    """That of the first of `sets` which has rows computed on such a device, so that one set has one profile.

    Args:
        sets: those that exist, the one that is added to before others.
        device_type: cpu or cuda.
        batch_size: the images of a pass, where someone has said.
        compile: whether they are compiled, where someone has said.
    """
    stored = (each.batching_on(device_type) for each in sets if each is not None)
    batching = next((each for each in stored if each is not None), Batching())
    if batch_size is not None:
        batching = batching._replace(batch_size=batch_size)
    return batching if compile is None else batching._replace(compiled=compile)


def newest(parts: Iterable[Part]) -> Part:
    """The part that was written last."""
    return max(parts, key=_written)


def _written(part: Part) -> str:
    return str(part.facts["when"])


def made_by(part: Part) -> str:
    """The command that makes the rows of a part again."""
    return "featstore import" if "imported" in part.facts else "featstore extract"


def superseded_names(parts: Iterable[SetPart]) -> frozenset[str]:
    """Names of the parts that some part replaces."""
    return frozenset(name for each in parts for name in each.supersedes)


def digest_rows(digests: Iterable[str]) -> NDArray[np.uint8]:
    """Hexadecimal digests as rows ``(N, 32)``."""
    return np.frombuffer(bytes.fromhex("".join(digests)), np.uint8).reshape(-1, 32)
