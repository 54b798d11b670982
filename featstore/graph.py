"""A module's own graph: traced in eval and train mode, cut where one value alone crosses, split into stages.

A *cut point* is a place in the order of operations that exactly one value crosses. It is named by the path of the
operation that makes the value, as torchvision's ``create_feature_extractor`` names nodes: ``layer4.1.relu_1``, or by
any module whose last operation it is: ``layer4.1``, ``layer4``.
"""

from __future__ import annotations

import inspect
import operator
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from featstore.errors import ModelError

LIBRARY_LEAVES = ("torch.nn", "torch.ao.nn")


@dataclass(frozen=True, kw_only=True)
class GraphStage:
    """The operations between two neighbouring cut points, as graphs that share the traced module's parameters.

    `train` is None where both modes run the same operations (dropout and batch-norm modules switch by themselves).
    """

    name: str
    aliases: tuple[str, ...]
    eval: fx.GraphModule
    train: fx.GraphModule | None


@contextmanager
def mode_of(module: nn.Module, *, training: bool) -> Iterator[None]:
    """Puts `module` and all below into one mode for the block, and every flag back as it was, also after an error."""
    before = [(part, part.training) for part in module.modules()]
    try:
        module.train(training)
        yield
    finally:
        for part, flag in before:
            part.training = flag


def split_into_stages(
    module: nn.Module, *, containers: Collection[str] = (), preferred: Collection[str] = ()
) -> list[GraphStage]:
    """The stages of `module` in order, one per cut point, together computing exactly what `module` computes.

    Each parameter and buffer is used in exactly one stage: between two uses of one tensor there is no cut. The module
    is left as it was; the stages hold its leaf modules, not copies.

    Args:
        module: takes one float tensor ``(N, 3, H, W)`` and returns one tensor.
        containers: module paths that are too coarse to name a cut (a backbone's ``features``, ``encoder``).
        preferred: names that win over other aliases of the same value.

    Raises:
        ModelError: what can't be traced (named), or what doesn't return one tensor.
    """
    refuse_patched(module)
    evaluated, opaque = _traced(module, training=False, opaque=frozenset())
    trained, opaque_in_training = _traced(module, training=True, opaque=opaque)
    if opaque_in_training != opaque:  # what can't be traced in one mode is opaque in both, so that the stages agree
        evaluated, _ = _traced(module, training=False, opaque=opaque_in_training)
    eval_cuts, train_cuts = _cuts(evaluated), _cuts(trained)
    shared = [path for path in eval_cuts if path in train_cuts]
    if not shared or shared[-1] != list(eval_cuts)[-1]:
        raise ModelError(
            f"{type(module).__name__} ends in {list(eval_cuts)[-1]} in eval mode and in {list(train_cuts)[-1]} in "
            "train mode. A staged model returns the same value in both: write a wrapper whose forward returns it."
        )
    names = _names(evaluated, shared, containers, preferred)
    stages = []
    for index, path in enumerate(shared):
        before = shared[index - 1] if index else None
        in_eval = _subgraph(evaluated, eval_cuts, before, path)
        in_train = _subgraph(trained, train_cuts, before, path)
        name, aliases = names[path]
        same = _text(in_eval) == _text(in_train)
        stages.append(GraphStage(name=name, aliases=aliases, eval=in_eval, train=None if same else in_train))
    return stages


def refuse_patched(module: nn.Module) -> None:
    """Raises ModelError for what runs beside a module's class: forward hooks, a patched forward, a parametrization.

    No key could see what such code computes.
    """
    for path, part in module.named_modules():
        where = f"{path or 'the model'} ({type(part).__name__})"
        if part._forward_hooks or part._forward_pre_hooks:
            raise ModelError(
                f"{where} has a forward hook, whose effect no key can see. Remove the hook, or write what it does into "
                "the forward of a module."
            )
        if "forward" in vars(part):
            raise ModelError(
                f"{where} has a forward that was assigned to the instance, which no key can see. Write a subclass "
                "with that forward."
            )
        if torch.nn.utils.parametrize.is_parametrized(part):
            raise ModelError(
                f"{where} is parametrized. Bake the result in first: "
                "torch.nn.utils.parametrize.remove_parametrizations(module, name)."
            )


def writes_its_input(graph: fx.Graph) -> bool:
    """Whether an operation of `graph` may write into the graph's input (an in-place ReLU at its start, say)."""
    (source,) = (node for node in graph.nodes if node.op == "placeholder")
    root = graph.owning_module
    assert root is not None
    views, pending = {source}, [source]
    while pending:  # follow everything that may share the input's memory
        for user in pending.pop().users:
            if is_in_place(user, root):
                return True
            if _may_be_a_view(user, root) and user not in views:
                views.add(user)
                pending.append(user)
    return False


