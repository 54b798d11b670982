"""Parquet tables: their columns as the cells that other tables of images have; one of two doors to pyarrow."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from featstore.errors import FeatureStoreError

if TYPE_CHECKING:
    import pyarrow as pa

PARQUET = ".parquet"

SEVERAL = "\x1f"
"""Stands between the labels of a cell that is a list: ASCII's separator of units, which no label has."""


def read_parquet(file: str, path_column: str, used: Collection[str] = ()) -> list[tuple[int, list[str]]]:
    """The header and the rows of a table, each with its number: 0 is the header; nulls are empty cells.

    Columns of what is no text, number or list of these are left out.

    Raises:
        ValueError: if it can't be read as Parquet, holds the images themselves instead of paths, or in one of the
            columns `used` what is none of these.
        FeatureStoreError: without pyarrow.
    """
    try:
        import pyarrow.parquet as pq
    except ImportError as error:
        raise FeatureStoreError(
            f"{file} needs pyarrow, which isn't installed. Expected it for .parquet alone. Install it with pip install "
            "'featstore[parquet]', or give a .csv or .tsv table."
        ) from error
    try:
        schema = pq.read_schema(file)
        names = [field.name for field in schema if _is_readable(field.type)]
        if path_column not in names and (held := [field.name for field in schema if _holds_images(field.type)]):
            raise ValueError(
                f"{file} holds the images themselves, in its column {held[0]!r}, and no paths in a column "
                f"{path_column!r}. Expected paths of files. Give it as a data set: ImageSet.from_dataset("
                f"datasets.load_dataset('parquet', data_files={file!r}, split='train'))."
            )
        for field in schema:
            if field.name in used and not _is_readable(field.type):
                raise ValueError(
                    f"{file} has {field.type} in the column {field.name!r}. Expected text, numbers, or lists of these. "
                    "Write the column as text, or name another."
                )
        with pq.ParquetFile(file) as opened:  # which reads each of several columns of one name
            table = opened.read(columns=list(dict.fromkeys(names)))
    except OSError as error:  # pyarrow's own errors about a file are ValueErrors
        raise ValueError(f"{file} can't be read ({error}). Expected a table of images. Correct the path.") from error
    except _arrow_error() as error:
        raise ValueError(
            f"{file} can't be understood as Parquet ({error}). Expected a whole file. Write it again, or name another."
        ) from error
    places = [place for place, field in enumerate(table.schema) if _is_readable(field.type)]
    texts = [[_cell(value) for value in table.column(place).to_pylist()] for place in places]
    header = [table.column_names[place] for place in places]
    return [(0, header), *enumerate(map(list, zip(*texts, strict=True)), start=1)]


def _arrow_error() -> type[Exception]:
    import pyarrow as pa

    error: type[Exception] = pa.ArrowException
    return error


def _is_readable(kind: pa.DataType) -> bool:
    import pyarrow.types as types

    if types.is_dictionary(kind):
        return _is_readable(kind.value_type)
    if types.is_list(kind) or types.is_large_list(kind):
        return _is_readable(kind.value_type)
    is_text = types.is_string(kind) or types.is_large_string(kind)
    is_number = types.is_integer(kind) or types.is_floating(kind) or types.is_decimal(kind)
    return bool(is_text or is_number or types.is_boolean(kind))


def _holds_images(kind: pa.DataType) -> bool:
    """Whether a column holds encoded files, alone or as Hugging Face's struct of bytes and path."""
    import pyarrow.types as types

    if types.is_struct(kind):
        return any(field.name == "bytes" and _holds_images(field.type) for field in kind)
    return bool(types.is_binary(kind) or types.is_large_binary(kind))


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, list):
        return SEVERAL.join(map(_cell, value))
    return str(value)
