"""Decoding: an image's encoded bytes to uint8 RGB, by a named policy in which the bytes alone choose the decoder."""

from __future__ import annotations

import io
import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFile
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile
from torch import Tensor

from featstore.errors import FeatureStoreError
from featstore.images import jpeg
from featstore.images.decoders import ARRAY, PILLOW, PILLOW_HEIF, POLICIES, POLICY, REDUCED, SIMPLEJPEG
from featstore.images.headers import DecodeError, Header, MissingDecoderError, check_size, failed, read_header
from featstore.machine import available_bytes
from featstore.words import size_text


class Decoded(NamedTuple):
    """One decoded image.

    Attributes:
        pixels: uint8 RGB `(3, H, W)`.
        decoder: the code of the decoder that read it (see `DECODERS`).
        doubt: why it may not look as its owner expects, without the file's name; None for what is in order.
    """

    pixels: Tensor
    decoder: int
    doubt: str | None = None


def decode(
    data: bytes | NDArray[np.uint8],
    *,
    policy: str = POLICY,
    apply_exif: bool = True,
    resize: int | None = None,
    memory: Budget | None = None,
    is_whole: bool = False,
) -> Decoded:
    """The image as uint8 RGB `(3, H, W)`, the code of the decoder that read it, and what is doubtful about it.

    Strides are those of `(H, W, 3)` rows, as decoders leave them: planes would cost as much time as the resize that
    follows (1600 x 1200: 2.3 ms for the copy, then 3.3 ms to resize against 1.1 ms from rows). The memory is the
    caller's own.

    JPEG of 8 bits, gray or colour, is read by simplejpeg or, where its data is damaged, by torchvision.io or, where
    that decodes nothing, by torchcodec, to equal pixels; CMYK JPEG, PNG, GIF (its first frame), WebP, TIFF (its first
    page), BMP and AVIF by Pillow, HEIC (its primary image) by pillow-heif. Of a JPEG of several pictures (MPO) the
    first is read. Alpha is dropped, 16 bits lose their low eight, colour profiles are not applied. The suffix of the
    file's name plays no part.

    By the policy `decoders.REDUCED` a JPEG that simplejpeg would read has 1/8, 1/4 or 1/2 of its size, rounded up: the
    least whose shorter side is twice `resize` or more. Damaged ones are read by Pillow then, to equal pixels.

    Args:
        data: the encoded file, or an array `(H, W)` or `(H, W, 3)`.
        policy: one of `decoders.POLICIES`' values.
        apply_exif: whether the EXIF orientation turns and mirrors the image; HEIC is always as its container turns it.
        resize: that of the view which is wanted, for the reduced policy, which needs it.
        memory: what all decodings at one time may take, where there are several.
        is_whole: whether the file is known to be, so that it doesn't matter whether this process lets Pillow take what
            is truncated for whole.

    Raises:
        DecodeError: when the bytes are empty, truncated, too large, or not an image that is read; a
            `MissingDecoderError` where only the library is missing.
        MemoryError: when decoding would take more memory than is free.

    Pillow reports odd metadata of a TIFF, and a TIFF or GIF larger than its own ``Image.MAX_IMAGE_PIXELS``, as Python
    warnings, which this function lets through: to suppress them is to change the filters of all threads.
    """
    if policy not in POLICIES.values():
        known = " and ".join(map(repr, POLICIES.values()))
        raise ValueError(f"decode policy {policy!r} is unknown to this version of featstore, which has {known}")
    if policy == REDUCED and resize is None:
        raise ValueError(f"decode policy {policy!r} needs the resize of a view; give resize=, or decode in full")
    if isinstance(data, np.ndarray):
        return Decoded(_channels_first(_from_array(data)), ARRAY)
    header, memory = read_header(data), Budget() if memory is None else memory
    if header.is_for_pillow:
        decoder = PILLOW_HEIF if header.format == "HEIC" else PILLOW
        if not is_whole:
            _refuse_lenience()
        pixels, orientation, doubt = _by_pillow(data, header, memory)
    else:
        scale = jpeg.scale(header, resize) if policy == REDUCED and resize is not None else 1
        pixels, decoder, doubt = _jpeg(data, header, scale, memory)
        orientation, doubt = _orientation(header.exif), doubt or jpeg.doubt_of(data, header)
    return Decoded(_channels_first(_turned(pixels, orientation) if apply_exif else pixels), decoder, doubt)


