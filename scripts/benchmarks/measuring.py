"""Measuring: contenders run in turns, ratios of their speeds, a table, and one line of JSON at the end."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch


def speeds(contenders: Mapping[str, Callable[[], float]], *, rounds: int) -> dict[str, list[float]]:
    """What each contender says of its speed, round by round: all of them run once a round, in turns.

    A machine that others use as well is slow for all of a round or for none, so ratios hold where times don't. Before
    the first of several rounds all run once unmeasured, as what is read for the first time is no measure; a single
    round only shows that they run.
    """
    if rounds > 1:
        for run in contenders.values():
            run()
    measured: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, run in contenders.items():
            measured[name].append(run())
    return measured


def ratio(measured: Mapping[str, list[float]], ours: str, theirs: str) -> float:
    """The median of our speed over theirs, round by round."""
    return statistics.median(our / their for our, their in zip(measured[ours], measured[theirs], strict=True))


def rate(batches: Iterable[object], *, seconds: float = 60.0) -> float:
    """Batches a second, of all or of as many as come in `seconds`."""
    started, count = time.perf_counter(), 0
    for _ in batches:
        count += 1
        if time.perf_counter() - started > seconds:
            break
    return count / (time.perf_counter() - started)


def report(
    benchmark: str, ratios: Mapping[str, float], targets: Mapping[str, float], notes: Mapping[str, str] | None = None
) -> None:
    """Prints the machine, a table of ratios beside their targets, further numbers, and last the line of JSON."""
    print(machine())
    width = max(map(len, ratios))
    for name, value in ratios.items():
        target = targets.get(name)
        verdict = "" if target is None else f"   target >= {target:g}   {'yes' if value >= target else 'NO'}"
        print(f"{name:<{width}}  {value:8.2f}{verdict}")
    for name, text in (notes or {}).items():
        print(f"{name}: {text}")
    rounded = {name: round(value, 3) for name, value in ratios.items()}
    print(json.dumps({"benchmark": benchmark, "ratios": rounded, "targets": dict(targets)}))


def machine() -> str:
    """The machine in a line."""
    processor = platform.processor() or platform.machine()
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    for line in lines:
        if line.startswith("model name"):
            processor = line.partition(":")[2].strip()
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    load = os.getloadavg()[0]
    return (
        f"{len(os.sched_getaffinity(0))} processors ({processor}){gpu}; Python {platform.python_version()}, "
        f"torch {torch.__version__}; load {load:.1f} at the end"
    )
