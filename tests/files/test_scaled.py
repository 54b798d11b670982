"""Scaled rows: whole numbers of 8 bits with a scale each, made as numpy makes them, in a part that holds both."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from support import released
from support.parts import FACTS, extent, flip_bit, some_decoders, some_digests
from support.scaled import some_values, unscaled

from featstore.errors import DamagedFileError, NewerFormatError
from featstore.files import header
from featstore.files.part import Part, write_part
from featstore.files.scaled import ScaledRows, no_rows
from featstore.files.storage_types import STORAGE_TYPES


def write(path: Path, features: Any, num_rows: int) -> Part:
    write_part(path, features=features, digests=some_digests(num_rows), decoders=some_decoders(num_rows), facts=FACTS)
    return Part.open(path)


def in_numpy(values: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Rows rounded without torch."""
    rows = values.reshape(len(values), -1)
    scales = np.abs(rows).max(axis=1) / np.float32(127)
    with np.errstate(invalid="ignore", divide="ignore"):
        numbers = np.where(scales[:, None] == 0, 0, np.rint(rows / scales[:, None])).clip(-127, 127)
    return numbers.astype(np.int8).reshape(values.shape), scales


# ---- the numbers


@pytest.mark.parametrize("shape", [(), (7,), (3, 5, 2)])
def test_rows_are_rounded_as_numpy_rounds_them_to_the_bit(shape: tuple[int, ...]) -> None:
    values = some_values(500, shape)
    made = ScaledRows.of(torch.from_numpy(values))
    numbers, scales = in_numpy(values)
    assert (made.numbers.dtype, made.scales.dtype) == (torch.int8, torch.float32)
    assert np.array_equal(made.numbers.numpy(), numbers)
    assert np.array_equal(made.scales.numpy(), scales)
    assert np.array_equal(made.values().numpy(), unscaled(numbers, scales))


def test_a_half_goes_to_the_even_number_and_the_largest_value_comes_back() -> None:
    made = ScaledRows.of(torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5], [254.0, 1.0, 3.0, 5.0, -1.0, -3.0]]))
    assert made.numbers.tolist() == [[127, 0, 2, 2, 0, -2]] * 2
    assert made.scales.tolist() == [1, 2]
    assert made.values()[:, 0].tolist() == [127, 254]


def test_rows_of_zeros_and_of_the_smallest_numbers_have_values() -> None:
    made = ScaledRows.of(torch.tensor([[0.0, -0.0], [2.0**-149, -(2.0**-149)], [200 * 2.0**-149, 0.0]]))
    assert made.numbers.tolist() == [[0, 0], [0, 0], [100, 0]]
    assert made.values().isfinite().all()
    assert made.values()[:2].tolist() == [[0, 0], [0, 0]]


# ---- the file


@pytest.mark.parametrize("shape", [(), (7,), (3, 5, 2)])
def test_numbers_and_scales_come_back_bit_for_bit(path: Path, shape: tuple[int, ...]) -> None:
    made = ScaledRows.of(torch.from_numpy(some_values(300, shape)))
    part = write(path, made, 300)
    assert (part.storage_type.name, part.shape, part.dtype) == ("int8", shape, torch.int8)
    assert part.scales is not None
    assert torch.equal(part.features, made.numbers)
    assert np.array_equal(part.scales, made.scales.numpy())
    assert part.verify() == []
    for rows, chunk in part.read_chunks(range(len(part.checksums))):
        assert isinstance(chunk, ScaledRows)
        assert torch.equal(chunk.values(), made[rows.start : rows.stop].values())


def test_chunks_and_what_draws_them_make_the_same_file_as_one(path: Path) -> None:
    made = ScaledRows.of(torch.from_numpy(some_values(300, (5000,))))
    assert write(path, made, 300).block_rows == 209  # so that chunks share blocks
    pieces = [made[:1], made[1:250], made[250:250], made[250:]]
    write(path.with_name("list.h5"), pieces, 300)
    write(path.with_name("drawn.h5"), iter(pieces), 300)
    assert path.read_bytes() == path.with_name("list.h5").read_bytes() == path.with_name("drawn.h5").read_bytes()


