"""Policies: what augmentation does to an image for a seed, keyed by everything that decides the result."""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FunctionType
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from featstore.digest import Json, canonical_json, digest_json
from featstore.errors import ModelError
from featstore.source_code import function_facts

OwnPolicy = Callable[[Tensor, torch.Generator], Tensor]
"""A person's policy: uint8 `(3, H, W)` and a CPU generator to uint8 `(3, H', W')`, before the evaluation geometry."""


class RenderError(ValueError):
    """An image that can't be made into a view; the message is the reason, without the image's name."""


@dataclass(frozen=True, kw_only=True)
class Policy:
    """One augmentation policy. Policies of equal facts are equal. Made by `policy`.

    Attributes:
        name: for people; of a person's own policy, its function's name.
        identity: the canonical JSON of what decides its values: version and parameters of a built-in one; the digest
            of its source, or its own fingerprint, of a person's.
        function: a person's own policy; None for the built-in ones and for one that is known by its facts alone.
    """

    name: str
    identity: str
    function: OwnPolicy | None = field(default=None, compare=False, repr=False)

    @property
    def facts(self) -> dict[str, Json]:
        """Name and identity, as JSON values."""
        return {"name": self.name, **json.loads(self.identity)}

    def check_unchanged(self) -> None:
        """Checks that a person's own function still is what this policy was keyed by.

        Raises:
            ValueError: if its code or a value that it reads has changed since.
        """
        if self.function is not None and canonical_json(_identity(self.function, self.name)) != self.identity:
            raise ValueError(
                f"the policy {self.name} has changed since this Augment was made: its code, or a value that it reads. "
                "What it computes now has another key; make it again: Augment(policy, seeds)."
            )

    def describe(self) -> str:
        """The name, and for all but the built-in ones of this version what tells two of one name apart."""
        if BUILT_IN.get(self.name) == self:
            return self.name
        identity = json.loads(self.identity)
        if "source" in identity:
            identity["source"] = identity["source"][:12]
        return f"{self.name} ({', '.join(f'{kind} {value}' for kind, value in identity.items())})"

    @classmethod
    def from_facts(cls, facts: dict[str, Json]) -> Policy:
        """The policy of `facts`. Unless that is a built-in one of this version, it can be compared but not used."""
        identity = {name: value for name, value in facts.items() if name != "name"}
        return cls(name=facts["name"], identity=canonical_json(identity))

    def draws(self, seed: int, digest: bytes) -> Draws:
        """The random numbers for the image of content `digest`: of nothing else, whatever the order or the worker."""
        return Draws([self.facts, seed, digest.hex()])

    def apply(self, image: Tensor, seed: int, digest: bytes) -> Tensor:
        """What a person's own policy makes of `image`, which it can't change: uint8 `(3, H', W')`.

        Raises:
            RenderError: when the function fails or returns anything else.
            ValueError: for a policy without a function.
        """
        if self.function is None:
            raise ValueError(
                f"the policy {self.name} is known by its facts only ({self.identity}), so no image can go through it; "
                "give the policy itself: view.with_seed(policy, seed)"
            )
        # torch's CPU generator starts from 32 bits of its seed: two images may share a start, which does no harm.
        generator = torch.Generator().manual_seed(self.draws(seed, digest).integer(2**63))
        return _called(self.function, self.name, image, generator)


def policy(given: str | OwnPolicy | Policy) -> Policy:
    """The policy of that name, or a person's own function as one.

    A function is keyed by its attribute or method ``fingerprint`` (a text) if it has one, else by its source without
    comments and layout, with the values it reads: closure, defaults, globals, what it takes from own modules and
    classes; of other own modules that it uses, their whole source as well. Of libraries the names alone count: an
    upgrade that changes what one computes goes unseen. It is tried on a made-up image, so that one with random numbers
    from elsewhere than its generator is refused here.

    Raises:
        ValueError: for an unknown name, a function that can't be keyed, and one that isn't a function of image and
            generator alone.
    """
    if isinstance(given, Policy):
        return given
    if isinstance(given, str):
        if given not in BUILT_IN:
            raise ValueError(f"there is no augmentation policy {given!r}; choose {', '.join(BUILT_IN)}")
        return BUILT_IN[given]
    if not callable(given):
        raise TypeError(f"an augmentation policy is a name or a function, not a {type(given).__name__}")
    name = getattr(given, "__name__", type(given).__name__)
    _check_pure(given, name)
    return Policy(name=name, identity=canonical_json(_identity(given, name)), function=given)


# --- the built-in policies ---

FLIP_PROBABILITY = 0.5
AREA = (0.08, 1.0)
ASPECT = (3 / 4, 4 / 3)
ATTEMPTS = 10


def _built_in(name: str, version: int, **params: Json) -> Policy:
    return Policy(name=name, identity=canonical_json({"version": version, "params": params}))


NONE = _built_in("none", 1)
FLIP = _built_in("flip", 1, probability=FLIP_PROBABILITY)
RANDOM_RESIZED_CROP = _built_in(
    "random_resized_crop", 1, area=AREA, aspect=ASPECT, attempts=ATTEMPTS, flip_probability=FLIP_PROBABILITY
)
BUILT_IN = {each.name: each for each in (NONE, FLIP, RANDOM_RESIZED_CROP)}


