"""What a saved run brings back: its backbone, its head, its split."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from torch import Tensor, nn

from featstore.digest import Json
from featstore.errors import FeatureStoreError, ModelError
from featstore.images.image_set import ImageSet, Task
from featstore.images.sources import AbsentSource
from featstore.images.views import View
from featstore.models.backbones import architecture, restored
from featstore.models.digests import START, chain
from featstore.models.graph import split_into_stages
from featstore.models.runs import Run
from featstore.models.staged import HeadStage, StagedModel
from training.heads import LinearHead, unstandardised
from training.splits import PastSplit


def saved_backbone(saved: Run, folder: Path, module: nn.Module | None) -> StagedModel:
    """The backbone of a saved run, with the run's weights.

    Raises:
        FeatureStoreError: if it has no name and `module` isn't given, or its source has changed.
        WeightsError: if the tensors don't give the model that was saved.
    """
    facts = saved.facts["model"]
    if facts["is_absent"]:
        return StagedModel.absent(
            facts["stages"],
            view=View.from_facts(facts["view"]),
            name=facts["name"],
            class_tokens=facts["class_tokens"],
        )
    if module is not None:
        given = module if isinstance(module, StagedModel) else StagedModel.from_module(module)
        return restored(given, saved)
    if facts["architecture"] is None:
        raise FeatureStoreError(
            f"The backbone of {folder} was made in Python and has no name. Give it: Learner.load({str(folder)!r}, "
            "module=...)."
        )
    return restored(architecture(facts["architecture"]), saved, origin=str(folder))


def saved_head(facts: Mapping[str, Json], head: nn.Module | None, folder: Path) -> str | nn.Module:
    """The name of a saved run's head, or the module that its owner gives again.

    Raises:
        FeatureStoreError: if the head was a module and none is given: code is never loaded.
    """
    if facts["name"] != "module":
        return str(facts["name"])
    if head is None:
        raise FeatureStoreError(
            f"The head of {folder} was a module of your own. Give it: Learner.load({str(folder)!r}, head=...)."
        )
    return head


def head_digest(model: StagedModel) -> str | None:
    """What a head of a person's own computes in eval mode, its tensors included; None if that can't be traced."""
    head, digest = list(model.stages)[-1], START
    if not isinstance(head, HeadStage):
        return None
    try:
        for stage in split_into_stages(head.module):
            digest = chain(digest, stage.eval)
    except ModelError:
        return None
    return digest


def check_head(model: StagedModel, facts: Mapping[str, Json], folder: Path) -> None:
    """Checks that the head given again computes what the saved one did: tensors of the same names say little.

    Raises:
        FeatureStoreError: if it computes something else.
    """
    digest = head_digest(model)
    if facts["name"] == "module" and facts["digest"] is not None and digest != facts["digest"]:
        raise FeatureStoreError(
            f"The head given for {folder} computes something else than the one that was saved (digest "
            f"{facts['digest'][:8]} expected, {'none' if digest is None else digest[:8]} found). Give the head as it "
            "was, with its layers and settings; its tensors come from the run."
        )


def with_statistics(tensors: Mapping[str, Tensor], model: StagedModel) -> Mapping[str, Tensor]:
    """The tensors of a run; earlier linear heads have no statistics, as they took their inputs as they are."""
    head = list(model.stages)[-1]
    if not isinstance(head, HeadStage) or not isinstance(head.module, LinearHead):
        return tensors
    made = {f"{head.name}.{name}": value for name, value in unstandardised(head.module.in_features).items()}
    return tensors if any(name in tensors for name in made) else {**tensors, **made}


def past_split(backbone: StagedModel) -> PastSplit | None:
    """The split of the run that `backbone` comes from, if it comes from one."""
    run = backbone.origin.get("run")
    return None if run is None else PastSplit.read(Path(run))


def no_images(classes: tuple[str, ...], task: Task) -> ImageSet:
    """An empty image set with a run's class table: what a model that only predicts is given."""
    return ImageSet(
        name="none",
        ids=(),
        targets=None,
        classes=classes,
        splits=np.zeros(0, dtype="<U5"),
        groups=None,
        task=task,
        source=AbsentSource(where="nowhere"),
    )
