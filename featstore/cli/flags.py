"""Flags that both programs share: how each is written, its default, and the value that it stands for.

A dataclass is a group of flags. `spread` makes a command that takes such groups into one that typer understands.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from functools import cache
from itertools import combinations
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_type_hints

import typer

from featstore.cli.program import one_of
from featstore.errors import OnError
from featstore.extraction.defaults import DEFAULT_SPLIT_SEED, DEFAULT_VALID
from featstore.images.decoders import POLICIES as DECODE_POLICIES
from featstore.images.geometry import INTERPOLATIONS
from featstore.images.names import OWN_SPLITS, Task, TopFolders
from featstore.images.origins import ORIGINS, Origin, named_by
from featstore.images.policies import BUILT_IN
from featstore.images.spelling import completed, read
from featstore.words import counted

if TYPE_CHECKING:
    from featstore.images.image_set import ImageSet
    from featstore.images.views import Augment, View
    from featstore.models.staged import StagedModel
    from featstore.store.store import FeatureStore

FEW_IMAGES = 100
"""Below so many validation images, the steps in which accuracy moves are worth a sentence."""

ON_ERROR: tuple[OnError, ...] = get_args(OnError)
_POLICIES = ", ".join(BUILT_IN)
_TASKS: tuple[Task, ...] = get_args(Task)
_TOP_FOLDERS: tuple[TopFolders, ...] = get_args(TopFolders)


@dataclass(frozen=True, kw_only=True, eq=False)
class GivenImages:
    """The images that flags stand for, and what their owner should read about them.

    Attributes:
        images: dealt into splits.
        about: sentences about the images and the split that they brought.
        dealt: how they were dealt, where they brought no split; else None.
    """

    images: ImageSet
    about: tuple[str, ...]
    dealt: str | None = None

    @property
    def notes(self) -> tuple[str, ...]:
        """All that is to be said."""
        return self.about if self.dealt is None else (*self.about, self.dealt)


@dataclass(frozen=True, kw_only=True)
class SetFlags:
    """Which images."""

    images: Annotated[
        str,
        typer.Option(
            metavar="|".join(origin.metavar for origin in ORIGINS),
            help=f"A {', or a '.join(origin.help for origin in ORIGINS)}.",
        ),
    ]
    top_folders: Annotated[
        str,
        typer.Option(
            metavar="|".join(_TOP_FOLDERS), help="What a folder's first folders are; auto: splits if all are called so."
        ),
    ] = "auto"
    root: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="Where a table's paths start.", show_default="the table's folder"),
    ] = None
    path_column: Annotated[str, typer.Option(metavar="NAME", help="A table's column of paths.")] = "path"
    split_column: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="A table's or sample's column of train, valid or test; '' to leave it aside.",
            show_default=f"{OWN_SPLITS}, if there is one",
        ),
    ] = None
    suffix: Annotated[
        str | None, typer.Option(metavar=".jpg", help="What a table's names lack to be names of files.")
    ] = None
    strip: Annotated[
        str | None, typer.Option(metavar="DIR", help="Cut off a table's paths, to find the rest below --root.")
    ] = None

    def __post_init__(self) -> None:
        one_of("--top-folders", self.top_folders, _TOP_FOLDERS)


@dataclass(frozen=True, kw_only=True)
class ImageFlags(SetFlags):
    """Which images, with which labels and split."""

    label_column: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="A table's column of labels, or a sample's member or field of its .json; '' if nothing is labelled; "
            "for regression of numbers, several as A,B.",
        ),
    ] = "label"
    label_sep: Annotated[
        str | None, typer.Option(metavar="TEXT", help="What stands between several labels of one image.")
    ] = None
    one_hot: Annotated[
        str | None, typer.Option(metavar="NAMES|*", help="A table's columns of 0 and 1, one a class; *: all others.")
    ] = None
    valid_column: Annotated[
        str | None, typer.Option(metavar="NAME", help="A table's column of 0 and 1: 1 is held out, 0 is train.")
    ] = None
    group_column: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="A table's or sample's column of what stays in one split, a patient say."),
    ] = None
    task: Annotated[
        str, typer.Option(metavar="|".join(_TASKS), help="One label an image, any number of them, or numbers.")
    ] = "single"
    valid: Annotated[
        float | None,
        typer.Option(
            metavar="FRACTION",
            help="Held out of images that bring no split of their own; 0: nothing.",
            show_default=str(DEFAULT_VALID),
        ),
    ] = None
    test: Annotated[
        float | None,
        typer.Option(
            metavar="FRACTION",
            help="Of the same images: the split test, kept for a last score; it has no part in any fit.",
            show_default="0",
        ),
    ] = None
    split_seed: Annotated[
        int | None,
        typer.Option(metavar="N", help="Which images are held out.", show_default=str(DEFAULT_SPLIT_SEED)),
    ] = None

    def __post_init__(self) -> None:
        one_of("--task", self.task, _TASKS)
        super().__post_init__()

    def given(self, *, held_out_classes: bool = False) -> GivenImages:
        """The images, dealt into splits.

        Args:
            held_out_classes: held-out images may have classes that none to train on has.

        Raises:
            ValueError: for flags that don't go together, and as `ImageSet.from_folder`, `from_csv` and `split` do.
            FeatureStoreError: if a folder can't be listed.
        """
        origin, options = named_by(self.images), self._options()
        images = self._made(origin, options, held_out_classes=held_out_classes)
        notes = (*_skipped_note(images), *images.notes, *self._single_labels_note(images), *_label_notes(images))
        if self.split_column or self.valid_column or (images.splits != "").any():
            self._refuse_a_second_split(images, origin)
            found = origin.found_split(images, options)
            return GivenImages(images=images, about=(*notes, *(() if found is None else (found,))))
        valid = DEFAULT_VALID if self.valid is None else self.valid
        test, seed = self.test or 0.0, DEFAULT_SPLIT_SEED if self.split_seed is None else self.split_seed
        if valid == test == 0:
            return GivenImages(images=images, about=notes)
        dealt = images.split(valid=valid, test=test, seed=seed)
        return GivenImages(
            images=dealt,
            about=notes,
            dealt=f"{origin.no_split(images, options)}: {_held_out(dealt, valid, test, seed)}",
        )

    @classmethod
    def unlabelled(cls, flags: SetFlags) -> ImageSet:
        """The images of `flags`, in order, with the splits that they bring; labels of a table or sample aren't read.

        Raises:
            ValueError, FeatureStoreError: as `given`.
        """
        origin = named_by(flags.images)
        given: dict[str, Any] = {each.name: getattr(flags, each.name) for each in fields(SetFlags)}
        if "label_column" in origin.options:
            given["label_column"] = ""
        own = cls(**given)
        return own._made(origin, own._options(), held_out_classes=True)

    def _made(self, origin: Origin, options: Mapping[str, Any], *, held_out_classes: bool) -> ImageSet:
        self._refuse_options_of_others(origin, options)
        return origin.make(self.images, options, held_out_classes=held_out_classes)

    def _single_labels_note(self, images: ImageSet) -> list[str]:
        """A word of doubt where a table for several labels an image never has more than one."""
        if images.task != "multi" or images.targets is None or (images.targets.sum(axis=1) > 1).any():
            return []
        classes = ", ".join(images.classes[:4]) + ", ..." * (len(images.classes) > 4)
        separator = "is --label-sep missing?" if self.label_sep is None else f"is --label-sep {self.label_sep!r} right?"
        return [f"no image has more than one label (the classes are {classes}); {separator}"]

    def _options(self) -> dict[str, Any]:
        """The flags that belong to one kind of images or another."""
        return {name: getattr(self, name) for origin in ORIGINS for name in origin.options}

    def _refuse_options_of_others(self, origin: Origin, options: Mapping[str, Any]) -> None:
        defaults = {each.name: each.default for each in fields(self)}
        for other in ORIGINS:
            for name in other.options:
                if name not in origin.options and options[name] != defaults[name]:
                    raise ValueError(
                        f"--{name.replace('_', '-')} {options[name]} is for {other.kind}, and {self.images} is none. "
                        f"Leave it out, or give {other.instance} with --images."
                    )

    def _refuse_a_second_split(self, images: ImageSet, origin: Origin) -> None:
        for name, value in (("--valid", self.valid), ("--test", self.test), ("--split-seed", self.split_seed)):
            if value is not None:
                raise ValueError(
                    f"{name} {value} would deal images that bring a split of their own ({images.describe()}). Leave "
                    f"out {name}, or {origin.without_split}."
                )


@dataclass(frozen=True, kw_only=True)
class ViewFlags:
    """How images are resized, cropped and normalised; what isn't given comes with the weights."""

    size: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Side of the square that the backbone sees, in pixels; takes --resize along in the weights' ratio.",
            show_default="the weights', else 224",
        ),
    ] = None
    resize: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="Shorter side before the crop, in pixels.", show_default="the weights', else 256"
        ),
    ] = None
    mean: Annotated[
        str | None,
        typer.Option(metavar="R,G,B|L", help="Subtracted, in 0 ... 1.", show_default="the weights', else ImageNet's"),
    ] = None
    std: Annotated[
        str | None,
        typer.Option(metavar="R,G,B|L", help="Divided by, in 0 ... 1.", show_default="the weights', else ImageNet's"),
    ] = None
    interpolation: Annotated[
        str | None,
        typer.Option(metavar="|".join(INTERPOLATIONS), help="", show_default="the weights', else bilinear"),
    ] = None
    decode: Annotated[
        str | None,
        typer.Option(
            metavar="|".join(DECODE_POLICIES),
            help="reduced: JPEGs at a half, a quarter or an eighth, their shorter side twice --resize or more.",
            show_default="the weights', else full",
        ),
    ] = None

    def __post_init__(self) -> None:
        if self.interpolation is not None:
            one_of("--interpolation", self.interpolation, INTERPOLATIONS)
        if self.decode is not None:
            one_of("--decode", self.decode, tuple(DECODE_POLICIES))

    def view(self, own: View) -> View:
        """The view `own` of a model with these flags applied to it.

        Raises:
            ValueError: for numbers that make no view.
        """
        view = own.resized(size=self.size, resize=self.resize)
        if self.mean is not None:
            view = replace(view, mean=_by_channel("--mean", self.mean, own.channels))
        if self.std is not None:
            view = replace(view, std=_by_channel("--std", self.std, own.channels))
        if self.interpolation is not None:
            view = replace(view, interpolation=self.interpolation)
        return view if self.decode is None else replace(view, decode=self.decode)

    def notes(self, model: StagedModel) -> tuple[str, ...]:
        """The model's notes; of what is assumed of its view, that alone which these flags leave open."""
        from featstore.models.backbones import view_note

        told = view_note(model)
        if not {*told} & {*model.notes}:
            return model.notes
        given = [each.name for each in fields(self) if getattr(self, each.name) is not None]
        others = [note for note in model.notes if note not in told]
        return (*others, *view_note(model, self.view(model.view), given))


