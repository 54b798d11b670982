"""FeatureSpec: every fact that decides a stored value, its key, and how two of them differ, in words."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from featstore.digest import Json, digest_json
from featstore.files.storage_types import KNOWN_TYPES, PIXELS, STORAGE_TYPES, StorageType
from featstore.images.views import View
from featstore.models.names import PRECISIONS, Precision

VERSION = 1
"""Raised when the same facts come to mean other values."""


def check_dtype(dtype: str, known: Collection[str] = STORAGE_TYPES) -> None:
    """ValueError for what is no type to store features as."""
    if dtype not in known:
        raise ValueError(f"{dtype!r} is no storage type for features. The types are {', '.join(STORAGE_TYPES)}.")


@dataclass(frozen=True, kw_only=True)
class FeatureSpec:
    """Everything that decides the values of a feature set, complete. Names of cuts and backbones don't.

    Attributes:
        trunk: digest of the operations up to the cut.
        pool: facts of the reduction, `Pool.facts()`.
        view: facts of the view, `View.facts()`, with the policy and seed of an augmented one.
        precision: of the arithmetic.
        dtype: of the stored values.
    """

    trunk: str
    pool: Json
    view: Json
    precision: Precision
    dtype: str

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ValueError(f"{self.precision!r} is no precision. The precisions are {', '.join(PRECISIONS)}.")
        check_dtype(self.dtype, KNOWN_TYPES)

    @cached_property
    def key(self) -> str:
        """SHA-256 of the facts, 64 hexadecimal digits; its first 8 name the set's folder."""
        return digest_json(self.facts())

    def facts(self) -> dict[str, Json]:
        """As JSON."""
        return {
            "version": VERSION,
            "trunk": self.trunk,
            "pool": self.pool,
            "view": self.view,
            "precision": self.precision,
            "dtype": self.dtype,
        }

    @classmethod
    def from_facts(cls, facts: Any) -> FeatureSpec:
        """The inverse of `facts`.

        Raises:
            ValueError: for facts of another version, or not those of a spec: a part read with a guess at what its
                facts mean could be joined to a request that it doesn't fit.
        """
        names = ("trunk", "pool", "view", "precision", "dtype")
        if not isinstance(facts, dict) or set(facts) != {"version", *names} or facts["version"] != VERSION:
            raise ValueError(f"a spec with the facts {facts}; this featstore knows version {VERSION}: {list(names)}")
        return cls(**{name: facts[name] for name in names})

    def differences(self, other: FeatureSpec) -> list[tuple[str, str, str]]:
        """The facts in which two specs differ: what it is, its value here, its value in `other`, in words.

        That the trunks differ is all a spec can say; which stage does, say the stage digests kept with each part.
        """
        mine, others = self._words(), other._words()
        found = [(name, mine[name], others[name]) for name in mine if mine[name] != others[name]]
        return found + self.rendered.differences(other.rendered)

    @property
    def storage_type(self) -> StorageType:
        """Of the stored values."""
        return KNOWN_TYPES[self.dtype]

    @property
    def is_pixels(self) -> bool:
        """Whether its values are views as they are, which no model has computed."""
        return self.dtype == PIXELS.name

    @property
    def reduction(self) -> str:
        """Name of the reduction."""
        return str(self.pool["reduction"])

    @cached_property
    def rendered(self) -> View:
        """The view."""
        return View.from_facts(self.view)

    def _words(self) -> dict[str, str]:
        details = ", ".join(f"{name} {value}" for name, value in sorted(self.pool.items()) if name != "reduction")
        return {
            "trunk": self.trunk[:8],
            "reduction": f"{self.reduction} ({details})" if details else self.reduction,
            "precision": self.precision,
            "storage type": self.dtype,
        }
