"""A saved run: one folder with a whole model's tensors and the JSON facts about it. Data only, never code.

`model.json` lists the SHA-256 of every other file of the run and one over itself, so that damage is found and the
file named. A run appears under its name whole, checked and synced; where one is replaced the old one is there until
the new one is.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from featstore.digest import Json, digest_json
from featstore.errors import DamagedFileError, FeatureStoreError
from featstore.words import listed

if TYPE_CHECKING:  # whether a run may be written is checked before a program loads torch
    from torch import Tensor

try:
    import fcntl
except ImportError:  # Windows: what a killed process left isn't told from what a living one writes, and stays
    fcntl = None  # type: ignore[assignment]
_HAS_LOCKS: bool = fcntl is not None

FORMAT_VERSION = 2
"""Version 1, without checksums over facts and reports, is read too."""

T = TypeVar("T")

TENSORS, FACTS = "model.safetensors", "model.json"

_RESTORE = "Restore the file, or train the model again."


@dataclass(frozen=True)
class Run:
    """What a run folder says: facts, and tensors by their names in the model."""

    facts: Json
    tensors: dict[str, Tensor]

    @property
    def identity(self) -> str:
        """Digest of the facts, which name every tensor's digest: two runs of one folder have two."""
        return digest_json(self.facts)


@contextmanager
def new_run(folder: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A folder to write a run into; it appears as `folder`, sealed and synced, when the block ends well, or not at all.

    What killed processes have left of earlier savings under this name is deleted.

    Raises:
        FeatureStoreError: if `folder` exists and isn't to be replaced, or isn't a run.
        OSError: as the disk gave it, with a file's name.
    """
    check_free(folder, overwrite=overwrite)
    with new_folder(folder) as made:
        yield made
        _seal(made)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to write runs into; when the block ends well it is in the place of `folder`, synced; else nothing is.

    What killed processes have left of earlier ones under this name is deleted.

    Raises:
        OSError: as the disk gave it, with a file's name.
    """
    folder = _target(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _made_beside(folder) as made:
        try:
            yield made
            for path in (*made.iterdir(), made):
                _sync(path)
            with _in_turn(folder, is_alone=True):
                _put(made, folder)
        except OSError as error:
            # A full disk is met by a write, which names no file; and the hidden folder tells nobody anything.
            error.filename = str(error.filename or folder).replace(os.fspath(made), os.fspath(folder))
            raise
        finally:
            shutil.rmtree(made, ignore_errors=True)
            _clear(folder)


def check_free(folder: Path, *, overwrite: bool) -> None:
    """Checks that a run can be written as `folder`, by making and deleting a folder beside it.

    Long work should learn that first.

    Raises:
        FeatureStoreError: if it exists and isn't to be replaced, or isn't a run.
        OSError: if nothing can be written there.
    """
    with _in_turn(folder, is_alone=False):
        place = located(folder)
        is_free = not place.exists() or (place.is_dir() and not any(place.iterdir()))
        is_run = (place / FACTS).is_file()
        strangers = _strangers(place) if is_run and overwrite else []
    if not is_free and not is_run:
        raise FeatureStoreError(f"{folder} exists and is no saved run, so it isn't replaced. Choose another folder.")
    if not is_free and not overwrite:
        raise FeatureStoreError(
            f"{folder} holds a saved run already. Choose another folder, or replace it with --overwrite (in Python: "
            "overwrite=True)."
        )
    if strangers:
        raise FeatureStoreError(
            f"{folder} holds {listed(strangers)} besides its run, and replacing the run would delete the whole folder. "
            "Move out what you want to keep and delete the rest, or choose another folder."
        )
    _try_to_write(_target(folder))


def write_run(folder: Path, facts: Mapping[str, Json], tensors: Mapping[str, Tensor]) -> None:
    """Writes facts and tensors into an existing `folder` (from `new_run`, which seals it)."""
    import safetensors.torch

    # Copies: safetensors refuses tensors that share memory.
    own = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    path = folder / TENSORS
    try:
        safetensors.torch.save_file(own, path)
    except safetensors.SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), os.fspath(path)) from error
    path.chmod(0o666 & ~_umask())  # safetensors makes it readable by its owner alone
    _write_facts(folder, facts)


