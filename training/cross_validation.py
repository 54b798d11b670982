"""Cross-validation: what a recipe is worth where few images are labelled: each is held out once, and scored then."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from torch import nn

from featstore.errors import FeatureStoreError
from featstore.html import titled_table
from featstore.images.image_set import ImageSet
from featstore.models.runs import FACTS, check_free, located, new_folder
from featstore.models.staged import StagedModel
from featstore.store.store import FeatureStore
from featstore.words import some
from training.choices import FOLDS
from training.learner import Learner
from training.loop.checkpoints import delete_fit, holds_fit
from training.loop.history import Record
from training.loop.optim import LearningRate
from training.loop.plan import FitOptions, Plan, check_options
from training.loop.ranks import is_first, written_by_first
from training.predict import write_csv
from training.scores.metrics import student_interval, wilson_interval
from training.scores.outcomes import Outcomes
from training.splits import grouped_by_content

PREDICTIONS = "predictions.csv"

_REFUSED = {
    "keep": "would keep an epoch by the images held out, and their scores would be too good",
    "patience": "would end a fit by the images held out, and their scores would be too good",
    "checkpoint": "can't hold the fits of several folds: with out= they are kept beside it",
    "resume": "is said beside out=, of all folds",
}


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class CrossValidation:
    """What the folds came to; made by `cross_validate`. Prints as a table.

    Attributes:
        learners: of each fold, as its fit ended. `Ensemble(learners)` predicts by their mean.
        held_out: of each fold, what its learner said of the labelled images that it hadn't seen.
        scores: of each fold, loss and metrics of these images.
    """

    learners: tuple[Learner, ...]
    held_out: tuple[Outcomes, ...]
    scores: tuple[dict[str, float], ...]

    def outcomes(self) -> Outcomes:
        """What was said of every labelled image while it was held out, in the order of the image set."""
        images = self.learners[0].images
        place_of = {name: place for place, name in enumerate(images.ids)}
        places = np.array([place_of[name] for each in self.held_out for name in each.images.ids])
        order = np.argsort(places)
        return replace(
            self.held_out[0],
            images=images.select(places[order]),
            probabilities=np.concatenate([each.probabilities for each in self.held_out])[order],
            targets=np.concatenate([each.targets for each in self.held_out])[order],
            losses=np.concatenate([each.losses for each in self.held_out])[order],
        )

    @property
    def mean(self) -> dict[str, float]:
        """Of each score the mean over the folds."""
        return {name: fmean(each[name] for each in self.scores) for name in self.scores[0]}

    def interval(self, name: str, confidence: float = 0.95) -> tuple[float, float]:
        """Where the mean of a score lies over other folds, by Student's t, within what it can be.

        It is somewhat too narrow, as any such interval, since folds share images to train on (Bengio and Grandvalet,
        JMLR 5, 2004).
        """
        return student_interval(name, [each[name] for each in self.scores], confidence)

    @property
    def table(self) -> list[dict[str, str | int | float]]:
        """A row a fold, then their mean, and the two ends of its interval."""
        ends = {name: self.interval(name) for name in self.mean}
        counts = [len(each) for each in self.held_out]
        rows: list[dict[str, str | int | float]] = [
            {"fold": str(number), "images": count, **scores}
            for number, (count, scores) in enumerate(zip(counts, self.scores, strict=True), start=1)
        ]
        rows.append({"fold": "mean", "images": sum(counts), **self.mean})
        for place, name in enumerate(("from", "to")):
            rows.append({"fold": name, "images": sum(counts), **{each: end[place] for each, end in ends.items()}})
        return rows

    def in_words(self) -> str:
        """The accuracy over all images, each while it was held out; else the mean loss."""
        found = self.outcomes()
        head = f"{len(self.learners)} folds, {len(found):,} images, each scored while it was held out: "
        if found.images.task != "single":
            return f"{head}loss {self.mean['loss']:.4g}"
        right = int(found.is_right.sum())
        low, high = wilson_interval(right, len(found))
        return f"{head}accuracy {right / len(found):.3f} (95 % interval {low:.3f}-{high:.3f})"

    def __str__(self) -> str:
        names = list(self.table[0])
        lines = ["  ".join(f"{name:>10}" for name in names)]
        for row in self.table:
            lines.append(
                "  ".join(f"{row[name]:>10.4g}" if name in self.mean else f"{row[name]:>10}" for name in names)
            )
        return "\n".join([*lines, self.in_words()])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return titled_table(self.in_words(), self.table)

    def save(self, folder: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Saves a run for each fold, fold-1 and so on, and predictions.csv, of each image while it was held out.

        All of it is there once it is whole, or nothing, and an earlier cross-validation until then.
        `Ensemble.load(folder)` predicts by the mean of the runs.

        Args:
            folder: a new one; it holds nothing else.
            overwrite: replaces an earlier cross-validation there, all of its folds: `Ensemble.load` would take what is
                left of them for some of these.

        Raises:
            FeatureStoreError: if something is there that isn't to be replaced.
        """
        folder = Path(folder)
        check_folds_free(folder, overwrite=overwrite)
        with written_by_first(folder) as is_mine:
            if is_mine:
                with new_folder(folder) as made:
                    self._write(made)
        for name, learn in self._named():
            learn.lies_in(folder / name)
        return folder

    def _write(self, folder: Path) -> None:
        for name, learn in self._named():
            learn.write(folder / name)
        found, task = self.outcomes(), self.learners[0].task
        values = found.probabilities
        write_csv(folder / PREDICTIONS, found.images.ids, values, found.classes, task, found.targets)

    def _named(self) -> list[tuple[str, Learner]]:
        return [(_fold(number), learn) for number, learn in enumerate(self.learners, start=1)]


