"""Labels: the class table, targets, groups, and the words for splits, as image sets hold them."""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, NamedTuple

from featstore.images.names import SPLITS, Task, split_named
from featstore.words import counted, listed

if TYPE_CHECKING:  # a program's help has words of these, and waits for no arrays
    import numpy as np
    from numpy.typing import ArrayLike, NDArray


NO_LABEL = ("", "-1")
"""What stands for an unlabelled image in a cell, a sample or a list: where labels are numbers, -1 is no class."""


class Row(NamedTuple):
    """One image as a constructor found it; `where` says so to a person, and `values` are its numbers in regression."""

    image: str
    labels: tuple[str, ...]
    split: str
    group: str | None
    where: str
    values: tuple[float, ...] = ()


def composed(name: str) -> str:
    """A name in Unicode's NFC, in which an accented letter is one character: equal for all that look and mean the same.

    macOS writes names of files in NFD, where the accent follows its letter.
    """
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def composed_classes(names: Iterable[str]) -> tuple[str, ...]:
    """A class table in NFC; as it is, if it was made when two spellings still were two classes."""
    given = tuple(names)
    table = tuple(map(composed, given))
    return table if len(set(table)) == len(table) else given


def one_spelling(rows: list[Row]) -> tuple[list[Row], tuple[str, ...]]:
    """The rows with labels in NFC, and groups where one is spelled in two ways; a note for each of several spellings.

    Groups of a single spelling stay, since they decide how images are dealt.
    """
    labels = _spellings(label for row in rows for label in row.labels)
    groups = _spellings(row.group for row in rows if row.group is not None)
    if not labels and not groups:
        return rows, ()
    several = {name for name, spelled in groups.items() if len(spelled) > 1}
    changed = [
        row._replace(
            labels=tuple(map(composed, row.labels)),
            group=composed(row.group) if row.group is not None and composed(row.group) in several else row.group,
        )
        for row in rows
    ]
    return changed, tuple(
        f"the {what} {name!r} comes in {len(spelled)} Unicode spellings (as macOS and others write it), taken for one"
        for what, found in (("label", labels), ("group", groups))
        for name, spelled in sorted(found.items())
        if len(spelled) > 1
    )


def _spellings(names: Iterable[str]) -> dict[str, set[str]]:
    """Each name that isn't ASCII, in NFC -> how it is written."""
    found: dict[str, set[str]] = {}
    for name in {name for name in names if not name.isascii()}:
        found.setdefault(composed(name), set()).add(name)
    return found


def are_numbers(classes: Iterable[str]) -> bool:
    """Whether all class names are plain integers, which are sorted by value; ``007`` and ``1.0`` are names.

    >>> are_numbers(["10", "9"]), are_numbers(["10", "09"]), are_numbers(["10", "ten"])
    (True, False, False)
    """
    return all(_PLAIN_INTEGER.fullmatch(name) for name in classes)


_PLAIN_INTEGER = re.compile(r"0|-?[1-9][0-9]{0,17}")


def class_table(
    rows: list[Row],
    *,
    given: tuple[str, ...] | None = None,
    held_out_classes: bool = False,
    instead: str | None = None,
) -> tuple[str, ...]:
    """The classes given, or else those of the images in train or in no split, sorted; of all, where none is in either.

    Names that all are plain integers are sorted by value.

    Args:
        rows: the images.
        given: the classes, in the order that counts.
        held_out_classes: takes those of held-out images as well.
        instead: what a person may do who needs no classes.
    """
    if given is None:
        learned = [row for row in rows if row.split in ("train", "")] or rows
        known = {label for row in (rows if held_out_classes else learned) for label in row.labels}
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
    return given if given is not None else tuple(sorted(known, key=int if are_numbers(known) else str))


HELD_OUT = "run featstore extract (in Python: held_out_classes=True)"
"""What a person may do about classes that only held-out images have, as the end of a sentence."""


def held_out_notes(rows: list[Row]) -> list[str]:
    """A note about classes that no image in train or in no split has, where others have some."""
    learned = {label for row in rows if row.split in ("train", "") for label in row.labels}
    others = sorted({label for row in rows for label in row.labels} - learned)
    if not learned or not others:
        return []
    are = "is" if len(others) == 1 else "are"
    return [
        f"{counted(len(others), 'class')} ({listed(others)}) {are} held out alone: features can be extracted, but no "
        "head learns them from this split"
    ]


def one_label_notes(rows: list[Row]) -> list[str]:
    """A note if all labelled images of a table have one class."""
    found = Counter(row.labels for row in rows if row.labels)
    if len({label for labels in found for label in labels}) != 1:
        return []
    ((name,),) = {labels[:1] for labels in found}
    return [f"only one class was found, {name!r}, of {counted(found.total(), 'image')}; is it the right column?"]


