"""What must also hold on a GPU; skipped where there is none."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from featstore import Augment, FeatureStore, ImageSet, Output, StagedModel, Trunk, View, backbone, extract
from training import Learner

pytestmark = pytest.mark.cuda

IMAGES = torch.randint(0, 256, (40, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def model() -> StagedModel:
    model = backbone("resnet18", "none")
    model.view = View(size=64, resize=64)
    return model


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
    trunk = Trunk(model, [Output("layer4", model.pool("layer4"))], view=model.view, device="cuda", batch_size=32)
    order = torch.randperm(len(IMAGES), generator=torch.Generator().manual_seed(1))
    assert torch.equal(trunk(IMAGES[order])[0], trunk(IMAGES)[0][order])


def test_a_head_trains_on_a_gpu_from_features_as_with_the_live_trunk(model: StagedModel, tmp_path: Path) -> None:
    arrays = IMAGES.permute(0, 2, 3, 1).numpy()
    images = ImageSet.from_arrays(arrays, np.arange(len(arrays)) % 2).split(valid=0.2)
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


def test_a_model_trained_on_a_gpu_is_saved_and_read_on_a_cpu(model: StagedModel, tmp_path: Path) -> None:
    arrays = IMAGES.permute(0, 2, 3, 1).numpy()
    images = ImageSet.from_arrays(arrays, np.arange(len(arrays)) % 2).split(valid=0.2)
    learn = Learner(model, images, device="cuda", batch_size=8, quiet=True)
    learn.unfreeze()
    learn.fit(1, lr=1e-4)
    learn.save(tmp_path / "run")
    loaded = Learner.load(tmp_path / "run", images, module=model, device="cpu", quiet=True)
    np.testing.assert_allclose(loaded.predict_proba(images), learn.predict_proba(images), atol=1e-3)
