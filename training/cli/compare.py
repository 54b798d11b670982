"""The command `compare`: which backbone, and which cut of it, serves the images best."""

from __future__ import annotations

from typing import Annotated

import typer

from featstore.cli.flags import ComputeFlags, ImageFlags, OutputFlags, StoreOption, ViewFlags, open_store, spread
from featstore.cli.models import ModelsFlags
from featstore.cli.program import one_of, show, show_json, tell_all
from featstore.extraction.defaults import DEFAULT_SPLIT_SEED
from featstore.models.names import REDUCTIONS
from training import choices
from training.cli.asked import asked_view, for_run, labelled
from training.cli.head_flags import LeakOption, PlotFlags


@spread
def compare(
    images: ImageFlags,
    store: StoreOption,
    models: ModelsFlags,
    view: ViewFlags,
    how: ComputeFlags,
    output: OutputFlags,
    files: PlotFlags,
    cut: Annotated[
        list[str] | None,
        typer.Option(
            "--cut", metavar="CUT[:REDUCTION]", help="May be given again; each backbone gets those that it has."
        ),
    ] = None,
    reduce: Annotated[
        str, typer.Option(metavar="|".join(("auto", *REDUCTIONS)), help="Reduction of cuts that name none.")
    ] = "auto",
    probe: Annotated[
        list[str] | None,
        typer.Option(
            "--probe",
            metavar="|".join(choices.PROBES),
            help="May be given again; the last of these orders the table.",
            show_default="all that the task has",
        ),
    ] = None,
    folds: Annotated[
        int | None, typer.Option(min=2, metavar="K", help="Hold each image out once; the images' own split is left.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, metavar="N", help="Images a pass of a backbone.")] = None,
    stored_only: Annotated[
        bool, typer.Option("--stored-only", help="Compute nothing; what is missing is an error.")
    ] = False,
    allow_leak: LeakOption = False,
    time_all: Annotated[
        bool, typer.Option("--time-all", help="Also measure the seconds of backbones whose features were stored.")
    ] = False,
) -> None:
    """Compare backbones on labelled images: extract what is missing, probe each, show accuracy beside cost."""
    one_of("--reduce", reduce, ("auto", *REDUCTIONS))
    for each in probe or ():
        one_of("--probe", each, choices.PROBES)
    files.check()
    feature_store = open_store(store)
    given = labelled(images, for_new_head=True)
    tell_all(given.about if folds is not None else given.notes)
    loaded = models.models(cut or (), trust_code=how.trust_code)
    runs = [run for model, _ in loaded if (run := model.origin.get("run")) is not None]
    if runs and folds is None:
        given = for_run(runs[0], images, given)
    from training.experiments import comparing  # torch: what was asked for is understood by now

    found = comparing.compare(
        [(model.with_(view=asked_view(model, feature_store, view, None)), cuts) for model, cuts in loaded],
        given.images,
        feature_store,
        reduce=reduce,
        probes=probe,
        folds=folds,
        split_seed=DEFAULT_SPLIT_SEED if images.split_seed is None else images.split_seed,
        extract=not stored_only,
        allow_leak=allow_leak,
        time_all=time_all,
        device=how.device,
        batch_size=batch_size,
        workers=how.workers,
        progress=not output.json,
    )
    if files.table is not None:
        found.to_csv(files.table)
    files.draw(found)
    if output.json:
        show_json(
            {
                "entries": found.table,
                "by": found.by,
                "metric": found.metric,
                "images": found.num_images,
                "folds": found.folds,
                "ties": found.ties(),
                "rank_correlations": found.rank_correlations,
                "notes": list(found.notes),
            }
        )
    else:
        show(str(found))
