import math

import numpy as np
import pytest
import torch
from scipy.stats import binomtest, ttest_1samp  # type: ignore[import-untyped]
from sklearn.metrics import accuracy_score, average_precision_score, f1_score, top_k_accuracy_score
from support.processes import Processes
from torch import Tensor, nn

from training.scores import metrics


def single_label_rows(num_rows: int = 200, num_classes: int = 7, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(num_classes, (num_rows,), generator=generator)
    logits = torch.randn(num_rows, num_classes, generator=generator)
    logits[torch.arange(num_rows), targets] += 1
    return logits, targets


def multi_label_rows(num_rows: int = 200, num_classes: int = 5, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    targets = (torch.rand(num_rows, num_classes, generator=generator) < 0.3).float()
    logits = torch.randn(num_rows, num_classes, generator=generator) + targets
    return logits, targets


def test_accuracy_is_fastais_golden_half() -> None:
    probabilities = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4], [0.3, 0.7]])
    assert metrics.accuracy(probabilities, torch.tensor([0, 1, 1, 0])) == 0.5


def test_single_label_scores_equal_scikit_learns() -> None:
    logits, targets = single_label_rows()
    predictions = logits.argmax(dim=1)
    assert metrics.accuracy(logits, targets) == accuracy_score(targets, predictions)
    for k in (1, 3, 5, 6):
        expected = top_k_accuracy_score(targets, logits.numpy(), k=k, labels=range(7))
        assert metrics.top_k_accuracy(logits, targets, k=k) == expected
    averages: tuple[metrics.Average, ...] = ("macro", "micro", "weighted")
    for average in averages:
        assert metrics.f1(logits, targets, average) == f1_score(targets, predictions, average=average)


def test_the_calibration_error_is_that_of_bins_by_hand() -> None:
    logits, targets = single_label_rows()
    sure, taken = torch.softmax(logits.double(), 1).max(1)
    expected = 0.0
    for number in range(15):
        inside = (sure > number / 15) & (sure <= (number + 1) / 15)
        if inside.any():
            gap = (taken == targets)[inside].double().mean() - sure[inside].mean()
            expected += float(gap.abs()) * int(inside.sum()) / len(sure)
    assert metrics.expected_calibration_error(logits, targets) == pytest.approx(expected, rel=1e-12)
    assert metrics.expected_calibration_error(1e6 * logits, logits.argmax(1)) == 0
    assert math.isnan(metrics.expected_calibration_error(torch.full((2, 3), math.nan), torch.tensor([0, 1])))
    with pytest.raises(ValueError, match="bins is 0"):
        metrics.expected_calibration_error(logits, targets, bins=0)


def test_multi_label_scores_equal_scikit_learns() -> None:
    logits, targets = multi_label_rows()
    probabilities = torch.sigmoid(logits)
    expected = average_precision_score(targets.numpy(), probabilities.numpy(), average="macro")
    assert metrics.mean_average_precision(logits, targets) == pytest.approx(expected, abs=1e-12)
    assert metrics.f1_multi(logits, targets) == f1_score(targets, probabilities >= 0.5, average="macro")
    assert metrics.f1_multi(logits, targets, "micro", 0.3) == f1_score(targets, probabilities >= 0.3, average="micro")


def test_scores_are_over_all_rows_not_means_over_batches() -> None:
    logits, targets = single_label_rows(num_rows=64)
    halves = [metrics.f1(logits[rows], targets[rows]) for rows in (slice(0, 8), slice(8, 64))]
    whole = metrics.f1(logits, targets)
    assert whole == f1_score(targets, logits.argmax(dim=1), average="macro")
    assert whole != pytest.approx((8 * halves[0] + 56 * halves[1]) / 64, abs=1e-3)


def test_top_1_accuracy_is_accuracy_also_with_ties() -> None:
    logits, targets = single_label_rows(num_rows=500, num_classes=40)
    tied = logits.round()
    assert metrics.top_k_accuracy(tied, targets, k=1) == metrics.accuracy(tied, targets)


def test_equal_logits_earn_only_the_first_classes() -> None:
    assert metrics.top_k_accuracy(torch.zeros(10, 10), torch.arange(10), k=3) == 0.3


