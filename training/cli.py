"""The `featstore-train` program: train a head, fine-tune, evaluate, predict, export."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from featstore.cli.flags import (
    AugmentFlags,
    GivenImages,
    ImageFlags,
    OutputFlags,
    RunFlags,
    StoreOption,
    TrustOption,
    ViewFlags,
    open_store,
    parse_numbers,
    spread,
)
from featstore.cli.models import ModelFlags, load_model
from featstore.cli.program import new_app, one_of, run, show, show_json, table, tell, tell_all
from featstore.images.names import SPLITS
from featstore.images.origins import as_cells, named_by
from featstore.models.names import REDUCTIONS
from training import choices
from training.fit_flags import FitOptionFlags, LengthFlags

# What loads torch is imported where a command needs it, so that words about the commands can be had without.
if TYPE_CHECKING:
    from featstore.digest import Json
    from featstore.images.views import View
    from featstore.models.staged import StagedModel
    from featstore.store.store import FeatureStore
    from training.learner import Learner
    from training.optim import LearningRate

DEFAULTS = """\b
Defaults that depend on what is asked for:
  --cut         the only cut that the store has features of, else the last
                maps or tokens before the network's own pooling
  --freeze-to   head: the cut; finetune: nothing is frozen
  --reduce      auto: concat for maps, token for a ViT, none for vectors
  --lr          what the learning-rate finder suggests, printed
  --size ...    what the store has features of, else the weights' own
  --valid       0.2 of images without a split of their own, by --split-seed 0;
                with a saved run (--from, --model, --backbone RUN_DIR): the
                run's split, and new images dealt by its rule
  AdamW, one cycle; a linear head's inputs are scaled
  to a deviation of 10, and its weight decay is ten times as high, AdamW's
  epsilon 1. Saved and scored is the epoch with the lowest validation loss
  (see --keep and --monitor); without validation, the last. An epoch is one pass over the training images; of
  a linear head that trains alone on few of them, up to four.

\b
Until a run is saved its fit is kept beside it, in RUN_DIR.checkpoint, after
each epoch and where Ctrl-C or SIGTERM ends it (after the step that is under
way; a second one ends it at once). The same command with --resume goes on
from there, to what it would have come to.

\b
Exit codes: 0 done; 1 failed; 2 wrong usage; 130 ended by Ctrl-C, 143 by
SIGTERM.
"""

_SCORES = {"map": "mAP", "f1": "F1", "mae": "mean absolute error", "rmse": "RMSE", "r2": "R2", "loss": "loss"}
"""Metric -> how a result line names it, where there is no accuracy."""

FEW_STEPS = 50
"""Fewer leave a new head far from what it can learn: 54 images and ten epochs gave an accuracy of 0.64 in batches of
64, and of 0.79 in batches of 8."""
SMALL_BATCH = 8

app = new_app(help=__doc__)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program and returns its exit code; `argv` are the arguments after its name."""
    return run(app, "featstore-train", argv)


@dataclass(frozen=True, kw_only=True)
class TrainingFlags:
    """How a model is trained, and where it goes."""

    out: Annotated[str, typer.Option(metavar="DIR", help="Folder of the run that is saved.")]
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a run in that folder, or a fit that was interrupted.")
    ] = False
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a fit that was interrupted.")] = False
    allow_leak: Annotated[
        bool, typer.Option("--allow-leak", help="Train also on images that an earlier run held out.")
    ] = False

    def __post_init__(self) -> None:
        from featstore.models.runs import check_free, located

        # Before anything is downloaded, read or computed; what loads torch, only if there may be something to say.
        if self.resume or located(Path(f"{Path(self.out)}{choices.CHECKPOINT}")).exists():
            from training.recipes import check_out

            check_out(self.out, overwrite=self.overwrite, resume=self.resume)
        check_free(Path(self.out), overwrite=self.overwrite)


