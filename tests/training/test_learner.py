"""A Learner changes nothing but its own model, and what it saves is what it was.

Long, since what a Learner does is told in the order in which a person does it, on the same few learners.
"""

from __future__ import annotations

import csv
import inspect
import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.tiny import VIEW, Net, arrays, net, photos, pixels, staged, staged_vision_transformer
from torch import Tensor, nn

from featstore import Augment, FeatureStore, ImageSet, StagedModel, backbone, extract
from featstore.digest import digest_json
from featstore.errors import DamagedFileError, FeatureStoreError
from training import FitOptions, Learner, build_head, finetune, train_head
from training.scores.metrics import accuracy

State = dict[str, tuple[Tensor, bool, bool]]


def state(model: nn.Module) -> State:
    """Name -> a copy of each tensor, whether it gets a gradient, and its module's training flag."""
    found: State = {}
    for path, module in model.named_modules():
        own = [*module.named_parameters(path, recurse=False), *module.named_buffers(path, recurse=False)]
        found |= {name: (tensor.clone(), tensor.requires_grad, module.training) for name, tensor in own}
    return found


def assert_same(before: State, after: State) -> None:
    assert before.keys() == after.keys()
    for name, (tensor, *flags) in before.items():
        assert torch.equal(tensor, after[name][0]), name
        assert flags == list(after[name][1:]), name


def moved(before: dict[str, Tensor], model: StagedModel) -> set[str]:
    return {name for name, tensor in model.tensors().items() if not torch.equal(tensor, before[name])}


def copies(model: StagedModel) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.tensors().items()}


def learner(model: StagedModel | nn.Module | None = None, images: ImageSet | None = None, **options: Any) -> Learner:
    chosen = arrays(12).split(valid=0.25) if images is None else images
    return Learner(model or staged(), chosen, **{"head": "linear", "quiet": True, "batch_size": 4, **options})


@pytest.fixture
def features(tmp_path: Path) -> FeatureStore:
    store = FeatureStore(tmp_path / "features")
    extract(staged(), arrays(12).split(valid=0.25), store, cuts=["layer2"], dtype="float32")
    return store


MAKE_NET = """
import torch
from torch import nn


def make_model():
    layers = [nn.Conv2d(3, 6, 3, stride=2), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
"""


@pytest.fixture
def own_file(tmp_path: Path) -> Path:
    path = tmp_path / "mynet.py"
    path.write_text(MAKE_NET)
    return path


# ------------------------------------------------------------------------------------------- the caller's model


def test_the_callers_model_is_never_changed(tmp_path: Path) -> None:
    module = net()
    module.layer2.train()  # also what its owner set strangely
    module.layer1[0].weight.requires_grad_(False)
    model = StagedModel.from_module(module, view=VIEW, name="net")
    before, flags = state(module), model.training
    learn = learner(model)
    learn.fit(1, lr=1e-2)
    learn.freeze_to("layer1")
    learn.lr_find()
    learn.fit(1, lr=1e-2)
    learn.unfreeze()
    learn.fit(1, lr=1e-2)
    learn.save(tmp_path / "run")
    Learner.load(tmp_path / "run", module=model, quiet=True).predict(arrays(3))
    assert_same(before, state(module))
    assert (model.training, model.num_frozen) == (flags, 0)


def test_folds_share_one_backbone_and_thawing_copies_only_what_thaws() -> None:
    model = staged()
    first, second = (learner(model, fold, device="cpu") for fold in arrays(12).folds(2))
    own = {name: tensor.data_ptr() for name, tensor in model.tensors().items()}

    def shared(learn: Learner) -> set[str]:
        return {name for name, tensor in learn.model.tensors().items() if own.get(name) == tensor.data_ptr()}

    trunk = {name for name in own if not name.startswith("fc")}
    assert shared(first) == shared(second) == trunk
    first.freeze_to("layer1")
    assert shared(first) == {name for name in trunk if name.startswith("layer1")}
    assert shared(second) == trunk


def test_fitting_leaves_the_global_random_state_as_it_was(features: FeatureStore) -> None:
    before = torch.get_rng_state()
    learn = learner(store=features)
    learn.fit(2)
    learn.evaluate()
    assert torch.equal(torch.get_rng_state(), before)


def test_an_images_list_of_metrics_given_by_the_caller_is_left_alone() -> None:
    metrics = [worst_logit]
    learner(metrics=metrics).fit(1, lr=1e-2)
    assert metrics == [worst_logit]


# ----------------------------------------------------------------------------------------------- frozen and thawed


def test_a_frozen_epoch_moves_the_head_and_nothing_else_not_even_statistics(features: FeatureStore) -> None:
    for store in (features, None):
        learn = learner(store=store)
        before = copies(learn.model)
        learn.fit(1, lr=1e-2)
        statistics = {"head.mean", "head.scale", "head.num_rows"}  # of a linear head, taken before the first step
        assert moved(before, learn.model) == {"head.weight", "head.bias", *statistics}
        before = copies(learn.model)
        learn.fit(1, lr=1e-2)
        assert moved(before, learn.model) == {"head.weight", "head.bias"}


def test_one_unfreeze_makes_the_first_stage_move(features: FeatureStore) -> None:
    learn = learner(store=features)
    learn.fit(1, lr=1e-2)
    learn.unfreeze()
    before = copies(learn.model)
    learn.fit(1, lr=1e-2)
    assert learn.read_from == "images"
    assert {"layer1.0.weight", "layer1.1.running_mean", "layer2.0.weight", "head.weight"} <= moved(before, learn.model)


def test_freezing_to_a_cut_trains_what_follows_and_only_that(tmp_path: Path) -> None:
    learn = learner()
    learn.freeze_to("layer1")
    before = copies(learn.model)
    learn.fit(1, lr=1e-2)
    assert {name.partition(".")[0] for name in moved(before, learn.model)} == {"layer2", "head"}


def test_a_group_number_as_in_fastai_is_answered_with_a_name() -> None:
    with pytest.raises(TypeError, match="freeze_to"):
        learner().freeze_to(2)  # type: ignore[arg-type]


@pytest.mark.parametrize("lr", [1e-2, [1e-3, 1e-2], (1e-5, 1e-4, 1e-2)])
def test_rates_for_body_and_head_are_accepted_while_only_the_head_trains(features: FeatureStore, lr: Any) -> None:
    alone, with_body = learner(store=features), learner(store=features)
    alone.fit(2, lr=1e-2)
    assert with_body.fit(2, lr=lr).losses == alone.history.losses  # the head's rate is the last


