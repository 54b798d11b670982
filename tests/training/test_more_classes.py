"""A learner with more classes: what it said of the old ones stays, and images of the new ones are accepted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.tiny import NormedHead, pixels, staged
from torch import Tensor, nn

from featstore import FeatureStore, ImageSet, extract
from featstore.errors import MissingFeaturesError
from training import Learner
from training.standardised import linear_head_of

OLD = ["b", "d"]
MORE = ["a", "b", "c", "d"]


def images_of(names: list[str], count: int = 16) -> ImageSet:
    labels = [names[row % len(names)] for row in range(count)]
    return ImageSet.from_arrays(pixels(count), labels, splits=["train"] * (count - 4) + ["valid"] * 4)


def learner(head: Any, store: FeatureStore | None = None) -> Learner:
    return Learner(staged(), images_of(OLD), store, cut="layer2", head=head, device="cpu", workers=0, quiet=True)


def logits(learn: Learner) -> Tensor:
    images = torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found: Tensor = learn.model(images)
    return found


@pytest.mark.parametrize("head", ["linear", "concat", "mlp", "module"])
@pytest.mark.parametrize("freeze_to", ["layer2", "layer1", None])
def test_old_logits_stay_under_their_names_and_new_classes_are_learnt(
    tmp_path: Path, head: str, freeze_to: str | None
) -> None:
    own = NormedHead(2, dropout=0.5)
    learn = learner(own if head == "module" else head)
    if freeze_to is None:
        learn.unfreeze()
    else:
        learn.freeze_to(freeze_to)
    learn.fit(1, lr=1e-3)
    before, frozen, trunk = logits(learn), learn.model.num_frozen, learn.model.digest("layer2")
    more = images_of(MORE)
    with pytest.raises(ValueError, match="These images have the classes a, b, c, d"):
        learn.images = more
    learn.extend_classes(more.classes)
    after = logits(learn)
    assert learn.classes == tuple(MORE)
    assert after.shape == (5, 4)
    assert torch.allclose(after[:, [1, 3]], before, rtol=1e-5, atol=1e-5)
    assert (learn.model.num_frozen, learn.model.digest("layer2")) == (frozen, trunk)
    learn.images = more
    learn.fit(1, lr=1e-3)
    assert not torch.equal(logits(learn), after)
    learn.save(tmp_path / "run")
    again: dict[str, Any] = {"head": NormedHead(4, dropout=0.5)} if head == "module" else {}
    loaded = Learner.load(tmp_path / "run", more, module=staged(), device="cpu", workers=0, quiet=True, **again)
    assert loaded.classes == tuple(MORE)
    assert torch.equal(logits(loaded), logits(learn))


def test_a_linear_head_keeps_what_its_inputs_are_standardised_by_and_new_rows_are_zero(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path)
    extract(staged(), images_of(OLD), store, cuts=["layer2"], dtype="float32", device="cpu", workers=0)
    learn = learner("linear", store)
    learn.fit(1, lr=1e-3)
    old = linear_head_of(learn.model.ordered[-1])
    learn.extend_classes(MORE)
    new = linear_head_of(learn.model.ordered[-1])
    assert old is not None
    assert new is not None
    for name in ("mean", "scale", "num_rows"):
        assert torch.equal(new.get_buffer(name), old.get_buffer(name))
    assert torch.equal(new.weight[[1, 3]], old.weight)
    assert not new.weight[[0, 2]].any()
    learn.images = images_of(MORE)
    learn.fit(1, lr=1e-3)
    assert learn.read_from == "features"


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (["a", "b"], "The new class table is a, b; expected all of b, d, and others, each once"),
        (["d", "b"], "The new class table is d, b; expected all of b, d, and others"),
        (["b", "d", "d"], "each once"),
    ],
)
def test_a_table_that_is_not_more_is_refused(classes: list[str], message: str) -> None:
    learn = learner("linear")
    with pytest.raises(ValueError, match=message):
        learn.extend_classes(classes)
    assert learn.classes == tuple(OLD)


def test_a_head_for_maps_of_another_size_is_tried_on_these() -> None:
    images = images_of(OLD)
    model = staged()
    view = model.view.resized(size=8)
    channels, *size = model.shape("layer2", 8)
    own = nn.Sequential(nn.Flatten(), nn.Linear(channels * size[0] * size[1], 2))
    assert model.shape("layer2") != model.shape("layer2", 8)
    options: dict[str, Any] = {"cut": "layer2", "reduce": "none", "view": view, "device": "cpu", "quiet": True}
    learn = Learner(model, images, head=own, **options)
    learn.extend_classes(MORE)
    assert learn.predict_proba(images).shape == (16, 4)


def test_a_head_without_a_last_linear_layer_is_refused() -> None:
    normed = nn.Sequential(nn.Linear(24, 2), nn.BatchNorm1d(2))
    for head in (normed, nn.Sequential(nn.Unflatten(1, (24, 1, 1)), nn.Conv2d(24, 2, 1), nn.Flatten())):
        with pytest.raises(ValueError, match="The head Sequential doesn't end in a linear layer of 2 outputs"):
            learner(head).extend_classes(MORE)
    kept = ImageSet.from_arrays(pixels(6), [str(row % 3) for row in range(6)])
    with pytest.raises(ValueError, match="net keeps its own head"):
        Learner(staged(), kept, head="keep", device="cpu", quiet=True).extend_classes(["0", "1", "2", "3"])


def test_regression_has_no_classes_to_add() -> None:
    images = ImageSet.from_arrays(pixels(6), np.arange(6.0).reshape(6, 1), task="regression")
    with pytest.raises(ValueError, match="extend_classes is for classes, and the task is regression"):
        Learner(staged(), images, head="linear", device="cpu", quiet=True).extend_classes(["a"])


def test_a_larger_size_other_images_and_other_weights_derive_the_inputs_anew(tmp_path: Path) -> None:
    store, images = FeatureStore(tmp_path / "features"), images_of(OLD)
    larger = staged().view.resized(size=24)
    extract(staged(), images, store, cuts=["layer2"], dtype="float32", device="cpu", workers=0)
    extract(staged(), images, store, cuts=["layer2"], view=larger, dtype="float32", device="cpu", workers=0)
    learn = learner("linear", store)
    learn.fit(1, lr=1e-3)
    small = learn.predict_proba(images)
    learn.view = larger
    live = learner("linear")
    live.fit(1, lr=1e-3)
    live.view = larger
    assert learn.fit(1, lr=1e-3).losses == live.fit(1, lr=1e-3).losses
    assert (learn.read_from, live.read_from) == ("features", "images")
    assert not np.array_equal(learn.predict_proba(images), small)
    learn.images = ImageSet.from_arrays(pixels(16, seed=1), [OLD[row % 2] for row in range(16)])
    with pytest.raises(MissingFeaturesError, match="16 are changed since"):
        learn.fit(1, lr=1e-3)
    assert learn.inputs.problem is not None
    learn.store = None
    learn.fit(1, lr=1e-3)
    assert learn.read_from == "images"
    learn.images, learn.store = images, store
    learn.unfreeze()
    learn.fit(1, lr=1e-3)
    assert learn.read_from == "images"
    learn.freeze()
    assert learn.inputs.problem is not None, "the trunk's weights moved"
