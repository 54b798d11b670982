"""Tar shards: samples in tar files, as WebDataset lays them out, each read where it lies and nothing unpacked.

The members of a sample have one path up to the first dot of their names, its key: ``0001.jpg``, ``0001.cls``.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
import tarfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from featstore.digest import Json
from featstore.errors import ImageError
from featstore.images.digests import Digests, KnownDigests, Memo, no_stats
from featstore.images.folders import StrPath, check_is_here
from featstore.images.found import FoundImages
from featstore.images.hashing import (
    NO_FACTS,
    check_file_size,
    facts_of,
    file_digests,
    in_threads,
    let_writes_show,
    packed,
)
from featstore.images.labels import HELD_OUT, NO_LABEL, Row, checked_values
from featstore.images.names import IMAGE_SUFFIXES, SHARD, Task, split_hinted, split_named
from featstore.words import counted, listed, some

_CLASS = "cls"  # the member that WebDataset gives a class
_LABEL, _SPLIT = "label", "split"


@dataclass(frozen=True, kw_only=True, eq=False)
class TarSource:
    """Images that are members of tar files; an id is a sample's key, after its shard's name where keys repeat.

    Attributes:
        shards: absolute paths.
        ids: of all images.
        places: `(N, 4)` int64, of each image: its shard, where its bytes begin there, how many they are, and a digest
            of the header before them.
        sizes: of the shards in bytes, when their members were looked up.
        times_ns: when they had been changed last by then; None of shards that were moved since.
    """

    shards: tuple[str, ...]
    ids: tuple[str, ...]
    places: NDArray[np.int64]
    sizes: tuple[int, ...]
    times_ns: tuple[int, ...] | None

    absence = None  # whether a shard is there shows when it is looked for
    known = KnownDigests()

    def read(self, image: str) -> bytes:
        """The member's bytes; `ImageError` if its shard is gone, can't be read, or isn't what it was."""
        shard, start, size, header = self.places[self._row_of[image]].tolist()
        try:
            check_file_size(size)
            with open(self.shards[shard], "rb", buffering=0) as file:  # its own, so that threads share no position
                self._check(shard, os.fstat(file.fileno()))
                _check_header(file, start, header)
                file.seek(start)
                data = _read(file, size)
        except (OSError, ValueError) as error:
            raise ImageError(image, self._reason(shard, error)) from error
        return data

    def digests(self, ids: tuple[str, ...], memo: Memo, known: KnownDigests) -> Digests:
        """The members' digests; one is taken only if its shard may have changed since. `memo` gets what is taken.

        The facts that go with a digest are those of the shard.
        """
        of_shard = np.frombuffer(b"".join(map(self._now, range(len(self.shards)))), np.int64).reshape(-1, 5)
        now = of_shard[self._shard_of(ids)]
        if self.times_ns is None:  # what others hashed by these ids may be members of another tar of that size
            now[[not self.has(image) for image in ids]] = -1
        return file_digests(ids, now, self._take, memo, known)

    def has(self, image: str) -> bool:
        """Whether its shard is there, as it was."""
        shard, start, _, header = self.places[self._row_of[image]].tolist()
        try:
            with open(self.shards[shard], "rb", buffering=0) as file:
                self._check(shard, os.fstat(file.fileno()))
                _check_header(file, start, header)
        except (OSError, ValueError):
            return False
        return True

    def moved(self, root: str) -> TarSource:
        """The members of shards that lie in the folder `root` as these do below the folder that all are in."""
        shards = tuple(os.path.join(root, name) for name in _below(self.shards))
        return TarSource(shards=shards, ids=self.ids, places=self.places, sizes=self.sizes, times_ns=None)

    def _take(self, ids: tuple[str, ...]) -> Digests:
        values, stats = np.zeros((len(ids), 32), np.uint8), no_stats(len(ids)).copy()
        failed: dict[int, str] = {}
        of_each = self._shard_of(ids)
        for shard in np.unique(of_each).tolist():
            at = np.flatnonzero(of_each == shard)
            hashed_at_ns = time.time_ns()
            before = self._look(shard, hashed_at_ns, writes=True)
            found, reasons = in_threads(self._hash, tuple(ids[place] for place in at), otherwise=bytes(32))
            if before[:_OF_FILE] != self._look(shard)[:_OF_FILE]:
                found[:], reasons = 0, dict.fromkeys(range(len(at)), f"{self.shards[shard]} {_IN_WORK}")
            values[at], stats[at] = found, np.frombuffer(before, np.int64)
            failed |= {int(at[place]): reason for place, reason in reasons.items()}
        stats[list(failed)] = -1
        return Digests(values=values, failed=dict(sorted(failed.items())), stats=stats)

    def _now(self, shard: int) -> bytes:
        """The facts of a shard; none where it isn't what it was when members were looked up, whoever hashed it."""
        try:
            facts = os.stat(self.shards[shard])
            self._check(shard, facts)
        except (OSError, ValueError):
            return NO_FACTS
        return packed(facts, hashed_at_ns=0)

    def _hash(self, image: str) -> bytes:
        return hashlib.sha256(self.read(image)).digest()

    def _look(self, shard: int, hashed_at_ns: int = 0, writes: bool = False) -> bytes:
        """The facts of a shard as `Digests.stats` has them."""
        try:
            with open(self.shards[shard], "rb", buffering=0) as file:
                if writes:
                    let_writes_show(file.fileno())
                return packed(os.fstat(file.fileno()), hashed_at_ns)
        except OSError:
            return NO_FACTS

    def _check(self, shard: int, facts: os.stat_result) -> None:
        """ValueError where members may lie elsewhere by now."""
        size, mtime_ns, *_ = facts_of(facts)
        if size != self.sizes[shard]:
            raise ValueError(f"it has {size:,} bytes, and had {self.sizes[shard]:,} {_THEN}")
        if self.times_ns is not None and mtime_ns != self.times_ns[shard]:
            raise ValueError(f"it was changed {_THEN.replace('when', 'since')}")

    def _reason(self, shard: int, error: Exception) -> str:
        path = self.shards[shard]
        if isinstance(error, FileNotFoundError):
            return f"its shard {path} is not there; give the shards' folder: images.with_root(...)"
        return f"its shard {path} can't be read ({getattr(error, 'strerror', None) or error})"

    def _shard_of(self, ids: tuple[str, ...]) -> NDArray[np.int64]:
        shards: NDArray[np.int64] = self.places[[self._row_of[image] for image in ids], 0]
        return shards

    @cached_property
    def _row_of(self) -> dict[str, int]:
        return dict(zip(self.ids, range(len(self.ids)), strict=True))

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_row_of"}


