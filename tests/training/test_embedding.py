"""Embeddings are what a plain forward pass gives at a cut of the model as it is now."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from support.tiny import VIEW, arrays, net, staged, views_by_hand
from torch import Tensor, nn

from featstore import FeatureStore, ImageSet, extract
from training import Learner


def learner(images: ImageSet, store: FeatureStore | None = None) -> Learner:
    return Learner(staged(), images, store, cut="layer2", head="mlp", device="cpu", workers=0, quiet=True)


def hooked(module: nn.Module, place: str, images: ImageSet) -> Tensor:
    """The output of a module inside `module` for all images, by a forward hook."""
    taken: list[Tensor] = []
    mean, std = (torch.tensor(values).reshape(1, 3, 1, 1) for values in (VIEW.mean, VIEW.std))
    handle = module.get_submodule(place).register_forward_hook(lambda *called: taken.append(called[2]))
    with torch.no_grad():
        module.eval()((views_by_hand(images, VIEW).float() / 255 - mean) / std)
    handle.remove()
    return taken[0]


def close(found: NDArray[np.float32], expected: Tensor) -> bool:
    return found.shape == tuple(expected.shape) and np.allclose(found, expected.numpy(), rtol=1e-4, atol=1e-5)


def test_embeddings_are_those_of_a_forward_hook_also_of_trained_stages() -> None:
    images = arrays(6)
    learn = learner(images)
    maps = hooked(net(), "layer2", images)
    ids, found = learn.embed(images)
    assert ids == images.ids
    assert close(found, torch.cat([maps.amax((2, 3)), maps.mean((2, 3))], 1))
    assert close(learn.embed(images, "layer2", reduce="none")[1], maps)
    assert close(learn.embed(images, "layer1", reduce="avg")[1], hooked(net(), "layer1", images).mean((2, 3)))

    learn.unfreeze()
    learn.fit(2, lr=1e-2)
    trained = net()
    own = learn.model.tensors()
    trained.load_state_dict({name: own.get(name, value) for name, value in trained.state_dict().items()})
    after = hooked(trained, "layer2", images)
    assert not torch.allclose(after, maps)
    learn.model.train()
    assert close(learn.embed(images, reduce="avg")[1], after.mean((2, 3)))
    assert learn.model.num_frozen == 0


def test_embeddings_come_from_features_where_these_serve(tmp_path: Path) -> None:
    images, store = arrays(6), FeatureStore(tmp_path)
    extract(staged(), images, store, cuts=["layer1:none"], dtype="float32", device="cpu", workers=0)
    expected = learner(images).embed(images)[1]
    learn = learner(images, store)
    np.testing.assert_array_equal(learn.embed(ImageSet.from_store(store, images.name))[1], expected)
    assert learn.read_from == "features"  # layer2 runs on them
    learn.freeze_to("layer1")
    np.testing.assert_array_equal(learn.embed(images)[1], expected)
    learn.fit(1, lr=1e-1)
    assert not np.array_equal(learn.embed(images)[1], expected)


def test_what_is_no_cut_has_no_embedding() -> None:
    images = arrays(2)
    with pytest.raises(ValueError, match=r"no cut 'layer9'\. Its cuts are layer1"):
        learner(images).embed(images, "layer9")
    with pytest.raises(ValueError, match=r"pool is the pool or the head of net, and no cut"):
        learner(images).embed(images, "pool")
    with pytest.raises(ValueError, match="median"):
        learner(images).embed(images, reduce="median")
