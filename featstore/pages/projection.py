"""Projections: where each image lies on a map of two dimensions, near those whose features are like its own."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from featstore.errors import FeatureStoreError, check_choice

Method = Literal["pca", "tsne", "umap"]
METHODS: tuple[Method, ...] = get_args(Method)

_NEIGHBOURS = 15
_PERPLEXITY = 30.0
_BEFORE = 50
"""Principal components that t-SNE and UMAP start from: distances among images hardly change, and take a tenth."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Projection:
    """A map of N images.

    Attributes:
        points: ``(N, 2)`` float32.
        method: that made it.
        words: what it shows of the features, and what not, in a sentence.
    """

    points: NDArray[np.float32]
    method: Method
    words: str


def projected(features: NDArray[np.float32], method: Method = "pca", *, seed: int = 0) -> Projection:
    """The map of features ``(N, *F)``, each taken as one long vector.

    Args:
        features: finite.
        method: ``pca``, at once; ``tsne`` of scikit-learn, which takes a minute for 5,000 images; ``umap``, if
            umap-learn is installed.
        seed: of the last two.

    Raises:
        FeatureStoreError: if umap-learn isn't installed.
    """
    check_choice("method", method, METHODS)
    rows = np.ascontiguousarray(features, dtype=np.float32).reshape(len(features), math.prod(features.shape[1:]))
    if len(rows) < 3:  # nothing spreads
        points = np.zeros((len(rows), 2), np.float32)
        points[:, 0] = np.arange(len(rows))
        return Projection(points=points, method=method, words="So few images have no map; they lie side by side.")
    if method == "pca":
        return _by_pca(rows, seed)
    return _by_tsne(rows, seed) if method == "tsne" else _by_umap(rows, seed)


def _by_pca(rows: NDArray[np.float32], seed: int) -> Projection:
    components, share = _components(rows, 2, seed)
    points = np.zeros((len(rows), 2), np.float32)
    points[:, : components.shape[1]] = components
    words = f"Two principal components, which hold {share:.0%} of the variance; the rest doesn't show."
    return Projection(points=points, method="pca", words=words)


def _by_tsne(rows: NDArray[np.float32], seed: int) -> Projection:
    from sklearn.manifold import TSNE

    start, _ = _components(rows, _BEFORE, seed)
    perplexity = min(_PERPLEXITY, (len(rows) - 1) / 3)
    points = TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(start)
    words = f"t-SNE (perplexity {perplexity:g}): who is near is alike; distances between groups say little."
    return Projection(points=points.astype(np.float32), method="tsne", words=words)


def _by_umap(rows: NDArray[np.float32], seed: int) -> Projection:
    try:
        from umap import UMAP
    except ImportError as error:
        raise FeatureStoreError(
            f"UMAP can't be loaded ({error}). Install it (pip install umap-learn), or take the projection pca or tsne."
        ) from error
    start, _ = _components(rows, _BEFORE, seed)
    neighbours = min(_NEIGHBOURS, len(rows) - 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that a seed means one thread
        points = UMAP(n_neighbors=neighbours, random_state=seed).fit_transform(start)
    words = f"UMAP ({neighbours} neighbours): who is near is alike; distances between groups say little."
    return Projection(points=np.asarray(points, np.float32), method="umap", words=words)


def _components(rows: NDArray[np.float32], most: int, seed: int) -> tuple[NDArray[np.float32], float]:
    """``(N, n)`` principal components, the largest first, n at most `most`; their share of the variance."""
    from sklearn.decomposition import PCA

    analysis = PCA(min(most, *rows.shape), random_state=seed)
    with np.errstate(invalid="ignore", divide="ignore"):  # images that are all alike have no variance to share
        components = analysis.fit_transform(rows)
        share = float(np.nan_to_num(analysis.explained_variance_ratio_.sum()))
    return components.astype(np.float32), share
