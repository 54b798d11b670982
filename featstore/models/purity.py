"""Purity: the check that a trunk's output depends on one image alone, made before anything is cached.

By structure: `batch_mixing` follows the images through every operator, of a small batch and, without data, of one of
the size that will run. By numbers, in batches of that size, where an image's company is changed and nothing else: they
alone decide about what the first has no rule for, and about Python code that could not be traced.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils._pytree import tree_leaves, tree_map

from featstore.errors import ModelError
from featstore.images.views import View
from featstore.models.batch_mixing import BatchMixing, Mixed, Rows, Status
from featstore.models.modes import eval_mode, numerics, random_states, random_states_kept
from featstore.models.probe import probe_images
from featstore.models.shapes import without_data
from featstore.models.staged import StagedModel
from featstore.models.stages import TracedStage
from featstore.models.tracing import has_fingerprint, is_library_leaf
from featstore.models.trunk import check_activations
from featstore.surroundings import Reading, noticed, readings

TOLERANCE = 1e-4
"""Difference that place and number of images may make by rounding, as a share of the output's largest value."""

NUM_REPEATS = 16
"""Runs of a stage that draws random numbers: one that uses them rarely (a branch of probability 1/4) is found too."""

FEW = 5
"""Images of the small batch. A prime, and not the number of channels of an image."""

FAR = 1e4
"""What a company beyond the range of any image consists of."""

MANY = 8
"""From this batch size on all kinds of company find room beside all images under test in one batch."""


def check_pure(
    model: StagedModel, cut: str, *, batch_size: int | None = None, device: torch.device | None = None
) -> None:
    """Checks that the trunk up to `cut`, in eval mode, is a function of one image.

    Runs two batches of five images, and some of the size that will run, which a model may treat in another way
    (statistics of groups of 8): about four; one where structure shows that no image meets another and only numbers can
    show that their count and place don't matter; none where no operation asks for these either. The model's tensors and
    flags and all global random states are left as they were.

    Args:
        model: never changed.
        cut: where the trunk ends.
        batch_size: images in each batch of the passes to come, if they are known.
        device: where they run; default: where the model is.

    Raises:
        ModelError: if the output changes from run to run (dropout left on, a counter, the time), or with the other
            images of the batch, their number or the place among them (batch norm without running statistics); the first
            operation that does is named. If it hasn't one row an image. And while a mode of torch's is active, which
            may change what any operation computes.
    """
    refuse_modes(model, cut)
    trunk = model.trunk(cut)
    if device is not None and any(each.device != device for each in (*trunk.parameters(), *trunk.buffers())):
        trunk = copy.deepcopy(trunk).to(device)
    parameter = next(trunk.parameters(), torch.empty(0, device=device))
    images = model.view.normalise(_images(model.view)).to(parameter)
    with eval_mode(trunk), torch.no_grad(), numerics("fp32", parameter.device), random_states_kept():
        check = _Check(model.name, cut, list(trunk))
        few = check.walked(images)
        if not _has_rows(few, FEW):
            raise check.without_rows(few, FEW)
        if batch_size == 1:
            check.compare_number(1)
        elif batch_size in {None, FEW} or not check.is_apart_without_data(batch_size or FEW, images):
            check.compare(batch_size or FEW)
        elif check.asks_for_sizes:
            check.compare_places(batch_size)
        if batch_size is None:  # another number of images; where it is fixed, all passes have that one
            check.compare_number(2)


def refuse_modes(model: StagedModel, cut: str) -> None:
    """Raises ModelError while a mode of torch's is active, but for a default device."""
    modes: list[Any] = _get_current_function_mode_stack()  # type: ignore[no-untyped-call]
    for mode in [*modes, *_get_current_dispatch_mode_stack()]:
        if type(mode) is not DeviceContext:  # that of `with torch.device(...)` only says where tensors are made
            raise ModelError(
                f"{model.name} can't be cached at {cut} while {type(mode).__module__}.{type(mode).__qualname__} is "
                "active: a mode may change what each operation computes, which no key can see. Leave its with block."
            )


