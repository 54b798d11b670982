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
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from featstore.errors import ModelError
from featstore.models.modes import gradients_on, mode_of, one_pass, random_states, random_states_kept

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


def split_into_stages(module: nn.Module, *, containers: Collection[str] = ()) -> list[GraphStage]:
    """The stages of `module` in order, one per cut point, together computing exactly what `module` computes.

    Each parameter and buffer is used in exactly one stage: between two uses of one tensor there is no cut. The module
    is left as it was; the stages hold its leaf modules, not copies. What can't be traced, and any module with a method
    ``fingerprint``, stays whole.

    Args:
        module: takes one float tensor ``(N, 3, H, W)`` and returns one tensor.
        containers: module paths that are too coarse to name a cut (a backbone's ``features``, ``encoder``).

    Raises:
        ModelError: what can't be traced (named), or what doesn't return one tensor.
    """
    refuse_patched(module)
    evaluated, opaque = _traced(module, training=False, opaque=frozenset())
    trained, opaque_in_training = _traced(module, training=True, opaque=opaque)
    if opaque_in_training != opaque:  # what can't be traced in one mode is opaque in both, so that the stages agree
        evaluated, _ = _traced(module, training=False, opaque=opaque_in_training)
    cuts = _cuts(evaluated, trained)
    names = _names(evaluated, [in_eval.path for in_eval, _ in cuts], containers)
    stages, before = [], (_START, _START)
    for in_eval, in_train in cuts:
        name, aliases = names[in_eval.path]
        stage_eval = _subgraph(evaluated, before[0], in_eval)
        stage_train = _subgraph(trained, before[1], in_train)
        same = _is_same(stage_eval, stage_train)
        stages.append(GraphStage(name=name, aliases=aliases, eval=stage_eval, train=None if same else stage_train))
        before = (in_eval, in_train)
    return stages


def refuse_patched(module: nn.Module) -> None:
    """Raises ModelError for what runs beside a module's class: forward hooks, a patched forward, a parametrization.

    No key could see what such code computes.
    """
    if nn.modules.module._global_forward_hooks or nn.modules.module._global_forward_pre_hooks:
        raise ModelError(
            "A forward hook is registered for all modules (torch.nn.modules.module.register_module_forward_hook), "
            "whose effect no key can see. Remove it."
        )
    for path, part in module.named_modules():
        where = f"{path or 'the model'} ({type(part).__name__})"
        if part._forward_hooks or part._forward_pre_hooks:
            raise ModelError(
                f"{where} has a forward hook, whose effect no key can see. Remove the hook, or write what it does into "
                "the forward of a module."
            )
        if isinstance(getattr(part, "_orig_mod", None), nn.Module):
            raise ModelError(
                f"{where} is compiled by torch.compile, and what that runs no key can see. Hand over the module that "
                f"was compiled: {f'put the _orig_mod of {path} in its place' if path else 'net._orig_mod'}."
            )
        if isinstance(part, torch.jit.ScriptModule):
            raise ModelError(
                f"{where} is a TorchScript module, whose code no key can see. Hand over the nn.Module it was made from."
            )
        if "forward" in vars(part):
            raise ModelError(
                f"{where} has a forward that was assigned to the instance, which no key can see. Write a subclass "
                "with that forward."
            )
        if nn.utils.parametrize.is_parametrized(part):
            raise ModelError(
                f"{where} is parametrized. Bake the result in first: "
                "torch.nn.utils.parametrize.remove_parametrizations(module, name)."
            )


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


def is_library_leaf(module: nn.Module) -> bool:
    """Whether `module` is one of torch's own layers, all the way down: a single operation of the graph."""
    return not isinstance(module, nn.Sequential) and all(is_library_class(type(part)) for part in module.modules())


def is_library_class(kind: type) -> bool:
    """Whether a module's class is one of torch's own."""
    return any(kind.__module__ == home or kind.__module__.startswith(f"{home}.") for home in LIBRARY_LEAVES)


def has_fingerprint(module: nn.Module) -> bool:
    """Whether the author of `module` vouches for what it computes with a method ``fingerprint() -> str``."""
    return callable(getattr(type(module), "fingerprint", None))


_IN_PLACE_OPERATORS = {
    "iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul", "iand", "ior", "ixor", "ilshift",
    "irshift", "setitem", "delitem",
}  # fmt: skip


