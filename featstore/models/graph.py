"""A module's own graph: traced in eval and train mode, cut where one value alone crosses, split into stages.

A *cut point* is a place in the order of operations that exactly one value crosses. It is named by the path of the
operation that makes the value, as torchvision's ``create_feature_extractor`` names nodes: ``layer4.1.relu_1``, or by
any module whose last operation it is: ``layer4.1``, ``layer4``.
"""

from __future__ import annotations

import inspect
import operator
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from types import MethodType
from typing import Any

import torch
from torch import Tensor, fx, nn

from featstore.errors import ModelError
from featstore.models.adapters import check_one_input
from featstore.models.tracing import Trace, is_library_class, is_library_leaf, traced


@dataclass(frozen=True, kw_only=True)
class GraphStage:
    """The operations between two neighbouring cut points, as graphs that share the traced module's parameters.

    `train` is None where both modes run the same operations (dropout and batch-norm modules switch by themselves).
    """

    name: str
    aliases: tuple[str, ...]
    eval: fx.GraphModule
    train: fx.GraphModule | None


def split_into_stages(
    module: nn.Module, *, containers: Collection[str] = ()
) -> tuple[list[GraphStage], tuple[str, ...]]:
    """The stages of `module` in order, one per cut point, together computing exactly what `module` computes.

    Each parameter and buffer is used in exactly one stage: between two uses of one tensor there is no cut. The module
    is left as it was; the stages hold its leaf modules, not copies. What can't be traced, and any module with a method
    ``fingerprint``, stays whole. What alone makes further outputs in train mode (an auxiliary classifier) belongs to no
    stage; the second result names its modules.

    Args:
        module: takes one float tensor ``(N, C, H, W)`` and returns one tensor, in train mode maybe others with it.
        containers: module paths that are too coarse to name a cut (a backbone's ``features``, ``encoder``).

    Raises:
        ModelError: what can't be traced (named), or what doesn't return one tensor.
    """
    refuse_patched(module, is_traced=True)
    check_one_input(module)
    evaluated, opaque = traced(module, training=False, opaque=frozenset())
    main = evaluated.paths[evaluated.output]
    trained, opaque_in_training = traced(module, training=True, opaque=opaque, main=main)
    if opaque_in_training != opaque:  # what can't be traced in one mode is opaque in both, so that the stages agree
        evaluated, _ = traced(module, training=False, opaque=opaque_in_training)
    cuts = _cuts(evaluated, trained)
    names = _names(evaluated, [in_eval.path for in_eval, _ in cuts], containers)
    stages, before = [], (_START, _START)
    for in_eval, in_train in cuts:
        name, aliases = names[in_eval.path]
        graph, graph_in_training = _subgraph(evaluated, before[0], in_eval), _subgraph(trained, before[1], in_train)
        stage = _as_module(evaluated, graph)
        same = _is_same(_form(graph, evaluated), _form(graph_in_training, trained))
        in_training = None if same else _as_module(trained, graph_in_training)
        stages.append(GraphStage(name=name, aliases=aliases, eval=stage, train=in_training))
        before = (in_eval, in_train)
    return stages, trained.auxiliaries


