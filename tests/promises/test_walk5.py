"""Features analysed on another machine, without images and without weights."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from support.tiny import arrays, staged

from featstore import FeatureStore, ImageSet, extract
from featstore.errors import AmbiguousRequestError, FeatureStoreError, ModelError
from training import Learner


@pytest.fixture
def laptop(tmp_path: Path) -> tuple[FeatureStore, str]:
    """A copied store with one set, and the first digits of its key."""
    cluster = FeatureStore(tmp_path / "cluster")
    report = extract(staged(), arrays(16).split(valid=0.25), cluster, cuts=["layer2"], reduce="avg", dtype="float32")
    shutil.copytree(cluster.root, tmp_path / "laptop")
    shutil.rmtree(cluster.root)
    return FeatureStore(tmp_path / "laptop"), report.keys[0][:6]


def test_features_and_targets_are_arrays_for_any_library(laptop: tuple[FeatureStore, str]) -> None:
    store, key = laptop
    images = ImageSet.from_store(store)
    features = store.features(images.train, key)
    assert features.numpy().shape == (12, 12)
    assert images.train.targets is not None
    LogisticRegression().fit(features.numpy(), images.train.targets)


def test_a_head_trains_saves_loads_and_predicts_without_images_or_weights(
    laptop: tuple[FeatureStore, str], tmp_path: Path
) -> None:
    store, key = laptop
    images = ImageSet.from_store(store)
    learn = Learner(store.model(key), images, store, head="linear", quiet=True)
    assert "layer2 (avg)" in repr(learn)  # what is stored, not this layout's default
    learn.fit(2, lr=1e-2)
    assert learn.read_from == "features"
    run = learn.save(tmp_path / "run")
    loaded = Learner.load(run, images, store, quiet=True)
    assert loaded.model.is_absent
    np.testing.assert_array_equal(loaded.predict_proba(images.valid), learn.predict_proba(images.valid))
    assert loaded.evaluate() == learn.evaluate()


def test_the_right_model_is_attached_and_another_refused(laptop: tuple[FeatureStore, str], tmp_path: Path) -> None:
    store, key = laptop
    images = arrays(16)
    Learner(store.model(key), ImageSet.from_store(store), store, head="linear", quiet=True).save(tmp_path / "run")
    learn = Learner.load(tmp_path / "run", ImageSet.from_store(store), store, quiet=True)
    stored = learn.predict_proba(learn.images.valid)
    with pytest.raises(FeatureStoreError, match=r"3 are new .*Compute the 3: learn\.attach\(model\), then extract"):
        learn.predict(arrays(3, seed=9))
    with pytest.raises(ModelError, match="isn't the trunk this head belongs to: they differ from stage layer1"):
        learn.attach(staged(seed=1))
    assert learn.model.is_absent
    model = staged()
    learn.attach(model)
    assert len(learn.predict(arrays(3, seed=9))) == 3  # the trunk runs now: what no store holds can be predicted
    learn.store = None
    held_out = images.select([int(name) for name in learn.images.valid.ids])
    np.testing.assert_allclose(learn.predict_proba(held_out), stored, rtol=1e-6)
    learn.images = images.with_splits(learn.images.splits)
    learn.unfreeze()
    before = {name: tensor.clone() for name, tensor in model.tensors().items()}
    learn.fit(1, lr=1e-3)
    assert learn.read_from == "images"
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.tensors().items())


def test_thawing_a_trunk_that_is_not_here_is_refused(laptop: tuple[FeatureStore, str]) -> None:
    store, key = laptop
    learn = Learner(store.model(key), ImageSet.from_store(store), store, head="linear", quiet=True)
    learn.unfreeze()
    with pytest.raises(FeatureStoreError, match="isn't here, only its digests"):
        learn.fit(1, lr=1e-2)


def test_of_several_stored_reductions_none_is_guessed(laptop: tuple[FeatureStore, str]) -> None:
    store, key = laptop
    images = arrays(16).split(valid=0.25)
    (concat,) = extract(staged(), images, store, cuts=["layer2"]).keys
    with pytest.raises(AmbiguousRequestError, match="layer2 avg, layer2 concat"):
        Learner(store.model(key), images, store, cut="layer2")
    for chosen, reduction in ((key, "avg"), (concat, "concat")):
        for features in (None, chosen):  # the model was made for one key: it need not be given twice
            learn = Learner(store.model(chosen), images, store, head="linear", features=features, quiet=True)
            assert f"layer2 ({reduction})" in repr(learn)
            learn.fit(1, lr=1e-2)
    other = FeatureStore(store.root.parent / "other")
    extract(staged(), images, other, cuts=["layer2"], reduce="max")
    assert "layer2 (max)" in repr(Learner(store.model(key), images, other, head="linear", quiet=True))
