"""A store of two feature sets as the commands about stores find it, beside the photographs and models it is made of."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from featstore import FeatureStore
from support.parts import flip_bit
from support.programs import MAINS, Ran, Run, photographs

MODEL = """
from collections import OrderedDict

import torch
from torch import nn


class Body(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, 4)

    def fingerprint(self):
        return WORDS

    def forward(self, images):
        values = self.conv(images)
        return values if values.shape[0] > 0 else images


def make_model():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        return nn.Sequential(OrderedDict([("body", Body()), ("flat", nn.Flatten()), ("fc", nn.Linear(512, 5))]))
"""

NUM = 12


def make(root: Path) -> Path:
    """Puts photos/, own models, and the store feats/ with two sets of the photos into a folder, and gives it."""
    photographs(root / "photos", NUM // 2)
    for name, words, seed in (("one", "1", 0), ("two", "2", 0), ("other", "3", 1)):
        source = f"WORDS, SEED = {words!r}, {seed}\n{MODEL}"
        (root / f"{name}.py").write_text(source, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        for dtype in ("float16", "float32"):
            flags = ["--size", "32", "--cut", "body:avg", "--dtype", dtype]
            extract = ["extract", *images_and_store(), "--backbone", "one.py:make_model", *flags]
            assert MAINS["featstore"](extract) == 0
    return root


def copied(made: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of such a folder for one test, which runs in it."""
    shutil.copytree(made, folder)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "100")
    return folder


def images_and_store() -> list[str]:
    return ["--images", "photos", "--store", "feats"]


def store() -> FeatureStore:
    return FeatureStore("feats")


def key_of(dtype: str = "float16") -> str:
    return next(each.key for each in store().sets() if each.spec.dtype == dtype)


def featstore(run: Run, *arguments: str) -> Ran:
    return run("featstore", *arguments, "--store", "feats")


def damage(dtype: str = "float16") -> Path:
    """Flips a bit in the features of a set's only part."""
    part = store().set(key_of(dtype)).parts[0]
    flip_bit(part.path, part.features_offset)
    return part.path