_THEN = "when its members were looked up; make the image set anew"
_ELSE = f"what lies there isn't the member that did {_THEN}"
_IN_WORK = "changed while it was read; wait until it is written, then run again"
_OF_FILE = 4 * 8  # bytes of a row of stats that are the file's own facts


def tar_images(
    shards: StrPath | Sequence[StrPath],
    *,
    label_column: str | Sequence[str] | None,
    label_sep: str | None,
    split_column: str | None,
    group_column: str | None,
    task: Task,
    held_out_classes: bool,
    name: str | None,
) -> FoundImages:
    """The images of tar shards; arguments and errors are those of `ImageSet.from_tar`."""
    paths = shard_paths(shards)
    values = tuple([label_column] if isinstance(label_column, str) else label_column or ())
    if task != "regression" and len(values) > 1:
        raise ValueError(
            f"label_column is {label_column!r} but task is {task!r}. Expected one name; several are the numbers of "
            "task='regression'. Name one, or correct the task."
        )
    if split_column is None and len({split_hinted(_stem(path)) for path in paths} - {None}) > 1:
        split_column = SHARD
    rows: list[Row] = []
    places: list[tuple[int, int, int, int]] = []
    skipped: list[tuple[str, str]] = []
    facts: list[tuple[int, int]] = []
    given = set[str]()
    for number, path in enumerate(paths):
        with _opened(path) as file:
            size, mtime_ns, *_ = facts_of(os.fstat(file.fileno()))
            facts.append((size, mtime_ns))
            for sample in _samples(path, file):
                place = sample.image()
                if place is None:
                    skipped.append((sample.key, f"has no image in {path}"))
                    continue
                if split_column is None and not rows and sample.says(_SPLIT):  # the first one speaks for all
                    split_column = _SPLIT
                places.append((number, *place, _header(file, place[0])))
                row = _row(sample, values, label_sep, split_column, group_column, task)
                given.update(name for name in values if sample.says(name))
                rows.append(row)
    if not rows:
        raise ValueError(
            f"{some(paths)} hold no images: {counted(len(skipped), 'sample')} without one. Expected members that end "
            f"with {', '.join(IMAGE_SUFFIXES)}. Name other shards."
        )
    missing = [each for each in values if each not in given]
    if missing and not (task != "regression" and missing == [_LABEL]):
        raise ValueError(
            f"No sample of {some(paths)} has a member .{missing[0]} or a field {missing[0]!r} in its .json. Expected "
            "one that holds each image's label. Name it with --label-column NAME (in Python: label_column=NAME); if "
            "nothing is labelled, say --label-column '' (label_column=None)."
        )
    rows, notes = _named_apart(rows, paths, [number for number, *_ in places])
    ids = tuple(row.image for row in rows)
    return FoundImages(
        rows=rows,
        source=TarSource(
            shards=tuple(paths),
            ids=ids,
            places=np.array(places, np.int64),
            sizes=tuple(size for size, _ in facts),
            times_ns=tuple(mtime_ns for _, mtime_ns in facts),
        ),
        name=name or _common_name(paths),
        task=task,
        is_labelled=bool(given),
        classes=values if task == "regression" else None,
        held_out_classes=held_out_classes,
        instead=f"leave the labels out: --label-column '' (in Python: label_column=None), or {HELD_OUT}",
        skipped=tuple(skipped),
        notes=notes,
        origin={}
        if not isinstance(shards, str | os.PathLike)
        else {
            "constructor": "from_tar",
            "path": os.fspath(shards),
            "label_column": label_column if label_column is None or isinstance(label_column, str) else list(values),
            "label_sep": label_sep,
            "split_column": split_column,
            "group_column": group_column,
            "task": task,
            "name": name,
        },
    )


