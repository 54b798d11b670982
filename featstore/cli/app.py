"""The `featstore` program: extract features, keep the stores that hold them, see where a backbone can be cut."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, get_args

import typer

from featstore.cli import backbones, exchange, store, view
from featstore.cli.flags import (
    AugmentFlags,
    ImageFlags,
    OutputFlags,
    RunFlags,
    StoreOption,
    ViewFlags,
    open_store,
    spread,
)
from featstore.cli.models import ModelsFlags
from featstore.cli.program import (
    DONE,
    FAILED,
    INCOMPLETE,
    IncompleteError,
    new_app,
    one_of,
    run,
    show,
    show_json,
    table,
    tell,
    tell_all,
)
from featstore.digest import Json
from featstore.errors import Doubtful
from featstore.files.storage_types import DEFAULT_STORAGE_TYPE, STORAGE_TYPES
from featstore.models.names import DEFAULT_PRECISION, PRECISIONS, REDUCTIONS
from featstore.timing import step_seconds
from featstore.words import counted, duration_text, size_text

if TYPE_CHECKING:
    from featstore.extraction.estimate import Estimate
    from featstore.extraction.extract import ExtractReport
    from featstore.extraction.plan import Plan
    from featstore.extraction.ray_actors import Ray
    from featstore.extraction.shards import Shard

ENGINES = ("local", "ray")
DOUBTFUL: tuple[Doubtful, ...] = get_args(Doubtful)
DEFAULTS = """\b
Defaults that depend on what is asked for:
  --cut         the last maps or tokens before the network's own pooling:
                resnet layer4, squeezenet features.12, vit encoder.ln;
                without any, the vector before its last layer
  --reduce      auto: concat for maps, token for a ViT, none for vectors
  --size ...    the weights' own preprocessing; a weights file or a model of
                your own has none: 256/224 and ImageNet's mean and deviation
  --valid       0.2 of images without a split of their own, by --split-seed 0
  --precision   fp32 is true float32 on every device; tf32, bf16 and fp16
                are other values and other features
  --batch-size  that of rows already stored, else 32 on a CPU, 256 on a GPU;
                of a new set halved, and noted, where a GPU has no room
  --compile     as rows already stored were computed, else not

\b
Exit codes: 0 done; 1 failed; 2 wrong usage; 3 incomplete: the file of an
image isn't there; with --on-error skip, which extracts the others all the
same, also if it vanished or changed meanwhile; or, for status, an image has
no features yet; 130 ended by Ctrl-C, 143 by SIGTERM: what was computed is
filed. Who sends another signal doesn't wait for that.
"""

app = new_app(help=__doc__)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program and returns its exit code; `argv` are the arguments after its name."""
    return run(app, "featstore", argv)


@dataclass(frozen=True, kw_only=True)
class SetFlags:
    """Which feature sets, and in which store."""

    store: StoreOption
    cut: Annotated[
        list[str] | None,
        typer.Option(metavar="CUT[:REDUCE]", help="Where to cut; may be given again.", show_default="see below"),
    ] = None
    reduce: Annotated[
        str, typer.Option(metavar="|".join(("auto", *REDUCTIONS)), help="Reduction of cuts without their own.")
    ] = "auto"
    dtype: Annotated[str, typer.Option(metavar="|".join(STORAGE_TYPES), help="Of the stored values.")] = (
        DEFAULT_STORAGE_TYPE
    )
    precision: Annotated[str, typer.Option(metavar="|".join(PRECISIONS), help="Of the arithmetic.")] = DEFAULT_PRECISION
    batch_size: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Images a pass.", show_default="see below")
    ] = None
    compile: Annotated[
        bool | None,
        typer.Option(
            "--compile/--no-compile",
            help="Run compiled code: up to twice as fast, after up to a minute.",
            show_default="see below",
        ),
    ] = None

    def __post_init__(self) -> None:
        one_of("--reduce", self.reduce, ("auto", *REDUCTIONS))
        one_of("--dtype", self.dtype, tuple(STORAGE_TYPES))
        one_of("--precision", self.precision, PRECISIONS)
        if Path(self.store).exists() and not Path(self.store).is_dir():
            raise ValueError(f"--store {self.store} is a file. Expected a folder, or the name of a new one.")

    @property
    def cuts(self) -> list[str]:
        """The cuts that were named."""
        return self.cut or []


