"""Opening: a plan made ready for computing - its trunk made, judged and probed, once for all images."""

from __future__ import annotations

import math
import time

import numpy as np
import torch
from numpy.typing import NDArray

from featstore.errors import Doubtful, FeatureStoreError, OnError
from featstore.extraction.failures import check_max_errors, refuse_unreadable
from featstore.extraction.job import Session, refuse_changed
from featstore.extraction.lowering import Lowering
from featstore.extraction.narrowing import refuse_too_small
from featstore.extraction.opened import Input, Opened
from featstore.extraction.pixels import CUT, NO_PROBE, OUTPUT, PixelTrunk, StoredPixels
from featstore.extraction.plan import Plan, PlannedModel, PlannedSet
from featstore.extraction.rounding import Rounding, sampled_roundings
from featstore.files.index import first_places
from featstore.images.pixel_digest import check_pixels
from featstore.images.processes import renderers_for
from featstore.images.render import check_workers
from featstore.images.views import View
from featstore.models.compiled import check_compiler
from featstore.models.names import Batching
from featstore.models.probe import Probe, check_compiled, check_probe, take_probes
from featstore.models.staged import StagedModel
from featstore.models.trunk import Output, Trunk, check_batch_size, choose_device, default_batch_size
from featstore.store.part_facts import stage_facts
from featstore.store.sets import batching_for
from featstore.store.store import FeatureStore
from featstore.timing import timed

AHEAD_BATCHES = 2
AHEAD_BYTES = 256 << 20
"""Views are rendered ahead of the passes for so many of these, as far as they take no more memory than that."""


def open_plan(
    planned: Plan,
    store: FeatureStore,
    *,
    on_error: OnError = "raise",
    max_errors: int | None = None,
    doubtful: Doubtful = "note",
    device: torch.device | str = "auto",
    batch_size: int | None = None,
    compile: bool | None = None,
    workers: int | None = None,
    is_alone: bool = True,
) -> Session:
    """Makes the trunk of a plan with something to compute, and judges it: once for all that the session then runs.

    Arguments and errors are those of `extract`. `is_alone` says that no other session computes other images of the
    plan: only then, and for no shard, is a batch size lowered where memory has no room for it, since all need one.
    """
    is_alone = is_alone and planned.shard is None
    chosen = choose_device(device)
    check_batch_size(batch_size)
    check_workers(workers)
    check_max_errors(max_errors, on_error)
    refuse_unreadable(planned, on_error)
    lacking = _lacking(planned, chosen.type, batch_size, compile)
    for each in (planned.sets[place] for _, _, places in lacking for place in places):
        if each.stored is not None:
            check_pixels(each.stored.pixels, policy=each.view.decode, what=_named(each))
    input_at = {
        place: Input(model, planned.sets[place].view)
        for model, (_, _, places) in enumerate(lacking)
        for place in places
    }
    inputs = list(dict.fromkeys(input_at.values()))
    input_of = {place: inputs.index(each) for place, each in input_at.items()}
    is_needed = _needed(planned, input_of, len(inputs))
    most = max(batching.batch_size or default_batch_size(chosen) for _, batching, _ in lacking)
    ahead = _ahead(is_needed, inputs, most)
    views = list(dict.fromkeys(each.view.pixels for each in inputs))
    # Who refuses doubtful images must have them decoded: pixels don't tell.
    usable = views if doubtful == "note" else []
    stored = StoredPixels.of(planned.images, planned.digests.values, store, usable)
    has_pixels = np.logical_and.reduce(
        [~needed | stored.has(each.view.pixels) for each, needed in zip(inputs, is_needed, strict=True)]
    )
    renderers = renderers_for(
        planned.images.source,
        views,
        num_images=int((is_needed.any(axis=0) & ~has_pixels).sum()),
        workers=workers,
        doubtful=doubtful,
        ahead=ahead,
    )
    try:
        opened = [
            _opened(planned, source, places, chosen, batching, workers, is_alone=is_alone)
            for source, batching, places in lacking
        ]
        with timed("key"):
            refuse_changed(planned)  # trunks and probes, too, must be those of the planned models
    except BaseException:
        if renderers is not None:
            renderers.close()
        raise
    return Session(
        planned=planned,
        store=store,
        opened=opened,
        inputs=inputs,
        input_of=input_of,
        is_needed=is_needed,
        stored=stored,
        has_pixels=has_pixels,
        on_error=on_error,
        max_errors=max_errors,
        doubtful=doubtful,
        workers=workers,
        ahead=ahead,
        renderers=renderers,
    )


def check_can_compile(compile: bool | None, device: torch.device | str) -> None:
    """Raises ValueError where compiled code is asked for and can't be made here, before anything is read."""
    if compile:
        check_compiler(choose_device(device))


def _lacking(
    planned: Plan, device_type: str, batch_size: int | None, compile: bool | None
) -> list[tuple[PlannedModel, Batching, list[int]]]:
    """The models that lack rows, with their sets; once for each way in which rows of their sets are computed.

    A set goes on as it began, and a new one as the first of its model's others: of sets that began otherwise than each
    other each kind has a trunk of its own.
    """
    found = []
    for source, places in planned.models.items():
        stored = [planned.sets[place].stored for place in places]
        alike: dict[Batching, list[int]] = {}
        for place in places:
            own = planned.sets[place].stored
            alike.setdefault(batching_for([own, *stored], device_type, batch_size, compile), []).append(place)
        found += [(source, batching, together) for batching, together in alike.items()]
    return [each for each in found if any(planned.sets[place].is_missing.any() for place in each[2])]


