"""Commands: a request as the command that fulfils it, in flags the programs have, else as a Python call."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from support.tiny import arrays, net, photos
from torch import Tensor

from featstore import Augment, FeatureStore, ImageSet, StagedModel, View, extract, plan
from featstore.cli.flags import AugmentFlags, ImageFlags
from featstore.extraction.remedy import extract_remedy, image_flags, model_flags, seed_ranges, view_flags
from featstore.remedies import Call, Command

# The contract that other tools rely on.
EXTRACT_FLAGS = {
    "--images", "--top-folders", "--root", "--path-column", "--label-column", "--label-sep", "--split-column",
    "--group-column", "--task", "--valid", "--test", "--split-seed", "--store", "--backbone", "--weights", "--cut",
    "--reduce", "--size", "--resize", "--one-hot", "--valid-column", "--suffix", "--strip", "--mean", "--std",
    "--interpolation", "--decode", "--augment", "--seeds", "--dtype", "--precision", "--device", "--batch-size",
    "--workers", "--on-error", "--json",
}  # fmt: skip


def named(view: View | None = None, **origin: Any) -> StagedModel:
    return StagedModel.from_module(
        net(), view=view or View(size=16, resize=20), name="net", origin={"backbone": "net34", **origin}
    )


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    photos(tmp_path / "my photos", 10)
    return "my photos"


@pytest.fixture
def table(folder: str) -> Path:
    rows = [f"{path},{path.parent.name},{place % 3}" for place, path in enumerate(sorted(Path(folder).rglob("*.*")))]
    Path("labels.csv").write_text("\n".join(["path,label,patient", *rows]))
    return Path("labels.csv")


def parsed(command: str) -> dict[str, list[str]]:
    """Flag -> values of a command, which must be one that a shell gives the program word by word."""
    program, name, *words = shlex.split(command)
    assert (program, name) == ("featstore", "extract")
    flags: dict[str, list[str]] = {}
    assert len(words) % 2 == 0
    for flag, value in zip(words[::2], words[1::2], strict=True):
        assert flag in EXTRACT_FLAGS
        flags.setdefault(flag, []).append(value)
    assert all(len(values) == 1 for flag, values in flags.items() if flag != "--cut")
    return flags


def test_what_is_default_is_not_said(folder: str) -> None:
    images = ImageSet.from_folder(folder).split(valid=0.2, seed=0)
    command = extract_remedy(
        named(weights="DEFAULT"), images, Path("features"), cuts=["layer4"], dtype="float16", precision="fp32"
    )
    assert str(command) == "featstore extract --images 'my photos' --store features --backbone net34 --cut layer4"


def test_each_flag_that_differs_from_its_default_is_said(folder: str) -> None:
    model = named(weights="weights/ep 37.pth")
    command = extract_remedy(
        model,
        ImageSet.from_folder(folder).split(valid=0.3, test=0.1, seed=7),
        Path("the store"),
        cuts=["layer3:none", "layer4"],
        view=replace(
            model.view, size=24, resize=40, mean=(0.5, 0.25, 0.125), std=(1.0, 1.0, 0.1), interpolation="bicubic"
        ),
        augment=Augment("random_resized_crop", seeds=[4, 1, 2, 7, 3]),
        dtype="bfloat16",
        precision="tf32",
        on_error="skip",
    )
    assert parsed(str(command)) == {
        "--images": ["my photos"],
        "--valid": ["0.3"],
        "--test": ["0.1"],
        "--split-seed": ["7"],
        "--store": ["the store"],
        "--backbone": ["net34"],
        "--weights": ["weights/ep 37.pth"],
        "--cut": ["layer3:none", "layer4"],
        "--size": ["24"],
        "--resize": ["40"],
        "--mean": ["0.5,0.25,0.125"],
        "--std": ["1.0,1.0,0.1"],
        "--interpolation": ["bicubic"],
        "--augment": ["random_resized_crop"],
        "--seeds": ["1-4,7"],
        "--dtype": ["bfloat16"],
        "--precision": ["tf32"],
        "--on-error": ["skip"],
    }


def test_a_policys_parameters_are_said_in_the_words_that_give_it_back(folder: str) -> None:
    augment = Augment([("zoom", {"amount": (0.1, 1 / 3)}), "cutout", ("side_on", {"crop": "no"})], seeds=[0])
    images = ImageSet.from_folder(folder).split(valid=0.2, seed=0)
    flags = parsed(str(extract_remedy(named(), images, Path("f"), cuts=["layer4"], augment=augment)))
    assert flags["--augment"] == ["zoom:amount=0.1..0.3333333333333333+cutout+side_on:crop=no"]
    assert AugmentFlags(augment=flags["--augment"][0], seeds=flags["--seeds"][0]).augmentation() == augment


def test_a_view_that_the_name_does_not_give_is_said(folder: str) -> None:
    images = ImageSet.from_folder(folder).split(valid=0.2, seed=0)
    model = named(weights="DEFAULT")
    other = model.with_(view=View(size=12, resize=20))
    for each in (other, other.up_to("layer2"), other.with_(notes=["read"])):
        said = parsed(str(extract_remedy(each, images, Path("features"), cuts=["layer4"])))
        assert (said["--size"], said["--resize"]) == (["12"], ["20"])
    renamed = other.with_(origin=model.origin)  # now its name gives that view
    assert "--size" not in str(extract_remedy(renamed, images, Path("features"), cuts=["layer4"]))


# ---- images


def test_a_folder_that_is_not_dealt_holds_nothing_out(folder: str) -> None:
    assert image_flags(ImageSet.from_folder(folder)) == ["--images", folder, "--valid", "0"]


def test_a_folder_with_splits_of_its_own_needs_no_flag(folder: str) -> None:
    for split in ("train", "VAL"):
        photos(Path("dealt") / split)
    images = ImageSet.from_folder("dealt")
    assert image_flags(images) == ["--images", "dealt"]
    assert image_flags(images.valid) == ["--images", "dealt"]
    assert image_flags(images.split(valid=0.5)) is None
    assert image_flags(images.with_splits(["train"] * len(images))) is None


def made_again(images: ImageSet) -> ImageSet:
    """The set that the programs make of the flags of `images`."""
    flags = image_flags(images)
    assert flags is not None
    options: dict[str, Any] = {
        flag[2:].replace("-", "_"): value for flag, value in zip(flags[::2], flags[1::2], strict=True)
    }
    if "valid" in options:
        options["valid"] = float(options["valid"])
    return ImageFlags(**options).given().images


def check_made_again(images: ImageSet) -> None:
    again = made_again(images)
    assert (again.ids, again.classes, again.splits.tolist()) == (images.ids, images.classes, images.splits.tolist())
    np.testing.assert_array_equal(again.targets, images.targets)


@pytest.mark.parametrize("top_folders", ["classes", "splits"])
def test_what_top_folders_are_is_said_again(folder: str, top_folders: Literal["classes", "splits"]) -> None:
    for top in ("train2017", "val2017", "extra"):
        photos(Path("given") / top)
    images = ImageSet.from_folder("given", top_folders=top_folders)
    wanted = ["--images", "given", "--top-folders", top_folders]
    assert image_flags(images) == wanted + ["--valid", "0"] * (top_folders == "classes")
    check_made_again(images)


def test_how_a_table_is_read_is_said_again(folder: str) -> None:
    names = [path.relative_to(folder).as_posix() for path in sorted(Path(folder).rglob("*.jpg"))]
    rows = [f"C:\\old\\{name[:-4]};{place % 2};{1 - place % 2};{place % 3}" for place, name in enumerate(names)]
    Path("t.csv").write_text("\n".join(["file;a, b;c;held", *rows]))
    images = ImageSet.from_csv(
        "t.csv",
        root=folder,
        path_column="file",
        one_hot=["c", "a, b"],
        valid_column=None,
        suffix=".jpg",
        strip="C:/old",
    )
    assert (images.classes, images.absent()) == (("c", "a, b"), [])
    check_made_again(images.split(0.2))
    Path("t.csv").write_text(
        "\n".join(["path,label,split,is_valid", *(f"{name},a,test,{name[0] == 'c'}" for name in names)])
    )
    held_out = ImageSet.from_csv("t.csv", root=folder, valid_column="is_valid")
    assert image_flags(held_out) == ["--images", "t.csv", "--root", folder, "--valid-column", "is_valid"]
    check_made_again(held_out)
    check_made_again(held_out.split(0.3))


@pytest.mark.parametrize(
    "deal",
    [
        lambda images: images.folds(2)[0],
        lambda images: images.with_splits(["train", "valid"] * 5),
        lambda images: images.split(stratify=False),
        lambda images: images.split(groups=list("aabbccddee")),
    ],
    ids=["folds", "with_splits", "not stratified", "groups"],
)
def test_a_split_that_the_programs_cannot_make_has_no_flags(folder: str, deal: Callable[[ImageSet], ImageSet]) -> None:
    assert image_flags(deal(ImageSet.from_folder(folder))) is None


def test_a_selection_is_computed_with_the_set_it_came_from(folder: str) -> None:
    images = ImageSet.from_folder(folder).split()
    assert image_flags(images.train.select([0, 2])) == image_flags(images) == ["--images", folder]


def test_moved_images_are_named_where_they_are(folder: str) -> None:
    images = ImageSet.from_folder(folder).split()
    Path(folder).rename("moved")
    assert image_flags(images.with_root("moved")) == ["--images", "moved"]


def test_a_table_brings_its_columns(table: Path) -> None:
    plain = ImageSet.from_csv(table)
    assert image_flags(plain) == ["--images", "labels.csv", "--valid", "0"]
    assert image_flags(plain.split()) == ["--images", "labels.csv"]
    text = table.read_text().replace("path,label,patient", "file,kind,patient")
    Path("others.csv").write_text(text)
    images = ImageSet.from_csv(
        "others.csv", root=".", path_column="file", label_column="kind", label_sep=";", group_column="patient",
        task="multi",
    )  # fmt: skip
    assert image_flags(images.split()) == [
        "--images", "others.csv", "--root", ".", "--path-column", "file", "--label-column", "kind", "--label-sep", ";",
        "--group-column", "patient", "--task", "multi",
    ]  # fmt: skip
    assert image_flags(ImageSet.from_csv("others.csv", path_column="file", label_column=None).split()) == [
        "--images", "others.csv", "--path-column", "file", "--label-column", "",
    ]  # fmt: skip
    paths = sorted(Path("my photos").rglob("*.*"))
    rows = [f"{path},{path.parent.name},{('train', 'valid')[place % 2]}" for place, path in enumerate(paths)]
    Path("dealt.csv").write_text("\n".join(["path,label,split", *rows]))
    dealt = ImageSet.from_csv("dealt.csv", split_column="split")
    assert image_flags(dealt) == image_flags(ImageSet.from_csv("dealt.csv")) == ["--images", "dealt.csv"]
    assert image_flags(dealt.split()) == ["--images", "dealt.csv", "--split-column", ""]
    assert image_flags(dealt.with_splits(dealt.splits[::-1])) is None
    aside = ["--images", "dealt.csv", "--split-column", "", "--valid", "0"]
    assert image_flags(ImageSet.from_csv("dealt.csv", split_column="")) == aside
    Path("parted.csv").write_text("\n".join(["path,label,part", *rows]))
    parted = ImageSet.from_csv("parted.csv", split_column="part")
    assert image_flags(parted) == ["--images", "parted.csv", "--split-column", "part"]
    assert image_flags(ImageSet.from_csv("parted.csv").split()) == ["--images", "parted.csv"]


def test_images_made_in_python_have_no_flags() -> None:
    assert image_flags(arrays(3)) is None


# ---- model and view


def test_a_model_is_named_by_what_made_it() -> None:
    assert model_flags(named()) == ["--backbone", "net34"]
    assert model_flags(named(weights="DEFAULT")) == ["--backbone", "net34"]
    assert model_flags(named(weights="none")) == ["--backbone", "net34", "--weights", "none"]
    assert model_flags(StagedModel.from_module(net())) is None


def test_a_size_takes_resize_along_as_the_flag_does() -> None:
    view = View(size=224, resize=256)
    assert view_flags(view, view) == []
    assert view_flags(view.resized(size=64), view) == ["--size", "64"]
    assert view_flags(view.resized(size=64, resize=64), view) == ["--size", "64", "--resize", "64"]
    assert view_flags(view.resized(resize=232), view) == ["--resize", "232"]
    assert view_flags(view.with_seed("flip", 3), view) == []
    assert view_flags(replace(view, apply_exif=False), view) is None
    assert view_flags(replace(view, antialias=False), view) is None
    assert view_flags(replace(view, interpolation="nearest"), view) == ["--interpolation", "nearest"]
    assert view_flags(replace(view, decode="reduced"), view) == ["--decode", "reduced"]
    assert view_flags(view, replace(view, decode="reduced")) == ["--decode", "full"]


def test_numbers_come_back_exactly() -> None:
    mean = (0.1 + 0.2, 1 / 3, 1e-7)
    flags = view_flags(replace(View(), mean=mean), View())
    assert flags is not None
    assert tuple(float(each) for each in flags[1].split(",")) == mean


def test_seeds_are_written_as_ranges() -> None:
    assert [seed_ranges(seeds) for seeds in ([0], [0, 1], [3, 1, 2], [0, 2, 4], [5, 6, 9])] == [
        "0", "0-1", "1-3", "0,2,4", "5-6,9"
    ]  # fmt: skip


# ---- Python calls


def own(image: Tensor, generator: torch.Generator) -> Tensor:
    return image.flip(2)


class Mirrored:
    fingerprint = "1"

    def __call__(self, image: Tensor, generator: torch.Generator) -> Tensor:
        return image.flip(2)


@pytest.mark.parametrize(
    ("change", "call"),
    [
        ({}, "extract(model, images, store, cuts=['layer2'])"),
        ({"dtype": "float16", "precision": "fp32"}, "extract(model, images, store, cuts=['layer2'])"),
        (
            {"dtype": "float32", "precision": "bf16", "on_error": "skip"},
            "extract(model, images, store, cuts=['layer2'], dtype='float32', precision='bf16', on_error='skip')",
        ),
        (
            {"augment": Augment("flip", seeds=[0, 2])},
            "extract(model, images, store, cuts=['layer2'], augment=Augment('flip', seeds=[0, 2]))",
        ),
        (
            {"augment": Augment([("zoom", {"amount": (0.1, 0.3)}), "flip"], seeds=[0])},
            "extract(model, images, store, cuts=['layer2'], augment=Augment('zoom:amount=0.1..0.3+flip', seeds=[0]))",
        ),
        (
            {"augment": Augment(own, seeds=[1])},
            "extract(model, images, store, cuts=['layer2'], augment=Augment(own, seeds=[1]))",
        ),
        (
            {"augment": Augment(lambda image, generator: image, seeds=[1])},
            "extract(model, images, store, cuts=['layer2'], augment=augment)",
        ),
        (
            {"augment": Augment([own, "flip", ("zoom", {"amount": (0.1, 0.3)})], seeds=[1])},
            "extract(model, images, store, cuts=['layer2'], "
            "augment=Augment([own, 'flip', 'zoom:amount=0.1..0.3'], seeds=[1]))",
        ),
        (
            {"augment": Augment([own, Mirrored()], seeds=[1])},
            "extract(model, images, store, cuts=['layer2'], augment=augment)",
        ),
        ({"view": View(size=12, resize=20)}, "extract(model, images, store, cuts=['layer2'], view=view)"),
    ],
)
def test_what_no_command_can_say_is_a_python_call(tmp_path: Path, change: dict[str, Any], call: str) -> None:
    model, images = StagedModel.from_module(net(), view=View(size=16, resize=20), name="net"), arrays(3)
    assert str(extract_remedy(model, images, Path("features"), cuts=["layer2"], **change)) == call
    store = FeatureStore(tmp_path / "features")
    names = {
        "extract": extract, "model": model, "images": images, "store": store, "Augment": Augment, "own": own,
        "augment": change.get("augment"), "view": change.get("view"),
    }  # fmt: skip
    eval(call, names)
    asked = {name: value for name, value in change.items() if name != "on_error"}
    assert plan(model, images, store, cuts=["layer2"], **asked).status()["missing"] == 0


@pytest.mark.parametrize(
    "change",
    [
        {"augment": Augment(own, seeds=[1])},
        {"view": View(size=16, resize=20, apply_exif=False)},
    ],
    ids=["own policy", "EXIF"],
)
def test_one_thing_that_no_flag_can_say_makes_it_a_call(folder: str, change: dict[str, Any]) -> None:
    images = ImageSet.from_folder(folder)
    assert isinstance(extract_remedy(named(), images, Path("f"), cuts=["layer2"]), Command)
    assert isinstance(extract_remedy(named(), images, Path("f"), cuts=["layer2"], **change), Call)
