"""The store's commands of the `featstore` program: see, check, compare, clear up, and carry features in and out."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from featstore.cli.flags import (
    GivenImages,
    ImageFlags,
    ModelFlags,
    OutputFlags,
    StoreOption,
    ViewFlags,
    load_model,
    spread,
)
from featstore.cli.program import DONE, FAILED, MOST_LISTED, facts_table, one_of, show, show_json, table, tell, tell_all
from featstore.digest import Json
from featstore.errors import DamagedFileError, FeatureStoreError, OnError
from featstore.exchange.export import SUFFIXES, export
from featstore.exchange.feature_files import ID_COLUMNS, IdTable, read_ids, without_files
from featstore.exchange.imports import LAYOUTS, import_file
from featstore.extraction.adopt import NUM_ROWS, adopt
from featstore.models.trunk import choose_device
from featstore.remedies import Command
from featstore.store.image_tables import IMAGES, table_name
from featstore.store.removal import RemoveReport
from featstore.store.sets import FeatureSet
from featstore.store.store import FeatureStore

KeyArgument = Annotated[
    str, typer.Argument(metavar="KEY", help="A feature set's key, or the start of it (featstore ls).")
]


# ---- What a store holds


@spread
def ls(store: StoreOption, output: OutputFlags) -> None:
    """List the feature sets of a store.

    Damaged files are named, and their sets left out; the exit code is then 1.
    """
    filed = FeatureStore(store)
    found = [each.describe() for each in filed.sets()]
    damaged = filed.damaged()
    if output.json:
        show_json(found)
    elif found:
        show(table([_ls_row(each) for each in found]))
    else:
        tell(f"{store} holds no {'sound ' if damaged else ''}feature sets.")
    tell_all([str(error) for error in damaged])
    raise typer.Exit(FAILED if damaged else DONE)


@spread
def show_set(key: KeyArgument, store: StoreOption, output: OutputFlags) -> None:
    """Show every fact about one feature set.

    Superseded rows are those of images that were replaced or deleted since; the first few are named.
    """
    filed = FeatureStore(store)
    facts = _set_facts(filed, filed.set(key))
    if output.json:
        show_json(facts)
        return
    facts["superseded_rows"] = _counted(facts["superseded_rows"], facts.pop("superseded"))
    tables = {name: facts.pop(name) for name in ("stages", "files", "failures")}
    show(facts_table(facts))
    for name, rows in tables.items():
        if rows:
            show(f"\n{name}:\n{table(rows)}")


@spread
def diff(
    first: Annotated[str, typer.Argument(metavar="A", help="A feature set's key, or the start of it.")],
    second: Annotated[str, typer.Argument(metavar="B", help="Another one's.")],
    store: StoreOption,
    output: OutputFlags,
) -> None:
    """Say in what two feature sets differ: facts, images, and values of up to 1,000 images that both have."""
    found = FeatureStore(store).diff(first, second)
    if output.json:
        show_json(asdict(found))
        return
    show(str(found))


# ---- Upkeep


@spread
def verify(
    store: StoreOption,
    output: OutputFlags,
    repair: Annotated[
        bool, typer.Option("--repair", help="Set damaged files aside; extract then computes their rows again.")
    ] = False,
) -> None:
    """Check every byte of every file of a store.

    The exit code is 1 if a file can't be used; with --repair, if one is left that can't.
    """
    report = FeatureStore(store).verify(repair=repair, progress=sys.stderr.isatty())
    aside = [each for each in report.damaged if each.set_aside is not None]
    if output.json:
        damaged = [
            {
                "path": str(each.path),
                "reason": each.reason,
                "is_damage": each.is_damage,
                "set_aside": each.set_aside and str(each.set_aside),
            }
            for each in report.damaged
        ]
        show_json({"parts": report.parts, "tables": report.tables, "bytes": report.bytes, "damaged": damaged})
    else:
        show(str(report))
    for each in report.damaged:
        tell(each.reason if each.set_aside is None else f"{each.reason} It is {each.set_aside.name} now.")
    left = len(report.damaged) - len(aside)
    tell_all([_older_images(store, each.path) for each in aside if each.path.parent.name == IMAGES])
    if aside:
        tell(
            "What was set aside is missing now: run featstore extract again, or featstore import for what was "
            "imported, which adds just that."
        )
    elif not repair and any(each.is_damage for each in report.damaged):
        tell(f"Set damaged files aside: {Command('featstore', 'verify', '--repair', '--store', store)}")
    raise typer.Exit(FAILED if left else DONE)


@spread
def compact(
    store: StoreOption,
    output: OutputFlags,
    key: Annotated[
        str | None, typer.Argument(metavar="[KEY]", help="One feature set's key, or the start of it; default: all.")
    ] = None,
) -> None:
    """Merge the small files of feature sets into few large ones; every row stays as it is.

    What they replace is deleted by featstore gc, once it is old enough. A set with damaged rows is left alone, and the
    exit code is then 1.
    """
    report = FeatureStore(store).compact(key)
    if output.json:
        merges = [
            {"key": each.key, "part": str(each.part.path), "replaced": [part.path.name for part in each.replaced]}
            for each in report.merges
        ]
        show_json({"merges": merges, "left": [asdict(each) for each in report.left], "bytes": report.bytes})
    else:
        show(str(report))
    tell_all([each.reason for each in report.left])
    raise typer.Exit(FAILED if report.left else DONE)


@spread
def gc(
    store: StoreOption,
    output: OutputFlags,
    older_than: Annotated[
        str, typer.Option("--older-than", metavar="30m|24h|7d", help="For how long nobody may have needed a file.")
    ] = "24h",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Delete nothing, and say what would be.")] = False,
) -> None:
    """Delete files that nobody reads: superseded ones, and what killed jobs, repairs and removals have left."""
    report = FeatureStore(store).gc(older_than=parse_duration(older_than), dry_run=dry_run)
    if output.json:
        paths: Json = [str(path) for path in report.paths]
        left = [asdict(each) for each in report.left]
        show_json({"files": report.files, "bytes": report.bytes, "paths": paths, "left": left, "dry_run": dry_run})
    else:
        show(f"{'would delete' if dry_run else 'deleted'} {report}")
        for path in report.paths if dry_run else ():
            show(f"  {path}")
    tell_all([each.reason for each in report.left])
    raise typer.Exit(FAILED if report.left else DONE)


@spread
def remove(
    keys: Annotated[
        list[str], typer.Argument(metavar="KEY...", help="Feature sets' keys, or their starts (featstore ls).")
    ],
    store: StoreOption,
    output: OutputFlags,
    yes: Annotated[bool, typer.Option("--yes", help="Don't ask.")] = False,
) -> None:
    """Delete whole feature sets. Asks first, unless --yes is given; if one of them can't be removed, none is."""
    filed = FeatureStore(store)
    chosen = list(dict.fromkeys(filed.foresee_removal(key).key for key in keys))
    if not yes and not _is_confirmed(filed, chosen):
        tell("Nothing was removed.")
        raise typer.Exit(FAILED)
    reports: list[RemoveReport] = []
    try:
        for key in chosen:
            reports.append(filed.remove(key))
            if not output.json:
                show(str(reports[-1]))
    finally:  # what is gone is said, whatever happens to the next one
        if output.json:
            show_json([asdict(report) for report in reports])


