"""The machine: free memory and how a process keeps it, its processors, and whether a file lies on a local disk."""

from __future__ import annotations

import ctypes
import os
import re
import sys
from contextlib import suppress
from pathlib import Path

_LOCAL = frozenset({"apfs", "bcachefs", "btrfs", "exfat", "ext2", "ext3", "ext4", "f2fs", "hfs", "jfs", "ntfs3"}) | {
    *("overlay", "ramfs", "reiserfs", "squashfs", "erofs", "tmpfs", "udf", "vfat", "xfs", "zfs")
}
"""File systems that no other machine writes to. What isn't listed counts as shared, which is only slower."""

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
"""Of glibc's malloc.h: free memory at the end of the heap that stays, and how many pieces may lie outside the heap."""


def num_processors() -> int:
    """Processors that this process may use, at least 1."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1  # macOS


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


def _left_in_control_groups() -> list[int]:
    """What the memory limits of this process's control groups leave, version 2 and 1; nothing without limits."""
    left = []
    with suppress(OSError, ValueError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, name = line.split(":", 2)
            if controllers == "":
                root, limit, used = Path("/sys/fs/cgroup"), "memory.max", "memory.current"
            elif "memory" in controllers.split(","):
                root, limit, used = Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.usage_in_bytes"
            else:
                continue
            folder = root / name.lstrip("/")
            for group in (folder, *folder.parents):
                if group.is_relative_to(root):
                    left += _left(group, limit, used)
    return left


def _left(group: Path, limit: str, used: str) -> list[int]:
    with suppress(OSError, ValueError):  # no limit in this group, which then says "max", or no such group in sight
        allowed, taken = int((group / limit).read_text()), int((group / used).read_text())
        cached = 0
        with suppress(OSError, KeyError, ValueError):  # pages of files count as used and can be dropped
            facts = dict(line.split(" ") for line in (group / "memory.stat").read_text().splitlines())
            cached = int(facts["inactive_file"]) + int(facts["active_file"])
        return [max(0, allowed - taken + min(cached, taken))]
    return []
