"""Data sets of other libraries: torch's map-style ones, Hugging Face's, and whatever can be gone through once."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featstore.errors import ImageError
from featstore.images.digests import content_digest
from featstore.images.found import FoundImages
from featstore.images.item_sources import Content, DatasetSource, HeldSource, content_of, described, image_of, told
from featstore.images.labels import (
    Row,
    check_length,
    check_unique,
    checked_groups,
    checked_splits,
    composed,
    label_lists,
    label_names,
    label_values,
)
from featstore.images.names import Task, split_named
from featstore.images.sources import FolderSource, ImageSource
from featstore.words import counted

_LABEL = "label"
_NUM_TRIED = 16
"""Items that are read twice; of a flip by a coin, all of them come out alike once in 65,000 times."""


def iterable_images(items: Iterable[Any], *, classes: Sequence[str] | None, task: Task, name: str) -> FoundImages:
    """The images of an iterable; arguments and errors are those of `ImageSet.from_iterable`."""
    contents: dict[str, Content | ImageError] = {}
    labels: list[Any] = []
    for number, item in enumerate(items):
        if not isinstance(item, tuple | list) or len(item) not in (2, 3):
            raise TypeError(
                f"Item {number} is {described(item)}. Expected (id, image) or (id, image, label). Yield such tuples."
            )
        image = str(item[0])
        if image in contents:
            raise ValueError(f"image id {image!r} appears twice. Expected each once. Give every image its own id.")
        try:
            contents[image] = content_of(item[1])
        except (TypeError, ValueError, OSError) as error:
            contents[image] = ImageError(image, str(error))
        labels.append(_plain(item[2]) if len(item) == 3 else None)
    if task == "multi" and _are_n_hot(_given(labels), {len(classes)} if classes is not None else set()):
        labels = list(map(_numbers_of_places, labels))
    is_labelled = any(label is not None for label in labels)
    rows, given = labelled_rows(tuple(contents), labels if is_labelled else None, classes=classes, task=task)
    return FoundImages(
        rows=rows,
        source=HeldSource(contents=contents),
        name=name,
        task=task,
        is_labelled=is_labelled,
        classes=given,
    )


def dataset_images(
    dataset: Any,
    *,
    image_column: str | None,
    label_column: str | None,
    id_column: str | None,
    classes: Sequence[str] | None,
    splits: Sequence[str] | NDArray[np.str_] | None,
    groups: Sequence[Any] | None,
    task: Task,
    name: str | None,
) -> FoundImages:
    """The images of a data set, or of several by split; arguments and errors are those of `ImageSet.from_dataset`."""
    parts = dict(dataset) if isinstance(dataset, Mapping) else {"": dataset}
    if isinstance(dataset, Mapping):
        unknown = [key for key in parts if not split_named(str(key))]
        if unknown or splits is not None:
            what = f"has the part {unknown[0]!r}" if unknown else "has parts, and splits are given"
            raise ValueError(
                f"The data set {what}. Expected one data set, or a mapping from train, valid and test to one each. "
                "Give those that are meant: {'train': dataset['train'], ...}."
            )
    views = [_view(part, image_column, label_column, id_column, task) for part in parts.values()]
    labels, named = _joined(dict(zip(map(str, parts), views, strict=True)), classes, task)
    ids: list[str] = []
    dealt: list[str] = []
    for key, view in zip(parts, views, strict=True):
        own = map(str, view.ids or range(view.count))
        ids += own if key == "" else (f"{key}/{each}" for each in own)
        dealt += [str(key)] * view.count
    check_unique(ids, "image id", "Give every image its own, or leave id_column out.")
    rows, given = labelled_rows(
        ids,
        labels,
        classes=named,
        splits=dealt if isinstance(dataset, Mapping) else splits,
        groups=groups,
        task=task,
    )
    of_files = views[0].files if "" in parts else None  # the ids of parts aren't the files' own
    source: ImageSource
    if of_files is None:
        source = DatasetSource(parts=tuple(view.items for view in views), ids=tuple(ids), column=views[0].column)
    else:
        source = of_files
    return FoundImages(
        rows=rows,
        source=source,
        name=name or _name_of(dataset),
        task=task,
        is_labelled=labels is not None,
        classes=given,
    )


def labelled_rows(
    ids: Sequence[str],
    labels: Sequence[Any] | NDArray[Any] | None,
    *,
    classes: Sequence[str] | None = None,
    splits: Sequence[str] | NDArray[np.str_] | None = None,
    groups: Sequence[Any] | None = None,
    task: Task = "single",
) -> tuple[list[Row], tuple[str, ...] | None]:
    """A row for each image with labels as Python has them, and the class table; see `ImageSet.from_arrays`."""
    count = len(ids)
    given = None if classes is None else tuple(composed(str(each).strip()) for each in classes)
    cells: Sequence[Any] = [None] * count if labels is None else list(labels)
    if task == "multi" and isinstance(labels, np.ndarray) and labels.dtype != object:
        cells, given = label_lists(labels, given)
    check_length(cells, count, "labels")
    values: list[tuple[float, ...]] = [()] * count
    if task == "regression":
        if labels is not None:
            values, given = label_values(_numbers(labels), count, given)
        cells = [None] * count
    units = None if groups is None else checked_groups(groups, count)
    dealt = checked_splits([""] * count if splits is None else splits, count).tolist()
    rows = [
        Row(
            image=image,
            labels=label_names(cells[index], given, task, f"labels[{index}]"),
            split=dealt[index],
            group=None if units is None else units[index],
            where=f"labels[{index}]",
            values=values[index],
        )
        for index, image in enumerate(ids)
    ]
    return rows, given


def _numbers(labels: Sequence[Any] | NDArray[Any]) -> Sequence[Any] | NDArray[Any]:
    """With as many NaN as the others have numbers for each None."""
    if isinstance(labels, np.ndarray) or all(label is not None for label in labels):
        return labels
    known = next((label for label in labels if label is not None), float("nan"))
    return [np.full(np.shape(known), np.nan) if label is None else label for label in labels]


# ---- One data set


@dataclass(frozen=True, kw_only=True)
class _View:
    """What is used of a data set.

    Attributes:
        items: by place.
        count: of them.
        column: of the image; None where items are no mappings.
        labels: as the data set has them; None where it has none.
        are_places: whether labels are certainly numbers of classes where they are numbers.
        classes: their names, where it has these.
        ids: of the images, where a column has them.
        files: the same images as files, where it is plain that they are.
    """

    items: Any
    count: int
    column: str | None = None
    labels: list[Any] | None = None
    are_places: bool = False
    classes: Sequence[str] | None = None
    ids: list[Any] | None = None
    files: FolderSource | None = None


def _joined(
    views: Mapping[str, _View], classes: Sequence[str] | None, task: Task
) -> tuple[list[Any] | None, Sequence[str] | None]:
    """The labels of all parts, None where none has any, and the class names.

    Where parts have class names that differ (`ImageFolder` counts the folders that it finds), what is a number in each
    becomes a name by its own, and the class names are those given, or of train.
    """
    tables = {key: tuple(view.classes) for key, view in views.items() if view.classes is not None}
    named = next(iter(tables.values()), None)
    labels = {key: view.labels or [None] * view.count for key, view in views.items()}
    if task == "multi":
        rows = []
        for key, view in views.items():
            table = tables.get(key) if classes is None else classes
            rows += [] if view.are_places else [(label, table) for label in _given(labels[key])]
        if _are_n_hot([row for row, _ in rows], {len(table) for _, table in rows if table is not None}):
            for key in (key for key, view in views.items() if not view.are_places):
                labels[key] = list(map(_numbers_of_places, labels[key]))
    if task != "regression" and len(set(tables.values())) > 1:
        for key, cells in labels.items():
            names = [label_names(cell, tables.get(key), task, f"{key}[{place}]") for place, cell in enumerate(cells)]
            labels[key] = [list(each) if task == "multi" else each[0] if each else None for each in names]
        named = next((table for key, table in tables.items() if split_named(key) == "train"), None)
    is_labelled = any(view.labels is not None for view in views.values())
    joined = [label for cells in labels.values() for label in cells]
    return joined if is_labelled else None, named if classes is None else classes


def _are_n_hot(labels: Sequence[Any], widths: Set[int]) -> bool:
    """Whether all lists of labels are rows of 0 and 1; `widths` has the numbers of classes that are known.

    Raises:
        ValueError: if they may as well be the numbers of two classes, and if they are neither these nor of one width.
    """
    if not labels or not all(isinstance(row, list | tuple) for row in labels):
        return False
    lengths = {len(row) for row in labels}
    if min(lengths) < 2 or not all(each in (0, 1) for row in labels for each in row):
        return False
    if len(lengths | widths) > 1:
        twice = next((row for row in labels if len(set(row)) < len(row)), None)
        if twice is not None:
            others = ", ".join(map(str, sorted((lengths | widths) - {len(twice)})))
            raise ValueError(
                f"An item's labels are {twice}, as of {counted(len(twice), 'class')}; others, or the class names, are "
                f"of {others}. Expected a place for each class in every item, or its classes' numbers, each once. "
                "Correct the labels, or the classes."
            )
        return False
    if all(len(set(row)) == len(row) and all(type(each) is int for each in row) for row in labels):
        raise ValueError(
            f"Every item's labels are a 0 and a 1, as {labels[0]}. Expected either a place for each of two classes, or "
            "the numbers of an item's classes, and these may be both. Give places as booleans or floats, or give names "
            "of classes."
        )
    return True


def _given(labels: Sequence[Any]) -> list[Any]:
    return [label for label in labels if label is not None]


def _numbers_of_places(row: Any) -> list[int] | None:
    """The numbers of the classes whose places aren't 0."""
    return None if row is None else [place for place, each in enumerate(row) if each]


