"""Cross-validation: its predictions are those of a plain loop over the folds, and no image has a part in its own."""

from __future__ import annotations

import csv
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.nn.functional as F
from numpy.testing import assert_array_equal
from scipy.stats import ttest_1samp  # type: ignore[import-untyped]
from support.full_disk import largest_file
from support.tiny import pixels, staged
from torch import Tensor

from featstore import FeatureStore, FeatureStoreError, ImageSet, extract
from featstore.errors import FactsDifferError
from training import Ensemble, Learner, cross_validate, cross_validation

COUNT, FOLDS = 23, 3
OPTIONS: dict[str, Any] = {"cut": "layer2", "batch_size": 4, "device": "cpu", "workers": 0, "quiet": True}


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> tuple[ImageSet, FeatureStore]:
    classes = [row % 3 for row in range(COUNT - 1)] + [-1]  # one is unlabelled, and one is of the split test
    images = ImageSet.from_arrays(pixels(COUNT), classes, splits=[""] * (COUNT - 2) + ["test", ""])
    store = FeatureStore(tmp_path_factory.mktemp("features"))
    extract(staged(), images, store, cuts=["layer2:concat"], dtype="float32", device="cpu", workers=0)
    return images, store


@pytest.mark.parametrize("lr", [1e-2, None])
def test_predictions_and_scores_are_those_of_a_plain_loop_over_the_folds(
    stored: tuple[ImageSet, FeatureStore], lr: float | None
) -> None:
    images, store = stored
    found = cross_validate(staged(), images, store, folds=FOLDS, epochs=2, lr=lr, **OPTIONS)
    expected, losses, accuracies = np.full((COUNT, 3), np.nan), [], []
    for fold in images.folds(FOLDS):
        learn = Learner(staged(), fold, store, **OPTIONS)
        learn.fit(2, lr=lr)
        ids, values = learn.scored(fold.valid)
        expected[[int(name) for name in ids]] = values
        scores = learn.evaluate()
        losses.append(scores["loss"])
        accuracies.append(scores["accuracy"])
    outcomes = found.outcomes()
    assert outcomes.images.ids == tuple(map(str, range(COUNT - 2)))
    assert_array_equal(outcomes.probabilities, expected[: COUNT - 2])
    assert images.targets is not None
    assert_array_equal(outcomes.targets, images.targets[: COUNT - 2])
    assert [each["loss"] for each in found.scores] == losses
    assert [each["accuracy"] for each in found.scores] == accuracies
    assert found.mean["loss"] == pytest.approx(np.mean(losses), rel=1e-12)
    interval = ttest_1samp(losses, 0).confidence_interval(0.95)
    assert found.interval("loss") == pytest.approx((interval.low, interval.high), rel=1e-9)
    assert [row["fold"] for row in found.table] == ["1", "2", "3", "mean", "from", "to"]
    right = int(outcomes.is_right.sum())
    assert (
        str(found)
        .splitlines()[-1]
        .startswith(
            f"3 folds, {COUNT - 2} images, each scored while it was held out: accuracy {right / (COUNT - 2):.3f} (95 %"
        )
    )


def test_a_model_and_a_head_of_ones_own_start_anew_in_each_fold(stored: tuple[ImageSet, FeatureStore]) -> None:
    images, _ = stored
    model = staged()
    digests = model.digests()
    head = Learner(staged(), images, **OPTIONS, head="mlp").model.head
    assert head is not None
    options = {**OPTIONS, "head": head}
    found = cross_validate(model, images, folds=2, epochs=1, lr=1e-2, freeze_to="layer1", split_seed=4, **options)
    alone = Learner(staged(), images.folds(2, seed=4)[1], **options)
    alone.freeze_to("layer1")
    alone.fit(1, lr=1e-2)
    assert_array_equal(found.learners[1].predict_proba(images), alone.predict_proba(images))
    assert model.digests() == digests


def test_images_of_a_group_are_held_out_together(stored: tuple[ImageSet, FeatureStore]) -> None:
    images, store = stored
    groups = [f"patient {row // 4}" for row in range(COUNT - 2)] + ["alone", "unlabelled"]
    found = cross_validate(staged(), images, store, folds=2, groups=groups, epochs=1, lr=1e-2, **OPTIONS)
    first, second = ({groups[int(name)] for name in each.images.ids} for each in found.held_out)
    assert not first & second


