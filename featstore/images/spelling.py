"""Spelling: built-in policies and their parameters as one word, which flags take and people read.

>>> read("side_on:max_zoom=1.1,rotation=15+cutout")
[('side_on', {'max_zoom': 1.1, 'rotation': 15.0}), ('cutout', {})]
>>> spelled("side_on", {**BUILT_IN["side_on"].checked("side_on", {}), "max_zoom": 1.1})
'side_on:max_zoom=1.1'
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from featstore.digest import Json
from featstore.images.policies import BUILT_IN, named
from featstore.plugins import POLICIES, names_of

THEN = "+"
"""Between policies that follow one another."""


def read(word: str) -> list[tuple[str, dict[str, Any]]]:
    """The policies that a word names, with the parameters that it gives.

    Raises:
        ValueError: for a name that there is not, and as `BuiltIn.checked`.
    """
    return [_one(part) for part in word.split(THEN)]


def spelled(name: str, params: Mapping[str, Json]) -> str:
    """A policy with those of its checked parameters that aren't the defaults."""
    given = changed(name, params)
    values = ",".join(f"{each}={named(name).params[each].text(value)}" for each, value in given.items())
    return f"{name}:{values}" if values else name


def changed(name: str, params: Mapping[str, Json]) -> dict[str, Json]:
    """Those of a policy's checked parameters that aren't the defaults."""
    defaults = named(name).checked(name, {})
    return {each: params[each] for each in defaults if params[each] != defaults[each]}


def completed(begun: str) -> list[str]:
    """What a word of which the beginning is typed may go on to, for a shell."""
    before, then, last = begun.rpartition(THEN)
    name, colon, params = last.partition(":")
    if not colon:
        return [f"{before}{then}{each}" for each in (*BUILT_IN, *names_of(POLICIES)) if each.startswith(name)]
    given, comma, last = params.rpartition(",")
    start = f"{before}{then}{name}:{given}{comma}"
    return [f"{start}{each}=" for each in _params(name) if each.startswith(last)]


def _params(name: str) -> list[str]:
    return list(BUILT_IN[name].params) if name in BUILT_IN else []


def _one(part: str) -> tuple[str, dict[str, Any]]:
    name, colon, rest = part.partition(":")
    policy = named(name)
    params: dict[str, Any] = {}
    for text in rest.split(",") if colon else ():
        each, _, value = text.partition("=")
        parameter = policy.params.get(each)
        if each in params:
            raise ValueError(f"{each} is given twice in {part!r}; give it once")
        try:
            params[each] = value if parameter is None else parameter.parsed(value)
        except ValueError:
            params[each] = value  # which the check refuses in words
    policy.checked(name, params)
    return name, params
