"""Few shots: what a backbone's features are worth with few labelled images, and how much more are worth."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch import nn

from featstore.html import titled_table
from featstore.images.contents import overlap_note
from featstore.images.digests import KnownDigests
from featstore.images.image_set import ImageSet
from featstore.models.staged import StagedModel
from featstore.store.features import Features
from featstore.store.store import FeatureStore
from featstore.words import some
from training.inputs.derive import FeatureSource, labelled, training_part
from training.learner import Learner
from training.loop import settings
from training.saved import past_split
from training.scores.metrics import student_interval

if TYPE_CHECKING:
    import torch

    from training.plots import Axes

ProbeName = Literal["ridge", "linear", "knn", "head"]
_OPTIONS = ("cut", "reduce", "features", "view", "device", "allow_leak")


@dataclass(frozen=True, kw_only=True)
class CurvePoint:
    """Scores of classifiers that were fitted to as many images.

    Attributes:
        shots: images a class; None where they are a share of all.
        num_images: to train on.
        accuracies: one of each draw, on the same held-out images; a single one where there is only one draw.
    """

    shots: int | None
    num_images: int
    accuracies: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Of the draws."""
        return fmean(self.accuracies)

    def interval(self, confidence: float = 0.95) -> tuple[float, float] | None:
        """Where the mean over other draws lies, by Student's t, within 0 and 1; None of a single draw."""
        return None if len(self.accuracies) < 2 else student_interval("accuracy", self.accuracies, confidence)


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class LearningCurve:
    """Accuracy by how many images were trained on; made by `few_shot` and `learning_curve`. Prints as a table.

    Intervals say how much it matters which images were drawn, not how few were scored.

    Attributes:
        probe: what was fitted, in words.
        points: from few images to many.
        num_scored: held-out images.
        note: what should be known of these images, as that some are copies of others; None if there is nothing.
    """

    probe: str
    points: tuple[CurvePoint, ...]
    num_scored: int
    note: str | None = None

    @property
    def table(self) -> list[dict[str, int | float | None]]:
        """A row a size: shots (where there are some), images, draws, accuracy, and the ends of its interval.

        Of a single draw the ends are None.
        """
        rows: list[dict[str, int | float | None]] = []
        for each in self.points:
            low, high = each.interval() or (None, None)
            shots = {} if each.shots is None else {"shots": each.shots}
            draws = len(each.accuracies)
            rows.append(
                {**shots, "images": each.num_images, "draws": draws, "accuracy": each.mean, "from": low, "to": high}
            )
        return rows

    def frame(self) -> dict[str, list[float]]:
        """Column -> values, one a size, NaN where there is none: what ``pandas.DataFrame`` takes."""
        columns = {name: [row[name] for row in self.table] for name in self.table[0]}
        return {name: [math.nan if each is None else each for each in values] for name, values in columns.items()}

    def in_words(self) -> str:
        """What was fitted and scored, why an interval is missing, and what should be known of the images."""
        alone = "" if all(each.interval() for each in self.points) else " (-: a single draw has none)"
        noted = "" if self.note is None else f"; {self.note}"
        return (
            f"{self.probe}, scored on {self.num_scored:,} held-out images; intervals of 95 % over draws{alone}{noted}"
        )

    def plot(self, axes: Axes | None = None) -> Axes:
        """Mean accuracy by number of images, with its interval."""
        from training.plots import learning_curve

        return learning_curve(self.frame(), self.probe, axes)

    def __str__(self) -> str:
        names = list(self.table[0])
        lines = ["  ".join(f"{name:>9}" for name in names)]
        lines += [
            "  ".join(f"{'-' if each is None else f'{each:.4g}':>9}" for each in row.values()) for row in self.table
        ]
        return "\n".join([*lines, self.in_words()])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return titled_table(self.in_words(), self.table)


def few_shot(
    model: StagedModel | nn.Module,
    images: ImageSet,
    store: FeatureStore,
    *,
    shots: Sequence[int] = (1, 2, 4, 8, 16),
    repeats: int = 5,
    probe: ProbeName | Any = "ridge",
    seed: int = 0,
    **options: Any,
) -> LearningCurve:
    """The accuracy on the split valid of a probe that is fitted to few images of each class, from stored features.

    The images are drawn from the split train, `repeats` times; of one draw the smaller sets lie within the larger.

    Args:
        model: as in `Learner`.
        images: labelled, of one class each, with a split.
        store: that holds their features.
        shots: images a class.
        repeats: draws.
        probe: ridge, linear, knn or head; or a classifier of scikit-learn's, which is cloned for each fit. Nothing of
            it is chosen by the images that are scored.
        seed: of the first draw; the others have the next ones.
        options: of `Learner`: cut, reduce, features, view, device, allow_leak.

    Raises:
        ValueError: for a class without as many images, images that aren't of one class each, and a probe that there
            isn't.
        TypeError: for another option.
        FeatureStoreError: if the store doesn't hold the features, or the model was trained on images that are scored;
            the message says what to run.
    """
    asked = sorted({*_listed("shots", shots, int | np.integer, "numbers of images a class from 1 on, as (1, 4, 16)")})
    if asked[0] < 1:
        raise ValueError(f"shots are {shots!r}; expected numbers of images a class from 1 on. Correct them.")
    _check_draws(repeats, seed)
    tried = _Tried.of(model, images, store, probe, options)
    points = []
    for number in asked:
        draws = [k_shot_rows(tried.train.images, number, seed=seed + each) for each in range(repeats)]
        points.append(tried.point(draws, shots=number))
    return LearningCurve(probe=tried.words, points=tuple(points), num_scored=len(tried.valid), note=tried.note)


