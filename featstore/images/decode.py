"""Decoding: an image's encoded bytes to uint8 RGB, by a named policy in which the bytes alone choose the decoder."""

from __future__ import annotations

import importlib.util
import io
import math
import re
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import simplejpeg
import torch
from numpy.typing import NDArray
from PIL import ImageFile
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile
from torch import Tensor

from featstore.errors import FeatureStoreError
from featstore.images.decoders import ARRAY, MAX_PIXELS, PILLOW, POLICY, SIMPLEJPEG, TORCHVISION
from featstore.machine import available_bytes
from featstore.words import size_text

MAX_SCANS = 100
"""The most scans of a JPEG that are decoded. Encoders write up to a dozen; each goes over all of the image."""


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


class DecodeError(ValueError):
    """Bytes that are no readable image; the message is the reason, without the file's name."""


def decode(
    data: bytes | NDArray[np.uint8], *, policy: str = POLICY, apply_exif: bool = True, memory: Budget | None = None
) -> Decoded:
    """The image as uint8 RGB `(3, H, W)`, the code of the decoder that read it, and what is doubtful about it.

    Strides are those of `(H, W, 3)` rows, as decoders leave them: planes would cost as much time as the resize that
    follows (1600 x 1200: 2.3 ms for the copy, then 3.3 ms to resize against 1.1 ms from rows). The memory is the
    caller's own.

    JPEG of 8 bits, gray or colour, is read by simplejpeg or, where its data is damaged, by torchvision.io, to equal
    pixels; CMYK JPEG, PNG, GIF (its first frame), WebP, TIFF (its first page) and BMP by Pillow. Alpha is dropped, 16
    bits lose their low eight, colour profiles are not applied. The suffix of the file's name plays no part.

    Args:
        data: the encoded file, or an array `(H, W)` or `(H, W, 3)`.
        policy: must be `decoders.POLICY`, the only one so far.
        apply_exif: whether the EXIF orientation turns and mirrors the image.
        memory: what all decodings at one time may take, where there are several.

    Raises:
        DecodeError: when the bytes are empty, truncated, too large, or not an image that is read.
        MemoryError: when decoding would take more memory than is free.

    Pillow reports odd metadata of a TIFF, and a TIFF or GIF larger than its own ``Image.MAX_IMAGE_PIXELS``, as Python
    warnings, which this function lets through: to suppress them is to change the filters of all threads.
    """
    if policy != POLICY:
        raise ValueError(f"decode policy {policy!r} is unknown to this version of featstore, which has {POLICY!r}")
    if isinstance(data, np.ndarray):
        return Decoded(_channels_first(_from_array(data)), ARRAY)
    header, memory = _read_header(data), Budget() if memory is None else memory
    if header.is_for_pillow:
        decoder, (pixels, orientation, doubt) = PILLOW, _by_pillow(data, header, memory)
    else:
        with memory.taken(_bytes_needed(header.format, header.width * header.height), header.format):
            pixels, decoder, doubt = _by_libjpeg(data)
        orientation, doubt = _orientation(header.exif), doubt or _jpeg_doubt(data, header)
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


# --- what the bytes say before anything is decoded ---


class _Scan(NamedTuple):
    """One pass of a JPEG over some of its components: its data, and which bits of which coefficients they are."""

    start: int
    stop: int
    components: frozenset[int]
    coefficients: range
    bits_before: int  # the lowest bit that was known; 0 of a first pass
    bits_after: int


class _Header(NamedTuple):
    format: str
    is_for_pillow: bool = True
    exif: bytes = b""
    width: int = 0  # as the header says it, of JPEG and PNG
    height: int = 0
    scans: tuple[_Scan, ...] = ()  # of a JPEG
    is_progressive: bool = False


def _read_header(data: bytes) -> _Header:
    if not data:
        raise DecodeError("the file is empty")
    for pattern, read in _SIGNATURES:
        if pattern.match(data):
            return read(data)
    kind = "may be AVIF, HEIC or a video" if data[4:8] == b"ftyp" else f"starts with {data[:16]!r}"
    raise DecodeError(f"{kind}: not an image that can be read (JPEG, PNG, GIF, WebP, TIFF, BMP); convert or remove it")


