"""Row fits: a head fitted to rows alone, arrays or stored features, by the loop of all fits."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from featstore.digest import digest_json
from featstore.images.fileless import images_by_id
from featstore.images.image_set import ImageSet
from featstore.images.names import Task
from featstore.images.views import View
from featstore.models.modes import mode_of
from featstore.models.staged import StagedModel
from featstore.models.trunk import choose_device
from featstore.notes import logger_of
from featstore.store.features import Features
from training.class_tables import check_learnable
from training.inputs.batches import Batches, num_batches
from training.inputs.derive import FeatureSource
from training.inputs.held import HeldRows, HeldSource, RepeatedRows
from training.inputs.situation import Situation
from training.loop.fit import check_norms
from training.loop.fitting import Fitting
from training.loop.history import History
from training.loop.optim import MakeOptimizer
from training.loop.plan import Plan
from training.scores import metrics as scores
from training.standardised import ValueHead, passes_an_epoch

Rows = Features | HeldRows
"""What a head is fitted to: float32 when they come."""

_BLOCK_BYTES = 64 << 20


@dataclass(frozen=True, kw_only=True, eq=False)
class RowFit:
    """What a fit came to.

    Attributes:
        head: on the CPU, in eval mode.
        history: its epochs.
    """

    head: nn.Module
    history: History


def fit_to_rows(
    head: nn.Module,
    rows: Rows,
    targets: NDArray[Any],
    *,
    classes: Sequence[str],
    task: Task,
    plan: Plan,
    optimizer: str | MakeOptimizer = "adamw",
    batch_size: int = 64,
    device: torch.device | str = "auto",
    seed: int = 0,
    weights: NDArray[np.float64] | None = None,
    quiet: bool = True,
) -> RowFit:
    """Trains `head` on all rows: what `Learner.fit` makes of the same head, rows and settings, to the last bit.

    Args:
        head: as `heads.build_head` gives it, of float32 rows; it is trained itself. In regression by name a
            `ValueHead` around one.
        rows: ``(N, *F)``.
        targets: as those of an image set of that task.
        classes: one logit each, in order.
        task: single, multi or regression.
        plan: what the fit is asked for.
        optimizer: as in `Learner`.
        batch_size: likewise.
        device: likewise.
        seed: likewise.
        weights: ``(N,)`` above 0. Where all are whole numbers each row is there so often, to the last bit; of others
            each pass has as many rows as there are, in shares as the weights say.
        quiet: likewise.

    Raises:
        ValueError: for a single class, and batches of one row where the head has a batch norm.
    """
    model = _headed(head, rows)
    source: Rows | RepeatedRows = rows
    if weights is not None and (weights == np.floor(weights)).all():
        counts, weights = weights.astype(np.int64), None
        source, targets = RepeatedRows(rows, counts), np.repeat(targets, counts, axis=0)
    if weights is not None and plan.sampling != "shuffled":
        raise ValueError(
            f"Rows have weights and sampling is {plan.sampling}, which has its own. Leave one of the two out."
        )
    images = _images_of(targets, classes, task)
    check_learnable(images, images)
    model.to_device(choose_device(device))
    situation = Situation.of(model, images, device=choose_device(device))
    tail = model.unfrozen
    check_norms(tail, batch_size, len(images))
    steps_a_pass = math.ceil(num_batches(len(images), batch_size) / plan.accumulate)
    train = Batches(
        _source(source, images, model.num_frozen),
        situation,
        batch_size=batch_size,
        workers=None,
        passes=passes_an_epoch(tail, steps_a_pass),
        sampling=plan.sampling,
        weights=None if weights is None else weights / weights.mean(),
        mix=plan.changes,
    )
    fitting = Fitting(
        plan=plan,
        model=model,
        train=train,
        valid=None,
        optimizer=optimizer,
        loss=scores.loss(task, head.scale if isinstance(head, ValueHead) else None),
        own_loss=None,
        metrics=scores.default_metrics(task, len(classes)),
        classes=tuple(classes),
        task=task,
        seed=seed,
        say=_silent if quiet else _told,
        is_shown=not quiet,
    )
    history = fitting.begun(None, first_epoch=0).run(_no_snapshot, _no_listener)
    head.cpu().eval()
    return RowFit(head=head, history=history)


def logits_of_rows(head: nn.Module, rows: Rows, *, device: torch.device | str = "auto") -> Tensor:
    """Logits ``(N, K)``, float64, on the CPU.

    They are computed in float64 too, so that those of a row don't depend on which others are asked for: in float32
    products of other shapes are summed in another order.
    """
    chosen = choose_device(device)
    wide = copy.deepcopy(head).double().to(chosen)
    several = max(1, _BLOCK_BYTES // (8 * math.prod(rows.shape[1:])))
    with torch.no_grad(), mode_of(wide, training=False):
        blocks = (rows[start : start + several] for start in range(0, len(rows), several))
        return torch.cat([wide(block.to(chosen).double()).cpu() for block in blocks])


def _images_of(targets: NDArray[Any], classes: Sequence[str], task: Task) -> ImageSet:
    """Images that are known by their places and targets alone."""
    images = images_by_id([*map(str, range(len(targets)))], where="rows of an array", name="rows")
    return replace(images, targets=targets, classes=tuple(classes), task=task)


def _headed(head: nn.Module, rows: Rows) -> StagedModel:
    """A model whose trunk nobody has, and which ends in the rows: only its head trains."""
    shape = rows.shape[1:]
    stage = {
        "name": "rows",
        "layout": "NC" if len(shape) == 1 else "other",
        "shape": [*shape],
        "digest": rows.spec.trunk if isinstance(rows, Features) else digest_json("rows"),
    }
    model = StagedModel.absent([stage], view=View(), name="rows", class_tokens=0)
    return model.with_head(head, cut="rows", reduction="none")


def _source(rows: Rows | RepeatedRows, images: ImageSet, start: int) -> FeatureSource | HeldSource:
    if isinstance(rows, Features):
        return FeatureSource(images=images, features=(rows,), start=start, words=f"set {rows.key[:8]}")
    return HeldSource(images=images, features=(rows,), start=start)


def _silent(text: str | None) -> None:
    """Says nothing."""


def _told(text: str | None) -> None:
    if text is not None:
        logger_of("training").info("%s", text)


def _no_snapshot(cycle: int) -> None:
    raise AssertionError(f"cycle {cycle} of a fit without cycles")


def _no_listener(history: History) -> None:
    """Nobody keeps the epochs beside the fit."""
