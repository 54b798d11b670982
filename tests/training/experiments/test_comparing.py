"""Comparing: backbones on the same images, with what each costs and where they can't be told apart."""

from __future__ import annotations

import weakref
from math import comb
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import kendalltau  # type: ignore[import-untyped]
from sklearn.datasets import load_digits
from support.tiny import VIEW, net, staged

from featstore import FactsDifferError, FeatureStore, ImageSet, MissingFeaturesError, extract
from featstore.models.staged import StagedModel
from training import Comparison, compare
from training.experiments import comparing
from training.experiments.comparing import _inner
from training.experiments.probing import probed
from training.scores.metrics import wilson_interval
from training.scores.transferability import transfer_scores

CUTS = ["layer1", "layer2"]


def digits(count: int = 160, valid: float = 0.25) -> ImageSet:
    """Digits of three classes as colour images of 24 pixels, dealt."""
    found = load_digits(n_class=3)
    pixels = np.kron(found.images[:count], np.ones((1, 3, 3))) * 15
    images = ImageSet.from_arrays(np.repeat(pixels[..., None], 3, 3).astype(np.uint8), found.target[:count])
    return images.split(valid=valid, seed=0) if valid else images


def two() -> list[StagedModel]:
    """Two networks of the same kind with other weights and names."""
    return [StagedModel.from_module(net(seed), view=VIEW, name=f"net{seed}") for seed in (0, 1)]


@pytest.fixture(scope="module")
def filed(tmp_path_factory: pytest.TempPathFactory) -> tuple[ImageSet, FeatureStore, Comparison]:
    store = FeatureStore(tmp_path_factory.mktemp("compared") / "features")
    images = digits()
    return images, store, compare(two(), images, store, cuts=CUTS)


def test_each_backbone_is_probed_at_each_cut_and_the_best_stands_first(filed: Any) -> None:
    images, store, found = filed
    assert {each.name for each in found.entries} == {f"net{seed}@{cut} concat" for seed in (0, 1) for cut in CUTS}
    values = [each.probes["linear"].value for each in found.entries]
    assert values == sorted(values, reverse=True)
    assert values[0] > 0.8  # by chance a third
    for each in found.entries:
        assert each.computed == len(images)
        assert each.width == store.set(each.key).parts[0].shape[0]
        assert each.num_bytes == 2 * each.width
        assert each.seconds is not None
        assert each.seconds > 0
    by_name = {each.name: each for each in found.entries}
    layer1 = net().layer1
    assert by_name["net0@layer1 concat"].parameters == sum(each.numel() for each in layer1.parameters())


def test_a_number_is_that_of_a_probe_on_the_images_held_out(filed: Any) -> None:
    images, store, found = filed
    for each in found.entries:
        rows = store.features(images, each.key).tensor(dtype=torch.float32).numpy()
        training, held_out = np.flatnonzero(images.splits == "train"), np.flatnonzero(images.splits == "valid")
        targets = images.targets
        for name, result in each.probes.items():
            expected = probed(
                name,
                rows[training],
                targets[training],
                rows[held_out],
                task="single",
                columns=3,
                inner=_inner(images.train),
            )
            right = int((expected.said.argmax(1) == targets[held_out]).sum())
            assert result.value == right / len(held_out)
            assert result.interval == wilson_interval(right, len(held_out))
            assert result.settings == (expected.setting,)
        assert each.transfer == transfer_scores(rows[training], targets[training])


def test_settings_are_chosen_without_the_labels_of_the_images_held_out(filed: Any) -> None:
    images, store, found = filed
    labels = images.targets.copy()
    is_valid = images.splits == "valid"
    labels[is_valid] = (labels[is_valid] + 1) % 3
    pixels = np.stack([images.read(place) for place in range(len(images))])
    wrong = ImageSet.from_arrays(pixels, labels, splits=images.splits.tolist())
    other = compare(two(), wrong, store, cuts=CUTS, extract=False)
    before = {each.key: each for each in found.entries}
    assert {each.key for each in other.entries} == before.keys()
    for each in other.entries:
        for name, result in each.probes.items():
            assert result.settings == before[each.key].probes[name].settings
            assert result.value < 0.5 < before[each.key].probes[name].value
        assert each.transfer == before[each.key].transfer


def test_what_is_stored_is_reused_and_timed_on_request_alone(filed: Any) -> None:
    images, store, found = filed
    again = compare(two(), images, store, cuts=CUTS)
    assert [each.name for each in again.entries] == [each.name for each in found.entries]
    assert all(each.computed == 0 and each.seconds is None for each in again.entries)
    timed = compare(two()[:1], images, store, cuts=["layer1"], probes=["knn"], time_all=True)
    assert timed.best.seconds is not None