def _jpeg_header(data: bytes) -> _Header:
    """Walks all segments and scans up to the end marker: libjpeg fills the rest of a truncated file with gray."""
    frame = exif = None
    kind = 0
    scans: list[_Scan] = []
    position = 2
    while match := _JPEG_MARKER.search(data, position):
        marker, position = match[1][0], match.end()
        if scans and not scans[-1].stop:
            scans[-1] = scans[-1]._replace(stop=match.start())
        if marker == _END_OF_IMAGE:
            break
        length = int.from_bytes(data[position : position + 2], "big")
        if length < 2 or position + length > len(data):
            raise DecodeError("a JPEG that is damaged or truncated: one of its segments reaches beyond the file")
        segment = data[position + 2 : position + length]
        if marker in _FRAME_MARKERS and frame is None:
            frame, kind = segment, marker
        elif marker == _APP1 and exif is None and segment.startswith(b"Exif\0\0"):
            exif = segment[6:]
        position += length
        if marker == _START_OF_SCAN:
            scans.append(_scan(segment, position))
    else:
        raise DecodeError("a truncated JPEG: its end marker is missing")
    num_scans = len(scans)
    if frame is None or len(frame) < 6 or not num_scans:
        raise DecodeError("a JPEG without image data")
    width, height = int.from_bytes(frame[3:5], "big"), int.from_bytes(frame[1:3], "big")
    _check_size(width, height)
    if num_scans > MAX_SCANS:
        raise DecodeError(
            f"a JPEG of {num_scans:,} scans; at most {MAX_SCANS} are decoded, as each goes over all pixels (a "
            "decompression bomb?); save it anew or remove it"
        )
    bits, components = frame[0], frame[5]
    if bits != 8 or components not in (1, 3, 4):
        raise DecodeError(f"a JPEG of {components} components with {bits} bits each; 1, 3 or 4 with 8 bits are read")
    is_progressive = kind not in _BASELINE_MARKERS or num_scans > 1
    return _Header("JPEG", components == 4, exif or b"", width, height, tuple(scans), is_progressive)


def _scan(header: bytes, start: int) -> _Scan:
    """A scan by its header; where it stops isn't known yet. libjpeg refuses headers that make no sense."""
    count = header[0] if header else 0
    first, last, bits = (*header[1 + 2 * count :], 0, 0, 0)[:3]
    components = frozenset(header[1 : 1 + 2 * count : 2])
    return _Scan(start, 0, components, range(first, last + 1), bits >> 4, bits & 15)


_JPEG_MARKER = re.compile(rb"\xff([^\x00\x01\xff\xd0-\xd8])", re.DOTALL)  # all that are neither data nor without length
_START_OF_SCAN, _END_OF_IMAGE, _APP1 = 0xDA, 0xD9, 0xE1
_FRAME_MARKERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_BASELINE_MARKERS = frozenset({0xC0, 0xC1})


def _png_header(data: bytes) -> _Header:
    """Walks all chunks up to the last, which a truncated file lacks."""
    start = exif = None
    has_data = False
    position, kind = 8, b""
    while kind != b"IEND":
        length, kind = int.from_bytes(data[position : position + 4], "big"), data[position + 4 : position + 8]
        body = data[position + 8 : position + 8 + length]
        position += 12 + length
        if position > len(data):
            raise DecodeError("a truncated PNG: its end chunk is missing")
        if zlib.crc32(body, zlib.crc32(kind)) != int.from_bytes(data[position - 4 : position], "big"):
            raise DecodeError(f"a damaged PNG: wrong checksum of its chunk {kind!r}")  # Pillow doesn't look at pixels'
        if kind == b"IHDR" and start is None:
            start = body
        elif kind == b"eXIf":
            exif = body
        has_data = has_data or kind == b"IDAT"
    if start is None or len(start) < 13 or not has_data:
        raise DecodeError("a PNG without image data")
    width, height = int.from_bytes(start[:4], "big"), int.from_bytes(start[4:8], "big")
    _check_size(width, height)
    # Never torchvision: a damaged PNG (a wrong checksum, too few rows) doesn't raise there but kills the process, in
    # 0.29.2 each time. Whole ones have equal values in both.
    return _Header("PNG", exif=exif or b"", width=width, height=height)


def _pillow_header(name: str) -> Callable[[bytes], _Header]:
    return lambda data: _Header(name)


_SIGNATURES: tuple[tuple[re.Pattern[bytes], Callable[[bytes], _Header]], ...] = (
    (re.compile(rb"\xff\xd8\xff"), _jpeg_header),
    (re.compile(rb"\x89PNG\r\n\x1a\n"), _png_header),
    (re.compile(rb"GIF8[79]a"), _pillow_header("GIF")),
    (re.compile(rb"RIFF....WEBP", re.DOTALL), _pillow_header("WebP")),
    (re.compile(rb"II[*+]\0|MM\0[*+]"), _pillow_header("TIFF")),
    (re.compile(rb"BM"), _pillow_header("BMP")),
)


