"""Shapes: those of a model's values for images of a size, without running on data, and how the values lie in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from featstore.errors import ModelError
from featstore.images.views import View
from featstore.models.modes import eval_mode, random_states_kept
from featstore.models.names import MemoryFormat, layout_of
from featstore.models.stages import Stage, TracedStage
from featstore.models.tracing import is_library_leaf

FORMATS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
"""Torch's names of how a batch lies in memory."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What is known of a value without its numbers.

    Attributes:
        shape: ``*F`` of one image's; empty for what is no tensor.
        order: the dimensions of a batch of it from the one with the longest steps in memory to the one with the
            shortest; None where that is their own order.
    """

    shape: tuple[int, ...]
    order: tuple[int, ...] | None


def measured(
    stages: Sequence[Stage], channels: int, size: int, model: str, *, memory_format: MemoryFormat | None = None
) -> dict[str, Measured]:
    """The value at each cut.

    From a pass without data where the model can run so, else on empty images. Two, not one: ``squeeze()`` takes the
    dimension of a single image away.

    Args:
        stages: in order.
        channels: of the images.
        size: side of the images.
        model: its name, for messages.
        memory_format: on empty images that lie so in memory, for `order`: without data some layers leave their values
            in another one than they do with it.

    Raises:
        ModelError: if it can't take images of that size, or of so many channels.
    """
    if memory_format is None:
        # Whole modules may make tensors of their own, which don't live on the meta device.
        with suppress(Exception):
            return _run(stages, torch.empty((2, channels, size, size), device="meta"), model, on_meta=True)
    parameters = (tensor for stage in stages for tensor in stage.parameters())
    device = next((tensor.device for tensor in parameters), torch.device("cpu"))
    images = torch.zeros((2, channels, size, size), device=device)
    return _run(stages, images.to(memory_format=FORMATS[memory_format or "contiguous"]), model, on_meta=False)


def without_data(stage: nn.Module, values: Any) -> Any:
    """What the stage gives for values on the meta device, which have shapes alone."""
    # Each tensor of each module once. A stage may hold a module twice, in its graphs for evaluation and for training;
    # put aside under both its names, a tensor would come back under the first and be overwritten under the second.
    empty = {
        f"{prefix}.{name}".removeprefix("."): torch.empty_like(value, device="meta")
        for prefix, module in stage.named_modules()
        for name, value in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
    }
    return torch.func.functional_call(stage, empty, (values,), tie_weights=False)


class Tail(nn.Sequential):
    """The stages behind a value. What was stored of it lies in memory as the stage that makes it leaves it.

    Convolutions take channels that lie last another way, to other last bits.

    Args:
        stages: in order.
        order: of the value's dimensions in memory, see `Measured`.
    """

    def __init__(self, stages: Iterable[nn.Module], *, order: tuple[int, ...] | None) -> None:
        super().__init__(*stages)
        self.order = order

    def forward(self, activations: Tensor) -> Tensor:
        """What the last stage gives."""
        if self.order is not None and activations.is_contiguous():
            activations = _reordered(activations, self.order)
        for stage in self:
            activations = stage(activations)
        return activations


def layout_from(shape: tuple[int, ...], larger: Callable[[], tuple[int, ...] | None]) -> str:
    """The layout of values of one image that have the shape `shape`.

    Images are square: of three dimensions the two that are equal are positions. Where that doesn't tell, positions are
    what grows with the image.

    Args:
        shape: ``*F``.
        larger: gives the shape for a larger image; None where the model takes no other.
    """
    if len(shape) != 3 or shape[0] != shape[1] == shape[2]:
        return layout_of(shape)
    other = larger()
    grown = None if other is None else tuple(now < then for now, then in zip(shape, other, strict=True))
    if grown is not None and any(grown):
        return "NCHW" if grown == (False, True, True) else "NHWC" if grown == (True, True, False) else "other"
    return layout_of(shape) if shape[1] == shape[2] else "NHWC" if shape[0] == shape[1] else "other"


def view_for(stage: Stage, view: View) -> View:
    """`view`, or the gray one like it where a layer that images meet first says that it takes one channel."""
    if view.channels == 1 or not isinstance(stage, TracedStage):
        return view
    first, graph = next(iter(stage.in_eval.graph.nodes)), stage.in_eval
    layers = [graph.get_submodule(str(node.target)) for node in first.users if node.op == "call_module"]
    is_gray = any(is_library_leaf(layer) and _channels_of(layer) == 1 for layer in layers)
    return replace(view, channels=1) if is_gray else view


def wrong_channels(model: str, channels: int, given: int) -> str:
    """Why images of `given` channels are refused by a model that takes another number, and what to do."""
    what = f"{model} takes images of {channels} channel{'s' * (channels != 1)}, and its view gives {given}"
    if channels in (1, 3):
        return f"{what}. Give it another view: View(..., channels={channels})."
    return (
        f"{what}: images are R, G and B, or gray. Hand over a module that makes {channels} of the 3 and then calls "
        "yours, in its forward: self.net(self.adapt(images))."
    )


def _run(stages: Sequence[Stage], images: Tensor, model: str, *, on_meta: bool) -> dict[str, Measured]:
    found: dict[str, Measured] = {}
    values: Any = images
    for stage in stages:
        try:
            with torch.no_grad(), eval_mode(stage), random_states_kept():
                values = without_data(stage, values) if on_meta else stage(values)
        except Exception as error:
            if (channels := _other_channels(stage, values)) is not None:
                where = f"{model} (its stage {stage.name})"
                raise ModelError(wrong_channels(where, channels, images.shape[1])) from error
            reason = str(error).strip().rstrip(".") or type(error).__name__
            raise ModelError(
                f"{model} can't take images of {images.shape[-1]} x {images.shape[-1]} pixels: its stage "
                f"{stage.name} fails with {reason}. Give it a view of the size it was made for: "
                "StagedModel.from_module(module, view=View(size=..., resize=...)), with channels=1 for gray images."
            ) from error
        is_tensor = isinstance(values, Tensor)
        found[stage.name] = Measured(
            shape=tuple(values.shape[1:]) if is_tensor else (), order=_order(values) if is_tensor else None
        )
    return found


def _reordered(values: Tensor, order: tuple[int, ...]) -> Tensor:
    back = [order.index(dim) for dim in range(len(order))]
    return values.permute(order).clone(memory_format=torch.contiguous_format).permute(back)


def _order(values: Tensor) -> tuple[int, ...] | None:
    if _is_plain(values) or 0 in values.stride():
        return None
    order = tuple(sorted(range(values.ndim), key=lambda dim: values.stride(dim), reverse=True))
    # Of a part of something larger, such as some of the channels, the order counts and the gaps don't.
    return None if order == tuple(range(values.ndim)) else order


def _is_plain(values: Tensor) -> bool:
    """Whether the steps in memory are those of a new tensor; torch looks at them also where a dimension is of one."""
    return values.stride() == torch.empty(values.shape, device="meta").stride()


def _other_channels(stage: Stage, values: Any) -> int | None:
    """How many channels a stage's first layer takes, if it is another number than that of the images `values`."""
    if not isinstance(values, Tensor) or values.ndim != 4 or values.shape[1] not in (1, 3):
        return None
    counts = (_channels_of(part) for part in stage.modules())
    return next((count for count in counts if count and count != values.shape[1]), None)


def _channels_of(layer: nn.Module | None) -> int | None:
    return getattr(layer, "in_channels", getattr(layer, "num_features", None))
