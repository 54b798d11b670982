"""Comparing: which backbone, and which cut of it, serves a task best - accuracy against seconds and bytes.

Long, since a comparison is a table that tells all of it, beside what is measured for it.
"""

from __future__ import annotations

import csv
import math
import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from featstore.errors import FactsDifferError, FeatureStoreError, MissingFeaturesError
from featstore.extraction.extract import run_plan
from featstore.extraction.plan import Plan, PlannedSet, plan
from featstore.extraction.remedy import extract_remedy
from featstore.files.storage_types import DEFAULT_STORAGE_TYPE
from featstore.html import titled_table
from featstore.images.digests import KnownDigests
from featstore.images.image_set import ImageSet
from featstore.images.names import Task
from featstore.images.views import View
from featstore.models.backbones import backbone
from featstore.models.names import Batching
from featstore.models.staged import StagedModel
from featstore.models.trunk import Trunk, choose_device, default_batch_size
from featstore.notes import logger_of
from featstore.store.sets import FeatureRequest, FeatureSet
from featstore.store.store import FeatureStore
from featstore.words import counted, size_text, some
from training.experiments.probing import Halves, ProbeName, Rows, probed, probes_for, score, score_interval
from training.frames import data_frame
from training.learner import Learner
from training.saved import past_split
from training.scores.metrics import student_interval, wilson_interval
from training.scores.transferability import SCORES, Score, transfer_scores
from training.splits import PastSplit, grouped_by_content

if TYPE_CHECKING:
    from training.plots import Axes

Backbone = str | StagedModel | nn.Module
Given = Backbone | tuple[Backbone, Sequence[str] | None]

INNER_FOLDS = 3
MOST_SCORED = 5_000
"""Images that transferability is scored on: a mixture of many components takes minutes with more."""
LIKELY = 0.05
_TIMED_ON_CPU = 8
"""Images a pass: a CPU takes as long for one of them as in a batch of 32, and three passes of that take a while."""

_METRICS: Mapping[Task, str] = {"single": "accuracy", "multi": "mAP", "regression": "R2"}


