"""Image files: folders and tables of tiny pictures, and what a split makes of them."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

from featstore.images.image_set import ImageSet
from featstore.images.sources import FolderSource


def image_bytes(value: int = 0, form: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (4, 4), (value % 256, value // 256 % 256, value // 65536)).save(stream, form)
    return stream.getvalue()


def fill(root: Path, *paths: str) -> Path:
    for number, path in enumerate(paths):
        file = root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(image_bytes(number))
    return root


def table(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def counted(number: int, num_classes: int = 2, prefix: str = "") -> ImageSet:
    """`number` unread images `<class>/<number>.jpg`, classes in turn."""
    targets = np.arange(number) % num_classes
    return ImageSet(
        name="counted",
        ids=tuple(f"{prefix}{target}/{i}.jpg" for i, target in enumerate(targets)),
        targets=targets,
        classes=tuple(str(k) for k in range(num_classes)),
        splits=np.full(number, ""),
        groups=None,
        task="single",
        source=FolderSource(root="/nowhere"),
    )


def members(images: ImageSet, split: str) -> set[str]:
    return {image for image, dealt in zip(images.ids, images.splits, strict=True) if dealt == split}


def held_out_of_200() -> set[str]:
    return members(counted(200, 4).split(0.2, 0.1), "valid")


def per_class(images: ImageSet) -> list[int]:
    assert images.targets is not None
    return [int(np.sum(images.targets == target)) for target in range(images.num_classes)]
