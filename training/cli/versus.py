"""The command `versus`: two saved runs compared image by image, on the same images that both held out."""

from __future__ import annotations

from typing import Annotated

import typer

from featstore.cli.flags import OutputFlags, spread
from featstore.cli.program import show, show_json

_UNITS = {"single": "points", "multi": "points", "regression": "of mean squared error"}


@spread
def versus(
    output: OutputFlags,
    run_a: Annotated[str, typer.Argument(metavar="RUN_A", help="Folder of a saved run.")],
    run_b: Annotated[str, typer.Argument(metavar="RUN_B", help="Of another.")],
    num: Annotated[int, typer.Option("--num", min=100, metavar="N", help="How often images are drawn anew.")] = 10_000,
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="Of the drawing.")] = 0,
) -> None:
    """Say whether one of two runs is better, from what both predicted for the images that both held out."""
    from training.scores.scored_table import ScoredTable
    from training.scores.significance import McNemar, bootstrapped, is_told, verdict

    a, b = ScoredTable.read(run_a), ScoredTable.read(run_b)
    mine, others = a.right, b.right[a.places_in(b)]
    found = bootstrapped(mine, others, num=num, seed=seed)
    test = McNemar.of(mine == 1, others == 1) if a.task == "single" else None
    if output.json:
        pairs = None if test is None else {"only_a": test.only_a, "only_b": test.only_b, "p": test.p}
        show_json(
            {
                "a": run_a,
                "b": run_b,
                "images": len(mine),
                "scores": {"a": float(mine.mean()), "b": float(others.mean())},
                "difference": found.value,
                "interval": list(found.interval),
                "mcnemar": pairs,
                "is_told": is_told(found, test),
            }
        )
        return
    show(verdict((run_a, run_b), found, test, unit=_UNITS[a.task]))
