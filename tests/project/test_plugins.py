"""Plug-ins: a package of its own adds a backbone, a policy and a source, in one file each, and none of featstore's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.processes import Processes

BACKBONES = """
from torch import nn
from featstore import StagedModel, View
from featstore.models.modes import seeded

def knows(name): return name == "tiny:net"
def names(pattern=None): return ["tiny:net"]
def weight_names(name): return ["ONES"]
def about(name): return {"family": "tiny", "size": 8, "parameters": 122}
def class_names(name, weights): return None
def outline(name): return initial(name)

def initial(name):
    with seeded():
        module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    origin = {"backbone": name, "weights": "none", "architecture": {"name": name}}
    return StagedModel.from_module(module.eval(), view=View(size=8, resize=8), name="tiny", origin=origin)

def pretrained(name, weights):
    model = initial(name).with_(origin={**initial(name).origin, "weights": weights})
    for tensor in model.parameters(): tensor.data.fill_(1)
    return model
"""

POLICIES = '''
from featstore.images.parameters import Whole
from featstore.images.policies import BuiltIn

def darken(canvas, draws, *, levels):
    """Takes away up to so many levels."""
    amount = draws.integer(levels + 1)
    canvas.change(lambda square: square - square.clip(0, amount))

POLICY = BuiltIn(darken, 1, {"levels": Whole(30, 0, 255)}, "nowhere")
'''

SOURCES = """
from dataclasses import replace
import numpy as np
from featstore import ImageSet

class Made:
    constructor, metavar, help, kind = "from_made", "made:N", "number of made-up images", "a number of made-up images"
    instance, options, without_split = "made:20", (), "give images without a split"

    def is_named_by(self, path): return path.startswith("made:")

    def make(self, path, options, *, held_out_classes):
        count = int(path.partition(":")[2])
        pixels = np.random.default_rng(0).integers(0, 255, (count, 9, 9), dtype=np.uint8)
        labels = ["dark" if number % 2 else "light" for number in range(count)]
        return replace(ImageSet.from_arrays(pixels, labels), origin={"constructor": self.constructor, "path": path})

    def flags(self, images): return ["--images", images.origin["path"]]
    def own_splits(self, images): return None
    def no_split(self, images, options): return "made-up images have no split"
    def found_split(self, images, options): return None
    def one_class(self, images, name): return "Make more than one."
    def without_valid(self, images): return "make more"

ORIGIN = Made()
"""

ENTRY_POINTS = """
[featstore.backbones]
tiny = tiny_plugin.backbones
[featstore.policies]
darken = tiny_plugin.policies:POLICY
[featstore.sources]
made = tiny_plugin.sources:ORIGIN
"""

PROGRAM = """
    import contextlib, io, json, sys
    sys.path.insert(0, sys.argv[1])
    import featstore.cli.app, training.cli.app
    for command in json.loads(sys.argv[2]):
        program, *arguments = command.split()
        main = featstore.cli.app.main if program == "featstore" else training.cli.app.main
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main(arguments)
        print(json.dumps([code, out.getvalue(), err.getvalue()]))
"""

SETS = "--store features --images made:20 --backbone tiny:net --weights ONES --device cpu --workers 0"
AUGMENT = "--augment darken:levels=9+flip --seeds 0-1"


COMPLETED = """
    import sys
    sys.path.insert(0, sys.argv[1])
    from featstore.images.spelling import completed
    print(*completed("flip+d"), "tiny_plugin" in sys.modules)
