"""HDF5: the structure of a new file, made in memory; of a finished one, checked and read. The one door to h5py.

The library never gets a path here, only Python file objects. So it takes no lock, leaves no handle that a forked child
could close, and a full disk is met by our own writes, as an `OSError`; met inside the library it ends the interpreter.
"""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from featstore.digest import Json, canonical_json
from featstore.errors import DamagedFileError
from featstore.files import disk
from featstore.files.header import (
    FEATURES_ALIGNMENT,
    MAX_NAME_BYTES,
    MAX_REGIONS,
    USER_BLOCK_BYTES,
    Kind,
    Layout,
    make_user_block,
    read_layout,
    version_for,
)
from featstore.files.plain_reads import damaged, opened
from featstore.files.storage_types import KNOWN_TYPES, StorageType

BLOCK_BYTES = 1 << 20
"""Of the rows that have one checksum, at most, unless one row is larger."""


@contextmanager
def opened_hdf5(path: Path) -> Iterator[Any]:
    """Any HDF5 file for reading, as h5py's `File`: what other programs have written, and columns beside a part's own.

    Raises:
        FileNotFoundError: if there is no such file.
        DamagedFileError: if it is no HDF5 file.
        OSError: from what h5py reads inside the block, for damage deeper in the file.
    """
    with path.open("rb") as file:
        try:
            hdf5 = h5py.File(file, "r")
        except (OSError, RuntimeError) as error:
            raise DamagedFileError(
                f"{path} can't be read as HDF5 ({error}). Expected a sound HDF5 file. Give an undamaged copy."
            ) from error
        with hdf5:
            yield hdf5


def own_dataset(hdf5: Any, name: str) -> Any:
    """The dataset of that path, whose values lie in the file itself.

    HDF5 reads others out of files that the dataset names: virtual ones, whose sources may be missing (it then gives
    zeros, or ends the interpreter), and external ones, which may be any file of this machine.

    Raises:
        KeyError: if there is none, or it is no dataset.
        ValueError: if it is one of those.
    """
    path = ""
    for part in name.strip("/").split("/"):
        path = f"{path}/{part}"
        link = hdf5.get(path, getlink=True)
        if isinstance(link, h5py.ExternalLink):
            raise ValueError(f"{path} is a link into another file")
        if isinstance(link, h5py.SoftLink):  # it may lead to a link into another file
            raise ValueError(f"{path} is a soft link to {link.path}, which may lead anywhere")
    dataset = hdf5[name]
    if not isinstance(dataset, h5py.Dataset):
        raise KeyError(f"/{name} is not a dataset")
    if dataset.is_virtual:
        raise ValueError(f"/{name} is a virtual dataset, which is put together from other files")
    if dataset.external:
        raise ValueError(f"/{name} has its values in other files (external storage)")
    return dataset


