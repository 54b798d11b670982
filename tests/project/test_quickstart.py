from __future__ import annotations

import importlib.util
import io
import math
import os
import re
import shutil
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from PIL import Image
from support.processes import AS_A_SCRIPT, Processes
from support.programs import photographs

from featstore import backbone
from featstore.models.backbones import outline

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "quickstart.py"
PROMISES = (
    "a second extraction computed no row",
    "cached and live losses are equal, bit for bit",
    "unfreezing moved the first stage",
)


def promises(printed: str) -> dict[str, str]:
    """Claim -> what the quickstart says of it."""
    said = [line.split(None, 1) for line in printed.splitlines()[-5:-2]]
    return {claim: word for word, claim in said}


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("quickstart", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["quickstart"] = module
    spec.loader.exec_module(module)
    return module


def test_own_photographs_go_all_the_way_and_every_promise_holds(tmp_path: Path, processes: Processes) -> None:
    photographs(tmp_path / "photos", count=5)
    own = f"{os.path.relpath(ROOT / 'scripts/digits_backbone.py', tmp_path)}:make_model"
    flags = ["--images", "photos", "--backbone", own, "--epochs", "1", "--out", "made"]
    printed = processes.answer(AS_A_SCRIPT, str(SCRIPT), *flags, cwd=tmp_path)
    assert promises(printed) == dict.fromkeys(PROMISES, "yes")
    assert re.search(r"^head at layer3 +\d\.\d{3} +\d+\.\d\d +\d+\.\d\d$", printed, re.MULTILINE)
    assert "--cut layer2:none --cut layer3 --augment side_on --seeds 0-3 --dtype float32" in printed
    for name in ("views.png", "learning-rates.png", "history.png"):
        with Image.open(tmp_path / "made" / name) as plot:
            assert plot.size >= (600, 400)
    assert len((tmp_path / "made/predictions.csv").read_text(encoding="utf-8").splitlines()) == 11


@dataclass(frozen=True)
class Done:
    """What the quickstart on scikit-learn's digits came to, and what its verdict was of."""

    code: int
    printed: str
    job: Any
    steps: Any
    num_recomputed: int


@pytest.fixture(scope="module")
def digits(script: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Done:
    judged: list[Any] = []

    def verdict(*of: Any) -> Any:
        judged.extend(of)
        return judge(*of)

    judge = script._verdict
    out = tmp_path_factory.mktemp("quickstart") / "made"
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patched, redirect_stdout(printed):
        patched.setattr(script, "_verdict", verdict)
        patched.setattr(script, "NUM_DIGITS", 40)
        patched.setattr(sys, "argv", ["quickstart", "--epochs", "1", "--out", str(out)])
        code = script.main()
    return Done(code, printed.getvalue(), *judged)


def test_digits_go_all_the_way_and_every_promise_holds(digits: Done) -> None:
    assert digits.code == 0
    assert promises(digits.printed) == dict.fromkeys(PROMISES, "yes")
    assert re.search(r"^head at maps +\d\.\d{3} +\d+\.\d\d +\d+\.\d\d$", digits.printed, re.MULTILINE)
    assert re.search(r"^tail from stage3 +\d\.\d{3} +\d+\.\d\d +\d+\.\d\d$", digits.printed, re.MULTILINE)
    assert re.search(r"photographs/coffee.png +espresso +0\.9", digits.printed)
    assert len((digits.job.out / "predictions.csv").read_text(encoding="utf-8").splitlines()) == 41


def recomputed(done: Done, _: Path) -> Done:
    return replace(done, num_recomputed=1)


def one_bit_off(done: Done, folder: Path) -> Done:
    """The tail's loss as read from its run is the next float."""
    shutil.copytree(done.steps[1].run, folder / "tail")
    history = folder / "tail/history.csv"
    loss = done.steps[1].records()[0]["train_loss"]
    text = history.read_text(encoding="utf-8")
    history.write_text(text.replace(loss, str(math.nextafter(float(loss), math.inf))), encoding="utf-8")
    steps = [done.steps[0], replace(done.steps[1], run=folder / "tail"), done.steps[2]]
    return replace(done, steps=steps)


def unmoved(done: Done, folder: Path) -> Done:
    """The tuned model is the tail."""
    for name in ("tail", "tuned"):
        shutil.copytree(done.job.run("tail"), folder / "runs" / name)
    return replace(done, job=replace(done.job, out=folder))


@pytest.mark.parametrize(("broken", "claim"), list(zip((recomputed, one_bit_off, unmoved), PROMISES, strict=True)))
def test_each_promise_that_is_broken_is_named_and_ends_in_exit_code_1(
    script: ModuleType,
    digits: Done,
    broken: Callable[[Done, Path], Done],
    claim: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    done = broken(digits, tmp_path)
    assert script._verdict(done.job, done.steps, done.num_recomputed) == 1
    assert promises(capsys.readouterr().out) == {**dict.fromkeys(PROMISES, "yes"), claim: "NO"}


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
    "arguments",
    [["--backbone", "resnet18"], ["--cut", "layer3"], ["--images", "photos", "--weights", "none"], ["--epochs", "0"]],
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
