"""What a command loads before it answers: help and a store's upkeep wait for no library that they don't use."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from support.extracting import run
from support.processes import Processes
from support.programs import BACKBONE, extract_flags, photographs
from support.tiny import arrays

from featstore import FeatureStore

MAIN = """
    import json, sys
    name = sys.argv[1]
    if name == "featstore":
        from featstore.cli.app import main
    else:
        from training.cli.app import main
    try:
        code = main(sys.argv[2:])
    except SystemExit as end:  # so typer ends when it has answered a shell
        code = end.code
    libraries = {each.partition(".")[0] for each in sys.modules}
    own = {each for each in sys.modules if each.startswith("featstore.")}
    print("\\n" + json.dumps([code, sorted(libraries | own)]))
"""

TORCH = {"torch", "torchvision", "sklearn", "scipy", "matplotlib", "safetensors", "PIL", "timm"}
ARRAYS = {"numpy", "h5py", "tqdm"}
READING = {f"featstore.images.{each}" for each in ("csv_tables", "parquet_tables", "folders", "labels", "image_set")}
HELP = TORCH | ARRAYS | READING | {"pydantic"}  # typer itself makes values of what is given with it

NOWHERE = ["--images", "nowhere", "--backbone", "resnet18", "--store", "feats"]


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A folder with a store, `feats`, of three sets, and their keys."""
    folder = tmp_path_factory.mktemp("start")
    store = FeatureStore(folder / "feats")
    keys = [run(arrays(3), store, dtype=dtype).keys[0] for dtype in ("float32", "float16", "bfloat16")]
    return folder, keys


def loaded(new_processes: Processes, *command: str, **options: object) -> tuple[int, set[str], str]:
    """Exit code of a command, the libraries and the modules of featstore that it loads, and what it prints."""
    printed = new_processes.answer(MAIN, *command, **options)
    shown, _, last = printed.rpartition("\n")
    code, modules = json.loads(last)
    assert "typer" in modules
    return code, set(modules), shown


@pytest.mark.parametrize(
    ("command", "code"),
    [
        ("featstore --help", 0),
        ("featstore extract --help", 0),
        ("featstore estimate --help", 0),
        ("featstore export --help", 0),
        ("featstore view --help", 0),
        ("featstore extract --no-such-flag", 2),
        ("featstore no-such-command", 2),
        ("featstore-train --help", 0),
        ("featstore-train head --help", 0),
        ("featstore-train report --help", 0),
        ("featstore-train predict --no-such-flag", 2),
    ],
)
def test_help_and_usage_errors_load_neither_arrays_nor_torch(
    new_processes: Processes, tmp_path: Path, command: str, code: int
) -> None:
    ended, modules, _ = loaded(new_processes, *command.split(), cwd=tmp_path)
    assert (ended, modules & HELP) == (code, set())


@pytest.mark.parametrize(
    "command",
    [
        ["featstore", "extract", *NOWHERE],
        ["featstore", "extract", *NOWHERE, "--precision", "int4"],
        ["featstore", "status", *NOWHERE, "--augment", "flip"],
        ["featstore", "ls"],
        ["featstore-train", "head", *NOWHERE, "--out", "run"],
        ["featstore-train", "head", *NOWHERE, "--out", "run", "--head", "none"],
        ["featstore-train", "finetune", *NOWHERE, "--out", "run", "--epochs", "1", "--lr", "fast"],
    ],
)
def test_what_is_wrong_with_flags_is_said_without_torch(
    new_processes: Processes, tmp_path: Path, command: list[str]
) -> None:
    ended, modules, _ = loaded(new_processes, *command, cwd=tmp_path)
    assert (ended, modules & TORCH) == (2, set())


@pytest.mark.parametrize(
    ("program", "words", "answer"),
    [
        ("featstore", "featstore ex", "extract\nexport"),
        ("featstore", "featstore show --st", "--store"),
        ("featstore", "featstore extract --ba", "--backbone\n--batch-size"),
        ("featstore", "featstore extract --store feats --reduce avg --pre", "--precision"),
        ("featstore", "featstore show 0123 --st", "--store"),
        ("featstore", "featstore estimate --dev", "--device\n--devices"),
        ("featstore-train", "featstore-train pre", "predict"),
        ("featstore", "featstore extract --augment flip+cut", "flip+cutout"),
        ("featstore-train", "featstore-train head --weights-", "--weights-prefix"),
        ("featstore-train", "featstore-train head --epochs 3 --hel", "--help"),
    ],
)
def test_a_shell_is_told_what_may_come_next_without_arrays_or_torch(
    new_processes: Processes, program: str, words: str, answer: str
) -> None:
    variable = f"_{program}_COMPLETE".replace("-", "_").upper()
    asked = {variable: "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split()) - 1)}
    ended, modules, shown = loaded(new_processes, program, environment=asked)
    assert (ended, shown.strip(), modules & HELP) == (0, answer, set())


def test_a_store_is_seen_checked_compared_and_cleared_up_without_torch(
    new_processes: Processes, stored: tuple[Path, list[str]], tmp_path: Path
) -> None:
    folder, (first, second, third) = stored
    shutil.copytree(folder / "feats", tmp_path / "feats")
    for command in (
        "ls",
        "ls --json",
        f"show {first}",
        f"diff {first} {second}",
        f"diff {second} {third}",
        "verify",
        "verify --repair",
        "gc --older-than 0s",
        f"remove {third} --yes",
    ):
        ended, modules, shown = loaded(new_processes, "featstore", *command.split(), "--store", "feats", cwd=tmp_path)
        assert (command, ended, modules & TORCH) == (command, 0, set())
        assert shown.strip()
    assert {each.key for each in FeatureStore(tmp_path / "feats").sets()} == {first, second}


def test_extracting_with_a_model_of_ones_own_loads_no_torchvision(new_processes: Processes, tmp_path: Path) -> None:
    photographs(tmp_path / "photos", 2)
    (tmp_path / "tiny.py").write_text(BACKBONE, encoding="utf-8")
    ended, modules, shown = loaded(new_processes, "featstore", "extract", *extract_flags(), cwd=tmp_path)
    assert (ended, modules & {"torchvision", "sklearn", "matplotlib", "timm"}) == (0, set())
    assert "conv2" in shown
