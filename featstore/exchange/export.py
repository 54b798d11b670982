"""Export: a feature set as one file for other tools, its rows beside ids, labels, splits and the facts about them."""

from __future__ import annotations

import csv
import errno
import io
import json
import math
import os
import re
import secrets
import struct
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from featstore.digest import Json, canonical_json
from featstore.errors import AmbiguousRequestError, FeatureStoreError, OnError
from featstore.exchange.checksums import CHECKSUMS, metadata_checksum, tensor_checksum
from featstore.words import size_text

if TYPE_CHECKING:  # a program's help lists the formats, and waits for nothing that an export needs
    import torch
    from torch import Tensor

    from featstore.files.scaled import ScaledRows
    from featstore.images.image_set import ImageSet
    from featstore.store.features import Features
    from featstore.store.sets import FeatureSet
    from featstore.store.store import FeatureStore

    _Written = tuple[torch.dtype, Sequence[str]]
    """The type of the features in the file, and notes for the report."""

_BLOCK_BYTES = 8 << 20
_MAX_SAFETENSORS_HEADER = 100_000_000  # what the library reads


@dataclass(frozen=True, kw_only=True)
class ExportReport:
    """What an export wrote.

    Attributes:
        key: of the set.
        files: that were made, the one that was asked for first.
        rows: one an image, in the order of the images.
        left_out: images without a row, with `on_error="skip"`.
        shape: ``(rows, *F)`` of the features.
        dtype: of the features in the file.
        bytes: of all files.
        notes: sentences about what is otherwise than in the store.
    """

    key: str
    files: tuple[Path, ...]
    rows: int
    left_out: int
    shape: tuple[int, ...]
    dtype: str
    bytes: int
    notes: tuple[str, ...]

    def __str__(self) -> str:
        named = " and ".join(map(str, self.files))
        left_out = f", {self.left_out:,} images without a row left out" if self.left_out else ""
        return (
            f"{self.rows:,} rows of set {self.key[:8]} ({'x'.join(map(str, self.shape[1:]))} {self.dtype}) in {named}, "
            f"{size_text(self.bytes)}{left_out}"
        )


def export(
    store: FeatureStore,
    key: str,
    path: str | os.PathLike[str],
    *,
    images: ImageSet | None = None,
    on_error: OnError = "raise",
    progress: bool = False,
) -> ExportReport:
    """Writes the features of `images` into one new file, whole or not at all, in a format that its ending names.

    * ``.h5``, ``.hdf5``: plain HDF5 with the datasets features, id, split, target, class, group, digest and facts.
    * ``.npy``: the features; a ``.csv`` of that name beside it has row, id, split, label, group and digest.
    * ``.safetensors``: the tensors features, digests and targets; the rest is in the metadata, as JSON texts, with
      checksums that an import compares.
    * ``.parquet``: a table with the features as lists of fixed size; needs pyarrow.

    bfloat16 stays what it is in HDF5 and safetensors; NumPy lacks it, so ``.npy`` has float32. ``.parquet`` always has
    float32, since most readers know no shorter type. Of an int8 set HDF5 has the whole numbers and, as the dataset
    scale, what to multiply each row with; the others have the products. Memory doesn't grow with the number of rows,
    but for about 200 bytes each. Each block of the set's parts is checked against its checksum before the first row of
    it is written.

    Args:
        store: where the set is.
        key: of the set, or its first digits.
        path: of the new file, in a folder that exists.
        images: whose rows, in which order. Default: the newest image set of the store; if it holds none, all rows in
            the order of their digests, which are then the ids.
        on_error: `skip` leaves out images that failed when they were extracted, or can't be read now.
        progress: shows a bar on a terminal.

    Raises:
        ValueError: for another ending, or a folder that isn't there.
        FileExistsError: if a file is there already.
        MissingFeaturesError: if images lack a row.
        DamagedFileError: if a part is damaged.
        FeatureStoreError: if there is no such set, or pyarrow isn't there.
        OSError: as the disk gave it; no file is left then.
    """
    target = Path(path)
    chosen_format = _format_of(target)
    targets = (target, *(target.with_suffix(suffix) for suffix in chosen_format.beside))
    _check_free(targets)
    chosen = store.set(key)
    wanted = _default_images(store, chosen) if images is None else images
    # As a stream, for in memory all rows may take half of what is free.
    features = store.features(wanted, chosen, on_error=on_error, access="stream")
    if not len(features):
        raise FeatureStoreError(
            f"None of the {len(wanted):,} images of {wanted.name} has a row in set {chosen.key[:8]}. Expected one at "
            "least. Give the images that the set was made of."
        )
    rows = _Rows(features, chosen, features.images.digests(store.known_digests(features.images)).values, progress)
    dtype, notes = chosen_format.write(targets, rows)
    return ExportReport(
        key=chosen.key,
        files=targets,
        rows=len(features),
        left_out=len(wanted) - len(features),
        shape=features.shape,
        dtype=_name(dtype),
        bytes=sum(file.stat().st_size for file in targets),
        notes=tuple(notes),
    )


