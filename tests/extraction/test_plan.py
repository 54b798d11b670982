"""Plan: what is missing, and nothing else, is computed; what can't be asked for is refused before anything is filed."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.extracting import counts, reduced, rows, run, up_to
from support.tiny import SIZE, VIEW, arrays, jpeg, net, photos, pixels, rows_by_hand, staged
from torch import Tensor, nn

from featstore import (
    Augment,
    FactsDifferError,
    FeatureRequest,
    FeatureStore,
    ImageSet,
    MissingFeaturesError,
    ModelError,
    StagedModel,
    View,
    extract,
    plan,
)

# ---- what is missing is computed, and nothing else


def test_a_second_run_computes_nothing(store: FeatureStore) -> None:
    images = arrays(10)
    first = run(images, store, augment=Augment("flip", seeds=[0]))
    files = sorted(store.root.rglob("*.h5"))
    second = run(images, store, augment=Augment("flip", seeds=[0]))
    assert counts(first) == (20, 0, 0)
    assert counts(second) == (0, 20, 0)
    assert sorted(store.root.rglob("*.h5")) == files


class Switched(nn.Module):
    """Vouched for by its author, and out of order while it is switched off."""

    is_on = True

    def fingerprint(self) -> str:
        return "switched"

    def forward(self, images: Tensor) -> Tensor:
        assert Switched.is_on, "the trunk ran"
        return images.mean((2, 3))


def test_where_every_row_is_stored_or_no_image_can_be_read_the_trunk_never_runs(
    store: FeatureStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = StagedModel.from_stages({"stem": nn.Identity(), "switched": Switched(), "end": nn.Identity()}, view=VIEW)
    folder = photos(tmp_path / "photos")
    run(ImageSet.from_folder(folder), store, model=model, cuts=["switched"])
    monkeypatch.setattr(Switched, "is_on", False)
    assert counts(run(ImageSet.from_folder(folder), store, model=model, cuts=["switched"])) == (0, 6, 0)
    images = ImageSet.from_csv(
        table(tmp_path / "photos.csv", [*ImageSet.from_folder(folder).ids, "gone.jpg"]), root=folder
    )
    report = run(images, store, model=model, cuts=["switched"], on_error="skip")
    assert (counts(report), report.missing) == ((0, 6, 0), 1)
    (folder / "dog/1.jpg").write_bytes(jpeg(99))
    with pytest.raises(AssertionError, match="the trunk ran"):
        run(ImageSet.from_folder(folder), store, model=model, cuts=["switched"])


def table(path: Path, ids: Sequence[str]) -> Path:
    path.write_text("\n".join(["path,label", *(f"{each},one" for each in ids)]), encoding="utf-8")
    return path


def test_a_wrong_batch_size_is_refused_also_where_every_row_is_stored(store: FeatureStore) -> None:
    run(arrays(3), store)
    with pytest.raises(ValueError, match="batch size 0 is too small"):
        run(arrays(3), store, batch_size=0)


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
        (
            lambda: request(staged(), view=replace(VIEW, decode="reduced")),
            "decode policy .stored featstore-decode-1, yours",
        ),
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
        ({"cuts": [4]}, TypeError, r"cuts is \[4\]. Expected a list of names of cuts"),
        ({"cuts": 4}, TypeError, "cuts is 4. Expected a list of names of cuts"),
        ({"augment": "flip"}, TypeError, "augment is 'flip'; expected what Augment"),
        ({"view": "x"}, TypeError, "view is 'x'; expected what model"),
        ({"batch_size": 1.5}, TypeError, "batch size 1.5 is no number of images"),
        ({"device": None}, ValueError, "None is no device"),
        ({"workers": 1.5}, TypeError, "workers is 1.5; expected a number of threads"),
        ({"cuts": ["layer2:mean"]}, ValueError, "'mean' is no reduction. The reductions are auto, none, avg"),
        ({"cuts": ["flatten:avg"]}, ValueError, "reduction avg needs activations with positions"),
        ({"dtype": "int4"}, ValueError, "'int4' is no storage type"),
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
        "about new images",
        "1 image repeats another byte for byte: 1 content (0 2 times); copies, or placeholders for missing images?",
    ]
    report = run(images, store, augment=augment)
    assert [(each["rows"], each["computed"]) for each in report.sets] == [(4, 3), (3, 3)]
    assert len(store.features(images.train, report.keys[1])) == 3


# ---- sizes


def test_a_plan_tells_the_size_of_each_cut(store: FeatureStore) -> None:
    images = arrays(10)
    planned = plan(staged(), images, store, cuts=["layer1:none", "layer2"], dtype="int8")
    assert planned.describe().splitlines() == [
        "10 images: 0 stored, 10 to compute, 5,360 bytes in 2 feature sets",
        "  layer1:none: 8x8x8 int8, 512 bytes a row, 5,120 bytes",
        "  layer2:concat: 24 int8, 24 bytes a row, 240 bytes",
    ]
    run(images, store, cuts=["layer2"], dtype="int8")
    seeds = Augment("flip", seeds=[0, 1])
    planned = plan(staged(), images, store, cuts=["layer1:none", "layer2"], dtype="int8", augment=seeds)
    assert planned.sizes() == [
        "  layer1:none: 8x8x8 int8, 512 bytes a row, 15,360 bytes",
        "  layer2:concat: 24 int8, 24 bytes a row, 480 bytes",
    ]
    assert planned.status()["bytes"] == 30 * 512 + 20 * 24
    assert plan(staged(), images, store, cuts=["layer2"], dtype="int8").sizes() == []
    (only,) = plan(staged(), images, store, cuts=["layer1:none"]).sizes()
    assert only == "  layer1:none: 8x8x8 float16, 1,024 bytes a row, 10,240 bytes"
