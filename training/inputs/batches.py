"""Batches: (inputs, targets) of one epoch or one pass, the same whether they come from features or from images."""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from featstore.errors import FeatureStoreError, OnError
from featstore.images.render import Job, doubts_note, render
from featstore.images.views import View
from featstore.models.modes import eval_mode, numerics
from featstore.models.names import Batching, Precision
from featstore.models.staged import StagedModel
from featstore.models.stages import PoolStage
from featstore.models.trunk import default_batch_size
from training.inputs.derive import FeatureSource, Source, frozen_trunk, stored_batching
from training.inputs.held import HeldSource
from training.inputs.resident import resident
from training.inputs.situation import Situation
from training.mixing import BatchChange, changed

_MOST_PIXELS = 1 << 26
"""That views of images may have together while they wait for each other: 192 MB, and 41 views of 32 images at 224."""

_CAST: dict[Precision, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Batches:
    """Batches of one source for a model with its present freeze point.

    What reaches the trained stages is equal bit for bit from features (float32) and from images: frozen stages always
    run in passes of one fixed size, over rows in the order of the epoch.

    Args:
        source: features, images, or rows that somebody holds.
        situation: the model and where its trunk runs.
        batch_size: rows a batch. In training a last batch of one joins the batch before it (batch norm needs two);
            with a batch size of 1, which asks for single rows, it does not.
        workers: threads that read and decode images.
        passes: over the images, that make an epoch.
        first_pass: how many passes were made before, by earlier fits: those of the first epoch count on from there.
        sampling: the images of a pass: ``shuffled``, or as many drawn with replacement, ``balanced``: each class as
            likely as any other. An image that a pass has again shows the view that would be its next.
        weights: ``(N,)``, how often a pass has an image, on average over passes; 1 on average over images. What is
            whole of it each pass has, and of the rest some, drawn anew, that make it as many images as there are.
        mix: what is done to each batch in training. Processes that share batches each mix the rows of their share.

    Raises:
        ValueError: for balanced sampling of images that have no single class each, and for a change of batches that
            makes no sense of what the trained stages are given.
    """

    def __init__(
        self,
        source: Source,
        situation: Situation,
        *,
        batch_size: int,
        workers: int | None,
        passes: int = 1,
        first_pass: int = 0,
        sampling: Literal["shuffled", "balanced"] = "shuffled",
        weights: NDArray[np.float64] | None = None,
        mix: Sequence[BatchChange] = (),
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; expected at least 1.")
        self.source, self.situation = source, situation
        self.batch_size, self.workers, self.passes, self.first_pass = batch_size, workers, passes, first_pass
        self.share = (0, 1)
        self.sampling, self.mix, self._weights = sampling, tuple(mix), weights
        if sampling == "balanced" and source.images.task != "single":
            raise ValueError(
                f"Sampling is balanced over classes, and the task is {source.images.task}, where an image isn't of one "
                'class. Use sampling="shuffled".'
            )
        self._layout = layout_behind(situation.model)
        for each in self.mix:
            each.check(self._layout, are_images=not situation.model.num_frozen)
        self.device = situation.device
        self.on_error: OnError = situation.on_error
        targets = source.images.targets
        self.targets = None if targets is None else torch.from_numpy(np.array(targets))
        batching = stored_batching(situation) if situation.model.num_frozen else Batching()
        self.fixed_size = batching.batch_size or default_batch_size(self.device)
        self._trunk = frozen_trunk(situation, batching) if source.kind == "images" else None
        self._rest = _frozen_rest(source, situation, batching)
        self.failures: dict[str, str] = {}  # id -> reason, of images that were left out
        self.doubts: dict[str, str] = {}  # the same of images that were decoded with doubts

    def share_with(self, place: int, count: int) -> None:
        """Leaves to `count` processes their shares of every batch in training; this one is at `place`, from 0.

        Raises:
            ValueError: if a batch is too small for them.
        """
        if self.batch_size < 2 * count:
            raise ValueError(
                f"batch_size is {self.batch_size}, that of {count} processes together; expected at least {2 * count}, "
                "two images for each. Give a larger one, or start fewer processes."
            )
        self.share = (place, count)

    def __len__(self) -> int:
        """Batches an epoch in training."""
        return self.passes * self._a_pass

    @property
    def _a_pass(self) -> int:
        return num_batches(self.num_images, self.batch_size, least=2 * self.share[1])

    @property
    def num_images(self) -> int:
        """Images an epoch."""
        return len(self.source.images)

    def pass_before(self, epoch: int) -> int:
        """How many passes were made before an epoch, counted from 0, of these batches."""
        return self.first_pass + epoch * self.passes

    def epoch(self, seed: int, epoch: int, *, skip: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """An epoch of (inputs ``(n, *F)`` float32, targets ``(n,)`` or ``(n, K)``), on the device, each pass shuffled.

        Order and views depend on seed and pass alone. With several fixed views each image goes through all of them,
        in a random order, before it sees one again. The first `skip` batches are left out; the others are what they
        would be, to the bit. Mixed targets are ``(n, K)``: see `mixing.changed`.
        """
        if self.targets is None:
            raise ValueError("These images have no labels, so there is nothing to train on.")
        for number in range(self.pass_before(epoch), self.pass_before(epoch + 1)):
            unread = self._unread(skip)
            skip -= unread
            if unread == self._a_pass:
                continue
            order = self._order(seed, number)
            views = self._views(seed, number, order)
            rest = slice(unread * self.batch_size, None)
            for place, (inputs, rows) in enumerate(self._pass(order[rest], views[rest]), start=unread):
                if skip:
                    skip -= 1
                    continue
                targets = self.targets[rows].to(self.device)
                if self.mix:
                    key, num_classes = [seed, number, 2, place, self.share[0]], len(self.source.images.classes)
                    inputs, targets = changed(
                        self.mix, inputs, targets, layout=self._layout, num_classes=num_classes, key=key
                    )
                yield inputs, targets

    def _order(self, seed: int, number: int) -> NDArray[np.int64]:
        """The images of a pass, by row number."""
        generator = np.random.default_rng([seed, number, 0])
        if self._weights is not None:
            ends = np.floor(np.cumsum(self._weights)[:-1] + generator.random())
            counts = np.diff(ends, prepend=0, append=self.num_images)
            return generator.permutation(np.repeat(np.arange(self.num_images), counts.astype(np.int64)))
        if self.sampling == "shuffled":
            return generator.permutation(self.num_images)
        assert self.targets is not None
        _, places, counts = np.unique(self.targets.numpy(), return_inverse=True, return_counts=True)
        weights = 1 / counts[places]
        return generator.choice(self.num_images, self.num_images, p=weights / weights.sum())

    def _pass(self, order: NDArray[np.int64], views: NDArray[np.int64]) -> Iterator[tuple[Tensor, NDArray[np.int64]]]:
        """The batches of a pass, or this process's share of each."""
        place, count = self.share
        if count == 1:
            yield from self._batched(self._chunks(order, views), merge_single=True)
            return
        number = num_batches(len(order), self.batch_size, least=2 * count)
        ends = [self.batch_size * each for each in range(1, number)]
        shares = [each[place::count] for each in np.split(np.arange(len(order)), ends)]
        own = np.concatenate(shares)
        yield from self._shared(self._chunks(order[own], views[own]), [order[share] for share in shares])

    def _shared(
        self, chunks: Iterator[tuple[Tensor, NDArray[np.int64]]], shares: Sequence[NDArray[np.int64]]
    ) -> Iterator[tuple[Tensor, NDArray[np.int64]]]:
        """Chunks cut anew into the shares planned, less what can't be read: all processes have as many batches.

        Raises:
            FeatureStoreError: if nothing of a share can be read.
        """
        held: list[tuple[Tensor, NDArray[np.int64]]] = []
        count = 0
        for share in shares:
            while count < len(share) and (chunk := next(chunks, None)) is not None:
                held.append(chunk)
                count += len(chunk[1])
            arrived = iter(np.concatenate([rows for _, rows in held]).tolist() if held else [])
            row = next(arrived, None)
            size = 0
            for planned in share.tolist():
                if planned == row:
                    size, row = size + 1, next(arrived, None)
            if not size:
                raise FeatureStoreError(
                    f"Not one of the {len(share):,} images that this process has of a batch could be read. Give images "
                    "that can be, or a larger batch size."
                )
            batch, held = _taken(held, size)
            count -= size
            yield batch

    def _unread(self, skip: int) -> int:
        """How many of the batches that a pass is to skip needn't be read for that, as later ones don't depend on them.

        The frozen part runs over so many rows at a time, which are to lie in the same passes. Images that can't be read
        leave gaps, so that where a batch begins shows in reading alone.
        """
        if self.failures or self.share[1] > 1:
            return 0
        if skip >= self._a_pass:
            return self._a_pass
        together = math.lcm(self.batch_size, self._chunk_size) // self.batch_size
        return skip // together * together

    @property
    def _chunk_size(self) -> int:
        """Rows that are read, and run through the frozen part, at a time."""
        return self.batch_size if self._trunk is None and self._rest is None else self.fixed_size

    def in_order(self, view: int = 0, *, share: tuple[int, int] = (0, 1)) -> Iterator[tuple[Tensor, NDArray[np.int64]]]:
        """One pass over one of the views, by its place, in the order of the images: (inputs, row numbers)."""
        order = np.arange(share[0], self.num_images, share[1])
        return self._batched(self._chunks(order, np.full(len(order), view, np.int64)), merge_single=False)

    def in_views(self, views: Sequence[int]) -> Iterator[tuple[int, Tensor, NDArray[np.int64]]]:
        """One pass over several views, by their places, of images: (place, inputs, row numbers) as of `in_order`.

        Each image is read and decoded once; one that fails in any of the views has none. As many pixels are held as
        all views of `_chunk_size` images have.
        """
        cuts = {view: _Cut(self.batch_size) for view in views}
        rendered = self._rendered(self._jobs((row, views) for row in range(self.num_images)))
        while pending := list(islice(rendered, self._chunk_size)):
            for place, view in enumerate(views):
                for batch in cuts[view].add(self._run([(of_image[place], row) for of_image, row in pending])):
                    yield view, *batch
        for view, cut in cuts.items():
            for batch in cut.rest():
                yield view, *batch

    def views_at_a_time(self) -> int:
        """Of how many views `in_views` holds no more pixels than `_MOST_PIXELS`; at least one."""
        return max(1, _MOST_PIXELS // (self._chunk_size * self.situation.view.size**2))

    def _views(self, seed: int, number: int, order: NDArray[np.int64]) -> NDArray[np.int64]:
        """For each image of `order` the place of its view; with fresh views, their seed."""
        again = _times_before(order) if self.sampling == "balanced" else np.zeros(len(order), np.int64)
        if isinstance(self.source, FeatureSource | HeldSource):
            num_views = len(self.source.features)
        elif isinstance(self.source.views, tuple):
            num_views = len(self.source.views)
        else:
            seeds = [fresh_seed(seed, number, times) for times in range(again.max(initial=0) + 1)]
            return np.array(seeds, np.int64)[again]
        round_, place = divmod(number, num_views)
        shuffled = np.random.default_rng([seed, round_, 1]).random((self.num_images, num_views)).argsort(axis=1)
        chosen: NDArray[np.int64] = shuffled[order, (place + again) % num_views]
        return chosen

    def _chunks(self, order: NDArray[np.int64], views: NDArray[np.int64]) -> Iterator[tuple[Tensor, NDArray[np.int64]]]:
        """Float32 activations behind the frozen stages, in the order given, in pieces of any size."""
        if isinstance(self.source, FeatureSource | HeldSource):
            yield from self._from_features(self.source, order, views)
        else:
            yield from self._from_images(order, views)

    def _from_features(
        self, source: FeatureSource | HeldSource, order: NDArray[np.int64], views: NDArray[np.int64]
    ) -> Iterator[tuple[Tensor, NDArray[np.int64]]]:
        for start in range(0, len(order), self._chunk_size):
            rows = order[start : start + self._chunk_size]
            values = self._gathered(source, rows, views[start : start + self._chunk_size]).float()
            yield (values if self._rest is None else self._rest(values, self.fixed_size)), rows

    def _gathered(
        self, source: FeatureSource | HeldSource, rows: NDArray[np.int64], views: NDArray[np.int64]
    ) -> Tensor:
        """Of each row the view that it has, on the device."""
        used = np.unique(views)
        if len(used) == 1:
            return self._rows(source, int(used[0]), rows)
        # float32 holds every stored type
        gathered = torch.empty((len(rows), *source.features[0].shape[1:]), device=self.device)
        for view in used:
            here = np.flatnonzero(views == view)
            gathered[torch.from_numpy(here).to(self.device)] = self._rows(source, int(view), rows[here]).float()
        return gathered

    def _rows(self, source: FeatureSource | HeldSource, view: int, rows: NDArray[np.int64]) -> Tensor:
        if self._resident is None:
            return source.features[view][rows].to(self.device)
        return self._resident[view][torch.from_numpy(rows).to(self.device)]

    @cached_property
    def _resident(self) -> tuple[Tensor, ...] | None:
        """All stored rows on a GPU that has room for them."""
        return (
            resident(self.source.features, self.device) if isinstance(self.source, FeatureSource | HeldSource) else None
        )

    def _from_images(
        self, order: NDArray[np.int64], views: NDArray[np.int64]
    ) -> Iterator[tuple[Tensor, NDArray[np.int64]]]:
        wanted = ((row, (view,)) for row, view in zip(order.tolist(), views.tolist(), strict=True))
        rendered = self._rendered(self._jobs(wanted))
        while pending := [(view, row) for (view,), row in islice(rendered, self._chunk_size)]:
            yield self._run(pending)

    def _jobs(self, wanted: Iterable[tuple[int, Sequence[int]]]) -> Iterator[Job]:
        """What is to be rendered of rows, each with the places of its views."""
        source = self.source
        assert not isinstance(source, FeatureSource | HeldSource)
        policies = [each.policy for each in source.views] if isinstance(source.views, tuple) else [source.views.policy]
        for policy in {id(each): each for each in policies if each is not None}.values():
            policy.check_unchanged()
        for row, views in wanted:
            yield Job(row, bytes(source.digests[row]), tuple(map(self._view_of, views)))

    def _rendered(self, jobs: Iterator[Job]) -> Iterator[tuple[tuple[Tensor, ...], int]]:
        """The views of images, and their rows; those that can't be read are left out where that was asked for."""
        images = self.source.images
        for rendered in render(images, jobs, workers=self.workers, on_error=self.on_error):
            if rendered.views is None:
                self.failures[images.ids[rendered.index]] = rendered.failure or ""
                continue
            if rendered.doubt is not None:
                self.doubts[images.ids[rendered.index]] = rendered.doubt
            yield rendered.views, rendered.index

    def _view_of(self, place: int) -> View:
        source = self.source
        assert not isinstance(source, FeatureSource | HeldSource)
        if isinstance(source.views, tuple):
            return source.views[place]
        return self.situation.view.with_seed(source.views.policy, int(place))

    def _run(self, pending: list[tuple[Tensor, int]]) -> tuple[Tensor, NDArray[np.int64]]:
        images, rows = torch.stack([image for image, _ in pending]), np.array([row for _, row in pending])
        if self._trunk is None:
            return self.situation.view.normalise(images.to(self.device)), rows
        return self._trunk(images)[0], rows

    def _batched(
        self, chunks: Iterator[tuple[Tensor, NDArray[np.int64]]], *, merge_single: bool
    ) -> Iterator[tuple[Tensor, NDArray[np.int64]]]:
        """Chunks cut anew into batches, each a tensor of its own, aligned as torch aligns them.

        A stage may write into its input, and kernels may sum in another order where memory is aligned otherwise.
        """
        cut = _Cut(self.batch_size, spare=1 if merge_single and self.batch_size > 1 else 0)
        for chunk in chunks:
            yield from cut.add(chunk)
        yield from cut.rest()


class _Cut:
    """Chunks on their way into batches of `size` rows, of which the last may have `spare` more."""

    def __init__(self, size: int, *, spare: int = 0) -> None:
        self._size, self._spare = size, spare
        self._held: list[tuple[Tensor, NDArray[np.int64]]] = []
        self._count = 0

    def add(self, chunk: tuple[Tensor, NDArray[np.int64]]) -> Iterator[tuple[Tensor, NDArray[np.int64]]]:
        """The batches that a chunk fills."""
        self._held.append(chunk)
        self._count += len(chunk[1])
        while self._count > self._size + self._spare:
            batch, self._held = _taken(self._held, self._size)
            self._count -= self._size
            yield batch

    def rest(self) -> Iterator[tuple[Tensor, NDArray[np.int64]]]:
        """What is left, as the last batch."""
        if self._count:
            yield _taken(self._held, self._count)[0]


@dataclass(frozen=True, eq=False)
class _FrozenRest:
    """Frozen stages behind stored activations, run as the trunk runs them, at the precision of the activations."""

    stages: nn.Sequential
    precision: Precision

    def __call__(self, values: Tensor, batch_size: int) -> Tensor:
        rows = len(values)
        padding = values[-1:].expand(batch_size - rows, *values.shape[1:])
        with eval_mode(self.stages), torch.no_grad(), numerics("fp32", values.device):
            result: Tensor = self.stages(torch.cat([values, padding]).to(_CAST.get(self.precision, torch.float32)))
        return result[:rows].float().contiguous()


def left_out_note(*passes: Batches | None) -> str | None:
    """How many images some passes had to leave out, and why the first; None if none."""
    failures = {name: reason for each in passes if each is not None for name, reason in each.failures.items()}
    if not failures:
        return None
    name, reason = next(iter(failures.items()))
    return f"{len(failures):,} image{'s' * (len(failures) > 1)} can't be read, left out (first: {name}: {reason})"


def doubtful_note(*passes: Batches | None) -> str | None:
    """How many images some passes decoded with doubts, and what is doubtful about the first; None if none."""
    return doubts_note({name: reason for each in passes if each is not None for name, reason in each.doubts.items()})


def num_batches(num_images: int, batch_size: int, *, least: int = 2) -> int:
    """Batches of a pass in training: a last one of fewer than `least` images joins the one before it."""
    full, rest = divmod(num_images, batch_size)
    return full + (rest >= least or (rest > 0 and full == 0))


def fresh_seed(seed: int, number: int, times: int = 0) -> int:
    """The seed of the views of the pass `number` of images that it has had so many times, different for each."""
    words = f"fresh {seed} {number}{f' {times}' * (times > 0)}"
    return int.from_bytes(hashlib.sha256(words.encode()).digest()[:6], "big")


def layout_behind(model: StagedModel) -> str:
    """The layout of what the stages that train are given: NCHW of images."""
    if not model.num_frozen:
        return "NCHW"
    last = model.ordered[model.num_frozen - 1]
    if not isinstance(last, PoolStage):
        return model.layout(last.name)
    return {"none": last.pool.layout, "tokens": "NLC"}.get(last.pool.reduction, "NC")


def _times_before(order: NDArray[np.int64]) -> NDArray[np.int64]:
    """For each place of `order` how often its number stands before."""
    sorted_places = order.argsort(kind="stable")
    _, firsts, counts = np.unique(order[sorted_places], return_index=True, return_counts=True)
    times = np.empty_like(order)
    times[sorted_places] = np.arange(len(order)) - np.repeat(firsts, counts)
    return times


def _frozen_rest(source: Source, situation: Situation, batching: Batching) -> _FrozenRest | None:
    model = situation.model
    if not isinstance(source, FeatureSource) or source.start >= model.num_frozen:
        return None
    rest = model.part(source.start, model.num_frozen, memory_format=batching.memory_format)
    precision = source.features[0].spec.precision
    if precision in _CAST:
        rest = copy.deepcopy(rest).to(_CAST[precision])
    return _FrozenRest(rest, precision)


def _taken(
    held: list[tuple[Tensor, NDArray[np.int64]]], size: int
) -> tuple[tuple[Tensor, NDArray[np.int64]], list[tuple[Tensor, Any]]]:
    """The first `size` rows of what is held, and the rest."""
    taken: list[tuple[Tensor, NDArray[np.int64]]] = []
    rest, missing = list(held), size
    while missing:
        values, rows = rest.pop(0)
        if len(rows) > missing:
            rest.insert(0, (values[missing:], rows[missing:]))
            values, rows = values[:missing], rows[:missing]
        taken.append((values, rows))
        missing -= len(rows)
    is_whole = len(taken) == 1 and taken[0][0].untyped_storage().nbytes() == taken[0][0].nbytes
    values = taken[0][0] if is_whole else torch.cat([values for values, _ in taken])
    return (values, np.concatenate([rows for _, rows in taken])), rest