def _opened(
    planned: Plan,
    source: PlannedModel,
    places: list[int],
    device: torch.device,
    batching: Batching,
    workers: int | None,
    *,
    is_alone: bool,
) -> Opened:
    """A model with its trunk, which is a function of one image, and of each output the probe and the rounding."""
    sets = [planned.sets[place] for place in places]
    if sets[0].spec.is_pixels:
        pixel_trunk = PixelTrunk(batching.batch_size or default_batch_size(device))
        return Opened(
            planned=source,
            places=places,
            trunk=pixel_trunk,
            lowering=Lowering(source.model, sets, pixel_trunk, is_alone=is_alone),
            probes={OUTPUT: NO_PROBE},
            stages={CUT: stage_facts(source.model, source.stage_digests)},
            roundings={},
        )
    model = source.model.with_(view=sets[0].view.evaluation)
    outputs = list(dict.fromkeys(each.output for each in sets))
    lacking = list(dict.fromkeys(each.output for each in sets if each.is_missing.any()))
    trunk = Trunk(
        model,
        # Compiled code depends on all cuts that are taken: who goes on with a job gets the same rows.
        outputs if batching.compiled else lacking,
        view=model.view,
        batching=batching,
        precision=sets[0].spec.precision,
        device=device,
    )
    lowering = Lowering(model, sets, trunk, is_alone=is_alone)
    compile_seconds = 0.0

    def judged() -> tuple[dict[Output, Probe], dict[Output, Rounding]]:
        nonlocal compile_seconds
        with timed("purity"):
            lowering.judge()
        with timed("probe"):
            probes = _checked_probes(sets, model, outputs, trunk)
        if batching.compiled:
            started = time.perf_counter()
            with timed("compile"):
                check_compiled(trunk, probes, name=model.name)
            compile_seconds = time.perf_counter() - started
        return probes, sampled_roundings(planned, sets, trunk, workers=workers)

    probes, roundings = lowering.fitted(judged)
    stages = stage_facts(model, source.stage_digests)
    return Opened(
        planned=source,
        places=places,
        trunk=trunk,
        lowering=lowering,
        probes=probes,
        stages={each.cut: stages[: model.index(each.cut) + 1] for each in sets},
        roundings=roundings,
        compile_seconds=compile_seconds,
    )


def _ahead(is_needed: NDArray[np.bool_], inputs: list[Input], batch_size: int) -> int:
    """How many images to render ahead: for some passes of the model that gets the fewest of an image."""
    views: dict[View, NDArray[np.bool_]] = {}
    for each, needed in zip(inputs, is_needed, strict=True):
        pixels = each.view.pixels
        views[pixels] = views[pixels] | needed if pixels in views else needed
    num_bytes = sum(needed * (each.channels * each.size**2) for each, needed in views.items())
    of_models = [[each.model == model for each in inputs] for model in range(1 + max(each.model for each in inputs))]
    fewest = min(int(is_needed[of_model].sum(axis=0).max(initial=1)) for of_model in of_models)
    wanted = AHEAD_BATCHES * batch_size // max(1, fewest) + 1
    return min(wanted, max(1, AHEAD_BYTES // int(np.max(num_bytes, initial=1))))


def _needed(planned: Plan, input_of: dict[int, int], num_inputs: int) -> NDArray[np.bool_]:
    """See `Session.is_needed`.

    The same content in two splits may need seeds in one of them only, so its views may come from two images.
    """
    needed = np.zeros((num_inputs, len(planned.images)), dtype=bool)
    for place, given in input_of.items():
        needed[given] |= planned.sets[place].is_missing & ~planned.digests.is_failed
    for row in needed:
        places = np.flatnonzero(row)
        row[places] = False
        row[places[first_places(planned.digests.values[places])]] = True
    return needed


def _checked_probes(
    sets: list[PlannedSet], model: StagedModel, outputs: list[Output], trunk: Trunk
) -> dict[Output, Probe]:
    precision = trunk.precision
    taken = take_probes(model, outputs, view=trunk.view, precision=precision, device=trunk.device)
    probes = dict(zip(outputs, taken, strict=True))
    for output, probe in probes.items():
        if not math.isfinite(probe.largest):
            raise FeatureStoreError(
                f"{model.name} at {output.cut}: the activations of the two probe images aren't finite. The weights may "
                f"be damaged, or {precision} too narrow for this model (--precision fp32)."
            )
    for each in sets:
        if each.is_missing.any():
            refuse_too_small(probes[each.output], each.spec, name=model.name, cut=each.cut)
        for part in () if each.stored is None else each.stored.probed:  # whichever wrote last, all of it is one set
            check_probe(
                part.facts["probe"],
                probes[each.output],
                precision=precision,
                what=_named(each),
                profile=part.facts["profile"],
                now=trunk.profile(),
            )
    return probes


def _named(each: PlannedSet) -> str:
    return f"set {each.spec.key[:8]} ({each.cut} {each.spec.reduction})"
