"""Augmentation: a policy as a value, built-in or a person's own, keyed by everything that decides its results."""

from __future__ import annotations

import json
import os
import random
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from types import FunctionType
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.random import bit_generator
from numpy.typing import NDArray

from featstore.digest import Json, canonical_json, digest_json
from featstore.errors import ModelError
from featstore.images.canvas import Canvas
from featstore.images.draws import Draws
from featstore.images.geometry import Geometry, RenderError
from featstore.images.policies import named, package_of
from featstore.images.spelling import THEN, changed, read, spelled
from featstore.source_code import function_facts, is_from_library
from featstore.surroundings import Reading, noticed, readings

if TYPE_CHECKING:
    import torch
    from torch import Tensor

OwnPolicy: TypeAlias = "Callable[[Tensor, torch.Generator], Tensor]"
"""A person's policy: uint8 `(3, H, W)` and a CPU generator to uint8 `(3, H', W')`, before the evaluation geometry."""


GivenPolicy: TypeAlias = "str | OwnPolicy | Policy | tuple[str, Mapping[str, Any]] | Sequence[GivenPolicy]"
"""A built-in policy's name, alone or with its parameters; a person's function; several that follow one another."""


@dataclass(frozen=True, kw_only=True, repr=False)
class Policy:
    """One augmentation policy. Policies of equal facts are equal. Made by `policy`.

    Attributes:
        name: for people; of a person's own policy, its function's name; of several, theirs, joined by ``+``.
        identity: the canonical JSON of what decides its values: version and parameters of a built-in one; the digest
            of its source, or its own fingerprint, of a person's; the facts of all where there are several.
        function: a person's own policy; None for the built-in ones and for one that is known by its facts alone.
        parts: the policies that follow one another, where there are several; else empty.
    """

    name: str
    identity: str
    function: OwnPolicy | None = field(default=None, compare=False)
    parts: tuple[Policy, ...] = field(default=(), compare=False)

    @property
    def facts(self) -> dict[str, Json]:
        """Name and identity, as JSON values."""
        return {"name": self.name, **json.loads(self.identity)}

    @property
    def spelled(self) -> str | None:
        """What names it in one word, as ``--augment`` has it; None unless all of it is built-in, in this version."""
        words = []
        for part in self._steps:
            params = _built_in(part)
            if params is None:
                return None
            words.append(spelled(part.name, params))
        return THEN.join(words)

    @property
    def label(self) -> str:
        """A few words for people: the name, with the parameters that aren't a built-in one's defaults."""
        return self.spelled or self.name

    def describe(self) -> str:
        """The label, and for all but the built-in ones of this version what tells two of one name apart."""
        if len(self.parts) > 1:
            return THEN.join(part.describe() for part in self.parts)
        if self.spelled is not None:
            return self.spelled
        identity = json.loads(self.identity)
        if "source" in identity:
            identity["source"] = identity["source"][:12]
        return f"{self.name} ({', '.join(f'{kind} {value}' for kind, value in identity.items())})"

    def __repr__(self) -> str:
        if self.parts:
            return f"policy([{', '.join(map(repr, self.parts))}])"
        if (params := _built_in(self)) is not None:
            given = changed(self.name, params)
            return f"policy({self.name!r}{''.join(f', {name}={value!r}' for name, value in given.items())})"
        return f"Policy.from_facts({self.facts!r})" if self.function is None else f"policy({self.name})"

    def check_unchanged(self) -> None:
        """Checks that a person's own functions still are what this policy was keyed by.

        Raises:
            ValueError: if the code of one, or a value that it reads, has changed since.
        """
        for each in self._steps:
            if not each._is_unchanged():
                raise ValueError(
                    f"the policy {each.name} has changed since this Augment was made: its code, or a value that it "
                    "reads. What it computes now has another key; make it again: Augment(policy, seeds)."
                )

    def _is_unchanged(self) -> bool:
        if self.function is not None:
            return canonical_json(_identity(self.function, self.name)) == self.identity
        facts = json.loads(self.identity)
        return "package" not in facts or _named(self.name, facts["params"]).identity == self.identity

    @classmethod
    def from_facts(cls, facts: dict[str, Json]) -> Policy:
        """The policy of `facts`. Unless that is a built-in one of this version, it can be compared but not used."""
        identity = {name: value for name, value in facts.items() if name != "name"}
        parts = tuple(cls.from_facts(each) for each in facts.get("policies", ()))
        return cls(name=facts["name"], identity=canonical_json(identity), parts=parts)

    def draws(self, seed: int, digest: bytes) -> Draws:
        """The random numbers for the image of content `digest`: of nothing else, whatever the order or the worker."""
        return Draws([self.facts, seed, digest.hex()])

    def render(self, image: Tensor, geometry: Geometry, seed: int, digest: bytes) -> Tensor:
        """The augmented view of `image`, which stays as it is: uint8 `(3, size, size)`, maybe in its memory.

        A person's own policy comes before the evaluation geometry, unless a built-in one comes before it; then it gets
        the square and gives one back.

        Raises:
            RenderError: as `apply`, and as `Geometry.evaluation`.
            ValueError: for a policy that is neither built-in, in this version, nor has a function.
        """
        draws, steps = self.draws(seed, digest), deque(self._steps)
        while steps and _built_in(steps[0]) is None:
            image = steps.popleft()._seeded(draws)(image)
        if not steps:
            return geometry.evaluation(image)
        canvas = Canvas(image, geometry)
        for step in steps:
            params = _built_in(step)
            if params is not None:
                named(step.name).method(canvas, draws, **params)
            else:
                canvas.change(partial(_square_by, step._seeded(draws), step.name))
        return canvas.finished()

    def apply(self, image: Tensor, seed: int, digest: bytes) -> Tensor:
        """What a person's own policy makes of `image`, which it can't change: uint8 `(3, H', W')`.

        Raises:
            RenderError: when the function fails or returns anything else.
            ValueError: for a policy without a function.
        """
        return self._seeded(self.draws(seed, digest))(image)

    @property
    def _steps(self) -> tuple[Policy, ...]:
        return self.parts or (self,)

    def _seeded(self, draws: Draws) -> Callable[[Tensor], Tensor]:
        if self.function is None:
            raise ValueError(
                f"the policy {self.name} is known by its facts only ({self.identity}), so no image can go through it; "
                "give the policy itself: view.with_seed(policy, seed)"
            )
        import torch

        # torch's CPU generator starts from 32 bits of its seed: two images may share a start, which does no harm.
        generator = torch.Generator().manual_seed(draws.integer(2**63))
        return partial(_called, self.function, self.name, generator=generator)


