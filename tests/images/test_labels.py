"""Labels mean the same wherever they come from."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from support.image_files import image_bytes

from featstore import ImageSet


def test_minus_one_is_no_class_wherever_labels_come_from(tmp_path: Path) -> None:
    labels = [1, -1, 0, 1]
    paths = [f"{number}.png" for number in range(4)]
    rows = [f"{path},{label}" for path, label in zip(paths, labels, strict=True)]
    (tmp_path / "t.csv").write_text("\n".join(["path,label", *rows]))
    pq.write_table(pa.table({"path": paths, "label": labels}), tmp_path / "t.parquet")
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        for number, label in enumerate(labels):
            for name, data in ((f"{number}.png", image_bytes(number)), (f"{number}.cls", str(label).encode())):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    pixels = np.zeros((4, 2, 2), np.uint8)
    for images in (
        ImageSet.from_table(tmp_path / "t.csv"),
        ImageSet.from_table(tmp_path / "t.parquet"),
        ImageSet.from_tar(tmp_path / "t.tar"),
        ImageSet.from_arrays(pixels, labels),
        ImageSet.from_arrays(pixels, list(map(str, labels))),
        ImageSet.from_dataset(list(zip(pixels, labels, strict=True))),
    ):
        assert images.classes == ("0", "1"), images.origin
        np.testing.assert_array_equal(images.targets, labels)


def test_minus_one_among_several_labels_is_none_of_them(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("path,label\n0.png,a;-1\n1.png,-1\n2.png,b;a\n")
    images = ImageSet.from_table(tmp_path / "t.csv", task="multi", label_sep=";")
    assert images.classes == ("a", "b")
    np.testing.assert_array_equal(images.targets, [[1, 0], [0, 0], [1, 1]])


def test_a_class_that_somebody_calls_minus_one_is_one() -> None:
    images = ImageSet.from_arrays(np.zeros((2, 2, 2), np.uint8), ["-1", "1"], classes=["-1", "1"])
    np.testing.assert_array_equal(images.targets, [0, 1])
