from __future__ import annotations

import copy
import math
import random
import re
import sys
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from support.tiny import decayed, photos, pixels, staged
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import OneCycleLR

from featstore import FeatureStore, FeatureStoreError, ImageSet, extract
from training import SWA, Learner, Mixup
from training.loop import fit as loop

TRAIN, VALID = 22, 6


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> tuple[ImageSet, FeatureStore]:
    splits = ["train"] * TRAIN + ["valid"] * VALID
    images = ImageSet.from_arrays(pixels(TRAIN + VALID), [row % 3 for row in range(TRAIN + VALID)], splits=splits)
    store = FeatureStore(tmp_path_factory.mktemp("features"))
    extract(staged(), images, store, cuts=["layer2"], dtype="float32", device="cpu", workers=0)
    return images, store


def learner(images: ImageSet, store: FeatureStore | None, **options: Any) -> Learner:
    settings = {"cut": "layer2", "head": head(), "batch_size": 8, "quiet": True, **options}
    return Learner(staged(), images, store, device="cpu", workers=0, **settings)


def head() -> nn.Sequential:
    """Batch norm, dropout and two layers, the same numbers each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return nn.Sequential(nn.BatchNorm1d(24), nn.Linear(24, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 3))


def plain_sgd(groups: Iterable[dict[str, Any]]) -> Optimizer:
    """Without momentum, so that nothing but the weights goes from one fit to the next."""
    return SGD(groups, lr=1.0)


def weights(learn: Learner) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in learn.model.tensors().items()}


def same(some: dict[str, Tensor], others: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, others[name]) for name, value in some.items())


def by_hand(
    features: Tensor, targets: Tensor, sizes: list[int], epochs: int, lr: float, make: Callable[..., Optimizer]
) -> tuple[list[float], nn.Module]:
    """A training loop as a tutorial has it, with the learner's order and its seed for dropout."""
    model = head().train()
    optimizer = make(decayed(model, 0.01), lr=lr)
    scheduler = OneCycleLR(optimizer, lr, total_steps=epochs * len(sizes))
    losses = []
    with torch.random.fork_rng(devices=[]):
        for epoch in range(epochs):
            torch.manual_seed(epoch)
            order = torch.from_numpy(np.random.default_rng([0, epoch, 0]).permutation(len(features)))
            for rows in torch.split(order, sizes):
                optimizer.zero_grad()
                loss = F.cross_entropy(model(features[rows]), targets[rows])
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                scheduler.step()
                losses.append(loss.item())
    return losses, model.eval()


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("adamw", AdamW),
        ("sgd", partial(SGD, momentum=0.9)),
    ],
)
@pytest.mark.parametrize(("batch_size", "sizes"), [(8, [8, 8, 6]), (7, [7, 7, 8]), (64, [22])])
def test_a_fit_is_a_plain_loop_of_torch(
    stored: tuple[ImageSet, FeatureStore], name: str, make: Callable[..., Optimizer], batch_size: int, sizes: list[int]
) -> None:
    images, store = stored
    rows = store.features(images.train, store.sets()[0]).tensor()
    assert images.train.targets is not None
    targets = torch.tensor(images.train.targets)
    losses, model = by_hand(rows, targets, sizes, 3, 0.02, make)
    learn = learner(images, store, optimizer=name, batch_size=batch_size)
    history = learn.fit(3, lr=0.02)
    assert history.losses == losses
    assert learn.model.head is not None
    assert same(learn.model.head.state_dict(), model.state_dict())
    per_epoch = np.array(losses).reshape(3, len(sizes))
    assert history.frame()["train_loss"] == pytest.approx((per_epoch * sizes).sum(axis=1) / TRAIN, rel=1e-12)
    held_out = store.features(images.valid, store.sets()[0]).tensor()
    assert images.valid.targets is not None
    with torch.no_grad():
        expected = F.cross_entropy(model(held_out), torch.tensor(images.valid.targets)).item()
    assert history.last["valid_loss"] == pytest.approx(expected, rel=1e-6)  # other sizes of batches


