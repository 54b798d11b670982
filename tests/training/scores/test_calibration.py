"""A temperature: the optimum that scipy's minimiser finds, kept with the model, and never of images trained on."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.testing import assert_allclose, assert_array_equal
from scipy.optimize import minimize_scalar  # type: ignore[import-untyped]
from support.programs import Run
from support.tiny import arrays, pixels, staged

from featstore import Augment, ImageSet
from featstore.errors import FeatureStoreError
from training import Ensemble, Learner, Sidecar, runs
from training.scores.calibration import Calibration, fitted_temperature
from training.scores.metrics import expected_calibration_error, wilson_interval
from training.sidecar import Dealt


def noisy(count: int = 48) -> ImageSet:
    """Two classes that a head can tell, but for some labels that are wrong; a third is held out."""
    shown = pixels(count)
    shown[1::2] //= 3
    names = [place % 2 if place % 7 else 1 - place % 2 for place in range(count)]
    return ImageSet.from_arrays(shown, names).split(valid=0.34)


def fitted(**options: Any) -> Learner:
    settings: dict[str, Any] = {"head": "linear", "quiet": True, "device": "cpu", **options}
    learn = Learner(staged(), settings.pop("images", None) or noisy(), **settings)
    learn.fit(20, lr=3e-2)
    return learn


def drawn(task: str, scale: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits `scale` times as large as those that their targets were drawn by."""
    generator = torch.Generator().manual_seed(seed)
    honest = 2 * torch.randn(4000, 5, generator=generator)
    if task == "single":
        targets = torch.multinomial(torch.softmax(honest, 1), 1, generator=generator).squeeze(1)
    else:
        targets = torch.bernoulli(torch.sigmoid(honest), generator=generator)
    return scale * honest, targets


@pytest.mark.parametrize("task", ["single", "multi"])
@pytest.mark.parametrize("scale", [0.05, 1.0, 3.7, 400.0])
def test_the_temperature_is_the_optimum_that_scipy_finds_and_what_logits_were_scaled_by(
    task: str, scale: float
) -> None:
    logits, targets = drawn(task, scale)
    wide = logits.double()

    def loss(log_temperature: float) -> float:
        cooled = wide / np.exp(log_temperature)
        if task == "single":
            return float(F.cross_entropy(cooled, targets))
        return float(F.binary_cross_entropy_with_logits(cooled, targets.double()))

    found = fitted_temperature(logits, targets, task)
    start = np.log(scale)
    expected = minimize_scalar(loss, bounds=(start - 2, start + 2), method="bounded", options={"xatol": 1e-10})
    # Near an optimum the loss is flat: to 16 digits it is the same within 1e-8 of it, and scipy sees the loss alone.
    assert_allclose(found, np.exp(expected.x), rtol=1e-6)
    assert loss(np.log(found)) <= expected.fun + 1e-15
    assert_allclose(found, scale, rtol=0.1)  # 4,000 images


def test_where_no_temperature_is_the_best_that_is_said() -> None:
    targets = torch.tensor([0, 1, 0, 1])
    right = torch.tensor([[2.0, 0.0], [0.0, 3.0], [1.0, 0.5], [0.0, 0.1]])
    with pytest.raises(ValueError, match="All 4 images are predicted rightly, so the surer the better"):
        fitted_temperature(right, targets, "single")
    with pytest.raises(ValueError, match="no better than none at all"):
        fitted_temperature(-right, targets, "single")
    with pytest.raises(ValueError, match="no better than none at all"):
        fitted_temperature(torch.zeros(4, 2), targets, "single")
    labels = F.one_hot(targets, 2)
    with pytest.raises(ValueError, match="All 4 images"):
        fitted_temperature(2.0 * labels - 1, labels, "multi")
    with pytest.raises(ValueError, match="regression has none"):
        fitted_temperature(right, right, "regression")
    with pytest.raises(ValueError, match="aren't finite"):
        fitted_temperature(right * torch.inf, targets, "single")
    one_wrong = torch.tensor([[2.0, 0.0], [0.0, 3.0], [1.0, 0.5], [0.2, 0.1]])
    assert fitted_temperature(one_wrong, targets, "single") > 0


