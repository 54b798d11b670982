"""Backbones: names, files and folders -> StagedModel with weights and their preprocessing.

A library of backbones is a module beside this one with the functions of `Library`, maybe those of `Naming` too, and a
place in `LIBRARIES`.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from inspect import isroutine
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from featstore.digest import Json
from featstore.errors import FeatureStoreError, ModelError, WeightsError
from featstore.images.views import View
from featstore.models import own_file, timm_models, torchvision_models
from featstore.models.modes import seeded
from featstore.models.names import WEIGHTS_SUFFIXES, no_weights_file
from featstore.models.runs import Run, located, read_run
from featstore.models.staged import StagedModel
from featstore.models.weights import fitting, read_tensors
from featstore.plugins import BACKBONES, plugged_in
from featstore.timing import timed


class Library(Protocol):
    """What a module that gives backbones by name must have.

    A model's `origin` holds `backbone` (its name), `weights`, and `architecture`: the facts ``{"name": ..., ...}`` from
    which `initial` makes it again. The library itself is imported inside the functions that need it.
    """

    def knows(self, name: str) -> bool:
        """Whether `name` is one of its names, none of which another library has.

        Or has their form (a prefix of its own): a name that it doesn't have is then refused by the other functions.
        """

    def names(self, pattern: str | None = None) -> Sequence[str]:
        """The names that match a shell's pattern; without one those that a list shows unasked."""

    def weight_names(self, name: str) -> Sequence[str]:
        """Names of the weights for `name`; the one that DEFAULT stands for comes first."""

    def about(self, name: str) -> dict[str, Json]:
        """What a list says of `name`, without making it: its family, `size` of images and number of `parameters`."""

    def outline(self, name: str) -> StagedModel:
        """The model without any weights, on the meta device."""

    def initial(self, name: str, **architecture: Any) -> StagedModel:
        """The model with its seeded initialisation."""

    def pretrained(self, name: str, weights: str) -> StagedModel:
        """The model with `weights`, DEFAULT or one of `weight_names`, and the view that belongs to them.

        Raises:
            WeightsError: for weights that aren't here and can't be had.
        """

    def class_names(self, name: str, weights: str) -> tuple[str, ...] | None:
        """The class of each logit of a model with those weights, where it is known; no name stands twice."""


@runtime_checkable
class Naming(Protocol):
    """What a library may have beside: what sentences say of its names, also where it isn't installed."""

    def unlisted(self) -> str | None:
        """A sentence about names that a list leaves out unasked."""

    def also_called(self, name: str) -> list[str]:
        """Its names of what somebody may mean by `name`, which no library has."""

    def twins(self, name: str) -> list[str]:
        """What networks are called elsewhere that are `name` but for their tensors' names; either may be another's."""

    def made_by(self, name: str) -> str:
        """The call that makes the module of `name`."""


LIBRARIES: dict[str, Library] = {"torchvision": torchvision_models, "timm": timm_models}
"""featstore's own, by the names that people call them by."""


def _libraries() -> Iterator[tuple[str, Library]]:
    """All that are known: featstore's own, then those of installed packages (see `plugins`), which may be broken."""
    yield from LIBRARIES.items()
    for name, plugin in plugged_in(BACKBONES).items():
        yield name, plugin.value


def _namings() -> list[Naming]:
    return [library for _, library in _libraries() if isinstance(library, Naming)]


def backbone_names(pattern: str | None = None) -> list[str]:
    """Names that `backbone` knows, library by library, in the order of their families.

    Args:
        pattern: of a shell, such as ``resnet*``; ``timm:*resnet*`` for those of timm, which has too many for a list
            of all and is asked for no other pattern.
    """
    return [name for _, library in _libraries() for name in library.names(pattern)]


def unlisted() -> list[str]:
    """A sentence for each library whose names a list leaves out unasked."""
    return [sentence for naming in _namings() if (sentence := naming.unlisted())]


def is_named(source: str) -> bool:
    """Whether a library gives the backbone `source` by its name."""
    return _library_of(source) is not None


