from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from support.scaled import rounded
from support.tiny import VIEW, photos, pixels, rows_by_hand, staged
from torch import Tensor, nn

from featstore import Augment, FeatureStore, ImageError, ImageSet, StagedModel, extract
from featstore.errors import OnError
from training import Learner
from training.inputs.batches import Batches, fresh_seed
from training.inputs.derive import FeatureSource, find
from training.inputs.resident import resident, rows_on
from training.inputs.situation import Situation

SEEDS = Augment("random_resized_crop", seeds=range(3))


def numbered(count: int) -> ImageSet:
    """Images whose target is their place, so that a batch tells which rows are in it."""
    return ImageSet.from_arrays(pixels(count, size=20), list(range(count)))


def model(freeze_to: str | None) -> StagedModel:
    made = staged().with_head(nn.Linear(24, 2), cut="layer2", reduction="concat")
    if freeze_to is None:
        made.unfreeze()
    else:
        made.freeze_to(freeze_to)
    return made


def batches(
    images: ImageSet,
    *,
    batch_size: int,
    freeze_to: str | None = None,
    store: FeatureStore | None = None,
    augment: Augment | None = None,
    on_error: OnError = "raise",
    workers: int = 0,
) -> Batches:
    situation = Situation(
        model=model(freeze_to),
        origins=(),
        images=images,
        store=store,
        view=VIEW,
        key=None,
        on_missing="error",
        on_error=on_error,
        device=torch.device("cpu"),
    )
    return Batches(find(situation, images, augment), situation, batch_size=batch_size, workers=workers)


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> tuple[ImageSet, FeatureStore]:
    """Maps at layer1 and layer2 of 45 images, in the evaluation view and three seeds."""
    images, store = numbered(45), FeatureStore(tmp_path_factory.mktemp("features"))
    cuts = ["layer1:none", "layer2:concat"]
    extract(staged(), images, store, cuts=cuts, augment=SEEDS, dtype="float32", device="cpu", workers=0)
    return images, store


def equal(some: Batches, others: Batches, *, seed: int = 0, epochs: int = 1) -> bool:
    """Whether two sources give the same batches, bit for bit."""
    for epoch in range(epochs):
        for (inputs, targets), (expected, rows) in zip(some.epoch(seed, epoch), others.epoch(seed, epoch), strict=True):
            if not torch.equal(inputs, expected) or not torch.equal(targets, rows):
                return False
    return True


@pytest.mark.parametrize(
    ("count", "batch_size", "sizes"),
    [
        (1, 64, [1]),
        (2, 64, [2]),
        (64, 64, [64]),
        (65, 64, [65]),
        (66, 64, [64, 2]),
        (128, 64, [64, 64]),
        (129, 64, [64, 65]),
        (130, 64, [64, 64, 2]),
        (3, 2, [3]),
        (5, 2, [2, 3]),
        (20, 7, [7, 7, 6]),
        (3, 1, [1, 1, 1]),
    ],
)
def test_an_epoch_has_every_row_once_and_no_last_batch_of_one(count: int, batch_size: int, sizes: list[int]) -> None:
    made = batches(numbered(count), batch_size=batch_size)
    for epoch in range(2):
        rows = [targets.tolist() for _, targets in made.epoch(0, epoch)]
        assert [len(each) for each in rows] == sizes
        assert sorted(row for each in rows for row in each) == list(range(count))
    assert len(made) == len(sizes)


@pytest.mark.parametrize(("count", "sizes"), [(1, [1]), (64, [64]), (65, [64, 1])])
def test_a_pass_in_order_keeps_the_order_and_the_last_image(count: int, sizes: list[int]) -> None:
    rows = [numbers for _, numbers in batches(numbered(count), batch_size=64).in_order()]
    assert [len(each) for each in rows] == sizes
    assert np.concatenate(rows).tolist() == list(range(count))


