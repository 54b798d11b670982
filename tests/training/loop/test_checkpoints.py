"""A fit that was interrupted and goes on ends as the unbroken one, to the bit; and no other fit goes on from it."""

from __future__ import annotations

import math
import signal
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.full_disk import largest_file
from support.tiny import NormedHead, photos, pixels, staged
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from featstore import Augment, FeatureStore, FeatureStoreError, ImageSet, extract
from featstore.errors import DamagedFileError, FactsDifferError
from featstore.models.runs import new_run, read_run, write_run
from training import EMA, SWA, History, Learner
from training.loop.interrupts import held_back

pytestmark = pytest.mark.usefixtures("heeds_signals")

TRAIN, VALID = 21, 6

Change = Callable[[], Learner]


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> tuple[ImageSet, FeatureStore]:
    store = FeatureStore(tmp_path_factory.mktemp("features"))
    options: dict[str, Any] = {"dtype": "float32", "device": "cpu", "workers": 0}
    extract(staged(), some_images(), store, cuts=["layer1:none", "layer2"], **options)
    extract(staged(), some_images(), store, cuts=["layer2"], augment=Augment("flip", seeds=range(3)), **options)
    return some_images(), store


def some_images(first_class: int = 0) -> ImageSet:
    classes = [first_class, *(row % 3 for row in range(1, TRAIN + VALID))]
    return ImageSet.from_arrays(pixels(TRAIN + VALID), classes, splits=["train"] * TRAIN + ["valid"] * VALID)


class Interrupting:
    """Cross-entropy, in whose call number `at` somebody presses Ctrl-C."""

    def __init__(self, at: int | None = None, by: signal.Signals = signal.SIGINT) -> None:
        self.at, self.by, self.calls = at, by, 0

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        self.calls += logits.requires_grad
        if self.calls == self.at and logits.requires_grad:
            signal.raise_signal(self.by)
        return F.cross_entropy(logits, targets)


def learner(
    images: ImageSet, store: FeatureStore | None = None, *, freeze_to: str = "layer2", **options: Any
) -> Learner:
    settings: dict[str, Any] = {"cut": "layer2", "head": NormedHead(3, dropout=0.5), "batch_size": 8, **options}
    learn = Learner(staged(), images, store, device="cpu", workers=0, quiet=True, **settings)
    learn.freeze_to(freeze_to)
    return learn


def weights(learn: Learner) -> dict[str, Tensor]:
    return {name: each.clone() for name, each in (*learn.model.named_parameters(), *learn.model.named_buffers())}


def assert_same(learn: Learner, history: History, expected: Learner, all_of_it: History) -> None:
    ours, theirs = weights(learn), weights(expected)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name
    assert history.steps() == all_of_it.steps()
    assert history.best_epoch == all_of_it.best_epoch
    for ours_, theirs_ in zip(history.records, all_of_it.records, strict=True):
        assert {**ours_, "seconds": 0} == {**theirs_, "seconds": 0}
        assert isinstance(ours_["epoch"], int)


def own_sgd(groups: Iterable[dict[str, Any]]) -> Optimizer:
    return SGD(groups, lr=1.0, momentum=0.9, nesterov=True)


FITS: dict[str, tuple[bool, dict[str, Any], dict[str, Any]]] = {
    "features": (True, {}, {}),
    "stored_views": (True, {"augment": Augment("flip", seeds=range(3))}, {"keep": "best"}),
    "stored_maps_and_sgd": (True, {"freeze_to": "layer1", "optimizer": "sgd", "batch_size": 6}, {"lr": (1e-3, 1e-2)}),
    "a_linear_head_of_several_passes_and_the_finders_rate": (True, {"head": "linear"}, {"lr": None}),
    "several_batches_a_step_and_a_mean_of_weights": (
        True,
        {"batch_size": 3},
        {
            "accumulate": 2,
            "average": EMA(0.7),
            "clip": 0.1,
            "precision": "fp16",
            "patience": 5,
            "monitor": "train_loss",
        },
    ),
    "a_mean_of_epochs": (True, {}, {"average": SWA(start=0.3), "schedule": "constant"}),
    "fresh_views": (
        False,
        {"augment": Augment("side_on", seeds="fresh"), "optimizer": own_sgd, "freeze_to": "layer1"},
        {"keep": "best", "schedule": "cosine"},
    ),
}


