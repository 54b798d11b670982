"""The chained digest of operations: what a graph computes in eval mode, hashed operation by operation.

The digest after an operation covers all operations before it that its value depends on: their names, arguments,
constants, the configuration of leaf layers, and the bytes of each tensor they use. How the operations are grouped into
stages, what modules and attributes are called, where files lie and which device holds the tensors doesn't enter.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterator
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, fx, nn

from featstore.digest import Json, digest_json, digest_tensor
from featstore.errors import ModelError
from featstore.models.graph import is_in_place, refuse_patched, split_into_stages
from featstore.models.tracing import has_fingerprint, is_library_class, is_library_leaf
from featstore.source_code import (
    OutdatedCodeError,
    class_facts,
    is_at_its_name,
    is_from_library,
    library_code,
    source_digests,
)

START = digest_json(["featstore operations", 1])
"""The digest before the first operation. The number is raised when the meaning of a digest changes."""

ALLOWED_MODULES = ("torch", "torchvision.ops", "torchvision.models", "operator", "_operator", "math", "builtins")
"""Where the functions of a graph may come from: code that a name and the recorded probe can stand for."""

_LIBRARY_OPERATORS = ("torch._ops.aten", "torch._ops.prims", "torch._ops.torchvision")  # others are a person's own
_MODULE_ATTRIBUTES = frozenset(vars(nn.Module()))
_COUNTER = "num_batches_tracked"  # of torch's own norm layers, which read it in train mode only
_DROPOUTS = (
    nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout,
)  # fmt: skip


def chain(before: str, stage: fx.GraphModule) -> str:
    """The digest after `stage`, given the digest of everything before it.

    Chaining the stages of a model one by one gives the same digest as chaining it in one piece.

    Raises:
        ModelError: for what no key can cover: a forward hook, a function from outside `ALLOWED_MODULES`, a value
            without an exact JSON form, a module whose source can't be had.
    """
    refuse_patched(stage)
    needed = _needed(stage)
    places: dict[fx.Node, int] = {}
    place, digest = 0, before
    for node in stage.graph.nodes:
        if node.op == "placeholder":
            places[node] = 0
        elif node in needed and node.op not in {"get_attr", "output"}:
            source = _passed_through(node, stage)
            if source is not None:
                places[node] = places[source]
                continue
            place += 1
            places[node] = place
            digest = digest_json([digest, _operation(node, stage, places)])
        elif node.op == "output" and places[node.args[0]] != place:  # something that may write comes after it
            digest = digest_json([digest, ["output", place - places[node.args[0]]]])
    return digest


def module_digest(module: nn.Module) -> str:
    """The digest of what a whole `module` computes in eval mode, its tensors included.

    Raises:
        ModelError: for what can't be traced, or as in `chain`.
    """
    digest = START
    stages, _ = split_into_stages(module)
    for stage in stages:
        digest = chain(digest, stage.eval)
    return digest


def passes_through(stage: fx.GraphModule) -> bool:
    """Whether `stage` changes nothing in eval mode (dropout, identity): its output is its input."""
    *_, end = stage.graph.nodes
    node = end.args[0]
    while node is not None and node.op != "placeholder":
        node = _passed_through(node, stage)
    return node is not None


def _needed(stage: fx.GraphModule) -> set[fx.Node]:
    """The nodes that the output depends on, with those that may write into what it depends on."""
    *_, end = stage.graph.nodes
    pending = [end.args[0], *(node for node in stage.graph.nodes if is_in_place(node, stage))]
    needed: set[fx.Node] = set()
    while pending:
        node = pending.pop()
        if node not in needed:
            needed.add(node)
            pending.extend(node.all_input_nodes)
    return needed


def _passed_through(node: fx.Node, stage: fx.GraphModule) -> fx.Node | None:
    """The operand that `node` returns unchanged in eval mode, or None if it computes something."""
    if node.op == "call_module" and type(stage.get_submodule(str(node.target))) in _DROPOUTS:
        source = node.args[0] if node.args else None
    elif node.op == "call_function" and _is_switched_off(node):
        source = node.args[0] if node.args else node.kwargs.get("input")
    else:
        return None
    return source if isinstance(source, fx.Node) and source.op != "get_attr" else None


def _is_switched_off(node: fx.Node) -> bool:
    """Whether a call has a `training` argument that is False and is one of the dropout family."""
    assert callable(node.target)
    name = getattr(node.target, "__name__", "")
    is_dropout = "dropout" in name or name in {"stochastic_depth", "drop_block2d", "drop_block3d"}
    if not is_dropout or not _is_allowed(node.target):
        return False
    try:
        arguments = inspect.signature(node.target).bind(*node.args, **node.kwargs)
    except (TypeError, ValueError):
        return False
    arguments.apply_defaults()
    return arguments.arguments.get("training", arguments.arguments.get("train")) is False


def _operation(node: fx.Node, stage: fx.GraphModule, places: dict[fx.Node, int]) -> Json:
    def encoded(value: Any) -> Json:
        if isinstance(value, fx.Node):
            if value.op == "get_attr":
                return ["tensor", _tensor(operator.attrgetter(str(value.target))(stage), str(value.target))]
            return ["operation", places[node] - places[value]]
        return _constant(value, node.name, encoded)

    arguments = [encoded(node.args), encoded(dict(sorted(node.kwargs.items())))]
    if node.op == "call_module":
        leaf = stage.get_submodule(str(node.target))
        where = str(node.target)
        described = _leaf(leaf, where) if is_library_leaf(leaf) else _opaque(leaf, where)
        return ["module", described, *arguments]
    if node.op == "call_method":
        return ["method", str(node.target), *arguments]
    return ["function", _function_name(node.target, node.name), *arguments]


def _leaf(leaf: nn.Module, where: str) -> Json:
    """One of torch's own layers: class and configuration of it and its parts, and its tensors."""
    parts = {path: [type(part).__name__, _configuration(part, where)] for path, part in leaf.named_modules()}
    return [parts, dict(_tensors(leaf, where))]


