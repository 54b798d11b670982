from __future__ import annotations

import copy
from functools import cache
from pathlib import Path

import pytest
import torch
import torchvision
from support.cuts import described_cuts, golden_cuts
from support.small_networks import SMALL, small
from torch import Tensor

from featstore import StagedModel, WeightsError, backbone
from featstore.models import torchvision_models
from featstore.models.backbones import architecture, outline, weight_names
from featstore.models.modes import random_states
from featstore.models.torchvision_models import FAMILIES


def resnet18() -> dict[str, Tensor]:
    """A state dict of torchvision's own resnet18, drawn anew."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return dict(torchvision.models.resnet18(weights=None).state_dict())


DEFAULT_CUTS = {
    "resnet18": ("layer4", "NCHW", (512, 7, 7)),
    "resnext50_32x4d": ("layer4", "NCHW", (2048, 7, 7)),
    "wide_resnet50_2": ("layer4", "NCHW", (2048, 7, 7)),
    "alexnet": ("features.12", "NCHW", (256, 6, 6)),
    "vgg11": ("features.20", "NCHW", (512, 7, 7)),
    "vgg11_bn": ("features.28", "NCHW", (512, 7, 7)),
    "squeezenet1_0": ("features.12", "NCHW", (512, 13, 13)),
    "densenet121": ("relu", "NCHW", (1024, 7, 7)),
    "googlenet": ("inception5b", "NCHW", (1024, 7, 7)),
    "inception_v3": ("Mixed_7c", "NCHW", (2048, 8, 8)),
    "mobilenet_v2": ("features.18", "NCHW", (1280, 7, 7)),
    "mobilenet_v3_small": ("features.12", "NCHW", (576, 7, 7)),
    "mnasnet0_5": ("layers.16", "NCHW", (1280, 7, 7)),
    "shufflenet_v2_x0_5": ("conv5", "NCHW", (1024, 7, 7)),
    "efficientnet_b0": ("features.8", "NCHW", (1280, 7, 7)),
    "efficientnet_v2_s": ("features.7", "NCHW", (1280, 12, 12)),
    "regnet_x_400mf": ("trunk_output.block4", "NCHW", (400, 7, 7)),
    "regnet_y_800mf": ("trunk_output.block4", "NCHW", (784, 7, 7)),
    "convnext_tiny": ("features.7", "NCHW", (768, 7, 7)),
    "vit_b_32": ("encoder.ln", "NLC", (50, 768)),
    "swin_t": ("permute", "NCHW", (768, 7, 7)),
    "swin_v2_t": ("permute", "NCHW", (768, 8, 8)),
    "maxvit_t": ("blocks.3", "NCHW", (512, 7, 7)),
}
"""A member of each family -> its default cut there, the layout and the shape, at its weights' own size."""

CUTS = golden_cuts()


def test_the_names_are_those_of_torchvisions_classification_models_each_in_one_family() -> None:
    assert sorted(torchvision_models.names()) == torchvision.models.list_models(module=torchvision.models)
    families = [next(family for family in FAMILIES if name in family.names) for name in DEFAULT_CUTS]
    assert {id(family) for family in families} == {id(family) for family in FAMILIES}


@cache
def outlined(name: str) -> StagedModel:
    return outline(name)


@pytest.mark.parametrize("name", DEFAULT_CUTS)
def test_a_member_of_each_family_is_cut_before_its_own_pooling(name: str) -> None:
    model = outlined(name)
    cut = model.default_cut
    assert (model.name, cut, model.layout(cut), model.shape(cut)) == (name, *DEFAULT_CUTS[name])
    assert described_cuts(model) == CUTS[name]
    assert {tensor.device.type for tensor in model.tensors().values()} == {"meta"}


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in torchvision_models.names() if name not in DEFAULT_CUTS])
def test_every_other_member_is_cut_as_its_family_is(name: str) -> None:
    model = outline(name)
    family = next(family for family in FAMILIES if name in family.names)
    (known,) = [DEFAULT_CUTS[other] for other in DEFAULT_CUTS if other in family.names][:1]
    cut = model.default_cut
    assert cut.rstrip("0123456789") == known[0].rstrip("0123456789")
    assert (model.layout(cut), len(model.shape(cut))) == (known[1], len(known[2]))
    assert described_cuts(model) == CUTS[name]


def test_the_golden_list_has_every_backbone_with_more_than_twenty_cuts() -> None:
    listed = [name for name in CUTS if not name.startswith("timm:")]
    assert listed == torchvision_models.names()
    assert all(len(CUTS[name]) > 20 for name in listed)


@pytest.mark.parametrize(
    ("name", "block", "number"),
    [
        ("convnext_tiny", "CNBlock", 18),
        ("vit_b_32", "EncoderBlock", 12),
        ("swin_t", "SwinTransformerBlock", 12),
        ("swin_v2_t", "SwinTransformerBlockV2", 12),
    ],
)
def test_each_block_of_a_transformer_and_of_convnext_ends_in_a_cut(name: str, block: str, number: int) -> None:
    with torch.device("meta"):
        module = torchvision.models.get_model(name, weights=None)
    blocks = [path for path, part in module.named_modules() if type(part).__name__ == block]
    assert len({outlined(name).canonical(path) for path in blocks}) == len(blocks) == number


