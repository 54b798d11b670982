"""Opened: a model of a plan, ready to compute."""

from __future__ import annotations

from dataclasses import dataclass

from featstore.digest import Json
from featstore.extraction.lowering import Lowering
from featstore.extraction.pixels import PixelTrunk
from featstore.extraction.plan import PlannedModel, PlannedSet
from featstore.extraction.rounding import Rounding
from featstore.images.pixel_digest import pixel_digest
from featstore.images.views import View
from featstore.models.probe import Probe, check_compiled
from featstore.models.trunk import Output, Trunk
from featstore.store.part_facts import part_facts


@dataclass(frozen=True, kw_only=True, eq=False)
class Opened:
    """A model of a plan, ready to compute.

    Attributes:
        planned: the model.
        places: of the plan's sets those that are of it, and computed alike.
        trunk: what computes their rows.
        lowering: of the trunk's batch size, where memory has no room for it.
        probes: of each output, what is filed with its rows.
        stages: cut -> the facts of the model's stages up to it.
        roundings: of each output whose rows are scaled, what is filed with them.
        compile_seconds: what it took to compile it; 0 where it isn't compiled.
    """

    planned: PlannedModel
    places: list[int]
    trunk: Trunk | PixelTrunk
    lowering: Lowering
    probes: dict[Output, Probe]
    stages: dict[str, list[Json]]
    roundings: dict[Output, Rounding]
    compile_seconds: float = 0.0

    def judge(self) -> None:
        """Raises ModelError unless the trunk is a function of one image in passes of this size, compiled ones too."""
        self.lowering.judge()
        if isinstance(self.trunk, Trunk) and self.trunk.is_compiled:
            check_compiled(self.trunk, self.probes, name=self.planned.model.name)

    def facts(self, each: PlannedSet) -> dict[str, Json]:
        """Those of a part of one of its sets."""
        model = self.planned.model
        class_tokens, prefix_tokens = model.tokens(each.cut)
        rounding = self.roundings.get(each.output)
        return part_facts(
            backbone=model.name,
            stages=self.stages[each.cut],
            class_tokens=class_tokens,
            prefix_tokens=prefix_tokens,
            profile=self.trunk.profile(),
            probe=self.probes[each.output].facts(),
            pixels=pixel_digest(each.view.decode),
            rounding=None if rounding is None else rounding.facts(),
        )


@dataclass(frozen=True)
class Input:
    """What a trunk is given of an image.

    Attributes:
        model: the place of an opened model.
        view: of the image; models with other means share its pixels.
    """

    model: int
    view: View
