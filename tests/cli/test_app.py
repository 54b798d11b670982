"""The `featstore` program: what it prints, where, and with which exit codes.

Long, since each command is here with the mistakes that people make with it.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import urllib.error
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from support.processes import AS_A_MODULE, Processes
from support.programs import Program, Ran, extract_flags

from featstore import FeatureStore, ImageSet, backbone
from featstore.images.decoders import PIXEL_DIGEST

NUM_EACH = 10

# Interrupts itself at an all-red image: as Ctrl-C does, at a moment that the test chooses. The check of a model has
# images of its own, white ones among them, and none that is red all over.
IMPATIENT = """
import json
import os
import signal
from collections import OrderedDict

from torch import nn


class Gate(nn.Module):
    def fingerprint(self):
        return "gives back what it gets"

    def forward(self, values):
        is_red = (values[:, 0].amin((1, 2)) > 2) & (values[:, 1:].amax((1, 2, 3)) < -1)
        if bool(is_red.any()) and "INTERRUPT_AT_RED" in os.environ:
            signal.raise_signal(int(os.environ["INTERRUPT_AT_RED"]))
        return values


def make_model():
    layers = [("gate", Gate()), ("conv", nn.Conv2d(3, 8, 3, 2)), ("pool", nn.AdaptiveAvgPool2d(1))]
    return nn.Sequential(OrderedDict([*layers, ("flat", nn.Flatten()), ("fc", nn.Linear(8, 5))]))
