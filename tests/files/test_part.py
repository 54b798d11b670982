import dataclasses
import errno
import json
import multiprocessing
import os
import pickle
import re
import resource
import shutil
import struct
import subprocess
import tracemalloc
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from support import released
from support.processes import Processes
from torch import Tensor

from featstore import FeatureStore
from featstore.errors import DamagedFileError, NewerFormatError
from featstore.files import part as part_module
from featstore.files.part import FORMAT_VERSION, Part, Table, write_part, write_table

DTYPES = (torch.float16, torch.float32, torch.bfloat16)
SHAPES = ((), (5,), (3, 2, 2))
FACTS: dict[str, Any] = {"spec": {"mean": [0.485, 0.1], "cut": "layer4"}, "failed": [], "who": "Zoë", "seed": None}
FORMAT_PAGE = Path(__file__).parents[2] / "docs" / "format.md"


def random_bits(num_rows: int, shape: tuple[int, ...] = (5,), dtype: torch.dtype = torch.float16) -> Tensor:
    """Features with every kind of value: subnormals, both zeros, infinities, NaNs."""
    num_bytes = num_rows * int(np.prod(shape)) * dtype.itemsize
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (num_bytes,), dtype=torch.uint8, generator=generator).view(dtype).view(num_rows, *shape)


def some_digests(num_rows: int) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (num_rows, 32), np.uint8)


def some_decoders(num_rows: int) -> NDArray[np.uint8]:
    return np.arange(num_rows).astype(np.uint8)


def write(path: Path, features: Tensor | list[Tensor]) -> None:
    num_rows = len(features) if isinstance(features, Tensor) else sum(map(len, features))
    write_part(path, features=features, digests=some_digests(num_rows), decoders=some_decoders(num_rows), facts=FACTS)


def bits(features: Tensor) -> bytes:
    return features.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def extent(path: Path, name: str) -> range:
    with h5py.File(path) as file:
        start = file[name].id.get_offset()
        return range(start, start + file[name].id.get_storage_size())


def flip_bit(path: Path, byte: int) -> None:
    """Change one bit of the file; a second call changes it back."""
    with path.open("r+b") as file:
        file.seek(byte)
        old = file.read(1)[0]
        file.seek(byte)
        file.write(bytes([old ^ 1 << byte % 8]))


def reseal(path: Path, start: int, data: bytes) -> None:
    """Put `data` into the user block and correct its two checksums as docs/format.md defines them."""
    content = bytearray(path.read_bytes())
    content[start : start + len(data)] = data
    offset, num_bytes = struct.unpack_from("<QQ", content, 56)
    content[72:80] = bytes(8)
    content[76:80] = struct.pack("<I", zlib.crc32(content[:4096]))
    content[72:76] = struct.pack("<I", zlib.crc32(content[:offset] + content[offset + num_bytes :]))
    path.write_bytes(content)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "part-0.h5"


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


def test_a_table_comes_back(path: Path) -> None:
    columns: dict[str, NDArray[Any]] = {
        "ids": np.frombuffer("cat/1.jpg cat/é.jpg".encode(), np.uint8),
        "offsets": np.array([0, 9, 20], ">i8"),
        "every_other": np.arange(10, dtype=np.float32)[::2],
        "scalar": np.array(3, np.int16),
        "empty": np.empty((0, 4)),
        "targets": np.eye(3, dtype=np.float16)[None],
    }
    write_table(path, columns=columns, facts=FACTS)
    table = Table.open(path)
    assert table.columns.keys() == columns.keys()
    for name, column in columns.items():
        assert table.columns[name].dtype == column.dtype.newbyteorder("<")
        assert np.array_equal(table.columns[name], column)
        assert table.columns[name].shape == column.shape
    assert (table.facts, table.path) == (FACTS, path)


