"""Foreign features: rows that something else computed, filed under the digest of what they are and used by key alone.

Nobody here knows which model made them, or from which view: their trunk is their own content, so no request fits them.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from featstore.digest import Json, canonical_json, digest_bytes
from featstore.errors import FeatureStoreError
from featstore.exchange.feature_files import ForeignRows, opened_features, rows_of
from featstore.files.index import first_places
from featstore.files.storage_types import STORAGE_TYPES
from featstore.images.digests import Digests
from featstore.images.fileless import images_by_id
from featstore.images.image_set import ImageSet
from featstore.images.views import View
from featstore.models.names import DIMENSIONS, LAYOUTS, layout_of
from featstore.store.folders import short_key
from featstore.store.gathering import Gathered
from featstore.store.part_facts import part_facts, stage_fact
from featstore.store.sets import FeatureRequest, FeatureSet
from featstore.store.spec import FeatureSpec
from featstore.store.store import FeatureStore
from featstore.words import counted

CUT = "imported"
"""What the only cut of such features is called."""


_VERSION = 1  # of the rules for the digests below, see docs/format.md
_NAME_LENGTH = 80  # of an image set's name before the key's digits: more than 100 in all would be cut off
_SMALLEST = 2.0**-149  # above zero, in float32
_FEWEST_STEPS, _LOST_SHARE = 256, 0.01  # as in an extraction, see narrowing.py
_SAME_IMAGE = 1e-2
"""Largest difference, as a share of the largest value, between rows of byte-identical images: their last bits may have
been computed in different batches, or in half precision."""


@dataclass(frozen=True, kw_only=True)
class ImportReport:
    """What an import did.

    Attributes:
        key: of the set.
        images: name of the image set that was filed with it.
        rows: of these images, in the set now; images of equal content share one.
        written: of them, by this import.
        shape: ``*F`` of one row.
        dtype: as stored.
        notes: sentences about what wasn't imported, and what became of the values.
    """

    key: str
    images: str
    rows: int
    written: int
    shape: tuple[int, ...]
    dtype: str
    notes: tuple[str, ...]

    def __str__(self) -> str:
        return (
            f"{self.written:,} rows written, {self.rows - self.written:,} reused "
            f"({'x'.join(map(str, self.shape))} {self.dtype}): set {self.key[:8]}, image set {self.images}"
        )


def import_features(
    store: FeatureStore,
    features: NDArray[Any] | Tensor,
    images: ImageSet,
    *,
    name: str,
    layout: str | None = None,
    source: str | None = None,
    progress: bool = False,
) -> ImportReport:
    """Files features that were computed elsewhere as a set of their own, which only its key finds.

    The same features of the same images, in whatever order, have the same key and are written once.

    Args:
        store: where they go; its folder is made if needed.
        features: ``(N, *F)``, row i of image i, finite; float16, float32 and bfloat16 are kept, float64 becomes
            float32. An array mapped from a ``.npy`` file is read block by block.
        images: N of them. Their rows are filed under the content of their files, all of which must be there; for a set
            without files (`images_by_id`) under digests made of the features and the id, and the image set is then
            filed under `name` and the first digits of the key, as it fits this set alone.
        name: what people call the model, in lists and folders.
        layout: NCHW, NHWC, NLC, NC or other. Default: NC for vectors, NLC for (L, C), NCHW for (C, H, W).
        source: where the features came from, kept as a fact.
        progress: shows a bar on a terminal.

    Raises:
        ValueError: for another number of rows than images, no rows, values that aren't finite or that float32 can't
            hold, or an unknown layout.
        TypeError: for features that aren't an array or tensor of such numbers.
        FeatureStoreError: for images whose files can't be read, and byte-identical images with different features.
        OSError: as the disk gave it; a later import of the same features writes the rest.
    """
    rows = rows_of(features)
    if len(images) != rows.num_rows:
        raise ValueError(
            f"There are {rows.num_rows:,} rows of features and {len(images):,} images in {images.name}. Expected row i "
            "to be of image i. Select the images that have one: images.select(...)."
        )
    return _file(
        store,
        rows,
        images,
        np.arange(len(images)),
        name=name,
        layout=layout,
        source=source or "an array",
        progress=progress,
    )


def import_file(
    store: FeatureStore,
    path: str | os.PathLike[str],
    *,
    name: str,
    images: ImageSet | None = None,
    ids: Sequence[str] | None = None,
    dataset: str | None = None,
    id_dataset: str | None = None,
    layout: str | None = None,
    progress: bool = False,
) -> ImportReport:
    """Files the features in a file as `import_features` does, joined to `images` by id and never by position.

    Args:
        store: where they go.
        path: ``.npy``, HDF5, or ``.safetensors``; also what `export` wrote.
        name: what people call the model.
        images: which images the ids are of. Default: those that the file itself describes, as exported ones do, else
            images known by their ids alone.
        ids: of the file's rows, in order (see `read_ids`). Default: those in the file.
        dataset: name of the features in the file; default ``features``.
        id_dataset: name of the ids in an HDF5 file; default: the first of ``id``, ``ids`` and ``sample_id``.
        layout: of one row, as in `import_features`.
        progress: shows a bar on a terminal.

    Raises:
        ValueError: for a file without ids, a repeated id, another number of ids than rows, ids of which none is an
            image, and as `import_features` and `opened_features` do.
        FeatureStoreError: as `import_features` and `opened_features` do.
    """
    file = Path(path)
    with opened_features(file, dataset=dataset, id_dataset=id_dataset) as found:
        given = found.ids if ids is None else tuple(ids)
        if given is None:
            raise ValueError(_no_ids(file, found.no_ids))
        _check_ids(given, found.rows.num_rows, file)
        described = found.images if ids is None else None
        target = images or described or images_by_id(given, where=str(file), name=file.stem)
        image_of, notes = _joined(given, target, file)
        report = _file(
            store, found.rows, target, image_of, name=name, layout=layout, source=file.name, progress=progress
        )
    return replace(report, notes=(*notes, *report.notes))


# ---- Joining by id


def _no_ids(file: Path, reason: str | None) -> str:
    beside = file.with_suffix(".csv")
    given = f"--ids {beside}, which is there" if beside.is_file() else "a list of them: --ids ids.txt"
    return (
        f"{file} holds no ids{f' ({reason})' if reason else ''}, so nothing says which image a row is of. Expected one "
        f"id a row; rows are never joined by position. Give {given}."
    )


def _check_ids(ids: Sequence[str], num_rows: int, file: Path) -> None:
    if len(ids) != num_rows:
        raise ValueError(
            f"There are {len(ids):,} ids for the {num_rows:,} rows of {file}. Expected one a row, in order. Give the "
            "list that was made with the features."
        )
    repeated = [name for name, number in Counter(ids).items() if number > 1]
    if repeated:
        raise ValueError(
            f"{counted(len(repeated), 'id')} for the rows of {file} {'is' if len(repeated) == 1 else 'are'} given "
            f"more than once ({_some(repeated)}). Expected each once, as a row finds its image by the id. Give every "
            "image an id of its own."
        )


def _joined(ids: Sequence[str], images: ImageSet, file: Path) -> tuple[NDArray[np.int64], list[str]]:
    """The place of each row's image, -1 where there is none; and sentences about what is left on both sides."""
    places = {name: place for place, name in enumerate(images.ids)}
    image_of = np.array([places.get(name, -1) for name in ids], np.int64)
    unmatched = [name for name, image in zip(ids, image_of.tolist(), strict=True) if image < 0]
    if len(unmatched) == len(ids):
        raise ValueError(
            f"None of the {len(ids):,} ids for {file} ({_some(ids)}) is an image of {images.name} "
            f"({_some(images.ids)}). Expected paths below the images' folder, with /. Give ids that are written as the "
            "images are."
        )
    lacking = np.setdiff1d(np.arange(len(images)), image_of)
    notes = []
    if unmatched:
        count = f"{counted(len(unmatched), 'id')} {'is' if len(unmatched) == 1 else 'are'}"
        notes.append(f"{count} no image of {images.name}, and not imported ({_some(unmatched)})")
    if len(lacking):
        count = f"{counted(len(lacking), 'image')} of {images.name} {'has' if len(lacking) == 1 else 'have'}"
        notes.append(f"{count} no row ({_some([images.ids[place] for place in lacking[:4]])})")
    return image_of, notes


