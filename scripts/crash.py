"""Crashes extractions as tests/test_crash.py does, thousands of times: too slow for the tests, which draw a few cases.

    .venv/bin/python scripts/crash.py [--kills 200] [--power-losses 3000] [--second-power-losses 500] [--seed 0]

Ends with an error at the first crash that loses, tears or repeats a row; the line before it names the seed to draw it
again with.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from crashing import (
    Forker,
    UnbrokenRun,
    kill_and_check,
    lose_power_and_check,
    lose_power_in_second_run_and_check,
    rows_in,
)

NUM_IMAGES = 60


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--kills", type=int, default=200, help="with kill -9, at random instants; default: 200")
    parser.add_argument("--power-losses", type=int, default=3000, help="simulated; default: 3000")
    parser.add_argument("--second-power-losses", type=int, default=500, help="in a run after a kill; default: 500")
    parser.add_argument("--seed", type=int, default=0, help="of the first case, the next one has the next; default: 0")
    options = parser.parse_args()
    first: int = options.seed
    with new_folder() as folder:
        kill(folder, range(first, first + options.kills))
    with new_folder() as folder:
        run = UnbrokenRun.in_folder(folder)
    known: set[frozenset[Path]] = set()
    repeat(
        "power losses",
        range(first, first + options.power_losses),
        lambda folder, rng: lose_power_and_check(run, folder, rng, known),
    )
    repeat(
        "power losses in the run after a kill",
        range(first, first + options.second_power_losses),
        lambda folder, rng: lose_power_in_second_run_and_check(run, folder, rng),
    )


def kill(folder: Path, seeds: range) -> None:
    """Kills real processes; `folder` is for the unbroken run that theirs are compared with."""
    num_killed = 0

    def kill_once(inner: Path, rng: random.Random) -> None:
        nonlocal num_killed
        num_killed += kill_and_check(forker, inner, NUM_IMAGES, whole, rng)

    with Forker() as forker:
        forker.run(folder, NUM_IMAGES)
        whole = rows_in(folder)
        repeat("kills", seeds, kill_once)
    print(f"{num_killed} of the {len(seeds)} kills came before the extraction had finished.", flush=True)


def repeat(what: str, seeds: range, crash: Callable[[Path, random.Random], None]) -> None:
    """Crashes once a seed, each time in a new folder."""
    start = time.monotonic()
    for seed in seeds:
        with new_folder() as folder:
            try:
                crash(folder / "crashed", random.Random(seed))
            except Exception:
                print(f"{what}: seed {seed} failed", flush=True)
                raise
    print(f"{what}: all {len(seeds)} pass ({time.monotonic() - start:.0f} s)", flush=True)


@contextmanager
def new_folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


if __name__ == "__main__":
    main()
