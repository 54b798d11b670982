"""Tables of images: a ``.csv``, ``.tsv`` or ``.parquet`` file with a header, read into a row for each image."""

from __future__ import annotations

import ast
import csv
import math
import os
import re
import shlex
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal, TextIO

from featstore.images.labels import NO_LABEL, Row, checked_values, composed
from featstore.images.names import IMAGE_SUFFIXES, OWN_SPLITS, Task, split_named
from featstore.images.parquet_tables import PARQUET, SEVERAL, read_parquet
from featstore.words import counted

_SPLIT_NAMES = ("splits", "subset", "partition")
"""Other columns that splits are read from, if all that they say is splits."""

Line = tuple[int, list[str]]  # where it starts, and its cells


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How the cells of a table are read, see `ImageSet.from_table`.

    Attributes:
        columns: the names of the columns "path", "label", "split", "valid" and "group"; None for what isn't read.
        label_sep: between the labels of a cell; None where a cell is one label.
        one_hot: columns that are a class each.
        values: columns of numbers, which are what is learnt.
        task: one class an image, any number, or numbers.
        suffix: of the files, where the table leaves it out.
        strip: what paths begin with and no longer lie in.
    """

    columns: dict[str, str | None]
    label_sep: str | None = None
    one_hot: tuple[str, ...] = ()
    values: tuple[str, ...] = ()
    task: Task = "single"
    suffix: str | None = None
    strip: str | None = None


def read_table(file: str, path_column: str, used: Collection[str] = ()) -> tuple[list[Line], tuple[str, ...]]:
    """The lines that are not empty, each with the number it starts at, and notes; the header and at least one more.

    Cells lie between commas in a ``.csv`` and tabs in a ``.tsv``, unless the header is made of something else.
    """
    own = {".csv": ",", ".tsv": "\t"}.get(os.path.splitext(file)[1].lower())
    if file.lower().endswith(PARQUET):
        return _with_rows(read_parquet(file, path_column, used), file), ()
    if own is None:
        raise ValueError(
            f"{file} is no table by its suffix. Expected .csv (commas), .tsv (tabs) or .parquet. Rename or convert it."
        )
    lines: list[Line] = []
    start, separator, encoding = 1, own, "utf-8-sig"
    try:
        encoding = _encoding(file)
        # Names of files need not be UTF-8; what isn't survives as os.fsdecode would have it.
        errors = "surrogateescape" if encoding == "utf-8-sig" else "strict"
        with open(file, newline="", encoding=encoding, errors=errors) as stream:
            separator, num_before = _separator(stream, own, path_column)
            reader = csv.reader(stream, delimiter=separator, strict=True, skipinitialspace=True)
            start += num_before
            for cells in reader:
                if cells:
                    lines.append((start, cells))
                start = reader.line_num + num_before + 1
    except OSError as error:
        raise ValueError(
            f"{file} can't be read ({error.strerror}). Expected a table of images. Correct the path."
        ) from error
    except (csv.Error, UnicodeError) as error:
        raise ValueError(
            f"{file} can't be understood at line {start} ({error}). Expected rows of cells separated by "
            f"{separator!r}. Correct the line."
        ) from error
    _with_rows(lines, file)
    notes = _encoding_notes(lines, file)
    found = [f"cells separated by {separator!r}"] * (separator != own) + ["UTF-16"] * (encoding != "utf-8-sig")
    return lines, (*([f"{os.path.basename(file)} is read as {' and '.join(found)}"] if found else []), *notes)


def _with_rows(lines: list[Line], file: str) -> list[Line]:
    if len(lines) < 2:
        raise ValueError(
            f"{file} holds {'only a header' if lines else 'nothing'}. Expected a header and a row for each image. "
            "Add the rows, or name another file."
        )
    return lines


def _encoding_notes(lines: list[Line], file: str) -> list[str]:
    """A note about lines that aren't UTF-8: names of files needn't be, but a label would be a class of its own."""
    odd = [start for start, cells in lines if any(not cell.isascii() and _BYTES.search(cell) for cell in cells)]
    if not odd:
        return []
    name = os.path.basename(file)
    return [
        f"{counted(len(odd), 'line')} of {name} (the first is {odd[0]}) {'is' if len(odd) == 1 else 'are'} not UTF-8, "
        "and match no name that is; if the table is in Latin-1, convert it: "
        f"iconv -f latin1 -t utf-8 {shlex.quote(name)} > utf8.csv"
    ]


_BYTES = re.compile("[\udc80-\udcff]")  # as which surrogateescape keeps what it can't decode


def _encoding(file: str) -> str:
    """UTF-16 with a byte order mark or, as a header is mostly ASCII, with a zero in its first letter; else UTF-8."""
    with open(file, "rb") as stream:
        first = stream.read(2)
    if first in (b"\xff\xfe", b"\xfe\xff"):
        return "utf-16"
    return "utf-16-le" if first[1:] == b"\0" else "utf-16-be" if first[:1] == b"\0" else "utf-8-sig"


_SEPARATORS = (",", ";", "\t", "|")


def _separator(stream: TextIO, own: str, path_column: str) -> tuple[str, int]:
    """What separates the cells of the header, and how many lines come before it: Excel's ``sep=;``.

    The table's own separator, unless only another one gives the column of paths, or gives columns at all.
    """
    begin, num_before, header = stream.tell(), 0, "\n"
    while header and not header.strip():
        header = stream.readline()
    if match := re.fullmatch(r'"?sep=(.)"?\s*', header):
        return match[1], 1
    stream.seek(begin)
    cells = {
        each: [composed(cell.strip()) for cell in next(csv.reader([header], delimiter=each, skipinitialspace=True), [])]
        for each in (own, *_SEPARATORS)
    }
    named = [each for each, names in cells.items() if composed(path_column) in names]
    if named or len(cells[own]) > 1:
        return named[0] if named else own, num_before
    return max(cells, key=lambda each: len(cells[each])), num_before


def own_splits(table: list[Line], file: str, named: Iterable[str | None]) -> str | None:
    """The column for splits that nothing else was said about, as the header writes it.

    Raises:
        ValueError: if several may be it.
    """
    names = [composed(cell.strip()) for cell in table[0][1]]
    taken = {composed(name) for name in named if name is not None}
    free = [name for name in names if name not in taken]
    if OWN_SPLITS in free:
        return OWN_SPLITS
    found = [name for name in free if name.lower() == OWN_SPLITS]
    found = found or [name for name in free if name.lower() in _SPLIT_NAMES and _are_splits(_cells(table, name))]
    if len(found) > 1:
        raise ValueError(
            f"{file} has the columns {' and '.join(found)}. Expected one that says the split. Name it with "
            "--split-column NAME (in Python: split_column=NAME), or use none: --split-column '' (split_column=\"\")."
        )
    return found[0] if found else None


def _cells(table: list[Line], name: str) -> list[str]:
    """All cells of a column that were written."""
    at = [composed(cell.strip()) for cell in table[0][1]].index(name)
    return [cells[at] for _, cells in table[1:] if at < len(cells)]


def _are_splits(cells: list[str]) -> bool:
    return all(split_named(cell) is not None for cell in cells) and any(cell.strip() for cell in cells)


def classes_of(header: list[str], reading: Reading, one_hot: Sequence[str] | Literal["*"]) -> tuple[str, ...]:
    """The columns that are a class each: those that were named, or for ``*`` all that nothing else is read from.

    Raises:
        ValueError: if there are none.
    """
    taken = {composed(name) for name in reading.columns.values() if name is not None}
    names = [composed(cell.strip()) for cell in header]
    free = tuple(name for name in names if name not in taken and name.lower() != OWN_SPLITS)
    classes = free if one_hot == "*" else tuple(map(composed, one_hot))
    if not classes:
        raise ValueError(
            f"--one-hot (in Python: one_hot) names no column, so there is no class; the table has {', '.join(free)} "
            "besides. Expected the columns of 0 and 1. Name them, or leave it out."
        )
    return classes


def table_rows(table: list[Line], file: str, folder: str, reading: Reading) -> tuple[list[Row], tuple[str, ...]]:
    """A row for each line of a table, see `ImageSet.from_table`, and notes.

    Args:
        table: its lines, the header first.
        file: it was read from, for messages.
        folder: absolute; paths are below it.
        reading: how cells are read.
    """
    (_, header), *body = table
    places = _places(table, reading, file, folder)
    of_class = {name: places[f"class {name}"] for name in reading.one_hot}
    of_value = {name: places[f"value {name}"] for name in reading.values}
    word = _word(file)
    rows: list[Row] = []
    lines: dict[str, int] = {}
    num_slashed = num_stripped = 0
    for line, cells in body:
        where = f"{word} {line} of {file}"
        if len(cells) != len(header):
            raise ValueError(
                f"{where} has {counted(len(cells), 'cell')}. Expected {len(header)}, as the header has. "
                "Quote cells that contain the separator."
            )
        cell, was_stripped = _path_cell(cells[places["path"]], reading)
        num_slashed += "\\" in cells[places["path"]]
        num_stripped += was_stripped
        full, image = _table_path(cell, folder, where)
        place = composed(full)  # two spellings of a name are one file on macOS, and in most people's minds
        if place in lines:
            raise ValueError(
                f"{file} names {image} twice, in {word} {lines[place]} and in {word} {line}. "
                f"Expected every image once. Delete one of the {word}s."
            )
        lines[place] = line
        rows.append(
            Row(
                image=image,
                labels=(
                    _one_hot_labels(cells, of_class, reading.task, where)
                    if of_class
                    else _table_labels(cells[places["label"]], reading, where)
                    if "label" in places
                    else ()
                ),
                split=(
                    _valid_split(cells[places["valid"]], where)
                    if "valid" in places
                    else _table_split(cells[places["split"]], where, table, places["split"])
                    if "split" in places
                    else ""
                ),
                group=_table_group(cells[places["group"]], where) if "group" in places else None,
                where=where,
                values=_values(cells, of_value, where),
            )
        )
    if reading.strip is not None and not num_stripped:
        raise ValueError(
            f"no path of {file} begins with {reading.strip} (the first is {body[0][1][places['path']]}). Expected what "
            "--strip (in Python: strip) names at the start of paths. Correct it, or leave it out."
        )
    notes = [f"backslashes in {counted(num_slashed, 'path')} are read as slashes"] if num_slashed else []
    return rows, (*notes, *_unused_notes(table, reading, folder, places))


def _places(table: list[Line], reading: Reading, file: str, folder: str) -> dict[str, int]:
    """Where each column that was named stands; that of a class as ``class NAME``."""
    names = [composed(cell.strip()) for cell in table[0][1]]
    wanted = {
        **{what: column and composed(column) for what, column in reading.columns.items()},
        **{f"class {name}": name for name in reading.one_hot},
        **{f"value {name}": name for name in reading.values},
    }
    for what, column in wanted.items():
        if column is not None and names.count(column) != 1:
            if what == "path" and (image := next(filter(_is_image, names), None)) is not None:
                raise ValueError(
                    f"{file} has no header: its first line names an image, {image}. Expected the columns' names above "
                    f"the images. Add a line such as {wanted['path']}{_cells_after(wanted, names)} at the top."
                )
            count = f"{names.count(column) or 'no'} column{'s' if column in names else ''} {column!r}"
            has = f"{file} has {count}; it has {', '.join(map(repr, names))}"
            if column in reading.values:
                raise ValueError(
                    f"{has}. Expected a column of numbers. Name one, or several with commas between them, with "
                    "--label-column (in Python: label_column)."
                )
            if what not in reading.columns:
                raise ValueError(
                    f"{has}. Expected a column of 0 and 1 for each class. Correct --one-hot (in Python: one_hot)."
                )
            instead = {
                "label": "; if nothing is labelled, say --label-column '' (label_column=None)",
                "split": "; to use none, say --split-column '' (split_column=\"\")",
            }.get(what, "")
            raise ValueError(
                f"{has}. Expected one column with each image's {what}{_proposal(table, wanted, folder)}. "
                f"Name it with --{what}-column NAME (in Python: {what}_column=NAME){instead}."
            )
    return {what: names.index(column) for what, column in wanted.items() if column is not None}


_PATH_NAMES = ("path", "file", "filename", "file_name", "filepath", "file_path", "image", "image_path", "image_name",
               "image_id", "img", "name", "fname", "id")  # fmt: skip
_LABEL_NAMES = ("label", "labels", "class", "class_name", "category", "breed", "species", "target", "tags", "diagnosis",
                "dx", "y")  # fmt: skip
_VALID_NAMES = ("is_valid", "valid", "is_val", "val")
_FEW_LINES = 100
"""Of a table, that are looked at for what a column may be."""


def _proposal(table: list[Line], wanted: dict[str, str | None], folder: str) -> str:
    """Which columns may be the missing ones, as flags and arguments; nothing where none looks like it."""
    names = [composed(cell.strip()) for cell in table[0][1]]
    columns = {
        name: [cells[at] for _, cells in table[1:_FEW_LINES] if at < len(cells)] for at, name in enumerate(names)
    }
    free = [name for name in names if name not in wanted.values()]
    found: dict[str, str] = {}
    if wanted["path"] not in names:
        by_cells = [name for name in free if _share_of_images(columns[name]) > 0.5]
        path = next(iter(by_cells + _known(free, _PATH_NAMES)), None)
        if path is not None:
            found["path_column"] = path
            suffix = "" if by_cells else _lacking_suffix(columns[path], folder)
            found |= {"suffix": suffix} if suffix else {}
            free.remove(path)
    if wanted["label"] is not None and wanted["label"] not in names:
        label = next(iter(_known(free, _LABEL_NAMES)), None)
        found |= {"one_hot": "*"} if label is None and _are_classes(free, table) else {}
        found |= {} if label is None else {"label_column": label}
    if not found:
        return ""
    flags = " ".join(f"--{name.replace('_', '-')} {shlex.quote(value)}" for name, value in found.items())
    return f", maybe {flags} (in Python: {', '.join(f'{name}={value!r}' for name, value in found.items())})"


def _are_classes(names: list[str], table: list[Line]) -> bool:
    """Whether these columns may be a class each: several, of nothing but 0 and 1."""
    columns = [_cells(table, name) for name in names if name.lower() != OWN_SPLITS]
    return len(columns) > 1 and all(cell.strip() in ("0", "1", "0.0", "1.0") for cells in columns for cell in cells)


def _cells_after(wanted: dict[str, str | None], names: list[str]) -> str:
    """The rest of a header for a table that lacks one, as far as its first line shows what it holds."""
    return f",{wanted['label'] or 'label'}" if len(names) == 2 else ",..." if len(names) > 2 else ""


def _known(names: list[str], known: tuple[str, ...]) -> list[str]:
    return sorted((name for name in names if name.lower() in known), key=lambda name: known.index(name.lower()))


def _share_of_images(cells: list[str]) -> float:
    return sum(map(_is_image, cells)) / max(1, len(cells))


def _is_image(cell: str) -> bool:
    return cell.strip().lower().endswith(IMAGE_SUFFIXES)


def _lacking_suffix(cells: list[str], folder: str) -> str | None:
    """The suffix with which the first of these names is a file below the folder, where it is none without."""
    path = os.path.join(folder, cells[0]) if cells and cells[0] else None
    if path is None or os.path.lexists(path):
        return None
    return next((suffix for suffix in IMAGE_SUFFIXES if os.path.lexists(path + suffix)), None)


def _unused_notes(table: list[Line], reading: Reading, folder: str, places: dict[str, int]) -> list[str]:
    """What a table seems to say that isn't used."""
    names = [composed(cell.strip()) for cell in table[0][1]]
    notes = []
    paths = [cells[places["path"]] for _, cells in table[1:_FEW_LINES]]
    if reading.suffix is None and (suffix := _lacking_suffix(paths, folder)):
        notes.append(f"the files end with {suffix}, which the table leaves out: say --suffix {suffix}")
    if not {"split", "valid"} & places.keys():
        free = [name for at, name in enumerate(names) if at not in places.values()]
        notes += [
            f"the table's column {name} isn't used; if it says what is held out: --valid-column {shlex.quote(name)}"
            for name in _known(free, _VALID_NAMES)[:1]
        ]
    return notes