def test_an_epoch_has_a_bar_where_one_can_be_seen(
    stored: tuple[ImageSet, FeatureStore], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(loop, "_PATIENT", 0.0)
    plain = learner(*stored, quiet=False).fit(2, lr=0.02)
    assert "batch" not in capsys.readouterr().err  # of a file, which a bar would fill
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    shown = learner(*stored, quiet=False).fit(2, lr=0.02)
    assert shown.losses == plain.losses
    told = capsys.readouterr().err
    assert re.search(r"epoch 1: +\d+%.*/3", told)
    assert re.search(r"epoch 2: +\d+%.*/3", told)
    learner(*stored).fit(1, lr=0.02)
    assert capsys.readouterr().err == ""


class RecordingSGD(SGD):
    rates: list[list[float]]

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.rates.append([group["lr"] for group in self.param_groups])
        super().step(closure)


@pytest.mark.parametrize("num_processes", [1, 8])
def test_the_rates_of_each_step_are_those_of_one_cycle_by_hand_on_any_number_of_devices(
    stored: tuple[ImageSet, FeatureStore], monkeypatch: pytest.MonkeyPatch, num_processes: int
) -> None:
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):  # as a launcher tells each of its processes, with one device each
        monkeypatch.setenv(name, str(num_processes))
    images, _ = stored
    made: list[RecordingSGD] = []

    def make(groups: Iterable[dict[str, Any]]) -> Optimizer:
        made.append(RecordingSGD(groups, lr=1.0, momentum=0.9))
        made[-1].rates = []
        return made[-1]

    learn = learner(images, None, optimizer=make)
    learn.unfreeze()
    history = learn.fit(3, lr=(1e-4, 1e-2))
    groups = [nn.Parameter(torch.zeros(1)) for _ in range(3)]
    reference = SGD([{"params": [each]} for each in groups], lr=1.0, momentum=0.9)
    scheduler = OneCycleLR(reference, [1e-4, 1e-4 * 100**0.5, 1e-2], total_steps=9)
    expected, momenta = [], []
    for _ in range(9):
        expected.append([group["lr"] for group in reference.param_groups])
        momenta.append(reference.param_groups[-1]["momentum"])
        reference.step()
        scheduler.step()
    # Of each group of layers what is decayed, then biases and norms.
    assert made[-1].rates == [[rate for rate in rates for _ in range(2)] for rates in expected]
    assert history.frame()["lr"] == [expected[2][-1], expected[5][-1], expected[8][-1]]
    assert learn.history.steps() == {
        "loss": history.losses,
        "lr": [rates[-1] for rates in expected],
        "momentum": momenta,
    }


def test_statistics_of_frozen_stages_stay_and_those_of_thawed_ones_move(stored: tuple[ImageSet, FeatureStore]) -> None:
    images, store = stored
    for freeze_to, source in (("layer2", None), ("layer2", store), ("layer1", None)):
        learn = learner(images, source, on_missing="images")
        learn.freeze_to(freeze_to)
        before = weights(learn)
        learn.fit(1, lr=1e-2)
        moved = {name for name, value in weights(learn).items() if not torch.equal(value, before[name])}
        assert any("running_mean" in name and name.startswith("head") for name in moved)
        assert not any(name.startswith("layer1") for name in moved)
        assert ("layer2.1.running_mean" in moved) == (freeze_to == "layer1")
        assert ("layer2.0.weight" in moved) == (freeze_to == "layer1")


def random_states() -> tuple[Tensor, NDArray[np.uint32], int, object]:
    _, state, place, *_ = np.random.get_state()  # noqa: NPY002
    return torch.get_rng_state(), state, place, random.getstate()  # type: ignore[return-value]


def flags(learn: Learner) -> list[tuple[bool, list[bool]]]:
    return [
        (part.training, [parameter.requires_grad for parameter in part.parameters()]) for part in learn.model.modules()
    ]


@pytest.mark.parametrize("fails", [False, True])
def test_a_fit_leaves_random_states_and_flags_as_they_were(stored: tuple[ImageSet, FeatureStore], fails: bool) -> None:
    images, store = stored
    calls = 0

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if fails and calls == 3:
            raise KeyboardInterrupt
        return F.cross_entropy(logits, targets)

    learn = learner(images, store, loss=loss)
    states, before = random_states(), flags(learn)
    if fails:
        with pytest.raises(KeyboardInterrupt):
            learn.fit(2, lr=1e-2)
    else:
        learn.fit(2, lr=1e-2)
    after = random_states()
    assert torch.equal(states[0], after[0])
    assert (states[1] == after[1]).all()
    assert states[2:] == after[2:]
    assert flags(learn) == before
    assert all(parameter.grad is None for parameter in learn.model.parameters())


def test_fits_in_threads_come_to_what_each_comes_to_alone() -> None:
    images = ImageSet.from_arrays(pixels(24), [row % 3 for row in range(24)])

    def made(seed: int) -> Learner:
        return Learner(staged(), images, head="concat", seed=seed, batch_size=4, device="cpu", workers=0, quiet=True)

    def fitted(learn: Learner, meeting: threading.Barrier | None = None) -> list[Tensor]:
        if meeting is not None:
            meeting.wait(60)
        learn.fit(4, lr=1e-2, average=SWA(0.5), mix=Mixup(0.4))
        return [*learn.model.tensors().values()]

    alone = [fitted(made(seed)) for seed in range(3)]
    others = [made(seed) for seed in range(3)]
    before = torch.get_rng_state()
    with ThreadPoolExecutor(3) as threads:
        together = [*threads.map(fitted, others, [threading.Barrier(3)] * 3)]
    assert torch.equal(torch.get_rng_state(), before)
    for own, other in zip(alone, together, strict=True):
        assert all(map(torch.equal, own, other))


