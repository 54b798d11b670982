"""Heads that train together, for experiments.py: 32 linear heads in one packed pass against one after another.

Same code, same order of images, same result within 1e-5, which is checked.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import ratio, speeds
from train import made, stored_learner

from training import Learner
from training.loop.fitting import Begun
from training.loop.packed import Together
from training.loop.plan import Plan

WIDTH, BATCH = 1024, 256
TOLERANCE = 1e-5


def packed(
    folder: Path, num_rows: int, num_heads: int, classes: Sequence[int], rounds: int
) -> tuple[dict[str, float], dict[str, str]]:
    """How many times as fast heads of so many rates train together, by the number of classes.

    Raises:
        RuntimeError: where what they come to differs by more than the tolerance.
    """
    ratios, notes = {}, {}
    for num_classes in classes:
        values, labels = made(num_rows, WIDTH, num_classes)
        first = stored_learner(folder / f"{num_classes}", values, labels, "linear", "cpu", batch_size=BATCH)
        first.fit(1, lr=1e-3)  # reads the rows, which both then have in memory
        difference = apart(trained_apart(first, num_heads, 1), trained_together(first, num_heads, 1))
        if difference > TOLERANCE:
            raise RuntimeError(f"Heads trained together differ by {difference:g} from those trained alone.")
        found = speeds(
            {
                "together": rate(partial(trained_together, first, num_heads, 1)),
                "apart": rate(partial(trained_apart, first, num_heads, 1)),
            },
            rounds=rounds,
        )
        ratios[f"packed heads, {num_classes} classes"] = ratio(found, "together", "apart")
        seconds = ", ".join(f"{name} {1 / statistics.median(each):.1f} s" for name, each in found.items())
        notes[f"{num_heads} heads of {num_classes} classes, {num_rows:,} rows"] = (
            f"{seconds}; largest difference {difference:.1e}"
        )
    return ratios, notes


def rate(train: Callable[[], object]) -> Callable[[], float]:
    """Trainings a second."""

    def run() -> float:
        started = time.perf_counter()
        train()
        return 1 / (time.perf_counter() - started)

    return run


def plans(num_heads: int, epochs: int) -> list[Plan]:
    """Fits of as many rates and weight decays."""
    rates = np.geomspace(1e-4, 1e-2, num_heads)
    return [Plan(cycles=(epochs,), lr=float(lr), weight_decay=0.01 * (place % 4)) for place, lr in enumerate(rates)]


def learners(first: Learner, num_heads: int) -> list[Learner]:
    """New linear heads on the same features."""
    backbone = first.model.up_to(first.cut)
    (key,) = (each.key for each in first.store.sets()) if first.store is not None else ("",)
    options: dict[str, Any] = {"features": key, "batch_size": first.batch_size, "device": first.device, "quiet": True}
    return [Learner(backbone, first.images, first.store, head="linear", **options) for _ in range(num_heads)]


def trained_apart(first: Learner, num_heads: int, epochs: int) -> list[Learner]:
    """One after another, by the loop of any fit, on batches of one source: rows are read into memory once."""
    made = learners(first, num_heads)
    for learn, begun in zip(made, started(made, plans(num_heads, epochs)), strict=True):
        begun.go_on()
        learn.end(begun)
    return made


def trained_together(first: Learner, num_heads: int, epochs: int) -> list[Learner]:
    """In one pass over the batches."""
    made = learners(first, num_heads)
    begun = started(made, plans(num_heads, epochs))
    Together(begun).go_on()
    for learn, each in zip(made, begun, strict=True):
        learn.end(each)
    return made


def started(made: Sequence[Learner], each: Sequence[Plan]) -> list[Begun]:
    """Fits that read the same batches, at their start."""
    return [
        learn.begin(plan, beside=made[0] if place else None)
        for place, (learn, plan) in enumerate(zip(made, each, strict=True))
    ]


def apart(some: Sequence[Learner], others: Sequence[Learner]) -> float:
    """How far their weights are apart at most."""
    pairs = zip(some, others, strict=True)
    tensors = [(one.model.tensors(), other.model.tensors()) for one, other in pairs]
    return max(float((value - other[name]).abs().max()) for one, other in tensors for name, value in one.items())


def settings_of_imagenet(folder: Path, device: str) -> dict[str, str]:
    """Seconds of an epoch of 100 rates of a linear probe as large as ImageNet's."""
    num_rows, num_heads = 1_281_167, 100
    values, labels = made(num_rows, 2048, 1000)
    first = stored_learner(folder / "imagenet", values, labels, "linear", device, batch_size=4096)
    made_ = learners(first, num_heads)
    each = [
        Plan(cycles=(2,), lr=plan.lr, weight_decay=plan.weight_decay, precision="bf16") for plan in plans(num_heads, 2)
    ]
    begun = started(made_, each)
    together = Together(begun)
    seconds = []
    for epoch in (1, 2):
        torch.cuda.synchronize()
        before = time.perf_counter()
        together.go_on(epoch)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - before)
    return {f"{num_heads} settings of {num_rows:,} x 2048, 1000 classes": f"{seconds[-1]:.1f} s an epoch (bf16)"}