def learning_curve(
    model: StagedModel | nn.Module,
    images: ImageSet,
    store: FeatureStore,
    *,
    shares: Sequence[float] = (0.05, 0.1, 0.2, 0.4, 0.7, 1.0),
    repeats: int = 5,
    probe: ProbeName | Any = "ridge",
    seed: int = 0,
    **options: Any,
) -> LearningCurve:
    """The accuracy on the split valid by how many of the training images a probe is fitted to: are more worth it?

    Args:
        model: as in `few_shot`, as are `images`, `store`, `probe`, `seed` and `options`.
        images: likewise.
        store: likewise.
        shares: of each class, of which one image at least; 1 is all of them, which there is a single draw of.
        repeats: draws.
        probe: likewise.
        seed: likewise.
        options: likewise.

    Raises:
        ValueError: for a share that isn't above 0 and at most 1; else as `few_shot`.
        FeatureStoreError: as `few_shot`.
    """
    asked = sorted(
        {
            *_listed(
                "shares", shares, int | float | np.number, "shares of the training images in a list, as (0.1, 0.5, 1)"
            )
        }
    )
    if not 0 < asked[0] <= asked[-1] <= 1:
        raise ValueError(
            f"shares are {shares!r}; expected shares above 0 and up to 1. For numbers of images: few_shot."
        )
    _check_draws(repeats, seed)
    tried = _Tried.of(model, images, store, probe, options)
    targets = _classes_of(tried.train.images)
    points = []
    for share in asked:
        counts = [max(1, math.floor(share * count + 0.5)) for count in np.bincount(targets).tolist()]
        draws = [_drawn(tried.train.images, counts, seed + each) for each in range(repeats if share < 1 else 1)]
        points.append(tried.point(draws, shots=None))
    return LearningCurve(probe=tried.words, points=tuple(points), num_scored=len(tried.valid), note=tried.note)


def _listed(name: str, given: Any, kind: Any, expected: str) -> list[Any]:
    """The numbers that are given, of one kind.

    Raises:
        ValueError: for none, and for what is no list of such numbers.
    """
    numbers = [] if isinstance(given, str) or not isinstance(given, Iterable) else [*given]
    if not numbers or not all(isinstance(each, kind) and not isinstance(each, bool) for each in numbers):
        raise ValueError(f"{name} are {given!r}; expected {expected}. Give them in a list.")
    return numbers


def _check_draws(repeats: int, seed: int) -> None:
    if not isinstance(repeats, int | np.integer) or repeats < 1:
        raise ValueError(f"repeats is {repeats!r}; expected a number of draws from 1 on. Correct it.")
    settings.checked("seed", seed)


def k_shot(images: ImageSet, shots: int, *, seed: int = 0) -> ImageSet:
    """`images` with so many of each class in the split train; the others of that split are left out.

    Within a class, training images are ranked by SHA-256 of seed and id, and the first are taken. So the set of 4 shots
    holds that of 2, neither order nor machine matters, and new images hardly change what is drawn.

    >>> images = ImageSet.from_arrays(np.zeros((20, 4, 4), np.uint8), ["cat", "dog"] * 10).split(valid=0.2)
    >>> k_shot(images, 2)
    ImageSet(arrays-select: 8 images, 2 classes (cat 4, dog 4); train 4, valid 4)

    Args:
        images: labelled, of one class each. Without a split all are training images.
        shots: images a class.
        seed: of the draw.

    Raises:
        ValueError: if a class of the training images has fewer, or images aren't of one class each.
    """
    training = labelled(training_part(images))
    drawn = {training.ids[row] for row in k_shot_rows(training, shots, seed=seed).tolist()}
    is_dealt = (images.splits != "").any()
    kept = [
        name in drawn or (bool(is_dealt) and split != "train")
        for name, split in zip(images.ids, images.splits.tolist(), strict=True)
    ]
    return images.select(np.array(kept))