def test_a_number_of_rates_that_fits_no_groups_is_refused() -> None:
    with pytest.raises(ValueError, match="4 rates"):
        learner().fit(1, lr=(1e-5, 1e-4, 1e-3, 1e-2))


def test_with_everything_frozen_there_is_nothing_to_train() -> None:
    with pytest.raises(ValueError, match="nothing to train"):
        learner(images=ImageSet.from_arrays(pixels(6), [0, 1, 2] * 2), head="keep", cut="fc").fit(1, lr=1e-2)


# --------------------------------------------------------------------------------------------- options and attributes


def test_an_unknown_option_is_an_error() -> None:
    with pytest.raises(TypeError, match="bs"):
        learner(bs=3)


def test_an_unknown_attribute_is_an_error_and_precompute_gets_an_answer() -> None:
    learn = learner()
    with pytest.raises(AttributeError, match=r"no attribute 'bs'. Its attributes are allow_leak, augment, batch_size"):
        learn.bs = 3
    with pytest.raises(AttributeError, match="There is no precompute mode"):
        learn.precompute = True
    with pytest.raises(AttributeError):
        learn.inputs = None  # type: ignore[misc, assignment]
    fixed = learner(staged_vision_transformer(), cut=None)
    with pytest.raises(ValueError, match="takes images of 24 pixels only, not 32"):
        fixed.view = fixed.view.resized(size=32)
    with pytest.raises(TypeError, match="decay_norms is 'false'; expected True or False"):
        learn.fit(1, lr=1e-2, decay_norms="false")  # type: ignore[arg-type]
    learn.batch_size = 3
    learn.fit(1, lr=1e-2)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("on_missing", "guess", "on_missing is 'guess'; expected error, images or extract"),
        ("on_error", "ignore", "on_error is 'ignore'; expected raise or skip"),
        ("batch_size", 0, "batch_size is 0; expected at least 1"),
        ("batch_size", None, "batch_size is None; expected a number of images"),
        ("batch_size", True, "batch_size is True; expected a number of images"),
        ("seed", -1, "seed is -1; expected at least 0"),
        ("seed", 1.5, r"seed is 1\.5; expected a whole number"),
        ("seed", "a", "seed is 'a'; expected a whole number"),
        ("seed", 2**63, "seed is 9223372036854775808; expected at most 9223372036854775807"),
        ("workers", -1, "workers is -1; expected at least 0"),
        ("workers", "2", "workers is '2'; expected a number of threads, or None"),
        ("optimizer", 3, "optimizer is 3; expected adamw, adam, sgd, or a function"),
        ("view", None, r"view is None; expected a view, model\.view"),
        ("classes", ("1", "0"), "classes is fixed when a Learner is made"),
        ("task", "multi", "task is fixed"),
        ("device", "cpu", "device is fixed"),
    ],
)
def test_an_attribute_that_is_set_later_is_checked(name: str, value: Any, message: str) -> None:
    learn = learner()
    before = getattr(learn, name)
    with pytest.raises((AttributeError, TypeError, ValueError), match=message):
        setattr(learn, name, value)
    assert getattr(learn, name) == before


def test_a_view_that_is_set_later_is_the_evaluation_view() -> None:
    learn = learner()
    learn.view = VIEW.with_seed("flip", 3)
    assert learn.view == VIEW


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"on_missing": "guess"}, "expected error, images or extract"),
        ({"on_error": "ignore"}, "expected raise or skip"),
        ({"cut": "layer9"}, "layer9"),
        ({"head": "huge"}, "huge"),
        ({"reduce": "token"}, "token"),
        ({"optimizer": "lion"}, "adamw, adam, sgd"),
        ({"device": "tpu"}, "tpu"),
        ({"metrics": [min, min]}, "Two metrics are called min"),
        ({"metrics": "accuracy"}, "metrics is 'accuracy'; expected functions"),
        ({"metrics": ["accuracy"]}, "metrics has 'accuracy'; expected functions"),
        ({"metrics": min}, "metrics is <built-in function min>; expected functions"),
        ({"loss": "ce"}, "loss is 'ce'; expected a function of"),
        ({"seed": -1}, "seed is -1; expected at least 0"),
        ({"workers": -1}, "workers is -1; expected at least 0"),
    ],
)
def test_a_wrong_value_gets_a_sentence(options: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        learner(**options).fit(1, lr=1e-2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"epochs": 2.5}, r"epochs is 2\.5; expected a number of epochs"),
        ({"epochs": "3"}, "epochs is '3'; expected a number of epochs"),
        ({"epochs": True}, "epochs is True; expected a number of epochs"),
        ({"epochs": 0}, "epochs is 0; expected at least 1"),
        ({"epochs": 10**20}, "epochs is 100000000000000000000; expected at most 1000000"),
        ({"weight_decay": "x"}, "weight_decay is 'x'; expected a number"),
        ({"weight_decay": -1}, "weight_decay is -1; expected at least 0"),
        ({"weight_decay": float("nan")}, "weight_decay is nan; expected at least 0, and finite"),
        ({"on_epoch_end": 3}, "on_epoch_end is 3; expected a function"),
    ],
)
@pytest.mark.parametrize("lr", [1e-3, None])
def test_what_a_fit_cannot_use_is_said_before_anything_is_computed(
    arguments: dict[str, Any], message: str, lr: float | None
) -> None:
    learn = learner()
    before = copies(learn.model)
    with pytest.raises((TypeError, ValueError), match=message):
        learn.fit(**{"epochs": 1, "lr": lr, **arguments})
    assert not moved(before, learn.model)
    assert learn.read_from is None
    if "weight_decay" in arguments:
        with pytest.raises((TypeError, ValueError), match=message):
            learn.lr_find(**arguments)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("shedule", "A fit has no option 'shedule'. Did you mean schedule?"),
        ("use_clr", "A fit has no option 'use_clr'. Its"),
    ],
)
def test_an_option_that_a_fit_lacks_is_refused(option: str, message: str) -> None:
    learn = learner()
    options: Any = {option: True}
    for call in (partial(learn.fit, 1), partial(learn.fit_cycles, 1), learn.lr_find):
        with pytest.raises(TypeError, match=re.escape(message)):
            call(**options)