@dataclass(frozen=True, kw_only=True)
class AugmentFlags:
    """An augmentation policy and its seeds, which belong together."""

    augment: Annotated[
        str | None,
        typer.Option(
            metavar="POLICY[:PARAMETER=VALUE,...][+POLICY...]",
            help=f"Augmentation; needs --seeds. One of these, or several (side_on:max_zoom=1.1+cutout): {_POLICIES}.",
            autocompletion=completed,
        ),
    ] = None
    seeds: Annotated[
        str | None,
        typer.Option(metavar="0-3|fresh", help="Fixed views, one a seed; or fresh ones in each epoch (training only)."),
    ] = None

    def __post_init__(self) -> None:
        if self.augment is not None:
            try:
                read(self.augment)
            except ValueError as error:
                raise ValueError(f"--augment {self.augment}: {error}.") from error
        if self.augment in (None, "none") and self.seeds is not None:
            raise ValueError(
                f"--seeds {self.seeds} is given without an augmentation, and the evaluation view has no seeds. Add "
                "--augment POLICY, or leave out --seeds."
            )
        if self.augment not in (None, "none") and self.seeds is None:
            raise ValueError(
                f"--augment {self.augment} needs seeds, and there is no default for them. Give --seeds 0-3 for four "
                "fixed views, which can be stored, or, in training, --seeds fresh for new views each epoch."
            )

    def augmentation(self) -> Augment | None:
        """What was asked for; None for the evaluation view alone."""
        from featstore.images.views import Augment

        if self.augment is None or self.seeds is None:
            return None
        return Augment(self.augment, parse_seeds_or_fresh(self.seeds))


