"""The golden list of cuts: backbone -> its cut points in order, each with layout and shape at its weights' own size.

A cut is named in stores, runs and commands of people: a change of the list is one that they notice.
"""

from __future__ import annotations

import json
from pathlib import Path

from featstore.models.staged import StagedModel

FILE = Path(__file__).parents[1] / "data" / "cuts.json"
"""Written by ``scripts/split_everything.py --write``, never by hand."""


def golden_cuts() -> dict[str, list[str]]:
    """What the file holds."""
    cuts: dict[str, list[str]] = json.loads(FILE.read_text(encoding="utf-8"))
    return cuts


def described_cuts(model: StagedModel) -> list[str]:
    """The cuts of `model` as the file has them: ``layer4 NCHW 512x7x7``."""
    return [f"{cut} {model.layout(cut)} {'x'.join(map(str, model.shape(cut)))}" for cut in model.cut_points]


def write(cuts: dict[str, list[str]]) -> None:
    FILE.write_text(json.dumps(cuts, indent=1) + "\n", encoding="utf-8")
