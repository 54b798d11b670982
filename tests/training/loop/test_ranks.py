"""Processes that share a fit come to what one comes to, and one of them writes."""

from __future__ import annotations

import json
import os
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from support.processes import AS_A_MODULE, Processes
from support.tiny import NormedHead, pixels, staged
from torch import Tensor, nn

from featstore import FeatureStore, ImageSet, extract
from featstore.errors import FactsDifferError
from featstore.models.runs import read_run
from training import EMA, History, Learner
from training.inputs.batches import Batches
from training.loop import fitting
from training.loop.plan import Plan
from training.loop.ranks import is_first, joined
from training.recipes import checkpoint_of

TRAIN, VALID = 21, 7
CALL = """
import sys
from pathlib import Path
from test_ranks import fits
fits(Path(sys.argv[1]))
"""


def fits(folder: Path) -> None:
    """Fits from features and from images, and one with few images held out; each process tells what they came to."""
    found: list[Any] = []
    for reads in ("features", "images"):
        with joined("cpu") as own:
            learn, history = fitted(folder, reads, **own)
            learn.save(folder / f"run-{reads}")
            found.append([history.losses, [{**each, "seconds": 0} for each in history.records], is_first()])
    with joined("cpu") as own:
        found.append({**with_one_held_out(**own).last, "seconds": 0})
        found.append(interrupted(folder, **own))
    print(json.dumps(found))


class Ending:
    """Cross-entropy, in whose training step number `at` the second process does something."""

    def __init__(self, at: int = 0, end: Callable[[], None] = lambda: None) -> None:
        self.at, self.end, self.steps = at, end, 0

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        self.steps += logits.requires_grad
        if logits.requires_grad and self.steps == self.at and not is_first():
            self.end()
        return F.cross_entropy(logits, targets)


def dropping(loss: Ending, **own: Any) -> Learner:
    own_head = NormedHead(3, dropout=0.5)
    return Learner(staged(), some_images(), cut="layer2", head=own_head, batch_size=8, quiet=True, loss=loss, **own)


