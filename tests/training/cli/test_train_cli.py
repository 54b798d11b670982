"""The commands of `featstore-train` do what their functions do, and say what is wrong with flags.

Long, since the commands are told on one folder of photographs, in the order in which a person uses them.
"""

from __future__ import annotations

import csv
import inspect
import json
import re
import shlex
import shutil
import signal
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from PIL import Image
from support.processes import AS_A_MODULE, Processes
from support.programs import Ran, Run, photographs
from typer.models import OptionInfo

import featstore.cli.app
import training.cli.app
from featstore import FeatureStore, ImageSet, View, backbone
from training import Learner, cross_validate

EPOCHS = ["--epochs", "2"]
APPS = {"featstore": featstore.cli.app.app, "featstore-train": training.cli.app.app}
COMMANDS = [
    (program, command.name or command.callback.__name__, command.callback)
    for program, app in APPS.items()
    for command in app.registered_commands
    if command.callback is not None
]


def head_flags(*more: str, images: str = "photos", out: str = "runs/head", lr: str = "1e-2") -> list[str]:
    model = ["--store", "feats", "--backbone", "tiny.py:make_model", "--size", "32"]
    return ["head", "--images", images, *model, "--extract", *EPOCHS, "--lr", lr, "--out", out, *more]


def tune_flags(*more: str, images: str = "photos", start: str = "runs/head", out: str = "runs/tuned") -> list[str]:
    return ["finetune", "--images", images, "--from", start, *EPOCHS, "--lr", "1e-4,1e-3", "--out", out, *more]


def head(run: Run, *more: str, images: str = "photos", out: str = "runs/head", lr: str = "1e-2") -> Ran:
    return run("featstore-train", *head_flags(*more, images=images, out=out, lr=lr))


# ---- Results


def test_a_head_ends_with_its_accuracy_and_where_it_is(run: Run, here: Path) -> None:
    ran = head(run)
    assert ran.code == 0
    scores = json.loads((here / "runs/head/metrics.json").read_text(encoding="utf-8"))["valid"]
    interval = r"95 % interval \d\.\d{3}-\d\.\d{3}, 4 images"
    assert re.fullmatch(rf"valid accuracy {scores['accuracy']:.3f} \({interval}\) - runs/head\n", ran.out)
    assert "train: 16 images from features, tiny@conv2 concat, evaluation view" in ran.err
    files = {"model.safetensors", "model.json", "history.csv", "metrics.json", "valid_predictions.csv", "run.json"}
    assert files <= {path.name for path in (here / "runs/head").iterdir()}


def test_few_optimizer_steps_are_said_with_what_to_try(run: Run) -> None:
    assert "\n2 optimizer steps, which may be too few; try --batch-size 8\n" in head(run).err
    ran = head(run, "--batch-size", "8", "--epochs", "24", out="runs/longer")
    assert "\n48 optimizer steps, which may be too few; try more --epochs\n" in ran.err
    assert "optimizer step" not in head(run, "--batch-size", "8", "--epochs", "25", out="runs/long").err


def test_folds_give_a_run_each_and_a_table_and_are_advised_where_few_images_are_held_out(run: Run, here: Path) -> None:
    assert "\n4 images held out say little; --folds 5 scores all 20, each while it is held out\n" in head(run).err
    ran = head(run, "--folds", "2", out="runs/folds")
    assert (ran.code, "--folds" in ran.err) == (0, False)
    names = [line.split()[0] for line in ran.out.splitlines()]
    assert names == ["fold", "1", "2", "mean", "from", "to", "2"]
    assert re.search(r"2 folds, 20 images, each scored while it was held out: accuracy .* - runs/folds\n$", ran.out)
    model = backbone("tiny.py:make_model")
    expected = cross_validate(
        model,
        ImageSet.from_folder("photos"),
        FeatureStore("feats"),
        folds=2,
        epochs=2,
        lr=1e-2,
        view=model.view.resized(size=32),
        device="cpu",
        quiet=True,
    )
    ran = head(run, "--folds", "2", "--json", out="runs/again")
    assert ran.json == {"folds": list(expected.scores), "mean": expected.mean, "runs": "runs/again"}
    predicted = run(
        "featstore-train", "predict", "--model", "runs/folds/fold-1", "--model", "runs/folds/fold-2", "photos"
    )
    assert predicted.code == 0
    assert head(run, "--folds", "2", out="runs/folds").code == 1
    assert head(run, "--folds", "3", "--overwrite", out="runs/folds").code == 0
    assert head(run, "--folds", "2", "--overwrite", out="runs/folds").code == 0
    assert sorted(each.name for each in (here / "runs/folds").iterdir()) == ["fold-1", "fold-2", "predictions.csv"]
    assert head(run, "--overwrite", out="runs/folds").code == 1  # no run, but a folder of them
    assert head(run, "--folds", "2", "--resume", out="runs/others").code == 0
    assert not (here / "runs/others.folds").exists()


