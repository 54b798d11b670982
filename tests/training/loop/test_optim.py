from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from support.tiny import VIEW, arrays, pixels, staged
from torch import Tensor, nn
from torch.optim import Optimizer

from featstore import FeatureStore, FeatureStoreError, ImageSet, StagedModel, extract
from featstore.errors import FactsDifferError
from featstore.models.backbones import outline
from featstore.models.layer_groups import LayerGroup, layer_groups
from training import Learner, build_head
from training.loop import optim
from training.loop.optim import spread
from training.standardised import SPREAD, LinearHead


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
    trained = [id(parameter) for group in built.param_groups for parameter in group["params"]]
    assert sorted(trained) == sorted(id(parameter) for parameter in model.trained_parameters())


def decay_of(built: Optimizer) -> dict[int, float]:
    return {id(each): group["weight_decay"] for group in built.param_groups for each in group["params"]}


def test_norms_and_biases_are_not_decayed_unless_that_is_asked_for() -> None:
    model = with_head("resnet18")
    model.unfreeze()
    kinds = [(type(module), name, parameter) for module in model.modules()
             for name, parameter in module.named_parameters(recurse=False)]  # fmt: skip
    found = decay_of(optim.build(model, 1e-2, optimizer="adamw", weight_decay=0.03))
    assert len(found) == len({id(parameter) for *_, parameter in kinds})
    for kind, name, parameter in kinds:
        is_free = name == "bias" or kind in (nn.BatchNorm1d, nn.BatchNorm2d)
        assert found[id(parameter)] == (0.0 if is_free else 0.03)
    everything = optim.build(model, 1e-2, optimizer="adamw", weight_decay=0.03, decay_norms=True)
    assert {*decay_of(everything).values()} == {0.03}
    assert [group["name"] for group in everything.param_groups] == ["early body", "late body", "head"]
    assert everything.param_groups[-1]["params"] == [*model.ordered[-1].parameters()]


def test_weight_decay_is_one_number_a_group_or_has_the_groups_names() -> None:
    model = with_head("resnet18")
    model.unfreeze()
    by_group = {"early body": 0.1, "late body": 0.2, "head": 0.0}
    for given in ((0.1, 0.2, 0.0), by_group):
        built = optim.build(model, 1e-2, optimizer="sgd", weight_decay=given, decay_norms=True)
        assert {group["name"]: group["weight_decay"] for group in built.param_groups} == by_group
    with pytest.raises(ValueError, match=r"weight_decay has 2 numbers; this model has 3 layer groups"):
        optim.build(model, 1e-2, optimizer="sgd", weight_decay=(0.1, 0.2))


def rate_of(built: Optimizer) -> dict[int, float]:
    return {id(each): group["lr"] for group in built.param_groups for each in group["params"]}


def test_rates_by_name_are_those_of_the_stages_below_it_and_the_longest_name_counts() -> None:
    model = with_head("resnet18")
    model.freeze_to("layer2")
    named = {"early body": 1e-6, "layer3": 1e-4, "layer4": 1e-3, "layer4.0": 5e-4, "head": 1e-2}
    rates = rate_of(optim.build(model, named, optimizer="adamw", weight_decay=0.01))
    assert len(rates) == len([*model.trained_parameters()])
    for name, parameter in model.tensors().items():
        first = next((each for each in ("layer4.0", "layer4", "layer3", "head") if name.startswith(each)), None)
        if id(parameter) in rates:
            assert first is not None
            assert rates[id(parameter)] == named[first], name
    whole = {"late body": 1e-3, "head": 1e-2}
    assert {*rate_of(optim.build(model, whole, optimizer="sgd", weight_decay=0.0)).values()} == {1e-3, 1e-2}


@pytest.mark.parametrize(
    ("lr", "message"),
    [
        (
            {"layer9": 1e-3, "head": 1e-2},
            r"lr names layer9, which resnet18 has neither as a layer group \(early body, ",
        ),
        ({"layer4": 1e-3, "head": 1e-2}, r"lr says nothing of layer3\.0.*which train\. Name all that trains"),
        ({"late body": -1e-3, "head": 1e-2}, "expected positive numbers"),
        ({"late body": "x", "head": 1e-2}, "expected numbers"),
    ],
)
def test_names_that_do_not_fit_are_refused_with_those_that_do(lr: Any, message: str) -> None:
    model = with_head("resnet18")
    model.freeze_to("layer2")
    with pytest.raises(ValueError, match=message):
        optim.build(model, lr, optimizer="adamw", weight_decay=0.01)


