"""Upkeep of a store: merged, checked, cleared and removed, while others read and write it; no row lost or changed.

Long, since verification, compaction, collection and removal are tried on one made-up store, and against each other.
"""

from __future__ import annotations

import errno
import os
import pickle
import random
import resource
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from support.operations import replace_operation, watch
from support.parts import flip_bit
from support.processes import Processes
from support.tiny import VIEW, arrays, staged
from torch import Tensor

from featstore import (
    AmbiguousRequestError,
    DamagedFileError,
    FeatureSet,
    FeatureSpec,
    FeatureStore,
    FeatureStoreError,
    extract,
)
from featstore.exchange.imports import import_file
from featstore.files import header
from featstore.files.part import Part, write_part
from featstore.images.decoders import PIXEL_DIGEST
from featstore.store import catalogue, compaction, difference

SPEC = FeatureSpec(trunk="0" * 64, pool={"reduction": "none"}, view=VIEW.facts(), precision="fp32", dtype="float32")
OTHER = replace(SPEC, trunk="1" * 64)
KEY = SPEC.key
IMAGES = arrays(60)
DIGESTS = IMAGES.digests().values
WIDTH = 6
CPU = {"batch_size": 32, "device": "cpu", "torch": "2"}
GPU = {"batch_size": 256, "device": "cuda", "torch": "2"}

Rows = dict[bytes, Tensor]


def rows_of(names: Sequence[int], profile: dict[str, Any] = CPU, width: int = WIDTH) -> Tensor:
    """Rows that say whose they are, and on what they were computed."""
    last_bits = 1e-3 if profile == GPU else 0.0
    return torch.stack([name + last_bits + torch.arange(width) / 64 for name in names] or [torch.empty(0)]).reshape(
        len(names), -1 if names else width
    )


def file(
    store: FeatureStore,
    *names: int,
    profile: dict[str, Any] = CPU,
    spec: FeatureSpec = SPEC,
    failed: dict[int, str] | None = None,
    backbone: str = "net",
    width: int = WIDTH,
    pixels: str | None = None,
    probe: float = 0.0,
) -> Path:
    """Files a part with the rows of some images."""
    return store.write(
        spec,
        features=[rows_of(names, profile, width)],
        digests=np.ascontiguousarray(DIGESTS[list(names)]),
        decoders=np.array([name % 3 for name in names], np.uint8),
        facts={
            "backbone": backbone,
            "cut": "layer2",
            "stages": [{"name": "layer2", "layout": "NC", "shape": [width], "digest": spec.trunk}],
            "class_tokens": 0,
            "profile": profile,
            "probe": {"values": [[probe], [0.0]], "largest": 1.0},
            **({} if pixels is None else {"pixels": pixels}),
            "failed": {DIGESTS[name].tobytes().hex(): reason for name, reason in (failed or {}).items()},
        },
    )


def rows_in(store: FeatureStore, key: str = KEY) -> Rows:
    """What a reader who has just come finds in a set."""
    found = FeatureStore(store.root).set(key)
    rows: Rows = {}
    for part in reversed(found.parts):  # the smallest name last: it wins
        for digest, row in reversed(list(zip(part.digests, part.features.clone(), strict=True))):
            rows[bytes(digest)] = row
    return rows


def same(first: Rows, second: Rows) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def names_of(parts: Sequence[Part]) -> list[str]:
    return [part.path.name for part in parts]


def files_below(root: Path) -> set[str]:
    return {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}


def flip_row(path: Path, row: int = 0) -> None:
    part = Part.open(path)
    flip_bit(path, part.features_offset + row * WIDTH * 4)


def aged(*paths: Path, seconds: float = 100.0) -> None:
    for path in paths:
        os.utime(path, (time.time() - seconds, time.time() - seconds))


# ---- compaction


def test_compaction_makes_one_part_of_many_with_the_rows_in_the_order_they_were_written(store: FeatureStore) -> None:
    paths = [file(store, *range(start, start + 5)) for start in range(0, 20, 5)]
    before = rows_in(store)
    report = store.compact(KEY[:8])
    found = store.set(KEY)
    (part,) = found.parts
    assert same(rows_in(store), before)
    assert torch.equal(part.features, rows_of(range(20)))
    assert part.decoders.tolist() == [name % 3 for name in range(20)]
    assert (part.digests == DIGESTS[:20]).all()
    assert part.path.name < min(path.name for path in paths)
    assert part.facts["supersedes"] == sorted(path.name for path in paths)
    assert all(path.exists() for path in paths)
    assert str(report) == f"4 parts merged into 1, {report.bytes:,} bytes written"
    assert names_of([report.merges[0].part]) == names_of([part])
    assert torch.equal(store.features(IMAGES.select(range(20)), KEY)[:], rows_of(range(20)))


def test_a_set_of_one_part_has_nothing_to_merge(store: FeatureStore) -> None:
    file(store, 0, 1)
    before = files_below(store.root)
    assert store.compact().merges == ()
    assert files_below(store.root) == before


def test_all_sets_are_compacted_where_no_key_is_given(store: FeatureStore) -> None:
    for name in range(4):
        file(store, name, spec=(SPEC, OTHER)[name % 2])
    assert {each.key for each in store.compact().merges} == {SPEC.key, OTHER.key}
    assert [len(found.parts) for found in store.sets()] == [1, 1]


@pytest.mark.parametrize("seed", range(12))
def test_each_reader_sees_the_same_rows_before_and_after_whatever_was_computed_twice(
    store: FeatureStore, seed: int
) -> None:
    rng = random.Random(seed)
    for _ in range(8):
        file(store, *rng.choices(range(30), k=rng.randrange(8)), profile=rng.choice([CPU, GPU]))
        if rng.random() < 0.3:
            before = rows_in(store)
            assert store.compact().left == ()
            assert same(rows_in(store), before)
    before = rows_in(store)
    merges = store.compact().merges
    assert same(rows_in(store), before)
    assert len(store.set(KEY).parts) <= 2  # one a profile
    assert sum(merge.part.num_rows for merge in merges) <= len(before)
    store.gc(older_than=0)
    assert same(rows_in(store), before)


def test_parts_of_two_profiles_stay_apart(store: FeatureStore) -> None:
    for name in range(6):
        file(store, name, profile=(CPU, GPU)[name % 2])
    store.compact()
    parts = store.set(KEY).parts
    assert {str(part.facts["profile"]["device"]): part.num_rows for part in parts} == {"cpu": 3, "cuda": 3}


def test_parts_of_decoders_with_other_pixels_stay_apart(store: FeatureStore) -> None:
    """Those that don't say of which are of the policy's."""
    for name, pixels in enumerate([None, PIXEL_DIGEST, "f" * 64] * 2):
        file(store, name, pixels=pixels)
    assert len(store.compact().merges) == 2
    found = store.set(KEY)
    assert found.pixels == {PIXEL_DIGEST, "f" * 64}
    assert sorted(sorted(part.digests[:, 0].tolist()) for part in found.parts) == sorted(
        sorted(DIGESTS[names, 0].tolist()) for names in ([0, 1, 3, 4], [2, 5])
    )


def test_parts_whose_probes_contradict_stay_apart_and_those_of_other_last_bits_do_not(store: FeatureStore) -> None:
    for name, probe in enumerate([0.0, 2e-4, 5e-5, 2e-4]):  # fp32 allows 1e-4
        file(store, name, probe=probe)
    store.compact()
    found = {part.facts["probe"]["values"][0][0]: part.num_rows for part in store.set(KEY).parts}
    assert found == {5e-5: 2, 2e-4: 2}


def test_a_merged_part_says_of_its_rows_what_the_newest_of_its_parts_said(store: FeatureStore) -> None:
    file(store, 0, backbone="old")
    newest = Part.open(file(store, 1, backbone="new"))
    file(store, 2, profile=GPU)
    at = store.set(KEY).facts["when"]
    store.compact()
    found = store.set(KEY)
    merged = next(part for part in found.parts if part.num_rows == 2)
    for name in ("backbone", "when", "who", "profile", "probe", "stages", "spec", "key", "view"):
        assert merged.facts[name] == newest.facts[name]
    assert merged.facts["merged"]["when"] > merged.facts["when"]
    assert found.facts["when"] == at  # a merge of old rows doesn't pass for the newest ones