def _view(dataset: Any, image_column: str | None, label_column: str | None, id_column: str | None, task: Task) -> _View:
    if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__") or isinstance(dataset, str | bytes):
        raise TypeError(
            f"The data set is {described(dataset)}, whose items have no places. Expected one with len(dataset) and "
            "dataset[place]. What can only be gone through is one by ImageSet.from_iterable, tar shards by from_tar."
        )
    if hasattr(dataset, "features") and hasattr(dataset, "cast_column"):
        view = _of_hugging_face(dataset, image_column, label_column, id_column)
    else:
        view = _of_torch(dataset, image_column, label_column, id_column, task)
    if view.files is None:
        _check_items(view)
    return view


def _of_hugging_face(dataset: Any, image_column: str | None, label_column: str | None, id_column: str | None) -> _View:
    """A `datasets.Dataset`, whose images are had as they are encoded."""
    import datasets

    if dataset.format["type"] == "custom":
        raise ValueError(
            "The data set has a transform (set_transform), which would stand between its images and their digests. "
            "Expected it as it is; views are what featstore makes of images. Give dataset.with_format(None)."
        )
    features = dataset.features
    columns = [name for name, kind in features.items() if isinstance(kind, datasets.Image)]
    column = image_column or (columns[0] if len(columns) == 1 else None)
    if column not in columns:
        raise ValueError(
            f"The data set has {'the columns of images ' + ', '.join(columns) if columns else 'no column of images'} "
            f"among {', '.join(features)}. Expected one. Name it: image_column=NAME (cast it first: "
            "dataset.cast_column(NAME, datasets.Image()))."
        )
    plain = dataset.with_format(None)
    label = _label_of(features, label_column, lambda kind: isinstance(kind, datasets.ClassLabel))
    for name in filter(None, (label, id_column)):
        if name not in features:
            raise ValueError(f"The data set has no column {name!r}; it has {', '.join(features)}. Name another.")
    kind = None if label is None else getattr(features[label], "feature", features[label])
    return _View(
        items=plain.select_columns([column]).cast_column(column, datasets.Image(decode=False)),
        count=len(plain),
        column=column,
        labels=None if label is None else list(plain[label]),
        are_places=isinstance(kind, datasets.ClassLabel),
        classes=getattr(kind, "names", None),
        ids=None if id_column is None else list(plain[id_column]),
    )


