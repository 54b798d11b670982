"""Nearest neighbours are scikit-learn's, also in blocks, and ties fall to smaller numbers."""

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors

from training.solvers.neighbors import KNearest, Metric
from training.solvers.rows import Rows

Floats = NDArray[np.float32]
GIVEN: dict[str, Any] = {"k": 5, "device": "cpu"}


def made(num_rows: int, num_queries: int = 400, width: int = 16) -> tuple[Floats, Floats]:
    rng = np.random.default_rng(0)
    values = rng.standard_normal((num_rows, width), dtype=np.float32) + 1
    return values, rng.standard_normal((num_queries, width), dtype=np.float32) + 1


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("num_rows", [50, 9000])  # one block, and two
def test_neighbors_are_scikit_learns(metric: Metric, num_rows: int) -> None:
    values, queries = made(num_rows)
    distances, found = KNearest(values, k=7, metric=metric, device="cpu").neighbors(queries)
    theirs = NearestNeighbors(n_neighbors=7, metric=metric, algorithm="brute").fit(values.astype(np.float64))
    expected, numbers = theirs.kneighbors(queries.astype(np.float64))
    # Rows of length 1 are rounded to float32, and so are the distances.
    assert distances == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert (found == numbers).mean() > 0.999  # rows whose distances differ by less than that may change places


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_equal_rows_are_in_the_order_of_their_numbers_at_distance_0(metric: Metric) -> None:
    values, _ = made(9000)
    values[[8500, 17, 300, 4]] = values[8192]
    distances, found = KNearest(values, k=5, metric=metric, device="cpu").neighbors(values[8500:8501])
    assert found.tolist() == [[4, 17, 300, 8192, 8500]]
    assert distances.tolist() == [[0] * 5]


@pytest.mark.parametrize("memory_bytes", [None, 0])
@pytest.mark.parametrize("num_rows", [8, 9000])  # few are all candidates
def test_a_row_of_zeros_is_like_none_by_cosine(num_rows: int, memory_bytes: int | None) -> None:
    values, queries = made(num_rows, num_queries=3)
    values[num_rows - 4 :] = 0
    values[: num_rows - 4] *= np.sign(values[: num_rows - 4] @ queries[:1].T) * -1  # all behind the first query
    values[1], queries[1] = values[0], 0
    nearest = KNearest(Rows.of(values, memory_bytes=memory_bytes), k=4, device="cpu")
    distances, found = nearest.neighbors(queries[:2])
    assert found.tolist() == [[*range(num_rows - 4, num_rows)], [0, 1, 2, 3]]
    assert distances.tolist() == [[1.0] * 4] * 2
    distances, found = nearest.neighbors(values, leave_one_out=True)
    assert distances[-1].tolist() == [1.0] * 4
    assert found[-1].tolist() == [0, 1, 2, 3]
    assert (found[0, 0], distances[0, 0]) == (1, 0)
    values[::2], values[1::2] = np.eye(16)[0], 0  # equally near, so that products are taken in float64
    distances, _ = KNearest(values, k=4, device="cpu").neighbors(np.eye(16)[1:2] + 0.2 * np.eye(16)[:1])
    assert distances.max() < 0.9


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_rows_read_again_give_what_rows_in_memory_give(metric: Metric) -> None:
    values, queries = made(9000)
    inside = KNearest(values, k=3, metric=metric, device="cpu").neighbors(queries)
    outside = KNearest(Rows.of(values, memory_bytes=0), k=3, metric=metric, device="cpu").neighbors(queries)
    assert np.array_equal(inside[1], outside[1])
    assert np.array_equal(inside[0], outside[0])


