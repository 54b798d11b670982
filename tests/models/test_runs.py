from __future__ import annotations

import errno
import os
import resource
import signal
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from featstore import DamagedFileError, FeatureStoreError
from featstore.models import runs, weights
from featstore.models.runs import FACTS, TENSORS, check_free, new_run, read_file, read_run, write_run


def tensors(value: float = 1.0) -> dict[str, Tensor]:
    return {"stem.weight": torch.full((2, 3), value), "head.bias": torch.zeros(2)}


def saved(folder: Path, value: float = 1.0, *, overwrite: bool = False, **facts: Any) -> Path:
    with new_run(folder, overwrite=overwrite) as made:
        write_run(made, {"classes": ["cat", "köter"], **facts}, tensors(value))
    return folder


def test_a_run_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    run = read_run(saved(tmp_path / "runs" / "head", epochs=3))
    assert run.facts["classes"] == ["cat", "köter"]
    assert run.facts["epochs"] == 3
    assert run.tensors.keys() == tensors().keys()
    assert all(torch.equal(run.tensors[name], tensor) for name, tensor in tensors().items())
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["head"]


def test_a_run_whose_path_is_no_text_comes_back(tmp_path: Path) -> None:
    try:
        folder = saved(tmp_path / os.fsdecode(b"caf\xe9"))
    except OSError:
        pytest.skip("this file system takes UTF-8 names alone")
    assert torch.equal(read_run(folder).tensors["stem.weight"], tensors()["stem.weight"])


def test_tensors_that_share_memory_are_saved_under_both_names(tmp_path: Path) -> None:
    both = torch.arange(4.0)
    with new_run(tmp_path / "head") as made:
        write_run(made, {}, {"one": both, "other": both, "part": both[1:3]})
    assert read_run(tmp_path / "head").tensors["part"].tolist() == [1.0, 2.0]


def test_an_error_inside_leaves_nothing_behind(tmp_path: Path) -> None:
    def fail() -> None:
        with new_run(tmp_path / "head") as made:
            write_run(made, {}, tensors())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_an_error_inside_keeps_the_run_that_was_to_be_replaced(tmp_path: Path) -> None:
    folder = saved(tmp_path / "head", 1.0)

    def fail() -> None:
        with new_run(folder, overwrite=True):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert read_run(folder).tensors["stem.weight"][0, 0] == 1.0
    assert list(tmp_path.iterdir()) == [folder]


def test_overwriting_replaces_the_whole_folder(tmp_path: Path) -> None:
    folder = saved(tmp_path / "head", 1.0)
    (folder / "history.csv").write_text("old")
    saved(folder, 2.0, overwrite=True)
    assert read_run(folder).tensors["stem.weight"][0, 0] == 2.0
    assert sorted(path.name for path in folder.iterdir()) == [FACTS, TENSORS]
    assert list(tmp_path.iterdir()) == [folder]


def test_a_saved_run_is_not_replaced_unasked_and_other_folders_never(tmp_path: Path) -> None:
    folder = saved(tmp_path / "head")
    with pytest.raises(FeatureStoreError, match=r"holds a saved run already. .* --overwrite"):
        saved(folder)
    other = tmp_path / "photos"
    other.mkdir()
    check_free(other, overwrite=False)  # an empty folder is free
    (other / "cat.jpg").write_text("miau")
    for overwrite in (True, False):
        with pytest.raises(FeatureStoreError, match="photos exists and is no saved run, so it isn't replaced"):
            saved(other, overwrite=overwrite)
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(FeatureStoreError, match="file exists and is no saved run"):
        saved(file, overwrite=True)


def test_a_run_with_files_of_the_users_own_is_not_replaced(tmp_path: Path) -> None:
    folder = saved(tmp_path / "head", 1.0)
    (folder / ".DS_Store").write_text("of the system")
    saved(folder, 2.0, overwrite=True)
    (folder / "notes.txt").write_text("what I found")
    (folder / "plots").mkdir()
    other = tmp_path / "web"
    other.mkdir()
    (other / FACTS).write_text('{"format": "layers-model"}')  # another program's
    (other / "weights.bin").write_text("")
    for path in (folder, other):
        with pytest.raises(FeatureStoreError, match=r"besides its run, .* Move out what you want to keep"):
            saved(path, 3.0, overwrite=True)
    assert read_run(folder).tensors["stem.weight"][0, 0] == 2.0
    assert sorted(os.listdir(folder)) == [FACTS, TENSORS, "notes.txt", "plots"]
    assert sorted(os.listdir(other)) == [FACTS, "weights.bin"]


