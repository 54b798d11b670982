"""Changes of batches, and balanced sampling: as torchvision and torch have them, from features and images alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.tiny import NormedHead, pixels, staged
from torch import Tensor, nn
from torch.utils.data import WeightedRandomSampler
from torchvision.transforms import v2

from featstore import Augment, FeatureStore, ImageSet, extract
from featstore.errors import FactsDifferError
from training import CutMix, FeatureBrightness, FeatureNoise, Learner, Mixup
from training.inputs.batches import Batches
from training.inputs.derive import find
from training.inputs.situation import Situation
from training.mixing import BatchChange, changed

TRAIN, VALID = 22, 6
EVERY: tuple[BatchChange, ...] = (Mixup(0.4), CutMix(1.0), FeatureNoise(0.2), FeatureBrightness(0.5))


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> tuple[ImageSet, FeatureStore]:
    labels = [0 if row % 5 else 1 + row % 2 for row in range(TRAIN + VALID)]
    images = ImageSet.from_arrays(pixels(TRAIN + VALID), labels, splits=["train"] * TRAIN + ["valid"] * VALID)
    store = FeatureStore(tmp_path_factory.mktemp("features"))
    options: dict[str, Any] = {"dtype": "float32", "device": "cpu", "workers": 0}
    extract(staged(), images, store, cuts=["layer1:none", "layer2"], **options)
    extract(staged(), images, store, cuts=["layer2"], augment=Augment("flip", seeds=range(3)), **options)
    return images, store


def learner(images: ImageSet, store: FeatureStore | None, freeze_to: str | None = "layer2", **options: Any) -> Learner:
    head = NormedHead(len(images.classes), dropout=0.0)
    settings: dict[str, Any] = {"cut": "layer2", "head": head, "batch_size": 8, **options}
    learn = Learner(staged(), images, store, device="cpu", workers=0, quiet=True, **settings)
    if freeze_to is None:
        learn.unfreeze()
    else:
        learn.freeze_to(freeze_to)
    return learn


def test_mixup_is_the_mean_of_two_rows_and_cutmix_a_box_of_another_as_torchvision_has_them() -> None:
    images, labels = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 3
    key = [0, 1]
    seed = int(np.random.default_rng([*key, 0]).integers(2**63))
    for change, reference in ((Mixup(0.7), v2.MixUp(alpha=0.7, num_classes=3)),
                              (CutMix(0.7), v2.CutMix(alpha=0.7, num_classes=3))):  # fmt: skip
        rows, targets = changed([change], images, labels, layout="NCHW", num_classes=3, key=key)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            expected, probabilities = reference(images, labels)
        assert torch.equal(rows, expected)
        assert torch.equal(targets, probabilities)
        assert not torch.equal(rows, images)
        assert targets.sum(1).tolist() == pytest.approx([1.0] * 6)
    vectors = images.flatten(1)
    rows, _ = changed([Mixup(0.7)], vectors, labels, layout="NC", num_classes=3, key=key)
    expected, _ = changed([Mixup(0.7)], images, labels, layout="NCHW", num_classes=3, key=key)
    assert torch.equal(rows, expected.flatten(1))


def test_brightness_adds_a_number_a_channel_within_the_range_and_noise_is_in_standard_deviations() -> None:
    maps, labels = torch.randn(4, 5, 3, 3, generator=torch.Generator().manual_seed(0)), torch.arange(4)
    for layout, channels in (("NCHW", 1), ("NHWC", 3)):
        rows, targets = changed([FeatureBrightness(0.3)], maps, labels, layout=layout, num_classes=4, key=[3])
        assert torch.equal(targets, labels)
        low, high = maps.flatten(1).min(1).values, maps.flatten(1).max(1).values
        for row in range(4):
            assert rows[row].min() >= low[row]
            assert rows[row].max() <= high[row]
            inside = (rows[row] > low[row]) & (rows[row] < high[row])
            added = ((rows[row] - maps[row]) / (high[row] - low[row])).movedim(channels - 1, 0)
            inside = inside.movedim(channels - 1, 0)
            for values, counts in zip(added, inside, strict=True):
                some = values[counts]
                if len(some):
                    assert some.tolist() == pytest.approx([float(some[0])] * len(some), abs=1e-5)
                    assert abs(float(some[0])) <= 0.3
    one, _ = changed([FeatureBrightness(0.3, by_channel=False)], maps, labels, layout="other", num_classes=4, key=[3])
    moved = (one - maps).flatten(1)
    assert all(len(each.round(decimals=4).unique()) > 1 for each in moved), "the ends of the range hold"
    wide = torch.randn(2, 20_000, generator=torch.Generator().manual_seed(0)) * torch.tensor([[1.0], [50.0]])
    noisy, _ = changed([FeatureNoise(0.2)], wide, torch.arange(2), layout="NC", num_classes=2, key=[4])
    assert ((noisy - wide).std(1) / wide.std(1)).tolist() == pytest.approx([0.2, 0.2], rel=0.03)


@pytest.mark.parametrize(
    ("freeze_to", "mix"),
    [("layer2", (Mixup(0.4), FeatureNoise(0.2), FeatureBrightness(0.5))), ("layer1", EVERY)],
    ids=["vectors", "maps"],
)
def test_changed_batches_are_the_same_from_features_and_from_images(
    stored: tuple[ImageSet, FeatureStore], freeze_to: str, mix: tuple[BatchChange, ...]
) -> None:
    images, store = stored
    state = torch.get_rng_state()
    histories = []
    for source in (store, None):
        learn = learner(images, source, freeze_to)
        histories.append(learn.fit(2, lr=1e-2, mix=mix))
        assert learn.read_from == ("images" if source is None else "features")
    assert histories[0].losses == histories[1].losses
    assert torch.equal(torch.get_rng_state(), state)
    assert histories[0].losses != learner(images, store, freeze_to).fit(2, lr=1e-2).losses


def test_each_batch_of_a_fit_has_a_draw_of_its_own(stored: tuple[ImageSet, FeatureStore]) -> None:
    images, store = stored
    part = images.train
    seen: list[tuple[Tensor, Tensor]] = []

    def noted(logits: Tensor, targets: Tensor) -> Tensor:
        if logits.requires_grad:
            seen.append((logits.detach(), targets))
        return F.cross_entropy(logits, targets)

    learner(images, store, loss=noted).fit(1, lr=1e-2, mix=Mixup(0.4))
    assert part.targets is not None
    labels = torch.tensor(part.targets)
    order = torch.from_numpy(np.random.default_rng([0, 0, 0]).permutation(TRAIN))
    for place, (rows, (_, targets)) in enumerate(zip(torch.split(order, 8), seen, strict=True)):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(np.random.default_rng([0, 0, 2, place, 0, 0]).integers(2**63)))
            _, expected = v2.MixUp(alpha=0.4, num_classes=3)(torch.zeros(len(rows), 3, 1, 1), labels[rows])
        assert torch.equal(targets, expected)


def test_several_labels_and_numbers_are_mixed_as_they_are(stored: tuple[ImageSet, FeatureStore]) -> None:
    seen: list[Tensor] = []

    def noted(logits: Tensor, targets: Tensor) -> Tensor:
        if logits.requires_grad:
            seen.append(targets)
        return (logits - targets).square().mean()

    for labels, task in (([["a"], ["a", "b"], ["b"]] * 4, "multi"), ([[1.0], [2.0], [9.0]] * 4, "regression")):
        images = ImageSet.from_arrays(pixels(12), labels, task=task)  # type: ignore[arg-type]
        learner(images, None, loss=noted).fit(1, lr=1e-3, mix=Mixup(0.4))
        mixed = torch.cat(seen)
        assert mixed.shape == (12, len(images.classes))
        assert len({*mixed.flatten().tolist()}) > 4
        seen.clear()


@pytest.mark.parametrize(
    ("freeze_to", "mix", "message"),
    [
        ("layer2", CutMix(), "CutMix cuts boxes out of images or maps, and what trains is given activations NC"),
        (None, FeatureNoise(), "FeatureNoise changes activations, and nothing is frozen"),
        (None, [Mixup(), FeatureBrightness()], "FeatureBrightness changes activations, and nothing is frozen"),
    ],
)
def test_a_change_that_makes_no_sense_there_is_refused(
    stored: tuple[ImageSet, FeatureStore], freeze_to: str | None, mix: Any, message: str
) -> None:
    for source in (stored[1] if freeze_to else None, None):
        with pytest.raises(ValueError, match=message):
            learner(stored[0], source, freeze_to).fit(1, lr=1e-3, mix=mix)


def test_what_is_no_change_of_a_batch_is_refused(stored: tuple[ImageSet, FeatureStore]) -> None:
    for mix in ("mixup", [0.4], nn.Identity()):
        with pytest.raises(TypeError, match=r"mix has .*; expected changes of a batch: Mixup\(0.4\)"):
            learner(*stored).fit(1, lr=1e-3, mix=mix)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="alpha of Mixup is 0; expected a positive, finite number"):
        Mixup(0)
    with pytest.raises(ValueError, match="sampling is 'even'; expected shuffled or balanced"):
        learner(*stored).fit(1, lr=1e-3, sampling="even")  # type: ignore[arg-type]


def test_an_interrupted_fit_of_mixed_balanced_batches_goes_on_to_the_same_bits(
    stored: tuple[ImageSet, FeatureStore], tmp_path: Path
) -> None:
    images, store = stored
    options: dict[str, Any] = {"lr": 1e-2, "mix": [Mixup(0.4), FeatureNoise(0.1)], "sampling": "balanced"}
    expected = learner(images, store).fit(3, **options)

    def stop(_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        learner(images, store).fit(3, **options, checkpoint=tmp_path / "fit", on_epoch_end=stop)
    for other in ({"mix": Mixup(0.4)}, {"sampling": "shuffled"}):
        with pytest.raises(FactsDifferError, match=f"differs in: {next(iter(other))} "):
            learner(images, store).fit(3, **{**options, **other}, checkpoint=tmp_path / "fit", resume=True)
    history = learner(images, store).fit(3, **options, checkpoint=tmp_path / "fit", resume=True)
    assert history.losses == expected.losses


def test_the_finder_heeds_what_the_fit_will_do(stored: tuple[ImageSet, FeatureStore]) -> None:
    plain, mixed, balanced = (
        learner(*stored).lr_find(**options).losses for options in ({}, {"mix": Mixup(1.0)}, {"sampling": "balanced"})
    )
    assert plain != mixed
    assert plain != balanced


# ------------------------------------------------------------------------------------------------------------ sampling


def batches(images: ImageSet, store: FeatureStore | None, augment: Augment | None = None) -> Batches:
    learn = learner(images, store)
    situation = Situation.of(learn.model, images, store, view=learn.view)
    source = find(situation, images.train, augment)
    return Batches(source, situation, batch_size=8, workers=0, sampling="balanced")


def test_balanced_batches_have_each_class_as_often_as_torchs_weighted_sampler(
    stored: tuple[ImageSet, FeatureStore],
) -> None:
    images, store = stored
    cached, live = batches(images, store), batches(images, None)
    for epoch in range(3):
        for (inputs, targets), (expected, labels) in zip(cached.epoch(0, epoch), live.epoch(0, epoch), strict=True):
            assert torch.equal(inputs, expected)
            assert torch.equal(targets, labels)
    orders = [cached._order(0, number) for number in range(300)]
    assert {len(order) for order in orders} == {TRAIN}
    assert images.train.targets is not None
    labels = torch.tensor(images.train.targets)
    drawn = np.concatenate(orders).tolist()
    weights = 1 / labels.bincount()[labels]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        reference = [*WeightedRandomSampler(weights.tolist(), len(drawn))]
    ours, theirs = (labels[torch.tensor(rows)].bincount() / len(drawn) for rows in (drawn, reference))
    assert ours.tolist() == pytest.approx([1 / 3] * 3, abs=0.02)
    assert ours.tolist() == pytest.approx(theirs.tolist(), abs=0.03)


@pytest.mark.parametrize("seeds", [range(3), "fresh"])
def test_an_image_that_a_pass_has_again_shows_another_view(stored: tuple[ImageSet, FeatureStore], seeds: Any) -> None:
    images, store = stored
    made = batches(
        images, store if seeds != "fresh" else None, Augment("flip" if seeds != "fresh" else "side_on", seeds)
    )
    order = made._order(0, 0)
    views = made._views(0, 0, order)
    row = int(np.bincount(order).argmax())
    its = views[order == row].tolist()
    assert len(its) > 1
    assert len(set(its)) == (len(its) if seeds == "fresh" else min(3, len(its)))
    plain = Batches(made.source, made.situation, batch_size=8, workers=0)
    first = [order.tolist().index(each) for each in sorted({*order.tolist()})]
    expected = plain._views(0, 0, np.arange(TRAIN))
    assert views[first].tolist() == expected[order[first]].tolist()


def test_balanced_sampling_is_refused_where_an_image_is_not_of_one_class() -> None:
    for labels, task in (([["a"], ["b"]] * 4, "multi"), ([[1.0], [2.0]] * 4, "regression")):
        images = ImageSet.from_arrays(pixels(8), labels, task=task)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=f"Sampling is balanced over classes, and the task is {task}"):
            learner(images, None).fit(1, lr=1e-3, sampling="balanced")
