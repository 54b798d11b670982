"""docs/guides/fastai.md holds: fastai 0.7's widths and parameters are those of the names in its tables."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn

from featstore.models.backbones import outline
from featstore.models.layer_groups import layer_groups

PAGE = Path(__file__).parents[2] / "docs" / "guides" / "fastai.md"


def table(heading: str) -> list[list[str]]:
    """The rows of the first table below `heading`."""
    _, _, below = PAGE.read_text(encoding="utf-8").partition(f"\n## {heading}\n")
    lines = [line for line in below.partition("\n## ")[0].splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def number(text: str) -> int:
    return int(text.replace(",", ""))


model = cache(outline)


def num_parameters(stages: tuple[nn.Module, ...]) -> int:
    return sum(parameter.numel() for stage in stages for parameter in stage.parameters())


@pytest.mark.parametrize("row", table("model_meta"), ids=lambda row: row[0])
def test_a_network_of_fastais_table_has_its_width_and_groups(row: list[str]) -> None:
    _, name, cut, width, boundary, early, late, groups = row
    staged = model(name)
    assert staged.index(cut) == staged.index(staged.default_cut)
    assert staged.layout(cut) == "NCHW"
    channels, *_ = staged.shape(cut)
    assert 2 * channels == number(width)
    last = staged.index(boundary) + 1
    body = staged.ordered[: staged.index(cut) + 1]
    assert (num_parameters(body[:last]), num_parameters(body[last:])) == (number(early), number(late))
    with torch.device("meta"):
        first, second, head = layer_groups(staged.with_head(nn.Linear(number(width), 10), cut=cut))
    assert (first.name, second.name, head.name) == ("early body", "late body", "head")
    ends = staged.ordered[first.stages[-1]].name
    assert ends == (staged.canonical(boundary) if groups == "the same" else groups)


def test_an_extra_cut_is_a_layer_of_a_resnet() -> None:
    rows = table("xtra_cut")
    assert [row[0] for row in rows] == ["0", "1", "2", "3"]
    for _, cut, of_basic, of_bottlenecks in rows:
        for names, width in (("resnet18 resnet34", of_basic), ("resnet50 resnet101 resnet152", of_bottlenecks)):
            assert {2 * model(name).shape(cut)[0] for name in names.split()} == {number(width)}
