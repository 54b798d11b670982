"""StagedModel: cuts, digests, shapes, freezing and heads.

Long, since all cuts, freezes and heads are those of the same few tiny networks.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from support.splitting import randomise
from torch import Tensor, nn
from torchvision.models.convnext import CNBlockConfig, ConvNeXt

from featstore import ModelError, StagedModel, View, backbone
from featstore.models.backbones import outline
from featstore.models.modes import random_states
from featstore.models.stages import AbsentStage

VIEW = View(size=12, resize=14)


class Net(nn.Module):
    """Three blocks with batch norm and dropout, a vector, scores."""

    def __init__(self) -> None:
        super().__init__()
        self.layer1 = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
        self.layer2 = nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.Dropout2d(0.5))
        self.layer3 = nn.Sequential(nn.Conv2d(6, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.fc = nn.Linear(8, 5)

    def forward(self, values: Tensor) -> Tensor:
        values = self.layer3(self.layer2(self.layer1(values))).mean((2, 3))
        values = F.dropout(values, 0.5, training=self.training)
        scores: Tensor = self.fc(values)
        return scores


def net() -> Net:
    module = Net()
    randomise(module, 0)
    return module.eval()


def staged(module: nn.Module | None = None) -> StagedModel:
    return StagedModel.from_module(module or net(), view=VIEW)


def images(num: int = 4, size: int = 12) -> Tensor:
    return torch.randn((num, 3, size, size), generator=torch.Generator().manual_seed(1))


def everything(module: nn.Module) -> list[Any]:
    """All that a caller could find changed in a module."""
    return [
        [(name, tensor.clone(), id(tensor), tensor.data_ptr()) for name, tensor in module.state_dict().items()],
        [(name, parameter.requires_grad, id(parameter)) for name, parameter in module.named_parameters()],
        [(name, part.training, id(part), dict(vars(part)).keys()) for name, part in module.named_modules()],
    ]


def same(before: list[Any], after: list[Any]) -> bool:
    return before[1:] == after[1:] and all(
        one[0] == other[0] and torch.equal(one[1], other[1]) and one[3] == other[3]
        for one, other in zip(before[0], after[0], strict=True)
    )


# ------------------------------------------------------------------------------------------------ cuts and their names


def test_an_unknown_cut_is_refused_with_the_list_of_cuts() -> None:
    with pytest.raises(ValueError, match=r"net has no cut 'layer9'. Its cuts are layer1.0, layer1.1, layer1, layer2.0"):
        staged().trunk("layer9")


def test_a_number_for_a_cut_is_refused_with_the_new_spelling() -> None:
    with pytest.raises(TypeError, match=r'6 is no name of a cut. .* freeze_to\("layer3"\). unfreeze\(\) trains'):
        staged().freeze_to(6)  # type: ignore[arg-type]


def test_from_stages_names_the_cuts() -> None:
    module = net()
    model = StagedModel.from_stages({"early": module.layer1, "late": nn.Sequential(module.layer2, module.layer3)})
    assert [model.canonical(name) for name in ("early", "late", "late.0")] == ["early", "late", "late.0"]
    assert torch.equal(model(images()), module.layer3(module.layer2(module.layer1(images()))))


@pytest.mark.parametrize(
    ("name", "cut", "shape"),
    [
        ("resnet18", "layer4", (512, 7, 7)),
        ("resnet50", "layer4", (2048, 7, 7)),
        ("squeezenet1_0", "features.12", (512, 13, 13)),
        ("vit_b_32", "encoder.ln", (50, 768)),
        ("vit_h_14", "encoder.ln", (257, 1280)),
    ],
)
def test_the_default_cut_is_the_last_value_with_positions(name: str, cut: str, shape: tuple[int, ...]) -> None:
    model = outline(name)
    assert model.default_cut == cut
    assert model.shape(cut) == shape


def without(name: str, head: str) -> nn.Module:
    module: nn.Module = torchvision.models.get_model(name, weights=None)
    setattr(module, head, nn.Identity())
    return module


@pytest.mark.parametrize(
    ("make", "cut", "shape"),
    [
        (lambda: without("resnet18", "fc"), "layer4", (512, 7, 7)),
        (lambda: without("resnet50", "fc"), "layer4", (2048, 7, 7)),
        (lambda: nn.Sequential(*list(torchvision.models.resnet18(weights=None).children())[:-1]), "7", (512, 7, 7)),
        (lambda: nn.Sequential(*list(torchvision.models.resnet18(weights=None).children())[:-2]), "7", (512, 7, 7)),
        (lambda: torchvision.models.squeezenet1_1(weights=None).features, "12", (512, 13, 13)),
        (lambda: without("vit_b_32", "heads"), "encoder", (50, 768)),
        (lambda: without("densenet121", "classifier"), "relu", (1024, 7, 7)),
        (lambda: without("efficientnet_b0", "classifier"), "features", (1280, 7, 7)),
        (lambda: without("swin_t", "head"), "permute", (768, 7, 7)),
    ],
)
def test_without_its_classifier_a_network_is_cut_where_it_is_with_it(
    make: Callable[[], nn.Module], cut: str, shape: tuple[int, ...]
) -> None:
    with torch.device("meta"):
        model = StagedModel.from_module(make())
    assert (model.default_cut, model.shape(model.default_cut)) == (cut, shape)


@pytest.mark.parametrize(
    ("name", "cut"),
    [("resnet18", "layer4"), ("squeezenet1_1", "features"), ("vit_b_32", "encoder"), ("vgg11", "features")],
)
def test_a_classifier_of_positions_or_of_a_vector_comes_after_the_default_cut(name: str, cut: str) -> None:
    with torch.device("meta"):
        model = StagedModel.from_module(torchvision.models.get_model(name, weights=None))
    assert model.default_cut == cut


@pytest.mark.parametrize(
    ("layers", "cut"),
    [
        ([nn.Conv2d(3, 4, 3), nn.ReLU()], "1"),
        ([nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Dropout()], "3"),
        ([nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1), nn.ReLU()], "1"),  # a score at each position
        ([nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1)], "2"),
    ],
)
def test_a_network_that_ends_in_maps_is_cut_there_but_before_a_linear_layer_at_each_position(
    layers: list[nn.Module], cut: str
) -> None:
    assert staged(nn.Sequential(*layers)).default_cut == cut


def test_a_vector_that_was_permuted_for_its_norm_is_no_map() -> None:
    layers = [CNBlockConfig(8, 16, 1), CNBlockConfig(16, None, 1)]
    model = StagedModel.from_module(ConvNeXt(layers, num_classes=5).eval(), view=View(size=16, resize=16))
    assert "classifier.0.layer_norm" in model.cut_points  # 1 x 1 x 16
    assert (model.default_cut, model.shape("features")) == ("features", (16, 2, 2))


def test_the_default_cut_of_a_network_without_maps_is_the_vector_there() -> None:
    module = nn.Sequential(nn.Flatten(), nn.Linear(3 * 144, 8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 2))
    assert staged(module).default_cut == "2"


class Residual(nn.Module):
    """Evaluated by another graph than it is trained by, both with the same layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, values: Tensor) -> Tensor:
        branch: Tensor = self.norm(self.conv(values))
        kept: Tensor = torchvision.ops.stochastic_depth(branch, 0.2, "row", self.training)
        return values + kept


