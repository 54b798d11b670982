"""Recipes: the two usual jobs as functions, each a few lines over Learner, and the twins of the two commands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from featstore.errors import FeatureStoreError
from featstore.images.image_set import ImageSet
from featstore.images.views import Augment
from featstore.models.runs import FACTS, check_free, located
from featstore.models.staged import StagedModel
from featstore.store.store import FeatureStore
from training.checkpoints import delete_fit, holds_fit, read_fit
from training.choices import CHECKPOINT
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
    resume: bool = False,
    **options: Any,
) -> Learner:
    """Trains a head (and the stages behind `freeze_to`, if given) and keeps the epoch with the lowest validation loss.

    The function behind ``featstore-train head``. `options` are those of `Learner`; `out` names a run folder. The fit
    is kept beside it until the run is saved (`checkpoint_of`), and `resume` goes on from there.
    """
    check_out(out, overwrite=overwrite, resume=resume)
    learn = Learner(model, images, store, **options)
    if freeze_to is not None:
        learn.freeze_to(freeze_to)
    return _fitted(learn, epochs, lr, out, overwrite=overwrite, resume=resume)


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
    resume: bool = False,
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
        out: run folder to save; the fit is kept beside it until then.
        overwrite: replaces a run there.
        resume: goes on with the fit that is kept there, if there is one.
        trust_code: as in `Learner.load`.
        options: further arguments of `Learner`.
    """
    check_out(out, overwrite=overwrite, resume=resume)
    settings = {"augment": augment, "on_missing": "images", **options}
    if isinstance(model_or_run, str | Path):
        learn = Learner.load(model_or_run, images, store, trust_code=trust_code, **settings)
    else:
        learn = Learner(model_or_run, images, store, **settings)
    if freeze_to is None:
        learn.unfreeze()
    else:
        learn.freeze_to(freeze_to)
    return _fitted(learn, epochs, lr, out, overwrite=overwrite, resume=resume)


def checkpoint_of(out: str | Path) -> Path:
    """Where the fit of the run `out` is kept until it is saved: beside it."""
    return Path(f"{Path(out)}{CHECKPOINT}")


def check_out(out: str | Path | None, *, overwrite: bool, resume: bool) -> None:
    """Checks that a run can be saved as `out`; nothing is deleted yet.

    Raises:
        FeatureStoreError: if there is a run, or a fit, that is neither to be replaced nor gone on with.
    """
    if out is None:
        if resume:
            raise ValueError("resume goes on with what is kept beside a run. Give the run: out=.")
        return
    if resume and not overwrite and _is_run(Path(out)) and not holds_fit(checkpoint_of(out)):
        raise FeatureStoreError(
            f"{out} is a saved run, and no fit is kept beside it: it is done, and there is nothing to go on with. Use "
            "it as it is; or train once more into another folder, or in its place with --overwrite (in Python: "
            "overwrite=True)."
        )
    check_free(Path(out), overwrite=overwrite)
    if not resume and not (overwrite and holds_fit(checkpoint_of(out))):
        read_fit(checkpoint_of(out), resume=False)


def _is_run(folder: Path) -> bool:
    return (located(folder) / FACTS).is_file()


def _fitted(
    learn: Learner, epochs: int, lr: LearningRate | None, out: str | Path | None, *, overwrite: bool, resume: bool
) -> Learner:
    checkpoint = None if out is None else checkpoint_of(out)
    if checkpoint is not None and overwrite and not resume:  # as late as can be: what was wrong is said by now
        delete_fit(checkpoint)
    try:
        learn.fit(epochs, lr, keep="best", checkpoint=checkpoint, resume=resume)
    except FloatingPointError:  # from the checkpoint it would come to the same again
        if checkpoint is not None:
            delete_fit(checkpoint)
        raise
    if out is not None and checkpoint is not None:
        learn.save(out, overwrite=overwrite)
        delete_fit(checkpoint)
    return learn
