"""Estimators: scikit-learn's own checks hold, and what they come to is what a Learner comes to on the same rows.

Long, since heads, probes and the extractor are held to the same things, by the same arrays and features.
"""

from __future__ import annotations

import inspect
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sklearn
import torch
from numpy.typing import NDArray
from PIL import Image
from sklearn.base import clone, is_classifier, is_regressor
from sklearn.calibration import CalibratedClassifierCV
from sklearn.datasets import load_digits
from sklearn.ensemble import StackingClassifier
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LogisticRegression, RidgeClassifierCV
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils import estimator_checks
from support.tiny import VIEW, arrays, photos, pixels, staged

from featstore import Augment, Features, FeatureStore, ImageSet, StagedModel, extract
from featstore.errors import FactsDifferError
from featstore.images.fileless import images_by_id
from training import FeatureExtractor, HeadClassifier, HeadRegressor, KNNProbe, Learner, LinearProbe, RidgeProbe
from training.estimators.probes import _folds
from training.heads import HEADS, build_head
from training.inputs.batches import Batches
from training.inputs.held import HeldRows, HeldSource
from training.inputs.situation import Situation

Arrays = tuple[NDArray[Any], NDArray[Any]]


@pytest.fixture(scope="module")
def digits() -> Arrays:
    values, targets = load_digits(return_X_y=True)
    return values[:300].astype(np.float32), targets[:300]


@pytest.fixture(scope="module")
def model() -> StagedModel:
    return staged()


@pytest.fixture(scope="module")
def images() -> ImageSet:
    return arrays(24)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, model: StagedModel, images: ImageSet) -> FeatureStore:
    store = FeatureStore(tmp_path_factory.mktemp("estimators") / "features")
    extract(model, images, store, cuts=["layer1:avg", "layer2:avg", "layer2:none"])
    return store


@pytest.fixture
def features(store: FeatureStore, images: ImageSet) -> Features:
    """Vectors of float16."""
    return features_of(store, images, "layer2", "avg")


def features_of(store: FeatureStore, images: ImageSet, cut: str, reduction: str) -> Features:
    keys = [each.key for each in store.sets() if (each.facts["cut"], each.spec.reduction) == (cut, reduction)]
    return store.features(images, keys[0])


# ------------------------------------------------------------------------------------- scikit-learn's own checks

ORDER = {
    "check_sample_weight_equivalence_on_dense_data": "it shuffles the rows, whose order decides a fit by steps",
    "check_sample_weights_invariance": "the same, before scikit-learn 1.6",
}
CHECKED = [
    (HeadClassifier("mlp", epochs=10, lr=3e-2, hidden=(32,), dropout=0.0, batch_size=256), ORDER),
    (HeadRegressor(epochs=20, lr=1e-2, hidden=(32,)), ORDER),
    (
        LinearProbe(),
        {
            "check_sample_weight_equivalence_on_dense_data": "sums of float32 in another order; it asks for 1e-7",
            "check_sample_weights_invariance": "the same, before scikit-learn 1.6",
        },
    ),
    (KNNProbe(5), {}),
    (KNNProbe(3, metric="euclidean", weights="distance"), {}),
    (
        RidgeProbe(),
        {
            "check_sample_weight_equivalence_on_dense_data": "copies tell of a row that is left out: other strengths",
            "check_sample_weights_invariance": "the same, before scikit-learn 1.6",
        },
    ),
    pytest.param(
        HeadClassifier(),
        {
            **ORDER,
            "check_class_weight_classifiers": "ten steps on fifty rows are few for a weight ten million times another",
        },
        marks=pytest.mark.slow,
    ),
    pytest.param(HeadRegressor(), ORDER, marks=pytest.mark.slow),
]
"""Estimators, and the checks that they fail with the reason."""

SKIPPED = {"check_array_api_input": "no tag claims the array API, and scikit-learn checks it only where it is asked to"}


@pytest.mark.parametrize(("estimator", "failing"), CHECKED)
def test_the_checks_of_scikit_learn_hold(estimator: Any, failing: dict[str, str]) -> None:
    if "expected_failed_checks" in inspect.signature(estimator_checks.check_estimator).parameters:
        checks = estimator_checks.check_estimator(
            estimator, expected_failed_checks=failing, on_fail="raise", on_skip=None
        )
        assert {each["check_name"] for each in checks if each["status"] == "skipped"} <= {*SKIPPED}
        assert len(checks) > 40
        return
    for each, check in estimator_checks.check_estimator(estimator, generate_only=True):  # before 1.6
        if check.func.__name__ not in failing:
            check(each)


