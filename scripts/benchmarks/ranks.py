"""Several processes that share an extraction on one machine: ranks of torchrun against one process, Ray's actors too.

    .venv/bin/python scripts/benchmarks/ranks.py [--measure ranks actors] [--images 6000] [--ranks 2] [--rounds 3]

All have the same processors, and each is a whole job with all that it starts, over the JPEGs of 500x375 that extract.py
makes. torchrun, its ranks and Ray take seconds to start, so each also runs over a few of the images: what the others
take more is the time of their images alone, and such rates are compared as well.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from extract import TINY, photographs
from jobs import TINY as TINY_FILE
from measuring import rates_beyond_start, ratio, report, run, speeds

TARGETS = {"ranks against one process, whole jobs": 0.9, "actors against ranks, beyond the start": 0.95}
MEASURES = ("ranks", "actors")

Found = Mapping[str, list[float]]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--measure", nargs="+", choices=MEASURES, default=MEASURES)
    parser.add_argument("--backbone", default="resnet18", help="default: resnet18; also tiny, one convolution")
    parser.add_argument("--images", type=int, default=6000, help="default: 6,000")
    parser.add_argument("--few", type=int, default=600, help="default: 600; 0 leaves out rates beyond the start")
    parser.add_argument("--size", default="500x375", help="of the images; default: 500x375")
    parser.add_argument("--ranks", type=int, default=2, help="and as many actors; default: 2")
    parser.add_argument("--rounds", type=int, default=3, help="of which medians are taken; default: 3")
    options = parser.parse_args()
    os.environ |= {"RAY_worker_niceness": "0"}  # else whatever else runs on the machine comes before actors
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        counts = [options.images, *([options.few] if options.few else [])]
        for count in counts:
            photographs(folder / str(count) / "all", count, *map(int, options.size.split("x")))
        (folder / "tiny.py").write_text(TINY_FILE, encoding="utf-8")
        network = ["--backbone", options.backbone, "--weights", "none"]
        if options.backbone == TINY:
            network = ["--backbone", f"{folder / 'tiny.py'}:make", "--cut", "relu:avg"]
        program = ["-m", "featstore", "extract", *network, "--device", "cpu"]
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={options.ranks}"]
        commands = {
            "one process": program,
            "ranks": [*torchrun, *program],
            "actors": [*program, "--engine", "ray", "--actors", str(options.ranks)],
        }
        if "actors" not in options.measure:
            del commands["actors"]
        if "ranks" not in options.measure:
            del commands["one process"]
        contenders: dict[str, Callable[[], float]] = {
            _at(each, count): partial(_speed, command, folder / str(count), folder / "store")
            for each, command in commands.items()
            for count in counts
        }
        found = speeds(contenders, rounds=options.rounds)
        report("ranks", *_compared(found, list(commands), counts))


def _compared(
    found: Found, names: Sequence[str], counts: Sequence[int]
) -> tuple[dict[str, float], dict[str, float], dict[str, str]]:
    """Ratios, their targets, and what each contender took."""
    rates: dict[str, list[float]] = {}
    if len(counts) > 1:
        many, few = counts
        rates = {each: rates_beyond_start(found[_at(each, many)], found[_at(each, few)], many - few) for each in names}
    ratios: dict[str, float] = {}
    for ours, theirs in (("ranks", "one process"), ("actors", "ranks")):
        if ours in names and theirs in names:
            whole = f"{ours} against {theirs}, whole jobs"
            ratios[whole] = ratio(found, _at(ours, counts[0]), _at(theirs, counts[0]))
            if rates:
                ratios[f"{ours} against {theirs}, beyond the start"] = ratio(rates, ours, theirs)
    notes = {}
    for each in names:
        told = [f"{1 / statistics.median(found[_at(each, count)]):.1f} s for {count:,} images" for count in counts]
        told += [f"{statistics.median(rates[each]):.1f} images a second beyond the start"] if rates else []
        notes[each] = ", ".join(told)
    return ratios, {name: target for name, target in TARGETS.items() if name in ratios}, notes


def _at(name: str, count: int) -> str:
    return f"{name}, {count}"


def _speed(arguments: list[str], images: Path, store: Path) -> float:
    seconds = run([sys.executable, *arguments, "--images", str(images), "--store", str(store)]).seconds
    shutil.rmtree(store)
    return 1 / seconds


if __name__ == "__main__":
    main()
