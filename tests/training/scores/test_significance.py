"""Whether of two models one is better: the exact test and the bootstrap that scipy has, and only on the same images."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from numpy.typing import NDArray
from scipy.stats import binomtest, bootstrap  # type: ignore[import-untyped]
from sklearn.metrics import f1_score
from support.processes import Processes
from support.programs import Run
from support.tiny import arrays, pixels, staged

from featstore import FeatureStore, ImageSet
from featstore.errors import DamagedFileError, FeatureStoreError
from training import Learner, Outcomes, mcnemar, paired_bootstrap
from training.predict import probabilities, write_csv
from training.scores import scored_table
from training.scores.scored_table import ScoredTable
from training.scores.significance import McNemar, bootstrapped, verdict

OLD = Path(__file__).parents[2] / "data" / "run-0.1.0"
COUNT = 120
CLASSES = ("ant", "bee", "cow")


def outcomes(seed: int, sure: float, *, classes: tuple[str, ...] = CLASSES, order: Any = None) -> Outcomes:
    """What a model said of the same 120 images: the surer, the better."""
    generator = torch.Generator().manual_seed(seed)
    names = np.array(CLASSES)[np.random.default_rng(0).integers(0, 3, COUNT)]
    images = ImageSet.from_arrays(pixels(COUNT), names.tolist(), classes=classes)
    assert images.targets is not None
    targets = torch.from_numpy(np.array(images.targets))
    logits = torch.randn(COUNT, 3, generator=generator) + sure * torch.nn.functional.one_hot(targets, 3)
    found = Outcomes.of(images, logits, targets, probabilities(logits, "single"))
    if order is None:
        return found
    chosen = images.select(order)
    return Outcomes.of(chosen, logits[order], targets[order], found.probabilities[order])


@pytest.mark.parametrize(("only_a", "only_b"), [(0, 0), (1, 0), (3, 9), (10, 10), (40, 12), (300, 200)])
def test_the_exact_test_is_scipy_s_binomial_test_and_the_sum_by_hand(only_a: int, only_b: int) -> None:
    a = np.array([True] * only_a + [False] * only_b + [True, False, False])
    b = np.array([False] * only_a + [True] * only_b + [True, False, False])
    found, count = McNemar.of(a, b), only_a + only_b
    assert (found.both, found.only_a, found.only_b, found.neither) == (1, only_a, only_b, 2)
    ways = sum(math.comb(count, k) for k in range(min(only_a, only_b) + 1))
    assert_allclose(found.p, min(1.0, 2 * ways / 2**count), rtol=1e-12)  # sums of 300 terms, rounded otherwise
    if count:
        assert_allclose(found.p, binomtest(only_a, count, 0.5).pvalue, rtol=1e-12)
    swapped = McNemar.of(b, a)
    assert (swapped.p, swapped.only_a) == (found.p, only_b)


def test_two_outcomes_are_compared_image_by_image_in_whatever_order_and_class_table() -> None:
    a, b = outcomes(1, 1.0), outcomes(2, 2.0)
    found = mcnemar(a, b)
    assert found == McNemar.of(a.is_right, b.is_right)
    assert found.num_images == COUNT
    assert str(found) == (
        f"of 120 images {found.only_a} are right by the first alone and {found.only_b} by the second alone: McNemar p "
        f"{found.p:.2g}"
    )
    order = np.random.default_rng(3).permutation(COUNT)
    assert mcnemar(a, outcomes(2, 2.0, order=order)) == found
    other_table = outcomes(4, 2.0, classes=("cow", "ant", "bee"))
    assert mcnemar(a, other_table) == McNemar.of(a.is_right, other_table.is_right)
    assert paired_bootstrap(a, outcomes(2, 2.0, order=order)) == paired_bootstrap(a, b)


@pytest.mark.parametrize("metric", ["accuracy", "loss"])
def test_the_bootstrap_s_interval_is_scipy_s(metric: Any) -> None:
    a, b = outcomes(1, 1.0), outcomes(2, 2.0)
    mine, others = ((each.is_right.astype(float) if metric == "accuracy" else each.losses) for each in (a, b))
    found = paired_bootstrap(a, b, metric=metric)
    expected = bootstrap(
        (mine, others),
        lambda first, second, axis: (second - first).mean(axis=axis),
        paired=True,
        method="percentile",
        n_resamples=10_000,
        random_state=np.random.default_rng(9),
    )
    assert_allclose(found.value, (others - mine).mean())
    spread = expected.bootstrap_distribution.std()
    # The ends are quantiles of 10,000 draws: of a normal, 0.027 deviations uncertain each, the difference of two 0.04.
    assert_allclose(found.interval, [*expected.confidence_interval], atol=0.2 * spread)
    assert paired_bootstrap(a, b, metric=metric, seed=0) == found
    assert paired_bootstrap(a, b, metric=metric, num=7, seed=1) != paired_bootstrap(a, b, metric=metric, num=7)
    wide, narrow = (paired_bootstrap(a, b, metric=metric, confidence=each).interval for each in (0.99, 0.5))
    assert wide[0] < found.interval[0] < narrow[0] < narrow[1] < found.interval[1] < wide[1]


def test_drawing_how_often_each_difference_occurs_is_drawing_images() -> None:
    random = np.random.default_rng(0)
    a, b = (random.random((2, 500)) < [[0.7], [0.75]]).astype(float)
    few = bootstrapped(a, b)  # differences of -1, 0 and 1
    many = bootstrapped(a, b + 1e-9 * random.random(500))  # as many as images
    assert_allclose(few.interval, many.interval, atol=0.004)  # of a deviation of 0.027, as above


def test_a_function_of_probabilities_is_called_with_the_same_images_of_both() -> None:
    def f1(said: NDArray[Any], targets: NDArray[Any]) -> float:
        return float(f1_score(targets, said.argmax(1), average="macro"))

    def accuracy(said: NDArray[Any], targets: NDArray[Any]) -> float:
        return float((said.argmax(1) == targets).mean())

    a, b = outcomes(1, 1.0), outcomes(2, 2.0)
    found = paired_bootstrap(a, b, metric=f1, num=200)
    assert_allclose(found.value, f1(b.probabilities, b.targets) - f1(a.probabilities, a.targets))
    assert found.interval[0] < found.value < found.interval[1]
    same = paired_bootstrap(a, a, metric=f1, num=50)
    assert (same.value, same.interval, same.is_told) == (0.0, (0.0, 0.0), False)
    by_function, by_name = (paired_bootstrap(a, b, metric=each, num=2000) for each in (accuracy, "accuracy"))
    assert_allclose(by_function.interval, by_name.interval, atol=0.015)  # of a deviation of 0.05
    with pytest.raises(ValueError, match="one class table"):
        paired_bootstrap(a, outcomes(4, 2.0, classes=("cow", "ant", "bee")), metric=f1, num=2)


def test_an_interval_leaves_out_nothing_as_often_as_it_says() -> None:
    """Of two equally good models, in 5 % of trials; 400 trials are uncertain by 1.1 points."""
    random, told, significant = np.random.default_rng(5), 0, 0
    for trial in range(400):
        a, b = random.random((2, 200)) < 0.8
        told += bootstrapped(a.astype(float), b.astype(float), num=1000, seed=trial).is_told
        significant += McNemar.of(a, b).p <= 0.05
    assert 0.02 < told / 400 < 0.09
    assert significant / 400 <= 0.05 + 0.022  # an exact test errs on the safe side


def test_outcomes_of_different_images_labels_or_tasks_are_refused_by_name() -> None:
    a = outcomes(1, 1.0)
    with pytest.raises(ValueError, match=r"of different images: only one of them has 119\. Models compare on the same"):
        mcnemar(a, outcomes(2, 1.0, order=range(119)))
    changed = pixels(COUNT)
    changed[7] = 0
    names = [CLASSES[place] for place in a.targets.tolist()]
    other = ImageSet.from_arrays(changed, names, classes=CLASSES)
    with pytest.raises(ValueError, match=r"1 of the 120 images have another content in the second \(first: 7\)"):
        mcnemar(a, Outcomes.of(other, torch.zeros(COUNT, 3), torch.from_numpy(a.targets), a.probabilities))
    names[5] = CLASSES[(CLASSES.index(names[5]) + 1) % 3]
    other = ImageSet.from_arrays(pixels(COUNT), names, classes=CLASSES)
    assert other.targets is not None
    said = Outcomes.of(other, torch.zeros(COUNT, 3), torch.from_numpy(np.array(other.targets)), a.probabilities)
    with pytest.raises(ValueError, match=r"1 of the 120 images have another label in the second \(first: 5\)"):
        paired_bootstrap(a, said)
    numbers = ImageSet.from_arrays(pixels(2), [1.0, 2.0], task="regression")
    logits = torch.zeros(2, 1)
    regression = Outcomes.of(numbers, logits, torch.tensor([[1.0], [2.0]]), logits.double().numpy())
    with pytest.raises(ValueError, match="labelled for single, the other for regression"):
        paired_bootstrap(a, regression)
    assert paired_bootstrap(regression, regression).value == 0
    with pytest.raises(ValueError, match="metric is 'f1'; expected accuracy, loss or a function"):
        paired_bootstrap(a, a, metric="f1")  # type: ignore[arg-type]
    for wrong in ({"num": 0}, {"confidence": 1.0}):
        with pytest.raises(ValueError, match="expected"):
            paired_bootstrap(a, a, **wrong)


# ---- saved runs


def saved(folder: Path, images: ImageSet, *, lr: float, store: FeatureStore | None = None, seed: int = 0) -> Learner:
    learn = Learner(staged(), images, store, head="linear", quiet=True, device="cpu", seed=seed)
    learn.fit(1, lr=lr)
    learn.save(folder)
    return learn


def test_two_runs_are_compared_by_their_tables_as_their_outcomes_are(run: Run, here: Path) -> None:
    images = arrays(60).split(valid=0.5)
    a, b = saved(here / "a", images, lr=1e-4), saved(here / "b", images, lr=1e-2, seed=1)
    first, second = a.outcomes(), b.outcomes()
    test, difference = mcnemar(first, second), paired_bootstrap(first, second)
    found = run("featstore-train", "versus", "a", "b", "--json").json
    assert found == {
        "a": "a",
        "b": "b",
        "images": 30,
        "scores": {"a": first.is_right.mean(), "b": second.is_right.mean()},
        "difference": difference.value,
        "interval": [*difference.interval],
        "mcnemar": {"only_a": test.only_a, "only_b": test.only_b, "p": test.p},
        "is_told": False,
    }
    for names in (("a", "b"), ("b", "a")):
        ran = run("featstore-train", "versus", *names)
        backward = difference if names == ("a", "b") else paired_bootstrap(second, first)
        assert ran.out == f"{verdict(names, backward, test)}\n"
    same = run("featstore-train", "versus", "a", "a").out
    assert same == (
        "a and a can't be told apart on the same 30 images: they score the same (95 % interval 0.0 to 0.0, McNemar "
        "p 1)\n"
    )


def test_a_verdict_names_the_better_one_and_says_whether_it_can_be_told() -> None:
    random = np.random.default_rng(0)
    poor, good = (random.random((2, 812)) < [[0.8], [0.9]]).astype(float)
    told, backward = bootstrapped(poor, good), bootstrapped(good, poor)
    test = McNemar.of(poor == 1, good == 1)
    low, high = (f"{100 * end:.1f}" for end in told.interval)
    assert verdict(("runs/a", "runs/b"), told, test) == (
        f"runs/b is better than runs/a by {100 * told.value:.1f} points (95 % interval {low} to {high}, McNemar p "
        f"{test.p:.2g}) on the same 812 images"
    )
    low, high = (f"{-100 * end:.1f}" for end in reversed(backward.interval))
    assert verdict(("runs/b", "runs/a"), backward, test).startswith(
        f"runs/b is better than runs/a by {100 * told.value:.1f} points (95 % interval {low} to {high}, "
    )
    few = bootstrapped(poor[:20], good[:20])
    words = verdict(("a", "b"), few, McNemar.of(poor[:20] == 1, good[:20] == 1))
    low, high = (f"{100 * end:.1f}" for end in few.interval)
    assert few.value > 0
    assert words.startswith(
        f"a and b can't be told apart on the same 20 images: b scores higher by {100 * few.value:.1f} points, which "
        f"may be chance (95 % interval {low} to {high}, McNemar p "
    )
    assert "better" not in words
    same = verdict(("a", "b"), bootstrapped(poor, poor), McNemar.of(poor == 1, poor == 1))
    assert "812 images: they score the same (95 % interval 0.0 to 0.0, McNemar p 1)" in same
    # Where test and interval disagree nothing is told: the interval of few images is too narrow.
    a, b = np.zeros(20), np.array([1.0] * 5 + [0.0] * 15)
    test = McNemar.of(a == 1, b == 1)
    assert (bootstrapped(a, b).is_told, test.p) == (True, 0.0625)
    assert verdict(("a", "b"), bootstrapped(a, b), test).startswith("a and b can't be told apart")
    assert verdict(("a", "b"), bootstrapped(a, b), None).startswith("b is better than a by 25.0 points")


def test_of_two_runs_the_one_that_learned_the_opposite_is_the_worse(run: Run, here: Path) -> None:
    shown = pixels(80)
    shown[1::2] //= 8  # what a head can learn
    images = ImageSet.from_arrays(shown, [place % 2 for place in range(80)]).split(valid=0.5)
    learn = saved(here / "good", images, lr=1e-2)
    with torch.no_grad():
        for each in learn.model.stages[-1].parameters():
            each.neg_()
    learn.save(here / "poor")
    assert run("featstore-train", "versus", "poor", "good").out.startswith("good is better than poor by ")
    assert run("featstore-train", "versus", "poor", "good", "--json").json["is_told"] is True


@pytest.mark.parametrize(
    ("task", "labels"),
    [("multi", [["a;b", "=c"], ["a", "b"], [], ["b", "=c"]] * 6), ("regression", [1.5, -2.0, 0.25, 4.0] * 6)],
)
def test_several_labels_and_numbers_are_compared_too(run: Run, here: Path, task: Any, labels: list[Any]) -> None:
    images = ImageSet.from_arrays(pixels(24), labels, task=task).split(valid=0.5)
    learners = [saved(here / name, images, lr=lr) for name, lr in (("a", 1e-4), ("b", 1e-2))]
    found = run("featstore-train", "versus", "a", "b", "--json").json
    scores = []
    for learn in learners:
        said = learn.outcomes()
        if task == "multi":
            scores.append(((said.probabilities >= 0.5) == (said.targets > 0)).mean())
        else:
            scores.append(-((said.probabilities - said.targets) ** 2).mean())
    assert found["mcnemar"] is None
    assert_allclose([found["scores"]["a"], found["scores"]["b"]], scores, rtol=1e-6)  # a table has 8 digits
    shown = run("featstore-train", "versus", "a", "b").out
    assert ("McNemar" in shown, "of mean squared error" in shown) == (False, task == "regression")


def test_labels_of_tables_without_quotes_are_read_where_they_can_be_read_in_one_way() -> None:
    classes = ["a", "a;b", "b", "c"]
    cells = ['"a;b";"c"', '"a";"b"', "a;b;b;c", "c", ""]
    read = [{"a;b", "c"}, {"a", "b"}, {"a;b", "b", "c"}, {"c"}, set()]
    assert [scored_table._labels(cell, classes) for cell in cells] == read
    assert scored_table._labels("'=d;e", ["0", "=d", "e"]) == {"=d", "e"}  # as a spreadsheet takes it for text
    with pytest.raises(ValueError, match="the labels 'a;b' can be read in 2 ways"):
        scored_table._labels("a;b", classes)


def test_runs_that_were_scored_on_other_images_or_do_not_say_on_which_are_refused(run: Run, here: Path) -> None:
    saved(here / "a", arrays(24).split(valid=0.25), lr=1e-3)
    saved(here / "b", arrays(24).split(valid=0.25, seed=1), lr=1e-3)
    ran = run("featstore-train", "versus", "a", "b")
    assert (ran.code, ran.out) == (1, "")
    assert "a was scored on 6 images (digest " in ran.last_words
    assert "images or labels differ, so the two don't compare" in ran.last_words
    with pytest.raises(FeatureStoreError, match="doesn't say what it predicted for which labelled images"):
        ScoredTable.read(OLD)
    table = here / "a" / "valid_predictions.csv"
    table.write_text(table.read_text().replace("0", "1"))
    with pytest.raises(DamagedFileError, match="isn't the file that was saved"):
        ScoredTable.read(here / "a")


def test_a_head_that_diverged_has_scores_of_nan_and_predicts_nothing(run: Run, here: Path) -> None:
    learn = saved(here / "good", arrays(24).split(valid=0.25), lr=1e-3)
    with torch.no_grad():
        for each in learn.model.stages[-1].parameters():
            each.fill_(math.nan)
    assert math.isnan(learn.evaluate()["accuracy"])
    said = r"Some logits aren't finite, those of 6 of 6 images, so they predict nothing\. Train the model again"
    with pytest.raises(ValueError, match=said):
        learn.outcomes()
    with pytest.raises(ValueError, match=said):
        learn.predict(learn.images.valid)
    learn.save(here / "nan")
    assert math.isnan(Learner.load(here / "nan", learn.images, module=staged()).evaluate()["accuracy"])
    ran = run("featstore-train", "versus", "nan", "good")
    assert (ran.code, ran.out) == (1, "")
    assert "nan doesn't say what it predicted for which labelled images" in ran.last_words
    assert "its logits weren't finite" in ran.last_words
    with pytest.raises(ValueError, match="Some logits aren't finite"):
        write_csv(here / "table.csv", ["x"], np.array([[math.nan, 0.5]]), ("a", "b"), "single")
    assert not (here / "table.csv").exists()


def test_two_runs_are_compared_without_torch(new_processes: Processes, tmp_path: Path) -> None:
    images = arrays(24).split(valid=0.25)
    for name in "ab":
        saved(tmp_path / name, images, lr=1e-3)
    program = """
        import sys
        from training.cli.app import main
        code = main(["versus", "a", "b"])
        print("\\n", code, *sorted({"torch", "sklearn", "pandas", "PIL"} & {*sys.modules}))
    """
    assert new_processes.answer(program, cwd=tmp_path).splitlines()[-1].split() == ["0"]
