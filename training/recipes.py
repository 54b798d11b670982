"""Recipes: the two usual jobs as functions, each a few lines over Learner, and the twins of the two commands.

Under torchrun its processes share the job: a batch is that of all together, and the first one writes the run.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from featstore.errors import FeatureStoreError
from featstore.images.image_set import ImageSet
from featstore.images.views import Augment
from featstore.models.runs import FACTS, check_free, located
from featstore.models.staged import StagedModel
from featstore.store.store import FeatureStore
from training.choices import CHECKPOINT
from training.learner import Learner
from training.loop.averages import SWA
from training.loop.checkpoints import delete_fit, holds_fit, read_fit
from training.loop.history import History
from training.loop.optim import LearningRate
from training.loop.plan import FitOptions, Plan, check_options
from training.loop.ranks import is_first, joined, written_by_first


def train_head(
    model: StagedModel | nn.Module,
    images: ImageSet,
    store: FeatureStore | None = None,
    *,
    freeze_to: str | None = None,
    epochs: int | None = None,
    lr: LearningRate | None = None,
    fit: FitOptions | None = None,
    cycles: int | None = None,
    cycle_len: int = 1,
    cycle_mult: int = 1,
    snapshot: str | Path | None = None,
    out: str | Path | None = None,
    overwrite: bool = False,
    resume: bool = False,
    **options: Any,
) -> Learner:
    """Trains a head (and the stages behind `freeze_to`, if given) and keeps the epoch with the lowest validation loss.

    The function behind ``featstore-train head``. `epochs`, 10 where there are no cycles, and the rest of the fit are
    as in `finetune`; `options` are those of `Learner`. `out` names a run folder. The fit is kept beside it until the
    run is saved (`checkpoint_of`), and `resume` goes on from there.
    """
    start = _fit_of(10 if epochs is None and cycles is None else epochs, lr, cycles, cycle_len, cycle_mult, snapshot)
    with joined(options.pop("device", "auto"), options.pop("workers", None)) as own:
        check_out(out, overwrite=overwrite, resume=resume)
        _check_snapshots(snapshot, overwrite=overwrite, resume=resume)
        learn = Learner(model, images, store, **options, **own)
        if freeze_to is not None:
            learn.freeze_to(freeze_to)
        return _fitted(learn, start, fit, out, snapshot, overwrite=overwrite, resume=resume)


def finetune(
    model_or_run: StagedModel | nn.Module | str | Path,
    images: ImageSet,
    *,
    store: FeatureStore | None = None,
    freeze_to: str | None = None,
    epochs: int | None = None,
    lr: LearningRate | None = None,
    fit: FitOptions | None = None,
    cycles: int | None = None,
    cycle_len: int = 1,
    cycle_mult: int = 1,
    snapshot: str | Path | None = None,
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
        epochs: as in `Learner.fit`; or `cycles`.
        lr: one rate, one a layer group, or (low, high). Default: what the finder suggests.
        fit: further options of the fit; `keep` is ``best`` where they don't say, and ``last`` with `SWA`.
        cycles: how many, in place of epochs: `Learner.fit_cycles`.
        cycle_len: epochs of the first.
        cycle_mult: times so long as the one before is each that follows.
        snapshot: folder of the runs that are saved at the ends of cycles.
        augment: of the training images.
        out: run folder to save; the fit is kept beside it until then.
        overwrite: replaces a run there, the fit that is kept beside it, and snapshots.
        resume: goes on with the fit that is kept there, if there is one.
        trust_code: as in `Learner.load`.
        options: further arguments of `Learner`.
    """
    start = _fit_of(epochs, lr, cycles, cycle_len, cycle_mult, snapshot)
    settings = {"augment": augment, "on_missing": "images", **options}
    with joined(settings.pop("device", "auto"), settings.pop("workers", None)) as own:
        check_out(out, overwrite=overwrite, resume=resume)
        _check_snapshots(snapshot, overwrite=overwrite, resume=resume)
        if isinstance(model_or_run, str | Path):
            learn = Learner.load(model_or_run, images, store, trust_code=trust_code, **settings, **own)
        else:
            learn = Learner(model_or_run, images, store, **settings, **own)
        if freeze_to is None:
            learn.unfreeze()
        else:
            learn.freeze_to(freeze_to)
        return _fitted(learn, start, fit, out, snapshot, overwrite=overwrite, resume=resume)


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


