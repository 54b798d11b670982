"""Which images there are, and how they are to be rendered, is known without torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

PROGRAM = """
import importlib, sys, types
package = types.ModuleType("featstore")  # without what its own page imports
package.__path__ = [sys.argv[1]]
sys.modules["featstore"] = package
for name in sys.argv[2:]:
    importlib.import_module(f"featstore.{name}")

import numpy as np
images = importlib.import_module("featstore.images.image_set").ImageSet.from_arrays(np.zeros((9, 4, 4), np.uint8))
assert len(images.split(0.2).valid.digests()) == 2
views = importlib.import_module("featstore.images.views")
facts = views.View().with_seed("flip", 3).facts()
assert views.View.from_facts(facts).label() == "flip, seed 3"
print(*sorted(name for name in ("torch", "torchvision", "PIL") if name in sys.modules))
"""

GROUND = ("errors", "words", "digest", "machine", "source_code", "surroundings")
IMAGES = (
    "digests", "sources", "labels", "folders", "csv_tables", "splitting", "image_set", "contents", "origins",
    "decoders", "geometry", "draws", "parameters", "warps", "levels", "filters", "canvas", "policies", "spelling",
    "augmentation", "views",
)  # fmt: skip
WITHOUT_TORCH = [*GROUND, *(f"images.{name}" for name in IMAGES)]


def test_image_sets_and_the_facts_of_views_need_no_torch() -> None:
    command = [sys.executable, "-c", PROGRAM, str(ROOT / "featstore"), *WITHOUT_TORCH]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