def read_run(folder: Path) -> Run:
    """The run in `folder`.

    Raises:
        FeatureStoreError: if it is no run, or of a newer format.
        DamagedFileError: if one of its files isn't what was saved; a report that is missing is no damage.
    """
    from featstore.models.weights import read_tensors

    def read(place: Path) -> Run:
        facts = _read_facts(place)
        for name in facts.get("files", {}):
            if name != TENSORS and (place / name).exists():
                _checked(place / name, facts["files"][name])
        return Run(facts, read_tensors(_checked(place / TENSORS, facts["tensors"]))[0])

    return _of_one_run(folder, read)


def read_facts(folder: Path) -> dict[str, Json]:
    """The facts of the run in `folder` alone, without its tensors; errors as of `read_run`."""
    return _of_one_run(folder, _read_facts)


def read_file(folder: Path, name: str, *, identity: str | None = None) -> bytes | None:
    """The content of another file of a run; None if the run has none of that name.

    Args:
        folder: of the run.
        name: of the file.
        identity: of the run that is meant, where it was read before; default: whatever lies there now.

    Raises:
        FeatureStoreError: as `read_run`, and if another run lies there by now.
        DamagedFileError: if it isn't what was saved.
    """

    def read(place: Path) -> bytes | None:
        facts = _read_facts(place)
        if identity not in (None, digest_json(facts)):
            raise FeatureStoreError(
                f"{folder} holds another run than when the model was loaded from it, so its {name} is about another "
                "model. Load the model again, or give it a run that stays."
            )
        path, expected = place / name, facts.get("files", {}).get(name)
        if expected is not None:
            content = _checked(path, expected).read_bytes()
            if hashlib.sha256(content).hexdigest() == expected:  # and not changed since it was checked
                return content
            raise _not_as_saved(path, expected)
        return path.read_bytes() if facts["format"] == 1 and path.is_file() else None

    return _of_one_run(folder, read)


def located(folder: Path) -> Path:
    """Where the run, or the runs, called `folder` lie: there, or aside, if who replaced them was killed in between."""
    if folder.exists():
        return folder
    target = _target(folder)
    if target.exists():  # past a folder that isn't there: x/../run
        return target
    whole = [each for each in _leftovers(target, _OLD) if (each / FACTS).is_file() or any(each.glob(f"*/{FACTS}"))]
    return max(whole, key=lambda each: each.stat().st_mtime_ns, default=folder)


# ---- writing


_NEW, _OLD = "new", "old"


def _target(folder: Path) -> Path:
    """The folder itself, where a link or ``.`` leads to it: what a run lies beside, and takes the place of."""
    return Path(os.path.realpath(folder))


def _beside(folder: Path, kind: str, token: str | None = None) -> Path:
    return folder.with_name(f".{folder.name}.{kind}-{token or secrets.token_hex(8)}")


def _leftovers(folder: Path, *kinds: str) -> list[Path]:
    pattern = re.compile(rf"\.{re.escape(folder.name)}\.({'|'.join(kinds)})-[0-9a-f]{{16}}")
    with suppress(OSError):
        return [folder.with_name(name) for name in os.listdir(folder.parent) if pattern.fullmatch(name)]
    return []


@contextmanager
def _made_beside(folder: Path) -> Iterator[Path]:
    """A new folder with a lock on it while this process works in it: the system takes it back from one that is killed.

    Between the folder and its lock another process may take it for what a killed one left.
    """
    fd = None
    while fd is None:
        made = _beside(folder, _NEW)
        made.mkdir()
        if not _HAS_LOCKS:
            break
        with suppress(FileNotFoundError):
            fd = os.open(made, os.O_RDONLY)
            if not _locks(fd) or not made.exists():
                os.close(fd)
                fd = None
    try:
        yield made
    finally:
        if fd is not None:
            os.close(fd)