def backbone(
    source: str | Path | nn.Module | Callable[[], nn.Module],
    weights: str | Path | None = None,
    *,
    cut: str | None = None,
    weights_prefix: str | None = None,
    trust_code: bool = False,
) -> StagedModel:
    """The staged model that `source` names, with its weights and the view that belongs to them.

    Args:
        source: a name of `backbone_names()`; ``timm:NAME``, with a tag of weights (``timm:NAME.TAG``) or as
            ``timm:hf-hub:org/repo``; ``path/to/file.py:function``, called without arguments under a fixed seed and
            returning an `nn.Module` or a `StagedModel`; the folder of a saved run; a module itself; or a class or
            function that makes one, called as one in a file.
        weights: ``DEFAULT`` or another name of its library's weights; a local file (``.safetensors``, or what
            ``torch.load(weights_only=True)`` reads); ``none`` for a seeded initialisation. Default: ``DEFAULT`` for a
            name; what it returns for a function or module; its own for a run.
        cut: the last cut that will be used, if it lies before the default cut: tensors of a weights file must fit up
            to there. Stages behind it that a file doesn't fit are left out of the model.
        weights_prefix: what the names of the tensors in a weights file begin with, where it holds several networks.
        trust_code: lets a saved run whose model comes from somebody's file run that file (see `models.trust`).

    Raises:
        ValueError: for a name that isn't known; the message lists the names.
        WeightsError: for weights that are absent or don't fit; a file can't be told from another model's by shape
            alone, so surplus tensors inside the trunk are refused too.
        ModelError: for a model that can't be traced or keyed.
    """
    if not isinstance(source, str | Path):
        model = _made(source)
        return model if weights is None or str(weights) == "none" else _with_file(model, weights, cut, weights_prefix)
    text = str(source)
    library = _library_of(text)
    if library is not None:
        return _named(library, text, "DEFAULT" if weights is None else weights, cut, weights_prefix)
    if own_file.is_own_file(text):
        model = own_file.load(text)
        return model if weights is None or str(weights) == "none" else _with_file(model, weights, cut, weights_prefix)
    if located(Path(text)).is_dir():
        return _from_run(Path(text), weights, trust_code=trust_code)
    raise ValueError(
        f"{_no_backbone(text)}; a function in your own file (path/to/file.py:make_model); or the folder of a saved run."
    )


def outline(name: str) -> StagedModel:
    """The staged model of a name without any weights, on the meta device: for its cuts, shapes and sizes."""
    return _known_library(name).outline(name)


def weight_names(name: str) -> list[str]:
    """Names of the weights for the backbone `name`; the one that DEFAULT stands for comes first."""
    return list(_known_library(name).weight_names(name))


def about(name: str) -> dict[str, Json]:
    """What a list says of the backbone `name`, without making it.

    Its `name`, `family`, `size` of images and number of `parameters` with its default weights, and all its `weights`.
    """
    return {"name": name, **_known_library(name).about(name), "weights": weight_names(name)}


def class_names(model: StagedModel) -> tuple[str, ...] | None:
    """The class of each logit, where a model has a library's own weights; None where nobody knows."""
    library, weights = _library_of(str(model.origin.get("backbone"))), model.origin.get("weights")
    name = str(model.origin.get("backbone"))
    if library is None or weights not in ("DEFAULT", *library.weight_names(name)):
        return None
    return library.class_names(name, str(weights))


def architecture(facts: Mapping[str, Json], run: Path, *, trust_code: bool = False) -> StagedModel:
    """The model that the facts of `run` name, with whatever weights its constructor gives it.

    Raises:
        FeatureStoreError: if it comes from a file that is gone, whose source has changed since, or that may not run
            here (see `trust`).
    """
    if "name" in facts:
        return _known_library(facts["name"]).initial(**facts)
    return own_file.made_again(facts, run, trust_code=trust_code)


def restored(model: StagedModel, run: Run, *, origin: str | None = None) -> StagedModel:
    """`model` with a run's tensors and view, up to where the run's head sits.

    Raises:
        WeightsError: if the tensors don't give the digest that the run recorded.
    """
    facts = run.facts["model"]
    made_by = {"architecture": model.origin["architecture"]} if "architecture" in model.origin else {}
    # The model's own name has other weights. The folder is absolute, since the working directory may change.
    named = (
        {}
        if origin is None
        else {"backbone": origin, "run": str(Path(origin).absolute()), "run_identity": run.identity}
    )
    trunk = model.up_to(facts["cut"]).with_(
        view=View.from_facts(facts["view"]), origin={**named, **made_by}, default_cut=facts["default_cut"]
    )
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
    return trunk


