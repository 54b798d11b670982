"""Decoding: which decoder reads what, equal to references; and what is refused, with its reason."""

from __future__ import annotations

import io
import re
import struct
import time
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from numpy.typing import NDArray
from PIL import Image, ImageFile, ImageOps
from sklearn.datasets import load_sample_images
from support.processes import Processes

from featstore import FeatureStoreError
from featstore.images import decode as decode_module
from featstore.images.decode import Budget, decode
from featstore.images.decoders import ARRAY, DECODERS, MAX_PIXELS, PILLOW, POLICY, SIMPLEJPEG
from featstore.images.headers import DecodeError

Pixels = NDArray[np.uint8]
PHOTO: Pixels = np.ascontiguousarray(load_sample_images().images[0][60:180:2, 200:360:2])  # (60, 80, 3)
ORIENTATION = 0x0112


def encoded(image: Image.Image | NDArray[Any], form: str, **options: Any) -> bytes:
    file = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(file, form, **options)
    return file.getvalue()


def pixels_of(data: bytes | Pixels, **options: Any) -> Pixels:
    return np.ascontiguousarray(decode(data, **options)[0].permute(1, 2, 0).numpy())


def photo(mode: str) -> Image.Image:
    image = Image.fromarray(PHOTO)
    return image.convert("L").convert("LA") if mode == "LA" else image.convert(mode)


