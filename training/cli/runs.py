"""The command `runs`: the runs below a folder as a table, filtered and sorted; nothing but their sidecars is read."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from typing import Annotated, Any, Literal

import typer

from featstore.cli.flags import OutputFlags, spread
from featstore.cli.program import show, show_json, tell
from featstore.digest import Json
from featstore.words import some
from training.cli.run_commands import FileFlags
from training.experiments.registry import Order, Runs, cell
from training.experiments.registry import runs as found_below

_CONDITION = re.compile(r"([^<>=!]+)(<=|>=|==?)([^=].*|)", re.DOTALL)


@spread
def runs(
    output: OutputFlags,
    files: FileFlags,
    folder: Annotated[str, typer.Argument(metavar="FOLDER", help="Where runs are, at any depth.")] = "runs",
    sort: Annotated[
        str | None,
        typer.Option(
            metavar="COLUMN[:max|:min]",
            help="Order of the rows: the best score first, else the least.",
            show_default="by name",
        ),
    ] = None,
    where: Annotated[
        list[str] | None,
        typer.Option(
            metavar="COLUMN=VALUE|COLUMN>=NUMBER|COLUMN<=NUMBER", help="Only these runs; may be given several times."
        ),
    ] = None,
    columns: Annotated[
        str | None,
        typer.Option(metavar="A,B,...", help="Columns to show.", show_default="in what runs differ, and their scores"),
    ] = None,
    table: Annotated[
        str | None, typer.Option("--csv", metavar="FILE.csv", help="Also write all columns as a table.")
    ] = None,
) -> None:
    """List saved runs with what decided their numbers and what they scored; those of other images are marked."""
    files.check_free(table)
    found = _filtered(found_below(folder), where or [])
    if sort is not None:
        found = found.query(sort=_order(sort))
    if table is not None:
        found.to_csv(table)
        tell(f"{len(found):,} runs in {table}")
    for name in (columns or "run").split(","):
        found.check_column(name)
    if output.json:
        show_json({"runs": [_row(row, columns) for row in found.table], "damaged": found.damaged})
    else:
        show(found.in_words(None if columns is None else columns.split(",")))


def _order(given: str) -> Order:
    name, colon, direction = given.rpartition(":")
    if not colon:
        return given
    if direction not in ("min", "max"):
        raise ValueError(f"--sort is {given!r}. Expected a column, or one with :max or :min behind it.")
    chosen: Literal["min", "max"] = "max" if direction == "max" else "min"
    return name, chosen


def _filtered(found: Runs, conditions: list[str]) -> Runs:
    tests = [_condition(each) for each in conditions]
    for given, (column, holds) in zip(conditions, tests, strict=True):
        found.check_column(column)
        if len(found) and not any(holds(run[column]) for run in found):
            values = dict.fromkeys(cell(run[column]) for run in found)
            tell(f"no run fits --where {given}; of {column} they have: {some([*values])}")
    return found.query(where=lambda run: all(holds(run[column]) for column, holds in tests))


def _condition(given: str) -> tuple[str, Callable[[Json], bool]]:
    """The column, and whether a value of it will do."""
    parts = _CONDITION.fullmatch(given)
    if parts is None:
        raise ValueError(f"--where is {given!r}. Expected such as cut=layer4, lr=1e-3, accuracy>=0.9 or mix=none.")
    column, sign, value = (part.strip() for part in parts.groups())
    if sign in ("=", "=="):
        return column, lambda found: _is_written(found, value)
    try:
        bound = float(value)
    except ValueError:
        raise ValueError(f"--where {given} compares with {value!r}. Expected a number.") from None
    compared = operator.ge if sign == ">=" else operator.le
    return column, lambda found: isinstance(found, int | float) and compared(found, bound)


def _is_written(value: Json, text: str) -> bool:
    """Whether a column's value may be written so: ``1e-3`` for 0.001, ``1e-5,1e-3`` for a list, ``none`` for None."""
    if value is None:
        return text in ("none", "-", "")
    if isinstance(value, list):
        parts = text.split(",")
        return len(parts) == len(value) and all(map(_is_written, value, parts))
    if isinstance(value, bool):
        return text.lower() in (cell(value), str(value).lower())
    if isinstance(value, int | float):
        try:
            return float(text) == value
        except ValueError:
            return False
    return bool(value == text)


def _row(row: dict[str, Any], columns: str | None) -> dict[str, Any]:
    names = [*row] if columns is None else dict.fromkeys(["run", *columns.split(","), *(["note"] * ("note" in row))])
    return {name: row[name] for name in names}
