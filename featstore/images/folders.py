"""Folders: what an image folder's listing means, its classes, splits and what is left out."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import PurePosixPath
from typing import NamedTuple

from featstore.errors import FeatureStoreError
from featstore.images.labels import SPLIT_WORDS, Row
from featstore.words import counted, listed

IMAGE_SUFFIXES = (".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
"""What a file's name must end with, in any case, to count as an image of a folder. A table names its files itself."""

StrPath = str | os.PathLike[str]


def existing_folder(root: StrPath) -> str:
    """The absolute path of a folder; `ValueError` if there is none."""
    folder = os.path.abspath(root)
    if not os.path.isdir(folder):
        is_file = os.path.exists(folder)
        raise ValueError(
            f"{os.fspath(root)} is {'a file' if is_file else 'not there'} (looked for {folder}). Expected a folder of "
            f"images. {'For a table of images use ImageSet.from_csv.' if is_file else 'Correct the path.'}"
        )
    return folder


def folder_rows(folder: str) -> tuple[list[Row], tuple[tuple[str, str], ...]]:
    """A row for each image below `folder`, sorted by path, and what is left out, see `ImageSet.from_folder`."""
    listing = _without_stores(_list(folder))
    rows, beside = _arrange(listing, folder)
    return rows, tuple(sorted(listing.skipped + beside))


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


def _arrange(listing: _Listing, folder: str) -> tuple[list[Row], list[tuple[str, str]]]:
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
            rows.append(Row(image, tuple(above[1:2]), split_of[above[0]], None, image))
        else:
            rows.append(Row(image, tuple(above[:1]), "", None, image))
    levels = 2 if split_of else 1
    _check_filled((path for path in listing.folders if path.count("/") < levels), rows, folder)
    return rows, beside


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


def _split_folders(tops: list[str], folder: str) -> dict[str, str]:
    """The split of each top folder, if these folders are splits; else nothing."""
    words = {top.lower() for top in tops}
    if "train" not in words or not words <= set(SPLIT_WORDS):
        return {}
    split_of = {top: SPLIT_WORDS[top.lower()] for top in tops}
    for split, number in Counter(split_of.values()).items():
        if number > 1:
            same = " and ".join(sorted(top for top in tops if split_of[top] == split))
            raise ValueError(
                f"{folder} has {number} folders for split {split}: {same}. "
                "Expected one. Merge them, or rename the one that is not meant."
            )
    return split_of


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
