"""Pixels: views filed as they are, under a key without a model, that another extraction reads instead of decoding."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.extracting import counts, rows, run
from support.tiny import VIEW, jpeg, net, photos, staged

from featstore import (
    Augment,
    FactsDifferError,
    FeatureRequest,
    FeatureStore,
    ImageSet,
    MissingFeaturesError,
    StagedModel,
    extract,
    open_plan,
    plan,
)
from featstore.extraction.pixels import pixel_spec
from featstore.files.part import Part
from featstore.images import render as render_module
from featstore.images.decode import decode
from featstore.images.digests import content_digest
from featstore.images.views import View

AUGMENT = Augment("flip", seeds=[0, 3])
OTHER_MEAN = replace(VIEW, mean=(0.5, 0.5, 0.5), std=(0.5, 0.25, 0.5))


@pytest.fixture
def images(tmp_path: Path) -> ImageSet:
    return ImageSet.from_folder(photos(tmp_path / "photos", 11))


@pytest.fixture
def other() -> StagedModel:
    return StagedModel.from_module(net(1), view=OTHER_MEAN, name="other")


def refuse_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any, **__: Any) -> None:
        raise AssertionError("an image was decoded")

    monkeypatch.setattr(render_module, "decode", refused)


def test_pixels_are_the_views_and_their_key_has_no_model(
    images: ImageSet, store: FeatureStore, other: StagedModel
) -> None:
    report = run(images, store, cuts=["pixels"], augment=AUGMENT)
    views = [VIEW, *AUGMENT.views(VIEW)]
    for key, view in zip(report.keys, views, strict=True):
        data = [images.read(index) for index in range(11)]
        by_hand = torch.stack([view.render(decode(each).pixels, content_digest(each)) for each in data])
        found = rows(store, images, key)
        assert found.dtype == torch.uint8
        assert torch.equal(found, by_hand)
    assert plan(other, images, store, cuts=["pixels"], augment=AUGMENT).sets[1].spec.key == report.keys[1]
    assert counts(run(images, store, model=other, cuts=["pixels"], augment=AUGMENT)) == (0, 33, 0)
    assert pixel_spec(View()).key == "e1f41c51be3502af87ce90da4336dea4ca5c84be9b43a2eeb79ba1db10bcea6a"


def test_an_extraction_reads_stored_pixels_instead_of_decoding(
    images: ImageSet, store: FeatureStore, other: StagedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = FeatureStore(tmp_path / "plain")
    keys = run(images, plain, model=other, augment=AUGMENT, batch_size=4).keys
    run(images, store, cuts=["pixels"], augment=AUGMENT)
    refuse_decoding(monkeypatch)
    report = run(images, store, model=other, augment=AUGMENT, batch_size=4)
    assert report.keys == keys
    assert counts(report) == (33, 0, 0)
    (note,) = report.notes
    assert note.startswith("11 images read as stored pixels (set ")
    for key in keys:
        assert torch.equal(rows(store, images, key), rows(plain, images, key))
        mine, others = (each.set(key).parts[0] for each in (store, plain))
        decoders = [dict(zip(map(bytes, each.digests), each.decoders, strict=True)) for each in (mine, others)]
        assert decoders[0] == decoders[1]


def test_images_without_stored_pixels_are_decoded_beside_those_with_them(
    images: ImageSet, store: FeatureStore, tmp_path: Path
) -> None:
    plain = FeatureStore(tmp_path / "plain")
    run(images.select([1, 2, 5, 9]), store, cuts=["pixels"])
    run(images.select([5, 6]), store, cuts=["pixels"], augment=AUGMENT)
    (tmp_path / "photos" / "dog" / "7.jpg").write_bytes(b"no image")
    changed = ImageSet.from_folder(tmp_path / "photos")
    reports = [
        run(changed, each, cuts=["layer1", "layer2"], augment=AUGMENT, batch_size=4, on_error="skip")
        for each in (store, plain)
    ]
    assert counts(reports[0]) == counts(reports[1]) == (60, 0, 1)
    assert reports[0].failures == reports[1].failures
    sound = changed.select([place for place, name in enumerate(changed.ids) if name != "dog/7.jpg"])
    for key in reports[0].keys:
        assert torch.equal(rows(store, sound, key), rows(plain, sound, key))


def test_pixels_and_features_come_from_one_decode(images: ImageSet, store: FeatureStore, tmp_path: Path) -> None:
    report = run(images, store, cuts=["pixels", "layer2"], batch_size=4)
    assert [each["cut"] for each in report.sets] == ["pixels", "layer2"]
    assert [each["backbone"] for each in report.sets] == ["pixels", "net"]
    alone = run(images, FeatureStore(tmp_path / "alone"), batch_size=4)
    assert torch.equal(
        rows(store, images, report.keys[1]), rows(FeatureStore(tmp_path / "alone"), images, alone.keys[0])
    )


def test_pixels_that_other_decoders_gave_are_left_alone(
    images: ImageSet, store: FeatureStore, other: StagedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(images, store, cuts=["pixels"])
    monkeypatch.setattr("featstore.extraction.pixels.pixel_digest", lambda policy: "0" * 64)
    refuse_decoding(monkeypatch)
    with pytest.raises(AssertionError, match="an image was decoded"):
        run(images, store, model=other)


def test_a_store_keeps_pixels_as_it_keeps_features(images: ImageSet, store: FeatureStore) -> None:
    key = run(images, store, cuts=["pixels"]).keys[0]
    found = store.set(key)
    assert found.spec.dtype == "uint8"
    assert store.features(images, key)[3:5].shape == (2, 3, 16, 16)
    batches = list(store.features(images, key).batches(4, shuffle=True))
    assert sorted(row for _, places in batches for row in places.tolist()) == [*range(11)]
    assert not store.verify().damaged
    (part,) = found.parts
    content = bytearray(part.path.read_bytes())
    content[part.features_offset + 100] ^= 1
    part.path.chmod(0o644)
    part.path.write_bytes(content)
    assert Part.open(part.path).verify()
    with pytest.raises(MissingFeaturesError):
        store.features(ImageSet.from_arrays(np.zeros((1, 24, 24, 3), np.uint8)), key)


def test_pixels_have_no_reduction(images: ImageSet, store: FeatureStore) -> None:
    with pytest.raises(ValueError, match=r"pixels have none\. Write 'pixels'"):
        plan(staged(), images, store, cuts=["pixels:avg"])


def test_models_of_one_geometry_share_their_pixels(images: ImageSet, store: FeatureStore, other: StagedModel) -> None:
    report = extract([(staged(), ["pixels"]), (other, ["pixels", "layer2"])], images, store)
    assert [each["cut"] for each in report.sets] == ["pixels", "layer2"]


def test_keys_come_in_the_order_of_cuts(images: ImageSet, store: FeatureStore) -> None:
    report = run(images, store, cuts=["layer2", "pixels", "layer1"])
    assert [each["cut"] for each in report.sets] == ["layer2", "pixels", "layer1"]
    assert [store.set(key).facts["cut"] for key in report.keys] == ["layer2", "pixels", "layer1"]


def test_who_refuses_doubtful_images_has_them_decoded(images: ImageSet, store: FeatureStore, tmp_path: Path) -> None:
    damaged = bytearray(jpeg(50))
    damaged[-60:-20] = bytes(40)
    (tmp_path / "photos" / "dog" / "damaged.jpg").write_bytes(damaged)
    images = ImageSet.from_folder(tmp_path / "photos")
    assert [name for name, _ in run(images, store, cuts=["pixels"]).doubts] == ["dog/damaged.jpg"]
    report = run(images, store, doubtful="refuse", on_error="skip")
    assert (report.computed, [name for name, _ in report.failures]) == (11, ["dog/damaged.jpg"])


@pytest.mark.parametrize("loss", ["merged", "removed", "damaged"])
def test_pixels_that_are_gone_when_their_turn_comes_are_decoded_instead(
    images: ImageSet, store: FeatureStore, tmp_path: Path, loss: str
) -> None:
    for some in ([0, 1, 2, 3], [4, 5, 6], [7, 8, 9, 10]):
        run(images.select(some), store, cuts=["pixels"])
    (found,) = store.sets()
    planned = plan(staged(), images, store, cuts=["layer2"], dtype="float32")
    with open_plan(planned, store, device="cpu", workers=0) as session:
        if loss == "merged":
            store.compact()
            store.gc(older_than=0)
        elif loss == "removed":
            store.remove(found.key)
        else:
            part = found.parts[-1]
            content = bytearray(part.path.read_bytes())
            content[part.features_offset + 100] ^= 1
            part.path.chmod(0o644)
            part.path.write_bytes(content)
        filed = session.run()
    is_said = [note for note in filed.notes(planned) if "can't be read" in note]
    assert bool(is_said) == (loss != "merged")
    plain = FeatureStore(tmp_path / "plain")
    (key,) = run(images, plain).keys
    assert torch.equal(rows(store, images, key), rows(plain, images, key))


def test_a_model_has_no_storage_type_of_pixels(images: ImageSet, store: FeatureStore) -> None:
    with pytest.raises(ValueError, match=r"'uint8' is no storage type for features\. The types are float16, float32"):
        plan(staged(), images, store, cuts=["layer2"], dtype="uint8")


def test_pixels_are_no_features_that_nearly_fit(images: ImageSet, store: FeatureStore) -> None:
    run(images, store, cuts=["pixels"])
    request = plan(staged(), images, store).sets[0].spec
    with pytest.raises(FactsDifferError, match="holds no features yet"):
        store.features(images, FeatureRequest.of(request))
