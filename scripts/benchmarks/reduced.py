"""What decoding JPEGs at reduced scale saves, and how far views and features are from those of the full decode.

    .venv/bin/python scripts/benchmarks/reduced.py [--backbone scripts/efficientnet_lite0.py:make] [--images 32]
        [--sizes 500x375 1600x1200 4000x3000] [--rounds 5]

Images are those of extract.py, of photographs. Speeds are those of one thread, by its processor time: bytes to the
evaluation view. The similarity is the cosine of the last pooled features of an image.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from extract import TINY, photographs, tiny
from measuring import ratio, report, speeds
from numpy.typing import NDArray

from featstore import FeatureStore, ImageSet, StagedModel, View, backbone, extract
from featstore.images.decode import decode
from featstore.images.decoders import POLICIES


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--backbone", default=f"{Path(__file__).parents[1] / 'efficientnet_lite0.py'}:make")
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--sizes", nargs="+", default=["500x375", "1600x1200", "4000x3000"], metavar="WxH")
    parser.add_argument("--rounds", type=int, default=5, help="of which medians are taken; default: 5")
    options = parser.parse_args()
    model = tiny() if options.backbone == TINY else backbone(options.backbone)
    views = {word: replace(model.view, decode=word) for word in POLICIES}
    ratios: dict[str, float] = {}
    notes: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        for size in options.sizes:
            width, height = map(int, size.split("x"))
            images = photographs(Path(folder) / size, options.images, width, height)
            files = [images.read(place) for place in range(len(images))]
            contenders = {word: partial(rendered_a_second, files, view) for word, view in views.items()}
            measured = speeds(contenders, rounds=options.rounds)
            ratios[f"{size}, reduced against full"] = ratio(measured, "reduced", "full")
            shown = {word: torch.stack([rendered(each, view) for each in files]) for word, view in views.items()}
            difference = (shown["reduced"].float() - shown["full"].float()).abs()
            store = FeatureStore(Path(folder) / f"store of {size}")
            alike = similarities(*(features(model, images, store, view) for view in views.values()))
            rates = ", ".join(f"{word} {1000 / statistics.median(measured[word]):.2f}" for word in views)
            notes[size] = (
                f"{rates} ms an image; views differ by {difference.mean():.2f} levels on average, "
                f"{difference.max():.0f} at most; similarity of features {np.median(alike):.4f}, "
                f"at least {alike.min():.4f}"
            )
    report("reduced", ratios, {}, notes)


def rendered_a_second(files: list[bytes | NDArray[np.uint8]], view: View) -> float:
    """Views by this thread."""
    started = time.thread_time()
    for each in files:
        rendered(each, view)
    return len(files) / (time.thread_time() - started)


def rendered(file: bytes | NDArray[np.uint8], view: View) -> torch.Tensor:
    """The evaluation view of an image's bytes."""
    return view.render(decode(file, policy=view.decode, resize=view.resize).pixels, bytes(32))


def features(model: StagedModel, images: ImageSet, store: FeatureStore, view: View) -> np.ndarray:
    """Of the last stage, averaged over places."""
    cut = model.default_cut
    (key,) = extract(model, images, store, cuts=[f"{cut}:avg"], view=view, dtype="float32").keys
    return store.features(images, key).numpy()


def similarities(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """The cosines of rows."""
    lengths = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
    cosines: np.ndarray = (one * other).sum(1) / lengths
    return cosines


if __name__ == "__main__":
    main()
