import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from support import released
from support.parts import FACTS, extent, flip_bit, random_bits, write

from featstore.errors import DamagedFileError
from featstore.files.table import Table, write_table


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


def test_a_table_has_as_many_columns_as_its_user_block_has_room_for(path: Path) -> None:
    names = ["column_" + "a" * place for place in range(1, 34)] + ["b" * place for place in range(1, 30)]
    columns = {name: np.arange(3) for name in names}
    with pytest.raises(ValueError, match="62 columns; its user block has room for 61"):
        write_table(path, columns=columns, facts={})
    del columns["b"]
    write_table(path, columns=columns, facts={})
    assert Table.open(path).columns.keys() == columns.keys()


@pytest.mark.parametrize("name", ["facts", "", "Ids", "a/b", "a1", "ids\n", "a" * 41])
def test_a_column_with_another_name_is_refused(path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=re.escape(repr(name))):
        write_table(path, columns={name: np.arange(3)}, facts={})


@pytest.mark.parametrize("dtype", ["U3", "O", "?", "c8", "M8[s]", "g"])
def test_a_column_that_is_not_of_plain_numbers_is_refused(path: Path, dtype: str) -> None:
    with pytest.raises(TypeError, match=r"column ids is .*; store integers or floats"):
        write_table(path, columns={"ids": np.zeros(3, dtype)}, facts={})
