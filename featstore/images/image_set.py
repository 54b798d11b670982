"""Image sets: which images, in which order, with which targets and split, and how to read each one's bytes."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from featstore.digest import Json, digest_bytes
from featstore.images.csv_tables import Reading, classes_of, own_splits, read_table, table_rows
from featstore.images.digests import Digests, KnownDigest, KnownDigests, Memo
from featstore.images.folders import StrPath, TopFolders, existing_folder, folder_rows
from featstore.images.labels import (
    Row,
    Task,
    are_numbers,
    check_length,
    check_unique,
    checked_groups,
    checked_indices,
    checked_splits,
    checked_targets,
    class_table,
    composed,
    composed_classes,
    held_out_notes,
    label_lists,
    label_names,
    one_label_notes,
    one_spelling,
    split_counts,
    targets_of,
)
from featstore.images.sources import ArraySource, FolderSource, ImageSource, without_start
from featstore.images.splitting import check_test_groups, fold_of_each, split_of_each
from featstore.words import counted


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
        notes: sentences about how a folder or table was understood, where that isn't plain.
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
    source: ImageSource
    skipped: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()
    origin: Mapping[str, Json] = field(default_factory=dict)
    _memo: Memo = field(default_factory=Memo)  # shared by all sets derived from one another; never pickled

    def __post_init__(self) -> None:
        if self.task not in ("single", "multi"):
            raise ValueError(f"task is {self.task!r}. Expected 'single' (one class an image) or 'multi' (any number).")
        check_unique(self.ids, "image id", "Give every image its own path.")
        check_unique(self.classes, "class", "Name every class once.")
        self._set("name", _safe_name(self.name))
        self._set("ids", tuple(self.ids))
        self._set("classes", composed_classes(self.classes))
        self._set("origin", dict(self.origin))
        self._set("splits", checked_splits(self.splits, len(self)))
        self._set("targets", checked_targets(self.targets, len(self), len(self.classes), self.task))
        if self.groups is not None:
            self._set("groups", checked_groups(self.groups, len(self)))

    @classmethod
    def from_folder(
        cls, root: StrPath, *, top_folders: TopFolders = "auto", held_out_classes: bool = False, name: str | None = None
    ) -> ImageSet:
        """The images below a folder, sorted by path; the first folder of each path is its class.

        Classes are sorted, by value if all are plain integers; two Unicode spellings of one name are one class.

        Where all folders are called as splits are (`train`, `valid`, `test` and the other words of `SPLIT_WORDS`, in
        any case), they are the splits and the class is the first folder below; images directly in a split folder are
        unlabelled. Where some are called so and it can't be told what they are, `top_folders` must say it: "classes"
        takes every folder for a class, "splits" takes those for splits and leaves the others out. A root with images
        and no folders is an unlabelled set. Links to folders are followed. Hidden files, files of other suffixes,
        images beside the class folders and feature stores are listed in `skipped`.

        With `held_out_classes` the table holds classes that only held-out images have, as sets for retrieval do: their
        features can be extracted, and no head learns them.

        Raises:
            ValueError: if the folder is missing or has no images, a class or split folder has none, folders may be
                splits or classes, or `valid` or `test` have a class that `train` lacks.
            FeatureStoreError: if a folder can't be listed.
        """
        if top_folders not in get_args(TopFolders):
            raise ValueError(f"top_folders is {top_folders!r}. Expected 'auto', 'classes' or 'splits'. Choose one.")
        folder = existing_folder(root)
        rows, skipped, notes = folder_rows(folder, top_folders)
        rows, spellings = one_spelling(rows)
        return cls._from_rows(
            rows,
            name=name or os.path.basename(folder),
            task="single",
            classes=class_table(rows, held_out_classes=held_out_classes, instead=_HELD_OUT),
            is_labelled=True,
            source=FolderSource(root=folder),
            skipped=skipped,
            notes=(*notes, *spellings, *held_out_notes(rows)),
            origin={"constructor": "from_folder", "root": os.fspath(root), "top_folders": top_folders, "name": name},
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
        one_hot: Sequence[str] | Literal["*"] | None = None,
        split_column: str | None = None,
        valid_column: str | None = None,
        group_column: str | None = None,
        task: Task = "single",
        suffix: str | None = None,
        strip: str | None = None,
        held_out_classes: bool = False,
        name: str | None = None,
    ) -> ImageSet:
        """The images that a table with a header names, in its order; UTF-8, commas in a `.csv`, tabs in a `.tsv`.

        Held-out images of other classes than those of `train` need `held_out_classes`, as in `from_folder`.

        UTF-16 and cells separated otherwise (as the header shows) are read as well, which `notes` says. Backslashes in
        paths are slashes. `suffix` is added to names without it; `strip` is cut off where paths begin with it (a folder
        of another machine), so that the rest lies below `root`. Columns of 0 and 1, one a class, are named by `one_hot`
        ("*": all that are used for nothing else); a column of who is held out, and else trained on, by `valid_column`.

        Paths are below `root` (default: the table's folder) or absolute. Splits are `train`, `valid` (or `val`),
        `test`, or empty; without `split_column` those of the column `split` in any case (or `splits`, `subset` or
        `partition`, if it says nothing else), if there is one, and with `split_column=""` none. An empty label means
        unlabelled if `task` is "single", and none of the classes if "multi". With `label_column=None` nothing is
        labelled. Classes are those of the rows in `train` or in no split.

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
        if valid_column is not None and split_column:
            raise ValueError(
                f"split_column is {split_column!r} and valid_column {valid_column!r}. Expected one column that says "
                "the split. Leave one out."
            )
        folder = os.path.dirname(file) if root is None else existing_folder(root)
        lines, dialect = read_table(file, path_column)
        if valid_column is not None:
            split_column = None
        elif split_column is None:
            split_column = own_splits(lines, file, (path_column, label_column, group_column, *(one_hot or ())))
        reading = Reading(
            columns={
                "path": path_column,
                "label": label_column if one_hot is None else None,
                "split": split_column or None,
                "valid": valid_column,
                "group": group_column,
            },
            label_sep=label_sep,
            task=task,
            suffix=suffix,
            strip=strip,
        )
        one_hot_classes = None
        if one_hot is not None:
            one_hot_classes = classes_of(lines[0][1], reading, one_hot)
            reading = replace(reading, one_hot=one_hot_classes)
        found, notes = table_rows(lines, file, folder, reading)
        rows, spellings = one_spelling(found)
        return cls._from_rows(
            rows,
            name=name or os.path.splitext(os.path.basename(file))[0],
            task=task,
            classes=class_table(
                rows,
                given=one_hot_classes,
                held_out_classes=held_out_classes,
                instead=f"leave the labels out: --label-column '' (in Python: label_column=None), or {_HELD_OUT}",
            ),
            is_labelled=label_column is not None or one_hot is not None,
            source=FolderSource(root=folder),
            notes=(*dialect, *notes, *spellings, *held_out_notes(rows), *one_label_notes(rows)),
            origin={
                "constructor": "from_csv",
                "path": os.fspath(path),
                "root": None if root is None else os.fspath(root),
                "path_column": path_column,
                "label_column": label_column,
                "label_sep": label_sep,
                "one_hot": one_hot if one_hot is None or one_hot == "*" else list(one_hot),
                "split_column": split_column,
                "valid_column": valid_column,
                "group_column": group_column,
                "task": task,
                "suffix": suffix,
                "strip": strip,
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

        A label is a class name (without spaces around it), or an integer: a place in `classes`, or without `classes`
        a name of its own. None, "" and -1 mean unlabelled. If `task` is "multi", `labels` is an array `(N, K)` of 0
        and 1, or a list of labels for each image. `classes` keeps the order it is given in; without it, the classes
        are those of the images in `train` or in no split, sorted (by value, if all are integers).

        A writable array is copied; a read-only one (`np.load(..., mmap_mode="r")`) is kept as it is, and hashed anew
        by each call of `digests`, as its file may have been written to.

        Raises:
            TypeError: for images that are not a uint8 array, and labels that are neither names nor integers.
            ValueError: for another shape, lengths that differ, and labels out of range or not in `classes`.
        """
        source = ArraySource.of(images)
        count = len(source.images)
        given = None if classes is None else tuple(composed(str(each).strip()) for each in classes)
        cells: Sequence[Any] = [None] * count if labels is None else list(labels)
        if task == "multi" and isinstance(labels, np.ndarray) and labels.dtype != object:
            cells, given = label_lists(labels, given)
        check_length(cells, count, "labels")
        units = None if groups is None else checked_groups(groups, count)
        dealt = checked_splits([""] * count if splits is None else splits, count).tolist()
        found = [
            Row(
                image=str(index),
                labels=label_names(cells[index], given, task, f"labels[{index}]"),
                split=dealt[index],
                group=None if units is None else units[index],
                where=f"labels[{index}]",
            )
            for index in range(count)
        ]
        rows, spellings = one_spelling(found)
        return cls._from_rows(
            rows,
            name=name,
            task=task,
            classes=class_table(rows, given=given),
            is_labelled=labels is not None,
            source=source,
            notes=spellings,
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
        return self._subset(checked_indices(which, len(self)), "select")

    def with_root(self, root: StrPath, *, strip: str | None = None) -> ImageSet:
        """The same images, read from another folder (on another machine, say); ids stay.

        Args:
            root: the folder.
            strip: what is cut off the paths that begin with it: of absolute ones, which lie below no root otherwise.

        Raises:
            ValueError: if there is no such folder, the images are arrays, or no path begins with `strip`.
        """
        moved = self.source.moved(os.path.abspath(root))
        if moved is None:
            raise ValueError(
                f"the images of {self.name} are arrays in memory. Expected an image set of files for with_root. "
                "Use the set as it is, or make one of the files with ImageSet.from_folder or ImageSet.from_csv."
            )
        existing_folder(root)
        origin = {**self.origin, "root": os.fspath(root)} if self.origin else {}
        if strip is not None:
            if all(without_start(image, strip) == image for image in self.ids):
                first = f" (the first is {self.ids[0]})" if self.ids else ""
                raise ValueError(
                    f"no path of {self.name} begins with {strip}{first}. Expected what is to be cut off paths. Correct "
                    "strip, or leave it out."
                )
            moved = FolderSource(root=os.path.abspath(root), strip=strip)
            origin = {}  # the flag --strip would change ids too, and with them the split
        # The files are others, so what was hashed tells nothing; a store's digests come with facts to compare.
        memo = Memo(KnownDigests.of(self.source.known))
        return replace(self, source=moved, origin=origin, _memo=memo)

    def with_splits(self, splits: Sequence[str] | NDArray[np.str_]) -> ImageSet:
        """The same images with other splits: "train", "valid" (or "val"), "test" or "" for each.

        Raises:
            ValueError: for another number of splits or another word.
        """
        origin = {key: value for key, value in self.origin.items() if key != "split"}
        if origin.get("split_column") or origin.get("valid_column"):
            origin |= {"split_column": "", "valid_column": None}  # what the table says no longer counts
        return replace(self, splits=checked_splits(splits, len(self)), origin=origin)

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
        own = self.groups if groups is None else checked_groups(groups, len(self))
        dealt = self.with_splits(split_of_each(own or self.ids, self._strata(stratify), seed, valid=valid, test=test))
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
        own = self.groups if groups is None else checked_groups(groups, len(self))
        check_test_groups(own, is_dealt)
        keys = [key for key, dealt in zip(own or self.ids, is_dealt, strict=True) if dealt]
        fold = fold_of_each(keys, self._strata(stratify)[is_dealt], seed, k=k, are_groups=bool(own))
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
        parts = [", ".join([counted(len(self), "image"), self._describe_labels()])]
        if (self.splits != "").any():
            parts.append(split_counts(self.splits))
        if self.skipped:
            parts.append(f"{counted(len(self.skipped), 'file')} skipped")
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
        rows: list[Row],
        *,
        name: str,
        task: Task,
        classes: tuple[str, ...],
        is_labelled: bool,
        source: ImageSource,
        origin: dict[str, Json],
        skipped: tuple[tuple[str, str], ...] = (),
        notes: tuple[str, ...] = (),
    ) -> ImageSet:
        groups = tuple(row.group for row in rows if row.group is not None)
        return cls(
            name=name,
            ids=tuple(row.image for row in rows),
            targets=targets_of(rows, classes, task) if is_labelled else None,
            classes=classes,
            splits=np.array([row.split for row in rows], dtype="<U5"),
            groups=groups or None,
            task=task,
            source=source,
            skipped=skipped,
            notes=notes,
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
            notes=(),
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
        is_by_value = are_numbers(self.classes) and list(self.classes) == sorted(self.classes, key=int)
        order = " in the order of their numbers" if is_by_value and list(self.classes) != sorted(self.classes) else ""
        text = f"{counted(self.num_classes, 'class')}{order} ({', '.join(shown + more)})"
        if self.task == "multi":
            return f"{text}, several an image"
        return f"{text}, {num_unlabelled:,} unlabelled" if num_unlabelled else text

    def _set(self, attribute: str, value: Any) -> None:
        object.__setattr__(self, attribute, value)


_HELD_OUT = "run featstore extract (in Python: held_out_classes=True)"


class HoldsImageSets(Protocol):
    """What `ImageSet.from_store` needs of a store."""

    def images(self, name: str | None = None) -> ImageSet:
        """The newest image set of that name."""


def _picked(names: tuple[str, ...], indices: NDArray[np.int64]) -> tuple[str, ...]:
    return tuple(map(names.__getitem__, indices.tolist()))  # numpy's own integers would be three times as slow


def _safe_name(name: str) -> str:
    """`name` with what a file name should not have as `_`; at most 100 characters, as file names have 255.

    The end of a longer one becomes a digest, so that two such names stay two.
    """
    safe = re.sub(r"[^A-Za-z0-9._-]+", "_", name).strip("._-") or "images"
    return safe if len(safe) <= 100 else f"{safe[:91]}-{digest_bytes(safe.encode('ascii'))[:8]}"
