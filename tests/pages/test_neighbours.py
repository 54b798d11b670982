"""Neighbours: those that scikit-learn finds by the same measure, whatever blocks the rows come in."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from sklearn.neighbors import NearestNeighbors

from featstore.pages import neighbours
from featstore.pages.neighbours import as_blocks, nearest


@pytest.fixture(scope="module")
def rows() -> torch.Tensor:
    return torch.randn(300, 4, 3, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("size", [1, 7, 100, 1000])
def test_neighbours_are_those_of_scikit_learn_in_blocks_of_any_size(rows: torch.Tensor, size: int) -> None:
    flat = rows.flatten(1).numpy()
    distances, expected = NearestNeighbors(n_neighbors=6, metric="cosine").fit(flat).kneighbors(flat)
    found, similar = nearest(rows, as_blocks(rows, size), 5, left_out=np.arange(300))
    assert_array_equal(expected[:, 0], np.arange(300))  # each is nearest to itself, and is left out
    assert_array_equal(found, expected[:, 1:])
    assert_allclose(similar, 1 - distances[:, 1:], atol=1e-6)  # float32 sums of 12 products


def test_queries_are_taken_a_few_at_a_time_where_all_would_be_large(
    rows: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = nearest(rows, as_blocks(rows, 64), 5)
    monkeypatch.setattr(neighbours, "_BLOCK_BYTES", 4 * 64 * 3)  # three queries
    found, similar = nearest(rows, as_blocks(rows, 64), 5)
    assert_array_equal(found, whole[0])
    assert_allclose(similar, whole[1], atol=1e-6)


@pytest.mark.parametrize("size", [2, 3, 50])
def test_of_equal_ones_the_lower_number_comes_first(size: int) -> None:
    row = torch.tensor([[1.0, 2.0]])
    same = row.repeat(50, 1) * torch.tensor([1.0, 2.0]).repeat(25)[:, None]  # lengths play no part
    found, similar = nearest(row, as_blocks(same, size), 4, left_out=np.array([1]))
    assert_array_equal(found, [[0, 2, 3, 4]])
    assert_allclose(similar, 1, atol=1e-6)


def test_where_there_are_too_few_the_rest_is_none() -> None:
    rows = torch.eye(3)
    found, similar = nearest(rows[:1], as_blocks(rows), 5, left_out=np.array([0]))
    assert_array_equal(found, [[1, 2, -1, -1, -1]])
    assert_array_equal(similar, [[0, 0, *[-np.inf] * 3]])


def test_a_row_of_zeros_is_like_none() -> None:
    found, similar = nearest(torch.zeros(1, 2), as_blocks(torch.ones(2, 2)), 2)
    assert_array_equal(found, [[0, 1]])
    assert_array_equal(similar, [[0, 0]])


def test_no_neighbours_are_refused() -> None:
    with pytest.raises(ValueError, match=r"k is 0\. Expected at least 1 neighbour"):
        nearest(torch.ones(1, 2), [], 0)
