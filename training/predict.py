"""Predictions: classes and probabilities of images, one record each."""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from featstore.digest import Json
from featstore.images.image_set import ImageSet
from featstore.images.item_sources import content_of, described
from featstore.images.names import IMAGE_SUFFIXES
from featstore.images.origins import named_by
from featstore.images.sources import FolderSource
from training.scores.metrics import THRESHOLD, check_said

Items: TypeAlias = Any
"""What can be predicted: an image set; files, folders and tar files by their paths; a table by its path; or images in
memory: PIL images, arrays uint8 ``(H, W[, 3])`` or ``(N, H, W, 3)``, tensors uint8 ``(3, H, W)`` or ``(N, 3, H, W)``.
"""

NUM_TOP = 5
_TABLES = (".csv", ".tsv", ".parquet")


@dataclass(frozen=True)
class Prediction:
    """What a model says of one image.

    Attributes:
        image: id or path.
        label: the most probable class; of a multi-label model all classes from probability 0.5 on, as `joined` has
            them; of regression the numbers as text.
        probability: of the most probable class; NaN of regression.
        top: (class, probability), the five most probable first.
        values: (name, number), of regression.
    """

    image: str
    label: str
    probability: float
    top: tuple[tuple[str, float], ...]
    values: tuple[tuple[str, float], ...] = ()

    def facts(self) -> Json:
        """As JSON."""
        if self.values:
            return {"image": self.image, "values": dict(self.values)}
        top = [{"label": name, "probability": value} for name, value in self.top]
        return {"image": self.image, "label": self.label, "probability": self.probability, "top": top}


def probabilities(logits: Tensor, task: str) -> NDArray[np.float64]:
    """Probabilities ``(N, K)`` of logits: softmax for one class an image, sigmoid for any number of labels.

    In regression they are numbers and stay what they are.
    """
    wide = logits.cpu().double()
    if task == "regression":
        numbers: NDArray[np.float64] = wide.numpy()
        return numbers
    values = torch.softmax(wide, dim=1) if task == "single" else torch.sigmoid(wide)
    array: NDArray[np.float64] = values.numpy()
    return array


def predictions(ids: Sequence[str], values: NDArray[np.float64], classes: Sequence[str], task: str) -> list[Prediction]:
    """One record an image, from probabilities ``(N, K)``.

    Raises:
        ValueError: if some aren't finite.
    """
    check_said(values)
    return [_prediction(name, row, classes, task) for name, row in zip(ids, values, strict=True)]


def joined(names: Sequence[str], classes: Sequence[str]) -> str:
    """Several labels of an image as one text, joined by ``;``; each in quotes where a class has ``;`` or a quote.

    >>> joined(["sea", "sun"], ("sea", "sky", "sun")), joined(["sea", "sun"], ("a;b", "sea", "sun"))
    ('sea;sun', '"sea";"sun"')
    """
    if not any(";" in each or '"' in each for each in classes):
        return ";".join(names)
    return ";".join('"' + each.replace('"', '""') + '"' for each in names)


def outputs_words(classes: Sequence[str], task: str) -> str:
    """How many things a model tells of an image."""
    return f"{len(classes)} {'values' if task == 'regression' else 'classes'}"


def write_csv(
    path: Path,
    ids: Sequence[str],
    values: NDArray[np.float64],
    classes: Sequence[str],
    task: str,
    targets: NDArray[Any] | None = None,
) -> None:
    """A table: image, label, probability, then a column a class; in regression image, then a column a number.

    With `targets`, as an image set has them, a column ``actual`` follows the image, a class or several `joined`; in
    regression a column ``actual NAME`` for each number.

    People open it with a spreadsheet, which takes a text that begins like a formula for one: such a name gets an
    apostrophe in front, as a spreadsheet marks text.

    Raises:
        ValueError: if some of the values aren't finite; then nothing is written.
    """
    check_said(values)
    actual = [[] for _ in ids] if targets is None else _actual(targets, classes, task)
    with path.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file)
        if task == "regression":
            names = [] if targets is None else [f"actual {name}" for name in classes]
            writer.writerow(["image", *names, *map(_as_text, classes)])
            writer.writerows(
                [_as_text(name), *known, *map(_digits, row)]
                for name, known, row in zip(ids, actual, values.tolist(), strict=True)
            )
            return
        names = [] if targets is None else ["actual"]
        writer.writerow(["image", *names, "label", "probability", *map(_as_text, classes)])
        found = predictions(ids, values, classes, task)
        for each, known, row in zip(found, actual, values, strict=True):
            numbers = [f"{value:.6f}" for value in (each.probability, *row)]
            writer.writerow([_as_text(each.image), *known, _as_text(each.label), *numbers])


