"""Adapters: three lines that make one input and one output of a network's several, as a refusal prints them."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from typing import Any

from torch import Tensor, fx, nn

from featstore.errors import ModelError

_IMAGES = ("x", "input", "inputs", "image", "images", "img", "imgs", "pixel_values")
"""What a parameter for images is called, where it isn't the first."""


def check_one_input(module: nn.Module) -> None:
    """Raises ModelError for a forward that needs more than images by their place, or takes none."""
    try:
        signature = inspect.signature(module.forward)
        signature.bind("images")
    except ValueError:  # compiled code
        return
    except TypeError:
        raise ModelError(_on_inputs(type(module).__name__, list(signature.parameters.values()))) from None


def _on_inputs(name: str, parameters: Sequence[inspect.Parameter]) -> str:
    needed = [each for each in parameters if each.default is each.empty and each.kind not in _VARIABLE]
    images = next((each for each in needed if each.name in _IMAGES), next(iter(needed or parameters), None))
    if images is None:
        return f"The forward of {name} takes nothing; a staged model's takes images."
    others = [each.name for each in needed if each is not images]
    given = ", ".join(
        ("" if each.kind is each.POSITIONAL_ONLY else f"{each.name}=") + ("images" if each is images else "None")
        for each in needed or [images]
    )
    if others:
        what = f"needs {', '.join(others)} besides images; a staged model gives images alone"
        advice = "Hand over a module that gives all, what it should be in place of None"
    else:
        what = f"takes {images.name} by that name alone; a staged model gives images by their place"
        advice = "Hand over a module that gives them by name"
    return f"The forward of {name} {what}. {advice}:\n{_adapter(f'self.net({given})')}"


_VARIABLE = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def picking(output: Any) -> str | None:
    """What to do about several values that a network returns: the adapter that picks the first tensor; None if none."""
    tensors = list(_tensors(output))
    if not tensors:
        return None
    also = f" (its tensors: {', '.join(tensors)})" if len(tensors) > 1 else ""
    return f"Hand over a module that returns one of them{also}:\n{_adapter(f'self.net(images){tensors[0]}')}"


def is_record(output: Any) -> bool:
    """Whether a value of a graph is a named tuple or a data class that the forward makes."""
    is_class = isinstance(output, fx.Node) and isinstance(output.target, type)
    return is_class and (hasattr(output.target, "_fields") or is_dataclass(output.target))


def parts(output: Any) -> dict[str, Any]:
    """Python behind the value -> each value in what a graph or a network returns; empty for a single one."""
    if isinstance(output, Mapping):
        return {f"[{key!r}]": value for key, value in output.items()}
    if isinstance(output, tuple | list):
        return {f"[{place}]": value for place, value in enumerate(output)}
    if is_record(output):
        names = getattr(output.target, "_fields", output.kwargs)  # a data class is made by names
        values = (*output.args, *output.kwargs.values())
        return {f".{name}": value for name, value in zip(names, values, strict=True)}
    if is_dataclass(output):
        return {f".{name}": value for name, value in vars(output).items()}
    return {}


def _tensors(output: Any) -> Iterator[str]:
    for place, value in parts(output).items():
        if parts(value):
            yield from (place + inner for inner in _tensors(value))
        elif isinstance(value, fx.Node | Tensor):
            yield place


def _adapter(result: str) -> str:
    return (
        "    class Adapted(torch.nn.Module):\n"
        "        def __init__(self, net): super().__init__(); self.net = net\n"
        f"        def forward(self, images): return {result}\n"
        "    net = Adapted(net)"
    )
