from __future__ import annotations

import math
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from support.processes import Processes
from torch import Tensor, nn

from featstore import ModelError, StagedModel, backbone

HERE = Path(__file__).parent


def drawn(module: nn.Module, seed: int = 0) -> nn.Module:
    """`module` with each tensor drawn from a seed, the same one whatever was drawn before."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in module.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    return module.eval()


def digest(module: nn.Module, cut: str | None = None) -> str:
    model = StagedModel.from_module(module)
    return model.digest(cut or model.cut_points[-1])


class Net(nn.Module):
    """Each argument is a fact of what it computes in eval mode, or isn't."""

    def __init__(
        self,
        *,
        stride: int = 1,
        padding: int = 0,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        rate: float = 0.5,
        activation: Callable[[Tensor], Tensor] = F.relu,
        factor: float = 2.0,
        in_place: bool = False,
        buffer: float = 1.0,
        constant: float = 1.0,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, stride=stride, padding=padding)
        self.bn = nn.BatchNorm2d(4, eps=eps, momentum=momentum)
        self.relu = nn.ReLU(inplace=in_place)
        self.drop = nn.Dropout(rate)
        self.fc = nn.Linear(4, 2)
        self.rate, self.activation, self.factor = rate, activation, factor
        self.buffer: Tensor
        self.register_buffer("buffer", torch.tensor(buffer), persistent=False)
        self.constant = torch.tensor(constant)

    def forward(self, values: Tensor) -> Tensor:
        values = self.activation(self.relu(self.bn(self.conv(values)))) * self.factor
        values = (values * self.buffer + self.constant).mean((2, 3))
        values = F.dropout(self.drop(values), self.rate, training=self.training)
        scores: Tensor = self.fc(values)
        return scores


# -------------------------------------------------------------------------------------------- what doesn't matter


@pytest.mark.parametrize("facts", [{"rate": 0.1}, {"momentum": 0.3}, {"momentum": None}])
def test_what_evaluation_ignores_is_not_in_the_key(facts: dict[str, Any]) -> None:
    assert digest(drawn(Net(**facts))) == digest(drawn(Net()))


def test_mode_gradients_and_counters_are_not_in_the_key() -> None:
    module = drawn(Net())
    assert isinstance(module, Net)
    expected = digest(module)
    module.train().requires_grad_(False)
    assert module.bn.num_batches_tracked is not None
    module.bn.num_batches_tracked.fill_(7)
    model = StagedModel.from_module(module)
    assert model.digest("fc") == expected
    assert model.eval().digest("fc") == expected
    assert model.train().digest("fc") == expected


def test_dropout_of_any_kind_adds_nothing_to_the_key() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, values: Tensor) -> Tensor:
            values = self.conv(values)
            values = F.dropout2d(values, 0.3, self.training)
            values = F.alpha_dropout(values, 0.3, self.training)
            kept: Tensor = torchvision.ops.stochastic_depth(values, 0.1, "row", self.training)
            return kept

    plain = drawn(nn.Sequential(nn.Conv2d(3, 4, 3)))
    assert digest(drawn(Functional())) == digest(plain)
    assert digest(drawn(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout(), nn.Identity()))) == digest(plain)
    assert digest(drawn(nn.Sequential(nn.Dropout2d(), nn.Conv2d(3, 4, 3)))) == digest(plain)


def test_one_value_has_one_key_however_its_operations_are_grouped_and_named() -> None:
    module = torchvision.models.resnet18(weights=None).eval()
    model = StagedModel.from_module(module)
    flat = nn.Sequential(module.conv1, module.bn1, module.relu, module.maxpool, *module.layer1, *module.layer2)
    nested = nn.Sequential(
        OrderedDict(
            body=nn.Sequential(module.conv1, module.bn1, nn.Sequential(module.relu, module.maxpool), module.layer1),
            late=nn.Sequential(module.layer2, nn.Dropout(), module.layer3, module.layer4),
        )
    )
    assert digest(flat) == model.digest("layer2") == digest(nested, "late.0")
    assert digest(nested) == model.digest("layer4") == model.digest("layer4.1") == model.digest("layer4.1.relu_1")
    assert backbone(module).digest("layer4") == model.digest("layer4")
    assert model.up_to("layer3").digest("layer3") == model.digest("layer3") == model.digests()["layer3"]