def _named_apart(rows: list[Row], paths: Sequence[str], shard_of: Sequence[int]) -> tuple[list[Row], tuple[str, ...]]:
    """The rows by ids of their own, and notes: with the names of their shards before the keys where keys repeat."""
    if len({row.image for row in rows}) == len(rows):
        return rows, ()
    stems = [os.path.splitext(name)[0].replace(os.sep, "/") for name in _below(paths)]
    named = [row._replace(image=f"{stems[number]}/{row.image}") for row, number in zip(rows, shard_of, strict=True)]
    where: dict[str, str] = {}
    for row in named:
        if row.image in where:
            raise ValueError(
                f"Keys repeat across shards, and {row.image} is {where[row.image]} and {row.where}. Expected other "
                "names of shards, which stand before the keys. Rename one."
            )
        where[row.image] = row.where
    return named, (f"keys repeat across shards, so that an id is a shard's name and a key: {named[0].image}",)


def _below(paths: Sequence[str]) -> list[str]:
    """The paths from the folder on that all are in."""
    top = os.path.commonpath(list(map(os.path.dirname, paths)))
    return [os.path.relpath(path, top) for path in paths]


def shard_paths(shards: StrPath | Sequence[StrPath]) -> list[str]:
    """The absolute paths of some shards: ``{000..003}`` and ``{a,b}`` stand for several, as do ``*`` and a folder.

    Raises:
        ValueError: if there are none, or one isn't there.
    """
    asked = [shards] if isinstance(shards, str | os.PathLike) else list(shards)
    found: list[str] = []
    for path in (str(os.fspath(each)) for each in asked):
        check_is_here(path, "a shard")
        for each in [path] if os.path.exists(path) else _braced(path):
            if os.path.isdir(each):
                found += sorted(glob.glob(os.path.join(glob.escape(each), "*.tar")))
            elif glob.has_magic(each) and not os.path.exists(each):
                found += sorted(glob.glob(each))
            else:
                found.append(each)
    paths = list(dict.fromkeys(map(os.path.abspath, found)))
    missing = [path for path in paths if not os.path.isfile(path)]
    if missing or not paths:
        what = f"{some(missing)} {'is' if len(missing) == 1 else 'are'} not there" if missing else "they name no file"
        raise ValueError(
            f"The shards are {some([str(each) for each in asked])}, and {what}. Expected tar files, a folder of them, "
            "or names such as train-{000..003}.tar. Correct the path."
        )
    return paths


def _braced(path: str) -> list[str]:
    """What a shell makes of braces."""
    pieces: list[list[str]] = []
    for text, braces in re.findall(r"([^{]+)|\{([^{}]*)\}", path):
        bounds = re.fullmatch(r"(\d+)\.\.(\d+)", braces)
        if bounds:
            width = len(bounds[1]) if bounds[1].startswith("0") or len(bounds[1]) == len(bounds[2]) else 0
            pieces.append([f"{number:0{width}}" for number in range(int(bounds[1]), int(bounds[2]) + 1)])
        else:
            pieces.append([text] if text else braces.split(","))
    return ["".join(each) for each in product(*pieces)]


