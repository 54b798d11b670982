"""How fast head experiments are: many heads at once, and exact solvers against scikit-learn's, to the same results.

    .venv/bin/python scripts/benchmarks/experiments.py [--measure packed ridge logistic grid neighbors imagenet]
        [--rounds 3] [--scale 1] [--every 1] [--clock wall] [--device cpu]

``packed``: 32 linear heads of 50,000 x 1024, of 10 and of 100 classes, in one pass over the batches against one after
another. ``imagenet``, on a GPU: seconds of an epoch of 100 settings of 1,281,167 x 2048, 1000 classes.
``ridge``: a path of 50 strengths against 50 fits in the same precision, float64, and in float32, 20,000 x 1024.
``logistic``: 20,000 x 1024 of 100 classes, for each C the time to the objective at which scikit-learn ends by its own
tolerance, with all that comes before, each from 0. ``grid``: 64 strengths and 5 folds of 10,000 x 512, 10 classes,
against GridSearchCV at its own tolerance. ``neighbors``: the 20 nearest by cosine of 10,000 queries among 100,000 x
512, against the brute force.

Rows are normal, of classes that overlap, with a spectrum that falls as that of a backbone's features does, and none
below zero. Results are compared before ratios are told. On a machine that others use, ``OMP_NUM_THREADS=1`` with
``OPENBLAS_NUM_THREADS=1`` and ``--clock processor`` count what each side computes, whoever waits.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import packed_heads
from measuring import ratio, report, speeds
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import GridSearchCV, StratifiedKFold, cross_val_score
from sklearn.neighbors import NearestNeighbors

from training.solvers.logistic import LogisticPath, cross_validated, logistic_path
from training.solvers.neighbors import KNearest
from training.solvers.ridge import ridge_path

Floats = NDArray[np.float32]
Found = tuple[dict[str, float], dict[str, str]]
"""Ratios by name, and further numbers in words."""

LOGISTIC = "logistic regression to the same objective, geometric mean"
GRID, RIDGE = "64 strengths x 5 folds against GridSearchCV", "ridge path of 50 strengths against 50 fits"
NEIGHBORS = "20 nearest of 10,000 queries in 100,000 rows"
TARGETS = {"packed heads, 10 classes": 3.5, "packed heads, 100 classes": 1.1}
TARGETS |= {LOGISTIC: 1.5, GRID: 10.0, RIDGE: 20.0, NEIGHBORS: 2.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--measure", nargs="+", choices=[*MEASURES], default=[*MEASURES])
    parser.add_argument("--rounds", type=int, default=3, help="of which medians are taken; default: 3")
    parser.add_argument("--scale", type=float, default=1.0, help="of rows and widths; below 1 numbers mean nothing")
    parser.add_argument(
        "--every", type=int, default=1, help="grid: scikit-learn fits every such strength, counted so often"
    )
    parser.add_argument("--clock", choices=[*CLOCKS], default="wall", help="what seconds are; default: wall")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    warnings.simplefilter("ignore", ConvergenceWarning)
    ratios: dict[str, float] = {}
    notes: dict[str, str] = {}
    for name in options.measure:
        found, told = MEASURES[name](options)
        ratios |= found
        notes |= told
        for each, value in found.items():
            print(f"{each}: {value:,.2f}", flush=True)
        for text in told.values():
            print(text, flush=True)
    report("experiments", ratios, {name: target for name, target in TARGETS.items() if name in ratios}, notes)


def made(num_rows: int, width: int, num_classes: int) -> tuple[Floats, NDArray[np.int64]]:
    """Rows of classes that overlap, with a falling spectrum, and their labels."""
    rng = np.random.default_rng(0)
    labels = np.arange(num_rows) % num_classes
    values = rng.standard_normal((num_rows, width), dtype=np.float32)
    values += 0.12 * rng.standard_normal((num_classes, width), dtype=np.float32)[labels]
    spectrum = np.arange(1, width + 1, dtype=np.float32) ** -0.5
    turn, _ = np.linalg.qr(rng.standard_normal((width, width), dtype=np.float32))
    turned = (values * spectrum * 4) @ turn + np.float32(0.3)
    return np.maximum(turned, 0), labels


def sized(options: argparse.Namespace, num_rows: int, width: int) -> tuple[int, int]:
    return max(200, int(num_rows * options.scale)), max(16, int(width * options.scale))


def compared(options: argparse.Namespace, contenders: Mapping[str, Callable[[], float]]) -> tuple[float, str]:
    """How many times as fast `ours` is as `theirs`, and the seconds of both."""
    found = speeds(contenders, rounds=options.rounds)
    seconds = ", ".join(f"{name} {1 / float(np.median(each)):.2f} s" for name, each in found.items())
    return ratio(found, "ours", "theirs"), seconds


def timed(options: argparse.Namespace, run: Callable[[], Any], times: int = 1) -> Callable[[], float]:
    """Runs of `run` a second, as if each were `times` as many."""
    clock = CLOCKS[options.clock]

    def rate() -> float:
        started = clock()
        run()
        return 1 / (times * max(clock() - started, 1e-6))

    return rate


def packed(options: argparse.Namespace) -> Found:
    """Heads of as many rates and weight decays; by the clock alone."""
    heads, classes = (32, [10, 100]) if options.scale >= 1 else (3, [10])
    with tempfile.TemporaryDirectory() as folder:
        return packed_heads.packed(Path(folder), max(600, int(50_000 * options.scale)), heads, classes, options.rounds)


def imagenet(options: argparse.Namespace) -> Found:
    """Nothing without a GPU."""
    if options.device == "cpu":
        return {}, {"imagenet": "imagenet is measured on a GPU: --device cuda"}
    with tempfile.TemporaryDirectory() as folder:
        return {}, packed_heads.settings_of_imagenet(Path(folder), options.device)


def ridge(options: argparse.Namespace) -> Found:
    """All strengths at once; without and with leave-one-out errors, which fits by scikit-learn don't have."""
    values, _ = made(*sized(options, 20_000, 1024), 10)
    rng = np.random.default_rng(1)
    targets = values @ rng.standard_normal(values.shape[1:]).astype(np.float32)
    targets += rng.standard_normal(values.shape[:1]).astype(np.float32)
    strengths = np.geomspace(1e-2, 1e4, 50).tolist()

    def ours(*, leave_one_out: bool = False) -> Any:
        return ridge_path(values, targets, strengths, leave_one_out=leave_one_out, device=options.device)

    def theirs(given: Any = values) -> Any:
        return [Ridge(alpha=strength).fit(given, targets.astype(given.dtype)) for strength in strengths]

    precise = values.astype(np.float64)
    path, fits = ours(), theirs(precise)
    largest = np.abs(fits[0].coef_).max()
    apart = max(np.abs(path.coefficients[place, :, 0] - fit.coef_).max() / largest for place, fit in enumerate(fits))
    assert apart < 1e-6, apart
    contenders = {"ours": timed(options, ours), "theirs": timed(options, lambda: theirs(precise))}
    contenders["theirs in float32"] = timed(options, theirs)
    contenders["with leave-one-out errors"] = timed(options, lambda: ours(leave_one_out=True))
    value, seconds = compared(options, contenders)
    return {RIDGE: value}, {"ridge": f"{seconds}; coefficients differ by {apart:.1e} of the largest at most"}


