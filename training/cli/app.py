"""The `featstore-train` program: train a head, fine-tune; evaluate, predict and share what was trained."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from featstore.cli.flags import (
    AugmentFlags,
    ImageFlags,
    OutputFlags,
    StoreOption,
    ViewFlags,
    open_store,
    spread,
)
from featstore.cli.models import ModelFlags
from featstore.cli.program import new_app, run, show, show_json, tell, tell_all
from featstore.models.names import REDUCTIONS
from training import choices
from training.cli import calibrate as calibrate_command
from training.cli import compare as compare_command
from training.cli import few_shot as few_shot_command
from training.cli import lr_find as lr_command
from training.cli import report as report_command
from training.cli import run_commands
from training.cli import runs as runs_command
from training.cli import sweep as sweep_command
from training.cli import versus as versus_command
from training.cli.asked import asked_cuts, asked_view, for_run, labelled, labelled_as, learning_rate, refuse_imported
from training.cli.config import ConfigOption, flags_as_toml
from training.cli.fit_flags import FitOptionFlags, LengthFlags
from training.cli.head_flags import HeadFlags, StartFlags
from training.cli.run_commands import FitFlags

# What loads torch is imported where a command needs it, so that words about the commands can be had without.
if TYPE_CHECKING:
    from featstore.models.staged import StagedModel
    from training.cross_validation import CrossValidation
    from training.learner import Learner

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

FEW_HELD_OUT = 100
"""Fewer leave an accuracy uncertain by 0.1 and more."""

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

    def check_free(self, *, are_folds: bool = False) -> None:
        """Checks that the run, or the runs of folds, can be saved, before anything is downloaded, read or computed.

        Raises:
            FeatureStoreError: if something is there that isn't to be replaced or gone on with.
        """
        from featstore.models.runs import check_free, located

        # What loads torch is imported only if there may be something to say.
        if are_folds and any(located(Path(each)).exists() for each in (self.out, f"{Path(self.out)}{choices.FOLDS}")):
            from training.cross_validation import check_folds_free, check_kept

            check_folds_free(Path(self.out), overwrite=self.overwrite)
            check_kept(self.out, overwrite=self.overwrite, resume=self.resume)
            return
        if not are_folds and (self.resume or located(Path(f"{Path(self.out)}{choices.CHECKPOINT}")).exists()):
            from training.recipes import check_out

            check_out(self.out, overwrite=self.overwrite, resume=self.resume)
        check_free(Path(self.out), overwrite=self.overwrite)


FreezeToOption = Annotated[
    str | None, typer.Option("--freeze-to", metavar="CUT", help="The last frozen stage.", show_default="see below")
]


@app.command(epilog=DEFAULTS)
@spread
def head(
    context: typer.Context,
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
    kind: HeadFlags,
    cut: Annotated[
        str | None, typer.Option("--cut", metavar="CUT", help="Where the head sits.", show_default="see below")
    ] = None,
    freeze_to: FreezeToOption = None,
    lr: Annotated[
        str | None,
        typer.Option("--lr", metavar="LR", help="Highest learning rate.", show_default="the finder's suggestion"),
    ] = None,
    features: Annotated[
        str | None, typer.Option(metavar="KEY", help="Start of the key of the feature set to use.")
    ] = None,
    extract: Annotated[bool, typer.Option("--extract", help="Compute features that are missing.")] = False,
    config: ConfigOption = None,
    folds: Annotated[
        int | None,
        typer.Option(min=2, metavar="K", help="Hold each image out once: K heads, a run of each in the folder."),
    ] = None,
) -> None:
    """Train a head on stored features."""
    if folds is not None:
        _check_folds(length)
    training.check_free(are_folds=folds is not None)
    rate = None if lr is None else learning_rate(lr)
    feature_store = open_store(store)
    given = labelled(images, for_new_head=True)
    from training.cross_validation import cross_validate  # torch: what was asked for is understood by now
    from training.recipes import train_head

    try:
        staged = model.model(asked_cuts(cut, freeze_to), trust_code=how.trust_code)
    except ValueError:
        refuse_imported(model.backbone, feature_store)
        raise
    given = for_run(staged.origin.get("run"), images, given)
    tell_all([*(given.notes if folds is None else given.about), *view.notes(staged)])
    options: dict[str, Any] = {
        "cut": cut,
        **kind.options(),
        "freeze_to": freeze_to,
        "features": features,
        "augment": augment.augmentation(),
        "on_missing": "extract" if extract else "error",
        "view": asked_view(staged, feature_store, view, features),
        "lr": rate,
        "allow_leak": training.allow_leak,
        **how.options(),
    }
    if folds is not None:
        found = cross_validate(
            staged,
            given.images,
            feature_store,
            folds=folds,
            epochs=length.epochs or 10,
            fit=fit.options(),
            out=training.out,
            overwrite=training.overwrite,
            resume=training.resume,
            asked=flags_as_toml(context),
            **options,
        )
        _report_folds(found, training.out, output)
        return
    learn = train_head(
        staged,
        given.images,
        feature_store,
        fit=fit.options(),
        out=training.out,
        overwrite=training.overwrite,
        resume=training.resume,
        asked=flags_as_toml(context),
        **length.arguments(),
        **options,
    )
    if (steps := len(learn.history.losses)) < choices.FEW_STEPS:
        tell(_few_steps(steps, how.batch_size))
    if 0 < (held_out := len(learn.images.valid)) < FEW_HELD_OUT:
        num_scored = held_out + len(learn.images.train)
        tell(f"{held_out} images held out say little; --folds 5 scores all {num_scored:,}, each while it is held out")
    _report_training(learn, training.out, output)


@app.command("finetune", epilog=DEFAULTS)
@spread
def finetune_command(
    context: typer.Context,
    images: ImageFlags,
    view: ViewFlags,
    augment: AugmentFlags,
    training: TrainingFlags,
    length: LengthFlags,
    fit: FitOptionFlags,
    how: FitFlags,
    output: OutputFlags,
    begun: StartFlags,
    lr: Annotated[
        str | None,
        typer.Option(
            metavar="LR|LO,HI|A,B,C",
            help="One rate; low and high; or one a layer group.",
            show_default="the finder's suggestion",
        ),
    ] = None,
    cut: Annotated[
        str | None,
        typer.Option("--cut", metavar="CUT", help="With --backbone: where the head sits.", show_default="see below"),
    ] = None,
    freeze_to: FreezeToOption = None,
    store: Annotated[
        str | None, typer.Option(metavar="DIR", help="Features to read where the freeze point allows it.")
    ] = None,
    config: ConfigOption = None,
) -> None:
    """Train a model from images, or from features up to where it is frozen."""
    training.check_free()
    begun.check()
    if begun.start is not None and (begun.weights, begun.weights_prefix, cut) != (None, None, None):
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
    if begun.start is not None and view != ViewFlags():
        raise ValueError("--size, --resize, --mean, --std, --interpolation and --decode come with the run of --from.")
    if length.epochs is None and length.cycles is None:
        raise ValueError("Nothing says how long to train. Expected a number of epochs: --epochs 5; or --cycles 3.")
    rate = None if lr is None else learning_rate(lr)
    from training.recipes import finetune  # torch: what was asked for is understood by now

    options: dict[str, Any] = {}
    source: StagedModel | str
    if begun.start is None:
        given = labelled(images, for_new_head=True)
        source = begun.model(asked_cuts(cut, freeze_to), trust_code=how.trust_code)
        given = for_run(source.origin.get("run"), images, given)
        notes = [*given.notes, *view.notes(source)]
        options = {"cut": cut, "view": view.view(source.view)}
    else:
        images = labelled_as(begun.start, images)
        given = for_run(begun.start, images, labelled(images, for_new_head=False))
        source, notes = begun.start, [*given.notes]
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
        asked=flags_as_toml(context),
        **options,
        **length.arguments(),
        **how.options(),
    )
    _report_training(learn, training.out, output)


for _name, _command in {
    "lr-find": lr_command.lr_find,
    "compare": compare_command.compare,
    "few-shot": few_shot_command.few_shot,
    "sweep": sweep_command.sweep,
    **run_commands.COMMANDS,
    "report": report_command.report,
    "calibrate": calibrate_command.calibrate,
    "runs": runs_command.runs,
    "versus": versus_command.versus,
}.items():
    app.command(_name)(_command)


def _check_folds(length: LengthFlags) -> None:
    if length.cycles is not None:
        raise ValueError("--cycles makes no folds. Expected --epochs with --folds. Leave one of them out.")
    if (count := os.environ.get("WORLD_SIZE", "1")) != "1":
        raise ValueError(
            f"--folds makes several fits, and the {count} processes that torchrun has started share one. Start the "
            "command by itself, without torchrun."
        )


def _few_steps(steps: int, batch_size: int) -> str:
    remedy = f"--batch-size {choices.SMALL_BATCH}" if batch_size > choices.SMALL_BATCH else "more --epochs"
    return f"{steps} optimizer step{'s' * (steps > 1)}, which may be too few; try {remedy}"


def _report_training(learn: Learner, out: str, output: OutputFlags) -> None:
    from training.saved import read_scores
    from training.scores.metrics import scores_line

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
        show(f"{scores_line('valid', scored)} - {out}")
    else:
        show(f"train loss {record['train_loss']:.4g}, no validation images - {out}")


def _report_folds(found: CrossValidation, out: str, output: OutputFlags) -> None:
    if output.json:
        show_json({"folds": list(found.scores), "mean": found.mean, "runs": out})
    else:
        show(f"{found} - {out}")
