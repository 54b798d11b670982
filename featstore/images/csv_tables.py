"""Tables of images: a ``.csv`` or ``.tsv`` file with a header, read into a row for each image."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable

from featstore.images.labels import Row, composed, split_named
from featstore.words import counted

OWN_SPLITS = "split"
"""The column that a table's splits are read from where none is named, if it has one."""

Line = tuple[int, list[str]]  # where it starts, and its cells


def read_table(file: str) -> list[Line]:
    """The lines that are not empty, each with the number it starts at; the header and at least one more."""
    separator = {".csv": ",", ".tsv": "\t"}.get(os.path.splitext(file)[1].lower())
    if separator is None:
        raise ValueError(
            f"{file} is no table by its suffix. Expected .csv (commas) or .tsv (tabs). Rename or convert it."
        )
    lines: list[Line] = []
    start = 1
    try:
        # Names of files need not be UTF-8; what isn't survives as os.fsdecode would have it.
        with open(file, newline="", encoding="utf-8-sig", errors="surrogateescape") as stream:
            reader = csv.reader(stream, delimiter=separator, strict=True, skipinitialspace=True)
            for cells in reader:
                if cells:
                    lines.append((start, cells))
                start = reader.line_num + 1
    except OSError as error:
        raise ValueError(
            f"{file} can't be read ({error.strerror}). Expected a table of images. Correct the path."
        ) from error
    except csv.Error as error:
        raise ValueError(
            f"{file} can't be understood at line {start} ({error}). Expected rows of cells separated by "
            f"{separator!r}. Correct the line."
        ) from error
    if len(lines) < 2:
        raise ValueError(
            f"{file} holds {'only a header' if lines else 'nothing'}. Expected a header and a row for each image. "
            "Add the rows, or name another file."
        )
    return lines


def holds_splits(header: list[str], named: Iterable[str | None]) -> bool:
    """Whether a table has a column for splits that nothing else was said about."""
    return OWN_SPLITS in {cell.strip() for cell in header} - {*named}


def table_rows(
    table: list[Line], file: str, folder: str, columns: dict[str, str | None], label_sep: str | None
) -> list[Row]:
    """A row for each line of a table, see `ImageSet.from_csv`.

    Args:
        table: its lines, the header first.
        file: it was read from, for messages.
        folder: absolute; paths are below it.
        columns: the names of the columns "path", "label", "split" and "group"; None for what isn't read.
        label_sep: between the labels of a cell; None where a cell is one label.
    """
    (_, header), *body = table
    places = _places(header, columns, file)
    rows: list[Row] = []
    lines: dict[str, int] = {}
    for line, cells in body:
        where = f"line {line} of {file}"
        if len(cells) != len(header):
            raise ValueError(
                f"{where} has {counted(len(cells), 'cell')}. Expected {len(header)}, as the header has. "
                "Quote cells that contain the separator."
            )
        full, image = _table_path(cells[places["path"]], folder, where)
        place = composed(full)  # two spellings of a name are one file on macOS, and in most people's minds
        if place in lines:
            raise ValueError(
                f"{file} names {image} twice, in line {lines[place]} and in line {line}. "
                "Expected every image once. Delete one of the lines."
            )
        lines[place] = line
        rows.append(
            Row(
                image=image,
                labels=_table_labels(cells[places["label"]], label_sep) if "label" in places else (),
                split=_table_split(cells[places["split"]], where) if "split" in places else "",
                group=_table_group(cells[places["group"]], where) if "group" in places else None,
                where=where,
            )
        )
    return rows


def _places(header: list[str], columns: dict[str, str | None], file: str) -> dict[str, int]:
    """Where each column that was named stands."""
    names = [composed(cell.strip()) for cell in header]
    columns = {what: column and composed(column) for what, column in columns.items()}
    for what, column in columns.items():
        if column is not None and names.count(column) != 1:
            instead = {
                "label": "; if nothing is labelled, say --label-column '' (label_column=None)",
                "split": "; to use none, say --split-column '' (split_column=\"\")",
            }.get(what, "")
            raise ValueError(
                f"{file} has {names.count(column) or 'no'} column{'s' if column in names else ''} {column!r}; it has "
                f"{', '.join(map(repr, names))}. Expected one column with each image's {what}. "
                f"Name it with --{what}-column NAME (in Python: {what}_column=NAME){instead}."
            )
    return {what: names.index(column) for what, column in columns.items() if column is not None}


def _table_path(cell: str, folder: str, where: str) -> tuple[str, str]:
    """The absolute path of an image that a table names, and its id."""
    if not cell:
        raise ValueError(f"{where} names no image. Expected a path. Fill the cell in, or delete the line.")
    full = os.path.normpath(os.path.join(folder, cell))
    root = os.path.join(folder, "")
    if full.startswith(root):
        image = full[len(root) :]
    else:
        image = full if os.path.isabs(cell) else os.path.normpath(cell)
    return full, image.replace(os.sep, "/")


def _table_labels(cell: str, label_sep: str | None) -> tuple[str, ...]:
    pieces = [cell] if label_sep is None else cell.split(label_sep)
    return tuple(piece.strip() for piece in pieces if piece.strip())


def _table_split(cell: str, where: str) -> str:
    split = split_named(cell)
    if split is None:
        raise ValueError(
            f"{where} has the split {cell!r}. Expected train, valid (or val), test, or nothing. Correct the cell, name "
            "another column of splits with --split-column NAME (in Python: split_column=NAME), or use none, to split "
            "anew: --split-column '' (split_column=\"\")."
        )
    return split


def _table_group(cell: str, where: str) -> str:
    if not cell.strip():
        raise ValueError(
            f"{where} has no group. Expected one for every image, as groups stay together in one split. "
            "Fill the cell in (an image alone is a group of its own)."
        )
    return cell.strip()
