from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable
from itertools import chain, count, repeat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.tiny import VIEW, NormedHead, pixels, staged
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from featstore import FeatureStore, ImageSet, StagedModel, extract
from training import Learner
from training.inputs.batches import Batches
from training.inputs.derive import find
from training.inputs.situation import Situation
from training.loop import optim
from training.loop.lr_find import LearningRates, find_lr
from training.standardised import SPREAD


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> tuple[ImageSet, FeatureStore]:
    images = ImageSet.from_arrays(pixels(20), [row % 2 for row in range(20)])
    store = FeatureStore(tmp_path_factory.mktemp("features"))
    extract(staged(), images, store, cuts=["layer2"], dtype="float32", device="cpu", workers=0)
    return images, store


def learner(stored: tuple[ImageSet, FeatureStore], **options: Any) -> Learner:
    settings = {"cut": "layer2", "head": NormedHead(2, dropout=0.3), "batch_size": 8, "quiet": True, **options}
    return Learner(staged(), *stored, device="cpu", workers=0, **settings)


def batches(model: StagedModel, images: ImageSet) -> Batches:
    situation = Situation(
        model=model,
        origins=(),
        images=images,
        store=None,
        view=VIEW,
        key=None,
        on_missing="error",
        on_error="raise",
        device=torch.device("cpu"),
    )
    return Batches(find(situation, images, None), situation, batch_size=8, workers=0)


def state(learn: Learner) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in (*learn.model.parameters(), *learn.model.buffers())]


def scripted(values: Iterable[float]) -> Callable[[Tensor, Tensor], Tensor]:
    """A loss that takes these values whatever the model does, and then 1."""
    remaining = chain(values, repeat(1.0))
    return lambda logits, targets: logits.sum() * 0.0 + next(remaining)


def bounded(logits: Tensor, targets: Tensor) -> Tensor:
    """Never four times as large as it was, so the finder never stops."""
    return 1 + torch.tanh(F.cross_entropy(logits.clamp(-9, 9), targets)) / 4


@pytest.mark.parametrize("batch_size", [4, 8, 64], ids=["five_batches", "three_batches", "one_batch"])
def test_rates_rise_geometrically_from_1e_5_to_10_in_100_steps_however_short_an_epoch_is(
    stored: tuple[ImageSet, FeatureStore], batch_size: int
) -> None:
    found = learner(stored, loss=bounded, batch_size=batch_size).lr_find()
    assert found.lrs == pytest.approx(np.geomspace(1e-5, 10, 100), rel=1e-9)
    assert len(found.losses) == len(found.smoothed) == 100


