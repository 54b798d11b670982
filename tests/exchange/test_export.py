from __future__ import annotations

import csv
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from support.full_disk import largest_file
from support.parts import flip_bit
from support.processes import Processes
from support.scaled import unscaled
from support.tiny import arrays, photos, pixels, staged
from torch import Tensor

from featstore import (
    AmbiguousRequestError,
    DamagedFileError,
    FeatureStore,
    FeatureStoreError,
    ImageSet,
    MissingFeaturesError,
    extract,
)
from featstore.exchange import export as export_module
from featstore.exchange.export import SUFFIXES, ExportReport, export
from featstore.exchange.feature_files import opened_features
from featstore.exchange.imports import import_features
from featstore.exchange.names import EXPORT_SUFFIXES
from featstore.files.header import is_part
from featstore.files.part import Part, write_part
from featstore.images.fileless import images_by_id

DTYPES = ("float16", "float32", "bfloat16")


def filed(images: ImageSet, store: FeatureStore, dtype: str = "float16", cut: str = "layer2:avg") -> str:
    return extract(staged(), images, store, cuts=[cut], dtype=dtype).keys[0]


# ---- What is in the files


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cut", ["layer2:avg", "layer1:none"])
@pytest.mark.parametrize("suffix", [".npy", ".h5", ".HDF5", ".safetensors"])
def test_each_format_holds_the_stored_rows(
    tmp_path: Path, images: ImageSet, store: FeatureStore, dtype: str, cut: str, suffix: str
) -> None:
    key = filed(images, store, dtype, cut)
    report = export(store, key, tmp_path / f"out{suffix}")
    stored = store.features(images, key)[:]
    values = read(tmp_path / f"out{suffix}")
    assert torch.equal(values.float(), stored.float())
    assert (report.rows, report.shape, report.left_out) == (8, tuple(stored.shape), 0)
    assert report.bytes == sum(file.stat().st_size for file in report.files)
    becomes_wider = dtype == "bfloat16" and suffix == ".npy"
    assert report.dtype == ("float32" if becomes_wider else dtype)
    assert report.notes == (("bfloat16 became float32, which .npy can hold; no value changed",) * becomes_wider)
    if suffix != ".HDF5":
        assert str(values.dtype) == f"torch.{report.dtype}"


def read(path: Path) -> Tensor:
    """The features in an exported file, by the library that its format belongs to."""
    if path.suffix == ".npy":
        return torch.from_numpy(np.load(path))
    if path.suffix == ".safetensors":
        return safetensors.torch.load_file(path)["features"]
    with h5py.File(path) as file:
        values = torch.from_numpy(file["features"][()])
        is_bfloat16 = (
            file["features"].id.get_type().get_ebias() == 127 and file["features"].id.get_type().get_size() == 2
        )
    return values.bfloat16() if is_bfloat16 else values


@pytest.mark.parametrize("cut", ["layer2:avg", "layer1:none"])
@pytest.mark.parametrize(
    ("suffix", "dtype", "note"),
    [
        (".npy", "float32", "int8 became float32, which .npy can hold; no value changed"),
        (".safetensors", "float32", "int8 became float32; no value changed"),
        (".h5", "int8", "int8 stays: the values are /features times /scale, a number a row"),
    ],
)
def test_whole_numbers_are_exported_as_their_values_or_with_their_scales(
    tmp_path: Path, images: ImageSet, store: FeatureStore, cut: str, suffix: str, dtype: str, note: str
) -> None:
    key, path = filed(images, store, "int8", cut), tmp_path / f"out{suffix}"
    chosen = images.select([5, 2, 7, 0, 1])
    report = export(store, key, path, images=chosen)
    stored = store.features(chosen, key)[:]
    if suffix == ".h5":
        with h5py.File(path) as file:
            assert file["features"].dtype == np.int8
            values = torch.from_numpy(unscaled(file["features"][()], file["scale"][()]))
    else:
        values = read(path)
    assert values.dtype == torch.float32
    assert torch.equal(values, stored)
    assert (report.dtype, report.notes) == (dtype, (note,))
    with opened_features(path) as opened:
        assert (opened.rows.dtype, opened.rows.shape) == (torch.float32, stored.shape[1:])
        assert torch.equal(opened.rows.read(1, 4), stored[1:4])
        imported = import_features(store, opened.rows.read(0, 5), chosen, name="again")
    assert torch.equal(store.features(chosen, imported.key)[:], stored)


