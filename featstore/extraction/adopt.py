"""Adoption: a feature set filed again under another trunk digest, once its values are shown to be that trunk's.

A library upgrade, or another spelling of the same model, changes the digest and not what is computed.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from importlib import metadata

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from featstore.digest import Json
from featstore.errors import FactsDifferError, FeatureStoreError
from featstore.extraction.defaults import NUM_ROWS
from featstore.files.index import first_places
from featstore.files.part import Part
from featstore.files.scaled import ScaledRows
from featstore.files.storage_types import StorageType
from featstore.images.image_set import ImageSet
from featstore.images.pixel_digest import check_pixels, pixel_digest
from featstore.images.render import Job, render
from featstore.images.views import View
from featstore.models.probe import TOLERANCES, Probe, take_probes
from featstore.models.purity import check_pure
from featstore.models.staged import StagedModel
from featstore.models.trunk import Output, Trunk, choose_device, output_at
from featstore.store.gathering import Gathered
from featstore.store.part_facts import part_facts, stage_facts
from featstore.store.sets import FeatureRequest, FeatureSet, batching_for
from featstore.store.spec import FeatureSpec
from featstore.store.store import FeatureStore

_TRIES = 10  # of reading files that are merged and deleted each time


@dataclass(frozen=True, kw_only=True)
class AdoptReport:
    """What an adoption did.

    Attributes:
        key_from: of the old set, which stays.
        key_to: of the new one.
        rows: filed under the new key; those it had already aren't filed again.
        compared: rows that were computed again.
        largest_difference: between them and the stored ones, beyond the rounding of the storage type.
        tolerance: the most that was allowed.
    """

    key_from: str
    key_to: str
    rows: int
    compared: int
    largest_difference: float
    tolerance: float

    def __str__(self) -> str:
        return (
            f"{self.rows:,} rows of set {self.key_from[:8]} filed under {self.key_to[:8]}; {self.compared:,} computed "
            f"again, largest difference {self.largest_difference:.3g} (allowed {self.tolerance:.3g})"
        )


def adopt(
    store: FeatureStore,
    key: str,
    model: StagedModel | nn.Module,
    images: ImageSet,
    *,
    cut: str | None = None,
    view: View | None = None,
    device: torch.device | str = "auto",
    batch_size: int | None = None,
    workers: int | None = None,
    num_rows: int = NUM_ROWS,
    progress: bool = False,
) -> AdoptReport:
    """Files the set of `key` as features of `model` too, if a sample of its rows and its probe come out equal.

    Rows are equal where no value differs by more than the probe's share (`docs/format.md`) of the largest stored
    absolute value among the rows compared, beyond half a unit in the last place of the storage type. The proof is kept
    in the new parts' facts.

    Args:
        store: where the set is.
        key: of the set, or its first digits.
        model: whose trunk gives these values now.
        images: of which `num_rows` that the set has rows of must be here (all of them, if it has fewer).
        cut: name of the cut in `model`; default: what it was called when the set was made.
        view: how `model`'s images are prepared; default: its own view. An augmented set's policy and seed are taken
            from the set, unless they are a person's own, which must be given.
        device: auto, cpu, cuda or cuda:1.
        batch_size: images a pass; default: that of the stored rows on this kind of device.
        workers: threads that read and decode; 0 for none.
        num_rows: to compute again, evenly spread over the rows' digests.
        progress: shows a bar on a terminal.

    Raises:
        ValueError: for an unknown cut or reduction, fewer than one row, or a model whose key the set has already.
        FactsDifferError: if other facts than the trunk differ, or the values do; nothing is written then.
        ImageError: for an image that can't be decoded any more.
        DamagedFileError: if rows of the set don't fit their checksums; the sound parts before it are filed.
        FeatureStoreError: if there is no such set, or too few of its images are here.
    """
    if num_rows < 1:
        raise ValueError(f"num_rows is {num_rows}. Expected at least 1 row to compare, better {NUM_ROWS}. Raise it.")
    old = store.set(key)
    if "imported" in old.facts:
        raise FeatureStoreError(
            f"Set {old.key[:8]} was imported from {old.facts['imported']['source']}, and nobody knows from which view "
            "its rows were computed. Expected a set that extract made. Use it by its key."
        )
    check_pixels(old.pixels, policy=old.spec.rendered.decode, what=f"set {old.key[:8]}")
    candidate = _Candidate.of(old, model, cut=cut, view=view)
    _check_other_facts(old, candidate)
    digests = images.digests(store.known_digests(images))
    places = _sampled(old, images, digests.values, ~digests.is_failed, num_rows)
    chosen = choose_device(device)
    trunk = Trunk(
        candidate.model,
        [candidate.output],
        view=candidate.model.view,
        batching=batching_for([old], chosen.type, batch_size, compile=False),  # values are compared by tolerance
        precision=candidate.spec.precision,
        device=chosen,
    )
    check_pure(candidate.model, candidate.output.cut, batch_size=trunk.batch_size, device=trunk.device)
    probe = _checked_probe(old, candidate, trunk)
    stored = store.features(images.select(places), old)[:].float()
    live = _computed(trunk, candidate.view, images, digests.values, places, workers=workers)
    largest_difference, tolerance = _compared(old, live, stored, [images.ids[place] for place in places])
    proof = {
        "key": old.key,
        "rows": len(places),
        "largest_difference": largest_difference,
        "tolerance": tolerance,
        "versions": {name: metadata.version(name) for name in ("torch", "torchvision")},
    }
    facts = candidate.facts(trunk, probe) | {"adopted": proof}
    rows = _write(store, old, candidate.spec, facts, progress)
    return AdoptReport(
        key_from=old.key,
        key_to=candidate.spec.key,
        rows=rows,
        compared=len(places),
        largest_difference=largest_difference,
        tolerance=tolerance,
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class _Candidate:
    """The model that is said to compute a set's values, and the spec these would have."""

    model: StagedModel
    output: Output
    view: View
    spec: FeatureSpec
    digests: dict[str, str]

    @classmethod
    def of(cls, old: FeatureSet, model: StagedModel | nn.Module, *, cut: str | None, view: View | None) -> _Candidate:
        staged = (
            model if isinstance(model, StagedModel) else StagedModel.from_module(model, view=view and view.evaluation)
        )
        augmented = old.spec.rendered
        wanted = view or staged.view
        if wanted.is_evaluation and augmented.policy is not None and augmented.seed is not None:
            wanted = wanted.with_seed(augmented.policy, augmented.seed)
        staged.check_view(wanted)
        viewed = staged.with_(view=wanted.evaluation)
        output = output_at(viewed, cut or str(old.facts["cut"]), old.spec.reduction)
        digests = viewed.digests()
        spec = FeatureSpec(
            trunk=digests[output.cut],
            pool=output.pool.facts(),
            view=wanted.facts(),
            precision=old.spec.precision,
            dtype=old.spec.dtype,
        )
        return cls(model=viewed, output=output, view=wanted, spec=spec, digests=digests)

    def facts(self, trunk: Trunk, probe: Probe) -> dict[str, Json]:
        """Those of a part."""
        class_tokens, prefix_tokens = self.model.tokens(self.output.cut)
        return part_facts(
            backbone=self.model.name,
            stages=stage_facts(self.model, self.digests)[: self.model.index(self.output.cut) + 1],
            class_tokens=class_tokens,
            prefix_tokens=prefix_tokens,
            profile=trunk.profile(),
            probe=probe.facts(),
            pixels=pixel_digest(self.view.decode),
        )