@pytest.mark.parametrize("name", FITS)
def test_a_fit_interrupted_anywhere_ends_as_the_unbroken_one(
    stored: tuple[ImageSet, FeatureStore], tmp_path: Path, name: str
) -> None:
    has_store, options, arguments = FITS[name]
    given = (stored[0], stored[1] if has_store else None)
    arguments = {"lr": 1e-2, **arguments}
    expected = learner(*given, loss=Interrupting(), **options)
    all_of_it = expected.fit(3, **arguments)
    an_epoch = len(all_of_it.losses) // 3
    path = tmp_path / "fit"
    for stop in (1, an_epoch, an_epoch + 2, len(all_of_it.losses) - 1) if name == "features" else (an_epoch + 2,):
        # The finder's own calls come before, and Ctrl-C there is what it always was.
        loss = Interrupting(stop + finders_calls(given, options, arguments))
        state = torch.get_rng_state()
        with pytest.raises(KeyboardInterrupt) as interrupt:
            learner(*given, loss=loss, **options).fit(3, **arguments, checkpoint=path)
        assert str(path) in interrupt.value.__notes__[0]
        assert torch.equal(torch.get_rng_state(), state)
        learn = learner(*given, loss=Interrupting(), **options)
        history = learn.fit(3, **arguments, checkpoint=path, resume=True)
        assert_same(learn, history, expected, all_of_it)
        # The fit is whole, and asking for it once more gives it without a step.
        again = learner(*given, loss=Interrupting(1), **options)
        assert_same(again, again.fit(3, **arguments, checkpoint=path, resume=True), expected, all_of_it)
        delete(path)


def finders_calls(given: tuple[ImageSet, FeatureStore | None], options: Any, arguments: Any) -> int:
    if arguments["lr"] is not None:
        return 0
    loss = Interrupting()
    learn = learner(*given, loss=loss, **options)
    history = learn.fit(3, **arguments)
    return loss.calls - len(history.losses)


def delete(path: Path) -> None:
    for each in path.iterdir():
        each.unlink()
    path.rmdir()


def test_a_fit_interrupted_over_and_over_ends_as_the_unbroken_one(
    stored: tuple[ImageSet, FeatureStore], tmp_path: Path
) -> None:
    expected = learner(*stored, loss=Interrupting())
    all_of_it = expected.fit(3, lr=1e-2)
    interrupts = 0
    while True:
        learn = learner(*stored, loss=Interrupting(2))
        try:
            history = learn.fit(3, lr=1e-2, checkpoint=tmp_path / "fit", resume=True)
        except KeyboardInterrupt:
            interrupts += 1
        else:
            break
    assert interrupts == 4  # of nine steps, two each
    assert_same(learn, history, expected, all_of_it)


def test_the_learner_that_was_interrupted_goes_on_itself(stored: tuple[ImageSet, FeatureStore], tmp_path: Path) -> None:
    expected = learner(*stored, loss=Interrupting())
    expected.fit(1, lr=1e-3)
    all_of_it = expected.fit(3, lr=1e-2)
    loss = Interrupting(8)  # in the second fit
    learn = learner(*stored, loss=loss)
    learn.fit(1, lr=1e-3)
    with pytest.raises(KeyboardInterrupt):
        learn.fit(3, lr=1e-2, checkpoint=tmp_path / "fit")
    history = learn.fit(3, lr=1e-2, checkpoint=tmp_path / "fit", resume=True)
    assert_same(learn, history, expected, all_of_it)
    assert [record["epoch"] for record in learn.history.records] == [1, 2, 3, 4]
    with pytest.raises(
        FactsDifferError, match=r"starting weights .* Make the learner anew \(or load"
    ):  # it would count the epochs twice
        learn.fit(3, lr=1e-2, checkpoint=tmp_path / "fit", resume=True)


def test_what_its_own_learner_went_on_with_another_can_go_on_with(
    stored: tuple[ImageSet, FeatureStore], tmp_path: Path
) -> None:
    expected = learner(*stored, loss=Interrupting())
    all_of_it = expected.fit(3, lr=1e-2)
    loss = Interrupting(2)
    learn = learner(*stored, loss=loss)
    for at in (2, 5):
        loss.at = at
        with pytest.raises(KeyboardInterrupt):
            learn.fit(3, lr=1e-2, checkpoint=tmp_path / "fit", resume=True)
    for _ in range(2):  # from within an epoch, and from the end
        learn = learner(*stored, loss=Interrupting())
        assert_same(learn, learn.fit(3, lr=1e-2, checkpoint=tmp_path / "fit", resume=True), expected, all_of_it)


