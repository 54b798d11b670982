"""Recipes: the two usual jobs as functions, each a few lines over Learner, and the twins of the two commands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from featstore.images.image_set import ImageSet
from featstore.images.views import Augment
from featstore.models.runs import check_free
from featstore.models.staged import StagedModel
from featstore.store.store import FeatureStore
from training.learner import Learner
from training.optim import LearningRate


def train_head(
    model: StagedModel | nn.Module,
    images: ImageSet,
    store: FeatureStore | None = None,
    *,
    freeze_to: str | None = None,
    epochs: int = 10,
    lr: LearningRate | None = None,
    out: str | Path | None = None,
    overwrite: bool = False,
    **options: Any,
) -> Learner:
    """Trains a head (and the stages behind `freeze_to`, if given) and keeps the epoch with the lowest validation loss.

    The function behind ``featstore-train head``. `options` are those of `Learner`; `out` names a run folder.
    """
    if out is not None:
        check_free(Path(out), overwrite=overwrite)
    learn = Learner(model, images, store, **options)
    if freeze_to is not None:
        learn.freeze_to(freeze_to)
    learn.fit(epochs, lr, keep="best")
    if out is not None:
        learn.save(out, overwrite=overwrite)
    return learn


def finetune(
    model_or_run: StagedModel | nn.Module | str | Path,
    images: ImageSet,
    *,
    store: FeatureStore | None = None,
    freeze_to: str | None = None,
    epochs: int,
    lr: LearningRate,
    augment: Augment | None = None,
    out: str | Path | None = None,
    overwrite: bool = False,
    trust_code: bool = False,
    **options: Any,
) -> Learner:
    """Trains everything behind `freeze_to` (None: everything) and keeps the epoch with the lowest validation loss.

    The function behind ``featstore-train finetune``.

    Args:
        model_or_run: a saved run's folder, to go on with its model; or a backbone, which gets a new head.
        images: as in `Learner`; without a split they get the run's.
        store: read where it has what the freeze point needs; otherwise images are read.
        freeze_to: the last frozen stage.
        epochs: as in `Learner.fit`.
        lr: one rate, one a layer group, or (low, high).
        augment: of the training images.
        out: run folder to save.
        overwrite: replaces a run there.
        trust_code: as in `Learner.load`.
        options: further arguments of `Learner`.
    """
    if out is not None:
        check_free(Path(out), overwrite=overwrite)
    settings = {"augment": augment, "on_missing": "images", **options}
    if isinstance(model_or_run, str | Path):
        learn = Learner.load(model_or_run, images, store, trust_code=trust_code, **settings)
    else:
        learn = Learner(model_or_run, images, store, **settings)
    if freeze_to is None:
        learn.unfreeze()
    else:
        learn.freeze_to(freeze_to)
    learn.fit(epochs, lr, keep="best")
    if out is not None:
        learn.save(out, overwrite=overwrite)
    return learn
