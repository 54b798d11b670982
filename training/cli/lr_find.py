"""The command `lr-find`: the learning-rate finder on what `head` or `finetune` would train."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Annotated, Any

import typer

from featstore.cli.flags import AugmentFlags, ImageFlags, OutputFlags, ViewFlags, open_store, spread
from featstore.cli.program import show, show_json, tell_all
from training.cli.asked import asked_cuts, asked_view, for_run, labelled, labelled_as
from training.cli.fit_flags import FitOptionFlags
from training.cli.head_flags import HeadFlags, PlotFlags, StartFlags
from training.cli.run_commands import FitFlags


@spread
def lr_find(
    images: ImageFlags,
    view: ViewFlags,
    augment: AugmentFlags,
    fit: FitOptionFlags,
    how: FitFlags,
    output: OutputFlags,
    files: PlotFlags,
    begun: StartFlags,
    head: HeadFlags,
    store: Annotated[str | None, typer.Option(metavar="DIR", help="Features to read, as far as these serve.")] = None,
    cut: Annotated[
        str | None, typer.Option("--cut", metavar="CUT", help="With --backbone: where the head sits.")
    ] = None,
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
) -> None:
    """Suggest a learning rate for a fit, by a short run with a rising one; nothing is saved."""
    begun.check()
    if unfreeze and freeze_to is not None:
        raise ValueError(f"--unfreeze and --freeze-to {freeze_to} say two things of what is frozen. Give one of them.")
    has_own = (begun.weights, begun.weights_prefix, cut, head, view) != (None, None, None, HeadFlags(), ViewFlags())
    if begun.start is not None and has_own:
        raise ValueError("A run of --from brings its weights, its head and its view. Leave out what says them again.")
    files.check()
    feature_store = None if store is None else open_store(store)
    options: dict[str, Any] = {"augment": augment.augmentation(), "on_missing": "images", **how.options()}
    from training.learner import Learner  # torch: what was asked for is understood by now

    if begun.start is not None:
        images = labelled_as(begun.start, images)
        given = for_run(begun.start, images, labelled(images, for_new_head=False))
        tell_all(given.notes)
        learn = Learner.load(begun.start, given.images, feature_store, trust_code=how.trust_code, **options)
    else:
        given = labelled(images, for_new_head=True)
        staged = begun.model(asked_cuts(cut, freeze_to), trust_code=how.trust_code)
        given = for_run(staged.origin.get("run"), images, given)
        tell_all([*given.notes, *view.notes(staged)])
        theirs = view.view(staged.view) if feature_store is None else asked_view(staged, feature_store, view, None)
        learn = Learner(staged, given.images, feature_store, cut=cut, view=theirs, **head.options(), **options)
    if freeze_to is not None:
        learn.freeze_to(freeze_to)
    elif unfreeze or begun.start is not None:  # for the fit that follows: finetune --from thaws what the run had frozen
        learn.unfreeze()
    found = learn.lr_find(**fit.options())
    rules = {"minimum": found.minimum, "steepest": found.steepest, "valley": found.valley}
    if files.table is not None:
        _write_curve(Path(files.table), list(zip(found.lrs, found.losses, found.smoothed, strict=True)))
    files.draw(found)
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