def targets_of(rows: list[Row], classes: tuple[str, ...], task: Task) -> NDArray[np.int64] | NDArray[np.float32]:
    """The target of each row, see `ImageSet.targets`; every label must be one of `classes`."""
    import numpy as np

    if task == "regression":
        unknown = (math.nan,) * len(classes)
        return np.array([row.values or unknown for row in rows], np.float32).reshape(len(rows), len(classes))
    place = {name: number for number, name in enumerate(classes)}
    if task == "single":
        return np.array([place[row.labels[0]] if row.labels else -1 for row in rows], dtype=np.int64)
    targets = np.zeros((len(rows), len(classes)), dtype=np.float32)
    for index, row in enumerate(rows):
        targets[index, [place[label] for label in row.labels]] = 1
    return targets


def label_values(
    labels: ArrayLike, count: int, given: tuple[str, ...] | None, what: str = "labels"
) -> tuple[list[tuple[float, ...]], tuple[str, ...]]:
    """The numbers of each image, none where they are all NaN or None, and their names.

    Args:
        labels: `(N,)` or `(N, K)`.
        count: N.
        given: the names, or None.
        what: they are called in messages.

    Raises:
        TypeError: for what is no number.
        ValueError: for another shape, infinite numbers, and an image of which some numbers are there and some aren't.
    """
    import numpy as np

    try:
        numbers = np.asarray(labels, np.float64)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"{what} aren't numbers ({error}). Expected one for each image, or K in each row, as task is 'regression'. "
            "Convert them, or say task='single' for classes."
        ) from error
    wide = numbers.reshape(-1, 1) if numbers.ndim == 1 else numbers
    if wide.ndim != 2 or len(wide) != count or (given is not None and wide.shape[1] != len(given)):
        expected = "K" if given is None else len(given)
        raise ValueError(
            f"{what} has the shape {numbers.shape}. Expected ({count}, {expected}) numbers, a row for each image. "
            "Reshape them, or correct their names."
        )
    names = given or (("value",) if wide.shape[1] == 1 else tuple(map(str, range(wide.shape[1]))))
    return [checked_values(tuple(row), names, f"{what}[{index}]") for index, row in enumerate(wide.tolist())], names


def checked_values(values: tuple[float, ...], names: Sequence[str], where: str) -> tuple[float, ...]:
    """The numbers of one image; none if all of them are NaN.

    Raises:
        ValueError: for an infinite number, and where some are there and some aren't.
    """
    is_missing = [math.isnan(value) for value in values]
    if all(is_missing):
        return ()
    for name, value in zip(names, values, strict=True):
        if not abs(value) <= _LARGEST:
            raise ValueError(
                f"{where} has {'no number' if math.isnan(value) else f'{value:g}'} for {name!r}. Expected a number of "
                "float32 for each value, or none for all of them. Correct it, or leave the image out."
            )
    return values


_LARGEST = 3.4e38  # of float32, as which they are kept


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
    if label is None:
        return None
    if isinstance(label, str):  # as a table's cells are read
        name = label.strip()
        return None if name in NO_LABEL and name not in (given or ()) else name
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


def checked_splits(splits: Sequence[str] | NDArray[np.str_], count: int) -> NDArray[np.str_]:
    """`(count,)` of words in `SPLITS` and "", read-only.

    Raises:
        ValueError: for another number of splits, or a word that isn't one of `SPLIT_WORDS`.
    """
    import numpy as np

    given = np.asarray(splits, dtype=str)
    if given.ndim != 1:
        raise ValueError(
            f"splits has the shape {given.shape}. Expected ({count:,},), a word for each image. Choose a column of it."
        )
    check_length(given, count, "splits")
    checked = given.astype("<U5")
    if not np.isin(given, ("", *SPLITS)).all():
        words = given.tolist()
        unknown = sorted({word for word in set(words) if split_named(word) is None})
        if unknown:
            raise ValueError(
                f"splits holds {listed(unknown)}. Expected train, valid (or val), test or ''. Correct them."
            )
        checked = np.array([split_named(word) for word in words], dtype="<U5")
    checked.flags.writeable = False
    return checked