def _opaque(module: nn.Module, where: str) -> Json:
    """A module that stays whole: its author's fingerprint, or source, what it reads, configuration; and its tensors."""
    if has_fingerprint(module):
        text = module.fingerprint()  # type: ignore[operator]
        if not isinstance(text, str):
            raise ModelError(f"{where}.fingerprint() returned a {type(text).__name__}; it must return a str.")
        return ["fingerprint", text, dict(_tensors(module, where))]
    parts = {
        path: [type(part).__qualname__, _configuration(part, f"{where}.{path}" if path else where)]
        for path, part in module.named_modules()
    }
    kinds = list(dict.fromkeys(type(part) for part in module.modules()))
    sources = source_digests(*{base for kind in kinds for base in kind.__mro__})
    try:
        values = class_facts(*kinds)
    except OutdatedCodeError as error:
        raise ModelError(f"{where} ({type(module).__name__}) can't be keyed: {error}.") from error
    except (TypeError, ValueError, SyntaxError) as error:
        raise ModelError(
            f"{where} ({type(module).__name__}) can't be keyed: {error}. Hand it to the module as a setting, or give "
            "the module a method fingerprint() that returns a text which changes whenever its results do."
        ) from error
    library = library_code(*kinds)
    return ["source", parts, sources, values, dict(_tensors(module, where)), *([library] if library else [])]


def _configuration(module: nn.Module, where: str) -> Json:
    """The settings of a module; of torch's own layers the public ones that evaluation reads."""
    if any(isinstance(value, torch.ScriptObject) for value in vars(module).values()):
        raise ModelError(
            f"{where} holds packed weights ({type(module).__name__}, a quantized layer), which no key can cover. Cut "
            "before it, or use the float model."
        )
    is_library = is_library_class(type(module))
    return {
        name: _constant(value, f"{where}.{name}")
        for name, value in sorted(vars(module).items())
        if name not in _MODULE_ATTRIBUTES
        and not isinstance(value, Tensor)
        and not (is_library and (name.startswith("_") or _is_ignored_in_eval(module, name)))
    }


def _is_ignored_in_eval(module: nn.Module, setting: str) -> bool:
    if isinstance(module, nn.modules.batchnorm._NormBase):
        return setting == "momentum" and module.track_running_stats
    return setting == "dropout" or (setting in {"p", "inplace"} and isinstance(module, _DROPOUTS))


def _tensors(module: nn.Module, where: str) -> Iterator[tuple[str, str]]:
    """Name -> digest of each parameter, buffer (also non-persistent) and plain tensor attribute below `module`."""
    for path, part in module.named_modules():
        plain = {name: value for name, value in vars(part).items() if isinstance(value, Tensor)}
        own = [*part.named_parameters(recurse=False), *part.named_buffers(recurse=False), *plain.items()]
        has_counter = isinstance(part, nn.modules.batchnorm._NormBase) and is_library_class(type(part))
        for name, tensor in own:
            if not (has_counter and name == _COUNTER):
                full = f"{path}.{name}" if path else name
                yield full, _tensor(tensor, f"{where}.{full}")


