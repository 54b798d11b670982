"""The command `report`: one HTML page to look at saved runs and at what they make of images."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from featstore.cli.flags import ImageFlags, OutputFlags, TrustOption, open_store, spread
from featstore.cli.program import one_of, show, show_json, tell_all
from featstore.errors import DamagedFileError
from featstore.images.names import SPLITS
from training import choices
from training.cli.asked import for_run, labelled_as
from training.cli.run_commands import FileFlags

if TYPE_CHECKING:
    from featstore.images.image_set import ImageSet
    from training.loop.lr_find import LearningRates


@dataclass(frozen=True, kw_only=True)
class ReportImageFlags(ImageFlags):
    """The images that the runs are looked at with, if any."""

    images: Annotated[
        str,
        typer.Option(
            metavar="FOLDER|TABLE|SHARDS",
            help="Labelled images, for all that a report shows of images; without: a table of runs and their curves.",
            show_default=False,
        ),
    ] = ""

    def of_runs(self, runs: Sequence[str]) -> ImageSet | None:
        """The images, dealt as the first run dealt them unless they, or flags, say otherwise; None if none are given.

        Args:
            runs: saved runs, or folders of them.
        """
        if not self.images:
            told = [each.name for each in fields(self) if getattr(self, each.name) != each.default]
            if told:
                raise ValueError(f"--{told[0].replace('_', '-')} belongs to images. Give these with --images.")
            return None
        from training.experiments.reports import first_run  # torch

        run = str(first_run(runs))
        flags = labelled_as(run, self)
        given = for_run(run, flags, flags.given())
        tell_all(given.notes)
        return given.images


@spread
def report(
    runs: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN_DIR...", help="Saved runs, or the folder of a run with --folds.", show_default=False
        ),
    ],
    images: ReportImageFlags,
    output: OutputFlags,
    files: FileFlags,
    out: Annotated[str, typer.Option(metavar="FILE.html", help="The new page.")],
    store: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="Where features are looked up.", show_default="the run's own store"),
    ] = None,
    split: Annotated[
        str, typer.Option(metavar="|".join(SPLITS), help="Which images are scored; the map shows all.")
    ] = "valid",
    details: Annotated[
        str | None,
        typer.Option(
            metavar="RUN_DIR",
            help="Which of several runs is looked at.",
            show_default="that of the best validation score",
        ),
    ] = None,
    lr_csv: Annotated[
        str | None,
        typer.Option("--lr-csv", metavar="FILE.csv", help="What lr-find wrote with --csv, to be shown as a curve."),
    ] = None,
    projection: Annotated[
        str,
        typer.Option(
            metavar="|".join(choices.PROJECTIONS), help="Of the map; tsne takes a minute, umap needs umap-learn."
        ),
    ] = "pca",
    trust_code: TrustOption = False,
) -> None:
    """Write one HTML page to look at runs: table, curves, what is confused, images, a map; needs plotly."""
    one_of("--split", split, SPLITS)
    method = one_of("--projection", projection, choices.PROJECTIONS)
    if not out.lower().endswith((".html", ".htm")):
        raise ValueError(f"--out is {out!r}. Expected a name that ends in .html.")
    files.check_free(out)
    rates = None if lr_csv is None else _read_curve(Path(lr_csv))
    feature_store = None if store is None else open_store(store)
    given = images.of_runs(runs if details is None else [details])
    from training.experiments.reports import report as write

    found = write(
        runs,
        out=out,
        images=given,
        store=feature_store,
        split=split,
        details=details,
        learning_rates=rates,
        projection=method,
        trust_code=trust_code,
    )
    tell_all(found.notes)
    if output.json:
        show_json(found.facts())
    else:
        show(str(found))


def _read_curve(path: Path) -> LearningRates:
    """What `lr-find --csv` wrote; the suggestion isn't in it."""
    from training.loop.lr_find import LearningRates

    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = [(float(row["lr"]), float(row["loss"]), float(row["smoothed"])) for row in csv.DictReader(file)]
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedFileError(
            f"{path} is no table of lr-find ({error!r}). Expected the columns lr, loss and smoothed. Write it anew: "
            "featstore-train lr-find ... --csv FILE.csv."
        ) from error
    lrs, losses, smoothed = zip(*rows, strict=True) if rows else ((), (), ())
    return LearningRates(tuple(lrs), tuple(losses), tuple(smoothed), float("nan"))
