"""StagedModel: a network as an ordered sequence of named stages that can be cut, frozen, thawed and given a head.

Long, since what is asked of the stages and what is done to them share the list that `with_head` and thawing replace.
"""

from __future__ import annotations

import copy
import difflib
import math
from collections import OrderedDict
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from fnmatch import fnmatchcase
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from featstore.digest import Json
from featstore.errors import ModelError
from featstore.images.views import View
from featstore.models.adapters import picking
from featstore.models.digests import START
from featstore.models.graph import refuse_patched, split_into_stages
from featstore.models.modes import check_trainable, eval_mode
from featstore.models.names import MemoryFormat, automatic
from featstore.models.pool import Pool
from featstore.models.shapes import Measured, Tail, layout_from, measured, view_for, wrong_channels
from featstore.models.stages import AbsentStage, HeadStage, PoolStage, Stage, TracedStage
from featstore.models.wrappers import unwrapped
from featstore.remedies import Command
from featstore.timing import timed
from featstore.words import some

MOST_LISTED, MOST_NEAR = 20, 5
"""Cuts that a message lists; of more those that are like the one that was asked for."""
POOL, HEAD = "pool", "head"
"""Names of the two stages that `StagedModel.with_head` adds; a number follows where a backbone has such a name."""


class StagedModel(nn.Module):
    """A network as named stages. Trunk and tail are views of it that share its parameters.

    Frozen stages get no gradient and run in eval mode whatever `train()` says. A model made by `with_head` shares its
    stages with the model it came from; thawing such a stage replaces it by a copy, so that model is never changed.

    Attributes:
        stages: in order, as the module's list; `ordered` gives them with their type.
        view: how images are prepared for it, its weights' own evaluation view.
        named_view: the view that a command gets by the names in `origin`, whatever `view` was replaced by.
        name: a label for people and folders.
        origin: how a command line names it (backbone, weights), empty for a model made in Python.
        class_tokens: tokens at the start of each NLC value that stand for the whole image.
        prefix_tokens: tokens there that are no patches: class tokens and registers.
        patch_cuts: names of the NLC values that hold patches alone.
        fixed_size: the only image size it takes (a ViT), or None.
        notes: sentences about how it was made that its user should read once.
        unused: names of tensors of the module it was made from that its output doesn't depend on.
        other_names: of tensors that the module has under several names -> the one that stands for all.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        *,
        view: View,
        name: str,
        layouts: Mapping[str, str] | None = None,
        class_tokens: int = 0,
        origin: Mapping[str, Json] | None = None,
        default_cut: str | None = None,
        fixed_size: int | None = None,
    ) -> None:
        super().__init__()
        self.stages = nn.ModuleList(stages)
        self.fixed_size = fixed_size
        self.notes: tuple[str, ...] = ()
        self.unused: frozenset[str] = frozenset()
        self.other_names: dict[str, str] = {}
        self.training = any(stage.training for stage in stages)
        self._default_cut = default_cut
        self.view, self.named_view, self.name, self.class_tokens = view, view, name, class_tokens
        self.prefix_tokens, self.patch_cuts = class_tokens, frozenset[str]()
        self.origin = dict(origin or {})
        self._layouts = dict(layouts or {})
        self._num_frozen = 0
        self._num_shared = 0  # the first so many stages belong to another model as well
        self._refused: set[int] = set()  # sizes that it was found not to take
        # By channels and size of images, and whether with data.
        self._measured: dict[tuple[int, int, MemoryFormat | None], dict[str, Measured]] = {}

    @classmethod
    def from_module(
        cls,
        module: nn.Module,
        *,
        view: View | None = None,
        name: str | None = None,
        layouts: Mapping[str, str] | None = None,
        class_tokens: int = 0,
        containers: Collection[str] = (),
        origin: Mapping[str, Json] | None = None,
        fixed_size: int | None = None,
    ) -> StagedModel:
        """A staged model of `module`, cut wherever one value alone crosses; it shares the module's parameters.

        Args:
            module: takes float images ``(N, 3, H, W)``, or gray ones ``(N, 1, H, W)``; returns one tensor ``(N, ...)``.
            view: how images are prepared; default: 256/224 and ImageNet's mean and standard deviation. Made a gray one
                where the first layer takes one channel.
            name: a label; default: the class's name.
            layouts: of the values whose layout their shape doesn't show, by the name of the cut; ``*`` in it stands for
                anything.
            class_tokens: 1 for a transformer whose first token stands for the image.
            containers: module paths too coarse to name a cut.
            origin: how a command line names this model.
            fixed_size: the only image size it takes, if there is just one.

        Raises:
            ModelError: what can't be traced or keyed, named.
        """
        with timed("trace"), unwrapped(module) as (module, notes):
            state = module.state_dict(keep_vars=True)
            graphs, auxiliaries = split_into_stages(module, containers=containers)
            stages = [TracedStage(stage, state.keys()) for stage in graphs]
        for stage in graphs:
            refuse_patched(stage.eval)  # a layer that is back in its wrapper, a module that stays whole
        fitted = view_for(stages[0], view or View())
        model = cls(
            stages,
            view=fitted,
            name=name or type(module).__name__.lower(),
            layouts=layouts,
            class_tokens=class_tokens,
            origin=origin,
            fixed_size=fixed_size,
        )
        own = model.tensors().keys()
        names = {id(state[name]): name for name in reversed(own)}
        model.other_names = {
            name: names[id(value)] for name, value in state.items() if names.get(id(value), name) != name
        }
        model.unused = frozenset(state.keys() - own - model.other_names.keys())
        if fitted != (view or View()):
            notes += (
                f"its first layer takes 1 channel: images are made gray, mean {fitted.mean[0]:g} and std "
                f"{fitted.std[0]:g} assumed; --mean --std",
            )
        if auxiliaries:
            notes += (
                f"{', '.join(auxiliaries)}: left out, as it makes a further output in train mode alone (an auxiliary "
                "classifier); a fit has no loss for it",
            )
        model.notes = notes
        return model

    @classmethod
    def from_stages(cls, stages: Mapping[str, nn.Module], **options: Any) -> StagedModel:
        """A staged model of modules that run one after the other, by name; `options` as in `from_module`."""
        return cls.from_module(nn.Sequential(OrderedDict(stages)), **options)

    @classmethod
    def absent(cls, stages: Sequence[Mapping[str, Json]], *, view: View, name: str, class_tokens: int) -> StagedModel:
        """A trunk known by what was recorded of it: name, layout, shape and digest of each stage."""
        known = [
            AbsentStage(name=stage["name"], layout=stage["layout"], shape=tuple(stage["shape"]), digest=stage["digest"])
            for stage in stages
        ]
        return cls(known, view=view, name=name, class_tokens=class_tokens)

    # ------------------------------------------------------------------------------------------------ cuts and digests

    @property
    def ordered(self) -> tuple[Stage, ...]:
        """The stages in order."""
        return tuple(self.stages)  # type: ignore[arg-type]

    @property
    def cut_points(self) -> list[str]:
        """Names of the values that alone cross, in order; the last is the output (or the last before pool and head)."""
        return [stage.name for stage in self.ordered if not isinstance(stage, PoolStage | HeadStage)]

    @property
    def default_cut(self) -> str:
        """Where a head goes if nobody says: the last map or tokens before the network's own pooling.

        A classifier that works at each position (squeezenet's last convolution) and what follows it come after the cut.
        Values that only dropout or the pooling made are passed over; class tokens alone, without patches, count as
        tokens. A network without maps or tokens is cut at the vector before its last layer with parameters.
        """
        if self._default_cut is not None:
            return self._default_cut
        stages = [stage for stage in self.ordered if not isinstance(stage, PoolStage | HeadStage)]
        if isinstance(stages[-1], AbsentStage):
            return stages[-1].name
        last = max((index for index, stage in enumerate(stages) if any(True for _ in stage.parameters())), default=0)
        before = [stage.name for stage in stages[:last] if stage.has_effect]
        poolings = {stage.name for stage in stages if stage.is_pooling}
        # Without its classifier (fc = Identity()) the last layer with parameters belongs to the trunk; one that stands
        # alone may be either.
        is_headless = not stages[last].is_classifier and len(stages) > 1
        candidates = [stage.name for stage in stages if stage.has_effect] if is_headless else before
        with_positions = [name for name in candidates if name not in poolings and self._has_positions(name)]
        if not with_positions and not before:
            raise ModelError(
                f"{self.name} has no value before its last layer with parameters ({stages[last].name}), so there is "
                f"no default cut. Name one: {some(self.cut_points)}."
            )
        return (with_positions or before)[-1]

    def index(self, cut: str) -> int:
        """The place of the stage that ends in the value `cut`, by its name or any other name of it.

        Raises:
            TypeError: for a number: fastai 0.7 named groups by index, here values have names.
            ValueError: for a name that no cut has; the message lists the cuts.
        """
        if not isinstance(cut, str):
            raise TypeError(
                f"{cut!r} is no name of a cut. Groups aren't numbered here: name the last frozen stage, for example "
                f'freeze_to("{self._example_cut()}"). unfreeze() trains everything.'
            )
        for index, stage in enumerate(self.ordered):
            if cut == stage.name or cut in stage.aliases:
                return index
        raise ValueError(f"{self.name} has no cut {cut!r}. {self._cuts_like(cut)}")

    def _cuts_like(self, cut: str) -> str:
        """All cuts in a sentence, where there are few; else those that may have been meant, and how many there are."""
        names = self.cut_points
        if len(names) <= MOST_LISTED:
            return f"Its cuts are {', '.join(names)}."
        below = [name for name in names if name.startswith(f"{cut}.")]
        near = difflib.get_close_matches(cut, names, n=MOST_NEAR, cutoff=0.5)
        shown = list(dict.fromkeys([*below[-1:], *near, self._example_cut()]))[:MOST_NEAR]
        name = self.origin.get("backbone")
        found = "model.cut_points" if name is None else str(Command("featstore", "backbones", str(name)))
        return f"The nearest of its {len(names):,} cuts are {', '.join(shown)}. All of them: {found}."

    def _example_cut(self) -> str:
        """A cut that a person might have meant: where the head goes, else the last but one."""
        try:
            return self.default_cut
        except ModelError:
            return self.cut_points[max(len(self.cut_points) - 2, 0)]

    def canonical(self, cut: str) -> str:
        """The name under which `cut` is listed."""
        return self.ordered[self.index(cut)].name

    def trunk(self, cut: str) -> nn.Sequential:
        """The stages up to `cut`, sharing parameters and modes with this model."""
        return nn.Sequential(*self.ordered[: self.index(cut) + 1])

    def tail(self, cut: str) -> nn.Sequential:
        """The stages after `cut`: ``tail(cut)(trunk(cut)(x))`` is ``model(x)``, also with the trunk's output stored."""
        return self.part(self.index(cut) + 1)

    @property
    def unfrozen(self) -> nn.Sequential:
        """The stages that aren't frozen, as `tail`."""
        return self.part(self._num_frozen)

    def takes(self, memory_format: MemoryFormat) -> bool:
        """Whether it runs over images of its view's size that lie so in memory, which two empty ones show."""
        if memory_format == "contiguous":
            return True
        try:
            self._measured_for(self.view.size, memory_format)
        except Exception:  # also for values without a shape, which are refused where they are computed
            return False
        return True

    def part(self, start: int, stop: int | None = None, *, memory_format: MemoryFormat = "contiguous") -> nn.Sequential:
        """The stages from `start` up to `stop`, which may be given what was stored of the one before.

        They meet it as it lies in memory in a pass over images that lie as `memory_format` says.
        """
        order = None
        if 0 < start <= len(self.stages) and isinstance(before := self.ordered[start - 1], TracedStage):
            with suppress(ModelError):  # then it can't run either
                order = self._measured_for(self.view.size, memory_format)[before.name].order
        return Tail(self.ordered[start:stop], order=order)

    def digests(self) -> dict[str, str]:
        """Cut -> digest of everything up to it, from the tensors as they are now.

        Raises:
            ModelError: what no key can cover, named.
        """
        digests, digest = {}, START
        for stage in self.ordered:
            digest = stage.digest(digest)
            digests[stage.name] = digest
        return digests

    def digest(self, cut: str) -> str:
        """The digest of the trunk up to `cut`."""
        digest = START
        for stage in self.ordered[: self.index(cut) + 1]:
            digest = stage.digest(digest)
        return digest

    def layout(self, cut: str) -> str:
        """NCHW, NHWC, NLC, NC or other: the order of the activations at `cut`.

        Images are square, so of three dimensions the two that are equal, and grow with the image, are positions.
        """
        stage = self.ordered[self.index(cut)]
        if isinstance(stage, AbsentStage):
            return stage.layout
        given = next((layout for name, layout in self._layouts.items() if fnmatchcase(stage.name, name)), None)
        if given is not None:
            return given
        return layout_from(self.shape(cut), lambda: self._larger_shape(cut))

    def shape(self, cut: str, size: int | None = None) -> tuple[int, ...]:
        """The shape ``*F`` of one image's activations at `cut`, for images of `size` (default: the view's)."""
        stage = self.ordered[self.index(cut)]
        if isinstance(stage, AbsentStage):
            return stage.shape
        return self._measured_for(size or self.view.size)[stage.name].shape

    def check_view(self, view: View) -> None:
        """Raises ValueError if the model takes images of another size or number of channels than `view` gives."""
        if view.channels != self.view.channels:
            raise ValueError(wrong_channels(self.name, self.view.channels, view.channels))
        if self.fixed_size is not None and view.size != self.fixed_size:
            raise ValueError(
                f"{self.name} takes images of {self.fixed_size} pixels only, not {view.size}: its position embeddings "
                "are made for that size. Leave out --size, or choose a backbone without them."
            )

    def pool(self, cut: str, reduction: str = "auto") -> Pool:
        """The reduction `reduction` for activations at `cut`; `auto`: concat for maps, token, or none for vectors."""
        layout, (class_tokens, prefix_tokens) = self.layout(cut), self.tokens(cut)
        chosen = automatic(layout, class_tokens) if reduction == "auto" else reduction
        is_over_patches = layout == "NLC" and chosen in ("avg", "max", "concat", "tokens")
        if is_over_patches and prefix_tokens and self.shape(cut)[0] <= prefix_tokens:
            raise ValueError(
                f"reduction {chosen} is over the patches, and at {cut} {self.name} has none left, only the tokens "
                "before them. Use token or none, or an earlier cut."
            )
        return Pool(chosen, layout, class_tokens, prefix_tokens)  # type: ignore[arg-type]

    def tokens(self, cut: str) -> tuple[int, int]:
        """How many tokens at the start of an NLC value at `cut` stand for the image, and how many are no patches."""
        return (0, 0) if self.canonical(cut) in self.patch_cuts else (self.class_tokens, self.prefix_tokens)

    def find_patches(self) -> None:
        """Notes what shapes say of patches: NCL where a map is flattened, and which cuts have no tokens before them.

        Raises:
            ModelError: if it takes no images of its view's size.
        """
        lengths: dict[str, int] = {}
        for before, cut in pairwise(["", *self.cut_points]):
            shape = self.shape(cut)
            if before and self.layout(before) == "NCHW":
                channels, *sides = self.shape(before)
                if shape == (channels, math.prod(sides)):
                    self._layouts.setdefault(cut, "NCL")
            if self.layout(cut) == "NLC":
                lengths[cut] = shape[0]
        every = {*lengths.values()} if self.prefix_tokens else ()
        self.patch_cuts = frozenset(cut for cut, length in lengths.items() if length + self.prefix_tokens in every)

    # ------------------------------------------------------------------------------------------------------- running

    def __repr__(self) -> str:
        cuts = self.cut_points
        head = "" if self.head is None else f", {type(self.head).__name__} head"
        return f"StagedModel({self.name}: {len(cuts)} cuts {cuts[0]} ... {cuts[-1]}{head}, {self.view.size} px)"

    def forward(self, images: Tensor) -> Tensor:
        """The output for normalised images ``(N, C, H, W)``; frozen stages run in eval mode without gradient."""
        values = images
        for index in range(len(self.stages)):
            values = self._after(index, values)
        return values

    def activations(self, images: Tensor, cuts: Iterable[str]) -> dict[str, Tensor]:
        """Cut -> activations ``(N, *F)``, all from one pass; frozen stages run in eval mode without gradient.

        Raises:
            ModelError: for a cut where the value isn't a tensor.
        """
        places = {cut: self.index(cut) for cut in cuts}
        taken: dict[int, Tensor] = {}
        values = images
        for index in range(max(places.values(), default=-1) + 1):
            if self.ordered[index].may_write_input and _shares_memory(values, taken.values()):
                values = values.clone()  # an in-place ReLU would overwrite what was taken
            values = self._after(index, values)
            if index in places.values():
                taken[index] = self._checked_tensor(index, values)
        return {cut: taken[index] for cut, index in places.items()}

    # ---------------------------------------------------------------------------------------------- freezing and heads

    @property
    def num_frozen(self) -> int:
        """How many stages, from the first, are frozen."""
        return self._num_frozen

    @property
    def head(self) -> nn.Module | None:
        """The module of the head that `with_head` added, if any."""
        last = self.ordered[-1]
        return last.module if isinstance(last, HeadStage) else None

    def freeze_to(self, cut: str) -> None:
        """Freezes all stages up to and including the one that ends in `cut`, and thaws the others.

        A pool right behind `cut` has no parameters and counts as frozen with it.
        """
        index = self.index(cut) + 1
        stages = self.ordered
        if index < len(stages) and isinstance(stages[index], PoolStage):
            index += 1
        self._freeze(index)

    def unfreeze(self) -> None:
        """Thaws everything."""
        self._freeze(0)

    def with_head(self, head: nn.Module, *, cut: str, reduction: str = "auto") -> StagedModel:
        """A model of the stages up to `cut`, a pool and `head`; frozen up to the pool.

        The stages are shared with this model until the new model thaws them.

        Args:
            head: maps the pooled activations to logits; used as it is, not copied.
            cut: where the head sits.
            reduction: of the pool; `auto` as in `pool`.
        """
        kept = self.ordered[: self.index(cut) + 1]
        used = {name for stage in kept for name in (stage.name, *stage.aliases)}
        used |= {name.partition(".")[0] for name in (*used, *self.tensors())}  # saved tensors keep names of their own
        pool = PoolStage(_unused(POOL, used), self.pool(cut, reduction))
        model = self._with_stages([*kept, pool, HeadStage(_unused(HEAD, used), head)], default_cut=kept[-1].name)
        model._num_shared = len(kept)
        model._num_frozen = len(kept) + 1
        return model

    def up_to(self, cut: str) -> StagedModel:
        """A model of the stages up to `cut` alone, shared with this one."""
        kept = self.ordered[: self.index(cut) + 1]
        names = {stage.name for stage in kept}
        default = self._default_cut if self._default_cut in names else None
        model = self._with_stages(kept, default_cut=default)
        model._num_shared = len(kept)
        return model

    def with_(
        self,
        *,
        view: View | None = None,
        origin: Mapping[str, Json] | None = None,
        notes: Sequence[str] | None = None,
        default_cut: str | None = None,
    ) -> StagedModel:
        """The same stages as a model of its own: it can be frozen, thawed and trained without changing this one.

        Args:
            view: another, as not each model takes every size, not even to measure shapes.
            origin: another; empty for a model without a name.
            notes: others.
            default_cut: another, kept also where stages behind it are missing.
        """
        default = self._default_cut if default_cut is None else self.canonical(default_cut)
        model = self._with_stages(self.ordered, default_cut=default)
        model._num_shared = len(self.stages)
        model._num_frozen = self._num_frozen
        model.view = self.view if view is None else view
        model.named_view = self.named_view if origin is None else model.view
        model.origin = dict(self.origin if origin is None else origin)
        model.notes = self.notes if notes is None else tuple(notes)
        model._measured = self._measured  # whichever of the two measures them
        return model

    def attach(self, model: StagedModel) -> None:
        """Puts `model`'s trunk in the place of an absent one.

        Raises:
            ModelError: if the digests differ; the first stage that differs is named where it can be.
        """
        stages = self.ordered
        absent = [index for index, stage in enumerate(stages) if isinstance(stage, AbsentStage)]
        if not absent:
            raise ModelError(f"{self.name} has its trunk already; there is nothing to attach.")
        cut = stages[absent[-1]].name
        mine = {stage.name: stage.digest("") for stage in stages if isinstance(stage, AbsentStage)}
        yours = model.digests()
        if yours.get(model.canonical(cut)) != mine[cut]:
            first = next((name for name in mine if name in yours and yours[name] != mine[name]), cut)
            raise ModelError(
                f"{model.name} isn't the trunk this head belongs to: they differ from stage {first} on (here "
                f"{mine[first][:8]}, yours {yours.get(first, 'absent')[:8]}). Attach the model whose features were "
                "stored."
            )
        trunk = model.ordered[: model.index(cut) + 1]
        frozen_behind = self._num_frozen - (absent[-1] + 1)
        self.stages = nn.ModuleList([*trunk, *stages[absent[-1] + 1 :]])
        self.view, self.named_view, self.name = model.view, model.named_view, model.name
        self._take_tokens(model)
        self._layouts, self.origin, self._measured = dict(model._layouts), dict(model.origin), {}
        self.fixed_size = model.fixed_size
        self._num_shared = len(trunk)
        self._num_frozen = len(trunk) + max(frozen_behind, 0)

    @property
    def is_absent(self) -> bool:
        """Whether the trunk is known by digest only."""
        return any(isinstance(stage, AbsentStage) for stage in self.stages)

    def trained_parameters(self) -> list[nn.Parameter]:
        """Parameters of the stages that aren't frozen, in order; this model's own, no other's."""
        self._own(self._num_frozen)
        return [parameter for stage in self.ordered[self._num_frozen :] for parameter in stage.parameters()]

    def train(self, mode: bool = True) -> StagedModel:
        """Sets the mode of the stages that aren't frozen; frozen ones run in eval mode anyway and aren't touched.

        Train mode moves batch-norm statistics, so stages shared with another model are replaced by copies first.
        """
        self.training = mode
        if mode:
            self._own(self._num_frozen)
        for stage in self.ordered[max(self._num_frozen, self._num_shared) :]:
            stage.train(mode)
        return self

    def tensors(self) -> dict[str, Tensor]:
        """All parameters and persistent buffers, named as in the module that the stages came from."""
        return {name: value for stage in self.ordered for name, value in stage.tensors().items()}

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Copies `tensors` into the model's own.

        Stages shared with another model are replaced by copies first.

        Raises:
            ModelError: if names or shapes don't fit; the first few are named.
        """
        mine = self.tensors()
        wrong = [f"{name} is missing" for name in mine if name not in tensors]
        wrong += [f"{name} is unknown" for name in tensors if name not in mine]
        wrong += [
            f"{name} is {_shaped(tensors[name])}, expected {_shaped(value)}"
            for name, value in mine.items()
            if name in tensors and tensors[name].shape != value.shape
        ]
        if wrong:
            raise ModelError(
                f"These tensors don't fit {self.name}: {'; '.join(wrong[:5])}"
                f"{f' and {len(wrong) - 5} more' if len(wrong) > 5 else ''}."
            )
        self._own(0)
        with torch.no_grad():
            for name, value in self.tensors().items():
                value.copy_(tensors[name])

    def to_device(self, device: torch.device) -> None:
        """Moves the model; stages shared with another model that live elsewhere are replaced by copies."""
        device = exact_device(device)
        for index, stage in enumerate(self.ordered):
            tensors = [*stage.parameters(), *stage.buffers()]
            if any(tensor.device != device for tensor in tensors):
                moved = copy.deepcopy(stage) if index < self._num_shared else stage
                self.stages[index] = moved.to(device)

    def _with_stages(self, stages: Sequence[Stage], *, default_cut: str | None) -> StagedModel:
        model = StagedModel(
            stages,
            view=self.view,
            name=self.name,
            layouts=self._layouts,
            class_tokens=self.class_tokens,
            origin=self.origin,
            default_cut=default_cut,
            fixed_size=self.fixed_size,
        )
        model._measured = {how: dict(values) for how, values in self._measured.items()}
        model.unused, model.other_names = self.unused, self.other_names
        model.named_view = self.named_view
        model._take_tokens(self)
        model.training = self.training
        return model

    def _take_tokens(self, model: StagedModel) -> None:
        self.class_tokens, self.prefix_tokens = model.class_tokens, model.prefix_tokens
        self.patch_cuts = model.patch_cuts

    def _after(self, index: int, values: Tensor) -> Tensor:
        """The values after the stage `index`, from those before it."""
        stage = self.ordered[index]
        if index < self._num_frozen:
            with torch.no_grad(), eval_mode(stage):
                result: Tensor = stage(values)
        elif index < self._num_shared and not self.training:  # the flags are the other model's as well
            with eval_mode(stage):
                result = stage(values)
        else:
            result = stage(values)
        return result

    def _checked_tensor(self, index: int, values: Any) -> Tensor:
        if not isinstance(values, Tensor):
            advice = picking(values) if index + 1 == len(self.stages) else None
            raise ModelError(
                f"The value of {self.name} at {self.ordered[index].name} is a {type(values).__name__}; only tensors "
                f"can be activations. {advice or 'Cut before or after it.'}"
            )
        return values

    def _freeze(self, count: int) -> None:
        self._own(count)
        self._num_frozen = count
        if not torch.is_inference_mode_enabled():
            check_trainable((tensor for stage in self.ordered[count:] for tensor in stage.parameters()), self.name)
        for stage in self.ordered[count:]:
            for parameter in stage.parameters():
                if parameter.is_floating_point():
                    parameter.requires_grad_(True)

    def _own(self, first: int) -> None:
        """Replaces the shared stages from `first` on by copies."""
        for index in range(first, self._num_shared):
            self.stages[index] = copy.deepcopy(self.stages[index])
        self._num_shared = min(self._num_shared, first)

    def _measured_for(self, size: int, memory_format: MemoryFormat | None = None) -> dict[str, Measured]:
        how = self.view.channels, size, memory_format
        if how not in self._measured:
            with timed("shapes"):
                self._measured[how] = measured(self.ordered, *how[:2], self.name, memory_format=memory_format)
        return self._measured[how]

    def _larger_shape(self, cut: str) -> tuple[int, ...] | None:
        larger = 2 * self.view.size
        if self.fixed_size is not None or larger in self._refused:
            return None
        try:
            return self.shape(cut, larger)
        except ModelError:
            self._refused.add(larger)
            return None

    def _has_positions(self, cut: str) -> bool:
        shape, layout = self.shape(cut), self.layout(cut)
        positions = {"NCHW": shape[1:], "NHWC": shape[:-1], "NLC": shape[:-1]}.get(layout, ())
        if layout == "NLC" and shape[0] == self.class_tokens:
            return True  # they have taken in the patches, which no later value holds (PiT)
        return bool(positions) and all(size > 1 for size in positions)  # a vector that was permuted is 1 x 1 x C


def exact_device(device: torch.device | str) -> torch.device:
    """`device` with its number: plain ``cuda`` is the current GPU, which its tensors call ``cuda:0``."""
    device = torch.device(device)
    return torch.device("cuda", torch.cuda.current_device()) if device == torch.device("cuda") else device


def _shares_memory(values: Any, others: Iterable[Tensor]) -> bool:
    if not isinstance(values, Tensor):  # a tuple between two whole modules may hold views
        return False
    return values.untyped_storage().data_ptr() in {other.untyped_storage().data_ptr() for other in others}


def _unused(name: str, used: Collection[str]) -> str:
    candidates = [name, *(f"{name}_{number}" for number in range(2, len(used) + 3))]
    return next(candidate for candidate in candidates if candidate not in used)


def _shaped(tensor: Tensor) -> str:
    return "x".join(str(size) for size in tensor.shape) or "a number"
