"""History: its tables, its files, and which epoch is the best of several fits."""

from __future__ import annotations

import csv
import json
import math
from array import array
from pathlib import Path

import pytest

from training import History


def test_a_table_of_epochs_has_every_column_of_any_epoch() -> None:
    frame = History(records=[{"epoch": 1.0}, {"epoch": 2.0, "valid_loss": 0.5}]).frame()
    assert frame["epoch"] == [1.0, 2.0]
    assert math.isnan(frame["valid_loss"][0])
    assert frame["valid_loss"][1] == 0.5
    assert History().frame() == {}


def test_the_best_epoch_of_several_fits_is_the_best_of_all() -> None:
    history = History()
    for losses in ([5.0, 2.0, 3.0], [4.0, 2.5], [1.0, 1.5]):
        records = [{"epoch": float(place), "valid_loss": loss} for place, loss in enumerate(losses)]
        history.extend(History(records=records, best_epoch=losses.index(min(losses))))
        assert history.best["valid_loss"] == min(record["valid_loss"] for record in history.records)
    assert (history.best_epoch, len(history.records)) == (5, 7)
    assert repr(history) == "History(7 epochs; best: epoch 0, valid_loss 1)"


def test_without_validation_the_last_epoch_counts_as_the_best() -> None:
    history = History()
    for _ in range(2):
        history.extend(History(records=[{"epoch": 1.0}, {"epoch": 2.0}], best_epoch=1))
    assert history.best_epoch == 3


def test_a_later_fit_without_a_loss_is_not_the_best() -> None:
    history = History(records=[{"epoch": 1, "valid_loss": 0.5}], best_epoch=0)
    history.extend(History(records=[{"epoch": 2, "valid_loss": math.nan}], best_epoch=0))
    assert history.best == {"epoch": 1, "valid_loss": 0.5}


def test_a_history_is_written_as_a_table_and_as_lines_of_json(tmp_path: Path) -> None:
    records = [{"epoch": 1, "train_loss": 0.1 + 0.2}, {"epoch": 2, "train_loss": math.inf, "valid_loss": math.nan}]
    history = History(records=records)
    history.to_csv(tmp_path / "epochs.csv")
    with (tmp_path / "epochs.csv").open(newline="") as file:
        columns, *rows = csv.reader(file)
    read = {name: [float(row[place]) for row in rows] for place, name in enumerate(columns)}
    assert read.keys() == history.frame().keys()
    for name, values in history.frame().items():
        assert read[name] == pytest.approx(values, rel=0, nan_ok=True)
    history.to_jsonl(tmp_path / "epochs.jsonl")
    lines = [
        json.loads(line, parse_constant=pytest.fail) for line in (tmp_path / "epochs.jsonl").read_text().splitlines()
    ]
    assert lines == [records[0], {"epoch": 2, "train_loss": None, "valid_loss": None}]


def test_momentum_is_the_first_of_however_many_betas() -> None:
    history = History()
    for group in ({"betas": (0.9, 0.95, 0.99)}, {"betas": (0.8, 0.99)}, {"momentum": 0.7}, {}):
        history.ran_at({"lr": 0.1, **group})
    assert history.momenta.tolist()[:3] == [0.9, 0.8, 0.7]
    assert math.isnan(history.momenta[3])


def test_steps_of_fits_that_knew_no_rates_have_none_in_the_table() -> None:
    history = History(records=[{"epoch": 1}], best_epoch=0, losses=[3.0, 2.0])
    later = History(
        records=[{"epoch": 2}], best_epoch=0, losses=[1.0], lrs=array("d", [0.5]), momenta=array("d", [0.9])
    )
    both = history.joined(later)
    history.extend(later)
    unknown = [math.nan, math.nan]
    for each in (both, history):
        assert each.steps()["loss"] == [3.0, 2.0, 1.0]
        assert each.steps()["lr"] == pytest.approx([*unknown, 0.5], rel=0, nan_ok=True)
        assert each.steps()["momentum"] == pytest.approx([*unknown, 0.9], rel=0, nan_ok=True)
