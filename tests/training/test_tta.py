"""Test-time augmentation is the mean of the probabilities of different views, equal from features and from images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.tiny import VIEW, arrays, net, photos, pixels, staged, views_by_hand
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

from featstore import Augment, FeatureStore, FeatureStoreError, ImageSet, extract
from featstore.images import render
from training import Ensemble, Learner
from training.inputs import batches
from training.tta import mean

FLIPS = Augment("flip", seeds=range(3))


def mirrored(image: Tensor, generator: torch.Generator) -> Tensor:
    return image.flip(-1)


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> tuple[ImageSet, FeatureStore]:
    images, store = arrays(10).split(valid=0.4), FeatureStore(tmp_path_factory.mktemp("features"))
    add_views(images, store)
    return images, store


def add_views(images: ImageSet, store: FeatureStore) -> None:
    """Of all images: of dealt ones those to train on alone would get them."""
    undealt = images.with_splits([""] * len(images))
    extract(staged(), undealt, store, cuts=["layer2"], augment=FLIPS, dtype="float32", device="cpu", workers=0)


def learner(images: ImageSet, store: FeatureStore | None = None, **options: Any) -> Learner:
    settings = {"cut": "layer2", "head": "linear", "device": "cpu", "workers": 0, "quiet": True, **options}
    learn = Learner(staged(), images, store, **settings)
    learn.fit(1, lr=1e-2)
    return learn


def by_hand(learn: Learner, batch: Tensor) -> Tensor:
    """Probabilities of uint8 views by the plain model, in float64."""
    mean, std = (torch.tensor(values).reshape(1, 3, 1, 1) for values in (VIEW.mean, VIEW.std))
    with torch.no_grad():
        logits: Tensor = learn.model((batch.float() / 255 - mean) / std)
    return logits.double().softmax(1)


def test_probabilities_are_the_mean_of_a_plain_loop_over_the_views(stored: tuple[ImageSet, FeatureStore]) -> None:
    images, store = stored
    learn = learner(images, store, augment=FLIPS)
    views = [VIEW, *FLIPS.views(VIEW)]
    every = torch.stack([by_hand(learn, views_by_hand(images, view)) for view in views])
    assert not torch.equal(every[1], every[2])
    np.testing.assert_allclose(learn.predict_proba(images, tta=3), every.mean(0).numpy(), rtol=1e-5)
    assert learn.read_from == "features"
    weighted = 0.4 * every[0] + 0.6 * every[1:].mean(0)
    np.testing.assert_allclose(learn.predict_proba(images, tta=3, tta_weight=0.4), weighted.numpy(), rtol=1e-5)
    np.testing.assert_allclose(learn.predict_proba(images, tta=3, tta_weight=1), every[0].numpy(), rtol=1e-5)
    np.testing.assert_array_equal(
        learn.predict_proba(images, tta=2), learn.predict_proba(images, tta=Augment("flip", [0, 1]))
    )


def test_features_and_images_give_the_same_bits(stored: tuple[ImageSet, FeatureStore]) -> None:
    images, store = stored
    cached = learner(images, store)
    live = learner(images, store)
    live.store = None
    for theirs in (FLIPS, Augment("flip", seeds=[2])):
        np.testing.assert_array_equal(cached.predict_proba(images, tta=theirs), live.predict_proba(images, tta=theirs))
        assert (cached.read_from, live.read_from) == ("features", "images")
        assert cached.evaluate(tta=theirs) == live.evaluate(tta=theirs)


@pytest.mark.parametrize("most_pixels", [1 << 26, 3 * 32 * 16**2])
def test_an_image_is_decoded_once_for_all_of_its_views(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most_pixels: int
) -> None:
    learn = learner(arrays(6))
    images = ImageSet.from_folder(photos(tmp_path / "photos"))
    monkeypatch.setattr(batches, "_MOST_PIXELS", most_pixels)
    expected = np.mean([each[1] for each in (learn.scored(images), *(one_view(learn, images, n) for n in range(3)))], 0)
    decoded: list[int] = []
    decode = render.decode_for

    def counting(*arguments: Any) -> Any:
        decoded.append(1)
        return decode(*arguments)

    monkeypatch.setattr(render, "decode_for", counting)
    found = learn.predict_proba(images, tta=FLIPS)
    passes = 1 if most_pixels == 1 << 26 else 2  # of four views three have room
    assert len(decoded) == passes * len(images)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def one_view(learn: Learner, images: ImageSet, seed: int) -> Any:
    """What is said of one view alone."""
    return learn.scored(images, tta=Augment("flip", seeds=[seed]), tta_weight=0)


def test_a_view_of_ones_own_is_torchvisions(tmp_path: Path) -> None:
    values = pixels(5)
    learn = learner(ImageSet.from_arrays(values, [0, 1, 0, 1, 0]))
    whole = torch.from_numpy(values).permute(0, 3, 1, 2)
    batches = [
        tv.center_crop(tv.resize(each, [20], antialias=True), [16]) for each in (whole, tv.horizontal_flip(whole))
    ]
    expected = torch.stack([by_hand(learn, each) for each in batches]).mean(0).numpy()
    found = learn.predict_proba(values, tta=Augment(mirrored, seeds=[0]))
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    learn.unfreeze()
    np.testing.assert_allclose(learn.predict_proba(values, tta=Augment(mirrored, seeds=[0])), expected, rtol=1e-5)


def test_scores_are_those_of_the_mean(stored: tuple[ImageSet, FeatureStore]) -> None:
    learn = learner(*stored)
    valid = learn.images.valid
    assert valid.targets is not None
    means = learn.predict_proba(valid, tta=FLIPS)
    scores, plain = learn.evaluate(tta=FLIPS), learn.evaluate()
    of_target = means[np.arange(len(valid)), valid.targets]
    assert scores["loss"] == pytest.approx(-np.log(of_target).mean(), rel=1e-5)
    assert scores["accuracy"] == np.mean(means.argmax(1) == valid.targets)
    assert scores["loss"] != plain["loss"]
    found = learn.outcomes(tta=FLIPS)
    np.testing.assert_allclose(found.probabilities, means, rtol=1e-12)
    assert found.images.ids == valid.ids


def test_views_that_lack_in_the_store_are_rendered_or_refused_with_the_command(
    stored: tuple[ImageSet, FeatureStore], tmp_path: Path
) -> None:
    root = photos(tmp_path / "photos")
    images, store = ImageSet.from_folder(root), FeatureStore(tmp_path / "feats")
    extract(staged(), images, store, cuts=["layer2"], dtype="float32", device="cpu", workers=0)
    learn = learner(images, store)
    expected = learn.predict_proba(images, tta=FLIPS)
    assert learn.read_from == "images"
    gone = ImageSet.from_store(store, images.name)  # no file of it can be read
    with pytest.raises(
        FeatureStoreError, match=r"augmentation flip, seeds 0-2; .* holds the evaluation view only"
    ) as told:
        learn.predict(gone, tta=FLIPS)
    assert 'Either add the views: extract(model, images.with_splits([""] * len(images)), store, ' in str(told.value)
    assert "or leave the augmentation out; or give the images' files" in str(told.value)
    add_views(images, store)
    np.testing.assert_array_equal(learn.predict_proba(gone, tta=FLIPS), expected)
    assert str(learn.read_from) == "features"


def test_an_image_that_fails_in_one_view_is_left_out_of_the_mean(tmp_path: Path) -> None:
    def fragile(image: Tensor, generator: torch.Generator) -> Tensor:
        if image.shape[-1] == 40:
            raise ValueError("too wide")
        return image.flip(-1)

    values = [*pixels(2), *pixels(1, size=40), *pixels(2, seed=1)]
    images = ImageSet.from_iterable((str(place), each) for place, each in enumerate(values))
    learn = learner(arrays(6), on_error="skip")
    ids, found = learn.scored(images, tta=Augment(fragile, seeds=[0]))
    assert ids == ("0", "1", "3", "4")
    np.testing.assert_allclose(found, learn.predict_proba(images, tta=Augment(mirrored, seeds=[0]))[[0, 1, 3, 4]])


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"tta": 4}, "tta is 4, views of the policy that training images get, and this learner has none: all of them"),
        ({"tta": 0}, "tta is 0; expected at least one view"),
        ({"tta": Augment("flip", seeds="fresh")}, "tta has fresh seeds"),
        ({"tta_weight": 0.5}, "there are no views beside the plain one"),
        ({"tta": FLIPS, "tta_weight": 1.5}, "tta_weight is 1.5; expected the share of the evaluation view, 0 to 1"),
    ],
)
def test_what_makes_no_views_is_refused(
    stored: tuple[ImageSet, FeatureStore], options: dict[str, Any], sentence: str
) -> None:
    learn = Learner(staged(), *stored, head="linear", device="cpu", quiet=True)
    with pytest.raises(ValueError, match=sentence):
        learn.predict(stored[0], **options)
    with pytest.raises(ValueError, match=sentence):
        learn.evaluate(**options)
    with pytest.raises(TypeError, match="tta is 'flip'; expected a number of views"):
        learn.predict(stored[0], tta="flip")  # type: ignore[arg-type]


def test_the_views_of_an_ensemble_are_those_of_each_learner(
    stored: tuple[ImageSet, FeatureStore], tmp_path: Path
) -> None:
    learn = learner(*stored)
    learn.fit_cycles(2, lr=1e-2, snapshot=tmp_path)
    both = Ensemble.load(tmp_path, module=net(), device="cpu", workers=0, quiet=True)
    each = [theirs.predict_proba(stored[0], tta=FLIPS, tta_weight=0.5) for theirs in both.learners]
    np.testing.assert_array_equal(both.predict_proba(stored[0], tta=FLIPS, tta_weight=0.5), np.mean(each, axis=0))


@pytest.mark.parametrize("task", ["single", "multi", "regression"])
def test_the_mean_is_of_probabilities_and_none_is_rounded_away(task: Any) -> None:
    logits = [torch.tensor([[3.0, -2.0, 0.5]]), torch.tensor([[200.0, -200.0, 0.0]]), torch.tensor([[-1.0, 2.0, 7.0]])]
    shares = [0.5, 0.2, 0.3]
    found = mean(logits, shares, task)
    assert found.isfinite().all()
    by_task: dict[str, Callable[[Tensor], Tensor]] = {
        "single": lambda x: x.softmax(1),
        "multi": torch.sigmoid,
        "regression": lambda x: x,
    }
    of = by_task[task]
    expected = sum(of(each.double()) * share for each, share in zip(logits, shares, strict=True))
    torch.testing.assert_close(of(found), expected, rtol=1e-12, atol=0)
