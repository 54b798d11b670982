"""Heads as estimators of scikit-learn's: fitted to arrays or stored features, by the loop that a Learner has."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.utils.class_weight import compute_class_weight
from sklearn.utils.multiclass import check_classification_targets, type_of_target
from sklearn.utils.validation import check_is_fitted, column_or_1d
from torch import nn

from featstore.errors import FactsDifferError
from featstore.images.image_set import ImageSet
from featstore.images.names import Task
from featstore.models.staged import StagedModel
from featstore.store.features import Features
from featstore.store.store import FeatureStore
from featstore.words import some
from training.estimators.given import (
    Matrix,
    are_own,
    checked_to_fit,
    checked_to_predict,
    checked_weights,
    rows_that_count,
)
from training.heads import HEADS, build_head
from training.learner import Learner
from training.loop.averages import Averaging
from training.loop.history import History
from training.loop.optim import LearningRate, MakeOptimizer, WeightDecay
from training.loop.plan import FitOptions, Plan, check_options
from training.loop.settings import checked
from training.mixing import BatchChange
from training.predict import probabilities
from training.row_fits import Rows, fit_to_rows, logits_of_rows
from training.scores.metrics import THRESHOLD
from training.standardised import ValueHead


class _Head(BaseEstimator):  # type: ignore[misc]  # abstract; scikit-learn has no types
    """What a classifier and a regressor share."""

    def __init__(
        self,
        head: str | nn.Module = "concat",
        *,
        hidden: Sequence[int] | None = None,
        dropout: float | Sequence[float] | None = None,
        epochs: int = 10,
        lr: LearningRate | None = None,
        batch_size: int = 64,
        optimizer: str | MakeOptimizer = "adamw",
        schedule: str = "one_cycle",
        weight_decay: WeightDecay = 0.01,
        mix: BatchChange | Sequence[BatchChange] | None = None,
        average: Averaging | None = None,
        options: FitOptions | None = None,
        device: torch.device | str = "auto",
        random_state: int | np.random.RandomState | None = 0,
        verbose: bool = False,
    ) -> None:
        """Takes the settings as they are: they are checked when it is fitted. The class describes them."""
        self.head, self.hidden, self.dropout = head, hidden, dropout
        self.epochs, self.lr, self.batch_size = epochs, lr, batch_size
        self.optimizer, self.schedule, self.weight_decay = optimizer, schedule, weight_decay
        self.mix, self.average, self.options = mix, average, options
        self.device, self.random_state, self.verbose = device, random_state, verbose

    def _fit_to(
        self,
        rows: Rows,
        targets: NDArray[Any],
        weights: NDArray[np.float64] | None,
        classes: Sequence[str],
        task: Task,
        **options: Any,
    ) -> Self:
        """Fits it to the rows that count, which `targets` are of already."""
        source = rows if weights is None else rows_that_count(rows, weights)
        if not isinstance(self.options, Mapping | None):
            raise TypeError(f'options is {self.options!r}; expected options of a fit by name, as {{"clip": 1.0}}.')
        further = dict(self.options or {})
        check_options(further)
        named = {"schedule": self.schedule, "weight_decay": self.weight_decay, "mix": self.mix, "average": self.average}
        twice = [name for name in {**named, **options, "lr": None} if name in further]
        if "checkpoint" in further or "resume" in further:
            raise ValueError("A checkpoint keeps a fit of images, and an estimator has rows alone. Leave it out.")
        if twice:
            raise ValueError(f"options has {', '.join(twice)}, a setting of its own. Give it beside options.")
        plan = Plan(cycles=(self.epochs,), lr=self.lr, **named, **options, **further)  # type: ignore[arg-type]
        seed = seed_of(self.random_state)
        head = self._built(rows.shape[1:], len(classes), seed)
        fitted = fit_to_rows(
            ValueHead(head, len(classes)) if task == "regression" and isinstance(self.head, str) else head,
            source,
            targets,
            classes=classes,
            task=task,
            plan=plan,
            optimizer=self.optimizer,
            batch_size=checked("batch_size", self.batch_size),
            device=self.device,
            seed=seed,
            weights=None if weights is None else weights[weights > 0],
            quiet=not self.verbose,
        )
        self._contents = {bytes(row) for row in rows.images.digests().values} if isinstance(rows, Features) else None
        self.head_: nn.Module = fitted.head
        self.history_: History = fitted.history
        return self

    def _built(self, shape: tuple[int, ...], num_classes: int, seed: int) -> nn.Module:
        own = {"hidden": self.hidden, "dropout": self.dropout}
        given = {name: value for name, value in own.items() if value is not None}
        if not given:
            return build_head(self.head, shape, num_classes, seed)
        if self.head not in ("concat", "mlp"):
            raise ValueError(
                f"The head {self.head!r} has no {' and no '.join(given)}. Leave that out, or take the head concat or "
                "mlp."
            )
        if len(shape) != 1:
            return build_head(self.head, shape, num_classes, seed)  # which says why it can't
        return HEADS[self.head](shape[0], num_classes, seed=seed, **given)

    def to_learner(
        self, model: StagedModel, images: ImageSet, store: FeatureStore | None = None, **options: Any
    ) -> Learner:
        """A learner with this head on the backbone that made the features: to score, to save, and to fine-tune.

        Args:
            model: whose features it was fitted to.
            images: with the classes that it was fitted to, in order. Those that it was fitted to aren't held out.
            store: where features are looked up.
            options: further arguments of `Learner`.

        Raises:
            ValueError: if it was fitted to an array, which may be of any backbone; to other classes; or to images that
                are held out here.
            FactsDifferError: if another trunk made the features.
        """
        check_is_fitted(self)
        if self.spec_ is None:
            raise ValueError(
                f"This {type(self).__name__} was fitted to an array, and nothing says which backbone made it; expected "
                "stored features. Fit it to Features: store.features(images, key)."
            )
        self._check_classes(images)
        self._check_held_out(images, store)
        spec = self.spec_
        cuts = [cut for cut, digest in model.digests().items() if digest == spec.trunk and cut in model.cut_points]
        if not cuts or model.pool(cuts[0], spec.reduction).facts() != spec.pool:
            raise FactsDifferError(
                f"No cut of {model.name} gives the features that this head was fitted to, set {spec.key[:8]}: their "
                f"trunk is {spec.trunk[:8]}. Give the model that was extracted with, with the same weights."
            )
        is_plain = isinstance(self.head, str) and self.hidden is None and self.dropout is None
        settings: dict[str, Any] = {"batch_size": self.batch_size, "optimizer": self.optimizer, "device": self.device}
        learn = Learner(
            model,
            images,
            store,
            **{
                "cut": cuts[0],
                "reduce": spec.reduction,
                "view": spec.rendered.evaluation,
                "head": self.head if is_plain else self.head_,
                **settings,
                **options,
            },
        )
        assert learn.model.head is not None
        learn.model.head.load_state_dict(self.head_.state_dict())
        return learn

    def _check_held_out(self, images: ImageSet, store: FeatureStore | None) -> None:
        """Raises ValueError if the head was fitted to images that are held out."""
        assert self._contents is not None
        held_out = images.select(np.isin(images.splits, ["valid", "test"]))
        digests = held_out.digests(None if store is None else store.known_digests(images)).values
        seen = [name for name, row in zip(held_out.ids, digests, strict=True) if bytes(row) in self._contents]
        if seen:
            raise ValueError(
                f"{len(seen):,} of the {len(held_out):,} images held out here were trained on ({some(seen)}), and "
                "their scores would be too good. Fit the head to the features of images.train, or give other images."
            )

    def _check_classes(self, images: ImageSet) -> None:
        """Raises ValueError if the images tell other things than the head."""
        raise NotImplementedError

    @property
    def _takes_maps(self) -> bool:
        return isinstance(self.head, nn.Module) or str(self.head).partition(":")[0] == "attention"

    def _logits(self, X: Matrix) -> torch.Tensor:  # noqa: N803
        check_is_fitted(self)
        rows = checked_to_predict(self, X, allow_nd=self._takes_maps)
        return logits_of_rows(self.head_, rows, device=self.device)


class HeadClassifier(ClassifierMixin, _Head):  # type: ignore[misc]
    """A head that tells classes apart, with scikit-learn's manners: of arrays ``(N, F)``, or of stored `Features`.

    It is fitted by the loop that `Learner.fit` runs, and comes to the same weights from the same rows. Probabilities
    are computed in float64.

    >>> from sklearn.datasets import load_digits
    >>> X, y = load_digits(return_X_y=True)
    >>> round(HeadClassifier("linear", lr=1e-2).fit(X[:1200], y[:1200]).score(X[1200:], y[1200:]), 1)
    0.9

    Args:
        head: concat, linear, mlp, or a module of your own from rows to logits.
        hidden: widths of the hidden layers of concat and mlp; default: one of 512.
        dropout: of concat and mlp, as `concat_head` and `mlp_head` take it; default: theirs.
        epochs: as in `Learner.fit`.
        lr: likewise; None: what the finder suggests.
        batch_size: as in `Learner`.
        optimizer: likewise.
        schedule: as in `FitOptions`, as are the next ones.
        weight_decay: likewise.
        label_smoothing: likewise.
        class_weight: None, ``balanced``, or a weight a class, by its name in `y`, as scikit-learn's.
        mix: changes of each batch.
        average: a mean of the weights.
        options: further ones of the fit, by name.
        device: auto, cpu, cuda or cuda:1.
        random_state: of the weights, the order and dropout: a number, the seed of a `Learner`; a generator of numpy's
            that one is drawn from; or None, another each time.
        verbose: says how it goes, as a `Learner` does.

    Attributes:
        classes_: the classes, sorted; of several labels a row their numbers.
        head_: the module that was trained.
        history_: the epochs of the fit.
        n_features_in_: how wide rows are.
        spec_: of features that it was fitted to, what decided their values; else None.
    """

    def __init__(
        self,
        head: str | nn.Module = "concat",
        *,
        hidden: Sequence[int] | None = None,
        dropout: float | Sequence[float] | None = None,
        epochs: int = 10,
        lr: LearningRate | None = None,
        batch_size: int = 64,
        optimizer: str | MakeOptimizer = "adamw",
        schedule: str = "one_cycle",
        weight_decay: WeightDecay = 0.01,
        label_smoothing: float = 0.0,
        class_weight: dict[Any, float] | str | None = None,
        mix: BatchChange | Sequence[BatchChange] | None = None,
        average: Averaging | None = None,
        options: FitOptions | None = None,
        device: torch.device | str = "auto",
        random_state: int | np.random.RandomState | None = 0,
        verbose: bool = False,
    ) -> None:
        """Takes the settings as they are: they are checked when it is fitted. The class describes them."""
        super().__init__(
            head,
            hidden=hidden,
            dropout=dropout,
            epochs=epochs,
            lr=lr,
            batch_size=batch_size,
            optimizer=optimizer,
            schedule=schedule,
            weight_decay=weight_decay,
            mix=mix,
            average=average,
            options=options,
            device=device,
            random_state=random_state,
            verbose=verbose,
        )
        self.label_smoothing, self.class_weight = label_smoothing, class_weight

    def fit(self, X: Matrix, y: Any = None, sample_weight: Any = None) -> Self:  # noqa: N803
        """Trains a new head.

        Args:
            X: rows ``(N, F)``, or `Features`.
            y: a class a row, numbers or words; or ``(N, K)`` of 0 and 1 for any number of labels a row. Of `Features`
                None stands for their own targets.
            sample_weight: ``(N,)``, what each row counts. Of whole numbers a row is there so often, none of 0;
                of others each epoch has a row as often as its share of all weights says, on average.

        Raises:
            ValueError: for a single class, and for rows or targets that can't be trained on.
        """
        own = y
        rows, y = checked_to_fit(self, X, y, allow_nd=self._takes_maps, multi_output=True)
        weights = None if sample_weight is None else checked_weights(sample_weight, len(rows))
        if weights is not None:
            y = y[weights > 0]
        has_labels = isinstance(X, Features) and X.images.task == "multi" and are_own(X, own)  # a single one, perhaps
        self._is_multi = has_labels or type_of_target(y) == "multilabel-indicator"
        targets: NDArray[Any]
        task: Task = "multi" if self._is_multi else "single"
        if self._is_multi:
            self.classes_, targets = np.arange(y.shape[1]), np.asarray(y, np.float32)
        else:
            y = column_or_1d(y, warn=True)
            check_classification_targets(y)
            self.classes_, targets = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2 and not self._is_multi:
            raise ValueError(
                f"y holds one class, {self.classes_[0]}, so there is nothing to tell apart. Expected two classes or "
                "more. Give rows of others too."
            )
        self._names = self._named(X, own)
        names = [str(place) for place in range(len(self.classes_))]
        options = {"label_smoothing": self.label_smoothing, "class_weights": self._class_weights()}
        return self._fit_to(rows, targets, weights, names, task, **options)

    def predict(self, X: Matrix) -> NDArray[Any]:  # noqa: N803
        """The most probable class of each row; of several labels ``(N, K)`` of 0 and 1, those from 0.5 on."""
        values = self.predict_proba(X)
        if self._is_multi:
            return (values >= THRESHOLD).astype(np.int64)
        chosen: NDArray[Any] = self.classes_[values.argmax(axis=1)]
        return chosen

    def predict_proba(self, X: Matrix) -> NDArray[np.float64]:  # noqa: N803
        """Probabilities ``(N, K)``, columns in the order of `classes_`."""
        return probabilities(self._logits(X), "multi" if self._is_multi else "single")

    def decision_function(self, X: Matrix) -> NDArray[np.float64]:  # noqa: N803
        """Logits ``(N, K)``; of two classes ``(N,)``, by how much the second one's is larger."""
        logits: NDArray[np.float64] = self._logits(X).numpy()
        return logits if self._is_multi or len(self.classes_) > 2 else logits[:, 1] - logits[:, 0]

    def _check_classes(self, images: ImageSet) -> None:
        mine, theirs = self._names, [*images.classes]
        if mine is None:
            numbers = some([*map(str, self.classes_.tolist())])
            raise ValueError(
                f"This head tells the numbers {numbers} apart, which aren't the targets of the features that it was "
                f"fitted to, so nothing says which of {some(theirs)} each is. Fit it to the features' own targets, "
                "which is what y=None means, or to the names of the classes."
            )
        if images.task != ("multi" if self._is_multi else "single") or mine != theirs:
            raise ValueError(
                f"This head tells {some(mine)} apart, and these images have {some(theirs)} "
                f"({images.task}); expected the same classes in the same order. Give the images that it was fitted to."
            )

    def _named(self, X: Matrix, y: Any) -> list[str] | None:  # noqa: N803
        """What the classes are called, in order; None of numbers that are no places in a class table."""
        if isinstance(X, Features) and are_own(X, y):
            return [X.images.classes[int(place)] for place in self.classes_.tolist()]
        if self._is_multi or any(not isinstance(each, str) for each in self.classes_.tolist()):
            return None
        return [*self.classes_.tolist()]

    def _class_weights(self) -> Any:
        if self.class_weight is None or self.class_weight == "balanced":
            return self.class_weight
        return tuple(compute_class_weight(self.class_weight, classes=self.classes_, y=self.classes_).tolist())

    def _more_tags(self) -> dict[str, Any]:  # before scikit-learn 1.6
        return {"multilabel": True}

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_label = True
        return tags