def _label_of(features: Mapping[str, Any], asked: str | None, is_class: Callable[[Any], bool]) -> str | None:
    """The column of labels; where none is named, the only one of classes, or the one that is called so."""
    if asked != _LABEL or asked in features:
        return asked
    found = [name for name, kind in features.items() if is_class(kind)]
    if len(found) > 1:
        raise ValueError(
            f"The data set has the columns of classes {', '.join(found)}. Expected one of labels. Name one of them: "
            "label_column=NAME (None: nothing is labelled)."
        )
    return found[0] if found else None


def _of_torch(
    dataset: Any, image_column: str | None, label_column: str | None, id_column: str | None, task: Task
) -> _View:
    """A map-style data set of torch, torchvision or of one's own; items are images, (image, label), or mappings."""
    count = len(dataset)
    first = _first(dataset, count)
    is_mapping = isinstance(first, Mapping) and "bytes" not in first
    column = image_column or "image" if is_mapping else None
    if is_mapping and column not in first:
        raise ValueError(
            f"The data set's items have no {column!r}; they have {', '.join(map(str, first))}. Expected the image. "
            "Name it: image_column=NAME."
        )
    is_named = label_column not in (None, _LABEL) and first is not None
    if is_named and not is_mapping:
        raise ValueError(
            f"label_column is {label_column!r}, and the data set's items are no mappings. Expected columns. Leave it "
            "out: the label of (image, label) is the second."
        )
    if is_named and label_column not in first:
        raise ValueError(
            f"The data set's items have no {label_column!r}; they have {', '.join(map(str, first))}. Expected the "
            "label. Name another: label_column=NAME (None: nothing is labelled)."
        )
    files = _files_of(dataset)
    ids = None
    if files is not None:
        ids = [os.path.relpath(path, files.root).replace(os.sep, "/") for path in files.paths]
    if id_column is not None:
        if not is_mapping:
            raise ValueError("id_column is for items that are mappings. Leave it out; ids are then places.")
        ids = [dataset[place][id_column] for place in range(count)]
    return _View(
        items=dataset if files is None else files,
        count=count,
        column=column,
        labels=None if label_column is None else _labels_of(dataset, count, first, label_column),
        classes=None if task == "regression" else _classes_of(_whole(dataset)),
        ids=ids,
        files=None if files is None else FolderSource(root=files.root),
    )


