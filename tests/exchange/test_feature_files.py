"""Feature files: read by plain reads, block by block; lists of the ids of their rows."""

from __future__ import annotations

import mmap
import os
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import safetensors.torch
import torch
from support.made_elsewhere import NUM, values
from support.tiny import staged

from featstore import DamagedFileError, FeatureStore, ImageSet, extract
from featstore.exchange.export import export
from featstore.exchange.feature_files import opened_features, read_ids
from featstore.exchange.imports import ImportReport, import_file

# ---- By plain reads


def forbidden(*arguments: Any, **options: Any) -> Any:
    raise AssertionError(f"something is mapped: {arguments}")


def test_no_file_is_mapped_but_safetensors_by_their_library(
    images: ImageSet, store: FeatureStore, tmp_path: Path, monkeypatch: Any
) -> None:
    """One that another machine makes shorter would kill the process."""
    key = extract(staged(), images, store, cuts=["layer1:none"]).keys[0]
    for suffix in (".npy", ".h5"):
        export(store, key, tmp_path / f"out{suffix}")
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["features"], file["id"] = store.features(images, key).numpy(), list(images.ids)
    for owner, name in ((torch, "from_file"), (np, "memmap"), (mmap, "mmap")):
        monkeypatch.setattr(owner, name, forbidden)
    for name in ("out.npy", "out.h5", "other.h5"):
        maps = Path("/proc/self/maps")
        with opened_features(tmp_path / name) as found:
            rows = torch.cat([block.clone() for _, block in found.rows.blocks(progress=False, verb="read")])
            assert not maps.exists() or name not in maps.read_text()
        assert rows.shape == (NUM, 8, 8, 8)
        assert torch.equal(rows.half(), torch.from_numpy(np.load(tmp_path / "out.npy")).half())


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", ["<f2", "<f4", ">f4", "<f8"])
@pytest.mark.parametrize("shape", [(2001, 700), (2001, 4, 3, 5), (7, 1)])
def test_npy_is_read_as_numpy_reads_it(tmp_path: Path, order: Any, dtype: str, shape: tuple[int, ...]) -> None:
    np.save(tmp_path / "clip.npy", np.asarray(values(shape[0], shape[1:]), dtype=dtype, order=order))
    expected = torch.from_numpy(np.load(tmp_path / "clip.npy").astype(np.dtype(dtype).newbyteorder("=")))
    with opened_features(tmp_path / "clip.npy") as found:
        assert found.rows.dtype == expected.dtype
        blocks = list(found.rows.blocks(progress=False, verb="read"))
        assert torch.equal(torch.cat([block for _, block in blocks]), expected)
        assert torch.equal(found.rows.read(3, 5), expected[3:5])
    assert len(blocks) == 1 or shape == (2001, 700)


def test_npy_of_a_long_header_is_read(tmp_path: Path) -> None:
    with (tmp_path / "clip.npy").open("wb") as file:
        np.lib.format.write_array(file, values(), version=(2, 0))
    with opened_features(tmp_path / "clip.npy") as found:
        assert np.array_equal(found.rows.read(0, NUM).numpy(), values())


def test_a_dataset_without_a_shape_is_refused_as_no_rows_are(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "clip.h5", "w") as file:
        file["features"] = h5py.Empty("f4")
    with pytest.raises(ValueError, match=r"have the shape \(0,\)"), opened_features(tmp_path / "clip.h5"):
        pass


@pytest.mark.parametrize("suffix", [".npy", ".safetensors"])
@pytest.mark.parametrize("kept", [-1, 40, 300])
def test_a_truncated_file_is_refused_before_anything_is_imported(
    images: ImageSet, store: FeatureStore, tmp_path: Path, suffix: str, kept: int
) -> None:
    path = tmp_path / f"clip{suffix}"
    np.save(tmp_path / "clip.npy", values(shape=(60,)))
    safetensors.torch.save_file({"features": torch.from_numpy(values(shape=(60,)))}, tmp_path / "clip.safetensors")
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(DamagedFileError, match=rf"clip{suffix} can't be read as .*undamaged copy"):
        import_file(store, path, name="clip", images=images, ids=images.ids)
    assert not store.root.exists()


