"""A saved run: one folder with a whole model's tensors and the JSON facts about it. Data only, never code."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
from torch import Tensor

from featstore.digest import Json
from featstore.errors import DamagedFileError, FeatureStoreError
from featstore.models.weights import read_tensors

FORMAT_VERSION = 1
TENSORS, FACTS = "model.safetensors", "model.json"


@dataclass(frozen=True)
class Run:
    """What a run folder says: facts, and tensors by their names in the model."""

    facts: Json
    tensors: dict[str, Tensor]


@contextmanager
def new_run(folder: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A folder to write a run into; it appears as `folder` when the block ends well, or not at all.

    Raises:
        FeatureStoreError: if `folder` exists and isn't to be replaced, or isn't a run.
    """
    check_free(folder, overwrite=overwrite)
    folder.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        made.chmod(0o777 & ~_umask())
        yield made
        _put(made, folder)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def check_free(folder: Path, *, overwrite: bool) -> None:
    """Raises FeatureStoreError unless a run may be written as `folder`: long work should learn that first."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not (folder / FACTS).is_file():
        raise FeatureStoreError(f"{folder} exists and is no saved run, so it isn't replaced. Choose another folder.")
    if not overwrite:
        raise FeatureStoreError(
            f"{folder} holds a saved run already. Choose another folder, or replace it with --overwrite (in "
            "Python: overwrite=True)."
        )


def write_run(folder: Path, facts: Mapping[str, Json], tensors: Mapping[str, Tensor]) -> None:
    """Writes facts and tensors into an existing `folder` (from `new_run`)."""
    # Copies: safetensors refuses tensors that share memory.
    own = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    safetensors.torch.save_file(own, folder / TENSORS)
    frame = {"format": FORMAT_VERSION, "tensors": _digest(folder / TENSORS)}
    text = json.dumps({**facts, **frame}, indent=1, ensure_ascii=False)
    (folder / FACTS).write_text(text + "\n", encoding="utf-8", errors="surrogateescape")


def read_run(folder: Path) -> Run:
    """The run in `folder`.

    Raises:
        FeatureStoreError: if it is no run, or of a newer format.
        DamagedFileError: if its files can't be read, or aren't those that were saved.
    """
    path = folder / FACTS
    if not path.is_file():
        raise FeatureStoreError(f"{folder} is no saved run: it has no {FACTS}. Give the folder that --out named.")
    try:
        facts = json.loads(path.read_text(encoding="utf-8", errors="surrogateescape"))
        version, digest = int(facts["format"]), facts["tensors"]
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedFileError(f"{path} is damaged ({error}); train the model again, or restore the file.") from error
    if version > FORMAT_VERSION:
        raise FeatureStoreError(
            f"{folder} has run format {version}; this featstore reads up to {FORMAT_VERSION}. Upgrade featstore."
        )
    tensors = folder / TENSORS
    if not tensors.is_file() or _digest(tensors) != digest:
        raise DamagedFileError(
            f"{tensors} isn't the file that was saved with the run (SHA-256 {digest[:8]}... expected); train the model "
            "again, or restore the file."
        )
    return Run(facts, read_tensors(tensors)[0])


def _put(made: Path, folder: Path) -> None:
    aside = made.with_name(f"{made.name}.old")
    if folder.exists():
        folder.rename(aside)
    try:
        made.rename(folder)
    except OSError:
        if aside.exists():
            aside.rename(folder)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _umask() -> int:
    value = os.umask(0)
    os.umask(value)
    return value
