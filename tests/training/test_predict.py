from __future__ import annotations

import csv
import math
import tarfile
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from support.tiny import photos, staged
from torch import nn

from featstore import ImageSet
from training import Learner, Prediction
from training.predict import as_images, predictions, probabilities, write_csv

CLASSES = ("cat, big", 'the "dog"', "Ёж", "鳥")


def softmax(row: list[float]) -> list[float]:
    """By hand, in double precision."""
    exponentials = [math.exp(value - max(row)) for value in row]
    return [value / sum(exponentials) for value in exponentials]


def test_probabilities_are_softmax_for_one_class_and_sigmoid_for_several_labels() -> None:
    logits = torch.tensor([[0.5, -1.0, 3.0], [100.0, -100.0, 0.0]])
    single, multi = probabilities(logits, "single"), probabilities(logits, "multi")
    assert single == pytest.approx(np.array([softmax(row) for row in logits.tolist()]), abs=1e-15)
    assert single.sum(axis=1) == pytest.approx([1, 1], abs=1e-15)
    assert multi[0] == pytest.approx([1 / (1 + math.exp(-value)) for value in (0.5, -1.0, 3.0)], abs=1e-15)
    assert single.dtype == multi.dtype == np.float64


def test_a_prediction_names_the_most_probable_class_and_the_five_best() -> None:
    classes = ("a", "b", "c", "d", "e", "f")
    values = np.array([[0.05, 0.4, 0.1, 0.3, 0.1, 0.05], [0.5, 0.5, 0.0, 0.0, 0.0, 0.0]])
    first, tied = predictions(["x.jpg", "y.jpg"], values, classes, "single")
    assert (first.image, first.label, first.probability) == ("x.jpg", "b", 0.4)
    assert first.top == (("b", 0.4), ("d", 0.3), ("c", 0.1), ("e", 0.1), ("a", 0.05))
    assert tied.label == "a", "of equal ones the first class counts, as in the metrics"
    (two,) = predictions(["x.jpg"], np.array([[0.25, 0.75]]), ("a", "b"), "single")
    assert two.top == (("b", 0.75), ("a", 0.25))


def test_several_labels_are_those_of_at_least_one_half() -> None:
    values = np.array([[0.9, 0.2, 0.5], [0.1, 0.2, 0.3]])
    some, none = predictions(["x", "y"], values, ("sun", "sea", "sky"), "multi")
    assert (some.label, some.probability) == ("sun;sky", 0.9)
    assert (none.label, none.probability) == ("", 0.3)
    assert none.top[0] == ("sky", 0.3)


def test_json_has_the_contracts_names() -> None:
    assert Prediction("x.jpg", "cat", 0.75, (("cat", 0.75), ("dog", 0.25))).facts() == {
        "image": "x.jpg",
        "label": "cat",
        "probability": 0.75,
        "top": [{"label": "cat", "probability": 0.75}, {"label": "dog", "probability": 0.25}],
    }


