"""What is trained on features stored as whole numbers is as good, on real pictures, as what float16 trains."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from support.splitting import randomise
from torch import nn

from featstore import FeatureStore, ImageSet, StagedModel, View, extract
from training import train_head

SIZE = 32


def digits(count: int) -> ImageSet:
    """Handwritten digits of ten classes, four times as wide and high, a quarter of them to validate."""
    data = load_digits()
    grey = (data.images[:count] * 15).astype(np.uint8).repeat(4, 1).repeat(4, 2)
    splits = ["valid" if index % 4 == 0 else "train" for index in range(count)]
    return ImageSet.from_arrays(grey[..., None].repeat(3, 3), data.target[:count].tolist(), splits=splits)


def untrained() -> StagedModel:
    """Two stages of maps, with weights drawn at random: enough to tell digits by."""
    layer1 = nn.Sequential(nn.Conv2d(3, 32, 5, stride=2, padding=2), nn.BatchNorm2d(32), nn.ReLU())
    layer2 = nn.Sequential(nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.BatchNorm2d(64), nn.ReLU())
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
    module = nn.ModuleDict({"layer1": layer1, "layer2": layer2, "fc": head})
    randomise(module, seed=1)
    return StagedModel.from_stages(dict(module.items()), view=View(size=SIZE, resize=SIZE), name="untrained")


def test_heads_on_maps_of_whole_numbers_score_and_predict_like_those_of_float16(tmp_path: Path) -> None:
    images = digits(800)
    right: dict[str, float] = {}
    for dtype in ("float16", "int8"):
        store = FeatureStore(tmp_path / dtype)
        report = extract(untrained(), images, store, cuts=["layer1:none"], dtype=dtype, device="cpu", workers=0)
        torch.manual_seed(0)
        learn = train_head(untrained(), images, store, freeze_to="layer1", cut="layer2", epochs=6, lr=0.01, seed=0)
        right[dtype] = learn.evaluate()["accuracy"]
        from_rows = learn.predict_proba(images.valid)
        sources = [learn.read_from]
        learn.store, learn.on_missing = None, "images"
        from_images = learn.predict_proba(images.valid)
        sources.append(learn.read_from)
        assert sources == ["features", "images"]
        assert np.abs(from_rows - from_images).max() < {"float16": 0.002, "int8": 0.05}[dtype]
        assert (from_rows.argmax(1) == from_images.argmax(1)).mean() >= 0.99
    assert store.set(report.keys[0]).facts["rounding"]["error"] < 0.01
    assert min(right.values()) > 0.9
    assert abs(right["float16"] - right["int8"]) <= 0.03