@dataclass(frozen=True, kw_only=True)
class ExtractFlags(RunFlags):
    """How an extraction is done; no value depends on it."""

    doubtful: Annotated[
        str,
        typer.Option(
            metavar="|".join(DOUBTFUL),
            help="An image that looks damaged or too dark: name it, or take it as unreadable.",
        ),
    ] = "note"
    shard: Annotated[
        str | None,
        typer.Option(
            metavar="I/N|slurm|kubernetes/N|torchrun",
            help="Of N jobs that share the images, the one counted I from 0; or as what started the job tells.",
            show_default="all images; of extract under torchrun, its own",
        ),
    ] = None
    max_errors: Annotated[
        int | None,
        typer.Option(
            min=0,
            metavar="N",
            help="With --on-error skip: stop at more images than this that fail.",
            show_default="any number is left out",
        ),
    ] = None

    engine: Annotated[
        str, typer.Option(metavar="|".join(ENGINES), help="What computes: this process, or actors of a Ray cluster.")
    ] = "local"
    actors: Annotated[int | None, typer.Option(min=1, metavar="N", help="Of Ray.", show_default=False)] = None
    gpus_per_actor: Annotated[
        float | None, typer.Option(min=0, metavar="G", help="Of Ray.", show_default="0: processors")
    ] = None
    ray_address: Annotated[
        str | None,
        typer.Option(metavar="auto|ray://HOST:PORT", help="Of Ray's cluster.", show_default="one of this machine"),
    ] = None

    def __post_init__(self) -> None:
        one_of("--doubtful", self.doubtful, DOUBTFUL)
        self.given_engine()
        self.given_shard()
        super().__post_init__()
        if self.max_errors is not None and self.on_error == "raise":
            raise ValueError(
                f"--max-errors {self.max_errors} is given, but with --on-error raise the first image that fails stops "
                "the job. Add --on-error skip, or leave out --max-errors."
            )

    def given_engine(self) -> Ray | None:
        """What --engine says; None for this process."""
        engine = one_of("--engine", self.engine, ENGINES)
        of_ray = {"--actors": self.actors, "--gpus-per-actor": self.gpus_per_actor, "--ray-address": self.ray_address}
        given = [flag for flag, value in of_ray.items() if value is not None]
        if engine == "local":
            if given:
                raise ValueError(
                    f"{given[0]} is given, and it is about Ray's actors. Add --engine ray, or leave it out."
                )
            return None
        if self.actors is None:
            raise ValueError("--engine ray is given without --actors. Expected how many share the work: --actors 8.")
        from featstore.extraction.ray_actors import Ray

        return Ray(actors=self.actors, gpus_per_actor=self.gpus_per_actor or 0, address=self.ray_address)

    def given_shard(self) -> Shard | None:
        """What --shard says; None without it."""
        if self.shard is None:
            return None
        from featstore.extraction.shards import shard_of

        return shard_of(self.shard, os.environ, flag="--shard")

    def as_started(self) -> ExtractFlags:
        """These flags; of a process that torchrun started with its shard, GPU and processors where none are given.

        Torch then computes with its share of the processors; beside a GPU these decode, and torch is left alone.
        """
        is_launched = "RANK" in os.environ and "WORLD_SIZE" in os.environ
        if self.shard != "torchrun" and (self.shard is not None or not is_launched):
            return self
        import torch

        from featstore.extraction.shards import local_device, local_threads, local_workers
        from featstore.machine import num_processors

        device = local_device(self.device, os.environ, num_gpus=torch.cuda.device_count())
        threads = local_threads(device, os.environ, num_processors=num_processors())
        if threads is not None:
            torch.set_num_threads(threads)
        workers = self.workers
        if workers is None:
            workers = local_workers(os.environ, num_processors=num_processors())
        return replace(self, shard="torchrun", device=device, workers=workers)


@app.command(epilog=DEFAULTS)
@spread
def extract(
    images: ImageFlags,
    model: ModelsFlags,
    sets: SetFlags,
    view: ViewFlags,
    augment: AugmentFlags,
    how: ExtractFlags,
    output: OutputFlags,
) -> None:
    """Compute the features that a store lacks, and file them."""
    how = how.as_started()
    if how.engine == "local":
        _check_can_compile(sets, how)
    with _steps_told(output):
        planned = _planned(images, model, sets, view, augment, how)
        from featstore.extraction.extract import run_plan

        tell(planned.describe())
        if how.on_image_error == "raise":
            _refuse_absent(planned)
        try:
            report = run_plan(
                planned,
                open_store(sets.store),
                on_error=how.on_image_error,
                max_errors=how.max_errors,
                doubtful=one_of("--doubtful", how.doubtful, DOUBTFUL),
                device=how.device,
                batch_size=sets.batch_size,
                compile=sets.compile,
                workers=how.workers,
                progress=bool(planned.is_missing.any()),
                engine=how.given_engine(),
            )
        except KeyboardInterrupt as interrupt:
            interrupt.add_note("What was computed is filed; the same command computes the rest.")
            raise
    _report(report, output)
    raise typer.Exit(INCOMPLETE if report.missing else DONE)