def _check_size(width: int, height: int) -> None:
    if width < 1 or height < 1:
        raise DecodeError(f"its header says {width} x {height} pixels")
    if width * height > MAX_PIXELS:
        raise DecodeError(
            f"its header says {width} x {height} pixels; at most {MAX_PIXELS:,} are decoded (a decompression bomb?); "
            "shrink or remove it"
        )


# --- the decoders: each gives (H, W, 3) ---


def _from_array(array: NDArray[np.uint8]) -> NDArray[np.uint8]:
    is_image = array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 3)
    if array.dtype != np.uint8 or not is_image or array.size == 0:
        raise DecodeError(f"an array {array.shape} of {array.dtype}; expected uint8 (H, W) or (H, W, 3)")
    return _gray_to_rgb(array) if array.ndim == 2 else array.copy(order="C")


def _by_libjpeg(data: bytes) -> tuple[NDArray[np.uint8], int, str | None]:
    """Pixels, decoder and doubt of a JPEG. Where libjpeg passes over damage, simplejpeg stops and says what it found.

    What is damaged has the pixels that torchvision.io gives it, or none.
    """
    try:
        return simplejpeg.decode_jpeg(data, "RGB"), SIMPLEJPEG, None
    except ValueError as error:
        warning = str(error).strip()
    return _by_torchvision(data), TORCHVISION, f"libjpeg warns ({warning}): it may not show what was photographed"


def _by_torchvision(data: bytes) -> NDArray[np.uint8]:
    encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    try:
        # The operator itself: since torchvision 0.29 each call of its Python wrapper warns, to point at torchcodec.
        image: Tensor = _torchvision_jpeg()(encoded, _RGB, False)
    except RuntimeError as error:
        _refuse_lack_of_memory("JPEG", data, error)
        raise DecodeError(_failure("JPEG", error)) from error
    return np.ascontiguousarray(image.permute(1, 2, 0).numpy())


_RGB = 3  # torchvision.io.ImageReadMode.RGB


@cache
def _torchvision_jpeg() -> Callable[[Tensor, int, bool], Tensor]:
    """The operator that decodes a JPEG, from torchvision's library of image operators alone.

    `import torchvision` brings its models and torch's compiler along, which takes as long as torch itself.
    """
    package = importlib.util.find_spec("torchvision")
    folders = [] if package is None else [Path(each) for each in package.submodule_search_locations or ()]
    for library in [path for folder in folders for path in sorted(folder.glob("image*.so"))]:
        with suppress(OSError):  # of another build than this torch
            torch.ops.load_library(library)  # type: ignore[no-untyped-call]
            break
    if not hasattr(torch.ops.image, "decode_jpeg"):
        import torchvision.io  # noqa: F401 - it says what is wrong with its installation, or has it elsewhere
    operator: Callable[[Tensor, int, bool], Tensor] = torch.ops.image.decode_jpeg
    return operator


def _by_pillow(data: bytes, header: _Header, memory: Budget) -> tuple[NDArray[np.uint8], int, str | None]:
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        raise FeatureStoreError(
            "PIL.ImageFile.LOAD_TRUNCATED_IMAGES is set in this process, so that a truncated file would pass for a "
            "whole one. Expected it off, as it is at first. Set it to False."
        )
    try:
        # The plug-in's class, not Image.open: the bytes choose the decoder, not the plug-ins that happen to be
        # registered, and Image.open warns about large images, which are this file's business.
        with _PLUGINS[header.format](io.BytesIO(data)) as image:
            _check_size(*image.size)
            with memory.taken(_bytes_needed(header.format, image.width * image.height), header.format):
                return _decoded(image, header)
    except (DecodeError, MemoryError):
        raise
    except Exception as error:  # on damaged files the plug-ins raise nearly everything, struct.error to AttributeError
        _refuse_lack_of_memory(header.format, data, error)
        raise DecodeError(_failure(header.format, error)) from error


def _refuse_lack_of_memory(form: str, data: bytes, error: Exception) -> None:
    """Raises MemoryError where that is what an error says: it is no fault of the image."""
    if re.search(r"allocate memory|insufficient memory|out of memory", str(error), re.IGNORECASE):
        raise MemoryError(f"a {form} of {len(data):,} bytes can't be decoded: {error}") from error


_PLUGINS: dict[str, Callable[[io.BytesIO], ImageFile.ImageFile]] = {
    "JPEG": JpegImageFile,
    "PNG": PngImageFile,
    "GIF": GifImageFile,
    "WebP": WebPImageFile,
    "TIFF": TiffImageFile,
    "BMP": BmpImageFile,
}