"""


# ---- The walk: extract, look, add images, extract the rest


def test_images_added_later_are_the_only_ones_computed(featstore: Program, here: Path) -> None:
    assert featstore("status", *extract_flags()).out == "20 images, 0 stored, 20 to compute, 1,280 bytes\n"
    assert not (here / "feats").exists()

    first = featstore("extract", *extract_flags())
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
    assert featstore("status", *extract_flags()).code == 0

    for number in range(3):
        image = Image.open(here / "photos" / "cat" / f"{number:03}.jpg").rotate(90)
        image.save(here / "photos" / "cat" / f"new{number}.png")
    assert featstore("status", *extract_flags("--json")).json["missing"] == 3
    assert featstore("status", *extract_flags()).code == 3
    assert "23 images: 20 stored, 3 to compute" in (second := featstore("extract", *extract_flags("--json"))).err
    assert [(each["rows"], each["computed"], each["reused"]) for each in second.json["sets"]] == [(23, 3, 20)]


def test_the_same_extraction_again_computes_nothing(featstore: Program) -> None:
    wanted = extract_flags("--cut", "relu1:none", "--cut", "conv2", "--augment", "flip", "--seeds", "0,2", "--json")
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
    assert again.json.keys() == {"sets", "failed", "missing", "seconds", "failures", "doubts", "rates", "bound_by"}
    assert (again.json["rates"], again.json["bound_by"]) == ({}, None)
    assert list(first.json["rates"]) == ["read", "decode", "forward", "write"]
    assert first.json["bound_by"] in first.json["rates"]
    parts = [part for each in FeatureStore("feats").sets() for part in each.parts]
    assert first.json["rates"]["write"]["bytes"] == sum(part.num_bytes for part in parts)
    assert (again.json["failed"], again.json["missing"], again.json["failures"]) == (0, 0, [])


def test_features_of_images_decoded_at_reduced_scale_have_a_key_of_their_own(featstore: Program) -> None:
    small = extract_flags("--size", "16")
    keys = []
    for decoded in ("full", "reduced"):
        assert featstore("status", *small, "--decode", decoded).code == 3
        keys.append(featstore("extract", *small, "--decode", decoded, "--json").json["sets"][0]["key"])
        assert featstore("status", *small, "--decode", decoded).code == 0
    assert featstore("status", *small).code == 0
    shown = featstore("show", keys[1], "--store", "feats").out
    assert re.search("decode.*featstore-decode-1-reduced", shown)
    assert len({*keys}) == 2


def test_an_estimate_says_what_would_be_written_and_how_long_it_would_take(featstore: Program, here: Path) -> None:
    flags = extract_flags("--augment", "flip", "--seeds", "0")
    found = featstore("estimate", *flags, "--devices", "1,4", "--json")
    assert found.code == 0
    assert not (here / "feats").exists()
    assert list(found.json["rates"]) == ["read", "decode", "forward", "write"]
    assert (found.json["images"], found.json["sample"], found.json["device"]) == (20, 20, "cpu")
    assert [(each["devices"], each["machines"]) for each in found.json["times"]] == [(1, 1), (4, 1), (4, 4)]

    shown = featstore("estimate", *flags).out.splitlines()
    assert shown[0].split() == ["key", "cut", "reduce", "view", "seed", "rows", "bytes"]
    assert [line.split()[1:] for line in shown[1:3]] == [
        ["conv2", "concat", "evaluation", "-", "20", "1,280", "bytes"],
        ["conv2", "concat", "flip", "0", "16", "1,024", "bytes"],
    ]
    assert re.fullmatch(
        r"read \S+, decode \S+, forward \S+, write \S+ images a second, each alone, on cpu \(20 images tried\); "
        r"(read|decode|forward|write) binds",
        shown[3],
    )
    assert re.fullmatch(r"\d+\.\d s before the first row; in all:", shown[4])
    assert [line.split()[0] for line in shown[5:]] == ["devices", "1", "8"]

    extracted = featstore("extract", *flags, "--json").json["sets"]
    assert [(each["key"], each["rows"]) for each in found.json["sets"]] == [
        (each["key"], each["computed"]) for each in extracted
    ]
    nothing = featstore("estimate", *flags)
    assert (nothing.code, nothing.out) == (0, "Nothing is to be computed.\n")
    assert featstore("estimate", *flags, "--json").json["times"] == []

    wrong = featstore("estimate", *flags, "--devices", "1,0")
    assert (wrong.code, wrong.err) == (
        2,
        "--devices is '1,0'. Expected numbers from 1 on, such as --devices 1,8.\n",
    )


def test_ls_lists_what_show_shows(featstore: Program) -> None:
    featstore("extract", *extract_flags("--augment", "flip", "--seeds", "3"))
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
    assert shown["pixels"] == PIXEL_DIGEST
    model = backbone("tiny.py:make_model")
    assert {each["name"]: each["digest"] for each in shown["stages"]} == {
        name: model.digest(name) for name in ("conv1", "bn1", "relu1", "conv2")
    }
    assert [each["rows"] for each in shown["files"]] == [16]
    text = featstore("show", listed[1]["key"][:8], "--store", "feats").out
    assert re.search(r"^spec\.view\.seed +3$", text, re.MULTILINE)
    assert re.search(rf"^conv2 +NCHW +16x7x7 +{model.digest('conv2')}$", text, re.MULTILINE)


def test_ls_names_a_damaged_part_and_lists_the_other_sets(featstore: Program) -> None:
    featstore("extract", *extract_flags("--cut", "relu1", "--cut", "conv2"))
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
    featstore(
        "extract", *extract_flags("--dtype", "float32", "--reduce", "avg", "--mean", "0.5,0.5,0.5", "--resize", "40")
    )
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


@pytest.mark.usefixtures("compiler")
def test_code_is_compiled_where_it_is_asked_for(featstore: Program) -> None:
    from torch._inductor import config as inductor

    found = featstore("estimate", *extract_flags(), "--compile").out
    assert re.search(r"\d s before the first row \([\d.]+ s of it compiling\); in all:", found)
    with inductor.patch({"cpp.cxx": ("no-such-compiler",)}):
        ran = featstore("extract", *extract_flags(), "--compile")
        assert (ran.code, ran.out) == (2, "")
        assert "there is no C++ compiler" in ran.err
        assert featstore("extract", *extract_flags(), "--no-compile").code == 0
    assert "compiled" not in FeatureStore("feats").sets()[0].facts["profile"]


# ---- Images that can't be read


def test_a_corrupt_image_stops_the_extraction_and_is_named(featstore: Program, here: Path) -> None:
    whole = (here / "photos" / "cat" / "003.jpg").read_bytes()
    (here / "photos" / "cat" / "003.jpg").write_bytes(whole[:200])
    ran = featstore("extract", *extract_flags())
    assert (ran.code, ran.out) == (1, "")
    last = ran.err.splitlines()[-1]
    assert last.startswith("cat/003.jpg: ")
    assert last.endswith(". Repair, remove or bring back the file, or leave such images out with --on-error skip.")
    assert "Traceback" not in ran.err
    assert "Traceback" in featstore("extract", *extract_flags("--debug")).err


def test_debug_says_what_time_goes_into_before_the_first_row(featstore: Program, here: Path) -> None:
    steps = [featstore("extract", *extract_flags("--debug")).err for _ in range(2)]
    first, second = (re.findall(r"([a-z][a-z ]*) \d+\.\d\d s", _line(each, "before the first row: ")) for each in steps)
    assert {"load", "trace", "shapes", "key", "digests of images", "purity", "probe"} == set(first)
    assert set(second) == {*first} - {"purity", "probe"}  # there is nothing to compute
    assert "before the first row" not in featstore("extract", *extract_flags()).err


def _line(text: str, start: str) -> str:
    (found,) = [line.removeprefix(start) for line in text.splitlines() if line.startswith(start)]
    return found


def test_a_corrupt_image_can_be_skipped(featstore: Program, here: Path) -> None:
    (here / "photos" / "cat" / "003.jpg").write_text("not a picture", encoding="utf-8")
    ran = featstore("extract", *extract_flags("--on-error", "skip", "--json"))
    assert ran.code == 0
    assert [(each["rows"], each["failed"]) for each in ran.json["sets"]] == [(19, 1)]
    ((image, reason),) = ran.json["failures"]
    assert image == "cat/003.jpg"
    assert f"  cat/003.jpg: {reason}\n" in ran.err
    skipping = featstore("status", *extract_flags("--on-error", "skip", "--json"))
    assert skipping.code == 0
    assert {name: skipping.json[name] for name in ("images", "stored", "missing", "failed")} == {
        "images": 20,
        "stored": 19,
        "missing": 0,
        "failed": 1,
    }
    default = featstore("status", *extract_flags("--json"))
    assert (default.code, default.json["missing"], default.json["failed"]) == (3, 1, 1)
    assert featstore("status", *extract_flags()).out == "20 images, 19 stored, 1 to compute, 1 failed, 64 bytes\n"
    key = featstore("ls", "--store", "feats", "--json").json[0]["key"]
    assert reason in featstore("show", key, "--store", "feats").out


def test_a_nightly_script_can_tell_an_absent_file_from_a_failure(featstore: Program, here: Path) -> None:
    (here / "t.csv").write_text("path,label\ncat/000.jpg,cat\ncat/gone.jpg,cat\ndog/000.jpg,dog\n", encoding="utf-8")
    wanted = extract_flags("--root", "photos", images="t.csv")
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
    wanted = extract_flags("--root", "photos", "--on-error", "skip", "--json", images="table.csv")
    ran = featstore("extract", *wanted)
    assert (ran.code, ran.json["sets"][0]["rows"]) == (3, 3)
    assert [image for image, _ in ran.json["failures"]] == ["dog/gone.jpg"]
    status = featstore("status", *wanted)
    assert (status.code, status.json["missing"], status.json["failed"]) == (3, 1, 0)


def test_only_the_first_failures_are_printed_and_json_has_all(featstore: Program, here: Path) -> None:
    for place in range(NUM_EACH):
        (here / "photos" / "cat" / f"bad{place}.jpg").write_text(f"cat {place}", encoding="utf-8")
        (here / "photos" / "dog" / f"bad{place}.jpg").write_text(f"dog {place}", encoding="utf-8")
    ran = featstore("extract", *extract_flags("--on-error", "skip", "--json"))
    assert "  cat/bad9.jpg: " in ran.err
    assert "dog/bad0.jpg" not in ran.err
    assert "  ... and 10 more\n" in ran.err
    assert len(ran.json["failures"]) == 20


def test_a_name_that_is_not_text_prints(featstore: Program, here: Path) -> None:
    name = os.fsdecode(b"caf\xe9 \xff.jpg")
    (here / "photos" / "cat" / name).touch()
    (here / "photos" / "cat" / "köpek 狗.jpg").touch()
    ran = featstore("extract", *extract_flags("--on-error", "skip", "--json"))
    assert {image for image, _ in ran.json["failures"]} == {f"cat/{name}", "cat/köpek 狗.jpg"}
    assert "cat/caf\\udce9 \\udcff.jpg: " in ran.err
    assert "cat/köpek 狗.jpg: " in ran.err


def test_doubtful_images_are_said_and_listed_and_may_be_refused(featstore: Program, here: Path) -> None:
    gray = (np.arange(64 * 64).reshape(64, 64) % 4096).astype(np.uint16)
    Image.fromarray(gray).save(here / "photos" / "dog" / "dim.png")
    refused = featstore("extract", *extract_flags("--doubtful", "refuse"))
    assert (refused.code, refused.out) == (1, "")
    assert "dog/dim.png: doubtful: its 16-bit values reach 4,095 of 65,535" in refused.err
    assert "leave such images out with --on-error skip." in refused.err
    ran = featstore("extract", *extract_flags("--json"))
    assert ran.code == 0
    assert "1 image was decoded with doubts (dog/dim.png: its 16-bit values" in ran.err
    ((name, reason),) = ran.json["doubts"]
    assert (name, reason[:17]) == ("dog/dim.png", "its 16-bit values")
    wrong = featstore("status", *extract_flags("--doubtful", "maybe"))
    assert (wrong.code, wrong.err) == (2, "--doubtful is 'maybe'. Expected note or refuse.\n")


def test_more_failures_than_are_allowed_stop_an_extraction(featstore: Program, here: Path) -> None:
    for name in ("a", "b"):
        (here / "photos" / "dog" / f"{name}.jpg").write_bytes(b"no image")
    skipping = extract_flags("--on-error", "skip", "--max-errors")
    ran = featstore("extract", *skipping, "1")
    assert (ran.code, ran.out) == (1, "")
    assert re.search(r"\n2 images failed \(dog/a\.jpg: .*; dog/b\.jpg: .*\)\. Expected 1 at most\. .*\n$", ran.err)
    ran = featstore("extract", *skipping, "2")
    assert ran.code == 0
    assert "What was left out, and why, is in feats/failures/photos.jsonl\n" in ran.err
    lines = (here / "feats/failures/photos.jsonl").read_text(encoding="ascii").splitlines()
    assert [json.loads(line)["id"] for line in lines] == ["dog/a.jpg", "dog/b.jpg"]
    wrong = featstore("extract", *extract_flags("--max-errors", "2"))
    assert wrong.code == 2
    assert wrong.err.startswith("--max-errors 2 is given, but with --on-error raise the first image that fails stops")


@pytest.mark.usefixtures("heeds_signals")
@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_after_ctrl_c_the_end_of_its_time_or_of_its_terminal_what_was_computed_is_filed(
    featstore: Program, here: Path, monkeypatch: pytest.MonkeyPatch, by: signal.Signals
) -> None:
    before = signal.getsignal(by)
    (here / "impatient.py").write_text(IMPATIENT, encoding="utf-8")
    Image.new("RGB", (90, 90), "red").save(here / "photos" / "dog" / "red.png")
    wanted = ["--images", "photos", "--store", "feats", "--backbone", "impatient.py:make_model", "--size", "32"]
    monkeypatch.setenv("INTERRUPT_AT_RED", str(int(by)))
    ran = featstore("extract", *wanted, "--batch-size", "4")
    assert (ran.code, ran.out) == (128 + by, "")
    assert signal.getsignal(by) == before
    assert ran.err.endswith("\nInterrupted. What was computed is filed; the same command computes the rest.\n")
    monkeypatch.delenv("INTERRUPT_AT_RED")
    again = featstore("extract", *wanted, "--json")
    assert [(each["computed"], each["reused"]) for each in again.json["sets"]] == [(1, 20)]


# ---- Backbones and weights


def test_backbones_lists_names_and_weights(featstore: Program) -> None:
    listed = {each["name"]: each for each in featstore("backbones", "--json").json}
    assert listed["resnet50"]["weights"] == ["IMAGENET1K_V2", "IMAGENET1K_V1"]
    for name in ("resnet34", "squeezenet1_1", "vit_b_32"):
        with torch.device("meta"):
            reference = torchvision.models.get_model(name, weights=None)
        assert listed[name]["parameters"] == sum(parameter.numel() for parameter in reference.parameters())
    assert (listed["vit_h_14"]["family"], listed["vit_h_14"]["size"]) == ("vision_transformer", 518)
    line = r"^resnet50 +resnet +224 +25,557,032  IMAGENET1K_V2, IMAGENET1K_V1$"
    assert re.search(line, featstore("backbones").out, re.MULTILINE)


def test_backbones_of_a_pattern_lists_those_that_match_and_timms_for_its_own_alone(featstore: Program) -> None:
    listed = featstore("backbones", "timm:test_resnet*", "--json").json
    assert [each["name"] for each in listed] == ["timm:test_resnet"]
    assert {each["family"] for each in featstore("backbones", "resnet*", "--json").json} == {"resnet"}
    assert "timm:" not in featstore("backbones").out
    assert re.search(r"timm is installed, with 1,\d\d\d more: featstore backbones 'timm:", featstore("backbones").err)
    ran = featstore("backbones", "nosuch*")
    assert (ran.code, ran.err.splitlines()[-1]) == (
        2,
        "No backbone's name is like 'nosuch*'. Expected a pattern such as 'resnet*', 'timm:*vit*'.",
    )


def test_backbones_of_a_name_lists_its_cuts(featstore: Program) -> None:
    facts = featstore("backbones", "resnet18", "--json").json
    reference = torchvision.models.resnet18(weights=None)
    assert facts["parameters"] == sum(parameter.numel() for parameter in reference.parameters())
    cuts = {each["name"]: each for each in facts["cuts"]}
    assert (cuts["layer4"]["shape"], cuts["layer4"]["layout"]) == ([512, 7, 7], "NCHW")
    assert [name for name, cut in cuts.items() if cut["is_default"]] == ["layer4"] == [facts["default_cut"]]
    text = featstore("backbones", "resnet18")
    assert text.err == (
        "resnet18: 11,689,512 parameters; shapes for images of 224 pixels, stored as float16 without a reduction\n"
    )
    assert cuts["layer4"]["bytes"] == 512 * 7 * 7 * 2
    assert re.search(r"^\| +layer4 +512x7x7 +NCHW +50,176 bytes +[\d,]+ +\(default\)", text.out, re.MULTILINE)
    groups = [line.split("  ")[0] for line in text.out.splitlines()[1:] if not line.startswith("|")]
    assert groups == ["early body", "late body", "behind"]
    assert re.search(r"^late body +layer3\.0\.add ", text.out, re.MULTILINE)
    assert {name: cut["group"] for name, cut in cuts.items() if name in ("layer2", "layer4", "fc")} == {
        "layer2": "early body",
        "layer4": "late body",
        "fc": None,
    }


def test_backbones_of_my_own_function_lists_its_cuts(featstore: Program) -> None:
    facts = featstore("backbones", "tiny.py:make_model", "--json").json
    assert [each["name"] for each in facts["cuts"]] == ["conv1", "bn1", "relu1", "conv2", "pool", "flat", "fc"]
    assert facts["default_cut"] == "conv2"


def test_a_backbone_of_one_layer_is_listed_without_a_default_cut(featstore: Program, here: Path) -> None:
    (here / "one.py").write_text(
        "from torch import nn\n\ndef make():\n    return nn.Conv2d(3, 4, 3)\n", encoding="utf-8"
    )
    facts = featstore("backbones", "one.py:make", "--json").json
    assert ([each["name"] for each in facts["cuts"]], facts["default_cut"]) == (["conv2d"], None)


def test_a_weights_file_must_fit_up_to_the_deepest_cut(featstore: Program, here: Path) -> None:
    tensors = backbone("tiny.py:make_model").tensors()
    torch.save({name: value for name, value in tensors.items() if name.startswith(("conv1", "bn1"))}, "early.pth")
    assert featstore("extract", *extract_flags("--weights", "early.pth", "--cut", "relu1")).code == 0
    ran = featstore("status", *extract_flags("--weights", "early.pth", "--cut", "conv2", "--cut", "relu1"))
    assert (ran.code, ran.out) == (1, "")
    assert ran.err.splitlines()[-1] == (
        "The weights in early.pth don't fit tiny: conv2.weight is missing; conv2.bias is missing. Give the backbone "
        "that they were trained for (--backbone), or other weights."
    )


def test_what_a_weights_file_leaves_open_is_said(featstore: Program, here: Path) -> None:
    tensors = backbone("tiny.py:make_model").tensors()
    torch.save({**tensors, "fc.weight": torch.zeros(37, 16), "fc.bias": torch.zeros(37)}, "ep37.pth")
    said = featstore("status", *extract_flags("--weights", "ep37.pth")).err
    assert "fc.weight has 37 rows: not used\n" in said
    assert (
        "a weights file carries no preprocessing: 37/32 and ImageNet's mean assumed; --resize --mean --std "
        "--interpolation\n"
    ) in said


@pytest.mark.parametrize(
    ("given", "said"),  # besides --size 32
    [
        ("", "37/32 and ImageNet's mean assumed; --resize --mean --std --interpolation"),
        ("--resize 40", "ImageNet's mean assumed; --mean --std --interpolation"),
        ("--mean 0.5,0.5,0.5 --std 0.5,0.5,0.5", "37/32 assumed; --resize --interpolation"),
        ("--resize 40 --mean 0.5,0.5,0.5 --std 0.5,0.5,0.5", None),
    ],
)
def test_of_a_weights_files_view_only_what_flags_leave_open_is_assumed(
    featstore: Program, here: Path, given: str, said: str | None
) -> None:
    torch.save(backbone("tiny.py:make_model").tensors(), "own.pth")
    lines = featstore("status", *extract_flags("--weights", "own.pth", *given.split())).err.splitlines()
    about = [line for line in lines if "preprocessing" in line]
    assert about == ([] if said is None else [f"a weights file carries no preprocessing: {said}"])


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
        (["--dtype", "float8"], "--dtype is 'float8'. Expected float16, float32, bfloat16 or int8."),
        (["--precision", "fp8"], "--precision is 'fp8'. Expected fp32, tf32, bf16 or fp16."),
        (["--task", "ranking"], "--task is 'ranking'. Expected single, multi or regression."),
        (["--on-error", "warn"], "--on-error is 'warn'. Expected raise or skip."),
        (["--device", "abacus"], "'abacus' is no device. Expected auto, cpu, cuda or cuda:1."),
        (["--decode", "half"], "--decode is 'half'. Expected full or reduced."),
        (
            ["--interpolation", "lanczos"],
            "--interpolation is 'lanczos'. Expected bilinear, bicubic, nearest or nearest-exact.",
        ),
        (
            ["--augment", "sideways", "--seeds", "0"],
            "--augment sideways: there is no augmentation policy 'sideways'; choose none, flip, random_resized_crop, ",
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
            "--split-column split is for a table of images, and photos is none. Leave it out, or give a .csv, "
            ".tsv or .parquet file with --images.",
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
    ran = featstore("extract", *extract_flags(*arguments))
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
            "'resnet35' is no backbone. Expected resnet50, resnet34, resnet152, or one of the 80 names that featstore "
            "backbones lists (in Python: backbone_names()); a function in your own file (path/to/file.py:make_model); "
            "or the folder of a saved run."
        )


def test_an_unknown_cut_is_refused_before_weights_are_read(
    featstore: Program, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(here / "torch"))
    wanted = ["--images", "photos", "--store", "feats", "--backbone", "resnet18", "--cut", "layer5"]
    ran = featstore("extract", *wanted)
    assert ran.code == 2
    assert re.fullmatch(
        r"resnet18 has no cut 'layer5'\. The nearest of its \d\d cuts are layer4, layer3, layer2, layer1, layer4\.0\. "
        r"All of them: featstore backbones resnet18\.",
        ran.last_words,
    )
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
    assert featstore("extract", *extract_flags(images="empty")) == Ran(
        2,
        "",
        f"{here}/empty holds no images: found 0 folders and 0 other files. Expected files that end with .avif, .bmp, "
        ".gif, .heic, .heif, .jfif, .jpe, .jpeg, .jpg, .mpo, .png, .tif, .tiff, .webp. Put images there, or "
        "name another folder.\n",
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
    ran = featstore("extract", *extract_flags(store="taken/feats"))
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
    image = "images root path-column label-column label-sep split-column group-column task valid test split-seed"
    image += " top-folders one-hot valid-column suffix strip"
    model = (
        "store backbone weights weights-prefix trust-code cut reduce size resize mean std interpolation decode compile"
    )
    more = "augment seeds dtype precision device batch-size workers on-error max-errors doubtful shard json debug help"
    more += " engine actors gpus-per-actor ray-address"
    expected = {*image.split(), *model.split(), *more.split()}
    for command, its_own in (("extract", set()), ("status", set()), ("estimate", {"devices"})):
        text = featstore(command, "--help").out
        assert set(re.findall(r"^  --([a-z-]+)", text, re.MULTILINE)) == expected | its_own


def test_the_program_runs_as_a_module_and_in_an_ascii_terminal(here: Path, processes: Processes) -> None:
    (here / "photos" / "cat" / "köpek.jpg").touch()
    in_ascii = f"""
        import sys
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(encoding="ascii", errors="strict")
        {AS_A_MODULE}
    """
    ran = processes.run(in_ascii, "featstore", "extract", *extract_flags("--on-error", "skip"))
    assert ran.returncode == 0
    assert "cat/k\\xf6pek.jpg: " in ran.stderr
    assert ran.stdout.startswith("key ")


def test_the_program_runs_as_a_script_whose_reader_may_stop_early(featstore: Program) -> None:
    featstore("extract", *extract_flags())
    script = Path(sys.executable).with_name("featstore")
    ran = subprocess.run(
        ["bash", "-c", f"'{script}' ls --store feats | true; exit ${{PIPESTATUS[0]}}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode in (0, 1)  # 0 where the reader is slower than we
    assert ran.stderr == ""


def _center(path: Path, resize: int, size: int) -> torch.Tensor:
    """The evaluation view by torchvision's own transforms, of the pixels that Pillow decodes."""
    pixels = torchvision.transforms.functional.pil_to_tensor(Image.open(path))
    pixels = torchvision.transforms.functional.resize(pixels, [resize], antialias=True)
    view: torch.Tensor = torchvision.transforms.functional.center_crop(pixels, [size])
    return view