def test_a_persons_own_file_names_the_value_by_the_same_key(tmp_path: Path) -> None:
    path = tmp_path / "own.py"
    path.write_text("import torchvision\n\ndef make():\n    return torchvision.models.resnet18(weights=None)\n")
    assert backbone(f"{path}:make").digest("layer1") == backbone("resnet18", "none").digest("layer1")


def test_the_order_of_keyword_arguments_is_not_in_the_key() -> None:
    class One(nn.Module):
        def forward(self, values: Tensor) -> Tensor:
            return F.avg_pool2d(values, kernel_size=2, stride=1)

    class Other(nn.Module):
        def forward(self, values: Tensor) -> Tensor:
            return F.avg_pool2d(values, stride=1, kernel_size=2)

    assert digest(One()) == digest(Other())


# ------------------------------------------------------------------------------------------------ what does matter


@pytest.mark.parametrize(
    "facts",
    [
        {"stride": 2},
        {"padding": 1},
        {"eps": 1e-3},
        {"activation": F.gelu},
        {"activation": F.leaky_relu},
        {"factor": math.nextafter(2.0, 3.0)},
        {"factor": 2},
        {"in_place": True},
        {"buffer": 1.5},
        {"constant": 1.5},
    ],
)
def test_what_changes_the_computation_changes_the_key(facts: dict[str, Any]) -> None:
    assert digest(drawn(Net(**facts))) != digest(drawn(Net()))


def test_a_single_bit_of_any_tensor_changes_the_keys_from_there_on_and_none_before() -> None:
    module = drawn(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1)))
    model = StagedModel.from_module(module)
    before = model.digests()
    stage_of = {"0": 0, "1": 1, "3": 3}
    for name, tensor in module.state_dict().items():
        if name.endswith("num_batches_tracked"):
            continue
        bits = tensor.view(torch.int32).flatten()
        bits[-1] ^= 1
        after = model.digests()
        first = stage_of[name.partition(".")[0]]
        assert [after[cut] != before[cut] for cut in before] == [place >= first for place in range(4)]
        bits[-1] ^= 1
    assert model.digests() == before


def test_another_type_of_the_same_numbers_is_another_key() -> None:
    assert digest(drawn(Net()).double()) != digest(drawn(Net()))


def test_fine_tuning_a_stage_leaves_the_keys_before_it_and_the_model_it_came_from_alone() -> None:
    base = backbone("resnet18", "none")
    before = base.digests()
    model = base.with_head(nn.Linear(1024, 2), cut="layer4")
    model.freeze_to("layer3")
    model.train()
    optimizer = torch.optim.SGD(model.trained_parameters(), lr=0.1)
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    optimizer.step()
    assert model.digest("layer3") == before["layer3"]
    assert model.digest("layer4") != before["layer4"]
    assert base.digests() == before


def test_a_tensor_from_outside_the_module_is_in_the_key() -> None:
    def make(number: float) -> nn.Module:
        outside = torch.tensor(number)

        class Closed(nn.Module):
            def forward(self, values: Tensor) -> Tensor:
                return values * outside

        return Closed()

    assert digest(make(1.0)) == digest(make(1.0)) != digest(make(2.0))


def test_the_layers_of_a_transformer_are_keyed_with_their_settings_but_their_dropout() -> None:
    def make(**facts: Any) -> str:
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, **facts)
        return digest(drawn(nn.Sequential(layer)))

    assert make(dropout=0.3) == make()
    keys = {make(), make(activation=F.gelu), make(norm_first=True), make(layer_norm_eps=1e-3)}
    assert len(keys) == 4


def test_two_processes_give_one_key(processes: Processes) -> None:
    seeded, key = processes.call(seed_and_key)
    assert (seeded != hash("text"), key) == (True, digest(drawn(Net())))


