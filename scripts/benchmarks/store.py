"""How fast a store is read, written and verified, against np.memmap, h5py, a DataLoader, and the disk and checksum.

    .venv/bin/python scripts/benchmarks/store.py [--rounds 7] [--scale 1.0] [--folder DIR]

All is warm (in the system's cache), in one process, with contenders in turns; each batch goes into a tensor of its own
on both sides. At scale 1 it takes 3 GB of disk, 4 GB of memory and a few minutes.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from measuring import rate, ratio, report, speeds
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from featstore import Features, FeatureStore, ImageSet, View
from featstore.store.spec import FeatureSpec

BATCH = 256
COMMIT_BYTES = 64 << 20
STREAM_BYTES = 64 << 20
"""Memory that a stream may take."""

TARGETS = {
    "random batches / np.memmap, 2 KB rows": 1.5,
    "random batches / np.memmap, 50 KB rows": 1.5,
    "random batches / sorted h5py, 2 KB rows": 10,
    "sequential batches / np.memmap, 2 KB rows": 0.9,
    "sequential batches / np.memmap, 50 KB rows": 0.9,
    "16 parts / one, mapped, before compact": 0.4,
    "16 parts / one, mapped, after compact": 0.95,
    "16 parts / one, as they are read by default": 0.95,
    "block shuffle / random, mapped, 2 KB rows": 0.7,
    "block shuffle / random, mapped, 50 KB rows": 0.7,
    "write with commits of 64 MB / raw write and fsync": 0.7,
    "verify / zlib.crc32 in memory": 0.7,
    "shuffled epoch / DataLoader of rows": 8,
    "size of a set / memory taken by its stream": 4,
}


@dataclass(frozen=True, kw_only=True)
class Filed:
    """Rows in a `.npy` file and, the same, in stores.

    Attributes:
        rows: ``(N, *F)`` float16, mapped.
        images: whose rows these are.
        one, many: stores of them in one part and in sixteen.
        key: of the feature set in both.
    """

    rows: NDArray[np.float16]
    images: ImageSet
    one: Path
    many: Path
    key: str

    def features(self, store: Path, **options: Any) -> Features:
        """The rows out of one of the stores."""
        return FeatureStore(store, **options).features(self.images, self.key)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7, help="of which medians are taken; default: 7")
    parser.add_argument("--scale", type=float, default=1.0, help="of the numbers of rows; default: 1")
    parser.add_argument("--folder", type=Path, help="where files are made; default: the system's temporary folder")
    parser.add_argument("--stream", nargs=2, metavar=("STORE", "KEY"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.stream:
        print(memory_of_stream(Path(options.stream[0]), options.stream[1]))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        measure(Path(folder), rounds=options.rounds, scale=options.scale)


def measure(folder: Path, *, rounds: int, scale: float) -> None:
    small = file_rows(folder / "small", int(200_000 * scale), (1024,))
    large = file_rows(folder / "large", int(20_000 * scale), (512, 7, 7))
    ratios, notes = {}, {}
    for filed, size in ((small, "2 KB"), (large, "50 KB")):
        found = reading(filed, rounds)
        ratios[f"random batches / np.memmap, {size} rows"] = ratio(found, "random", "random memmap")
        ratios[f"sequential batches / np.memmap, {size} rows"] = ratio(found, "sequential", "sequential memmap")
        ratios[f"block shuffle / random, mapped, {size} rows"] = ratio(found, "blocks", "random, mapped")
        notes[f"random batches, {size} rows"] = f"{BATCH * max(found['random']):,.0f} rows a second at best"
        mapped = ratio(found, "random, mapped", "random memmap")
        notes[f"random batches, mapped, {size} rows"] = f"{mapped:.2f} times np.memmap"
        if filed is small:
            ratios["random batches / sorted h5py, 2 KB rows"] = ratio(found, "random", "h5py")
            ratios["16 parts / one, mapped, before compact"] = ratio(found, "16 parts, mapped", "random, mapped")
            ratios["16 parts / one, as they are read by default"] = ratio(found, "16 parts", "random")
            loaders = [name for name in found if name.startswith("DataLoader")]
            best = max(loaders, key=lambda name: sum(found[name]))
            ratios["shuffled epoch / DataLoader of rows"] = ratio(found, "random", best)
            notes["best DataLoader"] = best
    FeatureStore(small.many).compact(small.key)
    compacted, single = small.features(small.many, access="map"), small.features(small.one, access="map")
    found = speeds(
        {"compacted": lambda: rate(shuffled(compacted)), "one": lambda: rate(shuffled(single))}, rounds=rounds
    )
    ratios["16 parts / one, mapped, after compact"] = ratio(found, "compacted", "one")
    ratios["write with commits of 64 MB / raw write and fsync"] = writing(folder / "written", large.rows, rounds)
    ratios["verify / zlib.crc32 in memory"] = verifying(large, rounds)
    stream = [sys.executable, __file__, "--stream", str(large.one), large.key]
    taken = int(subprocess.run(stream, capture_output=True, text=True, check=True).stdout)
    ratios["size of a set / memory taken by its stream"] = large.rows.nbytes / taken
    sizes = [f"{num_bytes / 1e6:.0f} MB" for num_bytes in (taken, large.rows.nbytes, STREAM_BYTES)]
    notes["memory taken by a stream"] = f"{sizes[0]} for a set of {sizes[1]}, with a limit of {sizes[2]}"
    report("store", {name: ratios[name] for name in TARGETS}, TARGETS, notes)


def file_rows(folder: Path, num_rows: int, shape: tuple[int, ...]) -> Filed:
    """Makes random rows, and stores of them."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    rows = np.lib.format.open_memmap(folder / "rows.npy", mode="w+", dtype=np.float16, shape=(num_rows, *shape))
    for start in range(0, num_rows, 1000):
        rows[start : start + 1000] = rng.standard_normal((min(1000, num_rows - start), *shape), dtype=np.float32)
    rows.flush()
    images = images_of(num_rows)
    spec = FeatureSpec(
        trunk="0" * 64, pool={"reduction": "none"}, view=View().facts(), precision="fp32", dtype="float16"
    )
    digests = images.digests().values
    for name, num_parts in (("one", 1), ("many", 16)):
        for part in np.array_split(rng.permutation(num_rows) if num_parts > 1 else np.arange(num_rows), num_parts):
            write(FeatureStore(folder / name), spec, torch.from_numpy(rows[part]), digests[part])
    mapped = np.load(folder / "rows.npy", mmap_mode="r")
    return Filed(rows=mapped, images=images, one=folder / "one", many=folder / "many", key=spec.key)


