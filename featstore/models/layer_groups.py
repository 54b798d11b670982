"""Layer groups: the parts of a network that share a learning rate, early body, late body and head."""

from __future__ import annotations

from dataclasses import dataclass

from featstore.models.staged import StagedModel
from featstore.models.stages import has_weights

_BOUNDARY, _AROUND = "layer2", {"layer1", "layer2", "layer3"}
"""Where fastai 0.7 parts the body of a resnet (its `lr_cut`): the early body ends with layer2."""


@dataclass(frozen=True, kw_only=True)
class LayerGroup:
    """Stages that share a learning rate.

    Attributes:
        name: early body, late body, body or head.
        stages: their places in the model.
    """

    name: str
    stages: range


def layer_groups(model: StagedModel) -> list[LayerGroup]:
    """Early body, late body and head, without groups that have no parameters; frozen ones count.

    The head is what `with_head` added, else the last stage with parameters. The body of a resnet is parted as fastai
    parted it, any other in the middle of its stages with parameters. Stages of an absent trunk count as having some, so
    that the same rates are accepted with and without the weights.

    Raises:
        ValueError: for a model without parameters.
    """
    with_parameters = [place for place, stage in enumerate(model.ordered) if has_weights(stage)]
    if not with_parameters:
        raise ValueError(f"{model.name} has no parameters, so there is nothing to train.")
    head = len(model.stages) - 1 if model.head is not None else with_parameters[-1]
    body = [place for place in with_parameters if place < head]
    if not body:
        return [LayerGroup(name="head", stages=range(len(model.stages)))]
    if set(model.cut_points) >= _AROUND:
        middle = model.index(_BOUNDARY) + 1
    else:
        middle = body[len(body) // 2]
    parts = [
        LayerGroup(name="early body", stages=range(middle)),
        LayerGroup(name="late body", stages=range(middle, head)),
        LayerGroup(name="head", stages=range(head, len(model.stages))),
    ]
    return [part for part in parts if set(part.stages) & set(with_parameters)]