def _classes_of(dataset: Any) -> Sequence[str] | None:
    """The names of its classes; of several for one, as ImageNet has, the first, with its number where two are alike."""
    names: Sequence[Any] | None = getattr(dataset, "classes", None)
    if names is None or not any(isinstance(each, tuple) for each in names):
        return names
    found = [str(each[0]) if isinstance(each, tuple) else str(each) for each in names]
    times = Counter(found)
    return [f"{each} ({place})" if times[each] > 1 else each for place, each in enumerate(found)]


def _first(dataset: Any, count: int) -> Any:
    """The first of some items that can be had; None if none can."""
    for place in _spread(count, _NUM_TRIED) if count else ():
        try:
            return dataset[place]
        except MemoryError:
            raise
        except Exception:  # of a person's own code; `_check_items` says so if all are like that
            continue
    return None


@dataclass(frozen=True, kw_only=True)
class _Files:
    """Files as items that are read as they are."""

    root: str
    paths: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, place: int) -> Mapping[str, str | None]:
        return {"bytes": None, "path": self.paths[place]}


def _files_of(dataset: Any) -> _Files | None:
    """The files of torchvision's `ImageFolder` without transforms, or of some of its items."""
    if _is_subset(dataset):
        whole = _files_of(dataset.dataset)
        if whole is None:
            return None
        return _Files(root=whole.root, paths=tuple(whole.paths[place] for place in dataset.indices))
    if not _gives_items_of(dataset, "torchvision.datasets.folder", "DatasetFolder"):
        return None
    is_plain = getattr(dataset.loader, "__module__", "") == "torchvision.datasets.folder" and not any(
        getattr(dataset, each, None) for each in ("transform", "target_transform", "transforms")
    )
    if not is_plain or not dataset.samples or len(dataset) != len(dataset.samples):
        return None
    return _Files(root=os.path.abspath(dataset.root), paths=tuple(os.path.abspath(path) for path, _ in dataset.samples))


def _whole(dataset: Any) -> Any:
    """The data set that torch's `Subset` chooses from."""
    return _whole(dataset.dataset) if _is_subset(dataset) else dataset


def _is_subset(dataset: Any) -> bool:
    return _gives_items_of(dataset, "torch.utils.data", "Subset")


def _gives_items_of(dataset: Any, module: str, name: str) -> bool:
    """Whether items are given by the code of a library's class, not by what a subclass puts in its place.

    Where the library isn't imported, there is no data set of it.
    """
    base = getattr(sys.modules.get(module), name, None)
    return base is not None and isinstance(dataset, base) and type(dataset).__getitem__ is base.__getitem__