# ---- In and out


@dataclass(frozen=True, kw_only=True)
class AdoptFlags:
    """How a sample of the rows is computed again."""

    cut: Annotated[
        str | None,
        typer.Option("--cut", metavar="CUT", help="Where to cut the backbone.", show_default="as the set was"),
    ] = None
    rows: Annotated[int, typer.Option("--rows", min=1, metavar="N", help="Rows to compute again.")] = NUM_ROWS
    batch_size: Annotated[
        int | None,
        typer.Option("--batch-size", min=1, metavar="N", help="Images a pass.", show_default="that of the stored rows"),
    ] = None
    device: Annotated[
        str, typer.Option("--device", metavar="auto|cpu|cuda|cuda:1", help="auto: the first GPU, else the CPU.")
    ] = "auto"
    workers: Annotated[
        int | None,
        typer.Option(
            "--workers",
            min=0,
            metavar="N",
            help="Threads that read and decode; 0: none beside the main one.",
            show_default="one a processor, up to 8",
        ),
    ] = None

    def __post_init__(self) -> None:
        choose_device(self.device)


@spread
def adopt_set(
    key: KeyArgument,
    images: ImageFlags,
    model: ModelFlags,
    store: StoreOption,
    view: ViewFlags,
    how: AdoptFlags,
    output: OutputFlags,
) -> None:
    """File a feature set under another key, after a library upgrade or for the same model spelled in another way.

    A sample of its rows is computed again with the backbone; only if they are equal is anything filed. The old set
    stays.
    """
    filed = FeatureStore(store)
    cut = how.cut or str(filed.set(key).facts["cut"])
    given = images.given()
    staged = load_model(model.backbone, model.weights, [cut])
    tell_all(staged.notes)
    report = adopt(
        filed,
        key,
        staged,
        given.images,
        cut=cut,
        view=view.view(staged.view),
        device=how.device,
        batch_size=how.batch_size,
        workers=how.workers,
        num_rows=how.rows,
        progress=True,
    )
    if output.json:
        show_json(asdict(report))
    else:
        show(str(report))