# --------------------------------------------------------------------------------------------- the same as a Learner


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("kind", ["features", "array"])
def test_a_head_comes_to_the_weights_that_a_learner_comes_to(
    head: str, kind: str, model: StagedModel, images: ImageSet, store: FeatureStore, features: Features
) -> None:
    reduce = "avg"
    if head == "attention":
        reduce = "none"
        key = extract(model, images, store, cuts=["layer2:none"]).keys[0]  # stored already
        features = store.features(images, key)
    learn = Learner(model, images, store, cut="layer2", reduce=reduce, head=head, batch_size=8, seed=3, quiet=True)
    history = learn.fit(3, lr=1e-2, label_smoothing=0.1)
    given = features if kind == "features" else np.asarray(features)
    assert features.targets is not None
    made = HeadClassifier(
        head, epochs=3, lr=1e-2, batch_size=8, random_state=3, label_smoothing=0.1, device=learn.device
    ).fit(given, features.targets)
    assert learn.read_from == "features"
    assert made.history_.losses == history.losses
    assert learn.model.head is not None
    for name, tensor in learn.model.head.state_dict().items():
        assert torch.equal(tensor.cpu(), made.head_.state_dict()[name]), name
    # The learner's logits are float32, these float64: equal within the rounding of float32.
    assert made.predict_proba(features) == pytest.approx(learn.predict_proba(images), abs=1e-5)


def test_a_rate_that_is_not_given_is_the_one_that_a_learner_finds(
    model: StagedModel, images: ImageSet, store: FeatureStore, features: Features
) -> None:
    learn = Learner(model, images, store, cut="layer2", reduce="avg", batch_size=8, quiet=True)
    learn.fit(1)
    made = HeadClassifier(epochs=1, batch_size=8, device=learn.device).fit(features)
    assert [*made.history_.lrs] == [*learn.history.lrs]


def test_a_regressor_comes_to_the_weights_that_a_learner_comes_to(
    model: StagedModel, images: ImageSet, store: FeatureStore, features: Features
) -> None:
    values = np.random.default_rng(0).normal(50, 10, (24, 2)).astype(np.float32)
    shots = np.stack([images.read(place) for place in range(24)])
    labelled = ImageSet.from_arrays(shots, values, task="regression")
    learn = Learner(model, labelled, store, cut="layer2", reduce="avg", head="mlp", batch_size=8, quiet=True)
    learn.fit(3, lr=1e-2)
    made = HeadRegressor("mlp", epochs=3, lr=1e-2, batch_size=8, device=learn.device).fit(features, values)
    assert learn.read_from == "features"
    assert made.history_.losses == learn.history.losses
    # Another precision of the same sums, of numbers around 50.
    assert made.predict(features) == pytest.approx(learn.predict_proba(labelled), abs=1e-3)
    assert made.predict(features).shape == (24, 2)


def test_several_labels_a_row_are_learned_as_a_learner_learns_them(
    model: StagedModel, images: ImageSet, store: FeatureStore, features: Features
) -> None:
    labels = np.random.default_rng(0).integers(0, 2, (24, 3))
    shots = np.stack([images.read(place) for place in range(24)])
    labelled = ImageSet.from_arrays(shots, labels, task="multi", classes=["a", "b", "c"])
    learn = Learner(model, labelled, store, cut="layer2", reduce="avg", head="linear", batch_size=8, quiet=True)
    learn.fit(3, lr=1e-2)
    made = HeadClassifier("linear", epochs=3, lr=1e-2, batch_size=8, device=learn.device).fit(features, labels)
    assert made.history_.losses == learn.history.losses
    assert made.predict_proba(features) == pytest.approx(learn.predict_proba(labelled), abs=1e-5)
    assert np.array_equal(made.predict(features), made.predict_proba(features) >= 0.5)


# ------------------------------------------------------------------------------------------------- stored features


def test_stored_features_are_an_array_of_float32_for_other_libraries(features: Features) -> None:
    assert features.dtype == torch.float16
    expected = features.numpy().astype(np.float32)
    rows = np.array([5, 0, 5])
    for found, wanted in [
        (np.asarray(features), expected),
        (features[rows, ...], expected[rows]),
        (sklearn.utils._safe_indexing(features, rows), expected[rows]),
    ]:
        assert found.dtype == np.float32
        assert np.array_equal(found, wanted)
    assert np.asarray(features, np.float64).dtype == np.float64
    with pytest.raises(ValueError, match="copy is False"):
        np.asarray(features, copy=False)
    with pytest.raises(IndexError, match=r"expected features\[rows\]"):
        features[1, 2]


def test_estimators_work_on_features_wherever_they_work_on_arrays(features: Features) -> None:
    targets = features.targets
    assert targets is not None
    array = np.asarray(features)
    head = HeadClassifier("linear", epochs=2, lr=1e-2)
    for tried in (head, make_pipeline(StandardScaler(), head), make_pipeline(StandardScaler(), LogisticRegression())):
        assert (
            cross_val_score(tried, features, targets, cv=3).tolist()
            == cross_val_score(tried, array, targets, cv=3).tolist()
        )
        assert np.array_equal(tried.fit(features, targets).predict(features), tried.fit(array, targets).predict(array))


