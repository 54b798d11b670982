"""Origins: what ``--images`` may name, the image set that is made of it, and the flags that name a set again.

Another kind of images needs a class such as those here, in a file of its own, and its place in `ORIGINS`; if it takes
options that no other has, their flags as well. Or it is in another package, which names an `Origin` as an entry point
(see `plugins`); its options are then some of those that there are.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, Protocol

from featstore.images.names import IMAGE_SUFFIXES, OWN_SPLITS, SHARD, split_hinted, split_named
from featstore.objects import place_of
from featstore.plugins import SOURCES, plugged_in
from featstore.words import some

if TYPE_CHECKING:
    from featstore.images.image_set import ImageSet


class Origin(Protocol):
    """A way to make image sets, as the command line knows it."""

    @property
    def constructor(self) -> str:
        """What the `origin` of the sets that it makes has as "constructor"."""

    @property
    def metavar(self) -> str:
        """What stands for its paths in a list of flags."""

    @property
    def help(self) -> str:
        """What its paths are, in a few words after "a"."""

    @property
    def kind(self) -> str:
        """What its images are, with an article, to say what an option is for."""

    @property
    def instance(self) -> str:
        """What to name instead of something that isn't of this kind."""

    @property
    def options(self) -> tuple[str, ...]:
        """The arguments that it takes besides the path; each is a flag of the same name in `cli.flags.ImageFlags`."""

    @property
    def without_split(self) -> str:
        """What to do about a split that the images bring, to have them dealt, as the end of a sentence."""

    def is_named_by(self, path: str) -> bool:
        """Whether a path means images of this kind."""

    def make(self, path: str, options: Mapping[str, Any], *, held_out_classes: bool) -> ImageSet:
        """The image set; of `options`, at least those of this origin, each has its value or the flag's default."""

    def flags(self, images: ImageSet) -> list[str]:
        """``--images`` and the options that make this set, without what deals it; those at their default left out."""

    def own_splits(self, images: ImageSet) -> list[str] | None:
        """The split of each image that these flags give again; None where the images bring none."""

    def no_split(self, images: ImageSet, options: Mapping[str, Any]) -> str:
        """Why the images brought no split, in a few words."""

    def found_split(self, images: ImageSet, options: Mapping[str, Any]) -> str | None:
        """A sentence about the split that the images brought, if nobody named it."""

    def one_class(self, images: ImageSet, name: str) -> str:
        """Where the only class `name` of the images was read from, and what to give instead, in sentences."""

    def without_valid(self, images: ImageSet) -> str:
        """What to give instead where the held-out images can't be scored, as the end of a sentence."""


class FolderOrigin:
    """`ImageSet.from_folder`."""

    constructor = "from_folder"
    metavar = "FOLDER"
    help = "folder of class folders (below train/, valid/, test/)"
    kind = "a folder of images"
    instance = "a folder"
    options = ("top_folders",)
    without_split = "give images without a split"

    def is_named_by(self, path: str) -> bool:
        """If it is a folder."""
        return os.path.isdir(path)

    def make(self, path: str, options: Mapping[str, Any], *, held_out_classes: bool) -> ImageSet:
        """The set; errors as of `ImageSet.from_folder`."""
        from featstore.images.image_set import ImageSet  # a program's help waits for no images

        return ImageSet.from_folder(path, top_folders=options["top_folders"], held_out_classes=held_out_classes)

    def flags(self, images: ImageSet) -> list[str]:
        """The folder, and what its first folders are."""
        meant = images.origin.get("top_folders", "auto")
        return ["--images", str(images.origin["root"]), *([] if meant == "auto" else ["--top-folders", meant])]

    def own_splits(self, images: ImageSet) -> list[str] | None:
        """Those of the folders train, valid and test."""
        meant = images.origin.get("top_folders", "auto")
        if meant == "classes":
            return None
        split_of = split_hinted if meant == "splits" else split_named
        splits = [split_of(name.partition("/")[0]) or "" for name in images.ids]
        return splits if splits and all(splits) else None

    def no_split(self, images: ImageSet, options: Mapping[str, Any]) -> str:
        """That one folder is missing."""
        return "no valid/ folder"

    def found_split(self, images: ImageSet, options: Mapping[str, Any]) -> None:
        """None: whoever has folders of these names means them."""

    def one_class(self, images: ImageSet, name: str) -> str:
        """Which folders were read as the class, and which to name instead."""
        folders = [PurePosixPath(image).parent.parts for image in images.ids]
        places = {parts[: parts.index(name) + 1] for parts in folders if name in parts}
        read = [f"{'/'.join(place)}/" for place in sorted(places)]
        inside = sorted(
            {parts[len(place)] for parts in folders for place in places if parts[: len(place)] == place != parts}
        )
        root = place_of(str(images.origin["root"]))
        is_below = read != [f"{name}/"]  # in folders of splits
        told = f"Read as a class below {root}: {some(read)}"
        if len(inside) < 2:
            above = "" if is_below else "; the one above it, perhaps"
            return f"{told}. Give a folder with a folder for each class{above}."
        holds = f"{told}, which holds {some([f'{folder}/' for folder in inside])}"
        if is_below:
            return f"{holds}. If these are the classes, move them up, into the place of {name}/."
        return f"{holds}. If these are the classes, give their folder: {root / name}."

    def without_valid(self, images: ImageSet) -> str:
        """The folder of the training images alone."""
        folder = f"{images.origin['root']}/{images.train.ids[0].partition('/')[0]}"
        return f"give the training images alone, of which some are then held out: --images {folder}"


