"""The guide to choosing a backbone: its code runs as it stands, on crops of real photographs, with real weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import skimage.data
from PIL import Image
from support.pages import code_of, go_there

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "guides" / "which_backbone.md"
PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket")


def crops(folder: Path, count: int = 8, size: int = 96) -> None:
    """Crops of a photograph in a folder of its name, from anywhere in it."""
    rng = np.random.default_rng(0)
    for name in PHOTOGRAPHS:
        photo = getattr(skimage.data, name)()
        (folder / name).mkdir(parents=True)
        for number in range(count):
            top, left = rng.integers(0, photo.shape[0] - size), rng.integers(0, photo.shape[1] - size)
            Image.fromarray(photo[top : top + size, left : left + size]).save(folder / name / f"{number:03}.png")


def test_the_code_of_the_guide_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    crops(tmp_path / "photos")
    source = (ROOT / "scripts" / "efficientnet_lite0.py").read_text(encoding="utf-8")
    assert "size=224, resize=256" in source
    source = source.replace(
        "size=224, resize=256", "size=64, resize=72"
    )  # a tenth of the time, as other pages' presets
    (tmp_path / "efficientnet_lite0.py").write_text(source, encoding="utf-8")
    go_there(tmp_path, monkeypatch, "resnet18")
    names: dict[str, Any] = {"__name__": "which_backbone"}
    for block in code_of(PAGE):
        exec(compile(block, str(PAGE), "exec"), names)
    found = names["found"]
    assert found.best.probes["linear"].value > 0.7  # by chance a quarter
    assert {each.computed for each in found.entries} == {32}
    assert {each.computed for each in names["by_folds"].entries} == {0}
