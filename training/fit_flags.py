"""Flags of a fit: how it is done and how long it takes, for the commands that train."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from featstore.cli.program import one_of
from training import choices, schedules

if TYPE_CHECKING:
    from training.plan import FitOptions


@dataclass(frozen=True, kw_only=True)
class FitOptionFlags:
    """How a fit is done."""

    schedule: Annotated[
        str | None,
        typer.Option(
            metavar="|".join(schedules.SCHEDULES),
            help="How the learning rate goes.",
            show_default="one_cycle; with --cycles cosine",
        ),
    ] = None
    weight_decay: Annotated[float, typer.Option(min=0, metavar="N", help="Of every parameter.")] = 0.01
    keep: Annotated[str, typer.Option(metavar="|".join(choices.KEEP), help="The epoch whose weights remain.")] = "best"

    def __post_init__(self) -> None:
        self.options()

    def options(self) -> FitOptions:
        """As options of a fit; what isn't asked for is left to it.

        Raises:
            ValueError: for a word that is none of a flag's.
        """
        options: FitOptions = {"weight_decay": self.weight_decay, "keep": one_of("--keep", self.keep, choices.KEEP)}
        if self.schedule is not None:
            options["schedule"] = one_of("--schedule", self.schedule, [*schedules.SCHEDULES])
        return options


@dataclass(frozen=True, kw_only=True)
class LengthFlags:
    """How long a fit is."""

    epochs: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="Epochs; see below for their passes.", show_default="head: 10, without --cycles"
        ),
    ] = None
    cycles: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="In place of --epochs: times that the rate starts anew (SGDR)."),
    ] = None
    cycle_len: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Epochs of the first cycle.", show_default="1")
    ] = None
    cycle_mult: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Times so long as the one before is each later cycle.", show_default="1"),
    ] = None
    snapshots: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="A run is saved there at the end of each cycle, for predict to average."),
    ] = None

    def __post_init__(self) -> None:
        if self.cycles is not None and self.epochs is not None:
            raise ValueError(
                f"--epochs {self.epochs} and --cycles {self.cycles} both say how long to train. Expected one of them. "
                "Leave out --epochs: cycles have --cycle-len of them, each next one --cycle-mult times as many."
            )
        for name in ("cycle_len", "cycle_mult", "snapshots"):
            if self.cycles is None and getattr(self, name) is not None:
                flag = f"--{name.replace('_', '-')}"
                raise ValueError(
                    f"{flag} is of cycles, and there are none. Give their number: --cycles 3; or no {flag}."
                )

    def arguments(self) -> dict[str, Any]:
        """As arguments of `train_head` and `finetune`."""
        return {
            "epochs": self.epochs,
            "cycles": self.cycles,
            "cycle_len": self.cycle_len or 1,
            "cycle_mult": self.cycle_mult or 1,
            "snapshot": self.snapshots,
        }