# ---- Filing


def _file(
    store: FeatureStore,
    rows: ForeignRows,
    images: ImageSet,
    image_of: NDArray[np.int64],
    *,
    name: str,
    layout: str | None,
    source: str,
    progress: bool,
) -> ImportReport:
    """Files `rows`, of which row i is of image ``image_of[i]``, or of none where that is -1."""
    if not name.strip():
        raise ValueError(f"name is {name!r}. Expected what people call the model, such as 'clip-vit-b32'. Name it.")
    content = _Content(rows, images, image_of, _digests(store, images, image_of), _layout(layout, rows.shape))
    content.check_twins(content.hashes(progress=progress))
    trunk = content.trunk
    spec = FeatureSpec(
        trunk=trunk,
        pool={"reduction": "none"},
        view=View().facts(),  # nobody knows how the images were prepared: see docs/format.md
        precision="fp32",
        dtype=content.dtype,
    )
    digests = content.digests
    if content.is_by_id.any():
        # Such digests are of this set alone: no other import, nor photographs of that name, may replace their table.
        images = replace(images, name=f"{name[:_NAME_LENGTH]}-{short_key(spec.key)}")
        digests = _with_derived(digests, images, trunk)
    stored = store.find_one(FeatureRequest.of(spec))
    store.save_images(images, digests)
    wanted = digests.values[image_of[content.places]]
    is_first = np.zeros(len(wanted), bool)
    is_first[first_places(wanted)] = True
    is_new = is_first & _lacks(stored, wanted)
    facts = _facts(name, content.layout, rows.shape, trunk, source)
    _write(store, spec, content, is_new, wanted, facts, progress=progress)
    return ImportReport(
        key=spec.key,
        images=images.name,
        rows=int(is_first.sum()),
        written=int(is_new.sum()),
        shape=rows.shape,
        dtype=content.dtype,
        notes=content.notes,
    )


