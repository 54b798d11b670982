"""Purity: the check that a trunk's output depends on one image alone, made before anything is cached."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from featstore.errors import ModelError
from featstore.models.modes import eval_mode, numerics, random_states, random_states_kept
from featstore.models.probe import probe_images
from featstore.models.staged import StagedModel
from featstore.models.stages import TracedStage

TOLERANCE = 1e-4
"""Difference that other rows of a batch may make by rounding, as a share of the output's largest value."""

NUM_REPEATS = 16
"""Runs of a stage that draws random numbers: one that uses them rarely (a branch of probability 1/4) is found too."""


def check_pure(
    model: StagedModel, cut: str, *, batch_size: int | None = None, device: torch.device | None = None
) -> None:
    """Checks that the trunk up to `cut`, in eval mode, is a function of one image.

    Runs a few batches of two and three images, and two of the size that will run: a model may treat that one in
    another way (statistics of groups of 8). The model, its batch-norm statistics, and all global random states are left
    as they were.

    Args:
        model: never changed.
        cut: where the trunk ends.
        batch_size: images in each batch of the passes to come, if they are known.
        device: where they run; default: where the model is.

    Raises:
        ModelError: if the output changes from run to run (dropout left on), or with the other images of the batch,
            their number or the place among them (batch norm without running statistics); the first operation that
            does is named; and while a mode of torch's is active, which may change what any operation computes.
    """
    _refuse_modes(model, cut)
    trunk = model.trunk(cut)
    if device is not None and any(each.device != device for each in (*trunk.parameters(), *trunk.buffers())):
        trunk = copy.deepcopy(trunk).to(device)
    parameter = next(trunk.parameters(), torch.empty(0, device=device))
    first, second = model.view.normalise(probe_images(model.view.size)).to(parameter)
    mixed: Any = torch.stack([first, second, first.flip(1)])
    alone: Any = torch.stack([first, first])
    with eval_mode(trunk), torch.no_grad(), numerics("fp32", parameter.device), random_states_kept():
        for stage in trunk:
            mixed_after, alone_after = _once(stage, mixed), _once(stage, alone)
            if not _is_repeatable(stage, mixed, mixed_after):
                raise ModelError(
                    f"{model.name} can't be cached at {cut}: {_random_operation(stage, mixed)} gives other values each "
                    "time it runs, also in eval mode. Make it depend on self.training (nn.Dropout does), or cut before "
                    "it."
                )
            if not _is_of_one_image(mixed_after, alone_after):
                raise _mixes(model, cut, _mixing_operation(stage, mixed, alone))
            mixed, alone = mixed_after, alone_after
        if batch_size is not None and batch_size > 1:
            where = _mixing_stage(trunk, first, second, batch_size)
            if where is not None:
                raise _mixes(model, cut, f"stage {where}, in batches of {batch_size},")
    if not _has_rows(mixed, 3):
        shape = tuple(mixed.shape) if isinstance(mixed, Tensor) else type(mixed).__name__
        raise ModelError(
            f"{model.name} can't be cached at {cut}: for 3 images the value there is {shape}, and rows are images. Cut "
            "before or after it."
        )


def _refuse_modes(model: StagedModel, cut: str) -> None:
    modes: list[Any] = _get_current_function_mode_stack()  # type: ignore[no-untyped-call]
    for mode in [*modes, *_get_current_dispatch_mode_stack()]:
        if type(mode) is not DeviceContext:  # that of `with torch.device(...)` only says where tensors are made
            raise ModelError(
                f"{model.name} can't be cached at {cut} while {type(mode).__module__}.{type(mode).__qualname__} is "
                "active: a mode may change what each operation computes, which no key can see. Leave its with block."
            )


def _mixes(model: StagedModel, cut: str, what: str) -> ModelError:
    return ModelError(
        f"{model.name} can't be cached at {cut}: what {what} gives for an image depends on the other images of the "
        "batch. Batch norm needs running statistics (track_running_stats=True) for eval mode; or cut before it."
    )


