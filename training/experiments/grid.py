"""Grid: which settings a sweep tries - all combinations of some values, a sample of them or of ranges, or a list."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from featstore.digest import Json, digest_json

if TYPE_CHECKING:
    from torch import nn

NAMES = (
    "backbone", "cut", "reduce", "head", "hidden", "dropout", "queries", "lr", "epochs", "schedule", "weight_decay",
    "decay_norms", "label_smoothing", "class_weights", "mix", "augment", "sampling", "optimizer", "batch_size", "seed",
    "clip", "accumulate", "precision", "average", "keep", "patience",
)  # fmt: skip
"""What a sweep can vary: the backbone and where the head sits, the head, and how it is trained."""

Setting: TypeAlias = dict[str, Any]
"""Name -> value."""


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, evenly likely, or evenly by their logarithms."""

    low: float
    high: float
    by_log: bool = False

    def __post_init__(self) -> None:
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise ValueError(f"The range is from {self.low} to {self.high}; expected two numbers, the lower one first.")
        if self.by_log and self.low <= 0:
            raise ValueError(f"The range by logarithms begins at {self.low}; expected a number above 0.")

    def at(self, share: float) -> float:
        """The number at a share of the way, from 0 to 1."""
        if self.by_log:
            return float(self.low * (self.high / self.low) ** share)
        return float(self.low + (self.high - self.low) * share)


def uniform(low: float, high: float) -> Range:
    """Numbers from `low` to `high`, each as likely as any other."""
    return Range(low, high)


def log_uniform(low: float, high: float) -> Range:
    """Numbers from `low` to `high`, each factor as likely as any other: for rates.

    >>> round(log_uniform(1e-4, 1e-2).at(0.5), 6)
    0.001
    """
    return Range(low, high, by_log=True)


@dataclass(frozen=True)
class Grid:
    """All combinations of values.

    Attributes:
        values: name -> the values to try.
    """

    values: Mapping[str, Sequence[Any]]

    def __post_init__(self) -> None:
        check_names(self.values)
        for name, given in self.values.items():
            if isinstance(given, Range):
                raise ValueError(
                    f"{name} is a range, of which a grid has no end of values. Give a list, or take a sample: "
                    "Sample({...}, n=20)."
                )
            _check_values(name, given)

    def settings(self) -> list[Setting]:
        """Each combination; the last name varies fastest."""
        return [dict(zip(self.values, each, strict=True)) for each in product(*self.values.values())]


@dataclass(frozen=True)
class Sample:
    """Combinations drawn from lists and ranges.

    Attributes:
        values: name -> a list, of which each value is as likely as any other; or `uniform`, or `log_uniform`.
        n: how many.
        method: ``random``; or ``sobol``, by a scrambled Sobol sequence, whose points leave fewer gaps.
        seed: of the draws.
    """

    values: Mapping[str, Sequence[Any] | Range]
    n: int
    method: Literal["random", "sobol"] = "random"
    seed: int = 0

    def __post_init__(self) -> None:
        check_names(self.values)
        for name, given in self.values.items():
            if not isinstance(given, Range):
                _check_values(name, given)
        if self.n < 1 or not self.values:
            raise ValueError(f"{self.n} of {len(self.values)} names are to be drawn; expected at least 1 of both.")
        if self.method not in ("random", "sobol"):
            raise ValueError(f"method is {self.method!r}; expected random or sobol.")

    def settings(self) -> list[Setting]:
        """The combinations, in the order in which they were drawn."""
        return [
            {
                name: given.at(share) if isinstance(given, Range) else given[int(share * len(given))]
                for (name, given), share in zip(self.values.items(), row, strict=True)
            }
            for row in self._shares().tolist()
        ]

    def _shares(self) -> NDArray[np.float64]:
        """``(n, names)``, from 0 and below 1."""
        if self.method == "random":
            return np.random.default_rng(self.seed).random((self.n, len(self.values)))
        from scipy.stats import qmc  # type: ignore[import-untyped]  # takes 0.3 s

        drawn = qmc.Sobol(len(self.values), seed=self.seed).random_base2(math.ceil(math.log2(self.n)))
        # Scrambled points may round to 1.
        points: NDArray[np.float64] = np.minimum(drawn[: self.n], np.nextafter(1.0, 0.0))
        return points


Settings: TypeAlias = Grid | Sample | Mapping[str, Sequence[Any]] | Sequence[Mapping[str, Any]]
"""A grid, also as a mapping alone; a sample; or the settings themselves."""


def as_settings(given: Settings) -> list[Setting]:
    """The settings that `given` stands for, each once, in order.

    Raises:
        ValueError: for a name that there isn't, and where there is nothing to try.
    """
    if isinstance(given, Mapping):
        given = Grid(given)
    settings = given.settings() if isinstance(given, Grid | Sample) else [dict(each) for each in given]
    for each in settings:
        check_names(each)
    distinct = {setting_digest(each): each for each in settings}
    if not distinct:
        raise ValueError("There is no setting to try. Give some: Grid({'lr': [1e-3, 1e-2]}).")
    return [*distinct.values()]