def test_a_fit_shows_its_options_with_their_defaults() -> None:
    for method, schedule in (
        (Learner.fit, "one_cycle"),
        (Learner.fit_cycles, "cosine"),
        (Learner.lr_find, "one_cycle"),
    ):
        shown = inspect.signature(method).parameters
        assert [*shown][-len(FitOptions.__annotations__) :] == [*FitOptions.__annotations__]
        assert (shown["schedule"].default, shown["schedule"].annotation) == (schedule, "str")


def test_numbers_of_numpy_are_numbers(tmp_path: Path) -> None:
    weight_decay: Any = np.float32(0.01)
    epochs: Any = np.int64(1)
    learn = learner(seed=np.int64(1), batch_size=np.int32(4), workers=np.int64(0))
    learn.fit(epochs, lr=1e-3, weight_decay=weight_decay, checkpoint=tmp_path / "fit")
    learn.save(tmp_path / "run")


@pytest.mark.parametrize("name", ["valid_loss", "loss", "images", "epoch", "lr", "seconds", "train_loss", "accuracy"])
def test_a_metric_replaces_no_other_number_on_record(name: str) -> None:
    def mine(logits: Tensor, targets: Tensor) -> float:
        return 0.0

    mine.__name__ = name
    with pytest.raises(ValueError, match=f"A metric is called {name}, as another number on record is"):
        learner(metrics=[mine])


def test_the_tasks_own_metric_may_be_asked_for() -> None:
    assert learner(metrics=[accuracy]).evaluate("train").keys() == learner().evaluate("train").keys()


def test_scores_are_of_what_the_model_said_whatever_a_loss_or_a_metric_writes_into_it() -> None:
    def spoils(logits: Tensor, targets: Tensor) -> float:
        logits.zero_()
        targets.zero_()
        return 0.5

    def own_loss(logits: Tensor, targets: Tensor) -> Tensor:
        value = nn.functional.cross_entropy(logits, targets)
        if not logits.requires_grad:
            spoils(logits, targets)
        return value

    plain, spoilt = learner(), learner(loss=own_loss, metrics=[spoils])
    for learn in (plain, spoilt):
        learn.lr_find()
        learn.fit(3, lr=1e-2)
    assert spoilt.lr_find().suggestion == plain.lr_find().suggestion
    assert {**spoilt.history.last, "seconds": 0} == {**plain.history.last, "seconds": 0, "spoils": 0.5}
    assert spoilt.evaluate("train") == {**plain.evaluate("train"), "spoils": 0.5}


@pytest.mark.parametrize("value", ["0.5", None, torch.zeros(2)])
def test_a_metric_that_gives_no_number_is_named(value: Any) -> None:
    def mine(logits: Tensor, targets: Tensor) -> Any:
        return value

    learn = learner(metrics=[mine])
    for score in (learn.evaluate, lambda: learn.fit(1, lr=1e-3)):
        with pytest.raises(TypeError, match=r"The metric mine gave .*; expected one number"):
            score()


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda logits, targets: logits.sum(1), r"The loss gave a tensor of shape \(4,\); expected a tensor of one"),
        (lambda logits, targets: 0.5, r"The loss gave 0\.5; expected a tensor of one number, for 4 rows"),
        (lambda logits, targets: logits.sum().detach(), "The loss gave a number without a gradient"),
    ],
)
@pytest.mark.parametrize("lr", [1e-3, None])
def test_a_loss_that_cannot_be_learnt_by_is_said(loss: Any, message: str, lr: float | None) -> None:
    learn = learner(loss=loss, images=arrays(12).split(valid=1 / 3))
    with pytest.raises(TypeError, match=message):
        learn.fit(1, lr=lr)


def test_images_of_other_classes_are_refused_and_of_the_same_ones_taken() -> None:
    learn = learner()
    more = arrays(20, seed=3).split(valid=0.5)
    learn.images = more
    learn.fit(1, lr=1e-2)
    assert learn.evaluate()["images"] == 10
    with pytest.raises(ValueError, match="Make a new Learner"):
        learn.images = ImageSet.from_arrays(pixels(4), ["x", "y", "z", "x"])
    assert learn.images is more


# ------------------------------------------------------------------------------------------------- heads and tasks


def worst_logit(logits: Tensor, targets: Tensor) -> float:
    return float(logits.min())


def test_a_head_of_ones_own_gets_the_pooled_activations_and_is_copied() -> None:
    head = nn.Sequential(nn.Linear(24, 5), nn.Tanh(), nn.Linear(5, 2))
    before = state(head)
    learn = learner(head=head)
    assert learn.head_name == "module"
    learn.fit(1, lr=1e-2)
    assert_same(before, state(head))
    maps = learner(head=nn.Sequential(nn.Conv2d(12, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()), reduce="none")
    maps.fit(1, lr=1e-2)
    assert maps.evaluate()["images"] == 4


def test_keep_trains_the_models_own_head_and_comes_back_frozen_where_it_was(tmp_path: Path, own_file: Path) -> None:
    model = backbone(f"{own_file}:make_model")
    images = ImageSet.from_arrays(pixels(8), [0, 1, 2, 3] * 2).split(valid=0.5)
    learn = learner(model, images, head="keep", cut="4", view=VIEW)
    before = copies(learn.model)
    learn.fit(1, lr=1e-2)
    assert moved(before, learn.model) == {"7.weight", "7.bias"}
    learn.freeze_to("2")
    learn.save(tmp_path / "run")
    loaded = Learner.load(tmp_path / "run", images, quiet=True)
    assert (loaded.cut, loaded.model.num_frozen) == ("4", learn.model.num_frozen)
    loaded.freeze()
    assert loaded.model.num_frozen == learner(model, images, head="keep", cut="4", view=VIEW).model.num_frozen
    np.testing.assert_array_equal(loaded.predict_proba(images), learn.predict_proba(images))


def test_losses_and_metrics_of_ones_own_are_used_and_named() -> None:
    def doubled(logits: Tensor, targets: Tensor) -> Tensor:
        return 2 * nn.functional.cross_entropy(logits, targets)

    plain, own = learner(), learner(loss=doubled, metrics=[worst_logit])
    records: list[dict[str, float]] = []
    own.fit(1, lr=1e-2, on_epoch_end=records.append)
    plain.fit(1, lr=1e-2)
    assert own.history.losses[0] == 2 * plain.history.losses[0]
    assert records[0]["worst_logit"] < 0
    assert own.evaluate().keys() == {"loss", "accuracy", "f1", "worst_logit", "calibration_error", "images"}


def test_several_labels_an_image(tmp_path: Path) -> None:
    labels = [["a"], ["a", "b"], [], ["b", "c"], ["c"], ["a"], ["b"], ["a", "c"]]
    images = ImageSet.from_arrays(pixels(8), labels, task="multi").split(valid=0.25)
    learn = learner(images=images)
    learn.fit(1, lr=1e-2)
    scored = learn.evaluate("train")
    assert scored.keys() == {"loss", "map", "f1", "images"}
    logits = torch.logit(torch.from_numpy(learn.predict_proba(images.train)))
    targets = torch.tensor(images.train.targets)
    expected = nn.functional.binary_cross_entropy_with_logits(logits.float(), targets)
    assert scored["loss"] == pytest.approx(float(expected), rel=1e-5)
    learn.save(tmp_path / "run")
    assert Learner.load(tmp_path / "run", module=staged(), quiet=True).task == "multi"


def test_json_stays_legal_where_a_score_is_not_a_number(tmp_path: Path) -> None:
    images = ImageSet.from_arrays(pixels(6), [["a"], ["b"], ["a"], ["b"], [], []], task="multi")
    learn = learner(images=images.with_splits(["train"] * 4 + ["valid"] * 2))
    learn.fit(1, lr=1e-2)
    learn.save(tmp_path / "run")

    def refuse(word: str) -> None:
        raise AssertionError(word)

    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text(), parse_constant=refuse)
    assert metrics["valid"]["map"] is None
    for name in ("model.json", "run.json"):
        json.loads((tmp_path / "run" / name).read_text(), parse_constant=refuse)


