"""Names: the tasks, the words for splits and the suffixes of images, which programs list before they load an array."""

from __future__ import annotations

import re
from typing import Literal

Task = Literal["single", "multi", "regression"]

TopFolders = Literal["auto", "classes", "splits"]
"""What the first folders below a root are: splits if all are called so, or as said."""

IMAGE_SUFFIXES = (
    ".avif", ".bmp", ".gif", ".heic", ".heif", ".jfif", ".jpe", ".jpeg", ".jpg", ".mpo", ".png", ".tif", ".tiff",
    ".webp",
)  # fmt: skip
"""What a file's name must end with, in any case, to count as an image of a folder. A table names its files itself."""

SPLITS = ("train", "valid", "test")
"""The splits, in the order in which people use them; an image of none has "" instead."""

SPLIT_WORDS = {
    **dict.fromkeys(("train", "training", "trn"), "train"),
    **dict.fromkeys(("valid", "val", "validation", "validate", "dev", "eval", "evaluation"), "valid"),
    **dict.fromkeys(("test", "testing", "tst"), "test"),
    "": "",
}
"""Each word, in small letters, that folders and tables may use -> the split that it stands for."""

OWN_SPLITS = "split"
"""The column that a table's splits are read from where none is named, if it has one; in any case of letters."""

SHARD = "shard"
"""The column of splits of tar shards where their names say them."""


def split_named(name: str) -> str | None:
    """The split that a name stands for, in any case: train for ``Training``; None for any other name.

    >>> split_named("Training"), split_named("dog"), split_named("train2017")
    ('train', None, None)
    """
    return SPLIT_WORDS.get(name.strip().lower())


def split_hinted(name: str) -> str | None:
    """The split that a name stands for or has a word of; None where it has none, or words of several.

    >>> split_hinted("train2017"), split_hinted("seg_test"), split_hinted("trainer"), split_hinted("train_test")
    ('train', 'test', None, None)
    """
    words = re.findall(r"[^\W\d_]+", name.lower())
    hinted = {SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS}
    return hinted.pop() if len(hinted) == 1 else None
