"""Reports: one page to look at runs, and at what one of them makes of its images."""

from __future__ import annotations

import copy
import csv
import io
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from featstore import __version__
from featstore.digest import Json
from featstore.errors import FeatureStoreError
from featstore.images.image_set import ImageSet
from featstore.images.names import SPLITS
from featstore.models.runs import read_file
from featstore.pages.captions import label_of
from featstore.pages.neighbours import as_blocks, nearest
from featstore.pages.page import Page, Pictures, Section
from featstore.pages.projection import Method, projected
from featstore.pages.thumbnails import thumbnails
from featstore.store.store import FeatureStore
from featstore.words import counted, size_text, some
from training.cross_validation import CrossValidation
from training.experiments import registry
from training.experiments import report_sections as sections
from training.experiments.registry import ListedRun, Runs
from training.learner import Learner
from training.loop.history import Record
from training.loop.lr_find import LearningRates
from training.placement import reduction_of
from training.saved import HISTORY, finite
from training.scores.outcomes import Outcomes

Subject = Learner | CrossValidation | str | os.PathLike[str] | Sequence[str | os.PathLike[str]]

_ALWAYS = ("run", "backbone", "cut", "head")
"""Columns of the table, also where all runs agree."""

MOST_POINTS, MOST_THUMBNAILS, NUM_NEAR = 5_000, 2_000, 8
"""Of one page: points of its map, thumbnails (2 KB each), neighbours of an image."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """A page that was written.

    Attributes:
        path: the file.
        num_bytes: its size.
        num_runs: in its table.
        details: the run, or the runs of folds, whose images are looked at; None where none could be.
        num_thumbnails: that show an image.
        notes: what isn't on the page, and why, as sentences.
    """

    path: Path
    num_bytes: int
    num_runs: int
    details: str | None
    num_thumbnails: int
    notes: tuple[str, ...]

    def __str__(self) -> str:
        told = "no details" if self.details is None else f"details of {self.details}"
        return (
            f"{self.path}: {size_text(self.num_bytes)}, {counted(self.num_runs, 'run')}, {told}, "
            f"{counted(self.num_thumbnails, 'thumbnail')}"
        )

    def facts(self) -> dict[str, Json]:
        """As JSON has it."""
        return {
            "report": str(self.path),
            "bytes": self.num_bytes,
            "runs": self.num_runs,
            "details": self.details,
            "thumbnails": self.num_thumbnails,
            "notes": list(self.notes),
        }


def report(
    runs: Subject,
    *,
    out: str | os.PathLike[str],
    images: ImageSet | None = None,
    store: FeatureStore | None = None,
    split: str = "valid",
    details: str | os.PathLike[str] | None = None,
    learning_rates: LearningRates | None = None,
    projection: Method = "pca",
    trust_code: bool = False,
    title: str | None = None,
) -> Report:
    """Writes one HTML file that shows runs, and what one of them makes of its images; it needs nothing beside it.

    All runs are in a table and in learning curves. Of one of them: what it confuses, how well it is calibrated, the
    images it is most wrong about and least sure of, a map of the features that its head is given, and the nearest
    images to one that is clicked. Of a cross-validation each image counts as it was scored while it was held out.

    Args:
        runs: a learner; a cross-validation; saved runs, or folders of them; of a saved cross-validation its folder.
        out: the file; one of that name is replaced.
        images: labelled, as for `Learner.load`; without them saved runs have a table and curves alone.
        store: where features are looked up; default: where a saved run had its own from, if that is still there.
        split: whose labelled images are scored; the map shows all images.
        details: which of several runs is looked at; default: that of the best validation score.
        learning_rates: what `Learner.lr_find` found, to be shown.
        projection: of the map: ``pca``, ``tsne`` or ``umap``.
        trust_code: as in `Learner.load`.
        title: of the page.

    Raises:
        FeatureStoreError: if plotly isn't installed, the run that is looked at is damaged, or there is no folder for
            the file.
        ValueError: if `details` isn't one of the runs.
    """
    if Path(out).is_dir() or not Path(out).parent.is_dir():
        where = "is a folder" if Path(out).is_dir() else "lies in a folder that isn't there"
        raise FeatureStoreError(f"{out} {where}. Expected a file in a folder that is there. Choose another name.")
    subject = _subject(runs, images, store, split=split, details=details, trust_code=trust_code)
    parts: list[Section | None] = [
        sections.runs_section(subject.rows, subject.words),
        sections.curves_section(subject.histories),
        None if learning_rates is None else sections.rates_section(learning_rates),
    ]
    pictures, notes = Pictures(), list(subject.notes)
    if subject.looked_at is not None:
        looked = subject.looked_at
        found, pictures, said = _image_sections(looked, projection)
        parts += found
        notes += said
    page = Page(
        title=title or "Report of " + (subject.name or counted(len(subject.rows), "run")),
        about=" ".join([subject.about, *notes]),
        sections=[each for each in parts if each is not None],
        pictures=pictures,
        footer=f"featstore {__version__}. One file: it loads nothing, and shows what was there when it was written.",
    )
    num_thumbnails = sum(each.startswith("data:image/jpeg") for each in pictures.thumbnails.values())
    return Report(
        path=Path(out),
        num_bytes=page.write(out),
        num_runs=len(subject.rows),
        details=None if subject.looked_at is None else subject.looked_at.name,
        num_thumbnails=num_thumbnails,
        notes=tuple(notes),
    )


def first_run(runs: Sequence[str | os.PathLike[str]]) -> Path:
    """The run whose split images without one get: the first of all in and below `runs` that keeps a model."""
    listed, _ = _listed([Path(each) for each in runs])
    return next((each.folder for each in listed if each.has_model), listed[0].folder)


# ---- which runs, and whose images


@dataclass(frozen=True, kw_only=True, eq=False)
class _LookedAt:
    """A model and what it said.

    Attributes:
        name: of the run or runs.
        learn: that embeds images.
        scores: of the images that were scored.
        outcomes: of these.
        split: what these are called.
        trained_on: ids of images that aren't called train, and that were trained on all the same; none was scored.
        notes: what should be known of the scores, as sentences.
    """

    name: str
    learn: Learner
    scores: Mapping[str, float]
    outcomes: Outcomes
    split: str
    trained_on: frozenset[str]
    notes: tuple[str, ...]

    @classmethod
    def of(cls, name: str, learn: Learner, split: str, words: str) -> _LookedAt:
        """What `learn`, called `words` in a sentence, says of the labelled images of a split that no fit trained on.

        Raises:
            FeatureStoreError: if all were.
        """
        images, notes = learn.images, []
        is_named_so = images.splits == "train"
        if not (images.splits != "").any():  # all train
            is_named_so = np.ones(len(images), dtype=np.bool_)
        is_seen = learn.were_trained_on(images) & ~is_named_so
        of_split = images.splits == split
        scoring = learn
        if (is_seen & of_split).any():
            count, seen = int(of_split.sum()), int((is_seen & of_split).sum())
            if seen == count:
                raise FeatureStoreError(
                    f"All {count:,} {split} images of {images.name} were trained on by {words}, so none of them says "
                    "what it makes of new ones. Give images without a split of their own (and no --valid, --test or "
                    "--split-seed): they get the run's. Or look at what was trained on, as such: --split train."
                )
            notes.append(
                f"{seen:,} of the {count:,} {split} images were trained on by {words}: they are left out of all that "
                "is scored here, and marked where they are shown."
            )
            scoring = copy.copy(learn)
            scoring.images = images.with_splits(np.where(is_seen, "train", images.splits).tolist())
        scores, outcomes = scoring.evaluated(split)
        return cls(
            name=name,
            learn=learn,
            scores=scores,
            outcomes=outcomes,
            split=split,
            trained_on=frozenset(images.ids[place] for place in np.flatnonzero(is_seen).tolist()),
            notes=(*notes, *map(_sentence, outcomes.notes)),
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class _Subject:
    """What a report is of."""

    name: str
    rows: Sequence[Mapping[str, Json]]
    words: str
    histories: Mapping[str, Sequence[Record]]
    looked_at: _LookedAt | None
    about: str
    notes: Sequence[str] = field(default_factory=tuple)


def _subject(
    runs: Subject,
    images: ImageSet | None,
    store: FeatureStore | None,
    *,
    split: str,
    details: str | os.PathLike[str] | None,
    trust_code: bool,
) -> _Subject:
    if isinstance(runs, Learner | CrossValidation):
        for name, value in (("images", images), ("store", store), ("details", details)):
            if value is not None:
                raise ValueError(f"{name} is given, but a {type(runs).__name__} has its own. Leave it out.")
        return _of_learner(runs, split) if isinstance(runs, Learner) else _of_folds(runs)
    given = [Path(runs)] if isinstance(runs, str | os.PathLike) else [Path(each) for each in runs]
    listed, notes = _listed(given)
    ordered = _ranked(listed)
    histories, said = _histories(ordered)
    name = str(given[0]) if len(given) == 1 else ""
    looked = None
    if images is None:
        if details is not None:
            _chosen(ordered, details)
        notes.append("No images were given, so what the runs make of them isn't shown (--images).")
    elif name and details is None and _are_folds(listed):
        looked = _of_saved_folds(name, [each.folder for each in listed], images, store, trust_code=trust_code)
    else:
        chosen = _chosen(ordered, details)
        learn = _loaded(chosen, images, store, trust_code=trust_code)
        looked = _LookedAt.of(str(chosen), learn, split, str(chosen))
    return _Subject(
        name=name,
        rows=_rows(ordered),
        words="The best validation score comes first; a click on a column's name sorts by it.",
        histories=histories,
        looked_at=looked,
        about="" if looked is None else _about(looked, of_several=len(ordered) > 1),
        notes=[*notes, *said, *(() if looked is None else looked.notes)],
    )


def _of_learner(learn: Learner, split: str) -> _Subject:
    looked = _LookedAt.of("this learner", learn, split, "an earlier fit")
    row = {"run": "this learner", **_placed(learn), **finite(looked.scores)}
    return _Subject(
        name=f"{learn.model.name} on {learn.images.name}",
        rows=[row],
        words=f"Scores are of {split} images.",
        histories={"this learner": learn.history.records},
        looked_at=looked,
        about=_about(looked, of_several=False),
        notes=looked.notes,
    )


def _of_folds(found: CrossValidation) -> _Subject:
    names = [f"fold {number}" for number in range(1, len(found.learners) + 1)]
    learn = found.learners[0]
    looked = _of_held_out(f"the {len(names)} folds", found)
    rows = [
        {"run": name, **_placed(each), **finite(scores), "images": len(held_out)}
        for name, each, scores, held_out in zip(names, found.learners, found.scores, found.held_out, strict=True)
    ]
    return _Subject(
        name=f"{learn.model.name}, {len(names)} folds",
        rows=rows,
        words=f"{found.in_words()}.",
        histories={name: each.history.records for name, each in zip(names, found.learners, strict=True)},
        looked_at=looked,
        about=_about(looked, of_several=False),
    )


def _placed(learn: Learner) -> dict[str, Json]:
    return {
        "backbone": learn.model.name,
        "cut": learn.cut,
        "reduce": reduction_of(learn.model),
        "head": learn.head_name,
        "epochs": len(learn.history.records),
        "seed": learn.seed,
    }


def _about(looked: _LookedAt, *, of_several: bool) -> str:
    images, outcomes = looked.learn.images, looked.outcomes
    which = f"Details are of {looked.name}" if of_several else f"What is shown is of {looked.name}"
    return f"{which}, by {len(outcomes):,} {looked.split} images of {images.name} ({images.describe()})."


def _listed(folders: Sequence[Path]) -> tuple[list[ListedRun], list[str]]:
    """The runs in and below folders, each once; what is damaged, in sentences."""
    found: dict[Path, ListedRun] = {}
    notes = []
    for folder in folders:
        below = registry.runs(folder)
        found |= {each.folder: each for each in below if each.folder not in found}
        notes += [f"The run {name} can't be read: {why}" for name, why in below.damaged.items()]
    if not found:
        raise ValueError(f"There is no run in {', '.join(map(str, folders))}. Expected the folder of a saved run.")
    return [*found.values()], notes


def _ranked(listed: Sequence[ListedRun]) -> list[ListedRun]:
    """The best by the task's own score first (accuracy, mAP, mean absolute error), of equal ones that of least loss.

    Those that were scored on other images come last. Losses of runs may be of different functions, or in other units.
    """
    is_apart = [row.get("note") in registry.APART for row in Runs(listed, damaged={}, root=Path()).table]

    def rank(place: int) -> tuple[bool, bool, float, float]:
        run, loss = listed[place], _number(listed[place]["loss"])
        own = [(1, run["mae"]), (-1, run["map"]), (-1, run["accuracy"])]  # a later one counts before an earlier one
        score = next((sign * number for sign, each in reversed(own) if (number := _number(each)) is not None), 0.0)
        return is_apart[place], loss is None, score, math.inf if loss is None else loss

    return [listed[place] for place in sorted(range(len(listed)), key=rank)]


def _rows(listed: Sequence[ListedRun]) -> list[dict[str, Json]]:
    """What the table says of runs: where several differ, and their scores; of one all that is known."""
    table = Runs(listed, damaged={}, root=Path()).table
    scores = {name for each in listed for name in each.score_columns}
    kept = [
        name
        for name in table[0]
        if name in _ALWAYS
        or (name in scores and any(row[name] is not None for row in table))
        or any(row[name] != table[0][name] for row in table)
        or (len(table) == 1 and table[0][name] is not None)
    ]
    first = [name for name in (*_ALWAYS, "note") if name in kept]
    order = list(dict.fromkeys([*first, *(name for name in kept if name in scores), *kept]))
    return [
        {**{name: row[name] for name in order}, "run": str(each.folder)}
        for row, each in zip(table, listed, strict=True)
    ]


def _chosen(ordered: Sequence[ListedRun], details: str | os.PathLike[str] | None) -> Path:
    having = [each.folder for each in ordered if each.has_model]
    if details is not None and Path(details) not in having:
        raise ValueError(
            f"details is {details}, which isn't among {some([*map(str, having)])}. Expected one of these runs, whose "
            "models are kept."
        )
    if not having:
        raise ValueError(
            f"None of {some([str(each.folder) for each in ordered])} keeps a model, and images are looked at with one. "
            "Expected a run that was saved whole. Give one, or no images."
        )
    return having[0] if details is None else Path(details)


def _are_folds(listed: Sequence[ListedRun]) -> bool:
    return len(listed) > 1 and all(each.has_model and each.folder.name.startswith("fold-") for each in listed)


def _of_saved_folds(
    name: str, folders: Sequence[Path], images: ImageSet, store: FeatureStore | None, *, trust_code: bool
) -> _LookedAt:
    undealt = images.with_splits([""] * len(images))  # each fold has its own split
    folds = tuple(_loaded(folder, undealt, store, trust_code=trust_code) for folder in folders)
    is_new = np.logical_and.reduce([~each.were_trained_on(undealt) for each in folds])
    for each in folds[1:]:  # an image that is new to all counts once, by the first
        each.images = each.images.with_splits(np.where(is_new, "", each.images.splits).tolist())
    held_out = tuple(each.outcomes("valid") for each in folds)
    return _of_held_out(name, CrossValidation(learners=folds, held_out=held_out, scores=()))


def _of_held_out(name: str, found: CrossValidation) -> _LookedAt:
    """What the folds said of each image while it was held out."""
    notes = dict.fromkeys(_sentence(note) for each in found.held_out for note in each.notes)
    return _LookedAt(
        name=name,
        learn=found.learners[0],
        scores={},
        outcomes=found.outcomes(),
        split="held-out",
        trained_on=frozenset(),
        notes=tuple(notes),
    )


def _sentence(note: str) -> str:
    """A note of a learner as a page has it."""
    return f"{note[:1].upper()}{note[1:]}{'' if note.endswith('.') else '.'}"


def _histories(listed: Sequence[ListedRun]) -> tuple[dict[str, Sequence[Record]], list[str]]:
    """The epochs of each run that has them; why those of others can't be read, in sentences."""
    found: dict[str, Sequence[Record]] = {}
    notes = []
    for each in listed:
        try:
            found[str(each.folder)] = _history(each)
        except (FeatureStoreError, OSError, ValueError, TypeError, csv.Error) as error:
            notes.append(f"The epochs of {each.folder} can't be read: {_sentence(str(error))}")
    return found, notes


