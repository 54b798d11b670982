"""The benchmarks run, at a size at which their numbers mean nothing, and end in the line that is recorded."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "scripts" / "benchmarks"


@pytest.mark.parametrize(
    ("name", "flags"),
    [("store", ["--scale", "0.005", "--rounds", "1"]), ("scale", ["--rows", "200", "2000"])],
)
def test_a_benchmark_ends_in_its_ratios_and_targets(tmp_path: Path, name: str, flags: list[str]) -> None:
    command = [sys.executable, str(FOLDER / f"{name}.py"), *flags, "--folder", str(tmp_path)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    *_, last = ran.stdout.splitlines()
    found = json.loads(last)
    assert found.keys() == {"benchmark", "ratios", "targets"}
    assert found["benchmark"] == name
    assert found["targets"].keys() <= found["ratios"].keys()
    assert all(value > 0 for value in found["ratios"].values())
    assert list(tmp_path.iterdir()) == []