@dataclass(frozen=True, kw_only=True, eq=False)
class ProbeResult:
    """What a probe of one set of features came to on the images held out.

    Attributes:
        value: accuracy, mean average precision or R2; over folds their mean.
        interval: where it lies for other images (of accuracy Wilson's, of mAP and R2 by the bootstrap) or other folds
            (Student's t, within what the score can be), 95 %; None where that isn't known.
        settings: what was chosen on the training images, k, strength or C; one a fold.
        is_right: ``(M,)`` of each image held out whether its class was found; None for other tasks.
    """

    value: float
    interval: tuple[float, float] | None
    settings: tuple[float, ...]
    is_right: NDArray[np.bool_] | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Entry:
    """One backbone at one cut.

    Attributes:
        backbone: what people call it.
        cut: and reduction, ``layer4 avg``.
        key: of the feature set.
        width: numbers an image.
        num_bytes: an image in the store.
        parameters: of the backbone up to the cut; None where it isn't here.
        seconds: the backbone up to the cut takes for an image, measured in this run on the device that extraction had;
            None where rows were reused and nobody asked for the time.
        computed: rows that this run computed.
        probes: what each probe came to.
        transfer: each transferability score, of the training images.
    """

    backbone: str
    cut: str
    key: str
    width: int
    num_bytes: int
    parameters: int | None
    seconds: float | None
    computed: int
    probes: Mapping[ProbeName, ProbeResult]
    transfer: Mapping[Score, float | None]

    @property
    def name(self) -> str:
        """Backbone and cut."""
        return f"{self.backbone}@{self.cut}"


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Comparison:
    """What backbones came to on the same images, the best first; made by `compare`. Prints as a table.

    Attributes:
        entries: a backbone at a cut each.
        by: the probe that they are ordered by.
        task: single, multi or regression.
        num_images: how many were held out, over all folds.
        folds: how many; None: the images' own split.
        notes: sentences about the comparison as a whole.
    """

    entries: tuple[Entry, ...]
    by: ProbeName
    task: Task
    num_images: int
    folds: int | None
    notes: tuple[str, ...] = field(default=())

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def metric(self) -> str:
        """What the probes' numbers are: accuracy, mAP or R2."""
        return _METRICS[self.task]

    @property
    def best(self) -> Entry:
        """The first one."""
        return self.entries[0]

    @property
    def table(self) -> list[dict[str, str | int | float | None]]:
        """A row an entry, the best first."""
        rows: list[dict[str, str | int | float | None]] = []
        for each in self.entries:
            low, high = each.probes[self.by].interval or (None, None)
            rows.append(
                {
                    "backbone": each.backbone,
                    "cut": each.cut,
                    self.by: each.probes[self.by].value,
                    "from": low,
                    "to": high,
                    **{name: found.value for name, found in each.probes.items() if name != self.by},
                    "seconds": each.seconds,
                    "bytes": each.num_bytes,
                    "parameters": each.parameters,
                    "width": each.width,
                    **{str(name): value for name, value in each.transfer.items()},
                    "key": each.key[:8],
                }
            )
        return rows

    @property
    def rank_correlations(self) -> dict[Score, float | None]:
        """Of each transferability score Kendall's tau-b with the measured numbers: 1 where both have one order.

        None for fewer than three entries, and where either has one value alone.
        """
        from scipy.stats import kendalltau  # type: ignore[import-untyped]  # scikit-learn brings it

        found: dict[Score, float | None] = {}
        for name in SCORES:
            pairs = [(each.transfer[name], each.probes[self.by].value) for each in self.entries]
            known = [(said, measured) for said, measured in pairs if said is not None]
            tau = float(kendalltau(*zip(*known, strict=True)).statistic) if len(known) > 2 else math.nan
            found[name] = None if math.isnan(tau) else tau
        return found

    def p_value(self, one: Entry, other: Entry) -> float | None:
        """How likely two entries differ as they do on the same images if neither is better: McNemar's exact test.

        Two-sided, of the images that one of them got right and the other wrong. None for other tasks than single.
        """
        from scipy.stats import binomtest

        here, there = one.probes[self.by].is_right, other.probes[self.by].is_right
        if here is None or there is None:
            return None
        only, neither = int((here & ~there).sum()), int((here ^ there).sum())
        return 1.0 if neither == 0 else float(binomtest(only, neither).pvalue)

    def ties(self) -> list[str]:
        """A sentence for each two neighbours that these images can't tell apart."""
        sentences = []
        for one, other in pairwise(self.entries):
            p = self.p_value(one, other)
            if p is not None and p >= LIKELY:
                sentences.append(
                    f"{one.name} and {other.name} can't be told apart on {counted(self.num_images, 'image')}: "
                    f"McNemar p = {p:.2g}"
                )
        return sentences

    def in_words(self) -> str:
        """The best one, its number and its price."""
        best, found = self.best, self.best.probes[self.by]
        between = "" if found.interval is None else f" (95 % interval {found.interval[0]:.3f}-{found.interval[1]:.3f})"
        how = "held out" if self.folds is None else f"each held out once in {self.folds} folds"
        time_ = "" if best.seconds is None else f", {best.seconds * 1000:.3g} ms"
        return (
            f"best of {len(self)}: {best.name}, "
            f"{self.by} {self.metric} {found.value:.3f}{between}, {self.num_images:,} images {how}{time_} and "
            f"{size_text(best.num_bytes)} an image"
        )

    def foot(self) -> list[str]:
        """What is to be read below the table."""
        known = {name: tau for name, tau in self.rank_correlations.items() if tau is not None}
        told = ", ".join(f"{name} {tau:+.2f}" for name, tau in known.items())
        ranks = [f"Kendall's tau with the measured {self.metric}: {told}"] if known else []
        return [*self.ties(), *ranks, *self.notes]

    def __str__(self) -> str:
        names = list(self.table[0])
        cells = [names, *([_cell(row[name], name) for name in names] for row in self.table)]
        widths = [max(len(row[place]) for row in cells) for place in range(len(names))]
        lines = [
            "  ".join(
                cell.ljust(width) if place < 2 else cell.rjust(width)
                for place, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in cells
        ]
        return "\n".join([*lines, self.in_words(), *self.foot()])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return titled_table("\n".join([self.in_words(), *self.foot()]), self.table)

    def frame(self) -> Any:
        """The table as a pandas DataFrame."""
        return data_frame(self.table)

    def plot(self, axes: Axes | None = None) -> Axes:
        """The measured number against seconds an image, each as large as its bytes; without seconds, against bytes."""
        from training.plots import accuracy_against_cost

        return accuracy_against_cost(
            [each.name for each in self.entries],
            [each.probes[self.by].value for each in self.entries],
            [each.probes[self.by].interval for each in self.entries],
            [each.seconds for each in self.entries],
            [each.num_bytes for each in self.entries],
            f"{self.by} {self.metric}",
            axes,
        )

    def to_csv(self, path: str | os.PathLike[str]) -> Path:
        """Writes the table."""
        path = Path(path)
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(self.table[0]))
            writer.writeheader()
            writer.writerows(self.table)
        return path


