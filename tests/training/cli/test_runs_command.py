"""The registry as a command: what the library lists, by flags."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from support.processes import Processes
from support.programs import Run

from training import Sidecar, runs
from training.sidecar import Dealt, Score

SET_A, SET_B = Dealt(812, "a" * 64), Dealt(4, "b" * 64)


@pytest.fixture
def listed(here: Path) -> Path:
    """Four records below runs/, one of other images and one damaged."""
    for name, accuracy, scored, configuration in (
        ("a", 0.9, SET_A, {"cut": "layer3", "lr": 1e-3, "mix": None, "decay_norms": False}),
        ("b", 0.95, SET_A, {"cut": "layer4", "lr": [1e-5, 1e-3], "mix": None, "decay_norms": False}),
        ("deep/c", 1.0, SET_B, {"cut": "layer4", "lr": 0.01, "mix": ["Mixup(0.4)"], "decay_norms": True}),
        ("d", 0.5, SET_A, {}),
    ):
        folder = here / "runs" / name
        folder.mkdir(parents=True)
        Sidecar(
            kind="probe",
            configuration=configuration,
            split={"valid": scored},
            scored="valid",
            scores={"accuracy": Score(accuracy, (accuracy - 0.1, min(1.0, accuracy + 0.1)), "wilson")},
        ).write(folder)
    (here / "runs/d/run.json").write_text("{", encoding="utf-8")
    return here


def test_runs_are_listed_sorted_and_marked(run: Run, listed: Path) -> None:
    ran = run("featstore-train", "runs", "runs", "--sort", "accuracy")
    assert (ran.code, ran.out) == (0, f"{runs('runs').query(sort='accuracy').in_words()}\n")
    assert [line.split()[0] for line in ran.out.splitlines()[:4]] == ["run", "deep/c", "b", "a"]
    assert ran.out.splitlines()[1].endswith("scored on other images")
    assert "1 run can't be read:\n  d: runs/d/run.json is damaged" in ran.out
    assert run("featstore-train", "runs").out == f"{runs('runs').in_words()}\n"


@pytest.mark.parametrize(
    ("conditions", "expected"),
    [
        (["cut=layer4"], ["b", "deep/c"]),
        (["cut==layer4"], ["b", "deep/c"]),
        (["cut=layer4", "accuracy<=0.95"], ["b"]),
        (["lr=1e-3"], ["a"]),
        (["lr=1e-5,1e-3"], ["b"]),
        (["mix=none"], ["a", "b"]),
        (["mix=Mixup(0.4)"], ["deep/c"]),
        (["decay_norms=yes"], ["deep/c"]),
        (["accuracy>=0.95"], ["b", "deep/c"]),
        (["scored_on=aaaaaaaa"], ["a", "b"]),
        (["cut=layer9"], []),
    ],
)
def test_conditions_choose_runs_by_values_as_they_are_written(
    run: Run, listed: Path, conditions: list[str], expected: list[str]
) -> None:
    flags = [part for each in conditions for part in ("--where", each)]
    found = run("featstore-train", "runs", "runs", *flags, "--json").json
    assert [row["run"] for row in found["runs"]] == expected
    assert [*found["damaged"]] == ["d"]


def test_a_condition_that_no_run_meets_is_told_with_what_there_is(run: Run, listed: Path) -> None:
    ran = run("featstore-train", "runs", "runs", "--where", "cut=layr4", "--where", "lr>=1e-4")
    assert (ran.code, ran.out.splitlines()[0]) == (0, "0 runs")
    assert ran.err == "no run fits --where cut=layr4; of cut they have: layer3, layer4\n"


def test_columns_json_and_csv_hold_what_the_table_does(run: Run, listed: Path) -> None:
    table = runs("runs").query(sort=("accuracy", "max")).table
    ran = run("featstore-train", "runs", "runs", "--sort", "accuracy:max", "--csv", "runs.csv", "--json")
    assert ran.json["runs"] == table
    assert ran.err == "3 runs in runs.csv\n"
    with (listed / "runs.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["accuracy"] for row in rows] == ["1.0", "0.95", "0.9", ""]
    assert rows[-1]["note"].startswith("damaged: runs/d/run.json")
    chosen = run("featstore-train", "runs", "runs", "--columns", "cut,lr", "--json").json["runs"]
    assert [*chosen[0]] == ["run", "cut", "lr", "note"]
    shown = run("featstore-train", "runs", "runs", "--columns", "cut,lr", "--where", "cut=layer4").out
    assert [line.split() for line in shown.splitlines()[:2]] == [
        ["run", "cut", "lr", "note"],
        ["b", "layer4", "1e-05,0.001"],
    ]


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["nowhere"], "There is no folder nowhere. Give one that runs were saved below"),
        (["runs", "--sort", "acuracy"], "No run here has 'acuracy'. Did you mean accuracy?"),
        (["runs", "--sort", "accuracy:up"], "--sort is 'accuracy:up'. Expected a column, or one with :max or :min"),
        (["runs", "--sort", "accuracy:min:max"], "No run here has 'accuracy:min'"),
        (["runs", "--where", "layer4"], "--where is 'layer4'. Expected such as cut=layer4"),
        (["runs", "--where", "cat=layer4"], "No run here has 'cat'. Did you mean cut?"),
        (["runs", "--where", "accuracy>=high"], "--where accuracy>=high compares with 'high'. Expected a number."),
        (["runs", "--columns", "cat"], "No run here has 'cat'. Did you mean cut?"),
        (["runs", "--columns", "cat", "--json"], "No run here has 'cat'. Did you mean cut?"),
        (["runs", "--where", "cut!=layer4"], "--where is 'cut!=layer4'. Expected such as cut=layer4"),
        (["runs", "--where", "accuracy>0.9"], "--where is 'accuracy>0.9'. Expected such as cut=layer4"),
        (["runs", "--sort", "Accuracy"], "No run here has 'Accuracy'. Did you mean accuracy?"),
    ],
)
def test_what_is_wrong_with_flags_is_said(run: Run, listed: Path, flags: list[str], sentence: str) -> None:
    ran = run("featstore-train", "runs", *flags)
    assert (ran.code, ran.out) == (2, "")
    assert sentence in ran.last_words


def test_runs_are_listed_without_torch_or_arrays(new_processes: Processes, listed: Path) -> None:
    program = """
        import sys
        from training.cli.app import main
        code = main(["runs", "runs", "--sort", "accuracy", "--json"])
        print("\\n", code, *sorted({"torch", "numpy", "sklearn", "pandas", "PIL"} & {*sys.modules}))
    """
    assert new_processes.answer(program, cwd=listed).splitlines()[-1].split() == ["0"]
