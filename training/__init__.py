"""training: heads fitted to features, models fitted to images, by one loop."""

from featstore.images.views import Augment
from training.fit import History
from training.heads import build_head, concat_head, linear_head, mlp_head
from training.inputs.derive import Inputs
from training.learner import Learner
from training.lr_find import LearningRates
from training.predict import Prediction
from training.recipes import finetune, train_head

__all__ = [
    "Augment",
    "History",
    "Inputs",
    "Learner",
    "LearningRates",
    "Prediction",
    "build_head",
    "concat_head",
    "finetune",
    "linear_head",
    "mlp_head",
    "train_head",
]
