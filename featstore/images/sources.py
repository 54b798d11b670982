"""Image sources: how the bytes of the images of a set are had."""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import stat
import time
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from featstore.errors import ImageError
from featstore.images.digests import (
    Digests,
    KnownDigest,
    KnownDigests,
    Memo,
    content_digest,
    no_stats,
)
from featstore.images.hashing import (
    MOST_BYTES_AT_ONCE,
    NO_FACTS,
    check_file_size,
    completed,
    facts_of,
    file_digests,
    in_threads,
    let_writes_show,
    packed,
)


class ImageSource(Protocol):
    """How the bytes and the digests of the images of a set are had, by id; whoever has such an object can make a set.

    Sets, stores and programs ask nothing else of one. It pickles and holds no open file; its methods are called from
    many threads. An image table files the digests alone, with the facts of files where there are any, so that a set
    that comes back from a store knows nothing of the source that it had.
    """

    @property
    def absence(self) -> str | None:
        """Why none of the images is to be had, as the end of a sentence; None where they are, as far as one knows."""

    @property
    def known(self) -> Mapping[str, KnownDigest]:
        """Digests that came with the source, of images whose files may be found in another place."""

    def read(self, image: str) -> bytes | NDArray[np.uint8]:
        """The encoded bytes, or the `(H, W[, 3])` array; `ImageError` if the image can't be had."""

    def digests(self, ids: tuple[str, ...], memo: Memo, known: KnownDigests) -> Digests:
        """The content digest of each image, with the reason where there is none.

        Args:
            ids: the images.
            memo: what this process has learned of them; gets what is trusted or taken.
            known: digests from image tables.
        """

    def has(self, image: str) -> bool:
        """Whether the image is there; nothing is read."""

    def moved(self, root: str) -> ImageSource | None:
        """The source of the same images below the absolute folder `root`; None where they lie in memory."""


@dataclass(frozen=True, kw_only=True)
class FolderSource:
    """Image files below an absolute folder; an id is a path below it, or an absolute path of its own.

    Attributes:
        root: the folder.
        strip: what is cut off ids that begin with it, which then lie below `root`; None: nothing.
    """

    root: str
    strip: str | None = None

    absence = None  # whether a file is there shows when it is looked for
    known = KnownDigests()  # files in another place are others

    def read(self, image: str) -> bytes:
        """The file's bytes; `ImageError` if there is none, or it can't be read."""
        try:
            path, facts = self._found(image)
            check_file_size(facts.st_size)
            with open(path, "rb") as file:
                return file.read()
        except (OSError, ValueError) as error:
            raise ImageError(image, self._reason(image, error)) from error

    def digests(self, ids: tuple[str, ...], memo: Memo, known: KnownDigests) -> Digests:
        """The files' digests; a file is read only if neither `memo` nor `known` has one that is certain still to hold.

        `memo` gets what is trusted or taken.
        """
        looked, _ = in_threads(self._look, ids, otherwise=NO_FACTS)
        return file_digests(ids, looked.view(np.int64), self._take, memo, known)

    def has(self, image: str) -> bool:
        """Whether the file is there."""
        try:
            self._found(image)
        except (OSError, ValueError):
            return False
        return True

    def moved(self, root: str) -> FolderSource:
        """The files of the same paths below `root`; those with an absolute path of their own stay."""
        return FolderSource(root=root, strip=self.strip)

    def _look(self, image: str) -> bytes:
        try:
            _, facts = self._found(image)
            return packed(facts, hashed_at_ns=0)
        except (OSError, ValueError) as error:
            raise ImageError(image, self._reason(image, error)) from error

    def _take(self, ids: tuple[str, ...]) -> Digests:
        taken, failed = in_threads(self._hash, ids, otherwise=bytes(32) + NO_FACTS)
        values, stats = np.ascontiguousarray(taken[:, :32]), np.ascontiguousarray(taken[:, 32:])
        return Digests(values=values, failed=failed, stats=stats.view(np.int64))

    def _hash(self, image: str) -> bytes:
        """Digest and facts of a file."""
        try:
            path, facts = self._found(image)
            check_file_size(facts.st_size)
            hashed_at_ns = time.time_ns()
            with open(path, "rb", buffering=0) as file:
                let_writes_show(file.fileno())
                before = os.fstat(file.fileno())
                if before.st_size <= MOST_BYTES_AT_ONCE:
                    value = hashlib.sha256(file.read()).digest()
                else:
                    value = hashlib.file_digest(file, "sha256").digest()
                after = os.fstat(file.fileno())
        except (OSError, ValueError) as error:
            raise ImageError(image, self._reason(image, error)) from error
        if facts_of(before) != facts_of(after):
            raise ImageError(image, "the file changed while it was read; wait until it is written, then run again")
        return value + packed(after, hashed_at_ns)

    def _found(self, image: str) -> tuple[str, os.stat_result]:
        """The path of an image's file, maybe in another Unicode spelling than the id, and the facts of it."""
        image = image if self.strip is None else without_start(image, self.strip)
        path = os.path.join(self.root, image)
        try:
            facts = os.stat(path)
        except (FileNotFoundError, NotADirectoryError):
            other = None if image.isascii() else self._spelled_otherwise(image)
            if other is None:
                raise
            path, facts = other, os.stat(other)
        if not stat.S_ISREG(facts.st_mode):  # opening a pipe would wait for ever
            raise ValueError("it is not a file")
        return path, facts

    def _spelled_otherwise(self, image: str) -> str | None:
        """The path of an image whose folders and file are written in NFC or NFD, each by itself."""
        path = "/" if image.startswith("/") else self.root
        for part in filter(None, image.split("/")):
            forms = (part, unicodedata.normalize("NFC", part), unicodedata.normalize("NFD", part))
            there = (os.path.join(path, form) for form in forms)
            found = next((each for each in there if os.path.lexists(each)), None)
            if found is None:
                return None
            path = found
        return path

    def _reason(self, image: str, error: Exception) -> str:
        if isinstance(error, FileNotFoundError | NotADirectoryError):
            if is_absolute(image) and self.strip is None:
                return f"there is no such file; {moved_remedy([image])}"
            return (
                f"there is no such file in {self.root}; give the images' folder with --root (in Python: "
                "images.with_root(...))"
            )
        return f"the file can't be read ({getattr(error, 'strerror', None) or error})"


