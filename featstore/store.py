"""FeatureStore: feature sets on disk and image sets beside them; finds them by what decides their values.

Folders are named for people and keyed by hashes::

    <root>/<backbone>@<cut>-<trunk12>/<reduction>-<view>-<dtype>-<key8>[-seed3]/part-*.h5
    <root>/images/<name>-<hash8>.h5

A set is known by what its parts say, not by what folders are called. `docs/format.md` is normative.
"""

from __future__ import annotations

import getpass
import hashlib
import re
import secrets
import socket
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from featstore.digest import Json, canonical_json, digest_json
from featstore.errors import (
    AmbiguousRequestError,
    DamagedFileError,
    FactsDifferError,
    FeatureStoreError,
    MissingFeaturesError,
)
from featstore.features import Features, RowIndex, is_among
from featstore.images import AbsentSource, Digests, ImageSet, KnownDigest, StatFacts
from featstore.part import Part, Table, make_folder, write_part, write_table
from featstore.spec import FeatureSpec
from featstore.staged import StagedModel
from featstore.trunk import PRECISIONS, Precision
from featstore.views import View

IMAGES = "images"
"""The folder of the image tables."""

_PARTS = "part-*.h5"
_TRUNK_DIGITS, _KEY_DIGITS = 12, 8
_FACTS = frozenset(
    {"spec", "key", "backbone", "cut", "stages", "class_tokens", "profile", "probe", "failed", "supersedes", "when"}
)
"""What readers of a part rely on."""

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
    precision: Precision | None = None

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
            for dtype in ([self.dtype] if self.dtype else DTYPES)
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
        folder: where they lie; the first one, if jobs that call the model differently have filled several.
        spec: what decided their values.
        parts: in the order of their names, without those that another part supersedes.
    """

    folder: Path
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

    @cached_property
    def facts(self) -> dict[str, Json]:
        """Facts of the newest part: stages, profile, probe, backbone and cut as people call them, who and when."""
        return max(self.parts, key=lambda part: str(part.facts["when"])).facts

    @cached_property
    def index(self) -> RowIndex:
        """Where each image's row lies."""
        return RowIndex(self.parts)

    @cached_property
    def failed(self) -> dict[str, str]:
        """Digest (hexadecimal) -> reason, of the images that have failed and have no row: a later success counts."""
        reasons = {digest: reason for part in self.parts for digest, reason in part.facts["failed"].items()}
        has_row = self.index.find(_digest_rows(reasons))[0] >= 0
        return {digest: reason for (digest, reason), has in zip(reasons.items(), has_row, strict=True) if not has}

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

    Any number of processes may read and write one store. Files in it never change, so what was opened is kept.

    Raises:
        ValueError: if `root` is a file.
    """

    def __init__(self, root: str | Path) -> None:
        if Path(root).is_file():
            raise ValueError(f"{root} is a file. Expected the folder of a store, or the name of a new one.")
        self.root = Path(root)  # as given, for messages
        self._folder = self.root.absolute()  # parts are mapped later, maybe from another working directory
        self._parts: dict[Path, _OpenedPart] = {}
        self._sets: dict[str, FeatureSet] = {}
        self._tables: dict[Path, _ImageTable] = {}

    def __repr__(self) -> str:
        return f"FeatureStore({str(self.root)!r})"

    # ------------------------------------------------------------------------------------------------- feature sets

    def sets(self, trunk: str | None = None) -> list[FeatureSet]:
        """The sound feature sets, or those of one trunk digest, in the order of their folders.

        A set that a damaged file belongs to is left out, as its rows can't be told from missing ones; `damaged` names
        such files. Whoever asks for that very set gets the error.

        Raises:
            FeatureStoreError: if there is no store.
        """
        self.check_exists()
        found = []
        for spec, folders in self._folders_by_spec(self._folders(trunk)):
            with suppress(DamagedFileError):
                found.append(self._set_of(spec, folders))
        return [each for each in found if trunk in (None, each.spec.trunk)]

    def damaged(self) -> list[DamagedFileError]:
        """An error for each part and image table that can't be used: it names the file and what to do."""
        errors: dict[str, DamagedFileError] = {}
        for folder in self._folders(None):
            for path in sorted(folder.glob(_PARTS)):
                with _collected(errors):
                    self._part(path)
        for spec, folders in self._folders_by_spec(self._folders(None)):
            with _collected(errors):  # sound files in the wrong place
                self._set_of(spec, folders)
        for path in self._table_paths():
            with _collected(errors):
                self._table(path)
        return list(errors.values())

    def find(self, request: FeatureRequest) -> list[FeatureSet]:
        """The sets that a request accepts; an empty list also where there is no store yet.

        Raises:
            DamagedFileError: for a damaged file of such a set. Other sets' files don't matter, but in a renamed folder
                that holds nothing else: it may be of such a set.
        """
        folders = self._folders(request.trunk)
        digits = {"", *(key[:_KEY_DIGITS] for key in request.keys)}
        asked = [folder for folder in folders if _key_in(folder.name) in digits]
        specs = self._folders_by_spec(folders, asked=asked)
        return [self._set_of(spec, holding) for spec, holding in specs if request.accepts(spec)]

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
            DamagedFileError: for a damaged file of that set.
        """
        self.check_exists()
        folders = self._folders(None)
        # A set's folder is named with its key: looking there first spares opening a file of each set, which matters
        # with hundreds of them. The names are for people, though, so a folder may have been renamed.
        named = [folder for folder in folders if _key_in(folder.name).startswith(key[:_KEY_DIGITS])]
        for candidates in (named, folders):
            specs = [
                (spec, holding)
                for spec, holding in self._folders_by_spec(candidates, asked=named)
                if spec.key.startswith(key)
            ]
            if len(specs) > 1:
                found = [self._set_of(spec, holding) for spec, holding in specs]
                raise AmbiguousRequestError(self._ambiguous(found, f"have keys that start with {key}"))
            for spec, holding in specs:
                beside = {each.key: there for each, there in self._folders_by_spec(self._folders(spec.trunk))}
                return self._set_of(spec, sorted({*holding, *beside.get(spec.key, [])}))
        raise FeatureStoreError(f"{self.root} holds no feature set {key}. List what it holds: {self._ls()}.")

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
            on_error: `skip` leaves out images that failed when they were extracted, or can't be read now.

        Raises:
            MissingFeaturesError: if images lack a row; nothing is ever filled in.
            FactsDifferError: if no set fits; the message names the facts in which the nearest one differs.
            FeatureStoreError: if there is no store, or no set of that key.
        """
        if on_error not in ("raise", "skip"):
            raise ValueError(f"on_error is {on_error!r}; expected raise or skip.")
        chosen = self._chosen(which)
        digests = images.digests(self.known_digests(images))
        missing = self.missing(chosen, digests)
        if on_error == "skip":
            missing &= ~self.is_failed(chosen, digests)
        if missing.any():
            raise MissingFeaturesError(self._lacks(chosen, images, digests, missing))
        part_of, row_in = chosen.index.find(digests.values)
        has_row = (part_of >= 0) & ~digests.is_failed
        if not has_row.all():
            images, part_of, row_in = images.select(has_row), part_of[has_row], row_in[has_row]
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
        return np.logical_or(digests.is_failed, is_among(digests.values, _digest_rows(failed)))

    def model(self, key: str) -> StagedModel:
        """The model of a set as far as a store knows it: stage names, shapes and digests, without weights.

        Heads on it train, save and predict on stored features; `StagedModel.attach` puts the real trunk in.
        """
        chosen = self.set(key)
        return StagedModel.absent(
            chosen.facts["stages"],
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
        folder = self._folder_of(spec) or self._folder / _folder_name(spec, str(facts["backbone"]), str(facts["cut"]))
        make_folder(folder, root=self._folder)
        path = folder / f"part-{secrets.token_hex(8)}.h5"
        stamped = {**facts, "spec": spec.facts(), "key": spec.key, "view": spec.view, "supersedes": [], **_signature()}
        write_part(path, features=features, digests=digests, decoders=decoders, facts=stamped)
        return path

    # --------------------------------------------------------------------------------------------------- image sets

    def images(self, name: str | None = None) -> ImageSet:
        """The newest image set in the store, or the newest called `name`; its files may be elsewhere.

        Raises:
            FeatureStoreError: if there is none.
            AmbiguousRequestError: if there are several names, or two newest ones of a name.
        """
        self.check_exists()
        newest = self._newest_tables(lambda table: name in (None, table))
        if name is not None and not newest:
            newest = [self._table(path) for path in self._table_paths() if path.stem == name]
        if not newest:
            called = f" called {name}" if name else ""
            names = ", ".join(sorted({_table_name(path) for path in self._table_paths()})) or "none"
            raise FeatureStoreError(
                f"{self.root} holds no image set{called}; those it holds: {names}. Extract features of it first."
            )
        if len(newest) > 1:
            listed = ", ".join(f"{table.path.stem} ({table.num_images:,} images)" for table in newest)
            raise AmbiguousRequestError(
                f"{self.root} holds several image sets: {listed}. Name one: ImageSet.from_store(store, name=...)."
            )
        (table,) = newest
        return table.image_set(where=str(self.root / IMAGES / table.path.stem))

    def save_images(self, images: ImageSet, digests: Digests) -> Path | None:
        """Files an image set as a new table, child of the newest of its name; None if that one says the same.

        A label edit, a new split or new images make a new table and touch no features. Two newest tables of a name,
        left by jobs that filed different content at once, both become parents, so that there is one newest again.
        """
        parents = self._newest_tables(lambda name: name == images.name)
        columns, facts = _table_content(images, digests)
        content = _content_hash(columns, facts)
        if len(parents) == 1 and parents[0].table.facts["content"] == content:
            return None
        facts = {**facts, "content": content, "parents": sorted(parent.path.stem for parent in parents)}
        path = self._folder / IMAGES / f"{images.name}-{_table_hash8(columns, facts)}.h5"
        make_folder(path.parent, root=self._folder)
        try:
            write_table(path, columns=columns, facts={**facts, **_signature()})
        except FileExistsError:  # another process has just filed the same
            return None
        return path

    def known_digests(self, images: ImageSet) -> dict[str, KnownDigest]:
        """What the newest tables of this set's name know of its files, so that unchanged ones aren't read again."""
        known: dict[str, KnownDigest] = {}
        for table in self._newest_tables(lambda name: images.name == name or images.name.startswith(f"{name}-")):
            known.update(table.known)
        return known

    def check_exists(self) -> None:
        """Raises FeatureStoreError if there is no folder."""
        if not self._folder.is_dir():
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
            self.check_exists()
            raise FactsDifferError(self._differs(which))
        return found

    def _folders(self, trunk: str | None) -> list[Path]:
        """Folders that may hold a set of one trunk, or of any: below a trunk's folder, or copied here by themselves."""
        below = self._folder.glob("*/*" if trunk is None else f"*-{trunk[:_TRUNK_DIGITS]}/*")
        return sorted(folder for folder in {*below, *self._folder.glob("*")} if self._may_hold_parts(folder))

    def _may_hold_parts(self, folder: Path) -> bool:
        names = folder.relative_to(self._folder).parts
        return names[0] != IMAGES and not any(name.startswith(".") for name in names) and folder.is_dir()

    def _folders_by_spec(
        self, folders: Iterable[Path], *, asked: Collection[Path] = ()
    ) -> list[tuple[FeatureSpec, list[Path]]]:
        """Each spec that has parts in `folders`, and where; a folder holds parts of one spec.

        One sound part says what a folder holds, and the others stay closed until someone wants them. A folder without
        one is left out, or, if it is in `asked`, is an error: it may hold what is asked for.
        """
        found: dict[str, tuple[FeatureSpec, list[Path]]] = {}
        for folder in folders:
            try:
                spec = self._spec_in(folder)
            except DamagedFileError:
                if folder in asked:
                    raise
                continue
            if spec is not None:
                found.setdefault(spec.key, (spec, []))[1].append(folder)
        return list(found.values())

    def _spec_in(self, folder: Path) -> FeatureSpec | None:
        damage: DamagedFileError | None = None
        for path in sorted(folder.glob(_PARTS)):
            try:
                return self._part(path).spec
            except FileNotFoundError:  # superseded, and unlinked since it was listed
                continue
            except DamagedFileError as error:
                damage = damage or error
        if damage is not None:
            raise damage
        return None

    def _set_of(self, spec: FeatureSpec, folders: Sequence[Path]) -> FeatureSet:
        opened = sorted((each for folder in folders for each in self._parts_in(folder)), key=lambda each: each.name)
        for each in opened:
            if each.spec.key != spec.key:
                raise DamagedFileError(
                    f"{each.part.path} belongs to set {each.spec.key[:8]}, and others beside it to set {spec.key[:8]}. "
                    "A folder holds one set; move the file back to where it was written."
                )
        superseded = {name for each in opened for name in each.part.facts["supersedes"]}
        current = tuple(each.part for each in opened if each.name not in superseded)
        known = self._sets.get(spec.key)
        if known is None or known.parts != current:
            known = self._sets[spec.key] = FeatureSet(folder=folders[0], spec=spec, parts=current)
        return known

    def _parts_in(self, folder: Path) -> list[_OpenedPart]:
        while True:
            paths = sorted(folder.glob(_PARTS))
            try:
                return [self._part(path) for path in paths]
            except FileNotFoundError as error:  # superseded, and unlinked since it was listed: look again
                if Path(error.filename).is_symlink():
                    raise DamagedFileError(
                        f"{error.filename} is a link to a file that isn't there. Put a sound copy of the file in its "
                        "place, or delete the link and extract again, which computes only what is then missing."
                    ) from error

    def _part(self, path: Path) -> _OpenedPart:
        if path not in self._parts:
            self._parts[path] = _OpenedPart.of(Part.open(path))
        return self._parts[path]

    def _folder_of(self, spec: FeatureSpec) -> Path | None:
        """The folder that holds the set already, whatever the model was called when it was made."""
        for folder in self._folders(spec.trunk):
            with suppress(DamagedFileError):  # what has been computed is filed all the same
                if _key_in(folder.name) == spec.key[:_KEY_DIGITS] and self._spec_in(folder) == spec:
                    return folder
        return None

    def _table_paths(self) -> list[Path]:
        return sorted(path for path in (self._folder / IMAGES).glob("*.h5") if not path.name.startswith("."))

    def _newest_tables(self, is_asked: Callable[[str], bool]) -> list[_ImageTable]:
        """Of the tables whose name is asked for, those that are no other's parent."""
        tables = []
        for path in self._table_paths():
            if is_asked(_table_name(path)):
                with suppress(FileNotFoundError):  # deleted since it was listed
                    tables.append(self._table(path))
        parents = {name for table in tables for name in table.table.facts["parents"]}
        return [table for table in tables if table.path.stem not in parents]

    def _table(self, path: Path) -> _ImageTable:
        if path not in self._tables:
            self._tables[path] = _ImageTable(path, Table.open(path))
        return self._tables[path]

    def _lacks(self, chosen: FeatureSet, images: ImageSet, digests: Digests, missing: NDArray[np.bool_]) -> str:
        places = np.flatnonzero(missing).tolist()
        named = [
            f"{images.ids[place]}: {digests.failed[place]}" if place in digests.failed else images.ids[place]
            for place in places[:3]
        ]
        return (
            f"{self.root} holds {len(images) - len(places):,} of the {len(images):,} images asked for "
            f"({chosen.facts['backbone']}@{chosen.facts['cut']} {chosen.spec.reduction}, "
            f"{chosen.spec.rendered.label()}, set {chosen.key[:8]}); {len(places):,} are missing ({'; '.join(named)}"
            f"{'; ...' if len(places) > 3 else ''}). Compute them with featstore extract, or ask for the images that "
            "are there."
        )

    def _differs(self, request: FeatureRequest) -> str:
        """Which set is nearest to a request that none fits, and in what it differs."""
        compared = [(request.differences(each.spec), each) for each in self.sets()]
        if not compared:
            unusable = self.damaged()
            if unusable:
                return f"{self.root} holds no features that can be used. {unusable[0]}"
            return f"{self.root} holds no features yet. Compute them with featstore extract."
        differences, nearest = min(compared, key=lambda item: (len(item[0]), -item[1].index.num_images))
        listed = "; ".join(f"{name} (stored {stored}, yours {yours})" for name, stored, yours in differences)
        return (
            f"No stored features fit this request in {self.root}. Nearest is set {nearest.key[:8]} "
            f"({nearest.facts['backbone']}@{nearest.facts['cut']}); it differs in: {listed}. Compute what you ask for "
            f"with featstore extract, or ask for what is there: {self._ls()}."
        )

    def _ambiguous(self, found: Sequence[FeatureSet], how: str) -> str:
        differing = {name: None for each in found for name, _, _ in found[0].spec.differences(each.spec)}
        listed = []
        for each in found:
            # Against another one: a fact's value stands in the words of a difference.
            others = [other.spec for other in found if other is not each]
            facts = {name: value for other in others for name, value, _ in each.spec.differences(other)}
            words = ", ".join(f"{name} {facts[name]}" for name in differing if name in facts)
            listed.append(f"{each.key[:8]} ({words})")
        return (
            f"{len(found)} feature sets in {self.root} {how}: {'; '.join(listed)}. Choose one by its key: --features "
            "KEY."
        )

    def _ls(self) -> str:
        return f"featstore ls --store {self.root}"


@dataclass(frozen=True)
class _OpenedPart:
    """A part whose facts are those of the format, whole and understood."""

    part: Part
    spec: FeatureSpec

    @classmethod
    def of(cls, part: Part) -> _OpenedPart:
        """`part` with its spec.

        Raises:
            DamagedFileError: for facts that are incomplete, contradict each other, or come from a newer featstore.
        """
        try:
            spec = FeatureSpec.from_facts(part.facts["spec"])
            if missing := _FACTS - part.facts.keys():
                raise ValueError(f"its facts lack {', '.join(sorted(missing))}")
            if part.facts["key"] != spec.key or spec.rendered.facts() != spec.view:
                raise ValueError("its key isn't that of its spec")
            if part.dtype != DTYPES[spec.dtype]:
                raise ValueError(f"it holds {part.dtype}, and its spec says {spec.dtype}")
        except (KeyError, TypeError, ValueError) as error:
            raise DamagedFileError(
                f"{part.path} can't be used by this featstore: {error}. If a newer one wrote it, upgrade; else put a "
                "sound copy in its place, or delete it and extract again."
            ) from error
        return cls(part, spec)

    @property
    def name(self) -> str:
        return self.part.path.name


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

    @cached_property
    def known(self) -> dict[str, KnownDigest]:
        columns = self.table.columns
        rows = zip(self.ids(), columns["digest"], columns["stat"].tolist(), columns["has_digest"].tolist(), strict=True)
        return {
            name: KnownDigest(bytes(digest), _unpacked_stat(stat))
            for name, digest, stat, has_digest in rows
            if has_digest
        }

    def image_set(self, *, where: str) -> ImageSet:
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
            source=AbsentSource(where=where, known=self.known),
        )


