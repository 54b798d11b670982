"""Batch mixing: which operation of a pass combines, reorders or picks images, judged from the operators that it runs.

`BatchMixing` follows, through every operator, in which dimension of each value the images lie. What has no rule here is
undecided, never trusted: `purity` then compares numbers.

Long, since it is one rule for each kind of operator.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass(frozen=True)
class Rows:
    """A value each of whose numbers belongs to one image.

    Attributes:
        dim: the dimension along which the images lie; its size is ``outer * N * inner``.
        outer: how often the images follow one another (views of the same images, one batch behind the other).
        inner: how many places in a row belong to one image (windows, heads).
    """

    dim: int
    outer: int = 1
    inner: int = 1


@dataclass(frozen=True)
class Mixed:
    """A value that holds what several images gave, or an image picked by its place; `where` made it so."""

    where: str


@dataclass(frozen=True)
class Unknown:
    """A value that depends on the images in a way no rule knows."""


Status = Rows | Mixed | Unknown | None
"""What is known of a value; None: it doesn't depend on the images' contents (a weight, a table, a mask)."""

_MIXES = Mixed("")  # a rule's answer; where it was is filled in
_UNKNOWN = Unknown()


class BatchMixing(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows the images of one batch through all operators that run in its `with` block.

    Holds every value it has seen, so it is for small batches, or those without data.

    Args:
        num_images: N; more than one. A prime that no layer has as a size leaves the fewest accidents.

    Attributes:
        place: what runs now, in words; set by whoever runs it.
        is_decided: whether each operator so far had a rule and none handed numbers of several images to Python.
        asks_for_sizes: whether something may know how many images there are; set by whoever runs it.
    """

    def __init__(self, num_images: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.num_images, self.place, self.is_decided, self.asks_for_sizes = num_images, "", True, False
        self._known: dict[int, tuple[Tensor, Status]] = {}
        self._written: dict[int, Mixed | Unknown] = {}  # memory that something of another kind was written into

    def set(self, values: Tensor, status: Status) -> None:
        """Says where the images lie in `values`."""
        self._known[id(values)] = values, status

    def status(self, values: Tensor) -> Status:
        """What is known of a value that this pass has made."""
        _, status = self._known.get(id(values), (values, None))
        written = self._written.get(_memory(values))
        if written is None or isinstance(status, Mixed):
            return status
        return written

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the operator and notes what it made."""
        kwargs = kwargs or {}
        call = _Call.of(func, args, kwargs, self)
        status = call.judged()  # before it runs: it may write, and move dimensions, in place
        result = func(*args, **kwargs)
        if status == _MIXES:
            status = Mixed(self.place)
        results = [value for value in tree_leaves(result) if isinstance(value, Tensor)]
        # A table that was made with a row an image: what is in it may tell them apart.
        self.asks_for_sizes |= status is None and any(self._may_have_rows(value) for value in results)
        if isinstance(status, Unknown) or (not results and status is not None):
            self.is_decided = False
        for index, value in enumerate(results):
            known = None if index and call.leaves_statistics else status
            self._note(value, known, is_written=any(value is each for each in call.written))
        for value in call.written:
            self._note(value, status, is_written=True)
        return result

    def _note(self, value: Tensor, status: Status, *, is_written: bool) -> None:
        if isinstance(status, Rows) and not self._fits(value, status):
            if value.numel() == 0:
                status = None  # statistics that eval mode leaves empty
            else:
                status, self.is_decided = _UNKNOWN, False
        if is_written and isinstance(status, Mixed | Unknown):
            self._written[_memory(value)] = status
        elif is_written and self.status(value) != status and self._has_other_views(value):
            self._written[_memory(value)] = _UNKNOWN
            self.is_decided = False
        self.set(value, status)

    def _may_have_rows(self, value: Tensor) -> bool:
        is_table = value.layout == torch.strided and not value.is_nested and value.numel() > 0
        return is_table and any(size % self.num_images == 0 for size in value.shape)

    def _has_other_views(self, value: Tensor) -> bool:
        memory = _memory(value)
        return any(_memory(other) == memory and other is not value for other, _ in self._known.values())

    def _fits(self, value: Tensor, rows: Rows) -> bool:
        size = rows.outer * self.num_images * rows.inner
        return 0 <= rows.dim < value.ndim and value.shape[rows.dim] == size


@dataclass(frozen=True, kw_only=True)
class _Call:
    """One operator with its arguments by name, and what is known of those that are tensors."""

    name: str
    arguments: dict[str, Any]
    written: list[Tensor]
    mode: BatchMixing
    is_pointwise: bool

    @classmethod
    def of(cls, function: Any, args: Sequence[Any], kwargs: dict[str, Any], mode: BatchMixing) -> _Call:
        schema = function._schema
        arguments, written = {}, list[Tensor]()
        for index, argument in enumerate(schema.arguments):
            value = args[index] if index < len(args) else kwargs.get(argument.name, argument.default_value)
            arguments[argument.name] = value
            if argument.alias_info is not None and argument.alias_info.is_write:
                written += [each for each in tree_leaves(value) if isinstance(each, Tensor)]
        name = schema.name.split("::")[-1]
        is_pointwise = torch.Tag.pointwise in function.tags
        name = name.removesuffix("_") if written else name
        return cls(name=name, arguments=arguments, written=written, mode=mode, is_pointwise=is_pointwise)

    @property
    def leaves_statistics(self) -> bool:
        """Whether it is a batch norm in eval mode: its further results are empty, or without data of any size."""
        return "batch_norm" in self.name and not self.arguments.get("training", "with_update" in self.name)

    def judged(self) -> Status:
        """What is known of the results."""
        operands = [each for each in tree_leaves(self.arguments) if isinstance(each, Tensor)]
        statuses = [self.mode.status(each) for each in operands]
        if not self.written and (self.name.endswith("_like") or self.name.startswith("new_") or self.name == "empty"):
            return None  # made from a shape
        mixed = next((status for status in statuses if isinstance(status, Mixed)), None)
        if mixed is not None:
            return mixed
        if all(status is None for status in statuses):
            return None
        if any(isinstance(status, Unknown) for status in statuses):
            return _UNKNOWN
        rule = _RULES.get(self.name) or (_aligned if self.is_pointwise else None)
        return _UNKNOWN if rule is None else rule(self)

    def tensor(self, name: str) -> Tensor:
        """The operand of that name."""
        value = self.arguments[name]
        assert isinstance(value, Tensor)
        return value

    @property
    def main(self) -> Tensor:
        """The first operand."""
        return next(each for each in tree_leaves(self.arguments) if isinstance(each, Tensor))

    @property
    def rows(self) -> Rows | None:
        """Where the images lie in the first operand, None where that doesn't depend on them."""
        return self.rows_of(self.main)

    def rows_of(self, value: Any) -> Rows | None:
        status = self.mode.status(value) if isinstance(value, Tensor) else None
        assert status is None or isinstance(status, Rows)
        return status

    def only_first(self) -> bool:
        """Whether the first operand alone depends on the images."""
        others = [each for each in tree_leaves(self.arguments) if isinstance(each, Tensor) and each is not self.main]
        return self.rows is not None and all(self.rows_of(each) is None for each in others)


Rule = Callable[[_Call], Status]
_RULES: dict[str, Rule] = {}


def _rule(*names: str) -> Callable[[Rule], Rule]:
    def registered(rule: Rule) -> Rule:
        _RULES.update(dict.fromkeys(names, rule))
        return rule

    return registered


def _memory(values: Tensor) -> int:
    """What tells the memory of a tensor from that of others; one without storage (sparse) stands for itself."""
    if values.layout != torch.strided:
        return id(values)
    return int(values.untyped_storage()._cdata)


def _dims(value: Any, ndim: int) -> list[int]:
    """Dimensions counted from the start; all of them where none is given."""
    if value is None or value == []:
        return list(range(ndim))
    return [each % ndim if ndim else 0 for each in ([value] if isinstance(value, int) else value)]


# ----------------------------------------------------------------------------------------- number by number, and copies


@_rule(
    "_to_copy", "clone", "alias", "detach", "lift_fresh", "lift", "contiguous", "copy", "view_as_real",
    "view_as_complex", "_conj", "hardswish", "hardtanh", "leaky_relu", "elu", "softplus", "rrelu_with_noise", "celu",
    "selu", "log_sigmoid_forward", "native_dropout", "bernoulli", "fill", "zero", "_prelu_kernel", "resolve_conj",
    "resolve_neg", "isclose", "where", "masked_fill", "addcmul", "addcdiv", "nan_to_num", "bucketize", "atan2",
)  # fmt: skip
def _aligned(call: _Call) -> Status:
    """Operands broadcast against one another: their images must lie in the same places."""
    operands = [each for each in tree_leaves(call.arguments) if isinstance(each, Tensor)]
    if call.name in {"copy", "fill", "zero"}:
        operands = operands[1:]
        if not operands:
            return call.rows
    ndim = max(each.ndim for each in (*operands, *call.written))
    found = {
        replace(rows, dim=rows.dim + ndim - each.ndim) for each in operands if (rows := call.rows_of(each)) is not None
    }
    if not found:  # a constant over what depended on the images
        return call.rows if call.written else None
    return found.pop() if len(found) == 1 else _MIXES


# -------------------------------------------------------------------------------------- along dimensions, and over them


@_rule(
    "sum", "mean", "amax", "amin", "prod", "any", "all", "max", "min", "argmax", "argmin", "var", "std", "var_mean",
    "std_mean", "norm", "linalg_vector_norm", "logsumexp", "median", "nanmedian", "mode", "kthvalue", "nansum",
    "nanmean", "count_nonzero", "aminmax",
)  # fmt: skip
def _reduced(call: _Call) -> Status:
    rows, ndim = call.rows, call.main.ndim
    if rows is None or not call.only_first():
        return _UNKNOWN
    dims = _dims(call.arguments.get("dim", call.arguments.get("axis")), ndim)
    if rows.dim in dims:
        return _MIXES
    if call.arguments.get("keepdim"):
        return rows
    return replace(rows, dim=rows.dim - sum(dim < rows.dim for dim in dims))


@_rule(
    "_softmax", "_log_softmax", "_safe_softmax", "cumsum", "cumprod", "cummax", "cummin", "logcumsumexp", "sort",
    "argsort", "flip", "roll", "glu", "topk", "_fft_r2c", "_fft_c2r", "_fft_c2c", "unfold", "renorm",
)  # fmt: skip
def _along(call: _Call) -> Status:
    rows, names = call.rows, ("dim", "dims", "dimension")
    if rows is None:
        return _UNKNOWN
    dims = _dims(next(call.arguments[name] for name in names if name in call.arguments), call.main.ndim)
    if call.name == "roll" and call.arguments["shifts"] in (0, [0]):
        return rows
    is_inside = call.name == "renorm"  # each slice along its dimension is measured over all others
    return rows if (rows.dim in dims) == is_inside else _MIXES


def _last(count: int) -> Rule:
    """The rule of an operator over the last `count` dimensions."""

    def rule(call: _Call) -> Status:
        if call.rows is None or not call.only_first():
            return _UNKNOWN
        return call.rows if call.rows.dim < call.main.ndim - count else _MIXES

    return rule


_SPATIAL = (
    "max_pool{}d_with_indices", "max_pool{}d", "avg_pool{}d", "adaptive_avg_pool{}d", "_adaptive_avg_pool{}d",
    "adaptive_max_pool{}d", "fractional_max_pool{}d", "reflection_pad{}d", "replication_pad{}d", "mkldnn_max_pool{}d",
    "upsample_nearest{}d", "_upsample_nearest_exact{}d",
)  # fmt: skip
_RULES.update({name.format(count): _last(count) for name in _SPATIAL for count in (1, 2, 3)})
_RULES.update(
    {
        "upsample_linear1d": _last(1), "upsample_trilinear3d": _last(3), "triu": _last(2), "tril": _last(2),
        "pixel_shuffle": _last(3), "pixel_unshuffle": _last(3), "native_channel_shuffle": _last(3),
        "channel_shuffle": _last(3), "im2col": _last(3), "col2im": _last(2),
    }
    | {f"{start}upsample_{kind}2d{end}": _last(2) for start in ("", "_") for kind in ("bilinear", "bicubic")
       for end in ("", "_aa")}
)  # fmt: skip


@_rule("native_layer_norm", "_fused_rms_norm", "rms_norm")
def _layer_norm(call: _Call) -> Status:
    return _last(len(call.arguments["normalized_shape"]))(call)


@_rule("native_group_norm")
def _group_norm(call: _Call) -> Status:
    return call.rows if call.only_first() and call.rows is not None and call.rows.dim == 0 else _UNKNOWN


@_rule(
    "native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "cudnn_batch_norm",
    "miopen_batch_norm", "_batch_norm_no_update", "_batch_norm_with_update",
)  # fmt: skip
def _batch_norm(call: _Call) -> Status:
    """With statistics of its own each channel is apart, which instance norm makes use of: it folds images into them."""
    rows = call.rows
    if rows is None or not call.only_first():
        return _UNKNOWN
    name, given = call.name, call.arguments.get("training")
    trains = name == "_batch_norm_with_update" if given is None else bool(given)
    return _MIXES if trains and rows.dim != 1 else rows


@_rule("constant_pad_nd")
def _padded(call: _Call) -> Status:
    rows, pads = call.rows, call.arguments["pad"]
    if rows is None:
        return _UNKNOWN
    place = 2 * (call.main.ndim - 1 - rows.dim)
    return _UNKNOWN if any(pads[place : place + 2]) else rows


# -------------------------------------------------------------------------------------------------- moves of dimensions


@_rule("view", "_unsafe_view", "reshape", "_reshape_alias", "_view_copy", "view_copy", "_reshape_copy")
def _reshaped(call: _Call) -> Status:
    rows, before = call.rows, call.main.shape
    if rows is None or ("dtype" in call.arguments and "size" not in call.arguments):
        return _UNKNOWN
    shape = list(call.arguments["size"] if "size" in call.arguments else call.arguments["shape"])
    if -1 in shape:
        known = -math.prod(shape)
        shape[shape.index(-1)] = math.prod(before) // known if known else 0
    # Numbers that follow one another in memory order before the next image begins, and before the images come again.
    own = rows.inner * math.prod(before[rows.dim + 1 :])
    batch = own * call.mode.num_images
    for dim in range(len(shape)):
        step, whole = math.prod(shape[dim + 1 :]), math.prod(shape[dim:])
        if step and own % step == 0 and whole % batch == 0:
            return Rows(dim, whole // batch, own // step)
    return _MIXES


@_rule("as_strided")
def _strided(call: _Call) -> Status:
    """The same numbers in the same places, which is how torch tidies strides of dimensions of size 1."""
    value, size, stride = call.main, call.arguments["size"], call.arguments["stride"]
    is_same = list(value.shape) == list(size) and call.arguments["storage_offset"] in {None, value.storage_offset()}
    moved = any(one != other and extent > 1 for one, other, extent in zip(value.stride(), stride, size, strict=False))
    return call.rows if is_same and not moved else _UNKNOWN


@_rule("permute")
def _permuted(call: _Call) -> Status:
    rows = call.rows
    assert rows is not None
    return replace(rows, dim=_dims(call.arguments["dims"], call.main.ndim).index(rows.dim))


@_rule("transpose", "t")
def _transposed(call: _Call) -> Status:
    rows, ndim = call.rows, call.main.ndim
    assert rows is not None
    one, other = _dims([call.arguments.get("dim0", 0), call.arguments.get("dim1", max(ndim - 1, 0))], ndim)
    return replace(rows, dim={one: other, other: one}.get(rows.dim, rows.dim))


@_rule("unsqueeze")
def _unsqueezed(call: _Call) -> Status:
    rows, dim = call.rows, call.arguments["dim"] % (call.main.ndim + 1)
    assert rows is not None
    return replace(rows, dim=rows.dim + (dim <= rows.dim))


@_rule("squeeze")
def _squeezed(call: _Call) -> Status:
    rows, shape = call.rows, call.main.shape
    assert rows is not None
    dims = _dims(call.arguments.get("dim"), len(shape))
    return replace(rows, dim=rows.dim - sum(shape[dim] == 1 for dim in dims if dim < rows.dim))


@_rule("expand")
def _expanded(call: _Call) -> Status:
    rows = call.rows
    assert rows is not None
    return replace(rows, dim=rows.dim + len(call.arguments["size"]) - call.main.ndim)


@_rule("repeat")
def _repeated(call: _Call) -> Status:
    rows, repeats = call.rows, call.arguments["repeats"]
    assert rows is not None
    dim = rows.dim + len(repeats) - call.main.ndim
    return Rows(dim, rows.outer * repeats[dim], rows.inner)


# ------------------------------------------------------------------------------------------------------ parts and joins


def _part(call: _Call, rows: Rows, places: Iterable[int]) -> Status:
    """What is known of those places along the images' dimension, in that order."""
    count = call.mode.num_images
    images = [place // rows.inner % count for place in places]
    inner = next((index for index, image in enumerate(images) if image != images[0]), len(images))
    if not images or len(images) % (inner * count):
        return _MIXES
    outer = len(images) // (inner * count)
    expected = [image for _ in range(outer) for image in range(count) for _ in range(inner)]
    return Rows(rows.dim, outer, inner) if images == expected else _MIXES


@_rule("slice")
def _sliced(call: _Call) -> Status:
    rows, size = call.rows, call.main.shape
    assert rows is not None
    dim = call.arguments["dim"] % len(size)
    given = slice(*(call.arguments[name] for name in ("start", "end", "step")))
    return rows if dim != rows.dim else _part(call, rows, range(size[dim])[given])


@_rule("narrow")
def _narrowed(call: _Call) -> Status:
    rows, start = call.rows, call.arguments["start"]
    assert rows is not None
    if call.arguments["dim"] % call.main.ndim != rows.dim:
        return rows
    return _part(call, rows, range(start, start + call.arguments["length"]))


@_rule("select", "unbind")
def _selected(call: _Call) -> Status:
    rows, dim = call.rows, call.arguments["dim"] % call.main.ndim
    assert rows is not None
    return _MIXES if dim == rows.dim else replace(rows, dim=rows.dim - (dim < rows.dim))


@_rule("split", "split_with_sizes", "chunk", "tensor_split")
def _parted(call: _Call) -> Status:
    rows = call.rows
    assert rows is not None
    if call.arguments["dim"] % call.main.ndim != rows.dim:
        return rows
    size = call.main.shape[rows.dim]
    sizes = call.arguments.get("split_size", call.arguments.get("split_sizes"))
    if sizes is None:
        return _UNKNOWN
    sizes = sizes if isinstance(sizes, list | tuple) else [sizes] * -(-size // sizes)
    found, start = set[Status](), 0
    for each in sizes:
        found.add(_part(call, rows, range(start, min(start + each, size))))
        start += each
    return found.pop() if len(found) == 1 else _MIXES if _MIXES in found else _UNKNOWN


@_rule("cat", "concat", "stack", "hstack", "vstack")
def _joined(call: _Call) -> Status:
    tensors = [each for each in call.arguments["tensors"] if each.numel()]
    found = [call.rows_of(each) for each in tensors]
    known = {rows for rows in found if rows is not None}
    is_stack = call.name == "stack"
    if call.name not in {"cat", "stack"}:
        return _UNKNOWN
    dim = call.arguments["dim"] % (tensors[0].ndim + is_stack)
    if is_stack:
        rows = known.pop()
        return _MIXES if known else replace(rows, dim=rows.dim + (dim <= rows.dim))
    if all(rows.dim != dim for rows in known):
        return known.pop() if len(known) == 1 else _MIXES
    if None in found or len({(rows.dim, rows.inner) for rows in known}) > 1:
        return _UNKNOWN  # rows of zeros that are taken off again, perhaps
    first = next(iter(known))
    return replace(first, outer=sum(rows.outer for rows in found if rows is not None))


@_rule("index_select")
def _index_selected(call: _Call) -> Status:
    rows, index = call.rows, call.tensor("index")
    if rows is None or call.rows_of(index) is not None:
        return _UNKNOWN
    if call.arguments["dim"] % call.main.ndim != rows.dim:
        return rows
    return _part(call, rows, index.reshape(-1).tolist())


@_rule("index")
def _indexed(call: _Call) -> Status:
    rows, indices = call.rows, call.arguments["indices"]
    used = {dim: each for dim, each in enumerate(indices) if each is not None}
    if rows is None or any(each.dtype in {torch.bool, torch.uint8} for each in used.values()):
        return _UNKNOWN
    if list(used) != list(range(min(used), max(used) + 1)):
        return _UNKNOWN
    if rows.dim not in used:
        if any(call.rows_of(each) is not None for each in used.values()):
            return _UNKNOWN
        ndim = max(each.ndim for each in used.values())
        return rows if rows.dim < min(used) else replace(rows, dim=rows.dim - len(used) + ndim)
    index = used[rows.dim]
    if len(used) > 1 or index.ndim != 1 or call.rows_of(index) is not None:
        return _UNKNOWN
    return _part(call, rows, (index % call.main.shape[rows.dim]).tolist())


@_rule("gather")
def _gathered(call: _Call) -> Status:
    rows, index = call.rows, call.rows_of(call.tensor("index"))
    if rows is None or index not in {None, rows} or call.arguments["dim"] % call.main.ndim == rows.dim:
        return _UNKNOWN
    return rows


@_rule("embedding")
def _embedded(call: _Call) -> Status:
    rows = call.rows_of(call.tensor("indices"))
    return _UNKNOWN if rows is None or call.rows is not None else rows


# ------------------------------------------------------------------------------------------------------------- products


@_rule("convolution", "mkldnn_convolution", "cudnn_convolution", "_convolution", "deform_conv2d", "grid_sampler_2d",
       "grid_sampler_3d", "cudnn_grid_sampler")  # fmt: skip
def _convolved(call: _Call) -> Status:
    operands = [each for each in tree_leaves(call.arguments) if isinstance(each, Tensor)]
    found = {rows for each in operands if (rows := call.rows_of(each)) is not None}
    first = call.rows
    if first is not None and found == {first} and first.dim == 0:
        weight = call.arguments.get("weight")
        return _UNKNOWN if isinstance(weight, Tensor) and call.rows_of(weight) is not None else first
    # Images among the channels: apart in a grouped convolution only.
    is_whole = first is not None and first.dim == 1 and call.arguments.get("groups") == 1
    return _MIXES if is_whole else _UNKNOWN


@_rule("mm", "addmm", "bmm", "baddbmm", "_addmm_activation", "linear", "mkldnn_linear", "_mkl_linear")
def _multiplied(call: _Call) -> Status:
    bias_name = "self" if "mat1" in call.arguments or "batch1" in call.arguments else "bias"
    names = {"mat1": "mat2", "batch1": "batch2", "input": "weight"}
    first = next((name for name in names if name in call.arguments), "self")
    second = names.get(first, "mat2")
    left, right = call.tensor(first), call.tensor(second)
    one, other = call.rows_of(left), call.rows_of(right)
    if call.rows_of(call.arguments.get(bias_name)) is not None and bias_name != first:
        return _UNKNOWN
    if first == "input":
        right_contracted = 1
    else:
        right_contracted = right.ndim - 2
    if (one is not None and one.dim == left.ndim - 1) or (other is not None and other.dim == right_contracted):
        return _MIXES  # summed over
    if one is not None and other is not None:
        return one if one == other and one.dim < left.ndim - 2 else _MIXES  # each image with each
    if other is not None and first == "input":
        return _UNKNOWN
    return one or other


@_rule(
    "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_attention_math", "_scaled_dot_product_fused_attention_overrideable",
    "_scaled_dot_product_attention_math_for_mps",
)  # fmt: skip
def _attended(call: _Call) -> Status:
    query, key, value = (call.tensor(name) for name in ("query", "key", "value"))
    found = [call.rows_of(each) for each in (query, key, value)]
    mask = call.arguments.get("attn_mask", call.arguments.get("attn_bias"))
    last = {rows.dim for rows in found[1:] if rows is not None}
    if query.ndim - 2 in last or query.ndim - 1 in last or (found[0] is not None and found[0].dim == query.ndim - 1):
        return _MIXES
    known = {rows for rows in (*found, call.rows_of(mask)) if rows is not None}
    return known.pop() if len(known) == 1 else _UNKNOWN


@_rule("_native_multi_head_attention", "_transformer_encoder_layer_fwd")
def _attended_whole(call: _Call) -> Status:
    operands = [each for each in tree_leaves(call.arguments) if isinstance(each, Tensor)]
    found = {rows for each in operands if (rows := call.rows_of(each)) is not None}
    return Rows(0) if found == {Rows(0)} and call.main.ndim == 3 else _UNKNOWN