def compare(
    backbones: Sequence[Given],
    images: ImageSet,
    store: FeatureStore,
    *,
    cuts: Sequence[str] | None = None,
    reduce: str = "auto",
    view: View | None = None,
    probes: Sequence[str] | None = None,
    by: ProbeName | None = None,
    folds: int | None = None,
    groups: Sequence[Any] | NDArray[Any] | None = None,
    split_seed: int = 0,
    extract: bool = True,
    time_all: bool = False,
    allow_leak: bool = False,
    dtype: str | None = None,
    device: torch.device | str = "auto",
    batch_size: int | None = None,
    workers: int | None = None,
    progress: bool = False,
) -> Comparison:
    """Extracts what the store lacks, each image decoded once for all backbones, and probes each backbone at each cut.

    A probe's own setting (k, strength, C) is chosen on the images it trains on alone, over inner folds of these that
    keep groups together; images held out are scored once. Images of the split "test" stay out, and so do those without
    a label.

    Args:
        backbones: names, models, or ``(backbone, cuts)`` each.
        images: labelled, and dealt into train and valid unless there are `folds`; undealt ones are dealt as a run among
            the backbones has them.
        store: where features are read, and filed.
        cuts: ``CUT`` or ``CUT:REDUCTION``, for each backbone those that it has; default: its default cut.
        reduce: of cuts that don't name a reduction, as in `extract`; features must be vectors.
        view: of all backbones; default: each one's own.
        probes: of knn, ridge and linear; default: those that the task has. See `training.experiments.probing.probed`.
        by: the probe that orders the table; default: the last one.
        folds: holds each image out once in so many folds, in place of the images' own split.
        groups: one an image, for `folds`; default: the images' own.
        split_seed: of the folds.
        extract: False: computes nothing; what is missing is an error that says how to compute it.
        allow_leak: compares all the same where a backbone that comes from a run was trained on images to score, with a
            note, rather than refuse.
        time_all: also measures the seconds of backbones whose rows were all reused.
        dtype: of stored values, as in `extract`; default: that of each set that is stored, else float16.
        device: where backbones run.
        batch_size: likewise.
        workers: likewise.
        progress: shows how the extraction goes, on stderr.

    Raises:
        ValueError: for no backbones, a cut that none of them has, maps or tokens in place of vectors, images without
            labels or without a split, and probes that aren't for the task.
        FeatureStoreError: for a backbone that was trained on images to score; and with `extract=False`, for features
            that are missing or differ. The message says in what.
        ImageError: for an image that can't be read.
    """
    _check_given(images, groups, has_folds=folds is not None)
    given = _models(backbones, cuts)
    known = KnownDigests.of(store.known_digests(images))
    pasts = [past for model, _ in given if (past := past_split(model)) is not None]
    if folds is None:
        for past in pasts:
            images = past.applied(images, known)
    images, groups = _to_use(images, groups, has_folds=folds is not None)
    names = probes_for(images.task, probes)
    if by is not None and by not in names:
        raise ValueError(f"by is {by!r}. Expected one of the probes {', '.join(names)}.")
    together = grouped_by_content(images, images.digests(known), groups)
    dealt = _dealt(
        replace(images, groups=together), folds, split_seed
    )  # copies of an image on one side, inner folds too
    learned = _learned(pasts, dealt, known, allow_leak=allow_leak)
    # Of folds the images' own split is none, and copies are kept together: nothing to tell of either.
    to_read = images if folds is None else images.with_splits(["train"] * len(images))
    planned = plan(given, to_read, store, reduce=reduce, view=view, dtype=dtype or DEFAULT_STORAGE_TYPE)
    if dtype is None:
        planned = replace(planned, sets=tuple(_as_stored(each, planned, store) for each in planned.sets))
    for each in planned.sets:
        _check_vectors(each)
    notes = [*planned.notes(), *learned]
    if extract and planned.is_missing.any():
        notes += _extracted(planned, store, device=device, batch_size=batch_size, workers=workers, progress=progress)
    elif planned.is_missing.any():
        raise _missing(next(each for each in planned.sets if each.is_missing.any()), images, store)
    names_of, sizes = _names(planned), {each.view.size for each in planned.sets}
    if len(sizes) > 1:
        told = {f"{names_of[id(each.source.model)]} {each.view.size}": None for each in planned.sets}
        notes.append(f"images are of different sizes ({', '.join(told)}), which may be what differs; --size is of all")
    entries = []
    for each in planned.sets:
        computed = int(each.is_missing.sum())
        is_timed = not each.source.model.is_absent and (computed > 0 or time_all)
        seconds = _seconds(each, device, batch_size) if is_timed else None
        found, transfer = _probed(each, store, images, dealt, names, has_folds=folds is not None, device=str(device))
        entries.append(
            Entry(
                backbone=names_of[id(each.source.model)],
                cut=f"{each.cut} {each.spec.reduction}",
                key=each.spec.key,
                width=each.shape[0],
                num_bytes=each.row_bytes,
                parameters=_num_parameters(each.source.model, each.cut),
                seconds=seconds,
                computed=computed,
                probes=found,
                transfer=transfer,
            )
        )
        if progress:
            logger_of("training").info("%s", f"probed {entries[-1].name}")
    chosen = by or names[-1]
    entries.sort(key=lambda each: -each.probes[chosen].value)
    return Comparison(
        entries=tuple(entries),
        by=chosen,
        task=images.task,
        num_images=sum(int((fold.splits == "valid").sum()) for fold in dealt),
        folds=folds,
        notes=tuple(notes),
    )


