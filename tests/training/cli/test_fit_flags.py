from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest
import torch
from support.programs import Ran, Run

from featstore import FeatureStore, ImageSet, backbone
from training import Ensemble, Learner, choices
from training.cli.fit_flags import FitOptionFlags
from training.loop.averages import EMA, SWA
from training.loop.plan import FitOptions, Plan
from training.loop.steps import TRAINING_PRECISIONS
from training.mixing import CutMix, Mixup

FIT = ["--schedule", "step", "--weight-decay", "0.3", "--keep", "last"]
CYCLES = ["--cycles", "2", "--cycle-len", "1", "--cycle-mult", "2"]


def head(run: Run, *more: str, out: str = "runs/head") -> Ran:
    model = ["--store", "feats", "--backbone", "tiny.py:make_model", "--size", "32", "--extract"]
    return run("featstore-train", "head", "--images", "photos", *model, "--lr", "1e-2", "--out", out, *more)


def finetune(run: Run, *more: str, out: str = "runs/tuned") -> Ran:
    return run("featstore-train", "finetune", "--images", "photos", "--from", "runs/head", "--out", out, *more)


def tensors(run: str) -> bytes:
    return (Path(run) / "model.safetensors").read_bytes()


def test_a_head_in_cycles_is_the_fit_of_the_library_with_these_options(run: Run, here: Path) -> None:
    assert head(run, *FIT, *CYCLES, "--snapshots", "snaps").code == 0
    learn = Learner(
        backbone("tiny.py:make_model"),
        ImageSet.from_folder("photos").split(valid=0.2, seed=0),
        FeatureStore("feats"),
        view=Learner.load("runs/head").view,
        quiet=True,
    )
    learn.fit_cycles(2, 1e-2, cycle_mult=2, schedule="step", weight_decay=0.3)
    for own in (Learner.load("runs/head"), Ensemble.load("snaps").learners[1]):
        theirs = learn.model.tensors()
        assert all(torch.equal(each, theirs[name]) for name, each in own.model.tensors().items())
    assert {each.name for each in (here / "snaps").iterdir()} == {"cycle-1", "cycle-2"}


def test_each_option_of_a_fit_has_its_flag(run: Run, here: Path) -> None:
    asked: dict[str, tuple[str, object]] = {
        "schedule": ("step", "step"),
        "weight_decay": ("0.3", 0.3),
        "keep": ("last", "last"),
        "monitor": ("accuracy", "accuracy"),
        "patience": ("2", 2),
        "label_smoothing": ("0.1", 0.1),
        "class_weights": ("1,2", (1.0, 2.0)),
        "clip": ("0.5", 0.5),
        "accumulate": ("3", 3),
        "precision": ("bf16", "bf16"),
        "ema": ("0.8", EMA(0.8)),
        "mixup": ("0.3", [Mixup(0.3)]),
        "sampling": ("balanced", "balanced"),
        "batch_norm": ("frozen", "frozen"),
        "decay_norms": ("", True),
    }
    flags = [each for name, (text, _) in asked.items() for each in (f"--{name.replace('_', '-')}", text) if each]
    names = {"ema": "average", "mixup": "mix"}
    fit = {names.get(name, name): value for name, (_, value) in asked.items()}
    assert fit.keys() | {"on_epoch_end", "checkpoint", "resume"} == FitOptions.__annotations__.keys()
    assert head(run, "--batch-size", "2", "--epochs", "3", *flags).code == 0
    images, store = ImageSet.from_folder("photos").split(valid=0.2, seed=0), FeatureStore("feats")
    view = Learner.load("runs/head").view
    learn = Learner(backbone("tiny.py:make_model"), images, store, view=view, batch_size=2, quiet=True)
    learn.fit(3, 1e-2, **fit)  # type: ignore[arg-type]
    theirs = Learner.load("runs/head").model.tensors()
    assert all(torch.equal(each, theirs[name]) for name, each in learn.model.tensors().items())


def test_flags_that_are_left_out_leave_a_fit_as_it_is() -> None:
    assert Plan(**FitOptionFlags().options()) == Plan()
    assert FitOptionFlags(class_weights="balanced").options()["class_weights"] == "balanced"
    assert FitOptionFlags(mixup=0.2, cutmix=1.0).options()["mix"] == [Mixup(0.2), CutMix(1.0)]
    assert FitOptionFlags(swa=0.5).options()["average"] == SWA(0.5)
    assert choices.PRECISIONS == TRAINING_PRECISIONS


