"""Ways of reading: whichever is chosen gives the same rows, within its memory, from files that move or are damaged.

Long, since each claim is made of every way of reading, in one parametrisation.
"""

from __future__ import annotations

import errno
import mmap
import os
import pickle
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from support.parts import flip_bit
from support.processes import Processes
from support.scaled import unscaled
from support.tiny import SPEC, arrays, digests_of
from torch.utils.data import DataLoader

from featstore import DamagedFileError, Features, MissingFeaturesError, machine
from featstore.files.index import RowIndex
from featstore.files.part import Part, write_part
from featstore.files.scaled import ScaledRows
from featstore.store import features as features_module
from featstore.store.access import ACCESSES, Access

SHAPE = (64, 64, 4)
NUM_ROWS = 100
BLOCK_ROWS = 16
WAYS = ["memory", "map", "stream", "stream, limited"]
WAYS += ["memory, read plainly", "map, read plainly", "stream, read plainly"]


def rows_of(names: list[int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    values = torch.arange(64 * 64 * 4).reshape(SHAPE) % 251
    return (torch.tensor(names).reshape(-1, 1, 1, 1) + values).to(dtype)


def write(folder: Path, names: list[int], place: int = 0, dtype: torch.dtype = torch.float32) -> Path:
    path = folder / f"part-{place}.h5"
    decoders = np.zeros(len(names), np.uint8)
    write_part(path, features=rows_of(names, dtype), digests=digests_of(*names), decoders=decoders, facts={})
    return path


def index_of(folder: Path) -> RowIndex:
    return RowIndex([Part.open(path) for path in sorted(folder.glob("part-*.h5"))])


def joined(folder: Path, access: Any = "auto", count: int = NUM_ROWS, **options: Any) -> Features:
    """Of the images called 0 to `count` - 1."""
    index = index_of(folder)
    return Features(arrays(count), SPEC, index, *index.find(digests_of(*range(count))), access=access, **options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of three parts, whose rows are in another order than the images."""
    folder = tmp_path_factory.mktemp("parts")
    names = np.random.default_rng(0).permutation(NUM_ROWS).tolist()
    for place, (start, end) in enumerate([(0, 50), (50, 53), (53, NUM_ROWS)]):
        write(folder, names[start:end], place)
    return folder


@pytest.fixture
def stored(folder: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Features:
    return read_by(request.param, folder, monkeypatch)


def read_by(way: str, folder: Path, monkeypatch: pytest.MonkeyPatch, *, several: int = 3 << 20) -> Features:
    """Features that are read in one of the `WAYS`, with windows of `several` bytes."""
    way, _, how = way.partition(", ")
    if how == "limited":
        return joined(folder, way, memory_bytes=4 * several)
    if how == "read plainly":
        monkeypatch.setattr(features_module, "is_local", lambda path: False)
    monkeypatch.setattr(features_module, "_WINDOW_BYTES", several)
    monkeypatch.setattr(features_module, "_KEPT_BYTES", several)
    monkeypatch.setattr(features_module, "_TASK_BYTES", several // 4)
    return joined(folder, way)


ways = pytest.mark.parametrize("stored", WAYS, indirect=True)


def names_in(values: torch.Tensor) -> list[int]:
    names: list[int] = values[:, 0, 0, 0].int().tolist()
    assert torch.equal(values, rows_of(names, values.dtype))
    return names


# ---- the same rows


def test_ways_are_those_that_are_documented() -> None:
    assert ("auto", *get_args(Access)) == ACCESSES


@ways
@pytest.mark.parametrize("rows", [[5, 99, 5, 0], list(range(NUM_ROWS)), [7], []])
def test_each_way_gives_rows_in_any_order_with_repeats(stored: Features, rows: list[int]) -> None:
    assert names_in(stored[rows]) == rows


@ways
@pytest.mark.parametrize("batch_size", [1, 7, 33, 100, 300])
@pytest.mark.parametrize("shuffle", [False, True])
def test_each_way_gives_each_row_once(stored: Features, batch_size: int, shuffle: bool) -> None:
    seen: list[int] = []
    sizes = []
    for values, rows in stored.batches(batch_size, shuffle=shuffle, seed=3):
        assert names_in(values) == rows.tolist()
        sizes.append(len(rows))
        seen += rows.tolist()
    assert sorted(seen) == list(range(NUM_ROWS))
    assert (seen == sorted(seen)) == (not shuffle)
    assert set(sizes[:-1]) <= {batch_size}
    whole = [len(rows) for _, rows in stored.batches(batch_size, shuffle=shuffle, drop_last=True)]
    assert whole == [batch_size] * (NUM_ROWS // batch_size)


@ways
def test_each_way_repeats_an_order_for_a_seed(stored: Features) -> None:
    def order(seed: int) -> list[int]:
        return [row for _, rows in stored.batches(9, shuffle=True, seed=seed) for row in rows.tolist()]

    assert order(4) == order(4) != order(5)


@ways
def test_each_way_gives_everything_at_once(stored: Features) -> None:
    for _ in range(2):  # the second time perhaps from memory
        assert names_in(stored.tensor()) == list(range(NUM_ROWS))
        assert np.array_equal(stored.numpy(), rows_of(list(range(NUM_ROWS))).numpy())
        assert len(list(stored.batches(50))) == 2


@ways
def test_rows_and_batches_are_the_callers_own(stored: Features) -> None:
    list(stored.batches(50))
    stored[:][...] = -1
    stored.tensor()[...] = -1
    for values, _ in stored.batches(50, shuffle=True):
        values[...] = -1
    assert names_in(stored[[3, 4]]) == [3, 4]
    assert names_in(stored.tensor()) == list(range(NUM_ROWS))


@ways
def test_each_way_pickles(stored: Features) -> None:
    list(stored.batches(50))
    pickled = pickle.dumps(stored)
    assert len(pickled) < 1_000_000  # the rows are 6.5 MB
    assert names_in(pickle.loads(pickled)[[8, 1]]) == [8, 1]


@ways
def test_an_epoch_may_be_left_in_the_middle(stored: Features) -> None:
    batches = stored.batches(5, shuffle=True)
    assert len(next(batches)[1]) == 5
    batches.close()  # type: ignore[attr-defined]
    assert names_in(stored[[1]]) == [1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("way", get_args(Access))
def test_narrow_types_stay_as_they_are(tmp_path: Path, dtype: torch.dtype, way: Access) -> None:
    write(tmp_path, list(range(40)), dtype=dtype)
    stored = joined(tmp_path, way, 40)
    expected = rows_of(list(range(40)), dtype)
    batches = list(stored.batches(16))
    assert {values.dtype for values, _ in batches} == {dtype}
    assert torch.equal(torch.cat([values for values, _ in batches]), expected)
    assert torch.equal(stored.tensor(dtype=torch.float32), expected.float())


# ---- scaled rows


def scaled_rows_of(names: list[int]) -> ScaledRows:
    """Of each name other numbers, and a scale of its own."""
    numbers = (torch.arange(64 * 64 * 4).reshape(SHAPE) * 7 + torch.tensor(names).reshape(-1, 1, 1, 1)) % 255 - 127
    return ScaledRows(numbers.to(torch.int8), 1 / (torch.tensor(names, dtype=torch.float32) + 3))


def in_numpy(names: list[int]) -> NDArray[np.float32]:
    rows = scaled_rows_of(names)
    return unscaled(rows.numbers.numpy(), rows.scales.numpy())


def write_scaled(folder: Path, names: list[int], place: int = 0) -> Path:
    path = folder / f"part-{place}.h5"
    decoders = np.zeros(len(names), np.uint8)
    write_part(path, features=scaled_rows_of(names), digests=digests_of(*names), decoders=decoders, facts={})
    return path


@pytest.fixture(scope="module")
def scaled_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scaled")
    names = np.random.default_rng(0).permutation(NUM_ROWS).tolist()
    for place, (start, end) in enumerate([(0, 50), (50, 53), (53, NUM_ROWS)]):
        write_scaled(folder, names[start:end], place)
    return folder


@pytest.mark.parametrize("way", WAYS)
def test_each_way_gives_scaled_rows_as_numpy_multiplies_them(
    scaled_folder: Path, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = read_by(way, scaled_folder, monkeypatch, several=3 << 18)
    expected = in_numpy(list(range(NUM_ROWS)))
    assert (stored.dtype, stored.storage_type.name, stored.num_bytes) == (torch.float32, "int8", expected.size)
    for given in (stored, pickle.loads(pickle.dumps(stored))):
        for rows in ([5, 99, 5, 0], list(range(NUM_ROWS))[::-1], [7], []):
            assert np.array_equal(given[rows].numpy(), expected[rows])
        for shuffle in (False, True):
            batches = list(given.batches(7, shuffle=shuffle))
            assert {values.dtype for values, _ in batches} == {torch.float32}
            assert all(np.array_equal(values.numpy(), expected[rows]) for values, rows in batches)
            assert sorted(np.concatenate([rows for _, rows in batches]).tolist()) == list(range(NUM_ROWS))
        assert np.array_equal(given.tensor().numpy(), expected)
        assert np.array_equal(given.numpy(), expected)
        kept = given.stored(slice(3, 90))
        assert isinstance(kept, ScaledRows)
        assert torch.equal(kept.numbers, scaled_rows_of(list(range(3, 90))).numbers)
    assert (stored._memory is not None) == way.startswith("memory")
    assert stored._memory is None or stored._memory.values.dtype == torch.int8  # the memory is that of the numbers


@pytest.mark.parametrize("way", WAYS)
def test_scales_are_those_of_the_file_that_the_numbers_came_from(
    tmp_path: Path, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of an image with rows in two parts another one may count once the first is gone."""
    write_scaled(tmp_path, list(range(NUM_ROWS)))
    first = read_by(way, tmp_path, monkeypatch, several=3 << 18)
    stored = joined(tmp_path, first._access, memory_bytes=first._memory_bytes, lookup=partial(index_of, tmp_path))
    assert np.array_equal(stored[[3]].numpy(), in_numpy([3]))
    other = scaled_rows_of(list(range(NUM_ROWS)))[list(range(NUM_ROWS))[::-1]]
    (tmp_path / "part-0.h5").unlink()
    decoders = np.zeros(NUM_ROWS, np.uint8)
    digests = digests_of(*range(NUM_ROWS))
    write_part(tmp_path / "part-1.h5", features=other, digests=digests, decoders=decoders, facts={})
    stored = pickle.loads(pickle.dumps(stored))
    expected = in_numpy(list(range(NUM_ROWS))[::-1])
    for values, rows in stored.batches(9, shuffle=True):
        assert np.array_equal(values.numpy(), expected[rows])
    assert np.array_equal(stored.tensor().numpy(), expected)


# ---- which way


def test_the_way_is_chosen_by_size_and_said(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = NUM_ROWS * 65536
    for free, way in [(2 * size, "memory"), (2 * size - 2, "map"), (size, "map"), (size - 1, "stream")]:
        monkeypatch.setattr(features_module, "available_bytes", lambda free=free: free)
        assert joined(folder).access.startswith(f"{way}: 6.55 MB")
    monkeypatch.setattr(features_module, "is_local", lambda path: False)
    assert joined(folder).access.startswith("stream: 6.55 MB, read plainly from ")


@pytest.mark.parametrize(
    ("limit", "way"), [(NUM_ROWS * 65536, "memory"), (NUM_ROWS * 65536 - 1, "stream"), (1, "stream")]
)
def test_a_limit_of_memory_decides_alone(folder: Path, limit: int, way: str) -> None:
    stored = joined(folder, memory_bytes=limit)
    assert stored.access.partition(":")[0] == way
    assert sum(len(rows) for _, rows in stored.batches(9, shuffle=True)) == NUM_ROWS


def test_single_rows_load_nothing_and_a_tenth_of_all_loads_everything(folder: Path) -> None:
    stored = joined(folder, "memory")
    for row in range(NUM_ROWS // 10 - 1):
        assert names_in(stored[[row]]) == [row]
        assert stored._memory is None
    assert names_in(stored[[50]]) == [50]
    assert stored._memory is not None


# ---- shuffling by blocks


@pytest.mark.parametrize("limit", [None, 8 << 20])
def test_a_stream_says_how_well_it_is_shuffled_and_is(
    folder: Path, limit: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features_module, "_WINDOW_BYTES", 2 << 20)  # two blocks; a quarter of the limit
    stored = joined(folder, "stream", memory_bytes=limit)
    assert stored.shuffling == (
        "by blocks: stretches of 16 rows in random order, and rows mix uniformly within windows of 2 stretches, about "
        "32 of 100 rows"
    )
    windows = list(stored._by_block.windows(np.random.default_rng(5), num_rows=stored._window_rows))
    assert max(map(len, windows)) <= stored._by_block.largest_window(num_rows=stored._window_rows)
    order = np.concatenate([rows for _, rows in stored.batches(10, shuffle=True, seed=5)])
    assert order.tolist() == np.concatenate(windows).tolist()
    places = stored._places
    for window in windows:
        blocks = set(zip(places.part_of[window].tolist(), (places.row_in[window] // BLOCK_ROWS).tolist(), strict=True))
        assert len(blocks) <= 4  # two, or more where parts end
        whole = [(places.part_of == part) & (places.row_in // BLOCK_ROWS == block) for part, block in blocks]
        assert sorted(window) == np.flatnonzero(np.logical_or.reduce(whole)).tolist()  # no block in two windows


def test_other_ways_shuffle_uniformly(folder: Path) -> None:
    stored = joined(folder, "memory")
    assert stored.shuffling.startswith("uniform")
    assert order_of(stored) == np.random.default_rng(5).permutation(NUM_ROWS).tolist()


def order_of(stored: Features, batch_size: int = 10) -> list[int]:
    order: list[int] = np.concatenate([rows for _, rows in stored.batches(batch_size, shuffle=True, seed=5)]).tolist()
    return order


def test_an_order_depends_on_the_seed_alone_but_in_a_stream(folder: Path, tmp_path: Path) -> None:
    write(tmp_path, list(range(NUM_ROWS)))  # the same rows, compacted
    whole = [joined(place, way) for place in (folder, tmp_path) for way in ("memory", "map")]
    assert len({tuple(order_of(stored, size)) for stored in whole for size in (7, 10)}) == 1
    streams = [joined(place, "stream", memory_bytes=limit << 20) for place in (folder, tmp_path) for limit in (8, 16)]
    assert [order_of(stored, 7) for stored in streams] == [order_of(stored) for stored in streams]
    assert len({tuple(order_of(stored)) for stored in streams}) == 4


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the system doesn't tell a process's memory")
def test_a_stream_through_three_times_as_many_rows_takes_no_more_memory(tmp_path: Path, processes: Processes) -> None:
    """In a process whose memory is looked at after each batch: its own and its share of mapped files."""
    for place in range(3):
        write(tmp_path, list(range(place * 1000, place * 1000 + 1000)), place)
    program = f"""
        import resource
        from pathlib import Path
        from test_access import joined
        from featstore.store import features

        def resident():
            return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

        def most(count):
            stored = joined(Path({str(tmp_path)!r}), "stream", count, memory_bytes=limit)
            return max(resident() for _ in stored.batches(8, shuffle=shuffle))

        features._WINDOW_BYTES = features._KEPT_BYTES = 4 << 20
        for limit in (16 << 20, None):  # read plainly, and mapped
            for shuffle in (True, False):
                print(most(1000), most(3000))
    """
    said = processes.answer(program)
    grown = [many - few for few, many in (map(int, line.split()) for line in said.splitlines())]
    assert len(grown) == 4
    assert max(grown) < 64 << 20, said  # of 131 MB that are read more


# ---- damage, and files that go


def flip(path: Path, row: int) -> None:
    flip_bit(path, Part.open(path).features_offset + row * 65536 + 17)


READS: dict[str, Callable[[Features], Any]] = {
    "an epoch": lambda stored: list(stored.batches(10)),
    "a shuffled epoch": lambda stored: list(stored.batches(10, shuffle=True)),
    "everything as a tensor": lambda stored: stored.tensor(),
    "everything as an array": lambda stored: stored.numpy(),
    "some rows": lambda stored: stored[[1, 47]],
    "one row": lambda stored: stored[33],
    "one item": lambda stored: stored.dataset()[33],
}


@pytest.mark.parametrize("plainly", [False, True])
@pytest.mark.parametrize("way", get_args(Access))
@pytest.mark.parametrize("read", READS.values(), ids=READS.keys())
def test_no_row_of_a_damaged_block_is_given(
    tmp_path: Path, read: Callable[[Features], Any], way: Access, plainly: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if plainly:
        monkeypatch.setattr(features_module, "is_local", lambda path: False)
    flip(write(tmp_path, list(range(NUM_ROWS))), 40)
    stored = joined(tmp_path, way)
    for _ in range(2):
        with pytest.raises(DamagedFileError, match=r"part-0\.h5 is damaged: its rows 32 to 47 "):
            read(stored)
    assert names_in(joined(tmp_path, way)[[31, 48]]) == [31, 48]


@pytest.mark.parametrize("way", ["map", "stream"])
def test_a_block_is_checked_once(folder: Path, way: Access, monkeypatch: pytest.MonkeyPatch) -> None:
    read_block_bytes = Part.read_block_bytes
    checked: list[tuple[Path, int]] = []

    def counted(part: Part, blocks: Any, **options: Any) -> Any:
        checked.extend((part.path, block) for block in blocks)
        return read_block_bytes(part, blocks, **options)

    monkeypatch.setattr(Part, "read_block_bytes", counted)
    stored = joined(folder, way)
    for _ in range(3):
        list(stored.batches(100, shuffle=True))
        stored[[4, 5]]
    assert len(set(checked)) == sum(len(part.checksums) for part in stored.parts)
    assert len(checked) < 2 * len(set(checked))  # of three epochs; threads may meet at a block


def test_only_blocks_with_wanted_rows_are_read(tmp_path: Path) -> None:
    flip(write(tmp_path, list(range(NUM_ROWS))), 99)
    assert names_in(joined(tmp_path, "memory", count=96).tensor()) == list(range(96))


@ways
def test_files_that_were_merged_meanwhile_are_looked_up_again(
    stored: Features, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for place in range(3):
        write(tmp_path, list(range(place, NUM_ROWS, 3)), place)
    moving = joined(tmp_path, stored._access, memory_bytes=stored._memory_bytes, lookup=partial(index_of, tmp_path))
    batches = moving.batches(10, shuffle=True)
    next(batches)
    fresh = pickle.loads(pickle.dumps(moving))
    merged = np.random.default_rng(1).permutation(NUM_ROWS).tolist()
    write(tmp_path, merged, 7)
    for place in range(3):
        (tmp_path / f"part-{place}.h5").unlink()
    assert sum(len(rows) for values, rows in batches if names_in(values) == rows.tolist()) == NUM_ROWS - 10
    assert names_in(fresh[[70, 3]]) == [70, 3]
    assert names_in(pickle.loads(pickle.dumps(moving)).tensor()) == list(range(NUM_ROWS))


class Moving:
    """Rows of `names` whose file has another name each time somebody looks, for the first `times` times."""

    def __init__(self, folder: Path, *, times: int) -> None:
        self.folder, self.left, self.path = folder, times, write(folder, list(range(NUM_ROWS)))

    def move(self) -> None:
        self.path = self.path.rename(self.folder / f"part-{self.left}-moved.h5")

    def look_up(self) -> RowIndex:
        found = index_of(self.folder)
        if self.left:
            self.left -= 1
            self.move()
        return found


@ways
def test_files_that_go_again_while_they_are_looked_up_are_looked_up_again(stored: Features, tmp_path: Path) -> None:
    moving = Moving(tmp_path, times=4)
    found = joined(tmp_path, stored._access, memory_bytes=stored._memory_bytes, lookup=moving.look_up)
    moving.move()
    assert names_in(found[[70, 3]]) == [70, 3]
    assert moving.left == 0


def test_files_that_go_for_ever_are_the_systems_error_in_the_end(tmp_path: Path) -> None:
    moving = Moving(tmp_path, times=1000)
    found = joined(tmp_path, lookup=moving.look_up)
    moving.move()
    with pytest.raises(FileNotFoundError, match=r"part-\d+-moved\.h5"):
        found.tensor()


def fails(number: int, path: Path) -> Callable[[Part], Any]:
    """Instead of `Part._open_features`, so that the file at `path` can't be opened."""
    open_features = Part._open_features

    def opened(part: Part) -> Any:
        if part.path == path:
            raise OSError(number, os.strerror(number), os.fspath(path))
        return open_features(part)

    return opened


@ways
def test_a_file_that_a_server_has_replaced_is_looked_up_again(
    stored: Features, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = write(tmp_path, list(range(NUM_ROWS)))
    found = joined(tmp_path, stored._access, memory_bytes=stored._memory_bytes, lookup=partial(index_of, tmp_path))
    old.rename(tmp_path / "part-new.h5")
    monkeypatch.setattr(Part, "_open_features", fails(errno.ESTALE, old))
    assert names_in(found[[70, 3]]) == [70, 3]
    assert names_in(found.tensor()) == list(range(NUM_ROWS))


def test_another_failure_is_the_systems_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, list(range(NUM_ROWS)))
    found = joined(tmp_path, lookup=partial(pytest.fail, "looked up again"))
    monkeypatch.setattr(Part, "_open_features", fails(errno.EACCES, path))
    with pytest.raises(PermissionError):
        found.tensor()


def test_rows_that_were_removed_are_missing_and_the_file_is_named(tmp_path: Path) -> None:
    write(tmp_path, list(range(60)), 0)
    write(tmp_path, list(range(60, NUM_ROWS)), 1)
    stored = joined(tmp_path, lookup=partial(index_of, tmp_path))
    (tmp_path / "part-1.h5").unlink()
    with pytest.raises(MissingFeaturesError, match=r"part-1\.h5 is gone, and with it the rows of 40 of the 100 images"):
        stored.tensor()
    with pytest.raises(FileNotFoundError):  # whoever gave no way to look it up gets the system's error
        joined(tmp_path, count=60)._retried(lambda: Part.open(tmp_path / "part-1.h5"))


# ---- for torch's loaders


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_of_torch_gives_rows_with_their_targets(folder: Path, workers: int) -> None:
    stored = joined(folder)
    loader = DataLoader(stored.dataset(), batch_size=30, num_workers=workers)
    batches = list(loader)
    assert names_in(torch.cat([values for values, _ in batches])) == list(range(NUM_ROWS))
    assert torch.cat([targets for _, targets in batches]).tolist() == [row % 2 for row in range(NUM_ROWS)]


def test_images_without_labels_have_rows_alone(tmp_path: Path) -> None:
    write(tmp_path, [0, 1, 2])
    index = index_of(tmp_path)
    unlabelled = arrays(3).select([0, 1, 2])
    object.__setattr__(unlabelled, "targets", None)
    stored = Features(unlabelled, SPEC, index, *index.find(digests_of(0, 1, 2)))
    assert names_in(torch.stack(list(stored.dataset()))) == [0, 1, 2]  # type: ignore[call-overload]


# ---- what others do meanwhile, and where files lie


def test_a_part_that_is_merged_while_it_is_being_mapped_is_looked_up_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, list(range(NUM_ROWS)))
    stored = joined(tmp_path, "map", lookup=partial(index_of, tmp_path))
    map_file = torch.from_file

    def merged(*arguments: Any, **options: Any) -> torch.Tensor:
        (tmp_path / "part-0.h5").unlink(missing_ok=True)
        return map_file(*arguments, **options)

    monkeypatch.setattr(torch, "from_file", merged)
    assert names_in(stored[[70, 3]]) == [70, 3]  # out of the file that has lost its name


def test_files_below_a_name_that_is_no_text_are_mapped(tmp_path: Path) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    try:
        folder.mkdir()
    except OSError:
        pytest.skip("the file system takes no such names")
    write(folder, list(range(NUM_ROWS)))
    assert names_in(joined(folder, "map")[[7]]) == [7]


def test_a_stream_may_be_read_by_several_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features_module, "_KEPT_BYTES", 1)  # lets go of its mappings after each piece
    for place in range(4):
        write(tmp_path, list(range(place, NUM_ROWS, 4)), place)
    stored = joined(tmp_path, "stream")
    with ThreadPoolExecutor(6) as pool:
        results = list(pool.map(lambda row: names_in(stored[[row, 99 - row]]), [row % 100 for row in range(1500)]))
    assert results == [[row % 100, 99 - row % 100] for row in range(1500)]


def _access_in_worker(dataset: Any) -> list[str]:
    return [
        access
        for accesses in DataLoader(dataset, num_workers=1, collate_fn=list, multiprocessing_context="fork")
        for access in accesses
    ]


class Accesses(torch.utils.data.Dataset[str]):
    def __init__(self, stored: Features) -> None:
        self.stored = stored

    def __len__(self) -> int:
        return 1

    def __getitem__(self, row: int) -> str:
        self.stored[[row]]
        return self.stored.access


def test_workers_of_a_loader_share_what_is_mapped_and_load_nothing(folder: Path) -> None:
    stored = joined(folder)
    assert _access_in_worker(Accesses(stored)) == ["map: 6.55 MB, mapped"]
    assert stored.access == "memory: 6.55 MB, read once"
    assert _access_in_worker(Accesses(stored)) == ["map: 6.55 MB, mapped"]  # however it was chosen to be read here
    stored[list(range(len(stored)))]
    assert _access_in_worker(Accesses(stored)) == ["memory: 6.55 MB, read once"]  # and shared with forked workers


@pytest.mark.parametrize("kind", [np.int8, np.uint8, np.int32])
def test_batch_sizes_may_be_of_any_whole_type(folder: Path, kind: Any) -> None:
    sizes = [len(values) for values, _ in joined(folder, access="map").batches(kind(100))]
    assert sizes == [100] * (len(joined(folder)) // 100) + [len(joined(folder)) % 100] * (len(joined(folder)) % 100 > 0)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.uint64])
def test_row_numbers_may_be_of_any_whole_type(tmp_path: Path, dtype: Any) -> None:
    write(tmp_path, list(range(300)))
    assert names_in(joined(tmp_path, count=300)[np.array([1, 120], dtype)]) == [1, 120]


# ---- nothing is mapped, and nothing held open


class MappedError(AssertionError):
    """Something was mapped."""


def forbid_mapping(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*arguments: Any, **options: Any) -> Any:
        raise MappedError(arguments)

    for owner, name in ((torch, "from_file"), (np, "memmap"), (mmap, "mmap")):
        monkeypatch.setattr(owner, name, forbidden)


@pytest.mark.parametrize("read", READS.values(), ids=READS.keys())
@pytest.mark.parametrize("way", ACCESSES)
def test_files_on_a_network_file_system_are_never_mapped(
    folder: Path, read: Callable[[Features], Any], way: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    forbid_mapping(monkeypatch)
    if way == "map":
        with pytest.raises(MappedError):
            list(joined(folder, way).batches(10))
    monkeypatch.setattr(features_module, "is_local", lambda path: False)
    stored = joined(folder, way)
    for _ in range(2):
        read(stored)
    if way == "map":
        assert stored.access.startswith("map: 6.55 MB, read plainly from ")
        assert stored.shuffling.startswith("uniform")


@pytest.mark.parametrize("way", ["auto", "memory", "stream"])
@pytest.mark.parametrize("limit", [6 << 20, 12 << 20])
def test_nothing_is_mapped_where_memory_is_limited(
    folder: Path, way: Any, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    forbid_mapping(monkeypatch)
    for read in READS.values():
        read(joined(folder, way, memory_bytes=limit))
    with pytest.raises(MappedError):
        list(joined(folder, "map", memory_bytes=limit).batches(10))


def file_system_by_folder(path: Path) -> str:
    return "nfs4" if "away" in Path(os.path.realpath(path)).parts else "ext4"


@pytest.mark.parametrize("way", ["map", "stream"])
def test_a_link_to_a_file_elsewhere_is_not_mapped(tmp_path: Path, way: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (machine, features_module):
        monkeypatch.setattr(module, "file_system", file_system_by_folder)
    (tmp_path / "away").mkdir()
    write(tmp_path, list(range(60)), 0)
    assert ", mapped" in joined(tmp_path, way, 60).access
    (tmp_path / "part-1.h5").symlink_to(write(tmp_path / "away", list(range(60, NUM_ROWS)), 1))
    stored = joined(tmp_path, way)
    assert "read plainly from ext4, nfs4" in stored.access
    forbid_mapping(monkeypatch)
    for read in READS.values():
        read(stored)


@pytest.mark.parametrize("way", ["memory", "map", "stream"])
def test_files_that_are_looked_up_again_are_asked_for_again(
    tmp_path: Path, way: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (machine, features_module):
        monkeypatch.setattr(module, "file_system", file_system_by_folder)
    write(tmp_path, list(range(NUM_ROWS)), 0)
    stored = joined(tmp_path, way, lookup=partial(index_of, tmp_path / "away"))
    stored[[1]]
    forbid_mapping(monkeypatch)
    (tmp_path / "away").mkdir()
    (tmp_path / "part-0.h5").rename(tmp_path / "away" / "part-1.h5")
    fresh = pickle.loads(pickle.dumps(stored))
    assert names_in(fresh[[70, 3]]) == [70, 3]
    if way != "memory":
        assert "read plainly from nfs4" in fresh.access


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="the system doesn't list what is open")
@ways
def test_no_file_is_held_open_after_reading_or_between_batches(stored: Features) -> None:
    for read in READS.values():
        read(stored)
        assert are_all_closed()
    for shuffle in (False, True):
        for _ in stored.batches(10, shuffle=shuffle):
            assert are_all_closed()


def are_all_closed() -> bool:
    """Waits for that, as threads are reading ahead, as far as they may."""
    deadline = time.monotonic() + 20
    while open_parts():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.001)
    return True


def open_parts() -> list[str]:
    found = []
    for link in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):
            found.append(os.readlink(link))
    return [name for name in found if name.endswith(".h5")]


# ---- processes


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
def test_a_child_reads_that_was_forked_while_a_thread_loaded_rows(folder: Path, processes: Processes) -> None:
    """In a process of its own, whose child is killed if it waits for what nobody will give it."""
    program = f"""
        import os, signal, threading
        from pathlib import Path
        import torch
        from test_access import joined, names_in
        from featstore.store import features

        torch.set_num_threads(1)
        load, is_loading, may_go_on = features.load, threading.Event(), threading.Event()

        def loading(*arguments):
            is_loading.set()
            may_go_on.wait()
            return load(*arguments)

        features.load = loading
        stored = joined(Path({str(folder)!r}), "memory")
        thread = threading.Thread(target=lambda: stored[:])
        thread.start()
        is_loading.wait()
        child = os.fork()
        if child == 0:
            signal.alarm(20)
            features.load = load
            os._exit(names_in(stored[[70, 3]]) != [70, 3])
        status = os.waitpid(child, 0)[1]
        may_go_on.set()
        thread.join()
        print(status, stored.access.startswith("memory"), names_in(stored[[5]]))
    """
    assert processes.answer(program) == "0 True [5]"
