"""FeatureStore: feature sets on disk and image sets beside them; finds them by what decides their values."""

from __future__ import annotations

import secrets
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from featstore.digest import Json
from featstore.errors import DamagedFileError, OnError, check_choice
from featstore.files.disk import make_folder
from featstore.files.index import RowIndex, is_among
from featstore.files.part import write_part
from featstore.files.provenance import signature
from featstore.files.storage_types import PIXELS
from featstore.files.table import write_table
from featstore.html import titled_table
from featstore.images.contents import is_changed
from featstore.images.digests import Digests, KnownDigests
from featstore.images.image_set import ImageSet
from featstore.objects import ObjectPath, place_of, seen_at_once
from featstore.store import refusals
from featstore.store.access import Access, check_access
from featstore.store.catalogue import Catalogue, UnsoundSet, part_paths, permitted
from featstore.store.compaction import CompactReport, LeftAlone, compact, delete_replaced, merge
from featstore.store.difference import SetDifference, diff
from featstore.store.folders import folder_name, key_in, short_key
from featstore.store.garbage import GcReport, fault, gc
from featstore.store.image_tables import (
    IMAGES,
    ImageTables,
    last_ids,
    says_the_same,
    table_content,
    table_file,
    table_name,
)
from featstore.store.part_facts import stamped
from featstore.store.removal import RemoveReport, foreseen, remove
from featstore.store.sets import FeatureRequest, FeatureSet, digest_rows
from featstore.store.spec import FeatureSpec
from featstore.store.verification import VerifyReport, verify

if TYPE_CHECKING:
    from torch import Tensor

    from featstore.files.scaled import ScaledRows
    from featstore.models.staged import StagedModel
    from featstore.store.features import Features

DAY_SECONDS = 24 * 3600.0

_TRIES = 10
"""Of writing or reading files that are taken away each time, or their folder is; twice in a row is rare already."""


