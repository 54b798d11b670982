from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from support.splitting import randomise
from support.torch_settings import settings
from torch import Tensor, nn

from featstore import ModelError, Output, StagedModel, Trunk, View
from featstore.models.modes import random_states
from featstore.models.names import Batching, Precision
from featstore.models.pool import Pool
from featstore.models.purity import check_pure
from featstore.models.trunk import choose_device, default_batch_size

VIEW = View(size=16, resize=18)


def net() -> nn.Sequential:
    module = nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True)),
        nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Dropout(0.5)),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 4, 3),
    )
    randomise(module, 0)
    return module.eval()


def staged(module: nn.Module | None = None) -> StagedModel:
    return StagedModel.from_module(module or net(), view=VIEW)


def outputs(model: StagedModel, *cuts: str, reduction: str = "none") -> list[Output]:
    return [Output(cut, model.pool(cut, reduction)) for cut in cuts]


def views(num: int) -> Tensor:
    generator = torch.Generator().manual_seed(num)
    return torch.randint(0, 256, (num, 3, 16, 16), generator=generator, dtype=torch.uint8)


def test_a_full_batch_gets_what_the_plain_module_computes() -> None:
    module = net()
    trunk = Trunk(staged(module), outputs(staged(), "0", "3"), view=VIEW, batching=Batching(8))
    with torch.no_grad():
        expected = module(VIEW.normalise(views(8)))
        first = module[0](VIEW.normalise(views(8)))
    found = trunk(views(8))
    assert torch.equal(found[1], expected)
    assert torch.equal(found[0], first)
    assert not found[1].requires_grad


def test_a_row_depends_on_its_image_alone() -> None:
    model = staged()
    trunk = Trunk(model, outputs(model, "3"), view=VIEW, batching=Batching(4))
    images = views(11)
    (rows,) = trunk(images)
    order = torch.randperm(11, generator=torch.Generator().manual_seed(0))
    assert torch.equal(trunk(images[order])[0], rows[order])
    for num in (1, 2, 3, 5):
        assert torch.equal(trunk(images[:num])[0], rows[:num])
        assert torch.equal(trunk(images[-num:])[0], rows[-num:])


def test_no_images_give_no_rows_of_the_right_shape() -> None:
    model = staged()
    (maps, pooled) = Trunk(model, [*outputs(model, "3"), *outputs(model, "3", reduction="concat")], view=VIEW)(views(0))
    assert (maps.shape, pooled.shape) == ((0, 4, 12, 12), (0, 8))


def test_several_outputs_of_one_pass_equal_a_pass_for_each() -> None:
    model = staged()
    asked = [*outputs(model, "0", "1", "1.1", "2"), *outputs(model, "0", "0.1", reduction="concat")]
    together = Trunk(model, asked, view=VIEW, batching=Batching(4))(views(6))
    for output, rows in zip(asked, together, strict=True):
        (alone,) = Trunk(model, [output], view=VIEW, batching=Batching(4))(views(6))
        assert torch.equal(rows, alone)
        assert rows.is_contiguous()
        assert rows.dtype == torch.float32


def test_the_trunk_runs_in_eval_mode_without_gradient_whatever_the_model_is_in() -> None:
    module = net()
    expected = Trunk(staged(module), outputs(staged(), "3"), view=VIEW)(views(3))[0]
    module.train()
    module[1].eval()
    flags = [part.training for part in module.modules()]
    statistics = copy.deepcopy(module.state_dict())
    trunk = Trunk(StagedModel.from_module(module, view=VIEW), outputs(staged(), "3"), view=VIEW)
    with torch.enable_grad():
        assert torch.equal(trunk(views(3))[0], expected)
    assert [part.training for part in module.modules()] == flags
    assert all(torch.equal(tensor, statistics[name]) for name, tensor in module.state_dict().items())


def test_flags_and_settings_come_back_after_an_error() -> None:
    class Failing(nn.Module):
        def forward(self, values: Tensor) -> Tensor:
            return values if values.sum() < 0 else values[1:].reshape(-1, 7, 7)

    module = nn.Sequential(nn.BatchNorm2d(3), Failing()).train()
    trunk = Trunk(staged(module), [Output("1", Pool("none", "NCHW"))], view=VIEW)
    images = views(3)
    before = settings(), random_states()
    with pytest.raises(RuntimeError, match="invalid for input"):
        trunk(images)
    assert all(part.training for part in module.modules())
    assert (settings(), random_states()) == before


