"""The programs as several tests run them, and what they are run on: photographs, a backbone in a person's own file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

import featstore.cli.app
import training.cli.app

MAINS = {"featstore": featstore.cli.app.main, "featstore-train": training.cli.app.main}

BACKBONE = """
from collections import OrderedDict

from torch import nn


def make_model():
    layers = [("conv1", nn.Conv2d(3, 8, 3, 2)), ("bn1", nn.BatchNorm2d(8)), ("relu1", nn.ReLU())]
    layers += [("conv2", nn.Conv2d(8, 16, 3, 2)), ("pool", nn.AdaptiveAvgPool2d(1)), ("flat", nn.Flatten())]
    return nn.Sequential(OrderedDict([*layers, ("fc", nn.Linear(16, 5))]))
"""


class Ran(NamedTuple):
    """What one run of a program left."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    @property
    def last_words(self) -> str:
        return self.err.splitlines()[-1]


Run = Callable[..., Ran]
Program = Callable[..., Ran]
"""A `Run` of one program."""


def runner(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs ``program arg ...`` in this process; the exit code is not looked at."""

    def run(program: str, *arguments: str) -> Ran:
        capsys.readouterr()
        code = MAINS[program](arguments)
        return Ran(code, *capsys.readouterr())

    return run


def photographs(root: Path, count: int = 10, first: int = 0, classes: tuple[str, str] = ("cat", "dog")) -> Path:
    """A folder with `count` crops of a photograph in each of two classes; `first` chooses other crops."""
    for name, whole in zip(classes, load_sample_images().images, strict=True):
        (root / name).mkdir(parents=True, exist_ok=True)
        for place in range(first, first + count):
            crop = whole[place * 7 : place * 7 + 90, place * 5 : place * 5 + 120]
            Image.fromarray(crop).save(root / name / f"{place:03}.jpg")
    return root


def workplace(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with photos/ and tiny.py."""
    photographs(folder / "photos")
    (folder / "tiny.py").write_text(BACKBONE, encoding="utf-8")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "100")
    return folder


def extract_flags(*more: str, images: str = "photos", store: str = "feats") -> list[str]:
    """What `extract` is told about images, store and model in such a directory."""
    return ["--images", images, "--store", store, "--backbone", "tiny.py:make_model", "--size", "32", *more]
