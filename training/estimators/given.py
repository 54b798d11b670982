"""Given: the X and y that scikit-learn's estimators take, checked as scikit-learn checks them, and stored features."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, TypeAlias

import numpy as np
import sklearn
from numpy.typing import NDArray

from featstore.errors import FactsDifferError
from featstore.store.features import Features
from featstore.store.spec import FeatureSpec
from training.inputs.held import HeldRows
from training.row_fits import Rows

Matrix: TypeAlias = Any
"""What `X` may be: an array, a data frame or a list of rows ``(N, F)``; or stored `Features`."""

_HAS_TAGS = tuple(int(part) for part in sklearn.__version__.split(".")[:2]) >= (1, 6)


def checked_to_fit(
    estimator: Any,
    X: Matrix,  # noqa: N803
    y: Any,
    *,
    allow_nd: bool = False,
    exact: bool = False,
    **checks: Any,
) -> tuple[Rows, Any]:
    """The rows that `estimator` is fitted to, and `y` as an array of as many.

    The estimator has `n_features_in_` then, `feature_names_in_` of a data frame, and of `Features` their spec as
    `spec_`, which tells what it may predict.

    Args:
        estimator: that is fitted.
        X: of at least two rows.
        y: a target a row; of `Features` None stands for their own.
        allow_nd: whether a row may be more than a vector.
        exact: whether an array's numbers stay as they are where float32 can't hold them.
        checks: further ones of scikit-learn's `validate_data`.

    Raises:
        ValueError: for what is no such matrix, and for images without a label.
        TypeError: for a sparse one.
    """
    if isinstance(X, Features):
        _check_vectors(X, allow_nd)
        targets = checked_targets_of(X, y)
        estimator.n_features_in_, estimator.spec_ = X.shape[1], X.spec
        if hasattr(estimator, "feature_names_in_"):
            del estimator.feature_names_in_
        if len(X) < 2:
            raise ValueError(f"These features have {len(X)} row(s) (1 sample at most); expected at least 2.")
        return X, _checked_alone(estimator, X, targets, checks)
    estimator.spec_ = None
    values, targets = _validated(
        estimator, X=X, y=y, dtype=_types(exact), allow_nd=allow_nd, ensure_min_samples=2, **checks
    )
    return HeldRows(values), targets


def checked_to_predict(estimator: Any, X: Matrix, *, allow_nd: bool = False, exact: bool = False) -> Rows:  # noqa: N803
    """The rows to predict, which are as wide as those that `estimator` was fitted to, and of the same kind.

    Features must have all the facts of those that it was fitted to; those of an augmented view may be followed by the
    evaluation view of the same images' geometry, as a fit is by its scores. Arrays have no facts, and only a width.

    Raises:
        ValueError: for what is no such matrix.
        FactsDifferError: for features of another trunk, pool, view, precision or storage type.
    """
    if not isinstance(X, Features):
        return HeldRows(_validated(estimator, X=X, reset=False, dtype=_types(exact), allow_nd=allow_nd))
    if estimator.spec_ is not None:
        _check_facts(estimator.spec_, X, type(estimator).__name__)
    if X.shape[1] != estimator.n_features_in_:
        raise ValueError(
            f"X has {X.shape[1]} features, but {type(estimator).__name__} is expecting {estimator.n_features_in_} "
            "features as input."
        )
    return X


def _check_facts(fitted: FeatureSpec, features: Features, name: str) -> None:
    """Raises FactsDifferError, with what differs and what to run, for features that a fit to `fitted` can't score."""
    given = features.spec
    if given.key in (fitted.key, replace(fitted, view=fitted.rendered.evaluation.facts()).key):
        return
    told = "; ".join(f"{fact} ({before}, here {now})" for fact, before, now in fitted.differences(given))
    raise FactsDifferError(
        f"These features (set {given.key[:8]}) aren't of the kind that {name} was fitted to (set {fitted.key[:8]}); "
        f"they differ in: {told}. Read those of that set: store.features(images, {fitted.key[:8]!r}), once extract has "
        f"computed it for these images. Or fit a new {name} to set {given.key[:8]}."
    )


def checked_targets_of(features: Features, y: Any) -> Any:
    """`y`, or the features' own targets where it is None.

    Raises:
        ValueError: if there are none, or some images have none.
    """
    own = features.targets
    if y is None and own is None:
        raise ValueError("requires y to be passed, but the target y is None: these features' images have no labels.")
    targets = own if y is None else np.asarray(y)
    assert targets is not None
    if are_own(features, y) and features.images.task == "single" and (targets < 0).any():
        count = int((targets < 0).sum())
        raise ValueError(
            f"{count:,} of {len(features):,} images have no label (-1; first: "
            f"{features.ids[int((targets < 0).argmax())]}), which is no class. Leave them out: "
            "images.select(images.targets >= 0)."
        )
    return targets


def are_own(features: Features, y: Any) -> bool:
    """Whether `y` are the targets of the features' own images, so that their class table tells what they mean."""
    own = features.targets
    return own is not None and (y is None or np.array_equal(np.asarray(y), own))


def checked_weights(sample_weight: Any, num_rows: int) -> NDArray[np.float64]:
    """What each row counts ``(N,)``, as scikit-learn checks it; 1 where nobody says.

    Raises:
        ValueError: for another number of them, for weights below 0, and for none above 0.
    """
    from sklearn.utils.validation import _check_sample_weight

    weights: NDArray[np.float64] = _check_sample_weight(sample_weight, np.zeros((num_rows, 1)), dtype=np.float64)
    if not weights.any():
        raise ValueError("Sample weights must contain at least one non-zero number. Leave sample_weight out.")
    if (weights < 0).any():
        raise ValueError(f"A sample weight is {weights.min():g}; expected numbers of at least 0. Correct it.")
    return weights


def rows_that_count(rows: Rows, weights: NDArray[np.float64]) -> Rows:
    """Those with a weight above 0."""
    if (weights > 0).all():
        return rows
    return HeldRows(rows[np.flatnonzero(weights > 0)].float().numpy())


def array_of(rows: Rows) -> NDArray[np.float32]:
    """All rows, float32."""
    return rows.values if isinstance(rows, HeldRows) else np.asarray(rows, dtype=np.float32)


def _check_vectors(features: Features, allow_nd: bool) -> None:
    if len(features.shape) != 2 and not allow_nd:
        raise ValueError(
            f"These features are of shape {features.shape}; expected vectors, (N, F). Extract them with a reduction "
            "(avg, max, concat, token), or give a head of your own for maps."
        )


def _checked_alone(estimator: Any, features: Features, targets: Any, checks: dict[str, Any]) -> Any:
    """`targets` as `_validated` checks them beside an array: a column of zeros stands for the rows."""
    from sklearn.utils.validation import check_X_y

    _, checked = check_X_y(np.zeros((len(features), 1), np.float32), targets, estimator=estimator, **checks)
    return checked


def _types(exact: bool) -> Any:
    """What rows may be in; others become the first of them."""
    return [np.float64, np.float32] if exact else np.float32


def _validated(estimator: Any, **given: Any) -> Any:
    """What scikit-learn's own check of what is given comes to; a method before its version 1.6."""
    if _HAS_TAGS:
        from sklearn.utils.validation import validate_data

        return validate_data(estimator, **given)
    return estimator._validate_data(**given)
