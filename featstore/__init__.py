"""featstore: run a frozen backbone once, file its activations under everything that decides their values."""

from featstore.adopt import AdoptReport, adopt
from featstore.backbones import backbone, backbone_names
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
from featstore.export import ExportReport, export
from featstore.extract import ExtractReport, Plan, extract, plan
from featstore.features import Features
from featstore.foreign import ImportReport, import_features, import_file
from featstore.images import ImageSet
from featstore.pool import Pool
from featstore.sets import FeatureRequest, FeatureSet
from featstore.spec import FeatureSpec
from featstore.staged import StagedModel
from featstore.store import FeatureStore
from featstore.trunk import Output, Trunk
from featstore.views import Augment, View

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
