import numpy as np
import pytest
import torch
from support.parts import DTYPES

from featstore.files.storage_types import FLOATS, STORAGE_TYPES, StorageType, storage_type_of


def test_the_storage_types_are_those_of_the_format() -> None:
    assert [each.torch_dtype for each in STORAGE_TYPES.values()] == [*DTYPES, torch.int8]
    assert [each.torch_dtype for each in FLOATS.values()] == list(DTYPES)
    assert list(STORAGE_TYPES) == [each.name for each in STORAGE_TYPES.values()]


@pytest.mark.parametrize("each", FLOATS.values(), ids=FLOATS)
def test_a_storage_type_says_of_its_numbers_what_torch_says(each: StorageType) -> None:
    limits = torch.finfo(each.torch_dtype)
    assert each.itemsize == each.torch_dtype.itemsize
    assert limits.eps == 2.0**-each.mantissa_bits
    assert limits.smallest_normal == 2.0 ** (2 - (1 << (each.exponent_bits - 1)))
    assert storage_type_of(each.torch_dtype) is each


@pytest.mark.parametrize("each", FLOATS.values(), ids=FLOATS)
def test_numpy_holds_each_value_of_a_storage_type(each: StorageType) -> None:
    values = torch.tensor([1 / 3, -(2.0**-14), torch.finfo(each.torch_dtype).max], dtype=each.torch_dtype)
    held = values.to(each.in_numpy.torch_dtype).numpy()
    assert held.dtype == np.dtype(each.numpy)
    assert torch.equal(torch.from_numpy(held).to(each.torch_dtype), values)


@pytest.mark.parametrize("each", FLOATS.values(), ids=FLOATS)
def test_stored_bytes_are_the_numbers_that_torch_takes_them_for(each: StorageType) -> None:
    patterns = np.random.default_rng(0).integers(0, 256, (1000, 8 * each.itemsize), np.uint8)
    expected = torch.from_numpy(patterns).view(each.torch_dtype).double().numpy()
    np.testing.assert_array_equal(each.numbers(patterns), expected)  # NaN and infinities too


def test_stored_whole_numbers_are_those_times_their_rows_scale_in_float32() -> None:
    int8 = STORAGE_TYPES["int8"]
    patterns = np.random.default_rng(0).integers(0, 256, (100, 8), np.uint8)
    scales = np.random.default_rng(1).random(100, np.float32)
    expected = (patterns.view(np.int8).astype(np.float32) * scales[:, None]).astype(np.float64)
    np.testing.assert_array_equal(int8.numbers(patterns, scales), expected)
    assert (int8.itemsize, int8.is_scaled, int8.read_as.name) == (1, True, "float32")
    assert [each.name for each in STORAGE_TYPES.values() if each.read_as != each] == ["int8"]


def test_other_types_are_no_storage_types_and_whole_numbers_are_none_without_scales() -> None:
    others = (torch.float64, torch.int64, torch.bool, torch.int8)
    assert [storage_type_of(dtype) for dtype in others] == [None] * len(others)
