"""TTA: logits of images in the evaluation view, or of the mean of what a model says of several views of each image."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias, TypedDict

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featstore.images.image_set import ImageSet
from featstore.images.names import Task
from featstore.images.views import Augment
from training.inputs.batches import Batches, doubtful_note
from training.inputs.derive import Source, find_to_score
from training.inputs.situation import Situation
from training.loop.fit import predicted, predicted_in

GivenTta: TypeAlias = int | Augment | None
"""So many views of the learner's own policy (seeds 0, 1, ...); the views of a policy with seeds; or none."""


class TtaOptions(TypedDict, total=False):
    """Test-time augmentation: views of an image whose probabilities are averaged with those of its evaluation view.

    Views that a store holds for all of the images are read from it; else each image is read and decoded once, and
    rendered in all of them.

    Attributes:
        tta: so many views of the policy that training images get, seeds 0, 1, ...; or those of
            ``Augment("flip", seeds=range(8))``.
        tta_weight: of the evaluation view in the mean, 0 to 1, the others sharing the rest. Default: that of any view.
    """

    tta: GivenTta
    tta_weight: float | None


@dataclass(frozen=True, kw_only=True, eq=False)
class TestViews:
    """Views of an image that count beside its evaluation view, which is called the plain one.

    Attributes:
        augment: with fixed seeds, one a view.
        weight: of the plain view, 0 to 1; the others share the rest. None: each view counts as much as any other.
    """

    __test__ = False  # pytest takes classes of such names for tests

    augment: Augment
    weight: float | None = None

    @classmethod
    def of(
        cls, tta: GivenTta = None, tta_weight: float | None = None, *, own: Augment | None = None
    ) -> TestViews | None:
        """The views that `tta` asks for; None for the plain view alone.

        Args:
            tta: as in `TtaOptions`.
            tta_weight: likewise.
            own: the augmentation whose policy a number means.

        Raises:
            TypeError: for what is neither a number nor an augmentation.
            ValueError: for no views, views that would all be the same, fresh seeds, or a weight beyond 0 ... 1.
        """
        if tta is None:
            if tta_weight is not None:
                raise ValueError(
                    f"tta_weight is {tta_weight} and there are no views beside the plain one. Give tta too."
                )
            return None
        if isinstance(tta, bool) or not isinstance(tta, int | np.integer | Augment):
            raise TypeError(f'tta is {tta!r}; expected a number of views, or Augment("flip", seeds=range(8)).')
        if not isinstance(tta, Augment):
            if tta < 1:
                raise ValueError(f"tta is {tta}; expected at least one view, or None for the evaluation view alone.")
            if own is None:
                raise ValueError(
                    f"tta is {tta}, views of the policy that training images get, and this learner has none: all of "
                    "them would be the same. Give the policy: learn.augment, or "
                    f'tta=Augment("flip", seeds=range({tta})).'
                )
            tta = Augment(own.policy, range(tta))
        if tta.seeds == "fresh":
            raise ValueError("tta has fresh seeds, and there are as many views as seeds. Give some, such as range(8).")
        if tta_weight is not None and not 0 <= tta_weight <= 1:
            raise ValueError(f"tta_weight is {tta_weight}; expected the share of the evaluation view, 0 to 1.")
        return cls(augment=tta, weight=tta_weight)

    @property
    def shares(self) -> list[float]:
        """What the plain view and each of the others counts; they sum up to 1."""
        assert self.augment.seeds != "fresh"
        others = len(self.augment.seeds)
        plain = 1 / (1 + others) if self.weight is None else float(self.weight)
        return [plain, *[(1 - plain) / others] * others]


@dataclass(frozen=True, kw_only=True, eq=False)
class Scored:
    """What a model says of images.

    Attributes:
        source: where they were read from, in the plain view.
        kind: images, if any view was read from them; else features.
        images: those that could be read, in every view.
        logits: ``(N, K)`` on the CPU: float32, as the model gave them; float64 where they stand for a mean.
    """

    source: Source
    kind: Literal["features", "images"]
    images: ImageSet
    logits: Tensor


