"""The command `sweep`: many settings of a head tried on stored features, and the best of them saved as a run."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from featstore.cli.flags import AugmentFlags, ImageFlags, OutputFlags, StoreOption, ViewFlags, open_store, spread
from featstore.cli.models import ModelsFlags
from featstore.cli.program import one_of, show, show_json, tell_all
from featstore.remedies import Command
from training import choices
from training.cli.asked import asked_view, for_run, labelled
from training.cli.head_flags import HeadFlags
from training.cli.run_commands import FitFlags

_NUMBERS = ("lr", "dropout", "weight_decay", "label_smoothing", "clip")
_TRUTHS = {"true": True, "false": False}
_WHOLE = ("epochs", "batch_size", "seed", "queries", "patience", "accumulate")


@dataclass(frozen=True, kw_only=True)
class SweepAugmentFlags(AugmentFlags):
    """Those of the augmentation of all settings; the seeds may be of augmentations among the settings alone."""

    def __post_init__(self) -> None:
        if self.augment is not None:
            super().__post_init__()

    def check(self, values: Mapping[str, Any]) -> None:
        """Checks that seeds are of an augmentation, of all settings or among `values`."""
        if "augment" not in values:
            super().__post_init__()


@spread
def sweep(
    context: typer.Context,
    images: ImageFlags,
    store: StoreOption,
    model: ModelsFlags,
    view: ViewFlags,
    augment: SweepAugmentFlags,
    how: FitFlags,
    head: HeadFlags,
    output: OutputFlags,
    out: Annotated[str, typer.Option(metavar="DIR", help="Folder of the sweep: each finished setting, and the best.")],
    given: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=A,B,...",
            help="Values to try: lr=1e-3,3e-3, head=linear,mlp, hidden=512,256+128, mix=none,mixup:0.4, "
            "augment=none,flip as --augment has them (with --seeds); with --sample also a range, dropout=0..0.5, by "
            "logarithms lr=1e-4..1e-1:log. May be given again.",
        ),
    ] = None,
    settings: Annotated[
        str | None,
        typer.Option(
            metavar="FILE.toml", help="The same as a file: NAME = [A, B], or NAME = {low = A, high = B, log = true}."
        ),
    ] = None,
    sample: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="So many drawn, in place of all combinations.")
    ] = None,
    sobol: Annotated[bool, typer.Option("--sobol", help="Drawn by a Sobol sequence, which leaves fewer gaps.")] = False,
    sample_seed: Annotated[int, typer.Option(min=0, metavar="N", help="Of the draws.")] = 0,
    halving: Annotated[
        int | None, typer.Option(min=2, metavar="N", help="Drop settings early: one of N goes on from each rung.")
    ] = None,
    folds: Annotated[
        int | None, typer.Option(min=2, metavar="K", help="Score by K folds: each image is held out once.")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, metavar="N", help="Score by the mean over N seeds.")] = 1,
    epochs: Annotated[int, typer.Option(min=1, metavar="N", help="Of each setting that doesn't say them.")] = 10,
    monitor: Annotated[
        str | None, typer.Option(metavar="NAME", help="What is best by.", show_default="accuracy, map or mae")
    ] = None,
    cut: Annotated[
        str | None, typer.Option("--cut", metavar="CUT", help="Where the head sits.", show_default="the default cut")
    ] = None,
    extract: Annotated[bool, typer.Option("--extract", help="Compute features that are missing.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a sweep that was interrupted.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Begin anew in the place of a sweep there.")] = False,
    shard: Annotated[
        str | None,
        typer.Option(
            metavar="i/n|slurm|torchrun", help="Try this share of the settings alone, in a folder that all share."
        ),
    ] = None,
    engine: Annotated[
        str, typer.Option(metavar="local|ray", help="What tries them: this process, or tasks of a Ray cluster.")
    ] = "local",
    actors: Annotated[int | None, typer.Option(min=1, metavar="N", help="Of Ray: shares.", show_default=False)] = None,
    ray_address: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="Of Ray's cluster; else one on this machine.")
    ] = None,
) -> None:
    """Try many settings of a head on stored features; those of like shape train together."""
    values = {**(_read(settings) if settings is not None else {}), **_joined(map(_values, given or ()))}
    if not values:
        raise ValueError("There is nothing to try. Give values: --set lr=1e-3,3e-3 --set head=linear,mlp.")
    augment.check(values)
    if sample is None and (sobol or sample_seed):
        raise ValueError("--sobol and --sample-seed are of a sample. Give its size: --sample 32.")
    one_of("--engine", engine, ("local", "ray"))
    if (engine == "ray") != (actors is not None) or (engine == "ray" and shard is not None):
        raise ValueError("--engine ray goes with --actors N, the number of shares, and without --shard. Give both.")
    if overwrite and resume:
        raise ValueError("--resume goes on with a sweep, and --overwrite deletes it. Leave out one of them.")
    if overwrite and engine == "ray":
        raise ValueError(
            "Each share would delete what the others have done. Leave out --overwrite, and delete the folder."
        )
    if engine == "ray" and halving is not None:
        raise ValueError("--halving compares all settings, and shares of Ray can't. Leave out one of them.")
    from featstore.extraction.shards import shard_of  # numpy

    text = "torchrun" if shard is None and int(os.environ.get("WORLD_SIZE", "1")) > 1 else shard

    share = None if text is None else shard_of(text, os.environ, flag="--shard")
    ranges = [name for name, each in values.items() if isinstance(each, Mapping)]
    if sample is None and ranges:
        name = ranges[0]
        raise ValueError(
            f"{name} is a range, which has no end of values. Give some of them, --set {name}=A,B, or draw from the "
            "range: --sample 20."
        )
    if isinstance(values.get("average"), list):
        values["average"] = [_average(each) for each in values["average"]]
    if actors is not None:
        from featstore.extraction.ray_actors import Ray
        from training.experiments.ray_shares import run_shares

        run_shares(_again(context), Ray(actors=actors, address=ray_address))
        resume = True  # what is left to do here is the table
    feature_store = open_store(store)
    asked = labelled(images, for_new_head=True)
    from featstore.images.origins import made_by
    from training.experiments.grid import Grid, Sample
    from training.experiments.sweeps import sweep as swept  # torch

    chosen = {name: _made(name, each, augment.seeds) for name, each in values.items()}
    tried = Grid(chosen) if sample is None else Sample(chosen, sample, "sobol" if sobol else "random", sample_seed)
    tried.settings()  # what is wrong with them is said before a model is made
    cuts = [*dict.fromkeys(filter(None, [cut, *(each for each in chosen.get("cut", ()) if isinstance(each, str))]))]
    models = [each for each, _ in model.models(cuts, trust_code=how.trust_code)]
    asked = for_run(models[0].origin.get("run"), images, asked)
    tell_all([*(asked.notes if folds is None else asked.about), *view.notes(models[0])])
    options: dict[str, Any] = {
        "cut": cut,
        **head.options(),
        "epochs": epochs,
        "augment": augment.augmentation(),
        "on_missing": "extract" if extract else "error",
        **how.options(),
    }
    if len(models) == 1:
        options["view"] = asked_view(models[0], feature_store, view, None)
    else:  # each has a view of its own, which flags change
        models = [each.with_(view=view.view(each.view)) for each in models]
    found = swept(
        models[0] if len(models) == 1 else dict(zip(model.backbone, models, strict=True)),
        asked.images,
        feature_store,
        tried,
        folds=folds,
        repeats=repeats,
        halving=halving,
        monitor=monitor,
        out=out,
        resume=resume or share is not None,
        overwrite=overwrite,
        shard=(0, 1) if share is None else (share.index, share.count),
        **options,
    )
    run = Path(out) / choices.BEST
    is_scored = bool(found.members) and found.members[0].failure is None
    if is_scored and not found.num_missing:
        learn = found.best()
        learn.quiet = True
        learn.save(run, overwrite=True)
    if output.json:
        show_json({"settings": found.table, "foot": found.foot, "best": str(run) if run.exists() else None})
    else:
        show(repr(found))
    if not is_scored and not found.num_missing:
        found.best()  # which refuses, and says why
    if output.json:
        return
    if found.num_missing:
        show("The share that ends last shows the whole table, and saves the best.")
    elif is_scored:
        origin = made_by(asked.images)
        flags = ["--images", images.images] if origin is None else origin.flags(asked.images)
        words = ["finetune", *flags, "--from", str(run), "--epochs", "5", "--lr", "1e-5,1e-3", "--out", f"{out}-tuned"]
        show(f"The best is a run, to go on with: {Command('featstore-train', *words)}")


def _again(context: typer.Context) -> list[str]:
    """The command as it was given, for its shares."""
    words = ["sweep"]
    for each in context.command.params:
        name = max(getattr(each, "opts", ()), key=len, default="")
        value = context.params.get(each.name or "")
        source = context.get_parameter_source(each.name or "")
        if (
            name in ("--engine", "--actors", "--ray-address", "--json")
            or source is None
            or source.name != "COMMANDLINE"
        ):
            continue
        if getattr(each, "is_flag", False):
            words += [name] if value else []
        else:
            words += [
                word for one in (value if isinstance(value, list | tuple) else [value]) for word in (name, str(one))
            ]
    return words


def _joined(given: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """What each name was given, by one flag or several."""
    found: dict[str, Any] = {}
    for name, values in given:
        if name in found and not (isinstance(values, list) and isinstance(found[name], list)):
            raise ValueError(f"--set {name} has a range and is given twice. Give one range, or values.")
        found[name] = [*found.get(name, []), *values] if isinstance(values, list) else values
    return found


def _values(text: str) -> tuple[str, Any]:
    """Name and values of one ``--set``."""
    name, equals, rest = text.partition("=")
    name = name.replace("-", "_")
    if not equals or not rest:
        raise ValueError(f"--set is {text!r}. Expected a name and its values, such as --set lr=1e-3,3e-3.")
    low, dots, high = rest.partition("..")
    if dots:
        high, _, log = high.partition(":")
        if log not in ("", "log"):
            raise ValueError(f"--set is {text!r}. Expected a range, lr=1e-4..1e-1, or by logarithms 1e-4..1e-1:log.")
        return name, {"low": _number(low, text), "high": _number(high, text), "log": log == "log"}
    return name, [_value(name, each, text) for each in _words(rest)]


def _words(text: str) -> list[str]:
    """The values between commas; of one with parameters these may have commas between them.

    >>> _words("none,side_on:max_zoom=1.1,rotation=5+flip,mlp:hidden=8")
    ['none', 'side_on:max_zoom=1.1,rotation=5+flip', 'mlp:hidden=8']
    """
    words: list[str] = []
    for piece in text.split(","):
        if words and "=" in piece.partition(":")[0]:
            words[-1] += f",{piece}"
        else:
            words.append(piece)
    return words


def _value(name: str, word: str, text: str) -> Any:
    """A word of ``--set`` as a value of the setting."""
    if word == "none" and name != "reduce":  # which has a reduction of that name
        return None
    if name in _NUMBERS and "+" not in word:
        return _number(word, text)
    if name in _WHOLE:
        number = _number(word, text)
        if number != int(number):
            raise ValueError(f"--set is {text!r}. Expected whole numbers.")
        return int(number)
    if name == "decay_norms":
        one_of(f"--set {name}", word, tuple(_TRUTHS))
        return _TRUTHS[word]
    if name in ("hidden", "dropout"):
        numbers = [_number(each, text) for each in word.split("+")]
        return [int(each) for each in numbers] if name == "hidden" else numbers
    return word


def _number(word: str, text: str) -> float:
    try:
        return float(word)
    except ValueError:
        raise ValueError(f"--set is {text!r}, and {word!r} is no number. Expected numbers, as lr=1e-3,3e-3.") from None


def _read(path: str) -> dict[str, Any]:
    """The values in a TOML file."""
    try:
        found = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--settings {path} can't be read: {error}. Expected a TOML file of names and lists."
        ) from None
    return {name.replace("-", "_"): value for name, value in found.items()}


def _made(name: str, values: Any, seeds: str | None) -> Any:
    """Values as a grid or sample takes them; `seeds` are of augmentations."""
    from training.experiments.grid import Range

    if isinstance(values, Mapping):
        unknown = {*values} - {"low", "high", "log"}
        if unknown or not {"low", "high"} <= {*values}:
            raise ValueError(f"{name} is {dict(values)!r}. Expected a range of low and high, and maybe log.")
        return Range(float(values["low"]), float(values["high"]), bool(values.get("log", False)))
    if name == "mix" and isinstance(values, Sequence):
        return [_mix(each) for each in values]
    if name == "augment" and isinstance(values, Sequence):
        words = [None if each in (None, "none") else str(each) for each in values]
        return [None if each is None else AugmentFlags(augment=each, seeds=seeds).augmentation() for each in words]
    return values


def _mix(word: Any) -> Any:
    from training.mixing import BatchChange, CutMix, FeatureBrightness, FeatureNoise, Mixup

    if word in (None, "none"):
        return None
    kind, _, amount = str(word).partition(":")
    kinds: dict[str, Callable[..., BatchChange]] = {
        "mixup": Mixup,
        "cutmix": CutMix,
        "noise": FeatureNoise,
        "brightness": FeatureBrightness,
    }
    try:
        return kinds[kind](float(amount)) if amount else kinds[kind]()
    except (KeyError, ValueError):
        raise ValueError(f"mix is {word!r}. Expected one of {', '.join(kinds)}, as mixup:0.4; or none.") from None


def _average(word: Any) -> Any:
    from training.loop.averages import EMA, SWA

    if word in (None, "none"):
        return None
    kind, _, number = str(word).partition(":")
    try:
        return {"ema": EMA, "swa": SWA}[kind](float(number))
    except (KeyError, ValueError):
        raise ValueError(f"average is {word!r}. Expected ema:DECAY or swa:START, as ema:0.99; or none.") from None