def check_names(names: Mapping[str, Any]) -> None:
    """Checks that a sweep can vary what is named.

    Raises:
        ValueError: names what it can't, and what may have been meant.
    """
    for name in names:
        if name not in NAMES:
            near = difflib.get_close_matches(str(name), NAMES, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise ValueError(f"A sweep has no setting {name!r}.{hint} Its settings are {', '.join(NAMES)}.")


def setting_facts(setting: Mapping[str, Any]) -> dict[str, Json]:
    """A setting as JSON, by which it is told from any other, in another process too: code by its name and source.

    What has no such name is told from others of this process alone, see `unnamed`.
    """
    return {name: _fact(setting[name]) for name in sorted(setting)}


def setting_digest(setting: Mapping[str, Any]) -> str:
    """64 bits in hexadecimal digits, which name a setting among those of a sweep."""
    return digest_json(setting_facts(setting))[:16]


def unnamed(facts: Json) -> str | None:
    """Of facts as `setting_facts` gives them what no other process can know again, and why; None if there is none."""
    if isinstance(facts, Mapping):
        return str(facts[_UNNAMED]) if _UNNAMED in facts else unnamed([*facts.values()])
    return next(filter(None, map(unnamed, facts)), None) if isinstance(facts, list) else None


_UNNAMED = "without a name"


def _fact(value: Any) -> Json:
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, str | int | float | bool):
        return value
    if isinstance(value, list | tuple):
        return [_fact(each) for each in value]
    if isinstance(value, Mapping):
        return {str(name): _fact(each) for name, each in value.items()}
    if isinstance(value, np.ndarray):
        return _fact(value.tolist())
    # What code computes decides scores, and its name doesn't say that.
    from featstore.errors import ModelError

    try:
        return _code_fact(value)
    except (ModelError, TypeError, ValueError) as error:
        name = getattr(value, "__qualname__", type(value).__qualname__)
        return {_UNNAMED: f"{name} ({str(error).splitlines()[0]})", "here": id(value)}


def _code_fact(value: Any) -> Json:
    """A function, class, module or object by its name and a digest of all that decides what it does.

    Raises:
        TypeError, ValueError, ModelError: if no other process could know it again.
    """
    from torch import Tensor, nn

    from featstore.digest import digest_tensor
    from featstore.images.views import Augment
    from featstore.source_code import class_facts, function_facts, is_from_library

    if isinstance(value, Augment):
        return {"policy": value.policy.facts, "seeds": _fact(value.seeds)}
    if isinstance(value, Tensor):
        return digest_tensor(value)
    if isinstance(value, partial):
        return [_fact(value.func), _fact(value.args), _fact(value.keywords)]
    if isinstance(value, MethodType):
        return [_fact(value.__func__), _fact(value.__self__)]
    kind = value if isinstance(value, type | FunctionType | BuiltinFunctionType) else type(value)
    name = f"{kind.__module__}.{kind.__qualname__}"
    if isinstance(kind, BuiltinFunctionType) or is_from_library(kind):
        code: Json = None
    else:
        code = digest_json(function_facts(kind) if isinstance(kind, FunctionType) else class_facts(kind))
    if kind is value:
        return name if code is None else [name, code]
    if isinstance(value, nn.Module):
        return [name, _module_fact(value)]
    text = repr(value)
    if " at 0x" in text:  # Python's own, which tells nothing of the object
        if not (held := getattr(value, "__dict__", None)):
            raise TypeError("it doesn't show what it holds")
        return [name, code, _fact(held)]
    return text if code is None else [text, code]


def _module_fact(module: nn.Module) -> Json:
    """What a module computes; of one that can't be traced, as a loss of logits and targets, what it is made of."""
    from torch import nn

    from featstore.digest import digest_tensor
    from featstore.errors import ModelError
    from featstore.models.digests import module_digest

    try:
        return module_digest(module)
    except ModelError:
        if any(each._forward_hooks or each._forward_pre_hooks for each in module.modules()):
            raise
    of_torch = vars(nn.Module()).keys()
    parts = [
        [name, _fact(type(each)), _fact({key: held for key, held in vars(each).items() if key not in of_torch})]
        for name, each in module.named_modules()
    ]
    return [parts, {name: digest_tensor(tensor) for name, tensor in module.state_dict().items()}]


def _check_values(name: str, given: Any) -> None:
    if isinstance(given, str) or not isinstance(given, Sequence) or not given:
        raise ValueError(f"{name} is {given!r}; expected the values to try in a list, as [{given!r}].")
