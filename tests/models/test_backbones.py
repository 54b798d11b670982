from __future__ import annotations

import re
from collections.abc import Callable
from fnmatch import fnmatchcase
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torchvision
from support.own_files import write_own
from support.tiny import Net
from torch import Tensor, nn

from featstore import FeatureStoreError, ModelError, StagedModel, View, WeightsError, backbone, backbone_names
from featstore.digest import Json
from featstore.models import backbones
from featstore.models.backbones import about, architecture, outline, restored, weight_names
from featstore.models.modes import random_states, seeded
from featstore.models.runs import Run, new_run, read_run, write_run


def resnet18(classes: int = 1000) -> dict[str, Tensor]:
    """A state dict of torchvision's own resnet18, whose tensors are not to be written to."""
    return dict(_drawn(classes))


@cache
def _drawn(classes: int) -> dict[str, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return dict(torchvision.models.resnet18(weights=None, num_classes=classes).state_dict())


def images(size: int = 32) -> Tensor:
    return torch.randn((2, 3, size, size), generator=torch.Generator().manual_seed(0))


# --------------------------------------------------------------------------------------------------------------- names


def test_an_unknown_name_is_refused_with_the_names() -> None:
    for ask in (backbone, outline):
        with pytest.raises(ValueError, match=r"'resnet19' is no backbone. Expected resnet18, "):
            ask("resnet19")


def test_unknown_weights_are_refused_with_the_names() -> None:
    with pytest.raises(ValueError, match=r"'V9' are no weights of resnet50. Expected DEFAULT, IMAGENET1K_V2, .*, none"):
        backbone("resnet50", "V9")


def test_a_class_or_function_makes_the_module_as_one_in_a_file_does() -> None:
    before = torch.get_rng_state()
    models = [backbone(make) for make in (Net, partial(Net, stride=2), lambda: Net())]
    assert torch.equal(torch.get_rng_state(), before)
    assert len({tuple(model.digests().values()) for model in models}) == 1
    assert not models[0].training
    with pytest.raises(ModelError, match=r"Linear\(\) failed with TypeError: .*hand it over"):
        backbone(nn.Linear)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"dict\(\) made a dict; expected an nn.Module or a StagedModel"):
        backbone(dict)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"A OrderedDict is no torch.nn.Module, which is expected"):
        backbone(Net().state_dict())  # type: ignore[arg-type]


def test_making_a_backbone_leaves_the_random_states_alone() -> None:
    states = random_states()
    backbone("squeezenet1_1", "none")
    outline("vit_b_32")
    assert random_states() == states


class TinyLibrary:
    """All that another library of backbones needs."""

    def knows(self, name: str) -> bool:
        return name in self.names()

    def names(self, pattern: str | None = None) -> list[str]:
        return [name for name in ("tiny/one", "tiny/two") if fnmatchcase(name, pattern or "*")]

    def weight_names(self, name: str) -> list[str]:
        return ["ones"]

    def about(self, name: str) -> dict[str, Json]:
        return {"family": "tiny", "size": 4, "parameters": 146}

    def outline(self, name: str) -> StagedModel:
        with torch.device("meta"):
            return self.staged(name, "none", channels=4)

    def initial(self, name: str, **architecture: Any) -> StagedModel:
        with seeded():
            return self.staged(name, "none", **{"channels": 4, **architecture})

    def pretrained(self, name: str, weights: str) -> StagedModel:
        model = self.staged(name, weights, channels=4)
        model.load_tensors({key: torch.ones_like(tensor) for key, tensor in model.tensors().items()})
        return model

    def class_names(self, name: str, weights: str) -> tuple[str, ...]:
        return ("cat", "dog")

    def staged(self, name: str, weights: str, channels: int) -> StagedModel:
        module = nn.Sequential(nn.Conv2d(3, channels, 3), nn.ReLU(), nn.Flatten(), nn.Linear(channels * 4, 2)).eval()
        facts = {"name": name, "channels": channels}
        origin = {"backbone": name, "weights": weights, "architecture": facts}
        return StagedModel.from_module(module, view=View(size=4, resize=4), name=name, origin=origin)


