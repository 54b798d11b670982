from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import safetensors.torch
import torch
from numpy.typing import NDArray
from support.full_disk import largest_file
from support.made_elsewhere import NUM, values
from support.tiny import arrays, photos, pixels, staged

from featstore import DamagedFileError, FeatureStore, FeatureStoreError, ImageSet, MissingFeaturesError, extract
from featstore.digest import canonical_json
from featstore.exchange.export import export
from featstore.exchange.feature_files import read_ids
from featstore.exchange.imports import import_features, import_file
from featstore.files.part import Part
from featstore.images.fileless import images_by_id, without_files
from training import Learner

# ---- Arrays


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(6,), (4, 6), (3, 2, 2)])
def test_features_made_elsewhere_come_back_bit_for_bit(
    images: ImageSet, store: FeatureStore, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    features = torch.from_numpy(values(shape=shape)).to(dtype)
    report = import_features(store, features, images, name="clip")
    assert torch.equal(store.features(images, report.key)[:], features)
    facts = store.set(report.key).facts
    assert (facts["backbone"], facts["cut"], facts["imported"]) == ("clip", "imported", {"source": "an array"})
    assert facts["stages"][0]["layout"] == {1: "NC", 2: "NLC", 3: "NCHW"}[len(shape)]
    assert (report.rows, report.written, report.images, report.notes) == (NUM, NUM, "photos", ())


@pytest.mark.parametrize("row", [0, NUM - 1])
def test_features_that_change_during_an_import_are_never_filed_under_the_key_of_others(
    tmp_path: Path, images: ImageSet, store: FeatureStore, monkeypatch: pytest.MonkeyPatch, row: int
) -> None:
    np.save(tmp_path / "made.npy", values())
    original = FeatureStore.save_images

    def while_someone_writes(self: FeatureStore, *arguments: Any) -> Any:
        np.load(tmp_path / "made.npy", mmap_mode="r+")[row, 2] += 1
        return original(self, *arguments)

    monkeypatch.setattr(FeatureStore, "save_images", while_someone_writes)
    with pytest.raises(FeatureStoreError, match=f"Row {row} of the features isn't what it was a moment ago"):
        import_file(store, tmp_path / "made.npy", name="clip", images=images, ids=images.ids)
    assert store.sets() == []


def test_rows_are_filed_under_the_content_of_the_images(images: ImageSet, store: FeatureStore, tmp_path: Path) -> None:
    features = values()
    key = import_features(store, features, images, name="clip").key
    (tmp_path / "photos" / "cat").rename(tmp_path / "photos" / "lion")
    renamed = ImageSet.from_folder(tmp_path / "photos")
    np.testing.assert_array_equal(
        store.features(renamed, key).numpy()[: NUM // 2], features_of(features, images, renamed)
    )


def features_of(features: NDArray[Any], images: ImageSet, renamed: ImageSet) -> NDArray[Any]:
    place = {bytes(digest): row for row, digest in enumerate(images.digests().values)}
    return features[[place[bytes(digest)] for digest in renamed.digests().values[: NUM // 2]]]


def test_float64_becomes_float32_and_is_refused_if_it_overflows(images: ImageSet, store: FeatureStore) -> None:
    features = values().astype(np.float64) / 3
    report = import_features(store, features, images, name="clip")
    np.testing.assert_array_equal(store.features(images, report.key).numpy(), features.astype(np.float32))
    assert report.notes == ("float64 became float32",)
    features[5, 2] = 1e39
    with pytest.raises(ValueError, match=rf"Row 5 \({images.ids[5]}\) has a value beyond 3\.4e\+38"):
        import_features(store, features, images, name="clip")


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused_by_row(images: ImageSet, store: FeatureStore, wrong: float) -> None:
    features = values()
    features[3, 1] = wrong
    with pytest.raises(ValueError, match=rf"Row 3 \({images.ids[3]}\) has a value that isn't finite"):
        import_features(store, features, images, name="clip")
    assert not store.root.exists()


def test_a_mapped_array_of_the_other_byte_order_is_read(images: ImageSet, store: FeatureStore, tmp_path: Path) -> None:
    np.save(tmp_path / "clip.npy", np.asfortranarray(values().astype(">f4")))
    key = import_features(store, np.load(tmp_path / "clip.npy", mmap_mode="r"), images, name="clip").key
    np.testing.assert_array_equal(store.features(images, key).numpy(), values())


def test_the_same_import_writes_nothing_in_whatever_order(images: ImageSet, store: FeatureStore) -> None:
    first = import_features(store, values(), images, name="clip")
    files = sorted(store.root.rglob("*.h5"))
    assert import_features(store, values(), images, name="clip").written == 0
    order = [5, 2, 7, 0, 1, 3, 6, 4]
    again = import_features(store, values()[order], images.select(order), name="clip")
    assert (again.key, again.written, again.rows) == (first.key, 0, NUM)
    assert sorted(store.root.glob("*@*/*/*.h5")) == [file for file in files if "images" not in file.parts]


def test_the_key_depends_on_values_type_layout_and_images(images: ImageSet, store: FeatureStore) -> None:
    changed = values()
    changed[7, 5] = np.nextafter(changed[7, 5], 1)
    maps = values(shape=(3, 2, 2))
    swapped = images.select([1, 0, *range(2, NUM)])
    keys = [
        import_features(store, values(), images, name="clip").key,
        import_features(store, changed, images, name="clip").key,
        import_features(store, values().astype(np.float16), images, name="clip").key,
        import_features(store, values(), swapped, name="clip").key,
        import_features(store, maps, images, name="clip").key,
        import_features(store, maps, images, name="clip", layout="NHWC").key,
    ]
    assert len(set(keys)) == len(keys)


def test_an_import_that_was_interrupted_writes_the_rest(
    images: ImageSet, store: FeatureStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("featstore.exchange.feature_files._BLOCK_BYTES", 2 * 6 * 4)
    monkeypatch.setattr("featstore.store.gathering.PART_BYTES", 1)
    key = import_features(store, values(), images, name="clip").key
    parts = store.set(key).parts
    assert [part.num_rows for part in parts] == [2, 2, 2, 2]
    parts[1].path.unlink()
    again = FeatureStore(store.root)
    report = import_features(again, values(), images, name="clip")
    assert (report.key, report.written) == (key, 2)
    np.testing.assert_array_equal(FeatureStore(store.root).features(images, key).numpy(), values())


def test_imported_features_never_fit_a_request(images: ImageSet, store: FeatureStore) -> None:
    import_features(store, values(), images, name="net")
    report = extract(staged(), images, store, cuts=["layer2:avg"])
    assert (report.computed, report.reused) == (NUM, 0)


def test_heads_train_on_imported_features(images: ImageSet, store: FeatureStore) -> None:
    features = values()
    features[:, 0] = np.asarray(images.targets) * 20 - 10
    key = import_features(store, features, images, name="clip").key
    stored = ImageSet.from_store(store)
    learn = Learner(store.model(key), stored, store, head="linear", device="cpu")
    learn.fit(5, lr=0.1)
    assert learn.evaluate()["accuracy"] == 1.0


def test_heads_train_on_imported_maps_through_a_pool(images: ImageSet, store: FeatureStore) -> None:
    key = import_features(store, values(shape=(3, 4, 4)), images, name="clip").key
    model = store.model(key)
    assert (model.shape("imported"), model.layout("imported")) == ((3, 4, 4), "NCHW")
    learn = Learner(model, ImageSet.from_store(store), store, head="linear", device="cpu")
    learn.fit(1, lr=0.1)


# ---- Images


def test_byte_identical_images_share_a_row(store: FeatureStore) -> None:
    shot = pixels(3)
    images = ImageSet.from_arrays(np.concatenate([shot, shot[:1]]))
    features = values(4)
    features[3] = features[0] * 1.0001
    report = import_features(store, features, images, name="clip")
    assert (report.rows, report.written) == (3, 3)
    np.testing.assert_array_equal(store.features(images, report.key).numpy()[3], features[0])
    features[3] = features[0] * 1.1
    with pytest.raises(FeatureStoreError, match="0 and 3 are byte for byte the same image, and their features differ"):
        import_features(store, features, images, name="clip")


def test_images_whose_files_are_gone_are_refused(images: ImageSet, store: FeatureStore, tmp_path: Path) -> None:
    (tmp_path / "photos" / images.ids[2]).unlink()
    with pytest.raises(FeatureStoreError, match=rf"1 of the images .* can't be read \({images.ids[2]}: .*by ids alone"):
        import_features(store, values(), images, name="clip")


def test_images_known_by_their_ids_alone_get_digests_of_set_and_id(store: FeatureStore) -> None:
    images = images_by_id(["a", "b\udcff", "c"], where="ids.txt", name="ids")
    report = import_features(store, values(3), images, name="clip")
    trunk = store.set(report.key).spec.trunk
    stored = ImageSet.from_store(store)
    assert (stored.name, stored.ids) == (f"clip-{report.key[:8]}", images.ids)
    assert [bytes(row) for row in stored.digests().values] == [
        hashlib.sha256(canonical_json(["imported", trunk, image]).encode()).digest() for image in images.ids
    ]
    np.testing.assert_array_equal(store.features(stored, report.key).numpy(), values(3))
    assert import_features(store, values(3), images, name="clip").written == 0


def test_two_imports_of_the_same_ids_are_never_joined_to_each_other(store: FeatureStore) -> None:
    images = images_by_id(["a", "b"], where="ids.txt", name="ids")
    clip = import_features(store, values(2), images, name="clip")
    dino = import_features(store, values(2, seed=1), images, name="dino")
    for report, seed in ((clip, 0), (dino, 1)):
        stored = ImageSet.from_store(store, report.images)
        np.testing.assert_array_equal(store.features(stored, report.key).numpy(), values(2, seed=seed))
    with pytest.raises(MissingFeaturesError):
        store.features(ImageSet.from_store(store, dino.images), clip.key)


def test_imports_of_one_name_keep_an_image_set_each(store: FeatureStore) -> None:
    reports = [
        import_features(store, values(2, seed=seed), images_by_id(ids, where="ids.txt", name="ids"), name="clip" * 30)
        for seed, ids in enumerate((["a", "b"], ["c", "d"]))
    ]
    for seed, report in enumerate(reports):
        stored = ImageSet.from_store(store, report.images)
        np.testing.assert_array_equal(store.features(stored, report.key).numpy(), values(2, seed=seed))
        assert (report.images.startswith("clip"), report.images.endswith(f"-{report.key[:8]}")) == (True, True)


def test_an_import_by_ids_never_replaces_the_image_set_of_an_extraction(images: ImageSet, store: FeatureStore) -> None:
    key = extract(staged(), images, store, cuts=["layer2:avg"]).keys[0]
    import_features(store, values(), images_by_id(images.ids, where="ids.txt", name="photos"), name="photos")
    stored = ImageSet.from_store(store, "photos")
    np.testing.assert_array_equal(stored.targets, images.targets)
    assert torch.equal(store.features(stored, key)[:], store.features(images, key)[:])


def test_the_trunk_is_the_digest_that_the_format_names(store: FeatureStore) -> None:
    images = arrays(3)
    features = values(3)
    report = import_features(store, features, images, name="clip")
    rows = sorted(
        hashlib.sha256(bytes(digest) + row.astype("<f4").tobytes()).digest()
        for digest, row in zip(images.digests().values, features, strict=True)
    )
    header = canonical_json(["imported", 1, "float32", [6], "NC", 3]).encode()
    assert store.set(report.key).spec.trunk == hashlib.sha256(header + b"".join(rows)).hexdigest()


@pytest.mark.parametrize(
    ("features", "error", "sentence"),
    [
        (values(5), ValueError, "5 rows of features and 8 images in photos"),
        (values().astype(np.int32), TypeError, r"features are int32. Expected float16, float32, float64 or bfloat16"),
        (torch.zeros(NUM, 2, dtype=torch.int64), TypeError, "features are int64"),
        (values()[:, 0], ValueError, r"have the shape \(8,\). Expected \(N, \*F\)"),
        (values()[:0], ValueError, r"have the shape \(0, 6\)"),
        (values(shape=(0,)), ValueError, r"have the shape \(8, 0\)"),
        ([[1.0]], TypeError, "features is a list"),
    ],
)
def test_what_is_no_matrix_of_features_is_refused(
    images: ImageSet, store: FeatureStore, features: Any, error: type[Exception], sentence: str
) -> None:
    with pytest.raises(error, match=sentence):
        import_features(store, features, images, name="clip")


def test_a_name_and_a_fitting_layout_are_expected(images: ImageSet, store: FeatureStore) -> None:
    with pytest.raises(ValueError, match="name is ' '"):
        import_features(store, values(), images, name=" ")
    for layout in ("NCHW", "HWC"):
        with pytest.raises(ValueError, match=rf"layout is '{layout}' for rows of 6"):
            import_features(store, values(), images, name="clip", layout=layout)


def test_a_full_disk_is_an_error_and_the_next_import_completes(images: ImageSet, store: FeatureStore) -> None:
    features = values(shape=(3000,))
    with largest_file(50_000), pytest.raises(OSError, match="too large"):
        import_features(store, features, images, name="clip")
    report = import_features(store, features, images, name="clip")
    assert report.written == NUM


# ---- Files, joined by id


def test_rows_of_a_file_follow_their_ids_never_their_place(
    images: ImageSet, store: FeatureStore, tmp_path: Path
) -> None:
    order = [3, 1, 7, 0, 2, 6, 5, 4]
    np.save(tmp_path / "clip.npy", values()[order])
    ids = [images.ids[place] for place in order]
    report = import_file(store, tmp_path / "clip.npy", name="clip", images=images, ids=ids)
    np.testing.assert_array_equal(store.features(images, report.key).numpy(), values())
    assert report.notes == ()
    assert store.set(report.key).facts["imported"] == {"source": "clip.npy"}


def test_ids_without_image_and_images_without_row_are_counted_and_named(
    images: ImageSet, store: FeatureStore, tmp_path: Path
) -> None:
    np.save(tmp_path / "clip.npy", values(7))
    ids = ["x/1.jpg", *images.ids[:5], "x/2.jpg"]
    report = import_file(store, tmp_path / "clip.npy", name="clip", images=images, ids=ids)
    assert report.notes == (
        "2 ids are no image of photos, and not imported (x/1.jpg, x/2.jpg)",
        f"3 images of photos have no row ({', '.join(images.ids[5:])})",
    )
    np.testing.assert_array_equal(store.features(images.select(range(5)), report.key).numpy(), values(7)[1:6])
    with pytest.raises(MissingFeaturesError, match="3 are missing"):
        store.features(images, report.key)


@pytest.mark.parametrize(
    ("ids", "sentence"),
    [
        (None, r"clip\.npy holds no ids.*never joined by position.*--ids ids\.txt"),
        (["a"] * 7, r"There are 7 ids for the 8 rows of .*clip\.npy"),
        ([*"abcdef", "a", "b"], r"2 ids .* are given more than once \(a, b\)"),
        ([*"abcdefgh"], r"None of the 8 ids .* \(a, b, c, \.\.\.\) is an image of photos \(cat/0\.png, "),
    ],
)
def test_ids_that_cannot_be_joined_are_refused(
    images: ImageSet, store: FeatureStore, tmp_path: Path, ids: list[str] | None, sentence: str
) -> None:
    np.save(tmp_path / "clip.npy", values())
    with pytest.raises(ValueError, match=sentence):
        import_file(store, tmp_path / "clip.npy", name="clip", images=images, ids=ids)


def test_the_table_beside_npy_is_named_but_never_guessed(images: ImageSet, store: FeatureStore, tmp_path: Path) -> None:
    np.save(tmp_path / "clip.npy", values())
    (tmp_path / "clip.csv").write_text("id\na\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"Give --ids .*clip\.csv, which is there"):
        import_file(store, tmp_path / "clip.npy", name="clip", images=images)


@pytest.mark.parametrize("id_dataset", ["id", "ids", "sample_id", "name"])
@pytest.mark.parametrize("as_text", [True, False])
def test_hdf5_brings_its_ids(
    images: ImageSet, store: FeatureStore, tmp_path: Path, id_dataset: str, as_text: bool
) -> None:
    with h5py.File(tmp_path / "clip.h5", "w") as file:
        file.create_dataset("embedding", data=values(), chunks=(3, 6), compression="gzip")
        ids = list(images.ids)
        file[id_dataset] = ids if as_text else np.array([name.encode() for name in ids])
    named = None if id_dataset != "name" else "name"
    report = import_file(store, tmp_path / "clip.h5", name="clip", images=images, dataset="embedding", id_dataset=named)
    np.testing.assert_array_equal(store.features(images, report.key).numpy(), values())


def test_numbers_are_ids_as_well(store: FeatureStore, tmp_path: Path) -> None:
    with h5py.File(tmp_path / "clip.h5", "w") as file:
        file["features"], file["id"] = values(3), np.array([7, 5, 11])
    report = import_file(store, tmp_path / "clip.h5", name="clip")
    assert ImageSet.from_store(store).ids == ("7", "5", "11")
    assert report.rows == 3


def test_a_dataset_that_is_not_there_is_named(images: ImageSet, store: FeatureStore, tmp_path: Path) -> None:
    with h5py.File(tmp_path / "clip.h5", "w") as file:
        file["embedding"] = values()
        file.create_group("more")
    with pytest.raises(ValueError, match=r"no dataset 'features'; at its top are embedding, more\..*--dataset"):
        import_file(store, tmp_path / "clip.h5", name="clip", images=images)
    with pytest.raises(ValueError, match="no dataset 'more'"):
        import_file(store, tmp_path / "clip.h5", name="clip", images=images, dataset="more")
    with pytest.raises(ValueError, match=r"no dataset 'names'.*--id-dataset"):
        import_file(store, tmp_path / "clip.h5", name="clip", dataset="embedding", id_dataset="names")
    safetensors.torch.save_file({"a": torch.ones(2, 2)}, tmp_path / "clip.safetensors")
    with pytest.raises(ValueError, match="no tensor 'features'; it has a"):
        import_file(store, tmp_path / "clip.safetensors", name="clip")


@pytest.mark.parametrize("suffix", [".h5", ".safetensors"])
@pytest.mark.parametrize("dtype", ["float16", "float32", "bfloat16"])
def test_what_was_exported_is_imported_bit_for_bit_with_its_images(
    images: ImageSet, store: FeatureStore, tmp_path: Path, suffix: str, dtype: str
) -> None:
    key = extract(staged(), images, store, cuts=["layer1:none"], dtype=dtype).keys[0]
    export(store, key, tmp_path / f"out{suffix}")
    other = FeatureStore(tmp_path / "other")
    report = import_file(other, tmp_path / f"out{suffix}", name="net")
    back = ImageSet.from_store(other)
    assert (back.name, back.ids, back.classes, back.task) == (images.name, images.ids, images.classes, images.task)
    np.testing.assert_array_equal(back.splits, images.splits)
    np.testing.assert_array_equal(back.targets, images.targets)
    stored = store.features(images, key)[:]
    for asked in (back, images):  # the very photographs find their rows as well
        found = other.features(asked, report.key)[:]
        assert found.dtype == stored.dtype
        assert torch.equal(found, stored)


def test_an_exported_npy_is_imported_with_the_table_beside_it(
    images: ImageSet, store: FeatureStore, tmp_path: Path
) -> None:
    key = extract(staged(), images, store, cuts=["layer2:avg"]).keys[0]
    export(store, key, tmp_path / "out.npy")
    table = read_ids(tmp_path / "out.csv")
    described = without_files(
        images_by_id(table.ids, where="out.csv", name="out"), where="out.csv", digests=table.digests
    )
    other = FeatureStore(tmp_path / "other")
    report = import_file(other, tmp_path / "out.npy", name="net", images=described, ids=table.ids)
    assert torch.equal(other.features(images, report.key)[:], store.features(images, key)[:])


def test_several_labels_and_groups_survive_the_round_trip(store: FeatureStore, tmp_path: Path) -> None:
    images = ImageSet.from_arrays(pixels(3), [["a", "b"], [], ["b"]], task="multi", groups=["p", "p", "q"], name="many")
    key = extract(staged(), images, store, cuts=["layer2:avg"]).keys[0]
    for suffix in (".h5", ".safetensors"):
        export(store, key, tmp_path / f"out{suffix}")
        other = FeatureStore(tmp_path / f"other{suffix}")
        import_file(other, tmp_path / f"out{suffix}", name="net")
        back = ImageSet.from_store(other)
        assert (back.task, back.groups) == ("multi", ("p", "p", "q"))
        np.testing.assert_array_equal(back.targets, images.targets)


def test_a_part_of_a_store_needs_ids_like_any_other_file(images: ImageSet, store: FeatureStore, tmp_path: Path) -> None:
    key = extract(staged(), images, store, cuts=["layer2:avg"]).keys[0]
    part = store.set(key).parts[0].path
    with pytest.raises(ValueError, match="holds no ids"):
        import_file(FeatureStore(tmp_path / "other"), part, name="net")


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("clip.npy", b"no array", r"can't be read as \.npy"),
        ("clip.npy", b"", r"can't be read as \.npy"),
        ("clip.h5", b"no hdf5", "can't be read as HDF5"),
        ("clip.safetensors", b"no tensors", "can't be read as safetensors"),
    ],
)
def test_a_file_that_is_not_what_its_ending_says_is_named(
    store: FeatureStore, tmp_path: Path, name: str, content: bytes, sentence: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DamagedFileError, match=rf"{name} {sentence}.*undamaged copy"):
        import_file(store, tmp_path / name, name="clip", ids=["a"])


def test_a_pickle_is_never_loaded(store: FeatureStore, tmp_path: Path) -> None:
    np.save(tmp_path / "clip.npy", np.array([{"a": 1}], dtype=object))
    with pytest.raises(DamagedFileError):
        import_file(store, tmp_path / "clip.npy", name="clip", ids=["a"])


def test_a_compressed_piece_that_is_damaged_is_named(images: ImageSet, store: FeatureStore, tmp_path: Path) -> None:
    with h5py.File(tmp_path / "clip.h5", "w") as file:
        made = file.create_dataset("features", data=values(), chunks=(8, 6), compression="gzip")
        place = made.id.get_chunk_info(0).byte_offset
        file["id"] = list(images.ids)
    content = bytearray((tmp_path / "clip.h5").read_bytes())
    content[place : place + 8] = bytes(8)
    (tmp_path / "clip.h5").write_bytes(content)
    with pytest.raises(DamagedFileError, match=r"clip\.h5 is damaged: its rows 0 to 7 can't be read"):
        import_file(store, tmp_path / "clip.h5", name="clip", images=images)


def test_a_damaged_export_is_never_imported(images: ImageSet, store: FeatureStore, tmp_path: Path) -> None:
    key = extract(staged(), images, store, cuts=["layer2:avg"]).keys[0]
    export(store, key, tmp_path / "out.h5")
    place = Part.open(tmp_path / "out.h5").features_offset + 9
    content = bytearray((tmp_path / "out.h5").read_bytes())
    content[place] ^= 1
    (tmp_path / "out.h5").write_bytes(content)
    with pytest.raises(DamagedFileError, match=r"out\.h5 is damaged: the features of rows 0 to 7"):
        import_file(FeatureStore(tmp_path / "other"), tmp_path / "out.h5", name="net")
    assert not (tmp_path / "other").exists()


def test_every_bit_of_an_exported_safetensors_file_counts(
    images: ImageSet, store: FeatureStore, tmp_path: Path
) -> None:
    key = extract(staged(), images, store, cuts=["layer2:avg"]).keys[0]
    export(store, key, tmp_path / "out.safetensors")
    whole = (tmp_path / "out.safetensors").read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    named = whole.index(b"cat/")  # in the ids
    split = whole.index(b"train")
    for place in (header, header + 9, (header + len(whole)) // 2, len(whole) - 1, named, split):
        content = bytearray(whole)
        content[place] ^= 1
        (tmp_path / "out.safetensors").write_bytes(content)
        with pytest.raises(DamagedFileError, match=r"out\.safetensors is damaged, .* Nothing was imported"):
            import_file(FeatureStore(tmp_path / "other"), tmp_path / "out.safetensors", name="net")
    assert not (tmp_path / "other").exists()


def test_an_exported_safetensors_file_without_checksums_is_read_as_before(
    images: ImageSet, store: FeatureStore, tmp_path: Path
) -> None:
    key = extract(staged(), images, store, cuts=["layer2:avg"]).keys[0]
    export(store, key, tmp_path / "out.safetensors")
    with safetensors.safe_open(tmp_path / "out.safetensors", framework="pt") as file:
        metadata = file.metadata()
    tensors = safetensors.torch.load_file(tmp_path / "out.safetensors")
    del metadata["checksums"]
    safetensors.torch.save_file(tensors, tmp_path / "older.safetensors", metadata)
    other = FeatureStore(tmp_path / "other")
    report = import_file(other, tmp_path / "older.safetensors", name="net")
    assert ImageSet.from_store(other).classes == images.classes
    assert torch.equal(other.features(images, report.key)[:], store.features(images, key)[:])


@pytest.mark.parametrize("ids", ["a,b,c,d", '"abcd"', "5", '[["a"],["b"],["c"],["d"]]', "[" * 100_000])
def test_ids_in_metadata_that_are_no_list_of_texts_are_none(store: FeatureStore, tmp_path: Path, ids: str) -> None:
    safetensors.torch.save_file({"features": torch.ones(4, 5)}, tmp_path / "clip.safetensors", {"ids": ids})
    with pytest.raises(ValueError, match=r"clip\.safetensors holds no ids \(its metadata ids is .* no JSON list"):
        import_file(store, tmp_path / "clip.safetensors", name="clip")
    assert import_file(store, tmp_path / "clip.safetensors", name="clip", ids="abcd").rows == 4


def test_metadata_of_others_describes_no_images(store: FeatureStore, tmp_path: Path) -> None:
    tensors = {"features": torch.ones(2, 5), "digests": torch.zeros(2, 32, dtype=torch.uint8)}
    for facts in ("{}", "no JSON", "[]"):
        metadata = {"ids": "[1, 2]", "facts": facts, "splits": "[]"}
        safetensors.torch.save_file(tensors, tmp_path / "clip.safetensors", metadata)
        report = import_file(store, tmp_path / "clip.safetensors", name="clip")
        assert ImageSet.from_store(store, report.images).ids == ("1", "2")
    metadata["facts"] = '{"images": {"name": "x", "classes": []}}'
    safetensors.torch.save_file(tensors, tmp_path / "clip.safetensors", metadata)
    with pytest.raises(DamagedFileError, match=r"clip\.safetensors doesn't describe its images .*KeyError: 'task'"):
        import_file(store, tmp_path / "clip.safetensors", name="clip")


def test_float64_that_float32_turns_into_zeros_is_refused_or_named(store: FeatureStore) -> None:
    images = images_by_id(["a", "b"], where="here", name="x")
    small = np.array([[1e-60, 2e-60], [3e-60, 0]])
    with pytest.raises(ValueError, match=r"reach 3e-60 only.*float32.*1\.4e-45.*Multiply them"):
        import_features(store, small, images, name="clip")
    assert import_features(store, np.zeros((2, 2)), images, name="clip").notes == ("float64 became float32",)
    (note,) = import_features(store, small + np.array([[0, 1.0], [0, 0]]), images, name="clip").notes
    assert "66.7 % of the values that aren't zero became zeros" in note
    (note,) = import_features(store, small + 1, images, name="clip").notes
    assert note == "float64 became float32"


def test_another_ending_and_an_absent_file_are_refused(store: FeatureStore, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"ends with \.txt.*\.npy, \.h5, \.hdf5 or \.safetensors"):
        import_file(store, tmp_path / "clip.txt", name="clip")
    with pytest.raises(ValueError, match="There is no file"):
        import_file(store, tmp_path / "clip.npy", name="clip")


def test_names_of_any_spelling_come_back_from_every_export(store: FeatureStore, tmp_path: Path) -> None:
    folder = photos(tmp_path / "photos", 6)
    for old, new in (("cat/2.jpg", "cat/Icon\r.jpg"), ("cat/4.jpg", "cat/x\r\ny.jpg"), ("dog/1.jpg", 'dog/,"\n.jpg')):
        (folder / old).rename(folder / new)
    (folder / "cat").rename(folder / " cat")
    shutil.copytree(folder / "dog", folder / "cat")  # as " cat", but for the space
    images = ImageSet.from_folder(folder)
    key = extract(staged(), images, store, cuts=["layer2:avg"]).keys[0]
    for suffix in (".npy", ".h5", ".safetensors"):
        export(store, key, tmp_path / f"out{suffix}")
        ids = read_ids(tmp_path / "out.csv").ids if suffix == ".npy" else None
        other = FeatureStore(tmp_path / f"other{suffix}")
        report = import_file(other, tmp_path / f"out{suffix}", name="net", images=images, ids=ids)
        assert report.notes == ()
        assert torch.equal(other.features(images, report.key)[:], store.features(images, key)[:])
    table = ImageSet.from_csv(tmp_path / "out.csv", root=folder, path_column="id", split_column="split")
    assert table.ids == images.ids
