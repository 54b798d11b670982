"""The commands that carry feature sets to another key, to a file, from a file."""

from __future__ import annotations

import re
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from support import two_sets
from support.programs import Run
from support.two_sets import NUM, damage, featstore, images_and_store, key_of, store

from featstore import FeatureStore, ImageSet
from training import Learner


@pytest.fixture
def here(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return two_sets.copied(made, tmp_path / "here", monkeypatch)


# ---- adopt


def test_adopt_files_the_set_for_the_same_model_in_another_spelling(run: Run) -> None:
    flags = ["--images", "photos", "--backbone", "two.py:make_model", "--size", "32"]
    key = key_of()
    ran = featstore(run, "adopt", key[:8], *flags, "--json")
    assert (ran.code, ran.err) == (0, "")
    report = ran.json
    assert (report["key_from"], report["rows"], report["compared"]) == (key, NUM, NUM)
    extract = ["extract", *images_and_store(), "--backbone", "two.py:make_model", "--size", "32", "--cut", "body:avg"]
    assert [each["computed"] for each in run("featstore", *extract, "--json").json["sets"]] == [0]
    shown = featstore(run, "show", report["key_to"])
    assert re.search(rf"^adopted\.key +{key}$", shown.out, re.MULTILINE)
    again = featstore(run, "adopt", key[:8], *flags, "--rows", "5", "--workers", "0", "--batch-size", "4")
    assert again.out.startswith(f"0 rows of set {key[:8]} filed under {report['key_to'][:8]}; 5 computed again")


def test_adopt_says_how_images_were_read(run: Run) -> None:
    Path("photos/cat/notes.txt").write_text("no image", encoding="utf-8")
    ran = featstore(run, "adopt", key_of(), "--images", "photos", "--backbone", "two.py:make_model", "--size", "32")
    assert ran.code == 0
    assert "notes.txt" in ran.err


def test_adopt_refuses_another_model_and_other_facts(run: Run) -> None:
    key = key_of()
    other = featstore(run, "adopt", key, "--images", "photos", "--backbone", "other.py:make_model", "--size", "32")
    assert other.code == 1
    assert "computes other values" in other.err
    resized = ["--size", "32", "--resize", "40"]
    larger = featstore(run, "adopt", key, "--images", "photos", "--backbone", "two.py:make_model", *resized)
    assert larger.code == 1
    assert "differ in resize (stored 37, yours 40)" in larger.err
    assert len(store().sets()) == 2


# ---- export and import


@pytest.mark.parametrize("suffix", [".npy", ".h5", ".safetensors"])
def test_what_export_writes_import_files_bit_for_bit(run: Run, suffix: str) -> None:
    key = key_of()
    ran = featstore(run, "export", key[:8], "--out", f"out{suffix}")
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.startswith(f"{NUM} rows of set {key[:8]} (8 float16) in out{suffix}")
    ids = ["--ids", "out.csv"] if suffix == ".npy" else []
    back = run("featstore", "import", f"out{suffix}", "--store", "back", "--name", "mine", *ids, "--json")
    assert back.code == 0
    images = ImageSet.from_folder("photos")
    found = FeatureStore("back").features(images, back.json["key"])
    assert torch.equal(found[:], store().features(images, key)[:])
    stored, described = ImageSet.from_store(store()), ImageSet.from_store(FeatureStore("back"))
    assert described.ids == stored.ids
    assert described.splits.tolist() == stored.splits.tolist()
    np.testing.assert_array_equal(described.targets, stored.targets)


def test_export_as_json_and_of_a_named_image_set(run: Run) -> None:
    report = featstore(run, "export", key_of(), "--out", "out.npy", "--images-name", "photos", "--json").json
    assert (report["files"], report["rows"], report["shape"]) == (["out.npy", "out.csv"], NUM, [NUM, 8])
    missing = featstore(run, "export", key_of(), "--out", "more.npy", "--images-name", "birds")
    assert missing.code == 1
    assert "holds no image set called birds" in missing.err
    assert featstore(run, "export", key_of(), "--out", "out.npy").err == (
        "out.npy: it exists and isn't replaced; choose another name.\n"
    )
    assert featstore(run, "export", key_of(), "--out", "out.txt").code == 2
    assert featstore(run, "export", key_of(), "--out", "a.npy", "--on-error", "ignore").code == 2


def test_import_joins_rows_to_images_by_id(run: Run) -> None:
    images = ImageSet.from_folder("photos")
    order = np.random.default_rng(0).permutation(NUM)
    values = np.arange(NUM * 3, dtype=np.float32).reshape(NUM, 3)
    np.save("clip.npy", values[order])
    lines = "".join(f"{images.ids[place]}\n" for place in order)
    Path("ids.txt").write_text(lines, encoding="utf-8")
    flags = ["--name", "clip", "--images", "photos", "--ids", "ids.txt"]
    ran = featstore(run, "import", "clip.npy", *flags, "--json")
    assert ran.code == 0
    np.testing.assert_array_equal(store().features(images, ran.json["key"]).numpy(), values)
    again = featstore(run, "import", "clip.npy", *flags)
    assert again.out.startswith(f"0 rows written, {NUM} reused (3 float32): set {ran.json['key'][:8]}")


def test_import_by_ids_alone_takes_labels_and_splits_from_the_table(run: Run) -> None:
    values = np.array([[20.0 * (place % 2) - 10, 1.0] for place in range(20)], np.float16)
    np.save("clip.npy", values)
    rows = [f"{place},{'ab'[place % 2]},{'valid' if place > 15 else 'train'}" for place in range(20)]
    Path("table.csv").write_text("\n".join(["id,label,split", *rows]), encoding="utf-8")
    ran = run("featstore", "import", "clip.npy", "--store", "new", "--name", "clip", "--ids", "table.csv")
    assert ran.code == 0
    key = re.search(r"set ([0-9a-f]{8}), image set clip-\1$", ran.out, re.MULTILINE)
    assert key is not None
    filed = FeatureStore("new")
    images = ImageSet.from_store(filed)
    assert (images.name, images.classes) == (f"clip-{key[1]}", ("a", "b"))
    assert (len(images.train), len(images.valid)) == (16, 4)
    learn = Learner(filed.model(key[1]), images, filed, head="linear", device="cpu")
    learn.fit(5, lr=0.5)
    assert learn.evaluate()["accuracy"] == 1.0
    # What the last line says works as it stands.
    assert ran.last_words.startswith("A head on it: Learner(")
    expression = ran.last_words.partition(": ")[2]
    names = {"Learner": Learner, "ImageSet": ImageSet, "store": filed}
    assert isinstance(eval(expression, names), Learner)


def test_import_by_ids_alone_deals_a_table_without_splits_and_says_so(run: Run) -> None:
    np.save("clip.npy", np.ones((10, 2), np.float32))
    Path("table.tsv").write_text("file\tkind\n" + "".join(f"./{n}\tx\n" for n in range(10)), encoding="utf-8")
    columns = ["--path-column", "file", "--label-column", "kind"]
    flags = ["--store", "new", "--name", "clip", "--ids", "table.tsv", *columns]
    ran = run("featstore", "import", "clip.npy", *flags)
    assert ran.code == 0
    assert ran.err.startswith(
        "only one class was found, 'x', of 10 images; is it the right column?\nno split column: 2 of 10 images held out"
    )
    images = ImageSet.from_store(FeatureStore("new"))
    assert (images.ids[0], images.classes, len(images.valid)) == ("./0", ("x",), 2)


def test_a_table_that_was_sorted_still_fits_its_rows(run: Run) -> None:
    key = key_of()
    featstore(run, "export", key, "--out", "out.npy")
    header, *lines = Path("out.csv").read_text(encoding="utf-8").splitlines()
    Path("out.csv").write_text("\n".join([header, *lines[::-1]]), encoding="utf-8")
    back = run("featstore", "import", "out.npy", "--store", "back", "--name", "mine", "--ids", "out.csv", "--json")
    images = ImageSet.from_folder("photos")
    found = FeatureStore("back").features(images, back.json["key"])
    assert torch.equal(found[:], store().features(images, key)[:])
    described = ImageSet.from_store(FeatureStore("back"))
    labels = {image: described.classes[target] for image, target in zip(described.ids, described.targets, strict=True)}  # type: ignore[arg-type]
    assert labels == {image: image.partition("/")[0] for image in images.ids}


def test_import_of_hdf5_takes_named_datasets(run: Run) -> None:
    with h5py.File("clip.h5", "w") as file:
        file["embedding"], file["name"] = np.ones((2, 3)), ["cat/000.jpg", "no/such.jpg"]
    flags = ["--name", "clip", "--images", "photos", "--dataset", "embedding", "--id-dataset", "name"]
    ran = featstore(run, "import", "clip.h5", *flags, "--json")
    assert (ran.code, ran.json["rows"]) == (0, 1)
    assert ran.json["notes"] == [
        "1 id is no image of photos, and not imported (no/such.jpg)",
        f"{NUM - 1} images of photos have no row (cat/001.jpg, cat/002.jpg, cat/003.jpg, ...)",
        "float64 became float32",
    ]
    assert "1 id is no image of photos" in ran.err


def test_import_says_what_it_needs(run: Run) -> None:
    np.save("clip.npy", np.ones((2, 2), np.float32))
    named = ["--name", "clip"]
    ran = featstore(run, "import", "clip.npy", *named)
    assert (ran.code, "--ids ids.txt" in ran.err) == (2, True)
    ran = featstore(run, "import", "clip.npy", *named, "--valid", "0.5")
    assert ran.code == 2
    assert "--valid 0.5 is about images, and neither --images nor a table of ids is given" in ran.err
    assert featstore(run, "import", "clip.npy").code == 2
    assert featstore(run, "import", "clip.npy", *named, "--layout", "CHW").code == 2


def test_a_remedy_of_import_works(run: Run) -> None:
    featstore(run, "export", key_of(), "--out", "out.npy")
    ran = run("featstore", "import", "out.npy", "--store", "back", "--name", "mine")
    remedy = re.search(r"Give (--ids \S+), which is there", ran.err)
    assert remedy is not None
    assert run("featstore", "import", "out.npy", "--store", "back", "--name", "mine", *remedy[1].split()).code == 0


def test_the_remedy_for_a_damaged_part_works(run: Run) -> None:
    path = damage()
    ran = featstore(run, "export", key_of(), "--out", "out.npy")
    assert ran.code == 1
    assert path.name in ran.err
    assert "set it aside (featstore verify --repair) and extract or import again" in ran.err
    assert featstore(run, "verify", "--repair").code == 0
    flags = ["--backbone", "one.py:make_model", "--size", "32", "--cut", "body:avg"]
    assert run("featstore", "extract", *images_and_store(), *flags).code == 0
    assert featstore(run, "export", key_of(), "--out", "out.npy").code == 0
