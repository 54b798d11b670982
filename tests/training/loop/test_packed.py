"""Trap 34: heads that train together come to what each comes to alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from featstore import FeatureStore, ImageSet
from featstore.exchange.imports import import_features
from featstore.images.fileless import images_by_id
from training import FeatureNoise, Learner, Mixup
from training.loop import packed as packed_fits
from training.loop.fitting import Begun
from training.loop.packed import Together, likeness
from training.loop.plan import Plan

ROWS, TRAIN, WIDTH, CLASSES = 230, 180, 12, 6

# Of wide products sums are taken in another order, so the last bits of float32 differ, and a fit carries them on.
CLOSE = 1e-5

SETTINGS: list[dict[str, Any]] = [
    {"lr": 1e-3, "cycles": (3,)},
    {"lr": 1e-2, "cycles": (3,), "schedule": "cosine", "weight_decay": 0.0, "keep": "best"},
    {"lr": 3e-3, "cycles": (2,), "weight_decay": 0.3, "decay_norms": True, "monitor": "accuracy", "keep": "best"},
    {"lr": 3e-2, "cycles": (1, 2), "schedule": "cosine_warmup", "patience": 1},
]


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> tuple[ImageSet, FeatureStore, str]:
    rng = np.random.default_rng(3)
    labels = rng.integers(0, CLASSES, ROWS)
    values = rng.standard_normal((ROWS, WIDTH)) + rng.standard_normal((CLASSES, WIDTH))[labels]
    store = FeatureStore(tmp_path_factory.mktemp("features"))
    ids = [f"{row:03d}" for row in range(ROWS)]
    key = import_features(store, values.astype(np.float32), images_by_id(ids, where="made", name="made"), name="m").key
    images = replace(
        ImageSet.from_store(store),
        targets=labels,
        classes=tuple(f"class{number}" for number in range(CLASSES)),
        splits=np.array(["train"] * TRAIN + ["valid"] * (ROWS - TRAIN)),
    )
    return images, store, key


def learner(stored: tuple[ImageSet, FeatureStore, str], head: str | nn.Module = "linear", **options: Any) -> Learner:
    images, store, key = stored
    given = {"images": images, "batch_size": 32, "seed": 5, **options}
    images = given.pop("images")
    return Learner(store.model(key), images, store, head=head, features=key, device="cpu", quiet=True, **given)


def begun(learners: list[Learner], plans: list[Plan]) -> list[Begun]:
    first = learners[0].begin(plans[0])
    rest = [learn.begin(plan, beside=learners[0]) for learn, plan in zip(learners[1:], plans[1:], strict=True)]
    return [first, *rest]


def together(learners: list[Learner], plans: list[Plan]) -> None:
    fits = begun(learners, plans)
    packed = Together(fits)
    packed.go_on(1)
    packed.go_on()
    assert not packed.places
    for learn, fit in zip(learners, fits, strict=True):
        learn.end(fit)


def assert_same(one: Learner, other: Learner) -> None:
    for name, value in one.model.tensors().items():
        torch.testing.assert_close(other.model.tensors()[name], value, rtol=CLOSE, atol=CLOSE, msg=name)
    assert one.history.best_epoch == other.history.best_epoch
    assert [list(each) for each in (one.history.lrs, one.history.momenta)] == [
        list(each) for each in (other.history.lrs, other.history.momenta)
    ]
    assert one.history.losses == pytest.approx(other.history.losses, rel=CLOSE, abs=CLOSE)
    assert len(one.history.records) == len(other.history.records)
    for record, own in zip(one.history.records, other.history.records, strict=True):
        assert {**record, "seconds": 0.0} == pytest.approx({**own, "seconds": 0.0}, rel=CLOSE, abs=CLOSE)


def head_of(rates: tuple[float, float]) -> nn.Sequential:
    """Two layers of dropout, at rates of its own."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        layers = nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, 9), nn.ReLU(), nn.Dropout(rates[1]), nn.Linear(9, CLASSES)
        return nn.Sequential(nn.Dropout(rates[0]), *layers)


@pytest.mark.parametrize(
    ("head", "optimizer"),
    [("linear", "adamw"), ("linear", "adam"), ("linear", "sgd"), ("concat", "adamw"), ("mlp", "sgd")],
)
def test_heads_trained_together_are_those_trained_alone(
    stored: tuple[ImageSet, FeatureStore, str], head: str, optimizer: str
) -> None:
    plans = [Plan(**each) for each in SETTINGS]
    alone = [learner(stored, head, optimizer=optimizer) for _ in plans]
    for learn, plan in zip(alone, plans, strict=True):
        learn._fit(plan)
    packed = [learner(stored, head, optimizer=optimizer) for _ in plans]
    together(packed, plans)
    for one, other in zip(alone, packed, strict=True):
        assert_same(one, other)


