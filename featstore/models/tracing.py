"""Tracing: the operations of a module in one mode, with the module that runs each and what had to stay whole."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from featstore.errors import ModelError
from featstore.models.adapters import is_record, parts, picking
from featstore.models.kept import Kept
from featstore.models.modes import gradients_on, mode_of, one_pass, random_states, random_states_kept
from featstore.source_code import is_at_its_name

LIBRARY_LEAVES = ("torch.nn", "torch.ao.nn")


@dataclass(frozen=True, kw_only=True)
class Trace:
    """What a module runs in one mode.

    Attributes:
        root: the module.
        nodes: in order, without get_attr nodes: a tensor is taken where it is used.
        paths: of each operation, with the number of its use from the second on.
        plain_paths: the same without that number.
        output: the operation that makes the module's output.
        constants: tensors that the forward makes while it is traced, by the names that the nodes know them by.
        auxiliaries: what alone makes further values that it returns in train mode, and is left out.
    """

    root: nn.Module
    nodes: list[fx.Node]
    paths: dict[fx.Node, str]
    plain_paths: dict[fx.Node, str]
    output: fx.Node
    constants: dict[str, Any]
    auxiliaries: tuple[str, ...] = ()


def traced(
    module: nn.Module, *, training: bool, opaque: frozenset[str], main: str | None = None
) -> tuple[Trace, frozenset[str]]:
    """The trace of one mode, and the modules that had to stay opaque: the innermost one at each failure to trace.

    The module is left as it was.

    Args:
        module: what is traced.
        training: in train mode, else in eval mode.
        opaque: modules that stay whole, by path.
        main: the path of the operation that makes the output in eval mode. Of several values in train mode that one is
            the output; the others have losses of their own, as an auxiliary classifier's scores do.

    Raises:
        ModelError: where the module's own forward can't be traced, or doesn't return one computed tensor.
    """
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
            before, versions, kept = random_states(), _versions(module), Kept(module, tracer.is_leaf_module)
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
            finally:
                kept.restore()
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
        return _as_trace(module, graph, tracer, constants, training=training, main=main), opaque


def is_library_leaf(module: nn.Module) -> bool:
    """Whether `module` is one of torch's own layers, all the way down: a single operation of the graph."""
    return not isinstance(module, nn.Sequential) and all(is_library_class(type(part)) for part in module.modules())


def is_library_class(kind: type) -> bool:
    """Whether a module's class is one of torch's own, and not only says so."""
    is_named = any(kind.__module__ == home or kind.__module__.startswith(f"{home}.") for home in LIBRARY_LEAVES)
    return is_named and is_at_its_name(kind)


def has_fingerprint(module: nn.Module) -> bool:
    """Whether the author of `module` vouches for what it computes with a method ``fingerprint() -> str``."""
    return callable(getattr(type(module), "fingerprint", None))


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
        self._leaves: dict[tuple[nn.Module, str], bool] = {}  # as looked up before: each is asked for again and again
        self._tensors: dict[int, _Held] = {}  # of the root, by identity

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        known = self._leaves.get((m, module_qualified_name))
        if known is None:
            known = is_library_leaf(m) or has_fingerprint(m) or module_qualified_name in self.opaque
            self._leaves[m, module_qualified_name] = known
        return known

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        # One input; parameters of forward with a default keep it.
        return root_fn, [self.root, self.create_proxy("placeholder", "input", (), {})]

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """As fx's own, which looks through all tensors of the root for each: most of the time for a large network."""
        if isinstance(attr_val, Tensor):
            self._tensors = self._tensors or _held(self.root)
            held = self._tensors.get(id(attr_val))
            if held is not None and held.among.get(held.name) is attr_val:  # it may have been moved meanwhile
                if held.path not in parameter_proxy_cache:
                    parameter_proxy_cache[held.path] = self.create_proxy("get_attr", held.path, (), {})
                return parameter_proxy_cache[held.path]
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        path = self.path_of_module(m)
        self.inside.append(path)
        is_run = not self.is_leaf_module(m, path) and type(m).forward is not nn.Sequential.forward  # which only calls
        before = random_states() if is_run else None
        result = super().call_module(m, forward, args, kwargs)
        if before is not None:
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


class _Held(NamedTuple):
    """A parameter or buffer: its path, and where it is held under which name."""

    path: str
    among: Mapping[str, Tensor | None]
    name: str


