"""Failures: the images that an extraction leaves out and why, how many may be, and the report of them beside the store.

::

    <root>/failures/<name of the image set>[+<I>of<N>].jsonl
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from featstore.errors import FeatureStoreError, ImageError, OnError, check_choice
from featstore.extraction.filed import Filed
from featstore.extraction.plan import Plan
from featstore.files import disk
from featstore.files.index import Places, is_among
from featstore.images.render import MOST_NAMED
from featstore.objects import names_in
from featstore.store.sets import digest_rows
from featstore.store.store import FeatureStore
from featstore.words import counted

FAILURES = "failures"
"""The folder of the reports."""


class TooManyFailedError(FeatureStoreError):
    """More images failed than were to be passed over.

    Attributes:
        filed: what was filed before the run stopped.
    """

    def __init__(self, message: str, filed: Filed | None = None) -> None:
        super().__init__(message)
        self.filed = filed


@dataclass(frozen=True, kw_only=True)
class Failure:
    """One image that was left out.

    Attributes:
        image: its id.
        reason: without the image's name.
        key: of the set that can't hold its row; None where it has a row in no set that it was computed for.
        is_lasting: whether every image of this content fails so; else its content wasn't had.
    """

    image: str
    reason: str
    key: str | None = None
    is_lasting: bool


def check_max_errors(max_errors: int | None, on_error: OnError) -> None:
    """TypeError for what is no number of images, ValueError for less than none, and for images that aren't skipped."""
    if max_errors is None:
        return
    if not isinstance(max_errors, int):
        raise TypeError(f"max_errors is {max_errors!r}; expected a number of images, or None for any number")
    if max_errors < 0:
        raise ValueError(f"max_errors is {max_errors}; expected 0 or more, or None for any number")
    if on_error == "raise":
        raise ValueError(
            f"max_errors is {max_errors}, but with on_error='raise' the first image that fails stops the job. Give "
            "on_error='skip', or leave out max_errors."
        )


def refuse_unreadable(planned: Plan, on_error: OnError) -> None:
    """ImageError for the first image that couldn't be read when the plan was made, unless such images are skipped.

    Raises:
        ValueError: for another `on_error`.
    """
    check_choice("on_error", on_error, get_args(OnError))
    if on_error == "raise":
        for index, reason in planned.digests.failed.items():
            if planned.is_owned[index]:
                raise ImageError(planned.images.ids[index], reason)


class Failing:
    """The images that fail in one run, counted if there is a limit to them.

    Args:
        planned: whose images they are; those that couldn't be read when it was made have failed.
        most: of them; None for any number.
        is_asked: ``(N,)``, the images of this run; default: all of the plan's shard.
    """

    def __init__(self, planned: Plan, most: int | None, is_asked: NDArray[np.bool_] | None = None) -> None:
        self._planned, self._most = planned, most
        self._is_asked = planned.is_owned if is_asked is None else planned.is_owned & is_asked
        self._reasons = {index: reason for index, reason in planned.digests.failed.items() if self._is_asked[index]}

    def add(self, index: int, reason: str) -> None:
        """Counts an image, and those of equal content, which are decoded once for all."""
        self._count(self._planned.digests.values[index].tobytes(), reason)

    def add_all(self, filed: Filed) -> None:
        """Counts all that failed of what has come of some images."""
        unread = {digest: reason for digest, (_, reason) in filed.unread.items()}
        for failed in (filed.failures, *filed.unfit, unread):
            for digest, reason in failed.items():
                self._count(bytes.fromhex(digest), reason)

    @cached_property
    def _places(self) -> Places:
        return Places(self._planned.digests.values)

    def _count(self, digest: bytes, reason: str) -> None:
        if self._most is not None:
            for place in self._places.of(digest):
                if self._is_asked[place]:
                    self._reasons.setdefault(place, reason)

    @property
    def are_too_many(self) -> bool:
        """Whether the run must stop."""
        return self._most is not None and len(self._reasons) > self._most

    def check(self, filed: Filed) -> None:
        """TooManyFailedError if they are too many; `filed` is what has come of the run."""
        if not self.are_too_many:
            return
        named = "; ".join(
            f"{self._planned.images.ids[index]}: {reason}"
            for index, reason in islice(self._reasons.items(), MOST_NAMED)
        )
        raise TooManyFailedError(
            f"{counted(len(self._reasons), 'image')} failed ({named}{'; ...' * (len(self._reasons) > MOST_NAMED)}). "
            f"Expected {self._most:,} at most. What was computed is filed. Repair, remove or bring back the files, or "
            "allow more with --max-errors, and run it again.",
            filed,
        )


