"""Graphs: modules split where one value alone crosses, bit for bit.

Long, since each kind of network is here with what is to be said when it can't be traced.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from functools import partial
from types import MethodType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from support.splitting import check_split, randomise
from support.tiny import vision_transformer
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.models.resnet import Bottleneck, ResNet
from torchvision.ops import StochasticDepth

from featstore import ModelError, StagedModel, View, backbone
from featstore.models.graph import refuse_patched, split_into_stages
from featstore.models.modes import random_states


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Two processes with two threads each on two cores are ten times as slow."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def images(num: int = 3, size: int = 12) -> Tensor:
    return torch.randn((num, 3, size, size), generator=torch.Generator().manual_seed(0))


class Residual(nn.Module):
    """conv, bn and an in-place ReLU around a sum, as in torchvision's BasicBlock."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.drop = StochasticDepth(0.5, "row")

    def forward(self, values: Tensor) -> Tensor:
        out = self.drop(self.bn(self.relu(self.conv(values))))
        out += values
        summed: Tensor = self.relu(out)
        return summed


class Net(nn.Module):
    """Residual blocks, dropout as a function, a vector, scores."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
        self.blocks = nn.Sequential(Residual(), Residual())
        self.fc = nn.Linear(4, 5)

    def forward(self, values: Tensor) -> Tensor:
        values = self.blocks(self.stem(values)).mean((2, 3))
        values = F.dropout(values, 0.5, training=self.training)
        scores: Tensor = self.fc(values)
        return scores


class Tokens(nn.Module):
    """A class token, positions and transformer layers, one of torch's own among them."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, stride=4)
        self.token = nn.Parameter(torch.zeros(1, 1, 8))
        self.position = nn.Parameter(torch.zeros(1, 10, 8))
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, activation=F.gelu, norm_first=True)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 4)

    def forward(self, values: Tensor) -> Tensor:
        values = self.patches(values).flatten(2).transpose(1, 2)
        values = torch.cat([self.token.expand(values.shape[0], -1, -1), values], dim=1) + self.position
        values = self.layer(values)
        values = values + self.attention(values, values, values)[0]
        scores: Tensor = self.head(self.norm(values)[:, 0])
        return scores


@pytest.mark.parametrize("make", [Net, Tokens, partial(vision_transformer, 12)])
def test_every_cut_of_a_small_network_splits_it_bit_for_bit(make: Callable[[], nn.Module]) -> None:
    module = make()
    check_split(StagedModel.from_module(module, view=View(size=12, resize=12)), images(), module)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("resnet18", 64),
        pytest.param("resnet34", 32, marks=pytest.mark.slow),
        ("resnet of bottlenecks", 32),
        pytest.param("resnet50", 32, marks=pytest.mark.slow),
        ("squeezenet1_1", 64),
        pytest.param("vit_b_16", 64, marks=pytest.mark.slow),
        pytest.param("vit_b_32", 224, marks=pytest.mark.slow),
    ],
)
def test_every_cut_of_a_backbone_splits_it_bit_for_bit(name: str, size: int) -> None:
    own_size = {"image_size": size} if name.startswith("vit") else {}  # vit_b_16 at its 224 takes a minute
    with torch.random.fork_rng(devices=[]):
        if name == "resnet of bottlenecks":
            module: nn.Module = ResNet(Bottleneck, [2, 2, 2, 2], num_classes=10)  # half a resnet50
        else:
            module = torchvision.models.get_model(name, weights=None, **own_size)
    model = backbone(module)
    model.view = View(size=size, resize=size)
    check_split(model, images(2, size), module)
    assert len(model.cut_points) > 20


