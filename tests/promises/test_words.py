"""What a Learner says: where it reads from and why, and the errors that matter most, each with a remedy that works.

Texts are compared whole. Keys and digests in them are read from the store and the model: they are the same on every
machine only as long as torch draws the same initial weights.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny import arrays, jpeg, photos, staged
from torch import Tensor

from featstore import Augment, FeatureStore, ImageSet, StagedModel, View, backbone, extract
from featstore.cli.app import main
from featstore.errors import FeatureStoreError, ImageError
from featstore.images.sources import AbsentSource
from training import Learner

MAKE_MODEL = """
from collections import OrderedDict
from torch import nn


def block(channels_in, channels_out):
    convolution = nn.Conv2d(channels_in, channels_out, 3, stride=2, padding=1)
    return nn.Sequential(convolution, nn.BatchNorm2d(channels_out), nn.ReLU())


def make_model():
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))
    blocks = OrderedDict(conv1=block(3, 4), layer1=block(4, 6), layer2=block(6, 8))
    return nn.Sequential(OrderedDict(**blocks, fc=head))
"""
EXTRACT = "featstore extract --images photos --store features --backbone net.py:make_model"


class World:
    """Photographs, a model from a file, and a store, below the working directory."""

    def __init__(self, num_images: int = 20) -> None:
        Path("net.py").write_text(MAKE_MODEL)
        photos(Path("photos"), num_images)
        self.model = backbone("net.py:make_model")
        self.view = self.model.view.resized(size=16)
        self.store = FeatureStore("features")
        self.images = ImageSet.from_folder("photos").split(valid=0.2, seed=0)

    def extract(self, *cuts: str, **options: Any) -> None:
        extract(self.model, self.images, self.store, cuts=cuts, view=self.view, **options)

    def learner(self, **options: Any) -> Learner:
        settings = {"view": self.view, "head": "linear", "quiet": True, "device": "cpu", **options}
        return Learner(self.model, self.images, self.store, **settings)

    def key(self, cut: str, reduce: str = "concat", seed: int | None = None) -> str:
        wanted = (cut, reduce, seed)
        (found,) = [
            each.key[:8]
            for each in self.store.sets()
            if (each.facts["cut"], each.spec.reduction, each.spec.rendered.seed) == wanted
        ]
        return found


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.chdir(tmp_path)
    return World()


def command_in(message: str) -> str:
    found = re.search(r"featstore extract .*?(?= - or |; or |\.$)", message)
    assert found is not None, message
    return found[0]


def call_in(message: str) -> str:
    found = re.search(r"extract\(.*?\)(?= - or |; or |\.$)", message)
    assert found is not None, message
    return found[0]


def run_command(message: str) -> str:
    """Runs the command that a message prints; returns it."""
    command = command_in(message)
    assert main(shlex.split(command)[1:]) == 0
    return command


def run_call(message: str, **names: Any) -> str:
    """Runs the Python call that a message prints; returns it."""
    call = call_in(message)
    assert eval(call, {"extract": extract, "Augment": Augment, **names}).computed
    return call


def reads(learn: Learner) -> str | None:
    return learn.read_from


def problem(learn: Learner) -> str:
    """What fit refuses with; printing says the same."""
    with pytest.raises(FeatureStoreError) as caught:
        learn.fit(1, lr=1e-2)
    assert f"nothing can be trained: {caught.value}" in str(learn.inputs)
    return str(caught.value)


# ------------------------------------------------------------------------------------------------- the eight states


def test_words_when_frozen(world: World) -> None:
    world.extract("layer2")
    key = world.key("layer2")
    assert repr(world.learner()) == (
        "Learner: net, linear head at layer2 (concat), 2 classes; 20 images: train 16, valid 4\n"
        "frozen: conv1...layer2; training: head (34 parameters)\n"
        "augmentation: none\n"
        "inputs:\n"
        f"  train: 16 images from features, net@layer2 concat, evaluation view (set {key})\n"
        f"  valid: 4 images from features, net@layer2 concat, evaluation view (set {key})\n"
        "  why: conv1...layer2 are frozen"
    )


def test_words_when_thawed(world: World) -> None:
    world.extract("layer2")
    learn = world.learner()
    learn.unfreeze()
    assert repr(learn) == (
        "Learner: net, linear head at layer2 (concat), 2 classes; 20 images: train 16, valid 4\n"
        "frozen: nothing; training: conv1, layer1, layer2, head (844 parameters)\n"
        "augmentation: none\n"
        "inputs:\n"
        "  train: 16 images from images, evaluation view\n"
        "  valid: 4 images from images, evaluation view\n"
        "  why: nothing is frozen, so every stage trains"
    )


def test_words_when_partly_frozen(world: World) -> None:
    world.extract("conv1:none")
    learn = world.learner()
    learn.freeze_to("layer1")
    key = world.key("conv1", "none")
    assert repr(learn) == (
        "Learner: net, linear head at layer2 (concat), 2 classes; 20 images: train 16, valid 4\n"
        "frozen: conv1...layer1; training: layer2, head (490 parameters)\n"
        "augmentation: none\n"
        "inputs:\n"
        f"  train: 16 images from features, net@conv1 none, evaluation view (set {key})\n"
        f"  valid: 4 images from features, net@conv1 none, evaluation view (set {key})\n"
        "  why: conv1...layer1 are frozen; layer1 runs on the stored activations"
    )


def test_words_when_missing(world: World) -> None:
    assert repr(world.learner()) == (
        "Learner: net, linear head at layer2 (concat), 2 classes; 20 images: train 16, valid 4\n"
        "frozen: conv1...layer2; training: head (34 parameters)\n"
        "augmentation: none\n"
        "inputs:\n"
        "  nothing can be trained: features holds no features yet. Extract them: featstore extract --images photos "
        "--store features --backbone net.py:make_model --cut layer2 --size 16 - or pass --extract (in Python: "
        'on_missing="extract").\n'
        "  why: conv1...layer2 are frozen, so stored features could serve"
    )


def test_words_with_stored_seeds(world: World) -> None:
    world.extract("layer2", augment=Augment("flip", seeds=range(2)))
    seeds = f"{world.key('layer2', seed=0)}, {world.key('layer2', seed=1)}"
    assert repr(world.learner(augment=Augment("flip", seeds=range(2)))) == (
        "Learner: net, linear head at layer2 (concat), 2 classes; 20 images: train 16, valid 4\n"
        "frozen: conv1...layer2; training: head (34 parameters)\n"
        "augmentation: flip, seeds 0-1\n"
        "inputs:\n"
        f"  train: 16 images from features, net@layer2 concat, flip, seeds 0-1 (sets {seeds})\n"
        f"  valid: 4 images from features, net@layer2 concat, evaluation view (set {world.key('layer2')})\n"
        "  why: conv1...layer2 are frozen"
    )


def test_words_with_fresh_seeds(world: World) -> None:
    world.extract("layer2")
    learn = world.learner(augment=Augment("flip", seeds="fresh"))
    assert str(learn.inputs) == (
        "train: 16 images from images, flip, fresh seeds; conv1...layer2 run on them\n"
        f"valid: 4 images from features, net@layer2 concat, evaluation view (set {world.key('layer2')})\n"
        "why: seeds are fresh, new views in each epoch; the frozen conv1...layer2 run on each of them"
    )


def test_words_of_a_loaded_run(world: World) -> None:
    world.extract("layer2")
    learn = world.learner()
    learn.fit(1, lr=1e-2)
    learn.save("runs/head")
    undealt = ImageSet.from_folder("photos")
    assert repr(Learner.load("runs/head", undealt, world.store)) == repr(learn)
    assert str(Learner.load("runs/head", undealt).inputs) == (
        "train: 16 images from images, evaluation view; conv1...layer2 run on them\n"
        "valid: 4 images from images, evaluation view; conv1...layer2 run on them\n"
        "why: there is no store; the frozen conv1...layer2 run in each epoch"
    )


def test_words_without_images(world: World) -> None:
    learn = world.learner(on_missing="images")
    learn.save("runs/head")
    assert repr(Learner.load("runs/head")) == (
        "Learner: net, linear head at layer2 (concat), 2 classes; no images\n"
        "frozen: conv1...layer2; training: head (34 parameters)\n"
        "augmentation: none\n"
        "inputs: none, as no images were given; files can be predicted all the same"
    )


def test_words_when_missing_features_will_be_extracted_or_images_read(world: World) -> None:
    assert str(world.learner(on_missing="extract").inputs) == (
        "first: fit extracts net@layer2 concat, evaluation view, as far as missing\n"
        "why: conv1...layer2 are frozen, so stored features could serve"
    )
    assert not Path("features").exists()
    assert str(world.learner(on_missing="images").inputs) == (
        "train: 16 images from images, evaluation view; conv1...layer2 run on them\n"
        "valid: 4 images from images, evaluation view; conv1...layer2 run on them\n"
        'why: conv1...layer2 are frozen, but features lacks what was asked for, and on_missing is "images"'
    )


# -------------------------------------------------------------------------------------------- 1: rows are missing


def test_rows_missing_are_counted_and_the_command_computes_them(world: World) -> None:
    world.extract("layer2")
    (Path("photos/cat") / "0.png").unlink()
    (Path("photos/cat") / "0.jpg").write_bytes(jpeg(100))
    (Path("photos/dog") / "1.jpg").write_bytes(jpeg(101))
    (Path("photos/dog") / "99.jpg").write_bytes(jpeg(102))
    world.images = ImageSet.from_folder("photos").split(valid=0.2, seed=0)
    learn = world.learner()
    assert problem(learn) == (
        "features holds 18 of the 21 images asked for (net@layer2 concat, evaluation view): 2 are new, 1 changed since "
        "(dog/1.jpg). Nothing was trained. Compute the 3: featstore extract --images photos "
        "--store features --backbone net.py:make_model --cut layer2 --size 16 - or pass --extract (in Python: "
        'on_missing="extract").'
    )
    run_command(problem(learn))
    learn.fit(1, lr=1e-2)
    assert reads(learn) == "features"


def test_on_missing_extract_adds_rows_to_the_set_that_is_there(world: World) -> None:
    world.extract("layer2", dtype="float32")
    (Path("photos/dog") / "99.jpg").write_bytes(jpeg(102))
    world.images = ImageSet.from_folder("photos").split(valid=0.2, seed=0)
    learn = world.learner(on_missing="extract", augment=Augment("flip", seeds=[3]))
    learn.fit(1, lr=1e-2)
    assert reads(learn) == "features"
    assert {each.spec.dtype for each in world.store.sets()} == {"float32"}
    assert [each.index.num_images for each in world.store.sets()] == [21, 17]


def test_missing_rows_of_unreadable_images_are_not_to_be_computed_but_left_out(world: World) -> None:
    world.extract("layer2")
    (Path("photos/dog") / "99.jpg").write_text("no photograph")
    world.images = ImageSet.from_folder("photos").split(valid=0.2, seed=0)
    world.extract("layer2", on_error="skip")
    learn = world.learner()
    assert problem(learn) == (
        "features holds 20 of the 21 images asked for (net@layer2 concat, evaluation view): 1 is unreadable "
        "(dog/99.jpg). Nothing was trained. Repair or remove what can't be read, or leave it out: --on-error skip (in "
        'Python: learn.on_error = "skip").'
    )
    learn.on_error = "skip"
    learn.fit(1, lr=1e-2)
    (Path("photos/dog") / "99.jpg").unlink()
    learn.on_error = "raise"
    text = problem(learn)
    assert (
        "1 is absent (dog/99.jpg). Nothing was trained. Bring back the files that are absent, or leave it out" in text
    )


@pytest.mark.parametrize(
    ("change", "flags"),
    [
        ({"dtype": "float32"}, "--cut layer2 --size 16 --dtype float32"),
        ({"precision": "bf16", "dtype": "bfloat16"}, "--cut layer2 --size 16 --dtype bfloat16 --precision bf16"),
        ({"view": View(size=24, resize=24)}, "--cut layer2 --size 24 --resize 24"),
        ({"view": View(mean=(0.5, 0.25, 0.0), std=(1, 1, 0.5), size=32)}, "--cut layer2 --size 32 --resize 256 --mean"),
        ({"view": View(size=16, resize=18, interpolation="nearest")}, "--size 16 --interpolation nearest"),
        ({"view": View(size=16, resize=18, decode="reduced")}, "--size 16 --decode reduced"),
    ],
)
def test_a_command_has_every_flag_that_is_not_its_default(world: World, change: dict[str, Any], flags: str) -> None:
    world.view = change.get("view", world.view)
    settings = {"cuts": ["layer2"], "view": world.view, **change}
    half = world.images.select(range(0, 20, 2))
    extract(world.model, half, world.store, **settings)
    learn = world.learner()
    command = run_command(problem(learn))
    assert command.startswith(f"{EXTRACT} ")
    assert flags in command
    learn.fit(1, lr=1e-2)


def test_a_command_for_a_table_names_its_columns_and_a_library_backbone_its_weights(world: World) -> None:
    rows = [
        f"{path},{('b', 'a;b')[index % 2]},{('valid', 'train')[index > 4]}"
        for index, path in enumerate(world.images.ids)
    ]
    Path("labels.csv").write_text("\n".join(["file,tags,part", *rows]) + "\n")
    images = ImageSet.from_csv(
        "labels.csv", root="photos", path_column="file", label_column="tags", label_sep=";", split_column="part",
        task="multi",
    )  # fmt: skip
    model = backbone("resnet18", weights="none")
    view = model.view.resized(size=32)
    learn = Learner(model, images, world.store, view=view, cut="layer1", reduce="avg", head="linear", quiet=True)
    command = run_command(problem(learn))
    assert command == (
        "featstore extract --images labels.csv --root photos --path-column file --label-column tags --label-sep ';' "
        "--split-column part --task multi --store features --backbone resnet18 --weights none --cut layer1:avg "
        "--size 32"
    )
    learn.fit(1, lr=1e-2)
    assert reads(learn) == "features"


def test_without_a_name_for_images_or_model_the_remedy_is_the_python_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model, images, store = staged(), arrays(12).split(valid=0.25), FeatureStore("features")
    learn = Learner(model, images, store, head="linear", quiet=True)
    call = run_call(problem(learn), model=model, images=images, store=store)
    assert call == "extract(model, images, store, cuts=['layer2'])"
    learn.fit(1, lr=1e-2)


# ------------------------------------------------------------------------------------------------ 2: facts differ


def test_after_a_stage_was_trained_the_remedy_names_the_new_weights_never_the_old_backbone(world: World) -> None:
    world.extract("layer2")
    learn = world.learner(on_missing="images")
    learn.freeze_to("layer1")
    learn.fit(1, lr=1e-2)
    learn.freeze()
    learn.on_missing = "error"
    text = problem(learn)
    before, after = world.model.digests()["layer2.0"][:8], learn.model.digests()["layer2.0"][:8]
    assert text == (
        f"No stored features fit this request in features. Nearest is set {world.key('layer2')} (20 of 20 images); it "
        f"differs in: weights of stage layer2 (stored {before}, yours {after}; conv1...layer1 are equal). Features at "
        "layer1 would still be valid. Extract for these weights: "
        "extract(learn.model, images, store, cuts=['layer2'], view=view)."
    )
    learn.save("runs/tuned")
    saved = problem(learn)
    assert command_in(saved) == (
        "featstore extract --images photos --store features --backbone runs/tuned --cut layer2"
    )
    run_call(text, learn=learn, images=world.images, store=world.store, view=world.view)
    assert learn.inputs.problem is None
    learn.store = FeatureStore("features2")
    world.store = FeatureStore("features2")
    world.extract("layer2")
    run_command(problem(learn))
    learn.fit(1, lr=1e-2)
    assert reads(learn) == "features"


def test_another_size_reduction_or_model_is_named(world: World) -> None:
    world.extract("layer2")
    key = world.key("layer2")
    nearest = (
        f"No stored features fit this request in features. Nearest is set {key} (20 of 20 images); it differs in: "
    )
    larger = world.learner(view=world.view.resized(size=24))
    assert problem(larger) == (
        f"{nearest}size (stored 16, yours 24); resize (stored 18, yours 27). Extract what you ask for: "
        f"{EXTRACT} --cut layer2 --size 24."
    )
    averaged = world.learner(reduce="avg")
    assert problem(averaged) == (
        f"{nearest}reduction (stored concat, yours avg). Extract what you ask for: {EXTRACT} --cut layer2:avg "
        "--size 16."
    )
    earlier = world.learner(cut="layer1")
    assert problem(earlier) == (
        f"{nearest}cut (stored layer2, yours layer1). Extract for these weights: {EXTRACT} --cut layer1 --size 16."
    )
    for learn in (larger, averaged, earlier):
        run_command(problem(learn))
        learn.fit(1, lr=1e-2)
        assert reads(learn) == "features"


# ------------------------------------------------------------------------------------ 3: augmentation isn't stored


def test_augmentation_that_is_not_stored_is_refused_with_three_ways_out(world: World) -> None:
    world.extract("layer2", augment=Augment("flip", seeds=range(2)))
    evaluation, first, second = (world.key("layer2", seed=seed) for seed in (None, 0, 1))
    learn = world.learner(augment=Augment("flip", seeds=range(4)))
    text = problem(learn)
    assert text == (
        f"You asked for augmentation flip, seeds 0-3; features holds the evaluation view and seeds 0-1 (sets "
        f"{evaluation} and {first}, {second}). Augmentation can't be applied to stored features afterwards. Either add "
        f"the views: {EXTRACT} --cut layer2 --size 16 --augment flip --seeds 2-3; or use --seeds 0-1; or train from "
        "images with --seeds fresh (the trunk then runs every epoch)."
    )
    learn.augment = Augment("flip", seeds=range(2))
    learn.fit(1, lr=1e-2)
    assert reads(learn) == "features"
    learn.augment = Augment("flip", seeds="fresh")
    learn.fit(1, lr=1e-2)
    assert reads(learn) == "images"
    learn.augment = Augment("flip", seeds=range(4))
    run_command(text)
    learn.fit(1, lr=1e-2)
    assert reads(learn) == "features"


def test_a_policy_of_ones_own_is_asked_for_in_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model, images, store = staged(), arrays(12).split(valid=0.25), FeatureStore("features")
    extract(model, images, store, cuts=["layer2"])
    key = store.sets()[0].key[:8]
    learn = Learner(model, images, store, head="linear", augment=Augment(darker, seeds=[5, 6]), quiet=True)
    text = problem(learn)
    assert text == (
        f"You asked for augmentation darker, seeds 5-6; features holds the evaluation view only (set {key}). "
        "Augmentation can't be applied to stored features afterwards. Either add the views: extract(model, images, "
        "store, cuts=['layer2'], augment=Augment(darker, seeds=[5, 6])); or leave the augmentation out; or train from "
        'images with seeds="fresh" (the trunk then runs every epoch).'
    )
    run_call(text, model=model, images=images, store=store, darker=darker)
    learn.fit(1, lr=1e-2)
    assert reads(learn) == "features"


def test_views_of_another_policy_are_named_each_told_from_others_of_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model, images, store = staged(), arrays(12).split(valid=0.25), FeatureStore("features")
    own = Augment(darker, seeds=[0])
    for augment in (own, Augment("side_on", max_zoom=1.1, seeds=[0])):
        extract(model, images, store, cuts=["layer2"], augment=augment)
    learn = Learner(model, images, store, head="linear", augment=Augment("flip", seeds=[0]), quiet=True)
    assert f"and views of {own.policy.describe()}, side_on:max_zoom=1.1. Aug" in problem(learn)
    assert "darker (source " in problem(learn)


# ------------------------------------------------------------------------------------------ 4: too deep, or pooled


def test_features_that_are_too_deep_or_pooled_are_refused_with_three_ways_out(world: World) -> None:
    world.extract("layer2")
    learn = world.learner()
    learn.freeze_to("layer1")
    text = problem(learn)
    assert text == (
        'freeze_to("layer1") trains layer2, so it needs maps at layer1; features holds only layer2, pooled (concat), '
        "which can train the head alone. Extract maps (20 x 6x4x4 float16 = 3,840 bytes): "
        f'{EXTRACT} --cut layer1:none --size 16; or --freeze-to layer2 (in Python: freeze_to("layer2"), or '
        'learn.on_missing = "images").'
    )
    learn.freeze_to("layer2")
    learn.fit(1, lr=1e-2)
    assert reads(learn) == "features"
    learn.freeze_to("layer1")
    learn.on_missing = "images"
    assert str(learn.inputs).startswith("train: 16 images from images")
    learn.on_missing = "error"
    run_command(text)
    learn.fit(1, lr=1e-2)
    assert reads(learn) == "features"


# ----------------------------------------------------------------------------------------------- 5: images not here


def test_absent_images_are_counted_and_both_ways_out_work(world: World) -> None:
    world.extract("layer2")
    images = ImageSet.from_store(world.store)
    assert isinstance(images.source, AbsentSource)
    learn = Learner(world.model, images, world.store, view=world.view, head="linear", quiet=True)
    learn.unfreeze()
    text = problem(learn)
    assert text == (
        f"unfreeze() makes fit read images, and this image set came from a store ({images.source.where}), which has "
        f"none: 16 of 16 files are absent (first: {images.train.ids[0]}). Give their folder with "
        'images.with_root("/new/place") (for a table of images on the command line: --root /new/place), or train what '
        'features can serve: freeze_to("layer2").'
    )
    learn.freeze_to("layer2")
    learn.fit(1, lr=1e-2)
    assert reads(learn) == "features"
    learn.unfreeze()
    Path("photos").rename("moved")
    learn.images = images.with_root("moved")
    learn.fit(1, lr=1e-2)
    assert reads(learn) == "images"


def test_fresh_seeds_without_images_can_be_left_out(world: World) -> None:
    world.extract("layer2")
    images = ImageSet.from_store(world.store)
    learn = Learner(world.model, images, world.store, view=world.view, head="linear", quiet=True)
    learn.augment = Augment("flip", seeds="fresh")
    assert problem(learn).startswith("fresh seeds make fit read images, and this image set came from a store")
    assert problem(learn).endswith("or leave the augmentation out (learn.augment = None).")
    learn.augment = None
    learn.fit(1, lr=1e-2)


# ------------------------------------------------------------------------------------------------ errors in threads


def darker(image: Tensor, generator: torch.Generator) -> Tensor:
    return image // 2


def fails_on_photographs(image: Tensor, generator: torch.Generator) -> Tensor:
    if image.shape[-1] == 24:  # the made-up image that a policy is tried on is larger
        raise RuntimeError("out of film")
    return image


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_in_a_policy_names_image_and_policy(world: World, workers: int) -> None:
    expected = r"^(cat|dog)/\d+\.(jpg|png): the policy fails_on_photographs failed: RuntimeError: out of film$"
    learn = world.learner(augment=Augment(fails_on_photographs, seeds="fresh"), workers=workers)
    assert learn.inputs.problem is None  # with fresh seeds nothing is missing, though nothing is stored
    with pytest.raises(ImageError, match=expected):
        learn.fit(1, lr=1e-2)
    with pytest.raises(ImageError, match=expected):
        world.extract("layer2", augment=Augment(fails_on_photographs, seeds=[0]), workers=workers)


def test_an_image_that_breaks_in_a_reader_thread_is_named(world: World) -> None:
    world.images = ImageSet.from_folder("photos")
    (Path("photos/dog") / "1.jpg").write_text("no photograph")
    learn = world.learner(on_missing="images")
    with pytest.raises(ImageError, match=r"^dog/1\.jpg: "):
        learn.fit(1, lr=1e-2)


def test_the_nearest_set_is_this_backbones_own_also_where_a_strangers_differs_in_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    images, store = arrays(10).split(valid=0.2), FeatureStore("features")
    convolution = torch.nn.Conv2d(3, 4, 3)
    module = torch.nn.Sequential(convolution, torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(784, 3))
    view = View(size=16, resize=16)
    mine = StagedModel.from_module(module, view=view)
    stranger = StagedModel.from_module(torch.nn.Sequential(convolution, torch.nn.Tanh()), view=view, name="other")
    own = extract(mine, images.select(range(8)), store, cuts=["1"])
    extract(stranger, images, store, cuts=["1"])  # holds more of the images
    with torch.no_grad():
        convolution.weight.add_(0.1)
    said = str(Learner(mine, images, store, cut="1", head="linear", quiet=True).inputs)
    assert f"Nearest is set {own.keys[0][:8]} (8 of 10 images); it differs in: weights of stage 0 (stored" in said
