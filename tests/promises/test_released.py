"""A run folder that version 0.1.0 wrote gives the model, the predictions, the scores and the split that it saved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.tiny import arrays, net, staged

from featstore import ImageSet, StagedModel
from training import Learner

DATA = Path(__file__).parents[1] / "data"
RUN = DATA / "run-0.1.0"

TOLERANCE = 1e-6
"""Of probabilities: another processor's convolutions sum in another order, which moves float32 logits by about 1e-7."""


@pytest.fixture(scope="module")
def recorded() -> dict[str, Any]:
    """What version 0.1.0 itself predicted with the run, and scored."""
    found: dict[str, Any] = json.loads((DATA / "run-0.1.0.json").read_text(encoding="utf-8"))
    return found


def loaded(images: ImageSet | None) -> Learner:
    """The run's model; the backbone given has other weights, so that what counts comes from the run."""
    return Learner.load(RUN, images, module=staged(0), quiet=True)


def images() -> ImageSet:
    """The run's images, not dealt."""
    return arrays(40, seed=7)


def test_a_run_of_version_0_1_0_predicts_what_it_predicted_then(recorded: dict[str, Any]) -> None:
    learn = loaded(images())
    ids, values = learn.scored(images().split(valid=0.2).valid)
    assert list(ids) == recorded["valid"]
    np.testing.assert_allclose(values, recorded["probabilities"], rtol=0, atol=TOLERANCE)


def test_it_predicts_without_images_of_its_own(recorded: dict[str, Any]) -> None:
    held_out = images().split(valid=0.2).valid
    np.testing.assert_allclose(loaded(None).predict_proba(held_out), recorded["probabilities"], rtol=0, atol=TOLERANCE)


def test_it_scores_what_it_scored_then_on_the_split_that_it_saved(recorded: dict[str, Any]) -> None:
    learn = loaded(images())
    assert list(learn.images.valid.ids) == recorded["valid"]
    scores = learn.evaluate()  # of which there are more by now
    expected = pytest.approx(recorded["scores"], rel=0, abs=TOLERANCE)
    assert {name: scores[name] for name in recorded["scores"]} == expected


def test_its_model_is_frozen_cut_and_labelled_as_it_was() -> None:
    facts = json.loads((RUN / "model.json").read_text(encoding="utf-8"))
    learn = loaded(images())
    assert list(learn.classes) == facts["classes"]
    assert learn.cut == facts["model"]["default_cut"]
    assert {cut: learn.model.digests()[cut] for cut in learn.model.cut_points} == facts["model"]["digests"]
    as_saved = StagedModel.from_module(net(3))
    assert learn.model.num_frozen == as_saved.index(facts["model"]["frozen"]) + 1


def test_its_split_goes_by_content_whatever_the_rule_would_deal(recorded: dict[str, Any]) -> None:
    some = images().select(range(5, 25))
    held_out = [name for name in some.ids if name in recorded["valid"]]
    assert list(some.split(valid=0.2).valid.ids) != held_out  # dealt anew they would be others
    assert list(loaded(some).images.valid.ids) == held_out