@pytest.mark.parametrize(
    ("fit", "why"),
    [
        ({"keep": "best"}, "keep would keep an epoch by the images held out"),
        ({"patience": 2}, "patience would end a fit by the images held out"),
        ({"checkpoint": "fit"}, "checkpoint can't hold the fits of several folds: with out= they are kept beside it"),
    ],
)
def test_what_would_choose_by_the_images_held_out_is_refused(
    stored: tuple[ImageSet, FeatureStore], fit: Any, why: str
) -> None:
    images, store = stored
    with pytest.raises(ValueError, match=why):
        cross_validate(staged(), images, store, fit=fit, **OPTIONS)


def test_folds_are_saved_as_runs_that_predict_together(stored: tuple[ImageSet, FeatureStore], tmp_path: Path) -> None:
    images, store = stored
    found = cross_validate(staged(), images, store, folds=2, epochs=1, lr=1e-2, **OPTIONS)
    found.save(tmp_path)
    with (tmp_path / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["image"] for row in rows] == list(found.outcomes().images.ids)
    expected = np.mean([each.predict_proba(images) for each in found.learners], axis=0)
    runs = [
        Learner.load(tmp_path / f"fold-{n}", module=staged(), device="cpu", batch_size=4, quiet=True) for n in (1, 2)
    ]
    assert_array_equal(Ensemble(runs).predict_proba(images), expected)


def test_folds_replace_all_of_earlier_ones_and_nothing_else(
    stored: tuple[ImageSet, FeatureStore], tmp_path: Path
) -> None:
    images, store = stored
    three, two = (
        cross_validate(staged(), images, store, folds=folds, epochs=1, lr=1e-2, **OPTIONS) for folds in (3, 2)
    )
    three.save(tmp_path / "folds")
    with pytest.raises(FeatureStoreError, match=r"3 folds already\. Choose another folder, or replace all of them"):
        two.save(tmp_path / "folds")
    two.save(tmp_path / "folds", overwrite=True)
    assert sorted(each.name for each in (tmp_path / "folds").iterdir()) == ["fold-1", "fold-2", "predictions.csv"]
    members = Ensemble.load(tmp_path / "folds", module=staged(), device="cpu", batch_size=4, quiet=True)
    assert_array_equal(members.predict_proba(images), Ensemble(two.learners).predict_proba(images))

    (tmp_path / "folds/fold-2/mine.txt").write_text("kept")
    with pytest.raises(FeatureStoreError, match=r"fold-2 holds 'mine.txt' besides its run"):
        three.save(tmp_path / "folds", overwrite=True)
    three.learners[0].save(tmp_path / "run")
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables/predictions.csv").write_text("kept")
    (tmp_path / "file").write_text("kept")
    for name, why in (("run", "holds history.csv"), ("tables", "holds predictions.csv"), ("file", "is a file")):
        with pytest.raises(FeatureStoreError, match=f"{why}.*, and folds have a folder of their own"):
            two.save(tmp_path / name, overwrite=True)
    assert (tmp_path / "tables/predictions.csv").read_text() == "kept"


