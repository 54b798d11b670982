"""Few shots: draws are nested and fair, and curves are what the probes come to on those rows by themselves."""

from __future__ import annotations

import csv
import math
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import sem, t  # type: ignore[import-untyped]
from sklearn.linear_model import LogisticRegression
from sklearn.naive_bayes import GaussianNB
from support.programs import Run, extract_flags
from support.tiny import arrays, staged

from featstore import FeatureStore, ImageSet, StagedModel, backbone, extract
from featstore.errors import FeatureStoreError
from training import Learner, RidgeProbe, choices, compare, few_shot, k_shot, learning_curve
from training.experiments import shots
from training.experiments.shots import CurvePoint

NUM_IMAGES = 60


def labelled(labels: list[Any], **options: Any) -> ImageSet:
    return ImageSet.from_arrays(np.zeros((len(labels), 4, 4), np.uint8), labels, **options)


@pytest.fixture(scope="module")
def model() -> StagedModel:
    return staged()


@pytest.fixture(scope="module")
def images() -> ImageSet:
    """Two classes that features tell apart somewhat: the images of one are brighter."""
    pictures = np.stack([arrays(NUM_IMAGES).read(place) for place in range(NUM_IMAGES)]).astype(np.float64)
    classes = np.arange(NUM_IMAGES) % 2
    bright = pictures * (0.8 + 0.2 * classes[:, None, None, None])
    return ImageSet.from_arrays(bright.astype(np.uint8), classes).split(valid=0.4)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, model: StagedModel, images: ImageSet) -> FeatureStore:
    store = FeatureStore(tmp_path_factory.mktemp("few") / "features")
    extract(model, images, store, cuts=["layer2:avg"])
    return store


def rows(store: FeatureStore, images: ImageSet) -> tuple[NDArray[Any], NDArray[Any]]:
    features = store.features(images, store.sets()[0])
    assert features.targets is not None
    return np.asarray(features), features.targets


# ---------------------------------------------------------------------------------------------------------- the draws


def test_a_draw_has_as_many_of_each_class_and_larger_ones_hold_smaller_ones() -> None:
    images = labelled(["a"] * 40 + ["b"] * 25 + ["c"] * 15).split(valid=0.2)
    drawn = {number: k_shot(images, number, seed=3) for number in (1, 2, 4, 12)}
    for number, chosen in drawn.items():
        assert chosen.train.targets is not None
        assert np.bincount(chosen.train.targets).tolist() == [number] * 3
        assert chosen.valid.ids == images.valid.ids
        assert {*chosen.train.ids} <= {*images.train.ids}
    for few, many in [(1, 2), (2, 4), (4, 12)]:
        assert {*drawn[few].train.ids} < {*drawn[many].train.ids}
    assert k_shot(images, 4, seed=3).ids == drawn[4].ids
    assert k_shot(images, 4, seed=4).ids != drawn[4].ids


def test_a_draw_depends_on_the_images_and_not_on_their_order() -> None:
    images = labelled(["a", "b"] * 30)
    order = np.random.default_rng(0).permutation(60)
    assert {*k_shot(images, 5).ids} == {*k_shot(images.select(order), 5).ids}
    fewer = images.select(np.arange(50))
    assert len({*k_shot(images, 5).ids} & {*k_shot(fewer, 5).ids}) >= 6  # a sixth of the images is new


def test_each_image_is_as_likely_to_be_drawn() -> None:
    images = labelled(["a", "b"] * 10)
    counts = np.zeros(20)
    for seed in range(400):
        counts[[int(name) for name in k_shot(images, 3, seed=seed).ids]] += 1
    assert counts.sum() == 400 * 6
    # 120 each; the standard deviation of a count is 9.2, and twenty of them lie within four.
    assert np.abs(counts - 120).max() < 4 * 9.2