@spread
def export_set(
    key: KeyArgument,
    store: StoreOption,
    out: Annotated[
        str, typer.Option("--out", metavar="|".join(f"FILE{suffix}" for suffix in SUFFIXES), help="The new file.")
    ],
    output: OutputFlags,
    images_name: Annotated[
        str | None,
        typer.Option(
            "--images-name",
            metavar="NAME",
            help="Image set in the store whose rows are written.",
            show_default="the only one",
        ),
    ] = None,
    on_error: Annotated[
        str,
        typer.Option(
            "--on-error", metavar="raise|skip", help="Images that failed in the extraction: stop, or leave them out."
        ),
    ] = "raise",
) -> None:
    """Write a feature set into one file for other tools, with ids, labels and splits.

    .npy brings a .csv of that name along; .parquet needs pyarrow.
    """
    how: OnError = "skip" if one_of("--on-error", on_error, ("raise", "skip")) == "skip" else "raise"
    filed = FeatureStore(store)
    images = None if images_name is None else filed.images(images_name)
    report = export(filed, key, out, images=images, on_error=how, progress=True)
    tell_all(report.notes)
    if output.json:
        show_json(asdict(report) | {"files": [str(file) for file in report.files]})
    else:
        show(str(report))


@dataclass(frozen=True, kw_only=True)
class KnownImageFlags(ImageFlags):
    """Which images features made elsewhere are of, if their files are here; else the table of ids says it."""

    images: Annotated[
        str,
        typer.Option(
            "--images",
            metavar="FOLDER|FILE.csv|FILE.tsv",
            help="The images, if they are here: a folder, or a table.",
            show_default="known by their ids alone",
        ),
    ] = ""


@dataclass(frozen=True, kw_only=True)
class ForeignFlags:
    """What a file of features made elsewhere holds, and what it is called here."""

    name: Annotated[str, typer.Option("--name", metavar="NAME", help="What you call the model, in lists.")]
    ids: Annotated[
        str | None,
        typer.Option(
            "--ids",
            metavar="FILE.txt|FILE.csv",
            help="The ids of the rows, in order: a line each, or a table's column id or path. Without --images the "
            "table's labels and splits are taken too.",
            show_default="those in the file",
        ),
    ] = None
    dataset: Annotated[
        str | None,
        typer.Option("--dataset", metavar="NAME", help="The features in the file.", show_default="features"),
    ] = None
    id_dataset: Annotated[
        str | None,
        typer.Option(
            "--id-dataset", metavar="NAME", help="The ids in an HDF5 file.", show_default="id, ids or sample_id"
        ),
    ] = None
    layout: Annotated[
        str | None,
        typer.Option("--layout", metavar="|".join(LAYOUTS), help="Of one row.", show_default="by its dimensions"),
    ] = None

    def __post_init__(self) -> None:
        if self.layout is not None:
            one_of("--layout", self.layout, LAYOUTS)


