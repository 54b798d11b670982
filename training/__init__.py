"""training: heads fitted to features, models fitted to images, by one loop."""

from featstore.views import Augment
from training.fit import History
from training.heads import build_head
from training.inputs import Inputs
from training.learner import Learner, finetune, train_head
from training.lr_find import LearningRates
from training.predict import Prediction

__all__ = [
    "Augment",
    "History",
    "Inputs",
    "Learner",
    "LearningRates",
    "Prediction",
    "build_head",
    "finetune",
    "train_head",
]
