"""Fitting: one fit of a learner's model, from what it was asked for to its last epoch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer

from featstore.digest import Json
from featstore.images.views import Augment
from featstore.models.staged import StagedModel
from featstore.models.stages import PoolStage
from training.inputs.batches import Batches
from training.inputs.situation import views_words
from training.loop.averages import Average, averaged
from training.loop.checkpoints import SavedFit, fit_facts, interruptible
from training.loop.copies import copied_tensors, put_back
from training.loop.fit import Progress, run_epochs
from training.loop.history import History, Record, record_line
from training.loop.losses import smoothed_or_weighted
from training.loop.lr_find import LearningRates, find_lr
from training.loop.monitor import Monitor
from training.loop.optim import LearningRate, MakeOptimizer, build
from training.loop.plan import Plan, flat_lr
from training.loop.ranks import Ranks
from training.loop.steps import Steps
from training.schedules import Course
from training.scores.metrics import Loss, Metric
from training.standardised import standardise

Say = Callable[[str | None], None]


def check_waits(plan: Plan, monitor: Monitor, *, is_scored: bool) -> None:
    """Checks that what `patience` waits for is on record.

    Raises:
        ValueError: if it is of validation images, and there are none.
    """
    if not is_scored and plan.patience is not None and monitor.name != "train_loss":
        raise ValueError(f"patience waits for a better {monitor.name}, and there are no validation images. Give some.")


@dataclass(kw_only=True, eq=False)
class Fitting:
    """What a fit works on.

    Attributes:
        plan: what it was asked for.
        model: whose stages behind the freeze point train.
        train: batches to learn from.
        valid: batches to score, or None.
        optimizer: a name, or what makes one.
        loss: of scores.
        own_loss: a person's own, which that is then; or None.
        metrics: by name.
        classes: in order.
        task: of the images.
        seed: of order, views and dropout.
        say: tells a person something, or nothing.
        is_shown: whether long epochs have a bar.
    """

    plan: Plan
    model: StagedModel
    train: Batches
    valid: Batches | None
    optimizer: str | MakeOptimizer
    loss: Loss
    own_loss: Loss | None
    metrics: Mapping[str, Metric]
    classes: tuple[str, ...]
    task: str
    seed: int
    say: Say
    is_shown: bool

    @property
    def tail(self) -> nn.Sequential:
        """What trains."""
        return self.model.unfrozen

    def found(self) -> LearningRates:
        """What the finder sees; weights, statistics and random state come back."""
        before = copied_tensors(self.tail)
        try:
            self._standardise()
            return self._found(needs_curve=True)
        finally:
            put_back(self.tail, before)

    def begun(self, kept: SavedFit | None, *, first_epoch: int, beside: Begun | None = None) -> Begun:
        """The fit at its start, or where the one that is kept has come to.

        Args:
            kept: in the plan's checkpoint.
            first_epoch: number of epochs on record before it.
            beside: a fit on the same batches, of whose statistics of them this one may have its own.

        Raises:
            FactsDifferError: if what is kept is another fit.
            ValueError: for options that have no meaning here.
        """
        plan, monitor = self.plan, Monitor.of(self.plan.monitor, self.metrics)
        check_waits(plan, monitor, is_scored=self.valid is not None)
        descended, facts = self._descended(), self._facts()
        device = self.train.device
        ranks = Ranks.present(device)
        if ranks is not None and plan.folder is not None:
            ranks.check_alike("" if kept is None else kept.in_words(), plan.folder)
        progress = Progress(first_epoch=first_epoch, history=History(monitor=monitor))
        if kept is not None:
            kept.check(facts, self.tail)
            kept.check_processes(ranks)
            facts = dict(kept.facts)  # the tail may have moved since the fit began
            optimizer, self.train.first_pass = self._build(1.0 if plan.lr is None else plan.lr), kept.first_pass
            rank = 0 if ranks is None else ranks.rank
            progress = kept.put_into(self.tail, optimizer, self.train, self.valid, monitor, rank=rank)
            rates = kept.lrs
            self.say(f"going on from {kept.path}: {kept.in_words()} done")
        else:
            self._standardise(None if beside is None else beside.fitting.tail)
            optimizer = self._build(self._suggested() if plan.lr is None else plan.lr)
            rates = [float(group["lr"]) for group in optimizer.param_groups]
        if ranks is not None:  # from here on: the finder sees whole batches
            self.train.share_with(ranks.rank, ranks.count)
            rates = [ranks.firsts(rate) for rate in rates]
        passes = self.train.passes
        course = Course(
            schedule=plan.schedule,
            max_lrs=rates,
            cycles=plan.cycles,
            num_steps=passes * math.ceil(len(self.train) / passes / plan.accumulate),
        )
        steps = Steps(self.tail, optimizer, descended, device=device, options=plan.steps, ranks=ranks)
        average = None if plan.average is None else Average(plan.average, self.tail)
        if kept is not None:
            kept.put_beside(steps, average)
        return Begun(
            fitting=self, facts=facts, progress=progress, course=course, steps=steps, average=average, ranks=ranks
        )

    def _build(self, lr: LearningRate) -> Optimizer:
        plan = self.plan
        return build(
            self.model,
            lr,
            optimizer=self.optimizer,
            weight_decay=plan.weight_decay,
            decay_norms=plan.decay_norms,
        )

    def _suggested(self) -> float:
        found = self._found(needs_curve=False)
        self.say(found.in_words())
        return found.rate

    def _found(self, *, needs_curve: bool) -> LearningRates:
        return find_lr(
            self.tail,
            self.train,
            lambda: self._build(1.0),
            loss=self._descended(),
            seed=self.seed,
            options=self.plan.steps,
            needs_curve=needs_curve,
        )

    def _standardise(self, like: nn.Module | None = None) -> None:
        standardise(self.tail, (rows for rows, _ in self.train.in_order()), self.train.targets, like)

    def _descended(self) -> Loss:
        """What training steps descend."""
        assert self.train.targets is not None
        return smoothed_or_weighted(
            self.loss,
            self.task,
            self.train.targets,
            self.classes,
            label_smoothing=self.plan.label_smoothing,
            class_weights=self.plan.class_weights,
            is_own=self.own_loss is not None,
        )

    def _facts(self) -> dict[str, Json]:
        """What decides its bits, where it is kept."""
        if self.plan.folder is None:
            return self.plan.facts()
        optimizer = build(
            self.model, 1.0, optimizer=self.optimizer, weight_decay=1.0, decay_norms=self.plan.decay_norms
        )
        return fit_facts(
            self.plan.facts(),
            self.tail,
            self.train,
            self.valid,
            seed=self.seed,
            optimizer=optimizer,
            loss=self.own_loss,
            metrics=self.metrics,
            classes=self.classes,
        )


@dataclass(kw_only=True, eq=False)
class Begun:
    """A fit that is under way.

    Attributes:
        fitting: what it works on.
        facts: what decides its bits.
        progress: how far it is.
        course: its epochs and the rates of their steps.
        steps: makes them.
        average: the mean of its weights, or None.
        ranks: the processes that share it, or None.
    """

    fitting: Fitting
    facts: dict[str, Json]
    progress: Progress
    course: Course
    steps: Steps
    average: Average | None
    ranks: Ranks | None

    @property
    def num_passes(self) -> int:
        """Over the training images that were made once it is done, earlier fits' included: as many as are planned."""
        return self.fitting.train.pass_before(self.course.num_epochs)

    def asked(self, augment: Augment | None) -> dict[str, Json]:
        """What decides its numbers, flat, by names under which runs are found; the rate also where it was found."""
        fitting, model = self.fitting, self.fitting.model
        rates = [*dict.fromkeys(self.course.max_lrs)]
        frozen = [stage.name for stage in model.ordered[: model.num_frozen] if not isinstance(stage, PoolStage)]
        is_named = isinstance(fitting.optimizer, str)
        return {
            "frozen_to": frozen[-1] if frozen else None,
            **self.fitting.plan.settings(),
            "lr": flat_lr(rates if fitting.plan.lr is None else fitting.plan.lr),
            "optimizer": fitting.optimizer if is_named else _name_of(fitting.optimizer),
            "batch_size": fitting.train.batch_size,
            "seed": fitting.seed,
            "augment": None if augment is None else views_words(augment),
            "loss_function": None if fitting.own_loss is None else _name_of(fitting.own_loss),
        }

    def made(self) -> dict[str, Json]:
        """What has come of it up to now: epochs, whether they are all, the best of them, steps and seconds."""
        history = self.progress.history
        return {
            "epochs": len(history.records),
            "is_whole": self.progress.is_over(self.course, self.fitting.plan.patience),
            "best_epoch": history.best_epoch + 1 if history.records else None,
            "steps": len(history.losses),
            "seconds": round(sum(record["seconds"] for record in history.records), 3),
        }

    @property
    def kept(self) -> Record | None:
        """The epoch whose weights are there once it is over; None before the first one."""
        history = self.progress.history
        if not history.records:
            return None
        return history.best if self.fitting.plan.keep == "best" else history.last

    def worse_note(self, before: float) -> str | None:
        """What to say where the validation loss is higher than `before`, that of the weights it began with; else None.

        Silent where another number is monitored.
        """
        if self.kept is None or self.progress.history.monitor != Monitor() or not self.kept["valid_loss"] > before:
            return None
        has_batch_norm = any(isinstance(each, nn.modules.batchnorm._BatchNorm) for each in self.fitting.tail.modules())
        advice = "Try lower rates"
        if has_batch_norm and self.fitting.plan.batch_norm == "train":
            advice = (
                "Thawed batch norm trains on the statistics of each batch, which aren't those that the head has seen: "
                '--batch-norm frozen (in Python: batch_norm="frozen") keeps them'
            )
        return (
            f"the validation loss was {before:.4g} where this fit began and is {self.kept['valid_loss']:.4g} now, so "
            f"the model was better before. {advice}"
        )

    @property
    def passes_done(self) -> int:
        """Those that have been made."""
        return self.fitting.train.pass_before(self.progress.epoch)

    @property
    def is_over(self) -> bool:
        """Whether its last epoch is done."""
        return self.progress.is_over(self.course, self.fitting.plan.patience)

    def go_on(self, until: int | None = None) -> History:
        """Its epochs up to the number `until`, from 1, or all that are left; of a fit that isn't kept on the disk.

        The weights that the plan asks for are there once it is over.
        """
        plan, progress = self.fitting.plan, self.progress

        def told(record: Record) -> None:
            for listener in plan.listeners:
                listener(record)

        return self._epochs(told, should_stop=None if until is None else lambda: progress.epoch >= until)

    def _epochs(self, told: Callable[[Record], None], **more: Any) -> History:
        """The loop, by what the plan asks for; `more` says how it is kept, shown and stopped."""
        fitting, plan = self.fitting, self.fitting.plan
        return run_epochs(
            fitting.tail,
            fitting.train,
            fitting.valid,
            steps=self.steps,
            course=self.course,
            loss=fitting.loss,
            metrics=fitting.metrics,
            seed=fitting.seed,
            keep=plan.keep,
            patience=plan.patience,
            average=self.average,
            ranks=self.ranks,
            on_epoch_end=told,
            progress=self.progress,
            **more,
        )

    def run(self, save_snapshot: Callable[[int], None], done: Callable[[History], None]) -> History:
        """The epochs that are left.

        Args:
            save_snapshot: gets the number of a cycle, from 1, once its last step is done, with the model as it counts.
            done: gets the history of the whole fit, before an interrupt that was held back takes effect.
        """
        fitting, plan, progress = self.fitting, self.fitting.plan, self.progress
        train, valid = fitting.train, fitting.valid

        def told(record: Record) -> None:
            fitting.say(record_line(record))
            for listener in plan.listeners:
                listener(record)

        rates = [*self.course.max_lrs]
        with interruptible(
            plan.folder, self.facts, fitting.tail, self.steps, self.average, rates, train, valid, self.ranks
        ) as keeping:
            keep = keeping.get("save")

            def save(at: Progress) -> None:  # a snapshot before a checkpoint says that its epoch is done
                cycle = self.course.cycle_ended(at.epoch)
                if plan.snapshot is not None and cycle is not None and not at.epoch_losses:
                    with averaged(fitting.tail, self.average, at.epoch - 1, self.course.num_epochs):
                        save_snapshot(cycle)
                if keep is not None:
                    keep(at)

            history = self._epochs(told, is_shown=fitting.is_shown, **{**keeping, "save": save})
            is_over = self.is_over
            if is_over:  # else an interrupt ends the block
                done(history)
        if not is_over:
            raise KeyboardInterrupt("another process of this fit was interrupted")  # and this one wasn't
        judges = plan.keep == "best" or plan.patience is not None
        if judges and history.monitor.name in history.last and math.isinf(progress.lowest):
            fitting.say(f"{history.monitor.name} was no number in any epoch, so none was best: the last one counts")
        if progress.epoch < self.course.num_epochs:
            fitting.say(f"{history.monitor.name} was best {plan.patience} epochs ago (patience): no further epoch")
        return history


def _name_of(function: object) -> str:
    """Of a function of a person's own, or of the class of an object."""
    return str(getattr(function, "__name__", type(function).__name__))
