"""Head flags: groups that several commands share: which head, on what, and which files show what was found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from featstore.cli.models import load_model
from featstore.cli.program import one_of
from featstore.models.names import REDUCTIONS
from training import choices
from training.cli.run_commands import FileFlags

if TYPE_CHECKING:
    from featstore.models.staged import StagedModel

_PICTURES = (".png", ".svg", ".pdf")

LeakOption = Annotated[
    bool, typer.Option("--allow-leak", help="Score also images that a backbone from a run was trained on.")
]


@dataclass(frozen=True, kw_only=True)
class ReduceFlags:
    """How a head's activations are reduced."""

    reduce: Annotated[str, typer.Option(metavar="|".join(("auto", *REDUCTIONS)), help="Reduction at the cut.")] = "auto"

    def __post_init__(self) -> None:
        one_of("--reduce", self.reduce, ("auto", *REDUCTIONS))


@dataclass(frozen=True, kw_only=True)
class HeadFlags(ReduceFlags):
    """Which new head, on activations reduced how."""

    head: Annotated[str, typer.Option(metavar="|".join(choices.HEADS), help="Kind of head.")] = "concat"

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("--head", self.head.partition(":")[0], choices.HEADS)

    def options(self) -> dict[str, Any]:
        """As arguments of `Learner`."""
        return {"reduce": self.reduce, "head": self.head}


@dataclass(frozen=True, kw_only=True)
class StartFlags:
    """What is trained: a saved run, or a backbone."""

    start: Annotated[
        str | None, typer.Option("--from", metavar="RUN_DIR", help="A saved run to go on with; or --backbone.")
    ] = None
    backbone: Annotated[
        str | None, typer.Option(metavar="NAME|FILE.py:FN|RUN_DIR", help="A backbone that gets a new head; or --from.")
    ] = None
    weights: Annotated[str | None, typer.Option(metavar="DEFAULT|ENUM|none|FILE", help="Weights of --backbone.")] = None
    weights_prefix: Annotated[
        str | None, typer.Option(metavar="TEXT", help="What names begin with in a file of several networks.")
    ] = None

    def check(self) -> None:
        """Raises ValueError unless one of the two is given."""
        if (self.start is None) == (self.backbone is None):
            raise ValueError("Give either --from RUN_DIR, to go on with a saved run, or --backbone, for a new head.")

    def model(self, cuts: list[str], *, trust_code: bool) -> StagedModel:
        """The backbone, for training at `cuts`."""
        assert self.backbone is not None
        return load_model(self.backbone, self.weights, cuts, weights_prefix=self.weights_prefix, trust_code=trust_code)


@dataclass(frozen=True, kw_only=True)
class PlotFlags(FileFlags):
    """Files that show what a command has found."""

    plot: Annotated[
        str | None, typer.Option(metavar="FILE.png", help="Also draw what is found (.png, .svg, .pdf).")
    ] = None
    table: Annotated[str | None, typer.Option("--csv", metavar="FILE.csv", help="Also write it as a table.")] = None

    def __post_init__(self) -> None:
        if self.plot is not None and not self.plot.lower().endswith(_PICTURES):
            raise ValueError(f"--plot is {self.plot!r}. Expected a name that ends in {', '.join(_PICTURES)}.")

    def check(self) -> None:
        """Checks that both can be written; errors as in `check_free`."""
        self.check_free(self.table, self.plot)

    def draw(self, found: Any) -> None:
        """Draws `found`, by its method `plot`, where that was asked for."""
        if self.plot is not None:
            figure = found.plot().get_figure(root=True)
            assert figure is not None
            figure.savefig(self.plot)