def test_features_of_another_kind_are_refused(store: FeatureStore, images: ImageSet, features: Features) -> None:
    head = HeadClassifier("linear", epochs=1, lr=1e-2).fit(features)
    other = features_of(store, images, "layer1", "avg")
    with pytest.raises(FactsDifferError, match=f"trunk .*{features.spec.trunk[:8]}, here {other.spec.trunk[:8]}"):
        head.predict(other)
    assert len(head.predict(np.asarray(features))) == 24  # an array says nothing of where it is from
    with pytest.raises(ValueError, match=r"are of shape \(24, 12, 4, 4\); expected vectors"):
        head.fit(features_of(store, images, "layer2", "none"))
    on_array = HeadClassifier("linear", epochs=1, lr=1e-2).fit(np.asarray(other), images.targets)
    with pytest.raises(ValueError, match="X has 12 features, but HeadClassifier is expecting 8"):
        on_array.predict(features)


def test_features_of_as_many_numbers_but_other_facts_are_refused(
    model: StagedModel, images: ImageSet, tmp_path: Path
) -> None:
    store = FeatureStore(tmp_path / "features")

    def made(**options: Any) -> Features:
        return store.features(images, extract(model, images, store, cuts=["layer2:avg"], **options).keys[-1])

    features, augmented = made(), made(augment=Augment("side_on", seeds=range(1)))
    others = [
        (made(view=replace(VIEW, resize=24)), r"resize \(20, here 24\)"),
        (augmented, "augmentation .none, here side_on.*seed .none, here 0"),
        (made(dtype="float32"), r"storage type \(float16, here float32\)"),
        (made(precision="bf16"), r"precision \(fp32, here bf16\)"),
    ]
    for fresh in (HeadClassifier("linear", epochs=1, lr=1e-2), LinearProbe(), RidgeProbe(), KNNProbe(3)):
        fitted = clone(fresh).fit(features)
        for other, told in others:
            with pytest.raises(FactsDifferError, match=told) as refused:
                fitted.predict(other)
            # What it says to run makes the error go away.
            assert f"store.features(images, {features.key[:8]!r})" in str(refused.value)
        assert len(fitted.predict(store.features(images, features.key[:8]))) == 24
        assert len(clone(fresh).fit(augmented).predict(features)) == 24  # as a fit to augmented views is scored


def test_images_without_a_label_are_no_class(store: FeatureStore, model: StagedModel) -> None:
    shots = np.stack([arrays(24).read(place) for place in range(24)])
    images = ImageSet.from_arrays(shots, ["a", "b", None] * 8)
    features = store.features(images, features_of(store, images, "layer2", "avg").key)
    head = HeadClassifier("linear", epochs=1, lr=1e-2)
    for targets in (None, images.targets):
        with pytest.raises(ValueError, match="8 of 24 images have no label"):
            head.fit(features, targets)
    assert images.targets is not None
    chosen = images.select(images.targets >= 0)
    assert head.fit(store.features(chosen, features.key)).classes_.tolist() == [0, 1]
    unlabelled = ImageSet.from_arrays(shots)
    with pytest.raises(ValueError, match="have no labels"):
        head.fit(store.features(unlabelled, features.key))


@pytest.mark.parametrize("settings", [{}, {"hidden": (5,)}, {"head": "linear"}])
def test_a_head_becomes_a_learner_of_its_backbone(
    settings: dict[str, Any],
    model: StagedModel,
    images: ImageSet,
    store: FeatureStore,
    features: Features,
    tmp_path: Path,
) -> None:
    made = HeadClassifier(**{"epochs": 2, "lr": 1e-2, **settings}).fit(features)
    learn = made.to_learner(model, images, store, quiet=True)
    assert learn.predict_proba(images) == pytest.approx(made.predict_proba(features), abs=1e-5)  # of float32
    assert learn.read_from == "features"
    if "hidden" not in settings:
        again = Learner.load(learn.save(tmp_path / "run"), module=model)
        assert again.model.head is not None
        for name, tensor in made.head_.state_dict().items():
            assert torch.equal(again.model.head.state_dict()[name].cpu(), tensor)
    with pytest.raises(ValueError, match="6 of the 6 images held out here were trained on"):
        made.to_learner(model, images.split(valid=0.25), store)
    learn.unfreeze()
    assert len(learn.fit(1, lr=1e-3).records) == 1
    other = staged()
    next(other.parameters()).data += 1
    with pytest.raises(FactsDifferError, match="No cut of net gives the features"):
        made.to_learner(other, images)
    with pytest.raises(ValueError, match="tells 0, 1 apart, and these images have a, b, c"):
        made.to_learner(model, ImageSet.from_arrays(np.zeros((3, 8, 8), np.uint8), ["a", "b", "c"]))
    with pytest.raises(ValueError, match="tells 0, 1 apart, and these images have 1, 0"):
        made.to_learner(model, replace(images, classes=("1", "0")))
    assert images.targets is not None
    named = clone(made).fit(features, np.array(images.classes)[images.targets])
    probabilities = named.to_learner(model, images, store, quiet=True).predict_proba(images)
    assert probabilities == pytest.approx(named.predict_proba(features), abs=1e-5)
    with pytest.raises(ValueError, match="tells the numbers 0, 1 apart, which aren't the targets of the features"):
        clone(made).fit(features, 1 - images.targets).to_learner(model, images)
    with pytest.raises(ValueError, match="was fitted to an array"):
        made.fit(np.asarray(features), images.targets).to_learner(model, images)


