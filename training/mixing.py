"""Mixing: changes of a whole batch before a step, of what the trained stages are given and of the targets with it.

Numbers are drawn from a seed of (seed of the fit, pass, batch, place among the changes): never from global random
state, and the same whether the batch comes from features or from images.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from featstore.models.modes import one_pass


class BatchChange(ABC):
    """One change of a batch. What it is, its `repr` says in full: that is a fact of a fit's checkpoint."""

    mixes_targets = False

    @abstractmethod
    def changed(self, inputs: Tensor, targets: Tensor, *, layout: str, seed: int) -> tuple[Tensor, Tensor]:
        """New inputs ``(n, *F)`` and their targets.

        Args:
            inputs: normalised images, or activations.
            targets: ``(n, K)`` where `mixes_targets`.
            layout: of the inputs: NCHW, NHWC, NLC, NC or other.
            seed: of its draws.
        """

    @abstractmethod
    def check(self, layout: str, *, are_images: bool) -> None:
        """Raises ValueError where it makes no sense of such inputs."""


@dataclass(frozen=True)
class Mixup(BatchChange):
    """Each row is a mean of two, lambda of itself and the rest of another; so are its targets (torchvision's MixUp).

    Attributes:
        alpha: one lambda a batch is drawn from Beta(alpha, alpha): near 0 or 1 for small ones.
    """

    alpha: float = 0.4
    mixes_targets = True

    def __post_init__(self) -> None:
        _check_number("Mixup", "alpha", self.alpha)

    def check(self, layout: str, *, are_images: bool) -> None:
        """Takes images and activations of any layout."""

    def changed(self, inputs: Tensor, targets: Tensor, *, layout: str, seed: int) -> tuple[Tensor, Tensor]:
        """Mixed rows and targets."""
        from torchvision.transforms.v2 import MixUp  # loads much, for few fits

        # It takes images alone, and any numbers are an image of one row.
        rows, mixed = _drawn(MixUp(alpha=self.alpha), inputs.reshape(len(inputs), 1, 1, -1), targets, seed)
        return rows.reshape(inputs.shape), mixed


@dataclass(frozen=True)
class CutMix(BatchChange):
    """A box of each image or map is another one's; targets are mixed by area (torchvision's CutMix).

    Attributes:
        alpha: the share that stays is drawn from Beta(alpha, alpha), one a batch.
    """

    alpha: float = 1.0
    mixes_targets = True

    def __post_init__(self) -> None:
        _check_number("CutMix", "alpha", self.alpha)

    def check(self, layout: str, *, are_images: bool) -> None:
        """Takes images, and maps ``(N, C, H, W)``."""
        if layout != "NCHW":
            raise ValueError(
                f"CutMix cuts boxes out of images or maps, and what trains is given activations {layout}. Use Mixup, "
                "or freeze less, so that it is given maps: freeze_to(...)."
            )

    def changed(self, inputs: Tensor, targets: Tensor, *, layout: str, seed: int) -> tuple[Tensor, Tensor]:
        """Pasted rows and mixed targets."""
        from torchvision.transforms.v2 import CutMix as Cut

        return _drawn(Cut(alpha=self.alpha), inputs, targets, seed)


@dataclass(frozen=True)
class FeatureNoise(BatchChange):
    """Normal noise on each activation.

    Attributes:
        std: of the noise, in standard deviations of the activations of the same image.
    """

    std: float = 0.1

    def __post_init__(self) -> None:
        _check_number("FeatureNoise", "std", self.std)

    def check(self, layout: str, *, are_images: bool) -> None:
        """Takes activations."""
        _check_frozen("FeatureNoise", are_images)

    def changed(self, inputs: Tensor, targets: Tensor, *, layout: str, seed: int) -> tuple[Tensor, Tensor]:
        """Noisy activations, and the targets as they are."""
        generator = torch.Generator(inputs.device).manual_seed(seed)
        noise = torch.randn(inputs.shape, generator=generator, device=inputs.device, dtype=inputs.dtype)
        spread = inputs.flatten(1).std(1, correction=0).reshape(-1, *[1] * (inputs.ndim - 1))
        return inputs + self.std * spread * noise, targets


