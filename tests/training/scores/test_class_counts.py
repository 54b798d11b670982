from __future__ import annotations

import numpy as np
import pytest
import torch
from support.tiny import pixels, staged

from featstore import ImageSet
from training import Learner
from training.scores.class_counts import imbalance_note


def images(*counts: int, held_out: int = 0) -> ImageSet:
    """So many images to train on of the classes a, b, c; and of b some held out."""
    targets = [*np.repeat(np.arange(len(counts)), counts), *[1] * held_out]
    splits = ["train"] * sum(counts) + ["valid"] * held_out
    return ImageSet.from_arrays(pixels(len(targets)), targets, classes=["a", "b", "c"], splits=splits)


@pytest.mark.parametrize("is_quiet", [False, True])
def test_a_fit_names_the_commonest_and_the_rarest_class_of_what_trains(
    capsys: pytest.CaptureFixture[str], is_quiet: bool
) -> None:
    # The held-out images of b and the class c, of which there are none, change nothing.
    learn = Learner(staged(), images(20, 2, 0, held_out=8), head="linear", device="cpu", quiet=is_quiet)
    learn.fit(1, lr=1e-3)
    note = (
        "of the images to train on 20 are of the class a and 2 of b, which counts for little beside it; each counts "
        'alike with --class-weights balanced (in Python: class_weights="balanced")\n'
    )
    assert (note in capsys.readouterr().err) is not is_quiet


def test_who_weighs_classes_already_needs_no_word(capsys: pytest.CaptureFixture[str]) -> None:
    rare, settings = images(20, 2), {"head": "linear", "device": "cpu"}
    Learner(staged(), rare, **settings).fit(1, lr=1e-3, class_weights="balanced")  # type: ignore[arg-type]
    Learner(staged(), rare, loss=torch.nn.CrossEntropyLoss(), **settings).fit(1, lr=1e-3)  # type: ignore[arg-type]
    assert "counts for little" not in capsys.readouterr().err


def test_classes_of_like_size_need_no_word() -> None:
    assert imbalance_note(images(19, 2, 4)) is None
    assert imbalance_note(images(20, 2, 4)) is not None
    assert imbalance_note(images(5, 5, 5)) is None


def test_several_labels_and_numbers_need_no_word() -> None:
    several = [["a"]] * 20 + [["a", "b"]]
    assert imbalance_note(ImageSet.from_arrays(pixels(21), several, task="multi")) is None
    numbers = np.arange(21, dtype=np.float32).reshape(21, 1)
    assert imbalance_note(ImageSet.from_arrays(pixels(21), numbers, classes=["x"], task="regression")) is None
