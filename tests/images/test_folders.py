"""Folders: what is found in an image folder, its classes and splits, and what is refused."""

from __future__ import annotations

import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from support.image_files import fill, image_bytes, table
from torchvision.datasets import ImageFolder

from featstore.errors import FeatureStoreError, ImageError
from featstore.images.digests import (
    KnownDigests,
    Memo,
)
from featstore.images.image_set import ImageSet
from featstore.images.sources import FolderSource


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
        deep = os.open(tmp_path / "a", os.O_RDONLY)
        for _ in range(20):  # longer than a path may be
            os.mkdir("x" * 250, dir_fd=deep)
            above, deep = deep, os.open("x" * 250, os.O_RDONLY, dir_fd=deep)
            os.close(above)
        os.close(deep)
        try:
            with pytest.raises(FeatureStoreError, match=r"xxx can't be listed \(File name too long"):
                ImageSet.from_folder(tmp_path)
        finally:
            shutil.rmtree(tmp_path / "a")

    def test_a_link_that_leads_nowhere_blocks_no_set(self, tmp_path: Path) -> None:
        fill(tmp_path, "a/0.png", "b/1.png")
        (tmp_path / "a" / "knot").symlink_to("knot")
        (tmp_path / "a" / "loop.png").symlink_to("loop.png")
        (tmp_path / "b" / "far").symlink_to("x" * 300)
        images = ImageSet.from_folder(tmp_path)
        assert images.ids == ("a/0.png", "a/loop.png", "b/1.png")
        assert [name for name, _ in images.skipped] == ["a/knot", "b/far"]
        assert list(images.digests().failed) == images.absent() == [1]

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
