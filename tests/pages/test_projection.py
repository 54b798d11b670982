"""Projections: principal components as scikit-learn has them; groups that are apart stay apart on each map."""

from __future__ import annotations

import importlib.util
from typing import get_args

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from numpy.typing import NDArray
from sklearn.decomposition import PCA
from sklearn.metrics import silhouette_score

from featstore.errors import FeatureStoreError
from featstore.pages.projection import Method, projected

HAS_UMAP = importlib.util.find_spec("umap") is not None


@pytest.fixture(scope="module")
def features() -> NDArray[np.float32]:
    rng = np.random.default_rng(0)
    return (rng.normal(size=(60, 2, 10)) + 6 * (np.arange(60) % 2)[:, None, None]).astype(np.float32)


def test_a_map_by_pca_is_that_of_scikit_learn(features: NDArray[np.float32]) -> None:
    found = projected(features)
    analysis = PCA(2)
    assert_allclose(found.points, analysis.fit_transform(features.reshape(60, -1)), atol=1e-4)  # float32
    assert f"{analysis.explained_variance_ratio_.sum():.0%} of the variance" in found.words


@pytest.mark.parametrize("method", get_args(Method))
def test_groups_that_are_apart_are_so_on_a_map_and_a_seed_gives_one_map(
    features: NDArray[np.float32], method: Method
) -> None:
    if method == "umap" and not HAS_UMAP:
        pytest.skip("umap-learn isn't installed")
    found = projected(features, method)
    assert found.points.shape == (60, 2)
    assert silhouette_score(found.points, np.arange(60) % 2) > 0.6
    assert_array_equal(projected(features, method).points, found.points)


@pytest.mark.parametrize("count", [0, 1, 2, 3])
@pytest.mark.parametrize("method", ["pca", "tsne"])
def test_few_images_have_places_all_the_same(count: int, method: Method) -> None:
    found = projected(np.random.default_rng(0).normal(size=(count, 5)).astype(np.float32), method)
    assert found.points.shape == (count, 2)
    assert np.isfinite(found.points).all()


def test_images_that_are_all_alike_lie_in_one_place() -> None:
    assert_array_equal(projected(np.ones((5, 4), np.float32)).points, 0)


def test_one_feature_is_one_dimension() -> None:
    points = projected(np.arange(5, dtype=np.float32)[:, None]).points
    assert_allclose(np.abs(points), [[2, 0], [1, 0], [0, 0], [1, 0], [2, 0]], atol=1e-6)


@pytest.mark.skipif(HAS_UMAP, reason="umap-learn is installed")
def test_umap_is_refused_where_it_is_not_installed(features: NDArray[np.float32]) -> None:
    with pytest.raises(FeatureStoreError, match=r"pip install umap-learn"):
        projected(features, "umap")


def test_another_method_is_refused(features: NDArray[np.float32]) -> None:
    with pytest.raises(ValueError, match=r"method is 'isomap'; expected pca, tsne or umap"):
        projected(features, "isomap")  # type: ignore[arg-type]
