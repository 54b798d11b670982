"""Trackers: what the libraries themselves read back of a fit is its history. Those that are large may be missing."""

from __future__ import annotations

import importlib
import json
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from support.tiny import pixels, staged

from featstore import FeatureStoreError, ImageSet
from training import Learner, trackers
from training.loop.history import Record


def learner() -> Learner:
    images = ImageSet.from_arrays(pixels(8), [row % 3 for row in range(8)], splits=["train"] * 5 + ["valid"] * 3)
    return Learner(staged(), images, device="cpu", workers=0, quiet=True)


def fitted(tracker: trackers.Tracker) -> dict[str, list[float]]:
    """Column -> values of the epochs of a fit that was told to `tracker`, which is closed by now."""
    told: list[Record] = []
    with tracker:
        history = learner().fit(2, lr=1e-2, on_epoch_end=[told.append, tracker])
    assert told == history.records
    return {name: values for name, values in history.frame().items() if name != "epoch"}


def test_tensorboard_reads_back_each_number_at_its_epoch(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    expected = fitted(trackers.TensorBoard(tmp_path / "run"))
    events = EventAccumulator(str(tmp_path / "run")).Reload()
    assert {*events.Tags()["scalars"]} == expected.keys()
    for name, values in expected.items():
        scalars = events.Scalars(name)
        assert [each.step for each in scalars] == [1, 2]
        assert [each.value for each in scalars] == pytest.approx(values, rel=1e-6)  # they are float32 there


@pytest.mark.filterwarnings("ignore")  # of what MLflow uses
def test_mlflow_reads_back_each_number_at_its_epoch(tmp_path: Path) -> None:
    mlflow = pytest.importorskip("mlflow")
    for needed in ("sqlalchemy", "alembic"):  # of its store in a file
        pytest.importorskip(needed)
    uri = f"sqlite:///{tmp_path / 'runs.db'}"
    tracker = trackers.MLflow("heads", uri=uri, name="first")
    expected = fitted(tracker)
    trackers.MLflow("heads", uri=uri).close(is_whole=False)
    client = mlflow.MlflowClient(tracking_uri=uri)
    run = client.get_run(tracker.run)
    assert (run.info.status, run.info.run_name) == ("FINISHED", "first")
    assert {*run.data.metrics} == expected.keys()
    for name, values in expected.items():
        assert [(each.step, each.value) for each in client.get_metric_history(tracker.run, name)] == [
            (1, values[0]),
            (2, values[1]),
        ]
    runs = client.search_runs([run.info.experiment_id])
    assert sorted(each.info.status for each in runs) == ["FAILED", "FINISHED"]


def test_wandb_keeps_each_number_at_its_epoch(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    tracker = trackers.WandB(project="heads", mode="offline", dir=str(tmp_path))
    expected = fitted(tracker)
    (file,) = tmp_path.rglob("run-*.wandb")
    until = time.monotonic() + 20
    while b"valid_loss" not in (content := file.read_bytes()) and time.monotonic() < until:
        time.sleep(0.1)  # a process of wandb's own writes it
    # It is a log of records, whose values are JSON; wandb has no reader of it.
    for name, values in expected.items():
        assert name.encode() in content
        assert all(json.dumps(value).encode() in content for value in values)


def test_trackio_reads_back_each_number_at_its_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))
    trackio = pytest.importorskip("trackio")
    expected = fitted(trackers.Trackio(project="heads", name="first", embed=False))
    (run,) = trackio.Api().runs("heads")
    storage = importlib.import_module("trackio.sqlite_storage").SQLiteStorage
    logs = storage.get_logs("heads", "first", run_id=run.id)
    assert [each["step"] for each in logs] == [1, 2]
    assert {name: [each[name] for each in logs] for name in expected} == expected


@pytest.mark.parametrize(
    ("library", "make"),
    [
        ("tensorboard", lambda: trackers.TensorBoard("logs")),
        ("wandb", trackers.WandB),
        ("mlflow", lambda: trackers.MLflow("heads")),
        ("trackio", trackers.Trackio),
    ],
)
def test_a_tracker_whose_library_is_missing_says_what_to_install(
    library: str, make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard" if library == "tensorboard" else library, None)
    with pytest.raises(FeatureStoreError, match=rf"needs {library}, .* pip install 'featstore\[{library}\]'"):
        make()


def test_of_several_processes_the_first_alone_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    class Heard(trackers.Tracker):
        def __init__(self) -> None:
            self.epochs: list[int] = []

        def tell(self, numbers: Mapping[str, float], epoch: int) -> None:
            self.epochs.append(epoch)

        def close(self, *, is_whole: bool = True) -> None:
            pass

    heard = Heard()
    for place in (0, 1):
        monkeypatch.setattr(trackers, "is_first", lambda place=place: place == 0)
        heard({"epoch": place + 1, "loss": 1.0})
    assert heard.epochs == [1]


def test_several_functions_are_told_in_order_and_what_is_none_is_refused_before_anything_is_done() -> None:
    said: list[str] = []
    learner().fit(1, lr=1e-2, on_epoch_end=(lambda _: said.append("first"), lambda _: said.append("second")))
    assert said == ["first", "second"]
    for wrong in (3, [print, 3], [None]):
        with pytest.raises(TypeError, match=r"on_epoch_end is (3|None); expected a function"):
            learner().fit(1, on_epoch_end=wrong)  # type: ignore[arg-type]
    assert not math.isnan(learner().fit(1, lr=1e-2, on_epoch_end=[]).last["train_loss"])
