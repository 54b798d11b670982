"""The command that lists backbones and draws where one can be cut."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from featstore.cli.flags import OutputFlags, TrustOption, spread
from featstore.cli.models import load_model
from featstore.cli.program import show, show_json, table, tell, tell_all
from featstore.digest import Json
from featstore.errors import ModelError
from featstore.files.storage_types import DEFAULT_STORAGE_TYPE, STORAGE_TYPES
from featstore.words import size_text

if TYPE_CHECKING:
    from featstore.models.staged import StagedModel


@spread
def backbones(
    output: OutputFlags,
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="[NAME|'PATTERN'|FILE.py:FN|RUN_DIR]", help="One backbone, to see its cuts; or which to list."
        ),
    ] = None,
    trust_code: TrustOption = False,
) -> None:
    """List backbones, their sizes and weights; of one, draw its stages with their cuts and layer groups.

    'timm:*resnet*' lists those of timm, 'resnet*' those of torchvision.
    """
    from featstore.models.backbones import about, backbone_names, is_named, outline, unlisted
    from featstore.models.own_file import is_own_file

    if name is None or ({"*", "?", "["} & {*name} and not (is_own_file(name) or Path(name).exists())):
        known = [about(each) for each in backbone_names(name)]
        if name is not None and not known:
            raise ValueError(
                f"No backbone's name is like {name!r}. Expected a pattern such as 'resnet*', 'timm:*vit*'."
            )
        if output.json:
            show_json(known)
        else:
            show(table([{**each, "weights": ", ".join(each["weights"])} for each in known]))
            tell_all([] if name else unlisted())
            tell("DEFAULT stands for the first of the weights. The cuts of one: featstore backbones NAME")
        return
    model = outline(name) if is_named(name) else load_model(name, None, trust_code=trust_code)
    facts = _cut_facts(model)
    if output.json:
        show_json(facts)
        return
    tell(
        f"{facts['name']}: {facts['parameters']:,} parameters; shapes for images of {facts['size']} pixels, stored as "
        f"{DEFAULT_STORAGE_TYPE} without a reduction"
    )
    groups = [each["group"] for each in facts["cuts"]]
    is_first = [group != before for group, before in zip(groups, [None, *groups], strict=False)]
    show(table([_cut_row(each, is_first=first) for each, first in zip(facts["cuts"], is_first, strict=True)]))


COMMANDS: dict[str, Callable[..., None]] = {"backbones": backbones}


def _cut_facts(model: StagedModel) -> dict[str, Json]:
    from featstore.models.stages import Stage

    default = None
    with suppress(ModelError):  # a single layer has none
        default = model.default_cut
    groups = _body_groups(model, default)
    cuts = []
    # Pool and head, behind them, are no cuts.
    for place, (name, stage) in enumerate(zip(model.cut_points, model.stages, strict=False)):
        assert isinstance(stage, Stage)
        cuts.append(
            {
                "name": name,
                "group": next((group for group, places in groups.items() if place in places), None),
                "shape": list(model.shape(name)),
                "layout": model.layout(name),
                "bytes": math.prod(model.shape(name)) * STORAGE_TYPES[DEFAULT_STORAGE_TYPE].itemsize,
                "parameters": sum(parameter.numel() for parameter in stage.parameters()),
                "aliases": list(stage.aliases),
                "is_default": name == default,
            }
        )
    return {
        "name": model.name,
        "size": model.view.size,
        "parameters": sum(each["parameters"] for each in cuts),
        "default_cut": default,
        "cuts": cuts,
    }


def _body_groups(model: StagedModel, cut: str | None) -> dict[str, range]:
    """Name -> places of the layer groups of the body, for a head at `cut`."""
    if cut is None:
        return {}
    from torch import nn

    from featstore.models.layer_groups import layer_groups

    *body, _ = layer_groups(model.with_head(nn.Linear(1, 1), cut=cut, reduction="none"))
    end = model.index(cut) + 1
    return {group.name: range(group.stages.start, min(group.stages.stop, end)) for group in body}


def _cut_row(cut: dict[str, Json], *, is_first: bool) -> dict[str, Json]:
    """A line of the drawing; `is_first`: of its layer group."""
    return {
        "group": (cut["group"] or "behind") if is_first else "|",
        "cut": cut["name"],
        "shape": cut["shape"],
        "layout": cut["layout"],
        "an image": size_text(cut["bytes"]),
        "parameters": cut["parameters"],
        "": "(default)" if cut["is_default"] else "",
        "also called": ", ".join(cut["aliases"]),
    }