# ----------------------------------------------------------------------------------------------------- save and load


def test_a_round_trip_gives_equal_predictions_bit_for_bit(tmp_path: Path, own_file: Path) -> None:
    model = backbone(f"{own_file}:make_model")
    learn = learner(model, view=VIEW, head="concat")
    learn.unfreeze()
    learn.fit(2, lr=1e-2)
    learn.save(tmp_path / "run")
    loaded = Learner.load(tmp_path / "run", quiet=True, batch_size=4)
    images = arrays(9, seed=5)
    np.testing.assert_array_equal(loaded.predict_proba(images), learn.predict_proba(images))
    assert loaded.predict(images) == learn.predict(images)
    assert (loaded.classes, loaded.view, loaded.cut) == (learn.classes, learn.view, learn.cut)
    assert loaded.model.digests() == learn.model.digests()


def test_saved_on_features_it_goes_on_with_images_and_the_other_way_round(
    tmp_path: Path, features: FeatureStore
) -> None:
    images = arrays(12).split(valid=0.25)
    learn = learner(store=features)
    learn.fit(1, lr=1e-2)
    assert learn.read_from == "features"
    learn.save(tmp_path / "head")
    tuned = finetune(tmp_path / "head", images, epochs=1, lr=1e-3, module=staged(), quiet=True, out=tmp_path / "tuned")
    assert tuned.read_from == "images"
    assert "layer1.0.weight" in moved(copies(learn.model), tuned.model)

    live = learner()
    live.fit(1, lr=1e-2)
    live.save(tmp_path / "live")
    again = Learner.load(tmp_path / "live", images, features, module=staged(), quiet=True)
    again.fit(1, lr=1e-2)
    assert again.read_from == "features"


def test_a_resume_does_not_refreeze_what_was_unfrozen(tmp_path: Path) -> None:
    learn = learner()
    frozen: list[Callable[[], None]] = [learn.freeze, lambda: learn.freeze_to("layer1"), learn.unfreeze]
    for number, change in enumerate(frozen):
        change()
        learn.save(tmp_path / str(number))
        loaded = Learner.load(tmp_path / str(number), learn.images, module=staged(), quiet=True)
        assert loaded.model.num_frozen == learn.model.num_frozen
        names = [name for name, _ in learn.model.named_parameters()]
        trained = {id(parameter) for parameter in loaded.model.trained_parameters()}
        own = {id(parameter) for parameter in learn.model.trained_parameters()}
        expected = [id(parameter) in own for parameter in learn.model.parameters()]
        assert dict(zip(names, expected, strict=True)) == {
            name: id(parameter) in trained for name, parameter in loaded.model.named_parameters()
        }


def test_no_pass_over_the_images_is_made_twice_by_later_fits_or_after_a_load(tmp_path: Path) -> None:
    images = ImageSet.from_arrays(pixels(6), list(range(6)))  # a target is a row
    passes: list[list[int]] = []

    def noted(logits: Tensor, targets: Tensor) -> Tensor:
        if logits.requires_grad:
            passes.append(targets.tolist())
        return nn.functional.cross_entropy(logits, targets)

    learn = learner(images=images, loss=noted, batch_size=6)
    learn.fit(2, lr=1e-3)  # a linear head makes four passes an epoch
    learn.unfreeze()
    learn.fit(3, lr=1e-3)
    learn.save(tmp_path / "run")
    loaded = Learner.load(tmp_path / "run", images, module=staged(), loss=noted, batch_size=6, quiet=True)
    loaded.fit(1, lr=1e-3)
    orders = [np.random.default_rng([0, number, 0]).permutation(6).tolist() for number in range(12)]
    assert passes == orders


@pytest.mark.parametrize("head", ["linear", "concat", "mlp"])
@pytest.mark.parametrize("seeds", ["fresh", (0, 1, 2)])
def test_a_saved_run_goes_on_as_the_learner_would_have(tmp_path: Path, head: str, seeds: Any) -> None:
    options: dict[str, Any] = {"augment": Augment("random_resized_crop", seeds=seeds), "batch_size": 4, "workers": 0}
    learn = learner(head=head, **options)
    learn.fit(2, lr=1e-2)
    learn.save(tmp_path / "run")
    loaded = Learner.load(tmp_path / "run", learn.images, module=staged(), quiet=True, **options)
    for each in (learn, loaded):
        each.freeze_to("layer1")
        each.fit(2, lr=1e-3)
    assert loaded.history.losses == learn.history.losses[-len(loaded.history.losses) :]
    assert all(torch.equal(value, loaded.model.tensors()[name]) for name, value in learn.model.tensors().items())


