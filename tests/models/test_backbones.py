from __future__ import annotations

import random
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import torchvision
from torch import Tensor, nn

from featstore import FeatureStoreError, ModelError, StagedModel, View, WeightsError, backbone, backbone_names
from featstore.models.backbones import architecture, outline, restored, weight_names
from featstore.models.graph import random_states
from featstore.models.runs import Run, new_run, read_run, write_run


def resnet18(classes: int = 1000) -> dict[str, Tensor]:
    """A state dict of torchvision's own resnet18, drawn anew."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return dict(torchvision.models.resnet18(weights=None, num_classes=classes).state_dict())


def images(size: int = 32) -> Tensor:
    return torch.randn((2, 3, size, size), generator=torch.Generator().manual_seed(0))


# --------------------------------------------------------------------------------------------------------------- names


def test_every_name_has_an_outline_with_cuts_and_shapes() -> None:
    for name in backbone_names():
        model = outline(name)
        assert model.name == name
        assert len(model.cut_points) > 20
        assert all(model.shape(cut) for cut in model.cut_points)
        expected = "layer4" if name.startswith("resnet") else "features.12" if "squeeze" in name else "encoder.ln"
        assert model.default_cut == expected


def test_an_unknown_name_is_refused_with_the_names() -> None:
    for ask in (backbone, outline):
        with pytest.raises(ValueError, match=r"'resnet19' is no backbone. Expected one of resnet18, resnet34"):
            ask("resnet19")


def test_weight_names_are_torchvisions_with_the_default_first() -> None:
    assert weight_names("resnet50") == ["IMAGENET1K_V2", "IMAGENET1K_V1"]
    assert "IMAGENET1K_SWAG_E2E_V1" in weight_names("vit_b_16")


def test_unknown_weights_are_refused_with_the_names() -> None:
    with pytest.raises(ValueError, match=r"'V9' are no weights of resnet50. Expected DEFAULT, IMAGENET1K_V2, .*, none"):
        backbone("resnet50", "V9")


def test_without_network_the_sentence_names_the_file_its_folder_and_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    with pytest.raises(WeightsError) as error:
        backbone("resnet18")
    message = str(error.value)
    assert message.startswith("The weights IMAGENET1K_V1 of resnet18 aren't here and can't be downloaded (")
    assert f"the file resnet18-f37072fd.pth, which belongs into {tmp_path / 'checkpoints'}." in message
    assert "m.get_model('resnet18', weights='IMAGENET1K_V1')" in message
    assert "--weights none" in message


def test_weights_in_the_cache_are_used_with_their_own_view(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    file = Path(torchvision.models.ResNet18_Weights.DEFAULT.url).name
    torch.save(resnet18(), tmp_path / "checkpoints" / file)
    model = backbone("resnet18", "DEFAULT")
    assert torch.equal(model.tensors()["conv1.weight"], resnet18()["conv1.weight"])
    assert (model.view.size, model.view.resize, model.view.antialias) == (224, 256, True)
    assert model.origin == {"backbone": "resnet18", "weights": "DEFAULT", "architecture": {"name": "resnet18"}}


def test_weights_none_are_the_same_every_time_whatever_was_drawn_before() -> None:
    first = backbone("squeezenet1_1", "none")
    states = random_states()
    torch.rand(3)
    second = backbone("squeezenet1_1", "none")
    assert first.digests() == second.digests()
    torch.manual_seed(0)
    module = torchvision.models.squeezenet1_1(weights=None).eval()
    assert torch.equal(module(images()), first(images()))
    assert random_states() != states


def test_making_a_backbone_leaves_the_random_states_alone() -> None:
    states = random_states()
    backbone("squeezenet1_1", "none")
    outline("vit_b_32")
    assert random_states() == states


def test_a_vit_takes_one_size_and_has_a_class_token() -> None:
    model = outline("vit_b_32")
    assert (model.fixed_size, model.class_tokens, model.view.size) == (224, 1, 224)
    assert outline("resnet18").fixed_size is None


def test_a_vit_of_another_size_can_be_built_again_from_its_facts() -> None:
    model = architecture({"name": "vit_b_32", "image_size": 64})
    assert (model.fixed_size, model.view.size) == (64, 64)
    assert model.origin["architecture"] == {"name": "vit_b_32", "image_size": 64}
    assert model.shape("encoder.ln") == (5, 768)


# --------------------------------------------------------------------------------------------------------------- files


def no_notes(tensors: dict[str, Tensor]) -> Any:
    return tensors


@pytest.mark.parametrize(
    ("suffix", "wrap"),
    [
        (".pth", no_notes),
        (".ckpt", lambda tensors: {"state_dict": {f"model.{name}": tensor for name, tensor in tensors.items()}}),
        (".pt", lambda tensors: {"model": {f"module.{name}": tensor for name, tensor in tensors.items()}, "epoch": 37}),
        (".bin", lambda tensors: {f"_orig_mod.{name}": tensor for name, tensor in tensors.items()}),
        (".safetensors", no_notes),
    ],
)
def test_a_checkpoint_of_ones_own_gives_its_weights(
    suffix: str, wrap: Callable[[dict[str, Tensor]], Any], tmp_path: Path
) -> None:
    path = tmp_path / f"ep37{suffix}"
    if suffix == ".safetensors":
        safetensors.torch.save_file(resnet18(), path)
    else:
        torch.save(wrap(resnet18()), path)
    model = backbone("resnet18", path)
    module = torchvision.models.resnet18(weights=None).eval()
    module.load_state_dict(resnet18())
    assert torch.equal(model(images()), module(images()))
    assert model.origin["weights"] == str(path)
    assert model.notes == (
        "a weights file carries no preprocessing: 256/224 and ImageNet's mean assumed; "
        "--resize --size --mean --std --interpolation",
    )


def test_a_head_of_other_classes_is_not_used_and_the_default_cut_stays(tmp_path: Path) -> None:
    path = tmp_path / "ep37.pth"
    torch.save(resnet18(37), path)
    model = backbone("resnet18", path)
    assert model.notes[:2] == ("fc.weight has 37 rows: not used", "fc.bias has 37 rows: not used")
    assert model.cut_points[-1] == "flatten"
    assert model.default_cut == "layer4"
    full = backbone(torchvision.models.resnet18(weights=None, num_classes=37))
    full.load_tensors(resnet18(37))
    assert model.digest("layer4") == full.digest("layer4")


def test_weights_that_do_not_fit_are_refused_with_the_first_few_names(tmp_path: Path) -> None:
    path = tmp_path / "ep37.pth"
    torch.save({name: tensor for name, tensor in resnet18().items() if "layer2.0.conv1" not in name}, path)
    with pytest.raises(WeightsError, match=r"don't fit resnet18: layer2.0.conv1.weight is missing. Give the backbone"):
        backbone("resnet18", path)
    with pytest.raises(WeightsError, match=r"layer1.0.conv1.weight is 64x64x3x3, expected 64x64x1x1; .* and .* more"):
        backbone("resnet50", path)


def test_only_what_lies_up_to_the_cut_must_fit(tmp_path: Path) -> None:
    path = tmp_path / "ep37.pth"
    torch.save({name: tensor for name, tensor in resnet18().items() if not name.startswith("layer3.1")}, path)
    model = backbone("resnet18", path, cut="layer2")
    assert "layer3.0" in model.cut_points
    assert "layer3" not in model.cut_points
    with pytest.raises(WeightsError, match=r"layer3.1"):
        backbone("resnet18", path)


def test_a_deeper_networks_weights_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "resnet34.pth"
    torch.save(torchvision.models.resnet34(weights=None).state_dict(), path)
    with pytest.raises(WeightsError, match=r"layer1.2.conv1.weight is unknown to resnet18; .* more"):
        backbone("resnet18", path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"There is no weights file .*ep38.pth"):
        backbone("resnet18", tmp_path / "ep38.pth")
    with pytest.raises(WeightsError, match=r"There is no weights file ep38.pth"):
        backbone("resnet18", "ep38.pth")


def test_a_file_does_not_change_the_module_it_is_given_for(tmp_path: Path) -> None:
    path = tmp_path / "ep37.pth"
    torch.save(resnet18(), path)
    module = torchvision.models.resnet18(weights=None).eval()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    model = backbone(module, path)
    assert torch.equal(model.tensors()["conv1.weight"], resnet18()["conv1.weight"])
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    assert backbone(module, "none").digests() == StagedModel.from_module(module).digests()


# ------------------------------------------------------------------------------------------------------- own functions

OWN = """
import random
import numpy as np
import torch
from torch import nn
from own_layers_{tag} import Block