def test_a_table_comes_back_as_it_was_written(tmp_path: Path) -> None:
    ids = ["a, b.jpg", 'say "hi".png', "größe/日本.jpg", "line\nbreak.jpg"]
    values = np.random.default_rng(0).dirichlet(np.ones(4), size=4)
    write_csv(tmp_path / "table.csv", ids, values, CLASSES, "single")
    with (tmp_path / "table.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["image", "label", "probability", *CLASSES]
    assert [row["image"] for row in rows] == ids
    assert [row["label"] for row in rows] == [CLASSES[place] for place in values.argmax(axis=1)]
    written = np.array([[float(row[name]) for name in CLASSES] for row in rows])
    assert written == pytest.approx(values, abs=5e-7)
    assert [float(row["probability"]) for row in rows] == pytest.approx(values.max(axis=1), abs=5e-7)


def test_a_table_needs_one_id_a_row(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"shorter|longer"):
        write_csv(tmp_path / "table.csv", ["a"], np.full((2, 4), 0.25), CLASSES, "single")


@pytest.fixture
def inbox(tmp_path: Path) -> Path:
    root = photos(tmp_path / "in box", 4)
    for name in ("deep/er/ä.JPG", ".hidden.jpg", ".trash/old.jpg", "deep/.more/x.jpg"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes((root / "dog/1.jpg").read_bytes())
    (root / "notes.txt").write_text("not an image")
    (root / "folder.jpg").mkdir()
    return root


def test_a_folder_gives_its_images_at_any_depth_sorted_without_hidden_ones(inbox: Path) -> None:
    names = [Path(name).relative_to(inbox).as_posix() for name in as_images(inbox).ids]
    assert names == ["cat/0.png", "cat/2.jpg", "deep/er/ä.JPG", "dog/1.jpg", "dog/3.png"]


def test_a_folder_whose_own_name_is_hidden_still_counts(tmp_path: Path) -> None:
    assert len(as_images(photos(tmp_path / ".cache", 4))) == 4


def test_files_and_folders_keep_the_order_given_and_come_once(inbox: Path) -> None:
    items: list[str | Path] = [
        str(inbox / "dog/3.png"),
        inbox / "dog",
        str(inbox / "cat" / "." / "0.png"),
        inbox / "dog/3.png",
    ]
    names = [Path(name).relative_to(inbox).as_posix() for name in as_images(items).ids]
    assert names == ["dog/3.png", "dog/1.jpg", "cat/0.png"]


def test_one_path_is_one_image_and_not_its_letters(inbox: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(inbox)
    images = as_images("dog/1.jpg")
    assert images.ids == ("dog/1.jpg",)
    assert images.read(0) == (inbox / "dog/1.jpg").read_bytes()
    assert (images.targets, images.classes) == (None, ())


def test_an_image_set_is_taken_as_it_is(inbox: Path) -> None:
    images = ImageSet.from_folder(photos(inbox.parent / "set"))
    assert as_images(images) is images


@pytest.mark.parametrize("missing", ["nowhere.jpg", "no folder"])
def test_a_path_that_does_not_exist_is_named(inbox: Path, missing: str) -> None:
    with pytest.raises(ValueError, match=rf"There is no image .*{missing}\. Give files or folders that exist"):
        as_images([inbox / "dog/1.jpg", inbox / missing])


def test_nothing_to_predict_is_said(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"No image in .*empty; expected \.bmp|No image in .*empty; expected \."):
        as_images(tmp_path / "empty")
    with pytest.raises(ValueError, match="No image in an empty list"):
        as_images([])


def test_a_learner_predicts_files_as_the_model_alone_would(tmp_path: Path) -> None:
    root = photos(tmp_path / "photos", 7)
    images = ImageSet.from_folder(root)
    learn = Learner(staged(), images, cut="layer2", head=nn.Linear(24, 2), device="cpu", workers=0, quiet=True)
    paths = [root / name for name in images.ids]
    found = learn.predict(paths)
    values = learn.predict_proba(images)
    assert [each.image for each in found] == [path.as_posix() for path in paths]
    assert [each.label for each in found] == [images.classes[place] for place in values.argmax(axis=1)]
    assert [each.probability for each in found] == values.max(axis=1).tolist()


def test_doubtful_images_are_said_by_fits_and_predictions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = photos(tmp_path / "photos")
    Image.fromarray(np.arange(24 * 24, dtype=np.uint16).reshape(24, 24)).save(folder / "cat" / "dim.png")
    learn = Learner(staged(), ImageSet.from_folder(folder), head="linear", device="cpu")
    learn.fit(1, lr=1e-3)
    assert "1 image was decoded with doubts (cat/dim.png: its 16-bit values reach 575" in capsys.readouterr().err
    learn.predict([folder / "cat" / "dim.png", folder / "dog"])
    assert f"1 image was decoded with doubts ({folder}/cat/dim.png: its 16-bit values" in capsys.readouterr().err
    learn.predict(folder / "dog")
    assert "doubts" not in capsys.readouterr().err


def test_images_in_memory_are_predicted_as_their_files_are(tmp_path: Path) -> None:
    root = photos(tmp_path / "photos", 6)
    learn = Learner(staged(), ImageSet.from_folder(root), cut="layer2", head="mlp", device="cpu", workers=0, quiet=True)
    paths = [root / name for name in learn.images.ids]
    expected = learn.predict_proba(paths)
    pictures = [Image.open(path).convert("RGB") for path in paths]
    arrays = [np.array(picture) for picture in pictures]
    np.testing.assert_array_equal(learn.predict_proba(pictures), expected)
    np.testing.assert_array_equal(learn.predict_proba(arrays), expected)
    np.testing.assert_array_equal(learn.predict_proba(np.stack(arrays)), expected)
    np.testing.assert_array_equal(learn.predict_proba(torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)), expected)
    assert [each.image for each in learn.predict(pictures)] == ["0", "1", "2", "3", "4", "5"]
    for one in (pictures[2], arrays[2], torch.from_numpy(arrays[2]).permute(2, 0, 1)):
        np.testing.assert_allclose(learn.predict_proba(one), expected[2:3], rtol=1e-6)  # a batch of one
        assert [each.image for each in learn.predict(one)] == ["0"]


def test_samples_of_tar_files_are_predicted_without_their_labels(tmp_path: Path) -> None:
    root = photos(tmp_path / "photos", 6)
    images = ImageSet.from_folder(root)
    learn = Learner(staged(), images, cut="layer2", head="mlp", device="cpu", workers=0, quiet=True)
    with tarfile.open(tmp_path / "inbox-000.tar", "w") as tar:
        for place, name in enumerate(images.ids):
            tar.add(root / name, f"{place:03}{Path(name).suffix}")
    found = learn.predict(tmp_path / "inbox-000.tar")
    assert [each.image for each in found] == ["000", "001", "002", "003", "004", "005"]
    expected = learn.predict([root / name for name in images.ids])
    assert [(each.label, each.probability) for each in found] == [(each.label, each.probability) for each in expected]


@pytest.mark.parametrize(
    "items", [3, None, np.zeros((2, 2)), [1, 2], [np.zeros((4, 4, 3), np.uint8), "x.jpg"], b"x.jpg", ["x.jpg", None]]
)
def test_what_is_no_path_cannot_be_predicted(items: Any) -> None:
    with pytest.raises(TypeError, match=r"Images to predict are .*; expected files and folders by their paths"):
        as_images(items)


@pytest.mark.parametrize("ending", [".csv", ".tsv", ".parquet"])
def test_a_table_without_labels_is_predicted_in_its_order(tmp_path: Path, ending: str) -> None:
    root = photos(tmp_path / "photos", 6)
    images = ImageSet.from_folder(root)
    learn = Learner(staged(), images, cut="layer2", head="mlp", device="cpu", workers=0, quiet=True)
    names = [images.ids[place] for place in (4, 0, 5, 2)]
    table = root / f"test{ending}"
    if ending == ".parquet":
        pq.write_table(pa.table({"path": names, "split": ["test"] * 4}), table)
    else:
        separator = "," if ending == ".csv" else "\t"
        table.write_text("\n".join([f"path{separator}split", *(f"{name}{separator}test" for name in names)]))
    found = learn.predict(table)
    assert [each.image for each in found] == names
    expected = learn.predict_proba([root / name for name in names])
    np.testing.assert_array_equal(learn.predict_proba(str(table)), expected)
    with pytest.raises(ValueError, match="A table of images is among 2 paths; expected it alone"):
        learn.predict([table, root])


def test_a_hugging_face_set_without_labels_is_predicted_in_its_order(tmp_path: Path) -> None:
    root = photos(tmp_path / "photos", 6)
    images = ImageSet.from_folder(root)
    learn = Learner(staged(), images, cut="layer2", head="mlp", device="cpu", workers=0, quiet=True)
    paths = [str(root / images.ids[place]) for place in (3, 1, 4)]
    rows = datasets.Dataset.from_dict({"picture": paths}).cast_column("picture", datasets.Image())
    found = learn.predict_proba(ImageSet.from_dataset(rows, image_column="picture", label_column=None))
    np.testing.assert_array_equal(found, learn.predict_proba(paths))