def check_folds_free(folder: Path, *, overwrite: bool) -> None:
    """Checks that folds can be saved in `folder`; nothing is deleted yet.

    Raises:
        FeatureStoreError: if folds are there and aren't to be replaced, or anything else is.
        OSError: if nothing can be written there.
    """
    place = located(folder)
    if place.exists() and not place.is_dir():
        raise FeatureStoreError(f"{folder} is a file, and folds have a folder of their own. Choose another name.")
    there = sorted(each.name for each in place.glob("*") if not each.name.startswith(_NOBODYS))
    folds = [each.name for each in _folds_in(folder)]
    strangers = [name for name in there if name not in (*folds, PREDICTIONS)]
    if strangers or (there and not folds):
        raise FeatureStoreError(
            f"{folder} holds {some(strangers or there)}, and folds have a folder of their own. Choose another one."
        )
    if there and not overwrite:
        raise FeatureStoreError(
            f"{folder} holds {len(folds)} folds already. Choose another folder, or replace all of them with "
            "--overwrite (in Python: overwrite=True)."
        )
    for name in folds:
        check_free(place / name, overwrite=True)
    if not there:
        check_free(folder, overwrite=False)


_NOBODYS = (".DS_Store", ".nfs", "._", ".fold-")
"""What systems, and processes that were killed while they saved a fold, leave in folders."""


def kept_beside(out: str | Path) -> Path:
    """Where the fits of the folds of `out` are kept until all are saved: beside it."""
    return Path(f"{Path(out)}{FOLDS}")


def check_kept(out: str | Path, *, overwrite: bool, resume: bool) -> None:
    """Checks that the fits kept beside `out` are to be gone on with, or replaced; nothing is deleted yet.

    Raises:
        FeatureStoreError: if neither was said, or something else lies there.
    """
    folder = kept_beside(out)
    fits = [each for each in _named_so_in(folder) if holds_fit(each)]
    if fits and not (resume or overwrite):
        raise FeatureStoreError(
            f"{folder} holds what was done of {len(fits):,} folds. Go on with them: --resume (in Python: resume=True); "
            "or begin anew: --overwrite (overwrite=True)."
        )


def _delete_kept(folder: Path) -> None:
    with written_by_first(folder) as is_mine:
        for each in _named_so_in(folder) if is_mine else ():
            delete_fit(each)
        if is_mine and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def _named_so_in(folder: Path) -> list[Path]:
    """What is called as folds are in a folder."""
    return sorted(each for each in folder.glob("fold-*") if re.fullmatch(_FOLD, each.name))


def _fold(number: int) -> str:
    """What the run, or the fit, of a fold is called."""
    return f"fold-{number}"