def test_an_exported_file_of_whole_numbers_is_a_sound_part_of_the_set(
    tmp_path: Path, images: ImageSet, store: FeatureStore
) -> None:
    key = filed(images, store, "int8")
    other = tmp_path / "other" / "anything@cut-000000000000" / "copied"
    other.mkdir(parents=True)
    export(store, key, other / "part-0123456789abcdef.h5")
    assert Part.open(other / "part-0123456789abcdef.h5").verify() == []
    assert torch.equal(FeatureStore(tmp_path / "other").features(images, key)[:], store.features(images, key)[:])


def test_whole_numbers_of_others_are_no_features(tmp_path: Path, images: ImageSet, store: FeatureStore) -> None:
    numbers = np.ones((8, 3), np.int8)
    np.save(tmp_path / "numbers.npy", numbers)
    safetensors.torch.save_file({"features": torch.from_numpy(numbers)}, tmp_path / "numbers.safetensors")
    with h5py.File(tmp_path / "numbers.h5", "w") as file:
        file["features"] = numbers
    refused = r"The features are (int8|I8)\. Expected float16, .* or bfloat16\. Convert"
    for features in (numbers, torch.from_numpy(numbers)):
        with pytest.raises(TypeError, match=refused):
            import_features(store, features, images, name="numbers")
    for path in sorted(tmp_path.glob("numbers.*")):
        with pytest.raises(TypeError, match=refused), opened_features(path):
            pass


def test_hdf5_has_ids_targets_and_classes_as_datasets_that_any_program_reads(
    tmp_path: Path, images: ImageSet, store: FeatureStore
) -> None:
    key = filed(images, store)
    export(store, key, tmp_path / "out.h5")
    with h5py.File(tmp_path / "out.h5") as file:
        assert [name.decode() for name in file["id"]] == list(images.ids)
        assert [name.decode() for name in file["split"]] == images.splits.tolist()
        assert [name.decode() for name in file["class"]] == ["cat", "dog"]
        np.testing.assert_array_equal(file["target"][()], images.targets)
        np.testing.assert_array_equal(file["digest"][()], images.digests().values)
        facts = json.loads(file["facts"].asstr()[()])
        for name in ("id", "split", "class", "target", "features"):
            assert (file[name].chunks, file[name].compression) == (None, None)
    assert facts["spec"] == store.set(key).spec.facts()
    assert facts["images"] == {"name": "photos", "task": "single", "classes": ["cat", "dog"]}


def test_an_exported_hdf5_file_is_a_sound_part_of_the_set(
    tmp_path: Path, images: ImageSet, store: FeatureStore
) -> None:
    key = filed(images, store)
    other = tmp_path / "other" / "anything@cut-000000000000" / "copied"
    other.mkdir(parents=True)
    export(store, key, other / "part-0123456789abcdef.h5")
    part = Part.open(other / "part-0123456789abcdef.h5")
    assert is_part(part.path)
    assert part.verify() == []
    assert part.decoders.tolist() == [{".png": 2, ".jpg": 3}[Path(image).suffix] for image in images.ids]
    assert torch.equal(FeatureStore(tmp_path / "other").features(images, key)[:], store.features(images, key)[:])