def test_images_that_cannot_be_read_are_left_out_of_the_same_batches(tmp_path: Path) -> None:
    images = ImageSet.from_folder(photos(tmp_path / "photos", 14)).split(valid=0.25, seed=0)
    ids = list(images.train.ids)
    (tmp_path / "photos" / ids[3]).write_bytes(b"no image")
    (tmp_path / "photos" / ids[7]).write_bytes(b"no image")

    def made(at: int | None = None) -> Learner:
        loss = Interrupting(at)
        learn = learner(images, head="concat", on_error="skip", batch_size=3, loss=loss)
        learn.unfreeze()  # else the frozen part reads more than a batch at a time
        return learn

    expected = made()
    all_of_it = expected.fit(2, lr=1e-2)
    for stop in (2, 3, 5):
        with pytest.raises(KeyboardInterrupt):
            made(stop).fit(2, lr=1e-2, checkpoint=tmp_path / f"fit{stop}")
        learn = made()
        history = learn.fit(2, lr=1e-2, checkpoint=tmp_path / f"fit{stop}", resume=True)
        assert_same(learn, history, expected, all_of_it)


@pytest.mark.parametrize("by", [signal.SIGTERM, signal.SIGHUP])
def test_other_signals_end_a_fit_after_its_step_too_and_do_what_they_did(
    stored: tuple[ImageSet, FeatureStore], tmp_path: Path, by: signal.Signals
) -> None:
    class EndedError(Exception):
        pass

    def end(*_: object) -> None:
        raise EndedError

    before = signal.signal(by, end)
    try:
        with pytest.raises(EndedError):
            learner(*stored, loss=Interrupting(2, by)).fit(3, lr=1e-2, checkpoint=tmp_path / "fit")
        assert signal.getsignal(by) is end
        signal.signal(by, lambda *_: None)  # somebody who notes it and goes on: the fit has ended all the same
        with pytest.raises(KeyboardInterrupt):
            learner(*stored, loss=Interrupting(2, by)).fit(3, lr=1e-2, checkpoint=tmp_path / "fit", resume=True)
    finally:
        signal.signal(by, before)
    learn, expected = learner(*stored, loss=Interrupting()), learner(*stored, loss=Interrupting())
    history = learn.fit(3, lr=1e-2, checkpoint=tmp_path / "fit", resume=True)
    assert_same(learn, history, expected, expected.fit(3, lr=1e-2))


