"""Trunk: the one forward function that extraction and every live frozen trunk call.

Eval mode, no gradient, batches of one fixed size, pinned numerics: on one execution profile a row depends on its image
alone, so features from a store and from a live trunk are equal bit for bit.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from featstore.digest import Json
from featstore.errors import ModelError
from featstore.images.views import View
from featstore.models.compiled import Compiled
from featstore.models.modes import eval_mode, numerics
from featstore.models.names import (
    DEFAULT_BATCHING,
    DEFAULT_PRECISION,
    MEMORY_FORMATS,
    PRECISIONS,
    REDUCTIONS,
    Batching,
    MemoryFormat,
    Precision,
)
from featstore.models.pool import Pool
from featstore.models.shapes import FORMATS
from featstore.models.staged import StagedModel, exact_device

_DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Output:
    """One thing to take from a pass: the activations at `cut`, reduced by `pool`."""

    cut: str
    pool: Pool

    @property
    def label(self) -> str:
        """As people name it: ``CUT:REDUCTION``."""
        return f"{self.cut}:{self.pool.reduction}"


def output_at(model: StagedModel, cut: str, reduce: str = "auto") -> Output:
    """What ``CUT`` or ``CUT:REDUCTION`` means for a model."""
    name, _, own = cut.partition(":")
    reduction = own or reduce
    if reduction not in ("auto", *REDUCTIONS):
        raise ValueError(f"{reduction!r} is no reduction. The reductions are auto, {', '.join(REDUCTIONS)}.")
    return Output(model.canonical(name), model.pool(name, reduction))


class Trunk:
    """Runs the frozen part of a model over uint8 views.

    Args:
        model: its stages are used, or copied where device or precision ask for it; never changed.
        outputs: what to take from each pass, in order.
        view: gives the normalisation; its geometry has been applied already.
        batching: the fixed number of images a pass, by default 32 on a CPU and 256 on a GPU (a shorter batch is padded
            by repeating its last image), and how they lie in memory: convolutions are faster with channels last, and a
            model that only runs on others (its forward calls view() on a map) gets those. Where they are compiled, the
            first pass takes up to a minute.
        precision: `fp32` is IEEE float32 (TF32 and other shortcuts off), `tf32` allows TF32 where the device has it,
            `bf16` and `fp16` cast weights and images. Weights of another type are cast, for `fp32` too.
        device: where to run.

    Attributes:
        is_live: whether it runs the model's own stages, so that it changes when they do; False where it has copies.
    """

    def __init__(
        self,
        model: StagedModel,
        outputs: Sequence[Output],
        *,
        view: View,
        batching: Batching = DEFAULT_BATCHING,
        precision: Precision = DEFAULT_PRECISION,
        device: torch.device | str = "cpu",
    ) -> None:
        if precision not in PRECISIONS:
            raise ValueError(f"{precision!r} is no precision. The precisions are {', '.join(PRECISIONS)}.")
        if batching.memory_format not in MEMORY_FORMATS:
            raise ValueError(f"{batching.memory_format!r} is no memory format. They are {', '.join(MEMORY_FORMATS)}.")
        check_batch_size(batching.batch_size)
        self.memory_format: MemoryFormat = (
            batching.memory_format if model.takes(batching.memory_format) else "contiguous"
        )
        self.device = exact_device(device)
        self._batch_size = batching.batch_size or default_batch_size(self.device)
        self.precision: Precision = precision
        self.outputs = tuple(outputs)
        self.view = view
        self._model, self.is_live = self._prepared(model, is_fixed=batching.compiled)
        cuts = [output.cut for output in self.outputs]
        self._compiled = Compiled(self._model, cuts, self.device) if batching.compiled else None

    def __call__(self, images: Tensor) -> list[Tensor]:
        """Activations ``(N, *F)`` of uint8 views ``(N, C, S, S)``, one tensor per output: float32, contiguous."""
        parts = [
            self._pass(images[start : start + self.batch_size]) for start in range(0, len(images), self.batch_size)
        ]
        if not parts:
            parts = [[values[:0] for values in self._pass(images.new_zeros((1, *images.shape[1:])))]]
        return [rows[0] if len(rows) == 1 else torch.cat(rows) for rows in zip(*parts, strict=True)]

    @property
    def is_compiled(self) -> bool:
        """Whether compiled code runs."""
        return self._compiled is not None

    @property
    def batch_size(self) -> int:
        """The images of a pass."""
        return self._batch_size

    @batch_size.setter
    def batch_size(self, images: int) -> None:
        self._batch_size = images
        if self._compiled is not None:  # code takes one shape: that of the other passes goes, with its weights
            self._compiled = Compiled(self._model, self._compiled.cuts, self.device)

    def profile(self) -> Json:
        """What may move the last bits of a feature without being part of its key."""
        profile = {
            "batch_size": self.batch_size,
            "device": self.device.type,
            "memory_format": self.memory_format,
            "threads": torch.get_num_threads(),
            "cpu": torch.backends.cpu.get_cpu_capability(),
            "torch": torch.__version__,
        }
        if self._compiled is not None:
            profile["compiled"] = list(self._compiled.cuts)
        if self.device.type == "cuda":
            profile["gpu"] = torch.cuda.get_device_name(self.device)
        return profile

    def _pass(self, images: Tensor) -> list[Tensor]:
        rows = len(images)
        if rows < self.batch_size:
            images = torch.cat([images, images[-1:].expand(self.batch_size - rows, *images.shape[1:])])
        cuts = [output.cut for output in self.outputs]
        # The mode first: numerics are the process's own as well, and one pass at a time has the mode.
        with eval_mode(self._model), torch.no_grad(), numerics(self.precision, self.device):
            values = self.view.normalise(images.to(self.device))
            values = values.to(_DTYPES[self.precision], memory_format=FORMATS[self.memory_format])
            activations = self._activations(values, cuts)
            for cut in cuts:
                check_activations(activations[cut], name=self._model.name, cut=cut)
                self._check_rows(cut, activations[cut])
            return [output.pool(activations[output.cut])[:rows] for output in self.outputs]

    def _activations(self, values: Tensor, cuts: Sequence[str]) -> dict[str, Tensor]:
        if self._compiled is None:
            return self._model.activations(values, cuts)
        found = self._compiled(values)
        return {cut: found[self._model.canonical(cut)] for cut in cuts}

    def _check_rows(self, cut: str, values: Tensor) -> None:
        if values.ndim == 0 or len(values) != self.batch_size:
            raise ModelError(
                f"{self._model.name} gives no row an image at {cut}: in passes of {self.batch_size} the value there is "
                f"{tuple(values.shape)}. Cut before or after it, or take another batch size (a squeeze() of all "
                "dimensions takes the images' own away where a pass has one)."
            )

    def _prepared(self, model: StagedModel, *, is_fixed: bool) -> tuple[StagedModel, bool]:
        """The stages to run, and whether they are `model`'s own: never where they are to stay as they are."""
        last = max(model.index(output.cut) for output in self.outputs)
        stages = [model.stages[index] for index in range(last + 1)]
        dtype = _DTYPES[self.precision]
        tensors = [tensor for stage in stages for tensor in (*stage.parameters(), *stage.buffers())]
        is_live = not is_fixed and all(
            each.device == self.device and (each.dtype == dtype or not each.is_floating_point()) for each in tensors
        )
        if not is_live:
            stages = list(copy.deepcopy(nn.ModuleList(stages)).to(self.device, dtype))
        return StagedModel(stages, view=self.view, name=model.name), is_live  # type: ignore[arg-type]


