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
    are_whole = page == "questions"  # it counts layers and weights
    go_there(reader_folder(tmp_path, *networks, are_whole=are_whole), monkeypatch, *networks, are_whole=are_whole)
    file = GUIDES / f"{page}.md"
    names: dict[str, Any] = {"__name__": page}
    for block in code_of(file):
        exec(compile(block, str(file), "exec"), names)


def test_tuners_drive_one_head_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("optuna", reason="Optuna isn't installed")
    ray = pytest.importorskip("ray", reason="Ray isn't installed")
    pytest.importorskip("ray.tune", reason="ray[tune] isn't installed")
    # Ray would upload what is used, and ask for the addresses of its servers.
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    go_there(reader_folder(tmp_path, "resnet34"), monkeypatch, "resnet34")
    file = GUIDES / "tuners.md"
    names: dict[str, Any] = {"__name__": "__main__"}  # what Ray pickles by value
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
    try:
        for block in code_of(file):
            exec(compile(block, str(file), "exec"), names)
    finally:
        ray.shutdown()
    assert len(names["study"].trials) == 4
    assert set(names["learn"].history.last) >= {"accuracy"}
    assert 1e-4 <= names["best"]["lr"] <= 1e-1
