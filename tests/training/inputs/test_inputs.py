"""Where a fit reads from follows from what is frozen, the augmentation asked for, and what is stored; never a guess."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.decoders import fast, jpegs_by
from support.tiny import VIEW, arrays, jpeg, photos, pixels, staged

from featstore import Augment, FeatureStore, ImageSet, StagedModel, extract
from featstore.errors import AmbiguousRequestError, FactsDifferError, FeatureStoreError, MissingFeaturesError
from featstore.images.decode import decode
from featstore.models.names import Batching
from featstore.models.trunk import Output, Trunk
from training import Learner
from training.inputs.batches import Batches
from training.inputs.derive import FeatureSource, ImageSource, find, from_images


class World:
    """Images in memory, a model whose convolutions are named, and a store."""

    def __init__(self, root: Path) -> None:
        self.model, self.images = staged(), arrays(12).split(valid=0.25)
        self.store = FeatureStore(root / "features")

    def extract(self, *cuts: str, **options: Any) -> tuple[str, ...]:
        return extract(self.model, self.images, self.store, cuts=cuts, **options).keys

    def learner(self, **options: Any) -> Learner:
        return Learner(self.model, self.images, self.store, **{"head": "linear", "quiet": True, **options})


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def stored(learn: Learner) -> FeatureSource:
    source = learn.inputs.train
    assert isinstance(source, FeatureSource), str(learn.inputs)
    return source


def reads(learn: Learner) -> str | None:
    return learn.read_from


def keys(learn: Learner) -> tuple[str, ...]:
    return tuple(each.key for each in stored(learn).features)


# ----------------------------------------------------------------------------------------------------- which features


def test_the_deepest_stored_cut_at_or_before_the_freeze_point_is_read(world: World) -> None:
    (early,) = world.extract("layer1.0:none")
    learn = world.learner()
    assert keys(learn) == (early,)
    (later,) = world.extract("layer1:none")
    assert keys(learn) == (later,)
    (maps,) = world.extract("layer2:none")
    assert keys(learn) == (maps,)
    (pooled,) = world.extract("layer2:concat")
    assert keys(learn) == (pooled,)
    assert stored(learn).start == learn.model.num_frozen
    learn.freeze_to("layer1")
    assert keys(learn) == (later,)
    learn.freeze_to("layer1.1")
    assert keys(learn) == (early,)
    assert learn.inputs.why == "layer1.0...layer1.1 are frozen; layer1.1 runs on the stored activations"


def test_pooled_features_serve_only_the_pool_they_were_made_with(world: World) -> None:
    world.extract("layer2:concat")
    with pytest.raises(FactsDifferError, match=r"reduction \(stored concat, yours avg\)"):
        world.learner(reduce="avg").fit(1, lr=1e-2)
    (averages,) = world.extract("layer2:avg")
    assert keys(world.learner(reduce="avg")) == (averages,)


def test_maps_serve_every_pool_and_give_what_pooled_features_give(world: World, tmp_path: Path) -> None:
    world.extract("layer2:none", dtype="float32")
    other = World(tmp_path / "pooled")
    for reduce in ("avg", "max", "concat"):
        other.extract(f"layer2:{reduce}", dtype="float32")
        from_maps, from_rows = world.learner(reduce=reduce), other.learner(reduce=reduce)
        assert stored(from_maps).features[0].spec.reduction == "none"
        assert stored(from_rows).features[0].spec.reduction == reduce
        assert from_maps.fit(2, lr=1e-2).losses == from_rows.fit(2, lr=1e-2).losses


def test_features_pooled_earlier_than_the_head_are_not_used_behind_it(world: World) -> None:
    world.extract("layer1:concat")
    with pytest.raises(FactsDifferError, match="layer1"):
        world.learner(cut="layer2", reduce="concat").fit(1, lr=1e-2)


def test_what_the_caller_leaves_open_is_what_is_stored_if_that_is_one_thing(world: World) -> None:
    world.extract("layer1:avg")
    learn = world.learner()
    assert (learn.cut, stored(learn).features[0].spec.reduction) == ("layer1", "avg")
    world.extract("layer1:max")
    with pytest.raises(
        AmbiguousRequestError, match=r"several kinds of features of net: layer1 avg, layer1 max\. Choose"
    ):
        world.learner()
    assert world.learner(reduce="max").cut == "layer1"
    world.extract("layer2")  # the default: no question
    assert world.learner().cut == "layer2"


def test_two_storage_types_are_ambiguous_and_a_key_chooses(world: World) -> None:
    (half,) = world.extract("layer2")
    (single,) = world.extract("layer2", dtype="float32")
    learn = world.learner()
    with pytest.raises(AmbiguousRequestError, match=r"storage type float16.*storage type float32") as caught:
        learn.fit(1, lr=1e-2)
    assert f"nothing can be trained: {caught.value}" in str(learn.inputs)
    for key, dtype in ((half, torch.float16), (single, torch.float32)):
        chosen = world.learner(features=key[:8])
        assert keys(chosen) == (key,)
        assert stored(chosen).features[0].dtype == dtype
        chosen.fit(1, lr=1e-2)


def test_views_of_one_search_have_one_storage_type(world: World) -> None:
    flips = [Augment("flip", seeds=[seed]) for seed in (0, 1)]
    both = Augment("flip", seeds=[0, 1])
    evaluation, first = world.extract("layer2", augment=flips[0])
    world.extract("layer2:concat", augment=flips[1], dtype="float32")
    learn = world.learner(features=evaluation, augment=both)
    assert isinstance(learn.inputs.problem, MissingFeaturesError)
    learn = world.learner(augment=both)
    assert learn.inputs.problem is not None  # float16 of one seed and float32 of the other are no request's answer
    _, second = world.extract("layer2", augment=flips[1], dtype="float16")
    learn = world.learner(features=evaluation, augment=both)
    assert keys(learn) == (first, second)
    source = find(world.learner(augment=both)._situation(), world.images.train, both)
    assert isinstance(source, FeatureSource)
    assert [each.key for each in source.features] == [first, second]
    world.extract("layer2", augment=flips[0], dtype="float32")
    with pytest.raises(AmbiguousRequestError, match=r"storage type float16.*storage type float32"):
        find(world.learner(augment=both)._situation(), world.images.train, both)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_live_trunk_and_what_continues_features_run_at_their_precision(world: World, precision: str) -> None:
    world.extract("layer1:none", dtype="float32", precision=precision, device="cpu")
    continued = world.learner(cut="layer2", reduce="concat", device="cpu")
    assert reads_of(continued) == FeatureSource
    expected = Trunk(
        world.model,
        [Output("layer2", world.model.pool("layer2", "concat"))],
        view=VIEW,
        precision=precision,  # type: ignore[arg-type]
    )
    live = world.learner(cut="layer2", reduce="concat", device="cpu", augment=Augment("flip", seeds="fresh"))
    assert reads_of(live) == ImageSource
    for learn in (continued, live):
        assert (f" in {precision}" in str(learn.inputs)) == (precision != "fp32")
    uint8 = [VIEW.render(decode(world.images.read(place))[0], b"") for place in range(4)]
    rows = expected(torch.stack(uint8))[0]
    for on in ("features", "images"):
        situation = continued._situation()
        if on == "images":
            situation = replace(situation, on_missing="images", images=world.images)
        part = world.images.select(range(4))
        source = find(situation, part, None) if on == "features" else from_images(situation, part, None)
        ((values, _),) = list(Batches(source, situation, batch_size=4, workers=0).in_order())
        assert torch.equal(values, rows)


def test_a_saved_run_predicts_at_the_precision_of_what_it_was_trained_on(world: World, tmp_path: Path) -> None:
    world.extract("layer2", dtype="float32", precision="bf16", device="cpu")
    learn = world.learner(cut="layer2", device="cpu")
    learn.fit(1, lr=1e-2)
    assert learn.read_from == "features"
    run = learn.save(tmp_path / "run")
    part = world.images.select(range(4))
    alone = Learner.load(run, module=staged(), quiet=True, device="cpu", workers=0)  # no store says anything
    assert np.array_equal(alone.predict_proba(part), learn.predict_proba(part))
    again = Learner.load(alone.save(tmp_path / "again"), module=staged(), quiet=True, device="cpu", workers=0)
    assert np.array_equal(again.predict_proba(part), learn.predict_proba(part))


@pytest.mark.usefixtures("compiler")
def test_a_live_trunk_beside_compiled_features_is_not_compiled_and_says_so(world: World) -> None:
    world.extract("layer2", dtype="float32", device="cpu", compile=True, batch_size=4)
    stored, live = (world.learner(device="cpu", augment=each) for each in (None, Augment("flip", seeds="fresh")))
    assert "not compiled" not in str(stored.inputs)
    assert "layer2 run on them, not compiled as what is stored was" in str(live.inputs)
    uint8 = torch.stack([VIEW.render(decode(world.images.read(place))[0], b"") for place in range(4)])
    output = Output("layer2", world.model.pool("layer2", "concat"))
    (rows,) = Trunk(world.model, [output], view=VIEW, batching=Batching(4))(uint8)
    situation = replace(stored._situation(), on_missing="images")
    source = from_images(situation, world.images.select(range(4)), None)
    ((values, _),) = list(Batches(source, situation, batch_size=4, workers=0).in_order())
    assert torch.equal(values, rows)


def reads_of(learn: Learner) -> type:
    return type(learn.inputs.train)


def test_scores_are_of_images_where_the_store_is_damaged_or_of_another_trunk(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    world.extract("layer2")
    learn = world.learner(quiet=False)
    (only,) = world.store.sets()
    only.facts["probe"]["values"][0][0] += 1.0
    expected = Learner(world.model, world.images, head="linear", quiet=True).evaluate("valid")
    assert learn.evaluate("valid") == expected
    assert reads(learn) == "images"
    assert "images are read instead of features: " in capsys.readouterr().err


def test_a_key_fixes_cut_reduction_view_and_precision_and_its_seeds_are_looked_up(world: World) -> None:
    four = Augment("flip", seeds=range(4))
    view = VIEW.resized(size=12)
    settings: dict[str, Any] = {"view": view, "precision": "bf16", "dtype": "bfloat16", "augment": four}
    evaluation, *seeds = world.extract("layer1:avg", **settings)
    world.extract("layer2", augment=four)
    world.extract("layer1:avg", view=view)
    for key in (evaluation, seeds[2]):  # the key of any of its views will do
        learn = world.learner(features=key)
        assert (learn.cut, learn.view) == ("layer1", view)
        assert keys(learn) == (evaluation,)
        learn.augment = Augment("flip", seeds=[1, 3])
        assert keys(learn) == (seeds[1], seeds[3])
        learn.fit(1, lr=1e-2)


def test_a_key_of_another_model_is_refused(world: World) -> None:
    (key,) = extract(staged(seed=1), world.images, world.store, cuts=["layer2"]).keys
    world.extract("layer2")
    with pytest.raises(
        FactsDifferError, match=rf"Nearest is set {key[:8]} \(12 of 12 images\); it differs in: weights"
    ):
        world.learner(features=key).fit(1, lr=1e-2)


def test_a_key_needs_a_store(world: World) -> None:
    with pytest.raises(ValueError, match="there is no store"):
        Learner(world.model, world.images, features="7c41")


def test_a_wrong_probe_stops_a_fit_although_all_keys_agree(world: World) -> None:
    world.extract("layer2")
    (only,) = world.store.sets()
    only.facts["probe"]["values"][0][0] += 1.0  # as if another version of an operator had made the features
    with pytest.raises(FactsDifferError, match="computes other values"):
        world.learner().fit(1, lr=1e-2)


def test_decoders_that_give_other_pixels_than_the_rows_were_made_of_stop_a_fit(world: World, tmp_path: Path) -> None:
    world.images = ImageSet.from_folder(photos(tmp_path / "photos", 12)).split(valid=0.25)
    (key,) = world.extract("layer2")
    with jpegs_by(fast):
        with pytest.raises(FactsDifferError, match=f"images of set {key[:8]} .layer2 concat. were decoded to other"):
            world.learner().fit(1, lr=1e-2)
        Learner(world.store.model(key), world.images, world.store, quiet=True).fit(1, lr=1e-2)  # nothing to decode for
    world.learner().fit(1, lr=1e-2)


# -------------------------------------------------------------------------------------------- features or images


def test_nothing_frozen_or_fresh_seeds_or_no_store_means_images_and_nothing_is_missing(world: World) -> None:
    learn = world.learner()
    assert learn.inputs.problem is not None
    learn.unfreeze()
    learn.fit(1, lr=1e-3)
    assert reads(learn) == "images"
    fresh = world.learner(augment=Augment("flip", seeds="fresh"))
    fresh.fit(1, lr=1e-2)
    assert reads(fresh) == "images"
    without = Learner(world.model, world.images, head="linear", quiet=True)
    without.fit(1, lr=1e-2)
    assert reads(without) == "images"
    assert not world.store.root.exists()


def test_freezing_only_stages_without_weights_is_not_freezing(tmp_path: Path) -> None:
    layers = {"relu": torch.nn.ReLU(), "conv": torch.nn.Conv2d(3, 4, 3), "flat": torch.nn.Flatten()}
    model = StagedModel.from_stages({**layers, "fc": torch.nn.Linear(784, 2)}, view=VIEW)
    learn = Learner(model, arrays(8), FeatureStore(tmp_path / "features"), head="keep", cut="relu", quiet=True)
    assert learn.inputs.why == "nothing is frozen, so every stage trains"
    assert isinstance(learn.inputs.train, ImageSource)


def test_on_missing_extract_computes_once_and_reads_features(world: World) -> None:
    learn = world.learner(on_missing="extract", augment=Augment("flip", seeds=range(2)))
    learn.fit(1, lr=1e-2)
    assert reads(learn) == "features"
    assert [each.index.num_images for each in world.store.sets()] == [12, 8, 8]
    parts = sorted(world.store.root.rglob("part-*.h5"))
    learn.fit(1, lr=1e-2)
    assert sorted(world.store.root.rglob("part-*.h5")) == parts


def test_on_missing_extract_does_not_hide_other_errors(world: World) -> None:
    world.extract("layer2")
    world.extract("layer2", dtype="float32")
    learn = world.learner(on_missing="extract")
    assert isinstance(learn.inputs.problem, AmbiguousRequestError)
    with pytest.raises(AmbiguousRequestError):
        learn.fit(1, lr=1e-2)


def test_on_missing_images_reads_what_is_not_stored_and_features_where_they_are(world: World) -> None:
    learn = world.learner(on_missing="images")
    learn.fit(1, lr=1e-2)
    assert reads(learn) == "images"
    world.extract("layer2")
    learn.fit(1, lr=1e-2)
    assert reads(learn) == "features"


def test_with_seeds_only_the_training_images_need_them(world: World) -> None:
    two = Augment("flip", seeds=range(2))
    world.extract("layer2", augment=two)
    learn = world.learner(augment=two)
    inputs = learn.inputs
    assert isinstance(inputs.train, FeatureSource)
    assert isinstance(inputs.valid, FeatureSource)
    assert [each.spec.rendered.seed for each in inputs.train.features] == [0, 1]
    assert [each.spec.rendered.seed for each in inputs.valid.features] == [None]


# -------------------------------------------------------------------------------------------- never old features


def test_an_image_that_is_gone_is_said_of_a_score_as_of_a_fit(tmp_path: Path) -> None:
    root = photos(tmp_path / "photos", 10)
    images, store = ImageSet.from_folder(root).split(valid=0.3), FeatureStore(tmp_path / "features")
    extract(staged(), images, store, cuts=["layer2"])
    learn = Learner(staged(), images, store, head="linear", quiet=True)
    (root / images.valid.ids[0]).unlink()
    with pytest.raises(FeatureStoreError, match=r"1 is absent .*\. Nothing was scored\. Bring back the files"):
        learn.evaluate("valid")
    with pytest.raises(FeatureStoreError, match=r"1 is absent .*\. Nothing was trained\. Bring back the files"):
        learn.fit(1, lr=1e-2)
    learn.unfreeze()
    with pytest.raises(FeatureStoreError, match="the images have to be read here"):
        learn.evaluate("valid")
    with pytest.raises(FeatureStoreError, match=r"unfreeze\(\) makes fit read images"):
        learn.fit(1, lr=1e-2)


def test_an_image_that_was_replaced_is_never_served_old_features(tmp_path: Path) -> None:
    folder = photos(tmp_path / "photos", 8)
    images, store = ImageSet.from_folder(folder).split(valid=0.25), FeatureStore(tmp_path / "features")
    extract(staged(), images, store, cuts=["layer2"])
    learn = Learner(staged(), images, store, head="linear", quiet=True)
    assert learn.inputs.problem is None
    (folder / "dog" / "1.jpg").write_bytes(jpeg(77))
    with pytest.raises(MissingFeaturesError, match=r"1 is changed since \(dog/1.jpg\)"):
        learn.fit(1, lr=1e-2)


def test_at_another_image_size_no_features_are_used(world: World) -> None:
    world.extract("layer2")
    with pytest.raises(FactsDifferError, match=r"size \(stored 16, yours 12\)"):
        world.learner(view=VIEW.resized(size=12)).fit(1, lr=1e-2)


def test_freezing_again_after_training_is_another_trunk(world: World) -> None:
    world.extract("layer2")
    learn = world.learner()
    learn.unfreeze()
    learn.fit(1, lr=1e-2)
    learn.freeze()
    with pytest.raises(FactsDifferError, match=r"weights of stage layer1"):
        learn.fit(1, lr=1e-2)


def test_rows_follow_images_not_positions(world: World) -> None:
    world.extract("layer2")
    expected = dict(zip(*world.learner().scored(world.images), strict=True))
    shuffled = world.images.select(np.random.default_rng(0).permutation(12))
    ids, values = world.learner().scored(shuffled)
    assert ids == shuffled.ids != world.images.ids
    for name, row in zip(ids, values, strict=True):
        np.testing.assert_array_equal(row, expected[name])


# ---------------------------------------------------------------------------------------------------- which images


def test_unlabelled_images_are_left_out_and_an_undealt_set_trains_on_all(tmp_path: Path) -> None:
    labels = ["a", "b", None, "a", "b", None, "a", "b"]
    images = ImageSet.from_arrays(pixels(8), labels)
    learn = Learner(staged(), images, head="linear", quiet=True)
    assert learn.inputs.train is not None
    assert learn.inputs.train.images.ids == ("0", "1", "3", "4", "6", "7")
    assert learn.inputs.valid is None
    learn.fit(1, lr=1e-2)
    assert "valid_loss" not in learn.history.last
    split = images.with_splits(["train"] * 5 + ["valid"] * 3)
    inputs = Learner(staged(), split, head="linear").inputs
    assert inputs.train is not None
    assert inputs.valid is not None
    assert (inputs.train.images.ids, inputs.valid.images.ids) == (("0", "1", "3", "4"), ("6", "7"))


def test_with_skip_what_can_not_be_read_is_left_out_live_and_stored(tmp_path: Path) -> None:
    folder = photos(tmp_path / "photos", 10)
    (folder / "dog" / "1.jpg").write_text("no photograph")
    images, store = ImageSet.from_folder(folder), FeatureStore(tmp_path / "features")
    options: dict[str, Any] = {"head": "linear", "quiet": True, "on_error": "skip"}
    live = Learner(staged(), images, **options)
    live.fit(1, lr=1e-2)
    extract(staged(), images, store, cuts=["layer2"], on_error="skip", dtype="float32")
    cached = Learner(staged(), images, store, **options)
    assert cached.inputs.train is not None
    assert len(cached.inputs.train.images) == 9
    cached.fit(1, lr=1e-2)
    assert reads(cached) == "features"
    assert [name for name in images.ids if name not in cached.scored(images)[0]] == ["dog/1.jpg"]


def test_with_skip_an_image_that_is_gone_keeps_no_other_from_its_score(tmp_path: Path) -> None:
    folder = photos(tmp_path / "photos", 10)
    images = ImageSet.from_folder(folder).split(valid=0.4)
    gone, *others = images.valid.ids
    (folder / gone).unlink()
    store = FeatureStore(tmp_path / "features")
    learn = Learner(staged(), images, store, head="linear", quiet=True, on_error="skip", on_missing="images")
    learn.fit(1, lr=1e-2)
    assert learn.evaluate("valid")["images"] == len(others)
    assert list(learn.scored(images.valid)[0]) == others


def test_a_fit_hashes_the_model_once(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.extract("layer2")
    learn = world.learner()
    count = 0
    digests = StagedModel.digests

    def counted(model: StagedModel) -> dict[str, str]:
        nonlocal count
        count += 1
        return digests(model)

    monkeypatch.setattr(StagedModel, "digests", counted)
    learn.fit(2)  # the finder included
    assert count == 1


def test_a_damaged_part_is_named(world: World) -> None:
    world.extract("layer2")
    (part,) = world.store.root.rglob("part-*.h5")
    part.write_bytes(part.read_bytes()[:-100])
    learn = Learner(world.model, world.images, FeatureStore(world.store.root), head="linear", quiet=True)
    with pytest.raises(FeatureStoreError, match=part.name):
        learn.fit(1, lr=1e-2)
