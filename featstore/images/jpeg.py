"""JPEG: its pixels, by the libjpeg of several libraries, and what is doubtful about them where its data is damaged."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path

import numpy as np
import simplejpeg
import torch
from numpy.typing import NDArray
from torch import Tensor

from featstore.images.decoders import SIMPLEJPEG, TORCHCODEC, TORCHVISION
from featstore.images.headers import JPEG_MARKER, Header, MissingDecoderError, Scan, failed, without_exif


def read(data: bytes) -> tuple[NDArray[np.uint8], int, str | None]:
    """Pixels, decoder and doubt of a JPEG. Where libjpeg passes over damage, simplejpeg stops and says what it found.

    What is damaged has the pixels that torchvision.io gives it, or none; torchcodec gives the same.

    Raises:
        DecodeError: where libjpeg gives up; `MissingDecoderError` where neither of the two is there for a damaged one.
    """
    try:
        return simplejpeg.decode_jpeg(data, "RGB"), SIMPLEJPEG, None
    except ValueError as error:
        warning = str(error).strip()
    by_torchvision = _torchvision_jpeg()
    try:
        if by_torchvision is None:
            image = _by_torchcodec(data)
        else:
            image = by_torchvision(torch.frombuffer(bytearray(data), dtype=torch.uint8), _RGB, False)
    except (ImportError, OSError) as error:
        raise MissingDecoderError(
            f"its data is damaged (libjpeg: {warning}), and of the decoders that read such a JPEG torchvision has none "
            f"any more and torchcodec can't be loaded ({error}); install it with pip install 'featstore[torchcodec]', "
            "or save the image anew"
        ) from error
    except RuntimeError as error:
        raise failed("JPEG", data, error) from error
    pixels = np.ascontiguousarray(image.permute(1, 2, 0).numpy())
    return pixels, TORCHCODEC if by_torchvision is None else TORCHVISION, warned(warning)


def scale(header: Header, resize: int) -> int:
    """By how much a JPEG is reduced for a view's `resize`: by 8, 4 or 2, or by 1, which is not at all.

    By as much as leaves its shorter side, rounded up, twice `resize` and 4 pixels (of fewer, simplejpeg's other scales
    leave as many). Lossless ones have no blocks to make fewer pixels of: libjpeg would write all pixels, beyond the
    memory that simplejpeg has for a reduced image.
    """
    if not header.has_blocks:
        return 1
    shorter, needed = min(header.width, header.height), max(2 * resize, 4)
    return next((each for each in (8, 4, 2) if -(-shorter // each) >= needed), 1)


def read_reduced(data: bytes, header: Header, scale: int) -> NDArray[np.uint8]:
    """The pixels by libjpeg's inverse transform to 4, 2 or 1 pixels of a block's 8; ValueError where it would warn."""
    height, width = (-(-side // scale) for side in (header.height, header.width))
    pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(
        data, "RGB", min_height=height, min_width=width, min_factor=scale
    )
    return pixels


def encoded(pixels: NDArray[np.uint8], quality: int) -> bytes:
    """A JPEG of RGB `(H, W, 3)`, for people to look at."""
    data: bytes = simplejpeg.encode_jpeg(
        np.ascontiguousarray(pixels), quality=quality, colorspace="RGB", colorsubsampling="420"
    )
    return data


_RGB = 3  # torchvision.io.ImageReadMode.RGB


@cache
def _torchvision_jpeg() -> Callable[[Tensor, int, bool], Tensor] | None:
    """The operator that decodes a JPEG, from torchvision's library of image operators alone; None if it has none.

    Its Python wrapper warns at each call from torchvision 0.29 on that torchcodec takes its place. And
    `import torchvision` brings its models and torch's compiler along, which takes as long as torch itself.
    """
    package = importlib.util.find_spec("torchvision")
    folders = [] if package is None else [Path(each) for each in package.submodule_search_locations or ()]
    for library in [path for folder in folders for path in sorted(folder.glob("image*.so"))]:
        with suppress(OSError):  # of another build than this torch
            torch.ops.load_library(library)  # type: ignore[no-untyped-call]
            break
    if not hasattr(torch.ops.image, "decode_jpeg"):
        with suppress(ImportError):
            import torchvision.io  # noqa: F401 - it says what is wrong with its installation, or has it elsewhere
    operator: Callable[[Tensor, int, bool], Tensor] | None = getattr(torch.ops.image, "decode_jpeg", None)
    return operator


def _by_torchcodec(data: bytes) -> Tensor:
    """The image as it lies: torchcodec turns it by whatever EXIF it finds, and gives none where that is damaged."""
    from torchcodec.decoders import decode_jpeg

    image: Tensor = decode_jpeg(torch.frombuffer(without_exif(data), dtype=torch.uint8))
    return image


# --- what is doubtful about pixels that were read ---


def warned(warning: str) -> str:
    """What is said of a JPEG of which a decoder warns."""
    return f"libjpeg warns ({warning}): it may not show what was photographed"


def doubt_of(data: bytes, header: Header) -> str | None:
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
    while match := JPEG_MARKER.search(tables, position):
        length = int.from_bytes(tables[match.end() : match.end() + 2], "big")
        segment, position = tables[match.end() + 2 : match.end() + length], match.end() + length
        while match[1][0] == _HUFFMAN_TABLES and len(segment) > 17:
            firsts[segment[0] >> 4 & 1].add(segment[17])
            segment = segment[17 + sum(segment[1:17]) :]
    return firsts == {0: {0}, 1: {0}}


_HUFFMAN_TABLES = 0xC4


def _progressive_doubt(data: bytes, scans: tuple[Scan, ...]) -> str | None:
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