@app.command(epilog=DEFAULTS)
@spread
def status(
    images: ImageFlags,
    model: ModelsFlags,
    sets: SetFlags,
    view: ViewFlags,
    augment: AugmentFlags,
    how: ExtractFlags,
    output: OutputFlags,
) -> None:
    """Count the images that a store has features of.

    Takes the flags of extract and computes nothing.
    """
    with _steps_told(output):
        planned = _planned(images, model, sets, view, augment, how)
    counts = planned.status(on_error=how.on_error)
    if output.json:
        show_json(counts)
    else:
        failed = f", {counts['failed']:,} failed" if counts["failed"] else ""
        show(
            f"{counts['images']:,} images, {counts['stored']:,} stored, {planned.to_compute(on_error=how.on_error)}"
            f"{failed}, {size_text(counts['bytes'])}"
        )
        tell_all(planned.sizes(on_error=how.on_error))
    raise typer.Exit(INCOMPLETE if counts["missing"] else DONE)


@dataclass(frozen=True, kw_only=True)
class EstimateFlags(ExtractFlags):
    """How an extraction would be done, and on what."""

    devices: Annotated[str, typer.Option(metavar="N,N", help="How many devices to tell the time of.")] = "1,8"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not all(each.isascii() and each.isdigit() and int(each) for each in self.devices.split(",")):
            raise ValueError(f"--devices is {self.devices!r}. Expected numbers from 1 on, such as --devices 1,8.")

    @property
    def counts(self) -> list[int]:
        """Numbers of devices."""
        return [int(each) for each in self.devices.split(",")]


@app.command(epilog=DEFAULTS)
@spread
def estimate(
    images: ImageFlags,
    model: ModelsFlags,
    sets: SetFlags,
    view: ViewFlags,
    augment: AugmentFlags,
    how: EstimateFlags,
    output: OutputFlags,
) -> None:
    """Say what an extraction would write, how fast each stage of it is, and how long it would take.

    Takes the flags of extract; tries 64 of the missing images, and files nothing.
    """
    started = time.perf_counter()
    _check_can_compile(sets, how)
    with _steps_told(output):
        planned = _planned(images, model, sets, view, augment, how)
        from featstore.extraction.estimate import estimate_plan

        tell(planned.describe())
        found = estimate_plan(
            planned,
            open_store(sets.store),
            on_error=how.on_image_error,
            max_errors=how.max_errors,
            doubtful=one_of("--doubtful", how.doubtful, DOUBTFUL),
            device=how.device,
            batch_size=sets.batch_size,
            compile=sets.compile,
            workers=how.workers,
            started=started,
        )
    _show_estimate(found, how.counts, output)


for _name, _command in (store.COMMANDS | exchange.COMMANDS | backbones.COMMANDS | {"view": view.view}).items():
    app.command(_name)(_command)


@app.command()
@spread
def doctor(output: OutputFlags) -> None:
    """Check the installation: versions, GPUs, decoders, weights, disk, processors; say what to mend.

    The exit code is 1 if something is broken that nothing works without.
    """
    from featstore.cli.doctor import findings

    found = list(findings())
    if output.json:
        show_json([asdict(each) for each in found])
    else:
        show(table([{"check": each.check, "": each.state, "found": each.found} for each in found]))
    tell_all([f"{each.check}: {each.remedy}" for each in found if each.remedy])
    raise typer.Exit(FAILED if any(each.state == "broken" for each in found) else DONE)


def _planned(
    images: ImageFlags, model: ModelsFlags, sets: SetFlags, view: ViewFlags, augment: AugmentFlags, how: ExtractFlags
) -> Plan:
    """What is asked for, against what is stored; says all that its owner should know about it."""
    augmentation = augment.augmentation()
    if augmentation is not None and augmentation.is_fresh:
        raise ValueError(
            "Fresh views can't be stored: each epoch has its own (--seeds fresh). Give fixed seeds, such as --seeds "
            "0-3, or train from images: featstore-train ... --seeds fresh."
        )
    given = images.given(held_out_classes=True)
    tell_all(given.notes)
    from featstore.extraction.plan import plan  # torch: what was asked for is understood by now

    models = model.models(sets.cuts, trust_code=how.trust_code)
    tell_all(list(dict.fromkeys(note for staged, _ in models for note in view.notes(staged))))
    planned = plan(
        [(staged.with_(view=view.view(staged.view)), cuts) for staged, cuts in models],
        given.images,
        open_store(sets.store),
        reduce=sets.reduce,
        augment=augmentation,
        dtype=sets.dtype,
        precision=one_of("--precision", sets.precision, PRECISIONS),
        shard=how.given_shard(),
    )
    tell_all(planned.notes())
    return planned


