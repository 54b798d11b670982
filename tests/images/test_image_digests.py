"""Digests of many images: arrays that say what objects would, trusted and taken for whole sets at once."""

from __future__ import annotations

import hashlib
import os
import pickle
import threading
import time
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from featstore import FeatureStore, ImageSet
from featstore.errors import ImageError
from featstore.images.contents import is_changed
from featstore.images.digests import (
    Digests,
    DigestTable,
    KnownDigest,
    KnownDigests,
    Memo,
    StatFacts,
    no_stats,
    stat_rows,
)
from featstore.images.hashing import in_threads
from featstore.images.sources import AbsentSource

FACTS = (StatFacts(1, 2, 3, 2**64 - 5, 4), None, StatFacts(0, -7, 2**62, 12, 9))


def contents(number: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (number, 32), dtype=np.uint8)


def some_table(*ids: str, seed: int = 0) -> DigestTable:
    rng = np.random.default_rng(seed)
    return DigestTable(ids, contents(len(ids), seed), rng.integers(0, 2**62, (len(ids), 5)))


def as_dict(table: DigestTable) -> dict[str, KnownDigest]:
    rows = zip(table.values, table.stats.tolist(), strict=True)
    return {
        name: KnownDigest(bytes(value), StatFacts.of_row(stat))
        for name, (value, stat) in zip(table.ids, rows, strict=True)
    }


def fill(folder: Path, number: int) -> list[Path]:
    """Images of a class, old enough for their digests to be trusted."""
    (folder / "a").mkdir(parents=True)
    files = [folder / f"a/{i:03d}.png" for i in range(number)]
    for i, file in enumerate(files):
        file.write_bytes(b"%d" % i)
    return files


def aged(digests: Digests) -> NDArray[np.int64]:
    """Stat facts of the same files as if they had been hashed a minute later, when their times can be relied on."""
    stats = digests.stats.copy()
    stats[:, 4] += 60_000_000_000
    return stats


class TestKnownDigests:
    def test_are_those_of_a_dict_that_each_table_has_updated(self) -> None:
        tables = [some_table("a", "b", "c"), some_table("c", "d", seed=1), some_table("b", "e", seed=2)]
        expected: dict[str, KnownDigest] = {}
        for each in tables:
            expected.update(as_dict(each))
        known = KnownDigests(tables)
        assert list(known.items()) == list(expected.items())
        assert len(known) == 5
        assert known.get("f") is None
        assert KnownDigests.of(known) is known
        assert dict(KnownDigests.of(expected)) == expected

    @pytest.mark.parametrize("count", [1, 2])
    def test_many_are_found_at_once_in_any_order(self, count: int) -> None:
        tables = [some_table(*"abcdef"), some_table(*"cxf", seed=1)][:count]
        known, ids = KnownDigests(tables), tuple("fxaqc")
        found = known.find(ids)
        assert found.is_known.tolist() == [name in known for name in ids]
        for name, is_known, value, stat in zip(ids, *found, strict=True):
            expected = known[name] if is_known else KnownDigest(bytes(32), None)
            assert KnownDigest(bytes(value), StatFacts.of_row(stat.tolist())) == expected

    def test_none_are_found_in_no_table(self) -> None:
        found = KnownDigests().find(("a", "b"))
        assert not found.is_known.any()
        assert dict(KnownDigests()) == dict(KnownDigests.of({})) == {}

    def test_all_of_a_table_are_found_without_a_copy_and_cant_be_written_to(self) -> None:
        table = some_table(*"abc")
        found = KnownDigests([table]).find(tuple("abc"))
        assert found.is_known.all()
        assert np.shares_memory(found.values, table.values)
        assert np.shares_memory(found.stats, table.stats)
        with pytest.raises(ValueError, match="read-only"):
            found.values[0] = 0

    def test_facts_of_files_fit_a_row_exactly(self) -> None:
        assert [StatFacts.of_row(row) for row in stat_rows(FACTS).tolist()] == list(FACTS)
        assert stat_rows([None]).tolist() == no_stats(1).tolist()

    def test_a_pickle_is_as_large_as_what_was_given(self) -> None:
        known = KnownDigests([some_table(*map(str, range(1000)))])
        before = len(pickle.dumps(known))
        assert "7" in known  # from here on the table can tell where each id is
        assert len(pickle.dumps(known)) == before
        assert dict(pickle.loads(pickle.dumps(known))) == dict(known)

    def test_a_table_leaves_out_images_that_failed(self) -> None:
        digests = Digests(values=contents(3), failed={1: "gone"}, stats=stat_rows(FACTS))
        table = DigestTable.of(("a", "b", "c"), digests)
        assert table.ids == ("a", "c")
        np.testing.assert_array_equal(table.values, digests.values[[0, 2]])
        np.testing.assert_array_equal(table.stats, digests.stats[[0, 2]])