@dataclass(frozen=True, eq=False)
class _Rows:
    """What is written, whatever the format."""

    features: Features
    chosen: FeatureSet
    digests: NDArray[np.uint8]  # (N, 32)
    shows_progress: bool

    def __len__(self) -> int:
        return len(self.features)

    @property
    def images(self) -> ImageSet:
        return self.features.images

    def blocks(self, dtype: torch.dtype | None = None) -> Iterator[Tensor]:
        """The features in order, some rows at a time, contiguous and on the CPU."""
        for some in self._pieces():
            yield self.features[some].to(dtype or self.features.dtype).contiguous()

    def stored_blocks(self) -> Iterator[Tensor | ScaledRows]:
        """The features in order, as they are stored."""
        for some in self._pieces():
            yield self.features.stored(some)

    def _pieces(self) -> Iterator[slice]:
        step = max(1, _BLOCK_BYTES // max(1, math.prod(self.features.shape[1:]) * 4))
        is_shown = self.shows_progress and sys.stderr.isatty()
        with tqdm(total=len(self), unit="row", disable=not is_shown, file=sys.stderr) as bar:
            for start in range(0, len(self), step):
                stop = min(start + step, len(self))
                yield slice(start, stop)
                bar.update(stop - start)

    def labels(self, separator: str) -> list[str]:
        """What a person calls each image's targets; empty where there are none."""
        classes, targets = self.images.classes, self.images.targets
        if targets is None:
            return [""] * len(self)
        if self.images.task == "single":
            return [classes[place] if place >= 0 else "" for place in targets.tolist()]
        if self.images.task == "regression":
            return ["" if np.isnan(row).any() else separator.join(map(str, row)) for row in targets]
        return [separator.join(classes[place] for place in np.flatnonzero(row)) for row in targets]

    @property
    def facts(self) -> dict[str, Json]:
        """Those of a part of the set, so that an exported HDF5 file is one, and what is known about the images."""
        return {
            **self.chosen.facts,
            "failed": {},
            "supersedes": [],
            "images": {"name": self.images.name, "task": self.images.task, "classes": list(self.images.classes)},
        }


# ---- The formats


@dataclass(frozen=True, kw_only=True)
class _Format:
    """A kind of file that an export makes.

    Attributes:
        suffixes: any of which a file's name ends with; the first is named where another format is advised.
        write: puts the rows into new files, whole or not at all; the first is the one that was asked for.
        beside: suffixes of the other files that are made with it.
        needs: a module that not everyone has, and the extra of featstore that brings it; None if it needs none.
    """

    suffixes: tuple[str, ...]
    write: Callable[[tuple[Path, ...], _Rows], _Written]
    beside: tuple[str, ...] = ()
    needs: tuple[str, str] | None = None


def _write_hdf5(targets: tuple[Path, ...], rows: _Rows) -> _Written:

    from featstore.files.part import write_part

    images = rows.images
    columns: dict[str, NDArray[Any]] = {
        "id": _fixed(images.ids, "id"),
        "split": _fixed(images.splits.tolist(), "split"),
    }
    if images.groups is not None:
        columns["group"] = _fixed(images.groups, "group")
    if images.targets is not None:
        columns |= {"target": np.ascontiguousarray(images.targets), "class": _fixed(images.classes, "class")}
    write_part(
        targets[0],
        features=rows.stored_blocks(),
        digests=np.ascontiguousarray(rows.digests),
        decoders=_decoders(rows),
        facts=rows.facts,
        columns=columns,
    )
    stored = rows.features.storage_type
    scaled = f"{stored.name} stays: the values are /features times /scale, a number a row"
    return stored.torch_dtype, (scaled,) if stored.is_scaled else ()


def _write_npy(targets: tuple[Path, ...], rows: _Rows) -> _Written:
    stored = rows.features.storage_type
    dtype = stored.in_numpy.torch_dtype
    notes = []
    if stored.in_numpy != stored:
        notes.append(f"{stored.name} became {stored.in_numpy.name}, which .npy can hold; no value changed")
    separator = _label_separator(rows.images)
    if rows.images.task != "single" and rows.images.num_classes > 1:
        notes.append(f"several labels of an image stand in one cell, with {separator} between them")
    with _new_files(targets) as (npy, table):
        descr = np.lib.format.dtype_to_descr(np.dtype(_name(dtype)).newbyteorder("<"))
        header = {"shape": rows.features.shape, "fortran_order": False, "descr": descr}
        np.lib.format.write_array_header_1_0(npy, header)
        for block in rows.blocks(dtype):
            npy.write(_bytes(block))
        _write_table(table, rows, separator)
    return dtype, notes


def _write_safetensors(targets: tuple[Path, ...], rows: _Rows) -> _Written:

    images, features = rows.images, rows.features
    metadata = {
        "format": "pt",
        "facts": canonical_json(rows.facts),
        "ids": json.dumps(images.ids),
        "splits": json.dumps(images.splits.tolist()),
    }
    if images.groups is not None:
        metadata["groups"] = json.dumps(images.groups)
    # Wider numbers first, so that each tensor begins at a multiple of its numbers' size.
    tensors: dict[str, tuple[str, tuple[int, ...], int]] = {}
    if images.targets is not None:
        kind = {"int64": "I64", "float32": "F32"}[str(images.targets.dtype)]
        tensors["targets"] = (kind, images.targets.shape, images.targets.nbytes)
    num_bytes = math.prod(features.shape) * features.dtype.itemsize
    tensors["features"] = (features.storage_type.safetensors, features.shape, num_bytes)
    tensors["digests"] = ("U8", rows.digests.shape, rows.digests.nbytes)
    # They are known when all is written; until then there is something of their length.
    metadata[CHECKSUMS] = _checksums_text(metadata, dict.fromkeys(tensors, "0" * 64))
    header = _safetensors_header(tensors, metadata)
    if len(header) > _MAX_SAFETENSORS_HEADER:
        raise FeatureStoreError(
            f"The ids of {len(rows):,} images take {len(header):,} bytes in the header of {targets[0]}, and "
            f"safetensors reads {_MAX_SAFETENSORS_HEADER:,}. Expected fewer images. Export them as .h5, which has no "
            "such limit."
        )
    sums = {name: tensor_checksum(kind, shape) for name, (kind, shape, _) in tensors.items()}
    with _new_files(targets) as (file,):
        file.write(struct.pack("<Q", len(header)) + header)

        def write(name: str, data: memoryview) -> None:
            sums[name].update(data)
            file.write(data)

        if images.targets is not None:
            write("targets", np.ascontiguousarray(images.targets).data)
        for block in rows.blocks():
            write("features", _bytes(block))
        write("digests", np.ascontiguousarray(rows.digests).data)
        metadata[CHECKSUMS] = _checksums_text(metadata, {name: each.hexdigest() for name, each in sums.items()})
        file.seek(8)
        file.write(_safetensors_header(tensors, metadata))  # as long as before
    stored = features.storage_type
    return features.dtype, (f"{stored.name} became float32; no value changed",) if stored.is_scaled else ()


def _checksums_text(metadata: dict[str, str], of_tensors: dict[str, str]) -> str:
    return canonical_json({"metadata": metadata_checksum(metadata), "tensors": of_tensors})


def _write_parquet(targets: tuple[Path, ...], rows: _Rows) -> _Written:
    import pyarrow as pa  # not everyone has it: `_format_of` has looked
    import pyarrow.parquet as pq
    import torch

    width = math.prod(rows.features.shape[1:])
    shape = "x".join(map(str, rows.features.shape[1:]))
    notes = [f"the {shape} features of an image are one list of {width:,} values, row-major"]
    if rows.features.storage_type.name != "float32":
        notes.append(f"{rows.features.storage_type.name} became float32; no value changed")
    is_single = rows.images.task == "single"
    labels = list(map(_shown, rows.labels("\0")))
    columns = {
        "id": pa.array(list(map(_shown, rows.images.ids)), pa.string()),
        "split": pa.array(rows.images.splits.tolist(), pa.string()),
        "label": pa.array(labels, pa.string())
        if is_single
        else pa.array([label.split("\0") if label else [] for label in labels], pa.list_(pa.string())),
        "digest": pa.array([row.tobytes() for row in rows.digests], pa.binary(32)),
        **({} if rows.images.groups is None else {"group": pa.array(map(_shown, rows.images.groups), pa.string())}),
    }
    described = {"facts": canonical_json(rows.facts), "shape": json.dumps(rows.features.shape[1:])}
    fields = [(name, column.type) for name, column in columns.items()]
    schema = pa.schema([*fields, ("features", pa.list_(pa.float32(), width))], metadata=described)
    with _new_files(targets) as (file,), pq.ParquetWriter(file, schema) as writer:
        start = 0
        for block in rows.blocks(torch.float32):
            values = pa.FixedSizeListArray.from_arrays(pa.array(block.reshape(-1).numpy()), width)
            pieces = [column.slice(start, len(block)) for column in columns.values()]
            writer.write_table(pa.Table.from_arrays([*pieces, values], schema=schema))
            start += len(block)
    return torch.float32, notes


_FORMATS = (
    _Format(suffixes=(".h5", ".hdf5"), write=_write_hdf5),
    _Format(suffixes=(".npy",), write=_write_npy, beside=(".csv",)),
    _Format(suffixes=(".safetensors",), write=_write_safetensors),
    _Format(suffixes=(".parquet",), write=_write_parquet, needs=("pyarrow.parquet", "parquet")),
)

SUFFIXES = tuple(suffix for each in _FORMATS for suffix in each.suffixes)
"""What a file's name must end with, in any case: the ending chooses the format."""


def _format_of(path: Path) -> _Format:
    suffix = path.suffix.lower()
    found = next((each for each in _FORMATS if suffix in each.suffixes), None)
    if found is None:
        raise ValueError(
            f"{path} ends with {suffix or 'no suffix'}, which names no format. Expected a name that ends with "
            f"{', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}. Give such a name."
        )
    if found.needs is not None:
        module, extra = found.needs
        library = module.partition(".")[0]
        try:
            import_module(module)  # loaded by nobody who doesn't export to it
        except ImportError as error:
            *others, last = [each.suffixes[0] for each in _FORMATS if each.needs is None]
            raise FeatureStoreError(
                f"{path} needs {library}, which isn't installed. Expected it for {suffix} alone. Install it with "
                f"pip install 'featstore[{extra}]', or export as {', '.join(others)} or {last}."
            ) from error
    return found


def _safetensors_header(tensors: dict[str, tuple[str, tuple[int, ...], int]], metadata: dict[str, str]) -> bytes:
    header: dict[str, Json] = {"__metadata__": metadata}
    offset = 0
    for name, (kind, shape, num_bytes) in tensors.items():
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [offset, offset + num_bytes]}
        offset += num_bytes
    text = json.dumps(header, separators=(",", ":")).encode("ascii")
    return text.ljust(math.ceil(len(text) / 8) * 8)


