"""featstore: run a frozen backbone once, file its activations under everything that decides their values."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from featstore.errors import (
        AmbiguousRequestError,
        DamagedFileError,
        FactsDifferError,
        FeatureStoreError,
        ImageError,
        MissingFeaturesError,
        ModelError,
        WeightsError,
    )
    from featstore.exchange.export import ExportReport, export
    from featstore.exchange.imports import ImportReport, import_features, import_file
    from featstore.extraction.adopt import AdoptReport, adopt
    from featstore.extraction.estimate import Estimate, estimate
    from featstore.extraction.extract import ExtractReport, extract, finish
    from featstore.extraction.filed import Filed
    from featstore.extraction.job import Session
    from featstore.extraction.map_batches import MapBatches
    from featstore.extraction.opening import open_plan
    from featstore.extraction.plan import Plan, plan
    from featstore.extraction.progress import ProgressReport
    from featstore.extraction.rates import StageRate
    from featstore.extraction.ray_actors import Ray
    from featstore.images.image_set import ImageSet
    from featstore.images.views import Augment, View
    from featstore.machine import keep_freed_memory
    from featstore.models.backbones import backbone, backbone_names
    from featstore.models.pool import Pool
    from featstore.models.staged import StagedModel
    from featstore.models.trunk import Output, Trunk
    from featstore.store.features import Features
    from featstore.store.near_duplicates import Duplicates, near_duplicates
    from featstore.store.sets import FeatureRequest, FeatureSet
    from featstore.store.spec import FeatureSpec
    from featstore.store.store import FeatureStore

__version__ = "0.1.0"

__all__ = [
    "AdoptReport",
    "AmbiguousRequestError",
    "Augment",
    "DamagedFileError",
    "Duplicates",
    "Estimate",
    "ExportReport",
    "ExtractReport",
    "FactsDifferError",
    "FeatureRequest",
    "FeatureSet",
    "FeatureSpec",
    "FeatureStore",
    "FeatureStoreError",
    "Features",
    "Filed",
    "ImageError",
    "ImageSet",
    "ImportReport",
    "MapBatches",
    "MissingFeaturesError",
    "ModelError",
    "Output",
    "Plan",
    "Pool",
    "ProgressReport",
    "Ray",
    "Session",
    "StageRate",
    "StagedModel",
    "Trunk",
    "View",
    "WeightsError",
    "adopt",
    "backbone",
    "backbone_names",
    "estimate",
    "export",
    "extract",
    "finish",
    "import_features",
    "import_file",
    "keep_freed_memory",
    "near_duplicates",
    "open_plan",
    "plan",
]

_MODULES = {
    "featstore.errors": (
        "AmbiguousRequestError",
        "DamagedFileError",
        "FactsDifferError",
        "FeatureStoreError",
        "ImageError",
        "MissingFeaturesError",
        "ModelError",
        "WeightsError",
    ),
    "featstore.exchange.export": ("ExportReport", "export"),
    "featstore.exchange.imports": ("ImportReport", "import_features", "import_file"),
    "featstore.extraction.adopt": ("AdoptReport", "adopt"),
    "featstore.extraction.estimate": ("Estimate", "estimate"),
    "featstore.extraction.extract": ("ExtractReport", "extract", "finish"),
    "featstore.extraction.filed": ("Filed",),
    "featstore.extraction.job": ("Session",),
    "featstore.extraction.map_batches": ("MapBatches",),
    "featstore.extraction.opening": ("open_plan",),
    "featstore.extraction.plan": ("Plan", "plan"),
    "featstore.extraction.progress": ("ProgressReport",),
    "featstore.extraction.rates": ("StageRate",),
    "featstore.extraction.ray_actors": ("Ray",),
    "featstore.images.image_set": ("ImageSet",),
    "featstore.images.views": ("Augment", "View"),
    "featstore.machine": ("keep_freed_memory",),
    "featstore.models.backbones": ("backbone", "backbone_names"),
    "featstore.models.pool": ("Pool",),
    "featstore.models.staged": ("StagedModel",),
    "featstore.models.trunk": ("Output", "Trunk"),
    "featstore.store.features": ("Features",),
    "featstore.store.near_duplicates": ("Duplicates", "near_duplicates"),
    "featstore.store.sets": ("FeatureRequest", "FeatureSet"),
    "featstore.store.spec": ("FeatureSpec",),
    "featstore.store.store": ("FeatureStore",),
}
"""Where each public name is defined: it is imported at its first use, since most of them bring torch along."""
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_MODULE_OF[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
