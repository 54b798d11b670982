from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny import arrays, staged

from featstore import ImageSet
from training import FitOptions, Learner, finetune, train_head
from training.loop.checkpoints import holds_fit
from training.recipes import checkpoint_of

OPTIONS: dict[str, Any] = {"lr": 1e-2, "head": "linear", "quiet": True}


@pytest.fixture(scope="module")
def images() -> ImageSet:
    return arrays(12).split(valid=0.25)


@pytest.mark.parametrize("recipe", [train_head, finetune])
def test_a_recipe_passes_on_what_a_fit_is_told(images: ImageSet, recipe: Any) -> None:
    told: list[float] = []
    fit: FitOptions = {"keep": "last", "schedule": "constant", "on_epoch_end": lambda record: told.append(record["lr"])}
    learn = recipe(staged(), images, fit=fit, cycles=2, cycle_mult=2, **OPTIONS)
    assert told == [1e-2] * 3
    scores = [record["valid_loss"] for record in learn.history.records]
    assert learn.evaluate()["loss"] == scores[-1]
    best = recipe(staged(), images, epochs=3, **{**OPTIONS, "lr": 30.0})
    assert best.evaluate()["loss"] == min(record["valid_loss"] for record in best.history.records)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"epochs": 2, "cycles": 3}, r"epochs=2 and cycles=3 both do\. Expected one of epochs, such as epochs=5, and"),
        ({"epochs": 2, "cycle_mult": 2}, "cycle_len, cycle_mult and snapshot are of cycles. Give their number, or"),
        ({"epochs": 2, "fit": {"schedul": "cosine"}}, "A fit has no option 'schedul'. Did you mean schedule?"),
        ({"epochs": 2, "fit": {"resume": True}, "out": "run"}, "kept beside it, in run.checkpoint, and goes on from"),
    ],
)
def test_what_a_recipe_cannot_do_is_refused(
    images: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: dict[str, Any], sentence: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for recipe in (train_head, finetune):
        with pytest.raises((ValueError, TypeError), match=sentence):
            recipe(staged(), images, **OPTIONS, **given)
    assert not [*tmp_path.iterdir()]


def test_a_head_takes_ten_epochs_and_finetuning_is_told_how_many(images: ImageSet) -> None:
    assert len(train_head(staged(), images, **OPTIONS).history.records) == 10
    with pytest.raises(ValueError, match=r"^Nothing says how long to train\. Expected one of epochs, such as epochs=5"):
        finetune(staged(), images, **OPTIONS)


def test_a_fit_without_a_run_may_have_a_checkpoint_of_its_own(images: ImageSet, tmp_path: Path) -> None:
    fit: FitOptions = {"checkpoint": tmp_path / "fit"}
    first = train_head(staged(), images, epochs=1, fit=fit, **OPTIONS)
    again = train_head(staged(), images, epochs=1, fit={**fit, "resume": True}, **OPTIONS)
    theirs = first.model.tensors()
    assert all(torch.equal(each, theirs[name]) for name, each in again.model.tensors().items())


@pytest.mark.parametrize("fit", [{"monitor": "beauty"}, {"patience": 2}])
def test_what_a_fit_cannot_do_is_said_before_one_that_it_replaces_is_deleted(
    images: ImageSet, tmp_path: Path, fit: FitOptions
) -> None:
    run, unscored = tmp_path / "run", images.with_splits(["train"] * len(images))
    Learner(staged(), images, head="linear", quiet=True).fit(1, 1e-2, checkpoint=checkpoint_of(run))
    with pytest.raises(ValueError, match=r"monitor is 'beauty'|patience waits for"):
        train_head(staged(), unscored, epochs=1, fit=fit, out=run, overwrite=True, **OPTIONS)
    assert holds_fit(checkpoint_of(run))