def test_damage_in_a_column_of_an_exported_file_is_found_and_named(
    tmp_path: Path, images: ImageSet, store: FeatureStore
) -> None:
    export(store, filed(images, store), tmp_path / "out.h5")
    content = bytearray((tmp_path / "out.h5").read_bytes())
    content[content.index(b"cat/0.png")] ^= 1
    (tmp_path / "out.h5").write_bytes(content)
    with pytest.raises(DamagedFileError, match=r"altered in its column id"):
        Part.open(tmp_path / "out.h5")


def test_a_column_may_not_take_the_place_of_a_parts_own(tmp_path: Path, images: ImageSet, store: FeatureStore) -> None:
    part = store.set(filed(images, store)).parts[0]
    arguments = {"features": part.features, "digests": part.digests, "decoders": part.decoders, "facts": {}}
    for name, sentence in (("crc", "has a dataset 'crc' of its own"), ("Id", "can't be named 'Id'")):
        with pytest.raises(ValueError, match=sentence):
            write_part(tmp_path / "out.h5", **arguments, columns={name: np.zeros(8)})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="column id is <U1"):
        write_part(tmp_path / "out.h5", **arguments, columns={"id": np.array(["a"] * 8)})  # type: ignore[arg-type]


def test_the_table_beside_npy_names_each_row(tmp_path: Path, images: ImageSet, store: FeatureStore) -> None:
    report = export(store, filed(images, store), tmp_path / "out.npy")
    assert report.files == (tmp_path / "out.npy", tmp_path / "out.csv")
    assert table(tmp_path / "out.csv") == [
        {
            "row": str(row),
            "id": image,
            "split": split,
            "label": image.partition("/")[0],
            "digest": digest.tobytes().hex(),
        }
        for row, (image, split, digest) in enumerate(
            zip(images.ids, images.splits, images.digests().values, strict=True)
        )
    ]
    again = ImageSet.from_csv(tmp_path / "out.csv", root=tmp_path / "photos", path_column="id", split_column="split")
    assert (again.ids, again.classes) == (images.ids, images.classes)
    np.testing.assert_array_equal(again.targets, images.targets)


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        return list(csv.DictReader(file))


def test_safetensors_holds_digests_targets_and_everything_else_as_json_texts(
    tmp_path: Path, images: ImageSet, store: FeatureStore
) -> None:
    key = filed(images, store)
    export(store, key, tmp_path / "out.safetensors")
    tensors = safetensors.torch.load_file(tmp_path / "out.safetensors")
    assert torch.equal(tensors["digests"], torch.from_numpy(images.digests().values.copy()))
    assert tensors["targets"].tolist() == np.asarray(images.targets).tolist()
    with safetensors.safe_open(tmp_path / "out.safetensors", framework="pt") as file:
        metadata = file.metadata()
    assert int.from_bytes((tmp_path / "out.safetensors").read_bytes()[:8], "little") % 8 == 0  # numbers lie aligned
    assert json.loads(metadata["ids"]) == list(images.ids)
    assert json.loads(metadata["splits"]) == images.splits.tolist()
    assert json.loads(metadata["facts"])["spec"] == store.set(key).spec.facts()
    assert json.loads(metadata["facts"])["images"]["classes"] == ["cat", "dog"]


def test_several_labels_of_an_image_stand_in_one_cell(tmp_path: Path, store: FeatureStore) -> None:
    import pyarrow.parquet as pq

    images = ImageSet.from_arrays(pixels(3), [["a", "b|c"], [], ["d"]], task="multi", groups=["p", "p", "q"])
    key = filed(images, store)
    report = export(store, key, tmp_path / "out.npy", images=images)
    assert [(row["label"], row["group"]) for row in table(tmp_path / "out.csv")] == [
        ("a;b|c", "p"),
        ("", "p"),
        ("d", "q"),
    ]
    assert report.notes == ("several labels of an image stand in one cell, with ; between them",)
    export(store, key, tmp_path / "out.h5", images=images)
    with h5py.File(tmp_path / "out.h5") as file:
        np.testing.assert_array_equal(file["target"][()], images.targets)
        assert file["group"][()].tolist() == [b"p", b"p", b"q"]
    export(store, key, tmp_path / "out.parquet", images=images)
    assert pq.read_table(tmp_path / "out.parquet")["group"].to_pylist() == ["p", "p", "q"]