def test_a_run_that_does_not_tell_its_passes_goes_on_after_its_epochs(tmp_path: Path) -> None:
    folder = Path(__file__).parents[1] / "data" / "run-0.1.0"
    learn = Learner.load(folder, module=staged(), quiet=True)
    learn.save(tmp_path / "run")
    assert json.loads((folder / "run.json").read_text())["epochs"] == 3
    assert json.loads((tmp_path / "run" / "model.json").read_text())["passes"] == 3


def test_what_was_saved_is_what_evaluate_says(tmp_path: Path, features: FeatureStore) -> None:
    learn = learner(store=features)
    learn.fit(2, lr=1e-2)
    run = learn.save(tmp_path / "run")
    metrics = json.loads((run / "metrics.json").read_text())["valid"]
    assert metrics == learn.evaluate("valid")
    loaded = Learner.load(run, arrays(12), features, module=staged(), quiet=True)  # not dealt: it gets the run's split
    assert loaded.evaluate("valid") == metrics
    with (run / "valid_predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["image"] for row in rows] == list(learn.images.valid.ids)
    values = learn.predict_proba(learn.images.valid)
    for row, expected in zip(rows, values, strict=True):
        assert [row[name] for name in learn.classes] == [f"{value:.6f}" for value in expected]
        assert row["label"] == learn.classes[int(expected.argmax())]
        assert row["probability"] == f"{expected.max():.6f}"
    with (run / "history.csv").open() as file:
        history = list(csv.DictReader(file))
    assert [float(row["train_loss"]) for row in history] == [each["train_loss"] for each in learn.history.records]
    about = json.loads((run / "run.json").read_text())
    assert about["inputs"].startswith("train: 8 images from features, net@layer2 concat")
    assert sorted(path.name for path in run.iterdir()) == [
        "history.csv", "metrics.json", "model.json", "model.safetensors", "run.json", "split.npz",
        "valid_predictions.csv",
    ]  # fmt: skip


def test_a_history_with_and_without_validation_is_one_table(tmp_path: Path) -> None:
    learn = learner(images=arrays(12))
    learn.fit(1, lr=1e-2)
    learn.images = arrays(12).split(valid=0.25)
    learn.fit(1, lr=1e-2)
    run = learn.save(tmp_path / "run")
    with (run / "history.csv").open() as file:
        first, second = csv.DictReader(file)
    assert (first["valid_loss"], float(second["valid_loss"])) == ("nan", learn.history.last["valid_loss"])


def test_saving_does_not_change_what_the_fit_read_from(tmp_path: Path, features: FeatureStore) -> None:
    learn = learner(store=features, augment=Augment("flip", seeds="fresh"))
    learn.fit(1, lr=1e-2)
    learn.save(tmp_path / "run")  # scores the validation images, which are stored
    assert learn.read_from == "images"


def test_a_run_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    class Breaks:
        __name__ = "breaks"
        is_broken = False

        def __call__(self, logits: Tensor, targets: Tensor) -> float:
            if self.is_broken:
                raise RuntimeError("full")
            return 0.0

    metric = Breaks()
    learn = learner(metrics=[metric])
    learn.fit(1, lr=1e-2)
    metric.is_broken = True
    with pytest.raises(RuntimeError, match="full"):
        learn.save(tmp_path / "runs" / "a")
    assert list((tmp_path / "runs").iterdir()) == []
    metric.is_broken = False
    learn.save(tmp_path / "runs" / "a")
    content = (tmp_path / "runs" / "a" / "run.json").read_bytes()
    metric.is_broken = True
    with pytest.raises(RuntimeError, match="full"):
        learn.save(tmp_path / "runs" / "a", overwrite=True)
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["a"]
    assert (tmp_path / "runs" / "a" / "run.json").read_bytes() == content


def test_a_run_is_replaced_only_when_that_is_said_and_before_any_work(tmp_path: Path, features: FeatureStore) -> None:
    images = arrays(12).split(valid=0.25)
    options: dict[str, Any] = {"epochs": 1, "lr": 1e-2, "head": "linear", "quiet": True, "out": tmp_path / "run"}
    train_head(staged(), images, features, **options)
    with pytest.raises(FeatureStoreError, match="--overwrite"):
        train_head(staged(), images, features, on_missing="extract", cut="layer1", **options)
    assert len(features.sets()) == 1  # nothing was extracted
    train_head(staged(), images, features, overwrite=True, **options)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    with pytest.raises(FeatureStoreError, match="is no saved run"):
        train_head(staged(), images, features, overwrite=True, **{**options, "out": tmp_path / "mine"})


def test_a_damaged_or_missing_run_is_refused(tmp_path: Path) -> None:
    run = learner().save(tmp_path / "run")
    content = (run / "model.safetensors").read_bytes()
    (run / "model.safetensors").write_bytes(content[:-8] + bytes(8))
    with pytest.raises(DamagedFileError, match=r"model\.safetensors"):
        Learner.load(run, module=staged())
    (run / "model.safetensors").unlink()
    with pytest.raises(DamagedFileError, match=r"model\.safetensors"):
        Learner.load(run, module=staged())
    with pytest.raises(FeatureStoreError, match="is no saved run"):
        Learner.load(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("classes", None),
        ("classes", 3),
        ("task", "both"),
        ("head", None),
        ("head.name", None),
        ("model", None),
        ("model.view", None),
        ("model.view", {}),
        ("model.cut", 2),
        ("model.architecture", {"function": "make_model", "source": {}}),
        ("model.digests", []),
        ("model.stages", [{}]),
        ("model.frozen", 1),
        ("model.is_absent", None),
    ],
)
def test_a_run_without_a_fact_is_damaged_by_name_though_its_checksum_is_right(
    tmp_path: Path, name: str, value: Any
) -> None:
    learner().save(tmp_path / "run")
    path = tmp_path / "run" / "model.json"
    facts = json.loads(path.read_text())
    *above, last = name.split(".")
    place = facts[above[0]] if above else facts
    place.pop(last)
    if value is not None:
        place[last] = value
    facts.pop("checksum")
    path.write_text(json.dumps({**facts, "checksum": digest_json(facts)}))
    with pytest.raises(DamagedFileError, match=rf"model\.json (lacks|has .* as) the fact {name}.*Restore the file"):
        Learner.load(tmp_path / "run", module=staged(), quiet=True)