def _names(planned: Plan) -> dict[int, str]:
    """What each model is called, by its place in memory: as it was asked for where a run or two of a name are."""
    models = {id(each.source.model): each.source.model for each in planned.sets}
    common = Counter(model.name for model in models.values())
    found = {}
    for place, model in models.items():
        asked = model.origin.get("run") or model.origin.get("backbone") or model.name
        found[place] = str(asked) if "run" in model.origin or common[model.name] > 1 else model.name
    return found


def _learned(
    pasts: Sequence[PastSplit], dealt: Sequence[ImageSet], known: KnownDigests, *, allow_leak: bool
) -> list[str]:
    """Of each run among the backbones how many of the images to score it was trained on, in words.

    Raises:
        FeatureStoreError: unless that is allowed.
    """
    scored = dealt[0].select(np.any([fold.splits == "valid" for fold in dealt], axis=0))
    notes = [past.leaked_note(scored, scored.digests(known), allow_leak=allow_leak) for past in pasts]
    return [note for note in notes if note is not None]


def _check_given(images: ImageSet, groups: Sequence[Any] | NDArray[Any] | None, *, has_folds: bool) -> None:
    if not images.is_labelled:
        raise ValueError(f"{images.name} has no labels, and backbones can't be compared without. Give labelled images.")
    if groups is not None and not has_folds:
        raise ValueError("groups are for folds, and there are none. Expected folds=5 beside them, or no groups.")
    if groups is not None and not isinstance(groups, Sequence | np.ndarray):
        raise ValueError(f"groups is {groups!r}. Expected the group of each image in a list.")
    if groups is not None and len(groups) != len(images):
        raise ValueError(f"There are {len(groups):,} groups for {len(images):,} images. Expected one for each.")


