"""Lowering: a trunk judged in passes of the size that runs, which is halved where memory has no room for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from featstore.errors import FeatureStoreError
from featstore.extraction.pixels import PixelTrunk
from featstore.extraction.plan import PlannedSet
from featstore.models.purity import check_pure, refuse_modes
from featstore.models.staged import StagedModel
from featstore.models.trunk import Trunk
from featstore.words import counted

Result = TypeVar("Result")


class Lowering:
    """Lowers the batch size of a trunk, as long as no row has been computed in passes of another: a set has one.

    Args:
        model: that the trunk runs.
        sets: of the model.
        trunk: whose batch size it is.
        is_alone: whether no other session computes rows of these sets at the same time, with a batch size of its own.
    """

    def __init__(
        self, model: StagedModel, sets: Sequence[PlannedSet], trunk: Trunk | PixelTrunk, *, is_alone: bool
    ) -> None:
        self._model, self._sets, self._trunk, self._is_alone = model, sets, trunk, is_alone
        self._asked = trunk.batch_size
        stored = (each.stored for each in sets if each.stored is not None)
        self._has_rows = any(each.batching_on(trunk.device.type) is not None for each in stored)

    @property
    def note(self) -> str | None:
        """What is said of a lowered batch size."""
        size = self._trunk.batch_size
        if size == self._asked:
            return None
        return (
            f"{self._model.name} runs in passes of {counted(size, 'image')}: {self._trunk.device} has no memory for "
            f"{self._asked}"
        )

    def judge(self) -> None:
        """Raises ModelError unless the trunk is a function of one image, in passes of this size."""
        last = max((output.cut for output in self._trunk.outputs), key=self._model.index)
        if self._was_judged(last):
            refuse_modes(self._model, last)
        else:
            check_pure(self._model, last, batch_size=self._trunk.batch_size, device=self._trunk.device)

    def fitted(self, run: Callable[[], Result]) -> Result:
        """What `run` gives, which is tried again in smaller passes while there is no memory for them."""
        while True:
            try:
                return run()
            except torch.OutOfMemoryError as error:
                self.lower(error)

    def fix(self) -> None:
        """Notes that there are rows now."""
        self._has_rows = True

    def lower(self, error: torch.OutOfMemoryError) -> None:
        """Halves the batch size; what the failed pass had in memory is free once `error` is gone.

        Raises:
            FeatureStoreError: where it is 1, where there are rows, and where others may have some.
        """
        size, where = self._trunk.batch_size, f"{self._trunk.device} has no memory"
        through = f"through {self._model.name} ({'. '.join(str(error).split('. ')[:3]).rstrip('.')})"
        free = "Free memory there, or take a device that has more (--device)"
        if size == 1:
            raise FeatureStoreError(
                f"{where} for passes of any size {through}. Expected room for the five images that judge a model. "
                f"{free}."
            ) from error
        what = f"{where} for a pass of {counted(size, 'image')} {through}"
        if self._has_rows:
            raise FeatureStoreError(
                f"{what}, and rows are filed in passes of that size, which a set has one of. {free}. Or have the rest "
                f"computed in smaller ones, whose last bits may differ: featstore extract --batch-size "
                f"{size // 2}."
            ) from error
        if not self._is_alone:
            raise FeatureStoreError(
                f"{what}, and other jobs may compute rows of the same set, which has passes of one size. Give all of "
                f"them a smaller one: featstore extract --batch-size {size // 2}."
            ) from error
        self._trunk.batch_size = size // 2

    def _was_judged(self, cut: str) -> bool:
        """Whether rows up to `cut`, computed as the trunk will compute them, are stored: it was judged for those."""
        profile = self._trunk.profile()
        stored = [each.stored.parts for each in self._sets if each.cut == cut and each.stored is not None]
        return any(
            all(part.facts["profile"].get(name) == profile[name] for name in profile if name != "threads")
            for parts in stored
            for part in parts
        )
