"""Files of every odd kind in one extraction: each has the row of what it shows, or is left out for its own reason."""

from __future__ import annotations

import io
import json
import os
import re
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from support.extracting import run
from support.tiny import pixels, staged

from featstore import FeatureStore, ImageError, ImageSet

MODEL = staged()


def photo(seed: int, mode: str = "RGB") -> Image.Image:
    return Image.fromarray(pixels(1, seed)[0]).convert(mode)


def saved(image: Image.Image, form: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def png_saying(width: int, height: int) -> bytes:
    """The whole of a PNG but for the pixels that its header promises."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def with_segment(jpeg: bytes, segment: bytes) -> bytes:
    return jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(segment) + 2) + segment + jpeg[2:]


def altered(data: bytes, place: int, fill: bytes) -> bytes:
    return data[:place] + fill + data[place + len(fill) :]


def many_scans(data: bytes) -> bytes:
    scan = data.index(b"\xff\xda")
    return data[:scan] + data[scan:-2] * 101 + b"\xff\xd9"


DIM = Image.fromarray(pixels(1, 40)[0, :, :, 0].astype(np.uint16) * 16)
MOVING: dict[str, Any] = {"save_all": True, "append_images": [photo(41, "P")]}
JPEG = saved(photo(42), "JPEG")

SHOWN: dict[str, bytes] = {
    "cat/cmyk.jpg": saved(photo(1, "CMYK"), "JPEG"),
    "cat/gray.jpg": saved(photo(2, "L"), "JPEG"),
    "cat/progressive.jpg": saved(photo(3), "JPEG", progressive=True),
    "cat/exif of nonsense.jpg": with_segment(saved(photo(4), "JPEG"), b"Exif\0\0II*\0" + b"\xff" * 40),
    "cat/exif that ends.jpg": with_segment(saved(photo(5), "JPEG"), b"Exif\0\0MM\0"),
    "cat/palette with alpha.png": saved(photo(6, "P"), "PNG", transparency=bytes(range(256))),
    "cat/gray with alpha.png": saved(photo(7, "L").convert("LA"), "PNG"),
    "cat/black and white.png": saved(photo(8, "1"), "PNG"),
    "cat/animated.gif": saved(photo(9, "P"), "GIF", **MOVING),
    "cat/a png.jpg": saved(photo(10), "PNG"),
    "cat/what follows.jpg": saved(photo(11), "JPEG") + b"\xff\xe1 and more",
    "cat/of one pixel.png": saved(photo(12).crop((0, 0, 1, 1)), "PNG"),
    "cat/a new\nline.png": saved(photo(13), "PNG"),
    "cat/no \udcff text.png": saved(photo(14), "PNG"),
    "cat/folder.jpg/in it.png": saved(photo(15), "PNG"),
}
"""Sound, if unusual: Pillow shows what there is to see."""

DOUBTED: dict[str, tuple[bytes, str]] = {
    "cat/16 bits.png": (saved(DIM, "PNG"), r"its 16-bit values reach 4,080 of 65,535, as if they had 12 bits"),
    "cat/damaged.jpg": (altered(JPEG, len(JPEG) * 2 // 3, b"\xff\xd0"), r"libjpeg warns \(Corrupt JPEG data: "),
    "cat/ended early.jpg": (
        JPEG[: len(JPEG) * 3 // 4] + b"\xff\xd9",
        r"libjpeg warns \(Corrupt JPEG data: premature end",
    ),
}

REFUSED: dict[str, tuple[bytes, str]] = {
    "cat/truncated.jpg": (JPEG[:-200], "a truncated JPEG: its end marker is missing"),
    "cat/empty.jpg": (b"", "the file is empty"),
    "cat/text.jpg": (b"no image at all", "starts with b'no image at all': not an image that can be read"),
    "cat/a page.png": (b"<html><body>404</body></html>", "starts with .* not an image that can be read"),
    "cat/a video.jpg": (b"\0\0\0\x14ftypisom\0\0\2\0mp41", "may be a video"),
    "cat/huge.png": (png_saying(50000, 60000), "its header says 50000 x 60000 pixels; at most .* decompression bomb"),
    "cat/nothing in it.png": (png_saying(24, 24), "can't be decoded as PNG: "),
    "cat/checksum.png": (altered(saved(photo(16), "PNG"), 60, b"\1\2\3"), "a damaged PNG: wrong checksum of its chunk"),
    "cat/truncated.png": (saved(photo(17), "PNG")[:-30], "a truncated PNG: its end chunk is missing"),
    "cat/truncated.gif": (saved(photo(18, "P"), "GIF")[:400], "can't be decoded as GIF: "),
    "cat/truncated.webp": (saved(photo(19), "WebP")[:200], "can't be decoded as WebP: "),
    "cat/scans.jpg": (many_scans(saved(photo(20), "JPEG")), "a JPEG of 101 scans; at most 100 are decoded"),
    "cat/12 bits.jpg": (
        altered(JPEG, JPEG.index(b"\xff\xc0") + 4, b"\x0c"),
        "a JPEG of 3 components with 12 bits each",
    ),
    "cat/floats.tiff": (
        saved(photo(21, "F"), "TIFF"),
        "a TIFF with pixels of Pillow's mode 'F', which has no fixed range",
    ),
    "cat/no\nimage.jpg": (b"nor is this", "starts with b'nor is this'"),
}

NOT_READ: dict[str, tuple[str, str]] = {
    "cat/broken link.jpg": ("nowhere", "there is no such file in "),
    "cat/loop.jpg": ("loop.jpg", r"the file can't be read \(Too many levels of symbolic links\)"),
    "cat/sick.jpg": ("/proc/self/mem", r"the file can't be read \(Input/output error\)"),
    "cat/device.jpg": ("/dev/zero", r"the file can't be read \(it is not a file\)"),
}
"""Links, and why what they lead to can't be read: no fault of the image, which the next run tries again."""

LEFT_OUT = {name: reason for some in (REFUSED, NOT_READ) for name, (_, reason) in some.items()}


def make(folder: Path, *names: str) -> ImageSet:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name in NOT_READ:
            path.symlink_to(NOT_READ[name][0])
        else:
            path.write_bytes(SHOWN[name] if name in SHOWN else (DOUBTED | REFUSED)[name][0])
    return ImageSet.from_folder(folder)


def seen(name: str) -> NDArray[np.uint8]:
    """The pixels that Pillow shows."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about EXIF, and the palette's alpha
        return np.array(Image.open(io.BytesIO(SHOWN[name])).convert("RGB"))


@pytest.mark.parametrize("workers", [0, 2])
def test_files_of_every_kind_have_the_row_of_what_they_show_or_are_left_out_for_their_own_reason(
    store: FeatureStore, tmp_path: Path, workers: int
) -> None:
    images = make(tmp_path / "files", *SHOWN, *DOUBTED, *LEFT_OUT)
    os.mkfifo(tmp_path / "files/cat/pipe.jpg")  # which nobody lists, or waits for
    assert {*images.ids} == {*SHOWN, *DOUBTED, *LEFT_OUT}
    for again in (False, True):
        report = run(images, store, model=MODEL, on_error="skip", workers=workers)
        num_rows = len(SHOWN) + len(DOUBTED)
        assert (report.computed, report.reused) == ((0, num_rows) if again else (num_rows, 0))
        assert report.failed + report.missing == len(LEFT_OUT)
        assert {name for name, _ in report.failures} == {*LEFT_OUT}
        for name, reason in report.failures:
            assert re.match(LEFT_OUT[name], reason), (name, reason)
    listed = [json.loads(line) for line in (store.root / "failures/files.jsonl").read_text().splitlines()]
    assert {each["id"]: each["lasting"] for each in listed} == {name: name in REFUSED for name in LEFT_OUT}
    assert {*store.set(report.keys[0]).failed.values()} == {reason for n, reason in report.failures if n in REFUSED}
    features = store.features(images, report.keys[0], on_error="skip")
    assert {*features.ids} == {*SHOWN, *DOUBTED}
    (tmp_path / "plain").mkdir()
    for number, name in enumerate(SHOWN):
        Image.fromarray(seen(name)).save(tmp_path / f"plain/{number:02}.png")
    plain = ImageSet.from_folder(tmp_path / "plain")
    (key,) = run(plain, store, model=MODEL).keys
    expected = dict(zip(SHOWN, store.features(plain, key)[:], strict=True))
    for name, row in zip(features.ids, features[:], strict=True):
        assert name in DOUBTED or torch.equal(row, expected[name]), name


def test_what_may_not_show_what_was_photographed_is_named_once_it_is_decoded(
    store: FeatureStore, tmp_path: Path
) -> None:
    images = make(tmp_path / "files", *SHOWN, *DOUBTED)
    doubts = dict(run(images, store, model=MODEL).doubts)
    assert doubts.keys() == DOUBTED.keys()
    assert all(re.match(DOUBTED[name][1], doubt) for name, doubt in doubts.items()), doubts


@pytest.mark.parametrize("name", LEFT_OUT)
def test_one_of_them_stops_the_job_by_its_name_where_none_is_to_be_left_out(
    store: FeatureStore, tmp_path: Path, name: str
) -> None:
    images = make(tmp_path / "files", "cat/gray.jpg", name)
    with pytest.raises(ImageError) as stopped:
        run(images, store, model=MODEL)
    assert stopped.value.image == name
    assert re.match(LEFT_OUT[name], stopped.value.reason)
