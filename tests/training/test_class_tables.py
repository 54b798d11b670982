"""Logits meet the classes that they were trained for, or nothing is scored; one class is nothing to train on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from support.tiny import VIEW, arrays, jpeg, photos, pixels, staged
from torch import Tensor, nn

from featstore import FeatureStore, ImageSet, StagedModel, backbone, extract
from featstore.errors import FeatureStoreError
from featstore.models.backbones import class_names, outline
from training import Learner, train_head
from training.cli.app import main

NUMBERS = [str(number) for number in range(12)]


class Shade(nn.Module):
    """A classifier of gray images that is always right: the logit of shade 20 * k is k."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 1, 1, bias=False)
        self.fc = nn.Linear(1, count)
        levels = (torch.arange(count) * 20 / 255 - 0.485) / 0.229  # of red, normalised
        with torch.no_grad():
            self.conv.weight.copy_(torch.tensor([1.0, 0, 0]).view(1, 3, 1, 1))
            self.fc.weight.copy_(2 * levels[:, None])  # the nearest level has the largest 2 x l - l ** 2
            self.fc.bias.copy_(-(levels**2))

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.conv(images).mean((2, 3)))
        return logits


def shades(names: list[str]) -> tuple[StagedModel, NDArray[np.uint8]]:
    """A model whose logit k is of `names[k]`, and an image of each in that order."""
    images = np.stack([np.full((24, 24, 3), 20 * place, np.uint8) for place in range(len(names))])
    return StagedModel.from_module(Shade(len(names)).eval(), view=VIEW, name="shade"), images


def in_folders(root: Path, names: list[str]) -> ImageSet:
    """The images of `shades` in folders of their names."""
    for name, image in zip(names, shades(names)[1], strict=True):
        (root / name).mkdir(parents=True)
        Image.fromarray(image).save(root / name / "image.png")
    return ImageSet.from_folder(root)


def kept(model: StagedModel, images: ImageSet, **options: object) -> Learner:
    return Learner(model, images, head="keep", device="cpu", quiet=True, **options)  # type: ignore[arg-type]


def test_a_kept_head_meets_classes_that_are_numbers_by_number(tmp_path: Path) -> None:
    model, _ = shades(NUMBERS)
    learn = kept(model, in_folders(tmp_path, NUMBERS))
    assert learn.classes == tuple(NUMBERS)
    assert learn.evaluate("train")["accuracy"] == 1
    assert [each.label for each in learn.predict(str(tmp_path / "10"))] == ["10"]


def test_a_kept_head_meets_classes_by_the_table_that_names_its_logits(tmp_path: Path) -> None:
    names = ["yak", "ant", "cow"]
    model, _ = shades(names)
    images = in_folders(tmp_path, names)
    assert images.classes == ("ant", "cow", "yak")
    learn = kept(model, images, classes=names)
    assert learn.classes == tuple(names)
    assert learn.evaluate("train")["accuracy"] == 1
    only_some = images.select([name.startswith("yak") for name in images.ids])
    assert kept(model, only_some, classes=names).evaluate("train")["accuracy"] == 1


@pytest.mark.parametrize("names", [["ant", "cow", "yak"], ["007", "01", "2"], ["1", "2", "3"], ["0", "1", "02"]])
def test_a_kept_head_whose_logits_nobody_names_is_refused(tmp_path: Path, names: list[str]) -> None:
    model, _ = shades(names)
    with pytest.raises(ValueError, match=r"shade doesn't say which class each of its 3 logits is of.*classes="):
        kept(model, in_folders(tmp_path, names))


def test_a_table_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    names = ["ant", "cow", "yak"]
    model, images = shades(names)[0], in_folders(tmp_path, names)
    with pytest.raises(ValueError, match="ends in 3 values an image, and the images have 2 classes"):
        kept(model, images, classes=["ant", "cow"])
    with pytest.raises(ValueError, match=r"the class yak, which classes \(ant, cow, emu\) lacks"):
        kept(model, images, classes=["ant", "cow", "emu"])
    with pytest.raises(ValueError, match="names cow twice"):
        kept(model, images, classes=["ant", "cow", "cow"])


def test_a_new_head_counts_in_the_table_that_is_given() -> None:
    images = ImageSet.from_arrays(pixels(8), ["b", "a"] * 4)
    learn = Learner(staged(), images, head="linear", classes=["c", "b", "a"], device="cpu", quiet=True)
    assert learn.classes == ("c", "b", "a")
    assert learn.images.targets is not None
    assert learn.images.targets.tolist() == [1, 2] * 4


def test_a_saved_kept_head_comes_back_with_its_table(tmp_path: Path) -> None:
    names = ["yak", "ant", "cow"]
    model, _ = shades(names)
    images = in_folders(tmp_path / "images", names)
    run = kept(model, images, classes=names).save(tmp_path / "run")
    loaded = Learner.load(run, images, module=shades(names)[0], quiet=True)
    assert loaded.classes == tuple(names)
    assert loaded.evaluate("train")["accuracy"] == 1


def test_torchvisions_weights_bring_the_names_of_their_logits() -> None:
    model = outline("resnet18")
    assert class_names(model) is None  # no weights, no names
    assert class_names(staged()) is None
    model.origin = {**model.origin, "weights": "DEFAULT"}
    names = class_names(model)
    assert names is not None
    assert (names[0], names[207], len(names), len({*names})) == ("tench", "golden retriever", 1000, 1000)