@dataclass(frozen=True)
class FeatureBrightness(BatchChange):
    """Brightness as images have it, on activations: a number is added, and the ends of the range hold (FroFA).

    The range is that of the activations of the same image.

    Attributes:
        amount: what is added is drawn evenly from -amount to amount, in ranges.
        by_channel: whether each channel has a number of its own (cFroFA), or each image.
    """

    amount: float = 0.5
    by_channel: bool = True

    def __post_init__(self) -> None:
        _check_number("FeatureBrightness", "amount", self.amount)

    def check(self, layout: str, *, are_images: bool) -> None:
        """Takes activations, by channel where these can be told."""
        _check_frozen("FeatureBrightness", are_images)
        if self.by_channel and "C" not in layout:
            raise ValueError(
                f"FeatureBrightness by channel needs to know which numbers are channels, and the layout is {layout}. "
                "Use by_channel=False."
            )

    def changed(self, inputs: Tensor, targets: Tensor, *, layout: str, seed: int) -> tuple[Tensor, Tensor]:
        """Brighter and darker activations, and the targets as they are."""
        generator = torch.Generator(inputs.device).manual_seed(seed)
        shape = [len(inputs), *[1] * (inputs.ndim - 1)]
        low, high = (each.reshape(shape) for each in inputs.flatten(1).aminmax(dim=1))
        if self.by_channel:
            shape[layout.index("C")] = inputs.shape[layout.index("C")]
        drawn = torch.rand(shape, generator=generator, device=inputs.device, dtype=inputs.dtype)
        moved = inputs + (2 * drawn - 1) * self.amount * (high - low)
        return moved.clamp(low, high), targets


def as_changes(mix: BatchChange | Sequence[BatchChange] | None) -> tuple[BatchChange, ...]:
    """The changes that the option `mix` of a fit names.

    Raises:
        TypeError: for anything else.
    """
    if mix is None:
        return ()
    given: tuple[object, ...] = tuple(mix) if isinstance(mix, list | tuple) else (mix,)
    changes = tuple(each for each in given if isinstance(each, BatchChange))
    for each in given:
        if not isinstance(each, BatchChange):
            raise TypeError(
                f"mix has {each!r}; expected changes of a batch: Mixup(0.4), CutMix(1.0), FeatureNoise(0.1), "
                "FeatureBrightness(0.5), one or several in a list."
            )
    return changes


def changed(
    changes: Sequence[BatchChange],
    inputs: Tensor,
    targets: Tensor,
    *,
    layout: str,
    num_classes: int,
    key: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """A batch after all `changes`, one after the other.

    Where one mixes targets, class numbers ``(n,)`` become probabilities ``(n, K)`` float32; n-hot targets and numbers
    are mixed as they are.

    Args:
        changes: in order.
        inputs: ``(n, *F)``.
        targets: of a batch.
        layout: of the inputs.
        num_classes: K.
        key: what tells this batch from any other.
    """
    if targets.ndim == 1 and any(each.mixes_targets for each in changes):
        targets = F.one_hot(targets, num_classes).float()
    for place, each in enumerate(changes):
        seed = int(np.random.default_rng([*key, place]).integers(2**63))
        inputs, targets = each.changed(inputs, targets, layout=layout, seed=seed)
    return inputs, targets


def _drawn(transform: torch.nn.Module, inputs: Tensor, targets: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """What a transform of torchvision gives, which draws from torch's global generator of the CPU."""
    with one_pass, torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        result: tuple[Tensor, Tensor] = transform(inputs, targets)
    return result


def _check_number(kind: str, name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} of {kind} is {value!r}; expected a number, 0.4 for example.")
    if not 0 < float(value) < math.inf:
        raise ValueError(f"{name} of {kind} is {value}; expected a positive, finite number.")


def _check_frozen(kind: str, are_images: bool) -> None:
    if are_images:
        raise ValueError(
            f"{kind} changes activations, and nothing is frozen, so that what trains is given images. Freeze some "
            "(freeze_to(...)), or augment the images (augment=)."
        )
