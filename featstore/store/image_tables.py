"""Image tables: what a store knows about the images of an image set, in small immutable files.

::

    <root>/images/<name>-<hash8>.h5

Each names the tables that it replaces, its parents; the newest is the one that is no parent. `docs/format.md` lists
the columns.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featstore.digest import Json, canonical_json, digest_json
from featstore.errors import DamagedFileError
from featstore.files.index import is_among
from featstore.files.table import Table
from featstore.images.digests import Digests, DigestTable, KnownDigests
from featstore.images.hashing import is_settled
from featstore.images.image_set import ImageSet
from featstore.images.names import SPLITS
from featstore.images.sources import AbsentSource
from featstore.objects import names_in

IMAGES = "images"
"""The folder of the image tables."""


@dataclass(frozen=True)
class ImageTable:
    """One image set as a store knows it."""

    table: Table

    @classmethod
    def of(cls, table: Table) -> ImageTable:
        """`table`, if it has the columns and facts of the format.

        Raises:
            DamagedFileError: names the first one that is missing or of another kind.
        """
        if fault := _fault(table):
            raise DamagedFileError(_unusable(table.path, fault))
        return cls(table)

    @property
    def stem(self) -> str:
        """Name of the file without its ending: what children call their parents."""
        return self.table.path.stem

    @property
    def name(self) -> str:
        """Of the image set."""
        return str(self.table.facts["name"])

    @property
    def num_images(self) -> int:
        """N."""
        return len(self.table.columns["digest"])

    @property
    def content(self) -> str:
        """Equal for two tables that say the same."""
        return str(self.table.facts.get("content"))

    @property
    def digests(self) -> NDArray[np.uint8]:
        """``(M, 32)``, of the images that have one."""
        columns = self.table.columns
        digests: NDArray[np.uint8] = columns["digest"][columns["has_digest"].astype(bool)]
        return digests

    @cached_property
    def known(self) -> DigestTable:
        """The digests of the images that have one, and the facts of the files when they were hashed."""
        columns = self.table.columns
        ids, values, stats = self.ids, columns["digest"], columns["stat"]
        has_digest = columns["has_digest"].astype(bool)
        if has_digest.all():
            return DigestTable(ids, values, stats)
        return DigestTable(tuple(compress(ids, has_digest.tolist())), values[has_digest], stats[has_digest])

    def image_set(self, *, where: str) -> ImageSet:
        """The image set; its files may be elsewhere. `where` names the table in messages."""
        columns, facts = self.table.columns, self.table.facts
        groups = facts["groups"]
        return ImageSet(
            name=self.name,
            ids=self.ids,
            targets=columns.get("target"),
            classes=tuple(facts["classes"]),
            splits=np.array(_SPLIT_NAMES)[columns["split"]],
            groups=None if groups is None else tuple(groups[place] for place in columns["group"]),
            task=facts["task"],
            source=AbsentSource(where=where, known=KnownDigests([self.known])),
        )

    @cached_property
    def ids(self) -> tuple[str, ...]:
        """Of the N images."""
        return tuple(_texts(self.table.columns["id_bytes"], self.table.columns["id_ends"]))


class ImageTables:
    """The image tables in the folder of a store; what was opened is kept, for they never change."""

    def __init__(self, root: Path) -> None:
        self.folder = root / IMAGES
        self._opened: dict[Path, ImageTable] = {}
        self._described: dict[Path, _Description] = {}

    def paths(self) -> list[Path]:
        """All of them, in the order of their names."""
        with suppress(FileNotFoundError, NotADirectoryError, PermissionError):
            names = [name for name in names_in(self.folder) if name.endswith(".h5") and not name.startswith(".")]
            return [self.folder / name for name in sorted(names)]
        return []

    def open(self, path: Path) -> ImageTable:
        """The table at `path`.

        Raises:
            DamagedFileError: as `Table.open`.
            FileNotFoundError: if there is none.
        """
        found = self._opened.get(path)  # another thread may forget it meanwhile
        if found is None:
            with _readable(path):
                found = self._opened[path] = ImageTable.of(Table.open(path))
        return found

    def newest(self, is_asked: Callable[[str], bool]) -> list[ImageTable]:
        """Of the tables whose name is asked for, those that are no other's parent.

        Of the others the facts alone are read: a job that runs every night leaves one each time.
        """
        described = self._descriptions(is_asked)
        parents = {parent for each in described.values() for parent in each.parents}
        newest = []
        for path in described:
            if path.stem not in parents:
                with suppress(FileNotFoundError):  # deleted since it was listed
                    newest.append(self.open(path))
        return newest

    def latest_first(self) -> Iterator[ImageTable]:
        """All tables that can be read, replaced ones as well, each opened when it is asked for and not kept."""
        described = self._descriptions(lambda name: True)
        for path in sorted(described, key=lambda path: described[path].when, reverse=True):
            with suppress(FileNotFoundError, DamagedFileError), _readable(path):
                yield self._opened.get(path) or ImageTable.of(Table.open(path))

    def forget(self, path: Path) -> None:
        """Opens the table at `path` anew when it is asked for again."""
        self._opened.pop(path, None)
        self._described.pop(path, None)

    def _descriptions(self, is_asked: Callable[[str], bool]) -> dict[Path, _Description]:
        found = {}
        for path in self.paths():
            if is_asked(table_name(path)):
                known = self._described.get(path)
                if known is None:
                    try:
                        with _readable(path):
                            facts = Table.read_facts(path)
                    except FileNotFoundError:  # deleted since it was listed
                        continue
                    known = self._described[path] = _Description.of(path, facts)
                found[path] = known
        return found

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": {}, "_described": {}}


@dataclass(frozen=True, kw_only=True)
class _Description:
    """What of a table tells which is the newest.

    Attributes:
        parents: stems of the tables that it replaces.
        when: it was written; texts sort as times do.
    """

    parents: tuple[str, ...]
    when: str

    @classmethod
    def of(cls, path: Path, facts: Mapping[str, Json]) -> _Description:
        """From the facts of the table at `path`; DamagedFileError if they don't tell."""
        parents, when = facts.get("parents"), facts.get("when")
        if not isinstance(parents, list) or not isinstance(when, str):
            raise DamagedFileError(_unusable(path, f"its facts don't tell what it replaces ({parents!r:.60})"))
        return cls(parents=tuple(parents), when=when)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except PermissionError as error:
        raise DamagedFileError(f"{path} can't be read ({error.strerror}). Make it readable for you.") from error


