import re
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from support import released
from support.parts import bits, extent, flip_bit, random_bits, reseal, write

from featstore import FeatureStore
from featstore.errors import DamagedFileError, NewerFormatError
from featstore.files.header import FORMAT_VERSION
from featstore.files.part import Part
from featstore.files.table import Table, write_table


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


@pytest.mark.parametrize("edit", [lambda block: block + b"unknown", lambda block: block], ids=["other", "alike"])
def test_a_newer_version_is_refused_with_the_remedy_whatever_else_it_holds(
    path: Path, edit: Callable[[bytes], bytes]
) -> None:
    write(path, random_bits(10))
    reseal(path, 32, edit(struct.pack("<I", 4)))
    with pytest.raises(NewerFormatError) as error:
        Part.open(path)
    assert str(error.value) == (
        f"{path} has format version 4; this featstore reads versions up to 3. Upgrade featstore to read it."
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
