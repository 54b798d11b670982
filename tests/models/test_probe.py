from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from featstore import FactsDifferError, Output, StagedModel, View
from featstore.digest import canonical_json
from featstore.models.names import PRECISIONS
from featstore.models.probe import NUM_VALUES, TOLERANCES, Probe, check_probe, probe_images, take_probes

VIEW = View(size=16, resize=18)
CPU = torch.device("cpu")


class Still(nn.Module):
    """Gives its input on, as maps or as vectors."""

    def __init__(self, num: int) -> None:
        super().__init__()
        self.num = num

    def forward(self, values: Tensor) -> Tensor:
        return values.flatten(1)[:, : self.num] * 1.0


def probe(num: int = 768) -> tuple[Probe, Tensor]:
    model = StagedModel.from_module(Still(num), view=VIEW)
    cut = model.cut_points[-1]
    (taken,) = take_probes(model, [Output(cut, model.pool(cut, "none"))], view=VIEW, precision="fp32", device=CPU)
    return taken, VIEW.normalise(probe_images(16)).flatten(1)[:, :num]


@pytest.mark.parametrize("size", [16, 224])
def test_the_probe_images_are_those_of_the_format_page(size: int) -> None:
    """Number by number, as docs/format.md spells them; a change makes every stored probe useless."""
    images = probe_images(size)
    assert (images.shape, images.dtype) == ((2, 3, size, size), torch.uint8)
    assert images.tolist() == [
        [
            [
                [((3 + 2 * i) * y + (5 + 4 * i) * x + math.floor(x * y / (4 + i)) + 85 * c + 17 * i) % 256
                 for x in range(size)]
                for y in range(size)
            ]
            for c in range(3)
        ]
        for i in range(2)
    ]  # fmt: skip
    assert torch.equal(probe_images(size, 1), images[:, :1])


def test_the_probe_images_differ_from_each_other_everywhere_that_matters() -> None:
    first, second = probe_images(64).float()
    assert (first - second).abs().mean() > 50
    assert min(first.std(), second.std()) > 50


@pytest.mark.parametrize("num", [5, 128, 300, 768])
def test_a_probe_holds_numbers_evenly_spaced_in_the_output_and_its_largest_value(num: int) -> None:
    taken, output = probe(num)
    count = min(NUM_VALUES, num)
    places = [place * num // count for place in range(count)]
    assert [list(row) for row in taken.values] == output[:, places].tolist()
    assert taken.largest == output.abs().max().item()


def test_a_probe_goes_through_json_unchanged() -> None:
    taken, _ = probe()
    assert Probe.from_facts(taken.facts()) == taken
    canonical_json(taken.facts())


def shifted(taken: Probe, share: float) -> Probe:
    first, second = taken.values
    return Probe((first, (second[0] + share * taken.largest, *second[1:])), taken.largest)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_probe_may_differ_by_the_tolerance_of_its_precision_and_no_more(precision: Any) -> None:
    taken, _ = probe()
    facts: dict[str, Any] = {"precision": precision, "what": "set 7c41", "profile": {}, "now": {}}
    check_probe(taken.facts(), shifted(taken, 0.9 * TOLERANCES[precision]), **facts)
    with pytest.raises(FactsDifferError, match=f"{precision} allows {TOLERANCES[precision]:g}"):
        check_probe(taken.facts(), shifted(taken, 1.1 * TOLERANCES[precision]), **facts)


@pytest.mark.parametrize("other", [float("nan"), float("inf")])
def test_a_probe_that_is_no_number_or_of_another_length_differs(other: float) -> None:
    taken, _ = probe()
    facts: dict[str, Any] = {"precision": "fp32", "what": "set 7c41", "profile": {}, "now": {}}
    with pytest.raises(FactsDifferError):
        check_probe(taken.facts(), shifted(taken, other), **facts)
    with pytest.raises(FactsDifferError):
        check_probe(taken.facts(), probe(5)[0], **facts)


def test_a_mismatch_names_the_versions_and_settings_that_differ() -> None:
    taken, _ = probe()
    with pytest.raises(FactsDifferError) as error:
        check_probe(
            taken.facts(),
            shifted(taken, 0.5),
            precision="fp32",
            what="set 7c41",
            profile={"torch": "2.11.0", "device": "cpu", "gpu": "H200"},
            now={"torch": "2.15.0", "device": "cpu"},
        )
    assert str(error.value) == (
        "The model computes other values than set 7c41 holds, although all keys agree: on the probe images they differ "
        "by 0.5 of the largest value; fp32 allows 0.0001. gpu was H200, is unknown; torch was 2.11.0, is 2.15.0. "
        "Restore those versions or settings, or extract into another store."
    )


def test_a_global_switch_that_no_key_sees_is_found() -> None:
    model = StagedModel.from_module(nn.Sequential(nn.Linear(16, 3), nn.Tanh()), view=VIEW)
    outputs = [Output("1", model.pool("1", "none"))]
    before = take_probes(model, outputs, view=VIEW, precision="fp32", device=CPU)[0]
    facts: dict[str, Any] = {"precision": "fp32", "what": "set 7c41", "profile": {}, "now": {}}
    digest = model.digest("1")
    original = nn.Tanh.forward
    try:
        nn.Tanh.forward = lambda self, input: input.tanh() * 1.001  # type: ignore[method-assign]  # noqa: A006
        after = take_probes(model, outputs, view=VIEW, precision="fp32", device=CPU)[0]
    finally:
        nn.Tanh.forward = original  # type: ignore[method-assign]
    assert model.digest("1") == digest
    with pytest.raises(FactsDifferError, match="although all keys agree"):
        check_probe(before.facts(), after, **facts)


def test_taking_a_probe_moves_no_statistics() -> None:
    model = StagedModel.from_module(nn.Sequential(nn.BatchNorm2d(3), nn.Dropout()).train(), view=VIEW)
    before = {name: tensor.clone() for name, tensor in model.tensors().items()}
    take_probes(model, [Output("0", model.pool("0", "none"))], view=VIEW, precision="fp32", device=CPU)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.tensors().items())