def test_asking_for_shapes_leaves_the_tensors_of_stochastic_depth_and_of_tied_layers_as_they_were() -> None:
    tied = nn.Conv2d(4, 4, 1)
    tied.weight = nn.Parameter(torch.ones(4, 4, 1, 1))
    other = nn.Conv2d(4, 4, 1)
    other.weight = tied.weight
    module = nn.Sequential(nn.Conv2d(3, 4, 3), Residual(), tied, nn.ReLU(), other, nn.Flatten()).eval()
    before, result = everything(module), module(images())
    model = staged(module)
    assert model.default_cut == "4"
    assert model.shape("4") == (4, 10, 10)
    assert torch.equal(module(images()), result)
    assert torch.equal(model(images()), result)
    assert everything(module)[1] == before[1]  # the very parameters
    assert [each[3] for each in everything(module)[0]] == [each[3] for each in before[0]]


def test_a_network_of_one_layer_has_no_default_cut() -> None:
    with pytest.raises(ModelError, match="conv2d has no value before its last layer with parameters"):
        _ = staged(nn.Conv2d(3, 2, 3)).default_cut


def test_shapes_are_those_of_a_real_pass_at_any_size() -> None:
    model = staged()
    for size in (12, 20):
        activations = model.activations(images(1, size), model.cut_points)
        assert {cut: model.shape(cut, size) for cut in model.cut_points} == {
            cut: tuple(value.shape[1:]) for cut, value in activations.items()
        }


