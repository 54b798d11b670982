"""What is shown and told of a job while it runs."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
from support.extracting import counts, run
from support.tiny import arrays, photos

from featstore import FeatureStore, ImageSet, ProgressReport
from featstore.extraction.progress import Progress


@pytest.fixture
def store(tmp_path: Path) -> FeatureStore:
    return FeatureStore(tmp_path / "feats")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def at_each_image(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Progress, "SECONDS", 0.0)
    monkeypatch.setattr(Progress, "SECONDS_A_LINE", 0.0)


@pytest.mark.usefixtures("at_each_image")
def test_without_a_terminal_progress_is_plain_lines_and_the_rates_at_the_end(
    store: FeatureStore, capsys: pytest.CaptureFixture[str]
) -> None:
    run(arrays(5), store, batch_size=2, progress=True)
    *lines, last = capsys.readouterr().err.splitlines()
    assert len(lines) == 5
    assert lines[0].startswith("1 of 5 images, ")
    assert lines[-1].startswith("5 of 5 images, ")
    for word in (" a second, 0.0 s left; read ", ", decode ", ", forward ", " binds, ", " % busy; queue "):
        assert word in lines[-1]
    assert "write" not in lines[-1]
    assert last.startswith("read ")
    assert ", write " in last
    assert run(arrays(6), store).computed == 1
    assert capsys.readouterr().err == ""


def test_a_short_job_says_only_what_its_time_went_into(store: FeatureStore, capsys: pytest.CaptureFixture[str]) -> None:
    run(arrays(5), store, progress=True)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("read ")
    run(arrays(5), store, progress=True)
    assert capsys.readouterr().err == ""


@pytest.mark.usefixtures("at_each_image")
def test_a_terminal_has_a_bar_with_the_rates_below(store: FeatureStore, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    run(arrays(5), store, batch_size=2, progress=True)
    drawn = terminal.getvalue()
    assert "3/5 [" in drawn
    assert "\rqueue " in drawn
    assert "\x1b[A" in drawn  # back up to the bar
    *_, bar, last = drawn.rstrip("\n").split("\n")
    assert "5/5 [" in bar.split("\r")[-1]
    assert last.split("\r")[-1].startswith("read ")


@pytest.mark.usefixtures("at_each_image")
def test_a_callable_is_told_how_far_the_job_is(store: FeatureStore, tmp_path: Path) -> None:
    images = ImageSet.from_folder(photos(tmp_path / "photos", 6))
    (tmp_path / "photos" / "cat" / "2.jpg").write_bytes(b"no image")
    told: list[ProgressReport] = []
    report = run(images, store, batch_size=2, on_error="skip", on_progress=told.append)
    assert counts(report) == (5, 0, 1)
    assert [each.done for each in told] == [1, 2, 3, 4, 5, 6, 6]
    assert {each.total for each in told} == {6}
    assert told[-1].eta_seconds == 0.0
    assert told[-1].errors == 1
    assert told[-1].gpu_bytes is None
    assert told[-1].bound_by == report.bound_by
    assert [each.images for each in told[-1].rates] == [each.images for each in report.rates]
    assert all(each.rate > 0 for each in told)
    assert str(told[-1]).endswith(", 1 failed")


def test_a_callable_is_told_about_once_a_second_and_at_the_end(store: FeatureStore) -> None:
    told: list[ProgressReport] = []
    run(arrays(20), store, on_progress=told.append)
    assert len(told) <= 2
    assert told[-1].done == 20
    run(arrays(20), store, on_progress=told.append)
    assert len(told) <= 2  # nothing is to be done


@pytest.mark.usefixtures("at_each_image")
def test_an_error_in_that_callable_ends_the_job_after_filing_what_is_done(store: FeatureStore) -> None:
    def told(report: ProgressReport) -> None:
        if report.done == 4:
            raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        run(arrays(8), store, batch_size=2, on_progress=told)
    assert counts(run(arrays(8), store, batch_size=2)) == (4, 4, 0)
