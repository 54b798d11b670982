"""The README's two minutes, run as they stand: on photographs, with random weights where the real ones would be."""

import re
import runpy
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.pages import go_there, reader_folder

import featstore.cli.app
import training.cli.app
from featstore import FeatureStore

README = Path(__file__).parents[2] / "README.md"
PROGRAMS: dict[str, Callable[[list[str]], int]] = {
    "featstore": featstore.cli.app.main,
    "featstore-train": training.cli.app.main,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return reader_folder(tmp_path_factory.mktemp("readme"), "resnet34")


@pytest.fixture
def at_home(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go_there(folder, monkeypatch, "resnet34")


def test_the_commands_of_the_readme_run(at_home: None, capsys: pytest.CaptureFixture[str]) -> None:
    commands = _commands(0)
    assert [command[:2] for command in commands] == [
        ["featstore", "extract"],
        ["featstore", "ls"],
        ["featstore-train", "head"],
        ["featstore-train", "finetune"],
        ["featstore-train", "evaluate"],
        ["featstore-train", "predict"],
    ]
    for program, *arguments in commands:
        assert PROGRAMS[program](arguments) == 0, capsys.readouterr().err
    assert Path("predictions.csv").read_text().splitlines()[0] == "image,label,probability,cat,dog"
    assert PROGRAMS["featstore"](commands[0][1:]) == 0
    assert " 0 computed" in capsys.readouterr().err.splitlines()[-1]


def test_the_python_of_the_readme_runs(at_home: None, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(_blocks("python")[0], str(README), "exec"), {})
    said = capsys.readouterr().out
    assert "train: 6 images from features, resnet34@layer4 concat, evaluation view" in said
    assert "why: conv1...layer4 are frozen" in said
    assert said.splitlines()[-1] in ("cat", "dog")
    assert Path("lr.png").stat().st_size > 0
    assert Path("runs/pets/model.safetensors").exists()


def test_the_python_of_many_heads_runs(at_home: None, capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {}
    exec(compile(_blocks("python")[1], str(README), "exec"), names)
    assert len(names["table"].table) == 18
    assert len(names["learn"].evaluate("valid")) > 1
    assert "linear" in capsys.readouterr().out.splitlines()[-1]


def test_the_python_for_features_runs(at_home: None, capsys: pytest.CaptureFixture[str]) -> None:
    key, _ = _two_keys()
    names: dict[str, Any] = {}
    exec(compile(_blocks("python")[2].replace("7c41", key), str(README), "exec"), names)
    assert capsys.readouterr().out.startswith("memory: ")
    assert names["X"].shape == (6, 1024)
    assert names["y"].tolist() == names["images"].train.targets.tolist()
    assert sorted(names["rows"].tolist()) == list(range(6))


def test_the_commands_that_keep_a_store_run(at_home: None, capsys: pytest.CaptureFixture[str]) -> None:
    keys = dict(zip(("7c41", "1b2e"), _two_keys(), strict=True))
    commands = [[keys.get(word, word) for word in command] for command in _commands(1)]
    names = [command[1] for command in commands]
    assert names == ["verify", "diff", "export", "compact", "gc", "remove"]
    for program, *arguments in commands:
        assert PROGRAMS[program](arguments) == 0, capsys.readouterr().err
    assert np.load("layer4.npy").shape == (8, 1024)
    assert len(Path("layer4.csv").read_text().splitlines()) == 9
    assert [found.key[:8] for found in FeatureStore("features").sets() if found.key.startswith(keys["1b2e"])] == []
    table = re.findall(r"^\| `([a-z]+)", README.read_text(), re.M)
    assert {*names, "adopt", "import"} <= set(table)


def _two_keys() -> tuple[str, str]:
    """The evaluation view's key, and another one's, in a store that is made if no test has made it yet."""
    if not Path("features").exists():
        program, *arguments = _commands(0)[0]
        assert PROGRAMS[program](arguments) == 0
    keys = {found.spec.rendered.seed: found.key[:8] for found in FeatureStore("features").sets()}
    return keys[None], next(key for seed, key in keys.items() if seed is not None)


def _commands(place: int) -> list[list[str]]:
    return [shlex.split(line) for line in _blocks("sh")[place].replace("\\\n", " ").splitlines()]


def _blocks(language: str) -> list[str]:
    blocks = re.findall(
        rf"<!-- run by tests/project/test_readme.py -->\n```{language}\n(.*?)```", README.read_text(), re.S
    )
    assert len(blocks) == {"sh": 2, "python": 3}[language]
    return [str(block) for block in blocks]


def test_the_readme_shows_the_house_as_it_is() -> None:
    drawn = runpy.run_path(str(README.with_name("scripts") / "draw_house.py"))["pictures"]()
    assert drawn in README.read_text(encoding="utf-8")


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "docs/design.md"])
def test_files_that_a_page_names_are_there(page: str) -> None:
    text = (README.parent / page).read_text(encoding="utf-8")
    rooms = ("featstore/", "training/", "tests/", "scripts/", "docs/", "models/", "images/", "files/", "store/")
    named = {word for word in re.findall(r"`([\w./]+)`", text) if word.startswith((*rooms, "extraction/", "exchange/"))}
    missing = [
        name for name in named if not any((README.parent / folder / name).exists() for folder in ("", "featstore"))
    ]
    assert len(named) > 4
    assert not [name for name in missing if "NAME" not in name and "." in name]