# ---------------------------------------------------------------------------------------------------- good company


def test_a_search_by_two_processes_finds_what_one_finds(digits: Arrays) -> None:
    settings = {"hidden": [(), (16,)], "weight_decay": [0.0, 0.1]}
    found = [GridSearchCV(HeadClassifier(epochs=1, lr=1e-2), settings, cv=2, n_jobs=n).fit(*digits) for n in (None, 2)]
    assert found[0].cv_results_["mean_test_score"].tolist() == found[1].cv_results_["mean_test_score"].tolist()
    assert found[0].best_params_ == found[1].best_params_
    again = pickle.loads(pickle.dumps(found[1]))
    assert np.array_equal(again.predict_proba(digits[0]), found[1].predict_proba(digits[0]))


def test_heads_are_stacked_and_calibrated(digits: Arrays) -> None:
    values, targets = digits[0], digits[1]
    head = HeadClassifier("linear", epochs=2, lr=1e-2)
    stacked = StackingClassifier(
        [("head", head), ("probe", LinearProbe(0.01)), ("other", LogisticRegression(max_iter=1000))], cv=2
    )
    stacked.fit(values[:200], targets[:200])
    assert stacked.score(values[200:], targets[200:]) > 0.8
    calibrated = CalibratedClassifierCV(head, cv=2).fit(values[:200], targets[:200])
    assert calibrated.predict_proba(values).sum(axis=1) == pytest.approx(1)


def test_classes_keep_their_names_and_columns_their_order(digits: Arrays) -> None:
    values, targets = digits[0], np.array(["even", "odd"])[digits[1] % 2]
    head = HeadClassifier("linear", epochs=3, lr=1e-2)
    assert (is_classifier(head), is_regressor(HeadRegressor())) == (True, True)
    with pytest.raises(NotFittedError):
        head.predict(values)
    head.fit(values, targets)
    assert head.classes_.tolist() == ["even", "odd"]
    probabilities, decisions = head.predict_proba(values), head.decision_function(values)
    assert np.array_equal(head.predict(values), head.classes_[(decisions > 0).astype(int)])
    assert probabilities[:, 1] == pytest.approx(1 / (1 + np.exp(-decisions)))
    assert clone(head).get_params() == head.get_params()


def test_a_class_that_weighs_more_is_predicted_more_often(digits: Arrays) -> None:
    values, targets = digits[0], digits[1] // 5
    plain, heavy = (
        HeadClassifier("linear", epochs=5, lr=1e-2, class_weight=weights).fit(values, targets).predict(values)
        for weights in (None, {1: 50.0})
    )
    assert (heavy == 1).sum() > (plain == 1).sum()


def test_random_states_are_seeds(digits: Arrays) -> None:
    def losses(random_state: Any) -> list[float]:
        fitted = HeadClassifier(epochs=1, lr=1e-2, random_state=random_state).fit(*digits)
        return fitted.history_.losses

    assert losses(np.random.RandomState(1)) == losses(np.random.RandomState(1))
    assert losses(0) != losses(np.random.default_rng(1)) != losses(None)
    with pytest.raises(ValueError, match="random_state is -1"):
        losses(-1)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"head": "linear", "hidden": (8,)}, "'linear' has no hidden"),
        ({"head": "nothing"}, "'nothing' is unknown"),
        ({"options": {"schedule": "cosine"}}, "options has schedule"),
        ({"options": {"clipp": 1}}, "Did you mean clip"),
        ({"options": {"checkpoint": "kept"}}, "has rows alone"),
        ({"epochs": 0}, "epochs is 0"),
        ({"class_weight": "heavy"}, "class_weight"),
        ({"hidden": 64}, r"hidden is 64; expected the width of each hidden layer in a list, as \(512,\)"),
        ({"hidden": (6.5,)}, "each must be a whole number"),
        ({"dropout": ("a", 0.5)}, "A dropout rate is .a."),
        ({"batch_size": 0}, "batch_size is 0; expected at least 1"),
        ({"options": ["clip"]}, "expected options of a fit by name"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, Any], told: str, digits: Arrays) -> None:
    with pytest.raises((ValueError, TypeError), match=told):
        HeadClassifier(**{"lr": 1e-2, **settings}).fit(*digits)