def refuse_patched(module: nn.Module, *, is_traced: bool = False) -> None:
    """Raises ModelError for what runs beside a module's class: forward hooks, a patched forward, a parametrization.

    No key could see what such code computes. A forward that is another method of the module's own is no patch where
    the module is traced: a graph holds what runs. Of a module that stays whole the class's forward is keyed.
    """
    if nn.modules.module._global_forward_hooks or nn.modules.module._global_forward_pre_hooks:
        raise ModelError(
            "A forward hook is registered for all modules (torch.nn.modules.module.register_module_forward_hook), "
            "whose effect no key can see. Remove it."
        )
    for path, part in module.named_modules():
        where = f"{path or 'the model'} ({type(part).__name__})"
        if part._forward_hooks or part._forward_pre_hooks:
            raise ModelError(_on_a_hook(part, path, where))
        if isinstance(getattr(part, "_orig_mod", None), nn.Module):
            raise ModelError(
                f"{where} is compiled by torch.compile, and what that runs no key can see. Hand over the module that "
                f"was compiled: {f'put the _orig_mod of {path} in its place' if path else 'net._orig_mod'}."
            )
        if getattr(part, "_compiled_call_impl", None) is not None:
            call = ".".join(filter(None, ["net", path, "compile()"]))
            raise ModelError(
                f"{where} was compiled in place ({call}), and what that runs no key can see. Hand over the network as "
                "it was before, or copy.deepcopy(net), which isn't compiled."
            )
        if isinstance(part, torch.jit.ScriptModule):
            raise ModelError(
                f"{where} is a TorchScript module, whose code no key can see. Hand over the nn.Module it was made from."
            )
        if patched := _patched_method(part, is_traced=is_traced):
            raise ModelError(
                f"{where} has a {patched} that was assigned to the instance, which no key can see. Write a subclass "
                f"with that {patched}."
            )
        if other := _outdated_setting(part):
            raise ModelError(
                f"{where} runs with another {other} than it says: the setting was changed after the layer was made, "
                "and what was derived from it wasn't. Make the layer anew with the setting it should have."
            )
        if nn.utils.parametrize.is_parametrized(part):
            raise ModelError(
                f"{where} is parametrized: it makes a tensor anew each time it runs. Bake in what is made, in eval "
                "mode:\n"
                "    net.eval()\n"
                "    for part in list(net.modules()):\n"
                "        for name in list(getattr(part, 'parametrizations', ())):\n"
                "            torch.nn.utils.parametrize.remove_parametrizations(part, name)"
            )


def _on_a_hook(part: nn.Module, path: str, where: str) -> str:
    """Why a hook is refused, with the call that bakes in what one of torch's own makes."""
    hooks = [*part._forward_pre_hooks.values(), *part._forward_hooks.values()]
    for hook in hooks:
        name = getattr(hook, "name", None) or getattr(hook, "_tensor_name", None)
        for kind, remove in _BAKED_BY.items():
            if any(f"{each.__module__}.{each.__name__}" == kind for each in type(hook).__mro__):
                net = f"net.get_submodule({path!r})" if path else "net"
                return (
                    f"{where} makes its {name} anew each time it runs, by a hook ({type(hook).__name__}). Bake in what "
                    f"is made, in eval mode:\n    net.eval(); torch.nn.utils.{remove}({net}, {name!r})"
                )
    if any(str(getattr(hook, "__module__", "")).startswith("torch.export") for hook in hooks):
        return f"{where} is of an exported program. Hand over the nn.Module it was exported from."
    return (
        f"{where} has a forward hook, whose effect no key can see. Remove the hook, or write what it does into the "
        "forward of a module."
    )


_BAKED_BY = {
    "torch.nn.utils.weight_norm.WeightNorm": "remove_weight_norm",
    "torch.nn.utils.spectral_norm.SpectralNorm": "remove_spectral_norm",
    "torch.nn.utils.prune.BasePruningMethod": "prune.remove",
}
"""Hooks of torch's own that make a tensor -> what bakes it in."""


def _patched_method(part: nn.Module, *, is_traced: bool) -> str | None:
    """The name of a method that runs a layer, or that torch's own layer has, and that the instance replaces.

    A method of a person's own class is no matter: what it does is traced, or is a setting of a whole module.
    """
    for name in vars(part):
        if name in _MODULE_ATTRIBUTES or (is_traced and name == "forward" and _is_own_method(part, vars(part)[name])):
            continue
        home = next((kind for kind in type(part).__mro__ if name in vars(kind)), None)
        if name == "forward" or (home is nn.Module and name in _RUNNING):
            return str(name)
        if (
            home is not None
            and home is not nn.Module
            and is_library_class(home)
            and inspect.isroutine(vars(home)[name])
        ):
            return str(name)
    return None