def failures(planned: Plan, filed: Filed) -> list[Failure]:
    """All that was left out, in the order of the images; of one that several sets can't hold, each."""
    digests = planned.digests
    recorded = {*filed.failures, *filed.unread, *(digest for unfit in filed.unfit for digest in unfit)}
    places = np.flatnonzero((digests.is_failed & planned.is_owned) | is_among(digests.values, digest_rows(recorded)))
    return [failure for index in places.tolist() for failure in _of(planned, filed, index)]


def _of(planned: Plan, filed: Filed, index: int) -> Iterator[Failure]:
    image, digest = planned.images.ids[index], bytes(planned.digests.values[index]).hex()
    if index in planned.digests.failed:
        yield Failure(image=image, reason=planned.digests.failed[index], is_lasting=False)
        return
    if digest in filed.failures:
        yield Failure(image=image, reason=filed.failures[digest], is_lasting=True)
        return
    for each, unfit in zip(planned.sets, filed.unfit, strict=True):
        if each.is_missing[index] and digest in unfit:
            yield Failure(image=image, reason=unfit[digest], key=each.spec.key, is_lasting=True)
    if digest in filed.unread:
        read, reason = filed.unread[digest]
        said = reason if read == image else f"its content was to be read as {read}: {reason}"
        yield Failure(image=image, reason=said, is_lasting=False)


def write_report(planned: Plan, store: FeatureStore, found: Sequence[Failure]) -> list[str]:
    """Puts the report of a run in the place of earlier ones of these images, or takes those away; says where it is.

    Rows are filed by then, and a store may be one that can only be read: what goes wrong is said as well.
    """
    name, folder = _report_name(planned), store.folder / FAILURES
    shown = store.root / FAILURES / name
    try:
        if found:
            # ASCII, since file names need not be valid in any encoding.
            content = "".join(f"{json.dumps(_line(each))}\n" for each in found).encode("ascii")
            disk.make_folder(folder, root=store.folder)
            with disk.whole_or_nothing(folder / name, len(content), replaces=True) as fd:
                disk.write_at(fd, memoryview(content), 0)
        with suppress(FileNotFoundError, NotADirectoryError):  # there is no such folder
            for earlier in [each for each in names_in(folder) if each.endswith(".jsonl")]:
                if _is_earlier(earlier, planned) and not (found and earlier == name):
                    with suppress(FileNotFoundError):  # another job took it away
                        disk.unlink(folder / earlier)
    except OSError as error:
        return [f"{shown}, which says what was left out, could not be {'written' if found else 'removed'} ({error})"]
    return [f"What was left out, and why, is in {shown}"] if found else []


def _report_name(planned: Plan) -> str:
    shard = "" if planned.shard is None else f"+{planned.shard.index}of{planned.shard.count}"
    return f"{planned.images.name}{shard}.jsonl"  # `+` is in no image set's name


def _is_earlier(name: str, planned: Plan) -> bool:
    """Whether a report says what this run says anew: any of these images, but for those of jobs that share them now."""
    images, _, shard = name.removesuffix(".jsonl").partition("+")
    is_beside = planned.shard is not None and shard.endswith(f"of{planned.shard.count}")
    return images == planned.images.name and (name == _report_name(planned) or not is_beside)


def _line(failure: Failure) -> dict[str, str | bool | None]:
    return {"id": failure.image, "reason": failure.reason, "key": failure.key, "lasting": failure.is_lasting}