def test_calibrating_changes_how_sure_a_model_is_and_not_what_it_says() -> None:
    learn = fitted()
    raw, before = learn.predict_proba(learn.images), learn.evaluate()
    found = learn.calibrate()
    after, values = learn.evaluate(), learn.predict_proba(learn.images)
    assert found.temperature != 1
    assert (found.before, found.after) == (
        {name: before[name] for name in found.before},
        {name: after[name] for name in found.after},
    )
    assert after["loss"] < before["loss"]
    assert (after["accuracy"], after["f1"]) == (before["accuracy"], before["f1"])
    assert_array_equal(values.argmax(1), raw.argmax(1))
    logits = np.log(raw)
    expected = torch.softmax(torch.from_numpy(logits) / found.temperature, 1).numpy()
    assert_allclose(values, expected, rtol=1e-5)  # logits are float32, divided before they are probabilities
    outcomes = learn.outcomes()
    assert_allclose(outcomes.losses.mean(), after["loss"], rtol=1e-5)
    assert learn.predict(learn.images)[3].probability == values[3].max()
    assert str(found).startswith(f"temperature {found.temperature:.4g}, fitted to the 17 images of valid: loss ")
    assert learn.calibrate() == found  # of the model's own logits, not of divided ones


def test_it_is_saved_loaded_exported_and_averaged_with_the_run(tmp_path: Path) -> None:
    learn = fitted()
    learn.save(tmp_path / "raw")
    found = learn.calibrate()
    values = learn.predict_proba(arrays(5))
    learn.save(tmp_path / "run")
    again = Learner.load(tmp_path / "run", learn.images, module=staged(), quiet=True, device="cpu")
    assert again.calibration == found
    assert_array_equal(again.predict_proba(arrays(5)), values)
    again.save(tmp_path / "again")
    assert Learner.load(tmp_path / "again", module=staged(), quiet=True).calibration == found
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())["valid"]
    assert metrics == learn.evaluate() == again.evaluate()
    other = Learner.load(tmp_path / "raw", module=staged(), quiet=True, device="cpu")
    assert other.calibration is None
    mean = (values + other.predict_proba(arrays(5))) / 2
    assert_allclose(Ensemble([again, other]).predict_proba(arrays(5)), mean)
    learn.export(tmp_path / "model.pt2")
    pixels_of = torch.stack([torch.from_numpy(each) for each in pixels(4, size=16)]).permute(0, 3, 1, 2)
    with torch.no_grad():
        raw = learn.model(learn.view.normalise(pixels_of))
        exported = torch.export.load(tmp_path / "model.pt2").module()(pixels_of)
    assert_allclose(exported, raw / found.temperature, rtol=1e-4, atol=1e-5)  # `export.TOLERANCE`
    about = json.loads((tmp_path / "model.pt2.json").read_text())
    assert about["temperature"] == {"value": found.temperature, "is_in_logits": True}
    learn.export(tmp_path / "model.safetensors")
    about = json.loads((tmp_path / "model.safetensors.json").read_text())
    assert about["temperature"] == {"value": found.temperature, "is_in_logits": False}
    assert about["probabilities"].endswith(f"after logits are divided by the temperature {found.temperature!r}")


def test_each_view_of_an_image_is_divided_before_the_mean_and_embeddings_never() -> None:
    def seen(*seeds: int) -> Any:
        return learn.predict_proba(learn.images.valid, tta=Augment("flip", seeds=seeds), tta_weight=0.0)

    learn = fitted()
    embedded, raw = learn.embed(learn.images.valid)[1], seen(1)
    found = learn.calibrate()
    assert_array_equal(learn.embed(learn.images.valid)[1], embedded)
    expected = torch.softmax(torch.from_numpy(raw).log() / found.temperature, 1).numpy()
    assert_allclose(seen(1), expected, rtol=1e-5)  # logits are float32, divided before they are probabilities
    assert_allclose(seen(0, 1, 2), (seen(0) + seen(1) + seen(2)) / 3)


