"""Whatever is killed and whenever the power fails: what was filed is there and right, and a re-run does the rest.

What killed writers leave under temporary names is never read, and stays until a later `gc`. `scripts/crash.py` draws
thousands of cases where this draws some.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from crashing import (
    ROOT,
    SECTOR_BYTES,
    Disk,
    Forker,
    Operation,
    Rename,
    Sync,
    SyncFolder,
    UnbrokenRun,
    Write,
    accepted_rows,
    check_recovery,
    committed,
    extraction,
    kill_and_check,
    lose_power_and_check,
    lose_power_in_second_run_and_check,
    rows_in,
    temporary_names,
)

from featstore import FeatureStore
from featstore.part import write_part


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> UnbrokenRun:
    return UnbrokenRun.in_folder(tmp_path_factory.mktemp("unbroken"))


def halved(write: Write) -> Write:
    return dataclasses.replace(write, data=write.data[: len(write.data) // 2])


def kills(operations: Sequence[Operation]) -> Iterator[Sequence[Operation]]:
    """What was done before each possible kill: between any two operations, and in the middle of each write."""
    for place, operation in enumerate(operations):
        yield operations[:place]
        if isinstance(operation, Write):
            yield [*operations[:place], halved(operation)]
    yield operations


def test_a_kill_at_any_operation_loses_no_part_and_a_second_run_computes_only_the_rest(
    run: UnbrokenRun, tmp_path: Path
) -> None:
    for place, operations in enumerate(kills(run.operations)):
        folder = Disk(operations).after_kill(tmp_path / str(place))
        check_recovery(folder, committed(operations), run.rows, partial(run.again, folder))


def lose_power_often(run: UnbrokenRun, folder: Path, num_times: int) -> None:
    known: set[frozenset[Path]] = set()
    for seed in range(num_times):
        lose_power_and_check(run, folder / str(seed), random.Random(seed), known)


def test_a_power_loss_at_any_moment_loses_no_part_that_was_filed(run: UnbrokenRun, tmp_path: Path) -> None:
    lose_power_often(run, tmp_path, 300)


def test_nor_does_one_in_the_second_run_after_a_kill(run: UnbrokenRun, tmp_path: Path) -> None:
    for seed in range(15):
        lose_power_in_second_run_and_check(run, tmp_path / str(seed), random.Random(seed))


def renamed_before_the_sync(operations: Sequence[Operation]) -> list[Operation]:
    changed = list(operations)
    for place, operation in enumerate(changed):
        if isinstance(operation, Rename):
            changed[place - 1 : place + 1] = operation, Sync(operation.file)
    return changed


def without(operations: Sequence[Operation], kind: type[Operation]) -> list[Operation]:
    return [operation for operation in operations if not isinstance(operation, kind)]


@pytest.mark.parametrize("fault", ["renamed before the sync", "never synced", "folders never synced"])
def test_a_writer_that_syncs_too_late_or_not_at_all_is_found_out(run: UnbrokenRun, tmp_path: Path, fault: str) -> None:
    """The simulated disk is unkind enough to tell a safe order of operations from others."""
    operations = {
        "renamed before the sync": renamed_before_the_sync(run.operations),
        "never synced": without(run.operations, Sync),
        "folders never synced": without(run.operations, SyncFolder),
    }[fault]
    faulty = dataclasses.replace(run, operations=operations)
    with pytest.raises(AssertionError):
        lose_power_often(faulty, tmp_path, 300)


def test_where_a_disk_only_pretends_to_sync_each_row_is_right_or_refused(run: UnbrokenRun, tmp_path: Path) -> None:
    operations = without(run.operations, Sync)
    num_accepted = num_unopened = num_unverified = 0
    for seed in range(40):
        folder = Disk(operations).after_power_loss(tmp_path / str(seed), random.Random(seed))
        rows, unopened, unverified = accepted_rows(folder)
        assert all(torch.equal(row, run.rows[name]) for name, row in rows.items())
        num_accepted += len(rows)
        num_unopened += unopened
        num_unverified += unverified
    assert min(num_accepted, num_unopened, num_unverified) > 0  # each happened


def test_where_any_one_sector_was_never_written_each_row_is_right_or_refused(tmp_path: Path) -> None:
    """A part large enough that most sectors hold rows or digests alone, which HDF5's own checks don't cover."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(100, 64, generator=generator)
    digests = torch.randint(256, (100, 32), dtype=torch.uint8, generator=generator).numpy()
    decoders = np.ones(100, np.uint8)
    path = tmp_path / ROOT / "part-0.h5"
    path.parent.mkdir()
    write_part(path, features=features, digests=digests, decoders=decoders, facts={"key": "k"})
    written = {("k", bytes(digest)): row for digest, row in zip(digests, features, strict=True)}
    content = path.read_bytes()
    for start in range(0, len(content), SECTOR_BYTES):
        lost = content[start : start + SECTOR_BYTES]
        if any(lost):
            path.write_bytes(content[:start] + bytes(len(lost)) + content[start + len(lost) :])
            rows, num_unopened, num_unverified = accepted_rows(tmp_path)
            assert all(torch.equal(row, written[name]) for name, row in rows.items())
            assert num_unopened + num_unverified == 1


def test_what_a_killed_writer_leaves_is_no_part_and_stays(run: UnbrokenRun, tmp_path: Path) -> None:
    first_part = next(
        place
        for place, operation in enumerate(run.operations)
        if isinstance(operation, Rename) and operation.target.name.startswith("part-")
    )
    folder = Disk(run.operations[:first_part]).after_kill(tmp_path / "killed")  # it lacks nothing but its name
    (leftover,) = temporary_names(folder)
    store = FeatureStore(folder / ROOT)
    assert (store.sets(), store.damaged(), rows_in(folder)) == ([], [], {})
    run.again(folder)
    assert temporary_names(folder) == {leftover}
    assert leftover.name not in {part.path.name for found in store.sets() for part in found.parts}


def test_kill_9_at_random_instants_loses_no_part_and_a_second_run_computes_only_the_rest(tmp_path: Path) -> None:
    num_images = 60
    with Forker() as forker:
        assert forker.run(tmp_path, num_images) == 2 * num_images
        whole = rows_in(tmp_path)
        killed = [
            kill_and_check(forker, tmp_path / str(seed), num_images, whole, random.Random(seed)) for seed in range(6)
        ]
    assert any(killed)


def test_the_extraction_here_files_the_same_rows_whether_it_is_recorded_or_not(
    run: UnbrokenRun, tmp_path: Path
) -> None:
    extraction(tmp_path, run.num_images)
    rows = rows_in(tmp_path)
    assert rows.keys() == run.rows.keys()
    assert all(torch.equal(row, run.rows[name]) for name, row in rows.items())
