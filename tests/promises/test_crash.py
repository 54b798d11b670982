"""Whatever is killed and whenever the power fails: what was filed is there and right, and a re-run does the rest.

So for extractions, merges, compactions, collections, removals and repairs, one by one and all at once. What killed
writers leave under temporary names is never read, and stays until a later `gc`. `scripts/crash.py` draws thousands of
cases where this draws some.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from support import crashing
from support.crashing import (
    CROWD,
    IMAGES,
    ROOT,
    SCENARIOS,
    SECTOR_BYTES,
    Create,
    Disk,
    Done,
    Forker,
    Operation,
    Remove,
    Rename,
    Sync,
    SyncFolder,
    UnbrokenRun,
    accepted_rows,
    assert_same,
    collect,
    compact,
    crowd_and_check,
    extract_rest,
    extraction,
    file_part,
    kill_and_check,
    place,
    remove,
    rows_in,
    temporary_names,
    tree_of,
)
from support.operations import replace_operation

from featstore import FeatureRequest, FeatureStore, FeatureStoreError, MissingFeaturesError
from featstore.files import disk
from featstore.files.part import write_part
from featstore.store import catalogue

RunOf = Callable[[str], UnbrokenRun]


@pytest.fixture(scope="module")
def run_of(tmp_path_factory: pytest.TempPathFactory) -> RunOf:
    """Each scenario's unbroken run, done when it is first asked for."""
    runs: dict[str, UnbrokenRun] = {}

    def run(name: str) -> UnbrokenRun:
        if name not in runs:
            runs[name] = UnbrokenRun.in_folder(SCENARIOS[name], tmp_path_factory.mktemp("unbroken"))
        return runs[name]

    return run


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_kill_at_any_operation_loses_no_row_and_a_second_run_does_only_the_rest(
    run_of: RunOf, tmp_path: Path, name: str
) -> None:
    run_of(name).kill_everywhere(tmp_path / "killed")


def lose_power_often(run: UnbrokenRun, folder: Path, num_times: int = 300) -> None:
    for seed in range(num_times):
        run.lose_power(folder / str(seed), random.Random(seed))


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_power_loss_at_any_moment_loses_no_row_that_was_filed(run_of: RunOf, tmp_path: Path, name: str) -> None:
    lose_power_often(run_of(name), tmp_path)


@pytest.mark.parametrize("name", SCENARIOS)
def test_nor_does_one_in_the_second_run_after_a_kill(run_of: RunOf, tmp_path: Path, name: str) -> None:
    for seed in range(4):
        run_of(name).lose_power_in_second_run(tmp_path / str(seed), random.Random(seed))


def test_a_repair_makes_safe_what_one_that_was_killed_had_set_aside(run_of: RunOf, tmp_path: Path) -> None:
    run = run_of("repair")
    renamed = next(place for place, operation in enumerate(run.operations) if isinstance(operation, Rename))
    for seed in range(6):
        killed = run.operations[: renamed + 1]
        run.lose_power_in_second_run(tmp_path / str(seed), random.Random(seed), killed=killed)


@pytest.mark.parametrize("name", SCENARIOS)
def test_the_operations_recorded_are_all_that_was_done(tmp_path: Path, name: str) -> None:
    run = UnbrokenRun.in_folder(SCENARIOS[name], tmp_path)
    assert Disk(run.before, run.operations).after_kill() == tree_of(tmp_path)
    assert Disk(tree_of(tmp_path), []).after_power_loss(random.Random(0)) == tree_of(tmp_path)


# ---- faults that must be found out

Operations = Sequence[Operation]


def without(operations: Operations, kind: type[Operation], steps: Sequence[int] = (0, 1, 2, 3)) -> Operations:
    """`operations` without those of a kind that belong to some steps."""
    left, step = list[Operation](), 0
    for operation in operations:
        if isinstance(operation, Done):
            step = operation.step + 1
        if not (isinstance(operation, kind) and step in steps):
            left.append(operation)
    return left


def moved(operations: Operations, kind: type[Operation], *, before: type[Operation]) -> Operations:
    """`operations`, those of one kind each before the last one `before` it."""
    changed = list[Operation]()
    for operation in operations:
        places = [place for place, earlier in enumerate(changed) if isinstance(earlier, before)]
        changed.insert(places[-1] if isinstance(operation, kind) and places else len(changed), operation)
    return changed