def test_a_part_without_rows_has_no_scales(path: Path) -> None:
    part = write(path, no_rows((3, 2), STORAGE_TYPES["int8"]), 0)
    assert part.scales is not None
    assert (part.num_rows, part.shape, part.scales.shape, part.verify()) == (0, (3, 2), (0,), [])


def test_rows_with_and_without_scales_are_not_mixed(path: Path) -> None:
    values = torch.from_numpy(some_values(8, (4,)))
    made = ScaledRows.of(values)
    mixed: list[Any] = [[made[:4], made.numbers[4:]], [made[:4], values[4:]], [values[:4], made[4:]]]
    draws: list[Iterator[Any]] = [iter(each) for each in mixed]
    for features in [*mixed, *draws]:
        with pytest.raises(ValueError, match=r"scaled rows and others|all rows of a part must have one dtype"):
            write(path, features, 8)
    with pytest.raises(TypeError, match=r"int8 can't be stored; convert them to float16, float32 or bfloat16"):
        write(path, made.numbers, 8)
    with pytest.raises(ValueError, match="have not the 8 rows"):
        write(path, iter([made, made]), 8)
    assert not path.exists()


def test_other_tools_read_numbers_and_scales(path: Path) -> None:
    made = ScaledRows.of(torch.from_numpy(some_values(20, (6,))))
    write(path, made, 20)
    with h5py.File(path) as file:
        assert (file["features"].dtype, file["scale"].dtype) == (np.int8, np.float32)
        assert np.array_equal(unscaled(file["features"][()], file["scale"][()]), made.values().numpy())


def test_a_flipped_bit_in_the_scales_is_found_and_named(path: Path) -> None:
    write(path, ScaledRows.of(torch.from_numpy(some_values(200, (9,)))), 200)
    for byte in extent(path, "scale")[::17]:
        flip_bit(path, byte)
        with pytest.raises(DamagedFileError, match="bytes are altered in its scales"):
            Part.open(path)
        flip_bit(path, byte)
    flip_bit(path, extent(path, "features").start)
    assert Part.open(path).verify() == [range(200)]


# ---- the version


def test_parts_with_scales_are_of_version_3_which_older_readers_refuse_by_name(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = torch.from_numpy(some_values(10, (5,)))
    write(path, ScaledRows.of(values), 10)
    write(path.with_name("floats.h5"), values, 10)
    for each, version in ((path, 3), (path.with_name("floats.h5"), 2)):
        assert struct.unpack_from("<I", each.read_bytes(), 32) == (version,)
    monkeypatch.setattr(header, "WHOLE_VERSION", 2)  # as a reader of version 2 has it
    with pytest.raises(NewerFormatError, match="has format version 3; this featstore reads versions up to 2"):
        Part.open(path)


def test_a_changed_version_is_found_in_either_direction(path: Path) -> None:
    values = torch.from_numpy(some_values(10, (5,)))
    for features in (values, ScaledRows.of(values)):
        write(path, features, 10)
        flip_bit(path, 32)
        with pytest.raises(DamagedFileError, match="altered in its header, in the first line or the version"):
            Part.open(path)
        path.unlink()


def test_every_value_of_released_scaled_rows_is_read() -> None:
    part = Part.open(released.SCALED_PART)
    assert part.scales is not None
    assert struct.unpack_from("<I", part.path.read_bytes(), 32) == (3,)
    assert torch.equal(part.features, released.NUMBERS)
    assert np.array_equal(part.scales, released.SCALES)
    assert np.array_equal(part.digests, released.DIGESTS)
    assert (part.facts, part.verify()) == (released.SCALED_FACTS, [])