def test_a_fit_takes_rates_by_name_and_goes_on_with_them(tmp_path: Path) -> None:
    def learner() -> Learner:
        learn = Learner(staged(), arrays(6), head="linear", cut="layer2", quiet=True, batch_size=3)
        learn.freeze_to("layer1")
        return learn

    options: dict[str, Any] = {"lr": {"layer2": 1e-4, "head": 1e-2}, "weight_decay": {"layer2": 0.1, "head": 0.0}}
    expected = learner().fit(3, **options)

    def stop(_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        learner().fit(3, **options, checkpoint=tmp_path / "fit", on_epoch_end=stop)
    with pytest.raises(FactsDifferError, match="differs in: lr "):
        learner().fit(3, **{**options, "lr": 1e-2}, checkpoint=tmp_path / "fit", resume=True)
    history = learner().fit(3, **options, checkpoint=tmp_path / "fit", resume=True)
    assert history.losses == expected.losses
    for lr in (1e-2, None):
        with pytest.raises(ValueError, match="weight_decay names layer9"):
            learner().fit(1, lr, weight_decay={"layer9": 0.1})


def test_unfreezing_step_by_step_keeps_each_groups_rate() -> None:
    rates: list[dict[str, float]] = []

    def make(groups: Iterable[dict[str, Any]]) -> Optimizer:
        made = torch.optim.SGD(groups, lr=1.0)
        rates.append({group["name"]: group["lr"] for group in made.param_groups})
        return made

    learn = Learner(staged(), arrays(6), head="linear", cut="layer2", quiet=True, optimizer=make)
    before = {name: each.clone() for name, each in learn.model.tensors().items()}
    for cut, moved in (("layer2", {"head"}), ("layer1", {"head", "layer2"}), (None, {"head", "layer1", "layer2"})):
        learn.unfreeze() if cut is None else learn.freeze_to(cut)
        learn.fit(1, lr=(1e-5, 1e-3), schedule="constant")
        now = learn.model.tensors()
        assert {name.partition(".")[0] for name in before if not torch.equal(now[name], before[name])} == moved
    last = rates[-1]
    assert all(each.items() <= last.items() for each in rates)
    assert (last["early body"], last["head"]) == (1e-5, 1e-3)


@pytest.mark.parametrize(("optimizer", "lr", "weight_decay"), [("adam", 3e-2, 0.1), ("sgd", 5e-3, 0.01)])
def test_a_linear_head_comes_to_the_optimum_of_logistic_regression(
    tmp_path: Path, optimizer: str, lr: float, weight_decay: float
) -> None:
    count = 60
    images = ImageSet.from_arrays(pixels(count), [row % 3 for row in range(count)], splits=["train"] * count)
    store = FeatureStore(tmp_path / "features")
    extract(staged(), images, store, cuts=["layer2"], dtype="float32", device="cpu", workers=0)
    targets = torch.tensor([row % 3 for row in range(count)])
    rows = StandardScaler().fit_transform(store.features(images, store.sets()[0]).tensor().double().numpy())
    reference = LogisticRegression(C=10 / (weight_decay * count), tol=1e-10, max_iter=10_000).fit(rows, targets)

    def objective(weight: Tensor, bias: Tensor) -> float:
        loss = nn.functional.cross_entropy(torch.tensor(rows) @ weight.T + bias, targets)
        return float(loss + weight_decay / 10 / 2 * weight.square().sum())

    learn = Learner(staged(), images, store, cut="layer2", head="linear", optimizer=optimizer, quiet=True)
    learn.fit(500, lr=lr, weight_decay=weight_decay, schedule="cosine")
    head = learn.model.head
    assert isinstance(head, LinearHead)
    found = objective(head.weight.detach().double() * SPREAD, head.bias.detach().double())
    best = objective(torch.tensor(reference.coef_), torch.tensor(reference.intercept_))
    assert best - 1e-6 <= found <= best + 1e-4


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


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda groups: torch.optim.SGD([each for group in groups for each in group["params"]], lr=0.1),
            r"SGD runs at 0\.1\. ",
        ),
        (lambda groups: torch.optim.SGD(list(groups)[:1], lr=0.1), r"SGD lacks [\d,]+ of the parameters that train"),
    ],
)
def test_an_optimizer_that_leaves_out_rates_or_parameters_is_refused(make: Any, message: str) -> None:
    model = staged().with_head(nn.Linear(24, 3), cut="layer2", reduction="concat")
    with pytest.raises(ValueError, match=message + ".*lambda groups"):
        optim.build(model, 0.02, optimizer=make, weight_decay=0.01)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda groups: torch.optim.LBFGS([each for group in groups for each in group["params"]]),
            ValueError,
            r"LBFGS computes the loss itself.* Choose another, such as adamw",
        ),
        (torch.optim.LBFGS, ValueError, "LBFGS fails on the parameter groups .LBFGS doesn't support per-parameter"),
        (lambda groups: None, TypeError, r"made None; expected an instance of torch\.optim\.Optimizer\. Return one"),
    ],
)
def test_what_takes_no_groups_or_asks_for_the_loss_is_refused(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Learner(staged(), arrays(6), head="linear", optimizer=make, device="cpu", quiet=True).fit(1, lr=1e-3)
