"""What augmentation is worth: the page says what was measured, and the program that measures runs."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import stats  # type: ignore[import-untyped]

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
import augmentation_pays as measuring

SMALL_BACKBONE = f"{Path(measuring.__file__).with_name('digits_backbone.py')}:make_model"


def test_the_table_of_the_page_is_that_of_the_records() -> None:
    records = measuring.read(measuring.RECORDS)
    assert {each.run for each in records} == set(range(5))
    assert measuring.table(records) in measuring.PAGE.read_text(encoding="utf-8")
    assert len(measuring.plot(records).axes) == 2 * len({each.images for each in records})
    assert measuring.PLOT.is_file()


def test_intervals_are_students() -> None:
    values = [0.1, 0.4, 0.35, 0.8, 0.2]
    mean, half = measuring.interval(values)
    low, high = stats.t.interval(0.95, 4, loc=np.mean(values), scale=stats.sem(values))
    assert (mean - half, mean + half) == pytest.approx((low, high))


def test_a_measurement_leaves_a_record_for_each_run_and_way_beside_those_of_other_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "records.csv"
    other = measuring.Outcome(images="others", views="none", run=0, accuracy=0.5, loss=1.25)
    measuring.write(file, [other])
    flags = ["--digits=20", "--train=10", "--counts", "1", "--epochs=1", "--runs=2", f"--records={file}"]
    monkeypatch.setattr(sys, "argv", ["augmentation_pays", *flags])
    monkeypatch.setattr(measuring, "BACKBONE", SMALL_BACKBONE)
    measuring.main()
    printed = capsys.readouterr().out
    first, *records = measuring.read(file)
    assert first == other
    assert [(each.run, each.views) for each in records] == [
        (run, views) for run in range(2) for views in ("none", "1", "fresh")
    ]
    assert measuring.table(records) in printed
