"""The store's commands of the `featstore` program: see, check, compare and clear up."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from featstore.cli.flags import KeyArgument, OutputFlags, StoreOption, open_store, spread
from featstore.cli.program import DONE, FAILED, MOST_LISTED, facts_table, show, show_json, table, tell, tell_all
from featstore.digest import Json
from featstore.errors import DamagedFileError, FeatureStoreError
from featstore.remedies import Command

if TYPE_CHECKING:
    from featstore.store.removal import RemoveReport
    from featstore.store.sets import FeatureSet
    from featstore.store.store import FeatureStore


# ---- What a store holds


@spread
def ls(store: StoreOption, output: OutputFlags) -> None:
    """List the feature sets of a store.

    Damaged files are named, and their sets left out; the exit code is then 1.
    """
    filed = open_store(store)
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
    filed = open_store(store)
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
    found = open_store(store).diff(first, second)
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
    from featstore.store.image_tables import IMAGES

    report = open_store(store).verify(repair=repair, progress=sys.stderr.isatty())
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
    report = open_store(store).compact(key)
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
    report = open_store(store).gc(older_than=parse_duration(older_than), dry_run=dry_run)
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
    filed = open_store(store)
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


COMMANDS: dict[str, Callable[..., None]] = {
    "ls": ls,
    "show": show_set,
    "diff": diff,
    "verify": verify,
    "compact": compact,
    "gc": gc,
    "remove": remove,
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
    from featstore.store.part_facts import pixels_of

    facts = found.facts
    num_superseded, superseded = _superseded(store, found)
    return {
        **found.describe(),
        "superseded_rows": num_superseded,
        "superseded": superseded,
        "who": facts["who"],
        "class_tokens": facts["class_tokens"],
        **{name: facts[name] for name in ("prefix_tokens",) if name in facts},
        "spec": found.spec.facts(),
        "profile": facts["profile"],
        **({} if "imported" in facts else {"pixels": pixels_of(facts)}),
        **{name: facts[name] for name in ("imported", "adopted", "rounding") if name in facts},
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
    from featstore.store.image_tables import table_name

    name = table_name(path)
    try:
        now = f"is as an older table has it ({open_store(store).images(name).describe()})"
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
