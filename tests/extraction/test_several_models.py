"""Several models in one job: each image is read and decoded once, and every row is that of a job of one model."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from support.extracting import counts, reduced, rows, run, up_to
from support.tiny import VIEW, net, photos, rows_by_hand, staged
from torch import nn

from featstore import Augment, ExtractReport, FactsDifferError, FeatureStore, ImageSet, StagedModel, extract, plan
from featstore.extraction.extract import finish
from featstore.extraction.opening import open_plan
from featstore.images import decode as decode_module
from featstore.images import render as render_module
from featstore.images.decoders import PILLOW, TORCHVISION

OTHER_MEAN = replace(VIEW, mean=(0.5, 0.5, 0.5), std=(0.5, 0.25, 0.5))
LARGER = VIEW.resized(size=24, resize=28)
AUGMENT = Augment("flip", seeds=[0, 3])


def models() -> list[tuple[StagedModel, list[str] | None]]:
    """Of one geometry with two means, and of another geometry; their cuts have equal names."""
    others = [
        StagedModel.from_module(net(seed), view=view, name=f"net{seed}")
        for seed, view in ((1, OTHER_MEAN), (2, LARGER))
    ]
    return [(staged(0), ["layer1", "layer2"]), (others[0], ["layer2"]), (others[1], None)]


def run_several(images: ImageSet, store: FeatureStore, **options: Any) -> ExtractReport:
    defaults: dict[str, Any] = {"dtype": "float32", "workers": 0, "device": "cpu"}
    return extract(models(), images, store, **(defaults | options))


@pytest.fixture
def images(tmp_path: Path) -> ImageSet:
    return ImageSet.from_folder(photos(tmp_path / "photos", 11))


def test_rows_and_keys_are_those_of_a_job_for_each_model(images: ImageSet, tmp_path: Path) -> None:
    together, alone = FeatureStore(tmp_path / "together"), FeatureStore(tmp_path / "alone")
    report = run_several(images, together, augment=AUGMENT, batch_size=4)
    reports = [run(images, alone, model=model, cuts=cuts, augment=AUGMENT, batch_size=4) for model, cuts in models()]
    assert report.keys == tuple(key for each in reports for key in each.keys)
    assert counts(report) == tuple(map(sum, zip(*map(counts, reports), strict=True))) == (4 * 3 * 11, 0, 0)
    for each in report.sets:
        assert torch.equal(rows(together, images, each["key"]), rows(alone, images, each["key"]))
        assert together.set(each["key"]).facts["backbone"] == each["backbone"]
    assert [each["backbone"] for each in report.sets[::3]] == ["net", "net", "net1", "net2"]
    for view, seed, key in ((VIEW, 0, report.keys[3]), (OTHER_MEAN, 1, report.keys[6])):
        by_hand = reduced(rows_by_hand(up_to("layer2", net(seed)), images, view, batch_size=4), "concat")
        assert torch.equal(rows(together, images, key), by_hand)


def test_each_image_is_read_and_decoded_once_and_views_of_equal_pixels_are_rendered_once(
    images: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode, render, calls = decode_module.decode, type(VIEW).render, {"decode": 0, "render": 0}

    def decoding(*arguments: Any, **options: Any) -> Any:
        calls["decode"] += 1
        return decode(*arguments, **options)

    def rendering(*arguments: Any) -> Any:
        calls["render"] += 1
        return render(*arguments)

    monkeypatch.setattr(render_module, "decode", decoding)
    monkeypatch.setattr(type(VIEW), "render", rendering)
    run_several(images, FeatureStore(tmp_path / "store"), augment=AUGMENT)
    assert calls == {"decode": 11, "render": 2 * 3 * 11}  # two geometries, three views


def test_rows_of_two_decode_policies_have_each_their_own_decoder(tmp_path: Path) -> None:
    data, store = io.BytesIO(), FeatureStore(tmp_path / "feats")
    Image.fromarray(load_sample_images().images[0][:300, :400]).save(data, "JPEG")
    hurt = data.getvalue()[:10_000] + b"\x55" * 200 + data.getvalue()[10_200:]  # simplejpeg refuses it
    (tmp_path / "hurt.jpg").write_bytes(hurt)
    halved = StagedModel.from_module(net(1), view=replace(VIEW, decode="reduced"), name="halved")
    several = [(staged(), ["layer2"]), (halved, ["layer2"]), (staged(2), ["layer2"])]
    keys = extract(several, ImageSet.from_folder(tmp_path), store, workers=0, device="cpu").keys
    decoders = [store.set(key).parts[0].decoders.tolist() for key in keys]
    assert decoders == [[TORCHVISION], [PILLOW], [TORCHVISION]]


def test_only_the_rows_that_a_model_lacks_are_computed(images: ImageSet, tmp_path: Path) -> None:
    store, whole = FeatureStore(tmp_path / "store"), FeatureStore(tmp_path / "whole")
    first = images.select(range(7))
    before = run(first, store, model=models()[1][0], batch_size=4)
    report = run_several(images, store, batch_size=4)
    assert [(each["computed"], each["reused"]) for each in report.sets] == [(11, 0), (11, 0), (4, 7), (11, 0)]
    assert report.keys[2] == before.keys[0]
    for key in run_several(images, whole, batch_size=4).keys:
        assert torch.equal(rows(store, images, key), rows(whole, images, key))
    assert counts(run_several(images, store)) == (0, 44, 0)


def test_sessions_in_pieces_give_the_same_rows(images: ImageSet, tmp_path: Path) -> None:
    store, whole = FeatureStore(tmp_path / "store"), FeatureStore(tmp_path / "whole")
    planned = plan(models(), images, store, dtype="float32", augment=AUGMENT)
    with open_plan(planned, store, device="cpu", batch_size=4, workers=2) as session:
        pieces = [session.run(range(start, 11, 3)) for start in range(3)]
    report = finish(planned, store, pieces)
    assert report.computed == 4 * 3 * 11
    for key in run_several(images, whole, augment=AUGMENT, batch_size=4).keys:
        assert torch.equal(rows(store, images, key), rows(whole, images, key))


def test_a_model_given_twice_is_one_set(images: ImageSet, tmp_path: Path) -> None:
    report = extract([(staged(), ["layer2"]), (staged(), ["layer2"])], images, FeatureStore(tmp_path / "store"))
    assert len(report.keys) == 1


def test_any_model_that_was_changed_after_the_plan_stops_the_job(images: ImageSet, tmp_path: Path) -> None:
    store, given = FeatureStore(tmp_path / "store"), models()
    planned = plan(given, images, store)
    with torch.no_grad():
        next(given[1][0].parameters()).add_(1)
    with pytest.raises(FactsDifferError, match="net1 was changed after the extraction was planned"):
        open_plan(planned, store, device="cpu")


def test_what_is_no_list_of_models_is_refused(images: ImageSet, tmp_path: Path) -> None:
    store = FeatureStore(tmp_path / "store")
    for given in ([staged()], [(staged(), "layer2", 1)], "resnet18", [(nn.ReLU, None)]):
        with pytest.raises(TypeError, match="expected what backbone"):
            plan(given, images, store)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="No model is given"):
        plan([], images, store)
    with pytest.raises(TypeError, match="Expected None beside several models"):
        plan([(staged(), None)], images, store, cuts=["layer2"])
    with pytest.raises(TypeError, match=r"Write \['layer2'\]"):
        plan([(staged(), "layer2")], images, store)