"""


@pytest.fixture
def package(tmp_path: Path) -> Path:
    folder = tmp_path / "installed"
    (folder / "tiny_plugin").mkdir(parents=True)
    for name, text in {"__init__": "", "backbones": BACKBONES, "policies": POLICIES, "sources": SOURCES}.items():
        (folder / "tiny_plugin" / f"{name}.py").write_text(text)
    installed_as(folder, version="1.0", entry_points=ENTRY_POINTS)
    return folder


def installed_as(folder: Path, *, version: str, entry_points: str) -> None:
    about = folder / "tiny_plugin.dist-info"
    about.mkdir(exist_ok=True)
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: tiny-plugin\nVersion: {version}\n")
    (about / "entry_points.txt").write_text(entry_points)


def ran(processes: Processes, package: Path, *commands: str) -> list[Any]:
    said = processes.answer(PROGRAM, str(package), json.dumps(commands), cwd=package.parent)
    return [json.loads(line) for line in said.splitlines()]


def test_a_package_adds_a_backbone_a_policy_and_a_source_that_go_the_whole_way(
    processes: Processes, package: Path
) -> None:
    extracted, again, listed, trained, known = ran(
        processes,
        package,
        f"featstore extract {SETS} {AUGMENT} --json",
        f"featstore status {SETS} {AUGMENT}",
        "featstore ls --store features --json",
        f"featstore-train head {SETS} {AUGMENT} --epochs 1 --lr 0.01 --out runs/head",
        "featstore backbones tiny:net",
    )
    assert extracted[0] == 0, extracted
    assert sum(each["computed"] for each in json.loads(extracted[1])["sets"]) == 20 + 2 * 16
    assert (again[0], trained[0]) == (0, 0), (again, trained)
    assert "made-up images have no split" in trained[2]
    views = [(each["view"], each["seed"]) for each in json.loads(listed[1]) if each["seed"] is not None]
    assert sorted(views) == [("darken:levels=9+flip", 0), ("darken:levels=9+flip", 1)]
    assert known[0] == 0
    assert known[2].startswith("tiny: 122 parameters")


def test_a_shell_is_told_the_name_of_a_packages_policy_and_nothing_of_the_package_is_loaded(
    new_processes: Processes, package: Path
) -> None:
    told = new_processes.answer(COMPLETED, str(package), cwd=package.parent)
    assert told.split() == ["flip+dihedral", "flip+darken", "False"]


def test_features_of_a_policy_are_not_those_of_another_version_of_its_package(
    processes: Processes, package: Path
) -> None:
    (extracted,) = ran(processes, package, f"featstore extract {SETS} {AUGMENT} --json")
    assert extracted[0] == 0
    installed_as(package, version="1.1", entry_points=ENTRY_POINTS)
    plain, augmented = ran(processes, package, f"featstore status {SETS}", f"featstore status {SETS} {AUGMENT}")
    assert (plain[0], augmented[0]) == (0, 3), augmented


def test_features_of_a_policy_are_not_those_of_other_code_in_its_authors_folder(
    processes: Processes, package: Path
) -> None:
    (extracted,) = ran(processes, package, f"featstore extract {SETS} {AUGMENT} --json")
    assert extracted[0] == 0
    (package / "tiny_plugin" / "policies.py").write_text(POLICIES.replace("square.clip(0, amount)", "square // 2"))
    (augmented,) = ran(processes, package, f"featstore status {SETS} {AUGMENT}")
    assert augmented[0] == 3, augmented


def test_a_policy_that_draws_elsewhere_is_refused_as_a_persons_own(processes: Processes, package: Path) -> None:
    drawing = POLICIES.replace("draws.integer(levels + 1)", "__import__('random').randrange(levels + 1)")
    (package / "tiny_plugin" / "policies.py").write_text(drawing)
    (refused,) = ran(processes, package, f"featstore extract {SETS} {AUGMENT}")
    assert refused[0] == 2
    assert "the policy darken moved the global random state of Python" in refused[2]


@pytest.mark.parametrize(
    ("entry_points", "said"),
    [
        ("[featstore.policies]\ngone = tiny_plugin.gone:POLICY\n", "No module named 'tiny_plugin.gone'"),
        ("[featstore.policies]\ngone = tiny_plugin.policies:GONE\n", "has no attribute 'GONE'"),
        ("[featstore.policies]\ngone = tiny_plugin.policies:darken\n", "it has no method, version, params, checked"),
    ],
)
def test_what_a_package_names_and_lacks_is_said_where_it_is_wanted(
    processes: Processes, package: Path, entry_points: str, said: str
) -> None:
    installed_as(package, version="1.0", entry_points=entry_points)
    listed, named, looked_at, wanted = ran(
        processes,
        package,
        "featstore ls --store features --json",
        f"featstore status --images {package} --store features --backbone nobody --augment flip --seeds 0",
        "featstore doctor",
        f"featstore status --images {package} --store features --backbone resnet18 --augment gone --seeds 0",
    )
    assert "tiny-plugin" not in listed[2] + named[2]
    assert looked_at[0] == 1
    assert "gone for featstore.policies can't be loaded" in looked_at[1]
    assert wanted[0] != 0
    assert "gone for featstore.policies can't be loaded" in wanted[2]
    assert said in wanted[2]
    assert "tiny-plugin 1.0 brings it; mend or uninstall that" in wanted[2]


def test_a_name_of_nobody_is_refused_with_those_of_packages_too(processes: Processes, package: Path) -> None:
    (wanted,) = ran(
        processes, package, f"featstore status --images {package} --store f --backbone tiny:net --augment x --seeds 0"
    )
    assert wanted[0] == 2
    assert "rand_augment, darken" in wanted[2]
