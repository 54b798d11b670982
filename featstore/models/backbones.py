"""Backbones: names, files and folders -> StagedModel with weights and their preprocessing."""

from __future__ import annotations

import importlib.util
import random
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
import torchvision
from torch import nn

from featstore.digest import Json, digest_bytes
from featstore.errors import FeatureStoreError, ModelError, WeightsError
from featstore.images.views import View
from featstore.models.graph import random_states_kept
from featstore.models.runs import Run, read_run
from featstore.models.staged import StagedModel
from featstore.models.weights import fitting, read_tensors
from featstore.source_code import outdated_sources, own_files, source_digests

INITIAL_SEED = 0
"""Seed of every initialisation that stands in for weights: the same on each rank and run."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """What torchvision's own names don't say about a family of backbones."""

    names: tuple[str, ...]
    containers: tuple[str, ...] = ()
    layouts: tuple[tuple[str, str], ...] = ()
    class_tokens: int = 0
    has_fixed_size: bool = False


FAMILIES = (
    Family(names=("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")),
    Family(names=("squeezenet1_0", "squeezenet1_1"), containers=("features", "classifier")),
    Family(
        names=("vit_b_16", "vit_b_32", "vit_l_16", "vit_l_32", "vit_h_14"),
        containers=("encoder", "encoder.layers", "heads"),
        layouts=(("reshape", "NCL"),),  # patches before they are turned into tokens
        class_tokens=1,
        has_fixed_size=True,
    ),
)


def backbone_names() -> list[str]:
    """All names that `backbone` knows, in the order of their families."""
    return [name for family in FAMILIES for name in family.names]


def backbone(
    source: str | Path | nn.Module, weights: str | Path | None = None, *, cut: str | None = None
) -> StagedModel:
    """The staged model that `source` names, with its weights and the view that belongs to them.

    Args:
        source: a name of `backbone_names()`; ``path/to/file.py:function``, called without arguments under a fixed seed
            and returning an `nn.Module` or a `StagedModel`; the folder of a saved run; or a module itself.
        weights: ``DEFAULT`` or another name of torchvision's weights; a local file (``.safetensors``, or what
            ``torch.load(weights_only=True)`` reads); ``none`` for a seeded initialisation. Default: ``DEFAULT`` for a
            name; what it returns for a function or module; its own for a run.
        cut: the last cut that will be used, if it lies before the default cut: tensors of a weights file must fit up
            to there. Stages behind it that a file doesn't fit are left out of the model.

    Raises:
        ValueError: for a name that isn't known; the message lists the names.
        WeightsError: for weights that are absent or don't fit; a file can't be told from another model's by shape
            alone, so surplus tensors inside the trunk are refused too.
        ModelError: for a model that can't be traced or keyed.
    """
    if isinstance(source, nn.Module):
        model = source if isinstance(source, StagedModel) else StagedModel.from_module(source)
        return model if weights is None or str(weights) == "none" else _with_file(model, weights, cut)
    text = str(source)
    if text in backbone_names():
        return _named(text, "DEFAULT" if weights is None else weights, cut)
    if ".py:" in text:
        return _from_file(text, weights, cut)
    if Path(text).is_dir():
        return _from_run(Path(text), weights)
    raise ValueError(
        f"{text!r} is no backbone. Expected one of {', '.join(backbone_names())}; a function in your own file "
        "(path/to/file.py:make_model); or the folder of a saved run."
    )


def outline(name: str) -> StagedModel:
    """The staged model of a name without any weights, on the meta device: for its cuts, shapes and sizes."""
    if name not in backbone_names():
        raise ValueError(f"{name!r} is no backbone. Expected one of {', '.join(backbone_names())}.")
    with torch.device("meta"), random_states_kept():
        module = torchvision.models.get_model(name, weights=None)
    return _staged(module, name, View())


def weight_names(name: str) -> list[str]:
    """Names of torchvision's weights for the backbone `name`; the one that DEFAULT stands for comes first."""
    enum = torchvision.models.get_model_weights(name)
    default = enum.DEFAULT.name
    return [default, *(member.name for member in enum if member.name != default)]


def class_names(model: StagedModel) -> tuple[str, ...] | None:
    """The class of each logit, where a model has torchvision's own weights; None where nobody knows.

    A name that stands for two of ImageNet's classes in some versions of torchvision (crane, maillot) is told apart by
    the numbers of its logits.
    """
    name, weights = model.origin.get("backbone"), model.origin.get("weights")
    if name not in backbone_names() or weights not in ("DEFAULT", *weight_names(name)):
        return None
    enum = torchvision.models.get_model_weights(name)
    names = (enum.DEFAULT if weights == "DEFAULT" else enum[weights]).meta["categories"]
    return tuple(f"{each} ({place})" if names.count(each) > 1 else each for place, each in enumerate(names))


