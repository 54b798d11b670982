"""Folders: what an image folder's listing means, its classes, splits and what is left out."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import PurePosixPath
from typing import NamedTuple

from featstore.errors import FeatureStoreError
from featstore.images.labels import Row
from featstore.images.names import IMAGE_SUFFIXES, SPLITS, TopFolders, split_hinted, split_named
from featstore.objects import ObjectPath, facts_below, place_of
from featstore.words import counted, listed

StrPath = str | os.PathLike[str]


def absolute(root: StrPath) -> str:
    """The absolute path of a folder, or the address of objects."""
    place = place_of(os.fspath(root))
    return str(place) if isinstance(place, ObjectPath) else os.path.abspath(place)


def check_is_here(path: StrPath, what: str) -> None:
    """ValueError for an address of objects where `what` is read from files of this machine alone."""
    if isinstance(place_of(os.fspath(path)), ObjectPath):
        raise ValueError(
            f"{os.fspath(path)} lies in an object store, from where {what} can't be read. Expected a file of this "
            "machine. Copy it here."
        )


def existing_folder(root: StrPath) -> str:
    """The absolute path of a folder, or the address of objects; `ValueError` if there is none."""
    folder = absolute(root)
    place = place_of(folder)
    if isinstance(place, ObjectPath):
        if not place.is_dir():
            raise ValueError(f"There are no objects below {place}. Expected a prefix of images. Correct the address.")
    elif not os.path.isdir(folder):
        is_file = os.path.exists(folder)
        raise ValueError(
            f"{os.fspath(root)} is {'a file' if is_file else 'not there'} (looked for {folder}). Expected a folder of "
            f"images. {'For a table of images use ImageSet.from_csv.' if is_file else 'Correct the path.'}"
        )
    return folder


def folder_rows(folder: str, top_folders: TopFolders) -> tuple[list[Row], tuple[tuple[str, str], ...], tuple[str, ...]]:
    """A row for each image below `folder`, sorted by path; what is left out; notes. See `ImageSet.from_folder`."""
    place = place_of(folder)
    listing = _without_stores(_list_objects(place) if isinstance(place, ObjectPath) else _list(folder))
    split_of = _split_folders(listing, folder, top_folders)
    rows, beside = _arrange(listing, folder, split_of)
    notes = _split_notes(split_of) + _one_class_notes(rows, folder, 2 if split_of else 1)
    return rows, tuple(sorted(listing.skipped + beside)), tuple(notes)


class _Listing(NamedTuple):
    """Paths below a folder, with `/`, in no order."""

    images: list[str]
    folders: list[str]
    skipped: list[tuple[str, str]]


_Identity = tuple[int, int]  # device and inode
_STORE_FILE = re.compile(
    r"(?P<folder>((?P<store>.+)/)?(images(?=/[^/]+-[0-9a-f]{8}\.h5)|[^/]+@[^/]+(?=/[^/]+/part-[0-9a-f]{16}\.h5)))/.+",
    re.DOTALL,
)  # an image table or a part, see docs/format.md
_STORE, _OF_STORE = "a feature store", "of a feature store"
_NO_IMAGE = "not an image by its suffix"
_LITTER = ("__macosx", "thumbs.db", "desktop.ini")


def _list(folder: str) -> _Listing:
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
                    elif _is_folder(entry):
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


def _list_objects(place: ObjectPath) -> _Listing:
    """Everything below a prefix, whose folders are what names have before their last part."""
    folders, images, skipped = set(), [], {}
    for name in facts_below(place):
        parts = name.split("/")
        hidden = next((at for at, part in enumerate(parts) if _is_hidden(part)), len(parts))
        folders |= {"/".join(parts[:end]) for end in range(1, min(hidden + 1, len(parts)))}
        if hidden < len(parts):
            skipped["/".join(parts[: hidden + 1])] = "hidden"
        elif name.lower().endswith(IMAGE_SUFFIXES):
            images.append(name)
        else:
            skipped[name] = _NO_IMAGE
    return _Listing(images, sorted(folders), [each for each in skipped.items() if each[0] not in folders])


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


def _arrange(listing: _Listing, folder: str, split_of: dict[str, str]) -> tuple[list[Row], list[tuple[str, str]]]:
    """A row for each image with its class and split, sorted by path; and what lies beside the folders."""
    if not listing.images:
        raise ValueError(_nothing_found(listing, folder))
    tops = _top_folders(listing)
    rows, beside = [], []
    for image in sorted(listing.images):
        above = image.split("/")[:-1]
        if tops and not above:
            beside.append((image, f"lies beside the {'split' if split_of else 'class'} folders"))
        elif split_of and above[0] not in split_of:
            beside.append((image, "in no split folder"))
        elif split_of:
            rows.append(Row(image, tuple(above[1:2]), split_of[above[0]], None, image))
        else:
            rows.append(Row(image, tuple(above[:1]), "", None, image))
    levels = 2 if split_of else 1
    used = [path for path in listing.folders if not split_of or path.partition("/")[0] in split_of]
    _check_filled((path for path in used if path.count("/") < levels), rows, folder)
    return rows, beside


def _reason_to_skip(entry: os.DirEntry[str], above: tuple[_Identity, ...]) -> str | None:
    if _is_hidden(entry.name):
        return "hidden"
    if _is_folder(entry):
        return "links back to a folder above it" if _identity(entry.stat()) in above else None
    if not entry.name.lower().endswith(IMAGE_SUFFIXES):
        return _NO_IMAGE
    # A link to nothing counts as an image: its absence must be reported by whoever reads it, not swallowed here.
    return None if entry.is_symlink() or entry.is_file() else "not a file"


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name.lower() in _LITTER


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether it is one, or leads to one; a link that leads round in a circle, or nowhere, is none."""
    try:
        return entry.is_dir()
    except OSError:
        if entry.is_symlink():
            return False
        raise