@contextmanager
def _in_turn(folder: Path, *, is_alone: bool) -> Iterator[None]:
    """Waits while another process exchanges a run beside `folder`, or, to do so alone, while others look at one.

    The lock is on the folder above, for as long as the block lasts. Where there are no locks nobody waits; nor in a
    folder that is being made, which its maker has locked, and where nobody else looks.
    """
    fd, above = None, _target(folder).parent
    if _HAS_LOCKS and not re.fullmatch(rf"\..+\.{_NEW}-[0-9a-f]{{16}}", above.name, re.DOTALL):
        with suppress(OSError):  # the folder above isn't there; a file system without locks
            fd = os.open(above, os.O_RDONLY)
            fcntl.flock(fd, fcntl.LOCK_EX if is_alone else fcntl.LOCK_SH)
    try:
        yield
    finally:
        if fd is not None:
            os.close(fd)


def _locks(fd: int) -> bool:
    """Locks a folder, where its file system has locks; False if another process has it."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def _clear(folder: Path) -> None:
    """Deletes what killed processes have left beside `folder`, unless it holds all there is of the run."""
    if not _HAS_LOCKS or not folder.exists():
        return
    for each in _leftovers(folder, _NEW, _OLD):
        with suppress(OSError):
            fd = os.open(each, os.O_RDONLY)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(each, ignore_errors=True)
            finally:
                os.close(fd)


def _strangers(folder: Path) -> list[str]:
    """What lies in a run's folder and is none of its files."""
    own = {TENSORS, FACTS, *_REPORTS}
    with suppress(DamagedFileError):  # a damaged run may be replaced
        own |= _files_of(_parsed(folder / FACTS))
    return sorted(
        name for name in os.listdir(folder) if name not in own and not name.startswith((".DS_Store", ".nfs", "._"))
    )


def _files_of(facts: Mapping[str, Json]) -> set[str]:
    files = facts.get("files")
    return set(files) if isinstance(files, dict) else set()


_REPORTS = ("split.npz", "history.csv", "metrics.json", "run.json", "valid_predictions.csv")
"""What runs may hold besides; those of version 1 have no list of it."""


def _try_to_write(folder: Path) -> None:
    """Makes and deletes a folder beside `folder`, and those above it that aren't there."""
    missing = [each for each in folder.absolute().parents if not each.exists()]
    tried = _beside(folder.absolute(), _NEW)
    made: list[Path] = []
    try:
        for each in (*reversed(missing), tried):
            each.mkdir()
            made.append(each)
    except FileExistsError as error:  # a file where a folder is needed, or another process made it
        if not Path(str(error.filename)).is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), error.filename) from None
    finally:
        for each in reversed(made):
            with suppress(OSError):
                each.rmdir()


def _write_facts(folder: Path, facts: Mapping[str, Json]) -> None:
    text = json.dumps(facts, indent=1, ensure_ascii=False)
    (folder / FACTS).write_text(text + "\n", encoding="utf-8", errors="surrogateescape")


def _seal(folder: Path) -> None:
    """Lists every file of the run in its facts, with a checksum over these."""
    facts = _parsed(folder / FACTS)
    files = {path.name: _digest(path) for path in sorted(folder.iterdir()) if path.is_file() and path.name != FACTS}
    facts |= {"format": FORMAT_VERSION, "tensors": files[TENSORS], "files": files}
    _write_facts(folder, {**facts, "checksum": digest_json(facts)})


def _put(made: Path, folder: Path) -> None:
    """Gives `made` its name; of several that do so at one time the last one stays."""
    aside = None
    while True:
        with suppress(FileNotFoundError):  # there was none, or another process is as far
            aside = folder.rename(_beside(folder, _OLD))
        try:
            made.rename(folder)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST):  # another process was faster
                continue
            if aside is not None and not folder.exists():
                aside.rename(folder)
            raise
        break
    _sync(folder.parent)
    if aside is not None:
        with suppress(FileNotFoundError):  # another process clears up
            # Under this name it isn't found again, should this process end here and somebody delete the run.
            shutil.rmtree(aside.rename(_beside(folder, _NEW)), ignore_errors=True)


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _umask() -> int:
    value = os.umask(0)
    os.umask(value)
    return value


