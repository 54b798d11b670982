"""Agreement: the same images scored from stored features and from their files, and how far the two are apart."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from featstore.html import titled_table
from featstore.images.image_set import ImageSet
from training.inputs.batches import Batches
from training.inputs.derive import Source, find, from_images
from training.inputs.situation import Situation
from training.loop.fit import outputs


@dataclass(frozen=True, kw_only=True, eq=False)
class Agreement:
    """What a model gives for the same N images both ways; made by `Learner.compare_inputs`. Prints as a table.

    Attributes:
        sources: where features came from, and what was done to images, in words.
        ids: of the images that could be read both ways.
        logits: ``(2, N, K)`` float32, from features and from images.
        scores: loss and metrics likewise.
    """

    sources: tuple[str, str]
    ids: tuple[str, ...]
    logits: Tensor
    scores: tuple[Mapping[str, float], Mapping[str, float]]

    @property
    def is_equal(self) -> bool:
        """Whether every logit is the same, to the bit."""
        return torch.equal(self.logits[0], self.logits[1])

    @property
    def differences(self) -> Tensor:
        """``(N,)`` of each image the largest difference of a logit; of regression, of a number."""
        return (self.logits[0] - self.logits[1]).abs().amax(1)

    @property
    def agreed(self) -> float:
        """The share of the images whose largest logit is the same one."""
        return (self.logits[0].argmax(1) == self.logits[1].argmax(1)).double().mean().item()

    @property
    def table(self) -> list[dict[str, str | float]]:
        """A row a score: its name, what it is from ``features`` and from ``images``, and the ``difference``."""
        return [
            {"score": name, "features": stored, "images": read, "difference": stored - read}
            for (name, stored), read in zip(self.scores[0].items(), self.scores[1].values(), strict=True)
        ]

    def __str__(self) -> str:
        widest = max(len(str(row["score"])) for row in self.table)
        rows = [f"{'':{widest}}  {'features':>10}  {'images':>10}  {'difference':>10}"]
        rows += [
            f"{row['score']:{widest}}  {row['features']:10.4g}  {row['images']:10.4g}  {row['difference']:10.2g}"
            for row in self.table
        ]
        apart = "each logit is equal to the bit"
        if not self.is_equal:
            first = int(self.differences.argmax())
            apart = f"logits differ by {self.differences[first]:.2g} at most ({self.ids[first]})"
        told = f", the largest is the same one of {self.agreed:.2%}" * (self.logits.shape[2] > 1)
        return "\n".join([*self.sources, *rows, f"{len(self.ids):,} images: {apart}{told}"])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return titled_table(str(self).splitlines()[-1], self.table)


def compared(
    tail: nn.Module,
    situation: Situation,
    images: ImageSet,
    *,
    batches: Callable[[Source, Situation], Batches],
    scored: Callable[[Tensor, Tensor], Mapping[str, float]],
) -> Agreement:
    """The agreement of labelled `images`, in the evaluation view.

    Args:
        tail: the stages that aren't frozen.
        situation: with a store that holds features of them.
        images: with targets.
        batches: of a source.
        scored: loss and metrics of logits and targets.

    Raises:
        FeatureStoreError: if either can't be had.
        ValueError: if features can't stand for these images, as nothing is frozen or there is no store.
    """
    stored = find(replace(situation, on_missing="error", is_scoring=True), images, None)
    if stored.kind == "images":
        raise ValueError(
            "There are no two ways to compare: these images are read from their files alone, as nothing is frozen or "
            "there is no store. Expected a frozen trunk and a store with its features. Freeze it: learn.freeze(); give "
            'the store: learn.store = FeatureStore("features").'
        )
    sources: tuple[Source, Source] = (stored, from_images(situation, images, None))
    found = [outputs(tail, batches(source, situation)) for source in sources]
    place = [
        {source.images.ids[row]: at for at, row in enumerate(rows.tolist())}
        for source, (_, _, rows) in zip(sources, found, strict=True)
    ]
    ids = tuple(name for name in place[0] if name in place[1])
    chosen = [[each[name] for name in ids] for each in place]
    both = [(logits[at], targets[at]) for at, (logits, targets, _) in zip(chosen, found, strict=True)]
    stored_scores, live_scores = (scored(logits, targets) for logits, targets in both)
    return Agreement(
        sources=(stored.words, sources[1].words),
        ids=ids,
        logits=torch.stack([logits.cpu() for logits, _ in both]),
        scores=(stored_scores, live_scores),
    )