_FOLD = r"fold-[1-9]\d*"


def _folds_in(folder: Path) -> list[Path]:
    """The runs of folds that a cross-validation has left in a folder."""
    return [each for each in _named_so_in(located(folder)) if (located(each) / FACTS).is_file()]


def cross_validate(
    model: StagedModel | nn.Module,
    images: ImageSet,
    store: FeatureStore | None = None,
    *,
    folds: int = 5,
    groups: Sequence[Any] | None = None,
    split_seed: int = 0,
    freeze_to: str | None = None,
    epochs: int = 10,
    lr: LearningRate | None = None,
    fit: FitOptions | None = None,
    out: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    resume: bool = False,
    **options: Any,
) -> CrossValidation:
    """Fits a new learner for each fold to the images of the others, and scores it on those of the fold.

    No image that is scored has had a part in its fit: the last epoch's weights are scored, not the best one's, and the
    rate is found, if it isn't given, in each fold on the images that it trains on. Images of the split "test" stay out.

    Args:
        model: as in `Learner`; it is shared, and stays as it is.
        images: labelled; a split into train and valid that they have doesn't count.
        store: as in `Learner`.
        folds: how many.
        groups: one an image; those of a group (a patient, a film) are held out together. Default: the images' own.
            Images of the same content are held out together in any case.
        split_seed: of the dealing, as in `ImageSet.folds`.
        freeze_to: the last frozen stage; default: all but the head are frozen.
        epochs: as in `Learner.fit`.
        lr: likewise; None: what the finder suggests, in each fold.
        fit: further options of each fit, see `FitOptions`.
        out: a folder to save all of it in, as `CrossValidation.save` does. Until then the fits are kept beside it.
        overwrite: replaces an earlier cross-validation there, and fits that are kept beside it.
        resume: goes on with the fits that are kept there, to the bit; those that are done aren't repeated.
        options: those of `Learner`.

    Raises:
        ValueError: for an option of a fit that would choose by the images held out, or can't be one of several fits.
        FeatureStoreError: if what is there, or kept, is neither to be replaced nor gone on with.
    """
    given: FitOptions = {} if fit is None else {**fit}
    for name in (each for each in _REFUSED if given.get(each) not in (None, False, "last")):
        raise ValueError(f"{name} {_REFUSED[name]}. Expected other options of a fit. Leave it out.")
    check_options({**given})
    if out is None and resume:
        raise ValueError("resume goes on with what is kept beside the folds that are saved. Give their folder: out=.")
    kept = None
    if out is not None:
        kept = kept_beside(Path(out))
        check_folds_free(Path(out), overwrite=overwrite)
        check_kept(Path(out), overwrite=overwrite, resume=resume)
        given["resume"] = resume
    learners: list[Learner] = []
    together = grouped_by_content(
        images, images.digests(None if store is None else store.known_digests(images)), groups
    )
    for number, fold in enumerate(images.folds(folds, seed=split_seed, groups=together), start=1):
        learn = Learner(model, fold, store, **options)
        if freeze_to is not None:
            learn.freeze_to(freeze_to)
        if kept is not None:
            given["checkpoint"] = kept / _fold(number)
        learn.check(Plan(cycles=(epochs,), lr=lr, **given))
        if kept is not None and overwrite and not resume and not learners:  # what was wrong is said by now
            _delete_kept(kept)
        try:
            learn.fit(epochs, lr, **given)
        except FloatingPointError:  # from the checkpoint it would come to the same again
            if kept is not None and is_first():
                delete_fit(kept / _fold(number))
            raise
        learners.append(learn)
    found = CrossValidation(
        learners=tuple(learners),
        held_out=tuple(each.outcomes("valid") for each in learners),
        scores=tuple(_scores(each.history.last) for each in learners),
    )
    if out is not None and kept is not None:
        found.save(out, overwrite=overwrite)
        _delete_kept(kept)
    return found


def _scores(record: Record) -> dict[str, float]:
    """Of an epoch's record what is of the images held out."""
    own = {name: value for name, value in record.items() if name not in ("epoch", "train_loss", "lr", "seconds")}
    return {"loss": own.pop("valid_loss"), **own}
