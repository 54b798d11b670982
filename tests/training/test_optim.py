from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from support.tiny import VIEW, arrays, staged
from torch import nn

from featstore import FeatureStoreError, StagedModel
from featstore.models.backbones import outline
from featstore.models.layer_groups import LayerGroup, layer_groups
from training import Learner, build_head, optim
from training.optim import spread


def num_parameters(model: StagedModel, group: LayerGroup) -> int:
    return sum(parameter.numel() for place in group.stages for parameter in model.stages[place].parameters())


def with_head(name: str, classes: int = 10, cut: str | None = None) -> StagedModel:
    model = outline(name)
    cut = cut or model.default_cut
    pool = model.pool(cut)
    return model.with_head(build_head("concat", pool.shape(model.shape(cut)), classes, 0), cut=cut)


# What fastai 0.7.2 counted in its three groups, with its default head of 10 classes.
@pytest.mark.parametrize(
    ("name", "early", "late", "head"),
    [
        ("resnet18", 683_072, 10_493_440, 533_002),
        ("resnet34", 1_347_904, 19_936_768, 533_002),
        ("resnet50", 1_444_928, 22_063_104, 2_112_010),
    ],
)
def test_the_groups_of_resnets_are_those_of_fastai(name: str, early: int, late: int, head: int) -> None:
    model = with_head(name)
    groups = layer_groups(model)
    assert [group.name for group in groups] == ["early body", "late body", "head"]
    assert [num_parameters(model, group) for group in groups] == [early, late, head]


def test_a_resnet_that_is_cut_earlier_is_parted_at_the_same_place() -> None:
    model = with_head("resnet18", cut="layer3")
    assert num_parameters(model, layer_groups(model)[0]) == 683_072
    shallow = with_head("resnet18", cut="layer2")
    assert sum(num_parameters(shallow, group) for group in layer_groups(shallow)[:-1]) == 683_072


@pytest.mark.parametrize("name", ["squeezenet1_1", "vit_b_32"])
def test_other_bodies_are_parted_in_the_middle_and_lose_no_parameter(name: str) -> None:
    for model in (with_head(name), outline(name)):
        groups = layer_groups(model)
        assert [group.name for group in groups] == ["early body", "late body", "head"]
        assert [place for group in groups for place in group.stages] == list(range(len(model.stages)))
        assert sum(num_parameters(model, group) for group in groups) == sum(each.numel() for each in model.parameters())
        assert all(num_parameters(model, group) for group in groups)


def test_groups_without_parameters_are_dropped() -> None:
    one = StagedModel.from_stages({"flatten": nn.Flatten(), "fc": nn.Linear(3 * 16 * 16, 2)}, view=VIEW)
    assert [group.name for group in layer_groups(one)] == ["head"]
    two = StagedModel.from_stages(
        {"conv": nn.Conv2d(3, 4, 3), "relu": nn.ReLU(), "flatten": nn.Flatten(), "fc": nn.Linear(784, 2)}, view=VIEW
    )
    names = [group.name for group in layer_groups(two)]
    assert names in (["early body", "head"], ["late body", "head"])
    none = StagedModel.from_stages({"relu": nn.ReLU(), "flatten": nn.Flatten()}, view=VIEW)
    with pytest.raises(ValueError, match="no parameters"):
        layer_groups(none)


def test_a_trunk_that_is_absent_takes_the_same_rates() -> None:
    here = staged()
    stages = [
        {"name": name, "layout": here.layout(name), "shape": list(here.shape(name)), "digest": "0" * 64}
        for name in here.cut_points[: here.index("layer2") + 1]
    ]
    absent = StagedModel.absent(stages, view=VIEW, name="net", class_tokens=0)
    model = absent.with_head(nn.Linear(24, 2), cut="layer2", reduction="concat")
    built = optim.build(model, (1e-5, 1e-4, 1e-3), optimizer="sgd", weight_decay=0.0)
    assert [group["lr"] for group in built.param_groups] == [1e-3]


def test_rates_are_spread_as_fastai_users_wrote_them() -> None:
    assert spread((1e-4, 1e-2), 3) == pytest.approx([1e-4, 1e-3, 1e-2], rel=1e-12)
    assert spread([1e-4, 1e-3, 1e-2], 3) == [1e-4, 1e-3, 1e-2]
    assert spread(1e-2, 3) == [1e-2] * 3
    assert spread([1e-2], 3) == [1e-2] * 3
    assert spread((1e-4, 1e-2), 2) == [1e-4, 1e-2]
    assert spread((1e-4, 1e-2), 1) == [1e-2]
    assert spread((1e-2, 1e-4), 3) == pytest.approx([1e-2, 1e-3, 1e-4], rel=1e-12)
    assert spread((1e-5, 1e-1), 5) == pytest.approx([1e-5, 1e-4, 1e-3, 1e-2, 1e-1], rel=1e-12)