def _is_own_method(part: nn.Module, method: Any) -> bool:
    """Whether `method` is `part`'s, and as its class has it; torch's own classes stand for their forward."""
    is_bound = isinstance(method, MethodType) and method.__self__ is part
    return (
        is_bound and getattr(type(part), method.__name__, None) is method.__func__ and not is_library_class(type(part))
    )


_MODULE_ATTRIBUTES = frozenset(vars(nn.Module()))
_RUNNING = {
    "_call_impl", "_wrapped_call_impl", "_slow_forward", "modules", "named_modules", "_named_members", "parameters",
    "named_parameters", "buffers", "named_buffers", "children", "named_children", "get_submodule",
}  # fmt: skip
"""Of what every module has: what runs it or says what it consists of. `train` may be patched, as a frozen part's is."""


def _outdated_setting(part: nn.Module) -> str | None:
    """The setting of one of torch's own layers that what it derived from it doesn't agree with."""
    if not is_library_class(type(part)):
        return None  # a person's own is keyed by all that it holds
    if isinstance(part, nn.modules.conv._ConvNd) and not part.transposed and part.padding_mode != "zeros":
        kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(part.kernel_size) - 1]
        size, padding, dilation = (tuple(part.kernel_size), part.padding, tuple(part.dilation))
        made = kind(1, 1, size, padding=padding, dilation=dilation, padding_mode=part.padding_mode, device="meta")  # type: ignore[arg-type]
        if list(made._reversed_padding_repeated_twice) != list(part._reversed_padding_repeated_twice):
            return "padding"
    if isinstance(part, nn.MultiheadAttention):
        is_same = part.kdim == part.embed_dim and part.vdim == part.embed_dim
        return None if part._qkv_same_embed_dim == is_same else "kdim or vdim"
    if isinstance(part, nn.RNNBase):
        held = [getattr(part, name, None) for name in part._flat_weights_names]
        if any(one is not other for one, other in zip(held, part._flat_weights, strict=True)):
            return "weight"
    return None


def may_write(stage: fx.GraphModule) -> bool:
    """Whether an operation of `stage` may write into one of its operands, and so, through views, into its input."""
    return any(is_in_place(node, stage) for node in stage.graph.nodes)


def is_in_place(node: fx.Node, root: nn.Module) -> bool:
    """Whether `node` may write into one of its operands."""
    if node.op == "call_module":
        leaf = root.get_submodule(str(node.target))
        return not is_library_leaf(leaf) or any(getattr(part, "inplace", False) for part in leaf.modules())
    if node.op == "call_method":
        name = str(node.target)
        return (name.endswith("_") and not name.endswith("__")) or name in {"__setitem__", "__iadd__", "__imul__"}
    if node.op == "call_function":
        assert callable(node.target)
        name = getattr(node.target, "__name__", "")
        in_place_operator = getattr(operator, name, None) is node.target and name in _IN_PLACE_OPERATORS
        position = _inplace_position(node.target)
        by_position = position is not None and len(node.args) > position and bool(node.args[position])
        return (
            in_place_operator
            or name.endswith("_")
            or bool(node.kwargs.get("inplace"))
            or by_position
            or "out" in node.kwargs
        )
    return False


_IN_PLACE_OPERATORS = {
    "iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul", "iand", "ior", "ixor", "ilshift",
    "irshift", "setitem", "delitem",
}  # fmt: skip


