"""Weights files: tensors by name, out of the wrappers people save them in, and how far they fit a model."""

from __future__ import annotations

import os
import pickle
import re
import zipfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from featstore.errors import WeightsError
from featstore.words import size_text

WRAPPERS = ("state_dict", "model_state_dict", "state_dict_ema", "model")
PREFIXES = (
    *("module.", "_orig_mod.", "model.", "net.", "network.", "backbone.", "trunk."),
    # Of self-supervised training: the network that learns, the one that follows it, the image's half of a pair.
    *("encoder.", "base_encoder.", "encoder_q.", "online_encoder.", "student.", "image_encoder.", "visual."),
    *("encoder_k.", "momentum_encoder.", "target_encoder.", "teacher.", "ema."),
)
"""What names may have in front, in any order and number."""

_MOST_NESTED = 8
_MOST_COMPRESSED_BYTES = 64 << 20
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
        WeightsError: for a file that can't be read, would unpack to far more than its size, holds other objects than
            tensors, or holds no tensors.
    """
    _check_size(path)
    try:
        if path.suffix == ".safetensors":
            return _from_safetensors(path), ()
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can fail in any way
        foreign = re.search(r"GLOBAL ([\w.]+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
        if foreign is not None:
            raise WeightsError(_holds_objects(path, foreign[1])) from error
        # torch's own words advise to load it with weights_only=False, which runs what the file says.
        why = "it is no pickle of plain tensors" if isinstance(error, pickle.UnpicklingError) else _first_line(error)
        raise WeightsError(
            f"{path} can't be read as a weights file ({type(error).__name__}: {why}). Expected safetensors, or what "
            "torch.save wrote; give an undamaged copy."
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
    other_names: Mapping[str, str] | None = None,
    prefix: str | None = None,
) -> Fit:
    """How far `tensors` fit the `stages` (name -> tensor, each) of `model`.

    Prefixes (`PREFIXES`) are taken off where that makes names fit. A tensor must hold numbers of the kind that the
    model's does (floating point, integers, truth values).

    Args:
        tensors: the file's.
        stages: the model's, in order.
        num_needed: the first so many stages must be fitted exactly.
        file: for messages.
        model: for messages.
        unused: names of tensors that the model has and doesn't need.
        other_names: of tensors that the model has under several names -> the one that stands for all. A file may have
            any of them, with one value.
        prefix: the one to take off, where the file's names fit under several.

    Raises:
        WeightsError: if a needed stage isn't fitted exactly, or the file holds more tensors for the modules of those
            stages (it is another model's), or its names fit in two ways; the first few names are given.
    """
    needed = {name: tensor for stage in stages[:num_needed] for name, tensor in stage.items()}
    behind = {name for stage in stages[num_needed:] for name in stage}
    known = {*needed, *behind, *unused, *(other_names or {})}
    given, choices = _stripped(tensors, known, [name for name in needed if not name.endswith(_COUNTER)], file, prefix)
    given, names = _shared(given, other_names or {})
    wrong = [problem for name, tensor in needed.items() if (problem := _misfit(name, tensor, given, names))]
    is_lacking = any(name not in given for name in needed if not name.endswith(_COUNTER))
    if is_lacking and prefix is None and (unlisted := _unlisted_prefix(tensors, needed)) is not None:
        raise WeightsError(
            f"The names in {file} that {model} needs begin with {unlisted!r} there, which no usual wrapper adds. If "
            f"they are its weights: --weights-prefix {unlisted} (in Python: weights_prefix={unlisted!r})."
        )
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
        _misfit(name, tensor, given, names) for name, tensor in stages[num_stages].items()
    ):
        num_stages += 1
    left_out = [
        note for stage in stages[num_stages:] for name in stage if (note := _left_out(name, stage[name], given))
    ]
    kept = {name: given.get(name, tensor) for stage in stages[:num_stages] for name, tensor in stage.items()}
    notes = [*choices, *left_out, *(f"{name}: not used" for name in surplus[:4])]
    if len(surplus) > 4:
        notes.append(f"{len(surplus) - 4} more tensors that {model} doesn't have: not used")
    return Fit(num_stages=num_stages, tensors=kept, notes=tuple(notes))


def _from_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        os.fspath(path).encode("utf-8")
    except UnicodeEncodeError:  # safetensors opens no such path
        return safetensors.torch.load(path.read_bytes())
    return safetensors.torch.load_file(path, device="cpu")


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


def _check_size(path: Path) -> None:
    """`torch.save` doesn't compress: an archive that does is somebody's, and a small one may fill the memory."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        compressed = [each for each in archive.infolist() if each.compress_type != zipfile.ZIP_STORED]
    claimed = sum(each.file_size for each in compressed)
    if claimed > _MOST_COMPRESSED_BYTES:
        raise WeightsError(
            f"{path} is a compressed archive of {size_text(path.stat().st_size)} that would unpack to "
            f"{size_text(claimed)}. Expected what torch.save writes, which isn't compressed. If you trust it, load and "
            "save it anew where it was made."
        )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no reason given"])[0].rstrip(".")


def _unwrapped(content: object, path: Path) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    notes: list[str] = []
    for _ in range(_MOST_NESTED):  # a mapping may hold itself
        if not isinstance(content, Mapping):
            break
        tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
        taken = next((name for name in WRAPPERS if isinstance(content.get(name), Mapping)), None)
        if taken is None:
            networks = {key: value for key, value in content.items() if isinstance(value, Mapping)}
            tensors |= {  # a teacher and its student, say, each under its name
                f"{key}.{name}": value
                for key, network in networks.items()
                for name, value in network.items()
                if isinstance(value, Tensor)
            }
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


def _stripped(
    tensors: Mapping[str, Tensor], names: Collection[str], needed: Collection[str], file: Path, chosen: str | None
) -> tuple[dict[str, Tensor], list[str]]:
    """`tensors` without the prefix that keeps most of their `names` from fitting, others as they are; and what to say.

    Where several give all that is needed, or fit as well as one another, nothing is chosen: a teacher and its student
    are two networks, also if one of them has a head.
    """
    prefixes = dict.fromkeys(["", *(prefix for name in tensors for prefix in _prefixes(name))])
    fits = {prefix: sum(prefix + name in tensors for name in names) for prefix in prefixes}
    most = max(fits.values())
    if chosen is not None:
        if any(name.startswith(f"{chosen}.") for name in tensors):
            chosen = f"{chosen}."
        if not any(name.startswith(chosen) for name in tensors):
            raise WeightsError(
                f"No tensor in {file} has a name that starts with {chosen!r}. Expected one of the prefixes that are "
                f"there: {', '.join(prefix for prefix in prefixes if prefix and fits[prefix]) or 'none'}. Correct "
                "--weights-prefix (in Python: weights_prefix=...)."
            )
        return _without(chosen, tensors), []
    whole = [prefix for prefix in prefixes if needed and all(prefix + name in tensors for name in needed)]
    best = whole or [prefix for prefix in prefixes if fits[prefix] == most]
    if most > 0 and len(best) > 1:
        example = best[0] or best[1]
        raise WeightsError(
            f"{file} holds several networks that fit, under {', '.join(map(repr, best))}, and nothing says "
            f"which one is meant. Choose one: --weights-prefix {example} (in Python: weights_prefix={example!r})."
        )
    others = [repr(prefix) for prefix in prefixes if prefix != best[0] and most > 0 and 2 * fits[prefix] > most]
    note = (
        f"{file.name} holds several networks: that under {best[0]!r} fits best, not {' or '.join(others)}, and is used"
    )
    return _without(best[0], tensors), [note] if others else []


def _unlisted_prefix(tensors: Mapping[str, Tensor], needed: Collection[str]) -> str | None:
    """What stands before all needed names in the file, if it is the same for all of them."""
    wanted = [name for name in needed if not name.endswith(_COUNTER)]
    if not wanted:
        return None
    candidates = [name.removesuffix(wanted[0]) for name in tensors if name.endswith(f".{wanted[0]}")]
    return next((each for each in candidates if all(each + name in tensors for name in wanted)), None)


def _without(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    others = {name: tensor for name, tensor in tensors.items() if not name.startswith(prefix)}
    return {**others, **{name[len(prefix) :]: value for name, value in tensors.items() if name not in others}}


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


def _shared(
    tensors: Mapping[str, Tensor], other_names: Mapping[str, str]
) -> tuple[dict[str, Tensor], dict[str, list[str]]]:
    """`tensors` under each name that the network has for them, and these: the one that stands for all -> all."""
    given, names = dict(tensors), {name: [name] for name in other_names.values()}
    for other, name in other_names.items():
        names[name].append(other)
    for same in names.values():
        there = [each for each in same if each in tensors]
        given |= {each: tensors[there[0]] for each in same if there and each not in tensors}
    return given, names


def _misfit(name: str, tensor: Tensor, given: Mapping[str, Tensor], names: Mapping[str, list[str]]) -> str | None:
    """`_problem`, under whichever of its names."""
    for each in names.get(name, [name]):
        if (problem := _problem(each, tensor, given)) is not None:
            return problem
        if each != name and not torch.equal(given[each].to(tensor.dtype), given[name].to(tensor.dtype)):
            return f"{name} and {each} differ, and are one tensor of the network"
    return None


def _problem(name: str, tensor: Tensor, given: Mapping[str, Tensor]) -> str | None:
    if name not in given:
        return None if name.endswith(_COUNTER) else f"{name} is missing"
    value = given[name]
    if value.layout != torch.strided or value.is_quantized or value.is_meta:
        kind = "quantized" if value.is_quantized else "without values (meta)" if value.is_meta else "sparse"
        return f"{name} is {kind}, expected plain numbers"
    if value.shape != tensor.shape:
        return f"{name} is {_shape(value)}, expected {_shape(tensor)}"
    if _kind(value) != _kind(tensor) and not name.endswith(_COUNTER):
        return f"{name} holds {_kind(value)} ({_type(value)}), expected {_kind(tensor)} ({_type(tensor)})"
    if value.isnan().any():
        return f"{name} holds NaN, expected numbers"
    if value.dtype != tensor.dtype and not torch.equal(value.isinf(), value.to(tensor.dtype).isinf()):
        return f"{name} holds values beyond {_type(tensor)}, expected such that it can hold"
    return None


def _kind(tensor: Tensor) -> str:
    if tensor.is_floating_point():
        return "floating-point numbers"
    return "complex numbers" if tensor.is_complex() else "truth values" if tensor.dtype == torch.bool else "integers"


def _type(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _left_out(name: str, tensor: Tensor, given: Mapping[str, Tensor]) -> str | None:
    if name not in given:
        return None
    rows = f" has {len(given[name])} rows" if given[name].ndim and given[name].shape != tensor.shape else ""
    return f"{name}{rows}: not used"


def _shape(tensor: Tensor) -> str:
    return "x".join(str(size) for size in tensor.shape) or "a number"
