"""The guide to augmentation: its tables and pictures are what the policies are and do, and its code runs."""

from __future__ import annotations

import re
import sys
from itertools import cycle
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
import draw_augmentations as drawing

TEXT = drawing.PAGE.read_text(encoding="utf-8")


def test_the_page_lists_every_policy_with_its_parameters_as_they_are() -> None:
    assert TEXT.count(drawing.BEGIN) == 1
    assert drawing.gallery() in TEXT


def test_the_pictures_show_what_the_policies_do() -> None:
    words = drawing.words()
    assert {file.name for file in drawing.PICTURES.iterdir()} == {drawing.file_of(word).name for word in words}
    assert sum(file.stat().st_size for file in drawing.PICTURES.iterdir()) < 1_500_000
    for word, photos in zip(words, cycle(drawing.pairs()), strict=False):
        shown = np.asarray(Image.open(drawing.file_of(word)), dtype=float)
        assert np.abs(shown - drawing.picture(word, photos)).mean() < 5, word  # what a JPEG of this quality loses


def test_the_code_of_the_page_runs() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
    exec(compile(code, str(drawing.PAGE), "exec"), {})