def _named(name: str, weights: str | Path, cut: str | None) -> StagedModel:
    if str(weights) == "none":
        return _initial(name)
    enum = torchvision.models.get_model_weights(name)
    known = {"DEFAULT", *(member.name for member in enum)}
    if str(weights) in known:
        chosen = enum[str(weights)] if str(weights) != "DEFAULT" else enum.DEFAULT
        return _staged(_pretrained(name, chosen), name, View.from_preset(chosen.transforms()), weights=str(weights))
    if not _looks_like_a_file(weights):
        raise ValueError(
            f"{str(weights)!r} are no weights of {name}. Expected {', '.join(['DEFAULT', *weight_names(name)])}, none, "
            "or a file (.safetensors, .pth, .pt, .th, .bin, .ckpt)."
        )
    return _with_file(_initial(name), weights, cut)


def _initial(name: str, **arguments: Any) -> StagedModel:
    """The backbone with its seeded initialisation."""
    with _seeded():
        module = torchvision.models.get_model(name, weights=None, **arguments)
    return _staged(module, name, View())


def _pretrained(name: str, weights: Any) -> nn.Module:
    try:
        module: nn.Module = torchvision.models.get_model(name, weights=weights)
    except OSError as error:  # URLError, a time-out, a folder that can't be written
        file = Path(str(weights.url)).name
        folder = Path(torch.hub.get_dir()) / "checkpoints"
        command = f"python -c \"import torchvision.models as m; m.get_model('{name}', weights='{weights.name}')\""
        raise WeightsError(
            f"The weights {weights.name} of {name} aren't here and can't be downloaded ({error}). They are the file "
            f"{file}, which belongs into {folder}. On a machine with network, run {command} and copy the file; or give "
            '--weights FILE, or --weights none for a random initialisation (in Python: weights=FILE, weights="none").'
        ) from error
    return module


def _staged(module: nn.Module, name: str, view: View, *, weights: str = "none") -> StagedModel:
    family = next(family for family in FAMILIES if name in family.names)
    size = int(module.image_size) if family.has_fixed_size else None  # type: ignore[arg-type]
    # Some weights come for another image size than the name alone gives: vit_b_16's 384, say.
    built_by = {"name": name} if size is None else {"name": name, "image_size": size}
    if size is not None and view.size != size:
        view = view.resized(size=size)
    return StagedModel.from_module(
        module.eval(),
        view=view,
        name=name,
        layouts=dict(family.layouts),
        class_tokens=family.class_tokens,
        containers=family.containers,
        origin={"backbone": name, "weights": weights, "architecture": built_by},
        fixed_size=size,
    )


def _with_file(model: StagedModel, weights: str | Path, cut: str | None) -> StagedModel:
    """`model` with the tensors of a weights file, up to the last stage that the file fits."""
    path = Path(weights).expanduser()
    if not path.is_file():
        raise WeightsError(
            f"There is no weights file {path}. Give the path of an existing file, or --weights none for a random "
            'initialisation (in Python: weights=FILE, weights="none").'
        )
    tensors, choices = read_tensors(path)
    last_used = model.index(cut or model.default_cut)
    stages = {name: stage.tensors() for name, stage in zip(model.cut_points, model.stages, strict=True)}  # type: ignore[operator]
    fit = fitting(
        tensors, list(stages.values()), num_needed=last_used + 1, file=path, model=model.name, unused=model.unused
    )
    trimmed = model.up_to(list(stages)[fit.num_stages - 1])
    trimmed.load_tensors(fit.tensors)
    trimmed.origin = {**model.origin, "weights": str(weights)}
    trimmed.notes = (*choices, *fit.notes, *_view_note(model))
    with suppress(ModelError):  # no default cut at the view's size: with `cut` given, another size may follow
        trimmed.keep_default_cut(model.cut_points[min(model.index(model.default_cut), fit.num_stages - 1)])
    return trimmed


def _view_note(model: StagedModel) -> tuple[str, ...]:
    view = model.view
    if view != View().resized(size=view.size):  # its author chose one
        return ()
    return (
        f"a weights file carries no preprocessing: {view.resize}/{view.size} and ImageNet's mean assumed; "
        "--resize --size --mean --std --interpolation",
    )


