"""JPEGs that decoders read though their data is damaged: which are doubted, and that no sound one is."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from textwrap import dedent
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile
from sklearn.datasets import load_sample_images
from torchvision.io import decode_image

from featstore.images import jpeg
from featstore.images.decode import decode
from featstore.images.decoders import SIMPLEJPEG, TORCHCODEC, TORCHVISION
from featstore.images.headers import DecodeError


def saved(pixels: NDArray[np.uint8] | Image.Image, **options: Any) -> bytes:
    file = io.BytesIO()
    (Image.fromarray(pixels) if isinstance(pixels, np.ndarray) else pixels).save(file, "JPEG", **options)
    return file.getvalue()


def saved_photo(**options: Any) -> bytes:
    return saved(load_sample_images().images[0], **options)


def damaged(data: bytes, fill: bytes, *, tenth: int) -> bytes:
    """`data` with `fill` in place of some of its bytes, behind its head."""
    place = len(data) * tenth // 10
    return data[:place] + fill + data[place + len(fill) :]


RANDOM = np.random.default_rng(0).integers(0, 255, 600, dtype=np.uint8).tobytes()


@pytest.mark.parametrize(
    "options", [{"quality": 90}, {"optimize": True}, {"quality": 95, "subsampling": 0}, {"progressive": True}]
)
@pytest.mark.parametrize(
    "fill",
    [bytes(4096), bytes(200), b"\x55" * 600, RANDOM, RANDOM[:50], b"\xff\xd0"],
    ids=["4096 zeros", "200 zeros", "600 times 0x55", "600 random bytes", "50 random bytes", "a marker"],
)
def test_a_jpeg_with_damaged_data_is_doubted_in_the_words_of_its_decoder(options: dict[str, Any], fill: bytes) -> None:
    data = saved_photo(**options)
    whole = decode(data)
    assert (whole.doubt, whole.decoder) == (None, SIMPLEJPEG)
    found = []
    for tenth in range(2, 9):
        shown = decode(damaged(data, fill, tenth=tenth))
        assert not torch.equal(shown.pixels, whole.pixels)
        assert shown.doubt is None or re.match(r"libjpeg warns \(Corrupt JPEG data: |.* hole of zeros", shown.doubt)
        found.append(shown.doubt is not None)
    assert found.count(True) >= 5  # by chance, the data may be as long as it was
    assert all(found) or len(fill) < 4096 or "progressive" in options


@pytest.mark.filterwarnings("ignore:.*TorchCodec:DeprecationWarning")
def test_a_damaged_jpeg_has_the_pixels_that_torchvision_gives_it() -> None:
    data = damaged(saved_photo(), RANDOM, tenth=5)
    shown = decode(data)
    assert shown.decoder == TORCHVISION
    assert torch.equal(shown.pixels, decode_image(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode="RGB"))


def shown_by(data: bytes) -> tuple[Any, ...]:
    """What is shown of a JPEG, its decoder, and its doubt or why nothing is."""
    try:
        pixels, decoder, doubt = decode(data)
    except DecodeError as error:
        return None, None, str(error)
    return pixels.numpy().tobytes(), decoder, doubt


ODD_EXIF = [b"", b"Exif\0\0" + b"II*\0" + b"\xff" * 20, b"Exif\0\0MM", b"http://ns.adobe.com/xap/1.0/\0<x:xmpmeta/>"]


@pytest.mark.parametrize("options", [{}, {"subsampling": 1}, {"subsampling": 0}, {"progressive": True}, {"gray": True}])
def test_torchcodec_shows_of_damaged_jpegs_what_torchvision_does(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    photo = load_sample_images().images[1][:200, :301]
    image = Image.fromarray(photo).convert("L" if options.pop("gray", False) else "RGB")
    turned = Image.Exif()
    odd = [with_segment(saved(image, exif=turned, **options), each) for each in ODD_EXIF if each]
    for turned[0x0112] in (1, 6, 8):
        odd.append(saved(image, exif=turned, **options))
    files = [
        each
        for data in odd
        for tenth in (5, 8)
        for each in (
            *(
                damaged(data, fill, tenth=tenth)
                for fill in (RANDOM[:100], b"\xff\xd0", b"\xff\xda" * 2, b"\xff\xc4\0\4")
            ),
            data[: len(data) * tenth // 10] + b"\xff\xd9",
            data[: len(data) * tenth // 10],
        )
    ]
    by_torchvision = [shown_by(data) for data in files]
    monkeypatch.setattr(jpeg, "_torchvision_jpeg", lambda: None)
    by_torchcodec = [shown_by(data) for data in files]

    assert [(pixels, doubt) for pixels, _, doubt in by_torchcodec] == [
        (pixels, doubt) for pixels, _, doubt in by_torchvision
    ]
    read_by = Counter(zip([each[1] for each in by_torchvision], [each[1] for each in by_torchcodec], strict=True))
    assert read_by.keys() <= {(TORCHVISION, TORCHCODEC), (SIMPLEJPEG, SIMPLEJPEG), (None, None)}
    assert read_by[TORCHVISION, TORCHCODEC] > len(files) // 3


def with_segment(data: bytes, segment: bytes) -> bytes:
    return data[:2] + b"\xff\xe1" + (len(segment) + 2).to_bytes(2, "big") + segment + data[2:]


WITHOUT_ITS_DECODERS = """
    import sys
    from pathlib import Path
    from featstore.images.decode import decode
    from featstore.images.headers import MissingDecoderError

    data = Path(sys.argv[1]).read_bytes()
    sys.modules["torchcodec"] = None
    try:
        decode(data)
    except MissingDecoderError as error:
        print(error)
    del sys.modules["torchcodec"]
    print(decode(data).decoder)
