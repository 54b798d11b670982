from __future__ import annotations

import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from support.own_files import LAYERS, write_own

from featstore import ModelError, View, backbone
from featstore.models.modes import random_states


def test_a_function_of_ones_own_makes_the_model_and_may_import_what_lies_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    path = write_own(tmp_path, "beside")
    before, states = list(sys.path), random_states()
    model = backbone(f"{path}:make")
    assert model.cut_points == ["0.conv", "0", "1", "2"]
    assert model.name == "own"
    assert not model.training
    assert (sys.path, random_states()) == (before, states)
    assert not list(tmp_path.glob("__pycache__"))
    made_by = model.origin["architecture"]
    assert made_by == {
        "file": str(path),
        "function": "make",
        "source": made_by["source"],
        "reachable": made_by["source"],
    }
    assert len(made_by["source"]) == 2
    assert backbone(f"{path}:make").digests() == model.digests()


def test_a_function_that_draws_from_any_global_generator_gives_the_same_model_each_time(tmp_path: Path) -> None:
    path = write_own(tmp_path, "drawn")
    first = backbone(f"{path}:drawn")
    random.random(), np.random.rand(), torch.rand(1)  # noqa: NPY002
    assert backbone(f"{path}:drawn").digests() == first.digests()


def test_a_function_may_return_a_staged_model_with_its_own_view(tmp_path: Path) -> None:
    path = write_own(tmp_path, "staged")
    model = backbone(f"{path}:staged")
    assert (model.name, model.view) == ("mine", View(size=16, resize=16))
    torch.save(model.tensors(), tmp_path / "weights.pth")
    assert backbone(f"{path}:staged", tmp_path / "weights.pth").notes == ()


UNTRACEABLE = """
from torch import nn
from featstore import StagedModel

class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.body = nn.Conv2d(3, 4, 3), nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU())

    def forward(self, x):
        return self.body(self.stem(x)) if x.sum() > 0 else self.body(self.stem(x))

def whole():
    return Branching()

def stages():
    net = whole()
    return StagedModel.from_stages({"stem": net.stem, "body": net.body}, name="branching")
"""


def test_a_network_that_cannot_be_traced_is_given_as_its_stages(tmp_path: Path) -> None:
    path = tmp_path / "branching.py"
    path.write_text(UNTRACEABLE)
    with pytest.raises(
        ModelError, match=r"Branching can't be traced .* StagedModel\.from_stages\(\{\"stem\": \.\.\.\}\)"
    ):
        backbone(f"{path}:whole")
    model = backbone(f"{path}:stages")
    assert (model.name, model.cut_points, model.default_cut) == ("branching", ["stem", "body.0", "body"], "body")
    assert backbone(f"{path}:stages").digests() == model.digests()


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("own.py:other", r"own.py has no function other. Expected path/to/file.py:function."),
        ("own.py:number", r"own.py:number returned a int; expected an nn.Module or a StagedModel."),
        ("none.py:make", r"There is no file .*none.py. Expected path/to/file.py:function"),
    ],
)
def test_a_function_that_is_not_there_or_makes_no_model_is_refused(what: str, message: str, tmp_path: Path) -> None:
    write_own(tmp_path, tmp_path.name)
    with pytest.raises(ValueError, match=message):
        backbone(f"{tmp_path}/{what}")


def test_a_helper_of_the_same_name_from_elsewhere_is_refused(tmp_path: Path) -> None:
    backbone(f"{write_own(tmp_path / 'one', 'twice')}:make")
    with pytest.raises(ValueError, match=r"two/own.py imports own_layers_twice, .* another own_layers_twice before"):
        backbone(f"{write_own(tmp_path / 'two', 'twice')}:make")


def test_a_helper_that_changed_since_it_was_loaded_is_refused(tmp_path: Path) -> None:
    path = write_own(tmp_path, "changed")
    backbone(f"{path}:make")
    (tmp_path / "own_layers_changed.py").write_text(LAYERS.replace("relu", "tanh"))
    with pytest.raises(ValueError, match=r"own_layers_changed.py has changed since Python loaded it"):
        backbone(f"{path}:make")


def test_a_function_that_fails_is_named(tmp_path: Path) -> None:
    path = tmp_path / "broken.py"
    path.write_text("def make():\n    return 1 / 0\n")
    with pytest.raises(ModelError, match=r"broken.py:make failed with ZeroDivisionError: division by zero"):
        backbone(f"{path}:make")