def test_rows_of_one_set_are_gone_before_those_of_the_next_are_read(
    filed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, store, _ = filed
    seen: list[weakref.ref[Any]] = []
    transfer, read = comparing._transfer, FeatureStore.features

    def watched(rows: Any, *rest: Any) -> Any:
        seen.append(weakref.ref(rows))
        return transfer(rows, *rest)

    def reading(*given: Any, **options: Any) -> Any:
        assert not any(each() is not None for each in seen)
        return read(*given, **options)

    monkeypatch.setattr(comparing, "_transfer", watched)
    monkeypatch.setattr(FeatureStore, "features", reading)
    compare(two(), images, store, cuts=["layer1"], probes=["ridge"], extract=False)
    assert len(seen) == 2


def test_ties_are_named_by_mcnemars_exact_test(filed: Any) -> None:
    _, _, found = filed
    one, other = found.entries[:2]
    here, there = one.probes["linear"].is_right, other.probes["linear"].is_right
    only, also = int((here & ~there).sum()), int((~here & there).sum())
    total = only + also
    tail = sum(comb(total, some) for some in range(min(only, also) + 1)) / 2**total
    assert found.p_value(one, other) == pytest.approx(min(1.0, 2 * tail))
    assert found.p_value(one, one) == 1.0
    expected = [
        f"{one.name} and {other.name} can't be told apart on {found.num_images} images"
        for one, other in zip(found.entries, found.entries[1:], strict=False)
        if (found.p_value(one, other) or 0) >= 0.05
    ]
    assert [sentence.partition(":")[0] for sentence in found.ties()] == expected
    best, worst = found.entries[0], found.entries[-1]
    assert (found.p_value(best, worst) or 0) == found.p_value(worst, best)


def test_transferability_is_held_against_what_was_measured(filed: Any) -> None:
    _, _, found = filed
    values = [each.probes["linear"].value for each in found.entries]
    for name, tau in found.rank_correlations.items():
        assert tau == pytest.approx(kendalltau([each.transfer[name] for each in found.entries], values).statistic)
    assert "Kendall's tau with the measured accuracy: logme " in str(found)


def test_over_folds_each_image_is_held_out_once(store: FeatureStore) -> None:
    images = digits(60, valid=0)
    found = compare([staged()], images, store, cuts=["layer1"], folds=3, probes=["ridge"])
    assert found.num_images == 60
    result = found.best.probes["ridge"]
    assert result.is_right is not None
    assert len(result.is_right) == 60
    assert len(result.settings) == 3
    folds = images.folds(3, seed=0)
    rows = store.features(images, found.best.key).tensor(dtype=torch.float32).numpy()
    values = []
    for fold in folds:
        training, held_out = np.flatnonzero(fold.splits == "train"), np.flatnonzero(fold.splits == "valid")
        said = probed(
            "ridge",
            rows[training],
            images.targets[training],  # type: ignore[index]
            rows[held_out],
            task="single",
            columns=3,
            inner=_inner(fold.train),
        ).said
        values.append(float((said.argmax(1) == images.targets[held_out]).mean()))  # type: ignore[index]
    assert result.value == pytest.approx(np.mean(values))
    half = 4.302653 * np.std(values, ddof=1) / np.sqrt(3)  # Student's t of two degrees, 95 %
    assert result.interval == pytest.approx((np.mean(values) - half, min(1, np.mean(values) + half)), rel=1e-6)


def test_groups_stay_whole_in_the_inner_folds_too() -> None:
    images = ImageSet.from_arrays(
        np.random.default_rng(0).integers(0, 256, (24, 8, 8, 3), dtype=np.uint8),
        [place % 2 for place in range(24)],
        groups=[f"patient{place // 4}" for place in range(24)],
    )
    groups = np.array(images.groups)
    for fitted, judged in _inner(images):
        assert not {*groups[fitted]} & {*groups[judged]}


def test_images_without_a_label_and_those_of_the_test_split_stay_out(store: FeatureStore) -> None:
    images = digits(60)
    splits = images.splits.copy()
    splits[:10] = "test"
    dealt = images.with_splits(splits.tolist())
    found = compare([staged()], dealt, store, cuts=["layer1"], probes=["knn"])
    assert found.num_images == int((splits == "valid").sum())
    assert found.best.computed == 50
    groups = np.arange(60) // 2
    folded = compare([staged()], dealt, store, cuts=["layer1"], probes=["knn"], folds=2, groups=groups)
    assert folded.num_images == 50


def test_numbers_are_compared_by_what_is_explained_of_them(store: FeatureStore) -> None:
    images = digits(60)
    pixels = np.stack([np.asarray(images.read(place)) for place in range(len(images))])
    brightness = pixels.mean((1, 2, 3))
    numbers = ImageSet.from_arrays(pixels, brightness[:, None], task="regression", splits=images.splits.tolist())
    found = compare([staged()], numbers, store, cuts=["layer1"])
    assert found.metric == "R2"
    assert [*found.best.probes] == ["knn", "ridge"]
    assert found.best.probes["ridge"].value > 0.5
    low, high = found.best.probes["ridge"].interval or (1, 0)
    assert low < found.best.probes["ridge"].value < high <= 1
    assert found.best.transfer["nleep"] is None
    assert found.ties() == []
    with pytest.raises(ValueError, match="The probe linear tells classes apart"):
        compare([staged()], numbers, store, probes=["linear"])


def test_it_prints_as_a_table_and_draws_itself(filed: Any, tmp_path: Path) -> None:
    _, _, found = filed
    lines = str(found).splitlines()
    assert lines[0].split()[:3] == ["backbone", "cut", "linear"]
    assert len([line for line in lines if line.startswith("net")]) >= 4
    assert f"best of 4: {found.best.name}, linear accuracy" in str(found)
    assert "images were decoded once for all backbones" in str(found)
    assert found.frame().shape == (4, len(found.table[0]))
    assert "<table>" in found._repr_html_()
    found.plot().get_figure().savefig(tmp_path / "compared.png")
    assert (tmp_path / "compared.png").stat().st_size > 1000
    written = found.to_csv(tmp_path / "compared.csv").read_text().splitlines()
    assert written[0] == ",".join(found.table[0])
    assert len(written) == 5


def test_nothing_is_computed_where_nobody_wants_that(store: FeatureStore) -> None:
    images = digits(60)
    extract(staged(), images.select(range(50)), store, cuts=["layer1"])
    with pytest.raises(FactsDifferError, match="weights"):
        compare([staged(seed=1)], images, store, cuts=["layer1"], extract=False)
    with pytest.raises(MissingFeaturesError, match=r"holds 50 of the 60 images .* Compute the 10: extract\("):
        compare([staged()], images, store, cuts=["layer1"], extract=False)


def test_rows_of_another_storage_type_are_used_unless_one_is_asked_for(store: FeatureStore) -> None:
    images = digits(60)
    extract(staged(), images.select(range(50)), store, cuts=["layer1"], dtype="float32")
    given: Any = ([staged()], images, store)
    found = compare(*given, cuts=["layer1"], probes=["knn"])
    (filed,) = store.sets()
    assert (found.best.key, found.best.computed, found.best.num_bytes) == (filed.key, 10, 4 * found.best.width)
    with pytest.raises(
        FactsDifferError, match=r"layer1 concat in float32, and float16 is asked for\. .*the 60: extract"
    ):
        compare(*given, cuts=["layer1"], dtype="float16", extract=False)
    extract(staged(), images, store, cuts=["layer1"], dtype="bfloat16")
    with pytest.raises(FactsDifferError, match="in bfloat16 and float32, and float16 is asked for"):
        compare(*given, cuts=["layer1"], extract=False)


def test_what_can_not_be_compared_is_refused_by_name(store: FeatureStore) -> None:
    images = digits(60)
    model = staged()
    for options, words in (
        ({"cuts": ["layer9"]}, "net has no cut layer9"),
        ({"cuts": ["layer8", "layer9"]}, "net has none of the cuts layer8, layer9"),
        ({"cuts": ["layer1", "layer9"]}, "No backbone has the cut layer9"),
        ({"cuts": [4]}, "cuts has 4. Expected names of cuts"),
        ({"cuts": []}, r"cuts is \[\]"),
        ({"folds": "three"}, "folds is 'three'"),
        ({"groups": 3, "folds": 3}, "groups is 3"),
        ({"cuts": ["layer1:none"]}, "net@layer1 none gives 8x8x8 an image, and probes take vectors"),
        ({"cuts": "layer1"}, "cuts is 'layer1'"),
        ({"by": "linear", "probes": ["knn"]}, "by is 'linear'"),
        ({"groups": ["a"] * 60}, "groups are for folds"),
    ):
        with pytest.raises(ValueError, match=words):
            compare([model], images, store, **options)
    with pytest.raises(ValueError, match="cuts is 'layer1'"):
        compare([(model, "layer1")], images, store)
    with pytest.raises(ValueError, match=r"Expected a backbone, or \(backbone, \[cut, ...\]\)"):
        compare([(model,)], images, store)  # type: ignore[list-item]
    with pytest.raises(ValueError, match="backbones is 'resnet18'"):
        compare("resnet18", images, store)
    with pytest.raises(ValueError, match=r"no labelled image in the split valid.*--valid 0.2 .*--folds 5"):
        compare([model], images.with_splits(["train"] * 60), store)
    with pytest.raises(ValueError, match="has no labels"):
        compare([model], ImageSet.from_arrays(np.zeros((4, 8, 8, 3), np.uint8)), store)
