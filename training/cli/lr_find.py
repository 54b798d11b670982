"""The command `lr-find`: the learning-rate finder on what `head` or `finetune` would train."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Annotated, Any

import typer

from featstore.cli.flags import AugmentFlags, ImageFlags, OutputFlags, ViewFlags, open_store, spread
from featstore.cli.models import load_model
from featstore.cli.program import one_of, show, show_json, tell_all
from featstore.models.names import REDUCTIONS
from training import choices
from training.cli.asked import asked_cuts, asked_view, for_run, labelled, labelled_as
from training.cli.fit_flags import FitOptionFlags
from training.cli.run_commands import FileFlags, FitFlags

_PICTURES = (".png", ".svg", ".pdf")


@spread
def lr_find(
    images: ImageFlags,
    view: ViewFlags,
    augment: AugmentFlags,
    fit: FitOptionFlags,
    how: FitFlags,
    output: OutputFlags,
    files: FileFlags,
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
    store: Annotated[str | None, typer.Option(metavar="DIR", help="Features to read, as far as these serve.")] = None,
    cut: Annotated[
        str | None, typer.Option("--cut", metavar="CUT", help="With --backbone: where the head sits.")
    ] = None,
    reduce: Annotated[
        str, typer.Option(metavar="|".join(("auto", *REDUCTIONS)), help="With --backbone: reduction at the cut.")
    ] = "auto",
    kind: Annotated[
        str, typer.Option("--head", metavar="|".join(choices.HEADS), help="With --backbone: kind of head.")
    ] = "concat",
    freeze_to: Annotated[
        str | None,
        typer.Option(
            "--freeze-to",
            metavar="CUT",
            help="The last frozen stage, as the fit will have it.",
            show_default="--from: nothing is frozen, as of finetune; else the cut",
        ),
    ] = None,
    unfreeze: Annotated[
        bool, typer.Option("--unfreeze", help="With --backbone: everything trains, as of finetune.")
    ] = False,
    plot: Annotated[
        str | None, typer.Option(metavar="FILE.png", help="Also draw loss against rate (.png, .svg, .pdf).")
    ] = None,
    table: Annotated[
        str | None,
        typer.Option("--csv", metavar="FILE.csv", help="Also write rate, loss and smoothed loss of each step."),
    ] = None,
) -> None:
    """Suggest a learning rate for a fit, by a short run with a rising one; nothing is saved."""
    one_of("--head", kind.partition(":")[0], choices.HEADS)
    one_of("--reduce", reduce, ("auto", *REDUCTIONS))
    if (start is None) == (backbone is None):
        raise ValueError("Give either --from RUN_DIR, to go on with a saved run, or --backbone, for a new head.")
    if unfreeze and freeze_to is not None:
        raise ValueError(f"--unfreeze and --freeze-to {freeze_to} say two things of what is frozen. Give one of them.")
    if plot is not None and not plot.lower().endswith(_PICTURES):
        raise ValueError(f"--plot is {plot!r}. Expected a name that ends in {', '.join(_PICTURES)}.")
    has_own = (weights, weights_prefix, cut, reduce, kind, view) != (None, None, None, "auto", "concat", ViewFlags())
    if start is not None and has_own:
        raise ValueError("A run of --from brings its weights, its head and its view. Leave out what says them again.")
    files.check_free(table, plot)
    feature_store = None if store is None else open_store(store)
    options: dict[str, Any] = {"augment": augment.augmentation(), "on_missing": "images", **how.options()}
    from training.learner import Learner  # torch: what was asked for is understood by now

    if start is not None:
        images = labelled_as(start, images)
        given = for_run(start, images, labelled(images, for_new_head=False))
        tell_all(given.notes)
        learn = Learner.load(start, given.images, feature_store, trust_code=how.trust_code, **options)
    else:
        assert backbone is not None
        given = labelled(images, for_new_head=True)
        staged = load_model(
            backbone, weights, asked_cuts(cut, freeze_to), weights_prefix=weights_prefix, trust_code=how.trust_code
        )
        given = for_run(staged.origin.get("run"), images, given)
        tell_all([*given.notes, *view.notes(staged)])
        theirs = view.view(staged.view) if feature_store is None else asked_view(staged, feature_store, view, None)
        learn = Learner(staged, given.images, feature_store, cut=cut, reduce=reduce, head=kind, view=theirs, **options)
    if freeze_to is not None:
        learn.freeze_to(freeze_to)
    elif unfreeze or start is not None:  # for the fit that follows: finetune --from thaws what the run had frozen
        learn.unfreeze()
    found = learn.lr_find(**fit.options())
    rules = {"minimum": found.minimum, "steepest": found.steepest, "valley": found.valley}
    if table is not None:
        _write_curve(Path(table), list(zip(found.lrs, found.losses, found.smoothed, strict=True)))
    if plot is not None:
        figure = found.plot().get_figure(root=True)
        assert figure is not None
        figure.savefig(plot)
    source = learn.inputs.train
    if output.json:
        show_json({"lr": found.rate, "note": found.note, **rules, "inputs": None if source is None else source.kind})
        return
    show(found.in_words())
    told = ", ".join(f"{name} {rate:.2g}" for name, rate in rules.items() if rate is not None)
    show(f"other rules, which nothing has tried: {told}" if told else "no curve, so no other rules")


def _write_curve(path: Path, rows: list[tuple[float, float, float]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["lr", "loss", "smoothed"])
        writer.writerows(rows)
