"""Purity: the check that a trunk's output depends on one image alone, made before anything is cached."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from featstore.errors import ModelError
from featstore.graph import mode_of
from featstore.probe import probe_images
from featstore.staged import StagedModel, TracedStage
from featstore.trunk import numerics

TOLERANCE = 1e-4
"""Difference that other rows of a batch may make by rounding, as a share of the output's largest value."""


def check_pure(model: StagedModel, cut: str) -> None:
    """Checks that the trunk up to `cut`, in eval mode, is a function of one image.

    Runs four small batches. The model, its batch-norm statistics, and all global random states are left as they were.

    Raises:
        ModelError: if the output changes from run to run (dropout left on), or with the other images of the batch
            (batch norm without running statistics); the first operation that does is named.
    """
    trunk = model.trunk(cut)
    device = next((tensor.device for tensor in trunk.parameters()), torch.device("cpu"))
    first, second = model.view.normalise(probe_images(model.view.size)).to(device)
    mixed, alone = torch.stack([first, second, first.flip(1)]), torch.stack([first, first, first])
    with torch.no_grad(), numerics("fp32", device), mode_of(trunk, training=False), _random_states_kept():
        for stage in trunk:
            again = _in_eval(stage, mixed)
            mixed_after, alone_after = _in_eval(stage, mixed), _in_eval(stage, alone)
            if not torch.equal(again, mixed_after):
                where = _first_difference(stage, mixed, mixed, rows=slice(None), tolerance=0.0)
                raise ModelError(
                    f"{model.name} can't be cached at {cut}: {where} gives other values each time it runs, also in "
                    "eval mode. Make it depend on self.training (nn.Dropout does), or cut before it."
                )
            if not _close(mixed_after[:1], alone_after[:1]):
                where = _first_difference(stage, mixed, alone, rows=slice(0, 1), tolerance=TOLERANCE)
                raise ModelError(
                    f"{model.name} can't be cached at {cut}: what {where} gives for an image depends on the other "
                    "images of the batch. Batch norm needs running statistics (track_running_stats=True) for "
                    "eval mode; or cut before it."
                )
            mixed, alone = mixed_after, alone_after


def _in_eval(stage: nn.Module, values: Tensor) -> Tensor:
    result: Tensor = stage(values.clone())  # a stage may write into its input
    return result


def _close(one: Tensor, other: Tensor, tolerance: float = TOLERANCE) -> bool:
    largest = float(one.abs().max()) if one.numel() else 0.0
    return bool(((one - other).abs() <= tolerance * max(largest, 1e-30)).all())


def _first_difference(stage: nn.Module, one: Tensor, other: Tensor, *, rows: slice, tolerance: float) -> str:
    """The first operation of `stage` whose results differ between two batches, in words."""
    if not isinstance(stage, TracedStage):
        return f"stage {getattr(stage, 'name', type(stage).__name__)}"
    first, second = _values(stage.in_eval, one), _values(stage.in_eval, other)
    for node in stage.in_eval.graph.nodes:
        mine, others = first.get(node), second.get(node)
        if not isinstance(mine, Tensor) or not isinstance(others, Tensor) or node.op in {"placeholder", "get_attr"}:
            continue
        if mine.shape[:1] == others.shape[:1] and not _close(mine[rows].float(), others[rows].float(), tolerance):
            return _described(node, stage)
    return f"stage {stage.name}"


def _described(node: fx.Node, stage: TracedStage) -> str:
    if node.op == "call_module":
        return f"{node.target} ({type(stage.in_eval.get_submodule(str(node.target))).__name__})"
    function = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", node.name)
    return f"{function} in stage {stage.name}"


def _values(graph: fx.GraphModule, values: Tensor) -> dict[fx.Node, Any]:
    interpreter = fx.Interpreter(graph, garbage_collect_values=False)
    interpreter.run(values.clone())
    return dict(interpreter.env)


@contextmanager
def _random_states_kept() -> Iterator[None]:
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 - the global state is what is kept
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002