@spread
def import_set(
    file: Annotated[str, typer.Argument(metavar="FILE", help="Features: .npy, .h5 or .safetensors.")],
    store: StoreOption,
    foreign: ForeignFlags,
    images: KnownImageFlags,
    output: OutputFlags,
) -> None:
    """File features that something else computed, joined to images by id; only their key finds them.

    Their spec says nothing about the model or the view, for nobody here knows them.
    """
    given = None if foreign.ids is None else read_ids(foreign.ids, _id_column(images))
    known = _imported_images(foreign, images, given)
    if known is not None:
        tell_all(known.notes)
    report = import_file(
        FeatureStore(store),
        file,
        name=foreign.name,
        images=None if known is None else known.images,
        ids=None if given is None else given.ids,
        dataset=foreign.dataset,
        id_dataset=foreign.id_dataset,
        layout=foreign.layout,
        progress=True,
    )
    tell_all(report.notes)
    if output.json:
        show_json(asdict(report))
        return
    show(str(report))
    model, images_of = f"store.model({report.key[:8]!r})", f"ImageSet.from_store(store, {report.images!r})"
    tell(f'A head on it: Learner({model}, {images_of}, store, head="linear")')


COMMANDS: dict[str, Callable[..., None]] = {
    "ls": ls,
    "show": show_set,
    "diff": diff,
    "verify": verify,
    "compact": compact,
    "gc": gc,
    "remove": remove,
    "adopt": adopt_set,
    "export": export_set,
    "import": import_set,
}
"""By name, in the order in which help lists them."""


def parse_duration(text: str, flag: str = "--older-than") -> float:
    """Seconds of a duration such as 30m, 24h or 7d.

    >>> parse_duration("90m")
    5400.0

    Raises:
        ValueError: for anything else.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text, re.ASCII)
    if found is None:
        raise ValueError(
            f"{flag} is {text!r}. Expected a number and its unit: s, m, h or d, such as {flag} 30m, 24h or 7d."
        )
    return float(found[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400}[found[2]]


# ---- Words and rows


def _ls_row(facts: dict[str, Json]) -> dict[str, Json]:
    names = ("backbone", "cut", "reduce", "view", "seed", "size", "dtype", "precision", "rows", "failed", "shape")
    return {
        "key": facts["key"][:8],
        **{name: facts[name] for name in names},
        "MB": facts["bytes"] / 1e6,
        "when": facts["when"][:16].replace("T", " "),
    }


def _set_facts(store: FeatureStore, found: FeatureSet) -> dict[str, Json]:
    facts = found.facts
    num_superseded, superseded = _superseded(store, found)
    return {
        **found.describe(),
        "superseded_rows": num_superseded,
        "superseded": superseded,
        "who": facts["who"],
        "class_tokens": facts["class_tokens"],
        "spec": found.spec.facts(),
        "profile": facts["profile"],
        **{name: facts[name] for name in ("imported", "adopted") if name in facts},
        "stages": [{name: stage[name] for name in ("name", "layout", "shape", "digest")} for stage in facts["stages"]],
        "files": [
            {
                "file": part.path.name,
                "rows": part.num_rows,
                "bytes": _size(part.path),
                "who": part.facts["who"],
                "when": part.facts["when"],
            }
            for part in found.parts
        ],
        "failures": [{"digest": digest, "reason": reason} for digest, reason in sorted(found.failed.items())],
    }


def _superseded(store: FeatureStore, found: FeatureSet) -> tuple[int | None, list[str] | None]:
    """How many superseded rows there are and what the images of some were called; None where a table can't be read.

    That `ls` and `verify` tell. An image that no table knows is called by its content.
    """
    try:
        named = store.superseded(found, most=MOST_LISTED)
        return store.num_superseded(found), [name or f"content {digest[:12]}" for digest, name in named.items()]
    except DamagedFileError:
        return None, None


def _counted(count: int | None, names: Sequence[str] | None) -> str | int | None:
    """``12: a, b, c, 9 more``; `names` are the first of them, if there are any."""
    if not count or not names:
        return count
    more = [f"{count - len(names):,} more"] if count > len(names) else []
    return f"{count:,}: {', '.join([*names, *more])}"


def _older_images(store: str, path: Path) -> str:
    """What an image set is now whose table was set aside."""
    name = table_name(path)
    try:
        now = f"is as an older table has it ({FeatureStore(store).images(name).describe()})"
    except FeatureStoreError:
        now = "is gone"
    return f"The image set {name} {now}, until featstore extract files it again."


def _size(path: Path) -> int | None:
    """Of a file, in bytes; None if it has been merged into another one, and deleted, since it was opened."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return None