def policy(given: GivenPolicy, /, **parameters: Any) -> Policy:
    """The policy of that name with these parameters, a person's own function as one, or several one after the other.

    >>> policy("side_on", max_zoom=1.1)
    policy('side_on', max_zoom=1.1)
    >>> policy([("side_on", {"max_zoom": 1.1}), "cutout"]) == policy("side_on:max_zoom=1.1+cutout")
    True

    A function is keyed by its attribute or method ``fingerprint`` (a text) if it has one, else by its source without
    comments and layout, with the values it reads: closure, defaults, globals, what it takes from own modules and
    classes; of other own modules that it uses, their whole source as well. Of libraries the names alone count: an
    upgrade that changes what one computes goes unseen. It is tried on a made-up image, so that one with random numbers
    from elsewhere than its generator is refused here.

    Raises:
        ValueError: for an unknown name, parameters that the policy hasn't or that can't have this value, a function
            that can't be keyed, and one that isn't a function of image and generator alone.
    """
    what: Any = given
    match what:
        case str():
            words = read(what)
            if len(words) == 1:
                return _named(words[0][0], {**words[0][1], **parameters})
            made = _joined([_named(name, params) for name, params in words])
        case [str() as name, Mapping() as of_name]:
            return policy(name, **{**of_name, **parameters})
        case Policy():
            made = what
        case Sequence():
            made = _joined([policy(each) for each in what])
        case _ if callable(what):
            name = getattr(what, "__name__", type(what).__name__)
            if not parameters:
                _check_pure(what, name)
            made = Policy(name=name, identity=canonical_json(_identity(what, name)), function=what)
        case _:
            kind = type(what).__name__
            raise TypeError(f"an augmentation policy is a name, a function or a list of these, not a {kind}")
    if parameters:
        raise TypeError(
            f"the parameters {', '.join(parameters)} are given for {made.name}; only one built-in policy, given by its "
            'name, takes parameters: ("side_on", {"max_zoom": 1.1}) in a list'
        )
    return made


