"""Rows of several parts in windows of blocks and part by part, and threads that read ahead of who wants their results.

That every way of reading gives the same rows is said of `Features`, in `tests/store/test_access.py`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from support.parts import write

from featstore.files.part import Part
from featstore.files.reading import Blocks, Places, ahead

NUM_ROWS = 100
BLOCK_ROWS = 16


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Places:
    """Of rows in three parts, in another order than they lie there; 64 KiB each, so that 16 are a block."""
    folder, sizes = tmp_path_factory.mktemp("parts"), (50, 3, 47)
    for place, size in enumerate(sizes):
        write(folder / f"part-{place}.h5", torch.zeros(size, 64, 64, 4))
    parts = [Part.open(path) for path in sorted(folder.glob("part-*.h5"))]
    assert {part.block_rows for part in parts} == {BLOCK_ROWS}
    order = np.random.default_rng(0).permutation(NUM_ROWS)
    part_of, row_in = np.repeat([0, 1, 2], sizes), np.concatenate([np.arange(size) for size in sizes])
    return Places(parts=parts, part_of=part_of[order], row_in=row_in[order])


def test_windows_and_rows_in_them_are_shuffled(places: Places) -> None:
    firsts, orders = set(), set()
    for seed in range(30):
        window = next(Blocks(places).windows(np.random.default_rng(seed), num_rows=2 * BLOCK_ROWS))
        firsts.add(frozenset(zip(places.part_of[window], places.row_in[window] // BLOCK_ROWS, strict=True)))
        orders.add(tuple(places.row_in[window]))
    assert len(firsts) > 10
    assert all(list(order) != sorted(order) for order in orders)


def test_rows_mix_uniformly_within_a_window(places: Places) -> None:
    """Each row is as often anywhere, and rows that are neighbours in a file come as far apart as any two."""
    times = 400
    positions = np.empty((times, NUM_ROWS))
    for seed in range(times):
        (window,) = Blocks(places).windows(np.random.default_rng(seed), num_rows=NUM_ROWS)
        positions[seed, window] = np.arange(NUM_ROWS)
    spread = np.sqrt((NUM_ROWS**2 - 1) / 12 / times)  # of the mean of a uniform position
    assert np.abs(positions.mean(axis=0) - (NUM_ROWS - 1) / 2).max() < 5 * spread
    in_files = positions[:, np.lexsort((places.row_in, places.part_of))]
    apart = np.abs(np.diff(in_files, axis=1)).mean(axis=0)
    assert np.abs(apart - (NUM_ROWS + 1) / 3).max() < 5 * NUM_ROWS / np.sqrt(18 * times)


def test_an_order_of_no_rows_is_no_order() -> None:
    none: NDArray[np.int64] = np.zeros(0, np.int64)
    assert list(Places(parts=(), part_of=none, row_in=none).by_part()) == []


# ---- threads


def test_results_come_in_the_order_of_their_tasks_and_a_failure_in_its_place() -> None:
    assert list(ahead((partial(pow, number, 2) for number in range(50)), depth=3)) == [n * n for n in range(50)]
    tasks = (partial(divmod, 1, number) for number in (1, 1, 0, 1))
    results = ahead(tasks, depth=2)
    assert [next(results), next(results)] == [(1, 0), (1, 0)]
    with pytest.raises(ZeroDivisionError):
        next(results)


def test_no_more_tasks_are_begun_than_are_wanted() -> None:
    begun: list[int] = []

    def tasks() -> Any:
        for number in range(1000):
            begun.append(number)
            yield partial(int, number)

    results = ahead(tasks(), depth=4)
    assert next(results) == 0
    assert len(begun) <= 4
    results.close()  # type: ignore[attr-defined]
