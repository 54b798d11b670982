"""The commands of the `featstore` program that carry feature sets: to another key, to a file, from a file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from featstore.cli.flags import (
    ON_ERROR,
    ComputeFlags,
    GivenImages,
    ImageFlags,
    KeyArgument,
    OutputFlags,
    StoreOption,
    ViewFlags,
    open_store,
    spread,
)
from featstore.cli.models import ModelFlags
from featstore.cli.program import one_of, show, show_json, tell, tell_all
from featstore.exchange.names import EXPORT_SUFFIXES
from featstore.extraction.defaults import NUM_ROWS
from featstore.models.names import LAYOUTS

if TYPE_CHECKING:
    from featstore.exchange.feature_files import IdTable


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


@spread
def adopt_set(
    key: KeyArgument,
    images: ImageFlags,
    model: ModelFlags,
    store: StoreOption,
    view: ViewFlags,
    sample: AdoptFlags,
    how: ComputeFlags,
    output: OutputFlags,
) -> None:
    """File a feature set under another key, after a library upgrade or for the same model spelled in another way.

    A sample of its rows is computed again with the backbone; only if they are equal is anything filed. The old set
    stays.
    """
    from featstore.extraction.adopt import adopt

    filed = open_store(store)
    cut = sample.cut or str(filed.set(key).facts["cut"])
    given = images.given(held_out_classes=True)
    tell_all(given.about)  # who is held out makes no difference here
    staged = model.model([cut], trust_code=how.trust_code)
    tell_all(view.notes(staged))
    report = adopt(
        filed,
        key,
        staged,
        given.images,
        cut=cut,
        view=view.view(staged.view),
        device=how.device,
        batch_size=sample.batch_size,
        workers=how.workers,
        num_rows=sample.rows,
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
        str,
        typer.Option("--out", metavar="|".join(f"FILE{suffix}" for suffix in EXPORT_SUFFIXES), help="The new file."),
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
    how = one_of("--on-error", on_error, ON_ERROR)
    from featstore.exchange.export import export

    filed = open_store(store)
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
    from featstore.exchange.feature_files import read_ids
    from featstore.exchange.imports import import_file

    given = None if foreign.ids is None else read_ids(foreign.ids, _id_column(images))
    known = _imported_images(foreign, images, given)
    if given is not None and images.images:  # else the table of ids is that of the images
        tell_all(given.notes)
    if known is not None:
        tell_all(known.notes)
    report = import_file(
        open_store(store),
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


COMMANDS: dict[str, Callable[..., None]] = {"adopt": adopt_set, "export": export_set, "import": import_set}
"""By name, in the order in which help lists them."""


# ---- Imported images


def _id_column(images: KnownImageFlags) -> str | None:
    """The column of ids that was named for the table of ids; with --images, the flag is about that table."""
    is_named = not images.images and images.path_column != _defaults(images)["path_column"]
    return images.path_column if is_named else None


def _imported_images(foreign: ForeignFlags, flags: KnownImageFlags, given: IdTable | None) -> GivenImages | None:
    """The images that the rows are of; None: those that the file describes."""
    from featstore.exchange.feature_files import ID_COLUMNS
    from featstore.images.fileless import without_files

    if flags.images:
        return flags.given(held_out_classes=True)
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
    found = replace(flags, images=foreign.ids, **taken).given(held_out_classes=True)
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
