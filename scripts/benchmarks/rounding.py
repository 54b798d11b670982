"""What features cost and lose in each storage type: bytes, error against float32, and how fast batches come.

    .venv/bin/python scripts/benchmarks/rounding.py [--backbone scripts/efficientnet_lite0.py:make] [--images 64]
        [--cuts stem:none stage1:none ...] [--rounds 5]

Images are those of extract.py, of photographs. Errors are the root of the sum of all squared differences, through that
of the squared values.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
from extract import photographs
from measuring import ratio, report, speeds

from featstore import Features, FeatureStore, backbone, extract
from featstore.files.storage_types import STORAGE_TYPES
from featstore.words import size_text

CUTS = ["stem:none", "stage1:none", "stage3:none", "maps:none", "maps:concat"]
BATCH = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--backbone", default=f"{Path(__file__).parents[1] / 'efficientnet_lite0.py'}:make")
    parser.add_argument("--cuts", nargs="+", default=CUTS, metavar="CUT:REDUCTION")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5, help="of which medians are taken; default: 5")
    options = parser.parse_args()
    notes: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        images = photographs(Path(folder) / "images", options.images, 500, 375)
        store = FeatureStore(Path(folder) / "store")
        stored: dict[str, list[Features]] = {}
        for name in STORAGE_TYPES:
            keys = extract(backbone(options.backbone), images, store, cuts=options.cuts, dtype=name).keys
            stored[name] = [store.features(images, key, access="memory") for key in keys]
        for place, cut in enumerate(options.cuts):
            exact = stored["float32"][place].numpy()
            for name in STORAGE_TYPES:
                each = stored[name][place]
                notes[f"{cut} {name}"] = (
                    f"{size_text(each.num_bytes // len(each))} a row, error {error(exact, each):.2g}"
                )
        largest = max(range(len(options.cuts)), key=lambda place: stored["int8"][place].num_bytes)
        contenders = {name: partial(rows_a_second, stored[name][largest]) for name in STORAGE_TYPES}
        measured = speeds(contenders, rounds=options.rounds)
    ratios = {
        f"batches of {options.cuts[largest]} in float32, int8 against {name}": ratio(measured, "int8", name)
        for name in ("float16", "float32")
    }
    report("rounding", ratios, {}, notes)


def error(exact: np.ndarray, each: Features) -> float:
    """Of all rows, in float64, row by row."""
    differences = whole = 0.0
    for row, rounded in zip(exact, each.tensor().float().numpy(), strict=True):
        differences += float(np.square(rounded - row, dtype=np.float64).sum())
        whole += float(np.square(row, dtype=np.float64).sum())
    return math.sqrt(differences / whole)


def rows_a_second(features: Features) -> float:
    """Of shuffled batches, as training takes them."""
    started = time.perf_counter()
    for values, _ in features.batches(BATCH, shuffle=True):
        values.float()
    return len(features) / (time.perf_counter() - started)


if __name__ == "__main__":
    main()