def _write_table(file: BinaryIO, rows: _Rows, separator: str) -> None:
    """One line a row. Ids need not be UTF-8, as names of files need not."""
    images = rows.images
    columns: dict[str, Sequence[object]] = {
        "row": range(len(rows)),
        "id": images.ids,
        "split": images.splits.tolist(),
        "label": rows.labels(separator),
        **({} if images.groups is None else {"group": images.groups}),
        "digest": [row.tobytes().hex() for row in rows.digests],
    }
    text = io.TextIOWrapper(file, encoding="utf-8", errors="surrogateescape", newline="")
    # All texts in quotes: a reader that drops spaces after commas, or takes \r for the end of a line, keeps them so.
    writer = csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)
    writer.writerow(columns)
    writer.writerows(zip(*columns.values(), strict=True))
    text.flush()
    text.detach()


def _label_separator(images: ImageSet) -> str:
    for separator in ("|", ";", "/", "\t"):
        if images.task != "multi" or not any(separator in name for name in images.classes):
            return separator
    raise ValueError(
        f"The classes of {images.name} contain |, ;, / and tabs, so no cell of a table can hold several. Expected one "
        "of them in no class. Export as .h5 or .safetensors, which hold targets as numbers."
    )


def _fixed(texts: Sequence[str], what: str) -> NDArray[np.bytes_]:
    """Texts as strings of one length, UTF-8, filled up with zero bytes: what MATLAB and R read without effort."""
    cut_off = next((text for text in texts if text.endswith("\0")), None)
    if cut_off is not None:
        raise ValueError(
            f"The {what} {cut_off!r} ends with a zero byte, with which strings in HDF5 files are filled up. Expected "
            "another end. Export as .npy or .safetensors, which keep it."
        )
    encoded = [text.encode("utf-8", "surrogateescape") for text in texts]
    return np.array(encoded, dtype=f"S{max(1, *map(len, encoded), 1)}")


