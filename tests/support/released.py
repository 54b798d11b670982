"""One small store in each released format version: what it holds, and how its files were made.

They lie in `tests/data/version-N`, written by the featstore that wrote version N, and stay as they are. When the
version rises, ``python -m support.released`` in `tests/`` adds a folder. Of version 3 are parts with scaled rows alone.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from featstore.digest import digest_json
from featstore.files.disk import make_folder
from featstore.files.header import FORMAT_VERSION
from featstore.files.part import write_part
from featstore.files.scaled import ScaledRows
from featstore.files.table import write_table

DATA = Path(__file__).parents[1] / "data"

NUM_ROWS = 7
IDS = [f"cat/é{number}.jpg" for number in range(NUM_ROWS)]
FEATURES = ((torch.arange(NUM_ROWS * 192) % 251 - 40) / 8).view(NUM_ROWS, 3, 8, 8).bfloat16()  # exact in 8 bits
DIGESTS = np.frombuffer(b"".join(hashlib.sha256(name.encode()).digest() for name in IDS), np.uint8).reshape(-1, 32)
DECODERS = np.array([0, 1, 2, 2, 1, 1, 0], np.uint8)

VIEW: dict[str, Any] = {
    "version": 1,
    "size": 16,
    "resize": 20,
    "interpolation": "bilinear",
    "antialias": True,
    "mean": [0.485, 0.456, 0.406],
    "std": [0.229, 0.224, 0.225],
    "decode": "featstore-decode-1",
    "apply_exif": True,
}
SPEC: dict[str, Any] = {
    "version": 1,
    "trunk": digest_json("a trunk"),
    "pool": {"reduction": "none"},
    "view": VIEW,
    "precision": "fp32",
    "dtype": "bfloat16",
}
SIGNATURE = {"who": "featstore 0.1.0, zoë@host", "when": "2026-01-02T03:04:05.000006+00:00"}
PART_FACTS: dict[str, Any] = {
    "spec": SPEC,
    "key": digest_json(SPEC),
    "view": VIEW,
    "backbone": "net",
    "cut": "layer2",
    "stages": [{"name": "layer2", "layout": "NCHW", "shape": [3, 8, 8], "digest": SPEC["trunk"]}],
    "class_tokens": 0,
    "profile": {"batch_size": 32, "device": "cpu", "threads": 1, "cpu": "AVX2", "torch": "2.11.0"},
    "probe": {"values": [[0.5] * 12, [-1.25] * 12], "largest": 1.25},
    "failed": {digest_json("an image"): "it is truncated"},
    "supersedes": [],
    **SIGNATURE,
}

ENCODED_IDS = [name.encode() for name in IDS]
COLUMNS: dict[str, NDArray[Any]] = {
    "id_bytes": np.frombuffer(b"".join(ENCODED_IDS), np.uint8),
    "id_ends": np.cumsum([len(name) for name in ENCODED_IDS]).astype(np.int64),
    "digest": DIGESTS,
    "has_digest": np.ones(NUM_ROWS, np.uint8),
    "stat": np.full((NUM_ROWS, 5), -1, np.int64),
    "split": np.array([1, 1, 1, 1, 2, 2, 3], np.uint8),
    "group": np.array([0, 0, 1, 1, 1, 0, 0], np.int64),
    "target": np.array([[0, 1], [1, 1], [1, 0], [0, 0], [0, 1], [1, 0], [1, 1]], np.float32),
}
TABLE_FACTS: dict[str, Any] = {
    "name": "photos",
    "task": "multi",
    "classes": ["small", "furry"],
    "groups": ["a", "ß"],
    "parents": [],
    "content": digest_json("some content"),
    **SIGNATURE,
}


NUMBERS = ((torch.arange(NUM_ROWS * 12) * 37) % 255 - 127).view(NUM_ROWS, 3, 2, 2).to(torch.int8)
SCALES = np.array([0, 1, 0.5, 1 / 3, 1e-40, 3e30, 0.0078125], np.float32)
SCALED_SPEC: dict[str, Any] = {**SPEC, "dtype": "int8"}
SCALED_FACTS: dict[str, Any] = {
    **PART_FACTS,
    "spec": SCALED_SPEC,
    "key": digest_json(SCALED_SPEC),
    "stages": [{"name": "layer2", "layout": "NCHW", "shape": [3, 2, 2], "digest": SPEC["trunk"]}],
    "rounding": {"error": 0.004, "images": 64},
}
SCALED_PART = (
    DATA / "version-3" / f"net@layer2-{SPEC['trunk'][:12]}" / "none-evaluation-int8" / "part-0123456789abcdef.h5"
)


def store_of(version: int) -> Path:
    """The root of the store that version's files are in."""
    return DATA / f"version-{version}"


def part_of(version: int) -> Path:
    """The part with the rows above."""
    return _set_folder(version) / "part-0123456789abcdef.h5"


def empty_part_of(version: int) -> Path:
    """A part of the same set without rows."""
    return _set_folder(version) / "part-fedcba9876543210.h5"


def table_of(version: int) -> Path:
    """The image table."""
    return store_of(version) / "images" / "photos-01234567.h5"


def _set_folder(version: int) -> Path:
    trunk, key = SPEC["trunk"][:12], digest_json(SPEC)[:8]
    return store_of(version) / f"net@layer2-{trunk}" / f"none-evaluation-bfloat16-{key}"


def main() -> None:
    """Writes the files of the present version, once."""
    for path, num_rows in [(part_of(FORMAT_VERSION), NUM_ROWS), (empty_part_of(FORMAT_VERSION), 0)]:
        make_folder(path.parent, root=DATA)
        features, digests, decoders = FEATURES[:num_rows], DIGESTS[:num_rows], DECODERS[:num_rows]
        write_part(path, features=features, digests=digests, decoders=decoders, facts=PART_FACTS)
    table = table_of(FORMAT_VERSION)
    make_folder(table.parent, root=DATA)
    write_table(table, columns=COLUMNS, facts=TABLE_FACTS)


def write_scaled() -> None:
    """Writes the part with scaled rows, which alone is of its version, once."""
    make_folder(SCALED_PART.parent, root=DATA)
    rows = ScaledRows(NUMBERS, torch.from_numpy(SCALES))
    write_part(SCALED_PART, features=rows, digests=DIGESTS, decoders=DECODERS, facts=SCALED_FACTS)


if __name__ == "__main__":
    main()
