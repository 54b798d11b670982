"""Probes as estimators of scikit-learn's: exact solvers, of arrays or stored features."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, column_or_1d

from featstore.images.splitting import fold_of_each
from featstore.store.features import Features
from training.estimators.given import Matrix, checked_to_fit, checked_to_predict, checked_weights
from training.inputs.held import HeldRows
from training.row_fits import Rows
from training.solvers.logistic import cross_validated, logistic_path
from training.solvers.neighbors import KNearest, Metric
from training.solvers.ridge import ridge_classifier_path
from training.solvers.rows import Rows as SolverRows
from training.solvers.targets import strengths_of
from training.splits import grouped_by_content

_RELATIVE = tuple(np.logspace(2, -6, 17).tolist())
_RIDGE_FOLDS = 5
"""By which ridge regression chooses its strength where rows must stay together."""


class _Probe(ClassifierMixin, BaseEstimator):  # type: ignore[misc]  # abstract; scikit-learn has no types
    """What classifiers by exact solvers share."""

    classes_: NDArray[Any]

    def _given(self, X: Matrix, y: Any) -> tuple[Rows, NDArray[Any]]:  # noqa: N803
        rows, y = checked_to_fit(self, X, y, exact=True)
        y = column_or_1d(y, warn=True)
        check_classification_targets(y)
        self.classes_ = np.unique(y)
        if len(self.classes_) < 2:
            raise ValueError(
                f"y holds one class, {self.classes_[0]}, so there is nothing to tell apart. Expected two classes or "
                "more. Give rows of others too."
            )
        return rows, y


class LinearProbe(_Probe):
    """Multinomial logistic regression, solved exactly: what scikit-learn's ``LogisticRegression(C=C)`` comes to.

    Of several strengths the one is taken that tells most rows apart in folds of the rows it is fitted to; all of them
    are solved as one problem, many times as fast as a `GridSearchCV`.

    >>> from sklearn.datasets import load_digits
    >>> X, y = load_digits(return_X_y=True)
    >>> probe = LinearProbe(C=[1e-4, 1e-2, 1]).fit(X[:1200], y[:1200])
    >>> probe.C_, round(probe.score(X[1200:], y[1200:]), 2)
    (0.01, 0.92)

    Args:
        C: inverse strength of the penalty, or several to choose from.
        folds: by which it is chosen, dealt as scikit-learn's ``StratifiedKFold`` deals them. Images of equal content or
            of one group, and equal rows of an array, lie in the same fold.
        standardised: penalises coefficients of columns of mean 0 and deviation 1; for one C.
        class_weight: None, ``balanced``, or a weight a class, by its name in `y`.
        tol: how far above its least, as a share, the objective may end.
        max_iterations: most Newton steps.
        device: auto, cpu, cuda or cuda:1.

    Attributes:
        classes_: the classes, sorted.
        C_: the strength that was given or chosen.
        scores_: ``(S, folds)``, the accuracy of each strength on the rows that each fold held out; None of one.
        coef_: ``(K, F)``; of two classes ``(1, F)``.
        intercept_: ``(K,)``; of two classes ``(1,)``.
        n_iter_: Newton steps.
        n_features_in_: how wide rows are.
        spec_: of features that it was fitted to, what decided their values; else None.
    """

    def __init__(
        self,
        C: float | Sequence[float] = 1.0,  # noqa: N803
        *,
        folds: int = 5,
        standardised: bool = False,
        class_weight: dict[Any, float] | Literal["balanced"] | None = None,
        tol: float = 1e-5,
        max_iterations: int = 100,
        device: str = "auto",
    ) -> None:
        """Takes the settings as they are: they are checked when it is fitted. The class describes them."""
        self.C, self.folds, self.standardised, self.class_weight = C, folds, standardised, class_weight
        self.tol, self.max_iterations, self.device = tol, max_iterations, device

    def fit(self, X: Matrix, y: Any = None, sample_weight: Any = None) -> Self:  # noqa: N803
        """Solves it.

        Args:
            X: rows ``(N, F)``, or `Features`.
            y: a class a row. Of `Features` None stands for their own targets.
            sample_weight: ``(N,)``, what each row counts; None: 1.

        Raises:
            ValueError: for a single class, and for rows that aren't finite.
        """
        rows, y = self._given(X, y)
        weights = None if sample_weight is None else checked_weights(sample_weight, len(rows))
        options: dict[str, Any] = {"weights": weights, "class_weight": self.class_weight, "device": self.device}
        source = _source(rows)
        strengths = strengths_of("C", self.C).tolist()
        self.scores_: NDArray[np.float64] | None = None
        self.C_ = strengths[0]
        if len(strengths) > 1:
            if self.standardised:
                raise ValueError(
                    "standardised is for one C, as folds would share its means. Put a StandardScaler before this in a "
                    "pipeline, or give one C."
                )
            self.scores_ = cross_validated(source, y, C=strengths, folds=_folds(rows, y, self.folds), **options)
            self.C_ = _chosen(strengths, self.scores_)
        path = logistic_path(
            source,
            y,
            C=self.C_,
            standardised=self.standardised,
            tol=self.tol,
            max_iterations=self.max_iterations,
            **options,
        )
        self.coef_, self.intercept_ = path.coefficients[0], path.intercepts[0]
        if len(self.classes_) == 2:
            self.coef_, self.intercept_ = np.diff(self.coef_, axis=0), np.diff(self.intercept_)
        self.n_iter_ = int(path.num_iterations[0])
        return self

    def predict(self, X: Matrix) -> NDArray[Any]:  # noqa: N803
        """The most probable class of each row; of equally probable ones the first."""
        values = self.predict_proba(X)
        chosen: NDArray[Any] = self.classes_[values.argmax(axis=1)]
        return chosen

    def decision_function(self, X: Matrix) -> NDArray[np.float64]:  # noqa: N803
        """Logits ``(N, K)``; of two classes ``(N,)``, by how much the second one's is larger.

        They are computed in float64, so that those of a row don't depend on which others are asked for.
        """
        return _decisions(self, X)

    def predict_proba(self, X: Matrix) -> NDArray[np.float64]:  # noqa: N803
        """Probabilities ``(N, K)``, columns in the order of `classes_`."""
        logits = torch.from_numpy(self.decision_function(X))
        if logits.ndim == 1:
            logits = torch.stack([torch.zeros_like(logits), logits], dim=1)
        values: NDArray[np.float64] = torch.softmax(logits, dim=1).numpy()
        return values


class RidgeProbe(_Probe):
    """Ridge regression to targets of -1 and 1: what scikit-learn's ``RidgeClassifier(alpha=strength)`` comes to.

    All strengths come from one decomposition, and the one is taken with the least error in predicting each row by the
    others, which needs no folds: as `RidgeClassifierCV` chooses. Where rows must stay together (equal rows of an array,
    images of equal content or of one group) each is predicted by those of other folds: of a copy any fit tells.

    Args:
        strengths: of the penalty, one or several; None: seventeen, from a millionth of the mean square of the rows'
            singular values to a hundred times that, which fit any scale.
        device: auto, cpu, cuda or cuda:1.

    Attributes:
        classes_: the classes, sorted.
        strength_: that was given or chosen.
        errors_: ``(S,)``, the mean of the squared errors of each row as the others, or other folds, predict it.
        coef_: ``(K, F)``; of two classes ``(1, F)``.
        intercept_: ``(K,)``; of two classes ``(1,)``.
        n_features_in_: how wide rows are.
        spec_: of features that it was fitted to, what decided their values; else None.
    """

    def __init__(self, strengths: float | Sequence[float] | None = None, *, device: str = "auto") -> None:
        """Takes the settings as they are: they are checked when it is fitted. The class describes them."""
        self.strengths, self.device = strengths, device

    def fit(self, X: Matrix, y: Any = None, sample_weight: Any = None) -> Self:  # noqa: N803
        """Solves it.

        Args:
            X: rows ``(N, F)``, or `Features`.
            y: a class a row. Of `Features` None stands for their own targets.
            sample_weight: ``(N,)``, what each row counts; None: 1.

        Raises:
            ValueError: for a single class, and for rows that aren't finite.
        """
        rows, y = self._given(X, y)
        weights = None if sample_weight is None else checked_weights(sample_weight, len(rows))
        source = _source(rows)
        is_relative = self.strengths is None
        strengths = strengths_of("strengths", _RELATIVE if is_relative else self.strengths).tolist()
        folds = None
        if len(strengths) > 1:
            dealt = _folds(rows, y, _RIDGE_FOLDS, most=True)
            folds = None if isinstance(dealt, int) else dealt
        path = ridge_classifier_path(
            source, y, strengths, weights=weights, folds=folds, relative=is_relative, device=self.device
        )
        assert path.errors is not None
        self.errors_, self.strength_ = path.errors.mean(axis=1), path.best
        which = path.strengths.tolist().index(self.strength_)
        self.coef_, self.intercept_ = path.coefficients[which].T, path.intercepts[which]
        return self

    def predict(self, X: Matrix) -> NDArray[Any]:  # noqa: N803
        """The class of each row whose target is predicted to be largest."""
        values = self.decision_function(X)
        places = (values > 0).astype(np.int64) if values.ndim == 1 else values.argmax(axis=1)
        chosen: NDArray[Any] = self.classes_[places]
        return chosen

    def decision_function(self, X: Matrix) -> NDArray[np.float64]:  # noqa: N803
        """What is predicted of targets of -1 and 1 ``(N, K)``; of two classes ``(N,)``, of the second one's."""
        return _decisions(self, X)