def test_another_library_needs_these_functions_and_its_place_in_the_list(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library: backbones.Library = TinyLibrary()
    monkeypatch.setitem(backbones.LIBRARIES, "tiny", library)
    assert backbone_names()[-2:] == ["tiny/one", "tiny/two"]
    assert weight_names("tiny/one") == ["ones"]
    assert about("tiny/one") == {
        "name": "tiny/one",
        "family": "tiny",
        "size": 4,
        "parameters": 146,
        "weights": ["ones"],
    }
    assert outline("tiny/one").shape("1") == (4, 2, 2)
    model = backbone("tiny/two", "none")
    assert model.digests() == backbone("tiny/two", "none").digests()
    assert all((tensor == 1).all() for tensor in backbone("tiny/two").tensors().values())
    with pytest.raises(ValueError, match=r"'twos' are no weights of tiny/two. Expected DEFAULT, ones, none, or a file"):
        backbone("tiny/two", "twos")
    torch.save(model.tensors(), tmp_path / "weights.pth")
    assert backbone("tiny/two", tmp_path / "weights.pth").digests() == model.digests()
    wide = architecture({"name": "tiny/two", "channels": 5}, tmp_path / "run")
    again = backbone(str(save(wide, tmp_path / "tuned", "1")))
    assert (again.shape("1"), again.digest("1")) == ((5, 2, 2), wide.digest("1"))


class NamingLibrary(TinyLibrary):
    """It knows more of names than it must: torchvision's squeezenet1_1 passes for one of its networks."""

    def unlisted(self) -> str | None:
        return "there are others"

    def also_called(self, name: str) -> list[str]:
        return [f"tiny/{name}"] if f"tiny/{name}" in self.names() else []

    def twins(self, name: str) -> list[str]:
        return {"tiny/one": ["squeezenet1_1"], "squeezenet1_1": ["tiny/one"]}.get(name, [])

    def made_by(self, name: str) -> str:
        return f"tiny.make({name!r})"


def test_another_library_may_have_a_say_in_what_is_said_of_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(backbones.LIBRARIES, "tiny", NamingLibrary())
    assert backbones.unlisted()[-1] == "there are others"
    with pytest.raises(ValueError, match=r"'one' is no backbone. Expected tiny/one, "):
        backbone("one")
    one, theirs = backbone("tiny/one", "none"), backbone("squeezenet1_1", "none")
    torch.save(one.tensors(), tmp_path / "one.pth")
    torch.save(theirs.tensors(), tmp_path / "theirs.pth")
    torch.save({f"{name}.value": value for name, value in one.tensors().items()}, tmp_path / "renamed.pth")
    with pytest.raises(WeightsError, match=r"torchvision's names \(.*\), not tiny's: they fit squeezenet1_1. Give"):
        backbone("tiny/one", tmp_path / "theirs.pth")
    with pytest.raises(WeightsError, match=r"tiny's names \(.*\), not torchvision's: they fit tiny/one. Give"):
        backbone("squeezenet1_1", tmp_path / "one.pth")
    with pytest.raises(WeightsError, match=r"where module is tiny.make\('tiny/one'\) and tensors is"):
        backbone("tiny/one", tmp_path / "renamed.pth")


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


def test_a_file_fits_the_function_whose_module_was_saved_also_with_parameters_that_are_not_used(tmp_path: Path) -> None:
    path = write_own(tmp_path, "unused")
    model = backbone(f"{path}:staged")
    assert model.unused == {"0.mask"}
    state = {**{name: tensor + 1 for name, tensor in model.tensors().items()}, "0.mask": torch.zeros(4)}
    torch.save(state, tmp_path / "weights.pth")
    loaded = backbone(f"{path}:staged", tmp_path / "weights.pth")
    assert loaded.default_cut == model.default_cut == "0"
    assert torch.equal(loaded.tensors()["0.conv.bias"], model.tensors()["0.conv.bias"] + 1)


class Shared(nn.Module):
    """A layer under two names, as timm's CoaT has many."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)
        self.again = self.stem

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.again(images).relu().mean((2, 3)))
        return logits


def test_a_file_may_have_either_name_of_a_layer_that_has_two(tmp_path: Path) -> None:
    module = Shared()
    safetensors.torch.save_model(module, str(tmp_path / "one.safetensors"))  # which leaves one of the names out
    torch.save(module.state_dict(), tmp_path / "both.pth")
    assert "again.weight" in safetensors.torch.load_file(tmp_path / "one.safetensors")
    for file in ("one.safetensors", "both.pth"):
        model = backbone(Shared(), tmp_path / file)
        assert model.digests() == StagedModel.from_module(module).digests()
        assert [note for note in model.notes if "not used" in note] == []
    assert (model.other_names, model.unused) == (
        {"again.weight": "stem.weight", "again.bias": "stem.bias"},
        frozenset(),
    )


def test_a_file_with_two_values_for_one_layer_is_refused(tmp_path: Path) -> None:
    tensors = Shared().state_dict()
    torch.save({**tensors, "again.bias": tensors["stem.bias"] + 1}, tmp_path / "torn.pth")
    with pytest.raises(
        WeightsError, match=r"stem.bias and again.bias differ, and are one tensor of the network\. Give"
    ):
        backbone(Shared(), tmp_path / "torn.pth")


@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_file_that_only_holds_nan_is_not_said_to_have_other_names(prefix: str, tmp_path: Path) -> None:
    tensors = {f"{prefix}{name}": tensor * torch.nan for name, tensor in Net().state_dict().items()}
    torch.save(tensors, tmp_path / "diverged.pth")
    with pytest.raises(WeightsError, match=r"holds NaN, expected numbers"):
        backbone(Net(), tmp_path / "diverged.pth")


class Tied(nn.Module):
    """One parameter of two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.next, self.head = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), nn.Linear(3, 2)
        self.next.weight = self.stem.weight

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.next(self.stem(images).relu()).mean((2, 3)))
        return logits