def _history(run: ListedRun) -> list[Record]:
    content = read_file(run.folder, HISTORY) if run.has_model else None
    if content is None:
        return []
    rows = csv.DictReader(io.StringIO(content.decode("utf-8")))
    return [{name: float(value) for name, value in row.items()} for row in rows]


def _number(value: Json) -> float | None:
    return float(value) if isinstance(value, int | float) else None


def _loaded(run: Path, images: ImageSet, store: FeatureStore | None, *, trust_code: bool) -> Learner:
    found = Learner.store_of(run) if store is None else store
    return Learner.load(run, images, found, on_missing="images", on_error="skip", quiet=True, trust_code=trust_code)


# ---- what it makes of images


def _image_sections(looked: _LookedAt, method: Method) -> tuple[list[Section | None], Pictures, list[str]]:
    """Sections of one model, the page's pictures, and what is missing, in sentences.

    A picture's place is that of its image in the learner's image set.
    """
    images, outcomes = looked.learn.images, looked.outcomes
    place_of = {name: place for place, name in enumerate(images.ids)}
    found: list[Section | None] = [
        *sections.gallery_sections(outcomes, place_of),
        sections.scores_section(outcomes, looked.split),
        sections.calibration_section(outcomes),
    ]
    words = {place_of[name]: outcomes.words(row) for row, name in enumerate(outcomes.images.ids)}
    if looked.split != "train":  # what was trained on repeats its labels
        found.append(sections.suspects_section(outcomes, place_of))
    asked = _sample(len(images), _named(found))
    notes: list[str] = []
    near: dict[int, list[tuple[int, float]]] = {}
    places = np.zeros(0, dtype=np.int64)
    try:
        places, features, where = _features(looked.learn, asked)
    except FeatureStoreError as error:
        notes.append(f"There is no map and there are no neighbours, as no features could be had: {error}")
    else:
        drawn = projected(features, method)
        found.insert(2, sections.map_section(drawn, places, images.select(places), len(images), where))
        near = _near(features, places)
        found.append(sections.duplicates_section(*_across_splits(features, places, images), images))
    first = _named(found)
    shown = [*first, *[each for each in _spread(places) if each not in {*first}]]
    pictures = Pictures(
        names={place: images.ids[place] for place in sorted({*shown})},
        labels={place: _words(looked, place, words) for place in sorted({*shown})},
        thumbnails=_thumbnails(images, shown[:MOST_THUMBNAILS]),
        near=near,
        near_words=f"By the cosine of their features, among the {len(near):,} images of the map.",
    )
    absent = sum(not each.startswith("data:image/jpeg") for each in pictures.thumbnails.values())
    if absent:
        notes.append(f"{counted(absent, 'image')} can't be read now; the name stands in the place of each.")
    if len(shown) > MOST_THUMBNAILS:
        notes.append(f"Thumbnails are of {MOST_THUMBNAILS:,} of the {len(shown):,} images on the page.")
    return found, pictures, notes