@dataclass(frozen=True, kw_only=True)
class StoredRows:
    """What the features of a part are as an array of rows.

    Attributes:
        num_rows: n, which may be 0.
        shape: of one row.
        storage_type: of the numbers.
    """

    num_rows: int
    shape: tuple[int, ...]
    storage_type: StorageType

    @property
    def row_bytes(self) -> int:
        """Size of a row."""
        return math.prod(self.shape) * self.storage_type.itemsize

    @property
    def num_bytes(self) -> int:
        """Size of all rows."""
        return self.num_rows * self.row_bytes

    @property
    def block_rows(self) -> int:
        """Rows that get one checksum when they are written."""
        return max(1, BLOCK_BYTES // self.row_bytes)

    @property
    def num_blocks(self) -> int:
        """Checksums when they are written."""
        return math.ceil(self.num_rows / self.block_rows)


# ---- making the frame: every byte of a file outside its features


@dataclass(frozen=True, kw_only=True)
class Frame:
    """A file in memory, without its features: as they lie last, `image` ends where they begin.

    Should a version of HDF5 put something behind the features, `image` has their whole length as a gap, and the file
    is as good; it only takes the memory.

    Attributes:
        layout: where everything lies.
        image: the bytes of the file; the first 4096 are still empty.
    """

    layout: Layout
    image: memoryview

    @classmethod
    def of(
        cls,
        kind: Kind,
        columns: Mapping[str, NDArray[Any]],
        facts: Mapping[str, Json],
        rows: StoredRows | None = None,
    ) -> Frame:
        """The frame of a new file.

        Args:
            kind: of the file.
            columns: its datasets beside the features, for `rows` with a `crc`.
            facts: as JSON.
            rows: the features; None where a file has none.
        """
        text = canonical_json(dict(facts)).encode("ascii")
        features_bytes = rows.num_bytes if rows else 0
        features_offset = 0
        image = io.BytesIO()
        with h5py.File(
            image,
            "w",
            libver=("v110", "v110"),  # older tools read it; see docs/format.md
            userblock_size=USER_BLOCK_BYTES,
            # What is smaller than the features is packed; the features begin on a page, for mapping.
            alignment_threshold=max(1, features_bytes),
            alignment_interval=FEATURES_ALIGNMENT if features_bytes else 1,
        ) as hdf5:
            for name, column in columns.items():
                is_text = column.dtype.kind == "S"
                dtype = h5py.string_dtype("utf-8", column.itemsize) if is_text else column.dtype.newbyteorder("<")
                values = np.asarray(column, dtype)
                _add_dataset(hdf5, name, h5py.h5t.py_create(dtype, logical=True), values.shape)[...] = values
            text_type = h5py.h5t.py_create(h5py.string_dtype("utf-8", len(text)), logical=True)
            _add_dataset(hdf5, "facts", text_type, ())[()] = text
            if rows:
                hdf5["crc"].attrs["block_rows"] = np.uint64(rows.block_rows)
                features_offset = _extent_of(_add_features(hdf5, rows)).start
            regions = [(name, _extent_of(hdf5[name])) for name in (*columns, "facts") if hdf5[name].size]
        image.seek(0, io.SEEK_END)
        image.write(bytes(max(0, features_offset - image.tell())))  # up to the page where the features begin
        features = range(features_offset, features_offset + features_bytes)
        layout = Layout(
            kind=kind,
            version=version_for(None if rows is None else rows.storage_type),
            length=max(image.tell(), features.stop),
            features=features,
            regions=dict(sorted(regions, key=lambda region: region[1].start)),
        )
        # A copy, for a buffer of `image` must not outlive it: the traceback of a failed write keeps both for the
        # collector, which from Python 3.13 on complains about that to stderr.
        return cls(layout=layout, image=memoryview(bytearray(image.getbuffer())))

    def put(self, name: str, values: NDArray[Any]) -> None:
        """Gives a column other values, of its type and shape."""
        extent = self.layout.regions[name]
        self.image[extent.start : extent.stop] = values.tobytes()

    def write(self, fd: int) -> None:
        """Writes everything but the features, the user block last."""
        for extent in self.layout.rest:
            disk.write_at(fd, self.image[extent.start : extent.stop], extent.start)
        disk.write_at(fd, memoryview(make_user_block(self.layout, self.image)), 0)


def check_columns(columns: Mapping[str, NDArray[Any]]) -> None:
    """Checks what a caller wants stored beside facts.

    Raises:
        ValueError: for names that can't be used, and more columns than have room.
        TypeError: for dtypes that can't be stored.
    """
    if len(columns) >= MAX_REGIONS:
        raise ValueError(f"a table of {len(columns)} columns; its user block has room for {MAX_REGIONS - 1}")
    for name, column in columns.items():
        if not re.fullmatch(f"[a-z_]{{1,{MAX_NAME_BYTES}}}", name) or name == "facts":
            raise ValueError(
                f"a column can't be named {name!r}; use up to {MAX_NAME_BYTES} of a-z and _, and not 'facts'"
            )
        if column.dtype.kind not in "iuf" or column.dtype.itemsize > 8:
            raise TypeError(
                f"column {name} is {column.dtype}; store integers or floats of at most 8 bytes (text as uint8 with "
                "offsets)"
            )


def _add_features(hdf5: h5py.File, rows: StoredRows) -> h5py.Dataset:
    # A new name may need one more piece of the root group, which would lie behind the features; so make room before,
    # and have it take its place: from 9 datasets on the pieces get theirs when they are written.
    hdf5["features"] = hdf5["facts"]
    hdf5.flush()
    del hdf5["features"]
    return _add_dataset(hdf5, "features", _hdf5_type(rows.storage_type), (rows.num_rows, *rows.shape))


def _add_dataset(hdf5: h5py.File, name: str, hdf5_type: h5py.h5t.TypeID, shape: tuple[int, ...]) -> h5py.Dataset:
    """An unfiltered, contiguous dataset whose place in the file is taken at once, but not written."""
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_layout(h5py.h5d.CONTIGUOUS)
    properties.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    properties.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    properties.set_obj_track_times(False)  # equal content makes equal files
    space = h5py.h5s.create_simple(shape) if shape else h5py.h5s.create(h5py.h5s.SCALAR)
    return h5py.Dataset(h5py.h5d.create(hdf5.id, name.encode("ascii"), hdf5_type, space, properties))


def _hdf5_type(storage_type: StorageType) -> h5py.h5t.TypeID:
    if not storage_type.is_float:
        return h5py.h5t.STD_I8LE if storage_type.has_sign else h5py.h5t.STD_U8LE
    exponent, mantissa = storage_type.exponent_bits, storage_type.mantissa_bits
    found = h5py.h5t.IEEE_F32LE.copy()
    # The sign's bit; first bit and bits of the exponent, then of the mantissa.
    found.set_fields(exponent + mantissa, mantissa, exponent, 0, mantissa)
    found.set_size(storage_type.itemsize)
    found.set_ebias((1 << (exponent - 1)) - 1)
    return found


def _extent_of(dataset: h5py.Dataset) -> range:
    """The bytes of the file that hold the dataset's values; none at 0 if it has none, for which HDF5 has no answer."""
    if not dataset.size:
        return range(0)
    start = dataset.id.get_offset()
    if start is None:
        raise ValueError(f"{dataset.name} is not contiguous")
    return range(start, start + dataset.id.get_storage_size())


# ---- reading


@contextmanager
def opened_checked(path: Path, kind: Kind) -> Iterator[Structure]:
    """The HDF5 structure of a file, open for reading, after every check that needs no structure.

    `ValueError`, and what h5py raises about files, becomes a `DamagedFileError` about the structure.

    Raises:
        FileNotFoundError: if there is no such file.
        DamagedFileError: if it is of another kind or a newer version, truncated, or altered outside its features.
    """
    with opened(path) as file:
        layout = read_layout(file, kind)
        try:
            with file.stream() as stream, h5py.File(stream, "r") as hdf5:
                yield Structure(layout, hdf5)
        except (KeyError, OSError, RuntimeError, ValueError) as error:
            raise damaged(path, f"its HDF5 structure is not that of the format ({error})") from error


class Structure:
    """The datasets of a file that is open for reading; each method raises ValueError where one is not as expected."""

    def __init__(self, layout: Layout, hdf5: h5py.File) -> None:
        self.layout = layout
        self._hdf5 = hdf5

    def rows(self) -> StoredRows:
        """What the features are, which lie where the user block says."""
        features = self._dataset("features")
        stored_type = features.id.get_type()
        storage_type = next((each for each in KNOWN_TYPES.values() if stored_type.equal(_hdf5_type(each))), None)
        if storage_type is None or features.ndim == 0 or 0 in features.shape[1:]:
            raise ValueError(f"/features is {features.dtype} {features.shape}")
        rows = StoredRows(num_rows=features.shape[0], shape=features.shape[1:], storage_type=storage_type)
        extent, said = _extent_of(features), self.layout.features
        if (extent.start, extent.stop) != (said.start, said.stop):  # empty ranges are all equal
            raise ValueError("/features lies elsewhere than the user block says")
        if said.start % FEATURES_ALIGNMENT:
            raise ValueError(f"/features begins at byte {said.start}, no multiple of {FEATURES_ALIGNMENT}")
        return rows

    def block_rows(self) -> int:
        """Rows that have one checksum."""
        block_rows = int(self._dataset("crc").attrs["block_rows"])
        if block_rows < 1:
            raise ValueError(f"/crc has block_rows {block_rows}")
        return block_rows

    def column(self, name: str, dtype: str, shape: tuple[int, ...]) -> NDArray[Any]:
        """The values of a dataset, which must be of this type and shape."""
        column = self._dataset(name)
        if column.dtype != np.dtype(dtype) or column.shape != shape:
            raise ValueError(f"/{name} is {column.dtype} {column.shape}, not {np.dtype(dtype)} {shape}")
        self._check_place(name, column)
        values: NDArray[Any] = column[()]
        return values

    def columns(self) -> dict[str, NDArray[Any]]:
        """The values of all datasets but the facts."""
        datasets = {name: self._dataset(name) for name in self._hdf5 if name != "facts"}
        for name, dataset in datasets.items():
            self._check_place(name, dataset)
        return {name: np.asarray(dataset[()]) for name, dataset in datasets.items()}

    def facts(self) -> dict[str, Json]:
        """The JSON facts."""
        dataset = self._dataset("facts")
        facts = json.loads(dataset.asstr()[()])
        if not isinstance(facts, dict):
            raise ValueError("/facts is not a JSON object")
        self._check_place("facts", dataset)
        return facts

    def _dataset(self, name: str) -> h5py.Dataset:
        return own_dataset(self._hdf5, name)

    def _check_place(self, name: str, dataset: h5py.Dataset) -> None:
        region = self.layout.regions.get(name)
        if region is not None and _extent_of(dataset) != region:
            raise ValueError(f"/{name} lies elsewhere than its region says")
