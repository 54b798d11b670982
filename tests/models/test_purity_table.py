"""The purity check against a table: modules that depend on the batch, each in its own way, and some that only seem to.

Each is shown to be what the table says by running it, before the check is asked.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from time import perf_counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.splitting import randomise
from support.tiny import staged_vision_transformer
from torch import Tensor, nn
from torchvision.models.maxvit import MaxVit
from torchvision.models.shufflenetv2 import InvertedResidual
from torchvision.models.swin_transformer import SwinTransformer
from torchvision.models.vision_transformer import VisionTransformer
from torchvision.ops import DeformConv2d, SqueezeExcitation, StochasticDepth

from featstore import ModelError, Output, StagedModel, Trunk, View
from featstore.models.backbones import backbone
from featstore.models.names import Batching
from featstore.models.purity import check_pure

SIZE, BATCH = 16, 16
VIEW = View(size=SIZE, resize=18)
IMAGE = torch.linspace(-1, 1, 3 * SIZE * SIZE).sin().reshape(3, SIZE, SIZE)
SEEN: list[int] = []  # what a module may keep outside itself

Function = Callable[[Tensor], Tensor]


class Traced(nn.Module):
    """A function of a batch, as a module that torch.fx can trace."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function

    def forward(self, values: Tensor) -> Tensor:
        return self.function(values)


class Opaque(Traced):
    """The same, with control flow that can't be traced."""

    def forward(self, values: Tensor) -> Tensor:
        if values.isnan().all():
            return values
        return self.function(values)


class Above(nn.Module):
    """Treats a batch in another way once one number in it passes a limit."""

    def __init__(self, statistic: Function, limit: float) -> None:
        super().__init__()
        self.statistic, self.limit = statistic, limit

    def forward(self, values: Tensor) -> Tensor:
        if self.statistic(values) > self.limit:
            values = values / 2
        return values


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, values: Tensor) -> Tensor:
        self.calls += 1
        return values * self.calls


class CountingUntraced(Counting):
    def forward(self, values: Tensor) -> Tensor:
        return values if values.isnan().all() else super().forward(values)


class Settling(Counting):
    """Gives the same from its third run on, so that no search run by run finds it."""

    def forward(self, values: Tensor) -> Tensor:
        self.calls = min(self.calls + 1, 3)
        return values if values.isnan().all() else values * self.calls


class CountingLater(Counting):
    """Changes what it computes only after many runs."""

    def forward(self, values: Tensor) -> Tensor:
        self.calls += 1
        return values.relu() if self.calls > 50 and values.sum() > -1e9 else values


class CountingInABuffer(nn.Module):
    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, values: Tensor) -> Tensor:
        self.calls += 1
        return values + self.calls


class First(nn.Module):
    """Keeps the mean of the first batch it meets."""

    def __init__(self) -> None:
        super().__init__()
        self.mean: Tensor | None = None

    def forward(self, values: Tensor) -> Tensor:
        if self.mean is None:
            self.mean = values.mean()
        return values - self.mean


class Lazy(nn.Module):
    """Makes a table when it first runs."""

    def __init__(self) -> None:
        super().__init__()
        self.table: Tensor | None = None

    def forward(self, values: Tensor) -> Tensor:
        if self.table is None:
            self.table = torch.ones(SIZE)
            return values * self.table
        return self.table * values


class CountingInATensor(Counting):
    def __init__(self) -> None:
        super().__init__()
        self.number = torch.zeros(())

    def forward(self, values: Tensor) -> Tensor:
        self.number += 1
        return values + self.number


class Remembering(nn.Module):
    def forward(self, values: Tensor) -> Tensor:
        SEEN.append(len(SEEN))
        return values * len(SEEN)


class RememberingUntraced(Remembering):
    def forward(self, values: Tensor) -> Tensor:
        return values if values.isnan().all() else super().forward(values)


class Moving(nn.Module):
    """Subtracts a running mean that eval mode goes on moving."""

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, values: Tensor) -> Tensor:
        if values.isnan().all():
            return values
        self.mean = 0.9 * self.mean + 0.1 * values.mean()
        return values - self.mean


