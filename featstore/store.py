"""FeatureStore: feature sets on disk and image sets beside them; finds them by what decides their values.

Folders are named for people and keyed by hashes::

    <root>/<backbone>@<cut>-<trunk12>/<reduction>-<view>-<dtype>-<key8>[-seed3]/part-*.h5
    <root>/images/<name>-<hash8>.h5
"""

from __future__ import annotations

import getpass
import hashlib
import re
import secrets
import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from featstore.digest import Json, canonical_json
from featstore.errors import AmbiguousRequestError, DamagedFileError, FeatureStoreError, MissingFeaturesError
from featstore.features import Features, RowIndex
from featstore.images import AbsentSource, Digests, ImageSet, KnownDigest, StatFacts
from featstore.part import Part, Table, write_part, write_table
from featstore.spec import FeatureSpec
from featstore.staged import AbsentStage, StagedModel
from featstore.views import View

IMAGES = "images"
"""The folder of the image tables."""

DTYPES = {"float16": torch.float16, "float32": torch.float32, "bfloat16": torch.bfloat16}


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
    precision: str | None = None

    def accepts(self, spec: FeatureSpec) -> bool:
        """Whether features of `spec` are what is asked for."""
        return (
            spec.trunk == self.trunk
            and spec.pool == self.pool
            and spec.view == self.view.facts()
            and self.dtype in (None, spec.dtype)
            and self.precision in (None, spec.precision)
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class FeatureSet:
    """The parts of one spec.

    Attributes:
        folder: where they lie.
        spec: what decided their values.
        parts: in the order of their names, without those that another part supersedes.
    """

    folder: Path
    spec: FeatureSpec
    parts: tuple[Part, ...]

    @property
    def key(self) -> str:
        """The spec's key."""
        return self.spec.key

    @cached_property
    def facts(self) -> dict[str, Json]:
        """Facts of the newest part: stages, profile, probe, backbone and cut as people call them, who and when."""
        return max(self.parts, key=lambda part: str(part.facts["when"])).facts

    @cached_property
    def index(self) -> RowIndex:
        """Where each image's row lies."""
        return RowIndex(self.parts)

    @property
    def failed(self) -> dict[str, str]:
        """Digest (hexadecimal) -> reason, of the images that have failed and have no row."""
        failed = {digest: reason for part in self.parts for digest, reason in part.facts["failed"].items()}
        rows = {bytes(row).hex() for part in self.parts for row in part.digests} if failed else set()
        return {digest: reason for digest, reason in failed.items() if digest not in rows}

    @property
    def num_bytes(self) -> int:
        """Size of its files."""
        return sum(part.path.stat().st_size for part in self.parts)

    def describe(self) -> dict[str, Json]:
        """What `ls` lists."""
        view = self.spec.rendered
        return {
            "key": self.key,
            "backbone": self.facts["backbone"],
            "cut": self.facts["cut"],
            "reduce": self.spec.reduction,
            "view": "evaluation" if view.policy is None else view.policy.name,
            "seed": view.seed,
            "size": view.size,
            "dtype": self.spec.dtype,
            "precision": self.spec.precision,
            "rows": self.index.num_images,
            "failed": len(self.failed),
            "shape": list(self.parts[0].shape),
            "parts": len(self.parts),
            "bytes": self.num_bytes,
            "when": self.facts["when"],
            "folder": str(self.folder),
        }


class FeatureStore:
    """Feature sets and image sets below the folder `root`.

    Any number of processes may read and write one store. Parts are immutable, so an opened one is kept.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)  # as given, for messages
        self._folder = self.root.absolute()  # parts are mapped later, maybe from another working directory
        self._opened: dict[Path, Part] = {}

    def __repr__(self) -> str:
        return f"FeatureStore({str(self.root)!r})"

    # ------------------------------------------------------------------------------------------------- feature sets

    def sets(self, trunk: str | None = None) -> list[FeatureSet]:
        """All feature sets that have a part, or those of one trunk digest, in the order of their folders.

        Raises:
            FeatureStoreError: if there is no store.
            DamagedFileError: for a part that is damaged or lies in another set's folder.
        """
        self.check_exists()
        pattern = "*/*" if trunk is None else f"*-{trunk[:12]}/*"
        found = [self._set_in(folder) for folder in sorted(self._folder.glob(pattern)) if _may_hold_parts(folder)]
        return [each for each in found if each is not None and trunk in (None, each.spec.trunk)]

    def find(self, request: FeatureRequest) -> list[FeatureSet]:
        """The sets that a request accepts; an empty list also where there is no store yet."""
        if not self.root.is_dir():
            return []
        return [each for each in self.sets(request.trunk) if request.accepts(each.spec)]

    def find_one(self, request: FeatureRequest, key: str | None = None) -> FeatureSet | None:
        """The one set that a request accepts (and whose key starts with `key`), or None.

        Raises:
            AmbiguousRequestError: if there are several; the message lists what differs.
        """
        found = [each for each in self.find(request) if key is None or each.key.startswith(key)]
        if len(found) > 1:
            raise AmbiguousRequestError(self._ambiguous(found, "fit this request"))
        return found[0] if found else None

    def set(self, key: str) -> FeatureSet:
        """The set whose key starts with `key`.

        Raises:
            FeatureStoreError: if there is none.
            AmbiguousRequestError: if there are several.
        """
        found = [each for each in self.sets() if each.key.startswith(key)]
        if not found:
            raise FeatureStoreError(f"{self.root} holds no feature set {key}. List what it holds: {self._ls()}.")
        if len(found) > 1:
            raise AmbiguousRequestError(self._ambiguous(found, f"have keys that start with {key}"))
        return found[0]

    def features(
        self,
        images: ImageSet,
        which: FeatureRequest | FeatureSet | str,
        *,
        on_error: Literal["raise", "skip"] = "raise",
    ) -> Features:
        """The features of `images`, joined by content, in their order.

        Args:
            images: any set; its digests are taken as far as they aren't known.
            which: a request, a set, or the start of a key.
            on_error: `skip` leaves out images that failed when they were extracted.

        Raises:
            MissingFeaturesError: if images lack a row; nothing is ever filled in.
            FeatureStoreError: if no set fits.
        """
        chosen = self._chosen(which)
        digests = images.digests(self.known_digests(images))
        missing = self.missing(chosen, digests)
        if on_error == "skip":
            keep = ~(missing & self.is_failed(chosen, digests))
            if not keep.all():
                images, missing = images.select(keep), missing[keep]
                digests = images.digests(self.known_digests(images))
        if missing.any():
            names = [images.ids[index] for index in np.flatnonzero(missing)[:3]]
            raise MissingFeaturesError(
                f"{self.root} holds {int((~missing).sum()):,} of the {len(images):,} images asked for "
                f"({chosen.facts['backbone']}@{chosen.facts['cut']} {chosen.spec.reduction}, "
                f"{chosen.spec.rendered.label()}); {int(missing.sum()):,} are missing ({', '.join(names)}"
                f"{', ...' if missing.sum() > 3 else ''}). Compute them with featstore extract, or ask for the images "
                "that are there."
            )
        part_of, row_in = chosen.index.find(digests.values)
        return Features(images, chosen.spec, chosen.index.parts, part_of, row_in)

    def missing(self, chosen: FeatureSet | None, digests: Digests) -> NDArray[np.bool_]:
        """``(N,)``: True where an image has no row in the set (all, where there is no set)."""
        if chosen is None:
            return np.ones(len(digests), dtype=bool)
        part_of, _ = chosen.index.find(digests.values)
        result: NDArray[np.bool_] = (part_of < 0) | digests.is_failed
        return result

    def is_failed(self, chosen: FeatureSet | None, digests: Digests) -> NDArray[np.bool_]:
        """``(N,)``: True where an image can't be read now, or failed when the set was extracted."""
        failed = {} if chosen is None else chosen.failed
        if not failed:
            return digests.is_failed
        recorded = np.array([bytes(row).hex() in failed for row in digests.values], dtype=np.bool_)
        return np.logical_or(digests.is_failed, recorded)

    def model(self, key: str) -> StagedModel:
        """The model of a set as far as a store knows it: stage names, shapes and digests, without weights.

        Heads on it train, save and predict on stored features; `StagedModel.attach` puts the real trunk in.
        """
        chosen = self.set(key)
        stages = [
            AbsentStage(name=stage["name"], layout=stage["layout"], shape=tuple(stage["shape"]), digest=stage["digest"])
            for stage in chosen.facts["stages"]
        ]
        return StagedModel(
            stages,
            view=chosen.spec.rendered.evaluation,
            name=chosen.facts["backbone"],
            class_tokens=chosen.facts["class_tokens"],
        )

    def write(
        self,
        spec: FeatureSpec,
        *,
        features: Sequence[Tensor],
        digests: NDArray[np.uint8],
        decoders: NDArray[np.uint8],
        facts: Mapping[str, Json],
    ) -> Path:
        """Publishes one part of the set `spec`: whole and synced, or not at all.

        Args:
            spec: the set.
            features: chunks ``(n, *F)`` in the storage type.
            digests: ``(n, 32)``, the images of the rows.
            decoders: ``(n,)``.
            facts: at least backbone, cut, stages, class_tokens, profile, probe and failed.
        """
        folder = self._folder / _folder_name(spec, str(facts["backbone"]), str(facts["cut"]))
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"part-{secrets.token_hex(8)}.h5"
        stamped = {
            **facts,
            "spec": spec.facts(),
            "key": spec.key,
            "supersedes": [],
            "who": _who(),
            "when": datetime.now(UTC).isoformat(timespec="microseconds"),
        }
        write_part(path, features=features, digests=digests, decoders=decoders, facts=stamped)
        return path

    # --------------------------------------------------------------------------------------------------- image sets

    def images(self, name: str | None = None) -> ImageSet:
        """The newest image set in the store, or the newest called `name`; its files may be elsewhere.

        Raises:
            FeatureStoreError: if there is none.
            AmbiguousRequestError: if there are several names, or two newest ones of a name.
        """
        newest = [table for table in self._newest_tables() if name is None or name in (table.name, table.path.stem)]
        if not newest:
            called = f" called {name}" if name else ""
            raise FeatureStoreError(f"{self.root} holds no image set{called}. Extract features into it first.")
        if len(newest) > 1:
            listed = ", ".join(f"{table.path.stem} ({table.num_images:,} images)" for table in newest)
            raise AmbiguousRequestError(
                f"{self.root} holds several image sets: {listed}. Name one: ImageSet.from_store(store, name=...)."
            )
        return newest[0].image_set()

    def save_images(self, images: ImageSet, digests: Digests) -> Path | None:
        """Files an image set as a new table, child of the newest of its name; None if that one says the same.

        A label edit, a new split or new images make a new table and touch no features.
        """
        parents = [table for table in self._newest_tables() if table.name == images.name]
        columns, facts = _table_content(images, digests)
        content = _content_hash(columns, facts)
        if len(parents) == 1 and parents[0].table.facts["content"] == content:
            return None
        facts = {**facts, "content": content, "parents": sorted(parent.path.stem for parent in parents)}
        name8 = hashlib.sha256(canonical_json([content, facts["parents"]]).encode("ascii")).hexdigest()[:8]
        path = self._folder / IMAGES / f"{images.name}-{name8}.h5"
        if path.exists():  # another process has just filed the same
            return None
        path.parent.mkdir(parents=True, exist_ok=True)
        stamped = {**facts, "who": _who(), "when": datetime.now(UTC).isoformat(timespec="microseconds")}
        write_table(path, columns=columns, facts=stamped)
        return path

    def known_digests(self, images: ImageSet) -> dict[str, KnownDigest]:
        """What the newest tables of this set's name know of its files, so that unchanged ones aren't read again."""
        known: dict[str, KnownDigest] = {}
        for table in self._newest_tables():
            if images.name == table.name or images.name.startswith(f"{table.name}-"):
                known.update(table.known())
        return known

    def check_exists(self) -> None:
        """Raises FeatureStoreError if there is no folder."""
        if not self.root.is_dir():
            raise FeatureStoreError(
                f"There is no store {self.root}. Give the folder of an existing one with --store, or make one: "
                "featstore extract --store."
            )

    # -------------------------------------------------------------------------------------------------------- inside

    def _chosen(self, which: FeatureRequest | FeatureSet | str) -> FeatureSet:
        if isinstance(which, FeatureSet):
            return which
        if isinstance(which, str):
            return self.set(which)
        found = self.find_one(which)
        if found is None:
            raise MissingFeaturesError(f"{self.root} holds no features that fit this request. It holds: {self._ls()}.")
        return found

    def _set_in(self, folder: Path) -> FeatureSet | None:
        parts = [self._part(path) for path in sorted(folder.glob("part-*.h5"))]
        superseded = {name for part in parts for name in part.facts["supersedes"]}
        parts = [part for part in parts if part.path.name not in superseded]
        if not parts:
            return None
        spec = FeatureSpec.from_facts(parts[0].facts["spec"])
        for part in parts:
            if part.facts["key"] != spec.key or FeatureSpec.from_facts(part.facts["spec"]).key != spec.key:
                raise DamagedFileError(
                    f"{part.path} belongs to set {part.facts['key'][:8]}, and {parts[0].path.name} beside it to set "
                    f"{spec.key[:8]}. A folder holds one set; move the file back to where it was written."
                )
        return FeatureSet(folder=folder, spec=spec, parts=tuple(parts))

    def _part(self, path: Path) -> Part:
        if path not in self._opened:
            self._opened[path] = Part.open(path)
        return self._opened[path]

    def _newest_tables(self) -> list[_ImageTable]:
        tables = [_ImageTable(path, Table.open(path)) for path in sorted((self._folder / IMAGES).glob("*.h5"))]
        parents = {name for table in tables for name in table.table.facts["parents"]}
        return [table for table in tables if table.path.stem not in parents]

    def _ambiguous(self, found: Sequence[FeatureSet], how: str) -> str:
        facts = [_flat(each.spec) | {"cut": each.facts["cut"], "backbone": each.facts["backbone"]} for each in found]
        differing = [name for name in facts[0] if len({str(fact.get(name)) for fact in facts}) > 1]
        listed = "; ".join(
            f"{each.key[:8]} ({', '.join(f'{name} {fact[name]}' for name in differing) or 'equal'})"
            for each, fact in zip(found, facts, strict=True)
        )
        return f"{len(found)} feature sets in {self.root} {how}: {listed}. Choose one by its key: --features KEY."

    def _ls(self) -> str:
        return f"featstore ls --store {self.root}"


@dataclass(frozen=True)
class _ImageTable:
    """An image table as the store reads it; `docs/format.md` lists its columns."""

    path: Path
    table: Table

    @property
    def name(self) -> str:
        return str(self.table.facts["name"])

    @property
    def num_images(self) -> int:
        return len(self.table.columns["digest"])

    def ids(self) -> tuple[str, ...]:
        return tuple(_texts(self.table.columns["id_bytes"], self.table.columns["id_ends"]))

    def known(self) -> dict[str, KnownDigest]:
        columns = self.table.columns
        rows = zip(self.ids(), columns["digest"], columns["stat"].tolist(), columns["has_digest"].tolist(), strict=True)
        return {
            name: KnownDigest(bytes(digest), StatFacts(*stat) if stat[0] >= 0 else None)
            for name, digest, stat, has_digest in rows
            if has_digest
        }

    def image_set(self) -> ImageSet:
        columns, facts = self.table.columns, self.table.facts
        groups = facts["groups"]
        return ImageSet(
            name=self.name,
            ids=self.ids(),
            targets=columns.get("target"),
            classes=tuple(facts["classes"]),
            splits=np.array(_SPLIT_NAMES)[columns["split"]],
            groups=None if groups is None else tuple(groups[place] for place in columns["group"]),
            task=facts["task"],
            source=AbsentSource(where=str(self.path.with_suffix("")), known=self.known()),
        )


_SPLIT_NAMES = ("", "train", "valid", "test")


def _table_content(images: ImageSet, digests: Digests) -> tuple[dict[str, NDArray[Any]], dict[str, Json]]:
    id_bytes, id_ends = _packed(images.ids)
    no_stat = StatFacts(-1, -1, -1, -1, -1)
    columns: dict[str, NDArray[Any]] = {
        "id_bytes": id_bytes,
        "id_ends": id_ends,
        "digest": np.ascontiguousarray(digests.values),
        "has_digest": (~digests.is_failed).astype(np.uint8),
        "stat": np.array([tuple(stat or no_stat) for stat in digests.stats], np.int64).reshape(-1, 5),
        "split": np.array([_SPLIT_NAMES.index(split) for split in images.splits.tolist()], np.uint8),
    }
    groups: list[str] | None = None
    if images.groups is not None:
        groups = sorted(set(images.groups))
        places = {group: place for place, group in enumerate(groups)}
        columns["group"] = np.array([places[group] for group in images.groups], np.int64)
    if images.targets is not None:
        columns["target"] = np.ascontiguousarray(images.targets)
    return columns, {"name": images.name, "task": images.task, "classes": list(images.classes), "groups": groups}


def _content_hash(columns: Mapping[str, NDArray[Any]], facts: Mapping[str, Json]) -> str:
    digest = hashlib.sha256(canonical_json(dict(facts)).encode("ascii"))
    for name in sorted(columns):
        digest.update(canonical_json([name, str(columns[name].dtype), list(columns[name].shape)]).encode("ascii"))
        digest.update(np.ascontiguousarray(columns[name]).tobytes())
    return digest.hexdigest()


def _packed(texts: Iterable[str]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    encoded = [text.encode("utf-8", "surrogateescape") for text in texts]  # file names need not be valid UTF-8
    ends = np.cumsum([len(text) for text in encoded], dtype=np.int64)
    return np.frombuffer(b"".join(encoded), np.uint8), ends


def _texts(packed: NDArray[np.uint8], ends: NDArray[np.int64]) -> Iterator[str]:
    data, start = packed.tobytes(), 0
    for end in ends.tolist():
        yield data[start:end].decode("utf-8", "surrogateescape")
        start = end


def _folder_name(spec: FeatureSpec, backbone: str, cut: str) -> Path:
    view = spec.rendered
    words = [spec.reduction, "evaluation" if view.policy is None else view.policy.name, spec.dtype, spec.key[:8]]
    seed = [] if view.seed is None else [f"seed{view.seed}"]
    return Path(f"{_safe(backbone)}@{_safe(cut)}-{spec.trunk[:12]}", "-".join([*map(_safe, words), *seed]))


def _safe(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._]+", "_", text)[:80]


def _may_hold_parts(folder: Path) -> bool:
    return folder.is_dir() and folder.parent.name != IMAGES and not folder.name.startswith(".")


def _flat(spec: FeatureSpec) -> dict[str, Json]:
    view = {f"view {name}": value for name, value in spec.view.items()}
    return {"trunk": spec.trunk[:8], "reduce": spec.reduction, "dtype": spec.dtype, "precision": spec.precision} | view


def _who() -> str:
    try:
        user = getpass.getuser()
    except (OSError, KeyError):  # a container without a user database
        user = "unknown"
    return f"{user}@{socket.gethostname()}"
