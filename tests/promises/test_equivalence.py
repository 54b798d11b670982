"""Training from cached float32 features equals training with the frozen trunk live, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.programs import photographs
from support.small_networks import SMALL, small
from support.splitting import randomise, randomise_for
from support.tiny import VIEW, pixels, staged_vision_transformer
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from featstore import Augment, FeatureStore, ImageSet, StagedModel, View, backbone, extract
from featstore.images.decode import decode
from training import Learner

NUM_CLASSES = 4
TRAIN, VALID = 19, 5  # 19: a last batch of one at 2 (it joins), a short one at 7 and 16, a single short batch at 32
BATCH_SIZES = [2, 7, 16, 32]
SEEDS = Augment("random_resized_crop", seeds=range(3))
VIT_SEEDS = Augment("flip", seeds=[1])
RESNET_VIEW = View(size=40, resize=44)
ROUNDED = 0.01
"""By how much of itself a first loss may be off from features rounded to float16: 11 bits, 0.0005 of each feature, of
which batch norm over six rows that are much alike makes more. Measured: 0.0008 to 0.007."""


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, maps: Tensor) -> Tensor:
        inner = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(maps)))))
        inner += maps
        result: Tensor = self.relu(inner)
        return result


class Net(nn.Module):
    """What makes parity hard: batch norm, in-place operations, a residual, dropout as a layer and as a function."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1, self.relu = nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True)
        self.dropout = nn.Dropout2d(0.2)
        self.block = Block(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 12, 3, 2, 1), nn.BatchNorm2d(12)
        self.fc1, self.fc2 = nn.Linear(12, 16), nn.Linear(16, NUM_CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.block(self.dropout(self.relu(self.bn1(self.conv1(images)))))
        maps = F.dropout(maps, 0.3, self.training)
        maps = F.relu(self.bn2(self.conv2(maps)), inplace=True)
        vector = F.relu(self.fc1(maps.mean((2, 3))), inplace=True)
        logits: Tensor = self.fc2(F.dropout(vector, 0.5, self.training))
        return logits


def labelled(train: int = TRAIN, valid: int = VALID, size: int = 24) -> ImageSet:
    count = train + valid
    labels = [index % NUM_CLASSES for index in range(count)]
    return ImageSet.from_arrays(pixels(count, size=size), labels, splits=["train"] * train + ["valid"] * valid)


def net() -> StagedModel:
    module = Net()
    randomise(module, seed=3)
    return StagedModel.from_module(module, view=VIEW, name="net")


def extracted(root: Path, model: StagedModel, images: ImageSet, cuts: list[str], **options: Any) -> FeatureStore:
    store = FeatureStore(root)
    extract(model, images, store, cuts=cuts, dtype="float32", device="cpu", workers=0, **options)
    return store


def learner(
    model: StagedModel, images: ImageSet, store: FeatureStore | None, freeze_to: str | None, **options: Any
) -> Learner:
    learn = Learner(model, images, store, device="cpu", workers=0, quiet=True, **options)
    if freeze_to is not None:
        learn.freeze_to(freeze_to)
    return learn


def assert_equal_training(cached: Learner, live: Learner, epochs: int = 2, **options: Any) -> None:
    """Fits both and compares every bit: the loss of each step, the records, all weights and statistics."""
    before = {name: value.clone() for name, value in live.model.tensors().items()}
    histories = [learn.fit(epochs, **options) for learn in (cached, live)]
    assert (cached.read_from, live.read_from) == ("features", "images")
    assert histories[0].losses == histories[1].losses
    records = [[{**record, "seconds": 0.0} for record in history.records] for history in histories]
    assert records[0] == records[1]
    after, expected = cached.model.tensors(), live.model.tensors()
    assert after.keys() == expected.keys()
    assert [name for name in after if not torch.equal(after[name], expected[name])] == []
    assert any(not torch.equal(before[name], expected[name]) for name in expected), "nothing was trained"


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Small kernels lose more time on waiting for each other's threads than they need, above all on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[StagedModel, ImageSet, FeatureStore]:
    """The small network, its images, and a store of all its cuts with three seeds."""
    model, images = net(), labelled()
    cuts = [f"{cut}:none" for cut in model.cut_points[:-1]]
    return model, images, extracted(tmp_path_factory.mktemp("net"), model, images, cuts, augment=SEEDS)


CUTS = net().cut_points[:-1]


def test_the_small_network_is_cut_at_every_kind_of_place() -> None:
    assert {"conv1", "bn1", "relu", "dropout", "block", "conv2", "bn2", "fc1"} <= set(CUTS)


@pytest.mark.parametrize("augment", [None, SEEDS], ids=["evaluation", "seeds"])
@pytest.mark.parametrize("cut", CUTS)
def test_training_from_features_equals_training_live_at_every_cut(
    whole: tuple[StagedModel, ImageSet, FeatureStore], cut: str, augment: Augment | None
) -> None:
    model, images, store = whole
    absent = ImageSet.from_store(store)  # the digests are here and the images are not, so nothing can read them
    assert absent.absent() == list(range(len(images)))
    # Each cut once at each batch size, with half of them from the evaluation view and half from views by seed.
    batch_sizes = BATCH_SIZES[::2] if augment is None else BATCH_SIZES[1::2]
    for batch_size, optimizer in zip(batch_sizes, ["adamw", "sgd"], strict=True):
        options = {"head": "keep", "batch_size": batch_size, "optimizer": optimizer, "augment": augment}
        cached = learner(model, absent, store, cut, **options)
        live = learner(model, images, None, cut, **options)
        assert_equal_training(cached, live, epochs=1 if augment is None else 2, lr=3e-3)


@pytest.mark.parametrize("head", ["concat", "linear", "mlp"])
def test_a_head_on_pooled_features_a_head_on_maps_and_a_live_head_are_equal(
    whole: tuple[StagedModel, ImageSet, FeatureStore], tmp_path: Path, head: str
) -> None:
    model, images, maps = whole
    pooled = extracted(tmp_path, model, images, ["block:concat"])
    for batch_size in (2, 7):
        options = {"cut": "block", "reduce": "concat", "head": head, "batch_size": batch_size}
        live = learner(model, images, None, None, **options)
        assert_equal_training(learner(model, images, pooled, None, **options), live, lr=1e-2)
        from_maps = learner(model, images, maps, None, **options)
        history = from_maps.fit(2, lr=1e-2)
        assert from_maps.read_from == "features"
        assert history.losses == live.history.losses
        expected = live.model.tensors()
        assert all(torch.equal(value, expected[name]) for name, value in from_maps.model.tensors().items())


@pytest.mark.parametrize("augment", [None, SEEDS], ids=["evaluation", "seeds"])
def test_frozen_stages_behind_stored_maps_equal_a_trunk_that_is_live_from_the_image_on(
    tmp_path: Path, augment: Augment | None
) -> None:
    model, images = net(), labelled()
    store = extracted(tmp_path, model, images, ["relu:none"], augment=SEEDS)
    for batch_size in BATCH_SIZES:
        options = {"head": "keep", "batch_size": batch_size, "augment": augment}
        cached = learner(model, images, store, "bn2", **options)
        assert "run on the stored activations" in cached.inputs.why
        assert_equal_training(cached, learner(model, images, None, "bn2", **options), lr=3e-3)


class FirstConvolutions(TorchFunctionMode):
    """Notes how many images each convolution over RGB got."""

    def __init__(self) -> None:
        super().__init__()
        self.batch_sizes: list[int] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.conv2d and args[0].shape[1] == 3:
            self.batch_sizes.append(len(args[0]))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("trunk_batch", [1, 5, 24])
def test_a_live_trunk_beside_a_store_takes_its_batch_size(tmp_path: Path, trunk_batch: int) -> None:
    model, images = net(), labelled()
    store = extracted(tmp_path / "maps", model, images, ["block:none"], batch_size=trunk_batch)
    deeper = extracted(tmp_path / "deeper", model, images, ["bn2:none"], batch_size=trunk_batch)
    for batch_size in (2, 16):
        options = {"head": "keep", "batch_size": batch_size, "on_missing": "images"}
        cached = learner(model, images, store, "block", **options)
        live = learner(model, images, deeper, "block", **options)
        live.evaluate("valid")  # how values lie in memory is found out first, by a pass of two images
        with FirstConvolutions() as seen:
            live.evaluate("train")
        assert set(seen.batch_sizes) == {trunk_batch}
        assert_equal_training(cached, live, lr=3e-3)


def test_scores_and_predictions_from_features_equal_live_ones(
    whole: tuple[StagedModel, ImageSet, FeatureStore],
) -> None:
    model, images, store = whole
    for batch_size in BATCH_SIZES:
        cached = learner(model, ImageSet.from_store(store), store, "block", head="keep", batch_size=batch_size)
        live = learner(model, images, None, "block", head="keep", batch_size=batch_size)
        assert cached.evaluate("valid") == live.evaluate("valid")
        assert cached.evaluate("train") == live.evaluate("train")
        assert np.array_equal(cached.predict_proba(cached.images), live.predict_proba(images))
        assert (cached.read_from, live.read_from) == ("features", "images")


def test_head_then_tail_then_everything_is_equal_from_features_and_live(
    whole: tuple[StagedModel, ImageSet, FeatureStore],
) -> None:
    model, images, store = whole
    cached = learner(model, images, store, "block", head="keep", batch_size=7)
    live = learner(model, images, None, "block", head="keep", batch_size=7)
    assert_equal_training(cached, live, lr=3e-3)
    for learn in (cached, live):
        learn.freeze_to("relu")
    assert_equal_training(cached, live, lr=(1e-4, 1e-3))
    for learn in (cached, live):
        learn.unfreeze()
    assert cached.fit(1, lr=(1e-5, 1e-3)).losses == live.fit(1, lr=(1e-5, 1e-3)).losses
    assert (cached.read_from, live.read_from) == ("images", "images")


@pytest.mark.parametrize(("freeze_to", "batch_sizes"), [("layer3", BATCH_SIZES[1::2]), ("layer4", BATCH_SIZES[::2])])
def test_resnet18_trains_equally_from_features_and_live(
    resnet: tuple[StagedModel, ImageSet, FeatureStore], freeze_to: str, batch_sizes: list[int]
) -> None:
    model, images, store = resnet
    for batch_size, augment in zip(batch_sizes, [None, SEEDS], strict=True):
        options = {"cut": "layer4", "batch_size": batch_size, "augment": augment, "view": RESNET_VIEW}
        cached = learner(model, ImageSet.from_store(store), store, freeze_to, **options)
        live = learner(model, images, None, freeze_to, **options)
        assert_equal_training(cached, live, epochs=1, lr=1e-3)


@pytest.fixture(scope="module")
def resnet(tmp_path_factory: pytest.TempPathFactory) -> tuple[StagedModel, ImageSet, FeatureStore]:
    """Maps at layer3 and pooled rows at layer4, with three seeds."""
    model, images = backbone("resnet18", weights="none"), labelled(train=TRAIN, valid=2, size=44)
    randomise(model, seed=1)
    root = tmp_path_factory.mktemp("resnet")
    store = extracted(root, model, images, ["layer3:none", "layer4"], augment=SEEDS, view=RESNET_VIEW)
    return model, images, store


@pytest.mark.parametrize(
    ("name", "cuts", "size"),
    [
        ("mobilenet_v3_small", ["features.8", "features.12"], 32),
        ("convnext_tiny", ["features.4", "features.7"], 32),
        ("densenet121", ["features.transition3", "relu"], 32),
        ("swin_t", ["features.5", "permute"], 32),
        ("efficientnet_b0", ["features.2", "features.4"], 32),
        ("googlenet", ["inception4e", "inception5b"], 32),
        ("timm:convnext_atto", ["stages.1", "stages.3"], 64),
        ("timm:mobilenetv3_small_050", ["blocks.3", "blocks.5"], 32),
    ],
)
def test_a_network_of_each_kind_trains_equally_from_features_and_live(
    name: str, cuts: list[str], size: int, tmp_path: Path
) -> None:
    images = labelled(train=6, valid=2, size=size)
    model = small(name, size) if name in SMALL else backbone(name, "none").with_(view=View(size=size, resize=size))
    randomise_for(model, model.view.normalise(torch.from_numpy(pixels(2, size=size)).permute(0, 3, 1, 2)))
    inner, last = cuts
    store = extracted(tmp_path, model, images, [f"{inner}:none", last])
    for frozen in cuts:
        cached = learner(model, ImageSet.from_store(store), store, frozen, cut=last, batch_size=4)
        live = learner(model, images, None, frozen, cut=last, batch_size=4)
        assert_equal_training(cached, live, epochs=1, lr=1e-3)


@pytest.mark.parametrize("freeze_to", ["encoder.layers.encoder_layer_10", "encoder.ln"])
def test_a_vit_trains_equally_from_features_and_live(
    vit: tuple[StagedModel, ImageSet, FeatureStore, FeatureStore], freeze_to: str
) -> None:
    model, images, store, beside = vit
    for batch_size, augment in zip(BATCH_SIZES, [None, VIT_SEEDS, None, VIT_SEEDS], strict=True):
        options = {"cut": "encoder.ln", "reduce": "token", "batch_size": batch_size, "augment": augment}
        cached = learner(model, ImageSet.from_store(store), store, freeze_to, **options)
        # The store beside it holds another pool only: it serves nothing, and says which batch size the trunk takes.
        live = learner(model, images, beside, freeze_to, on_missing="images", **options)
        assert_equal_training(cached, live, epochs=1, lr=1e-3)


@pytest.fixture(scope="module", params=["tiny", pytest.param("vit_b_32", marks=pytest.mark.slow)])
def vit(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[StagedModel, ImageSet, FeatureStore, FeatureStore]:
    """Tokens before the last layer and the class token behind it, with a seed; and a store of another pool."""
    model = staged_vision_transformer() if request.param == "tiny" else backbone("vit_b_32", weights="none")
    images = labelled(train=5, valid=0, size=32)
    randomise(model, seed=1)
    root = tmp_path_factory.mktemp("vit")
    cuts = ["encoder.layers.encoder_layer_10:none", "encoder.ln"]
    store = extracted(root / "store", model, images, cuts, augment=VIT_SEEDS, batch_size=3)
    beside = extracted(root / "beside", model, images.select([0]), ["encoder.ln:avg"], batch_size=3)
    return model, images, store, beside


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("resnet18", 64),
        ("mobilenet_v3_small", 64),
        pytest.param("densenet121", 64, marks=pytest.mark.slow),  # its maps and tail train above
        pytest.param("vit_b_32", 224, marks=pytest.mark.slow),
    ],
)
def test_heads_of_known_networks_train_equally_and_nearly_so_from_rounded_features(
    name: str, size: int, tmp_path: Path
) -> None:
    images = ImageSet.from_folder(photographs(tmp_path / "photos", count=4)).split(valid=0.25)
    model = backbone(name, weights="none").with_(view=View(size=size, resize=size))
    views = [model.view.render(decode(images.read(row))[0], b"") for row in (0, 7)]
    randomise_for(model, model.view.normalise(torch.stack(views)))
    trunk_batch = 3
    cut = model.default_cut
    exact = extracted(tmp_path / "exact", model, images, [cut], augment=VIT_SEEDS, batch_size=trunk_batch)
    beside = extracted(tmp_path / "beside", model, images.select([0]), [f"{cut}:none"], batch_size=trunk_batch)
    rounded = FeatureStore(tmp_path / "rounded")
    extract(model, images, rounded, cuts=[cut], dtype="float16", device="cpu", workers=0, batch_size=trunk_batch)
    for augment in (None, VIT_SEEDS):
        cached = learner(model, ImageSet.from_store(exact), exact, None, batch_size=6, augment=augment)
        # The store beside it serves nothing, and says which batch size the trunk takes.
        live = learner(model, images, beside, None, batch_size=6, augment=augment, on_missing="images")
        assert_equal_training(cached, live, epochs=2, lr=1e-3)
        if augment is None:
            first = learner(model, images, rounded, None, batch_size=6).fit(1, lr=1e-3).losses[0]
            assert first == pytest.approx(live.history.losses[0], rel=ROUNDED)


def test_training_is_equal_with_several_threads_too(tmp_path: Path) -> None:
    model, images = net(), labelled()
    torch.set_num_threads(2)
    try:
        store = extracted(tmp_path, model, images, ["dropout:none"])
        cached = learner(model, images, store, "dropout", head="keep", batch_size=7)
        live = learner(model, images, None, "dropout", head="keep", batch_size=7)
        assert_equal_training(cached, live, epochs=1, lr=3e-3)
    finally:
        torch.set_num_threads(1)
