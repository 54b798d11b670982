"""Calibration: one temperature that logits are divided by, so that a model's probabilities are as sure as it is right.

Guo et al., On Calibration of Modern Neural Networks, arXiv:1706.04599. No prediction changes, only how sure it is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from featstore.digest import Json
from training.sidecar import Dealt

_MOST_STEPS = 200


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """A temperature and what it was fitted to. Prints as a sentence.

    Attributes:
        temperature: above 1 where the model was too sure, below 1 where it was too unsure.
        split: of the images that it was fitted to.
        images: these: how many, and the digest of contents and labels.
        before: scores of these images without it: ``loss`` and, of one class an image, ``calibration_error``.
        after: the same with it. They are of the images that it was fitted to, so a little too good.
    """

    temperature: float
    split: str
    images: Dealt
    before: Mapping[str, float]
    after: Mapping[str, float]

    def __str__(self) -> str:
        changes = [f"{name.replace('_', ' ')} {self.before[name]:.4g} -> {self.after[name]:.4g}" for name in self.after]
        return (
            f"temperature {self.temperature:.4g}, fitted to the {self.images.images:,} images of {self.split}: "
            f"{', '.join(changes)} (of these very images, so a little too good)"
        )

    def facts(self) -> dict[str, Json]:
        """As JSON."""
        return {
            "temperature": self.temperature,
            "split": self.split,
            "images": self.images.facts(),
            "before": dict(self.before),
            "after": dict(self.after),
        }

    @classmethod
    def from_facts(cls, facts: Mapping[str, Json]) -> Calibration:
        """That of a saved run.

        Raises:
            ValueError, KeyError, TypeError: for what `facts` never gave.
        """
        temperature = float(facts["temperature"])
        if not 0 < temperature < math.inf:
            raise ValueError(f"a temperature of {temperature}")
        images = facts["images"]
        return cls(
            temperature=temperature,
            split=str(facts["split"]),
            images=Dealt(int(images["images"]), str(images["digest"])),
            before={name: float(value) for name, value in facts["before"].items()},
            after={name: float(value) for name, value in facts["after"].items()},
        )


def fitted_temperature(logits: Tensor, targets: Tensor, task: str) -> float:
    """The temperature at which the loss of ``logits / temperature`` is lowest.

    The loss is convex in what logits are multiplied by, 1 / temperature, so Newton's method between two bounds finds
    its only optimum, in float64.

    Args:
        logits: ``(N, K)``, of images that weren't trained on.
        targets: class numbers ``(N,)`` of the task "single", n-hot ``(N, K)`` of "multi".
        task: which of them.

    Raises:
        ValueError: for regression, and where there is no optimum: every image is right, so that the surest model is
            the best; or the logits say less than none would.
    """
    if task == "regression":
        raise ValueError(
            "A temperature makes probabilities as sure as they are right, and regression has none. Expected a model of "
            "classes."
        )
    wide, wanted = logits.detach().cpu().double(), targets.detach().cpu()
    if not bool(wide.isfinite().all()):
        raise ValueError("Some logits aren't finite, so no temperature mends them. Train the model again.")
    slope_at = _single if task == "single" else _multi
    low, high, sharpness = 0.0, math.inf, 1.0
    if slope_at(wide, wanted, 0.0)[0] >= 0:
        raise ValueError(
            "These logits are no better than none at all: the loss is lowest where all classes are as likely. There is "
            "no temperature for that. Train the model first, or look whether the labels belong to these images."
        )
    if _is_separated(wide, wanted, task):
        raise ValueError(
            f"All {len(wide):,} images are predicted rightly, so the surer the better, and no temperature is the best. "
            "Hold out more images, until some are wrong."
        )
    for _ in range(_MOST_STEPS):
        slope, curvature = slope_at(wide, wanted, sharpness)
        if slope < 0:
            low = sharpness
        else:
            high = sharpness
        step = sharpness - slope / curvature if curvature > 0 else math.inf
        if not low < step < high:  # Newton's would leave the bounds
            step = 2 * low if math.isinf(high) else (low + high) / 2
        if abs(step - sharpness) <= 1e-13 * sharpness:
            break
        sharpness = step
    return 1 / sharpness


def _single(logits: Tensor, targets: Tensor, sharpness: float) -> tuple[float, float]:
    """First and second derivative of the mean cross-entropy by what logits are multiplied by."""
    said = torch.softmax(sharpness * logits, 1)
    mean = (said * logits).sum(1)
    wanted = logits.gather(1, targets[:, None]).squeeze(1)
    spread = (said * (logits - mean[:, None]).square()).sum(1)
    return float((mean - wanted).mean()), float(spread.mean())


def _multi(logits: Tensor, targets: Tensor, sharpness: float) -> tuple[float, float]:
    said = torch.sigmoid(sharpness * logits)
    return (
        float((logits * (said - targets.double())).mean()),
        float((logits.square() * said * torch.sigmoid(-sharpness * logits)).mean()),
    )


def _is_separated(logits: Tensor, targets: Tensor, task: str) -> bool:
    """Whether no image has a logit on the wrong side."""
    if task == "multi":
        return not bool(((logits > 0) & (targets == 0) | (logits < 0) & (targets > 0)).any())
    is_target = F.one_hot(targets, logits.shape[1]).bool()
    best_other = logits.masked_fill(is_target, -math.inf).amax(1)
    return bool((logits[is_target] >= best_other).all())
