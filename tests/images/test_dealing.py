"""Dealing: which images a split or a fold gets, whatever their order, and which stay together."""

from __future__ import annotations

import hashlib
import time
from collections import Counter

import numpy as np
import pytest
from support.image_files import counted, held_out_of_200, members, per_class
from support.processes import Processes

from featstore.images.image_set import ImageSet


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
