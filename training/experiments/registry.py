"""Registry: the runs below a folder as one table, to filter, to sort, to go on from; their sidecars alone are read.

A score compares with another only where both are of the same images with the same labels. Each run says of which its
are (`Sidecar.scored_on`): the table marks those that were scored on others, and `Runs.best` refuses to choose among
them.
"""

from __future__ import annotations

import csv
import difflib
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, overload

from featstore.digest import Json
from featstore.errors import FeatureStoreError
from featstore.html import MOST_ROWS, titled_table
from featstore.models.runs import FACTS, located, read_facts
from featstore.words import counted, printable, some
from training.choices import BEST, CHECKPOINT
from training.frames import data_frame
from training.loop.monitor import DIRECTIONS, Direction
from training.sidecar import FILE, Score, Sidecar

if TYPE_CHECKING:
    from training.learner import Learner

Order: TypeAlias = str | tuple[str, Direction]
"""A column to sort by; of a number whose better direction nobody knows with it, ("name", "max"): the largest first."""

_LOWER_IS_BETTER = ("loss", "calibration_error", "seconds")
_MOST_COLUMNS = 8
_OTHER_IMAGES, _UNKNOWN_IMAGES = "scored on other images", "scored on unknown images"
_FITTED_HERE = "temperature fitted to these images"
APART = (_OTHER_IMAGES, _UNKNOWN_IMAGES)
"""Notes of runs whose scores don't compare with those of most others."""
_SAME = {"valid_loss": "loss"}
"""What a fit's record calls otherwise than a run's scores do; members of sweeps have it from there."""


def runs(folder: str | os.PathLike[str] = "runs") -> Runs:
    """All runs below a folder, by name: heads, fine-tuned models, snapshots, folds and members of sweeps.

    A run is a folder with a run.json, or with a model.json alone where it is older or somebody deleted its reports.
    Checkpoints of fits, hidden folders and what is half written are none. The best setting of a sweep that is saved
    whole beside it is one run with it. Only run.json is read; one that is damaged is
    listed with the reason.

    Raises:
        ValueError: if there is no such folder.
    """
    root = Path(folder)
    if not root.is_dir():
        raise ValueError(f"There is no folder {root}. Give one that runs were saved below, as --out runs/head does.")
    found: list[ListedRun] = []
    damaged: dict[str, str] = {}
    for path, place, has_model in _places(root, damaged):
        name = path.relative_to(root).as_posix() if path != root else path.absolute().name
        try:
            sidecar = _sidecar(path, place, has_model=has_model)
        except (FeatureStoreError, OSError) as error:
            damaged[name] = str(error)
            continue
        if sidecar is not None:
            is_whole = has_model and sidecar.kind != "sweep-member"  # of which the head alone is kept
            found.append(ListedRun(name=name, folder=path, sidecar=sidecar, has_model=is_whole))
    found = _with_bests_once(found)
    found.sort(key=lambda each: _natural(each.name))
    return Runs(found, damaged=damaged, root=root)


