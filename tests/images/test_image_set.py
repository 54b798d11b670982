"""Image sets: arrays, subsets, and which bytes a digest stands for."""

from __future__ import annotations

import hashlib
import mmap
import os
import pickle
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import ArrayLike
from sklearn.datasets import load_digits
from support.image_files import counted, fill, image_bytes, members, table

from featstore.errors import ImageError
from featstore.images.digests import (
    DigestTable,
    KnownDigest,
    KnownDigests,
    Memo,
    StatFacts,
    content_digest,
    stat_rows,
)
from featstore.images.image_set import ImageSet
from featstore.images.sources import AbsentSource, ArraySource


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

    @pytest.mark.parametrize(
        ("which", "message"),
        [
            (np.eye(10, 2, dtype=bool), r"a mask of the shape \(10, 2\)"),
            (np.ones((10, 1), dtype=bool), r"a mask of the shape \(10, 1\)"),
            (True, r"a mask of the shape \(\)"),
            (np.array([[0, 1], [2, 3]]), r"indices of the shape \(2, 2\)"),
            (np.array([2**63 + 1], dtype=np.uint64), rf"index {2**63 + 1}\. Expected 0 to 9"),
        ],
    )
    def test_select_refuses_another_shape_in_words(self, which: ArrayLike, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            ImageSet.from_arrays(np.zeros((10, 2, 2), np.uint8)).select(which)

    @pytest.mark.parametrize("splits", [[["train"]] * 10, [["train", "valid"]] * 10, "train", None])
    def test_splits_of_another_shape_are_refused_in_words(self, splits: Any) -> None:
        with pytest.raises(ValueError, match=r"splits has the shape \(.*Expected \(10,\)"):
            ImageSet.from_arrays(np.zeros((10, 2, 2), np.uint8)).with_splits(splits)

    @pytest.mark.parametrize("missing", [None, float("nan"), np.float32("nan")])
    def test_a_group_that_is_missing_is_none(self, missing: object) -> None:
        pixels, groups = np.zeros((3, 2, 2), np.uint8), ["a", missing, missing]
        with pytest.raises(ValueError, match=r"groups\[1\] is (None|nan)\. Expected a group for every image"):
            ImageSet.from_arrays(pixels, groups=groups)
        with pytest.raises(ValueError, match=r"groups\[1\]"):
            ImageSet.from_arrays(pixels).split(groups=groups)

    def test_spaces_around_a_label_are_none_of_it_as_in_a_table(self) -> None:
        images = ImageSet.from_arrays(np.zeros((4, 2, 2), np.uint8), [" a", "a", "b ", " "])
        assert images.classes == ("a", "b")
        assert images.targets is not None
        assert images.targets.tolist() == [0, 0, 1, -1]

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
            ({"task": "ranking"}, "'ranking'. Expected 'single'"),
            ({"task": "regression"}, r"targets has the shape \(2,\). Expected \(2, 2\) numbers"),
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
        assert not moved.origin  # flags with --strip would make other ids
        with pytest.raises(ValueError, match=r"no path of t begins with /data/new \(the first is /data/old"):
            images.with_root(tmp_path / "now", strip="/data/new")
        (tmp_path / "now").rename(tmp_path / "newer")
        assert moved.with_root(tmp_path / "newer").absent() == []

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
