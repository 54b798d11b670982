"""Trust: no code of somebody else's run runs unasked, and code that has changed isn't even imported."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.programs import BACKBONE, Run, photographs, runner

from featstore import FeatureStoreError, ImageSet, backbone
from featstore.models import trust
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


def test_a_run_of_ones_own_is_loaded_unasked(theirs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "their state"))
    Learner.load(theirs)


@pytest.mark.parametrize("place", ["net.py", "helper.py"])
def test_code_that_has_changed_is_refused_before_anything_of_it_runs(place: str, tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(f"import helper\n{SAYS_THAT_IT_RAN}")
    (tmp_path / "helper.py").write_text("WIDTH = 8\n")
    made = _in_a_process(tmp_path, "save")
    assert made.returncode == 0, made.stderr
    (tmp_path / "ran").unlink()
    (tmp_path / place).write_text((tmp_path / place).read_text() + "\nWIDTH = 9\n")
    refused = _in_a_process(tmp_path, "load")
    assert "has changed since the run was saved" in refused.stderr
    assert not (tmp_path / "ran").exists()


def _in_a_process(folder: Path, what: str) -> subprocess.CompletedProcess[str]:
    program = f"""
from featstore import backbone
from support.tiny import arrays
from training import Learner
images = arrays(8).split(valid=0.25)
if {what!r} == "save":
    model = backbone("net.py:make_model")
    Learner(model, images, view=model.view.resized(size=32), quiet=True).save("run")
else:
    Learner.load("run", trust_code=True)
"""
    path = os.pathsep.join([*map(str, Path(__file__).parents[1:3]), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-c", program],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": path},
    )


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