@dataclass(frozen=True, kw_only=True, eq=False)
class ListedRun:
    """One run of a registry. ``run["lr"]`` is a column's value, None where the run doesn't tell it.

    Attributes:
        name: its path below the folder that was searched.
        folder: where it is.
        sidecar: all that run.json says.
        has_model: whether a model lies there, which `load` gives.
    """

    name: str
    folder: Path
    sidecar: Sidecar
    has_model: bool

    def __getitem__(self, column: str) -> Json:
        return self.columns.get(column)

    def __repr__(self) -> str:
        scores = ", ".join(f"{name} {cell(each.value)}" for name, each in self.sidecar.scores.items())
        return f"ListedRun({self.name}{f': {scores}' if scores else ''})"

    @cached_property
    def columns(self) -> dict[str, Json]:
        """Column -> value: what decided its numbers, then its scores, each with the ends of its interval if it has one.

        `scored_on` and `trained_on` are the beginnings of the digests of the images that were scored and trained on. A
        score that is called as a
        column before it has ``score_`` in front.
        """
        sidecar, scored_on = self.sidecar, self.sidecar.scored_on
        found: dict[str, Json] = {"run": self.name, "kind": sidecar.kind, **sidecar.configuration}
        if isinstance(rate := found.get("lr"), str):  # as a person wrote it, "1e-2"
            found["lr"] = _as_number(rate)
        trained_on = sidecar.split.get("train")
        later: dict[str, Json] = {
            "trained_on": None if trained_on is None else trained_on.digest[:8],
            "images": None if scored_on is None else scored_on.images,
            "scored_on": None if scored_on is None else scored_on.digest[:8],
            "seconds": sidecar.seconds,
            "when": sidecar.when,
        }
        for name, score in _scores(sidecar).items():
            column = f"score_{name}" if name in found or name in later else name
            found[column] = score.value
            if score.interval is not None:
                found[f"{column}_from"], found[f"{column}_to"] = score.interval
        return {**found, **later}

    @property
    def num_trained_on(self) -> int | None:
        """How many of the images that were scored it was trained on; None where it doesn't tell."""
        count = self.sidecar.more.get("scored_trained_on")
        return count if isinstance(count, int) else None

    @property
    def score_columns(self) -> tuple[str, ...]:
        """The columns of its scores, without those of their intervals."""
        names = _scores(self.sidecar)
        return tuple(f"score_{name}" if f"score_{name}" in self.columns else name for name in names)

    def load(self, *args: Any, **options: Any) -> Learner:
        """Its model, as `Learner.load` gives it, whose arguments behind the run these are.

        Raises:
            FeatureStoreError: if it is the record of a run that kept no model.
        """
        if not self.has_model:
            raise FeatureStoreError(
                f"{self.folder} keeps what was scored, and no whole model. Fit its configuration again, or load a run "
                "that was saved whole; of a sweep its best is one."
            )
        from training.learner import Learner  # torch

        return Learner.load(self.folder, *args, **options)


