from __future__ import annotations

import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.splitting import randomise
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from featstore import ModelError, StagedModel, View
from featstore.models.modes import random_states
from featstore.models.purity import check_pure

VIEW = View(size=12, resize=14)


class Applied(nn.Module):
    """A convolution, and a function behind it."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.function = nn.Conv2d(3, 4, 3), function

    def forward(self, values: Tensor) -> Tensor:
        return self.function(self.conv(values))


class Whole(Applied):
    """The same, with control flow that can't be traced."""

    def forward(self, values: Tensor) -> Tensor:
        if values.sum() > 1e9:
            return values
        return self.function(self.conv(values))


def staged(inner: nn.Module) -> StagedModel:
    module = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Sequential(inner), nn.ReLU(inplace=True))
    randomise(module, 0)
    return StagedModel.from_module(module.eval(), view=VIEW)


def batch_norm(values: Tensor) -> Tensor:
    return F.batch_norm(values, None, None, training=True)


def rarely(values: Tensor) -> Tensor:
    return values if random.random() < 0.8 else -values


@pytest.mark.parametrize(
    ("inner", "where"),
    [
        (Applied(lambda values: F.dropout(values, 0.5)), "dropout in stage 1"),
        (Applied(lambda values: values + F.dropout(values.relu(), 0.5, inplace=True)), "dropout in stage"),
        (Applied(lambda values: values + torch.rand_like(values)), "rand_like in stage"),
        (Applied(lambda values: values + torch.rand(values.shape)), "rand in stage"),
        (Applied(lambda values: values + torch.rand(1)), r"1.0 \(Applied\)"),
        (Applied(lambda values: values * random.random()), r"1.0 \(Applied\)"),
        (Applied(lambda values: values * float(np.random.rand())), r"1.0 \(Applied\)"),  # noqa: NPY002
        (Applied(rarely), r"1.0 \(Applied\)"),
        (Whole(lambda values: values * random.random()), r"1.0 \(Whole\)"),
        (Whole(rarely), r"1.0 \(Whole\)"),
    ],
)
def test_what_stays_random_in_eval_mode_is_refused_by_name(inner: nn.Module, where: str) -> None:
    model = staged(inner)
    random.seed(3)  # `rarely` changes nothing in the first seven runs
    with pytest.raises(ModelError, match=rf"sequential can't be cached at 2: {where}.* gives other values each time"):
        check_pure(model, "2")
    check_pure(model, "0")  # the advice: cut before it


@pytest.mark.parametrize(
    ("inner", "where"),
    [
        (nn.BatchNorm2d(3, track_running_stats=False), r"1.0 \(BatchNorm2d\)"),
        (Applied(batch_norm), "batch_norm in stage 1"),
        (Applied(lambda values: values - values.mean(0)), "mean in stage 1"),
        (Applied(lambda values: values / values.shape[0]), "truediv in stage 1, in batches of 2,"),
        (Applied(lambda values: values + torch.arange(values.shape[0]).reshape(-1, 1, 1, 1)), "arange in stage 1"),
        (Applied(lambda values: values + values.roll(1, 0)), "roll in stage 1"),
        (Whole(lambda values: values - values.mean(0)), r"1.0 \(Whole\)"),
    ],
)
def test_what_depends_on_the_other_images_of_a_batch_is_refused_by_name(inner: nn.Module, where: str) -> None:
    model = staged(inner)
    with pytest.raises(
        ModelError, match=rf"can't be cached at 2: what {where} gives for an image depends on the other"
    ):
        check_pure(model, "2")
    check_pure(model, "0")


@pytest.mark.parametrize(
    "inner",
    [
        nn.BatchNorm2d(3),
        nn.InstanceNorm2d(3),
        nn.Dropout(),
        Applied(lambda values: F.dropout(values, 0.5, training=False)),
        Whole(lambda values: values * (1 + 0 * random.random())),  # draws a number and doesn't use it
        Whole(lambda values: values * 2),
        Applied(lambda values: values.argmax(1, keepdim=True)),
        Applied(lambda values: (values * 0).log() * 0),  # nothing but NaN
    ],
)
def test_a_function_of_one_image_passes(inner: nn.Module) -> None:
    check_pure(staged(inner), "1")


