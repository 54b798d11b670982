"""Significance: whether of two models one is better, from what both said of the very same images.

Two accuracies with intervals that overlap may differ all the same: most images are easy or hard for both, and only
those count that the two tell differently.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from featstore.words import some

if TYPE_CHECKING:
    from training.scores.outcomes import Outcomes

PairedMetric: TypeAlias = Literal["accuracy", "loss"] | Callable[[NDArray[Any], NDArray[Any]], float]
"""``accuracy``; ``loss``, each image's own by the task; or a function of probabilities ``(N, K)`` and targets."""

_BLOCK = 1 << 24  # numbers drawn at a time, 128 MB


@dataclass(frozen=True, kw_only=True)
class McNemar:
    """How two models differ in which images they predict rightly: McNemar's exact test. Prints as a sentence.

    Attributes:
        both: images that both predict rightly.
        only_a: that the first alone does.
        only_b: that the second alone does.
        neither: that none does.
        p: how likely a difference as large or larger is if both are equally good, two-sided: the exact binomial
            probability among the images that just one predicts rightly.
    """

    both: int
    only_a: int
    only_b: int
    neither: int
    p: float

    @classmethod
    def of(cls, a: NDArray[np.bool_], b: NDArray[np.bool_]) -> McNemar:
        """That of ``(N,)`` whether each image was predicted rightly, by the first and by the second."""
        from scipy.special import bdtr  # type: ignore[import-untyped]  # scikit-learn brings it

        only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
        tail = float(bdtr(min(only_a, only_b), only_a + only_b, 0.5)) if only_a + only_b else 1.0
        return cls(
            both=int((a & b).sum()),
            only_a=only_a,
            only_b=only_b,
            neither=int((~a & ~b).sum()),
            p=min(1.0, 2 * tail),
        )

    @property
    def num_images(self) -> int:
        """All of them."""
        return self.both + self.only_a + self.only_b + self.neither

    def __str__(self) -> str:
        return (
            f"of {self.num_images:,} images {self.only_a:,} are right by the first alone and {self.only_b:,} by the "
            f"second alone: McNemar p {self.p:.2g}"
        )


@dataclass(frozen=True, kw_only=True)
class Difference:
    """By how much a score of the second model is higher than that of the first. Prints as numbers.

    Attributes:
        value: on the images that there are.
        interval: where it lies with `confidence`, over other images as these: percentiles of the bootstrap.
        confidence: of the interval.
        num: how often images were drawn anew.
        num_images: how many there are.
    """

    value: float
    interval: tuple[float, float]
    confidence: float
    num: int
    num_images: int

    @property
    def is_told(self) -> bool:
        """Whether the interval leaves out 0, so that one of the two can be called higher."""
        return self.interval[0] > 0 or self.interval[1] < 0

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.value:+.4g} ({100 * self.confidence:g} % interval {low:+.4g} to {high:+.4g})"


def mcnemar(a: Outcomes, b: Outcomes) -> McNemar:
    """McNemar's exact test of which images of one class each two models predict rightly.

    Args:
        a: what the first said, `Learner.outcomes`.
        b: what the second said of the same images, in any order and class table.

    Raises:
        ValueError: if they are of different images or labels, naming the first; or of another task.
    """
    places = _same(a, b)
    return McNemar.of(a.is_right, b.is_right[places])


def paired_bootstrap(
    a: Outcomes,
    b: Outcomes,
    *,
    metric: PairedMetric | None = None,
    num: int = 10_000,
    seed: int = 0,
    confidence: float = 0.95,
) -> Difference:
    """By how much `b` scores higher than `a`, with an interval: images are drawn anew, the same ones for both.

    Args:
        a: what the first said, `Learner.outcomes`.
        b: what the second said of the same images, in any order.
        metric: default: accuracy of one class an image, else the loss. A function is called `num` times for each.
        num: how often as many images are drawn, with replacement.
        seed: of the drawing.
        confidence: of the interval.

    Raises:
        ValueError: if they are of different images or labels, naming the first.
    """
    places = _same(a, b)
    chosen = metric or ("accuracy" if a.images.task == "single" else "loss")
    if not callable(chosen):
        mine, others = _values(a, chosen), _values(b, chosen)[places]
        return bootstrapped(mine, others, num=num, seed=seed, confidence=confidence)
    _check(num, confidence)
    if a.classes != b.classes:
        raise ValueError(
            "Both outcomes must have one class table for a function of probabilities. Order their classes."
        )
    mine, others, targets = a.probabilities, b.probabilities[places], a.targets
    random, count = np.random.default_rng(seed), len(a)

    def difference(rows: NDArray[np.int64]) -> float:
        return float(chosen(others[rows], targets[rows]) - chosen(mine[rows], targets[rows]))

    drawn = np.array([difference(random.integers(0, count, count)) for _ in range(num)])
    return _difference(difference(np.arange(count)), drawn, num=num, confidence=confidence, num_images=count)


