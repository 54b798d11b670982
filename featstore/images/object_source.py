"""Object source: images in an object store, found by one listing and read whole."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass
from functools import partial

import numpy as np

from featstore.errors import ImageError
from featstore.images.digests import Contents, Digests, KnownDigests, Memo, StatFacts, stat_rows
from featstore.images.hashing import NO_FACTS, check_file_size, file_digests, in_threads
from featstore.images.sources import FolderSource, ImageSource, without_start
from featstore.objects import ObjectFacts, ObjectPath, facts_below, place_of, whole


@dataclass(frozen=True, kw_only=True)
class ObjectSource:
    """Images below an address such as ``s3://bucket/photos``; an id is what an object's name has behind that.

    Attributes:
        root: the address.
        strip: what is cut off ids that begin with it; None: nothing.
    """

    root: str
    strip: str | None = None

    absence = None
    known = KnownDigests()

    def read(self, image: str) -> bytes:
        """The object's bytes; `ImageError` if there is none, or it can't be read."""
        return self._got(image)[0]

    def digests(self, ids: tuple[str, ...], memo: Memo, known: KnownDigests) -> Digests:
        """The objects' digests; one is read only if none is known of an object of this size, time and tag."""
        there = facts_below(self._place)
        facts = [there.get(self._name(image)) for image in ids]
        now = stat_rows([None if each is None else _as_of_file(each, hashed_at_ns=0) for each in facts])
        return file_digests(ids, now, partial(self._take, memo.contents), memo, known)

    def has(self, image: str) -> bool:
        """Whether the object is there."""
        try:
            return (self._place / self._name(image)).exists()
        except ValueError:  # an absolute path
            return False

    def moved(self, root: str) -> ImageSource | None:
        """The images of the same names below `root`, an address or a folder; None of those in this process's memory."""
        return None if self.root.startswith("memory:") else source_below(root, strip=self.strip)

    @property
    def _place(self) -> ObjectPath:
        place = place_of(self.root)
        assert isinstance(place, ObjectPath)
        return place

    def _name(self, image: str) -> str:
        return image if self.strip is None else without_start(image, self.strip)

    def _got(self, image: str) -> tuple[bytes, ObjectFacts]:
        try:
            return whole(self._place / self._name(image), check_file_size)
        except FileNotFoundError as error:
            raise ImageError(
                image,
                f"there is no such object below {self.root}; give the images' address or folder with --root (in "
                "Python: images.with_root(...))",
            ) from error
        except (OSError, ValueError) as error:
            raise ImageError(
                image, f"the object can't be read ({getattr(error, 'strerror', None) or error})"
            ) from error

    def _take(self, contents: Contents, ids: tuple[str, ...]) -> Digests:
        taken, failed = in_threads(partial(self._hash, contents), ids, otherwise=bytes(32) + NO_FACTS)
        values, stats = np.ascontiguousarray(taken[:, :32]), np.ascontiguousarray(taken[:, 32:])
        return Digests(values=values, failed=failed, stats=stats.view(np.int64))

    def _hash(self, contents: Contents, image: str) -> bytes:
        hashed_at_ns = time.time_ns()
        content, facts = self._got(image)
        contents.keep(image, content)
        return hashlib.sha256(content).digest() + stat_rows([_as_of_file(facts, hashed_at_ns)]).tobytes()


def source_below(root: str, strip: str | None = None) -> ImageSource:
    """The source of images below an absolute folder, or below an address."""
    if isinstance(place_of(root), ObjectPath):
        return ObjectSource(root=root, strip=strip)
    return FolderSource(root=root, strip=strip)


def _as_of_file(facts: ObjectFacts, hashed_at_ns: int) -> StatFacts:
    """The facts of an object in the words of a file system: the tag is its inode.

    Its inode has a time of its own, a nanosecond later, since other content has another tag: see `hashing`.
    """
    tag = int.from_bytes(hashlib.sha256(facts.tag.encode()).digest()[:8], "big")
    put_ns = facts.when * 1_000_000_000
    return StatFacts(facts.size, put_ns, put_ns + bool(facts.tag), tag, hashed_at_ns)