def test_what_other_programs_say_of_all_rows_of_a_part_stays_true(store: FeatureStore) -> None:
    file(store, 0)
    for name in (1, 2):
        path = file(store, name)
        part = Part.open(path)
        path.unlink()
        write_part(
            path,
            features=rows_of([name]),
            digests=part.digests,
            decoders=part.decoders,
            facts={**part.facts, "adopted": "from elsewhere"},
        )
    file(store, 3)
    store.compact()
    parts = store.set(KEY).parts
    assert sorted((part.facts.get("adopted"), part.num_rows) for part in parts if "adopted" in part.facts) == [
        ("from elsewhere", 2)
    ]
    assert len(parts) == 2


def test_failures_are_kept_unless_the_image_has_a_row_by_now(store: FeatureStore) -> None:
    file(store, 0, failed={5: "broken", 6: "torn"})
    file(store, failed={7: "not there"})
    file(store, 5)
    large = file(store, 6, profile=GPU)
    store.compact()
    (merged,) = (part for part in store.set(KEY).parts if part.path != large)
    assert merged.facts["failed"] == {DIGESTS[7].tobytes().hex(): "not there"}
    assert store.set(KEY).failed == merged.facts["failed"]


@pytest.mark.parametrize(
    ("limit", "of_ten_rows"), [("MAX_PART_BYTES", 10 * WIDTH * 4), ("MAX_PART_ROWS", 10)], ids=["bytes", "rows"]
)
def test_parts_that_are_large_already_are_left_and_none_grows_too_large(
    store: FeatureStore, monkeypatch: pytest.MonkeyPatch, limit: str, of_ten_rows: int
) -> None:
    """In bytes, and in rows, of which one machine can open so many."""
    monkeypatch.setattr(compaction, limit, of_ten_rows)
    large = file(store, *range(6))
    for start in range(6, 24, 3):
        file(store, *range(start, start + 3))
    before = rows_in(store)
    store.compact()
    parts = store.set(KEY).parts
    assert large in [part.path for part in parts]
    assert sorted(part.num_rows for part in parts) == [6, 9, 9]
    assert same(rows_in(store), before)
    assert store.compact().merges == ()


def test_parts_of_several_folders_end_in_one(store: FeatureStore) -> None:
    first = file(store, 0, 1)
    elsewhere = first.parent.rename(first.parent.with_name("mine"))
    file(store, 2)
    before = rows_in(store)
    store.compact()
    assert len(store.set(KEY).parts) == 1
    assert same(rows_in(store), before)
    store.gc(older_than=0)
    assert len(list(store.root.rglob("part-*"))) == 1
    assert elsewhere.exists() != first.parent.exists() or not any(elsewhere.iterdir())
    assert same(rows_in(store), before)


def test_superseded_parts_never_come_back_in_whatever_order_files_are_deleted(
    store: FeatureStore, tmp_path: Path
) -> None:
    for name in (0, 1):
        file(store, name)
    store.compact()
    file(store, 2)
    store.compact()
    (current,) = store.set(KEY).parts
    before = rows_in(store)
    superseded = sorted({path.name for path in current.path.parent.iterdir()} - {current.path.name})
    assert len(superseded) == 4
    for place, order in enumerate(permutations(superseded)):
        copy = FeatureStore(shutil.copytree(store.root, tmp_path / str(place)))
        for deleted in order:
            copy.set(KEY).folder.joinpath(deleted).unlink()
            assert names_of(FeatureStore(copy.root).set(KEY).parts) == [current.path.name]
        assert same(rows_in(copy), before)


def test_names_of_files_that_are_gone_are_not_carried_on(store: FeatureStore) -> None:
    for name in (0, 1):
        file(store, name)
    store.compact()
    store.gc(older_than=0)
    file(store, 2)
    store.compact()
    (part,) = store.set(KEY).parts
    assert len(part.facts["supersedes"]) == 2


@pytest.mark.parametrize("is_winner_elsewhere", [False, True])
def test_a_flipped_bit_is_never_given_a_fresh_checksum(store: FeatureStore, is_winner_elsewhere: bool) -> None:
    first, second = file(store, 0, 1), file(store, 2, 3)
    damaged = min(first, second)
    if is_winner_elsewhere:  # a row is left out for a duplicate that is damaged
        names = [(0, 1), (2, 3)][damaged == second]
        damaged = file(store, *names, profile=GPU)
        damaged = damaged.rename(damaged.with_name("part-0000000000000000.h5"))
    flip_row(damaged, 1)
    file(store, 4, 5, spec=OTHER)
    file(store, 6, spec=OTHER)
    before = files_below(store.root)
    report = FeatureStore(store.root).compact()
    (left,) = report.left
    assert left.key == KEY
    assert damaged.name in left.reason
    assert "rows 0 to 1" in left.reason
    assert str(report).endswith("; 1 sets left alone")
    assert [each.key for each in report.merges] == [OTHER.key]
    assert {name for name in files_below(store.root) - before if SPEC.key[:8] in name} == set()


def test_a_set_with_a_damaged_file_is_left_alone_and_reported(store: FeatureStore) -> None:
    damaged, _ = file(store, 0), file(store, 1)
    flip_bit(damaged, 5000)
    (left,) = FeatureStore(store.root).compact(KEY).left
    assert str(damaged) in left.reason


