"""Found images: what a kind of source finds, before names become numbers; the last step of each is `ImageSet.of`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from featstore.digest import Json, digest_bytes
from featstore.images.labels import Row
from featstore.images.names import Task

if TYPE_CHECKING:  # a program's help waits for no arrays
    from featstore.images.sources import ImageSource


@dataclass(frozen=True, kw_only=True)
class FoundImages:
    """The images of one source, with their labels as texts.

    Attributes:
        rows: one for each image, in order.
        source: how their bytes are had.
        name: of the set.
        task: single, multi or regression.
        is_labelled: False where nobody looked for labels.
        classes: the class table in the order that counts; None: the labels of rows in train or in no split, sorted.
            With task regression the names of the values.
        held_out_classes: takes the classes of held-out images as well.
        instead: what a person may do who needs no classes, as the end of a sentence.
        skipped: as in `ImageSet`, as are `notes` and `origin`.
        notes: sentences about how the source was understood.
        origin: what a command is made from that finds the same again; empty if there is none.
    """

    rows: list[Row]
    source: ImageSource
    name: str
    task: Task = "single"
    is_labelled: bool = True
    classes: tuple[str, ...] | None = None
    held_out_classes: bool = False
    instead: str | None = None
    skipped: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()
    origin: Mapping[str, Json] = field(default_factory=dict)


def safe_name(name: str) -> str:
    """`name` with what a file name should not have as `_`; at most 100 characters, as file names have 255.

    The end of a longer one becomes a digest, so that two such names stay two.
    """
    safe = re.sub(r"[^A-Za-z0-9._-]+", "_", name).strip("._-") or "images"
    return safe if len(safe) <= 100 else f"{safe[:91]}-{digest_bytes(safe.encode('ascii'))[:8]}"
