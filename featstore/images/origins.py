"""Origins: what ``--images`` may name, the image set that is made of it, and the flags that name a set again.

Another kind of images needs a class such as those here, in a file of its own, and its place in `ORIGINS`; if it takes
options that no other has, their flags as well.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

from featstore.images.csv_tables import OWN_SPLITS
from featstore.images.labels import split_counts, split_hinted, split_named

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
    """`ImageSet.from_csv`."""

    constructor = "from_csv"
    metavar = "FILE.csv|FILE.tsv"
    help = "table"
    kind = "a table of images"
    instance = "a .csv or .tsv file"
    options = tuple(_TABLE_DEFAULTS)
    without_split = "leave the table's column aside with --split-column ''"

    def is_named_by(self, path: str) -> bool:
        """If it is a file, or would be a table by its suffix."""
        return not os.path.isdir(path) and (path.lower().endswith((".csv", ".tsv")) or os.path.isfile(path))

    def make(self, path: str, options: Mapping[str, Any], *, held_out_classes: bool) -> ImageSet:
        """The set; errors as of `ImageSet.from_csv`."""
        from featstore.images.image_set import ImageSet

        given = {name: options[name] for name in self.options}
        if given["one_hot"] not in (None, "*"):
            given["one_hot"] = next(csv.reader([given["one_hot"]], skipinitialspace=True), [])
        given |= {"label_column": given["label_column"] or None, "held_out_classes": held_out_classes}
        return ImageSet.from_csv(path, **given)

    def flags(self, images: ImageSet) -> list[str]:
        """The table, and what it is read by."""
        flags = ["--images", str(images.origin["path"])]
        for name, default in _TABLE_DEFAULTS.items():
            value = images.origin.get(name)
            if isinstance(value, list):
                value = _as_cells(value)
            if name == "label_column" and value is None:
                value = ""  # nothing is labelled
            if value is not None and value != default:
                flags += [f"--{name.replace('_', '-')}", str(value)]
        return flags

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
        return f"split by the table's column {column}: {split_counts(images.splits)} (to deal anew: --split-column '')"


def _as_cells(names: list[str]) -> str:
    """Names between commas, quoted where they hold one."""
    stream = io.StringIO()
    csv.writer(stream, lineterminator="").writerow(names)
    return stream.getvalue()


FOLDER = FolderOrigin()
ORIGINS: tuple[Origin, ...] = (FOLDER, TableOrigin())
"""All kinds of images that the programs know."""


def named_by(path: str) -> Origin:
    """The origin that a path means; of one that means none, a folder, which says what is wrong with it."""
    return next((origin for origin in ORIGINS if origin.is_named_by(path)), FOLDER)


def made_by(images: ImageSet) -> Origin | None:
    """The origin that made this set, or the one it was selected from; None for what was made in Python."""
    constructor = images.origin.get("constructor")
    return next((origin for origin in ORIGINS if origin.constructor == constructor), None)
