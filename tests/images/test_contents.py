"""Contents: images of equal content, in one split or in several."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support.image_files import counted, fill, image_bytes

from featstore.images.contents import lone_formats_note, repeats_note, split_overlap
from featstore.images.digests import (
    Digests,
    no_stats,
)
from featstore.images.image_set import ImageSet


class TestDuplicates:
    def test_identical_images_across_splits_are_named_once_each(self, tmp_path: Path) -> None:
        paths = ["train/a/1.png", "train/a/2.png", "valid/a/3.png", "valid/a/4.png", "test/a/5.png", "test/a/6.png"]
        fill(tmp_path, *paths, "test/a/7.png")
        for path in ("train/a/2.png", "valid/a/3.png", "test/a/5.png"):
            (tmp_path / path).write_bytes(image_bytes(0))
        (tmp_path / "test/a/6.png").write_bytes((tmp_path / "valid/a/4.png").read_bytes())
        images = ImageSet.from_folder(tmp_path)
        pairs = split_overlap(images, images.digests())
        assert sorted(pairs) == [
            ("train/a/1.png", "test/a/5.png"),
            ("train/a/1.png", "valid/a/3.png"),
            ("valid/a/4.png", "test/a/6.png"),
        ]

    def test_repeats_within_and_across_classes_are_counted_and_named(self, tmp_path: Path) -> None:
        fill(tmp_path, *[f"{kind}/{number}.png" for kind in ("cat", "dog") for number in range(3)])
        images = ImageSet.from_folder(tmp_path)
        assert repeats_note(images, images.digests()) is None
        for path in ("cat/8.png", "cat/9.png", "dog/9.png"):
            (tmp_path / path).write_bytes(image_bytes(77))
        (tmp_path / "dog/5.png").write_bytes(image_bytes(3))  # as dog/0.png
        images = ImageSet.from_folder(tmp_path)
        assert repeats_note(images, images.digests()) == (
            "3 images repeat another byte for byte: 2 contents (cat/8.png 3 times, dog/0.png 2 times), 1 of them under "
            "several classes (cat/8.png); copies, or placeholders for missing images?"
        )

    def test_an_image_alone_of_its_format_in_a_folder_is_named(self, tmp_path: Path) -> None:
        fill(tmp_path, *[f"cat/{number}.{'jpg' if number % 2 else 'JPEG'}" for number in range(10)], "cat/none.gif")
        fill(
            tmp_path,
            "few/1.jpg",
            "few/2.gif",
            *[f"mixed/{number}.jpg" for number in range(3)],
            "mixed/1.png",
            "mixed/1.bmp",
            *[f"both/{number}.{suffix}" for number in range(2) for suffix in ("jpg", "png")],
        )
        assert lone_formats_note(ImageSet.from_folder(tmp_path)) == (
            "3 images have another format than all others in the folder (cat/none.gif, mixed/1.bmp, mixed/1.png): a "
            "placeholder?"
        )
        assert lone_formats_note(ImageSet.from_folder(tmp_path / "both")) is None

    def test_failed_and_undealt_images_overlap_with_nothing(self) -> None:
        values = np.zeros((4, 32), np.uint8)
        digests = Digests(values=values, failed={0: "gone", 1: "gone"}, stats=no_stats(4))
        assert digests.duplicates() == [(2, 3)]
        images = counted(4, 1)
        assert split_overlap(images.with_splits(["train", "valid", "train", ""]), digests) == []
        with pytest.raises(ValueError, match="4 digests for 1 images"):
            split_overlap(images.select([0]), digests)
