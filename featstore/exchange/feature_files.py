"""Feature files: what other programs leave behind - rows, their ids, maybe the images they are of - read in blocks."""

from __future__ import annotations

import io
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import safetensors
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from featstore.digest import Json
from featstore.errors import DamagedFileError
from featstore.exchange.checksums import CHECKSUMS, metadata_checksum, tensor_checksum
from featstore.files.hdf5 import opened_hdf5, own_dataset
from featstore.files.header import is_part
from featstore.files.part import Part
from featstore.files.scaled import ScaledRows
from featstore.files.storage_types import FLOATS, storage_type_of
from featstore.images.csv_tables import read_table
from featstore.images.digests import DigestTable, KnownDigests
from featstore.images.image_set import ImageSet
from featstore.images.names import Task
from featstore.images.sources import AbsentSource
from featstore.store.sets import digest_rows
from featstore.words import counted

FEATURES = "features"
"""What the features are called in a file that can hold several things, if nobody says."""

ID_DATASETS = ("id", "ids", "sample_id")
ID_COLUMNS = ("id", "path")

_BLOCK_BYTES = 8 << 20
_IN_NUMPY = [each.name for each in FLOATS.values() if each.in_numpy == each]
_DOUBLE = torch.float64
"""Read beside the storage types; its numbers are stored as float32."""


@dataclass(frozen=True, kw_only=True, eq=False)
class FeatureFile:
    """What a file holds.

    Attributes:
        rows: the features.
        ids: one a row, where the file has them.
        no_ids: why there are none, where the file has something that is called so.
        images: what an exported file says about the images of its rows, in their order.
    """

    rows: ForeignRows
    ids: tuple[str, ...] | None = None
    no_ids: str | None = None
    images: ImageSet | None = None


@contextmanager
def opened_features(path: Path, *, dataset: str | None = None, id_dataset: str | None = None) -> Iterator[FeatureFile]:
    """What a ``.npy``, HDF5 or ``.safetensors`` file holds; its rows can be read until the block ends.

    Nothing is mapped but ``.safetensors``, by their library: a mapped file that another machine makes shorter kills
    whoever touches what is gone.

    Args:
        path: of the file. Exported ones (``.safetensors`` since they have any, HDF5) and parts of a store are checked
            against their checksums; ``.npy`` has none.
        dataset: name of the features in it; default ``features``.
        id_dataset: name of the ids in an HDF5 file; default: the first of ``id``, ``ids`` and ``sample_id``.

    Raises:
        ValueError: for another ending, no such file, no such dataset, or an array without rows.
        TypeError: for features of another type than float16, float32, float64 and bfloat16.
        DamagedFileError: for a file that can't be read as what its ending says, or is altered.
    """
    suffix = path.suffix.lower()
    if suffix not in _READERS:
        *others, last = _READERS
        raise ValueError(
            f"{path} ends with {suffix or 'no suffix'}, which names no format that is read. Expected "
            f"{', '.join(others)} or {last}. Convert it, or give import_features an array."
        )
    if not path.is_file():
        raise ValueError(f"There is no file {path}. Expected the features to import. Correct the path.")
    with _READERS[suffix](path, dataset, id_dataset) as found:
        yield found


@dataclass(frozen=True, kw_only=True, eq=False)
class IdTable:
    """The ids of a file's rows, in the order of the rows.

    Attributes:
        ids: one a row.
        digests: ``(N, 32)``, the SHA-256 of each image's content, where the table has them.
        columns: of the table; none of a list.
        lines: the line of each id among those below the header, from 0.
        notes: how the table was read, where that isn't what its ending says.
    """

    ids: tuple[str, ...]
    digests: NDArray[np.uint8] | None
    columns: tuple[str, ...]
    lines: tuple[int, ...]
    notes: tuple[str, ...] = ()


def read_ids(path: str | os.PathLike[str], column: str | None = None) -> IdTable:
    """The ids in a text file, one a line, or in the column `id` or `path` of a ``.csv`` or ``.tsv`` with a header.

    A column ``row`` says which row of the features (from 0) a line is about, so a table that was sorted still fits.

    Args:
        path: of the file, UTF-8; a table is read as `ImageSet.from_csv` reads one.
        column: name of the ids' column.

    Raises:
        ValueError: for a file that can't be read, without ids, or whose column ``row`` isn't 0, 1, 2 ... in some order.
    """
    file = Path(path)
    if file.suffix.lower() in (".csv", ".tsv"):
        return _id_table(file, column)
    try:
        # Names may contain any end of a line, so none is translated.
        with file.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as stream:
            text = stream.read()
    except OSError as error:
        raise ValueError(
            f"{file} can't be read ({error.strerror}). Expected the ids of the features' rows. Correct the path."
        ) from error
    # splitlines would break names with rarer characters
    ids = tuple(line for line in text.replace("\r\n", "\n").split("\n") if line)
    if not ids:
        raise ValueError(f"{file} holds no ids. Expected one for each row of features. Give the file that lists them.")
    return IdTable(ids=ids, digests=None, columns=(), lines=tuple(range(len(ids))))