def _words(looked: _LookedAt, place: int, said: Mapping[int, str]) -> str:
    """What is said of an image where it is named: its label and split; if it was scored, what it was taken for."""
    images = looked.learn.images
    if place in said and images.task == "single":
        return f"{said[place]} · {images.splits[place]}"
    return label_of(images, place) + ", trained on" * (images.ids[place] in looked.trained_on)


def _named(found: Iterable[Section | None]) -> list[int]:
    """The places that galleries name, in order."""
    galleries = (block for each in found if each is not None for block in each.blocks)
    return list(dict.fromkeys(place for block in galleries for place, _ in getattr(block, "pictures", ())))


def _sample(count: int, always: Sequence[int]) -> NDArray[np.int64]:
    """At most `MOST_POINTS` of `count` places, in order, those of `always` among them."""
    if count <= MOST_POINTS:
        return np.arange(count)
    drawn = np.random.default_rng(0).permutation(count)
    others = drawn[~np.isin(drawn, always)][: MOST_POINTS - len(always)]
    return np.sort(np.concatenate([np.array(always, dtype=np.int64), others]))


def _spread(places: NDArray[np.int64]) -> list[int]:
    """`places` in an order of which each beginning is a fair sample."""
    drawn: list[int] = np.random.default_rng(1).permutation(places).tolist()
    return drawn


