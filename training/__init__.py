"""training: heads fitted to features, models fitted to images, by one loop."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from featstore.images.views import Augment
    from training.averages import EMA, SWA
    from training.batch_norm import reestimate_batch_norm
    from training.cross_validation import CrossValidation, cross_validate
    from training.ensembles import Ensemble
    from training.estimators.extractor import FeatureExtractor
    from training.estimators.heads import HeadClassifier, HeadRegressor
    from training.estimators.probes import KNNProbe, LinearProbe, RidgeProbe
    from training.few_shot import LearningCurve, few_shot, k_shot, learning_curve
    from training.heads import build_head, concat_head, linear_head, mlp_head
    from training.history import History
    from training.inputs.derive import Inputs
    from training.learner import Learner
    from training.lr_find import LearningRates
    from training.mixing import CutMix, FeatureBrightness, FeatureNoise, Mixup
    from training.outcomes import Outcomes
    from training.plan import FitOptions
    from training.predict import Prediction
    from training.recipes import finetune, train_head

__all__ = [
    "EMA",
    "SWA",
    "Augment",
    "CrossValidation",
    "CutMix",
    "Ensemble",
    "FeatureBrightness",
    "FeatureExtractor",
    "FeatureNoise",
    "FitOptions",
    "HeadClassifier",
    "HeadRegressor",
    "History",
    "Inputs",
    "KNNProbe",
    "Learner",
    "LearningCurve",
    "LearningRates",
    "LinearProbe",
    "Mixup",
    "Outcomes",
    "Prediction",
    "RidgeProbe",
    "build_head",
    "concat_head",
    "cross_validate",
    "few_shot",
    "finetune",
    "k_shot",
    "learning_curve",
    "linear_head",
    "mlp_head",
    "reestimate_batch_norm",
    "train_head",
]

_MODULES = {
    "featstore.images.views": ("Augment",),
    "training.averages": ("EMA", "SWA"),
    "training.batch_norm": ("reestimate_batch_norm",),
    "training.ensembles": ("Ensemble",),
    "training.estimators.extractor": ("FeatureExtractor",),
    "training.estimators.heads": ("HeadClassifier", "HeadRegressor"),
    "training.estimators.probes": ("KNNProbe", "LinearProbe", "RidgeProbe"),
    "training.cross_validation": ("CrossValidation", "cross_validate"),
    "training.few_shot": ("LearningCurve", "few_shot", "k_shot", "learning_curve"),
    "training.heads": ("build_head", "concat_head", "linear_head", "mlp_head"),
    "training.history": ("History",),
    "training.inputs.derive": ("Inputs",),
    "training.learner": ("Learner",),
    "training.lr_find": ("LearningRates",),
    "training.mixing": ("CutMix", "FeatureBrightness", "FeatureNoise", "Mixup"),
    "training.outcomes": ("Outcomes",),
    "training.plan": ("FitOptions",),
    "training.predict": ("Prediction",),
    "training.recipes": ("finetune", "train_head"),
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