def _inplace_position(function: Callable[..., Any]) -> int | None:
    try:
        names = list(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # a C function
        return None
    return names.index("inplace") if "inplace" in names else None


class _Tracer(fx.Tracer):
    """torch.fx's tracer, with the path of every operation and a set of modules that stay whole."""

    # A buffer is an operand like a parameter: arithmetic between buffers belongs to the graph, not to the tracing.
    proxy_buffer_attributes = True

    def __init__(self, opaque: Collection[str]) -> None:
        super().__init__()
        self.opaque = opaque
        self.paths: dict[fx.Node, str] = {}
        self.plain_paths: dict[fx.Node, str] = {}  # without the number of the use
        self.owners: dict[fx.Node, str] = {}  # the module whose forward runs it
        self.inside: list[str] = []
        self._uses: Counter[str] = Counter()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return is_library_leaf(m) or has_fingerprint(m) or module_qualified_name in self.opaque

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        # One input; parameters of forward with a default keep it.
        return root_fn, [self.root, self.create_proxy("placeholder", "input", (), {})]

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        self.inside.append(self.path_of_module(m))
        before = random_states()
        result = super().call_module(m, forward, args, kwargs)
        _refuse_draws(before)
        self.inside.pop()  # not in a finally: after an error the path says where it was raised
        return result

    def create_node(self, kind: str, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(kind, *args, **kwargs)
        inside = self.inside[-1] if self.inside else ""
        self.owners[node] = "".join(self.inside[-2:-1]) if kind == "call_module" else inside
        path = str(node.target) if kind == "call_module" else ".".join(filter(None, [inside, _operation_name(node)]))
        uses = self._uses[path]
        self._uses[path] += 1
        self.plain_paths[node], self.paths[node] = path, f"{path}_{uses}" if uses else path
        return node


@dataclass(frozen=True, kw_only=True)
class _Trace:
    root: nn.Module
    nodes: list[fx.Node]  # without get_attr nodes: a tensor is taken where it is used
    paths: dict[fx.Node, str]
    plain_paths: dict[fx.Node, str]
    output: fx.Node
    constants: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class _Cut:
    path: str
    value: fx.Node | None  # None: the input
    end: int  # position of the last operation before the cut


_START = _Cut(path="", value=None, end=0)


def _traced(module: nn.Module, *, training: bool, opaque: frozenset[str]) -> tuple[_Trace, frozenset[str]]:
    """The trace of one mode, and the modules that had to stay opaque: the innermost one at each failure to trace."""
    while True:
        tracer = _Tracer(opaque)
        attributes = set(vars(module))
        with (
            one_pass,
            _attributes_kept(module) as undo_proxies,
            mode_of(module, training=training),
            random_states_kept(),
            gradients_on(),
        ):
            before, versions = random_states(), _versions(module)
            try:
                graph = tracer.trace(module)
                _refuse_draws(before)
                changing = None if training else _changing(module, graph, tracer, versions, undo_proxies)
            except Exception as error:
                where = tracer.inside[-1] if tracer.inside else ""
                if not where:
                    raise ModelError(
                        f"{type(module).__name__} can't be traced ({_first_line(error)}). Give its stages in order: "
                        'nn.Sequential(OrderedDict(stem=..., body=...)), or StagedModel.from_stages({"stem": ...}).'
                    ) from error
                opaque = opaque | {where}
                continue
            if changing is not None:
                what, where = changing
                if not where:
                    raise ModelError(
                        f"{type(module).__name__} can't be traced: its {what} is another one each "
                        "time it runs (a counter, the time, a list that grows), and tracing would keep the first. Make "
                        "it depend on self.training, or move it into a module of its own."
                    )
                opaque = opaque | {where}
                continue
            used = {str(node.target) for node in graph.nodes if node.op == "get_attr"}
            # Constant tensors, which the tracer parked on the caller's module.
            constants = {name: vars(module)[name] for name in (set(vars(module)) - attributes) & used}
        return _as_trace(module, graph, tracer, constants, training=training), opaque


def _versions(module: nn.Module) -> dict[str, list[tuple[int, int]]]:
    """Of each module, by path, which tensors it has, and how often each has been written into."""
    return {path: _versions_of(part) for path, part in module.named_modules()}


def _versions_of(part: nn.Module) -> list[tuple[int, int]]:
    values = (*vars(part).values(), *part._parameters.values(), *part._buffers.values())
    return [(id(value), value._version) for value in values if isinstance(value, Tensor) and not value.is_inference()]


def _written(module: nn.Module, before: dict[str, list[tuple[int, int]]]) -> str | None:
    """The path of a module whose forward replaced a buffer of it or wrote into a tensor it keeps, while it was traced.

    The graph doesn't do so: it would go on with what the tensor held then.
    """
    for path, part in module.named_modules():
        now: dict[int, int] = dict(_versions_of(part))
        is_replaced = any(isinstance(each, fx.Proxy) for each in (*part._buffers.values(), *part._parameters.values()))
        if is_replaced or any(now.get(key, version) != version for key, version in before[path]):
            return str(path)
    return None


def _changing(
    module: nn.Module,
    first: fx.Graph,
    tracer: _Tracer,
    versions: dict[str, list[tuple[int, int]]],
    undo_proxies: Callable[[], None],
) -> tuple[str, str] | None:
    """What the same forward does or keeps in another way each time it runs, and the path of its module; None: nothing.

    What a forward reads from elsewhere than its input is a constant of the graph: a counter, the time. Each run goes on
    from what the one before has left, but for proxies. What only the first one does (it makes a table) is no change.
    """
    written = _written(module, versions)
    if written is not None:
        return "state", written
    graphs, kept = [first], [_numbers(module)]
    for _ in range(2):
        undo_proxies()
        try:
            graphs.append(_Tracer(tracer.opaque).trace(module))
        except Exception:  # it needs what was undone
            return None
        kept.append(_numbers(module))
        if _first_difference(module, graphs[-2], graphs[-1]) is None and kept[-2] == kept[-1]:
            return None
    node = _first_difference(module, first, graphs[1])
    if node is not None:
        return _operation_name(node), tracer.owners[node]
    return _counted(module, first, tracer, kept[0], undo_proxies)


def _counted(
    module: nn.Module,
    first: fx.Graph,
    tracer: _Tracer,
    before: dict[tuple[str, str], float],
    undo_proxies: Callable[[], None],
) -> tuple[str, str] | None:
    """The same for numbers that move from run to run: whether the forward does something else once they are large."""
    moved = [key for key, value in _numbers(module).items() if before.get(key) != value]
    for far in (10**3, 10**6):
        undo_proxies()
        for path, name in moved:
            setattr(module.get_submodule(path), name, far)
        try:
            node = _first_difference(module, first, _Tracer(tracer.opaque).trace(module))
        except Exception:
            return "state", moved[0][0]
        if node is not None:
            return _operation_name(node), tracer.owners[node]
    return None


def _numbers(module: nn.Module) -> dict[tuple[str, str], float]:
    """The plain numbers that each module keeps, by its path and their name."""
    return {
        (path, name): value
        for path, part in module.named_modules()
        for name, value in vars(part).items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }


def _first_difference(module: nn.Module, graph: fx.Graph, other: fx.Graph) -> fx.Node | None:
    places: tuple[dict[fx.Node, int], dict[fx.Node, int]] = ({}, {})
    nodes: tuple[fx.Node, fx.Node]
    for index, nodes in enumerate(zip(graph.nodes, other.nodes, strict=False)):
        for node, known in zip(nodes, places, strict=True):
            known[node] = index
        one, two = (
            (node.op, fx.node.map_arg((node.args, node.kwargs), known.__getitem__))
            for node, known in zip(nodes, places, strict=True)
        )
        if one != two or not _is_same_target(module, *nodes):
            return nodes[0]
    return None  # every graph ends with its output


def _is_same_target(module: nn.Module, one: fx.Node, other: fx.Node) -> bool:
    if one.op == "get_attr" and one.target != other.target:  # each run parks constants under names of its own
        mine, others = (operator.attrgetter(str(node.target))(module) for node in (one, other))
        return mine.dtype == others.dtype and torch.equal(mine, others)
    return one.target == other.target


def _refuse_draws(before: tuple[Any, ...]) -> None:
    """A number drawn while tracing would be a constant of the graph; the module that draws it must stay whole."""
    if random_states() != before:
        raise RuntimeError("its forward draws random numbers that don't depend on its input")


@contextmanager
def _attributes_kept(module: nn.Module) -> Iterator[Callable[[], None]]:
    """Undoes what a forward assigns to its modules while it is traced: proxies, counters, parked constants.

    The block gets a function that undoes the proxies alone.
    """
    owned = [
        content
        for part in module.modules()
        for content in (vars(part), *(vars(part).get(name) for name in ("_parameters", "_buffers", "_modules")))
        if isinstance(content, dict)
    ]
    before = [dict(content) for content in owned]

    def undo_proxies() -> None:
        for content, saved in zip(owned, before, strict=True):
            proxies = [name for name, value in content.items() if _holds_proxy(value)]
            for name in proxies:
                del content[name]
            content.update({name: saved[name] for name in proxies if name in saved})

    try:
        yield undo_proxies
    finally:
        for content, saved in zip(owned, before, strict=True):
            if content.keys() != saved.keys() or any(content[name] is not saved[name] for name in saved):
                content.clear()
                content.update(saved)


def _holds_proxy(value: Any) -> bool:
    values = list(value.values()) if isinstance(value, dict) else value
    if isinstance(values, list | tuple):
        return any(_holds_proxy(each) for each in values)
    return isinstance(value, fx.Proxy)


def _as_trace(
    module: nn.Module, graph: fx.Graph, tracer: _Tracer, constants: dict[str, Any], *, training: bool
) -> _Trace:
    *_, end = graph.nodes
    output = end.args[0]
    if not isinstance(output, fx.Node) or output.op not in {"call_module", "call_function", "call_method"}:
        raise ModelError(
            f"{type(module).__name__} returns {_described(output)} in {'train' if training else 'eval'} mode; a staged "
            "model returns one tensor computed from its input. Write a wrapper whose forward returns just that tensor."
        )
    return _Trace(
        root=module,
        nodes=[node for node in graph.nodes if node.op not in {"get_attr", "output"}],
        paths=tracer.paths,
        plain_paths=tracer.plain_paths,
        output=output,
        constants=constants,
    )


def _described(output: Any) -> str:
    if isinstance(output, fx.Node):
        return "its input or a parameter unchanged"
    return f"a value of type {type(output).__name__.removeprefix('immutable_')}"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def _cuts(evaluated: _Trace, trained: _Trace) -> list[tuple[_Cut, _Cut]]:
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


def _crossings(trace: _Trace) -> dict[str, _Cut]:
    """Path -> cut, for each value before the output that at some position crosses alone, in order."""
    place = {node: index for index, node in enumerate(trace.nodes)}
    last_use = {node: max((place.get(user, len(place)) for user in node.users), default=-1) for node in trace.nodes}
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


def _end(trace: _Trace) -> _Cut:
    # What runs after the output has been computed (a counter, say) belongs to the last stage.
    return _Cut(path=trace.paths[trace.output], value=trace.output, end=len(trace.nodes) - 1)


def _are_open(evaluated: _Trace, trained: _Trace, cuts: list[tuple[_Cut, _Cut]]) -> list[bool]:
    """For each cut whether no tensor is used on both sides of it, in whichever mode."""
    stages_of: dict[int, set[int]] = {}
    for mode, trace in enumerate((evaluated, trained)):
        ends = [cut[mode].end for cut in cuts]
        for position, node in enumerate(trace.nodes):
            for tensor in _tensors_used(trace, node):
                stages_of.setdefault(id(tensor), set()).add(bisect_left(ends, position))
    spans = [(min(stages), max(stages)) for stages in stages_of.values()]
    return [not any(first <= index < last for first, last in spans) for index in range(len(cuts))]


def _tensors_used(trace: _Trace, node: fx.Node) -> Iterator[Tensor]:
    if node.op == "call_module":
        leaf = trace.root.get_submodule(str(node.target))
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


def _names(trace: _Trace, cuts: Sequence[str], containers: Collection[str]) -> dict[str, tuple[str, tuple[str, ...]]]:
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
    names = {}
    for path, known in by_path.items():
        known.sort(key=lambda name: (name in containers, name.count("."), len(name)))
        names[path] = (known[0], tuple(known[1:]))
    return names


def _prefixes(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[:length]) for length in range(1, len(parts))]


def _subgraph(trace: _Trace, before: _Cut, cut: _Cut) -> fx.GraphModule:
    """The operations after one cut up to another, as a module of one input."""
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
    with _constants_on(trace):
        stage = fx.GraphModule(trace.root, graph, class_name="StageGraph")
    stage.graph.lint()
    return stage


@contextmanager
def _constants_on(trace: _Trace) -> Iterator[None]:
    for name, value in trace.constants.items():
        setattr(trace.root, name, value)
    try:
        yield
    finally:
        for name in trace.constants:
            delattr(trace.root, name)


def _is_same(one: fx.GraphModule, other: fx.GraphModule) -> bool:
    """Whether two graphs of one module run the same operations with the same constants."""
    forms, tensors = zip(_form(one), _form(other), strict=True)
    return forms[0] == forms[1] and all(
        mine is yours or (mine.dtype == yours.dtype and not mine.is_meta and torch.equal(mine, yours))
        for mine, yours in zip(*tensors, strict=True)
    )


def _form(stage: fx.GraphModule) -> tuple[list[Any], list[Tensor]]:
    """The operations of `stage` with places for names, and the tensors it takes from its attributes."""
    places: dict[fx.Node, str] = {}
    form, tensors = [], []
    for node in stage.graph.nodes:
        places[node] = f"%{len(places)}"
        target = node.target
        if node.op == "get_attr":
            tensors.append(operator.attrgetter(str(target))(stage))
            target = "tensor"
        form.append((node.op, target, fx.node.map_arg((node.args, node.kwargs), places.__getitem__)))
    return form, tensors


def _operation_name(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