TrustOption = Annotated[
    bool, typer.Option("--trust-code", help="Let a saved run of somebody else's run the file its model is made in.")
]


@dataclass(frozen=True, kw_only=True)
class ComputeFlags:
    """What the work is done with, and whose code may run; no value depends on it."""

    device: Annotated[str, typer.Option(metavar="auto|cpu|cuda|cuda:1", help="auto: the first GPU, else the CPU.")] = (
        "auto"
    )
    workers: Annotated[
        int | None,
        typer.Option(
            min=0,
            metavar="N",
            help="Threads that read and decode; 0: none beside the main one. Many images: processes, from 5 on.",
            show_default="one a processor, threads up to 8",
        ),
    ] = None
    trust_code: TrustOption = False

    def __post_init__(self) -> None:
        if self.device in ("auto", "cpu"):  # always there: what is wrong with other flags is said without torch
            return
        from featstore.models.trunk import choose_device

        choose_device(self.device)


@dataclass(frozen=True, kw_only=True)
class RunFlags(ComputeFlags):
    """How the work is done; no value depends on it."""

    on_error: Annotated[
        str,
        typer.Option(
            metavar="|".join(ON_ERROR), help="An image that can't be read: stop, or leave it out and report it."
        ),
    ] = "raise"

    def __post_init__(self) -> None:
        one_of("--on-error", self.on_error, ON_ERROR)
        super().__post_init__()

    @property
    def on_image_error(self) -> OnError:
        """What to do about an image that can't be read."""
        return one_of("--on-error", self.on_error, ON_ERROR)