def test_a_second_signal_ends_at_once(
    stored: tuple[ImageSet, FeatureStore], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.loop.interrupts.TWICE_SECONDS", 0)
    before = signal.getsignal(signal.SIGINT)

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("it went on")

    with pytest.raises(KeyboardInterrupt):
        learner(*stored, loss=loss).fit(1, lr=1e-2, checkpoint=tmp_path / "fit")
    assert not (tmp_path / "fit").exists()
    assert signal.getsignal(signal.SIGINT) is before


def test_what_differs_from_the_fit_that_was_begun_is_named(
    stored: tuple[ImageSet, FeatureStore], tmp_path: Path
) -> None:
    images, store = stored
    path = tmp_path / "fit"
    with pytest.raises(KeyboardInterrupt):
        learner(images, store, loss=Interrupting(4)).fit(3, lr=1e-2, checkpoint=path)

    def refused(fact: str, learn: Learner | None = None, epochs: int = 3, **arguments: Any) -> None:
        learn = learn or learner(images, store, loss=Interrupting())
        before = weights(learn)
        with pytest.raises(FactsDifferError) as error:
            learn.fit(epochs, **{"lr": 1e-2, "checkpoint": path, "resume": True, **arguments})
        message = str(error.value)
        assert message.startswith(f"The checkpoint {path} is of another fit than this one; it differs in: {fact} (")
        assert message.count(" there, ") == 1, message
        assert all(torch.equal(value, before[name]) for name, value in weights(learn).items())

    refused("epochs", epochs=4)
    refused("lr", lr=2e-2)
    refused("lr", lr=None)
    refused("schedule", schedule="constant")
    refused("weight_decay", weight_decay=0.1)
    refused("keep", keep="best")
    same: dict[str, Any] = {"loss": Interrupting()}
    refused("batch_size", learner(images, store, **same, batch_size=7))
    refused("seed", learner(images, store, **same, seed=1))
    refused("optimizer", learner(images, store, **same, optimizer="sgd"))
    refused("loss", learner(images, store))
    refused("training images", learner(some_images(first_class=2), store, **same))
    refused("training images", learner(images, store, **same, augment=Augment("flip", seeds=range(3))))
    refused("validation images", learner(images.select([*range(TRAIN), TRAIN + 2]), store, **same))
    other = NormedHead(3, dropout=0.5)
    with torch.no_grad():
        other.fc.bias[0] += 1e-3
    refused("starting weights", learner(images, store, **same, head=other))
    learn = learner(images, store, loss=Interrupting())
    learn.fit(3, lr=1e-2, checkpoint=path, resume=True)


def smoothed(by: float) -> Any:
    return lambda logits, targets: F.cross_entropy(logits, targets, label_smoothing=by)


def hits(logits: Tensor, targets: Tensor) -> Tensor:
    return (logits.argmax(1) == targets).float().mean()


@pytest.mark.parametrize(
    ("fact", "begun", "asked"),
    [
        ("loss", {"loss": smoothed(0.1)}, {"loss": smoothed(0.5)}),
        (
            "loss",
            {"loss": partial(F.cross_entropy, label_smoothing=0.1)},
            {"loss": partial(F.cross_entropy, label_smoothing=0.5)},
        ),
        ("loss", {"loss": nn.CrossEntropyLoss()}, {"loss": nn.CrossEntropyLoss(label_smoothing=0.1)}),
        ("loss", {"loss": nn.CrossEntropyLoss()}, {"loss": nn.CrossEntropyLoss(weight=torch.ones(3))}),
        ("loss", {"loss": lambda a, b: F.cross_entropy(a, b)}, {"loss": lambda a, b: F.cross_entropy(2 * a, b)}),
        ("optimizer", {"optimizer": lambda groups: AdamW(groups)}, {"optimizer": lambda groups: SGD(groups)}),
        (
            "optimizer",
            {"optimizer": partial(AdamW, betas=(0.8, 0.9))},
            {"optimizer": partial(AdamW, betas=(0.9, 0.9))},
        ),
        ("trained modules", {}, {"head": NormedHead(3, dropout=0.1)}),
        ("metrics", {}, {"metrics": [hits]}),
    ],
)
def test_fits_of_other_code_or_settings_are_told_apart(
    stored: tuple[ImageSet, FeatureStore], tmp_path: Path, fact: str, begun: dict[str, Any], asked: dict[str, Any]
) -> None:
    def fit(options: dict[str, Any]) -> None:
        learner(*stored, **options).fit(1, lr=1e-3, checkpoint=tmp_path / "fit", resume=True)

    fit(begun)
    with pytest.raises(FactsDifferError, match=rf"it differs in: {fact} \([^;]*$"):
        fit(asked)
    fit(begun)


def test_parameters_without_gradients_are_another_fit(stored: tuple[ImageSet, FeatureStore], tmp_path: Path) -> None:
    learner(*stored).fit(1, lr=1e-3, checkpoint=tmp_path / "fit")
    learn = learner(*stored)
    next(learn.model.stages[-1].parameters()).requires_grad_(False)
    with pytest.raises(FactsDifferError, match=r"it differs in: trained parameters \(4 in 2 groups, .* there"):
        learn.fit(1, lr=1e-3, checkpoint=tmp_path / "fit", resume=True)


def test_frozen_weights_are_part_of_what_a_fit_is(tmp_path: Path) -> None:
    def made(seed: int, at: int | None = None) -> Learner:
        settings: dict[str, Any] = {
            "cut": "layer2",
            "head": NormedHead(3, dropout=0.5),
            "batch_size": 8,
            "loss": Interrupting(at),
        }
        return Learner(staged(seed), some_images(), device="cpu", workers=0, quiet=True, **settings)

    with pytest.raises(KeyboardInterrupt):
        made(0, 2).fit(1, lr=1e-2, checkpoint=tmp_path / "fit")
    with pytest.raises(FactsDifferError, match="differs in: frozen weights"):
        made(1).fit(1, lr=1e-2, checkpoint=tmp_path / "fit", resume=True)


def test_a_checkpoint_is_neither_overwritten_nor_taken_for_a_run(
    stored: tuple[ImageSet, FeatureStore], tmp_path: Path
) -> None:
    path = tmp_path / "fit"
    with pytest.raises(KeyboardInterrupt):
        learner(*stored, loss=Interrupting(4)).fit(3, lr=1e-2, checkpoint=path)
    before = {each.name: each.read_bytes() for each in path.iterdir()}
    with pytest.raises(
        FeatureStoreError, match=r"holds a fit, 1 of 3 epochs and 1 steps done\. Go on with it: --resume"
    ):
        learner(*stored).fit(3, lr=1e-2, checkpoint=path)
    with pytest.raises(FeatureStoreError, match="is a checkpoint of a fit that isn't done, and no saved run"):
        Learner.load(path)
    run = learner(*stored).save(tmp_path / "run")
    for resume in (False, True):
        with pytest.raises(FeatureStoreError, match="is a saved run and no checkpoint"):
            learner(*stored).fit(1, lr=1e-2, checkpoint=run, resume=resume)
    with pytest.raises(ValueError, match="resume needs a checkpoint"):
        learner(*stored).fit(1, lr=1e-2, resume=True)
    with pytest.raises(TypeError, match="checkpoint is 3; expected a folder's name, or None"):
        learner(*stored).fit(1, lr=1e-2, checkpoint=3)  # type: ignore[arg-type]
    assert {each.name: each.read_bytes() for each in path.iterdir()} == before


def test_a_damaged_checkpoint_is_found(stored: tuple[ImageSet, FeatureStore], tmp_path: Path) -> None:
    path = tmp_path / "fit"
    learner(*stored).fit(1, lr=1e-2, checkpoint=path)
    for name in ("model.safetensors", "model.json"):
        content = (path / name).read_bytes()
        (path / name).write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
        with pytest.raises(DamagedFileError, match=name):
            learner(*stored).fit(1, lr=1e-2, checkpoint=path, resume=True)
        (path / name).write_bytes(content)


def test_a_checkpoint_that_kept_no_rates_is_gone_on_with(stored: tuple[ImageSet, FeatureStore], tmp_path: Path) -> None:
    def stop(_: object) -> None:
        raise KeyboardInterrupt

    expected = learner(*stored).fit(2, lr=1e-2)
    with pytest.raises(KeyboardInterrupt):
        learner(*stored).fit(2, lr=1e-2, checkpoint=tmp_path / "fit", on_epoch_end=stop)
    run = read_run(tmp_path / "fit")
    tensors = {name: each for name, each in run.tensors.items() if name not in ("lrs", "momenta")}
    assert len(tensors) == len(run.tensors) - 2
    with new_run(tmp_path / "fit", overwrite=True) as made:
        write_run(made, run.facts, tensors)
    history = learner(*stored).fit(2, lr=1e-2, checkpoint=tmp_path / "fit", resume=True)
    assert history.losses == expected.losses
    half = len(expected.losses) // 2
    assert np.isnan(history.steps()["lr"][:half]).all()
    assert history.steps()["lr"][half:] == expected.steps()["lr"][half:]


class Counting(SGD):
    """Keeps in its groups how often it stepped, as optimizers without a schedule do, and what no JSON has."""

    def __init__(self, groups: Iterable[dict[str, Any]], kept: Any = math.inf) -> None:
        super().__init__([{**group, "k": 0, "kept": kept, "pair": (1, 2)} for group in groups], lr=1.0)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            assert isinstance(group["pair"], tuple)
            group["k"] += 1
            group["lr"] /= group["k"]
            self.state[group["params"][0]]["places"] = group["k"]
        super().step(closure)


def test_what_an_optimizer_keeps_in_its_groups_goes_on_too(
    stored: tuple[ImageSet, FeatureStore], tmp_path: Path
) -> None:
    expected = learner(*stored, optimizer=Counting, loss=Interrupting())
    all_of_it = expected.fit(2, lr=0.1)
    with pytest.raises(KeyboardInterrupt):
        learner(*stored, optimizer=Counting, loss=Interrupting(2)).fit(2, lr=0.1, checkpoint=tmp_path / "fit")
    learn = learner(*stored, optimizer=Counting, loss=Interrupting())
    assert_same(learn, learn.fit(2, lr=0.1, checkpoint=tmp_path / "fit", resume=True), expected, all_of_it)
    with pytest.raises(FeatureStoreError, match="Counting keeps what a checkpoint can't hold"):
        learner(
            *stored,
            optimizer=lambda groups: Counting(groups, kept=object()),
            loss=lambda *_: pytest.fail("it has trained"),
        ).fit(1, lr=0.1, checkpoint=tmp_path / "other")


class PressedWhileSaving(SGD):
    """In whose second saving, the first of an epoch, somebody presses Ctrl-C."""

    saved = 0

    def state_dict(self) -> Any:
        PressedWhileSaving.saved += 1
        if PressedWhileSaving.saved == 2:
            signal.raise_signal(signal.SIGINT)
        return super().state_dict()


def test_a_full_disk_and_a_signal_leave_a_whole_checkpoint(
    stored: tuple[ImageSet, FeatureStore], tmp_path: Path
) -> None:
    expected, path = learner(*stored, optimizer=PressedWhileSaving), tmp_path / "fit"
    all_of_it = expected.fit(3, lr=1e-2)
    PressedWhileSaving.saved = 0
    with pytest.raises(KeyboardInterrupt) as interrupt:
        learner(*stored, optimizer=PressedWhileSaving).fit(3, lr=1e-2, checkpoint=path)
    assert str(path) in interrupt.value.__notes__[0]
    before = {each.name: each.read_bytes() for each in path.iterdir()}
    with largest_file(1_000), pytest.raises(OSError, match=f"too large: '{path}/"):
        learner(*stored, optimizer=PressedWhileSaving).fit(3, lr=1e-2, checkpoint=path, resume=True)
    assert {each.name: each.read_bytes() for each in path.iterdir()} == before
    assert [each.name for each in tmp_path.iterdir()] == ["fit"]
    learn = learner(*stored, optimizer=PressedWhileSaving)
    assert_same(learn, learn.fit(3, lr=1e-2, checkpoint=path, resume=True), expected, all_of_it)


def test_a_loss_that_is_no_number_is_kept_as_it_is(stored: tuple[ImageSet, FeatureStore], tmp_path: Path) -> None:
    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits, targets) if logits.requires_grad else logits.sum() * math.nan

    learner(*stored, loss=loss).fit(1, lr=1e-2, checkpoint=tmp_path / "fit", keep="best")
    history = learner(*stored, loss=loss).fit(1, lr=1e-2, checkpoint=tmp_path / "fit", resume=True, keep="best")
    assert math.isnan(history.last["valid_loss"])