@pytest.mark.parametrize(
    "name",
    [
        *("alexnet", "vgg11", "densenet121", "googlenet", "inception_v3", "mobilenet_v2", "mobilenet_v3_small"),
        *("mnasnet0_5", "shufflenet_v2_x0_5", "efficientnet_b0", "regnet_x_400mf", "regnet_y_400mf", "convnext_tiny"),
        *("swin_t", "swin_v2_t"),
    ],
)
def test_four_cuts_and_more_of_each_family_split_it_bit_for_bit(name: str) -> None:
    """All of all: scripts/split_everything.py."""
    size = {"alexnet": 64, "inception_v3": 80}.get(name, 32)
    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    with torch.random.fork_rng(devices=[]):
        module = torchvision.models.get_model(name, weights=None, **options)
    if name in ("alexnet", "vgg11"):  # nearly all of their parameters are there
        _narrow(module.classifier)
    model = StagedModel.from_module(module, view=View(size=size, resize=size))
    check_split(model, images(2, size), module, every=len(model.cut_points) // 5)
    assert list(model.digests()) == model.cut_points  # every operation has a key


def _narrow(classifier: nn.Sequential) -> None:
    """Linear layers of 64 values instead of 4096."""
    width = None
    for place, layer in enumerate(classifier):
        if isinstance(layer, nn.Linear):
            classifier[place], width = nn.Linear(width or layer.in_features, 64), 64


@pytest.mark.parametrize(("name", "size"), [("resnet18", 32), ("squeezenet1_1", 32), ("vit_b_32", 32)])
def test_cuts_have_the_names_that_torchvision_gives_and_the_values_it_extracts(name: str, size: int) -> None:
    with torch.random.fork_rng(devices=[]):
        own_size = {"image_size": size} if name.startswith("vit") else {}
        module = torchvision.models.get_model(name, weights=None, **own_size).eval()
    model = StagedModel.from_module(module, containers=("features", "encoder"))
    names = [name for stage in model.stages for name in (str(stage.name), *stage.aliases)]  # type: ignore[misc]
    with torch.no_grad():
        # One by one: the values of one pass may be overwritten in place by what follows.
        extractor = create_feature_extractor(module, model.cut_points)
        expected = {cut: value.clone() for cut, value in extractor(images(1, size)).items()}
        found = model.activations(images(1, size), model.cut_points)
        assert create_feature_extractor(module, [names[-1]])(images(1, size))[names[-1]].equal(module(images(1, size)))
    in_place = {cut for cut, stage in zip(model.cut_points, model.stages[1:], strict=False) if stage.may_write_input}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[cut], expected[cut]) for cut in found.keys() - in_place)


def test_a_value_has_the_name_of_each_module_that_ends_in_it() -> None:
    model = StagedModel.from_module(torchvision.models.resnet18(weights=None))
    assert [model.canonical(name) for name in ("layer4", "layer4.1", "layer4.1.relu_1")] == ["layer4"] * 3
    assert model.canonical("layer4.0") == "layer4.0"


class Registered(nn.Module):
    """Modules under two names each, one of which runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.first = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Tanh())
        self.relu = nn.ReLU()
        self.c1, self.body, self.act = self.stem, self.first, self.relu

    def forward(self, values: Tensor) -> Tensor:
        scaled: Tensor = self.act(self.body(self.relu(self.c1(values)))) * 2
        return scaled


def test_a_module_that_is_registered_twice_is_one_value_with_one_key_under_either_name() -> None:
    model = StagedModel.from_module(Registered())
    assert model.cut_points == ["stem", "relu", "first.0", "first", "relu_1", "mul"]
    names = {"c1": "stem", "body": "first", "body.1": "first", "first.1": "first", "body.0": "first.0"}
    for name, canonical in names.items():
        assert model.canonical(name) == canonical
        assert model.digest(name) == model.digest(canonical) == model.digests()[canonical]
    with pytest.raises(ValueError, match="no cut 'act'"):  # it may be either of two values
        model.index("act")


def test_a_module_without_any_inner_cut_is_one_stage() -> None:
    module = nn.Conv2d(3, 2, 3)
    model = StagedModel.from_module(module)
    assert model.cut_points == ["conv2d"]
    assert torch.equal(model(images()), module(images()))


# ------------------------------------------------------------------------------------------------------------ tensors


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 3, 3, padding=1, bias=False)
        self.middle = nn.Conv2d(3, 3, 3, padding=1)
        self.last = nn.Conv2d(3, 3, 3, padding=1, bias=False)
        self.last.weight = self.first.weight
        self.end = nn.Conv2d(3, 2, 3)

    def forward(self, values: Tensor) -> Tensor:
        scores: Tensor = self.end(self.last(self.middle(self.first(values))))
        return scores


def test_there_is_no_cut_between_two_uses_of_one_parameter() -> None:
    module = Tied()
    model = StagedModel.from_module(module)
    assert model.cut_points == ["last", "end"]
    check_split(model, images(), module)


class UsedElsewhereInTraining(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

    def forward(self, values: Tensor) -> Tensor:
        values = self.two(self.one(values))
        if self.training:
            values = values + self.one.weight.mean()
        return values.relu()


def test_a_parameter_that_train_mode_uses_once_more_further_on_closes_the_cuts_between() -> None:
    model = StagedModel.from_module(UsedElsewhereInTraining())
    assert model.cut_points == ["relu"]


class Reusing(nn.Module):
    """One parameterless module at several places, and a block that runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU(inplace=True)
        self.block = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
        self.end = nn.Conv2d(3, 2, 3)

    def forward(self, values: Tensor) -> Tensor:
        values = self.relu(self.block(values))
        values = self.relu(self.block(values))
        scores: Tensor = self.relu(self.end(values))
        return scores