def bootstrapped(
    a: NDArray[np.float64],
    b: NDArray[np.float64],
    *,
    num: int = 10_000,
    seed: int = 0,
    confidence: float = 0.95,
) -> Difference:
    """By how much the mean of `b` is higher than that of `a`: ``(N,)`` numbers of the same images in one order."""
    _check(num, confidence)
    gaps = np.asarray(b, dtype=np.float64) - np.asarray(a, dtype=np.float64)
    if not len(gaps):
        raise ValueError("There are no images to compare two models on. Give outcomes of at least one.")
    random, count = np.random.default_rng(seed), len(gaps)
    values, occurring = np.unique(gaps, return_counts=True)
    if len(values) <= _FEW:  # a draw of images is one of how often each value occurs
        drawn = random.multinomial(count, occurring / count, size=num) @ values / count
    else:
        blocks = max(1, _BLOCK // count)
        sizes = [min(blocks, num - start) for start in range(0, num, blocks)]
        drawn = np.concatenate([gaps[random.integers(0, count, (size, count))].mean(1) for size in sizes])
    return _difference(float(gaps.mean()), drawn, num=num, confidence=confidence, num_images=count)


_FEW = 16


def verdict(names: tuple[str, str], difference: Difference, test: McNemar | None, *, unit: str = "points") -> str:
    """Two models compared in a sentence.

    Args:
        names: of the first and the second.
        difference: of a score of which more is better, second minus first.
        test: or None where images aren't right or wrong.
        unit: ``points`` of percent; else what the score is called.
    """
    first, second = names
    scale = 100 if unit == "points" else 1
    higher, lower, sign = (second, first, 1) if difference.value >= 0 else (first, second, -1)
    low, high = sorted(sign * scale * end for end in difference.interval)
    digits = ".1f" if unit == "points" else ".4g"
    by = f"by {abs(scale * difference.value):{digits}} {unit}"
    p = "" if test is None else f", McNemar p {test.p:.2g}"
    found = f"({100 * difference.confidence:g} % interval {low:{digits}} to {high:{digits}}{p})"
    where = f"on the same {difference.num_images:,} images"
    if is_told(difference, test):
        return f"{higher} is better than {lower} {by} {found} {where}"
    seen = "they score the same" if difference.value == 0 else f"{higher} scores higher {by}, which may be chance"
    return f"{first} and {second} can't be told apart {where}: {seen} {found}"


def is_told(difference: Difference, test: McNemar | None) -> bool:
    """Whether one of two models is better: the interval leaves out 0 and, where there is one, the test says so too.

    Of few images the two may disagree; then neither model is called better.
    """
    return difference.is_told and (test is None or test.p <= 1 - difference.confidence)


def _difference(
    value: float, drawn: NDArray[np.float64], *, num: int, confidence: float, num_images: int
) -> Difference:
    low, high = np.quantile(drawn, [0.5 - confidence / 2, 0.5 + confidence / 2])
    return Difference(
        value=value, interval=(float(low), float(high)), confidence=confidence, num=num, num_images=num_images
    )


def _check(num: int, confidence: float) -> None:
    if num < 1:
        raise ValueError(f"num is {num}; expected at least 1, and some thousands for an interval.")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}; expected a probability between 0 and 1, such as 0.95.")


def _values(outcomes: Outcomes, metric: str) -> NDArray[np.float64]:
    if metric == "accuracy":
        return outcomes.is_right.astype(np.float64)
    if metric == "loss":
        return outcomes.losses
    raise ValueError(f"metric is {metric!r}; expected accuracy, loss or a function of probabilities and targets.")


def _same(a: Outcomes, b: Outcomes) -> NDArray[np.int64]:
    """``(N,)`` the place in `b` of each image of `a`.

    Raises:
        ValueError: if they are of different images, contents or labels.
    """
    if a.images.task != b.images.task:
        raise ValueError(f"One is of images labelled for {a.images.task}, the other for {b.images.task}. Give a pair.")
    place_of = {name: place for place, name in enumerate(b.images.ids)}
    apart = sorted({*a.images.ids} ^ place_of.keys())
    if apart:
        raise ValueError(
            f"The two are of different images: only one of them has {some(apart)}. Models compare on the same images. "
            "Score both on one image set, such as learn.outcomes('valid') with one split."
        )
    places = np.array([place_of[name] for name in a.images.ids], dtype=np.int64)
    contents = (a.images.digests().values != b.images.digests().values[places]).any(1)
    labels = [one != other for one, other in zip(_labels(a), _labels(b, places), strict=True)]
    for what, differ in (("content", contents), ("label", np.array(labels, dtype=bool))):
        if differ.any():
            first = a.images.ids[int(np.flatnonzero(differ)[0])]
            raise ValueError(
                f"{int(differ.sum()):,} of the {len(a):,} images have another {what} in the second (first: {first}), "
                "so the two were scored on different things. Score both on one image set."
            )
    return places


def _labels(outcomes: Outcomes, places: NDArray[np.int64] | None = None) -> Sequence[Any]:
    """What each image is labelled, by name, whatever the class table."""
    targets = outcomes.targets if places is None else outcomes.targets[places]
    if outcomes.images.task == "single":
        return [outcomes.classes[place] for place in targets.tolist()]
    order = np.argsort(np.array(outcomes.classes, dtype=object))
    return [(row, *sorted(outcomes.classes)) for row in map(tuple, targets[:, order].tolist())]
