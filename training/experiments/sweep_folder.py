"""Sweep folder: what is kept of a sweep on the disk, a folder for each finished setting, from which it goes on."""

from __future__ import annotations

import json
import math
import shutil
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from featstore import __version__
from featstore.digest import Json, digest_json
from featstore.errors import DamagedFileError, FactsDifferError, FeatureStoreError
from featstore.files.disk import make_folder, whole_or_nothing, write_at
from featstore.models.runs import new_run, read_run, write_run
from featstore.words import some
from training.choices import BEST, SWEEP
from training.experiments.grid import setting_digest
from training.learner import Learner
from training.loop.copies import tensors_of
from training.loop.history import History
from training.loop.monitor import Monitor
from training.provenance import FitRecord
from training.sidecar import FILE, Dealt, Score, Sidecar, finite

FACTS, HALVING = SWEEP, "halving.json"
FORMAT = 3
"""Of the folder, and of what a setting means: counted up when either changes."""


_GROWING = "features"
"""The fact that has a part for each place that settings read features of: more of them come with more settings."""

_ANOTHER = "choose another folder, or begin anew in its place with --overwrite (in Python: overwrite=True)"


class SweepFolder:
    """A folder with sweep.json, what all results depend on, and member-DIGEST for each setting that is done.

    Of a halving also halving.json: which settings go on from which rung.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()  # a sweep may be asked for its best after a change of directory
        self._named = path
        self._facts: dict[str, Json] = {}

    def begin(
        self, facts: Mapping[str, Json], *, resume: bool, overwrite: bool = False, nameless: str | None = None
    ) -> None:
        """Makes the folder, or checks that what it holds is of the same sweep, maybe with other settings.

        Where no setting is done, what another sweep has left is replaced.

        Args:
            facts: what all results depend on.
            resume: whether results may be there.
            overwrite: whether results that are there are deleted.
            nameless: what of the sweep can't be known again, of which no results may be there either.

        Raises:
            FactsDifferError: names what differs.
            FeatureStoreError: if there are results, and they aren't to be gone on from, or can't be.
            DamagedFileError: if its facts can't be read.
        """
        self._facts = json.loads(json.dumps({"format": FORMAT, **facts}))
        if not (self.path / FACTS).exists():
            self._check_empty()
            make_folder(self.path, root=self.path)
            try:
                _write(self.path / FACTS, self._facts)
                return
            except FileExistsError:  # another share was faster
                pass
        elif overwrite or (not resume and not self._has_members):
            self._begin_anew()
        elif not resume:
            raise FeatureStoreError(
                f"{self._named} holds a sweep already. Go on with it (resume=True, --resume), or {_ANOTHER}."
            )
        elif nameless is not None and self._has_members:
            raise FeatureStoreError(
                f"{self._named} holds a sweep already, and whether it is of the same settings can't be told, as "
                f"nothing names {nameless}. Write it into a file as a function or class, or {_ANOTHER}."
            )
        self._go_on()

    def _check_empty(self) -> None:
        there = sorted(each.name for each in self.path.iterdir()) if self.path.is_dir() else []
        if strangers := [name for name in there if not name.startswith(".")]:
            raise FeatureStoreError(
                f"{self._named} holds {some(strangers)}, and a sweep has a folder of its own. Choose another one."
            )

    @property
    def _has_members(self) -> bool:
        return any(self.path.glob(f"member-*/{FILE}"))

    def _begin_anew(self) -> None:
        """Deletes what is of a sweep here, its facts last: until then what is left is of that one."""
        for each in [self.path / BEST, *self.path.glob("member-*")]:
            if each.is_dir():
                shutil.rmtree(each)
        (self.path / HALVING).unlink(missing_ok=True)
        _write(self.path / FACTS, self._facts, replaces=True)

    def _go_on(self) -> None:
        """Goes on with what is there. Settings may be added, and with them places whose features they read."""
        found = self._found()
        differing = _differing(found, self._facts)
        if differing and not self._has_members:
            self._begin_anew()
            return
        if differing:
            name, (there, here) = next(iter(differing.items()))
            halved = "Halving compares all settings, so none can be added to it. " * ("settings" in differing)
            raise FactsDifferError(
                f"{self._named} is of another sweep; it differs in: {', '.join(differing)} ({name}: {_short(there)} "
                f"there, {_short(here)} here). Its scores can't stand beside those of this one. {halved}"
                f"{_ANOTHER[0].upper()}{_ANOTHER[1:]}."
            )
        self._facts[_GROWING] = {**found[_GROWING], **self._facts[_GROWING]}
        if found != self._facts:
            _write(self.path / FACTS, self._facts, replaces=True)

    def _found(self) -> dict[str, Json]:
        place = self.path / FACTS
        try:
            found = json.loads(place.read_bytes())
            if not isinstance(found, dict):
                raise TypeError(f"it holds {_short(found)}, no facts by name")
            return dict(found)
        except (ValueError, TypeError) as error:
            if not self._has_members:
                return {}
            raise DamagedFileError(f"{place} is damaged ({error}). Restore it, or {_ANOTHER}.") from error

    def read(self, name: str) -> dict[str, Json] | None:
        """What was written of a setting; None if it isn't done.

        Raises:
            DamagedFileError: if it isn't what was written.
        """
        folder = self._of(name)
        if not (folder / FILE).exists():
            return None
        found: Json = Sidecar.read(folder).more.get("sweep")
        setting = found.get("setting") if isinstance(found, dict) else None
        if not isinstance(setting, dict) or setting_digest(setting) != name:
            raise DamagedFileError(
                f"{folder} doesn't hold the setting that it is named after; a folder was renamed or copied there. "
                "Delete it, and the same sweep again trains that setting anew."
            )
        return dict(found)

    def decided(self) -> dict[int, list[str]]:
        """Of each rung of a halving that was decided, by its epoch, the names of the settings that go on.

        Raises:
            DamagedFileError: if that can't be read.
        """
        place = self.path / HALVING
        if not place.exists():
            return {}
        try:
            return {int(until): [*map(str, names)] for until, names in json.loads(place.read_bytes()).items()}
        except (ValueError, TypeError, AttributeError) as error:
            raise DamagedFileError(f"{place} is damaged ({error}). Restore it, or {_ANOTHER}.") from error

    def decide(self, until: int, names: Sequence[str]) -> None:
        """Keeps which settings go on from a rung, before those that don't are written: it is decided once."""
        _write(self.path / HALVING, {**self.decided(), until: [*names]}, replaces=True)

    def head(self, name: str) -> tuple[dict[str, Tensor], int, list[FitRecord], History]:
        """The tensors of a head, the passes over the training images that they have seen, its fit and its epochs."""
        run, sidecar = read_run(self._of(name)), Sidecar.read(self._of(name))
        fits = [FitRecord.kept(each) for each in sidecar.fits]
        kept = sidecar.more["history"]
        history = History(
            records=[
                {key: math.nan if value is None else value for key, value in each.items()} for each in kept["records"]
            ],
            best_epoch=kept["best_epoch"],
            losses=run.tensors.pop(_STEPS["losses"]).tolist(),
            lrs=array("d", run.tensors.pop(_STEPS["lrs"]).tolist()),
            momenta=array("d", run.tensors.pop(_STEPS["momenta"]).tolist()),
            monitor=Monitor(*kept["monitor"]),
        )
        return run.tensors, int(run.facts["passes"]), fits, history

    def write(
        self,
        name: str,
        *,
        learner: Learner,
        weights: nn.Module | None,
        result: Mapping[str, Json],
        scores: Mapping[str, Score],
        seconds: float,
        scored_on: Dealt,
    ) -> None:
        """Keeps a setting that is done: the folder appears whole, or not at all.

        Raises:
            FactsDifferError: if another sweep has begun in the folder since.
        """
        if _differing(self._found(), self._facts):
            raise FactsDifferError(
                f"Another sweep has begun in {self._named}, so {self._of(name).name} isn't written there. Give each a "
                "folder of its own."
            )
        tensors = {} if weights is None else {**dict(tensors_of(weights)), **_steps(learner.history)}
        with new_run(self._of(name), overwrite=True) as made:
            write_run(made, {"sweep_member": name, "featstore": __version__, "passes": learner.passes}, tensors)
            sidecar = learner.sidecar()
            Sidecar(
                kind="sweep-member",
                configuration={**sidecar.configuration, **_flat(result)},
                fits=sidecar.fits,
                keys=sidecar.keys,
                trunk=sidecar.trunk,
                versions=sidecar.versions,
                split={**sidecar.split, "valid": scored_on},
                scored="valid",
                scores=scores,
                seconds=round(seconds, 3),
                more={**sidecar.more, "sweep": dict(result), "history": _epochs(learner.history)},
            ).write(made)

    def _of(self, name: str) -> Path:
        return self.path / f"member-{name}"


