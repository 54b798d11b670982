"""Thumbnails: whole images made small, as Pillow makes them; what can't be had has its name in its place."""

from __future__ import annotations

import io
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps
from sklearn.datasets import load_sample_images

from featstore import ImageSet
from featstore.pages.thumbnails import thumbnail, thumbnails


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


def test_a_thumbnail_is_the_whole_image_made_small_and_turned_as_its_exif_says(tmp_path: Path) -> None:
    photo = Image.fromarray(load_sample_images().images[0])  # 640 x 427
    (tmp_path / "cat").mkdir()
    photo.save(tmp_path / "cat" / "a.jpg", quality=95)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    photo.save(tmp_path / "cat" / "b.jpg", quality=95, exif=exif)
    photo.save(tmp_path / "cat" / "c.png")
    found = thumbnails(ImageSet.from_folder(tmp_path), range(3))
    for name, each in zip("abc", found, strict=True):
        (path,) = tmp_path.glob(f"cat/{name}.*")
        expected = ImageOps.exif_transpose(Image.open(path)).resize(
            (43, 64) if name == "b" else (64, 43), Image.Resampling.BILINEAR
        )
        assert (each.failure, each.media_type) == (None, "image/jpeg")
        small = opened(each.data)
        assert small.size == expected.size
        # JPEG at quality 80 with halved colours, of pixels that another decoder may have reduced.
        assert np.abs(np.asarray(small, float) - np.asarray(expected, float)).mean() < 6
        assert len(each.data) < 3_000
        assert each.uri.startswith("data:image/jpeg;base64,")


def test_a_small_image_stays_as_large_as_it_is_and_a_gray_one_is_shown() -> None:
    images = ImageSet.from_arrays(np.full((1, 10, 7), 77, np.uint8))
    small = opened(thumbnail(images, 0).data)
    assert small.size == (7, 10)
    assert abs(np.asarray(small, float) - 77).max() <= 2


@pytest.mark.parametrize("content", [None, b"", b"\xff\xd8\xff no JPEG"])
def test_an_image_that_is_not_had_has_its_name_in_its_place(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "cat" / "<script>&.jpg"
    path.parent.mkdir()
    path.write_bytes(b"x")
    images = ImageSet.from_folder(tmp_path)
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    found = thumbnail(images, 0)
    assert found.failure
    assert found.media_type == "image/svg+xml"
    text = "".join(ET.fromstring(found.data).itertext())
    assert text == "cat/<script>&.jpg"
