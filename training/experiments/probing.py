"""Probing: what simple models, fitted exactly to features, make of images they weren't fitted to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from featstore.images.names import Task
from training.scores.metrics import mean_average_precision, r2
from training.solvers.logistic import logistic_path
from training.solvers.neighbors import KNearest
from training.solvers.ridge import ridge_path

ProbeName = Literal["knn", "ridge", "linear"]
PROBES: tuple[ProbeName, ...] = get_args(ProbeName)

Rows = NDArray[np.float32]
Targets = NDArray[Any]
Halves = tuple[NDArray[np.int64], NDArray[np.int64]]
"""Of rows to train on, which a probe is fitted to, and by which its setting is judged."""

DRAWS = 500
"""Of images, for an interval: its ends then move by a thirtieth of its width from seed to seed."""
_DRAWN_AT_ONCE = 1 << 21
_TEMPERATURE = 0.07


@dataclass(frozen=True, kw_only=True, eq=False)
class Probed:
    """What a probe made of M images that had no part in its fit.

    Attributes:
        said: ``(M, K)`` a number for each class, greatest where the image seems to be of it; of regression the numbers.
        setting: k, strength or C, as chosen on the rows that it was fitted to.
    """

    said: NDArray[np.float64]
    setting: float


def probes_for(task: Task, asked: Sequence[str] | None) -> tuple[ProbeName, ...]:
    """Those of `asked`, checked; None: all that the task has.

    Raises:
        ValueError: for an unknown name, none at all, or one that isn't for the task.
    """
    has = PROBES if task == "single" else tuple(name for name in PROBES if name != "linear")
    if asked is None:
        return has
    if isinstance(asked, str) or not asked:
        raise ValueError(f"probes is {asked!r}. Expected some of {', '.join(has)} in a list.")
    for name in asked:
        if name not in PROBES:
            raise ValueError(f"{name!r} is no probe. Expected {', '.join(has[:-1])} or {has[-1]}.")
        if name not in has:
            raise ValueError(f"The probe {name} tells classes apart, and these images are {task}. Use {has[-1]}.")
    return tuple(name for name in PROBES if name in asked)


def probed(
    name: ProbeName,
    rows: Rows,
    targets: Targets,
    held_out: Rows,
    *,
    task: Task,
    columns: int,
    inner: Sequence[Halves],
    device: str = "cpu",
) -> Probed:
    """Fits a probe to `rows` and asks it of the rows `held_out`, whose targets it never sees.

    Its setting is the one that is best on average over `inner`, pairs of halves of the rows to train on; of equal ones
    the simplest. Without such pairs it is the middle one.

    Args:
        name: ``knn``: votes of the nearest rows by cosine, weighted as by Caron et al., arXiv:2104.14294; ``ridge``:
            least squares with a penalty, of classes to their columns of 0 and 1; ``linear``: multinomial logistic
            regression.
        rows: ``(N, D)`` to train on.
        targets: ``(N,)`` class numbers; ``(N, K)`` n-hot or numbers.
        held_out: ``(M, D)``.
        task: single, multi or regression.
        columns: K.
        inner: as above.
        device: where products are computed.
    """
    path = _PATHS[name]
    settings = path.settings(len(rows))
    wanted = np.eye(columns)[targets] if task == "single" else np.asarray(targets, np.float64)
    totals, counts = np.zeros(len(settings)), 0
    for fitted, judged in inner:
        if task == "single" and len(np.unique(targets[fitted])) < 2:
            continue
        for place, said in enumerate(path.said(rows[fitted], wanted[fitted], rows[judged], settings, device)):
            totals[place] += score(said, targets[judged], task)
        counts += 1
    best = settings[int(np.nan_to_num(totals, nan=-np.inf).argmax())] if counts else settings[len(settings) // 2]
    (said,) = path.said(rows, wanted, held_out, [best], device)
    return Probed(said=said, setting=best)


def score(said: NDArray[np.float64], targets: Targets, task: Task) -> float:
    """Accuracy of classes, mean average precision of several labels, R2 of numbers."""
    if task == "single":
        return float((said.argmax(1) == targets).mean())
    metric = mean_average_precision if task == "multi" else r2
    return metric(torch.from_numpy(said), torch.from_numpy(np.asarray(targets, np.float64)))


def score_interval(
    said: NDArray[np.float64], targets: Targets, task: Task, *, seed: int = 0
) -> tuple[float, float] | None:
    """Where the `score` of several labels or of numbers lies for other images as these, 95 %: by the bootstrap.

    Images are drawn anew, as many as there are, `DRAWS` times from `seed`; None where too few of these have a score.
    """
    random, count = np.random.default_rng(seed), len(said)
    several = max(1, _DRAWN_AT_ONCE // max(count, 1))
    sizes = [min(several, DRAWS - start) for start in range(0, DRAWS, several)]
    drawn = [
        resampled(said, targets, random.multinomial(count, np.full(count, 1 / count), size=size), task)
        for size in sizes
    ]
    known = (scores := np.concatenate(drawn))[np.isfinite(scores)]
    if len(known) < 0.9 * DRAWS:
        return None
    low, high = np.quantile(known, [0.025, 0.975])
    return float(low), float(high)


def resampled(
    said: NDArray[np.float64], targets: Targets, counts: NDArray[np.int64], task: Task
) -> NDArray[np.float64]:
    """The `score` ``(B,)`` of several labels or numbers, where each image is there so often: ``(B, M)``.

    NaN where it has none.
    """
    wanted, often = np.asarray(targets, np.float64), counts.astype(np.float64)
    if task == "multi":
        columns = zip(said.T, wanted.T, strict=True)
        values = np.stack([_average_precision(each, positive > 0, often) for each, positive in columns])  # (K, B)
        is_there = np.isfinite(values)
        with np.errstate(invalid="ignore"):
            means: NDArray[np.float64] = np.where(is_there, values, 0).sum(0) / is_there.sum(0)
        return means
    centred = wanted - wanted.mean(0)
    total = often.sum(1, keepdims=True)
    spread = often @ centred**2 - (often @ centred) ** 2 / total  # (B, K)
    with np.errstate(divide="ignore", invalid="ignore"):
        explained: NDArray[np.float64] = (1 - often @ (said - wanted) ** 2 / spread).mean(1)
    return explained


def _average_precision(
    said: NDArray[np.float64], is_positive: NDArray[np.bool_], often: NDArray[np.float64]
) -> NDArray[np.float64]:
    """``(B,)``, as scikit-learn's: the mean over positives of the share of them among all that are said as strongly."""
    order = np.argsort(-said, kind="stable")
    falling = said[order]
    ends = np.searchsorted(-falling, -falling, side="right") - 1  # the last one of those that are said alike
    there = often[:, order]
    hits = there * is_positive[order]
    with np.errstate(divide="ignore", invalid="ignore"):
        precision = (hits.cumsum(1) / there.cumsum(1))[:, ends]
        found: NDArray[np.float64] = np.where(hits > 0, hits * precision, 0).sum(1) / hits.sum(1)
    return found