@lru_cache(maxsize=1024)  # reading a signature takes longer than all else that is asked of an operation
def _inplace_position(function: Callable[..., Any]) -> int | None:
    try:
        names = list(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # a C function
        return None
    return names.index("inplace") if "inplace" in names else None


@dataclass(frozen=True, kw_only=True)
class _Cut:
    path: str
    value: fx.Node | None  # None: the input
    end: int  # position of the last operation before the cut


_START = _Cut(path="", value=None, end=0)


def _cuts(evaluated: Trace, trained: Trace) -> list[tuple[_Cut, _Cut]]:
    """The cut points that both modes have, in order, each as it lies in either trace; the output is the last."""
    in_eval, in_train = _crossings(evaluated), _crossings(trained)
    uses, uses_in_training = (
        Counter(trace.plain_paths[node] for node in trace.nodes) for trace in (evaluated, trained)
    )
    # An equal path means the same operation only where both modes run it equally often: with noise that is added in
    # train mode alone, the first `add` of one mode is the second of the other.
    shared = [
        path
        for path, cut in in_eval.items()
        if path in in_train
        and uses[evaluated.plain_paths[cut.value]] == uses_in_training[evaluated.plain_paths[cut.value]]  # type: ignore[index]
    ]
    ordered = [
        path
        for path in shared
        if all(
            (in_eval[path].end < in_eval[other].end) == (in_train[path].end < in_train[other].end) for other in shared
        )
    ]
    cuts = [(in_eval[path], in_train[path]) for path in ordered]
    open_cuts = [cut for cut, is_open in zip(cuts, _are_open(evaluated, trained, cuts), strict=True) if is_open]
    return [*open_cuts, (_end(evaluated), _end(trained))]


def _crossings(trace: Trace) -> dict[str, _Cut]:
    """Path -> cut, for each value before the output that at some position crosses alone, in order."""
    place = {node: index for index, node in enumerate(trace.nodes)}
    last_use = {node: max((place[user] for user in node.users if user in place), default=-1) for node in trace.nodes}
    last_use[trace.output] = len(place)
    cuts: dict[str, _Cut] = {}
    alive: set[fx.Node] = set()
    for index, node in enumerate(trace.nodes):
        alive = {value for value in (*alive, node) if last_use[value] > index}
        (crossing,) = alive if len(alive) == 1 else (None,)
        if crossing is None or crossing.op == "placeholder" or crossing is trace.output or _is_unpacked(crossing):
            continue
        path = trace.paths[crossing]
        cuts.setdefault(path, _Cut(path=path, value=crossing, end=index))
    return cuts


def _end(trace: Trace) -> _Cut:
    # What runs after the output has been computed (a counter, say) belongs to the last stage.
    return _Cut(path=trace.paths[trace.output], value=trace.output, end=len(trace.nodes) - 1)


def _are_open(evaluated: Trace, trained: Trace, cuts: list[tuple[_Cut, _Cut]]) -> list[bool]:
    """For each cut whether no tensor is used on both sides of it, in whichever mode."""
    stages_of: dict[int, set[int]] = {}
    for mode, trace in enumerate((evaluated, trained)):
        ends = [cut[mode].end for cut in cuts]
        modules = dict(trace.root.named_modules(remove_duplicate=False))
        for position, node in enumerate(trace.nodes):
            for tensor in _tensors_used(trace, node, modules):
                stages_of.setdefault(id(tensor), set()).add(bisect_left(ends, position))
    spans = [(min(stages), max(stages)) for stages in stages_of.values()]
    return [not any(first <= index < last for first, last in spans) for index in range(len(cuts))]


def _tensors_used(trace: Trace, node: fx.Node, modules: Mapping[str, nn.Module]) -> Iterator[Tensor]:
    if node.op == "call_module":
        leaf = modules[str(node.target)]
        yield from leaf.parameters()
        yield from leaf.buffers()
    for operand in node.all_input_nodes:
        if operand.op == "get_attr" and str(operand.target) not in trace.constants:
            yield operator.attrgetter(str(operand.target))(trace.root)


def _is_unpacked(node: fx.Node) -> bool:
    """Whether the value is a tuple, a dict or an object that its users only take apart (`chunk`, `max`, ...)."""
    return bool(node.users) and all(
        (user.target is operator.getitem and isinstance(user.args[1], int | str) and user.args[0] is node)
        or user.target is getattr
        for user in node.users
    )


def _names(trace: Trace, cuts: Sequence[str], containers: Collection[str]) -> dict[str, tuple[str, tuple[str, ...]]]:
    """For each cut's path: its name (the coarsest allowed), and all its other names."""
    last: dict[str, str] = {}  # module path -> path of the last operation in it
    for node in trace.nodes:
        if node.op != "placeholder":
            path = trace.paths[node]
            for prefix in _prefixes(path):
                last[prefix] = path
    by_path: dict[str, list[str]] = {path: [path] for path in cuts}
    for prefix, path in last.items():
        if path in by_path and prefix not in by_path:
            by_path[path].append(prefix)
    also = _other_paths(trace.root)
    uses = Counter(trace.plain_paths[node] for node in trace.nodes)
    names = {}
    for path, known in by_path.items():
        known.sort(key=lambda name: (name in containers, name.count("."), len(name)))
        if uses[path] == 1:  # of a module that runs twice, each of its names may mean either value
            known += [other for name in known for other in also.get(name, ()) if other not in by_path]
        names[path] = (known[0], tuple(known[1:]))
    return names


def _other_paths(root: nn.Module) -> dict[str, list[str]]:
    """Path of a module -> its further paths, where it is registered under several."""
    paths: dict[nn.Module, list[str]] = {}
    for path, part in root.named_modules(remove_duplicate=False):
        paths.setdefault(part, []).append(path)
    return {first: others for first, *others in paths.values() if others}


def _prefixes(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[:length]) for length in range(1, len(parts))]