# ---- the format, seen by others


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_h5py_reads_the_same_values(path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    features = torch.randn(20, *shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    write(path, features)
    with h5py.File(path) as file:
        assert set(file) == {"features", "digest", "decoder", "crc", "facts"}
        assert np.array_equal(file["features"][()], features.float().numpy())
        assert file["features"].chunks is None
        assert np.array_equal(file["digest"][()], some_digests(20))
        assert json.loads(file["facts"].asstr()[()]) == FACTS
        assert file["crc"].attrs["block_rows"] == Part.open(path).block_rows  # opened twice at once, too


def test_the_user_block_says_what_the_format_page_says(path: Path) -> None:
    features = random_bits(700, (1000,))
    write(path, features)
    content = path.read_bytes()
    magic, version, kind, length, offset, num_bytes, crc = struct.unpack_from("<32sI12sQQQI", content)
    assert magic == b"featstore; HDF5 from byte 4096.\n"
    assert (version, kind.rstrip(b"\0"), length) == (2, b"part", len(content))
    assert range(offset, offset + num_bytes) == extent(path, "features")
    assert content[offset : offset + num_bytes] == bits(features)
    assert crc == zlib.crc32(content[:72] + bytes(4) + content[76:offset] + content[offset + num_bytes :])

    own_crc, structure_crc, num_regions = struct.unpack_from("<III", content, 76)
    assert own_crc == zlib.crc32(content[:72] + bytes(8) + content[80:4096])
    assert content[88:128] == bytes(40)
    structure, end = b"", 4096
    for number in range(num_regions):
        name, start, region_bytes, crc = struct.unpack_from("<40sQQI4x", content, 128 + 64 * number)
        assert range(start, start + region_bytes) == extent(path, name.rstrip(b"\0").decode())
        assert crc == zlib.crc32(content[start : start + region_bytes])
        structure, end = structure + content[end:start], start + region_bytes
    assert num_regions == 4
    assert structure_crc == zlib.crc32(structure + content[end:offset])
    assert content[128 + 64 * num_regions : 4096] == bytes(4096 - 128 - 64 * num_regions)


def test_features_begin_on_a_page_and_end_the_file(path: Path) -> None:
    for num_rows in (1, 3, 100, 5000):
        where = path.with_name(f"{num_rows}.h5")
        write(where, random_bits(num_rows))
        assert extent(where, "features").start % 4096 == 0
        assert extent(where, "features").stop == where.stat().st_size


def test_a_block_is_as_many_rows_as_fit_into_a_mebibyte(path: Path) -> None:
    for row_length, block_rows in [(1, 1 << 19), (5000, 104), (1 << 19, 1), ((1 << 19) + 1, 1)]:
        where = path.with_name(f"{row_length}.h5")
        features = random_bits(3, (row_length,))
        write(where, features)
        part = Part.open(where)
        assert part.block_rows == block_rows
        assert part.checksums.tolist() == [zlib.crc32(bits(block)) for block in torch.split(features, block_rows)]


def test_numpy_reads_a_part_as_the_format_page_shows(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(path.parent)
    (example,) = re.findall(r"```python\n(.*?)```", FORMAT_PAGE.read_text(), re.DOTALL)
    features = random_bits(3, (512,))
    write(Path("part.h5"), features)
    scope: dict[str, Any] = {}
    exec(example, scope)
    assert scope["rows"].tobytes() == bits(features)

    features = torch.randn(3, 512).bfloat16()
    Path("part.h5").unlink()
    write(Path("part.h5"), features)
    exec(example.replace('"<f2"', '"<u2"'), scope)
    assert np.array_equal((scope["rows"].astype("<u4") << 16).view("<f4"), features.float().numpy())


@pytest.mark.skipif(shutil.which("h5dump") is None, reason="h5dump is not installed")
@pytest.mark.parametrize("dtype", DTYPES)
def test_h5dump_prints_the_values(path: Path, dtype: torch.dtype) -> None:
    values = [[1.5, -0.25, 1024.0], [3.0, -2.0, 0.0]]
    write(path, torch.tensor(values, dtype=dtype))
    dump = subprocess.run(
        ["h5dump", "-d", "/features", "-d", "/facts", path], capture_output=True, text=True, check=True
    )
    printed = re.findall(r"\(\d,0\): ([-\d., ]+)", dump.stdout)
    assert [[float(value) for value in row.rstrip(", ").split(",")] for row in printed] == values
    assert '"cut":"layer4"' in dump.stdout

    command = ["h5dump", "-d", "/features", "-s", "0,0", "-c", "1,2"]
    corner = subprocess.run([*command, path], capture_output=True, text=True, check=True)
    assert "(0,0): 1.5, -0.25\n" in corner.stdout


def test_features_may_lie_in_the_middle_of_a_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing relies on how HDF5 happens to lay a file out."""

    def add_features_and_more(hdf5: h5py.File, rows: Any) -> h5py.Dataset:
        features = add_features(hdf5, rows)
        hdf5["behind"] = np.arange(10_000)  # too much for any gap before the features
        return features

    add_features = part_module._add_features
    monkeypatch.setattr(part_module, "_add_features", add_features_and_more)
    features = random_bits(2000)
    write(path, features)
    assert extent(path, "behind").start >= extent(path, "features").stop
    assert bits(Part.open(path).features) == bits(features)
    assert Part.open(path).verify() == []
    flip_bit(path, extent(path, "behind").start)
    with pytest.raises(DamagedFileError, match="checksum"):
        Part.open(path)


# ---- damage is found


def test_a_truncated_part_is_refused_wherever_it_ends(path: Path) -> None:
    write(path, random_bits(100, (50,)))
    content = path.read_bytes()
    ends = [extent(path, name) for name in ("digest", "decoder", "crc", "facts", "features")]
    sizes = (
        {0, 1, 31, 32, 35, 76, 4095, 4096, 4100, len(content) - 1} | {e.start for e in ends} | {e.stop for e in ends}
    )
    for size in sizes - {len(content)}:
        path.write_bytes(content[:size])
        missing = (4096 if size < 4096 else len(content)) - size
        with pytest.raises(DamagedFileError, match=rf"part-0\.h5 .* truncated, {missing} bytes are missing"):
            Part.open(path)


def test_a_part_that_has_grown_is_refused(path: Path) -> None:
    write(path, random_bits(10))
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(DamagedFileError, match="user block contradicts"):
        Part.open(path)


def test_a_flipped_bit_anywhere_outside_the_features_is_found_at_open(path: Path) -> None:
    write(path, random_bits(100, (50,)))
    regions = [extent(path, name) for name in ("digest", "decoder", "crc", "facts")]
    edges = {region.start for region in regions} | {region.stop - 1 for region in regions}
    user_block = set(range(80)) | {4095}
    for byte in sorted(edges | user_block | set(range(4096, extent(path, "features").start, 29))):
        flip_bit(path, byte)
        with pytest.raises(DamagedFileError, match=r"part-0\.h5"):
            Part.open(path)
        flip_bit(path, byte)
    Part.open(path)


def test_a_flipped_bit_anywhere_in_a_table_is_found_at_open(path: Path) -> None:
    write_table(path, columns={"offsets": np.arange(9)}, facts=FACTS)
    for byte in sorted(set(range(80)) | set(range(4095, path.stat().st_size, 3))):
        flip_bit(path, byte)
        with pytest.raises(DamagedFileError, match=r"part-0\.h5"):
            Table.open(path)
        flip_bit(path, byte)
    Table.open(path)


@pytest.mark.parametrize("version", [1, 2])
def test_the_facts_of_a_released_table_are_read_alone(version: int) -> None:
    (path,) = (released.DATA / f"version-{version}" / "images").iterdir()
    assert Table.read_facts(path) == Table.open(path).facts


def test_a_flipped_bit_in_the_header_or_the_facts_of_a_table_is_found_when_these_are_read(path: Path) -> None:
    write_table(path, columns={"offsets": np.arange(9)}, facts=FACTS)
    facts = extent(path, "facts")
    for byte in (*range(72), *range(76, 80), *range(facts.start, facts.stop, 3)):  # but for the checksum of all
        flip_bit(path, byte)
        with pytest.raises(DamagedFileError, match=r"part-0\.h5"):
            Table.read_facts(path)
        flip_bit(path, byte)
    assert Table.read_facts(path) == FACTS
    for length in (facts.stop - 1, facts.start, 5000, 4096, 4000, 20):
        os.truncate(path, length)
        with pytest.raises(DamagedFileError, match=r"part-0\.h5"):
            Table.read_facts(path)


def test_a_part_is_no_table(path: Path) -> None:
    write(path, random_bits(3, (5,)))
    for read in (Table.open, Table.read_facts):
        with pytest.raises(DamagedFileError, match="is of the kind 'part', where 'images' was expected"):
            read(path)


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


@pytest.mark.parametrize("edit", [lambda block: block + b"unknown", lambda block: block], ids=["other", "alike"])
def test_a_newer_version_is_refused_with_the_remedy_whatever_else_it_holds(
    path: Path, edit: Callable[[bytes], bytes]
) -> None:
    write(path, random_bits(10))
    reseal(path, 32, edit(struct.pack("<I", 3)))
    with pytest.raises(NewerFormatError) as error:
        Part.open(path)
    assert str(error.value) == (
        f"{path} has format version 3; this featstore reads versions up to 2. Upgrade featstore to read it."
    )


def test_a_file_of_another_program_is_refused(path: Path) -> None:
    path.write_text("id,label\n1,cat\n" * 1000)
    with pytest.raises(DamagedFileError, match=r"not a file of featstore's.*b'id,label"):
        Part.open(path)
    with h5py.File(path, "w") as file:
        file["features"] = np.zeros((10, 5))
    with pytest.raises(DamagedFileError, match="not a file of featstore's"):
        Part.open(path)


def test_parts_and_tables_are_not_taken_for_each_other(path: Path) -> None:
    write(path, random_bits(10))
    with pytest.raises(DamagedFileError, match=r"kind 'part', where 'images' was expected"):
        Table.open(path)
    table = path.with_name("table.h5")
    write_table(table, columns={}, facts={})
    with pytest.raises(DamagedFileError, match=r"kind 'images', where 'part' was expected"):
        Part.open(table)


def replace_dataset(file: h5py.File, name: str, data: Any) -> None:
    del file[name]
    file[name] = data


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda file: file.__delitem__("decoder"), "decoder"),
        (lambda file: replace_dataset(file, "digest", np.zeros((9, 31), np.uint8)), r"/digest is uint8 \(9, 31\)"),
        (lambda file: replace_dataset(file, "digest", np.zeros((9, 32), np.int8)), r"/digest is int8 \(9, 32\)"),
        (lambda file: replace_dataset(file, "decoder", np.zeros(8, np.uint8)), r"/decoder is uint8 \(8,\)"),
        (lambda file: replace_dataset(file, "crc", np.zeros(2, np.uint32)), "block_rows"),
        (lambda file: file["crc"].attrs.__setitem__("block_rows", 4), r"/crc is uint32 \(1,\), not uint32 \(3,\)"),
        (lambda file: file["crc"].attrs.__setitem__("block_rows", 0), "block_rows 0"),
        (lambda file: replace_dataset(file, "facts", "[1]"), "not a JSON object"),
        (lambda file: replace_dataset(file, "facts", "{"), "HDF5 structure"),
        (lambda file: (file.__delitem__("decoder"), file.create_group("decoder")), "/decoder is not a dataset"),
        (lambda file: replace_dataset(file, "features", np.zeros((9, 5))), r"/features is float64 \(9, 5\)"),
        (lambda file: replace_dataset(file, "features", np.ones((9, 5), np.float16)), "elsewhere than the user block"),
        (
            lambda file: (
                file.__delitem__("features"),
                file.create_dataset("features", data=np.ones((9, 5), np.float16), chunks=True),
            ),
            "/features is not contiguous",
        ),
    ],
)
def test_another_structure_under_a_right_checksum_is_refused(
    path: Path, edit: Callable[[h5py.File], Any], words: str
) -> None:
    write(path, random_bits(9))
    with h5py.File(path, "r+") as file:
        edit(file)
    reseal(path, 48, struct.pack("<Q", path.stat().st_size))
    with pytest.raises(DamagedFileError, match=words):
        Part.open(path)


def test_features_that_begin_beside_a_page_are_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(part_module, "_FEATURES_ALIGNMENT", 1)
    write(path, random_bits(9))
    monkeypatch.undo()
    with pytest.raises(DamagedFileError, match="no multiple of 4096"):
        Part.open(path)


def test_a_features_extent_other_than_the_structures_is_refused(path: Path) -> None:
    write(path, random_bits(5000))
    offset = extent(path, "features").start
    reseal(path, 56, struct.pack("<Q", offset - 4096))
    with pytest.raises(DamagedFileError, match="elsewhere than the user block says"):
        Part.open(path)


def test_features_without_rows_have_no_place(path: Path) -> None:
    write(path, random_bits(0))
    reseal(path, 56, struct.pack("<Q", 4096))
    with pytest.raises(DamagedFileError, match="elsewhere than the user block says"):
        Part.open(path)


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


# ---- every version that was ever released


@pytest.mark.parametrize("version", range(1, FORMAT_VERSION + 1))
def test_every_value_of_every_released_version_is_read(version: int) -> None:
    part, empty = Part.open(released.part_of(version)), Part.open(released.empty_part_of(version))
    assert struct.unpack_from("<I", part.path.read_bytes(), 32) == (version,)
    assert (part.num_rows, part.shape, part.dtype) == (released.NUM_ROWS, (3, 8, 8), torch.bfloat16)
    assert torch.equal(part.features, released.FEATURES)
    assert np.array_equal(part.digests, released.DIGESTS)
    assert np.array_equal(part.decoders, released.DECODERS)
    assert part.facts == released.PART_FACTS
    assert part.verify() == []
    assert (empty.num_rows, empty.shape, empty.facts) == (0, (3, 8, 8), released.PART_FACTS)

    table = Table.open(released.table_of(version))
    assert table.facts == released.TABLE_FACTS
    assert table.columns.keys() == released.COLUMNS.keys()
    for name, column in released.COLUMNS.items():
        assert table.columns[name].dtype == column.dtype
        assert np.array_equal(table.columns[name], column)


@pytest.mark.parametrize("version", range(1, FORMAT_VERSION + 1))
def test_a_store_of_every_released_version_is_read(version: int) -> None:
    store = FeatureStore(released.store_of(version))
    images = store.images("photos")
    assert list(images.ids) == released.IDS
    assert torch.equal(store.features(images, released.PART_FACTS["key"])[:], released.FEATURES)


def test_damage_in_a_file_of_version_1_is_found_as_far_as_it_can_be_named(path: Path) -> None:
    shutil.copy(released.part_of(1), path)
    features = extent(path, "features")
    for byte in {*range(36, 84), *range(84, features.start, 37), *extent(path, "digest"), *extent(path, "crc")}:
        flip_bit(path, byte)
        with pytest.raises(DamagedFileError, match=re.escape(str(path))) as error:
            Part.open(path)
        assert byte < 72 or "bytes are altered outside its features" in str(error.value)
        flip_bit(path, byte)
    flip_bit(path, features.stop - 1)
    assert Part.open(path).verify() == [range(released.NUM_ROWS)]

    shutil.copy(released.table_of(1), path)
    for byte in range(76, path.stat().st_size, 37):
        flip_bit(path, byte)
        with pytest.raises(DamagedFileError, match="bytes are altered outside its features"):
            Table.open(path)
        flip_bit(path, byte)


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


# ---- whole or not at all

DISK_OPERATIONS = ("_create", "_allocate", "_write_at", "_sync", "_rename", "_sync_folder")


@pytest.fixture
def disk_log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The operations on the disk, in order; a write with its offset and bytes."""
    log: list[str] = []

    def logged(name: str, operation: Callable[..., Any]) -> Callable[..., Any]:
        def operate(*args: Any) -> Any:
            log.append(f"{name[1:]} {args[2]}+{len(args[1])}" if name == "_write_at" else name[1:])
            return operation(*args)

        return operate

    for name in DISK_OPERATIONS:
        monkeypatch.setattr(part_module, name, logged(name, getattr(part_module, name)))
    return log


@contextmanager
def largest_file(num_bytes: int) -> Iterator[None]:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_the_user_block_is_written_last_and_the_name_given_after_the_sync(path: Path, disk_log: list[str]) -> None:
    write(path, list(torch.split(random_bits(150, (5000,)), 104)))
    offset = extent(path, "features").start
    assert disk_log == [
        "create",
        "allocate",
        f"write_at {offset}+1040000",
        f"write_at {offset + 1_040_000}+460000",
        f"write_at 4096+{offset - 4096}",
        "write_at 0+4096",
        "sync",
        "rename",
        "sync_folder",
    ]


@pytest.mark.parametrize("has_space_reservation", [True, False])
@pytest.mark.parametrize("limit", [1, 5_000, 50_000, 2_000_000])
def test_a_full_disk_is_the_systems_error_and_leaves_nothing(
    path: Path, limit: int, has_space_reservation: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    earlier = path.with_name("earlier.h5")
    write(earlier, random_bits(10))
    if not has_space_reservation:
        monkeypatch.setattr(part_module, "_allocate", lambda fd, length: None)
    with largest_file(limit), pytest.raises(OSError, match="File too large") as error:
        write(path, random_bits(300, (5000,)))
    assert error.value.errno == errno.EFBIG
    assert os.listdir(path.parent) == ["earlier.h5"]
    assert Part.open(earlier).verify() == []


def test_space_is_found_missing_before_anything_is_written(path: Path, disk_log: list[str]) -> None:
    with largest_file(2_000_000), pytest.raises(OSError, match="File too large"):
        write(path, random_bits(300, (5000,)))
    assert disk_log == ["create", "allocate"]


@pytest.mark.parametrize("failure", [OSError(errno.EIO, "Input/output error"), KeyboardInterrupt()])
@pytest.mark.parametrize("step", range(8))
def test_a_failure_at_any_step_before_the_rename_is_told_and_leaves_nothing(
    path: Path, step: int, failure: BaseException, disk_log: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing_at_step(operation: Callable[..., Any]) -> Callable[..., Any]:
        def operate(*args: Any) -> Any:
            if len(disk_log) == step:
                raise failure
            return operation(*args)

        return operate

    for name in DISK_OPERATIONS:
        monkeypatch.setattr(part_module, name, failing_at_step(getattr(part_module, name)))
    with pytest.raises(type(failure)) as error:
        write(path, list(torch.split(random_bits(150, (5000,)), 104)))
    assert error.value is failure
    assert os.listdir(path.parent) == []


def test_a_file_system_that_reserves_no_space_gets_the_same_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(fd: int, offset: int, length: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    for num_rows in (0, 100):
        write(path.with_name(f"with-{num_rows}.h5"), random_bits(num_rows))
    monkeypatch.setattr(os, "posix_fallocate", unsupported)
    for num_rows in (0, 100):
        without = path.with_name(f"without-{num_rows}.h5")
        write(without, random_bits(num_rows))
        assert without.read_bytes() == path.with_name(f"with-{num_rows}.h5").read_bytes()


def test_a_short_write_is_continued(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    features = random_bits(300, (5000,))
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: pwrite(fd, data[: len(data) // 2 + 1], offset))
    write(path, features)
    assert bits(Part.open(path).features) == bits(features)
    assert Part.open(path).verify() == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_the_systems_error(path: Path) -> None:
    path.parent.chmod(0o500)
    with pytest.raises(PermissionError):
        write(path, random_bits(10))
    path.parent.chmod(0o700)
    assert os.listdir(path.parent) == []


def test_a_name_that_is_taken_is_refused_and_its_file_left_alone(path: Path) -> None:
    path.write_text("precious")
    with pytest.raises(FileExistsError, match="never replaced, choose another name"):
        write(path, random_bits(10))
    with pytest.raises(FileExistsError):
        write_table(path, columns={}, facts={})
    assert path.read_text() == "precious"
    assert os.listdir(path.parent) == [path.name]


def test_others_may_read_a_part_as_the_umask_says(path: Path) -> None:
    umask = os.umask(0o027)
    try:
        write(path, random_bits(10))
    finally:
        os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o640


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


def test_a_table_has_as_many_columns_as_its_user_block_has_room_for(path: Path) -> None:
    names = ["column_" + "a" * place for place in range(1, 34)] + ["b" * place for place in range(1, 30)]
    columns = {name: np.arange(3) for name in names}
    with pytest.raises(ValueError, match="62 columns; its user block has room for 61"):
        write_table(path, columns=columns, facts={})
    del columns["b"]
    write_table(path, columns=columns, facts={})
    assert Table.open(path).columns.keys() == columns.keys()


def test_a_part_has_as_many_more_columns_as_its_user_block_has_room_for(path: Path) -> None:
    columns = {"a" * place: np.array([b"cat", b"dog"]) for place in range(1, 41)}
    columns |= {"b" * place: np.arange(2) for place in range(1, 20)}
    own: dict[str, Any] = {
        "features": torch.zeros(2, 5),
        "digests": some_digests(2),
        "decoders": some_decoders(2),
        "facts": {},
    }
    with pytest.raises(ValueError, match="59 columns beside a part's own; its user block has room for 58"):
        write_part(path, **own, columns=columns)
    del columns["b"]
    write_part(path, **own, columns=columns)
    assert Part.open(path).num_rows == 2
    flip_bit(path, extent(path, "aaa").start)
    with pytest.raises(DamagedFileError, match="bytes are altered in its column aaa "):
        Part.open(path)


@pytest.mark.parametrize("count", [0, 3, 4, 5, 12, 40])
def test_the_features_lie_last_however_many_columns_there_are(path: Path, count: int) -> None:
    columns = {"a" * place: np.arange(200) for place in range(1, count + 1)}
    tracemalloc.start()
    try:
        write_part(
            path,
            features=torch.zeros(200, 30_000),
            digests=some_digests(200),
            decoders=some_decoders(200),
            facts={},
            columns=columns,
        )
        held = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert extent(path, "features").stop == path.stat().st_size
    assert held < 4 << 20, "bytes, of 24 MB of features"


def test_columns_of_texts_are_utf8_to_other_tools(path: Path) -> None:
    texts = np.array(["cat/é8.jpg".encode(), b"dog"])
    own: dict[str, Any] = {"features": torch.zeros(2, 5), "digests": some_digests(2), "decoders": some_decoders(2)}
    write_part(path, **own, facts={}, columns={"id": texts})
    with h5py.File(path) as hdf5:
        assert hdf5["id"].id.get_type().get_cset() == h5py.h5t.CSET_UTF8
        assert hdf5["id"].asstr()[:].tolist() == ["cat/é8.jpg", "dog"]


@pytest.mark.parametrize("name", ["facts", "", "Ids", "a/b", "a1", "ids\n", "a" * 41])
def test_a_column_with_another_name_is_refused(path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=re.escape(repr(name))):
        write_table(path, columns={name: np.arange(3)}, facts={})


@pytest.mark.parametrize("dtype", ["U3", "O", "?", "c8", "M8[s]", "g"])
def test_a_column_that_is_not_of_plain_numbers_is_refused(path: Path, dtype: str) -> None:
    with pytest.raises(TypeError, match=r"column ids is .*; store integers or floats"):
        write_table(path, columns={"ids": np.zeros(3, dtype)}, facts={})