def _to_use(
    images: ImageSet, groups: Sequence[Any] | NDArray[Any] | None, *, has_folds: bool
) -> tuple[ImageSet, Sequence[Any] | None]:
    """The images with a label that are trained on or held out, and their groups."""
    targets = np.asarray(images.targets)
    has_label = targets >= 0 if images.task == "single" else np.isfinite(targets).all(1)
    kept = has_label & (images.splits != "test" if has_folds else np.isin(images.splits, ["train", "valid"]))
    groups = None if groups is None else [*groups]
    if kept.all():
        return images, groups
    return images.select(kept), None if groups is None else [groups[place] for place in np.flatnonzero(kept).tolist()]


def _dealt(images: ImageSet, folds: int | None, seed: int) -> list[ImageSet]:
    if folds is not None:
        if not isinstance(folds, int | np.integer):
            raise ValueError(
                f"folds is {folds!r}. Expected a whole number from 2 on, or None for the split of the images."
            )
        return images.folds(int(folds), seed=seed)
    for split in ("train", "valid"):
        if not (images.splits == split).any():
            raise ValueError(
                f"{images.name} has no labelled image in the split {split}. Expected images to train on and to score. "
                "Hold some out with --valid 0.2 (in Python: images.split(valid=0.2)), or each once with --folds 5 "
                "(folds=5)."
            )
    return [images]


def _models(backbones: Sequence[Given], cuts: Sequence[str] | None) -> list[tuple[StagedModel, list[str] | None]]:
    if isinstance(backbones, str | nn.Module) or not backbones:
        raise ValueError(f"backbones is {backbones!r:.60}. Expected names or models in a list.")
    _check_cuts(cuts)
    found: list[tuple[StagedModel, list[str] | None]] = []
    for each in backbones:
        if isinstance(each, tuple) and len(each) != 2:
            raise ValueError(f"backbones has {each!r:.60}. Expected a backbone, or (backbone, [cut, ...]).")
        source, own = each if isinstance(each, tuple) else (each, None)
        _check_cuts(own)
        model = source if isinstance(source, StagedModel) else None
        if model is None:
            model = backbone(source) if isinstance(source, str) else StagedModel.from_module(source)
        if own is None and cuts is not None:
            own = [cut for cut in cuts if _has(model, cut)]
            if not own:
                several = f"none of the cuts {', '.join(cuts)}" if len(cuts) > 1 else f"no cut {cuts[0]}"
                raise ValueError(
                    f"{model.name} has {several}. Expected one of its own: "
                    f"{some(model.cut_points)}. See: featstore backbones NAME"
                )
        found.append((model, None if own is None else list(own)))
    for cut in cuts or ():
        if not any(_has(model, cut) for model, _ in found):
            raise ValueError(f"No backbone has the cut {cut}. {found[0][0].name} has {some(found[0][0].cut_points)}.")
    return found


