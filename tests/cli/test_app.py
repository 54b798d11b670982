from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import urllib.error
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import pytest
import torch
import torchvision
from PIL import Image
from sklearn.datasets import load_sample_images
from support.processes import AS_A_MODULE, Processes

from featstore import FeatureStore, ImageSet, backbone
from featstore.cli.app import main
from featstore.cli.flags import ImageFlags, ViewFlags, load_model, parse_numbers, parse_seeds, parse_seeds_or_fresh
from featstore.extraction.remedy import image_flags
from featstore.images.views import View

NUM_EACH = 10

TINY = """
from collections import OrderedDict

from torch import nn


def make_model():
    layers = [("conv1", nn.Conv2d(3, 8, 3, 2)), ("bn1", nn.BatchNorm2d(8)), ("relu1", nn.ReLU())]
    layers += [("conv2", nn.Conv2d(8, 16, 3, 2)), ("pool", nn.AdaptiveAvgPool2d(1)), ("flat", nn.Flatten())]
    return nn.Sequential(OrderedDict([*layers, ("fc", nn.Linear(16, 5))]))
"""

# Interrupts itself at an all-white image: as Ctrl-C does, at a moment that the test chooses.
IMPATIENT = """
import os
import signal
from collections import OrderedDict

from torch import nn


class Gate(nn.Module):
    def forward(self, values):
        if bool((values.amin(dim=(1, 2, 3)) > 2).any()) and "INTERRUPT_AT_WHITE" in os.environ:
            signal.raise_signal(int(os.environ["INTERRUPT_AT_WHITE"]))
        return values


def make_model():
    layers = [("gate", Gate()), ("conv", nn.Conv2d(3, 8, 3, 2)), ("pool", nn.AdaptiveAvgPool2d(1))]
    return nn.Sequential(OrderedDict([*layers, ("flat", nn.Flatten()), ("fc", nn.Linear(8, 5))]))
"""


