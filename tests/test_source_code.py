from __future__ import annotations

import importlib
import site
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from support.processes import Processes

import featstore
from featstore import ModelError, source_code
from featstore.source_code import library_code, normalised_source, outdated_sources, own_files, source_digests

NAMES = ("source_a", "source_b", "source_c", "source_d", "source_a.ops", "training")


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


@pytest.fixture
def installed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder whose packages are installed ones."""

    def look_again() -> None:
        source_code._library_folders.cache_clear()
        source_code._is_in_library.cache_clear()
        source_code._release.cache_clear()

    monkeypatch.setattr(site, "USER_SITE", str(folder))
    look_again()
    yield folder
    monkeypatch.undo()
    look_again()


def test_the_release_of_a_library_counts_for_its_own_classes_and_its_files_where_it_has_none(installed: Path) -> None:
    package, release = installed / "source_a", installed / "source_a-1.dist-info"
    package.mkdir()
    (package / "ops.py").write_text("def double(x):\n    return x + x\n")
    (package / "__init__.py").write_text(
        "from torch import nn\nfrom source_a import ops\nSCALE = 2\n"
        "class Block(nn.Module):\n"
        "    @staticmethod\n    def scaled(x): return x * SCALE\n"
        "    def forward(self, x): return ops.double(self.scaled(x))\n"
    )
    block = importlib.import_module("source_a").Block
    own = type("Own", (block,), {"__module__": __name__})

    def codes() -> tuple[list[str], list[str]]:
        source_code._release.cache_clear()
        return library_code(block), library_code(own)

    found = [codes()]
    (package / "ops.py").write_text("def double(x):\n    return x + x + 1\n")
    found.append(codes())
    release.mkdir()
    (release / "top_level.txt").write_text("source_a\n")
    for version in (1, 2):
        (release / "METADATA").write_text(f"Metadata-Version: 2.1\nName: source_a\nVersion: {version}\n")
        found.append(codes())
    assert len({str(code) for code, _ in found}) == 4
    assert "source_a 2" in found[3][0]
    assert len({str(code) for _, code in found}) == 1
    assert library_code(torch.nn.Linear, featstore.StagedModel) == library_code(featstore.StagedModel)
    assert not any("featstore" in each for each in library_code(featstore.StagedModel))


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