def _decoded(image: ImageFile.ImageFile, header: _Header) -> tuple[NDArray[np.uint8], int, str | None]:
    orientation = _orientation(header.exif or image.info.get("exif", b""))
    bits, is_inverted = 16, False
    if isinstance(image, TiffImageFile):
        tags = image.tag_v2
        orientation = _known_orientation(tags.get(_ORIENTATION_TAG))
        image.getexif()[_ORIENTATION_TAG] = 1  # else Pillow turns a TIFF while loading it, asked or not
        bits, is_inverted = tags.get(_BITS_TAG, (16,))[0], tags.get(_PHOTOMETRIC_TAG) == 0
    image.load()
    if image.mode.startswith("I;16"):
        if bits != 16 or is_inverted:  # Pillow leaves both as they are in the file, too dark or negative
            raise DecodeError(f"a {header.format} with {bits} bits a pixel{', 0 for white' * is_inverted}; convert it")
        values = np.asarray(image)
        return _gray_to_rgb((values >> 8).astype(np.uint8)), orientation, _range_doubt(int(values.max()))
    if image.mode not in _RGB_MODES:
        raise DecodeError(
            f"a {header.format} with pixels of Pillow's mode {image.mode!r}, which has no fixed range of gray or "
            "colour; convert it to 8 or 16 bits"
        )
    # A palette's transparency is dropped like all alpha. Left in, it makes convert() warn.
    image.info.pop("transparency", None)
    return np.array(image.convert("RGB")), orientation, None


_RGB_MODES = frozenset({"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr"})
_BITS_TAG, _PHOTOMETRIC_TAG, _ORIENTATION_TAG = 0x0102, 0x0106, 0x0112


def _failure(format_name: str, error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    reason = re.sub(r"^\w+, \S+:\d+, ", "", lines[0])  # torch puts function, file and line of its own source before it
    return f"can't be decoded as {format_name}: {reason}"


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


def _jpeg_doubt(data: bytes, header: _Header) -> str | None:
    """What is said of a JPEG of which no decoder warns: that it has a hole of zeros, or that scans are missing.

    Where the data fits again behind a hole, by chance, it is as long as its image.
    """
    if header.is_progressive:
        return _progressive_doubt(data, header.scans)
    scan = header.scans[0]
    hole = data.find(bytes(_HOLE_BYTES), scan.start, scan.stop)
    if hole >= 0 and not _zeros_are_flat(data[: scan.start]):
        return f"its data has a hole of zeros at byte {hole:,}: what follows is not what was photographed"
    return None


_HOLE_BYTES = 256


def _zeros_are_flat(tables: bytes) -> bool:
    """Whether bits of zeros mean blocks of one colour by the Huffman tables in a JPEG's head.

    They do where the first code for a block's mean stands for no change and the first one for its details for none.
    """
    firsts: dict[int, set[int]] = {0: set(), 1: set()}
    position = 2
    while match := _JPEG_MARKER.search(tables, position):
        length = int.from_bytes(tables[match.end() : match.end() + 2], "big")
        segment, position = tables[match.end() + 2 : match.end() + length], match.end() + length
        while match[1][0] == _HUFFMAN_TABLES and len(segment) > 17:
            firsts[segment[0] >> 4 & 1].add(segment[17])
            segment = segment[17 + sum(segment[1:17]) :]
    return firsts == {0: {0}, 1: {0}}


_HUFFMAN_TABLES = 0xC4


def _progressive_doubt(data: bytes, scans: tuple[_Scan, ...]) -> str | None:
    """What is said of a JPEG of several scans: that some are missing, or that one of details has a hole of zeros.

    Zeros in other scans may be sound, as they are blocks without change or bits of value 0.
    """
    for scan in scans:
        if scan.coefficients.start > 0 and not scan.bits_before:
            hole = data.find(bytes(_HOLE_BYTES), scan.start, scan.stop)
            if hole >= 0:
                return f"its data has a hole of zeros at byte {hole:,}: details are not what was photographed"
    first = scans[0]
    if first.coefficients == range(1) and first.bits_after:  # else its scans aren't those of usual encoders
        components = frozenset.union(*(scan.components for scan in scans))
        last = {
            (component, coefficient)
            for scan in scans
            if not scan.bits_after
            for component in scan.components
            for coefficient in scan.coefficients
        }
        if len(last) < 64 * len(components):
            return "its last scans are missing, so that details are"
    return None


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