def logistic(options: argparse.Namespace) -> Found:
    """Each C alone, from 0, with the loosest tolerance that ends at an objective no higher than scikit-learn's."""
    values, labels = made(*sized(options, 20_000, 1024), 100 if options.scale >= 1 else 5)
    ratios, told = [], []
    for strength in (0.01, 1.0, 100.0):

        def theirs(strength: float = strength) -> LogisticRegression:
            return LogisticRegression(C=strength, max_iter=1000).fit(values, labels)

        def ours(tol: float, strength: float = strength) -> LogisticPath:
            return logistic_path(values, labels, C=strength, tol=tol, device=options.device)

        aim = objective_of(theirs(), values, labels, strength)
        tol = next(tol for tol in 10.0 ** -np.arange(0.5, 8, 0.5) if ours(tol).objectives[0] <= aim * (1 + 1e-6))
        reached = ours(tol)
        finished = ours(1e-5)
        contenders = {"ours": timed(options, partial(ours, tol)), "theirs": timed(options, theirs)}
        contenders["ours to 1e-5"] = timed(options, partial(ours, 1e-5))
        value, seconds = compared(options, contenders)
        ratios.append(value)
        told.append(
            f"C {strength:g}: {value:.2f} ({seconds}; objective {reached.objectives[0]:.6g}, theirs {aim:.6g}, "
            f"least {finished.objectives[0]:.6g})"
        )
    return {LOGISTIC: float(np.exp(np.mean(np.log(ratios))))}, {"logistic": "; ".join(told)}