@dataclass(frozen=True, kw_only=True)
class OutputFlags:
    """How a program speaks."""

    json: Annotated[bool, typer.Option("--json", help="The result as one JSON document on stdout.")] = False
    debug: Annotated[
        bool,
        typer.Option(
            "--debug", help="After an error, its traceback; extract and status say what took time before a row."
        ),
    ] = False


KeyArgument = Annotated[
    str, typer.Argument(metavar="KEY", help="A feature set's key, or the start of it (featstore ls).")
]
StoreOption = Annotated[
    str, typer.Option("--store", metavar="DIR|s3://BUCKET/PREFIX", help="Where features are filed.")
]


def spread(command: Callable[..., None]) -> Callable[..., None]:
    """`command` for typer: each parameter that is a group of flags is replaced by the group's flags.

    A group is made, and thereby checked, when the command is called.
    """
    parameters: list[inspect.Parameter] = []
    groups: dict[str, type[Any]] = {}
    hints = get_type_hints(command, include_extras=True)
    for parameter in inspect.signature(command).parameters.values():
        hint = hints[parameter.name]
        if isinstance(hint, type) and is_dataclass(hint):
            groups[parameter.name] = hint
            parameters += _flags_of(hint)
        else:
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=hint))

    def called(**given: Any) -> None:
        made = {
            name: group(**{each.name: given.pop(each.name) for each in fields(group)}) for name, group in groups.items()
        }
        command(**made, **given)

    called.__name__, called.__doc__ = command.__name__, command.__doc__
    called.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    called.__annotations__ = {each.name: each.annotation for each in parameters}
    return called


def open_store(folder: str) -> FeatureStore:
    """The store in a folder, which need not be there yet."""
    if not folder:
        raise ValueError("--store is ''. Expected the folder of a store, or the name of a new one; . is this folder.")
    from featstore.store.store import FeatureStore

    return FeatureStore(folder)


_MOST_SEEDS = 100_000


def parse_seeds(text: str, flag: str = "--seeds") -> tuple[int, ...]:
    """The seeds that a flag lists.

    >>> parse_seeds("0-3,7")
    (0, 1, 2, 3, 7)

    Raises:
        ValueError: for anything but numbers and ranges from 0 on.
    """
    seeds: list[int] = []
    for piece in text.split(","):
        first, dash, last = piece.strip().partition("-")
        bounds = (first, last if dash else first)
        if not all(bound.isascii() and bound.isdigit() for bound in bounds) or int(bounds[0]) > int(bounds[1]):
            raise ValueError(
                f"{flag} is {text!r}, and {piece!r} is neither a seed nor a rising range of seeds. Expected numbers "
                f"from 0 on, such as {flag} 0-3 or {flag} 0,2,5-7."
            )
        count = int(bounds[1]) - int(bounds[0]) + 1
        if len(seeds) + count > _MOST_SEEDS:
            raise ValueError(
                f"{flag} is {text!r}, which names more than {_MOST_SEEDS:,} seeds. Each is a feature set of its own; "
                f"expected a few, such as {flag} 0-3."
            )
        seeds += range(int(bounds[0]), int(bounds[1]) + 1)
    return tuple(seeds)