def _library_of(name: str) -> Library | None:
    return _called_by(name)[1]


def _called_by(name: str) -> tuple[str | None, Library | None]:
    """The library that has `name`, behind what people call it."""
    return next((called for called in _libraries() if called[1].knows(name)), (None, None))


def _known_library(name: str) -> Library:
    library = _library_of(name)
    if library is None:
        raise ValueError(f"{_no_backbone(name)}.")
    return library


def _made(source: nn.Module | Callable[[], nn.Module]) -> StagedModel:
    """The model of a module, or of the module that a class or function makes."""
    made: Any = source
    if isinstance(source, type | partial) or isroutine(source):
        call = f"{getattr(source, '__name__', 'partial')}()"
        try:
            with seeded():
                made = source()
        except Exception as error:
            raise ModelError(
                f"{call} failed with {type(error).__name__}: {error}. Make the module yourself and hand it over."
            ) from error
        if not isinstance(made, nn.Module):
            raise TypeError(f"{call} made a {type(made).__name__}; expected an nn.Module or a StagedModel.")
        if not isinstance(made, StagedModel):
            made.eval()
    return made if isinstance(made, StagedModel) else StagedModel.from_module(made)


def _no_backbone(name: str) -> str:
    names = backbone_names()
    also = [each for naming in _namings() for each in naming.also_called(name)]
    close = [*also, *difflib.get_close_matches(name, names)]
    return (
        f"{name!r} is no backbone. Expected {''.join(f'{each}, ' for each in close)}{'or ' if close else ''}one of the "
        f"{len(names)} names that featstore backbones lists (in Python: backbone_names())"
    )


def _named(library: Library, name: str, weights: str | Path, cut: str | None, prefix: str | None) -> StagedModel:
    if str(weights) == "none":
        return library.initial(name)
    known = library.weight_names(name)
    if str(weights) in {"DEFAULT", *known}:
        return library.pretrained(name, str(weights))
    if not _looks_like_a_file(weights):
        raise ValueError(
            f"{str(weights)!r} are no weights of {name}. Expected {', '.join(['DEFAULT', *known])}, none, or a file "
            f"({', '.join(WEIGHTS_SUFFIXES)})."
        )
    return _with_file(library.initial(name), weights, cut, prefix)


def _with_file(model: StagedModel, weights: str | Path, cut: str | None, prefix: str | None) -> StagedModel:
    """`model` with the tensors of a weights file, up to the last stage that the file fits."""
    path = Path(weights).expanduser()
    if not path.is_file():
        raise WeightsError(no_weights_file(path))
    with timed("load"):
        tensors, choices = read_tensors(path)
    last_used = model.index(cut or model.default_cut)
    stages = {name: stage.tensors() for name, stage in zip(model.cut_points, model.ordered, strict=True)}
    try:
        fit = fitting(
            tensors,
            list(stages.values()),
            num_needed=last_used + 1,
            file=path,
            model=model.name,
            unused=model.unused,
            other_names=model.other_names,
            prefix=prefix,
        )
    except WeightsError as error:
        if (naming := _other_naming(model, tensors, path)) is not None:
            raise WeightsError(naming) from error
        raise
    default = None
    with suppress(ModelError):  # no default cut at the view's size: with `cut` given, another size may follow
        default = model.cut_points[min(model.index(model.default_cut), fit.num_stages - 1)]
    trimmed = model.up_to(list(stages)[fit.num_stages - 1]).with_(
        origin={
            **model.origin,
            "weights": str(weights),
            **({} if prefix is None else {"weights_prefix": prefix}),
        },
        notes=(*model.notes, *choices, *fit.notes, *view_note(model)),
        default_cut=default,
    )
    with timed("load"):
        trimmed.load_tensors(fit.tensors)
    return trimmed


