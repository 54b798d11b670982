"""Compiled: the stages of a trunk as one function of compiled code, for passes of one size."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, fx, nn

from featstore.errors import ModelError
from featstore.models.staged import StagedModel


class Compiled:
    """The values at some cuts of a model, by code that torch.compile makes when it is called first.

    The code holds the weights as constants and takes one shape of images. What would be chosen by timing candidates is
    chosen by rule, so that the next process makes the same code.

    Args:
        model: what changes in its stages afterwards goes unseen.
        cuts: which ones are taken may move the last bits at the others too: operations aren't fused across a cut.
        device: where its tensors are.

    Raises:
        ValueError: where no code can be compiled.
    """

    def __init__(self, model: StagedModel, cuts: Iterable[str], device: torch.device) -> None:
        check_compiler(device)
        self.cuts = tuple(sorted({model.canonical(cut) for cut in cuts}, key=model.index))
        self._name, self._is_made = model.name, False
        # A graph of its own has code of its own. Of code that several models share dynamo compiles only so many, and
        # runs the others as they are.
        self._function = torch.compile(_in_one_graph(model, self.cuts), backend=_backend, dynamic=False)

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """Cut -> activations ``(N, *F)``. To be called in eval mode and without gradient, always with one shape.

        Raises:
            ModelError: for a model that torch.compile doesn't take.
        """
        from torch._dynamo import config as dynamo
        from torch._dynamo.exc import TorchDynamoException
        from torch._inductor import config as inductor

        num_before = _made.count
        try:
            with (
                inductor.patch({"freezing": True, "deterministic": True}),
                dynamo.patch(
                    suppress_errors=False, fail_on_recompile_limit_hit=True, accumulated_recompile_limit=2**31
                ),
                nullcontext() if self._is_made else _without_warnings(),
            ):
                values = self._function(images)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            if self._is_made and not isinstance(error, TorchDynamoException):
                raise
            inner = getattr(error, "inner_exception", error)  # what the backend raised, which dynamo wraps
            if isinstance(inner, torch.OutOfMemoryError):  # by folding weights, say: smaller passes may have room
                raise inner from error
            text = (str(inner).splitlines() or [""])[0]
            raise self._refusal(f"{type(inner).__name__}: {text}" if text else type(inner).__name__) from error
        self._is_made = self._is_made or _made.count > num_before
        if not self._is_made:
            raise self._refusal("nothing of it was compiled, as where TORCH_COMPILE_DISABLE is set")
        return dict(zip(self.cuts, values, strict=True))

    def _refusal(self, why: str) -> ModelError:
        return ModelError(
            f"{self._name} can't be compiled ({why}). Expected a model that torch.compile takes, and a compiler "
            "that builds its code. Compute without: featstore extract --no-compile (in Python: compile=False)."
        )


def check_compiler(device: torch.device) -> None:
    """Raises ValueError where code for `device` can't be compiled; the message says what to install."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler
    from torch.utils._triton import has_triton

    without = "or compute without: featstore extract --no-compile (in Python: compile=False)"
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise ValueError(
            f"A model can't be compiled here: there is no C++ compiler ({error}). Expected g++, or what CXX names; on "
            "Windows cl. Install it (apt install g++; Build Tools for Visual Studio, whose command prompt knows it), "
            f"{without}."
        ) from error
    if device.type == "cuda" and not has_triton():
        raise ValueError(
            f"A model can't be compiled for {torch.cuda.get_device_name(device)} here: there is no Triton for it. "
            f"Expected a GPU of compute capability 7.0 or more and the package triton. Install that, {without}."
        )


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Of torch's, such as that float32 isn't TF32."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="torch")
        yield


class _Made(threading.local):
    """How many graphs were compiled in this thread."""

    count = 0


_made = _Made()


def _backend(graph: fx.GraphModule, inputs: list[Tensor]) -> Any:
    """Inductor, counted; one function for all, as dynamo keeps each backend, and what that holds, for good.

    It keeps the graph, too, so that loses its weights, which the code holds.
    """
    from torch._inductor.compile_fx import compile_fx

    _made.count += 1
    code = compile_fx(graph, inputs)
    for tensors in (graph._parameters, graph._buffers):
        tensors.clear()
    return code


def _in_one_graph(model: StagedModel, cuts: Iterable[str]) -> fx.GraphModule:
    """A module that gives the values at `cuts`, in order."""
    places = [model.index(cut) for cut in cuts]
    stages = model.ordered[: max(places) + 1]
    root, graph = nn.Module(), fx.Graph()
    value, taken = graph.placeholder("images"), {}
    for index, stage in enumerate(stages):
        root.add_module(f"stage{index}", stage)
        value = graph.call_module(f"stage{index}", (value,))
        if index in places:  # an in-place ReLU would overwrite what is taken
            is_written = any(later.may_write_input for later in stages[index + 1 :])
            taken[index] = graph.call_method("clone", (value,)) if is_written else value
    graph.output(tuple(taken[place] for place in places))
    return fx.GraphModule(root, graph)