@pytest.mark.parametrize(
    ("probe", "told"),
    [
        (LinearProbe(C=[]), r"C is of shape \(0,\); expected one number above 0, or several"),
        (LinearProbe(C="strong"), "C is 'strong'"),  # type: ignore[arg-type]
        (LinearProbe(max_iterations=1.5), "max_iterations is 1.5"),  # type: ignore[arg-type]
        (LinearProbe(class_weight=[1, 2]), r"class_weight is \[1, 2\]"),  # type: ignore[arg-type]
        (RidgeProbe("strong"), "strengths is 'strong'"),  # type: ignore[arg-type]
        (KNNProbe(2.5), "n_neighbors is 2.5"),  # type: ignore[arg-type]
        (KNNProbe(weights=None), "weights is None"),  # type: ignore[arg-type]
    ],
)
def test_settings_of_probes_that_mean_nothing_are_refused(probe: Any, told: str, digits: Arrays) -> None:
    with pytest.raises((ValueError, TypeError), match=told):
        probe.fit(*digits)


def test_a_single_class_is_refused(digits: Arrays) -> None:
    with pytest.raises(ValueError, match="y holds one class, 3"):
        HeadClassifier().fit(digits[0], np.full(300, 3))


# --------------------------------------------------------------------------------------------------------- the probes


@pytest.mark.parametrize("kind", ["array", "features"])
@pytest.mark.parametrize(
    "fresh",
    [HeadClassifier(epochs=2, lr=1e-2), HeadRegressor("mlp", epochs=2, lr=1e-2)],
    ids=lambda each: type(each).__name__,
)
def test_a_head_is_fitted_to_a_row_as_often_as_its_weight_says(fresh: Any, kind: str, features: Features) -> None:
    array, targets = np.asarray(features), features.targets
    assert targets is not None
    often = np.arange(24) % 5  # 0 leaves a row out
    made = clone(fresh).fit(features if kind == "features" else array, targets, sample_weight=often)
    repeated = clone(fresh).fit(np.repeat(array, often, axis=0), np.repeat(targets, often))
    assert made.history_.losses == repeated.history_.losses
    assert np.array_equal(made.predict(array), repeated.predict(array))


def test_weights_that_are_not_whole_are_shares_of_a_pass(digits: Arrays) -> None:
    values, targets = digits[0], digits[1] // 5
    weights = np.random.default_rng(0).uniform(0.1, 2, 300) * np.where(targets == 1, 20, 1)
    plain, heavy, scaled = (
        HeadClassifier("linear", epochs=5, lr=1e-2).fit(values, targets, each).predict(values)
        for each in (None, weights, weights / 1024)
    )
    assert np.array_equal(heavy, scaled)
    assert (heavy == 1).sum() > (plain == 1).sum()
    rows = HeldRows(values[:40])
    images = images_by_id([*map(str, range(40))], where="made", name="made")
    model = StagedModel.absent(
        [{"name": "rows", "layout": "NC", "shape": [64], "digest": "0"}], view=VIEW, name="rows", class_tokens=0
    ).with_head(build_head("linear", 64, 2), cut="rows", reduction="none")
    shares = weights[:40] / weights[:40].mean()
    batches = Batches(
        HeldSource(
            images=replace(images, targets=targets[:40], classes=("a", "b"), task="single"), features=(rows,), start=1
        ),
        Situation.of(model, images, device=torch.device("cpu")),
        batch_size=8,
        workers=None,
        weights=shares,
    )
    counts = np.stack([np.bincount(batches._order(3, number), minlength=40) for number in range(2000)])
    assert (counts.sum(1) == 40).all()
    assert (np.abs(counts - shares) < 1 + 1e-9).all()  # what is whole of a weight each pass has
    assert counts.mean(0) == pytest.approx(shares, abs=4 * 0.5 / 2000**0.5)  # four deviations of a mean, or more


def test_weights_that_mean_nothing_are_refused(digits: Arrays) -> None:
    for fresh in (HeadClassifier(epochs=1, lr=1e-2), LinearProbe(), RidgeProbe()):
        for weights, told in (
            (np.zeros(300), "at least one non-zero"),
            (np.full(300, -1.0), "is -1"),
            (np.ones(9), "shape"),
        ):
            with pytest.raises(ValueError, match=told):
                clone(fresh).fit(*digits, sample_weight=weights)
    with pytest.raises(ValueError, match="sampling is balanced, which has its own"):
        HeadClassifier(epochs=1, lr=1e-2, options={"sampling": "balanced"}).fit(*digits, np.full(300, 0.5))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("num_classes", [2, 10])
