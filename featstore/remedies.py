"""Remedies: what a person is told to run, as a command line or as Python."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Command:
    """A command line: ``str`` quotes its words for a shell.

    >>> print(Command("featstore", "ls", "--store", "my features"))
    featstore ls --store 'my features'
    """

    words: tuple[str, ...]

    def __init__(self, *words: str) -> None:
        object.__setattr__(self, "words", words)

    def __str__(self) -> str:
        return shlex.join(self.words)


@dataclass(frozen=True, kw_only=True)
class Call:
    """A Python call about a model, in the caller's own names.

    >>> print(Call(function="extract", others=("images", "store"), options={"cuts": "['layer4']"}))
    extract(model, images, store, cuts=['layer4'])

    Attributes:
        function: its name.
        model: the name of the model, the first argument.
        others: expressions of the arguments after it.
        options: name of an argument -> its expression.
    """

    function: str
    model: str = "model"
    others: tuple[str, ...] = ()
    options: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        named = [f"{name}={value}" for name, value in self.options.items()]
        return f"{self.function}({', '.join([self.model, *self.others, *named])})"


@dataclass(frozen=True, kw_only=True)
class Steps:
    """A call that comes before another remedy."""

    first: Call
    then: Command | Call

    def __str__(self) -> str:
        return f"{self.first}, then {self.then}"


Remedy = Command | Call | Steps
