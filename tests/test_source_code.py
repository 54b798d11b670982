from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from support.processes import Processes

import featstore
from featstore import ModelError
from featstore.source_code import normalised_source, outdated_sources, own_files, source_digests

NAMES = ("source_a", "source_b", "source_c", "source_d", "training")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    kept = {name: sys.modules.pop(name) for name in NAMES if name in sys.modules}
    yield tmp_path
    for name in NAMES:
        sys.modules.pop(name, None)
    sys.modules.update(kept)


def load(folder: Path, **texts: str) -> ModuleType:
    for name, text in texts.items():
        (folder / f"{name}.py").write_text(text)
    importlib.invalidate_caches()
    return importlib.import_module(next(iter(texts)))


def test_comments_docstrings_and_layout_do_not_matter_and_statements_do() -> None:
    plain = normalised_source("def f(x):\n    return x + 1\n")
    assert normalised_source('"""Doc."""\n\ndef f( x ):\n  "Says."\n  # why\n  return (x\n    + 1)\n') == plain
    assert normalised_source("def f(x):\n    return x + 2\n") != plain
    assert normalised_source('def f(x):\n    """Only this."""\n') == normalised_source("def f(x):\n    pass\n")


def test_what_own_modules_import_is_followed_and_libraries_are_not(folder: Path) -> None:
    module = load(
        folder,
        source_a="import torch\nfrom source_b import NUMBER\ndef late():\n    import source_d\n",
        source_b="import source_c\nNUMBER = 1\n",
        source_c="import json\n",
        source_d="",
    )
    assert own_files(module).keys() == {"source_a", "source_b", "source_c"}
    before = source_digests(module)
    importlib.import_module("source_d")
    assert len(source_digests(module)) == len(before) + 1
    assert source_digests(torch) == source_digests(featstore) == source_digests(torch.nn.Linear) == []


def test_a_file_of_ones_own_called_training_is_no_library(folder: Path) -> None:
    assert own_files(load(folder, training="X = 1\n")).keys() == {"training"}


def test_a_changed_file_is_told_and_the_digest_is_that_of_what_runs(folder: Path) -> None:
    module = load(folder, source_a="X = 1\n")
    before = source_digests(module)
    assert outdated_sources(module) == []
    (folder / "source_a.py").write_text("X = 2\n")
    assert source_digests(module) == before
    assert outdated_sources(module) == [folder / "source_a.py"]
    importlib.reload(module)
    assert source_digests(module) != before
    assert outdated_sources(module) == []


def test_code_without_a_file_is_refused() -> None:
    module = ModuleType("source_prompt")
    with pytest.raises(ModelError, match=r"The source of source_prompt can't be found, .* fingerprint\(\)"):
        source_digests(module)


def test_a_class_typed_into_a_prompt_is_refused(processes: Processes) -> None:
    typed = "compile('class Typed:\\n    def typed(self): pass', '<typed>', 'exec')"  # Python 3.13 knows the text of -c
    code = f"from featstore.source_code import source_digests\nexec({typed})\nsource_digests(Typed)"
    assert "The source of __main__ can't be found" in processes.run(code).stderr