def test_a_kept_head_of_torchvisions_meets_a_few_classes_by_name_and_imagenets_folders_by_their_order() -> None:
    model = backbone("resnet18", "none")
    model.origin = {**model.origin, "weights": "DEFAULT"}  # only the names count here
    few = ImageSet.from_arrays(pixels(2), ["golden retriever", "tench"])
    learn = kept(model, few)
    assert learn.images.targets is not None
    assert (len(learn.classes), learn.images.targets.tolist()) == (1000, [207, 0])
    folders = [f"n{number:08d}" for number in range(1000)]
    images = ImageSet.from_arrays(pixels(1000, size=4), folders[::-1])
    assert kept(model, images).classes == tuple(folders)
    unknown = ImageSet.from_arrays(pixels(1000, size=4), [f"kind {number}" for number in range(1000)])
    with pytest.raises(ValueError, match=r"resnet18 tells tench, goldfish.* apart, and not kind 0"):
        kept(model, unknown)


@pytest.mark.parametrize(
    ("folders", "read"),
    [
        (["photos/cat", "photos/dog"], r"photos/, which holds cat/, dog/.*give their folder: .*/photos\."),
        (["train/photos/cat", "train/photos/dog"], r"train/photos/, which holds cat/, dog/.*move them up"),
        (["cat"], r"cat/\. Give a folder with a folder for each class; the one above it"),
    ],
)
def test_a_classifier_of_one_class_is_refused_with_the_folders_that_were_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], folders: list[str], read: str
) -> None:
    root = tmp_path / "images"
    for place, folder in enumerate(folders * 3):
        (root / folder).mkdir(parents=True, exist_ok=True)
        (root / folder / f"{place}.jpg").write_bytes(jpeg(place))
    images = ImageSet.from_folder(root)
    with pytest.raises(ValueError, match=rf"are of one class.*{read}"):
        train_head(staged(), images, head="linear", epochs=1, lr=1e-3, out=tmp_path / "run", quiet=True)
    arguments = ["--images", str(root), "--store", str(tmp_path / "features"), "--backbone", "resnet18"]
    assert main(["head", *arguments, "--out", str(tmp_path / "run")]) == 2  # before any weights are read
    assert "are of one class" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    report = extract(staged(), images, FeatureStore(tmp_path / "features"), cuts=["layer2"], progress=False)
    assert report.sets  # features need no classes


@pytest.mark.parametrize("from_store", [False, True])
def test_a_new_head_is_not_trained_where_its_score_would_mean_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], from_store: bool
) -> None:
    root = tmp_path / "images"
    for place, folder in enumerate(["train/cat", "train/dog", "valid/cat", "valid/emu"] * 2):
        (root / folder).mkdir(parents=True, exist_ok=True)
        (root / folder / f"{place}.jpg").write_bytes(jpeg(place))
    images, store = ImageSet.from_folder(root, held_out_classes=True), FeatureStore(tmp_path / "features")
    if from_store:
        extract(staged(), images, store, cuts=["layer2"], progress=False)
        images = ImageSet.from_store(store)

    def learner(chosen: ImageSet) -> Learner:
        return Learner(staged(), chosen, store if from_store else None, head="linear", device="cpu")

    def without(text: str) -> ImageSet:
        return images.select([text not in name for name in images.ids])

    with pytest.raises(ValueError, match=r"2 of the 2 images of the split valid are of classes that no .*\(emu\)"):
        learner(without("valid/cat")).fit(1, lr=1e-3)
    with pytest.raises(ValueError, match="All 2 images to train on are of one class, cat"):
        learner(without("train/dog")).fit(1, lr=1e-3)
    capsys.readouterr()
    learner(images).fit(1, lr=1e-3)
    assert "2 of the 4 images of the split valid are of classes that no image to train on" in capsys.readouterr().err
    learn = learner(without("emu"))
    learn.fit(1, lr=1e-3)
    learn.images = without("train/dog")  # the head knows dogs by now
    learn.fit(1, lr=1e-3)


def test_one_label_that_images_have_or_lack_can_be_learned() -> None:
    images = ImageSet.from_arrays(pixels(8), [["cat"], []] * 4, task="multi")
    learn = Learner(staged(), images, head="linear", device="cpu", quiet=True)
    assert learn.task == "multi"
    learn.fit(1, lr=1e-3)


def test_an_unlabelled_validation_folder_is_refused_with_a_remedy_that_works(tmp_path: Path) -> None:
    root = photos(tmp_path / "train").parent
    (root / "valid").mkdir()
    for place in (50, 51):
        (root / "valid" / f"{place}.jpg").write_bytes(jpeg(place))
    with pytest.raises(
        ValueError, match=r"None of the 2 images of the split valid has a label \(first: valid/50"
    ) as told:
        train_head(staged(), ImageSet.from_folder(root), head="linear", epochs=1, lr=1e-3, quiet=True)
    remedy = str(told.value).rpartition("--images ")[2].removesuffix(".")
    images = ImageSet.from_folder(remedy).split(valid=0.34)
    assert train_head(staged(), images, head="linear", epochs=1, lr=1e-3, quiet=True).evaluate()["images"] == 2


def test_the_class_of_a_run_that_images_lack_stays_a_class(tmp_path: Path) -> None:
    learn = Learner(staged(), arrays(8).split(valid=0.25), head="linear", device="cpu", quiet=True)
    run = learn.save(tmp_path / "run")
    zeros = arrays(8).select(range(0, 8, 2))
    Learner.load(run, zeros, module=staged(), quiet=True).fit(1, lr=1e-3)
    with pytest.raises(FeatureStoreError, match="the class emu"):
        Learner.load(run, ImageSet.from_arrays(pixels(2), ["0", "emu"]), module=staged(), quiet=True)
