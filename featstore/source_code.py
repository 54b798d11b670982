"""Python code as a fact: its source without comments and layout, and the values that it reads from outside itself."""

from __future__ import annotations
import __future__

import ast
import dis
import importlib.util
import inspect
import logging
import os
import site
import sys
import sysconfig
import textwrap
from collections.abc import Iterator
from enum import Enum
from functools import cache, reduce
from importlib import metadata
from importlib.machinery import SourceFileLoader
from operator import or_
from pathlib import Path
from types import BuiltinFunctionType, CodeType, FunctionType, GetSetDescriptorType, MemberDescriptorType, ModuleType
from typing import Any
from weakref import WeakKeyDictionary

from featstore.digest import Json, canonical_json, digest_bytes, digest_tensor
from featstore.errors import ModelError

_sources: WeakKeyDictionary[ModuleType, tuple[object, Path, str]] = WeakKeyDictionary()
"""Spec (a reload makes a new one), file and text of each own module as first seen: what runs, also once it's edited."""


class OutdatedCodeError(ValueError):
    """Code that runs isn't what its file holds, as after an edit."""


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
    so are file names. A module's text is read once a process: the code that runs doesn't change with its file. Nor is
    anything here of a class from a notebook, whose functions are keyed one by one, from their cells.

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


def function_facts(function: FunctionType) -> Json:
    """The function's source and every value it takes from outside its arguments, as they are now.

    Values are followed through closures, defaults, attributes, globals, and what the code reads of own modules and
    classes. Of libraries the names alone are facts, not their versions, which would make each upgrade another key.

    Raises:
        TypeError: for a value of which no key can be made.
        ValueError: for a function whose source can't be found, or is no longer what was imported.
        ModelError: for a class whose source can't be found.
    """
    return _function_facts(function, [])


def class_facts(*classes: type) -> Json:
    """Attributes of own classes and of their own bases, and what their methods read from outside, as they are now.

    For classes of objects that are there already: what ``__init__`` reads is in the objects. Errors as of
    `function_facts`.
    """
    seen: list[object] = []
    return [_class_facts(kind, seen, is_made=True) for kind in classes if not is_from_library(kind)]


def library_code(*classes: type) -> list[str]:
    """Digests of the normalised code that classes of installed packages run: methods, and what these call; sorted.

    Functions are followed within their package. Left out are ``__init__``, whose work is in the objects, annotations,
    and Python's, torch's and torchvision's own classes, whose names stand for them. Code is reached in more ways than
    can be followed (properties, other classes, attributes of modules, constants), so the releases of the packages that
    `classes` themselves are from come with it.
    """
    functions = [
        each
        for kind in dict.fromkeys(base for kind in classes for base in kind.__mro__)
        if is_from_library(kind) and _package(kind) not in _NAMED
        for name, each in vars(kind).items()
        if isinstance(each, FunctionType) and name != "__init__"
    ]
    found: dict[FunctionType, str] = {}
    while functions:
        function = functions.pop()
        if function not in found:
            found[function] = _library_digest(function)
            called = [function.__globals__.get(name) for code in all_codes(function.__code__) for name in code.co_names]
            functions += [
                each for each in called if isinstance(each, FunctionType) and _package(each) == _package(function)
            ]
    foreign = [kind for kind in classes if is_from_library(kind) and _package(kind) not in _NAMED]
    packages = {_package(base) for kind in foreign for base in kind.__mro__} - _NAMED - _OURS
    return sorted({*found.values(), *(_release(package) for package in packages)})


_OURS = {"featstore", "training"}
_NAMED = {*sys.stdlib_module_names, "torch", "torchvision"}


def _package(value: FunctionType | type) -> str:
    return value.__module__.partition(".")[0]


@cache
def _release(package: str) -> str:
    """Name and version of an installed package; a digest of its files where nothing says its version."""
    distributions = sorted(set(metadata.packages_distributions().get(package, [])))
    if distributions:
        return ", ".join(f"{each} {metadata.version(each)}" for each in distributions)
    module = sys.modules[package]
    files = [file for folder in getattr(module, "__path__", []) for file in sorted(Path(folder).rglob("*.py"))]
    if not files and module.__file__ is not None:
        files = [Path(module.__file__)]
    return digest_bytes(b"".join(bytes.fromhex(digest_bytes(file.read_bytes())) for file in files))


@cache
def _library_digest(function: FunctionType) -> str:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, SyntaxError):  # compiled by a decorator, or a package without its source
        return digest_bytes(f"{function.__module__}.{function.__qualname__}".encode())
    for node in ast.walk(tree):
        if isinstance(node, ast.arg):
            node.annotation = None
        elif isinstance(node, ast.FunctionDef):
            node.returns = None
    return digest_bytes(normalised_source(ast.unparse(tree)).encode("utf-8"))


