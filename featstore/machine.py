"""The machine: free memory and how a process keeps it, its processors, and whether a file lies on a local disk."""

from __future__ import annotations

import ctypes
import math
import os
import re
import sys
from collections.abc import Iterator, MutableMapping
from contextlib import suppress
from pathlib import Path

_LOCAL = frozenset({"apfs", "bcachefs", "btrfs", "exfat", "ext2", "ext3", "ext4", "f2fs", "hfs", "jfs", "ntfs3"}) | {
    *("overlay", "ramfs", "reiserfs", "squashfs", "erofs", "tmpfs", "udf", "vfat", "xfs", "zfs")
}
"""File systems that no other machine writes to. What isn't listed counts as shared, which is only slower."""

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
"""Of glibc's malloc.h: free memory at the end of the heap that stays, and how many pieces may lie outside the heap."""


_MEMBERSHIP, _CONTROL_GROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
"""Where Linux says which control groups a process is in, and where it shows them."""


def num_processors() -> int:
    """Processors that this process may use, at least 1.

    Those that it may run on, but no more than its control groups give it time for: a container of two processors on a
    machine of 64 runs on any of them, and is stopped in turn where it uses more than two. A part of one counts as one.
    """
    if hasattr(os, "sched_getaffinity"):
        usable = len(os.sched_getaffinity(0))
    else:
        usable = os.cpu_count() or 1  # macOS
    return max(1, min([usable, *map(math.ceil, _times_of_control_groups())]))


def limit_threads(environment: MutableMapping[str, str]) -> None:
    """Has libraries that are loaded later compute with no more threads than `num_processors`, where that is less.

    By itself OpenMP, and so torch, starts one for each processor that a process may run on. Whoever has said how many
    there are, or how many processes share the machine, is heeded.
    """
    has_said = any(environment.get(each) for each in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"))
    is_alone = environment.get("LOCAL_WORLD_SIZE", "1") == "1"
    if is_alone and not has_said and _times_of_control_groups():
        environment["OMP_NUM_THREADS"] = str(num_processors())


def available_bytes() -> int:
    """Memory that this process can take without anything being swapped out, as far as the system tells.

    The least of what the machine has and what each control group allows: a job of a scheduler or a container gets no
    more than that. Elsewhere than on Linux: half of all memory.
    """
    try:
        facts = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        available = int(facts["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    return min([available, *_left_in_control_groups()])


def keep_freed_memory() -> bool:
    """Has this process keep the memory that it frees for what it allocates next; returns whether it will.

    The maps of one pass take hundreds of megabytes, which glibc's malloc returns to the system and fetches again, page
    by page, for the next pass: on two processors of a virtual machine that was a quarter to a third of resnet50's time.
    The process then stays as large as it once was. Programs of featstore do this when they start; a process of your own
    is left as it is until you call this. Nothing happens where the C library isn't glibc, or its malloc was set by
    ``MALLOC_...`` or ``GLIBC_TUNABLES`` in the environment; a malloc that was loaded before it doesn't mind. See
    ``mallopt(3)``.
    """
    if any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ):
        return False
    try:
        is_glibc = (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc")
    except (AttributeError, ValueError, OSError):  # another system, or another library
        is_glibc = False
    if not is_glibc:
        return False
    library = ctypes.CDLL(None)
    return bool(library.mallopt(_M_MMAP_MAX, 0)) and bool(library.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))


def file_system(path: Path) -> str | None:
    """The type of the file system that holds `path`, such as ext4 or nfs4; None where the system doesn't tell."""
    try:
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return None
    real, found, longest = os.path.realpath(path), None, -1
    for line in lines:  # a later mount hides an earlier one at the same place
        before, _, behind = line.partition(" - ")
        place = re.sub(r"\\(\d{3})", lambda octal: chr(int(octal[1], 8)), before.split()[4])  # a space is \040
        if len(place) >= longest and (real == place or real.startswith(place.rstrip("/") + "/")):
            found, longest = behind.split()[0], len(place)
    return found


def is_local(path: Path) -> bool:
    """Whether the file at `path`, links followed, lies where no other machine can shorten it while it is mapped.

    A process that touches a mapped page behind the end of its file is killed. What Linux doesn't name isn't local;
    other systems name no file systems, and there all count as local.
    """
    kind = file_system(path)
    return kind in _LOCAL if kind else not sys.platform.startswith("linux")


def _control_groups(controller: str) -> Iterator[tuple[Path, bool]]:
    """The folders of all groups of this process that have a say over `controller`, and whether they are of version 2.

    In a container the names are often those that the machine knows, and only the topmost folder is in sight.
    """
    for line in _MEMBERSHIP.read_text().splitlines():
        _, controllers, name = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        root = _CONTROL_GROUPS / controller if controllers else _CONTROL_GROUPS
        folder = root / name.lstrip("/")
        yield from ((group, not controllers) for group in (folder, *folder.parents) if group.is_relative_to(root))


def _times_of_control_groups() -> list[float]:
    """How many processors' time each limit of this process's control groups allows; nothing without limits."""
    found = []
    with suppress(OSError, ValueError):
        for group, is_second in _control_groups("cpu"):
            with suppress(OSError, ValueError, ZeroDivisionError):  # no limit in this group, or no such group in sight
                if is_second:
                    quota, period = (group / "cpu.max").read_text().split()  # "max" is no number
                else:
                    quota, period = ((group / f"cpu.cfs_{each}_us").read_text() for each in ("quota", "period"))
                if int(quota) > 0:  # -1 of version 1: none
                    found.append(int(quota) / int(period))
    return found


def _left_in_control_groups() -> list[int]:
    """What the memory limits of this process's control groups leave, version 2 and 1; nothing without limits."""
    left = []
    with suppress(OSError, ValueError):
        for group, is_second in _control_groups("memory"):
            names = ("memory.max", "memory.current") if is_second else _MEMORY_OF_FIRST
            left += _left(group, *names)
    return left


_MEMORY_OF_FIRST = ("memory.limit_in_bytes", "memory.usage_in_bytes")


def _left(group: Path, limit: str, used: str) -> list[int]:
    with suppress(OSError, ValueError):  # no limit in this group, which then says "max", or no such group in sight
        allowed, taken = int((group / limit).read_text()), int((group / used).read_text())
        cached = 0
        with suppress(OSError, KeyError, ValueError):  # pages of files count as used and can be dropped
            facts = dict(line.split(" ") for line in (group / "memory.stat").read_text().splitlines())
            cached = int(facts["inactive_file"]) + int(facts["active_file"])
        return [max(0, allowed - taken + min(cached, taken))]
    return []
