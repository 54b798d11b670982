"""What the machine says of itself."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from support.processes import Processes

from featstore import machine
from featstore.machine import _left, available_bytes, file_system, is_local, limit_threads, num_processors


def test_processors_are_those_that_this_process_may_use(processes: Processes) -> None:
    assert num_processors() >= 1
    if not hasattr(os, "sched_setaffinity"):
        pytest.skip("the system pins no process to a processor")
    program = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); " + (
        "from featstore.machine import num_processors; print(num_processors())"
    )
    assert processes.answer(program) == "1"


@pytest.mark.parametrize(
    ("membership", "files", "expected"),
    [
        ("0::/a/b\n", {"a/b/cpu.max": "150000 100000\n", "a/cpu.max": "max 100000\n"}, 2),
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "300000 100000\n"}, 3),  # of the group above
        ("0::/\n", {"cpu.max": "50000 100000\n"}, 1),  # half a processor is one that is stopped now and then
        ("0::/\n", {"cpu.max": "6400000 100000\n"}, 8),  # more than it may run on
        ("0::/\n", {"cpu.max": "max 100000\n"}, 8),
        # Of a container in version 1 the folder of its name is out of sight, and the topmost one is its own.
        ("4:cpuacct,cpu:/docker/1f\n", {"cpu/cpu.cfs_quota_us": "250000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 3),
        ("4:cpu:/\n0::/\n", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 8),
        ("5:cpuset:/\n", {"cpuset/cpu.cfs_quota_us": "100000\n", "cpuset/cpu.cfs_period_us": "100000\n"}, 8),
        ("0::/\n", {"cpu.max": "100000 0\n"}, 8),
        ("no group\n", {}, 8),
        (None, {}, 8),
    ],
)
def test_processors_are_no_more_than_a_container_has_time_for(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    membership: str | None,
    files: dict[str, str],
    expected: int,
) -> None:
    for name, content in files.items():
        (tmp_path / "groups" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "groups" / name).write_text(content)
    if membership is not None:
        (tmp_path / "membership").write_text(membership)
    monkeypatch.setattr(machine, "_CONTROL_GROUPS", tmp_path / "groups")
    monkeypatch.setattr(machine, "_MEMBERSHIP", tmp_path / "membership")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert num_processors() == expected
    environment: dict[str, str] = {}
    limit_threads(environment)  # where there is no limit, OpenMP's own number stays
    assert environment.get("OMP_NUM_THREADS") in ((str(expected),) if expected < 8 else (None, "8"))
    for said in ({"OMP_NUM_THREADS": "5"}, {"MKL_NUM_THREADS": "5"}, {"LOCAL_WORLD_SIZE": "2"}):
        given = dict(said)
        limit_threads(given)
        assert given == said


def test_programs_compute_with_what_their_container_has_time_for(tmp_path: Path, processes: Processes) -> None:
    (tmp_path / "cpu.max").write_text("100000 100000\n")
    (tmp_path / "membership").write_text("0::/\n")
    program = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "from featstore import machine\n"
        "from featstore.cli.app import app\n"
        "from featstore.cli.program import run\n"
        "folder = Path(sys.argv[1])\n"
        "machine._CONTROL_GROUPS, machine._MEMBERSHIP = folder, folder / 'membership'\n"
        "os.environ.pop('OMP_NUM_THREADS', None)\n"
        "sys.argv[1:] = ['--help']\n"
        "code = run(app, 'featstore')\n"
        "print(code, os.environ['OMP_NUM_THREADS'])"
    )
    assert processes.answer(program, str(tmp_path)).split()[-2:] == ["0", "1"]


@pytest.mark.skipif(not hasattr(os, "confstr") or not sys.platform.startswith("linux"), reason="malloc isn't glibc's")
def test_freed_memory_is_kept_where_that_was_asked_for(processes: Processes) -> None:
    program = (
        "import numpy\n"
        "from featstore.machine import keep_freed_memory\n"
        "def held(): return int(open('/proc/self/statm').read().split()[1]) * 4096\n"
        "before = held()\n"
        "{}\n"
        "values = numpy.ones(10_000_000)\n"
        "del values\n"
        "print(held() - before > 70_000_000)"
    )
    assert processes.answer(program.format("")) == "False"
    assert processes.answer(program.format("assert keep_freed_memory()")) == "True"
    own = "import os; os.environ['MALLOC_ARENA_MAX'] = '2'; assert not keep_freed_memory()"
    assert processes.answer(program.format(own)) == "False"


def test_available_memory_is_some_and_no_more_than_there_is() -> None:
    assert 0 < available_bytes() <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize(
    ("limit", "used", "stat", "left"),
    [
        ("1000\n", "300\n", "inactive_file 0\nactive_file 0\n", [700]),
        ("1000\n", "900\n", "anon 100\ninactive_file 500\nactive_file 100\n", [700]),  # pages of files can be dropped
        ("1000\n", "1200\n", "inactive_file 0\nactive_file 0\n", [0]),
        ("max\n", "300\n", "inactive_file 0\nactive_file 0\n", []),
        ("1000\n", "300\n", None, [700]),
        (None, None, None, []),
    ],
)
def test_a_control_group_leaves_its_limit_less_what_is_used(
    tmp_path: Path, limit: str | None, used: str | None, stat: str | None, left: list[int]
) -> None:
    for name, content in (("memory.max", limit), ("memory.current", used), ("memory.stat", stat)):
        if content is not None:
            (tmp_path / name).write_text(content)
    assert _left(tmp_path, "memory.max", "memory.current") == left


@pytest.mark.skipif(not Path("/proc/self/mountinfo").exists(), reason="the system doesn't list its mounts")
def test_a_file_system_is_that_of_the_nearest_mount(tmp_path: Path) -> None:
    assert file_system(Path("/proc/self/status")) == "proc"
    assert file_system(Path("/proc")) == "proc"
    assert file_system(Path("/processes")) == file_system(Path("/"))
    assert file_system(tmp_path / "not" / "there") == file_system(tmp_path)
    (tmp_path / "link").symlink_to("/proc/self")
    assert file_system(tmp_path / "link" / "status") == "proc"


@pytest.mark.skipif(not Path("/proc/self/mountinfo").exists(), reason="the system doesn't list its mounts")
def test_only_known_file_systems_are_mapped(tmp_path: Path) -> None:
    assert not is_local(Path("/proc/self"))
    if file_system(tmp_path) in ("ext4", "xfs", "btrfs", "tmpfs", "overlay"):
        assert is_local(tmp_path)


@pytest.mark.skipif(not Path("/proc/self/mountinfo").exists(), reason="the system doesn't list its mounts")
def test_a_link_is_where_its_file_is(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/proc/self/status")
    assert not is_local(tmp_path / "link")


@pytest.mark.parametrize(("platform", "local"), [("linux", False), ("darwin", True)])
def test_only_where_no_file_system_is_ever_named_all_count_as_local(
    tmp_path: Path, platform: str, local: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "file_system", lambda path: None)
    monkeypatch.setattr(sys, "platform", platform)
    assert is_local(tmp_path) == local