_TABLE_DEFAULTS = {
    "root": None,
    "path_column": "path",
    "label_column": "label",
    "label_sep": None,
    "one_hot": None,
    "split_column": OWN_SPLITS,
    "valid_column": None,
    "group_column": None,
    "task": "single",
    "suffix": None,
    "strip": None,
}


class TableOrigin:
    """`ImageSet.from_table`."""

    constructor = "from_table"
    metavar = "FILE.csv|FILE.tsv|FILE.parquet"
    help = "table"
    kind = "a table of images"
    instance = "a .csv, .tsv or .parquet file"
    options = tuple(_TABLE_DEFAULTS)
    without_split = "leave the table's column aside with --split-column ''"

    def is_named_by(self, path: str) -> bool:
        """If it is a file, or would be a table by its suffix."""
        is_table = path.lower().endswith((".csv", ".tsv", ".parquet"))
        return not os.path.isdir(path) and (is_table or os.path.isfile(path))

    def make(self, path: str, options: Mapping[str, Any], *, held_out_classes: bool) -> ImageSet:
        """The set; errors as of `ImageSet.from_table`."""
        from featstore.images.image_set import ImageSet

        given = {name: options[name] for name in self.options}
        if given["task"] == "regression":
            given["label_column"] = _from_cells(given["label_column"])
        if given["one_hot"] not in (None, "*"):
            given["one_hot"] = _from_cells(given["one_hot"])
        given |= {"label_column": given["label_column"] or None, "held_out_classes": held_out_classes}
        return ImageSet.from_table(path, **given)

    def flags(self, images: ImageSet) -> list[str]:
        """The table, and what it is read by."""
        return _flags(images, _TABLE_DEFAULTS)

    def own_splits(self, images: ImageSet) -> list[str] | None:
        """Those of the table's column."""
        is_split = images.origin["split_column"] or images.origin.get("valid_column")
        return images.splits.tolist() if is_split else None

    def no_split(self, images: ImageSet, options: Mapping[str, Any]) -> str:
        """What the table lacks, or was told to leave aside."""
        column = images.origin["split_column"]
        if column is None:
            return "no split column"
        return f"the column {column} is empty" if options["split_column"] is None else "no split column is used"

    def found_split(self, images: ImageSet, options: Mapping[str, Any]) -> str | None:
        """Which column was found."""
        column = images.origin["split_column"]
        if column is None or options["split_column"] is not None:
            return None
        from featstore.images.labels import split_counts

        return f"split by the table's column {column}: {split_counts(images.splits)} (to deal anew: --split-column '')"

    def one_class(self, images: ImageSet, name: str) -> str:
        """That the labels must differ."""
        return TWO_VALUES

    def without_valid(self, images: ImageSet) -> str:
        """That the column of splits may be left aside."""
        return "deal the labelled images anew: --split-column ''"


_SHARD_DEFAULTS = {
    "label_column": "label",
    "label_sep": None,
    "split_column": SHARD,
    "group_column": None,
    "task": "single",
}
_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")


