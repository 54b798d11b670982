from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.tiny import arrays, staged
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, AdamW, Optimizer
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    CosineAnnealingWarmRestarts,
    LinearLR,
    LRScheduler,
    OneCycleLR,
    SequentialLR,
    StepLR,
)

from training import Learner, schedules
from training.schedules import Course, Setting, cycle_lengths

MAX_LRS = [1e-4, 1e-3, 1e-2]

Groups = list[tuple[float, object]]


def sgd(momentum: float = 0.9) -> Optimizer:
    return SGD([{"params": [parameter]} for parameter in three_parameters()], lr=0.5, momentum=momentum)


def adamw() -> Optimizer:
    return AdamW([{"params": [parameter]} for parameter in three_parameters()], lr=0.5)


def three_parameters() -> list[Tensor]:
    return [nn.Parameter(torch.zeros(1)) for _ in range(3)]


def course(schedule: str, *cycles: int, num_steps: int = 1, max_lrs: list[float] = MAX_LRS) -> Course:
    return Course(schedule=schedule, max_lrs=max_lrs, cycles=cycles, num_steps=num_steps)


def settings_of(optimizer: Optimizer) -> Groups:
    """(learning rate, momentum or betas) of every group."""
    return [(group["lr"], group.get("momentum", group.get("betas"))) for group in optimizer.param_groups]


def gone_through(optimizer: Optimizer, given: Course) -> list[Groups]:
    steps, step = [], 0
    for epoch in range(given.num_epochs):
        step = 0 if given.begins_cycle(epoch) else step
        for _ in range(given.num_steps):
            given.set(optimizer, epoch, step)
            steps.append(settings_of(optimizer))
            step += 1
    return steps


def stepped(optimizer: Optimizer, scheduler: LRScheduler, num_steps: int) -> list[Groups]:
    steps = []
    for _ in range(num_steps):
        steps.append(settings_of(optimizer))
        optimizer.step()
        scheduler.step()
    return steps


def rates(schedule: Callable[..., Setting], num_steps: int, **options: float) -> list[float]:
    return [schedule(1.0, step, num_steps, **options).lr for step in range(num_steps)]


@pytest.mark.parametrize("make", [sgd, adamw])
@pytest.mark.parametrize("num_steps", [2, 3, 4, 5, 10, 37, 100])
def test_one_cycle_is_torchs_with_its_defaults_at_every_step(make: Callable[[], Optimizer], num_steps: int) -> None:
    ours, torchs = make(), make()
    reference = OneCycleLR(torchs, MAX_LRS, total_steps=num_steps)
    assert gone_through(ours, course("one_cycle", 1, num_steps=num_steps)) == stepped(torchs, reference, num_steps)


def test_one_cycle_rises_for_three_tenths_and_falls_along_a_cosine() -> None:
    steps = gone_through(sgd(), course("one_cycle", 1, num_steps=100))
    for step, groups in enumerate(steps):
        for peak, (lr, momentum) in zip(MAX_LRS, groups, strict=True):
            if step <= 29:
                start, end, progress = peak / 25, peak, step / 29
                low, high = 0.95, 0.85
            else:
                start, end, progress = peak, peak / 25e4, (step - 29) / 70
                low, high = 0.85, 0.95
            share = (1 - math.cos(math.pi * progress)) / 2
            assert lr == pytest.approx(start + (end - start) * share, rel=1e-9)
            assert momentum == pytest.approx(low + (high - low) * share, rel=1e-9)


@pytest.mark.parametrize(("length", "factor"), [(1, 1), (1, 2), (2, 2), (1, 3)])
@pytest.mark.parametrize("num_steps", [1, 4, 7])
def test_cosine_in_cycles_is_torchs_warm_restarts_at_every_step(length: int, factor: int, num_steps: int) -> None:
    ours, torchs = sgd(), sgd()
    for group, lr in zip(torchs.param_groups, MAX_LRS, strict=True):
        group["lr"] = lr
    cycles = cycle_lengths(3, length, factor)
    reference = CosineAnnealingWarmRestarts(torchs, T_0=length * num_steps, T_mult=factor)
    expected = stepped(torchs, reference, sum(cycles) * num_steps)
    assert gone_through(ours, course("cosine", *cycles, num_steps=num_steps)) == expected


def test_cycles_are_as_long_as_fastais() -> None:
    assert [sum(cycle_lengths(*each)) for each in [(3, 1, 2), (3, 2, 2), (4, 3, 2)]] == [7, 14, 45]


def test_cosine_has_the_numbers_of_fastai_without_its_hidden_warm_up() -> None:
    expected = [1, 0.975528, 0.904508, 0.793893, 0.654508, 0.5, 0.345492, 0.206107, 0.095492, 0.024472]
    assert rates(schedules.cosine, 10) == pytest.approx(expected, abs=1e-6)
    [after_five] = gone_through(sgd(), course("cosine", 1, num_steps=10))[5:6]
    assert [lr for lr, _ in after_five] == pytest.approx([5e-5, 5e-4, 5e-3])
    forty = rates(schedules.cosine, 40)
    assert [*forty[2:4], *forty[38:]] == pytest.approx([0.993844, 0.986185, 0.006156, 0.001541], abs=1e-6)