@pytest.mark.parametrize("suffix", [".npy", ".h5"])
def test_a_file_that_becomes_shorter_meanwhile_is_an_error(
    images: ImageSet, store: FeatureStore, tmp_path: Path, suffix: str
) -> None:
    key = extract(staged(), images, store, cuts=["layer1:none"]).keys[0]
    path = tmp_path / f"out{suffix}"
    export(store, key, path)
    with opened_features(path) as found:
        os.truncate(path, 5000)
        with pytest.raises(DamagedFileError, match=rf"out\{suffix} is .*truncated"):
            found.rows.read(0, NUM)


def test_tensors_of_other_types_beside_the_features_do_no_harm(tmp_path: Path) -> None:
    features = torch.from_numpy(values())
    others = {"mask": torch.ones(3, dtype=torch.bool), "a": torch.ones((2, 0)), "b": torch.ones(3, dtype=torch.int16)}
    safetensors.torch.save_file({"features": features, **others}, tmp_path / "clip.safetensors")
    with opened_features(tmp_path / "clip.safetensors") as found:
        assert torch.equal(found.rows.read(2, 7), features[2:7])
    with (
        pytest.raises(TypeError, match="The features are I16"),
        opened_features(tmp_path / "clip.safetensors", dataset="b"),
    ):
        pass


# ---- Lists of ids


def test_ids_are_lines_of_a_text_file(tmp_path: Path) -> None:
    (tmp_path / "ids.txt").write_bytes(b"a b.jpg\r\nc\xff\xe2\x80\xa8d.jpg\n\n e\rf.jpg\n")
    table = read_ids(tmp_path / "ids.txt")
    assert (table.ids, table.digests, table.columns) == (("a b.jpg", "c\udcff\u2028d.jpg", " e\rf.jpg"), None, ())


@pytest.mark.parametrize(
    ("name", "text", "column"),
    [
        ("t.csv", "path,label\na.jpg,x\nb.jpg,y\n", None),
        ("t.csv", "label,id\nx,a.jpg\ny,b.jpg\n", None),
        ("t.tsv", "label\tfile\nx\ta.jpg\ny\tb.jpg\n", "file"),
        ("t.csv", "row,id\n1,b.jpg\n0,a.jpg\n", None),
    ],
)
def test_ids_are_a_column_of_a_table(tmp_path: Path, name: str, text: str, column: str | None) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    table = read_ids(tmp_path / name, column)
    assert (table.ids, table.notes) == (("a.jpg", "b.jpg"), ())


def test_a_table_of_ids_is_read_as_a_table_of_images_is(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("label;id\nx;a.jpg\ny;b.jpg\n", encoding="utf-16")
    table = read_ids(tmp_path / "t.csv")
    assert (table.ids, table.columns) == (("a.jpg", "b.jpg"), ("label", "id"))
    assert table.notes == ("t.csv is read as cells separated by ';' and UTF-16",)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("name\na\n", "has no column id or path; it has name"),
        ("id\n", "holds only a header"),
        ("", "holds nothing"),
        ("row,id\n0,a\n2,b\n", r"a column row that isn't 0 to 1 in some order"),
        ("id,label\nb,c\n\ncat/1,2.jpg,cat\n", "line 4 of .* has 3 cells. Expected 2, as the header has. Quote cells"),
        ("id,label\na\n", "line 2 of .* has 1 cell. Expected 2"),
        ("id,digest\na,xy\n", r"has the digest 'xy'. Expected the SHA-256"),
        ('id\n"a\n', "can't be understood"),
    ],
)
def test_a_table_without_usable_ids_is_refused(tmp_path: Path, text: str, sentence: str) -> None:
    (tmp_path / "t.csv").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=sentence):
        read_ids(tmp_path / "t.csv")


def test_an_absent_list_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"ids\.txt can't be read \(No such file"):
        read_ids(tmp_path / "ids.txt")


def test_rows_of_a_file_are_read_while_it_is_open(tmp_path: Path) -> None:
    safetensors.torch.save_file({"features": torch.arange(6.0).reshape(3, 2)}, tmp_path / "a.safetensors")
    with opened_features(tmp_path / "a.safetensors") as found:
        assert (found.rows.num_rows, found.rows.shape, found.ids, found.images) == (3, (2,), None, None)
        assert torch.equal(found.rows.read(1, 3), torch.tensor([[2.0, 3.0], [4.0, 5.0]]))


def test_the_report_is_a_sentence() -> None:
    report = ImportReport(
        key="ab" * 32, images="photos", rows=1200, written=1000, shape=(512,), dtype="float16", notes=()
    )
    assert str(report) == "1,000 rows written, 200 reused (512 float16): set abababab, image set photos"