def test_numbers_of_numpy_are_rates_too() -> None:
    assert spread(np.float32(0.5), 2) == [0.5, 0.5]  # type: ignore[arg-type]
    assert spread(np.array([0.5, 0.25]), 2) == [0.5, 0.25]  # type: ignore[arg-type]


def test_a_caller_keeps_the_list_as_it_was() -> None:
    rates = [1e-4, 1e-2]
    spread(rates, 3)
    assert rates == [1e-4, 1e-2]


@pytest.mark.parametrize("lr", [0.0, -1e-3, math.nan, math.inf, [], (1e-3, 0.0), "fast", [[1e-3]], None])
def test_a_rate_that_is_no_positive_number_is_refused(lr: object) -> None:
    with pytest.raises(ValueError, match=r"lr is .*; expected (positive )?numbers"):
        spread(lr, 3)  # type: ignore[arg-type]


def test_another_number_of_rates_than_groups_is_refused_with_both_numbers() -> None:
    with pytest.raises(ValueError, match="lr has 4 rates; this model has 3 layer groups, frozen ones included"):
        spread([1e-3] * 4, 3)


@pytest.mark.parametrize(
    ("freeze_to", "expected"),
    [
        ("layer4", {"head": 1e-2}),
        ("layer3", {"late body": 1e-3, "head": 1e-2}),
        ("layer2", {"late body": 1e-3, "head": 1e-2}),
        ("layer1", {"early body": 1e-4, "late body": 1e-3, "head": 1e-2}),
        (None, {"early body": 1e-4, "late body": 1e-3, "head": 1e-2}),
    ],
)
def test_freezing_never_changes_another_groups_rate(freeze_to: str | None, expected: dict[str, float]) -> None:
    model = with_head("resnet18")
    if freeze_to is None:
        model.unfreeze()
    else:
        model.freeze_to(freeze_to)
    built = optim.build(model, (1e-4, 1e-2), optimizer="adamw", weight_decay=0.03)
    assert {group["name"]: group["lr"] for group in built.param_groups} == pytest.approx(expected, rel=1e-12)
    assert {group["weight_decay"] for group in built.param_groups} == {0.03}
    trained = [id(parameter) for group in built.param_groups for parameter in group["params"]]
    assert trained == [id(parameter) for parameter in model.trained_parameters()]


def test_optimizers_have_names_or_are_your_own() -> None:
    model = staged().with_head(nn.Linear(24, 2), cut="layer2", reduction="concat")
    types = {name: type(optim.build(model, 1e-2, optimizer=name, weight_decay=0.0)) for name in optim.OPTIMIZERS}
    assert types == {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam, "sgd": torch.optim.SGD}
    sgd = optim.build(model, 1e-2, optimizer="sgd", weight_decay=0.0)
    assert (sgd.param_groups[0]["momentum"], sgd.param_groups[0]["lr"]) == (0.9, 1e-2)
    own = optim.build(model, 1e-2, optimizer=lambda groups: torch.optim.RMSprop(groups, lr=1.0), weight_decay=0.0)
    assert own.param_groups[0]["lr"] == 1e-2
    with pytest.raises(ValueError, match=r"'lion' is no optimizer\. The optimizers are adamw, adam, sgd"):
        optim.build(model, 1e-2, optimizer="lion", weight_decay=0.0)


def test_nothing_left_to_train_is_refused() -> None:
    model = staged()
    model.freeze_to(model.cut_points[-1])
    with pytest.raises(ValueError, match=r"Everything is frozen.*freeze_to\(\.\.\.\) or unfreeze\(\)"):
        optim.build(model, 1e-2, optimizer="sgd", weight_decay=0.0)


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
def test_training_where_gradients_are_switched_off_is_refused_and_goes_on_outside(off: Callable[[], Any]) -> None:
    learn = Learner(staged(), arrays(6), head="linear", quiet=True)
    with off():
        for train in (lambda: learn.fit(1, lr=1e-3), learn.lr_find):
            with pytest.raises(FeatureStoreError, match=r"Gradients are switched off here, .* outside of that block\."):
                train()
        assert len(learn.predict(arrays(6))) == 6
    assert len(learn.fit(1, lr=1e-3).records) == 1


def test_a_learner_made_for_inference_alone_is_refused() -> None:
    with torch.inference_mode():
        learn = Learner(staged(), arrays(6), head="linear", quiet=True)
    with pytest.raises(FeatureStoreError, match=r"net has parameters that were made inside torch.inference_mode"):
        learn.fit(1, lr=1e-3)
