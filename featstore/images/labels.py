"""Labels: the class table, targets, groups, and the words for splits, as image sets hold them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from numbers import Integral
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from featstore.words import counted, listed

if TYPE_CHECKING:  # a program's help has words of these, and waits for no arrays
    import numpy as np
    from numpy.typing import ArrayLike, NDArray

Task = Literal["single", "multi"]

SPLITS = ("train", "valid", "test")
"""The splits, in the order in which people use them; an image of none has "" instead."""

SPLIT_WORDS = {"train": "train", "valid": "valid", "val": "valid", "test": "test", "": ""}
"""Each word, in small letters, that folders and tables may use -> the split that it stands for."""


class Row(NamedTuple):
    """One image as a constructor found it; `where` says so to a person."""

    image: str
    labels: tuple[str, ...]
    split: str
    group: str | None
    where: str


def class_table(
    rows: list[Row], *, given: tuple[str, ...] | None = None, by_value: bool = False, instead: str | None = None
) -> tuple[str, ...]:
    """The classes given, or else those of the images in train or in no split, sorted.

    Args:
        rows: the images.
        given: the classes, in the order that counts.
        by_value: sorts them as numbers.
        instead: what a person may do who needs no classes.
    """
    if given is None:
        known = {label for row in rows if row.split in ("train", "") for label in row.labels}
    else:
        known = set(given)
    for row in rows:
        for label in row.labels:
            if label not in known:
                place = f"({row.where}, split {row.split}) is not in train"
                if given is not None:
                    place = f"({row.where}) is not in classes"
                raise ValueError(
                    f"class {label!r} {place}. Expected one of {counted(len(known), 'class')}"
                    f"{f' ({listed(sorted(known))})' if known else ''}. Correct the label, or add the class there"
                    f"{f'; to extract features only, {instead}' if instead else ''}."
                )
    return given if given is not None else tuple(sorted(known, key=int if by_value else str))


def targets_of(rows: list[Row], classes: tuple[str, ...], task: Task) -> NDArray[np.int64] | NDArray[np.float32]:
    """The target of each row, see `ImageSet.targets`; every label must be one of `classes`."""
    import numpy as np

    place = {name: number for number, name in enumerate(classes)}
    if task == "single":
        return np.array([place[row.labels[0]] if row.labels else -1 for row in rows], dtype=np.int64)
    targets = np.zeros((len(rows), len(classes)), dtype=np.float32)
    for index, row in enumerate(rows):
        targets[index, [place[label] for label in row.labels]] = 1
    return targets


def label_lists(labels: NDArray[Any], given: tuple[str, ...] | None) -> tuple[list[list[int]], tuple[str, ...]]:
    """The places of the ones in each row of an n-hot array, and the class names."""
    import numpy as np

    num_classes = labels.shape[-1] if given is None else len(given)
    if labels.ndim != 2 or labels.shape[1] != num_classes:
        raise ValueError(
            f"labels has the shape {labels.shape}. Expected (N, {num_classes}): a row for each image and a column for "
            "each class. Reshape it, or pass a list of labels for each image."
        )
    if not np.isin(labels, (0, 1)).all():
        raise ValueError("labels holds values other than 0 and 1. Expected 1 where an image has a class. Threshold it.")
    return [np.flatnonzero(row).tolist() for row in labels], given or tuple(map(str, range(num_classes)))


def label_names(cell: Any, given: tuple[str, ...] | None, task: Task, where: str) -> tuple[str, ...]:
    """The class names of one image; none if it is unlabelled."""
    if cell is None:
        return ()
    if task == "single":
        cell = [cell]
    elif isinstance(cell, str) or not isinstance(cell, Iterable):
        raise TypeError(f"{where} is {cell!r}. Expected a list of labels, as task is 'multi'. Wrap it: [{cell!r}].")
    names = (_label_name(label, given, where) for label in cell)
    return tuple(name for name in names if name)


def _label_name(label: object, given: tuple[str, ...] | None, where: str) -> str | None:
    if label is None or isinstance(label, str):
        return None if label is None else str(label)
    if isinstance(label, bool) or not isinstance(label, Integral):
        raise TypeError(
            f"{where} is {label!r}, a {type(label).__name__}. "
            "Expected a class name or an integer. Convert the labels; for several an image pass task='multi'."
        )
    number = int(label)
    if number < -1 or (given is not None and number >= len(given)):
        most = "" if given is None else f" to {len(given) - 1}"
        raise ValueError(f"{where} is {number}. Expected 0{most}, or -1 for an unlabelled image. Correct it.")
    if number == -1:
        return None
    return str(number) if given is None else given[number]


def are_integers(cells: Sequence[Any], task: Task) -> bool:
    """Whether all labels of these images are numbers, which are sorted by value."""
    labels = cells if task == "single" else [label for cell in cells if cell is not None for label in cell]
    return all(isinstance(label, Integral) for label in labels if label is not None)


def checked_splits(splits: Sequence[str] | NDArray[np.str_], count: int) -> NDArray[np.str_]:
    """`(count,)` of words in `SPLITS` and "", read-only.

    Raises:
        ValueError: for another number of splits, or a word that isn't one of `SPLIT_WORDS`.
    """
    import numpy as np

    check_length(splits, count, "splits")
    given = np.asarray(splits, dtype=str)
    checked = given.astype("<U5")
    if not np.isin(given, ("", *SPLITS)).all():
        words = given.tolist()
        unknown = sorted({word for word in set(words) if word.lower() not in SPLIT_WORDS})
        if unknown:
            raise ValueError(
                f"splits holds {listed(unknown)}. Expected train, valid (or val), test or ''. Correct them."
            )
        checked = np.array([SPLIT_WORDS[word.lower()] for word in words], dtype="<U5")
    checked.flags.writeable = False
    return checked


def split_counts(splits: NDArray[np.str_]) -> str:
    """How many images each split has, for people.

    >>> split_counts(np.array(["train", "train", "", "test"]))
    'train 2, test 1, not dealt 1'
    """
    dealt = Counter(splits.tolist())
    words = {**{split: split for split in SPLITS}, "": "not dealt"}
    return ", ".join(f"{word} {dealt[split]:,}" for split, word in words.items() if dealt[split])


def checked_targets(
    targets: ArrayLike | None, count: int, num_classes: int, task: Task
) -> NDArray[np.int64] | NDArray[np.float32] | None:
    """A read-only copy; None if nothing is labelled."""
    import numpy as np

    if targets is None:
        return None
    found = np.asarray(targets)
    shape = (count,) if task == "single" else (count, num_classes)
    if found.shape != shape or found.dtype.kind not in ("iu" if task == "single" else "biuf"):
        raise ValueError(
            f"targets is an array {found.shape} of {found.dtype}. Expected {shape} of "
            f"{'integers' if task == 'single' else '0 and 1'}, as task is {task!r}. Convert them, or correct the task."
        )
    allowed = range(-1, num_classes) if task == "single" else range(2)
    if not ((found >= allowed[0]) & (found <= allowed[-1]) & (found == np.floor(found))).all():
        raise ValueError(
            f"targets holds values from {found.min()} to {found.max()}. Expected {allowed[0]} to {allowed[-1]}, "
            f"as there are {counted(num_classes, 'class')}. Correct the targets or the classes."
        )
    if num_classes == 0 or (task == "single" and count and (found == -1).all()):
        return None
    checked = found.astype(np.int64) if task == "single" else found.astype(np.float32)
    checked.flags.writeable = False
    return checked


def checked_groups(groups: Sequence[Any], count: int) -> tuple[str, ...]:
    """The groups as texts; `ValueError` for another number than `count`."""
    check_length(groups, count, "groups")
    return tuple(str(group) for group in groups)


def check_length(values: Sequence[Any] | NDArray[Any] | None, count: int, what: str) -> None:
    """`ValueError` unless there is one of `values`, called `what`, for each of `count` images; None passes."""
    if values is not None and len(values) != count:
        raise ValueError(f"{what} has {len(values):,} entries. Expected {count:,}, one for each image. Give them all.")