def test_shared_layers_without_parameters_allow_cuts_and_shared_layers_with_them_do_not() -> None:
    module = Reusing()
    model = StagedModel.from_module(module)
    assert model.cut_points == ["block", "relu_1", "end", "relu_2"]
    check_split(model, images(), module)


class Constants(nn.Module):
    """Buffers of each kind, computed with each other, and tensors from a closure and from the forward itself."""

    closure = torch.tensor([0.5, 1.0, 2.0]).reshape(3, 1, 1)
    scale: Tensor
    shift: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.register_buffer("scale", torch.full((3, 1, 1), 1.5))
        self.register_buffer("shift", torch.full((3, 1, 1), 0.25), persistent=False)
        self.end = nn.Conv2d(3, 2, 3)

    def forward(self, values: Tensor) -> Tensor:
        values = self.conv(values * self.closure) * (self.scale + self.shift)
        values = values + torch.tensor(0.5 if self.training else 0.25)
        scores: Tensor = self.end(values)
        return scores


def test_arithmetic_between_buffers_follows_the_buffers() -> None:
    module = Constants().eval()
    model = StagedModel.from_module(module)
    module.scale.fill_(7.0)
    assert torch.equal(model(images()), module(images()))


def test_constants_of_the_forward_differ_between_the_modes_and_are_no_state() -> None:
    module = Constants()
    model = StagedModel.from_module(module)
    assert model.tensors().keys() == module.state_dict().keys()
    for training in (True, False):
        module.train(training), model.train(training)
        assert torch.equal(model(images()), module(images()))


# --------------------------------------------------------------------------------------------------------- train mode


def test_in_train_mode_the_stages_compute_what_the_module_does_under_one_seed() -> None:
    module = Net()
    randomise(module, 0)
    model = StagedModel.from_module(module).train()
    for cut in ("stem", "blocks.0", "blocks", "mean"):
        state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
        torch.manual_seed(5)
        expected = module(images())
        moved = {name: tensor.clone() for name, tensor in module.state_dict().items()}
        module.load_state_dict(state)
        torch.manual_seed(5)
        assert torch.equal(model.tail(cut)(model.trunk(cut)(images())), expected)
        assert all(torch.equal(moved[name], tensor) for name, tensor in model.tensors().items())
        assert not torch.equal(model(images()), expected)  # dropout is on


class Noisy(nn.Module):
    """In train mode the first `add` is another operation than in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.end = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 2, 1)

    def forward(self, values: Tensor) -> Tensor:
        values = self.conv(values)
        if self.training:
            values = values + torch.rand_like(values)
        values = values + 1
        scores: Tensor = self.end(values)
        return scores + 1


@pytest.mark.parametrize("training", [True, False])
def test_cuts_mean_the_same_operation_in_both_modes(training: bool) -> None:
    module = Noisy()
    model = StagedModel.from_module(module).train(training)
    module.train(training)
    assert model.cut_points == ["conv", "end", "add_1"]
    for cut in model.cut_points:
        torch.manual_seed(1)
        expected = module(images())
        torch.manual_seed(1)
        assert torch.equal(model.tail(cut)(model.trunk(cut)(images())), expected)


class Counting(nn.Module):
    """Something that happens after the output has been computed."""

    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 1)
        self.register_buffer("count", torch.zeros(1))

    def forward(self, values: Tensor) -> Tensor:
        scores: Tensor = self.conv(values).relu()
        self.count.add_(1)
        return scores


def test_what_a_forward_does_after_its_output_is_done_too() -> None:
    module = Counting()
    model = StagedModel.from_module(module)
    assert module.count.item() == 0
    model(images())
    assert module.count.item() == 1


# -------------------------------------------------------------------------------------------- what tracing leaves alone


class Remembering(nn.Module):
    """Assigns to itself while it runs, as networks that keep their attention maps do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 1)
        self.calls = 0
        self.last: Any = None

    def forward(self, values: Tensor, scale: float = 2.0) -> Tensor:
        self.last = self.conv(values)
        self.calls += 1
        self.extra = self.last
        scaled: Tensor = self.last * torch.tensor(scale)
        return scaled


