"""Nearest means and discriminant analysis are scikit-learn's."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.neighbors import NearestCentroid

from training.solvers.class_means import discriminant_analysis, nearest_mean
from training.solvers.rows import Rows


def made(num_rows: int = 300, width: int = 10, num_classes: int = 4) -> tuple[NDArray[np.float32], NDArray[Any]]:
    """Rows of classes of different sizes that overlap, with columns of different spread, far from 0."""
    rng = np.random.default_rng(0)
    labels = rng.choice(num_classes, num_rows, p=np.arange(1, num_classes + 1) / sum(range(1, num_classes + 1)))
    values = rng.standard_normal((num_rows, width)) + rng.standard_normal((num_classes, width))[labels]
    values = values * np.geomspace(3, 0.1, width) @ np.linalg.qr(rng.standard_normal((width, width)))[0] + 20
    return values.astype(np.float32), np.array(list("cadb"))[labels]


def test_the_nearest_mean_is_scikit_learns_nearest_centroid() -> None:
    values, labels = made()
    ours, theirs = nearest_mean(values, labels, device="cpu"), NearestCentroid().fit(values.astype(np.float64), labels)
    assert ours.means == pytest.approx(theirs.centroids_, rel=1e-12)
    assert np.array_equal(ours.predict(values), theirs.predict(values.astype(np.float64)))


@pytest.mark.parametrize("solver", ["lsqr", "eigen"])
@pytest.mark.parametrize("shrinkage", [None, "auto", 0.0, 0.3, 1.0])
@pytest.mark.parametrize("num_classes", [2, 4])
def test_discriminant_analysis_is_scikit_learns(solver: str, shrinkage: Any, num_classes: int) -> None:
    values, labels = made(num_classes=num_classes)
    ours = discriminant_analysis(values, labels, shrinkage=shrinkage, device="cpu")
    theirs = LinearDiscriminantAnalysis(solver=solver, shrinkage=shrinkage).fit(values.astype(np.float64), labels)
    # Both in float64; one pass for all classes loses a few digits against a pass for each.
    assert ours.predict_proba(values) == pytest.approx(theirs.predict_proba(values.astype(np.float64)), abs=1e-7)
    assert np.array_equal(ours.predict(values), theirs.predict(values.astype(np.float64)))


def test_columns_without_variance_are_left_out() -> None:
    values, labels = made()
    twice = np.concatenate([values, values[:, :3], np.ones((300, 1), np.float32)], axis=1)
    ours, alone = (discriminant_analysis(each, labels, device="cpu") for each in (twice, values))
    assert ours.predict_proba(twice) == pytest.approx(alone.predict_proba(values), abs=1e-6)  # as an inverse of 1e3


def test_blocks_and_rows_read_again_give_the_same() -> None:
    values, labels = made(3000)
    rows = Rows.of(values, memory_bytes=0)
    blocks = rows.blocks
    rows.blocks = (  # type: ignore[method-assign]
        lambda device="cpu", block_rows=None, *, exact=False: blocks(device, 77, exact=exact)
    )
    for shrinkage in (None, "auto"):
        cut, whole = (discriminant_analysis(each, labels, shrinkage=shrinkage, device="cpu") for each in (rows, values))
        assert cut.coefficients == pytest.approx(whole.coefficients, rel=1e-8, abs=1e-10)  # the order of float64 sums


@pytest.mark.parametrize("shrinkage", [-0.1, 1.5, "some"])
def test_a_shrinkage_that_is_none_is_refused(shrinkage: Any) -> None:
    values, labels = made()
    with pytest.raises(ValueError, match=f"shrinkage is {shrinkage!r}"):
        discriminant_analysis(values, labels, shrinkage=shrinkage, device="cpu")


def test_what_has_no_means_to_tell_apart_is_refused() -> None:
    values, labels = made()
    with pytest.raises(ValueError, match="one class"):
        nearest_mean(values, np.zeros(300), device="cpu")
    with pytest.raises(ValueError, match="299 labels for 300 rows"):
        discriminant_analysis(values, labels[:299], device="cpu")
    with pytest.raises(ValueError, match="Rows hold 4 numbers; expected 10"):
        nearest_mean(values, labels, device="cpu").predict(values[:, :4])


@pytest.mark.cuda
@pytest.mark.parametrize("shrinkage", [None, "auto"])
def test_a_gpu_finds_the_same_classes(shrinkage: Any) -> None:
    values, labels = made()
    here, there = (discriminant_analysis(values, labels, shrinkage=shrinkage, device=at) for at in ("cpu", "cuda"))
    assert there.predict_proba(values) == pytest.approx(here.predict_proba(values), abs=1e-8)
