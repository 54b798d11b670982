"""Sweep folder: what is kept of a sweep on the disk, a folder for each finished setting, from which it goes on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from featstore import __version__
from featstore.digest import Json
from featstore.errors import DamagedFileError, FactsDifferError, FeatureStoreError
from featstore.files.disk import make_folder, whole_or_nothing, write_at
from featstore.models.runs import new_run, read_run, write_run
from featstore.words import some
from training.copies import tensors_of
from training.learner import Learner
from training.provenance import FitRecord
from training.sidecar import FILE, Dealt, Score, Sidecar, finite

FACTS, HALVING = "sweep.json", "halving.json"
FORMAT = 2
"""Of the folder, and of what a setting means: counted up when either changes."""


class SweepFolder:
    """A folder with sweep.json, what all results depend on, and member-DIGEST for each setting that is done.

    Of a halving also halving.json: which settings go on from which rung.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def begin(self, facts: Mapping[str, Json], *, resume: bool) -> None:
        """Makes the folder, or checks that what it holds is of the same sweep.

        Raises:
            FactsDifferError: names what differs.
            FeatureStoreError: if there are results, and they aren't to be gone on from.
            DamagedFileError: if its facts can't be read.
        """
        place = self.path / FACTS
        wanted = json.loads(json.dumps({"format": FORMAT, **facts}))
        if not place.exists():
            there = sorted(each.name for each in self.path.iterdir()) if self.path.is_dir() else []
            if strangers := [name for name in there if not name.startswith(".")]:
                raise FeatureStoreError(
                    f"{self.path} holds {some(strangers)}, and a sweep has a folder of its own. Choose another one."
                )
            make_folder(self.path, root=self.path)
            try:
                _write(place, wanted)
                return
            except FileExistsError:  # another share was faster
                pass
        elif not resume:
            raise FeatureStoreError(
                f"{self.path} holds a sweep already. Go on with it (resume=True, --resume), or choose another folder."
            )
        try:
            found = json.loads(place.read_bytes())
        except ValueError as error:
            raise DamagedFileError(f"{place} is damaged ({error}). Restore it, or choose another folder.") from error
        differing = [name for name in {**found, **wanted} if found.get(name) != wanted.get(name)]
        if differing:
            name = differing[0]
            raise FactsDifferError(
                f"{self.path} is of another sweep; it differs in: {', '.join(differing)} ({name}: "
                f"{_short(found.get(name))} there, {_short(wanted.get(name))} here). Its scores can't stand beside "
                "those of this one. Choose another folder."
            )

    def read(self, name: str) -> dict[str, Json] | None:
        """What was written of a setting; None if it isn't done.

        Raises:
            DamagedFileError: if it isn't what was written.
        """
        folder = self._of(name)
        if not (folder / FILE).exists():
            return None
        found: dict[str, Json] = Sidecar.read(folder).more["sweep"]
        return found

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
            raise DamagedFileError(f"{place} is damaged ({error}). Restore it, or choose another folder.") from error

    def decide(self, until: int, names: Sequence[str]) -> None:
        """Keeps which settings go on from a rung, before those that don't are written: it is decided once."""
        _write(self.path / HALVING, {**self.decided(), until: [*names]}, replaces=True)

    def head(self, name: str) -> tuple[dict[str, Tensor], int, list[FitRecord]]:
        """The tensors of a head, the passes over the training images that they have seen, and its fit."""
        run = read_run(self._of(name))
        fits = [FitRecord.kept(each) for each in Sidecar.read(self._of(name)).fits]
        return run.tensors, int(run.facts["passes"]), fits

    def write(
        self,
        name: str,
        *,
        learner: Learner,
        weights: nn.Module | None,
        result: Mapping[str, Json],
        scores: Mapping[str, tuple[float, tuple[float, float] | None]],
        seconds: float,
        scored_on: Dealt,
    ) -> None:
        """Keeps a setting that is done: the folder appears whole, or not at all."""
        tensors = {} if weights is None else dict(tensors_of(weights))
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
                scores={each: Score(finite(value), ends) for each, (value, ends) in scores.items()},
                seconds=round(seconds, 3),
                more={**sidecar.more, "sweep": dict(result)},
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


def _flat(result: Mapping[str, Json]) -> dict[str, Json]:
    """The setting, as far as runs are found by it."""
    setting = result["setting"]
    return {name: value for name, value in setting.items() if not isinstance(value, dict)}


def _short(value: Json) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
