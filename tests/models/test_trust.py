"""Trust: no code of somebody else's run runs unasked, and code that has changed isn't even imported."""

from __future__ import annotations

import importlib.util
import py_compile
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.processes import Processes
from support.programs import BACKBONE, Run, photographs, runner

from featstore import FeatureStore, FeatureStoreError, ImageSet, backbone
from featstore.models import own_file, trust
from training import Learner, train_head

SAYS_THAT_IT_RAN = f"from pathlib import Path; Path(__file__).with_name('ran').touch()\n{BACKBONE}"


@pytest.fixture(autouse=True)
def nothing_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


@pytest.fixture
def theirs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that somebody else made with their own file, which says whether it ran since."""
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "net.py").write_text(SAYS_THAT_IT_RAN)
    images = ImageSet.from_folder(photographs(tmp_path / "photos", 4)).split(valid=0.25)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "their state"))
    model = backbone(str(tmp_path / "theirs" / "net.py:make_model"))
    run = tmp_path / "theirs" / "run"
    train_head(model, images, view=model.view.resized(size=32), epochs=1, lr=0.01, out=run, quiet=True)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    (tmp_path / "theirs" / "ran").unlink()
    return run


def has_run(run: Path) -> bool:
    return (run.parent / "ran").exists()


def test_a_run_of_somebody_else_runs_no_code_until_it_is_trusted(
    theirs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run: Run = runner(capsys)
    photo = str(next((tmp_path / "photos").rglob("*.jpg")))
    refused = run("featstore-train", "predict", "--model", str(theirs), photo)
    assert refused.code == 1
    assert "would run code: make_model in" in refused.err
    assert "net.py" in refused.err
    assert "    from pathlib import Path; Path(__file__)" in refused.err  # what would run
    assert "--trust-code" in refused.err
    refused = run(
        "featstore", "status", "--images", str(tmp_path / "photos"), "--store", "f", "--backbone", str(theirs)
    )
    assert "would run code" in refused.err
    with pytest.raises(FeatureStoreError, match="would run code"):
        Learner.load(theirs)
    assert not has_run(theirs)

    assert run("featstore-train", "predict", "--model", str(theirs), photo, "--trust-code").code == 0
    assert has_run(theirs)
    assert run("featstore-train", "predict", "--model", str(theirs), photo).code == 0  # it is remembered


@pytest.mark.parametrize("command", ["backbones", "adopt", "status"])
def test_the_flag_that_a_refusal_names_is_one_of_the_same_command(
    command: str, theirs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run: Run = runner(capsys)
    data = ["--images", str(tmp_path / "photos"), "--store", str(tmp_path / "f"), "--size", "32"]
    model = ["--backbone", str(theirs), "--weights", str(theirs / "model.safetensors")]
    made = ["--backbone", str(theirs.parent / "net.py:make_model"), "--cut", "pool"]
    assert run("featstore", "extract", *data, *made).code == 0
    (key,) = {each.key for each in FeatureStore(tmp_path / "f").sets()}
    shutil.rmtree(tmp_path / "state")
    (theirs.parent / "ran").unlink()
    flags = {"backbones": [str(theirs)], "adopt": [key, *data, *model], "status": [*data, *model, "--cut", "pool"]}
    refused = run("featstore", command, *flags[command])
    assert "--trust-code" in refused.err
    assert not has_run(theirs)
    run("featstore", command, *flags[command], "--trust-code")
    assert has_run(theirs)


def test_a_run_of_ones_own_is_loaded_unasked(theirs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "their state"))
    Learner.load(theirs)


@pytest.mark.parametrize("place", ["net.py", "helper.py"])
def test_code_that_has_changed_is_refused_before_anything_of_it_runs(
    place: str, tmp_path: Path, processes: Processes
) -> None:
    (tmp_path / "net.py").write_text(f"import helper\n{SAYS_THAT_IT_RAN}")
    (tmp_path / "helper.py").write_text("WIDTH = 8\n")
    processes.answer(_SAVE, cwd=tmp_path)
    (tmp_path / "ran").unlink()
    (tmp_path / place).write_text((tmp_path / place).read_text() + "\nWIDTH = 9\n")
    refused = processes.run(_LOAD, cwd=tmp_path)
    assert "has changed since the run was saved" in refused.stderr
    assert not (tmp_path / "ran").exists()


_SAVE = """
from featstore import backbone
from support.tiny import arrays
from training import Learner
model = backbone("net.py:make_model")
images = arrays(8).split(valid=0.25)
Learner(model, images, view=model.view.resized(size=32), quiet=True).save("run")
"""
_LOAD = """
from training import Learner
Learner.load("run", trust_code=True)
"""


def test_the_same_code_elsewhere_or_another_function_of_it_is_not_trusted(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(BACKBONE)
    trust.remember(tmp_path / "net.py", "make_model")
    assert trust.is_known(tmp_path / "net.py", "make_model")
    assert not trust.is_known(tmp_path / "net.py", "other")
    shutil.copy(tmp_path / "net.py", tmp_path / "copy.py")
    assert not trust.is_known(tmp_path / "copy.py", "make_model")
    (tmp_path / "net.py").write_text(f"# a comment\n{BACKBONE}")
    assert trust.is_known(tmp_path / "net.py", "make_model")


def test_all_that_an_import_leads_to_counts_also_inside_functions_and_packages(tmp_path: Path) -> None:
    (tmp_path / "parts" / "deep").mkdir(parents=True)
    texts = {
        "net.py": "import os\ndef make():\n    from parts import blocks\n",
        "parts/__init__.py": "",
        "parts/blocks.py": "from .deep.layer import x\nfrom . import other\n",
        "parts/other.py": "import json\n",
        "parts/deep/__init__.py": "A = 1\n",
        "parts/deep/layer.py": "from ..last import x\n",
        "parts/last.py": "x = 2\n",
        "parts/unused.py": "y = 3\n",
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    before = trust.reachable_sources(tmp_path / "net.py")
    assert len(before) == len(texts) - 1
    for name, text in texts.items():
        (tmp_path / name).write_text(f"{text}z = 9\n")
        is_same = trust.reachable_sources(tmp_path / "net.py") == before
        assert is_same == (name == "parts/unused.py"), name
        (tmp_path / name).write_text(text)


def test_where_nothing_can_be_remembered_the_work_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    (tmp_path / "net.py").write_text(BACKBONE)
    assert backbone(str(tmp_path / "net.py:make_model"))(torch.zeros(1, 3, 32, 32)).shape == (1, 5)
    assert not trust.is_known(tmp_path / "net.py", "make_model")


NET = """
from torch import nn
{}
def make_model():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
"""
RUNS = "from pathlib import Path; Path({!r}).touch()\n"


@pytest.fixture
def mine(tmp_path: Path) -> Iterator[Path]:
    (tmp_path / "mine").mkdir()
    yield tmp_path / "mine"
    forget_helpers()


def made(folder: Path, imports: str = "") -> dict[str, Any]:
    """The facts that a run of one's own has, whose model was made by net.py in `folder`."""
    (folder / "net.py").write_text(NET.format(imports))
    facts: dict[str, Any] = own_file.load(f"{folder / 'net.py'}:make_model").origin["architecture"]
    forget_helpers()
    return facts


