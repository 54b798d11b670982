"""Weights files: tensors by name, out of the wrappers people save them in, and how far they fit a model."""

from __future__ import annotations

import pickle
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

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


def read_tensors(path: Path) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Name -> CPU tensor of a weights file, and a sentence for each choice that the file left open.

    ``.safetensors`` is read by safetensors, anything else by ``torch.load(weights_only=True)``: never code. A wrapper
    around the tensors is opened; of several models in a file the first in the order of `WRAPPERS` is taken.

    Raises:
        WeightsError: for a file that can't be read, holds other objects than tensors, or holds no tensors.
    """
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path, device="cpu"), ()
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can fail in any way
        foreign = re.search(r"GLOBAL ([\w.]+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
        if foreign is not None:
            raise WeightsError(_holds_objects(path, foreign[1])) from error
        raise WeightsError(
            f"{path} can't be read as a weights file ({type(error).__name__}: {_first_line(error)}). Expected "
            "safetensors, or what torch.save wrote; give an undamaged copy."
        ) from error
    return _unwrapped(content, path)


def fitting(
    tensors: Mapping[str, Tensor],
    stages: Sequence[Mapping[str, Tensor]],
    *,
    num_needed: int,
    file: Path,
    model: str,
    unused: Collection[str] = (),
) -> Fit:
    """How far `tensors` fit the `stages` (name -> tensor, each) of `model`.

    Prefixes (`PREFIXES`) are taken off where that makes names fit.

    Args:
        tensors: the file's.
        stages: the model's, in order.
        num_needed: the first so many stages must be fitted exactly.
        file: for messages.
        model: for messages.
        unused: names of tensors that the model has and doesn't need.

    Raises:
        WeightsError: if a needed stage isn't fitted exactly, or the file holds more tensors for the modules of those
            stages (it is another model's), or its names fit in two ways; the first few names are given.
    """
    needed = {name: tensor for stage in stages[:num_needed] for name, tensor in stage.items()}
    behind = {name for stage in stages[num_needed:] for name in stage}
    known = {*needed, *behind, *unused}
    given = _stripped(tensors, known, file)
    wrong = [problem for name, tensor in needed.items() if (problem := _problem(name, tensor, given))]
    surplus = [name for name in given if name not in known and not name.endswith(_COUNTER)]
    wrong += [f"{name} is unknown to {model}" for name in surplus if _belongs(name, needed, behind)]
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
    left_out = [
        note for stage in stages[num_stages:] for name in stage if (note := _left_out(name, stage[name], given))
    ]
    kept = {name: given.get(name, tensor) for stage in stages[:num_stages] for name, tensor in stage.items()}
    notes = [*left_out, *(f"{name}: not used" for name in surplus[:4])]
    if len(surplus) > 4:
        notes.append(f"{len(surplus) - 4} more tensors that {model} doesn't have: not used")
    return Fit(num_stages=num_stages, tensors=kept, notes=tuple(notes))


def _holds_objects(path: Path, foreign: str) -> str:
    return (
        f"{path} holds pickled objects besides tensors ({foreign}), and loading those would run code from the file. If "
        "you trust it, save its tensors alone, where it was made:\n"
        f"    import torch; content = torch.load({path.name!r}, map_location='cpu', weights_only=False)\n"
        "    model = content.get('state_dict', content.get('model', content)) if isinstance(content, dict) "
        "else content\n"
        "    torch.save({name: value for name, value in getattr(model, 'state_dict', lambda: model)().items() "
        f"if torch.is_tensor(value)}}, {'tensors-' + path.name!r})"
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no reason given"])[0].rstrip(".")


def _unwrapped(content: object, path: Path) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    notes: list[str] = []
    while isinstance(content, Mapping):
        tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
        taken = next((name for name in WRAPPERS if isinstance(content.get(name), Mapping)), None)
        if taken is None:
            if tensors:
                return tensors, tuple(notes)
            break
        own = _bare_names(content[taken])
        others = [
            str(name)
            for name, value in content.items()
            if name != taken and isinstance(value, Mapping) and _bare_names(value) & own
        ]
        if others:
            named = " and ".join([taken, *others])
            notes.append(f"{path.name} holds {named}: {taken} used; to use another, save it alone")
        content = content[taken]
    raise WeightsError(
        f"{path} holds no tensors by name (it holds a {type(content).__name__}). Expected a state dict, alone or under "
        f"one of the names {', '.join(WRAPPERS)}."
    )


def _bare_names(content: Mapping[object, object]) -> set[str]:
    """The names without all their prefixes: an average of a model's weights is often saved with other ones."""
    return {str(name).removeprefix(max(_prefixes(str(name)), key=len, default="")) for name in content}


def _stripped(tensors: Mapping[str, Tensor], names: Collection[str], file: Path) -> dict[str, Tensor]:
    """`tensors` without the prefix that keeps most of their names from fitting; others keep their names."""
    prefixes = dict.fromkeys(["", *(prefix for name in tensors for prefix in _prefixes(name))])
    fits = {prefix: sum(prefix + name in tensors for name in names) for prefix in prefixes}
    best = [prefix for prefix in prefixes if fits[prefix] == max(fits.values())]
    if max(fits.values()) > 0 and len(best) > 1:
        raise WeightsError(
            f"{file} holds tensors that fit under each of the prefixes {', '.join(map(repr, best))}. Save those of one "
            "into a file of their own."
        )
    stripped = {name.removeprefix(best[0]): tensor for name, tensor in tensors.items() if name.startswith(best[0])}
    others = {name: tensor for name, tensor in tensors.items() if not name.startswith(best[0])}
    return {**others, **stripped}


def _prefixes(name: str) -> Iterator[str]:
    """What of `PREFIXES`, one behind the other, can be taken off `name`: ``module.``, ``module.model.``."""
    taken = ""
    while prefix := next((prefix for prefix in PREFIXES if name.startswith(taken + prefix)), ""):
        taken += prefix
        yield taken


def _belongs(name: str, needed: Collection[str], behind: Collection[str]) -> bool:
    """Whether a tensor that the model lacks lies in a module that only the needed stages use.

    resnet34's ``layer1.2.conv1.weight`` lies in resnet18's ``layer1``; ``head.weight`` lies nowhere in it.
    """
    parts = name.split(".")
    for length in range(len(parts) - 1, 0, -1):
        module = ".".join(parts[:length]) + "."
        uses = [any(known.startswith(module) for known in names) for names in (needed, behind)]
        if any(uses):
            return uses == [True, False]
    return False


def _problem(name: str, tensor: Tensor, given: Mapping[str, Tensor]) -> str | None:
    if name not in given:
        return None if name.endswith(_COUNTER) else f"{name} is missing"
    if given[name].shape != tensor.shape:
        return f"{name} is {_shape(given[name])}, expected {_shape(tensor)}"
    return None


def _left_out(name: str, tensor: Tensor, given: Mapping[str, Tensor]) -> str | None:
    if name not in given:
        return None
    rows = f" has {len(given[name])} rows" if given[name].ndim and given[name].shape != tensor.shape else ""
    return f"{name}{rows}: not used"


def _shape(tensor: Tensor) -> str:
    return "x".join(str(size) for size in tensor.shape) or "a number"