def without_start(image: str, start: str) -> str:
    """A path without the folders that it begins with; as it is, if it doesn't.

    >>> without_start("/data/photos/cat/1.jpg", "/data/photos"), without_start("C:/photos/1.jpg", "C:/photos/")
    ('cat/1.jpg', '1.jpg')
    """
    before = start.replace("\\", "/").rstrip("/") + "/"
    return image.removeprefix(before).lstrip("/") if image.startswith(before) else image


def is_absolute(image: str) -> bool:
    """Whether an id is a path of its own, here or on Windows."""
    return re.match(r"([A-Za-z]:)?/", image) is not None


def moved_remedy(images: Sequence[str]) -> str:
    """What to do about files with absolute paths that aren't there, as the end of a sentence."""
    folders = {image.rpartition("/")[0] or "/" for image in images}
    drives = {folder.partition("/")[0] for folder in folders}
    start = os.path.commonpath(sorted(folders)) if len(drives) == 1 else sorted(folders)[0]
    return (
        "if the files were moved, say what to cut off their absolute paths and where they are now: "
        f"--strip {shlex.quote(start)} --root DIR (in Python: images.with_root(DIR, strip={start!r}))"
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class ArraySource:
    """Images in one read-only array `(N, H, W[, 3])` uint8; an id is an index.

    Attributes:
        images: the array.
        is_own: nobody else has it, so it never changes. The file of a mapped one may be written to.
    """

    images: NDArray[np.uint8]
    is_own: bool = False

    @classmethod
    def of(cls, images: NDArray[np.uint8]) -> ArraySource:
        """The source of `images`; of a copy, unless nobody can write to them.

        Raises:
            TypeError: for anything but a uint8 array.
            ValueError: for another shape.
        """
        array = _checked_images(images)
        return cls(images=array, is_own=array is not images)

    absence = None  # arrays are here
    known = KnownDigests()

    def read(self, image: str) -> NDArray[np.uint8]:
        """The `(H, W[, 3])` array, not to be written to."""
        array = np.asarray(self.images[int(image)])
        array.flags.writeable = False  # of this view: pickle forgets that the whole is read-only
        return array

    def digests(self, ids: tuple[str, ...], memo: Memo, known: KnownDigests) -> Digests:
        """The arrays' digests. A table's are not trusted: nothing says that its image 7 was this one."""
        if not self.is_own:
            memo = Memo()
        return completed(ids, memo.taken.find(ids), self._take, memo)

    def has(self, image: str) -> bool:
        """True: arrays are here."""
        return True

    def moved(self, root: str) -> None:
        """None: no file holds them."""

    def _take(self, ids: tuple[str, ...]) -> Digests:
        values, failed = in_threads(lambda image: content_digest(self.read(image)), ids, otherwise=bytes(32))
        return Digests(values=values, failed=failed, stats=no_stats(len(ids)))


@dataclass(frozen=True, kw_only=True, eq=False)
class AbsentSource:
    """Images of which only the digests are here: a set that came from a store without its images.

    Attributes:
        where: the image table, for messages.
        known: what the table says of each id; best as `KnownDigests`, which need no object for an image.
    """

    where: str
    known: Mapping[str, KnownDigest] = field(default_factory=KnownDigests)

    @property
    def absence(self) -> str | None:
        """Where the set came from."""
        return f"this image set came from a store ({self.where}), which has none"

    def read(self, image: str) -> bytes:
        """Nothing: `ImageError`."""
        raise ImageError(
            image,
            f"this image set came from a store ({self.where}), which has no images; "
            "give their folder with --root (in Python: images.with_root(...))",
        )

    def digests(self, ids: tuple[str, ...], memo: Memo, known: KnownDigests) -> Digests:
        """The digests that were filed with them. No other table is trusted: its images of these ids may be others."""
        found = KnownDigests.of(self.known).find(ids)
        reason = f"{self.where} has no digest of it; give its folder with --root (in Python: images.with_root(...))"
        failed = dict.fromkeys(np.flatnonzero(~found.is_known).tolist(), reason)
        return Digests(values=found.values, failed=failed, stats=found.stats)

    def has(self, image: str) -> bool:
        """False: the images are elsewhere."""
        return False

    def moved(self, root: str) -> FolderSource:
        """The files below `root`, which are those of the table if their facts still are."""
        return FolderSource(root=root)


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