@dataclass(frozen=True, kw_only=True, eq=False)
class ForeignRows:
    """Features somewhere else than in a store, to be read block by block.

    Attributes:
        num_rows: N, at least 1.
        shape: ``*F``.
        dtype: as they are there: float16, float32, float64 or bfloat16.
        read: rows from a place up to another one, on the CPU; not to be written to.
    """

    num_rows: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[int, int], Tensor]

    def __post_init__(self) -> None:
        whole = (self.num_rows, *self.shape)
        if not self.shape or 0 in whole:
            raise ValueError(
                f"The features have the shape {whole}. Expected (N, *F): a row for each image, with a value at least. "
                "Give an array of two dimensions or more."
            )
        if self.dtype != _DOUBLE and storage_type_of(self.dtype) is None:
            raise _wrong_type(str(self.dtype).removeprefix("torch."))

    def blocks(self, *, progress: bool, verb: str) -> Iterator[tuple[int, Tensor]]:
        """All rows in order, some at a time, each piece with the place of its first row; a bar says `verb`."""
        step = max(1, _BLOCK_BYTES // (math.prod(self.shape) * self.dtype.itemsize))
        is_shown = progress and sys.stderr.isatty()
        with tqdm(total=self.num_rows, unit="row", desc=verb, disable=not is_shown, file=sys.stderr) as bar:
            for start in range(0, self.num_rows, step):
                block = self.read(start, min(start + step, self.num_rows))
                yield start, block
                bar.update(len(block))


def rows_of(features: object) -> ForeignRows:
    """The rows of a tensor or an array ``(N, *F)``, which may be mapped from a file.

    Raises:
        ValueError: for no rows, or rows without values.
        TypeError: for anything else, and other numbers than float16, float32, float64 and bfloat16.
    """
    if isinstance(features, Tensor):
        whole = features.detach()
        return ForeignRows(
            num_rows=len(whole) if whole.ndim else 0,
            shape=tuple(whole.shape[1:]),
            dtype=whole.dtype,
            read=lambda start, stop: whole[start:stop].cpu(),
        )
    if isinstance(features, np.ndarray):
        return _rows_of_array(features)
    raise TypeError(
        f"features is a {type(features).__name__}. Expected a numpy array or a torch tensor (N, *F). Convert it."
    )


# ---- Files


@dataclass(frozen=True, kw_only=True, eq=False)
class _PlainArray:
    """An array in an open file, which gives slices of rows by plain reads.

    Attributes:
        path: of the file.
        file: it.
        offset: where the array begins in it, in bytes.
        shape: ``(N, *F)``.
        dtype: as it lies there.
        is_fortran: whether the first dimension varies fastest.
    """

    path: Path
    file: io.BufferedReader
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    is_fortran: bool = False

    def __getitem__(self, rows: slice) -> NDArray[Any]:
        num_rows, *row_shape = self.shape
        start, stop, _ = rows.indices(num_rows)
        row_values, count = math.prod(row_shape), stop - start
        if not self.is_fortran:
            return self._read(start * row_values, count * row_values).reshape(count, *row_shape)
        # One value of all rows lies together, and then the next value of all.
        values = [self._read(place * num_rows + start, count) for place in range(row_values)]
        return np.stack(values).reshape(*reversed(row_shape), count).T

    def _read(self, first: int, count: int) -> NDArray[Any]:
        values = np.empty(count, self.dtype)
        self.file.seek(self.offset + first * self.dtype.itemsize)
        if self.file.readinto(values.view(np.uint8).data) < values.nbytes:
            raise DamagedFileError(
                f"{self.path} is truncated: it ends within its features. Expected {math.prod(self.shape):,} values. "
                "Give an undamaged copy."
            )
        return values


@contextmanager
def _opened_npy(path: Path, dataset: str | None, id_dataset: str | None) -> Iterator[FeatureFile]:
    with path.open("rb") as file:
        yield FeatureFile(rows=_rows_of_array(_npy_array(path, file)))


def _npy_array(path: Path, file: io.BufferedReader) -> _PlainArray:
    try:
        version = np.lib.format.read_magic(file)
        if version not in _NPY_HEADERS:
            raise ValueError(f"its version is {version[0]}.{version[1]}")
        shape, is_fortran, dtype = _NPY_HEADERS[version](file)
        if dtype.hasobject:
            raise ValueError("it holds Python objects")
        missing = file.tell() + math.prod(shape) * dtype.itemsize - os.fstat(file.fileno()).st_size
        if missing > 0:
            raise ValueError(f"its last {missing:,} bytes are missing")
    except (ValueError, EOFError, OSError) as error:
        raise DamagedFileError(
            f"{path} can't be read as .npy ({error}). Expected one array of numbers, as numpy.save writes it. Give an "
            "undamaged copy."
        ) from error
    return _PlainArray(path=path, file=file, offset=file.tell(), shape=shape, dtype=dtype, is_fortran=is_fortran)


_NPY_HEADERS: dict[tuple[int, int], Callable[[io.BufferedReader], tuple[tuple[int, ...], bool, np.dtype[Any]]]] = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}
"""Version 3 differs only in names of columns, which features don't have."""


