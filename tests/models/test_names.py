from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import get_args

from featstore.models.names import DIMENSIONS, Layout, automatic, layout_of

ROOT = Path(__file__).resolve().parents[2]


def test_auto_is_concat_for_maps_token_for_a_vit_and_none_for_vectors() -> None:
    assert [automatic(layout, 0) for layout in get_args(Layout)] == ["concat", "concat", "concat", "none"]
    assert automatic("NLC", 1) == "token"


def test_a_layout_that_dimensions_give_has_these_dimensions() -> None:
    given = [layout_of((2,) * count) for count in range(1, 4)]
    assert given == ["NC", "NLC", "NCHW"]
    assert [DIMENSIONS[layout] for layout in given] == [1, 2, 3]
    assert set(DIMENSIONS) == set(get_args(Layout))
    assert layout_of(()) == layout_of((2,) * 4) == "other"


def test_the_names_are_had_without_torch() -> None:
    program = (
        "import sys, types; package = types.ModuleType('featstore'); package.__path__ = ['featstore']; "
        "sys.modules['featstore'] = package; import featstore.models.names; assert 'torch' not in sys.modules"
    )  # the package itself imports all
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)