class Budget:
    """The memory that decoders may take together: whoever needs more than is left waits, or, alone, is let through.

    Args:
        limit: bytes; default: half of what is free.
    """

    def __init__(self, limit: int | None = None) -> None:
        self._limit, self._taken, self._changed = limit, 0, threading.Condition()

    @contextmanager
    def taken(self, count: int, kind: str) -> Iterator[None]:
        """Takes `count` bytes for the block, once they are there.

        Raises:
            MemoryError: for more than is free on the machine, also when nobody else takes any.
        """
        if count > _SMALL_BYTES and count > (free := available_bytes()):
            raise MemoryError(
                f"decoding this {kind} takes about {size_text(count)}, and {size_text(free)} of memory is free"
            )
        with self._changed:
            if self._limit is None and count > _SMALL_BYTES:
                self._limit = available_bytes() // 2
            self._changed.wait_for(lambda: not self._taken or self._taken + count <= (self._limit or math.inf))
            self._taken += count
        try:
            yield
        finally:
            with self._changed:
                self._taken -= count
                self._changed.notify_all()


_SMALL_BYTES = 64 << 20  # asking for the free memory takes longer than decoding a small image


def _bytes_needed(form: str, num_pixels: int) -> int:
    """What decoding takes at most, from measurements: 2.4 GB for a PNG of 179 million pixels, 4.2 for a WebP."""
    return num_pixels * {"JPEG": 12, "PNG": 14, "WebP": 24}.get(form, 14)


# --- the decoders: each gives (H, W, 3) ---


def _from_array(array: NDArray[np.uint8]) -> NDArray[np.uint8]:
    is_image = array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 3)
    if array.dtype != np.uint8 or not is_image or array.size == 0:
        raise DecodeError(f"an array {array.shape} of {array.dtype}; expected uint8 (H, W) or (H, W, 3)")
    return _gray_to_rgb(array) if array.ndim == 2 else array.copy(order="C")


def _jpeg(data: bytes, header: Header, scale: int, memory: Budget) -> tuple[NDArray[np.uint8], int, str | None]:
    with memory.taken(_bytes_needed(header.format, header.width * header.height), header.format):
        if scale == 1:
            return jpeg.read(data)
        try:
            return jpeg.read_reduced(data, header, scale), SIMPLEJPEG, None
        except ValueError as error:
            warning = str(error).strip()
    _refuse_lenience()
    return _by_pillow(data, header, memory, scale)[0], PILLOW, jpeg.warned(warning)


def _refuse_lenience() -> None:
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        raise FeatureStoreError(
            "PIL.ImageFile.LOAD_TRUNCATED_IMAGES is set in this process, so that a truncated file would pass for a "
            "whole one. Expected it off, as it is at first. Set it to False."
        )


