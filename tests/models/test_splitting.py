from __future__ import annotations

import pytest
import torch
from support.splitting import check_split, checked_cuts, randomise
from torch import Tensor, nn

from featstore import StagedModel, View


class Blank(nn.Module):
    def forward(self, values: Tensor) -> Tensor:
        return values * 0 + 1


class Idle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(6, 6))

    def forward(self, values: Tensor) -> Tensor:
        return values + 0 * self.weight


def small(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), *layers, nn.Flatten(), nn.LazyLinear(5)
    )


def images() -> Tensor:
    return torch.randn((3, 3, 8, 8), generator=torch.Generator().manual_seed(0))


def staged(module: nn.Module) -> StagedModel:
    module(images())
    return StagedModel.from_module(module)


def test_a_sound_model_passes_and_is_left_as_it_was() -> None:
    module = small(nn.Conv2d(4, 4, 3), nn.Dropout())
    model = staged(module)
    check_split(model, images(), module)
    before = {name: tensor.clone() for name, tensor in model.tensors().items()}
    modes = {name: part.training for name, part in model.named_modules()}
    passed = list(checked_cuts(model, images(), module))
    assert [cut.name for cut in passed] == model.cut_points
    assert passed[0].shape == (4, 6, 6)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.tensors().items())
    assert {name: part.training for name, part in model.named_modules()} == modes


def test_images_that_the_model_cannot_tell_apart_fail() -> None:
    with pytest.raises(AssertionError, match="logits of two images"):
        check_split(staged(small(Blank())), images())


def test_a_stage_that_changes_nothing_fails() -> None:
    with pytest.raises(AssertionError, match="3 of sequential changes the logits"):
        check_split(staged(small(Idle())), images())


def test_a_stage_in_front_of_a_norm_passes_though_the_norm_undoes_a_common_factor() -> None:
    check_split(staged(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.LayerNorm((4, 6, 6)))), images())


def test_a_parameter_in_two_stages_fails() -> None:
    first, second = small(), small()
    second[0] = first[0]
    stages = [stage for module in (first, second) for stage in staged(module).stages]
    model = StagedModel(stages, view=View(), name="twice")  # type: ignore[arg-type]
    with pytest.raises(AssertionError, match="in more than one stage"):
        list(checked_cuts(model, images()))


def test_a_model_with_frozen_stages_fails() -> None:
    model = staged(small())
    model.freeze_to(model.cut_points[0])
    with pytest.raises(AssertionError, match="frozen"):
        check_split(model, images())


def test_stages_that_are_not_the_module_fail() -> None:
    module = small()
    model = staged(module)
    randomise(model, seed=1)
    other = small()
    other(images())
    with pytest.raises(AssertionError, match=r"isn't model\(x\)"):
        list(checked_cuts(model, images(), other))
