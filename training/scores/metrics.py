"""Metrics: one number about logits and targets, taken over all rows at once, never averaged over batches.

Every metric maps logits `(N, K)` and targets to a Python float, on whatever device they lie. Targets are class numbers
`(N,)` for the task "single", n-hot `(N, K)` for "multi" and numbers `(N, K)` for "regression", where logits are the
numbers that a model gives. Rows without a target (-1, NaN) have no place here: they are refused, so leave them out
first. Logits that hold NaN give NaN: a diverged model has no score.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from statistics import NormalDist, fmean
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from featstore.words import printable

# scikit-learn is imported where it is used: it takes 0.6 s, and a program that only prints its help need not wait.

Metric = Callable[[Tensor, Tensor], float]
"""Maps logits `(N, K)` and targets to one number."""

Loss = Callable[[Tensor, Tensor], Tensor]
"""Maps logits `(N, K)` and targets to a scalar tensor that can be differentiated."""

Average = Literal["macro", "micro", "weighted"]
"""How the F1 scores of the classes become one: their mean, one score over all decisions, the mean by frequency."""

TASKS = ("single", "multi", "regression")

THRESHOLD = 0.5
"""Probability from which a label of the task "multi" counts."""


def loss(task: str, scale: Tensor | None = None) -> Loss:
    """The mean loss of `task`: cross-entropy ("single"), binary cross-entropy with logits, or squared error.

    Cross-entropy takes int64 class numbers `(N,)`, binary cross-entropy n-hot targets `(N, K)` in the dtype of the
    logits, the squared error numbers `(N, K)`.

    Args:
        task: one of `TASKS`.
        scale: `(K,)`, of regression: the squared error is taken in these units, the spread of the training targets,
            so that a loss of 1 is that of a guess at their mean and the same rates serve whatever the units are.
    """
    _check_task(task)
    if task == "regression":
        return partial(squared_error, scale=scale)
    return F.cross_entropy if task == "single" else F.binary_cross_entropy_with_logits


def squared_error(values: Tensor, targets: Tensor, *, scale: Tensor | None) -> Tensor:
    """The mean squared error in units of `scale`, ``(K,)``."""
    errors = values - targets
    return (errors if scale is None else errors / scale).square().mean()


def default_metrics(task: str, num_classes: int) -> dict[str, Metric]:
    """The metrics by name that a run of `task` reports beside its loss.

    >>> list(default_metrics("single", num_classes=37)), list(default_metrics("multi", num_classes=37))
    (['accuracy', 'top5', 'f1'], ['map', 'f1'])
    >>> list(default_metrics("regression", num_classes=1))
    ['mae', 'rmse', 'r2']
    """
    _check_task(task)
    if task == "regression":
        return {"mae": mean_absolute_error, "rmse": root_mean_squared_error, "r2": r2}
    if task == "multi":
        return {"map": mean_average_precision, "f1": f1_multi}
    if num_classes > 5:
        return {"accuracy": accuracy, "top5": top_k_accuracy, "f1": f1}
    return {"accuracy": accuracy, "f1": f1}


RECORDED = ("epoch", "train_loss", "valid_loss", "lr", "seconds", "loss", "calibration_error", "images")
"""What records and scores hold beside the metrics."""


def by_name(metrics: Iterable[Metric] | str, own: Mapping[str, Metric]) -> dict[str, Metric]:
    """A person's metrics under their names, that of the function or of the object's class.

    Args:
        metrics: of a person; one of `own` changes nothing.
        own: the task's, by name.

    Raises:
        TypeError: for what isn't a list of functions.
        ValueError: if two have the same name, or one has that of another number on record.
    """
    if isinstance(metrics, str) or not isinstance(metrics, Iterable):
        raise TypeError(f"metrics is {metrics!r}; expected functions of (logits, targets) in a list, as [my_metric].")
    found: dict[str, Metric] = {}
    for metric in metrics:
        if not callable(metric):
            raise TypeError(f"metrics has {metric!r}; expected functions of (logits, targets) that give one number.")
        name = str(getattr(metric, "__name__", type(metric).__name__))
        taken = [*RECORDED, *own]
        if name in taken and own.get(name) is not metric:
            raise ValueError(
                f"A metric is called {name}, as another number on record is, which it would replace. Expected a name "
                f"other than {', '.join(taken)}. Name the function differently."
            )
        if name in found:
            raise ValueError(
                f"Two metrics are called {name}, and records hold one number a name. Name them differently."
            )
        found[name] = metric
    return found


def loss_value(loss: Loss, logits: Tensor, targets: Tensor) -> Tensor:
    """What `loss` gives for all rows: a tensor of one number, which hangs on the logits where these have gradients.

    Raises:
        TypeError: if it gives anything else.
    """
    value = loss(logits, targets)
    if not isinstance(value, Tensor) or value.numel() != 1:
        shape = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else _shown(value)
        raise TypeError(
            f"The loss gave {shape}; expected a tensor of one number, for {len(logits):,} rows together. Return their "
            "mean: values.mean()."
        )
    if logits.requires_grad and not value.requires_grad:
        raise TypeError(
            "The loss gave a number without a gradient, so nothing can be learnt by it. Expected one computed from the "
            "logits by torch's operations alone, without detach(), item() or numpy."
        )
    return value


def loss_number(loss: Loss, logits: Tensor, targets: Tensor) -> float:
    """What `loss` gives for all rows, as a number on record.

    It gets copies: a person's own may write into what it gets, and that is scored by others yet. Errors as of
    `loss_value`.
    """
    return float(loss_value(loss, logits.clone(), targets.clone()))


def metric_values(metrics: Mapping[str, Metric], logits: Tensor, targets: Tensor) -> dict[str, float]:
    """What `metrics` give for all rows, by name; each gets copies, as in `loss_number`.

    Raises:
        TypeError: if one gives anything but a number.
    """
    return {name: _number(name, metric(logits.clone(), targets.clone())) for name, metric in metrics.items()}


def _number(name: str, value: Any) -> float:
    try:
        if not isinstance(value, str | bytes):
            return float(value)
    except (TypeError, ValueError, RuntimeError):  # the last is torch's, of several numbers
        pass
    raise TypeError(f"The metric {name} gave {_shown(value)}; expected one number. Return a float.")


def _shown(value: object) -> str:
    return printable(f"{value!r:.60}", is_one_line=True)


def accuracy(logits: Tensor, targets: Tensor) -> float:
    """The share of rows whose largest logit is the target's; of equal logits the first class counts."""
    _check_single(logits, targets)
    if _has_nan(logits):
        return math.nan
    return _share(logits.argmax(dim=1) == targets)