def _check_cuts(cuts: Any) -> None:
    """Raises ValueError for what is no list of names."""
    if cuts is None:
        return
    if isinstance(cuts, str) or not isinstance(cuts, Sequence) or not cuts:
        raise ValueError(f"cuts is {cuts!r}. Expected cuts in a list.")
    wrong = [cut for cut in cuts if not isinstance(cut, str)]
    if wrong:
        raise ValueError(f"cuts has {wrong[0]!r}. Expected names of cuts, as layer4 or layer4:avg.")


def _has(model: StagedModel, cut: str) -> bool:
    try:
        model.canonical(cut.partition(":")[0])
    except ValueError:
        return False
    return True


def _check_vectors(each: PlannedSet) -> None:
    if len(each.shape) != 1:
        shape = "x".join(map(str, each.shape))
        raise ValueError(
            f"{each.source.model.name}@{each.cut} {each.spec.reduction} gives {shape} an image, and probes take "
            "vectors. Expected a reduction to one: avg, max, concat or token."
        )


def _as_stored(each: PlannedSet, planned: Plan, store: FeatureStore) -> PlannedSet:
    """A set of which nothing is stored in the planned type, in the one other type that it is stored in, if any."""
    if each.stored is not None or len(others := _in_other_types(each, store)) != 1:
        return each
    (stored,) = others
    return replace(
        each,
        spec=stored.spec,
        stored=stored,
        is_missing=each.is_wanted & store.missing(stored, planned.digests),
        is_failed=each.is_wanted & store.is_failed(stored, planned.digests) & ~planned.is_absent,
        row_bytes=math.prod(each.shape) * stored.spec.storage_type.itemsize,
    )


def _in_other_types(each: PlannedSet, store: FeatureStore) -> list[FeatureSet]:
    """What is stored of a set that differs in its storage type alone."""
    return [*store.find(replace(FeatureRequest.of(each.spec), dtype=None))]


def _missing(each: PlannedSet, images: ImageSet, store: FeatureStore) -> FeatureStoreError:
    """Why the features of a set can't be read: the facts that differ from the nearest one, or the rows it lacks."""
    model, named = each.source.model, f"{each.cut}:{each.spec.reduction}"
    count = int(each.is_missing.sum())
    remedy = extract_remedy(model, images, store.root, cuts=[named], view=each.view, dtype=each.spec.dtype)
    if each.stored is None and (others := _in_other_types(each, store)):
        there = [other.spec.dtype for other in others]
        return FactsDifferError(
            f"{store.root} holds {model.name}@{each.cut} {each.spec.reduction} in {' and '.join(there)}, and "
            f"{each.spec.dtype} is asked for. Nothing was compared. Ask for what is there (in Python: "
            f"dtype={there[0]!r}), or compute the {count:,}:",
            remedy=remedy,
        )
    if each.stored is None:  # what a head there would be told
        learn = Learner(
            model, images, store, cut=each.cut, reduce=each.spec.reduction, head="linear", view=each.view, quiet=True
        )
        if learn.inputs.problem is not None:
            return learn.inputs.problem
    return MissingFeaturesError(
        f"{store.root} holds {len(images) - count:,} of the {len(images):,} images asked for ({model.name}@{each.cut} "
        f"{each.spec.reduction}, {each.spec.dtype}). Nothing was compared. Compute the {count:,}:",
        remedy=remedy,
    )


def _extracted(planned: Plan, store: FeatureStore, **options: Any) -> list[str]:
    """Sentences about what was computed."""
    report = run_plan(planned, store, **options)
    decode = {each.stage: each.rate for each in report.rates}.get("decode")
    shared = "once for all backbones" if len(planned.models) > 1 else "once"
    said = [] if not decode else [f"images were decoded {shared}, {1000 / decode:.3g} ms each"]
    return [*said, *report.notes]