def seed_and_key() -> tuple[int, str]:
    """What hashes of texts come to, which is another in each process, and the key of a network."""
    return hash("text"), digest(drawn(Net()))


def test_the_key_of_a_fixed_network_is_what_it_has_always_been() -> None:
    # A change here makes every stored feature unreachable: raise the number in `START` and say so in the changelog.
    module = nn.Sequential(nn.Conv2d(3, 2, 3, stride=2), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Dropout())
    with torch.no_grad():
        for tensor in module.state_dict().values():
            tensor.copy_(torch.arange(tensor.numel()).reshape(tensor.shape) + 1)
    assert digest(module) == GOLDEN


GOLDEN = "7b5b41a7edb92fbf4c29836ba27aef24b0ebea0efdca2a9780846675c3d9fe23"


# --------------------------------------------------------------------------------------------------- refused by name


def test_an_operator_of_ones_own_is_refused_by_name() -> None:
    @torch.library.custom_op("featstore_test::twice", mutates_args=())
    def twice(values: Tensor) -> Tensor:
        return values * 2

    class Custom(nn.Module):
        def forward(self, values: Tensor) -> Tensor:
            doubled: Tensor = twice(values)
            return doubled

    with pytest.raises(ModelError, match=r"twice_default calls torch._ops.featstore_test.*, which is neither torch's"):
        digest(nn.Sequential(Custom()))


def test_numpy_in_a_forward_makes_the_module_whole_and_keyed_by_its_source() -> None:
    class Numpy(nn.Module):
        def forward(self, values: Tensor) -> Tensor:
            return torch.from_numpy(np.exp(values.numpy()))

    assert digest(nn.Sequential(Numpy())) == digest(nn.Sequential(Numpy()))


def test_which_of_two_values_a_network_returns_is_in_its_key() -> None:
    class Both(nn.Module):
        def __init__(self, place: int) -> None:
            super().__init__()
            self.one, self.two, self.place = Whole(1), Whole(1), place

        def forward(self, values: Tensor) -> Tensor:
            both: tuple[Tensor, Tensor] = self.one(values), self.two(values)
            return both[self.place]

    keys = [digest(drawn(Both(place))) for place in (0, 1)]
    assert keys[0] != keys[1]


class Whole(nn.Module):
    def __init__(self, setting: Any, inner: nn.Module | None = None) -> None:
        super().__init__()
        self.setting = setting
        self.inner = inner or nn.Conv2d(3, 3, 1)

    def forward(self, values: Tensor) -> Tensor:
        return values if values.sum() > 0 else self.inner(values)


class CountedNorm(nn.BatchNorm2d):
    def forward(self, values: Tensor) -> Tensor:
        assert self.num_batches_tracked is not None
        return super().forward(values) / self.num_batches_tracked


class Counting(Whole):
    def __init__(self, count: int) -> None:
        super().__init__(1)
        self.register_buffer("num_batches_tracked", torch.tensor(count))


@pytest.mark.parametrize(
    ("make", "is_keyed"),
    [
        (lambda: Whole(1, nn.BatchNorm2d(3)), False),
        (lambda: Whole(1, nn.SyncBatchNorm(3)), False),
        (lambda: Whole(1, CountedNorm(3)), True),
        (lambda: Counting(0), True),
    ],
)
def test_a_counter_of_batches_is_keyed_unless_it_belongs_to_a_layer_of_torchs_that_ignores_it(
    make: Callable[[], nn.Module], is_keyed: bool
) -> None:
    module = nn.Sequential(drawn(make()))
    before = digest(module)
    for name, tensor in module.state_dict().items():
        if name.endswith("num_batches_tracked"):
            tensor.fill_(7)
    assert (digest(module) != before) == is_keyed


class Vouched(Whole):
    def fingerprint(self) -> str:
        return f"setting {self.setting}"