class FeatureStore:
    """Feature sets and image sets below the folder `root`, or below a prefix in an object store.

    Any number of processes may read and write one store, also while it is compacted, cleared of garbage, or a set
    removed, and any number of threads one object. Files in it never change, so what was opened is kept. Pickles
    without that.

    Args:
        root: the folder; `write` and `save_images` make it. Or an address, ``s3://bucket/prefix``, also of ``gs://``
            and ``az://`` (extra `s3`): what else they need, such as credentials, is in the environment (``AWS_REGION``,
            ``AWS_ENDPOINT_URL`` and the like).
        access: how `features` are read: auto, memory, map or stream (see `Features`).
        memory_bytes: most memory that one `Features` of this store may take for rows; default: see there.

    Raises:
        ValueError: if `root` is a file or another kind of address, or for another access or less than 1 byte.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        access: Access | Literal["auto"] = "auto",
        memory_bytes: int | None = None,
    ) -> None:
        place = place_of(root)
        if not isinstance(place, ObjectPath) and place.is_file():
            raise ValueError(f"{root} is a file. Expected the folder of a store, or the name of a new one.")
        check_access(access, place)
        if memory_bytes is not None and memory_bytes < 1:
            raise ValueError(
                f"memory_bytes is {memory_bytes}; expected at least 1, or None for a share of what is free."
            )
        self.root = place  # as given, for messages
        self.access = access
        self.memory_bytes = memory_bytes
        self._folder = self.root.absolute()  # parts are read later, maybe from another working directory
        self._catalogue = Catalogue(self._folder)
        self._tables = ImageTables(self._folder)

    def __repr__(self) -> str:
        return f"FeatureStore({str(self.root)!r})"

    def _repr_html_(self) -> str:
        return titled_table(repr(self), [each.in_brief() for each in self.sets()])

    @property
    def folder(self) -> Path:
        """`root` as an absolute path, as it was meant when the store was made."""
        return self._folder

    # ------------------------------------------------------------------------------------------------- feature sets
    def sets(self, trunk: str | None = None) -> list[FeatureSet]:
        """The sound feature sets, or those of one trunk digest, in the order of their folders.

        A set that a damaged file belongs to is left out, as its rows can't be told from missing ones; `damaged` names
        such files. Whoever asks for that very set gets the error.

        Raises:
            FeatureStoreError: if there is no store.
        """
        found = []
        with seen_at_once(self._folder):
            self.check_exists()
            everything = self._catalogue.folders(trunk)
            self._catalogue.open_ahead(everything)
            for spec, folders in self._catalogue.specs(everything):
                with suppress(DamagedFileError):
                    found.append(self._catalogue.set_of(spec, folders))
        return [each for each in found if each and trunk in (None, each.spec.trunk)]

    def damaged(self) -> list[DamagedFileError]:
        """An error for each part, image table and folder that can't be used: it names the file and what to do.

        They are opened; `verify` looks at the features as well.
        """
        errors: dict[str, DamagedFileError] = {}
        with seen_at_once(self._folder):
            folders = self._catalogue.folders()
            self._catalogue.open_ahead(folders)
            for folder in folders:
                with _collected(errors):
                    for path in part_paths(folder):
                        with _collected(errors):
                            self._catalogue.part(path)
            for spec, holding in self._catalogue.specs(folders):
                with _collected(errors):  # sound files in the wrong place
                    self._catalogue.set_of(spec, holding)
            for path in self._tables.paths():
                with _collected(errors), permitted(path):
                    self._tables.open(path)
        return list(errors.values())

    def find(self, request: FeatureRequest) -> list[FeatureSet]:
        """The sets that a request accepts; an empty list also where there is no store yet.

        Raises:
            DamagedFileError: for a damaged file of such a set. Other sets' files don't matter, but in a renamed folder
                that holds nothing else: it may be of such a set.
        """
        with seen_at_once(self._folder):
            folders = self._catalogue.folders(request.trunk)
            digits = {"", *map(short_key, request.keys)}
            asked = [folder for folder in folders if key_in(folder.name) in digits]
            specs = self._catalogue.specs(folders, asked=asked)
            found = [self._catalogue.set_of(spec, holding) for spec, holding in specs if request.accepts(spec)]
        return [each for each in found if each]

    def find_one(self, request: FeatureRequest, key: str | None = None) -> FeatureSet | None:
        """The one set that a request accepts (and whose key starts with `key`), or None.

        Raises:
            AmbiguousRequestError: if there are several; the message lists what differs.
        """
        found = [each for each in self.find(request) if key is None or each.key.startswith(key)]
        if len(found) > 1:
            remedy = "Choose one by its key: --features KEY."
            raise refusals.several_sets(self.root, found, "fit this request", remedy)
        return found[0] if found else None

    def set(self, key: str) -> FeatureSet:
        """The set whose key starts with `key`.

        Raises:
            FeatureStoreError: if there is none.
            AmbiguousRequestError: if there are several.
            DamagedFileError: for a damaged file of that set.
        """
        with seen_at_once(self._folder):
            found = self._catalogue.set_of(*self._located(key))
        if found is None:
            raise refusals.holds_no_set(self.root, key)
        return found

    def beside(self, spec: FeatureSpec, known: Collection[Path]) -> FeatureSet | None:
        """What others have written of a set: see `Catalogue.beside`."""
        return self._catalogue.beside(spec, known)

    def features(
        self,
        images: ImageSet,
        which: FeatureRequest | FeatureSet | str,
        *,
        on_error: OnError = "raise",
        access: Access | Literal["auto"] | None = None,
    ) -> Features:
        """The features of `images`, joined by content, in their order.

        Args:
            images: any set; its digests are taken as far as they aren't known.
            which: a request, a set, or the start of a key.
            on_error: `skip` leaves out images that failed when they were extracted, or can't be read now.
            access: how these are read; default: as the store says.

        Raises:
            ValueError: for another `on_error` or `access`.
            MissingFeaturesError: if images lack a row; nothing is ever filled in.
            FactsDifferError: if no set fits; the message names the facts in which the nearest one differs.
            FeatureStoreError: if there is no store, or no set of that key.
        """
        from featstore.store.features import Features  # only who reads rows waits for torch

        check_choice("on_error", on_error, get_args(OnError))
        way = self.access if access is None else access
        check_access(way, self._folder)
        chosen = self._chosen(which)
        digests = images.digests(self.known_digests(images))
        part_of, row_in = chosen.index.find(digests.values)
        has_row = (part_of >= 0) & ~digests.is_failed
        missing = ~has_row & ~self.is_failed(chosen, digests) if on_error == "skip" else ~has_row
        if missing.any():
            changed = is_changed(images, digests, self.known_digests(images))
            raise refusals.lacks_rows(self.root, chosen, images, digests, missing, changed)
        if not has_row.all():
            images, part_of, row_in = images.select(has_row), part_of[has_row], row_in[has_row]
        return Features(
            images,
            chosen.spec,
            chosen.index,
            part_of,
            row_in,
            access=way,
            memory_bytes=self.memory_bytes,
            lookup=partial(_fresh_index, self._folder, chosen.key),
        )

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
        return np.logical_or(digests.is_failed, is_among(digests.values, digest_rows(failed)))

    def superseded(self, chosen: FeatureSet, *, most: int | None = None) -> dict[str, str | None]:
        """The images of superseded rows: digest (hexadecimal) -> the id that the image had, in the order of the ids.

        A row is superseded if no newest image table holds its image, which was replaced or deleted since; without any
        table none is. The id is that of the last table that held the image; None, of the last ones, where none that
        can be read did.

        Args:
            chosen: whose rows.
            most: names so many of them at most, those that were replaced or deleted last; the more, the more tables
                are read.

        Raises:
            DamagedFileError: for a newest image table that can't be read.
        """
        digests = self._superseded(chosen)
        wanted = len(digests) if most is None else min(most, len(digests))
        ids = last_ids(digests, self._tables.latest_first(), wanted=wanted) if wanted else {}
        found = [(ids.get(digest), digest) for digest in (row.tobytes().hex() for row in digests)]
        named = sorted(found, key=lambda each: (each[0] is None, each[0] or each[1]))
        return {digest: name for name, digest in named[:wanted]}

    def num_superseded(self, chosen: FeatureSet) -> int:
        """How many rows `superseded` names, found in less time."""
        return len(self._superseded(chosen))

    def model(self, key: str) -> StagedModel:
        """The model of a set as far as a store knows it: stage names, shapes and digests, without weights.

        Heads on it train, save and predict on stored features; `StagedModel.attach` puts the real trunk in.
        """
        from featstore.models.staged import StagedModel

        chosen = self.set(key)
        model = StagedModel.absent(
            chosen.facts["stages"],
            view=chosen.spec.rendered.evaluation,
            name=chosen.facts["backbone"],
            class_tokens=chosen.facts["class_tokens"],
        )
        model.prefix_tokens = chosen.facts.get("prefix_tokens", model.class_tokens)
        model.origin = {"features": chosen.key}
        return model

    def write(
        self,
        spec: FeatureSpec,
        *,
        features: Sequence[Tensor | ScaledRows],
        digests: NDArray[np.uint8],
        decoders: NDArray[np.uint8],
        facts: Mapping[str, Json],
    ) -> Path:
        """Publishes one part of the set `spec`: whole and synced, or not at all.

        Args:
            spec: the set.
            features: chunks ``(n, *F)`` in the storage type, scaled ones where that is int8.
            digests: ``(n, 32)``, the images of the rows.
            decoders: ``(n,)``.
            facts: at least `part_facts`.
        """
        whole = stamped(facts, spec)
        named = self._folder / folder_name(spec, str(facts["backbone"]), str(facts["cut"]))
        for tries_left in reversed(range(_TRIES)):
            try:
                folder = self._catalogue.folder_of(spec) or named
                make_folder(folder, root=self._folder)
                path = folder / f"part-{secrets.token_hex(8)}.h5"
                write_part(path, features=features, digests=digests, decoders=decoders, facts=whole)
            except FileNotFoundError:  # the folder was removed, or found empty and deleted, while we wrote into it
                if not tries_left:
                    raise
            else:
                break
        return path

    # --------------------------------------------------------------------------------------------------- image sets

    def has_images(self) -> bool:
        """Whether the store holds an image set."""
        return bool(self._tables.paths())

    def images(self, name: str | None = None) -> ImageSet:
        """The newest image set in the store, or the newest called `name`; its files may be elsewhere.

        Raises:
            FeatureStoreError: if there is none.
            AmbiguousRequestError: if there are several names, or two newest ones of a name.
        """
        self.check_exists()
        newest = self._tables.newest(lambda table: name in (None, table))
        if name is not None and not newest:
            newest = [self._tables.open(path) for path in self._tables.paths() if path.stem == name]
        if not newest:
            raise refusals.holds_no_images(self.root, name, {table_name(path) for path in self._tables.paths()})
        if len(newest) > 1:
            raise refusals.several_images(self.root, newest)
        (table,) = newest
        return table.image_set(where=str(self.root / IMAGES / table.stem))

    def save_images(self, images: ImageSet, digests: Digests) -> Path | None:
        """Files an image set as a new table, child of the newest of its name; None if that one says the same.

        A label edit, a new split or new images make a new table and touch no features. Two newest tables of a name,
        left by jobs that filed different content at once, both become parents, so that there is one newest again.
        """
        parents = self._tables.newest(lambda name: name == images.name)
        columns, facts = table_content(images, digests)
        if len(parents) == 1 and says_the_same(parents[0], columns, facts):
            return None
        facts = {**facts, "parents": sorted(parent.stem for parent in parents)}
        path = self._tables.folder / table_file(images, columns, facts)
        for tries_left in reversed(range(_TRIES)):
            try:
                make_folder(path.parent, root=self._folder)
                write_table(path, columns=columns, facts={**facts, **signature()})
            except FileExistsError:  # another process has just filed the same
                return None
            except FileNotFoundError:  # `gc` took the file for a killed writer's while we wrote it
                if not tries_left:
                    raise
            else:
                break
        return path

    def unlike_images(self, images: ImageSet) -> list[str]:
        """Names of the newest image tables of this set's name that have no id in common with it."""
        tables = self._tables.newest(lambda name: name == images.name)
        own = set(images.ids) if tables else set()
        return [table.stem for table in tables if own and own.isdisjoint(table.ids)]

    def known_digests(self, images: ImageSet) -> KnownDigests:
        """What the newest tables of this set's name know of its files, so that unchanged ones aren't read again."""
        tables = self._tables.newest(lambda name: images.name == name or images.name.startswith(f"{name}-"))
        return KnownDigests(table.known for table in tables)

    # ------------------------------------------------------------------------------------------------------- upkeep

    def verify(self, *, repair: bool = False, progress: bool = False) -> VerifyReport:
        """Checks every byte of all parts and image tables, each opened anew.

        Args:
            repair: gives damaged files a hidden name in their folder, where nobody reads them: the next extraction
                computes their rows again, and `gc` deletes them later. Where an image table is set aside, the one
                that it replaced is the newest again. Never set aside is what may well be sound: files that a newer
                featstore or another program wrote, that may not be read, or that lie in another set's folder.
            progress: shows a bar on stderr.

        Raises:
            FeatureStoreError: if there is no store.
            OSError: with `repair`, if a damaged file can't be renamed.
        """
        with seen_at_once(self._folder):
            self.check_exists()
            return verify(self._catalogue, self._tables, repair=repair, progress=progress)

    def diff(self, a: str, b: str) -> SetDifference:
        """In what two sets differ: facts, images, and values of up to 1,000 images that both have.

        Each block of rows that holds one of these is read and checked.

        Args:
            a: the start of a key.
            b: the start of another.

        Raises:
            FeatureStoreError: if there is no such set, or several.
            DamagedFileError: for a damaged file of either.
        """
        for _ in range(_TRIES):
            with suppress(FileNotFoundError):  # others have merged parts and deleted them since they were looked up
                return diff(self.set(a), self.set(b))
        return diff(self.set(a), self.set(b))

    def compact(self, key: str | None = None) -> CompactReport:
        """Merges the small parts of one set, or of each, into larger ones; every row stays as readers see it.

        A merged part has up to 4 GiB of features and 2^24 rows. Parts are merged with those of the same profile only
        (batch size, device, versions ...), for a part says of all its rows on what they were computed. What they
        replace is superseded from then on, and stays for `gc`. Rows are checked against their checksums on the way: a
        set with a damaged row is left alone and reported.

        Args:
            key: the start of the set's key; None for all sets.

        Raises:
            FeatureStoreError: if there is no store, or no such set, or several.
            OSError: as the disk gave it; all rows are there as before.
        """
        self.check_exists()
        located = self._catalogue.specs(self._catalogue.folders()) if key is None else [self._located(key)]
        report = CompactReport()
        for spec, folders in located:
            try:
                if found := self._catalogue.set_of(spec, folders):
                    report += compact(found)
            except DamagedFileError as error:
                report += CompactReport(left=(LeftAlone(key=spec.key, reason=str(error)),))
        return report

    def merge(self, key: str, paths: Collection[Path]) -> CompactReport:
        """Merges the parts at `paths`, which the caller has written to the set `key`, and deletes them at once.

        Whoever reads them meanwhile looks up again where their rows are. A part stays for `gc` if some of its rows
        are not in the merged one, and all do if that one turns out to be damaged, which is reported.

        Raises:
            OSError: as the disk gave it; all rows are there as before.
            DamagedFileError: for a damaged file of the set.
        """
        found = _set_if_there(self._catalogue, key)
        if found is None:  # and with it all that was written
            return CompactReport()
        report = merge(found, [part for part in found.parts if part.path in paths])
        for each in report.merges:
            if reason := fault(each.part):
                report += CompactReport(left=(LeftAlone(key=found.key, reason=reason),))
            else:
                delete_replaced(each)
        return report

    def gc(self, *, older_than: float = DAY_SECONDS, dry_run: bool = False) -> GcReport:
        """Deletes files that nobody reads: superseded parts, what killed writers, estimates, repairs and removals left.

        A superseded part goes only if all its rows are in parts that every checksum fits. Image tables stay.

        Args:
            older_than: seconds since a part was replaced, a writer's file last written, or a file set aside. With
                less than a writer takes for a part, its file may be deleted under it, and it writes the part again.
            dry_run: deletes nothing, and reports what would be deleted.

        Raises:
            FeatureStoreError: if there is no store.
            ValueError: for a negative time.
            OSError: as the disk gave it.
        """
        with seen_at_once(self._folder):
            self.check_exists()
            return gc(self._catalogue, older_than=older_than, dry_run=dry_run)

    def remove(self, key: str) -> RemoveReport:
        """Deletes a whole set, wherever it lies; image tables stay.

        All its folders get hidden names before any file is deleted: whenever this stops, nobody reads some of a
        folder's parts for all of them. Of a folder to which there is only a link, the link alone is deleted.

        Args:
            key: the start of the set's key. A set without a sound part is known by those digits of its key that its
                folders are called by.

        Raises:
            FeatureStoreError: if there is no such set, or several, or something else lies in its folder.
            DamagedFileError: for a part of another set in its folder.
            OSError: as the disk gave it.
        """
        return remove(self._catalogue, *self._removable(key))

    def foresee_removal(self, key: str) -> RemoveReport:
        """What `remove` would delete now; nothing is, and it raises what `remove` would raise at once."""
        return foreseen(self._catalogue, *self._removable(key))

    def check_exists(self) -> None:
        """Raises FeatureStoreError if there is no folder."""
        if not self._folder.is_dir():
            raise refusals.no_store(self.root)

    # -------------------------------------------------------------------------------------------------------- inside

    def _superseded(self, chosen: FeatureSet) -> NDArray[np.uint8]:
        """The digests ``(N, 32)`` of images that have a row, and that no newest image table holds."""
        tables = self._tables.newest(lambda name: True)
        return chosen.images_beside(table.digests for table in tables) if tables else digest_rows([])

    def _located(self, key: str) -> tuple[FeatureSpec, tuple[Path, ...]]:
        """The one spec whose key starts with `key`, and its folders."""
        self.check_exists()
        refusals.check_key(key)
        found = self._catalogue.keyed(key)
        if not found:
            raise refusals.holds_no_set(self.root, key)
        if len(found) > 1:
            sets = [self._catalogue.set_of(spec, folders) for spec, folders in found]
            sound = [each for each in sets if each]
            raise refusals.several_sets(self.root, sound, f"have keys that start with {key}", "Give more of the key.")
        return found[0]

    def _removable(self, key: str) -> tuple[FeatureSpec | UnsoundSet, tuple[Path, ...]]:
        """The one set whose key starts with `key`, sound or not, and its folders."""
        self.check_exists()
        refusals.check_key(key)
        found = self._catalogue.keyed_or_unsound(key)
        if not found:
            raise refusals.holds_no_set(self.root, key)
        if len(found) > 1:
            raise refusals.several_keys(self.root, key, [chosen.key for chosen, _ in found])
        return found[0]

    def _chosen(self, which: FeatureRequest | FeatureSet | str) -> FeatureSet:
        if isinstance(which, FeatureSet):
            return which
        if isinstance(which, str):
            return self.set(which)
        if not isinstance(which, FeatureRequest):
            raise TypeError(
                f"which is {which!r}; expected the start of a set's key, a set or a request: store.features(images, "
                '"7c41").'
            )
        found = self.find_one(which)
        if found is None:
            self.check_exists()
            sets = self.sets()
            alike = [each for each in sets if each.spec.is_pixels == (which.dtype == PIXELS.name)]
            raise refusals.none_fits(self.root, which, alike, [] if sets else self.damaged())
        return found


def _fresh_index(folder: Path, key: str) -> RowIndex:
    """Where the rows of a set lie now, none if it was removed: for a reader whose files have vanished."""
    found = _set_if_there(Catalogue(folder), key)
    return RowIndex(()) if found is None else found.index


def _set_if_there(catalogue: Catalogue, key: str) -> FeatureSet | None:
    """The set of a whole key; None if others have removed it."""
    found = (catalogue.set_of(*located) for located in catalogue.keyed(key))
    return next((each for each in found if each), None)


@contextmanager
def _collected(errors: dict[str, DamagedFileError]) -> Iterator[None]:
    try:
        yield
    except DamagedFileError as error:
        errors[str(error)] = error
    except FileNotFoundError:  # deleted since it was listed
        pass