def _features(learn: Learner, places: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.float32], str]:
    """What the head is given of images: places of those that could be had, a vector of each, and its origin in words.

    Maps and tokens that a head takes as they are have too many numbers to compare; they are reduced here.
    """
    images = learn.images.select(places)
    reduction = reduction_of(learn.model)
    ids, features = learn.embed(images, reduce="auto" if reduction in (None, "none") else None)
    place_of = dict(zip(images.ids, places.tolist(), strict=True))
    had = np.array([place_of[name] for name in ids], dtype=np.int64)
    is_finite = np.isfinite(features.reshape(len(features), -1)).all(1)
    return had[is_finite], features[is_finite], f"the features of {learn.model.name} at {learn.cut}"


def _near(features: NDArray[np.float32], places: NDArray[np.int64]) -> dict[int, list[tuple[int, float]]]:
    """Place -> its nearest neighbours among `places` with their similarities."""
    rows = torch.from_numpy(features)
    numbers, similarities = nearest(rows, as_blocks(rows), NUM_NEAR, left_out=np.arange(len(rows)))
    return {
        place: [
            (int(places[other]), float(similarity))
            for other, similarity in zip(others, likeness, strict=True)
            if other >= 0
        ]
        for place, others, likeness in zip(places.tolist(), numbers.tolist(), similarities.tolist(), strict=True)
    }