class Drawing(nn.Module):
    """Draws from a generator of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = np.random.default_rng(0)

    def forward(self, values: Tensor) -> Tensor:
        return values * float(self.generator.random())


def swapped(values: Tensor) -> Tensor:
    values = values.clone()
    values[0], values[1] = values[1].clone(), values[0].clone()
    return values


def first_darkened(values: Tensor) -> Tensor:
    values = values.clone()
    values[0] = 0
    return values


def joined_in_twos(values: Tensor) -> Tensor:
    shape = values.shape
    if shape[0] % 2:
        return values
    return values.reshape(shape[0] // 2, 2, *shape[1:]).flip(1).reshape(shape)


def attention_between_images(values: Tensor) -> Tensor:
    flat = values.flatten(1)
    return ((flat @ flat.T / 100).softmax(1) @ flat).reshape(values.shape)


IMPURE: dict[str, tuple[Callable[[], nn.Module], str]] = {
    # By an extreme or another statistic of the whole batch.
    "range": (lambda: Traced(lambda v: (v - v.min()) / (v.max() - v.min())), "min in stage"),
    "largest": (lambda: Traced(lambda v: v / v.abs().max()), "max in stage"),
    "largest by channel": (lambda: Traced(lambda v: v / v.amax((0, 2, 3), keepdim=True)), "amax in stage"),
    "largest, hidden by a clamp": (lambda: Traced(lambda v: v + v.max().clamp(-1e6, 3)), "max in stage"),
    "mean": (lambda: Traced(lambda v: v - v.mean()), "mean in stage"),
    "spread": (lambda: Traced(lambda v: v / v.std(0, keepdim=True).add(1)), "std in stage"),
    "quantile": (lambda: Traced(lambda v: v - v.flatten().median()), "median in stage"),
    "batch norm": (lambda: nn.BatchNorm2d(3, track_running_stats=False), "BatchNorm2d"),
    "softmax over images": (lambda: Traced(lambda v: v.softmax(0)), "softmax in stage"),
    "norm over images": (lambda: Traced(lambda v: F.normalize(v, dim=0)), "normalize in stage"),
    "layer norm over images": (
        lambda: Traced(lambda v: F.layer_norm(v.transpose(0, 3), v.shape[:1]).transpose(0, 3)), "layer_norm in stage"
    ),
    "largest, opaque": (lambda: Opaque(lambda v: v / v.abs().max()), r"\(Opaque\)"),
    "threshold on the largest, opaque": (lambda: Above(Tensor.max, 1.9), r"\(Above\)"),
    "threshold on the smallest, opaque": (lambda: Above(Tensor.min, -1.9), r"\(Above\)"),
    "threshold far away, opaque": (lambda: Above(Tensor.max, 1000), r"\(Above\)"),
    "threshold far below, opaque": (lambda: Above(lambda v: -v.min(), 1000), r"\(Above\)"),
    "threshold on the mean, opaque": (lambda: Above(Tensor.mean, 0.3), r"\(Above\)"),
    "threshold behind a norm, opaque": (
        lambda: nn.Sequential(nn.GroupNorm(1, 3), Above(Tensor.max, 2.5)), r"\(Above\)"
    ),
    # By order and company.
    "sorted": (lambda: Traced(lambda v: v.sort(0).values), "sort in stage"),
    "flipped": (lambda: Traced(lambda v: v.flip(0)), "flip in stage"),
    "rolled": (lambda: Traced(lambda v: v + v.roll(1, 0)), "roll in stage"),
    "measured over images": (lambda: Traced(lambda v: v.renorm(2, 1, 1e-3)), "renorm in stage"),
    "running sum": (lambda: Traced(lambda v: v.cumsum(0)), "cumsum in stage"),
    "ranked": (lambda: Traced(lambda v: v + v.argsort(0)), "argsort in stage"),
    "swapped": (lambda: Traced(swapped), r"in stage|\(Traced\)"),
    "in twos": (lambda: Traced(joined_in_twos), r"\(Traced\)|in stage"),
    "reshaped": (lambda: Traced(lambda v: v.reshape(3, -1, SIZE, SIZE).transpose(0, 1).contiguous()), "in stage"),
    "attention between images": (lambda: Traced(attention_between_images), "matmul in stage"),
    "convolution over images": (
        lambda: Traced(lambda v: F.avg_pool2d(v.transpose(0, 2), 3, 1, 1).transpose(0, 2)), "avg_pool2d in stage"
    ),
    "rolled, opaque": (lambda: Opaque(lambda v: v + v.roll(1, 0)), r"\(Opaque\)"),
    "the first batch": (First, "mean in stage"),
    # By place.
    "numbered": (lambda: Traced(lambda v: v + torch.arange(v.shape[0]).reshape(-1, 1, 1, 1)), "in stage"),
    "the first image": (lambda: Traced(lambda v: v - v[:1]), "getitem in stage"),
    "less one image": (lambda: Traced(lambda v: v - v[0]), "getitem in stage"),
    "darkened at a place, opaque": (lambda: Opaque(first_darkened), r"\(Opaque\)"),
    # By number.
    "divided by their number": (lambda: Traced(lambda v: v / v.shape[0]), "truediv in stage"),
    "divided by their number, opaque": (lambda: Opaque(lambda v: v / len(v)), r"\(Opaque\)"),
    # By what is kept from run to run.
    "counter": (Counting, r"\(Counting\)"),
    "counter, opaque": (CountingUntraced, r"\(CountingUntraced\)"),
    "counter that acts late, opaque": (CountingLater, r"\(CountingLater\)"),
    "counter in a buffer": (CountingInABuffer, r"\(CountingInABuffer\)"),
    "counter in a tensor": (CountingInATensor, r"\(CountingInATensor\)"),
    "running mean, opaque": (Moving, r"\(Moving\)"),
    "global list": (Remembering, r"\(Remembering\)"),
    "global list, opaque": (RememberingUntraced, r"\(RememberingUntraced\)"),
    # By time and chance.
    "settling after three runs": (Settling, r"\(Settling\) gives other values each time it runs"),
    "time": (lambda: Traced(lambda v: v * (time.time() % 1)), r"\(Traced\)"),
    "time, opaque": (lambda: Opaque(lambda v: v * (perf_counter() % 1)), r"\(Opaque\)"),
    "parity of the clock, opaque": (lambda: Opaque(lambda v: v * (int(time.time() * 1e4) % 2)), r"\(Opaque\)"),
    "chance": (lambda: Traced(lambda v: v * random.random()), r"\(Traced\)"),
    "chance of its own": (Drawing, r"\(Drawing\)"),
    "dropout left on": (lambda: Traced(lambda v: F.dropout(v, 0.5)), "dropout in stage"),
}  # fmt: skip


class Attention(nn.Module):
    """Attention over tokens with the tokens in front in between, as nn.MultiheadAttention takes them."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(3, 1)

    def forward(self, values: Tensor) -> Tensor:
        tokens = values.flatten(2).permute(2, 0, 1)
        attended: Tensor = self.attention(tokens, tokens, tokens, need_weights=False)[0]
        return attended.permute(1, 2, 0)