class TestMemo:
    def test_what_was_taken_last_counts_and_is_told_from_what_others_took(self) -> None:
        memo = Memo()
        first, last, others = some_table(*"ab", seed=1), some_table("b", seed=2), some_table(*"abc", seed=3)
        memo.add(first)
        memo.add(last)
        memo.trust(KnownDigests([others]))
        assert dict(memo.known) == as_dict(others)
        assert dict(memo.taken) == as_dict(first) | as_dict(last)

    def test_many_small_additions_stay_few_tables(self) -> None:
        memo, expected = Memo(), {}
        for number in range(100):
            table = some_table(f"{number % 30}", f"{number}", "all", seed=number) if number >= 30 else some_table("all")
            memo.add(table)
            expected.update(as_dict(table))
        assert dict(memo.taken) == expected
        assert len(memo.taken.tables) < 10


class TestDuplicates:
    def test_are_those_found_by_comparing_each_with_each(self) -> None:
        values = np.repeat(contents(40), [1] * 20 + [2] * 10 + [3] * 10, axis=0)
        values = np.random.default_rng(1).permutation(values)
        values[5, :8] = values[6, :8]  # alike in what is looked at first, but not equal
        values[-1] = 0
        digests = Digests(values=values, failed={len(values) - 1: "gone", 3: "gone"}, stats=no_stats(len(values)))
        usable = [place for place in range(len(values)) if place not in digests.failed]
        pairs = {(a, b) for a, b in combinations(usable, 2) if bytes(values[a]) == bytes(values[b])}
        found = digests.duplicates()
        assert {pair for group in found for pair in combinations(group, 2)} == pairs
        assert found == sorted(found)
        assert len(pairs) > 10

    def test_none_are_found_among_none(self) -> None:
        assert Digests(values=contents(0), failed={}, stats=no_stats(0)).duplicates() == []


class TestFolders:
    def test_each_file_gets_its_own_digest_whichever_way_it_is_had(self, tmp_path: Path) -> None:
        files = fill(tmp_path, 300)
        images = ImageSet.from_folder(tmp_path)
        first = images.digests()
        known = KnownDigests([DigestTable(images.ids[:200], first.values[:200], aged(first)[:200])])
        again = ImageSet.from_folder(tmp_path)
        again.select(range(100, 250)).digests(known)  # in part trusted, in part taken, all remembered
        for file in files[150:220]:
            file.write_bytes(b"other " + file.read_bytes())
        files[7].unlink()
        files[299].unlink()
        found = again.digests(known)
        assert list(found.failed) == [7, 299]
        for place, file in enumerate(files):
            expected = hashlib.sha256(file.read_bytes()).digest() if file.exists() else bytes(32)
            assert bytes(found.values[place]) == expected
            facts = StatFacts.of_row(found.stats[place].tolist())
            assert (facts is None) == (not file.exists())
            assert facts is None or facts.inode == file.stat().st_ino

    def test_trusted_files_are_not_read(self, tmp_path: Path) -> None:
        fill(tmp_path, 20)
        images = ImageSet.from_folder(tmp_path)
        made_up = contents(20)
        known = KnownDigests([DigestTable(images.ids, made_up, aged(images.digests()))])
        fresh = ImageSet.from_folder(tmp_path)
        np.testing.assert_array_equal(fresh.digests(known).values, made_up)
        np.testing.assert_array_equal(fresh.select([3, 1]).digests().values, made_up[[3, 1]])

    def test_a_file_of_the_far_future_is_hashed_each_time_and_can_be_filed(self, tmp_path: Path) -> None:
        (file,) = fill(tmp_path / "photos", 1)
        os.utime(file, (2**34 - 2**20, 2**34 - 2**20))
        if file.stat().st_mtime_ns < 2**63:
            pytest.skip("this file system keeps no such times")
        images = ImageSet.from_folder(tmp_path / "photos")
        digests = images.digests()
        assert bytes(digests.values[0]) == hashlib.sha256(file.read_bytes()).digest()
        assert digests.stats.tolist() == [[-1] * 5]
        store = FeatureStore(tmp_path / "store")
        store.save_images(images, digests)
        file.write_bytes(b"other")
        os.utime(file, (2**34 - 2**20, 2**34 - 2**20))
        now = images.digests(store.known_digests(images))
        assert bytes(now.values[0]) == hashlib.sha256(b"other").digest()

    def test_a_large_file_is_hashed_like_a_small_one(self, tmp_path: Path) -> None:
        (file,) = fill(tmp_path, 1)
        os.truncate(file, (16 << 20) + 1)
        expected = hashlib.sha256(file.read_bytes()).digest()
        assert bytes(ImageSet.from_folder(tmp_path).digests().values[0]) == expected


