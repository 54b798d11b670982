"""Data sets of torch, torchvision and Hugging Face, and iterables: what is taken as it is, and what is refused."""

from __future__ import annotations

import hashlib
import io
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from support.tiny import jpeg, photos, pixels, staged
from torch.utils.data import Dataset, Subset, TensorDataset
from torchvision.datasets import CIFAR10, ImageFolder
from torchvision.transforms import v2

from featstore import FeatureStore, ImageError, ImageSet, extract
from featstore.images.decode import decode


class Things(Dataset[Any]):
    """Items as they are given; `kind` makes one of an array."""

    def __init__(self, items: list[Any], **attributes: Any) -> None:
        self.items = items
        self.__dict__ |= attributes

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, place: int) -> Any:
        item = self.items[place]
        if isinstance(item, Exception):
            raise item
        return item() if callable(item) else item


class Cifar(CIFAR10):  # type: ignore[misc]
    """torchvision's class on ten images in its own format, whose checksums aren't those of the real ones."""

    def __init__(self, root: Path) -> None:
        folder = root / self.base_folder
        folder.mkdir(parents=True)
        data = np.random.default_rng(0).integers(0, 200, (2, 3072), np.uint8)
        for number, (name, _) in enumerate([*self.train_list, *self.test_list]):
            made = {"data": data + np.uint8(number), "labels": [number, 9 - number]}
            (folder / name).write_bytes(pickle.dumps(made))
        super().__init__(str(root))

    def _check_integrity(self) -> bool:
        return True

    def _load_meta(self) -> None:
        self.classes = [f"c{number}" for number in range(10)]


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda array: Image.fromarray(array), (24, 24, 3)),
        (lambda array: array, (24, 24, 3)),
        (lambda array: torch.from_numpy(array).permute(2, 0, 1), (24, 24, 3)),
        (lambda array: torch.from_numpy(array[:, :, :1]).permute(2, 0, 1), (24, 24)),
        (lambda array: Image.fromarray(array).convert("L"), (24, 24)),
    ],
)
def test_items_of_pixels_are_the_arrays_that_they_hold(make: Any, shape: tuple[int, ...]) -> None:
    arrays = pixels(4)
    images = ImageSet.from_dataset(Things([(make(array), number % 2) for number, array in enumerate(arrays)]))
    assert images.ids == ("0", "1", "2", "3")
    np.testing.assert_array_equal(images.targets, [0, 1, 0, 1])
    read = images.read(1)
    assert isinstance(read, np.ndarray)
    assert read.shape == shape
    if shape == (24, 24, 3):
        np.testing.assert_array_equal(read, arrays[1])
        np.testing.assert_array_equal(images.digests().values, ImageSet.from_arrays(arrays).digests().values)


def test_encoded_items_are_read_as_files_are(tmp_path: Path) -> None:
    images = ImageSet.from_dataset(Things([{"image": jpeg(seed), "label": "ab"[seed]} for seed in range(2)]))
    assert images.classes == ("a", "b")
    assert images.read(1) == jpeg(1)
    assert images.digests().values[1].tobytes() == hashlib.sha256(jpeg(1)).digest()


def test_torchvisions_cifar_brings_labels_and_the_names_of_its_classes(tmp_path: Path) -> None:
    made = Cifar(tmp_path)
    images = ImageSet.from_dataset(made)
    assert (images.name, len(images), images.classes) == ("Cifar", 10, tuple(f"c{number}" for number in range(10)))
    np.testing.assert_array_equal(images.targets, made.targets)
    np.testing.assert_array_equal(images.read(7), made.data[7])
    some = ImageSet.from_dataset(Subset(made, [7, 2]))
    np.testing.assert_array_equal(some.targets, [made.targets[7], made.targets[2]])
    assert some.classes == images.classes
    np.testing.assert_array_equal(some.digests().values, images.digests().values[[7, 2]])
    extracted = extract(staged(), pickle.loads(pickle.dumps(images)), FeatureStore(tmp_path / "feats"), workers=2)
    assert (extracted.computed, extracted.failures) == (10, ())