def test_each_head_draws_its_own_dropout_as_it_does_alone(stored: tuple[ImageSet, FeatureStore, str]) -> None:
    heads = [head_of((0.2, 0.5)), head_of((0.4, 0.1)), head_of((0.2, 0.5))]
    plans = [Plan(cycles=(1,), lr=1e-2)] * 3
    alone, packed = ([learner(stored, each) for each in heads] for _ in range(2))
    state = torch.get_rng_state()
    for _ in range(2):  # a second fit draws on
        for learn, plan in zip(alone, plans, strict=True):
            learn._fit(plan)
        together(packed, plans)
    assert torch.equal(torch.get_rng_state(), state)
    for one, other in zip(alone, packed, strict=True):
        assert_same(one, other)
    assert not torch.equal(packed[0].model.tensors()["head.5.weight"], packed[1].model.tensors()["head.5.weight"])


@pytest.mark.parametrize("mix", [Mixup(0.4), FeatureNoise(0.2)])
def test_losses_of_each_head_and_mixed_batches_are_those_of_fits_alone(
    stored: tuple[ImageSet, FeatureStore, str], mix: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed_fits, "_SCORED_BYTES", 1)  # each head's images are scored by themselves
    seen: list[Any] = []
    options: list[dict[str, Any]] = [{}, {"label_smoothing": 0.1}, {"class_weights": "balanced"}, {}]
    plans = [Plan(cycles=(1,), lr=1e-2, mix=mix, **each) for each in options]
    alone = [learner(stored) for _ in plans]
    for learn, plan in zip(alone, plans, strict=True):
        learn._fit(plan)
    packed = [learner(stored) for _ in plans]
    together(packed, [replace(each, on_epoch_end=seen.append) for each in plans])
    heard, expected = [each["valid_loss"] for each in seen], [each.history.last["valid_loss"] for each in packed]
    assert sorted(heard) == sorted(expected)
    for one, other in zip(alone, packed, strict=True):
        assert_same(one, other)
    weights = [each.model.tensors()["head.weight"] for each in packed]
    assert len({tuple(each.flatten().tolist()) for each in weights[:3]}) == 3


@pytest.mark.parametrize("task", ["multi", "regression"])
def test_several_labels_and_numbers_likewise(stored: tuple[ImageSet, FeatureStore, str], task: Any) -> None:
    images, store, key = stored
    rng = np.random.default_rng(0)
    hot = rng.random((ROWS, 3)) < 0.4 if task == "multi" else rng.standard_normal((ROWS, 3)) * [1.0, 30.0, 0.1]
    other = replace(images, targets=hot.astype(np.float32), classes=("a", "b", "c"), task=task)
    plans = [Plan(cycles=(2,), lr=lr) for lr in (1e-3, 1e-2)]
    alone = [learner((other, store, key)) for _ in plans]
    for learn, plan in zip(alone, plans, strict=True):
        learn._fit(plan)
    packed = [learner((other, store, key)) for _ in plans]
    together(packed, plans)
    for one, two in zip(alone, packed, strict=True):
        assert_same(one, two)


def test_each_head_keeps_the_scale_that_it_has_of_its_inputs(stored: tuple[ImageSet, FeatureStore, str]) -> None:
    images = stored[0]

    def fitted_before() -> list[Learner]:
        found = [learner(stored, images=images.select(range(*ends))) for ends in ((0, 90), (90, 180))]
        for each in found:
            each._fit(Plan(lr=1e-2))
            each.images = images
        return found

    plans = [Plan(cycles=(2,), lr=1e-2)] * 2
    alone, packed = fitted_before(), fitted_before()
    for learn, plan in zip(alone, plans, strict=True):
        learn._fit(plan)
    together(packed, plans)
    for one, other in zip(alone, packed, strict=True):
        assert_same(one, other)
    assert not torch.equal(packed[0].model.tensors()["head.mean"], packed[1].model.tensors()["head.mean"])


def test_a_head_that_loses_its_way_takes_no_other_along(stored: tuple[ImageSet, FeatureStore, str]) -> None:
    plans = [Plan(cycles=(2,), lr=lr, schedule="constant") for lr in (1e-3, 1e30, 1e-2)]
    packed = [learner(stored, "mlp") for _ in plans]
    fits = begun(packed, plans)
    run = Together(fits)
    run.go_on()
    assert [*run.failures] == [1]
    assert "The training loss became" in str(run.failures[1])
    for place in (0, 2):
        packed[place].end(fits[place])
        alone = learner(stored, "mlp")
        alone._fit(plans[place])
        assert_same(alone, packed[place])


