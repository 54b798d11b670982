"""Own files: ``path/to/file.py:function`` -> the model that the function makes, with what its source is."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from torch import nn

from featstore.digest import Json, digest_bytes
from featstore.errors import FeatureStoreError, ModelError
from featstore.models import trust
from featstore.models.modes import seeded
from featstore.models.staged import StagedModel
from featstore.source_code import outdated_sources, own_files, source_digests
from featstore.timing import timed


def is_own_file(source: str) -> bool:
    """Whether `source` has the form of a function in a file."""
    return ".py:" in source


def load(source: str) -> StagedModel:
    """The model of ``path/to/file.py:function``, called without arguments under a fixed seed.

    Whoever asks for it by name has chosen to run that code, which is remembered (see `trust`).

    Raises:
        ValueError: if file or function isn't there or makes no module, or a module that the file imports isn't what
            lies beside it.
        ModelError: if the function fails, or its module can't be traced or keyed.
    """
    file, _, function = source.rpartition(":")
    path = Path(file).expanduser().resolve()
    if not path.is_file():
        raise ValueError(f"There is no file {file}. Expected path/to/file.py:function, where function makes the model.")
    with seeded(), _importable(path.parent):
        module = _imported(path)
        _check_helpers(module, path.parent)
        make = getattr(module, function, None)
        if not callable(make):
            raise ValueError(f"{file} has no function {function}. Expected path/to/file.py:function.")
        try:
            with timed("load"):
                made = make()
        except Exception as error:
            raise ModelError(f"{source} failed with {type(error).__name__}: {error}. Mend that function.") from error
    if not isinstance(made, nn.Module):
        raise ValueError(f"{source} returned a {type(made).__name__}; expected an nn.Module or a StagedModel.")
    model = made if isinstance(made, StagedModel) else StagedModel.from_module(made.eval(), name=path.stem)
    trust.remember(path, function)
    made_by = {
        "file": str(path),
        "function": function,
        "source": source_digests(module),
        "reachable": trust.reachable_sources(path),
    }
    return model.with_(origin={"backbone": source, "architecture": made_by})


def made_again(facts: Mapping[str, Json], run: Path, *, trust_code: bool = False) -> StagedModel:
    """The model of the file and function that a run's facts name.

    Raises:
        FeatureStoreError: if the file is gone, its source has changed since, or it may not run here (see `trust`).
    """
    trust.check_trusted(facts, run, trust_code=trust_code)
    model = load(f"{facts['file']}:{facts['function']}")
    if model.origin["architecture"]["source"] != facts["source"]:
        raise FeatureStoreError(
            f"{facts['file']} has changed since the run was saved, so the saved tensors may mean another model. "
            "Restore the file as it was, or train again."
        )
    return model


def _check_helpers(module: ModuleType, folder: Path) -> None:
    """Refuses helper modules that Python has loaded before and that aren't what lies in `folder` now."""
    for name, file in own_files(module).items():
        beside = folder.joinpath(*name.split("."))
        expected = next((each for each in (beside.with_suffix(".py"), beside / "__init__.py") if each.is_file()), file)
        if expected.resolve() != file:
            raise ValueError(
                f"{module.__file__} imports {name}, and Python has loaded another {name} before, from {file}. Rename "
                "one of them, or use a new Python process."
            )
    if changed := outdated_sources(module):
        raise ValueError(
            f"{changed[0]} has changed since Python loaded it, so {module.__file__} would run the old code. Start a "
            "new Python process, or importlib.reload() it."
        )


def _imported(path: Path) -> ModuleType:
    # A name for each path and text: classes from before an edit keep the module they came from.
    text = str(path).encode("utf-8", "surrogateescape") + path.read_bytes()
    name = f"{path.stem}__{digest_bytes(text)[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where inspect looks for the source of a class
    spec.loader.exec_module(module)
    return module


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    path, writes = list(sys.path), sys.dont_write_bytecode
    sys.path.insert(0, str(folder))
    sys.dont_write_bytecode = True  # it is keyed by whole seconds: an edit within one would go unseen
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path[:], sys.dont_write_bytecode = path, writes
