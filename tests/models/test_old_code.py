"""The keys of whole modules whose code isn't what their file holds now: loaded again after an edit, or run by exec."""

from __future__ import annotations

import importlib
import linecache
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from torch import nn

from featstore import ModelError, StagedModel


def digest(module: nn.Module, cut: str) -> str:
    return StagedModel.from_module(module).digest(cut)


def text_with(factor: str) -> str:
    return f"""
import torch
from torch import nn

class Deciding(nn.Module):
    def forward(self, x):
        return x * {factor} if x.sum() > 0 else -x

def make():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 3, 1), Deciding()).eval()
"""


def reloaded(folder: Path, text: str) -> ModuleType:
    """The module `digests_own` of that text, loaded again where it is loaded already."""
    (folder / "digests_own.py").write_text(text)
    importlib.invalidate_caches()
    module = sys.modules.get("digests_own")
    return importlib.import_module("digests_own") if module is None else importlib.reload(module)


@pytest.fixture
def importable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield tmp_path
    sys.modules.pop("digests_own", None)


def test_an_old_whole_module_is_refused_once_its_file_is_loaded_again_with_other_code(importable: Path) -> None:
    text = text_with("2")
    old = reloaded(importable, text).make()
    before = digest(old, "1")
    reloaded(importable, "# A comment moves the lines.\n" + text)
    assert digest(old, "1") == before
    newer = reloaded(importable, text.replace("return x * 2", "return x * 3"))
    model = StagedModel.from_module(old)
    assert model.digest("0")
    with pytest.raises(
        ModelError, match=r"1 \(Deciding\) can't be keyed: .* make anew what was made with Deciding.forw"
    ):
        model.digest("1")
    keys = [digest(newer.make(), "1"), digest(reloaded(importable, text).make(), "1")]
    assert keys[0] != keys[1] == before


def test_an_old_module_that_is_traced_keeps_its_key_whatever_its_file_holds_now(importable: Path) -> None:
    text = text_with("2").replace(" if x.sum() > 0 else -x", "")
    old = reloaded(importable, text).make()
    before = digest(old, "1")
    newer = reloaded(importable, text.replace("x * 2", "x * 3"))
    assert digest(old, "1") == before != digest(newer.make(), "1")


@pytest.mark.parametrize("name", ["digests_own", "torch.hub", "digests_nowhere"])
def test_a_class_that_exec_made_is_keyed_by_the_text_of_its_cell_or_refused(importable: Path, name: str) -> None:
    space: dict[str, Any] = vars(reloaded(importable, "SCALE = 1\n")) if name == "digests_own" else {"__name__": name}

    def made(factor: str, cell: str) -> nn.Module:
        text = text_with(factor)
        linecache.cache[f"<{cell}>"] = (len(text), None, text.splitlines(keepends=True), f"<{cell}>")
        exec(compile(text, f"<{cell}>", "exec", dont_inherit=True), space)
        module: nn.Module = space["make"]()
        return module

    keys = [digest(made(factor, f"cell {number}"), "1") for number, factor in enumerate(("2", "2", "3"))]
    assert keys[0] == keys[1] != keys[2]
    module = made("2", "cell")
    del linecache.cache["<cell>"]
    with pytest.raises(ModelError, match=r"1 \(Deciding\) can't be keyed: its source can't be found"):
        digest(module, "1")
