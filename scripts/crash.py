"""Crashes what changes a store as tests/promises/test_crash.py does, thousands of times: the tests draw few.

    .venv/bin/python scripts/crash.py [--kills 200] [--crowd-kills 200] [--runs 5] [--power-losses 600]
        [--second-power-losses 15] [--seed 0]

Ends with an error at the first crash that loses, tears or repeats a row, or lets a reader see what never was; the line
before it names the seed to draw it again with.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from support.crashing import SCENARIOS, Forker, UnbrokenRun, crowd_and_check, kill_and_check, rows_in

NUM_IMAGES = 60
"""Of an extraction that is killed."""

KILLS_A_CROWD = 20
"""A crowd that goes on for long has extracted all images, and then has little left to do."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    for flag, default, text in (
        ("--kills", 200, "of extractions with kill -9, at random instants"),
        ("--crowd-kills", 200, "of one of many processes at work on one store"),
        ("--runs", 5, "of each scenario, each with other file names, killed at every operation"),
        ("--power-losses", 600, "simulated in each of these"),
        ("--second-power-losses", 15, "in each of these, in the run after a kill"),
        ("--seed", 0, "of the first case, the next one has the next"),
    ):
        parser.add_argument(flag, type=int, default=default, help=f"{text}; default: {default}")
    options = parser.parse_args()
    first: int = options.seed
    with Forker() as forker:
        kill_extractions(forker, range(first, first + options.kills))
        kill_in_crowds(forker, range(first, first + math.ceil(options.crowd_kills / KILLS_A_CROWD)))
    for name in SCENARIOS:
        for seed in range(first, first + options.runs):
            crash_scenario(name, seed, options.power_losses, options.second_power_losses)


def kill_extractions(forker: Forker, seeds: range) -> None:
    """Kills extractions one by one."""
    start, num_killed = time.monotonic(), 0
    with new_folder() as folder:
        forker.run("extract", folder, num_images=NUM_IMAGES)
        whole = rows_in(folder)

    def kill_once(inner: Path, seed: int) -> None:
        nonlocal num_killed
        num_killed += kill_and_check(forker, inner, NUM_IMAGES, whole, random.Random(seed))

    repeat("kill of an extraction", seeds, kill_once)
    tell(f"{len(seeds)} kills of an extraction, {num_killed} of them before it had finished", start)


def kill_in_crowds(forker: Forker, seeds: range) -> None:
    """Kills processes of all kinds while others read and write the same store."""
    start, killed = time.monotonic(), Counter[str]()
    with new_folder() as reference:
        forker.run("extract reference", reference)
        repeat(
            "crowd",
            seeds,
            lambda inner, seed: killed.update(
                crowd_and_check(forker, inner, reference, KILLS_A_CROWD, random.Random(seed))
            ),
        )
    kinds = ", ".join(f"{count} of {work!r}" for work, count in sorted(killed.items()))
    tell(f"{killed.total()} kills in {len(seeds)} crowds ({kinds})", start)


def crash_scenario(name: str, seed: int, num_losses: int, num_second_losses: int) -> None:
    """Crashes a scenario at each operation, and at random ones."""
    start, what = time.monotonic(), f"{name}, file names of seed {seed}"
    with new_folder() as folder:
        run = UnbrokenRun.in_folder(SCENARIOS[name], folder, seed=seed)
    repeat(f"{what}, kills", range(1), lambda inner, _: run.kill_everywhere(inner))
    repeat(f"{what}, power loss", range(num_losses), lambda inner, loss: run.lose_power(inner, random.Random(loss)))
    repeat(
        f"{what}, power loss in the run after a kill",
        range(num_second_losses),
        lambda inner, loss: run.lose_power_in_second_run(inner, random.Random(loss)),
    )
    kills = f"killed at each of {len(run.operations)} operations"
    tell(f"{what}: {kills}, {num_losses} power losses, {num_second_losses} in the run after a kill", start)


def repeat(what: str, seeds: range, crash: Callable[[Path, int], None]) -> None:
    """Crashes once a seed, each time in a new folder."""
    for seed in seeds:
        with new_folder() as folder:
            try:
                crash(folder / "crashed", seed)
            except Exception:
                print(f"{what}: seed {seed} failed", flush=True)
                raise


def tell(what: str, start: float) -> None:
    """Says what has passed, and since when it ran."""
    print(f"{what}: all pass ({time.monotonic() - start:.0f} s)", flush=True)


@contextmanager
def new_folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


if __name__ == "__main__":
    main()