def images_of(num_rows: int) -> ImageSet:
    """Images that are all different, and the same each time."""
    return ImageSet.from_arrays(np.random.default_rng(1).integers(0, 256, (num_rows, 4, 4, 3), dtype=np.uint8))


def write(store: FeatureStore, spec: FeatureSpec, rows: torch.Tensor, digests: NDArray[np.uint8]) -> None:
    """Writes one part, as an extraction does."""
    stage = {"name": "rows", "layout": "NC", "shape": list(rows.shape[1:]), "digest": spec.trunk}
    store.write(
        spec,
        features=[rows],
        digests=digests,
        decoders=np.zeros(len(rows), np.uint8),
        facts={
            "backbone": "none",
            "cut": "rows",
            "stages": [stage],
            "class_tokens": 0,
            "profile": {"device": "cpu", "batch_size": 1},
            "probe": {"values": [], "largest": 0.0},
            "failed": {},
        },
    )


# ---- reading


def reading(filed: Filed, rounds: int) -> dict[str, list[float]]:
    """Batches a second of all ways to read one epoch."""
    usual, mapped = filed.features(filed.one), filed.features(filed.one, access="map")
    many, many_mapped = filed.features(filed.many), filed.features(filed.many, access="map")
    stream = filed.features(filed.one, access="stream")
    dataset, contenders = RowDataset(filed.rows), {}
    part = next(filed.one.glob("*/*/part-*.h5"))
    with h5py.File(part, "r") as file:
        contenders = {
            "random": lambda: rate(shuffled(usual)),
            "random memmap": lambda: rate(memmap_random(filed.rows)),
            "random, mapped": lambda: rate(shuffled(mapped)),
            "blocks": lambda: rate(shuffled(stream)),
            "sequential": lambda: rate(usual.batches(BATCH)),
            "sequential memmap": lambda: rate(memmap_sequential(filed.rows)),
        }
        if filed.rows.ndim == 2:
            contenders |= {
                "16 parts": lambda: rate(shuffled(many)),
                "16 parts, mapped": lambda: rate(shuffled(many_mapped)),
                "h5py": lambda: rate(h5py_random(file["features"]), seconds=1),
            }
            for workers in (0, 1, 2, 4, 8):
                if workers <= len(os.sched_getaffinity(0)):
                    loader = DataLoader(dataset, BATCH, shuffle=True, num_workers=workers)
                    contenders[f"DataLoader of {workers} workers"] = partial(rate, loader, seconds=2)
        return speeds(contenders, rounds=rounds)