class Runs(Sequence[ListedRun]):
    """Runs in some order; made by `runs`. Prints as a table.

    Attributes:
        damaged: folder -> why what lies there can't be read; no filter takes these out.
        root: the folder that was searched.
    """

    def __init__(self, found: Iterable[ListedRun], *, damaged: Mapping[str, str], root: Path) -> None:
        """Takes them as they are; `runs` finds them."""
        self._found, self.damaged, self.root = tuple(found), dict(damaged), root

    def __len__(self) -> int:
        return len(self._found)

    @overload
    def __getitem__(self, place: int) -> ListedRun: ...
    @overload
    def __getitem__(self, place: slice) -> Runs: ...
    def __getitem__(self, place: int | slice) -> ListedRun | Runs:
        return self._of(self._found[place]) if isinstance(place, slice) else self._found[place]

    @cached_property
    def columns(self) -> tuple[str, ...]:
        """The names by which these runs are filtered and sorted."""
        return tuple(dict.fromkeys(name for each in self._found for name in each.columns))

    @property
    def table(self) -> list[dict[str, Json]]:
        """A row a run, all of equal columns, None where a run doesn't tell; at the end ``note`` where one has one."""
        notes = self._notes()
        rows = [{name: each[name] for name in self.columns} for each in self._found]
        return rows if not any(notes) else [{**row, "note": note} for row, note in zip(rows, notes, strict=True)]

    def query(
        self,
        *,
        sort: Order | None = None,
        at_least: Mapping[str, float] | None = None,
        at_most: Mapping[str, float] | None = None,
        where: Callable[[ListedRun], bool] | None = None,
        **equal: Json,
    ) -> Runs:
        """Those that fit, sorted.

        Args:
            sort: a column; of scores the best first, of others the least. Runs without a value come last.
            at_least: column -> number, below which a run is left out, as is one without a number.
            at_most: likewise, above which.
            where: says of a run whether it stays.
            equal: column -> its value; a set holds several of which one is enough: ``cut={"layer3", "layer4"}``.

        Raises:
            ValueError: for a column that no run has, naming what may have been meant.
        """
        lowest, highest = at_least or {}, at_most or {}
        for name in (*equal, *lowest, *highest):
            self.check_column(name)
        kept = [
            each
            for each in self._found
            if all(_fits(each[name], wanted) for name, wanted in equal.items())
            and all(_number(each[name], -math.inf) >= bound for name, bound in lowest.items())
            and all(_number(each[name], math.inf) <= bound for name, bound in highest.items())
            and (where is None or where(each))
        ]
        return self._of(kept if sort is None else self._sorted(kept, sort))

    def best(self, score: Order, *, whatever_images: bool = False) -> ListedRun:
        """The run with the best score, of those that were trained on the fewest of the images that were scored.

        Args:
            score: as `sort` of `query`.
            whatever_images: chooses also among scores of different images, or losses of different functions, which say
                little about each other, and however many of the images a run was trained on.

        Raises:
            FeatureStoreError: if the runs were scored on different images, or a run doesn't say on which; or if the
                score is a loss, and theirs are of different functions or in different units.
            ValueError: if no run has that score.
        """
        name, _ = self._direction(score)
        having = [each for each in self._found if isinstance(each[name], int | float)]
        if not having:
            raise ValueError(f"None of {counted(len(self), 'run')} has a number for {name}. Give another column.")
        groups = Counter(each["scored_on"] for each in having)
        if len(groups) > 1 and not whatever_images:
            raise FeatureStoreError(
                f"{counted(len(having), 'run')} have {name}, of {len(groups)} different sets of images ("
                f"{_group_words(groups)}), so which is best can't be told. Choose among those of one set: "
                f'query(scored_on="{groups.most_common(1)[0][0]}").best({name!r}); or score the others on its images.'
            )
        if not whatever_images:
            _check_alike(having, name)
            counts = [each.num_trained_on for each in having if each.num_trained_on is not None]
            having = [each for each in having if each.num_trained_on in (None, min(counts, default=None))]
        return self._sorted(having, score)[0]

    def load(self, place: int, *args: Any, **options: Any) -> Learner:
        """The model of the run at a place, as `ListedRun.load`."""
        return self._found[place].load(*args, **options)

    def frame(self) -> Any:
        """`table` as a pandas DataFrame.

        Raises:
            FeatureStoreError: if pandas isn't installed.
        """
        return data_frame(self.table)

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Writes `table`, and a row for each damaged run with the reason as its note; an apostrophe before formulas."""
        rows = [*self.table, *({"run": name, "note": f"damaged: {why}"} for name, why in self.damaged.items())]
        names = list(dict.fromkeys(["run", *(name for row in rows for name in row)]))
        with Path(path).open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
            writer = csv.writer(file)
            writer.writerow(names)
            writer.writerows([_field(row.get(name)) for name in names] for row in rows)

    def check_column(self, name: str) -> None:
        """Checks that a run has a column of that name.

        Raises:
            ValueError: if none has, naming what may have been meant.
        """
        if name not in self.columns and self._found:
            meant = [each for each in (_SAME.get(name), f"score_{name}") if each in self.columns]
            near = [*meant, *difflib.get_close_matches(name.lower(), self.columns, n=1)]
            hint = f" Did you mean {near[0]}?" if near else ""
            raise ValueError(f"No run here has {name!r}.{hint} What they have: {', '.join(self.columns)}.")

    def in_words(self, columns: Sequence[str] | None = None, *, most: int | None = None) -> str:
        """A table, and below it what is equal in all runs, which scores don't compare, and what is damaged.

        Args:
            columns: to show; default: those in which the runs differ, and their scores.
            most: rows; default: all.
        """
        rows = self._shown(columns)
        lines = _aligned(rows[:most])
        if most is not None and len(rows) > most:
            lines.append(f"... and {len(rows) - most:,} more")
        return "\n".join([*lines, *self._foot(is_whole=columns is None)])

    def __str__(self) -> str:
        return self.in_words(most=MOST_ROWS)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return titled_table("\n".join(self._foot(is_whole=True)), self._shown(None))

    # ------------------------------------------------------------------------------------------------------- inside

    def _of(self, found: Iterable[ListedRun]) -> Runs:
        return Runs(found, damaged=self.damaged, root=self.root)

    def _direction(self, sort: Order) -> tuple[str, Direction]:
        name, given = (sort, None) if isinstance(sort, str) else sort
        self.check_column(name)
        if given not in (None, "min", "max"):
            raise ValueError(f"The direction of {name} is {given!r}; expected min or max.")
        own: Direction | None = "min" if name in _LOWER_IS_BETTER else DIRECTIONS.get(name)
        if given is None and own is None and any(name in each.score_columns for each in self._found):
            raise ValueError(
                f"{name} is a metric of your own; whether more of it is better isn't known. Say it: "
                f'sort=("{name}", "max") (of a command --sort {name}:max).'
            )
        return name, given or own or "min"

    def _sorted(self, found: Iterable[ListedRun], sort: Order) -> list[ListedRun]:
        name, direction = self._direction(sort)
        sign = -1 if direction == "max" else 1

        def key(run: ListedRun) -> tuple[int, float, list[Any]]:
            value = run[name]
            if value is None:
                return 2, 0.0, []
            if isinstance(value, int | float):
                return 0, sign * value, []
            return 1, 0.0, _natural(cell(value))

        return sorted(found, key=key)

    def _groups(self) -> Counter[str | None]:
        """How many runs were scored on which images; the commonest first, of as many the first in order."""
        return Counter(each["scored_on"] for each in self._found if each.sidecar.scores)

    def _notes(self) -> list[str | None]:
        """Of each run why its scores don't compare with those of most others; None where they do."""
        groups = self._groups()
        most = next((each for each, _ in groups.most_common() if each is not None), None)
        return [self._note(each, most, is_split=len(groups) > 1) for each in self._found]

    def _note(self, run: ListedRun, most: str | None, *, is_split: bool) -> str | None:
        if not run.sidecar.scores:
            return None
        if is_split and run["scored_on"] != most:
            return _UNKNOWN_IMAGES if run["scored_on"] is None else _OTHER_IMAGES
        if run.num_trained_on:
            return f"trained on {run.num_trained_on:,} of these images"
        calibrated, scored_on = run.sidecar.more.get("calibration"), run.sidecar.scored_on
        is_same = calibrated and scored_on and calibrated["images"]["digest"] == scored_on.digest
        return _FITTED_HERE if is_same else None

    def _differing(self) -> list[str]:
        """What of the configuration isn't the same in all runs."""
        return [
            name
            for name in self._configured
            if len({repr(each.sidecar.configuration.get(name)) for each in self._found}) > 1
        ]

    @property
    def _configured(self) -> list[str]:
        return [*dict.fromkeys(name for each in self._found for name in each.sidecar.configuration)]

    def _shown(self, columns: Sequence[str] | None) -> list[dict[str, str]]:
        """Rows of texts."""
        if columns is None:
            scores = [*dict.fromkeys(name for each in self._found for name in each.score_columns)]
            apart = ["scored_on"] if len(self._groups()) > 1 else []
            apart += ["trained_on"] if len({each["trained_on"] for each in self._found}) > 1 else []
            names = ["run", *self._differing()[:_MOST_COLUMNS], *scores, "images", *apart, "seconds"]
        else:
            for name in columns:
                self.check_column(name)
            names = [*dict.fromkeys(["run", *columns])]
        notes = self._notes()
        rows = [{name: _with_interval(each, name) for name in names} for each in self._found]
        return rows if not any(notes) else [{**row, "note": note or ""} for row, note in zip(rows, notes, strict=True)]

    def _foot(self, *, is_whole: bool) -> list[str]:
        lines = [counted(len(self), "run")]
        differing = self._differing()
        equal = {
            name: self._found[0][name]
            for name in self._configured
            if name not in differing and self._found[0][name] is not None
        }
        if is_whole and len(self) > 1 and equal:
            lines.append(f"equal in all: {', '.join(f'{name} {cell(value)}' for name, value in equal.items())}")
        if is_whole and len(differing) > _MOST_COLUMNS:
            lines.append(f"they differ also in: {', '.join(differing[_MOST_COLUMNS:])}")
        groups = self._groups()
        if len(groups) > 1:
            lines.append(
                f"scored on {len(groups)} different sets of images ({_group_words(groups)}): their scores don't "
                f'compare. Look at those of one set: query(scored_on="{groups.most_common(1)[0][0]}") (of a command '
                f"--where scored_on={groups.most_common(1)[0][0]})"
            )
        if self.damaged:
            lines.append(f"{counted(len(self.damaged), 'run')} can't be read:")
            lines += [f"  {printable(name, is_one_line=True)}: {why}" for name, why in self.damaged.items()]
        return lines