def k_shot_rows(images: ImageSet, shots: int, *, seed: int = 0) -> NDArray[np.int64]:
    """Places of the images that `k_shot` draws of these, in their order.

    Raises:
        ValueError: as `k_shot`.
    """
    if not isinstance(shots, int | np.integer) or shots < 1:
        raise ValueError(f"shots is {shots!r}; expected a number of images a class from 1 on. Correct it.")
    targets = _classes_of(images)
    counts = np.bincount(targets, minlength=len(images.classes))
    few = [images.classes[place] for place in np.flatnonzero((counts > 0) & (counts < shots)).tolist()]
    if few:
        least = int(counts[counts > 0].min())
        raise ValueError(
            f"{some(few)} ha{'ve' if len(few) > 1 else 's'} fewer than {shots} images to train on; expected as many of "
            f"each class. Ask for up to {least}."
        )
    return _drawn(images, [shots] * len(counts), seed)


def _classes_of(images: ImageSet) -> NDArray[np.int64]:
    if images.task != "single" or images.targets is None:
        raise ValueError(f"These images are {images.describe()}; expected one class each. Give such images.")
    return images.targets.astype(np.int64)


def _drawn(images: ImageSet, counts: Sequence[int], seed: int) -> NDArray[np.int64]:
    """Of each class the first so many places, by rank."""
    targets = _classes_of(images)
    words = (f"{seed}\nshot\n{name}".encode("utf-8", "surrogatepass") for name in images.ids)
    ranks = np.array([int.from_bytes(hashlib.sha256(each).digest()[:8], "big") for each in words], np.uint64)
    order = np.lexsort((ranks, targets))
    _, firsts = np.unique(targets[order], return_index=True)
    place_in_class = np.arange(len(order)) - firsts[np.unique(targets[order], return_inverse=True)[1]]
    return np.sort(order[place_in_class < np.asarray(counts)[targets[order]]])


@dataclass(frozen=True, kw_only=True, eq=False)
class _Tried:
    """A probe, and the features that it is fitted to and scored on."""

    probe: Callable[[], Any]
    words: str
    train: Features
    valid: Features
    note: str | None

    @classmethod
    def of(
        cls, model: StagedModel | nn.Module, images: ImageSet, store: FeatureStore, probe: Any, options: dict[str, Any]
    ) -> _Tried:
        if other := [name for name in options if name not in _OPTIONS]:
            raise TypeError(f"{other[0]} is no option of few shots; expected some of {', '.join(_OPTIONS)}.")
        make, words = _probe(probe, options.get("device", "auto"))
        learn = Learner(model, images, store, head="linear", quiet=True, **options)
        _classes_of(learn.images)
        inputs = learn.inputs
        if inputs.problem is not None:
            raise inputs.problem
        if not isinstance(inputs.train, FeatureSource) or not isinstance(inputs.valid, FeatureSource):
            raise ValueError(
                f"These images are read from {inputs.why}; expected stored features of the splits train and valid. "
                "Extract them, and deal the images: images.split(valid=0.2)."
            )
        (train,), (valid,) = inputs.train.features, inputs.valid.features
        note = overlap_note(learn.images, learn.images.digests(store.known_digests(learn.images)))
        past = past_split(model) if isinstance(model, StagedModel) else None
        known = KnownDigests.of(store.known_digests(valid.images))
        told = (
            None
            if past is None
            else past.leaked_note(valid.images, valid.images.digests(known), allow_leak=learn.allow_leak)
        )
        note = "; ".join(filter(None, [note, told])) or None
        return cls(probe=make, words=words, train=train, valid=valid, note=note)

    def point(self, draws: Sequence[NDArray[np.int64]], *, shots: int | None) -> CurvePoint:
        accuracies = []
        assert self.train.targets is not None
        assert self.valid.targets is not None
        for rows in draws:
            fitted = self.probe().fit(self.train[rows, ...], self.train.targets[rows])
            accuracies.append(float((fitted.predict(self.valid) == self.valid.targets).mean()))
        return CurvePoint(shots=shots, num_images=len(draws[0]), accuracies=tuple(accuracies))


def _probe(given: Any, device: torch.device | str) -> tuple[Callable[[], Any], str]:
    """What makes a new classifier, and what it is called.

    Raises:
        ValueError: for a name that there isn't.
    """
    from sklearn.base import clone
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    from training.estimators.heads import HeadClassifier
    from training.estimators.probes import KNNProbe, LinearProbe, RidgeProbe

    made = {
        "ridge": RidgeProbe(device=str(device)),
        "linear": make_pipeline(StandardScaler(), LinearProbe(device=str(device))),
        "knn": KNNProbe(weights=0.07, device=str(device)),  # with few rows all vote: the near ones must count for more
        "head": HeadClassifier("linear", epochs=30, lr=1e-2, device=str(device)),
    }
    if isinstance(given, str):
        if given not in made:
            raise ValueError(f"probe is {given!r}; expected one of {', '.join(made)}, or a classifier.")
        return lambda: clone(made[given]), f"{given} probe"
    if isinstance(given, type) or not hasattr(given, "get_params") or not hasattr(given, "predict"):
        raise ValueError(
            f"probe is {given!r}; expected one of {', '.join(made)}, or a classifier, as LinearProbe(0.1)."
        )
    return lambda: clone(given), type(given).__name__
