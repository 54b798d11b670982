"""One extraction as several tests run it, and the rows that it should leave, by the plain module's own layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from featstore import (
    ExtractReport,
    FeatureStore,
    ImageSet,
    StagedModel,
    extract,
)
from support.tiny import Net, staged


def run(
    images: ImageSet, store: FeatureStore, *, model: StagedModel | None = None, dtype: str = "float32", **options: Any
) -> ExtractReport:
    defaults: dict[str, Any] = {"cuts": ["layer2"], "workers": 0, "device": "cpu"}
    return extract(model or staged(), images, store, dtype=dtype, **(defaults | options))


def counts(report: ExtractReport) -> tuple[int, int, int]:
    return report.computed, report.reused, report.failed


def rows(store: FeatureStore, images: ImageSet, key: str) -> Tensor:
    return FeatureStore(store.root).features(images, key)[:]


def up_to(stages: str, module: Net) -> nn.Module:
    """The plain module's own layers, independent of any staging."""
    maps = [module.layer1] if stages == "layer1" else [module.layer1, module.layer2]
    return nn.Sequential(*maps)


def reduced(maps: Tensor, reduction: str) -> Tensor:
    match reduction:
        case "avg":
            return maps.mean((2, 3))
        case "max":
            return maps.amax((2, 3))
        case "concat":
            return torch.cat([maps.amax((2, 3)), maps.mean((2, 3))], 1)
    return maps
