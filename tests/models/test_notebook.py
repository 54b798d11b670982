"""Classes from a notebook: a cell's source counts as their source; what was typed where none is kept is refused."""

from __future__ import annotations

import linecache
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from featstore import FeatureStore, ImageSet, ModelError, StagedModel, View, extract

IMPORTS = "import torch\nfrom torch import nn\nSCALE = 2\n\ndef scaled(x):\n    return x * SCALE\n"
CELL = """
class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 1)
        for each in self.parameters():
            nn.init.ones_(each)

    def forward(self, x):
        if x.shape[0] > 0 and bool((x == x).all()):  # can't be traced
            return scaled(self.conv(x))
        return self.conv(x)

net = nn.Sequential(Own(), nn.ReLU()).eval()
"""

Cell = Callable[..., Any]


@pytest.fixture
def cell(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cell]:
    """Runs the text of a cell as IPython does: compiled under a name of its own, which linecache knows the text of."""
    notebook = ModuleType("notebook_of_test")  # without a file, as __main__ is there
    monkeypatch.setitem(sys.modules, notebook.__name__, notebook)
    names: list[str] = []

    def run(text: str, *, is_kept: bool = True, flags: int = 0) -> Any:
        names.append(f"<cell-{len(names)}>")
        if is_kept:
            linecache.cache[names[-1]] = (len(text), None, text.splitlines(keepends=True), names[-1])
        exec(compile(text, names[-1], "exec", flags, dont_inherit=True), vars(notebook))
        return vars(notebook).get("net")

    yield run
    for name in names:
        linecache.cache.pop(name, None)


def key(net: nn.Module) -> str:
    return StagedModel.from_module(net, view=View(size=8, resize=8)).digest("0")


def test_a_class_from_a_cell_is_keyed_by_what_the_cells_say_and_nothing_else(cell: Cell) -> None:
    cell(IMPORTS)
    first = cell(CELL)
    before = key(first)
    other_texts = "# something else\nprint(1)\n" + CELL.replace("can't be traced", "another comment")
    assert key(cell(other_texts)) == before  # run again, edited around the class
    assert key(cell(CELL.replace("self.conv(x))", "self.conv(x)) + 1"))) != before
    assert key(cell(CELL + "\nOwn.factor = 3\n")) != before
    cell("def scaled(x):\n    return x / SCALE\n")  # a function that it calls, and a value that this reads
    changed = key(cell(CELL))
    cell("SCALE = 3\n")
    assert len({before, changed, key(cell(CELL))}) == 3
    cell(IMPORTS)
    assert key(first) == before


def test_a_future_import_of_an_earlier_cell_changes_nothing(cell: Cell) -> None:
    cell(IMPORTS)
    before = key(cell(CELL))
    assert key(cell(CELL, flags=__import__("__future__").annotations.compiler_flag)) == before


def test_features_of_a_class_from_a_cell_are_stored_and_found_again(cell: Cell, tmp_path: Any) -> None:
    images = ImageSet.from_arrays(torch.arange(4 * 192, dtype=torch.int32).to(torch.uint8).reshape(4, 8, 8, 3).numpy())
    cell(IMPORTS)
    view, store = View(size=8, resize=8), FeatureStore(tmp_path)
    assert extract(cell(CELL), images, store, cuts=["0"], view=view).computed == 4
    assert extract(cell(CELL), images, store, cuts=["0"], view=view).computed == 0
    assert extract(cell(CELL.replace("ones_", "zeros_")), images, store, cuts=["0"], view=view).computed == 4


def test_a_class_whose_text_is_kept_nowhere_is_refused_with_what_to_do_and_traced_ones_need_none(cell: Cell) -> None:
    cell(IMPORTS, is_kept=False)
    net = cell(CELL, is_kept=False)
    with pytest.raises(
        ModelError, match=r"The source of notebook_of_test can't be found, .*Python file, .*fingerprint"
    ):
        key(net)
    straight = CELL.replace("if x.shape[0] > 0 and bool((x == x).all()):  # can't be traced", "if True:")
    assert key(cell(straight, is_kept=False)) == key(cell(straight))