def is_in_place(node: fx.Node, root: nn.Module) -> bool:
    """Whether `node` may write into one of its operands."""
    if node.op == "call_module":
        leaf = root.get_submodule(str(node.target))
        return bool(getattr(leaf, "inplace", False)) or not is_library_leaf(leaf)
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


def is_library_leaf(module: nn.Module) -> bool:
    """Whether `module` is one of torch's own layers, all the way down: a single operation of the graph."""
    return not isinstance(module, nn.Sequential) and all(
        type(part).__module__.startswith(LIBRARY_LEAVES) for part in module.modules()
    )


_IN_PLACE_OPERATORS = {
    "iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor", "setitem", "delitem",
}  # fmt: skip
_VIEW_MAKERS = {
    "view", "reshape", "flatten", "permute", "transpose", "squeeze", "unsqueeze", "expand", "getitem", "chunk", "split",
    "unbind", "narrow", "select", "contiguous", "detach", "unflatten", "movedim", "swapaxes", "t", "to", "float",
}  # fmt: skip


def _may_be_a_view(node: fx.Node, root: nn.Module) -> bool:
    if node.op == "call_module":
        return isinstance(root.get_submodule(str(node.target)), nn.Identity | nn.Flatten | nn.Unflatten | nn.Dropout)
    return node.op != "output" and _operation_name(node) in _VIEW_MAKERS


