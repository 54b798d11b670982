"""Modules that count their runs somewhere else than in a plain attribute, and act on it late."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from featstore import ModelError, StagedModel
from featstore.models.purity import check_pure
from featstore.models.tracing import traced

LATE = 100
TICKS = itertools.count()
CALLS = 0


class Tally:
    total = 0


class Ticker:
    def __init__(self) -> None:
        self.count = 0

    def tick(self) -> int:
        self.count += 1
        return self.count


def in_a_function() -> int:
    in_a_function.count += 1  # type: ignore[attr-defined]
    return int(in_a_function.count)  # type: ignore[attr-defined]


in_a_function.count = 0  # type: ignore[attr-defined]


class Keeping(nn.Module):
    shared = 0

    def __init__(self) -> None:
        super().__init__()
        self.listed, self.named, self.ticker = [0], {"runs": [0]}, Ticker()
        self.recent, self.log, self.tensors = deque([0], maxlen=1), list[str](), [torch.zeros(())]


class InAList(Keeping):
    def forward(self, values: Tensor) -> Tensor:
        self.listed[0] += 1
        return values * 2 if self.listed[0] > LATE else values + 1


class InADict(Keeping):
    def forward(self, values: Tensor) -> Tensor:
        self.named["runs"][0] += 1
        return values * 2 if self.named["runs"][0] > LATE else values + 1


class InADeque(Keeping):
    def forward(self, values: Tensor) -> Tensor:
        self.recent.append(self.recent[0] + 1)
        return values * 2 if self.recent[0] > LATE else values + 1


class InALog(Keeping):
    def forward(self, values: Tensor) -> Tensor:
        self.log.append("run")
        return values * 2 if len(self.log) > LATE else values + 1


class InAnObject(Keeping):
    def forward(self, values: Tensor) -> Tensor:
        return values * 2 if self.ticker.tick() > LATE else values + 1


class InItsClass(Keeping):
    def forward(self, values: Tensor) -> Tensor:
        type(self).shared += 1
        return values * 2 if self.shared > LATE else values + 1


class InAnotherClass(Keeping):
    def forward(self, values: Tensor) -> Tensor:
        Tally.total += 1
        return values * 2 if Tally.total > LATE else values + 1


class InAGlobal(Keeping):
    def forward(self, values: Tensor) -> Tensor:
        global CALLS
        CALLS += 1
        return values * 2 if CALLS > LATE else values + 1


class InAnIterator(Keeping):
    def forward(self, values: Tensor) -> Tensor:
        return values * 2 if next(TICKS) > LATE else values + 1


class InAFunction(Keeping):
    def forward(self, values: Tensor) -> Tensor:
        return values * 2 if in_a_function() > LATE else values + 1


class InADefault(Keeping):
    def forward(self, values: Tensor, kept: list[int] = [0]) -> Tensor:  # noqa: B006 - what is tested
        kept[0] += 1
        return values * 2 if kept[0] > LATE else values + 1


class InATensorInAList(Keeping):
    def forward(self, values: Tensor) -> Tensor:
        self.tensors[0] += 1
        return values * 2 if float(self.tensors[0]) > LATE else values + 1


def in_a_closure() -> nn.Module:
    runs = 0

    class InAClosure(nn.Module):
        def forward(self, values: Tensor) -> Tensor:
            nonlocal runs
            runs += 1
            return values * 2 if runs > LATE else values + 1

    return InAClosure()


COUNTING: list[Callable[[], nn.Module]] = [
    InAList, InADict, InADeque, InALog, InAnObject, InItsClass, InAnotherClass, InAGlobal, InAnIterator, InAFunction,
    InADefault, InATensorInAList, in_a_closure,
]  # fmt: skip


@pytest.mark.parametrize("make", COUNTING)
def test_a_module_that_counts_its_runs_wherever_is_refused_before_anything_is_stored(
    make: Callable[[], nn.Module],
) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), make(), nn.Conv2d(4, 2, 1))
    model = StagedModel.from_module(net)
    model.digest("0")
    with pytest.raises(ModelError, match=r"changes what it keeps|of which no (exact )?key can be made"):
        check_pure(model, "2" if model.digests() else "")


@pytest.mark.parametrize("make", [InAList, InALog])
def test_a_counter_in_the_forward_of_the_whole_network_is_refused_when_it_is_traced(
    make: Callable[[], nn.Module],
) -> None:
    with pytest.raises(ModelError, match=r"can't be traced: its .* is another one each time it runs \(a counter"):
        StagedModel.from_module(make())


class Noting(Keeping):
    """Keeps what it never reads, and makes tables once or anew."""

    def forward(self, values: Tensor) -> Tensor:
        global CALLS
        CALLS += 1
        self.listed[0] += 1
        self.named["runs"][0] += 1
        self.ticker.tick()
        self.seen: dict[str, Any] = {"last": [values], "grid": [torch.arange(3)]}
        self.named.setdefault("table", [3])
        return values + self.named["table"][0]


def test_counters_that_nothing_reads_don_t_keep_a_module_from_being_traced_and_stay_as_they_were() -> None:
    before, noting = CALLS, Noting()
    _, opaque = traced(nn.Sequential(nn.Conv2d(3, 4, 3), noting), training=False, opaque=frozenset())
    assert not opaque
    assert (CALLS, noting.listed, noting.named, noting.ticker.count) == (before, [0], {"runs": [0]}, 0)
    assert "seen" not in vars(noting)