def test_shapes_of_a_network_that_makes_tensors_of_its_own_are_found_on_real_images() -> None:
    class Own(nn.Module):
        def forward(self, values: Tensor) -> Tensor:
            weight = torch.ones(2, 3, 1, 1)
            return F.conv2d(values, weight) if values.numel() else values

    assert staged(nn.Sequential(Own(), nn.Conv2d(2, 5, 3))).shape("1") == (5, 10, 10)


def test_a_size_that_a_network_cannot_take_is_refused_with_the_stage() -> None:
    model = staged(nn.Sequential(nn.Flatten(), nn.Linear(3 * 100, 2)))
    with pytest.raises(ModelError, match=r"sequential can't take images of 12 x 12 pixels: its stage 1 fails with"):
        model.shape("1")


def gray_net() -> nn.Module:
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(2)).eval()
    net(torch.zeros(1, 1, 12, 12))
    return net


class Shown(nn.Module):
    """A first layer that doesn't meet the images themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.net = gray_net()

    def forward(self, images: Tensor) -> Tensor:
        scores: Tensor = self.net(images * 2)
        return scores


def test_a_network_of_one_channel_has_a_gray_view_and_says_so() -> None:
    model = staged(gray_net())
    assert model.view == model.named_view == replace(VIEW, channels=1)
    assert model.notes == (
        "its first layer takes 1 channel: images are made gray, mean 0.5 and std 0.5 assumed; --mean --std",
    )
    assert (model.shape("1"), model.default_cut) == ((4, 10, 10), "1")
    own = View(size=12, resize=12, channels=1, mean=(0.1,), std=(0.3,))
    given = StagedModel.from_module(gray_net(), view=own)
    assert (given.view, given.notes) == (own, ())
    assert staged().view == VIEW
    with pytest.raises(ValueError, match=r"sequential takes images of 1 channel, and its view gives 3. .*channels=1\)"):
        model.check_view(VIEW)


def test_another_number_of_channels_is_refused_with_the_stage_and_the_advice_works() -> None:
    with pytest.raises(
        ModelError, match=r"shown \(its stage net\.0\) takes images of 1 channel, and its view gives 3. .*channels=1\)"
    ):
        staged(Shown()).shape("net.1")
    gray = StagedModel.from_module(Shown(), view=replace(VIEW, channels=1))
    assert gray.shape("net.1") == (4, 10, 10)
    with pytest.raises(ModelError, match=r"takes images of 3 channels, and its view gives 1. .*channels=3\)"):
        StagedModel.from_module(net(), view=replace(VIEW, channels=1)).shape("layer1")

    class Adapted(nn.Module):
        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.adapt, self.net = nn.Conv2d(3, 6, 1), net

        def forward(self, images: Tensor) -> Tensor:
            result: Tensor = self.net(self.adapt(images))
            return result

    six = nn.Sequential(nn.BatchNorm2d(6), nn.Conv2d(6, 4, 3))
    with pytest.raises(
        ModelError, match=r"\(its stage 0\) takes images of 6 channels, and its view gives 3: .*self.net\(self.adapt\("
    ):
        staged(six).shape("1")
    assert staged(Adapted(six)).shape("net.1") == (4, 10, 10)


def test_layouts_follow_the_dimensions_where_nobody_says() -> None:
    model = staged()
    assert [model.layout(cut) for cut in ("layer1", "layer3", "mean", "fc")] == ["NCHW", "NCHW", "NC", "NC"]
    assert outline("vit_b_32").layout("encoder.ln") == "NLC"
    channels_last = StagedModel.from_module(net(), view=VIEW, layouts={"layer1": "NHWC"})
    assert channels_last.layout("layer1") == "NHWC"


# ------------------------------------------------------------------------------------------------------------- running


def test_activations_at_all_cuts_of_one_pass_are_those_of_the_trunks() -> None:
    model = staged()
    found = model.activations(images(), model.cut_points)
    assert list(found) == model.cut_points
    assert all(torch.equal(found[cut], model.trunk(cut)(images())) for cut in model.cut_points)


def test_activations_come_under_each_name_that_was_asked_for() -> None:
    model = staged()
    found = model.activations(images(), ["layer1.2", "layer1", "layer1.2"])
    assert list(found) == ["layer1.2", "layer1"]
    assert torch.equal(found["layer1"], found["layer1.2"])
    assert model.activations(images(), []) == {}


def test_an_in_place_layer_behind_dropout_does_not_overwrite_what_was_taken_before_it() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout(), nn.Identity(), nn.ReLU(inplace=True), nn.Conv2d(4, 2, 3))
    model = staged(module.eval())
    found = model.activations(images(), ["0", "1", "4"])
    assert torch.equal(found["0"], module[0](images()))
    assert torch.equal(found["1"], found["0"])
    head = nn.Sequential(nn.ReLU(inplace=True), nn.Flatten(), nn.LazyLinear(2))
    with_head = model.with_head(head, cut="0", reduction="none")
    assert torch.equal(with_head.activations(images(), ["0", "head"])["0"], module[0](images()))


def test_a_model_runs_in_the_mode_its_module_was_in() -> None:
    module = net().train()
    assert StagedModel.from_module(module).training
    model = staged(module.eval())
    assert not model.training
    assert torch.equal(model(images()), module(images()))  # functional dropout is off


def test_a_model_under_another_view_and_origin_has_the_same_stages_and_leaves_the_first_as_it_was() -> None:
    model = staged()
    other = model.with_(view=View(size=32, resize=32), origin={"backbone": "net"}, notes=["said"], default_cut="layer1")
    assert other.ordered == model.ordered == tuple(model.stages)
    assert (other.view.size, other.origin, other.notes) == (32, {"backbone": "net"}, ("said",))
    assert (model.view, model.origin, model.notes, model.default_cut) == (VIEW, {}, (), "layer3")
    assert other.default_cut == "layer1"
    assert other.shape("layer1") == model.shape("layer1", 32)
    same = other.with_()
    assert (same.view, same.origin, same.notes, same.default_cut) == (other.view, other.origin, ("said",), "layer1")
    assert other.with_(origin={}).origin == {}


def test_a_model_of_a_fixed_size_refuses_views_of_another_one() -> None:
    model = StagedModel.from_module(net(), view=VIEW, fixed_size=VIEW.size)
    model.check_view(VIEW)
    with pytest.raises(ValueError, match=f"net takes images of {VIEW.size} pixels only, not 32"):
        model.check_view(VIEW.resized(size=32))
    staged().check_view(VIEW.resized(size=32))


# ------------------------------------------------------------------------------------------------- freezing and thawing


def moved_statistics(model: StagedModel, before: dict[str, Tensor]) -> set[str]:
    return {
        name.partition(".")[0]
        for name, tensor in model.tensors().items()
        if "running" in name and not torch.equal(tensor, before[name])
    }


def state(model: StagedModel) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.tensors().items()}


@pytest.mark.parametrize(
    ("cut", "moved"),
    [
        ("layer3", set()),
        ("layer2", {"layer3"}),
        ("layer1", {"layer2", "layer3"}),
        (None, {"layer1", "layer2", "layer3"}),
    ],
)
def test_batch_norm_moves_in_thawed_stages_alone(cut: str | None, moved: set[str]) -> None:
    model = staged().with_head(nn.Linear(16, 2), cut="layer3")
    model.freeze_to(cut) if cut else model.unfreeze()
    before = state(model)
    model.train()(images()).sum().backward()
    assert moved_statistics(model, before) == moved
    graded = {id(tensor) for tensor in model.parameters() if tensor.grad is not None}
    assert graded == {id(tensor) for tensor in model.trained_parameters()}


def test_frozen_stages_run_in_eval_mode_whatever_train_says() -> None:
    base = staged()
    model = base.with_head(nn.Identity(), cut="layer3", reduction="none").train()
    for part in base.modules():
        part.training = True
    assert torch.equal(model(images()), net().layer3(net().layer2(net().layer1(images()))))
    taken = model.activations(images(), ["layer2"])["layer2"]
    assert torch.equal(taken, net().layer2(net().layer1(images())))
    assert moved_statistics(base, state(staged())) == set()


def test_one_unfreeze_makes_every_weight_move() -> None:
    model = staged().with_head(nn.Linear(16, 2), cut="layer3")
    model.unfreeze()
    before = state(model)
    optimizer = torch.optim.SGD(model.trained_parameters(), lr=0.1)
    model.train()(images()).square().sum().backward()
    optimizer.step()
    unmoved = {name for name, tensor in model.tensors().items() if torch.equal(tensor, before[name])}
    # A bias before batch norm has no effect, hence no gradient but for rounding.
    assert {name for name in unmoved if not name.endswith("0.bias")} == set()


def test_thawing_trains_parameters_that_came_frozen() -> None:
    module = net().requires_grad_(False)
    model = staged(module).with_head(nn.Linear(16, 2), cut="layer3")
    model.freeze_to("layer2")
    assert all(parameter.requires_grad for parameter in model.trained_parameters())
    assert not any(parameter.requires_grad for parameter in module.parameters())


def test_a_model_made_for_inference_alone_is_refused_where_it_is_thawed() -> None:
    with torch.inference_mode():
        model = staged()
    with torch.no_grad():
        assert model(images()).shape == (4, 5)
    with pytest.raises(ModelError, match=r"net has parameters that were made inside torch.inference_mode"):
        model.unfreeze()


def test_freezing_again_keeps_what_was_trained() -> None:
    model = staged().with_head(nn.Linear(16, 2), cut="layer3")
    model.unfreeze()
    model.train()(images())
    trained = state(model)
    model.freeze_to("layer3")
    model.train()(images())
    assert all(torch.equal(tensor, trained[name]) for name, tensor in model.tensors().items() if "layer" in name)


def train_a_step(model: StagedModel) -> None:
    optimizer = torch.optim.SGD(model.trained_parameters(), lr=0.1)
    model.train()(images()).sum().backward()
    optimizer.step()


@pytest.mark.parametrize(
    "use",
    [
        lambda model: model.with_head(nn.Linear(16, 2), cut="layer3").train()(images()),
        lambda model: model.with_head(nn.Linear(16, 2), cut="layer3").freeze_to("layer1"),
        lambda model: model.with_head(nn.Linear(16, 2), cut="layer3").unfreeze(),
        lambda model: model.up_to("layer3").load_tensors(
            {name: tensor + 1 for name, tensor in model.up_to("layer3").tensors().items()}
        ),
        lambda model: train_a_step(model.with_()),
        lambda model: model.with_().train()(images()),
        lambda model: [parameter.data.add_(1) for parameter in model.with_().trained_parameters()],
        lambda model: train_a_step(model.up_to("layer2")),
        lambda model: model.with_().eval(),
        lambda model: model.with_().train(),
        lambda model: model.with_().unfreeze(),
        lambda model: model.with_().to_device(torch.device("cpu")),
        lambda model: model.with_().to_device(torch.device("meta")),
        lambda model: (model.digests(), model.shape("layer3"), model.default_cut, model.layout("layer1")),
        lambda model: copy.deepcopy(model).to_device(torch.device("meta")),
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_no_use_of_a_model_changes_the_one_it_came_from(use: Callable[[StagedModel], Any], training: bool) -> None:
    module = net().train(training)
    module.layer1[1].eval()
    module.fc.requires_grad_(False)
    model = staged(module)
    before = everything(module)
    use(model)
    assert same(before, everything(module))


def test_k_models_share_the_frozen_stages_and_own_the_thawed_ones() -> None:
    base = staged()
    models = [base.with_head(nn.Linear(16, 2), cut="layer3") for _ in range(2)]
    for model in models:
        model.freeze_to("layer2")
    places = [{name: tensor.data_ptr() for name, tensor in model.tensors().items()} for model in (base, *models)]
    assert {name for name, place in places[1].items() if place == places[2].get(name) == places[0].get(name)} == {
        name for name in base.tensors() if name.startswith(("layer1", "layer2"))
    }


# -------------------------------------------------------------------------------------------------- heads and tensors


def test_a_head_is_used_as_it_is_behind_a_pool() -> None:
    head = nn.Linear(16, 2)
    model = staged().with_head(head, cut="layer3")
    assert model.head is head
    maps = staged().activations(images(), ["layer3"])["layer3"]
    assert torch.equal(model.eval()(images()), head(torch.cat([maps.amax((2, 3)), maps.mean((2, 3))], dim=1)))
    assert model.cut_points == staged().up_to("layer3").cut_points
    assert model.default_cut == "layer3"
    assert model.num_frozen == len(model.stages) - 1


class Clashing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.Conv2d(3, 4, 3)
        self.head = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1))

    def forward(self, values: Tensor) -> Tensor:
        scores: Tensor = self.head(self.pool(values))
        return scores


@pytest.mark.parametrize("cut", ["pool", "head.0", "head"])
def test_pool_and_head_get_names_of_their_own_where_a_network_has_such_modules(cut: str) -> None:
    base = staged(Clashing())
    model = base.with_head(nn.Linear(8, 2), cut=cut)
    assert [stage.name for stage in model.stages][-2:] == ["pool_2", "head_2"]
    assert len(model.tensors()) == len(base.up_to(cut).tensors()) + 2


def test_tensors_have_the_names_of_the_module_and_load_back() -> None:
    module = net()
    model = staged(module)
    assert model.tensors().keys() == module.state_dict().keys()
    other = Net().eval()
    copied = staged(other)
    copied.load_tensors(model.tensors())
    assert torch.equal(other(images()), module(images()))


def test_tensors_that_do_not_fit_are_refused_with_the_first_few_names_and_none_is_loaded() -> None:
    model = staged()
    before = state(model)
    given = {
        **{name: tensor + 1 for name, tensor in before.items()},
        "fc.weight": torch.zeros(37, 8),
        "extra": torch.ones(1),
    }
    del given["layer1.0.bias"]
    with pytest.raises(
        ModelError, match=r"layer1.0.bias is missing; extra is unknown; fc.weight is 37x8, expected 5x8."
    ):
        model.load_tensors(given)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.tensors().items())


def test_tensors_that_an_output_does_not_need_are_known_as_unused() -> None:
    module = net()
    module.register_parameter("mask_token", nn.Parameter(torch.zeros(3)))
    model = staged(module)
    assert model.unused == {"mask_token"}
    assert model.up_to("layer1").unused == {"mask_token"}
    assert "mask_token" not in model.tensors()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_is_equal_and_shares_nothing(copied: Callable[[StagedModel], StagedModel]) -> None:
    model = staged().with_head(nn.Linear(16, 2), cut="layer3").eval()
    other = copied(model)
    assert other.digests() == model.digests()
    assert other.tensors().keys() == model.tensors().keys()
    assert torch.equal(other(images()), model(images()))
    assert not {tensor.data_ptr() for tensor in other.tensors().values()} & {
        tensor.data_ptr() for tensor in model.tensors().values()
    }


def test_both_graphs_of_a_copied_stage_use_the_same_tensors() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2, 3, 1, 1))
            self.shift = nn.Parameter(torch.ones(1))
            self.scale: Tensor
            self.register_buffer("scale", torch.ones(1), persistent=False)

        def forward(self, values: Tensor) -> Tensor:
            values = F.conv2d(values, self.weight) * self.scale
            return values + self.shift if self.training else values + 2 * self.shift

    model = copy.deepcopy(StagedModel.from_module(Both(), view=VIEW))
    assert model.tensors().keys() == {"weight", "shift"}
    with torch.no_grad():
        for tensor in model.tensors().values():
            tensor.zero_()
    assert not model.train()(images()).any()
    assert not model.eval()(images()).any()


def test_a_model_moves_to_another_type() -> None:
    model = staged().double()
    assert model(images().double()).dtype == torch.float64


# ------------------------------------------------------------------------------------------------------ absent trunks


def absent(model: StagedModel, cut: str) -> StagedModel:
    stages = [
        AbsentStage(name=name, layout=model.layout(name), shape=model.shape(name), digest=digest)
        for name, digest in model.up_to(cut).digests().items()
    ]
    return StagedModel(stages, view=model.view, name=model.name)


def test_a_head_trained_without_its_trunk_can_be_attached_to_it() -> None:
    model = staged()
    store = absent(model, "layer3")
    assert store.is_absent
    assert store.default_cut == "layer3"
    assert store.shape("layer3") == model.shape("layer3")
    learned = store.with_head(nn.Linear(16, 2), cut="layer3").eval()
    with pytest.raises(ModelError, match=r"The trunk up to layer1.0 isn't here"):
        learned(images())
    learned.attach(model)
    assert not learned.is_absent
    assert learned.num_frozen == len(learned.stages) - 1
    assert learned.head is not None
    assert torch.equal(learned(images()), model.with_head(learned.head, cut="layer3").eval()(images()))
    with pytest.raises(ModelError, match="has its trunk already"):
        learned.attach(model)


def test_another_trunk_is_refused_with_the_stage_that_differs() -> None:
    model, other = staged(), net()
    with torch.no_grad():
        next(other.layer2.parameters()).view(-1)[0] += 1
    learned = absent(model, "layer3").with_head(nn.Linear(16, 2), cut="layer3")
    with pytest.raises(
        ModelError, match=r"net isn't the trunk this head belongs to: they differ from stage layer2.0 on"
    ):
        learned.attach(staged(other))


# -------------------------------------------------------------------------------------------------------- side effects


def test_looking_at_a_model_moves_no_statistics_and_no_random_state() -> None:
    class Random(nn.Module):
        def forward(self, values: Tensor) -> Tensor:
            return values + torch.rand(1) if values.numel() else values

    module = nn.Sequential(net().train(), nn.Unflatten(1, (5, 1, 1)), Random(), nn.Conv2d(5, 2, 1))
    before, states = everything(module), random_states()
    model = staged(module)
    _ = model.default_cut, model.shape("3"), model.digest("0"), model.layout("2"), model.cut_points
    assert same(before, everything(module))
    assert random_states() == states


TRIED: list[int] = []


class OneSize(nn.Module):
    def forward(self, values: Tensor) -> Tensor:
        TRIED.append(int(values.shape[-1]))
        if values.shape[-1] != 8:
            raise ValueError("8 pixels only")
        return values


def test_a_size_that_a_model_was_found_not_to_take_is_not_tried_for_each_cut_anew() -> None:
    layers = [nn.Conv2d(8, 8, 3, padding=1) for _ in range(4)]  # 8 channels of 8 x 8: which dimension is which?
    module = nn.Sequential(OneSize(), nn.Conv2d(3, 8, 1), *layers)
    model = StagedModel.from_module(module, view=View(size=8, resize=8))
    TRIED.clear()
    assert {model.layout(cut) for cut in model.cut_points} == {"NCHW"}
    assert TRIED.count(16) <= 2  # without data, and with


def test_an_unknown_option_or_attribute_is_an_error() -> None:
    with pytest.raises(TypeError, match="freeze"):
        StagedModel.from_module(net(), freeze=True)  # type: ignore[call-arg]
    with pytest.raises(AttributeError, match="precompute"):
        _ = staged().precompute


def test_a_backbone_keeps_its_cut_points_with_and_without_weights() -> None:
    assert outline("resnet18").cut_points == backbone("resnet18", "none").cut_points


class ChannelsLast(nn.Module):
    """A norm that leaves maps with their channels last in memory, and a residual block of a pointwise convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 4, 4), nn.LayerNorm(8)
        self.point, self.down = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 2, 2)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.norm(self.stem(images).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        maps = self.point(maps) + maps
        return self.down(maps).mean((2, 3))  # type: ignore[no-any-return]


def test_a_tail_puts_maps_into_the_order_in_which_the_trunk_leaves_them_when_it_runs() -> None:
    model = StagedModel.from_module(ChannelsLast().eval(), view=View(size=32, resize=32))
    with torch.no_grad():
        maps = model.trunk("add")(torch.rand(2, 3, 32, 32))
    assert maps.is_contiguous(memory_format=torch.channels_last)
    assert model.tail("add").order == (0, 2, 3, 1)


@pytest.mark.parametrize("size", [32, 8])
def test_a_tail_runs_on_maps_with_the_steps_in_memory_that_they_had_also_of_one_pixel(size: int) -> None:
    model = StagedModel.from_module(ChannelsLast().eval(), view=View(size=size, resize=size))
    with torch.no_grad():
        maps = model.trunk("down")(torch.rand(2, 3, size, size))
        tail, seen = model.tail("down"), []
        tail[0].register_forward_pre_hook(lambda _, given: seen.append(given[0].stride()))
        stored = torch.from_numpy(maps.numpy().copy("C"))
        assert stored.stride() != maps.stride()
        assert torch.equal(tail(stored), tail(maps))
    assert seen == [maps.stride(), maps.stride()]