def _function_facts(function: FunctionType, seen: list[object], *, is_method: bool = False) -> Json:
    if function in seen:
        return {"seen": seen.index(function)}
    seen.append(function)
    wrapped = vars(function).get("__wrapped__")
    home = sys.modules.get(str(function.__globals__.get("__name__")))
    if wrapped is not None and home is not None and is_library(home):  # @torch.no_grad(), @functools.wraps of one
        return {"decorator": function.__code__.co_name, "wrapped": _value_facts("__wrapped__", wrapped, set(), seen)}
    code = function.__code__
    names, attributes = _names(code, "LOAD_GLOBAL", "LOAD_NAME"), set(_names(code, *_ATTRIBUTE_READS))
    taken: dict[str, dict[Any, Any]] = {
        "defaults": dict(enumerate(function.__defaults__ or ())),
        "keyword defaults": function.__kwdefaults__ or {},
        "closure": dict(closure_of(function)),
        "globals": {name: function.__globals__[name] for name in names if name in function.__globals__},
        "imports": {name: sys.modules[name] for name in _names(code, "IMPORT_NAME") if name in sys.modules},
        "attributes": vars(function),
    }
    facts = {
        kind: {str(name): _value_facts(str(name), value, attributes, seen) for name, value in values.items()}
        for kind, values in taken.items()
    }
    if is_method and _is_in_its_module(function):  # a class has its file's source
        return facts
    return {"source": _function_source(function), **facts}


def closure_of(function: FunctionType) -> Iterator[tuple[str, Any]]:
    """The names that a function takes from around it, with what they hold; without those that hold nothing yet."""
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield name, cell.cell_contents
        except ValueError:  # nothing has been assigned to it
            continue


def _class_facts(kind: type, seen: list[object], *, is_made: bool = False) -> Json:
    if kind in seen:
        return {"seen": seen.index(kind)}
    seen.append(kind)
    facts = {"class": kind.__qualname__, "module": source_digests(kind)}
    if issubclass(kind, Enum) or hasattr(kind, "_field_defaults"):  # the members of neither can be assigned
        return facts
    attributes = {
        name: _attribute_facts(kind, name, value, seen)
        for name, value in sorted(vars(kind).items())
        if not _is_made_by_python(name, value) and not (is_made and name == "__init__")
    }
    bases = [_class_facts(base, seen, is_made=is_made) for base in kind.__bases__ if not is_from_library(base)]
    return {**facts, "attributes": attributes, "bases": bases}


def _is_made_by_python(name: str, value: Any) -> bool:
    """Whether a class attribute follows from the source: annotations, slots, a dataclass's ``__init__``."""
    if isinstance(value, MemberDescriptorType | GetSetDescriptorType) or name == "_abc_impl":
        return True
    is_special = name.startswith("__") and name.endswith("__")
    return is_special and (
        not isinstance(value, FunctionType) or inspect.unwrap(value).__code__.co_filename == "<string>"
    )


def _attribute_facts(kind: type, name: str, value: Any, seen: list[object]) -> Json:
    if isinstance(value, property):
        return [_attribute_facts(kind, name, each, seen) for each in (value.fget, value.fset, value.fdel)]
    if isinstance(value, staticmethod | classmethod):
        value = value.__func__
    own = (kind.__module__, f"{kind.__qualname__}.{name}")
    if isinstance(value, FunctionType) and (value.__module__, value.__qualname__) == own and "<locals>" not in own[1]:
        return _function_facts(value, seen, is_method=True)
    return _value_facts(name, value, set(), seen)


def _value_facts(name: str, value: Any, attributes: set[str], seen: list[object]) -> Json:
    """The facts of a value of code that reads `attributes`, of whatever object."""
    if isinstance(value, ModuleType):
        return _module_facts(value, attributes, seen)
    if isinstance(value, FunctionType | type) and is_from_library(value):
        return {"library": [value.__module__, value.__qualname__, value.__name__]}
    if isinstance(value, FunctionType):
        return _function_facts(value, seen)
    if isinstance(value, type):
        return _class_facts(value, seen)
    if isinstance(value, BuiltinFunctionType) and isinstance(value.__self__, ModuleType | type | None):
        return {"library": value.__qualname__}  # compiled, and bound to no object that could hold state
    if isinstance(value, logging.Logger):
        return {"logger": value.name}
    if isinstance(value, Enum):
        return {"member": value.name, "of": _value_facts(name, type(value), attributes, seen)}
    if isinstance(value, list | tuple):
        return {"items": [_value_facts(name, item, attributes, seen) for item in value]}
    if isinstance(value, dict):
        return {"mapping": [[_value_facts(name, part, attributes, seen) for part in pair] for pair in value.items()]}
    return _plain_facts(name, value)


