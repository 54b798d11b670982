"""training: heads fitted to features, models fitted to images, by one loop."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from featstore.images.views import Augment
    from training.cross_validation import CrossValidation, cross_validate
    from training.ensembles import Ensemble
    from training.estimators.extractor import FeatureExtractor
    from training.estimators.heads import HeadClassifier, HeadRegressor
    from training.estimators.probes import KNNProbe, LinearProbe, RidgeProbe
    from training.experiments.comparing import Comparison, compare
    from training.experiments.grid import Grid, Sample, log_uniform, uniform
    from training.experiments.registry import Runs, runs
    from training.experiments.reports import Report, report
    from training.experiments.shots import LearningCurve, few_shot, k_shot, learning_curve
    from training.experiments.sweeps import sweep, try_settings
    from training.experiments.swept import Sweep
    from training.heads import attention_head, build_head, concat_head, linear_head, mlp_head
    from training.inputs.derive import Inputs
    from training.learner import Learner
    from training.loop.averages import EMA, SWA
    from training.loop.batch_norm import reestimate_batch_norm
    from training.loop.history import History
    from training.loop.lr_find import LearningRates
    from training.loop.plan import FitOptions
    from training.mixing import CutMix, FeatureBrightness, FeatureNoise, Mixup
    from training.predict import Prediction
    from training.recipes import finetune, train_head
    from training.scores.calibration import Calibration
    from training.scores.class_report import ClassReport
    from training.scores.outcomes import Outcomes
    from training.scores.significance import mcnemar, paired_bootstrap
    from training.scores.suspects import Suspects, label_suspects
    from training.scores.transferability import transfer_scores
    from training.sidecar import Sidecar
    from training.solvers.class_means import discriminant_analysis, nearest_mean
    from training.solvers.logistic import logistic_path
    from training.solvers.neighbors import KNearest
    from training.solvers.ridge import ridge_classifier_path, ridge_path

__all__ = [
    "EMA",
    "SWA",
    "Augment",
    "Calibration",
    "ClassReport",
    "Comparison",
    "CrossValidation",
    "CutMix",
    "Ensemble",
    "FeatureBrightness",
    "FeatureExtractor",
    "FeatureNoise",
    "FitOptions",
    "Grid",
    "HeadClassifier",
    "HeadRegressor",
    "History",
    "Inputs",
    "KNNProbe",
    "KNearest",
    "Learner",
    "LearningCurve",
    "LearningRates",
    "LinearProbe",
    "Mixup",
    "Outcomes",
    "Prediction",
    "Report",
    "RidgeProbe",
    "Runs",
    "Sample",
    "Sidecar",
    "Suspects",
    "Sweep",
    "attention_head",
    "build_head",
    "compare",
    "concat_head",
    "cross_validate",
    "discriminant_analysis",
    "few_shot",
    "finetune",
    "k_shot",
    "label_suspects",
    "learning_curve",
    "linear_head",
    "log_uniform",
    "logistic_path",
    "mcnemar",
    "mlp_head",
    "nearest_mean",
    "paired_bootstrap",
    "reestimate_batch_norm",
    "report",
    "ridge_classifier_path",
    "ridge_path",
    "runs",
    "sweep",
    "train_head",
    "transfer_scores",
    "try_settings",
    "uniform",
]

_MODULES = {
    "featstore.images.views": ("Augment",),
    "training.loop.averages": ("EMA", "SWA"),
    "training.loop.batch_norm": ("reestimate_batch_norm",),
    "training.scores.calibration": ("Calibration",),
    "training.scores.class_report": ("ClassReport",),
    "training.ensembles": ("Ensemble",),
    "training.experiments.comparing": ("Comparison", "compare"),
    "training.estimators.extractor": ("FeatureExtractor",),
    "training.estimators.heads": ("HeadClassifier", "HeadRegressor"),
    "training.estimators.probes": ("KNNProbe", "LinearProbe", "RidgeProbe"),
    "training.cross_validation": ("CrossValidation", "cross_validate"),
    "training.experiments.grid": ("Grid", "Sample", "log_uniform", "uniform"),
    "training.heads": ("attention_head", "build_head", "concat_head", "linear_head", "mlp_head"),
    "training.experiments.shots": ("LearningCurve", "few_shot", "k_shot", "learning_curve"),
    "training.loop.history": ("History",),
    "training.inputs.derive": ("Inputs",),
    "training.learner": ("Learner",),
    "training.loop.lr_find": ("LearningRates",),
    "training.mixing": ("CutMix", "FeatureBrightness", "FeatureNoise", "Mixup"),
    "training.scores.outcomes": ("Outcomes",),
    "training.loop.plan": ("FitOptions",),
    "training.predict": ("Prediction",),
    "training.recipes": ("finetune", "train_head"),
    "training.experiments.sweeps": ("sweep", "try_settings"),
    "training.experiments.swept": ("Sweep",),
    "training.experiments.reports": ("Report", "report"),
    "training.experiments.registry": ("Runs", "runs"),
    "training.sidecar": ("Sidecar",),
    "training.scores.suspects": ("Suspects", "label_suspects"),
    "training.scores.transferability": ("transfer_scores",),
    "training.scores.significance": ("mcnemar", "paired_bootstrap"),
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