def with_merged_parts_never_synced(operations: Operations) -> Operations:
    """The parts after which files are deleted."""

    def is_of_merged(place: int) -> bool:
        following = [type(each) for each in operations[place:] if isinstance(each, Create | Remove)]
        return following[:1] == [Remove]

    return [each for place, each in enumerate(operations) if not (isinstance(each, Sync) and is_of_merged(place))]


FAULTS: dict[tuple[str, str], Callable[[Operations], Operations]] = {
    ("extraction", "renamed before the sync"): partial(moved, kind=Rename, before=Sync),
    ("extraction", "never synced"): partial(without, kind=Sync),
    ("extraction", "folders never synced"): partial(without, kind=SyncFolder),
    ("extraction that merges", "deleted before the merged part is there"): partial(moved, kind=Remove, before=Rename),
    ("extraction that merges", "deleted before the folder is synced"): partial(moved, kind=Remove, before=SyncFolder),
    ("extraction that merges", "merged parts never synced"): with_merged_parts_never_synced,
    ("compactions", "merged parts never synced"): partial(without, kind=Sync, steps=[0, 2]),
    ("compactions", "folders never synced"): partial(without, kind=SyncFolder, steps=[2, 3]),
    ("collection", "folder left to whoever died"): partial(without, kind=SyncFolder, steps=[1]),
    ("removal", "folder set aside and not synced"): partial(without, kind=SyncFolder, steps=[0]),
    ("repair", "set aside and not synced"): partial(without, kind=SyncFolder, steps=[0]),
}


@pytest.mark.parametrize(("name", "fault"), FAULTS)
def test_a_wrong_order_of_operations_is_found_out(run_of: RunOf, tmp_path: Path, name: str, fault: str) -> None:
    """The simulated disk is unkind enough to tell a safe order of operations from others."""
    run = run_of(name)
    faulty = replace(run, operations=FAULTS[name, fault](run.operations))
    with pytest.raises(AssertionError):
        lose_power_often(faulty, tmp_path)


def test_a_removal_of_files_in_their_folder_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "move_aside", lambda folder: folder)
    (tmp_path / "unbroken").mkdir()
    faulty = UnbrokenRun.in_folder(SCENARIOS["removal"], tmp_path / "unbroken")
    with pytest.raises(AssertionError):
        faulty.kill_everywhere(tmp_path / "killed")


# ---- disks that lie


def test_where_a_disk_only_pretends_to_sync_each_row_is_right_or_refused(run_of: RunOf, tmp_path: Path) -> None:
    run = run_of("extraction")
    operations = without(run.operations, Sync)
    num_accepted = num_unopened = num_unverified = 0
    for seed in range(40):
        folder = place(Disk(run.before, operations).after_power_loss(random.Random(seed)), tmp_path / str(seed))
        rows, unopened, unverified = accepted_rows(folder)
        assert all(torch.equal(row, run.rows[name]) for name, row in rows.items())
        num_accepted += len(rows)
        num_unopened += len(unopened)
        num_unverified += len(unverified)
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
            rows, unopened, unverified = accepted_rows(tmp_path)
            assert all(torch.equal(row, written[name]) for name, row in rows.items())
            assert len(unopened | unverified) == 1


def test_what_a_killed_writer_leaves_is_no_part_and_stays(run_of: RunOf, tmp_path: Path) -> None:
    run = run_of("extraction")
    first_part = next(
        place
        for place, operation in enumerate(run.operations)
        if isinstance(operation, Rename) and operation.target.name.startswith("part-")
    )  # it lacks nothing but its name
    folder = place(Disk(run.before, run.operations[:first_part]).after_kill(), tmp_path / "killed")
    (leftover,) = temporary_names(folder)
    store = FeatureStore(folder / ROOT)
    assert (store.sets(), store.damaged(), rows_in(folder)) == ([], [], {})
    extract_rest(folder, 8)
    assert temporary_names(folder) == {leftover}
    assert leftover.name not in {part.path.name for found in store.sets() for part in found.parts}


# ---- another process at the worst moment


def act_once(monkeypatch: pytest.MonkeyPatch, module: ModuleType, name: str, act: Callable[[], object]) -> None:
    """Does `act` when a function of a module is first called, before it does anything."""
    real = getattr(module, name)

    def called(*arguments: Any) -> Any:
        monkeypatch.setattr(module, name, real)
        act()
        return real(*arguments)

    monkeypatch.setattr(module, name, called)


