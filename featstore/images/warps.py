"""Warps: an affine map of pixels in whole numbers, so that it has the same bits on every processor.

torch's and torchvision's warps compute in float, in other last bits on other CPU levels. Here a position is a multiple
of 2**-20 of a pixel, a weight one of 2**-8, and the four 16-bit lanes of an integer of 64 bits hold a pixel's R, G and
B, which one multiplication weighs at a time. numpy stays in its thread.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Border: TypeAlias = Literal["mirror", "black"]
"""What lies outside an image: its mirror image, the edge's own pixels first; or nothing."""

_ONE = 1 << 20
_HALF_STEP = _ONE >> 9
_LANES = 0x0001_0001_0001_0001
_STRIP = 14_000
"""Pixels at a time: numpy's arrays of so many numbers stay in the cache, and the memory goes back to no system."""


class Affine(NamedTuple):
    """Where the pixel of a result comes from: `x = a * X + b * Y + c` and `y = d * X + e * Y + f`.

    Positions are those of the pixels' middles: 0 is the middle of the first one.
    """

    a: float = 1.0
    b: float = 0.0
    c: float = 0.0
    d: float = 0.0
    e: float = 1.0
    f: float = 0.0

    def after(self, inner: Affine) -> Affine:
        """The map that takes a position through `inner` and the result through this one."""
        a, b, c, d, e, f = self
        return Affine(
            a * inner.a + b * inner.d,
            a * inner.b + b * inner.e,
            a * inner.c + b * inner.f + c,
            d * inner.a + e * inner.d,
            d * inner.b + e * inner.e,
            d * inner.c + e * inner.f + f,
        )

    def about(self, x: float, y: float) -> Affine:
        """This map with (x, y) in the place of (0, 0)."""
        return Affine(c=x, f=y).after(self).after(Affine(c=-x, f=-y))


def turned(degrees: float) -> Affine:
    """A turn about (0, 0), against the clock."""
    cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return Affine(a=cosine, b=-sine, d=sine, e=cosine)


def stretched(x: float, y: float) -> Affine:
    """What makes an image `x` times as wide and `y` times as high, about (0, 0)."""
    return Affine(a=1 / x, e=1 / y)


def warped(
    image: NDArray[np.uint8], where: Affine, height: int, width: int, border: Border = "mirror"
) -> NDArray[np.uint8]:
    """`(3, height, width)`, each pixel interpolated between the four of `image`, `(3, H, W)`, around its place."""
    import numpy as np

    a, b, c, d, e, f = (round(number * _ONE) for number in where)
    c, f = c + _HALF_STEP, f + _HALF_STEP
    rows, columns = _reach(d, e, f, height, width), _reach(a, b, c, height, width)
    part = _packed(image, rows, columns, border)
    result = np.empty((3, height, width), np.uint8)
    along = np.arange(width)
    num_rows = max(1, _STRIP // width)
    for top in range(0, height, num_rows):
        down = np.arange(top, min(top + num_rows, height))[:, None]
        x, y = along * a + (down * b + c), along * d + (down * e + f)
        _interpolate(part, x - (columns.start << 20), y - (rows.start << 20), result[:, top : top + num_rows])
    return result


def _interpolate(
    packed: NDArray[np.uint64], x: NDArray[np.int64], y: NDArray[np.int64], result: NDArray[np.uint8]
) -> None:
    """Fills `result`, `(3, h, w)`, with the pixels at these places, `(h, w)` each, of a packed image."""
    import numpy as np

    flat, stride = packed.reshape(-1), packed.shape[1]
    index = (y >> 20) * stride + (x >> 20)
    to_right, to_bottom = (((place >> 12) & 255).view(np.uint64) for place in (x, y))
    upper = _between(flat.take(index), flat[1:].take(index), to_right)
    lower = _between(flat[stride:].take(index), flat[stride + 1 :].take(index), to_right)
    lanes = _between(upper, lower, to_bottom).view(np.uint8).reshape(*x.shape, 8)
    for channel in range(3):
        result[channel] = lanes[:, :, 2 * channel]


def _reach(by_column: int, by_row: int, start: int, height: int, width: int) -> range:
    """The whole pixels in one direction that a result reaches, its corners furthest, and the one after them."""
    corners = [start + by_column * column + by_row * row for column in (0, width - 1) for row in (0, height - 1)]
    return range(min(corners) >> 20, (max(corners) >> 20) + 2)


def _between(first: NDArray[np.uint64], second: NDArray[np.uint64], weight: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Packed pixels, `weight` / 256 of the way from the first to the second. No lane carries: 255 * 256 + 128 < 2**16.

    Both are overwritten. What a lane borrows from the next in between, it gives back.
    """
    import numpy as np

    second -= first
    second *= weight
    first <<= np.uint64(8)
    second += first
    second += np.uint64(128 * _LANES)
    second >>= np.uint64(8)
    second &= np.uint64(255 * _LANES)
    return second


def _packed(image: NDArray[np.uint8], rows: range, columns: range, border: Border) -> NDArray[np.uint64]:
    """These rows and columns of an image and of what lies outside it, a pixel's R, G and B in the lanes of a number."""
    import numpy as np

    lanes = np.zeros((len(rows), len(columns), 4), np.uint16)
    down, right = _inside(rows, image.shape[1], border), _inside(columns, image.shape[2], border)
    if rows.start >= 0 and rows.stop <= image.shape[1] and columns.start >= 0 and columns.stop <= image.shape[2]:
        part = image[:, rows.start : rows.stop, columns.start : columns.stop]
    else:
        part = image.take(down, axis=1).take(right, axis=2)
    for channel in range(3):
        lanes[:, :, channel] = part[channel]
    if border == "black":
        lanes[down != np.array(rows)] = 0
        lanes[:, right != np.array(columns)] = 0
    return lanes.view(np.uint64)[:, :, 0]


def _inside(places: range, side: int, border: Border) -> NDArray[np.int64]:
    """For each place the pixel that is seen there."""
    import numpy as np

    wanted = np.array(places)
    if border == "black":
        return wanted.clip(0, side - 1)
    wanted %= 2 * side
    seen: NDArray[np.int64] = np.minimum(wanted, 2 * side - 1 - wanted)
    return seen
