"""Probing: each probe is scikit-learn's model, and what it is told by is the rows it trains on alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from sklearn.datasets import load_diabetes, load_digits
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import StratifiedKFold
from sklearn.neighbors import KNeighborsClassifier

from training import choices
from training.experiments import probing
from training.experiments.probing import (
    DRAWS,
    PROBES,
    Halves,
    ProbeName,
    probed,
    probes_for,
    resampled,
    score,
    score_interval,
)


@pytest.fixture(scope="module")
def digits() -> tuple[Any, Any, list[Halves]]:
    rows, classes = load_digits(return_X_y=True)
    rows = rows[:500].astype(np.float32)
    inner = list(StratifiedKFold(3).split(rows[:300], classes[:300]))
    return rows, classes[:500], inner


def ask(name: ProbeName, digits: tuple[Any, Any, list[Halves]], targets: Any = None) -> probing.Probed:
    rows, classes, inner = digits
    given = classes if targets is None else targets
    return probed(name, rows[:300], given[:300], rows[300:], task="single", columns=10, inner=inner)


def test_ridge_is_scikit_learns_under_its_strength(digits: Any) -> None:
    rows, classes, _ = digits
    found = ask("ridge", digits)
    own = rows[:300].astype(np.float64)
    unit = ((own - own.mean(0)) ** 2).sum() / 64  # the mean squared singular value
    model = Ridge(alpha=found.setting * unit).fit(own, np.eye(10)[classes[:300]])
    # The strength may be a millionth of the largest singular value, which is what float64 leaves of 1e-16.
    np.testing.assert_allclose(found.said, model.predict(rows[300:]), atol=1e-8)


@pytest.mark.parametrize("count", [20, 300])
def test_ridge_is_the_same_from_either_side(digits: Any, count: int) -> None:
    rows, classes, _ = digits
    own, wanted = rows[:count].astype(np.float64), np.eye(10)[classes[:count]]
    unit = ((own - own.mean(0)) ** 2).sum() / min(own.shape)
    settings = [1.0, 1e-2]
    for setting, said in zip(settings, probing._ridge(rows[:count], wanted, rows[300:], settings, "cpu"), strict=True):
        expected = Ridge(alpha=setting * unit).fit(own, wanted).predict(rows[300:])
        np.testing.assert_allclose(said, expected, atol=1e-9)


def test_linear_is_scikit_learns_logistic_regression(digits: Any) -> None:
    rows, classes, _ = digits
    found = ask("linear", digits)
    centre = rows[:300].mean(0)
    scale = np.where(rows[:300].std(0) > 0, rows[:300].std(0), 1)
    model = LogisticRegression(C=found.setting, max_iter=5000, tol=1e-8)
    model.fit((rows[:300] - centre).astype(np.float64) / scale, classes[:300])
    # The probe's solver stops within 1e-5 of the least objective, which is flat there.
    np.testing.assert_allclose(found.said, model.predict_proba((rows[300:] - centre) / scale), atol=1e-2)


def test_linear_of_more_features_than_rows_is_scikit_learns_too(digits: Any) -> None:
    rows, classes, _ = digits
    own, asked = rows[:40], rows[300:]
    found = probed("linear", own, classes[:40], asked, task="single", columns=10, inner=[])
    centre = own.mean(0)
    scale = np.where(own.std(0) > 0, own.std(0), 1)
    model = LogisticRegression(C=found.setting, max_iter=5000, tol=1e-8)
    model.fit((own - centre).astype(np.float64) / scale, classes[:40])
    np.testing.assert_allclose(found.said, model.predict_proba((asked - centre) / scale), atol=1e-2)


def test_nearest_rows_are_those_of_scikit_learn(digits: Any) -> None:
    rows, classes, _ = digits
    found = ask("knn", digits)
    model = KNeighborsClassifier(int(found.setting), metric="cosine", weights=lambda far: np.exp((1 - far) / 0.07))
    model.fit(rows[:300], classes[:300])
    np.testing.assert_allclose(found.said, model.predict_proba(rows[300:]), atol=1e-4)  # cosines in float32


@pytest.mark.parametrize("name", PROBES)
def test_what_is_held_out_has_no_part_in_the_choice_of_a_setting(
    name: ProbeName, digits: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Held-out labels are wrong, and rows as well: setting and model stay what they were, to the bit."""
    rows, classes, inner = digits
    before = ask(name, digits)
    seen: list[int] = []
    path = probing._PATHS[name]

    def watched(own: Any, wanted: Any, queries: Any, settings: Any, device: str) -> Any:
        seen.extend([len(own), len(queries)] if len(settings) > 1 else [])
        return path.said(own, wanted, queries, settings, device)

    monkeypatch.setitem(probing._PATHS, name, probing._Path(path.settings, watched))
    spoilt = np.concatenate([rows[:300], rows[300:][::-1]])
    found = probed(name, spoilt[:300], classes[:300], spoilt[300:], task="single", columns=10, inner=inner)
    assert found.setting == before.setting
    np.testing.assert_allclose(found.said[::-1], before.said, atol=1e-5)  # blocks of products round differently
    assert seen == [size for fit, judged in inner for size in (len(fit), len(judged))]


