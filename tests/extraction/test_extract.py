"""Extraction: rows that equal the plain module's, of exactly the images that lack one, whatever goes wrong."""

from __future__ import annotations

import copy
import errno
import hashlib
import json
import os
import random
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support.processes import Processes
from support.tiny import SIZE, VIEW, Net, arrays, jpeg, net, photos, pixels, rows_by_hand, staged
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from featstore import (
    Augment,
    ExtractReport,
    FactsDifferError,
    FeatureRequest,
    FeatureStore,
    FeatureStoreError,
    ImageError,
    ImageSet,
    MissingFeaturesError,
    ModelError,
    StagedModel,
    View,
    extract,
    plan,
)
from featstore.extraction import extract as extract_module
from featstore.extraction import job as job_module
from featstore.extraction.extract import run_plan
from featstore.extraction.job import Job
from featstore.extraction.progress import Progress
from featstore.files.part import Part, write_part
from featstore.files.table import Table
from featstore.models.probe import take_probes
from featstore.models.trunk import Trunk

FORMAT_PAGE = Path(__file__).parents[2] / "docs" / "format.md"


@pytest.fixture
def store(tmp_path: Path) -> FeatureStore:
    return FeatureStore(tmp_path / "features")


def run(
    images: ImageSet, store: FeatureStore, *, model: StagedModel | None = None, dtype: str = "float32", **options: Any
) -> ExtractReport:
    defaults: dict[str, Any] = {"cuts": ["layer2"], "workers": 0, "device": "cpu"}
    return extract(model or staged(), images, store, dtype=dtype, **(defaults | options))


def counts(report: ExtractReport) -> tuple[int, int, int]:
    return report.computed, report.reused, report.failed


def rows(store: FeatureStore, images: ImageSet, key: str) -> Tensor:
    return FeatureStore(store.root).features(images, key)[:]


def up_to(stages: str, module: Net) -> nn.Module:
    """The plain module's own layers, independent of any staging."""
    maps = [module.layer1] if stages == "layer1" else [module.layer1, module.layer2]
    return nn.Sequential(*maps)


def reduced(maps: Tensor, reduction: str) -> Tensor:
    match reduction:
        case "avg":
            return maps.mean((2, 3))
        case "max":
            return maps.amax((2, 3))
        case "concat":
            return torch.cat([maps.amax((2, 3)), maps.mean((2, 3))], 1)
    return maps


# ---- values


def test_each_cut_and_reduction_of_one_pass_is_what_the_plain_module_gives(store: FeatureStore) -> None:
    images = arrays(37)  # two batches of 32, the second one short
    cuts = ["layer1", "layer1:none", "layer2:avg", "layer2:max", "layer2", "flatten"]
    report = run(images, store, cuts=cuts)
    assert counts(report) == (6 * 37, 0, 0)
    by_hand = {name: rows_by_hand(up_to(name, net()), images, VIEW) for name in ("layer1", "layer2")}
    for key, cut, reduction in zip(
        report.keys,
        ["layer1", "layer1", "layer2", "layer2", "layer2", "layer2"],
        ["concat", "none", "avg", "max", "concat", "avg"],
        strict=True,
    ):
        assert torch.equal(rows(store, images, key), reduced(by_hand[cut], reduction))


@pytest.mark.parametrize(
    ("dtype", "torch_dtype"),
    [("float16", torch.float16), ("float32", torch.float32), ("bfloat16", torch.bfloat16)],
)
def test_values_are_stored_in_the_type_asked_for(store: FeatureStore, dtype: str, torch_dtype: torch.dtype) -> None:
    images = arrays(5)
    report = run(images, store, dtype=dtype)
    by_hand = reduced(rows_by_hand(up_to("layer2", net()), images, VIEW), "concat")
    assert torch.equal(rows(store, images, report.keys[0]), by_hand.to(torch_dtype))


def test_stored_vectors_are_the_trunks_output_and_not_normalised(store: FeatureStore) -> None:
    images = arrays(6)
    report = run(images, store)
    norms = rows(store, images, report.keys[0]).norm(dim=1)
    assert (norms.max() - norms.min()) / norms.mean() > 0.01
    assert torch.equal(norms, reduced(rows_by_hand(up_to("layer2", net()), images, VIEW), "concat").norm(dim=1))


def test_all_seeds_are_kept_and_each_is_the_view_of_its_seed(store: FeatureStore) -> None:
    images = arrays(7)
    augment = Augment("random_resized_crop", seeds=[0, 1, 5])
    report = run(images, store, augment=augment)
    assert len(set(report.keys)) == 4
    assert [each["seed"] for each in report.sets] == [None, 0, 1, 5]
    views = [VIEW, *(VIEW.with_seed("random_resized_crop", seed) for seed in (0, 1, 5))]
    kept = [rows(store, images, key) for key in report.keys]
    for values, view in zip(kept, views, strict=True):
        assert torch.equal(values, reduced(rows_by_hand(up_to("layer2", net()), images, view), "concat"))
    assert not any(torch.equal(kept[0], others) for others in kept[1:])


def test_seeds_can_be_added_later(store: FeatureStore) -> None:
    images = arrays(4)
    run(images, store, augment=Augment("flip", seeds=[0]))
    report = run(images, store, augment=Augment("flip", seeds=[0, 1, 2]))
    assert counts(report) == (2 * 4, 2 * 4, 0)
    assert [(each["seed"], each["computed"]) for each in report.sets] == [(None, 0), (0, 0), (1, 4), (2, 4)]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_row_depends_on_its_image_alone(store: FeatureStore, tmp_path: Path, workers: int) -> None:
    images = arrays(40)
    augment = Augment("random_resized_crop", seeds=[3])
    whole = run(images, store, augment=augment, workers=workers)
    other = FeatureStore(tmp_path / "other")
    backwards = images.select(list(range(39, 2, -1)))
    for few in (backwards.select(range(5)), backwards):  # in other company each time
        again = run(few, other, augment=augment, workers=2 - workers)
    for mine, others in zip(whole.keys, again.keys, strict=True):
        assert torch.equal(rows(store, backwards, mine), rows(other, backwards, others))


def test_the_models_mode_and_thawed_stages_change_nothing(store: FeatureStore, tmp_path: Path) -> None:
    images = arrays(5)
    report = run(images, store, cuts=["layer2", "dropout"])
    training = staged()
    training.unfreeze()
    training.train()
    before = {name: value.clone() for name, value in training.tensors().items()}
    again = run(images, FeatureStore(tmp_path / "other"), model=training, cuts=["layer2", "dropout"])
    assert again.keys == report.keys
    for key in report.keys:
        assert torch.equal(rows(store, images, key), rows(FeatureStore(tmp_path / "other"), images, key))
    assert training.training
    assert all(torch.equal(value, before[name]) for name, value in training.tensors().items())


def test_a_plain_module_is_extracted_at_the_view_that_is_asked_for(store: FeatureStore) -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * (SIZE - 2) ** 2, 5))
    report = extract(module, arrays(3), store, cuts=["3"], view=VIEW, dtype="float32", device="cpu")
    assert torch.equal(rows(store, arrays(3), report.keys[0]), rows_by_hand(module, arrays(3), VIEW))


# ---- what is missing is computed, and nothing else