def _write(place: Path, facts: Mapping[Any, Json], *, replaces: bool = False) -> None:
    """Writes a file of JSON, whole or not at all.

    Raises:
        FileExistsError: if one is there that isn't to be replaced.
    """
    content = (json.dumps(facts, indent=1) + "\n").encode("ascii")
    with whole_or_nothing(place, len(content), replaces=replaces) as fd:
        write_at(fd, memoryview(content), 0)


_STEPS = {name: f"history.{name}" for name in ("losses", "lrs", "momenta")}
"""Names of the tensors that hold a number of each step."""


def _steps(history: History) -> dict[str, Tensor]:
    return {place: torch.tensor(getattr(history, name), dtype=torch.float64) for name, place in _STEPS.items()}


def _epochs(history: History) -> dict[str, Json]:
    return {
        "records": [{name: finite(value) for name, value in each.items()} for each in history.records],
        "best_epoch": history.best_epoch,
        "monitor": [history.monitor.name, history.monitor.direction],
    }


def _flat(result: Mapping[str, Json]) -> dict[str, Json]:
    """The setting, as far as runs are found by it; of code the fit's own configuration has the name."""
    setting = result["setting"]
    return {name: value for name, value in setting.items() if _is_plain(value)}


def _is_plain(value: Json) -> bool:
    if isinstance(value, list):
        return not any(isinstance(each, list | dict) for each in value)
    return not isinstance(value, dict)


def _differing(found: Mapping[str, Json], wanted: Mapping[str, Json]) -> dict[str, tuple[Json, Json]]:
    """Name of a fact -> what is there and what is here, where these differ; of options and places each by itself."""
    differing: dict[str, tuple[Json, Json]] = {}
    for name in {**found, **wanted}:
        there, here = found.get(name), wanted.get(name)
        if isinstance(there, dict) and isinstance(here, dict):
            inner = {**there, **here} if name != _GROWING else there.keys() & here.keys()
            for each in sorted(inner):
                if there.get(each) != here.get(each):
                    differing[f"{name}: {each}"] = there.get(each), here.get(each)
        elif there != here:
            differing[name] = there, here
    return differing


def _short(value: Json) -> str:
    text = json.dumps(value)
    if isinstance(value, list) and len(text) > _MOST_SHOWN:
        return f"{len(value):,}, digest {digest_json(value)[:8]}"
    return text if len(text) <= _MOST_SHOWN else f"{text[: _MOST_SHOWN - 3]}..."


_MOST_SHOWN = 60