def act_before_first(monkeypatch: pytest.MonkeyPatch, name: str, act: Callable[[], object]) -> None:
    """Does `act` before the first operation of that name on the disk."""
    acts = iter([act])

    def acting(operation: Callable[..., Any], *arguments: Any) -> Any:
        for each in acts:
            each()
        return operation(*arguments)

    replace_operation(monkeypatch, name, acting)


def test_a_collection_that_takes_the_file_of_a_living_writer_stops_no_extraction(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    act_before_first(monkeypatch, "rename", lambda: collect(tmp_path))  # that of the image table comes first
    extract_rest(tmp_path, 4)
    assert len(rows_in(tmp_path)) == 2 * 4


def test_a_collection_goes_on_where_a_set_is_removed_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(2):
        file_part(tmp_path, [number])
    compact(tmp_path)
    act_before_first(monkeypatch, "sync_folder", lambda: remove(tmp_path, "layer2"))
    collect(tmp_path)
    assert rows_in(tmp_path) == {}


@pytest.mark.parametrize("look", ["sets", "find", "features"])
def test_a_set_that_is_removed_while_it_is_looked_up_is_one_that_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, look: str
) -> None:
    extract_rest(tmp_path, 4)
    store = FeatureStore(tmp_path / ROOT)
    (second,) = (found for found in store.sets() if found.facts["cut"] == "layer2")
    act_once(monkeypatch, catalogue, "_all_part_paths", lambda: remove(tmp_path, "layer2"))
    if look == "sets":
        assert second.key not in {found.key for found in store.sets()}
    elif look == "find":
        request = FeatureRequest(trunk=second.spec.trunk, pool=second.spec.pool, view=second.spec.rendered)
        assert store.find(request) == []
    else:
        with pytest.raises(FeatureStoreError, match="holds no feature set"):
            store.features(IMAGES.select(range(4)), second.key)


def test_who_reads_on_in_a_set_that_is_removed_learns_that_its_features_are_missing(tmp_path: Path) -> None:
    extract_rest(tmp_path, 4)
    store = FeatureStore(tmp_path / ROOT)
    (second,) = (found for found in store.sets() if found.facts["cut"] == "layer2")
    features = store.features(IMAGES.select(range(4)), second)
    remove(tmp_path, "layer2")
    with pytest.raises(MissingFeaturesError, match="removed"):
        features.tensor()


class CompactedAtOnce(FeatureStore):
    """A store in which others merge each part as soon as it is there, and delete it."""

    def write(self, *arguments: Any, **content: Any) -> Path:
        path = super().write(*arguments, **content)
        compact(self.root.parent)
        collect(self.root.parent)
        return path


def test_a_job_whose_parts_were_merged_by_others_has_nothing_to_merge_and_nothing_to_tell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(crashing, "FeatureStore", CompactedAtOnce)
    report = extraction(tmp_path, IMAGES.select(range(8)), merges=True)
    assert report.notes == ()
    assert len(rows_in(tmp_path)) == 2 * 8


# ---- real kills


@pytest.fixture(scope="module")
def forker() -> Iterator[Forker]:
    with Forker() as running:
        yield running


def test_kill_9_at_random_instants_loses_no_part_and_a_second_run_computes_only_the_rest(
    forker: Forker, tmp_path: Path
) -> None:
    num_images = 32
    forker.run("extract", tmp_path, num_images=num_images)
    whole = rows_in(tmp_path)
    killed = [kill_and_check(forker, tmp_path / str(seed), num_images, whole, random.Random(seed)) for seed in range(4)]
    assert len(whole) == 2 * num_images
    assert any(killed)


def test_readers_see_all_that_was_committed_while_others_write_compact_collect_remove_and_are_killed(
    forker: Forker, tmp_path: Path
) -> None:
    forker.run("extract reference", tmp_path / "reference")
    killed = crowd_and_check(forker, tmp_path / "crowd", tmp_path / "reference", 16, random.Random(0))
    assert killed.keys() == set(CROWD) - {"read"}


def test_the_extraction_here_files_the_same_rows_whether_it_is_recorded_or_not(run_of: RunOf, tmp_path: Path) -> None:
    extraction(tmp_path, IMAGES.select(range(8)))
    assert_same(rows_in(tmp_path), run_of("extraction").rows)
