"""The guides that are read from top to bottom: their code runs so, on photographs, with random weights for the real."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.pages import code_of, go_there, reader_folder

GUIDES = Path(__file__).parents[2] / "docs" / "guides"


@pytest.mark.parametrize(
    ("page", "networks"),
    [
        ("questions", ["resnet34"]),
        ("transfer_learning", ["resnet34", "resnet50"]),
        ("scikit_learn", ["resnet18"]),
    ],
)
def test_the_code_of_a_guide_runs(
    page: str, networks: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_there(reader_folder(tmp_path, *networks), monkeypatch, *networks)
    file = GUIDES / f"{page}.md"
    names: dict[str, Any] = {"__name__": page}
    for block in code_of(file):
        exec(compile(block, str(file), "exec"), names)