def test_a_setting_without_an_exact_form_is_refused_by_name_and_the_advice_works() -> None:
    with pytest.raises(ModelError, match=r"0.setting is a object, of which no exact key .* fingerprint\(\)"):
        digest(nn.Sequential(Whole(object())))
    assert digest(nn.Sequential(drawn(Vouched(1)))) == digest(nn.Sequential(drawn(Vouched(1))))
    assert digest(nn.Sequential(drawn(Vouched(1)))) != digest(nn.Sequential(drawn(Vouched(2))))
    assert digest(nn.Sequential(drawn(Vouched(1)))) != digest(nn.Sequential(drawn(Vouched(1), seed=1)))


def test_a_fingerprint_that_is_no_text_is_refused() -> None:
    class Wrong(Whole):
        def fingerprint(self) -> Any:
            return 7

    with pytest.raises(ModelError, match=r"0.fingerprint\(\) returned a int; it must return a str"):
        digest(nn.Sequential(Wrong(1)))


def test_a_lambda_among_the_settings_is_refused() -> None:
    with pytest.raises(ModelError, match="no key can cover it"):
        digest(nn.Sequential(Whole(lambda values: values)))


def test_weights_that_are_not_there_are_refused() -> None:
    with torch.device("meta"):
        model = StagedModel.from_module(nn.Conv2d(3, 2, 1))
    with pytest.raises(ModelError, match=r"weight can't be keyed: .* on meta has no digest"):
        model.digests()


# ----------------------------------------------------------------------------------------------------- whole modules


@pytest.mark.parametrize("settings", [(1, 2), (1.0, 1), ("a", "b"), ((1, 2), (2, 1)), (None, 0), ({"a": 1}, {"a": 2})])
def test_the_settings_of_a_whole_module_are_in_its_key(settings: tuple[Any, Any]) -> None:
    one, other = (digest(nn.Sequential(drawn(Whole(setting)))) for setting in settings)
    assert one == digest(nn.Sequential(drawn(Whole(settings[0])))) != other


@pytest.mark.parametrize(
    ("inner", "is_same"),
    [
        (lambda: nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, momentum=0.2), nn.Dropout(0.2)), True),
        (lambda: nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, eps=0.1), nn.Dropout(0.5)), False),
        (lambda: nn.Sequential(nn.Conv2d(3, 3, 1, padding=1), nn.BatchNorm2d(3), nn.Dropout(0.5)), False),
    ],
)
def test_what_torchs_layers_ignore_in_eval_mode_does_not_matter_inside_a_whole_module_either(
    inner: Callable[[], nn.Module], is_same: bool
) -> None:
    plain = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Dropout(0.5))
    one, other = (digest(nn.Sequential(drawn(Whole(1, module)))) for module in (plain, inner()))
    assert (one == other) == is_same


def test_layers_with_weak_references_inside_a_whole_module_can_be_keyed() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(3, 3)

        def forward(self, values: Tensor) -> Tensor:
            return values if values.sum() > 0 else -values

    digest(nn.Sequential(Recurrent()))


OWN = """
import torch
from torch import nn
{imports}

class Deciding(nn.Module):
    {text}
    def forward(self, x):
        {comment}
        return x * {factor} if x.sum() > 0 else -x

def make():
    return nn.Sequential(nn.Conv2d(3, 3, 1), Deciding())
"""


def own(folder: Path, imports: str = "", text: str = "", comment: str = "", factor: str = "2") -> str:
    folder.mkdir(exist_ok=True)
    path = folder / "own.py"
    path.write_text(OWN.format(imports=imports, text=text, comment=comment, factor=factor))
    model = backbone(f"{path}:make")
    return model.digest(model.cut_points[-1])


def test_the_source_of_a_whole_module_is_in_its_key_and_its_comments_layout_and_place_are_not(tmp_path: Path) -> None:
    key = own(tmp_path / "a")
    assert own(tmp_path / "b", text='"""Says what it does."""', comment="# why") == key
    assert own(tmp_path / "c", factor="(2)") == key
    assert own(tmp_path / "d", factor="3") != key
    assert own(tmp_path / "a", factor="3") != key