@pytest.mark.parametrize("text", ["{", "[]", '{"files": 3}'])
def test_a_damaged_run_may_be_replaced(tmp_path: Path, text: str) -> None:
    folder = saved(tmp_path / "head", 1.0)
    (folder / FACTS).write_text(text)
    assert read_run(saved(folder, 2.0, overwrite=True)).tensors["stem.weight"][0, 0] == 2.0


def test_an_empty_folder_becomes_the_run(tmp_path: Path) -> None:
    (tmp_path / "head").mkdir()
    read_run(saved(tmp_path / "head"))
    assert [path.name for path in tmp_path.iterdir()] == ["head"]


@pytest.mark.skipif(os.name != "posix", reason="POSIX permissions")
def test_a_run_has_the_permissions_of_any_new_folder(tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    assert saved(tmp_path / "head").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "replace"])
def test_damaged_tensors_are_refused(damage: str, tmp_path: Path) -> None:
    folder = saved(tmp_path / "head")
    path = folder / TENSORS
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[-1] ^= 1
        path.write_bytes(data)
    elif damage == "truncate":
        path.write_bytes(data[:-4])
    elif damage == "remove":
        path.unlink()
    else:
        path.write_bytes((saved(tmp_path / "other", 2.0) / TENSORS).read_bytes())
    with pytest.raises(DamagedFileError, match="isn't the file that was saved with the run"):
        read_run(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"format": "x"}', '{"format": 1}', "7"])
def test_damaged_facts_are_refused(text: str, tmp_path: Path) -> None:
    folder = saved(tmp_path / "head")
    (folder / FACTS).write_text(text)
    with pytest.raises(DamagedFileError, match=r"model.json is damaged"):
        read_run(folder)


def test_a_newer_format_and_a_folder_that_is_no_run_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as newer:
        newer.setattr(runs, "FORMAT_VERSION", 3)
        folder = saved(tmp_path / "head")
    with pytest.raises(FeatureStoreError, match=r"has run format 3; this featstore reads up to 2. Upgrade featstore"):
        read_run(folder)
    with pytest.raises(FeatureStoreError, match=r"it has no model.json. Give one of those in it: .*head"):
        read_run(tmp_path)
    (tmp_path / "none").mkdir()
    with pytest.raises(FeatureStoreError, match=r"is no saved run: it has no model.json. Give the folder that --out"):
        read_run(tmp_path / "none")