@contextmanager
def _steps_told(output: OutputFlags) -> Iterator[None]:
    """With --debug says what the block's time goes into before the first row, also where it fails."""
    with step_seconds() as seconds:
        try:
            yield
        finally:
            if output.debug:
                steps = ", ".join(f"{step} {taken:.2f} s" for step, taken in seconds.items())
                tell(f"before the first row: {steps or 'nothing timed'}")


def _check_can_compile(sets: SetFlags, how: ExtractFlags) -> None:
    if sets.compile:  # which alone is worth loading torch before anything else is looked at
        from featstore.extraction.opening import check_can_compile

        check_can_compile(sets.compile, how.device)


def _refuse_absent(planned: Plan) -> None:
    from featstore.images.sources import is_absolute, moved_remedy

    absent = [planned.images.ids[index] for index in planned.is_absent.nonzero()[0]]
    if absent:
        moved = "say with --root where a table's paths start"
        if all(map(is_absolute, absent)):
            moved = moved_remedy(absent)
        num_images = int(planned.is_owned.sum())
        raise IncompleteError(
            f"{len(absent):,} of {num_images:,} image files {'is' if len(absent) == 1 else 'are'} absent "
            f"(first: {absent[0]}). Expected all. Bring them back, or {moved}; or "
            "extract the others with --on-error skip."
        )


def _report(report: ExtractReport, output: OutputFlags) -> None:
    tell(str(report))
    tell_all([f"{image}: {reason}" for image, reason in report.failures], indent="  ")
    if output.json:
        failures: Json = [list(failure) for failure in report.failures]
        show_json(
            {
                "sets": list(report.sets),
                "failed": report.failed,
                "missing": report.missing,
                "seconds": report.seconds,
                "failures": failures,
                "doubts": [list(doubt) for doubt in report.doubts],
                "rates": {
                    each.stage: {"rate": each.rate, "busy": each.share, "bytes": each.num_bytes}
                    for each in report.rates
                },
                "bound_by": report.bound_by,
                **({} if report.shard is None else {"shard": str(report.shard)}),
            }
        )
    else:
        show(_set_table(report.sets))


def _set_table(sets: Sequence[dict[str, Json]]) -> str:
    """A line for each set; without the backbones, where there is one for all."""
    left_out = {"backbone"} if len({each["backbone"] for each in sets}) == 1 else set()
    rows = [{name: each[name] for name in each if name not in left_out} for each in sets]
    return table([each | {"key": each["key"][:8]} for each in rows])


def _show_estimate(found: Estimate, counts: Sequence[int], output: OutputFlags) -> None:
    from featstore.extraction.rates import rate_text

    rates = {each.stage: each.rate for each in found.rates}
    times = [
        {"devices": n, "machines": machines, "seconds": found.seconds(n, machines=machines)}
        for n in counts
        for machines in sorted({1, n})
    ]
    if output.json:
        show_json(
            {
                "images": found.images,
                "sets": list(found.sets),
                "sample": found.sample,
                "device": found.device,
                "start_seconds": found.start_seconds,
                "compile_seconds": found.compile_seconds,
                "rates": rates,
                "bound_by": found.bound_by,
                "times": times if found.rates else [],
            }
        )
        return
    if not found.rates:
        show("Nothing is to be computed.")
        return
    show(_set_table([each | {"bytes": size_text(each["bytes"])} for each in found.sets]))
    named = ", ".join(f"{stage} {rate_text(rate)}" for stage, rate in rates.items() if rate is not None)
    tried = counted(found.sample, "image")
    show(f"{named} images a second, each alone, on {found.device} ({tried} tried); {found.bound_by} binds")
    compiling = f" ({duration_text(found.compile_seconds)} of it compiling)" if found.compile_seconds else ""
    show(f"{duration_text(found.start_seconds)} before the first row{compiling}; in all:")
    show(
        table(
            [
                {
                    "devices": n,
                    "of this machine": duration_text(found.seconds(n)),
                    "of as many machines": duration_text(found.seconds(n, machines=n)),
                }
                for n in counts
            ]
        )
    )