# ---- Removal


def _is_confirmed(store: FeatureStore, keys: Sequence[str]) -> bool:
    if not sys.stdin.isatty():
        raise ValueError(
            f"{', '.join(key[:8] for key in keys)} can't be removed without being asked, and there is no terminal to "
            "ask at. Expected --yes then. Add it, if you are sure."
        )
    rows = []
    for key in keys:
        try:
            rows.append(_ls_row(store.set(key).describe()))
        except DamagedFileError as error:
            tell(f"{key}: {error}")
    if rows:
        tell(table(rows))
    sets = "this feature set" if len(keys) == 1 else f"these {len(keys)} feature sets"
    tell(f"Remove {sets} from {store.root}, for good? [y/N]")
    return sys.stdin.readline().strip().lower() in ("y", "yes")


# ---- Imported images


def _id_column(images: KnownImageFlags) -> str | None:
    """The column of ids that was named for the table of ids; with --images, the flag is about that table."""
    is_named = not images.images and images.path_column != _defaults(images)["path_column"]
    return images.path_column if is_named else None


def _imported_images(foreign: ForeignFlags, flags: KnownImageFlags, given: IdTable | None) -> GivenImages | None:
    """The images that the rows are of; None: those that the file describes."""
    if flags.images:
        return flags.given()
    if given is None or foreign.ids is None or not given.columns:
        _refuse_table_flags(flags)
        return None
    columns, defaults = given.columns, _defaults(flags)
    columns_found = {
        "path_column": next((name for name in ID_COLUMNS if name in columns), ""),
        "label_column": "label" if "label" in columns else "",
        "split_column": "split" if "split" in columns else None,
        "group_column": "group" if "group" in columns else None,
    }
    taken: dict[str, Any] = {
        name: value for name, value in columns_found.items() if getattr(flags, name) == defaults[name]
    }
    found = replace(flags, images=foreign.ids, **taken).given()
    in_order = replace(found.images.select(given.lines), name=found.images.name, ids=given.ids)
    return replace(found, images=without_files(in_order, where=foreign.ids, digests=given.digests))


def _refuse_table_flags(flags: KnownImageFlags) -> None:
    for name, default in _defaults(flags).items():
        if getattr(flags, name) != default:
            raise ValueError(
                f"--{name.replace('_', '-')} {getattr(flags, name)} is about images, and neither --images nor a table "
                "of ids is given. Expected one of them. Give --images, or --ids with a .csv or .tsv file."
            )


def _defaults(flags: KnownImageFlags) -> dict[str, Any]:
    return {each.name: each.default for each in fields(flags)}
