"""What must also hold on a GPU; skipped where there is none."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featstore import (
    Augment,
    FactsDifferError,
    FeatureStore,
    ImageSet,
    Output,
    StagedModel,
    Trunk,
    View,
    backbone,
    extract,
)
from featstore.models.modes import numerics
from featstore.models.names import Batching
from featstore.models.probe import TOLERANCES
from training import Learner

pytestmark = pytest.mark.cuda

IMAGES = torch.randint(0, 256, (40, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def model() -> StagedModel:
    model = backbone("resnet18", "none")
    model.view = View(size=64, resize=64)
    return model


@pytest.fixture(scope="module")
def images() -> ImageSet:
    """`IMAGES` with two classes; their ids are their places."""
    return ImageSet.from_arrays(IMAGES.permute(0, 2, 3, 1).numpy(), np.arange(len(IMAGES)) % 2).split(valid=0.2)


def _features(model: StagedModel, device: str, precision: str = "fp32") -> Tensor:
    output = Output("layer4", model.pool("layer4"))
    trunk = Trunk(model, [output], view=model.view, device=device, precision=precision)  # type: ignore[arg-type]
    return trunk(IMAGES)[0].cpu()


def test_fp32_features_of_a_gpu_are_those_of_a_cpu(model: StagedModel) -> None:
    on_cpu, on_gpu = _features(model, "cpu"), _features(model, "cuda")
    # Another profile: the promise across profiles is 1e-5 of the largest value.
    assert float((on_cpu - on_gpu).abs().max()) <= 1e-5 * float(on_cpu.abs().max())


@pytest.mark.parametrize(("precision", "tolerance"), [("tf32", 1e-2), ("bf16", 5e-2), ("fp16", 1e-2)])
def test_narrower_precisions_stay_within_the_probe_tolerance(
    model: StagedModel, precision: str, tolerance: float
) -> None:
    exact, narrow = _features(model, "cpu"), _features(model, "cuda", precision)
    assert float((exact - narrow).abs().max()) <= tolerance * float(exact.abs().max())


def test_tf32_set_by_the_caller_changes_no_fp32_feature_and_comes_back(model: StagedModel) -> None:
    pinned = _features(model, "cuda")
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        assert torch.equal(_features(model, "cuda"), pinned)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


def test_a_row_on_a_gpu_depends_on_its_image_alone(model: StagedModel) -> None:
    trunk = Trunk(
        model, [Output("layer4", model.pool("layer4"))], view=model.view, device="cuda", batching=Batching(32)
    )
    order = torch.randperm(len(IMAGES), generator=torch.Generator().manual_seed(1))
    assert torch.equal(trunk(IMAGES[order])[0], trunk(IMAGES)[0][order])


def test_rows_of_many_passes_are_those_of_passes_with_nothing_under_way(model: StagedModel, tmp_path: Path) -> None:
    pixels = torch.randint(0, 256, (900, 64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    images, store = ImageSet.from_arrays(pixels.numpy()), FeatureStore(tmp_path)
    options = {"cuts": ["layer1:none", "layer4"], "dtype": "float32", "device": "cuda", "batch_size": 16}
    keys = extract(model, images, store, **options).keys  # type: ignore[arg-type]
    outputs = [Output("layer1", model.pool("layer1", "none")), Output("layer4", model.pool("layer4"))]
    trunk = Trunk(model, outputs, view=model.view, device="cuda", batching=Batching(16))
    expected = []
    for views in pixels.permute(0, 3, 1, 2).split(16):  # type: ignore[no-untyped-call]
        expected.append([rows.cpu() for rows in trunk(views)])
    for key, passes in zip(keys, zip(*expected, strict=True), strict=True):
        assert torch.equal(store.features(images, key)[:], torch.cat(passes))


def test_a_head_trains_on_a_gpu_from_features_as_with_the_live_trunk(
    model: StagedModel, images: ImageSet, tmp_path: Path
) -> None:
    store, two = FeatureStore(tmp_path), Augment("flip", seeds=range(2))
    extract(model, images, store, cuts=["layer4"], augment=two, dtype="float32", device="cuda")
    losses = []
    for source in (store, None):
        learn = Learner(model, images, source, augment=two, device="cuda", batch_size=8, quiet=True)
        losses.append(learn.fit(2, lr=1e-3).losses)
        assert next(learn.model.parameters()).device.type == "cuda"
    # Features are equal bit for bit; the head's own kernels may add in another order from run to run.
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)
    assert next(model.parameters()).device.type == "cpu"


def test_a_plain_head_trains_on_features_that_lie_on_the_gpu(
    model: StagedModel, images: ImageSet, tmp_path: Path
) -> None:
    store = FeatureStore(tmp_path)
    (key,) = extract(model, images, store, cuts=["layer4"], dtype="float32", device="cuda").keys
    features = store.features(images.train, key)
    values, targets = features.tensor("cuda"), torch.tensor(features.targets, device="cuda")
    assert values.device.type == "cuda"
    assert torch.equal(values.cpu(), _features(model, "cuda")[[int(name) for name in images.train.ids]])
    head = nn.Linear(values.shape[1], 2, device="cuda")
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-3)
    losses = []
    for _ in range(100):
        loss = F.cross_entropy(head(values), targets)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


@pytest.mark.parametrize(("there", "here"), [("cpu", "cuda"), ("cuda", "cpu")])
def test_features_of_one_device_train_a_head_on_the_other_after_their_probes_were_compared(
    model: StagedModel, images: ImageSet, tmp_path: Path, there: str, here: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def learner(device: str) -> Learner:
        """On `here`, beside features of `device`."""
        store = FeatureStore(tmp_path / device)
        extract(model, images, store, cuts=["layer4"], dtype="float32", device=device)
        return Learner(model, images, store, device=here, batch_size=8, quiet=True)

    losses = []
    for device in (there, here):
        learn = learner(device)
        losses.append(learn.fit(1, lr=1e-3).losses[0])
        assert learn.read_from == "features"
    # Features may differ by 1e-5 of the largest value; that moves the loss of a first step by as much, and no more.
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    learn = learner(there)
    monkeypatch.setitem(TOLERANCES, "fp32", -1.0)  # no two probes are so close
    with pytest.raises(FactsDifferError, match=f"device was {there}, is {here}"):
        learn.fit(1, lr=1e-3)


def test_folds_share_a_backbone_that_lies_on_the_gpu_already(images: ImageSet) -> None:
    model = backbone("resnet18", "none").to("cuda")
    own = {name: tensor.data_ptr() for name, tensor in model.tensors().items() if not name.startswith("fc")}
    for fold in images.folds(2):
        learn = Learner(model, fold, device="cuda", quiet=True)
        of_fold = {name: tensor.data_ptr() for name, tensor in learn.model.tensors().items()}
        assert own.items() <= of_fold.items()


def test_a_model_trained_on_a_gpu_is_saved_and_read_on_a_cpu(
    model: StagedModel, images: ImageSet, tmp_path: Path
) -> None:
    learn = Learner(model, images, device="cuda", batch_size=8, quiet=True)
    learn.unfreeze()
    learn.fit(1, lr=1e-4)
    learn.save(tmp_path / "run")
    loaded = Learner.load(tmp_path / "run", images, module=model, device="cpu", quiet=True)
    with numerics("fp32", torch.device("cuda")):  # torch's own default is TF32 for what isn't frozen: 1e-3 away
        on_gpu = learn.predict_proba(images)
    # float32 itself is 1e-6 away from float64 here (measured on a CPU).
    np.testing.assert_allclose(loaded.predict_proba(images), on_gpu, rtol=0, atol=1e-5)
