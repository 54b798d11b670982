"""The benchmarks run, at a size at which their numbers mean nothing, and end in the line that is recorded."""

import json
import math
from pathlib import Path
from textwrap import dedent

import pytest
from support.processes import AS_A_MODULE, AS_A_SCRIPT, Processes

SCRIPTS = Path(__file__).parents[2] / "scripts"
FOLDER = SCRIPTS / "benchmarks"
OF_DIGITS = ["--backbone", f"{SCRIPTS / 'digits_backbone.py'}:make_model"]

IN_FORKS = {"jobs", "peers"}
"""Of these each job would wait for torch; how `measuring.run` starts one is seen of ranks."""

AS_A_SCRIPT_OF_FORKS = f"""
import os, sys, time, traceback
from textwrap import dedent

sys.path[0] = os.path.dirname(sys.argv[1])
import measuring


def run(command, **environment):
    started, pid = time.perf_counter(), os.fork()
    if pid == 0:
        try:
            os.environ.update(environment)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            sys.argv = [*command[1:]] if command[1] == "-m" else ["-c", *command[1:]]
            exec({AS_A_MODULE!r} if command[1] == "-m" else dedent({AS_A_SCRIPT!r}), {{}})
        except SystemExit as ended:
            os._exit(ended.code or 0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    _, status, usage = os.wait4(pid, 0)
    if status:
        raise RuntimeError(f"{{command}} ended with {{os.waitstatus_to_exitcode(status)}}")
    return measuring.Ran(time.perf_counter() - started, usage.ru_maxrss << 10)


measuring.run = run
{dedent(AS_A_SCRIPT)}
"""


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("store", ["--scale", "0.001", "--rounds", "1", "--folder"]),
        ("scale", ["--rows", "200", "--folder"]),
        ("start", ["--sets", "3", "--rounds", "1", "--folder"]),
        ("heads", ["--seeds", "2", "--scale", "0.01", "--problems", "4", "--folder"]),
        ("models", ["squeezenet1_1", "--rounds", "1", "--batch", "1"]),
        ("extract", ["--backbone", "tiny", "--images", "4", "--sizes", "64x48", "--rounds", "1", "--pixels"]),
        ("sharing", ["--backbone", "squeezenet1_1", "--images", "2", "--sizes", "64x48", "80x60", "--rounds", "1"]),
        ("jobs", ["--backbone", "resnet18", "--images", "2", "--many", "4", "--rounds", "1"]),
        ("ranks", ["--measure=ranks", "--backbone=tiny", "--ranks=1", "--images=4", "--few=0", "--rounds=1"]),
        ("train", ["--rows=600", "--images=2", "--size=64", "--rounds=1"]),
        ("experiments", ["--scale=0.01", "--rounds=1", "--every=16"]),
        ("peers", ["--networks=tiny", "--peers=nowhere", "--of=thingsvision", "--images=4", "--few=2", "--rounds=1"]),
        ("reduced", ["--backbone", "tiny", "--images", "2", "--sizes", "64x48", "--rounds", "1"]),
        ("rounding", [*OF_DIGITS, "--images", "2", "--cuts", "layer1:none", "layer3:concat", "--rounds", "1"]),
    ],
)
def test_a_benchmark_ends_in_its_ratios_and_targets(
    processes: Processes, tmp_path: Path, name: str, flags: list[str]
) -> None:
    folder = [str(tmp_path)] if flags[-1] == "--folder" else []
    program = AS_A_SCRIPT_OF_FORKS if name in IN_FORKS else AS_A_SCRIPT
    printed = processes.answer(program, str(FOLDER / f"{name}.py"), *flags, *folder)
    *_, last = printed.splitlines()
    found = json.loads(last)
    assert found.keys() == {"benchmark", "ratios", "targets"}
    assert found["benchmark"] == name
    assert found["targets"].keys() <= found["ratios"].keys()
    assert all(math.isfinite(value) for value in found["ratios"].values())
    assert all(value > 0 for name, value in found["ratios"].items() if "difference" not in name)
    assert list(tmp_path.iterdir()) == []
