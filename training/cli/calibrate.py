"""The command `calibrate`: a saved run with a temperature, fitted to images that no fit has seen, as a new run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from featstore.cli.flags import ImageFlags, OutputFlags, spread
from featstore.cli.program import one_of, show, show_json, tell_all
from training.cli.asked import for_run, labelled_as
from training.cli.run_commands import ModelOption, ScoringFlags

_HELD_OUT = ("valid", "test")


@spread
def calibrate(
    model: ModelOption,
    images: ImageFlags,
    how: ScoringFlags,
    output: OutputFlags,
    out: Annotated[str, typer.Option(metavar="DIR", help="Folder of the run that is saved.")],
    split: Annotated[
        str, typer.Option(metavar="|".join(_HELD_OUT), help="The images that the temperature is fitted to.")
    ] = "valid",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a run in that folder.")] = False,
) -> None:
    """Make the probabilities of a saved model as sure as they are right; what it predicts stays."""
    one_of("--split", split, _HELD_OUT)
    from featstore.models.runs import check_free

    check_free(Path(out), overwrite=overwrite)
    from training.learner import Learner  # torch: what was asked for is understood by now

    images = labelled_as(model, images)
    given = for_run(model, images, images.given())
    tell_all(given.notes)
    store = Learner.store_of(model)
    options = {**how.options(), "on_missing": "images", "quiet": True}
    learn = Learner.load(model, given.images, store, trust_code=how.trust_code, **options)
    found = learn.calibrate(split)
    learn.save(out, overwrite=overwrite)
    if output.json:
        show_json({**found.facts(), "run": out})
    else:
        show(f"{found} - {out}")