def split_counts(splits: NDArray[np.str_]) -> str:
    """How many images each split has, for people.

    >>> import numpy as np
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
    if task == "regression":
        values, _ = label_values(targets, count, tuple(map(str, range(num_classes))), "targets")
        found = np.array([each or (math.nan,) * num_classes for each in values], np.float32).reshape(count, num_classes)
        found.flags.writeable = False
        return found if any(values) else None
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


def labels_text(targets: NDArray[np.int64] | NDArray[np.float32] | None, classes: tuple[str, ...], task: Task) -> str:
    """Which labels images have, and how many of each, for people."""
    import numpy as np

    if targets is None:
        return "unlabelled"
    if task == "regression":
        return _values_text(targets, classes)
    if task == "multi":
        counts = targets.sum(axis=0).astype(np.int64)
    else:
        counts = np.bincount(targets.astype(np.int64) + 1, minlength=len(classes) + 1)
        counts, num_unlabelled = counts[1:], counts[0]
    shown = [f"{name} {count:,}" for name, count in zip(classes[:6], counts[:6], strict=True)]
    more = [f"{len(classes) - 6:,} more"] if len(classes) > 6 else []
    is_by_value = are_numbers(classes) and list(classes) == sorted(classes, key=int)
    order = " in the order of their numbers" if is_by_value and list(classes) != sorted(classes) else ""
    text = f"{counted(len(classes), 'class')}{order} ({', '.join(shown + more)})"
    if task == "multi":
        return f"{text}, several an image"
    return f"{text}, {num_unlabelled:,} unlabelled" if num_unlabelled else text


def label_counts(
    targets: NDArray[np.int64] | NDArray[np.float32] | None,
    classes: tuple[str, ...],
    task: Task,
    splits: NDArray[np.str_],
) -> list[dict[str, str | int]]:
    """A row a class: its name, and how many images of each split have it; none of images without classes."""
    import numpy as np

    if targets is None or task == "regression":
        return []
    counts = {}
    for split in (*SPLITS, ""):
        if len(part := targets[splits == split]):
            by_class = part.sum(axis=0) if task == "multi" else np.bincount(part[part >= 0], minlength=len(classes))
            counts[split or "not dealt"] = by_class.astype(np.int64).tolist()
    return [
        {"class": name, **{split: numbers[place] for split, numbers in counts.items()}}
        for place, name in enumerate(classes)
    ]


def _values_text(targets: NDArray[Any], names: tuple[str, ...]) -> str:
    import numpy as np

    is_known = ~np.isnan(targets[:, 0])
    known = targets[is_known]
    ends = zip(names, known.min(0), known.max(0), strict=True)
    spans = [f"{name} {low:.4g} to {high:.4g}" for name, low, high in ends]
    more = [f"{len(names) - 6:,} more"] if len(names) > 6 else []
    text = f"{counted(len(names), 'value')} an image ({', '.join(spans[:6] + more)})"
    return text if is_known.all() else f"{text}, {int((~is_known).sum()):,} unlabelled"


def checked_groups(groups: Sequence[Any], count: int) -> tuple[str, ...]:
    """The groups as texts; `ValueError` for another number than `count`, and for None and nan, which name no group."""
    check_length(groups, count, "groups")
    for index, group in enumerate(groups):
        if group is None or (isinstance(group, Real) and group != group):
            raise ValueError(
                f"groups[{index}] is {group}. Expected a group for every image, as groups stay together in one split. "
                "Give it one (an image alone is a group of its own)."
            )
    return tuple(str(group) for group in groups)


def check_length(values: Sequence[Any] | NDArray[Any] | None, count: int, what: str) -> None:
    """`ValueError` unless there is one of `values`, called `what`, for each of `count` images; None passes."""
    if values is not None and len(values) != count:
        raise ValueError(f"{what} has {len(values):,} entries. Expected {count:,}, one for each image. Give them all.")


def checked_indices(which: ArrayLike, count: int) -> NDArray[np.int64]:
    """The indices that `ImageSet.select` got, or those where its mask is True; errors as of it."""
    import numpy as np

    array = np.asarray(which)
    is_mask = array.dtype == bool
    if array.ndim > 1 or (is_mask and array.ndim != 1):
        raise ValueError(
            f"select got {'a mask' if is_mask else 'indices'} of the shape {array.shape}. Expected "
            f"{f'({count:,},), a truth for each image' if is_mask else 'one dimension'}. Choose a column of it, or "
            "say how it is meant: mask.any(axis=1)."
        )
    if is_mask:
        check_length(array, count, "the mask")
        return np.flatnonzero(array)
    if array.size and array.dtype.kind not in "iu":
        raise TypeError(f"select got {array.dtype} values. Expected indices or a mask of booleans. Convert them.")
    given = array.reshape(-1)
    wrong = given[(given < 0) | (given >= count)]
    if wrong.size:
        raise ValueError(f"select got index {wrong[0]}. Expected 0 to {count - 1}. Leave it out.")
    indices = given.astype(np.int64)
    check_unique(indices.tolist(), "index", "Select every image once.")
    return indices


def check_unique(values: Sequence[object], noun: str, remedy: str) -> None:
    """`ValueError` that names a value which appears several times."""
    import numpy as np

    hashes = np.sort(np.fromiter(map(hash, values), np.int64, len(values)))  # a set would take ten times the memory
    if (hashes[1:] == hashes[:-1]).any() and len(set(values)) < len(values):
        value, number = Counter(values).most_common(1)[0]
        raise ValueError(f"{noun} {value!r} appears {number} times. Expected each once. {remedy}")