def _decoders(rows: _Rows) -> NDArray[np.uint8]:
    index = rows.chosen.index
    part_of, row_in = index.find(rows.digests)
    decoders = np.zeros(len(rows), np.uint8)
    for place in np.unique(part_of):
        is_there = part_of == place
        decoders[is_there] = index.parts[place].decoders[row_in[is_there]]
    return decoders


# ---- What is exported


def _default_images(store: FeatureStore, chosen: FeatureSet) -> ImageSet:
    from featstore.images.fileless import images_by_digest
    from featstore.store.folders import short_key

    if store.has_images():
        try:
            return store.images()
        except AmbiguousRequestError as error:
            raise AmbiguousRequestError(f"{error} On the command line: --images-name NAME.") from error
    digests = np.unique(np.concatenate([part.digests for part in chosen.parts]), axis=0)
    # Named after the set, so that an import of the file hides no image set that people call "images".
    return images_by_digest(digests, where=str(store.root), name=f"set-{short_key(chosen.key)}")


# ---- Files that appear whole


def _check_free(targets: Sequence[Path]) -> None:
    for path in targets:
        if not path.parent.is_dir():
            raise ValueError(f"There is no folder {path.parent}. Expected one for {path.name}. Make it first.")
        if os.path.lexists(path):
            raise FileExistsError(errno.EEXIST, "it exists and isn't replaced; choose another name", os.fspath(path))


