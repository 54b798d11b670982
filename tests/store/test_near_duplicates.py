"""Near-duplicates: photographs saved again or cropped a little are found, whatever split they lie in."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_sample_images
from support.tiny import SPEC, digests_of

from featstore import Features, ImageSet, near_duplicates
from featstore.files.index import RowIndex
from featstore.files.part import Part, write_part
from featstore.store import near_duplicates as module

Rows = NDArray[np.float32]


def features(folder: Path, rows: Rows, splits: list[str] | None = None) -> Features:
    """`rows` in a file, of images that are all different."""
    count, path = len(rows), folder / "part-0.h5"
    digests = digests_of(*range(count))
    decoders = np.zeros(count, np.uint8)
    write_part(path, features=torch.from_numpy(rows), digests=digests, decoders=decoders, facts={})
    pixels = np.random.default_rng(0).integers(0, 256, (count, 4, 4, 3), dtype=np.uint8)
    images = ImageSet.from_arrays(pixels, [0] * count)
    if splits is not None:
        images = images.with_splits(splits)
    index = RowIndex([Part.open(path)])
    return Features(images, SPEC, index, *index.find(digests))


def look(image: Image.Image) -> Rows:
    """A photograph at 12 pixels a side, about its mean: what stands in for a backbone."""
    small = np.asarray(image.resize((12, 12), Image.Resampling.BOX), np.float32)
    flat: Rows = (small - small.mean((0, 1))).ravel()
    return flat


def saved_again(image: Image.Image, quality: int) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file).convert("RGB")


@pytest.fixture(scope="module")
def planted() -> tuple[Rows, set[tuple[int, int]]]:
    """48 pieces of two photographs, then eight of them saved again and eight cropped; and the pairs that these make."""
    pieces = [
        Image.fromarray(photograph[top : top + 100, left : left + 100])
        for photograph in load_sample_images().images
        for top in range(0, 400, 100)
        for left in range(0, 600, 100)
    ]
    again = [saved_again(piece, quality=50) for piece in pieces[16:24]]
    cropped = [piece.crop((2, 2, 98, 98)) for piece in pieces[24:32]]
    rows = np.stack([look(each) for each in (*pieces, *again, *cropped)])
    return rows, {(16 + place, len(pieces) + place) for place in range(16)}


def test_photographs_saved_again_and_cropped_are_found_and_nothing_else(
    tmp_path: Path, planted: tuple[Rows, set[tuple[int, int]]]
) -> None:
    rows, pairs = planted
    splits = ["train"] * 48 + ["valid"] * 8 + ["train"] * 8
    found = near_duplicates(features(tmp_path, rows, splits), threshold=0.9)
    assert {tuple(pair) for pair in found.places.tolist()} == pairs
    assert [bool(across) for across in found.is_across] == [other < 56 for _, other in found.places.tolist()]
    assert found.similarity.tolist() == sorted(found.similarity, reverse=True)
    assert found.pairs[0] == tuple(found.images.ids[place] for place in found.places[0])
    assert "16 pairs of nearly equal images among 64 images, 8 of them in different splits" in repr(found)
    assert found.table[0].keys() == {"image", "split", "other", "its split", "similarity"}
    assert "similarity" in found._repr_html_()


@pytest.mark.parametrize("block", [7, 2048])
@pytest.mark.parametrize("across", [False, True])
def test_pairs_are_those_of_all_cosines_written_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int, across: bool
) -> None:
    monkeypatch.setattr(module, "_BLOCK", block)
    rows = np.random.default_rng(0).standard_normal((60, 3)).astype(np.float32)
    splits = [("train", "valid", "")[place % 3] for place in range(60)]
    found = near_duplicates(features(tmp_path, rows, splits), 0.9, k=60, across_splits=across)
    unit = rows.astype(np.float64) / np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True)
    expected = {
        (one, other): unit[one] @ unit[other]
        for one in range(60)
        for other in range(one + 1, 60)
        if unit[one] @ unit[other] >= 0.9
        and (not across or (splits[one] != splits[other] and "" not in (splits[one], splits[other])))
    }
    assert len(expected) > 20
    got = {(one, other): value for (one, other), value in zip(found.places.tolist(), found.similarity, strict=True)}
    assert got == pytest.approx(expected, abs=1e-6)  # float32


def test_an_image_is_paired_with_the_first_k_of_equal_ones(tmp_path: Path) -> None:
    rows = np.ones((6, 4), np.float32)
    stored = features(tmp_path, rows)
    found = near_duplicates(stored, threshold=1.0, k=2)
    assert found.places.tolist() == [[0, 1], [0, 2], [1, 2], [1, 3], [2, 3], [2, 4], [3, 4], [3, 5], [4, 5]]
    assert not found.is_across.any()  # they aren't dealt
    assert found.in_words().startswith("at least 9 pairs")
    whole = near_duplicates(stored, threshold=1.0, k=6)
    assert whole.in_words().startswith("15 pairs")  # all there are


def test_pairs_across_splits_are_not_crowded_out_by_others(tmp_path: Path) -> None:
    splits = ["train"] * 5 + ["valid"]
    found = near_duplicates(features(tmp_path, np.ones((6, 4), np.float32), splits), k=1, across_splits=True)
    assert found.places.tolist() == [[place, 5] for place in range(5)]


@pytest.mark.parametrize("scale", [1e-30, 1e25])  # bfloat16 and float32 hold such rows, float32 not their squares
def test_pairs_dont_depend_on_the_scale_of_rows(tmp_path: Path, scale: float) -> None:
    rows = np.random.default_rng(0).standard_normal((60, 3)).astype(np.float32)
    (tmp_path / "scaled").mkdir()
    found, other = (
        near_duplicates(features(folder, each), 0.9)
        for folder, each in ((tmp_path, rows), (tmp_path / "scaled", rows * np.float32(scale)))
    )
    assert len(found) > 20
    assert found.places.tolist() == other.places.tolist()


def test_rows_of_zeros_are_like_nothing(tmp_path: Path) -> None:
    found = near_duplicates(features(tmp_path, np.zeros((4, 3), np.float32)), threshold=0.1)
    assert len(found) == 0
    assert found.table == []


def test_rows_are_read_again_where_memory_has_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = features(tmp_path, np.random.default_rng(0).standard_normal((40, 3)).astype(np.float32))
    expected = near_duplicates(stored, 0.9)
    monkeypatch.setattr(module, "available_bytes", lambda: 100)
    monkeypatch.setattr(module, "_BLOCK", 16)
    assert near_duplicates(stored, 0.9).places.tolist() == expected.places.tolist()


def test_what_can_not_be_compared_is_refused(tmp_path: Path) -> None:
    stored = features(tmp_path, np.ones((2, 3, 2, 2), np.float32))
    with pytest.raises(ValueError, match="holds 3x2x2 an image"):
        near_duplicates(stored)
    (tmp_path / "vectors").mkdir()
    vectors = features(tmp_path / "vectors", np.ones((2, 3), np.float32))
    with pytest.raises(ValueError, match=r"threshold is 1\.5"):
        near_duplicates(vectors, 1.5)
    with pytest.raises(ValueError, match="k is 0"):
        near_duplicates(vectors, k=0)