def test_a_full_disk_leaves_all_rows_and_no_file(store: FeatureStore, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in range(3):
        file(store, name)
    before, files = rows_in(store), files_below(store.root)

    def full(operation: Callable[..., Any], fd: int, data: memoryview, offset: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    replace_operation(monkeypatch, "write_at", full)
    with pytest.raises(OSError, match="No space left"):
        store.compact()
    assert files_below(store.root) == files
    assert same(rows_in(store), before)


def test_memory_does_not_grow_with_what_is_merged(store: FeatureStore, processes: Processes) -> None:
    width, count = 1 << 18, 60
    for start in range(0, count, 10):  # 63 MB
        file(store, *range(start, start + 10), width=width)
    program = (  # in a new process, since in this one memory is what other tests have made of it
        "import resource, sys\n"
        "from featstore import FeatureStore\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "merges = FeatureStore(sys.argv[1]).compact().merges\n"
        "print(len(merges), (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)"
    )
    merges, grown = map(int, processes.answer(program, str(store.root)).split())
    assert (merges, grown < 40e6) == (1, True), grown
    (part,) = store.set(KEY).parts
    assert part.num_rows == count


def in_child(work: Callable[[], Any], *, kill_after: int | None = None) -> str:
    """What `work` returns in a fork of this process, as text; it may end there before it returns."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            torch.set_num_threads(
                1
            )  # the threads of this process's OpenMP aren't in its fork, which would wait for them
            if kill_after is not None:
                kill_at(kill_after)
            os.write(writing, str(work()).encode())
            os._exit(0)
        except BaseException:
            os._exit(1)
    os.close(writing)
    with open(reading) as said:
        text = said.read()
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status == (0 if text else KILLED), status
    return text


# ---- kills

KILLED = 9


def kill_at(count: int) -> None:
    """Ends the process, without any cleaning up, before its operation number `count` on the disk."""
    left = iter(range(count, -1, -1))

    def counted(name: str, operation: Callable[..., Any], *args: Any) -> Any:
        if next(left) == 0:
            os._exit(KILLED)
        return operation(*args)

    watch(pytest.MonkeyPatch(), counted)


def kills(store: FeatureStore, folder: Path, work: Callable[[FeatureStore], Any]) -> Iterator[FeatureStore]:
    """A copy of `store` after each possible kill of `work`, and after its end."""
    for count in range(1000):
        copy = FeatureStore(shutil.copytree(store.root, folder / str(count)))
        is_done = in_child(lambda: work(copy) and "done", kill_after=count) != ""  # noqa: B023
        yield FeatureStore(copy.root)
        if is_done:
            assert count > 3
            return


def test_a_kill_at_any_operation_of_a_compaction_changes_no_row(store: FeatureStore, tmp_path: Path) -> None:
    for names in ((0, 1), (1, 2), (3,)):
        file(store, *names)
    before = rows_in(store)
    for killed in kills(store, tmp_path, lambda store: store.compact()):
        assert same(rows_in(killed), before)
        assert killed.damaged() == []
        killed.compact()
        assert same(rows_in(killed), before)
        killed.gc(older_than=0)
        assert same(rows_in(killed), before)
        assert len(list(killed.root.rglob("*part-*"))) == 1


def test_a_kill_at_any_operation_of_a_collection_changes_no_row(store: FeatureStore, tmp_path: Path) -> None:
    for names in ((0, 1), (1, 2)):
        file(store, *names)
    store.compact()
    file(store, 4)
    store.compact()
    before = rows_in(store)
    for killed in kills(store, tmp_path, lambda store: store.gc(older_than=0)):
        assert same(rows_in(killed), before)
        killed.gc(older_than=0)
        assert same(rows_in(killed), before)
        assert len(list(killed.root.rglob("part-*"))) == 1


def test_a_kill_at_any_operation_of_a_jobs_merge_changes_no_row(store: FeatureStore, tmp_path: Path) -> None:
    names = [file(store, *names).name for names in ((0, 1), (1, 2), (3,))]
    before = rows_in(store)
    own = names[:2]

    def merge(store: FeatureStore) -> Any:
        return store.merge(KEY, [part.path for part in store.set(KEY).parts if part.path.name in own])

    for killed in kills(store, tmp_path, merge):
        assert same(rows_in(killed), before)
        assert names[2] in names_of(killed.set(KEY).parts)


def test_a_kill_at_any_operation_of_a_removal_leaves_each_folder_whole_or_not_at_all(
    store: FeatureStore, tmp_path: Path
) -> None:
    first = file(store, 0, 1)
    first.parent.rename(first.parent.with_name("mine"))
    for name in (2, 3):
        file(store, name)
    file(store, 5, spec=OTHER)
    folders = {frozenset(part.digests.tobytes() for part in store.set(KEY).parts if part.path.parent == folder)
               for folder in store.set(KEY).folders}  # fmt: skip
    for killed in kills(store, tmp_path, lambda store: store.remove(KEY)):
        left = [each for each in killed.sets() if each.key == KEY]
        if left:  # no file is deleted while some are read
            assert len(list(killed.root.rglob("part-*"))) == 4
        for each in left:
            there = {frozenset(part.digests.tobytes() for part in each.parts if part.path.parent == folder)
                     for folder in each.folders}  # fmt: skip
            assert there <= folders
        assert killed.damaged() == []
        if left:
            killed.remove(KEY)
        killed.gc(older_than=0)
        assert [each.key for each in killed.sets()] == [OTHER.key]
        assert len(files_below(killed.root)) == 1
        assert len(list(killed.root.iterdir())) == 1


# ---- compactions beside each other


@pytest.mark.parametrize("seed", range(25))
def test_compactions_that_know_nothing_of_each_other_lose_and_change_no_row(store: FeatureStore, seed: int) -> None:
    """Any number of them, each with what it saw when it began, which may be long ago."""
    rng = random.Random(seed)
    seen: list[FeatureSet] = []
    written: set[int] = set()
    for _ in range(12):
        if rng.random() < 0.4:
            names = rng.sample(range(4), k=rng.choice([1, 1, 2]))
            file(store, *names)
            written |= set(names)
        elif rng.random() < 0.5 and written:
            seen.append(FeatureStore(store.root).set(KEY))
        elif seen:
            begun = rng.choice(seen[-4:])
            compaction.merge(begun, rng.sample(begun.parts, k=min(len(begun.parts), rng.randrange(2, 4))))
        if written:
            found = rows_in(store)
            expected = {DIGESTS[name].tobytes(): rows_of([name])[0] for name in written}
            assert same(found, expected)


def test_of_three_compactions_that_trust_each_other_none_drops_the_last_row(store: FeatureStore) -> None:
    """Each leaves the row out for one of a smaller name, which another one is just replacing."""

    def put(number: int, *names: int) -> str:
        path = file(store, *names)
        return path.rename(path.with_name(f"part-{number << 44:016x}.h5")).name

    w, x = put(8, 0), put(9, 1)
    slow = FeatureStore(store.root)
    put(4, 0)
    put(5, 2)
    begun = slow.set(KEY)  # sees 4 and 8: the row of 8 is left out for that of 4
    quick = FeatureStore(store.root).set(KEY)
    compaction.merge(quick, [part for part in quick.parts if part.path.name not in (w, x)])  # takes 4 and 5
    put(15, 3)
    last = FeatureStore(store.root).set(KEY)
    compaction.merge(last, [part for part in last.parts if part.path.name not in (w, x)])
    compaction.merge(begun, [part for part in begun.parts if part.path.name in (w, x)])
    assert DIGESTS[0].tobytes() in rows_in(store)


def test_a_job_that_merges_its_parts_deletes_those_that_the_merged_one_has_all_rows_of(store: FeatureStore) -> None:
    other = file(store, 0, profile=GPU)
    other = other.rename(other.with_name("part-0000000000000000.h5"))
    own = [file(store, 0, 1), file(store, 2), file(store, 3)]
    before = rows_in(store)
    store.merge(KEY, own)
    assert [path.exists() for path in (other, *own)] == [True, True, False, False]  # one row is only in the other part
    assert same(rows_in(store), before)
    assert sorted(part.num_rows for part in store.set(KEY).parts) == [1, 3]


def test_a_job_keeps_its_parts_where_the_merged_one_turns_out_to_be_damaged_and_says_so(
    store: FeatureStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = [file(store, name) for name in range(3)]
    before = rows_in(store)

    def damaging(operation: Callable[..., Any], source: Path, target: Path) -> None:
        flip_row(source, 1)
        operation(source, target)

    with monkeypatch.context() as patched:
        replace_operation(patched, "rename", damaging)
        report = store.merge(KEY, own)
    (merge,), (left,) = report.merges, report.left
    assert all(path.exists() for path in own)
    assert left.reason.startswith(f"{merge.part.path}, which took the place of others, is damaged in 3 rows. Set it")
    FeatureStore(store.root).verify(repair=True)
    assert same(rows_in(store), before)


# ---- garbage


def test_superseded_parts_go_once_they_were_replaced_long_ago(store: FeatureStore) -> None:
    paths = {file(store, name) for name in range(3)}
    store.compact()
    before = rows_in(store)
    for keeping in (store.gc(), store.gc(older_than=60)):
        assert keeping.paths == ()
    size = sum(path.stat().st_size for path in paths)
    dry = store.gc(older_than=0, dry_run=True)
    assert all(path.exists() for path in paths)
    report = store.gc(older_than=0)
    assert report == dry
    assert (set(report.paths), report.files, report.bytes) == (paths, 3, size)
    assert not any(path.exists() for path in paths)
    assert same(rows_in(store), before)
    assert str(report) == f"3 files, {report.bytes / 1e6:.3f} MB"
    assert len(store.set(KEY).parts) == 1


def test_the_age_of_a_replacement_counts_and_not_that_of_its_rows(store: FeatureStore) -> None:
    paths = [file(store, name) for name in range(2)]
    for path in paths:
        part = Part.open(path)
        rows, facts = part.features.clone(), {**part.facts, "when": "2020-01-02T03:04:05.000006+00:00"}
        path.unlink()
        write_part(path, features=rows, digests=part.digests, decoders=part.decoders, facts=facts)
    store = FeatureStore(store.root)  # which hasn't opened them before
    (merge,) = store.compact().merges
    assert merge.part.facts["when"] < "2021"
    assert store.gc(older_than=60).paths == ()
    assert set(store.gc(older_than=0).paths) == set(paths)


@pytest.mark.parametrize("place", ["row", "frame"])
def test_what_was_replaced_stays_while_what_replaced_it_is_damaged(store: FeatureStore, place: str) -> None:
    paths = [file(store, name) for name in range(2)]
    before = rows_in(store)
    (merge,) = store.compact().merges
    if place == "row":
        flip_row(merge.part.path)
    else:
        flip_bit(merge.part.path, 4500)
    report = FeatureStore(store.root).gc(older_than=0)
    assert report.paths == ()
    assert all(path.exists() for path in paths)
    if place == "row":
        assert len(report.left) == 2
        assert merge.part.path.name in report.left[0].reason
        assert str(report).endswith("2 superseded parts kept, as what took their place is damaged")
    FeatureStore(store.root).verify(repair=True)
    assert same(rows_in(store), before)  # read again


def test_the_only_sound_copy_of_a_row_stays(store: FeatureStore) -> None:
    """A row was left out of the merged part for a duplicate, which has been damaged since."""
    winner = file(store, 0, profile=GPU)
    winner = winner.rename(winner.with_name("part-0000000000000000.h5"))
    only, other = file(store, 0, 1), file(store, 2)
    store.compact()
    flip_row(winner)
    report = FeatureStore(store.root).gc(older_than=0)
    assert report.paths == (other,)
    assert only.exists()
    assert winner.name in report.left[0].reason


def test_failures_alone_stay_too_while_the_part_that_took_them_over_is_damaged(store: FeatureStore) -> None:
    failures, other = file(store, failed={7: "not there"}), file(store, 0)
    (merge,) = store.compact().merges
    flip_row(merge.part.path)
    report = FeatureStore(store.root).gc(older_than=0)
    assert report.paths == ()
    assert [each.reason.partition(" ")[0] for each in report.left] == [
        str(path) for path in sorted((failures, other), key=lambda path: str(Part.open(path).facts["when"]))
    ]
    FeatureStore(store.root).verify(repair=True)
    assert store.set(KEY).failed == {DIGESTS[7].tobytes().hex(): "not there"}


def test_what_killed_writers_repairs_and_removals_left_goes_and_nothing_else(store: FeatureStore) -> None:
    path = file(store, 0)
    FeatureStore(store.root).save_images(IMAGES, IMAGES.digests())
    gone = file(store, 1, spec=OTHER)
    store.remove(OTHER.key)
    removed = store.root / ".removed-0123456789abcdef"
    removed.mkdir()
    (removed / "part-1.h5").touch()
    temporary = path.with_name(f".{path.name}.tmp-0123456789abcdef")
    table = next((store.root / "images").iterdir())
    temporary_table = table.with_name(f".{table.name}.tmp-0123456789abcdef")
    damaged = path.with_name(f".{path.name}.damaged-0123456789abcdef")
    mine = [path.with_name("notes.txt"), path.with_name(".notes"), store.root / "README"]
    mine += [store.root / ".thesis.tmp-draft", path.with_name(".part-1.tmp-0123456789abcdef")]
    mine += [path.with_name(".notes.damaged-by-rain"), store.root / ".removed-videos" / "holiday.mp4"]
    mine[-1].parent.mkdir()
    for each in (temporary, temporary_table, damaged, *mine):
        each.write_bytes(b"123")
    (gone.parent).mkdir(parents=True)
    (store.root / "an empty folder of mine").mkdir()
    assert store.gc(older_than=50).paths == ()
    assert not gone.parent.exists()  # whoever wants to write makes it anew
    assert not gone.parent.parent.exists()
    aged(temporary)
    assert store.gc(older_than=50).paths == (temporary,)
    report = store.gc(older_than=0)
    assert set(report.paths) == {temporary_table, damaged, removed / "part-1.h5"}
    assert report.bytes == 6
    assert not removed.exists()
    assert all(each.exists() for each in (path, table, *mine))
    assert (store.root / "an empty folder of mine").exists()
    assert store.gc(older_than=0).paths == ()


def test_what_a_killed_estimate_left_goes_once_all_of_it_is_old(store: FeatureStore, tmp_path: Path) -> None:
    path = file(store, 0)
    left, mine = store.root / ".estimate-0123456789abcdef", store.root / ".estimate-invoices"
    link = store.root / ".estimate-fedcba9876543210"
    for folder in (left / "trunk" / "set", mine, tmp_path / "mine"):
        folder.mkdir(parents=True)
        (folder / "part-1.h5").touch()
    link.symlink_to(tmp_path / "mine")
    assert store.gc(older_than=50).paths == ()
    for each in (left, left / "trunk", left / "trunk" / "set"):
        aged(each)
    assert store.gc(older_than=50).paths == ()
    aged(left / "trunk" / "set" / "part-1.h5")
    assert store.gc(older_than=50, dry_run=True).files == 1
    assert store.gc(older_than=50).paths == (left / "trunk" / "set" / "part-1.h5",)
    assert not left.exists()
    assert all((folder / "part-1.h5").exists() for folder in (mine, link, tmp_path / "mine"))
    assert path.exists()


def test_of_a_link_that_a_removal_has_left_nothing_but_the_link_goes(store: FeatureStore, tmp_path: Path) -> None:
    file(store, 0)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/part-1.h5").touch()
    link = store.root / ".removed-0123456789abcdef"
    link.symlink_to(tmp_path / "mine")
    assert store.gc(older_than=0, dry_run=True).paths == (link,)
    assert store.gc(older_than=0).paths == (link,)
    assert not link.is_symlink()
    assert (tmp_path / "mine/part-1.h5").exists()


@pytest.mark.parametrize("name", ["notes.txt", ".notes.txt", ".git"])
def test_a_set_with_anything_else_in_its_folder_is_not_removed(store: FeatureStore, name: str) -> None:
    other = file(store, 0).with_name(name)
    if name == ".git":
        other.mkdir()
        (other / "config").write_bytes(b"mine")
    else:
        other.write_bytes(b"mine")
    before = files_below(store.root)
    with pytest.raises(FeatureStoreError, match=f"holds '{name}', which is no part of set {KEY[:8]}"):
        store.remove(KEY)
    assert files_below(store.root) == before


def test_what_a_killed_writer_left_in_a_sets_folder_goes_with_it(store: FeatureStore) -> None:
    path = file(store, 0)
    path.with_name(f".{path.name}.tmp-0123456789abcdef").touch()
    path.with_name(f".{path.name}.damaged-0123456789abcdef").touch()
    path.with_name(".DS_Store").touch()
    store.remove(KEY)
    assert files_below(store.root) == set()


@pytest.mark.parametrize("act", [FeatureStore.set, FeatureStore.remove, FeatureStore.compact, FeatureStore.model])
def test_an_empty_key_means_no_set(store: FeatureStore, act: Callable[[FeatureStore, str], Any]) -> None:
    file(store, 0)
    with pytest.raises(FeatureStoreError, match="The key is empty"):
        act(store, "")
    assert len(FeatureStore(store.root).sets()) == 1


def test_a_time_that_makes_no_sense_is_refused(store: FeatureStore) -> None:
    file(store, 0)
    for seconds in (-1.0, float("nan")):
        with pytest.raises(ValueError, match=r"older_than is (-1\.0|nan)\. Expected seconds"):
            store.gc(older_than=seconds)
    with pytest.raises(FeatureStoreError, match="There is no store"):
        FeatureStore(store.root / "none").gc()


# ---- verification


def test_a_sound_store_is_counted(store: FeatureStore) -> None:
    file(store, 0, 1)
    file(store, 2)
    file(store, 3, spec=OTHER)
    store.save_images(IMAGES, IMAGES.digests())
    report = store.verify()
    assert (report.parts, report.tables, report.damaged) == (3, 1, ())
    assert report.bytes == sum(path.stat().st_size for path in store.root.rglob("*.h5"))
    assert str(report) == f"3 parts and 1 image table, {report.bytes / 1e6:.3f} MB: all sound"


DAMAGE: dict[str, Callable[[Path], None]] = {
    "row": lambda path: flip_row(path, 1),
    "frame": lambda path: flip_bit(path, 4500),
    "header": lambda path: flip_bit(path, 60),
    "truncated": lambda path: os.truncate(path, path.stat().st_size - 1),
    "empty": lambda path: os.truncate(path, 0),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_found_and_named_and_set_aside_so_that_it_is_computed_again(store: FeatureStore, kind: str) -> None:
    images = arrays(6)

    def run(count: int) -> Any:
        return extract(staged(), images.select(range(count)), store, cuts=["layer2"], workers=0, device="cpu")

    key = run(4).keys[0]
    run(6)
    expected = store.features(images, key)[:]
    bad = next(part.path for part in store.set(key).parts if part.num_rows == 4)
    DAMAGE[kind](bad) if kind != "row" else flip_bit(bad, Part.open(bad).features_offset)
    (found,) = store.verify().damaged
    assert (found.path, found.set_aside) == (bad, None)
    assert bad.name in found.reason
    if kind == "row":
        assert "4 rows of its features (0 to 3) don't fit their checksums" in found.reason
    assert bad.exists()
    report = store.verify(repair=True)
    assert str(report).endswith("1 can't be used, 1 set aside")
    (repaired,) = report.damaged
    assert repaired.set_aside is not None
    assert repaired.set_aside.name.startswith(f".{bad.name}.damaged-")
    assert repaired.set_aside.exists()
    assert not bad.exists()
    assert store.set(key).index.num_images == 2  # the same object, which had opened the part
    assert store.verify().damaged == ()
    assert run(6).computed == 4
    assert torch.equal(store.features(images, key)[:], expected)


def test_a_set_that_loses_its_only_part_is_gone(store: FeatureStore) -> None:
    path = file(store, 0)
    assert len(store.sets()) == 1
    flip_row(path)
    store.verify(repair=True)
    assert store.sets() == []
    file(store, 0)
    assert len(store.sets()) == 1


def test_a_damaged_image_table_is_set_aside_too(store: FeatureStore) -> None:
    file(store, 0)
    old = store.save_images(arrays(3), arrays(3).digests())
    new = store.save_images(arrays(4), arrays(4).digests())
    assert old is not None
    assert new is not None
    assert len(store.images()) == 4
    flip_bit(new, 4500)
    (bad,) = store.verify(repair=True).damaged
    assert (bad.path, bad.set_aside is not None) == (new, True)
    assert len(store.images()) == 3


def test_what_may_well_be_sound_is_reported_and_never_set_aside(
    store: FeatureStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    newer, strange, lost, link = (file(store, name) for name in range(4))
    part = Part.open(newer)
    newer.unlink()
    with monkeypatch.context() as patched:
        patched.setattr(header, "FORMAT_VERSION", 77)
        write_part(newer, features=rows_of([0]), digests=part.digests, decoders=part.decoders, facts=part.facts)
    part = Part.open(strange)
    strange.unlink()
    write_part(
        strange,
        features=rows_of([1]),
        digests=part.digests,
        decoders=part.decoders,
        facts={**part.facts, "spec": {**part.facts["spec"], "version": 9}},
    )
    there = file(store, 9, spec=OTHER).parent
    lost = lost.rename(there / lost.name)
    link.unlink()
    link.symlink_to("nowhere")
    before = files_below(store.root)
    report = store.verify(repair=True)
    assert {bad.path: bad.set_aside for bad in report.damaged} == dict.fromkeys((newer, strange, lost, link))
    reasons = {bad.path: bad.reason for bad in report.damaged}
    assert "has format version 77" in reasons[newer]
    assert "can't be used by this featstore" in reasons[strange]
    assert f"belongs to set {KEY[:8]}, and others beside it to set {OTHER.key[:8]}" in reasons[lost]
    assert "link to a file that isn't there" in reasons[link]
    assert files_below(store.root) == before


@pytest.fixture
def shared() -> Iterator[FeatureStore]:
    """A store in a folder that everybody may read."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield FeatureStore(Path(folder) / "features")


def as_somebody_else(work: Callable[[], Any]) -> str:
    """What `work` returns, as text, if it is done by a user who may read only what everybody may."""

    def changed() -> Any:
        if os.geteuid() == 0:  # who may read everything
            os.seteuid(65534)
        return work()

    return in_child(changed)


def test_a_file_that_may_not_be_read_is_an_error_of_its_set_alone(shared: FeatureStore) -> None:
    file(shared, 0)
    file(shared, 1)
    closed = file(shared, 2, spec=OTHER)
    table = shared.save_images(replace(IMAGES, name="plants"), IMAGES.digests())
    assert table is not None
    for path in (closed, table):
        path.chmod(0)

    def seen() -> Any:
        store = FeatureStore(shared.root)
        for asked in (lambda: store.set(OTHER.key), lambda: store.images("plants")):
            with pytest.raises((DamagedFileError, PermissionError)):
                asked()
        return [
            [each.key == KEY for each in store.sets()],
            len(store.features(IMAGES.select([0, 1]), KEY)[:]),
            sorted(str(error).partition(". ")[0] for error in store.damaged()),
            [(bad.path.name, bad.is_damage, bad.reason.partition(". ")[0]) for bad in store.verify().damaged],
            store.gc(older_than=0, dry_run=True).files,
            store.diff(KEY, KEY).num_both,
        ]

    words = [f"{path} can't be read (Permission denied)" for path in (table, closed)]
    bad = [(path.name, False, said) for path, said in zip((table, closed), words, strict=True)]
    order = sorted(range(2), key=lambda place: (table, closed)[place])
    assert as_somebody_else(seen) == str([[True], 2, sorted(words), [bad[place] for place in order], 0, 2])


def test_a_set_that_may_not_be_read_is_left_alone_by_a_compaction_of_all(shared: FeatureStore) -> None:
    for spec in (SPEC, SPEC, OTHER, OTHER):
        file(shared, 0, spec=spec)
    shared.set(OTHER.key).parts[0].path.chmod(0)
    for path in (shared.root, *shared.root.rglob("*")):
        if path.is_dir():
            path.chmod(0o777)

    def compacted() -> Any:
        report = FeatureStore(shared.root).compact()
        return [each.key == KEY for each in report.merges], [each.key == OTHER.key for each in report.left]

    assert as_somebody_else(compacted) == str(([True], [True]))


@pytest.mark.parametrize("name", ["lost+found", "set", "trunk"])
def test_a_folder_that_may_not_be_read_stops_nobody_who_does_not_need_it(shared: FeatureStore, name: str) -> None:
    file(shared, 0)
    file(shared, 1)
    other = file(shared, 2, spec=OTHER).parent
    closed = {"lost+found": shared.root / "lost+found", "set": other, "trunk": other.parent}[name]
    closed.mkdir(exist_ok=True)
    closed.chmod(0)

    def seen() -> Any:
        store = FeatureStore(shared.root)
        return [
            [each.key == KEY for each in store.sets() if each.key != OTHER.key],
            store.set(KEY).index.num_images,
            [str(error).partition(". ")[0] for error in store.damaged()],
            [(bad.path.name, bad.is_damage) for bad in store.verify(repair=True).damaged],
            store.gc(older_than=0).files,
            len(store.compact(KEY).merges),
        ]

    shared.set(KEY).folder.chmod(0o777)
    is_named = name != "lost+found"
    said = [f"{closed} can't be read (Permission denied)"] * is_named
    assert as_somebody_else(seen) == str([[True], 2, said, [(closed.name, False)] * is_named, 0, 1])


def test_a_store_that_may_not_be_read_is_not_taken_for_an_empty_one(shared: FeatureStore) -> None:
    file(shared, 0)
    shared.root.chmod(0)

    def asked() -> Any:
        with pytest.raises(DamagedFileError, match=r"features can't be read \(Permission denied\)"):
            FeatureStore(shared.root).sets()
        return "refused"

    assert as_somebody_else(asked) == "refused"


def test_files_of_other_programs_are_reported_and_left_alone(store: FeatureStore) -> None:
    part = file(store, 0)
    table = store.save_images(IMAGES, IMAGES.digests())
    assert table is not None
    mine = [table.with_name("labels.h5"), part.with_name("part-of-mine.h5"), table.with_name("short.h5")]
    for path, content in zip(mine, (b"\x89HDF\r\n\x1a\n" + bytes(9000), b"some words of mine", b"x"), strict=True):
        path.write_bytes(content)
    altered, empty, zeros = (file(store, name) for name in range(1, 4))
    flip_bit(altered, 3)
    empty.write_bytes(b"")
    zeros.write_bytes(bytes(8192))
    report = store.verify(repair=True)
    assert {bad.path: bad.is_damage for bad in report.damaged} == dict.fromkeys(mine, False) | dict.fromkeys(
        (altered, empty, zeros), True
    )
    assert all(bad.is_damage == (bad.set_aside is not None) for bad in report.damaged)
    assert all(path.exists() for path in mine)
    assert {bad.reason for bad in report.damaged if bad.path == mine[0]} == {
        f"{mine[0]} is no file of featstore's, and left alone, though it is called as one. Move it elsewhere."
    }


def test_features_that_were_imported_are_not_to_be_extracted_again(store: FeatureStore, tmp_path: Path) -> None:
    np.save(tmp_path / "clip.npy", np.ones((2, 3), np.float32))
    key = import_file(store, tmp_path / "clip.npy", name="clip", ids=["a", "b"]).key
    with pytest.raises(FeatureStoreError, match=r"make those of all images there, and featstore import them, or ask"):
        store.features(IMAGES, key)
    (part,) = store.set(key).parts
    flip_bit(part.path, part.features_offset)
    (bad,) = store.verify().damaged
    assert "and run featstore import again, which adds only what is then missing" in bad.reason
    assert "extract" not in bad.reason
    flip_row(file(store, 0))
    reasons = {each.reason for each in store.verify().damaged} - {bad.reason}
    assert all("and run featstore extract again" in reason for reason in reasons)
    part.path.unlink()
    write_part(
        part.path,
        features=torch.ones(2, 3),
        digests=part.digests,
        decoders=part.decoders,
        facts={**part.facts, "spec": {**part.facts["spec"], "version": 9}},
    )
    with pytest.raises(DamagedFileError, match="or delete it and run featstore import again"):
        FeatureStore(store.root).set(key)


def test_an_error_of_the_disk_is_reported_and_the_rest_is_checked(
    store: FeatureStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed, bad = file(store, 0), file(store, 1)
    flip_row(bad)
    real_open = Part.open

    def refusing(path: Path) -> Part:
        if path == closed:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return real_open(path)

    monkeypatch.setattr(Part, "open", refusing)
    report = store.verify(repair=True)
    assert {each.path: each.set_aside is not None for each in report.damaged} == {closed: False, bad: True}
    assert "can't be read (Permission denied)" in next(each.reason for each in report.damaged if each.path == closed)


def test_a_sound_copy_put_in_the_place_of_a_damaged_file_is_read(store: FeatureStore) -> None:
    path = file(store, 0)
    sound = path.read_bytes()
    flip_row(path)
    (opened,) = store.set(KEY).parts
    assert not torch.equal(opened.features, rows_of([0]))  # mapped from now on
    assert len(store.verify().damaged) == 1
    path.unlink()
    path.write_bytes(sound)
    assert torch.equal(store.set(KEY).parts[0].features, rows_of([0]))
    assert torch.equal(store.features(IMAGES.select([0]), KEY)[:], rows_of([0]))


def test_a_damaged_part_that_was_replaced_harms_nobody(store: FeatureStore) -> None:
    path = file(store, 0)
    file(store, 1)
    before = rows_in(store)
    store.compact()
    flip_bit(path, 4500)
    assert same(rows_in(store), before)
    assert [bad.path for bad in store.verify().damaged] == [path]


# ---- removal


def test_a_set_is_removed_with_all_its_folders_and_nothing_else(store: FeatureStore) -> None:
    first = file(store, 0, 1)
    first.parent.rename(store.root / "mine")
    file(store, 1, 2)
    other = file(store, 5, spec=OTHER)
    table = store.save_images(IMAGES, IMAGES.digests())
    size = sum(path.stat().st_size for path in store.root.rglob("part-*.h5")) - other.stat().st_size
    report = store.remove(KEY[:6])
    assert (report.key, report.rows, report.parts, report.bytes) == (KEY, 3, 2, size)
    assert str(report) == f"set {KEY[:8]} removed: 3 rows in 2 parts, {report.bytes:,} bytes"
    assert table is not None
    assert files_below(store.root) == {path.relative_to(store.root.absolute()).as_posix() for path in (other, table)}
    assert [each.key for each in store.sets()] == [OTHER.key]
    with pytest.raises(FeatureStoreError, match=f"holds no feature set {KEY[:6]}"):
        store.remove(KEY[:6])
    file(store, 0)
    assert store.set(KEY).index.num_images == 1


def test_a_key_of_several_sets_removes_none(store: FeatureStore) -> None:
    file(store, 0)
    file(store, 0, spec=specs_with_equal_starts(KEY[0]))
    with pytest.raises(AmbiguousRequestError, match="have keys that start with"):
        store.remove(KEY[0])
    assert len(store.sets()) == 2


def test_a_folder_with_something_else_in_it_is_not_removed(store: FeatureStore) -> None:
    path = file(store, 0)
    for name, make in (("notes.txt", Path.touch), ("folder", Path.mkdir)):
        make(path.with_name(name))
        with pytest.raises(FeatureStoreError, match=rf"holds '{name}', which is no part of set {KEY[:8]}"):
            store.remove(KEY)
        path.with_name(name).rename(store.root.with_name(name))
    lost = file(store, 1, spec=OTHER)
    lost = lost.rename(path.parent / "part-ffffffffffffffff.h5")
    with pytest.raises(DamagedFileError, match=f"belongs to set {OTHER.key[:8]}"):
        store.remove(KEY)
    lost.unlink()
    assert path.exists()
    store.remove(KEY)


def test_a_set_with_a_damaged_part_can_be_removed(store: FeatureStore) -> None:
    file(store, 0)
    path = file(store, 1, 2)
    flip_bit(path, 4500)
    report = FeatureStore(store.root).remove(KEY)
    assert (report.rows, report.parts) == (1, 2)
    assert files_below(store.root) == set()


@pytest.mark.parametrize("is_beside_a_sound_one", [False, True])
@pytest.mark.parametrize("damage", ["frame", "truncated", "empty"])
def test_a_set_without_a_sound_part_is_removed_by_the_key_in_its_folders_name(
    store: FeatureStore, damage: str, is_beside_a_sound_one: bool
) -> None:
    path = file(store, 1, 2)
    other = file(store, 3, spec=OTHER)
    if is_beside_a_sound_one:
        file(FeatureStore(store.root / "aside"), 4, backbone="my").parent.rename(path.parent.with_name("mine"))
        shutil.rmtree(store.root / "aside")
    DAMAGE[damage](path)
    kept = KEY if is_beside_a_sound_one else KEY[:8]
    for key in (KEY, KEY[:3]):
        foreseen = FeatureStore(store.root).foresee_removal(key)
        assert (foreseen.key, foreseen.rows, foreseen.parts) == (kept, *((1, 2) if is_beside_a_sound_one else (0, 1)))
        assert path.exists()
    report = FeatureStore(store.root).remove(KEY)
    assert report == foreseen
    assert files_below(store.root) == {other.relative_to(store.root.absolute()).as_posix()}


def test_a_key_that_a_sound_set_and_a_damaged_one_start_with_removes_none(store: FeatureStore) -> None:
    second = specs_with_equal_starts(KEY[:1])
    path = file(store, 0)
    file(store, 0, spec=second)
    flip_bit(path, 4500)
    fresh = FeatureStore(store.root)
    with pytest.raises(AmbiguousRequestError, match=f"2 feature sets .* keys that start with {KEY[0]}: .*{KEY[:8]}"):
        fresh.remove(KEY[0])
    assert len(list(store.root.rglob("part-*"))) == 2


def specs_with_equal_starts(start: str) -> FeatureSpec:
    """Another spec whose key starts like that."""
    candidates = (replace(SPEC, trunk=f"{number:064x}") for number in range(1, 10_000))
    return next(each for each in candidates if each.key.startswith(start))


def test_a_key_that_a_set_in_a_renamed_folder_starts_with_too_is_ambiguous(store: FeatureStore) -> None:
    second = specs_with_equal_starts(KEY[:2])
    folder = file(store, 0).parent
    file(store, 0, 1, spec=second)
    folder.rename(folder.with_name("my_old_features"))
    with pytest.raises(AmbiguousRequestError, match=f"2 feature sets .* keys that start with {KEY[:2]}"):
        FeatureStore(store.root).set(KEY[:2])
    assert FeatureStore(store.root).set(second.key).index.num_images == 2


def test_of_a_linked_folder_the_link_alone_is_removed(store: FeatureStore, tmp_path: Path) -> None:
    path = file(FeatureStore(tmp_path / "shared"), 0, 1)
    own = file(store, 2, 3)
    link = own.parent.with_name("linked")
    link.symlink_to(path.parent)
    report = store.remove(KEY)
    assert (report.rows, report.parts) == (4, 1)
    assert Part.open(path).num_rows == 2
    assert list(store.root.iterdir()) == []


def test_a_set_of_which_the_trunks_folder_is_a_link_is_not_removed(store: FeatureStore, tmp_path: Path) -> None:
    path = file(FeatureStore(tmp_path / "shared"), 0, 1)
    store.root.mkdir()
    link = store.root / path.parent.parent.name
    link.symlink_to(path.parent.parent)
    with pytest.raises(FeatureStoreError, match=r"to which there is only a link here, and is not removed\. Remove it"):
        store.remove(KEY)
    assert path.exists()
    assert store.set(KEY).index.num_images == 2


# ---- writers beside it


@pytest.mark.parametrize("operation", ["create", "allocate", "sync", "rename", "sync_folder"])
@pytest.mark.parametrize("how", ["removed", "deleted", "deleted with the one above"])
def test_a_writer_whose_folder_is_taken_away_at_any_moment_writes_again(
    store: FeatureStore, monkeypatch: pytest.MonkeyPatch, operation: str, how: str
) -> None:
    path = file(store, 0)
    if how != "removed":
        path.unlink()
    times = iter(range(100))

    def disturb() -> None:
        if next(times) < 3 and path.parent.exists():
            if how == "removed":
                path.parent.rename(path.parent.with_name(f".removed-{time.time_ns():x}"))
            else:
                shutil.rmtree(path.parent)
            if how == "deleted with the one above":
                shutil.rmtree(path.parent.parent)

    is_written = False

    def disturbed(name: str, real: Callable[..., Any], *args: Any) -> Any:
        nonlocal is_written
        if name == operation and (name != "sync_folder" or is_written):
            disturb()
        is_written = is_written or name == "rename"
        return real(*args)

    watch(monkeypatch, disturbed)
    filed = file(store, 1)
    assert Part.open(filed).num_rows == 1
    monkeypatch.undo()
    assert DIGESTS[1].tobytes() in rows_in(store)


def test_a_writer_gives_up_where_its_folder_is_taken_away_each_time(
    store: FeatureStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def create(operation: Callable[..., Any], path: Path) -> Any:
        shutil.rmtree(path.parent)
        return operation(path)

    replace_operation(monkeypatch, "create", create)
    with pytest.raises(FileNotFoundError):
        file(store, 0)


# ---- processes beside each other


@pytest.mark.parametrize("call", range(4))
def test_a_listing_that_misses_both_a_merged_part_and_what_it_replaced_is_not_believed(
    store: FeatureStore, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    """A folder isn't listed at one moment: what appears behind the reader's place, and goes before it, isn't seen."""
    own, other = [file(store, 0), file(store, 1)], file(store, 2)
    before, calls = rows_in(store), iter(range(100))
    real = catalogue.listed

    def racing(folder: Path) -> list[str]:
        if folder == other.parent and next(calls) == call:
            monkeypatch.setattr(catalogue, "listed", real)
            FeatureStore(store.root).merge(KEY, own)
            return [other.name]
        return real(folder)

    monkeypatch.setattr(catalogue, "listed", racing)
    assert same(rows_in(store), before)
    assert not own[0].exists()


def test_a_name_that_is_listed_for_ever_after_its_file_is_gone_is_an_error_and_no_endless_loop(
    store: FeatureStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a network file system may do for longer than anyone waits."""
    monkeypatch.setattr(catalogue, "_PAUSES_SECONDS", (0.001, 0.002))
    listing_also(monkeypatch, file(store, 0).with_name("part-0.h5"), looks=20)
    with pytest.raises(DamagedFileError, match=r"part-0\.h5 is listed in its folder, and isn't there"):
        FeatureStore(store.root).set(KEY)


def test_a_name_that_is_listed_for_a_while_after_its_file_is_gone_is_waited_for(
    store: FeatureStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = file(store, 0)
    path.with_name("part-zzz.h5").symlink_to("nowhere")  # another reason why a name can't be opened
    looks = listing_also(monkeypatch, path.with_name("part-0.h5"), looks=6)
    with pytest.raises(DamagedFileError, match=r"part-zzz\.h5 is a link to a file that isn't there"):
        FeatureStore(store.root).set(KEY)
    assert next(looks, None) is None


def listing_also(monkeypatch: pytest.MonkeyPatch, gone: Path, *, looks: int) -> Iterator[int]:
    """Lets a folder list a file that isn't there, for so many looks at it; those that are left."""
    real, left = catalogue.listed, iter(range(looks))

    def listed(folder: Path) -> list[str]:
        is_shown = folder == gone.parent and next(left, None) is not None
        return [*real(folder), *[gone.name] * is_shown]

    monkeypatch.setattr(catalogue, "listed", listed)
    return left


def test_threads_share_one_store_while_others_change_it(store: FeatureStore) -> None:
    for name in range(6):
        file(store, name)
    writer, errors, end = FeatureStore(store.root), list[BaseException](), time.monotonic() + 2

    def read() -> None:
        try:
            while time.monotonic() < end and not errors:
                assert store.set(KEY).index.num_images >= 6
        except BaseException as error:
            errors.append(error)

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    while time.monotonic() < end and not errors:
        file(writer, 6)
        file(writer, 7)
        writer.compact()
        writer.gc(older_than=0)
    for thread in threads:
        thread.join()
    sys.setswitchinterval(before)
    assert errors == []


# ---- difference


def test_two_sets_differ_in_the_pixels_of_their_decoders(store: FeatureStore) -> None:
    file(store, 0)
    file(store, 0, spec=OTHER, pixels="f" * 64)
    assert store.diff(KEY[:8], OTHER.key[:8]).profile == (("pixels", PIXEL_DIGEST, "f" * 64),)


def test_two_sets_differ_in_facts_images_and_values(store: FeatureStore) -> None:
    half = replace(SPEC, dtype="float32", precision="bf16")
    file(store, *range(10))
    file(store, *range(5, 20), spec=half, profile=GPU, backbone="mine")
    difference = store.diff(KEY[:8], half.key[:8])
    assert difference.keys == (KEY, half.key)
    assert difference.facts == (("precision", "fp32", "bf16"),)
    assert difference.labels == (("backbone", "net", "mine"),)
    assert difference.profile == (("batch_size", "32", "256"), ("device", "cpu", "cuda"))
    assert (difference.num_both, difference.num_only_a, difference.num_only_b) == (5, 5, 10)
    assert difference.stage is None
    values = difference.values
    assert values is not None
    a, b = rows_of(range(5, 10)).double(), rows_of(range(5, 10), GPU).double()
    assert (values.rows, values.is_equal) == (5, False)
    assert values.largest == float((a - b).abs().max())
    assert values.share == values.largest / float(b.abs().max())
    assert str(difference).splitlines() == [
        f"backbone: net in {KEY[:8]}, mine in {half.key[:8]}",
        f"precision: fp32 in {KEY[:8]}, bf16 in {half.key[:8]}",
        f"profile, batch_size: 32 in {KEY[:8]}, 256 in {half.key[:8]}",
        f"profile, device: cpu in {KEY[:8]}, cuda in {half.key[:8]}",
        f"images: 5 in both, 5 only in {KEY[:8]}, 10 only in {half.key[:8]}",
        "values of 5 images: 0.001 apart at most, 0.00011 of the largest",
    ]


def test_equal_rows_of_two_trunks_are_equal_bit_for_bit_and_the_stage_is_named(store: FeatureStore) -> None:
    file(store, 1, 2, 3)
    file(store, 3, 2, spec=OTHER)
    difference = store.diff(KEY, OTHER.key)
    assert difference.facts == (("trunk", "00000000", "11111111"),)
    assert difference.stage == "layer2"
    values = difference.values
    assert values is not None
    assert "first stage that differs: layer2" in str(difference)
    assert str(difference).endswith("values of 2 images: equal bit for bit")
    assert (values.is_equal, values.largest, values.share, values.rows) == (True, 0.0, 0.0, 2)
    same = store.diff(KEY, KEY)
    assert (same.facts, same.labels, same.profile, same.num_only_a) == ((), (), (), 0)


def test_rows_of_other_shapes_or_of_other_images_are_not_compared(store: FeatureStore) -> None:
    file(store, 0, 1)
    file(store, 0, 1, spec=OTHER, width=3)
    assert store.diff(KEY, OTHER.key).values is None
    third = replace(SPEC, trunk="2" * 64)
    file(store, 5, spec=third)
    assert store.diff(KEY, third.key).values is None


def test_of_many_common_rows_a_thousand_are_compared_evenly(store: FeatureStore) -> None:
    digests = np.random.default_rng(0).integers(0, 256, (3000, 32), dtype=np.uint8)
    values = torch.randn(3000, 2, generator=torch.Generator().manual_seed(0))

    def filed(spec: FeatureSpec, order: NDArray[np.int64], values: Tensor) -> None:
        store.write(
            spec,
            features=[values[torch.from_numpy(order)]],
            digests=digests[order],
            decoders=np.zeros(len(order), np.uint8),
            facts=Part.open(example).facts,
        )

    example = file(store, spec=replace(SPEC, trunk="3" * 64), width=2)
    filed(SPEC, np.arange(3000), values)
    filed(OTHER, np.random.default_rng(1).permutation(3000), values + 1)
    found = store.diff(KEY, OTHER.key).values
    assert found is not None
    assert found.rows == 1000
    assert found.largest == pytest.approx(1.0)


def test_rows_of_a_million_values_are_compared_in_little_memory(store: FeatureStore) -> None:
    width = 1 << 18
    for spec, names in ((SPEC, range(40)), (OTHER, reversed(range(40)))):
        file(store, *names, spec=spec, width=width)  # 42 MB

    def grown() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        values = FeatureStore(store.root).diff(KEY, OTHER.key).values
        assert values is not None
        assert values.is_equal
        return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024

    assert int(in_child(grown)) < 80e6  # all rows at once take 340 MB


@pytest.mark.parametrize("which", ["first", "second"])
def test_a_damaged_row_is_no_difference(store: FeatureStore, which: str) -> None:
    paths = {"first": file(store, *range(9)), "second": file(store, *range(5, 12), spec=OTHER)}
    flip_row(paths[which], 3)
    with pytest.raises(DamagedFileError, match=rf"{paths[which].name} is damaged: its rows 0 to \d+ don't fit"):
        FeatureStore(store.root).diff(KEY, OTHER.key)


def test_each_block_of_compared_rows_is_checked_once(store: FeatureStore, monkeypatch: pytest.MonkeyPatch) -> None:
    width = 1 << 17  # half a block
    for spec in (SPEC, OTHER):
        file(store, *range(12), spec=spec, width=width)
    monkeypatch.setattr(difference, "_PIECE_BYTES", 8 * width)  # a row at once
    checked: list[tuple[Path, int]] = []
    real = Part.read_block_bytes

    def counted(self: Part, blocks: Sequence[int], **options: Any) -> Iterator[tuple[range, NDArray[np.uint8]]]:
        checked.extend((self.path, block) for block in blocks)
        return real(self, blocks, **options)

    monkeypatch.setattr(Part, "read_block_bytes", counted)
    values = store.diff(KEY, OTHER.key).values
    assert values is not None
    assert values.is_equal
    assert len(checked) == len(set(checked)) == 12


def test_sets_are_compared_though_their_parts_are_merged_and_deleted_meanwhile(
    store: FeatureStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in range(6):
        file(store, name // 2, spec=(SPEC, OTHER)[name % 2])
    real = Part.read_block_bytes

    def merged_first(self: Part, blocks: Sequence[int], **options: Any) -> Iterator[tuple[range, NDArray[np.uint8]]]:
        monkeypatch.setattr(Part, "read_block_bytes", real)
        writer = FeatureStore(store.root)
        writer.compact()
        writer.gc(older_than=0)
        return real(self, blocks, **options)

    monkeypatch.setattr(Part, "read_block_bytes", merged_first)
    values = store.diff(KEY, OTHER.key).values
    assert values is not None
    assert (values.rows, values.is_equal) == (3, True)


# ---- the store as an object


def test_a_store_pickles_with_its_options_and_without_what_it_opened(
    store: FeatureStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file(store, *range(40))
    monkeypatch.chdir(tmp_path)
    chosen = FeatureStore("features", access="stream", memory_bytes=1000)
    fresh = len(pickle.dumps(chosen))
    chosen.set(KEY)
    chosen.save_images(IMAGES, IMAGES.digests())
    chosen.images()
    assert len(pickle.dumps(chosen)) == fresh
    monkeypatch.chdir("/")
    copy = pickle.loads(pickle.dumps(chosen))
    assert (copy.root, copy.access, copy.memory_bytes) == (Path("features"), "stream", 1000)
    features = copy.features(IMAGES.select(range(40)), KEY)
    assert torch.equal(features[:], rows_of(range(40)))
    assert features.access.startswith("stream")


def test_options_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="memory_bytes is 0; expected at least 1"):
        FeatureStore(tmp_path, memory_bytes=0)
    with pytest.raises(ValueError, match="access is 'fast'; expected auto, memory, map, stream"):
        FeatureStore(tmp_path, access="fast")  # type: ignore[arg-type]


def test_features_read_on_after_their_files_were_merged_and_deleted(store: FeatureStore) -> None:
    for start in range(0, 20, 5):
        file(store, *range(start, start + 5))
    features = FeatureStore(store.root, access="stream").features(IMAGES.select(range(20)), KEY)
    unread = FeatureStore(store.root).features(IMAGES.select(range(20)), KEY)
    assert torch.equal(features[3:7], rows_of(range(3, 7)))
    store.compact()
    store.gc(older_than=0)
    assert torch.equal(features[:], rows_of(range(20)))
    assert torch.equal(pickle.loads(pickle.dumps(unread))[:], rows_of(range(20)))


# ---- superseded rows


def superseded(store: FeatureStore) -> dict[str, str | None]:
    found = store.superseded(store.set(KEY))
    assert store.num_superseded(store.set(KEY)) == len(found)
    return found


def save(store: FeatureStore, *names: int, name: str = "photos", ids: Sequence[str] = ()) -> None:
    """Files an image set."""
    images = replace(IMAGES.select(names), name=name)
    images = replace(images, ids=tuple(ids) or images.ids)
    store.save_images(images, IMAGES.select(names).digests())


def hex_of(name: int) -> str:
    return bytes(DIGESTS[name]).hex()


def test_rows_of_images_that_no_image_set_holds_any_more_are_counted_and_named(store: FeatureStore) -> None:
    file(store, *range(5))
    file(store, 4, 5)
    assert superseded(store) == {}
    save(store, *range(6))
    assert superseded(store) == {}
    save(store, *range(3))
    assert superseded(store) == {hex_of(name): str(name) for name in (3, 4, 5)}
    save(store, 9, *range(1, 6), ids=[str(name) for name in range(6)])  # the file of the first image has changed
    assert superseded(store) == {hex_of(0): "0"}


def test_a_row_of_an_image_in_any_of_several_image_sets_is_not_superseded(store: FeatureStore) -> None:
    file(store, *range(9))
    for name, held in {"a": range(3), "b": range(3, 6), "c": range(6, 9)}.items():
        save(store, *held, name=name)
    assert superseded(store) == {}
    save(store, 3, name="b")
    save(store, 7, 8, 4, name="c")
    assert superseded(store) == {hex_of(name): str(name) for name in (5, 6)}


def test_superseded_rows_are_named_as_the_last_table_named_their_images_and_in_that_order(store: FeatureStore) -> None:
    file(store, *range(5))
    save(store, 3, 1, 0, ids=["z", "older", "b"])
    save(store, 1, 3, 4, ids=["y", "a", "kept"])
    save(store, 4)
    assert list(superseded(store).items()) == [
        (hex_of(3), "a"),
        (hex_of(0), "b"),
        (hex_of(1), "y"),
        (hex_of(2), None),  # no table has ever held it
    ]