def test_a_caller_s_autocast_changes_nothing() -> None:
    model = staged()
    trunk = Trunk(model, outputs(model, "3"), view=VIEW)
    expected = trunk(views(2))[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(trunk(views(2))[0], expected)
        assert torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_lower_precision_casts_weights_and_images_and_gives_float32(precision: Precision) -> None:
    module = net()
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    trunk = Trunk(staged(module), outputs(staged(), "3"), view=VIEW, batching=Batching(4), precision=precision)
    with torch.no_grad():
        expected = copy.deepcopy(module).to(dtype)(VIEW.normalise(views(4)).to(dtype)).float()
    assert torch.equal(trunk(views(4))[0], expected)
    assert next(module.parameters()).dtype == torch.float32


def test_weights_of_another_type_are_cast_for_fp32() -> None:
    half = net().half()
    trunk = Trunk(staged(half), outputs(staged(), "3"), view=VIEW, batching=Batching(4))
    with torch.no_grad():
        expected = copy.deepcopy(half).float()(VIEW.normalise(views(4)))
    assert torch.equal(trunk(views(4))[0], expected)
    assert next(half.parameters()).dtype == torch.float16


def test_a_trunk_of_a_thawed_model_sees_its_trained_weights() -> None:
    model = staged()
    trunk = Trunk(model, outputs(model, "3"), view=VIEW)
    before = trunk(views(2))[0]
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.mul_(2)
    assert trunk.is_live
    assert not torch.equal(trunk(views(2))[0], before)


@pytest.mark.parametrize(("module", "precision"), [(net(), "bf16"), (net().double(), "fp32")])
def test_a_trunk_of_another_type_than_the_model_has_weights_of_its_own(module: nn.Module, precision: Precision) -> None:
    model = staged(module)
    trunk = Trunk(model, outputs(staged(), "3"), view=VIEW, precision=precision)
    before = trunk(views(2))[0]
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.mul_(2)
    assert not trunk.is_live
    assert torch.equal(trunk(views(2))[0], before)


def test_wrong_arguments_are_refused() -> None:
    model = staged()
    with pytest.raises(ValueError, match=r"'fp64' is no precision. The precisions are fp32, tf32, bf16, fp16"):
        Trunk(model, outputs(model, "3"), view=VIEW, precision="fp64")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="batch size 0 is too small"):
        Trunk(model, outputs(model, "3"), view=VIEW, batching=Batching(0))
    with pytest.raises(ValueError, match=r"'gpu' is no device. Expected auto, cpu, cuda or cuda:1"):
        choose_device("gpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused_and_auto_is_the_cpu() -> None:
    assert choose_device("auto") == torch.device("cpu")
    with pytest.raises(ValueError, match="There is no GPU cuda:1 here"):
        choose_device("cuda:1")


def test_the_profile_names_what_may_move_the_last_bits() -> None:
    model = staged()
    profile = Trunk(model, outputs(model, "3"), view=VIEW).profile()
    assert profile.keys() == {"batch_size", "device", "memory_format", "threads", "cpu", "torch"}
    assert profile["batch_size"] == default_batch_size(torch.device("cpu")) == 32
    assert default_batch_size(torch.device("cuda")) == 256


def test_threads_that_run_trunks_of_one_model_leave_each_other_alone() -> None:
    module = net().train()
    model = staged(module)
    wanted = outputs(model, "1")
    images = views(32)
    expected = Trunk(model, wanted, view=VIEW, batching=Batching(2))(images)[0]
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}

    def passes() -> list[Tensor]:
        trunk = Trunk(model, wanted, view=VIEW, batching=Batching(2))
        return [trunk(images)[0] for _ in range(6)]

    with ThreadPoolExecutor(3) as threads:
        futures = [threads.submit(passes) for _ in range(3)]
    results = [result for future in futures for result in future.result()]
    assert all(torch.equal(result, expected) for result in results)
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    assert all(part.training for part in module.modules())