def test_an_error_in_the_callers_callback_leaves_flags_and_random_states(stored: tuple[ImageSet, FeatureStore]) -> None:
    images, store = stored
    learn = learner(images, store)
    states, before = random_states(), flags(learn)

    def stop(record: dict[str, float]) -> None:
        raise RuntimeError(f"enough after epoch {record['epoch']}")

    with pytest.raises(RuntimeError, match="enough after epoch 1"):
        learn.fit(5, lr=1e-2, on_epoch_end=stop)
    assert torch.equal(states[0], random_states()[0])
    assert flags(learn) == before


def test_the_best_epoch_is_kept_and_evaluates_as_recorded(stored: tuple[ImageSet, FeatureStore]) -> None:
    images, store = stored
    states: list[dict[str, Tensor]] = []
    learn = learner(images, store)
    history = learn.fit(
        8, lr=0.05, schedule="constant", keep="best", on_epoch_end=lambda record: states.append(weights(learn))
    )
    losses = history.frame()["valid_loss"]
    assert history.best_epoch == int(np.argmin(losses)) < 7, "choose a rate that overfits"
    assert same(weights(learn), states[history.best_epoch])
    assert not same(weights(learn), states[-1])
    scores = learn.evaluate("valid")
    assert {name: scores[name] for name in ("accuracy", "f1")} == {
        name: history.best[name] for name in ("accuracy", "f1")
    }
    assert scores["loss"] == history.best["valid_loss"]
    last = learner(images, store)
    last.fit(8, lr=0.05, schedule="constant")
    assert same(weights(last), states[-1])


def test_without_validation_the_last_epoch_is_the_best(stored: tuple[ImageSet, FeatureStore]) -> None:
    images, store = stored
    learn = learner(images.with_splits(["train"] * len(images)), store)
    history = learn.fit(3, lr=1e-2, keep="best")
    assert history.best_epoch == 2
    assert "valid_loss" not in history.last


def test_an_epoch_whose_validation_loss_is_no_number_is_never_the_best(stored: tuple[ImageSet, FeatureStore]) -> None:
    images, store = stored
    scored = 0

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        nonlocal scored
        scored += not torch.is_grad_enabled() or not logits.requires_grad
        is_first = scored == 1 and not logits.requires_grad
        return F.cross_entropy(logits, targets) * (math.nan if is_first else 1.0)

    history = learner(images, store, loss=loss).fit(3, lr=1e-3, keep="best")
    assert math.isnan(history.records[0]["valid_loss"])
    assert history.best_epoch > 0


def test_a_loss_that_is_no_number_stops_the_fit_before_the_weights_are_spoilt(
    stored: tuple[ImageSet, FeatureStore],
) -> None:
    images, store = stored
    learn = learner(images, store, loss=lambda logits, targets: logits.sum() * math.nan)
    before = {name: value for name, value in weights(learn).items() if "running" not in name and "num_" not in name}
    with pytest.raises(FloatingPointError, match=r"The training loss became nan\. Lower the learning rate"):
        learn.fit(1, lr=1e-3)
    assert same(before, weights(learn))


def test_each_epoch_is_told_as_it_ends(stored: tuple[ImageSet, FeatureStore]) -> None:
    images, store = stored
    told: list[dict[str, float]] = []
    history = learner(images, store).fit(3, lr=1e-2, on_epoch_end=told.append)
    assert told == history.records
    assert [record["epoch"] for record in told] == [1, 2, 3]
    assert list(history.frame()) == ["epoch", "train_loss", "lr", "valid_loss", "accuracy", "f1", "seconds"]
    assert history.last == told[-1]


def test_two_fits_go_on_with_new_orders_as_one_fit_would(stored: tuple[ImageSet, FeatureStore]) -> None:
    images, store = stored
    once, twice = (learner(images, store, optimizer=plain_sgd) for _ in range(2))
    once.fit(2, lr=1e-2, schedule="constant")
    twice.fit(1, lr=1e-2, schedule="constant")
    second = twice.fit(1, lr=1e-2, schedule="constant")
    assert second.records[0]["epoch"] == 2
    assert twice.history.losses == once.history.losses
    assert same(weights(twice), weights(once))