def test_tracing_leaves_the_module_as_it_was() -> None:
    module = nn.Sequential(Remembering(), nn.Dropout().eval(), nn.ReLU())
    before = [dict(vars(part)) for part in module.modules()]
    StagedModel.from_module(module)
    StagedModel.from_module(module[0])
    assert all(
        now.keys() == then.keys() and all(now[name] is then[name] for name in then)
        for now, then in zip((vars(part) for part in module.modules()), before, strict=True)
    )


def test_tracing_leaves_the_global_random_states_alone() -> None:
    module = nn.Sequential(Drawing(0.5), Shuffling())
    before = random_states()
    StagedModel.from_module(module)
    assert random_states() == before


# ----------------------------------------------------------------------------------------------------- whole modules


class Deciding(nn.Module):
    """Control flow that depends on data can't be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, values: Tensor) -> Tensor:
        values = self.conv(values)
        return values if values.sum() > 0 else -values


class Drawing(nn.Module):
    """LayerDrop with Python's random numbers, in train mode only."""

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, values: Tensor) -> Tensor:
        if self.training and random.random() < self.probability:
            return values
        skipped: Tensor = self.conv(values)
        return skipped


class Shuffling(nn.Module):
    def forward(self, values: Tensor) -> Tensor:
        return values[:, torch.from_numpy(np.random.permutation(3))]  # noqa: NPY002


def leaves(model: StagedModel) -> list[str]:
    kinds = {type(part).__name__ for stage in model.stages for part in stage.modules()}
    return sorted(kinds & {"Deciding", "Drawing", "Shuffling", "Fingerprinted", "Wrapper"})


class Wrapper(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.before, self.inner, self.after = nn.Conv2d(3, 3, 1), inner, nn.Conv2d(3, 3, 1)

    def forward(self, values: Tensor) -> Tensor:
        scores: Tensor = self.after(self.inner(self.before(values)))
        return scores


@pytest.mark.parametrize("inner", [Deciding(), Drawing(0.5), Shuffling()])
def test_the_innermost_module_that_cannot_be_traced_stays_whole_and_the_rest_is_cut(inner: nn.Module) -> None:
    module = nn.Sequential(Wrapper(inner), nn.ReLU())
    model = StagedModel.from_module(module)
    assert leaves(model) == [type(inner).__name__]
    assert model.cut_points == ["0.before", "0.inner", "0", "1"]


def test_a_layer_that_train_mode_drops_at_random_goes_on_being_dropped_at_random() -> None:
    model = StagedModel.from_module(Wrapper(Drawing(0.5))).train()
    random.seed(0)
    outputs = [model(images(1)) for _ in range(8)]
    assert len({output.sum().item() for output in outputs}) == 2


def test_the_advice_for_a_network_that_cannot_be_traced_works() -> None:
    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 2, 1)

        def forward(self, values: Tensor) -> Tensor:
            values = self.one(values)
            scores: Tensor = self.two(values if values.sum() > 0 else -values)
            return scores

    module = Whole()
    with pytest.raises(ModelError, match=r"Whole can't be traced .* StagedModel.from_stages") as error:
        StagedModel.from_module(module)
    assert "nn.Sequential(OrderedDict(" in str(error.value)
    assert StagedModel.from_stages({"stem": module.one, "body": module.two}).cut_points == ["stem", "body"]
    whole = StagedModel.from_stages({"body": module})
    assert torch.equal(whole(images()), module(images()))


class Fingerprinted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def fingerprint(self) -> str:
        return "mine, version 1"

    def forward(self, values: Tensor) -> Tensor:
        scores: Tensor = self.conv(values)
        return scores + 1


def test_a_module_with_a_fingerprint_stays_whole() -> None:
    model = StagedModel.from_module(Wrapper(Fingerprinted()))
    assert model.cut_points == ["before", "inner", "after"]
    assert leaves(model) == ["Fingerprinted"]