# ---- reading


def _of_one_run(folder: Path, read: Callable[[Path], T]) -> T:
    """What `read` gives for the run called `folder`, all of it from one: another may take its place meanwhile."""
    for _ in range(_MOST_TRIES):
        place = located(folder)
        before = _identity(place)
        try:
            found = read(place)
        except (FeatureStoreError, OSError):
            with _in_turn(folder, is_alone=False):  # not in the middle of an exchange, when there may be none
                is_as_before = _identity(located(folder)) == before
            if is_as_before:
                raise
        else:
            if _identity(place) == before:
                return found
    raise FeatureStoreError(f"{folder} is replaced over and over while it is read. Wait for what saves runs there.")


_MOST_TRIES = 100


def _identity(folder: Path) -> tuple[int, int, int] | None:
    """Of a folder; the number alone may be that of one that was deleted."""
    try:
        status = folder.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_mtime_ns


def _read_facts(folder: Path) -> Json:
    path = folder / FACTS
    if not path.is_file():
        raise FeatureStoreError(f"{folder} is no saved run: it has no {FACTS}. {_give(folder)}")
    facts = _parsed(path)
    try:
        version, _ = int(facts["format"]), facts["tensors"]
        checksum = facts["checksum"] if version > 1 else facts.get("checksum")
        files = facts.get("files", {})
        if not isinstance(files, dict) or not all(isinstance(each, str) for each in files.values()):
            raise TypeError("its files have no digests")
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedFileError(f"{path} is damaged ({error!r}). {_RESTORE}") from error
    own = {name: value for name, value in facts.items() if name != "checksum"}
    # A flipped bit in the number must not pass for another version: with this one the checksum would fit.
    is_altered_number = version != FORMAT_VERSION and _checksum({**own, "format": FORMAT_VERSION}) == checksum
    if version > FORMAT_VERSION and not is_altered_number:
        raise FeatureStoreError(
            f"{folder} has run format {version}; this featstore reads up to {FORMAT_VERSION}. Upgrade featstore."
        )
    if is_altered_number or version < 1 or (version > 1 and _checksum(own) != checksum):
        raise DamagedFileError(
            f"{path} is damaged: its facts don't fit their checksum (SHA-256 {str(checksum)[:8]}... expected). "
            f"{_RESTORE}"
        )
    return own


def _give(folder: Path) -> str:
    """What to give in the place of a folder that is no run: one that lies in it, or another one."""
    inside = sorted(each.parent.name for each in folder.glob(f"[!.]*/{FACTS}"))
    if not inside:
        return "Give the folder that --out named."
    if "best" in inside:  # of a sweep
        return f"Give the best of those in it: {folder / 'best'}."
    return (
        f"Give one of those in it: {', '.join(str(folder / each) for each in inside[:3])}{', ...' * (len(inside) > 3)}."
    )


def _parsed(path: Path) -> dict[str, Json]:
    try:
        facts = json.loads(path.read_text(encoding="utf-8", errors="surrogateescape"))
    except (ValueError, RecursionError) as error:
        raise DamagedFileError(f"{path} is damaged ({error}). {_RESTORE}") from error
    if not isinstance(facts, dict):
        raise DamagedFileError(f"{path} is damaged (it holds no JSON object). {_RESTORE}")
    return facts


def _checksum(facts: Mapping[str, Json]) -> str | None:
    """None for facts that were never written: JSON's NaN, which Python reads, has no canonical form."""
    try:
        return digest_json(dict(facts))
    except TypeError:
        return None


def _checked(path: Path, expected: str) -> Path:
    if not path.is_file() or _digest(path) != expected:
        raise _not_as_saved(path, expected)
    return path


def _not_as_saved(path: Path, expected: str) -> DamagedFileError:
    return DamagedFileError(
        f"{path} isn't the file that was saved with the run (SHA-256 {str(expected)[:8]}... expected). Restore it, or "
        "train the model again; of reports, nothing is lost but they themselves: delete such a file."
    )


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