def test_triangular_has_the_rates_of_fastai_and_its_momentum_in_step_with_them() -> None:
    found = rates(schedules.triangular, 16)
    assert [*found[:5], found[-1]] == pytest.approx([0.25, 0.625, 1, 0.946429, 0.892857, 0.303571], abs=1e-6)
    steep = [schedules.triangular(1.0, step, 40, div=32, cut_div=10) for step in range(40)]
    first = [0.03125, 0.273438, 0.515625, 0.757812, 1, 0.97309]
    assert [each.lr for each in steep[:6]] == pytest.approx(first, abs=1e-6)
    momenta = [each.momentum for each in steep]
    assert momenta[:6] == pytest.approx([0.95, 0.925, 0.9, 0.875, 0.85, 0.852778], abs=1e-6)
    assert momenta[-1] == pytest.approx(0.95 - 0.1 / 36)


@pytest.mark.parametrize("num_steps", [10, 25, 40])
def test_warm_ups_are_those_of_torch(num_steps: int) -> None:
    start = num_steps // 10
    falls: dict[str, Callable[[Optimizer], LRScheduler]] = {
        "linear_warmup": lambda optimizer: LinearLR(optimizer, 1.0, 0.0, total_iters=num_steps - start),
        "cosine_warmup": lambda optimizer: CosineAnnealingLR(optimizer, T_max=num_steps - start),
    }
    for name, make in falls.items():
        optimizer = SGD(three_parameters(), lr=1.0)
        rise = LinearLR(optimizer, 1 / (start + 1), 1.0, total_iters=start)
        reference = SequentialLR(optimizer, [rise, make(optimizer)], milestones=[start])
        expected = [groups[0][0] for groups in stepped(optimizer, reference, num_steps)]
        # torch goes from one rate to the next, which rounds each time.
        assert rates(schedules.SCHEDULES[name], num_steps) == pytest.approx(expected, rel=1e-9)


def test_steps_go_down_as_torchs_do() -> None:
    optimizer = SGD(three_parameters(), lr=1.0)
    expected = [groups[0][0] for groups in stepped(optimizer, StepLR(optimizer, step_size=4, gamma=0.1), 12)]
    assert rates(schedules.step_down, 12) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", schedules.SCHEDULES)
@pytest.mark.parametrize("num_steps", [1, 2, 3, 7, 30])
def test_no_step_of_any_schedule_is_wasted_or_above_the_highest_rate(name: str, num_steps: int) -> None:
    found = rates(schedules.SCHEDULES[name], num_steps)
    assert all(0 < lr <= 1 for lr in found)
    assert max(found) > 0.9 or num_steps in (2, 3)


@pytest.mark.parametrize("name", schedules.SCHEDULES)
@pytest.mark.parametrize("num_steps", [1, 2, 3])
def test_a_fit_of_very_few_steps_moves_the_weights(name: str, num_steps: int) -> None:
    weight = nn.Parameter(torch.ones(4))
    optimizer = AdamW([weight], lr=0.1)
    for step in range(num_steps):
        course(name, 1, num_steps=num_steps, max_lrs=[0.1]).set(optimizer, 0, step)
        optimizer.zero_grad()
        weight.sum().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    assert (weight < 0.95).all()


def test_a_cycle_of_one_step_takes_it_at_the_highest_rate() -> None:
    for name in schedules.SCHEDULES:
        [groups] = gone_through(sgd(), course(name, 1))
        assert groups == [(lr, 0.9) for lr in MAX_LRS]


def test_constant_stays_at_the_highest_rate_and_keeps_momentum() -> None:
    steps = gone_through(adamw(), course("constant", 1, num_steps=7))
    assert steps == [[(lr, (0.9, 0.999)) for lr in MAX_LRS]] * 7


@pytest.mark.parametrize("make", [Adagrad, SGD])  # which has a momentum, of 0
def test_one_cycle_of_an_optimizer_without_momentum_cycles_the_rate_alone(make: Any) -> None:
    optimizer, with_momentum = make(three_parameters(), lr=1.0), SGD(three_parameters(), lr=1.0, momentum=0.9)
    ours = gone_through(optimizer, course("one_cycle", 1, num_steps=10, max_lrs=[1e-2]))
    expected = stepped(with_momentum, OneCycleLR(with_momentum, 1e-2, total_steps=10), 10)
    assert [group[0][0] for group in ours] == [group[0][0] for group in expected]
    assert not optimizer.param_groups[0].get("momentum")


def test_what_does_not_fit_is_refused() -> None:
    names = "constant, cosine, one_cycle, triangular, linear_warmup, cosine_warmup, step"
    with pytest.raises(ValueError, match=f"'sgdr' is unknown; pass one of {names}"):
        course("sgdr", 1)
    with pytest.raises(ValueError, match="2 learning rates came for an optimizer of 3 parameter groups"):
        course("cosine", 1, max_lrs=MAX_LRS[:2]).set(sgd(), 0, 0)
    with pytest.raises(ValueError, match="each needs at least 1: is there a training batch"):
        course("cosine", 1, num_steps=0)
    with pytest.raises(ValueError, match="each needs at least 1"):
        course("cosine", 1, 0)


def test_a_new_schedule_is_a_function_and_its_name_in_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    def falling(max_lr: float, step: int, num_steps: int) -> Setting:
        return Setting(max_lr * (1 - step / num_steps))

    monkeypatch.setitem(schedules.SCHEDULES, "falling", falling)
    learn = Learner(staged(), arrays(12), head="mlp", batch_size=4, quiet=True, device="cpu")
    history = learn.fit(2, lr=0.1, schedule="falling")  # 6 steps, the third and the last end an epoch
    assert [record["lr"] for record in history.records] == pytest.approx([0.1 * 4 / 6, 0.1 * 1 / 6])
    with pytest.raises(ValueError, match=r"'sgdr' is unknown; pass one of constant.*, falling"):
        learn.fit(1, lr=0.1, schedule="sgdr")