def test_classes_that_leave_no_separator_are_refused(tmp_path: Path, store: FeatureStore) -> None:
    images = ImageSet.from_arrays(pixels(1), [["a|", "b;", "c/", "d\te"]], task="multi")
    with pytest.raises(ValueError, match=r"contain \|, ;, / and tabs.*Export as \.h5"):
        export(store, filed(images, store), tmp_path / "out.npy", images=images)
    assert not list(tmp_path.glob("*out*"))


def test_unlabelled_images_are_exported_without_targets(tmp_path: Path, store: FeatureStore) -> None:
    images = ImageSet.from_arrays(pixels(3))
    key = filed(images, store)
    for suffix in (".npy", ".h5", ".safetensors"):
        export(store, key, tmp_path / f"out{suffix}")
    assert [row["label"] for row in table(tmp_path / "out.csv")] == ["", "", ""]
    with h5py.File(tmp_path / "out.h5") as file:
        assert not {"target", "class"} & set(file)
    assert "targets" not in safetensors.torch.load_file(tmp_path / "out.safetensors")


def test_a_name_that_is_no_utf_8_survives(tmp_path: Path, store: FeatureStore) -> None:
    folder = photos(tmp_path / "photos", 2)
    (folder / "cat" / "0.png").rename(folder / "cat" / "\udcff.png")
    images = ImageSet.from_folder(folder)
    key = filed(images, store)
    for suffix in (".npy", ".h5", ".safetensors"):
        export(store, key, tmp_path / f"out{suffix}")
    assert [row["id"] for row in table(tmp_path / "out.csv")] == ["cat/\udcff.png", "dog/1.jpg"]
    with h5py.File(tmp_path / "out.h5") as file:
        assert file["id"][0] == b"cat/\xff.png"
    with safetensors.safe_open(tmp_path / "out.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["ids"]) == ["cat/\udcff.png", "dog/1.jpg"]


def test_parquet_holds_ids_labels_and_lists_of_fixed_size(
    tmp_path: Path, images: ImageSet, store: FeatureStore
) -> None:
    import pyarrow.parquet as pq

    key = filed(images, store, cut="layer1:none")
    report = export(store, key, tmp_path / "out.parquet")
    read = pq.read_table(tmp_path / "out.parquet")
    assert read["id"].to_pylist() == list(images.ids)
    assert read["split"].to_pylist() == images.splits.tolist()
    assert read["label"].to_pylist() == [image.partition("/")[0] for image in images.ids]
    assert read["digest"].to_pylist() == [row.tobytes() for row in images.digests().values]
    assert "group" not in read.column_names
    assert read["features"].type.list_size == 8 * 8 * 8
    values = np.array(read["features"].to_pylist(), np.float32).reshape(8, 8, 8, 8)
    np.testing.assert_array_equal(values, store.features(images, key).numpy().astype(np.float32))
    assert report.notes == (
        "the 8x8x8 features of an image are one list of 512 values, row-major",
        "float16 became float32; no value changed",
    )


def test_parquet_without_pyarrow_says_how_to_get_it(
    tmp_path: Path, images: ImageSet, store: FeatureStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = filed(images, store)
    monkeypatch.setitem(sys.modules, "pyarrow", None)  # as if it weren't installed
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(FeatureStoreError, match=r"needs pyarrow.*pip install 'featstore\[parquet\]'"):
        export(store, key, tmp_path / "out.parquet")


def test_texts_that_end_with_a_zero_byte_are_refused_for_hdf5_alone(tmp_path: Path, store: FeatureStore) -> None:
    images = ImageSet.from_arrays(pixels(2), ["a", "b\0"], groups=["p\0", "q"])
    key = filed(images, store)
    with pytest.raises(ValueError, match=r"The group 'p\\x00' ends with a zero byte.*\.npy or \.safetensors"):
        export(store, key, tmp_path / "out.h5")
    with pytest.raises(ValueError, match=r"The class 'b\\x00' ends with a zero byte"):
        export(store, key, tmp_path / "out.h5", images=replace(images, groups=None))
    export(store, key, tmp_path / "out.npy")
    assert [(row["label"], row["group"]) for row in table(tmp_path / "out.csv")] == [("a", "p\0"), ("b\0", "q")]
    by_id = images_by_id(["x", "y\0"], where="here", name="ids")
    imported = import_features(store, np.ones((2, 4), np.float32), by_id, name="clip")
    with pytest.raises(ValueError, match=r"The id 'y\\x00' ends with a zero byte"):
        export(store, imported.key, tmp_path / "out.h5", images=ImageSet.from_store(store, imported.images))
    assert not list(tmp_path.glob("*.h5*"))


# ---- Which rows


def test_rows_follow_the_images_that_are_asked_for(tmp_path: Path, images: ImageSet, store: FeatureStore) -> None:
    key = filed(images, store)
    chosen = images.select([6, 1, 3])
    export(store, key, tmp_path / "out.npy", images=chosen)
    np.testing.assert_array_equal(np.load(tmp_path / "out.npy"), store.features(images, key).numpy()[[6, 1, 3]])
    assert [row["id"] for row in table(tmp_path / "out.csv")] == list(chosen.ids)


def test_without_any_image_set_all_rows_are_exported_by_digest(
    tmp_path: Path, images: ImageSet, store: FeatureStore
) -> None:
    key = filed(images, store)
    for path in (tmp_path / "features" / "images").iterdir():
        path.unlink()
    export(FeatureStore(store.root), key, tmp_path / "out.npy")
    rows = table(tmp_path / "out.csv")
    digests = [row.tobytes().hex() for row in images.digests().values]
    assert [row["id"] for row in rows] == [row["digest"] for row in rows] == sorted(digests)
    order = np.argsort(digests)
    np.testing.assert_array_equal(np.load(tmp_path / "out.npy"), store.features(images, key).numpy()[order])


def test_images_known_by_content_alone_are_named_after_the_set(
    tmp_path: Path, images: ImageSet, store: FeatureStore
) -> None:
    key = filed(images, store)
    for path in (tmp_path / "features" / "images").iterdir():
        path.unlink()
    export(FeatureStore(store.root), key, tmp_path / "out.h5")
    assert Part.open(tmp_path / "out.h5").facts["images"]["name"] == f"set-{key[:8]}"


def test_a_store_named_relatively_is_exported_with_its_labels_from_any_folder(
    tmp_path: Path, images: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere" / "features").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    store = FeatureStore("features")
    key = filed(images, store)
    monkeypatch.chdir("elsewhere")
    export(store, key, "out.npy")
    assert [(row["id"], row["label"]) for row in table(Path("out.csv"))] == [
        (image, image.partition("/")[0]) for image in images.ids
    ]
    np.testing.assert_array_equal(np.load("out.npy"), store.features(images, key).numpy())


def test_several_image_sets_must_be_chosen_from(tmp_path: Path, images: ImageSet, store: FeatureStore) -> None:
    key = filed(images, store)
    extract(staged(), arrays(3), store, cuts=["layer2:avg"])
    with pytest.raises(AmbiguousRequestError, match=r"arrays-.*--images-name NAME"):
        export(store, key, tmp_path / "out.npy")
    report = export(store, key, tmp_path / "out.npy", images=ImageSet.from_store(store, "arrays"))
    assert report.rows == 3


def test_an_image_without_a_row_is_an_error_and_a_failed_one_can_be_left_out(
    tmp_path: Path, images: ImageSet, store: FeatureStore
) -> None:
    (tmp_path / "photos" / "cat" / "0.png").write_bytes(b"no picture")
    key = extract(staged(), images, store, cuts=["layer2:avg"], on_error="skip").keys[0]
    with pytest.raises(MissingFeaturesError, match=r"1 failed when they were extracted .*--on-error skip"):
        export(store, key, tmp_path / "out.npy")
    report = export(store, key, tmp_path / "out.npy", on_error="skip")
    assert (report.rows, report.left_out) == (7, 1)
    assert str(report).endswith(" bytes, 1 images without a row left out")
    assert [row["id"] for row in table(tmp_path / "out.csv")] == list(images.ids[1:])
    alone = images.select([0])
    with pytest.raises(FeatureStoreError, match="None of the 1 images of photos-select has a row"):
        export(store, key, tmp_path / "none.npy", images=alone, on_error="skip")


# ---- Files


@pytest.mark.parametrize("suffix", [".npy", ".h5", ".safetensors"])
def test_a_file_that_is_there_is_never_replaced(
    tmp_path: Path, images: ImageSet, store: FeatureStore, suffix: str
) -> None:
    key = filed(images, store)
    (tmp_path / f"out{suffix}").write_text("mine", encoding="utf-8")
    with pytest.raises(FileExistsError, match="isn't replaced"):
        export(store, key, tmp_path / f"out{suffix}")
    assert (tmp_path / f"out{suffix}").read_text(encoding="utf-8") == "mine"


def test_the_table_beside_npy_is_never_replaced_either(tmp_path: Path, images: ImageSet, store: FeatureStore) -> None:
    (tmp_path / "out.csv").write_text("mine", encoding="utf-8")
    with pytest.raises(FileExistsError):
        export(store, filed(images, store), tmp_path / "out.npy")
    assert not (tmp_path / "out.npy").exists()


@pytest.mark.parametrize("suffix", [".npy", ".h5", ".safetensors"])
def test_a_disk_that_is_full_leaves_no_file(tmp_path: Path, store: FeatureStore, suffix: str) -> None:
    images = ImageSet.from_arrays(pixels(40))
    key = filed(images, store, "float32", "layer1:none")
    (tmp_path / "out").mkdir()
    with largest_file(40_000), pytest.raises(OSError, match="too large"):
        export(store, key, tmp_path / "out" / f"out{suffix}")
    assert not list((tmp_path / "out").iterdir())


def test_a_damaged_part_is_never_exported(tmp_path: Path, images: ImageSet, store: FeatureStore) -> None:
    key = filed(images, store)
    part = store.set(key).parts[0]
    flip_bit(part.path, part.features_offset + 5)
    with pytest.raises(DamagedFileError, match=rf"{part.path.name} is damaged.*rows 0 to 7"):
        export(FeatureStore(store.root), key, tmp_path / "out.npy")
    assert not list(tmp_path.glob("*out*"))


def test_parts_that_are_merged_meanwhile_are_looked_up_again(
    tmp_path: Path, images: ImageSet, store: FeatureStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = filed(images.select(range(4)), store)
    filed(images.select(range(4, 8)), store)
    original = FeatureStore.features

    def before_a_merge(self: FeatureStore, *arguments: Any, **options: Any) -> Any:
        features = original(self, *arguments, **options)
        other = FeatureStore(store.root)
        other.compact()
        other.gc(older_than=0)
        return features

    monkeypatch.setattr(FeatureStore, "features", before_a_merge)
    export(store, key, tmp_path / "out.npy", images=images)
    assert torch.equal(read(tmp_path / "out.npy"), store.features(images, key)[:])


def test_what_is_to_be_done_about_damage_is_said_however_the_set_was_made(
    tmp_path: Path, images: ImageSet, store: FeatureStore
) -> None:
    imported = import_features(store, np.ones((8, 4), np.float32), images, name="clip").key
    for key in (filed(images, store), imported):
        (part,) = store.set(key).parts
        content = bytearray(part.path.read_bytes())
        content[part.features_offset] ^= 1
        part.path.write_bytes(content)
        with pytest.raises(DamagedFileError, match=r"featstore verify --repair\) and extract or import again"):
            export(FeatureStore(store.root), key, tmp_path / "out.npy")


def test_another_ending_and_an_absent_folder_are_refused(tmp_path: Path, images: ImageSet, store: FeatureStore) -> None:
    key = filed(images, store)
    with pytest.raises(ValueError, match=r"ends with \.txt.*\.npy, \.safetensors or \.parquet"):
        export(store, key, tmp_path / "out.txt")
    with pytest.raises(ValueError, match="ends with no suffix"):
        export(store, key, tmp_path / "out")
    with pytest.raises(ValueError, match=r"There is no folder .*absent"):
        export(store, key, tmp_path / "absent" / "out.npy")


def test_ids_that_a_safetensors_header_cannot_hold_are_refused(
    tmp_path: Path, images: ImageSet, store: FeatureStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = filed(images, store)
    monkeypatch.setattr(export_module, "_MAX_SAFETENSORS_HEADER", 1000)
    with pytest.raises(FeatureStoreError, match=r"safetensors reads 1,000.*Export them as \.h5"):
        export(store, key, tmp_path / "out.safetensors")


def test_the_report_is_a_sentence() -> None:
    report = ExportReport(
        key="ab" * 32,
        files=(Path("a.npy"), Path("a.csv")),
        rows=1200,
        left_out=0,
        shape=(1200, 3, 4),
        dtype="float16",
        bytes=28_800,
        notes=(),
    )
    assert str(report) == "1,200 rows of set abababab (3x4 float16) in a.npy and a.csv, 28,800 bytes"


MEMORY = """
import sys, threading
from pathlib import Path
from featstore import FeatureStore
import torch  # else its own memory would count
from featstore.exchange.export import export

def held():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) >> 10

store, out = FeatureStore(sys.argv[1]), Path(sys.argv[2])
key = store.sets()[0].key
before, most, is_done = held(), 0, threading.Event()

def watch():
    global most
    while not is_done.wait(0.002):
        most = max(most, held())

watching = threading.Thread(target=watch)
watching.start()
for suffix in (".npy", ".h5", ".safetensors"):
    export(store, key, out / f"out{suffix}")
    if suffix != ".npy":
        (out / f"out{suffix}").unlink()
is_done.set()
watching.join()
print(most - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux, which says what a process holds")
def test_an_export_takes_less_memory_than_its_rows(tmp_path: Path, store: FeatureStore, processes: Processes) -> None:
    made = store.set(filed(ImageSet.from_arrays(pixels(4)), store, "float32"))
    rows = 24_000
    values = torch.arange(rows * 4096, dtype=torch.float32).reshape(rows, 4096)
    pictures = np.random.default_rng(0).integers(0, 256, (rows, 3, 3, 3), dtype=np.uint8)
    images = ImageSet.from_arrays(pictures, np.arange(rows) % 2, groups=[row // 5 for row in range(rows)])
    digests = images.digests()
    wide = FeatureStore(tmp_path / "wide")
    decoders = np.zeros(rows, np.uint8)
    wide.write(made.spec, features=[values], digests=digests.values, decoders=decoders, facts=made.facts)
    wide.save_images(images, digests)
    held = processes.answer(MEMORY, str(wide.root), str(tmp_path))
    # Threads and the allocator keep 60 to 135 MB, whatever the number of rows: far from the half of these 393 MB.
    assert int(held) < 196, "MB held at most"
    np.testing.assert_array_equal(np.load(tmp_path / "out.npy", mmap_mode="r")[:, 0], values[:, 0])


def test_the_endings_that_a_program_lists_are_those_that_name_a_format() -> None:
    assert EXPORT_SUFFIXES == SUFFIXES
