from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from support.splitting import randomise
from torch import Tensor, nn

from featstore import Output, StagedModel, Trunk, View
from featstore.models.graph import random_states
from featstore.models.pool import Pool
from featstore.models.precision import PRECISIONS, Precision
from featstore.models.trunk import choose_device, default_batch_size, numerics

VIEW = View(size=16, resize=18)
BACKENDS = torch.backends


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
    trunk = Trunk(staged(module), outputs(staged(), "0", "3"), view=VIEW, batch_size=8)
    with torch.no_grad():
        expected = module(VIEW.normalise(views(8)))
        first = module[0](VIEW.normalise(views(8)))
    found = trunk(views(8))
    assert torch.equal(found[1], expected)
    assert torch.equal(found[0], first)
    assert not found[1].requires_grad


def test_a_row_depends_on_its_image_alone() -> None:
    model = staged()
    trunk = Trunk(model, outputs(model, "3"), view=VIEW, batch_size=4)
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
    together = Trunk(model, asked, view=VIEW, batch_size=4)(views(6))
    for output, rows in zip(asked, together, strict=True):
        (alone,) = Trunk(model, [output], view=VIEW, batch_size=4)(views(6))
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
    trunk = Trunk(staged(module), outputs(staged(), "3"), view=VIEW, batch_size=4, precision=precision)
    with torch.no_grad():
        expected = copy.deepcopy(module).to(dtype)(VIEW.normalise(views(4)).to(dtype)).float()
    assert torch.equal(trunk(views(4))[0], expected)
    assert next(module.parameters()).dtype == torch.float32


def test_weights_of_another_type_are_cast_for_fp32() -> None:
    half = net().half()
    trunk = Trunk(staged(half), outputs(staged(), "3"), view=VIEW, batch_size=4)
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
        Trunk(model, outputs(model, "3"), view=VIEW, batch_size=0)
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
    assert profile.keys() == {"batch_size", "device", "threads", "cpu", "torch"}
    assert profile["batch_size"] == default_batch_size(torch.device("cpu")) == 32
    assert default_batch_size(torch.device("cuda")) == 256


# ------------------------------------------------------------------------------------------------------------ numerics


def settings() -> dict[str, Any]:
    readers: dict[str, Callable[[], Any]] = {
        "all": lambda: BACKENDS.fp32_precision,  # type: ignore[attr-defined]
        "cuda": lambda: BACKENDS.cudnn.fp32_precision,
        "cuda.matmul": lambda: BACKENDS.cuda.matmul.fp32_precision,
        "cuda.conv": lambda: BACKENDS.cudnn.conv.fp32_precision,  # type: ignore[attr-defined]
        "cuda.rnn": lambda: BACKENDS.cudnn.rnn.fp32_precision,  # type: ignore[attr-defined]
        "mkldnn.matmul": lambda: BACKENDS.mkldnn.matmul.fp32_precision,  # type: ignore[attr-defined]
        "mkldnn.conv": lambda: BACKENDS.mkldnn.conv.fp32_precision,  # type: ignore[attr-defined]
        "mkldnn.rnn": lambda: BACKENDS.mkldnn.rnn.fp32_precision,  # type: ignore[attr-defined]
        "older": torch.get_float32_matmul_precision,
        "older, cuda": lambda: BACKENDS.cuda.matmul.allow_tf32,
        "older, cudnn": lambda: BACKENDS.cudnn.allow_tf32,
        "benchmark": lambda: BACKENDS.cudnn.benchmark,
        "deterministic": lambda: BACKENDS.cudnn.deterministic,
        "fp16 sums": lambda: BACKENDS.cuda.matmul.allow_fp16_reduced_precision_reduction,
        "fp16 sums, split": lambda: BACKENDS.cuda.matmul.allow_fp16_reduced_precision_reduction_split_k,
        "fp16 accumulation": lambda: BACKENDS.cuda.matmul.allow_fp16_accumulation,
    }
    found: dict[str, Any] = {}
    for name, read in readers.items():
        try:
            found[name] = read()
        except RuntimeError:  # torch refuses to read the older switches where the newer ones contradict them
            found[name] = "contradicted"
    return found


def set_both() -> None:
    torch.set_float32_matmul_precision("high")
    BACKENDS.cuda.matmul.fp32_precision = "ieee"


