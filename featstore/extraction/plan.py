"""Plan: which rows of which sets an extraction would compute, and what their owner should know before it does."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import compress

import numpy as np
from numpy.typing import NDArray
from torch import nn

from featstore.digest import Json
from featstore.extraction import pixels
from featstore.extraction.shards import Shard, shard_of
from featstore.images.contents import is_changed, lone_formats_note, overlap_note, repeats_note
from featstore.images.digests import Digests
from featstore.images.image_set import ImageSet
from featstore.images.views import Augment, View
from featstore.models.names import DEFAULT_PRECISION, Precision
from featstore.models.staged import StagedModel
from featstore.models.trunk import Output, output_at
from featstore.store.sets import FeatureRequest, FeatureSet
from featstore.store.spec import FeatureSpec, check_dtype
from featstore.store.store import FeatureStore
from featstore.timing import timed
from featstore.words import size_text


@dataclass(frozen=True, kw_only=True, eq=False)
class PlannedModel:
    """One model of a plan.

    Attributes:
        model: whose trunk runs.
        stage_digests: cut -> digest of the model up to it, as it was when the plan was made.
    """

    model: StagedModel
    stage_digests: dict[str, str]


@dataclass(frozen=True, kw_only=True, eq=False)
class PlannedSet:
    """One feature set of a plan.

    Attributes:
        source: the model that it is of.
        cut: canonical name.
        output: cut and reduction.
        view: evaluation, or with one seed.
        spec: of the values.
        stored: the set as the store has it, or None.
        is_wanted: ``(N,)``, the images that were asked for.
        is_missing: ``(N,)``, those of them without a row.
        is_failed: ``(N,)``, those of them that failed before or can't be read now, though their files are there.
        shape: of one row.
        row_bytes: size of one row.
    """

    source: PlannedModel
    cut: str
    output: Output
    view: View
    spec: FeatureSpec
    stored: FeatureSet | None
    is_wanted: NDArray[np.bool_]
    is_missing: NDArray[np.bool_]
    is_failed: NDArray[np.bool_]
    shape: tuple[int, ...]
    row_bytes: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """What an extraction would do: which rows of which sets are stored and which are missing.

    With a shard it is about the images of that one alone, though all of them are listed; no other is wanted, absent or
    changed.

    Attributes:
        images: in order.
        digests: of the images.
        sets: of each model the evaluation view's and each seed's, for every cut; no two of one key.
        is_absent: ``(N,)``, images whose files aren't there.
        is_changed: ``(N,)``, images that the store knew by their ids, with another content.
        shard: of several jobs the one whose plan this is; None for one job.
        is_owned: ``(N,)``, the images of the shard; all, without one.
    """

    images: ImageSet
    digests: Digests
    sets: tuple[PlannedSet, ...]
    is_absent: NDArray[np.bool_]
    is_changed: NDArray[np.bool_]
    shard: Shard | None
    is_owned: NDArray[np.bool_]

    @cached_property
    def models(self) -> dict[PlannedModel, list[int]]:
        """Each model, in order, with the places of its sets."""
        models: dict[PlannedModel, list[int]] = {}
        for place, each in enumerate(self.sets):
            models.setdefault(each.source, []).append(place)
        return models

    @cached_property
    def is_missing(self) -> NDArray[np.bool_]:
        """``(N,)``: images that lack a row in any set."""
        return _any([each.is_missing for each in self.sets])

    @cached_property
    def is_failed(self) -> NDArray[np.bool_]:
        """``(N,)``: images that lack a row because they have failed."""
        return _any([each.is_missing & each.is_failed for each in self.sets])

    @cached_property
    def is_to_read(self) -> NDArray[np.bool_]:
        """``(N,)``: images that lack a row in any set, and can be read as far as one knows."""
        return self.is_missing & ~self.digests.is_failed

    @cached_property
    def copies(self) -> dict[int, tuple[int, ...]]:
        """The places of all images of a content, in order, by each of them; of contents that several images have."""
        return {place: places for places in self.digests.duplicates() for place in places}

    def status(self, *, on_error: str = "raise") -> dict[str, Json]:
        """Images, stored, missing, changed (of the missing), failed and the bytes to write.

        With `raise` a failed image is one of the missing; with `skip` it isn't, and an absent file still is: a disk
        that isn't there must not pass for a finished job.
        """
        to_compute = self._to_compute(on_error)
        missing = _any(to_compute)
        return {
            "images": int(self.is_owned.sum()),
            "stored": int((self.is_owned & ~self.is_missing).sum()),
            "missing": int(missing.sum()),
            "changed": int((missing & self.is_changed).sum()),
            "failed": int((self.is_failed & ~missing if on_error == "skip" else self.is_failed).sum()),
            "bytes": sum(int(rows.sum()) * each.row_bytes for rows, each in zip(to_compute, self.sets, strict=True)),
        }

    def describe(self) -> str:
        """``10,500 images: 10,000 stored, 500 to compute, 13.1 MB in 1 feature set``, and `sizes` below it."""
        status = self.status()
        failed = f" ({status['failed']:,} of them failed before)" if status["failed"] else ""
        shard = "" if self.shard is None else f"{self.shard}: "
        summary = (
            f"{shard}{status['images']:,} images: {status['stored']:,} stored, {self.to_compute()}{failed}, "
            f"{size_text(status['bytes'])} in {len(self.sets)} feature set{'' if len(self.sets) == 1 else 's'}"
        )
        return "\n".join([summary, *self.sizes()])

    def sizes(self, *, on_error: str = "raise") -> list[str]:
        """Of each cut and reduction what `status` counts: ``  layer1:none: 64x56x56 float16, 0.401 MB a row, 4.2 GB``.

        None where there is a single one, of vectors: its rows are small, and the sum says all.
        """
        to_compute = [int(rows.sum()) for rows in self._to_compute(on_error)]
        alike: dict[tuple[PlannedModel, Output], list[int]] = {}
        for place, each in enumerate(self.sets):
            alike.setdefault((each.source, each.output), []).append(place)
        if len(alike) == 1 and len(self.sets[0].shape) <= 1:
            return []
        lines = []
        for (source, output), places in alike.items():
            first, num_rows = self.sets[places[0]], sum(to_compute[place] for place in places)
            if num_rows:
                named = output.label if len(self.models) == 1 else f"{output.label} of {source.model.name}"
                lines.append(
                    f"  {named}: {'x'.join(map(str, first.shape)) or 1} {first.spec.dtype}, "
                    f"{size_text(first.row_bytes)} a row, {size_text(num_rows * first.row_bytes)}"
                )
        return lines

    def to_compute(self, *, on_error: str = "raise") -> str:
        """What `status` counts as missing: ``500 to compute``, or ``500 to compute (497 new, 3 changed: a, b, c)``."""
        missing = _any(self._to_compute(on_error))
        changed = np.flatnonzero(missing & self.is_changed).tolist()
        counted = f"{int(missing.sum()):,} to compute"
        if not changed:
            return counted
        named = f"{', '.join(self.images.ids[place] for place in changed[:3])}{', ...' * (len(changed) > 3)}"
        return f"{counted} ({int(missing.sum()) - len(changed):,} new, {len(changed):,} changed: {named})"

    def _to_compute(self, on_error: str) -> list[NDArray[np.bool_]]:
        return [each.is_missing & ~each.is_failed if on_error == "skip" else each.is_missing for each in self.sets]

    def notes(self) -> list[str]:
        """Sentences about the images that their owner should read."""
        notes = []
        absent = [self.images.ids[index] for index in np.flatnonzero(self.is_absent)]
        if absent:
            named = f"{', '.join(absent[:3])}{', ...' * (len(absent) > 3)}"
            words = "image file is" if len(absent) == 1 else "image files are"
            notes.append(f"{len(absent):,} {words} absent ({named})")
        found = (
            overlap_note(self.images, self.digests),
            repeats_note(self.images, self.digests),
            lone_formats_note(self.images),
        )
        return [*notes, *(note for note in found if note is not None)]


Models = StagedModel | nn.Module | Sequence[tuple[StagedModel | nn.Module, Sequence[str] | None]]
"""One model; or several, each with its cuts, or None for its default cut."""


def plan(
    model: Models,
    images: ImageSet,
    store: FeatureStore,
    *,
    cuts: Sequence[str] | None = None,
    reduce: str = "auto",
    augment: Augment | None = None,
    view: View | None = None,
    dtype: str = "float16",
    precision: Precision = DEFAULT_PRECISION,
    shard: Shard | str | None = None,
) -> Plan:
    """What `extract` with the same arguments would do. Reads images as far as their digests aren't known.

    Raises:
        ValueError: for an unknown cut, reduction, type, precision or shard, a size the model can't take, no images, or
            a policy that has changed since it was made.
        TypeError: for cuts that are a text, not a list.
        ModelError: for a model that can't be keyed.
        DamagedFileError: for a damaged part or image table of what is asked for.
    """
    given = _given_models(model, cuts)
    check_dtype(dtype)
    for name, value, kind, example in (
        ("images", images, ImageSet, 'ImageSet.from_folder("photos")'),
        ("store", store, FeatureStore, 'FeatureStore("features")'),
    ):
        if not isinstance(value, kind):
            raise TypeError(f"{name} is {value!r}; expected what {example} gives.")
    if not len(images):
        raise ValueError(f"{images.name} holds no images. Expected some to extract. Give the set that has been dealt.")
    if augment is not None and not isinstance(augment, Augment):
        raise TypeError(f'augment is {augment!r}; expected what Augment("flip", seeds=range(4)) gives.')
    if view is not None and not isinstance(view, View):
        raise TypeError(f"view is {view!r}; expected what model.view.resized(size=64) gives.")
    if isinstance(shard, str):
        shard = shard_of(shard, os.environ)
    if shard is not None and not isinstance(shard, Shard):
        raise TypeError(f"shard is {shard!r}; expected a text such as '0/4'.")
    if augment is not None:
        augment.policy.check_unchanged()
    by_key: dict[str, _Asked] = {}  # a cut named twice, or two of one value, is one set
    for module, named in given:
        for key, asked in _asked(module, named, view, augment, reduce=reduce, dtype=dtype, precision=precision):
            by_key.setdefault(key, asked)
    known = store.known_digests(images)
    is_owned = np.ones(len(images), dtype=bool) if shard is None else shard.owned(images.ids)
    own = None if shard is None else set(compress(images.ids, is_owned.tolist()))
    with timed("digests of images"), images.contents.kept(own):
        digests = images.digests(known)
    is_owned = _with_contents_together(is_owned, digests)
    is_absent = is_owned & _absent(images, digests)
    is_training = images.splits == "train"
    planned = []
    for asked in by_key.values():
        spec, each = asked.spec, asked.view
        stored = store.find_one(FeatureRequest.of(spec))
        wanted = is_owned if each.is_evaluation or not is_training.any() else is_owned & is_training
        planned.append(
            PlannedSet(
                source=asked.source,
                cut=asked.output.cut,
                output=asked.output,
                view=each,
                spec=spec,
                stored=stored,
                is_wanted=wanted,
                is_missing=wanted & store.missing(stored, digests),
                is_failed=wanted & store.is_failed(stored, digests) & ~is_absent,
                shape=asked.shape,
                row_bytes=math.prod(asked.shape) * spec.storage_type.itemsize,
            )
        )
    made = Plan(
        images=images,
        digests=digests,
        sets=tuple(planned),
        is_absent=is_absent,
        is_changed=is_owned & is_changed(images, digests, known),
        shard=shard,
        is_owned=is_owned,
    )
    images.contents.keep_only(compress(images.ids, made.is_missing.tolist()))
    return made


@dataclass(frozen=True, kw_only=True, eq=False)
class _Asked:
    """One set that is asked for."""

    source: PlannedModel
    output: Output
    view: View
    spec: FeatureSpec
    shape: tuple[int, ...]


def _asked(
    model: StagedModel | nn.Module,
    cuts: Sequence[str] | None,
    view: View | None,
    augment: Augment | None,
    *,
    reduce: str,
    dtype: str,
    precision: Precision,
) -> Iterator[tuple[str, _Asked]]:
    """The sets that are asked for of one model, by their keys."""
    asked = [(cut, _is_of_pixels(cut, model)) for cut in cuts or [""]]
    if not all(is_of_pixels for _, is_of_pixels in asked):
        module = (
            StagedModel.from_module(model, view=view and view.evaluation)
            if not isinstance(model, StagedModel)
            else model
        )
        geometry = (view or module.view).evaluation
        module.check_view(geometry)
        viewed = module.with_(view=geometry)
        with timed("key"):
            source = PlannedModel(model=module, stage_digests=viewed.digests())
    for cut, is_of_pixels in asked:
        if is_of_pixels:
            yield from _asked_pixels(model, view, augment)
            continue
        output = output_at(viewed, cut or viewed.default_cut, reduce)
        for each in [geometry, *(augment.views(geometry) if augment else ())]:
            spec = FeatureSpec(
                trunk=source.stage_digests[output.cut],
                pool=output.pool.facts(),
                view=each.facts(),
                precision=precision,
                dtype=dtype,
            )
            shape = output.pool.shape(viewed.shape(output.cut))
            yield spec.key, _Asked(source=source, output=output, view=each, spec=spec, shape=shape)


def _is_of_pixels(cut: str, model: StagedModel | nn.Module) -> bool:
    """Whether the pixels of views are meant, and no stage of that name.

    Raises:
        ValueError: for a reduction of them.
    """
    name, _, reduction = cut.partition(":")
    if name != pixels.CUT or (isinstance(model, StagedModel) and name in model.cut_points):
        return False
    if reduction not in ("", "none"):
        raise ValueError(f"{cut!r} asks for a reduction, and pixels have none. Write {pixels.CUT!r}.")
    return True


def _asked_pixels(
    model: StagedModel | nn.Module, view: View | None, augment: Augment | None
) -> Iterator[tuple[str, _Asked]]:
    """The sets of the pixels of a model's views, by their keys."""
    own = model.view if isinstance(model, StagedModel) else View()
    geometry = (view or own).evaluation.pixels
    stand_in = pixels.pixel_model(geometry)
    source = PlannedModel(model=stand_in, stage_digests=stand_in.digests())
    shape = stand_in.shape(pixels.CUT)
    for each in [geometry, *(augment.views(geometry) if augment else ())]:
        spec = pixels.pixel_spec(each)
        yield spec.key, _Asked(source=source, output=pixels.OUTPUT, view=each, spec=spec, shape=shape)


