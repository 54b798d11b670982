from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image
from programs import photographs

from featstore import backbone
from featstore.backbones import outline

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "scripts" / "quickstart.py"


def quickstart(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd, env=environment)


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("quickstart", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["quickstart"] = module
    spec.loader.exec_module(module)
    return module


def test_own_photographs_go_all_the_way_and_every_promise_holds(tmp_path: Path) -> None:
    photographs(tmp_path / "photos", count=5)
    own = f"{os.path.relpath(ROOT / 'scripts/digits_backbone.py', tmp_path)}:make_model"
    ran = quickstart("--images", "photos", "--backbone", own, "--epochs", "1", "--out", "made", cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    promises = ran.stdout.splitlines()[-5:-2]
    assert [line.split(None, 1) for line in promises] == [
        ["yes", "a second extraction computed no row"],
        ["yes", "cached and live losses are equal, bit for bit"],
        ["yes", "unfreezing moved the first stage"],
    ]
    assert re.search(r"^head at layer3 +\d\.\d{3} +\d+\.\d\d +\d+\.\d\d$", ran.stdout, re.MULTILINE)
    assert "--cut layer2:none --cut layer3 --augment flip --seeds 0-3 --dtype float32" in ran.stdout
    for name in ("views.png", "learning-rates.png", "history.png"):
        with Image.open(tmp_path / "made" / name) as plot:
            assert plot.size >= (600, 400)
    assert len((tmp_path / "made/predictions.csv").read_text(encoding="utf-8").splitlines()) == 11


def test_a_folder_that_isnt_ours_is_left_alone(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["quickstart", "--out", "mine"])
    assert script.main() == 1
    assert capsys.readouterr() == (
        "",
        "quickstart: mine exists and wasn't made by the quickstart. Give another folder with --out.\n",
    )
    assert (tmp_path / "mine" / "thesis.tex").is_file()


def test_images_inside_the_output_folder_are_left_alone(script: ModuleType, tmp_path: Path) -> None:
    out = tmp_path / "out"
    script._make_folder(out, None)
    photographs(out / "photos", count=1)
    with pytest.raises(script._FailedError, match="lies in"):
        script._make_folder(out, out / "photos")
    assert (out / "photos/cat/000.jpg").is_file()
    script._make_folder(out, None)  # ours, and nothing of value in it
    assert [path.name for path in out.iterdir()] == [script.MADE_HERE]


@pytest.mark.parametrize(
    "arguments", [["--images", "photos"], ["--backbone", "resnet18"], ["--cut", "layer3"], ["--epochs", "0"]]
)
def test_flags_that_dont_go_together_are_wrong_usage(
    script: ModuleType, arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["quickstart", *arguments])
    with pytest.raises(SystemExit) as ended:
        script.main()
    assert ended.value.code == 2


@pytest.mark.parametrize(
    ("name", "cut", "early"),
    [
        ("resnet18", "layer4", "layer3"),
        ("resnet50", "layer4", "layer3"),
        ("resnet18", "layer3", "layer2"),
        ("squeezenet1_1", "features.12", "features.11"),
        ("vit_b_32", "encoder.ln", "encoder.layers.encoder_layer_10"),
    ],
)
def test_the_tail_starts_a_fair_part_before_the_head(script: ModuleType, name: str, cut: str, early: str) -> None:
    assert script._early_cut(outline(name), cut) == early


def test_losses_that_differ_in_the_last_bit_are_told_apart(script: ModuleType) -> None:
    record = {"epoch": 1.0, "train_loss": 0.1, "seconds": 2.0}
    assert script._numbers(record) == script._numbers({"epoch": "1.0", "train_loss": "0.1", "seconds": "3.0"})
    assert script._numbers(record) != script._numbers({**record, "train_loss": 0.1 + 2**-56})


def test_the_backbone_of_the_digits_is_cut_where_the_quickstart_says() -> None:
    model = backbone(f"{ROOT / 'scripts/digits_backbone.py'}:make_model")
    assert model.default_cut == "layer3"
    assert model.shape("layer2") == (64, 8, 8)
    assert model.shape("layer3") == (128, 4, 4)
