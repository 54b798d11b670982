"""The one training loop: it sees (inputs, targets) and the stages that train, never where the inputs come from."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from featstore.errors import FeatureStoreError
from featstore.extraction.progress import bar_class
from featstore.models.modes import mode_of, one_pass
from featstore.models.stages import HeadStage
from training.inputs.batches import Batches
from training.loop.averages import Average
from training.loop.copies import copied_tensors, put_back, tensors_of
from training.loop.history import History, Record
from training.loop.ranks import Ranks
from training.loop.steps import StepOptions, Steps, check_finite, settled
from training.schedules import Course
from training.scores.metrics import Loss, Metric, loss_number, metric_values

_PATIENT = 5.0  # seconds that an epoch may take without a bar
_APART = 0x9E3779B1  # odd: torch's generator of the CPU takes the low 32 bits of a seed alone


@dataclass(eq=False, kw_only=True)
class Progress:
    """How far a fit is: all that its next step depends on, but for the tensors of model and optimizer.

    Attributes:
        epoch: under way, from 0; as many are done.
        first_epoch: number of epochs on record before the fit, after which its own are counted.
        history: of the epochs that are done, and of all steps.
        epoch_losses: loss and number of images of each batch of the epoch under way.
        cycle_start: number of steps before the present cycle.
        lowest: the monitored number of the best epoch, turned so that less is better; infinite before there was one.
        best: the tail's tensors at that epoch, if they are kept.
        random: the states of `Draws`; none between epochs.
        seconds: that the epoch under way has taken.
    """

    epoch: int = 0
    first_epoch: int = 0
    history: History = field(default_factory=History)
    epoch_losses: list[tuple[float, int]] = field(default_factory=list)
    cycle_start: int = 0
    lowest: float = math.inf
    best: dict[str, Tensor] | None = None
    random: list[Tensor] = field(default_factory=list)
    seconds: float = 0.0

    def add(self, record: Record, keep: Literal["last", "best"], copied: Callable[[], dict[str, Tensor]]) -> None:
        """Puts the epoch under way on record; `copied` gives its weights, if it is the best and these are kept."""
        history = self.history
        history.records.append(record)
        number = history.monitor.loss(record)
        if history.monitor.name not in record or math.isinf(self.lowest) or number < self.lowest:
            # What isn't a number is worse than any other, so that a later epoch can be better; of such alone the last
            # counts, as where nothing is on record.
            self.lowest, history.best_epoch = number, self.epoch
            is_kept = keep == "best" and history.monitor.name in record
            self.best = copied() if is_kept else None
        self.epoch, self.epoch_losses, self.random, self.seconds = self.epoch + 1, [], [], 0.0

    def is_over(self, course: Course, patience: int | None) -> bool:
        """Whether all epochs are done, or as many as `patience` since the best."""
        since_best = self.epoch - 1 - self.history.best_epoch
        return self.epoch >= course.num_epochs or (patience is not None and self.epoch > 0 and since_best >= patience)


def run_epochs(
    tail: nn.Module,
    train: Batches,
    valid: Batches | None,
    *,
    steps: Steps,
    course: Course,
    loss: Loss,
    metrics: Mapping[str, Metric],
    seed: int,
    keep: Literal["last", "best"] = "last",
    patience: int | None = None,
    average: Average | None = None,
    ranks: Ranks | None = None,
    on_epoch_end: Callable[[Record], Any] | None = None,
    is_shown: bool = False,
    progress: Progress | None = None,
    save: Callable[[Progress], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> History:
    """Trains `tail` for some epochs and scores it after each.

    Global random state and training flags are as before when it ends, also by an error.

    Args:
        tail: the stages that aren't frozen.
        train: batches to learn from.
        valid: batches to score, or None.
        steps: makes the tail's steps.
        course: the epochs, and the rates of their steps.
        loss: of logits and targets, on record.
        metrics: by name, over all rows at once.
        seed: of order, views and dropout.
        keep: the weights that remain: of the last epoch, or of the best by the history's monitor.
        patience: ends the fit after so many epochs that weren't better than the best.
        average: the mean of the weights, which is scored and remains.
        ranks: the processes that share the work.
        on_epoch_end: gets each record.
        is_shown: whether an epoch that takes more than some seconds has a bar.
        progress: where to go on, with tail and optimizer as they were there; default: at the start.
        save: gets the progress after each epoch, before its record is told, and where the fit stops within one.
        should_stop: asked after each step and each epoch but the last; once it says so the fit ends there.

    Raises:
        FloatingPointError: when the loss is no longer finite.
        FeatureStoreError: when not one image of an epoch could be read.
    """
    at = progress or Progress()
    history = at.history
    while not at.is_over(course, patience):
        started = time.perf_counter() - at.seconds
        if course.begins_cycle(at.epoch) and not at.epoch_losses:
            at.cycle_start = len(history.losses)
        own_seed = seed if ranks is None else seed + ranks.rank * _APART  # of dropout: each has other rows
        draws = Draws.seeded(own_seed, train.pass_before(at.epoch), train.device)
        if at.random:
            draws = Draws(at.random, train.device)
        with training_mode(tail, steps.options):
            batches = _with_bar(train, seed, at) if is_shown else train.epoch(seed, at.epoch, skip=len(at.epoch_losses))
            is_whole = _run_epoch(
                train, batches, at, tail, steps, course, draws, average=average, should_stop=should_stop
            )
            if not is_whole:
                at.random, at.seconds = draws.states, time.perf_counter() - started
                if save is not None:
                    save(at)
                return history
        check_any(len(at.epoch_losses), train)
        scored = _scored(tail, train, average, at.epoch, course.num_epochs, seed, ranks)
        record: Record = {
            "epoch": at.first_epoch + at.epoch + 1,
            "train_loss": _mean(at.epoch_losses),
            "lr": float(steps.optimizer.param_groups[-1]["lr"]),
        }
        if valid is not None:
            logits, targets, _ = outputs(scored, valid, ranks)
            record["valid_loss"] = loss_number(loss, logits, targets)
            record |= metric_values(metrics, logits, targets)
        record["seconds"] = time.perf_counter() - started
        at.add(record, keep, partial(copied_tensors, scored))
        if save is not None:
            save(at)
        if on_epoch_end is not None:
            on_epoch_end(dict(record))
        if not at.is_over(course, patience) and should_stop is not None and should_stop():
            return history
    if at.best is not None:
        put_back(tail, at.best)
    elif average is not None:
        put_back(tail, dict(tensors_of(average.model.module)))
    return history


def _run_epoch(
    train: Batches,
    batches: Iterator[tuple[Tensor, Tensor]],
    at: Progress,
    tail: nn.Module,
    steps: Steps,
    course: Course,
    draws: Draws,
    *,
    average: Average | None,
    should_stop: Callable[[], bool] | None,
) -> bool:
    """The steps of an epoch, or of what is left of it; whether it came to its end.

    Losses are numbers when it returns, and not before where they are deferred.
    """
    a_pass = len(train) // train.passes
    first, num_steps = len(at.epoch_losses), len(at.history.losses) - at.cycle_start
    losses: list[tuple[float | Tensor, int]] = []
    of_steps: list[float | Tensor] = []

    def made() -> None:
        with draws.taken():
            of_steps.append(steps.make())
        at.history.ran_at(steps.optimizer.param_groups[-1])
        if average is not None:
            average.after_step(tail)

    is_whole = True
    for number, (inputs, targets) in enumerate(batches, start=first + 1):
        if not steps.num_batches:
            course.set(steps.optimizer, at.epoch, num_steps + len(of_steps))
        with draws.taken():
            losses.append(steps.add(inputs, targets))
        if steps.is_whole or number % a_pass == 0:  # no step reaches over the end of a pass
            made()
            if should_stop is not None and should_stop():
                is_whole = False
                break
    if steps.num_batches:
        made()
    numbers = settled([*(loss for loss, _ in losses), *of_steps])
    check_finite(*numbers[: len(losses)])
    at.epoch_losses[first:] = [(loss, count) for loss, (_, count) in zip(numbers[: len(losses)], losses, strict=True)]
    at.history.losses += numbers[len(losses) :]
    return is_whole


def _with_bar(train: Batches, seed: int, at: Progress) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches that are left of an epoch, and a bar where they take long; a notebook shows it too."""
    done = len(at.epoch_losses)
    batches, shown = train.epoch(seed, at.epoch, skip=done), bar_class()
    if shown is None:
        yield from batches
        return
    name = f"epoch {at.first_epoch + at.epoch + 1}"
    options = {"total": len(train), "initial": done, "desc": name, "unit": "batch"}
    with shown(batches, **options, leave=False, delay=_PATIENT, file=sys.stderr) as bar:
        yield from bar


