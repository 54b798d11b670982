"""Nearest neighbours: the k nearest rows of each query by blocked products, and what their classes say."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from featstore.errors import check_choice
from featstore.models.modes import numerics
from featstore.models.trunk import choose_device
from training.solvers.rows import Rows
from training.solvers.targets import class_numbers

Metric = Literal["cosine", "euclidean"]

_QUERIES, _QUERIES_GPU = 1024, 8192
"""Queries of a block; products with all rows of a block of theirs are as many times as long."""
_ROWS, _ROWS_GPU = 8192, 65536
_REFINED = 256
"""Queries whose candidates are gathered at once."""
_SLACK = 4
"""Candidates beyond k: the query's own row, and some as near as the last, which are compared by their numbers too."""
_ERROR = 4
"""Units in the last place of the summed squared lengths that a product may be off by: 1 to 2 were seen at 64 to 2,048
numbers a row. Where candidates lie within that, products are computed again in float64."""


class KNearest:
    """The k nearest rows, of equally near ones first those with the smaller numbers, and votes of their classes.

    Candidates, a few more than k, are found by products in float32, or in float64 where float32 can't tell which rows
    are nearer (groups that lie far apart, with rows close together); they are then put in order by their differences
    from the query, so that equal rows are at distance 0 and in the order of their numbers. Cosine distances are 0 to 2;
    a row of zeros has no direction and is like none: its similarity to each row is 0, its distance 1.
    Where more than a handful of rows are equally near at the k-th place, which of them is in depends on rounding, but
    not on the run.

    Args:
        X: ``(N, F)`` rows to search: an array, a tensor or `Features`. Rows that don't fit into memory are read again
            for each call.
        y: ``(N,)``, their labels; None to search alone.
        k: how many neighbours.
        metric: cosine or euclidean.
        weights: of votes: ``uniform``; ``distance``, the inverse of it; or a temperature T, by which a neighbour weighs
            ``exp((1 - distance) / T)``, as in the evaluation of DINO (T = 0.07, with cosine).
        device: where to compute.

    Attributes:
        classes: ``(K,)``, the labels in their order, None without labels.
        k: as above.

    Raises:
        ValueError: for rows that aren't finite, k outside of 1 to N, labels of another number.
    """

    def __init__(
        self,
        X: Any,  # noqa: N803
        y: Any = None,
        *,
        k: int = 20,
        metric: Metric = "cosine",
        weights: Literal["uniform", "distance"] | float = "uniform",
        device: str = "auto",
    ) -> None:
        check_choice("metric", metric, ["cosine", "euclidean"])
        self._rows, self.k = Rows.of(X), int(k)
        if not 1 <= k <= len(self._rows):
            raise ValueError(f"k is {k}; expected 1 to {len(self._rows):,}, the number of rows.")
        self._metric, self._weights, self._device = metric, _checked(weights), choose_device(device)
        self.classes: NDArray[Any] | None = None
        self._numbers: NDArray[np.int64] | None = None
        if y is not None:
            self.classes, self._numbers = class_numbers(y, len(self._rows))
        self._middle = torch.zeros(self._rows.width, device=self._device, dtype=torch.float64)
        with torch.no_grad(), numerics("fp32", self._device):
            if metric == "euclidean":
                self._middle = self._mean()
            self._kept = self._rows.kept(self._device, self._change)

    def neighbors(self, queries: Any, *, leave_one_out: bool = False) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Distances ``(Q, k)`` from near to far, and the numbers of the rows ``(Q, k)``.

        Args:
            queries: ``(Q, F)``, as X may be.
            leave_one_out: the queries are the rows, in their order, and none is a neighbour of its own.
        """
        asked = Rows.of(queries)
        if asked.width != self._rows.width:
            raise ValueError(f"Queries hold {asked.width} numbers a row; expected {self._rows.width}, as the rows do.")
        if leave_one_out and len(asked) != len(self._rows):
            raise ValueError(
                f"There are {len(asked):,} queries and {len(self._rows):,} rows; leave_one_out expects the rows "
                "themselves, in their order. Leave it away for other queries."
            )
        if leave_one_out and self.k == len(self._rows):
            raise ValueError(f"k is {self.k}; expected at most {self.k - 1} other rows.")
        distances = np.empty((len(asked), self.k), np.float32)
        found = np.empty((len(asked), self.k), np.int64)
        with torch.no_grad(), numerics("fp32", self._device):
            for where, block in asked.blocks(self._device, self._at_once, exact=True):
                near, numbers = self._of_block(self._change(block), where.start if leave_one_out else None)
                distances[where], found[where] = near.cpu().numpy(), numbers.cpu().numpy()
        return distances, found

    def predict_proba(self, queries: Any, *, leave_one_out: bool = False) -> NDArray[np.float64]:
        """The share of each class ``(Q, K)`` in the weighted votes of the neighbours.

        Raises:
            ValueError: without labels.
        """
        if self._numbers is None or self.classes is None:
            raise ValueError(
                "These neighbours have no labels; expected y. Give the rows' labels when you make KNearest."
            )
        distances, found = self.neighbors(queries, leave_one_out=leave_one_out)
        votes = _votes(distances, self._weights)
        shares = np.zeros((len(found), len(self.classes)))
        np.add.at(shares, (np.arange(len(found))[:, None], self._numbers[found]), votes)
        result: NDArray[np.float64] = shares / shares.sum(1, keepdims=True)
        return result

    def predict(self, queries: Any, *, leave_one_out: bool = False) -> NDArray[Any]:
        """The label with most votes ``(Q,)``; of equal ones the first in the order of `classes`."""
        shares = self.predict_proba(queries, leave_one_out=leave_one_out)
        assert self.classes is not None
        labels: NDArray[Any] = self.classes[shares.argmax(1)]
        return labels

    @property
    def _at_once(self) -> int:
        return _QUERIES if self._device.type == "cpu" else _QUERIES_GPU

    def _mean(self) -> Tensor:
        total = torch.zeros(self._rows.width, dtype=torch.float64, device=self._device)
        for _, block in self._rows.blocks(self._device, exact=True):
            total += block.double().sum(0)
        return total / len(self._rows)

    def _change(self, block: Tensor) -> Tensor:
        """Rows as they are compared: of length 1, or of zeros if they are that; or about their middle."""
        if self._metric == "euclidean":
            return (block - self._middle.to(block.dtype)).float()
        largest = block.abs().amax(1, keepdim=True)  # squares of 1e20 and of 1e-23 are no float32
        is_zero = largest == 0
        block = block / largest.masked_fill(is_zero, 1)
        changed: Tensor = block / torch.linalg.vector_norm(block, dim=1, keepdim=True).masked_fill(is_zero, 1)
        return changed.float()

    def _blocks(self) -> Iterator[tuple[int, Tensor]]:
        several = _ROWS if self._device.type == "cpu" else _ROWS_GPU
        if self._kept is None:
            for where, block in self._rows.blocks(self._device, several, exact=True):
                yield where.start, self._change(block)
            return
        for start in range(0, len(self._kept), several):
            yield start, self._kept[start : start + several]

    def _of_block(self, queries: Tensor, first: int | None) -> tuple[Tensor, Tensor]:
        """Distances and numbers of the neighbours of some queries, `first` the number of the first among the rows."""
        own = None if first is None else torch.arange(first, first + len(queries), device=queries.device)
        numbers, limits = self._candidates(queries)
        squares, numbers = self._refined(queries, numbers, own)
        doubtful = (~(squares[:, -1] / 2 <= limits)).nonzero()[:, 0]  # NaN too, where float32 overflows
        if len(doubtful):
            again, _ = self._candidates(queries[doubtful].double())
            squares[doubtful], numbers[doubtful] = self._refined(
                queries[doubtful], again, None if own is None else own[doubtful]
            )
        distances = squares / 2 if self._metric == "cosine" else squares.sqrt()
        return distances.float(), numbers

    def _candidates(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """Numbers ``(Q, C)`` of the rows nearest by products in the type of `queries`.

        With them half of the squared distance ``(Q,)`` below which each row is surely among them.
        """
        many = min(self.k + _SLACK, len(self._rows))
        nearness = torch.empty((len(queries), 0), device=queries.device, dtype=queries.dtype)
        numbers = torch.empty((len(queries), 0), dtype=torch.int64, device=queries.device)
        longest = torch.zeros((), device=queries.device, dtype=queries.dtype)
        for start, block in self._blocks():
            rows = block.to(queries.dtype)
            halves = self._halves(rows)
            longest = torch.maximum(longest, halves.max())
            close = self._nearness(queries, rows, halves)
            best, which = close.topk(min(many, len(block)), dim=1)
            nearness, numbers = torch.cat([nearness, best], 1), torch.cat([numbers, which + start], 1)
            if nearness.shape[1] > many:
                nearness, kept = nearness.topk(many, dim=1)
                numbers = numbers.gather(1, kept)
        if many == len(self._rows):
            return numbers, torch.full((len(queries),), torch.inf, device=queries.device, dtype=torch.float64)
        halves = self._halves(queries.double())
        error = _ERROR * torch.finfo(queries.dtype).eps * (halves + longest)
        of_rows = 0.5 if self._are_products(queries) else 0.0
        limits = halves + of_rows - nearness[:, -1].double() - error
        if self._metric == "cosine":  # to a query of zeros all are as near, so the first ones are the nearest
            is_zero = ~queries.any(1)
            first = torch.arange(many, device=numbers.device)
            numbers = torch.where(is_zero[:, None], first, numbers)
            limits = limits.masked_fill(is_zero, torch.inf)
        return numbers, limits

    def _halves(self, rows: Tensor) -> Tensor:
        """Half of each squared length; by cosine a row of zeros counts as one at right angles to all."""
        halves = rows.square().sum(1).div_(2)
        return halves.masked_fill_(halves == 0, 0.5) if self._metric == "cosine" else halves

    def _nearness(self, queries: Tensor, rows: Tensor, halves: Tensor) -> Tensor:
        """What is larger for a nearer row: the product, less half of its squared length where lengths differ."""
        if self._are_products(queries):
            return queries @ rows.T
        return torch.addmm(-halves, queries, rows.T)

    def _are_products(self, queries: Tensor) -> bool:
        """Whether rows count as of length 1, which in float32 they are."""
        return self._metric == "cosine" and queries.dtype == torch.float32

    def _refined(self, queries: Tensor, numbers: Tensor, own: Tensor | None) -> tuple[Tensor, Tensor]:
        """Squared distances in float64 and numbers of the k nearest of the candidates `numbers` ``(Q, C)``."""
        pieces = zip(
            torch.split(queries, _REFINED),
            torch.split(numbers, _REFINED),
            [None] * len(queries) if own is None else torch.split(own, _REFINED),
            strict=False,
        )
        refined = [self._refined_at_once(*each) for each in pieces]
        return torch.cat([each for each, _ in refined]), torch.cat([each for _, each in refined])

    def _refined_at_once(self, queries: Tensor, numbers: Tensor, own: Tensor | None) -> tuple[Tensor, Tensor]:
        numbers = numbers.sort(1).values  # then a stable sort leaves equally near ones in the order of their numbers
        if self._kept is not None:
            candidates = self._kept[numbers]
        else:
            unique, places = torch.unique(numbers, return_inverse=True)
            candidates = self._change(self._rows.take(unique.cpu().numpy()).to(self._device))[places]
        squares = (candidates - queries[:, None]).double().square().sum(-1)
        if self._metric == "cosine":
            squares.masked_fill_(~(candidates.any(-1) & queries.any(-1)[:, None]), 2)
        if own is not None:
            squares.masked_fill_(numbers == own[:, None], torch.inf)
        squares, order = squares.sort(dim=1, stable=True)
        return squares[:, : self.k], numbers.gather(1, order)[:, : self.k]


def _checked(weights: Literal["uniform", "distance"] | float) -> Literal["uniform", "distance"] | float:
    if isinstance(weights, str):
        check_choice("weights", weights, ["uniform", "distance"])
    elif not isinstance(weights, int | float | np.number) or not weights > 0:
        raise ValueError(f"weights is {weights!r}; expected uniform, distance, or a temperature above 0, as 0.07.")
    return weights


def _votes(distances: NDArray[np.float32], weights: Literal["uniform", "distance"] | float) -> NDArray[np.float64]:
    """What each neighbour's vote counts ``(Q, k)``; those at distance 0 count alone where weights are by distance."""
    far = distances.astype(np.float64)
    if not isinstance(weights, str):
        return np.exp((far[:, :1] - far) / weights)  # the nearest counts 1: shares are the same, and nothing overflows
    if weights == "distance":
        is_same = far == 0
        with np.errstate(divide="ignore"):
            return np.where(is_same.any(1, keepdims=True), is_same, 1 / far)
    return np.ones_like(far)
