from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from featstore.models.batch_mixing import BatchMixing, Mixed, Rows, Status, Unknown

NUM = 5
VALUES = torch.randn((NUM, 4, 6, 6), generator=torch.Generator().manual_seed(0))


def followed(function: Callable[[Tensor], Tensor]) -> tuple[Status, bool]:
    mixing, values = BatchMixing(NUM), VALUES.clone()
    mixing.set(values, Rows(0))
    mixing.place = "here"
    with mixing:
        result = function(values)
    return mixing.status(result), mixing.is_decided


@pytest.mark.parametrize(
    ("function", "rows"),
    [
        (lambda v: v.permute(2, 3, 0, 1), Rows(2)),
        (lambda v: v.flatten(0, 1), Rows(0, 1, 4)),
        (lambda v: v.flatten(0, 1).unflatten(0, (-1, 4)).mean(1), Rows(0)),
        (lambda v: torch.cat([v, v]), Rows(0, 2)),
        (lambda v: torch.cat([v, v])[NUM:], Rows(0)),
        (lambda v: v.repeat_interleave(3, 0), Rows(0, 1, 3)),
        (lambda v: v.repeat(3, 1, 1, 1), Rows(0, 3)),
        (lambda v: v.flatten(0, 1)[::4], Rows(0)),
        (lambda v: v.index_select(0, torch.arange(NUM)), Rows(0)),
        (lambda v: v.unsqueeze(0).squeeze(), Rows(0)),
        (lambda v: v.amax((1, 2, 3)), Rows(0)),
        (lambda v: v.sum(0, keepdim=True).shape[0] * v, Rows(0)),
        (lambda v: v + torch.zeros_like(v[0]), Rows(0)),
        (lambda v: v.clone().relu_().mul_(2), Rows(0)),
        (lambda v: F.conv2d(v.transpose(0, 1).reshape(4 * NUM, 1, 6, 6), torch.ones(1, 1, 3, 3)), Rows(0, 4)),
    ],
)
def test_images_are_followed_through_moves(function: Callable[[Tensor], Tensor], rows: Rows) -> None:
    assert followed(function) == (rows, True)


@pytest.mark.parametrize(
    "function",
    [
        lambda v: v.sum(0),
        lambda v: v + v.mean(),
        lambda v: v.permute(1, 0, 2, 3).softmax(1),
        lambda v: v.flatten(0, 1).unflatten(0, (4, -1)),
        lambda v: v.index_select(0, torch.tensor([1, 0, 2, 3, 4])),
        lambda v: v[torch.arange(NUM).flip(0)],
        lambda v: v[:, None] - v[None],
        lambda v: v.flatten(1) @ v.flatten(1).T,
        lambda v: v.clone().div_(v.max()),
        lambda v: torch.cat([v, v]) + v.repeat_interleave(2, 0),
        lambda v: F.batch_norm(v, None, None, training=True),
    ],
)
def test_what_mixes_images_is_named(function: Callable[[Tensor], Tensor]) -> None:
    assert followed(function)[0] == Mixed("here")


def test_a_write_through_a_view_is_seen_in_the_whole() -> None:
    def darkened(values: Tensor) -> Tensor:
        values[0].zero_()
        return values

    assert followed(darkened)[0] == Mixed("here")


def test_what_has_no_rule_and_what_python_reads_is_undecided() -> None:
    assert followed(lambda v: torch.linalg.inv(v)) == (Unknown(), False)
    assert followed(lambda v: v * 2 if v.flatten()[0].item() > 9 else v) == (Rows(0), False)