def test_folds_take_the_place_of_folds_alone(run: Run, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert head(run, "--folds", "3", out="runs/folds").code == 0
    assert head(run, "--folds", "2", "--overwrite", out="runs/folds").code == 0
    assert sorted(each.name for each in (here / "runs/folds").iterdir()) == ["fold-1", "fold-2", "predictions.csv"]
    assert head(run).code == 0
    ran = head(run, "--folds", "2", "--overwrite")
    assert (ran.code, "folds have a folder of their own" in ran.err) == (1, True)
    assert not (here / "runs/head/fold-1").exists()
    monkeypatch.setenv("WORLD_SIZE", "2")
    ran = head(run, "--folds", "2", out="runs/others")
    assert (ran.code, "the 2 processes that torchrun has started share one" in ran.err) == (2, True)


def test_training_reports_json_that_evaluate_repeats(run: Run) -> None:
    trained = head(run, "--json").json
    assert trained["inputs"] == "features"
    assert (trained["epochs"], trained["valid"]["images"]) == (2, 4)
    tuned = run("featstore-train", *tune_flags("--json")).json
    assert (tuned["inputs"], tuned["epochs"]) == ("images", 2)
    evaluated = run("featstore-train", "evaluate", "--model", "runs/tuned", "--images", "photos", "--json").json
    assert evaluated == {"valid": tuned["valid"], "inputs": "images"}
    evaluated = run("featstore-train", "evaluate", "--model", "runs/head", "--images", "photos", "--json").json
    assert evaluated == {"valid": trained["valid"], "inputs": "features"}  # to the last digit, though float16
    shutil.rmtree("feats")
    evaluated = run("featstore-train", "evaluate", "--model", "runs/head", "--images", "photos", "--json").json
    assert evaluated["inputs"] == "images"
    assert evaluated["valid"] == pytest.approx(trained["valid"], rel=1e-3)  # its features were stored as float16


def test_scores_of_images_that_a_run_trained_on_come_with_their_count(run: Run) -> None:
    head(run)
    evaluate = ["evaluate", "--model", "runs/head", "--images", "photos"]
    assert "trained on by" not in run("featstore-train", *evaluate).err
    assert "trained on by" not in run("featstore-train", *evaluate, "--split", "train").err
    other = ImageSet.from_folder("photos").split(valid=0.2, seed=3).valid.ids
    count = len(set(other) - set(ImageSet.from_folder("photos").split(valid=0.2, seed=0).valid.ids))
    ran = run("featstore-train", *evaluate, "--split-seed", "3")
    assert ran.code == 0
    assert f"{count} of the 4 images were trained on by runs/head: " in ran.err


def test_evaluate_says_how_many_new_images_it_leaves_out_and_how_to_score_all(run: Run, here: Path) -> None:
    head(run)
    assert "new to" not in run("featstore-train", "evaluate", "--model", "runs/head", "--images", "photos").err
    photographs(here / "test", count=10, first=20)
    ran = run("featstore-train", "evaluate", "--model", "runs/head", "--images", "test", "--json")
    assert (ran.code, ran.json["valid"]["images"]) == (0, 4)
    assert "16 of the 20 images are new to runs/head and were dealt to other splits than valid" in ran.err
    assert "to score all: --valid 0 --split train" in ran.err
    flags = ["--images", "test", "--valid", "0", "--split", "train", "--json"]
    everything = run("featstore-train", "evaluate", "--model", "runs/head", *flags)
    assert everything.json["train"]["images"] == 20


def test_the_same_image_in_training_and_validation_is_named(run: Run, here: Path) -> None:
    held_out = ImageSet.from_folder("photos").split(valid=0.2, seed=0).valid.ids[0]
    shutil.copy(here / "photos" / held_out, here / "photos" / Path(held_out).parent / "again.jpg")
    ran = head(run)
    assert ran.code == 0
    assert "1 held-out images are byte for byte the same as images in another split" in ran.err
    assert held_out in ran.err


def test_the_command_is_the_function_of_the_library(run: Run, here: Path) -> None:
    head(run)
    images = ImageSet.from_folder("photos").split(valid=0.2, seed=0)
    view = Learner.load("runs/head").view
    learn = Learner(backbone("tiny.py:make_model"), images, cut="conv2", view=view, quiet=True)
    learn.fit(2, 1e-2, keep="best")
    with (here / "runs/head/history.csv").open(newline="", encoding="utf-8") as file:
        losses = [float(row["valid_loss"]) for row in csv.DictReader(file)]
    assert losses == pytest.approx([record["valid_loss"] for record in learn.history.records], rel=2e-2)  # float16


def test_inputs_are_what_training_read_also_where_validation_is_stored(run: Run) -> None:
    head(run)
    fresh = head(run, "--augment", "flip", "--seeds", "fresh", "--json", out="runs/fresh").json
    assert fresh["inputs"] == "images"


def test_a_run_keeps_how_its_images_are_decoded(run: Run, here: Path) -> None:
    trained = head(run, "--size", "16", "--decode", "reduced", "--json").json
    assert trained["inputs"] == "features"
    assert Learner.load("runs/head", quiet=True).view == View(size=16, resize=18, decode="reduced")
    shutil.rmtree("feats")
    evaluated = run("featstore-train", "evaluate", "--model", "runs/head", "--images", "photos", "--json").json
    assert evaluated["inputs"] == "images"
    assert evaluated["valid"] == pytest.approx(trained["valid"], rel=1e-3)  # its features were stored as float16


def test_several_labels_report_map_and_f1(run: Run, here: Path) -> None:
    rows = [(path, "cat;pet" if path.parent.name == "cat" else "dog") for path in sorted(here.glob("photos/*/*.jpg"))]
    lines = ["path,label", *(f"{path.relative_to(here)},{label}" for path, label in rows)]
    (here / "labels.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    table = ["--task", "multi", "--label-sep", ";"]
    ran = head(run, *table, "--json", images="labels.csv")
    assert {"map", "f1", "loss", "images"} <= set(ran.json["valid"])
    assert "accuracy" not in ran.json["valid"]
    ran = run("featstore-train", "evaluate", "--model", "runs/head", "--images", "labels.csv", *table)
    assert re.fullmatch(r"valid (mAP \d\.\d{3}, )?(F1 \d\.\d{3}, )?loss \d+\.\d{3} \(4 images\)\n", ran.out)


def test_predictions_are_json_and_a_table(run: Run, here: Path) -> None:
    head(run)
    ran = run("featstore-train", "predict", "--model", "runs/head", "photos", "--csv", "all.csv", "--json")
    records = ran.json
    with (here / "all.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["image", "label", "probability", "cat", "dog"]
    assert [each["image"] for each in records] == [each["image"] for each in rows]
    assert len(records) == 20
    for record, row in zip(records, rows, strict=True):
        assert set(record) == {"image", "label", "probability", "top"}
        assert record["label"] == row["label"] == max(("cat", "dog"), key=lambda name: float(row[name]))
        assert record["probability"] == pytest.approx(float(row["probability"]), abs=1e-6)
    expected = Learner.load("runs/head", quiet=True).predict_proba(["photos"])[:, 0]
    assert [float(row["cat"]) for row in rows] == pytest.approx(expected.tolist(), abs=1e-6)
    shown = run("featstore-train", "predict", "--model", "runs/head", "photos/cat/003.jpg").out.splitlines()
    assert shown[0].split() == ["image", "label", "probability"]
    assert shown[1].split()[0] == "photos/cat/003.jpg"


# ---- Unusual images


def test_one_image_a_class_trains_without_validation(run: Run, here: Path) -> None:
    photographs(here / "one", count=1)
    ran = head(run, "--valid", "0", "--batch-size", "1", images="one")
    assert (ran.code, ran.out) == (2, "")
    assert ran.last_words == (
        "Batch norm can't be trained on one image at a time (2 to train on, batch size 1). Give more images or a "
        'larger --batch-size, or a head without it: --head linear (in Python: batch_size=, head="linear").'
    )
    ran = head(run, "--valid", "0", "--head", "linear", "--json", images="one")
    assert (ran.code, ran.json["valid"], ran.json["epochs"]) == (0, None, 2)
    ran = head(run, "--valid", "0", "--head", "linear", images="one", out="runs/other")
    assert re.fullmatch(r"train loss [\d.e+-]+, no validation images - runs/other\n", ran.out)


def test_images_that_come_to_a_run_that_held_nothing_out_are_trained_on(run: Run, here: Path) -> None:
    assert head(run, "--valid", "0").code == 0
    photographs(here / "photos", count=20, first=20)
    ran = run("featstore-train", *tune_flags("--json"))
    assert (ran.code, ran.json["valid"]) == (0, None)


def test_a_freeze_point_doesnt_say_where_the_head_sits(run: Run, here: Path) -> None:
    whole = backbone("tiny.py:make_model").tensors()
    torch.save({name: value for name, value in whole.items() if name.startswith(("conv1", "bn1"))}, "part.pth")
    for more in ([], ["--freeze-to", "conv1"]):
        ran = head(run, "--weights", "part.pth", *more)
        assert ran.code == 1
        assert "conv2" in ran.last_words


def test_without_labels_there_is_nothing_to_train_on(run: Run, here: Path) -> None:
    (here / "flat").mkdir()
    for place, path in enumerate(sorted(here.glob("photos/*/*.jpg"))[:4]):
        (here / "flat" / f"{place}.jpg").write_bytes(path.read_bytes())
    for ran in (head(run, images="flat"), run("featstore-train", *tune_flags(images="flat"))):
        assert ran == Ran(
            2,
            "",
            "flat has no labels, and there is nothing to train without. Expected a folder with a folder for each "
            "class, or a table with a column of labels. Give one with --images.\n",
        )
    assert not (here / "runs").exists()


def test_imported_features_given_for_a_backbone_are_trained_on_from_python(run: Run, here: Path) -> None:
    np.save(here / "clip.npy", np.random.default_rng(0).standard_normal((20, 6)).astype(np.float32))
    ids = sorted(str(path.relative_to("photos")) for path in Path("photos").rglob("*.jpg"))
    (here / "ids.txt").write_text("\n".join(ids), encoding="utf-8")
    made = ["--store", "feats", "--images", "photos"]
    assert run("featstore", "import", "clip.npy", "--name", "clip", "--ids", "ids.txt", *made).code == 0
    ran = run("featstore-train", "head", *made, "--backbone", "clip", "--out", "runs/clip")
    key = FeatureStore("feats").sets()[0].key[:8]
    assert (ran.code, ran.last_words) == (
        2,
        f"clip is no backbone: feats holds it as imported features ({key}), and what made them isn't here. Expected a "
        f'backbone. Train on them from Python: Learner(store.model("{key}"), ImageSet.from_store(store, NAME), store, '
        'head="linear")',
    )
    other = run("featstore-train", "head", *made, "--backbone", "clop", "--out", "runs/clip")
    assert other.last_words.startswith("'clop' is no backbone. Expected one of the 80 names")


def test_a_damaged_image_stops_training_or_is_left_out(run: Run, here: Path) -> None:
    damaged = here / "photos/cat/003.jpg"
    damaged.write_bytes(damaged.read_bytes()[:200])
    stopped = head(run)
    assert (stopped.code, stopped.out) == (1, "")
    assert "cat/003.jpg" in stopped.last_words
    assert "--on-error skip" in stopped.last_words
    assert not (here / "runs/head").exists()
    left_out = head(run, "--on-error", "skip")
    assert left_out.code == 0
    assert "cat/003.jpg" in left_out.err
    everything = ["predict", "--model", "runs/head", "photos", "--json"]
    stopped = run("featstore-train", *everything)
    assert (stopped.code, stopped.out) == (1, "")
    assert "cat/003.jpg" in stopped.last_words
    left_out = run("featstore-train", *everything, "--on-error", "skip")
    assert (left_out.code, len(left_out.json)) == (0, 19)
    assert "1 image can't be read, left out:\n  photos/cat/003.jpg" in left_out.err


def test_a_class_that_the_run_lacks_is_named(run: Run, here: Path) -> None:
    head(run)
    photographs(here / "photos", count=2, first=20, classes=("bird", "dog"))
    for command in (
        ["evaluate", "--model", "runs/head", "--images", "photos"],
        tune_flags(),
    ):
        ran = run("featstore-train", *command)
        assert (ran.code, ran.out) == (1, "")
        assert ran.last_words == (
            "The images have the class bird, which the model of runs/head doesn't know (it knows cat, dog). Train a "
            "head for the new classes, or leave their images out."
        )


# ---- Refused before anything is done


@pytest.mark.parametrize(
    ("more", "code", "sentence"),
    [
        (
            ["--lr", "fast"],
            2,
            "--lr is 'fast'. Expected positive numbers, such as --lr 3e-3 or --lr 1e-5,1e-3.",
        ),
        (["--lr", "-1"], 2, "--lr is '-1'. Expected positive numbers, such as --lr 3e-3 or --lr 1e-5,1e-3."),
        (["--head", "deep"], 2, "--head is 'deep'. Expected concat, linear, mlp or attention."),
        (["--reduce", "mean"], 2, "--reduce is 'mean'. Expected auto, none, avg, max, concat, token or tokens."),
        (["--cut", "layer9"], 2, "tiny has no cut 'layer9'. Its cuts are conv1, bn1, relu1, conv2, pool, flat, fc."),
        (
            ["--cut", "conv2:avg"],
            2,
            "The cut is 'conv2:avg', with a reduction as extract takes it; expected the two apart, as a head takes "
            'them: --cut conv2 --reduce avg (in Python: cut="conv2", reduce="avg").',
        ),
        (["--features", "7c41"], 1, "feats holds no feature set 7c41. List what it holds: featstore ls --store feats"),
        (
            ["--augment", "flip"],
            2,
            "--augment flip needs seeds, and there is no default for them. Give --seeds 0-3 for four fixed views, "
            "which can be stored, or, in training, --seeds fresh for new views each epoch.",
        ),
    ],
)
def test_wrong_input_is_a_sentence(run: Run, here: Path, more: list[str], code: int, sentence: str) -> None:
    (here / "feats").mkdir()
    ran = head(run, *more)
    assert (ran.code, ran.out, ran.last_words) == (code, "", sentence)
    assert not (here / "runs").exists()
    assert not list((here / "feats").iterdir())


def test_a_command_at_the_end_of_a_message_is_pasted_to_the_end_of_the_line(run: Run, here: Path) -> None:
    wanted = ["--images", "photos", "--store", "feats", "--backbone", "tiny.py:make_model"]
    run("featstore", "extract", *wanted, "--size", "32")
    train = ["featstore-train", "head", *wanted, "--size", "48", *EPOCHS, "--lr", "1e-2", "--out", "runs/head"]
    for refused, remedy in (
        (train, "featstore extract --images photos --store feats --backbone tiny.py:make_model --cut conv2 --size 48"),
        ([*train, "--features", "f00d"], "featstore ls --store feats"),
        (["featstore", "show", "f00d", "--store", "feats"], "featstore ls --store feats"),
        (["featstore", "backbones"], "featstore backbones NAME"),
    ):
        ran = run(*refused)
        assert ran.last_words.endswith(f": {remedy}")
        if "NAME" not in remedy:
            program, *arguments = shlex.split(remedy)
            assert run(program, *arguments).code == 0
    assert run(*train).code == 0


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ([], "Give either --from RUN_DIR, to go on with a saved run, or --backbone, for a new head."),
        (
            ["--from", "runs/head", "--cut", "conv2"],
            "--weights, --weights-prefix and --cut belong to --backbone; a run brings its own weights and its head.",
        ),
        (
            ["--from", "runs/head", "--weights-prefix", "teacher."],
            "--weights, --weights-prefix and --cut belong to --backbone; a run brings its own weights and its head.",
        ),
        (
            ["--from", "runs/head", "--size", "48"],
            "--size, --resize, --mean, --std, --interpolation and --decode come with the run of --from.",
        ),
        (
            ["--backbone", "tiny.py:make_model", "--cut", "conv2:avg"],
            "--cut is 'conv2:avg', with a reduction as extract takes it. finetune takes a cut alone, and reduces as "
            "auto does: --cut conv2. For another reduction train a head first (featstore-train "
            "head --cut conv2 --reduce avg) and go on with its run: --from RUN_DIR.",
        ),
    ],
)
def test_finetune_refuses_flags_that_dont_go_together(run: Run, flags: list[str], sentence: str) -> None:
    ran = run(
        "featstore-train", "finetune", "--images", "photos", "--epochs", "1", "--lr", "1e-3", "--out", "x", *flags
    )
    assert (ran.code, ran.out, ran.last_words) == (2, "", sentence)


def test_a_run_is_replaced_only_when_that_is_said(run: Run, here: Path) -> None:
    head(run)
    before = (here / "runs/head/model.safetensors").read_bytes()
    (here / "photos/cat/003.jpg").write_bytes(b"no image")  # which work of any length would meet
    again = head(run, lr="3e-2")
    assert again == Ran(
        1,
        "",
        "runs/head holds a saved run already. Choose another folder, or replace it with --overwrite "
        "(in Python: overwrite=True).\n",
    )
    assert (here / "runs/head/model.safetensors").read_bytes() == before
    assert head(run, "--overwrite", "--on-error", "skip", lr="3e-2").code == 0
    assert (here / "runs/head/model.safetensors").read_bytes() != before
    assert head(run, "--overwrite", out="photos") == Ran(
        1, "", "photos exists and is no saved run, so it isn't replaced. Choose another folder.\n"
    )


@pytest.mark.parametrize("command", [["evaluate", "--images", "photos"], ["predict", "photos"]])
def test_a_folder_without_a_run_is_a_sentence(run: Run, command: list[str]) -> None:
    assert run("featstore-train", *command, "--model", "photos").last_words == (
        "photos is no saved run: it has no model.json. Give the folder that --out named."
    )


# ---- Ends


def test_a_loss_that_is_no_longer_finite_is_a_sentence(run: Run, here: Path) -> None:
    ran = head(run, "--epochs", "30", "--head", "linear", lr="1e38")
    assert (ran.code, ran.out) == (1, "")
    assert re.match(r"The training loss became (nan|inf)\. Lower the learning rate \(--lr\)", ran.last_words)
    assert not any(here.glob("runs/head*"))  # nor what it would fail from again


def test_an_interrupted_training_leaves_no_run(run: Run, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("torch.optim.AdamW.step", interrupted)
    ran = head(run)
    assert (ran.code, ran.out, ran.last_words) == (130, "", "Interrupted.")
    assert not (here / "runs" / "head").exists()


def signalled(monkeypatch: pytest.MonkeyPatch, by: signal.Signals, *, at: int) -> None:
    """The optimizer's step number `at` of all that follow is interrupted; it and later ones are done."""
    step, calls = torch.optim.AdamW.step, count(1)

    def interrupted(optimizer: torch.optim.AdamW, closure: Any = None) -> Any:
        if next(calls) == at:
            signal.raise_signal(by)
        return step(optimizer, closure)

    monkeypatch.setattr("torch.optim.AdamW.step", interrupted)


def run_files(folder: Path) -> tuple[bytes, bytes, list[dict[str, str]]]:
    """Tensors, scores, and the history without the time it took."""
    with (folder / "history.csv").open(newline="", encoding="utf-8") as file:
        rows = [{name: value for name, value in row.items() if name != "seconds"} for row in csv.DictReader(file)]
    return (folder / "model.safetensors").read_bytes(), (folder / "metrics.json").read_bytes(), rows


@pytest.mark.usefixtures("heeds_signals")
def test_an_interrupted_command_goes_on_with_resume_and_saves_what_it_would_have(
    run: Run, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = ["--batch-size", "8"]  # two steps an epoch
    head(run, *more, out="runs/unbroken")
    with monkeypatch.context() as patch:
        signalled(patch, signal.SIGTERM, at=3)
        ran = head(run, *more)
    kept = "The fit so far is in runs/head.checkpoint: the same again with --resume (in Python: resume=True) goes on "
    assert (ran.code, ran.last_words) == (143, f"Interrupted. {kept}from there.")
    assert not (here / "runs/head").exists()
    refused = head(run, *more)
    assert refused.code == 1
    assert refused.last_words.startswith("runs/head.checkpoint holds a fit, 1 of 2 epochs and 1 steps done. Go on ")
    ran = head(run, *more, "--resume", lr="2e-2")
    assert (ran.code, "it differs in: lr ([0.01] there, [0.02] here)" in ran.last_words) == (1, True)
    ran = head(run, *more, "--resume")
    assert (ran.code, "\ngoing on from runs/head.checkpoint: 1 of 2 epochs and 1 steps done\n" in ran.err) == (0, True)
    assert run_files(here / "runs/head") == run_files(here / "runs/unbroken")
    assert not (here / "runs/head.checkpoint").exists()


@pytest.mark.usefixtures("heeds_signals")
def test_an_interrupted_finetune_goes_on_with_resume_too(run: Run, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    head(run)
    more = ["--batch-size", "8", "--augment", "side_on", "--seeds", "fresh"]
    run("featstore-train", *tune_flags(*more, out="runs/unbroken"))
    with monkeypatch.context() as patch:
        signalled(patch, signal.SIGINT, at=1)
        assert run("featstore-train", *tune_flags(*more)).code == 130
    assert run("featstore-train", *tune_flags(*more, "--resume")).code == 0
    assert run_files(here / "runs/tuned") == run_files(here / "runs/unbroken")


@pytest.mark.usefixtures("heeds_signals")
def test_overwrite_begins_an_interrupted_fit_anew(run: Run, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        signalled(patch, signal.SIGINT, at=1)
        assert head(run).code == 130
    assert (here / "runs/head.checkpoint").exists()
    ran = head(run, "--overwrite", lr="2e-2")
    assert (ran.code, "going on" in ran.err, (here / "runs/head.checkpoint").exists()) == (0, False, False)


@pytest.mark.usefixtures("heeds_signals")
def test_overwrite_deletes_no_fit_before_the_new_one_can_begin(
    run: Run, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        signalled(patch, signal.SIGINT, at=1)
        assert head(run).code == 130
    ran = head(run, "--overwrite", "--freeze-to", "layer9")
    assert (ran.code, "no cut 'layer9'" in ran.last_words) == (2, True)
    ran = head(run, "--resume")
    assert (ran.code, "going on from runs/head.checkpoint" in ran.err) == (0, True)

    with monkeypatch.context() as patch:
        signalled(patch, signal.SIGINT, at=1)
        assert head(run, "--overwrite").code == 130
    tensors = here / "runs/head.checkpoint/model.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-1])
    assert head(run, "--overwrite").code == 0  # and damaged it isn't in the way


def test_debug_adds_the_traceback(run: Run, here: Path) -> None:
    head(run)
    assert "Traceback" not in head(run).err
    assert "Traceback (most recent call last)" in head(run, "--debug").err


def test_help_lists_the_flags_of_the_contract(run: Run) -> None:
    image = _words(
        "images root path-column label-column label-sep split-column group-column task valid test split-seed"
    )
    image |= _words("top-folders one-hot valid-column suffix strip")
    view = _words("size resize mean std interpolation decode")
    how = _words("device batch-size workers on-error trust-code debug json help")
    items = _words("images top-folders root path-column split-column suffix strip split")
    tta = _words("tta augment tta-weight")
    more = _words(
        "seed overwrite allow-leak out epochs lr augment seeds freeze-to cut store backbone weights weights-prefix "
        "cycles cycle-len cycle-mult snapshots schedule weight-decay keep monitor patience label-smoothing "
        "class-weights clip accumulate precision ema swa mixup cutmix sampling batch-norm decay-norms"
    )
    contract = {
        "head": image | view | how | more | {"head", "features", "extract", "reduce", "resume", "config", "folds"},
        "finetune": image | view | how | more | {"from", "resume", "config"},
        "evaluate": image | how | tta | {"model", "split", "per-class"},
        "predict": how | items | tta | {"model", "csv", "overwrite"},
        "embed": how | items | {"model", "out", "overwrite", "cut", "reduce"},
    }
    for command, expected in contract.items():
        ran = run("featstore-train", command, "--help")
        assert (ran.code, ran.err) == (0, "")
        assert set(re.findall(r"^  --([a-z-]+)", ran.out, re.MULTILINE)) == expected
    text = " ".join(run("featstore-train", "head", "--help").out.split())
    for flag, default in {
        "--batch-size N": "64; x>=1",
        "--epochs N": "(head: 10, without --cycles); 1<=x<=1000000",
        "--weight-decay N": "0.01; x>=0",
        "--keep last|best": "(best; with --swa last)",
        "--head concat|linear|mlp|attention": "concat",
        "--lr LR": "(the finder's suggestion)",
        "--seed N": "0; x>=0",
    }.items():
        after = text[text.index(flag) :]
        assert re.search(r"\[default: ([^]]*)\]", after)[1] == default  # type: ignore[index]
    assert "--reduce auto: concat for maps, token for a ViT, none for vectors" in text
    assert run("featstore-train", "head").code == 2


@pytest.mark.parametrize(("program", "command"), [names for *names, _ in COMMANDS])
def test_every_option_of_both_programs_is_written_in_lower_case(run: Run, program: str, command: str) -> None:
    options = re.findall(r"^  (--?[\w-]+)", run(program, command, "--help").out, re.MULTILINE)
    assert "--help" in options
    assert options == [option.lower() for option in options]


def test_no_option_is_called_by_its_metavar_alone() -> None:
    # typer 0.27 writes the flag of `lr: Annotated[str, Option(metavar="LR")]` as --LR; other versions as --lr.
    for program, command, callback in COMMANDS:
        for name, parameter in inspect.signature(callback).parameters.items():
            if parameter.annotation is typer.Context:
                continue
            (flag,) = parameter.annotation.__metadata__
            has_own_name = flag.default is not ...  # in Annotated, typer keeps the first name in this place
            if isinstance(flag, OptionInfo) and not has_own_name:
                assert (flag.metavar or "").lower().replace("-", "_") != name, f"{program} {command}"


@pytest.mark.parametrize(("program", "command"), [("featstore", "extract"), ("featstore-train", "head")])
def test_an_unknown_option_is_named(run: Run, program: str, command: str) -> None:
    ran = run(program, command, "--qqq")
    assert (ran.code, ran.out) == (2, "")
    # How the first sentence is punctuated differs between versions of typer.
    expected = rf"No such option:? '?--qqq'?\. {program} {command} --help lists what can be given\."
    assert re.fullmatch(expected, ran.last_words)


def test_the_program_runs_as_a_module(here: Path, processes: Processes) -> None:
    ran = processes.run(AS_A_MODULE, "training", "predict", "--model", "nowhere", "photos")
    assert (ran.returncode, ran.stdout) == (1, "")
    assert ran.stderr.startswith("nowhere is no saved run")


def test_a_grayscale_photograph_trains_as_any_other(run: Run, here: Path) -> None:
    for path in here.glob("photos/*/*.jpg"):
        with Image.open(path) as image:
            gray = image.convert("L")
        gray.save(path)
    assert head(run).code == 0


def _words(text: str) -> set[str]:
    return set(text.split())
