"""Kept: what modules keep beside tensors, which tracing must find as it was and a forward may count in."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache
from itertools import count
from operator import length_hint
from random import Random
from types import CodeType, FunctionType, GeneratorType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from featstore.source_code import is_from_library, is_library


class Kept:
    """What the modules that a trace runs keep beside tensors: in attributes, containers, objects, classes, globals.

    By module and route, so that what is made anew each time is the same where its values are.

    Args:
        module: the one that is traced.
        is_leaf: whether a module, by itself and its path, runs as one operation: what lies in it isn't looked at.
    """

    def __init__(self, module: nn.Module, is_leaf: Callable[[nn.Module, str], bool]) -> None:
        self.values: dict[tuple[str, ...], Any] = {}
        self.paths: dict[tuple[str, ...], str] = {}
        self._owners: dict[tuple[str, ...], tuple[Any, Any]] = {}
        self._contents: list[tuple[Any, Any]] = []  # containers below the attributes, with what they held
        self._seen: set[int] = set()
        leaf = None
        for path, part in module.named_modules():
            if leaf is not None and path.startswith(f"{leaf}."):  # what lies in a module comes right after it
                continue
            if path and is_leaf(part, path):
                leaf = path
                continue
            self._path = path
            for name, value in vars(part).items():
                if name not in _MODULE_ATTRIBUTES and not name.startswith(_PARKED):
                    self._add((path, name), vars(part), name, value)
            self._add((path, "class"), None, "", type(part))

    def moved(self, before: Kept) -> list[tuple[str, ...]]:
        """The routes whose values aren't what they were; what has gone counts too."""
        routes = dict.fromkeys([*self.values, *before.values])
        return [each for each in routes if self.values.get(each, self) != before.values.get(each, self)]

    def set(self, routes: list[tuple[str, ...]], number: int) -> None:
        """Puts a number in each of those places."""
        for route in routes:
            _assign(*self._owners[route], number)

    def is_number(self, route: tuple[str, ...]) -> bool:
        """Whether a number lies there that can be replaced."""
        value = self.values.get(route)
        return isinstance(value, int | float) and not isinstance(value, bool) and route in self._owners

    def restore(self) -> None:
        """Puts back what containers held, and the numbers in classes, closures and globals."""
        for container, saved in self._contents:
            if len(container) != len(saved) or any(
                one is not other for one, other in zip(_items(container), _items(saved), strict=True)
            ):
                container.clear()
                container.update(saved) if isinstance(container, dict) else container.extend(saved)
        for route, (owner, key) in self._owners.items():
            if self.is_number(route) and _held(owner, key) != self.values[route]:
                with suppress(AttributeError, TypeError):  # what refuses it has changed it by itself
                    _assign(owner, key, self.values[route])

    def _add(self, route: tuple[str, ...], owner: Any, key: Any, value: Any) -> None:
        self.paths[route] = self._path
        if value is None or isinstance(value, int | float | str | bytes):
            self.values[route] = "nan" if value != value else value
            if owner is not None and not isinstance(owner, tuple):
                self._owners[route] = (owner, key)
        elif isinstance(value, fx.Proxy | fx.Node | nn.Module):
            self.values[route] = type(value)
        elif isinstance(value, Tensor):
            self.values[route] = _content(value)
        elif id(value) not in self._seen:
            self._seen.add(id(value))
            self._add_parts(route, value)

    def _add_parts(self, route: tuple[str, ...], value: Any) -> None:
        if isinstance(value, dict):
            self._contents.append((value, dict(value)))
            self.values[route] = len(value)
            for key, item in list(value.items()):
                self._add((*route, repr(key) if isinstance(key, int | str | tuple) else ""), value, key, item)
        elif isinstance(value, list | tuple | deque):
            if not isinstance(value, tuple):
                self._contents.append((value, list(value)))
            self.values[route] = len(value)
            for place, item in enumerate(value):
                self._add((*route, str(place)), value, place, item)
        elif isinstance(value, set):
            self.values[route] = sorted(repr(item) for item in value if isinstance(item, int | float | str))
        elif isinstance(value, MethodType):
            self._add_parts(route, value.__func__)
            self._add((*route, "self"), value, "__self__", value.__self__)
        elif isinstance(value, FunctionType):
            self._add_function(route, value)
        elif isinstance(value, type):
            self._add_class(route, value)
        elif not isinstance(value, ModuleType):
            self.values[route] = _position(value)
            self._add_object(route, value)

    def _add_object(self, route: tuple[str, ...], value: Any) -> None:
        if is_from_library(type(value)):
            return
        if hasattr(value, "__dict__"):
            self._add_parts((*route, "attributes"), vars(value))
        slots = [name for kind in type(value).__mro__ for name in _names_of(getattr(kind, "__slots__", ()))]
        for name in slots:
            if hasattr(value, name):
                self._add((*route, name), value, name, getattr(value, name))
        self._add((*route, "class"), None, "", type(value))

    def _add_class(self, route: tuple[str, ...], kind: type) -> None:
        if is_from_library(kind):
            return
        for base in kind.__bases__:
            self._add((*route, base.__qualname__), None, "", base)
        for name, value in list(vars(kind).items()):
            parts = [getattr(value, part, None) for part in ("__func__", "fget", "fset")]
            for each in [value, *parts] if any(parts) else [value]:
                if not name.startswith("__") or isinstance(each, FunctionType):
                    self._add((*route, name), kind, name, each)

    def _add_function(self, route: tuple[str, ...], function: FunctionType) -> None:
        if is_from_library(function):
            return
        cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
        for name, cell in cells:
            with suppress(ValueError):  # nothing has been assigned to it
                self._add((*route, name), cell, "cell_contents", cell.cell_contents)
        for place, value in enumerate([*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]):
            self._add((*route, f"default {place}"), None, place, value)
        for name, value in vars(function).items():
            self._add((*route, f".{name}"), vars(function), name, value)
        read = _names_in(function.__code__)
        for name in read & function.__globals__.keys():
            value = function.__globals__[name]
            self._add((name,), function.__globals__, name, value)
            if isinstance(value, ModuleType) and not is_library(value):
                for inner in read & vars(value).keys():
                    self._add((name, inner), vars(value), inner, vars(value)[inner])