def _fit_of(
    epochs: int | None,
    lr: LearningRate | None,
    cycles: int | None,
    cycle_len: int,
    cycle_mult: int,
    snapshot: str | Path | None,
) -> Callable[[Learner, FitOptions], History]:
    """The fit that is asked for, of a learner that isn't there yet.

    Raises:
        ValueError: if it isn't either of epochs or of cycles.
    """
    if (epochs is None) == (cycles is None):
        said = "Nothing says how long to train" if epochs is None else f"epochs={epochs} and cycles={cycles} both do"
        raise ValueError(f"{said}. Expected one of epochs, such as epochs=5, and cycles, such as cycles=3. Give one.")
    if epochs is not None:
        if (cycle_len, cycle_mult, snapshot) != (1, 1, None):
            raise ValueError("cycle_len, cycle_mult and snapshot are of cycles. Give their number, or leave them out.")
        return lambda learn, options: learn.fit(epochs, lr, **options)
    assert cycles is not None
    lengths: dict[str, Any] = {"cycle_len": cycle_len, "cycle_mult": cycle_mult, "snapshot": snapshot}
    return lambda learn, options: learn.fit_cycles(cycles, lr, **lengths, **options)


def _delete(checkpoint: Path | None, snapshot: str | Path | None) -> None:
    """Deletes what an earlier fit has left; no process goes on, and looks for it, before it is gone."""
    what = checkpoint or snapshot
    if what is None:
        return
    with written_by_first(Path(what)) as is_mine:
        if is_mine and checkpoint is not None:
            delete_fit(checkpoint)
        for run in _snapshots(snapshot) if is_mine else ():
            shutil.rmtree(located(run))


def _check_snapshots(snapshot: str | Path | None, *, overwrite: bool, resume: bool) -> None:
    """Checks that earlier snapshots are to be replaced, where there are any."""
    for run in _snapshots(snapshot) if not resume else ():
        check_free(run, overwrite=overwrite)


def _snapshots(folder: str | Path | None) -> list[Path]:
    """The runs that an earlier fit of cycles has left: all of them, since an ensemble would take them together."""
    return [] if folder is None else sorted(each for each in Path(folder).glob("cycle-*") if _is_run(each))


def _is_run(folder: Path) -> bool:
    return (located(folder) / FACTS).is_file()


def _fitted(
    learn: Learner,
    start: Callable[[Learner, FitOptions], History],
    fit: FitOptions | None,
    out: str | Path | None,
    snapshot: str | Path | None,
    *,
    overwrite: bool,
    resume: bool,
) -> Learner:
    asked: FitOptions = fit or {}
    # A mean of the last epochs has no best of them.
    options: FitOptions = {"keep": "last" if isinstance(asked.get("average"), SWA) else "best", **asked}
    checkpoint = None
    if out is not None:
        if {"checkpoint", "resume"} & options.keys():
            raise ValueError(
                f"The fit of a run is kept beside it, in {checkpoint_of(out)}, and goes on from there with "
                "resume=True. Leave checkpoint and resume out of fit."
            )
        checkpoint = options["checkpoint"] = checkpoint_of(out)
        options["resume"] = resume
    check_options({**options})
    learn.check(Plan(**options))
    if overwrite and not resume:  # as late as can be: what was wrong is said by now
        _delete(checkpoint, snapshot)
    try:
        start(learn, options)
    except FloatingPointError:  # from the checkpoint it would come to the same again
        if checkpoint is not None and is_first():
            delete_fit(checkpoint)
        raise
    if out is not None and checkpoint is not None:
        learn.save(out, overwrite=overwrite)
        if is_first():
            delete_fit(checkpoint)
    return learn
