"""Crashes of an extraction: its file operations recorded, what a kill or a power loss leaves of them, and real kills.

The simulated disk is as unkind as POSIX allows. What was written to a file may be lost, in any order and torn into
sectors, until the file is synced; a name that a folder was given or lost, until the folder is synced.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Self

import pytest
import torch
from tiny import arrays, staged
from torch import Tensor

from featstore import ExtractReport, FeatureStore, extract
from featstore import part as part_module
from featstore import store as store_module
from featstore.errors import DamagedFileError
from featstore.part import Part, write_part, write_table

SECTOR_BYTES = 512
ROOT = "features"
"""Of the store, below the folder in which a crash happens."""

Rows = dict[tuple[str, bytes], Tensor]
"""(key of the set, digest of the image) -> its activations."""

# ---- the extraction that crashes


def extraction(folder: Path, num_images: int) -> ExtractReport:
    """Files `num_images` in the store below `folder`: two sets, four rows a part. A row of one is four sectors."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys.modules["featstore.extract"], "COMMIT_BYTES", 1)  # featstore.extract is its function
        patched.setattr(sys.modules["featstore.extract"], "MERGE_BYTES", 0)  # so that no file that was filed goes
        return extract(
            staged(),
            arrays(num_images),
            FeatureStore(folder / ROOT),
            cuts=["layer1:none", "layer2"],
            dtype="float32",
            device="cpu",
            batch_size=4,
            workers=0,
        )


def rows_in(folder: Path) -> Rows:
    """What the store below `folder` gives for each image of each of its sets.

    Raises:
        AssertionError: for a file under a final name that isn't whole, and a row that differs between two parts.
    """
    if not (folder / ROOT).exists():
        return {}
    store = FeatureStore(folder / ROOT)
    assert store.damaged() == []
    rows: Rows = {}
    for found in store.sets():
        for part in found.parts:
            assert part.verify() == [], part.path
            for digest, row in zip(part.digests, part.features, strict=True):
                first = rows.setdefault((found.key, bytes(digest)), row)
                assert torch.equal(row, first), part.path
    return rows


def check_recovery(folder: Path, safe: set[Path], whole: Rows, again: Callable[[], int]) -> None:
    """Checks what a crash has left below `folder`, and that a second run of the extraction completes it.

    Args:
        folder: where it happened; the second run happens there too.
        safe: final names that must be there.
        whole: the rows that an unbroken run files.
        again: the second run; the number of rows it computed.

    Raises:
        AssertionError: for a file that is lost or not whole, a wrong row, a row computed twice, a file replaced or
            deleted by the second run (what killed writers left is for `gc`), or another end than the unbroken run's.
    """
    left = check_left(folder, safe, whole)
    files = {name: (folder / name).read_bytes() for name in final_names(folder) | temporary_names(folder)}
    assert again() == len(whole) - len(left)
    assert files == {name: (folder / name).read_bytes() for name in files}
    assert check_left(folder, final_names(folder), whole).keys() == whole.keys()
    assert len(FeatureStore(folder / ROOT).images()) == len({digest for _, digest in whole})


def check_left(folder: Path, safe: set[Path], whole: Rows) -> Rows:
    """The first half of `check_recovery`: the rows that are left, once they and their files are checked."""
    assert safe <= final_names(folder), f"lost: {safe - final_names(folder)}"
    left = rows_in(folder)
    assert left.keys() <= whole.keys()
    for name, row in left.items():
        assert torch.equal(row, whole[name]), name
    return left


def accepted_rows(folder: Path) -> tuple[Rows, int, int]:
    """Rows below `folder` that no check refuses, and how many parts were refused when opened and by `verify`."""
    rows: Rows = {}
    num_unopened = num_unverified = 0
    for path in sorted((folder / ROOT).rglob("part-*.h5")):
        try:
            part = Part.open(path)
        except DamagedFileError:
            num_unopened += 1
            continue
        damaged = {row for rows_of_block in part.verify() for row in rows_of_block}
        num_unverified += bool(damaged)
        for row in set(range(part.num_rows)) - damaged:
            rows[str(part.facts["key"]), bytes(part.digests[row])] = part.features[row]
    return rows, num_unopened, num_unverified