@dataclass(frozen=True, kw_only=True)
class ScoringFlags(RunFlags):
    """How images are scored."""

    batch_size: Annotated[int, typer.Option(min=1, metavar="N", help="Images scored at a time.")] = 64

    def options(self) -> dict[str, Any]:
        """As arguments of `Learner`."""
        return {
            "device": self.device,
            "workers": self.workers,
            "on_error": self.on_image_error,
            "batch_size": self.batch_size,
        }


@dataclass(frozen=True, kw_only=True)
class FitFlags(ScoringFlags):
    """How the work of training is done."""

    batch_size: Annotated[int, typer.Option(min=1, metavar="N", help="Images a training step.")] = 64
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="Of head weights, order, views and dropout.")] = 0

    def options(self) -> dict[str, Any]:
        """As arguments of `Learner`."""
        return {**super().options(), "seed": self.seed}


FreezeToOption = Annotated[
    str | None, typer.Option("--freeze-to", metavar="CUT", help="The last frozen stage.", show_default="see below")
]


@app.command(epilog=DEFAULTS)
@spread
def head(
    images: ImageFlags,
    store: StoreOption,
    model: ModelFlags,
    view: ViewFlags,
    augment: AugmentFlags,
    training: TrainingFlags,
    length: LengthFlags,
    fit: FitOptionFlags,
    how: FitFlags,
    output: OutputFlags,
    cut: Annotated[
        str | None, typer.Option("--cut", metavar="CUT", help="Where the head sits.", show_default="see below")
    ] = None,
    freeze_to: FreezeToOption = None,
    reduce: Annotated[
        str, typer.Option(metavar="|".join(("auto", *REDUCTIONS)), help="Reduction at the cut.")
    ] = "auto",
    kind: Annotated[str, typer.Option("--head", metavar="|".join(choices.HEADS), help="Kind of head.")] = "concat",
    lr: Annotated[
        str | None,
        typer.Option("--lr", metavar="LR", help="Highest learning rate.", show_default="the finder's suggestion"),
    ] = None,
    features: Annotated[
        str | None, typer.Option(metavar="KEY", help="Start of the key of the feature set to use.")
    ] = None,
    extract: Annotated[bool, typer.Option("--extract", help="Compute features that are missing.")] = False,
) -> None:
    """Train a head on stored features."""
    one_of("--head", kind, choices.HEADS)
    one_of("--reduce", reduce, ("auto", *REDUCTIONS))
    rate = None if lr is None else _learning_rate(lr)
    feature_store = open_store(store)
    given = _labelled(images, for_new_head=True)
    from training.recipes import train_head  # torch: what was asked for is understood by now

    try:
        staged = model.model(_cuts(cut, freeze_to), trust_code=how.trust_code)
    except ValueError:
        _refuse_imported(model.backbone, feature_store)
        raise
    given = _for_run(staged.origin.get("run"), images, given)
    tell_all([*given.notes, *view.notes(staged)])
    learn = train_head(
        staged,
        given.images,
        feature_store,
        cut=cut,
        reduce=reduce,
        head=kind,
        freeze_to=freeze_to,
        features=features,
        augment=augment.augmentation(),
        on_missing="extract" if extract else "error",
        view=_view(staged, feature_store, view, features),
        lr=rate,
        fit=fit.options(),
        out=training.out,
        overwrite=training.overwrite,
        resume=training.resume,
        allow_leak=training.allow_leak,
        **length.arguments(),
        **how.options(),
    )
    if (steps := len(learn.history.losses)) < FEW_STEPS:
        tell(_few_steps(steps, how.batch_size))
    _report_training(learn, training.out, output)