def test_an_image_folder_is_read_as_its_files_are(tmp_path: Path) -> None:
    folder = photos(tmp_path / "photos", 6)
    expected = ImageSet.from_folder(folder)
    for images in (ImageSet.from_dataset(ImageFolder(str(folder))), ImageSet.from_folder(folder)):
        assert (images.ids, images.classes) == (expected.ids, expected.classes)
        np.testing.assert_array_equal(images.targets, expected.targets)
        np.testing.assert_array_equal(images.digests().values, expected.digests().values)
    some = ImageSet.from_dataset(Subset(ImageFolder(str(folder)), [5, 0]))
    assert some.ids == (expected.ids[5], expected.ids[0])
    both = ImageSet.from_dataset({"train": ImageFolder(str(folder)), "val": some_of(folder)})
    assert both.splits.tolist() == ["train"] * 6 + ["valid"]
    assert both.ids[-1] == f"val/{expected.ids[3]}"
    assert both.read(6) == expected.read(3)
    alone = ImageSet.from_dataset({"train": ImageFolder(str(folder))})
    assert alone.ids[0] == f"train/{expected.ids[0]}"
    assert alone.read(0) == expected.read(0)


def some_of(folder: Path) -> Subset[Any]:
    return Subset(ImageFolder(str(folder)), [3])


def test_a_transform_that_gives_pictures_is_kept(tmp_path: Path) -> None:
    folder = photos(tmp_path / "photos", 4)
    images = ImageSet.from_dataset(ImageFolder(str(folder), transform=v2.CenterCrop(8)))
    assert images.ids == ("0", "1", "2", "3")
    read = images.read(0)
    assert isinstance(read, np.ndarray)
    assert read.shape == (8, 8, 3)


class Cropping(ImageFolder):  # type: ignore[misc]
    def __getitem__(self, place: int) -> Any:
        image, label = super().__getitem__(place)
        return image.crop((0, 0, 8, 8)), label


class CroppingSubset(Dataset[Any]):
    """What people write to give a part of a data set a transform."""

    def __init__(self, dataset: Any, indices: list[int]) -> None:
        self.dataset, self.indices, self.transform = dataset, indices, v2.CenterCrop(8)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, place: int) -> Any:
        image, label = self.dataset[self.indices[place]]
        return self.transform(image), label


def test_a_data_set_with_code_of_its_own_is_no_files(tmp_path: Path) -> None:
    folder = str(photos(tmp_path / "photos", 4))
    plain = ImageFolder(folder)
    several: list[Any] = [Cropping(folder), Subset(Cropping(folder), [3, 0]), CroppingSubset(plain, [3, 0])]
    for made in several:
        images = ImageSet.from_dataset(made)
        assert images.ids[:2] == ("0", "1")
        for place in range(2):
            item, label = made[place]
            np.testing.assert_array_equal(images.read(place), np.asarray(item))
            assert images.targets is not None
            assert images.targets[place] == label