@pytest.mark.parametrize(
    ("name", "layouts"),
    [
        (
            "swin_t",
            {"features.0.0": "NCHW", "features.0": "NHWC", "features.2._patch_merging_pad": "NHWC", "norm": "NHWC"},
        ),
        ("convnext_tiny", {"features.0.1.layer_norm": "NHWC", "features.0": "NCHW", "classifier.0": "NCHW"}),
        (
            "maxvit_t",
            {
                "blocks.0.layers.0.layers.grid_attention.partition_op": "other",  # 49 x 64 x 64
                "blocks.0.layers.0.layers.window_attention.add_1": "other",
                "blocks.0.layers.0.layers.window_attention": "NCHW",
            },
        ),
    ],
)
def test_maps_with_channels_last_and_windows_of_tokens_are_told_from_maps(name: str, layouts: dict[str, str]) -> None:
    model = outlined(name)
    assert {cut: model.layout(cut) for cut in layouts} == layouts


@pytest.mark.parametrize(
    ("name", "size", "own"),
    [
        ("alexnet", 64, None),
        ("densenet121", 64, "adaptive_avg_pool2d"),
        ("googlenet", 64, "avgpool"),
        ("mobilenet_v3_small", 64, "avgpool"),
        ("mnasnet0_5", 64, "mean"),
        ("shufflenet_v2_x0_5", 64, "mean"),
        ("regnet_x_400mf", 64, "avgpool"),
        ("convnext_tiny", 64, "avgpool"),
        ("swin_t", 64, "avgpool"),
        *(
            pytest.param(name, size, own, marks=pytest.mark.slow)
            for name, size, own in (
                *((name, 32, "avgpool") for name in ("resnet18", "resnext50_32x4d", "wide_resnet50_2")),
                *((name, 64, "avgpool") for name in ("efficientnet_b0", "efficientnet_v2_s", "regnet_y_400mf")),
                *(("inception_v3", 80, "avgpool"), ("mobilenet_v2", 64, "adaptive_avg_pool2d")),
                *(("swin_v2_t", 64, "avgpool"), ("maxvit_t", 224, "classifier.0")),
            )
        ),
    ],
)
def test_the_average_at_the_default_cut_is_what_the_network_pools_itself(name: str, size: int, own: str | None) -> None:
    model = small(name, size) if name in SMALL else backbone(name, "none")
    images = torch.randn((2, 3, size, size), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        taken = model.activations(images, [model.default_cut, *filter(None, [own])])
        pooled = model.pool(model.default_cut, "avg")(taken[model.default_cut])
    if own is None:  # a network that pools to 6 x 6
        assert pooled.shape == (2, 256)
        return
    torch.testing.assert_close(pooled, taken[own].flatten(1), rtol=1e-6, atol=1e-7)


# ------------------------------------------------------------------------------------------------ auxiliary classifiers


@pytest.mark.parametrize(("name", "size", "aux"), [("inception_v3", 80, "AuxLogits"), ("googlenet", 32, "aux1, aux2")])
def test_an_auxiliary_classifier_is_left_out_said_and_changes_nothing_else(name: str, size: int, aux: str) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = torchvision.models.get_model(name, weights=None, init_weights=False, aux_logits=True, dropout=0.0)
    model = StagedModel.from_module(copy.deepcopy(module))
    assert model.notes == (
        f"{aux}: left out, as it makes a further output in train mode alone (an auxiliary classifier); a fit has no "
        "loss for it",
    )
    assert {each.split(".")[0] for each in model.unused} == set(aux.split(", "))
    images = torch.randn((4, 3, size, size), generator=torch.Generator().manual_seed(0))
    assert torch.equal(model.eval()(images), module.eval()(images))
    module.train()
    size_of_auxiliaries = {"inception_v3": 299, "googlenet": 224}[name]
    model.train()
    large = torch.randn((2, 3, size_of_auxiliaries, size_of_auxiliaries), generator=torch.Generator().manual_seed(1))
    assert torch.equal(model(large), module(large).logits)
    statistics = dict(module.named_buffers())
    assert all(torch.equal(value, statistics[each]) for each, value in model.tensors().items() if each in statistics)


def test_a_weights_file_with_auxiliary_classifiers_fits_and_its_input_is_transformed_as_in_the_weights(
    tmp_path: Path,
) -> None:
    module = torchvision.models.get_model("googlenet", weights=None, init_weights=False, aux_logits=True)
    torch.save(module.state_dict(), tmp_path / "own.pth")
    model = backbone("googlenet", tmp_path / "own.pth")
    assert [note for note in model.notes if "not used" in note] == []
    assert model.origin["architecture"] == {"name": "googlenet", "transform_input": False}
    again = architecture({"name": "googlenet", "transform_input": True}, tmp_path)
    assert again.digest("conv1") != architecture({"name": "googlenet", "transform_input": False}, tmp_path).digest(
        "conv1"
    )


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


def test_a_vits_patches_have_no_class_token_before_it_joins_them() -> None:
    model = outline("vit_b_32")
    assert (model.patch_cuts, model.layout("reshape")) == (frozenset({"permute"}), "NCL")
    assert (model.tokens("permute"), model.pool("permute").reduction) == ((0, 0), "concat")
    assert (model.tokens("encoder.ln"), model.pool("encoder.ln").reduction) == ((1, 1), "token")


def test_a_vit_of_another_size_can_be_built_again_from_its_facts() -> None:
    model = architecture({"name": "vit_b_32", "image_size": 64}, Path("run"))
    assert (model.fixed_size, model.view.size) == (64, 64)
    assert model.origin["architecture"] == {"name": "vit_b_32", "image_size": 64}
    assert model.shape("encoder.ln") == (5, 768)
