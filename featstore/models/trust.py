"""Trust: which code of a saved run may be run here without being asked for.

A run can name a function in a file as its architecture (`net.py:make`), and loading it runs that file. Whoever wrote
the run chose the file, so it runs unasked only where this user has run the very same code before: what a run of one's
own was saved with is remembered by its digest, in the user's state folder. Anything else waits for `trust_code`.
"""

from __future__ import annotations

import ast
import importlib.util
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from featstore.digest import Json, digest_bytes, digest_json
from featstore.errors import FeatureStoreError
from featstore.source_code import normalised_source

_SHOWN_LINES = 12


def reachable_sources(file: Path) -> list[str]:
    """Digests of the normalised source of `file` and of all modules beside it that its imports lead to, sorted.

    They are read as text, and nothing is imported: also what is imported inside functions counts.
    """
    return sorted(_reachable(file).values())


def check_trusted(facts: Mapping[str, Json], run: Path, *, trust_code: bool = False) -> dict[Path, str] | None:
    """Checks, before any of it runs, that the code a run names is what it was and may run here.

    Returns the files that may run, with the `code_digest` of each; None where the user says that all may.

    Args:
        facts: of the architecture: file, function, source and, in runs from 0.2 on, reachable.
        run: the run's folder, for messages.
        trust_code: the user says that it may run; it is remembered then.

    Raises:
        FeatureStoreError: if the file is gone or has changed since the run was saved, or if this user has neither
            saved a run with that code nor said that it may run; the message shows the beginning of what would run.
    """
    file = Path(facts["file"]).expanduser().resolve()  # as it will be loaded: a link's neighbours aren't its target's
    if not file.is_file():
        raise FeatureStoreError(
            f"The model was made by {facts['function']} in {file}, and that file is gone. Put it back, or give the "
            "model in Python: Learner.load(run, module=...)."
        )
    checked = _reachable(file)
    reachable = sorted(checked.values())
    if checked[file] not in facts["source"] or facts.get("reachable", reachable) != reachable:
        raise FeatureStoreError(
            f"{file}, or a module beside it that it imports, has changed since the run was saved, so the saved tensors "
            "may mean another model. Restore the file as it was, or train again."
        )
    if trust_code:
        remember(file, str(facts["function"]))
        return None
    if not _is_noted(_entry(file, str(facts["function"]), reachable)):
        raise FeatureStoreError(
            f"{run} would run code: {facts['function']} in {file}, and neither has a run with that code been saved "
            f"here nor has it been trusted. Nothing of it was run. It begins:\n{_beginning(file)}\nIf you have read it "
            "and trust it: --trust-code (in Python: trust_code=True). Or give the model in Python: Learner.load(run, "
            "module=...)."
        )
    return checked


def code_digest(content: bytes) -> str:
    """Of a Python file's content: equal for texts that mean the same statements."""
    try:
        return digest_bytes(normalised_source(importlib.util.decode_source(content)).encode("utf-8"))
    except (SyntaxError, ValueError):  # no Python; it must be the same to the byte
        return digest_bytes(content)


def is_known(file: Path, function: str) -> bool:
    """Whether `remember` was called for that function with the very code that `file` leads to now."""
    return _is_noted(_entry(file, function, reachable_sources(file)))


def remember(file: Path, function: str) -> None:
    """Notes that this user runs that function of `file`, with the code that it leads to now.

    Where the state folder can't be written nothing is noted, and the code has to be trusted anew.
    """
    entry = _entry(file, function, reachable_sources(file))
    if _is_noted(entry):
        return
    ledger = _ledger()
    with suppress(OSError):
        ledger.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with ledger.open("a", encoding="ascii") as out:  # one short line: appended whole by any number of processes
            out.write(f"{entry}\n")


def _ledger() -> Path:
    """Where trusted code is noted, a digest a line."""
    state = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    return Path(state) / "featstore" / "trusted-code"


def _is_noted(entry: str) -> bool:
    try:
        return entry in _ledger().read_text(encoding="ascii").split()
    except OSError:
        return False


def _entry(file: Path, function: str, reachable: list[str]) -> str:
    return digest_json([str(file.absolute()), function, reachable])


def _reachable(file: Path) -> dict[Path, str]:
    found: dict[Path, str] = {}
    left = [file]
    while left:
        path = left.pop()
        if path not in found:
            content = path.read_bytes()
            found[path] = code_digest(content)
            left += _imported_beside(path, content, file.parent)
    return found


def _imported_beside(path: Path, content: bytes, folder: Path) -> list[Path]:
    """The files below `folder` that the imports of `path` name."""
    try:
        tree = ast.parse(importlib.util.decode_source(content))
    except (SyntaxError, ValueError):
        return []
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = path.parent.relative_to(folder).parts[: len(path.parent.relative_to(folder).parts) - node.level + 1]
            package = ".".join([*(above if node.level else ()), *([node.module] if node.module else [])])
            names |= {package, *(f"{package}.{alias.name}".removeprefix(".") for alias in node.names)} - {""}
    return [file for name in sorted(names) for file in _files_of(name, folder)]


def _files_of(module: str, folder: Path) -> list[Path]:
    """The files below `folder` that importing `module` runs: of the packages around it, and its own."""
    parts, files = module.split("."), []
    for length in range(1, len(parts) + 1):
        place = folder.joinpath(*parts[:length])
        files += [each for each in (place / "__init__.py", place.with_name(f"{place.name}.py")) if each.is_file()]
    return files


def _beginning(file: Path) -> str:
    content = file.read_bytes()
    try:
        text = importlib.util.decode_source(content)  # as Python reads it
    except (SyntaxError, ValueError):
        text = content.decode("utf-8", "replace")
    lines = text.splitlines()
    shown = ["    " + "".join(char if char.isprintable() else "?" for char in line) for line in lines[:_SHOWN_LINES]]
    more = [f"    ... {len(lines) - _SHOWN_LINES} more lines"] if len(lines) > _SHOWN_LINES else []
    return "\n".join([*shown, *more])
