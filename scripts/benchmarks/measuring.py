"""Measuring: contenders run in turns, ratios of their speeds, a table, and one line of JSON at the end."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
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


def rates_beyond_start(many: Iterable[float], few: Iterable[float], more: int) -> list[float]:
    """Images a second, round by round, without what a job takes to start.

    Args:
        many: speeds of whole jobs.
        few: those of the same with `more` images less.
        more: how many.
    """
    seconds = [1 / slow - 1 / fast for slow, fast in zip(many, few, strict=True)]
    return [more / max(each, 1e-3) for each in seconds]  # of so few images that starts differ by more, any number


def rate(batches: Iterable[object], *, seconds: float = 60.0) -> float:
    """Batches a second, of all or of as many as come in `seconds`."""
    started, count = time.perf_counter(), 0
    for _ in batches:
        count += 1
        if time.perf_counter() - started > seconds:
            break
    return count / (time.perf_counter() - started)


class Ran:
    """What a process took.

    Attributes:
        seconds: by the clock.
        most_bytes: of memory that it had at one time.
    """

    def __init__(self, seconds: float, most_bytes: int) -> None:
        self.seconds, self.most_bytes = seconds, most_bytes


def run(command: Sequence[str], **environment: str) -> Ran:
    """Runs a program, with these variables beside those there are; RuntimeError, with what it said, if it fails."""
    started = time.perf_counter()
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=os.environ | environment
    )
    assert process.stderr is not None
    said = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}: {said}")
    return Ran(time.perf_counter() - started, usage.ru_maxrss << 10)


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