def _across_splits(
    features: NDArray[np.float32], places: NDArray[np.int64], images: ImageSet
) -> tuple[list[tuple[int, int, float]], int | None]:
    """Pairs of images in different splits that are nearly the same, with their similarity, the most alike first.

    Each image is paired with at most `NUM_NEAR` of later splits, which is told where one may have more; else None.
    """
    rows, splits = torch.from_numpy(features), images.splits[places]
    pairs: list[tuple[int, int, float]] = []
    is_cut = False
    for number, split in enumerate(SPLITS):
        here, there = np.flatnonzero(splits == split), np.flatnonzero(np.isin(splits, SPLITS[number + 1 :]))
        if not (len(here) and len(there)):
            continue
        numbers, similarities = nearest(rows[here], as_blocks(rows[there]), NUM_NEAR)
        is_near = similarities >= sections.NEARLY_THE_SAME
        is_cut |= len(there) > NUM_NEAR and bool(is_near.all(1).any())
        at, column = np.nonzero(is_near)
        one, other = places[here[at]], places[there[numbers[at, column]]]
        pairs += zip(one.tolist(), other.tolist(), similarities[at, column].tolist(), strict=True)
    return sorted(pairs, key=lambda pair: (-pair[2], *pair[:2])), NUM_NEAR if is_cut else None


def _thumbnails(images: ImageSet, places: Sequence[int]) -> dict[int, str]:
    made: Iterator[str] = (each.uri for each in thumbnails(images, places))
    return dict(zip(places, made, strict=True))
