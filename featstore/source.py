"""Python source as a fact: normalised, so that comments and layout don't matter, and followed through own modules."""

from __future__ import annotations

import ast
import inspect
import site
import sys
import sysconfig
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from featstore.digest import digest_bytes
from featstore.errors import ModelError


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
    so are file names.

    Raises:
        ModelError: for an object whose source file can't be found (typed into a prompt, say).
    """
    found: dict[str, str] = {}
    pending = [inspect.getmodule(item) or sys.modules.get(getattr(item, "__module__", "")) for item in objects]
    while pending:
        module = pending.pop()
        if module is None or module.__name__ in found or _is_library(module):
            continue
        path = getattr(module, "__file__", None)
        if path is None or not Path(path).is_file():
            raise ModelError(
                f"The source of {module.__name__} can't be found, so no key can cover it. Put the code into a file, or "
                "give the class a method fingerprint() that returns a text which changes whenever its results do."
            )
        found[module.__name__] = digest_bytes(normalised_source(Path(path).read_text("utf-8")).encode("utf-8"))
        for value in vars(module).values():
            pending.append(value if isinstance(value, ModuleType) else sys.modules.get(_home(value)))
    return sorted(found.values())


def _home(value: Any) -> str:
    home = getattr(value, "__module__", None) if callable(value) else None
    return home if isinstance(home, str) else ""


def _is_library(module: ModuleType) -> bool:
    name = module.__name__.partition(".")[0]
    if name in sys.stdlib_module_names and name != "__main__":
        return True
    if name in {"featstore", "training"}:  # also where it is installed in place
        return True
    path = getattr(module, "__file__", None)
    if path is None:
        return getattr(module, "__spec__", None) is not None  # a namespace package has no code of its own
    return any(Path(path).resolve().is_relative_to(folder) for folder in _library_folders())


@cache
def _library_folders() -> tuple[Path, ...]:
    paths = sysconfig.get_paths()
    named = [paths[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    return tuple({Path(folder).resolve() for folder in [*named, *site.getsitepackages(), site.getusersitepackages()]})