def _plain_facts(name: str, value: Any) -> Json:
    import torch

    try:
        if type(value) in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer):  # others may compute something else
            return {"tensor": digest_tensor(value)}
        if isinstance(value, torch.dtype | torch.device | torch.memory_format):
            return {"torch": str(value)}
        if isinstance(value, float):
            return {"float": value.hex()}  # infinity as well
        canonical_json(value)
    except TypeError as error:
        raise TypeError(f"it uses {name}, a {type(value).__name__}, of which no key can be made") from error
    return {"value": value}


def _module_facts(module: ModuleType, attributes: set[str], seen: list[object]) -> Json:
    if is_library(module):
        return {"library": module.__name__}
    facts: dict[str, Json] = {}
    for name in sorted(attributes & vars(module).keys()):
        place = (module.__name__, name, tuple(sorted(attributes)))  # modules may hold each other
        if place in seen:
            facts[name] = {"seen": seen.index(place)}
        else:
            seen.append(place)
            facts[name] = _value_facts(name, vars(module)[name], attributes, seen)
    return {"module": source_digests(module), "values": facts}


def is_at_its_name(value: Any, name: str | None = None) -> bool:
    """Whether the module that a function or class says it is from has that very object under its name, or `name`.

    A name can be claimed: by `functools.wraps`, by a TorchScript function, by a method, by a class made by `type`.
    """
    found: Any = sys.modules.get(str(getattr(value, "__module__", None)))
    for part in (name or getattr(value, "__qualname__", value.__name__)).split("."):
        found = getattr(found, part, None)
    return found is value


def is_from_library(value: FunctionType | type) -> bool:
    """Whether the name of a function or class stands for it: it is a library's, and not only by what it claims."""
    module = sys.modules.get(value.__module__)
    if module is None or not is_library(module):
        return False
    if isinstance(value, type):
        return not value.__flags__ & _IS_MUTABLE or is_at_its_name(value)
    is_named = value.__closure__ is None or is_at_its_name(value) or is_at_its_name(value, value.__name__)
    return is_named and _runs_library_code(value)


_IS_MUTABLE = 1 << 9  # of a class: Python's Py_TPFLAGS_HEAPTYPE; C types without it are what they say


def _runs_library_code(function: FunctionType) -> bool:
    home = sys.modules.get(str(function.__globals__.get("__name__")))
    if home is None or not is_library(home):
        return False
    is_in_file = any(Path(function.__code__.co_filename).is_relative_to(folder) for folder in _library_folders())
    return vars(home) is function.__globals__ or is_in_file


_ATTRIBUTE_READS = ("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR", "IMPORT_FROM")


def _names(code: CodeType, *operations: str) -> list[str]:
    """The names that `code` and what is nested in it looks up by one of `operations`."""
    found = {each.argval for part in all_codes(code) for each in dis.Bytecode(part) if each.opname in operations}
    return sorted(found)