def test_a_head_can_be_dropped_where_it_is(stored: tuple[ImageSet, FeatureStore, str]) -> None:
    plans = [Plan(cycles=(3,), lr=lr) for lr in (1e-3, 1e-2, 2e-2)]
    packed = [learner(stored) for _ in plans]
    fits = begun(packed, plans)
    run = Together(fits)
    run.go_on(2)
    run.end([1])
    assert run.places == [0, 2]
    run.go_on()
    for learn, fit in zip(packed, fits, strict=True):
        learn.end(fit)
    assert [len(each.history.records) for each in packed] == [3, 2, 3]
    alone = learner(stored)
    stopped = alone.begin(plans[1])
    stopped.go_on(2)
    alone.end(stopped)
    assert_same(alone, packed[1])


def test_what_cant_be_packed_says_so(stored: tuple[ImageSet, FeatureStore, str]) -> None:
    plain = Plan(lr=1e-2)
    assert likeness(learner(stored).begin(plain)) == likeness(learner(stored).begin(Plan(lr=1.0, weight_decay=0.0)))
    own = nn.Sequential(nn.Linear(WIDTH, CLASSES), nn.LayerNorm(CLASSES))
    assert likeness(learner(stored, own).begin(plain)) is None
    assert likeness(learner(stored).begin(Plan(lr=1e-2, clip=1.0))) is None
    assert likeness(learner(stored, "mlp").begin(plain)) != likeness(learner(stored, "concat").begin(plain))
    assert likeness(learner(stored).begin(plain)) != likeness(learner(stored, optimizer="adam").begin(plain))
    assert likeness(learner(stored).begin(plain)) != likeness(learner(stored).begin(Plan(lr=1e-2, precision="bf16")))
    norms = [nn.BatchNorm1d(WIDTH), nn.BatchNorm1d(WIDTH, eps=1e-3), nn.BatchNorm1d(WIDTH, momentum=None)]
    found = [likeness(learner(stored, nn.Sequential(each, nn.Linear(WIDTH, CLASSES))).begin(plain)) for each in norms]
    assert found[0] != found[1]
    assert found[2] is None  # whose statistics move by how many batches there were


def test_what_runs_more_than_its_layers_is_trained_alone(stored: tuple[ImageSet, FeatureStore, str]) -> None:
    relu, square = nn.ReLU(), nn.Linear(WIDTH, WIDTH)
    shared = nn.Sequential(square, nn.ReLU(), square, nn.ReLU(), nn.Linear(WIDTH, CLASSES))
    hooked = nn.Sequential(nn.Linear(WIDTH, CLASSES))
    hooked[0].register_forward_hook(lambda layer, inputs, logits: logits * 3)
    half = nn.Sequential(nn.Linear(WIDTH, 8).requires_grad_(False), nn.Linear(8, CLASSES))
    for head in (shared, hooked, half):
        assert likeness(learner(stored, head).begin(Plan(lr=1e-2))) is None
    twice = nn.Sequential(square, relu, nn.Linear(WIDTH, WIDTH), relu, nn.Linear(WIDTH, CLASSES))  # without parameters
    plans = [Plan(lr=1e-2, cycles=(2,)), Plan(lr=3e-2, cycles=(2,))]
    alone, packed = ([learner(stored, twice) for _ in plans] for _ in range(2))
    for learn, plan in zip(alone, plans, strict=True):
        learn._fit(plan)
    together(packed, plans)
    for one, other in zip(alone, packed, strict=True):
        assert_same(one, other)


@pytest.mark.cuda
def test_heads_trained_together_on_a_gpu_are_those_trained_alone(stored: tuple[ImageSet, FeatureStore, str]) -> None:
    plans = [Plan(**each) for each in SETTINGS]
    images, store, key = stored
    options: dict[str, Any] = {"head": "concat", "features": key, "device": "cuda", "quiet": True, "batch_size": 32}
    alone = [Learner(store.model(key), images, store, **options) for _ in plans]
    for learn, plan in zip(alone, plans, strict=True):
        learn._fit(plan)
    packed = [Learner(store.model(key), images, store, **options) for _ in plans]
    together(packed, plans)
    for one, other in zip(alone, packed, strict=True):
        assert_same(one, other)


def test_the_store_is_read_once_for_all(stored: tuple[ImageSet, FeatureStore, str]) -> None:
    plans = [Plan(cycles=(1,), lr=lr) for lr in (1e-3, 1e-2)]
    fits = begun([learner(stored) for _ in plans], plans)
    assert fits[1].fitting.train is fits[0].fitting.train
    assert fits[1].fitting.valid is fits[0].fitting.valid
