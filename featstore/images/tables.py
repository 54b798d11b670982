"""Tables: the images that one names, with their labels, splits and groups."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from featstore.images.csv_tables import Reading, classes_of, own_splits, read_table, table_rows
from featstore.images.folders import StrPath, check_is_here, existing_folder
from featstore.images.found import FoundImages
from featstore.images.labels import HELD_OUT, composed, one_label_notes, one_spelling
from featstore.images.names import Task
from featstore.images.object_source import source_below


def table_images(
    path: StrPath,
    *,
    root: StrPath | None,
    path_column: str,
    label_column: str | Sequence[str] | None,
    label_sep: str | None,
    one_hot: Sequence[str] | Literal["*"] | None,
    split_column: str | None,
    valid_column: str | None,
    group_column: str | None,
    task: Task,
    suffix: str | None,
    strip: str | None,
    held_out_classes: bool,
    name: str | None,
) -> FoundImages:
    """The images that a table names; arguments and errors are those of `ImageSet.from_table`."""
    check_is_here(path, "a table")
    file = os.path.abspath(path)
    if label_sep is not None and task != "multi":
        raise ValueError(
            f"label_sep is {label_sep!r} but task is {task!r}, where a cell is one {_CELL.get(task, task)}. "
            "Expected label_sep only with several labels an image. Pass task='multi', or leave label_sep out."
        )
    if valid_column is not None and split_column:
        raise ValueError(
            f"split_column is {split_column!r} and valid_column {valid_column!r}. Expected one column that says "
            "the split. Leave one out."
        )
    values = _value_columns(label_column, one_hot, task)
    labels = None if values or one_hot is not None or not isinstance(label_column, str) else label_column
    folder = os.path.dirname(file) if root is None else existing_folder(root)
    named = [name for name in (path_column, labels, group_column, *values, *(one_hot or ())) if name is not None]
    lines, dialect = read_table(file, path_column, [*named, split_column or "", valid_column or ""])
    if valid_column is not None:
        split_column = None
    elif split_column is None:
        split_column = own_splits(lines, file, named)
    reading = Reading(
        columns={
            "path": path_column,
            "label": labels,
            "split": split_column or None,
            "valid": valid_column,
            "group": group_column,
        },
        label_sep=label_sep,
        values=values,
        task=task,
        suffix=suffix,
        strip=strip,
    )
    if one_hot is not None:
        reading = replace(reading, one_hot=classes_of(lines[0][1], reading, one_hot))
    found, notes = table_rows(lines, file, folder, reading)
    rows, spellings = one_spelling(found)
    return FoundImages(
        rows=rows,
        source=source_below(folder),
        name=name or os.path.splitext(os.path.basename(file))[0],
        task=task,
        is_labelled=label_column is not None or one_hot is not None,
        classes=values or reading.one_hot or None,
        held_out_classes=held_out_classes,
        instead=f"leave the labels out: --label-column '' (in Python: label_column=None), or {HELD_OUT}",
        notes=(*dialect, *notes, *spellings, *one_label_notes(rows)),
        origin={
            "constructor": "from_table",
            "path": os.fspath(path),
            "root": None if root is None else os.fspath(root),
            "path_column": path_column,
            "label_column": label_column if label_column is None or isinstance(label_column, str) else list(values),
            "label_sep": label_sep,
            "one_hot": one_hot if one_hot is None or one_hot == "*" else list(one_hot),
            "split_column": split_column,
            "valid_column": valid_column,
            "group_column": group_column,
            "task": task,
            "suffix": suffix,
            "strip": strip,
            "name": name,
        },
    )


_CELL = {"single": "class", "regression": "number"}


def _value_columns(
    label_column: str | Sequence[str] | None, one_hot: Sequence[str] | Literal["*"] | None, task: Task
) -> tuple[str, ...]:
    """The columns of numbers, for regression; none for other tasks."""
    if task != "regression":
        if label_column is not None and not isinstance(label_column, str):
            raise ValueError(
                f"label_column is {label_column!r} but task is {task!r}. Expected the name of one column; several hold "
                "the numbers of task='regression', or classes by one_hot. Name one, or correct the task."
            )
        return ()
    if one_hot is not None:
        raise ValueError(
            f"one_hot is {one_hot!r} but task is 'regression', where nothing is a class. Expected the columns of "
            "numbers in label_column. Leave one_hot out, or correct the task."
        )
    names = [label_column] if isinstance(label_column, str) else list(label_column or ())
    columns = tuple(map(composed, names))
    if twice := next((name for name in columns if columns.count(name) > 1), None):
        raise ValueError(f"The column {twice} is named twice in label_column {', '.join(columns)}. Name it once.")
    return columns
