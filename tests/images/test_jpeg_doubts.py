"""JPEGs that decoders read though their data is damaged: which are doubted, and that no sound one is."""

from __future__ import annotations

import io
import re
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile
from sklearn.datasets import load_sample_images

from featstore.images.decode import decode


def saved(pixels: NDArray[np.uint8] | Image.Image, **options: Any) -> bytes:
    file = io.BytesIO()
    (Image.fromarray(pixels) if isinstance(pixels, np.ndarray) else pixels).save(file, "JPEG", **options)
    return file.getvalue()


def saved_photo(**options: Any) -> bytes:
    return saved(load_sample_images().images[0], **options)


@pytest.mark.parametrize("options", [{}, {"optimize": True}, {"quality": 95, "subsampling": 0}])
def test_a_jpeg_with_a_hole_of_zeros_or_without_its_last_rows_is_doubted(options: dict[str, Any]) -> None:
    data = saved_photo(**options)
    middle = len(data) // 2
    assert decode(data).doubt is None
    assert "a hole of zeros" in str(decode(data[:middle] + bytes(4096) + data[middle + 4096 :]).doubt)
    assert "ends before its last rows" in str(decode(data[:middle] + b"\xff\xd9").doubt)


@pytest.mark.parametrize("fill", [bytes(200), b"\x55" * 600], ids=["200 zeros", "600 times 0x55"])
def test_a_jpeg_with_a_run_of_equal_bytes_is_doubted_where_its_data_no_longer_fits(fill: bytes) -> None:
    data = saved_photo(quality=90)
    whole = decode(data).pixels
    found = []
    for tenth in range(2, 9):
        place = len(data) * tenth // 10
        damaged = decode(data[:place] + fill + data[place + len(fill) :])
        assert not torch.equal(damaged.pixels, whole)
        found.append(damaged.doubt is not None)
    assert found.count(True) >= 5  # by chance, the data may be about as long as it was


def test_restart_markers_that_are_lost_or_misplaced_are_doubted() -> None:
    data = saved_photo(restart_marker_rows=1)
    assert decode(data).doubt is None
    second, third = data.index(b"\xff\xd2"), data.index(b"\xff\xd3")
    for damaged in (
        data[:second] + b"\xab\xab" + data[second + 2 :],
        data[:second] + data[third:],
        data[: third - 60] + b"\xff\xd6" + data[third - 58 :],
    ):
        assert "a marker stands that belongs elsewhere" in str(decode(damaged).doubt)
    plain = saved_photo()
    middle = len(plain) // 2
    assert "a marker stands" in str(decode(plain[:middle] + b"\xab\xff\xd0\xab" + plain[middle + 4 :]).doubt)


def test_a_progressive_jpeg_that_lacks_scans_or_has_a_hole_in_its_details_is_doubted() -> None:
    data = saved_photo(progressive=True)
    assert decode(data).doubt is None
    scans = [match.start() for match in re.finditer(rb"\xff\xda", data)]
    for cut in (len(data) // 2, scans[-1], scans[3]):
        assert "last scans are missing" in str(decode(data[:cut] + b"\xff\xd9").doubt)
    place = scans[1] + 200  # in the first of the scans of details
    assert "details are not what" in str(decode(data[:place] + bytes(600) + data[place + 600 :]).doubt)


def patterns() -> list[NDArray[np.uint8]]:
    """Pictures whose data repeats itself, as damage may."""
    rows, columns = np.indices((96, 160))
    planes = [columns % 2, rows % 8 == 0, columns % 8 == 0, (rows + columns) // 4 % 2, columns > 80, rows * 0]
    return [np.repeat((plane * 255).astype(np.uint8)[:, :, None], 3, axis=2) for plane in planes]


@pytest.mark.parametrize("quality", [30, 75, 100])
@pytest.mark.parametrize("subsampling", [0, 2])
@pytest.mark.parametrize(
    "options", [{}, {"optimize": True}, {"progressive": True}, {"restart_marker_rows": 1}, {"restart_marker_blocks": 3}]
)
def test_no_sound_jpeg_is_doubted(options: dict[str, Any], quality: int, subsampling: int) -> None:
    for pixels in (*patterns(), load_sample_images().images[0]):
        for mode in ("RGB", "L"):
            image = Image.fromarray(pixels).convert(mode)
            data = saved(image, quality=quality, subsampling=subsampling, **options)
            assert decode(data).doubt is None
            assert decode(data + bytes(300)).doubt is None


def test_what_follows_the_end_of_a_jpeg_neither_makes_it_doubtful_nor_hides_that_it_ends_early() -> None:
    data = saved(load_sample_images().images[1][:100, :150], quality=90)
    for behind in (bytes(4096), data, b"\xff\xd9", bytes(4096) + b"\xff\xd9"):
        assert decode(data + behind).doubt is None
        early = data[: len(data) // 2] + b"\xff\xd9" + behind
        assert "ends before its last rows" in str(decode(early).doubt)


def test_metadata_that_pillow_alone_refuses_leaves_a_photograph_without_doubt() -> None:
    pixels = load_sample_images().images[0].copy()
    pixels[300:] = 255
    data = saved(pixels)
    profile = b"ICC_PROFILE\0"
    odd = data[:2] + b"\xff\xe2" + (len(profile) + 2).to_bytes(2, "big") + profile + data[2:]
    with pytest.raises(SyntaxError):
        JpegImageFile(io.BytesIO(odd))
    assert decode(odd).doubt is None


@pytest.mark.parametrize("options", [{}, {"optimize": True}, {"progressive": True}])
@pytest.mark.parametrize("bottom", [0, 128, 255])
def test_a_photograph_that_ends_in_one_colour_or_is_of_one_is_not_doubted(options: dict[str, Any], bottom: int) -> None:
    pixels = load_sample_images().images[0].copy()
    for first in (300, 0):
        pixels[first:] = bottom
        assert decode(saved(pixels, **options)).doubt is None
