"""A model that was exported gives the outputs of the one that was trained, in the program it was exported for."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from safetensors import safe_open
from safetensors.torch import load_file
from support.programs import Run
from support.tiny import SIZE, photos, pixels, staged, vision_transformer
from torch import Tensor, nn

from featstore import FeatureStore, ImageSet, StagedModel, View, backbone, extract
from featstore.errors import FeatureStoreError, ModelError
from training import Learner
from training.choices import EXPORTS

PIXELS = torch.randint(0, 256, (5, 3, SIZE, SIZE), dtype=torch.uint8, generator=torch.Generator().manual_seed(7))
"""None of those that an export compares on."""


def learner(root: Path, model: StagedModel | None = None, **options: Any) -> Learner:
    """One that has been fitted, on images of which some are held out."""
    images = ImageSet.from_folder(photos(root / "photos", 12)).split(valid=0.34, seed=0)
    learn = Learner(model or staged(), images, device="cpu", workers=0, quiet=True, batch_size=4, **options)
    learn.fit(2, lr=1e-2)
    return learn


def logits(learn: Learner, pixels: Tensor) -> Tensor:
    with torch.no_grad():
        values: Tensor = learn.model(learn.view.normalise(pixels))
    return values


def close(found: Tensor, expected: Tensor) -> bool:
    """Within float32's rounding through a few layers: another order of sums moved no logit by a millionth."""
    return torch.allclose(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("head", ["concat", "linear"])
def test_a_pt2_file_gives_the_models_logits_of_any_number_of_uint8_images(tmp_path: Path, head: str) -> None:
    learn = learner(tmp_path, head=head)
    learn.export(tmp_path / "net.pt2")
    extra = {"featstore.json": ""}
    network = torch.export.load(tmp_path / "net.pt2", extra_files=extra).module()
    for count in (1, 5):
        assert close(network(PIXELS[:count]), logits(learn, PIXELS[:count]))
    assert json.loads(extra["featstore.json"])["classes"] == list(learn.classes)


def test_an_onnx_file_gives_the_models_logits_in_onnxruntime(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    learn = learner(tmp_path, head="linear")
    report = learn.export(tmp_path / "net.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx", providers=["CPUExecutionProvider"])
    for count in (1, 5):
        (found,) = session.run(None, {"images": PIXELS[:count].numpy()})
        assert close(torch.from_numpy(found), logits(learn, PIXELS[:count]))
    assert json.loads(session.get_modelmeta().custom_metadata_map["featstore"])["classes"] == list(learn.classes)
    assert report.files == (tmp_path / "net.onnx", tmp_path / "net.onnx.json")


def test_a_transformer_is_exported_too(tmp_path: Path) -> None:
    model = StagedModel.from_module(vision_transformer(num_layers=1), view=View(size=24, resize=24), class_tokens=1)
    learn = learner(tmp_path, model, head="linear")
    learn.export(tmp_path / "net.pt2")
    images = torch.randint(0, 256, (3, 3, 24, 24), dtype=torch.uint8)
    assert close(torch.export.load(tmp_path / "net.pt2").module()(images), logits(learn, images))


@pytest.mark.parametrize("ending", EXPORTS["state-dict"])
def test_torchvision_loads_the_tensors_of_its_network_strictly(tmp_path: Path, ending: str) -> None:
    model = backbone("squeezenet1_1", "none").with_(view=View(size=64, resize=64))
    learn = learner(tmp_path, model, head="linear")
    learn.unfreeze()
    learn.fit(1, lr=1e-4)
    report = learn.export(tmp_path / f"net{ending}", format="state-dict")
    about = json.loads((tmp_path / f"net{ending}.json").read_text())
    read = load_file if ending == ".safetensors" else torch.load
    network = torchvision.models.squeezenet1_1().eval()
    assert about["absent"] == ["classifier.1.bias", "classifier.1.weight"]
    network.classifier = nn.Identity()
    network.load_state_dict(read(tmp_path / f"net{ending}"), strict=True)
    assert (about["backbone"], about["pool"]["reduction"]) == ("squeezenet1_1", "concat")
    assert about["head"]["file"] == f"net.head{ending}"
    head = nn.Linear(1024, 2)
    head.load_state_dict(read(tmp_path / f"net.head{ending}"), strict=True)
    assert report.files == tuple(tmp_path / f"net{each}" for each in (ending, f".head{ending}", f"{ending}.json"))
    images = torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8)
    with torch.no_grad():
        maps = network.features(
            (images / 255 - torch.tensor(learn.view.mean).reshape(-1, 1, 1))
            / torch.tensor(learn.view.std).reshape(-1, 1, 1)
        )
        found = head(torch.cat([maps.amax((2, 3)), maps.mean((2, 3))], 1))
    assert close(found, logits(learn, images))


def test_what_a_user_must_know_stands_beside_and_in_the_file(tmp_path: Path) -> None:
    learn = learner(tmp_path)
    report = learn.export(tmp_path / "net.safetensors")
    about = json.loads((tmp_path / "net.safetensors.json").read_text())
    assert about["view"] == learn.view.facts()
    assert about["preparation"][1:3] == [
        "resize the shorter side to 20 pixels (bilinear, antialiased)",
        "crop the central 16 x 16 pixels",
    ]
    assert (about["classes"], about["task"]) == (list(learn.classes), "single")
    assert about["comparison"] == {
        "on": "4 validation images",
        "largest_difference": report.difference,
        "allowed": report.tolerance,
    }
    with safe_open(tmp_path / "net.safetensors", "pt") as file:
        inside = json.loads(file.metadata()["featstore"])
    assert inside == {name: value for name, value in about.items() if name != "comparison"}


def test_without_images_pixels_are_drawn_and_compared(tmp_path: Path) -> None:
    learn = learner(tmp_path)
    shutil.rmtree(tmp_path / "photos")
    report = learn.export(tmp_path / "net.safetensors")
    assert report.compared == "16 images of random pixels"
    assert report.difference <= report.tolerance < 0.1


def test_numbers_of_regression_are_in_their_units(tmp_path: Path) -> None:
    images = ImageSet.from_arrays(pixels(8), [1000.0 + 50 * place for place in range(8)], task="regression")
    learn = Learner(staged(), images, head="linear", device="cpu", workers=0, quiet=True, batch_size=4)
    learn.fit(2, lr=1e-2)
    learn.export(tmp_path / "net.pt2")
    found = torch.export.load(tmp_path / "net.pt2").module()(PIXELS)
    assert close(found, logits(learn, PIXELS))
    assert json.loads((tmp_path / "net.pt2.json").read_text())["probabilities"].startswith("none")


# ---- Refusals


class Drawing(nn.Linear):
    """A head that adds what it draws outside torch, once it is asked to; a graph holds that as one number."""

    is_drawing = False

    def forward(self, vectors: Tensor) -> Tensor:
        return super().forward(vectors) + (random.random() if self.is_drawing else 0.0)


def test_outputs_that_differ_leave_no_file(tmp_path: Path) -> None:
    learn = learner(tmp_path, head=Drawing(24, 2))
    assert isinstance(learn.model.head, Drawing)
    learn.model.head.is_drawing = True  # from the start such a head would be refused
    before = sorted(tmp_path.iterdir())
    with pytest.raises(FeatureStoreError, match=r"on 4 validation images its outputs differ by up to .*was not kept"):
        learn.export(tmp_path / "net.pt2")
    assert sorted(tmp_path.iterdir()) == before


def test_an_absent_trunk_is_named(tmp_path: Path) -> None:
    model = staged()
    images = ImageSet.from_folder(photos(tmp_path / "photos", 8))
    store = FeatureStore(tmp_path / "features")
    extract(model, images, store, cuts=["layer2"], workers=0, progress=False)
    (found,) = store.sets()
    learn = Learner(store.model(found.key), images, store, head="linear", device="cpu", quiet=True)
    with pytest.raises(FeatureStoreError, match=r"The trunk of net isn't here, .* learn.attach\(model\)"):
        learn.export(tmp_path / "net.pt2")
    learn.attach(model)
    assert learn.export(tmp_path / "net.pt2").difference == 0


def test_files_that_exist_are_kept_unless_they_are_to_be_replaced(tmp_path: Path) -> None:
    learn = learner(tmp_path)
    (tmp_path / "net.head.safetensors").write_text("mine")
    with pytest.raises(FeatureStoreError, match=r"net\.head\.safetensors exists already.*--overwrite"):
        learn.export(tmp_path / "net.safetensors")
    assert (tmp_path / "net.head.safetensors").read_text() == "mine"
    assert not (tmp_path / "net.safetensors").exists()
    learn.export(tmp_path / "net.safetensors", overwrite=True)
    assert set(load_file(tmp_path / "net.head.safetensors")) == set(learn.model.head.state_dict())  # type: ignore[union-attr]


def test_a_run_folder_keeps_to_its_run(tmp_path: Path) -> None:
    learn = learner(tmp_path)
    run = learn.save(tmp_path / "run")
    with pytest.raises(FeatureStoreError, match="holds a saved run, whose folder holds nothing else"):
        learn.export(run / "model.safetensors", overwrite=True)
    assert Learner.load(run, module=staged(), device="cpu").classes == learn.classes


@pytest.mark.parametrize(
    ("name", "kind", "words"),
    [
        ("net.onnx", "pt2", r"ends in \.onnx; expected \.pt2 for the format pt2"),
        ("net", None, r"ends in nothing; expected \.pt2 or \.onnx or \.safetensors or \.pth"),
        ("net.pt2", "torchscript", "format is 'torchscript'; expected pt2, onnx or state-dict"),
        ("none/net.pt2", None, "There is no folder .*none"),
    ],
)
def test_a_name_that_does_not_fit_is_refused(tmp_path: Path, name: str, kind: str | None, words: str) -> None:
    images = ImageSet.from_folder(photos(tmp_path / "photos", 4))
    learn = Learner(staged(), images, device="cpu", quiet=True)
    with pytest.raises(ValueError, match=words):
        learn.export(tmp_path / name, format=kind)


class Choosy(nn.Linear):
    """A head that acts on values, which no graph can hold."""

    def forward(self, vectors: Tensor) -> Tensor:
        return super().forward(vectors if float(vectors.sum()) > 0 else -vectors)


def test_an_own_head_is_written_as_what_it_computes_and_refused_where_that_cannot_be(tmp_path: Path) -> None:
    learn = learner(tmp_path, head=nn.Sequential(nn.Linear(24, 2), nn.Tanh()))
    learn.export(tmp_path / "net.pt2")
    assert close(torch.export.load(tmp_path / "net.pt2").module()(PIXELS), logits(learn, PIXELS))
    learn = learner(tmp_path, head=Choosy(24, 2))
    with pytest.raises(ModelError, match=r"torch can't write net as pt2 .*state-dict"):
        learn.export(tmp_path / "choosy.pt2")
    assert not list(tmp_path.glob("*choosy*"))


# ---- The program


def test_a_run_is_exported_from_a_shell(run: Run, here: Path) -> None:
    flags = ["--images", "photos", "--store", "feats", "--backbone", "tiny.py:make_model", "--size", "32", "--extract"]
    assert run("featstore-train", "head", *flags, "--epochs", "2", "--lr", "1e-2", "--out", "runs/head").code == 0
    ran = run("featstore-train", "export", "--model", "runs/head", "--out", "net.pt2", "--images", "photos", "--json")
    assert (ran.code, ran.json["files"], ran.json["format"]) == (0, ["net.pt2", "net.pt2.json"], "pt2")
    assert ran.json["compared"] == "16 images"  # of all that were given: the run's rule deals none of them
    learn = Learner.load("runs/head", device="cpu")
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 3, 32, 32), dtype=np.uint8))
    assert close(torch.export.load(here / "net.pt2").module()(images), logits(learn, images))
    again = run("featstore-train", "export", "--model", "runs/head", "--out", "net.pt2")
    assert (again.code, "net.pt2 exists already" in again.err) == (1, True)
    ran = run("featstore-train", "export", "--model", "runs/head", "--out", "net.pt2", "--overwrite")
    assert "net.pt2, net.pt2.json (pt2, " in ran.out
    assert "on 16 images of random pixels its outputs differ from the model's by at most" in ran.out
    ran = run("featstore-train", "export", "--model", "runs/head", "--out", "net.pt2", "--format", "torchscript")
    assert ran.code == 2
