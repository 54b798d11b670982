"""How long a large store takes to open and to join with its images, and how much memory, by number of rows.

    .venv/bin/python scripts/benchmarks/scale.py [--rows 1000000 10000000] [--folder DIR]

Each size is measured in a process of its own. Ten million rows take 4 GB of disk and some minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import machine
from store import write

from featstore import Features, FeatureStore, ImageSet, View
from featstore.images.digests import Digests, no_stats
from featstore.images.sources import AbsentSource
from featstore.store.spec import FeatureSpec

WIDTH = 16
"""Values a row: what is looked at here doesn't depend on it."""

NUM_PARTS = 10
SPEC = FeatureSpec(trunk="0" * 64, pool={"reduction": "none"}, view=View().facts(), precision="fp32", dtype="float16")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000_000, 10_000_000])
    parser.add_argument("--folder", type=Path, help="where files are made; default: the system's temporary folder")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure)))
        return
    print(machine())
    measured = {}
    for num_rows in options.rows:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            file_rows(Path(folder), num_rows)
            command = [sys.executable, __file__, "--measure", folder]
            found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        print(f"\n{num_rows:,} rows")
        for name, (seconds, num_bytes) in found.items():
            print(
                f"  {name:<40} {seconds:8.2f} s {num_bytes / 1e9:8.2f} GB more, {num_bytes / num_rows:6.0f} bytes a row"
            )
        measured[num_rows] = found
    first, *_, last = options.rows if len(options.rows) > 1 else options.rows * 2
    growth = {
        f"{name}: time by rows": measured[last][name][0] / measured[first][name][0] / (last / first)
        for name in measured[first]
    }
    print(json.dumps({"benchmark": "scale", "ratios": growth, "targets": {}}))


def file_rows(folder: Path, num_rows: int) -> None:
    """Parts and an image table of so many images, whose rows lie in another order."""
    rng = np.random.default_rng(0)
    digests = rng.integers(0, 256, (num_rows, 32), dtype=np.uint8)
    store = FeatureStore(folder)
    for part in np.array_split(rng.permutation(num_rows), NUM_PARTS):
        write(store, SPEC, torch.zeros(len(part), WIDTH, dtype=torch.float16), digests[part])
    images = ImageSet(
        name="many",
        ids=tuple(f"folder{row % 1000:03d}/image{row:08d}.jpg" for row in range(num_rows)),
        targets=np.zeros(num_rows, np.int64),
        classes=("one",),
        splits=np.full(num_rows, "train"),
        groups=None,
        task="single",
        source=AbsentSource(where="nowhere"),
    )
    store.save_images(images, Digests(values=digests, failed={}, stats=no_stats(num_rows)))


def measure(folder: Path) -> dict[str, tuple[float, int]]:
    """Seconds and bytes of each step, as a person takes them."""
    found: dict[str, tuple[float, int]] = {}
    store = FeatureStore(folder)
    step(found, "open the set and index its rows", lambda: store.set(SPEC.key).index)
    images = step(found, "read the image set", lambda: ImageSet.from_store(store))
    features = step(found, "join images and rows", lambda: store.features(images, SPEC.key))
    step(found, "the first shuffled batch", lambda: next(features.batches(256, shuffle=True)))
    step(found, "1,000 batches of random rows", lambda: random_batches(features, 1000))
    found["all of it, at its peak"] = (
        sum(seconds for seconds, _ in found.values()),
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    )
    return found


def random_batches(features: Features, count: int) -> None:
    for rows in np.random.default_rng(0).integers(0, len(features), (count, 256)):
        features[rows]


def step(found: dict[str, tuple[float, int]], name: str, run: Callable[[], Any]) -> Any:
    before, started = resident(), time.perf_counter()
    result = run()
    found[name] = time.perf_counter() - started, max(0, resident() - before)
    return result


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    main()