def final_names(folder: Path) -> set[Path]:
    """Parts and image tables below `folder`, whether sound or not; relative to it."""
    return {path.relative_to(folder) for path in folder.rglob("*.h5")}


def temporary_names(folder: Path) -> set[Path]:
    """What killed writers have left below `folder`; relative to it."""
    return {path.relative_to(folder) for path in folder.rglob(".*.tmp-*")}


# ---- recording


@dataclass(frozen=True)
class MakeFolder:
    """A folder was made."""

    path: Path


@dataclass(frozen=True)
class Create:
    """An empty file was made. Its name tells it from all others, for it has something random in it."""

    path: Path


@dataclass(frozen=True)
class Allocate:
    """A file has this length at least."""

    file: Path
    length: int


@dataclass(frozen=True)
class Write:
    """Bytes were written into a file."""

    file: Path
    offset: int
    data: bytes


@dataclass(frozen=True)
class Sync:
    """All that was written to a file is on the disk."""

    file: Path


@dataclass(frozen=True)
class Rename:
    """A file was given its final name."""

    file: Path
    target: Path


@dataclass(frozen=True)
class SyncFolder:
    """The names in a folder are on the disk."""

    path: Path


@dataclass(frozen=True)
class Return:
    """The writer of a part or a table has returned: whoever called it takes the file for safe."""

    path: Path


Operation = MakeFolder | Create | Allocate | Write | Sync | Rename | SyncFolder | Return


@contextmanager
def recorded(folder: Path) -> Iterator[list[Operation]]:
    """All that the block does to the files below `folder`, in order; it is also done."""
    log: list[Operation] = []
    files: dict[int, Path] = {}  # by descriptor
    make_folder, create, allocate = os.mkdir, part_module._create, part_module._allocate
    write_at, sync, rename = part_module._write_at, part_module._sync, part_module._rename
    sync_folder = part_module._sync_folder

    def made_folder(path: Path, mode: int = 0o777) -> None:
        make_folder(path, mode)
        log.append(MakeFolder(path.relative_to(folder)))

    def created(path: Path) -> int:
        fd = create(path)
        files[fd] = path.relative_to(folder)
        log.append(Create(files[fd]))
        return fd

    def allocated(fd: int, length: int) -> None:
        allocate(fd, length)
        log.append(Allocate(files[fd], length))

    def written_at(fd: int, data: memoryview, offset: int) -> None:
        log.append(Write(files[fd], offset, bytes(data)))
        write_at(fd, data, offset)

    def synced(fd: int) -> None:
        sync(fd)
        log.append(Sync(files[fd]))

    def renamed(source: Path, target: Path) -> None:
        rename(source, target)
        log.append(Rename(source.relative_to(folder), target.relative_to(folder)))

    def synced_folder(path: Path) -> None:
        sync_folder(path)
        log.append(SyncFolder(path.relative_to(folder)))

    def returned(write: Callable[..., None]) -> Callable[..., None]:
        def written(path: Path, **content: Any) -> None:
            write(path, **content)
            log.append(Return(path.relative_to(folder)))

        return written

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(store_module, "write_part", returned(write_part))
        patched.setattr(store_module, "write_table", returned(write_table))
        patched.setattr(os, "mkdir", made_folder)
        patched.setattr(part_module, "_create", created)
        patched.setattr(part_module, "_allocate", allocated)
        patched.setattr(part_module, "_write_at", written_at)
        patched.setattr(part_module, "_sync", synced)
        patched.setattr(part_module, "_rename", renamed)
        patched.setattr(part_module, "_sync_folder", synced_folder)
        yield log


def committed(operations: Sequence[Operation]) -> set[Path]:
    """Final names of the files whose writers have returned."""
    return {operation.path for operation in operations if isinstance(operation, Return)}


# ---- what is left


@dataclass
class _Names:
    """Of one folder: what is on the disk, and the changes that may still be lost, each by itself."""

    synced: dict[str, Path | None] = field(default_factory=dict)  # name -> file; None for a folder
    pending: list[tuple[str, Path | None, str | None]] = field(default_factory=list)  # name, file, name it replaces

    def surviving(self, survives: Callable[[], bool]) -> dict[str, Path | None]:
        names = dict(self.synced)
        for added, file, removed in self.pending:
            if survives():
                names[added] = file
                if removed is not None:
                    names.pop(removed, None)
        return names