def _labels_of(dataset: Any, count: int, first: Any, column: str) -> list[Any] | None:
    """The labels: torchvision's `targets` where items have the same, else each of its item; None if there are none."""

    def label(item: Any) -> Any:
        if isinstance(item, Mapping):
            return item.get(column)
        return item[1] if isinstance(item, tuple | list) and len(item) > 1 else None

    if not count or (isinstance(first, Mapping) and column not in first) or label(first) is None:
        return None
    targets = _targets_of(dataset)
    if targets is not None and len(targets) == count:
        found = [_plain(each) for each in targets]
        if _are_items_labels(found, lambda place: _plain(label(dataset[place]))):
            return found
    labels = []
    for place in range(count):
        try:
            labels.append(_plain(label(dataset[place])))
        except MemoryError:
            raise
        except Exception:  # of a person's own code; whoever reads the image says what it was
            labels.append(None)
    return labels


def _targets_of(dataset: Any) -> Sequence[Any] | None:
    if _is_subset(dataset):
        whole = _targets_of(dataset.dataset)
        return None if whole is None else [whole[place] for place in dataset.indices]
    made_by = getattr(type(dataset).__getitem__, "__module__", "")
    if not made_by.startswith("torchvision.datasets.") or any(
        getattr(dataset, each, None) for each in ("target_transform", "transforms")
    ):
        return None
    return getattr(dataset, "targets", None)


def _are_items_labels(found: Sequence[Any], label_at: Callable[[int], Any]) -> bool:
    """Whether an item of each distinct label has it, the first that can be read, and a few others as well."""
    left, others = {repr(each) for each in found}, set(_spread(len(found), 4))
    for place, each in enumerate(found):
        if repr(each) not in left and place not in others:
            continue
        try:
            label = label_at(place)
        except MemoryError:
            raise
        except Exception:  # of a person's own code; whoever reads the image says what it was
            continue
        if not _is_same(label, each):
            return False
        left.discard(repr(each))
    return True


def _plain(label: Any) -> Any:
    """A label without torch: a number, a text, a list."""
    return label.tolist() if hasattr(label, "tolist") else label


def _is_same(one: Any, other: Any) -> bool:
    return bool(np.array_equal(np.asarray(one, object), np.asarray(other, object)))


def _spread(count: int, most: int) -> list[int]:
    """Up to `most` places, as far apart as can be."""
    return sorted({round(place) for place in np.linspace(0, count - 1, min(count, most)).tolist()})


def _check_items(view: _View) -> None:
    """Refuses what a transform has made of images: floats, and another image each time.

    Raises:
        TypeError: if no item is an image, or one is of floats.
        ValueError: if one is another image when it is read again.
    """
    wrong: Exception | None = None
    num_images = 0
    for place in _spread(view.count, _NUM_TRIED):
        try:
            value = image_of(view.items[place], view.column)
            is_float = "float" in str(getattr(value, "dtype", ""))
            once = None if is_float else content_of(value)
            again = None if is_float else content_of(image_of(view.items[place], view.column))
        except MemoryError:
            raise
        except Exception as error:  # of a person's own code; a few such images are left to whoever reads them
            wrong = error
            continue
        if once is None or again is None:
            raise TypeError(
                f"Item {place} of the data set is {described(value)}: a transform has made numbers of the image. "
                f"Expected {_AS_IT_IS}"
            )
        if content_digest(once) != content_digest(again):
            raise ValueError(
                f"Item {place} of the data set is another image when it is read again: a transform draws at random. "
                f"Expected {_AS_IT_IS}"
            )
        num_images += 1
    if wrong is not None and not num_images:
        raise TypeError(f"No item of the data set is an image ({told(wrong)}). Expected {_AS_IT_IS}") from wrong


_AS_IT_IS = (
    "the same PIL image, uint8 array or tensor, or encoded bytes each time. Make the data set without its transform; "
    "a model's view resizes and normalises, and augmentation is asked for by Augment(...)."
)


def _name_of(dataset: Any) -> str:
    one = next(iter(dataset.values()), None) if isinstance(dataset, Mapping) else dataset
    named = getattr(getattr(one, "info", None), "dataset_name", None)
    return str(named or type(_whole(one)).__name__)
