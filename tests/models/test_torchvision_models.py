from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torchvision
from torch import Tensor

from featstore import WeightsError, backbone, backbone_names
from featstore.models.backbones import architecture, outline, weight_names
from featstore.models.modes import random_states


def resnet18() -> dict[str, Tensor]:
    """A state dict of torchvision's own resnet18, drawn anew."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return dict(torchvision.models.resnet18(weights=None).state_dict())


def test_every_name_has_an_outline_with_cuts_and_shapes() -> None:
    for name in backbone_names():
        model = outline(name)
        assert model.name == name
        assert len(model.cut_points) > 20
        assert all(model.shape(cut) for cut in model.cut_points)
        expected = "layer4" if name.startswith("resnet") else "features.12" if "squeeze" in name else "encoder.ln"
        assert model.default_cut == expected


def test_weight_names_are_torchvisions_with_the_default_first() -> None:
    assert weight_names("resnet50") == ["IMAGENET1K_V2", "IMAGENET1K_V1"]
    assert "IMAGENET1K_SWAG_E2E_V1" in weight_names("vit_b_16")


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
    images = torch.rand((2, 3, 32, 32))
    assert torch.equal(module(images), first(images))
    assert random_states() != states


def test_a_vit_takes_one_size_and_has_a_class_token() -> None:
    model = outline("vit_b_32")
    assert (model.fixed_size, model.class_tokens, model.view.size) == (224, 1, 224)
    assert outline("resnet18").fixed_size is None


def test_a_vit_of_another_size_can_be_built_again_from_its_facts() -> None:
    model = architecture({"name": "vit_b_32", "image_size": 64}, Path("run"))
    assert (model.fixed_size, model.view.size) == (64, 64)
    assert model.origin["architecture"] == {"name": "vit_b_32", "image_size": 64}
    assert model.shape("encoder.ln") == (5, 768)
