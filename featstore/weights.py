"""Weights files: tensors by name, out of the wrappers people save them in, and how far they fit a model."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from featstore.errors import WeightsError

WRAPPERS = ("state_dict", "model_state_dict", "state_dict_ema", "model")
PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "backbone.")
_COUNTER = "num_batches_tracked"  # absent from old files, and evaluation ignores it


@dataclass(frozen=True, kw_only=True)
class Fit:
    """How far a weights file fits a model.

    Attributes:
        num_stages: the first so many stages fit.
        tensors: theirs, under the model's names.
        notes: one sentence for each thing in the file that isn't used.
    """

    num_stages: int
    tensors: dict[str, Tensor]
    notes: tuple[str, ...]


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Name -> CPU tensor of a weights file.

    ``.safetensors`` is read by safetensors, anything else by ``torch.load(weights_only=True)``: never code. A wrapper
    (`WRAPPERS`) around the tensors is opened.

    Raises:
        WeightsError: for a file that can't be read, holds other objects than tensors, or holds no tensors.
    """
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path, device="cpu")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise WeightsError(
            f"{path} holds pickled objects besides tensors, and loading those would run code from the file "
            f"({str(error).strip().splitlines()[0]}). If you trust it, save its tensors alone, where it was made:\n"
            "    import torch\n"
            f"    content = torch.load({path.name!r}, map_location='cpu', weights_only=False)\n"
            f"    torch.save(content.get('state_dict', content.get('model', content)), {'tensors-' + path.name!r})"
        ) from error
    except (
        OSError,
        EOFError,
        RuntimeError,
        ValueError,
        KeyError,
        safetensors.SafetensorError,
        zipfile.BadZipFile,
    ) as error:
        raise WeightsError(f"{path} can't be read as a weights file: {error}.") from error
    return _unwrapped(content, path)


def fitting(
    tensors: Mapping[str, Tensor], stages: Sequence[Mapping[str, Tensor]], *, num_needed: int, file: Path, model: str
) -> Fit:
    """How far `tensors` fit the `stages` (name -> tensor, each) of `model`.

    Prefixes (`PREFIXES`) are taken off where that makes names fit.

    Raises:
        WeightsError: if one of the first `num_needed` stages isn't fitted exactly, or the file holds more tensors
            for the modules of those stages (it is another model's); the first few names are given.
    """
    names = {name for stage in stages for name in stage}
    given = _stripped(tensors, names)
    needed = {name for stage in stages[:num_needed] for name in stage}
    wrong = [
        problem for stage in stages[:num_needed] for name in stage if (problem := _problem(name, stage[name], given))
    ]
    # A module shared by trunk and tail is told apart by its full path; resnet34's layer1.2 isn't in resnet18.
    modules = {name.partition(".")[0] for name in needed} - {
        name.partition(".")[0] for stage in stages[num_needed:] for name in stage
    }
    wrong += [
        f"{name} is unknown to {model}"
        for name in given
        if name not in names and name.partition(".")[0] in modules and not name.endswith(_COUNTER)
    ]
    if wrong:
        raise WeightsError(
            f"The weights in {file} don't fit {model}: {'; '.join(wrong[:4])}"
            f"{f'; and {len(wrong) - 4} more' if len(wrong) > 4 else ''}. Give the backbone that they were trained "
            "for (--backbone), or other weights."
        )
    num_stages = num_needed
    while num_stages < len(stages) and not any(
        _problem(name, tensor, given) for name, tensor in stages[num_stages].items()
    ):
        num_stages += 1
    behind = [
        problem for stage in stages[num_stages:] for name in stage if (problem := _unused(name, stage[name], given))
    ]
    surplus = [f"{name}: not used" for name in given if name not in names and not name.endswith(_COUNTER)]
    kept = {name: given.get(name, tensor) for stage in stages[:num_stages] for name, tensor in stage.items()}
    return Fit(num_stages=num_stages, tensors=kept, notes=(*behind, *surplus))


def _unwrapped(content: object, path: Path) -> dict[str, Tensor]:
    while isinstance(content, Mapping):
        tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
        inner = next((content[name] for name in WRAPPERS if isinstance(content.get(name), Mapping)), None)
        if inner is None:
            if tensors:
                return tensors
            break
        content = inner
    raise WeightsError(
        f"{path} holds no tensors by name (it holds a {type(content).__name__}). Expected a state dict, alone or under "
        f"one of the names {', '.join(WRAPPERS)}."
    )


def _stripped(tensors: Mapping[str, Tensor], names: set[str]) -> dict[str, Tensor]:
    """`tensors` without the prefixes that keep their names from fitting."""
    given = dict(tensors)
    while not names & set(given):
        prefix = next((prefix for prefix in PREFIXES if any(name.startswith(prefix) for name in given)), None)
        if prefix is None:
            break
        given = {name.removeprefix(prefix): tensor for name, tensor in given.items()}
    return given


def _problem(name: str, tensor: Tensor, given: Mapping[str, Tensor]) -> str | None:
    if name not in given:
        return None if name.endswith(_COUNTER) else f"{name} is missing"
    if given[name].shape != tensor.shape:
        return f"{name} is {_shape(given[name])}, expected {_shape(tensor)}"
    return None


def _unused(name: str, tensor: Tensor, given: Mapping[str, Tensor]) -> str | None:
    if name not in given:
        return None
    rows = f" has {len(given[name])} rows" if given[name].ndim and given[name].shape != tensor.shape else ""
    return f"{name}{rows}: not used"


def _shape(tensor: Tensor) -> str:
    return "x".join(str(size) for size in tensor.shape) or "a number"