@contextmanager
def _opened_hdf5(path: Path, dataset: str | None, id_dataset: str | None) -> Iterator[FeatureFile]:
    if id_dataset is None and dataset is None and is_part(path):
        yield _found_in_part(path)
        return
    with opened_hdf5(path) as file:
        features = _member(file, dataset or FEATURES, path, "--dataset")
        name = id_dataset or next((name for name in ID_DATASETS if name in set(file)), None)
        ids = None if name is None else _texts(_member(file, name, path, "--id-dataset")[()])
        rows = _rows_of_array(features)
        yield FeatureFile(rows=replace(rows, read=partial(_read_dataset, path, rows.read)), ids=ids)


def _read_dataset(path: Path, read: Callable[[int, int], Tensor], start: int, stop: int) -> Tensor:
    try:
        return read(start, stop)
    except OSError as error:  # a compressed piece that can't be unpacked; h5py names no file
        raise DamagedFileError(
            f"{path} is damaged: its rows {start:,} to {stop - 1:,} can't be read ({error}). Give an undamaged copy."
        ) from error


def _member(file: Any, name: str, path: Path, flag: str) -> Any:
    try:
        return own_dataset(file, name)
    except KeyError as error:
        raise ValueError(
            f"{path} has no dataset {name!r}; at its top are {', '.join(sorted(file)) or 'none'}. Expected one. Name "
            f"it with {flag}."
        ) from error
    except ValueError as error:
        raise ValueError(
            f"{path} can't be imported: {error}. Expected values in the file itself. Copy them into one, where all "
            f"files are: h5py.File('whole.h5', 'w')['{name}'] = h5py.File('{path.name}')['{name}'][()]"
        ) from error


def _found_in_part(path: Path) -> FeatureFile:
    """An exported file, or a part of a store: its features are checked, bfloat16 stays that, int8 becomes float32."""
    part = Part.open(path)
    damaged = part.verify()
    if damaged:
        raise DamagedFileError(
            f"{path} is damaged: the features of rows {damaged[0].start:,} to {damaged[0].stop - 1:,} aren't those "
            "that were written. Nothing was imported. Export it again."
        )
    if not part.storage_type.read_as.is_float:
        raise _wrong_type(part.storage_type.name)
    rows = ForeignRows(
        num_rows=part.num_rows,
        shape=part.shape,
        dtype=part.storage_type.read_as.torch_dtype,
        read=lambda start, stop: _read(part, start, stop),
    )
    with opened_hdf5(path) as file:
        if "id" not in file:
            return FeatureFile(rows=rows)
        ids = _texts(own_dataset(file, "id")[()])
        images = _described(
            part.facts,
            ids,
            where=str(path),
            digests=part.digests,
            splits=list(_texts(own_dataset(file, "split")[()])),
            targets=own_dataset(file, "target")[()] if "target" in file else None,
            groups=list(_texts(own_dataset(file, "group")[()])) if "group" in file else None,
        )
    return FeatureFile(rows=rows, ids=ids, images=images)


def _read(part: Part, start: int, stop: int) -> Tensor:
    rows = part.read_rows(np.arange(start, stop))
    if part.scales is None:
        return rows
    return ScaledRows(rows, torch.from_numpy(part.scales[start:stop])).values()