def _mixing_stage(trunk: nn.Sequential, first: Tensor, second: Tensor, batch_size: int) -> str | None:
    """The first stage whose result for `first` depends on place and company in batches of that size."""
    others = [second.roll(shift, -1) for shift in range(1, batch_size)]
    at_start = _results_at(trunk, torch.stack([first, *others]), 0)
    at_end = _results_at(trunk, torch.stack([*(other.flip(1) for other in others), first]), batch_size - 1)
    for stage, one, other in zip(trunk, at_start, at_end, strict=True):
        if one is not None and other is not None and not (one.shape == other.shape and _close(one, other)):
            return str(getattr(stage, "name", type(stage).__name__))
    return None


def _results_at(trunk: nn.Sequential, values: Any, place: int) -> list[Tensor | None]:
    """What each stage gives for the image at `place`: rows alone are kept, whole batches may fill a GPU."""
    num_images, rows = len(values), list[Tensor | None]()
    for stage in trunk:
        values = stage(values)
        rows.append(values[place].clone() if _has_rows(values, num_images) else None)
    return rows


def _once(stage: nn.Module, values: Any) -> Any:
    # A stage may write into its input.
    return stage(values.clone() if isinstance(values, Tensor) else values)


def _is_repeatable(stage: nn.Module, values: Any, result: Any) -> bool:
    before = random_states()
    if not _equal(_once(stage, values), result):
        return False
    draws = random_states() != before
    return not draws or all(_equal(_once(stage, values), result) for _ in range(NUM_REPEATS))


def _is_of_one_image(mixed: Any, alone: Any) -> bool:
    """Whether the first of three different images got what both of two equal images got, where rows are images."""
    if not (_has_rows(mixed, 3) and _has_rows(alone, 2)):
        return True  # what is made of it is looked at next
    return mixed.shape[1:] == alone.shape[1:] and all(_close(mixed[0], row) for row in alone)


def _has_rows(values: Any, num_images: int) -> bool:
    return isinstance(values, Tensor) and values.ndim > 0 and len(values) == num_images


def _random_operation(stage: nn.Module, values: Any) -> str:
    def differ(one: Any, other: Any) -> bool:
        return not _equal(one, other)

    return _first_operation(stage, [(values, values)] * NUM_REPEATS, differ)


def _mixing_operation(stage: nn.Module, mixed: Any, alone: Any) -> str:
    def differ(one: Any, other: Any) -> bool:
        return not _is_of_one_image(one, other)

    return _first_operation(stage, [(mixed, alone)], differ)


def _first_operation(stage: nn.Module, inputs: list[tuple[Any, Any]], differ: Callable[[Any, Any], bool]) -> str:
    """The first operation of `stage` whose results for one of the pairs of `inputs` differ, in words."""
    if not isinstance(stage, TracedStage):
        return f"stage {getattr(stage, 'name', type(stage).__name__)}"
    for one, other in inputs:
        mine, others = _Recorder(stage).results(one), _Recorder(stage).results(other)
        for node in stage.in_eval.graph.nodes:
            if node.op not in {"placeholder", "get_attr", "output"} and differ(mine[node], others[node]):
                return _described(node, stage)
    return f"stage {stage.name}"


class _Recorder(fx.Interpreter):
    """Runs a graph and keeps a copy of each result, since a later operation may write into it."""

    def __init__(self, stage: TracedStage) -> None:
        super().__init__(stage.in_eval)
        self.kept: dict[fx.Node, Any] = {}

    def results(self, values: Any) -> dict[fx.Node, Any]:
        self.run(values.clone() if isinstance(values, Tensor) else values)
        return self.kept

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        self.kept[n] = result.clone() if isinstance(result, Tensor) else result
        return result


def _described(node: fx.Node, stage: TracedStage) -> str:
    if node.op == "call_module":
        return f"{node.target} ({type(stage.in_eval.get_submodule(str(node.target))).__name__})"
    function = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", node.name)
    return f"{function} in stage {stage.name}"


def _equal(one: Any, other: Any) -> bool:
    """Whether two results are the same to the last bit; not-a-number is the same as itself."""
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return True
    return one.shape == other.shape and bool(((one == other) | (one.isnan() & other.isnan())).all())


def _close(one: Tensor, other: Tensor) -> bool:
    one, other = one.double(), other.double()
    largest = float(one.nan_to_num(posinf=0, neginf=0).abs().max()) if one.numel() else 0.0
    is_close = (one - other).abs() <= TOLERANCE * max(largest, 1e-30)
    return bool((is_close | (one == other) | (one.isnan() & other.isnan())).all())
