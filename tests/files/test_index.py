"""The index: which part has an image's row, and where."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from support.tiny import digests_of

from featstore.files.index import Places, RowIndex, first_places, is_among
from featstore.files.part import Part, write_part


def part(path: Path, digests: NDArray[np.uint8]) -> Part:
    """Of rows that nobody looks at."""
    num_rows = len(digests)
    write_part(
        path, features=torch.zeros(num_rows, 3), digests=digests, decoders=np.zeros(num_rows, np.uint8), facts={}
    )
    return Part.open(path)


def parts(folder: Path, *contents: tuple[int, ...]) -> list[Part]:
    return [part(folder / f"part-{place}.h5", digests_of(*names)) for place, names in enumerate(contents)]


def test_rows_are_found_by_digest_in_any_order_with_repeats_and_gaps(tmp_path: Path) -> None:
    index = RowIndex(parts(tmp_path, (5, 3), (1,)))
    part_of, row_in = index.find(digests_of(1, 9, 3, 5, 3))
    assert part_of.tolist() == [1, -1, 0, 0, 0]
    assert row_in.tolist() == [0, -1, 1, 0, 1]
    assert index.num_images == 3


def test_an_index_of_nothing_finds_nothing(tmp_path: Path) -> None:
    empty = part(tmp_path / "part-0.h5", np.zeros((0, 32), np.uint8))
    for index in (RowIndex([]), RowIndex([empty])):
        assert index.find(digests_of(1, 2))[0].tolist() == [-1, -1]
        assert index.find(np.zeros((0, 32), np.uint8))[0].tolist() == []
        assert index.num_images == 0


def test_digests_that_share_64_bits_are_told_apart(tmp_path: Path) -> None:
    collided = digests_of(*range(6)).copy()
    collided[:, :8] = collided[0, :8]
    first = part(tmp_path / "part-a.h5", collided[[4, 1, 3]])
    second = part(tmp_path / "part-b.h5", collided[[3, 0, 1]])
    index = RowIndex([second, first])
    part_of, row_in = index.find(collided)
    assert part_of.tolist() == [1, 0, -1, 0, 0, -1]  # 1 and 3 are in both: the smaller name
    assert row_in.tolist() == [1, 1, -1, 2, 0, -1]
    assert index.num_images == 4


def test_of_duplicate_rows_the_smallest_part_name_wins_for_every_reader(tmp_path: Path) -> None:
    later = part(tmp_path / "part-b.h5", digests_of(1, 2, 2))
    sooner = part(tmp_path / "part-a.h5", digests_of(2, 3))
    for order in ([later, sooner], [sooner, later]):
        index = RowIndex(order)
        part_of, row_in = index.find(digests_of(1, 2, 3))
        assert [index.parts[place].path.name for place in part_of] == ["part-b.h5", "part-a.h5", "part-a.h5"]
        assert row_in.tolist() == [0, 0, 1]
        assert index.num_images == 3


def test_of_many_duplicate_rows_the_first_of_the_smallest_part_name_wins(tmp_path: Path) -> None:
    names = [place * 7 % 5 for place in range(300)]
    made = [part(tmp_path / f"part-{place}.h5", digests_of(*names[place:])) for place in (2, 0, 1)]
    part_of, row_in = RowIndex(made).find(digests_of(*range(5)))
    assert part_of.tolist() == [0] * 5
    assert row_in.tolist() == [names.index(name) for name in range(5)]


def test_digests_among_others_are_found_by_all_their_bytes() -> None:
    digests = digests_of(0, 1, 2, 3, 1).copy()
    near = digests[[0]].copy()
    near[0, 31] ^= 1
    assert is_among(digests, np.concatenate([digests_of(1, 3), near])).tolist() == [False, True, False, True, True]
    assert is_among(digests, np.zeros((0, 32), np.uint8)).tolist() == [False] * 5


def test_all_places_of_a_digest_are_found_by_all_its_bytes() -> None:
    digests = digests_of(4, 2, 7, 2, 9).copy()
    digests[2, :8] = digests[1, :8]
    places = Places(digests)
    assert [places.of(row.tobytes()) for row in digests] == [[0], [1, 3], [2], [1, 3], [4]]
    assert places.of(digests_of(5)[0].tobytes()) == []
    assert Places(digests[:0]).of(digests[0].tobytes()) == []


def test_the_first_place_of_each_digest() -> None:
    digests = digests_of(2, 1, 2, 1, 0)
    assert first_places(digests).tolist() == [0, 1, 4]
    zeros_at_the_end = np.zeros((3, 32), np.uint8)
    zeros_at_the_end[1, 0] = zeros_at_the_end[2, 1] = 7
    assert first_places(zeros_at_the_end).tolist() == [0, 1, 2]
    assert first_places(np.zeros((0, 32), np.uint8)).tolist() == []