@pytest.mark.parametrize("k", [0, 7, 8])
def test_top_k_refuses_a_k_that_says_nothing(k: int) -> None:
    logits, targets = single_label_rows()
    with pytest.raises(ValueError, match=f"k is {k} with 7 classes"):
        metrics.top_k_accuracy(logits, targets, k=k)


def test_a_class_absent_from_the_rows_shifts_and_lowers_nothing() -> None:
    logits, targets = single_label_rows(num_classes=4)
    logits[:, 2] -= 100
    kept = targets != 2
    logits, targets = logits[kept], targets[kept]
    without_class = logits[:, [0, 1, 3]]
    renumbered = torch.tensor([0, 1, -1, 2])[targets]
    assert metrics.accuracy(logits, targets) == metrics.accuracy(without_class, renumbered)
    assert metrics.f1(logits, targets) == metrics.f1(without_class, renumbered)


def test_multi_label_classes_without_positives_are_left_out() -> None:
    logits, targets = multi_label_rows()
    logits[:, 3] -= 100
    targets[:, 3] = 0
    others = [0, 1, 2, 4]
    assert metrics.mean_average_precision(logits, targets) == metrics.mean_average_precision(
        logits[:, others], targets[:, others]
    )
    assert metrics.f1_multi(logits, targets) == metrics.f1_multi(logits[:, others], targets[:, others])


def test_multi_label_scores_of_a_single_class_are_its_own() -> None:
    logits, targets = multi_label_rows(num_classes=1)
    expected = average_precision_score(targets[:, 0], logits[:, 0])
    assert metrics.mean_average_precision(logits, targets) == expected
    assert metrics.f1_multi(logits, targets) == f1_score(targets[:, 0], logits[:, 0] >= 0, average="binary")


@pytest.mark.parametrize("num_classes", [1, 3])
def test_multi_label_scores_of_no_occurring_class_are_nan(num_classes: int) -> None:
    logits, targets = multi_label_rows(num_classes=num_classes)
    assert math.isnan(metrics.mean_average_precision(logits, torch.zeros_like(targets)))
    assert math.isnan(metrics.f1_multi(logits - 100, torch.zeros_like(targets)))


def test_average_precision_ranks_logits_that_a_sigmoid_rounds_to_one() -> None:
    logits, targets = torch.tensor([[300.0], [200.0], [100.0]]), torch.tensor([[1.0], [0.0], [0.0]])
    assert torch.equal(torch.sigmoid(logits.double()), torch.ones(3, 1, dtype=torch.float64))
    assert metrics.mean_average_precision(logits, targets) == 1.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_metrics_take_every_float_dtype_and_graph_tensors(dtype: torch.dtype) -> None:
    logits, targets = single_label_rows()
    rounded = logits.to(dtype).requires_grad_()
    for metric in metrics.default_metrics("single", 7).values():
        assert metric(rounded, targets) == metric(rounded.detach().double(), targets)
    logits, n_hot = multi_label_rows()
    rounded = logits.to(dtype).requires_grad_()
    for metric in metrics.default_metrics("multi", 5).values():
        assert metric(rounded, n_hot) == metric(rounded.detach().double(), n_hot.to(torch.uint8))


def test_a_diverged_model_has_no_score() -> None:
    for task, rows in (("single", single_label_rows()), ("multi", multi_label_rows())):
        logits, targets = rows
        logits[3, 1] = math.nan
        for metric in metrics.default_metrics(task, 7).values():
            assert math.isnan(metric(logits, targets))


def test_default_metrics_by_task() -> None:
    assert list(metrics.default_metrics("single", 5)) == ["accuracy", "f1"]
    assert list(metrics.default_metrics("single", 6)) == ["accuracy", "top5", "f1"]
    assert list(metrics.default_metrics("multi", 80)) == ["map", "f1"]
    with pytest.raises(ValueError, match="'ranking' is unknown; pass one of single, multi, regression"):
        metrics.default_metrics("ranking", 5)


def test_loss_is_torchs_criterion_of_the_task() -> None:
    logits, targets = single_label_rows()
    assert torch.equal(metrics.loss("single")(logits, targets), nn.CrossEntropyLoss()(logits, targets))
    logits, n_hot = multi_label_rows()
    assert torch.equal(metrics.loss("multi")(logits, n_hot), nn.BCEWithLogitsLoss()(logits, n_hot))
    with pytest.raises(ValueError, match="'both' is unknown; pass one of single, multi"):
        metrics.loss("both")


