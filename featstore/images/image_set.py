"""Image sets: which images, in which order, with which targets and split, and how to read each one's bytes.

Long, since every way to make a set, and to change one, is a method of it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, Literal, Protocol, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from featstore.digest import Json
from featstore.html import titled_table
from featstore.images.datasets import dataset_images, iterable_images, labelled_rows
from featstore.images.digests import Contents, Digests, KnownDigest, KnownDigests, Memo
from featstore.images.folders import StrPath, absolute, existing_folder, folder_rows
from featstore.images.found import FoundImages, safe_name
from featstore.images.labels import (
    HELD_OUT,
    check_unique,
    checked_groups,
    checked_indices,
    checked_splits,
    checked_targets,
    class_table,
    composed_classes,
    held_out_notes,
    label_counts,
    labels_text,
    one_spelling,
    split_counts,
    targets_of,
)
from featstore.images.names import Task, TopFolders
from featstore.images.object_source import source_below
from featstore.images.sources import ArraySource, FolderSource, ImageSource, without_start
from featstore.images.splitting import check_test_groups, fold_of_each, split_of_each
from featstore.images.tables import table_images
from featstore.images.tar_shards import tar_images
from featstore.words import counted


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class ImageSet:
    """Which images, in which order, with which targets, classes, split and groups, and how to read each one's bytes.

    Made by the constructors `from_...`; every other method returns a new set. Sets pickle (the images themselves only
    if they are arrays) and hold no open file. No file is read before `read` or `digests`.

    >>> digits = np.zeros((10, 8, 8), dtype=np.uint8)
    >>> images = ImageSet.from_arrays(digits, ["one", "two"] * 5).split(valid=0.2)
    >>> images
    ImageSet(arrays: 10 images, 2 classes (one 5, two 5); train 8, valid 2)
    >>> images.valid.targets
    array([0, 1])

    Attributes:
        name: for people and for file names; what is not in `A-Za-z0-9._-` has become `_`.
        ids: the path below the root, with `/`; of arrays the index. No id appears twice.
        targets: single: int64 `(N,)`, -1 where unlabelled; multi: float32 `(N, K)` of 0 and 1; regression: float32
            `(N, K)`, NaN where unlabelled; None if nothing is labelled. Read-only, as is `splits`.
        classes: the one class table of all splits; a target is a place in it. In regression the names of the K values.
        splits: `(N,)` "train", "valid", "test", or "" for images not dealt yet.
        groups: what must stay together in one split (a patient), one for each image.
        task: one class an image, any number of labels, or numbers.
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
        if self.task not in get_args(Task):
            raise ValueError(
                f"task is {self.task!r}. Expected 'single' (one class an image), 'multi' (any number) or 'regression'."
            )
        check_unique(self.ids, "image id", "Give every image its own path.")
        check_unique(self.classes, "class", "Name every class once.")
        self._set("name", safe_name(self.name))
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

        Or those below an address such as ``s3://bucket/photos`` (extra `s3`), whose names are taken for paths.

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
        return cls.of(
            FoundImages(
                rows=rows,
                source=source_below(folder),
                name=name or os.path.basename(folder),
                held_out_classes=held_out_classes,
                instead=HELD_OUT,
                skipped=skipped,
                notes=notes,
                origin={
                    "constructor": "from_folder",
                    "root": os.fspath(root),
                    "top_folders": top_folders,
                    "name": name,
                },
            )
        )

    @classmethod
    def from_table(
        cls,
        path: StrPath,
        *,
        root: StrPath | None = None,
        path_column: str = "path",
        label_column: str | Sequence[str] | None = "label",
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
        """The images that a table with a header names, in its order: a `.csv`, a `.tsv` (both UTF-8) or a `.parquet`.

        Held-out images of other classes than those of `train` need `held_out_classes`, as in `from_folder`.

        UTF-16 and cells separated otherwise (as the header shows) are read as well, which `notes` says. Backslashes in
        paths are slashes. `suffix` is added to names without it; `strip` is cut off where paths begin with it (a folder
        of another machine), so that the rest lies below `root`. Columns of 0 and 1, one a class, are named by `one_hot`
        ("*": all that are used for nothing else); a column of who is held out, and else trained on, by `valid_column`.

        Paths are below `root` (default: the table's folder) or absolute. Splits are `train`, `valid` (or `val`),
        `test`, or empty; without `split_column` those of the column `split` in any case (or `splits`, `subset` or
        `partition`, if it says nothing else), if there is one, and with `split_column=""` none. An empty label, or -1,
        means unlabelled if `task` is "single", and none of the classes if "multi". With `label_column=None` nothing is
        labelled. Classes are those of the rows in `train` or in no split. If `task` is "regression", `label_column`
        names one or several columns of numbers.

        Raises:
            ValueError: with the line, if the table can't be understood: a missing column, a row of another length, a
                path twice, an unknown split, a class in `valid` or `test` that `train` lacks, no rows.
        """
        return cls.of(
            table_images(
                path,
                root=root,
                path_column=path_column,
                label_column=label_column,
                label_sep=label_sep,
                one_hot=one_hot,
                split_column=split_column,
                valid_column=valid_column,
                group_column=group_column,
                task=task,
                suffix=suffix,
                strip=strip,
                held_out_classes=held_out_classes,
                name=name,
            )
        )

    from_csv = from_table  # the same, by the name that it had when every table was one

    @classmethod
    def from_tar(
        cls,
        shards: StrPath | Sequence[StrPath],
        *,
        label_column: str | Sequence[str] | None = "label",
        label_sep: str | None = None,
        split_column: str | None = None,
        group_column: str | None = None,
        task: Task = "single",
        held_out_classes: bool = False,
        name: str | None = None,
    ) -> ImageSet:
        """The images in tar files, as WebDataset writes them; each is read where it lies, and nothing is unpacked.

        `shards` are paths, or one that stands for several (`train-{000..003}.tar`, `*.tar`, a folder). A sample is all
        members whose path is the same up to the first dot of the name; that path is the image's id, after the shard's
        name if paths repeat across `shards` (`train-000/0001`). One member is an image by its suffix (`.png` before
        `.seg.png`); a column is a member of that suffix, as text, or a field of the member `.json`. The column
        `label` is the member `.cls` as well.

        Without `split_column` the names of the shards say the splits (`train-000`, `val-000`) where they name several,
        else the samples' column `split`, if the first one has it; with `split_column=""` there are none. `label_sep`,
        `task` and `held_out_classes` are those of `from_table`.

        Raises:
            ValueError: if a shard isn't there, is compressed, damaged or cut off, or samples can't be understood: two
                members of one name, two images in a sample, an unknown split, a class in `valid` or `test` that `train`
                lacks.
        """
        return cls.of(
            tar_images(
                shards,
                label_column=label_column,
                label_sep=label_sep,
                split_column=split_column,
                group_column=group_column,
                task=task,
                held_out_classes=held_out_classes,
                name=name,
            )
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
        a name of its own. None, "" and -1, "-1" too, mean unlabelled. If `task` is "multi", `labels` is an array
        `(N, K)` of 0 and 1, or a list of labels for each image; if it is "regression", an array of numbers `(N,)` or
        `(N, K)`, NaN where there are none, and `classes` has the names of the values. `classes` keeps the order it is
        given in; without it, the classes are those of the images in `train` or in no split, sorted (by value, if all
        are integers).

        A writable array is copied; a read-only one (`np.load(..., mmap_mode="r")`) is kept as it is, and hashed anew
        by each call of `digests`, as its file may have been written to.

        Raises:
            TypeError: for images that are not a uint8 array, and labels that are neither names nor integers.
            ValueError: for another shape, lengths that differ, and labels out of range or not in `classes`.
        """
        source = ArraySource.of(images)
        ids = tuple(map(str, range(len(source.images))))
        rows, given = labelled_rows(ids, labels, classes=classes, splits=splits, groups=groups, task=task)
        return cls.of(
            FoundImages(rows=rows, source=source, name=name, task=task, is_labelled=labels is not None, classes=given)
        )

    @classmethod
    def from_dataset(
        cls,
        dataset: Any,
        *,
        image_column: str | None = None,
        label_column: str | None = "label",
        id_column: str | None = None,
        classes: Sequence[str] | None = None,
        splits: Sequence[str] | NDArray[np.str_] | None = None,
        groups: Sequence[Any] | None = None,
        task: Task = "single",
        name: str | None = None,
    ) -> ImageSet:
        """The images of a map-style data set: torch's, torchvision's, Hugging Face's; or a mapping from splits to such.

        Items are an image, (image, label) or a mapping with columns; an image is a PIL image, as it lies whatever its
        EXIF says, uint8 (an array `(H, W[, 3])`, a tensor `(3, H, W)`), or encoded bytes. They must be the same each
        time, so without transforms. torchvision's `ImageFolder` is read as the files that it is of, and Hugging Face's
        images as they are encoded: equal to a folder's of the same files.

        Ids are places ("0"; "train/0" in a mapping), paths of an `ImageFolder`, or the cells of `id_column`. Classes
        are the data set's own names (`.classes`, `ClassLabel`), or `classes`; labels are as in `from_arrays`. With
        `label_column=None` nothing is labelled. Where torchvision's `targets` haven't the labels, each item is read
        once for its label. One process reads one item at a time, and all of them to know what they are.

        Raises:
            TypeError: for what has no places, and items that are no images.
            ValueError: for items that are others when they are read again, columns that aren't there, and labels as in
                `from_arrays`.
        """
        return cls.of(
            dataset_images(
                dataset,
                image_column=image_column,
                label_column=label_column,
                id_column=id_column,
                classes=classes,
                splits=splits,
                groups=groups,
                task=task,
                name=name,
            )
        )

    @classmethod
    def from_iterable(
        cls, items: Iterable[Any], *, classes: Sequence[str] | None = None, task: Task = "single", name: str = "images"
    ) -> ImageSet:
        """The images that an iterable yields as (id, image) or (id, image, label); it is gone through once.

        Images and labels are as in `from_dataset`. All images stay in memory: encoded bytes as they are, pixels as an
        array each. What is no image is a failed row when it is read.

        Raises:
            TypeError: for an item of another form.
            ValueError: for an id that comes twice, and labels as in `from_dataset`.
        """
        return cls.of(iterable_images(items, classes=classes, task=task, name=name))

    @classmethod
    def of(cls, found: FoundImages) -> ImageSet:
        """The set of what a source found, where the other constructors end, and that of a source of your own.

        Raises:
            ValueError: for a label of held-out images that no other has, and one that isn't among the classes given.
        """
        rows, spellings = one_spelling(found.rows)
        classes = found.classes or ()
        if found.task != "regression":
            classes = class_table(
                rows, given=found.classes, held_out_classes=found.held_out_classes, instead=found.instead
            )
        groups = tuple(row.group for row in rows if row.group is not None)
        return cls(
            name=found.name,
            ids=tuple(row.image for row in rows),
            targets=targets_of(rows, classes, found.task) if found.is_labelled else None,
            classes=classes,
            splits=np.array([row.split for row in rows], dtype="<U5"),
            groups=groups or None,
            task=found.task,
            source=found.source,
            skipped=found.skipped,
            notes=(*found.notes, *spellings, *held_out_notes(rows)),
            origin=found.origin,
        )

    @classmethod
    def from_store(cls, store: HoldsImageSets, name: str | None = None) -> ImageSet:
        """The newest image set of that name filed in a store, with everything but the images; see `with_root`."""
        return store.images(name)

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        return f"ImageSet({self.name}: {self.describe()})"

    def _repr_html_(self) -> str:
        return titled_table(repr(self), label_counts(self.targets, self.classes, self.task, self.splits))

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
            root: the folder, or an address such as ``s3://bucket/photos``. Tar shards lie in a folder as they did
                below the one that all were in.
            strip: what is cut off the paths that begin with it: of absolute ones, which lie below no root otherwise.

        Raises:
            ValueError: if there is no such folder, the images are arrays, or no path begins with `strip`.
        """
        folder = absolute(root)
        moved = self.source.moved(folder)
        if moved is None:
            raise ValueError(
                f"the images of {self.name} are arrays in memory or a data set's. Expected an image set of files for "
                "with_root. Use the set as it is, or make one of the files with ImageSet.from_folder or from_table."
            )
        existing_folder(root)
        if isinstance(moved, FolderSource):
            moved = source_below(folder, strip=moved.strip)
        origin = {**self.origin, "root": os.fspath(root)} if "root" in self.origin else {}
        if strip is not None:
            if all(without_start(image, strip) == image for image in self.ids):
                first = f" (the first is {self.ids[0]})" if self.ids else ""
                raise ValueError(
                    f"no path of {self.name} begins with {strip}{first}. Expected what is to be cut off paths. Correct "
                    "strip, or leave it out."
                )
            moved = source_below(folder, strip=strip)
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
        matters. Unlabelled images are dealt like one more class; sets of several labels or numbers, and all with
        `stratify=False`, as one. If all that leaves `valid` empty, the image of lowest rank is taken.

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
        held = self.contents.taken(self.ids[index])
        return self.source.read(self.ids[index]) if held is None else held

    @property
    def contents(self) -> Contents:
        """What has been read, and not been decoded since."""
        return self._memo.contents

    def digests(self, known: Mapping[str, KnownDigest] | None = None) -> Digests:
        """The content digest of every image: SHA-256 of the file's bytes (see `content_digest` for arrays).

        Args:
            known: digests from an image table, by id. A file whose size, times and inode are those of `known`, and
                whose times lie safely before the hash was taken, is not read again.
        """
        return self.source.digests(self.ids, self._memo, KnownDigests.of({} if known is None else known))

    def absent(self, limit: int | None = None) -> list[int]:
        """Indices of the images whose files are not there, at most `limit`; nothing is read."""
        is_absent = (index for index, image in enumerate(self.ids) if not self.source.has(image))
        return list(islice(is_absent, limit))

    def describe(self) -> str:
        """One line for people: how many images, classes, images in each split, files skipped."""
        parts = [", ".join([counted(len(self), "image"), labels_text(self.targets, self.classes, self.task)])]
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
        if self.targets is None or self.task != "single" or not stratify:
            return np.zeros(len(self), dtype=np.int64)
        return self.targets.astype(np.int64) + 1

    def _set(self, attribute: str, value: Any) -> None:
        object.__setattr__(self, attribute, value)


class HoldsImageSets(Protocol):
    """What `ImageSet.from_store` needs of a store."""

    def images(self, name: str | None = None) -> ImageSet:
        """The newest image set of that name."""


def _picked(names: tuple[str, ...], indices: NDArray[np.int64]) -> tuple[str, ...]:
    return tuple(map(names.__getitem__, indices.tolist()))  # numpy's own integers would be three times as slow
