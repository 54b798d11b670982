"""The pixel digest: the same by every decoder that gives the policy's pixels, another one by those that don't."""

from __future__ import annotations

import hashlib
import itertools
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFile, ImageOps
from support.decoders import Decoder, fast, flat, jpegs_by
from torchcodec import decoders as torchcodec
from torchvision.io import decode_image

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
import decoder_samples

from featstore import FactsDifferError
from featstore.images.decoders import PIXEL_DIGEST, PIXEL_DIGESTS, POLICY, REDUCED
from featstore.images.pixel_digest import SAMPLES, check_pixels, pixel_digest

FORMAT_PAGE = Path(__file__).parents[2] / "docs" / "format.md"

Pixels = NDArray[np.uint8]


def by_pillow(path: Path) -> Pixels:
    return np.array(ImageOps.exif_transpose(Image.open(path)).convert("RGB"))


def by_simplejpeg(path: Path) -> Pixels:
    if path.suffix == ".png":
        return by_pillow(path)
    pixels: Pixels = simplejpeg.decode_jpeg(path.read_bytes(), "RGB")
    return np.rot90(pixels, -1) if path.name == "turned.jpg" else pixels


def by_torchvision(path: Path) -> Pixels:
    file = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)
    return np.asarray(decode_image(file, mode="RGB", apply_exif_orientation=True).permute(1, 2, 0))


def by_torchcodec(path: Path) -> Pixels:
    return np.asarray(torchcodec.decode_image(path.read_bytes(), mode="RGB").permute(1, 2, 0))


def drafted(path: Path, scale: int) -> Pixels:
    image = Image.open(path)
    if scale > 1:
        image.draft("RGB", (image.width // scale, image.height // scale))
    return np.array(ImageOps.exif_transpose(image).convert("RGB"))


def digest_by(*decoders: Callable[[Path], Pixels]) -> str:
    """As the format page spells it."""

    def compact(value: Any) -> bytes:
        return json.dumps(value, separators=(",", ":")).encode()

    names = ("subsampled.jpg", "progressive.jpg", "turned.jpg", "transparent.png")
    digests = []
    for decode, name in itertools.product(decoders, names):
        planes = decode(SAMPLES[0].with_name(name)).transpose(2, 0, 1)
        head = compact(["torch.uint8", list(planes.shape)])
        digests.append(hashlib.sha256(head + planes.tobytes()).hexdigest())
    return hashlib.sha256(compact(digests)).hexdigest()


@pytest.mark.filterwarnings("ignore:.*TorchCodec:DeprecationWarning")
@pytest.mark.parametrize("decode", [by_pillow, by_simplejpeg, by_torchvision, by_torchcodec])
def test_decoders_of_all_libraries_give_the_pixels_of_the_policy(decode: Callable[[Path], Pixels]) -> None:
    assert digest_by(decode) == PIXEL_DIGEST
    assert pixel_digest() == PIXEL_DIGEST
    assert PIXEL_DIGEST in FORMAT_PAGE.read_text()


def test_pillow_gives_the_pixels_of_the_reduced_policy() -> None:
    digest = digest_by(*(partial(drafted, scale=scale) for scale in (1, 2, 4, 8)))
    assert digest == pixel_digest(REDUCED) == PIXEL_DIGESTS[REDUCED]
    assert digest in FORMAT_PAGE.read_text()


def test_reduced_pixels_that_others_gave_are_refused_by_the_name_of_their_policy() -> None:
    check_pixels([PIXEL_DIGESTS[REDUCED]], policy=REDUCED, what="set 7c41")
    with pytest.raises(FactsDifferError, match=f"they give the pixels of {REDUCED}"):
        check_pixels([PIXEL_DIGEST], policy=REDUCED, what="set 7c41")
    with jpegs_by(flat):
        assert pixel_digest(REDUCED) != PIXEL_DIGESTS[REDUCED]


@pytest.mark.parametrize("decoder", [fast, flat])
def test_a_decoder_that_rounds_otherwise_gives_another_digest_and_is_refused(decoder: Decoder) -> None:
    check_pixels([PIXEL_DIGEST], policy=POLICY, what="set 7c41")
    with jpegs_by(decoder):
        assert pixel_digest() != PIXEL_DIGEST
        check_pixels([pixel_digest()], policy=POLICY, what="set 7c41")
        check_pixels([], policy=POLICY, what="set 7c41")
        for stored in ({PIXEL_DIGEST}, {PIXEL_DIGEST, pixel_digest()}):
            with pytest.raises(FactsDifferError, match=f"images of set 7c41 were .* {PIXEL_DIGEST[:8]}"):
                check_pixels(stored, policy=POLICY, what="set 7c41")
    assert pixel_digest() == PIXEL_DIGEST


def test_the_digest_is_taken_where_pillow_is_told_to_take_truncated_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many programs tell it, whose images are all JPEGs."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with jpegs_by(simplejpeg.decode_jpeg):
        assert pixel_digest() == PIXEL_DIGEST


def test_the_samples_are_what_the_script_makes_of_its_pictures(tmp_path: Path) -> None:
    decoder_samples.main(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in SAMPLES}
    assert np.array_equal(by_pillow(SAMPLES[-1]), decoder_samples.picture(3))
