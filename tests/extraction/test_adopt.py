from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.decoders import fast, jpegs_by
from support.tiny import VIEW, net, photos, staged
from torch import Tensor, nn

from featstore import (
    Augment,
    DamagedFileError,
    FactsDifferError,
    FeatureStore,
    FeatureStoreError,
    ImageSet,
    StagedModel,
    View,
    extract,
)
from featstore.exchange.imports import import_features
from featstore.extraction import adopt as adopt_module
from featstore.extraction.adopt import AdoptReport, adopt
from featstore.images.decoders import PIXEL_DIGEST
from featstore.models.probe import TOLERANCES


class Opaque(nn.Module):
    """A convolution that can't be traced, keyed by what its author says of it."""

    def __init__(self, fingerprint: str, *, sharper: float = 1.0, shift: float = 0.0) -> None:
        super().__init__()
        self.layer = net().layer1
        self.words, self.sharper, self.shift = fingerprint, sharper, shift

    def fingerprint(self) -> str:
        return self.words

    def forward(self, images: Tensor) -> Tensor:
        values: Tensor = self.layer(images)
        if images.shape[0] < 0:  # which no tracer can follow
            return values
        is_white = images.amin(dim=(1, 2, 3), keepdim=True) > 2  # as no probe image is
        return torch.where(is_white, values + self.shift, values * self.sharper)


def opaque(fingerprint: str, *, name: str = "opaque", **changes: float) -> StagedModel:
    return StagedModel.from_stages({"body": Opaque(fingerprint, **changes), "gap": nn.Flatten()}, view=VIEW, name=name)


@pytest.fixture
def images(tmp_path: Path) -> ImageSet:
    return ImageSet.from_folder(photos(tmp_path / "photos", 8))


def filed(images: ImageSet, store: FeatureStore, dtype: str = "float16") -> str:
    return extract(opaque("first"), images, store, cuts=["body:avg"], dtype=dtype).keys[0]


@pytest.mark.parametrize("dtype", ["float16", "float32", "bfloat16"])
def test_the_same_values_under_another_digest_are_adopted(images: ImageSet, store: FeatureStore, dtype: str) -> None:
    key = filed(images, store, dtype)
    again = opaque("second", name="again")
    assert again.digest("body") != opaque("first").digest("body")
    report = adopt(store, key, again, images)
    assert (report.key_from, report.rows, report.compared) == (key, 8, 8)
    assert report.key_to != key
    assert 0 <= report.largest_difference <= report.tolerance
    assert torch.equal(store.features(images, report.key_to)[:], store.features(images, key)[:])
    reused = extract(again, images, store, cuts=["body:avg"], dtype=dtype)
    assert (reused.keys, reused.computed, reused.reused) == ((report.key_to,), 0, 8)


