"""Flags of a fit: how it is done and how long it takes, for the commands that train."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from featstore.cli.flags import parse_numbers
from featstore.cli.program import one_of
from training import choices, schedules

if TYPE_CHECKING:
    from training.loop.plan import FitOptions


MOST_EPOCHS = 1_000_000
"""What a fit takes (`settings`); that is said before anything is read or deleted."""


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
    weight_decay: Annotated[
        float, typer.Option(min=0, metavar="N", help="Of weights; of biases and norms too with --decay-norms.")
    ] = 0.01
    keep: Annotated[
        str | None,
        typer.Option(
            metavar="|".join(choices.KEEP),
            help="The epoch whose weights remain.",
            show_default="best; with --swa last",
        ),
    ] = None
    monitor: Annotated[
        str, typer.Option(metavar="NAME", help="What the best epoch is best by: a loss or metric on record.")
    ] = "valid_loss"
    patience: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Ends the fit after so many epochs in a row that weren't better."),
    ] = None
    label_smoothing: Annotated[
        float, typer.Option(min=0, max=1, metavar="N", help="Share of each target that goes to all classes alike.")
    ] = 0.0
    class_weights: Annotated[
        str | None, typer.Option(metavar="balanced|A,B,C", help="By rarity; or one a class, in their order.")
    ] = None
    clip: Annotated[float | None, typer.Option(min=0, metavar="N", help="Highest norm of a step's gradients.")] = None
    accumulate: Annotated[int, typer.Option(min=1, metavar="N", help="Batches that make a step together.")] = 1
    precision: Annotated[
        str, typer.Option(metavar="|".join(choices.PRECISIONS), help="Of training steps; scores are fp32.")
    ] = "fp32"
    ema: Annotated[
        float | None,
        typer.Option(min=0, max=1, metavar="DECAY", help="The mean of the weights over steps is scored and remains."),
    ] = None
    swa: Annotated[
        float | None,
        typer.Option(min=0, max=1, metavar="START", help="The same over the epochs after that share of them."),
    ] = None
    mixup: Annotated[
        float | None, typer.Option(min=0, metavar="ALPHA", help="Means of two images, or of their features.")
    ] = None
    cutmix: Annotated[
        float | None, typer.Option(min=0, metavar="ALPHA", help="A rectangle of another image, or of its maps.")
    ] = None
    sampling: Annotated[
        str, typer.Option(metavar="|".join(choices.SAMPLINGS), help="The images of a pass: balanced by class, or all.")
    ] = "shuffled"
    batch_norm: Annotated[
        str, typer.Option(metavar="|".join(choices.BATCH_NORMS), help="Statistics of thawed stages before the head.")
    ] = "train"
    decay_norms: Annotated[bool, typer.Option("--decay-norms", help="Decay biases and norms too.")] = False

    def __post_init__(self) -> None:
        for flag, alpha in (("--mixup", self.mixup), ("--cutmix", self.cutmix)):
            if alpha == 0:
                raise ValueError(f"{flag} is 0, which mixes nothing. Expected more than 0. Give more, or leave it out.")
        if self.clip == 0:
            raise ValueError(
                "--clip is 0, which leaves nothing of any gradient. Expected more than 0. Give more, or leave it out."
            )
        if self.ema is not None and self.swa is not None:
            raise ValueError("--ema and --swa are two means of the weights. Expected one of them. Leave out the other.")
        self._words()

    def options(self) -> FitOptions:
        """As options of a fit; what isn't asked for is left to it.

        Raises:
            ValueError: for a mean of weights that there isn't.
        """
        options = self._words()
        if self.ema is not None:
            from training.loop.averages import EMA  # torch

            options["average"] = EMA(self.ema)
        if self.swa is not None:
            from training.loop.averages import SWA

            options["average"] = SWA(self.swa)
        if self.mixup is not None or self.cutmix is not None:
            from training.mixing import BatchChange, CutMix, Mixup

            changes: list[BatchChange] = [] if self.mixup is None else [Mixup(self.mixup)]
            options["mix"] = changes if self.cutmix is None else [*changes, CutMix(self.cutmix)]
        return options

    def _words(self) -> FitOptions:
        """What of it needs no torch.

        Raises:
            ValueError: for a word that is none of a flag's.
        """
        options: FitOptions = {
            "weight_decay": self.weight_decay,
            "monitor": self.monitor,
            "patience": self.patience,
            "label_smoothing": self.label_smoothing,
            "clip": self.clip,
            "accumulate": self.accumulate,
            "sampling": one_of("--sampling", self.sampling, choices.SAMPLINGS),
            "batch_norm": one_of("--batch-norm", self.batch_norm, choices.BATCH_NORMS),
            "decay_norms": self.decay_norms,
            "precision": one_of("--precision", self.precision, choices.PRECISIONS),
        }
        if self.class_weights is not None:
            options["class_weights"] = self._class_weights(self.class_weights)
        if self.schedule is not None:
            options["schedule"] = one_of("--schedule", self.schedule, [*schedules.SCHEDULES])
        if self.keep is not None:
            options["keep"] = one_of("--keep", self.keep, choices.KEEP)
        return options

    def _class_weights(self, text: str) -> Literal["balanced"] | tuple[float, ...]:
        if text == "balanced":
            return "balanced"
        try:
            return parse_numbers(text, "--class-weights")
        except ValueError:
            raise ValueError(
                f"--class-weights is {text!r}. Expected balanced, or a number for each class in their order, such as "
                "--class-weights 1,4,2."
            ) from None


@dataclass(frozen=True, kw_only=True)
class LengthFlags:
    """How long a fit is."""

    epochs: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=MOST_EPOCHS,
            metavar="N",
            help="Epochs; see below for their passes.",
            show_default="head: 10, without --cycles",
        ),
    ] = None
    cycles: Annotated[
        int | None,
        typer.Option(
            min=1, max=MOST_EPOCHS, metavar="N", help="In place of --epochs: times that the rate starts anew (SGDR)."
        ),
    ] = None
    cycle_len: Annotated[
        int | None,
        typer.Option(min=1, max=MOST_EPOCHS, metavar="N", help="Epochs of the first cycle.", show_default="1"),
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