@app.command("finetune", epilog=DEFAULTS)
@spread
def finetune_command(
    images: ImageFlags,
    view: ViewFlags,
    augment: AugmentFlags,
    training: TrainingFlags,
    length: LengthFlags,
    fit: FitOptionFlags,
    how: FitFlags,
    output: OutputFlags,
    lr: Annotated[
        str | None,
        typer.Option(
            metavar="LR|LO,HI|A,B,C",
            help="One rate; low and high; or one a layer group.",
            show_default="the finder's suggestion",
        ),
    ] = None,
    start: Annotated[
        str | None, typer.Option("--from", metavar="RUN_DIR", help="A saved run to go on with; or --backbone.")
    ] = None,
    backbone: Annotated[
        str | None, typer.Option(metavar="NAME|FILE.py:FN|RUN_DIR", help="A backbone that gets a new head; or --from.")
    ] = None,
    weights: Annotated[
        str | None, typer.Option(metavar="DEFAULT|ENUM|none|FILE", help="Weights of --backbone.")
    ] = None,
    weights_prefix: Annotated[
        str | None, typer.Option(metavar="TEXT", help="What names begin with in a file of several networks.")
    ] = None,
    cut: Annotated[
        str | None,
        typer.Option("--cut", metavar="CUT", help="With --backbone: where the head sits.", show_default="see below"),
    ] = None,
    freeze_to: FreezeToOption = None,
    store: Annotated[
        str | None, typer.Option(metavar="DIR", help="Features to read where the freeze point allows it.")
    ] = None,
) -> None:
    """Train a model from images, or from features up to where it is frozen."""
    if (start is None) == (backbone is None):
        raise ValueError("Give either --from RUN_DIR, to go on with a saved run, or --backbone, for a new head.")
    if start is not None and (weights, weights_prefix, cut) != (None, None, None):
        raise ValueError(
            "--weights, --weights-prefix and --cut belong to --backbone; a run brings its own weights and its head."
        )
    name, _, reduction = (cut or "").partition(":")
    if reduction in REDUCTIONS:
        raise ValueError(
            f"--cut is {cut!r}, with a reduction as extract takes it. finetune takes a cut alone, and reduces as "
            f"auto does: --cut {name}. For another reduction train a head first (featstore-train head "
            f"--cut {name} --reduce {reduction}) and go on with its run: --from RUN_DIR."
        )
    if start is not None and view != ViewFlags():
        raise ValueError("--size, --resize, --mean, --std, --interpolation and --decode come with the run of --from.")
    if length.epochs is None and length.cycles is None:
        raise ValueError("Nothing says how long to train. Expected a number of epochs: --epochs 5; or --cycles 3.")
    rate = None if lr is None else _learning_rate(lr)
    from training.recipes import finetune  # torch: what was asked for is understood by now

    options: dict[str, Any] = {}
    source: StagedModel | str
    if backbone is not None:
        given = _labelled(images, for_new_head=True)
        source = load_model(
            backbone,
            weights,
            _cuts(cut, freeze_to),
            weights_prefix=weights_prefix,
            trust_code=how.trust_code,
        )
        given = _for_run(source.origin.get("run"), images, given)
        notes = [*given.notes, *view.notes(source)]
        options = {"cut": cut, "view": view.view(source.view)}
    else:
        assert start is not None
        images = _labelled_as(start, images)
        given = _for_run(start, images, _labelled(images, for_new_head=False))
        source, notes = start, [*given.notes]
    tell_all(notes)
    learn = finetune(
        source,
        given.images,
        store=None if store is None else open_store(store),
        freeze_to=freeze_to,
        lr=rate,
        fit=fit.options(),
        augment=augment.augmentation(),
        out=training.out,
        overwrite=training.overwrite,
        resume=training.resume,
        allow_leak=training.allow_leak,
        trust_code=how.trust_code,
        **options,
        **length.arguments(),
        **how.options(),
    )
    _report_training(learn, training.out, output)


ModelOption = Annotated[str, typer.Option("--model", metavar="RUN_DIR", help="Folder of a saved run.")]