@dataclass(frozen=True)
class _Path:
    """A probe's settings for so many rows, the simplest model first, and what it says under each of them."""

    settings: Callable[[int], list[float]]
    said: Callable[[Rows, NDArray[np.float64], Rows, Sequence[float], str], Iterator[NDArray[np.float64]]]


def _nearest(
    rows: Rows, wanted: NDArray[np.float64], queries: Rows, settings: Sequence[float], device: str
) -> Iterator[NDArray[np.float64]]:
    """Of each k the mean of the k nearest rows' columns, weighted."""
    most = min(len(rows), int(max(settings)))
    distances, places = KNearest(rows, k=most, device=device).neighbors(queries)
    weights = np.exp((1 - distances.astype(np.float64)) / _TEMPERATURE)
    for setting in settings:
        near = places[:, : int(setting)]
        some = weights[:, : int(setting), None]
        yield (some * wanted[near]).sum(1) / some.sum(1)


def _ridge(
    rows: Rows, wanted: NDArray[np.float64], queries: Rows, settings: Sequence[float], device: str
) -> Iterator[NDArray[np.float64]]:
    """Of each strength, in units of the centred rows' mean squared singular value, from one decomposition."""
    squares = float(((rows - rows.mean(0, dtype=np.float64)) ** 2).sum())
    unit = max(squares / min(rows.shape), np.finfo(np.float32).tiny)
    path = ridge_path(rows, wanted, [setting * unit for setting in settings], leave_one_out=False, device=device)
    for strength in path.strengths.tolist():
        yield path.decision_function(queries, strength)


def _logistic(
    rows: Rows, wanted: NDArray[np.float64], queries: Rows, settings: Sequence[float], device: str
) -> Iterator[NDArray[np.float64]]:
    """Of each C, one from where the one before has ended; each feature has a deviation of 1, as for a linear head."""
    centre = rows.mean(0, dtype=np.float64)
    deviation = rows.std(0, dtype=np.float64)
    scale = np.where(
        deviation > 1e-6 * deviation.max(), deviation, 1.0
    )  # a feature that is always the same says nothing
    fitted, asked = ((each - centre) / scale for each in (rows, queries))
    path = logistic_path(fitted.astype(np.float32), wanted.argmax(1), C=settings, device=device)
    for place in range(len(settings)):
        said = np.zeros((len(queries), wanted.shape[1]))  # a class that no row is of gets nothing
        said[:, path.classes] = path.predict_proba(asked.astype(np.float32), place)
        yield said


_PATHS: Mapping[ProbeName, _Path] = {
    "knn": _Path(lambda count: [float(k) for k in (50, 20, 10, 5, 3, 1) if k < count] or [1.0], _nearest),
    "ridge": _Path(lambda _: [float(each) for each in np.logspace(2, -6, 17)], _ridge),
    "linear": _Path(lambda _: [1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0], _logistic),
}