def top_k_accuracy(logits: Tensor, targets: Tensor, k: int = 5) -> float:
    """The share of rows whose target is among the `k` largest logits; of equal logits the first classes count.

    Raises:
        ValueError: if `k` is not below the number of classes, where every answer would be right.
    """
    _check_single(logits, targets)
    num_classes = logits.shape[1]
    if not 1 <= k < num_classes:
        raise ValueError(
            f"k is {k} with {num_classes} classes; top-k accuracy says something for 1 <= k < {num_classes}. "
            "Pass a smaller k, or use accuracy."
        )
    if _has_nan(logits):
        return math.nan
    # topk leaves the order of equal logits open; a stable sort settles it as argmax does.
    best = logits.argsort(dim=1, descending=True, stable=True)[:, :k]  # (N, k)
    return _share((best == targets[:, None]).any(dim=1))


def expected_calibration_error(logits: Tensor, targets: Tensor, bins: int = 15) -> float:
    """The `calibration_error` of the class with the largest logit and its softmax."""
    _check_single(logits, targets)
    if _has_nan(logits):
        return math.nan
    sure, taken = torch.softmax(_on_cpu(logits).double(), dim=1).max(dim=1)
    return calibration_error(_array(sure), _array(taken == _on_cpu(targets)), bins)


def calibration_error(sure: NDArray[np.float64], is_right: NDArray[np.bool_], bins: int = 15) -> float:
    """How far probabilities lie from shares, 0 to 1: Guo et al., arXiv:1706.04599, section 2.

    Of images in `bins` ranges of probability, equally wide, how far the share that is right lies from the mean
    probability; the mean over the images.

    Args:
        sure: ``(N,)`` the probability of what was predicted.
        is_right: ``(N,)`` whether that is so.
        bins: how many ranges.
    """
    counts, said, right = binned(sure, is_right, bins)
    return float(np.abs(right - said).sum() / counts.sum())


def binned(
    sure: NDArray[np.float64], is_right: NDArray[np.bool_], bins: int = 15
) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]:
    """Of each of `bins` ranges of probability, ``(bins,)``: images, sum of their probabilities, and how many are right.

    Ranges are equally wide and hold their upper end, (0, 1/bins], ..., as in the paper.
    """
    if bins < 1:
        raise ValueError(f"bins is {bins}; expected at least 1.")
    place = np.clip(np.ceil(sure * bins).astype(int) - 1, 0, bins - 1)
    counts: NDArray[np.int64] = np.bincount(place, minlength=bins)
    said, right = (np.bincount(place, each, minlength=bins).astype(np.float64) for each in (sure, is_right))
    return counts, said, right


