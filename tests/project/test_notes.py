"""What is said while a fit or an extraction works: lines on stderr, and the application's once it configures them."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.tiny import pixels, staged

from featstore import FeatureStore, ImageSet, extract
from featstore.notes import Printer, logger_of
from training import Learner


@pytest.fixture(autouse=True)
def as_new() -> Iterator[None]:
    """The loggers as in a process where nobody has configured them."""
    loggers = [logging.getLogger(name) for name in ("featstore", "training")]
    before = [(each, each.handlers[:], each.level, each.propagate) for each in loggers]
    for each in loggers:
        each.handlers.clear()
        each.setLevel(logging.NOTSET)
        each.propagate = True
    yield
    for each, handlers, level, propagate in before:
        each.handlers[:] = handlers
        each.setLevel(level)
        each.propagate = propagate


def work(folder: Path, *, quiet: bool = False) -> None:
    images = ImageSet.from_arrays(pixels(8), [row % 3 for row in range(8)], splits=["train"] * 5 + ["valid"] * 3)
    store = FeatureStore(folder)
    extract(staged(), images, store, cuts=["layer2"], device="cpu", workers=0, progress=not quiet)
    learn = Learner(staged(), images, store, cut="layer2", head="linear", device="cpu", quiet=quiet)
    learn.fit(1, lr=1e-2)


def test_without_configuration_each_line_is_printed_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    work(tmp_path)
    lines = capsys.readouterr().err.splitlines()
    assert sum(line.startswith("epoch 1: ") for line in lines) == 1
    assert len([line for line in lines if "100%" not in line]) == len({*lines})
    work(tmp_path, quiet=True)
    assert capsys.readouterr().err == ""


def test_an_application_that_configured_the_loggers_gets_the_lines_and_nothing_is_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("featstore", "training"):
        logging.getLogger(name).setLevel(logging.INFO)
    work(tmp_path)
    assert capsys.readouterr().err == ""
    assert {record.name for record in caplog.records} == {"featstore", "training"}
    assert any(record.getMessage().startswith("epoch 1: ") for record in caplog.records)
    caplog.clear()
    logging.getLogger("training").setLevel(logging.WARNING)
    work(tmp_path)
    assert "training" not in {record.name for record in caplog.records}


def test_a_logger_that_was_handed_over_stays_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert [type(each) for each in logger_of("training").handlers] == [Printer]
    logging.getLogger("training").handlers.clear()
    logging.getLogger("training").propagate = True
    logger_of("training").info("cat\x1b[2J")
    assert capsys.readouterr().err == ""