def _held(root: nn.Module) -> dict[int, _Held]:
    """The parameters and buffers of a module by their identity, the first name of each."""
    found: dict[int, _Held] = {}
    for kind in ("_parameters", "_buffers"):
        for path, part in root.named_modules():
            among = vars(part)[kind]
            for name, value in among.items():
                if isinstance(value, nn.Parameter if kind == "_parameters" else Tensor):
                    found.setdefault(id(value), _Held(f"{path}.{name}" if path else name, among, name))
    return found


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
    graphs, kept = [first], [Kept(module, tracer.is_leaf_module)]
    for _ in range(2):
        undo_proxies()
        try:
            graphs.append(_Tracer(tracer.opaque).trace(module))
        except Exception:  # it needs what was undone
            return None
        kept.append(Kept(module, tracer.is_leaf_module))
        if _first_difference(module, graphs[-2], graphs[-1]) is None and not kept[-1].moved(kept[-2]):
            return None
    node = _first_difference(module, first, graphs[1])
    if node is not None:
        return _operation_name(node), tracer.owners[node]
    return _counted(module, first, tracer, kept[0], undo_proxies)


def _counted(
    module: nn.Module,
    first: fx.Graph,
    tracer: _Tracer,
    before: Kept,
    undo_proxies: Callable[[], None],
) -> tuple[str, str] | None:
    """The same for what moves from run to run: whether the forward does something else once its numbers are large.

    What isn't a number (a list that grows) can't be tried, so its module stays whole, and `purity` watches it run.
    """
    kept = Kept(module, tracer.is_leaf_module)
    moved = kept.moved(before)
    other = next((route for route in moved if not kept.is_number(route)), None)
    if other is not None:
        return "state", kept.paths.get(other, before.paths.get(other, ""))
    for far in (10**3, 10**6, -(10**6)):
        undo_proxies()
        try:
            kept.set(moved, far)
            node = _first_difference(module, first, _Tracer(tracer.opaque).trace(module))
        except Exception:
            return "state", kept.paths[moved[0]]
        if node is not None:
            return _operation_name(node), tracer.owners[node]
    return None


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
    owned = [  # attributes, and the dictionaries among them: parameters, buffers, modules, tables that a forward fills
        content
        for part in module.modules()
        for content in (vars(part), *(value for value in vars(part).values() if isinstance(value, dict)))
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
    if isinstance(value, dict | list | tuple):
        return any(map(_holds_proxy, list(value.values()) if isinstance(value, dict) else value))
    return isinstance(value, fx.Proxy)


def _as_trace(
    module: nn.Module,
    graph: fx.Graph,
    tracer: _Tracer,
    constants: dict[str, Any],
    *,
    training: bool,
    main: str | None,
) -> Trace:
    *_, end = graph.nodes
    operations = [node for node in graph.nodes if node.op not in {"get_attr", "output"}]
    output, others = _parted(end.args[0], tracer, main)
    left_out: set[fx.Node] = set()
    if others:
        left_out = {node for node in operations if node not in _ancestors([output])} & _ancestors([end])
    kept = [node for node in operations if node not in left_out]
    is_computed = isinstance(output, fx.Node) and output.op in {"call_module", "call_function", "call_method"}
    if not is_computed or is_record(output):
        advice = None if training else picking(output)
        raise ModelError(
            f"{type(module).__name__} returns {_described(output)} in {'train' if training else 'eval'} mode; a staged "
            "model returns one tensor computed from its input. "
            f"{advice or 'Write a wrapper whose forward returns just that tensor.'}"
        )
    return Trace(
        root=module,
        nodes=kept,
        paths=tracer.paths,
        plain_paths=tracer.plain_paths,
        output=output,
        constants=constants,
        auxiliaries=_owners(module, left_out, kept, tracer),
    )


def _parted(output: Any, tracer: _Tracer, main: str | None) -> tuple[Any, list[fx.Node]]:
    """What a forward returns, parted into the output and further values."""
    nodes = [each for each in parts(output).values() if isinstance(each, fx.Node)]
    found = [node for node in nodes if tracer.paths[node] == main]
    if len(found) != 1:
        return output, []
    return found[0], [node for node in nodes if node is not found[0]]


def _ancestors(nodes: list[Any]) -> set[fx.Node]:
    """`nodes` and all that they are computed from."""
    found: set[fx.Node] = set()
    left = list(nodes)
    while left:
        node = left.pop()
        if node not in found:
            found.add(node)
            left += node.all_input_nodes
    return found


def _owners(module: nn.Module, left_out: set[fx.Node], kept: list[fx.Node], tracer: _Tracer) -> tuple[str, ...]:
    """The outermost modules that run operations that are left out, and none that is kept; in their order."""
    used = {prefix for node in kept for prefix in _prefixes(tracer.plain_paths[node])}
    owners: dict[str, None] = {}
    for path, _ in module.named_modules():
        runs = any(path in _prefixes(tracer.plain_paths[node]) for node in left_out)
        if runs and path not in used and not any(path.startswith(f"{owner}.") for owner in owners):
            owners[path] = None
    return tuple(owners)


def _prefixes(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[:length]) for length in range(len(parts) + 1)]


def _described(output: Any) -> str:
    if is_record(output):
        return f"a value of type {output.target.__name__}"
    if isinstance(output, fx.Node):
        return "its input or a parameter unchanged"
    return f"a value of type {type(output).__name__.removeprefix('immutable_')}"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def _operation_name(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