def cell(value: Json) -> str:
    """A value as a table shows it.

    >>> cell(0.9421356), cell(1e-5), cell([1e-5, 1e-3]), cell(None), cell(1_200)
    ('0.9421', '1e-05', '1e-05,0.001', '-', '1,200')
    """
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return ",".join(map(cell, value))
    return f"{value:,}" if isinstance(value, int) else printable(str(value), is_one_line=True)


def _scores(sidecar: Sidecar) -> dict[str, Score]:
    """What was scored, the same quantity under one name in all runs."""
    scores = sidecar.scores
    return {name if _SAME.get(name, name) in scores else _SAME[name]: each for name, each in scores.items()}


def _with_interval(run: ListedRun, name: str) -> str:
    value, low, high = run[name], run[f"{name}_from"], run[f"{name}_to"]
    if low is None or high is None or not isinstance(value, float):
        return f"{value:.1f}" if name == "seconds" and value is not None else cell(value)
    return f"{value:.3f} ({low:.3f}-{high:.3f})"


def _group_words(groups: Counter[str | None]) -> str:
    return some([f"{digest or 'unknown'}: {counted(count, 'run')}" for digest, count in groups.most_common()])


def _aligned(rows: Sequence[Mapping[str, str]]) -> list[str]:
    if not rows:
        return []
    columns = [[name, *(row[name] for row in rows)] for name in rows[0]]
    padded = [[each.ljust(max(map(len, column))) for each in column] for column in columns]
    return ["  ".join(line).rstrip() for line in zip(*padded, strict=True)]


