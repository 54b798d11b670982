import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.full_disk import largest_file
from support.operations import replace_operation, watch
from support.parts import bits, extent, random_bits, write

from featstore.files import disk
from featstore.files.part import Part
from featstore.files.table import write_table


@pytest.fixture
def disk_log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The operations on the disk, in order; a write with its offset and bytes."""
    log: list[str] = []

    def logged(name: str, operation: Callable[..., Any], *args: Any) -> Any:
        log.append(f"{name} {args[2]}+{len(args[1])}" if name == "write_at" else name)
        return operation(*args)

    watch(monkeypatch, logged)
    return log


def test_the_user_block_is_written_last_and_the_name_given_after_the_sync(path: Path, disk_log: list[str]) -> None:
    write(path, list(torch.split(random_bits(150, (5000,)), 104)))
    offset = extent(path, "features").start
    assert disk_log == [
        "create",
        "allocate",
        f"write_at {offset}+1040000",
        f"write_at {offset + 1_040_000}+460000",
        f"write_at 4096+{offset - 4096}",
        "write_at 0+4096",
        "sync",
        "rename",
        "sync_folder",
    ]


@pytest.mark.parametrize("has_space_reservation", [True, False])
@pytest.mark.parametrize("limit", [1, 5_000, 50_000, 2_000_000])
def test_a_full_disk_is_the_systems_error_and_leaves_nothing(
    path: Path, limit: int, has_space_reservation: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    earlier = path.with_name("earlier.h5")
    write(earlier, random_bits(10))
    if not has_space_reservation:
        replace_operation(monkeypatch, "allocate", lambda operation, fd, length: None)
    with largest_file(limit), pytest.raises(OSError, match="File too large") as error:
        write(path, random_bits(300, (5000,)))
    assert error.value.errno == errno.EFBIG
    assert os.listdir(path.parent) == ["earlier.h5"]
    assert Part.open(earlier).verify() == []


def test_space_is_found_missing_before_anything_is_written(path: Path, disk_log: list[str]) -> None:
    with largest_file(2_000_000), pytest.raises(OSError, match="File too large"):
        write(path, random_bits(300, (5000,)))
    assert disk_log == ["create", "allocate", "unlink"]


@pytest.mark.parametrize("failure", [OSError(errno.EIO, "Input/output error"), KeyboardInterrupt()])
@pytest.mark.parametrize("step", range(8))
def test_a_failure_at_any_step_before_the_rename_is_told_and_leaves_nothing(
    path: Path, step: int, failure: BaseException, disk_log: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing_at_step(name: str, operation: Callable[..., Any], *args: Any) -> Any:
        if len(disk_log) == step and name != "unlink":
            raise failure
        return operation(*args)

    watch(monkeypatch, failing_at_step)
    with pytest.raises(type(failure)) as error:
        write(path, list(torch.split(random_bits(150, (5000,)), 104)))
    assert error.value is failure
    assert os.listdir(path.parent) == []


def test_a_file_system_that_reserves_no_space_gets_the_same_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(fd: int, offset: int, length: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    for num_rows in (0, 100):
        write(path.with_name(f"with-{num_rows}.h5"), random_bits(num_rows))
    monkeypatch.setattr(os, "posix_fallocate", unsupported)
    for num_rows in (0, 100):
        without = path.with_name(f"without-{num_rows}.h5")
        write(without, random_bits(num_rows))
        assert without.read_bytes() == path.with_name(f"with-{num_rows}.h5").read_bytes()


def test_a_short_write_is_continued(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    features = random_bits(300, (5000,))
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: pwrite(fd, data[: len(data) // 2 + 1], offset))
    write(path, features)
    assert bits(Part.open(path).features) == bits(features)
    assert Part.open(path).verify() == []


def test_a_name_that_is_taken_is_refused_and_its_file_left_alone(path: Path) -> None:
    path.write_text("precious")
    with pytest.raises(FileExistsError, match="never replaced, choose another name"):
        write(path, random_bits(10))
    with pytest.raises(FileExistsError):
        write_table(path, columns={}, facts={})
    assert path.read_text() == "precious"
    assert os.listdir(path.parent) == [path.name]


def test_others_may_read_a_part_as_the_umask_says(path: Path) -> None:
    umask = os.umask(0o027)
    try:
        write(path, random_bits(10))
    finally:
        os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o640


def test_a_file_that_cannot_be_made_is_named_as_it_would_be_called(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as error, disk.whole_or_nothing(tmp_path / "gone" / "a.h5", 8):
        pass
    assert error.value.filename == str(tmp_path / "gone" / "a.h5")