def _by_pillow(
    data: bytes, header: Header, memory: Budget, scale: int = 1
) -> tuple[NDArray[np.uint8], int, str | None]:
    try:
        # The plug-in's class, not Image.open: the bytes choose the decoder, not the plug-ins that happen to be
        # registered, and Image.open warns about large images, which are this file's business.
        with _PLUGINS[header.format](io.BytesIO(data)) as image:
            check_size(*image.size)
            with memory.taken(_bytes_needed(header.format, image.width * image.height), header.format):
                if scale > 1:
                    image.draft("RGB", (image.width // scale, image.height // scale))
                return _decoded(image, header)
    except (DecodeError, MemoryError):
        raise
    except Exception as error:  # on damaged files the plug-ins raise nearly everything, struct.error to AttributeError
        raise failed(header.format, data, error) from error


def _heic_file(data: io.BytesIO) -> ImageFile.ImageFile:
    """HEIC, turned as its container says, not its EXIF: pillow-heif turns it, and sets EXIF's orientation to 1."""
    try:
        from pillow_heif import HeifImageFile
    except ImportError as error:
        raise MissingDecoderError(
            "it is HEIC, as phones make it, and pillow-heif, which decodes that, isn't installed; install it with "
            "pip install 'featstore[heic]', or convert the image"
        ) from error
    file: ImageFile.ImageFile = HeifImageFile(data)  # type: ignore[no-untyped-call]
    return file


def _avif_file(data: io.BytesIO) -> ImageFile.ImageFile:
    """AVIF, as it lies: Pillow puts the container's orientation into EXIF."""
    try:
        from PIL import AvifImagePlugin
    except ImportError:
        is_supported = False
    else:
        is_supported = AvifImagePlugin.SUPPORTED
    if not is_supported:
        raise MissingDecoderError(
            "it is AVIF, which this Pillow can't decode; install Pillow 11.3 or newer, or convert the image"
        )
    return AvifImagePlugin.AvifImageFile(data)


_PLUGINS: dict[str, Callable[[io.BytesIO], ImageFile.ImageFile]] = {
    "JPEG": JpegImageFile,
    "PNG": PngImageFile,
    "GIF": GifImageFile,
    "WebP": WebPImageFile,
    "TIFF": TiffImageFile,
    "BMP": BmpImageFile,
    "HEIC": _heic_file,
    "AVIF": _avif_file,
}


def _decoded(image: ImageFile.ImageFile, header: Header) -> tuple[NDArray[np.uint8], int, str | None]:
    orientation = _orientation(header.exif or image.info.get("exif") or b"")  # that of a HEIC without any is None
    bits, is_inverted = 16, False
    if isinstance(image, TiffImageFile):
        tags = image.tag_v2
        orientation = _known_orientation(tags.get(_ORIENTATION_TAG))
        image.getexif()[_ORIENTATION_TAG] = 1  # else Pillow turns a TIFF while loading it, asked or not
        bits, is_inverted = tags.get(_BITS_TAG, (16,))[0], tags.get(_PHOTOMETRIC_TAG) == 0
    image.load()
    if image.mode.startswith("I;16") and (bits != 16 or is_inverted):
        # Pillow leaves both as they are in the file, too dark or negative.
        raise DecodeError(f"a {header.format} with {bits} bits a pixel{', 0 for white' * is_inverted}; convert it")
    pixels, doubt = _rgb_of(image, header.format)
    return pixels, orientation, doubt


def array_of(image: Image.Image) -> NDArray[np.uint8]:
    """The pixels of Pillow's image as it lies: `(H, W)` of a gray one, else `(H, W, 3)`, as a file of it is decoded.

    Raises:
        DecodeError: for a mode without a fixed range.
    """
    if image.mode == "L":
        return np.array(image)
    image = image.copy()  # what is dropped of it is the caller's
    return _rgb_of(image, "Pillow image")[0]


def _rgb_of(image: Image.Image, form: str) -> tuple[NDArray[np.uint8], str | None]:
    """The pixels, and what is doubtful about them."""
    if image.mode.startswith("I;16"):
        values = np.asarray(image)
        return _gray_to_rgb((values >> 8).astype(np.uint8)), _range_doubt(int(values.max()))
    if image.mode not in _RGB_MODES:
        raise DecodeError(
            f"a {form} with pixels of Pillow's mode {image.mode!r}, which has no fixed range of gray or "
            "colour; convert it to 8 or 16 bits"
        )
    # A palette's transparency is dropped like all alpha. Left in, it makes convert() warn.
    image.info.pop("transparency", None)
    return np.array(image.convert("RGB")), None


_RGB_MODES = frozenset({"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr"})
_BITS_TAG, _PHOTOMETRIC_TAG, _ORIENTATION_TAG = 0x0102, 0x0106, 0x0112


# --- what is doubtful about an image that was decoded ---


def _range_doubt(largest: int) -> str | None:
    """What is said of 16-bit values that leave the upper bits unused, and so come out nearly black."""
    if largest == 0 or largest >= 1 << 14:
        return None
    bits = largest.bit_length()
    return (
        f"its 16-bit values reach {largest:,} of 65,535, as if they had {bits} bits, so that it comes out nearly "
        f"black; scale the values up (times {1 << (16 - bits)}) or save them as 8 bits"
    )


# --- pixels ---


def _gray_to_rgb(gray: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.repeat(gray[:, :, None], 3, axis=2)


def _channels_first(pixels: NDArray[np.uint8]) -> Tensor:
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _turned(pixels: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """The image as the EXIF `orientation`, 1 to 8, wants it shown."""
    if orientation >= 5:
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)


def _orientation(exif: bytes) -> int:
    """The orientation in EXIF's first directory; 1, as it lies, where there is none or it makes no sense.

    Read here for all formats but TIFF, so that both decoders agree; Pillow's reader warns about damaged EXIF.
    """
    exif = exif.removeprefix(b"Exif\0\0")
    little = exif[:2] == b"II"
    if not little and exif[:2] != b"MM":
        return 1

    def number(start: int, size: int) -> int:
        return int.from_bytes(exif[start : start + size], "little" if little else "big")

    directory = number(4, 4)
    for entry in range(directory + 2, min(directory + 2 + 12 * number(directory, 2), len(exif) - 11), 12):
        if number(entry, 2) == _ORIENTATION_TAG:
            return _known_orientation(number(entry + 8, 4 if number(entry + 2, 2) == 4 else 2))
    return 1


def _known_orientation(value: object) -> int:
    return value if isinstance(value, int) and 1 <= value <= 8 else 1