def test_a_second_run_computes_nothing(store: FeatureStore) -> None:
    images = arrays(10)
    first = run(images, store, augment=Augment("flip", seeds=[0]))
    files = sorted(store.root.rglob("*.h5"))
    second = run(images, store, augment=Augment("flip", seeds=[0]))
    assert counts(first) == (20, 0, 0)
    assert counts(second) == (0, 20, 0)
    assert sorted(store.root.rglob("*.h5")) == files


def test_added_images_alone_are_computed(store: FeatureStore) -> None:
    run(arrays(10), store)
    more = arrays(14)
    planned = plan(staged(), more, store, cuts=["layer2"], dtype="float32")
    assert planned.status() == {
        "images": 14,
        "stored": 10,
        "missing": 4,
        "changed": 0,
        "failed": 0,
        "bytes": 4 * 24 * 4,
    }
    assert planned.describe() == "14 images: 10 stored, 4 to compute, 384 bytes in 1 feature set"
    report = run(more, store)
    assert counts(report) == (4, 10, 0)
    assert str(report).startswith("10 rows reused, 4 computed, 0 images failed, ")
    by_hand = reduced(rows_by_hand(up_to("layer2", net()), more, VIEW), "concat")
    assert torch.equal(rows(store, more, report.keys[0]), by_hand)


def test_an_image_replaced_under_its_name_is_computed_anew(store: FeatureStore, tmp_path: Path) -> None:
    folder = photos(tmp_path / "photos")
    key = run(ImageSet.from_folder(folder), store).keys[0]
    before = rows(store, ImageSet.from_folder(folder), key)
    (folder / "dog/1.jpg").write_bytes(jpeg(99))
    images = ImageSet.from_folder(folder)
    with pytest.raises(MissingFeaturesError, match=r"5 of the 6 .* 1 are missing \(1 changed since: dog/1.jpg\)"):
        store.features(images, key)
    planned = plan(staged(), images, store, cuts=["layer2"], dtype="float32")
    assert planned.describe().startswith("6 images: 5 stored, 1 to compute (0 new, 1 changed: dog/1.jpg), 96 bytes")
    assert planned.status()["changed"] == 1
    assert counts(run(images, store)) == (1, 5, 0)
    changed = images.ids.index("dog/1.jpg")
    after = rows(store, images, key)
    assert [index for index in range(6) if not torch.equal(before[index], after[index])] == [changed]
    assert torch.equal(after, reduced(rows_by_hand(up_to("layer2", net()), images, VIEW), "concat"))


def test_renamed_and_duplicated_images_are_not_computed_again(store: FeatureStore, tmp_path: Path) -> None:
    folder = photos(tmp_path / "photos")
    key = run(ImageSet.from_folder(folder), store).keys[0]
    (folder / "dog/1.jpg").rename(folder / "dog/renamed.jpg")
    shutil.copy(folder / "cat/2.jpg", folder / "dog/copy.jpg")
    images = ImageSet.from_folder(folder)
    assert counts(run(images, store)) == (0, 7, 0)
    values = rows(store, images, key)
    assert torch.equal(values[images.ids.index("dog/copy.jpg")], values[images.ids.index("cat/2.jpg")])
    assert torch.equal(values, reduced(rows_by_hand(up_to("layer2", net()), images, VIEW), "concat"))


def test_images_of_equal_content_share_a_row(store: FeatureStore) -> None:
    twice = ImageSet.from_arrays(pixels(5)[[0, 1, 0, 2, 1, 0]])
    report = run(twice, store, augment=Augment("flip", seeds=[0]))
    assert counts(report) == (6, 0, 0)
    assert [(each["rows"], each["computed"]) for each in report.sets] == [(6, 3), (6, 3)]
    assert [each.index.num_images for each in store.sets()] == [3, 3]
    values = rows(store, twice, report.keys[0])
    assert torch.equal(values[[0, 1, 3]][[0, 1, 0, 2, 1, 0]], values)


def test_the_set_named_by_two_cuts_of_one_value_is_computed_once(store: FeatureStore) -> None:
    images = arrays(4)
    report = run(images, store, cuts=["layer2", "layer2.2", "layer2:concat", "flatten", "dropout"])
    assert [each["cut"] for each in report.sets] == ["layer2", "flatten"]  # dropout does nothing in eval mode
    assert counts(report) == (8, 0, 0)
    assert len(list(store.root.rglob("part-*.h5"))) == 2


def test_the_same_model_under_another_name_adds_to_the_same_set(store: FeatureStore) -> None:
    run(arrays(4), store)
    renamed = StagedModel.from_module(net(), view=VIEW, name="mine")
    report = run(arrays(6), store, model=renamed)
    assert counts(report) == (2, 4, 0)
    assert len({path.parent for path in store.root.rglob("part-*.h5")}) == 1
    assert len(rows(store, arrays(6), report.keys[0])) == 6


def test_a_moved_store_and_moved_images_stay_valid(store: FeatureStore, tmp_path: Path) -> None:
    key = run(ImageSet.from_folder(photos(tmp_path / "photos")), store).keys[0]
    before = rows(store, ImageSet.from_folder(tmp_path / "photos"), key)
    (tmp_path / "photos").rename(tmp_path / "pictures")
    moved = FeatureStore(store.root.rename(tmp_path / "elsewhere"))
    images = ImageSet.from_folder(tmp_path / "pictures")
    assert counts(run(images, moved)) == (0, 6, 0)
    assert torch.equal(rows(moved, images, key), before)


# ---- joined by image, never by position


def test_rows_follow_images_in_any_order(store: FeatureStore) -> None:
    images = arrays(9)
    key = run(images, store).keys[0]
    by_hand = reduced(rows_by_hand(up_to("layer2", net()), images, VIEW), "concat")
    order = [4, 8, 0, 2, 1]
    assert torch.equal(rows(store, images.select(order), key), by_hand[order])


def test_another_split_or_fold_of_the_same_size_gets_its_own_rows(store: FeatureStore) -> None:
    images = arrays(12)
    key = run(images.split(valid=0.5, seed=0), store).keys[0]
    by_hand = reduced(rows_by_hand(up_to("layer2", net()), images, VIEW), "concat")
    dealt = [images.split(valid=0.5, seed=seed) for seed in (0, 1)] + images.folds(2, seed=3)
    assert len({each.train.ids for each in dealt}) == 4
    for each in dealt:
        for split in (each.train, each.valid):
            features = store.features(split, key)
            places = [int(name) for name in split.ids]
            assert torch.equal(features[:], by_hand[places])
            assert features.targets is not None
            assert features.targets.tolist() == [place % 2 for place in places]


def test_an_edited_label_leaves_features_valid(store: FeatureStore) -> None:
    images = ImageSet.from_arrays(pixels(4), ["cat", "dog", "cat", "dog"])
    key = run(images, store).keys[0]
    edited = ImageSet.from_arrays(pixels(4), ["cat", "cat", "cat", "dog"])
    assert counts(run(edited, store)) == (0, 4, 0)
    features = store.features(edited, key)
    assert features.targets is not None
    assert features.targets.tolist() == [0, 0, 0, 1]
    assert len(list((store.root / "images").glob("*.h5"))) == 2
    targets = ImageSet.from_store(FeatureStore(store.root)).targets
    assert targets is not None
    assert targets.tolist() == [0, 0, 0, 1]


# ---- refused by name