# ---- One shard


@dataclass(frozen=True, kw_only=True)
class _Sample:
    """The members of one key.

    Attributes:
        key: its path up to the first dot of its name.
        where: for messages.
        members: what follows the dot, in small letters -> where its bytes begin, and how many there are.
        file: the shard.
    """

    key: str
    where: str
    members: Mapping[str, tuple[int, int]]
    file: BinaryIO

    def image(self) -> tuple[int, int] | None:
        """Where its image is; None without one; ValueError if there are several."""
        images = [kind for kind in self.members if f".{kind}".endswith(IMAGE_SUFFIXES)]
        images = [kind for kind in images if "." not in kind] or images  # a mask beside it is called .seg.png
        if len(images) > 1:
            raise ValueError(
                f"{self.where} has {len(images)} images: {listed([f'{self.key}.{kind}' for kind in images])}. Expected "
                "one in each sample. Write the shards anew with the one that is meant."
            )
        return self.members[images[0]] if images else None

    def says(self, column: str) -> bool:
        """Whether it has a member, or a field of its .json, of that name."""
        return self._member(column) is not None or column in self._fields

    def value(self, column: str) -> Json:
        """What it says: a member's text, or a field of its .json; None if neither is there."""
        member = self._member(column)
        return self._fields.get(column) if member is None else self._text(member).strip()

    def _member(self, column: str) -> str | None:
        kinds = (column.lower(), *([_CLASS] if column == _LABEL else []))
        return next((kind for kind in kinds if kind in self.members and kind != "json"), None)

    @cached_property
    def _fields(self) -> Mapping[str, Json]:
        if "json" not in self.members:
            return {}
        try:
            fields = json.loads(self._text("json"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{self.where} has a .json that can't be read ({error}). Correct it.") from error
        return fields if isinstance(fields, dict) else {}

    def _text(self, kind: str) -> str:
        start, size = self.members[kind]
        self.file.seek(start)
        try:
            return _read(self.file, size).decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.where} has a .{kind} that is no text in UTF-8 ({error}). Correct it.") from error


_COMPRESSED = {b"\x1f\x8b": "gunzip", b"BZh": "bunzip2", b"\xfd7zXZ\0": "unxz", b"\x28\xb5\x2f\xfd": "unzstd"}


def _opened(path: str) -> BinaryIO:
    try:
        file = open(path, "rb")  # noqa: SIM115 - the caller closes it
        start = file.read(8)
    except OSError as error:
        raise ValueError(f"{path} can't be read ({error.strerror}). Expected a tar file. Allow it.") from error
    for magic, command in _COMPRESSED.items():
        if start.startswith(magic):
            file.close()
            raise ValueError(
                f"{path} is compressed, so that no member of it can be read where it lies. Expected a plain tar file; "
                f"images are compressed themselves. Unpack it: {command} {path}"
            )
    file.seek(0)
    return file


def _samples(path: str, file: BinaryIO) -> Iterator[_Sample]:
    """The samples of a shard, in the order of their first members.

    Raises:
        ValueError: if it is no tar file, damaged or cut off, or has two members of one name, a link, or a second
            archive behind the first.
    """
    members: dict[str, dict[str, tuple[int, int]]] = {}
    for member in _members(path, file):
        folder, _, name = member.name.removeprefix("./").rpartition("/")
        stem, dot, kind = name.partition(".")
        if stem and dot and (member.islnk() or member.issym()):
            raise ValueError(
                f"{path} holds {member.name} as a link to {member.linkname}. Expected each member's own bytes. Write "
                "the shard anew: tar --dereference --hard-dereference."
            )
        if not member.isreg() or member.sparse or not stem or not dot:  # folders, hidden files, what no image can be
            continue
        key = f"{folder}/{stem}" if folder else stem
        of_key = members.setdefault(key, {})
        if kind.lower() in of_key:
            raise ValueError(
                f"{path} has two members {member.name}. Expected each once. Write the shard anew, with one of them."
            )
        of_key[kind.lower()] = (member.offset_data, member.size)
    for key, of_key in members.items():
        yield _Sample(key=key, where=f"The sample {key} of {path}", members=of_key, file=file)


def _members(path: str, file: BinaryIO) -> Iterator[tarfile.TarInfo]:
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                tar.members.clear()  # type: ignore[attr-defined] # else it keeps them all
                yield member
            end = tar.offset
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(f"{path} {_DAMAGED} ({error}). {_ANEW}") from error
    file.seek(end)  # tarfile takes a damaged header for the end
    if file.read(512) != bytes(512):
        raise ValueError(f"{path} {_DAMAGED} (at byte {end:,}). {_ANEW}")
    while block := file.read(1 << 20):
        if block.count(0) != len(block):
            raise ValueError(
                f"{path} holds more behind the end of its archive, at byte {end:,}. Expected one archive a file. Where "
                "several were joined, join them by tar --concatenate, or name each."
            )


_DAMAGED, _ANEW = "is no tar file, or is damaged or cut off", "Expected a whole one. Fetch or write it anew."


def _row(
    sample: _Sample,
    columns: tuple[str, ...],
    label_sep: str | None,
    split_column: str | None,
    group_column: str | None,
    task: Task,
) -> Row:
    where = sample.where
    values: tuple[float, ...] = ()
    labels: tuple[str, ...] = ()
    if task == "regression":
        values = checked_values(tuple(_number(sample.value(each), each, where) for each in columns), columns, where)
    elif columns:
        labels = _labels(sample.value(columns[0]), label_sep, task, where)
    group = None if group_column is None else sample.value(group_column)
    if group_column is not None and group in (None, ""):
        raise ValueError(
            f"{where} has no group in {group_column!r}. Expected one for every image, as groups stay together in one "
            "split. Add it."
        )
    return Row(
        image=sample.key,
        labels=labels,
        split=_split(sample, split_column),
        group=None if group is None else str(group),
        where=where,
        values=values,
    )


def _labels(value: Json, label_sep: str | None, task: Task, where: str) -> tuple[str, ...]:
    found = value if isinstance(value, list) else str(value).split(label_sep) if label_sep else [value]
    if any(isinstance(each, dict | list | float) for each in found):
        raise ValueError(f"{where} has the label {value!r:.60}. Expected a name or an integer. Correct it.")
    names = tuple(name for each in found if each is not None and (name := str(each).strip()) not in NO_LABEL)
    if task == "single" and len(names) > 1:
        raise ValueError(
            f"{where} has the labels {some(names)}. Expected one class, as the task is single. Say --task multi (in "
            "Python: task='multi'), or correct the sample."
        )
    return names


def _number(value: Json, column: str, where: str) -> float:
    if value is None or value == "":
        return float("nan")
    try:
        if isinstance(value, str | int | float):
            if isinstance(value, str) and "_" in value:  # which Python takes for a number, and other programs don't
                raise ValueError(value)
            return float(value)
    except (ValueError, OverflowError):
        pass
    raise ValueError(
        f"{where} has {value!r:.60} in {column!r}. Expected a number, as the task is regression. Correct it, or name "
        "another column with --label-column (in Python: label_column)."
    )


def _split(sample: _Sample, column: str | None) -> str:
    if not column:
        return ""
    if column == SHARD:
        return split_hinted(_stem(sample.file.name)) or ""
    split = split_named(str(sample.value(column) or ""))
    if split is None:
        raise ValueError(
            f"{sample.where} has the split {sample.value(column)!r}. Expected train, valid (or val), test, or nothing. "
            "Correct it, or use none: --split-column '' (in Python: split_column=\"\")."
        )
    return split


def _header(file: Any, start: int) -> int:
    """A digest of the header before a member's bytes: its name, size, time and mode."""
    file.seek(start - 512)
    return int.from_bytes(hashlib.sha256(file.read(512)).digest()[:8], "little", signed=True)


def _check_header(file: Any, start: int, header: int) -> None:
    """ValueError where another tar of that size has come in place of the shard."""
    if _header(file, start) != header:
        raise ValueError(_ELSE)


def _read(file: Any, size: int) -> bytes:
    """Exactly so many bytes from here on; ValueError where the file ends before."""
    data: bytes = file.read(size)
    while len(data) < size:
        more = file.read(size - len(data))
        if not more:
            raise ValueError("it ends in the middle of the image")
        data += more
    return data


def _stem(path: str) -> str:
    return os.path.splitext(os.path.basename(path))[0]


def _common_name(paths: Sequence[str]) -> str:
    """What the names of the shards have in common, without their numbers; else their folder's name."""
    common = os.path.commonprefix(list(map(_stem, paths)))  # noqa: RUF071 - letters, not folders, are meant
    common = common.rstrip("-_. 0123456789")
    return common or os.path.basename(os.path.dirname(paths[0]))
