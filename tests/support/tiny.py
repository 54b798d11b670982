"""Tiny real things that several tests arrange: a network with batch norm, photographs in folders, an extraction."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torchvision.models import VisionTransformer

from featstore import FeatureSpec, ImageSet, StagedModel, View
from featstore.images.decode import decode
from featstore.images.digests import content_digest
from featstore.models.torchvision_models import FAMILIES

SIZE = 16
VIEW = View(size=SIZE, resize=20)

SPEC = FeatureSpec(trunk="0" * 64, pool={"reduction": "none"}, view=VIEW.facts(), precision="fp32", dtype="float32")
"""Of made-up rows, where nothing looks at it."""


class Net(nn.Module):
    """Two stages of maps, a vector, and scores; wide enough that each cut's rows differ between images."""

    def __init__(self, stride: int = 2) -> None:
        super().__init__()
        self.layer1 = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.layer2 = nn.Sequential(nn.Conv2d(8, 12, 3, stride=stride, padding=1), nn.BatchNorm2d(12), nn.ReLU())
        self.dropout = nn.Dropout(0.5)
        self.fc = nn.Linear(12, 3)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.layer2(self.layer1(images))
        scores: Tensor = self.fc(self.dropout(F.adaptive_avg_pool2d(maps, 1).flatten(1)))
        return scores


def net(seed: int = 0, stride: int = 2) -> Net:
    """A `Net` whose parameters and statistics are all drawn at random; the global random state stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = Net(stride)
        for name, tensor in module.state_dict().items():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand_like(tensor) + 0.5 if "var" in name else torch.randn_like(tensor) * 0.4)
    return module.eval()


def staged(seed: int = 0, stride: int = 2) -> StagedModel:
    """The staged model of `net(seed, stride)`."""
    return StagedModel.from_module(net(seed, stride), view=VIEW, name="net")


def vision_transformer(size: int = 24, num_layers: int = 12) -> VisionTransformer:
    """torchvision's class, as deep as ViT-B and otherwise tiny, for images of `size` pixels, a multiple of 4."""
    with torch.random.fork_rng(devices=[]):
        return VisionTransformer(
            image_size=size,
            patch_size=size // 2,
            num_layers=num_layers,
            num_heads=2,
            hidden_dim=16,
            mlp_dim=32,
            num_classes=5,
        ).eval()


def staged_vision_transformer(size: int = 24) -> StagedModel:
    """The staged model of `vision_transformer(size)`, with all that `backbone` says of a ViT."""
    (family,) = (family for family in FAMILIES if "vit_b_32" in family.names)
    return StagedModel.from_module(
        vision_transformer(size),
        view=View(size=size, resize=size),
        layouts=dict(family.layouts),
        class_tokens=family.class_tokens,
        containers=family.containers,
        fixed_size=size,
    )


def pixels(count: int, seed: int = 0, size: int = 24) -> NDArray[np.uint8]:
    """Images `(count, size, size, 3)`."""
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def arrays(count: int = 10, seed: int = 0) -> ImageSet:
    """An image set of arrays with two classes, not dealt."""
    return ImageSet.from_arrays(pixels(count, seed), [index % 2 for index in range(count)])


def jpeg(seed: int) -> bytes:
    """An encoded photograph."""
    file = io.BytesIO()
    Image.fromarray(pixels(1, seed)[0]).save(file, "JPEG", quality=90)
    return file.getvalue()


def photos(root: Path, count: int = 6) -> Path:
    """A folder of JPEG and PNG files in the classes cat and dog."""
    for index in range(count):
        folder = root / ("cat", "dog")[index % 2]
        folder.mkdir(parents=True, exist_ok=True)
        if index % 3:
            (folder / f"{index}.jpg").write_bytes(jpeg(index))
        else:
            Image.fromarray(pixels(1, index)[0]).save(folder / f"{index}.png")
    return root


def rows_by_hand(model: nn.Module, images: ImageSet, view: View, *, batch_size: int = 32) -> Tensor:
    """What the plain `model` gives for each image alone in rendering, in full batches: `(N, *F)` float32."""
    batch = views_by_hand(images, view)
    mean, std = (torch.tensor(values).reshape(1, 3, 1, 1) for values in (view.mean, view.std))
    results = []
    for start in range(0, len(batch), batch_size):
        piece = batch[start : start + batch_size]
        padded = torch.cat([piece, piece[-1:].expand(batch_size - len(piece), *piece.shape[1:])])
        with torch.no_grad():
            values = ((padded.float() / 255 - mean) / std).contiguous(memory_format=torch.channels_last)
            results.append(model(values)[: len(piece)].contiguous())
    return torch.cat(results)


def views_by_hand(images: ImageSet, view: View) -> Tensor:
    """Each image alone, read, decoded and rendered: `(N, C, S, S)` uint8."""
    contents = (images.read(index) for index in range(len(images)))
    return torch.stack([view.render(decode(data)[0], content_digest(data)) for data in contents])


def digests_of(*names: int) -> NDArray[np.uint8]:
    """Made-up contents of images, by number: `(n, 32)`."""
    hashes = [hashlib.sha256(str(name).encode()).digest() for name in names]
    return np.frombuffer(b"".join(hashes), np.uint8).reshape(-1, 32)


def decayed(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups as a tutorial has them: weights are decayed, biases and norms aren't."""
    flat = [each for each in module.parameters() if each.ndim == 1]
    return [
        {"params": [each for each in module.parameters() if each.ndim > 1], "weight_decay": weight_decay},
        {"params": flat, "weight_decay": 0.0},
    ]


class NormedHead(nn.Module):
    """Of 24 numbers, with batch norm, dropout, and a counter that no file would hold; the same numbers each time."""

    calls: Tensor

    def __init__(self, num_classes: int, *, dropout: float) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            self.fc = nn.Linear(24, num_classes)
        self.norm, self.dropout = nn.BatchNorm1d(24), nn.Dropout(dropout)
        self.register_buffer("calls", torch.zeros(()), persistent=False)

    def forward(self, rows: Tensor) -> Tensor:
        if self.training:
            self.calls += 1
        logits: Tensor = self.fc(self.dropout(self.norm(rows)))
        return logits