class Ends(nn.Module):
    """Ends in something else than real numbers."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def forward(self, values: Tensor) -> Tensor:
        match self.how:
            case "complex":
                spectrum: Tensor = torch.fft.fft2(values)
                return spectrum
            case "sparse":
                return values.to_sparse()
            case "quantised":
                return torch.quantize_per_tensor(values, 0.1, 0, torch.qint8)
            case "meta":
                return values.to("meta")
            case "nested":
                return torch.nested.nested_tensor(list(values))
        return values[:, :0]


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("complex", r"complex numbers \(torch\.complex64\), and features are real\. Say in the forward"),
        ("sparse", r"a sparse tensor \(torch\.sparse_coo\)\. .* values\.to_dense\(\)"),
        ("quantised", r"a quantised tensor \(torch\.qint8\)\. .* values\.dequantize\(\)"),
        ("meta", r"a tensor on the device meta, which has no values\. Build the module on a real device"),
        ("nested", r"a nested tensor\. .* values\.to_padded_tensor"),
        ("empty", r"no values at all: the shape for one image is \(0, 14, 14\)\. Name another cut"),
    ],
)
@pytest.mark.filterwarnings("ignore")  # torch's own, about quantised and nested tensors
def test_what_are_no_real_numbers_is_refused_by_name(how: str, words: str) -> None:
    model = StagedModel.from_module(nn.Sequential(nn.Conv2d(3, 4, 3), Ends(how)).eval(), view=VIEW, name="net")
    (cut,) = (each for each in model.cut_points if each != "0")
    for check in (
        lambda: check_pure(model, cut),
        lambda: Trunk(model, [Output(cut, Pool("none", "NCHW"))], view=model.view)(views(2)),
    ):
        with pytest.raises(ModelError, match=f"^At {cut} net gives {words}"):
            check()


def test_complex_numbers_on_the_way_to_real_ones_are_no_matter() -> None:
    class Spectrum(nn.Module):
        def forward(self, values: Tensor) -> Tensor:
            strengths: Tensor = torch.fft.fft2(values).abs()
            return strengths

    module = nn.Sequential(nn.Conv2d(3, 4, 3), Spectrum()).eval()
    model = StagedModel.from_module(module, view=VIEW)
    check_pure(model, model.cut_points[-1])
    output = Output(model.cut_points[-1], Pool("none", "NCHW"))
    (values,) = Trunk(model, [output], view=model.view, batching=Batching(4))(views(4))
    with torch.no_grad():
        assert torch.equal(values, module(model.view.normalise(views(4))))


class Flattened(nn.Module):
    """As many write it: the rows of a map by view(), which takes maps of one memory format alone."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4 * (VIEW.size - 2) ** 2, 5)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.conv(images)
        return self.fc(maps.view(maps.shape[0], -1))  # type: ignore[no-any-return]


def test_a_model_that_takes_no_channels_last_runs_without_and_the_profile_says_so() -> None:
    model = StagedModel.from_module(Flattened().eval(), view=VIEW)
    wanted = [Output("fc", Pool("none", "NC"))]
    trunk = Trunk(model, wanted, view=VIEW, batching=Batching(4))
    assert trunk.profile()["memory_format"] == "contiguous"
    assert trunk(views(4))[0].shape == (4, 5)
    assert Trunk(staged(), outputs(staged(), "3"), view=VIEW).profile()["memory_format"] == "channels_last"


def test_frozen_stages_behind_a_slice_of_channels_give_the_bits_of_the_whole_trunk() -> None:
    class Sliced(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 32, 3), nn.Conv2d(16, 24, 3)

        def forward(self, images: Tensor) -> Tensor:
            return self.second(self.first(images).chunk(2, 1)[0])  # type: ignore[no-any-return]

    torch.manual_seed(0)
    model = StagedModel.from_module(Sliced().eval(), view=VIEW)
    cut = model.cut_points[-2]
    trunk = Trunk(model, [Output(cut, Pool("none", "NCHW")), outputs(model, "second", reduction="none")[0]], view=VIEW)
    stored, whole = trunk(views(32))
    rest = model.part(model.index(cut) + 1, memory_format="channels_last")
    with torch.no_grad():
        assert torch.equal(rest(stored).contiguous(), whole)