def f1(logits: Tensor, targets: Tensor, average: Average = "macro") -> float:
    """The F1 score of the classes with the largest logits, as scikit-learn's `f1_score`.

    Averaged over the classes that occur among targets or predictions.
    """
    _check_single(logits, targets)
    _check_average(average)
    if _has_nan(logits):
        return math.nan
    return _f1(_array(targets), _array(logits.argmax(dim=1)), average)


def f1_multi(logits: Tensor, targets: Tensor, average: Average = "macro", threshold: float = THRESHOLD) -> float:
    """The F1 score of the classes whose probability, the sigmoid of the logit, reaches `threshold`.

    Averaged over the classes that occur among targets or predictions; NaN if none does.
    """
    _check_multi(logits, targets)
    _check_average(average)
    if _has_nan(logits):
        return math.nan
    predictions = torch.sigmoid(_on_cpu(logits).double()) >= threshold
    # scikit-learn reads a single column as two classes, its negatives being the other one.
    labels = [1] if logits.shape[1] == 1 else None
    return _f1(_array(targets).astype(int), _array(predictions).astype(int), average, labels)


def mean_average_precision(logits: Tensor, targets: Tensor) -> float:
    """The mean over classes of scikit-learn's `average_precision_score`, for n-hot targets.

    A class without a positive row has no average precision and is left out, so the mean is over
    `(targets > 0).any(dim=0).sum()` classes; NaN if that is none.
    """
    from sklearn.metrics import average_precision_score

    _check_multi(logits, targets)
    if _has_nan(logits):
        return math.nan
    # Only the ranking matters: logits have it exactly, where a sigmoid would round large ones to ties at 1.
    scores, positives = _array(_on_cpu(logits).double()), _array(targets).astype(bool)
    occurring = np.flatnonzero(positives.any(axis=0))
    if occurring.size == 0:
        return math.nan
    return float(np.mean([average_precision_score(positives[:, label], scores[:, label]) for label in occurring]))


def mean_absolute_error(values: Tensor, targets: Tensor) -> float:
    """The mean of how far numbers lie from their targets, in the targets' units; over several numbers their mean."""
    return _number_score("mean_absolute_error", values, targets)


def root_mean_squared_error(values: Tensor, targets: Tensor) -> float:
    """The root of the mean squared error of each number, in the targets' units; over several numbers their mean."""
    return _number_score("root_mean_squared_error", values, targets)


def r2(values: Tensor, targets: Tensor) -> float:
    """The share of the targets' variance that is explained, scikit-learn's `r2_score`; NaN for fewer than two rows.

    1 is right everywhere, 0 no better than the targets' mean.
    """
    return math.nan if len(targets) < 2 else _number_score("r2_score", values, targets)


def _number_score(name: str, values: Tensor, targets: Tensor) -> float:
    from sklearn import metrics

    _check_numbers(values, targets)
    if _has_nan(values):
        return math.nan
    return float(getattr(metrics, name)(_array(_on_cpu(targets).double()), _array(_on_cpu(values).double())))


_RANGES = {
    **dict.fromkeys(("accuracy", "top5", "f1", "map", "calibration_error"), (0.0, 1.0)),
    **dict.fromkeys(("mae", "rmse"), (0.0, math.inf)),
    "r2": (-math.inf, 1.0),
}
"""What a score can be, by its name; a person's own, and a loss, may be any number."""