def forget_helpers() -> None:
    """As in a new process."""
    for name in [name for name in sys.modules if name.partition(".")[0] in {"blocks", "parts"}]:
        del sys.modules[name]


def compile_for(file: Path, code: str, *, beside: bool = False) -> None:
    """Puts bytecode of `code` where Python takes it for that of `file`, whatever `file` says."""
    other = file.with_name("other")
    other.write_text(code)
    place = file.with_suffix(".pyc") if beside else Path(importlib.util.cache_from_source(file))
    py_compile.compile(
        str(other), str(place), str(file), invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH
    )


@pytest.mark.parametrize("name", ["net.py", "blocks.py"])
def test_bytecode_beside_a_file_is_never_run(name: str, mine: Path) -> None:
    (mine / "blocks.py").write_text("")
    facts = made(mine, "import blocks")
    compile_for(mine / name, RUNS.format(str(mine / "ran")))
    own_file.made_again(facts, mine / "run")
    forget_helpers()
    own_file.load(f"{mine / 'net.py'}:make_model")
    assert not (mine / "ran").exists()


def test_no_package_of_bytecode_takes_the_place_of_a_module_that_was_checked(mine: Path) -> None:
    (mine / "blocks.py").write_text("")
    facts = made(mine, "import blocks")
    (mine / "blocks").mkdir()
    compile_for(mine / "blocks" / "__init__.py", RUNS.format(str(mine / "ran")), beside=True)
    own_file.made_again(facts, mine / "run")
    assert not (mine / "ran").exists()


