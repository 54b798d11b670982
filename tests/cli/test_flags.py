"""The flags that both programs share: which images in which split, and what their words stand for."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from support.programs import Program, Ran, extract_flags

from featstore import ImageSet, WeightsError
from featstore.cli.flags import (
    AugmentFlags,
    ImageFlags,
    ViewFlags,
    parse_numbers,
    parse_seeds,
    parse_seeds_or_fresh,
)
from featstore.cli.models import ModelFlags, load_model
from featstore.extraction.remedy import image_flags
from featstore.images.views import Augment, View

NUM_EACH = 10


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
    assert sentence in featstore("status", *extract_flags("--valid", num_valid)).err


def test_odd_labels_are_said_and_only_labelled_images_count_as_scored(here: Path) -> None:
    names = [f"cat/{number:03}.jpg" for number in range(NUM_EACH)] + [
        f"dog/{number:03}.jpg" for number in range(NUM_EACH)
    ]
    labels = ["red,flat", "Red,round", "", "red,round"] * 5
    rows = "".join(f'{name},"{label}"\n' for name, label in zip(names, labels, strict=True))
    Path("odd.csv").write_text(f"path,label\n{rows}", encoding="utf-8")
    unlabelled, alike, several, dealt = ImageFlags(images="odd.csv", root="photos", valid=0.4).given().notes[-4:]
    assert unlabelled == "5 images are unlabelled, of 20: features yes, but no training or score"
    assert alike == "the classes Red,round and red,round differ in case alone"
    assert several == "class names hold ',' ('Red,round'); for several labels an image: --task multi --label-sep ','"
    images = ImageFlags(images="odd.csv", root="photos", valid=0.4).given().images
    assert images.targets is not None
    scored = int((images.targets[images.splits == "valid"] >= 0).sum())
    assert 0 < scored < len(images.valid)
    assert f"With {scored} validation images that have labels accuracy moves in steps of {100 / scored:.3g} %." in dealt


def test_a_weights_file_that_is_not_there_is_said_before_anything_is_loaded() -> None:
    with pytest.raises(WeightsError, match=r"There is no weights file nowhere\.pth\. Give the path"):
        ModelFlags(backbone="resnet18", weights="nowhere.pth")


def test_nothing_is_held_out_with_valid_0(here: Path) -> None:
    given = ImageFlags(images="photos", valid=0.0).given()
    assert (len(given.images.valid), len(given.images.train), given.notes) == (0, 0, ())


def test_a_split_of_its_own_is_used_as_it_is(featstore: Program, here: Path) -> None:
    for split, places in (("train", range(8)), ("valid", range(8, 10))):
        for name in ("cat", "dog"):
            (here / "own" / split / name).mkdir(parents=True)
            for place in places:
                shutil.copy(here / "photos" / name / f"{place:03}.jpg", here / "own" / split / name)
    ran = featstore("status", *extract_flags("--augment", "flip", "--seeds", "0", images="own"))
    assert "held out" not in ran.err
    images = ImageFlags(images="own").given().images
    assert (len(images.train), len(images.valid)) == (16, 4)
    ran = featstore("status", *extract_flags("--valid", "0.3", images="own"))
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
    ran = featstore("extract", *extract_flags(*columns, images="table.csv"))
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


def test_repeats_lone_formats_and_a_single_class_are_said(featstore: Program, here: Path) -> None:
    for name in ("000.jpg", "001.jpg"):
        shutil.copy(here / "photos" / "cat" / "005.jpg", here / "photos" / "dog" / name)
    (here / "photos" / "dog" / "na.gif").write_bytes((here / "photos" / "dog" / "009.jpg").read_bytes())
    said = featstore("status", *extract_flags("--valid", "0")).err.splitlines()
    assert said[0].startswith("3 images repeat another byte for byte: 2 contents (cat/005.jpg 3 times, dog/009.jpg 2 ")
    assert said[1].startswith("1 image has another format than all others in the folder (dog/na.gif)")
    said = featstore("extract", *extract_flags("--valid", "0", images="photos/..")).err.splitlines()
    assert said[1].startswith(
        "only one class was found, the folder 'photos', of 21 images; if the folders below it ('cat', "
    )


def test_the_remedy_for_absolute_paths_of_another_machine_works(featstore: Program, here: Path) -> None:
    rows = [f"/old/place/{name}/{place:03}.jpg,{name}" for name in ("cat", "dog") for place in range(NUM_EACH)]
    (here / "moved.csv").write_text("\n".join(["path,label", *rows]), encoding="utf-8")
    ran = featstore("extract", *extract_flags(images="moved.csv"))
    assert ran.code == 3
    assert "absolute paths and where they are now: --strip /old/place --root DIR (in Python" in ran.last_words
    assert (
        featstore("extract", *extract_flags("--strip", "/old/place", "--root", "photos", images="moved.csv")).code == 0
    )


def test_features_of_classes_that_are_held_out_alone_are_extracted(featstore: Program, here: Path) -> None:
    for split, name in (("train", "cat"), ("test", "dog")):
        (here / "retrieval" / split / name).mkdir(parents=True)
        shutil.copy(here / "photos" / name / "000.jpg", here / "retrieval" / split / name)
    ran = featstore("extract", *extract_flags(images="retrieval"))
    assert ran.code == 0
    assert "1 class ('dog') is held out alone: " in ran.err
    with pytest.raises(ValueError, match=r"class 'dog' .* is not in train"):
        ImageFlags(images="retrieval").given()


def test_a_tables_own_split_is_found_and_said(featstore: Program, here: Path) -> None:
    names = [f"{name}/{place:03}.jpg" for name in ("cat", "dog") for place in range(NUM_EACH)]
    rows = [f"{name},{name[:3]},{('train', 'train', 'test', 'valid')[place % 4]}" for place, name in enumerate(names)]
    (here / "own.csv").write_text("\n".join(["path,label,split", *rows]), encoding="utf-8")
    wanted = extract_flags("--root", "photos", images="own.csv")
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
    undealt = featstore("status", *extract_flags("--root", "photos", images="empty.csv")).err
    assert undealt.startswith("the column split is empty: 4 of 20 images held out")


@pytest.mark.parametrize("store", ["photos/feats", "photos", "photos/cat/feats"])
def test_a_store_among_the_images_is_no_class(featstore: Program, here: Path, store: str) -> None:
    assert featstore("extract", *extract_flags(store=store)).code == 0
    again = featstore("extract", *extract_flags(store=store))
    assert again.code == 0
    assert "20 rows reused, 0 computed" in again.err
    assert ImageSet.from_folder(here / "photos").classes == ("cat", "dog")


@pytest.mark.parametrize("place", ["photos/feats", "photos"])
def test_a_store_among_the_images_is_no_empty_class(featstore: Program, here: Path, place: str) -> None:
    featstore("extract", *extract_flags())
    shutil.copytree(here / "feats", here / place, dirs_exist_ok=True)
    images = ImageSet.from_folder("photos")
    assert images.classes == ("cat", "dog")
    if place == "photos/feats":
        assert images.skipped == (("feats", "a feature store"),)
    else:
        assert {reason for _, reason in images.skipped} == {"of a feature store"}
    ran = featstore("status", *extract_flags())
    assert "delete" not in ran.err
    assert ran.code == 0


def test_a_store_given_for_images_is_called_what_it_is(featstore: Program, here: Path) -> None:
    featstore("extract", *extract_flags())
    ran = featstore("status", *extract_flags(images="feats"))
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
    assert featstore("status", *extract_flags()).err.startswith(
        f"4 files skipped (a.txt: {reason}, b.txt: {reason}, c.txt: {reason}, ...)\n"
    )


# ---- What flags stand for


def test_seeds_and_numbers_are_read() -> None:
    assert parse_seeds("0-3,7") == (0, 1, 2, 3, 7)
    assert parse_seeds_or_fresh("fresh") == "fresh"
    assert parse_seeds_or_fresh("5") == (5,)
    assert parse_numbers("1e-5,1e-3", "--lr") == (1e-5, 1e-3)
    for wrong in ("", "-1", "1-", "a", "1,,2", "²"):
        with pytest.raises(ValueError, match="--seeds is"):
            parse_seeds(wrong)
    with pytest.raises(ValueError, match="names more than 100,000 seeds"):
        parse_seeds("3,0-99999999999")
    for wrong in ("", "nan", "1,inf"):
        with pytest.raises(ValueError, match="--lr is"):
            parse_numbers(wrong, "--lr")


def test_an_augmentation_may_have_parameters_and_several_policies() -> None:
    word = "side_on:max_zoom=1.1,crop=no+cutout:holes=2"
    expected = Augment([("side_on", {"max_zoom": 1.1, "crop": "no"}), ("cutout", {"holes": 2})], seeds=[0, 1])
    assert AugmentFlags(augment=word, seeds="0-1").augmentation() == expected


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        (
            "sideon",
            "--augment sideon: there is no augmentation policy 'sideon'; choose none, flip, random_resized_crop, ",
        ),
        (
            "flip:odds=1",
            "--augment flip:odds=1: the policy flip has no parameter 'odds'; its parameters are probability.",
        ),
        (
            "rotate:degrees=200",
            "--augment rotate:degrees=200: degrees of the policy rotate is 200.0; expected a number from 0 to 180.",
        ),
    ],
)
def test_what_is_no_augmentation_is_refused_by_its_flag(word: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=re.escape(sentence)):
        AugmentFlags(augment=word, seeds="0")


def test_a_set_is_listed_with_the_parameters_that_were_asked_for(featstore: Program, here: Path) -> None:
    word = "rotate:degrees=20+flip"
    assert featstore("extract", *extract_flags("--augment", word, "--seeds", "0")).code == 0
    assert {each["view"] for each in featstore("ls", "--store", "feats", "--json").json} == {"evaluation", word}
    ran = featstore("extract", *extract_flags("--augment", word, "--seeds", "0"))
    assert " 0 computed" in ran.last_words


def test_size_alone_takes_resize_along() -> None:
    assert ViewFlags(decode="reduced").view(View()) == View(decode="reduced")
    assert ViewFlags().view(View(decode="reduced")) == View(decode="reduced")
    assert ViewFlags(decode="full").view(View(decode="reduced")) == View()
    assert ViewFlags(size=112).view(View()) == View(size=112, resize=128)
    assert ViewFlags(size=112, resize=120, interpolation="bicubic", std="1,1,1").view(View()) == View(
        size=112, resize=120, interpolation="bicubic", std=(1.0, 1.0, 1.0)
    )


def test_a_model_loads_without_cuts(here: Path) -> None:
    assert load_model("tiny.py:make_model", None).default_cut == "conv2"


def test_a_table_for_several_labels_without_any_says_so(featstore: Program, here: Path) -> None:
    names = sorted(path.relative_to(here).as_posix() for path in (here / "photos").rglob("*.jpg"))
    rows = [f"{name},{'red;big' if place % 2 else 'red'}" for place, name in enumerate(names)]
    (here / "table.csv").write_text("\n".join(["path,label", *rows]) + "\n", encoding="utf-8")
    wanted = ["--images", "table.csv", "--task", "multi", "--store", "feats", "--backbone", "tiny.py:make_model"]
    doubt = "no image has more than one label (the classes are red, red;big); is --label-sep missing?"
    assert doubt in featstore("status", *wanted).err
    assert "no image has more than one label" not in featstore("status", *wanted, "--label-sep", ";").err