@app.command()
@spread
def evaluate(
    model: ModelOption,
    images: ImageFlags,
    how: ScoringFlags,
    output: OutputFlags,
    split: Annotated[str, typer.Option(metavar="|".join(SPLITS), help="Which images to score.")] = "valid",
) -> None:
    """Score a saved model on images of a split; without a split of their own they get the run's."""
    one_of("--split", split, SPLITS)
    from training.learner import Learner
    from training.saved import finite

    images = _labelled_as(model, images)
    given = _for_run(model, images, images.given())
    tell_all(given.notes)
    # The features it was trained on give its scores again exactly; images give them to the storage type's precision.
    learn = Learner.load(
        model,
        given.images,
        Learner.store_of(model),
        on_missing="images",
        trust_code=how.trust_code,
        **how.options(),
    )
    scored = finite(learn.evaluate(split))
    if output.json:
        show_json({split: scored, "inputs": learn.read_from})
    else:
        show(_scores_line(split, scored))


@app.command()
@spread
def predict(
    model: Annotated[
        list[str],
        typer.Option(metavar="RUN_DIR", help="Folder of a saved run; given several times, their mean predicts."),
    ],
    how: ScoringFlags,
    output: OutputFlags,
    items: Annotated[list[str], typer.Argument(metavar="IMAGE|FOLDER|SHARD.tar...", show_default=False)],
    csv: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Also write a table: image, label, probability, a column a class (or image, a column a number).",
        ),
    ] = None,
) -> None:
    """Name the class of images, with probabilities; or their numbers."""
    from training.ensembles import Ensemble
    from training.predict import as_images, predictions, write_csv

    images = as_images(items)  # a path that isn't there is said before the model is loaded
    learn = Ensemble.load(model, trust_code=how.trust_code, **how.options())
    ids, values = learn.scored(images)
    are_scored = set(ids)
    left_out = [name for name in images.ids if name not in are_scored]
    if left_out:
        tell(f"{len(left_out):,} image{'s' * (len(left_out) > 1)} can't be read, left out:")
        tell_all(left_out, indent="  ")
    if csv is not None:
        write_csv(Path(csv), ids, values, learn.classes, learn.task)
    records = predictions(ids, values, learn.classes, learn.task)
    if output.json:
        show_json([each.facts() for each in records])
    elif csv is None and learn.task == "regression":
        show(table([{"image": each.image, **dict(each.values)} for each in records]))
    elif csv is None:
        show(table([{"image": each.image, "label": each.label, "probability": each.probability} for each in records]))
    else:
        tell(f"{len(records):,} predictions in {csv}")


