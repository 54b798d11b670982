"""Splitting: images or whole groups dealt into splits and folds, by rank of a hash within each class."""

from __future__ import annotations

import hashlib
import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from heapq import heapify, heapreplace

import numpy as np
from numpy.typing import NDArray

from featstore.words import counted, listed


def split_of_each(
    keys: Sequence[str], strata: NDArray[np.int64], seed: int, *, valid: float, test: float
) -> NDArray[np.str_]:
    """`(N,)` "train", "valid" or "test" for each image, see `ImageSet.split`.

    Args:
        keys: of each image; those with one key (a group) stay together.
        strata: `(N,)` which images are dealt together, from 0 on.
        seed: for the ranks.
        valid: share of each stratum.
        test: share of each stratum.
    """
    units = _rank(keys, strata, seed)
    return _deal(units, valid, test)[units.of_image]


def fold_of_each(
    keys: Sequence[str], strata: NDArray[np.int64], seed: int, *, k: int, are_groups: bool
) -> NDArray[np.int64]:
    """`(N,)` the fold, 0 to `k` - 1, in which each image is held out, see `ImageSet.folds`.

    Args:
        keys: as in `split_of_each`.
        strata: as in `split_of_each`.
        seed: for the ranks.
        k: the number of folds.
        are_groups: whether the keys are of groups, which differ in size, and not of the images.

    Raises:
        ValueError: for `k` below 2 or above the number of keys.
    """
    units = _rank(keys, strata, seed)
    if not 2 <= k <= len(units.sizes):
        raise ValueError(
            f"k is {k} and there are {len(units.sizes):,} {'groups' if are_groups else 'images'} to deal. "
            "Expected at least 2 folds and one of these for each. Ask for another number of folds."
        )
    return (_fold_groups if are_groups else _fold_images)(units, k)[units.of_image]


def check_test_groups(groups: tuple[str, ...] | None, is_dealt: NDArray[np.bool_]) -> None:
    """Checks that no group has images that are dealt and others that aren't (those of test).

    Raises:
        ValueError: with the groups that do.
    """
    if groups is None:
        return
    tested = {group for group, dealt in zip(groups, is_dealt, strict=True) if not dealt}
    both = sorted(tested & {group for group, dealt in zip(groups, is_dealt, strict=True) if dealt})
    if both:
        raise ValueError(
            f"{counted(len(both), 'group')} ({listed(both)}) have images in split test and outside it. "
            "Expected whole groups in one split. Correct the splits, or deal all of it with split(valid=..., test=...)."
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class _Units:
    """What is dealt whole, an image or a group of images; U of them.

    Attributes:
        of_image: `(N,)` the unit of each image.
        sizes: `(U,)` images in each.
        ranks: `(U,)` uint64, by hash.
        strata: the units of each stratum, in order of rank.
    """

    of_image: NDArray[np.int64]
    sizes: NDArray[np.int64]
    ranks: NDArray[np.uint64]
    strata: list[NDArray[np.int64]]


def _rank(keys: Sequence[str], strata: NDArray[np.int64], seed: int) -> _Units:
    """Images with one key as a unit, ranked by SHA-256 of seed and key within the unit's commonest stratum."""
    numbers: dict[str, int] = {}
    of_image = np.array([numbers.setdefault(key, len(numbers)) for key in keys], dtype=np.int64)
    hashes = (
        hashlib.sha256(f"{operator.index(seed)}\n{key}".encode("utf-8", "surrogatepass")).digest()[:8]
        for key in numbers
    )
    ranks = np.frombuffer(b"".join(hashes), dtype=">u8").astype(np.uint64)
    stratum = _commonest(of_image, strata)
    order = np.lexsort((ranks, stratum))
    return _Units(
        of_image=of_image,
        sizes=np.bincount(of_image, minlength=len(numbers)),
        ranks=ranks,
        strata=np.split(order, np.flatnonzero(np.diff(stratum[order])) + 1),
    )


def _commonest(of_image: NDArray[np.int64], strata: NDArray[np.int64]) -> NDArray[np.int64]:
    """`(U,)` the stratum of most images of each unit; of equals the first."""
    num_strata = int(strata.max(initial=0)) + 1
    pairs, counts = np.unique(of_image * num_strata + strata, return_counts=True)
    unit, stratum = np.divmod(pairs, num_strata)
    order = np.lexsort((stratum, -counts, unit))
    _, firsts = np.unique(unit[order], return_index=True)
    commonest: NDArray[np.int64] = stratum[order][firsts]
    return commonest


def _deal(units: _Units, valid: float, test: float) -> NDArray[np.str_]:
    """`(U,)` the split of each unit."""
    dealt = np.full(len(units.sizes), "train", dtype="<U5")
    for members in units.strata:
        num_images = int(units.sizes[members].sum())
        for split, fraction in (("valid", valid), ("test", test)):
            left = members[dealt[members] == "train"]
            dealt[_taken(left, units.sizes, _round_half_up(fraction, num_images))] = split
    left = np.flatnonzero(dealt == "train")
    if valid > 0 and not (dealt == "valid").any() and len(left) > 1:
        dealt[left[np.argmin(units.ranks[left])]] = "valid"
    return dealt


def _taken(members: NDArray[np.int64], sizes: NDArray[np.int64], wanted: int) -> list[int]:
    """Each of `members`, in order, that brings the number of images nearer to `wanted`."""
    taken = []
    for unit, size in zip(members.tolist(), sizes[members].tolist(), strict=True):
        if wanted <= 0:
            break
        if size < 2 * wanted:  # |wanted - size| < wanted
            taken.append(unit)
            wanted -= size
    return taken


def _round_half_up(fraction: float, number: int) -> int:
    """In decimals as a person wrote them: 0.145 of 100 is 14.5, hence 15; in binary it is a little less."""
    return math.floor(Decimal(repr(float(fraction))) * number + Decimal("0.5"))


def _fold_images(units: _Units, k: int) -> NDArray[np.int64]:
    """`(U,)` the fold of each image: k blocks of each stratum in rank order, so that adding images moves few."""
    fold = np.empty(len(units.sizes), dtype=np.int64)
    first = 0  # the fold whose turn it is to get one image more than others
    for members in units.strata:
        sizes = np.full(k, len(members) // k)
        sizes[(first + np.arange(len(members) % k)) % k] += 1
        fold[members] = np.repeat(np.arange(k), sizes)
        first = (first + len(members)) % k
    return fold


def _fold_groups(units: _Units, k: int) -> NDArray[np.int64]:
    """`(U,)` the fold of each group, the largest first: that with fewest images of its stratum, then of all."""
    fold = np.empty(len(units.sizes), dtype=np.int64)
    filled = [0] * k
    for members in units.strata:
        loads = [(0, filled[number], number) for number in range(k)]
        heapify(loads)
        for unit in members[np.argsort(-units.sizes[members], kind="stable")].tolist():
            _, _, number = loads[0]
            size = int(units.sizes[unit])
            fold[unit] = number
            filled[number] += size
            heapreplace(loads, (loads[0][0] + size, filled[number], number))
    return fold
