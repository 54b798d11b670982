"""Levels and filters: Pillow's operations bit for bit, fastai's by its numbers, blur by SciPy's and torchvision's."""

from __future__ import annotations

import colorsys
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as v2
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageOps
from scipy import ndimage  # type: ignore[import-untyped]
from sklearn.datasets import load_sample_images

from featstore.images import filters, levels
from featstore.images.draws import Box

Square = NDArray[np.uint8]
PHOTO = np.ascontiguousarray(load_sample_images().images[0][100:260, 200:360].transpose(2, 0, 1))
DARK, FLAT = PHOTO // 4 + 20, np.full_like(PHOTO, 77)
NOISE = np.random.default_rng(0).integers(0, 256, (3, 31, 31), dtype=np.uint8)
SQUARES = {"photo": PHOTO, "dark": DARK, "flat": FLAT, "noise": NOISE, "one pixel": NOISE[:, :1, :1]}
each_square = pytest.mark.parametrize("square", SQUARES.values(), ids=SQUARES)


def by_pillow(square: Square, change: Callable[[Image.Image], Image.Image]) -> Square:
    image = Image.fromarray(np.ascontiguousarray(square.transpose(1, 2, 0)))
    return np.asarray(change(image)).transpose(2, 0, 1)


@each_square
@pytest.mark.parametrize("factor", [0.0, 0.01, 0.37, 1.0, 1.4, 1.99, 5.5])
@pytest.mark.parametrize(
    ("ours", "pillows"),
    [
        (levels.brightened, ImageEnhance.Brightness),
        (levels.contrasted, ImageEnhance.Contrast),
        (filters.saturated, ImageEnhance.Color),
        (filters.sharpened, ImageEnhance.Sharpness),
    ],
)
def test_enhancements_are_pillows_bit_for_bit(
    square: Square, factor: float, ours: Callable[..., Square], pillows: type[ImageEnhance.Brightness]
) -> None:
    before = square.copy()
    assert np.array_equal(ours(square, factor), by_pillow(square, lambda image: pillows(image).enhance(factor)))
    assert np.array_equal(square, before)


@each_square
def test_automatic_levels_are_pillows_bit_for_bit(square: Square) -> None:
    assert np.array_equal(levels.stretched_to_full(square), by_pillow(square, ImageOps.autocontrast))
    assert np.array_equal(levels.equalised(square), by_pillow(square, ImageOps.equalize))


@each_square
def test_posterised_and_solarised_are_pillows_and_torchvisions_bit_for_bit(square: Square) -> None:
    tensor = torch.from_numpy(square.copy())
    for bits in range(1, 9):
        posterised = levels.posterised(square, bits)
        assert np.array_equal(posterised, by_pillow(square, partial(ImageOps.posterize, bits=bits)))
        assert np.array_equal(posterised, v2.posterize(tensor, bits).numpy())
    for threshold in (0, 8.5, 119, 127.5, 255):
        solarised = levels.solarised(square, threshold)
        by_theirs: Any = partial(ImageOps.solarize, threshold=threshold)  # type: ignore[arg-type]
        assert np.array_equal(solarised, by_pillow(square, by_theirs))
        assert np.array_equal(solarised, v2.solarize(tensor, threshold).numpy())


@each_square
@pytest.mark.parametrize("turn", [-0.5, -0.1, 0.0, 0.07, 1 / 3, 0.5])
def test_hues_are_turned_as_colorsys_has_it(square: Square, turn: float) -> None:
    pixels = square.reshape(3, -1)[:, :400].T / 255
    expected = []
    for pixel in pixels:
        hue, saturation, value = colorsys.rgb_to_hsv(*pixel)
        expected.append(colorsys.hsv_to_rgb((hue + turn) % 1, saturation, value))

    found = filters.hue_turned(square, turn).reshape(3, -1)[:, :400].T

    assert np.abs(found - 255 * np.array(expected)).max() < 0.51  # half a level, and float32


def test_a_hue_that_isnt_turned_stays_bit_for_bit() -> None:
    assert np.array_equal(filters.hue_turned(PHOTO, 0.0), PHOTO)
    assert np.array_equal(filters.hue_turned(PHOTO, 1 / 3), PHOTO[[2, 0, 1]])  # red becomes green


@each_square
@pytest.mark.parametrize("strength", [1, 2, 3, 5, 9])
def test_blur_is_a_gaussian_by_scipy_and_torchvision(square: Square, strength: int) -> None:
    size = 2 * strength - 1
    deviation = 0.3 * ((size - 1) * 0.5 - 1) + 0.8  # OpenCV's for a kernel of this size
    away = np.arange(size) - size // 2
    kernel = np.exp(-(away**2) / (2 * deviation**2))
    kernel /= kernel.sum()
    expected = square.astype(float)
    for axis in (1, 2):
        expected = ndimage.correlate1d(expected, kernel, axis=axis, mode="mirror")

    blurred = filters.blurred(square, strength)

    assert np.abs(blurred - expected).max() < 0.52  # rounded once, and weights of 14 bits
    if square.shape[1] > size // 2:
        theirs = v2.gaussian_blur(torch.from_numpy(square.copy()), [size, size], [deviation, deviation]).numpy()
        assert np.abs(blurred.astype(int) - theirs).max() <= 1
        assert (blurred != theirs).mean() < 0.02


# --- fastai's ---


def test_lighting_of_nothing_is_nothing_and_brightness_is_added_and_clipped() -> None:
    assert np.array_equal(levels.lit(PHOTO, 0, 1), PHOTO)
    assert np.array_equal(levels.lit(PHOTO, 0.5, 1), (PHOTO.astype(int) + 128).clip(0, 255))  # 127.5 levels


@each_square
@pytest.mark.parametrize(("brightness", "contrast"), [(0.05, 1.05), (-0.05, 1 / 1.05), (0.3, 2.0), (-0.9, 0.4)])
def test_lighting_is_fastais_formula(square: Square, brightness: float, contrast: float) -> None:
    values = square / 255
    expected = np.clip((values - values.mean()) * contrast + values.mean() + brightness, 0, 1) * 255
    assert np.abs(levels.lit(square, brightness, contrast) - expected).max() < 0.5 + 1e-9


@pytest.mark.parametrize("position", range(8))
def test_the_eight_positions_are_fastais(position: int) -> None:
    expected = np.rot90(NOISE, position % 4, axes=(1, 2))
    found = filters.quarter_turned(NOISE, position % 4)
    if position >= 4:
        expected, found = expected[:, :, ::-1], filters.mirrored(found)
    assert np.array_equal(found, expected)


def test_holes_are_black_and_the_rest_stays() -> None:
    before = PHOTO.copy()
    found = filters.holed(PHOTO, [Box(0, 150, 20, 10), Box(40, 0, 1, 1), Box(5, 155, 40, 3)])
    expected = before.copy()
    expected[:, :20, 150:] = expected[:, 40, 0][:, None, None] * 0
    expected[:, 40, 0] = 0
    expected[:, 5:45, 155:158] = 0
    assert np.array_equal(found, expected)
    assert np.array_equal(PHOTO, before)