def test_unlabelled_images_are_never_drawn() -> None:
    images = labelled(["a", "b", None, None] * 5)
    assert {int(name) % 4 for name in k_shot(images, 4).ids} == {0, 1}


@pytest.mark.parametrize(
    ("images", "told"),
    [
        (labelled(["a"] * 9 + ["b"] * 3), "b has fewer than 4 images to train on.*up to 3"),
        (labelled([["a"], ["a", "b"]], task="multi"), "expected one class each"),
        (labelled([1.5, 2.5], task="regression"), "expected one class each"),
    ],
)
def test_what_can_not_be_drawn_is_refused(images: ImageSet, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        k_shot(images, 4)


# --------------------------------------------------------------------------------------------------------- the curves


def test_few_shots_are_what_a_probe_comes_to_on_those_rows(
    model: StagedModel, images: ImageSet, store: FeatureStore
) -> None:
    curve = few_shot(model, images, store, shots=(8, 2), repeats=3, seed=5, cut="layer2", reduce="avg")
    assert [(each.shots, each.num_images) for each in curve.points] == [(2, 4), (8, 16)]
    scored, truth = rows(store, images.valid)
    for point in curve.points:
        assert point.shots is not None
        expected = []
        for seed in (5, 6, 7):
            values, targets = rows(store, k_shot(images, point.shots, seed=seed).train)
            expected.append((RidgeProbe().fit(values, targets).predict(scored) == truth).mean())
        assert point.accuracies == tuple(expected)
        middle, half = np.mean(expected), t.ppf(0.975, 2) * sem(expected)
        assert point.interval() == pytest.approx((middle - half, min(1, middle + half)))
    assert curve.num_scored == len(truth) == 24


def test_a_curve_ends_with_all_images_of_which_there_is_one_draw(
    model: StagedModel, images: ImageSet, store: FeatureStore
) -> None:
    options: dict[str, Any] = {"cut": "layer2", "reduce": "avg", "probe": LogisticRegression(max_iter=2000)}
    curve = learning_curve(model, images, store, shares=(0.25, 1), repeats=2, **options)
    assert [(each.shots, each.num_images, len(each.accuracies)) for each in curve.points] == [
        (None, 10, 2),
        (None, 36, 1),
    ]
    values, targets = rows(store, images.train)
    expected = LogisticRegression(max_iter=2000).fit(values, targets).score(*rows(store, images.valid))
    assert curve.points[1].accuracies == (expected,)
    assert curve.points[1].interval() is None
    assert str(curve).splitlines()[-2].split()[-2:] == ["-", "-"]
    assert str(curve).endswith("intervals of 95 % over draws (-: a single draw has none)")
    assert math.isnan(curve.frame()["from"][1])
    curve.plot()


def test_an_interval_stays_within_what_an_accuracy_can_be() -> None:
    near_1, near_0 = (CurvePoint(shots=1, num_images=2, accuracies=each) for each in ((1.0, 0.9, 1.0), (0.0, 0.1, 0.0)))
    half = t.ppf(0.975, 2) * sem(near_1.accuracies)
    assert near_1.interval() == pytest.approx((near_1.mean - half, 1))
    assert near_0.interval() == pytest.approx((0, near_0.mean + half))


@pytest.mark.parametrize("probe", ["ridge", "linear", "knn", "head", GaussianNB()])
def test_each_probe_tells_bright_images_from_dark_ones(
    probe: Any, model: StagedModel, images: ImageSet, store: FeatureStore
) -> None:
    curve = learning_curve(model, images, store, shares=(1,), probe=probe, cut="layer2", reduce="avg")
    assert curve.points[0].mean > 0.7


def test_a_curve_is_a_table_a_frame_and_a_plot(
    model: StagedModel, images: ImageSet, store: FeatureStore, tmp_path: Path
) -> None:
    curve = few_shot(model, images, store, shots=(1, 4), repeats=2, cut="layer2", reduce="avg")
    assert [*curve.frame()] == ["shots", "images", "draws", "accuracy", "from", "to"]
    assert [row["shots"] for row in curve.table] == [1, 4]
    assert str(curve).splitlines()[-1] == ("ridge probe, scored on 24 held-out images; intervals of 95 % over draws")
    assert curve.note is None
    assert "<table" in curve._repr_html_()
    axes = curve.plot()
    assert np.asarray(axes.lines[0].get_xdata()).tolist() == [2, 8]
    assert curve.plot(axes) is axes
    assert len(axes.lines) == 2


def test_what_a_store_lacks_is_said_with_what_to_run(model: StagedModel, images: ImageSet, tmp_path: Path) -> None:
    empty = FeatureStore(tmp_path / "empty")
    with pytest.raises(FeatureStoreError, match="extract"):
        few_shot(model, images, empty, shots=(1,))
    with pytest.raises(ValueError, match="probe is 'svm'; expected one of ridge, linear"):
        few_shot(model, images, empty, probe="svm")
    for odd in (5, (0,), "12", (1.5,), ()):
        with pytest.raises(ValueError, match=r"shots are .*; expected numbers of images a class from 1 on"):
            few_shot(model, images, empty, shots=odd)  # type: ignore[arg-type]
    for shares in (0.5, (0.5, 1.5), "ab", (5, 10)):
        with pytest.raises(ValueError, match=r"shares are .*; expected shares"):
            learning_curve(model, images, empty, shares=shares)  # type: ignore[arg-type]
    for options, told in (
        ({"repeats": 0}, "repeats is 0"),
        ({"repeats": "2"}, "repeats is '2'"),
        ({"seed": "a"}, "seed is 'a'"),
        ({"probe": RidgeProbe}, "expected one of ridge, linear, knn, head, or a classifier"),
    ):
        with pytest.raises((TypeError, ValueError), match=told):
            few_shot(model, images, empty, **options)
    for number in (0, 1.5, "a"):
        with pytest.raises(ValueError, match="shots is"):
            k_shot(images, number)  # type: ignore[arg-type]


def test_images_without_held_out_ones_are_refused(model: StagedModel, images: ImageSet, store: FeatureStore) -> None:
    whole = images.with_splits([""] * NUM_IMAGES)
    with pytest.raises(ValueError, match="expected stored features of the splits train and valid"):
        few_shot(model, whole, store, shots=(1,), cut="layer2", reduce="avg")


def test_copies_that_are_trained_on_and_scored_are_told(
    model: StagedModel, images: ImageSet, store: FeatureStore
) -> None:
    pictures = np.stack([np.asarray(images.read(place)) for place in (0, 1, 2, 3, 0, 1)])
    copied = ImageSet.from_arrays(pictures, [0, 1, 0, 1, 0, 1], splits=["train"] * 4 + ["valid"] * 2)
    told = "2 held-out images are byte for byte the same as images in another split (0 = 4, 1 = 5)"
    for make in (partial(few_shot, shots=(1,)), partial(learning_curve, shares=(1,))):
        curve = make(model, copied, store, cut="layer2", reduce="avg", repeats=1)
        assert told in str(curve).splitlines()[-1]


def test_images_that_a_run_was_trained_on_are_not_scored(here: Path) -> None:
    images = ImageSet.from_folder("photos")
    dealt, other = images.split(valid=0.4, seed=0), images.split(valid=0.4, seed=3)
    model = backbone("tiny.py:make_model")
    learn = Learner(model, dealt, head="linear", quiet=True, device="cpu", workers=0)
    learn.fit(1, lr=1e-3)
    tuned, store = backbone(learn.save("run")), FeatureStore("feats")
    extract(tuned, images, store, cuts=["conv2"])
    options: dict[str, Any] = {"shots": (1,), "cut": "conv2", "repeats": 1}
    few_shot(tuned, images, store, **options)  # undealt images are dealt as the run had them
    count = int(((other.splits == "valid") & (dealt.splits == "train")).sum())
    told = f"{count} of the {len(other.valid)} images"
    with pytest.raises(FeatureStoreError, match=f"Nothing is scored: {told} were trained on by .*run"):
        few_shot(tuned, other, store, **options)
    assert f"{told} were trained on by" in str(few_shot(tuned, other, store, allow_leak=True, **options))
    probed: dict[str, Any] = {"cuts": ["conv2"], "probes": ["ridge"]}
    learn = Learner(model, other, head="linear", quiet=True, device="cpu", workers=0)
    learn.fit(1, lr=1e-3)
    of_other = backbone(learn.save("other"))  # of the same name, and it has not seen these
    for backbones in ([tuned], [tuned, of_other]):
        with pytest.raises(FeatureStoreError, match=f"Nothing is scored: {told} were trained on by .*run"):
            compare(backbones, other, store, **probed)
    assert f"{told} were trained on by" in str(compare([tuned], other, store, allow_leak=True, **probed))
    alone = compare([tuned], images, store, **probed)
    assert (alone.num_images, "different sizes" in str(alone)) == (len(dealt.valid), False)
    both = compare([tuned, model.with_(view=model.view.resized(size=32))], images, store, **probed)
    assert {each.backbone for each in both.entries} == {str(here / "run"), "tiny.py:make_model"}
    assert "images are of different sizes (" in str(both)
    with pytest.raises(TypeError, match="augment is no option of few shots; expected some of cut"):
        few_shot(model, dealt, store, augment=None)


# -------------------------------------------------------------------------------------------------------- the command


def test_the_command_says_what_the_function_does(run: Run, here: Path) -> None:
    assert run("featstore", "extract", *extract_flags("--cut", "pool")).code == 0
    flags = ["few-shot", *extract_flags("--cut", "pool", "--device", "cpu", "--repeats", "2")]
    dealt = ImageSet.from_folder("photos").split(valid=0.2, seed=0)
    model, store = backbone("tiny.py:make_model"), FeatureStore("feats")
    options: dict[str, Any] = {"cut": "pool", "view": model.view.resized(size=32), "repeats": 2}
    expected = few_shot(model, dealt, store, shots=(1, 4), **options)
    asked = [*flags, "--shots", "4,1", "--csv", "few.csv", "--plot", "few.png"]
    assert run("featstore-train", *asked).out == f"{expected}\n"
    with (here / "few.csv").open(newline="", encoding="utf-8") as file:
        assert [float(row["accuracy"]) for row in csv.DictReader(file)] == [each.mean for each in expected.points]
    assert (here / "few.png").stat().st_size > 1_000
    found = run("featstore-train", *flags, "--shares", "0.5,1", "--probe", "knn", "--seed", "3", "--json").json
    curve = learning_curve(model, dealt, store, shares=(0.5, 1), probe="knn", seed=3, **options)
    assert [each["accuracy"] for each in found["points"]] == [each.mean for each in curve.points]
    assert (found["points"][1]["from"], found["images"]) == (None, 4)  # of all images there is a single draw
    for wrong, sentence in (
        (["--shots", "1.5"], "--shots is '1.5'. Expected whole numbers from 1 on"),
        (["--shots", "1", "--shares", "1"], "--shots 1 and --shares 1 both say how many images."),
        (["--probe", "svm"], "--probe is 'svm'. Expected ridge, linear, knn or head."),
        (["--shots", "99"], "have fewer than 99 images to train on"),
    ):
        ran = run("featstore-train", *flags, *wrong)
        assert (ran.code, sentence in ran.last_words) == (2, True), ran.err
    ran = run("featstore-train", *flags, "--cut", "conv1")
    assert (ran.code, "featstore extract --images photos" in ran.err) == (1, True)


def test_the_choices_of_the_command_are_those_of_the_function() -> None:
    assert get_args(shots.ProbeName) == choices.FEW_SHOT_PROBES
