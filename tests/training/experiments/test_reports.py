"""Reports: each number and image on the page is that of the learner, and what can't be shown is said."""

from __future__ import annotations

import copy
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.programs import Run, extract_flags, workplace
from support.tiny import staged

from featstore import FeatureStore, FeatureStoreError, ImageSet
from featstore.images.names import Task
from featstore.pages import projection
from training import (
    CrossValidation,
    Learner,
    LearningRates,
    Sidecar,
    choices,
    cross_validate,
    label_suspects,
    report,
    runs,
)
from training.experiments import reports
from training.sidecar import Dealt, Score

pytest.importorskip("plotly", reason="plotly isn't installed")

EVIL = "<script>alert(1)</script>"


def pixels(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 24, 24, 3), dtype=np.uint8)


def labelled(count: int = 30) -> ImageSet:
    return ImageSet.from_arrays(pixels(count), ["ant", EVIL, "cow"] * (count // 3), name="insects").split(0.4)


@pytest.fixture(scope="module")
def learn() -> Learner:
    learner = Learner(staged(), labelled(), quiet=True)
    learner.fit(2, 1e-2)
    return learner


class Shown:
    """What a page holds."""

    def __init__(self, path: Path) -> None:
        self.text = path.read_text(encoding="utf-8")
        facts = re.findall(r'<script type="application/json"[^>]*>(.*?)</script>', self.text)
        *figures, pictures = map(json.loads, facts)
        self.figures: list[dict[str, Any]] = figures
        self.pictures: dict[str, Any] = pictures
        self.titles = re.findall(r"<section[^>]*><h2>(.*?)</h2>", self.text)

    def table(self, title: str) -> list[list[str]]:
        """The values of the first table of a section, by which it is sorted, its head first."""
        section = self.text.split(f"<h2>{title}</h2>")[1].split("</section>")[0].split("</table>")[0]
        head = re.findall(r"<th[^>]*><button>(.*?)</button>", section)
        rows = [re.findall(r'data-value="(.*?)"', row) for row in re.findall(r"<tr><td.*?</tr>", section)]
        return [head, *rows]

    def gallery(self, title: str) -> list[int]:
        section = self.text.split(f"<h2>{title}</h2>")[1].split("</section>")[0]
        return [int(place) for place in re.findall(r'data-place="(\d+)"', section)]


def test_a_report_shows_what_a_learner_made_of_its_images(learn: Learner, tmp_path: Path) -> None:
    rates = LearningRates((1e-3, 1e-2, 1e-1), (2.0, 1.0, 3.0), (2.0, 1.2, 2.5), 1e-3)
    found = report(learn, out=tmp_path / "report.html", learning_rates=rates)
    page = Shown(tmp_path / "report.html")
    assert page.titles == [
        "Runs", "Learning curves", "Learning-rate finder", "Largest losses", "Least sure", "Map (pca)", "Classes",
        "Calibration", "Suspected labels", "Near-duplicates across splits",
    ]  # fmt: skip
    assert (found.num_runs, found.details, found.num_thumbnails, found.notes) == (1, "this learner", 30, ())
    assert found.num_bytes == (tmp_path / "report.html").stat().st_size
    outcomes = learn.outcomes()
    place_of = {name: place for place, name in enumerate(learn.images.ids)}
    worst = [place_of[outcomes.images.ids[each]] for each in outcomes.places("loss")]
    assert page.gallery("Largest losses") == worst[: len(outcomes)]
    head, row = page.table("Runs")
    scored = learn.evaluate()
    assert float(dict(zip(head, row, strict=True))["accuracy"]) == pytest.approx(scored["accuracy"], abs=1e-12)
    losses, *_ = page.figures
    assert [trace["name"] for trace in losses["data"]] == ["train loss", "valid loss"]
    (matrix,) = [each for each in page.figures if each["data"][0]["type"] == "heatmap"]
    assert "&lt;script&gt;" in json.dumps(matrix)
    assert EVIL not in page.text


def test_images_of_another_split_that_were_trained_on_are_neither_scored_nor_shown_unsaid(
    learn: Learner, tmp_path: Path
) -> None:
    other = copy.copy(learn)
    is_valid = learn.images.splits == "valid"
    held_out, trained = np.flatnonzero(is_valid)[:8], np.flatnonzero(~is_valid)[:5]
    splits = np.where(np.isin(np.arange(30), [*held_out, *trained]), "valid", "train")
    other.images = learn.images.with_splits(splits.tolist())
    found = report(other, out=tmp_path / "report.html")
    said = (
        "5 of the 13 valid images were trained on by an earlier fit: they are left out of all that is scored here, and "
        "marked where they are shown."
    )
    assert found.notes == (said,)
    page = Shown(tmp_path / "report.html")
    assert said in page.text
    assert {*page.gallery("Largest losses"), *page.gallery("Least sure")} == {*held_out.tolist()}
    outcomes = learn.outcomes()
    right = [outcomes.is_right[outcomes.images.ids.index(learn.images.ids[place])] for place in held_out]
    head, row = page.table("Runs")
    assert float(dict(zip(head, row, strict=True))["accuracy"]) == np.mean(right)
    marked = [int(place) for place, label in page.pictures["labels"].items() if label.endswith("valid, trained on")]
    assert marked == trained.tolist()
    assert other.images.splits.tolist() == splits.tolist()
    other.images = learn.images.with_splits(["test" if each in trained else "train" for each in range(30)])
    with pytest.raises(FeatureStoreError, match=r"All 5 test images of insects were trained on by an earlier fit, so"):
        report(other, out=tmp_path / "none.html", split="test")
    assert not (tmp_path / "none.html").exists()
    report(other, out=tmp_path / "none.html", split="train")


def test_neighbours_and_map_are_of_what_the_head_is_given(learn: Learner, tmp_path: Path) -> None:
    report(learn, out=tmp_path / "report.html")
    page = Shown(tmp_path / "report.html")
    _, features = learn.embed(learn.images)
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    similar = unit @ unit.T
    np.fill_diagonal(similar, -np.inf)
    for place, near in page.pictures["near"].items():
        assert [other for other, _ in near] == np.argsort(-similar[int(place)], kind="stable")[:8].tolist()
    assert len(page.pictures["near"]) == 30
    expected = projection.projected(features).points
    (drawn,) = [
        each for each in page.figures if "customdata" in each["data"][0] and each["data"][0].get("mode") == "markers"
    ]
    points = {
        place: (x, y)
        for trace in drawn["data"]
        for place, x, y in zip(trace["customdata"], trace["x"], trace["y"], strict=True)
    }
    np.testing.assert_allclose([points[place] for place in range(30)], expected, rtol=1e-4, atol=1e-6)  # 5 digits


def test_a_page_is_of_a_sample_where_there_are_many_images(
    learn: Learner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reports, "MOST_POINTS", 20)
    monkeypatch.setattr(reports, "MOST_THUMBNAILS", 15)
    found = report(learn, out=tmp_path / "report.html")
    page = Shown(tmp_path / "report.html")
    assert found.num_thumbnails == len(page.pictures["thumbnails"]) == 15
    assert found.notes == ("Thumbnails are of 15 of the 20 images on the page.",)
    assert "A sample of 20 of 30 images" in page.text
    # Those of galleries come first, and are on the map.
    galleries = {*map(str, page.gallery("Largest losses"))}
    assert galleries <= page.pictures["thumbnails"].keys()
    assert galleries <= page.pictures["near"].keys()


def test_runs_are_ranked_and_the_best_is_looked_at(tmp_path: Path) -> None:
    images = labelled()
    for number, epochs in enumerate((1, 4)):
        learner = Learner(staged(), images, quiet=True, seed=number)
        learner.fit(epochs, 1e-2)
        learner.save(tmp_path / f"run{number}")
    paths = [tmp_path / "run0", tmp_path / "run1"]
    undealt = images.with_splits([""] * len(images))
    with pytest.raises(Exception, match="no name"):  # made in Python: only its owner has the backbone
        report(paths, out=tmp_path / "report.html", images=undealt)
    assert not (tmp_path / "report.html").exists()
    found = report(paths, out=tmp_path / "report.html")
    page = Shown(tmp_path / "report.html")
    assert found.details is None
    assert "No images were given" in found.notes[0]
    assert page.titles == ["Runs", "Learning curves"]
    head, *rows = page.table("Runs")
    accuracies = [float(dict(zip(head, row, strict=True))["accuracy"]) for row in rows]
    assert accuracies == sorted(accuracies, reverse=True)
    assert {row[0] for row in rows} == {*map(str, paths)}
    assert len(page.figures[0]["data"]) == 2
    with pytest.raises(ValueError, match=r"details is nowhere, which isn't among"):
        report(paths, out=tmp_path / "report.html", details="nowhere")


@pytest.mark.parametrize(("name", "better", "worse"), [("mae", 3.0, 5.0), ("map", 0.9, 0.8)])
def test_losses_in_units_of_their_own_rank_no_run(tmp_path: Path, name: str, better: float, worse: float) -> None:
    for run, score, loss in (("a", worse, 0.06), ("b", better, 0.36)):
        (tmp_path / run).mkdir()
        scores = {name: Score(score), "loss": Score(loss)}
        Sidecar(kind="head", split={"valid": Dealt(9, "0" * 64)}, scored="valid", scores=scores).write(tmp_path / run)
    assert [each.name for each in reports._ranked([*runs(tmp_path)])] == ["b", "a"]


def test_a_calibrated_run_is_ranked_by_its_scores_and_one_of_other_images_comes_last(tmp_path: Path) -> None:
    def of(name: str, accuracy: float, images: str = "a", **more: Any) -> None:
        (tmp_path / "runs" / name).mkdir(parents=True)
        split = {"valid": Dealt(9, images * 64)}
        scores = {"accuracy": Score(accuracy), "loss": Score(accuracy + (name == "plain"))}  # surer, and wrong
        Sidecar(split=split, scored="valid", scores=scores, more=more).write(tmp_path / "runs" / name)

    of("plain", 0.7)
    of("poor", 0.5)
    of("calibrated", 0.8, calibration={"images": {"digest": "a" * 64}})
    of("others", 0.9, "b")
    of("equal", 0.7)
    report(tmp_path / "runs", out=tmp_path / "report.html")
    _, *rows = Shown(tmp_path / "report.html").table("Runs")
    assert [Path(row[0]).name for row in rows] == ["calibrated", "equal", "plain", "poor", "others"]


def test_of_a_cross_validation_each_image_counts_while_it_was_held_out(tmp_path: Path) -> None:
    found = cross_validate(staged(), labelled(), folds=3, epochs=1, lr=1e-2, quiet=True)
    assert isinstance(found, CrossValidation)
    told = report(found, out=tmp_path / "report.html")
    page = Shown(tmp_path / "report.html")
    assert (told.num_runs, told.details) == (3, "the 3 folds")
    outcomes = found.outcomes()
    assert page.gallery("Largest losses") == outcomes.places("loss")[:24].tolist()
    head, *rows = page.table("Classes")
    assert f"{int(outcomes.is_right.sum())} of 30 held-out images" in page.text
    assert head == ["class", "taken for", "images"]
    assert sum(int(row[2]) for row in rows) == int((~outcomes.is_right).sum())


def test_suspected_labels_are_those_of_images_that_were_held_out(learn: Learner, tmp_path: Path) -> None:
    report(learn, out=tmp_path / "report.html")
    suspects = label_suspects(learn.outcomes())
    page = Shown(tmp_path / "report.html")
    assert len(suspects) > 0
    shown = [page.pictures["names"][str(place)] for place in page.gallery("Suspected labels")]
    assert tuple(shown) == suspects.ids[:24]
    report(learn, out=tmp_path / "report.html", split="train")
    assert "Suspected labels" not in Shown(tmp_path / "report.html").titles


def test_near_duplicates_are_the_pairs_across_splits_that_every_pair_compared_finds(tmp_path: Path) -> None:
    shown = pixels(24)
    shown[20] = shown[3]
    splits = ["train"] * 12 + ["valid"] * 6 + ["test"] * 6
    images = ImageSet.from_arrays(shown, ["ant", "bee"] * 12, splits=splits)
    learner = Learner(staged(), images, quiet=True)
    learner.fit(1, 1e-2)
    report(learner, out=tmp_path / "report.html")
    _, features = learner.embed(images)
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    pairs = [
        (one, other)
        for one in range(24)
        for other in range(one, 24)
        if splits[one] != splits[other] and unit[one] @ unit[other] >= 0.97
    ]
    page = Shown(tmp_path / "report.html")
    assert page.gallery("Near-duplicates across splits")[:2] == [3, 20]
    told = int(re.findall(r"([\d,]+) pairs? of images in different splits", page.text)[0].replace(",", ""))
    most = sum(min(8, sum(one == each for one, _ in pairs)) for each in range(24))
    assert told == most > 0
    is_cut = any(sum(one == each for one, _ in pairs) > 8 for each in range(24))
    assert (f"At least {told:,} pairs of images in" in page.text) is is_cut is True


def test_a_folder_of_runs_stands_for_them_and_a_damaged_one_is_named(learn: Learner, tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        learn.save(tmp_path / "runs" / name)
    (tmp_path / "runs" / "c" / "run.json").write_text("{")
    (tmp_path / "runs" / "b" / "history.csv").unlink()
    found = report(tmp_path / "runs", out=tmp_path / "report.html")
    assert found.num_runs == 2
    assert any("The run c can't be read" in note for note in found.notes)
    assert any(note.startswith(f"The epochs of {tmp_path / 'runs' / 'b'} can't be read: ") for note in found.notes)
    _, *rows = Shown(tmp_path / "report.html").table("Runs")
    assert [Path(row[0]).name for row in rows] == ["a", "b"]
    with pytest.raises(ValueError, match="There is no folder"):
        report(tmp_path / "nowhere", out=tmp_path / "report.html")
    with pytest.raises(FeatureStoreError, match="lies in a folder that isn't there"):  # before any run is looked for
        report(tmp_path / "nowhere", out=tmp_path / "no" / "report.html")


@pytest.mark.parametrize("task", ["multi", "regression"])
def test_several_labels_and_numbers_have_what_is_theirs(task: Task, tmp_path: Path) -> None:
    labels: Any = [["ant"], ["ant", "bee"], []] * 8 if task == "multi" else np.arange(24.0)
    images = ImageSet.from_arrays(pixels(24), labels, task=task).split(0.3)
    learner = Learner(staged(), images, quiet=True)
    learner.fit(1, 1e-2)
    report(learner, out=tmp_path / "report.html")
    page = Shown(tmp_path / "report.html")
    assert ("Classes" in page.titles) == (task == "multi")
    assert {"Runs", "Largest losses", "Map (pca)"} <= {*page.titles}
    assert not {"Least sure", "Calibration"} & {*page.titles}


def test_the_choices_of_the_command_are_those_of_the_function() -> None:
    assert choices.PROJECTIONS == projection.METHODS


def test_the_command_writes_a_page_of_a_saved_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    workplace(tmp_path, monkeypatch)
    assert run("featstore", "extract", *extract_flags()).code == 0
    made = [*extract_flags(), "--epochs", "2", "--lr", "1e-2"]
    assert run("featstore-train", "head", *made, "--out", "runs/a").code == 0
    (tmp_path / "lr.csv").write_text("lr,loss,smoothed\n1e-3,2,2\n1e-2,1,1\n")
    asked = ["report", "runs/a", "--images", "photos", "--out", "report.html", "--lr-csv", "lr.csv"]
    told = run("featstore-train", *asked, "--json")
    assert told.code == 0, told.err
    facts = told.json
    assert facts["details"] == "runs/a"
    page = Shown(tmp_path / "report.html")
    assert "Learning-rate finder" in page.titles
    assert facts["thumbnails"] == len(page.pictures["names"]) == 20
    assert page.pictures["labels"]["0"].endswith(("train", "valid"))
    # A table that deals the images anew: what the run has trained on is no held-out image by that.
    splits = {"train": "valid", "valid": "train"}
    rows = [
        f"{name},{splits[page.pictures['labels'][place].split(' · ')[-1]]},{name.split('/')[0]}"
        for place, name in page.pictures["names"].items()
    ]
    (tmp_path / "swapped.csv").write_text("\n".join(["path,split,label", *rows]))
    swapped = ["report", "runs/a", "--images", "swapped.csv", "--root", "photos", "--out", "swapped.html"]
    told = run("featstore-train", *swapped)
    assert told.code == 1
    assert "All 16 valid images of swapped were trained on by runs/a" in told.err
    (tmp_path / "swapped.csv").write_text("\n".join(["path,split,label", *rows]).replace(",train,", ",valid,", 1))
    told = run("featstore-train", *swapped)
    assert told.code == 0
    assert "16 of the 17 valid images were trained on by runs/a: they are left out" in told.err
    # Of folds each image counts once, as the fold that held it out said, however a table deals the images.
    assert run("featstore-train", "head", *made, "--folds", "2", "--out", "runs/cv").code == 0
    told = run("featstore-train", "report", "runs/cv", *swapped[2:], "--overwrite")
    assert told.code == 0, told.err
    assert "by 20 held-out images of swapped" in (tmp_path / "swapped.html").read_text()
    # Where the images went away, their features are still there, and their names stand in their places.
    shutil.rmtree(tmp_path / "photos")
    told = run("featstore-train", "report", "runs/a", "--out", "report.html", "--overwrite")
    assert told.code == 0
    assert Shown(tmp_path / "report.html").titles == ["Runs", "Learning curves"]
    store = FeatureStore("feats")
    again = report("runs/a", out="report.html", images=ImageSet.from_store(store), store=store)
    assert again.num_thumbnails == 0
    assert again.notes == ("20 images can't be read now; the name stands in the place of each.",)
    assert Shown(tmp_path / "report.html").pictures["near"] == page.pictures["near"]


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (["--out", "report.pdf"], "ends in .html"),
        (["--out", "report.html", "--split", "all"], "--split"),
        (["--out", "report.html", "--projection", "isomap"], "--projection"),
        (["--out", "report.html", "--label-column", "x"], "--label-column belongs to images"),
    ],
)
def test_what_is_wrong_with_flags_is_said(run: Run, flags: list[str], word: str) -> None:
    told = run("featstore-train", "report", "nowhere", *flags)
    assert told.code == 2
    assert word in told.err


def test_a_table_that_is_none_of_the_finder_is_refused(run: Run, tmp_path: Path) -> None:
    (tmp_path / "lr.csv").write_text("a,b\n1,2\n")
    told = run("featstore-train", "report", "nowhere", "--out", "r.html", "--lr-csv", str(tmp_path / "lr.csv"))
    assert told.code == 1
    assert "is no table of lr-find" in told.err