def _check_other_facts(old: FeatureSet, candidate: _Candidate) -> None:
    if candidate.spec.trunk == old.spec.trunk and candidate.spec.key == old.key:
        raise ValueError(
            f"{candidate.model.name} at {candidate.output.cut} has the key of set {old.key[:8]} already. Expected a "
            "model with another one. There is nothing to do: its features are found."
        )
    differences = [each for each in old.spec.differences(candidate.spec) if each[0] != "trunk"]
    if differences:
        listed = "; ".join(f"{name} (stored {stored}, yours {yours})" for name, stored, yours in differences)
        raise FactsDifferError(
            f"Set {old.key[:8]} can't be adopted for {candidate.model.name} at {candidate.output.cut}: besides the "
            f"trunk they differ in {listed}. Expected the trunk alone to differ. Give the cut and view that the set "
            "was made with (--cut, --size, ...; featstore show lists them), or extract anew."
        )


def _sampled(
    old: FeatureSet, images: ImageSet, digests: NDArray[np.uint8], is_read: NDArray[np.bool_], num_rows: int
) -> NDArray[np.int64]:
    """Places of the images to compute again: evenly spread in the order of their digests."""
    part_of, _ = old.index.find(digests)
    usable = np.flatnonzero((part_of >= 0) & is_read)
    usable = usable[first_places(digests[usable])]
    needed = min(num_rows, old.index.num_images)
    here = usable if len(images.absent(limit=1)) == 0 else np.setdiff1d(usable, images.absent())
    if not needed or len(here) < needed:
        raise FeatureStoreError(
            f"{len(here):,} of the images of {images.name} have a row in set {old.key[:8]} and are here to be "
            f"computed again; {max(needed, 1):,} are needed. Expected the images that the set was made of. Give their "
            "folder, or compare fewer (num_rows)."
        )
    ordered = here[np.lexsort(digests[here].T[::-1])]
    spread: NDArray[np.int64] = ordered[np.arange(needed) * len(ordered) // needed]
    return np.sort(spread)


def _checked_probe(old: FeatureSet, candidate: _Candidate, trunk: Trunk) -> Probe:
    (live,) = take_probes(
        candidate.model, [candidate.output], view=candidate.model.view, precision=trunk.precision, device=trunk.device
    )
    for part in old.probed:
        difference = Probe.from_facts(part.facts["probe"]).difference(live)
        if not difference <= TOLERANCES[trunk.precision]:
            raise FactsDifferError(
                f"{candidate.model.name} at {candidate.output.cut} computes other values than set {old.key[:8]} holds: "
                f"on the probe images they differ by {difference:.2g} of the largest value; {trunk.precision} allows "
                f"{TOLERANCES[trunk.precision]:g}. Nothing was filed. Give the model that the set was made with, or "
                "extract anew."
            )
    return live


def _computed(
    trunk: Trunk,
    view: View,
    images: ImageSet,
    digests: NDArray[np.uint8],
    places: NDArray[np.int64],
    *,
    workers: int | None,
) -> Tensor:
    """The rows of the images at `places`, as an extraction computes them: float32, on the CPU."""
    jobs = (Job(int(place), digests[place].tobytes(), (view,)) for place in places)
    with closing(render(images, jobs, workers=workers)) as rendered:
        views = [each.views[0] for each in rendered if each.views is not None]
    (values,) = trunk(torch.stack(views))
    return values.float().cpu()


def _compared(old: FeatureSet, live: Tensor, stored: Tensor, ids: Sequence[str]) -> tuple[float, float]:
    """The largest difference beyond rounding, and the most that is allowed; refused if it is more."""
    beyond = ((live - stored).abs() - _half_a_unit(stored, old.spec.storage_type)).clamp(min=0).nan_to_num(nan=math.inf)
    tolerance = TOLERANCES[old.spec.precision] * float(stored.abs().max())
    largest_of_row = beyond.reshape(len(beyond), -1).amax(dim=1)
    if bool((largest_of_row > tolerance).any()):
        worst = int(largest_of_row.argmax())
        count = int((largest_of_row > tolerance).sum())
        raise FactsDifferError(
            f"The model computes other values than set {old.key[:8]} holds: {ids[worst]} differs by "
            f"{float(largest_of_row[worst]):.3g}, and {tolerance:.3g} is allowed ({count:,} of {len(ids):,} rows "
            "differ by more). Nothing was filed. Give the model that the set was made with, or extract anew."
        )
    return float(largest_of_row.max()), tolerance


def _half_a_unit(stored: Tensor, storage_type: StorageType) -> Tensor:
    """The most by which rounding to the storage type has moved a value."""
    if storage_type.is_scaled:
        return ScaledRows.of(stored).scales.view(-1, *[1] * (stored.ndim - 1)) / 2
    limits = torch.finfo(storage_type.torch_dtype)
    return (stored.abs() * limits.eps).clamp(min=limits.smallest_normal * limits.eps) / 2


def _write(store: FeatureStore, old: FeatureSet, spec: FeatureSpec, facts: dict[str, Json], progress: bool) -> int:
    """Files the rows of `old` that the new set lacks; how many those were.

    Where parts are gone, which a job has merged meanwhile, the set is looked up again.
    """
    written = 0
    for tries_left in reversed(range(_TRIES)):
        try:
            for count in _written(store, old, spec, facts, progress):
                written += count
        except FileNotFoundError:
            if not tries_left:
                raise
            old = store.set(old.key)
        else:
            break
    return written


def _written(
    store: FeatureStore, old: FeatureSet, spec: FeatureSpec, facts: dict[str, Json], progress: bool
) -> Iterator[int]:
    """Files the rows of `old` that the new set lacks, part by part, and gives the number of each piece."""
    new = store.find_one(FeatureRequest.of(spec))
    failed = {digest: reason for digest, reason in old.failed.items() if new is None or digest not in new.failed}
    is_shown = progress and sys.stderr.isatty()
    with tqdm(total=old.index.num_images, unit="row", disable=not is_shown, file=sys.stderr) as bar:
        for place, part in enumerate(old.index.parts):
            for gathered in _wanted_rows(old, new, spec, place, part):
                gathered.failed, failed = failed, {}
                gathered.write(store, _facts(facts, part))
                yield gathered.num_rows
                bar.update(gathered.num_rows)
    if failed:
        nothing = Gathered(spec, old.parts[0].shape, failed=failed)
        nothing.write(store, _facts(facts, old.parts[0]))


def _facts(facts: dict[str, Json], part: Part) -> dict[str, Json]:
    """`facts` for rows of `part`, which were computed on the profile that it records, and rounded as it says."""
    rounding = {name: part.facts[name] for name in ("rounding",) if name in part.facts}
    return facts | rounding | {"adopted": facts["adopted"] | {"profile": part.facts["profile"]}}


def _wanted_rows(
    old: FeatureSet, new: FeatureSet | None, spec: FeatureSpec, place: int, part: Part
) -> Iterator[Gathered]:
    """The rows of one part that count in the old set and that the new one lacks, in pieces to file; all checked."""
    part_of, row_in = old.index.find(part.digests)
    is_wanted = (part_of == place) & (row_in == np.arange(part.num_rows))
    if new is not None:
        is_wanted &= new.index.find(part.digests)[0] < 0
    gathered = Gathered(spec, part.shape)
    for block_rows, block in part.read_chunks(range(len(part.checksums))):
        here = np.flatnonzero(is_wanted[block_rows.start : block_rows.stop])
        if len(here):
            rows = here + block_rows.start
            copied = block[torch.from_numpy(here)]  # the block's memory is used again
            gathered.add(copied, part.digests[rows], part.decoders[rows])
        if gathered.is_enough:
            yield gathered
            gathered = Gathered(spec, part.shape)
    if gathered.num_rows:
        yield gathered
