"""The command `sweep` comes to what the library's does, in shares too, and ends with a run to go on with."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.programs import Run

from featstore import FeatureStore, ImageSet, backbone
from training import Grid, runs, sweep

MODEL = ["--backbone", "tiny.py:make_model", "--size", "32"]
IMAGES = ["--images", "photos", "--store", "feats"]
COMMAND = ["sweep", *IMAGES, *MODEL, "--batch-size", "4", "--epochs", "2", "--head", "linear"]


def test_a_sweep_is_a_table_and_a_run_to_go_on_with(run: Run, here: Path) -> None:
    flags = [*COMMAND, "--set", "lr=1e-3,1e-2", "--set", "head=linear,mlp", "--out", "runs/sweep", "--extract"]
    ran = run("featstore-train", *flags)
    assert ran.code == 0
    model = backbone("tiny.py:make_model")
    images, store = ImageSet.from_folder("photos").split(valid=0.2, seed=0), FeatureStore("feats")
    options: dict[str, Any] = {"view": model.view.resized(size=32), "batch_size": 4, "epochs": 2, "quiet": True}
    settings = Grid({"lr": [1e-3, 1e-2], "head": ["linear", "mlp"]})
    expected = sweep(model, images, store, settings, **options)
    *shown, foot, last = ran.out.splitlines()
    assert len(shown) == 5
    assert shown[0].split() == ["lr", "head", "accuracy", "from", "to", "epochs", "seconds"]
    assert foot == expected.foot
    assert last.startswith("The best is a run, to go on with: featstore-train finetune --images photos --from")
    refused = run("featstore-train", *flags).last_words
    assert refused.startswith("runs/sweep holds a sweep already.")
    assert "begin anew in its place with --overwrite" in refused
    again = run("featstore-train", *flags, "--resume", "--json").json
    assert [(row["lr"], row["head"]) for row in again["settings"]] == [
        (each.setting["lr"], each.setting["head"]) for each in expected.members
    ]
    told = json.loads((here / "runs/sweep/best/run.json").read_text())
    assert told["configuration"]["lr"] == expected.members[0].setting["lr"]
    assert len((here / "runs/sweep/best/history.csv").read_text().splitlines()) == 3
    remedy = last.split("featstore-train ")[1].split()
    assert run("featstore-train", *remedy, "--batch-size", "4").code == 0
    assert (here / "runs/sweep-tuned/model.json").exists()
    listed = runs("runs/sweep")
    assert [each.name for each in listed if each.has_model] == ["best"]  # settings keep their heads alone
    assert len(listed) == 4  # and the best stands there once
    settings_listed = {(each["lr"], each["head"]) for each in listed}
    assert settings_listed == {(lr, head) for lr in (1e-3, 1e-2) for head in ("linear", "mlp")}
    evaluated = run("featstore-train", "evaluate", "--model", "runs/sweep", *IMAGES[:2])
    assert "runs/sweep is no saved run: it has no model.json. Give the best of those in it: runs/sweep/best." in (
        evaluated.last_words
    )
    other = ["--set", "weight_decay=0.5", "--set", "decay_norms=false"]
    replaced = run("featstore-train", *flags, "--overwrite", *other, "--json").json
    assert {(row["weight_decay"], row["decay_norms"]) for row in replaced["settings"]} == {(0.5, False)}
    refused = run("featstore-train", *flags, "--set", "decay_norms=no", "--out", "other").last_words
    assert refused == "--set decay_norms is 'no'. Expected true or false."
    assert len(runs("runs/sweep")) == 4
    failed = run("featstore-train", *COMMAND, "--set", "lr=1e38", "--out", "failed", "--json")
    assert (failed.code, failed.json["best"], failed.json["settings"][0]["accuracy"]) == (1, None, None)
    assert failed.last_words.startswith("No setting has a score: ")
    assert run("featstore-train", *flags[:-2], "photos").last_words.startswith(
        "photos holds cat, dog, and a sweep has a"
    )


def test_shares_and_a_file_of_settings_make_the_same_table(run: Run, here: Path) -> None:
    extracted = ["--set", "lr=1e-2", "--out", "runs/first", "--extract"]
    assert run("featstore-train", *COMMAND, *extracted).code == 0
    (here / "sweep.toml").write_text('lr = {low = 1e-4, high = 1e-1, log = true}\nmix = ["none", "noise:0.1"]\n')
    sampled = ["--settings", "sweep.toml", "--sample", "6", "--sobol", "--sample-seed", "3"]
    whole = run("featstore-train", *COMMAND, *sampled, "--out", "runs/whole", "--json").json["settings"]
    assert len(whole) == 6
    assert all(1e-4 <= row["lr"] < 1e-1 for row in whole)
    flags = [
        *COMMAND,
        "--set",
        "lr=1e-4..1e-1:log",
        "--set",
        "mix=none,noise:0.1",
        *sampled[2:],
        "--out",
        "runs/shares",
    ]
    first = run("featstore-train", *flags, "--shard", "0/2")
    assert "The share that ends last shows the whole table" in first.out
    assert not (here / "runs/shares/best").exists()
    second = run("featstore-train", *flags, "--shard", "1/2", "--json").json
    assert [row["lr"] for row in second["settings"]] == [row["lr"] for row in whole]
    assert (here / "runs/shares/best/model.json").exists()


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ([], "There is nothing to try. Give values: --set lr=1e-3,3e-3"),
        (["--set", "lr"], "--set is 'lr'. Expected a name and its values"),
        (["--set", "lr=fast"], "'fast' is no number"),
        (["--set", "depth=3"], "A sweep has no setting 'depth'."),
        (["--set", "lr=0..1"], "Give some of them, --set lr=A,B, or draw from the range: --sample 20."),
        (["--set", "average=ema"], "average is 'ema'. Expected ema:DECAY or swa:START, as ema:0.99; or none."),
        (["--set", "mix=blend"], "mix is 'blend'. Expected one of mixup, cutmix, noise, brightness"),
        (["--set", "augment=flip"], "--augment flip needs seeds"),
        (["--set", "augment=flop", "--seeds", "0"], "--augment flop"),
        (["--set", "lr=1e-3", "--seeds", "0"], "--seeds 0 is given without an augmentation"),
        (["--set", "lr=1e-3", "--resume", "--overwrite"], "--overwrite deletes it"),
        (["--set", "lr=1e-3", "--sobol"], "--sobol and --sample-seed are of a sample"),
        (["--set", "lr=1e-3", "--shard", "2/2"], "--shard is '2/2'. Expected i/n"),
    ],
)
def test_what_makes_no_sense_is_refused(run: Run, here: Path, flags: list[str], sentence: str) -> None:
    ran = run("featstore-train", *COMMAND, *flags, "--out", "runs/sweep")
    assert (ran.code, ran.out) == (2, "")
    assert sentence in ran.last_words
    assert not (here / "runs").exists()


def test_augmentations_are_settings_spelled_as_their_flag(run: Run, here: Path) -> None:
    words = ["none", "flip", "side_on:max_zoom=1.05,rotation=5+flip"]
    flags = ["--set", f"augment={','.join(words)}", "--seeds", "0-1", "--set", "lr=1e-2", "--epochs", "1", "--extract"]
    found = run("featstore-train", *COMMAND, *flags, "--out", "runs/views", "--json").json["settings"]
    shown = {row["augment"] for row in found}
    assert shown == {None, "flip, seeds 0-1", "side_on:max_zoom=1.05,rotation=5+flip, seeds 0-1"}
    views = {
        (view.get("policy") or {}).get("name") for view in (each.spec.view for each in FeatureStore("feats").sets())
    }
    assert len(views) > 2


def test_tasks_of_ray_share_the_settings(run: Run, here: Path) -> None:
    pytest.importorskip("ray", reason="Ray isn't installed")
    assert run("featstore-train", *COMMAND, "--set", "lr=1e-2", "--out", "runs/first", "--extract").code == 0
    flags = [*COMMAND, "--set", "lr=1e-3,3e-3,1e-2"]
    whole = run("featstore-train", *flags, "--out", "runs/whole", "--json").json["settings"]
    ran = run("featstore-train", *flags, "--out", "runs/shared", "--engine", "ray", "--actors", "2", "--json")
    assert ran.code == 0, ran.err
    shared = ran.json
    assert [row["lr"] for row in shared["settings"]] == [row["lr"] for row in whole]
    assert shared["best"] == "runs/shared/best"
    refused = run("featstore-train", *flags, "--out", "runs/other", "--engine", "ray")
    assert "--engine ray goes with --actors N" in refused.last_words


def test_flags_of_the_view_are_of_each_backbone(run: Run, here: Path) -> None:
    shutil.copy(here / "tiny.py", here / "other.py")
    two = [*COMMAND, "--backbone", "other.py:make_model", "--set", "backbone=tiny.py:make_model,other.py:make_model"]
    assert run("featstore-train", *two, "--set", "lr=1e-2", "--out", "runs/two", "--extract").code == 0
    sizes = {each.spec.view["size"] for each in FeatureStore("feats").sets()}
    assert sizes == {32}
