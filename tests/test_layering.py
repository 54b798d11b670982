"""Who may import whom: the order of the modules, and the one door of each outside library."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Mapping
from itertools import takewhile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# A module imports only modules that stand before it. A new file joins its list, or it does not belong yet.
ORDER = {
    "featstore": (
        "errors", "sizes", "digest", "source", "image_digests", "image_sources", "images", "decode", "policies",
        "views", "render", "graph", "pool", "operations",
        "staged", "trunk", "weights", "runs", "backbones", "probe", "purity", "spec", "machine", "part", "index",
        "reading", "features", "signature", "disk", "sets", "tables", "catalogue", "verification", "compaction",
        "removal", "garbage", "difference", "commands", "store", "extract", "feature_files", "export", "foreign",
        "adopt", "__init__", "program", "flags", "store_cli", "cli", "__main__",
    ),
    "training": (
        "metrics", "schedules", "plots", "heads", "situation", "search", "explain", "inputs", "splits", "batches",
        "optim", "fit", "lr_find", "predict", "saved", "learner", "recipes", "__init__", "cli", "__main__",
    ),
}  # fmt: skip

# Outside library -> the only modules that may import it.
DOORS = {
    "h5py": {"featstore.part"},
    "PIL": {"featstore.decode"},
    "torchvision.io": {"featstore.decode"},
    "torchvision.models": {"featstore.backbones"},
    "timm": {"featstore.backbones"},
    "torchvision.transforms": {"featstore.views"},
    "safetensors": {"featstore.weights", "featstore.runs", "featstore.feature_files"},
    "pyarrow": {"featstore.export"},
    "typer": {"featstore.program", "featstore.flags", "featstore.store_cli", "featstore.cli", "training.cli"},
    "matplotlib": {"training.plots"},
}

SAYS_NOTHING = {"utils", "util", "helpers", "manager", "base", "misc", "common"}


def faults(module: str, source: str) -> list[str]:
    """What `source`, as the text of the module `module` ("featstore.views"), may not use: a sentence each."""
    package, _, name = module.partition(".")
    found = {}
    for line, used in names_used(module, source):
        owner, _, rest = used.partition(".")
        inner = rest.partition(".")[0]
        if owner == package:
            target = inner if inner in ORDER[package] else "__init__"
            if ORDER[package].index(target) >= ORDER[package].index(name):
                found[used] = f"line {line}: {module} uses {used}, which doesn't stand before it in the order"
        elif owner == "training":
            found[used] = f"line {line}: {module} uses {used}, but featstore knows nothing of training"
        elif owner == "featstore" and any(part.startswith("_") and not is_dunder(part) for part in rest.split(".")):
            found[used] = f"line {line}: {module} uses {used}, which isn't public"
        for library, doors in DOORS.items():
            if f"{used}.".startswith(f"{library}.") and module not in doors:
                found[used] = (
                    f"line {line}: {module} uses {used}; the door of {library} is {' or '.join(sorted(doors))}"
                )
    return list(found.values())


def names_used(module: str, source: str) -> Iterator[tuple[int, str]]:
    """Line and full dotted name of all that `source` imports, anywhere in it, and takes from imported modules."""
    tree = ast.parse(source)
    bound: dict[str, str] = {}  # name in the file -> what was imported under it
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                bound |= {alias.asname: alias.name} if alias.asname else {(top := alias.name.partition(".")[0]): top}
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                full = f"{origin(module, node)}.{alias.name}"
                bound[alias.asname or alias.name] = full
                yield node.lineno, full
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            root, _, rest = ast.unparse(node).partition(".")
            if root in bound:
                yield node.lineno, f"{bound[root]}.{rest}"
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            yield from ((node.lineno, str(name.value)) for name in node.args[:1] if isinstance(name, ast.Constant))


def origin(module: str, node: ast.ImportFrom) -> str:
    """The module that ``from ... import`` names; the packages are flat, so a dot stands for the package."""
    here = [module.partition(".")[0]] if node.level else []
    return ".".join([*here, *([node.module] if node.module else [])])


def is_dunder(name: str) -> bool:
    return name.startswith("__") and name.endswith("__")


def modules() -> Mapping[str, Path]:
    files = [path for package in ORDER for path in sorted((ROOT / package).rglob("*.py"))]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in files}


@pytest.mark.parametrize("module", modules())
def test_a_module_uses_only_what_stands_before_it_and_no_library_but_through_its_door(module: str) -> None:
    assert not faults(module, modules()[module].read_text())


def test_each_file_stands_in_the_order() -> None:
    expected = {f"{package}.{name}" for package, names in ORDER.items() for name in names}
    assert set(modules()) == expected
    assert not SAYS_NOTHING & {module.partition(".")[2] for module in expected}


@pytest.mark.parametrize(
    ("module", "source", "named"),
    [
        ("featstore.views", "import training", "training"),
        ("featstore.cli", "from training.heads import build_head", "training.heads.build_head"),
        ("featstore.views", "import featstore.staged", "featstore.staged"),
        ("featstore.views", "from featstore.staged import StagedModel", "featstore.staged.StagedModel"),
        ("featstore.views", "from featstore import staged", "featstore.staged"),
        ("featstore.views", "from .staged import StagedModel", "featstore.staged.StagedModel"),
        ("featstore.views", "from . import staged", "featstore.staged"),
        ("featstore.views", "from featstore import View", "featstore.View"),
        ("featstore.views", "from featstore.views import View", "featstore.views.View"),
        (
            "featstore.views",
            "def later():\n    from featstore.store import FeatureStore",
            "featstore.store.FeatureStore",
        ),
        ("featstore.views", "if TYPE_CHECKING:\n    import featstore.store", "featstore.store"),
        ("featstore.views", "importlib.import_module('featstore.store')", "featstore.store"),
        ("featstore.extract", "import featstore\nfeatstore.cli.main()", "featstore.cli.main"),
        ("training.heads", "from training.learner import Learner", "training.learner.Learner"),
        ("training.heads", "from featstore.staged import _listed", "featstore.staged._listed"),
        ("training.heads", "from featstore import staged\nstaged._listed([])", "featstore.staged._listed"),
        ("training.heads", "import featstore.staged as s\ns._listed([])", "featstore.staged._listed"),
        ("featstore.store", "import h5py", "h5py"),
        ("training.learner", "import h5py as h", "h5py"),
        ("featstore.render", "from PIL import Image", "PIL.Image"),
        ("featstore.render", "from torchvision.io import decode_image", "torchvision.io.decode_image"),
        ("featstore.render", "from torchvision import io", "torchvision.io"),
        ("featstore.render", "import torchvision\ntorchvision.io.decode_image(x)", "torchvision.io.decode_image"),
        ("featstore.staged", "from torchvision.models import resnet18", "torchvision.models.resnet18"),
        ("featstore.staged", "import torchvision as tv\ntv.models.get_model(x)", "torchvision.models.get_model"),
        ("featstore.backbones", "import torchvision.transforms.v2", "torchvision.transforms.v2"),
        ("featstore.staged", "import timm", "timm"),
        ("training.learner", "def plot():\n    import matplotlib.pyplot as plt", "matplotlib.pyplot"),
        ("featstore.store", "from safetensors.torch import save_file", "safetensors.torch.save_file"),
        ("featstore.extract", "import typer", "typer"),
        ("training.learner", "import typer", "typer"),
    ],
)
def test_what_is_forbidden_is_named(module: str, source: str, named: str) -> None:
    sentences = faults(module, source)
    assert any(f" {named}" in sentence for sentence in sentences), sentences


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("featstore.views", "import torch.nn.functional as F\nfrom featstore.digest import Json\nF.interpolate(Json)"),
        ("featstore.cli", "from featstore import __version__"),
        ("featstore.backbones", "import torchvision\ntorchvision.models.get_model(name)"),
        ("featstore.part", "import h5py\nh5py.File(path)"),
        ("training.learner", "from featstore import StagedModel\nfrom featstore.graph import mode_of"),
        ("training.lr_find", "def plot():\n    from training.plots import learning_rates"),
    ],
)
def test_what_is_allowed_passes(module: str, source: str) -> None:
    assert not faults(module, source)


def test_importing_featstore_loads_neither_plots_nor_scikit_learn_nor_the_command_line() -> None:
    program = "import featstore, sys; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    loaded = set(shown.stdout.split())
    assert {"featstore", "torch"} <= loaded
    assert not loaded & {"matplotlib", "sklearn", "typer", "training"}


def test_a_wheel_holds_just_the_two_packages(tmp_path: Path) -> None:
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("featstore", "training", "tests", "scripts", "docs"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    program = "from setuptools.build_meta import build_wheel; build_wheel('made')"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=tmp_path, capture_output=True)
    (wheel,) = (tmp_path / "made").glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    folders = {name.partition("/")[0] for name in names}
    assert {folder for folder in folders if not folder.endswith(".dist-info")} == {"featstore", "training"}
    expected = {str(path.relative_to(ROOT)) for path in modules().values()}
    assert {name for name in names if name.endswith(".py")} == expected
    assert {"featstore/py.typed", "training/py.typed"} <= set(names)


def test_the_design_page_lists_the_modules_in_their_order() -> None:
    page = (ROOT / "docs/design.md").read_text(encoding="utf-8")
    block = page.partition("```\n")[2].partition("```")[0]
    listed: dict[str, list[str]] = {}
    for line in block.splitlines():
        if line.endswith("/"):
            package = line.removesuffix("/")
            listed[package] = []
        else:
            names = re.split(r"\s{2,}", line.strip())  # then what it is for, which is no name
            listed[package] += takewhile(ORDER[package].__contains__, names)
    for package, order in ORDER.items():
        assert listed[package] == [name for name in order if not name.startswith("__")]