def _unusable(path: Path, fault: str) -> str:
    return (
        f"{path} can't be used by this featstore: {fault}. If a newer one wrote it, upgrade; else move a sound copy "
        "into its place, or delete it and extract again, which files the image set anew."
    )


def _fault(table: Table) -> str | None:
    """What of a table isn't as the format has it, in words; None of a sound one."""
    columns, facts = table.columns, table.facts
    missing = [name for name in _COLUMNS if name not in columns]
    missing += [name for name in _FACTS if name not in facts]
    if missing:
        return f"it lacks {', '.join(missing)}"
    for name, kind in _FACTS.items():
        if not isinstance(facts[name], kind):
            return f"its fact {name} is {facts[name]!r:.60}"
    count = len(columns["digest"])
    for name, shape in _COLUMNS.items():
        wanted = None if shape is None else (count, *shape)
        if wanted is not None and columns[name].shape != wanted:
            return f"its column {name} has the shape {columns[name].shape}, not {wanted}"
    for name in ("group", "target"):
        if name in columns and len(columns[name]) != count:
            return f"its column {name} has {len(columns[name]):,} values for {count:,} images"
    ends = columns["id_ends"]
    if count and not (ends[-1] == len(columns["id_bytes"]) and (np.diff(ends, prepend=0) >= 0).all()):
        return "its ids don't end where their bytes do"
    if count and columns["split"].max() >= len(_SPLIT_NAMES):
        return f"its column split holds {columns['split'].max()}"
    return None


_COLUMNS: dict[str, tuple[int, ...] | None] = {
    "id_bytes": None,
    "id_ends": (),
    "digest": (32,),
    "has_digest": (),
    "stat": (5,),
    "split": (),
}
"""Column -> the shape of what it holds of each image; None: as many bytes as the ids have."""

_FACTS: dict[str, type | tuple[type, ...]] = {
    "name": str,
    "task": str,
    "classes": list,
    "groups": (list, type(None)),
    "parents": list,
    "when": str,
}


def last_ids(digests: NDArray[np.uint8], tables: Iterable[ImageTable], *, wanted: int) -> dict[str, str]:
    """Digest (hexadecimal) -> the id of that image, from the first of `tables` that holds it; none, where none does.

    No further table is asked for once as many as `wanted` are found.
    """
    ids: dict[str, str] = {}
    for table in tables:
        places = np.flatnonzero(is_among(table.digests, digests)).tolist()
        for place in places:
            known = table.known
            ids.setdefault(known.values[place].tobytes().hex(), known.ids[place])
        if len(ids) >= wanted:
            break
    return ids