def test_a_linear_probe_is_logistic_regression(num_classes: int, weighted: bool, digits: Arrays) -> None:
    values, targets = digits[0], digits[1] % num_classes
    weights = np.random.default_rng(0).uniform(0.5, 2, len(targets)) if weighted else np.ones(len(targets))
    class_weight = {0: 3.0} if weighted else None
    wide = values.astype(np.float64)  # of float32 scikit-learn's stops a ten thousandth of the objective short of this
    made = [
        fresh.fit(wide, targets, sample_weight=weights)
        for fresh in (
            LinearProbe(0.01, class_weight=class_weight, tol=1e-8),
            LogisticRegression(C=0.01, class_weight=class_weight, tol=1e-8, max_iter=5000),
        )
    ]
    probe, expected = made
    # Both stop near the optimum, around which the objective is flat: a millionth of it moves coefficients by 0.002.
    assert probe.coef_ == pytest.approx(expected.coef_, abs=5e-3)
    assert probe.intercept_.shape == expected.intercept_.shape
    assert probe.decision_function(values).shape == expected.decision_function(values).shape
    assert probe.predict_proba(values) == pytest.approx(expected.predict_proba(values), abs=5e-3)
    assert np.array_equal(probe.predict(values), expected.predict(values))
    own = weights * np.where(targets == 0, 3.0, 1.0) if weighted else weights

    def objective(fitted: Any) -> float:
        losses = -np.log(fitted.predict_proba(values)[np.arange(len(targets)), targets])
        return float(0.01 * (own * losses).sum() + np.square(fitted.coef_).sum() / 2)

    assert objective(probe) == pytest.approx(objective(expected), rel=1e-5)


def test_weights_count_as_rows_that_are_there_so_often(digits: Arrays) -> None:
    values, targets = digits
    often = np.random.default_rng(0).integers(1, 4, len(targets))
    weighted = LinearProbe(0.01, tol=1e-8).fit(values, targets, sample_weight=often)
    repeated = LinearProbe(0.01, tol=1e-8).fit(np.repeat(values, often, axis=0), np.repeat(targets, often))
    assert weighted.predict_proba(values) == pytest.approx(repeated.predict_proba(values), abs=1e-4)
    ridges = [
        RidgeProbe(10.0).fit(values, targets, sample_weight=often),
        RidgeProbe(10.0).fit(np.repeat(values, often, axis=0), np.repeat(targets, often)),
    ]
    assert ridges[0].coef_ == pytest.approx(ridges[1].coef_, rel=1e-8, abs=1e-10)  # sums of float64 in another order


def test_a_strength_is_chosen_as_a_search_chooses_it(digits: Arrays) -> None:
    values, targets = digits
    strengths = [1e-4, 1e-2]
    probe = LinearProbe(C=strengths, folds=3).fit(values, targets)
    search = GridSearchCV(LogisticRegression(max_iter=5000, tol=1e-6), {"C": strengths}, cv=3).fit(values, targets)
    assert search.best_params_["C"] == probe.C_
    assert probe.scores_ is not None
    assert probe.scores_.mean(axis=1) == pytest.approx(search.cv_results_["mean_test_score"], abs=0.01)  # three rows
    alone = LinearProbe(probe.C_).fit(values, targets)
    assert (alone.scores_, alone.coef_.tolist()) == (None, probe.coef_.tolist())
    with pytest.raises(ValueError, match="standardised is for one C"):
        LinearProbe(C=strengths, standardised=True).fit(values, targets)


def test_copies_lie_in_one_fold_and_so_do_the_images_of_a_group(model: StagedModel, tmp_path: Path) -> None:
    twice = np.tile(np.arange(12), 2)
    images = ImageSet.from_arrays(pixels(12)[twice], [0, 0, 1, 1, 0, 1, 0, 1, 1, 0, 1, 0] * 2)
    store = FeatureStore(tmp_path / "features")
    features = store.features(images, extract(model, images, store, cuts=["layer2:concat"]).keys[0])
    for given in (features, np.asarray(features)):
        # Twenty-four numbers tell any twelve images apart, so of copies that were trained on each is right; the labels
        # are no matter of what is seen.
        assert LinearProbe(C=[1e-3, 1e3], folds=3).fit(given, images.targets).scores_.max() < 0.9  # type: ignore[union-attr]
    grouped = ImageSet.from_arrays(pixels(24), [0, 1] * 12, groups=[f"patient{place // 3}" for place in range(24)])
    extract(model, grouped, store, cuts=["layer2:concat"])
    fold_of = _folds(store.features(grouped, features.key), np.asarray(grouped.targets), 4)
    assert [len({*patient}) for patient in np.reshape(fold_of, (8, 3)).tolist()] == [1] * 8
    assert np.bincount(np.ravel(fold_of)).tolist() == [6] * 4