@pytest.mark.parametrize("far", [1e3, 1e4])
@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_neighbors_within_groups_that_lie_far_apart_are_scikit_learns(metric: Metric, far: float) -> None:
    """Products in float32 can't tell rows of one group apart, and would take any of them."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((4, 64)) * far
    values = (centres[rng.integers(0, 4, 2000)] + rng.standard_normal((2000, 64))).astype(np.float32)
    theirs = NearestNeighbors(n_neighbors=5, metric="euclidean", algorithm="brute")
    as_compared = values.astype(np.float64)
    if metric == "cosine":  # whose own cosine distances are 1 less a product, in float64 as well
        as_compared /= np.linalg.norm(as_compared, axis=1, keepdims=True)
    expected = theirs.fit(as_compared).kneighbors(as_compared[:300])[1]
    _, found = KNearest(values, k=5, metric=metric, device="cpu").neighbors(values[:300])
    # The rows that are compared are float32's: of length 1, and 1e-4 apart at 1e4.
    assert (found == expected).mean() > (0.99 if metric == "euclidean" or far < 1e4 else 0.9)


@pytest.mark.parametrize("scale", [1e20, 1e-23])
@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_rows_may_be_of_any_size_that_a_number_can_have(metric: Metric, scale: float) -> None:
    values, queries = made(200)
    _, expected = KNearest(values, k=5, metric=metric, device="cpu").neighbors(queries)
    scaled, asked = (np.float64(scale) * each for each in (values, queries))
    _, found = KNearest(scaled.astype(np.float32), k=5, metric=metric, device="cpu").neighbors(asked.astype(np.float32))
    assert (found == expected).mean() > 0.999  # other last bits of rows


def test_no_row_is_its_own_neighbour_when_left_out() -> None:
    values, _ = made(3000)
    values[7] = values[2500]
    distances, found = KNearest(values, k=4, device="cpu").neighbors(values, leave_one_out=True)
    assert not (found == np.arange(3000)[:, None]).any()
    assert (found[7, 0], distances[7, 0], found[2500, 0]) == (2500, 0, 7)
    _, with_self = KNearest(values, k=5, device="cpu").neighbors(values)
    assert np.array_equal(np.delete(found, [7, 2500], 0), np.delete(with_self, [7, 2500], 0)[:, 1:])


@pytest.mark.parametrize("weights", ["uniform", "distance"])
def test_votes_are_scikit_learns(weights: Any) -> None:
    values, queries = made(500)
    labels = np.random.default_rng(2).choice(["x", "a", "m"], 500)
    queries[0] = values[9]
    ours = KNearest(values, labels, k=6, metric="euclidean", weights=weights, device="cpu")
    theirs = KNeighborsClassifier(6, weights=weights, algorithm="brute").fit(values.astype(np.float64), labels)
    assert ours.classes is not None
    assert ours.classes.tolist() == ["a", "m", "x"]
    # The distances are float32's.
    assert ours.predict_proba(queries) == pytest.approx(theirs.predict_proba(queries.astype(np.float64)), abs=1e-5)
    assert ours.predict(values[9:10])[0] == (labels[9] if weights == "distance" else ours.predict(queries[:1])[0])


def test_a_temperature_weighs_as_in_the_evaluation_of_dino() -> None:
    values, queries = made(500)
    labels = np.random.default_rng(2).integers(0, 3, 500)
    shares = KNearest(values, labels, k=20, weights=0.07, device="cpu").predict_proba(queries)
    rows = torch.nn.functional.normalize(torch.from_numpy(values).double())
    similarities = torch.nn.functional.normalize(torch.from_numpy(queries).double()) @ rows.T
    best, which = similarities.topk(20)
    votes = torch.nn.functional.one_hot(torch.from_numpy(labels)[which], 3) * (best / 0.07).exp()[..., None]
    expected = votes.sum(1) / votes.sum((1, 2))[:, None]
    assert shares == pytest.approx(expected.numpy(), abs=1e-5)  # distances are float32's, divided by 0.07


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"k": 0}, "k is 0"),
        ({"k": 51}, "k is 51; expected 1 to 50"),
        ({"metric": "manhattan"}, "metric is 'manhattan'"),
        ({"weights": "softly"}, "weights is 'softly'"),
        ({"weights": 0.0}, "weights is 0"),
        ({"X": np.full((50, 3), np.nan)}, "Row 0 has nan"),
        ({"y": np.arange(49)}, "49 labels for 50 rows"),
    ],
)
def test_what_has_no_neighbours_is_refused_by_name(change: dict[str, Any], named: str) -> None:
    values, _ = made(50)
    with pytest.raises(ValueError, match=named):
        KNearest(**GIVEN | {"X": values} | change)


def test_queries_that_do_not_fit_are_refused() -> None:
    values, queries = made(50)
    nearest = KNearest(values, k=5, device="cpu")
    with pytest.raises(ValueError, match="Queries hold 3 numbers a row; expected 16"):
        nearest.neighbors(queries[:, :3])
    with pytest.raises(ValueError, match="400 queries and 50 rows"):
        nearest.neighbors(queries, leave_one_out=True)
    with pytest.raises(ValueError, match="no labels"):
        nearest.predict_proba(queries)


@pytest.mark.cuda
def test_a_gpu_finds_the_same_neighbors() -> None:
    values, queries = made(9000)
    here, there = (KNearest(values, k=7, device=device).neighbors(queries) for device in ("cpu", "cuda"))
    assert (here[1] == there[1]).mean() > 0.999  # rows of length 1 may be rounded otherwise
    assert here[0] == pytest.approx(there[0], rel=1e-5, abs=1e-6)
