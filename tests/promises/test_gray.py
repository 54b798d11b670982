"""The whole job with a network of one channel: extract, head, fine-tune, evaluate, predict, saved and loaded."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from support.programs import Ran, runner

from featstore import FeatureStore, ImageSet, backbone
from training import Learner

MODEL = """
from collections import OrderedDict
from torch import nn


def block(channels_in, channels_out):
    return nn.Sequential(nn.Conv2d(channels_in, channels_out, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))


def make_model():
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 5))
    return nn.Sequential(OrderedDict(layer1=block(1, 16), layer2=block(16, 32), fc=head))
"""


def digits(root: Path, count: int) -> Path:
    """A folder of gray PNG files of 16 pixels, three classes of `count` images."""
    data = load_digits()
    for label in range(3):
        (root / str(label)).mkdir(parents=True)
        for index in np.flatnonzero(data.target == label)[:count]:
            pixels = (data.images[index] * 15).astype(np.uint8).repeat(2, 0).repeat(2, 1)
            Image.fromarray(pixels).save(root / str(label) / f"{index:04}.png")
    return root


def test_a_gray_network_goes_the_whole_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    digits(Path("photos"), 40)
    Path("net.py").write_text(MODEL)
    run = runner(capsys)

    def ran(program: str, *arguments: str) -> Ran:
        result = run(program, *arguments)
        assert result.code == 0, result.err
        return result

    given = ["--images", "photos", "--store", "features"]
    given += ["--backbone", "net.py:make_model", "--size", "16", "--resize", "16", "--mean", "0.3", "--std", "0.4"]
    cut = ["--cut", "layer2"]
    extracted = ran("featstore", "extract", *given, *cut, "--augment", "flip", "--seeds", "0-1", "--dtype", "float32")
    assert "takes 1 channel: images are made gray, mean 0.5 and std 0.5 assumed; --mean --std" in extracted.err
    again = ran("featstore", "extract", *given, *cut, "--dtype", "float32")
    assert "120 rows reused, 0 computed" in again.err

    # The stored rows are those of the plain module on what Pillow calls gray.
    model = backbone("net.py:make_model")
    images = ImageSet.from_folder("photos")
    store = FeatureStore("features")
    (key,) = [found.key for found in store.sets() if found.spec.rendered.is_evaluation]
    pixels = torch.stack([torch.from_numpy(np.array(Image.open(f"photos/{name}").convert("L"))) for name in images.ids])
    with torch.no_grad():
        values = (pixels[:32, None] / 255 - 0.3) / 0.4
        maps = model.trunk("layer2")(values.to(memory_format=torch.channels_last)).contiguous()
    expected = torch.cat([maps.amax((2, 3)), maps.mean((2, 3))], 1)
    assert torch.equal(store.features(images, key).tensor("cpu")[:32], expected)

    head = ["featstore-train", "head", *given, *cut, "--epochs", "20", "--lr", "0.01", "--batch-size", "16"]
    ran(*head, "--out", "head")
    finetune = ["--images", "photos", "--from", "head", "--freeze-to", "layer1", "--epochs", "2", "--lr", "1e-3"]
    ran("featstore-train", "finetune", *finetune, "--out", "tuned")
    scores = ran("featstore-train", "evaluate", "--model", "tuned", "--images", "photos", "--json").json
    assert scores["valid"]["accuracy"] > 0.9
    ran("featstore-train", "predict", "--model", "tuned", "photos", "--csv", "predicted.csv")
    with open("predicted.csv", newline="") as file:
        records = list(csv.DictReader(file))
    assert np.mean([record["label"] == Path(record["image"]).parent.name for record in records]) > 0.9

    learn = Learner.load("tuned", images)
    assert (learn.view.channels, learn.view.mean, learn.view.std) == (1, (0.3,), (0.4,))
    assert [each.label for each in learn.predict(images)] == [record["label"] for record in records]