def test_tokens_before_images_pass_through_and_are_no_place_to_cut() -> None:
    module = nn.Sequential(Applied(lambda values: values.flatten(2).permute(2, 0, 1)), nn.LayerNorm(4), Mixed())
    model = StagedModel.from_module(module.eval(), view=VIEW)
    check_pure(model, "2")
    with pytest.raises(ModelError, match=r"for 5 images the value there is \(100, 5, 4\), and rows are images"):
        check_pure(model, "1")


class Mixed(nn.Module):
    def forward(self, values: Tensor) -> Tensor:
        return values.mean(0)


def test_the_check_leaves_the_model_and_the_random_states_alone() -> None:
    module = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Dropout(), Whole(lambda v: v + 0 * torch.rand(1)))
    model = StagedModel.from_module(module.train(), view=VIEW)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    states = random_states()
    check_pure(model, "3")
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    assert all(part.training for part in module.modules())
    assert random_states() == states


def test_a_network_of_another_type_can_be_checked() -> None:
    check_pure(staged(nn.BatchNorm2d(3)).double(), "2")


@pytest.mark.parametrize(
    "function",
    [
        lambda values: values - values.unflatten(0, (-1, 8)).mean(1).repeat_interleave(8, 0),
        lambda values: values + torch.arange(len(values)).reshape(-1, 1, 1, 1),
    ],
)
def test_what_mixes_images_in_batches_of_the_size_that_runs_alone_is_refused(
    function: Callable[[Tensor], Tensor],
) -> None:
    model = staged(Whole(lambda values: values if len(values) % 8 else function(values)))
    check_pure(model, "2")
    check_pure(model, "2", batch_size=12)
    check_pure(model, "0", batch_size=16)
    with pytest.raises(
        ModelError, match=r"what 1\.0 \(Whole\), in batches of 16, gives for an image depends on the other"
    ):
        check_pure(model, "2", batch_size=16)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5, 7, 8, 33])
def test_a_function_of_one_image_passes_at_every_batch_size(batch_size: int) -> None:
    check_pure(staged(nn.BatchNorm2d(3)), "2", batch_size=batch_size, device=torch.device("cpu"))


