"""Makes the files of featstore/images/samples, whose pixels tell how the decoders here decode.

    .venv/bin/python scripts/decoder_samples.py FOLDER

Those in the package were made by Pillow 13.0.0. Another encoder may give other bytes, and so another pixel digest: then
the ones in the package stay, since what is stored has their digest.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

HEIGHT, WIDTH = 45, 59
"""No multiples of a block's 8 or 16 pixels: what decoders do at the edges counts."""


def picture(number: int) -> NDArray[np.uint8]:
    """Gradients, strong colours with sharp edges, and noise: where decoders that round otherwise show it."""
    row, column = np.indices((HEIGHT, WIDTH))
    planes = [row * 5 + number * 40, column * 4, (row + column) * 2]
    image = np.stack(planes, axis=-1) % 256
    image[8:24, 10:30] = (255, 0, 40 * number)
    image[20:40, 24:50, number % 3] = 255 - image[20:40, 24:50, number % 3]
    noise = np.random.default_rng(number).integers(-60, 61, (HEIGHT, WIDTH, 3))
    noisy = (row // 6 + column // 6) % 2 == 0
    image[noisy] += noise[noisy]
    return image.clip(0, 255).astype(np.uint8)


def main(folder: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(picture(0)).save(folder / "subsampled.jpg", quality=90, subsampling="4:2:0")
    Image.fromarray(picture(1)).save(folder / "progressive.jpg", quality=80, subsampling="4:4:4", progressive=True)
    Image.fromarray(picture(2)).save(folder / "turned.jpg", quality=85, subsampling="4:2:2", exif=exif)
    alpha = np.arange(HEIGHT * WIDTH).reshape(HEIGHT, WIDTH, 1) % 256
    Image.fromarray(np.concatenate([picture(3), alpha.astype(np.uint8)], axis=-1)).save(folder / "transparent.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