def test_a_run_whose_source_file_has_changed_is_refused(tmp_path: Path, own_file: Path) -> None:
    run = learner(backbone(f"{own_file}:make_model"), view=VIEW).save(tmp_path / "run")
    own_file.write_text(MAKE_NET.replace("import torch\n", "import torch  # the same program\n"))
    Learner.load(run, quiet=True)
    own_file.write_text(MAKE_NET.replace("nn.ReLU()]", "nn.GELU()]"))
    with pytest.raises(FeatureStoreError, match="has changed since the run was saved"):
        Learner.load(run, quiet=True)


def test_a_model_or_head_without_a_name_has_to_be_given(tmp_path: Path) -> None:
    head = nn.Linear(24, 2)
    run = learner(head=head).save(tmp_path / "run")
    with pytest.raises(FeatureStoreError, match=r"module=\.\.\."):
        Learner.load(run)
    with pytest.raises(FeatureStoreError, match=r"head=\.\.\."):
        Learner.load(run, module=staged())
    named = learner(head="linear").save(tmp_path / "named")
    with pytest.raises(
        ValueError, match=r"The head of .*named is linear, and head is for a run whose head was a module"
    ):
        Learner.load(named, module=staged(), head=nn.Linear(24, 2))
    with pytest.raises(ValueError, match=r"The run .*named brings its cut and its view\. Leave that out"):
        Learner.load(named, module=staged(), view=VIEW, cut="layer2")
    loaded = Learner.load(run, module=net(), head=nn.Linear(24, 2), quiet=True)  # tensors come from the run
    with pytest.raises(FeatureStoreError):
        Learner.load(run, module=Net(stride=1), head=head)
    assert torch.equal(loaded.model.tensors()["head.weight"].cpu(), head.weight)


def test_a_head_of_ones_own_with_other_code_is_refused(tmp_path: Path) -> None:
    def head(activation: nn.Module) -> nn.Sequential:
        return nn.Sequential(nn.Linear(24, 5), activation, nn.Dropout(0.3), nn.Linear(5, 2))

    learn = learner(head=head(nn.ReLU()))
    learn.fit(1, lr=1e-2)
    run = learn.save(tmp_path / "run")
    again = Learner.load(run, module=staged(), head=head(nn.ReLU()), quiet=True, batch_size=4)
    np.testing.assert_array_equal(again.predict_proba(arrays(5)), learn.predict_proba(arrays(5)))
    with pytest.raises(FeatureStoreError, match=f"The head given for {run} computes something else"):
        Learner.load(run, module=staged(), head=head(nn.Tanh()), quiet=True)


def test_a_run_loaded_into_a_named_model_does_not_pass_for_that_model(tmp_path: Path, own_file: Path) -> None:
    name = f"{own_file}:make_model"
    images = ImageSet.from_folder(photos(tmp_path / "photos", 12)).split(valid=0.25)
    learn = learner(backbone(name), images, view=VIEW)
    learn.unfreeze()
    learn.fit(1, lr=1e-2)
    run = learn.save(tmp_path / "run")
    store = FeatureStore(tmp_path / "features")
    loaded = Learner.load(run, images, store, module=backbone(name), quiet=True)
    loaded.freeze()
    assert str(loaded.inputs.problem).count("extract(learn.model, images, store") == 1
    by_name = Learner.load(run, images, store, quiet=True)
    by_name.freeze()
    assert f"--backbone {run}" in str(by_name.inputs.problem)


# ------------------------------------------------------------------------------------------------ classes and splits


def test_labels_count_in_the_runs_class_table_whatever_classes_the_images_have(tmp_path: Path) -> None:
    labels = ["a", "b", "c"] * 4
    images = ImageSet.from_arrays(pixels(12), labels).with_splits(["train"] * 9 + ["valid"] * 3)
    learn = learner(images=images)
    learn.fit(3, lr=1e-2)
    run = learn.save(tmp_path / "run")
    only = images.select([1, 2, 4, 5, 10, 11])
    without_a = ImageSet.from_arrays(pixels(12)[[1, 2, 4, 5, 10, 11]], ["b", "c"] * 3, splits=only.splits.tolist())
    loaded = Learner.load(run, without_a, module=staged(), quiet=True)
    assert loaded.images.targets is not None
    assert loaded.images.targets.tolist() == [1, 2, 1, 2, 1, 2]
    expected = learner(images=only, head=build_head("linear", 24, 3))
    expected.model.load_tensors(learn.model.tensors())
    assert loaded.evaluate("valid") == expected.evaluate("valid")
    with pytest.raises(FeatureStoreError, match="the class d"):
        Learner.load(run, ImageSet.from_arrays(pixels(2), ["a", "d"]), module=staged())


def test_a_class_that_validation_lacks_shifts_nothing() -> None:
    images = ImageSet.from_arrays(pixels(8), ["a", "b", "c", "a", "b", "c", "c", "c"])
    learn = learner(images=images.with_splits(["train"] * 6 + ["valid"] * 2))
    assert learn.inputs.valid is not None
    assert learn.inputs.valid.images.targets is not None
    assert learn.inputs.valid.images.targets.tolist() == [2, 2]
    learn.fit(1, lr=1e-2)


def test_training_on_what_a_run_held_out_is_refused_with_the_count(tmp_path: Path, own_file: Path) -> None:
    images = arrays(12)
    learn = learner(backbone(f"{own_file}:make_model"), images.split(valid=0.25), view=VIEW)
    learn.fit(1, lr=1e-2)
    run = learn.save(tmp_path / "run")
    everything = images.with_splits(["train"] * 12)
    for again in (Learner.load(run, everything, quiet=True), learner(backbone(run), everything)):
        with pytest.raises(FeatureStoreError, match="4 of the 12 images to train on were held out by"):
            again.fit(1, lr=1e-2)
        again.allow_leak = True
        again.fit(1, lr=1e-2)
    for dealt in (Learner.load(run, images, quiet=True), learner(backbone(run), images)):
        assert dealt.images.splits.tolist() == learn.images.splits.tolist()
        dealt.fit(1, lr=1e-2)


