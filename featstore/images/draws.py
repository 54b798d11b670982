"""Draws: random numbers that follow from a key alone, and the boxes that are drawn with them."""

from __future__ import annotations

import hashlib
import math
from typing import NamedTuple

from featstore.digest import Json, canonical_json

AREA = (0.08, 1.0)
ASPECT = (3 / 4, 4 / 3)
ATTEMPTS = 10


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

    def chance(self, probability: float) -> bool:
        """True with this probability."""
        return self.uniform(0, 1) < probability

    def order(self, number: int) -> list[int]:
        """0 ... number - 1 in an order of which all are equally likely."""
        left = list(range(number))
        return [left.pop(self.integer(len(left))) for _ in range(number)]

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