def test_the_steps_use_the_rates_and_keep_the_proportions_of_groups(stored: tuple[ImageSet, FeatureStore]) -> None:
    used: list[list[float]] = []

    class Recording(SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            used.append([group["lr"] for group in self.param_groups])
            super().step(closure)

    model = staged().with_head(NormedHead(2, dropout=0.3), cut="layer2", reduction="concat")
    model.unfreeze()

    def make() -> Optimizer:
        return optim.build(model, (1e-4, 1e-2), optimizer=lambda groups: Recording(groups), weight_decay=0.0)

    tail = nn.Sequential(*model.stages)
    found = find_lr(tail, batches(model, stored[0]), make, loss=bounded, seed=0, steps=7)
    last = np.geomspace(1e-5, 10, 7)
    assert np.array(used[:7]) == pytest.approx(np.stack([last / 100, last / 10, last], axis=1), rel=1e-9)
    assert found.lrs == pytest.approx(last, rel=1e-9)


def test_the_suggestion_is_a_tenth_of_the_rate_where_the_smoothed_loss_is_lowest(
    stored: tuple[ImageSet, FeatureStore],
) -> None:
    losses = [1 + ((step - 60) / 50) ** 2 for step in range(100)]
    found = learner(stored, loss=scripted(losses), batch_size=2).lr_find()
    mean, expected = 0.0, []
    for number, value in enumerate(losses, start=1):
        mean = 0.9 * mean + 0.1 * value
        expected.append(mean / (1 - 0.9**number))
    assert found.losses == pytest.approx(losses, rel=1e-6)
    assert found.smoothed == pytest.approx(expected, rel=1e-6)
    assert found.suggestion == found.lrs[int(np.argmin(expected))] / 10
    assert 60 < int(np.argmin(expected)) < 75, "smoothing should lag, and not by much"


def fastais_valley(lrs: list[float], losses: list[float]) -> float:
    """fastai 2's `valley` (fastai/callback/schedule.py), its names and loops; a valley begins on the curve."""
    n = len(losses)
    max_start, max_end = 0, 0
    lds = [1] * n
    for i in range(1, n):
        for j in range(i):
            if (losses[i] < losses[j]) and (lds[i] < lds[j] + 1):
                lds[i] = lds[j] + 1
            if lds[max_end] < lds[i]:
                max_end = i
                max_start = max_end - lds[max_end]
    sections = (max_end - max_start) / 3
    return lrs[max(max_start, 0) + int(sections) + int(sections / 2)]


def test_the_rules_of_others_are_read_off_the_curve() -> None:
    lrs = [float(lr) for lr in np.geomspace(1e-5, 10, 100)]
    random_ = np.random.default_rng(0)
    for noise in (0.0, 0.02, 0.2):
        losses = [2 - math.tanh((step - 50) / 12) + max(0, step - 70) / 10 for step in range(100)]
        losses = [float(loss + noise * random_.standard_normal()) for loss in losses]
        found = LearningRates(lrs=tuple(lrs), losses=(), smoothed=tuple(losses), suggestion=1e-3)
        assert found.valley == fastais_valley(lrs, losses)
        assert found.steepest == lrs[int(np.argmin(np.diff(losses) / np.diff(np.log(lrs))))]
        assert found.minimum == lrs[int(np.argmin(losses))] / 10
        if not noise:
            assert lrs[49] <= found.steepest <= lrs[50]
    without = LearningRates(lrs=(), losses=(), smoothed=(), suggestion=1e-3)
    assert (without.minimum, without.steepest, without.valley) == (None, None, None)


@pytest.mark.parametrize(
    ("losses", "recorded"),
    [
        ([1.0] * 11 + [1e6], 11),
        ([1.0] * 30 + [1e6], 30),
        ([1.0] * 10 + [40.0] + [1.0] * 89, 11),  # too early to stop at once; the mean is too high one step later
        ([1.0] * 5 + [20.0] + [1.0] * 94, 100),
        ([1.0] * 50 + [30.0] + [1.0] * 49, 100),  # smoothed, a single bad batch is below four times the lowest
        ([1.0] * 5 + [math.nan], 5),
        ([1.0] * 3 + [math.inf], 3),
    ],
)
def test_it_stops_where_the_smoothed_loss_exceeds_four_times_its_lowest(
    stored: tuple[ImageSet, FeatureStore], losses: list[float], recorded: int
) -> None:
    found = learner(stored, loss=scripted(losses)).lr_find()
    assert len(found.losses) == recorded


@pytest.mark.parametrize("fails_with", [None, RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_everything_is_as_before_also_when_it_is_interrupted(
    stored: tuple[ImageSet, FeatureStore], name: str, fails_with: type[BaseException] | None
) -> None:
    steps = 0

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        nonlocal steps
        steps += 1
        if fails_with is not None and steps == 40:
            raise fails_with
        return bounded(logits, targets)

    learn = learner(stored, loss=loss, optimizer=name)
    learn.fit(1, lr=1e-3)
    steps = 0
    before, modes = state(learn), [part.training for part in learn.model.modules()]
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # type: ignore[index] # noqa: NPY002
    if fails_with is None:
        learn.lr_find()
        assert steps > 100, "the rate is tried after the curve"
    else:
        with pytest.raises(fails_with):
            learn.lr_find()
    assert all(torch.equal(value, expected) for value, expected in zip(state(learn), before, strict=True))
    assert [part.training for part in learn.model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1] == states[1]).all()  # type: ignore[index] # noqa: NPY002
    assert random.getstate() == states[2]
    assert all(parameter.grad is None for parameter in learn.model.parameters())


def test_training_goes_on_as_if_the_finder_had_not_run(stored: tuple[ImageSet, FeatureStore]) -> None:
    plain, looked = learner(stored), learner(stored)
    first = looked.lr_find()
    assert looked.lr_find() == first
    assert looked.fit(2, lr=1e-2).losses == plain.fit(2, lr=1e-2).losses


def test_it_also_restores_a_body_that_trains(stored: tuple[ImageSet, FeatureStore]) -> None:
    learn = learner(stored, loss=bounded)
    learn.unfreeze()
    before = state(learn)
    learn.lr_find()
    assert all(torch.equal(value, expected) for value, expected in zip(state(learn), before, strict=True))


def test_a_first_loss_that_is_no_number_is_an_error_and_not_an_empty_curve(
    stored: tuple[ImageSet, FeatureStore],
) -> None:
    with pytest.raises(FloatingPointError, match="The loss isn't finite at the rate 1e-05 already"):
        learner(stored, loss=scripted([math.nan])).lr_find()


@pytest.mark.parametrize("wrong", [{"start": 0.0}, {"start": 1.0, "end": 0.1}, {"steps": 1}])
def test_rates_that_do_not_rise_are_refused(stored: tuple[ImageSet, FeatureStore], wrong: dict[str, Any]) -> None:
    model = staged().with_head(NormedHead(2, dropout=0.3), cut="layer2", reduction="concat")
    train = batches(model, stored[0])
    with pytest.raises(ValueError, match="The finder needs 0 < start < end and 2 or more steps"):
        find_lr(nn.Sequential(), train, lambda: SGD(model.parameters(), lr=1.0), loss=bounded, seed=0, **wrong)


def test_a_head_trained_at_the_suggestion_learns(tmp_path: Path) -> None:
    bright = pixels(80)
    bright[::2] //= 2  # the classes differ in brightness
    images = ImageSet.from_arrays(bright, [row % 2 for row in range(80)]).split(valid=0.25)
    for head in ("concat", "linear", "mlp"):
        learn = learner((images, FeatureStore(tmp_path)), head=head, on_missing="extract")
        assert learn.fit(10).last["accuracy"] >= 0.95


def test_a_few_batches_get_the_optimizers_default_and_the_result_says_so(
    stored: tuple[ImageSet, FeatureStore], capsys: pytest.CaptureFixture[str]
) -> None:
    for name, default in (("adamw", 3e-3), ("sgd", 1e-2)):
        learn = learner(stored, optimizer=name)
        learn.quiet = False
        found = learn.lr_find()
        assert found.suggestion == default
        assert found.note is not None
        assert found.note.startswith(f"3 batches are too few to find a rate by: {default:.2g} is a safe default with ")
        assert found.note in capsys.readouterr().err
        learn.fit(1)
        said = f"learning rate {default:g} (to use it again: --lr {default:g}): {found.note}\n"
        assert said in capsys.readouterr().err


def test_a_fit_of_a_few_batches_does_not_run_them_for_a_curve(stored: tuple[ImageSet, FeatureStore]) -> None:
    counted: list[int] = []

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        counted.append(len(targets))
        return nn.functional.cross_entropy(logits, targets)

    learn = learner(stored, loss=loss)
    learn.fit(1, lr=1e-3)
    of_a_fit = len(counted)
    learn.fit(1)
    found = len(counted) - 2 * of_a_fit
    assert 0 < found < 5 * of_a_fit  # the trial of its rate
    before = len(counted)
    assert len(learn.lr_find().lrs) > 5 * of_a_fit  # who asks for the curve gets it
    assert len(counted) - before > found


@pytest.mark.parametrize(("lowest", "expected"), [(99, 3e-2), (1, 3e-3)])
def test_a_curve_without_a_sensible_lowest_point_gives_no_guess(
    stored: tuple[ImageSet, FeatureStore], lowest: int, expected: float
) -> None:
    losses = [1 + abs(step - lowest) / 100 for step in range(100)]
    found = learner(stored, loss=scripted(losses), batch_size=2).lr_find()
    assert found.suggestion == expected
    assert found.note is not None


def test_a_rate_that_makes_a_trial_worse_is_lowered(stored: tuple[ImageSet, FeatureStore]) -> None:
    losses = [2 - step / 100 for step in range(100)]
    trial = [1.0] * 2 + [1.0] * 8 + [5.0] * 2  # the batches that are left out, the steps, those batches again
    found = learner(stored, loss=scripted([*losses, *trial]), batch_size=2).lr_find()
    assert found.suggestion == pytest.approx(1e-2)
    assert found.note is not None


def test_where_every_trial_fails_the_note_says_so(stored: tuple[ImageSet, FeatureStore]) -> None:
    losses = [2 - step / 100 for step in range(100)]
    ever_worse = (1 + step / 100 for step in count())
    found = learner(stored, loss=scripted(chain(losses, ever_worse)), batch_size=2).lr_find()
    assert found.note is not None
    assert "is what made the loss worse by least, as every rate that was tried did, with AdamW" in found.note
    assert "safe with" not in found.note


@pytest.mark.parametrize("batch_size", [4, 64])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_sgd_learns_noise_by_heart_no_faster_with_a_linear_head_whose_inputs_are_spread(
    seed: int, batch_size: int
) -> None:
    images = ImageSet.from_arrays(pixels(20, seed), [row % 2 for row in range(20)]).split(valid=0.25)
    learn = Learner(
        staged(), images, cut="layer2", head="linear", optimizer="sgd", batch_size=batch_size, device="cpu", workers=0,
        quiet=True,
    )  # fmt: skip
    start = learn.evaluate("valid")["loss"]
    assert learn.lr_find().suggestion <= 1e-2 / SPREAD**2
    assert learn.fit(1).last["valid_loss"] < 1.5 * start  # at the rates of a layer on inputs of spread 1: 2 to 5 times


HEADS, PARTS, SIZES = ("linear", "concat", "mlp"), ("head", "tail", "whole"), (2, 12, 60)


# Each part with each head, optimizer and batch size; of all three together a third.
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize(
    ("head", "batch_size", "part"),
    [
        (head, size, PARTS[(number + place) % 3])
        for number, head in enumerate(HEADS)
        for place, size in enumerate(SIZES)
    ],
)
def test_the_first_epoch_at_the_suggestion_is_no_worse_than_the_start(
    head: str, optimizer: str, batch_size: int, part: str
) -> None:
    bright = pixels(80)
    bright[::2] //= 2
    images = ImageSet.from_arrays(bright, [row % 2 for row in range(80)]).split(valid=0.25)
    learn = Learner(
        staged(), images, cut="layer2", head=head, optimizer=optimizer, batch_size=batch_size, device="cpu",
        workers=0, quiet=True,
    )  # fmt: skip
    if part != "head":
        learn.freeze_to("layer1") if part == "tail" else learn.unfreeze()
    start = learn.evaluate("valid")["loss"]
    assert learn.fit(1).last["valid_loss"] <= start


@pytest.mark.parametrize(("count_", "batch_size"), [(4, 64), (80, 512)], ids=["a_handful", "a_huge_batch"])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_fit_at_the_suggestion_does_not_diverge_where_there_is_nothing_to_learn(
    optimizer: str, count_: int, batch_size: int
) -> None:
    images = ImageSet.from_arrays(pixels(count_), [row % 2 for row in range(count_)])
    learn = Learner(
        staged(), images, cut="layer2", optimizer=optimizer, batch_size=batch_size, device="cpu", workers=0, quiet=True
    )
    learn.unfreeze()
    start = learn.evaluate("train")["loss"]
    learn.fit(8)  # eight steps
    assert learn.evaluate("train")["loss"] < 1.5 * start  # at a rate of 1: up to 5,000 times