class KNNProbe(_Probe):
    """The classes of the nearest rows, found exactly, by blocked products: k-nearest neighbours.

    Args:
        n_neighbors: how many vote; all rows, where there are fewer.
        metric: cosine or euclidean.
        weights: of votes: ``uniform``, ``distance`` (its inverse), or a temperature, as 0.07 in the evaluation of DINO.
        device: auto, cpu, cuda or cuda:1.

    Attributes:
        classes_: the classes, sorted.
        n_neighbors_: how many vote.
        neighbors_: the rows to search.
        n_features_in_: how wide rows are.
        spec_: of features that it was fitted to, what decided their values; else None.
    """

    def __init__(
        self,
        n_neighbors: int = 20,
        *,
        metric: Metric = "cosine",
        weights: Literal["uniform", "distance"] | float = "uniform",
        device: str = "auto",
    ) -> None:
        """Takes the settings as they are: they are checked when it is fitted. The class describes them."""
        self.n_neighbors, self.metric, self.weights, self.device = n_neighbors, metric, weights, device

    def fit(self, X: Matrix, y: Any = None) -> Self:  # noqa: N803
        """Keeps the rows to search.

        Args:
            X: rows ``(N, F)``, or `Features`.
            y: a class a row. Of `Features` None stands for their own targets.

        Raises:
            ValueError: for a single class, and rows that aren't finite.
        """
        rows, y = self._given(X, y)
        if not isinstance(self.n_neighbors, int | np.integer) or self.n_neighbors < 1:
            raise ValueError(f"n_neighbors is {self.n_neighbors!r}; expected a whole number of at least 1.")
        self.n_neighbors_ = int(min(self.n_neighbors, len(rows)))
        source = _source(rows)
        self.neighbors_ = KNearest(
            source, y, k=self.n_neighbors_, metric=self.metric, weights=self.weights, device=self.device
        )
        return self

    def predict(self, X: Matrix) -> NDArray[Any]:  # noqa: N803
        """The most probable class of each row; of equally probable ones the first."""
        values = self.predict_proba(X)
        chosen: NDArray[Any] = self.classes_[values.argmax(axis=1)]
        return chosen

    def predict_proba(self, X: Matrix) -> NDArray[np.float64]:  # noqa: N803
        """The share of each class in the votes ``(N, K)``, columns in the order of `classes_`."""
        check_is_fitted(self)
        return self.neighbors_.predict_proba(_source(checked_to_predict(self, X, exact=True)))


