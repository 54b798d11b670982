"""Outcomes: the tables that scikit-learn makes of the same numbers, and images in the order of how wrong they are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from sklearn.metrics import classification_report, confusion_matrix, f1_score
from support.tiny import photos, staged
from torch.nn import functional as F

from featstore import ImageSet
from featstore.images.names import Task
from training import Learner, Outcomes
from training.predict import probabilities
from training.scores.metrics import f1_multi

CLASSES = ("ant", "bee", "$cow$")


def of(task: Task, logits: torch.Tensor, targets: torch.Tensor) -> Outcomes:
    pixels = np.random.default_rng(0).integers(0, 256, (len(logits), 12, 12, 3), dtype=np.uint8)
    classes = CLASSES[: logits.shape[1]]
    images = ImageSet.from_arrays(pixels, targets.numpy(), classes=classes, task=task)
    assert images.task == task
    return Outcomes.of(images, logits, targets, probabilities(logits, task), staged().view)


@pytest.fixture(scope="module")
def single() -> Outcomes:
    generator = torch.Generator().manual_seed(3)
    targets = torch.randint(0, 3, (60,), generator=generator)
    return of("single", torch.randn(60, 3, generator=generator) + F.one_hot(targets, 3), targets)


def test_a_confusion_matrix_and_scores_by_class_are_those_of_scikit_learn(single: Outcomes) -> None:
    expected = confusion_matrix(single.targets, single.probabilities.argmax(1))
    assert_array_equal(single.confusion(), expected)
    pairs = single.most_confused(least=2)
    assert [count for *_, count in pairs] == sorted((count for *_, count in pairs), reverse=True)
    assert all(expected[CLASSES.index(actual), CLASSES.index(taken)] == count >= 2 for actual, taken, count in pairs)
    assert sum(count for *_, count in single.most_confused()) == expected.sum() - np.trace(expected)
    report = classification_report(
        single.targets, single.predicted, target_names=CLASSES, output_dict=True, zero_division=0
    )
    for name, row in single.by_class().items():
        assert row == {column.removesuffix("-score"): value for column, value in report[name].items()}


def test_a_class_that_nothing_is_of_has_a_row_all_the_same() -> None:
    found = of("single", torch.eye(3)[[0, 0, 1]] * 9, torch.tensor([0, 1, 1]))
    assert_array_equal(found.confusion(), [[1, 0, 0], [1, 1, 0], [0, 0, 0]])
    assert found.most_confused() == [("bee", "ant", 1)]
    assert found.by_class()["$cow$"] == {"precision": 0, "recall": 0, "f1": 0, "support": 0}


def test_images_are_ordered_by_their_loss_and_by_how_sure_the_model_is(single: Outcomes) -> None:
    logits = torch.from_numpy(single.probabilities).log()
    assert_allclose(single.losses, F.cross_entropy(logits, torch.from_numpy(single.targets), reduction="none"))
    assert_array_equal(single.losses[single.places()], np.sort(single.losses)[::-1])
    sure = single.probabilities.max(1)
    assert_array_equal(sure[single.places("uncertain")], np.sort(sure))
    wrong = single.places("sure", is_right=False)
    assert_array_equal(sure[wrong], np.sort(sure[~single.is_right])[::-1])
    first = int(wrong[0])
    actual, taken = CLASSES[single.targets[first]], CLASSES[single.predicted[first]]
    assert single.words(first) == f"{taken} for {actual}, {sure[first]:.2f}, loss {single.losses[first]:.3g}"
    with pytest.raises(ValueError, match=r"no order\. Expected loss, uncertain or sure"):
        single.places("worst")  # type: ignore[arg-type]


def test_the_calibration_error_is_how_far_shares_lie_from_probabilities() -> None:
    sure = np.log([[0.8, 0.1, 0.1]] * 10 + [[0.05, 0.55, 0.4]] * 10)
    targets = torch.tensor([0] * 7 + [1] * 3 + [1] * 10)
    found = of("single", torch.from_numpy(sure), targets)
    assert_allclose(found.calibration_error(10), 0.5 * abs(0.7 - 0.8) + 0.5 * abs(1.0 - 0.55))
    assert_allclose(found.calibration_error(1), abs(0.85 - 0.675))


def test_several_labels_and_numbers_have_losses_and_what_is_theirs() -> None:
    generator = torch.Generator().manual_seed(1)
    logits, labels = torch.randn(8, 3, generator=generator), torch.randint(0, 2, (8, 3), generator=generator)
    many = of("multi", logits, labels)
    expected = F.binary_cross_entropy_with_logits(logits.double(), labels.double(), reduction="none").mean(1)
    assert_allclose(many.losses, expected)
    report = classification_report(labels, logits > 0, target_names=CLASSES, output_dict=True, zero_division=0)
    assert many.by_class()["bee"]["f1"] == report["bee"]["f1-score"]
    undecided = of("multi", torch.zeros(len(labels), 3), labels)  # a probability of 0.5 counts, as in the F1 on record
    by_class = [each["f1"] for each in undecided.by_class().values()]
    assert f1_multi(torch.zeros(len(labels), 3), labels) == pytest.approx(np.mean(by_class))
    one = of("multi", logits[:, :1], labels[:, :1])
    column = report["ant"]
    assert one.by_class()["ant"] == {name.removesuffix("-score"): value for name, value in column.items()}
    numbers = of("regression", logits, labels.double() * 2.5)
    assert_allclose(numbers.losses, ((logits.double() - labels * 2.5) ** 2).mean(1))
    for found in (many, numbers):
        with pytest.raises(ValueError, match="of images with one class each"):
            found.confusion()
    with pytest.raises(ValueError, match="are of labels, and these images have numbers"):
        numbers.by_class()


def test_thresholds_are_those_of_the_highest_f1_of_each_class(single: Outcomes) -> None:
    generator = torch.Generator().manual_seed(5)
    labels = torch.randint(0, 2, (40, 3), generator=generator)
    labels[:, 2] = 0
    found = of("multi", torch.randn(40, 3, generator=generator) + labels - 1, labels)
    thresholds = found.thresholds()
    assert thresholds["$cow$"] == 0.5  # no image has it
    scores = found.by_class(thresholds)
    for place, name in enumerate(CLASSES[:2]):
        said = found.probabilities[:, place]
        best = max(f1_score(labels[:, place], said >= least) for least in said)
        assert scores[name]["f1"] == pytest.approx(best, rel=1e-12)
        assert scores[name]["f1"] > found.by_class()[name]["f1"]
    with pytest.raises(ValueError, match="Thresholds are of several labels an image"):
        single.thresholds()
    for outcomes, given in ((single, thresholds), (found, {"ant": 0.5})):
        with pytest.raises(ValueError, match="expected one of each class, ant, bee"):
            outcomes.by_class(given)


def test_the_plots_show_the_counts_and_the_very_images(single: Outcomes) -> None:
    axes = single.plot_confusion()
    assert_array_equal(np.asarray(axes.get_images()[0].get_array()), single.confusion())
    assert [text.get_text() for text in axes.texts] == [str(count) for count in single.confusion().ravel()]
    view = staged().view
    figure = single.plot_samples(num_images=5)
    panels = figure.get_axes()
    places = single.places()[:5]
    for panel, place in zip(panels, places.tolist(), strict=False):
        pixels = torch.from_numpy(np.array(single.images.read(place))).permute(2, 0, 1)
        expected = view.evaluation.render(pixels, b"").permute(1, 2, 0).numpy()
        assert_array_equal(np.asarray(panel.get_images()[0].get_array()), expected)
        assert panel.get_title() == f"{single.images.ids[place]}\n{single.words(place)}"
    assert sum(bool(panel.get_images()) for panel in panels) == 5
    figure._repr_png_()  # names with a $ are drawn as they are
    with pytest.raises(ValueError, match="no such image to show"):
        single.plot_samples(num_images=0)


def test_a_learner_gives_the_outcomes_of_what_it_can_read_and_says_what_evaluate_says(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = photos(tmp_path / "photos")
    images = ImageSet.from_folder(root).split(valid=0.5, seed=0)
    learn = Learner(staged(), images, on_error="skip", device="cpu")
    gone = images.valid.ids[0]
    (root / gone).write_bytes(b"none")
    learn.images = ImageSet.from_folder(root).with_splits(images.splits)
    found = learn.outcomes()
    capsys.readouterr()
    assert found.images.ids == images.valid.ids[1:]
    scores = learn.evaluate()
    said = capsys.readouterr().err
    learn.outcomes()
    assert said == capsys.readouterr().err
    assert "can't be read, left out" in said
    assert_allclose([found.is_right.mean(), found.losses.mean()], [scores["accuracy"], scores["loss"]], rtol=1e-6)