class Returning(nn.Module):
    def __init__(self, wrap: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.conv, self.wrap = nn.Conv2d(3, 3, 1), wrap

    def forward(self, values: Tensor) -> Any:
        return self.wrap(self.conv(values))


@pytest.mark.parametrize(
    ("wrap", "kind"),
    [(lambda value: (value, value), "tuple"), (lambda value: {"out": value}, "dict"), (lambda value: 1, "int")],
)
def test_a_network_that_does_not_return_one_tensor_is_refused(wrap: Callable[[Tensor], Any], kind: str) -> None:
    with pytest.raises(ModelError, match=f"Returning returns a value of type {kind} in eval mode; a staged model"):
        split_into_stages(Returning(wrap))


def test_a_network_that_returns_its_input_is_refused() -> None:
    with pytest.raises(ModelError, match="Sequential returns its input"):
        split_into_stages(nn.Sequential())


class Branching(nn.Module):
    """Whole modules that hand a tuple on."""

    class Two(nn.Module):
        def forward(self, values: Tensor) -> tuple[Tensor, Tensor]:
            return (values, -values) if values.sum() > 0 else (-values, values)

    class One(nn.Module):
        def forward(self, pair: tuple[Tensor, Tensor]) -> Tensor:
            return pair[0] if pair[0].sum() > 0 else pair[1]

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.two, self.one, self.end = nn.Conv2d(3, 3, 1), self.Two(), self.One(), nn.Conv2d(3, 2, 1)

    def forward(self, values: Tensor) -> Tensor:
        scores: Tensor = self.end(self.one(self.two(self.conv(values))))
        return scores


def test_a_tuple_between_two_modules_passes_but_holds_no_activations() -> None:
    module = Branching()
    model = StagedModel.from_module(module)
    assert torch.equal(model(images()), module(images()))
    with pytest.raises(ModelError, match="value of branching at two is a tuple; only tensors can be activations"):
        model.activations(images(), ["two"])


# --------------------------------------------------------------------------------------------------- refused by name


@pytest.mark.parametrize(
    ("patch", "message"),
    [
        (lambda part: part.register_forward_hook(lambda *_: None), r"0.1 \(ReLU\) has a forward hook"),
        (lambda part: part.register_forward_pre_hook(lambda *_: None), r"0.1 \(ReLU\) has a forward hook"),
        (lambda part: setattr(part, "forward", torch.sin), r"0.1 \(ReLU\) has a forward that was assigned"),
    ],
)
def test_what_runs_beside_a_class_is_refused_by_name(patch: Callable[[nn.Module], Any], message: str) -> None:
    relu = nn.ReLU()
    module = nn.Sequential(nn.Sequential(nn.Conv2d(3, 3, 1), relu), nn.Conv2d(3, 2, 1))
    model = StagedModel.from_module(module)
    patch(relu)
    with pytest.raises(ModelError, match=message):
        StagedModel.from_module(module)
    with pytest.raises(ModelError, match="ReLU"):
        model.digests()


@pytest.mark.parametrize(
    ("make", "method"),
    [
        (lambda: nn.Conv2d(3, 3, 1), "_conv_forward"),
        (lambda: nn.ReLU(), "_call_impl"),
        (lambda: nn.Sequential(nn.Flatten(2), nn.TransformerEncoderLayer(4, 2)), "1._sa_block"),
        (lambda: nn.Sequential(nn.ReLU()), "named_parameters"),
    ],
)
def test_a_method_of_torchs_own_that_was_assigned_to_a_layer_is_refused(
    make: Callable[[], nn.Module], method: str
) -> None:
    module = nn.Sequential(nn.Conv2d(3, 3, 1), make())
    *path, name = f"1.{method}".split(".")
    layer = module.get_submodule(".".join(path))
    setattr(layer, name, MethodType(lambda self, values, *_: values * 3, layer))
    message = rf"{'.'.join(path)} \({type(layer).__name__}\) has a {name} that was assigned to the instance"
    with pytest.raises(ModelError, match=message):
        StagedModel.from_module(module)


class Switched(nn.Module):
    """Its constructor chooses which of its methods is its forward, as timm's FasterNet does."""

    def __init__(self, method: str) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        if method:
            self.forward = getattr(self, method)  # type: ignore[method-assign]

    def forward(self, values: Tensor) -> Tensor:
        return self.conv(values)  # type: ignore[no-any-return]

    def doubled(self, values: Tensor) -> Tensor:
        return self.conv(values) * 2  # type: ignore[no-any-return]

    def branching(self, values: Tensor) -> Tensor:
        return self.doubled(values) if values.sum() > 0 else values


class Doubling(Switched):
    def forward(self, values: Tensor) -> Tensor:
        return self.doubled(values)


def switched(part: Switched) -> nn.Sequential:
    return nn.Sequential(part, nn.Conv2d(3, 2, 3))


def test_a_forward_that_is_another_method_of_its_class_is_traced_as_what_runs() -> None:
    module, expected = switched(Switched("doubled")), switched(Doubling(""))
    expected.load_state_dict(module.state_dict())
    model = StagedModel.from_module(module)
    assert model.cut_points == ["0.conv", "0", "1"]
    assert model.digests() == StagedModel.from_module(expected).digests()
    check_split(model, images(), module)


def test_a_forward_that_is_anothers_method_or_stays_whole_is_refused() -> None:
    lent, torchs = Switched(""), nn.Tanh()
    lent.forward = Switched("").doubled  # type: ignore[method-assign]
    torchs.forward = torchs.extra_repr  # type: ignore[assignment]
    for part in (switched(lent), switched(Switched("branching")), nn.Sequential(nn.Conv2d(3, 3, 1), torchs)):
        with pytest.raises(ModelError, match="has a forward that was assigned to the instance"):
            StagedModel.from_module(part)


def test_what_a_person_assigns_to_layers_otherwise_is_no_matter() -> None:
    module = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Tanh())
    expected = StagedModel.from_module(module).digests()
    vars(module).update(train=lambda mode=True: module)  # a frozen part stays in its mode
    vars(module[0]).update(label="stem", scale=F.relu)
    assert [*StagedModel.from_module(module).digests()] == [*expected]


