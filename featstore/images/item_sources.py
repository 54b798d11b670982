"""Item sources: images that objects of Python hold or give: data sets by their places, and what lies in memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featstore.errors import ImageError
from featstore.images.digests import Digests, KnownDigests, Memo, content_digest, no_stats
from featstore.images.hashing import completed, in_threads
from featstore.words import printable

Content = bytes | NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True, eq=False)
class DatasetSource:
    """Images that data sets give by their places; these may be no good in threads, so one item is read at a time.

    Attributes:
        parts: the data sets, one after the other.
        ids: of all their items.
        column: of the image where items are mappings.
    """

    parts: tuple[Any, ...]
    ids: tuple[str, ...]
    column: str | None = None
    _lock: Any = field(default_factory=Lock, repr=False)

    absence = None  # data sets are here
    known = KnownDigests()

    def read(self, image: str) -> Content:
        """The encoded bytes, or the array; `ImageError` where the data set raises, or gives something else."""
        place, number = self._row_of[image], 0
        while place >= len(self.parts[number]):
            place, number = place - len(self.parts[number]), number + 1
        try:
            with self._lock:
                item = self.parts[number][place]
            return content_of(image_of(item, self.column))
        except MemoryError:
            raise
        except Exception as error:  # of a person's own code
            raise ImageError(image, f"the data set gives no image ({told(error)})") from error

    def digests(self, ids: tuple[str, ...], memo: Memo, known: KnownDigests) -> Digests:
        """The items' digests, taken once by each process: nothing says that a table's image 7 was this one."""
        return _taken_once(self.read, ids, memo)

    def has(self, image: str) -> bool:
        """True: data sets are here."""
        return True

    def moved(self, root: str) -> None:
        """None: whether there are files is the data set's affair."""

    @cached_property
    def _row_of(self) -> dict[str, int]:
        return dict(zip(self.ids, range(len(self.ids)), strict=True))

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_lock", "_row_of")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=Lock())


@dataclass(frozen=True, kw_only=True, eq=False)
class HeldSource:
    """Images in memory, by id.

    Attributes:
        contents: bytes or arrays that nobody writes to; of what is neither, the reason why it is no image.
    """

    contents: Mapping[str, Content | ImageError]

    absence = None  # they are here
    known = KnownDigests()

    def read(self, image: str) -> Content:
        """The bytes or the array; `ImageError` for what is no image."""
        content = self.contents[image]
        if isinstance(content, ImageError):
            raise ImageError(image, content.reason)
        return content

    def digests(self, ids: tuple[str, ...], memo: Memo, known: KnownDigests) -> Digests:
        """Their digests, taken once by each process."""
        return _taken_once(self.read, ids, memo)

    def has(self, image: str) -> bool:
        """True: they are here."""
        return True

    def moved(self, root: str) -> None:
        """None: no file holds them."""


def _taken_once(read: Callable[[str], Content], ids: tuple[str, ...], memo: Memo) -> Digests:
    def take(others: tuple[str, ...]) -> Digests:
        values, failed = in_threads(lambda image: content_digest(read(image)), others, otherwise=bytes(32))
        return Digests(values=values, failed=failed, stats=no_stats(len(others)))

    return completed(ids, memo.taken.find(ids), take, memo)


def content_of(value: Any) -> Content:
    """Encoded bytes as they are, and anything that holds pixels as an array `(H, W)` or `(H, W, 3)`.

    Args:
        value: bytes; a PIL image; an array uint8, colours last; a torch tensor uint8, colours first; or Hugging Face's
            ``{"bytes": ..., "path": ...}``.

    Raises:
        TypeError: for anything else.
        OSError: if a path can't be read.
    """
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value)
    if isinstance(value, Mapping) and "bytes" in value:
        if value["bytes"] is not None:
            return bytes(value["bytes"])
        with open(value["path"], "rb") as file:
            return file.read()
    if hasattr(value, "getbands"):
        from featstore.images.decode import array_of

        return array_of(value)
    array = value
    if hasattr(value, "detach"):  # a torch tensor
        array = value.detach().cpu().numpy()
        array = np.moveaxis(array, 0, -1) if array.ndim == 3 else array
    if isinstance(array, np.ndarray) and array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    is_image = isinstance(array, np.ndarray) and (array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 3))
    if not is_image or array.dtype != np.uint8 or 0 in array.shape:
        raise TypeError(f"it is {described(value)}; expected bytes, a PIL image, or uint8 of one or three channels")
    copy: NDArray[np.uint8] = np.array(array, order="C")
    copy.flags.writeable = False
    return copy


def described(value: Any) -> str:
    """What something is that was taken for an image, for messages."""
    kind = type(value).__name__
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        return f"a {kind} {tuple(value.shape)} of {value.dtype}"
    return f"a {kind}"


def told(error: Exception) -> str:
    """An error of a person's own code in one line."""
    return printable(f"{type(error).__name__}: {error}"[:200], is_one_line=True)


def image_of(item: Any, column: str | None) -> Any:
    """The image of a data set's item: its `column`, the first of several things, or the item itself."""
    if column is not None:
        return item[column]
    return item[0] if isinstance(item, tuple | list) else item