def test_order_depends_on_seed_and_epoch_alone(stored: tuple[ImageSet, FeatureStore]) -> None:
    images, store = stored

    def order(seed: int, epoch: int, **options: FeatureStore | str | Augment) -> list[int]:
        made = batches(images, batch_size=8, **options)  # type: ignore[arg-type]
        return [row for _, targets in made.epoch(seed, epoch) for row in targets.tolist()]

    first = order(0, 0)
    assert order(0, 0, freeze_to="layer1") == order(0, 0, freeze_to="layer1", store=store) == first
    assert order(0, 0, freeze_to="layer2", store=store, augment=SEEDS) == first
    assert len({tuple(order(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9


@pytest.mark.parametrize("freeze_to", ["layer1", "layer2"])
@pytest.mark.parametrize("augment", [None, SEEDS], ids=["evaluation", "seeds"])
def test_features_and_images_give_the_same_batches(
    stored: tuple[ImageSet, FeatureStore], freeze_to: str, augment: Augment | None
) -> None:
    images, store = stored
    for batch_size in (2, 7, 44):
        cached = batches(images, batch_size=batch_size, freeze_to=freeze_to, store=store, augment=augment)
        live = batches(images, batch_size=batch_size, freeze_to=freeze_to, augment=augment)
        assert (cached.source.kind, live.source.kind) == ("features", "images")
        assert equal(cached, live, epochs=4)


@pytest.mark.parametrize("augment", [None, SEEDS], ids=["evaluation", "seeds"])
def test_batches_of_whole_numbers_are_those_of_images_as_numpy_rounds_them(
    tmp_path: Path, augment: Augment | None
) -> None:
    images, store = numbered(20), FeatureStore(tmp_path)
    extract(staged(), images, store, cuts=["layer1:none"], augment=augment, dtype="int8", device="cpu", workers=0)
    cached = batches(images, batch_size=7, freeze_to="layer1", store=store, augment=augment)
    live = batches(images, batch_size=7, freeze_to="layer1", augment=augment)
    assert (cached.source.kind, live.source.kind) == ("features", "images")
    for epoch in range(3):
        for (inputs, rows), (expected, same) in zip(cached.epoch(0, epoch), live.epoch(0, epoch), strict=True):
            assert torch.equal(rows, same)
            assert inputs.dtype == torch.float32
            assert np.array_equal(inputs.numpy(), rounded(expected.numpy()))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
@pytest.mark.parametrize("augment", [None, SEEDS])
def test_rows_that_lie_on_the_device_give_the_same_batches(
    stored: tuple[ImageSet, FeatureStore], augment: Augment | None, device: str
) -> None:
    images, store = stored
    some, others = (batches(images, batch_size=7, freeze_to="layer2", store=store, augment=augment) for _ in range(2))
    assert isinstance(others.source, FeatureSource)
    where = torch.device(device)
    rows = tuple(rows_on(where, each) for each in others.source.features)
    assert all(torch.equal(mine.cpu(), each.tensor()) for mine, each in zip(rows, others.source.features, strict=True))
    others.__dict__["_resident"], others.device = rows, where
    for (inputs, targets), (expected, labels) in zip(some.epoch(0, 0), others.epoch(0, 0), strict=True):
        assert torch.equal(inputs, expected.cpu())
        assert torch.equal(targets, labels.cpu())
    assert resident(others.source.features, torch.device("cpu")) is None


@pytest.mark.cuda
def test_rows_lie_on_a_gpu_that_has_room_for_them(stored: tuple[ImageSet, FeatureStore]) -> None:
    images, store = stored
    source = batches(images, batch_size=7, freeze_to="layer2", store=store).source
    assert isinstance(source, FeatureSource)
    (rows,) = resident(source.features, torch.device("cuda", 0)) or (None,)
    assert rows is not None
    assert rows.device.type == "cuda"


def test_images_reach_an_unfrozen_model_as_it_would_see_them_alone() -> None:
    images = numbered(9)
    expected = rows_by_hand(nn.Identity(), images, VIEW)
    for inputs, targets in batches(images, batch_size=4).epoch(0, 0):
        assert torch.equal(inputs, expected[targets])


def test_each_image_goes_through_all_views_before_it_sees_one_again(stored: tuple[ImageSet, FeatureStore]) -> None:
    images, store = stored
    made = batches(images, batch_size=16, freeze_to="layer2", store=store, augment=SEEDS)
    views = [batches(images, batch_size=16, freeze_to="layer2", store=store, augment=Augment(SEEDS.policy, [seed]))
             for seed in range(3)]  # fmt: skip
    rows = [torch.cat([inputs for inputs, _ in each.in_order()]) for each in views]
    seen = np.full((6, len(images)), -1)
    for epoch in range(6):
        for inputs, targets in made.epoch(0, epoch):
            for values, row in zip(inputs, targets.tolist(), strict=True):
                (seen[epoch, row],) = (view for view in range(3) if torch.equal(values, rows[view][row]))
    for first in (0, 3):
        assert (np.sort(seen[first : first + 3], axis=0) == [[0], [1], [2]]).all()
    assert all(len(set(epoch.tolist())) == 3 for epoch in seen), "views should be mixed within an epoch"
    assert (seen[:3] != seen[3:]).any(), "the second round should have an order of its own"


def test_fresh_views_are_new_in_each_epoch_and_the_same_for_the_same_epoch() -> None:
    images = numbered(6)
    fresh = Augment("random_resized_crop", seeds="fresh")
    made = batches(images, batch_size=6, augment=fresh)

    def by_row(seed: int, epoch: int) -> Tensor:
        ((inputs, targets),) = made.epoch(seed, epoch)
        return inputs[targets.argsort()]

    assert torch.equal(by_row(0, 0), by_row(0, 0))
    passes = [by_row(seed, epoch) for seed in range(2) for epoch in range(2)]
    assert all(not torch.equal(passes[i], passes[j]) for i in range(4) for j in range(i))
    assert len({fresh_seed(seed, epoch) for seed in range(20) for epoch in range(20)}) == 400


@pytest.mark.parametrize("freeze_to", [None, "layer1"])
def test_images_that_cannot_be_decoded_leave_rows_joined_to_their_targets(
    tmp_path: Path, freeze_to: str | None
) -> None:
    root = photos(tmp_path / "photos", 12)
    for name in ("cat/4.jpg", "dog/7.jpg"):
        (root / name).write_bytes((root / name).read_bytes()[:300])
    images = ImageSet.from_folder(root)
    broken = {name for name in images.ids if name in ("cat/4.jpg", "dog/7.jpg")}
    good = images.select([name not in broken for name in images.ids])
    trunk = nn.Identity() if freeze_to is None else staged().trunk(freeze_to).eval()
    expected = rows_by_hand(trunk, good, VIEW)
    made = batches(images, batch_size=4, freeze_to=freeze_to, on_error="skip")
    assert good.targets is not None
    found = [(values, int(target)) for inputs, targets in made.epoch(0, 0)
             for values, target in zip(inputs, targets, strict=True)]  # fmt: skip
    assert len(found) == len(good)
    for values, target in found:
        (row,) = (row for row in range(len(good)) if torch.equal(values, expected[row]))
        assert target == good.targets[row]
    assert set(made.failures) == broken
    assert all(made.failures.values())
    with pytest.raises(ImageError, match=r"cat/4\.jpg|dog/7\.jpg"):
        list(batches(images, batch_size=4, freeze_to=freeze_to).epoch(0, 0))


def test_workers_do_not_change_a_bit() -> None:
    images = numbered(23)
    for freeze_to in (None, "layer1"):
        alone = batches(images, batch_size=5, freeze_to=freeze_to, augment=SEEDS)
        assert equal(alone, batches(images, batch_size=5, freeze_to=freeze_to, augment=SEEDS, workers=2), epochs=2)


@pytest.mark.parametrize("batch_size", [5, 32, 44])
def test_each_batch_is_a_tensor_of_its_own_that_a_stage_may_write_into(
    stored: tuple[ImageSet, FeatureStore], batch_size: int
) -> None:
    images, store = stored
    for freeze_to, features in (("layer1", None), ("layer1", store), ("layer1.1", store), ("layer2", None)):
        made = batches(images, batch_size=batch_size, freeze_to=freeze_to if features is None else "layer1",
                       store=features)  # fmt: skip
        expected = [inputs.clone() for inputs, _ in made.epoch(0, 0)]
        for (inputs, _), values in zip(made.epoch(0, 0), expected, strict=True):
            assert torch.equal(inputs, values)
            assert inputs.is_contiguous()
            assert inputs.untyped_storage().nbytes() == inputs.nbytes
            assert inputs.data_ptr() % 64 == 0
            inputs.zero_()


def test_no_more_than_a_batch_and_a_chunk_is_held() -> None:
    made, read, given = batches(numbered(4), batch_size=10), 0, 0

    def chunks() -> Iterator[tuple[Tensor, NDArray[np.int64]]]:
        nonlocal read
        for start in range(0, 1000, 8):
            read += 8
            yield torch.zeros(8, 2), np.arange(start, start + 8)

    for _, rows in made._batched(chunks(), merge_single=True):
        given += len(rows)
        assert read - given <= 10 + 1 + 8
    assert given == 1000


def test_a_batch_size_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="batch_size is 0; expected at least 1"):
        batches(numbered(2), batch_size=0)


def test_images_without_labels_cannot_be_trained_on() -> None:
    made = batches(ImageSet.from_arrays(pixels(3)), batch_size=2)
    with pytest.raises(ValueError, match="no labels"):
        next(iter(made.epoch(0, 0)))


def test_a_policy_that_has_changed_since_it_was_keyed_is_refused() -> None:
    amount = 2

    def divided(image: Tensor, generator: torch.Generator) -> Tensor:
        return image // amount

    made = [batches(numbered(4), batch_size=2, augment=Augment(divided, seeds)) for seeds in ([0], "fresh")]
    amount = 3
    for each in made:
        with pytest.raises(ValueError, match="the policy divided has changed"):
            next(each.epoch(0, 0))


@pytest.mark.parametrize("from_features", [True, False])
def test_a_situation_of_plain_values_gives_the_batches_that_a_learner_trains_on(
    from_features: bool, tmp_path: Path
) -> None:
    images = ImageSet.from_folder(photos(tmp_path / "photos")).split(valid=0.34)
    store = FeatureStore(tmp_path / "features") if from_features else None
    if store is not None:
        extract(staged(), images, store, cuts=["layer2:concat"], dtype="float32", progress=False, device="cpu")
    steps: list[tuple[Tensor, Tensor]] = []

    def noted(logits: Tensor, targets: Tensor) -> Tensor:
        if logits.requires_grad:  # a training step
            steps.append((logits.detach().clone(), targets.clone()))
        return nn.functional.cross_entropy(logits, targets)

    options: dict[str, Any] = {
        "head": nn.Linear(24, 2),
        "reduce": "concat",
        "batch_size": 3,
        "device": "cpu",
        "quiet": True,
    }
    learn = Learner(staged(), images, store, loss=noted, **options)
    situation = Situation.of(learn.model, images, store)
    training = Batches(find(situation, images.train, None), situation, batch_size=3, workers=0)
    assert training.source.kind == ("features" if from_features else "images")
    batches = list(training.epoch(seed=0, epoch=0))
    assert learn.model.head is not None
    first = learn.model.head(batches[0][0]).detach()  # before the first step moves the weights
    learn.fit(1, lr=1e-3)
    assert torch.equal(steps[0][0], first)
    assert [targets.tolist() for _, targets in steps] == [targets.tolist() for _, targets in batches]
