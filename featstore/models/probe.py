"""The probe: a trunk's output on two fixed images, recorded with features and recomputed when a model meets them.

It is the net under what no key can see: a changed operator in another library version, a global flag.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from featstore.digest import Json
from featstore.errors import FactsDifferError, ModelError
from featstore.images.views import View
from featstore.models.names import Batching, Precision
from featstore.models.staged import StagedModel
from featstore.models.trunk import Output, Trunk

NUM_VALUES = 128
TOLERANCES: dict[str, float] = {"fp32": 1e-4, "tf32": 1e-2, "fp16": 1e-2, "bf16": 5e-2}
"""Largest difference between two probes, as a share of the output's largest absolute value, by precision."""


@dataclass(frozen=True)
class Probe:
    """What a part records.

    Attributes:
        values: for each of the two images, up to `NUM_VALUES` numbers evenly spaced in the flat output.
        largest: the largest absolute value of both whole outputs.
    """

    values: tuple[tuple[float, ...], tuple[float, ...]]
    largest: float

    def facts(self) -> Json:
        """As JSON."""
        return {"values": [list(row) for row in self.values], "largest": self.largest}

    @classmethod
    def from_facts(cls, facts: Any) -> Probe:
        """The inverse of `facts`."""
        first, second = (tuple(float(value) for value in row) for row in facts["values"])
        return cls((first, second), float(facts["largest"]))

    def difference(self, other: Probe) -> float:
        """The largest difference between the two, as a share of this one's largest value."""
        mine, others = torch.tensor(self.values, dtype=torch.float64), torch.tensor(other.values, dtype=torch.float64)
        if mine.shape != others.shape:
            return float("inf")
        if not mine.numel():  # of pixels, which no arithmetic has made
            return 0.0
        return float((mine - others).abs().max()) / max(self.largest, 1e-30)


def probe_images(size: int, channels: int = 3) -> Tensor:
    """The two images, uint8 ``(2, channels, size, size)``: integer arithmetic only, so the same on every machine."""
    image, channel = torch.arange(2).reshape(2, 1, 1, 1), torch.arange(channels).reshape(1, channels, 1, 1)
    row, column = torch.arange(size).reshape(1, 1, size, 1), torch.arange(size).reshape(1, 1, 1, size)
    wave = (3 + 2 * image) * row + (5 + 4 * image) * column + (row * column) // (4 + image)
    return ((wave + 85 * channel + 17 * image) % 256).to(torch.uint8)


def take_probes(
    model: StagedModel, outputs: list[Output], *, view: View, precision: Precision, device: torch.device
) -> list[Probe]:
    """The probe of each output: one pass over two images."""
    trunk = Trunk(model, outputs, view=view, batching=Batching(2), precision=precision, device=device)
    return [_probe(values) for values in trunk(probe_images(view.size, view.channels))]


def check_probe(stored: Json, live: Probe, *, precision: Precision, what: str, profile: Json, now: Json) -> None:
    """Compares a stored probe with a live one.

    Raises:
        FactsDifferError: if they differ by more than the precision's tolerance though all keys agree; the message
            names the settings and versions that differ.
    """
    difference = Probe.from_facts(stored).difference(live)
    if difference <= TOLERANCES[precision]:
        return
    changed = [
        f"{name} was {profile.get(name, 'unknown')}, is {now.get(name, 'unknown')}"
        for name in sorted({*profile, *now})
        if profile.get(name) != now.get(name)
    ]
    raise FactsDifferError(
        f"The model computes other values than {what} holds, although all keys agree: on the probe images they differ "
        f"by {difference:.2g} of the largest value; {precision} allows {TOLERANCES[precision]:g}. "
        f"{'; '.join(changed) or 'No recorded setting differs'}. Restore those versions or settings, or extract into "
        "another store."
    )


def check_compiled(trunk: Trunk, probes: Mapping[Output, Probe], *, name: str) -> None:
    """Compiles a trunk, by its first pass, and compares what it then computes with `probes`, which aren't compiled.

    Raises:
        ModelError: for a model that can't be compiled, that differs then by more than the precision's tolerance, or
            that gives an image another row in another place of a batch.
    """
    size = trunk.view.size
    pair = probe_images(size, trunk.view.channels)
    images = torch.cat([pair.roll(step, dims=3) for step in range((trunk.batch_size + 1) // 2)])
    found = trunk(images)
    turned = trunk(images.flip(0))
    without = "Compute without: featstore extract --no-compile (in Python: compile=False)."
    for output, values, others in zip(trunk.outputs, found, turned, strict=True):
        if not torch.equal(values, others.flip(0)):
            raise ModelError(
                f"Compiled, {name} gives an image another row at {output.label} in another place of a batch of "
                f"{trunk.batch_size}. Expected the same. Take another batch size (featstore extract "
                f"--batch-size). {without}"
            )
        difference = probes[output].difference(_probe(values[:2]))
        if not difference <= TOLERANCES[trunk.precision]:
            raise ModelError(
                f"Compiled, {name} computes other values at {output.label}: on the probe images they differ by "
                f"{difference:.2g} of the largest value; {trunk.precision} allows {TOLERANCES[trunk.precision]:g}. "
                f"{without}"
            )


def _probe(values: Tensor) -> Probe:
    flat = values.float().cpu().reshape(len(values), -1)
    length = flat.shape[1]
    places = torch.arange(min(NUM_VALUES, length)) * length // min(NUM_VALUES, length)
    first, second = (tuple(row) for row in flat[:, places].double().tolist())
    return Probe((first, second), float(flat.abs().max()))