@contextmanager
def _opened_safetensors(path: Path, dataset: str | None, id_dataset: str | None) -> Iterator[FeatureFile]:
    wanted = dataset or FEATURES
    try:
        opened = safetensors.safe_open(path, framework="pt")
    except (safetensors.SafetensorError, OSError) as error:
        raise DamagedFileError(
            f"{path} can't be read as safetensors ({error}). Expected tensors by name. Give an undamaged copy."
        ) from error
    with opened as file:
        names = list(file.keys())
        if wanted not in names:
            raise ValueError(
                f"{path} has no tensor {wanted!r}; it has {', '.join(sorted(names)) or 'none'}. Expected one. Name it "
                "with --dataset."
            )
        slices = file.get_slice(wanted)
        shape = tuple(slices.get_shape())
        kinds = {each.safetensors: each.torch_dtype for each in FLOATS.values()} | {"F64": _DOUBLE}
        dtype = kinds.get(slices.get_dtype())
        if dtype is None:
            raise _wrong_type(slices.get_dtype())
        rows = ForeignRows(
            num_rows=shape[0] if shape else 0,
            shape=shape[1:],
            dtype=dtype,
            read=lambda start, stop: slices[start:stop],
        )
        metadata = file.metadata() or {}
        if CHECKSUMS in metadata:
            _compare_checksums(path, file, metadata)
        ids = _id_texts(metadata.get("ids"))
        no_ids = f"its metadata ids is {metadata['ids'][:40]!r}, no JSON list of texts" if "ids" in metadata else None
        images = None
        facts, splits = (_json(metadata.get(name)) for name in ("facts", "splits"))
        if ids is not None and isinstance(facts, dict) and "images" in facts and "digests" in names:
            images = _described(
                facts,
                ids,
                where=str(path),
                digests=file.get_tensor("digests").numpy(),
                splits=splits,
                targets=file.get_tensor("targets").numpy() if "targets" in names else None,
                groups=_json(metadata.get("groups")),
            )
        yield FeatureFile(rows=rows, ids=ids, no_ids=no_ids if ids is None else None, images=images)


def _json(text: str | None) -> Json:
    """What a text of the metadata says; None where it is no JSON, as what others wrote under that name needn't be."""
    with suppress(ValueError, RecursionError):
        return None if text is None else json.loads(text)
    return None


def _id_texts(text: str | None) -> tuple[str, ...] | None:
    """The ids in a list of texts or numbers; None for anything else."""
    ids = _json(text)
    if not isinstance(ids, list) or not all(isinstance(each, str | int) for each in ids):
        return None
    return tuple(map(str, ids))


def _compare_checksums(path: Path, file: Any, metadata: dict[str, str]) -> None:
    """Raises DamagedFileError unless tensors and metadata are those that an export wrote."""
    expected = _json(metadata[CHECKSUMS])
    of_tensors = expected.get("tensors") if isinstance(expected, dict) else None
    if not isinstance(of_tensors, dict) or expected.get("metadata") != metadata_checksum(metadata):
        raise _altered(path, "its metadata isn't what was written")
    for name, checksum in of_tensors.items():
        if name not in set(file.keys()) or _checksum_in(file, name) != checksum:
            raise _altered(path, f"its tensor {name} isn't what was written")


