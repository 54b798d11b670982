"""What engines map over batches gives the rows of an extraction."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images
from support.programs import BACKBONE
from support.tiny import jpeg, pixels

from featstore import FeatureStore, ImageError, ImageSet, MapBatches, backbone, extract


@pytest.fixture
def source(tmp_path: Path) -> str:
    (tmp_path / "tiny.py").write_text(BACKBONE, encoding="utf-8")
    return f"{tmp_path}/tiny.py:make_model"


def test_rows_are_those_of_an_extraction(source: str, store: FeatureStore) -> None:
    images = pixels(7, size=40)
    mapped = MapBatches(source, cut="conv2:avg", images="image", device="cpu", batch_size=4)
    given = {"image": images, "name": np.array([*"abcdefg"])}
    found = mapped(given)
    assert [*found] == ["image", "name", "features"]
    as_stored = ImageSet.from_arrays(images)
    key = extract(
        backbone(source), as_stored, store, cuts=["conv2:avg"], dtype="float32", device="cpu", batch_size=4
    ).keys[0]
    assert (found["features"] == store.features(as_stored, key)[:].numpy()).all()
    assert mapped({"image": images[:0]})["features"].shape == (0, 16)


def test_images_are_decoded_as_the_models_view_says(source: str, store: FeatureStore, tmp_path: Path) -> None:
    text = f"""{BACKBONE}
def make_reduced():
    from featstore import StagedModel, View
    view = View(size=32, resize=37, decode="reduced")
    return StagedModel.from_module(make_model(), view=view, name="tiny")
"""
    (tmp_path / "tiny.py").write_text(text, encoding="utf-8")
    file = f"{tmp_path}/tiny.py:make_reduced"
    photograph = Image.fromarray(load_sample_images().images[0])
    (tmp_path / "photos").mkdir()
    photograph.save(tmp_path / "photos" / "flower.jpg")
    images = ImageSet.from_folder(tmp_path / "photos")
    (key,) = extract(backbone(file), images, store, cuts=["conv2:avg"], dtype="float32", device="cpu").keys
    found = MapBatches(file, cut="conv2:avg", device="cpu")({"bytes": np.array([images.read(0)], dtype=object)})
    assert (found["features"] == store.features(images, key)[:].numpy()).all()


def test_an_image_that_is_none_is_named(source: str) -> None:
    mapped = MapBatches(source, device="cpu")
    with pytest.raises(ImageError, match="image 1 of a batch"):
        mapped({"bytes": np.array([jpeg(0), b"nothing"], dtype=object)})
