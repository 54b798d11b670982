"""The benchmarks run, at a size at which their numbers mean nothing, and end in the line that is recorded."""

import json
import math
from pathlib import Path

import pytest
from support.processes import AS_A_SCRIPT, Processes

FOLDER = Path(__file__).parents[2] / "scripts" / "benchmarks"


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("store", ["--scale", "0.001", "--rounds", "1"]),
        ("scale", ["--rows", "200"]),
        ("start", ["--sets", "3", "--rounds", "1"]),
        ("heads", ["--seeds", "2", "--scale", "0.01", "--problems", "4"]),
    ],
)
def test_a_benchmark_ends_in_its_ratios_and_targets(
    processes: Processes, tmp_path: Path, name: str, flags: list[str]
) -> None:
    printed = processes.answer(AS_A_SCRIPT, str(FOLDER / f"{name}.py"), *flags, "--folder", str(tmp_path))
    *_, last = printed.splitlines()
    found = json.loads(last)
    assert found.keys() == {"benchmark", "ratios", "targets"}
    assert found["benchmark"] == name
    assert found["targets"].keys() <= found["ratios"].keys()
    assert all(math.isfinite(value) for value in found["ratios"].values())
    assert all(value > 0 for name, value in found["ratios"].items() if "difference" not in name)
    assert list(tmp_path.iterdir()) == []
