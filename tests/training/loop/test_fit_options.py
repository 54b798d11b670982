"""Each option of a fit is what a loop of torch with it does, from features and from images alike."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.tiny import NormedHead, decayed, pixels, staged
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import OneCycleLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

from featstore import FeatureStore, ImageSet, extract
from training import EMA, SWA, Learner
from training.loop import fitting as module
from training.loop.losses import smoothed_or_weighted
from training.loop.steps import Steps

TRAIN, VALID, BATCH, EPOCHS, RATE = 22, 6, 8, 4, 0.02
SIZES = [8, 8, 6]


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> tuple[ImageSet, FeatureStore]:
    labels = [0 if row % 5 else 1 + row % 2 for row in range(TRAIN + VALID)]
    images = ImageSet.from_arrays(pixels(TRAIN + VALID), labels, splits=["train"] * TRAIN + ["valid"] * VALID)
    store = FeatureStore(tmp_path_factory.mktemp("features"))
    extract(staged(), images, store, cuts=["layer2"], dtype="float32", device="cpu", workers=0)
    return images, store


def learner(images: ImageSet, store: FeatureStore | None, **options: Any) -> Learner:
    settings: dict[str, Any] = {"cut": "layer2", "head": NormedHead(3, dropout=0.0), "batch_size": BATCH, **options}
    return Learner(staged(), images, store, device="cpu", workers=0, quiet=True, **settings)


def rows_of(stored: tuple[ImageSet, FeatureStore], split: str) -> tuple[Tensor, Tensor]:
    images, store = stored
    part = getattr(images, split)
    return store.features(part, store.sets()[0]).tensor(), torch.tensor(part.targets)


Descend = Callable[[nn.Module, Tensor, Tensor, Optimizer], None]


def plain(model: nn.Module, inputs: Tensor, targets: Tensor, optimizer: Optimizer, **loss: Any) -> None:
    F.cross_entropy(model(inputs), targets, **loss).backward()  # type: ignore[no-untyped-call]
    optimizer.step()


def clipped(model: nn.Module, inputs: Tensor, targets: Tensor, optimizer: Optimizer) -> None:
    F.cross_entropy(model(inputs), targets).backward()  # type: ignore[no-untyped-call]
    nn.utils.clip_grad_norm_(model.parameters(), 0.05)
    optimizer.step()


def narrow(model: nn.Module, inputs: Tensor, targets: Tensor, optimizer: Optimizer) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(inputs)
    F.cross_entropy(logits.float(), targets).backward()  # type: ignore[no-untyped-call]
    optimizer.step()


def by_hand(
    stored: tuple[ImageSet, FeatureStore],
    descend: Descend = plain,
    *,
    after_step: Callable[[nn.Module], None] = lambda model: None,
    after_epoch: Callable[[nn.Module, int], None] = lambda model, epoch: None,
    constant: bool = False,
) -> nn.Module:
    """A loop as a tutorial has it, in the learner's order."""
    rows, targets = rows_of(stored, "train")
    model = NormedHead(3, dropout=0.0).train()
    optimizer = AdamW(decayed(model, 0.01), lr=RATE)
    scheduler = None if constant else OneCycleLR(optimizer, RATE, total_steps=EPOCHS * len(SIZES))
    for epoch in range(EPOCHS):
        for batch in epoch_rows(epoch):
            optimizer.zero_grad()
            descend(model, rows[batch], targets[batch], optimizer)
            after_step(model)
            if scheduler is not None:
                scheduler.step()
        after_epoch(model, epoch)
    return model.eval()


def epoch_rows(epoch: int) -> Iterator[Tensor]:
    order = torch.from_numpy(np.random.default_rng([0, epoch, 0]).permutation(TRAIN))
    return iter(torch.split(order, SIZES))


def assert_equal(learn: Learner, model: nn.Module) -> None:
    assert learn.model.head is not None
    own = dict(learn.model.head.named_parameters()) | dict(learn.model.head.named_buffers())
    theirs = dict(model.named_parameters()) | dict(model.named_buffers())
    assert own.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(own[name], tensor), name


BALANCED = torch.tensor([22 / (3 * 17), 22 / (3 * 3), 22 / (3 * 2)])
"""scikit-learn's formula for 17, 3 and 2 training images."""


