"""Walks 1, 4, 7 and 8 of a user, from the command line and, where that is as natural, in Python."""

from __future__ import annotations

import argparse
import csv
import re
import runpy
import shutil
from pathlib import Path

import pytest
import torch
import torchvision
from support.programs import Run, photographs
from torch import Tensor

from featstore import FeatureStore, FeatureStoreError, ImageSet, View, backbone, extract
from training import Learner, finetune, train_head

SMALL = ["--backbone", "tiny.py:make_model", "--size", "32"]
RESNET = ["--backbone", "resnet18", "--weights", "none", "--size", "64"]


def held_out(run_folder: str) -> set[str]:
    with (Path(run_folder) / "valid_predictions.csv").open(newline="", encoding="utf-8") as file:
        return {row["image"] for row in csv.DictReader(file)}


# ---- 1. Twenty photographs in two folders, a laptop


def test_walk_1_one_command_makes_a_model_of_twenty_photographs(run: Run) -> None:
    ran = run(
        "featstore-train",
        *("head", "--images", "photos", "--store", "feats", *RESNET, "--extract", "--out", "runs/first"),
    )
    assert ran.code == 0
    assert ran.err.startswith(
        "no valid/ folder: 4 of 20 images held out (--valid 0.2, --split-seed 0). With 4 validation images accuracy "
        "moves in steps of 25 %.\n"
    )
    assert "train: 16 images from features, resnet18@layer4 concat, evaluation view" in ran.err
    assert re.search(
        r"^learning rate [\d.e-]+ \(to use it again: --lr [\d.e-]+\): 1 batch is too few to find a rate by: .* AdamW$",
        ran.err,
        re.M,
    )
    assert ran.err.count("epoch ") >= 10
    assert re.fullmatch(r"valid accuracy [01]\.\d{3} \(95 % interval .*, 4 images\) - runs/first\n", ran.out)
    predicted = run("featstore-train", "predict", "--model", "runs/first", "photos/cat/000.jpg", "--json").json
    assert {each["label"] for each in predicted[0]["top"]} == {"cat", "dog"}


def test_walk_1_in_python_gives_the_same_model(run: Run) -> None:
    flags = ["--images", "photos", "--store", "feats", *SMALL, "--extract", "--lr", "1e-2", "--epochs", "3"]
    run("featstore-train", "head", *flags, "--out", "runs/first")
    images = ImageSet.from_folder("photos").split(valid=0.2, seed=0)
    learn = train_head(
        backbone("tiny.py:make_model"),
        images,
        FeatureStore("feats"),
        view=View().resized(size=32),
        epochs=3,
        lr=1e-2,
        quiet=True,
    )
    saved = Learner.load("runs/first", quiet=True).model.tensors()
    assert all(torch.equal(tensor, saved[name]) for name, tensor in learn.model.tensors().items())


# ---- 4. My own checkpoint


@pytest.fixture(scope="module")
def trained() -> dict[str, Tensor]:
    """Somebody's weights of a resnet18 with 37 classes."""
    return weights_for_37_classes("resnet18")


@pytest.fixture(scope="module")
def trained_small() -> dict[str, Tensor]:
    """Somebody's weights of a network that is loaded in no time."""
    return weights_for_37_classes("squeezenet1_1")


