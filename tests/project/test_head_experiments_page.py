"""The guide to head experiments: its code runs as it stands, on crops of real photographs, with real weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.pages import code_of, go_there, photograph_crops, small_efficientnet_lite0

PAGE = Path(__file__).parents[2] / "docs" / "guides" / "head_experiments.md"


def test_the_code_of_the_guide_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("plotly", reason="plotly, of the extra report, isn't installed")
    photograph_crops(tmp_path / "photos", 16)
    small_efficientnet_lite0(tmp_path)
    go_there(tmp_path, monkeypatch)
    names: dict[str, Any] = {"__name__": "head_experiments"}
    for block in code_of(PAGE):
        exec(compile(block, str(PAGE), "exec"), names)
    assert names["linear"].table[0]["accuracy"] > 0.7  # by chance a quarter
    assert all(each["cut"] in ("stage4", "maps") for each in names["listed"].table)
    assert "</html>" in (tmp_path / "report.html").read_text(encoding="utf-8")
