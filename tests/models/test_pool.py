from __future__ import annotations

import itertools
import re
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from featstore.models.names import REDUCTIONS, Layout, Reduction
from featstore.models.pool import Pool

SHAPES = {"NCHW": (5, 4, 3, 2), "NHWC": (5, 3, 2, 4), "NLC": (5, 7, 4), "NC": (5, 4)}


def drawn(layout: str) -> Tensor:
    return torch.randn(SHAPES[layout], generator=torch.Generator().manual_seed(0))


def test_maps_are_pooled_as_torchs_adaptive_pools_do() -> None:
    maps = drawn("NCHW")
    average, largest = F.adaptive_avg_pool2d(maps, 1).flatten(1), F.adaptive_max_pool2d(maps, 1).flatten(1)
    torch.testing.assert_close(Pool("avg", "NCHW")(maps), average, rtol=1e-6, atol=0)  # sums in another order
    assert torch.equal(Pool("max", "NCHW")(maps), largest)


def test_concat_is_the_maximum_and_then_the_average_as_in_fastai() -> None:
    maps = drawn("NCHW")
    assert torch.equal(
        Pool("concat", "NCHW")(maps), torch.cat([Pool("max", "NCHW")(maps), Pool("avg", "NCHW")(maps)], dim=1)
    )


@pytest.mark.parametrize("reduction", ["avg", "max", "concat"])
def test_maps_with_channels_last_give_the_same(reduction: Reduction) -> None:
    maps = drawn("NCHW")
    pooled = Pool(reduction, "NHWC")(maps.permute(0, 2, 3, 1))
    torch.testing.assert_close(pooled, Pool(reduction, "NCHW")(maps), rtol=1e-6, atol=0)  # sums in another order


def test_a_class_token_stays_out_of_the_other_reductions() -> None:
    tokens = drawn("NLC")
    assert torch.equal(Pool("token", "NLC", 1)(tokens), tokens[:, 0])
    assert torch.equal(Pool("tokens", "NLC", 1)(tokens), tokens[:, 1:])
    assert torch.equal(Pool("avg", "NLC", 1)(tokens), tokens[:, 1:].mean(1))
    assert torch.equal(Pool("max", "NLC", 1)(tokens), tokens[:, 1:].amax(1))
    assert torch.equal(Pool("avg", "NLC", 0)(tokens), tokens.mean(1))


def test_registers_stay_out_of_the_other_reductions_too() -> None:
    tokens = drawn("NLC")
    assert torch.equal(Pool("token", "NLC", 1, 3)(tokens), tokens[:, 0])
    assert torch.equal(Pool("tokens", "NLC", 1, 3)(tokens), tokens[:, 3:])
    assert torch.equal(Pool("avg", "NLC", 0, 3)(tokens), tokens[:, 3:].mean(1))
    assert Pool("avg", "NLC", 1, 1).facts() == Pool("avg", "NLC", 1).facts()
    assert Pool("avg", "NLC", 1, 3).facts() == {**Pool("avg", "NLC", 1).facts(), "prefix_tokens": 3}
    with pytest.raises(ValueError, match="with 0 class tokens and 3 registers"):
        Pool("token", "NLC", 0, 3)


@pytest.mark.parametrize(("layout", "reduction"), list(itertools.product(get_args(Layout), REDUCTIONS)))
def test_results_are_contiguous_float32_of_the_shape_that_was_promised(layout: str, reduction: Reduction) -> None:
    values = drawn(layout)
    try:
        pool = Pool(reduction, layout, 1)
    except ValueError:
        return
    strided = torch.stack([values, values], dim=-1)[..., 0]
    for given in (values, strided, values.half(), values.bfloat16()):
        pooled = pool(given)
        assert pooled.dtype == torch.float32
        assert pooled.is_contiguous()
        assert tuple(pooled.shape[1:]) == pool.shape(tuple(values.shape[1:]))
    assert torch.equal(pool(strided), pool(values))


def test_half_precision_is_summed_in_float32() -> None:
    maps = torch.full((1, 1, 64, 64), 100.0, dtype=torch.float16)
    assert Pool("avg", "NCHW")(maps).item() == 100.0  # the sum is beyond float16


def test_a_row_does_not_depend_on_the_other_rows() -> None:
    maps = drawn("NCHW")
    pool = Pool("concat", "NCHW")
    assert all(torch.equal(pool(maps)[row], pool(maps[row : row + 1])[0]) for row in range(len(maps)))


@pytest.mark.parametrize(
    ("reduction", "layout", "class_tokens", "message"),
    [
        ("mean", "NCHW", 0, "'mean' is no reduction. The reductions are none, avg, max, concat, token, tokens."),
        ("avg", "NC", 0, "reduction avg needs activations with positions (NCHW, NHWC or NLC); here the layout is NC."),
        ("token", "NCHW", 0, "reduction token needs the tokens of a transformer with a class token"),
        ("tokens", "NLC", 0, "here the layout is NLC with 0 class tokens. Use avg, max, concat or none."),
    ],
)
def test_a_reduction_that_a_layout_does_not_have_is_refused(
    reduction: Reduction, layout: str, class_tokens: int, message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Pool(reduction, layout, class_tokens)


def test_pools_that_compute_the_same_have_the_same_facts() -> None:
    assert Pool("none", "NCHW").facts() == Pool("none", "NC").facts()
    assert Pool("avg", "NCHW", 1).facts() == Pool("avg", "NCHW", 0).facts()
    facts = [Pool(*each).facts() for each in (("avg", "NCHW"), ("max", "NCHW"), ("avg", "NHWC"))]
    assert all(one != other for one, other in itertools.combinations(facts, 2))
    assert Pool("avg", "NLC", 1).facts() != Pool("avg", "NLC", 0).facts()
