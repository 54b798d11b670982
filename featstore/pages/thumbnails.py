"""Thumbnails: small JPEGs of images, for people to look at; of an image that isn't had, its name in a box."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from html import escape

import numpy as np
import torch
from numpy.typing import NDArray

from featstore.errors import ImageError
from featstore.images.decode import decode
from featstore.images.decoders import REDUCED
from featstore.images.headers import DecodeError
from featstore.images.image_set import ImageSet
from featstore.images.jpeg import encoded
from featstore.machine import num_processors
from featstore.words import printable

SIDE = 64
"""Pixels of the longer side."""
_QUALITY = 80
_MOST_LETTERS = 40


@dataclass(frozen=True, kw_only=True)
class Thumbnail:
    """What stands for an image on a page.

    Attributes:
        data: a JPEG; of an image that isn't had an SVG that shows its name.
        failure: why it isn't had, without its name; else None.
    """

    data: bytes
    failure: str | None = None

    @property
    def media_type(self) -> str:
        """Of `data`."""
        return "image/jpeg" if self.failure is None else "image/svg+xml"

    @property
    def uri(self) -> str:
        """It as an address that holds it."""
        return f"data:{self.media_type};base64,{b64encode(self.data).decode('ascii')}"


def thumbnail(images: ImageSet, place: int, side: int = SIDE) -> Thumbnail:
    """That of image number `place`: the whole image, turned as EXIF says, its longer side `side` pixels.

    An image that can't be read, decoded or held in memory has its name in its place; the page is of others too.
    """
    try:
        content = images.read(place)
        policy = {} if isinstance(content, np.ndarray) else {"policy": REDUCED, "resize": side}
        pixels = decode(content, **policy).pixels  # type: ignore[arg-type]
    except (ImageError, DecodeError, MemoryError) as error:
        reason = error.reason if isinstance(error, ImageError) else str(error)
        return Thumbnail(data=_placeholder(images.ids[place], side), failure=reason or "there is too little memory")
    return Thumbnail(data=encoded(_shrunk(pixels, side), _QUALITY))


def thumbnails(images: ImageSet, places: Sequence[int], side: int = SIDE) -> list[Thumbnail]:
    """Those of several images, in order, by as many threads as there are processors."""
    with ThreadPoolExecutor(num_processors()) as threads:
        return list(threads.map(lambda place: thumbnail(images, place, side), places))


def _shrunk(pixels: torch.Tensor, side: int) -> NDArray[np.uint8]:
    """`(3, H, W)` as `(h, w, 3)`, the longer of h and w at most `side`."""
    height, width = pixels.shape[1:]
    factor = min(1.0, side / max(height, width))
    size = (max(1, round(height * factor)), max(1, round(width * factor)))
    small = torch.nn.functional.interpolate(pixels[None], size=size, mode="bilinear", antialias=True)[0]
    rows: NDArray[np.uint8] = small.permute(1, 2, 0).numpy()
    return rows


def _placeholder(name: str, side: int) -> bytes:
    """An SVG of the name's end, which tells more of a path than its beginning."""
    text = printable(name, is_one_line=True).encode("utf-8", "backslashreplace").decode("utf-8")
    shown = text if len(text) <= _MOST_LETTERS else f"…{text[1 - _MOST_LETTERS :]}"
    lines = [shown[start : start + 10] for start in range(0, len(shown), 10)]
    spans = "".join(f'<tspan x="50" dy="1.2em">{escape(line)}</tspan>' for line in lines)
    top = 44 - 7 * len(lines)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{side}" height="{side}" viewBox="0 0 100 100">'
        '<rect width="100" height="100" fill="#8884"/>'
        f'<text y="{top}" text-anchor="middle" font-family="sans-serif" font-size="12" fill="#888">{spans}</text></svg>'
    ).encode()