# ---- Several backbones


OTHER = """
from torch import nn


def make_other():
    layers = [nn.Conv2d(3, 4, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)]
    return nn.Sequential(*layers)
"""


def test_several_backbones_are_extracted_at_once_and_each_takes_the_cuts_that_it_has(featstore: Program) -> None:
    Path("other.py").write_text(OTHER, encoding="utf-8")
    both = [*extract_flags("--cut", "conv2", "--cut", "1:avg"), "--backbone", "other.py:make_other"]
    ran = featstore("extract", *both)
    assert ran.code == 0
    assert "in 2 feature sets" in ran.err
    first, second = FeatureStore("feats").sets()[0].key, FeatureStore("feats").sets()[1].key
    assert {line[:8] for line in ran.out.splitlines()[1:]} == {first[:8], second[:8]}
    assert re.search(r"^\w{8}  tiny +conv2 +concat .*\n\w{8}  other +1 +avg ", ran.out, re.MULTILINE)
    assert featstore("status", *both).code == 0
    alone = featstore("extract", *extract_flags("--cut", "conv2"))
    assert "20 rows reused, 0 computed" in alone.err


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--cut", "conv2"], "other.py:make_other has none of the cuts conv2. Expected one for each backbone"),
        (["--cut", "conv2", "--cut", "pixels"], "other.py:make_other has none of the cuts conv2, pixels. Expected one"),
        (
            ["--cut", "conv2", "--cut", "1", "--cut", "9x"],
            "--cut 9x: tiny.py:make_model and other.py:make_other have no",
        ),
        (["--weights", "none"], "--weights is given 1 time and --backbone 2 times. Expected one for each"),
        (["--weights-prefix", "teacher"], "--weights-prefix teacher is given beside 2 backbones"),
    ],
)
def test_what_several_backbones_can_not_share_is_refused(featstore: Program, flags: list[str], sentence: str) -> None:
    Path("other.py").write_text(OTHER, encoding="utf-8")
    ran = featstore("extract", *extract_flags(*flags), "--backbone", "other.py:make_other")
    assert ran.code in (1, 2)
    assert sentence in " ".join(ran.err.split())


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--actors", "2"], "--actors is given, and it is about Ray's actors. Add --engine ray, or leave it out."),
        (["--engine", "ray"], "--engine ray is given without --actors. Expected how many share the work"),
        (["--engine", "spark"], "--engine"),
    ],
)
def test_flags_of_an_engine_are_checked_before_anything_is_loaded(
    featstore: Program, flags: list[str], sentence: str
) -> None:
    ran = featstore("extract", *extract_flags(*flags))
    assert ran.code == 2
    assert sentence in " ".join(ran.err.split())