def png(width: int, height: int, bits: int, colour_type: int, rows: bytes) -> bytes:
    """A PNG of given raw rows, each with its filter byte: Pillow can't write all kinds."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("mode", "form", "decoder"),
    [
        ("L", "PNG", PILLOW),
        ("LA", "PNG", PILLOW),
        ("RGB", "PNG", PILLOW),
        ("RGBA", "PNG", PILLOW),
        ("P", "PNG", PILLOW),
        ("1", "PNG", PILLOW),
        ("P", "GIF", PILLOW),
        ("L", "GIF", PILLOW),
        ("RGB", "WebP", PILLOW),
        ("RGBA", "WebP", PILLOW),
        ("1", "TIFF", PILLOW),
        ("L", "TIFF", PILLOW),
        ("P", "TIFF", PILLOW),
        ("RGB", "TIFF", PILLOW),
        ("RGBA", "TIFF", PILLOW),
        ("CMYK", "TIFF", PILLOW),
        ("L", "BMP", PILLOW),
        ("P", "BMP", PILLOW),
        ("RGB", "BMP", PILLOW),
        ("CMYK", "JPEG", PILLOW),
    ],
)
def test_pixels_equal_pillows(mode: str, form: str, decoder: int) -> None:
    data = encoded(photo(mode), form)

    image, code, _ = decode(data)

    assert (image.dtype, image.shape, code) == (torch.uint8, (3, 60, 80), decoder)
    np.testing.assert_array_equal(pixels_of(data), np.array(Image.open(io.BytesIO(data)).convert("RGB")))


@pytest.mark.filterwarnings("ignore:.*TorchCodec:DeprecationWarning")
@pytest.mark.parametrize(
    ("mode", "options"),
    [("RGB", {}), ("L", {}), ("YCbCr", {"progressive": True}), ("RGB", {"subsampling": 0, "quality": 97})],
)
def test_jpeg_equals_torchvision(mode: str, options: dict[str, Any]) -> None:
    data = encoded(photo(mode), "JPEG", **options)
    buffer = torch.frombuffer(bytearray(data), dtype=torch.uint8)

    image, code, _ = decode(data)

    assert (code, DECODERS[code]) == (SIMPLEJPEG, "simplejpeg")
    assert torch.equal(image, torchvision.io.decode_image(buffer, mode="RGB"))


@pytest.mark.filterwarnings("ignore:.*TorchCodec:DeprecationWarning")
@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "P"])
def test_png_equals_torchvision(mode: str) -> None:
    data = encoded(photo(mode), "PNG")
    buffer = torch.frombuffer(bytearray(data), dtype=torch.uint8)

    assert torch.equal(decode(data)[0], torchvision.io.decode_image(buffer, mode="RGB"))


def test_alpha_is_dropped_not_blended() -> None:
    transparent = np.dstack([PHOTO, np.zeros(PHOTO.shape[:2], np.uint8)])

    for form, options in (("PNG", {}), ("TIFF", {}), ("WebP", {"lossless": True, "exact": True})):
        np.testing.assert_array_equal(pixels_of(encoded(transparent, form, **options)), PHOTO)


def test_a_palette_with_transparent_entries_keeps_its_colours() -> None:
    image = photo("P")
    expected = np.array(image.convert("RGB"))

    data = encoded(image, "PNG", transparency=bytes(range(256)))  # Pillow's own conversion warns about these

    np.testing.assert_array_equal(pixels_of(data), expected)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_16_bit_png_loses_its_low_byte(channels: int) -> None:
    values = np.random.default_rng(0).integers(0, 65536, (20, 30, channels), dtype=np.uint16)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    data = png(30, 20, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], rows)

    colour = values[..., :3] if channels >= 3 else values[..., :1].repeat(3, axis=2)

    assert decode(data)[1] == PILLOW
    np.testing.assert_array_equal(pixels_of(data), colour >> 8)


@pytest.mark.parametrize("order", ["<u2", ">u2"])
def test_16_bit_tiff_loses_its_low_byte(order: str) -> None:
    values = np.arange(600, dtype=np.uint16).reshape(20, 30) * 109

    data = encoded(Image.frombytes("I;16" if order == "<u2" else "I;16B", (30, 20), values.astype(order)), "TIFF")

    np.testing.assert_array_equal(pixels_of(data), np.repeat((values >> 8)[..., None], 3, 2))


def test_2_bit_gray_spans_black_to_white() -> None:
    data = png(4, 1, 2, 0, b"\0\x1b")

    np.testing.assert_array_equal(pixels_of(data)[0, :, 0], [0, 85, 170, 255])


def test_only_the_first_frame_of_an_animation_counts() -> None:
    other = Image.fromarray(255 - PHOTO)
    for form in ("GIF", "TIFF"):
        first = photo("P") if form == "GIF" else photo("RGB")
        data = encoded(first, form, save_all=True, append_images=[other])

        np.testing.assert_array_equal(pixels_of(data), np.array(first.convert("RGB")))


@pytest.mark.parametrize("shape", [(60, 80), (60, 80, 3), (1, 1, 3)])
def test_arrays_become_images_of_their_own_memory(shape: tuple[int, ...]) -> None:
    array = np.resize(PHOTO, shape)
    before = array.copy()

    image, code, _ = decode(array)
    image.zero_()

    assert (code, tuple(image.shape)) == (ARRAY, (3, *shape[:2]))
    np.testing.assert_array_equal(array, before)
    colour = before if before.ndim == 3 else before[..., None].repeat(3, axis=2)
    np.testing.assert_array_equal(pixels_of(array), colour)


@pytest.mark.parametrize("shape", [(5,), (5, 5, 4), (0, 5), (2, 5, 5, 3)])
def test_arrays_that_are_no_images_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(DecodeError, match="expected uint8"):
        decode(np.zeros(shape, np.uint8))


# --- EXIF ---


def with_orientation(image: Image.Image, form: str, orientation: int, **options: Any) -> bytes:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return encoded(image, form, exif=exif, **options)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(
    ("mode", "form"),
    [("RGB", "JPEG"), ("CMYK", "JPEG"), ("RGB", "PNG"), ("P", "PNG"), ("RGB", "WebP"), ("RGB", "TIFF"), ("P", "TIFF")],
)
def test_exif_turns_the_image_in_every_format_as_pillow_would(mode: str, form: str, orientation: int) -> None:
    data = with_orientation(photo(mode), form, orientation)
    as_it_lies = pixels_of(data, apply_exif=False)
    reference = Image.fromarray(as_it_lies)
    reference.getexif()[ORIENTATION] = orientation

    assert as_it_lies.shape == (60, 80, 3)
    np.testing.assert_array_equal(pixels_of(data), np.array(ImageOps.exif_transpose(reference)))


@pytest.mark.filterwarnings("ignore:.*TorchCodec:DeprecationWarning")
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turns_a_jpeg_as_torchvision_would(orientation: int) -> None:
    data = with_orientation(photo("RGB"), "JPEG", orientation)
    buffer = torch.frombuffer(bytearray(data), dtype=torch.uint8)

    expected = torchvision.io.decode_image(buffer, mode="RGB", apply_exif_orientation=True)

    assert torch.equal(decode(data)[0], expected)


def exif_block(order: str, entries: list[tuple[int, int, int]], offset: int = 8) -> bytes:
    head = (b"II" if order == "<" else b"MM") + struct.pack(order + "HI", 42, offset) + b"\0" * (offset - 8)
    body = struct.pack(order + "H", len(entries))
    for tag, kind, value in entries:
        body += struct.pack(order + "HHI" + ("I" if kind == 4 else "HH"), tag, kind, 1, value, *[0] * (kind != 4))
    return head + body


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("kind", [3, 4])
@pytest.mark.parametrize("offset", [8, 30])
def test_exif_is_read_in_both_byte_orders(order: str, kind: int, offset: int) -> None:
    block = exif_block(order, [(0x010F, 3, 7), (ORIENTATION, kind, 6)], offset)

    turned = pixels_of(encoded(photo("RGB"), "PNG", exif=block))

    np.testing.assert_array_equal(turned, np.rot90(PHOTO, -1))


def with_segment(jpeg: bytes, segment: bytes) -> bytes:
    return jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(segment) + 2) + segment + jpeg[2:]


def test_the_first_exif_of_several_counts() -> None:
    plain = encoded(photo("RGB"), "JPEG")
    turned = with_segment(plain, b"Exif\0\0" + exif_block(">", [(ORIENTATION, 3, 6)]))

    data = with_segment(turned, b"Exif\0\0" + exif_block(">", [(ORIENTATION, 3, 3)]))

    np.testing.assert_array_equal(pixels_of(data), np.rot90(pixels_of(plain), 2))


@pytest.mark.parametrize(
    "block",
    [b"", b"II", b"XX*\0garbage", exif_block("<", [(ORIENTATION, 3, 9)]), exif_block("<", [(ORIENTATION, 3, 6)])[:-9],
     b"II*\0" + b"\xff" * 40],
)  # fmt: skip
def test_exif_that_makes_no_sense_turns_nothing(block: bytes) -> None:
    plain = encoded(photo("RGB"), "JPEG")
    data = with_segment(plain, b"Exif\0\0" + block)

    np.testing.assert_array_equal(pixels_of(data), pixels_of(plain))


# --- what is refused ---


@pytest.mark.parametrize(
    ("mode", "form", "options"),
    [
        ("RGB", "JPEG", {}),
        ("RGB", "JPEG", {"progressive": True}),
        ("CMYK", "JPEG", {}),
        ("RGB", "PNG", {}),
        ("P", "PNG", {}),
        ("P", "GIF", {}),
        ("RGB", "WebP", {}),
        ("RGB", "TIFF", {}),
        ("RGB", "BMP", {}),
    ],
)
def test_a_truncated_file_is_refused_wherever_it_ends(mode: str, form: str, options: dict[str, Any]) -> None:
    data = encoded(photo(mode), form, **options)
    decode(data)

    for length in (*range(0, len(data) - 8, len(data) // 40), len(data) - 8):
        with pytest.raises(DecodeError, match=r"truncated|empty|can't be decoded as|not an image"):
            decode(data[:length])


def test_a_jpeg_cut_behind_its_thumbnail_is_truncated() -> None:
    thumbnail = b"Exif\0\0" + exif_block("<", []) + encoded(photo("RGB"), "JPEG")
    plain = encoded(photo("RGB"), "JPEG")
    data = with_segment(plain, thumbnail)

    np.testing.assert_array_equal(pixels_of(data), pixels_of(plain))
    with pytest.raises(DecodeError, match="end marker is missing"):
        decode(data[:-200])


def test_what_follows_a_whole_image_is_ignored() -> None:
    for form in ("JPEG", "PNG"):
        data = encoded(photo("RGB"), form)
        np.testing.assert_array_equal(pixels_of(data + b"\xff\xe1trailing bytes"), pixels_of(data))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "the file is empty"),
        (b"this is no image", "starts with b'this is no image': not an image that can be read"),
        (b"<html><body>404</body></html>", "not an image that can be read"),
        (b"\0\0\0\x14ftypisom\0\0\2\0mp41", "may be a video"),
        (b"\xff\xd8\xff\xd9", "a JPEG without image data"),
        (png(4, 4, 8, 2, b"")[:8] + png(4, 4, 8, 2, b"")[-12:], "a PNG without image data"),
        (png(0, 4, 8, 2, b""), "its header says 0 x 4 pixels"),
        (
            png(4, 4, 8, 2, b"\0" * 52)[:-20] + b"\1" + png(4, 4, 8, 2, b"\0" * 52)[-19:],
            "wrong checksum of its chunk b'IDAT'",
        ),
        (b"\xff\xd8\xff\xc0\0\x08\x08\0\4\0\4\3\xff\xda\0\2\xff\xd9", "can't be decoded as JPEG: Bogus marker length"),
        (b"BM but text", "can't be decoded as BMP"),
    ],
)
def test_what_is_no_image_is_refused_with_its_reason(data: bytes, reason: str) -> None:
    with pytest.raises(DecodeError) as caught:
        decode(data)
    assert reason in str(caught.value)


def jpeg_saying(width: int, height: int, bits: int = 8, components: int = 3) -> bytes:
    data = bytearray(encoded(photo("RGB"), "JPEG"))
    frame = data.index(b"\xff\xc0")
    data[frame + 4 : frame + 10] = struct.pack(">BHHB", bits, height, width, components)
    return bytes(data)


def bmp_saying(width: int, height: int) -> bytes:
    data = bytearray(encoded(photo("RGB"), "BMP"))
    data[18:26] = struct.pack("<ii", width, height)
    return bytes(data)


def gif_saying(width: int, height: int) -> bytes:
    data = bytearray(encoded(photo("P"), "GIF"))
    data[6:10] = struct.pack("<HH", width, height)
    return bytes(data)


def webp_saying(width: int, height: int) -> bytes:
    transparent = np.dstack([PHOTO, np.zeros(PHOTO.shape[:2], np.uint8)])
    data = bytearray(encoded(transparent, "WebP"))
    assert data[12:16] == b"VP8X"
    data[24:30] = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    return bytes(data)


def tiff_saying(width: int, height: int) -> bytes:
    data = bytearray(encoded(photo("RGB"), "TIFF"))
    for tag, value in ((256, width), (257, height)):
        entry = data.index(
            struct.pack("<HH", tag, 4) if struct.pack("<HH", tag, 4) in data else struct.pack("<HH", tag, 3)
        )
        data[entry : entry + 12] = struct.pack("<HHII", tag, 4, 1, value)
    return bytes(data)


@pytest.mark.parametrize(
    "saying",
    [
        jpeg_saying,
        lambda w, h: png(w, h, 8, 2, b""),
        lambda w, h: png(w, h, 16, 2, b""),
        bmp_saying,
        gif_saying,
        tiff_saying,
    ],
)
def test_a_decompression_bomb_is_refused_by_its_header(saying: Callable[[int, int], bytes]) -> None:
    with pytest.raises(DecodeError, match=f"its header says 50000 x 60000 pixels; at most {MAX_PIXELS:,}"):
        decode(saying(50000, 60000))


def test_a_webp_bomb_is_refused() -> None:
    with pytest.raises(DecodeError):  # by Pillow, before its decoder allocates the canvas, or by the size
        decode(webp_saying(16383, 16383))


@pytest.mark.parametrize(("bits", "components"), [(12, 3), (8, 2), (8, 5)])
def test_jpegs_of_unusual_kinds_are_refused(bits: int, components: int) -> None:
    with pytest.raises(DecodeError, match=f"{components} components with {bits} bits each"):
        decode(jpeg_saying(80, 60, bits, components))


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_pixels_without_a_fixed_range_are_refused(dtype: type) -> None:
    data = encoded(Image.fromarray(np.arange(600).reshape(20, 30).astype(dtype)), "TIFF")

    with pytest.raises(DecodeError, match="no fixed range"):
        decode(data)


def test_16_bit_tiff_with_white_as_zero_is_refused() -> None:
    data = encoded(Image.frombytes("I;16", (30, 20), bytes(1200)), "TIFF", tiffinfo={262: 0})

    if Image.open(io.BytesIO(data)).tag_v2[262] != 0:  # type: ignore[attr-defined]
        pytest.skip("this Pillow writes its own photometric tag")
    with pytest.raises(DecodeError, match="0 for white"):
        decode(data)


def test_damaged_bytes_raise_nothing_but_decode_errors() -> None:
    generator = np.random.default_rng(1)
    small = Image.fromarray(PHOTO[:16, :16])
    for form in ("JPEG", "PNG", "GIF", "WebP", "BMP"):
        whole = np.frombuffer(encoded(small.convert("P") if form == "GIF" else small, form), np.uint8)
        for _ in range(150):
            damaged = whole.copy()
            places = generator.integers(0, min(len(whole), 400), generator.integers(1, 6))
            damaged[places] = generator.integers(0, 256, len(places))
            try:
                image, _, _ = decode(damaged[: generator.integers(1, len(whole) + 1)].tobytes())
            except DecodeError:
                continue
            assert image.dtype == torch.uint8
            assert image.shape[0] == 3


@pytest.mark.filterwarnings("ignore::UserWarning:PIL.TiffImagePlugin")
def test_damaged_tiffs_raise_nothing_but_decode_errors() -> None:
    generator = np.random.default_rng(2)
    whole = np.frombuffer(encoded(Image.fromarray(PHOTO[:16, :16]), "TIFF"), np.uint8)
    for _ in range(150):
        damaged = whole.copy()
        places = generator.integers(0, 200, 3)
        damaged[places] = generator.integers(0, 256, 3)
        try:
            assert decode(damaged.tobytes())[0].shape[0] == 3
        except DecodeError:
            continue


# --- settings of the process ---


def test_a_setting_that_hides_truncation_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)

    with pytest.raises(FeatureStoreError, match="LOAD_TRUNCATED_IMAGES"):  # no fault of the image
        decode(encoded(photo("P"), "GIF"))


def test_memory_that_is_not_there_is_no_fault_of_an_image(processes: Processes) -> None:
    """In a process that may take little more than it has."""
    program = """
        import resource
        from io import BytesIO
        from PIL import Image
        from featstore.images.decode import decode
        images = {}
        for name, options in (("baseline", {}), ("progressive", {"progressive": True})):
            Image.new("RGB", (6000, 6000)).save(images.setdefault(name, BytesIO()), "JPEG", **options)
        taken = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        for megabytes in (20, 50, 90):  # 103 hold its pixels
            resource.setrlimit(resource.RLIMIT_AS, (taken + (megabytes << 20), -1))
            for name, file in images.items():
                try:
                    decode(file.getvalue())
                except MemoryError as error:
                    print(name, "wants memory" if str(error) else "says nothing")
    """
    if not Path("/proc/self/statm").exists():
        pytest.skip("the system doesn't tell how much memory a process has")
    said = processes.answer(program).splitlines()
    assert set(said) == {"baseline wants memory", "progressive wants memory"}


def test_pillows_limit_is_neither_changed_nor_obeyed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)

    for form in ("PNG", "JPEG", "BMP", "GIF"):
        assert decode(encoded(photo("RGB"), form))[0].shape == (3, 60, 80)
    assert Image.MAX_IMAGE_PIXELS == 100


def test_an_unknown_policy_is_refused() -> None:
    with pytest.raises(ValueError, match=f"'newer' is unknown.*{POLICY}"):
        decode(encoded(photo("RGB"), "PNG"), policy="newer")


def test_threads_decode_as_one_thread_does() -> None:
    files = [
        encoded(photo(mode), form) for mode, form in [("RGB", "JPEG"), ("P", "PNG"), ("P", "GIF"), ("RGB", "TIFF")]
    ]

    with ThreadPoolExecutor(8) as pool:
        for data, image in zip(files * 20, pool.map(lambda data: decode(data)[0], files * 20), strict=True):
            assert torch.equal(image, decode(data)[0])


# --- what is decoded though it is doubtful, and what would take too much ---


@pytest.mark.parametrize(
    ("largest", "words"), [(4095, "12 bits.*times 16"), (1023, "10 bits.*times 64"), (40000, None), (0, None)]
)
@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_values_of_16_bits_that_leave_the_upper_ones_unused_are_doubted(
    largest: int, words: str | None, form: str
) -> None:
    values = np.random.default_rng(0).integers(0, largest, (32, 32), endpoint=True).astype(np.uint16)
    values[0, 0] = largest
    doubt = decode(encoded(values, form)).doubt
    assert doubt is None if words is None else re.search(words, str(doubt))


def test_a_jpeg_of_thousands_of_scans_is_refused_undecoded() -> None:
    data = encoded(load_sample_images().images[0], "JPEG", progressive=True)
    start = data.rindex(b"\xff\xda")
    scan = data[start:-2]
    with pytest.raises(DecodeError, match=r"a JPEG of 3,0\d\d scans; at most 100 are decoded"):
        decode(data[:start] + scan * 3000 + b"\xff\xd9")


def test_decodings_beside_one_another_take_no_more_than_their_budget() -> None:
    budget, taken, most = Budget(100), [0], [0]

    def take(count: int) -> None:
        with budget.taken(count, "PNG"):
            taken[0] += count
            most[0] = max(most[0], taken[0])
            time.sleep(0.002)
            taken[0] -= count

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(take, [10, 40, 60, 30, 90, 20, 50] * 8))
        assert most[0] <= 100
        list(pool.map(take, [500, 10]))  # more than all of it: alone
    assert most[0] == 500


def test_an_image_that_takes_more_memory_than_is_free_is_no_fault_of_the_image(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_module, "available_bytes", lambda: 100 << 20)
    data = encoded(Image.new("RGB", (9000, 2000)), "PNG")
    with pytest.raises(MemoryError, match=r"decoding this PNG takes about 0.252 GB, and 0.105 GB of memory is free"):
        decode(data)