def test_a_run_remembers_what_the_runs_it_came_from_trained_on_and_held_out(tmp_path: Path) -> None:
    everything, module = arrays(24), staged()
    first, second = everything.select(range(12)).split(valid=0.25), everything.select(range(12, 24)).split(valid=0.25)
    learn = learner(module, first)
    learn.fit(1, lr=1e-2)
    run = learn.save(tmp_path / "first")
    for name, images in (("second", second), ("third", None)):
        again = Learner.load(run, images, module=module, quiet=True)
        if images is not None:
            again.fit(1, lr=1e-2)
        run = again.save(tmp_path / name)
    for held_out in (first.valid, second.valid):
        last = Learner.load(run, held_out.with_splits(["train"] * len(held_out)), module=module, quiet=True)
        with pytest.raises(FeatureStoreError, match=f"4 of the 4 images to train on were held out by {run}"):
            last.fit(1, lr=1e-2)
    dealt = Learner.load(run, everything, module=module, quiet=True).images.splits.tolist()
    assert dealt == [*first.splits.tolist(), *second.splits.tolist()]


def test_what_a_fit_held_out_is_not_trained_on_by_the_next_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = arrays(12)
    learn = learner(images=images.split(valid=0.25), quiet=False)
    learn.fit(1, lr=1e-2)
    learn.evaluate()
    assert "trained on by" not in capsys.readouterr().err
    first, other = learn.images, images.split(valid=0.25, seed=3)
    learn.images = other
    leaked = sum(a != "train" and b == "train" for a, b in zip(first.splits, other.splits, strict=True))
    with pytest.raises(FeatureStoreError, match=f"{leaked} of the 8 images to train on were held out by an earlier"):
        learn.fit(1, lr=1e-2)
    seen = sum(a == "train" and b == "valid" for a, b in zip(first.splits, other.splits, strict=True))
    learn.evaluate()
    told = f"{seen} of the 4 images were trained on by an earlier fit"
    assert told in capsys.readouterr().err
    learn.save(tmp_path / "before")  # nothing was fitted to the new split
    before = Learner.load(tmp_path / "before", images, module=staged(), quiet=True)
    assert before.images.splits.tolist() == first.splits.tolist()
    learn.allow_leak = True
    capsys.readouterr()
    learn.fit(1, lr=1e-2)  # by whose scores an epoch is chosen
    assert told in capsys.readouterr().err
    learn.save(tmp_path / "run")
    assert Learner.load(tmp_path / "run", images, module=staged()).images.splits.tolist() == other.splits.tolist()


def test_a_fit_that_ends_worse_than_it_began_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    learn = learner(images=arrays(12).split(valid=0.25), quiet=False)
    learn.fit(2, lr=1e-2)
    assert "model was better before" not in capsys.readouterr().err
    run = learn.save(tmp_path / "run")
    before = learn.history.last["valid_loss"]
    again = Learner.load(run, arrays(12), module=staged(), device="cpu", workers=0)
    for each in (learn, again):
        capsys.readouterr()
        each.fit(1, lr=1e3)
        after = each.history.last["valid_loss"]
        told = f"the validation loss was {before:.4g} where this fit began and is {after:.4g} now"
        assert told in capsys.readouterr().err
    thawed = Learner.load(run, arrays(12), module=staged(), device="cpu", workers=0)
    thawed.unfreeze()
    thawed.fit(1, lr=1e3)
    assert "--batch-norm frozen (in Python: batch_norm=" in capsys.readouterr().err
    thawed.images = arrays(12).split(valid=0.5, seed=3)  # of other images nothing is known
    thawed.allow_leak = True
    capsys.readouterr()
    thawed.fit(1, lr=1e3)
    assert "model was better before" not in capsys.readouterr().err