def test_each_single_bit_that_flips_in_the_facts_or_a_report_is_found_and_the_file_named(tmp_path: Path) -> None:
    folder = saved(tmp_path / "head", mean=[0.485, 0.456, 0.406], size=64)
    with new_run(folder, overwrite=True) as made:
        write_run(made, read_run_facts(folder), tensors())
        (made / "run.json").write_text('{"store": "features"}')
    kept = read_run(folder).facts
    for name in (FACTS, "run.json"):
        path = folder / name
        whole = path.read_bytes()
        for place in range(len(whole) * 8):
            data = bytearray(whole)
            data[place // 8] ^= 1 << place % 8
            path.write_bytes(data)
            try:
                facts = read_run(folder).facts
            except DamagedFileError as error:
                assert name in str(error)  # noqa: PT017 - that there is none is a claim below
            else:
                assert name == FACTS
                assert facts == kept, place  # white space
        path.write_bytes(whole)


def read_run_facts(folder: Path) -> dict[str, Any]:
    return {name: value for name, value in read_run(folder).facts.items() if name in ("classes", "mean", "size")}


def test_a_report_that_is_altered_is_named_and_one_that_was_deleted_is_not_missed(tmp_path: Path) -> None:
    with new_run(tmp_path / "head") as made:
        write_run(made, {}, tensors())
        (made / "metrics.json").write_text("{}")
    report = tmp_path / "head" / "metrics.json"
    assert read_file(tmp_path / "head", "metrics.json") == b"{}"
    report.write_text("{ }")
    for read in (lambda: read_run(tmp_path / "head"), lambda: read_file(tmp_path / "head", "metrics.json")):
        with pytest.raises(DamagedFileError, match=r"metrics.json isn't the file that was saved"):
            read()
    report.unlink()
    read_run(tmp_path / "head")
    assert read_file(tmp_path / "head", "history.csv") is None


def test_a_run_of_version_1_is_read(tmp_path: Path) -> None:
    folder = Path(__file__).parents[1] / "data" / "run-0.1.0"
    run = read_run(folder)
    assert run.facts["format"] == 1
    assert read_file(folder, "run.json") == (folder / "run.json").read_bytes()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
def test_whoever_replaces_a_run_and_is_killed_at_any_operation_leaves_the_old_one_or_the_new_one(
    tmp_path: Path,
) -> None:
    folder, operations = tmp_path / "head", ("_sync", "_write_facts", "_digest")
    stopped = 0
    for last in range(100):
        saved(folder, 1.0, overwrite=True)
        if (child := os.fork()) == 0:  # pragma: no cover - it ends without a word
            _die_after(last, operations)
            saved(folder, 2.0, overwrite=True)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        value = float(read_run(folder).tensors["stem.weight"][0, 0])
        assert value in (1.0, 2.0)
        stopped += status != 0
        if status == 0:
            assert value == 2.0
            break
    assert stopped > 8  # of each operation at least once
    saved(folder, 3.0, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["head"]  # nothing is left of all the others


def _die_after(count: int, operations: tuple[str, ...]) -> None:
    """Ends this process, as a kill does, at the operation of that number: ours, and each rename of a folder."""
    left = [count]

    def ending(operation: Any) -> Any:
        def run(*arguments: Any, **options: Any) -> Any:
            if left[0] == 0:
                os._exit(9)
            left[0] -= 1
            return operation(*arguments, **options)

        return run

    for name in operations:
        setattr(runs, name, ending(getattr(runs, name)))
    Path.rename = ending(Path.rename)  # type: ignore[method-assign]


def test_what_is_read_is_of_one_run_though_another_takes_its_place_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved(tmp_path / "head", 1.0, made="first")
    read, left = weights.read_tensors, [2.0, 3.0]

    def replaced_before(path: Path) -> Any:
        if left:
            saved(folder, left.pop(0), overwrite=True, made="later")
        return read(path)

    monkeypatch.setattr(weights, "read_tensors", replaced_before)
    run = read_run(folder)
    assert run.facts["made"] == "later"
    assert float(run.tensors["stem.weight"][0, 0]) == 3.0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
def test_several_processes_replace_a_run_at_one_time_and_each_time_it_is_whole(tmp_path: Path) -> None:
    folder = saved(tmp_path / "head", 0.0, number=0.0)
    children = []
    for number in (1.0, 2.0, 3.0):
        if (child := os.fork()) == 0:  # pragma: no cover - its exit code says how it went
            with suppress(BaseException):
                for _ in range(15):
                    saved(folder, number, overwrite=True, number=number)
                os._exit(0)
            os._exit(1)
        children.append(child)
    left = set(children)
    while left:
        run = read_run(folder)
        assert run.facts["number"] == float(run.tensors["stem.weight"][0, 0])
        for child in set(left):
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                assert status == 0
                left.remove(child)
    saved(folder, 4.0, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["head"]


def test_a_run_that_a_link_or_a_dot_names_is_replaced_where_it_lies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tmp_path / "disk" / "head", 1.0)
    (tmp_path / "head").symlink_to(tmp_path / "disk" / "head")
    saved(tmp_path / "head", 2.0, overwrite=True)
    assert float(read_run(tmp_path / "disk" / "head").tensors["stem.weight"][0, 0]) == 2.0
    monkeypatch.chdir(tmp_path / "head")
    saved(Path(), 3.0, overwrite=True)
    assert float(read_run(tmp_path / "disk" / "head").tensors["stem.weight"][0, 0]) == 3.0
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_dir()) == ["disk", "head", "head"]
    assert (tmp_path / "head").is_symlink()


@pytest.mark.skipif(os.name != "posix", reason="POSIX permissions")
def test_every_file_of_a_run_may_be_read_by_whom_the_umask_allows(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        folder = saved(tmp_path / "head")
    finally:
        os.umask(before)
    assert {oct(path.stat().st_mode & 0o777) for path in folder.iterdir()} == {"0o644"}


def test_where_nothing_can_be_written_is_known_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        check_free(tmp_path / "file" / "runs" / "head", overwrite=False)
    check_free(tmp_path / "runs" / "deep" / "head", overwrite=False)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
@pytest.mark.parametrize("limit", [100, 400])
def test_a_full_disk_is_an_error_that_names_the_file(tmp_path: Path, limit: int) -> None:
    """In a child that may write files of so many bytes: the tensors need 200, the facts more."""
    if (child := os.fork()) == 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try:
            saved(tmp_path / "head", text="x" * 1000)
        except OSError as error:
            os._exit(0 if error.errno == errno.EFBIG and str(tmp_path / "head") in str(error.filename) else 1)
        except BaseException:
            os._exit(2)
        os._exit(3)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert list(tmp_path.iterdir()) == []