_SPLIT_NAMES = ("", "train", "valid", "test")


def _table_content(images: ImageSet, digests: Digests) -> tuple[dict[str, NDArray[Any]], dict[str, Json]]:
    id_bytes, id_ends = _packed(images.ids)
    columns: dict[str, NDArray[Any]] = {
        "id_bytes": id_bytes,
        "id_ends": id_ends,
        "digest": np.ascontiguousarray(digests.values),
        "has_digest": (~digests.is_failed).astype(np.uint8),
        "stat": np.array([_packed_stat(stat) for stat in digests.stats], np.int64).reshape(-1, 5),
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


def _packed_stat(stat: StatFacts | None) -> tuple[int, ...]:
    if stat is None:
        return (-1,) * 5
    # An inode is a uint64, and some file systems use the upper half: kept as the int64 of the same bits.
    return tuple(stat._replace(inode=stat.inode - (stat.inode >> 63 << 64)))


def _unpacked_stat(stat: Sequence[int]) -> StatFacts | None:
    facts = StatFacts(*stat)
    return facts._replace(inode=facts.inode % (1 << 64)) if facts.size >= 0 else None


def _table_name(path: Path) -> str:
    return path.stem.rpartition("-")[0]


def _table_hash8(columns: Mapping[str, NDArray[Any]], facts: Mapping[str, Json]) -> str:
    """What tells a table from others of its name: what it says and its parents, not when the files were hashed.

    Jobs that start at once on the same images thus make one table, not several that contradict each other.
    """
    said = _content_hash({**columns, "stat": columns["stat"][:, :4]}, {"parents": facts["parents"]})
    described = {name: value for name, value in facts.items() if name not in ("content", "parents")}
    return digest_json([said, described])[:8]


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
    words = [
        spec.reduction,
        "evaluation" if view.policy is None else view.policy.name,
        spec.dtype,
        spec.key[:_KEY_DIGITS],
    ]
    seed = [] if view.seed is None else [f"seed{view.seed}"]
    return Path(f"{_safe(backbone)}@{_safe(cut)}-{spec.trunk[:_TRUNK_DIGITS]}", "-".join([*map(_safe, words), *seed]))


def _key_in(folder_name: str) -> str:
    """The digits of the key in the name of a set's folder; none if someone has renamed it."""
    found = re.search(rf"-([0-9a-f]{{{_KEY_DIGITS}}})(-seed\d+)?$", folder_name)
    return found[1] if found else ""


def _safe(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._]+", "_", text)[:80]


@contextmanager
def _collected(errors: dict[str, DamagedFileError]) -> Iterator[None]:
    try:
        yield
    except DamagedFileError as error:
        errors[str(error)] = error
    except FileNotFoundError:  # deleted since it was listed
        pass


def _digest_rows(digests: Iterable[str]) -> NDArray[np.uint8]:
    return np.frombuffer(bytes.fromhex("".join(digests)), np.uint8).reshape(-1, 32)


def _signature() -> dict[str, Json]:
    """Who writes a file, and when."""
    try:
        user = getpass.getuser()
    except (OSError, KeyError):  # a container without a user database
        user = "unknown"
    try:
        version = metadata.version("featstore")
    except metadata.PackageNotFoundError:  # run from its source, not installed
        version = "of unknown version"
    return {
        "who": f"featstore {version}, {user}@{socket.gethostname()}",
        "when": datetime.now(UTC).isoformat(timespec="microseconds"),
    }