def _given_models(
    given: Models, cuts: Sequence[str] | None
) -> list[tuple[StagedModel | nn.Module, Sequence[str] | None]]:
    """Each model with its cuts."""
    if isinstance(given, nn.Module):
        _check_cuts(cuts)
        return [(given, cuts)]
    example = '[(backbone("resnet34"), ["layer4"]), (backbone("vit_b_16"), None)]'
    is_list = isinstance(given, Sequence) and not isinstance(given, str)
    if not is_list or not all(
        isinstance(each, tuple) and len(each) == 2 and isinstance(each[0], nn.Module) for each in given
    ):
        raise TypeError(
            f'model is {given!r}; expected what backbone("resnet34") gives, or several with their cuts: {example}.'
        )
    if not given:
        raise ValueError(f"No model is given. Expected one, or several with their cuts: {example}.")
    if cuts is not None:
        raise TypeError(f"cuts is {cuts!r}. Expected None beside several models, which have each its own: {example}.")
    for _, own in given:
        _check_cuts(own)
    return list(given)


def _check_cuts(cuts: Sequence[str] | None) -> None:
    if isinstance(cuts, str):
        raise TypeError(f"cuts is {cuts!r}. Expected a list of cuts. Write [{cuts!r}].")
    if cuts is not None and not (isinstance(cuts, Iterable) and all(isinstance(cut, str) for cut in cuts)):
        raise TypeError(f"cuts is {cuts!r}. Expected a list of names of cuts, such as ['layer4'].")


def _any(masks: Sequence[NDArray[np.bool_]]) -> NDArray[np.bool_]:
    result: NDArray[np.bool_] = np.logical_or.reduce(masks)
    return result


def _with_contents_together(is_owned: NDArray[np.bool_], digests: Digests) -> NDArray[np.bool_]:
    """See `Plan.is_owned`. Images of one content go with the first of them, so that one job alone computes it."""
    if is_owned.all():
        return is_owned
    together = is_owned.copy()
    for first, *others in digests.duplicates():
        together[others] = together[first]
    return together


def _absent(images: ImageSet, digests: Digests) -> NDArray[np.bool_]:
    absent = np.zeros(len(images), dtype=bool)
    unread = np.array(sorted(digests.failed), dtype=np.int64)
    absent[unread[images.select(unread).absent()]] = True
    return absent
