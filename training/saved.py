"""What a saved run brings back: its backbone, its head, its split."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from torch import nn

from featstore.backbones import architecture, restored
from featstore.digest import Json
from featstore.errors import FeatureStoreError
from featstore.images import AbsentSource, ImageSet, Task
from featstore.runs import Run
from featstore.staged import StagedModel
from featstore.views import View
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


def past_split(backbone: StagedModel) -> PastSplit | None:
    """The split of the run that `backbone` comes from, if it comes from one."""
    folder = Path(str(backbone.origin.get("backbone", "")))
    return PastSplit.read(folder) if folder.is_dir() and "backbone" in backbone.origin else None


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
