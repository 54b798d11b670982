"""Narrowing: activations in the type that they are stored as, and what that type can't hold of them."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from featstore.errors import FeatureStoreError
from featstore.files.scaled import LARGEST, ScaledRows
from featstore.models.probe import Probe
from featstore.store.spec import FeatureSpec

LOST_SHARE = 0.01
"""Of the values that aren't zero: the share stored as zeros from which it is said.

Less is what any network has by chance. What is lost may be small beside the rest, or be whole channels, which a head
that standardises its inputs would have seen: so it is said, and not refused.
"""

FEWEST_STEPS = 256
"""Of the type's smallest steps, the least that the largest value must have.

With fewer it has less than the eight bits of a bfloat16, and most other values become zeros.
"""


class Narrowed(NamedTuple):
    """A batch of rows in the storage type, on the CPU.

    Attributes:
        rows: `(N, *F)`, in order, or scaled where the type is int8; those that are unfit hold what can't be stored.
        unfit: row of the batch -> why it can't be stored, without the image's name.
        num_values: `(N,)`, of each row the values that aren't zero before it is narrowed; 0 where the type holds all,
            and of scaled rows, of which the error is told (see `Rounding`).
        num_lost: `(N,)`, those of them that are zeros afterwards.
    """

    rows: Tensor | ScaledRows
    unfit: dict[int, str]
    num_values: Tensor
    num_lost: Tensor


class Narrowing:
    """Float32 activations `(N, *F)` at `cut` on their way into the storage type of `spec`.

    Only begun by this: a GPU goes on with it, and whoever asks for the result waits.
    """

    def __init__(self, values: Tensor, spec: FeatureSpec, cut: str) -> None:
        self.spec, self.cut, self._values = spec, cut, values
        nothing = torch.zeros(len(values), dtype=torch.int64, device=values.device)
        if spec.storage_type.is_scaled:
            scaled = ScaledRows.of(values)
            is_fit = (scaled.scales * LARGEST).isfinite()  # the largest value may be rounded up, beyond all
            found = [scaled.numbers, is_fit, nothing, nothing, scaled.scales]
        else:
            stored = values.to(spec.storage_type.torch_dtype)
            flat, before = stored.reshape(len(stored), -1), values.reshape(len(values), -1)
            found = [stored, flat.isfinite().all(dim=1)]
            if stored.dtype == values.dtype:
                found += [nothing, nothing]
            else:
                num_values = before.count_nonzero(dim=1)
                found += [num_values, num_values - flat.count_nonzero(dim=1)]
        self._found = [each.to("cpu", non_blocking=True) for each in found]
        self._is_done = None
        if values.is_cuda:
            self._is_done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._is_done.record(torch.cuda.current_stream(values.device))

    def narrowed(self) -> Narrowed:
        """The result."""
        if self._is_done is not None:
            self._is_done.synchronize()
        numbers, is_fit, num_values, num_lost, *scales = self._found
        rows = ScaledRows(numbers, *scales) if scales else numbers
        unfit = {
            row: _reason(self._values[row], self.spec, self.cut) for row in torch.nonzero(~is_fit).flatten().tolist()
        }
        return Narrowed(rows, unfit, num_values, num_lost)


def lost_note(spec: FeatureSpec, cut: str, num_values: int, num_lost: int) -> str | None:
    """What is said of values stored as zeros; None where they are few (see `LOST_SHARE`)."""
    if not num_values or num_lost < LOST_SHARE * num_values:
        return None
    return (
        f"{100 * num_lost / num_values:.3g} % of the values at {cut} that aren't zero were stored as zeros, too small "
        f"for {spec.dtype} (its smallest is {_smallest_step(spec):.2g}); --dtype float32 keeps them"
    )


def refuse_too_small(probe: Probe, spec: FeatureSpec, *, name: str, cut: str) -> None:
    """Raises FeatureStoreError where a trunk's values are too small for the type that they are to be stored as."""
    step = _smallest_step(spec)
    if 0 < probe.largest < FEWEST_STEPS * step:
        raise FeatureStoreError(
            f"{name} at {cut}: the activations of the two probe images reach {probe.largest:.2g} only. {spec.dtype} "
            f"has steps of {step:.2g} there, so most would be stored as zeros. Store them as float32 (--dtype float32)."
        )


def _smallest_step(spec: FeatureSpec) -> float:
    """The smallest number above zero."""
    read_as = spec.storage_type.read_as
    step = math.ldexp(torch.finfo(read_as.torch_dtype).tiny, -read_as.mantissa_bits)
    return LARGEST * step if spec.storage_type.is_scaled else step  # of rows whose scale is a step


def _reason(row: Tensor, spec: FeatureSpec, cut: str) -> str:
    if bool(row.isfinite().all()):
        limit = torch.finfo(spec.storage_type.read_as.torch_dtype).max
        return (
            f"its activations at {cut} reach {float(row.abs().max()):.6g}, more than {spec.dtype} can hold "
            f"({limit:.6g}). Store them as bfloat16 or float32 (--dtype)"
        )
    return (
        f"its activations at {cut} aren't finite. The weights may be damaged, or {spec.precision} too narrow for this "
        "model (--precision fp32)"
    )
