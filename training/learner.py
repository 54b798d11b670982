"""Learner: one model, one image set, maybe one store; what is frozen and which augmentation decide what a fit reads."""

from __future__ import annotations

import csv
import json
import math
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

import featstore
from featstore.digest import Json
from featstore.errors import AmbiguousRequestError, DamagedFileError, FactsDifferError, FeatureStoreError
from featstore.extraction.extract import check_size
from featstore.extraction.remedy import DEFAULT_SPLIT_SEED, DEFAULT_VALID
from featstore.images.image_set import ImageSet, overlap_note
from featstore.images.views import Augment, View
from featstore.models.runs import new_run, read_run, write_run
from featstore.models.staged import PoolStage, StagedModel
from featstore.models.trunk import choose_device
from featstore.store.store import FeatureStore
from training import metrics as scores
from training import optim, schedules
from training.fit import History, Record, copied_tensors, outputs, predicted, put_back, run_epochs
from training.heads import build_head, passes_an_epoch, standardise
from training.inputs.batches import Batches, num_batches
from training.inputs.derive import Inputs, Source, derive, extract_missing, find, labelled, training_part
from training.inputs.situation import OnError, OnMissing, Origin, Situation, frozen_words, training_words, views_words
from training.lr_find import LearningRates, find_lr
from training.predict import Prediction, as_images, predictions, probabilities, write_csv
from training.saved import check_head, head_digest, no_images, past_split, saved_backbone, saved_head, with_statistics
from training.splits import PastSplit, with_classes

HISTORY, METRICS, RUN, VALID_PREDICTIONS = "history.csv", "metrics.json", "run.json", "valid_predictions.csv"

_FIXED = ("classes", "task", "device")
_CHOICES = {"on_missing": ("error", "images", "extract"), "on_error": ("raise", "skip")}
_KINDS: dict[str, tuple[type, str]] = {
    "store": (FeatureStore, 'a store, FeatureStore("features")'),
    "augment": (Augment, 'an augmentation with its seeds, Augment("flip", seeds=range(4))'),
    "view": (View, "a view, model.view.resized(size=64) for example"),
    "batch_size": (int, "a number of images"),
}


