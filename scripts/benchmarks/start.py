"""How many processor seconds the programs take before they answer, against those of importing torch.

    .venv/bin/python scripts/benchmarks/start.py [--rounds 5] [--sets 100] [--folder DIR]

Each command is a process of its own, all of them in turns. Processor time, not the clock's: what waits for a busy
machine counts for nothing, though a processor that is shared does less in a second.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from measuring import ratio, report, speeds
from PIL import Image
from store import write

from featstore import FeatureStore, View
from featstore.store.spec import FeatureSpec

TORCH = "python -c 'import torch'"

TARGETS = {
    "featstore --help": 5,
    "featstore extract --help": 5,
    "featstore-train --help": 5,
    "featstore-train head --help": 5,
    "usage error": 5,
    "completion of a command": 5,
    "completion of a flag": 5,
    "completion of a policy": 5,
    "ls": 1.5,
}
"""How often each fits into the seconds of importing torch, which takes 1.5 on a quiet machine: 0.3, and 1 for `ls`."""

MODEL = """
from torch import nn

def make():
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
"""


@dataclass(frozen=True, kw_only=True)
class Command:
    """A Python process: its arguments, and what its environment has besides ours."""

    arguments: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    expected: tuple[int, ...] = (0,)

    def speed(self) -> float:
        """Of one run: how many there would be in a processor second."""
        environment = {**os.environ, **self.environment}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)  # an installation has its modules compiled
        before = os.times()
        ran = subprocess.run([sys.executable, *self.arguments], env=environment, capture_output=True, check=False)
        after = os.times()
        assert ran.returncode in self.expected, ran.stderr.decode()
        seconds = after.children_user + after.children_system - before.children_user - before.children_system
        return 1 / max(seconds, 0.01)  # the system counts in such steps


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="of which medians are taken; default: 5")
    parser.add_argument("--sets", type=int, default=100, help="in the store that is listed; default: 100")
    parser.add_argument("--folder", type=Path, help="where files are made; default: the system's temporary folder")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        measure(Path(folder), rounds=options.rounds, num_sets=options.sets)


def measure(folder: Path, *, rounds: int, num_sets: int) -> None:
    contenders = {TORCH: Command(arguments=["-c", "import torch"]), **commands(folder, num_sets)}
    measured = speeds({name: each.speed for name, each in contenders.items()}, rounds=rounds)
    report(
        "start",
        {name: ratio(measured, name, TORCH) for name in contenders if name != TORCH},
        TARGETS,
        {name: f"{1 / statistics.median(found):.2f} processor seconds" for name, found in measured.items()},
    )


def commands(folder: Path, num_sets: int) -> dict[str, Command]:
    """What is measured. Nothing is left to do for the extraction, as `speeds` runs each once before it measures."""
    file_sets(folder / "many", num_sets)
    extract = extraction(folder)
    featstore, train = ["-m", "featstore"], ["-m", "training"]
    return {
        "python -c pass": Command(arguments=["-c", "pass"]),
        "python -c 'import typer'": Command(arguments=["-c", "import typer"]),
        "python -c 'import numpy'": Command(arguments=["-c", "import numpy"]),
        "featstore --help": Command(arguments=[*featstore, "--help"]),
        "featstore extract --help": Command(arguments=[*featstore, "extract", "--help"]),
        "featstore-train --help": Command(arguments=[*train, "--help"]),
        "featstore-train head --help": Command(arguments=[*train, "head", "--help"]),
        "usage error": Command(arguments=[*featstore, "extract", "--no-such-flag"], expected=(2,)),
        "completion of a command": completion("featstore ex"),
        "completion of a flag": completion("featstore extract --ba"),
        "completion of a policy": completion("featstore extract --augment fli"),
        "ls": Command(arguments=[*featstore, "ls", "--store", str(folder / "many")]),
        "extract with nothing to do": Command(arguments=[*featstore, "extract", *extract]),
    }


def completion(words: str) -> Command:
    """What bash asks when a person types `words` and a tab."""
    asked = {
        "_FEATSTORE_COMPLETE": "complete_bash",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split()) - 1),
    }
    return Command(arguments=["-m", "featstore"], environment=asked)


def file_sets(folder: Path, count: int) -> None:
    """A store of so many sets of 50 rows."""
    store = FeatureStore(folder)
    for number in range(count):
        spec = FeatureSpec(
            trunk=hashlib.sha256(str(number).encode()).hexdigest(),
            pool={"reduction": "none"},
            view=View().facts(),
            precision="fp32",
            dtype="float16",
        )
        digests = np.random.default_rng(number).integers(0, 256, (50, 32), dtype=np.uint8)
        write(store, spec, torch.zeros(50, 16, dtype=torch.float16), digests)


def extraction(folder: Path) -> list[str]:
    """The flags of an extraction of 20 images with a small model."""
    (folder / "model.py").write_text(MODEL, encoding="utf-8")
    for number in range(20):
        path = folder / "images" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 64), (10 * number, 100, 100)).save(path)
    return [
        *("--images", str(folder / "images"), "--store", str(folder / "store")),
        *("--backbone", f"{folder / 'model.py'}:make", "--cut", "0", "--size", "32"),
    ]


if __name__ == "__main__":
    main()
