"""Decoders of other libraries or settings in simplejpeg's place, for as long as a test wants them."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import numpy as np
import pytest
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

from featstore.images.pixel_digest import pixel_digest

Decoder = Callable[[bytes, str], NDArray[np.uint8]]

fast: Decoder = partial(simplejpeg.decode_jpeg, fastdct=True)
"""Other pixels than the policy's."""

flat: Decoder = partial(simplejpeg.decode_jpeg, fastupsample=True)
"""Others again."""


def by_pillow(data: bytes, colours: str) -> NDArray[np.uint8]:
    """The policy's pixels, by another library."""
    return np.array(Image.open(io.BytesIO(data)).convert(colours))


@contextmanager
def jpegs_by(decoder: Decoder) -> Iterator[None]:
    """JPEGs are decoded so, and what is known of the decoders is found anew, before and after."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(simplejpeg, "decode_jpeg", decoder)
        pixel_digest.cache_clear()
        yield
    pixel_digest.cache_clear()
