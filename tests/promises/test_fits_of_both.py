"""Whether a fit reads features or images is no mode: what was promised of the one holds for the other."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.tiny import VIEW, arrays, pixels, staged
from support.torch_settings import settings
from torch import Tensor, nn

from featstore import Augment, FeatureStore, ImageSet, StagedModel, extract
from featstore.errors import FactsDifferError, MissingFeaturesError
from training import Learner

SEEDS = Augment("flip", seeds=range(2))

Make = Callable[..., Learner]


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> tuple[ImageSet, FeatureStore]:
    """13 images with two classes, of which 9 train: with batches of four the last has one. Maps and pooled rows."""
    images = arrays(13).with_splits(["train"] * 9 + ["valid"] * 4)
    store = FeatureStore(tmp_path_factory.mktemp("features"))
    cuts = ["layer1:none", "layer2:concat"]
    extract(staged(), images, store, cuts=cuts, augment=SEEDS, dtype="float32", device="cpu", workers=0)
    return images, store


@pytest.fixture(params=["features", "images"])
def make(request: pytest.FixtureRequest, stored: tuple[ImageSet, FeatureStore]) -> Make:
    """A learner that reads the one or the other while something is frozen."""
    images, store = stored

    def made(given: ImageSet = images, **options: Any) -> Learner:
        source = store if request.param == "features" else None
        usual: dict[str, Any] = {"batch_size": 4, "device": "cpu", "workers": 0, "quiet": True}
        learn = Learner(staged(), given, source, cut="layer2", **{**usual, **options})
        assert learn.inputs.train is None or learn.inputs.train.kind == request.param
        return learn

    return made


@pytest.fixture
def reads(request: pytest.FixtureRequest) -> str:
    """Which of the two."""
    return str(request.node.callspec.params["make"])


def copies(learn: Learner) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in learn.model.tensors().items()}


def moved(learn: Learner, before: dict[str, Tensor]) -> set[str]:
    return {name for name, value in learn.model.tensors().items() if not torch.equal(value, before[name])}


def test_one_unfreeze_after_a_frozen_fit_trains_the_body(make: Make, reads: str) -> None:
    learn = make()
    learn.fit(1, lr=1e-3)
    assert learn.read_from == reads
    learn.unfreeze()
    before = copies(learn)
    learn.fit(1, lr=1e-3)
    assert learn.read_from == "images"
    assert {"layer1.0.weight", "layer1.1.running_mean", "layer2.0.weight"} <= moved(learn, before)


@pytest.mark.parametrize("lr", [[1e-3, 1e-2], (1e-5, 1e-4, 1e-2)])
def test_rates_for_body_and_head_train_the_head_at_its_own(make: Make, lr: Any) -> None:
    alone, with_body = make(), make()
    assert with_body.fit(2, lr=lr).losses == alone.fit(2, lr=1e-2).losses


def test_other_images_and_another_size_are_what_is_trained_on(make: Make, reads: str) -> None:
    others = ImageSet.from_arrays(pixels(9, seed=5), [index % 2 for index in range(9)])
    fresh = Learner(staged(), others, cut="layer2", batch_size=4, device="cpu", workers=0, quiet=True)
    learn = make()
    learn.images = others
    if reads == "features":
        with pytest.raises(MissingFeaturesError, match="0 of the 9 images asked for"):
            learn.fit(1, lr=1e-3)
        learn.on_missing = "images"
    assert learn.fit(1, lr=1e-3).losses == fresh.fit(1, lr=1e-3).losses

    learn, small = make(), VIEW.resized(size=12)
    learn.view = small
    if reads == "features":
        with pytest.raises(FactsDifferError, match=r"size \(stored 16, yours 12\)"):
            learn.fit(1, lr=1e-3)
        learn.on_missing = "images"
    fresh = Learner(staged(), learn.images, cut="layer2", view=small, batch_size=4, device="cpu", workers=0, quiet=True)
    assert learn.fit(1, lr=1e-3).losses == fresh.fit(1, lr=1e-3).losses


def test_a_frozen_fit_moves_no_statistics_of_frozen_stages(make: Make) -> None:
    for freeze_to, trained in (("layer2", {"head"}), ("layer1", {"head", "layer2"})):
        learn = make()
        learn.freeze_to(freeze_to)
        before = copies(learn)
        learn.fit(2, lr=1e-3)
        assert {name.partition(".")[0] for name in moved(learn, before)} == trained


def test_parameters_of_equal_values_are_told_apart(tmp_path: Path) -> None:
    def twins() -> StagedModel:
        def layer() -> nn.Sequential:
            convolution = nn.Conv2d(3, 3, 3, padding=1, bias=False)
            nn.init.constant_(convolution.weight, 0.1)
            return nn.Sequential(convolution, nn.BatchNorm2d(3), nn.ReLU())

        return StagedModel.from_stages(
            {"layer1": layer(), "layer2": layer(), "flatten": nn.Flatten(), "fc": nn.Linear(3 * 16 * 16, 2)}, view=VIEW
        )

    images, store = arrays(8), FeatureStore(tmp_path)
    extract(twins(), images, store, cuts=["layer1:none"], dtype="float32", device="cpu", workers=0)
    losses = []
    for source in (store, None):
        learn = Learner(twins(), images, source, cut="layer2", batch_size=4, device="cpu", workers=0, quiet=True)
        learn.freeze_to("layer1")
        before = copies(learn)
        losses.append(learn.fit(2, lr=(1e-3, 1e-2, 1e-2)).losses)
        trained = {"layer2.0.weight", "layer2.1.weight", "layer2.1.bias", "head.0.weight", "head.6.bias"}
        assert trained <= moved(learn, before)
        assert not any(name.startswith("layer1.") for name in moved(learn, before))
        assert learn.read_from == ("images" if source is None else "features")
    assert losses[0] == losses[1]


@pytest.mark.parametrize("freeze_to", ["layer2", "layer1", None])
def test_an_interrupted_finder_leaves_weights_statistics_modes_and_random_states(
    make: Make, freeze_to: str | None
) -> None:
    steps = 0

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        nonlocal steps
        steps += 1
        if steps == 20:
            raise KeyboardInterrupt
        return F.cross_entropy(logits, targets)

    learn = make(loss=loss)
    if freeze_to is None:
        learn.unfreeze()
    else:
        learn.freeze_to(freeze_to)
    learn.fit(1, lr=1e-3)
    before, modes, random_state = copies(learn), [each.training for each in learn.model.modules()], random_states()
    steps = 0
    with pytest.raises(KeyboardInterrupt):
        learn.lr_find()
    assert moved(learn, before) == set()
    assert [each.training for each in learn.model.modules()] == modes
    assert states() == random_state


def random_states() -> list[Any]:
    """The global ones, a draw after whatever has seeded them: seeding them anew shows."""
    _ = random.random(), np.random.random(), torch.rand(())  # noqa: NPY002
    return states()


def states() -> list[Any]:
    _, state, place, *_ = np.random.get_state()  # noqa: NPY002
    return [torch.get_rng_state().tolist(), np.asarray(state).tolist(), place, random.getstate()]


def test_a_last_batch_of_one_joins_the_one_before(make: Make) -> None:
    sizes: list[int] = []

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        if logits.requires_grad:
            sizes.append(len(logits))
        return F.cross_entropy(logits, targets)

    make(loss=loss).fit(2, lr=1e-3)  # of a concat head, which has batch norm
    assert sizes == [4, 5, 4, 5]


@pytest.mark.parametrize("freeze_to", ["layer2", "layer1", None])
def test_a_snapshot_is_the_model_after_the_last_step_of_its_cycle(
    make: Make, freeze_to: str | None, tmp_path: Path
) -> None:
    def started() -> Learner:
        learn = make()
        if freeze_to is None:
            learn.unfreeze()
        else:
            learn.freeze_to(freeze_to)
        return learn

    learn, alone = started(), started()
    learn.fit_cycles(2, lr=1e-3, snapshot=tmp_path / "cycles")
    alone.fit(1, lr=1e-3, schedule="cosine")
    for cycle, expected in (("cycle-1", alone), ("cycle-2", learn)):
        saved = Learner.load(tmp_path / "cycles" / cycle, module=staged(), device="cpu", quiet=True)
        assert moved(saved, copies(expected)) == set()


def test_a_snapshot_goes_on_from_features_and_from_images_alike(
    make: Make, stored: tuple[ImageSet, FeatureStore], tmp_path: Path
) -> None:
    images, store = stored
    make().fit_cycles(1, lr=1e-3, snapshot=tmp_path / "cycles")
    losses = []
    for source in (store, None):
        learn = Learner.load(
            tmp_path / "cycles/cycle-1",
            images,
            source,
            module=staged(),
            batch_size=4,
            device="cpu",
            workers=0,
            quiet=True,
        )
        losses.append(learn.fit(1, lr=1e-3).losses)
        learn.unfreeze()
        before = copies(learn)
        losses[-1] += learn.fit(1, lr=1e-3).losses
        assert "layer1.0.weight" in moved(learn, before)
    assert losses[0] == losses[1]


def test_a_class_that_validation_lacks_shifts_no_score(make: Make, stored: tuple[ImageSet, FeatureStore]) -> None:
    images, _ = stored
    labels = ["b" if index < 9 and index % 2 else "c" if index % 3 else "a" for index in range(13)]
    given = ImageSet.from_arrays(pixels(13), labels, splits=images.splits.tolist())
    learn = make(given)
    record = learn.fit(2, lr=1e-3).last
    scores = learn.evaluate("valid")
    said, probabilities = learn.predict(given.valid), learn.predict_proba(given.valid)
    truth = [given.classes[target] for target in np.asarray(given.valid.targets)]
    assert "b" not in truth
    assert scores["accuracy"] == np.mean([each.label == name for each, name in zip(said, truth, strict=True)])
    # A model that is right about nothing, or says one thing of all images, has such an accuracy in any table.
    of_truth = [row[learn.classes.index(name)] for row, name in zip(probabilities, truth, strict=True)]
    assert scores["loss"] == record["valid_loss"] == pytest.approx(-np.mean(np.log(of_truth)), rel=1e-5)  # float32


def test_a_fit_leaves_lists_random_states_and_settings_of_its_caller(make: Make) -> None:
    rates, metrics = [1e-4, 1e-3], [first_logit]
    learn = make(metrics=metrics, augment=SEEDS)
    before = random_states(), settings(), torch.get_num_threads(), torch.is_grad_enabled(), torch.get_default_dtype()
    learn.lr_find()
    learn.fit(2, lr=rates)
    learn.evaluate()
    after = states(), settings(), torch.get_num_threads(), torch.is_grad_enabled(), torch.get_default_dtype()
    assert after == before
    assert (rates, metrics) == ([1e-4, 1e-3], [first_logit])


def first_logit(logits: Tensor, targets: Tensor) -> float:
    return float(logits[0, 0])


def test_augmentation_that_is_asked_for_is_trained_on_or_refused(
    make: Make, reads: str, stored: tuple[ImageSet, FeatureStore]
) -> None:
    plain, augmented = make(), make(augment=SEEDS)
    assert augmented.fit(1, lr=1e-3).losses != plain.fit(1, lr=1e-3).losses
    other = make()
    other.augment = Augment("flip", seeds=range(2, 4))
    if reads == "features":
        with pytest.raises(MissingFeaturesError, match="Augmentation can't be applied to stored features afterwards"):
            other.fit(1, lr=1e-3)
    else:
        other.fit(1, lr=1e-3)


def test_an_option_or_attribute_that_isnt_there_is_an_error(make: Make) -> None:
    learn = make()
    with pytest.raises(TypeError, match="'sz'"):
        make(sz=64)
    with pytest.raises(TypeError, match="'use_clr'"):
        learn.fit(1, lr=1e-3, use_clr=(10, 5))  # type: ignore[call-arg]
    with pytest.raises(AttributeError, match="There is no precompute mode"):
        learn.precompute = False
    with pytest.raises(AttributeError, match="unfreez"):
        learn.unfreezed = True