CHOICES: dict[str, Callable[[], None]] = {
    "nothing": lambda: None,
    "older high": lambda: torch.set_float32_matmul_precision("high"),
    "older medium": lambda: torch.set_float32_matmul_precision("medium"),
    "older cuda": lambda: setattr(BACKENDS.cuda.matmul, "allow_tf32", True),
    "older cudnn": lambda: setattr(BACKENDS.cudnn, "allow_tf32", False),
    "all tf32": lambda: setattr(BACKENDS, "fp32_precision", "tf32"),
    "all ieee": lambda: setattr(BACKENDS, "fp32_precision", "ieee"),
    "all bf16": lambda: setattr(BACKENDS, "fp32_precision", "bf16"),
    "cuda": lambda: setattr(BACKENDS.cudnn, "fp32_precision", "tf32"),
    "cuda matmul": lambda: setattr(BACKENDS.cuda.matmul, "fp32_precision", "tf32"),
    "cuda conv": lambda: setattr(BACKENDS.cudnn.conv, "fp32_precision", "ieee"),  # type: ignore[attr-defined]
    "cpu matmul": lambda: setattr(BACKENDS.mkldnn.matmul, "fp32_precision", "bf16"),  # type: ignore[attr-defined]
    "older and newer": set_both,
    "fast": lambda: setattr(BACKENDS.cudnn, "benchmark", True),
    "sums": lambda: setattr(BACKENDS.cuda.matmul, "allow_fp16_reduced_precision_reduction", (False, False)),
}


@pytest.fixture
def restored() -> Any:
    """Puts torch's own defaults back; a test may leave settings that no public function can undo exactly."""
    defaults = settings()
    yield
    BACKENDS.fp32_precision = "none"  # type: ignore[attr-defined]
    BACKENDS.cudnn.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")
    BACKENDS.cudnn.allow_tf32 = True
    owners: list[tuple[Any, str]] = [
        (BACKENDS.cuda.matmul, "cuda.matmul"),
        (BACKENDS.mkldnn.matmul, "mkldnn.matmul"),  # type: ignore[attr-defined]
        (BACKENDS.cudnn.conv, "cuda.conv"),  # type: ignore[attr-defined]
        (BACKENDS.cudnn.rnn, "cuda.rnn"),
    ]
    for owner, name in owners:
        owner.fp32_precision = defaults[name]
    BACKENDS.cudnn.benchmark = defaults["benchmark"]
    BACKENDS.cuda.matmul.allow_fp16_reduced_precision_reduction = (defaults["fp16 sums"], defaults["fp16 sums, split"])
    assert settings() == defaults


@pytest.mark.usefixtures("restored")
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("choice", CHOICES)
def test_arithmetic_is_pinned_for_the_pass_and_each_setting_comes_back(choice: str, precision: Precision) -> None:
    CHOICES[choice]()
    before = settings()
    with numerics(precision, torch.device("cpu")):
        within = settings()
    assert settings() == before
    kinds = ("cuda.matmul", "cuda.conv", "cuda.rnn", "mkldnn.matmul", "mkldnn.conv", "mkldnn.rnn")
    assert {within[kind] for kind in kinds} == {"ieee"}
    assert (within["benchmark"], within["deterministic"], within["fp16 sums"]) == (False, True, False)


@pytest.mark.usefixtures("restored")
def test_settings_that_followed_their_parent_go_on_following_it() -> None:
    BACKENDS.fp32_precision = "tf32"  # type: ignore[attr-defined]
    with numerics("fp32", torch.device("cpu")):
        pass
    BACKENDS.fp32_precision = "ieee"  # type: ignore[attr-defined]
    assert settings()["cuda.matmul"] == settings()["mkldnn.conv"] == "ieee"


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_tf32_is_allowed_on_a_gpu_for_tf32_alone() -> None:
    for precision in PRECISIONS:
        with numerics(precision, torch.device("cuda")):
            expected = "tf32" if precision == "tf32" else "ieee"
            assert {settings()[kind] for kind in ("cuda.matmul", "cuda.conv", "cuda.rnn")} == {expected}


def test_threads_that_run_trunks_of_one_model_leave_each_other_alone() -> None:
    module = net().train()
    model = staged(module)
    wanted = outputs(model, "1")
    images = views(32)
    expected = Trunk(model, wanted, view=VIEW, batch_size=2)(images)[0]
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}

    def passes() -> list[Tensor]:
        trunk = Trunk(model, wanted, view=VIEW, batch_size=2)
        return [trunk(images)[0] for _ in range(6)]

    with ThreadPoolExecutor(3) as threads:
        futures = [threads.submit(passes) for _ in range(3)]
    results = [result for future in futures for result in future.result()]
    assert all(torch.equal(result, expected) for result in results)
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    assert all(part.training for part in module.modules())