def parse_seeds_or_fresh(text: str, flag: str = "--seeds") -> tuple[int, ...] | Literal["fresh"]:
    """The seeds that a flag lists, or "fresh"."""
    return "fresh" if text == "fresh" else parse_seeds(text, flag)


def parse_numbers(text: str, flag: str) -> tuple[float, ...]:
    """The finite numbers of a flag, between commas.

    >>> parse_numbers("1e-5,1e-3", "--lr")
    (1e-05, 0.001)

    Raises:
        ValueError: for anything else.
    """
    try:
        numbers = tuple(float(piece) for piece in text.split(","))
    except ValueError:
        numbers = (math.nan,)
    if not all(map(math.isfinite, numbers)):
        raise ValueError(f"{flag} is {text!r}. Expected numbers with commas between them, such as {flag} 0.5,0.5,0.5.")
    return numbers


@cache  # by several commands
def _flags_of(group: type[Any]) -> list[inspect.Parameter]:
    hints = get_type_hints(group, include_extras=True)
    return [
        inspect.Parameter(
            each.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if each.default is MISSING else each.default,
            annotation=hints[each.name],
        )
        for each in fields(group)
    ]


def _skipped_note(images: ImageSet) -> list[str]:
    if not images.skipped:
        return []
    count = len(images.skipped)
    named = [f"{path}: {reason}" for path, reason in images.skipped[:3]] + ["..."] * (count > 3)
    return [f"{count:,} file{'' if count == 1 else 's'} skipped ({', '.join(named)})"]


def _label_notes(images: ImageSet) -> list[str]:
    """What is odd about the labels: images without one, classes that may be one, several labels in a cell."""
    if images.targets is None or images.task == "multi":
        return []
    notes = []
    is_unlabelled = images.targets < 0 if images.task == "single" else (images.targets != images.targets).any(axis=1)
    num_unlabelled = int(is_unlabelled.sum())
    if num_unlabelled:
        are = "image is" if num_unlabelled == 1 else "images are"
        notes.append(f"{num_unlabelled:,} {are} unlabelled, of {len(images):,}: features yes, but no training or score")
    alike: dict[str, list[str]] = {}
    if images.task == "regression":
        return notes
    for name in images.classes:
        alike.setdefault(name.casefold(), []).append(name)
    notes += [f"the classes {' and '.join(names)} differ in case alone" for names in alike.values() if len(names) > 1]
    for separator in ",;|":
        pieces = [{piece.strip() for piece in name.split(separator)} for name in images.classes if separator in name]
        if len(pieces) > 1 and any(one & other for one, other in combinations(pieces, 2)):
            notes.append(
                f"class names hold {separator!r} ({next(name for name in images.classes if separator in name)!r}); for "
                f"several labels an image: --task multi --label-sep {separator!r}"
            )
    return notes


def _held_out(images: ImageSet, valid: float, test: float, seed: int) -> str:
    held_out, num_test = images.splits == "valid", int((images.splits == "test").sum())
    kept, flag = (f", {num_test:,} kept as test", f" --test {test:g},") if test else ("", "")
    text = (
        f"{int(held_out.sum()):,} of {len(images):,} images held out{kept} (--valid {valid:g},{flag} "
        f"--split-seed {seed})."
    )
    if images.targets is not None and images.task == "single":
        count = int((images.targets[held_out] >= 0).sum())
        if 0 < count < FEW_IMAGES:
            words = f"With {counted(count, 'validation image')}" + " that have labels" * (count < int(held_out.sum()))
            text += f" {words} accuracy moves in steps of {100 / count:.3g} %."
    return text


def _by_channel(flag: str, text: str, channels: int) -> tuple[float, ...]:
    numbers = parse_numbers(text, flag)
    if len(numbers) != channels:
        expected = "three, for red, green and blue" if channels == 3 else "one, for gray"
        raise ValueError(f"{flag} is {text!r}, {len(numbers)} numbers. Expected {expected}.")
    return tuple(numbers)