def _images(view: View) -> Tensor:
    """An ordinary image and one of full contrast, a dark one, a saturated one and a flat one: uint8."""
    first, second = probe_images(view.size, view.channels)
    flat = [torch.full_like(first, level) for level in (0, 255, 128)]
    return torch.stack([64 + first // 2, second, *flat])


@dataclass(frozen=True, kw_only=True)
class _Unit:
    """Stages that run as one, from rows to rows; `rows` holds what comes in for each of the five images."""

    stages: list[nn.Module]
    rows: Tensor
    result: Any  # what comes out for them


class _Check:
    """One trunk under test: first `walked` with a small batch, then compared in batches of other sizes."""

    def __init__(self, name: str, cut: str, stages: list[nn.Module]) -> None:
        self.name, self.cut, self.stages = name, cut, stages
        self.units: list[_Unit] = []
        self.is_decided = True  # by structure, so far
        self.asks_for_sizes = False  # whether an operation may know how many images there are, and which is which

    # -------------------------------------------------------------------------------------------------- a small batch

    def walked(self, images: Tensor) -> Any:
        """The output for `images`; refuses what isn't repeatable and what mixes images by its structure.

        Notes the units to compare: a stage that structure can't decide about is one of its own, so that it meets
        extremes at its own input, whatever the stages before it make of theirs.
        """
        values: Any = images
        known: list[Status] = [Rows(0)]
        start, rows = 0, images
        for index, stage in enumerate(self.stages):
            mixing = BatchMixing(len(images))
            with noticed() as read:
                after, known_after = _followed(stage, values, known, mixing)
            is_end = index + 1 == len(self.stages)
            for value in _tensors(after):
                check_activations(value, name=self.name, cut=str(stage.name), is_taken=is_end)
            is_apart = _is_opaque(stage) or not mixing.is_decided
            self.is_decided &= not is_apart
            self.asks_for_sizes |= mixing.asks_for_sizes
            if is_apart and index > start and _are_rows(values, known, len(images)):
                self.units.append(_Unit(stages=self.stages[start:index], rows=rows, result=values))
                start, rows = index, values
            self._refuse_changing(stage, values, after)
            self._refuse_reading(stage, read)
            where = next((each.where for each in known_after if isinstance(each, Mixed)), None)
            if where is not None:
                raise self._mixes(where)
            values, known = after, known_after
            if is_end or (is_apart and _has_rows(values, len(images))):
                self.units.append(_Unit(stages=self.stages[start : index + 1], rows=rows, result=values))
                start, rows, known = index + 1, values, [Rows(0)]  # the unit's own comparison proves it
        return values

    def _refuse_changing(self, stage: nn.Module, values: Any, after: Any) -> None:
        is_opaque = _is_opaque(stage)
        facts = _facts(stage) if is_opaque else None
        if not _is_repeatable(stage, values, after):
            what = f"{_random_operation(stage, values)} gives other values each time it runs, also in eval mode"
            raise ModelError(
                f"{self.name} can't be cached at {self.cut}: {what}. Make it depend on self.training (nn.Dropout "
                "does), or cut before it."
            )
        if is_opaque and _facts(stage) != facts:
            raise ModelError(
                f"{self.name} can't be cached at {self.cut}: {_opaque_parts(stage)[0][0]} changes what it keeps (a "
                "counter, a list, a buffer) each time it runs, and may depend on it. Change it in train mode alone, or "
                "cut before it."
            )

    def _refuse_reading(self, stage: nn.Module, read: Sequence[Reading]) -> None:
        """Refuses untraced code that reads what no key covers, by its names and by what it `read` in a run."""
        for where, part in _opaque_parts(stage):
            if has_fingerprint(part):
                continue
            for reading in (*read, *_readings(part)):
                raise ModelError(
                    f"{self.name} can't be cached at {self.cut}: {where} reads {reading}, and no run can show that "
                    "its values don't depend on it. Take that out of its code (what the model reads and keeps when "
                    "it is made is in the key), vouch for it with a method fingerprint(), or cut before it."
                )

    # --------------------------------------------------------------------------------------------- batches of a size

    def is_apart_without_data(self, num_images: int, images: Tensor) -> bool:
        """Whether structure shows that no image meets another in batches of that size either, as in the small one."""
        if not self.is_decided:
            return False
        values: Any = images.new_empty((num_images, *images.shape[1:]), device="meta")
        known: list[Status] = [Rows(0)]
        try:  # without data an operator may have no kernel, and a table no numbers
            for stage in self.stages:
                mixing = BatchMixing(num_images)
                for value, status in zip(_tensors(values), known, strict=True):
                    mixing.set(value, status)
                with mixing:
                    values = without_data(stage, values)
                known = [mixing.status(value) for value in _tensors(values)]
                if not mixing.is_decided:
                    return False
        except Exception:
            return False
        return known == [Rows(0)]

    def compare_places(self, num_images: int) -> None:
        """Refuses a trunk that gives an image another row at another place of a batch of that size."""
        rows = [*islice(cycle(self.units[0].rows), num_images)]
        few = self.units[-1].result
        values = _run(self.stages, rows)
        if not _has_rows(values, num_images) or values.shape[1:] != few.shape[1:]:
            raise self.without_rows(values, num_images)
        for place in range(num_images):
            number = place % FEW
            if not _close(few[number], values[place]):
                where = _differing(self.stages, ([*self.units[0].rows], number), (rows, place), _close)
                raise self._mixes(f"{where}, in batches of {num_images},")

    def compare(self, num_images: int) -> None:
        """Refuses a unit whose result for an image depends on company, place or number in batches of that size."""
        for unit in self.units:
            is_last = unit is self.units[-1]
            try:
                self._compare_unit(unit, num_images, _Kinds.of(unit.rows), is_last=is_last)
            except ModelError:
                raise
            except Exception:  # a person's code may refuse what no image gives; what it refuses it doesn't compute
                self._compare_unit(unit, num_images, _Kinds.plain(unit.rows), is_last=is_last)

    def compare_number(self, num_images: int) -> None:
        """Refuses a trunk that gives ordinary images other rows, or none, in batches of that size, at most 2."""
        unit = _Unit(stages=self.stages, rows=self.units[0].rows, result=self.units[-1].result)
        rows = list(unit.rows[:num_images])
        values = _run(unit.stages, rows)
        if not _has_rows(values, num_images) or values.shape[1:] != unit.result.shape[1:]:
            raise self.without_rows(values, num_images)
        for place in range(num_images):
            if not _close(unit.result[place], values[place]):
                where = _differing(unit.stages, ([*unit.rows], place), (rows, place), _close)
                raise self._mixes(f"{where}, in batches of {num_images},")

    def _compare_unit(self, unit: _Unit, num_images: int, kinds: _Kinds, *, is_last: bool) -> None:
        def refuse(one: _Seen, other: _Seen, agree: _Agree) -> None:
            where = _differing(unit.stages, one, other, agree)
            raise self._mixes(where if num_images == FEW else f"{where}, in batches of {num_images},")

        kept: dict[int, tuple[_Seen, Tensor]] = {}  # under test -> where its row came from
        for batch in kinds.batches(num_images):
            result = _run(unit.stages, batch.rows)
            if not _has_rows(result, num_images) or result.shape[1:] != unit.result.shape[1:]:
                if is_last:
                    raise self.without_rows(result, num_images)
                refuse((list(unit.rows), 0), (batch.rows, 0), _close)
            for number, place in batch.tested.items():
                seen = (batch.rows, place)
                if number in kept and not _equal(kept[number][1], result[place]):
                    refuse(kept[number][0], seen, _equal)
                kept.setdefault(number, (seen, result[place].clone()))
            for one, other in batch.alike:
                if not _close(result[one], result[other]):
                    refuse((batch.rows, one), (batch.rows, other), _close)
            if batch.ordinary is not None and not _close(unit.result[0], result[batch.ordinary]):
                refuse((list(unit.rows), 0), (batch.rows, batch.ordinary), _close)

    # ------------------------------------------------------------------------------------------------------ refusals

    def without_rows(self, values: Any, num_images: int) -> ModelError:
        """The refusal of a value that hasn't one row for each of so many images."""
        shape = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        images = f"{num_images} image{'s' if num_images > 1 else ''}"
        return ModelError(
            f"{self.name} can't be cached at {self.cut}: for {images} the value there is {shape}, and rows are images. "
            f"Cut before or after it{', or take another batch size' if num_images == 1 else ''}."
        )

    def _mixes(self, what: str) -> ModelError:
        return ModelError(
            f"{self.name} can't be cached at {self.cut}: what {what} gives for an image depends on the other images of "
            "the batch, or on its place in it. Batch norm needs running statistics (track_running_stats=True) for eval "
            "mode; code that goes from image to image must compute all of them in one operation; or cut before it."
        )


_Seen = tuple[list[Tensor], int]
"""A batch, and a place in it."""

_Agree = Callable[[Any, Any], bool]


@dataclass(frozen=True, kw_only=True)
class _Batch:
    """What runs together.

    Attributes:
        tested: number of a row under test -> its place. Whatever the company, the result there is the same to the bit.
        alike: pairs of places with equal rows.
        ordinary: the place of the ordinary image, if it is there.
    """

    rows: list[Tensor]
    tested: dict[int, int]
    alike: list[tuple[int, int]]
    ordinary: int | None = None


@dataclass(frozen=True, kw_only=True)
class _Kinds:
    """The rows under test, each with a company of its own kind, and the company that is of all other kinds.

    A small row among small ones, a high one among high ones and a low one among low ones, and then all of them among
    everything: so each extreme of a batch, and each threshold on one, is passed in both directions.
    """

    ordinary: Tensor
    tested: list[tuple[Tensor, Tensor]]
    company: list[Tensor]

    @classmethod
    def of(cls, rows: Tensor) -> _Kinds:
        if not rows.is_floating_point() or not rows[0].numel():
            return cls.plain(rows)
        ordinary, other, dark, saturated, flat = rows
        most = torch.finfo(rows.dtype).max / 4
        largest = ordinary.abs().nan_to_num(0, 0, 0).max()
        high, higher = ordinary.abs() + largest, other.abs() + largest
        beyond = (ordinary.abs() * FAR + FAR).clamp(max=most)
        zeros = torch.zeros_like(ordinary)
        return cls(
            ordinary=ordinary,
            tested=[(ordinary / 128, zeros), (high, higher), (-high, -higher)],
            company=[beyond, -beyond, zeros, saturated, dark, other, flat, ordinary.flip(-1), ordinary],
        )

    @classmethod
    def plain(cls, rows: Tensor) -> _Kinds:
        """Of what images give alone: for numbers that count something, and for code that refuses others."""
        ordinary, other, dark, saturated, flat = rows
        return cls(
            ordinary=ordinary,
            tested=[(ordinary, ordinary), (saturated, saturated), (dark, dark)],
            company=[other, flat, saturated, dark, ordinary],
        )

    def batches(self, num_images: int) -> Iterator[_Batch]:
        """Batches of one size in which each row under test has all kinds of company at one place."""
        for number, (row, own) in enumerate(self.tested):
            place = number if num_images >= MANY else 0
            alone = [row if (index - place) % 2 == 0 or num_images < MANY else own for index in range(num_images)]
            alike = [(place, index) for index, each in enumerate(alone) if each is row and index != place]
            yield _Batch(rows=alone, tested={number: place}, alike=alike)
            if num_images < MANY:
                for start in range(0, len(self.few), num_images - 1):
                    some = self.few[start : start + num_images - 1]
                    rows = [*islice(cycle([row, *some]), num_images)]
                    yield _Batch(rows=rows, tested={number: 0}, alike=[], ordinary=_place_of(self.ordinary, rows))
        if num_images >= MANY:
            some = [row for row, _ in self.tested]
            rows = [*some, self.ordinary, *islice(cycle(self.company), num_images - len(some) - 1)]
            tested = {number: number for number in range(len(some))}
            yield _Batch(rows=rows, tested=tested, alike=[], ordinary=len(some))

    @property
    def few(self) -> list[Tensor]:
        """The company that goes furthest, for batches without room."""
        return [*self.company[:3], self.ordinary]


def _place_of(row: Tensor, rows: list[Tensor]) -> int | None:
    return next((index for index, each in enumerate(rows) if each is row), None)


# ------------------------------------------------------------------------------------------------------ running stages


def _run(stages: Sequence[nn.Module], rows: list[Tensor]) -> Any:
    values: Any = torch.stack(rows)
    for stage in stages:
        values = stage(values)
    return values


def _once(stage: nn.Module, values: Any) -> Any:
    return stage(_copied(values))


def _copied(values: Any) -> Any:
    # A stage may write into its input.
    return tree_map(lambda value: value.clone() if isinstance(value, Tensor) else value, values)


def _followed(stage: nn.Module, values: Any, known: list[Status], mixing: BatchMixing) -> tuple[Any, list[Status]]:
    """What the stage gives, and what is known of each tensor of it, in order."""
    values = _copied(values)
    for value, status in zip(_tensors(values), known, strict=True):
        mixing.set(value, status)
    mixing.place = _stage_name(stage)
    with mixing:
        result = _Follower(stage, mixing).run(values) if isinstance(stage, TracedStage) else stage(values)
    return result, [mixing.status(value) for value in _tensors(result)]


class _Follower(fx.Interpreter):
    """Runs a graph and tells which operation runs."""

    def __init__(self, stage: TracedStage, mixing: BatchMixing) -> None:
        super().__init__(stage.in_eval)
        self.stage, self.mixing = stage, mixing

    def run_node(self, n: fx.Node) -> Any:
        self.mixing.place = _described(n, self.stage)
        result = super().run_node(n)
        self.mixing.asks_for_sizes |= _asks_for_sizes(n, self.stage, result)
        return result


def _asks_for_sizes(node: fx.Node, stage: TracedStage, result: Any) -> bool:
    """Whether an operation may tell how many images there are, and so which is which.

    It gives numbers, or a tensor of another one's shape, or is code of others than torch.
    """
    if node.op in {"output", "placeholder", "get_attr"}:
        return False
    target: Any = node.target
    if node.op == "call_module":
        made_by, name = type(stage.in_eval.get_submodule(target)).__module__, ""
    elif node.op == "call_method":
        made_by, name = "torch", target
    else:
        made_by, name = getattr(target, "__module__", None) or "torch", getattr(target, "__name__", "")
    is_known = made_by.partition(".")[0] in {"torch", "_operator", "builtins", "math"}
    is_made = name.endswith("_like") or name.startswith("new_")
    return is_made or not is_known or not all(isinstance(each, Tensor) for each in tree_leaves(result))


def _tensors(values: Any) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


def _has_rows(values: Any, num_images: int) -> bool:
    return isinstance(values, Tensor) and values.ndim > 0 and len(values) == num_images


def _are_rows(values: Any, known: list[Status], num_images: int) -> bool:
    return _has_rows(values, num_images) and (not isinstance(known[0], Rows) or known[0] == Rows(0))


def _is_repeatable(stage: nn.Module, values: Any, result: Any) -> bool:
    before = random_states()
    again = _once(stage, values)
    if not _equal(again, result) and not _equal(again, _once(stage, values)):
        return False  # the first result was had in another way, the others weren't
    draws = random_states() != before
    return not draws or all(_equal(_once(stage, values), again) for _ in range(NUM_REPEATS))


# ------------------------------------------------------------------------------------------------------------- opaque


def _opaque_parts(stage: nn.Module) -> list[tuple[str, nn.Module]]:
    """The modules of a stage that couldn't be traced, described; of a stage that isn't traced itself."""
    if not isinstance(stage, TracedStage):
        return [(_stage_name(stage), stage)]
    calls = [node for node in stage.in_eval.graph.nodes if node.op == "call_module"]
    parts = [(_described(node, stage), stage.in_eval.get_submodule(str(node.target))) for node in calls]
    return [(where, part) for where, part in parts if not is_library_leaf(part)]


def _is_opaque(stage: nn.Module) -> bool:
    return bool(_opaque_parts(stage))


def _facts(stage: nn.Module) -> str | None:
    """What a stage is made of, with what its code reads and keeps; None where that has no key."""
    if not isinstance(stage, TracedStage):
        return None
    try:
        return stage.digest("")
    except ModelError:
        return None


def _readings(module: nn.Module) -> Iterator[Reading]:
    """What the code of `module` reads; random numbers are found by running it."""
    parts = [each for each in module.modules() if not has_fingerprint(each)]
    hooks = [[*each._forward_pre_hooks.values(), *each._forward_hooks.values()] for each in parts]
    found = readings(parts, hooks, methods=("forward", "__call__"))
    return (reading for reading in found if reading.kind != "a global random state")


# -------------------------------------------------------------------------------------------------------------- naming


def _random_operation(stage: nn.Module, values: Any) -> str:
    """The first operation of `stage` whose result differs from run to run, in words."""
    for _ in range(NUM_REPEATS):
        found = _first_differing(stage, (values, _copied), (values, _copied), _equal)
        if found is not None:
            return found
    parts = _opaque_parts(stage)  # what torch draws was seen above; code that follows a clock may keep step with us
    return parts[0][0] if len(parts) == 1 else _stage_name(stage)


def _differing(stages: Sequence[nn.Module], one: _Seen, other: _Seen, agree: _Agree) -> str:
    """The first operation whose results at two places of two batches differ, in words."""
    mine, others = (torch.stack(rows) for rows, _ in (one, other))
    for stage in stages:
        found = _first_differing(stage, (mine, _row_of(one)), (others, _row_of(other)), agree)
        if found is not None:
            return found
        mine, others = _once(stage, mine), _once(stage, others)
    return _stage_name(stages[-1])


def _row_of(seen: _Seen) -> Callable[[Any], Any]:
    rows, place = seen
    return lambda value: value[place].clone() if _has_rows(value, len(rows)) else None


_Kept = tuple[Any, Callable[[Any], Any]]
"""What goes into a stage, and what of an operation's result is compared."""


def _first_differing(stage: nn.Module, one: _Kept, other: _Kept, agree: _Agree) -> str | None:
    """The first operation of `stage` whose two results don't agree, in words."""
    if not isinstance(stage, TracedStage):
        mine, others = (keep(_once(stage, values)) for values, keep in (one, other))
        return None if agree(mine, others) else _stage_name(stage)
    mine, others = (_Recorder(stage, keep).results(values) for values, keep in (one, other))
    for node in stage.in_eval.graph.nodes:
        if node.op not in {"placeholder", "get_attr", "output"} and not agree(mine[node], others[node]):
            return _described(node, stage)
    return None


class _Recorder(fx.Interpreter):
    """Runs a graph and keeps something of each result, a copy since a later operation may write into it."""

    def __init__(self, stage: TracedStage, keep: Callable[[Any], Any]) -> None:
        super().__init__(stage.in_eval)
        self.keep = keep
        self.kept: dict[fx.Node, Any] = {}

    def results(self, values: Any) -> dict[fx.Node, Any]:
        self.run(_copied(values))
        return self.kept

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        self.kept[n] = self.keep(result)
        return result


def _stage_name(stage: nn.Module) -> str:
    return f"stage {getattr(stage, 'name', type(stage).__name__)}"


def _described(node: fx.Node, stage: TracedStage) -> str:
    if node.op == "call_module":
        return f"{node.target} ({type(stage.in_eval.get_submodule(str(node.target))).__name__})"
    function = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", node.name)
    return f"{function} in stage {stage.name}"


def _equal(one: Any, other: Any) -> bool:
    """Whether two results are the same to the last bit; not-a-number is the same as itself."""
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return True
    return torch.equal(one, other) or (
        one.shape == other.shape and bool(((one == other) | (one.isnan() & other.isnan())).all())
    )


def _close(one: Any, other: Any) -> bool:
    """Whether two results differ by rounding alone."""
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return True
    if one.shape != other.shape:
        return False
    one, other = one.double(), other.double()
    largest = float(one.nan_to_num(posinf=0, neginf=0).abs().max()) if one.numel() else 0.0
    is_close = (one - other).abs() <= TOLERANCE * max(largest, 1e-30)
    return bool((is_close | (one == other) | (one.isnan() & other.isnan())).all())