@pytest.mark.parametrize("num_classes", [2, 10])
def test_a_ridge_probe_is_scikit_learns(num_classes: int, digits: Arrays) -> None:
    values, targets = digits[0].astype(np.float64), digits[1] % num_classes
    strengths = [0.1, 10.0, 1000.0]
    expected = RidgeClassifierCV(strengths).fit(values, targets)
    probe = RidgeProbe(strengths).fit(values, targets)
    assert probe.strength_ == expected.alpha_
    assert probe.coef_ == pytest.approx(np.atleast_2d(expected.coef_), abs=1e-6)  # rows of float32, sums of float64
    assert probe.decision_function(values) == pytest.approx(expected.decision_function(values), abs=1e-5)
    assert np.array_equal(probe.predict(values), expected.predict(values))


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_a_neighbour_probe_is_scikit_learns(metric: Any, digits: Arrays) -> None:
    values, targets = digits
    for weights in ("uniform", "distance"):
        expected = KNeighborsClassifier(5, metric=metric, weights=weights).fit(values[:200], targets[:200])
        probe = KNNProbe(5, metric=metric, weights=weights).fit(values[:200], targets[:200])
        shares = expected.predict_proba(values[200:])
        assert probe.predict_proba(values[200:]) == pytest.approx(shares, abs=1e-5)  # distances of float32
    assert KNNProbe(500).fit(values, targets).n_neighbors_ == 300


def test_probes_read_features_as_they_read_arrays(features: Features, store: FeatureStore, images: ImageSet) -> None:
    array, targets = np.asarray(features), features.targets
    for probe in (LinearProbe(), LinearProbe(standardised=True), LinearProbe(C=[0.1, 1], folds=3), KNNProbe(3)):
        # Blocks of a store and of an array may be summed in another order.
        found = clone(probe).fit(features).predict_proba(features)
        assert found == pytest.approx(clone(probe).fit(array, targets).predict_proba(array), abs=1e-5)
        assert np.array_equal(pickle.loads(pickle.dumps(probe.fit(features))).predict_proba(features), found)
        with pytest.raises(FactsDifferError, match="aren't of the kind that"):
            probe.predict(features_of(store, images, "layer1", "avg"))


# ------------------------------------------------------------------------------------------------------ the extractor


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], list[str]]:
    """Twelve files of two classes, and their classes."""
    files = sorted(photos(tmp_path_factory.mktemp("photographs"), 12).rglob("*.*"))
    return [str(file) for file in files], [file.parent.name for file in files]


def test_a_search_over_a_pipeline_computes_each_image_once(
    paths: tuple[list[str], list[str]], model: StagedModel, tmp_path: Path
) -> None:
    store = FeatureStore(tmp_path / "features")
    files, classes = paths
    made = make_pipeline(
        FeatureExtractor(model, cut="layer2", store=store), HeadClassifier("linear", epochs=1, lr=1e-2)
    )
    search = GridSearchCV(made, {"headclassifier__epochs": [1, 2], "featureextractor__cut": ["layer1", "layer2"]}, cv=2)
    search.fit(files, classes)
    assert {len(files)} == {sum(part.num_rows for part in each.parts) for each in store.sets()}
    assert len([*(tmp_path / "features" / "images").iterdir()]) <= 4  # none where nothing was computed
    assert len(store.sets()) == 2
    rows = search.best_estimator_[0].transform(files)
    images = ImageSet.from_folder(Path(files[0]).parents[1])
    keys = [each.key for each in store.sets() if each.facts["cut"] == search.best_params_["featureextractor__cut"]]
    assert np.array_equal(rows, np.asarray(store.features(images, keys[0])))
    again = pickle.loads(pickle.dumps(search.best_estimator_))
    assert np.array_equal(again.predict(files), search.predict(files))


def test_images_of_any_kind_have_the_same_rows_in_their_order(
    paths: tuple[list[str], list[str]], model: StagedModel, tmp_path: Path
) -> None:
    extractor = FeatureExtractor(model, cut="layer2", store=tmp_path / "features").fit()
    files = paths[0]
    expected = extractor.transform(files)
    assert expected.dtype == np.float32
    assert expected.shape == (12, *extractor.shape_)
    opened = [Image.open(file).convert("RGB") for file in files]
    order = [3, 0, 3, 11]
    for found, wanted in [
        (extractor.transform([files[place] for place in order]), expected[order]),
        (extractor.transform(np.array(files)), expected),
        (extractor.transform(np.array(files)[:, None]), expected),
        (extractor.transform([Path(file) for file in files]), expected),
        (extractor.transform(opened), extractor.transform(np.stack([np.asarray(image) for image in opened]))),
    ]:
        assert np.array_equal(found, wanted)


def test_an_extractor_that_has_changed_since_its_fit_is_refused(
    paths: tuple[list[str], list[str]], tmp_path: Path
) -> None:
    model, files = staged(), paths[0][:2]
    made = FeatureExtractor(model, cut="layer2", store=tmp_path / "features").fit()
    before = made.transform(files)
    with pytest.raises(FactsDifferError, match=r"changed since in: resize \(20, now 24\)"):
        made.set_params(view=replace(VIEW, resize=24)).transform(files)
    assert np.array_equal(made.set_params(view=VIEW).transform(files), before)
    next(model.parameters()).data += 1
    with pytest.raises(FactsDifferError, match=f"trunk .{made.spec_.trunk[:8]}, now"):
        made.transform(files)
    assert not np.array_equal(made.fit().transform(files), before)
    store = FeatureStore(tmp_path / "features")
    with pytest.raises(ValueError, match="which are rows already; expected images"):
        made.transform(store.features(ImageSet.from_store(store), made.spec_.key))