def _inplace_position(function: Callable[..., Any]) -> int | None:
    try:
        names = list(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # a C function
        return None
    return names.index("inplace") if "inplace" in names else None


class _Tracer(fx.Tracer):
    """torch.fx's tracer, with the path of every operation and a set of modules that stay whole."""

    def __init__(self, opaque: Collection[str]) -> None:
        super().__init__()
        self.opaque = opaque
        self.paths: dict[fx.Node, str] = {}
        self.inside: list[str] = []
        self._uses: Counter[str] = Counter()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return is_library_leaf(m) or module_qualified_name in self.opaque

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        # One input; parameters of forward with a default keep it.
        return root_fn, [self.root, self.create_proxy("placeholder", "input", (), {})]

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        self.inside.append(self.path_of_module(m))
        result = super().call_module(m, forward, args, kwargs)
        self.inside.pop()  # not in a finally: after an error the path says where it was raised
        return result

    def create_node(self, kind: str, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(kind, *args, **kwargs)
        inside = self.inside[-1] if self.inside else ""
        path = str(node.target) if kind == "call_module" else ".".join(filter(None, [inside, _operation_name(node)]))
        uses = self._uses[path]
        self._uses[path] += 1
        self.paths[node] = f"{path}_{uses}" if uses else path
        return node


@dataclass(frozen=True, kw_only=True)
class _Trace:
    root: nn.Module
    nodes: list[fx.Node]  # without get_attr nodes: a tensor is taken where it is used
    paths: dict[fx.Node, str]
    output: fx.Node
    constants: dict[str, torch.Tensor]


def _traced(module: nn.Module, *, training: bool, opaque: frozenset[str]) -> tuple[_Trace, frozenset[str]]:
    """The trace of one mode, and the modules that had to stay opaque: the innermost one at each failure to trace."""
    while True:
        tracer = _Tracer(opaque)
        attributes = set(vars(module))
        try:
            with mode_of(module, training=training):
                graph = tracer.trace(module)
        except Exception as error:
            where = tracer.inside[-1] if tracer.inside else ""
            if not where:
                raise ModelError(
                    f"{type(module).__name__} can't be traced ({_first_line(error)}). Give its stages in order: "
                    'nn.Sequential(OrderedDict(stem=..., body=...)), or StagedModel.from_stages({"stem": ...}).'
                ) from error
            opaque = opaque | {where}
            continue
        finally:
            # The tracer parks constant tensors on the module it traces; it's the caller's module, so take them off.
            constants = {name: vars(module)[name] for name in set(vars(module)) - attributes}
            for name in constants:
                delattr(module, name)
        return _as_trace(module, graph, tracer.paths, constants), opaque


def _as_trace(module: nn.Module, graph: fx.Graph, paths: dict[fx.Node, str], constants: dict[str, Any]) -> _Trace:
    *_, end = graph.nodes
    output = end.args[0]
    if not isinstance(output, fx.Node) or output.op not in {"call_module", "call_function", "call_method"}:
        raise ModelError(
            f"{type(module).__name__} returns {_described(output)}; a staged model returns one tensor computed from "
            "its input. Write a wrapper whose forward returns just that tensor."
        )
    nodes = [node for node in graph.nodes if node.op != "get_attr"]
    return _Trace(root=module, nodes=nodes, paths=paths, output=output, constants=constants)


def _described(output: Any) -> str:
    return f"a {type(output).__name__}" if not isinstance(output, fx.Node) else "its input or a parameter unchanged"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def _cuts(trace: _Trace) -> dict[str, tuple[fx.Node, int]]:
    """Path -> (the value that alone crosses, position of the last operation before the cut), in order."""
    place = {node: index for index, node in enumerate(trace.nodes)}
    last_use = {node: max((place[user] for user in node.users if user in place), default=-1) for node in trace.nodes}
    closed = _closed_to_cuts(trace, place)
    cuts: dict[str, tuple[fx.Node, int]] = {}
    alive: set[fx.Node] = set()
    end = place[trace.output]
    for index, node in enumerate(trace.nodes[: end + 1]):
        alive.add(node)
        alive = {value for value in alive if last_use[value] > index}
        (crossing,) = alive if len(alive) == 1 else (None,)
        if crossing is None or crossing.op == "placeholder" or closed[index] or _is_unpacked(crossing):
            continue
        cuts.setdefault(trace.paths[crossing], (crossing, index))
    cuts[trace.paths[trace.output]] = (trace.output, end)
    return cuts


def _closed_to_cuts(trace: _Trace, place: dict[fx.Node, int]) -> list[bool]:
    """Positions after which no cut may be made: between two uses of one parameter or buffer."""
    uses: dict[int, list[int]] = {}
    for node in trace.nodes:
        for tensor in _tensors_used(trace, node):
            uses.setdefault(id(tensor), []).append(place[node])
    closed = [False] * len(trace.nodes)
    for positions in uses.values():
        for index in range(min(positions), max(positions)):
            closed[index] = True
    return closed


def _tensors_used(trace: _Trace, node: fx.Node) -> Iterator[torch.Tensor]:
    if node.op == "call_module":
        leaf = trace.root.get_submodule(str(node.target))
        yield from leaf.parameters()
        yield from leaf.buffers()
    for operand in node.all_input_nodes:
        if operand.op == "get_attr":
            yield _attribute(trace, str(operand.target))


def _attribute(trace: _Trace, path: str) -> torch.Tensor:
    value = trace.constants.get(path)
    return operator.attrgetter(path)(trace.root) if value is None else value


def _is_unpacked(node: fx.Node) -> bool:
    """Whether the value is a tuple (of `chunk`, `max`, ...), seen from how it is used: only by whole-number indices."""
    users = list(node.users)
    return bool(users) and all(
        user.target is operator.getitem and isinstance(user.args[1], int) and user.args[0] is node for user in users
    )


def _names(
    trace: _Trace, cuts: Sequence[str], containers: Collection[str], preferred: Collection[str]
) -> dict[str, tuple[str, tuple[str, ...]]]:
    """For each cut's path: its name (the coarsest allowed), and all its other names."""
    last: dict[str, str] = {}  # module path -> path of the last operation in it
    for node in trace.nodes:
        if node.op in {"placeholder", "output"}:
            continue
        path = trace.paths[node]
        for prefix in _prefixes(path):
            last[prefix] = path
    by_path: dict[str, list[str]] = {path: [path] for path in cuts}
    for prefix, path in last.items():
        if path in by_path and prefix != path:
            by_path[path].append(prefix)
    names = {}
    for path, known in by_path.items():
        known.sort(key=lambda name: (name not in preferred, name in containers, name.count("."), len(name)))
        names[path] = (known[0], tuple(known[1:]))
    return names


def _prefixes(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[:length]) for length in range(1, len(parts))]


def _subgraph(trace: _Trace, cuts: dict[str, tuple[fx.Node, int]], before: str | None, path: str) -> fx.GraphModule:
    """The operations after the cut `before` (None: the start) up to the cut `path`, as a module of one input."""
    graph = fx.Graph()
    start = 0
    source = trace.nodes[0]
    if before is not None:
        source, end_before = cuts[before]
        start = end_before + 1
    value, end = cuts[path]
    copies = {source: graph.placeholder("input")}

    def copied(operand: fx.Node) -> fx.Node:
        if operand.op == "get_attr" and operand not in copies:
            copies[operand] = graph.node_copy(operand)
        return copies[operand]

    for node in trace.nodes[start : end + 1]:
        if node.op != "placeholder":
            copies[node] = graph.node_copy(node, copied)
    graph.output(copies[value])
    with _constants_on(trace.root, trace.constants):
        staged = fx.GraphModule(trace.root, graph, class_name="StageGraph")
    staged.graph.lint()
    return staged


@contextmanager
def _constants_on(root: nn.Module, constants: dict[str, torch.Tensor]) -> Iterator[None]:
    for name, value in constants.items():
        setattr(root, name, value)
    try:
        yield
    finally:
        for name in constants:
            delattr(root, name)


def _text(stage: fx.GraphModule) -> str:
    return stage.graph.python_code("self").src


def _operation_name(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