def test_a_run_is_found_from_another_working_directory(
    tmp_path: Path, own_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    images = arrays(12)
    learn = learner(backbone(f"{own_file}:make_model"), images.split(valid=0.25, seed=3), view=VIEW)
    learn.fit(1, lr=1e-2)
    learn.save("run")
    again = backbone("run")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert learner(again, images).images.splits.tolist() == learn.images.splits.tolist()


def test_a_run_folder_called_as_a_backbone_is_not_taken_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    learner(images=arrays(12).split(valid=0.25)).save("net")
    model = staged()
    model.origin = {"backbone": "net", "weights": "none"}
    assert learner(model, arrays(12)).images.splits.tolist() == [""] * 12


def test_a_run_whose_source_file_is_gone_says_where_it_was(tmp_path: Path, own_file: Path) -> None:
    run = learner(backbone(f"{own_file}:make_model"), view=VIEW).save(tmp_path / "run")
    own_file.rename(tmp_path / "renamed.py")
    with pytest.raises(FeatureStoreError, match=rf"made by make_model in {own_file}, and that file is gone\. Put it"):
        Learner.load(run)
    module = backbone(f"{tmp_path / 'renamed.py'}:make_model")
    assert Learner.load(run, module=module, quiet=True).classes == ("0", "1")


def test_images_without_labels_take_the_runs_task(tmp_path: Path) -> None:
    labels = [["a"], ["a", "b"], [], ["b", "c"]]
    learn = learner(images=ImageSet.from_arrays(pixels(4), labels, task="multi"))
    learn.fit(1, lr=1e-2)
    run = learn.save(tmp_path / "run")
    images = ImageSet.from_arrays(pixels(5))
    loaded = Learner.load(run, images, module=staged(), quiet=True, batch_size=4)
    assert (loaded.task, loaded.images.task) == ("multi", "multi")
    np.testing.assert_array_equal(loaded.predict_proba(images), learn.predict_proba(images))
    assert loaded.predict(images) == learn.predict(images)


@pytest.mark.parametrize("count", [2, 4])
def test_a_kept_head_has_a_logit_for_each_class(count: int) -> None:
    images = ImageSet.from_arrays(pixels(8), [place % count for place in range(8)])
    with pytest.raises(ValueError, match=f"net ends in 3 values an image, and the images have {count} classes"):
        learner(images=images, head="keep")


def test_a_run_saved_again_without_images_keeps_its_split(tmp_path: Path) -> None:
    learn = learner()
    run = learn.save(tmp_path / "run")
    Learner.load(run, module=staged(), quiet=True).save(tmp_path / "copy")
    again = Learner.load(tmp_path / "copy", arrays(12), module=staged(), quiet=True)
    assert again.images.splits.tolist() == learn.images.splits.tolist()


def test_a_split_that_does_not_exist_or_is_empty_is_refused() -> None:
    learn = learner(images=arrays(8))
    with pytest.raises(ValueError, match="expected train, valid or test"):
        learn.evaluate("validation")
    with pytest.raises(ValueError, match="The split valid has no labelled images"):
        learn.evaluate("valid")
    with pytest.raises(ValueError, match="no labelled images to train on"):
        learner(images=ImageSet.from_arrays(pixels(4), classes=["a", "b"])).fit(1, lr=1e-2)


# ---------------------------------------------------------------------------------------------- functions


def test_the_best_epoch_is_kept_and_is_what_evaluate_says(features: FeatureStore) -> None:
    images = arrays(12).split(valid=0.25)
    learn = train_head(staged(), images, features, epochs=6, lr=0.5, head="linear", quiet=True, optimizer="sgd")
    losses = [record["valid_loss"] for record in learn.history.records]
    assert learn.history.best["valid_loss"] == min(losses)
    assert learn.evaluate()["loss"] == min(losses)


def test_finetune_of_a_backbone_needs_no_store_and_starts_thawed() -> None:
    learn = finetune(staged(), arrays(12).split(valid=0.25), epochs=1, lr=(1e-4, 1e-2), head="linear", quiet=True)
    assert (learn.model.num_frozen, learn.read_from) == (0, "images")
    half = finetune(staged(), arrays(8), epochs=1, lr=1e-3, freeze_to="layer1", head="linear", quiet=True)
    assert half.model.num_frozen == half.model.index("layer1") + 1


def test_without_a_rate_the_finders_suggestion_is_printed_as_a_number_to_paste(
    features: FeatureStore, capsys: pytest.CaptureFixture[str]
) -> None:
    learn = learner(store=features, quiet=False)
    learn.fit(1)
    said = capsys.readouterr().err
    number = said.partition("(to use it again: --lr ")[2].partition(")")[0]
    again = learner(store=features)
    assert again.fit(1, lr=float(number)).losses == learn.history.losses


def test_a_validation_image_that_cannot_be_decoded_gets_no_row_in_the_saved_predictions(tmp_path: Path) -> None:
    photos(tmp_path / "photos")
    images = ImageSet.from_folder(tmp_path / "photos").split(valid=0.4)
    broken, *whole = images.valid.ids
    (tmp_path / "photos" / broken).write_bytes(b"no picture")
    learn = learner(staged(), images, on_error="skip")
    learn.fit(1, lr=1e-3)
    learn.save(tmp_path / "run")
    with (tmp_path / "run/valid_predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["image"] for row in rows] == whole
    expected = {each.image: each.label for each in learn.predict(images.select([name in whole for name in images.ids]))}
    assert {row["image"]: row["label"] for row in rows} == expected


def test_images_labelled_for_another_task_than_the_run_are_refused(tmp_path: Path) -> None:
    learn = learner()
    learn.save(tmp_path / "run")
    several = ImageSet.from_arrays(pixels(4), [["0"], ["1"], ["0", "1"], []], task="multi")
    with pytest.raises(FeatureStoreError, match="is for the task single, and these images are labelled for multi"):
        Learner.load(tmp_path / "run", several, module=net())


def test_a_store_given_by_a_relative_path_is_found_after_the_working_directory_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    images, store = arrays(12).split(valid=0.25), FeatureStore("features")
    extract(staged(), images, store, cuts=["layer2"], reduce="avg", dtype="float32")
    monkeypatch.chdir("elsewhere")
    learn = learner(images=images, store=store)
    assert "layer2 (avg)" in repr(learn)  # what is stored, not this layout's default
    learn.fit(1, lr=1e-2)
    assert learn.read_from == "features"
    earlier = learner(images=images, store=store, cut="layer1")
    assert str(earlier.inputs.problem).startswith("No stored features fit this request in features. Nearest is set ")
    run = learn.save("run")
    monkeypatch.chdir(tmp_path)
    found = Learner.store_of(Path("elsewhere") / run)
    assert found is not None
    assert found.folder == tmp_path / "features"


def test_a_run_loaded_without_images_says_how_to_give_them(tmp_path: Path) -> None:
    images = arrays(12).split(valid=0.25)
    learner(images=images).save(tmp_path / "run")
    learn = Learner.load(tmp_path / "run", module=net(), quiet=True)
    with pytest.raises(ValueError, match=r"has no images, .* Learner\.load\(run, images, store\)\.$"):
        learn.evaluate("test")
    with pytest.raises(TypeError, match=r"^attach got ImageSet\(.*learn\.images = images, or given to Learner\.load"):
        learn.attach(images)  # type: ignore[arg-type]
    assert Learner.load(tmp_path / "run", images, module=net(), quiet=True).evaluate("valid")["images"] == 4


def test_names_and_paths_in_the_place_of_things_are_refused_with_what_to_write() -> None:
    images = arrays(12).split(valid=0.25)
    with pytest.raises(TypeError, match=r'model is .resnet18.; expected a model, backbone\("resnet34"\)'):
        Learner("resnet18", images)  # type: ignore[arg-type]
    with pytest.raises(
        TypeError, match=r'images are .photos.; expected an image set, ImageSet.from_folder\("photos"\)'
    ):
        Learner(staged(), "photos")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r'store is .features.; expected a store, FeatureStore\("features"\)'):
        Learner(staged(), images, "features")  # type: ignore[arg-type]
    learn = learner()
    with pytest.raises(TypeError, match=r"augment is .flip.; expected an augmentation with its seeds"):
        learn.augment = "flip"  # type: ignore[assignment]
    with pytest.raises(TypeError, match=r'store is .features.; expected what FeatureStore\("features"\) gives'):
        extract(staged(), images, "features")  # type: ignore[arg-type]


def test_a_run_whose_linear_head_took_its_inputs_as_they_are_predicts_as_it_did(tmp_path: Path) -> None:
    images = arrays(12).split(valid=0.25)
    plain = learner(images=images, head=nn.Linear(24, 2))
    plain.fit(1, lr=1e-2)
    plain.head_name = "linear"  # what runs of linear heads held: weight and bias alone
    run = plain.save(tmp_path / "run")
    loaded = Learner.load(run, images, module=staged(), quiet=True)
    assert np.array_equal(loaded.predict_proba(images), plain.predict_proba(images))
    loaded.fit(1, lr=1e-3)
    again = Learner.load(loaded.save(tmp_path / "again"), images, module=staged(), quiet=True)
    assert int(again.model.tensors()["head.num_rows"]) == len(images.train)
    assert np.array_equal(again.predict_proba(images), loaded.predict_proba(images))