@pytest.mark.parametrize("reads", ["features", "images"])
@pytest.mark.parametrize(
    ("options", "descend"),
    [
        ({"clip": 0.05}, clipped),
        ({"precision": "bf16"}, narrow),
        ({"label_smoothing": 0.1}, partial(plain, label_smoothing=0.1)),
        ({"class_weights": [1, 2, 0.5]}, partial(plain, weight=torch.tensor([1, 2, 0.5]))),
        ({"class_weights": "balanced"}, partial(plain, weight=BALANCED)),
    ],
    ids=["clip", "bf16", "label_smoothing", "class_weights", "balanced"],
)
def test_an_option_is_what_it_is_in_a_loop_of_torch(
    stored: tuple[ImageSet, FeatureStore], reads: str, options: dict[str, Any], descend: Descend
) -> None:
    images, store = stored
    learn = learner(images, store if reads == "features" else None)
    history = learn.fit(EPOCHS, lr=RATE, **options)
    assert learn.read_from == reads
    expected = by_hand(stored, descend)
    assert_equal(learn, expected)
    rows, targets = rows_of(stored, "valid")
    with torch.no_grad():  # the loss on record is the plain one, whatever is descended
        assert history.last["valid_loss"] == pytest.approx(F.cross_entropy(expected(rows), targets).item(), rel=1e-6)
    unlike = by_hand(stored)
    assert not torch.equal(unlike.state_dict()["fc.weight"], expected.state_dict()["fc.weight"])