class TarOrigin:
    """`ImageSet.from_tar`."""

    constructor = "from_tar"
    metavar = "SHARDS.tar"
    help = "tar file of samples as WebDataset writes them, several by {000..003}, * or their folder"
    kind = "a set of tar files"
    instance = "a .tar file"
    options = tuple(_SHARD_DEFAULTS)
    without_split = "leave what the samples say aside with --split-column ''"

    def is_named_by(self, path: str) -> bool:
        """If it ends with .tar, or is a folder of such files and nothing else that may be images."""
        if os.path.isdir(path):
            with os.scandir(path) as entries:
                shown = [entry for entry in entries if not entry.name.startswith(".")]
            return any(entry.name.endswith(".tar") for entry in shown) and not any(
                entry.is_dir() or entry.name.lower().endswith(IMAGE_SUFFIXES) for entry in shown
            )
        return path.lower().endswith((".tar", *_COMPRESSED))  # compressed ones are refused in words

    def make(self, path: str, options: Mapping[str, Any], *, held_out_classes: bool) -> ImageSet:
        """The set; errors as of `ImageSet.from_tar`."""
        from featstore.images.image_set import ImageSet

        given = {name: options[name] for name in self.options}
        if given["task"] == "regression":
            given["label_column"] = _from_cells(given["label_column"])
        given |= {"label_column": given["label_column"] or None, "held_out_classes": held_out_classes}
        return ImageSet.from_tar(path, **given)

    def flags(self, images: ImageSet) -> list[str]:
        """The shards, and what of the samples is read."""
        return _flags(images, _SHARD_DEFAULTS)

    def own_splits(self, images: ImageSet) -> list[str] | None:
        """Those of the shards' names, or of the samples."""
        return images.splits.tolist() if images.origin["split_column"] else None

    def no_split(self, images: ImageSet, options: Mapping[str, Any]) -> str:
        """That neither shards nor samples say one."""
        return "no split in the shards' names"

    def found_split(self, images: ImageSet, options: Mapping[str, Any]) -> str | None:
        """That the shards' names were read, or which column of the samples."""
        column = images.origin["split_column"]
        if not column or options["split_column"] is not None:
            return None
        from featstore.images.labels import split_counts

        what = "the shards' names" if column == SHARD else f"the samples' {column}"
        return f"split by {what}: {split_counts(images.splits)} (to deal anew: --split-column '')"

    def one_class(self, images: ImageSet, name: str) -> str:
        """That the labels must differ."""
        return TWO_VALUES

    def without_valid(self, images: ImageSet) -> str:
        """That the split may be left aside."""
        return "deal the labelled images anew: --split-column ''"


def _flags(images: ImageSet, defaults: Mapping[str, Any]) -> list[str]:
    """``--images`` and the arguments of a constructor that aren't at their defaults."""
    flags = ["--images", str(images.origin["path"])]
    for name, default in defaults.items():
        value = images.origin.get(name)
        if name == "label_column" and value is not None and images.task == "regression":
            value = list(images.classes)
        if isinstance(value, list):
            value = as_cells(value)
        if name == "label_column" and value is None:
            value = ""  # nothing is labelled
        if value is not None and value != default:
            flags += [f"--{name.replace('_', '-')}", str(value)]
    return flags


def as_cells(names: list[str]) -> str:
    """Names between commas, quoted where they hold one, as ``--label-column`` and ``--one-hot`` take them."""
    stream = io.StringIO()
    csv.writer(stream, lineterminator="").writerow(names)
    return stream.getvalue()


def _from_cells(text: str) -> list[str]:
    return next(csv.reader([text], skipinitialspace=True), [])


TWO_VALUES = "Give labels with two different values."
"""What to do about images of one class, where nothing more is known of them."""

FOLDER = FolderOrigin()
ORIGINS: tuple[Origin, ...] = (FOLDER, TableOrigin(), TarOrigin())
"""featstore's own kinds of images; of two that a path may mean, the later one counts."""


def named_by(path: str) -> Origin:
    """The origin that a path means; of one that means none, a folder, which says what is wrong with it.

    What installed packages bring (see `plugins`) may mean a folder as well, and is then meant.
    """
    own = next((origin for origin in reversed(ORIGINS) if origin.is_named_by(path)), FOLDER)
    return own if own is not FOLDER else next((each for each in _plugged_in() if each.is_named_by(path)), FOLDER)


def made_by(images: ImageSet) -> Origin | None:
    """The origin that made this set, or the one it was selected from; None for what was made in Python."""
    constructor = images.origin.get("constructor")
    if constructor is None:
        return None
    return next((each for each in chain(ORIGINS, _plugged_in()) if each.constructor == constructor), None)


def _plugged_in() -> Iterator[Origin]:
    for plugin in plugged_in(SOURCES).values():
        yield plugin.value