@pytest.mark.parametrize(
    ("layer", "change", "setting"),
    [
        (nn.Conv2d(3, 3, 3, padding=1, padding_mode="reflect"), {"padding": (2, 2)}, "padding"),
        (nn.Conv1d(3, 3, 3, padding="same", padding_mode="circular"), {"dilation": (2,)}, "padding"),
        (nn.MultiheadAttention(4, 2, kdim=3), {"kdim": 4}, "kdim or vdim"),
        (nn.LSTM(3, 3), {"_flat_weights": [torch.zeros(12, 3)] * 4}, "weight"),
    ],
)
def test_a_setting_changed_after_its_layer_derived_another_from_it_is_refused(
    layer: nn.Module, change: dict[str, Any], setting: str
) -> None:
    refuse_patched(layer)
    for name, value in change.items():
        setattr(layer, name, value)
    with pytest.raises(ModelError, match=rf"the model \({type(layer).__name__}\) runs with another {setting} than it"):
        refuse_patched(layer)


def test_the_padding_of_a_layer_that_pads_with_zeros_may_be_changed() -> None:
    layer = nn.Conv2d(3, 3, 3, padding=1)
    layer.padding = (2, 2)
    made = nn.Conv2d(3, 3, 3, padding=2)
    made.load_state_dict(layer.state_dict())
    assert StagedModel.from_module(layer).digests() == StagedModel.from_module(made).digests()


def test_a_leaf_that_is_compiled_in_place_after_the_staging_is_refused_by_its_stage() -> None:
    net = nn.Sequential(nn.Conv2d(3, 2, 3), nn.ReLU())
    model = StagedModel.from_module(net)
    net[1].compile()
    with pytest.raises(ModelError, match=r"1 \(ReLU\) was compiled in place"):
        model.digests()


class Asking(nn.Module):
    """Another forward without gradients, as checkpointing has, and a tensor that it makes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, values: Tensor) -> Tensor:
        values = self.conv(values) * torch.full((4, 1, 1), 0.5)
        return values.relu() if torch.is_grad_enabled() else values.relu().contiguous()


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
def test_gradients_that_the_caller_has_switched_off_change_no_stage(off: Callable[[], Any]) -> None:
    module = Asking()
    expected = StagedModel.from_module(module)
    with off():
        model = StagedModel.from_module(module)
    assert model.digests() == expected.digests()
    model.train()(images()).sum().backward()  # with constants that can be trained through
    assert module.conv.weight.grad is not None


def test_a_hook_on_all_modules_is_refused() -> None:
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        with pytest.raises(ModelError, match="registered for all modules"):
            StagedModel.from_module(nn.Conv2d(3, 3, 1))
    finally:
        handle.remove()