@pytest.fixture
def trained_tiny(here: Path) -> dict[str, Tensor]:
    """Somebody's weights of the network in tiny.py, but of 37 classes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(37)
        tensors: dict[str, Tensor] = runpy.run_path("tiny.py")["make_model"]().state_dict()
    return {**tensors, "fc.weight": torch.ones(37, 16), "fc.bias": torch.ones(37)}


def weights_for_37_classes(name: str) -> dict[str, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(37)
        tensors: dict[str, Tensor] = torchvision.models.get_model(name, num_classes=37).state_dict()
    return tensors


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.module.", "model.", "net.", "backbone."])
@pytest.mark.parametrize("wrapper", [None, "state_dict", "model", "model_state_dict", "state_dict_ema"])
def test_walk_4_wrappers_and_prefixes_are_understood(
    here: Path, trained_tiny: dict[str, Tensor], wrapper: str | None, prefix: str
) -> None:
    tensors = {prefix + name: tensor for name, tensor in trained_tiny.items()}
    torch.save(tensors if wrapper is None else {"epoch": 37, wrapper: tensors}, "ep37.pth")
    loaded = backbone("tiny.py:make_model", "ep37.pth")
    assert all(torch.equal(tensor, trained_tiny[name]) for name, tensor in loaded.tensors().items())
    assert len(loaded.tensors()) == sum("fc" not in name for name in trained_tiny)


def test_walk_4_my_checkpoint_becomes_features(run: Run, here: Path, trained: dict[str, Tensor]) -> None:
    torch.save({"state_dict": {f"module.{name}": tensor for name, tensor in trained.items()}}, "ep37.pth")
    mine = ["--images", "photos", "--store", "feats", "--backbone", "resnet18", "--weights", "ep37.pth", "--size", "64"]
    ran = run("featstore", "extract", *mine)
    assert ran.code == 0
    assert "fc.weight has 37 rows: not used\nfc.bias has 37 rows: not used\n" in ran.err
    assert (
        "a weights file carries no preprocessing: 73/64 and ImageNet's mean assumed; --resize --mean --std "
        "--interpolation\n"
    ) in ran.err
    reference = torchvision.models.resnet18(num_classes=37)
    reference.load_state_dict(trained)
    assert FeatureStore("feats").sets()[0].spec.trunk == backbone(reference).digest("layer4")
    rate = ["--epochs", "1", "--lr", "1e-3"]
    assert run("featstore-train", "head", *mine, *rate, "--out", "runs/mine").code == 0


def test_walk_4_pickled_objects_are_refused_with_the_lines_that_save_tensors_alone(
    run: Run, here: Path, trained_small: dict[str, Tensor]
) -> None:
    torch.save({"state_dict": trained_small, "args": argparse.Namespace(lr=0.1)}, "ep37.pth")
    flags = ["--images", "photos", "--store", "feats", "--backbone", "squeezenet1_1", "--size", "64"]
    ran = run("featstore", "status", *flags, "--weights", "ep37.pth")
    assert (ran.code, ran.out) == (1, "")
    *_, first, second, third = ran.err.splitlines()
    assert "ep37.pth holds pickled objects besides tensors" in ran.err
    exec("\n".join(line.strip() for line in (first, second, third)), {})
    (saved,) = set(here.glob("*.pth")) - {here / "ep37.pth"}
    assert run("featstore", "status", *flags, "--weights", saved.name).code == 3


def test_walk_4_a_saved_run_is_a_backbone(run: Run, here: Path) -> None:
    flags = ["--images", "photos", "--epochs", "1", "--lr", "1e-2"]
    run("featstore-train", "finetune", *flags, *SMALL, "--out", "runs/tuned")
    ran = run(
        "featstore-train",
        *("head", *flags, "--store", "feats", "--backbone", "runs/tuned", "--extract", "--out", "runs/again"),
    )
    assert ran.code == 0
    stored = FeatureStore("feats").sets()[0]
    tuned = Learner.load("runs/tuned", quiet=True).model
    assert stored.spec.trunk == tuned.digest("conv2") != backbone("tiny.py:make_model").digest("conv2")
    assert stored.spec.rendered.size == 32  # the run's own view, without flags
    assert held_out("runs/again") == held_out("runs/tuned")


# ---- 7. More images next week


def test_walk_7_only_new_images_are_computed_and_the_split_hardly_moves(run: Run, here: Path) -> None:
    flags = ["--images", "photos", "--store", "feats", *SMALL]
    rate = ["--epochs", "2", "--lr", "1e-2"]
    assert "20 to compute" in run("featstore", "extract", *flags).err
    run("featstore-train", "head", *flags, *rate, "--out", "runs/first")
    photographs(here / "photos", count=10, first=10)

    incomplete = run("featstore-train", "head", *flags, *rate, "--out", "runs/second")
    assert incomplete.code == 1
    assert "20 are new" in incomplete.last_words
    assert "40 images: 20 stored, 20 to compute" in run("featstore", "extract", *flags).err
    second = run("featstore-train", "head", *flags, *rate, "--out", "runs/second", "--json")
    assert second.json["valid"]["images"] == 8
    old = {name for name in held_out("runs/second") if int(Path(name).stem) < 10}
    assert len(old ^ held_out("runs/first")) <= 2  # of twenty


def test_walk_7_what_goes_on_from_a_run_keeps_its_split(run: Run, here: Path) -> None:
    rate = ["--epochs", "1", "--lr", "1e-3"]
    run(
        "featstore-train",
        "head",
        "--images",
        "photos",
        "--store",
        "feats",
        *SMALL,
        "--extract",
        *rate,
        "--out",
        "runs/first",
    )
    first = held_out("runs/first")
    photographs(here / "photos", count=10, first=10)

    evaluated = run("featstore-train", "evaluate", "--model", "runs/first", "--images", "photos", "--json").json
    assert evaluated["valid"]["images"] >= len(first)
    tuned = run(
        "featstore-train", "finetune", "--images", "photos", "--from", "runs/first", *rate, "--out", "runs/tuned"
    )
    assert tuned.code == 0
    assert {name for name in held_out("runs/tuned") if int(Path(name).stem) < 10} == first
    assert len(held_out("runs/tuned")) > len(first)

    shutil.move(here / "photos", here / "renamed")  # the split goes by content
    (here / "renamed" / sorted(first)[0]).rename(here / "renamed" / "cat" / "moved.jpg")
    moved = run("featstore-train", "evaluate", "--model", "runs/first", "--images", "renamed", "--json").json
    assert moved["valid"] == pytest.approx(evaluated["valid"], rel=1e-6)  # in another order


def test_walk_7_training_on_held_out_images_is_refused_with_their_number(run: Run, here: Path) -> None:
    rate = ["--epochs", "1", "--lr", "1e-3"]
    run(
        "featstore-train",
        "head",
        "--images",
        "photos",
        "--store",
        "feats",
        *SMALL,
        "--extract",
        *rate,
        "--out",
        "runs/first",
    )
    flags = ["finetune", "--images", "photos", "--from", "runs/first", *rate, "--out", "runs/leak", "--valid", "0"]
    refused = run("featstore-train", *flags)
    assert (refused.code, refused.out) == (1, "")
    assert refused.last_words.startswith("4 of the 20 images to train on were held out by runs/first (first: ")
    assert not (here / "runs/leak").exists()
    assert run("featstore-train", *flags, "--allow-leak").code == 0

    images = ImageSet.from_folder("photos").split(valid=0.2, seed=1)
    with pytest.raises(FeatureStoreError, match=r"\d of the 16 images to train on were held out by runs/first"):
        finetune("runs/first", images, epochs=1, lr=1e-3, quiet=True)


def test_walk_7_a_new_class_is_named_and_shifts_nothing(run: Run, here: Path) -> None:
    rate = ["--epochs", "1", "--lr", "1e-3"]
    flags = ["--images", "photos", "--store", "feats", *SMALL, "--extract", *rate]
    run("featstore-train", "head", *flags, "--out", "runs/first")
    photographs(here / "photos", count=5, first=30, classes=("bird", "dog"))
    refused = run("featstore-train", "evaluate", "--model", "runs/first", "--images", "photos")
    assert refused.code == 1
    assert refused.last_words.startswith("The images have the class bird, which the model of runs/first doesn't know")
    assert run("featstore-train", "head", *flags, "--out", "runs/second").code == 0  # a head for the new classes
    assert Learner.load("runs/second", quiet=True).classes == ("bird", "cat", "dog")
    shutil.rmtree(here / "photos/cat")
    shutil.rmtree(here / "photos/bird")
    scored = run(
        "featstore-train", "evaluate", "--model", "runs/first", "--images", "photos", "--split", "train", "--json"
    )
    learn = Learner.load("runs/first", quiet=True)
    dogs = sorted(str(path) for path in Path("photos/dog").iterdir())
    assert learn.classes == ("cat", "dog")
    of_dog = learn.predict_proba(dogs)[:, 1]
    assert scored.json["train"]["images"] < len(dogs) == 15
    everything = ImageSet.from_folder("photos").with_splits(["valid"] * 15)
    accuracy = Learner.load("runs/first", everything, quiet=True).evaluate("valid")["accuracy"]
    assert accuracy == pytest.approx(float((of_dog > 0.5).mean()))


# ---- 8. layer3 or layer4?


def test_walk_8_one_extraction_serves_probes_and_the_tail(run: Run) -> None:
    flags = ["--images", "photos", "--store", "feats", *RESNET]
    extracted = run(
        "featstore", "extract", *flags, "--cut", "layer3", "--cut", "layer3:none", "--cut", "layer4", "--json"
    )
    assert [(each["cut"], each["reduce"], each["computed"]) for each in extracted.json["sets"]] == [
        ("layer3", "concat", 20),
        ("layer3", "none", 20),
        ("layer4", "concat", 20),
    ]
    rate = ["--epochs", "1", "--lr", "1e-3", "--json"]
    choices = {
        "third": ["--cut", "layer3"],
        "fourth": ["--cut", "layer4"],
        "tail": ["--cut", "layer4", "--freeze-to", "layer3"],
    }
    read = {
        "third": "resnet18@layer3 concat",
        "fourth": "resnet18@layer4 concat",
        "tail": "resnet18@layer3 none",
    }
    for name, choice in choices.items():
        ran = run("featstore-train", "head", *flags, *choice, *rate, "--out", f"runs/{name}")
        assert (ran.code, ran.json["inputs"]) == (0, "features")
        assert f"train: 16 images from features, {read[name]}, evaluation view" in ran.err

    untouched = backbone("resnet18", "none")
    loaded = {name: Learner.load(f"runs/{name}", quiet=True).model for name in choices}
    assert loaded["third"].cut_points[-1] == "layer3"
    assert loaded["fourth"].digest("layer4") == untouched.digest("layer4")
    assert loaded["tail"].digest("layer3") == untouched.digest("layer3")
    assert loaded["tail"].digest("layer4") != untouched.digest("layer4")


def test_walk_8_in_python(here: Path) -> None:
    images, store = ImageSet.from_folder("photos").split(valid=0.2, seed=0), FeatureStore("feats")
    model, view = backbone("tiny.py:make_model"), View().resized(size=32)
    extract(model, images, store, cuts=["relu1", "relu1:none", "conv2"], view=view)
    probe = Learner(model, images, store, cut="relu1", view=view, quiet=True)
    probe.fit(1, 1e-3)
    tail = Learner(model, images, store, cut="conv2", view=view, quiet=True)
    tail.freeze_to("relu1")
    tail.fit(1, 1e-3)
    assert (probe.read_from, tail.read_from) == ("features", "features")
    assert probe.cut == "relu1"
    assert tail.model.digest("relu1") == model.digest("relu1")
    assert tail.model.digest("conv2") != model.digest("conv2")
