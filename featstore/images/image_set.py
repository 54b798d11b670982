"""Image sets: which images, in which order, with which targets and split, and how to read each one's bytes."""

from __future__ import annotations

import csv
import hashlib
import math
import operator
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from heapq import heapify, heapreplace
from numbers import Integral
from pathlib import PurePosixPath
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from featstore.digest import Json, digest_bytes
from featstore.errors import FeatureStoreError
from featstore.images.digests import Digests, KnownDigest, KnownDigests, Memo
from featstore.images.sources import AbsentSource, ArraySource, FolderSource

IMAGE_SUFFIXES = (".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
"""What a file's name must end with, in any case, to count as an image of a folder. A table names its files itself."""

Task = Literal["single", "multi"]
StrPath = str | os.PathLike[str]

OWN_SPLITS = "split"
"""The column that a table's splits are read from where none is named, if it has one."""

_SPLITS = ("train", "valid", "test")


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class ImageSet:
    """Which images, in which order, with which targets, classes, split and groups, and how to read each one's bytes.

    Made by `from_folder`, `from_csv`, `from_arrays` or `from_store`; every other method returns a new set. Sets pickle
    (the images themselves only if they are arrays) and hold no open file. No file is read before `read` or `digests`.

    >>> digits = np.zeros((10, 8, 8), dtype=np.uint8)
    >>> images = ImageSet.from_arrays(digits, ["one", "two"] * 5).split(valid=0.2)
    >>> images
    ImageSet(arrays: 10 images, 2 classes (one 5, two 5); train 8, valid 2)
    >>> images.valid.targets
    array([0, 1])

    Attributes:
        name: for people and for file names; what is not in `A-Za-z0-9._-` has become `_`.
        ids: the path below the root, with `/`; of arrays the index. No id appears twice.
        targets: single: int64 `(N,)`, -1 where unlabelled; multi: float32 `(N, K)` of 0 and 1; None if nothing is
            labelled. Read-only, as is `splits`.
        classes: the one class table of all splits; a target is a place in it.
        splits: `(N,)` "train", "valid", "test", or "" for images not dealt yet.
        groups: what must stay together in one split (a patient), one for each image.
        task: one class an image, or any number of labels.
        source: how bytes are had.
        skipped: `(path below the root, reason)` of files that were found and left out.
        origin: the constructor's arguments as JSON, and those of `split`, to print a command that makes this set, or
            the set it was selected from; empty if there is none.
    """

    name: str
    ids: tuple[str, ...]
    targets: NDArray[np.int64] | NDArray[np.float32] | None
    classes: tuple[str, ...]
    splits: NDArray[np.str_]
    groups: tuple[str, ...] | None
    task: Task
    source: FolderSource | ArraySource | AbsentSource
    skipped: tuple[tuple[str, str], ...] = ()
    origin: Mapping[str, Json] = field(default_factory=dict)
    _memo: Memo = field(default_factory=Memo)  # shared by all sets derived from one another; never pickled

    def __post_init__(self) -> None:
        if self.task not in ("single", "multi"):
            raise ValueError(f"task is {self.task!r}. Expected 'single' (one class an image) or 'multi' (any number).")
        _check_unique(self.ids, "image id", "Give every image its own path.")
        _check_unique(self.classes, "class", "Name every class once.")
        self._set("name", _safe_name(self.name))
        self._set("ids", tuple(self.ids))
        self._set("classes", tuple(self.classes))
        self._set("origin", dict(self.origin))
        self._set("splits", _checked_splits(self.splits, len(self)))
        self._set("targets", _checked_targets(self.targets, len(self), len(self.classes), self.task))
        if self.groups is not None:
            self._set("groups", _checked_groups(self.groups, len(self)))

    @classmethod
    def from_folder(cls, root: StrPath, *, name: str | None = None) -> ImageSet:
        """The images below a folder, sorted by path; the first folder of each path is its class.

        Where all folders are called `train`, `valid` (or `val`) and `test`, and `train` is there, they are the splits
        and the class is the first folder below; images directly in a split folder are unlabelled. A root with images
        and no folders is an unlabelled set. Links to folders are followed. Hidden files, files of other suffixes,
        images beside the class folders and feature stores are listed in `skipped`.

        Raises:
            ValueError: if the folder is missing or has no images, a class or split folder has none, or `valid` or
                `test` have a class that `train` lacks.
            FeatureStoreError: if a folder can't be listed.
        """
        folder = _existing_folder(root)
        listing = _without_stores(_list_folder(folder))
        rows, beside = _arrange(listing, folder)
        return cls._from_rows(
            rows,
            name=name or os.path.basename(folder),
            task="single",
            classes=_class_table(rows),
            is_labelled=True,
            source=FolderSource(root=folder),
            skipped=tuple(sorted(listing.skipped + beside)),
            origin={"constructor": "from_folder", "root": os.fspath(root), "name": name},
        )

    @classmethod
    def from_csv(
        cls,
        path: StrPath,
        *,
        root: StrPath | None = None,
        path_column: str = "path",
        label_column: str | None = "label",
        label_sep: str | None = None,
        split_column: str | None = None,
        group_column: str | None = None,
        task: Task = "single",
        name: str | None = None,
    ) -> ImageSet:
        """The images that a table with a header names, in its order; UTF-8, commas in a `.csv`, tabs in a `.tsv`.

        Paths are below `root` (default: the table's folder) or absolute. Splits are `train`, `valid` (or `val`),
        `test`, or empty; without `split_column` those of the column `split`, if there is one, and with
        `split_column=""` none. An empty label means unlabelled if `task` is "single", and none of the classes if
        "multi". With `label_column=None` nothing is labelled. Classes are those of the rows in `train` or in no split.

        Raises:
            ValueError: with the line, if the table can't be understood: a missing column, a row of another length, a
                path twice, an unknown split, a class in `valid` or `test` that `train` lacks, no rows.
        """
        file = os.path.abspath(path)
        if label_sep is not None and task != "multi":
            raise ValueError(
                f"label_sep is {label_sep!r} but task is {task!r}, where a cell is one class. "
                "Expected label_sep only with several labels an image. Pass task='multi', or leave label_sep out."
            )
        folder = os.path.dirname(file) if root is None else _existing_folder(root)
        lines = _read_table(file)
        if split_column is None and _holds_splits(lines[0][1], (path_column, label_column, group_column)):
            split_column = OWN_SPLITS
        columns = {"path": path_column, "label": label_column, "split": split_column or None, "group": group_column}
        rows = _csv_rows(lines, file, folder, columns, label_sep)
        return cls._from_rows(
            rows,
            name=name or os.path.splitext(os.path.basename(file))[0],
            task=task,
            classes=_class_table(
                rows,
                instead="leave the labels out: --label-column '' (in Python: label_column=None)",
            ),
            is_labelled=label_column is not None,
            source=FolderSource(root=folder),
            origin={
                "constructor": "from_csv",
                "path": os.fspath(path),
                "root": None if root is None else os.fspath(root),
                "path_column": path_column,
                "label_column": label_column,
                "label_sep": label_sep,
                "split_column": split_column,
                "group_column": group_column,
                "task": task,
                "name": name,
            },
        )

    @classmethod
    def from_arrays(
        cls,
        images: NDArray[np.uint8],
        labels: Sequence[Any] | NDArray[Any] | None = None,
        *,
        classes: Sequence[str] | None = None,
        splits: Sequence[str] | NDArray[np.str_] | None = None,
        groups: Sequence[Any] | None = None,
        task: Task = "single",
        name: str = "arrays",
    ) -> ImageSet:
        """The images of one uint8 array, `(N, H, W)` gray or `(N, H, W, 3)` RGB; ids are "0" to "N-1".

        A label is a class name, or an integer: a place in `classes`, or without `classes` a name of its own. None, ""
        and -1 mean unlabelled. If `task` is "multi", `labels` is an array `(N, K)` of 0 and 1, or a list of labels for
        each image. `classes` keeps the order it is given in; without it, the classes are those of the images in
        `train` or in no split, sorted (integers by value).

        A writable array is copied; a read-only one (`np.load(..., mmap_mode="r")`) is kept as it is, and hashed anew
        by each call of `digests`, as its file may have been written to.

        Raises:
            TypeError: for images that are not a uint8 array, and labels that are neither names nor integers.
            ValueError: for another shape, lengths that differ, and labels out of range or not in `classes`.
        """
        array = _checked_images(images)
        count = len(array)
        given = None if classes is None else tuple(str(each) for each in classes)
        cells: Sequence[Any] = [None] * count if labels is None else list(labels)
        if task == "multi" and isinstance(labels, np.ndarray) and labels.dtype != object:
            cells, given = _label_lists(labels, given)
        _check_length(cells, count, "labels")
        _check_length(groups, count, "groups")
        dealt = _checked_splits([""] * count if splits is None else splits, count).tolist()
        rows = [
            _Row(
                image=str(index),
                labels=_label_names(cells[index], given, task, f"labels[{index}]"),
                split=dealt[index],
                group=None if groups is None else str(groups[index]),
                where=f"labels[{index}]",
            )
            for index in range(count)
        ]
        return cls._from_rows(
            rows,
            name=name,
            task=task,
            classes=_class_table(rows, given=given, by_value=_are_integers(cells, task)),
            is_labelled=labels is not None,
            source=ArraySource(images=array, is_own=array is not images),
            origin={},
        )

    @classmethod
    def from_store(cls, store: HoldsImageSets, name: str | None = None) -> ImageSet:
        """The newest image set of that name filed in a store, with everything but the images; see `with_root`."""
        return store.images(name)

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        return f"ImageSet({self.name}: {self.describe()})"

    @property
    def num_classes(self) -> int:
        """How many classes the class table holds, in whatever split."""
        return len(self.classes)

    @property
    def is_labelled(self) -> bool:
        """Whether any image has a target."""
        return self.targets is not None

    @property
    def train(self) -> ImageSet:
        """The images of split "train"; empty if the set has not been dealt."""
        return self._subset(np.flatnonzero(self.splits == "train"), "train")

    @property
    def valid(self) -> ImageSet:
        """The images of split "valid", maybe none."""
        return self._subset(np.flatnonzero(self.splits == "valid"), "valid")

    @property
    def test(self) -> ImageSet:
        """The images of split "test", maybe none."""
        return self._subset(np.flatnonzero(self.splits == "test"), "test")

    def select(self, which: ArrayLike) -> ImageSet:
        """The images at some indices, in that order, or those where a mask `(N,)` is True; classes stay as they are.

        Raises:
            ValueError: for an index out of range or given twice, or a mask of another length.
            TypeError: for anything but integers and booleans.
        """
        return self._subset(_checked_indices(which, len(self)), "select")

    def with_root(self, root: StrPath) -> ImageSet:
        """The same images, read from another folder (on another machine, say).

        Raises:
            ValueError: if there is no such folder, or the images are arrays.
        """
        if isinstance(self.source, ArraySource):
            raise ValueError(
                f"the images of {self.name} are arrays in memory. Expected an image set of files for with_root. "
                "Use the set as it is, or make one of the files with ImageSet.from_folder or ImageSet.from_csv."
            )
        origin = {**self.origin, "root": os.fspath(root)} if self.origin else {}
        # The files are others, so what was hashed tells nothing; a store's digests come with facts to compare.
        memo = Memo(KnownDigests.of(self.source.known)) if isinstance(self.source, AbsentSource) else Memo()
        return replace(self, source=FolderSource(root=_existing_folder(root)), origin=origin, _memo=memo)

    def with_splits(self, splits: Sequence[str] | NDArray[np.str_]) -> ImageSet:
        """The same images with other splits: "train", "valid" (or "val"), "test" or "" for each.

        Raises:
            ValueError: for another number of splits or another word.
        """
        origin = {key: value for key, value in self.origin.items() if key != "split"}
        if origin.get("split_column"):
            origin["split_column"] = ""  # what the table says no longer counts
        return replace(self, splits=_checked_splits(splits, len(self)), origin=origin)

    def split(
        self,
        valid: float = 0.2,
        test: float = 0.0,
        *,
        seed: int = 0,
        groups: Sequence[Any] | None = None,
        stratify: bool = True,
    ) -> ImageSet:
        """The same images in the same order, dealt anew into train, valid and test.

        Within each class, images are ranked by SHA-256 of seed and id: the first `valid` of them (rounded, half up) are
        valid, the next `test` of them test. Hence adding images hardly moves old ones, and neither order nor machine
        matters. Unlabelled images are dealt like one more class; multi-label sets, and all with `stratify=False`, as
        one. If all that leaves `valid` empty, the image of lowest rank is taken.

        Groups (default: the set's own) are dealt whole: ranked by SHA-256 of seed and group within their commonest
        class, each taken if that brings the number of images nearer to what was asked for.

        Raises:
            ValueError: for fractions that are negative or leave nothing to train on, or another number of groups.
        """
        if not (valid >= 0 and test >= 0 and valid + test < 1):
            raise ValueError(
                f"valid is {valid} and test is {test}. "
                "Expected fractions of 0 or more with a sum below 1. Leave something to train on."
            )
        own = self.groups if groups is None else _checked_groups(groups, len(self))
        units = _rank(own or self.ids, self._strata(stratify), seed)
        dealt = self.with_splits(_deal(units, valid, test)[units.of_image])
        arguments = {"valid": valid, "test": test, "seed": seed, "stratify": stratify, "groups": groups is not None}
        origin = {**dealt.origin, "split": arguments} if self.origin else {}
        return replace(dealt, groups=own, origin=origin)

    def folds(
        self, k: int, *, seed: int = 0, groups: Sequence[Any] | None = None, stratify: bool = True
    ) -> list[ImageSet]:
        """`k` copies of the set, each with another `k`-th as "valid" and the rest as "train"; "test" stays test.

        Folds differ in size by one image at most, in all and in each class; membership follows the ranks of `split`.
        Groups (default: the set's own) stay whole, the largest dealt first, so folds are then as equal as they allow.

        Raises:
            ValueError: for `k` below 2 or above the number of images or groups, another number of groups, or a group
                that has images in "test" and elsewhere.
        """
        is_dealt = self.splits != "test"
        own = self.groups if groups is None else _checked_groups(groups, len(self))
        _check_test_groups(own, is_dealt)
        keys = [key for key, dealt in zip(own or self.ids, is_dealt, strict=True) if dealt]
        units = _rank(keys, self._strata(stratify)[is_dealt], seed)
        if not 2 <= k <= len(units.sizes):
            raise ValueError(
                f"k is {k} and there are {len(units.sizes):,} {'groups' if own else 'images'} to deal. "
                "Expected at least 2 folds and one of these for each. Ask for another number of folds."
            )
        fold = (_fold_groups if own else _fold_images)(units, k)[units.of_image]
        copies = []
        for number in range(k):
            splits = np.full(len(self), "test", dtype="<U5")
            splits[is_dealt] = np.where(fold == number, "valid", "train")
            copies.append(replace(self.with_splits(splits), groups=own, name=f"{self.name}-fold{number}"))
        return copies

    def read(self, index: int) -> bytes | NDArray[np.uint8]:
        """The encoded bytes of image `index`, or the `(H, W[, 3])` array; safe to call from many threads.

        Raises:
            ImageError: with id and reason, if the file is absent or can't be read.
        """
        return self.source.read(self.ids[index])

    def digests(self, known: Mapping[str, KnownDigest] | None = None) -> Digests:
        """The content digest of every image: SHA-256 of the file's bytes (see `content_digest` for arrays).

        Args:
            known: digests from an image table, by id. A file whose size, times and inode are those of `known`, and
                whose times lie safely before the hash was taken, is not read again.
        """
        return self.source.digests(self.ids, self._memo, KnownDigests.of({} if known is None else known))

    def absent(self, limit: int | None = None) -> list[int]:
        """Indices of the images whose files are not there, at most `limit`; nothing is read."""
        found: list[int] = []
        for index, image in enumerate(self.ids):
            if len(found) == limit:
                break
            if not self.source.has(image):
                found.append(index)
        return found

    def describe(self) -> str:
        """One line for people: how many images, classes, images in each split, files skipped."""
        parts = [", ".join([_counted(len(self), "image"), self._describe_labels()])]
        dealt = Counter(self.splits.tolist())
        if set(dealt) - {""}:
            words = {**{split: split for split in _SPLITS}, "": "not dealt"}
            parts.append(", ".join(f"{word} {dealt[split]:,}" for split, word in words.items() if dealt[split]))
        if self.skipped:
            parts.append(f"{_counted(len(self.skipped), 'file')} skipped")
        return "; ".join(parts)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_memo"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _memo=Memo())
        for array in (self.targets, self.splits):
            if array is not None:
                array.flags.writeable = False  # pickle forgets it

    @classmethod
    def _from_rows(
        cls,
        rows: list[_Row],
        *,
        name: str,
        task: Task,
        classes: tuple[str, ...],
        is_labelled: bool,
        source: FolderSource | ArraySource,
        origin: dict[str, Json],
        skipped: tuple[tuple[str, str], ...] = (),
    ) -> ImageSet:
        groups = tuple(row.group for row in rows if row.group is not None)
        return cls(
            name=name,
            ids=tuple(row.image for row in rows),
            targets=_targets(rows, classes, task) if is_labelled else None,
            classes=classes,
            splits=np.array([row.split for row in rows], dtype="<U5"),
            groups=groups or None,
            task=task,
            source=source,
            skipped=skipped,
            origin=origin,
        )

    def _subset(self, indices: NDArray[np.int64], suffix: str) -> ImageSet:
        return replace(
            self,
            name=f"{self.name}-{suffix}",
            ids=_picked(self.ids, indices),
            targets=None if self.targets is None else self.targets[indices],
            splits=self.splits[indices],
            groups=None if self.groups is None else _picked(self.groups, indices),
            skipped=(),
        )

    def _strata(self, stratify: bool) -> NDArray[np.int64]:
        """`(N,)` which images are dealt together: 0 the unlabelled, then the classes."""
        if self.targets is None or self.task == "multi" or not stratify:
            return np.zeros(len(self), dtype=np.int64)
        return self.targets.astype(np.int64) + 1

    def _describe_labels(self) -> str:
        if self.targets is None:
            return "unlabelled"
        if self.task == "multi":
            counts = self.targets.sum(axis=0).astype(np.int64)
        else:
            counts = np.bincount(self.targets.astype(np.int64) + 1, minlength=self.num_classes + 1)
            counts, num_unlabelled = counts[1:], counts[0]
        shown = [f"{name} {count:,}" for name, count in zip(self.classes[:6], counts[:6], strict=True)]
        more = [f"{self.num_classes - 6:,} more"] if self.num_classes > 6 else []
        text = f"{_counted(self.num_classes, 'class')} ({', '.join(shown + more)})"
        if self.task == "multi":
            return f"{text}, several an image"
        return f"{text}, {num_unlabelled:,} unlabelled" if num_unlabelled else text

    def _set(self, attribute: str, value: Any) -> None:
        object.__setattr__(self, attribute, value)


class HoldsImageSets(Protocol):
    """What `ImageSet.from_store` needs of a store."""

    def images(self, name: str | None = None) -> ImageSet:
        """The newest image set of that name."""
        ...


def split_overlap(images: ImageSet, digests: Digests) -> list[tuple[str, str]]:
    """Byte-identical images in different splits, as pairs of ids: one seen earlier (train, then valid), one held out.

    Each held-out image is named once, beside the first image of the earliest split that has its content.
    """
    if len(images) != len(digests):
        raise ValueError(
            f"there are {len(digests):,} digests for {len(images):,} images. "
            "Expected the digests of these images. Pass images.digests()."
        )
    pairs = []
    for group in digests.duplicates():
        dealt = [index for index in group if images.splits[index] != ""]
        first = min(dealt, key=lambda index: _SPLITS.index(images.splits[index]), default=None)
        if first is not None:
            pairs += [(images.ids[first], images.ids[i]) for i in dealt if images.splits[i] != images.splits[first]]
    return pairs


def overlap_note(images: ImageSet, digests: Digests) -> str | None:
    """A sentence that counts and names byte-identical images in different splits; None if there are none."""
    pairs = split_overlap(images, digests)
    if not pairs:
        return None
    named = ", ".join(f"{seen} = {held_out}" for seen, held_out in pairs[:3]) + ", ..." * (len(pairs) > 3)
    return (
        f"{len(pairs):,} held-out images are byte for byte the same as images in another split ({named}); "
        "scores on them say nothing about new images"
    )


# ---- Folders


class _Row(NamedTuple):
    """One image as a constructor found it; `where` says so to a person."""

    image: str
    labels: tuple[str, ...]
    split: str
    group: str | None
    where: str


class _Listing(NamedTuple):
    """Paths below a folder, with `/`, in no order."""

    images: list[str]
    folders: list[str]
    skipped: list[tuple[str, str]]


_SPLIT_WORDS = {"train": "train", "valid": "valid", "val": "valid", "test": "test", "": ""}
_Identity = tuple[int, int]  # device and inode
_STORE_FILE = re.compile(
    r"(?P<folder>((?P<store>.+)/)?(images(?=/[^/]+-[0-9a-f]{8}\.h5)|[^/]+@[^/]+(?=/[^/]+/part-[0-9a-f]{16}\.h5)))/.+",
    re.DOTALL,
)  # an image table or a part, see docs/format.md
_STORE, _OF_STORE = "a feature store", "of a feature store"
_LITTER = ("__macosx", "thumbs.db", "desktop.ini")


def _existing_folder(root: StrPath) -> str:
    folder = os.path.abspath(root)
    if not os.path.isdir(folder):
        is_file = os.path.exists(folder)
        raise ValueError(
            f"{os.fspath(root)} is {'a file' if is_file else 'not there'} (looked for {folder}). Expected a folder of "
            f"images. {'For a table of images use ImageSet.from_csv.' if is_file else 'Correct the path.'}"
        )
    return folder


def _list_folder(folder: str) -> _Listing:
    """Everything below `folder`, through links too, but not round in circles."""
    listing = _Listing([], [], [])
    pending: list[tuple[str, tuple[_Identity, ...]]] = [("", (_identity(os.stat(folder)),))]
    while pending:
        below, above = pending.pop()
        try:
            with os.scandir(os.path.join(folder, below)) as entries:
                for entry in entries:
                    path = f"{below}/{entry.name}" if below else entry.name
                    reason = _reason_to_skip(entry, above)
                    if reason:
                        listing.skipped.append((path, reason))
                    elif entry.is_dir():
                        listing.folders.append(path)
                        pending.append((path, (*above, _identity(entry.stat()))))
                    else:
                        listing.images.append(path)
        except OSError as error:
            raise FeatureStoreError(
                f"{os.path.join(folder, below)} can't be listed ({error.strerror}: {error.filename}). "
                "Expected to read every folder of the image set. Allow it, or move it away."
            ) from error
    return listing


def _without_stores(listing: _Listing) -> _Listing:
    """The listing with a feature store as one skipped entry; where images lie in its folder, with its own folders."""
    found = [match for path, _ in listing.skipped if (match := _STORE_FILE.fullmatch(path))]
    if not found:
        return listing
    filled = {parent.as_posix() for image in listing.images for parent in PurePosixPath(image).parents}
    stores = {
        match["store"] if match["store"] and match["store"] not in filled else match["folder"] for match in found
    } - filled

    def is_outside(path: str) -> bool:
        return not any(path == store or path.startswith(f"{store}/") for store in stores)

    others = [each for each in listing.skipped if is_outside(each[0])]
    named = [(store, _STORE if store in {match["store"] for match in found} else _OF_STORE) for store in stores]
    return _Listing(listing.images, list(filter(is_outside, listing.folders)), others + named)


def _reason_to_skip(entry: os.DirEntry[str], above: tuple[_Identity, ...]) -> str | None:
    if entry.name.startswith(".") or entry.name.lower() in _LITTER:
        return "hidden"
    if entry.is_dir():
        return "links back to a folder above it" if _identity(entry.stat()) in above else None
    if not entry.name.lower().endswith(IMAGE_SUFFIXES):
        return "not an image by its suffix"
    # A link to nothing counts as an image: its absence must be reported by whoever reads it, not swallowed here.
    return None if entry.is_file() or entry.is_symlink() else "not a file"


def _identity(facts: os.stat_result) -> _Identity:
    return facts.st_dev, facts.st_ino


def _arrange(listing: _Listing, folder: str) -> tuple[list[_Row], list[tuple[str, str]]]:
    """A row for each image with its class and split, sorted by path; and what lies beside the folders."""
    if not listing.images:
        raise ValueError(_nothing_found(listing, folder))
    tops = [path for path in listing.folders if "/" not in path]
    split_of = _split_folders(tops, folder)
    rows, beside = [], []
    for image in sorted(listing.images):
        above = image.split("/")[:-1]
        if tops and not above:
            beside.append((image, f"lies beside the {'split' if split_of else 'class'} folders"))
        elif split_of:
            rows.append(_Row(image, tuple(above[1:2]), split_of[above[0]], None, image))
        else:
            rows.append(_Row(image, tuple(above[:1]), "", None, image))
    levels = 2 if split_of else 1
    _check_filled((path for path in listing.folders if path.count("/") < levels), rows, folder)
    return rows, beside


def _split_folders(tops: list[str], folder: str) -> dict[str, str]:
    """The split of each top folder, if these folders are splits; else nothing."""
    words = {top.lower() for top in tops}
    if "train" not in words or not words <= set(_SPLIT_WORDS):
        return {}
    split_of = {top: _SPLIT_WORDS[top.lower()] for top in tops}
    for split, number in Counter(split_of.values()).items():
        if number > 1:
            same = " and ".join(sorted(top for top in tops if split_of[top] == split))
            raise ValueError(
                f"{folder} has {number} folders for split {split}: {same}. "
                "Expected one. Merge them, or rename the one that is not meant."
            )
    return split_of


def _check_filled(folders: Iterable[str], rows: list[_Row], folder: str) -> None:
    filled = {part for row in rows for part in _folders_above(row.image)}
    empty = sorted(set(folders) - filled)
    if empty:
        raise ValueError(
            f"{_listed(empty)} below {folder} {'holds' if len(empty) == 1 else 'hold'} no images. Expected an image "
            f"({', '.join(IMAGE_SUFFIXES)}) in every class and split folder. Put some there, or delete it."
        )


def _folders_above(image: str) -> tuple[str, ...]:
    """The first two folders of a path, which are where classes and splits lie."""
    parts = image.split("/")[:-1]
    return tuple("/".join(parts[: depth + 1]) for depth in range(min(2, len(parts))))


def _nothing_found(listing: _Listing, folder: str) -> str:
    if any(reason == _OF_STORE for _, reason in listing.skipped):
        return (
            f"{folder} is a feature store, which holds no images. Expected a folder of images. Name the one whose "
            "features these are."
        )
    others = [path for path, _ in sorted(listing.skipped)]
    found = [
        _counted(len(listing.folders), "folder")
        + (f" ({_listed(sorted(listing.folders))})" if listing.folders else ""),
        _counted(len(others), "other file") + (f" ({_listed(others)})" if others else ""),
    ]
    return (
        f"{folder} holds no images: found {' and '.join(found)}. Expected files that end with "
        f"{', '.join(IMAGE_SUFFIXES)}. Put images there, or name another folder."
    )


# ---- Tables


_Line = tuple[int, list[str]]  # where it starts, and its cells


def _holds_splits(header: list[str], named: Iterable[str | None]) -> bool:
    """Whether a table has a column for splits that nothing else was said about."""
    return OWN_SPLITS in {cell.strip() for cell in header} - {*named}


def _csv_rows(
    table: list[_Line], file: str, folder: str, columns: dict[str, str | None], label_sep: str | None
) -> list[_Row]:
    (_, header), *body = table
    places = _places(header, columns, file)
    rows: list[_Row] = []
    lines: dict[str, int] = {}
    for line, cells in body:
        where = f"line {line} of {file}"
        if len(cells) != len(header):
            raise ValueError(
                f"{where} has {_counted(len(cells), 'cell')}. Expected {len(header)}, as the header has. "
                "Quote cells that contain the separator."
            )
        full, image = _table_path(cells[places["path"]], folder, where)
        if full in lines:
            raise ValueError(
                f"{file} names {image} twice, in line {lines[full]} and in line {line}. "
                "Expected every image once. Delete one of the lines."
            )
        lines[full] = line
        rows.append(
            _Row(
                image=image,
                labels=_table_labels(cells[places["label"]], label_sep) if "label" in places else (),
                split=_table_split(cells[places["split"]], where) if "split" in places else "",
                group=_table_group(cells[places["group"]], where) if "group" in places else None,
                where=where,
            )
        )
    return rows


def _read_table(file: str) -> list[_Line]:
    """The lines that are not empty, each with the number it starts at; the header and at least one more."""
    separator = {".csv": ",", ".tsv": "\t"}.get(os.path.splitext(file)[1].lower())
    if separator is None:
        raise ValueError(
            f"{file} is no table by its suffix. Expected .csv (commas) or .tsv (tabs). Rename or convert it."
        )
    lines: list[_Line] = []
    start = 1
    try:
        # Names of files need not be UTF-8; what isn't survives as os.fsdecode would have it.
        with open(file, newline="", encoding="utf-8-sig", errors="surrogateescape") as stream:
            reader = csv.reader(stream, delimiter=separator, strict=True, skipinitialspace=True)
            for cells in reader:
                if cells:
                    lines.append((start, cells))
                start = reader.line_num + 1
    except OSError as error:
        raise ValueError(
            f"{file} can't be read ({error.strerror}). Expected a table of images. Correct the path."
        ) from error
    except csv.Error as error:
        raise ValueError(
            f"{file} can't be understood at line {start} ({error}). Expected rows of cells separated by "
            f"{separator!r}. Correct the line."
        ) from error
    if len(lines) < 2:
        raise ValueError(
            f"{file} holds {'only a header' if lines else 'nothing'}. Expected a header and a row for each image. "
            "Add the rows, or name another file."
        )
    return lines


def _places(header: list[str], columns: dict[str, str | None], file: str) -> dict[str, int]:
    """Where each column that was named stands."""
    names = [cell.strip() for cell in header]
    for what, column in columns.items():
        if column is not None and names.count(column) != 1:
            instead = {
                "label": "; if nothing is labelled, say --label-column '' (label_column=None)",
                "split": "; to use none, say --split-column '' (split_column=\"\")",
            }.get(what, "")
            raise ValueError(
                f"{file} has {names.count(column) or 'no'} column{'s' if column in names else ''} {column!r}; it has "
                f"{', '.join(map(repr, names))}. Expected one column with each image's {what}. "
                f"Name it with --{what}-column NAME (in Python: {what}_column=NAME){instead}."
            )
    return {what: names.index(column) for what, column in columns.items() if column is not None}


def _table_path(cell: str, folder: str, where: str) -> tuple[str, str]:
    """The absolute path of an image that a table names, and its id."""
    if not cell:
        raise ValueError(f"{where} names no image. Expected a path. Fill the cell in, or delete the line.")
    full = os.path.normpath(os.path.join(folder, cell))
    root = os.path.join(folder, "")
    if full.startswith(root):
        image = full[len(root) :]
    else:
        image = full if os.path.isabs(cell) else os.path.normpath(cell)
    return full, image.replace(os.sep, "/")


def _table_labels(cell: str, label_sep: str | None) -> tuple[str, ...]:
    pieces = [cell] if label_sep is None else cell.split(label_sep)
    return tuple(piece.strip() for piece in pieces if piece.strip())


def _table_split(cell: str, where: str) -> str:
    word = cell.strip().lower()
    if word not in _SPLIT_WORDS:
        raise ValueError(
            f"{where} has the split {cell!r}. Expected train, valid (or val), test, or nothing. Correct the cell, name "
            "another column of splits with --split-column NAME (in Python: split_column=NAME), or use none, to split "
            "anew: --split-column '' (split_column=\"\")."
        )
    return _SPLIT_WORDS[word]


def _table_group(cell: str, where: str) -> str:
    if not cell.strip():
        raise ValueError(
            f"{where} has no group. Expected one for every image, as groups stay together in one split. "
            "Fill the cell in (an image alone is a group of its own)."
        )
    return cell.strip()


# ---- Arrays


def _checked_images(images: object) -> NDArray[np.uint8]:
    """The array, if it is one of images; a copy unless nobody can write to it."""
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8:
        what = f"an array of {images.dtype}" if isinstance(images, np.ndarray) else f"a {type(images).__name__}"
        raise TypeError(
            f"images is {what}. Expected a numpy array of uint8, (N, H, W) or (N, H, W, 3). "
            "Convert it: values 0 to 255, then .astype(np.uint8)."
        )
    if not (images.ndim == 3 or (images.ndim == 4 and images.shape[3] == 3)) or 0 in images.shape:
        raise ValueError(
            f"images has the shape {images.shape}. Expected (N, H, W) or (N, H, W, 3), none of them 0. "
            "Reshape it; colours come last, in the order red, green, blue."
        )
    if not _is_writable(images):
        return images
    copy = images.copy()
    copy.flags.writeable = False
    return copy


def _is_writable(array: NDArray[Any]) -> bool:
    base: object = array
    while isinstance(base, np.ndarray):
        if base.flags.writeable:
            return True
        base = base.base
    return False


def _label_lists(labels: NDArray[Any], given: tuple[str, ...] | None) -> tuple[list[list[int]], tuple[str, ...]]:
    """The places of the ones in each row of an n-hot array, and the class names."""
    num_classes = labels.shape[-1] if given is None else len(given)
    if labels.ndim != 2 or labels.shape[1] != num_classes:
        raise ValueError(
            f"labels has the shape {labels.shape}. Expected (N, {num_classes}): a row for each image and a column for "
            "each class. Reshape it, or pass a list of labels for each image."
        )
    if not np.isin(labels, (0, 1)).all():
        raise ValueError("labels holds values other than 0 and 1. Expected 1 where an image has a class. Threshold it.")
    return [np.flatnonzero(row).tolist() for row in labels], given or tuple(map(str, range(num_classes)))


def _label_names(cell: Any, given: tuple[str, ...] | None, task: Task, where: str) -> tuple[str, ...]:
    """The class names of one image; none if it is unlabelled."""
    if cell is None:
        return ()
    if task == "single":
        cell = [cell]
    elif isinstance(cell, str) or not isinstance(cell, Iterable):
        raise TypeError(f"{where} is {cell!r}. Expected a list of labels, as task is 'multi'. Wrap it: [{cell!r}].")
    names = (_label_name(label, given, where) for label in cell)
    return tuple(name for name in names if name)


def _label_name(label: object, given: tuple[str, ...] | None, where: str) -> str | None:
    if label is None or isinstance(label, str):
        return None if label is None else str(label)
    if isinstance(label, bool) or not isinstance(label, Integral):
        raise TypeError(
            f"{where} is {label!r}, a {type(label).__name__}. "
            "Expected a class name or an integer. Convert the labels; for several an image pass task='multi'."
        )
    number = int(label)
    if number < -1 or (given is not None and number >= len(given)):
        most = "" if given is None else f" to {len(given) - 1}"
        raise ValueError(f"{where} is {number}. Expected 0{most}, or -1 for an unlabelled image. Correct it.")
    if number == -1:
        return None
    return str(number) if given is None else given[number]


def _are_integers(cells: Sequence[Any], task: Task) -> bool:
    labels = cells if task == "single" else [label for cell in cells if cell is not None for label in cell]
    return all(isinstance(label, Integral) for label in labels if label is not None)


# ---- Classes and targets


def _class_table(
    rows: list[_Row], *, given: tuple[str, ...] | None = None, by_value: bool = False, instead: str | None = None
) -> tuple[str, ...]:
    """The classes given, or else those of the images in train or in no split, sorted.

    Args:
        rows: the images.
        given: the classes, in the order that counts.
        by_value: sorts them as numbers.
        instead: what a person may do who needs no classes.
    """
    if given is None:
        known = {label for row in rows if row.split in ("train", "") for label in row.labels}
    else:
        known = set(given)
    for row in rows:
        for label in row.labels:
            if label not in known:
                place = f"({row.where}, split {row.split}) is not in train"
                if given is not None:
                    place = f"({row.where}) is not in classes"
                raise ValueError(
                    f"class {label!r} {place}. Expected one of {_counted(len(known), 'class')}"
                    f"{f' ({_listed(sorted(known))})' if known else ''}. Correct the label, or add the class there"
                    f"{f'; to extract features only, {instead}' if instead else ''}."
                )
    return given if given is not None else tuple(sorted(known, key=int if by_value else str))


def _targets(rows: list[_Row], classes: tuple[str, ...], task: Task) -> NDArray[np.int64] | NDArray[np.float32]:
    place = {name: number for number, name in enumerate(classes)}
    if task == "single":
        return np.array([place[row.labels[0]] if row.labels else -1 for row in rows], dtype=np.int64)
    targets = np.zeros((len(rows), len(classes)), dtype=np.float32)
    for index, row in enumerate(rows):
        targets[index, [place[label] for label in row.labels]] = 1
    return targets


# ---- Dealing


@dataclass(frozen=True, kw_only=True, eq=False)
class _Units:
    """What is dealt whole, an image or a group of images; U of them.

    Attributes:
        of_image: `(N,)` the unit of each image.
        sizes: `(U,)` images in each.
        ranks: `(U,)` uint64, by hash.
        strata: the units of each stratum, in order of rank.
    """

    of_image: NDArray[np.int64]
    sizes: NDArray[np.int64]
    ranks: NDArray[np.uint64]
    strata: list[NDArray[np.int64]]


def _rank(keys: Sequence[str], strata: NDArray[np.int64], seed: int) -> _Units:
    """Images with one key as a unit, ranked by SHA-256 of seed and key within the unit's commonest stratum."""
    numbers: dict[str, int] = {}
    of_image = np.array([numbers.setdefault(key, len(numbers)) for key in keys], dtype=np.int64)
    hashes = (
        hashlib.sha256(f"{operator.index(seed)}\n{key}".encode("utf-8", "surrogatepass")).digest()[:8]
        for key in numbers
    )
    ranks = np.frombuffer(b"".join(hashes), dtype=">u8").astype(np.uint64)
    stratum = _commonest(of_image, strata)
    order = np.lexsort((ranks, stratum))
    return _Units(
        of_image=of_image,
        sizes=np.bincount(of_image, minlength=len(numbers)),
        ranks=ranks,
        strata=np.split(order, np.flatnonzero(np.diff(stratum[order])) + 1),
    )


def _commonest(of_image: NDArray[np.int64], strata: NDArray[np.int64]) -> NDArray[np.int64]:
    """`(U,)` the stratum of most images of each unit; of equals the first."""
    num_strata = int(strata.max(initial=0)) + 1
    pairs, counts = np.unique(of_image * num_strata + strata, return_counts=True)
    unit, stratum = np.divmod(pairs, num_strata)
    order = np.lexsort((stratum, -counts, unit))
    _, firsts = np.unique(unit[order], return_index=True)
    commonest: NDArray[np.int64] = stratum[order][firsts]
    return commonest


def _deal(units: _Units, valid: float, test: float) -> NDArray[np.str_]:
    """`(U,)` the split of each unit."""
    dealt = np.full(len(units.sizes), "train", dtype="<U5")
    for members in units.strata:
        num_images = int(units.sizes[members].sum())
        for split, fraction in (("valid", valid), ("test", test)):
            left = members[dealt[members] == "train"]
            dealt[_taken(left, units.sizes, _round_half_up(fraction, num_images))] = split
    left = np.flatnonzero(dealt == "train")
    if valid > 0 and not (dealt == "valid").any() and len(left) > 1:
        dealt[left[np.argmin(units.ranks[left])]] = "valid"
    return dealt


def _taken(members: NDArray[np.int64], sizes: NDArray[np.int64], wanted: int) -> list[int]:
    """Each of `members`, in order, that brings the number of images nearer to `wanted`."""
    taken = []
    for unit, size in zip(members.tolist(), sizes[members].tolist(), strict=True):
        if wanted <= 0:
            break
        if size < 2 * wanted:  # |wanted - size| < wanted
            taken.append(unit)
            wanted -= size
    return taken


def _round_half_up(fraction: float, number: int) -> int:
    """In decimals as a person wrote them: 0.145 of 100 is 14.5, hence 15; in binary it is a little less."""
    return math.floor(Decimal(repr(float(fraction))) * number + Decimal("0.5"))


def _fold_images(units: _Units, k: int) -> NDArray[np.int64]:
    """`(U,)` the fold of each image: k blocks of each stratum in rank order, so that adding images moves few."""
    fold = np.empty(len(units.sizes), dtype=np.int64)
    first = 0  # the fold whose turn it is to get one image more than others
    for members in units.strata:
        sizes = np.full(k, len(members) // k)
        sizes[(first + np.arange(len(members) % k)) % k] += 1
        fold[members] = np.repeat(np.arange(k), sizes)
        first = (first + len(members)) % k
    return fold


def _fold_groups(units: _Units, k: int) -> NDArray[np.int64]:
    """`(U,)` the fold of each group, the largest first: that with fewest images of its stratum, then of all."""
    fold = np.empty(len(units.sizes), dtype=np.int64)
    filled = [0] * k
    for members in units.strata:
        loads = [(0, filled[number], number) for number in range(k)]
        heapify(loads)
        for unit in members[np.argsort(-units.sizes[members], kind="stable")].tolist():
            _, _, number = loads[0]
            size = int(units.sizes[unit])
            fold[unit] = number
            filled[number] += size
            heapreplace(loads, (loads[0][0] + size, filled[number], number))
    return fold


def _check_test_groups(groups: tuple[str, ...] | None, is_dealt: NDArray[np.bool_]) -> None:
    if groups is None:
        return
    tested = {group for group, dealt in zip(groups, is_dealt, strict=True) if not dealt}
    both = sorted(tested & {group for group, dealt in zip(groups, is_dealt, strict=True) if dealt})
    if both:
        raise ValueError(
            f"{_counted(len(both), 'group')} ({_listed(both)}) have images in split test and outside it. "
            "Expected whole groups in one split. Correct the splits, or deal all of it with split(valid=..., test=...)."
        )


# ---- Checks and words


def _checked_splits(splits: Sequence[str] | NDArray[np.str_], count: int) -> NDArray[np.str_]:
    _check_length(splits, count, "splits")
    given = np.asarray(splits, dtype=str)
    checked = given.astype("<U5")
    if not np.isin(given, ("", *_SPLITS)).all():
        words = given.tolist()
        unknown = sorted({word for word in set(words) if word.lower() not in _SPLIT_WORDS})
        if unknown:
            raise ValueError(
                f"splits holds {_listed(unknown)}. Expected train, valid (or val), test or ''. Correct them."
            )
        checked = np.array([_SPLIT_WORDS[word.lower()] for word in words], dtype="<U5")
    checked.flags.writeable = False
    return checked


def _checked_targets(
    targets: ArrayLike | None, count: int, num_classes: int, task: Task
) -> NDArray[np.int64] | NDArray[np.float32] | None:
    """A read-only copy; None if nothing is labelled."""
    if targets is None:
        return None
    found = np.asarray(targets)
    shape = (count,) if task == "single" else (count, num_classes)
    if found.shape != shape or found.dtype.kind not in ("iu" if task == "single" else "biuf"):
        raise ValueError(
            f"targets is an array {found.shape} of {found.dtype}. Expected {shape} of "
            f"{'integers' if task == 'single' else '0 and 1'}, as task is {task!r}. Convert them, or correct the task."
        )
    allowed = range(-1, num_classes) if task == "single" else range(2)
    if not ((found >= allowed[0]) & (found <= allowed[-1]) & (found == np.floor(found))).all():
        raise ValueError(
            f"targets holds values from {found.min()} to {found.max()}. Expected {allowed[0]} to {allowed[-1]}, "
            f"as there are {_counted(num_classes, 'class')}. Correct the targets or the classes."
        )
    if num_classes == 0 or (task == "single" and count and (found == -1).all()):
        return None
    checked = found.astype(np.int64) if task == "single" else found.astype(np.float32)
    checked.flags.writeable = False
    return checked


def _checked_groups(groups: Sequence[Any], count: int) -> tuple[str, ...]:
    _check_length(groups, count, "groups")
    return tuple(str(group) for group in groups)


def _checked_indices(which: ArrayLike, count: int) -> NDArray[np.int64]:
    array = np.asarray(which)
    if array.dtype == bool:
        _check_length(array, count, "the mask")
        return np.flatnonzero(array)
    if array.size and array.dtype.kind not in "iu":
        raise TypeError(f"select got {array.dtype} values. Expected indices or a mask of booleans. Convert them.")
    indices = array.astype(np.int64).reshape(-1)
    wrong = indices[(indices < 0) | (indices >= count)]
    if wrong.size:
        raise ValueError(f"select got index {wrong[0]}. Expected 0 to {count - 1}. Leave it out.")
    _check_unique(indices.tolist(), "index", "Select every image once.")
    return indices


def _picked(names: tuple[str, ...], indices: NDArray[np.int64]) -> tuple[str, ...]:
    return tuple(map(names.__getitem__, indices.tolist()))  # numpy's own integers would be three times as slow


def _check_length(values: Sequence[Any] | NDArray[Any] | None, count: int, what: str) -> None:
    if values is not None and len(values) != count:
        raise ValueError(f"{what} has {len(values):,} entries. Expected {count:,}, one for each image. Give them all.")


def _check_unique(values: Sequence[object], noun: str, remedy: str) -> None:
    hashes = np.sort(np.fromiter(map(hash, values), np.int64, len(values)))  # a set would take ten times the memory
    if (hashes[1:] == hashes[:-1]).any() and len(set(values)) < len(values):
        value, number = Counter(values).most_common(1)[0]
        raise ValueError(f"{noun} {value!r} appears {number} times. Expected each once. {remedy}")


def _safe_name(name: str) -> str:
    """`name` with what a file name should not have as `_`; at most 100 characters, as file names have 255.

    The end of a longer one becomes a digest, so that two such names stay two.
    """
    safe = re.sub(r"[^A-Za-z0-9._-]+", "_", name).strip("._-") or "images"
    return safe if len(safe) <= 100 else f"{safe[:91]}-{digest_bytes(safe.encode('ascii'))[:8]}"


def _counted(number: int, noun: str) -> str:
    ending = "" if number == 1 else "es" if noun.endswith("s") else "s"
    return f"{number:,} {noun}{ending}"


def _listed(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    more = [f"{len(names) - 5:,} more"] if len(names) > 5 else []
    return ", ".join([*map(repr, names[:5]), *more])