def scored(
    situation: Situation,
    images: ImageSet,
    views: TestViews | None = None,
    *,
    task: Task,
    batched: Callable[[Source, Situation], Batches],
    say: Callable[[str | None], None],
    temperature: float = 1.0,
) -> Scored:
    """What a model says of `images`: by features where these serve, else by images.

    With several views the logits are those of the mean of the probabilities (of regression the mean of the numbers),
    not the mean of the logits: that would be the geometric mean of what the views say, which one sure view decides.

    Args:
        situation: of the model as it is now.
        images: in order.
        views: beside the plain one.
        task: what the logits are of.
        batched: the batches of a source.
        say: gets sentences about what isn't used, and what is doubtful.
        temperature: that logits of each view are divided by.

    Raises:
        FeatureStoreError: if they can't be had in each of the views.
    """
    # Both are found before either is read: what lacks views is said at once.
    augments = [None] if views is None else [None, views.augment]
    found = [find_to_score(situation, images, augment, say=say) for augment in augments]
    passes = [batched(source, theirs) for theirs, source in _together(found)]
    # Sources may leave different images out, and a view may fail of an image that has others.
    is_read = torch.ones(len(images), dtype=torch.bool)
    read = _in_place(situation.model.unfrozen, passes, images, is_read)
    if temperature != 1:
        read = (each / temperature for each in read)
    logits = next(read) if views is None else mean(read, views.shares, task)
    say(doubtful_note(*passes))
    return Scored(
        source=found[0][1],
        kind="images" if any(each.source.kind == "images" for each in passes) else "features",
        images=images.select(is_read.numpy()),
        logits=logits[is_read],
    )


def _together(found: Sequence[tuple[Situation, Source]]) -> Sequence[tuple[Situation, Source]]:
    """Sources that each image is to be read from once: all views as one, where none of them is stored."""
    (situation, plain), *rest = found
    if not rest:
        return found
    other, source = rest[0]
    if plain.kind != "images" or source.kind != "images" or situation.store is not other.store:
        return found
    assert isinstance(plain.views, tuple)
    assert isinstance(source.views, tuple)
    return [(situation, replace(plain, views=(*plain.views, *source.views)))]


def _in_place(tail: nn.Module, passes: Sequence[Batches], images: ImageSet, is_read: Tensor) -> Iterator[Tensor]:
    """Logits ``(N, K)`` of all images in one view after the other; `is_read` becomes False where one has none."""
    places = {name: place for place, name in enumerate(images.ids)}
    for each in passes:
        ids = each.source.images.ids
        for logits, rows in _of_views(tail, each):
            at = torch.tensor([places[ids[row]] for row in rows.tolist()])
            is_here = torch.zeros_like(is_read)
            is_here[at] = True
            is_read &= is_here
            whole = logits.new_zeros(len(images), *logits.shape[1:])
            whole[at] = logits
            yield whole


def _of_views(tail: nn.Module, batches: Batches) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits and row numbers in each view of a source, one after the other."""
    views, source = range(_num_views(batches.source)), batches.source
    if source.kind == "features":
        for view in views:
            yield predicted(tail, batches, view)
        return
    for start in range(0, len(views), batches.views_at_a_time()):
        yield from predicted_in(tail, batches, views[start : start + batches.views_at_a_time()])


def _num_views(source: Source) -> int:
    if source.kind == "features":
        return len(source.features)
    assert isinstance(source.views, tuple)
    return len(source.views)


def mean(logits: Iterable[Tensor], shares: Sequence[float], task: Task) -> Tensor:
    """Logits ``(N, K)`` float64 of the mean, by `shares`, of the probabilities that `logits` stand for.

    They are added up in logarithms, so that no probability is rounded to 0 or 1. Of regression the mean itself.
    """
    if task == "regression":
        return sum((each.double() * share for each, share in zip(logits, shares, strict=True)), torch.zeros(()))
    total: Tensor | None = None
    for each, share in zip(logits, shares, strict=True):
        wide = each.double()
        sides = F.log_softmax(wide, 1) if task == "single" else torch.stack([F.logsigmoid(wide), F.logsigmoid(-wide)])
        if share:
            part = sides + math.log(share)
            total = part if total is None else torch.logaddexp(total, part)
    assert total is not None
    return total if task == "single" else total[0] - total[1]