class HandWritten(nn.Module):
    """Attention written out: heads are folded into the images and unfolded again."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(12, 36)

    def forward(self, values: Tensor) -> Tensor:
        tokens = F.pixel_unshuffle(values, 2).flatten(2).transpose(1, 2)
        num, length, width = tokens.shape
        q, k, v = self.qkv(tokens).reshape(num, length, 3, 2, 6).permute(2, 0, 3, 1, 4)
        q, k, v = (each.reshape(num * 2, length, 6) for each in (q, k, v))
        attended = torch.bmm(torch.bmm(q, k.transpose(1, 2)).softmax(-1), v)
        return attended.reshape(num, 2, length, 6).transpose(1, 2).reshape(num, length, width)


class ClassToken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.ones(1, 1, 3))

    def forward(self, values: Tensor) -> Tensor:
        tokens = values.flatten(2).transpose(1, 2)
        return torch.cat([self.token.expand(values.shape[0], -1, -1), tokens], dim=1)


class Deformable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.offset, self.conv = nn.Conv2d(3, 18, 3, padding=1), DeformConv2d(3, 4, 3, padding=1)

    def forward(self, values: Tensor) -> Tensor:
        moved: Tensor = self.conv(values, self.offset(values))
        return moved


def windows(values: Tensor) -> Tensor:
    """Windows of 4 by 4 become images of their own, are normalised, and go back to their places."""
    num, channels, height, width = values.shape
    parted = values.reshape(num, channels, height // 4, 4, width // 4, 4).permute(0, 2, 4, 3, 5, 1)
    parted = parted.reshape(-1, 16, channels)
    parted = parted - parted.mean(1, keepdim=True)
    back = parted.reshape(num, height // 4, width // 4, 4, 4, channels).permute(0, 5, 1, 3, 2, 4)
    return back.reshape(num, channels, height, width)


def both_ways(values: Tensor) -> Tensor:
    """The image and its mirror image, one batch behind the other."""
    one, other = torch.cat([values, values.flip(3)]).sin().chunk(2)
    return one + other


PURE: dict[str, Callable[[], nn.Module]] = {
    "batch norm in eval mode": lambda: nn.BatchNorm2d(3),
    "group norm": lambda: nn.GroupNorm(3, 3),
    "instance norm": lambda: nn.InstanceNorm2d(3),
    "layer norm": lambda: nn.LayerNorm([3, SIZE, SIZE]),
    "layer norm of channels": lambda: Traced(lambda v: F.layer_norm(v.permute(0, 2, 3, 1), (3,)).permute(0, 3, 1, 2)),
    "local response norm": lambda: nn.LocalResponseNorm(2),
    "attention over tokens": Attention,
    "attention by hand": HandWritten,
    "class token": ClassToken,
    "softmax over channels": lambda: nn.Softmax(1),
    "max-pool": lambda: nn.MaxPool2d(3, 2),
    "adaptive pools": lambda: Traced(lambda v: F.adaptive_avg_pool2d(v, 3) + F.adaptive_max_pool2d(v, 3)),
    "roll within an image": lambda: Traced(lambda v: v.roll((1, 2), (2, 3)).flip(3)),
    "windows": lambda: Traced(windows),
    "mirror images": lambda: Traced(both_ways),
    "squeeze and excite": lambda: SqueezeExcitation(3, 2),
    "deformable convolution": Deformable,
    "flatten": lambda: nn.Sequential(nn.Flatten(), nn.Linear(3 * SIZE * SIZE, 5)),
    "over each image's largest": lambda: Traced(lambda v: v / v.amax((1, 2, 3), keepdim=True)),
    "less each map's mean": lambda: Traced(lambda v: v - v.mean(dim=(2, 3), keepdim=True)),
    "measured within an image": lambda: Traced(lambda v: v.renorm(2, 0, 1e-3)),
    "sorted within an image": lambda: Traced(lambda v: v.flatten(1).sort(1).values.cumsum(1)),
    "pixel shuffle": lambda: Traced(lambda v: F.pixel_shuffle(F.pixel_unshuffle(v, 4), 2)),
    "channel shuffle": lambda: nn.Sequential(nn.Conv2d(3, 8, 1), InvertedResidual(8, 8, 1)),
    "stochastic depth and dropout": lambda: nn.Sequential(StochasticDepth(0.5, "row"), nn.Dropout(), nn.Dropout2d()),
    "gram matrix": lambda: Traced(lambda v: torch.einsum("nchw,ndhw->ncd", v, v)),
    "resized": lambda: nn.Upsample(scale_factor=1.5, mode="bilinear"),
    "spectrum": lambda: Traced(lambda v: torch.fft.rfft2(v).abs()),
    "own extreme, opaque": lambda: Opaque(lambda v: v / v.amax((1, 2, 3), keepdim=True)),
    "swin": lambda: SwinTransformer([2, 2], 8, [2], [2], [4, 4], num_classes=5),
    "vit": lambda: VisionTransformer(SIZE, 4, 1, 2, 8, 16, num_classes=5),
    "maxvit": lambda: MaxVit((SIZE, SIZE), 8, 4, [8], [1], 4, 0.2, num_classes=5),
}


def made(make: Callable[[], nn.Module]) -> nn.Module:
    module = make()
    randomise(module, 0)
    return module.eval()


def batches() -> list[Tensor]:
    """One image, always at the second place, with 15 others of one kind, or of several."""
    generator = torch.Generator().manual_seed(0)
    others = torch.randn((BATCH - 1, 3, SIZE, SIZE), generator=generator)
    levels = [torch.full_like(others, level) for level in (0.0, -2.2, 2.7, 1e4, -1e4)]
    return [torch.stack([each[0], IMAGE, *each[1:]]) for each in (*levels, others, others.flip(0), others * 0.01)]


def is_pure(make: Callable[[], nn.Module], num_before: int = 0) -> bool:
    """Whether one image gets the same with all kinds of company, in either order of the batches, and anywhere.

    Place and number of images move the last bits of a product of matrices; company doesn't.
    """
    with torch.no_grad():
        module, other = made(make), made(make)
        for _ in range(num_before):
            module(batches()[-1])
        rows = [module(batch)[1] for batch in batches()] + [other(batch)[1] for batch in reversed(batches())]
        alone = [module(IMAGE.expand(num, -1, -1, -1).clone())[place] for num, place in ((8, 0), (8, 7), (4, 0))]
    same_company = all(torch.equal(row, rows[0]) for row in rows)
    return same_company and all(torch.allclose(row, rows[0], rtol=0, atol=1e-4) for row in alone)


def refuse(module: nn.Module, where: str, batch_size: int) -> None:
    model = StagedModel.from_module(nn.Sequential(nn.Identity(), module, nn.ReLU()), view=VIEW)
    with pytest.raises(ModelError, match=where):
        check_pure(model, "2", batch_size=batch_size)


@pytest.mark.parametrize("name", IMPURE)
def test_what_depends_on_more_than_one_image_is_refused_by_name(name: str) -> None:
    make, where = IMPURE[name]
    assert not is_pure(make, num_before=45 if "late" in name else 0)
    refuse(made(make), where, BATCH)
    if "number" not in name:  # in passes of one size nothing depends on it
        refuse(made(make), where, 2)


@pytest.mark.parametrize("name", PURE)
def test_what_only_seems_to_mix_images_is_accepted(name: str) -> None:
    assert is_pure(PURE[name])
    model = StagedModel.from_module(nn.Sequential(made(PURE[name])), view=VIEW)
    for batch_size in (None, 1, 2, BATCH):
        check_pure(model, model.cut_points[-1], batch_size=batch_size)


def test_a_counter_in_the_forward_of_the_whole_model_is_refused_when_it_is_traced() -> None:
    with pytest.raises(ModelError, match="Counting can't be traced: its mul is another one each time it runs"):
        StagedModel.from_module(Counting().eval(), view=VIEW)


def test_what_is_made_once_at_the_first_run_is_traced_as_ever() -> None:
    model = StagedModel.from_module(nn.Sequential(Lazy()).eval(), view=VIEW)
    assert [node.op for node in model.stages[0].in_eval.graph.nodes].count("call_module") == 0  # type: ignore[union-attr]
    check_pure(model, "0", batch_size=BATCH)


@pytest.mark.parametrize(
    ("name", "size"), [("resnet18", 64), ("squeezenet1_1", 64), pytest.param("vit_b_32", 224, marks=pytest.mark.slow)]
)
def test_a_named_backbone_is_accepted(name: str, size: int) -> None:
    model = backbone(name, weights="none")
    model.view = View(size=size, resize=size)
    check_pure(model, model.cut_points[-1], batch_size=2)


def test_a_vision_transformer_is_accepted() -> None:
    model = staged_vision_transformer()
    check_pure(model, model.cut_points[-1], batch_size=2)


def test_an_extreme_that_only_dark_images_lack_is_found_whatever_lies_before_it() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(1, 4), nn.ReLU(), Above(Tensor.max, 3.9))
    model = StagedModel.from_module(network.eval(), view=VIEW)
    check_pure(model, "2", batch_size=BATCH)
    with pytest.raises(
        ModelError, match=r"what 3 \(Above\), in batches of 16, gives for an image depends on the other"
    ):
        check_pure(model, "3", batch_size=BATCH)


class Squeezing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.pool, self.fc = nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Linear(8, 4)

    def forward(self, values: Tensor) -> Tensor:
        scores: Tensor = self.fc(self.pool(self.conv(values)).squeeze())
        return scores


def test_a_trunk_that_gives_a_single_image_no_row_is_refused_in_batches_of_one() -> None:
    model = StagedModel.from_module(Squeezing().eval(), view=VIEW)
    assert model.shape("squeeze") == (8,)
    check_pure(model, "squeeze", batch_size=2)
    check_pure(model, "pool", batch_size=1)
    with pytest.raises(ModelError, match=r"at squeeze: for 1 image the value there is \(8,\), and rows are images"):
        check_pure(model, "squeeze", batch_size=1)


def test_a_pass_that_gives_no_row_an_image_is_refused_by_name() -> None:
    model = StagedModel.from_module(Squeezing().eval(), view=VIEW)
    images = torch.zeros((3, 3, SIZE, SIZE), dtype=torch.uint8)
    output = Output("squeeze", model.pool("squeeze"))
    assert Trunk(model, [output], view=VIEW, batching=Batching(2))(images)[0].shape == (3, 8)
    with pytest.raises(ModelError, match=r"no row an image at squeeze: in passes of 1 the value there is \(8,\)"):
        Trunk(model, [output], view=VIEW, batching=Batching(1))(images)