class Box(NamedTuple):
    """A rectangle of pixels."""

    top: int
    left: int
    height: int
    width: int


def random_box(height: int, width: int, draws: Draws) -> Box:
    """A box of random area and aspect in an image; after `ATTEMPTS` that don't fit, the largest central one that may.

    Distributed as torchvision's ``RandomResizedCrop``.
    """
    for _ in range(ATTEMPTS):
        area = height * width * draws.uniform(*AREA)
        aspect = math.exp(draws.uniform(math.log(ASPECT[0]), math.log(ASPECT[1])))
        box_width, box_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < box_width <= width and 0 < box_height <= height:
            top = draws.integer(height - box_height + 1)
            return Box(top, draws.integer(width - box_width + 1), box_height, box_width)
    box_height, box_width = height, width
    if width / height < ASPECT[0]:
        box_height = round(width / ASPECT[0])
    elif width / height > ASPECT[1]:
        box_width = round(height * ASPECT[1])
    return Box((height - box_height) // 2, (width - box_width) // 2, box_height, box_width)


class Draws:
    """Random numbers that follow from `key` alone, on every machine: SHA-256 of the key's SHA-256 and a counter."""

    def __init__(self, key: Json) -> None:
        self._start = hashlib.sha256(canonical_json(key).encode("ascii")).digest()
        self._count = 0

    def uniform(self, low: float, high: float) -> float:
        """A number in [low, high), one of 2**53."""
        return low + (high - low) * ((self._bits() >> 11) / 2**53)

    def integer(self, stop: int) -> int:
        """A number in 0 ... stop - 1, all equally likely; `stop` is at most 2**63."""
        limit = 2**64 - 2**64 % stop  # the rest would favour small numbers
        while (bits := self._bits()) >= limit:
            pass
        return bits % stop

    def _bits(self) -> int:
        block = hashlib.sha256(self._start + self._count.to_bytes(8, "big")).digest()
        self._count += 1
        return int.from_bytes(block[:8], "big")


# --- a person's own policy: what it is keyed by ---


def _identity(function: OwnPolicy, name: str) -> dict[str, Json]:
    fingerprint = getattr(function, "fingerprint", None)
    if fingerprint is not None:
        text = fingerprint() if callable(fingerprint) else fingerprint
        if not isinstance(text, str) or not text:
            raise ValueError(f"the fingerprint of the policy {name} is {text!r}; expected a text that is not empty")
        return {"fingerprint": text}
    try:
        if not isinstance(function, FunctionType):
            raise TypeError(f"it is a {type(function).__name__}, not a plain function")
        return {"source": digest_json(function_facts(function))}
    except (TypeError, ValueError, SyntaxError, ModelError) as error:
        raise ValueError(
            f"the policy {name} can't be keyed: {error}. Give it an attribute or method fingerprint, a text that "
            "changes whenever its results do."
        ) from error


# --- a person's own policy: calling it, and trying it out ---


def _called(function: OwnPolicy, name: str, image: Tensor, generator: torch.Generator) -> Tensor:
    try:
        result = function(image.clone(memory_format=torch.contiguous_format), generator)
    except Exception as error:
        raise RenderError(f"the policy {name} failed: {type(error).__name__}: {error}") from error
    is_image = isinstance(result, Tensor) and result.dim() == 3 and result.shape[0] == 3 and result.numel() > 0
    if not is_image or result.dtype != torch.uint8 or result.device.type != "cpu":
        found = f"{result.dtype} {tuple(result.shape)}" if isinstance(result, Tensor) else type(result).__name__
        raise RenderError(f"the policy {name} returned {found}; expected a uint8 tensor (3, H, W) on the CPU")
    return result


def _check_pure(function: OwnPolicy, name: str) -> None:
    """Refuses a function whose result depends on more than image and generator, by different global random states.

    Done once, where the policy is made and in the thread that makes it: the states belong to the whole process.
    """
    size = (3, 240, 320)
    image = (torch.arange(math.prod(size)) * 2654435761 % 2**32 // 2**24).to(torch.uint8).reshape(size)
    for seed in range(4):  # several: a policy may do nothing to some images
        results = []
        for state in (1, 2):
            with _global_random_state(state):
                try:
                    results.append(_called(function, name, image, torch.Generator().manual_seed(seed)))
                except RenderError as error:
                    raise ValueError(f"{error} (tried on a made-up image {size})") from error
        if not torch.equal(*results):
            raise ValueError(
                f"the policy {name} gave two results for one image and one generator. Expected a function of the two "
                "alone. Draw every random number from the generator: torch.rand(1, generator=generator)."
            )


@contextmanager
def _global_random_state(seed: int) -> Iterator[None]:
    # numpy's legacy functions: the global state that a policy may have used by mistake has no others.
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
    try:
        torch.default_generator.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        random.seed(seed)
        yield
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        random.setstate(states[2])