def make():
    return nn.Sequential(Block(), nn.Flatten(), nn.Linear(4 * 14 * 14, 2))

def staged():
    from featstore import StagedModel, View
    return StagedModel.from_module(make(), view=View(size=16, resize=16), name="mine")

def drawn():
    conv = nn.Conv2d(3, 4, 3)
    conv.bias.data[:] = torch.tensor([random.random(), np.random.rand(), 0.0, 0.0])
    return nn.Sequential(conv, nn.ReLU())

def number():
    return 7
"""
LAYERS = """
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.mask = nn.Parameter(self.conv.bias.detach() * 0)

    def forward(self, x):
        return self.conv(x).relu()
"""


def write_own(folder: Path, tag: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / f"own_layers_{tag}.py").write_text(LAYERS)
    path = folder / "own.py"
    path.write_text(OWN.format(tag=tag))
    return path


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
    assert made_by == {"file": str(path), "function": "make", "source": made_by["source"]}
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


def test_a_file_fits_the_function_whose_module_was_saved_also_with_parameters_that_are_not_used(tmp_path: Path) -> None:
    path = write_own(tmp_path, "unused")
    model = backbone(f"{path}:staged")
    assert model.unused == {"0.mask"}
    state = {**{name: tensor + 1 for name, tensor in model.tensors().items()}, "0.mask": torch.zeros(4)}
    torch.save(state, tmp_path / "weights.pth")
    loaded = backbone(f"{path}:staged", tmp_path / "weights.pth")
    assert loaded.default_cut == model.default_cut == "0"
    assert torch.equal(loaded.tensors()["0.conv.bias"], model.tensors()["0.conv.bias"] + 1)


def test_a_network_of_another_size_than_usual_takes_a_file_where_the_cut_is_named(tmp_path: Path) -> None:
    path = write_own(tmp_path, "size")
    torch.save(backbone(f"{path}:make").tensors(), tmp_path / "weights.pth")
    assert backbone(f"{path}:make", tmp_path / "weights.pth", cut="0").cut_points == ["0.conv", "0", "1", "2"]
    with pytest.raises(ModelError, match="own can't take images of 224 x 224 pixels: its stage 2 fails"):
        backbone(f"{path}:make", tmp_path / "weights.pth")


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


# ---------------------------------------------------------------------------------------------------------- saved runs


def save(model: StagedModel, folder: Path, cut: str) -> Path:
    facts = {
        "architecture": model.origin.get("architecture"),
        "cut": cut,
        "default_cut": cut,
        "digests": model.up_to(cut).digests(),
        "view": model.view.facts(),
    }
    with new_run(folder) as made:
        write_run(made, {"model": facts}, model.tensors())
    return folder


def test_a_saved_run_is_a_backbone(tmp_path: Path) -> None:
    path = write_own(tmp_path, "run")
    model = backbone(f"{path}:staged")
    model.load_tensors({name: tensor + 1 for name, tensor in model.tensors().items()})
    folder = save(model, tmp_path / "tuned", "0")
    again = backbone(str(folder))
    assert again.digest("0") == model.digest("0")
    assert (again.view, again.default_cut, again.cut_points) == (model.view, "0", ["0.conv", "0"])
    named = {"backbone": str(folder), "run": str(folder.absolute())}
    assert again.origin == {**named, "architecture": model.origin["architecture"]}
    with pytest.raises(ValueError, match=r"is a saved run, which brings its own weights; leave out --weights x.pth"):
        backbone(str(folder), "x.pth")


def test_a_run_whose_source_has_changed_is_refused(tmp_path: Path) -> None:
    path = write_own(tmp_path, "source")
    folder = save(backbone(f"{path}:make"), tmp_path / "tuned", "0")
    path.write_text("# a comment does not matter\n" + path.read_text())
    backbone(str(folder))
    path.write_text(path.read_text().replace("nn.Flatten()", "nn.Flatten(), nn.ReLU()"))
    with pytest.raises(FeatureStoreError, match=r"own.py has changed since the run was saved"):
        backbone(str(folder))


def test_a_run_of_a_module_without_a_name_is_refused_with_what_to_do(tmp_path: Path) -> None:
    model = StagedModel.from_module(nn.Sequential(nn.Conv2d(3, 2, 1), nn.ReLU()))
    folder = save(model, tmp_path / "tuned", "0")
    with pytest.raises(FeatureStoreError, match=r"Learner.load\(.*tuned\", module=...\)"):
        backbone(str(folder))
    run = read_run(folder)
    assert restored(model, run).digest("0") == model.digest("0")


def test_tensors_of_another_model_than_was_saved_are_refused() -> None:
    model = StagedModel.from_module(nn.Sequential(nn.Conv2d(3, 2, 1), nn.ReLU()))
    facts = {"cut": "1", "default_cut": "0", "digests": model.digests(), "view": model.view.facts()}
    other = {name: tensor + 1 for name, tensor in model.tensors().items()}
    with pytest.raises(WeightsError, match="don't give the model that was saved"):
        restored(model, Run({"model": facts}, other))
    with pytest.raises(WeightsError, match=re.escape("lacks the tensors 0.bias of sequential")):
        restored(model, Run({"model": facts}, {"0.weight": other["0.weight"]}))


def test_a_function_that_fails_is_named(tmp_path: Path) -> None:
    path = tmp_path / "broken.py"
    path.write_text("def make():\n    return 1 / 0\n")
    with pytest.raises(ModelError, match=r"broken.py:make failed with ZeroDivisionError: division by zero"):
        backbone(f"{path}:make")