@contextmanager
def _new_files(targets: Sequence[Path]) -> Iterator[Sequence[BinaryIO]]:
    """Files to write to; when the block ends well they have their names, else they are gone."""
    temporary = [path.with_name(f".{path.name}.tmp-{secrets.token_hex(8)}") for path in targets]
    made = list(temporary)
    try:
        with ExitStack() as stack:
            files = [stack.enter_context(path.open("xb")) for path in temporary]
            yield files
            for file in files:
                file.flush()
                os.fsync(file.fileno())
        _check_free(targets)
        for place in reversed(range(len(targets))):  # the one that was asked for comes last
            temporary[place].rename(targets[place])
            made[place] = targets[place]
    except BaseException:
        for path in made:
            with suppress(OSError):  # the first error is the one to tell
                path.unlink()
        raise


def _bytes(block: Tensor) -> memoryview:
    import torch

    return block.reshape(-1).view(torch.uint8).numpy().data


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _shown(text: str) -> str:
    """`text` without lone surrogates, which Arrow can't hold: those of a name that is no UTF-8, and any others."""
    as_bytes = text.encode("utf-8", "surrogateescape") if not _OTHER_SURROGATE.search(text) else None
    if as_bytes is not None:
        return as_bytes.decode("utf-8", "backslashreplace")
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


_OTHER_SURROGATE = re.compile("[\ud800-\udc7f\udd00-\udfff]")  # stands for no byte