def _named(name: str, params: Mapping[str, Any]) -> Policy:
    entry, package = named(name), package_of(name)
    facts: dict[str, Json] = {"version": entry.version, "params": entry.checked(name, params)}
    if package is None:
        return Policy(name=name, identity=canonical_json(facts))
    # Who changes what a policy of another package does may forget its version: so that of the package is a fact as
    # well, and where it isn't installed but lies in its author's folder, the code.
    facts["package"] = package
    if not (isinstance(entry.method, FunctionType) and is_from_library(entry.method)):
        facts["source"] = digest_json(_keyed(entry.method, name))
    made = Policy(name=name, identity=canonical_json(facts))
    _try_plugin(name, made.identity)
    return made


@cache
def _try_plugin(name: str, identity: str) -> None:
    """`_check_pure` of a policy of another package, once a process."""
    method, params = named(name).method, json.loads(identity)["params"]

    def on_a_canvas(image: Tensor, generator: torch.Generator) -> Tensor:
        import torch

        canvas = Canvas(image, Geometry(size=28, resize=32, interpolation="bilinear", antialias=True))
        method(canvas, Draws(int(torch.randint(2**62, (), generator=generator))), **params)
        return canvas.finished()

    _check_pure(on_a_canvas, name, reads_of=method)


def _joined(policies: Sequence[Policy]) -> Policy:
    parts = tuple(part for each in policies for part in each._steps)
    if not parts:
        raise ValueError("a list of no policies came; give one policy at least")
    if len(parts) == 1:
        return parts[0]
    if NONE in parts:
        raise ValueError("the policy none is the evaluation view and does nothing to others; leave it out")
    identity = canonical_json({"policies": [part.facts for part in parts]})
    return Policy(name=THEN.join(part.name for part in parts), identity=identity, parts=parts)


NONE = _named("none", {})
"""No augmentation, for programs that need a word for it; no view has it."""


def _built_in(policy: Policy) -> Mapping[str, Json] | None:
    """The parameters of a policy that has a name, in this version; None for any other."""
    return None if policy.parts else _params(policy.name, policy.identity)


@cache
def _params(name: str, identity: str) -> Mapping[str, Json] | None:
    facts = json.loads(identity)
    if not {"version", "params"} <= facts.keys():
        return None
    try:
        known = _named(name, facts["params"])
    except ValueError:
        return None
    return facts["params"] if known.identity == identity else None


# --- a person's own policy: what it is keyed by ---


def _identity(function: OwnPolicy, name: str) -> dict[str, Json]:
    fingerprint = getattr(function, "fingerprint", None)
    if fingerprint is not None:
        text = fingerprint() if callable(fingerprint) else fingerprint
        if not isinstance(text, str) or not text:
            raise ValueError(f"the fingerprint of the policy {name} is {text!r}; expected a text that is not empty")
        return {"fingerprint": text}
    return {"source": digest_json(_keyed(function, name))}


def _keyed(function: Callable[..., Any], name: str) -> Json:
    try:
        if not isinstance(function, FunctionType):
            raise TypeError(f"it is a {type(function).__name__}, not a plain function")
        return function_facts(function)
    except (TypeError, ValueError, SyntaxError, ModelError) as error:
        raise ValueError(
            f"the policy {name} can't be keyed: {error}. Give it an attribute or method fingerprint, a text that "
            "changes whenever its results do."
        ) from error


# --- a person's own policy: calling it, and trying it out ---


