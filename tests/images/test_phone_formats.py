"""What phones write: HEIC, AVIF, and JPEGs of several pictures."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import numpy as np
import pillow_heif
import pytest
from PIL import Image, ImageOps
from support.tiny import jpeg, photos, pixels, staged

from featstore import FeatureStore, ImageError, ImageSet, extract
from featstore.files.part import Part
from featstore.images.decode import decode
from featstore.images.decoders import PILLOW, PILLOW_HEIF, SIMPLEJPEG
from featstore.images.headers import DecodeError

ORIENTATION = 0x0112
PIXELS = pixels(1, size=64)[0][:, :48]  # (64, 48, 3)


def heic(orientation: int = 1) -> bytes:
    """Without any loss, so that its pixels are known."""
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    file = io.BytesIO()
    image = pillow_heif.from_pillow(Image.fromarray(PIXELS))
    image.save(file, quality=-1, chroma=444, matrix_coefficients=0, exif=exif.tobytes())
    return file.getvalue()


def avif(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    file = io.BytesIO()
    Image.fromarray(PIXELS).save(file, "AVIF", exif=exif.tobytes())
    return file.getvalue()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_heic_is_turned_once_as_its_camera_was_held(orientation: int) -> None:
    lying = Image.fromarray(PIXELS)
    lying.getexif()[ORIENTATION] = orientation
    expected = np.asarray(ImageOps.exif_transpose(lying))

    for apply_exif in (True, False):  # its container turns it, whatever EXIF says
        found = decode(heic(orientation), apply_exif=apply_exif)
        np.testing.assert_array_equal(found.pixels.permute(1, 2, 0).numpy(), expected)
        assert found.decoder == PILLOW_HEIF


def test_a_heic_without_exif_is_read() -> None:
    file = io.BytesIO()
    pillow_heif.from_pillow(Image.new("RGB", (8, 8), (128, 128, 128))).save(file, quality=-1)
    found = decode(file.getvalue())
    assert found.decoder == PILLOW_HEIF
    assert set(found.pixels.flatten().tolist()) == {128}


def test_an_avif_is_read_by_pillow_and_turned_as_any_other() -> None:
    plain, turned = avif(1), avif(6)
    found = decode(plain)

    with Image.open(io.BytesIO(plain)) as reference:
        expected = np.asarray(reference)
    np.testing.assert_array_equal(found.pixels.permute(1, 2, 0).numpy(), expected)
    assert found.decoder == PILLOW
    np.testing.assert_array_equal(decode(turned).pixels.permute(1, 2, 0).numpy(), np.rot90(expected, -1))
    np.testing.assert_array_equal(decode(turned, apply_exif=False).pixels.permute(1, 2, 0).numpy(), expected)


def test_of_a_jpeg_of_several_pictures_the_first_is_read() -> None:
    first, second = (Image.open(io.BytesIO(jpeg(seed))) for seed in (0, 1))
    file = io.BytesIO()
    first.save(file, "MPO", save_all=True, append_images=[second], quality=95)
    with Image.open(io.BytesIO(file.getvalue())) as several:
        assert (several.format, getattr(several, "n_frames", 1)) == ("MPO", 2)
        expected = np.asarray(several.convert("RGB"))

    found = decode(file.getvalue())

    np.testing.assert_array_equal(found.pixels.permute(1, 2, 0).numpy(), expected)
    assert (found.decoder, found.doubt) == (SIMPLEJPEG, None)


@pytest.mark.parametrize("share", [0.05, 0.5, 0.99])
def test_a_truncated_heic_is_refused(share: float) -> None:
    data = heic()
    with pytest.raises(DecodeError, match="can't be decoded as HEIC"):
        decode(data[: int(share * len(data))])


def test_a_heic_in_a_folder_is_extracted_and_its_row_says_by_what(tmp_path: Path) -> None:
    folder = photos(tmp_path / "photos", 2)
    (folder / "cat" / "IMG_1.HEIC").write_bytes(heic())
    store = FeatureStore(tmp_path / "features")

    report = extract(staged(), ImageSet.from_folder(folder), store, cuts=["layer2:avg"], workers=0)

    assert (report.computed, len(report.failures)) == (3, 0)
    (path,) = (tmp_path / "features").rglob("part-*.h5")
    assert sorted(Part.open(path).decoders.tolist()) == [PILLOW, SIMPLEJPEG, PILLOW_HEIF]


def test_without_its_library_a_heic_is_named_with_what_to_install_and_not_filed_as_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = photos(tmp_path / "photos", 2)
    (folder / "cat" / "1.heif").write_bytes(heic())
    images, store = ImageSet.from_folder(folder), FeatureStore(tmp_path / "features")

    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "pillow_heif", None)
        with pytest.raises(ImageError, match=r"cat/1\.heif: it is HEIC, .* pip install 'featstore\[heic\]'"):
            extract(staged(), images, store, cuts=["layer2:avg"], workers=0)
        skipped = extract(staged(), images, store, cuts=["layer2:avg"], workers=0, on_error="skip")
    assert [name for name, _ in skipped.failures] == ["cat/1.heif"]
    assert extract(staged(), images, store, cuts=["layer2:avg"], workers=0).computed == 1
