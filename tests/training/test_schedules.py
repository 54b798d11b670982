import math

import pytest
import torch
from support.tiny import arrays, staged
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR

from training import Learner, schedules

MAX_LRS = [1e-4, 1e-3, 1e-2]


def sgd(momentum: float = 0.9) -> Optimizer:
    return SGD([{"params": [parameter]} for parameter in three_parameters()], lr=0.5, momentum=momentum)


def adamw() -> Optimizer:
    return AdamW([{"params": [parameter]} for parameter in three_parameters()], lr=0.5)


def three_parameters() -> list[Tensor]:
    return [nn.Parameter(torch.zeros(1)) for _ in range(3)]


def groups_by_step(optimizer: Optimizer, schedule: LRScheduler, num_steps: int) -> list[list[tuple[float, object]]]:
    """(learning rate, momentum or betas) of every group at every step."""
    steps = []
    for _ in range(num_steps):
        groups = optimizer.param_groups
        steps.append([(group["lr"], group.get("momentum", group.get("betas"))) for group in groups])
        optimizer.step()
        schedule.step()
    return steps


@pytest.mark.parametrize("make", [sgd, adamw])
@pytest.mark.parametrize("total_steps", [2, 3, 4, 5, 10, 37, 100])
def test_one_cycle_is_torchs_with_its_defaults_at_every_step(make: type[Optimizer], total_steps: int) -> None:
    ours, torchs = make(), make()  # type: ignore[call-arg]
    schedule = schedules.build("one_cycle", ours, MAX_LRS, total_steps)
    reference = OneCycleLR(torchs, MAX_LRS, total_steps=total_steps)
    assert groups_by_step(ours, schedule, total_steps) == groups_by_step(torchs, reference, total_steps)


def test_one_cycle_rises_for_three_tenths_and_falls_along_a_cosine() -> None:
    optimizer = sgd()
    steps = groups_by_step(optimizer, schedules.build("one_cycle", optimizer, MAX_LRS, 100), 100)
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


@pytest.mark.parametrize("name", schedules.SCHEDULES)
@pytest.mark.parametrize("total_steps", [1, 2, 3])
def test_a_fit_of_very_few_steps_moves_the_weights(name: str, total_steps: int) -> None:
    weight = nn.Parameter(torch.ones(4))
    optimizer = AdamW([weight], lr=0.1)
    schedule = schedules.build(name, optimizer, [0.1], total_steps)
    for _ in range(total_steps):
        optimizer.zero_grad()
        weight.sum().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    assert (weight < 0.95).all()


def test_a_cycle_of_one_step_takes_it_at_the_peak() -> None:
    optimizer = sgd()
    [groups] = groups_by_step(optimizer, schedules.build("one_cycle", optimizer, MAX_LRS, 1), 1)
    assert groups == [(lr, 0.9) for lr in MAX_LRS]


def test_constant_stays_at_the_peak_and_keeps_momentum() -> None:
    optimizer = adamw()
    steps = groups_by_step(optimizer, schedules.build("constant", optimizer, MAX_LRS, 7), 7)
    assert steps == [[(lr, (0.9, 0.999)) for lr in MAX_LRS]] * 7


@pytest.mark.parametrize("first", schedules.SCHEDULES)
@pytest.mark.parametrize("second", schedules.SCHEDULES)
def test_a_second_schedule_does_not_inherit_the_rates_of_the_first(first: str, second: str) -> None:
    used, fresh = adamw(), adamw()
    groups_by_step(used, schedules.build(first, used, [7.0, 8.0, 9.0], 5), 5)
    again = groups_by_step(used, schedules.build(second, used, MAX_LRS, 4), 4)
    expected = groups_by_step(fresh, schedules.build(second, fresh, MAX_LRS, 4), 4)
    assert [[lr for lr, _ in groups] for groups in again] == [[lr for lr, _ in groups] for groups in expected]


def test_one_cycle_of_an_optimizer_without_momentum_cycles_the_rate_alone() -> None:
    optimizer, with_momentum = Adagrad(three_parameters(), lr=1.0), SGD(three_parameters(), lr=1.0)
    ours = groups_by_step(optimizer, schedules.build("one_cycle", optimizer, [1e-2], 10), 10)
    expected = groups_by_step(with_momentum, OneCycleLR(with_momentum, 1e-2, total_steps=10), 10)
    assert [group[0][0] for group in ours] == [group[0][0] for group in expected]


def test_the_callers_rates_are_left_as_they_were() -> None:
    max_lrs = list(MAX_LRS)
    schedules.build("one_cycle", sgd(), max_lrs, 10)
    schedules.build("constant", sgd(), tuple(max_lrs), 10)
    assert max_lrs == MAX_LRS


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="'cosine' is unknown; pass one of constant, one_cycle"):
        schedules.build("cosine", sgd(), MAX_LRS, 10)
    for name in schedules.SCHEDULES:
        with pytest.raises(ValueError, match="2 learning rates came for an optimizer of 3 parameter groups"):
            schedules.build(name, sgd(), MAX_LRS[:2], 10)
        with pytest.raises(ValueError, match="total_steps is 0"):
            schedules.build(name, sgd(), MAX_LRS, 0)


def test_a_new_schedule_is_a_function_and_its_name_in_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    def falling(optimizer: Optimizer, max_lrs: list[float], total_steps: int) -> LRScheduler:
        for group, lr in zip(optimizer.param_groups, max_lrs, strict=True):
            group["lr"] = group["initial_lr"] = lr
        return LambdaLR(optimizer, lambda step: 1 - step / total_steps)

    monkeypatch.setitem(schedules.SCHEDULES, "falling", falling)
    learn = Learner(staged(), arrays(12), head="mlp", batch_size=4, quiet=True, device="cpu")
    history = learn.fit(2, lr=0.1, schedule="falling")  # 6 steps, the third and the last end an epoch
    assert [record["lr"] for record in history.records] == pytest.approx([0.1 * 4 / 6, 0.1 * 1 / 6])
    with pytest.raises(ValueError, match="'cosine' is unknown; pass one of constant, one_cycle, falling"):
        learn.fit(1, lr=0.1, schedule="cosine")