"""


def test_with_a_torchvision_that_decodes_nothing_torchcodec_does_or_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "damaged.jpg").write_bytes(damaged(saved_photo(), RANDOM, tenth=5))
    (tmp_path / "torchvision" / "io").mkdir(parents=True)
    for folder in ("torchvision", "torchvision/io"):
        (tmp_path / folder / "__init__.py").touch()
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", dedent(WITHOUT_ITS_DECODERS), tmp_path / "damaged.jpg"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])},
        capture_output=True,
        text=True,
        check=True,
    )
    asked_for, decoder = done.stdout.splitlines()
    assert re.match(r"its data is damaged \(libjpeg: Corrupt JPEG data: .*\), and of the decoders that read", asked_for)
    assert "pip install 'featstore[torchcodec]'" in asked_for
    assert int(decoder) == TORCHCODEC


@pytest.mark.parametrize("options", [{}, {"optimize": True}, {"quality": 95, "subsampling": 0}])
def test_a_jpeg_without_its_last_rows_is_doubted(options: dict[str, Any]) -> None:
    data = saved_photo(**options)
    assert "premature end of data" in str(decode(data[: len(data) // 2] + b"\xff\xd9").doubt)


def test_restart_markers_that_are_lost_or_misplaced_are_doubted() -> None:
    data = saved_photo(restart_marker_rows=1)
    assert decode(data).doubt is None
    second, third = data.index(b"\xff\xd2"), data.index(b"\xff\xd3")
    for odd in (
        data[:second] + b"\xab\xab" + data[second + 2 :],
        data[:second] + data[third:],
        data[: third - 60] + b"\xff\xd6" + data[third - 58 :],
    ):
        assert "libjpeg warns" in str(decode(odd).doubt)


def test_a_progressive_jpeg_that_lacks_scans_or_has_a_hole_in_its_details_is_doubted() -> None:
    data = saved_photo(progressive=True)
    assert decode(data).doubt is None
    assert decode(data[: len(data) // 2] + b"\xff\xd9").doubt
    scans = [match.start() for match in re.finditer(rb"\xff\xda", data)]
    for cut in (scans[-1], scans[3]):
        assert "last scans are missing" in str(decode(data[:cut] + b"\xff\xd9").doubt)
    place = scans[1] + 200  # in the first of the scans of details
    assert decode(data[:place] + bytes(600) + data[place + 600 :]).doubt


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
        assert "premature end of data" in str(decode(early).doubt)


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