def test_a_part_that_keeps_itself_in_eval_mode_is_left_there(stored: tuple[ImageSet, FeatureStore]) -> None:
    class KeptNorm(nn.BatchNorm1d):
        def train(self, mode: bool = True) -> KeptNorm:
            super().train(False)
            return self

    images, store = stored
    own = nn.Sequential(KeptNorm(24), nn.Linear(24, 3))
    learn = learner(images, store, head=own)
    before = copy.deepcopy(learn.model.head)
    learn.fit(1, lr=1e-2)
    assert before is not None
    assert learn.model.head is not None
    assert torch.equal(before[0].running_mean, learn.model.head[0].running_mean)  # type: ignore[index]
    assert not torch.equal(before[1].weight, learn.model.head[1].weight)  # type: ignore[index]


def test_fewer_batches_than_planned_end_the_schedule_early_and_nothing_else(tmp_path: Path) -> None:
    root = photos(tmp_path / "photos", 12)
    for name in ("cat/2.jpg", "cat/4.jpg", "cat/8.jpg", "dog/1.jpg", "dog/5.jpg"):
        (root / name).write_bytes((root / name).read_bytes()[:300])
    images = ImageSet.from_folder(root)
    learn = learner(images, None, head=nn.Linear(24, 2), on_error="skip", batch_size=2)
    history = learn.fit(2, lr=1e-2)
    assert len(history.losses) == 6  # 7 images: 2, 2, 3 an epoch, where 12 images make 6 batches
    with pytest.raises(FeatureStoreError, match=r"cat/[248]\.jpg|dog/[15]\.jpg"):
        learner(images, None, head=nn.Linear(24, 2), batch_size=2).fit(1, lr=1e-2)


def test_not_one_readable_image_is_said_and_not_divided_by(tmp_path: Path) -> None:
    root = photos(tmp_path / "photos", 6)
    for path in root.rglob("*.*"):
        path.write_bytes(path.read_bytes()[:300])
    learn = learner(ImageSet.from_folder(root), None, head=nn.Linear(24, 2), on_error="skip", batch_size=2)
    with pytest.raises(FeatureStoreError, match=r"Not one of 6 images could be read \(first: "):
        learn.fit(1, lr=1e-2)
    with pytest.raises(FeatureStoreError, match="Not one of 6 images"):
        learn.lr_find()


def test_what_to_keep_has_two_names(stored: tuple[ImageSet, FeatureStore]) -> None:
    images, store = stored
    with pytest.raises(ValueError, match="keep is 'worst'; expected last or best"):
        learner(images, store).fit(1, lr=1e-2, keep="worst")  # type: ignore[arg-type]


@pytest.mark.parametrize("task", ["single", "multi"])
def test_scores_are_over_all_rows_at_once_not_means_of_batches(task: str) -> None:
    labels: Any = [row % 3 for row in range(20)]
    if task == "multi":
        labels = (np.arange(60).reshape(20, 3) % 7 % 2).astype(np.int64)
    images = ImageSet.from_arrays(pixels(20), labels, task=task, splits=["train"] * 9 + ["valid"] * 11)  # type: ignore[arg-type]
    scores = [learner(images, None, batch_size=size).evaluate("valid") for size in (1, 4, 64)]
    for each in scores[1:]:
        assert each == pytest.approx(scores[0], rel=1e-5)
    assert scores[0]["images"] == 11


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_random_states_of_gpus_are_as_they_were() -> None:
    images = ImageSet.from_arrays(pixels(8), [row % 3 for row in range(8)])
    for device in ("cpu", "cuda"):
        learn = Learner(staged(), images, None, cut="layer2", head=head(), batch_size=4, device=device, quiet=True)
        before = torch.get_rng_state(), torch.cuda.get_rng_state()
        learn.fit(1, lr=1e-2)
        assert torch.equal(before[0], torch.get_rng_state())
        assert torch.equal(before[1], torch.cuda.get_rng_state())


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_loss_with_weights_on_the_gpu_scores_there_too() -> None:
    images = ImageSet.from_arrays(pixels(8), [row % 3 for row in range(8)], splits=["train"] * 5 + ["valid"] * 3)
    loss = nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 3.0], device="cuda"))
    learn = Learner(staged(), images, None, cut="layer2", head=head(), loss=loss, device="cuda", quiet=True)
    assert learn.fit(1, lr=1e-2).last["valid_loss"] == learn.evaluate("valid")["loss"]


def test_a_fit_refused_for_its_arguments_has_trained_on_nothing(stored: tuple[ImageSet, FeatureStore]) -> None:
    images, store = stored
    learn = learner(images, store)
    wrongs: list[dict[str, Any]] = [{"lr": (1e-3,) * 5}, {"schedule": "cycle"}, {"keep": "worst"}]
    for wrong in wrongs:
        with pytest.raises(ValueError, match=r"lr has 5|schedule|keep"):
            learn.fit(1, **{"lr": 1e-2, **wrong})
    assert learn.read_from is None
    learn.images = images.with_splits(np.roll(images.splits, VALID))
    learn.fit(1, lr=1e-2)
