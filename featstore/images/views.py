"""View: one deterministic rendering of an image, the evaluation view or an augmented one by its seed."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from featstore.digest import Json
from featstore.images.augmentation import NONE, GivenPolicy, OwnPolicy, Policy, policy
from featstore.images.decoders import POLICIES as DECODE_POLICIES
from featstore.images.decoders import POLICY as DECODE_POLICY
from featstore.images.geometry import INTERPOLATIONS, SMOOTH, Geometry, RenderError
from featstore.images.levels import grey

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["INTERPOLATIONS", "Augment", "GivenPolicy", "OwnPolicy", "Policy", "RenderError", "View", "policy"]

GRAY_MEAN, GRAY_STD = (0.5,), (0.5,)
"""Of gray views where nobody says: -1 ... 1."""

MAX_SEED = 2**63 - 1
"""The largest seed, as folders are named by theirs: what a signed integer of 64 bits holds."""


@dataclass(frozen=True, kw_only=True)
class View:
    """How an image becomes a model's input: shorter side to `resize`, the central square of `size`, standardised.

    Equal views give equal values; a rendering depends on the image's content and the view, and on nothing else.
    Without preset: ImageNet's usual 256, 224, mean and standard deviation, for gray views 0.5 and 0.5.

    Attributes:
        size: side of the result, in pixels.
        resize: shorter side before the crop, in pixels; at least `size`.
        squash: whether the longer side is made as short, so that the crop shows all of an image, in another shape.
        interpolation: one of `INTERPOLATIONS`.
        antialias: whether shrinking averages; always False with the nearest pixel, where it has no meaning.
        channels: 3 for R, G and B; 1 for gray, which the finished square is made at the end as Pillow's "L" does.
        mean: of each channel in 0 ... 1, subtracted by `normalise`.
        std: of each channel, which `normalise` then divides by.
        decode: the decode policy, see `featstore.images.decode`; also "full" or "reduced", afterwards always its name.
        apply_exif: whether the EXIF orientation is obeyed.
        policy: augmentation; None in the evaluation view.
        seed: which of the policy's results, from 0 to `MAX_SEED`; None in the evaluation view.
        version: of the arithmetic in this file.
    """

    version: ClassVar[int] = 1

    size: int = 224
    resize: int = 256
    squash: bool = False
    interpolation: str = "bilinear"
    antialias: bool = True
    channels: int = 3
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    decode: str = DECODE_POLICY
    apply_exif: bool = True
    policy: Policy | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        # Values that are equal in Python, such as 1 and True, make equal views: they need equal facts, hence one form.
        object.__setattr__(self, "size", _integer("size", self.size, 1))
        object.__setattr__(self, "resize", _integer("resize", self.resize, 1))
        object.__setattr__(self, "squash", _truth("squash", self.squash))
        object.__setattr__(self, "antialias", _truth("antialias", self.antialias))
        object.__setattr__(self, "apply_exif", _truth("apply_exif", self.apply_exif))
        if self.resize < self.size:
            raise ValueError(
                f"resize {self.resize} is less than size {self.size}: the crop would reach beyond the image; give a "
                f"resize of {self.size} or more"
            )
        if self.interpolation not in INTERPOLATIONS:
            raise ValueError(f"interpolation {self.interpolation!r} is none of {', '.join(INTERPOLATIONS)}")
        for word, name in DECODE_POLICIES.items():
            if self.decode == word:
                object.__setattr__(self, "decode", name)
        if self.decode not in DECODE_POLICIES.values():
            known = ", ".join(f"{name!r} ({word})" for word, name in DECODE_POLICIES.items())
            raise ValueError(f"decode policy {self.decode!r} is unknown here; this featstore has {known}")
        if self.interpolation not in SMOOTH:
            object.__setattr__(self, "antialias", False)  # equal values, hence equal facts
        object.__setattr__(self, "channels", _integer("channels", self.channels, 1))
        if self.channels not in (1, 3):
            raise ValueError(f"channels is {self.channels}; expected 3, for R, G and B, or 1, for gray")
        if self.channels == 1 and (self.mean, self.std) == (View.mean, View.std):  # nobody has said
            object.__setattr__(self, "mean", GRAY_MEAN)
            object.__setattr__(self, "std", GRAY_STD)
        object.__setattr__(self, "mean", _by_channel("mean", self.mean, self.channels))
        object.__setattr__(self, "std", _by_channel("std", self.std, self.channels))
        if min(self.std) <= 0:
            raise ValueError(f"std {self.std} has a value that is not above 0")
        if (self.policy is None) != (self.seed is None):
            raise ValueError(f"policy {self.policy} and seed {self.seed} belong together; give both or neither")
        if self.seed is not None:
            object.__setattr__(self, "seed", _integer("seed", self.seed, 0))
            _check_largest_seed(self.seed)
        if self.policy == NONE:
            raise ValueError("the policy none has no seeds: it is the evaluation view; leave policy and seed out")

    @classmethod
    def from_preset(cls, preset: Any) -> View:
        """The evaluation view of torchvision's preset, such as ``ResNet34_Weights.DEFAULT.transforms()``.

        Raises:
            TypeError: for anything without a preset's fields.
            ValueError: when it asks for what a view can't do (a crop that is not square, say).
        """
        names = ("crop_size", "resize_size", "mean", "std", "interpolation", "antialias")
        if missing := [name for name in names if not hasattr(preset, name)]:
            raise TypeError(
                f"{type(preset).__name__} is no preset for image classification: it has no {', '.join(missing)}"
            )
        return cls(
            size=_one_side("crop_size", preset.crop_size),
            resize=_one_side("resize_size", preset.resize_size),
            interpolation=str(preset.interpolation.value),
            antialias=bool(preset.antialias),  # None means no, for tensors
            mean=tuple(preset.mean),
            std=tuple(preset.std),
        )

    @classmethod
    def from_facts(cls, facts: dict[str, Json]) -> View:
        """The view of `facts`, as from `facts()`. A person's own policy comes back without its function.

        Raises:
            ValueError: for facts of another version, or not those of a view.
        """
        given = dict(facts)
        if given.pop("version", None) != cls.version:
            raise ValueError(f"a view of version {facts.get('version')}; this featstore has version {cls.version}")
        known = {each.name for each in fields(cls)}
        required = known - {"policy", "seed", "channels", "squash"}
        if not required <= given.keys() <= known:
            raise ValueError(f"the facts of a view are {sorted(known)}, not {sorted(given)}")
        if "policy" in given:
            given["policy"] = Policy.from_facts(given["policy"])
        return cls(**given)

    def facts(self) -> dict[str, Json]:
        """All that decides values, as JSON values; as keys were before there was a fact, without it.

        An evaluation view's hold no policy and no seed, RGB no channels, and what isn't squashed doesn't say so.
        """
        facts: dict[str, Json] = {each.name: getattr(self, each.name) for each in fields(self)}
        facts |= {"version": self.version, "mean": list(self.mean), "std": list(self.std)}
        del facts["policy"], facts["seed"]
        if self.channels == 3:
            del facts["channels"]
        if not self.squash:
            del facts["squash"]
        if self.policy is not None:
            facts |= {"policy": self.policy.facts, "seed": self.seed}
        return facts

    @property
    def is_evaluation(self) -> bool:
        """Whether this is a view without augmentation."""
        return self.policy is None

    @property
    def evaluation(self) -> View:
        """This view without augmentation."""
        return replace(self, policy=None, seed=None)

    @property
    def pixels(self) -> View:
        """What stands for all views of these uint8 pixels, whatever their means and deviations: 0 and 1 in its case."""
        return replace(self, mean=(0.0,) * self.channels, std=(1.0,) * self.channels)

    def with_seed(self, policy: GivenPolicy, seed: int) -> View:
        """This view with an augmentation: a policy's name, a person's own function, a `Policy`, or a list of these."""
        return replace(self, policy=_policy(policy), seed=seed)

    def resized(self, *, size: int | None = None, resize: int | None = None) -> View:
        """This view at another size; `size` alone takes `resize` along in the present ratio, rounded half up."""
        if size is not None and resize is None:
            resize = (2 * size * self.resize + self.size) // (2 * self.size)
        return replace(self, size=self.size if size is None else size, resize=self.resize if resize is None else resize)

    def label(self) -> str:
        """The view in a few words, for people.

        >>> View().label()
        'evaluation view'
        >>> View().with_seed("random_resized_crop", 3).label()
        'random_resized_crop, seed 3'
        """
        return "evaluation view" if self.policy is None else f"{self.policy.label}, seed {self.seed}"

    def differences(self, other: View) -> list[tuple[str, str, str]]:
        """The fields in which two views differ: what it is, its value here, its value in `other`, in words.

        >>> View().differences(View(size=192, apply_exif=False))
        [('size', '224', '192'), ('EXIF orientation', 'applied', 'ignored')]
        """
        mine, others = self._words(), other._words()
        return [(name, mine[name], others[name]) for name in mine if mine[name] != others[name]]

    def _words(self) -> dict[str, str]:
        return {
            "size": str(self.size),
            "resize": str(self.resize),
            "squashed": "yes" if self.squash else "no",
            "interpolation": self.interpolation,
            "antialiasing": "on" if self.antialias else "off",
            "channels": str(self.channels),
            "mean": ", ".join(map(str, self.mean)),
            "std": ", ".join(map(str, self.std)),
            "decode policy": self.decode,
            "EXIF orientation": "applied" if self.apply_exif else "ignored",
            "augmentation": "none" if self.policy is None else self.policy.describe(),
            "seed": "none" if self.seed is None else str(self.seed),
        }

    def render(self, image: Tensor, digest: bytes) -> Tensor:
        """The view of an image: uint8 `(channels, size, size)`, contiguous, sharing no memory with `image`.

        Args:
            image: uint8 `(3, H, W)` on the CPU, in any strides.
            digest: the SHA-256 of the image's content, 32 bytes; with the seed it decides the augmentation.

        Raises:
            RenderError: for an image that would be too large when resized, or on which a person's policy fails.
        """
        _check_image(image)
        geometry = Geometry(
            size=self.size,
            resize=self.resize,
            squash=self.squash,
            interpolation=self.interpolation,
            antialias=self.antialias,
        )
        if self.policy is None or self.seed is None:
            square = geometry.evaluation(image)
        else:
            square = self.policy.render(image, geometry, self.seed, digest)
        return _planes(square) if self.channels == 3 else _gray(square)

    def normalise(self, batch: Tensor) -> Tensor:
        """The model's input: float32 `(N, channels, size, size)` on the batch's device, from uint8 of that shape.

        On the CPU equal to torchvision's presets bit for bit.
        """
        import torch

        shape = (self.channels, self.size, self.size)
        if batch.dtype != torch.uint8 or batch.shape[1:] != shape:
            raise ValueError(
                f"a batch {tuple(batch.shape)} of {batch.dtype}; expected uint8 (N, {', '.join(map(str, shape))}), the "
                "views that this view rendered"
            )
        most, mean, std = _constants(self.mean, self.std, batch.device)
        return batch.to(torch.float32).div_(most).sub_(mean).div_(std)


@dataclass(frozen=True, init=False)
class Augment:
    """A policy and its seeds: some fixed views of each image, or `seeds="fresh"`, new ones in each epoch.

    Attributes:
        policy: a policy's name, a person's own function, a `Policy`, or a list of these; afterwards always a `Policy`.
        seeds: distinct integers, 0 or more, afterwards sorted; or "fresh". There is no default: fixed views can be
            stored and fresh ones can't.
    """

    policy: Policy
    seeds: tuple[int, ...] | Literal["fresh"]

    def __init__(self, policy: GivenPolicy, seeds: Iterable[int] | Literal["fresh"], **parameters: Any) -> None:
        """`parameters` are those of a built-in policy.

        >>> Augment("side_on", max_zoom=1.1, seeds=range(2))
        Augment(policy=policy('side_on', max_zoom=1.1), seeds=(0, 1))
        """
        object.__setattr__(self, "policy", _policy(policy, **parameters))
        object.__setattr__(self, "seeds", _checked_seeds(seeds))
        if self.policy == NONE:
            raise ValueError("the policy none has no seeds: it is the evaluation view; leave the augmentation out")

    @property
    def is_fresh(self) -> bool:
        """Whether each epoch has views of its own."""
        return self.seeds == "fresh"

    def views(self, view: View) -> tuple[View, ...]:
        """`view` with each of the seeds, in their order.

        Raises:
            ValueError: for fresh seeds, which are as many as there are epochs.
        """
        if self.seeds == "fresh":
            raise ValueError("fresh seeds have no fixed views; give seeds such as range(4) for views that stay")
        return tuple(view.with_seed(self.policy, seed) for seed in self.seeds)


_policy = policy  # inside View and Augment the name means the field


def _checked_seeds(seeds: Iterable[int] | str) -> tuple[int, ...] | Literal["fresh"]:
    if isinstance(seeds, str) and seeds == "fresh":
        return "fresh"
    if isinstance(seeds, str) or not isinstance(seeds, Iterable):
        raise TypeError(f'seeds {seeds!r} are neither integers, such as range(4), nor "fresh"')
    checked = tuple(sorted({operator.index(seed) for seed in seeds}))
    if not checked or checked[0] < 0:
        raise ValueError(f"seeds {checked} should be one or more integers from 0 on, such as range(4)")
    _check_largest_seed(checked[-1])
    return checked


@lru_cache(maxsize=64)
def _constants(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> Tensor:
    """What pixels are divided by, what is subtracted, and the last divisor: `(3, channels, 1, 1)`, made once.

    Divisors are tensors: by a plain number a GPU multiplies with the rounded reciprocal, in other last bits. And to
    copy them there for each batch is to wait each time until the GPU has done all that it was given.
    """
    import torch

    with torch.inference_mode(False):
        rows = [[255.0] * len(mean), mean, std]
        return torch.tensor(rows, dtype=torch.float32, device=device)[:, :, None, None]


def _planes(image: Tensor) -> Tensor:
    """A contiguous copy. numpy's, which stays in this thread: torch's copies fork a team of OpenMP threads in each."""
    import torch

    return torch.from_numpy(np.array(image.numpy(), order="C"))


def _gray(image: Tensor) -> Tensor:
    """`(1, H, W)` of `(3, H, W)`. Gray stays as it was."""
    import torch

    return torch.from_numpy(grey(image.numpy())[None])


def _check_image(image: Tensor) -> None:
    import torch

    if image.dtype != torch.uint8 or image.dim() != 3 or image.shape[0] != 3 or image.numel() == 0:
        raise ValueError(f"an image {tuple(image.shape)} of {image.dtype}; expected uint8 (3, H, W)")


def _integer(name: str, value: Any, lowest: int) -> int:
    """`value` as Python's own integer, also of numpy's."""
    if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < lowest:
        raise ValueError(f"{name} is {value!r}; expected an integer from {lowest} on")
    return int(value)


def _truth(name: str, value: Any) -> bool:
    """`value` as Python's own bool, also of numpy's and of 0 and 1."""
    if not isinstance(value, bool | int | np.bool_ | np.integer) or value not in (0, 1):
        raise ValueError(f"{name} is {value!r}; expected True or False")
    return bool(value)


def _check_largest_seed(seed: int) -> None:
    if seed > MAX_SEED:
        worded = str(seed) if seed.bit_length() <= 128 else f"a number of {seed.bit_length():,} bits"
        raise ValueError(f"seed {worded} is too large; expected at most 2**63 - 1; give a smaller one, such as 0")


def _by_channel(name: str, values: Iterable[float], channels: int) -> tuple[float, ...]:
    numbers = tuple(float(value) + 0.0 for value in values)  # -0.0 is equal to 0.0, and in JSON it isn't
    if len(numbers) != channels or not np.isfinite(numbers).all():
        expected = "three finite numbers, for R, G and B" if channels == 3 else "one finite number, for gray"
        raise ValueError(f"{name} is {numbers}; expected {expected}")
    return numbers


def _one_side(name: str, value: int | list[int]) -> int:
    sides = {value} if isinstance(value, int) else set(value)
    if len(sides) != 1:
        raise ValueError(f"the preset's {name} is {value}; expected one side, for a square")
    return sides.pop()
