"""torchvision's models as backbones: which, how they are cut, their weights; the one door to torchvision.models.

torchvision is imported when one of its models or the names of their weights are asked for, not before.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from featstore.digest import Json
from featstore.errors import WeightsError
from featstore.images.views import View
from featstore.models.modes import WithoutValues, random_states_kept, seeded
from featstore.models.staged import StagedModel
from featstore.timing import timed


@dataclass(frozen=True, kw_only=True)
class Family:
    """What torchvision's own names don't say about a family of backbones.

    Attributes:
        names: of its members.
        containers: module paths too coarse to name a cut.
        layouts: see `StagedModel.from_module`.
        class_tokens: at the start of each row of tokens.
        arguments: of the constructor that weights may change; the module keeps each under the same name.
        fixed_size: the only image size its members take; ``image_size`` where each module knows its own.
        initial: further arguments for a seeded initialisation.
    """

    names: tuple[str, ...]
    containers: tuple[str, ...] = ()
    layouts: tuple[tuple[str, str], ...] = ()
    class_tokens: int = 0
    arguments: tuple[str, ...] = ()
    fixed_size: int | Literal["image_size"] | None = None
    initial: tuple[tuple[str, Any], ...] = ()


_FEATURES = ("features", "classifier")
_AUXILIARY = (("init_weights", True),)  # as their authors did; torchvision warns where nobody says

FAMILIES = (
    Family(names=("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")),
    Family(names=("resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d")),
    Family(names=("wide_resnet50_2", "wide_resnet101_2")),
    Family(names=("alexnet",), containers=_FEATURES),
    Family(
        names=("vgg11", "vgg11_bn", "vgg13", "vgg13_bn", "vgg16", "vgg16_bn", "vgg19", "vgg19_bn"), containers=_FEATURES
    ),
    Family(names=("squeezenet1_0", "squeezenet1_1"), containers=_FEATURES),
    Family(names=("densenet121", "densenet161", "densenet169", "densenet201"), containers=("features",)),
    Family(names=("googlenet",), arguments=("transform_input",), initial=_AUXILIARY),
    Family(names=("inception_v3",), arguments=("transform_input",), initial=_AUXILIARY),
    Family(names=("mobilenet_v2",), containers=_FEATURES),
    Family(names=("mobilenet_v3_small", "mobilenet_v3_large"), containers=_FEATURES),
    Family(names=("mnasnet0_5", "mnasnet0_75", "mnasnet1_0", "mnasnet1_3"), containers=("layers", "classifier")),
    Family(names=("shufflenet_v2_x0_5", "shufflenet_v2_x1_0", "shufflenet_v2_x1_5", "shufflenet_v2_x2_0")),
    Family(names=tuple(f"efficientnet_b{number}" for number in range(8)), containers=_FEATURES),
    Family(names=("efficientnet_v2_s", "efficientnet_v2_m", "efficientnet_v2_l"), containers=_FEATURES),
    Family(
        names=(
            *("regnet_x_400mf", "regnet_x_800mf", "regnet_x_1_6gf", "regnet_x_3_2gf"),
            *("regnet_x_8gf", "regnet_x_16gf", "regnet_x_32gf"),
        ),
        containers=("trunk_output",),
    ),
    Family(
        names=(
            *("regnet_y_400mf", "regnet_y_800mf", "regnet_y_1_6gf", "regnet_y_3_2gf"),
            *("regnet_y_8gf", "regnet_y_16gf", "regnet_y_32gf", "regnet_y_128gf"),
        ),
        containers=("trunk_output",),
    ),
    Family(names=("convnext_tiny", "convnext_small", "convnext_base", "convnext_large"), containers=_FEATURES),
    Family(
        names=("vit_b_16", "vit_b_32", "vit_l_16", "vit_l_32", "vit_h_14"),
        containers=("encoder", "encoder.layers", "heads"),
        layouts=(("reshape", "NCL"),),  # patches before they are turned into tokens
        class_tokens=1,
        arguments=("image_size",),
        fixed_size="image_size",
    ),
    Family(names=("swin_t", "swin_s", "swin_b"), containers=("features",)),
    Family(names=("swin_v2_t", "swin_v2_s", "swin_v2_b"), containers=("features",)),
    Family(
        names=("maxvit_t",),
        containers=("blocks", "classifier"),
        layouts=tuple((f"*_attention.{name}", "other") for name in ("*partition_*", "add*")),  # windows of tokens
        fixed_size=224,
    ),
)


def knows(name: str) -> bool:
    """Whether `name` is a model of torchvision's."""
    return any(name in family.names for family in FAMILIES)


def names(pattern: str | None = None) -> list[str]:
    """In the order of their families; those that match `pattern`, if there is one."""
    every = (name for family in FAMILIES for name in family.names)
    return [name for name in every if pattern is None or fnmatchcase(name, pattern)]


def weight_names(name: str) -> list[str]:
    """Names of torchvision's weights for `name`; the one that DEFAULT stands for comes first."""
    enum = _weights(name)
    default = enum.DEFAULT.name
    return [default, *(member.name for member in enum if member.name != default)]


def about(name: str) -> dict[str, Json]:
    """Family, size and parameters, as torchvision says of its default weights."""
    from torchvision.models import get_model_builder

    weights = _weights(name).DEFAULT
    return {
        "family": get_model_builder(name).__module__.rpartition(".")[2],
        "size": View.from_preset(weights.transforms()).size,
        "parameters": int(weights.meta["num_params"]),
    }


def outline(name: str) -> StagedModel:
    """Without any weights, on the meta device."""
    with WithoutValues(), random_states_kept():
        module = _made(name, weights=None, **dict(_family(name).initial))
    return _staged(module.to("meta"), name, _usual_view(name))


def initial(name: str, **architecture: Any) -> StagedModel:
    """With its seeded initialisation."""
    with seeded():
        module = _made(name, weights=None, **dict(_family(name).initial), **architecture)
    return _staged(module, name, _usual_view(name))


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


def _family(name: str) -> Family:
    return next(family for family in FAMILIES if name in family.names)


def _usual_view(name: str) -> View:
    """The view that all of torchvision's weights for `name` share; the usual one of ImageNet where they differ."""
    views = {View.from_preset(weights.transforms()) for weights in _weights(name)}
    return views.pop() if len(views) == 1 else View()


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
    family = _family(name)
    # Weights may come with other arguments than the name alone gives: an image size of 384, say.
    arguments = {argument: getattr(module, argument) for argument in family.arguments}
    size = arguments["image_size"] if family.fixed_size == "image_size" else family.fixed_size
    if size is not None and view.size != size:
        view = view.resized(size=size)
    model = StagedModel.from_module(
        module.eval(),
        view=view,
        name=name,
        layouts=dict(family.layouts),
        class_tokens=family.class_tokens,
        containers=family.containers,
        origin={"backbone": name, "weights": weights, "architecture": {"name": name, **arguments}},
        fixed_size=size,
    )
    if family.class_tokens:
        model.find_patches()
    return model