def test_the_proof_is_kept_and_the_old_set_stays(images: ImageSet, store: FeatureStore) -> None:
    key = filed(images, store)
    report = adopt(store, key, opaque("second", name="again"), images)
    facts = store.set(report.key_to).facts
    assert (facts["backbone"], facts["cut"]) == ("again", "body")
    assert facts["stages"][-1]["digest"] == opaque("second").digest("body") == store.set(report.key_to).spec.trunk
    proof = facts["adopted"]
    assert (proof["key"], proof["rows"], proof["tolerance"]) == (key, 8, report.tolerance)
    assert proof["largest_difference"] == report.largest_difference
    assert proof["profile"] == store.set(key).facts["profile"]
    assert proof["versions"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    old, new = store.set(key).parts[0], store.set(report.key_to).parts[0]
    np.testing.assert_array_equal(np.sort(new.decoders), np.sort(old.decoders))
    assert len(store.sets()) == 2


def test_adopting_again_files_nothing(images: ImageSet, store: FeatureStore) -> None:
    key = filed(images, store)
    adopt(store, key, opaque("second"), images)
    files = sorted(store.root.rglob("part-*"))
    assert adopt(store, key, opaque("second"), images).rows == 0
    assert sorted(store.root.rglob("part-*")) == files


def test_only_rows_that_the_new_set_lacks_are_filed(images: ImageSet, store: FeatureStore) -> None:
    key = filed(images, store)
    extract(opaque("second"), images.select([2, 5]), store, cuts=["body:avg"])
    assert adopt(store, key, opaque("second"), images).rows == 6
    assert store.set(adopt(store, key, opaque("second"), images).key_to).index.num_images == 8


def test_another_model_is_refused_by_its_probe(images: ImageSet, store: FeatureStore) -> None:
    key = filed(images, store)
    with pytest.raises(FactsDifferError, match=r"on the probe images they differ by .*fp32 allows 0.0001. Nothing was"):
        adopt(store, key, opaque("second", sharper=1.01), images)
    assert len(store.sets()) == 1


def test_rows_of_other_pixels_than_the_decoders_here_give_are_not_adopted(
    images: ImageSet, store: FeatureStore
) -> None:
    key = filed(images, store)
    with jpegs_by(fast), pytest.raises(FactsDifferError, match=f"images of set {key[:8]} were decoded to other pixels"):
        adopt(store, key, opaque("second"), images)
    assert adopt(store, key, opaque("second"), images).rows == 8
    assert store.sets()[0].pixels == store.sets()[1].pixels == {PIXEL_DIGEST}


def test_a_model_that_differs_on_one_image_is_refused_and_the_image_named(tmp_path: Path, store: FeatureStore) -> None:
    folder = photos(tmp_path / "photos", 8)
    Image.new("RGB", (24, 24), "white").save(folder / "dog" / "white.png")
    images = ImageSet.from_folder(folder)
    key = filed(images, store)
    with pytest.raises(FactsDifferError, match=r"dog/white\.png differs by .*\(1 of 9 rows differ by more\)\. Nothing"):
        adopt(store, key, opaque("second", shift=0.5), images)
    assert len(store.sets()) == 1


def test_a_stored_row_that_is_not_the_models_is_found_and_its_image_named(
    images: ImageSet, store: FeatureStore
) -> None:
    key = filed(images, store)
    old = store.set(key)
    part = old.parts[0]
    values = part.features.clone()
    row = 3
    limit = TOLERANCES["fp32"] * float(values.abs().max())
    values[row, 0] += 0.01 * values.abs().max()
    other = FeatureStore(store.root.with_name("altered"))
    other.write(old.spec, features=[values], digests=part.digests, decoders=part.decoders, facts=part.facts)
    (image,) = [
        name
        for name, digest in zip(images.ids, images.digests().values, strict=True)
        if bytes(digest) == bytes(part.digests[row])
    ]
    with pytest.raises(FactsDifferError, match=rf"{image} differs by .*\(1 of 8 rows differ by more\)") as refused:
        adopt(other, key, opaque("second"), images)
    assert f"{limit:.3g}"[:3] in str(refused.value)
    assert len(other.sets()) == 1


def test_a_value_that_is_not_finite_is_never_equal(tmp_path: Path, store: FeatureStore) -> None:
    folder = photos(tmp_path / "photos", 8)
    Image.new("RGB", (24, 24), "white").save(folder / "dog" / "white.png")
    images = ImageSet.from_folder(folder)
    key = filed(images, store)
    with pytest.raises(FactsDifferError, match=r"dog/white\.png differs by inf"):
        adopt(store, key, opaque("second", shift=float("nan")), images)
    with pytest.raises(FactsDifferError, match="on the probe images they differ by nan"):
        adopt(store, key, opaque("second", sharper=float("nan")), images)


def test_other_facts_than_the_trunk_must_be_equal_and_are_named(images: ImageSet, store: FeatureStore) -> None:
    key = filed(images, store)
    wider = View(size=VIEW.size, resize=VIEW.resize + 4)
    with pytest.raises(FactsDifferError, match=rf"differ in resize \(stored {VIEW.resize}, yours {VIEW.resize + 4}\)"):
        adopt(store, key, opaque("second"), images, view=wider)
    with pytest.raises(FactsDifferError, match="differ in reduction"):
        adopt(store, key, StagedModel.from_module(net(), view=VIEW, layouts={"layer1": "NHWC"}), images, cut="layer1")


def test_a_model_with_the_sets_own_key_has_nothing_to_adopt(images: ImageSet, store: FeatureStore) -> None:
    with pytest.raises(ValueError, match=r"has the key of set .* already"):
        adopt(store, filed(images, store), opaque("first"), images)


def test_the_cut_can_be_called_otherwise_in_the_new_model(images: ImageSet, store: FeatureStore) -> None:
    key = filed(images, store)
    with pytest.raises(ValueError, match="has no cut 'body'"):
        adopt(store, key, staged(), images)
    report = adopt(store, key, staged(), images, cut="layer1")  # the same layer, traced
    assert store.set(report.key_to).spec.trunk == staged().digest("layer1")
    assert store.set(report.key_to).facts["cut"] == "layer1"


def test_an_augmented_set_is_adopted_with_its_own_seed(images: ImageSet, store: FeatureStore) -> None:
    model = opaque("first")
    _, key = extract(model, images, store, cuts=["body:avg"], augment=Augment("flip", seeds=[3])).keys
    report = adopt(store, key, opaque("second"), images)
    view = store.set(report.key_to).spec.rendered
    assert (view.seed, view.label()) == (3, "flip, seed 3")
    assert torch.equal(store.features(images, report.key_to)[:], store.features(images, key)[:])


def test_a_sample_is_spread_evenly_over_the_digests(tmp_path: Path, store: FeatureStore) -> None:
    images = ImageSet.from_folder(photos(tmp_path / "photos", 12))
    report = adopt(store, filed(images, store), opaque("second"), images, num_rows=5)
    assert (report.compared, report.rows) == (5, 12)


def test_too_few_images_are_refused_with_the_count(images: ImageSet, store: FeatureStore, tmp_path: Path) -> None:
    key = filed(images, store)
    for name in images.ids[:3]:
        (tmp_path / "photos" / name).unlink()
    with pytest.raises(FeatureStoreError, match=r"5 of the images of photos have a row .* 8 are needed"):
        adopt(store, key, opaque("second"), images)
    with pytest.raises(FeatureStoreError, match=r"0 of the images"):
        adopt(store, key, opaque("second"), ImageSet.from_store(store))
    assert adopt(store, key, opaque("second"), images, num_rows=5).rows == 8
    with pytest.raises(ValueError, match="num_rows is 0"):
        adopt(store, key, opaque("second"), images, num_rows=0)


def test_failed_images_stay_failed(images: ImageSet, store: FeatureStore, tmp_path: Path) -> None:
    (tmp_path / "photos" / "cat" / "0.png").write_bytes(b"no picture")
    key = extract(opaque("first"), images, store, cuts=["body:avg"], on_error="skip").keys[0]
    report = adopt(store, key, opaque("second"), images)
    assert report.rows == 7
    assert store.set(report.key_to).failed == store.set(key).failed != {}


def test_rows_that_do_not_fit_their_checksums_are_not_adopted(
    tmp_path: Path, images: ImageSet, store: FeatureStore
) -> None:
    key = filed(images, store, "float32")
    part = store.set(key).parts[0]
    content = bytearray(part.path.read_bytes())
    content[part.features_offset] ^= 1  # a last bit, far within every tolerance
    part.path.write_bytes(content)
    with pytest.raises(DamagedFileError, match=part.path.name):
        adopt(FeatureStore(store.root), key, opaque("second"), images)
    assert len(FeatureStore(store.root).sets()) == 1


def test_rows_that_were_not_compared_are_checked_as_well(images: ImageSet, store: FeatureStore) -> None:
    by_digest = np.argsort([bytes(digest).hex() for digest in images.digests().values])
    first, others = images.select(by_digest[:1]), images.select(by_digest[1:])
    key = filed(first, store)
    (compared,) = store.set(key).parts
    filed(others, store)
    (part,) = [part for part in store.set(key).parts if part.path != compared.path]
    content = bytearray(part.path.read_bytes())
    content[part.features_offset] ^= 1
    part.path.write_bytes(content)
    with pytest.raises(DamagedFileError, match=part.path.name):
        adopt(FeatureStore(store.root), key, opaque("second"), images, num_rows=1)


def test_parts_that_are_merged_meanwhile_are_looked_up_again(
    images: ImageSet, store: FeatureStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = filed(images.select(range(4)), store)
    filed(images.select(range(4, 8)), store)
    original = adopt_module._written

    def after_a_merge(*arguments: Any) -> Iterator[int]:
        other = FeatureStore(store.root)
        other.compact()
        other.gc(older_than=0)
        yield from original(*arguments)

    monkeypatch.setattr(adopt_module, "_written", after_a_merge)
    report = adopt(store, key, opaque("second"), images)
    assert report.rows == 8
    monkeypatch.undo()
    fresh = FeatureStore(store.root)
    assert torch.equal(fresh.features(images, report.key_to)[:], fresh.features(images, key)[:])


def test_a_set_without_rows_proves_nothing(tmp_path: Path, store: FeatureStore) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "no.png").write_bytes(b"no picture")
    images = ImageSet.from_folder(tmp_path / "photos")
    key = extract(opaque("first"), images, store, cuts=["body:avg"], on_error="skip").keys[0]
    with pytest.raises(FeatureStoreError, match=r"0 of the images .* 1 are needed"):
        adopt(store, key, opaque("second"), images)


def test_an_imported_set_is_refused(images: ImageSet, store: FeatureStore) -> None:
    key = import_features(store, np.ones((8, 4), np.float32), images, name="clip").key
    with pytest.raises(FeatureStoreError, match="was imported from an array"):
        adopt(store, key, opaque("second"), images)


def test_the_report_is_a_sentence() -> None:
    report = AdoptReport(
        key_from="a" * 64, key_to="b" * 64, rows=1200, compared=64, largest_difference=1e-7, tolerance=1e-4
    )
    assert re.fullmatch(
        r"1,200 rows of set aaaaaaaa filed under bbbbbbbb; 64 computed again, largest difference 1e-07 \(allowed "
        r"0\.0001\)",
        str(report),
    )
