"""Python source as a fact: normalised, so that comments and layout don't matter, and followed through own modules."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import site
import sys
import sysconfig
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any
from weakref import WeakKeyDictionary

from featstore.digest import digest_bytes
from featstore.errors import ModelError

_sources: WeakKeyDictionary[ModuleType, tuple[object, Path, str]] = WeakKeyDictionary()
"""Spec (a reload makes a new one), file and text of each own module as first seen: what runs, also once it's edited."""


def normalised_source(source: str) -> str:
    """Python source without comments, docstrings and layout: equal for texts that mean the same statements."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(
            node, clean=False
        ):
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree)


def source_digests(*objects: type | ModuleType) -> list[str]:
    """Digests of the normalised source of every module outside libraries that `objects` come from, sorted.

    Follows what those modules import from one another; the standard library and installed packages are left out, and
    so are file names. A module's text is read once a process: the code that runs doesn't change with its file.

    Raises:
        ModelError: for an object whose source file can't be found (typed into a prompt, compiled).
    """
    texts = [text for _, text in _own_sources(objects).values()]
    return sorted(digest_bytes(normalised_source(text).encode("utf-8")) for text in texts)


def outdated_sources(*objects: type | ModuleType) -> list[Path]:
    """Files of the modules that `source_digests` covers whose text has changed since they were first seen."""
    return [path for path, text in _own_sources(objects).values() if not path.is_file() or _read(path) != text]


def own_files(*objects: type | ModuleType) -> dict[str, Path]:
    """Name -> file of the modules that `source_digests` covers."""
    return {name: path for name, (path, _) in _own_sources(objects).items()}


def _own_sources(objects: tuple[type | ModuleType, ...]) -> dict[str, tuple[Path, str]]:
    """Name -> (file, text) of all own modules that can be reached."""
    found: dict[str, tuple[Path, str]] = {}
    pending = [inspect.getmodule(item) or sys.modules.get(getattr(item, "__module__", "")) for item in objects]
    while pending:
        module = pending.pop()
        if module is None or module.__name__ in found or _is_library(module):
            continue
        found[module.__name__] = _source(module)
        pending += _reached_from(module, found[module.__name__][1])
    return found


def _source(module: ModuleType) -> tuple[Path, str]:
    spec, path, text = _sources.get(module, (None, Path(), ""))
    if spec is not _spec(module):
        path, text = _read_source(module)
        _sources[module] = (_spec(module), path, text)
    return path, text


def _spec(module: ModuleType) -> object:
    return getattr(module, "__spec__", None) or "none"  # a script has none


def _read_source(module: ModuleType) -> tuple[Path, str]:
    path = getattr(module, "__file__", None)
    if path is None or Path(path).suffix != ".py" or not Path(path).is_file():
        raise ModelError(
            f"The source of {module.__name__} can't be found, so no key can cover it. Put the code into a Python file, "
            "or give the class a method fingerprint() that returns a text which changes whenever its results do."
        )
    return Path(path).resolve(), _read(Path(path))


def _read(path: Path) -> str:
    return importlib.util.decode_source(path.read_bytes())


def _reached_from(module: ModuleType, text: str) -> Iterator[ModuleType | None]:
    """The modules that `module` imports, and those where its names come from."""
    for value in vars(module).values():
        yield value if isinstance(value, ModuleType) else sys.modules.get(_home(value))
    for node in ast.walk(ast.parse(text)):  # a constant doesn't know its module, so the statements are read as well
        if isinstance(node, ast.Import):
            yield from (sys.modules.get(alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (module.__package__ or not node.level):
            base = importlib.util.resolve_name("." * node.level + (node.module or ""), module.__package__)
            yield sys.modules.get(base)
            yield from (sys.modules.get(f"{base}.{alias.name}") for alias in node.names)


def _home(value: Any) -> str:
    home = getattr(value, "__module__", None) if callable(value) else None
    return home if isinstance(home, str) else ""


def _is_library(module: ModuleType) -> bool:
    path = getattr(module, "__file__", None)
    if path is None:
        is_built_in = module.__name__.partition(".")[0] in sys.stdlib_module_names and module.__name__ != "__main__"
        return is_built_in or getattr(module, "__spec__", None) is not None  # a namespace package has no code
    return any(Path(path).resolve().is_relative_to(folder) for folder in _library_folders())


@cache
def _library_folders() -> tuple[Path, ...]:
    paths = sysconfig.get_paths()
    named = [paths[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    here = Path(__file__).resolve().parent
    ours = [here, here.parent / "training"]  # also where they are installed in place
    installed = [*named, *site.getsitepackages(), site.getusersitepackages()]
    return tuple({*ours, *(Path(folder).resolve() for folder in installed)})