@pytest.mark.parametrize("groups", [None, [row // 4 for row in range(24)]])
def test_no_fold_trains_on_the_content_that_it_scores(groups: list[int] | None) -> None:
    contents = pixels(14)[[*range(12), *range(10), 12, 13]]  # ten images are there twice, under two names
    images = ImageSet.from_arrays(contents, [row % 2 for row in [*range(12), *range(12)]])
    found = cross_validate(staged(), images, folds=FOLDS, groups=groups, epochs=1, lr=1e-2, head="linear", **OPTIONS)
    for learn in found.learners:
        trained, scored = (
            {bytes(row) for row in part.digests().values} for part in (learn.images.train, learn.images.valid)
        )
        assert scored
        assert trained
        assert not trained & scored
        if groups is not None:
            held_out = {groups[int(name)] for name in learn.images.valid.ids}
            assert not held_out & {groups[int(name)] for name in learn.images.train.ids}
    assert len(found.outcomes()) == len(images)


class Counting:
    """Cross-entropy that counts its training steps, in one of which somebody presses Ctrl-C."""

    def __init__(self) -> None:
        self.steps = 0
        self.stop: int | None = None

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        self.steps += logits.requires_grad
        if self.steps == self.stop and logits.requires_grad:
            signal.raise_signal(signal.SIGINT)
        return F.cross_entropy(logits, targets)


@pytest.mark.usefixtures("heeds_signals")
def test_folds_that_are_done_are_not_repeated(stored: tuple[ImageSet, FeatureStore], tmp_path: Path) -> None:
    images, store = stored
    asked: dict[str, Any] = {"folds": FOLDS, "epochs": 2, "lr": None, **OPTIONS}
    expected = cross_validate(staged(), images, store, **asked)
    loss = Counting()
    cross_validate(staged(), images, store, loss=loss, **asked)
    whole = loss.steps
    loss.steps, loss.stop = 0, whole - 2  # in the last epoch of the last fold
    saving: dict[str, Any] = {"loss": loss, "out": tmp_path / "folds", **asked}
    with pytest.raises(KeyboardInterrupt) as interrupt:
        cross_validate(staged(), images, store, **saving)
    assert str(tmp_path / "folds.folds/fold-3") in interrupt.value.__notes__[0]
    assert not (tmp_path / "folds").exists()
    with pytest.raises(FeatureStoreError, match=r"folds\.folds holds what was done of 3 folds\. Go on .* --resume"):
        cross_validate(staged(), images, store, **saving)
    with pytest.raises(FactsDifferError, match=r"folds\.folds/fold-1 is of another fit .* differs in: lr"):
        cross_validate(staged(), images, store, **{**saving, "lr": 1e-3}, resume=True)
    loss.steps, loss.stop = 0, None
    found = cross_validate(staged(), images, store, **saving, resume=True)
    assert loss.steps == 2
    assert found.scores == expected.scores
    assert_array_equal(found.outcomes().probabilities, expected.outcomes().probabilities)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["folds"]
    assert len(Ensemble.load(tmp_path / "folds", module=staged(), device="cpu", quiet=True).learners) == FOLDS
    loss.steps, loss.stop = 0, whole - 2
    with pytest.raises(KeyboardInterrupt):
        cross_validate(staged(), images, store, **saving, overwrite=True)
    loss.steps, loss.stop = 0, None
    cross_validate(staged(), images, store, **saving, overwrite=True)  # neither folds nor what is kept of others
    assert loss.steps == whole
    assert sorted(each.name for each in tmp_path.iterdir()) == ["folds"]
    with pytest.raises(ValueError, match="Give their folder: out="):
        cross_validate(staged(), images, store, **asked, resume=True)


def test_folds_are_replaced_whole_or_not_at_all(
    stored: tuple[ImageSet, FeatureStore], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, store = stored
    found = cross_validate(staged(), images, store, folds=2, epochs=1, lr=1e-2, **OPTIONS)
    found.save(tmp_path / "folds")

    def contents() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    before = contents()
    for size in (16, 1 << 10):  # what a full disk lets through, of a fold's first file and of a later one
        with largest_file(size), pytest.raises(OSError, match=r"too large: '.*folds/") as full:
            found.save(tmp_path / "folds", overwrite=True)
        assert "new-" not in str(full.value)
        assert contents() == before
    with monkeypatch.context() as patch:  # the last write of all
        patch.setattr(cross_validation, "write_csv", lambda *_: pytest.fail("it ends here"))
        with pytest.raises(pytest.fail.Exception):
            found.save(tmp_path / "folds", overwrite=True)
    assert contents() == before
    # Whoever was killed between two names has left the earlier folds aside, where they are found.
    (tmp_path / "folds").rename(tmp_path / f".folds.old-{'0' * 16}")
    assert len(Ensemble.load(tmp_path / "folds", module=staged(), device="cpu", quiet=True).learners) == 2
    with pytest.raises(FeatureStoreError, match="2 folds already"):
        found.save(tmp_path / "folds")
    found.save(tmp_path / "folds", overwrite=True)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["folds"]