def _tensor(tensor: Any, where: str) -> str:
    if not isinstance(tensor, Tensor):
        raise ModelError(f"{where} is a {type(tensor).__name__}; only tensors can be used as values in a forward.")
    if type(tensor) not in (Tensor, nn.Parameter, nn.Buffer):
        raise ModelError(
            f"{where} is a {type(tensor).__module__}.{type(tensor).__qualname__}, a kind of tensor that may compute "
            "something else, which no key can see. Make a plain one of it: tensor.as_subclass(torch.Tensor)."
        )
    try:
        return digest_tensor(tensor)
    except TypeError as error:
        raise ModelError(f"{where} can't be keyed: {error}.") from error


def _constant(value: Any, where: str, nested: Callable[[Any], Json] | None = None) -> Json:
    """An exact JSON form of an argument or setting, with its kind where JSON would lose it."""
    nested = nested or (lambda item: _constant(item, where))
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return ["float", value.hex()]
    if isinstance(value, tuple | list | torch.Size | range):
        return ["sequence", [nested(item) for item in value]]
    if isinstance(value, dict):
        return ["mapping", [[nested(key), nested(item)] for key, item in value.items()]]
    if isinstance(value, slice):
        return ["slice", [nested(item) for item in (value.start, value.stop, value.step)]]
    if value is Ellipsis:
        return ["ellipsis"]
    if isinstance(value, torch.device):
        return ["device"]
    if isinstance(value, torch.dtype | torch.memory_format | torch.layout):
        return ["torch", str(value)]
    if isinstance(value, Tensor):
        return ["tensor", _tensor(value, where)]
    if callable(value) and not isinstance(value, nn.Module):
        return ["function", _function_name(value, where)]
    raise ModelError(
        f"{where} is a {type(value).__name__}, of which no exact key can be made. Use numbers, texts, tuples and "
        "tensors, or give the module a method fingerprint() that returns a text which changes whenever its results do."
    )


def _function_name(function: Any, where: str) -> str:
    name, home = getattr(function, "__name__", None), _home(function)
    if _is_allowed_home(home) and not _is_what_it_says(function):
        claimed = f"{home}.{name or type(function).__name__}"
        raise ModelError(
            f"{where} calls what is named {claimed} and isn't the function of that name (but a TorchScript function, a "
            "method of a layer, or what functools.wraps or another decorator made), so no key can cover it. Hold the "
            "layer itself as a submodule, write the operations into a forward, or move them into a module with a "
            "method fingerprint()."
        )
    if not _is_allowed(function) or name is None or "<" in name:
        raise ModelError(
            f"{where} calls {home or 'unknown'}.{name or function}, which is neither torch's, torchvision's nor "
            "plain Python's, so no key can cover it. Write it with torch's functions, or move it into a module with "
            "a method fingerprint()."
        )
    return f"{home}.{name}"


def _is_allowed(function: Any) -> bool:
    return _is_allowed_home(_home(function)) and _is_what_it_says(function)


def _is_what_it_says(function: Any) -> bool:
    """Whether a function with the name of a library's is that very one."""
    if isinstance(function, torch._ops.OpOverload | torch._ops.OpOverloadPacket):
        return True  # of the one namespace that `_is_allowed_home` lets through; it stands for a schema
    if getattr(function, "__module__", None) is None:
        return True  # `_home` found it by itself
    if isinstance(function, FunctionType) and not is_from_library(function):
        return False
    return is_at_its_name(function, getattr(function, "__name__", None) or type(function).__name__)


def _is_allowed_home(home: str | None) -> bool:
    if home is None or (home.startswith("torch._ops.") and home not in _LIBRARY_OPERATORS):
        return False
    return any(home == root or home.startswith(f"{root}.") for root in ALLOWED_MODULES)


def _home(function: Any) -> str | None:
    """The name of the module that `function` comes from."""
    home = getattr(function, "__module__", None)
    if home is not None:
        return str(home)
    # torch's C functions: torch.flatten, torch.nn.functional.gelu
    spaces = {"torch": torch, "torch.nn.functional": nn.functional, "torch._C._nn": torch._C._nn}
    name = getattr(function, "__name__", "")
    return next((space for space, module in spaces.items() if getattr(module, name, None) is function), None)