def _seconds(each: PlannedSet, device: torch.device | str, batch_size: int | None) -> float:
    """Of the trunk up to the cut, an image, in a batch of noise: the better of two, after one to warm up."""
    where = choose_device(device)
    count = batch_size or (_TIMED_ON_CPU if where.type == "cpu" else default_batch_size(where))
    trunk = Trunk(each.source.model, [each.output], view=each.view, batching=Batching(count), device=where)
    side, channels = each.view.size, len(each.view.mean)
    noise = torch.Generator().manual_seed(0)
    views = torch.randint(0, 256, (count, channels, side, side), dtype=torch.uint8, generator=noise)
    best = math.inf
    for _ in range(3):
        started = time.perf_counter()
        trunk(views)  # its rows are on the CPU again, so the device has finished
        best = min(best, time.perf_counter() - started)
    return best / count


def _num_parameters(model: StagedModel, cut: str) -> int | None:
    return None if model.is_absent else sum(each.numel() for each in model.trunk(cut).parameters())


def _probed(
    each: PlannedSet,
    store: FeatureStore,
    images: ImageSet,
    dealt: Sequence[ImageSet],
    names: Sequence[ProbeName],
    *,
    has_folds: bool,
    device: str,
) -> tuple[dict[ProbeName, ProbeResult], dict[Score, float | None]]:
    """What all is made of one set's rows, which are in memory meanwhile, and gone before those of the next are read."""
    features = store.features(images, FeatureRequest.of(each.spec))
    rows: Rows = features.tensor(dtype=torch.float32).numpy()
    found = {name: _result(name, rows, images, dealt, has_folds, device) for name in names}
    return found, _transfer(rows, images, dealt)


def _result(
    name: ProbeName, rows: Rows, images: ImageSet, dealt: Sequence[ImageSet], has_folds: bool, device: str
) -> ProbeResult:
    targets, task = np.asarray(images.targets), images.task
    values, settings, is_right = [], [], []
    for fold in dealt:
        training, held_out = (np.flatnonzero(fold.splits == split) for split in ("train", "valid"))
        found = probed(
            name,
            rows[training],
            targets[training],
            rows[held_out],
            task=task,
            columns=len(images.classes),
            inner=_inner(fold.select(training)),
            device=device,
        )
        values.append(score(found.said, targets[held_out], task))
        settings.append(found.setting)
        if task == "single":
            is_right.append(found.said.argmax(1) == targets[held_out])
    right = np.concatenate(is_right) if is_right else None
    interval = None
    if has_folds:
        interval = student_interval(_METRICS[task].lower(), values)
    elif task != "single":
        interval = score_interval(found.said, targets[held_out], task)
    elif right is not None:
        interval = wilson_interval(int(right.sum()), len(right))
    return ProbeResult(value=fmean(values), interval=interval, settings=tuple(settings), is_right=right)


def _inner(training: ImageSet) -> list[Halves]:
    """Pairs of halves of the images to train on; groups stay whole. None where there are too few to deal."""
    count = min(INNER_FOLDS, len(set(training.groups or training.ids)))
    if count < 2:
        return []
    folds = training.with_splits(["train"] * len(training)).folds(count, seed=0)
    return [(np.flatnonzero(each.splits == "train"), np.flatnonzero(each.splits == "valid")) for each in folds]


def _transfer(rows: Rows, images: ImageSet, dealt: Sequence[ImageSet]) -> dict[Score, float | None]:
    """Of the images to train on; over folds of all, which each of them trains on in some."""
    places = np.flatnonzero(np.any([fold.splits == "train" for fold in dealt], axis=0))
    if len(places) > MOST_SCORED:
        places = np.sort(np.random.default_rng(0).choice(places, MOST_SCORED, replace=False))
    targets = np.asarray(images.targets)[places]
    if images.task == "single" and len(np.unique(targets)) < 2:
        return dict.fromkeys(SCORES)
    return transfer_scores(rows[places], targets, images.task)


def _cell(value: str | int | float | None, name: str) -> str:
    if value is None:
        return "-"
    if isinstance(value, str):
        return value
    if name == "bytes":
        return size_text(int(value))
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