def test_a_file_may_have_either_name_of_a_tied_parameter_and_no_two_values(tmp_path: Path) -> None:
    module = Tied()
    for name in ("stem.weight", "next.weight"):
        torch.save({key: value for key, value in module.state_dict().items() if key != name}, tmp_path / "one.pth")
        assert backbone(Tied(), tmp_path / "one.pth").digests() == StagedModel.from_module(module).digests()
    torch.save({**module.state_dict(), "stem.weight": torch.ones(3, 3, 1, 1)}, tmp_path / "torn.pth")
    with pytest.raises(WeightsError, match=r"stem.weight and next.weight differ, and are one tensor"):
        backbone(Tied(), tmp_path / "torn.pth")


def test_a_network_of_another_size_than_usual_takes_a_file_where_the_cut_is_named(tmp_path: Path) -> None:
    path = write_own(tmp_path, "size")
    torch.save(backbone(f"{path}:make").tensors(), tmp_path / "weights.pth")
    assert backbone(f"{path}:make", tmp_path / "weights.pth", cut="0").cut_points == ["0.conv", "0", "1", "2"]
    with pytest.raises(ModelError, match="own can't take images of 224 x 224 pixels: its stage 2 fails"):
        backbone(f"{path}:make", tmp_path / "weights.pth")


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
    named = {"backbone": str(folder), "run": str(folder.absolute()), "run_identity": read_run(folder).identity}
    assert again.origin == {**named, "architecture": model.origin["architecture"]}
    with pytest.raises(ValueError, match=r"is a saved run, which brings its own weights; leave out --weights x.pth"):
        backbone(str(folder), "x.pth")


def test_a_run_whose_source_has_changed_is_refused(tmp_path: Path) -> None:
    path = write_own(tmp_path, "source")
    folder = save(backbone(f"{path}:make"), tmp_path / "tuned", "0")
    path.write_text("# a comment does not matter\n" + path.read_text())
    backbone(str(folder))
    path.write_text(path.read_text().replace("nn.Flatten()", "nn.Flatten(), nn.ReLU()"))
    with pytest.raises(
        FeatureStoreError, match=r"own.py, or a module beside it .* has changed since the run was saved"
    ):
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