def _field(value: Json) -> str:
    """A value as a CSV has it, exact; people open it with a spreadsheet, which would run a text that is a formula."""
    if value is None:
        return ""
    if isinstance(value, list):
        return ",".join(map(_field, value))
    text = str(value)
    return f"'{text}" if isinstance(value, str) and text.startswith(("=", "+", "-", "@", "\t", "\r")) else text


def _fits(value: Json, wanted: Json) -> bool:
    if isinstance(wanted, set | frozenset):
        return any(_fits(value, each) for each in wanted)
    if isinstance(wanted, tuple):
        wanted = list(wanted)
    if isinstance(value, int | float) and isinstance(wanted, str):
        wanted = _as_number(wanted)
    if isinstance(value, bool) or isinstance(wanted, bool) or not isinstance(value, int | float):
        return bool(value == wanted) and type(value) is type(wanted)
    return isinstance(wanted, int | float) and math.isclose(value, wanted, rel_tol=1e-9)


def _as_number(text: str) -> str | float:
    """The number that a text says; the text where it says none."""
    try:
        return float(text)
    except ValueError:
        return text


def _number(value: Json, otherwise: float) -> float:
    return float(value) if isinstance(value, int | float) else otherwise


def _natural(name: str) -> list[Any]:
    """A key by which fold-2 comes before fold-10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name) if part]


# ---- finding them

_REPLACED = re.compile(r"\.(.+)\.old-[0-9a-f]{16}", re.DOTALL)


def _places(root: Path, damaged: dict[str, str]) -> Iterator[tuple[Path, Path, bool]]:
    """Each folder below `root` that may be a run: under which name, where it lies, whether a model is in it."""
    folders, seen = [root], set[tuple[int, int]]()
    while folders:
        folder = folders.pop()
        try:
            status = folder.stat()
            if (status.st_dev, status.st_ino) in seen:  # by a link that leads up again
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(folder) as found:
                entries = {each.name: each for each in found}
        except OSError as error:
            damaged[folder.relative_to(root).as_posix()] = str(error)
            continue
        if FILE in entries or FACTS in entries:
            yield folder, folder, FACTS in entries
        for name, each in entries.items():
            replaced = _REPLACED.fullmatch(name)
            if replaced is not None and replaced[1] not in entries:  # who put another in its place was killed
                whole = folder / replaced[1]
                yield whole, located(whole), (located(whole) / FACTS).is_file()
            if not name.startswith(".") and not name.endswith(CHECKPOINT) and each.is_dir():
                folders.append(Path(each.path))


def _with_bests_once(found: Iterable[ListedRun]) -> list[ListedRun]:
    """Runs, of which the best of a sweep takes the place of the setting that it is, and says what that was."""
    kept = {each.folder: each for each in found}
    for each in [*kept.values()]:
        best = kept.get(each.folder.parent / BEST)
        if best is None or each.sidecar.kind != "sweep-member" or best.sidecar.fits != each.sidecar.fits:
            continue
        configuration = {**best.sidecar.configuration, **each.sidecar.configuration}
        kept[best.folder] = replace(best, sidecar=replace(best.sidecar, configuration=configuration))
        del kept[each.folder]
    return [*kept.values()]


def _sidecar(path: Path, place: Path, *, has_model: bool) -> Sidecar | None:
    """What the run at `place` says; None if it is none. Without a run.json its model.json says whether it is one."""
    for where in (place, located(path)):  # another run may take its place meanwhile
        with suppress(FileNotFoundError):
            return Sidecar.parsed((where / FILE).read_bytes(), path / FILE)
    if not has_model:
        return None
    facts = read_facts(path)
    return None if "checkpoint" in facts else _from_facts(facts)


def _from_facts(facts: Mapping[str, Json]) -> Sidecar:
    model, head = facts.get("model") or {}, facts.get("head") or {}
    known = {"backbone": model.get("name"), "cut": model.get("default_cut"), "reduce": model.get("reduction")}
    return replace(Sidecar(), configuration={**known, "head": head.get("name"), "task": facts.get("task")})


def _check_alike(having: Sequence[ListedRun], name: str) -> None:
    """Raises FeatureStoreError if `name` is a loss, and not the same quantity in all of the runs."""
    if name != "loss":
        return
    functions = {each["loss_function"] for each in having}
    if len(functions) > 1:
        told = ", ".join(sorted("the task's own" if each is None else str(each) for each in functions))
        raise FeatureStoreError(
            f"The losses of {counted(len(having), 'run')} are of different functions ({told}), so which is best can't "
            "be told. Choose by another score, as accuracy, map or mae."
        )
    if any(each["task"] == "regression" for each in having) and len({each["trained_on"] for each in having}) > 1:
        raise FeatureStoreError(
            f"The losses of {counted(len(having), 'run')} of regression are in units of the spread of what each was "
            'trained on, and these are different images, so which is best can\'t be told. Choose by mae: best("mae").'
        )
