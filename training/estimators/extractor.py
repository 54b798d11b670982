"""Extractor: images to features through a store, as a transformer of scikit-learn's."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.utils.validation import check_is_fitted
from torch import nn

from featstore.errors import FactsDifferError, MissingFeaturesError
from featstore.extraction.extract import extract
from featstore.files.storage_types import DEFAULT_STORAGE_TYPE
from featstore.images.image_set import ImageSet
from featstore.images.views import View
from featstore.models.backbones import backbone, is_named
from featstore.models.names import DEFAULT_PRECISION, Precision
from featstore.models.staged import StagedModel
from featstore.store.features import Features
from featstore.store.sets import FeatureRequest
from featstore.store.spec import FeatureSpec
from featstore.store.store import FeatureStore
from training.predict import Items, as_images


class FeatureExtractor(TransformerMixin, BaseEstimator):  # type: ignore[misc]  # scikit-learn has no types
    """Images to the features of a frozen backbone: computed where the store lacks them, and read where it has them.

    In a pipeline, and in a search over one, each image is computed once, whatever folds it lies in.

    Args:
        model: a backbone, or what `featstore.backbone` takes for one.
        cut: where activations are taken; default: the model's own.
        reduce: auto, avg, max, concat, token; or none and tokens, for a head of your own.
        store: a folder or an address of a store, which is made if needed; or a `FeatureStore`.
        weights: as `featstore.backbone` takes them; None: the default ones of a backbone by name.
        view: how images are prepared; default: the model's own.
        dtype: of stored values.
        precision: of the arithmetic.
        device: auto, cpu, cuda or cuda:1.
        workers: that read and decode.
        verbose: shows how an extraction goes.

    Attributes:
        model_: the backbone.
        cut_: where activations are taken.
        reduction_: how they are reduced.
        shape_: of an image's features.
        spec_: what decides their values.
    """

    def __init__(
        self,
        model: str | Path | nn.Module = "resnet18",
        *,
        cut: str | None = None,
        reduce: str = "auto",
        store: str | Path | FeatureStore = "features",
        weights: str | Path | None = None,
        view: View | None = None,
        dtype: str = DEFAULT_STORAGE_TYPE,
        precision: Precision = DEFAULT_PRECISION,
        device: torch.device | str = "auto",
        workers: int | None = None,
        verbose: bool = False,
    ) -> None:
        """Takes the settings as they are: they are checked when it is fitted. The class describes them."""
        self.model, self.cut, self.reduce, self.store, self.weights = model, cut, reduce, store, weights
        self.view, self.dtype, self.precision = view, dtype, precision
        self.device, self.workers, self.verbose = device, workers, verbose

    def fit(self, X: Items = None, y: Any = None) -> Self:  # noqa: N803
        """Loads the backbone; no image is read, and nothing is learned of them.

        Raises:
            ValueError: for a model, a cut or a reduction that there isn't.
        """
        if not isinstance(self.view, View | None):
            raise TypeError(f"view is {self.view!r}; expected what model.view.resized(size=64) gives, or None.")
        if not isinstance(self.store, str | os.PathLike | FeatureStore):
            raise TypeError(f"store is {self.store!r}; expected a folder, an address, or a FeatureStore.")
        self.model_ = _loaded(self.model, self.weights, self.cut)
        self.cut_ = self.model_.canonical(self.cut or self.model_.default_cut)
        pool = self.model_.pool(self.cut_, self.reduce)
        self.reduction_: str = pool.reduction
        size = (self.view or self.model_.view).size
        self.shape_: tuple[int, ...] = pool.shape(self.model_.shape(self.cut_, size))
        self.spec_ = self._asked()
        return self

    def transform(self, X: Items) -> NDArray[np.float32]:  # noqa: N803
        """Features ``(N, F)`` of images, in their order.

        Args:
            X: paths of image files; images in memory: PIL images, or uint8 of one or three channels; or an `ImageSet`.
                One that comes twice has two equal rows.

        Raises:
            ValueError: for a path that isn't a file's, and for features, which are rows already.
            FactsDifferError: if the model or a setting has changed since it was fitted, which what follows it hasn't
                seen; the message names what.
            ImageError: for an image that can't be read or decoded.
        """
        check_is_fitted(self)
        self._check_unchanged()
        images, places = _images_of(X)
        store = self.store if isinstance(self.store, FeatureStore) else FeatureStore(self.store)
        request = FeatureRequest.of(self.spec_)
        found = store.find_one(request)
        try:
            if found is not None:
                return store.features(images, found)[places, ...]
        except MissingFeaturesError:
            pass
        extract(
            self.model_,
            images,
            store,
            cuts=[f"{self.cut_}:{self.reduction_}"],
            view=request.view,
            dtype=self.dtype,
            precision=self.precision,
            device=self.device,
            workers=self.workers,
            progress=self.verbose,
        )
        return store.features(images, request)[places, ...]

    def _asked(self) -> FeatureSpec:
        """What the model and the settings as they are now decide."""
        cut = self.model_.canonical(self.cut or self.model_.default_cut)
        return FeatureSpec(
            trunk=self.model_.digest(cut),
            pool=self.model_.pool(cut, self.reduce).facts(),
            view=(self.view or self.model_.view).evaluation.facts(),
            dtype=self.dtype,
            precision=self.precision,
        )

    def _check_unchanged(self) -> None:
        """Raises FactsDifferError if rows would be others than those that were given since the fit."""
        now = self._asked()
        if now.key != self.spec_.key:
            told = "; ".join(f"{name} ({before}, now {after})" for name, before, after in self.spec_.differences(now))
            raise FactsDifferError(
                f"This FeatureExtractor was fitted for set {self.spec_.key[:8]}, and has changed since in: {told}. "
                "What was fitted to its rows has seen the former ones alone. Fit it again, and what follows it in a "
                "pipeline; or put the former back."
            )

    def get_feature_names_out(self, input_features: Any = None) -> NDArray[np.object_]:
        """A name for each feature: model, cut, reduction and place.

        Raises:
            ValueError: for maps, which have no names.
        """
        check_is_fitted(self)
        if len(self.shape_) != 1:
            raise ValueError(f"An image's features are of shape {self.shape_}, and names are for vectors. Reduce them.")
        start = f"{self.model_.name}_{self.cut_}_{self.reduction_}"
        return np.array([f"{start}_{place}" for place in range(self.shape_[0])], dtype=object)

    def _more_tags(self) -> dict[str, Any]:  # before scikit-learn 1.6
        return {"X_types": ["string"], "no_validation": True, "preserves_dtype": []}

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array, tags.input_tags.string = False, True
        tags.no_validation, tags.transformer_tags.preserves_dtype = True, []
        return tags


def _loaded(given: str | Path | nn.Module, weights: str | Path | None, cut: str | None) -> StagedModel:
    """The backbone, which nobody changes."""
    if isinstance(given, StagedModel):
        return given
    # What a library has under a name stays as it is; files and runs may be others the next time.
    if isinstance(given, str) and is_named(given) and not (weights is not None and Path(weights).exists()):
        return _named(given, weights, cut, torch.hub.get_dir())
    return backbone(given, weights, cut=cut)


@lru_cache(maxsize=2)
def _named(name: str, weights: str | Path | None, cut: str | None, folder: str) -> StagedModel:
    """That of a library, loaded once for all the folds of a search; its weights are in `folder`."""
    return backbone(name, weights, cut=cut)


def _images_of(X: Items) -> tuple[ImageSet, NDArray[np.int64]]:  # noqa: N803
    """Each image once, and for each item of `X` its place among them.

    Raises:
        ValueError: for a path that isn't a file's: a folder would have several rows.
    """
    if isinstance(X, ImageSet):
        return X, np.arange(len(X))
    if isinstance(X, Features):
        raise ValueError(
            f"X is {X!r}, which are rows already; expected images. Give features.images, or leave the extractor out."
        )
    if isinstance(X, str | os.PathLike) or not isinstance(X, Iterable):
        raise ValueError(f"X is {X!r}; expected several images: a list of paths, or of images. Put it into a list.")
    items: list[Any] = list(X)
    if getattr(X, "ndim", 1) == 2:  # a table's column
        items = [item for row in np.asarray(X, dtype=object) for item in row]
    if not all(isinstance(item, str | os.PathLike) for item in items):
        return replace(as_images(items), name="extractor"), np.arange(len(items))
    paths = [Path(item).as_posix() for item in items]
    other = next((path for path in paths if not Path(path).is_file()), None)
    if other is not None:
        raise ValueError(f"X names {other}, which is no file; expected the path of an image each. Correct it.")
    images = as_images(paths)
    place_of = {image: place for place, image in enumerate(images.ids)}
    return replace(images, name="extractor"), np.array([place_of[path] for path in paths])
