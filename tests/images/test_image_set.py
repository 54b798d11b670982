"""Image sets: what constructors find and refuse, how images are dealt, and which bytes a digest stands for."""

from __future__ import annotations

import hashlib
import io
import mmap
import os
import pickle
import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits
from support.processes import Processes
from torchvision.datasets import ImageFolder

from featstore.errors import FeatureStoreError, ImageError
from featstore.images.contents import lone_formats_note, repeats_note, split_overlap
from featstore.images.digests import (
    Digests,
    DigestTable,
    KnownDigest,
    KnownDigests,
    Memo,
    StatFacts,
    content_digest,
    no_stats,
    stat_rows,
)
from featstore.images.image_set import ImageSet
from featstore.images.sources import AbsentSource, ArraySource, FolderSource


def image_bytes(value: int = 0, form: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (4, 4), (value % 256, value // 256 % 256, value // 65536)).save(stream, form)
    return stream.getvalue()


def fill(root: Path, *paths: str) -> Path:
    for number, path in enumerate(paths):
        file = root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(image_bytes(number))
    return root


def table(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def counted(number: int, num_classes: int = 2, prefix: str = "") -> ImageSet:
    """`number` unread images `<class>/<number>.jpg`, classes in turn."""
    targets = np.arange(number) % num_classes
    return ImageSet(
        name="counted",
        ids=tuple(f"{prefix}{target}/{i}.jpg" for i, target in enumerate(targets)),
        targets=targets,
        classes=tuple(str(k) for k in range(num_classes)),
        splits=np.full(number, ""),
        groups=None,
        task="single",
        source=FolderSource(root="/nowhere"),
    )


def members(images: ImageSet, split: str) -> set[str]:
    return {image for image, dealt in zip(images.ids, images.splits, strict=True) if dealt == split}


def held_out_of_200() -> set[str]:
    return members(counted(200, 4).split(0.2, 0.1), "valid")


def per_class(images: ImageSet) -> list[int]:
    assert images.targets is not None
    return [int(np.sum(images.targets == target)) for target in range(images.num_classes)]


class TestFolders:
    def test_class_folders_give_the_classes_and_targets_of_torchvision(self, tmp_path: Path) -> None:
        fill(tmp_path, "dog/2.jpg", "cat/b.JPG", "cat/deep/down/a.png", "Zebra/x.jpeg", "10/q.png", "9/q.png")
        images, reference = ImageSet.from_folder(tmp_path), ImageFolder(str(tmp_path))
        assert list(images.classes) == reference.classes
        assert images.targets is not None
        ours = dict(zip(images.ids, images.targets.tolist(), strict=True))
        assert ours == {Path(path).relative_to(tmp_path).as_posix(): target for path, target in reference.samples}

    def test_order_is_by_path_whatever_the_order_of_creation(self, tmp_path: Path) -> None:
        paths = [f"{name}/{number}.png" for name in ("b", "a", "ä", "B") for number in (10, 9, 1)]
        first = ImageSet.from_folder(fill(tmp_path / "one", *paths))
        second = ImageSet.from_folder(fill(tmp_path / "two", *reversed(paths)))
        assert first.ids == second.ids == tuple(sorted(paths))

    def test_folders_that_are_numbers_are_classes_in_order_of_value(self, tmp_path: Path) -> None:
        images = ImageSet.from_folder(fill(tmp_path, *[f"{number}/1.png" for number in range(12)]))
        assert images.classes == tuple(map(str, range(12)))
        assert images.targets is not None
        assert dict(zip(images.ids, images.targets.tolist(), strict=True)) == {
            f"{number}/1.png": number for number in range(12)
        }
        assert "12 classes in the order of their numbers (0 1, 1 1, 2 1," in images.describe()

    @pytest.mark.parametrize("names", [("10", "007", "9"), ("10", "9", "ten"), ("1.5", "10", "9"), ("1e1", "10", "9")])
    def test_names_that_are_not_all_plain_integers_are_sorted_as_text(
        self, tmp_path: Path, names: tuple[str, ...]
    ) -> None:
        images = ImageSet.from_folder(fill(tmp_path, *[f"{name}/1.png" for name in names]))
        assert images.classes == tuple(sorted(names))
        assert "order" not in images.describe()

    def test_two_unicode_spellings_of_a_folder_are_one_class(self, tmp_path: Path) -> None:
        fill(tmp_path, "Fu\u0308chse/1.png", "F\u00fcchse/2.png", "Ba\u0308ren/3.png")
        images = ImageSet.from_folder(tmp_path)
        assert images.classes == ("B\u00e4ren", "F\u00fcchse")
        np.testing.assert_array_equal(images.targets, [0, 1, 1])
        assert images.notes == (
            "the label 'F\u00fcchse' comes in 2 Unicode spellings (as macOS and others write it), taken for one",
        )
        assert not images.digests().failed

    def test_hidden_and_stray_files_are_listed_not_fatal(self, tmp_path: Path) -> None:
        fill(tmp_path, "a/1.png", "a/.2.png", ".git/3.png", "__MACOSX/a/1.png", "a/Thumbs.db", "a/notes.txt", "x.png")
        images = ImageSet.from_folder(tmp_path)
        assert images.ids == ("a/1.png",)
        assert dict(images.skipped) == {
            ".git": "hidden",
            "__MACOSX": "hidden",
            "a/.2.png": "hidden",
            "a/Thumbs.db": "hidden",
            "a/notes.txt": "not an image by its suffix",
            "x.png": "lies beside the class folders",
        }

    @pytest.mark.parametrize("word", ["valid", "val"])
    def test_split_folders_share_the_class_table_of_train(self, tmp_path: Path, word: str) -> None:
        fill(
            tmp_path,
            "train/a/1.png",
            "train/b/1.png",
            "train/c/1.png",
            f"{word}/b/9.png",
            f"{word}/c/9.png",
            "test/7.png",
        )
        images = ImageSet.from_folder(tmp_path)
        assert images.classes == images.valid.classes == ("a", "b", "c")
        assert images.valid.ids == (f"{word}/b/9.png", f"{word}/c/9.png")
        np.testing.assert_array_equal(images.valid.targets, [1, 2])  # b and c are still b and c
        assert images.test.ids == ("test/7.png",)
        assert images.test.targets is None
        assert images.targets is not None
        assert images.targets.tolist().count(-1) == 1

    def test_a_class_that_train_lacks_is_an_error_that_names_it(self, tmp_path: Path) -> None:
        fill(tmp_path, "train/a/1.png", "valid/a/2.png", "valid/wolf/1.png")
        with pytest.raises(ValueError, match=r"class 'wolf' \(valid/wolf/1.png, split valid\) is not in train"):
            ImageSet.from_folder(tmp_path)

    def test_classes_that_are_held_out_alone_are_taken_if_asked_for(self, tmp_path: Path) -> None:
        fill(tmp_path, "train/a/1.png", "valid/a/2.png", "valid/wolf/1.png")
        with pytest.raises(
            ValueError, match=r"to extract features only, run featstore extract \(.*held_out_classes=True"
        ):
            ImageSet.from_folder(tmp_path)
        images = ImageSet.from_folder(tmp_path, held_out_classes=True)
        assert images.classes == ("a", "wolf")
        np.testing.assert_array_equal(images.valid.targets, [0, 1])
        assert images.notes[0].startswith("1 class ('wolf') is held out alone: ")
        file = table(tmp_path / "t.csv", "path,label,split", "1.png,a,train", "2.png,b,test")
        assert ImageSet.from_csv(file, held_out_classes=True).classes == ("a", "b")

    def test_both_valid_and_val_is_an_error(self, tmp_path: Path) -> None:
        fill(tmp_path, "train/a/1.png", "valid/a/2.png", "val/a/3.png")
        with pytest.raises(ValueError, match="2 folders for split valid: val and valid"):
            ImageSet.from_folder(tmp_path)

    @pytest.mark.parametrize(
        ("train", "valid", "test"),
        [
            ("Training", "Validation", "Testing"),
            ("trn", "val", "tst"),
            ("TRAIN", "dev", "test"),
            ("train", "eval", "Test"),
        ],
    )
    def test_the_usual_names_of_splits_are_splits_in_any_case(
        self, tmp_path: Path, train: str, valid: str, test: str
    ) -> None:
        fill(tmp_path, *[f"{top}/{kind}/{top}.png" for top in (train, valid, test) for kind in ("cat", "dog")])
        images = ImageSet.from_folder(tmp_path)
        assert images.classes == ("cat", "dog")
        assert {
            top: set(images.splits[[name.startswith(f"{top}/") for name in images.ids]]) for top in (train, valid)
        } == {
            train: {"train"},
            valid: {"valid"},
        }
        assert len(images.test) == 2

    def test_unusual_words_for_splits_are_said(self, tmp_path: Path) -> None:
        images = ImageSet.from_folder(fill(tmp_path, "Training/a/1.png", "Training/b/1.png", "Validation/a/2.png"))
        assert images.notes == ("folders read as splits: Training is train, Validation is valid",)
        assert images.train.notes == ()

    @pytest.mark.parametrize(
        ("paths", "tops", "splits"),
        [
            (
                ("train/a/1.png", "test/a/2.png", "extra/a/3.png"),
                "'extra', 'test', 'train'",
                "test is test, train is train",
            ),
            (("train/1.png", "bus/1.png", "test/1.png"), "'bus', 'test', 'train'", "test is test, train is train"),
            (("train/a/1.png", "more/a/3.png"), "'more', 'train'", "train is train"),
            (("train2017/1.png", "val2017/2.png"), "'train2017', 'val2017'", "train2017 is train, val2017 is valid"),
            (
                ("seg_pred/1.png", "seg_test/a/2.png", "seg_train/a/1.png"),
                "'seg_pred', 'seg_test', 'seg_train'",
                "seg_test is test, seg_train is train",
            ),
        ],
    )
    def test_a_mixture_of_splits_and_other_folders_is_refused_with_both_readings(
        self, tmp_path: Path, paths: tuple[str, ...], tops: str, splits: str
    ) -> None:
        fill(tmp_path, *paths)
        with pytest.raises(
            ValueError, match=rf"as . classes \({tops}\), or as splits with the classes below \({splits}"
        ):
            ImageSet.from_folder(tmp_path)
        assert ", ".join(map(repr, ImageSet.from_folder(tmp_path, top_folders="classes").classes)) == tops

    def test_folders_said_to_be_splits_leave_the_others_out(self, tmp_path: Path) -> None:
        fill(tmp_path, "train2017/a/1.png", "test/a/2.png", "extra/b/3.png")
        images = ImageSet.from_folder(tmp_path, top_folders="splits")
        assert (images.ids, images.splits.tolist()) == (("test/a/2.png", "train2017/a/1.png"), ["test", "train"])
        assert images.skipped == (("extra/b/3.png", "in no split folder"),)
        with pytest.raises(ValueError, match="has no folder for a split: 'b'"):
            ImageSet.from_folder(tmp_path / "extra", top_folders="splits")
        with pytest.raises(ValueError, match="top_folders is 'labels'"):
            ImageSet.from_folder(tmp_path, top_folders="labels")  # type: ignore[arg-type]

    def test_one_word_for_a_split_among_classes_is_a_class(self, tmp_path: Path) -> None:
        fill(tmp_path / "vehicles", "train/1.png", "bus/1.png", "car/1.png")
        assert ImageSet.from_folder(tmp_path / "vehicles").classes == ("bus", "car", "train")
        fill(tmp_path / "things", "test tube/1.png", "train station/1.png", "trainer/1.png")
        assert ImageSet.from_folder(tmp_path / "things").classes == ("test tube", "train station", "trainer")

    def test_splits_without_train_have_the_classes_of_all(self, tmp_path: Path) -> None:
        images = ImageSet.from_folder(fill(tmp_path, "valid/a/1.png", "test/b/1.png"))
        assert (images.classes, images.splits.tolist()) == (("a", "b"), ["test", "valid"])

    @pytest.mark.parametrize("empty", ["fox", "train/fox", "valid/fox", "valid"])
    def test_an_empty_class_or_split_is_an_error_that_names_it(self, tmp_path: Path, empty: str) -> None:
        fill(tmp_path, "train/a/1.png" if "/" in empty or empty == "valid" else "a/1.png")
        (tmp_path / empty / "deeper").mkdir(parents=True)
        with pytest.raises(ValueError, match=f"'{empty}'.* holds? no images"):
            ImageSet.from_folder(tmp_path)

    @pytest.mark.parametrize(
        ("paths", "words"),
        [
            (
                ("photos/cat/1.png", "photos/dog/2.png"),
                "'photos', of 2 images; if the folders below it ('cat', 'dog') are the classes, name the folder above "
                "them: {root}/photos",
            ),
            (
                ("large/1.png", "large/2.png"),
                "'large', of 2 images; if the folder named is a class itself, name the one above it: {above}",
            ),
            (
                ("train/all/cat/1.png", "train/all/dog/1.png", "test/1.png"),
                "'all', of 2 images; if the folders below it ('cat', 'dog') are the classes, move them up one level",
            ),
        ],
    )
    def test_a_single_class_is_said_with_what_may_be_meant(
        self, tmp_path: Path, paths: tuple[str, ...], words: str
    ) -> None:
        images = ImageSet.from_folder(fill(tmp_path / "root", *paths))
        expected = words.format(root=tmp_path / "root", above=tmp_path)
        assert images.notes == (f"only one class was found, the folder {expected}",)
        file = table(tmp_path / "t.csv", "path,label,kind", "1.png,a,x", "2.png,a,y")
        assert ImageSet.from_csv(file).notes == ("only one class was found, 'a', of 2 images; is it the right column?",)
        assert ImageSet.from_csv(file, label_column="kind").notes == ()

    def test_images_without_folders_are_an_unlabelled_set(self, tmp_path: Path) -> None:
        images = ImageSet.from_folder(fill(tmp_path, "2.png", "1.png"))
        assert images.ids == ("1.png", "2.png")
        assert (images.targets, images.classes, images.splits.tolist()) == (None, (), ["", ""])
        assert not images.is_labelled
        assert images.describe() == "2 images, unlabelled"

    def test_no_images_says_what_was_found(self, tmp_path: Path) -> None:
        (tmp_path / "a").mkdir()
        (tmp_path / "a" / "notes.txt").touch()
        with pytest.raises(ValueError, match=r"holds no images: found 1 folder \('a'\) and 1 other file .*\.webp"):
            ImageSet.from_folder(tmp_path)
        with pytest.raises(ValueError, match=r"is not there .*Expected a folder"):
            ImageSet.from_folder(tmp_path / "missing")
        with pytest.raises(ValueError, match=r"is a file .*from_csv"):
            ImageSet.from_folder(tmp_path / "a" / "notes.txt")

    def test_links_are_followed_but_not_in_circles(self, tmp_path: Path) -> None:
        fill(tmp_path / "elsewhere", "1.png", "inner/2.png")
        fill(tmp_path / "root", "a/0.png")
        (tmp_path / "root" / "b").symlink_to(tmp_path / "elsewhere")
        (tmp_path / "elsewhere" / "inner" / "up").symlink_to(tmp_path / "elsewhere")
        images = ImageSet.from_folder(tmp_path / "root")
        assert images.ids == ("a/0.png", "b/1.png", "b/inner/2.png")
        assert images.skipped == (("b/inner/up", "links back to a folder above it"),)

    def test_a_folder_that_cant_be_listed_is_an_error_that_names_it(self, tmp_path: Path) -> None:
        fill(tmp_path, "a/0.png")
        (tmp_path / "a" / "knot").symlink_to("knot")
        with pytest.raises(FeatureStoreError, match=r"a can't be listed \(Too many .*knot"):
            ImageSet.from_folder(tmp_path)

    def test_a_link_to_nothing_is_an_image_that_fails(self, tmp_path: Path) -> None:
        fill(tmp_path, "a/0.png")
        (tmp_path / "a" / "1.png").symlink_to(tmp_path / "gone.png")
        images = ImageSet.from_folder(tmp_path)
        assert images.ids == ("a/0.png", "a/1.png")
        assert list(images.digests().failed) == images.absent() == [1]

    def test_a_pipe_with_an_image_name_is_skipped_and_never_opened(self, tmp_path: Path) -> None:
        fill(tmp_path, "a/0.png")
        os.mkfifo(tmp_path / "a" / "1.png")
        assert ImageSet.from_folder(tmp_path).skipped == (("a/1.png", "not a file"),)
        source = FolderSource(root=str(tmp_path))
        with pytest.raises(ImageError, match="not a file"):
            source.read("a/1.png")
        assert "not a file" in source.digests(("a/1.png",), Memo(), KnownDigests()).failed[0]

    def test_unicode_spaces_and_names_that_are_not_utf8_work_throughout(self, tmp_path: Path) -> None:
        fill(tmp_path, "Füchse & Co/bild eins.png", "日本/x\ny.png", *[f"日本/{i}.png" for i in range(9)])
        raw = os.fsencode(tmp_path / "日本") + b"/caf\xe9.png"
        Path(os.fsdecode(raw)).write_bytes(image_bytes(77))
        images = ImageSet.from_folder(tmp_path).split(0.3)
        assert images.classes == ("Füchse & Co", "日本")
        index = images.ids.index("日本/caf\udce9.png")
        assert images.read(index) == image_bytes(77)
        assert not images.digests().failed
        assert len(images.folds(3)) == 3
        assert pickle.loads(pickle.dumps(images)).ids == images.ids


class TestTables:
    def test_a_table_gives_labels_splits_and_groups_in_its_order(self, tmp_path: Path) -> None:
        file = table(
            tmp_path / "plants.csv",
            "\ufeffpath, label ,split,group",
            "b/2.png,rose,train,p1",
            "",
            '"a, b/1.png", tulip ,val,p2',
            "a/3.png,,TEST,p3",
            "a/../c/4.png,tulip,,p1",
        )
        images = ImageSet.from_csv(file, split_column="split", group_column="group")
        assert images.name == "plants"
        assert images.ids == ("b/2.png", "a, b/1.png", "a/3.png", "c/4.png")
        assert images.classes == ("rose", "tulip")
        np.testing.assert_array_equal(images.targets, [0, 1, -1, 1])
        assert images.splits.tolist() == ["train", "valid", "test", ""]
        assert images.groups == ("p1", "p2", "p3", "p1")
        assert images.source == FolderSource(root=str(tmp_path))

    def test_a_column_split_is_used_as_path_and_label_are(self, tmp_path: Path) -> None:
        file = table(
            tmp_path / "t.csv", "path,label,split", "1.png,a,train", "2.png,a,Val", "3.png,b,", "4.png,b,train"
        )
        images = ImageSet.from_csv(file)
        assert images.splits.tolist() == ["train", "valid", "", "train"]
        np.testing.assert_array_equal(ImageSet.from_csv(file, split_column="split").splits, images.splits)
        assert ImageSet.from_csv(file, split_column="").splits.tolist() == [""] * 4
        assert ImageSet.from_csv(file, split_column="").split(0.5).splits.tolist().count("valid") == 2
        assert ImageSet.from_csv(file, label_column="split").classes == ("Val", "train")
        assert ImageSet.from_csv(file, label_column="split").splits.tolist() == [""] * 4

    def test_a_column_split_of_other_words_is_never_passed_over(self, tmp_path: Path) -> None:
        file = table(tmp_path / "t.csv", "path,label,split,part", "1.png,a,fold1,train", "2.png,a,fold2,valid")
        with pytest.raises(
            ValueError,
            match=r"line 2 of .* has the split 'fold1'\. Expected train, .* --split-column NAME \(in Python: "
            r"split_column=NAME\), or use none, to split anew: --split-column '' \(split_column=\"\"\)\.$",
        ):
            ImageSet.from_csv(file)
        assert ImageSet.from_csv(file, split_column="part").splits.tolist() == ["train", "valid"]
        assert ImageSet.from_csv(file, split_column="").splits.tolist() == ["", ""]

    def test_tabs_and_a_root_of_its_own(self, tmp_path: Path) -> None:
        fill(tmp_path / "photos", "1.png")
        file = table(tmp_path / "t.tsv", "file\tkind", "1.png\tcat")
        images = ImageSet.from_csv(file, root=tmp_path / "photos", path_column="file", label_column="kind")
        assert images.read(0) == image_bytes(0)
        with pytest.raises(ValueError, match=r"no table by its suffix"):
            ImageSet.from_csv(table(tmp_path / "t.txt", "path,label"))

    def test_a_label_and_a_group_in_two_unicode_spellings_are_one(self, tmp_path: Path) -> None:
        lines = [
            "path,label,Gro\u0308\u00dfe",
            "1.png,caf\u00e9,Ma\u0308x",
            "2.png,cafe\u0301,M\u00e4x",
            "3.png,bar,Zo\u0308e",
        ]
        images = ImageSet.from_csv(table(tmp_path / "t.csv", *lines), group_column="Gr\u00f6\u00dfe")
        assert images.classes == ("bar", "caf\u00e9")
        np.testing.assert_array_equal(images.targets, [1, 1, 0])
        assert images.groups == ("M\u00e4x", "M\u00e4x", "Zo\u0308e")  # a single spelling deals as it did
        assert [note.split(" comes in 2 ")[0] for note in images.notes] == [
            "the label 'caf\u00e9'",
            "the group 'M\u00e4x'",
        ]

    def test_a_file_is_found_in_the_unicode_spelling_that_it_has(self, tmp_path: Path) -> None:
        fill(tmp_path, "Ba\u0308ren/caf\u00e9.png", "abs/u\u0308.png")
        absolute = str(tmp_path / "abs" / "\u00fc.png")
        file = table(
            tmp_path / "t.csv", "path,label", "B\u00e4ren/cafe\u0301.png,a", f"{absolute},b", "no/\u00fc.png,b"
        )
        images = ImageSet.from_csv(file)
        assert images.read(0) == image_bytes(0)
        assert images.absent() == [2]
        found = images.digests()
        assert list(found.failed) == [2]
        assert bytes(found.values[1]) == hashlib.sha256(image_bytes(1)).digest()
        assert not images.digests(KnownDigests([DigestTable.of(images.ids, found)])).failed.keys() - {2}

    def test_a_path_in_two_unicode_spellings_is_one_image_twice(self, tmp_path: Path) -> None:
        file = table(tmp_path / "t.csv", "path,label", "caf\u00e9.png,a", "cafe\u0301.png,b")
        with pytest.raises(ValueError, match=r"names cafe\u0301.png twice, in line 2 and in line 3"):
            ImageSet.from_csv(file)

    def test_several_labels_become_n_hot_columns(self, tmp_path: Path) -> None:
        file = table(tmp_path / "m.csv", "path,label", "1.png,dog; cat", "2.png,", "3.png,cat;cat", "4.png,ant")
        images = ImageSet.from_csv(file, task="multi", label_sep=";")
        assert images.classes == ("ant", "cat", "dog")
        assert images.targets is not None
        assert images.targets.dtype == np.float32
        np.testing.assert_array_equal(images.targets, [[0, 1, 1], [0, 0, 0], [0, 1, 0], [1, 0, 0]])
        assert images.describe() == "4 images, 3 classes (ant 1, cat 2, dog 1), several an image"

    @pytest.mark.parametrize(
        ("cell", "separator", "plain"),
        [
            ("['cat', 'indoor']", ",", "'cat,indoor'"),
            ('["cat", "indoor"]', ";", "'cat;indoor'"),
            ("[cat, indoor]", ",", "'cat,indoor'"),
            ("('cat', 'indoor')", None, "'cat;indoor'"),
        ],
    )
    def test_a_list_with_brackets_is_refused_with_the_form_that_is_expected(
        self, tmp_path: Path, cell: str, separator: str | None, plain: str
    ) -> None:
        file = table(
            tmp_path / "m.tsv", "path\tlabel", f"1.png\t{cell}" if '"' not in cell else '1.png\t"[""cat"", ""indoor""]"'
        )
        with pytest.raises(
            ValueError, match=rf"line 2 of .* a list with brackets. Expected the names alone, such as {plain}"
        ):
            ImageSet.from_csv(file, task="single" if separator is None else "multi", label_sep=separator)

    def test_a_class_name_with_brackets_is_a_name(self, tmp_path: Path) -> None:
        file = table(tmp_path / "m.csv", "path,label", "1.png,[unknown]", "2.png,(none)")
        assert ImageSet.from_csv(file).classes == ("(none)", "[unknown]")

    @pytest.mark.parametrize(
        ("text", "encoding", "words"),
        [
            ("path;label\na,b.png;cat\n", "utf-8", "cells separated by ';'"),
            ("sep=;\npath;label\na,b.png;cat\n", "utf-8-sig", "cells separated by ';'"),
            ("path\tlabel\na,b.png\tcat\n", "utf-16", r"cells separated by '\t' and UTF-16"),
            ('path,label\n"a,b.png",cat\n', "utf-16-le", "UTF-16"),
            ('\npath,label\n"a,b.png",cat\n', "utf-16-be", "UTF-16"),
            ("label|x;y|path\ncat|0|a,b.png\n", "utf-8", "cells separated by '|'"),
        ],
    )
    def test_a_dialect_is_found_by_the_header_and_said(
        self, tmp_path: Path, text: str, encoding: str, words: str
    ) -> None:
        (tmp_path / "t.csv").write_bytes(text.encode(encoding))
        images = ImageSet.from_csv(tmp_path / "t.csv")
        assert (images.ids, images.classes) == (("a,b.png",), ("cat",))
        assert images.notes[0] == f"t.csv is read as {words}"

    def test_a_line_after_the_separators_own_is_named_by_its_number(self, tmp_path: Path) -> None:
        file = table(tmp_path / "t.csv", "sep=;", "path;label", "1.png;a", "2.png")
        with pytest.raises(ValueError, match=r"line 4 of .* has 1 cell"):
            ImageSet.from_csv(file)

    def test_backslashes_are_slashes(self, tmp_path: Path) -> None:
        fill(tmp_path, "a/b/1.png", "a/2.png")
        images = ImageSet.from_csv(table(tmp_path / "t.csv", "path,label", "a\\b\\1.png,x", "a/2.png,y"))
        assert images.ids == ("a/b/1.png", "a/2.png")
        assert images.notes == ("backslashes in 1 path are read as slashes",)
        assert images.read(0) == image_bytes(0)

    def test_names_without_suffix_get_it(self, tmp_path: Path) -> None:
        fill(tmp_path, "1.png", "2.png", "3.5.png")
        file = table(tmp_path / "t.csv", "path,label", "1,x", "2.PNG,y", "3.5,y")
        assert ImageSet.from_csv(file, suffix=".png").ids == ("1.png", "2.PNG", "3.5.png")
        assert ImageSet.from_csv(file).notes == (
            "the files end with .png, which the table leaves out: say --suffix .png",
        )

    def test_one_hot_columns_are_classes_in_their_order(self, tmp_path: Path) -> None:
        file = table(
            tmp_path / "t.csv", "path,zebra,ant,owl", "1.png,1,0,0", "2.png,0.0,1.0,0.0", "3.png,0,0,", "4.png,0,0,0"
        )
        images = ImageSet.from_csv(file, one_hot="*")
        assert images.classes == ("zebra", "ant", "owl")
        np.testing.assert_array_equal(images.targets, [0, 1, -1, -1])
        several = ImageSet.from_csv(
            table(tmp_path / "m.csv", "path,a,b", "1.png,1,1"), one_hot=["b", "a"], task="multi"
        )
        assert several.classes == ("b", "a")
        np.testing.assert_array_equal(several.targets, [[1, 1]])

    @pytest.mark.parametrize(
        ("row", "one_hot", "message"),
        [
            ("1.png,1,1", "*", "line 2 of .* has 2 classes: a, b. Expected one, .*--task multi"),
            ("1.png,1,-1", "*", "line 2 of .* has '-1' in the column b. Expected 0 or 1"),
            ("1.png,1,0", ["c"], "has no column 'c'; it has 'path', 'a', 'b'. Expected a column of 0 and 1"),
        ],
    )
    def test_one_hot_columns_of_anything_else_are_refused(
        self, tmp_path: Path, row: str, one_hot: list[str] | Literal["*"], message: str
    ) -> None:
        with pytest.raises(ValueError, match=message):
            ImageSet.from_csv(table(tmp_path / "t.csv", "path,a,b", row), one_hot=one_hot)

    def test_a_column_of_what_is_held_out_is_a_split(self, tmp_path: Path) -> None:
        rows = ["1.png,a,False", "2.png,a,True", "3.png,b,0"]
        file = table(tmp_path / "t.csv", "path,label,is_valid", *rows)
        assert ImageSet.from_csv(file, valid_column="is_valid").splits.tolist() == ["train", "valid", "train"]
        assert ImageSet.from_csv(file).notes == (
            "the table's column is_valid isn't used; if it says what is held out: --valid-column is_valid",
        )
        with pytest.raises(ValueError, match="Expected one column that says the split"):
            ImageSet.from_csv(file, valid_column="is_valid", split_column="label")
        with pytest.raises(ValueError, match=r"line 2 of .* has '1.png' in the column of what is held out"):
            ImageSet.from_csv(file, valid_column="path")

    def test_a_missing_column_is_answered_with_what_may_be_meant(self, tmp_path: Path) -> None:
        fill(tmp_path / "dogs", "0a1.jpg")
        file = table(tmp_path / "t.csv", "id,breed", "0a1,boxer", "0a2,pug")
        with pytest.raises(
            ValueError,
            match=r"no column 'path'; it has 'id', 'breed'\. Expected one column with each image's path, maybe "
            r"--path-column id --suffix \.jpg --label-column breed "
            r"\(in Python: path_column='id', suffix='\.jpg', label_column='breed'\)",
        ):
            ImageSet.from_csv(file, root=tmp_path / "dogs")
        images = ImageSet.from_csv(file, root=tmp_path / "dogs", path_column="id", suffix=".jpg", label_column="breed")
        assert images.read(0) == image_bytes(0)
        other = table(tmp_path / "u.csv", "num,photo,kind of", "1,x.png,a")
        with pytest.raises(ValueError, match="path, maybe --path-column photo \\(in"):
            ImageSet.from_csv(other)

    def test_the_start_of_paths_of_another_machine_is_cut_off(self, tmp_path: Path) -> None:
        fill(tmp_path, "cats/1.png", "cats/2.png")
        for start in ("/data/photos", "C:\\photos", "old"):
            join = "\\" if "\\" in start else "/"
            lines = [join.join([start, "cats", f"{number}.png"]) + ",a" for number in (1, 2)]
            file = table(tmp_path / "t.csv", "path,label", *lines)
            images = ImageSet.from_csv(file, root=tmp_path, strip=start)
            assert images.ids == ("cats/1.png", "cats/2.png")
            assert images.absent() == []
            assert ImageSet.from_csv(file, root=tmp_path).absent() == [0, 1]
        with pytest.raises(ValueError, match=r"no path of .* begins with /elsewhere \(the first is old/cats/1.png\)"):
            ImageSet.from_csv(file, root=tmp_path, strip="/elsewhere")

    def test_several_labels_are_never_inferred(self, tmp_path: Path) -> None:
        file = table(tmp_path / "m.csv", "path,label", "1.png,dog;cat", "2.png,dog")
        assert ImageSet.from_csv(file).classes == ("dog", "dog;cat")
        with pytest.raises(ValueError, match=r"label_sep is ';' but task is 'single'"):
            ImageSet.from_csv(file, label_sep=";")

    def test_no_label_column_is_an_unlabelled_set(self, tmp_path: Path) -> None:
        file = table(tmp_path / "m.csv", "path", "1.png", "2.png")
        for images in (
            ImageSet.from_csv(file, label_column=None),
            ImageSet.from_csv(file, label_column=None, task="multi"),
        ):
            assert images.targets is None

    @pytest.mark.parametrize(
        ("lines", "message"),
        [
            (
                ["name,label", "1.png,a"],
                r"no column 'path'; it has 'name', 'label'.*--path-column NAME \(in Python: path_column=NAME\)\.$",
            ),
            (["path,kind", "1.png,a"], r"no column 'label'.*say --label-column '' \(label_column=None\)\.$"),
            (["path,label,label", "1.png,a,b"], r"2 columns 'label'"),
            (["path,label", "1.png,a", "x/../1.png,b"], r"names 1.png twice, in line 2 and in line 3"),
            (["path,label", "1.png,a", "2.png,a,b"], r"line 3 of .* has 3 cells. Expected 2"),
            (["path,label", '"1', '2.png",a', ",b"], r"line 4 of .* names no image"),
            (["path,label", '1.png,"a"b'], r"understood at line 2"),
            (["path,label"], r"only a header"),
            ([], r"holds nothing"),
        ],
    )
    def test_a_table_that_cant_be_understood_is_named_with_the_line(
        self, tmp_path: Path, lines: list[str], message: str
    ) -> None:
        file = tmp_path / "t.csv"
        file.write_text("\n".join(lines))
        with pytest.raises(ValueError, match=message):
            ImageSet.from_csv(file)

    @pytest.mark.parametrize(
        ("cells", "message"),
        [
            ("2.png,a,hold-out,p", r"line 3 of .* has the split 'hold-out'. Expected train, valid"),
            (
                "2.png,fox,valid,p",
                r"class 'fox' \(line 3 of .*, split valid\) is not in train.*; to extract .*--label-column ''",
            ),
            ("2.png,a,valid,", r"line 3 of .* has no group"),
        ],
    )
    def test_a_wrong_split_class_or_group_is_named_with_the_line(
        self, tmp_path: Path, cells: str, message: str
    ) -> None:
        file = table(tmp_path / "t.csv", "path,label,split,group", "1.png,a,train,p", cells)
        with pytest.raises(ValueError, match=message):
            ImageSet.from_csv(file, split_column="split", group_column="group")

    def test_paths_outside_the_root_are_kept_as_they_are_meant(self, tmp_path: Path) -> None:
        fill(tmp_path, "labels/in.png", "photos/out.png", "far/abs.png")
        lines = ["path", str(tmp_path / "labels" / "in.png"), "../photos/out.png", str(tmp_path / "far" / "abs.png")]
        images = ImageSet.from_csv(table(tmp_path / "labels" / "t.csv", *lines), label_column=None)
        assert images.ids == ("in.png", "../photos/out.png", (tmp_path / "far" / "abs.png").as_posix())
        assert [images.read(i) for i in range(3)] == [image_bytes(0), image_bytes(1), image_bytes(2)]
        again = table(tmp_path / "labels" / "u.csv", *lines, str(tmp_path / "photos" / "out.png"))
        with pytest.raises(ValueError, match="twice"):
            ImageSet.from_csv(again, label_column=None)


class TestArrays:
    def test_digits_of_scikit_learn(self) -> None:
        digits = load_digits()
        images = ImageSet.from_arrays(digits.images.astype(np.uint8), digits.target)
        assert images.classes == tuple("0123456789")
        assert images.ids[11] == "11"
        np.testing.assert_array_equal(images.targets, digits.target)
        np.testing.assert_array_equal(images.read(11), digits.images[11])

    def test_integer_labels_are_classes_in_order_of_value(self) -> None:
        images = ImageSet.from_arrays(np.zeros((4, 2, 2), np.uint8), [10, 9, -1, 100])
        assert images.classes == ("9", "10", "100")
        np.testing.assert_array_equal(images.targets, [1, 0, -1, 2])

    def test_given_classes_keep_their_order_and_integers_are_places_in_it(self) -> None:
        pixels = np.zeros((3, 2, 2, 3), np.uint8)
        by_place = ImageSet.from_arrays(pixels, np.array([1, 0, -1]), classes=["zebra", "ant", "cow"])
        by_name = ImageSet.from_arrays(pixels, ["ant", "zebra", None], classes=["zebra", "ant", "cow"])
        for images in (by_place, by_name):
            assert images.classes == ("zebra", "ant", "cow")
            np.testing.assert_array_equal(images.targets, [1, 0, -1])

    def test_labels_of_arrays_are_compared_in_nfc(self) -> None:
        labels = ["caf\u00e9", "cafe\u0301", "bar"]
        images = ImageSet.from_arrays(np.zeros((3, 2, 2), np.uint8), labels)
        assert images.classes == ("bar", "caf\u00e9")
        given = ImageSet.from_arrays(np.zeros((3, 2, 2), np.uint8), labels, classes=["cafe\u0301", "bar"])
        np.testing.assert_array_equal(given.targets, [0, 0, 1])

    def test_a_class_table_from_before_two_spellings_were_one_is_kept(self) -> None:
        old = ImageSet(**{**vars(counted(2)), "classes": ("caf\u00e9", "cafe\u0301")})
        assert old.classes == ("caf\u00e9", "cafe\u0301")

    def test_n_hot_arrays_and_lists_of_labels_agree(self) -> None:
        pixels = np.zeros((3, 2, 2), np.uint8)
        n_hot = np.array([[1, 0, 1], [0, 0, 0], [0, 1, 0]])
        one = ImageSet.from_arrays(pixels, n_hot, classes=["a", "b", "c"], task="multi")
        two = ImageSet.from_arrays(pixels, [["c", "a"], [], ["b"]], task="multi")
        assert one.classes == two.classes
        np.testing.assert_array_equal(one.targets, n_hot)
        np.testing.assert_array_equal(two.targets, n_hot)
        assert ImageSet.from_arrays(pixels, n_hot, task="multi").classes == ("0", "1", "2")
        assert ImageSet.from_arrays(pixels, classes=["a"], task="multi").targets is None

    @pytest.mark.parametrize(
        ("labels", "message"),
        [
            ([0, 1], "labels has 2 entries. Expected 3"),
            ([0, 1, 2], r"labels\[2\] is 2. Expected 0 to 1"),
            ([0, -2, 1], r"labels\[1\] is -2"),
            (["a", "b", "c"], r"class 'c' \(labels\[2\]\) is not in classes"),
        ],
    )
    def test_a_wrong_label_is_named(self, labels: list[object], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            ImageSet.from_arrays(np.zeros((3, 2, 2), np.uint8), labels, classes=["a", "b"])

    def test_labels_of_another_type_are_refused(self) -> None:
        pixels = np.zeros((2, 2, 2), np.uint8)
        with pytest.raises(TypeError, match=r"labels\[0\] is 0.5, a float"):
            ImageSet.from_arrays(pixels, [0.5, 1.5])
        with pytest.raises(TypeError, match=r"labels\[0\] is 'cat'. Expected a list"):
            ImageSet.from_arrays(pixels, ["cat", "dog"], task="multi")
        with pytest.raises(ValueError, match="other than 0 and 1"):
            ImageSet.from_arrays(pixels, np.array([[0.2, 0.8], [1, 0]]), task="multi")

    @pytest.mark.parametrize("shape", [(4, 4), (2, 4, 4, 1), (2, 3, 4, 4), (0, 4, 4), (2, 0, 4)])
    def test_another_shape_or_dtype_is_refused(self, shape: tuple[int, ...]) -> None:
        with pytest.raises(ValueError, match=r"Expected \(N, H, W\)"):
            ImageSet.from_arrays(np.zeros(shape, np.uint8))
        with pytest.raises(TypeError, match="array of float64"):
            ImageSet.from_arrays(np.zeros((2, 4, 4)))  # type: ignore[arg-type]

    def test_a_class_outside_train_is_an_error_here_too(self) -> None:
        with pytest.raises(ValueError, match=r"class '7' \(labels\[2\], split valid\) is not in train"):
            ImageSet.from_arrays(np.zeros((3, 2, 2), np.uint8), [5, 6, 7], splits=["train", "", "val"])

    def test_changing_what_was_passed_changes_nothing(self) -> None:
        pixels, labels = np.zeros((3, 2, 2), np.uint8), np.array([0, 1, 0])
        splits, groups = np.array(["train", "train", "valid"]), ["p", "q", "r"]
        images = ImageSet.from_arrays(pixels, labels, splits=splits, groups=groups)
        pixels[:], labels[:], splits[:], groups[:] = 9, 1, "test", ["z"] * 3
        assert not np.any(images.read(0))
        np.testing.assert_array_equal(images.targets, [0, 1, 0])
        assert images.splits.tolist() == ["train", "train", "valid"]
        assert images.groups == ("p", "q", "r")
        targets, origin = np.array([0, 1, 1]), {"root": "here"}
        direct = ImageSet(**{**vars(images), "targets": targets, "origin": origin})
        targets[:], origin["root"] = 0, "there"
        np.testing.assert_array_equal(direct.targets, [0, 1, 1])
        assert direct.origin == {"root": "here"}

    def test_neither_targets_nor_splits_nor_images_can_be_written_to(self) -> None:
        images = ImageSet.from_arrays(np.zeros((2, 2, 2), np.uint8), [0, 1])
        for each in (images, images.select([0]), images.split(0.5), pickle.loads(pickle.dumps(images))):
            assert each.targets is not None
            for array in (each.targets, each.splits, each.read(0)):
                assert isinstance(array, np.ndarray)
                with pytest.raises(ValueError, match="read-only"):
                    array[0] = 0

    def test_a_file_written_to_below_a_read_only_array_is_hashed_again(self, tmp_path: Path) -> None:
        np.save(tmp_path / "a.npy", np.zeros((2, 4, 4), np.uint8))
        images = ImageSet.from_arrays(np.load(tmp_path / "a.npy", mmap_mode="r"))
        before = images.digests().values
        written = np.load(tmp_path / "a.npy", mmap_mode="r+")
        written[0] = 1
        written.flush()
        after = images.digests().values
        assert (before != after).any(axis=1).tolist() == [True, False]
        assert after[0].tobytes() == content_digest(np.ones((4, 4), np.uint8))

    def test_a_read_only_array_is_not_copied(self, tmp_path: Path) -> None:
        np.save(tmp_path / "a.npy", np.arange(32, dtype=np.uint8).reshape(2, 4, 4))
        mapped = np.load(tmp_path / "a.npy", mmap_mode="r")
        source = ImageSet.from_arrays(mapped).source
        assert isinstance(source, ArraySource)
        assert np.shares_memory(source.images, mapped)
        own = np.zeros((2, 4, 4), np.uint8)
        view = own[:]
        view.flags.writeable = False  # but `own` can still be written to
        source = ImageSet.from_arrays(view).source
        assert isinstance(source, ArraySource)
        assert not np.shares_memory(source.images, own)


class TestSubsets:
    def test_select_keeps_the_order_given_and_everything_in_step(self, tmp_path: Path) -> None:
        file = table(tmp_path / "t.csv", "path,label,group", "1.png,a,p", "2.png,b,q", "3.png,c,r")
        images = ImageSet.from_csv(file, group_column="group").with_splits(["train", "valid", "test"])
        chosen = images.select([2, 0])
        assert (chosen.ids, chosen.groups, chosen.splits.tolist()) == (
            ("3.png", "1.png"),
            ("r", "p"),
            ["test", "train"],
        )
        np.testing.assert_array_equal(chosen.targets, [2, 0])
        assert chosen.classes == images.classes
        assert chosen.name == "t-select"
        assert images.select(np.array([True, False, True])).ids == ("1.png", "3.png")
        assert images.select([]).ids == ()

    @pytest.mark.parametrize(
        ("which", "error"),
        [([3], ValueError), ([-1], ValueError), ([0, 0], ValueError), ([True, False], ValueError), ([0.0], TypeError)],
    )
    def test_select_refuses_what_it_would_have_to_guess(self, which: Sequence[float], error: type[Exception]) -> None:
        with pytest.raises(error, match=r"select|mask|index"):
            counted(3).select(which)

    def test_subsets_of_a_split_set_are_named_and_may_be_empty(self) -> None:
        images = counted(10).split(0.2)
        assert (images.train.name, images.valid.name, len(images.test)) == ("counted-train", "counted-valid", 0)
        assert images.test.describe() == "0 images, 2 classes (0 0, 1 0)"
        assert members(images, "train") == set(images.train.ids)
        assert images.train.ids[0] not in images.valid.ids
        assert len(images.test.split()) == 0
        assert len(images.test.digests()) == 0

    def test_an_image_or_class_twice_is_refused(self) -> None:
        images = counted(2)
        with pytest.raises(ValueError, match="image id 'x' appears 2 times"):
            ImageSet(**{**vars(images), "ids": ("x", "x")})
        with pytest.raises(ValueError, match="class 'x' appears 2 times"):
            ImageSet(**{**vars(images), "classes": ("x", "x")})

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"targets": np.array([0, 2])}, "values from 0 to 2. Expected -1 to 1, as there are 2 classes"),
            ({"targets": np.array([0.0, 1.0])}, "float64. Expected"),
            ({"targets": np.zeros((2, 2))}, r"\(2, 2\)"),
            ({"task": "multi"}, r"Expected \(2, 2\) of 0 and 1"),
            ({"task": "regression"}, "'regression'. Expected 'single'"),
            ({"splits": np.array(["train"])}, "splits has 1 entries"),
            ({"splits": np.array(["train", "fold"])}, "splits holds 'fold'"),
            ({"groups": ("p",)}, "groups has 1 entries"),
        ],
    )
    def test_fields_that_dont_fit_together_are_refused(self, changes: dict[str, object], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            ImageSet(**{**vars(counted(2)), **changes})

    @pytest.mark.parametrize(
        ("name", "safe"), [("my photos/ä", "my_photos"), ("..", "images"), ("фото", "images"), ("a.b-c_1", "a.b-c_1")]
    )
    def test_names_are_made_safe_for_file_names(self, name: str, safe: str) -> None:
        assert ImageSet.from_arrays(np.zeros((1, 2, 2), np.uint8), name=name).name == safe

    def test_names_too_long_for_a_file_stay_two(self) -> None:
        images = ImageSet.from_arrays(np.zeros((2, 4, 4), np.uint8), splits=["train", "valid"], name="n" * 100)
        names = [images.name, images.train.name, images.valid.name]
        assert len(set(names)) == 3
        assert max(map(len, names)) == 100

    def test_describe_says_counts_classes_splits_and_skipped(self, tmp_path: Path) -> None:
        assert counted(1000).split(0.2).describe() == "1,000 images, 2 classes (0 500, 1 500); train 800, valid 200"
        assert counted(8, 8).describe() == "8 images, 8 classes (0 1, 1 1, 2 1, 3 1, 4 1, 5 1, 2 more)"
        fill(tmp_path, "train/a/1.png", "train/2.png", "train/x.txt")
        images = ImageSet.from_folder(tmp_path, name="n")
        assert repr(images) == "ImageSet(n: 2 images, 1 class (a 1), 1 unlabelled; train 2; 1 file skipped)"

    def test_origin_holds_what_a_command_needs(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        fill(tmp_path, "photos/a/1.png", "photos/a/2.png")
        monkeypatch.chdir(tmp_path)
        images = ImageSet.from_folder("photos").split(0.3, seed=4)
        assert images.origin["root"] == "photos"
        assert images.origin["split"] == {"valid": 0.3, "test": 0.0, "seed": 4, "stratify": True, "groups": False}
        assert "split" not in images.with_splits(["train", "train"]).origin
        monkeypatch.chdir("/")
        assert images.read(0) == image_bytes(0)  # the root is absolute all the same

    def test_from_store_asks_the_store(self) -> None:
        class OneSet:
            def images(self, name: str | None = None) -> ImageSet:
                return counted(3, prefix=str(name))

        assert ImageSet.from_store(OneSet(), "plants").ids[0] == "plants0/0.jpg"


class TestSplit:
    def test_20_photos_in_two_classes_give_2_and_2(self) -> None:
        images = counted(20).split(0.2)
        assert per_class(images.valid) == [2, 2]
        assert per_class(images.train) == [8, 8]

    @pytest.mark.parametrize(
        ("number", "fraction", "held_out"), [(5, 0.5, 3), (3, 0.5, 2), (100, 0.145, 15), (7, 0.2, 1)]
    )
    def test_fractions_round_half_up(self, number: int, fraction: float, held_out: int) -> None:
        assert per_class(counted(number, 1).split(fraction).valid) == [held_out]

    def test_the_rule_is_the_one_documented(self) -> None:
        images = counted(30, 3).split(0.2, 0.3, seed=5)
        for target in range(3):
            ids = [image for image in images.ids if image.startswith(f"{target}/")]
            ranked = sorted(ids, key=lambda image: hashlib.sha256(f"5\n{image}".encode()).digest())
            dealt = dict(zip(images.ids, images.splits.tolist(), strict=True))
            assert [dealt[image] for image in ranked] == ["valid"] * 2 + ["test"] * 3 + ["train"] * 5

    def test_membership_is_the_same_in_any_order_and_in_another_process(self, processes: Processes) -> None:
        images = counted(200, 4)
        backwards = images.select(np.arange(200)[::-1])
        assert members(images.split(0.2, 0.1), "valid") == members(backwards.split(0.2, 0.1), "valid")
        assert processes.call(held_out_of_200) == held_out_of_200()

    def test_another_seed_deals_another_split(self) -> None:
        images = counted(200)
        assert members(images.split(seed=0), "valid") != members(images.split(seed=1), "valid")
        assert images.split(seed=3).splits.tolist() == images.split(seed=3).splits.tolist()

    @pytest.mark.parametrize("stratify", [True, False])
    def test_adding_images_moves_few_old_ones(self, stratify: bool) -> None:
        moved = []
        for seed in range(5):
            grown = counted(1050, 5).split(0.2, 0.1, seed=seed, stratify=stratify)
            before = counted(1000, 5).split(0.2, 0.1, seed=seed, stratify=stratify)
            old = grown.select(np.arange(1000))
            assert old.ids == before.ids
            moved.append(int(np.sum(old.splits != before.splits)))
        assert max(moved) <= 20  # of 1,000

    def test_something_is_held_out_of_even_two_images(self) -> None:
        for number in (2, 3):
            assert len(counted(number, 2).split(0.1).valid) == 1
        assert len(counted(1, 1).split(0.2).valid) == 0
        assert len(counted(4, 2).split(0.0).valid) == 0
        assert len(counted(2, 1).split(0.1, 0.5).train) == 1

    @pytest.mark.parametrize(("valid", "test"), [(-0.1, 0.0), (0.5, 0.5), (0.0, 1.0), (float("nan"), 0.0)])
    def test_fractions_that_leave_nothing_are_refused(self, valid: float, test: float) -> None:
        with pytest.raises(ValueError, match="Expected fractions of 0 or more with a sum below 1"):
            counted(10).split(valid, test)

    def test_a_seed_that_is_no_integer_is_refused(self) -> None:
        with pytest.raises(TypeError):
            counted(10).split(seed=0.5)  # type: ignore[arg-type]
        assert counted(10).split(seed=int(np.int64(3))).splits.tolist() == counted(10).split(seed=3).splits.tolist()

    def test_old_splits_are_replaced_and_order_stays(self) -> None:
        images = counted(20)
        dealt = images.with_splits(["test"] * 20).split(0.5)
        assert dealt.ids == images.ids
        assert Counter(dealt.splits.tolist()) == {"train": 10, "valid": 10}

    def test_unlabelled_images_are_dealt_on_their_own(self) -> None:
        labels = ["a"] * 10 + [None] * 30
        images = ImageSet.from_arrays(np.zeros((40, 2, 2), np.uint8), labels).split(0.2)
        assert images.valid.targets is not None
        assert sorted(images.valid.targets.tolist()) == [-1] * 6 + [0] * 2

    @pytest.mark.parametrize("task", ["multi", "single"])
    def test_multi_label_and_unlabelled_sets_are_dealt_as_one(self, task: str) -> None:
        labels = np.eye(10, dtype=int) if task == "multi" else None
        images = ImageSet.from_arrays(np.zeros((10, 2, 2), np.uint8), labels, task=task).split(0.3)  # type: ignore[arg-type]
        assert len(images.valid) == 3

    def test_without_stratify_only_the_total_is_kept(self) -> None:
        images = counted(100, 10).split(0.2, stratify=False)
        assert len(images.valid) == 20
        assert per_class(images.valid) != [2] * 10

    def test_dealing_a_hundred_thousand_images_takes_seconds_at_most(self) -> None:
        images = counted(100_000, 100)
        start = time.perf_counter()
        images.split(0.2, 0.1)
        assert time.perf_counter() - start < 5  # half a second on an idle machine


class TestGroups:
    def grouped(self, number: int = 300, seed: int = 0) -> tuple[ImageSet, list[str]]:
        """Groups of 1 to 9 images, each mostly of one class."""
        random = np.random.default_rng(seed)
        groups = [f"p{g}" for g, size in enumerate(random.integers(1, 10, size=number)) for _ in range(size)][:number]
        labels = [int(group[1:]) % 3 if random.random() < 0.8 else int(random.integers(3)) for group in groups]
        return ImageSet.from_arrays(np.zeros((number, 2, 2), np.uint8), labels, groups=groups), groups

    def test_no_group_is_in_two_splits(self) -> None:
        images, groups = self.grouped()
        for dealt in (images.split(0.2, 0.2), images.select(np.arange(300)).split(0.2, 0.2, stratify=False)):
            where: dict[str, set[str]] = {}
            for group, split in zip(groups, dealt.splits.tolist(), strict=True):
                where.setdefault(group, set()).add(split)
            assert {len(splits) for splits in where.values()} == {1}
            assert len(dealt.valid) == pytest.approx(60, abs=10)
            assert len(dealt.test) == pytest.approx(60, abs=10)

    def test_classes_are_near_their_share_in_valid(self) -> None:
        images, _ = self.grouped(900)
        shares = np.array(per_class(images.split(0.2).valid)) / np.array(per_class(images))
        assert np.abs(shares - 0.2).max() < 0.06

    def test_a_group_is_dealt_among_those_of_its_commonest_class(self) -> None:
        labels = [label for g in range(20) for label in ("ant" if g < 10 else "bee", "cow", "ant" if g < 10 else "bee")]
        groups = [i // 3 for i in range(60)]
        images = ImageSet.from_arrays(np.zeros((60, 2, 2), np.uint8), labels)
        for seed in range(5):
            assert per_class(images.split(0.2, groups=groups, seed=seed).valid) == [4, 4, 4]

    def test_groups_may_be_given_and_are_kept(self) -> None:
        images = counted(12, 1)
        dealt = images.split(0.5, groups=[i // 4 for i in range(12)])
        assert dealt.groups == tuple(str(i // 4) for i in range(12))
        assert set(dealt.splits.reshape(3, 4)[:, 0].tolist()) == {"train", "valid"}
        assert all(len(set(block)) == 1 for block in dealt.splits.reshape(3, 4).tolist())
        with pytest.raises(ValueError, match="groups has 3 entries"):
            images.split(groups=[1, 2, 3])

    def test_a_group_too_large_is_passed_over(self) -> None:
        groups = ["big"] * 80 + [f"p{i}" for i in range(20)]
        for seed in range(6):
            assert len(counted(100, 1).split(0.1, groups=groups, seed=seed).valid) == 10

    def test_something_is_held_out_even_if_all_groups_are_large(self) -> None:
        dealt = counted(20, 1).split(0.1, groups=["a"] * 10 + ["b"] * 10)
        assert sorted(Counter(dealt.splits.tolist()).items()) == [("train", 10), ("valid", 10)]

    def test_adding_groups_moves_few_old_images(self) -> None:
        groups = [f"p{i // 4}" for i in range(1040)]
        grown = counted(1040, 1).split(groups=groups)
        before = counted(1000, 1).split(groups=groups[:1000])
        assert np.sum(grown.splits[:1000] != before.splits) <= 20


class TestFolds:
    @pytest.mark.parametrize(("number", "num_classes", "k"), [(100, 5, 5), (103, 7, 4), (12, 12, 5), (9, 2, 9)])
    def test_folds_share_the_images_out_evenly_in_all_and_in_each_class(
        self, number: int, num_classes: int, k: int
    ) -> None:
        images = counted(number, num_classes)
        folds = images.folds(k)
        assert sorted(image for fold in folds for image in fold.valid.ids) == sorted(images.ids)
        sizes = [len(fold.valid) for fold in folds]
        assert max(sizes) - min(sizes) <= 1
        counts = np.array([per_class(fold.valid) for fold in folds])
        assert (counts.max(axis=0) - counts.min(axis=0)).max() <= 1
        for fold in folds:
            assert fold.ids == images.ids
            assert len(fold.train) + len(fold.valid) == number

    def test_test_images_stay_test(self) -> None:
        images = counted(100).split(0.0, 0.3)
        for fold in images.folds(3):
            assert members(fold, "test") == members(images, "test")

    def test_folds_keep_groups_whole_and_none_empty(self) -> None:
        groups = ["big"] * 97 + ["x", "y", "z"]
        folds = counted(100, 3).folds(4, groups=groups)
        for fold in folds:
            held_out = set(np.array(groups)[fold.splits == "valid"].tolist())
            assert len(held_out) == 1
            assert not held_out & set(np.array(groups)[fold.splits == "train"].tolist())

    def test_groups_are_spread_as_evenly_as_scikit_learn_does(self) -> None:
        from sklearn.model_selection import GroupKFold

        images, groups = TestGroups().grouped(500, seed=1)
        ours = np.ptp([len(fold.valid) for fold in images.folds(5, stratify=False)])
        theirs = np.ptp([len(held_out) for _, held_out in GroupKFold(5).split(groups, groups=groups)])
        assert ours <= theirs

    def test_adding_images_moves_few_between_folds(self) -> None:
        before = counted(1000, 4).folds(5)
        grown = counted(1050, 4).folds(5)
        moved = sum(len(members(one, "valid") - members(two, "valid")) for one, two in zip(before, grown, strict=True))
        assert moved <= 60

    def test_a_group_inside_and_outside_test_is_refused(self) -> None:
        images = counted(6, 1).with_splits(["train"] * 5 + ["test"])
        with pytest.raises(ValueError, match=r"1 group \('p'\) .* in split test and outside"):
            images.folds(2, groups=["a", "b", "c", "d", "p", "p"])

    @pytest.mark.parametrize("k", [1, 7])
    def test_too_few_or_too_many_folds_are_refused(self, k: int) -> None:
        with pytest.raises(ValueError, match=rf"k is {k} and there are 6 images"):
            counted(6).folds(k)


class TestReading:
    def test_read_gives_the_bytes_of_the_file(self, tmp_path: Path) -> None:
        images = ImageSet.from_folder(fill(tmp_path, "a/1.png", "a/2.png"))
        assert images.read(1) == (tmp_path / "a" / "2.png").read_bytes()

    def test_a_file_that_is_gone_is_named_with_what_to_do(self, tmp_path: Path) -> None:
        images = ImageSet.from_folder(fill(tmp_path, "a/1.png", "a/2.png"))
        (tmp_path / "a" / "2.png").unlink()
        with pytest.raises(ImageError, match=r"a/2.png: there is no such file in .*with_root") as caught:
            images.read(1)
        assert caught.value.image == "a/2.png"
        assert images.absent() == [1]

    def test_absolute_paths_of_another_machine_are_found_without_their_start(self, tmp_path: Path) -> None:
        fill(tmp_path / "now", "cat/1.png", "dog/2.png")
        lines = ["/data/old/photos/cat/1.png,cat", "/data/old/photos/dog/2.png,dog"]
        images = ImageSet.from_csv(table(tmp_path / "t.csv", "path,label", *lines))
        assert images.with_root(tmp_path / "now").absent() == [0, 1]
        with pytest.raises(
            ImageError, match=r"cat/1.png: there is no such file; if .* --strip /data/old/photos/cat --root"
        ):
            images.read(0)
        moved = images.with_root(tmp_path / "now", strip="/data/old/photos")
        assert (moved.ids, moved.absent()) == (images.ids, [])
        assert [moved.read(0), moved.read(1)] == [image_bytes(0), image_bytes(1)]
        assert len(moved.digests()) == 2
        with pytest.raises(ValueError, match=r"no path of t begins with /data/new \(the first is /data/old"):
            images.with_root(tmp_path / "now", strip="/data/new")

    def test_another_root_finds_moved_images(self, tmp_path: Path) -> None:
        images = ImageSet.from_folder(fill(tmp_path / "old", "a/1.png", "a/2.png"))
        (tmp_path / "old").rename(tmp_path / "new")
        assert images.absent() == [0, 1]
        assert images.absent(limit=1) == [0]
        moved = images.with_root(tmp_path / "new")
        assert moved.absent() == []
        assert moved.read(0) == image_bytes(0)
        assert moved.origin["root"] == str(tmp_path / "new")
        with pytest.raises(ValueError, match="is not there"):
            images.with_root(tmp_path / "nowhere")
        with pytest.raises(ValueError, match="arrays in memory"):
            ImageSet.from_arrays(np.zeros((1, 2, 2), np.uint8)).with_root(tmp_path)

    def test_a_set_without_images_says_where_it_came_from(self) -> None:
        known = {"0/0.jpg": KnownDigest(b"d" * 32, None)}
        absent = ImageSet(**{**vars(counted(2)), "source": AbsentSource(where="images/p-12.h5", known=known)})
        with pytest.raises(ImageError, match=r"1/1.jpg: this image set came from a store \(images/p-12.h5\)"):
            absent.read(1)
        assert absent.absent() == [0, 1]
        found = absent.digests()
        assert found.values[0].tobytes() == b"d" * 32
        assert list(found.failed) == [1]

    def test_a_pickled_set_reads_the_same_and_leaves_the_memo_behind(self, tmp_path: Path) -> None:
        images = ImageSet.from_folder(fill(tmp_path, *[f"a/{i}.png" for i in range(200)])).split()
        before = len(pickle.dumps(images))
        images.digests()
        assert len(pickle.dumps(images)) == before
        again = pickle.loads(pickle.dumps(images))
        assert again.read(7) == images.read(7)
        np.testing.assert_array_equal(again.digests().values, images.digests().values)
        np.testing.assert_array_equal(again.targets, images.targets)


class TestDigests:
    def test_a_digest_is_the_sha256_of_the_file(self, tmp_path: Path) -> None:
        images = ImageSet.from_folder(fill(tmp_path, *[f"a/{i}.png" for i in range(150)]))
        digests = images.digests()
        for index, image in enumerate(images.ids):
            expected = hashlib.sha256((tmp_path / image).read_bytes()).digest()
            assert digests.values[index].tobytes() == expected == content_digest(images.read(index))
        assert digests.values.dtype == np.uint8
        assert digests.values.flags.c_contiguous
        assert not digests.is_failed.any()

    def test_arrays_are_told_apart_by_shape_too(self) -> None:
        pixels = np.zeros((2, 4, 6), np.uint8)
        tall, wide = ImageSet.from_arrays(pixels), ImageSet.from_arrays(pixels.reshape(2, 6, 4))
        values = tall.digests().values
        assert (values[0] == values[1]).all()
        assert (values[0] != wide.digests().values[0]).any()
        assert values[0].tobytes() == content_digest(np.asfortranarray(pixels[0]))

    def test_nothing_is_hashed_before_it_is_needed(self, tmp_path: Path) -> None:
        fill(tmp_path, "a/1.png")
        (tmp_path / "a" / "2.png").symlink_to("missing.png")
        images = ImageSet.from_folder(tmp_path).split(0.5)
        assert len(images.folds(2)) == 2
        assert len(images.select([0])) == 1  # none of this read the file that is not there

    def test_a_file_that_cant_be_read_fails_alone(self, tmp_path: Path) -> None:
        images = ImageSet.from_folder(fill(tmp_path, "a/1.png", "a/2.png", "a/3.png"))
        (tmp_path / "a" / "2.png").unlink()
        (tmp_path / "a" / "2.png").mkdir()
        digests = images.digests()
        assert list(digests.failed) == [1]
        assert "not a file" in digests.failed[1]
        assert not digests.values[1].any()
        assert digests.is_failed.tolist() == [False, True, False]
        assert digests.stats[1].tolist() == [-1] * 5

    def test_a_file_that_changes_while_it_is_hashed_fails(self, tmp_path: Path) -> None:
        images = ImageSet.from_folder(fill(tmp_path, "a/1.png"))
        file, is_done = tmp_path / "a" / "1.png", threading.Event()
        os.truncate(file, 100_000_000)  # all hole, but long enough to hash that the clock ticks

        def write() -> None:
            while not is_done.wait(0.001):
                os.utime(file)

        writer = threading.Thread(target=write)
        writer.start()
        try:
            assert "changed while it was read" in images.digests().failed[0]
        finally:
            is_done.set()
            writer.join()

    def test_the_facts_of_each_file_are_its_own(self, tmp_path: Path) -> None:
        images = ImageSet.from_folder(fill(tmp_path, "a/1.png"))
        before = time.time_ns()
        facts = StatFacts.of_row(images.digests().stats[0].tolist())
        stat = os.stat(tmp_path / "a" / "1.png")
        assert facts is not None
        assert facts[:4] == (stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)
        assert before <= facts.hashed_at_ns <= time.time_ns()

    def known(self, path: Path, seconds: float, **changes: int) -> KnownDigest:
        """A made-up digest, taken so long after the file's last change: whoever trusts it can be told from a reader."""
        stat = os.stat(path)
        last = max(stat.st_mtime_ns, stat.st_ctime_ns)
        facts = StatFacts(stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino, last + int(seconds * 1e9))
        return KnownDigest(b"known".ljust(32), facts._replace(**changes))

    def test_an_unchanged_file_is_trusted_without_reading(self, tmp_path: Path) -> None:
        images = ImageSet.from_folder(fill(tmp_path, "a/1.png"))
        known = self.known(tmp_path / "a" / "1.png", seconds=2)
        digests = images.digests({"a/1.png": known})
        assert digests.values[0].tobytes() == known.digest
        np.testing.assert_array_equal(digests.stats, stat_rows([known.stat]))

    @pytest.mark.parametrize("fact", ["size", "mtime_ns", "ctime_ns", "inode"])
    def test_a_file_with_any_fact_changed_is_read_again(self, tmp_path: Path, fact: str) -> None:
        images = ImageSet.from_folder(fill(tmp_path, "a/1.png"))
        known = self.known(tmp_path / "a" / "1.png", seconds=5, **{fact: 1})
        assert images.digests({"a/1.png": known}).values[0].tobytes() == content_digest(images.read(0))

    def test_a_digest_taken_within_the_clock_tick_of_a_write_is_not_trusted(self, tmp_path: Path) -> None:
        images = ImageSet.from_folder(fill(tmp_path, "a/1.png"))
        known = self.known(tmp_path / "a" / "1.png", seconds=1.9)
        assert images.digests({"a/1.png": known}).values[0].tobytes() == content_digest(images.read(0))
        no_facts = KnownDigest(b"known".ljust(32), None)
        assert images.digests({"a/1.png": no_facts}).values[0].tobytes() == content_digest(images.read(0))

    def test_derived_sets_share_what_was_hashed(self, tmp_path: Path) -> None:
        images = ImageSet.from_folder(fill(tmp_path, "a/1.png", "a/2.png"))
        known = self.known(tmp_path / "a" / "1.png", seconds=2)
        derived = [images.split(0.5), images.select([0]), *images.folds(2)]
        images.digests({"a/1.png": known})  # from here on the made-up digest is in the memo
        for each in derived:
            assert each.digests().values[0].tobytes() == known.digest
        assert images.with_root(tmp_path).digests().values[0].tobytes() != known.digest

    @pytest.mark.parametrize("keep_times", [False, True])
    def test_a_replaced_file_is_never_served_its_old_digest(self, tmp_path: Path, keep_times: bool) -> None:
        images = ImageSet.from_folder(fill(tmp_path, "a/1.png"))
        file = tmp_path / "a" / "1.png"
        images.digests()
        old = os.stat(file)
        data = bytearray(file.read_bytes())
        data[-20] ^= 1  # as many bytes as before
        file.write_bytes(data)
        if keep_times:
            os.utime(file, ns=(old.st_atime_ns, old.st_mtime_ns))
        assert images.digests().values[0].tobytes() == hashlib.sha256(data).digest()

    def at_times(self, monkeypatch: pytest.MonkeyPatch, mtime_ns: int, ctime_ns: int) -> None:
        """Lets all files have these times, and the same inode."""

        def timed(facts: os.stat_result) -> SimpleNamespace:
            times = {"st_mtime_ns": mtime_ns, "st_ctime_ns": ctime_ns, "st_mtime": 0.0, "st_ctime": 0.0}
            return SimpleNamespace(st_mode=facts.st_mode, st_size=facts.st_size, st_ino=1, **times)

        system = {"stat": lambda path: timed(os.stat(path)), "fstat": lambda file: timed(os.fstat(file))}
        monkeypatch.setattr("featstore.images.sources.os", SimpleNamespace(**{**vars(os), **system}))

    @pytest.mark.parametrize("is_from_store", [False, True])
    def test_a_file_without_a_clock_of_its_own_is_read_again_by_each_process(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_from_store: bool
    ) -> None:
        """As of squashfs images that give each file the same time: another version of a set is mounted in its place."""
        images, file = ImageSet.from_folder(fill(tmp_path, "a/1.png")), tmp_path / "a" / "1.png"
        content = file.read_bytes()
        other = content[::-1]
        self.at_times(monkeypatch, 0, 0)
        known = KnownDigests([DigestTable.of(images.ids, images.digests())])
        file.write_bytes(other)
        assert images.digests(known).values[0].tobytes() == hashlib.sha256(content).digest()  # not read twice by one
        fresh = ImageSet.from_folder(tmp_path)
        if is_from_store:
            absent = ImageSet(**{**vars(images), "source": AbsentSource(where="t.h5", known=known), "_memo": Memo()})
            fresh = absent.with_root(tmp_path)
        assert fresh.digests(None if is_from_store else known).values[0].tobytes() == hashlib.sha256(other).digest()

    @pytest.mark.parametrize(
        ("mtime_ns", "ctime_ns", "is_trusted"),
        [
            (1_000_000_000, 1_000_000_000, False),
            (1_000_000_000, 3_000_000_000, True),  # a clock of seconds: unpacked some time after it was made
            (1_000_000_000, 3_000_000_001, True),
            (1_000_000_001, 1_000_000_001, True),
        ],
    )
    def test_whole_seconds_are_a_clocks_where_they_are_not_those_of_the_content(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mtime_ns: int, ctime_ns: int, is_trusted: bool
    ) -> None:
        images = ImageSet.from_folder(fill(tmp_path, "a/1.png"))
        self.at_times(monkeypatch, mtime_ns, ctime_ns)
        facts = StatFacts((tmp_path / "a" / "1.png").stat().st_size, mtime_ns, ctime_ns, 1, 10**15)
        known = KnownDigest(b"known".ljust(32), facts)
        assert (images.digests({"a/1.png": known}).values[0].tobytes() == known.digest) == is_trusted

    def test_a_write_through_a_mapping_is_seen(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Also through a page that was written to before, whose next writes move no time until it is on the disk."""
        images = ImageSet.from_folder(fill(tmp_path, "a/1.png"))
        with open(tmp_path / "a" / "1.png", "r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:

            def write() -> int:
                time.sleep(0.05)  # several ticks of the file system's clock
                mapped[-20] ^= 1
                return os.fstat(file.fileno()).st_mtime_ns

            os.fsync(file.fileno())
            first = write()
            os.fsync(file.fileno())
            if write() == first:
                pytest.skip("this file system never shows writes through a mapping")
            now = time.time_ns
            monkeypatch.setattr(time, "time_ns", lambda: now() + 10**10)  # the digest is taken long after the write
            images.digests()
            write()
            assert images.digests().values[0].tobytes() == hashlib.sha256(mapped[:]).digest()

    def test_the_digests_of_a_store_serve_its_folder_while_the_files_are_the_same(self, tmp_path: Path) -> None:
        images = ImageSet.from_folder(fill(tmp_path, "a/1.png", "a/2.png"))
        known = {image: self.known(tmp_path / image, seconds=3) for image in images.ids}
        absent = ImageSet(**{**vars(images), "source": AbsentSource(where="t.h5", known=known), "_memo": Memo()})
        (tmp_path / "a" / "2.png").write_bytes(image_bytes(99))
        values = absent.with_root(tmp_path).digests().values
        assert values[0].tobytes() == known["a/1.png"].digest
        assert values[1].tobytes() == hashlib.sha256(image_bytes(99)).digest()

    def test_a_table_is_not_trusted_about_arrays(self) -> None:
        images = ImageSet.from_arrays(np.zeros((1, 2, 2), np.uint8))
        digests = images.digests({"0": KnownDigest(b"known".ljust(32), None)})
        assert digests.values[0].tobytes() == content_digest(np.zeros((2, 2), np.uint8))

    def test_no_thread_is_left_behind(self, tmp_path: Path) -> None:
        images = ImageSet.from_folder(fill(tmp_path, *[f"a/{i}.png" for i in range(100)]))
        before = threading.active_count()
        images.digests()
        assert threading.active_count() == before


class TestDuplicates:
    def test_identical_images_across_splits_are_named_once_each(self, tmp_path: Path) -> None:
        paths = ["train/a/1.png", "train/a/2.png", "valid/a/3.png", "valid/a/4.png", "test/a/5.png", "test/a/6.png"]
        fill(tmp_path, *paths, "test/a/7.png")
        for path in ("train/a/2.png", "valid/a/3.png", "test/a/5.png"):
            (tmp_path / path).write_bytes(image_bytes(0))
        (tmp_path / "test/a/6.png").write_bytes((tmp_path / "valid/a/4.png").read_bytes())
        images = ImageSet.from_folder(tmp_path)
        pairs = split_overlap(images, images.digests())
        assert sorted(pairs) == [
            ("train/a/1.png", "test/a/5.png"),
            ("train/a/1.png", "valid/a/3.png"),
            ("valid/a/4.png", "test/a/6.png"),
        ]

    def test_repeats_within_and_across_classes_are_counted_and_named(self, tmp_path: Path) -> None:
        fill(tmp_path, *[f"{kind}/{number}.png" for kind in ("cat", "dog") for number in range(3)])
        images = ImageSet.from_folder(tmp_path)
        assert repeats_note(images, images.digests()) is None
        for path in ("cat/8.png", "cat/9.png", "dog/9.png"):
            (tmp_path / path).write_bytes(image_bytes(77))
        (tmp_path / "dog/5.png").write_bytes(image_bytes(3))  # as dog/0.png
        images = ImageSet.from_folder(tmp_path)
        assert repeats_note(images, images.digests()) == (
            "3 images repeat another byte for byte: 2 contents (cat/8.png 3 times, dog/0.png 2 times), 1 of them under "
            "several classes (cat/8.png); copies, or placeholders for missing images?"
        )

    def test_an_image_alone_of_its_format_in_a_folder_is_named(self, tmp_path: Path) -> None:
        fill(tmp_path, *[f"cat/{number}.{'jpg' if number % 2 else 'JPEG'}" for number in range(10)], "cat/none.gif")
        fill(
            tmp_path,
            "few/1.jpg",
            "few/2.gif",
            *[f"mixed/{number}.jpg" for number in range(10)],
            "mixed/1.png",
            "mixed/1.bmp",
        )
        assert lone_formats_note(ImageSet.from_folder(tmp_path)) == (
            "1 image has another format than all others in the folder (cat/none.gif): a placeholder?"
        )
        assert lone_formats_note(ImageSet.from_folder(tmp_path / "mixed")) is None

    def test_failed_and_undealt_images_overlap_with_nothing(self) -> None:
        values = np.zeros((4, 32), np.uint8)
        digests = Digests(values=values, failed={0: "gone", 1: "gone"}, stats=no_stats(4))
        assert digests.duplicates() == [(2, 3)]
        images = counted(4, 1)
        assert split_overlap(images.with_splits(["train", "valid", "train", ""]), digests) == []
        with pytest.raises(ValueError, match="4 digests for 1 images"):
            split_overlap(images.select([0]), digests)
