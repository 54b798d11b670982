"""training: heads fitted to features, models fitted to images, by one loop."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from featstore.images.views import Augment
    from training.averages import EMA, SWA
    from training.batch_norm import reestimate_batch_norm
    from training.comparing import Comparison, compare
    from training.cross_validation import CrossValidation, cross_validate
    from training.ensembles import Ensemble
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
    from training.solvers.class_means import discriminant_analysis, nearest_mean
    from training.solvers.logistic import logistic_path
    from training.solvers.neighbors import KNearest
    from training.solvers.ridge import ridge_classifier_path, ridge_path
    from training.suspects import Suspects, label_suspects
    from training.transferability import transfer_scores

__all__ = [
    "EMA",
    "SWA",
    "Augment",
    "Comparison",
    "CrossValidation",
    "CutMix",
    "Ensemble",
    "FeatureBrightness",
    "FeatureNoise",
    "FitOptions",
    "History",
    "Inputs",
    "KNearest",
    "Learner",
    "LearningRates",
    "Mixup",
    "Outcomes",
    "Prediction",
    "Suspects",
    "build_head",
    "compare",
    "concat_head",
    "cross_validate",
    "discriminant_analysis",
    "finetune",
    "label_suspects",
    "linear_head",
    "logistic_path",
    "mlp_head",
    "nearest_mean",
    "reestimate_batch_norm",
    "ridge_classifier_path",
    "ridge_path",
    "train_head",
    "transfer_scores",
]

_MODULES = {
    "featstore.images.views": ("Augment",),
    "training.averages": ("EMA", "SWA"),
    "training.batch_norm": ("reestimate_batch_norm",),
    "training.ensembles": ("Ensemble",),
    "training.comparing": ("Comparison", "compare"),
    "training.cross_validation": ("CrossValidation", "cross_validate"),
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
    "training.suspects": ("Suspects", "label_suspects"),
    "training.transferability": ("transfer_scores",),
    "training.solvers.class_means": ("discriminant_analysis", "nearest_mean"),
    "training.solvers.logistic": ("logistic_path",),
    "training.solvers.neighbors": ("KNearest",),
    "training.solvers.ridge": ("ridge_classifier_path", "ridge_path"),
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