class Learner:
    """Fits a head to features, or a model to images: one loop, and no mode.

    The model is `learn.model`: the backbone's stages up to the cut, a pool, and the head. The caller's backbone is
    never changed: frozen stages are shared with it, thawed ones are copies. Where the next fit reads from is derived,
    and `learn.inputs` says it in words. These may be set later: images, store, augment, on_missing, on_error,
    optimizer, batch_size, seed, view, workers, quiet and allow_leak. The rest is fixed; an attribute that isn't known
    is refused.

    Args:
        model: the backbone; or a model with its own head, with ``head="keep"``.
        images: labelled, with a split. Without one they get that of the run that the backbone comes from; where there
            is none, all images train and none validate.
        store: where features are looked up; None: images are read.
        cut: where the head sits; default: the model's default cut, or the only one this model has features of.
        reduce: the pool at the cut: auto, none, avg, max, concat, token or tokens.
        head: concat, linear, mlp, a module of your own from pooled activations to logits, or ``keep``.
        features: start of the key of the set to use; it fixes cut, reduction, view, storage type and precision.
        augment: policy and seeds of the training images; None: the evaluation view.
        on_missing: what happens when the store doesn't hold what could be read from it: ``error``, ``images`` (read
            them and run the trunk) or ``extract``. Default: ``error`` with a store.
        on_error: an image that can't be read: ``raise``, or ``skip`` it, and say how many.
        view: geometry and normalisation; default: the model's.
        loss: of (logits, targets); default: cross-entropy, or binary cross-entropy for several labels.
        metrics: functions of (logits, targets), added to the task's own under their names.
        optimizer: adamw, adam, sgd, or a callable that takes parameter groups.
        batch_size: of training and scoring.
        device: auto, cpu, cuda or cuda:1.
        seed: of head weights, order, views and dropout.
        workers: threads that read images.
        quiet: prints nothing while it works.
        allow_leak: allows training on images that the run, which the backbone comes from, held out.

    Attributes:
        model: the model as it is now.
        inputs: where the next fit reads from.
        read_from: what the last fit or pass read: features, images, or None before the first.
        history: the epochs of all fits.
        classes: the class table; logit k is of class k.
    """

    __slots__ = (
        "_cut", "_features", "_images", "_loss", "_metrics", "_origins", "_past", "_probed", "_seen", "_trained_on",
        "allow_leak", "augment", "batch_size", "classes", "device", "head_name", "history", "model", "on_error",
        "on_missing", "optimizer", "quiet", "read_from", "seed", "store", "task", "view", "workers",
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
    ) -> None:
        """Makes the model with its head; nothing is trained or extracted. The class describes the arguments."""
        if not isinstance(model, nn.Module):
            raise TypeError(f'model is {model!r}; expected a model, backbone("resnet34") for example.')
        if not isinstance(images, ImageSet):
            raise TypeError(
                f'images are {images!r}; expected an image set, ImageSet.from_folder("photos") for example.'
            )
        if store is not None and not isinstance(store, FeatureStore):
            raise TypeError(f'store is {store!r}; expected a store, FeatureStore("features") for example.')
        backbone = model if isinstance(model, StagedModel) else StagedModel.from_module(model)
        self._past = past_split(backbone)
        self._seen: PastSplit | None = None  # of this learner's own fits
        if self._past is not None:
            images = self._past.applied(images, {} if store is None else store.known_digests(images))
        self._images, self.store, self.augment = images, store, augment
        self.on_missing: OnMissing = on_missing or ("error" if store is not None else "images")
        self.on_error: OnError = on_error
        self.optimizer, self.batch_size, self.seed = optimizer, batch_size, seed
        self.workers, self.quiet, self.allow_leak = workers, quiet, allow_leak
        self.device = choose_device(device)
        self._features = features
        if features is None and cut is None and reduce == "auto":
            self._features = _made_from(backbone, store)
        self.view = (view or self._features_view() or backbone.view).evaluation
        check_size(backbone, self.view)
        self.classes, self.task = images.classes, images.task
        self.history = History()
        self.read_from: Literal["features", "images"] | None = None
        self._loss, self._metrics = loss, _by_name(metrics or ())
        self._trained_on: str | None = None
        self._probed: set[tuple[str, str]] = set()
        self._origins = [Origin(dict(backbone.origin), backbone.digests(), backbone.view)]
        self.head_name = head if isinstance(head, str) else "module"
        self.model, self._cut = self._with_head(backbone, cut, reduce, head)
        self.model.to_device(self.device)
        self.model.eval()

    def __setattr__(self, name: str, value: Any) -> None:
        if not hasattr(type(self), name):
            hint = f"Its attributes are {', '.join(each for each in self.__slots__ if not each.startswith('_'))}."
            if name == "precompute":
                hint = (
                    "There is no precompute mode: stored features are used where what is frozen and the augmentation "
                    "allow it, and learn.inputs says so. See freeze_to(...), unfreeze() and augment."
                )
            raise AttributeError(f"A Learner has no attribute {name!r}. {hint}")
        if name in _FIXED and hasattr(self, name):
            raise AttributeError(f"{name} is fixed when a Learner is made. Make a new one for another.")
        if name in _CHOICES and value not in _CHOICES[name]:
            *others, last = _CHOICES[name]
            raise ValueError(f"{name} is {value!r}; expected {', '.join(others)} or {last}.")
        if name in _KINDS and value is not None and not isinstance(value, _KINDS[name][0]):
            raise TypeError(f"{name} is {value!r}; expected {_KINDS[name][1]}.")
        if name == "batch_size" and value < 1:
            raise ValueError(f"batch_size is {value}; expected at least 1.")
        super().__setattr__(name, value.evaluation if name == "view" else value)

    def __repr__(self) -> str:
        pool = f" ({self._reduction})" if self._reduction else ""
        inputs = ["inputs: none, as no images were given; files can be predicted all the same"]
        if len(self.images):
            inputs = ["inputs:", *(f"  {line}" for line in str(self.inputs).splitlines())]
        return "\n".join(
            [
                f"Learner: {self.model.name}, {self.head_name} head at {self.cut}{pool}, {len(self.classes)} classes; "
                f"{_images_words(self.images)}",
                self._frozen_line(),
                f"augmentation: {'none' if self.augment is None else views_words(self.augment)}",
                *inputs,
            ]
        )

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

    def freeze_to(self, cut: str) -> None:
        """Freezes everything up to the value `cut` (the last frozen stage, by name) and thaws the rest."""
        self.model.freeze_to(cut)
        self._say_frozen()

    def unfreeze(self) -> None:
        """Thaws everything; the next fit reads images."""
        self.model.unfreeze()
        self._say_frozen()

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
        self._origins.append(Origin(dict(model.origin), model.digests(), model.view))

    # ---------------------------------------------------------------------------------------------------- training

    def fit(
        self,
        epochs: int,
        lr: optim.LearningRate | None = None,
        *,
        schedule: str = "one_cycle",
        weight_decay: float = 0.01,
        on_epoch_end: Callable[[Record], Any] | None = None,
        keep: Literal["last", "best"] = "last",
    ) -> History:
        """Trains what isn't frozen.

        Args:
            epochs: passes over the training images.
            lr: one rate, one a layer group, or (low, high); with one_cycle the highest. Default: what `lr_find`
                suggests, printed as a number.
            schedule: one_cycle (torch's defaults) or constant.
            weight_decay: of every parameter.
            on_epoch_end: gets each epoch's record.
            keep: the weights that remain: of the last epoch, or of the one with the lowest validation loss.

        Raises:
            FeatureStoreError: if the inputs can't be had; nothing is trained then.
            ValueError: if nothing is left to train.
        """
        if epochs < 1:
            raise ValueError(f"epochs is {epochs}; expected at least 1.")
        situation, inputs = self._ready()
        assert inputs.train is not None
        train = self._training_batches(inputs.train, situation)
        valid = None if inputs.valid is None else self._batches(inputs.valid, situation)
        standardise(self._tail(), (rows for rows, _ in train.in_order()))
        if lr is None:
            found = self._found(train, weight_decay)
            lr = float(f"{found.suggestion:.2g}")
            self._say(f"learning rate {lr:g}, the finder's suggestion (to use it again: --lr {lr:g})")
            if found.note is not None:
                self._say(found.note)
        self.read_from, self._trained_on = inputs.train.kind, str(inputs)
        self._seen = self._split(situation).over(self._seen)  # before the first step: a fit may be interrupted
        optimizer = optim.build(self.model, lr, optimizer=self.optimizer, weight_decay=weight_decay)
        rates = [float(group["lr"]) for group in optimizer.param_groups]
        scheduler = schedules.build(schedule, optimizer, rates, epochs * len(train))

        def told(record: Record) -> None:
            self._say(_line(record))
            if on_epoch_end is not None:
                on_epoch_end(record)

        history = run_epochs(
            self._tail(),
            train,
            valid,
            optimizer=optimizer,
            scheduler=scheduler,
            loss=self._criterion(),
            metrics=self._scores(),
            epochs=epochs,
            seed=self.seed,
            first_epoch=len(self.history.records),
            keep=keep,
            on_epoch_end=told,
        )
        self._say_left_out(train, valid)
        self.history.extend(history)
        return history

    def lr_find(self, *, weight_decay: float = 0.01) -> LearningRates:
        """Tries rising learning rates on what would train now; weights, statistics and random state come back."""
        situation, inputs = self._ready()
        assert inputs.train is not None
        train, tail = self._training_batches(inputs.train, situation), self._tail()
        before = copied_tensors(tail)
        try:
            standardise(tail, (rows for rows, _ in train.in_order()))
            found = self._found(train, weight_decay)
        finally:
            put_back(tail, before)
        if found.note is not None:
            self._say(found.note)
        return found

    def _found(self, train: Batches, weight_decay: float) -> LearningRates:
        return find_lr(
            self._tail(),
            train,
            lambda: optim.build(self.model, 1.0, optimizer=self.optimizer, weight_decay=weight_decay),
            loss=self._criterion(),
            seed=self.seed,
        )

    # --------------------------------------------------------------------------------------------------- inference

    def evaluate(self, split: str = "valid") -> dict[str, float]:
        """Loss, metrics and number of the labelled images of a split: train, valid or test, in the evaluation view."""
        source, ids, logits, targets = self._split_outputs(split)
        self.read_from = source.kind
        if split != "train":
            self._say_trained(source.images)
            self._say_unseen(split)
        if len(ids) < len(source.images):
            self._say(f"{len(source.images) - len(ids):,} of {len(source.images):,} images can't be read, left out")
        return self._scored(logits, targets)

    def predict(self, items: ImageSet | str | os.PathLike[str] | Iterable[str | os.PathLike[str]]) -> list[Prediction]:
        """One record an image (label, probability, top), in order.

        Args:
            items: an image set, or files and folders.
        """
        ids, values = self.scored(items)
        return predictions(ids, values, self.classes, self.task)

    def predict_proba(
        self, items: ImageSet | str | os.PathLike[str] | Iterable[str | os.PathLike[str]]
    ) -> NDArray[np.float64]:
        """Probabilities ``(N, K)``, columns in the order of `classes`."""
        return self.scored(items)[1]

    def scored(
        self, items: ImageSet | str | os.PathLike[str] | Iterable[str | os.PathLike[str]]
    ) -> tuple[tuple[str, ...], NDArray[np.float64]]:
        """Ids and probabilities ``(N, K)``, without images that can't be read where ``on_error`` is ``skip``."""
        images = as_images(items)
        situation, source = self._reading(images)
        self.read_from = source.kind
        logits, rows = predicted(self._tail(), self._batches(source, situation))
        ids = tuple(source.images.ids[row] for row in rows.tolist())
        return ids, probabilities(logits, self.task)

    # ----------------------------------------------------------------------------------------------- save and load

    def save(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Writes the whole model and what is known of it: a run folder, whole or not at all.

        model.safetensors, model.json, split.npz, history.csv, metrics.json, valid_predictions.csv and run.json. An
        absent trunk is saved by its digests.
        """
        folder = Path(folder)
        with new_run(folder, overwrite=overwrite) as made:
            write_run(made, self._facts(), self.model.tensors())
            self._write_reports(made)
        made_by = self.model.origin.get("architecture")
        if made_by is not None:  # else no command can make the model anew
            origin = {"backbone": str(folder), "architecture": made_by}
            self._origins.append(Origin(origin, self.model.digests(), self.view))
        return folder

    @classmethod
    def load(
        cls,
        run: str | Path,
        images: ImageSet | None = None,
        store: FeatureStore | None = None,
        *,
        module: nn.Module | None = None,
        head: nn.Module | None = None,
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
            options: further arguments of `Learner`.

        Raises:
            FeatureStoreError: if the run is damaged, needs `module` or `head`, or `images` have a class it lacks.
        """
        folder = Path(run)
        saved = read_run(folder)
        facts = saved.facts
        classes, past = tuple(facts["classes"]), PastSplit.read(folder)
        if images is None:
            images = no_images(classes, facts["task"])
        elif not images.is_labelled:
            images = replace(images, task=facts["task"])
        elif images.task != facts["task"]:
            raise FeatureStoreError(
                f"The model of {folder} is for the task {facts['task']}, and these images are labelled for "
                f"{images.task}. Give their labels so: --task {facts['task']}."
            )
        images = with_classes(images, classes, folder)
        if past is not None:
            images = past.applied(images, {} if store is None else store.known_digests(images))
        base = saved_backbone(saved, folder, module)
        learn = cls(
            base,
            images,
            store,
            cut=facts["model"]["default_cut"],
            reduce=facts["model"]["reduction"] or "none",
            head=saved_head(facts["head"], head, folder),
            view=View.from_facts(facts["model"]["view"]),
            **options,
        )
        learn.head_name = facts["head"]["name"]
        if "backbone" not in base.origin:
            learn._origins.clear()  # the caller's module has other weights than the run
        learn.model.load_tensors(with_statistics(saved.tensors, learn.model))
        check_head(learn.model, facts["head"], folder)
        learn._past = past
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
        about = Path(run) / RUN
        try:
            folder = json.loads(about.read_text(encoding="utf-8"))["store"]
        except (OSError, ValueError, KeyError):  # a run without that fact is a run all the same
            return None
        return FeatureStore(folder) if folder is not None and Path(folder).is_dir() else None

    # ------------------------------------------------------------------------------------------------------- inside

    @property
    def _reduction(self) -> str | None:
        pools = [stage.pool.reduction for stage in self.model.stages if isinstance(stage, PoolStage)]
        return pools[-1] if pools else None

    def _situation(self) -> Situation:
        return Situation(
            model=self.model,
            origins=tuple(self._origins),
            images=self.images,
            store=self.store,
            view=self.view,
            key=self._features,
            on_missing=self.on_missing,
            on_error=self.on_error,
            device=self.device,
            probed=self._probed,
        )

    def _features_view(self) -> View | None:
        if self._features is None:
            return None
        if self.store is None:
            raise ValueError(
                f"features is {self._features!r} and there is no store. Pass the store that holds the set."
            )
        return self.store.set(self._features).spec.rendered

    def _with_head(
        self, backbone: StagedModel, cut: str | None, reduce: str, head: str | nn.Module
    ) -> tuple[StagedModel, str]:
        """The model with its head, and the cut where that sits."""
        if head == "keep":
            model = backbone.sharing()
            cut = model.canonical(cut or model.default_cut)
            shape, count = model.shape(model.cut_points[-1], self.view.size), len(self.classes)
            if shape != (count,):
                raise ValueError(
                    f"{model.name} ends in {'x'.join(map(str, shape))} values an image, and the images have {count:,} "
                    'classes; head="keep" needs a logit a class. Give a class table with classes=, or another head.'
                )
            model.freeze_to(cut)
            return model, cut
        cut, reduce = self._place_of_head(backbone, cut, reduce)
        pool = backbone.pool(cut, reduce)
        shape = pool.shape(backbone.shape(cut, self.view.size))
        module = build_head(head, shape, max(len(self.classes), 1), self.seed)
        return backbone.with_head(module, cut=cut, reduction=pool.reduction), cut

    def _place_of_head(self, backbone: StagedModel, cut: str | None, reduce: str) -> tuple[str, str]:
        """Cut and reduction; where the caller left them open the default ones, or the only ones that are stored.

        Raises:
            AmbiguousRequestError: where several are stored and the default ones aren't among them.
        """
        stored = self._stored_places(backbone, cut, reduce)
        if self._features is not None and stored:
            ((name, reduction),) = stored
            is_maps = reduction == "none" and backbone.layout(name) != "NC"
            return name, reduce if is_maps else reduction
        name = backbone.canonical(cut or backbone.default_cut)
        default = name, backbone.pool(name, reduce).reduction
        pooled = [each for each in stored if each[1] != "none" or backbone.layout(each[0]) == "NC"]
        # A store's own model was asked for by a key, and there is no telling which of several it was.
        if not pooled or (default in pooled and not (backbone.is_absent and len(pooled) > 1)):
            return default
        if len(pooled) > 1:
            assert self.store is not None
            listed = ", ".join(f"{name} {reduction}" for name, reduction in pooled)
            raise AmbiguousRequestError(
                f"{self.store.root} holds several kinds of features of {backbone.name}: {listed}. Choose one with "
                "cut= and reduce=, or by its key with features= (--cut, --reduce, --features)."
            )
        return pooled[0]

    def _stored_places(self, backbone: StagedModel, cut: str | None, reduce: str) -> list[tuple[str, str]]:
        """Cuts and reductions of the stored sets, or of the one that was chosen, that are this backbone's."""
        if self.store is None or not self.store.folder.is_dir():
            return []
        sets = self.store.sets() if self._features is None else [self.store.set(self._features)]
        digests = self._origins[0].digests
        wanted = None if cut is None else backbone.canonical(cut)
        found = {}
        for each in sets:
            names = [name for name in backbone.cut_points if digests[name] == each.spec.trunk]
            label = str(each.facts["cut"])
            if names and wanted in (None, *names) and reduce in ("auto", each.spec.reduction):
                found[wanted or (label if label in names else names[0]), each.spec.reduction] = each
        return sorted(found)

    def _tail(self) -> nn.Sequential:
        return nn.Sequential(*list(self.model.stages)[self.model.num_frozen :])

    def _criterion(self) -> scores.Loss:
        return self._loss or scores.loss(self.task)

    def _scores(self) -> dict[str, scores.Metric]:
        return {**scores.default_metrics(self.task, len(self.classes)), **self._metrics}

    def _batches(self, source: Source, situation: Situation) -> Batches:
        return Batches(source, situation, batch_size=self.batch_size, workers=self.workers)

    def _training_batches(self, source: Source, situation: Situation) -> Batches:
        passes = passes_an_epoch(self._tail(), num_batches(len(source.images), self.batch_size))
        return Batches(source, situation, batch_size=self.batch_size, workers=self.workers, passes=passes)

    def _ready(self) -> tuple[Situation, Inputs]:
        """The inputs of a fit, checked, and said; what is missing is extracted where that was asked for."""
        training = labelled(training_part(self.images))
        if not len(training) or training.targets is None:
            raise ValueError("There are no labelled images to train on. Give an image set with classes.")
        optim.build(self.model, 1.0, optimizer="sgd", weight_decay=0.0)  # raises if nothing would train
        situation = self._situation()
        for past in (self._seen, self._past):
            if past is not None and not self.allow_leak:
                past.check(training, training.digests(situation.known))
        inputs = derive(situation, self.augment)
        if inputs.first is not None:
            self._say(inputs.first)
            extract_missing(situation, self.augment, progress=not self.quiet)
            situation = replace(self._situation(), on_missing="error")
            inputs = derive(situation, self.augment)
        if inputs.problem is not None:
            raise inputs.problem
        assert inputs.train is not None
        self._refuse_batches_of_one(len(inputs.train.images))
        self._say(str(inputs))
        overlap = overlap_note(self.images, self.images.digests(situation.known))
        if overlap is not None:
            self._say(overlap)
        kept = {name for source in (inputs.train, inputs.valid) if source is not None for name in source.images.ids}
        left_out = [name for part in (training, labelled(self.images.valid)) for name in part.ids if name not in kept]
        if left_out:
            named = f"{', '.join(left_out[:3])}{', ...' * (len(left_out) > 3)}"
            self._say(f"{len(left_out):,} image{'s' * (len(left_out) > 1)} can't be read, left out: {named}")
        return situation, inputs

    def _refuse_batches_of_one(self, num_images: int) -> None:
        """Batch norm over vectors has no statistics of a single row; torch would say so in the middle of the work."""
        has_norm = any(isinstance(module, nn.BatchNorm1d) for module in self._tail().modules())
        if has_norm and min(self.batch_size, num_images) == 1:
            raise ValueError(
                f"Batch norm can't be trained on one image at a time ({num_images:,} to train on, batch size "
                f"{self.batch_size}). Give more images or a larger --batch-size, or a head without it: --head linear "
                '(in Python: batch_size=, head="linear").'
            )

    def _split_outputs(self, split: str) -> tuple[Source, tuple[str, ...], torch.Tensor, torch.Tensor]:
        """Where a split's labelled images were read from; ids, logits ``(N, K)`` and targets of those that could be."""
        if split not in ("train", "valid", "test"):
            raise ValueError(f"{split!r} is no split; expected train, valid or test.")
        part = training_part(self.images) if split == "train" else getattr(self.images, split)
        chosen = labelled(part)
        if not len(self.images):
            raise ValueError(
                "This learner has no images, so it can predict but not score. Expected labelled ones. Give them when "
                "it is loaded: Learner.load(run, images, store)."
            )
        if not len(chosen) or chosen.targets is None:
            raise ValueError(
                f"The split {split} has no labelled images. Expected some to score among {self.images.describe()}. "
                "Score another split, or give other images (learn.images = images)."
            )
        situation, source = self._reading(chosen)
        batches = self._batches(source, situation)
        logits, targets, rows = outputs(self._tail(), batches)
        return source, tuple(source.images.ids[row] for row in rows.tolist()), logits, targets

    def _scored(self, logits: torch.Tensor, targets: torch.Tensor) -> dict[str, float]:
        values = {name: metric(logits, targets) for name, metric in self._scores().items()}
        return {"loss": float(self._criterion()(logits, targets)), **values, "images": len(logits)}

    def _reading(self, images: ImageSet) -> tuple[Situation, Source]:
        """For scores and predictions: what isn't stored is read, unless there is nothing to read.

        Their numbers are right either way, so neither several fitting sets nor a damaged one are a reason to stop:
        images are read then, too.
        """
        is_readable = not self.model.is_absent and not images.absent(1)
        situation = replace(self._situation(), on_missing="images" if is_readable else "error")
        try:
            return situation, find(situation, images, None)
        except (AmbiguousRequestError, DamagedFileError, FactsDifferError) as error:
            if not is_readable:
                raise
            if not isinstance(error, AmbiguousRequestError):
                self._say(f"images are read instead of features: {error}")
            situation = replace(situation, store=None)
            return situation, find(situation, images, None)

    def _frozen_line(self) -> str:
        count = sum(parameter.numel() for parameter in self.model.trained_parameters())
        return (
            f"frozen: {frozen_words(self.model)}; training: {training_words(self.model)} "
            f"({f'{count / 1e6:.1f} M' if count >= 100_000 else f'{count:,}'} parameters)"
        )

    def _say(self, text: str) -> None:
        if not self.quiet:
            print(text, file=sys.stderr)

    def _say_left_out(self, *passes: Batches | None) -> None:
        failures = {name: reason for each in passes if each is not None for name, reason in each.failures.items()}
        for name, reason in list(failures.items())[:1]:
            self._say(
                f"{len(failures):,} image{'s' * (len(failures) > 1)} can't be read, left out (first: {name}: {reason})"
            )

    def _say_trained(self, images: ImageSet) -> None:
        digests = images.digests(self._situation().known)
        notes = [past.trained_note(images, digests) for past in (self._seen, self._past) if past is not None]
        for note in [each for each in notes if each is not None][:1]:
            self._say(note)

    def _say_unseen(self, split: str) -> None:
        note = None
        if self._past is not None:
            note = self._past.unseen_note(self.images, self.images.digests(self._situation().known), split)
        if note is not None:
            self._say(note)

    def _say_frozen(self) -> None:
        self._say(self._frozen_line())

    def _facts(self) -> dict[str, Json]:
        model, origin = self.model, self.model.origin
        digests = model.digests()
        frozen = [stage.name for stage in list(model.stages)[: model.num_frozen] if not isinstance(stage, PoolStage)]
        last = model.stages[-1]
        return {
            "model": {
                "name": model.name,
                "backbone": origin.get("backbone"),
                "architecture": origin.get("architecture"),
                "cut": model.cut_points[-1],
                "default_cut": self.cut,
                "reduction": self._reduction,
                "stages": [
                    {
                        "name": name,
                        "layout": model.layout(name),
                        "shape": list(model.shape(name, self.view.size)),
                        "digest": digests[name],
                    }
                    for name in model.cut_points
                ],
                "digests": {name: digests[name] for name in model.cut_points},
                "class_tokens": model.class_tokens,
                "view": self.view.facts(),
                "frozen": frozen[-1] if frozen else None,
                "is_absent": model.is_absent,
            },
            "head": {
                "name": self.head_name,
                "stage": str(last.name),
                "digest": head_digest(model) if self.head_name == "module" else None,
            },
            "classes": list(self.classes),
            "task": self.task,
            "seed": self.seed,
        }

    def _write_reports(self, folder: Path) -> None:
        split = self._split(self._situation())
        if self._seen is not None:
            split = self._seen.over(split)  # what was fitted, though the images may be others by now
        split.over(self._past).write(folder)
        if self.history.records:
            columns = self.history.frame()
            with (folder / HISTORY).open("w", newline="", encoding="utf-8") as file:
                writer = csv.writer(file)
                writer.writerow(columns)
                writer.writerows(zip(*columns.values(), strict=True))
        about = {
            "featstore": featstore.__version__,
            "torch": torch.__version__,
            "device": str(self.device),
            "batch_size": self.batch_size,
            "epochs": len(self.history.records),
            "inputs": self._trained_on,
            "store": None if self.store is None else str(self.store.folder),
            "when": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        (folder / RUN).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
        if len(labelled(self.images.valid)):
            self._write_valid(folder)

    def _split(self, situation: Situation) -> PastSplit:
        """What the images as they are dealt now train and hold out."""
        split, past = self.images.origin.get("split") or {}, self._past
        return PastSplit.of(
            self.images,
            self.images.digests(situation.known),
            valid=split.get("valid", past.valid if past else DEFAULT_VALID),
            seed=split.get("seed", past.seed if past else DEFAULT_SPLIT_SEED),
        )

    def _write_valid(self, folder: Path) -> None:
        try:
            _, ids, logits, targets = self._split_outputs("valid")
        except FeatureStoreError as error:  # the images went away since; the model can be saved all the same
            self._say(f"saved without validation scores: {error}")
            return
        scored = self._scored(logits, targets).items()
        finite = {name: value if math.isfinite(value) else None for name, value in scored}
        (folder / METRICS).write_text(json.dumps({"valid": finite}, indent=1) + "\n", encoding="utf-8")
        values = probabilities(logits.cpu(), self.task)
        write_csv(folder / VALID_PREDICTIONS, ids, values, self.classes, self.task)


def _made_from(model: StagedModel, store: FeatureStore | None) -> str | None:
    """The key that `FeatureStore.model` was given for a model without weights, if the store holds that set."""
    key = model.origin.get("features")
    if key is None or store is None or key not in {found.key for found in store.sets()}:
        return None
    return str(key)


def _images_words(images: ImageSet) -> str:
    if not len(images):
        return "no images"
    parts = [(name, int((images.splits == name).sum())) for name in ("train", "valid", "test")]
    dealt = ", ".join(f"{name} {count:,}" for name, count in parts if count)
    return f"{len(images):,} images" + (f": {dealt}" if dealt else "")


def _by_name(metrics: Iterable[scores.Metric]) -> dict[str, scores.Metric]:
    found: dict[str, scores.Metric] = {}
    for each in metrics:
        name = str(getattr(each, "__name__", type(each).__name__))
        if name in found:
            raise ValueError(
                f"Two metrics are called {name}, and records hold one number a name. Name them differently."
            )
        found[name] = each
    return found


def _line(record: Record) -> str:
    words = [f"{name} {value:.4g}" for name, value in record.items() if name not in ("epoch", "seconds")]
    return f"epoch {int(record['epoch'])}: {', '.join(words)}, {record['seconds']:.1f} s"
