"""Outcomes: what a model said of labelled images, image by image - to find where it is wrong, and how sure it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from featstore.images.image_set import ImageSet
from featstore.images.views import View
from training.scores.class_report import ClassReport
from training.scores.metrics import THRESHOLD, binned, calibration_error, check_said, wilson_interval

if TYPE_CHECKING:
    from training.plots import Axes, Plot

Order = Literal["loss", "uncertain", "sure"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Outcomes:
    """What a model said of N labelled images; made by `Learner.outcomes`.

    Attributes:
        images: these images, in order.
        classes: column k of `probabilities` is of class k.
        probabilities: ``(N, K)``; of regression the numbers.
        targets: ``(N,)`` class numbers; ``(N, K)`` of several labels or numbers.
        losses: ``(N,)``, each image's own loss by the task: cross-entropy; its mean over the classes for several
            labels; of regression the mean squared error over the columns, in their units.
        view: what the model saw of each; None: unknown.
        notes: what should be known of scores of these images, as sentences: were some trained on, left out?
    """

    images: ImageSet
    classes: tuple[str, ...]
    probabilities: NDArray[np.float64]
    targets: NDArray[np.float64] | NDArray[np.int64]
    losses: NDArray[np.float64]
    view: View | None = None
    notes: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        images: ImageSet,
        logits: Tensor,
        targets: Tensor,
        said: NDArray[np.float64],
        view: View | None = None,
        notes: tuple[str, ...] = (),
    ) -> Outcomes:
        """Those of all `images` by logits ``(N, K)``, targets, and the probabilities (or numbers) that these are.

        Raises:
            ValueError: if some aren't finite: no class is the most probable one.
        """
        check_said(said)
        wide, wanted = logits.cpu().double(), targets.cpu()
        if images.task == "single":
            losses = F.cross_entropy(wide, wanted, reduction="none")
        elif images.task == "multi":
            losses = F.binary_cross_entropy_with_logits(wide, wanted.double(), reduction="none").mean(1)
        else:
            losses = F.mse_loss(wide, wanted.double(), reduction="none").mean(1)
        return cls(
            images=images,
            classes=images.classes,
            probabilities=said,
            targets=wanted.numpy(),
            losses=losses.numpy(),
            view=view,
            notes=notes,
        )

    def __len__(self) -> int:
        return len(self.losses)

    def __repr__(self) -> str:
        if self.images.task != "single":
            return f"Outcomes({len(self):,} images, mean loss {self.losses.mean():.4g})"
        return f"Outcomes({len(self):,} images, {int((~self.is_right).sum()):,} wrong)"

    @property
    def predicted(self) -> NDArray[np.int64]:
        """``(N,)`` the most probable class of each, of the task "single"."""
        self._single("what was predicted")
        most: NDArray[np.int64] = self.probabilities.argmax(1)
        return most

    @property
    def is_right(self) -> NDArray[np.bool_]:
        """``(N,)`` whether that is its class."""
        right: NDArray[np.bool_] = self.predicted == self.targets
        return right

    def confusion(self) -> NDArray[np.int64]:
        """``(K, K)``: how many images of class i (the row) were taken for class j, as scikit-learn counts them."""
        from sklearn.metrics import confusion_matrix

        counts: NDArray[np.int64] = confusion_matrix(self.targets, self.predicted, labels=range(len(self.classes)))
        return counts

    def most_confused(self, least: int = 1) -> list[tuple[str, str, int]]:
        """(class, what it was taken for, how often) for each pair that happened so often, the commonest first."""
        counts = self.confusion()
        np.fill_diagonal(counts, 0)
        pairs = [(int(counts[at]), at) for at in zip(*np.nonzero(counts >= max(1, least)), strict=True)]
        pairs.sort(key=lambda each: (-each[0], each[1]))
        return [(self.classes[actual], self.classes[taken], count) for count, (actual, taken) in pairs]

    def thresholds(self) -> dict[str, float]:
        """Class -> the probability from which its label should count, for the highest F1 on these images.

        Of several labels an image. Choose by images held out, and score others with them: ``by_class(thresholds)``. A
        class that no image has keeps 0.5.
        """
        from sklearn.metrics import precision_recall_curve

        if self.images.task != "multi":
            raise ValueError(
                f"Thresholds are of several labels an image, and these images are {self.images.task}. Expected the "
                "task multi."
            )
        found: dict[str, float] = {}
        for name, actual, said in zip(self.classes, self.targets.T, self.probabilities.T, strict=True):
            found[name] = THRESHOLD
            if (actual > 0).any():
                precision, recall, places = precision_recall_curve(actual > 0, said)
                scores = 2 * precision * recall / np.maximum(precision + recall, np.finfo(float).tiny)
                found[name] = float(places[scores[:-1].argmax()])  # the last has no threshold
        return found

    def by_class(self, thresholds: Mapping[str, float] | None = None) -> dict[str, dict[str, float]]:
        """Class -> precision, recall, f1 and support (how many images it has), as scikit-learn computes them.

        What is 0 / 0 counts as 0.

        Args:
            thresholds: of several labels an image, class -> the probability from which it counts; default: 0.5.
        """
        from sklearn.metrics import precision_recall_fscore_support

        actual, said = self._decided(thresholds)
        labels = list(range(len(self.classes)))
        if len(labels) == 1:  # of one column scikit-learn scores the labels 0 and 1
            actual, said, labels = actual.ravel(), said.ravel(), [1]
        columns = precision_recall_fscore_support(actual, said, labels=labels, zero_division=0)
        names = ("precision", "recall", "f1", "support")
        return {
            name: {column: float(value) for column, value in zip(names, row, strict=True)}
            for name, row in zip(self.classes, zip(*columns, strict=True), strict=True)
        }

    def per_class(self, thresholds: Mapping[str, float] | None = None) -> ClassReport:
        """As `by_class`, with 95 % intervals and means; prints as a table."""
        return ClassReport.of(self.classes, *self._decided(thresholds))

    def reliability(self, bins: int = 10) -> list[dict[str, float]]:
        """A row for each range of probability that something was predicted with: what it promises and what it holds.

        ``from`` and ``to`` of the range, ``images``, their mean ``probability``, and the ``share`` of them that is
        right, with the ends of its 95 % interval (Wilson's). Empty ranges have no row.
        """
        self._single("how far probabilities hold")
        counts, said, right = binned(self.probabilities.max(1), self.is_right, bins)
        rows = []
        for place in np.flatnonzero(counts).tolist():
            images, num_right = int(counts[place]), int(right[place])
            low, high = wilson_interval(num_right, images)
            rows.append(
                {
                    "from": place / bins,
                    "to": (place + 1) / bins,
                    "images": images,
                    "probability": float(said[place]) / images,
                    "share": num_right / images,
                    "share_from": low,
                    "share_to": high,
                }
            )
        return rows

    def calibration_error(self, bins: int = 15) -> float:
        """The expected calibration error of the most probable class, as `metrics.calibration_error`."""
        return calibration_error(self.probabilities.max(1), self.is_right, bins)

    def places(self, by: Order = "loss", *, is_right: bool | None = None) -> NDArray[np.int64]:
        """The images' places, ordered.

        Args:
            by: ``loss``: the largest first; ``uncertain``: the least probability of what was predicted first; ``sure``:
                the greatest first.
            is_right: only of those that were predicted rightly (True) or wrongly (False).
        """
        if by not in ("loss", "uncertain", "sure"):
            raise ValueError(f"{by!r} is no order. Expected loss, uncertain or sure.")
        if by == "loss":
            key = -self.losses
        else:
            self._single(f"the order {by!r}")
            key = self.probabilities.max(1) * (1 if by == "uncertain" else -1)
        places = np.argsort(key, kind="stable")
        return places if is_right is None else places[self.is_right[places] == is_right]

    def words(self, place: int) -> str:
        """What was said of an image: ``dog for cat, 0.93, loss 2.66``."""
        loss = f"loss {self.losses[place]:.3g}"
        if self.images.task != "single":
            return loss
        actual, taken = self.classes[self.targets[place]], self.classes[self.predicted[place]]
        said = actual if actual == taken else f"{taken} for {actual}"
        return f"{said}, {self.probabilities[place].max():.2f}, {loss}"

    # matplotlib loads only where a plot is wanted

    def plot_confusion(self, axes: Axes | None = None) -> Axes:
        """How many images of each class (a row) were taken for each (a column)."""
        from training.plots import confusion_matrix

        return confusion_matrix(self.confusion(), self.classes, axes)

    def plot_most_confused(self, least: int = 1, axes: Axes | None = None, *, num_pairs: int = 20) -> Axes:
        """The pairs of `most_confused` as bars, the commonest on top; the title says how many aren't drawn."""
        from training.plots import most_confused

        return most_confused(self.most_confused(least), axes, num_pairs=num_pairs)

    def plot_reliability(self, bins: int = 10, axes: Axes | None = None) -> Axes:
        """The share of images that is right by the probability it was said with: on the diagonal the two are equal."""
        from training.plots import reliability

        return reliability(self.reliability(bins), axes, error=self.calibration_error(bins))

    def plot_samples(self, by: Order = "loss", *, is_right: bool | None = None, num_images: int = 9) -> Plot:
        """Images with what was said of them: those with the largest loss, or the least or most sure ones.

        The pixels are those that the model got, before normalisation.

        Args:
            by: ``loss``, ``uncertain`` or ``sure``, as in `places`.
            is_right: only of those that were predicted rightly (True) or wrongly (False).
            num_images: at most so many.

        Raises:
            ImageError: naming the first image that can't be read or rendered.
        """
        from training.plots import samples

        if self.view is None:
            raise ValueError("These outcomes don't say what the model saw of the images. Take those of a learner.")
        places = self.places(by, is_right=is_right)[:num_images]
        return samples(self.images.select(places), self.view, [self.words(place) for place in places.tolist()])

    def _decided(self, thresholds: Mapping[str, float] | None) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Which classes each image has, and which it is said to have, ``(N, K)``."""
        self._labels("scores by class")
        if thresholds is not None and (self.images.task != "multi" or {*thresholds} != {*self.classes}):
            raise ValueError(
                f"thresholds are of {', '.join(thresholds)}; expected one of each class, {', '.join(self.classes)}, of "
                f"images of the task multi, and these are {self.images.task}. Give what thresholds() gives."
            )
        if self.images.task == "single":
            numbers = np.arange(len(self.classes))
            return self.targets[:, None] == numbers, self.predicted[:, None] == numbers
        least = [THRESHOLD if thresholds is None else thresholds[name] for name in self.classes]
        return self.targets > 0, self.probabilities >= np.array(least)

    def _single(self, what: str) -> None:
        if self.images.task != "single":
            raise ValueError(
                f"{what[0].upper()}{what[1:]} is of images with one class each, and these are {self.images.task}. "
                "Look at places('loss'), probabilities and targets."
            )

    def _labels(self, what: str) -> None:
        if self.images.task == "regression":
            raise ValueError(f"{what[0].upper()}{what[1:]} are of labels, and these images have numbers.")