class Ran(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Program = Callable[..., Ran]


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("photographs") / "photos"
    for name, whole in zip(("cat", "dog"), load_sample_images().images, strict=True):
        (root / name).mkdir(parents=True)
        for place in range(NUM_EACH):
            crop = whole[place * 7 : place * 7 + 90, place * 5 : place * 5 + 120]
            Image.fromarray(crop).save(root / name / f"{place:03}.jpg")
    return root


@pytest.fixture
def here(tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with photos/ and tiny.py."""
    shutil.copytree(photos, tmp_path / "photos")
    (tmp_path / "tiny.py").write_text(TINY, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    return tmp_path


@pytest.fixture
def featstore(here: Path, capsys: pytest.CaptureFixture[str]) -> Program:
    def ran(*arguments: str) -> Ran:
        capsys.readouterr()
        code = main(arguments)
        return Ran(code, *capsys.readouterr())

    return ran


def flags(*more: str, images: str = "photos", store: str = "feats") -> list[str]:
    return ["--images", images, "--store", store, "--backbone", "tiny.py:make_model", "--size", "32", *more]


# ---- The walk: extract, look, add images, extract the rest


def test_images_added_later_are_the_only_ones_computed(featstore: Program, here: Path) -> None:
    assert featstore("status", *flags()).out == "20 images, 0 stored, 20 to compute, 1,280 bytes\n"
    assert not (here / "feats").exists()

    first = featstore("extract", *flags())
    assert first.code == 0
    assert first.err.startswith(
        "no valid/ folder: 4 of 20 images held out (--valid 0.2, --split-seed 0). With 4 validation images accuracy "
        "moves in steps of 25 %.\n20 images: 0 stored, 20 to compute, 1,280 bytes in 1 feature set\n"
    )
    assert re.search(r"^0 rows reused, 20 computed, 0 images failed, \d+\.\d s$", first.err, re.MULTILINE)
    key = FeatureStore("feats").sets()[0].key
    assert first.out == (
        "key       cut    reduce  view        seed  rows  computed  reused  failed\n"
        f"{key[:8]}  conv2  concat  evaluation  -       20        20       0       0\n"
    )
    assert featstore("status", *flags()).code == 0

    for number in range(3):
        image = Image.open(here / "photos" / "cat" / f"{number:03}.jpg").rotate(90)
        image.save(here / "photos" / "cat" / f"new{number}.png")
    assert featstore("status", *flags("--json")).json["missing"] == 3
    assert featstore("status", *flags()).code == 3
    assert "23 images: 20 stored, 3 to compute" in (second := featstore("extract", *flags("--json"))).err
    assert [(each["rows"], each["computed"], each["reused"]) for each in second.json["sets"]] == [(23, 3, 20)]


def test_the_same_extraction_again_computes_nothing(featstore: Program) -> None:
    wanted = flags("--cut", "relu1:none", "--cut", "conv2", "--augment", "flip", "--seeds", "0,2", "--json")
    first, again = featstore("extract", *wanted), featstore("extract", *wanted)
    names = ("cut", "reduce", "view", "seed", "rows", "computed", "reused", "failed")
    assert [tuple(each[name] for name in names) for each in first.json["sets"]] == [
        ("relu1", "none", "evaluation", None, 20, 20, 0, 0),
        ("relu1", "none", "flip", 0, 16, 16, 0, 0),
        ("relu1", "none", "flip", 2, 16, 16, 0, 0),
        ("conv2", "concat", "evaluation", None, 20, 20, 0, 0),
        ("conv2", "concat", "flip", 0, 16, 16, 0, 0),
        ("conv2", "concat", "flip", 2, 16, 16, 0, 0),
    ]
    assert [(each["computed"], each["reused"]) for each in again.json["sets"]] == [(0, 20), (0, 16), (0, 16)] * 2
    assert set(again.json) == {"sets", "failed", "missing", "seconds", "failures"}
    assert (again.json["failed"], again.json["missing"], again.json["failures"]) == (0, 0, [])


def test_ls_lists_what_show_shows(featstore: Program) -> None:
    featstore("extract", *flags("--augment", "flip", "--seeds", "3"))
    listed = featstore("ls", "--store", "feats", "--json").json
    assert listed == [each.describe() for each in FeatureStore("feats").sets()]
    assert [(each["view"], each["seed"], each["rows"]) for each in listed] == [
        ("evaluation", None, 20),
        ("flip", 3, 16),
    ]
    header, *lines = featstore("ls", "--store", "feats").out.splitlines()
    assert header.split() == [
        *("key", "backbone", "cut", "reduce", "view", "seed", "size", "dtype", "precision", "rows", "failed", "shape"),
        *("MB", "when"),
    ]
    assert [line.split()[:8] for line in lines] == [
        [each["key"][:8], "tiny", "conv2", "concat", each["view"], str(each["seed"] or "-"), "32", "float16"]
        for each in listed
    ]

    shown = featstore("show", listed[1]["key"][:8], "--store", "feats", "--json").json
    assert listed[1].items() <= shown.items()
    found = FeatureStore("feats").set(listed[1]["key"])
    assert shown["spec"] == found.spec.facts()
    model = backbone("tiny.py:make_model")
    assert {each["name"]: each["digest"] for each in shown["stages"]} == {
        name: model.digest(name) for name in ("conv1", "bn1", "relu1", "conv2")
    }
    assert [each["rows"] for each in shown["files"]] == [16]
    text = featstore("show", listed[1]["key"][:8], "--store", "feats").out
    assert re.search(r"^spec\.view\.seed +3$", text, re.MULTILINE)
    assert re.search(rf"^conv2 +NCHW +16x7x7 +{model.digest('conv2')}$", text, re.MULTILINE)


def test_ls_names_a_damaged_part_and_lists_the_other_sets(featstore: Program) -> None:
    featstore("extract", *flags("--cut", "relu1", "--cut", "conv2"))
    sound, damaged = FeatureStore("feats").sets()
    part = damaged.parts[0].path
    part.write_bytes(part.read_bytes()[:-100])
    ran = featstore("ls", "--store", "feats", "--json")
    assert (ran.code, [each["key"] for each in ran.json]) == (1, [sound.key])
    assert part.name in ran.err


def test_an_empty_store_lists_nothing(featstore: Program, here: Path) -> None:
    (here / "feats").mkdir()
    assert featstore("ls", "--store", "feats") == Ran(0, "", "feats holds no feature sets.\n")
    assert featstore("ls", "--store", "feats", "--json").json == []


def test_extraction_is_the_one_of_the_library(featstore: Program) -> None:
    featstore("extract", *flags("--dtype", "float32", "--reduce", "avg", "--mean", "0.5,0.5,0.5", "--resize", "40"))
    model = backbone("tiny.py:make_model")
    images = ImageSet.from_folder("photos")
    stored = FeatureStore("feats").sets()[0]
    view = stored.spec.rendered
    assert (view.size, view.resize, view.mean, view.std) == (32, 40, (0.5, 0.5, 0.5), model.view.std)
    pixels = torch.stack([_center(Path("photos") / image, 40, 32) for image in images.ids])
    values = (pixels.float() / 255 - 0.5) / torch.tensor(model.view.std)[:, None, None]
    with torch.no_grad():
        expected = model.trunk("conv2").eval()(values).mean(dim=(2, 3))
    features = FeatureStore("feats").features(images, stored.key).tensor("cpu")
    # Of a JPEG, two decoders differ by a step of brightness here and there.
    torch.testing.assert_close(features, expected, rtol=0, atol=0.01 * float(expected.abs().max()))


def test_a_named_backbone_is_cut_at_its_default(featstore: Program) -> None:
    wanted = ["--images", "photos", "--store", "feats", "--backbone", "resnet18", "--weights", "none", "--size", "64"]
    ran = featstore("extract", *wanted, "--batch-size", "4", "--json")
    assert (ran.code, ran.json["sets"][0]["cut"], ran.json["sets"][0]["reduce"]) == (0, "layer4", "concat")
    assert FeatureStore("feats").sets()[0].parts[0].shape == (1024,)


# ---- Splits and tables


@pytest.mark.parametrize(
    ("num_valid", "sentence"),
    [
        (
            "0.05",
            "2 of 20 images held out (--valid 0.05, --split-seed 0). With 2 validation images accuracy moves in steps ",
        ),
        (
            "0.3",
            "6 of 20 images held out (--valid 0.3, --split-seed 0). With 6 validation images accuracy moves in steps "
            "of 16.7 %.",
        ),
    ],
)
def test_the_program_says_what_it_holds_out(featstore: Program, num_valid: str, sentence: str) -> None:
    assert sentence in featstore("status", *flags("--valid", num_valid)).err


def test_nothing_is_held_out_with_valid_0(here: Path) -> None:
    given = ImageFlags(images="photos", valid=0.0).given()
    assert (len(given.images.valid), len(given.images.train), given.notes) == (0, 0, ())


def test_a_split_of_its_own_is_used_as_it_is(featstore: Program, here: Path) -> None:
    for split, places in (("train", range(8)), ("valid", range(8, 10))):
        for name in ("cat", "dog"):
            (here / "own" / split / name).mkdir(parents=True)
            for place in places:
                shutil.copy(here / "photos" / name / f"{place:03}.jpg", here / "own" / split / name)
    ran = featstore("status", *flags("--augment", "flip", "--seeds", "0", images="own"))
    assert "held out" not in ran.err
    images = ImageFlags(images="own").given().images
    assert (len(images.train), len(images.valid)) == (16, 4)
    ran = featstore("status", *flags("--valid", "0.3", images="own"))
    assert ran == Ran(
        2,
        "",
        "--valid 0.3 would deal images that bring a split of their own (20 images, 2 classes (cat 10, dog 10); train "
        "16, valid 4). Leave out --valid, or give images without a split.\n",
    )


def test_a_table_with_groups_is_split_by_groups(featstore: Program, here: Path) -> None:
    rows = [f"{name}/{place:03}.jpg;{name};p{place // 2}" for name in ("cat", "dog") for place in range(NUM_EACH)]
    table = here / "table.csv"
    table.write_text("\n".join(["file,kind,patient", *rows]).replace(";", ","), encoding="utf-8")
    columns = ["--root", "photos", "--path-column", "file", "--label-column", "kind", "--group-column", "patient"]
    ran = featstore("extract", *flags(*columns, images="table.csv"))
    assert ran.code == 0
    assert ran.err.startswith("no split column: 4 of 20 images held out")
    columns_of = ImageFlags(
        images="table.csv", root="photos", path_column="file", label_column="kind", group_column="patient"
    )
    images = columns_of.given().images
    assert images.groups is not None
    held_out = {group for group, split in zip(images.groups, images.splits, strict=True) if split == "valid"}
    kept = {group for group, split in zip(images.groups, images.splits, strict=True) if split == "train"}
    assert len(held_out) == 1
    assert not held_out & kept


def test_a_tables_own_split_is_found_and_said(featstore: Program, here: Path) -> None:
    names = [f"{name}/{place:03}.jpg" for name in ("cat", "dog") for place in range(NUM_EACH)]
    rows = [f"{name},{name[:3]},{('train', 'train', 'test', 'valid')[place % 4]}" for place, name in enumerate(names)]
    (here / "own.csv").write_text("\n".join(["path,label,split", *rows]), encoding="utf-8")
    wanted = flags("--root", "photos", images="own.csv")
    found = "split by the table's column split: train 10, valid 5, test 5 (to deal anew: --split-column '')"
    assert featstore("status", *wanted).err.splitlines() == [found]
    images = ImageFlags(images="own.csv", root="photos").given().images
    assert images.valid.ids == tuple(names[3::4])
    named = ImageFlags(images="own.csv", root="photos", split_column="split").given()
    assert (named.images.splits.tolist(), named.notes) == (images.splits.tolist(), ())
    assert (
        featstore("status", *wanted, "--valid", "0.3")
        .err.splitlines()[-1]
        .endswith("test 5). Leave out --valid, or leave the table's column aside with --split-column ''.")
    )
    anew = featstore("status", *wanted, "--split-column", "").err
    assert anew.startswith("no split column is used: 4 of 20 images held out")

    (here / "empty.csv").write_text("\n".join(["path,label,split", *(row.rpartition(",")[0] + "," for row in rows)]))
    undealt = featstore("status", *flags("--root", "photos", images="empty.csv")).err
    assert undealt.startswith("the column split is empty: 4 of 20 images held out")


@pytest.mark.parametrize("store", ["photos/feats", "photos", "photos/cat/feats"])
def test_a_store_among_the_images_is_no_class(featstore: Program, here: Path, store: str) -> None:
    assert featstore("extract", *flags(store=store)).code == 0
    again = featstore("extract", *flags(store=store))
    assert again.code == 0
    assert "20 rows reused, 0 computed" in again.err
    assert ImageSet.from_folder(here / "photos").classes == ("cat", "dog")


@pytest.mark.parametrize("place", ["photos/feats", "photos"])
def test_a_store_among_the_images_is_no_empty_class(featstore: Program, here: Path, place: str) -> None:
    featstore("extract", *flags())
    shutil.copytree(here / "feats", here / place, dirs_exist_ok=True)
    images = ImageSet.from_folder("photos")
    assert images.classes == ("cat", "dog")
    if place == "photos/feats":
        assert images.skipped == (("feats", "a feature store"),)
    else:
        assert {reason for _, reason in images.skipped} == {"of a feature store"}
    ran = featstore("status", *flags())
    assert "delete" not in ran.err
    assert ran.code == 0


def test_a_store_given_for_images_is_called_what_it_is(featstore: Program, here: Path) -> None:
    featstore("extract", *flags())
    ran = featstore("status", *flags(images="feats"))
    assert ran.err == (
        f"{here}/feats is a feature store, which holds no images. Expected a folder of images. Name the one whose "
        "features these are.\n"
    )


def test_a_table_without_labels_has_a_flag(here: Path) -> None:
    (here / "table.csv").write_text("path\ncat/000.jpg\ncat/001.jpg\n", encoding="utf-8")
    given = ImageFlags(images="table.csv", root="photos", label_column="").given()
    assert not given.images.is_labelled
    assert given.notes == ("no split column: 1 of 2 images held out (--valid 0.2, --split-seed 0).",)
    assert image_flags(given.images) == ["--images", "table.csv", "--root", "photos", "--label-column", ""]


def test_skipped_files_are_named(featstore: Program, here: Path) -> None:
    for name in ("a.txt", "b.txt", "c.txt", "d.txt"):
        (here / "photos" / name).touch()
    reason = "not an image by its suffix"
    assert featstore("status", *flags()).err.startswith(
        f"4 files skipped (a.txt: {reason}, b.txt: {reason}, c.txt: {reason}, ...)\n"
    )


# ---- Images that can't be read


def test_a_corrupt_image_stops_the_extraction_and_is_named(featstore: Program, here: Path) -> None:
    whole = (here / "photos" / "cat" / "003.jpg").read_bytes()
    (here / "photos" / "cat" / "003.jpg").write_bytes(whole[:200])
    ran = featstore("extract", *flags())
    assert (ran.code, ran.out) == (1, "")
    last = ran.err.splitlines()[-1]
    assert last.startswith("cat/003.jpg: ")
    assert last.endswith(". Repair, remove or bring back the file, or leave such images out with --on-error skip.")
    assert "Traceback" not in ran.err
    assert "Traceback" in featstore("extract", *flags("--debug")).err


def test_a_corrupt_image_can_be_skipped(featstore: Program, here: Path) -> None:
    (here / "photos" / "cat" / "003.jpg").write_text("not a picture", encoding="utf-8")
    ran = featstore("extract", *flags("--on-error", "skip", "--json"))
    assert ran.code == 0
    assert [(each["rows"], each["failed"]) for each in ran.json["sets"]] == [(19, 1)]
    ((image, reason),) = ran.json["failures"]
    assert image == "cat/003.jpg"
    assert f"  cat/003.jpg: {reason}\n" in ran.err
    skipping = featstore("status", *flags("--on-error", "skip", "--json"))
    assert skipping.code == 0
    assert {name: skipping.json[name] for name in ("images", "stored", "missing", "failed")} == {
        "images": 20,
        "stored": 19,
        "missing": 0,
        "failed": 1,
    }
    default = featstore("status", *flags("--json"))
    assert (default.code, default.json["missing"], default.json["failed"]) == (3, 1, 1)
    assert featstore("status", *flags()).out == "20 images, 19 stored, 1 to compute, 1 failed, 64 bytes\n"
    key = featstore("ls", "--store", "feats", "--json").json[0]["key"]
    assert reason in featstore("show", key, "--store", "feats").out


def test_a_nightly_script_can_tell_an_absent_file_from_a_failure(featstore: Program, here: Path) -> None:
    (here / "t.csv").write_text("path,label\ncat/000.jpg,cat\ncat/gone.jpg,cat\ndog/000.jpg,dog\n", encoding="utf-8")
    wanted = flags("--root", "photos", images="t.csv")
    stopped = featstore("extract", *wanted)
    assert (stopped.code, stopped.out) == (3, "")
    assert stopped.err.splitlines()[-1] == (
        "1 of 3 image files is absent (first: cat/gone.jpg). Expected all. Bring them back, or say with --root "
        "where a table's paths start; or extract the others with --on-error skip."
    )
    assert not (here / "feats").exists()
    skipped = featstore("extract", *wanted, "--on-error", "skip", "--json")
    assert (skipped.code, skipped.json["failed"], skipped.json["missing"]) == (3, 0, 1)
    assert [image for image, _ in skipped.json["failures"]] == ["cat/gone.jpg"]
    (here / "photos/cat/gone.jpg").write_bytes(b"no photograph")
    assert featstore("extract", *wanted).code == 1
    skipped = featstore("extract", *wanted, "--on-error", "skip", "--json")
    assert (skipped.code, skipped.json["failed"], skipped.json["missing"]) == (0, 1, 0)


def test_an_absent_file_is_missing_even_when_failures_are_skipped(featstore: Program, here: Path) -> None:
    rows = ["path,label", "cat/000.jpg,cat", "cat/001.jpg,cat", "dog/000.jpg,dog", "dog/gone.jpg,dog"]
    (here / "table.csv").write_text("\n".join(rows), encoding="utf-8")
    wanted = flags("--root", "photos", "--on-error", "skip", "--json", images="table.csv")
    ran = featstore("extract", *wanted)
    assert (ran.code, ran.json["sets"][0]["rows"]) == (3, 3)
    assert [image for image, _ in ran.json["failures"]] == ["dog/gone.jpg"]
    status = featstore("status", *wanted)
    assert (status.code, status.json["missing"], status.json["failed"]) == (3, 1, 0)


def test_only_the_first_failures_are_printed_and_json_has_all(featstore: Program, here: Path) -> None:
    for place in range(NUM_EACH):
        (here / "photos" / "cat" / f"bad{place}.jpg").write_text(f"cat {place}", encoding="utf-8")
        (here / "photos" / "dog" / f"bad{place}.jpg").write_text(f"dog {place}", encoding="utf-8")
    ran = featstore("extract", *flags("--on-error", "skip", "--json"))
    assert "  cat/bad9.jpg: " in ran.err
    assert "dog/bad0.jpg" not in ran.err
    assert "  ... and 10 more\n" in ran.err
    assert len(ran.json["failures"]) == 20


def test_a_name_that_is_not_text_prints(featstore: Program, here: Path) -> None:
    name = os.fsdecode(b"caf\xe9 \xff.jpg")
    (here / "photos" / "cat" / name).touch()
    (here / "photos" / "cat" / "köpek 狗.jpg").touch()
    ran = featstore("extract", *flags("--on-error", "skip", "--json"))
    assert {image for image, _ in ran.json["failures"]} == {f"cat/{name}", "cat/köpek 狗.jpg"}
    assert "cat/caf\\udce9 \\udcff.jpg: " in ran.err
    assert "cat/köpek 狗.jpg: " in ran.err


@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGTERM])
def test_after_ctrl_c_or_the_end_of_its_time_what_was_computed_is_filed(
    featstore: Program, here: Path, monkeypatch: pytest.MonkeyPatch, by: signal.Signals
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    (here / "impatient.py").write_text(IMPATIENT, encoding="utf-8")
    Image.new("RGB", (90, 90), "white").save(here / "photos" / "dog" / "white.png")
    wanted = ["--images", "photos", "--store", "feats", "--backbone", "impatient.py:make_model", "--size", "32"]
    monkeypatch.setenv("INTERRUPT_AT_WHITE", str(int(by)))
    ran = featstore("extract", *wanted, "--batch-size", "4")
    assert (ran.code, ran.out) == (130, "")
    assert signal.getsignal(signal.SIGTERM) == before
    assert ran.err.endswith("\nInterrupted. What was computed is filed; the same command computes the rest.\n")
    monkeypatch.delenv("INTERRUPT_AT_WHITE")
    again = featstore("extract", *wanted, "--json")
    assert [(each["computed"], each["reused"]) for each in again.json["sets"]] == [(1, 20)]


# ---- Backbones and weights


def test_backbones_lists_names_and_weights(featstore: Program) -> None:
    listed = {each["name"]: each["weights"] for each in featstore("backbones", "--json").json}
    assert listed["resnet50"] == ["IMAGENET1K_V2", "IMAGENET1K_V1"]
    assert set(listed) >= {"resnet34", "squeezenet1_1", "vit_b_32"}
    assert re.search(r"^resnet50 +IMAGENET1K_V2, IMAGENET1K_V1$", featstore("backbones").out, re.MULTILINE)


def test_backbones_of_a_name_lists_its_cuts(featstore: Program) -> None:
    facts = featstore("backbones", "resnet18", "--json").json
    reference = torchvision.models.resnet18(weights=None)
    assert facts["parameters"] == sum(parameter.numel() for parameter in reference.parameters())
    cuts = {each["name"]: each for each in facts["cuts"]}
    assert (cuts["layer4"]["shape"], cuts["layer4"]["layout"]) == ([512, 7, 7], "NCHW")
    assert [name for name, cut in cuts.items() if cut["is_default"]] == ["layer4"] == [facts["default_cut"]]
    text = featstore("backbones", "resnet18")
    assert text.err == "resnet18: 11,689,512 parameters; shapes for images of 224 pixels\n"
    assert re.search(r"^layer4 +512x7x7 +NCHW +[\d,]+ +\(default\)", text.out, re.MULTILINE)


def test_backbones_of_my_own_function_lists_its_cuts(featstore: Program) -> None:
    facts = featstore("backbones", "tiny.py:make_model", "--json").json
    assert [each["name"] for each in facts["cuts"]] == ["conv1", "bn1", "relu1", "conv2", "pool", "flat", "fc"]
    assert facts["default_cut"] == "conv2"


def test_a_weights_file_must_fit_up_to_the_deepest_cut(featstore: Program, here: Path) -> None:
    tensors = backbone("tiny.py:make_model").tensors()
    torch.save({name: value for name, value in tensors.items() if name.startswith(("conv1", "bn1"))}, "early.pth")
    assert featstore("extract", *flags("--weights", "early.pth", "--cut", "relu1")).code == 0
    ran = featstore("status", *flags("--weights", "early.pth", "--cut", "conv2", "--cut", "relu1"))
    assert (ran.code, ran.out) == (1, "")
    assert ran.err.splitlines()[-1] == (
        "The weights in early.pth don't fit tiny: conv2.weight is missing; conv2.bias is missing. Give the backbone "
        "that they were trained for (--backbone), or other weights."
    )


def test_what_a_weights_file_leaves_open_is_said(featstore: Program, here: Path) -> None:
    tensors = backbone("tiny.py:make_model").tensors()
    torch.save({**tensors, "fc.weight": torch.zeros(37, 16), "fc.bias": torch.zeros(37)}, "ep37.pth")
    said = featstore("status", *flags("--weights", "ep37.pth")).err
    assert "fc.weight has 37 rows: not used\n" in said
    assert (
        "a weights file carries no preprocessing: 256/224 and ImageNet's mean assumed; --resize --size --mean --std "
        "--interpolation\n"
    ) in said


def test_without_network_the_sentence_says_which_file_belongs_where(
    featstore: Program, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_network(*_: object, **__: object) -> NoReturn:
        raise urllib.error.URLError("Temporary failure in name resolution")

    monkeypatch.setattr("torch.hub.download_url_to_file", no_network)
    monkeypatch.setenv("TORCH_HOME", str(here / "torch"))
    wanted = ["--images", "photos", "--store", "feats", "--backbone", "resnet18", "--size", "64"]
    folder, file = here / "torch" / "hub" / "checkpoints", "resnet18-f37072fd.pth"
    ran = featstore("status", *wanted)
    assert (ran.code, ran.out) == (1, "")
    assert ran.err.splitlines()[-1] == (
        "The weights IMAGENET1K_V1 of resnet18 aren't here and can't be downloaded (<urlopen error Temporary failure "
        f"in name resolution>). They are the file {file}, which belongs into {folder}. On a machine with network, run "
        "python -c \"import torchvision.models as m; m.get_model('resnet18', weights='IMAGENET1K_V1')\" and copy the "
        "file; or give --weights FILE, or --weights none for a random initialisation (in Python: weights=FILE, "
        'weights="none").'
    )
    folder.mkdir(parents=True, exist_ok=True)
    reference = torchvision.models.resnet18(weights=None)
    torch.save(reference.state_dict(), folder / file)
    assert featstore("status", *wanted).code == 3


# ---- Wrong input


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--reduce", "mean"], "--reduce is 'mean'. Expected auto, none, avg, max, concat, token or tokens."),
        (["--dtype", "float8"], "--dtype is 'float8'. Expected float16, float32 or bfloat16."),
        (["--precision", "fp8"], "--precision is 'fp8'. Expected fp32, tf32, bf16 or fp16."),
        (["--task", "regression"], "--task is 'regression'. Expected single or multi."),
        (["--on-error", "warn"], "--on-error is 'warn'. Expected raise or skip."),
        (["--device", "abacus"], "'abacus' is no device. Expected auto, cpu, cuda or cuda:1."),
        (
            ["--interpolation", "lanczos"],
            "--interpolation is 'lanczos'. Expected bilinear, bicubic, nearest or nearest-exact.",
        ),
        (
            ["--augment", "side_on", "--seeds", "0"],
            "--augment is 'side_on'. Expected none, flip or random_resized_crop.",
        ),
        (
            ["--augment", "flip"],
            "--augment flip needs seeds, and there is no default for them. Give --seeds 0-3 for four fixed views, "
            "which can be stored, or, in training, --seeds fresh for new views each epoch.",
        ),
        (
            ["--seeds", "0-3"],
            "--seeds 0-3 is given without an augmentation, and the evaluation view has no seeds. Add --augment POLICY, "
            "or leave out --seeds.",
        ),
        (
            ["--augment", "flip", "--seeds", "fresh"],
            "Fresh views can't be stored: each epoch has its own (--seeds fresh). Give fixed seeds, such as --seeds "
            "0-3, or train from images: featstore-train ... --seeds fresh.",
        ),
        (
            ["--augment", "flip", "--seeds", "3-1"],
            "--seeds is '3-1', and '3-1' is neither a seed nor a rising range of seeds. Expected numbers from 0 on, "
            "such as --seeds 0-3 or --seeds 0,2,5-7.",
        ),
        (
            ["--mean", "0.5;0.5"],
            "--mean is '0.5;0.5'. Expected numbers with commas between them, such as --mean 0.5,0.5,0.5.",
        ),
        (["--std", "1,2"], "--std is '1,2', 2 numbers. Expected three, for red, green and blue."),
        (
            ["--split-column", "split"],
            "--split-column split is for a table of images, and photos is none. Leave it out, or give a .csv or .tsv "
            "file with --images.",
        ),
        (["--cut", "layer9"], "tiny has no cut 'layer9'. Its cuts are conv1, bn1, relu1, conv2, pool, flat, fc."),
        (
            ["--cut", "conv2:mean"],
            "'mean' is no reduction. The reductions are auto, none, avg, max, concat, token, tokens.",
        ),
        (
            ["--valid", "1.5"],
            "valid is 1.5 and test is 0.0. Expected fractions of 0 or more with a sum below 1. Leave ",
        ),
        (["--store", "tiny.py"], "--store tiny.py is a file. Expected a folder, or the name of a new one."),
    ],
)
def test_wrong_usage_is_a_sentence_and_exit_code_2(featstore: Program, arguments: list[str], sentence: str) -> None:
    ran = featstore("extract", *flags(*arguments))
    assert (ran.code, ran.out) == (2, "")
    last = ran.err.splitlines()[-1]
    assert last == sentence if sentence.endswith(".") else last.startswith(sentence)
    assert not Path("feats").exists()


def test_an_unknown_backbone_is_refused_with_the_names(featstore: Program) -> None:
    for ran in (
        featstore("extract", "--images", "photos", "--store", "feats", "--backbone", "resnet35"),
        featstore("backbones", "resnet35"),
    ):
        assert (ran.code, ran.out) == (2, "")
        assert ran.err.splitlines()[-1] == (
            "'resnet35' is no backbone. Expected one of resnet18, resnet34, resnet50, resnet101, resnet152, "
            "squeezenet1_0, squeezenet1_1, vit_b_16, vit_b_32, vit_l_16, vit_l_32, vit_h_14; a function in your own "
            "file (path/to/file.py:make_model); or the folder of a saved run."
        )


def test_an_unknown_cut_is_refused_before_weights_are_read(
    featstore: Program, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(here / "torch"))
    wanted = ["--images", "photos", "--store", "feats", "--backbone", "resnet18", "--cut", "layer5"]
    ran = featstore("extract", *wanted)
    assert ran.code == 2
    assert ran.err.splitlines()[-1].startswith("resnet18 has no cut 'layer5'. Its cuts are conv1, bn1, relu, maxpool, ")
    assert not (here / "torch").exists()


def test_a_size_is_refused_where_the_backbone_has_its_own(featstore: Program) -> None:
    wanted = ["--images", "photos", "--store", "feats", "--backbone", "vit_b_32", "--weights", "none", "--size", "64"]
    ran = featstore("status", *wanted)
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.splitlines()[-1] == (
        "vit_b_32 takes images of 224 pixels only, not 64: its position embeddings are made for that size. Leave out "
        "--size, or choose a backbone without them."
    )


def test_an_empty_folder_is_refused_with_what_was_found(featstore: Program, here: Path) -> None:
    (here / "empty").mkdir()
    assert featstore("extract", *flags(images="empty")) == Ran(
        2,
        "",
        f"{here}/empty holds no images: found 0 folders and 0 other files. Expected files that end with .bmp, .gif, "
        ".jfif, .jpe, .jpeg, .jpg, .png, .tif, .tiff, .webp. Put images there, or name another folder.\n",
    )


@pytest.mark.parametrize("command", [["ls"], ["show", "7c41"]])
def test_a_missing_store_is_a_sentence(featstore: Program, command: list[str]) -> None:
    ran = featstore(*command, "--store", "nowhere")
    assert (ran.code, ran.out) == (1, "")
    assert ran.err.startswith("There is no store nowhere. Give the folder of an existing one")
    assert len(ran.err.splitlines()) == 1


def test_an_unknown_key_is_a_sentence(featstore: Program, here: Path) -> None:
    (here / "feats").mkdir()
    assert featstore("show", "7c41", "--store", "feats") == Ran(
        1, "", "feats holds no feature set 7c41. List what it holds: featstore ls --store feats\n"
    )


def test_a_fault_in_my_own_file_is_no_wrong_usage(featstore: Program, here: Path) -> None:
    (here / "faulty.py").write_text("def make_model():\n    raise ValueError('no such layer')\n", encoding="utf-8")
    assert featstore("backbones", "faulty.py:make_model") == Ran(
        1, "", "faulty.py:make_model failed with ValueError: no such layer. Mend that function.\n"
    )


def test_a_folder_that_cant_be_written_is_a_sentence(featstore: Program, here: Path) -> None:
    (here / "taken").touch()
    ran = featstore("extract", *flags(store="taken/feats"))
    assert (ran.code, ran.out) == (1, "")
    assert ran.err.splitlines()[-1].endswith(": Not a directory.")


# ---- Help, and the program as a process


def test_help_shows_every_default(featstore: Program) -> None:
    ran = featstore("extract", "--help")
    assert (ran.code, ran.err) == (0, "")
    text = " ".join(ran.out.split())
    for flag, default in {
        "--path-column NAME": "[default: path]",
        "--valid FRACTION": "[default: (0.2)]",
        "--dtype float16|float32|bfloat16": "[default: float16]",
        "--precision fp32|tf32|bf16|fp16": "[default: fp32]",
        "--device auto|cpu|cuda|cuda:1": "[default: auto]",
        "--on-error raise|skip": "[default: raise]",
    }.items():
        after = text[text.index(flag) :]
        assert re.search(r"\[default: [^]]*\]", after)[0] == default  # type: ignore[index]
    assert "--reduce auto: concat for maps, token for a ViT, none for vectors" in text
    assert "\x1b" not in ran.out
    assert featstore("extract").code == 2


def test_help_fits_the_flags_of_the_contract(featstore: Program) -> None:
    image = "images root path-column label-column label-sep split-column group-column task valid split-seed"
    more = "store backbone weights cut reduce size resize mean std interpolation augment seeds dtype precision device"
    expected = {*image.split(), *more.split(), "batch-size", "workers", "on-error", "json", "debug", "help"}
    for command in ("extract", "status"):
        text = featstore(command, "--help").out
        assert set(re.findall(r"^  --([a-z-]+)", text, re.MULTILINE)) == expected


def test_the_program_runs_as_a_module_and_in_an_ascii_terminal(here: Path, processes: Processes) -> None:
    (here / "photos" / "cat" / "köpek.jpg").touch()
    in_ascii = f"""
        import sys
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(encoding="ascii", errors="strict")
        {AS_A_MODULE}
    """
    ran = processes.run(in_ascii, "featstore", "extract", *flags("--on-error", "skip"))
    assert ran.returncode == 0
    assert "cat/k\\xf6pek.jpg: " in ran.stderr
    assert ran.stdout.startswith("key ")


def test_the_program_runs_as_a_script_whose_reader_may_stop_early(here: Path) -> None:
    script = Path(sys.executable).with_name("featstore")
    ran = subprocess.run(
        ["bash", "-c", f"'{script}' backbones resnet18 | true; exit ${{PIPESTATUS[0]}}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode in (0, 1)  # 0 where the reader is slower than we
    assert ran.stderr == "resnet18: 11,689,512 parameters; shapes for images of 224 pixels\n"


# ---- The flags that both programs share


def test_seeds_and_numbers_are_read() -> None:
    assert parse_seeds("0-3,7") == (0, 1, 2, 3, 7)
    assert parse_seeds_or_fresh("fresh") == "fresh"
    assert parse_seeds_or_fresh("5") == (5,)
    assert parse_numbers("1e-5,1e-3", "--lr") == (1e-5, 1e-3)
    for wrong in ("", "-1", "1-", "a", "1,,2", "²"):
        with pytest.raises(ValueError, match="--seeds is"):
            parse_seeds(wrong)
    for wrong in ("", "nan", "1,inf"):
        with pytest.raises(ValueError, match="--lr is"):
            parse_numbers(wrong, "--lr")


def test_size_alone_takes_resize_along() -> None:
    assert ViewFlags(size=112).view(View()) == View(size=112, resize=128)
    assert ViewFlags(size=112, resize=120, interpolation="bicubic", std="1,1,1").view(View()) == View(
        size=112, resize=120, interpolation="bicubic", std=(1.0, 1.0, 1.0)
    )


def test_a_model_loads_without_cuts(here: Path) -> None:
    assert load_model("tiny.py:make_model", None).default_cut == "conv2"


def _center(path: Path, resize: int, size: int) -> torch.Tensor:
    """The evaluation view by torchvision's own transforms, of the pixels that Pillow decodes."""
    pixels = torchvision.transforms.functional.pil_to_tensor(Image.open(path))
    pixels = torchvision.transforms.functional.resize(pixels, [resize], antialias=True)
    view: torch.Tensor = torchvision.transforms.functional.center_crop(pixels, [size])
    return view


def test_a_table_for_several_labels_without_any_says_so(featstore: Program, here: Path) -> None:
    names = sorted(path.relative_to(here).as_posix() for path in (here / "photos").rglob("*.jpg"))
    rows = [f"{name},{'red;big' if place % 2 else 'red'}" for place, name in enumerate(names)]
    (here / "table.csv").write_text("\n".join(["path,label", *rows]) + "\n", encoding="utf-8")
    wanted = ["--images", "table.csv", "--task", "multi", "--store", "feats", "--backbone", "tiny.py:make_model"]
    doubt = "no image has more than one label (the classes are red, red;big); is --label-sep missing?"
    assert doubt in featstore("status", *wanted).err
    assert "no image has more than one label" not in featstore("status", *wanted, "--label-sep", ";").err