def test_several_labels_an_image_are_calibrated_too() -> None:
    shown = pixels(40)
    shown[1::2] //= 3
    labels = [["dark"] if place % 2 else ["light", "odd"][: 1 + place % 3 % 2] for place in range(40)]
    images = ImageSet.from_arrays(shown, labels, task="multi").split(valid=0.4)
    learn = fitted(images=images)
    raw = learn.predict_proba(images)
    found = learn.calibrate()
    assert (set(found.after), found.after["loss"] < found.before["loss"]) == ({"loss"}, True)
    logits = np.log(raw) - np.log1p(-raw)
    assert_allclose(learn.predict_proba(images), 1 / (1 + np.exp(-logits / found.temperature)), rtol=1e-4)


def test_images_that_were_trained_on_are_no_place_to_calibrate(tmp_path: Path) -> None:
    learn = fitted()
    with pytest.raises(ValueError, match=r"would make the model surer, not truer.*Give valid"):
        learn.calibrate("train")
    run = learn.save(tmp_path / "run")
    turned = noisy()
    turned = turned.with_splits(["valid" if each == "train" else "train" for each in turned.splits])
    again = Learner.load(run, turned, module=staged(), quiet=True, device="cpu")
    with pytest.raises(
        FeatureStoreError,
        match=r"Nothing is calibrated: 31 of the 31 images were trained on.*in Python learn.allow_leak",
    ):
        again.calibrate()
    assert again.calibration is None
    again.allow_leak = True
    assert again.calibrate().images.images == 31
    learn.images = turned
    with pytest.raises(FeatureStoreError, match="were trained on by an earlier fit"):
        learn.calibrate()


def test_a_fit_and_other_classes_take_it_away_and_scores_of_its_images_say_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    learn = fitted(quiet=False)
    found = learn.calibrate()
    logger = logging.getLogger("training")
    logger.addHandler(caplog.handler)
    try:
        learn.evaluate()
        assert "the temperature was fitted to these very images: their loss and calibration error" in caplog.text
        caplog.clear()
        learn.evaluate("train")
        assert "temperature" not in caplog.text
        learn.fit(1, lr=1e-3)
        assert f"The weights move, so the temperature {found.temperature:.4g} no longer holds" in caplog.text
        assert learn.calibration is None
        learn.calibrate()
        learn.extend_classes(["0", "1", "2"])
        assert "There are other classes, so the temperature" in caplog.text
        assert learn.calibration is None
    finally:
        logger.removeHandler(caplog.handler)


def test_a_run_says_its_temperature_and_the_registry_that_its_scores_are_of_the_images_it_was_fitted_to(
    tmp_path: Path,
) -> None:
    learn = fitted()
    learn.save(tmp_path / "raw")
    found = learn.calibrate()
    learn.save(tmp_path / "cool")
    sidecar = Sidecar.read(tmp_path / "cool")
    assert sidecar.configuration["temperature"] == found.temperature
    assert sidecar.more["calibration"] == found.facts()
    rows = runs(tmp_path).table
    assert [(row["run"], row["note"]) for row in rows] == [
        ("cool", "temperature fitted to these images"),
        ("raw", None),
    ]


def test_a_run_that_is_saved_again_says_what_made_it(tmp_path: Path) -> None:
    learn = fitted()
    learn.save(tmp_path / "raw")
    again = Learner.load(tmp_path / "raw", learn.images, module=staged(), quiet=True, device="cpu")
    found = again.calibrate()
    again.save(tmp_path / "cool")
    before, after = (Sidecar.read(tmp_path / name) for name in ("raw", "cool"))
    assert after.configuration == {**before.configuration, "temperature": found.temperature}
    assert (after.kind, after.fits, after.seconds, after.keys) == ("head", before.fits, before.seconds, before.keys)
    assert (after.split, after.more["epochs"], after.more["inputs"]) == (before.split, 20, before.more["inputs"])
    assert after.start is not None
    assert after.start["run"] == str(tmp_path / "raw")
    assert after.scores["accuracy"] == before.scores["accuracy"]
    assert after.scores["loss"].value == found.after["loss"]
    again.fit(1, lr=1e-3)  # from here on its own
    again.save(tmp_path / "further")
    assert [fit["epochs"] for fit in Sidecar.read(tmp_path / "further").fits] == [1]


