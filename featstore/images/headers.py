"""Headers: what the bytes of an image say before anything is decoded: its format, how large it is, whether it ends."""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable
from typing import NamedTuple

from featstore.images.decoders import MAX_PIXELS

MAX_SCANS = 100
"""The most scans of a JPEG that are decoded. Encoders write up to a dozen; each goes over all of the image."""


class DecodeError(ValueError):
    """Bytes that are no readable image; the message is the reason, without the file's name."""


class MissingDecoderError(DecodeError):
    """The library that decodes such images isn't installed: no fault of the image."""


def failed(form: str, data: bytes, error: Exception) -> Exception:
    """What to raise where a decoder raised `error`: MemoryError if that is what it says, as no fault of the image."""
    if re.search(r"allocate memory|insufficient memory|out of memory", str(error), re.IGNORECASE):
        return MemoryError(f"a {form} of {len(data):,} bytes can't be decoded: {error}")
    lines = str(error).strip().splitlines() or [type(error).__name__]
    reason = re.sub(r"^\w+, \S+:\d+, ", "", lines[0])  # torch puts function, file and line of its own source before it
    return DecodeError(f"can't be decoded as {form}: {reason}")


class Scan(NamedTuple):
    """One pass of a JPEG over some of its components: its data, and which bits of which coefficients they are."""

    start: int
    stop: int
    components: frozenset[int]
    coefficients: range
    bits_before: int  # the lowest bit that was known; 0 of a first pass
    bits_after: int


class Header(NamedTuple):
    """What the bytes say of an image."""

    format: str
    is_for_pillow: bool = True
    exif: bytes = b""
    width: int = 0  # as the header says it, of JPEG and PNG
    height: int = 0
    scans: tuple[Scan, ...] = ()  # of a JPEG
    is_progressive: bool = False
    has_blocks: bool = False  # of a JPEG: whether it holds coefficients of blocks; a lossless one holds differences


def read_header(data: bytes) -> Header:
    """What encoded bytes say, by their signature; `DecodeError` for what is empty, cut off, too large or no image."""
    if not data:
        raise DecodeError("the file is empty")
    for pattern, read in _SIGNATURES:
        if pattern.match(data):
            return read(data)
    raise _unknown(f"starts with {data[:16]!r}")


def _unknown(kind: str) -> DecodeError:
    return DecodeError(
        f"{kind}: not an image that can be read (JPEG, PNG, GIF, WebP, TIFF, BMP, HEIC, AVIF); convert or remove it"
    )


def _jpeg_header(data: bytes) -> Header:
    """Walks all segments and scans up to the end marker: libjpeg fills the rest of a truncated file with gray."""
    frame = exif = None
    kind = 0
    scans: list[Scan] = []
    position = 2
    while match := JPEG_MARKER.search(data, position):
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
    check_size(width, height)
    if num_scans > MAX_SCANS:
        raise DecodeError(
            f"a JPEG of {num_scans:,} scans; at most {MAX_SCANS} are decoded, as each goes over all pixels (a "
            "decompression bomb?); save it anew or remove it"
        )
    bits, components = frame[0], frame[5]
    if bits != 8 or components not in (1, 3, 4):
        raise DecodeError(f"a JPEG of {components} components with {bits} bits each; 1, 3 or 4 with 8 bits are read")
    is_progressive = kind not in _BASELINE_MARKERS or num_scans > 1
    return Header(
        "JPEG", components == 4, exif or b"", width, height, tuple(scans), is_progressive, kind in _BLOCK_MARKERS
    )


def without_exif(data: bytes) -> bytearray:
    """A JPEG in which no decoder finds how to turn it: its EXIF lies in segments of a kind that all pass over."""
    hidden, position = bytearray(data), 2
    while (match := JPEG_MARKER.search(data, position)) and match[1][0] != _END_OF_IMAGE:
        if match[1][0] == _APP1:
            hidden[match.start(1)] = _APP15
        position = match.end() + int.from_bytes(data[match.end() : match.end() + 2], "big")
    return hidden


def _scan(header: bytes, start: int) -> Scan:
    """A scan by its header; where it stops isn't known yet. libjpeg refuses headers that make no sense."""
    count = header[0] if header else 0
    first, last, bits = (*header[1 + 2 * count :], 0, 0, 0)[:3]
    components = frozenset(header[1 : 1 + 2 * count : 2])
    return Scan(start, 0, components, range(first, last + 1), bits >> 4, bits & 15)


JPEG_MARKER = re.compile(rb"\xff([^\x00\x01\xff\xd0-\xd8])", re.DOTALL)  # all that are neither data nor without length
_START_OF_SCAN, _END_OF_IMAGE, _APP1, _APP15 = 0xDA, 0xD9, 0xE1, 0xEF
_FRAME_MARKERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_BASELINE_MARKERS = frozenset({0xC0, 0xC1})
_BLOCK_MARKERS = frozenset({0xC0, 0xC1, 0xC2, 0xC9, 0xCA})


def _png_header(data: bytes) -> Header:
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
    check_size(width, height)
    # Never torchvision: a damaged PNG (a wrong checksum, too few rows) doesn't raise there but kills the process, in
    # 0.29.2 each time. Whole ones have equal values in both.
    return Header("PNG", exif=exif or b"", width=width, height=height)


def _heif_header(data: bytes) -> Header:
    """HEIC and AVIF are two codecs in one container, which names them at its start."""
    brands = data[8 : min(int.from_bytes(data[:4], "big"), _MOST_BRANDS)]
    named = {brands[place : place + 4] for place in (0, *range(8, len(brands), 4))}  # a version lies between them
    if named & {b"avif", b"avis"}:
        return Header("AVIF")
    if named & {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}:
        return Header("HEIC")
    raise _unknown(f"may be a video (of the kind {data[8:12]!r})")


_MOST_BRANDS = 1024


def _pillow_header(name: str) -> Callable[[bytes], Header]:
    return lambda data: Header(name)


_SIGNATURES: tuple[tuple[re.Pattern[bytes], Callable[[bytes], Header]], ...] = (
    (re.compile(rb"\xff\xd8\xff"), _jpeg_header),
    (re.compile(rb"\x89PNG\r\n\x1a\n"), _png_header),
    (re.compile(rb"GIF8[79]a"), _pillow_header("GIF")),
    (re.compile(rb"RIFF....WEBP", re.DOTALL), _pillow_header("WebP")),
    (re.compile(rb"II[*+]\0|MM\0[*+]"), _pillow_header("TIFF")),
    (re.compile(rb"BM"), _pillow_header("BMP")),
    (re.compile(rb"....ftyp", re.DOTALL), _heif_header),
)


def check_size(width: int, height: int) -> None:
    """`DecodeError` for no pixels, and more than are decoded."""
    if width < 1 or height < 1:
        raise DecodeError(f"its header says {width} x {height} pixels")
    if width * height > MAX_PIXELS:
        raise DecodeError(
            f"its header says {width} x {height} pixels; at most {MAX_PIXELS:,} are decoded (a decompression bomb?); "
            "shrink or remove it"
        )