class Functions(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Operators(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", [Functions, Operators])
def test_a_mode_that_may_change_what_operations_compute_is_refused_by_name(mode: type[Any]) -> None:
    model = staged(nn.ReLU())
    message = rf"can't be cached at 1 while test_purity\.{mode.__name__} is active: .* Leave its with block\."
    with mode(), torch.device("cpu"), pytest.raises(ModelError, match=message):
        check_pure(model, "1")
    check_pure(model, "1")  # the advice


def test_a_default_device_is_no_mode_that_changes_results() -> None:
    with torch.device("cpu"):
        check_pure(staged(nn.ReLU()), "1")
    torch.set_default_device("cpu")
    try:
        check_pure(staged(nn.ReLU()), "1")
    finally:
        torch.set_default_device(None)


class Scaling(nn.Module):
    """A convolution that can't be traced, and a factor that is read from elsewhere."""

    def __init__(self, factor: Callable[[], float]) -> None:
        super().__init__()
        self.conv, self.factor = nn.Conv2d(3, 4, 3), factor

    def forward(self, values: Tensor) -> Tensor:
        if values.isnan().all():
            return values
        return self.scaled(self.conv(values))

    def scaled(self, values: Tensor) -> Tensor:
        return values * self.factor()

    def save(self, path: str) -> None:
        """What only its author calls."""
        Path(path).write_bytes(Path(path).read_bytes() + str(time.time()).encode())


class Vouched(Scaling):
    def fingerprint(self) -> str:
        return "factor 1"


def scaling(module: nn.Module) -> StagedModel:
    return StagedModel.from_module(nn.Sequential(module).eval(), view=VIEW, name="scaling")


@pytest.mark.parametrize(
    ("factor", "what"),
    [
        (lambda: float(os.environ.get("FACTOR", "1")), r"the environment \(os.environ\)"),
        (lambda: 1.0 if hash("text") else 2.0, r"numbers that each process has of its own \(hash\)"),
        (lambda: globals()["FACTOR"], r"what the interpreter holds \(globals\)"),
        (lambda: sys.modules[__name__].FACTOR, r"what the interpreter holds \(sys.modules\)"),
        (lambda: 1.0 if time.time() else 2.0, r"the clock \(time.time\)"),
    ],
)
def test_untraced_code_that_reads_what_no_key_covers_is_refused(factor: Callable[[], float], what: str) -> None:
    with pytest.raises(ModelError, match=rf"\(Scaling\) reads {what}, and no run.*fingerprint\(\)"):
        check_pure(scaling(Scaling(factor)), "0")


FACTOR = 1.0


def test_untraced_code_that_opens_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "factor").write_text("1")
    path = str(tmp_path / "factor")
    read: Callable[[], float] = lambda: float(np.loadtxt(path))  # noqa: E731

    with pytest.raises(ModelError, match=r"\(Scaling\) reads a file \(.*/factor\)"):
        check_pure(scaling(Scaling(read)), "0")
    with pytest.raises(ModelError, match=r"\(Scaling\) reads a file \(np.loadtxt\)"):  # in a branch that no run reaches
        check_pure(scaling(Scaling(lambda: 1.0 if path else float(np.loadtxt(path)))), "0")
    check_pure(scaling(Vouched(read)), "0")


def test_what_an_untraced_module_reads_beside_its_forward_doesnt_matter() -> None:
    check_pure(scaling(Scaling(lambda: 1.0)), "0")


@pytest.mark.parametrize(
    ("function", "num_passes"),
    [
        (lambda values: values.relu(), 0),
        (lambda values: values.reshape(values.shape[0], -1), 1),  # may know how many there are
        (lambda values: values + torch.zeros_like(values), 1),
        (lambda values: values * values.flatten(1).mean(1).reshape(-1, 1, 1, 1), 0),
        (lambda values: torch.stack(values.unbind(-1), -1) if values.ndim == 4 else values, 4),  # isn't traced
    ],
)
def test_whole_batches_are_run_only_where_structure_leaves_something_open(
    function: Callable[[Tensor], Tensor], num_passes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = staged(Applied(function) if num_passes < 4 else Whole(function))
    sizes: list[int] = []
    forward = nn.Conv2d.forward

    def noted(self: nn.Conv2d, values: Tensor) -> Tensor:
        if not values.is_meta and self.kernel_size == (1, 1):  # the first of two
            sizes.append(len(values))
        return forward(self, values)

    monkeypatch.setattr(nn.Conv2d, "forward", noted)
    check_pure(model, "2", batch_size=16)
    assert sizes.count(16) == num_passes


@pytest.mark.parametrize(
    "function",
    [
        lambda values: values + torch.arange(values.shape[0]).div(8, rounding_mode="floor").reshape(-1, 1, 1, 1),
        lambda values: values * torch.ones_like(values).cumsum(0).div(8, rounding_mode="floor"),
        lambda values: values / (1 + values.shape[0] // 8),
        lambda values: values.div(len(values) // 8 + 1),
        lambda values: values + torch.full((1, 1, 1, 1), 0.1).expand_as(values).cumsum(0).div(1, rounding_mode="floor"),
    ],
)
def test_a_traced_module_that_minds_places_only_in_batches_of_the_size_that_runs_is_refused(
    function: Callable[[Tensor], Tensor],
) -> None:
    model = staged(Applied(function))
    with pytest.raises(ModelError, match=r"in batches of 16, gives for an image depends on the other"):
        check_pure(model, "2", batch_size=16)


class Table(nn.Module):
    """A row for each of five places."""

    rows: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("rows", torch.arange(5.0).reshape(5, 1, 1, 1))

    def forward(self, values: Tensor) -> Tensor:
        return values + self.rows


def test_a_table_of_as_many_rows_as_the_small_batch_has_is_refused() -> None:
    with pytest.raises(ModelError, match="depends on the other"):
        check_pure(staged(Table()), "2", batch_size=5)