@pytest.mark.parametrize("name", PROBES)
def test_the_setting_is_the_best_over_the_inner_folds(name: ProbeName, digits: Any) -> None:
    rows, classes, inner = digits
    path = probing._PATHS[name]
    settings = path.settings(300)
    totals = np.zeros(len(settings))
    for fit, judged in inner:
        for place, setting in enumerate(settings):
            (said,) = path.said(rows[fit], np.eye(10)[classes[fit]], rows[judged], [setting], "cpu")
            totals[place] += (said.argmax(1) == classes[judged]).sum()
    assert len(set(totals.tolist())) > 1
    # Logistic regression that starts where another one has ended stops elsewhere, within an image or two.
    chosen = totals[settings.index(ask(name, digits).setting)]
    assert chosen >= totals.max() - (2 if name == "linear" else 0)


def test_numbers_and_several_labels_are_scored_as_scikit_learn_does() -> None:
    rows, wanted = load_diabetes(return_X_y=True)
    rows = rows.astype(np.float32)
    inner = [(np.arange(0, 150), np.arange(150, 300))]
    found = probed("ridge", rows[:300], wanted[:300, None], rows[300:], task="regression", columns=1, inner=inner)
    assert score(found.said, wanted[300:, None], "regression") > 0.4
    hot = np.stack([wanted > 100, wanted > 200], 1).astype(np.int64)
    several = probed("knn", rows[:300], hot[:300], rows[300:], task="multi", columns=2, inner=inner)
    assert score(several.said, hot[300:], "multi") > 0.7


@pytest.mark.parametrize("task", ["multi", "regression"])
def test_an_interval_is_that_of_scores_of_images_drawn_anew(task: Any) -> None:
    random = np.random.default_rng(0)
    targets = random.integers(0, 2, (60, 3)) if task == "multi" else random.normal(50, 9, (60, 2))
    said = np.round(targets + random.normal(0, 1 if task == "multi" else 9, targets.shape), 1)  # some are said alike
    draws = np.random.default_rng(0).multinomial(60, np.full(60, 1 / 60), size=DRAWS)
    rows = [np.repeat(np.arange(60), often) for often in draws]
    expected = [score(said[each], targets[each], task) for each in rows]
    assert resampled(said, targets, draws, task) == pytest.approx(expected, rel=1e-12)
    assert score_interval(said, targets, task) == pytest.approx(np.quantile(expected, [0.025, 0.975]), rel=1e-12)
    assert score_interval(said[:1], targets[:1] * 0, task) is None


def test_a_class_without_a_row_to_train_on_is_never_said(digits: Any) -> None:
    rows, classes, _ = digits
    some = classes[:300] < 9
    for name in PROBES:
        found = probed(name, rows[:300][some], classes[:300][some], rows[300:], task="single", columns=10, inner=[])
        assert found.said.shape == (200, 10)
        assert not (found.said.argmax(1) == 9).any()


def test_probes_are_named_and_those_of_another_task_refused() -> None:
    assert choices.PROBES == PROBES
    assert probes_for("single", None) == PROBES
    assert probes_for("multi", None) == ("knn", "ridge")
    assert probes_for("single", ["linear", "knn"]) == ("knn", "linear")
    with pytest.raises(ValueError, match="The probe linear tells classes apart, and these images are regression"):
        probes_for("regression", ["linear"])
    with pytest.raises(ValueError, match="'svm' is no probe"):
        probes_for("single", ["svm"])
    with pytest.raises(ValueError, match="probes is 'knn'"):
        probes_for("single", "knn")