def objective_of(model: LogisticRegression, values: Floats, labels: NDArray[np.int64], strength: float) -> float:
    """What scikit-learn's regression minimises, at its solution, in float64."""
    coefficients = model.coef_.astype(np.float64)
    logits = values @ coefficients.T + model.intercept_
    largest = logits.max(1, keepdims=True)
    sums = np.log(np.exp(logits - largest).sum(1)) + largest[:, 0]
    return float(strength * (sums - logits[np.arange(len(labels)), labels]).sum() + (coefficients**2).sum() / 2)


def grid(options: argparse.Namespace) -> Found:
    """The whole grid: the best mean accuracy of ours must be no lower than theirs, once that is solved.

    At its default tolerance scikit-learn's accuracies lie up to ten images in ten thousand off those of its solutions,
    to either side, and the best of many strengths is the luckiest.
    """
    values, labels = made(*sized(options, 10_000, 512), 10 if options.scale >= 1 else 3)
    strengths = np.geomspace(1e-4, 1e2, 64)

    def ours() -> Any:
        return cross_validated(values, labels, C=strengths.tolist(), folds=5, device=options.device)

    def theirs() -> GridSearchCV:
        some = {"C": strengths[:: options.every].tolist()}
        return GridSearchCV(LogisticRegression(), some, cv=StratifiedKFold(5), refit=False).fit(values, labels)

    scores, search = ours().mean(1), theirs()
    best = float(max(search.cv_results_["mean_test_score"]))
    slack = 0.0 if options.scale >= 1 else 0.02  # of so few rows one is much
    chosen = LogisticRegression(**search.best_params_, tol=1e-8, max_iter=10_000)
    solved = float(cross_val_score(chosen, values, labels, cv=StratifiedKFold(5)).mean())
    assert scores.max() >= min(best, solved) - slack, (scores.max(), best, solved)
    contenders = {"ours": timed(options, ours), "theirs": timed(options, theirs, options.every)}
    value, seconds = compared(options, contenders)
    return {GRID: value}, {
        "grid": f"{seconds}; best accuracy {scores.max():.4f}, theirs {best:.4f}, solved {solved:.4f}"
    }


def neighbors(options: argparse.Namespace) -> Found:
    """Search alone; nine in ten thousand neighbours may differ, where two are as near in float32."""
    num_rows, width = sized(options, 100_000, 512)
    values, _ = made(num_rows + num_rows // 10, width, 100)
    rows, queries = values[:num_rows], values[num_rows:]

    def ours() -> Any:
        return KNearest(rows, k=20, metric="cosine", device=options.device).neighbors(queries)

    def theirs() -> Any:
        return NearestNeighbors(n_neighbors=20, metric="cosine", algorithm="brute").fit(rows).kneighbors(queries)

    equal = float((np.sort(ours()[1]) == np.sort(theirs()[1])).mean())
    assert equal > 0.999, equal
    value, seconds = compared(options, {"ours": timed(options, ours), "theirs": timed(options, theirs)})
    return {NEIGHBORS: value}, {"neighbors": f"{seconds}; {equal:.5f} of the neighbours are the same"}


MEASURES: dict[str, Callable[[argparse.Namespace], Found]] = {
    "packed": packed,
    "ridge": ridge,
    "logistic": logistic,
    "grid": grid,
    "neighbors": neighbors,
    "imagenet": imagenet,
}
CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}

if __name__ == "__main__":
    main()
