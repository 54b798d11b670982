"""The guide to choosing a backbone: its code runs as it stands, on crops of real photographs, with real weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.pages import code_of, go_there, photograph_crops, small_efficientnet_lite0

PAGE = Path(__file__).parents[2] / "docs" / "guides" / "which_backbone.md"


def test_the_code_of_the_guide_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photograph_crops(tmp_path / "photos", 8)
    small_efficientnet_lite0(tmp_path)
    go_there(tmp_path, monkeypatch, "resnet18")
    names: dict[str, Any] = {"__name__": "which_backbone"}
    for block in code_of(PAGE):
        exec(compile(block, str(PAGE), "exec"), names)
    found = names["found"]
    assert found.best.probes["linear"].value > 0.7  # by chance a quarter
    assert {each.computed for each in found.entries} == {32}
    assert {each.computed for each in names["by_folds"].entries} == {0}