def table_name(path: Path) -> str:
    """The name of the image set, from the name of a table's file."""
    return path.stem.rpartition("-")[0]


def table_file(images: ImageSet, columns: Mapping[str, NDArray[Any]], facts: Mapping[str, Json]) -> str:
    """The name of a table's file: it tells tables of one image set by what they say, not by when files were hashed.

    Jobs that start at once on the same images thus make one table, not several that contradict each other.
    """
    said = _content_hash({**columns, "stat": columns["stat"][:, :4]}, {"parents": facts["parents"]})
    described = {name: value for name, value in facts.items() if name not in ("content", "parents")}
    return f"{images.name}-{digest_json([said, described])[:8]}.h5"


def says_the_same(table: ImageTable, columns: Mapping[str, NDArray[Any]], facts: Mapping[str, Json]) -> bool:
    """Whether a table of these columns and facts would tell a later run no more than `table` does.

    When files were hashed tells none more, once each has been hashed long enough after it was written to be trusted:
    jobs that start at once on the same images leave one table, whatever the order in which they come to file it.
    """
    if table.content == facts["content"]:
        return True
    then, stat = table.table.columns["stat"], columns["stat"].copy()
    if then.shape == stat.shape:
        is_settled_then = is_settled(then)
        stat[is_settled_then, 4] = then[is_settled_then, 4]
    own_facts = {name: value for name, value in facts.items() if name != "content"}
    return table.content == _content_hash({**columns, "stat": stat}, own_facts)


def table_content(images: ImageSet, digests: Digests) -> tuple[dict[str, NDArray[Any]], dict[str, Json]]:
    """The columns and the facts of a table, but for its parents and who wrote it."""
    id_bytes, id_ends = _packed(images.ids)
    columns: dict[str, NDArray[Any]] = {
        "id_bytes": id_bytes,
        "id_ends": id_ends,
        "digest": np.ascontiguousarray(digests.values),
        "has_digest": (~digests.is_failed).astype(np.uint8),
        "stat": np.ascontiguousarray(digests.stats),
        "split": _split_numbers(images.splits),
    }
    groups: list[str] | None = None
    if images.groups is not None:
        groups = sorted(set(images.groups))
        places = {group: place for place, group in enumerate(groups)}
        columns["group"] = np.array([places[group] for group in images.groups], np.int64)
    if images.targets is not None:
        columns["target"] = np.ascontiguousarray(images.targets)
    facts: dict[str, Json] = {
        "name": images.name,
        "task": images.task,
        "classes": list(images.classes),
        "groups": groups,
    }
    return columns, {**facts, "content": _content_hash(columns, facts)}


_SPLIT_NAMES = ("", *SPLITS)  # by number, see docs/format.md


def _split_numbers(splits: NDArray[np.str_]) -> NDArray[np.uint8]:
    numbers = np.zeros(len(splits), np.uint8)
    for number, name in enumerate(_SPLIT_NAMES):
        numbers[splits == name] = number
    return numbers


def _content_hash(columns: Mapping[str, NDArray[Any]], facts: Mapping[str, Json]) -> str:
    digest = hashlib.sha256(canonical_json(dict(facts)).encode("ascii"))
    for name in sorted(columns):
        digest.update(canonical_json([name, str(columns[name].dtype), list(columns[name].shape)]).encode("ascii"))
        digest.update(np.ascontiguousarray(columns[name]).tobytes())
    return digest.hexdigest()


def _packed(texts: Sequence[str]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    joined = "".join(texts)
    if joined.isascii():  # one by one takes several times as long
        ends = np.cumsum(np.fromiter(map(len, texts), np.int64, len(texts)))
        return np.frombuffer(joined.encode("ascii"), np.uint8), ends
    encoded = [text.encode("utf-8", "surrogateescape") for text in texts]  # file names need not be valid UTF-8
    ends = np.cumsum([len(text) for text in encoded], dtype=np.int64)
    return np.frombuffer(b"".join(encoded), np.uint8), ends


def _texts(packed: NDArray[np.uint8], ends: NDArray[np.int64]) -> Iterator[str]:
    data, last = packed.tobytes(), ends.tolist()
    places = map(slice, [0, *last[:-1]], last)
    if data.isascii():
        return map(data.decode("ascii").__getitem__, places)
    return (data[place].decode("utf-8", "surrogateescape") for place in places)