class TestThreads:
    ids = tuple(map(str, range(400)))

    def test_share_images_that_take_long(self) -> None:
        threads = set()

        def work(image: str) -> bytes:
            threads.add(threading.get_ident())
            time.sleep(0.001)
            if image == "399":
                raise ImageError(image, "the last")
            if image == "3":
                raise ImageError(image, "the fourth")
            return int(image).to_bytes(2, "big")

        rows, failed = in_threads(work, self.ids, otherwise=b"--")
        assert len(threads) > 1
        assert list(failed.items()) == [(3, "the fourth"), (399, "the last")]
        expected = [b"--" if i in failed else i.to_bytes(2, "big") for i in range(400)]
        assert [bytes(row) for row in rows] == expected

    @pytest.mark.parametrize("seconds", [0, 0.001])
    def test_raise_what_was_raised_in_them(self, seconds: float) -> None:
        def work(image: str) -> bytes:
            time.sleep(seconds)
            if image == "300":
                raise MemoryError("no more")
            return b"-"

        with pytest.raises(MemoryError, match="no more"):
            in_threads(work, self.ids, otherwise=b"?")


class TestStores:
    @pytest.fixture
    def store(self, tmp_path: Path) -> FeatureStore:
        return FeatureStore(tmp_path / "store")

    def test_a_set_from_a_store_has_the_arrays_of_its_table(self, store: FeatureStore, tmp_path: Path) -> None:
        fill(tmp_path / "photos", 30)
        images = ImageSet.from_folder(tmp_path / "photos")
        digests = images.digests()
        store.save_images(images, digests)
        there = ImageSet.from_store(store)
        assert isinstance(there.source, AbsentSource)
        assert isinstance(there.source.known, KnownDigests)
        (table,) = there.source.known.tables
        assert np.shares_memory(there.digests().values, table.values)
        np.testing.assert_array_equal(there.digests().values, digests.values)
        np.testing.assert_array_equal(there.digests().stats, digests.stats)
        assert "row_of" not in vars(table)  # not looked up one by one
        np.testing.assert_array_equal(there.select([7, 2]).digests().values, digests.values[[7, 2]])

    def test_tables_of_a_set_and_of_its_parts_are_known_together(self, store: FeatureStore, tmp_path: Path) -> None:
        files = fill(tmp_path / "photos", 10)
        images = ImageSet.from_folder(tmp_path / "photos")
        before = images.digests()
        store.save_images(images, before)
        files[2].write_bytes(b"other")
        part = ImageSet.from_folder(tmp_path / "photos").select([1, 2])
        after = part.digests()
        store.save_images(part, after)
        known = store.known_digests(part)
        assert len(known.tables) == 2
        expected = {name: bytes(value) for name, value in zip(images.ids, before.values, strict=True)}
        expected[images.ids[2]] = bytes(after.values[1])
        assert {name: each.digest for name, each in known.items()} == expected
        assert list(store.known_digests(images)) == list(images.ids)

    def test_changed_images_are_those_known_with_another_content(self) -> None:
        images = ImageSet.from_arrays(np.zeros((5, 1, 1), np.uint8))
        values = contents(5)
        digests = Digests(values=values, failed={3: "gone"}, stats=no_stats(5))
        then = values[[0, 1, 3]].copy()
        then[1, 31] ^= 1
        then[2, 0] ^= 1
        known = KnownDigests([DigestTable.without_files(("0", "1", "3"), then)])
        assert is_changed(images, digests, known).tolist() == [False, True, False, False, False]
        assert is_changed(images, digests, dict(known)).tolist() == [False, True, False, False, False]
