"""Warps: affine maps against SciPy's, NumPy's and fastai's numbers."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import ndimage  # type: ignore[import-untyped]
from sklearn.datasets import load_sample_images

from featstore.images.warps import Affine, Border, stretched, turned, warped

PHOTO = np.ascontiguousarray(load_sample_images().images[1].transpose(2, 0, 1))  # (3, 427, 640)
MAPS = {
    "turned": turned(10).about(170, 127.5).after(Affine(c=58, f=16)),
    "turned far out": turned(37).about(170, 127.5).after(Affine(c=500, f=250)),
    "zoomed": stretched(1.7, 1.7).about(320, 213),
    "sheared": Affine(b=0.99, d=-0.2, c=-40),
    "shifted": Affine(c=-20, f=300),
    "upside down": turned(180).about(60, 50),
}


@pytest.mark.parametrize("border", ["mirror", "black"])
@pytest.mark.parametrize("where", MAPS.values(), ids=MAPS)
def test_pixels_are_those_of_scipys_bilinear_map(where: Affine, border: Border) -> None:
    down, right = np.mgrid[:200, :224].astype(float)
    places = [where.d * right + where.e * down + where.f, where.a * right + where.b * down + where.c]
    mode = {"mirror": "reflect", "black": "grid-constant"}[border]
    expected = np.stack([ndimage.map_coordinates(plane.astype(float), places, order=1, mode=mode) for plane in PHOTO])

    difference = np.abs(warped(PHOTO, where, 200, 224, border) - expected)

    # Rounded after each direction, and weights have 8 bits: by a pixel's neighbours half a level, at most one, each.
    assert difference.max() < 2
    assert difference.mean() < 0.35


@pytest.mark.parametrize("where", [Affine(), Affine(c=12, f=7), turned(360).about(3, 4)])
def test_whole_pixels_stay_what_they_are(where: Affine) -> None:
    left, top = round(where.c), round(where.f)
    if where.a == 1 and where.b != 0:  # a whole turn
        left = top = 0
    assert np.array_equal(warped(PHOTO, where, 100, 90), PHOTO[:, top : top + 100, left : left + 90])


@pytest.mark.parametrize("quarters", range(4))
def test_quarter_turns_are_numpys(quarters: int) -> None:
    square = PHOTO[:, :99, :99]
    where = turned(90 * quarters).about(49, 49)
    assert np.array_equal(warped(square, where, 99, 99), np.rot90(square, quarters, axes=(1, 2)))


def test_the_mirror_image_goes_on_for_ever_and_repeats_the_edge() -> None:
    image = PHOTO[:, :5, :7]
    expected = np.pad(image, [(0, 0), (23, 23), (40, 40)], mode="symmetric")
    assert np.array_equal(warped(image, Affine(c=-40, f=-23), 5 + 46, 7 + 80), expected)


def test_one_pixel_can_be_warped() -> None:
    assert np.array_equal(warped(PHOTO[:, :1, :1], turned(33), 3, 3), np.broadcast_to(PHOTO[:, :1, :1], (3, 3, 3)))


def test_an_image_of_any_strides_gives_the_same() -> None:
    rows = np.ascontiguousarray(PHOTO.transpose(1, 2, 0)).transpose(2, 0, 1)
    assert rows.strides != PHOTO.strides
    where = MAPS["turned"]
    assert np.array_equal(warped(rows, where, 50, 60), warped(PHOTO, where, 50, 60))


# --- fastai 0.7's own tests; an image of one channel is one of three equal ones ---


def three(plane: NDArray[np.float64]) -> NDArray[np.uint8]:
    return np.stack([np.floor(255 * plane + 0.5).astype(np.uint8)] * 3)


@pytest.mark.parametrize(("degrees", "row"), [(90, [[0, 0, 0], [0.1, 0.2, 0.3], [0, 0, 0]]), (180, None)])
def test_fastais_rotations(degrees: float, row: list[list[float]] | None) -> None:
    column = np.array([[0, 0.1, 0], [0, 0.2, 0], [0, 0.3, 0]])
    expected = np.array(row) if row is not None else np.rot90(column, 2)
    assert np.array_equal(warped(three(column), turned(degrees).about(1, 1), 3, 3), three(expected))


def test_fastais_zoom_of_a_pulse() -> None:
    # OpenCV zooms about half a pixel beyond the middle, and takes both positions to a 32nd of a pixel: 255 / 64
    # levels each.
    pulse = np.zeros((5, 5))
    pulse[2, 2] = 1
    expected = np.zeros((5, 5))
    expected[1:4, 1:4] = [[0.01562, 0.12109, 0.00391], [0.12109, 0.93848, 0.03027], [0.00391, 0.03027, 0.00098]]
    found = warped(three(pulse), stretched(1.1, 1.1).about(2.5, 2.5), 5, 5)
    assert np.abs(found.astype(float) - 255 * expected).max() <= 2 * 255 / 64
    assert np.array_equal(warped(three(pulse), stretched(1, 1).about(2.5, 2.5), 5, 5), three(pulse))