def _scored(
    tail: nn.Module,
    train: Batches,
    average: Average | None,
    epoch: int,
    num_epochs: int,
    seed: int,
    ranks: Ranks | None,
) -> nn.Module:
    """What is scored after an epoch, from 0: the tail, or the mean of its weights."""
    scored = tail
    if average is not None:
        average.after_epoch(tail, epoch, num_epochs)
        if average.is_ready(epoch, num_epochs):
            scored = average.model.module
            if epoch == num_epochs - 1:
                draws = Draws.seeded(seed, train.pass_before(epoch), train.device)
                with closing(draws.during(inputs for inputs, _ in train.epoch(seed, epoch))) as rows:
                    average.with_statistics(rows)
    if ranks is not None:
        ranks.share_buffers(scored)
    return scored


def _mean(losses: Sequence[tuple[float, int]]) -> float:
    """Of losses, each of so many rows."""
    if len(losses) == 1:
        return losses[0][0]
    return sum(value * count for value, count in losses) / sum(count for _, count in losses)


def outputs(tail: nn.Module, batches: Batches, ranks: Ranks | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Logits ``(N, K)``, targets and row numbers ``(N,)`` of all images that can be read, in eval mode.

    Logits and targets lie on the device of the batches, where a loss with class weights has these too.

    Raises:
        ValueError: if the images have no labels.
    """
    if batches.targets is None:
        raise ValueError("These images have no labels, so they can't be scored.")
    logits, rows = predicted(tail, batches, ranks=ranks)
    return logits.to(batches.device), batches.targets[rows].to(batches.device), rows


def predicted(tail: nn.Module, batches: Batches, view: int = 0, ranks: Ranks | None = None) -> tuple[Tensor, Tensor]:
    """Logits ``(N, K)`` float32 in one of the views, and the row numbers ``(N,)`` they belong to, on the CPU.

    Several processes share the rows, and all get all of them.

    Raises:
        FeatureStoreError: if there is no image, or not one could be read.
    """
    logits: list[Tensor] = []
    rows: list[Tensor] = []
    with torch.no_grad(), mode_of(tail, training=False):
        for inputs, numbers in batches.in_order(view, share=(0, 1) if ranks is None else (ranks.rank, ranks.count)):
            logits.append(tail(inputs).float().cpu())
            rows.append(torch.from_numpy(numbers))
    if ranks is not None:  # before anything is checked: of few images a process may have none, and the others wait
        logits, rows = ranks.joined(logits, rows)
    check_any(len(rows), batches)
    return torch.cat(logits), torch.cat(rows)


def predicted_in(tail: nn.Module, batches: Batches, views: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
    """What `predicted` gives in each of several views of images, which are read and decoded once for all of them."""
    logits: dict[int, list[Tensor]] = {view: [] for view in views}
    rows: dict[int, list[Tensor]] = {view: [] for view in views}
    with torch.no_grad(), mode_of(tail, training=False):
        for view, inputs, numbers in batches.in_views(views):
            logits[view].append(tail(inputs).float().cpu())
            rows[view].append(torch.from_numpy(numbers))
    check_any(len(rows[views[0]]), batches)
    return [(torch.cat(logits[view]), torch.cat(rows[view])) for view in views]


def check_any(num_batches: int, batches: Batches) -> None:
    """Checks that a pass over `batches` gave at least one of them.

    Raises:
        FeatureStoreError: if not, with the number of images and the reason of the first.
    """
    if num_batches:
        return
    name, reason = next(iter(batches.failures.items()), ("", ""))
    first = f" (first: {name}: {reason})" if name else ""
    raise FeatureStoreError(
        f"Not one of {batches.num_images:,} images could be read{first}. Give images that can be, or their folder with "
        "images.with_root(...)."
    )


def check_norms(tail: nn.Module, batch_size: int, num_images: int) -> None:
    """Checks that `tail` can be trained in such batches: batch norm over vectors has no statistics of a single row.

    torch would say so in the middle of the work.

    Raises:
        ValueError: if it can't.
    """
    has_norm = any(isinstance(module, nn.BatchNorm1d) for module in tail.modules())
    if has_norm and min(batch_size, num_images) == 1:
        raise ValueError(
            f"Batch norm can't be trained on one image at a time ({num_images:,} to train on, batch size "
            f"{batch_size}). Give more images or a larger --batch-size, or a head without it: --head linear "
            '(in Python: batch_size=, head="linear").'
        )


@contextmanager
def training_mode(tail: nn.Module, options: StepOptions) -> Iterator[None]:
    """Train mode as the modules' own `train` sets it, which may keep some part in eval mode; flags come back."""
    with mode_of(tail, training=True):
        tail.train()
        if options.batch_norm == "frozen":
            for stage in tail.children():
                for part in () if isinstance(stage, HeadStage) else stage.modules():
                    if isinstance(part, nn.modules.batchnorm._BatchNorm):
                        part.training = False
        yield


class Draws:
    """Random states of a fit's own, from which dropout draws in its steps.

    They take the places of the program's states for a step, and these come back: several threads may fit at a time,
    and torch has one generator a device for all of them. One step at a time has them, as one pass has the flags that
    models share.

    Attributes:
        states: of the CPU's generator, and of the GPU's.
    """

    def __init__(self, states: Sequence[Tensor], device: torch.device) -> None:
        self.states = list(states)
        self._generators = [torch.default_generator]
        if device.type == "cuda":
            self._generators.append(torch.cuda.default_generators[device.index])

    @classmethod
    def seeded(cls, seed: int, number: int, device: torch.device) -> Draws:
        """Those of the pass `number` on."""
        devices = [torch.device("cpu"), *([device] if device.type == "cuda" else [])]
        state = (seed * 1_000_003 + number) % 2**63
        return cls([torch.Generator(each).manual_seed(state).get_state() for each in devices], device)

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Draws go on from the states, for the block."""
        with one_pass:
            before = [each.get_state() for each in self._generators]
            try:
                for generator, state in zip(self._generators, self.states, strict=True):
                    generator.set_state(state)
                yield
                self.states = [each.get_state() for each in self._generators]
            finally:
                for generator, state in zip(self._generators, before, strict=True):
                    generator.set_state(state)

    def during(self, rows: Iterable[Tensor]) -> Generator[Tensor]:
        """`rows`, of which each has the states until the next is asked for. To be closed by the thread that asks."""
        for each in rows:
            with self.taken():
                yield each
