"""The command `few-shot`: how much a backbone's features tell with few labelled images, and how much more are worth."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from featstore.cli.flags import (
    ImageFlags,
    OutputFlags,
    StoreOption,
    TrustOption,
    ViewFlags,
    open_store,
    parse_numbers,
    spread,
)
from featstore.cli.models import ModelFlags
from featstore.cli.program import one_of, show, show_json, tell_all
from training import choices
from training.cli.asked import asked_cuts, asked_view, for_run, labelled
from training.cli.head_flags import LeakOption, PlotFlags, ReduceFlags


@spread
def few_shot(
    images: ImageFlags,
    store: StoreOption,
    model: ModelFlags,
    view: ViewFlags,
    output: OutputFlags,
    files: PlotFlags,
    reduction: ReduceFlags,
    shots: Annotated[
        str | None,
        typer.Option(metavar="A,B,...", help="Training images of each class.", show_default="1,2,4,8,16"),
    ] = None,
    shares: Annotated[
        str | None,
        typer.Option(metavar="A,B,...", help="In place of --shots: shares of all training images, as 0.1,0.5,1."),
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, metavar="N", help="Draws of each size.")] = 5,
    probe: Annotated[str, typer.Option(metavar="|".join(choices.FEW_SHOT_PROBES), help="What is fitted.")] = "ridge",
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="Of the first draw; others have the next ones.")] = 0,
    cut: Annotated[
        str | None,
        typer.Option("--cut", metavar="CUT", help="Whose features.", show_default="as of head"),
    ] = None,
    features: Annotated[
        str | None, typer.Option(metavar="KEY", help="Start of the key of the feature set to use.")
    ] = None,
    device: Annotated[str, typer.Option(metavar="auto|cpu|cuda|cuda:1", help="Of what is fitted.")] = "auto",
    allow_leak: LeakOption = False,
    trust_code: TrustOption = False,
) -> None:
    """Fit a probe to few stored features of each class, several times, and score it on the images held out."""
    one_of("--probe", probe, choices.FEW_SHOT_PROBES)
    if shots is not None and shares is not None:
        raise ValueError(f"--shots {shots} and --shares {shares} both say how many images. Give one of them.")
    sizes = _sizes(shots, shares)
    files.check()
    feature_store = open_store(store)
    given = labelled(images, for_new_head=True)
    from training.experiments import shots as few  # torch: what was asked for is understood by now

    staged = model.model(asked_cuts(cut, None), trust_code=trust_code)
    given = for_run(staged.origin.get("run"), images, given)
    tell_all([*given.notes, *view.notes(staged)])
    options: dict[str, Any] = {
        "repeats": repeats,
        "probe": probe,
        "seed": seed,
        "cut": cut,
        "reduce": reduction.reduce,
        "features": features,
        "view": asked_view(staged, feature_store, view, features),
        "device": device,
        "allow_leak": allow_leak,
    }
    make = few.few_shot if shares is None else few.learning_curve
    found = make(staged, given.images, feature_store, **sizes, **options)
    if files.table is not None:
        _write(Path(files.table), found.table)
    files.draw(found)
    if output.json:
        show_json({"points": found.table, "probe": found.probe, "images": found.num_scored, "note": found.note})
    else:
        show(str(found))


def _sizes(shots: str | None, shares: str | None) -> dict[str, Any]:
    """What was asked for, as an argument of the function."""
    if shares is not None:
        return {"shares": parse_numbers(shares, "--shares")}
    if shots is None:
        return {}
    numbers = parse_numbers(shots, "--shots")
    if any(each != int(each) or each < 1 for each in numbers):
        raise ValueError(f"--shots is {shots!r}. Expected whole numbers from 1 on, such as --shots 1,2,4,8.")
    return {"shots": tuple(map(int, numbers))}


def _write(path: Path, rows: Sequence[Mapping[str, int | float | None]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*rows[0]])
        writer.writeheader()
        writer.writerows(rows)
