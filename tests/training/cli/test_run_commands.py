"""What commands do with a saved run: the library's own functions, on images without labels too."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import numpy as np
import pytest
from support.programs import Run, photographs

from featstore import Augment, ImageSet
from training import Learner

MODEL = ["--model", "runs/head"]


@pytest.fixture
def saved(run: Run, here: Path) -> Path:
    """A directory with a run, its photographs, and a table of some of these without labels."""
    flags = ["--images", "photos", "--store", "feats", "--backbone", "tiny.py:make_model", "--size", "32", "--extract"]
    assert run("featstore-train", "head", *flags, "--epochs", "1", "--lr", "1e-2", "--out", "runs/head").code == 0
    names = [f"{name}/{place:03}.jpg" for place in (4, 0, 7) for name in ("dog", "cat")]
    rows = [f"{name},{'test' if place % 3 else 'train'}" for place, name in enumerate(names)]
    (here / "test.csv").write_text("\n".join(["file,split", *rows]), encoding="utf-8")
    return here


def test_a_table_without_labels_is_predicted_in_its_order(run: Run, saved: Path) -> None:
    table = ["--images", "test.csv", "--root", "photos", "--path-column", "file"]
    records = run("featstore-train", "predict", *MODEL, *table, "--json").json
    with (saved / "test.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [each["image"] for each in records] == [row["file"] for row in rows]
    expected = Learner.load("runs/head", quiet=True).predict([f"photos/{row['file']}" for row in rows])
    assert [each["probability"] for each in records] == [each.probability for each in expected]
    chosen = run("featstore-train", "predict", *MODEL, *table, "--split", "test", "--json").json
    assert [each["image"] for each in chosen] == [row["file"] for row in rows if row["split"] == "test"]


def test_a_test_split_is_dealt_kept_out_and_scored_at_the_end(run: Run, saved: Path) -> None:
    dealt = ["--images", "photos", "--store", "feats", "--backbone", "tiny.py:make_model", "--size", "32"]
    ran = run(
        "featstore-train", "head", *dealt, "--test", "0.2", "--epochs", "1", "--lr", "1e-2", "--out", "runs/three"
    )
    told = "4 of 20 images held out, 4 kept as test (--valid 0.2, --test 0.2, --split-seed 0)."
    assert told in ran.err
    images = ImageSet.from_folder("photos").split(valid=0.2, test=0.2, seed=0)
    learn = Learner.load("runs/three", images, Learner.store_of("runs/three"), quiet=True)
    model = ["--model", "runs/three", "--images", "photos"]
    ran = run("featstore-train", "evaluate", *model, "--split", "test", "--json")
    assert ran.json == {"test": learn.evaluate("test"), "inputs": "features"}
    assert "trained on" not in ran.err
    ran = run("featstore-train", "predict", *model, "--split", "test", "--json")
    assert [each["image"] for each in ran.json] == [*images.test.ids]
    # New images are dealt by the run's rule, of which the share for test is a part.
    photographs(saved / "more", count=10, first=20)
    more = ImageSet.from_folder("more")
    learn = Learner.load("runs/three", more, quiet=True)
    assert learn.images.splits.tolist() == more.split(valid=0.2, test=0.2, seed=0).splits.tolist()
    ran = run("featstore-train", "predict", "--model", "runs/three", "--images", "more", "--split", "test")
    assert (ran.code, "20 images of 20 are new to runs/three, and in none of its splits" in ran.err) == (2, True)
    ran = run("featstore-train", "predict", *model, *MODEL, "--split", "test")
    assert (ran.code, "runs/three and runs/head deal these images differently" in ran.err) == (2, True)


def test_views_of_a_policy_count_in_predictions_and_scores(run: Run, saved: Path) -> None:
    flips = ["--tta", "3", "--augment", "flip", "--tta-weight", "0.4"]
    records = run("featstore-train", "predict", *MODEL, "photos/cat", *flips, "--json").json
    learn = Learner.load("runs/head", ImageSet.from_folder("photos"), quiet=True)
    views = Augment("flip", seeds=range(3))
    expected = learn.predict("photos/cat", tta=views, tta_weight=0.4)
    assert records == [each.facts() for each in expected]
    assert records != [each.facts() for each in learn.predict("photos/cat")]
    ran = run("featstore-train", "evaluate", *MODEL, "--images", "photos", *flips, "--json")
    assert ran.json["valid"] == pytest.approx(learn.evaluate(tta=views, tta_weight=0.4), rel=1e-3)  # float16
    shown = run("featstore-train", "evaluate", *MODEL, "--images", "photos").out
    interval = r"95 % interval \d\.\d{3}-\d\.\d{3}, 4 images"
    assert re.fullmatch(rf"valid accuracy \d\.\d{{3}} \({interval}\), calibration error \d\.\d{{3}}\n", shown)


def test_embeddings_are_written_with_the_ids_they_belong_to(run: Run, saved: Path) -> None:
    ran = run("featstore-train", "embed", *MODEL, "photos", "--cut", "relu1", "--out", "found.npz", "--json")
    assert ran.json == {"file": "found.npz", "images": 20, "shape": [16]}
    ids, values = Learner.load("runs/head", quiet=True).embed("photos", "relu1")
    with np.load(saved / "found.npz") as found:
        assert tuple(found["ids"]) == ids
        np.testing.assert_array_equal(found["values"], values)
    table = ["--images", "test.csv", "--root", "photos", "--path-column", "file"]
    ran = run("featstore-train", "embed", *MODEL, *table, "--reduce", "avg", "--out", "some.npz")
    assert ran.out == "6 x 16 float32 in some.npz\n"


def test_a_file_that_is_there_is_replaced_only_where_that_was_asked_for(run: Run, saved: Path) -> None:
    taken = {name: (saved / name).read_bytes() for name in ("test.csv", "tiny.py")}
    asked = {
        "predict": [*MODEL, "photos/cat", "--csv"],
        "embed": [*MODEL, "photos/cat", "--out"],
        "runs": ["--csv"],
        "report": ["runs/head", "--out"],
        "lr-find": ["--images", "photos", "--from", "runs/head", "--csv"],
        "compare": ["--images", "photos", "--store", "feats", "--backbone", "tiny.py:make_model", "--plot"],
    }
    endings = {"embed": ".npz", "report": ".html", "compare": ".png"}
    for command, flags in asked.items():
        name = f"taken{endings.get(command, '.csv')}"
        (saved / name).write_bytes(taken["test.csv"])
        ran = run("featstore-train", command, *flags, name)
        told = f"{name} exists already. Choose another name, or replace it with --overwrite."
        assert (ran.code, told in ran.err, (saved / name).read_bytes()) == (1, True, taken["test.csv"])
        ran = run("featstore-train", command, *flags, f"nowhere/{name}")
        assert (ran.code, f"nowhere/{name} lies in a folder that isn't there." in ran.err) == (1, True)
    assert run("featstore-train", "predict", *asked["predict"], "taken.csv", "--overwrite").code == 0
    with (saved / "taken.csv").open(newline="", encoding="utf-8") as file:
        assert len([*csv.DictReader(file)]) == 10


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["predict"], "Give either images, folders or a table by their paths, or a set with --images."),
        (["predict", "photos", "--images", "photos"], "Give either images, folders or a table by their paths"),
        (["predict", "photos", "--root", "x"], "--root belongs to a set. Give that with --images."),
        (["predict", "--images", "photos", "--split", "test"], "--split is test, and photos has no such images"),
        (["predict", "photos", "--tta", "8"], "--tta 8 needs a policy, as without one all views would be the same"),
        (["predict", "photos", "--augment", "flip"], "--augment flip is for views of an image. Say how many: --tta 8"),
        (["predict", "photos", "--tta", "2", "--augment", "flap"], "--augment flap: "),
        (["embed", "photos", "--out", "found.csv"], "--out is 'found.csv'. Expected a name that ends in .npz."),
    ],
)
def test_items_and_views_that_dont_go_together_are_refused(
    run: Run, saved: Path, flags: list[str], sentence: str
) -> None:
    command, *rest = flags
    ran = run("featstore-train", command, *MODEL, *rest)
    assert (ran.code, ran.out) == (2, "")
    assert sentence in ran.last_words