def check_batch_size(batch_size: int | None) -> None:
    """TypeError for what is no number, ValueError for less than one image a pass; None is the default."""
    if batch_size is not None and (not isinstance(batch_size, int) or isinstance(batch_size, bool)):
        raise TypeError(f"batch size {batch_size!r} is no number of images; expected an integer from 1 on.")
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch size {batch_size} is too small; it counts the images of one pass, at least 1.")


def check_activations(values: Tensor, *, name: str, cut: str, is_taken: bool = True) -> None:
    """Raises ModelError for values that can't be features: without numbers of their own, not real, or none at all.

    Args:
        values: of a batch.
        name: of the model that gives them.
        cut: where.
        is_taken: False where they are only on their way: they may then be complex, or empty.
    """
    if values.is_nested:
        what, remedy = "a nested tensor", "Pad it in the forward: values.to_padded_tensor(0.0), or cut before it"
    elif values.layout != torch.strided:
        what, remedy = (
            f"a sparse tensor ({values.layout})",
            "Make it dense in the forward: values.to_dense(), or cut before it",
        )
    elif values.is_quantized:
        what, remedy = (
            f"a quantised tensor ({values.dtype})",
            "Give numbers in the forward: values.dequantize(), or cut before it",
        )
    elif values.is_meta:
        what = "a tensor on the device meta, which has no values"
        remedy = "Build the module on a real device, load its weights, and make no such tensors in its forward"
    elif values.is_complex() and is_taken:
        what = f"complex numbers ({values.dtype}), and features are real"
        remedy = "Say in the forward what you need of them: values.abs(), or torch.view_as_real(values)"
    elif 0 in values.shape[1:] and is_taken:
        what, remedy = f"no values at all: the shape for one image is {tuple(values.shape[1:])}", "Name another cut"
    else:
        return
    raise ModelError(f"At {cut} {name} gives {what}. {remedy}.")


def default_batch_size(device: torch.device) -> int:
    """The fixed batch size B where nobody says: 256 on a GPU, 32 elsewhere."""
    return 256 if device.type == "cuda" else 32


def choose_device(name: torch.device | str) -> torch.device:
    """The device of that name; `auto` is the first GPU where there is one, else the CPU.

    Raises:
        ValueError: for a name torch doesn't know, or a GPU that isn't there.
    """
    if name == "auto":
        return exact_device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"{name!r} is no device. Expected auto, cpu, cuda or cuda:1.") from error
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise ValueError(f"There is no GPU {name} here ({torch.cuda.device_count()} found). Use cpu or auto.")
    return exact_device(device)
