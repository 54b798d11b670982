"""Signals to a program at work, each in a process of its own: what is computed is filed, or it ends at once."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from PIL import Image
from support.processes import AS_A_MODULE, Processes, Started

from featstore import FeatureStore

# Goes on for a minute with an image that is red all over, in its pass, or with the first file that is synced.
SLOW = """
import time
from collections import OrderedDict
from pathlib import Path

import torch
from torch import nn


class Slow(nn.Module):
    def fingerprint(self):
        return "gives back what it gets"

    def forward(self, values):
        is_red = (values[:, 0].amin((1, 2)) > 2) & (values[:, 1:].amax((1, 2, 3)) < -1)
        if bool(is_red.any()):
            Path("begun").touch()
            time.sleep(60)
        return values


def make_model():
    layers = [("slow", Slow()), ("conv", nn.Conv2d(3, 8, 3, 2)), ("pool", nn.AdaptiveAvgPool2d(1))]
    return nn.Sequential(OrderedDict([*layers, ("flat", nn.Flatten()), ("fc", nn.Linear(8, 5))]))
"""

HEEDS_SIGNALS = """
import signal
for each, handler in (("SIGINT", signal.default_int_handler), ("SIGTERM", signal.SIG_DFL)):
    signal.signal(getattr(signal, each), handler)
"""

HANGING_DISK = """
import os
from pathlib import Path
from threading import Event
from featstore.files import disk

def perform(operation, *args, goes_on=disk.perform):
    if operation.__name__ == "sync" and "part-" in os.readlink(f"/proc/self/fd/{args[0]}"):
        Path("begun").touch()
        Event().wait(60)
    return goes_on(operation, *args)

disk.perform = perform
"""


def started(processes: Processes, here: Path, *, before: str = "") -> Started:
    """An extraction that has begun with what takes a minute."""
    (here / "slow.py").write_text(SLOW, encoding="utf-8")
    Image.new("RGB", (90, 90), "red").save(here / "photos" / "dog" / "red.png")
    extraction = ["--images", "photos", "--store", "feats", "--backbone", "slow.py:make_model", "--size", "32"]
    running = processes.start(
        f"{HEEDS_SIGNALS}{before}{AS_A_MODULE}", "featstore", "extract", *extraction, "--batch-size", "4"
    )
    until = time.monotonic() + 20
    while not (here / "begun").exists():
        assert time.monotonic() < until, running.err.read_text()
        time.sleep(0.01)
    return running


@pytest.mark.parametrize(
    ("by", "times"),
    [(signal.SIGINT, 1), (signal.SIGTERM, 2)],  # `timeout` sends its own to the process, and to the group it is in
)
def test_a_signal_files_the_rows_gathered_so_far_within_seconds_and_names_itself_in_the_exit_code(
    here: Path, processes: Processes, by: signal.Signals, times: int
) -> None:
    running = started(processes, here)
    sent = time.monotonic()
    for _ in range(times):
        os.kill(running.pid, by)
    ran = processes.end(running)
    assert time.monotonic() - sent < 10
    assert (ran.returncode, ran.stdout) == (128 + by, "")
    assert ran.stderr.endswith("\nInterrupted. What was computed is filed; the same command computes the rest.\n")
    (found,) = FeatureStore(here / "feats").sets()
    assert found.index.num_images == 20


def test_a_second_signal_ends_a_program_at_once_whose_disk_does_not_answer(here: Path, processes: Processes) -> None:
    running = started(processes, here, before=HANGING_DISK)
    os.kill(running.pid, signal.SIGTERM)
    time.sleep(1)
    sent = time.monotonic()
    os.kill(running.pid, signal.SIGINT)
    ran = processes.end(running)
    assert time.monotonic() - sent < 2
    assert (ran.returncode, ran.stdout) == (130, "")
    assert "Traceback" not in ran.stderr
    assert "Interrupted" not in ran.stderr  # which it would say once all is filed
