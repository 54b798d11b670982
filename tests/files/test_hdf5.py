import json
import re
import shutil
import struct
import subprocess
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
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
    reseal,
    some_decoders,
    some_digests,
    write,
)

from featstore.errors import DamagedFileError
from featstore.files import hdf5 as hdf5_module
from featstore.files.part import Part, write_part
from featstore.files.table import Table, write_table

FORMAT_PAGE = Path(__file__).parents[2] / "docs" / "format.md"


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


def test_features_begin_on_a_page_and_end_the_file(path: Path) -> None:
    for num_rows in (1, 3, 100, 5000):
        where = path.with_name(f"{num_rows}.h5")
        write(where, random_bits(num_rows))
        assert extent(where, "features").start % 4096 == 0
        assert extent(where, "features").stop == where.stat().st_size


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

    add_features = hdf5_module._add_features
    monkeypatch.setattr(hdf5_module, "_add_features", add_features_and_more)
    features = random_bits(2000)
    write(path, features)
    assert extent(path, "behind").start >= extent(path, "features").stop
    assert bits(Part.open(path).features) == bits(features)
    assert Part.open(path).verify() == []
    flip_bit(path, extent(path, "behind").start)
    with pytest.raises(DamagedFileError, match="checksum"):
        Part.open(path)


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


def move_values(path: Path, name: str) -> None:
    """Puts the values of a dataset, with all that is said of it, elsewhere in the file."""
    before = extent(path, name)
    with h5py.File(path, "r+") as file:
        file.copy(name, "moved")
        del file[name]
        file.move("moved", name)
    assert extent(path, name).start != before.start
    reseal(path, 48, struct.pack("<Q", path.stat().st_size))


@pytest.mark.parametrize("name", ["digest", "decoder", "crc", "facts"])
def test_each_dataset_of_a_part_must_lie_in_its_region(path: Path, name: str) -> None:
    write(path, random_bits(9))
    move_values(path, name)
    with pytest.raises(DamagedFileError, match=f"/{name} lies elsewhere than its region says"):
        Part.open(path)


@pytest.mark.parametrize("name", ["ids", "facts"])
def test_each_dataset_of_a_table_must_lie_in_its_region(path: Path, name: str) -> None:
    write_table(path, columns={"ids": np.arange(9)}, facts={})
    move_values(path, name)
    with pytest.raises(DamagedFileError, match=f"/{name} lies elsewhere than its region says"):
        Table.open(path)


def test_features_that_begin_beside_a_page_are_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hdf5_module, "FEATURES_ALIGNMENT", 1)
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