@dataclass
class _Content:
    """Of one file: what is on the disk, and what may still be lost."""

    synced: bytes = b""
    pending: list[Allocate | Write] = field(default_factory=list)

    def surviving(self, rng: random.Random | None) -> bytes:
        content = bytearray(self.synced)
        for operation in self.pending:
            if isinstance(operation, Allocate):
                if rng is None or rng.random() < 0.5:
                    content.extend(bytes(max(0, operation.length - len(content))))
                continue
            for offset, data in _surviving_pieces(operation, rng):
                content.extend(bytes(max(0, offset - len(content))))
                content[offset : offset + len(data)] = data
        return bytes(content)


def _surviving_pieces(write: Write, rng: random.Random | None) -> Iterator[tuple[int, bytes]]:
    """All of a write, nothing, or some of its sectors, with where they lie in the file."""
    fate = "whole" if rng is None else rng.choice(["whole", "lost", "torn"])
    if fate == "whole":
        yield write.offset, write.data
    elif fate == "torn" and rng is not None:
        for start in range(0, len(write.data), SECTOR_BYTES):
            if rng.random() < 0.5:
                yield write.offset + start, write.data[start : start + SECTOR_BYTES]


class Disk:
    """What is on a disk, and what is only in the memory of the machine, after some operations in an empty folder."""

    def __init__(self, operations: Sequence[Operation]) -> None:
        self.folders: dict[Path, _Names] = {Path(): _Names()}
        self.files: dict[Path, _Content] = {}
        for operation in operations:
            self._apply(operation)

    def _apply(self, operation: Operation) -> None:
        match operation:
            case MakeFolder(path):
                self.folders[path] = _Names()
                self.folders[path.parent].pending.append((path.name, None, None))
            case Create(path):
                self.files[path] = _Content()
                self.folders[path.parent].pending.append((path.name, path, None))
            case Allocate(file) | Write(file):
                self.files[file].pending.append(operation)
            case Sync(file):
                self.files[file] = _Content(synced=self.files[file].surviving(None))
            case Rename(file, target):
                self.folders[target.parent].pending.append((target.name, file, file.name))
            case SyncFolder(path):
                self.folders[path] = _Names(synced=self.folders[path].surviving(lambda: True))
            case Return():
                pass  # nothing on the disk; it tells what must be there

    def after_kill(self, folder: Path) -> Path:
        """Makes `folder` what a killed process leaves: everything it did."""
        return self._place(folder, None)

    def after_power_loss(self, folder: Path, rng: random.Random) -> Path:
        """Makes `folder` what may be left when the machine stops: what was synced, and at random parts of the rest."""
        return self._place(folder, rng)

    def _place(self, folder: Path, rng: random.Random | None, inner: Path = Path()) -> Path:
        (folder / inner).mkdir()
        for name, file in self.folders[inner].surviving(lambda: rng is None or rng.random() < 0.5).items():
            if file is None:
                self._place(folder, rng, inner / name)
            else:
                (folder / inner / name).write_bytes(self.files[file].surviving(rng))
        return folder


# ---- simulated crashes


@dataclass(frozen=True, eq=False)
class UnbrokenRun:
    """What an extraction that nothing disturbs does to the disk, and the rows it files.

    Attributes:
        num_images: of the extraction.
        operations: in their order.
        rows: what the store gives then.
    """

    num_images: int
    operations: Sequence[Operation]
    rows: Rows

    @classmethod
    def in_folder(cls, folder: Path, num_images: int = 8) -> Self:
        """Runs it in the empty `folder`."""
        with recorded(folder) as operations:
            extraction(folder, num_images)
        return cls(num_images, operations, rows_in(folder))

    def again(self, folder: Path) -> int:
        """Runs the same extraction in `folder`; the number of rows it computed."""
        return extraction(folder, self.num_images).computed


def lose_power_and_check(run: UnbrokenRun, folder: Path, rng: random.Random, known: set[frozenset[Path]]) -> None:
    """Stops the machine at a random moment of `run`; `folder` is made what is left. Errors as `check_recovery`.

    A second run, which is slow, follows where what a store reads is not among the `known`, and then is. Its files are
    then those of `run` to the last bit, so their names suffice.
    """
    operations = _until_random_moment(run.operations, rng)
    Disk(operations).after_power_loss(folder, rng)
    readable = frozenset(path.relative_to(folder) for path in folder.rglob("*") if not path.name.startswith("."))
    if readable in known:
        check_left(folder, committed(operations), run.rows)
    else:
        check_recovery(folder, committed(operations), run.rows, partial(run.again, folder))
        known.add(readable)


