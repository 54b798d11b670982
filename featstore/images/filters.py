"""Filters: what becomes of a square of pixels `(3, S, S)` by its neighbours, its colours or its place.

In whole numbers, and in float one step at a time, as `levels` has it; numpy stays in its thread.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

from featstore.images.draws import Box
from featstore.images.levels import blended, grey

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Square = NDArray[np.uint8]


def mirrored(square: Square) -> Square:
    """Left and right exchanged."""
    return square[:, :, ::-1]


def quarter_turned(square: Square, times: int) -> Square:
    """Turned by quarters, against the clock."""
    import numpy as np

    return np.rot90(square, times, axes=(1, 2))


def holed(square: Square, holes: Iterable[Box]) -> Square:
    """Black in these rectangles."""
    result = square.copy()
    for top, left, height, width in holes:
        result[:, top : top + height, left : left + width] = 0
    return result


def saturated(square: Square, factor: float) -> Square:
    """From grey (0) to the square itself (1) and beyond."""
    return blended(grey(square)[None], square, factor)


def hue_turned(square: Square, turn: float) -> Square:
    """Hues moved by this part of the circle (red, green, blue, red); greys stay."""
    import numpy as np

    red, green, blue = square.astype(np.float32)
    most, least = square.max(0).astype(np.float32), square.min(0).astype(np.float32)
    range_ = most - least
    sixths = np.where(most == red, green - blue, np.where(most == green, blue - red, red - green))
    sixths /= np.maximum(range_, 1)
    sixths += np.where(most == red, 0, np.where(most == green, 2, 4)).astype(np.float32)
    sixths += np.float32(6 * turn + 12)  # above 0, which the remainder needs
    result = np.empty_like(square)
    for channel, start in enumerate((5, 3, 1)):
        away = np.remainder(sixths + np.float32(start), np.float32(6))
        part = np.minimum(away, 4 - away).clip(0, 1)
        result[channel] = most - range_ * part + np.float32(0.5)
    return result


def sharpened(square: Square, factor: float) -> Square:
    """From smooth (0) to the square itself (1) and beyond. The edge stays."""
    import numpy as np

    wide = square.astype(np.int32)
    sums = wide[:, :-2] + wide[:, 1:-1] + wide[:, 2:]
    sums = sums[:, :, :-2] + sums[:, :, 1:-1] + sums[:, :, 2:] + 4 * wide[:, 1:-1, 1:-1]
    smooth = square.copy()
    smooth[:, 1:-1, 1:-1] = (2 * sums + 13) // 26
    return blended(smooth, square, factor)


def blurred(square: Square, strength: int) -> Square:
    """Gaussian, by a kernel of `2 * strength - 1` pixels and the standard deviation that OpenCV takes for it."""
    import numpy as np

    weights = _gaussian(strength - 1)
    first = _weighed(square.astype(np.int32), weights, axis=2) >> 7
    second = _weighed(first, weights, axis=1)
    return ((second + (1 << 20)) >> 21).astype(np.uint8)


def _gaussian(reach: int) -> list[int]:
    """Weights of the pixels up to `reach` away, of which there are 2**14 in all."""
    deviation = 0.3 * (reach - 1) + 0.8
    weights = [math.exp(-(away**2) / (2 * deviation**2)) for away in range(-reach, reach + 1)]
    whole = [round(weight / math.fsum(weights) * 2**14) for weight in weights]
    whole[reach] += 2**14 - sum(whole)
    return whole


def _weighed(values: NDArray[np.int32], weights: list[int], axis: int) -> NDArray[np.int32]:
    """Sums of neighbours in one direction; what lies outside is the mirror image without the edge itself."""
    import numpy as np

    reach, side = len(weights) // 2, values.shape[axis]
    padded = np.pad(values, [(reach, reach) if each == axis else (0, 0) for each in range(3)], mode="reflect")
    total = np.zeros_like(values)
    for start, weight in enumerate(weights):
        total += padded.take(range(start, start + side), axis=axis) * weight
    return total