def test_gradients_of_several_batches_are_those_of_a_large_one(stored: tuple[ImageSet, FeatureStore]) -> None:
    head = nn.Linear(24, 3)  # batch norm would see smaller batches
    large = learner(*stored, head=head).fit(EPOCHS, lr=RATE)
    learn = learner(*stored, head=head, batch_size=BATCH // 4)
    small = learn.fit(EPOCHS, lr=RATE, accumulate=4)  # of the last step's 6 images two batches are full, and one has 2
    assert len(small.losses) == len(large.losses) == EPOCHS * len(SIZES)
    assert small.losses == pytest.approx(large.losses, rel=1e-5)
    assert [each["lr"] for each in small.records] == [each["lr"] for each in large.records]
    assert small.frame()["train_loss"] == pytest.approx(large.frame()["train_loss"], rel=1e-5)
    alone = {size: learner(*stored, head="linear", batch_size=size) for size in (8, 2)}
    passes = alone[8].fit(2, lr=RATE)
    assert len(passes.losses) > 2 * len(SIZES)
    assert alone[2].fit(2, lr=RATE, accumulate=4).losses == pytest.approx(passes.losses, rel=1e-4)
    assert learner(*stored, head=head, batch_size=2).fit(1, lr=RATE, accumulate=100).losses == pytest.approx(
        [learner(*stored, head=head, batch_size=64).fit(1, lr=RATE).losses[0]], rel=1e-5
    )


def test_batches_of_a_step_count_by_the_weights_of_their_classes(stored: tuple[ImageSet, FeatureStore]) -> None:
    head, weights = nn.Linear(24, 3), [1, 20, 0.1]
    large, small = (learner(*stored, head=head, batch_size=size) for size in (BATCH, BATCH // 4))
    expected = large.fit(EPOCHS, lr=RATE, class_weights=weights)
    found = small.fit(EPOCHS, lr=RATE, class_weights=weights, accumulate=4)
    assert found.losses == pytest.approx(expected.losses, rel=1e-5)  # sums in another order
    ours, theirs = (dict(each.model.named_parameters()) for each in (small, large))
    for name, value in theirs.items():
        assert torch.allclose(ours[name], value, rtol=1e-4, atol=1e-6), name


def test_an_exponential_mean_is_torchs_and_remains(stored: tuple[ImageSet, FeatureStore]) -> None:
    means: list[AveragedModel] = []

    def update(model: nn.Module) -> None:
        if not means:
            mean = get_ema_multi_avg_fn(0.8)  # type: ignore[no-untyped-call]
            means.append(AveragedModel(model, multi_avg_fn=mean, use_buffers=True))
        means[0].update_parameters(model)

    by_hand(stored, after_step=update)
    learn = learner(*stored)
    history = learn.fit(EPOCHS, lr=RATE, average=EMA(0.8))
    (mean,) = means
    mean.module.norm.num_batches_tracked.fill_(EPOCHS * len(SIZES))  # type: ignore[operator, union-attr]
    mean.module.calls.fill_(learn.model.head.calls)  # type: ignore[operator, union-attr, arg-type]
    assert_equal(learn, mean.module)
    assert history.last["valid_loss"] == pytest.approx(learn.evaluate("valid")["loss"], rel=1e-6)


def test_weights_are_averaged_over_the_last_epochs_as_torch_does(stored: tuple[ImageSet, FeatureStore]) -> None:
    means: list[AveragedModel] = []

    def update(model: nn.Module, epoch: int) -> None:
        if epoch >= 2:
            means.extend([] if means else [AveragedModel(model)])
            means[0].update_parameters(model)

    by_hand(stored, after_epoch=update, constant=True)
    rows, _ = rows_of(stored, "train")
    (mean,) = means
    update_bn((rows[batch] for batch in epoch_rows(EPOCHS - 1)), mean)
    learn = learner(*stored)
    history = learn.fit(EPOCHS, lr=RATE, schedule="constant", average=SWA(start=0.5))
    mean.module.calls.fill_(learn.model.head.calls)  # type: ignore[operator, union-attr, arg-type]
    assert_equal(learn, mean.module)
    assert history.last["valid_loss"] == pytest.approx(learn.evaluate("valid")["loss"], rel=1e-6)


def test_losses_that_stay_on_the_device_make_the_same_fit(
    stored: tuple[ImageSet, FeatureStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    at_once, later = learner(*stored), learner(*stored)
    expected = at_once.fit(EPOCHS, lr=RATE)
    monkeypatch.setattr(module, "Steps", partial(Steps, is_deferred=True))
    history = later.fit(EPOCHS, lr=RATE)
    assert history.losses == expected.losses
    assert [each["train_loss"] for each in history.records] == [each["train_loss"] for each in expected.records]
    assert at_once.model.head is not None
    assert_equal(later, at_once.model.head)


def test_a_loss_on_the_device_that_is_no_number_ends_the_epoch(
    stored: tuple[ImageSet, FeatureStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "Steps", partial(Steps, is_deferred=True))
    learn = learner(*stored, loss=lambda logits, targets: logits.sum() * torch.nan)
    with pytest.raises(FloatingPointError, match="The training loss became nan"):
        learn.fit(2, lr=RATE)


@contextmanager
def scores(*values: float) -> Iterator[Callable[[Tensor, Tensor], float]]:
    """A metric that gives these, one after the other."""
    left = iter(values)

    def own(logits: Tensor, targets: Tensor) -> float:
        return next(left)

    yield own
    assert next(left, None) is None


@pytest.mark.parametrize(
    ("direction", "best", "epochs"),
    [("max", 1, 4), ("min", 2, 5)],
)
def test_a_fit_waits_for_a_better_epoch_and_keeps_the_best(
    stored: tuple[ImageSet, FeatureStore], direction: str, best: int, epochs: int
) -> None:
    kept: list[dict[str, Tensor]] = []
    with scores(*[0.5, 0.8, 0.2, float("nan"), 0.4][:epochs]) as own:
        learn = learner(*stored, metrics=[own])
        history = learn.fit(
            9,
            lr=RATE,
            schedule="constant",
            keep="best",
            monitor=("own", direction),
            patience=2,
            on_epoch_end=lambda record: kept.append({n: t.clone() for n, t in learn.model.tensors().items()}),
        )
    assert (len(history.records), history.best_epoch) == (epochs, best)
    assert len(learn.history.records) == epochs
    assert learn.history.best["epoch"] == best + 1
    assert all(torch.equal(tensor, kept[best][name]) for name, tensor in learn.model.tensors().items())


def test_the_last_epoch_counts_where_no_epoch_has_a_number(
    stored: tuple[ImageSet, FeatureStore], capsys: pytest.CaptureFixture[str]
) -> None:
    def none(logits: Tensor, targets: Tensor) -> float:
        return float("nan")

    judged, plainly = (learner(*stored, metrics=[none], head="linear") for _ in range(2))
    judged.quiet = False
    history = judged.fit(3, lr=RATE, keep="best", monitor=("none", "max"), patience=1)
    assert (len(history.records), history.best_epoch) == (3, 2)
    assert "none was no number in any epoch, so none was best: the last one counts" in capsys.readouterr().err
    plainly.fit(3, lr=RATE)
    assert all(torch.equal(each, plainly.model.tensors()[name]) for name, each in judged.model.tensors().items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"monitor": "own"}, r'monitor is \'own\', a metric of your own.*monitor=\("own", "max"\)'),
        ({"monitor": "acuracy"}, "monitor is 'acuracy', which isn't on record; expected one of valid_loss, train_loss"),
        ({"monitor": ("accuracy", "min")}, "of accuracy expected the direction max"),
        ({"monitor": ("own", "up")}, "of own expected the direction min or max"),
        ({"patience": 0}, "patience is 0; expected at least 1"),
        ({"clip": -1}, "clip is -1; expected at least 0"),
        ({"clip": 0}, "clip is 0, which leaves nothing of any gradient"),
        ({"accumulate": 0}, "accumulate is 0; expected at least 1"),
        ({"precision": "int8"}, "precision is 'int8'; expected fp32, bf16 or fp16"),
        ({"average": 0.9}, r"average is 0.9; expected EMA\(decay\) or SWA\(start\)"),
        ({"average": SWA(), "keep": "best"}, "no best of them to keep"),
        ({"label_smoothing": 1.5}, "label_smoothing is 1.5; expected at most 1"),
        ({"class_weights": [1, 2]}, r"class_weights are \[1.0, 2.0\]; expected 3 numbers"),
        (
            {"class_weights": {0: 1.0, 1: 2.0}},
            "class_weights has the names 0, 1; expected each of the classes: 0, 1, 2",
        ),
        ({"class_weights": "even"}, "class_weights is 'even'; expected"),
        ({"class_weights": {1.0, 2.0, 4.0}}, "class_weights is .*; expected .* in their order or by name"),
        ({"class_weights": ["a", "b", "c"]}, "class_weights is .*; expected .* in their order or by name"),
    ],
)
def test_an_option_that_cannot_be_is_refused_before_anything_moves(
    stored: tuple[ImageSet, FeatureStore], options: dict[str, Any], message: str
) -> None:
    def own(logits: Tensor, targets: Tensor) -> float:
        return 0.0

    learn = learner(*stored, metrics=[own])
    with pytest.raises((TypeError, ValueError), match=message):
        learn.fit(1, lr=RATE, **options)
    assert learn.model.head is not None
    assert_equal(learn, NormedHead(3, dropout=0.0))


@pytest.mark.parametrize("share", ["x", None, True, math.nan, 1])
def test_a_share_that_is_none_is_refused_where_it_is_given(share: Any) -> None:
    with pytest.raises(ValueError, match=rf"The decay of EMA is {share!r}; expected above 0 and below 1, such as 0.99"):
        EMA(share)
    with pytest.raises(ValueError, match=rf"SWA starts after {share!r} of the epochs; expected at least 0 and below 1"):
        SWA(share)


def test_what_a_loss_of_ones_own_leaves_no_room_for_is_refused(stored: tuple[ImageSet, FeatureStore]) -> None:
    learn = learner(*stored, loss=F.cross_entropy)
    for options in ({"label_smoothing": 0.1}, {"class_weights": "balanced"}):
        with pytest.raises(ValueError, match="changes the task's own loss, and this learner has loss="):
            learn.fit(1, lr=RATE, **options)


def test_positive_labels_are_weighed_by_how_rare_they_are() -> None:
    images = _several()
    learn = Learner(staged(), images, cut="layer2", head=nn.Linear(24, 2), device="cpu", workers=0, quiet=True)
    assert images.targets is not None
    targets = torch.from_numpy(np.array(images.targets))
    weights = (len(targets) - targets.sum(0)) / targets.sum(0)
    with torch.no_grad():
        logits = torch.from_numpy(_logits(learn, images))
    expected = F.binary_cross_entropy_with_logits(logits, targets, pos_weight=weights)
    assert learn.fit(1, lr=RATE, class_weights="balanced").losses[0] == pytest.approx(expected.item(), rel=1e-5)
    with pytest.raises(ValueError, match="the task multi has no meaning for"):
        learn.fit(1, lr=RATE, label_smoothing=0.1)


def _several() -> ImageSet:
    labels = [("a", "b") if row % 4 == 0 else ("b",) for row in range(11)] + [("a",)]
    return ImageSet.from_arrays(pixels(12), labels, task="multi", splits=["train"] * 12)


def _logits(learn: Learner, images: ImageSet) -> Any:
    probabilities = learn.predict_proba(images)
    return np.log(probabilities / (1 - probabilities)).astype(np.float32)


def test_weights_of_classes_by_name_are_those_in_order(stored: tuple[ImageSet, FeatureStore]) -> None:
    ordered, named = learner(*stored), learner(*stored)
    assert ordered.classes == ("0", "1", "2")
    losses = ordered.fit(2, lr=RATE, class_weights=[1, 2, 0.5]).losses
    assert named.fit(2, lr=RATE, class_weights={"2": 0.5, "0": 1, "1": 2}).losses == losses


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_class_weights_weigh_mixed_targets_as_they_do_class_numbers(smoothing: float) -> None:
    logits, numbers = torch.randn(12, 3, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 3
    weighted = smoothed_or_weighted(
        F.cross_entropy,
        "single",
        numbers,
        ("a", "b", "c"),
        label_smoothing=smoothing,
        class_weights=[10, 40, 5],
        is_own=False,
    )
    expected = F.cross_entropy(logits, numbers, weight=torch.tensor([10.0, 40, 5]), label_smoothing=smoothing)
    torch.testing.assert_close(weighted(logits, numbers), expected)
    torch.testing.assert_close(weighted(logits, F.one_hot(numbers).float()), expected)


def test_a_batch_of_images_that_weigh_nothing_moves_nothing(stored: tuple[ImageSet, FeatureStore]) -> None:
    learn = learner(*stored, head="linear", batch_size=1)
    losses = learn.fit(1, lr=RATE, class_weights=[0, 1, 1]).losses
    _, targets = rows_of(stored, "train")
    passes = len(losses) // TRAIN
    assert losses.count(0.0) == passes * int((targets == 0).sum())
