"""Asked: what a command's flags come to, as images, cuts, views and rates, with what a saved run says of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from featstore.cli.flags import GivenImages, ImageFlags, ViewFlags, parse_numbers
from featstore.cli.program import tell
from featstore.images.origins import as_cells, named_by

# What loads torch is imported where a command needs it, so that words about the commands can be had without.
if TYPE_CHECKING:
    from featstore.images.views import View
    from featstore.models.staged import StagedModel
    from featstore.store.store import FeatureStore
    from training.loop.optim import LearningRate


def labelled(flags: ImageFlags, *, for_new_head: bool) -> GivenImages:
    """The images to train on."""
    given = flags.given()
    if not given.images.is_labelled:
        raise ValueError(
            f"{flags.images} has no labels, and there is nothing to train without. Expected a folder with a folder for "
            "each class, or a table with a column of labels. Give one with --images."
        )
    from training.class_tables import check_contrast  # torch: the images are there by now

    if for_new_head:  # a saved run brings its class table, of which the images may be a part
        check_contrast(given.images)
    return given


def for_run(run: str | None, flags: ImageFlags, given: GivenImages) -> GivenImages:
    """The images to use with what comes from `run`, if it is one.

    A saved run brings its own split: without a split of their own, or flags that ask for one, they are left undealt.
    """
    from training.splits import PastSplit

    if run is None or PastSplit.read(Path(run)) is None:
        return given
    images = given.images
    if flags.valid == 0 and not flags.test:
        return replace(given, images=images.with_splits(["train"] * len(images)))
    if "split" in images.origin and (flags.valid, flags.test, flags.split_seed) == (None, None, None):
        return replace(given, images=images.with_splits([""] * len(images)), dealt=None)
    return given


def labelled_as(run: str, flags: ImageFlags) -> ImageFlags:
    """`flags` with the task of `run`, and the columns of its numbers, where they leave both as they are unasked."""
    default = ImageFlags(images=flags.images)
    has_task = {"task", "label_column"} <= {*named_by(flags.images).options}
    if not has_task or flags.task != default.task:
        return flags
    from featstore.models.runs import read_facts
    from training.saved import check_facts

    facts = read_facts(Path(run))
    check_facts(facts, Path(run))
    has_names = facts["task"] == "regression" and flags.label_column == default.label_column
    return replace(
        flags, task=facts["task"], label_column=as_cells(facts["classes"]) if has_names else flags.label_column
    )


def refuse_imported(name: str, store: FeatureStore) -> None:
    """Raises ValueError if `name` is that of features made elsewhere: no program can run what made them."""
    found = [each for each in store.sets() if each.facts["backbone"] == name] if store.folder.is_dir() else []
    keys = [each.key[:8] for each in found if "imported" in each.facts]
    if keys:
        raise ValueError(
            f"{name} is no backbone: {store.root} holds it as imported features ({', '.join(keys)}), and what made "
            "them isn't here. Expected a backbone. Train on them from Python: "
            f'Learner(store.model("{keys[0]}"), ImageSet.from_store(store, NAME), store, head="linear")'
        )


def asked_cuts(cut: str | None, freeze_to: str | None) -> list[str]:
    """Up to where weights must fit: without `cut` the head sits at the default one, wherever the freeze point is."""
    return [] if cut is None else [cut, *([] if freeze_to is None else [freeze_to])]


def asked_view(model: StagedModel, store: FeatureStore, flags: ViewFlags, key: str | None) -> View:
    """The view that the flags ask for; without flags that of the stored features, if there is just one."""
    wanted = flags.view(model.view)
    if flags != ViewFlags() or not store.folder.is_dir():
        return wanted
    if key is not None:
        return store.set(key).spec.rendered.evaluation
    digests = set(model.digests().values())
    stored = {each.spec.rendered.evaluation for each in store.sets() if each.spec.trunk in digests}
    if wanted in stored or len(stored) != 1:
        return wanted
    (only,) = stored
    differing = ", ".join(f"{name} {theirs}" for name, theirs, _ in only.differences(wanted))
    tell(f"{store.root} holds features of this model with {differing} only, so that is used")
    return only


def learning_rate(text: str) -> LearningRate:
    """What ``--lr`` says: a number, or several between commas."""
    try:
        rates = parse_numbers(text, "--lr")
    except ValueError:
        rates = ()
    if not rates or min(rates) <= 0:
        raise ValueError(f"--lr is {text!r}. Expected positive numbers, such as --lr 3e-3 or --lr 1e-5,1e-3.")
    return rates[0] if len(rates) == 1 else rates