def test_the_mean_of_the_last_epochs_is_kept_where_it_is_asked_for(run: Run, here: Path) -> None:
    assert head(run, "--epochs", "4", "--swa", "0.5").code == 0
    images, store = ImageSet.from_folder("photos").split(valid=0.2, seed=0), FeatureStore("feats")
    saved = Learner.load("runs/head")
    learn = Learner(backbone("tiny.py:make_model"), images, store, view=saved.view, quiet=True)
    learn.fit(4, 1e-2, average=SWA(0.5))
    theirs = saved.model.tensors()
    assert all(torch.equal(each, theirs[name]) for name, each in learn.model.tensors().items())
    ran = head(run, "--epochs", "4", "--swa", "0.5", "--keep", "best", "--overwrite")
    assert (ran.code, "there is no best of them to keep" in ran.last_words) == (2, True)


def test_snapshots_are_replaced_only_when_that_is_said_and_all_of_them(run: Run, here: Path) -> None:
    head(run, *CYCLES, "--snapshots", "snaps")
    before = tensors("snaps/cycle-1")
    one = ["--cycles", "1", "--snapshots", "snaps", "--weight-decay", "5"]
    ran = head(run, *one, out="runs/other")
    assert (ran.code, ran.last_words.startswith("snaps/cycle-1 holds a saved run already.")) == (1, True)
    assert tensors("snaps/cycle-1") == before
    assert head(run, *one, "--overwrite").code == 0
    assert tensors("snaps/cycle-1") != before
    assert [each.name for each in (here / "snaps").iterdir()] == ["cycle-1"]  # else an ensemble would take both


def test_finetune_takes_the_options_of_a_fit_and_finds_its_rate(run: Run, here: Path) -> None:
    head(run, "--epochs", "2")
    ran = finetune(run, *FIT, "--epochs", "2", out="runs/found")
    assert ran.code == 0
    found = re.search(r"--lr ([\d.e-]+)", ran.err)
    assert found is not None
    finetune(run, *FIT, "--epochs", "2", "--lr", found[1], out="runs/given")
    assert tensors("runs/found") == tensors("runs/given")
    finetune(run, *FIT[:2], *FIT[4:], "--epochs", "2", "--lr", found[1], out="runs/other")
    assert tensors("runs/found") != tensors("runs/other")
    assert finetune(run, *CYCLES, "--lr", "1e-3", out="runs/cycles").code == 0
    with (here / "runs/cycles/history.csv").open(encoding="utf-8") as file:
        assert len([*csv.DictReader(file)]) == 3


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--keep", "first"], "--keep is 'first'. Expected last or best."),
        (["--precision", "int8"], "--precision is 'int8'. Expected fp32, bf16 or fp16."),
        (
            ["--clip", "0"],
            "--clip is 0, which leaves nothing of any gradient. Expected more than 0. Give more, or leave it out.",
        ),
        (
            ["--class-weights", "rare"],
            "--class-weights is 'rare'. Expected balanced, or a number for each class in their order, such as "
            "--class-weights 1,4,2.",
        ),
        (
            ["--ema", "0.9", "--swa", "0.5"],
            "--ema and --swa are two means of the weights. Expected one of them. Leave out the other.",
        ),
        (
            ["--schedule", "cosin"],
            "--schedule is 'cosin'. Expected constant, cosine, one_cycle, triangular, linear_warmup, cosine_warmup or "
            "step.",
        ),
        (
            ["--epochs", "2", "--cycles", "3"],
            "--epochs 2 and --cycles 3 both say how long to train. Expected one of them. Leave out --epochs: cycles "
            "have --cycle-len of them, each next one --cycle-mult times as many.",
        ),
        (
            ["--cycle-mult", "2"],
            "--cycle-mult is of cycles, and there are none. Give their number: --cycles 3; or no --cycle-mult.",
        ),
        (
            ["--snapshots", "snaps"],
            "--snapshots is of cycles, and there are none. Give their number: --cycles 3; or no --snapshots.",
        ),
    ],
)
def test_flags_that_make_no_fit_are_refused_before_anything_is_done(
    run: Run, here: Path, flags: list[str], sentence: str
) -> None:
    for ran in (head(run, *flags), finetune(run, *flags)):
        assert ran == Ran(2, "", f"{sentence}\n")
    assert not (here / "feats").exists()


def test_finetune_is_told_how_long(run: Run, here: Path) -> None:
    assert finetune(run) == Ran(
        2, "", "Nothing says how long to train. Expected a number of epochs: --epochs 5; or --cycles 3.\n"
    )


def test_resume_of_a_run_that_is_done_says_so(run: Run, here: Path) -> None:
    head(run, "--epochs", "1")
    before = tensors("runs/head")
    assert head(run, "--epochs", "1", "--resume") == Ran(
        1,
        "",
        "runs/head is a saved run, and no fit is kept beside it: it is done, and there is nothing to go on with. Use "
        "it as it is; or train once more into another folder, or in its place with --overwrite (in Python: "
        "overwrite=True).\n",
    )
    assert tensors("runs/head") == before