class _Content:
    """What is imported, and the digest of it that stands for a model.

    Args:
        rows: as they came.
        images: some of which they are of.
        image_of: the image of each row, or -1.
        digests: of the images' contents; those without are known by their ids.
        layout: of one row.
    """

    def __init__(
        self, rows: ForeignRows, images: ImageSet, image_of: NDArray[np.int64], digests: Digests, layout: str
    ) -> None:
        self.rows, self.images, self.image_of, self.digests, self.layout = rows, images, image_of, digests, layout
        self.places = np.flatnonzero(image_of >= 0)
        self._hashes: list[bytes] = []  # of the rows at `places`, once they have been read
        self._largest, self._num_values, self._num_lost = 0.0, 0, 0  # of float64, what float32 makes of it

    @property
    def dtype(self) -> str:
        """As stored."""
        return "float32" if self.rows.dtype == torch.float64 else str(self.rows.dtype).removeprefix("torch.")

    @property
    def is_by_id(self) -> NDArray[np.bool_]:
        """Which of the rows at `places` are of images known by their ids alone."""
        return self.digests.is_failed[self.image_of[self.places]]

    @cached_property
    def names(self) -> list[bytes]:
        """What tells the image of each row at `places`: the digest of its content, or of its id."""
        return [
            _id_digest(self.images.ids[image]) if by_id else self.digests.values[image].tobytes()
            for image, by_id in zip(self.image_of[self.places].tolist(), self.is_by_id.tolist(), strict=True)
        ]

    @cached_property
    def trunk(self) -> str:
        """SHA-256 of the content, in whatever order it came."""
        header = ["imported", _VERSION, self.dtype, list(self.rows.shape), self.layout, len(self._hashes)]
        return digest_bytes(canonical_json(header).encode("ascii") + b"".join(sorted(self._hashes)))

    def hashes(self, *, progress: bool) -> list[bytes]:
        """SHA-256 of the image's name and the row, for each row at `places`; refuses what can't be stored."""
        for start, block in self.rows.blocks(progress=progress, verb="checked"):
            self._check_storable(block, start)
            chosen = self._chosen(start, len(block))
            self._count_lost(block)
            self._hashes += self._hashed(chosen, _narrowed(block[self.places[chosen] - start], self.dtype))
        if 0 < self._largest < _FEWEST_STEPS * _SMALLEST:
            raise ValueError(
                f"The features reach {self._largest:.2g} only. float64 is stored as float32, whose smallest number is "
                f"{_SMALLEST:.2g}, so most would become zeros. Multiply them by a constant first."
            )
        return self._hashes

    @property
    def notes(self) -> tuple[str, ...]:
        """What became of the values, once they have been read."""
        if self.rows.dtype != torch.float64:
            return ()
        if self._num_lost < _LOST_SHARE * self._num_values or not self._num_lost:
            return ("float64 became float32",)
        share = 100 * self._num_lost / self._num_values
        return (
            f"float64 became float32; {share:.3g} % of the values that aren't zero became zeros, being smaller than "
            f"its smallest, {_SMALLEST:.2g}",
        )

    def blocks(self, *, progress: bool) -> Iterator[tuple[range, Tensor]]:
        """The rows at `places` as they are stored, in order, some at a time, with their numbers among `places`.

        Raises:
            FeatureStoreError: for a row that isn't the one that was hashed.
        """
        for start, block in self.rows.blocks(progress=progress, verb="written"):
            chosen = self._chosen(start, len(block))
            values = _narrowed(block[self.places[chosen] - start], self.dtype)
            hashes = self._hashed(chosen, values)
            for number, found in zip(chosen, hashes, strict=True):
                if found != self._hashes[number]:
                    raise FeatureStoreError(
                        f"Row {self.places[number]:,} of the features isn't what it was a moment ago: something has "
                        "written to them during the import. Expected them unchanged, as they are filed under the "
                        "digest of what they are. Import them again when they are complete."
                    )
            yield chosen, values

    def _chosen(self, start: int, count: int) -> range:
        """Which of `places` are among the `count` rows from `start` on."""
        return range(*np.searchsorted(self.places, [start, start + count]).tolist())

    def _hashed(self, chosen: range, values: Tensor) -> list[bytes]:
        rows = values.reshape(len(values), -1).view(torch.uint8).numpy()
        return [
            hashlib.sha256(self.names[number] + row.tobytes()).digest()
            for number, row in zip(chosen, rows, strict=True)
        ]

    def check_twins(self, hashes: Sequence[bytes]) -> None:
        """Refuses unlike rows of byte-identical images, which share one."""
        first: dict[bytes, int] = {}
        for place, (name, own) in enumerate(zip(self.names, hashes, strict=True)):
            other = first.setdefault(name, place)
            if hashes[other] != own:
                self._check_alike(int(self.places[other]), int(self.places[place]))

    def _check_alike(self, one: int, two: int) -> None:
        first, second = (self.rows.read(place, place + 1).double() for place in (one, two))
        difference, largest = float((first - second).abs().max()), float(torch.maximum(first.abs(), second.abs()).max())
        if difference > _SAME_IMAGE * largest:
            pair = [self.images.ids[int(self.image_of[place])] for place in (one, two)]
            raise FeatureStoreError(
                f"{pair[0]} and {pair[1]} are byte for byte the same image, and their features differ by "
                f"{difference:.3g}, with {largest:.3g} the largest value. Expected one row for both, as rows belong to "
                "contents. Check the ids, or import by ids alone: --ids without --images."
            )

    def _count_lost(self, block: Tensor) -> None:
        if block.dtype == torch.float64:
            num_values = int(block.count_nonzero())
            self._num_values += num_values
            self._num_lost += num_values - int(block.float().count_nonzero())
            self._largest = max(self._largest, float(block.abs().max()))

    def _check_storable(self, block: Tensor, start: int) -> None:
        flat = block.reshape(len(block), -1)
        is_finite = flat.isfinite().all(dim=1)
        limit = torch.finfo(torch.float32).max
        fits = ~is_finite | (flat.abs().amax(dim=1) <= limit)
        for is_good, what in (
            (is_finite, "a value that isn't finite. Expected none"),
            (fits, f"a value beyond {limit:.3g}. Expected what float32 can hold"),
        ):
            wrong = torch.nonzero(~is_good).reshape(-1)
            if len(wrong):
                row = start + int(wrong[0])
                image = int(self.image_of[row])
                named = f" ({self.images.ids[image]})" if image >= 0 else ""
                raise ValueError(f"Row {row:,}{named} has {what}. Compute it again, or leave it out.")