def student_interval(name: str, values: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """Where the mean of a score over other folds, seeds or draws lies, by Student's t, within what it can be.

    Args:
        name: of the score.
        values: two or more, one a fold.
        confidence: of it.
    """
    from scipy.stats import t  # type: ignore[import-untyped]  # scikit-learn brings it

    mean, (least, most) = fmean(values), _RANGES.get(name, (-math.inf, math.inf))
    half = float(t.ppf(0.5 + confidence / 2, len(values) - 1)) * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return max(mean - half, least), min(mean + half, most)  # NaN stays NaN in this order


def wilson_interval(correct: int, total: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a proportion: where the true accuracy lies if `correct` of `total` images are right.

    >>> low, high = wilson_interval(correct=4, total=4)
    >>> f"{low:.2f}-{high:.2f}"
    '0.51-1.00'
    """
    if not 0 <= correct <= total or total < 1:
        raise ValueError(f"{correct} of {total} is no proportion; pass 0 <= correct <= total with total at least 1.")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}; pass a probability between 0 and 1, such as 0.95.")
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share = correct / total
    scale = 1 + z * z / total
    centre = (share + z * z / (2 * total)) / scale
    half = z * math.sqrt(share * (1 - share) / total + (z / (2 * total)) ** 2) / scale
    # The ends are exact where all or none are right; arithmetic would leave them a rounding error off.
    return 0.0 if correct == 0 else centre - half, 1.0 if correct == total else centre + half


_SCORES = {"map": "mAP", "f1": "F1", "mae": "mean absolute error", "rmse": "RMSE", "r2": "R2", "loss": "loss"}
"""Metric -> how a result line names it, where there is no accuracy."""


def scores_line(split: str, scored: Mapping[str, Any]) -> str:
    """The scores of a split for people: the accuracy with its interval, or what its task has instead."""
    count = scored["images"]
    accuracy = scored.get("accuracy")
    if accuracy is not None:
        low, high = wilson_interval(round(accuracy * count), int(count))
        return f"{split} accuracy {accuracy:.3f} (95 % interval {low:.3f}-{high:.3f}, {count:,} images)"
    digits = ".4g" if "mae" in scored else ".3f"
    words = [f"{words} {scored[name]:{digits}}" for name, words in _SCORES.items() if scored.get(name) is not None]
    return f"{split} {', '.join(words)} ({count:,} images)"


def _share(is_right: Tensor) -> float:
    return int(is_right.sum()) / len(is_right)


def _f1(
    targets: NDArray[Any], predictions: NDArray[Any], average: Average, labels: Sequence[int] | None = None
) -> float:
    from sklearn.metrics import f1_score

    # A class in neither array has no F1 score; NaN keeps it out of the average where 0 would pull that down.
    return float(f1_score(targets, predictions, labels=labels, average=average, zero_division=np.nan))


def check_said(values: NDArray[np.float64]) -> None:
    """Checks that probabilities, or numbers, ``(N, K)`` say something of each image.

    The largest of several NaN is the first: a head that diverged would count as predicting the first class.

    Raises:
        ValueError: if some aren't finite.
    """
    is_said = np.isfinite(values).all(1)
    if not is_said.all():
        raise ValueError(
            f"Some logits aren't finite, those of {int((~is_said).sum()):,} of {len(values):,} images, so they predict "
            "nothing. Train the model again."
        )


def _has_nan(logits: Tensor) -> bool:
    return bool(logits.isnan().any())


def _array(tensor: Tensor) -> NDArray[Any]:
    array: NDArray[Any] = _on_cpu(tensor).numpy()
    return array


def _on_cpu(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu()  # before any double(): not every device has float64


def _check_task(task: str) -> None:
    if task not in TASKS:
        raise ValueError(f"The task {task!r} is unknown; pass one of {', '.join(TASKS)}.")


def _check_average(average: str) -> None:
    if average not in ("macro", "micro", "weighted"):
        raise ValueError(f"The average {average!r} is unknown; pass one of macro, micro, weighted.")


def _check_single(logits: Tensor, targets: Tensor) -> None:
    _check_logits(logits)
    rows, num_classes = logits.shape
    if targets.shape != (rows,) or targets.is_floating_point() or targets.dtype == torch.bool:
        raise ValueError(
            f"Targets are {targets.dtype} of shape {tuple(targets.shape)}; logits of shape {tuple(logits.shape)} need "
            f"class numbers, integers of shape ({rows},). For n-hot targets use the metrics of the task multi."
        )
    low, high = int(targets.min()), int(targets.max())
    if low < 0 or high >= num_classes:
        raise ValueError(
            f"Targets reach from {low} to {high}; with {num_classes} classes they lie in 0 to {num_classes - 1}. "
            "Leave unlabelled rows (-1) out, and give logits and targets the same class table."
        )


def _check_multi(logits: Tensor, targets: Tensor) -> None:
    _check_logits(logits)
    if targets.shape != logits.shape:
        raise ValueError(
            f"Targets have shape {tuple(targets.shape)}; logits of shape {tuple(logits.shape)} need n-hot targets of "
            "the same shape. For class numbers use the metrics of the task single."
        )
    if not bool(((targets == 0) | (targets == 1)).all()):
        raise ValueError(
            f"Targets reach from {targets.min().item():g} to {targets.max().item():g}; n-hot targets are 0 and 1. "
            "Leave unlabelled rows out, and turn soft labels into decisions first."
        )


def _check_numbers(values: Tensor, targets: Tensor) -> None:
    _check_logits(values)
    if targets.shape != values.shape or not bool(targets.isfinite().all()):
        raise ValueError(
            f"Targets are of shape {tuple(targets.shape)}; numbers of shape {tuple(values.shape)} need finite targets "
            "of the same shape. Leave unlabelled rows (NaN) out."
        )


def _check_logits(logits: Tensor) -> None:
    if logits.ndim != 2 or logits.numel() == 0 or not logits.is_floating_point():
        raise ValueError(
            f"Logits are {logits.dtype} of shape {tuple(logits.shape)}; a metric needs floating-point logits (N, K) "
            "with at least one row and one class."
        )