def test_unlabelled_rows_and_foreign_classes_are_refused() -> None:
    logits, targets = single_label_rows()
    with pytest.raises(ValueError, match=r"reach from -1 to 6; with 7 classes they lie in 0 to 6"):
        metrics.accuracy(logits, torch.cat([torch.tensor([-1]), targets[1:]]))
    with pytest.raises(ValueError, match="reach from 0 to 6; with 6 classes"):
        metrics.f1(logits[:, :6], targets)
    logits, n_hot = multi_label_rows()
    with pytest.raises(ValueError, match="reach from -1 to 1; n-hot targets are 0 and 1"):
        metrics.mean_average_precision(logits, torch.cat([-torch.ones(1, 5), n_hot[1:]]))


def test_metrics_of_the_other_task_are_refused() -> None:
    logits, targets = single_label_rows()
    with pytest.raises(ValueError, match="use the metrics of the task single"):
        metrics.f1_multi(logits, targets)
    logits, n_hot = multi_label_rows()
    with pytest.raises(ValueError, match="use the metrics of the task multi"):
        metrics.accuracy(logits, n_hot)
    with pytest.raises(ValueError, match=r"torch.float32 of shape \(200,\)"):
        metrics.accuracy(logits, n_hot[:, 0])


def test_no_rows_and_unknown_averages_are_refused() -> None:
    logits, targets = single_label_rows()
    with pytest.raises(ValueError, match="at least one row"):
        metrics.accuracy(logits[:0], targets[:0])
    with pytest.raises(ValueError, match="'samples' is unknown; pass one of macro, micro, weighted"):
        metrics.f1(logits, targets, average="samples")  # type: ignore[arg-type]


@pytest.mark.parametrize(("correct", "total"), [(0, 4), (4, 4), (3, 4), (765, 812), (1, 100_000)])
@pytest.mark.parametrize("confidence", [0.95, 0.5])
def test_wilson_interval_equals_scipys(correct: int, total: int, confidence: float) -> None:
    expected = binomtest(correct, total).proportion_ci(confidence, method="wilson")
    low, high = metrics.wilson_interval(correct, total, confidence)
    np.testing.assert_allclose((low, high), (expected.low, expected.high), rtol=1e-12, atol=1e-15)


def test_wilson_interval_ends_exactly_at_none_and_all() -> None:
    for total in range(1, 200):
        assert metrics.wilson_interval(0, total)[0] == 0.0
        assert metrics.wilson_interval(total, total)[1] == 1.0


def test_wilson_interval_refuses_what_is_no_proportion() -> None:
    for correct, total in ((5, 4), (-1, 4), (0, 0)):
        with pytest.raises(ValueError, match=f"{correct} of {total} is no proportion"):
            metrics.wilson_interval(correct, total)
    with pytest.raises(ValueError, match="confidence is 95"):
        metrics.wilson_interval(1, 2, confidence=95)


def test_importing_metrics_does_not_wait_for_scikit_learn(new_processes: Processes) -> None:
    assert new_processes.answer("import sys, training.scores.metrics; print('sklearn' in sys.modules)") == "False"


def test_students_interval_stays_within_what_a_score_can_be() -> None:
    for name in ("accuracy", "top5", "f1", "map", "calibration_error"):
        assert metrics.student_interval(name, [0.9, 1.0, 1.0])[1] == 1
        assert metrics.student_interval(name, [0.0, 0.1, 0.0])[0] == 0
    assert metrics.student_interval("r2", [0.0, -0.5])[0] < -1  # R2 has no least value
    assert metrics.student_interval("r2", [0.9, 1.0, 1.0])[1] == 1
    assert metrics.student_interval("rmse", [0.0, 0.1, 4.0])[0] == 0
    ends = ttest_1samp([0.0, 0.1, 4.0], 0).confidence_interval(0.9)
    assert metrics.student_interval("loss", [0.0, 0.1, 4.0], 0.9) == pytest.approx((ends.low, ends.high))
    assert all(map(math.isnan, metrics.student_interval("map", [0.5, math.nan])))