def test_a_transform_that_draws_or_gives_floats_is_refused_with_the_way_out(tmp_path: Path) -> None:
    folder = str(photos(tmp_path / "photos", 6))
    with pytest.raises(ValueError, match=r"is another image when it is read again: .* its transform; .*Augment"):
        ImageSet.from_dataset(ImageFolder(folder, transform=v2.RandomCrop(20)))
    to_floats = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])
    with pytest.raises(TypeError, match=r"Item 0 of the data set is a .* \(3, 24, 24\) of torch\.float32: a transform"):
        ImageSet.from_dataset(ImageFolder(folder, transform=to_floats))
    with pytest.raises(TypeError, match=r"No item of the data set is an image \(TypeError: it is a str; expected"):
        ImageSet.from_dataset(Things(["a", "b"]))

    class Endless(torch.utils.data.IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            yield from ()

    with pytest.raises(TypeError, match=r"whose items have no places\. .*from_iterable"):
        ImageSet.from_dataset(Endless())


def test_an_item_that_is_no_image_is_a_failed_row_with_its_reason(tmp_path: Path) -> None:
    array = pixels(1)[0]
    images = ImageSet.from_dataset(Things([OSError("disk"), (None, 1), *[(array, 0)] * 60, (jpeg(0)[:99], 1)]))
    np.testing.assert_array_equal(images.targets, [-1, 1, *[0] * 60, 1])
    with pytest.raises(ImageError, match=r"1: the data set gives no image \(TypeError: it is a NoneType; expected"):
        images.read(1)
    report = extract(staged(), images, FeatureStore(tmp_path / "feats"), on_error="skip", workers=2)
    assert [name for name, _ in report.failures] == ["0", "1", "62"]
    assert dict(report.failures)["0"] == "the data set gives no image (OSError: disk)"
    assert dict(report.failures)["62"].startswith("a JPEG that is damaged or truncated")


def test_labels_of_several_classes_and_of_numbers() -> None:
    arrays = pixels(3)
    hot = [torch.tensor(row) for row in ([1, 0, 1], [0, 0, 0], [0, 1, 0])]
    multi = ImageSet.from_dataset(Things(list(zip(arrays, hot, strict=True)), classes=["x", "y", "z"]), task="multi")
    np.testing.assert_array_equal(multi.targets, torch.stack(hot))
    ages = ImageSet.from_dataset(TensorDataset(torch.from_numpy(arrays).permute(0, 3, 1, 2), torch.tensor([1.5, 2, 3])),
                                 task="regression")  # fmt: skip
    assert (ages.classes, ages.describe()) == (("value",), "3 images, 1 value an image (value 1.5 to 3)")
    np.testing.assert_array_equal(ages.targets, np.array([[1.5], [2], [3]], np.float32))
    assert not ImageSet.from_dataset(Things(list(zip(arrays, hot, strict=True))), label_column=None).is_labelled


def test_a_class_of_several_names_has_the_first() -> None:
    names = [("tench", "Tinca tinca"), ("crane",), ("crane", "machine")]
    images = ImageSet.from_dataset(Things([(array, 2 - place) for place, array in enumerate(pixels(3))], classes=names))
    assert images.classes == ("tench", "crane (1)", "crane (2)")
    np.testing.assert_array_equal(images.targets, [2, 1, 0])


class Merging(Cifar):
    """Its items have another label than `targets` in class 7 alone."""

    def __getitem__(self, place: int) -> Any:
        image, label = super().__getitem__(place)
        return image, 4 if label == 7 else label


def test_targets_that_items_have_not_are_not_believed(tmp_path: Path) -> None:
    merging = Merging(tmp_path / "a")
    cifar = Cifar(tmp_path / "b")
    cifar.target_transform = lambda label: 4 if label == 7 else label
    expected = [4 if each == 7 else each for each in merging.targets]
    assert expected != merging.targets
    several: list[Any] = [merging, cifar]
    for made in several:
        np.testing.assert_array_equal(ImageSet.from_dataset(made).targets, expected)
        np.testing.assert_array_equal(ImageSet.from_dataset(Subset(made, range(10))).targets, expected)


def named_by_image(images: ImageSet) -> dict[str, str]:
    assert images.targets is not None
    return {name: images.classes[int(each)] for name, each in zip(images.ids, images.targets, strict=True)}


def test_each_parts_numbers_are_of_its_own_class_names(tmp_path: Path) -> None:
    for name in ("train/ant", "train/bee", "train/cat", "valid/bee", "valid/cat"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "0.jpg").write_bytes(jpeg(0))
    folders = {split: ImageFolder(str(tmp_path / split)) for split in ("valid", "train")}
    images = ImageSet.from_dataset(folders)
    assert images.classes == ("ant", "bee", "cat")
    assert named_by_image(images) == {f"{key}/{name}/0.jpg": name
                                      for key, name in (("valid", "bee"), ("valid", "cat"), ("train", "ant"),
                                                        ("train", "bee"), ("train", "cat"))}  # fmt: skip
    assert ImageSet.from_dataset(folders, classes=["cat", "bee", "ant"]).classes == ("cat", "bee", "ant")
    with pytest.raises(ValueError, match=r"class 'ant' \(labels\[2\]\) is not in classes\. Expected one of 2 classes"):
        ImageSet.from_dataset({"train": folders["valid"], "valid": folders["train"]})

    encoded = {"bytes": jpeg(0), "path": None}
    parts = datasets.DatasetDict({
        key: hugging({"image": [encoded] * 3, "label": [1, 0, -1]},
                     image=datasets.Image(), label=datasets.ClassLabel(names=names))
        for key, names in (("train", ["no", "yes"]), ("test", ["yes", "no"]))
    })  # fmt: skip
    np.testing.assert_array_equal(ImageSet.from_dataset(parts).targets, [1, 0, -1, 0, 1, -1])

    arrays = pixels(2)
    several = {
        key: Things([(arrays[0], [0]), (arrays[1], [1, 0])], classes=names)
        for key, names in (("train", ["x", "y", "z"]), ("test", ["y", "z"]))
    }
    found = ImageSet.from_dataset(several, task="multi")
    np.testing.assert_array_equal(found.targets, [[1, 0, 0], [1, 1, 0], [0, 1, 0], [0, 1, 1]])


def multi_targets(labels: list[Any], **attributes: Any) -> list[list[int]]:
    items = list(zip(pixels(len(labels)), labels, strict=True))
    targets = ImageSet.from_dataset(Things(items, **attributes), task="multi").targets
    assert targets is not None
    return [[int(value) for value in row] for row in targets]


def test_whether_labels_are_n_hot_is_decided_for_all_items_at_once() -> None:
    numbers = [[0, 1], [2], [1], [0]]
    expected = [[1, 1, 0], [0, 0, 1], [0, 1, 0], [1, 0, 0]]
    assert multi_targets(numbers) == multi_targets([torch.tensor(each) for each in numbers]) == expected
    hot = [[0, 1, 1], [0, 1, 0], [1, 0, 0]]
    assert multi_targets(hot) == multi_targets([torch.tensor(each) for each in hot]) == hot
    pairs = [[0, 1], [1, 0]]
    assert multi_targets(pairs, classes=["x", "y", "z"]) == [[1, 1, 0], [1, 1, 0]]  # three classes have no two places
    assert multi_targets([*pairs, [1, 1]]) == [*pairs, [1, 1]]
    assert multi_targets([torch.tensor(each).bool() for each in pairs], classes=["x", "y"]) == pairs
    with pytest.raises(ValueError, match=r"a 0 and a 1, as \[0, 1\]\. .* Give places as booleans or floats"):
        multi_targets(pairs, classes=["x", "y"])
    with pytest.raises(
        ValueError, match=r"are \[0, 1, 1\], as of 3 classes; others, or the class names, are of 4\. Exp"
    ):
        multi_targets(hot, classes=["w", "x", "y", "z"])
    image = {"bytes": jpeg(0), "path": None}
    of_classes = datasets.Sequence(datasets.ClassLabel(names=["x", "y"]))
    made = hugging({"image": [image], "label": [[0, 1]]}, image=datasets.Image(), label=of_classes)
    np.testing.assert_array_equal(ImageSet.from_dataset(made, task="multi").targets, [[1, 1]])


# ---- Hugging Face


def hugging(rows: dict[str, list[Any]], **features: Any) -> Any:
    return datasets.Dataset.from_dict(rows, features=datasets.Features(features))


def test_hugging_faces_images_are_had_as_they_are_encoded(tmp_path: Path) -> None:
    (tmp_path / "2.jpg").write_bytes(jpeg(2))
    encoded: list[Any] = [{"bytes": jpeg(seed), "path": None} for seed in range(2)]
    encoded.append({"bytes": None, "path": str(tmp_path / "2.jpg")})
    made = hugging(
        {"key": ["a", "b", "c"], "picture": encoded, "kind": [1, 0, -1]},
        key=datasets.Value("string"), picture=datasets.Image(), kind=datasets.ClassLabel(names=["no", "yes"]),
    )  # fmt: skip
    images = ImageSet.from_dataset(made, id_column="key")
    assert (images.ids, images.classes) == (("a", "b", "c"), ("no", "yes"))
    np.testing.assert_array_equal(images.targets, [1, 0, -1])
    again = pickle.loads(pickle.dumps(images))
    assert [again.read(index) for index in range(3)] == [jpeg(seed) for seed in range(3)]
    parted = ImageSet.from_dataset(datasets.DatasetDict({"train": made, "test": made.select([1])}))
    assert parted.ids == ("train/0", "train/1", "train/2", "test/0")
    assert parted.splits.tolist() == ["train"] * 3 + ["test"]


def test_what_hugging_faces_data_sets_lack_or_add_is_said() -> None:
    image = {"bytes": jpeg(0), "path": None}
    made = hugging({"a": [image], "b": [image], "n": [1.5]}, a=datasets.Image(), b=datasets.Image(),
                   n=datasets.Value("float32"))  # fmt: skip
    with pytest.raises(ValueError, match=r"has the columns of images a, b among a, b, n\. Expected one\. Name it: im"):
        ImageSet.from_dataset(made)
    with pytest.raises(ValueError, match="has no column 'kind'; it has a, b, n"):
        ImageSet.from_dataset(made, image_column="b", label_column="kind")
    numbers = ImageSet.from_dataset(made, image_column="b", label_column="n", task="regression")
    np.testing.assert_array_equal(numbers.targets, [[1.5]])
    with pytest.raises(ValueError, match=r"has a transform .* dataset\.with_format\(None\)"):
        ImageSet.from_dataset(made.with_transform(lambda rows: rows), image_column="b")


def test_a_column_of_labels_is_there_and_the_only_one() -> None:
    image = {"bytes": jpeg(0), "path": None}
    classes = datasets.ClassLabel(names=["a", "b"])
    made = hugging({"img": [image], "fine": [1], "coarse": [0]}, img=datasets.Image(), fine=classes, coarse=classes)
    with pytest.raises(ValueError, match=r"the columns of classes fine, coarse\. .* Name one of them: label_column"):
        ImageSet.from_dataset(made)
    np.testing.assert_array_equal(ImageSet.from_dataset(made, label_column="fine").targets, [1])
    assert not ImageSet.from_dataset(made, label_column=None).is_labelled
    mappings = Things([{"image": jpeg(0), "kind": 1}])
    with pytest.raises(ValueError, match=r"items have no 'kinds'; they have image, kind\. .* Name another"):
        ImageSet.from_dataset(mappings, label_column="kinds")
    assert not ImageSet.from_dataset(mappings).is_labelled
    with pytest.raises(ValueError, match=r"label_column is 'kind', and the data set's items are no mappings"):
        ImageSet.from_dataset(Things([(jpeg(0), 1)]), label_column="kind")


# ---- Iterables


def test_an_iterables_labels_are_read_as_a_data_sets_are() -> None:
    def targets(labels: list[Any], **options: Any) -> Any:
        items = [(str(place), pixels(1)[0], label) for place, label in enumerate(labels)]
        return ImageSet.from_iterable(items, **options).targets

    hot = [[0, 1, 1], [0, 1, 0], [1, 0, 0]]
    for kind in (list, np.array, torch.tensor, lambda row: torch.tensor(row).bool(), lambda row: np.array(row, float)):
        np.testing.assert_array_equal(targets([kind(row) for row in hot], task="multi"), hot)
    numbers = [torch.tensor(each) for each in ([0, 1], [2], [1], [0])]
    np.testing.assert_array_equal(targets(numbers, task="multi"), multi_targets(numbers))
    with pytest.raises(ValueError, match="as of 3 classes; others, or the class names, are of 2"):
        targets(hot, task="multi", classes=["x", "y"])
    np.testing.assert_array_equal(targets([torch.tensor(1), None, torch.tensor(0)]), [1, -1, 0])
    np.testing.assert_array_equal(
        targets([torch.tensor([0.5, 2]), None], task="regression"), [[0.5, 2], [np.nan, np.nan]]
    )


def test_an_iterable_is_gone_through_once_and_held(tmp_path: Path) -> None:
    array = pixels(1)[0]
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")

    def items() -> Iterator[tuple[Any, ...]]:
        yield "a", jpeg(0), "x"
        yield "b", Image.open(file), "y"
        yield 3, array, "x"
        yield "d", "a path", None
        yield "e", array.astype(float)

    images = ImageSet.from_iterable(items())
    assert (images.ids, images.classes) == (("a", "b", "3", "d", "e"), ("x", "y"))
    np.testing.assert_array_equal(images.targets, [0, 1, 0, -1, -1])
    assert images.read(0) == jpeg(0)
    np.testing.assert_array_equal(images.read(1), images.read(2))
    np.testing.assert_array_equal(decode(images.read(2)).pixels.permute(1, 2, 0), array)
    array[:] = 0  # the caller's own
    assert np.asarray(images.read(2)).any()
    report = extract(staged(), images, FeatureStore(tmp_path / "feats"), on_error="skip", workers=0)
    assert report.computed == 2  # two have the same pixels
    assert report.failures == (
        ("d", "it is a str; expected bytes, a PIL image, or uint8 of one or three channels"),
        ("e", "it is a ndarray (24, 24, 3) of float64; expected bytes, a PIL image, or uint8 of one or three channels"),
    )


@pytest.mark.parametrize(
    ("items", "error", "sentence"),
    [
        ([("a", b"1"), ("a", b"2")], ValueError, "image id 'a' appears twice"),
        ([b"1"], TypeError, r"Item 0 is a bytes\. Expected \(id, image\) or \(id, image, label\)"),
    ],
)
def test_items_of_another_form_are_refused(items: list[Any], error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=sentence):
        ImageSet.from_iterable(items)
