"""Decoding at reduced scale: which scale, the pixels of Pillow's draft mode, and what is decoded in full as ever."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFile, ImageOps
from PIL.JpegImagePlugin import JpegImageFile
from sklearn.datasets import load_sample_images

from featstore import FeatureStoreError
from featstore.images import jpeg
from featstore.images import render as render_module
from featstore.images.decode import Decoded, decode
from featstore.images.decoders import PILLOW, REDUCED, SIMPLEJPEG, TORCHVISION
from featstore.images.digests import content_digest
from featstore.images.headers import DecodeError, read_header
from featstore.images.image_set import ImageSet
from featstore.images.render import Job, render
from featstore.images.views import View

Pixels = NDArray[np.uint8]
PHOTO: Pixels = np.ascontiguousarray(load_sample_images().images[0][:301, :411])
ORIENTATION = 0x0112


def saved(pixels: Pixels | Image.Image, form: str = "JPEG", **options: Any) -> bytes:
    file = io.BytesIO()
    (Image.fromarray(pixels) if isinstance(pixels, np.ndarray) else pixels).save(file, form, **options)
    return file.getvalue()


def reduced(data: bytes | Pixels, resize: int, **options: Any) -> Pixels:
    return np.asarray(decode(data, policy=REDUCED, resize=resize, **options).pixels.permute(1, 2, 0))


def in_full(data: bytes | Pixels) -> Pixels:
    return np.asarray(decode(data).pixels.permute(1, 2, 0))


def drafted(data: bytes, scale: int) -> Pixels:
    """By Pillow, which picks the largest scale that leaves a size."""
    image = JpegImageFile(io.BytesIO(data))
    image.draft("RGB", (image.width // scale, image.height // scale))
    return np.array(ImageOps.exif_transpose(image).convert("RGB"))


@pytest.mark.parametrize(
    ("mode", "options"),
    [
        ("RGB", {}),
        ("RGB", {"subsampling": 0}),
        ("RGB", {"subsampling": 1}),
        ("RGB", {"progressive": True}),
        ("RGB", {"quality": 30}),
        ("L", {}),
    ],
    ids=["4:2:0", "4:4:4", "4:2:2", "progressive", "coarse", "gray"],
)
@pytest.mark.parametrize(("resize", "scale"), [(75, 2), (40, 2), (37, 4), (20, 4), (19, 8), (1, 8)])
def test_reduced_jpegs_have_the_pixels_of_pillows_draft(
    mode: str, options: dict[str, Any], resize: int, scale: int
) -> None:
    data = saved(Image.fromarray(PHOTO).convert(mode), **options)
    shown = decode(data, policy=REDUCED, resize=resize)
    assert (shown.decoder, shown.doubt) == (SIMPLEJPEG, None)
    assert shown.pixels.shape == (3, -(-301 // scale), -(-411 // scale))
    assert np.array_equal(reduced(data, resize), drafted(data, scale))


def test_an_eighth_is_the_mean_of_each_block() -> None:
    """To half a level, as both round, and a quarter for the coefficients, which are whole numbers of eighths."""
    gray = np.asarray(Image.fromarray(PHOTO[:296, :408]).convert("L"))
    means = gray.reshape(37, 8, 51, 8).mean((1, 3))
    shown = reduced(saved(gray, quality=100), 18)[:, :, 0]
    assert np.abs(shown - means).max() <= 0.75


@pytest.mark.parametrize(
    ("width", "height", "resize", "scale"),
    [
        (1600, 1200, 256, 2),
        (1600, 1200, 300, 2),
        (1600, 1199, 300, 2),  # 599.5 pixels, of which 600 are made
        (1600, 1198, 300, 1),
        (1200, 1600, 150, 4),
        (4000, 3000, 256, 4),
        (6000, 4000, 232, 8),
        (500, 375, 256, 1),
        (9000, 20, 8, 1),
        (7, 7, 1, 2),
        (6, 60, 1, 1),
        (25, 25, 2, 8),
    ],
)
def test_the_scale_leaves_twice_the_resize_in_the_shorter_side(
    width: int, height: int, resize: int, scale: int
) -> None:
    data = saved(np.zeros((height, width), np.uint8))
    assert jpeg.scale(read_header(data), resize) == scale
    assert reduced(data, resize).shape == (-(-height // scale), -(-width // scale), 3)
    assert np.array_equal(reduced(data, resize), drafted(data, scale))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_reduced_jpegs_are_turned_as_their_exif_says(orientation: int) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    data = saved(PHOTO, exif=exif)
    assert np.array_equal(reduced(data, 40), drafted(data, 2))
    assert np.array_equal(reduced(data, 40, apply_exif=False), reduced(saved(PHOTO), 40))


def test_all_other_images_are_decoded_in_full() -> None:
    files: list[bytes | Pixels] = [saved(PHOTO, form) for form in ("PNG", "WebP", "BMP", "TIFF", "GIF", "AVIF")]
    files += [PHOTO, saved(Image.fromarray(PHOTO).convert("CMYK")), saved(PHOTO[:39])]
    for file in files:
        assert np.array_equal(reduced(file, 20), in_full(file))


def test_without_a_views_resize_nothing_is_reduced_by_a_guess() -> None:
    with pytest.raises(ValueError, match="'featstore-decode-1-reduced' needs the resize of a view"):
        decode(saved(PHOTO), policy=REDUCED)


def lossless(width: int, height: int) -> bytes:
    """A JPEG of differences that are all 0: gray 128."""

    def segment(marker: int, *body: int) -> bytes:
        return bytes([0xFF, marker]) + (len(body) + 2).to_bytes(2, "big") + bytes(body)

    frame = segment(0xC3, 8, *divmod(height, 256), *divmod(width, 256), 3, *b"R\x11\0G\x11\0B\x11\0")
    table = segment(0xC4, 0, 1, *bytes(15), 0)
    scan = segment(0xDA, 3, *b"R\0G\0B\0", 1, 0, 0)
    return b"\xff\xd8" + frame + table + scan + bytes(3 * width * height // 8) + b"\xff\xd9"


def test_a_lossless_jpeg_is_never_reduced() -> None:
    """libjpeg would write it in full into the memory of a reduced one, which ends the process."""
    data = lossless(64, 48)
    assert jpeg.scale(read_header(data), 6) == 1
    assert np.array_equal(reduced(data, 6), np.full((48, 64, 3), 128))


def test_each_view_has_the_decoder_of_its_own_decode_and_the_image_the_first_doubt_of_any(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = saved(PHOTO)
    hurt = data[: len(data) // 2] + b"\x55" * 200 + data[len(data) // 2 + 200 :]
    (tmp_path / "hurt.jpg").write_bytes(hurt)
    view = View(size=32, resize=40)
    job = Job(0, content_digest(hurt), (view, replace(view, decode="reduced"), view.with_seed("flip", 0)))

    def sound_if_reduced(data: bytes, **rules: Any) -> Decoded:
        found = decode(data, **rules)
        return found._replace(doubt=None) if rules["policy"] == REDUCED else found

    monkeypatch.setattr(render_module, "decode", sound_if_reduced)
    (found,) = render(ImageSet.from_folder(tmp_path), [job], workers=0)
    assert found.decoders == (TORCHVISION, PILLOW, TORCHVISION)
    assert found.doubt == decode(hurt).doubt is not None


def test_a_damaged_jpeg_has_the_pixels_of_the_same_scale_and_a_doubt() -> None:
    data = saved(PHOTO)
    hurt = data[: len(data) // 2] + b"\x55" * 200 + data[len(data) // 2 + 200 :]
    shown = decode(hurt, policy=REDUCED, resize=40)
    assert shown.decoder == PILLOW
    assert shown.doubt is not None
    assert shown.doubt.startswith("libjpeg warns (Corrupt JPEG data: ")
    assert shown.doubt == decode(hurt).doubt
    assert np.array_equal(reduced(hurt, 40), drafted(hurt, 2))
    top = reduced(data, 40).shape[0] // 4
    assert np.array_equal(reduced(hurt, 40)[:top], reduced(data, 40)[:top])


def test_a_jpeg_that_no_decoder_reads_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    data = saved(PHOTO)
    table = data.index(b"\xff\xc4") + 5
    with pytest.raises(DecodeError, match="can't be decoded as JPEG"):
        reduced(data[:table] + b"\xff" * 16 + data[table + 16 :], 40)
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(FeatureStoreError, match="LOAD_TRUNCATED_IMAGES is set"):
        reduced(data[:table] + b"\xff" * 16 + data[table + 16 :], 40)


def test_each_view_is_made_of_the_decode_that_its_own_resize_asks_for() -> None:
    full = View(size=32, resize=40)
    half = View(size=32, resize=40, decode="reduced")
    quarter = half.resized(resize=33)
    views = (half, full, quarter, half.with_seed("random_resized_crop", 1), quarter.with_seed("side_on", 2))
    data = saved(PHOTO)

    class Images:
        ids = ("photo.jpg",)

        def read(self, index: int) -> bytes:
            return data

    digest = content_digest(data)
    (rendered,) = render(Images(), [Job(0, digest, views)], workers=0)
    assert rendered.views is not None
    for view, made in zip(views, rendered.views, strict=True):
        pixels = decode(data, policy=view.decode, resize=view.resize).pixels
        assert torch.equal(made, view.render(pixels, digest))
    assert not torch.equal(rendered.views[0], rendered.views[1])


def test_views_of_both_policies_are_told_apart() -> None:
    full, half = View(), View(decode="reduced")
    assert half == View(decode=REDUCED)
    assert (View(decode="full"), half.decode) == (full, REDUCED)
    assert View.from_facts(half.facts()) == half
    assert half.differences(full) == [("decode policy", "featstore-decode-1-reduced", "featstore-decode-1")]
    assert half.facts() == full.facts() | {"decode": "featstore-decode-1-reduced"}
    assert (half.evaluation.decode, half.pixels.decode, half.with_seed("flip", 0).decode) == (REDUCED,) * 3