def _subgraph(trace: Trace, before: _Cut, cut: _Cut) -> fx.Graph:
    """The operations after one cut up to another, with one input."""
    graph = fx.Graph()
    copies = {before.value or trace.nodes[0]: graph.placeholder("input")}

    def copied(operand: fx.Node) -> fx.Node:
        if operand.op == "get_attr" and operand not in copies:
            copies[operand] = graph.node_copy(operand)
        return copies[operand]

    for node in trace.nodes[before.end + 1 : cut.end + 1]:
        copies[node] = graph.node_copy(node, copied)
    assert cut.value is not None
    graph.output(copies[cut.value])
    return graph


def _as_module(trace: Trace, graph: fx.Graph) -> fx.GraphModule:
    with _constants_on(trace):
        stage = fx.GraphModule(trace.root, graph, class_name="StageGraph")
    stage.graph.lint()
    return stage


@contextmanager
def _constants_on(trace: Trace) -> Iterator[None]:
    for name, value in trace.constants.items():
        setattr(trace.root, name, value)
    try:
        yield
    finally:
        for name in trace.constants:
            delattr(trace.root, name)


_Form = tuple[list[Any], list[Tensor]]


def _is_same(one: _Form, other: _Form) -> bool:
    """Whether two graphs of one module run the same operations with the same constants."""
    forms, tensors = zip(one, other, strict=True)
    return forms[0] == forms[1] and all(
        mine is yours or (mine.dtype == yours.dtype and not mine.is_meta and torch.equal(mine, yours))
        for mine, yours in zip(*tensors, strict=True)
    )


def _form(graph: fx.Graph, trace: Trace) -> _Form:
    """The operations of `graph` with places for names, and the tensors it takes from attributes."""
    places: dict[fx.Node, str] = {}
    form, tensors = [], []
    for node in graph.nodes:
        places[node] = f"%{len(places)}"
        target = node.target
        if node.op == "get_attr":
            name = str(target)
            tensors.append(trace.constants[name] if name in trace.constants else operator.attrgetter(name)(trace.root))
            target = "tensor"
        form.append((node.op, target, fx.node.map_arg((node.args, node.kwargs), places.__getitem__)))
    return form, tensors