def _other_naming(model: StagedModel, tensors: Mapping[str, Tensor], path: Path) -> str | None:
    """What to say of a file whose tensors would fit `model` under other names; None where they wouldn't."""
    name = str(model.origin.get("backbone"))
    mine, library = _called_by(name)
    for twin in (twin for naming in _namings() for twin in naming.twins(name)):
        with suppress(FeatureStoreError, ValueError):  # timm isn't installed, or has no such model any more
            other = outline(twin)
            needed = other.index(other.default_cut) + 1
            stages = [stage.tensors() for stage in other.ordered]
            fitting(
                tensors,
                stages,
                num_needed=needed,
                file=path,
                model=twin,
                unused=other.unused,
                other_names=other.other_names,
            )
            theirs, _ = _called_by(twin)
            return (
                f"The tensors in {path} have {theirs}'s names ({next(iter(tensors))}), not {mine}'s: they fit {twin}. "
                f"Give --backbone {twin}, or weights of {mine}'s for {name}."
            )
    first = next(iter(model.tensors()), "")
    if _shapes(tensors) != _shapes(model.tensors()) or any(f".{each}".endswith(f".{first}") for each in tensors):
        return None  # another network, or this one's names with something else that is wrong
    made = library.made_by(name) if isinstance(library, Naming) else "the module that they are for"
    return (
        f"The {len(tensors)} tensors in {path} have the shapes of {model.name}'s, under other names "
        f"({next(iter(tensors))}, expected {next(iter(model.tensors()))}): which is which would be a guess. If they "
        "are that network's in the same order, save them under its names: torch.save(dict(zip(module.state_dict(), "
        f"tensors.values(), strict=True)), 'renamed.pth'), where module is {made} and tensors is "
        f"torch.load({str(path)!r}, weights_only=True)."
    )


def _shapes(tensors: Mapping[str, Tensor]) -> list[tuple[int, ...]]:
    return sorted(tuple(each.shape) for each in tensors.values() if each.ndim)  # without counters


_VIEW_FLAGS = ("resize", "size", "mean", "std", "interpolation")


def view_note(model: StagedModel, view: View | None = None, given: Collection[str] = ()) -> tuple[str, ...]:
    """What is assumed of the images where nobody has said it: a library's own weights' view, or the usual one.

    Args:
        model: with the tensors of a weights file.
        view: what images then get; default: the model's own.
        given: the fields of it that somebody has said.
    """
    own = model.view
    is_usual = own == View(channels=own.channels).resized(size=own.size)
    if not is_usual and _library_of(str(model.origin.get("backbone"))) is None:  # its author chose one
        return ()
    view = view or own
    assumed = [] if {"resize", "size"} <= {*given} else [f"{view.resize}/{view.size}"]
    if "interpolation" not in given and view.interpolation != View.interpolation:
        assumed.append(view.interpolation)
    if not {"mean", "std"} <= {*given}:
        usual = f"mean {' '.join(f'{each:g}' for each in dict.fromkeys(view.mean))}"
        assumed.append("ImageNet's mean" if view.mean == View.mean else usual)
    if not assumed:
        return ()
    *others, last = assumed
    words = f"{', '.join(others)}{',' * (len(others) > 1)} and {last}" if others else last
    flags = " ".join(f"--{name}" for name in _VIEW_FLAGS if name not in given)
    return (f"a weights file carries no preprocessing: {words} assumed; {flags}",)


def _from_run(folder: Path, weights: str | Path | None, *, trust_code: bool) -> StagedModel:
    if weights is not None:
        raise ValueError(f"{folder} is a saved run, which brings its own weights; leave out --weights {weights}.")
    with timed("load"):
        run = read_run(folder)
    facts = run.facts["model"]
    if facts["architecture"] is None:
        raise FeatureStoreError(
            f"The model of {folder} was made in Python from a module without a name. Load it there, with the module: "
            f'Learner.load("{folder}", module=...).'
        )
    return restored(architecture(facts["architecture"], folder, trust_code=trust_code), run, origin=str(folder))


def _looks_like_a_file(weights: str | Path) -> bool:
    return isinstance(weights, Path) or Path(weights).suffix != "" or "/" in weights or Path(weights).exists()
