"""Features: rows by image and by number, from one part or several."""

from __future__ import annotations

import multiprocessing
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.processes import Processes
from support.tiny import SPEC, arrays, digests_of

from featstore import Features
from featstore.files.index import RowIndex
from featstore.files.part import Part, write_part

SHAPE = (4, 3)


def rows_of(*names: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Rows that say whose they are: name, name + 1/64, ..."""
    return torch.stack([name + torch.arange(12).reshape(SHAPE) / 64 for name in names]).to(dtype)


def parts(folder: Path, *contents: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Part]:
    paths = [folder / f"part-{place}.h5" for place in range(len(contents))]
    for path, names in zip(paths, contents, strict=True):
        decoders = np.zeros(len(names), np.uint8)
        write_part(path, features=rows_of(*names, dtype=dtype), digests=digests_of(*names), decoders=decoders, facts={})
    return [Part.open(path) for path in paths]


def features(folder: Path, *contents: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Features:
    """Of the images called 0 to N - 1, whose rows lie in parts in another order."""
    made = parts(folder, *contents, dtype=dtype)
    count = sum(map(len, contents))
    index = RowIndex(made)
    part_of, row_in = index.find(digests_of(*range(count)))
    return Features(arrays(count), SPEC, index, part_of, row_in)


def first_values(rows: torch.Tensor) -> list[float]:
    values: list[float] = rows.reshape(len(rows), -1)[:, 0].tolist()
    return values


# ---- rows


@pytest.mark.parametrize("contents", [((3, 0, 4, 1, 2),), ((3, 0), (4,), (1, 2))], ids=["one part", "three parts"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rows_are_chosen_as_numpy_chooses(tmp_path: Path, contents: Any, dtype: torch.dtype) -> None:
    stored = features(tmp_path, *contents, dtype=dtype)
    everything = rows_of(0, 1, 2, 3, 4, dtype=dtype)
    assert stored.shape == (5, *SHAPE)
    assert stored.dtype == dtype
    choices: list[Any] = [
        slice(None), slice(1, 4), slice(None, None, -2), slice(7, 9), [0], [4, 0, 4, 4], [-1, -5], [],
        np.array([2, 1]), np.array([True, False, False, True, True]), torch.tensor([3, 3, 0]),
        torch.tensor([False, True, False, False, True]), range(2, 5), (np.array([], np.int64)),
    ]  # fmt: skip
    for rows in choices:
        places = np.arange(5)[rows.numpy() if isinstance(rows, torch.Tensor) else rows]
        chosen = stored[rows]
        assert torch.equal(chosen, everything[torch.from_numpy(places.copy())])
        assert chosen.dtype == dtype
    ones: list[Any] = [0, 4, -1, -5, np.int64(2), torch.tensor(3)]
    for one in ones:
        assert torch.equal(stored[one], everything[int(one)])


@pytest.mark.parametrize("rows", [5, -6, [0, 5], [-6], np.array([True, False]), [0.5], "cat", [[0, 1], [2, 3]], (1, 2)])
def test_rows_that_are_not_there_are_refused(tmp_path: Path, rows: Any) -> None:
    with pytest.raises(IndexError):
        features(tmp_path, (3, 0), (4, 1, 2))[rows]


def test_rows_are_the_callers_own(tmp_path: Path) -> None:
    stored = features(tmp_path, (0, 1, 2))
    stored[:].fill_(7)
    stored[1].fill_(7)
    stored.tensor().fill_(7)
    stored.numpy()[:] = 7
    assert torch.equal(stored[:], rows_of(0, 1, 2))


def test_everything_at_once_as_tensor_or_array(tmp_path: Path) -> None:
    stored = features(tmp_path, (2, 0), (1,), dtype=torch.bfloat16)
    assert torch.equal(stored.tensor(), rows_of(0, 1, 2, dtype=torch.bfloat16))
    assert stored.tensor(dtype=torch.float64).dtype == torch.float64
    array = stored.numpy()
    assert array.dtype == np.float32
    assert np.array_equal(array, rows_of(0, 1, 2, dtype=torch.bfloat16).float().numpy())
    half = tmp_path / "half"
    half.mkdir()
    assert features(half, (0, 1), dtype=torch.float16).numpy().dtype == np.float16


def test_no_images_are_no_rows(tmp_path: Path) -> None:
    made = parts(tmp_path, (1, 2))
    none = np.zeros(0, np.int64)
    stored = Features(arrays(3).select([]), SPEC, RowIndex(made), none, none)
    assert (len(stored), stored[:].shape, stored.numpy().shape) == (0, (0, *SHAPE), (0, *SHAPE))
    assert list(stored.batches(2)) == []


# ---- batches


def test_batches_hold_each_row_once_in_order(tmp_path: Path) -> None:
    stored = features(tmp_path, (3, 0), (4, 1, 2))
    batches = list(stored.batches(2))
    assert [rows.tolist() for _, rows in batches] == [[0, 1], [2, 3], [4]]
    assert torch.equal(torch.cat([values for values, _ in batches]), rows_of(0, 1, 2, 3, 4))
    assert [len(rows) for _, rows in stored.batches(2, drop_last=True)] == [2, 2]
    assert [len(rows) for _, rows in stored.batches(9)] == [5]
    assert [len(rows) for _, rows in stored.batches(9, drop_last=True)] == []


def test_shuffled_batches_hold_each_row_once_in_an_order_that_the_seed_decides(tmp_path: Path) -> None:
    stored = features(tmp_path, (3, 0, 7, 5), (4, 1, 2, 6))

    def order(seed: int) -> list[int]:
        batches = list(stored.batches(3, shuffle=True, seed=seed))
        assert all(first_values(values) == rows.tolist() for values, rows in batches)
        return [row for _, rows in batches for row in rows.tolist()]

    before = torch.get_rng_state(), np.random.get_state()[1].tolist()  # type: ignore[index]  # noqa: NPY002
    assert order(0) == order(0)
    assert sorted(order(0)) == list(range(8))
    assert len({tuple(order(seed)) for seed in range(5)} | {tuple(range(8))}) == 6
    after = torch.get_rng_state(), np.random.get_state()[1].tolist()  # type: ignore[index]  # noqa: NPY002
    assert torch.equal(before[0], after[0])
    assert before[1] == after[1]


def test_a_batch_of_no_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="batch_size is 0; expected at least 1"):
        list(features(tmp_path, (0,)).batches(0))


# ---- elsewhere


def test_features_pickle_without_their_rows(tmp_path: Path) -> None:
    stored = features(tmp_path, (3, 0), (4, 1, 2))
    assert len(stored[:]) == 5  # mapped now
    again = pickle.loads(pickle.dumps(stored))
    assert torch.equal(again[[4, 0]], rows_of(4, 0))
    assert again.ids == stored.ids
    assert again.targets.tolist() == [0, 1, 0, 1, 0]
    assert again.key == SPEC.key


def _sums(stored: Features, rows: list[int]) -> list[float]:
    sums: list[float] = stored[rows].sum(dim=(1, 2)).tolist()
    return sums


def test_features_work_in_a_forked_worker_and_in_a_new_process(tmp_path: Path, processes: Processes) -> None:
    stored = features(tmp_path, (3, 0), (4, 1, 2))
    assert len(stored[:]) == 5
    expected = rows_of(4, 1).sum(dim=(1, 2)).tolist()
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply(_sums, (stored, [4, 1])) == expected
    assert processes.call(_sums, stored, [4, 1]) == expected


def test_features_work_in_several_threads(tmp_path: Path) -> None:
    stored = features(tmp_path, (3, 0), (4, 1, 2))
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda row: stored[[row, 0]], [row % 5 for row in range(200)]))
    assert all(first_values(result) == [row % 5, 0] for row, result in enumerate(results))


def test_features_say_what_they_are(tmp_path: Path) -> None:
    assert repr(features(tmp_path, (0, 1))) == f"Features(2x4x3 float32, set {SPEC.key[:4]})"