def test_a_signal_in_the_last_validation_leaves_the_learner_whole(
    stored: tuple[ImageSet, FeatureStore], tmp_path: Path
) -> None:
    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        if not logits.requires_grad:
            signal.raise_signal(signal.SIGINT)
        return F.cross_entropy(logits, targets)

    learn, expected = learner(*stored, loss=loss), learner(*stored, loss=Interrupting())
    with pytest.raises(KeyboardInterrupt):
        learn.fit(1, lr=1e-2, checkpoint=tmp_path / "fit", keep="best")
    assert_same(learn, learn.history, expected, expected.fit(1, lr=1e-2, keep="best"))


def test_epochs_are_counted_from_where_the_fit_began(stored: tuple[ImageSet, FeatureStore], tmp_path: Path) -> None:
    loss = Interrupting(8)
    learn = learner(*stored, loss=loss)
    learn.fit(1, lr=1e-2)
    with pytest.raises(KeyboardInterrupt):
        learn.fit(3, lr=1e-2, checkpoint=tmp_path / "fit")
    learn.history = History()  # as of a learner that was loaded from a run
    history = learn.fit(3, lr=1e-2, checkpoint=tmp_path / "fit", resume=True)
    assert [record["epoch"] for record in history.records] == [2, 3, 4]


def test_resume_without_a_checkpoint_replaces_no_snapshots(
    stored: tuple[ImageSet, FeatureStore], tmp_path: Path
) -> None:
    learner(*stored).fit_cycles(1, lr=1e-2, snapshot=tmp_path / "cycles")
    with pytest.raises(FeatureStoreError, match="cycle-1 holds a saved run already"):
        learner(*stored).fit_cycles(1, lr=1e-2, snapshot=tmp_path / "cycles", checkpoint=tmp_path / "fit", resume=True)


def test_a_signal_is_not_lost_where_the_block_ends_by_an_error() -> None:
    def end() -> None:
        with held_back("kept"):
            signal.raise_signal(signal.SIGINT)
            raise ValueError("another")

    with pytest.raises(KeyboardInterrupt) as interrupt:
        end()
    assert isinstance(interrupt.value.__context__, ValueError)
    assert not hasattr(interrupt.value, "__notes__")