def test_columns_have_names(paths: tuple[list[str], list[str]], model: StagedModel, tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    extractor = FeatureExtractor(model, cut="layer2", store=tmp_path / "features").set_output(transform="pandas")
    with pytest.raises(NotFittedError):
        extractor.transform(paths[0])
    table = extractor.fit_transform(paths[0])
    assert isinstance(table, pandas.DataFrame)
    assert table.columns[0] == "net_layer2_concat_0"
    maps = FeatureExtractor(model, cut="layer2", reduce="none", store=tmp_path / "features").fit()
    assert maps.transform(paths[0][:2]).shape == (2, *maps.shape_)
    with pytest.raises(ValueError, match="names are for vectors"):
        maps.get_feature_names_out()


@pytest.mark.parametrize(("setting", "told"), [({"view": 64}, "view is 64; expected"), ({"store": 3}, "store is 3")])
def test_settings_of_an_extractor_that_mean_nothing_are_refused(setting: Any, told: str, model: StagedModel) -> None:
    with pytest.raises(TypeError, match=told):
        FeatureExtractor(model, **setting).fit()


@pytest.mark.parametrize(("given", "told"), [("one.jpg", "expected several images"), (["nowhere.jpg"], "is no file")])
def test_what_is_no_list_of_images_is_refused(given: Any, told: str, model: StagedModel, tmp_path: Path) -> None:
    extractor = FeatureExtractor(model, cut="layer2", store=tmp_path / "features").fit()
    with pytest.raises(ValueError, match=told):
        extractor.transform(given)


@pytest.mark.parametrize(
    "check",
    [
        "check_estimator_repr",  # since scikit-learn 1.6
        "check_no_attributes_set_in_init",
        "check_parameters_default_constructible",
        "check_get_params_invariance",
        "check_set_params",
        "check_mixin_order",  # since 1.6
    ],
)
def test_the_checks_that_need_no_images_hold_of_the_extractor(check: str) -> None:
    # The others, which check_estimator leaves out for what its tags say, fit rows of random numbers.
    if hasattr(estimator_checks, check):
        getattr(estimator_checks, check)("FeatureExtractor", FeatureExtractor())


@pytest.mark.parametrize("probe", [RidgeProbe(), LinearProbe(1.0), KNNProbe(5, metric="euclidean")], ids=str)
@pytest.mark.parametrize("dtype", [np.float64, np.int64])
def test_seconds_since_1970_tell_classes_apart(probe: Any, dtype: type) -> None:
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1], 40)
    near = (rng.integers(-9, 10, (80, 3)) + 12 * labels[:, None]).astype(dtype)  # float32 tells 128 seconds apart
    far = near + dtype(1_700_000_000)
    expected = probe.fit(near, labels).predict(near)
    assert (expected == labels).mean() > 0.9
    assert np.array_equal(probe.fit(far, labels).predict(far), expected)


def test_ridge_chooses_no_strength_by_copies_of_what_it_was_fitted_to() -> None:
    rng = np.random.default_rng(0)
    rows, labels = rng.standard_normal((40, 60)), rng.integers(0, 2, 40)  # nothing to tell: the strongest is best
    strengths = [1e-3, 1e6]
    twice = RidgeProbe(strengths, device="cpu").fit(np.repeat(rows, 2, axis=0), np.repeat(labels, 2))
    assert twice.strength_ == RidgeProbe(strengths, device="cpu").fit(rows, labels).strength_ == 1e6
    few = RidgeProbe(strengths, device="cpu").fit(np.repeat(rows[:3], 4, axis=0), np.repeat([0, 1, 0], 4))  # 3 folds
    assert few.errors_.shape == (2,)


def test_the_strengths_of_ridge_fit_rows_of_any_scale() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 90)
    rows = rng.standard_normal((90, 20)) + labels[:, None] * 0.3
    fitted = RidgeProbe(device="cpu").fit(rows, labels)
    small = RidgeProbe(device="cpu").fit(rows * 1e-3, labels)
    assert small.strength_ == pytest.approx(fitted.strength_ * 1e-6, rel=1e-9)
    assert small.decision_function(rows * 1e-3) == pytest.approx(fitted.decision_function(rows), rel=1e-6, abs=1e-9)


def test_several_labels_of_which_there_is_one_are_several_labels_still(tmp_path: Path) -> None:
    images = ImageSet.from_arrays(pixels(12), [["defect"] * (place % 2) for place in range(12)], task="multi")
    store = FeatureStore(tmp_path / "features")
    extract(staged(), images, store, cuts=["layer2"], device="cpu", workers=0)
    features = store.features(images, store.sets()[0])
    fitted = HeadClassifier("linear", epochs=1, lr=1e-2).fit(features)
    assert fitted.predict_proba(features).shape == (12, 1)