def all_codes(code: CodeType) -> Iterator[CodeType]:
    """`code` and all that is nested in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from all_codes(constant)


def _function_source(function: FunctionType) -> str:
    """The normalised source of the one function that compiles to the same code."""
    code = function.__code__
    text = _function_text(function)
    # What is keyed is what runs: a file that was edited after it was imported holds another function.
    features = code.co_flags & _FUTURE_FEATURES  # an earlier cell of a notebook may have imported them
    if code not in all_codes(compile(text, code.co_filename, "exec", features, dont_inherit=True)):
        raise OutdatedCodeError(
            f"{code.co_filename} is no longer what was imported from it (import it again, and make anew what was made "
            f"with {function.__qualname__})"
        )
    found = [
        node
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        and getattr(node, "name", "<lambda>") == code.co_name
        and min(each.lineno for each in [node, *getattr(node, "decorator_list", [])]) == code.co_firstlineno
    ]
    if len(found) != 1:
        raise ValueError(f"line {code.co_firstlineno} of its file has several functions of its name")
    return normalised_source(ast.unparse(found[0]))


_FUTURE_FEATURES = reduce(or_, (getattr(__future__, name).compiler_flag for name in __future__.all_feature_names))


def _is_in_its_module(function: FunctionType) -> bool:
    """Whether the text of the module that a method comes from is what it was compiled from, lines aside.

    It isn't for an object that was made before its file was edited and loaded again, nor for code that `exec` ran.
    """
    module = sys.modules.get(str(function.__globals__.get("__name__")))
    if module is None:
        return False
    if is_library(module):
        return _runs_library_code(function)
    if _is_typed(module):
        return False
    path, text = _source(module)
    if not _is_loaded_as_written(module):  # a hook has rewritten it, as pytest does
        return function.__code__.co_filename == str(path) and _is_in_its_class(function, module)
    return (function.__code__.co_qualname, _without_lines(function.__code__)) in _codes_of(text)


def _is_loaded_as_written(module: ModuleType) -> bool:
    loader = getattr(module, "__loader__", None)
    return loader is None or getattr(type(loader), "source_to_code", None) is SourceFileLoader.source_to_code


def _is_in_its_class(function: FunctionType, module: ModuleType) -> bool:
    """Whether the class that `module` has now has that very method."""
    kind: Any = module
    for part in function.__qualname__.split(".")[:-1]:
        kind = getattr(kind, part, None)
    held = list(vars(kind).values()) if isinstance(kind, type) else []
    parts = ("__func__", "fget", "fset", "fdel")
    return any(function is each or function in [getattr(each, part, None) for part in parts] for each in held)


@cache
def _codes_of(text: str) -> frozenset[tuple[str, CodeType]]:
    codes = all_codes(compile(text, "", "exec", dont_inherit=True))
    return frozenset((code.co_qualname, _without_lines(code)) for code in codes)


def _without_lines(code: CodeType) -> CodeType:
    constants = tuple(_without_lines(each) if isinstance(each, CodeType) else each for each in code.co_consts)
    return code.replace(co_firstlineno=1, co_linetable=b"", co_filename="", co_consts=constants)


def _function_text(function: FunctionType) -> str:
    """The text of the file that holds `function`: as first seen, so that editing it later doesn't matter."""
    module = sys.modules.get(str(function.__globals__.get("__name__")))
    path = getattr(module, "__file__", None)
    if module is not None and vars(module) is function.__globals__ and path == function.__code__.co_filename:
        return _source(module)[1]
    try:
        return "".join(inspect.findsource(function.__code__)[0])  # a notebook's cell
    except OSError as error:
        raise ValueError("its source can't be found") from error


def _own_sources(objects: tuple[type | ModuleType, ...]) -> dict[str, tuple[Path, str]]:
    """Name -> (file, text) of all own modules that can be reached."""
    found: dict[str, tuple[Path, str]] = {}
    pending: list[ModuleType | None] = []
    for item in objects:
        home = inspect.getmodule(item) or sys.modules.get(getattr(item, "__module__", ""))
        if isinstance(item, type) and home is not None and _is_typed(home):
            _check_typed(item)
        else:
            pending.append(home)
    while pending:
        module = pending.pop()
        if module is None or module.__name__ in found or is_library(module):
            continue
        found[module.__name__] = _source(module)
        pending += _reached_from(module, found[module.__name__][1])
    return found


def _is_typed(module: ModuleType) -> bool:
    """Whether a module is no file: a notebook, a prompt."""
    return getattr(module, "__file__", None) is None and not is_library(module)


def _check_typed(kind: type) -> None:
    """Raises ModelError where the text of a function of a class can't be found."""
    for value in vars(kind).values():
        for part in (value, *(getattr(value, name, None) for name in ("__func__", "fget", "fset", "fdel"))):
            if isinstance(part, FunctionType) and part.__module__ == kind.__module__:
                try:
                    _function_text(part)
                except ValueError as error:
                    raise ModelError(_without_source(kind.__module__)) from error


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
        raise ModelError(_without_source(module.__name__))
    return Path(path).resolve(), _read(Path(path))


def _without_source(name: str) -> str:
    return (
        f"The source of {name} can't be found, so no key can cover it. Put the code into a Python file, or give the "
        "class a method fingerprint() that returns a text which changes whenever its results do."
    )


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


def is_library(module: ModuleType) -> bool:
    """Whether a module is installed or the standard library's, not a person's own."""
    path = getattr(module, "__file__", None)
    if path is None:
        is_built_in = module.__name__.partition(".")[0] in sys.stdlib_module_names and module.__name__ != "__main__"
        return is_built_in or getattr(module, "__spec__", None) is not None  # a namespace package has no code
    return _is_in_library(os.path.abspath(path))


@cache
def _is_in_library(path: str) -> bool:
    return any(Path(path).resolve().is_relative_to(folder) for folder in _library_folders())


@cache
def _library_folders() -> tuple[Path, ...]:
    paths = sysconfig.get_paths()
    named = [paths[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    here = Path(__file__).resolve().parent
    ours = [here, here.parent / "training"]  # also where they are installed in place
    installed = [*named, *site.getsitepackages(), site.getusersitepackages()]
    return tuple({*ours, *(Path(folder).resolve() for folder in installed)})


@cache
def is_library_file(path: str) -> bool:
    """Whether a file, by its path or by the name that its code has, is a library's; one in a frozen module is."""
    if path.startswith("<"):
        return path.startswith("<frozen ")
    return _is_in_library(path)