def _from_file(text: str, weights: str | Path | None, cut: str | None) -> StagedModel:
    file, _, function = text.rpartition(":")
    path = Path(file).expanduser().resolve()
    if not path.is_file():
        raise ValueError(f"There is no file {file}. Expected path/to/file.py:function, where function makes the model.")
    with _seeded(), _importable(path.parent):
        module = _imported(path)
        _check_helpers(module, path.parent)
        make = getattr(module, function, None)
        if not callable(make):
            raise ValueError(f"{file} has no function {function}. Expected path/to/file.py:function.")
        try:
            made = make()
        except Exception as error:
            raise ModelError(f"{text} failed with {type(error).__name__}: {error}. Mend that function.") from error
    if not isinstance(made, nn.Module):
        raise ValueError(f"{text} returned a {type(made).__name__}; expected an nn.Module or a StagedModel.")
    model = made if isinstance(made, StagedModel) else StagedModel.from_module(made.eval(), name=path.stem)
    made_by = {"file": str(path), "function": function, "source": source_digests(module)}
    model.origin = {"backbone": text, "architecture": made_by}
    if weights is not None and str(weights) != "none":
        return _with_file(model, weights, cut)
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


def _from_run(folder: Path, weights: str | Path | None) -> StagedModel:
    if weights is not None:
        raise ValueError(f"{folder} is a saved run, which brings its own weights; leave out --weights {weights}.")
    run = read_run(folder)
    facts = run.facts["model"]
    if facts["architecture"] is None:
        raise FeatureStoreError(
            f"The model of {folder} was made in Python from a module without a name. Load it there, with the module: "
            f'Learner.load("{folder}", module=...).'
        )
    return restored(architecture(facts["architecture"]), run, origin=str(folder))


def architecture(facts: Mapping[str, Json]) -> StagedModel:
    """The model that a run's facts name, with whatever weights its constructor gives it.

    Raises:
        FeatureStoreError: if it comes from a file that is gone, or whose source has changed since.
    """
    if "name" in facts:
        return _initial(**facts)
    if not Path(facts["file"]).is_file():
        raise FeatureStoreError(
            f"The model was made by {facts['function']} in {facts['file']}, and that file is gone. Put it back, or "
            "give the model in Python: Learner.load(run, module=...)."
        )
    model = _from_file(f"{facts['file']}:{facts['function']}", None, None)
    if model.origin["architecture"]["source"] != facts["source"]:
        raise FeatureStoreError(
            f"{facts['file']} has changed since the run was saved, so the saved tensors may mean another model. "
            "Restore the file as it was, or train again."
        )
    return model


def restored(model: StagedModel, run: Run, *, origin: str | None = None) -> StagedModel:
    """`model` with a run's tensors and view, up to where the run's head sits.

    Raises:
        WeightsError: if the tensors don't give the digest that the run recorded.
    """
    facts = run.facts["model"]
    trunk = model.up_to(facts["cut"])
    names = trunk.tensors()
    missing = [name for name in names if name not in run.tensors]
    if missing:
        raise WeightsError(f"{origin or 'The run'} lacks the tensors {', '.join(missing[:4])} of {model.name}.")
    trunk.load_tensors({name: run.tensors[name] for name in names})
    if trunk.digest(facts["cut"]) != facts["digests"][facts["cut"]]:
        raise WeightsError(
            f"The tensors of {origin or 'the run'} don't give the model that was saved (digest "
            f"{facts['digests'][facts['cut']][:8]} expected). The run was made with another version of the library "
            "that builds the model, or its files were changed."
        )
    trunk.view = View.from_facts(facts["view"])
    trunk.keep_default_cut(facts["default_cut"])
    made_by = {"architecture": model.origin["architecture"]} if "architecture" in model.origin else {}
    # The model's own name has other weights. The folder is absolute, since the working directory may change.
    named = {} if origin is None else {"backbone": origin, "run": str(Path(origin).absolute())}
    trunk.origin = {**named, **made_by}
    return trunk


@contextmanager
def _seeded() -> Iterator[None]:
    """A fixed seed for the block; the caller's random state is put back."""
    with random_states_kept():
        random.seed(INITIAL_SEED)
        np.random.seed(INITIAL_SEED)  # noqa: NPY002 - a person's file may draw from it
        torch.default_generator.manual_seed(INITIAL_SEED)
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.manual_seed_all(INITIAL_SEED)
        yield


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


def _looks_like_a_file(weights: str | Path) -> bool:
    return isinstance(weights, Path) or Path(weights).suffix != "" or "/" in weights or Path(weights).exists()
