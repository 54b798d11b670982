"""Own files: ``path/to/file.py:function`` -> the model that the function makes, with what its source is."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.machinery import FileFinder, ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType

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
    return _loaded(path, function, source, None)


def made_again(facts: Mapping[str, Json], run: Path, *, trust_code: bool = False) -> StagedModel:
    """The model of the file and function that a run's facts name.

    Raises:
        FeatureStoreError: if the file is gone, its source has changed since, or it may not run here (see `trust`).
    """
    checked = trust.check_trusted(facts, run, trust_code=trust_code)
    file, function = str(facts["file"]), str(facts["function"])
    model = _loaded(Path(file).expanduser().resolve(), function, f"{file}:{function}", checked)
    if model.origin["architecture"]["source"] != facts["source"]:
        raise FeatureStoreError(
            f"{facts['file']} has changed since the run was saved, so the saved tensors may mean another model. "
            "Restore the file as it was, or train again."
        )
    return model


def _loaded(path: Path, function: str, source: str, checked: Mapping[Path, str] | None) -> StagedModel:
    """The model of a function, called `source` by whoever asks for it; of its folder runs only what was `checked`."""
    file = source.removesuffix(f":{function}")
    with seeded(), _importable(path.parent, checked):
        module = _imported(path, checked)
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


def _imported(path: Path, checked: Mapping[Path, str] | None) -> ModuleType:
    # A name for each path and text: classes from before an edit keep the module they came from.
    text = str(path).encode("utf-8", "surrogateescape") + path.read_bytes()
    name = f"{path.stem}__{digest_bytes(text)[:8]}"
    spec = importlib.util.spec_from_file_location(name, path, loader=_FromSource(name, str(path), checked))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where inspect looks for the source of a class
    spec.loader.exec_module(module)
    return module


class _FromSource(SourceFileLoader):
    """Runs the text of a file, and that alone: bytecode beside it may be of another text."""

    def __init__(self, fullname: str, path: str, checked: Mapping[Path, str] | None) -> None:
        super().__init__(fullname, path)
        self.checked = checked

    def get_code(self, fullname: str) -> CodeType:
        path = self.get_filename(fullname)
        content = self.get_data(path)
        if self.checked is not None and trust.code_digest(content) != self.checked[Path(path)]:
            raise FeatureStoreError(f"{path} has been changed while it was loaded. Restore the file as it was.")
        code: CodeType = self.source_to_code(content, path)
        return code


class _Beside:
    """Finds the modules that lie in a folder; where files were checked, no others, whatever Python could run there."""

    def __init__(self, folder: Path, checked: Mapping[Path, str] | None) -> None:
        self.folder, self.checked = folder, checked

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        place = self.folder.joinpath(*fullname.split(".")[:-1])
        if path is not None and str(place) not in path:
            return None  # of a package that lies elsewhere
        loader = partial(_FromSource, checked=self.checked)
        own = FileFinder(str(place), (loader, [".py"])).find_spec(fullname)  # type: ignore[arg-type]
        is_module = own is not None and own.loader is not None
        if self.checked is None:
            return own if is_module else None
        if own is not None and own.origin is not None and Path(own.origin) in self.checked:
            return own
        other = PathFinder.find_spec(fullname, path)
        file = None if other is None or not other.has_location else Path(str(other.origin))
        if file is not None and file.parent not in (place, place / fullname.rpartition(".")[2]):
            return other  # a library's
        if is_module and own is not None:
            file = Path(str(own.origin))
        if file is None:
            return other or own  # a folder without __init__.py, or nothing
        raise FeatureStoreError(
            f"{file} would run, and no import statement of the file that was checked leads to it, so nothing shows "
            "that it is what it was. Nothing of it was run. If you have read it and trust it: --trust-code (in Python: "
            "trust_code=True)."
        )


@contextmanager
def _importable(folder: Path, checked: Mapping[Path, str] | None) -> Iterator[None]:
    path, writes, finder = list(sys.path), sys.dont_write_bytecode, _Beside(folder, checked)
    if checked is None:
        sys.path.insert(0, str(folder))  # for what is no Python text
    place = next((index for index, each in enumerate(sys.meta_path) if each is PathFinder), len(sys.meta_path))
    sys.meta_path.insert(place, finder)
    sys.dont_write_bytecode = True  # it is keyed by whole seconds: an edit within one would go unseen
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path[:], sys.dont_write_bytecode = path, writes
        sys.meta_path.remove(finder)
