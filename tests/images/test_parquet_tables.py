"""Parquet tables say what the same table as CSV says."""

from __future__ import annotations

import sys
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.image_files import fill, image_bytes

from featstore import FeatureStoreError, ImageSet
from featstore.cli.flags import ImageFlags
from featstore.extraction.remedy import image_flags

COLUMNS: dict[str, Any] = {
    "path": ["a/1.png", "b/2.png", "b/3.png", "c/4.png"],
    "label": ["rose", "rose", None, "tulip"],
    "split": ["train", "val", "test", None],
    "patient": [7, 7, 8, 9],
    "size": [1.5, None, 0.1, 3],
    "is_red": [True, False, False, True],
    "price": [Decimal("1.50"), Decimal("0.25"), None, Decimal("-3.00")],
}


def parquet(path: Path, columns: dict[str, Any] = COLUMNS) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


def as_csv(path: Path) -> Path:
    rows = zip(*COLUMNS.values(), strict=True)
    lines = [",".join("" if cell is None else str(cell) for cell in row) for row in rows]
    path.write_text("\n".join([",".join(COLUMNS), *lines]) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"group_column": "patient", "split_column": ""},
        {"label_column": None},
        {"label_column": ["size"], "task": "regression"},
        {"label_column": "price", "task": "regression"},
        {"label_column": "price", "held_out_classes": True},
        {"one_hot": ["is_red"], "task": "multi"},
        {"valid_column": "is_red", "label_column": "patient", "held_out_classes": True},
    ],
)
def test_a_parquet_table_is_read_as_the_same_table_in_csv(tmp_path: Path, options: dict[str, Any]) -> None:
    fill(tmp_path, *COLUMNS["path"])
    found = ImageSet.from_table(parquet(tmp_path / "t.parquet"), **options)
    expected = ImageSet.from_table(as_csv(tmp_path / "t.csv"), **options)
    for name in ("name", "ids", "classes", "groups", "task", "source", "notes"):
        assert getattr(found, name) == getattr(expected, name), name
    np.testing.assert_array_equal(found.splits, expected.splits)
    np.testing.assert_array_equal(found.targets, expected.targets)
    assert found.read(2) == image_bytes(2)


def test_a_cell_may_be_a_list_of_labels(tmp_path: Path) -> None:
    tags: list[Any] = [["a", "b, c"], [], None, ["b, c"]]
    file = parquet(tmp_path / "t.parquet", {"path": COLUMNS["path"], "tags": tags})
    images = ImageSet.from_table(file, label_column="tags", task="multi")
    assert images.classes == ("a", "b, c")
    np.testing.assert_array_equal(images.targets, [[1, 1], [0, 0], [0, 0], [0, 1]])
    with pytest.raises(ValueError, match=r"row 1 of .*t\.parquet has the labels a, b, c\. .* --task multi"):
        ImageSet.from_table(file, label_column="tags")


def test_the_flags_of_a_parquet_table_make_it_again(tmp_path: Path) -> None:
    file = str(parquet(tmp_path / "t.parquet"))
    images = ImageFlags(images=file, group_column="patient").given().images
    assert image_flags(images) == ["--images", file, "--group-column", "patient"]


def test_what_is_wrong_with_a_parquet_table_is_said_by_its_row(tmp_path: Path) -> None:
    doubled = {**COLUMNS, "path": ["1.png", "2.png", "2.png", "3.png"]}
    with pytest.raises(ValueError, match=r"names 2\.png twice, in row 2 and in row 3\. .* Delete one of the rows"):
        ImageSet.from_table(parquet(tmp_path / "t.parquet", doubled))
    with pytest.raises(ValueError, match=r"has no column 'kind'; it has 'path', 'label', "):
        ImageSet.from_table(parquet(tmp_path / "t.parquet"), label_column="kind")
    with pytest.raises(ValueError, match=r"row 1 of .* has 'rose' in the column label\. Expected a number"):
        ImageSet.from_table(tmp_path / "t.parquet", task="regression")
    with pytest.raises(ValueError, match="holds only a header"):
        ImageSet.from_table(parquet(tmp_path / "none.parquet", {"path": pa.array([], pa.string())}))
    (tmp_path / "t.parquet").write_bytes((tmp_path / "t.parquet").read_bytes()[:-9])
    with pytest.raises(ValueError, match="can't be understood as Parquet"):
        ImageSet.from_table(tmp_path / "t.parquet")
    with pytest.raises(ValueError, match=r"nowhere\.parquet can't be read"):
        ImageSet.from_table(tmp_path / "nowhere.parquet")


def test_a_column_that_is_there_and_cant_be_read_is_said_to_be_of_its_type(tmp_path: Path) -> None:
    taken = pa.array([datetime(2026, 1, day, tzinfo=UTC) for day in range(1, 5)])
    file = parquet(tmp_path / "t.parquet", {**COLUMNS, "taken": taken})
    assert ImageSet.from_table(file).classes == ("rose", "tulip")
    options: list[dict[str, Any]] = [{f"{what}_column": "taken"} for what in ("label", "group", "split", "valid")]
    for option in options:
        with pytest.raises(ValueError, match=r"has timestamp\[us, tz=UTC\] in the column 'taken'\. .* as text"):
            ImageSet.from_table(file, **option)
    with pytest.raises(ValueError, match=r"has timestamp.* in the column 'taken'"):
        ImageSet.from_table(file, label_column=["size", "taken"], task="regression")


def test_of_several_columns_of_one_name_a_parquet_table_says_what_one_in_csv_says(tmp_path: Path) -> None:
    columns = [*COLUMNS.items(), ("size", COLUMNS["size"])]
    names, values = [name for name, _ in columns], [pa.array(cells) for _, cells in columns]
    pq.write_table(pa.Table.from_arrays(values, names), file := tmp_path / "t.parquet")
    assert ImageSet.from_table(file).classes == ("rose", "tulip")
    with pytest.raises(ValueError, match=r"t\.parquet has 2 columns 'size'; it has 'path', 'label', "):
        ImageSet.from_table(file, label_column="size")


def test_a_table_that_holds_the_images_themselves_is_sent_to_where_it_can_be_read(tmp_path: Path) -> None:
    held = [{"bytes": image_bytes(number), "path": None} for number in range(2)]
    file = parquet(tmp_path / "t.parquet", {"image": held, "label": ["a", "b"]})
    with pytest.raises(ValueError, match=r"holds the images themselves, in its column 'image', .*from_dataset\("):
        ImageSet.from_table(file)

    import datasets

    datasets.config.HF_DATASETS_CACHE = tmp_path / "cache"
    made = datasets.load_dataset("parquet", data_files=str(file), split="train", cache_dir=str(tmp_path / "cache"))
    images = ImageSet.from_dataset(made.cast_column("image", datasets.Image()))
    assert [images.read(index) for index in range(2)] == [image_bytes(0), image_bytes(1)]


def test_without_pyarrow_a_parquet_table_is_refused_with_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = parquet(tmp_path / "t.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(
        FeatureStoreError, match=r"needs pyarrow, .* pip install 'featstore\[parquet\]', or give a \.csv"
    ):
        ImageSet.from_table(file)
