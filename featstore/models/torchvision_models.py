"""torchvision's models as backbones: which, how they are cut, their weights; the one door to torchvision.models.

torchvision is imported when one of its models or the names of their weights are asked for, not before.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from featstore.errors import WeightsError
from featstore.images.views import View
from featstore.models.modes import random_states_kept, seeded
from featstore.models.staged import StagedModel
from featstore.timing import timed


@dataclass(frozen=True, kw_only=True)
class Family:
    """What torchvision's own names don't say about a family of backbones."""

    names: tuple[str, ...]
    containers: tuple[str, ...] = ()
    layouts: tuple[tuple[str, str], ...] = ()
    class_tokens: int = 0
    has_fixed_size: bool = False


FAMILIES = (
    Family(names=("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")),
    Family(names=("squeezenet1_0", "squeezenet1_1"), containers=("features", "classifier")),
    Family(
        names=("vit_b_16", "vit_b_32", "vit_l_16", "vit_l_32", "vit_h_14"),
        containers=("encoder", "encoder.layers", "heads"),
        layouts=(("reshape", "NCL"),),  # patches before they are turned into tokens
        class_tokens=1,
        has_fixed_size=True,
    ),
)


def names() -> list[str]:
    """In the order of their families."""
    return [name for family in FAMILIES for name in family.names]


def weight_names(name: str) -> list[str]:
    """Names of torchvision's weights for `name`; the one that DEFAULT stands for comes first."""
    enum = _weights(name)
    default = enum.DEFAULT.name
    return [default, *(member.name for member in enum if member.name != default)]


def outline(name: str) -> StagedModel:
    """Without any weights, on the meta device."""
    with torch.device("meta"), random_states_kept():
        module = _made(name, weights=None)
    return _staged(module, name, View())


def initial(name: str, **architecture: Any) -> StagedModel:
    """With its seeded initialisation."""
    with seeded():
        module = _made(name, weights=None, **architecture)
    return _staged(module, name, View())


def pretrained(name: str, weights: str) -> StagedModel:
    """With torchvision's `weights`, from the cache or the network, and their preset's view."""
    enum = _weights(name)
    chosen = enum.DEFAULT if weights == "DEFAULT" else enum[weights]
    try:
        module = _made(name, weights=chosen)
    except OSError as error:  # URLError, a time-out, a folder that can't be written
        file = Path(str(chosen.url)).name
        folder = Path(torch.hub.get_dir()) / "checkpoints"
        command = f"python -c \"import torchvision.models as m; m.get_model('{name}', weights='{chosen.name}')\""
        raise WeightsError(
            f"The weights {chosen.name} of {name} aren't here and can't be downloaded ({error}). They are the file "
            f"{file}, which belongs into {folder}. On a machine with network, run {command} and copy the file; or give "
            '--weights FILE, or --weights none for a random initialisation (in Python: weights=FILE, weights="none").'
        ) from error
    return _staged(module, name, View.from_preset(chosen.transforms()), weights=weights)


def class_names(name: str, weights: str) -> tuple[str, ...]:
    """The categories of torchvision's `weights`.

    A name that stands for two of ImageNet's classes in some versions (crane, maillot) is told apart by the numbers of
    its logits.
    """
    enum = _weights(name)
    names = (enum.DEFAULT if weights == "DEFAULT" else enum[weights]).meta["categories"]
    return tuple(f"{each} ({place})" if names.count(each) > 1 else each for place, each in enumerate(names))


def _weights(name: str) -> Any:
    """Torchvision's enumeration of the weights for `name`."""
    from torchvision.models import get_model_weights

    return get_model_weights(name)


def _made(name: str, **arguments: Any) -> nn.Module:
    from torchvision.models import get_model

    with timed("load"):
        module: nn.Module = get_model(name, **arguments)
    return module


def _staged(module: nn.Module, name: str, view: View, *, weights: str = "none") -> StagedModel:
    family = next(family for family in FAMILIES if name in family.names)
    size = int(module.image_size) if family.has_fixed_size else None  # type: ignore[arg-type]
    # Some weights come for another image size than the name alone gives: vit_b_16's 384, say.
    built_by = {"name": name} if size is None else {"name": name, "image_size": size}
    if size is not None and view.size != size:
        view = view.resized(size=size)
    return StagedModel.from_module(
        module.eval(),
        view=view,
        name=name,
        layouts=dict(family.layouts),
        class_tokens=family.class_tokens,
        containers=family.containers,
        origin={"backbone": name, "weights": weights, "architecture": built_by},
        fixed_size=size,
    )