def _path_cell(cell: str, reading: Reading) -> tuple[str, bool]:
    """A path with slashes, its suffix and without what it no longer lies in; whether it had that."""
    path = cell.replace("\\", "/")
    if path and reading.suffix is not None and not path.lower().endswith((reading.suffix.lower(), *IMAGE_SUFFIXES)):
        path += reading.suffix
    if reading.strip is None:
        return path, False
    from featstore.images.sources import without_start  # numpy, which a program's help doesn't wait for

    rest = without_start(path, reading.strip)
    return rest, rest != path


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


def _table_labels(cell: str, reading: Reading, where: str) -> tuple[str, ...]:
    pieces = [cell] if reading.label_sep is None else cell.split(reading.label_sep)
    if SEVERAL in cell:
        pieces = cell.split(SEVERAL)
        if reading.task != "multi":
            raise ValueError(
                f"{where} has the labels {', '.join(pieces)}. Expected one class, as the task is {reading.task}. "
                "Say --task multi (in Python: task='multi'), or name another column."
            )
    _refuse_list(cell.strip(), reading.label_sep, where)
    return tuple(name for name in map(str.strip, pieces) if name not in NO_LABEL)


def _refuse_list(cell: str, label_sep: str | None, where: str) -> None:
    """Refuses a list as Python or JSON writes it: its brackets and quotes would become parts of class names."""
    if not cell or (cell[0], cell[-1]) not in (("[", "]"), ("(", ")"), ("{", "}")):
        return
    is_list = label_sep is not None and cell[0] == "["
    with suppress(ValueError, SyntaxError, MemoryError, RecursionError):
        is_list = is_list or isinstance(ast.literal_eval(cell), list | tuple | set)
    if is_list:
        names = [piece.strip(" \t\"'") for piece in cell[1:-1].split(",")]
        plain = (label_sep or ";").join(name for name in names if name)
        raise ValueError(
            f"{where} has the label {cell}, a list with brackets. Expected the names alone, such as {plain!r} with "
            f"--task multi --label-sep {shlex.quote(label_sep or ';')} (in Python: task='multi', "
            f"label_sep={label_sep or ';'!r}). Write the column so."
        )


