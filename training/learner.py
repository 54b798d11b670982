"""Learner: one model, one image set, maybe one store; what is frozen and which augmentation decide what a fit reads.

Long, since all that a person does with a model is one class; what it does is in modules of one concept each.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, Unpack

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from featstore.digest import Json
from featstore.errors import FeatureStoreError, OnError
from featstore.html import titled_table
from featstore.images.contents import overlap_note
from featstore.images.image_set import ImageSet
from featstore.images.views import Augment, View
from featstore.models.names import Precision
from featstore.models.runs import new_run, read_run, write_run
from featstore.models.staged import StagedModel
from featstore.models.trunk import choose_device
from featstore.notes import logger_of
from featstore.store.store import FeatureStore
from training import saved, schedules
from training.agreement import Agreement, compared
from training.class_tables import check_contrast, check_learnable, kept_table, with_table
from training.embedding import embedding_model
from training.export import ExportReport, exported
from training.inputs.batches import Batches, doubtful_note, left_out_note, num_batches
from training.inputs.derive import (
    Inputs,
    Source,
    derive,
    extract_missing,
    labelled,
    precision_of,
    to_score,
    to_train,
)
from training.inputs.situation import (
    OnMissing,
    Origin,
    Situation,
    default_on_missing,
    freezing_words,
    images_words,
    views_words,
)
from training.loop import optim, settings
from training.loop.checkpoints import read_fit
from training.loop.copies import put_back
from training.loop.fit import check_norms
from training.loop.fitting import Begun, Fitting, check_waits
from training.loop.history import History
from training.loop.lr_find import LearningRates
from training.loop.monitor import Monitor
from training.loop.plan import FitOptions, Plan, check_options, takes_fit_options
from training.loop.ranks import check_alone, is_first, written_by_first
from training.placement import Placement, reduction_of, with_classes, with_head
from training.predict import Items, Prediction, as_images, outputs_words, predictions, probabilities
from training.provenance import FitRecord, sidecar_of, start_of
from training.scores import metrics as scores
from training.scores.calibration import Calibration, fitted_temperature
from training.scores.class_counts import imbalance_note
from training.scores.outcomes import Outcomes
from training.sidecar import Sidecar
from training.splits import PastSplit, dealt, present_split
from training.standardised import ValueHead, passes_an_epoch, steps_note
from training.tta import Scored, TestViews, TtaOptions, scored


class Learner:
    """Fits a head to features, or a model to images: one loop, and no mode.

    The model is `learn.model`: the backbone's stages up to the cut, a pool, and the head. The caller's backbone is
    never changed: frozen stages are shared with it, thawed ones are copies. Where the next fit reads from is derived,
    and `learn.inputs` says it in words. These may be set later: images, store, augment, on_missing, on_error,
    optimizer, batch_size, seed, view, workers, quiet, allow_leak and note. The rest is fixed; an attribute that isn't
    known is refused.

    Args:
        model: the backbone; or a model with its own head, with ``head="keep"``.
        images: labelled, with a split. Without one they get that of the run that the backbone comes from; where there
            is none, all images train and none validate.
        store: where features are looked up; None: images are read.
        cut: where the head sits; default: the model's default cut, or the only one this model has features of.
        reduce: the pool at the cut: auto, none, avg, max, concat, token or tokens.
        head: concat, linear, mlp, attention (on maps or tokens: it is a pool of its own), also with options in one
            word, ``mlp:hidden=256,dropout=0.3``; a module of your own from pooled activations to logits; or ``keep``.
        classes: the class of each logit, in order; default: the images' own table. With ``head="keep"`` the default is
            what the model's weights were trained on, or the images' classes if these number the logits (0, 1, 2, ...).
        features: start of the key of the set to use; it fixes cut, reduction, view, storage type and precision.
        augment: policy and seeds of the training images; None: the evaluation view.
        on_missing: what happens when the store doesn't hold what could be read from it: ``error``, ``images`` (read
            them and run the trunk) or ``extract``. Default: ``error`` with a store.
        on_error: an image that can't be read: ``raise``, or ``skip`` it, and say how many.
        view: geometry and normalisation; default: the model's.
        loss: of (logits, targets); default: the task's own, see `metrics.loss`.
        metrics: functions of (logits, targets), added to the task's own under their names.
        optimizer: adamw, adam, sgd, or a callable that takes parameter groups.
        batch_size: of training and scoring.
        device: auto, cpu, cuda or cuda:1.
        seed: of head weights, order, views and dropout.
        workers: threads that read images.
        quiet: prints nothing while it works.
        allow_leak: allows training on images that the run, which the backbone comes from, held out.
        asked: what a command was asked for, as TOML, kept in each run that is saved.
        note: gets what should be known of the images that are read, in place of the log: for what makes many learners.

    Attributes:
        model: the model as it is now.
        inputs: where the next fit reads from.
        read_from: what the last fit or pass read: features, images, or None before the first.
        history: the epochs of all fits.
        classes: the class table; logit k is of class k.
    """

    __slots__ = (
        "_asked", "_before", "_begun", "_calibration", "_cut", "_features", "_fits", "_images", "_loss", "_metrics",
        "_named", "_origins", "_passes", "_past", "_precision", "_probed", "_seen", "_start", "_trained_on",
        "_valid_of", "allow_leak", "augment", "batch_size", "classes", "device", "head_name", "history", "model",
        "note", "on_error", "on_missing", "optimizer", "quiet", "read_from", "seed", "store", "task", "view", "workers",
    )  # fmt: skip

    def __init__(
        self,
        model: StagedModel | nn.Module,
        images: ImageSet,
        store: FeatureStore | None = None,
        *,
        cut: str | None = None,
        reduce: str = "auto",
        head: str | nn.Module = "concat",
        classes: Sequence[str] | None = None,
        features: str | None = None,
        augment: Augment | None = None,
        on_missing: OnMissing | None = None,
        on_error: OnError = "raise",
        view: View | None = None,
        loss: scores.Loss | None = None,
        metrics: Iterable[scores.Metric] | None = None,
        optimizer: str | optim.MakeOptimizer = "adamw",
        batch_size: int = 64,
        device: torch.device | str = "auto",
        seed: int = 0,
        workers: int | None = None,
        quiet: bool = False,
        allow_leak: bool = False,
        asked: str | None = None,
        note: Callable[[str], None] | None = None,
    ) -> None:
        """Makes the model with its head; nothing is trained or extracted. The class describes the arguments."""
        settings.check_given(model, images, store)
        backbone = model if isinstance(model, StagedModel) else StagedModel.from_module(model)
        self._past = saved.past_split(backbone)
        self._seen: PastSplit | None = None  # of this learner's own fits
        if self._past is not None:
            images = self._past.applied(images, {} if store is None else store.known_digests(images))
        self.store, self.augment = store, augment
        self.on_missing: OnMissing = on_missing or default_on_missing(store)
        self.on_error: OnError = on_error
        self.optimizer, self.batch_size, self.seed = optimizer, batch_size, seed
        self.workers, self.quiet, self.allow_leak = workers, quiet, allow_leak
        self.device = choose_device(device)
        placement = Placement.of(backbone, store, cut=cut, reduce=reduce, key=features)
        self._features = placement.key
        self.view = (view or placement.view or backbone.view).evaluation
        backbone.check_view(self.view)
        if head == "keep":
            classes = kept_table(backbone, images, self.view.size, classes)
        self._images = images if classes is None else with_table(images, tuple(classes))
        self.classes, self.task = self._images.classes, images.task
        self.history = History()
        self.read_from: Literal["features", "images"] | None = None
        self._loss = settings.checked("loss", loss)
        self._metrics = scores.by_name(metrics or (), scores.default_metrics(self.task, len(self.classes)))
        self._trained_on: str | None = None
        self._asked, self.note = asked, note
        self._fits: list[FitRecord] = []
        self._begun: tuple[Begun, PastSplit, str] | None = None  # a fit that is under way
        self._calibration: Calibration | None = None
        self._before: Sidecar | None = None  # of the run that it was loaded from
        self._named, self._start = dict(backbone.origin), start_of(backbone)
        self._passes = 0 if head == "keep" else None  # of all fits, a loaded run's included; None: the head is new
        self._precision: Precision | None = None  # of the frozen part, in what was trained on
        self._valid_of: tuple[str, float] | None = None  # digest of images held out, and the loss on them
        self._probed: set[tuple[str, str]] = set()
        self._origins = [Origin.of(backbone)]
        self.head_name = head if isinstance(head, str) else "module"
        self.model, self._cut = with_head(
            backbone,
            head,
            placement,
            digests=self._origins[0].digests,
            view=self.view,
            classes=self.classes,
            task=self.task,
            seed=seed,
        )
        self.model.to_device(self.device)
        self.model.eval()

    def __setattr__(self, name: str, value: Any) -> None:
        if not hasattr(type(self), name):
            raise settings.unknown(name, [each for each in self.__slots__ if not each.startswith("_")])
        if name in settings.FIXED and hasattr(self, name):
            raise AttributeError(f"{name} is fixed when a Learner is made. Make a new one for another.")
        value = settings.checked(name, value)
        if name == "view" and hasattr(self, "model"):  # the constructor has checked the backbone's
            self.model.check_view(value)
        super().__setattr__(name, value)

    def __repr__(self) -> str:
        reduction = reduction_of(self.model)
        pool, told = f" ({reduction})" if reduction else "", outputs_words(self.classes, self.task)
        inputs = ["inputs: none, as no images were given; files can be predicted all the same"]
        if len(self.images):
            inputs = ["inputs:", *(f"  {line}" for line in str(self.inputs).splitlines())]
        return "\n".join(
            [
                f"Learner: {self.model.name}, {self.head_name} head at {self.cut}{pool}, {told}; "
                f"{images_words(self.images)}",
                freezing_words(self.model),
                f"augmentation: {'none' if self.augment is None else views_words(self.augment)}",
                *inputs,
            ]
        )

    def _repr_html_(self) -> str:
        return titled_table(repr(self), self.history.records)

    # ----------------------------------------------------------------------------------------------- what is frozen

    @property
    def images(self) -> ImageSet:
        """The image set; another one must have the same classes."""
        return self._images

    @images.setter
    def images(self, images: ImageSet) -> None:
        if (images.classes, images.task) != (self.classes, self.task):
            raise ValueError(
                f"These images have the classes {', '.join(images.classes)} ({images.task}), and the head was made for "
                f"{', '.join(self.classes)} ({self.task}). Make a new Learner for them."
            )
        self._images = images

    @property
    def inputs(self) -> Inputs:
        """Where the next fit would read from, and why; prints as sentences. Nothing is extracted yet."""
        return derive(self._situation(), self.augment)

    def ready(self, plan: Plan | None = None) -> Inputs:
        """Where the next fit, of `plan`, reads from, now that what was missing is extracted, if that was asked for.

        Raises:
            FeatureStoreError: if the inputs can't be had.
        """
        return self._ready(plan or Plan())[1]

    def freeze_to(self, cut: str) -> None:
        """Freezes everything up to the value `cut` (the last frozen stage, by name) and thaws the rest."""
        self.model.freeze_to(cut)
        self._say(freezing_words(self.model))

    def unfreeze(self) -> None:
        """Thaws everything; the next fit reads images."""
        self.model.unfreeze()
        self._say(freezing_words(self.model))

    def freeze(self) -> None:
        """Freezes everything but the head, as a new learner is."""
        self.freeze_to(self.cut)

    @property
    def cut(self) -> str:
        """Where the head sits: the last value before pool and head."""
        return self._cut

    def attach(self, model: StagedModel) -> None:
        """Puts the trunk in that a store knew by digest only; its digest is checked."""
        if not isinstance(model, StagedModel):
            raise TypeError(
                f"attach got {model!r}. Expected the model whose trunk is missing, backbone(...) for example. Images "
                "are changed with learn.images = images, or given to Learner.load(run, images, store)."
            )
        self.model.attach(model)
        self.model.to_device(self.device)
        self._origins.append(Origin.of(model))

    def extend_classes(self, classes: Sequence[str]) -> None:
        """Gives the head logits for more classes; the others stay what they were, each under its name.

        Then images with the new classes are accepted: ``learn.extend_classes(more.classes); learn.images = more``.

        Args:
            classes: the new class table, in order, with all of the present ones.

        Raises:
            ValueError: if one is missing, none is new, the task is regression, or the head doesn't end in a linear
                layer.
        """
        if self.task == "regression":
            raise ValueError("extend_classes is for classes, and the task is regression. Make a new Learner.")
        model = with_classes(self.model, self.classes, classes, cut=self.cut, size=self.view.size, seed=self.seed)
        model.to_device(self.device)
        model.eval()
        images = with_table(self.images, tuple(classes))
        self._drop_calibration("There are other classes")
        object.__setattr__(self, "classes", images.classes)  # fixed for all others
        self.model, self._images = model, images

    # ---------------------------------------------------------------------------------------------------- training

    @takes_fit_options()
    def fit(self, epochs: int, lr: optim.LearningRate | None = None, **options: Unpack[FitOptions]) -> History:
        """Trains what isn't frozen.

        Args:
            epochs: of one pass over the training images each; of up to four where a linear head trains alone on few.
            lr: one rate, one a layer group, (low, high), or by the names of layer groups or stages, as
                ``{"layer4": 1e-4, "head": 1e-3}``; with one_cycle the highest. Default: what `lr_find` suggests,
                printed as a number.
            options: as `FitOptions` describes them.

        Raises:
            FeatureStoreError: if the inputs can't be had, or the checkpoint is of another fit; nothing is trained then.
            ValueError: if nothing is left to train.
            TypeError: for an option that there isn't.
        """
        check_options({**options})
        return self._fit(Plan(cycles=(epochs,), lr=lr, **options))

    @takes_fit_options(schedule="cosine")
    def fit_cycles(
        self,
        num_cycles: int,
        lr: optim.LearningRate | None = None,
        *,
        cycle_len: int = 1,
        cycle_mult: int = 1,
        snapshot: str | os.PathLike[str] | None = None,
        **options: Unpack[FitOptions],
    ) -> History:
        """Trains what isn't frozen in cycles, at each of which the rate starts anew: SGDR.

        Args:
            num_cycles: how many.
            lr: as in `fit`.
            cycle_len: epochs of the first cycle.
            cycle_mult: times so long as the one before is each that follows.
            snapshot: a folder in which a run is saved at the end of each cycle, after its last step: cycle-1, cycle-2
                and so on. `Ensemble.load` takes their mean.
            options: as `FitOptions` describes them.
        """
        check_options({**options})
        options.setdefault("schedule", "cosine")
        length, factor = settings.checked("cycle_len", cycle_len), settings.checked("cycle_mult", cycle_mult)
        cycles = schedules.cycle_lengths(settings.checked("num_cycles", num_cycles), length, factor)
        return self._fit(Plan(cycles=cycles, lr=lr, snapshot=snapshot, **options))

    def _fit(self, plan: Plan) -> History:
        begun = self.begin(plan)
        try:
            history = begun.run(partial(self._save_snapshot, begun), self.history.extend)
        finally:
            self._fits[-1] = self._fits[-1].after(begun)
        self._end(begun)
        before, self._valid_of = self._valid_of, self._kept_valid(begun)
        if before is not None and self._valid_of is not None and before[0] == self._valid_of[0]:
            self._note(begun.worse_note(before[1]))
        return history

    def _kept_valid(self, begun: Begun) -> tuple[str, float] | None:
        if begun.fitting.valid is None or begun.kept is None:
            return None
        images = begun.fitting.valid.source.images
        return dealt(images, images.digests(self._situation().known)).digest, begun.kept["valid_loss"]

    def check(self, plan: Plan) -> None:
        """Checks what a fit is asked for, as far as it can be without its inputs: nothing is read or computed.

        Raises:
            ValueError: for what has no meaning here, or if nothing is left to train.
        """
        optim.build(
            self.model,
            1.0 if plan.lr is None else plan.lr,
            optimizer=self.optimizer,
            weight_decay=plan.weight_decay,
            decay_norms=plan.decay_norms,
        )
        check_waits(plan, Monitor.of(plan.monitor, self._scores()), is_scored=bool(len(labelled(self.images.valid))))

    def begin(self, plan: Plan, *, beside: Learner | None = None) -> Begun:
        """A fit at its start, for what runs several of them side by side; `end` takes what it came to.

        Args:
            plan: what it is asked for.
            beside: a learner with the same images, store, placement, view and augmentation, whose fit has begun with
                the same batches, order and passes: this one then reads its batches with it.

        Raises:
            FeatureStoreError: as `fit`.
            ValueError: likewise.
        """
        self.check(plan)
        kept = None if plan.folder is None else read_fit(plan.folder, resume=plan.resume)
        plan.check_snapshots(goes_on=kept is not None)
        if beside is None or beside._begun is None:
            fitting, situation, inputs = self._fitting(plan)
            assert inputs.train is not None
            precision: Precision | None = precision_of(inputs.train, situation)
            begun = fitting.begun(kept, first_epoch=len(self.history.records))
            split, words, record = (
                self._split(situation),
                str(inputs),
                FitRecord.of(begun, self.augment, situation.known),
            )
        else:
            other, split, words = beside._begun
            precision = beside._precision
            fitting = self._fitting_on(plan, other.fitting.train, other.fitting.valid)
            begun = fitting.begun(kept, first_epoch=len(self.history.records), beside=other)
            record = beside._fits[-1].beside(begun, self.augment)
        self._begun, self._precision = (begun, split, words), precision
        self.read_from, self._trained_on = fitting.train.source.kind, words
        # Before the first step: a fit may be interrupted.
        self._seen, self._passes = split.over(self._seen), begun.num_passes
        self._drop_calibration("The weights move")
        past = self._fits[-1] if self._fits else None
        if kept is not None and past is not None and not past.made["is_whole"] and past.asked == record.asked:
            self._fits.pop()  # this very fit, which was interrupted
        self._fits.append(record)
        return begun

    def end(self, begun: Begun) -> None:
        """Takes the epochs of a fit that began with `begin` and has run."""
        if begun.progress.history.records:  # else it failed in its first epoch
            self.history.extend(begun.progress.history)
        self._fits[-1] = self._fits[-1].after(begun)
        self._end(begun)

    def _end(self, begun: Begun) -> None:
        self._passes, self._begun = begun.passes_done, None
        self._note(left_out_note(begun.fitting.train, begun.fitting.valid))
        self._note(doubtful_note(begun.fitting.train, begun.fitting.valid))

    def _save_snapshot(self, begun: Begun, cycle: int) -> None:
        whole = self.history, self._passes
        try:
            self.history, self._passes = self.history.joined(begun.progress.history), begun.passes_done
            self._fits[-1] = self._fits[-1].after(begun)
            self._say(f"snapshot: {self.save(begun.fitting.plan.run_of(cycle), overwrite=True)}")
        finally:
            self.history, self._passes = whole

    @takes_fit_options()
    def lr_find(self, **options: Unpack[FitOptions]) -> LearningRates:
        """Tries rising learning rates on what would train now; weights, statistics and random state come back.

        Args:
            options: those that the fit will be given; what doesn't change a single step is as if it weren't there.
        """
        check_options({**options})
        fitting, _, _ = self._fitting(Plan(**options))
        found = fitting.found()
        if found.note is not None:
            self._say(found.note)
        return found

    # --------------------------------------------------------------------------------------------------- inference

    def evaluate(self, split: str = "valid", **tta: Unpack[TtaOptions]) -> dict[str, float]:
        """Loss, metrics, calibration error and number of the labelled images of a split: train, valid or test.

        Args:
            split: of `images`.
            tta: views beside the evaluation view, as `TtaOptions` describes them.
        """
        found, targets, _ = self._asked_outputs(split, **tta)
        return self._scored(found.logits, targets)

    def outcomes(self, split: str = "valid", **tta: Unpack[TtaOptions]) -> Outcomes:
        """What the model says of each labelled image of a split: where it is wrong, how sure, what it confuses."""
        return self.evaluated(split, **tta)[1]

    def evaluated(self, split: str = "valid", **tta: Unpack[TtaOptions]) -> tuple[dict[str, float], Outcomes]:
        """What `evaluate` and what `outcomes` give, by one pass over the images."""
        found, targets, notes = self._asked_outputs(split, **tta)
        own = probabilities(found.logits, self.task)
        outcomes = Outcomes.of(found.images, found.logits, targets, own, self.view, notes)
        return self._scored(found.logits, targets), outcomes

    def were_trained_on(self, images: ImageSet) -> NDArray[np.bool_]:
        """``(N,)`` whether a fit of this learner, or of the run that it comes from, trained on each image's content."""
        digests = images.digests(self._situation().known)
        found = np.zeros(len(images), dtype=np.bool_)
        for past in (self._seen, self._past):
            found |= False if past is None else past.were_trained_on(digests)
        return found

    @property
    def calibration(self) -> Calibration | None:
        """The temperature of its probabilities, and what it was fitted to; None where they are the model's own."""
        return self._calibration

    def calibrate(self, split: str = "valid") -> Calibration:
        """Fits one temperature to images held out, and divides all logits by it from now on.

        Predictions stay what they are; their probabilities, and losses and calibration errors, change. The temperature
        is saved with the run, and an export has it. A later fit takes it away, as its weights are others.

        Args:
            split: valid or test, whose scores are a little too good from then on; that is said with them.

        Raises:
            ValueError: for the split train, regression, and where no temperature is the best.
            FeatureStoreError: if some of the images were trained on, unless `allow_leak` is set.
        """
        if split == "train":
            raise ValueError(
                "A temperature fitted to images that were trained on would make the model surer, not truer: it is too "
                "right about these. Expected a split that was held out. Give valid."
            )
        situation, chosen = self._situation(), to_score(self.images, split)
        digests = chosen.digests(situation.known)
        for past in (self._seen, self._past):
            note = None if past is None else past.trained_note(chosen, digests)
            if note is not None and not self.allow_leak:
                raise FeatureStoreError(
                    f"Nothing is calibrated: {note}. Give images that no fit has seen; in Python "
                    "learn.allow_leak = True takes these all the same."
                )
        found = self._read(chosen, situation, is_raw=True)
        targets = torch.from_numpy(np.array(found.images.targets))
        temperature = fitted_temperature(found.logits, targets, self.task)
        before, after = (self._scored(found.logits / each, targets) for each in (1.0, temperature))
        names = [name for name in ("loss", "calibration_error") if name in before]
        self._calibration = Calibration(
            temperature=temperature,
            split=split,
            images=dealt(found.images, found.images.digests(situation.known)),
            before={name: before[name] for name in names},
            after={name: after[name] for name in names},
        )
        self._say(str(self._calibration))
        return self._calibration

    def compare_inputs(self, split: str = "valid") -> Agreement:
        """A split's labelled images scored from stored features and from their files: how far the two are apart."""
        chosen = to_score(self.images, split)
        return compared(
            self._tail(),
            self._situation(),
            chosen,
            batches=self._batches,
            scored=lambda logits, targets: self._scored(logits / self._temperature, targets),
        )

    def predict(self, items: Items, **tta: Unpack[TtaOptions]) -> list[Prediction]:
        """One record an image (label, probability, top; of regression values), in order.

        Args:
            items: an image set; files, folders, tar files or a table; or images in memory, called by their places.
            tta: views beside the evaluation view, as `TtaOptions` describes them.
        """
        ids, values = self.scored(items, **tta)
        return predictions(ids, values, self.classes, self.task)

    def predict_proba(self, items: Items, **tta: Unpack[TtaOptions]) -> NDArray[np.float64]:
        """Probabilities ``(N, K)``, columns in the order of `classes`; of regression the numbers."""
        return self.scored(items, **tta)[1]

    def scored(self, items: Items, **tta: Unpack[TtaOptions]) -> tuple[tuple[str, ...], NDArray[np.float64]]:
        """Ids and probabilities ``(N, K)``, without images that can't be read where ``on_error`` is ``skip``."""
        found = self._read(as_images(items), self._situation(), **tta)
        self.read_from = found.kind
        return found.images.ids, probabilities(found.logits, self.task)

    def embed(
        self, items: Items, cut: str | None = None, reduce: str | None = None
    ) -> tuple[tuple[str, ...], NDArray[np.float32]]:
        """Ids and activations ``(N, *F)`` of the model as it is now, trained stages included, in eval mode.

        Args:
            items: as in `predict`.
            cut: where they are taken; default: where the head sits.
            reduce: as in `Learner`; default: that of the head at its own cut, elsewhere ``auto``.
        """
        model = embedding_model(self.model, cut, reduce, head_cut=self.cut)
        found = self._read(as_images(items), replace(self._situation(), model=model), is_raw=True)
        self.read_from = found.kind
        return found.images.ids, found.logits.numpy()

    # ----------------------------------------------------------------------------------------------- save and load

    def save(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Writes the whole model and what is known of it: a run folder, whole or not at all.

        model.safetensors, model.json, split.npz, history.csv, metrics.json, valid_predictions.csv and run.json; of a
        command run.toml. An absent trunk is saved by its digests.
        """
        folder = Path(folder)
        with written_by_first(folder) as is_mine:
            if is_mine:
                self.write(folder, overwrite=overwrite)
        self.lies_in(folder)
        return folder

    def write(self, folder: Path, *, overwrite: bool = False) -> None:
        """Writes what `save` does, by this process alone, for what gives the folder another name yet: see `lies_in`."""
        with new_run(folder, overwrite=overwrite) as made:
            facts = self._facts()
            write_run(made, facts, self.model.tensors())
            saved.write_asked(made, self._asked)
            self._write_reports(made, facts)

    def lies_in(self, folder: Path) -> None:
        """Takes the saved run `folder` for what its model can be made from, in what it tells people to run."""
        made_by = self.model.origin.get("architecture")
        if made_by is not None:  # else no command can make the model anew
            origin = {"backbone": str(folder), "architecture": made_by}
            self._origins.append(Origin(origin, self.model.digests(), self.view))

    def _facts(self) -> dict[str, Json]:
        return saved.run_facts(
            self.model,
            cut=self.cut,
            view=self.view,
            head=self.head_name,
            classes=self.classes,
            task=self.task,
            seed=self.seed,
            passes=self.passes,
            precision=self._precision,
            calibration=self._calibration,
        )

    @property
    def passes(self) -> int:
        """Over the training images, that all fits have made."""
        return self._passes or 0

    def sidecar(self) -> Sidecar:
        """What run.json would say of it, without scores."""
        return self._sidecar(self._facts(), None, self._situation())

    def take_head(
        self, tensors: Mapping[str, torch.Tensor], passes: int, fits: Sequence[FitRecord], history: History
    ) -> None:
        """Takes what another learner like this one has come to: its head's tensors, passes, fits and epochs."""
        put_back(self._tail(), tensors)
        self._drop_calibration("The weights are others")
        self._passes, self._fits, self.history = passes, [*fits], history

    def export(
        self,
        path: str | Path,
        *,
        format: str | None = None,
        overwrite: bool = False,
        compare_on: ImageSet | None = None,
    ) -> ExportReport:
        """Writes the whole model as pt2, onnx or state-dict for other programs: see `training.export`."""
        return exported(
            self.model,
            path,
            format=format,
            overwrite=overwrite,
            view=self.view,
            images=self.images,
            compare_on=compare_on,
            temperature=self._temperature,
        )

    @classmethod
    def load(
        cls,
        run: str | Path,
        images: ImageSet | None = None,
        store: FeatureStore | None = None,
        *,
        module: nn.Module | None = None,
        head: nn.Module | None = None,
        trust_code: bool = False,
        **options: Any,
    ) -> Learner:
        """A learner with a saved run's model as it was saved: weights, head, classes, freeze point, view.

        Images without a split get the run's, by content; images it hadn't seen are dealt by its rule.

        Args:
            run: the folder.
            images: to go on with; None to predict only.
            store: as in `Learner`.
            module: the backbone, for a run whose backbone has no name.
            head: the head, for a run whose head was a module of your own.
            trust_code: lets a run whose model comes from somebody's file run that file.
            options: further arguments of `Learner`.

        Raises:
            FeatureStoreError: if the run is damaged, needs `module` or `head`, or `images` have a class it lacks.
            ValueError: for options that the run brings itself.
        """
        folder = Path(run)
        saved.check_options(options, folder)
        stored = read_run(folder)
        facts = stored.facts
        saved.check_facts(facts, folder)
        past = PastSplit.read(folder, identity=stored.identity)
        images = saved.run_images(facts, folder, images, past, store)
        base = saved.saved_backbone(stored, folder, module, trust_code=trust_code)
        learn = cls(
            base,
            images,
            store,
            cut=facts["model"]["default_cut"],
            reduce=facts["model"]["reduction"] or "none",
            head=saved.saved_head(facts["head"], head, folder),
            classes=images.classes,
            view=View.from_facts(facts["model"]["view"]),
            **options,
        )
        learn.head_name = facts["head"]["name"]
        if "backbone" not in base.origin:
            learn._origins.clear()  # the caller's module has other weights than the run
        learn.model.load_tensors(saved.with_statistics(stored.tensors, learn.model))
        saved.check_head(learn.model, facts["head"], folder)
        learn._past, learn._passes = past, saved.passes_of(facts, folder)
        learn._calibration, learn._precision = saved.calibration_of(facts, folder), saved.precision_of(facts)
        learn._before = saved.sidecar_of_run(folder, identity=stored.identity)
        if learn._calibration is None:  # whose loss has another temperature than those of epochs
            learn._valid_of = saved.scored_of(learn._before)
        learn._start = {"run": str(folder), "identity": stored.identity}
        if facts["model"]["frozen"] is None:
            learn.model.unfreeze()
        else:
            learn.model.freeze_to(facts["model"]["frozen"])
        learn.model.eval()
        return learn

    @staticmethod
    def store_of(run: str | Path) -> FeatureStore | None:
        """The store that a saved run was trained with, if it is still where it was.

        Read from there, a run's scores are those it was saved with, to the last digit, and no trunk runs.
        """
        return saved.store_of(Path(run))

    # ------------------------------------------------------------------------------------------------------- inside

    def _situation(self) -> Situation:
        return Situation.of(
            self.model,
            self.images,
            self.store,
            view=self.view,
            key=self._features,
            on_missing=self.on_missing,
            on_error=self.on_error,
            device=self.device,
            origins=self._origins,
            probed=self._probed,
            precision=self._precision,
        )

    def _tail(self) -> nn.Sequential:
        return self.model.unfrozen

    def _criterion(self) -> scores.Loss:
        head = self.model.head
        return self._loss or scores.loss(self.task, head.scale if isinstance(head, ValueHead) else None)

    def _scores(self) -> dict[str, scores.Metric]:
        return {**scores.default_metrics(self.task, len(self.classes)), **self._metrics}

    def _batches(self, source: Source, situation: Situation, **training: Any) -> Batches:
        return Batches(source, situation, batch_size=self.batch_size, workers=self.workers, **training)

    def _fitting(self, plan: Plan) -> tuple[Fitting, Situation, Inputs]:
        """What a fit works on, where that comes from, and the words for it."""
        situation, inputs = self._ready(plan)
        assert inputs.train is not None
        source, tail = inputs.train, self._tail()
        steps_a_pass = math.ceil(num_batches(len(source.images), self.batch_size) / plan.accumulate)
        train = self._batches(
            source,
            situation,
            passes=passes_an_epoch(tail, steps_a_pass),
            first_pass=self._passes or 0,
            sampling=plan.sampling,
            mix=plan.changes,
        )
        valid = None if inputs.valid is None else self._batches(inputs.valid, situation)
        return self._fitting_on(plan, train, valid), situation, inputs

    def _fitting_on(self, plan: Plan, train: Batches, valid: Batches | None) -> Fitting:
        return Fitting(
            plan=plan,
            model=self.model,
            train=train,
            valid=valid,
            optimizer=self.optimizer,
            loss=self._criterion(),
            own_loss=self._loss,
            metrics=self._scores(),
            classes=self.classes,
            task=self.task,
            seed=self.seed,
            say=self._say,
            is_shown=not self.quiet and is_first(),
        )

    def _ready(self, plan: Plan) -> tuple[Situation, Inputs]:
        """The inputs of a fit, checked, and said; what is missing is extracted where that was asked for."""
        check_contrast(self.images)
        training = to_train(self.images)
        if self._passes is None:
            self._note(check_learnable(self.images, training))
        if plan.class_weights is None and self._loss is None:  # which weighs classes as it does
            self._note(imbalance_note(training))
        if self.task == "regression":
            self._note(steps_note(training.targets, self.classes))
        optim.build(self.model, 1.0, optimizer="sgd", weight_decay=0.0)  # raises if nothing would train
        situation = self._situation()
        for past in (self._seen, self._past):
            if past is not None and not self.allow_leak:
                past.check(training, training.digests(situation.known))
        inputs = derive(situation, self.augment)
        if inputs.first is not None:
            check_alone("extracts what a fit is missing")
            self._note(inputs.first)
            for note in extract_missing(situation, self.augment, progress=not self.quiet):
                self._note(note)
            situation = replace(self._situation(), on_missing="error")
            inputs = derive(situation, self.augment)
        if inputs.problem is not None:
            raise inputs.problem
        assert inputs.train is not None
        check_norms(self._tail(), self.batch_size, len(inputs.train.images))
        self._say(str(inputs))
        if inputs.valid is not None:
            self._note(self._trained_note(inputs.valid.images))
        self._note(overlap_note(self.images, self.images.digests(situation.known)))
        self._note(inputs.left_out_note(self.images))
        return situation, inputs

    def _asked_outputs(self, split: str, **tta: Unpack[TtaOptions]) -> tuple[Scored, torch.Tensor, tuple[str, ...]]:
        """As `_split_outputs`, with what should be known of scores of these images, which is said."""
        found, targets = self._split_outputs(split, **tta)
        self.read_from = found.kind
        notes = tuple(note for note in self._notes_on(found, split) if note is not None)
        for note in notes:
            self._say(note)
        return found, targets, notes

    def _notes_on(self, found: Scored, split: str) -> Iterator[str | None]:
        if self._calibration is not None:
            digests = found.images.digests(self._situation().known)
            if dealt(found.images, digests).digest == self._calibration.images.digest:
                yield (
                    "the temperature was fitted to these very images: their loss and calibration error are a little "
                    "too good"
                )
        if split != "train":
            yield self._trained_note(found.source.images)
            if self._past is not None:
                digests = self.images.digests(self._situation().known)
                yield self._past.unseen_note(self.images, digests, split)
        whole, left = len(found.source.images), len(found.images)
        if left < whole:
            yield f"{whole - left:,} of {whole:,} images can't be read, left out"

    def _split_outputs(self, split: str, **tta: Unpack[TtaOptions]) -> tuple[Scored, torch.Tensor]:
        """What the model says of a split's labelled images, as far as they can be read, and their targets."""
        found = self._read(to_score(self.images, split), self._situation(), **tta)
        return found, torch.from_numpy(np.array(found.images.targets))

    def _read(
        self, images: ImageSet, situation: Situation, *, is_raw: bool = False, **tta: Unpack[TtaOptions]
    ) -> Scored:
        views = TestViews.of(**tta, own=self.augment)
        temperature = 1.0 if is_raw else self._temperature
        return scored(
            situation,
            images,
            views,
            task=self.task,
            batched=self._batches,
            say=self._say,
            temperature=temperature,
        )

    @property
    def _temperature(self) -> float:
        return 1.0 if self._calibration is None else self._calibration.temperature

    def _drop_calibration(self, reason: str) -> None:
        if self._calibration is not None:
            self._say(f"{reason}, so the temperature {self._temperature:.4g} no longer holds. Calibrate anew.")
        self._calibration = None

    def _scored(self, logits: torch.Tensor, targets: torch.Tensor) -> dict[str, float]:
        logits, targets = logits.to(self.device).float(), targets.to(self.device)  # where class weights lie
        loss = scores.loss_number(self._criterion(), logits, targets)
        found = {"loss": loss, **scores.metric_values(self._scores(), logits, targets)}
        if self.task == "single":
            found["calibration_error"] = scores.expected_calibration_error(logits, targets)
        return {**found, "images": len(logits)}

    def _say(self, text: str | None) -> None:
        if text is not None and not self.quiet and is_first():
            logger_of("training").info("%s", text)

    def _note(self, text: str | None) -> None:
        if self.note is None:
            self._say(text)
        elif text is not None:
            self.note(text)

    def _trained_note(self, images: ImageSet) -> str | None:
        digests = images.digests(self._situation().known)
        notes = [past.trained_note(images, digests) for past in (self._seen, self._past) if past is not None]
        return next((note for note in notes if note is not None), None)

    def _count_trained(self, images: ImageSet) -> int | None:
        return int(self.were_trained_on(images).sum()) if len(images) else None

    def _write_reports(self, folder: Path, facts: Mapping[str, Json]) -> None:
        situation = self._situation()
        split = self._split(situation)
        if self._seen is not None:
            split = self._seen.over(split)  # what was fitted, though the images may be others by now
        split.over(self._past).write(folder)
        saved.write_history(folder, self.history)
        self._sidecar(facts, self._write_valid(folder), situation).write(folder)

    def _sidecar(
        self, facts: Mapping[str, Json], scored: tuple[Scored, dict[str, float]] | None, situation: Situation
    ) -> Sidecar:
        return sidecar_of(
            facts,
            self._fits,
            named=self._named,
            start=self._start,
            before=self._before,
            scored=scored,
            known=situation.known,
            trained_on=self._count_trained(labelled(self.images.valid) if scored is None else scored[0].images),
            device=str(self.device),
            epochs=len(self.history.records),
            inputs=self._trained_on,
            store=None if self.store is None else str(self.store.folder),
        )

    def _write_valid(self, folder: Path) -> tuple[Scored, dict[str, float]] | None:
        """Scores the images held out, and writes what was said of them; None if there are none."""
        if not len(labelled(self.images.valid)):
            return None
        try:
            found, targets = self._split_outputs("valid")
        except FeatureStoreError as error:  # the images went away since; the model can be saved all the same
            self._say(f"saved without validation scores: {error}")
            return None
        values, numbers = probabilities(found.logits, self.task), self._scored(found.logits, targets)
        saved.write_valid(folder, numbers, found.images, values)
        if not np.isfinite(values).all():
            self._say("saved without a table of predictions: some logits aren't finite")
        return found, numbers

    def _split(self, situation: Situation) -> PastSplit:
        return present_split(self.images, self.images.digests(situation.known), self._past)
