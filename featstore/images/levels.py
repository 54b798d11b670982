"""Levels: what becomes of each of the 256 levels of a square of pixels `(3, S, S)`, by a table.

In whole numbers, and in float one step at a time, as numpy computes on its own in the same bits on every processor.
Where Pillow has an operation its result is Pillow's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Square = NDArray[np.uint8]


def lit(square: Square, brightness: float, contrast: float) -> Square:
    """`contrast` times as far from the mean of all pixels, and `brightness` (1: all of black to white) added."""
    import numpy as np

    mean = int(square.sum(dtype=np.int64)) / square.size
    levels: NDArray[Any] = np.arange(256) * contrast + (mean - mean * contrast + 255 * brightness)
    return _looked_up(square, np.floor(levels + 0.5).clip(0, 255))


def brightened(square: Square, factor: float) -> Square:
    """From black (0) to the square itself (1) and beyond."""
    import numpy as np

    return _looked_up(square, blended(0, np.arange(256), factor))


def contrasted(square: Square, factor: float) -> Square:
    """From the mean grey (0) to the square itself (1) and beyond."""
    import numpy as np

    mean = int(grey(square).sum(dtype=np.int64)) / square[0].size
    return _looked_up(square, blended(int(mean + 0.5), np.arange(256), factor))


def posterised(square: Square, bits: int) -> Square:
    """The first `bits` of each level alone."""
    import numpy as np

    return square & np.uint8(256 - (1 << (8 - bits)))


def solarised(square: Square, threshold: float) -> Square:
    """Negative from `threshold` on."""
    import numpy as np

    levels = np.arange(256)
    return _looked_up(square, np.where(levels < threshold, levels, 255 - levels))


def stretched_to_full(square: Square) -> Square:
    """Each channel's darkest level becomes 0, its lightest 255."""
    import numpy as np

    tables = []
    for plane in square:
        low, high = int(plane.min()), int(plane.max())
        levels = np.arange(256)
        if low < high:
            scale = 255.0 / (high - low)
            levels = (levels * scale + -low * scale).clip(0, 255).astype(np.int64)
        tables.append(levels)
    return _looked_up(square, *tables)


def equalised(square: Square) -> Square:
    """Each channel's levels about equally many."""
    import numpy as np

    tables = []
    for plane in square:
        counts = np.bincount(plane.ravel(), minlength=256)
        step = (plane.size - counts[counts.nonzero()[0][-1]]) // 255
        below = np.cumsum(counts) - counts
        tables.append(((below + step // 2) // step).clip(0, 255) if step else np.arange(256))
    return _looked_up(square, *tables)


def grey(square: Square) -> NDArray[np.uint8]:
    """`(S, S)`, as bright as the square by the weights of ITU-R 601-2."""
    import numpy as np

    red, green, blue = square.astype(np.int32)
    weighed: NDArray[np.int32] = (19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16
    return weighed.astype(np.uint8)


def blended(start: Any, end: Any, factor: float) -> NDArray[np.uint8]:
    """`factor` of the way from start to end, numbers or arrays of levels; more than 1 leads beyond."""
    import numpy as np

    first: NDArray[np.float32] = np.asarray(start, np.float32)
    way: NDArray[np.float32] = np.asarray(end, np.float32) - first
    way *= np.float32(factor)
    way += first
    return way.clip(0, 255).astype(np.uint8)


def _looked_up(square: Square, *tables: NDArray[Any]) -> Square:
    """By one table or one for each channel. Python translates bytes in half the time that numpy takes by them."""
    import numpy as np

    translations = [table.astype(np.uint8).tobytes() for table in tables]
    if len(translations) == 1:
        result = bytearray(square.tobytes().translate(translations[0]))
    else:
        planes = [plane.tobytes().translate(each) for plane, each in zip(square, translations, strict=True)]
        result = bytearray().join(planes)
    return np.frombuffer(result, np.uint8).reshape(square.shape)