def _digests(store: FeatureStore, images: ImageSet, image_of: NDArray[np.int64]) -> Digests:
    """The digests of the images' contents; of a set without files some or all are missing."""
    digests = images.digests(store.known_digests(images))
    failed = np.intersect1d(image_of, np.array([*digests.failed], np.int64)).tolist()
    if failed and images.source.absence is None:
        named = "; ".join(f"{images.ids[image]}: {digests.failed[image]}" for image in failed[:3])
        raise FeatureStoreError(
            f"{len(failed):,} of the images that features are given for can't be read ({named}"
            f"{'; ...' * (len(failed) > 3)}). Expected all of them, as rows are filed under the images' content. Give "
            "their folder, or import by ids alone: --ids without --images."
        )
    return digests


def _with_derived(digests: Digests, images: ImageSet, trunk: str) -> Digests:
    """`digests`, and one made of trunk and id for each image without."""
    values = digests.values.copy()
    for image in digests.failed:
        derived = canonical_json(["imported", trunk, images.ids[image]]).encode("ascii")
        values[image] = np.frombuffer(hashlib.sha256(derived).digest(), np.uint8)
    return Digests(values=values, failed={}, stats=digests.stats)


def _id_digest(image: str) -> bytes:
    return hashlib.sha256(canonical_json(["id", image]).encode("ascii")).digest()