class HeadRegressor(RegressorMixin, _Head):  # type: ignore[misc]
    """A head that tells numbers, with scikit-learn's manners; its settings are those of `HeadClassifier`.

    Attributes:
        head_: the module that was trained.
        history_: the epochs of the fit.
        n_features_in_: how wide rows are.
        spec_: of features that it was fitted to, what decided their values; else None.
    """

    def fit(self, X: Matrix, y: Any = None, sample_weight: Any = None) -> Self:  # noqa: N803
        """Trains a new head.

        Args:
            X: rows ``(N, F)``, or `Features`.
            y: numbers ``(N,)`` or ``(N, K)``. Of `Features` None stands for their own targets.
            sample_weight: as `HeadClassifier.fit` takes it.

        Raises:
            ValueError: for rows or targets that can't be trained on.
        """
        is_own = isinstance(X, Features) and are_own(X, y)
        self._names = [*X.images.classes] if is_own else None
        rows, y = checked_to_fit(self, X, y, allow_nd=self._takes_maps, multi_output=True, y_numeric=True)
        if y.ndim == 2 and y.shape[1] == 1 and not hasattr(X, "targets"):
            y = column_or_1d(y, warn=True)
        self._is_flat = y.ndim == 1
        targets = np.asarray(y, np.float32).reshape(len(y), -1)
        self._num_values = targets.shape[1]
        names = [str(place) for place in range(self._num_values)]
        weights = None if sample_weight is None else checked_weights(sample_weight, len(rows))
        targets = targets if weights is None else targets[weights > 0]
        return self._fit_to(rows, targets, weights, names, "regression")

    def _check_classes(self, images: ImageSet) -> None:
        values, names = self._num_values, self._names
        if images.task != "regression" or len(images.classes) != values:
            raise ValueError(
                f"This head tells {values} numbers, and these images have {len(images.classes)} ({images.task}); "
                "expected as many. Give the images that it was fitted to."
            )
        if names is not None and names != [*images.classes]:
            raise ValueError(
                f"This head tells {some(names)}, and these images have {some([*images.classes])}; expected the same "
                "numbers in the same order. Give the images that it was fitted to."
            )

    def predict(self, X: Matrix) -> NDArray[np.float64]:  # noqa: N803
        """Numbers, ``(N,)`` or ``(N, K)`` as the targets were."""
        values: NDArray[np.float64] = self._logits(X).numpy()
        return values[:, 0] if self._is_flat else values

    def _more_tags(self) -> dict[str, Any]:  # before scikit-learn 1.6
        return {"multioutput": True}

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags


def seed_of(random_state: int | np.random.RandomState | np.random.Generator | None) -> int:
    """The seed that scikit-learn's `random_state` stands for; nothing reads numpy's global random state.

    Raises:
        ValueError: for anything but a number from 0 on, a generator or None.
    """
    if random_state is None:
        return secrets.randbelow(2**31)
    if isinstance(random_state, np.random.RandomState):
        return int(random_state.randint(2**31 - 1))
    if isinstance(random_state, np.random.Generator):
        return int(random_state.integers(2**31))
    if isinstance(random_state, bool) or not isinstance(random_state, int | np.integer) or random_state < 0:
        raise ValueError(f"random_state is {random_state!r}; expected a whole number from 0 on, a generator or None.")
    return int(random_state)
