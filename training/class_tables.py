"""Class tables: which logit is of which class, and whether the classes of some images can be told apart at all."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from featstore.errors import FeatureStoreError
from featstore.images.image_set import ImageSet
from featstore.images.origins import TWO_VALUES, made_by
from featstore.models.backbones import class_names
from featstore.models.staged import StagedModel
from featstore.words import some

_WORDNET = re.compile(r"n\d{8}")
"""A folder of ImageNet, by its number in WordNet; sorted, the 1,000 of them are in the order of ImageNet's logits."""


def check_contrast(images: ImageSet) -> None:
    """Checks that there are two classes to tell apart; a label that an image has or lacks (task multi) is enough.

    Raises:
        ValueError: if there is one class; the folders that were read as classes are shown.
    """
    if images.task != "single" or len(images.classes) != 1:
        return
    (name,) = images.classes
    origin = made_by(images)
    raise ValueError(
        f"All {len(images):,} images are of one class, {name}, so there is nothing to tell apart. Expected two classes "
        f"or more. {TWO_VALUES if origin is None else origin.one_class(images, name)}"
    )


def check_learnable(images: ImageSet, training: ImageSet) -> str | None:
    """Checks that a new head can learn from `training`, of `images`, what it is scored on (task single).

    Returns:
        How many images of the split valid are of classes that aren't learned, in words, where some are; a fold may
        leave a rare class out of training.

    Raises:
        ValueError: if all training images are of one class, or no image of the split valid is of a class of theirs.
    """
    if images.task != "single":
        return None
    assert training.targets is not None
    learned = {images.classes[target] for target in training.targets.tolist()}
    if len(learned) == 1:
        raise ValueError(
            f"All {len(training):,} images to train on are of one class, {learned.pop()}, so there is nothing to tell "
            f"apart. Expected some of two classes or more of {some(images.classes)}. Deal them anew (--split-seed), "
            "or give images of the others to train on."
        )
    valid = images.valid
    names = (
        [] if valid.targets is None else [images.classes[target] for target in valid.targets.tolist() if target >= 0]
    )
    unknown = [name for name in names if name not in learned]
    if not unknown:
        return None
    told = (
        f"{len(unknown):,} of the {len(names):,} images of the split valid are of classes that no image to train on "
        f"has ({some(sorted(set(unknown)))})"
    )
    if len(unknown) < len(names):
        return f"{told}: the model can't be right about them"
    raise ValueError(
        f"{told}, so a score would mean nothing. Expected the classes of the split valid in train. Deal the images "
        "anew (--split-column '', --split-seed; in Python: images.split(valid=0.2))."
    )


def kept_table(
    model: StagedModel, images: ImageSet, size: int, classes: Sequence[str] | None = None
) -> tuple[str, ...]:
    """The class of each logit of a model that keeps its own head, for `images`.

    It is the table `classes` if that is given; what the model's weights were trained on, if all classes of the images
    are among it; else the images' own, where it is their names that number the logits: 0, 1, 2 and so on, or the
    1,000 folders of ImageNet. Never their order alone, which is that of the alphabet.

    Args:
        model: with its own head.
        images: labelled or not.
        size: of the images.
        classes: the name of each logit, in order.

    Raises:
        ValueError: if the number of logits is another one than that of the classes, or logits and classes can't be
            matched.
    """
    shape = model.shape(model.cut_points[-1], size)
    known = class_names(model) or ()
    if images.task == "regression":
        table = images.classes if classes is None else tuple(classes)
        if shape != (len(table),):
            raise ValueError(
                f"{model.name} ends in {'x'.join(map(str, shape))} values an image, and the images have {len(table):,} "
                f'({some(table)}); head="keep" needs one for each. Give another head.'
            )
        return table
    if classes is None and shape == (len(known),) and {*images.classes} <= {*known}:
        return known
    table = images.classes if classes is None else tuple(classes)
    if shape != (len(table),):
        raise ValueError(
            f"{model.name} ends in {'x'.join(map(str, shape))} values an image, and the images have {len(table):,} "
            'classes; head="keep" needs a logit a class. Give a class table with classes=, or another head.'
        )
    if classes is not None:
        return table
    numbers = tuple(map(str, range(len(table))))
    if {*table} == {*numbers}:
        return numbers
    if len(table) == 1000 and all(map(_WORDNET.fullmatch, table)):
        return tuple(sorted(table))
    unknown = [name for name in table if name not in known]
    told = f"{model.name} doesn't say which class each of its {len(table):,} logits is of"
    if known:
        told = f"{model.name} tells {some(known)} apart, and not {some(unknown)}"
    raise ValueError(
        f"{told}; the images' classes are {some(table)}. Expected the names of the logits in their order, so that "
        'none is scored as another: classes=(...) with head="keep"; or a new head.'
    )


def with_table(images: ImageSet, classes: tuple[str, ...]) -> ImageSet:
    """`images` with targets that count in the table `classes`.

    Raises:
        ValueError: if a name stands twice in the table, or they have a class that isn't in it.
    """
    if images.task == "regression" and images.is_labelled and {*images.classes} != {*classes}:
        raise ValueError(
            f"The images have the values {some(images.classes)}, and classes names {some(classes)}. Expected the same "
            "names. Correct them."
        )
    twice = [name for name in dict.fromkeys(classes) if classes.count(name) > 1]
    if twice:
        raise ValueError(f"classes names {some(twice)} twice. Expected a name of its own for each logit.")
    unknown = [name for name in images.classes if name not in classes]
    if unknown:
        raise ValueError(
            f"The images have {'the class' if len(unknown) == 1 else 'the classes'} {some(unknown)}, which classes "
            f"({some(classes)}) lacks. Name all of them, or leave their images out."
        )
    return _counted_in(images, classes)


def with_classes(images: ImageSet, classes: tuple[str, ...], run: Path) -> ImageSet:
    """`images` with targets that count in the class table of a run.

    Raises:
        FeatureStoreError: if they have a class that the run lacks; it is named, and nothing is shifted. In regression,
            if they have other values than the run.
    """
    if images.task == "regression" and images.is_labelled and {*images.classes} != {*classes}:
        raise FeatureStoreError(
            f"The images have the values {', '.join(images.classes)}, and the model of {run} gives "
            f"{', '.join(classes)}. Expected the same ones. Name their columns: --label-column {','.join(classes)} "
            f"(in Python: label_column={[*classes]})."
        )
    unknown = [name for name in images.classes if name not in classes]
    if unknown:
        raise FeatureStoreError(
            f"The images have {'the class' if len(unknown) == 1 else 'the classes'} {', '.join(unknown)}, which the "
            f"model of {run} doesn't know (it knows {', '.join(classes)}). Train a head for the new classes, or leave "
            "their images out."
        )
    return _counted_in(images, classes)


def _counted_in(images: ImageSet, classes: tuple[str, ...]) -> ImageSet:
    if images.classes == classes or images.targets is None:
        return replace(images, classes=classes)
    places = np.array([classes.index(name) for name in images.classes], np.int64)
    if images.task == "regression":
        return replace(images, classes=classes, targets=images.targets[:, np.argsort(places)])
    if images.task == "single":
        targets = np.where(images.targets >= 0, places[np.maximum(images.targets, 0).astype(np.int64)], -1)
        return replace(images, classes=classes, targets=targets)
    wide = np.zeros((len(images), len(classes)), np.float32)
    wide[:, places] = images.targets
    return replace(images, classes=classes, targets=wide)