def _checksum_in(file: Any, name: str) -> str:
    slices = file.get_slice(name)
    shape = slices.get_shape()
    found = tensor_checksum(slices.get_dtype(), shape)
    step = max(1, _BLOCK_BYTES // max(1, 8 * math.prod(shape[1:])))
    for start in range(0, shape[0], step):
        block = slices[start : start + step].contiguous().reshape(-1)
        found.update(block.view(torch.uint8).numpy().data)
    return found.hexdigest()


def _altered(path: Path, what: str) -> DamagedFileError:
    return DamagedFileError(
        f"{path} is damaged, or was altered since it was exported: {what}. Nothing was imported. Export it again; if "
        f"it was altered on purpose, leave {CHECKSUMS} out of its metadata."
    )


class _Reader(Protocol):
    """What a file of one format holds, until the block ends; errors as those of `opened_features`."""

    def __call__(
        self, path: Path, dataset: str | None, id_dataset: str | None
    ) -> AbstractContextManager[FeatureFile]: ...


_READERS: dict[str, _Reader] = {
    ".npy": _opened_npy,
    ".h5": _opened_hdf5,
    ".hdf5": _opened_hdf5,
    ".safetensors": _opened_safetensors,
}
"""What a file's name ends with, in lower case -> how it is read; a format that holds one array passes names over."""


def _described(
    facts: Json,
    ids: tuple[str, ...],
    *,
    where: str,
    digests: NDArray[np.uint8],
    splits: Json,
    targets: NDArray[Any] | None,
    groups: Json,
) -> ImageSet:
    """The image set that an exported file describes."""
    try:
        described = facts["images"]
        task: Task = described["task"]
        return ImageSet(
            name=described["name"],
            ids=ids,
            targets=targets,
            classes=tuple(described["classes"]),
            splits=np.array(splits),
            groups=None if groups is None else tuple(groups),
            task=task,
            source=AbsentSource(where=where, known=KnownDigests([DigestTable.without_files(ids, digests)])),
        )
    except (ValueError, TypeError, LookupError) as error:
        raise DamagedFileError(
            f"{where} doesn't describe its images as an exported file does ({type(error).__name__}: {error}). Expected "
            "their facts, splits and digests. Export it again, or leave the facts out and give the ids alone."
        ) from error


# ---- Rows


def _rows_of_array(array: Any) -> ForeignRows:
    """Rows of whatever has shape, dtype and slices like an array: one in memory, a mapped one, a dataset of HDF5."""
    native = array.dtype.name  # whatever its byte order
    dtype = _DOUBLE if native == "float64" else FLOATS[native].torch_dtype if native in _IN_NUMPY else None
    if dtype is None:
        raise _wrong_type(str(array.dtype))
    return ForeignRows(
        num_rows=array.shape[0] if array.shape else 0,
        shape=tuple((array.shape or ())[1:]),  # HDF5's empty datasets have none at all
        dtype=dtype,
        read=lambda start, stop: torch.from_numpy(np.array(array[start:stop], dtype=native)),
    )


def _wrong_type(found: str) -> TypeError:
    names = [*_IN_NUMPY, "float64", *(name for name in FLOATS if name not in _IN_NUMPY)]
    return TypeError(f"The features are {found}. Expected {', '.join(names[:-1])} or {names[-1]}. Convert them.")


# ---- Ids


def _texts(values: Any) -> tuple[str, ...]:
    """Ids as texts: of byte strings, of numbers."""
    return tuple(
        value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else str(value)
        for value in np.asarray(values).reshape(-1).tolist()
    )


def _id_table(file: Path, column: str | None) -> IdTable:
    ((_, header), *body), notes = read_table(os.fspath(file), column or ID_COLUMNS[0])
    columns = tuple(cell.strip() for cell in header)
    for line, row in body:
        if len(row) != len(columns):
            raise ValueError(
                f"line {line} of {file} has {counted(len(row), 'cell')}. Expected {len(columns)}, as the header has. "
                "Quote cells that contain the separator."
            )
    rows = [dict(zip(columns, row, strict=True)) for _, row in body]
    chosen = column or next((name for name in ID_COLUMNS if name in columns), None)
    if chosen is None or chosen not in columns:
        raise ValueError(
            f"{file} has no column {chosen or ' or '.join(ID_COLUMNS)}; it has {', '.join(columns) or 'none'}. "
            "Expected one with the id of each row of features. Name it with --path-column."
        )
    places = _lines_by_row([row["row"] for row in rows], file) if "row" in columns else range(len(rows))
    ordered = [rows[place] for place in places]
    return IdTable(
        ids=tuple(row[chosen] for row in ordered),
        digests=_digests([row["digest"] for row in ordered], file) if "digest" in columns else None,
        columns=columns,
        lines=tuple(places),
        notes=notes,
    )


def _lines_by_row(rows: Sequence[str], file: Path) -> list[int]:
    """The line that is about each row of the features."""
    line_of = {row: line for line, row in enumerate(rows)}
    try:
        return [line_of[str(row)] for row in range(len(rows))]
    except KeyError:
        raise ValueError(
            f"{file} has a column row that isn't 0 to {len(rows) - 1:,} in some order. Expected the row of the "
            "features that each line is about. Correct it, or give the column another name."
        ) from None


def _digests(cells: Sequence[str], file: Path) -> NDArray[np.uint8]:
    wrong = [cell for cell in cells if not re.fullmatch("[0-9a-f]{64}", cell)]
    if wrong:
        raise ValueError(
            f"{file} has the digest {wrong[0]!r}. Expected the SHA-256 of an image's file, 64 hexadecimal digits. "
            "Correct it, or delete the column."
        )
    return digest_rows(cells)
