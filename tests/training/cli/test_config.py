"""A run says what it was asked for, and that can be asked again, to the same bits."""

from __future__ import annotations

import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors.numpy import load_file
from support.programs import Run

from training.cli.config import flags_as_toml

HEAD = ["--images", "photos", "--store", "feats", "--backbone", "tiny.py:make_model", "--size", "32", "--extract"]


def weights(run: str) -> dict[str, bytes]:
    return {name: value.tobytes() for name, value in load_file(f"{run}/model.safetensors").items()}


def test_a_command_is_repeated_bit_for_bit_from_its_run(run: Run, here: Path) -> None:
    flags = [*HEAD, "--epochs", "2", "--seed", "3", "--head", "mlp", "--augment", "flip", "--seeds", "0-1"]
    assert run("featstore-train", "head", *flags, "--out", "runs/a").code == 0
    kept = tomllib.loads((here / "runs/a/run.toml").read_text(encoding="utf-8"))
    expected = {"images": "photos", "extract": True, "epochs": 2, "seed": 3, "head": "mlp", "seeds": "0-1", "size": 32}
    assert expected.items() <= kept.items()
    assert not {"out", "json", "debug", "overwrite", "resume", "config", "lr", "trust-code"} & kept.keys()
    again = ["head", "--config", "runs/a/run.toml"]
    assert run("featstore-train", *again, "--out", "runs/b").code == 0
    assert weights("runs/b") == weights("runs/a")
    assert (here / "runs/b/run.toml").read_bytes() == (here / "runs/a/run.toml").read_bytes()
    assert run("featstore-train", *again, "--seed", "4", "--out", "runs/c").code == 0
    assert weights("runs/c") != weights("runs/a")
    assert tomllib.loads((here / "runs/c/run.toml").read_text(encoding="utf-8"))["seed"] == 4

    tune = ["finetune", "--images", "photos", "--from", "runs/a", "--epochs", "1", "--lr", "1e-4,1e-3"]
    assert run("featstore-train", *tune, "--out", "runs/d").code == 0
    assert run("featstore-train", "finetune", "--config", "runs/d/run.toml", "--out", "runs/e").code == 0
    assert weights("runs/e") == weights("runs/d")
    replaced = run("featstore-train", *again, "--out", "runs/b", "--overwrite")
    assert replaced.code == 0, "run.toml is one of the run's own files"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("epocs = 2", "run.toml has epocs, and featstore-train head has no flag --epocs. Did you mean epochs?"),
        ("[head]\nepochs = 2", "run.toml has head = {'epochs': 2}; expected a text or a number, as the flag takes it."),
        ("epochs = true", "run.toml has epochs = True; expected a text or a number, as the flag takes it."),
        ("extract = 1", "run.toml has extract = 1; expected true or false."),
        ("trust-code = true", "run.toml has trust-code, which has to be said each time. Give --trust-code with the"),
        ("epochs: 2", "run.toml is no TOML: "),
        ("out = 'runs/a'\nepochs = 'two'", "Invalid value for '--epochs': "),
        ("out = 'runs/a'\nepochs = 5.5", "Invalid value for '--epochs': "),
        ("lr = 1e-2", "Missing option '--out'"),
    ],
)
def test_what_a_config_cannot_say_is_refused(run: Run, here: Path, text: str, sentence: str) -> None:
    (here / "run.toml").write_text(text, encoding="utf-8")
    ran = run("featstore-train", "head", *HEAD, "--config", "run.toml")
    assert (ran.code, ran.out) == (2, "")
    assert sentence in ran.last_words


def test_a_config_that_isnt_there_is_named(run: Run, here: Path) -> None:
    ran = run("featstore-train", "head", *HEAD, "--config", "nowhere.toml")
    assert (ran.code, ran.last_words) == (1, "nowhere.toml: No such file or directory.")


@pytest.mark.parametrize(
    "value", ['say "hi"\\', "größe/日本", "tab\tline\nreturn\r", "\x00\x1f\x7f", "\udcff.jpg", 3, 1e-05, 0.5, True]
)
def test_any_value_comes_back_from_toml(value: Any) -> None:
    parameters = [SimpleNamespace(name="root", opts=["--root"])]
    context: Any = SimpleNamespace(
        params={"root": value}, command=SimpleNamespace(params=parameters), command_path="featstore-train head"
    )
    assert tomllib.loads(flags_as_toml(context)) == {"root": value}