def test_the_command_saves_a_run_with_a_temperature_beside_the_first(run: Run, here: Path) -> None:
    for name, other in (("cat", "dog"), ("dog", "cat")):
        for place in (1, 5, 8):
            (here / f"photos/{name}/00{place}.jpg").rename(here / f"photos/{other}/wrong{place}.jpg")
    model = ["--store", "feats", "--backbone", "tiny.py:make_model", "--size", "32", "--extract", "--valid", "0.5"]
    head = ["head", "--images", "photos", *model, "--epochs", "1", "--lr", "1e-2", "--out", "runs/raw"]
    assert run("featstore-train", *head).code == 0
    flags = ["--model", "runs/raw", "--images", "photos"]
    found = run("featstore-train", "calibrate", *flags, "--out", "runs/cool", "--json").json
    learn = Learner.load("runs/raw", ImageSet.from_folder("photos"), Learner.store_of("runs/raw"), quiet=True)
    assert found == {**learn.calibrate().facts(), "run": "runs/cool"}
    again = run("featstore-train", "evaluate", "--model", "runs/cool", "--images", "photos", "--json")
    assert again.json["valid"]["loss"] == found["after"]["loss"]
    assert "the temperature was fitted to these very images" in again.err
    refused = run("featstore-train", "calibrate", *flags, "--split", "train", "--out", "runs/new")
    assert (refused.code, refused.last_words) == (2, "--split is 'train'. Expected valid or test.")
    taken = run("featstore-train", "calibrate", *flags, "--out", "runs/cool")
    assert (taken.code, "holds a saved run already" in taken.err) == (1, True)
    shown = run("featstore-train", "calibrate", *flags, "--out", "runs/cool", "--overwrite").out
    assert shown == f"{learn.calibration} - runs/cool\n"


def test_facts_that_no_calibration_gave_are_refused() -> None:
    whole = Calibration(temperature=2.0, split="valid", images=Dealt(4, "a" * 64), before={"loss": 1.0}, after={})
    assert Calibration.from_facts(json.loads(json.dumps(whole.facts()))) == whole
    for wrong in ({"temperature": 0}, {"temperature": float("nan")}, {"images": 4}, {"before": None}):
        with pytest.raises((ValueError, TypeError, AttributeError)):
            Calibration.from_facts({**whole.facts(), **wrong})


def test_a_reliability_diagram_shows_shares_beside_probabilities() -> None:
    learn = fitted()
    found = learn.outcomes("train")
    rows = found.reliability(5)
    sure = found.probabilities.max(1)
    assert sum(row["images"] for row in rows) == len(found)
    for row in rows:
        inside = (sure > row["from"]) & (sure <= row["to"])
        assert row["images"] == inside.sum()
        assert_allclose([row["probability"], row["share"]], [sure[inside].mean(), found.is_right[inside].mean()])
        assert (row["share_from"], row["share_to"]) == wilson_interval(int(found.is_right[inside].sum()), inside.sum())
    gaps = sum(row["images"] * abs(row["share"] - row["probability"]) for row in rows) / len(found)
    assert_allclose(found.calibration_error(5), gaps)
    logits = torch.from_numpy(np.log(found.probabilities))
    assert_allclose(gaps, expected_calibration_error(logits, torch.from_numpy(found.targets), bins=5))
    axes = found.plot_reliability(5)
    drawn_at = axes.containers[0][0].get_xydata()
    assert_allclose(drawn_at, [[row["probability"], row["share"]] for row in rows])
    assert axes.get_title() == f"calibration error {found.calibration_error(5):.3f}"