def lose_power_in_second_run_and_check(run: UnbrokenRun, folder: Path, rng: random.Random) -> None:
    """Kills `run` at a random moment, runs it again, and then stops the machine at a random moment of that."""
    killed = _until_random_moment(run.operations, rng)
    folder.mkdir()
    second = Disk(killed).after_kill(folder / "second")
    with recorded(second) as operations:
        run.again(second)
    operations = [*killed, *_until_random_moment(operations, rng)]
    left = Disk(operations).after_power_loss(folder / "left", rng)
    check_recovery(left, committed(operations), run.rows, partial(run.again, left))


def _until_random_moment(operations: Sequence[Operation], rng: random.Random) -> Sequence[Operation]:
    return operations[: rng.randint(0, len(operations))]


# ---- real kills


class Forker:
    """A process that has imported everything and runs each extraction in a fork of itself, on one thread.

    A new interpreter takes seconds to start, in which most kills would come before the first file.
    """

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()

    def start(self, folder: Path, num_images: int) -> int:
        """Starts `extraction(folder, num_images)`; `end` must follow. The number of its process."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{json.dumps([str(folder), num_images])}\n")
        self._process.stdin.flush()
        (pid,) = self._answer()
        return pid

    def end(self) -> int | None:
        """Waits for the process; how many rows it computed, or None if it was killed before it had finished.

        Raises:
            AssertionError: if it failed; stderr says why.
        """
        assert self._process.stdin is not None
        self._process.stdin.write("end\n")  # only now may the process be reaped, and its number be another's
        self._process.stdin.flush()
        status, *computed = self._answer()
        assert status in (0, -signal.SIGKILL), f"the extraction ended with status {status}"
        return computed[0] if status == 0 else None

    def run(self, folder: Path, num_images: int) -> int:
        """Rows that `extraction(folder, num_images)` computes, undisturbed."""
        self.start(folder, num_images)
        computed = self.end()
        assert computed is not None
        return computed

    def _answer(self) -> list[int]:
        assert self._process.stdout is not None
        answer: list[int] = json.loads(self._process.stdout.readline())
        return answer


def kill_and_check(forker: Forker, folder: Path, num_images: int, whole: Rows, rng: random.Random) -> bool:
    """Kills an extraction in the empty `folder` at a random instant, runs it again, and checks what is there each time.

    Args:
        forker: runs it.
        folder: made here.
        num_images: of the extraction.
        whole: the rows that an unbroken run files.
        rng: chooses the instant.

    Returns:
        Whether the kill came before the extraction had finished.

    Raises:
        AssertionError: for whatever a kill must not do.
    """
    folder.mkdir()
    pid = forker.start(folder, num_images)
    # The instant is counted in files, so that the speed of the machine doesn't decide how far the extraction gets.
    num_files, moment = rng.randrange(1 + len(whole) // 4), rng.random() * 0.02
    deadline = time.monotonic() + 60  # for one that fails before; `end` then says so
    while len(final_names(folder)) < num_files and time.monotonic() < deadline:
        time.sleep(0.0005)
    time.sleep(moment)
    seen = final_names(folder)
    os.kill(pid, signal.SIGKILL)  # whoever has finished is a zombie until `end`, so the number is still his
    is_killed = forker.end() is None

    check_recovery(folder, seen, whole, partial(forker.run, folder, num_images))
    return is_killed


def main() -> None:
    """Runs the extractions that a `Forker` asks for, until it closes the pipe."""
    torch.set_num_threads(1)
    for line in sys.stdin:
        folder, num_images = json.loads(line)
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                report = extraction(Path(folder), num_images)
                os.write(writing, str(report.computed).encode())
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        print([pid], flush=True)
        os.close(writing)
        with open(reading) as computed:
            answer = [int(number) for number in computed.read().split()]
        sys.stdin.readline()
        print([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), *answer], flush=True)


if __name__ == "__main__":
    main()
