"""Agreement: what is scored from features and from files is compared with a plain pass of the model over each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny import photos, staged

from featstore import FeatureStore, ImageSet, MissingFeaturesError, extract
from training import Learner


def learner(root: Path, store: FeatureStore | None, **options: Any) -> Learner:
    images = ImageSet.from_folder(photos(root / "photos", 12)).split(valid=0.5, seed=0)
    return Learner(staged(), images, store, cut="layer2", device="cpu", workers=0, quiet=True, **options)


def test_features_in_float32_and_images_give_every_logit_to_the_bit(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path / "features")
    learn = learner(tmp_path, store)
    extract(staged(), learn.images, store, cuts=["layer2:concat"], dtype="float32", device="cpu", workers=0)
    learn.fit(2, lr=1e-2)
    found = learn.compare_inputs()
    assert (found.is_equal, found.agreed, found.ids) == (True, 1.0, learn.images.valid.ids)
    assert not found.differences.any()
    assert found.scores == (learn.evaluate(), learn.evaluate())
    assert [row["difference"] for row in found.table] == [0.0] * len(found.table)
    assert str(found).endswith(
        f"{len(found.ids)} images: each logit is equal to the bit, the largest is the same one of 100.00%"
    )


def test_what_half_precision_costs_is_the_difference_of_the_logits(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path / "features")
    learn = learner(tmp_path, store)
    extract(staged(), learn.images, store, cuts=["layer2:concat"], dtype="float16", device="cpu", workers=0)
    found = learn.compare_inputs()
    alone = learner(tmp_path, None)
    assert (found.is_equal, found.sources[0]) == (False, learn.inputs.valid and learn.inputs.valid.words)
    (stored, read) = found.scores
    assert (stored, read) == (learn.evaluate(), alone.evaluate())
    by_hand = (found.logits[0] - found.logits[1]).abs().max(1).values
    assert torch.equal(found.differences, by_hand)
    assert 0 < by_hand.max() < 1e-2
    first = found.ids[int(by_hand.argmax())]
    assert f"logits differ by {by_hand.max():.2g} at most ({first})" in str(found)
    assert found.table[0] == {
        "score": "loss",
        "features": stored["loss"],
        "images": read["loss"],
        "difference": stored["loss"] - read["loss"],
    }


def test_where_there_are_no_two_ways_nothing_is_compared(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no two ways to compare"):
        learner(tmp_path, None).compare_inputs()
    learn = learner(tmp_path, FeatureStore(tmp_path / "features"))
    with pytest.raises(MissingFeaturesError, match="holds no features yet"):
        learn.compare_inputs()
    learn.unfreeze()
    with pytest.raises(ValueError, match="no two ways to compare"):
        learn.compare_inputs()