def _actual(targets: NDArray[Any], classes: Sequence[str], task: str) -> list[list[str]]:
    """The cells of each image that say what it is labelled."""
    if task == "regression":
        return [[*map(_digits, row)] for row in targets.tolist()]
    if task == "single":
        return [[_as_text(classes[place])] for place in targets.tolist()]
    rows = ([classes[place] for place in np.flatnonzero(row).tolist()] for row in targets)
    return [[_as_text(joined(names, classes))] for names in rows]


def _as_text(name: str) -> str:
    return f"'{name}" if name.startswith(("=", "+", "-", "@", "\t", "\r")) else name


def as_images(items: Items) -> ImageSet:
    """An unlabelled image set of files and folders, in the order given; a folder's images at any depth, sorted.

    Hidden files and folders inside a folder are left out. What is named twice comes once, at its first place. The
    samples of tar files have their own ids; images in memory are called by their places: 0, 1, ... A table (.csv, .tsv,
    .parquet) stands alone; its images are those of its column ``path``, in its order (else: `ImageSet.from_table`).

    Raises:
        TypeError: for what is no path, image or image set.
        ValueError: if there is no image, or a path doesn't exist.
    """
    if isinstance(items, ImageSet):
        return items
    is_several = isinstance(items, Iterable) and not isinstance(items, str | os.PathLike) and not _is_one(items)
    given: list[Any] = list(items) if is_several else [items]
    if given and all(map(_has_pixels, given)):
        return ImageSet.from_iterable(((str(place), each) for place, each in enumerate(given)), name="predict")
    wrong = [item for item in given if not isinstance(item, str | os.PathLike)]
    if wrong:
        raise TypeError(
            f"Images to predict are {'several, among them ' * is_several}{described(wrong[0])}; expected files and "
            "folders by their paths, or PIL images or uint8 of one or three channels, or an image set. Give such, "
            "paths and images apart."
        )
    paths: list[str | os.PathLike[str]] = given
    if paths and all(named_by(os.fspath(path)).constructor == "from_tar" for path in paths):
        return ImageSet.from_tar(paths, label_column=None, split_column="")
    if any(os.fspath(path).lower().endswith(_TABLES) for path in paths):
        if len(paths) > 1:
            raise ValueError(
                f"A table of images is among {len(paths):,} paths; expected it alone. Predict its images by themselves."
            )
        return ImageSet.from_table(paths[0], label_column=None, split_column="", name="predict")
    found: list[str] = []
    for item in paths:
        path = Path(item)
        if path.is_dir():
            inside = [
                file for file in path.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES and _is_shown(file, path)
            ]
            found += [file.as_posix() for file in sorted(inside)]
        elif path.exists():
            found.append(path.as_posix())
        else:
            raise ValueError(f"There is no image {item}. Give files or folders that exist.")
    if not found:
        raise ValueError(
            f"No image in {', '.join(map(str, paths)) or 'an empty list'}; expected {', '.join(IMAGE_SUFFIXES)}."
        )
    ids = tuple(dict.fromkeys(found))
    return ImageSet(
        name="predict",
        ids=ids,
        targets=None,
        classes=(),
        splits=np.full(len(ids), "", dtype="<U5"),
        groups=None,
        task="single",
        source=FolderSource(root=os.getcwd()),
    )


def _is_one(items: Any) -> bool:
    """Whether it is one image in memory, through whose rows Python could go."""
    return getattr(items, "ndim", 4) < 4


def _has_pixels(item: Any) -> bool:
    try:
        return not isinstance(item, bytes | bytearray | memoryview | Mapping) and content_of(item) is not None
    except TypeError:
        return False


def _is_shown(file: Path, below: Path) -> bool:
    return file.is_file() and not any(part.startswith(".") for part in file.relative_to(below).parts)


def _digits(number: float) -> str:
    """As many as float32 has."""
    return f"{number:.8g}"


def _prediction(name: str, row: NDArray[np.float64], classes: Sequence[str], task: str) -> Prediction:
    if task == "regression":
        numbers = row.tolist()
        text = ";".join(map(_digits, numbers))
        return Prediction(name, text, math.nan, (), tuple(zip(classes, numbers, strict=True)))
    order = np.argsort(-row, kind="stable")
    best = int(order[0])
    label = classes[best]
    if task == "multi":
        label = joined([classes[place] for place in np.flatnonzero(row >= THRESHOLD).tolist()], classes)
    top = tuple((classes[place], float(row[place])) for place in order[:NUM_TOP].tolist())
    return Prediction(name, label, float(row[best]), top)