@pytest.mark.parametrize(("imports", "factor"), [("import {0}", "{0}.FACTOR"), ("from {0} import FACTOR", "FACTOR")])
def test_the_source_that_a_whole_module_imports_is_in_its_key(tmp_path: Path, imports: str, factor: str) -> None:
    helper, keys = f"helper_{len(factor)}", list[str]()
    for number in (1, 1, 2):
        folder = tmp_path / f"{len(keys)}"
        folder.mkdir()
        (folder / f"{helper}.py").write_text(f"FACTOR = {number}\n")
        keys.append(own(folder, imports=imports.format(helper), factor=factor.format(helper)))
        del sys.modules[helper]  # as in a new process
    assert keys[0] == keys[1] != keys[2]


def test_an_old_model_keeps_its_key_when_its_file_is_edited_and_loaded_again(tmp_path: Path) -> None:
    path = tmp_path / "own.py"
    path.write_text(OWN.format(imports="", text="", comment="", factor="2"))
    model = backbone(f"{path}:make")
    path.write_text(OWN.format(imports="", text="", comment="", factor="3"))
    newer = backbone(f"{path}:make")
    path.write_text(OWN.format(imports="", text="", comment="", factor="4"))
    assert model.digest("0") == newer.digest("0")
    assert model.digest("1") != newer.digest("1")
    path.write_text(OWN.format(imports="", text="", comment="", factor="2"))
    assert backbone(f"{path}:make").digest("1") == model.digest("1")


def bypassed(values: Tensor) -> bool:
    return bool(values.sum() > 1e9)  # control flow: the module stays whole


TABLE = torch.ones(3)


class Reading(nn.Module):
    slope = 1.0

    def forward(self, values: Tensor) -> Tensor:
        return values if bypassed(values) else self.scaled(values)

    def scaled(self, values: Tensor) -> Tensor:
        return values * self.slope * TABLE[:, None, None]


def closed(gain: Any) -> nn.Module:
    class Closed(nn.Module):
        def forward(self, values: Tensor) -> Tensor:
            return values if bypassed(values) else values * gain

    return nn.Sequential(Closed())


def test_what_the_methods_of_a_whole_module_capture_is_in_its_key() -> None:
    for one, other in ((1.0, 1.5), (torch.ones(3, 1, 1), torch.full((3, 1, 1), 2.0))):
        assert digest(closed(one)) == digest(closed(one)) != digest(closed(other))


def test_class_attributes_globals_and_methods_that_a_whole_module_reads_are_in_its_key(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Inheriting(Reading):
        def forward(self, values: Tensor) -> Tensor:
            return super().forward(values)

    for module in (nn.Sequential(Reading()), nn.Sequential(Inheriting())):
        before = digest(module)
        assert digest(module) == before
        for owner, name, value in (
            (Reading, "slope", 2.0),
            (sys.modules[__name__], "TABLE", TABLE * 2),
            (Reading, "scaled", lambda self, values: -values),
            (sys.modules[__name__], "bypassed", lambda values: bool(values.sum() > 0)),
        ):
            with monkeypatch.context() as patch:
                patch.setattr(owner, name, value)
                assert digest(module) != before
        assert digest(module) == before


def test_a_value_without_a_key_that_a_whole_module_reads_is_refused_by_name() -> None:
    with pytest.raises(ModelError, match=r"0 \(Closed\) can't be keyed: it uses gain, a object, .* fingerprint\(\)"):
        digest(closed(object()))


@pytest.mark.filterwarnings("ignore")  # torch.ao's quantization is deprecated, and people have such models
def test_packed_weights_of_a_quantized_layer_are_refused_by_name() -> None:
    module = nn.Sequential(nn.Flatten(), nn.Linear(12, 2), nn.ReLU()).eval()
    quantized = torch.ao.quantization.quantize_dynamic(module, {nn.Linear}, dtype=torch.qint8)  # type: ignore[no-untyped-call]
    model = StagedModel.from_module(quantized)
    model.up_to("0").digest("0")  # the advice: cut before it
    with pytest.raises(ModelError, match=r"1 holds packed weights .* Cut before it, or use the float model"):
        model.digest("1")