def _identity(facts: os.stat_result) -> _Identity:
    return facts.st_dev, facts.st_ino


def _top_folders(listing: _Listing) -> list[str]:
    return sorted(path for path in listing.folders if "/" not in path)


def _split_folders(listing: _Listing, folder: str, top_folders: TopFolders) -> dict[str, str]:
    """The split of each top folder, if these folders are splits; else nothing."""
    tops = _top_folders(listing)
    named = {top: split for top in tops if (split := split_named(top)) is not None}
    if top_folders == "classes":
        return {}
    if top_folders == "splits":
        named = {top: split for top in tops if (split := split_hinted(top)) is not None}
        if not named:
            raise ValueError(
                f"{folder} has no folder for a split: {listed(tops) or 'no folders at all'}. Expected train, valid (or "
                "val) and test. Rename them, or leave out --top-folders splits (in Python: top_folders)."
            )
    elif len(named) < len(tops):
        if _is_mixture(tops, named, listing):
            raise ValueError(_both_readings(tops, folder))
        return {}
    _check_one_each(named, folder)
    return named


def _is_mixture(tops: list[str], named: dict[str, str], listing: _Listing) -> bool:
    """Whether some of the top folders may well be splits, though others are called otherwise.

    One name alone may be a class (`train` beside `bus`), unless there are folders below, as classes are in splits.
    """
    hinted = {top: split for top in tops if (split := split_hinted(top)) is not None}
    has_folders = {path.partition("/")[0] for path in listing.folders if "/" in path}
    return (
        len(named) > 1
        or any(top in has_folders for top in named)
        or len(hinted) == len(tops) > 1
        or (len(set(hinted.values())) > 1 and all(top in has_folders for top in hinted))
    )


def _both_readings(tops: list[str], folder: str) -> str:
    hinted = {top: split_hinted(top) for top in tops}
    splits = ", ".join(f"{top} is {split}" for top, split in hinted.items() if split is not None)
    others = [top for top, split in hinted.items() if split is None]
    return (
        f"{folder} has folders called as splits are, and they can be read in two ways: as "
        f"{counted(len(tops), 'class')} ({listed(tops)}), or as splits with the classes below ({splits}"
        f"{f'; {listed(others)} left out' if others else ''}). Expected only folders for splits (train, valid, test), "
        "or only folders for classes. Rename or move some, or say which is meant: --top-folders classes or "
        "--top-folders splits (in Python: top_folders='classes' or 'splits')."
    )


def _check_one_each(split_of: dict[str, str], folder: str) -> None:
    for split, number in Counter(split_of.values()).items():
        if number > 1:
            same = " and ".join(sorted(top for top in split_of if split_of[top] == split))
            raise ValueError(
                f"{folder} has {number} folders for split {split}: {same}. "
                "Expected one. Merge them, or rename the one that is not meant."
            )


def _split_notes(split_of: dict[str, str]) -> list[str]:
    """Which folder is which split, where a name is not the split's own."""
    unusual = [f"{top} is {split}" for top, split in split_of.items() if top.lower() not in (*SPLITS, "val")]
    return [f"folders read as splits: {', '.join(unusual)}"] if unusual else []


def _one_class_notes(rows: list[Row], folder: str, depth: int) -> list[str]:
    """Which folder was read as the only class, and what may have been meant; `depth` folders lead to an image of it."""
    classes = {label for row in rows for label in row.labels}
    if len(classes) != 1:
        return []
    paths = [row.image.split("/")[:-1] for row in rows if row.labels]
    below = sorted({path[depth] for path in paths if len(path) > depth})
    (name,) = classes
    meant = f"if the folder named is a class itself, name the one above it: {os.path.dirname(folder)}"
    if len(below) > 1:
        deeper = f"name the folder above them: {os.path.join(folder, name)}" if depth == 1 else "move them up one level"
        meant = f"if the folders below it ({listed(below)}) are the classes, {deeper}"
    return [f"only one class was found, the folder {name!r}, of {counted(len(paths), 'image')}; {meant}"]


def _check_filled(folders: Iterable[str], rows: list[Row], folder: str) -> None:
    filled = {part for row in rows for part in _folders_above(row.image)}
    empty = sorted(set(folders) - filled)
    if empty:
        raise ValueError(
            f"{listed(empty)} below {folder} {'holds' if len(empty) == 1 else 'hold'} no images. Expected an image "
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
        counted(len(listing.folders), "folder") + (f" ({listed(sorted(listing.folders))})" if listing.folders else ""),
        counted(len(others), "other file") + (f" ({listed(others)})" if others else ""),
    ]
    return (
        f"{folder} holds no images: found {' and '.join(found)}. Expected files that end with "
        f"{', '.join(IMAGE_SUFFIXES)}. Put images there, or name another folder."
    )