@app.command()
@spread
def export(
    model: ModelOption,
    out: Annotated[
        str,
        typer.Option(
            metavar="|".join(f"FILE{each}" for endings in choices.EXPORTS.values() for each in endings),
            help="The new file; FILE.json beside it says how its input is prepared, and its classes.",
        ),
    ],
    output: OutputFlags,
    trust_code: TrustOption = False,
    kind: Annotated[
        str | None,
        typer.Option(
            "--format", metavar="|".join(choices.EXPORTS), help="Of the file.", show_default="what its ending says"
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files of these names.")] = False,
    images: Annotated[
        str | None,
        typer.Option(
            metavar="IMAGE|FOLDER", help="Images to compare outputs on.", show_default="pixels drawn at random"
        ),
    ] = None,
) -> None:
    """Write a saved model for other programs, from uint8 images to logits, once its outputs were compared.

    The state-dict holds the backbone's tensors under their own names, and FILE.head beside it the head's.
    """
    if kind is not None:
        one_of("--format", kind, list(choices.EXPORTS))
    from training.learner import Learner
    from training.predict import as_images

    given = None if images is None else as_images(images)
    learn = Learner.load(model, given, device="cpu", trust_code=trust_code, quiet=True)
    report = learn.export(out, format=kind, overwrite=overwrite)
    if output.json:
        show_json(report.facts())
    else:
        show(str(report))


def _labelled(flags: ImageFlags, *, for_new_head: bool) -> GivenImages:
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


def _refuse_imported(name: str, store: FeatureStore) -> None:
    """Raises ValueError if `name` is that of features made elsewhere: no program can run what made them."""
    found = [each for each in store.sets() if each.facts["backbone"] == name] if store.folder.is_dir() else []
    keys = [each.key[:8] for each in found if "imported" in each.facts]
    if keys:
        raise ValueError(
            f"{name} is no backbone: {store.root} holds it as imported features ({', '.join(keys)}), and what made "
            "them isn't here. Expected a backbone. Train on them from Python: "
            f'Learner(store.model("{keys[0]}"), ImageSet.from_store(store, NAME), store, head="linear")'
        )


def _cuts(cut: str | None, freeze_to: str | None) -> list[str]:
    """Up to where weights must fit: without `cut` the head sits at the default one, wherever the freeze point is."""
    return [] if cut is None else [cut, *([] if freeze_to is None else [freeze_to])]


def _for_run(run: str | None, flags: ImageFlags, given: GivenImages) -> GivenImages:
    """The images to use with what comes from `run`, if it is one.

    A saved run brings its own split: without a split of their own, or flags that ask for one, they are left undealt.
    """
    from training.splits import PastSplit

    if run is None or PastSplit.read(Path(run)) is None:
        return given
    images = given.images
    if flags.valid == 0:
        return replace(given, images=images.with_splits(["train"] * len(images)))
    if "split" in images.origin and flags.valid is None and flags.split_seed is None:
        return replace(given, images=images.with_splits([""] * len(images)), dealt=None)
    return given


def _labelled_as(run: str, flags: ImageFlags) -> ImageFlags:
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


def _view(model: StagedModel, store: FeatureStore, flags: ViewFlags, key: str | None) -> View:
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


def _learning_rate(text: str) -> LearningRate:
    try:
        rates = parse_numbers(text, "--lr")
    except ValueError:
        rates = ()
    if not rates or min(rates) <= 0:
        raise ValueError(f"--lr is {text!r}. Expected positive numbers, such as --lr 3e-3 or --lr 1e-5,1e-3.")
    return rates[0] if len(rates) == 1 else rates


def _few_steps(steps: int, batch_size: int) -> str:
    remedy = f"--batch-size {SMALL_BATCH}" if batch_size > SMALL_BATCH else "more --epochs"
    return f"{steps} optimizer step{'s' * (steps > 1)}, which may be too few; try {remedy}"


def _report_training(learn: Learner, out: str, output: OutputFlags) -> None:
    from training.saved import read_scores

    if os.environ.get("RANK", "0") != "0":  # of several processes that torchrun has started, one reports
        return
    record = learn.history.best
    scored = read_scores(Path(out))
    if output.json:
        show_json(
            {
                "valid": scored,
                "inputs": learn.read_from,
                "epochs": len(learn.history.records),
                "best_epoch": int(record["epoch"]),
                "run": out,
            }
        )
    elif scored is not None:
        show(f"{_scores_line('valid', scored)} - {out}")
    else:
        show(f"train loss {record['train_loss']:.4g}, no validation images - {out}")


def _scores_line(split: str, scored: Mapping[str, Json]) -> str:
    from training.metrics import wilson_interval

    count = scored["images"]
    accuracy = scored.get("accuracy")
    if accuracy is not None:
        low, high = wilson_interval(round(accuracy * count), int(count))
        return f"{split} accuracy {accuracy:.3f} (95 % interval {low:.3f}-{high:.3f}, {count:,} images)"
    digits = ".4g" if "mae" in scored else ".3f"
    words = [f"{words} {scored[name]:{digits}}" for name, words in _SCORES.items() if scored.get(name) is not None]
    return f"{split} {', '.join(words)} ({count:,} images)"
