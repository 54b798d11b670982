"""Losses: what a fit descends, where it differs from the loss that is on record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Literal, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from featstore.words import some
from training.scores.metrics import Loss, loss_value, squared_error

ClassWeights: TypeAlias = Literal["balanced"] | Sequence[float] | Mapping[str, float]


def smoothed_or_weighted(
    plain: Loss,
    task: str,
    targets: Tensor,
    classes: Sequence[str],
    *,
    label_smoothing: float,
    class_weights: ClassWeights | None,
    is_own: bool,
) -> Loss:
    """The loss of training steps: `plain`, or the task's with label smoothing or weights of classes.

    Scores are of the plain loss all the same, so that they can be compared with each other.

    Args:
        plain: the loss of scores.
        task: single, multi or regression.
        targets: of all training images.
        classes: in order.
        label_smoothing: share of each target that goes to all classes alike, as torch's.
        class_weights: one a class, in order or by name; ``balanced``: as scikit-learn's, of the training images. With
            several labels an image they weigh the positive ones; balanced is negatives over positives then.
        is_own: whether `plain` is a person's own.

    Raises:
        ValueError: where the task has none, for a person's own loss, or for weights of other classes than these.
    """
    if not label_smoothing and class_weights is None:
        return plain
    name = "label_smoothing" if label_smoothing else "class_weights"
    if is_own:
        raise ValueError(f"{name} changes the task's own loss, and this learner has loss=. Put it into that one.")
    if task == "regression" or (task == "multi" and label_smoothing):
        raise ValueError(f"{name} was given, which the task {task} has no meaning for. Leave it out.")
    weights = None if class_weights is None else _weights(class_weights, task, targets, classes)
    if task == "multi":
        return partial(_with_pos_weight, weights=weights)
    return partial(_cross_entropy, label_smoothing=label_smoothing, weights=weights)


def batch_weight(loss: Loss, targets: Tensor) -> Tensor | int:
    """What a batch counts beside the others of its step, if all of them are to be as one.

    The loss of weighted classes is a mean by their weights, so of a batch the sum of these; of any other loss the
    number of rows.
    """
    if isinstance(loss, partial) and loss.func is _cross_entropy and loss.keywords["weights"] is not None:
        return _total_weight(loss.keywords["weights"].to(targets.device), targets)
    return len(targets)


def separate(loss: Loss, logits: Tensor, targets: Tensor) -> Tensor:
    """What `loss` gives for each of several heads: ``(H,)``, of their logits ``(n, H, K)`` for the same images.

    The task's own losses are computed of all heads together, any other one of each in turn.
    """
    num_rows, num_heads, width = logits.shape
    kind, options = (loss.func, loss.keywords) if isinstance(loss, partial) else (loss, {})
    if kind in (F.cross_entropy, _cross_entropy):
        weights = _like(options.get("weights"), logits)
        flat = targets.repeat_interleave(num_heads, 0)
        smoothing = options.get("label_smoothing", 0.0)
        values = F.cross_entropy(
            logits.reshape(-1, width), flat, weight=weights, label_smoothing=smoothing, reduction="none"
        )
        total = num_rows if weights is None else _total_weight(weights, targets)
        return values.view(num_rows, num_heads).sum(0) / total
    if kind in (F.binary_cross_entropy_with_logits, _with_pos_weight):
        weights = _like(options.get("weights"), logits)
        values = F.binary_cross_entropy_with_logits(
            logits, targets[:, None].expand_as(logits), pos_weight=weights, reduction="none"
        )
        return values.mean((0, 2))
    if kind is squared_error:
        scale = options["scale"]
        errors = logits - targets[:, None]
        return (errors if scale is None else errors / scale).square().mean((0, 2))
    return torch.stack([loss_value(loss, each, targets) for each in logits.unbind(1)])


def _cross_entropy(logits: Tensor, targets: Tensor, *, label_smoothing: float, weights: Tensor | None) -> Tensor:
    own, is_numbered = _like(weights, logits), targets.ndim == 1
    if own is None or weights is None or (is_numbered and bool((weights > 0).all())):
        return F.cross_entropy(logits, targets, weight=own, label_smoothing=label_smoothing)
    # Of mixed targets torch's mean is over rows, and so as many times as large as the weights are; of a batch that
    # weighs nothing it is 0 / 0.
    total = F.cross_entropy(logits, targets, weight=own, label_smoothing=label_smoothing, reduction="sum")
    return total / _total_weight(own, targets)


def _total_weight(weights: Tensor, targets: Tensor) -> Tensor:
    """Of the rows of a batch: class numbers, or probabilities; never zero."""
    weight = weights[targets].sum() if targets.ndim == 1 else (targets @ weights).sum()
    return weight.clamp(min=torch.finfo(weight.dtype).tiny)


def _with_pos_weight(logits: Tensor, targets: Tensor, *, weights: Tensor | None) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, targets, pos_weight=_like(weights, logits))


def _like(weights: Tensor | None, logits: Tensor) -> Tensor | None:
    return None if weights is None else weights.to(logits)


def _weights(given: ClassWeights, task: str, targets: Tensor, classes: Sequence[str]) -> Tensor:
    """One weight a class, float32 ``(K,)``; of a class without a training image 1."""
    if isinstance(given, Mapping):
        if {*given} != {*classes}:
            raise ValueError(
                f"class_weights has the names {some([*map(str, given)])}; expected each of the classes: "
                f"{', '.join(classes)}."
            )
        given = [given[name] for name in classes]
    if not isinstance(given, str):
        weights = torch.tensor([float(each) for each in given])
        if len(weights) != len(classes) or not bool(((weights >= 0) & weights.isfinite()).all()):
            raise ValueError(
                f"class_weights are {list(given)!r}; expected {len(classes)} numbers of at least 0, in the order of "
                f"the classes: {', '.join(classes)}."
            )
        return weights
    weights = torch.ones(len(classes))
    if task == "multi":
        positives = targets.sum(0)
        occurring = positives > 0
        weights[occurring] = ((len(targets) - positives) / positives)[occurring].float()
        return weights
    from sklearn.utils.class_weight import compute_class_weight  # takes 0.6 s to import

    present = np.unique(targets.numpy())
    balanced = compute_class_weight("balanced", classes=present, y=targets.numpy())
    weights[torch.from_numpy(present)] = torch.from_numpy(balanced).float()
    return weights