def shuffled(features: Features) -> Iterator[Any]:
    return features.batches(BATCH, shuffle=True)


def memmap_random(rows: NDArray[np.float16]) -> Iterator[torch.Tensor]:
    order = np.random.default_rng(0).permutation(len(rows))
    for start in range(0, len(rows), BATCH):
        yield torch.from_numpy(rows[order[start : start + BATCH]])


def memmap_sequential(rows: NDArray[np.float16]) -> Iterator[torch.Tensor]:
    for start in range(0, len(rows), BATCH):
        yield torch.from_numpy(np.array(rows[start : start + BATCH]))


def h5py_random(rows: Any) -> Iterator[torch.Tensor]:
    order = np.random.default_rng(0).permutation(len(rows))
    for start in range(0, len(rows), BATCH):
        wanted, back = np.unique(order[start : start + BATCH], return_inverse=True)
        yield torch.from_numpy(rows[wanted][back])


class RowDataset(Dataset[torch.Tensor]):
    """What people write who keep features in a `.npy` file."""

    def __init__(self, rows: NDArray[np.float16]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> torch.Tensor:
        return torch.from_numpy(np.array(self.rows[row]))


# ---- writing, verifying, memory


def writing(folder: Path, rows: NDArray[np.float16], rounds: int) -> float:
    """Parts of 64 MB against files of 64 MB that are written and synced."""
    folder.mkdir()
    a_commit = COMMIT_BYTES // rows[0].nbytes
    values = torch.from_numpy(np.array(rows[: 4 * a_commit]))
    commits = torch.split(values, a_commit)
    digests = np.random.default_rng(0).integers(0, 256, (len(values), 32), dtype=np.uint8)
    spec = FeatureSpec(
        trunk="1" * 64, pool={"reduction": "none"}, view=View().facts(), precision="fp32", dtype="float16"
    )

    def ours() -> float:
        store, started = FeatureStore(folder / "store"), time.perf_counter()
        for place, commit in enumerate(commits):
            write(store, spec, commit, digests[place * a_commit :][: len(commit)])
        seconds = time.perf_counter() - started
        for path in folder.rglob("part-*.h5"):
            path.unlink()
        return len(commits) / seconds

    def raw() -> float:
        started = time.perf_counter()
        for place, commit in enumerate(commits):
            with (folder / f"raw-{place}").open("wb", buffering=0) as file:
                left = commit.reshape(-1).view(torch.uint8).numpy().data
                while left:
                    left = left[file.write(left) :]
                os.fsync(file.fileno())
        seconds = time.perf_counter() - started
        for path in folder.glob("raw-*"):
            path.unlink()
        return len(commits) / seconds

    return ratio(speeds({"ours": ours, "raw": raw}, rounds=rounds), "ours", "raw")


def verifying(filed: Filed, rounds: int) -> float:
    """All checksums of a store against that of as many bytes in memory."""
    content = np.array(filed.rows).reshape(-1).view(np.uint8).data

    def ours() -> float:
        started = time.perf_counter()
        assert not FeatureStore(filed.one).verify().damaged
        return 1 / (time.perf_counter() - started)

    def in_memory() -> float:
        started = time.perf_counter()
        zlib.crc32(content)
        return 1 / (time.perf_counter() - started)

    return ratio(speeds({"ours": ours, "in memory": in_memory}, rounds=rounds), "ours", "in memory")


def memory_of_stream(store: Path, key: str) -> int:
    """Bytes that this process takes more while it streams through a set, pages of mapped files included."""
    images = images_of(FeatureStore(store).set(key).index.num_images)
    size = FeatureStore(store).features(images, key).num_bytes
    features = FeatureStore(store, memory_bytes=min(STREAM_BYTES, size // 8)).features(images, key)
    assert features.access.startswith("stream")
    before = resident()
    return max(1, max(resident() for _ in features.batches(BATCH, shuffle=True)) - before)


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    main()