def _square_by(function: Callable[[Tensor], Tensor], name: str, square: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """What a person's own policy makes of a square, which has to be as large."""
    import torch

    result = function(torch.from_numpy(np.ascontiguousarray(square)))
    if result.shape != square.shape:
        raise RenderError(
            f"the policy {name} returned {tuple(result.shape)} of a square {square.shape}, which has to stay as large "
            "after a built-in policy; put it before that one"
        )
    return result.numpy()


def _called(function: OwnPolicy, name: str, image: Tensor, generator: torch.Generator) -> Tensor:
    import torch

    try:
        result = function(image.clone(memory_format=torch.contiguous_format), generator)
    except Exception as error:
        raise RenderError(f"the policy {name} failed: {type(error).__name__}: {error}") from error
    is_image = isinstance(result, torch.Tensor) and result.dim() == 3 and result.shape[0] == 3 and result.numel() > 0
    if not is_image or result.dtype != torch.uint8 or result.device.type != "cpu":
        found = f"{result.dtype} {tuple(result.shape)}" if isinstance(result, torch.Tensor) else type(result).__name__
        raise RenderError(f"the policy {name} returned {found}; expected a uint8 tensor (3, H, W) on the CPU")
    return result


def _check_pure(function: OwnPolicy, name: str, *, reads_of: Callable[..., Any] | None = None) -> None:
    """Refuses a function whose result depends on more than image and generator, or may.

    It is called by different global random states, which must stay where they are, and may make no generator without a
    seed. Done once, where the policy is made and in the thread that makes it: the states belong to the whole process.
    What it reads besides (files, environment, clocks) is refused as well, unless its fingerprint vouches for that.
    """
    with noticed() as read:
        for image, num_trials, is_ordinary in _trial_images():
            for seed in range(num_trials):
                try:
                    _check_trial(function, name, image, seed)
                except RenderError as error:
                    if is_ordinary:  # it may refuse what hardly is an image
                        raise ValueError(f"{error} (tried on a made-up image {tuple(image.shape)})") from error
    if getattr(function, "fingerprint", None) is None:
        for reading in (*read, *readings(reads_of or function)):
            raise _reads_besides(name, reading)


def _check_trial(function: OwnPolicy, name: str, image: Tensor, seed: int) -> None:
    """Raises RenderError where the function fails, ValueError where it isn't one of image and generator alone."""
    import torch

    results: list[Tensor | RenderError] = []
    for state in (1, 2):
        generator = torch.Generator().manual_seed(seed)
        with _global_random_state(state), _watched_generators() as unseeded:
            before = _global_states()
            try:
                results.append(_called(function, name, image, generator))
            except RenderError as error:
                results.append(error)
            moved = [whose for whose, now in _global_states().items() if now != before[whose]]
        if moved or unseeded:
            what = (
                f"moved the global random state of {' and of '.join(moved)}"
                if moved
                else f"took random numbers from {unseeded[0]}"
            )
            raise ValueError(
                f"the policy {name} {what}, so another run may give other views. Expected a function of image and "
                "generator alone. Draw every random number from the generator, or seed another one by it: "
                "torch.rand(1, generator=generator), "
                "np.random.default_rng(int(torch.randint(2**62, (), generator=generator)))."
            )
    first, second = results
    if isinstance(first, RenderError) and isinstance(second, RenderError):
        raise first
    if isinstance(first, RenderError) or isinstance(second, RenderError) or not torch.equal(first, second):
        raise ValueError(
            f"the policy {name} gave two results for one image and one generator. Expected a function of the two "
            "alone. Draw every random number from the generator: torch.rand(1, generator=generator)."
        )


def _trial_images() -> Iterator[tuple[Tensor, int, bool]]:
    """Images, with the number of generators that a policy is tried with on each and whether it has to take it.

    It may do nothing to most images and for most generators, and go by size, shape, brightness or contrast.
    """
    import torch

    def noise(height: int, width: int) -> Tensor:
        numbers = torch.arange(3 * height * width) * 2654435761 % 2**32 // 2**24
        return numbers.to(torch.uint8).reshape(3, height, width)

    def flat(level: int) -> Tensor:
        return torch.full((3, 48, 64), level, dtype=torch.uint8)

    yield noise(240, 320), 16, True
    small = noise(48, 64)
    grey, red, ramp = small[:1].repeat(3, 1, 1), flat(0), flat(0)
    red[0] = 255
    ramp[:] = torch.arange(64, dtype=torch.uint8) * 4
    for image in (flat(0), flat(128), flat(255), red, grey, ramp, small // 8, 224 + small // 8):
        yield image, 4, False
    for height, width in ((1, 1), (8, 8), (32, 32), (96, 96), (24, 200), (200, 24)):
        yield noise(height, width), 4, False
    yield noise(640, 512), 2, False


def _reads_besides(name: str, reading: Reading) -> ValueError:
    return ValueError(
        f"the policy {name} reads {reading}, which its key doesn't cover, so another run may give other views. "
        f"Expected a function of image and generator alone. {reading.remedy} Or give the policy an attribute or method "
        "fingerprint, a text that changes whenever its results do."
    )


def _global_states() -> dict[str, bytes]:
    """Whose global random state -> the state."""
    import torch

    _, keys, *rest = np.random.get_state(legacy=True)  # noqa: NPY002
    return {
        "torch": torch.get_rng_state().numpy().tobytes(),
        "numpy": np.asarray(keys).tobytes() + repr(rest).encode("ascii"),
        "Python": repr(random.getstate()).encode("ascii"),
    }


@contextmanager
def _watched_generators() -> Iterator[list[str]]:
    """A list of the sources of random numbers that the block made or used without a seed, in this thread.

    Those of torch count if they were made by the name `torch.Generator`; they all start from the same number, so an
    image's random numbers would be those of every other.
    """
    import torch

    found: list[str] = []
    here = threading.get_ident()

    def note(source: str) -> None:
        if threading.get_ident() == here:
            found.append(source)

    def noting(method: Callable[..., Any], source: str) -> Callable[..., Any]:
        def noted(*args: Any) -> Any:
            note(source)
            return method(*args)

        return noted

    def seed(self: random.Random, a: Any = None, version: int = 2) -> None:
        if a is None:
            note("a random.Random without a seed")
        seed_python(self, a, version)

    seed_python, entropy = random.Random.seed, random.SystemRandom
    watched: list[tuple[Any, str, Any]] = [
        (random.Random, "seed", seed),
        (entropy, "random", noting(entropy.random, "the system's entropy")),
        (entropy, "getrandbits", noting(entropy.getrandbits, "the system's entropy")),
        (os, "urandom", noting(os.urandom, "the system's entropy")),
        # Where numpy gets what starts a generator that nobody seeds.
        (bit_generator, "randbits", noting(vars(bit_generator)["randbits"], "a generator of numpy without a seed")),
        (torch, "Generator", _watched_torch(found, here)),
    ]
    before = [vars(owner)[name] for owner, name, _ in watched]
    try:
        for owner, name, watching in watched:
            setattr(owner, name, watching)
        yield found
    finally:
        for (owner, name, _), original in zip(watched, before, strict=True):
            setattr(owner, name, original)


def _watched_torch(found: list[str], thread: int) -> Any:
    """A class as `torch.Generator`, whose generators are in `found` until they have a seed or a state."""
    import torch

    original: Any = torch.Generator
    words = "a torch.Generator without a seed"

    class Kind(type(original)):  # type: ignore[misc]
        def __instancecheck__(cls, value: object) -> bool:
            return isinstance(value, original)  # also those that were made before

    def made(self: Any, *_: Any, **__: Any) -> None:
        if threading.get_ident() == thread:
            found.append(words)

    def seeded(method: str) -> Callable[..., Any]:
        def call(self: Any, value: Any) -> Any:
            if threading.get_ident() == thread and words in found:
                found.remove(words)
            return getattr(original, method)(self, value)

        return call

    methods = {"__init__": made, "manual_seed": seeded("manual_seed"), "set_state": seeded("set_state")}
    return Kind("Generator", (original,), methods)


@contextmanager
def _global_random_state(seed: int) -> Iterator[None]:
    import torch

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
