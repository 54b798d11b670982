"""Kills jobs that share an extraction, until each is done: ranks of two sizes, then actors of Ray and their driver.

    .venv/bin/python scripts/crash_jobs.py [--kills 20] [--images 600] [--seed 0] [--of ranks ray]

Real processes end by SIGKILL at random moments, are started anew, as two ranks and later as three, and in the end the
store must hold exactly the rows of an unbroken run, bit for bit. Ends with an error where it doesn't.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from support.tiny import photos

from featstore import FeatureStore, ImageSet

MODEL = """
import time
from collections import OrderedDict

from torch import nn


class Slow(nn.Module):
    def fingerprint(self):
        return "gives what it gets, late"

    def forward(self, values):
        time.sleep(0.1)
        return values


def make():
    layers = [("slow", Slow()), ("conv", nn.Conv2d(3, 8, 3, 2)), ("pool", nn.AdaptiveAvgPool2d(1))]
    return nn.Sequential(OrderedDict([*layers, ("flat", nn.Flatten()), ("fc", nn.Linear(8, 5))]))
"""

# Of a job that writes a part every half second, so that there is something to lose and something to keep.
PROGRAM = """
import sys
from featstore.cli.app import main
from featstore.extraction import job
job.COMMIT_SECONDS = 0.5
sys.exit(main(sys.argv[1:]))
"""
BATCH = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=20, help="of each kind; default: 20")
    parser.add_argument("--images", type=int, default=600, help="default: 600")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--of", nargs="+", choices=("ranks", "ray"), default=["ranks", "ray"])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        work = Work(Path(name), options.images, random.Random(options.seed))
        if "ranks" in options.of:
            kill_ranks(work, options.kills)
        if "ray" in options.of:
            kill_ray(work, options.kills)


class Work:
    """Photographs, a model that takes its time, and the rows of an unbroken run."""

    def __init__(self, folder: Path, num_images: int, draws: random.Random) -> None:
        self.folder, self.draws, self.num_images = folder, draws, num_images
        photos(folder / "photos", num_images)
        (folder / "slow.py").write_text(MODEL, encoding="utf-8")
        assert self.start("whole").wait() == 0
        self.images = ImageSet.from_folder(folder / "photos").split(valid=0.2, seed=0)
        (self.key,) = (each.key for each in FeatureStore(folder / "whole").sets())
        self.whole = FeatureStore(folder / "whole").features(self.images, self.key)[:]

    def start(self, store: str, *flags: str, rank: int | None = None, count: int = 1) -> subprocess.Popen[bytes]:
        """A process that extracts into a store of that name."""
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        if rank is not None:  # as torchrun tells it
            environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
        arguments = ["extract", "--images", "photos", "--store", store, "--backbone", "slow.py:make", "--size", "32"]
        arguments += ["--batch-size", str(BATCH), "--device", "cpu", "--dtype", "float32", "--workers", "1", *flags]
        return subprocess.Popen(
            [sys.executable, "-c", PROGRAM, *arguments],
            cwd=self.folder,
            env=environment,
            stderr=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )

    def num_stored(self, store: str) -> int:
        """Rows there, as a reader finds them meanwhile."""
        if not (self.folder / store).exists():
            return 0
        found = FeatureStore(self.folder / store).sets()
        return found[0].index.num_images if found else 0

    def check(self, store: str) -> None:
        """Refuses rows that aren't those of the unbroken run."""
        found = FeatureStore(self.folder / store)
        assert [each.key for each in found.sets()] == [self.key]
        assert torch.equal(found.features(self.images, self.key)[:], self.whole), f"{store} has other rows"
        report = found.verify()
        assert not report.damaged, report


def kill_ranks(work: Work, num_kills: int) -> None:
    """Two ranks for half of the kills, three for the others; each is killed with all of them, or alone."""
    started, killed = time.monotonic(), 0
    while killed < num_kills:
        count = 2 if killed < num_kills // 2 else 3
        ranks = [work.start("ranks", rank=rank, count=count) for rank in range(count)]
        time.sleep(work.draws.uniform(2.0, 14.0))
        chosen = ranks if work.draws.random() < 0.5 else [work.draws.choice(ranks)]
        for each in chosen:
            killed += each.poll() is None
            each.send_signal(signal.SIGKILL)
        if len(chosen) < len(ranks):
            time.sleep(work.draws.uniform(0.0, 3.0))
        for each in ranks:
            each.kill()
            each.wait()
        if work.num_stored("ranks") == work.num_images:
            forget(work, "ranks")
    ended = [work.start("ranks", rank=rank, count=3) for rank in range(3)]
    assert [each.wait() for each in ended] == [0, 0, 0]
    work.check("ranks")
    print(f"{killed} kills of ranks, then 3 that ended: {work.num_images} rows as ever, {since(started)}", flush=True)


def kill_ray(work: Work, num_kills: int) -> None:
    """Actors, and now and then their driver."""
    started, killed = time.monotonic(), {"actors": 0, "drivers": 0}
    flags = ["--engine", "ray", "--actors", "2"]
    driver = work.start("ray", *flags)
    while sum(killed.values()) < num_kills:
        time.sleep(work.draws.uniform(4.0, 16.0))
        if driver.poll() is not None:
            assert driver.returncode == 0, driver.returncode
            work.check("ray")
            forget(work, "ray")
            driver = work.start("ray", *flags)
        elif work.draws.random() < 0.2:
            driver.kill()
            driver.wait()
            killed["drivers"] += 1
            driver = work.start("ray", *flags)
        elif actors := processes_called("ray::_Worker"):
            os.kill(work.draws.choice(actors), signal.SIGKILL)
            killed["actors"] += 1
    assert driver.wait() == 0
    work.check("ray")
    words = " and ".join(f"{count} kills of {what}" for what, count in killed.items())
    print(f"{words}, then one that ended: {work.num_images} rows as ever, {since(started)}", flush=True)


def forget(work: Work, store: str) -> None:
    """Begins anew, as there is nothing left to be killed at."""
    work.check(store)
    subprocess.run(["rm", "-r", str(work.folder / store)], check=True)


def processes_called(title: str) -> Sequence[int]:
    """Their numbers."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdigit() and (folder / "cmdline").read_bytes().startswith(title.encode()):
                found.append(int(folder.name))
        except OSError:  # it has ended
            continue
    return found


def since(started: float) -> str:
    return f"{time.monotonic() - started:.0f} s"


if __name__ == "__main__":
    main()