def request(model: StagedModel, cut: str = "layer2", view: View = VIEW, **options: Any) -> FeatureRequest:
    return FeatureRequest(trunk=model.digest(cut), pool=model.pool(cut).facts(), view=view, **options)


def changed_weight(bit: bool) -> StagedModel:
    module = net()
    if bit:
        module.state_dict()["layer2.0.weight"].view(torch.int32)[0, 0, 0, 0] ^= 1
    else:
        module.state_dict()["layer1.1.running_mean"][0] += 1e-6
    return StagedModel.from_module(module, view=VIEW, name="net")


@pytest.mark.parametrize(
    ("other", "named"),
    [
        (lambda: request(changed_weight(bit=True)), "trunk"),
        (lambda: request(changed_weight(bit=False)), "trunk"),
        (lambda: request(staged(stride=1)), "trunk"),
        (lambda: request(staged(), cut="layer1"), "trunk"),
        (lambda: request(staged(), view=replace(VIEW, size=12)), "size .stored 16, yours 12"),
        (lambda: request(staged(), view=replace(VIEW, resize=18)), "resize .stored 20, yours 18"),
        (lambda: request(staged(), view=replace(VIEW, interpolation="bicubic")), "interpolation .stored bilinear"),
        (lambda: request(staged(), view=replace(VIEW, mean=(0.5, 0.5, 0.5))), "mean .stored 0.485"),
        (lambda: request(staged(), view=replace(VIEW, std=(0.25, 0.25, 0.25))), "std .stored 0.229"),
        (lambda: request(staged(), view=replace(VIEW, apply_exif=False)), "EXIF orientation"),
        (lambda: request(staged(), view=VIEW.with_seed("flip", 0)), "augmentation"),
        (lambda: request(staged(), dtype="float16"), "storage type .stored float32, yours float16"),
        (lambda: request(staged(), precision="bf16"), "precision .stored fp32, yours bf16"),
    ],
)
def test_features_of_other_facts_are_refused_and_the_fact_is_named(store: FeatureStore, other: Any, named: str) -> None:
    images = arrays(4)
    key = run(images, store).keys[0]
    assert len(store.features(images, request(staged()))) == 4
    with pytest.raises(FactsDifferError, match=rf"Nearest is set {key[:8]} \(net@layer2\); it differs in: {named}"):
        store.features(images, other())


def test_other_weights_are_other_features(store: FeatureStore) -> None:
    images = arrays(4)
    keys = [run(images, store, model=staged(seed)).keys[0] for seed in (0, 1)]
    keys += [run(images, store, model=changed_weight(bit=bit)).keys[0] for bit in (True, False)]
    assert len(set(keys)) == 4
    assert torch.equal(
        rows(store, images, keys[1]), reduced(rows_by_hand(up_to("layer2", net(1)), images, VIEW), "concat")
    )


def test_another_image_size_uses_no_old_features(store: FeatureStore) -> None:
    images = arrays(4)
    run(images, store)
    report = run(images, store, view=VIEW.resized(size=12))
    assert counts(report) == (4, 0, 0)
    small = VIEW.resized(size=12)
    by_hand = reduced(rows_by_hand(up_to("layer2", net()), images, small), "concat")
    assert torch.equal(rows(store, images, report.keys[0]), by_hand)