def interrupted(folder: Path, **own: Any) -> list[list[float]]:
    """The losses of a fit, and of one that a signal to the second process ended within an epoch; one stays so."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever started the tests may have it ignored
    for path in (folder / "fit", folder / "left"):
        with suppress(KeyboardInterrupt):
            loss = Ending(5, lambda: signal.raise_signal(signal.SIGINT))
            dropping(loss, **own).fit(2, lr=0.01, checkpoint=path)
    return [
        dropping(Ending(), **own).fit(2, lr=0.01).losses,
        dropping(Ending(), **own).fit(2, lr=0.01, checkpoint=folder / "fit", resume=True).losses,
    ]


def left_alone() -> None:
    """A fit whose second process is gone in its second step."""
    with joined("cpu") as own:
        dropping(Ending(2, lambda: os._exit(0)), **own).fit(1, lr=0.01)


def with_one_held_out(**own: Any) -> History:
    """A fit with fewer images to score than there are processes."""
    few = some_images().select(range(TRAIN + 1))
    learn = Learner(staged(), few, cut="layer2", head=head(), batch_size=8, quiet=True, **own)
    return learn.fit(1, lr=0.01)


def fitted(folder: Path, reads: str, **own: Any) -> Any:
    """Two fits without batch norm, whose statistics are of what each process sees."""
    store = FeatureStore(folder / "features") if reads == "features" else None
    learn = Learner(staged(), some_images(), store, cut="layer2", head=head(), batch_size=8, quiet=True, **own)
    learn.fit(1, lr=0.01, class_weights="balanced", sampling="balanced")
    return learn, learn.fit(2, lr=0.01, accumulate=2, clip=1.0, keep="best", average=EMA(0.5))


def head() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 3))


def some_images() -> ImageSet:
    labels = [min(row % 5, 2) for row in range(TRAIN + VALID)]  # of unlike size
    return ImageSet.from_arrays(pixels(TRAIN + VALID), labels, splits=["train"] * TRAIN + ["valid"] * VALID)


def as_launched(count: int) -> list[dict[str, str]]:
    """What torchrun tells each of its processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    sizes = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "OMP_NUM_THREADS": "1"}
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [{**sizes, **address, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]


def test_two_processes_fit_what_one_fits(tmp_path: Path, processes: Processes) -> None:
    store = FeatureStore(tmp_path / "features")
    extract(staged(), some_images(), store, cuts=["layer2"], dtype="float32", device="cpu", workers=0)
    started = [processes.start(CALL, str(tmp_path), environment=each) for each in as_launched(2)]
    ended = processes.end_all(started)
    assert [each.returncode for each in ended] == [0, 0], ended
    told = [json.loads(each.stdout) for each in ended]
    for place, reads in enumerate(("features", "images")):
        (first, second), (learn, history) = (each[place] for each in told), fitted(tmp_path, reads, device="cpu")
        assert (first[2], second[2]) == (True, False)
        assert first[:2] == second[:2]
        losses, records, _ = first
        assert losses == pytest.approx(history.losses, rel=1e-5)
        for ours, alone in zip(records, history.records, strict=True):
            assert ours == pytest.approx({**alone, "seconds": 0}, rel=1e-5)
        saved = read_run(tmp_path / f"run-{reads}").tensors
        for name, tensor in learn.model.tensors().items():
            assert torch.allclose(saved[name], tensor, rtol=1e-4, atol=1e-6), name
    alone = {**with_one_held_out(device="cpu").last, "seconds": 0}
    for each in told:
        assert each[2] == pytest.approx(alone, rel=1e-5)
        unbroken, resumed = each[3]
        assert resumed == unbroken
    with pytest.raises(FactsDifferError, match=r"within an epoch; it differs in: processes \(2 there, 1 here\)"):
        dropping(Ending(), device="cpu").fit(2, lr=0.01, checkpoint=tmp_path / "left", resume=True)


def test_a_process_whose_neighbour_is_gone_ends_by_a_sentence(processes: Processes) -> None:
    started = [
        processes.start("from test_ranks import left_alone; left_alone()", environment=e) for e in as_launched(2)
    ]
    first, second = processes.end_all(started)
    assert second.returncode == 0
    assert first.returncode == 1
    assert (
        "featstore.errors.FeatureStoreError: Another process of this fit has ended, or doesn't answer;" in first.stderr
    )


def test_the_command_runs_under_a_launcher(tmp_path: Path, processes: Processes) -> None:
    for row, image in enumerate(pixels(12)):
        folder = tmp_path / "photos" / "ab"[row % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{row}.png")
    arguments = [
        "training", "finetune", "--images", str(tmp_path / "photos"), "--backbone", "squeezenet1_1",
        "--weights", "none", "--size", "64", "--freeze-to", "features.10", "--lr", "1e-3", "--epochs", "1",
        "--batch-size", "4", "--out", str(tmp_path / "run"), "--device", "cpu",
    ]  # fmt: skip
    started = [processes.start(AS_A_MODULE, *arguments, environment=each) for each in as_launched(2)]
    ended = processes.end_all(started)
    assert [each.returncode for each in ended] == [0, 0], ended
    assert "valid accuracy" in ended[0].stdout
    assert ended[1].stdout == ""
    assert read_run(tmp_path / "run").facts
    assert not (tmp_path / "run.checkpoint").exists()


AGAIN = """
import os, sys, time
from test_ranks import head, some_images
from support.tiny import staged
from training import recipes

delete_fit = recipes.delete_fit


def slow(path):
    time.sleep(2)  # a large one, or one on a slow disk
    delete_fit(path)


recipes.delete_fit = slow
recipes.train_head(
    staged(), some_images(), cut="layer2", head=head(), batch_size=8, quiet=True, device="cpu", epochs=1, lr=0.01,
    out=sys.argv[1], overwrite=True,
)
"""


def test_processes_begin_once_the_fit_that_they_replace_is_gone(tmp_path: Path, processes: Processes) -> None:
    learn = Learner(staged(), some_images(), cut="layer2", head=head(), batch_size=8, device="cpu", quiet=True)
    learn.fit(1, lr=0.01, checkpoint=checkpoint_of(tmp_path / "run"))
    started = [processes.start(AGAIN, str(tmp_path / "run"), environment=each) for each in as_launched(2)]
    ended = [processes.end(each) for each in started]
    assert [each.returncode for each in ended] == [0, 0], ended
    assert read_run(tmp_path / "run").facts["passes"] == 1


@pytest.mark.parametrize(("batch_size", "sizes"), [(8, [8, 8, 5]), (6, [6, 6, 9]), (20, [21])])
def test_shares_are_all_of_each_batch(batch_size: int, sizes: list[int]) -> None:
    learn = Learner(staged(), some_images(), cut="layer2", head=head(), batch_size=batch_size, device="cpu", quiet=True)
    situation, inputs = learn._ready(Plan())
    assert inputs.train is not None
    shares = []
    for place in range(2):
        batches = Batches(inputs.train, situation, batch_size=batch_size, workers=0)
        batches.share_with(place, 2)
        shares.append([rows for rows, _ in batches.epoch(0, 0)])
    whole = Batches(inputs.train, situation, batch_size=64, workers=0)
    (everything,) = [rows for rows, _ in whole.epoch(0, 0)]
    assert [len(a) + len(b) for a, b in zip(*shares, strict=True)] == sizes
    start = 0
    for size, own, other in zip(sizes, *shares, strict=True):
        batch = everything[start : start + size]
        assert torch.equal(own, batch[0::2])
        assert torch.equal(other, batch[1::2])
        start += size
    with pytest.raises(ValueError, match="batch_size is 8, that of 5 processes together; expected at least 10"):
        Batches(inputs.train, situation, batch_size=8, workers=0).share_with(0, 5)


def test_a_process_whose_neighbour_was_interrupted_ends_as_that_does(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def stopped(*_: object) -> Iterator[dict[str, Any]]:
        yield {"should_stop": lambda: True}  # what a neighbour's signal comes to here

    monkeypatch.setattr(fitting, "interruptible", stopped)
    learn = Learner(staged(), some_images(), cut="layer2", head=head(), batch_size=8, device="cpu", quiet=True)
    with pytest.raises(KeyboardInterrupt, match="another process of this fit was interrupted"):
        learn.fit(2, lr=0.01)
    assert not learn.history.records