def _lacks(stored: FeatureSet | None, digests: NDArray[np.uint8]) -> NDArray[np.bool_]:
    if stored is None:
        return np.ones(len(digests), bool)
    result: NDArray[np.bool_] = stored.index.find(digests)[0] < 0
    return result


def _facts(name: str, layout: str, shape: tuple[int, ...], trunk: str, source: str) -> dict[str, Json]:
    facts = part_facts(
        backbone=name,
        stages=[stage_fact(CUT, layout, shape, trunk)],
        class_tokens=0,
        profile={"batch_size": 1, "device": "unknown"},
        probe={"values": [[], []], "largest": 0.0},
    )
    return facts | {"imported": {"source": source}}


def _write(
    store: FeatureStore,
    spec: FeatureSpec,
    content: _Content,
    is_new: NDArray[np.bool_],
    digests: NDArray[np.uint8],
    facts: dict[str, Json],
    *,
    progress: bool,
) -> None:
    """Files the new ones of `content`'s rows, whose `digests` these are, in parts of `PART_BYTES` or a little more.

    Raises:
        FeatureStoreError: for a row that isn't what it was when its hash became part of the key.
    """
    gathered = Gathered(spec, content.rows.shape)
    for chosen, values in content.blocks(progress=progress) if is_new.any() else ():
        new = np.flatnonzero(is_new[chosen.start : chosen.stop])
        if len(new):
            gathered.add(values[torch.from_numpy(new)], digests[new + chosen.start], np.zeros(len(new), np.uint8))
        if gathered.is_enough:
            gathered.write(store, facts)
            gathered = Gathered(spec, content.rows.shape)
    if gathered.num_rows:
        gathered.write(store, facts)


def _narrowed(block: Tensor, dtype: str) -> Tensor:
    return block.to(STORAGE_TYPES[dtype].torch_dtype).contiguous()


def _layout(layout: str | None, shape: tuple[int, ...]) -> str:
    if layout is None:
        return layout_of(shape)
    dimensions = DIMENSIONS.get(layout, len(shape))
    if layout not in LAYOUTS or dimensions != len(shape):
        raise ValueError(
            f"layout is {layout!r} for rows of {'x'.join(map(str, shape))}. Expected one of {', '.join(LAYOUTS)} with "
            "as many dimensions as the features have. Correct it, or leave it out."
        )
    return layout


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + ", ..." * (len(names) > 3)