def _decisions(probe: Any, X: Matrix) -> NDArray[np.float64]:  # noqa: N803
    """What coefficients make of rows, block by block."""
    check_is_fitted(probe)
    blocks = SolverRows.of(_source(checked_to_predict(probe, X, exact=True))).blocks(exact=True)
    values = np.concatenate([block.double().numpy() @ probe.coef_.T + probe.intercept_ for _, block in blocks])
    return values[:, 0] if len(probe.classes_) == 2 else values


def _source(rows: Rows) -> NDArray[Any] | Features:
    """What a solver reads of them."""
    return rows.values if isinstance(rows, HeldRows) else rows


def _folds(rows: Rows, targets: NDArray[Any], folds: int, *, most: bool = False) -> int | NDArray[np.int64]:
    """How many folds, or where rows must stay together the fold of each ``(N,)``; with `most` fewer of few groups.

    Of a copy that is trained on, any strength tells the label of the other one.
    """
    if isinstance(rows, HeldRows):
        seen: dict[bytes, int] = {}
        digests = (hashlib.blake2b(row.tobytes(), digest_size=16).digest() for row in rows.values)
        groups = [str(seen.setdefault(digest, place)) for place, digest in enumerate(digests)]
        if len(seen) == len(groups):
            return folds
    else:
        images = rows.images.with_splits(
            ["train"] * len(rows)
        )  # whatever they are otherwise, all of them are fitted to
        together = grouped_by_content(images, images.digests(), None)
        if together is None:
            return folds
        groups = [*together]
    if most and len({*groups}) < 2:
        return folds
    folds = min(folds, len({*groups})) if most else folds
    _, strata = np.unique(targets, return_inverse=True)
    return fold_of_each(groups, strata.astype(np.int64), 0, k=folds, are_groups=True)


def _chosen(strengths: Sequence[float], scores: NDArray[np.float64]) -> float:
    """The one that is right most often; of equal ones the smallest, which penalises most."""
    means = scores.mean(axis=1)
    return min(each for each, mean in zip(strengths, means, strict=True) if mean == means.max())
