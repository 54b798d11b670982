"""featstore: run a frozen backbone once, file its activations under everything that decides their values."""

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
from featstore.extraction.extract import ExtractReport, extract
from featstore.extraction.plan import Plan, plan
from featstore.images.image_set import ImageSet
from featstore.images.views import Augment, View
from featstore.models.backbones import backbone, backbone_names
from featstore.models.pool import Pool
from featstore.models.staged import StagedModel
from featstore.models.trunk import Output, Trunk
from featstore.store.features import Features
from featstore.store.sets import FeatureRequest, FeatureSet
from featstore.store.spec import FeatureSpec
from featstore.store.store import FeatureStore

__version__ = "0.1.0"

__all__ = [
    "AdoptReport",
    "AmbiguousRequestError",
    "Augment",
    "DamagedFileError",
    "ExportReport",
    "ExtractReport",
    "FactsDifferError",
    "FeatureRequest",
    "FeatureSet",
    "FeatureSpec",
    "FeatureStore",
    "FeatureStoreError",
    "Features",
    "ImageError",
    "ImageSet",
    "ImportReport",
    "MissingFeaturesError",
    "ModelError",
    "Output",
    "Plan",
    "Pool",
    "StagedModel",
    "Trunk",
    "View",
    "WeightsError",
    "adopt",
    "backbone",
    "backbone_names",
    "export",
    "extract",
    "import_features",
    "import_file",
    "plan",
]
