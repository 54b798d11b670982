"""What the reader of a page has, and the code of a page: the README and guides run as they stand.

Weights are random where the real ones would be, ResNets have one block in each stage, and presets say 64 pixels rather
than 224, since batches, digests and files of these networks are what such tests take.
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import skimage.data
import torch
import torchvision
from PIL import Image
from sklearn.datasets import load_sample_images
from torchvision.models import resnet


def reader_folder(folder: Path, *names: str, count: int = 4, are_whole: bool = False) -> Path:
    """A folder with photos in two class folders, two new ones in inbox/, and the default weights of networks `names`.

    Eight photos and the views of six of them fill one batch of 32. Where networks `are_whole`, they are as deep as
    their names say.
    """
    rng = np.random.default_rng(0)
    for name, photo in zip(("cat", "dog"), load_sample_images().images, strict=True):
        _write_crops(folder / "photos" / name, photo, rng, [f"{number:03d}.jpg" for number in range(count)])
    _write_crops(folder / "inbox", photo, rng, ["0412.jpg", "0413.jpg"])
    checkpoints = folder / "torch" / "hub" / "checkpoints"
    checkpoints.mkdir(parents=True)
    with torch.random.fork_rng(devices=[]), pytest.MonkeyPatch.context() as patched:
        if not are_whole:
            make_shallow(patched)
        torch.manual_seed(1)  # other weights than those that `weights="none"` draws
        for name in names:
            weights = torchvision.models.get_model_weights(name).DEFAULT
            torch.save(torchvision.models.get_model(name).state_dict(), checkpoints / Path(weights.url).name)
    return folder


def make_shallow(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchvision's ResNets get one block in each stage; stages, cuts and widths stay theirs."""
    as_deep = resnet._resnet

    def of_one_block(block: Any, layers: list[int], *args: Any, **options: Any) -> resnet.ResNet:
        return as_deep(block, [1] * len(layers), *args, **options)

    monkeypatch.setattr(resnet, "_resnet", of_one_block)


def go_there(folder: Path, monkeypatch: pytest.MonkeyPatch, *names: str, are_whole: bool = False) -> None:
    """Makes such a folder the working directory, in which networks `names` find their weights and small presets."""
    if not are_whole:
        make_shallow(monkeypatch)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("TORCH_HOME", str(folder / "torch"))
    for name in names:
        weights = torchvision.models.get_model_weights(name).DEFAULT
        monkeypatch.setattr(weights.value, "transforms", partial(weights.transforms, crop_size=64, resize_size=72))


def code_of(page: Path, language: str = "python") -> list[str]:
    """The blocks of a language, in order, each after as many empty lines as stand before it in the page."""
    text = page.read_text(encoding="utf-8")
    found = re.finditer(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return ["\n" * text.count("\n", 0, each.start(1)) + each[1] for each in found]


def photograph_crops(folder: Path, count: int, size: int = 96) -> None:
    """Crops of four photographs, in folders of their names, from anywhere in them."""
    rng = np.random.default_rng(0)
    for name in ("astronaut", "chelsea", "coffee", "rocket"):
        photo = getattr(skimage.data, name)()
        (folder / name).mkdir(parents=True)
        for number in range(count):
            top, left = rng.integers(0, photo.shape[0] - size), rng.integers(0, photo.shape[1] - size)
            Image.fromarray(photo[top : top + size, left : left + size]).save(folder / name / f"{number:03}.png")


def small_efficientnet_lite0(folder: Path) -> None:
    """The quickstart's network with its real weights, in a file that asks for small images."""
    source = (Path(__file__).parents[2] / "scripts/efficientnet_lite0.py").read_text(encoding="utf-8")
    assert "size=224, resize=256" in source
    source = source.replace("size=224, resize=256", "size=64, resize=72")
    (folder / "efficientnet_lite0.py").write_text(source, encoding="utf-8")


def _write_crops(folder: Path, photo: np.ndarray, rng: np.random.Generator, names: list[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        top, left = rng.integers(0, photo.shape[0] - 240), rng.integers(0, photo.shape[1] - 260)
        Image.fromarray(photo[top : top + 240, left : left + 260]).save(folder / name, quality=90)