_MODULE_ATTRIBUTES = frozenset(vars(nn.Module()))
_PARKED = "_tensor_constant"  # where torch.fx's tracer puts what a forward makes


def _assign(owner: Any, key: Any, value: Any) -> None:
    if isinstance(owner, dict | list | deque):
        owner[key] = value
    else:
        setattr(owner, key, value)


def _held(owner: Any, key: Any) -> Any:
    if isinstance(owner, dict):
        return owner.get(key)
    if isinstance(owner, list | deque):
        return owner[key] if key < len(owner) else None
    return getattr(owner, key, None)


def _items(container: Any) -> list[Any]:
    return [each for pair in container.items() for each in pair] if isinstance(container, dict) else list(container)


def _content(tensor: Tensor) -> Any:
    """Small tensors by value: one that is made anew each time is the same."""
    if tensor.is_meta or tensor.numel() > _SMALL or tensor.layout is not torch.strided:
        return id(tensor), None if tensor.is_inference() else tensor._version
    return tensor.dtype, tensor.detach().cpu().tolist()


_SMALL = 4096


def _position(value: Any) -> Any:
    """How far an iterator or a generator of random numbers has come."""
    if isinstance(value, count):
        return repr(value)
    if isinstance(value, Random):
        return value.getstate()
    if isinstance(value, np.random.Generator):
        return repr(value.bit_generator.state)
    if isinstance(value, torch.Generator):
        return value.get_state().tolist()
    if isinstance(value, GeneratorType):
        local = getattr(value.gi_frame, "f_locals", {})
        return [each for each in local.values() if isinstance(each, int | float | str)]
    if isinstance(value, np.ndarray):
        return value.tobytes() if value.nbytes <= _SMALL else None
    return length_hint(value, -1) if isinstance(value, Iterator) else None


def _names_of(slots: Any) -> tuple[str, ...]:
    return (slots,) if isinstance(slots, str) else tuple(slots)


@cache
def _names_in(code: CodeType) -> frozenset[str]:
    """The names of globals and attributes in `code` and what is nested in it."""
    nested = [_names_in(each) for each in code.co_consts if isinstance(each, CodeType)]
    return frozenset(code.co_names).union(*nested)
