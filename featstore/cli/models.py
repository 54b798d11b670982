"""Flags of backbones that both programs share, and the models that they stand for."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from featstore.errors import WeightsError
from featstore.models.names import PIXELS, WEIGHTS_SUFFIXES, no_weights_file
from featstore.words import counted

if TYPE_CHECKING:
    from featstore.models.staged import StagedModel


PrefixOption = Annotated[
    str | None,
    typer.Option(metavar="TEXT", help="What tensors' names begin with in a file of several networks, such as teacher."),
]


@dataclass(frozen=True, kw_only=True)
class ModelFlags:
    """Which backbone, with which weights."""

    backbone: Annotated[
        str,
        typer.Option(
            metavar="NAME|FILE.py:FN|RUN_DIR", help="A name (featstore backbones), your own function, or a saved run."
        ),
    ]
    weights: Annotated[
        str | None,
        typer.Option(
            metavar="DEFAULT|ENUM|none|FILE",
            help="Weights; none: a seeded initialisation.",
            show_default="DEFAULT for a name, else its own",
        ),
    ] = None
    weights_prefix: PrefixOption = None

    def __post_init__(self) -> None:
        _check_file(self.weights)

    def model(self, cuts: Sequence[str] = (), *, trust_code: bool = False) -> StagedModel:
        """The model, see `load_model`."""
        return load_model(self.backbone, self.weights, cuts, weights_prefix=self.weights_prefix, trust_code=trust_code)


@dataclass(frozen=True, kw_only=True)
class ModelsFlags:
    """Which backbones, with which weights."""

    backbone: Annotated[
        list[str],
        typer.Option(
            metavar="NAME|FILE.py:FN|RUN_DIR",
            help="A name (featstore backbones), your own function, or a saved run. May be given again: images are "
            "decoded once for all.",
        ),
    ]
    weights: Annotated[
        list[str] | None,
        typer.Option(
            metavar="DEFAULT|ENUM|none|FILE",
            help="Weights; none: a seeded initialisation. Of several backbones once for each, in their order.",
            show_default="DEFAULT for a name, else its own",
        ),
    ] = None
    weights_prefix: PrefixOption = None

    def __post_init__(self) -> None:
        num_models, num_weights = len(self.backbone), len(self.weights or [])
        if num_weights not in (0, num_models):
            raise ValueError(
                f"--weights is given {counted(num_weights, 'time')} and --backbone {counted(num_models, 'time')}. "
                "Expected one for each, in the same order, or none at all. DEFAULT stands for a name's usual weights."
            )
        if self.weights_prefix is not None and num_models > 1:
            raise ValueError(
                f"--weights-prefix {self.weights_prefix} is given beside {num_models} backbones, which have a file of "
                "weights each. Expected one backbone. Extract the others without it: features of several jobs lie in "
                "one store."
            )
        for each in self.weights or []:
            _check_file(each)

    def models(
        self, cuts: Sequence[str] = (), *, trust_code: bool = False
    ) -> list[tuple[StagedModel, list[str] | None]]:
        """Each model with those of `cuts` that it has; None where none is named. See `load_model`.

        Raises:
            ValueError: also for a cut that none of them has, and for a model that has none of the cuts.
        """
        weights: list[str | None] = list(self.weights) if self.weights else [None] * len(self.backbone)
        given = list(zip(self.backbone, weights, strict=True))
        own = [list(cuts) if len(given) == 1 else _own_cuts(source, cuts, trust_code=trust_code) for source, _ in given]
        unknown = [cut for cut in cuts if not any(cut in each for each in own)]
        if unknown:
            raise ValueError(
                f"--cut {unknown[0]}: {' and '.join(self.backbone)} have no such cut. Expected one that some of them "
                f"has. See: featstore backbones {self.backbone[0]}"
            )
        for (source, _), found in zip(given, own, strict=True):
            if {*cuts} - {PIXELS} and not {*found} - {PIXELS}:
                raise ValueError(
                    f"{source} has none of the cuts {', '.join(cuts)}. Expected one for each backbone, or none at all "
                    f"for their default cuts. See: featstore backbones {source}"
                )
        return [
            (
                load_model(source, each, found, weights_prefix=self.weights_prefix, trust_code=trust_code),
                found or None,
            )
            for (source, each), found in zip(given, own, strict=True)
        ]


def _own_cuts(source: str, cuts: Sequence[str], *, trust_code: bool) -> list[str]:
    """Those of `cuts` that a backbone has."""
    from featstore.models.backbones import backbone, is_named, outline

    if not cuts:
        return []
    with redirect_stdout(sys.stderr):
        skeleton = outline(source) if is_named(source) else backbone(source, trust_code=trust_code)
    return [cut for cut in cuts if _has(skeleton, cut.partition(":")[0])]


def _has(model: StagedModel, cut: str) -> bool:
    if cut == PIXELS:  # which each model is given
        return True
    try:
        model.canonical(cut)
    except ValueError:
        return False
    return True


def _check_file(weights: str | None) -> None:
    path = Path(weights or "").expanduser()
    if path.suffix in WEIGHTS_SUFFIXES and not path.is_file():  # said before anything is loaded
        raise WeightsError(no_weights_file(path))


def load_model(
    source: str,
    weights: str | None,
    cuts: Sequence[str] = (),
    *,
    weights_prefix: str | None = None,
    trust_code: bool = False,
) -> StagedModel:
    """`backbone(source, weights)` whose tensors fit up to the deepest of `cuts` (``CUT`` or ``CUT:REDUCTION``).

    Raises:
        ValueError: for an unknown backbone or cut; of a named backbone before any weights are read.
    """
    from featstore.models.backbones import backbone, is_named, outline

    names = [name for name in (cut.partition(":")[0] for cut in cuts) if name != PIXELS]
    with redirect_stdout(sys.stderr):  # torch.hub announces its downloads there, and a person's file may print
        if is_named(source):
            skeleton = outline(source)
        elif names and weights is not None:
            skeleton = backbone(source, trust_code=trust_code)
        else:
            return backbone(source, weights, weights_prefix=weights_prefix, trust_code=trust_code)
        deepest = max(names, key=skeleton.index, default=None)
        return backbone(source, weights, cut=deepest, weights_prefix=weights_prefix, trust_code=trust_code)
