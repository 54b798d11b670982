from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from featstore import DamagedFileError, FeatureStoreError
from featstore.models.runs import FACTS, TENSORS, check_free, new_run, read_run, write_run


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


def test_a_newer_format_and_a_folder_that_is_no_run_are_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path / "head")
    facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
    (folder / FACTS).write_text(json.dumps({**facts, "format": 2}))
    with pytest.raises(FeatureStoreError, match=r"has run format 2; this featstore reads up to 1. Upgrade featstore"):
        read_run(folder)
    with pytest.raises(FeatureStoreError, match=r"is no saved run: it has no model.json. Give the folder that --out"):
        read_run(tmp_path)