def test_a_trunk_that_is_no_function_of_one_image_is_refused_before_anything_is_filed(store: FeatureStore) -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), nn.ReLU())
    with pytest.raises(ModelError, match="BatchNorm2d"):
        extract(module, arrays(3), store, cuts=["2"], view=VIEW, device="cpu")
    assert not store.root.exists()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"cuts": ["layer9"]}, ValueError, r"net has no cut 'layer9'. Its cuts are layer1\.0"),
        ({"cuts": "layer2"}, TypeError, r"cuts is 'layer2'. Expected a list of cuts. Write \['layer2'\]\."),
        ({"cuts": ["layer2:mean"]}, ValueError, "'mean' is no reduction. The reductions are auto, none, avg"),
        ({"cuts": ["flatten:avg"]}, ValueError, "reduction avg needs activations with positions"),
        ({"dtype": "int8"}, ValueError, "'int8' is no storage type"),
        ({"precision": "fp8"}, ValueError, "'fp8' is no precision"),
        ({"device": "tpu9"}, ValueError, "'tpu9' is no device"),
        ({"batch_size": 0}, ValueError, "batch size 0 is too small"),
        ({"on_error": "ignore"}, ValueError, "on_error is 'ignore'; expected raise or skip"),
        ({"augment": Augment("flip", seeds="fresh")}, ValueError, "fresh seeds have no fixed views"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_filed(
    store: FeatureStore, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        run(arrays(2), store, **options)
    assert not store.root.exists()


def test_no_images_are_an_error(store: FeatureStore) -> None:
    with pytest.raises(ValueError, match="arrays-train holds no images"):
        run(arrays(4).train, store)


def test_a_model_of_one_size_refuses_another_by_name(store: FeatureStore) -> None:
    fixed = StagedModel.from_module(net(), view=VIEW, name="vit_x", fixed_size=SIZE)
    with pytest.raises(ValueError, match="vit_x takes images of 16 pixels only, not 12"):
        run(arrays(2), store, model=fixed, view=VIEW.resized(size=12))


# ---- parts


def test_several_cuts_and_several_parts_have_the_right_rows(
    store: FeatureStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_module, "COMMIT_BYTES", 1)
    monkeypatch.setattr(job_module, "MERGE_BYTES", 0)
    images = arrays(23)
    report = run(images, store, cuts=["layer1:none", "layer2", "layer2:none"], batch_size=5)
    for key, cut, reduction in zip(
        report.keys, ["layer1", "layer2", "layer2"], ["none", "concat", "none"], strict=True
    ):
        found = store.set(key)
        assert sorted(part.num_rows for part in found.parts) == [3, 5, 5, 5, 5]
        assert found.index.num_images == 23
        by_hand = reduced(rows_by_hand(up_to(cut, net()), images, VIEW, batch_size=5), reduction)
        assert torch.equal(store.features(images, key)[:], by_hand)


@pytest.mark.parametrize(
    ("num_bytes", "seconds_a_batch", "num_rows"),
    [
        (2.5, 0, [12, 12, 4]),
        (1e9, 25, [12, 12, 4]),
        (1e9, 1, [28]),
        (2.5, 25, [12, 12, 4]),
        (1.5, 25, [8, 8, 8, 4]),  # the time counts from the last part, whatever that one was written for
    ],
)
def test_a_part_is_written_when_enough_rows_have_been_gathered_or_a_minute_after_the_last_one(
    store: FeatureStore,
    monkeypatch: pytest.MonkeyPatch,
    num_bytes: float,
    seconds_a_batch: float,
    num_rows: list[int],
) -> None:
    now = 0.0
    compute = Job._compute

    def lasting(self: Any, items: Any) -> None:
        nonlocal now
        compute(self, items)
        now += seconds_a_batch

    monkeypatch.setattr(job_module, "time", SimpleNamespace(monotonic=lambda: now, perf_counter=time.perf_counter))
    monkeypatch.setattr(Job, "_compute", lasting)
    monkeypatch.setattr(job_module, "COMMIT_BYTES", num_bytes * 4 * 24 * 4)  # of a batch of 4 rows of 24 float32 values
    monkeypatch.setattr(job_module, "MERGE_BYTES", 0)
    key = run(arrays(28), store, batch_size=4).keys[0]
    parts = sorted(store.set(key).parts, key=lambda part: str(part.facts["when"]))
    assert [part.num_rows for part in parts] == num_rows
    assert (np.concatenate([part.digests for part in parts]) == arrays(28).digests().values).all()


def test_rows_are_gathered_in_few_files(store: FeatureStore) -> None:
    run(arrays(200), store, augment=Augment("flip", seeds=[0]))
    assert len(list(store.root.rglob("part-*.h5"))) == 2


def test_the_batch_size_of_stored_rows_is_kept(store: FeatureStore) -> None:
    run(arrays(3), store, batch_size=7)
    run(arrays(6), store)
    found = store.sets()[0]
    assert [part.facts["profile"]["batch_size"] for part in found.parts] == [7, 7]
    run(arrays(8), store, batch_size=4)
    assert store.sets()[0].facts["profile"]["batch_size"] == 4  # of the newest part


def test_a_part_says_what_made_it(store: FeatureStore) -> None:
    report = run(arrays(3), store, cuts=["layer2"], augment=Augment("flip", seeds=[4]))
    model = staged()
    for key, view in zip(report.keys, [VIEW, VIEW.with_seed("flip", 4)], strict=True):
        (part,) = store.set(key).parts
        facts = part.facts
        assert facts["key"] == key
        assert facts["view"] == facts["spec"]["view"] == view.facts()
        assert facts["spec"]["trunk"] == model.digest("layer2")
        assert (facts["backbone"], facts["cut"], facts["class_tokens"]) == ("net", "layer2", 0)
        names = model.cut_points[: model.index("layer2") + 1]
        assert [stage["name"] for stage in facts["stages"]] == names
        assert [stage["digest"] for stage in facts["stages"]] == [model.digest(name) for name in names]
        assert facts["stages"][-1] == {
            "name": "layer2", "layout": "NCHW", "shape": [12, 4, 4], "digest": model.digest("layer2")
        }  # fmt: skip
        assert facts["profile"]["batch_size"] == 32
        assert facts["profile"]["torch"] == torch.__version__
        assert len(facts["probe"]["values"]) == 2
        assert facts["failed"] == {}
        assert facts["supersedes"] == []
        assert facts["who"].startswith("featstore ")
        assert facts["when"].endswith("+00:00")
        assert part.decoders.tolist() == [0, 0, 0]


def documented(heading: str, column: int = 1) -> set[str]:
    """The names in the tables below a heading of the format's page."""
    section = FORMAT_PAGE.read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]
    cells = [line.split("|")[column] for line in section.splitlines() if line.startswith("| `")]
    return {name for cell in cells for name in re.findall(r"`([^`]+)`", cell)}


def test_the_format_page_names_each_fact_and_column_that_is_written(store: FeatureStore) -> None:
    images = ImageSet.from_arrays(pixels(3), ["a", "b", "a"], groups=["p", "q", "p"])
    report = run(images, store, augment=Augment("flip", seeds=[0]))
    facts = store.set(report.keys[1]).facts
    assert set(facts) == documented("Facts")
    assert {*facts["spec"], *facts["spec"]["view"]} == documented("Spec and key")
    (table,) = (Table.open(path) for path in (store.root / "images").iterdir())
    assert {*table.columns, *table.facts} == documented("Image tables")


def test_a_part_that_lacks_a_fact_of_the_format_page_is_refused(store: FeatureStore) -> None:
    (part,) = store.set(run(arrays(1), store).keys[0]).parts
    for name in documented("Facts"):
        part.path.unlink()
        facts = {other: value for other, value in part.facts.items() if other != name}
        write_part(part.path, features=torch.zeros(1, 24), digests=part.digests, decoders=part.decoders, facts=facts)
        assert FeatureStore(store.root).sets() == []
        (error,) = FeatureStore(store.root).damaged()
        assert re.search(rf"{part.path.name} can't be used by this featstore: .*{name}", str(error))


def test_key_and_probe_are_what_the_format_page_says(store: FeatureStore) -> None:
    report = run(arrays(2), store, cuts=["layer2:none"])
    facts = store.set(report.keys[0]).facts
    text = json.dumps(facts["spec"], sort_keys=True, separators=(",", ":"))
    assert hashlib.sha256(text.encode("ascii")).hexdigest() == facts["key"] == report.keys[0]
    i, c, y, x = np.indices((2, 3, SIZE, SIZE))
    waves = ((3 + 2 * i) * y + (5 + 4 * i) * x + x * y // (4 + i) + 85 * c + 17 * i) % 256
    mean, std = (np.array(facts["view"][name], np.float32)[:, None, None] for name in ("mean", "std"))
    normal = (waves.astype(np.float32) / np.float32(255) - mean) / std
    with torch.no_grad():
        flat = up_to("layer2", net())(torch.from_numpy(normal)).reshape(2, -1).numpy()
    places = [k * flat.shape[1] // 128 for k in range(128)]
    assert np.array_equal(np.array(facts["probe"]["values"], np.float32), flat[:, places])
    assert facts["probe"]["largest"] == np.abs(flat).max()


# ---- splits


def test_seeds_are_computed_for_the_training_split_and_the_evaluation_view_for_all(store: FeatureStore) -> None:
    images = arrays(10).split(valid=0.3, seed=0)
    report = run(images, store, augment=Augment("flip", seeds=[0, 1]))
    train = len(images.train)
    assert [each["rows"] for each in report.sets] == [10, train, train]
    assert report.computed == 10 + 2 * train
    assert len(store.features(images.train, report.keys[1])) == train
    with pytest.raises(MissingFeaturesError):
        store.features(images.valid, report.keys[1])
    assert counts(run(images, store, augment=Augment("flip", seeds=[0, 1]))) == (0, 10 + 2 * train, 0)


def test_an_image_that_is_in_two_splits_is_named_and_gets_all_its_views(store: FeatureStore) -> None:
    images = ImageSet.from_arrays(pixels(4)[[0, 1, 2, 0]], splits=["valid", "train", "train", "train"])
    augment = Augment("flip", seeds=[0])
    planned = plan(staged(), images, store, cuts=["layer2"], augment=augment)
    assert planned.notes() == [
        "1 held-out images are byte for byte the same as images in another split (3 = 0); scores on them say nothing "
        "about new images"
    ]
    report = run(images, store, augment=augment)
    assert [(each["rows"], each["computed"]) for each in report.sets] == [(4, 3), (3, 3)]
    assert len(store.features(images.train, report.keys[1])) == 3


# ---- images that fail


def spoiled(folder: Path) -> ImageSet:
    """Six images, the second of which can't be decoded."""
    photos(folder)
    (folder / "cat/2.jpg").write_bytes(jpeg(2)[:200])
    return ImageSet.from_folder(folder)


def test_a_corrupt_image_stops_the_job_by_name_and_what_is_decoded_is_kept(store: FeatureStore, tmp_path: Path) -> None:
    images = spoiled(tmp_path / "photos")
    with pytest.raises(ImageError, match=r"cat/2\.jpg: .*truncated"):
        run(images, store)
    planned = plan(staged(), images, store, cuts=["layer2"], dtype="float32")
    assert planned.status()["stored"] == images.ids.index("cat/2.jpg")
    assert planned.status()["failed"] == 0


def test_a_skipped_image_is_filed_with_its_reason_and_shifts_no_row(store: FeatureStore, tmp_path: Path) -> None:
    images = spoiled(tmp_path / "photos")
    report = run(images, store, on_error="skip", augment=Augment("flip", seeds=[0]))
    assert counts(report) == (10, 0, 1)
    assert report.missing == 0
    ((name, reason),) = report.failures
    assert name == "cat/2.jpg"
    assert "truncated" in reason
    digest = bytes(images.digests().values[images.ids.index("cat/2.jpg")]).hex()
    assert [each.failed for each in store.sets()] == [{digest: reason}] * 2
    sound = images.select([name != "cat/2.jpg" for name in images.ids])
    features = store.features(images, report.keys[0], on_error="skip")
    assert features.ids == sound.ids
    assert torch.equal(features[:], reduced(rows_by_hand(up_to("layer2", net()), sound, VIEW), "concat"))
    with pytest.raises(MissingFeaturesError, match=r"5 of the 6 images .*\(cat/2\.jpg\)"):
        store.features(images, report.keys[0])


def test_failed_images_count_as_missing_unless_they_are_skipped(store: FeatureStore, tmp_path: Path) -> None:
    images = spoiled(tmp_path / "photos")
    run(images, store, on_error="skip")
    planned = plan(staged(), images, store, cuts=["layer2"], dtype="float32")
    size = 24 * 4
    assert planned.status() == {"images": 6, "stored": 5, "missing": 1, "changed": 0, "failed": 1, "bytes": size}
    assert planned.status(on_error="skip") == {
        "images": 6,
        "stored": 5,
        "missing": 0,
        "changed": 0,
        "failed": 1,
        "bytes": 0,
    }
    assert planned.describe().startswith("6 images: 5 stored, 1 to compute (1 of them failed before)")
    seeds = plan(staged(), images, store, cuts=["layer2"], dtype="float32", augment=Augment("flip", seeds=[0]))
    assert seeds.status(on_error="skip")["missing"] == 6  # none has been tried with this seed


def test_a_failed_image_is_tried_again_and_recorded_once(store: FeatureStore, tmp_path: Path) -> None:
    images = spoiled(tmp_path / "photos")
    run(images, store, on_error="skip")
    files = sorted(store.root.rglob("part-*.h5"))
    again = run(images, store, on_error="skip")
    assert counts(again) == (0, 5, 1)
    assert len(again.failures) == 1
    assert sorted(store.root.rglob("part-*.h5")) == files


def test_a_set_of_failed_images_only_has_a_part_without_rows(store: FeatureStore, tmp_path: Path) -> None:
    (tmp_path / "photos/cat").mkdir(parents=True)
    (tmp_path / "photos/cat/a.jpg").write_bytes(b"no image")
    (tmp_path / "photos/cat/b.jpg").write_bytes(b"no image")  # the same content: the same failure
    images = ImageSet.from_folder(tmp_path / "photos")
    report = run(images, store, on_error="skip")
    assert counts(report) == (0, 0, 2)
    assert [name for name, _ in report.failures] == ["cat/a.jpg", "cat/b.jpg"]
    assert report.sets[0]["rows"] == 0
    (part,) = store.sets()[0].parts
    assert (part.num_rows, part.shape, len(part.facts["failed"])) == (0, (24,), 1)
    assert len(store.features(images, report.keys[0], on_error="skip")) == 0


def test_a_later_success_clears_a_failure(store: FeatureStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = ImageSet.from_folder(photos(tmp_path / "photos"))
    with monkeypatch.context() as smaller:
        smaller.setattr("featstore.images.decode.MAX_PIXELS", 100)  # as on a machine that refuses such large images
        report = run(images, store, on_error="skip")
        assert counts(report) == (0, 0, 6)
    assert len(store.sets()[0].failed) == 6
    report = run(images, store, on_error="skip")
    assert counts(report) == (6, 0, 0)
    assert report.failures == ()
    assert FeatureStore(store.root).sets()[0].failed == {}
    assert len(store.features(images, report.keys[0])) == 6


def test_a_file_that_cannot_be_read_is_skipped_by_name(store: FeatureStore, tmp_path: Path) -> None:
    folder = photos(tmp_path / "photos")
    (folder / "cat/sick.jpg").symlink_to("/proc/self/mem")  # a file that is there; reading it is an I/O error
    images = ImageSet.from_folder(folder)
    with pytest.raises(ImageError, match=r"cat/sick\.jpg: the file can.t be read"):
        run(images, store)
    assert not store.root.exists()
    report = run(images, store, on_error="skip")
    assert [name for name, _ in report.failures] == ["cat/sick.jpg"]
    assert store.sets()[0].failed == {}  # its content, which it would be filed under, isn't known
    assert len(store.features(images, report.keys[0], on_error="skip")) == 6


def test_an_absent_file_is_missing_and_not_failed(store: FeatureStore, tmp_path: Path) -> None:
    folder = photos(tmp_path / "photos")
    images = ImageSet.from_folder(folder)
    (folder / "cat/2.jpg").unlink()
    with pytest.raises(ImageError, match=r"cat/2\.jpg: there is no such file"):
        run(images, store)
    report = run(images, store, on_error="skip")
    assert (*counts(report), report.missing) == (5, 0, 0, 1)
    assert [name for name, _ in report.failures] == ["cat/2.jpg"]
    assert store.sets()[0].failed == {}
    planned = plan(staged(), images, store, cuts=["layer2"], dtype="float32")
    assert planned.status(on_error="skip")["missing"] == 1
    assert planned.status(on_error="skip")["failed"] == 0
    assert planned.notes() == ["1 image file is absent (cat/2.jpg)"]


def test_a_policy_that_fails_names_image_and_policy(store: FeatureStore) -> None:
    def picky(image: Tensor, generator: torch.Generator) -> Tensor:
        if int(image.sum()) == total:
            raise RuntimeError("not this one")
        return image

    total = int(pixels(3)[1].astype(np.int64).sum())
    with pytest.raises(ImageError, match=r"^1: .*picky.*not this one"):
        run(arrays(3), store, augment=Augment(picky, seeds=[0]))


def test_a_policy_that_has_changed_since_it_was_keyed_is_refused_before_anything_is_filed(store: FeatureStore) -> None:
    amount = 2

    def divided(image: Tensor, generator: torch.Generator) -> Tensor:
        return image // amount

    augment = Augment(divided, seeds=[0])
    amount = 3
    with pytest.raises(ValueError, match="the policy divided has changed since this Augment was made"):
        run(arrays(3), store, augment=augment)
    assert not Path(store.root).exists()
    run(arrays(3), store, augment=Augment(divided, seeds=[0]))  # the advice


def test_the_batch_size_that_runs_is_the_one_that_is_checked(store: FeatureStore) -> None:
    class Ghost(nn.Module):
        def forward(self, values: Tensor) -> Tensor:
            return values if len(values) % 8 else values - values.mean(0)

    module = nn.Sequential(nn.Conv2d(3, 2, 3), Ghost())
    model = StagedModel.from_module(module.eval(), view=VIEW)
    with pytest.raises(ModelError, match=r"1 \(Ghost\), in batches of 8, gives for an image depends on the other"):
        run(arrays(3), store, model=model, cuts=["1"], batch_size=8)
    run(arrays(3), store, model=model, cuts=["1"], batch_size=6)


# ---- values that can't be stored


def scaled(factor: float) -> StagedModel:
    module = net()
    with torch.no_grad():
        for parameter in module.layer2[1].parameters():
            parameter.mul_(factor)
    return StagedModel.from_module(module, view=VIEW, name="net")


def test_values_too_large_for_the_type_are_refused_with_image_cut_and_remedy(store: FeatureStore) -> None:
    with pytest.raises(
        FeatureStoreError,
        match=r"^\d: its activations at layer2 reach [\d.e+]+, more than float16 can hold \(65504\)\. Store them as "
        r"bfloat16 or float32 \(--dtype\)\.",
    ):
        run(arrays(3), store, model=scaled(1e6), dtype="float16")
    for dtype in ("bfloat16", "float32"):  # the remedy
        assert run(arrays(3), store, model=scaled(1e6), dtype=dtype).computed == 3


def test_values_that_are_no_numbers_are_refused_with_the_cut(store: FeatureStore) -> None:
    with pytest.raises(FeatureStoreError, match=r"layer2: the activations of the two probe images aren't finite"):
        run(arrays(3), store, model=scaled(float("nan")))

    class Picky(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return torch.log(images.amax((1, 2, 3)))[:, None]  # of a dark image: no number

    model = StagedModel.from_stages({"stem": nn.Identity(), "picky": Picky()}, view=VIEW, name="net")
    dark = ImageSet.from_arrays(np.concatenate([pixels(2), np.zeros((1, 24, 24, 3), np.uint8)]))
    with pytest.raises(FeatureStoreError, match=r"^2: its activations at .* aren't finite"):
        run(dark, store, model=model, cuts=[model.cut_points[-1]])


def test_a_model_that_computes_other_values_than_stored_is_refused(
    store: FeatureStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(arrays(3), store)
    with monkeypatch.context() as upgraded:  # an operator whose meaning has changed with the library
        relu = torch.nn.functional.relu
        upgraded.setattr(torch.nn.functional, "relu", lambda *args, **kwargs: relu(*args, **kwargs) * 1.01)
        with pytest.raises(FactsDifferError, match=r"computes other values than set \w{8} \(layer2 concat\) holds"):
            run(arrays(5), store)
    assert counts(run(arrays(5), store)) == (2, 3, 0)


# ---- interrupted


class StopError(Exception):
    """Raised in the middle of a job."""


@pytest.mark.parametrize("error", [StopError, KeyboardInterrupt])
@pytest.mark.parametrize("workers", [0, 2])
def test_an_interrupted_job_keeps_what_was_computed(
    store: FeatureStore, monkeypatch: pytest.MonkeyPatch, error: type[BaseException], workers: int
) -> None:
    images = arrays(20)
    passes = iter(range(100))

    def stopping(trunk: Any, values: Tensor) -> Any:
        if next(passes) == 3:
            raise error
        return trunk_pass(trunk, values)

    trunk_pass = Trunk.__call__
    with monkeypatch.context() as patched:
        patched.setattr(Trunk, "__call__", stopping)
        with pytest.raises(error):
            run(images, store, batch_size=4, workers=workers, augment=Augment("flip", seeds=[0]))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("featstore")]
    stored = plan(staged(), images, store, cuts=["layer2"], dtype="float32").status()["stored"]
    assert stored == 4  # probe, then two passes of two images with two views each
    report = run(images, store, batch_size=4, augment=Augment("flip", seeds=[0]))
    assert counts(report) == (2 * 16, 2 * 4, 0)
    by_hand = reduced(rows_by_hand(up_to("layer2", net()), images, VIEW, batch_size=4), "concat")
    assert torch.equal(rows(store, images, report.keys[0]), by_hand)


def test_rows_are_not_lost_when_writing_them_is_interrupted(
    store: FeatureStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = FeatureStore.write
    writes = iter(range(100))

    def interrupted(self: FeatureStore, *args: Any, **kwargs: Any) -> Path:
        if next(writes) == 0:
            raise KeyboardInterrupt
        return write(self, *args, **kwargs)

    monkeypatch.setattr(job_module, "COMMIT_BYTES", 1)
    monkeypatch.setattr(FeatureStore, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(arrays(12), store, batch_size=4)
    assert store.sets()[0].index.num_images == 4


def test_an_image_changed_while_the_job_ran_is_not_filed(store: FeatureStore, tmp_path: Path) -> None:
    folder = photos(tmp_path / "photos")
    images = ImageSet.from_folder(folder)
    planned = plan(staged(), images, store, cuts=["layer2"])
    (folder / "dog/1.jpg").write_bytes(jpeg(99))
    with pytest.raises(ImageError, match=r"dog/1\.jpg: it was changed while the job ran; run the job again"):
        run_plan(planned, store, workers=0)


@pytest.mark.parametrize("change", [lambda file: file.unlink(), lambda file: file.write_bytes(jpeg(99))])
def test_an_image_that_could_not_be_read_in_its_turn_stays_missing(
    store: FeatureStore, tmp_path: Path, change: Callable[[Path], object]
) -> None:
    """And is not filed as one that can't be read: a disk may be gone for a moment."""
    file = photos(tmp_path / "photos") / "dog/1.jpg"
    images, content = ImageSet.from_folder(tmp_path / "photos"), file.read_bytes()
    planned = plan(staged(), images, store, cuts=["layer2"], dtype="float32", augment=Augment("flip", seeds=[0]))
    change(file)
    report = run_plan(planned, store, on_error="skip", device="cpu")
    assert (*counts(report), report.missing) == (10, 0, 0, 1)
    assert [name for name, _ in report.failures] == ["dog/1.jpg"]
    assert [(each["rows"], each["failed"]) for each in report.sets] == [(5, 0), (5, 0)]
    assert [each.failed for each in store.sets()] == [{}, {}]
    file.write_bytes(content)
    images = ImageSet.from_folder(tmp_path / "photos")
    status = plan(staged(), images, store, cuts=["layer2"], dtype="float32").status(on_error="skip")
    assert (status["missing"], status["failed"]) == (1, 0)
    with pytest.raises(MissingFeaturesError, match=r"1 are missing \(dog/1\.jpg\)"):
        store.features(images, report.keys[0], on_error="skip")
    assert counts(run(images, store, on_error="skip")) == (1, 5, 0)
    assert len(rows(store, images, report.keys[0])) == 6


def test_two_files_of_one_content_that_could_not_be_read_are_each_reported_truly(
    store: FeatureStore, tmp_path: Path
) -> None:
    file = photos(tmp_path / "photos") / "cat/2.jpg"
    shutil.copy(file, file.with_name("copy.jpg"))
    planned = plan(staged(), ImageSet.from_folder(tmp_path / "photos"), store, cuts=["layer2"])
    file.unlink()
    report = run_plan(planned, store, on_error="skip", device="cpu")
    (first, gone), (second, of_first) = report.failures
    assert (first, second, report.missing, report.failed) == ("cat/2.jpg", "cat/copy.jpg", 2, 0)
    assert gone.startswith("there is no such file")
    assert of_first == f"its content was to be read as cat/2.jpg: {gone}"


# ---- the model that runs is the one that was planned


def scale(model: StagedModel, factor: float) -> None:
    """Behind the back of torch's counters of versions; exact for powers of two."""
    for tensor in model.parameters():
        tensor.data.mul_(factor)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_weights_edited_after_the_plan_are_refused_before_anything_is_filed(
    store: FeatureStore, precision: Any
) -> None:
    model, images = staged(), arrays(6)
    planned = plan(model, images, store, cuts=["layer1", "layer2"], precision=precision)
    scale(model, 2.0)
    with pytest.raises(
        FactsDifferError,
        match=r"net was changed after the extraction was planned: up to stage layer1\.0 its digest is \w{8}, expected "
        r"\w{8}\. None of what it computes now was filed\. Plan and extract anew; .*copy\.deepcopy\(model\)",
    ):
        run_plan(planned, store, device="cpu")
    assert not store.root.exists()
    scale(model, 0.5)
    assert run_plan(planned, store, device="cpu").computed == 12
    planned = plan(model, images, store, cuts=["layer1", "layer2"], precision=precision)
    scale(model, 2.0)
    with pytest.raises(FactsDifferError, match="was changed after the extraction was planned"):  # whatever is missing
        run_plan(planned, store, device="cpu")


def test_weights_edited_behind_the_last_cut_are_not_asked_for(store: FeatureStore) -> None:
    model, images = staged(), arrays(6)
    planned = plan(model, images, store, cuts=["layer2"])
    with torch.no_grad():
        model.tensors()["fc.weight"].mul_(2.0)
    assert run_plan(planned, store, device="cpu").computed == 6


@pytest.mark.parametrize("is_undone", [False, True])
def test_weights_edited_while_a_job_runs_are_never_filed(
    store: FeatureStore, monkeypatch: pytest.MonkeyPatch, is_undone: bool
) -> None:
    images, model, passes = arrays(20), staged(), iter(range(100))
    trunk_pass, close = Trunk.__call__, Progress.__exit__

    def edited(trunk: Trunk, values: Tensor) -> list[Tensor]:
        if next(passes) == 2:  # after the probe and four rows
            scale(model, 2.0)
        return trunk_pass(trunk, values)

    def undone(progress: Any, *error: Any) -> None:
        close(progress, *error)
        if is_undone:
            scale(model, 0.5)

    with monkeypatch.context() as patched:
        patched.setattr(job_module, "COMMIT_BYTES", 1)
        patched.setattr(Trunk, "__call__", edited)
        patched.setattr(Progress, "__exit__", undone)
        with pytest.raises(FactsDifferError, match=r"up to stage layer1\.0") as refused:
            run(images, store, model=model, batch_size=4)
    assert refused.value.__context__ is None  # told once
    (found,) = store.sets()
    by_hand = reduced(rows_by_hand(up_to("layer2", net()), images.select(range(4)), VIEW, batch_size=4), "concat")
    assert torch.equal(rows(store, images.select(range(4)), found.key), by_hand)
    assert counts(run(images, store, batch_size=4)) == (16, 4, 0)
    again = run(images, store, model=copy.deepcopy(model), batch_size=4)  # the advice
    assert again.keys[0] != found.key or is_undone


def test_a_job_that_runs_a_copy_lets_the_model_train(
    store: FeatureStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, model, trunk_pass = arrays(12), staged(), Trunk.__call__

    def edited(trunk: Trunk, values: Tensor) -> list[Tensor]:
        if trunk.batch_size == 4:  # not the probe
            scale(model, 2.0)
        return trunk_pass(trunk, values)

    expected = run(images, FeatureStore(tmp_path / "other"), precision="bf16", batch_size=4).keys[0]
    monkeypatch.setattr(job_module, "COMMIT_BYTES", 1)
    monkeypatch.setattr(Trunk, "__call__", edited)
    assert run(images, store, model=model, precision="bf16", batch_size=4).keys == (expected,)
    assert torch.equal(rows(store, images, expected), rows(FeatureStore(tmp_path / "other"), images, expected))


def test_a_probe_of_edited_weights_is_not_filed_with_rows_of_a_copy(
    store: FeatureStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = staged()

    def edited(*args: Any, **options: Any) -> Any:
        scale(model, 2.0)
        return take_probes(*args, **options)

    monkeypatch.setattr(extract_module, "take_probes", edited)
    with pytest.raises(FactsDifferError, match="was changed after the extraction was planned"):
        run(arrays(3), store, model=model, precision="bf16")
    assert not store.root.exists()


class Doubling(TorchFunctionMode):
    """Doubles what each ReLU gives."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        return result * 2 if func is nn.functional.relu else result


@pytest.mark.parametrize("num_stored", [0, 2])
def test_rows_computed_in_a_mode_that_changes_results_are_never_filed(store: FeatureStore, num_stored: int) -> None:
    if num_stored:
        run(arrays(num_stored), store)
    files = sorted(store.root.rglob("*"))
    with (
        Doubling(),
        pytest.raises(ModelError, match=r"net can't be cached at layer2 while test_extract\.Doubling is act"),
    ):
        run(arrays(3), store)
    assert sorted(store.root.rglob("*")) == files
    assert run(arrays(3), store).computed == 3 - num_stored  # the advice


# ---- the parts of one job become one


def test_a_job_leaves_one_part_with_its_rows_in_the_order_of_its_images(
    store: FeatureStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_module, "COMMIT_BYTES", 1)
    key = run(arrays(6), store, batch_size=4).keys[0]
    (old,) = store.set(key).parts
    images = arrays(30)
    report = run(images, store, batch_size=4, augment=Augment("flip", seeds=[0]))
    assert report.notes == ()
    for each, start in zip(report.keys, (6, 0), strict=True):
        found = store.set(each)
        (part,) = (part for part in found.parts if part.path != old.path)
        assert (part.digests == images.digests().values[start:]).all()
        assert len(list(found.folder.iterdir())) == len(found.parts)  # the small ones are gone
    assert old.path.exists()  # another job's
    by_hand = reduced(rows_by_hand(up_to("layer2", net()), images, VIEW, batch_size=4), "concat")
    assert torch.equal(rows(store, images, key), by_hand)
    assert counts(run(images, store, augment=Augment("flip", seeds=[0]))) == (0, 60, 0)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), MemoryError("too large")])
def test_a_job_that_cannot_merge_its_parts_has_not_failed(
    store: FeatureStore, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def failing(*_: object) -> None:
        raise error

    monkeypatch.setattr(job_module, "COMMIT_BYTES", 1)
    monkeypatch.setattr(FeatureStore, "merge", failing)
    report = run(arrays(12), store, batch_size=4)
    assert counts(report) == (12, 0, 0)
    (note,) = report.notes
    assert "could not be merged" in note
    assert str(error) in note
    assert str(report).endswith(f"{note}")
    assert len(store.set(report.keys[0]).parts) == 3
    assert len(rows(store, arrays(12), report.keys[0])) == 12
    monkeypatch.undo()
    store.compact()
    assert len(store.set(report.keys[0]).parts) == 1


def test_large_parts_of_a_job_stay_as_they_are(store: FeatureStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_module, "COMMIT_BYTES", 1)
    monkeypatch.setattr(job_module, "MERGE_BYTES", 1000)
    report = run(arrays(12), store, batch_size=4)
    assert len(store.set(report.keys[0]).parts) == 3


# ---- nothing of the caller's is touched


def test_random_states_settings_and_arguments_are_left_as_they_were(store: FeatureStore) -> None:
    def states() -> list[Any]:
        return [
            torch.get_rng_state().tolist(),
            random.getstate(),
            str(np.random.get_state()),  # noqa: NPY002
            torch.get_num_threads(),
            torch.is_grad_enabled(),
            torch.get_default_dtype(),
            torch.backends.mkldnn.conv.fp32_precision,  # type: ignore[attr-defined]
            torch.backends.cudnn.benchmark,
            torch.backends.cudnn.deterministic,
            torch.get_float32_matmul_precision(),
        ]

    cuts = ["layer2", "layer1"]
    model = staged()
    requires_grad = [parameter.requires_grad for parameter in model.parameters()]
    before = states()
    run(arrays(6), store, model=model, cuts=cuts, workers=2, augment=Augment("random_resized_crop", seeds=[0]))
    assert states() == before
    assert cuts == ["layer2", "layer1"]
    assert [parameter.requires_grad for parameter in model.parameters()] == requires_grad
    assert model.num_frozen == 0
    assert model.view == VIEW


def test_jobs_are_drawn_as_they_are_needed(store: FeatureStore, monkeypatch: pytest.MonkeyPatch) -> None:
    most = 0
    jobs = Job._jobs

    def counted(self: Any) -> Iterator[Any]:
        nonlocal most
        for job in jobs(self):
            most = max(most, len(self.drawn))
            yield job

    monkeypatch.setattr(Job, "_jobs", counted)
    run(arrays(60), store, workers=2, batch_size=8)
    assert 0 < most <= 2 * 2 + 1


# ---- progress


def test_progress_without_a_terminal_is_plain_lines(
    store: FeatureStore, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Progress, "SECONDS_A_LINE", 0.0)
    run(arrays(5), store, batch_size=2, progress=True)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 5
    assert lines[-1].startswith("5 of 5 images, ")
    assert all(word in lines[-1] for word in ("a second; reading and decoding", "the forward pass", "writing"))
    assert run(arrays(6), store).computed == 1
    assert capsys.readouterr().err == ""


# ---- at once


def extract_beside_another(root: Path, ready: Path) -> None:
    """Begins when two files lie in the folder `ready`, of which one is its own."""
    (ready / str(os.getpid())).touch()
    while len(list(ready.iterdir())) < 2:
        time.sleep(0.001)
    run(arrays(30), FeatureStore(root), batch_size=4, augment=Augment("flip", seeds=[0]))


def test_two_jobs_at_once_leave_each_row_once_for_every_reader(
    tmp_path: Path, store: FeatureStore, processes: Processes
) -> None:
    (tmp_path / "ready").mkdir()
    program = f"""
        from pathlib import Path
        from test_extract import extract_beside_another
        extract_beside_another(Path({str(store.root)!r}), Path({str(tmp_path / "ready")!r}))
    """
    for job in [processes.start(program) for _ in range(2)]:
        ended = processes.end(job)
        assert ended.returncode == 0, ended.stderr
    images = arrays(30)
    report = run(images, store, augment=Augment("flip", seeds=[0]))
    assert report.computed == 0
    for key, view in zip(report.keys, [VIEW, VIEW.with_seed("flip", 0)], strict=True):
        found = store.set(key)
        assert found.index.num_images == 30
        by_hand = reduced(rows_by_hand(up_to("layer2", net()), images, view, batch_size=4), "concat")
        assert torch.equal(store.features(images, key)[:], by_hand)
    assert not list(store.root.rglob(".*"))
    assert len(list((store.root / "images").iterdir())) == 1
    assert store.damaged() == []
    assert all(Part.open(path).verify() == [] for path in store.root.rglob("part-*.h5"))


def test_memory_does_not_grow_with_the_number_of_images(tmp_path: Path, processes: Processes) -> None:
    """A process whose rows are 164 MB in all, and parts of 8 MB, which it merges at its end."""
    if not Path("/proc/self/statm").exists():
        pytest.skip("the system doesn't tell how much memory a process has")
    (tmp_path / "photos" / "one").mkdir(parents=True)
    for number in range(2500):  # a decoder doesn't look behind the end of a JPEG
        (tmp_path / "photos" / "one" / f"{number:04d}.jpg").write_bytes(jpeg(0) + str(number).encode())
    program = f"""
        import resource, sys, threading, time
        from pathlib import Path
        import torch
        from support.tiny import VIEW
        from featstore import FeatureStore, ImageSet, StagedModel, extract
        from featstore.extraction import job

        job.COMMIT_BYTES = 8 << 20
        model = StagedModel.from_module(torch.nn.Sequential(torch.nn.Conv2d(3, 256, 2, 2), torch.nn.ReLU()), view=VIEW)

        def resident():
            return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

        def run(images):
            return extract(model, images, FeatureStore({str(tmp_path)!r} + "/features"), dtype="float32", device="cpu",
                           cuts=["0:none"], batch_size=32)

        images = ImageSet.from_folder({str(tmp_path / "photos")!r})
        assert run(images.select(range(200))).computed == 200
        before, most, is_done = resident(), [0], threading.Event()

        def watch():
            while not is_done.is_set():
                most[0] = max(most[0], resident())
                time.sleep(0.002)

        watcher = threading.Thread(target=watch)
        watcher.start()
        assert run(images).computed == 2300
        is_done.set()
        watcher.join()
        (found,) = FeatureStore({str(tmp_path)!r} + "/features").sets()
        assert sorted(part.num_rows for part in found.parts) == [200, 2300]
        print(most[0] - before)
    """
    assert int(processes.answer(program)) < 60 << 20


# ---- the image set beside the rows


def test_where_nothing_is_computed_a_store_that_cannot_be_written_is_no_error(
    tmp_path: Path, store: FeatureStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = ImageSet.from_folder(photos(tmp_path / "photos", 8)).split(valid=0.25)
    run(images, store)

    def read_only(*arguments: Any, **options: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr("featstore.store.store.write_table", read_only)
    fresh = FeatureStore(store.root)
    report = run(images.split(valid=0.5, seed=7), fresh)
    assert counts(report) == (0, 8, 0)
    assert report.notes == (f"the image set isn't noted in {store.root} (Read-only file system)",)
    with pytest.raises(OSError, match="Read-only file system"):
        run(images.split(valid=0.5, seed=7), fresh, cuts=["layer1"])


def test_another_image_set_of_the_same_name_is_noted_and_stays(tmp_path: Path, store: FeatureStore) -> None:
    first = ImageSet.from_folder(photos(tmp_path / "photos", 8))
    assert run(first, store).notes == ()
    (tmp_path / "photos" / "cat" / "new.jpg").write_bytes(jpeg(99))
    assert run(ImageSet.from_folder(tmp_path / "photos"), store).notes == ()  # the same, with one more
    stems = {path.stem for path in (store.root / "images").iterdir()}
    other = tmp_path / "elsewhere" / "photos" / "bird"
    other.mkdir(parents=True)
    (other / "a.jpg").write_bytes(jpeg(50))
    (note,) = run(ImageSet.from_folder(other.parent), store).notes
    assert note.startswith(f"{store.root} had an image set called photos of other images; this one is the newest")
    (stem,) = [stem for stem in stems if stem in note]
    assert ImageSet.from_store(store).ids == ("bird/a.jpg",)
    assert set(ImageSet.from_store(store, stem).ids) == {*first.ids, "cat/new.jpg"}
