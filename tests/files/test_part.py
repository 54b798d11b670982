import dataclasses
import errno
import multiprocessing
import os
import pickle
import tracemalloc
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.parts import (
    DTYPES,
    FACTS,
    SHAPES,
    bits,
    extent,
    flip_bit,
    random_bits,
    some_decoders,
    some_digests,
    write,
)
from support.processes import Processes
from torch import Tensor

from featstore.errors import DamagedFileError
from featstore.files.part import Part, write_part
from featstore.files.table import Table, write_table

# ---- what was written is what is read


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_value_comes_back_bit_for_bit(path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    features = random_bits(100, shape, dtype)
    write(path, features)
    part = Part.open(path)
    assert (part.num_rows, part.shape, part.dtype) == (100, shape, dtype)
    assert (part.features.shape, part.features.dtype) == (features.shape, dtype)
    assert bits(part.features) == bits(features)
    assert np.array_equal(part.digests, some_digests(100))
    assert np.array_equal(part.decoders, some_decoders(100))
    assert part.facts == FACTS
    assert part.path == path
    assert part.verify() == []


@pytest.mark.parametrize("dtype", DTYPES)
def test_zeros_keep_their_sign_and_subnormals_their_value(path: Path, dtype: torch.dtype) -> None:
    limits = torch.finfo(dtype)
    values = [0.0, -0.0, limits.smallest_normal / 2, -limits.smallest_normal / 4, limits.max, limits.min]
    write(path, torch.tensor(values, dtype=dtype))
    read = Part.open(path).features
    assert read.tolist() == values
    assert torch.signbit(read).tolist() == [False, True, False, True, False, True]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_part_may_have_no_rows(path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    write(path, torch.empty((0, *shape), dtype=dtype))
    part = Part.open(path)
    assert (part.num_rows, part.shape, part.dtype, part.facts) == (0, shape, dtype, FACTS)
    assert (part.features.shape, part.features.dtype) == ((0, *shape), dtype)
    assert part.digests.shape == (0, 32)
    assert part.verify() == []


def test_chunks_make_the_same_file_as_one_tensor(path: Path) -> None:
    features = random_bits(300, (5000,))
    write(path, features)
    assert Part.open(path).block_rows == 104  # so that chunks share blocks
    chunked = path.with_name("chunked.h5")
    write(chunked, list(torch.split(features, [1, 150, 0, 149])))
    assert chunked.read_bytes() == path.read_bytes()


@pytest.mark.parametrize("sizes", [[1000], [1, 1, 700, 0, 298], [104, 896], [520, 103, 1, 1, 375]])
def test_the_checksum_of_each_block_is_zlibs_however_the_rows_come(path: Path, sizes: list[int]) -> None:
    features = random_bits(1000, (5000,))
    write(path, list(torch.split(features, sizes)))
    part = Part.open(path)
    blocks = torch.split(features, part.block_rows)
    assert len(blocks) == 10  # more than one thread takes at once
    assert part.checksums.tolist() == [zlib.crc32(bits(block)) for block in blocks]


def test_chunks_that_are_drawn_one_by_one_make_the_same_file(path: Path) -> None:
    features = random_bits(300, (5000,))
    write(path, features)
    memory = torch.empty((100, 5000), dtype=features.dtype)  # one piece for all, as `read_blocks` has it
    drawn = (memory.copy_(chunk) for chunk in torch.split(features, 100))
    lazily = path.with_name("lazily.h5")
    whole = Part.open(path)
    write_part(lazily, features=drawn, digests=whole.digests, decoders=whole.decoders, facts=whole.facts)
    assert lazily.read_bytes() == path.read_bytes()


@pytest.mark.parametrize("sizes", [[], [2], [2, 2], [2, 1, 1]])
def test_chunks_that_are_not_the_rows_there_are_digests_of_leave_no_file(path: Path, sizes: list[int]) -> None:
    with pytest.raises(ValueError, match=r"no chunks of features|not the 3 rows that there are digests of"):
        write_part(
            path,
            features=(torch.zeros(size, 4) for size in sizes),
            digests=np.zeros((3, 32), np.uint8),
            decoders=np.zeros(3, np.uint8),
            facts={},
        )
    assert list(path.parent.iterdir()) == []


def test_a_chunk_of_another_shape_that_is_drawn_later_leaves_no_file(path: Path) -> None:
    with pytest.raises(ValueError, match="a chunk of features is"):
        write_part(
            path,
            features=iter([torch.zeros(1, 4), torch.zeros(2, 5)]),
            digests=np.zeros((3, 32), np.uint8),
            decoders=np.zeros(3, np.uint8),
            facts={},
        )
    assert list(path.parent.iterdir()) == []


def test_features_that_require_gradients_can_be_written(path: Path) -> None:
    write(path, torch.ones(2, 3, requires_grad=True))
    assert torch.equal(Part.open(path).features, torch.ones(2, 3))


def test_a_block_is_as_many_rows_as_fit_into_a_mebibyte(path: Path) -> None:
    for row_length, block_rows in [(1, 1 << 19), (5000, 104), (1 << 19, 1), ((1 << 19) + 1, 1)]:
        where = path.with_name(f"{row_length}.h5")
        features = random_bits(3, (row_length,))
        write(where, features)
        part = Part.open(where)
        assert part.block_rows == block_rows
        assert part.checksums.tolist() == [zlib.crc32(bits(block)) for block in torch.split(features, block_rows)]


def test_verify_names_the_rows_of_every_damaged_block(path: Path) -> None:
    write(path, random_bits(300, (5000,)))
    blocks = [range(104), range(104, 208), range(208, 300)]
    start = extent(path, "features").start
    for block in blocks:
        for byte in (start + block.start * 10_000, start + block.stop * 10_000 - 1):
            flip_bit(path, byte)
            assert Part.open(path).verify() == [block]
            flip_bit(path, byte)
    flip_bit(path, start)
    flip_bit(path, path.stat().st_size - 1)
    assert Part.open(path).verify() == [blocks[0], blocks[2]]


def test_a_missing_file_is_the_systems_error(path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Part.open(path)
    with pytest.raises(FileNotFoundError):
        Table.open(path)


USES: dict[str, Callable[[Part], Any]] = {
    "map": lambda part: part.features,
    "verify": lambda part: part.verify(),
    "read_blocks": lambda part: list(part.read_blocks([0])),
    "read_rows": lambda part: part.read_rows(np.array([1])),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_a_part_that_shrinks_or_goes_after_it_was_opened_is_an_error(path: Path, use: Callable[[Part], Any]) -> None:
    write(path, random_bits(100))
    part = Part.open(path)
    os.truncate(path, path.stat().st_size - 3)
    with pytest.raises(DamagedFileError, match="truncated, 3 bytes are missing"):
        use(part)
    path.unlink()
    with pytest.raises(FileNotFoundError):
        use(part)


# ---- plain reads


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (5000,), (30, 50, 7)])
@pytest.mark.parametrize("verify", [True, False])
def test_blocks_are_read_as_they_were_written(
    path: Path, shape: tuple[int, ...], dtype: torch.dtype, verify: bool
) -> None:
    features = random_bits(300, shape, dtype)
    write(path, features)
    part = Part.open(path)
    num_blocks = len(part.checksums)
    order = [*reversed(range(num_blocks)), 0, 0]
    seen = []
    for rows, block in part.read_blocks(order, verify=verify):
        assert (block.shape, block.dtype) == ((len(rows), *shape), dtype)
        assert bits(block) == bits(features[rows.start : rows.stop])
        seen.append(rows.start // part.block_rows)
    assert seen == order
    assert sum(len(rows) for rows, _ in part.read_blocks(range(num_blocks))) == 300


def test_a_part_without_rows_has_no_blocks(path: Path) -> None:
    write(path, torch.empty(0, 5))
    assert list(Part.open(path).read_blocks([])) == []
    assert Part.open(path).read_rows(np.array([], np.int64)).shape == (0, 5)


def test_reading_blocks_takes_the_memory_of_one(path: Path) -> None:
    write(path, random_bits(300, (5000,)))
    part = Part.open(path)
    assert len({block.data_ptr() for _, block in part.read_blocks(range(3))}) == 1


@pytest.mark.parametrize("block", [-1, 3])
def test_a_block_that_is_not_there_is_an_index_error(path: Path, block: int) -> None:
    write(path, random_bits(300, (5000,)))
    with pytest.raises(IndexError, match=rf"no block {block} in .*part-0\.h5; it has 3, from 0"):
        list(Part.open(path).read_blocks([0, block]))


def test_a_damaged_block_is_refused_with_its_rows_and_the_others_are_read(path: Path) -> None:
    features = random_bits(300, (5000,))
    write(path, features)
    part = Part.open(path)
    flip_bit(path, part.features_offset + 150 * 10_000)
    blocks = part.read_blocks([2, 1])
    assert bits(next(blocks)[1]) == bits(features[208:])
    with pytest.raises(DamagedFileError, match=r"part-0\.h5 is damaged: its rows 104 to 207 don't fit their checksum"):
        next(blocks)
    assert len(list(part.read_blocks(range(3), verify=False))) == 3


ROWS: dict[str, Sequence[int]] = {
    "none": [],
    "one": [299],
    "all": range(300),
    "backwards": range(299, -1, -1),
    "every second": range(0, 300, 2),
    "in two runs": [*range(200, 300), *range(100, 200)],
    "one often": [7] * 20,
    "random": np.random.default_rng(0).integers(0, 300, 500).tolist(),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_rows_are_read_in_any_order_with_repeats(
    path: Path, rows: Sequence[int], shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    features = random_bits(300, shape, dtype)
    write(path, features)
    part = Part.open(path)
    expected = features[list(rows)]
    read = part.read_rows(np.array(rows, np.int64))
    assert (read.shape, read.dtype) == (expected.shape, dtype)
    assert bits(read) == bits(expected)

    out = torch.empty_like(expected)
    assert part.read_rows(np.array(rows, np.int64), out) is out
    assert bits(out) == bits(expected)


def test_neighbours_are_read_at_once_and_repeats_once(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    features = random_bits(3000)
    write(path, features)
    part = Part.open(path)
    read: list[int] = []
    preadv = os.preadv

    def counted(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        read.append(preadv(fd, buffers, offset))
        return read[-1]

    monkeypatch.setattr(os, "preadv", counted)
    for rows, sizes in [
        (np.arange(3000), [30_000]),
        (np.arange(3000)[::-1], [10_240, 10_240, 9_520]),  # a call takes 1024 buffers
        (np.array([5, 2, 1, 5, 6, 2]), [20, 20]),
    ]:
        read.clear()
        assert bits(part.read_rows(rows)) == bits(features[torch.from_numpy(rows.copy())])
        assert read == sizes


@pytest.mark.parametrize("row", [-1, 10])
def test_a_row_that_is_not_there_is_an_index_error(path: Path, row: int) -> None:
    write(path, random_bits(10))
    with pytest.raises(IndexError, match=r"rows from .* of .*part-0\.h5; it has 10 rows, counted from 0"):
        Part.open(path).read_rows(np.array([3, row]))


@pytest.mark.parametrize(
    "out",
    [
        torch.empty(1, 5, dtype=torch.float16),
        torch.empty(2, 6, dtype=torch.float16),
        torch.empty(2, 5),
        torch.empty(5, 2, dtype=torch.float16).T,
        torch.empty(2, 5, dtype=torch.float16, device="meta"),
    ],
)
def test_rows_are_put_only_where_they_fit(path: Path, out: Tensor) -> None:
    write(path, random_bits(10))
    with pytest.raises(ValueError, match=r"pass one of torch.float16 \(2, 5\), contiguous on the CPU"):
        Part.open(path).read_rows(np.array([3, 4]), out)


def test_a_short_read_is_continued(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    features = random_bits(300, (5000,))
    write(path, features)
    preadv = os.preadv

    def short(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        """Fills a buffer and a half."""
        half = buffers[1:2] and [buffers[1][: len(buffers[1]) // 2]]
        return preadv(fd, [buffers[0][: len(buffers[0]) // 2 + 1]] if not half else [buffers[0], *half], offset)

    monkeypatch.setattr(os, "preadv", short)
    part = Part.open(path)
    assert part.verify() == []
    assert bits(part.read_rows(np.arange(300)[::-1])) == bits(features.flip(0))
    assert b"".join(bits(block) for _, block in part.read_blocks(range(3))) == bits(features)


READS = {name: use for name, use in USES.items() if name != "map"}


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_bytes_that_the_disk_cannot_read_are_named(
    path: Path, read: Callable[[Part], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    write(path, random_bits(300, (5000,)))
    part = Part.open(path)
    failure = errno.EIO

    def failing(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        raise OSError(failure, os.strerror(failure))

    monkeypatch.setattr(os, "preadv", failing)
    start = part.features_offset
    with pytest.raises(
        DamagedFileError, match=rf"part-0\.h5 .*its bytes ({start}|{start + 10_000}) to \d+ can't be read"
    ):
        read(part)
    failure = errno.ESTALE  # what NFS answers for an open file that someone has deleted
    with pytest.raises(FileNotFoundError, match=r"part-0\.h5"):
        read(part)
    failure = errno.ETIMEDOUT
    with pytest.raises(TimeoutError, match=r"its bytes .* can't be read .*part-0\.h5"):
        read(part)


def test_a_user_block_that_the_disk_cannot_read_is_named(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(path, random_bits(10))

    def failing(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "preadv", failing)
    with pytest.raises(DamagedFileError, match=r"part-0\.h5 is damaged: its bytes 0 to 4095 can't be read"):
        Part.open(path)


def test_verify_holds_little_memory_however_large_a_block_is(path: Path) -> None:
    features = random_bits(4000, (5000,))
    write(path, features)
    part = dataclasses.replace(
        Part.open(path), block_rows=4000, checksums=np.array([zlib.crc32(bits(features))], np.uint32)
    )
    tracemalloc.start()
    try:
        assert part.verify() == []
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


def test_plain_reads_map_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("this system does not list what is mapped")
    write(path, random_bits(100))
    part = Part.open(path)
    preadv = os.preadv

    def looked_at(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        assert path.name not in maps.read_text()
        return preadv(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", looked_at)
    for read in READS.values():
        read(part)
    part.features.sum()
    with pytest.raises(AssertionError):
        part.verify()


# ---- an open part


def test_an_open_part_holds_no_file_handle(path: Path) -> None:
    descriptors = Path("/proc/self/fd")
    if not descriptors.exists():
        pytest.skip("this system does not list open files")
    write(path, random_bits(100))
    before = os.listdir(descriptors)
    part = Part.open(path)
    assert os.listdir(descriptors) == before
    assert len(bits(part.features)) == 1000
    assert part.verify() == []
    part.read_rows(np.arange(3))
    assert len(list(part.read_blocks([0]))) == 1
    assert os.listdir(descriptors) == before
    blocks = part.read_blocks([0, 0])
    next(blocks)
    del blocks  # half-way
    assert os.listdir(descriptors) == before


def test_writing_into_the_mapped_features_never_reaches_the_file(path: Path) -> None:
    features = random_bits(100)
    write(path, features)
    content = path.read_bytes()
    part = Part.open(path)
    part.features.zero_()
    assert part.verify() == []
    assert path.read_bytes() == content
    assert bits(Part.open(path).features) == bits(features)


def test_a_mapped_part_stays_readable_when_its_name_goes(path: Path) -> None:
    features = random_bits(100)
    write(path, features)
    mapped = Part.open(path).features
    path.unlink()
    assert bits(mapped) == bits(features)


def test_a_pickled_part_leaves_its_features_in_the_file(path: Path) -> None:
    features = random_bits(10, (50_000,))
    write(path, features)
    part = Part.open(path)
    assert bits(part.features) == bits(features)
    pickled = pickle.dumps(part)
    assert len(pickled) < 5000
    copy = pickle.loads(pickled)
    assert bits(copy.features) == bits(features)
    assert (copy.facts, copy.verify()) == (FACTS, [])


def crc_of_features(part: Part) -> int:
    return zlib.crc32(bits(part.features))


# Python 3.12 and later warn about every fork beside threads; that this one works is the claim.
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_part_works_in_a_forked_worker_and_in_a_new_process(path: Path, processes: Processes) -> None:
    features = random_bits(100)
    write(path, features)
    unmapped, mapped = Part.open(path), Part.open(path)
    assert crc_of_features(mapped) == zlib.crc32(bits(features))
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.map(crc_of_features, [unmapped, mapped]) == [zlib.crc32(bits(features))] * 2
    for part in (unmapped, mapped):
        assert processes.call(crc_of_features, part) == zlib.crc32(bits(features))


# ---- what a caller may pass


@pytest.mark.parametrize(
    ("features", "error", "words"),
    [
        (torch.zeros(3, 5, dtype=torch.float64), TypeError, "torch.float64 can't be stored"),
        (torch.zeros(5, 3).T, ValueError, "not contiguous"),
        (torch.zeros(3, 5, device="meta"), ValueError, "on meta"),
        (torch.tensor(1.0), ValueError, r"shape \(\) are not rows"),
        (torch.zeros(3, 0), ValueError, r"shape \(3, 0\) are not rows"),
        ([], ValueError, "no chunks"),
        ([torch.zeros(1, 5), torch.zeros(2, 4)], ValueError, "one dtype and shape"),
        ([torch.zeros(1, 5), torch.zeros(2, 5).half()], ValueError, "one dtype and shape"),
        ([torch.zeros(3), torch.tensor(1.0)], ValueError, "one dtype and shape"),
        (torch.zeros(4, 5), ValueError, r"digests are uint8 \(3, 32\).*\(4, 32\)"),
    ],
)
def test_features_that_make_no_part_are_refused(
    path: Path, features: Tensor | list[Tensor], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        write_part(path, features=features, digests=some_digests(3), decoders=some_decoders(3), facts={})
    assert os.listdir(path.parent) == []


def test_row_facts_of_another_kind_are_refused(path: Path) -> None:
    features, digests = torch.zeros(3, 5), some_digests(3)
    with pytest.raises(ValueError, match=r"decoders are uint8 \(2,\)"):
        write_part(path, features=features, digests=digests, decoders=some_decoders(2), facts={})
    with pytest.raises(ValueError, match="digests are int8"):
        write_part(path, features=features, digests=digests.view(np.int8), decoders=some_decoders(3), facts={})


def test_facts_that_are_not_json_are_refused(path: Path) -> None:
    with pytest.raises(TypeError, match="nan"):
        write_table(path, columns={}, facts={"mean": float("nan")})
    assert os.listdir(path.parent) == []
