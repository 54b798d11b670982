"""Built-in policies: what each draws for an image, and what it does to it around the evaluation geometry.

Another one is a function such as those here, in this file or one of its own, and its line in `BUILT_IN`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from featstore.digest import Json, canonical_json
from featstore.images.geometry import Geometry

if TYPE_CHECKING:
    from torch import Tensor


Method: TypeAlias = "Callable[..., Tensor]"
"""``(image, geometry, draws, **params)``: what becomes of an image, uint8 `(3, H, W)`, which it may not change.

It draws what it needs from `draws`, which is of this image's content and the seed, and changes the image before it
hands it to the view's `geometry`, or what that makes of it, or both: uint8 `(3, size, size)`.
"""


class BuiltIn(NamedTuple):
    """One entry of `BUILT_IN`.

    Attributes:
        method: what it does.
        version: of the method: another one for other pixels.
        params: what `method` is called with, JSON values. With name and version they are in every key.
    """

    method: Method
    version: int
    params: Mapping[str, Json]


FLIP_PROBABILITY = 0.5
AREA = (0.08, 1.0)
ASPECT = (3 / 4, 4 / 3)
ATTEMPTS = 10


def unchanged(image: Tensor, geometry: Geometry, draws: Draws) -> Tensor:
    """The evaluation view."""
    return geometry.evaluation(image)


def flip(image: Tensor, geometry: Geometry, draws: Draws, *, probability: float) -> Tensor:
    """The evaluation view, mirrored or not."""
    return _perhaps_mirrored(geometry.evaluation(image), draws, probability)


def random_resized_crop(
    image: Tensor,
    geometry: Geometry,
    draws: Draws,
    *,
    area: tuple[float, float],
    aspect: tuple[float, float],
    attempts: int,
    flip_probability: float,
) -> Tensor:
    """A random box of the image, resized to the square and mirrored or not."""
    box = random_box(image.shape[1], image.shape[2], draws, area=area, aspect=aspect, attempts=attempts)
    part = image[:, box.top : box.top + box.height, box.left : box.left + box.width]
    return _perhaps_mirrored(geometry.fitted(part), draws, flip_probability)


BUILT_IN: dict[str, BuiltIn] = {
    "none": BuiltIn(unchanged, 1, {}),
    "flip": BuiltIn(flip, 1, {"probability": FLIP_PROBABILITY}),
    "random_resized_crop": BuiltIn(
        random_resized_crop,
        1,
        {"area": AREA, "aspect": ASPECT, "attempts": ATTEMPTS, "flip_probability": FLIP_PROBABILITY},
    ),
}
"""All policies that have a name."""


# --- what methods draw, and with what ---


class Draws:
    """Random numbers that follow from `key` alone, on every machine: SHA-256 of the key's SHA-256 and a counter."""

    def __init__(self, key: Json) -> None:
        self._start = hashlib.sha256(canonical_json(key).encode("ascii")).digest()
        self._count = 0

    def uniform(self, low: float, high: float) -> float:
        """A number in [low, high), one of 2**53."""
        return low + (high - low) * ((self._bits() >> 11) / 2**53)

    def integer(self, stop: int) -> int:
        """A number in 0 ... stop - 1, all equally likely; `stop` is at most 2**63."""
        limit = 2**64 - 2**64 % stop  # the rest would favour small numbers
        while (bits := self._bits()) >= limit:
            pass
        return bits % stop

    def _bits(self) -> int:
        block = hashlib.sha256(self._start + self._count.to_bytes(8, "big")).digest()
        self._count += 1
        return int.from_bytes(block[:8], "big")


class Box(NamedTuple):
    """A rectangle of pixels."""

    top: int
    left: int
    height: int
    width: int


def random_box(
    height: int,
    width: int,
    draws: Draws,
    *,
    area: tuple[float, float] = AREA,
    aspect: tuple[float, float] = ASPECT,
    attempts: int = ATTEMPTS,
) -> Box:
    """A box of random area and aspect in an image; after `attempts` that don't fit, the largest central one that may.

    Distributed as torchvision's ``RandomResizedCrop``.
    """
    for _ in range(attempts):
        num_pixels = height * width * draws.uniform(*area)
        ratio = math.exp(draws.uniform(math.log(aspect[0]), math.log(aspect[1])))
        box_width, box_height = round(math.sqrt(num_pixels * ratio)), round(math.sqrt(num_pixels / ratio))
        if 0 < box_width <= width and 0 < box_height <= height:
            top = draws.integer(height - box_height + 1)
            return Box(top, draws.integer(width - box_width + 1), box_height, box_width)
    box_height, box_width = height, width
    if width / height < aspect[0]:
        box_height = round(width / aspect[0])
    elif width / height > aspect[1]:
        box_width = round(height * aspect[1])
    return Box((height - box_height) // 2, (width - box_width) // 2, box_height, box_width)


def _perhaps_mirrored(image: Tensor, draws: Draws, probability: float) -> Tensor:
    return mirrored(image) if draws.uniform(0, 1) < probability else image


def mirrored(image: Tensor) -> Tensor:
    """A copy with left and right exchanged. numpy's: torch's copies fork a team of OpenMP threads in each thread."""
    import numpy as np
    import torch

    return torch.from_numpy(np.array(image.numpy()[:, :, ::-1], order="C"))