_YES, _NO = ("1", "1.0", "true", "yes", "t", "y"), ("0", "0.0", "false", "no", "f", "n", "")


def _is_yes(cell: str, where: str, what: str) -> bool:
    word = cell.strip().lower()
    if word not in (*_YES, *_NO):
        raise ValueError(f"{where} has {cell!r} in the column {what}. Expected 0 or 1, or true or false. Correct it.")
    return word in _YES


def _one_hot_labels(cells: list[str], of_class: dict[str, int], task: Task, where: str) -> tuple[str, ...]:
    names = tuple(name for name, place in of_class.items() if _is_yes(cells[place], where, name))
    if task == "single" and len(names) > 1:
        raise ValueError(
            f"{where} has {counted(len(names), 'class')}: {', '.join(names)}. Expected one, as the task is single. "
            "Correct the line, or say --task multi (in Python: task='multi')."
        )
    return names


def _values(cells: list[str], of_value: dict[str, int], where: str) -> tuple[float, ...]:
    found = []
    for name, place in of_value.items():
        try:
            cell = cells[place].strip()
            if "_" in cell:  # which Python takes for a number, and other programs don't
                raise ValueError(cell)
            found.append(float(cell or math.nan))
        except ValueError as error:
            raise ValueError(
                f"{where} has {cells[place]!r} in the column {name}. Expected a number, or nothing, as the task is "
                "regression. Correct the cell, or name another column with --label-column (in Python: label_column)."
            ) from error
    return checked_values(tuple(found), tuple(of_value), where)


def _word(file: str) -> str:
    """What a person calls a line of a table."""
    return "row" if file.lower().endswith(PARQUET) else "line"


def _valid_split(cell: str, where: str) -> str:
    return "valid" if _is_yes(cell, where, "of what is held out") else "train"


def _table_split(cell: str, where: str, table: list[Line], place: int) -> str:
    split = split_named(cell)
    if split is None:
        column = table[0][1][place].strip()
        held_out = ""
        if all(cells[place].strip().lower() in (*_YES, *_NO) for _, cells in table[1:] if place < len(cells)):
            held_out = f"; if 1 says what is held out: --valid-column {shlex.quote(column)} (valid_column={column!r})"
        raise ValueError(
            f"{where} has the split {cell!r}. Expected train, valid (or val), test, or nothing. Correct the cell, name "
            "another column of splits with --split-column NAME (in Python: split_column=NAME), or use none, to split "
            f"anew: --split-column '' (split_column=\"\"){held_out}."
        )
    return split


def _table_group(cell: str, where: str) -> str:
    if not cell.strip():
        raise ValueError(
            f"{where} has no group. Expected one for every image, as groups stay together in one split. "
            "Fill the cell in (an image alone is a group of its own)."
        )
    return cell.strip()
