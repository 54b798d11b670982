"""What frozen statistics cost: the program that measures it runs, and its scores are those of three plain fits."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from support.tiny import pixels, staged

from featstore import ImageSet
from training import reestimate_batch_norm

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
import frozen_statistics as measuring
from augmentation_pays import BATCH_SIZE


def test_the_table_has_each_way_and_its_gaps_run_by_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    images = ImageSet.from_arrays(pixels(24), [row % 2 for row in range(24)], name="digits")
    monkeypatch.setattr(measuring, "backbone", lambda name: staged())
    monkeypatch.setattr(measuring, "digits", lambda count: images)
    monkeypatch.setattr(measuring, "THAWED", "layer1")
    monkeypatch.setattr(measuring, "DIGIT_SIDE", 16)
    monkeypatch.setattr(sys, "argv", ["frozen_statistics", "--train=12", "--epochs=1", "--runs=2"])
    measuring.main()
    head, _, *rows = capsys.readouterr().out.splitlines()
    assert head == "| network | accuracy, % | more than as it is |"
    shown = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert [name for name, *_ in shown] == ["as it is", "statistics taken anew", "trained behind layer1"]
    model = staged().with_(view=staged().view.resized(size=16, resize=16))
    found: list[list[float]] = [[], [], []]
    for run in range(2):
        dealt = images.split(valid=0.5, seed=run)
        renewed = reestimate_batch_norm(model, dealt.train, batch_size=BATCH_SIZE, device="cpu", seed=run)
        for values, (network, freeze_to) in zip(
            found, ((model, None), (renewed, None), (model, "layer1")), strict=True
        ):
            values.append(100 * measuring.accuracy(network, dealt, freeze_to, epochs=1, seed=run))
    for (_, mean, gap), values in zip(shown, found, strict=True):
        assert mean.startswith(f"{sum(values) / 2:.1f} ±")
        assert gap == "" or gap.startswith(f"{(sum(values) - sum(found[0])) / 2:+.1f} ±")