def test_what_the_standard_library_imports_is_not_looked_for_beside_the_file(
    mine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = made(mine, "import xmlrpc.server")
    for name in [name for name in sys.modules if name.startswith(("xmlrpc", "http.server", "pydoc"))]:
        monkeypatch.delitem(sys.modules, name)
    (mine / "pydoc.py").write_text(RUNS.format(str(mine / "ran")))
    own_file.made_again(facts, mine / "run")
    assert not (mine / "ran").exists()


@pytest.mark.parametrize("place", ["blocks.py", "parts/blocks.py"])
def test_a_module_imported_by_a_computed_name_runs_only_where_the_code_is_trusted(place: str, mine: Path) -> None:
    (mine / "parts").mkdir()
    (mine / place).write_text("")
    facts = made(mine, f"import importlib\nimportlib.import_module({place.removesuffix('.py').replace('/', '.')!r})")
    (mine / place).write_text(RUNS.format(str(mine / "ran")))
    with pytest.raises(FeatureStoreError, match=r"blocks\.py would run, and no import statement.*--trust-code"):
        own_file.made_again(facts, mine / "run")
    assert not (mine / "ran").exists()
    forget_helpers()
    (mine / place).write_text("")
    own_file.made_again(facts, mine / "run", trust_code=True)


def test_modules_are_looked_for_where_the_file_lies_and_not_where_a_link_to_it_does(mine: Path) -> None:
    (mine / "blocks.py").write_text("")
    facts = made(mine, "import blocks")
    (mine / "elsewhere").mkdir()
    (mine / "net.py").rename(mine / "elsewhere" / "net.py")
    (mine / "net.py").symlink_to(mine / "elsewhere" / "net.py")
    (mine / "elsewhere" / "blocks.py").write_text(RUNS.format(str(mine / "ran")))
    with pytest.raises(FeatureStoreError, match="has changed since the run was saved"):
        own_file.made_again(facts, mine / "run")
    assert not (mine / "ran").exists()


def test_code_that_an_encoding_hides_in_a_comment_counts(mine: Path) -> None:
    facts = made(mine)
    hidden = NET.format(f"# +AAo-{RUNS.format(str(mine / 'ran'))}")
    (mine / "net.py").write_text(f"# coding: utf-7{hidden}")
    with pytest.raises(FeatureStoreError, match="has changed since the run was saved"):
        own_file.made_again(facts, mine / "run")
    assert not (mine / "ran").exists()


def test_a_folder_of_modules_without_init_is_found_for_a_run_of_ones_own(mine: Path) -> None:
    (mine / "parts" / "deep").mkdir(parents=True)
    (mine / "parts" / "blocks.py").write_text("from parts.deep import layer\n")
    (mine / "parts" / "deep" / "layer.py").write_text("A = 1\n")
    facts = made(mine, "from parts import blocks")
    assert len(facts["reachable"]) == 3
    own_file.made_again(facts, mine / "run")
