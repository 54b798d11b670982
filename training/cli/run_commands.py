"""Commands on saved runs: evaluate, predict, embed, export, push and pull."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from featstore.cli.flags import (
    AugmentFlags,
    ImageFlags,
    OutputFlags,
    RunFlags,
    SetFlags,
    TrustOption,
    spread,
)
from featstore.cli.program import one_of, show, show_json, table, tell, tell_all
from featstore.errors import FeatureStoreError
from featstore.images.names import SPLITS
from featstore.images.spelling import completed
from featstore.models.names import REDUCTIONS
from featstore.words import counted
from training import choices
from training.cli.asked import for_run, labelled_as

# What loads torch is imported where a command needs it, so that words about the commands can be had without.
if TYPE_CHECKING:
    from featstore.images.image_set import ImageSet
    from training.tta import TtaOptions


@dataclass(frozen=True, kw_only=True)
class ScoringFlags(RunFlags):
    """How images are scored."""

    batch_size: Annotated[int, typer.Option(min=1, metavar="N", help="Images scored at a time.")] = 64

    def options(self) -> dict[str, Any]:
        """As arguments of `Learner`."""
        return {
            "device": self.device,
            "workers": self.workers,
            "on_error": self.on_image_error,
            "batch_size": self.batch_size,
        }


@dataclass(frozen=True, kw_only=True)
class FitFlags(ScoringFlags):
    """How the work of training is done."""

    batch_size: Annotated[int, typer.Option(min=1, metavar="N", help="Images a training step.")] = 64
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="Of head weights, order, views and dropout.")] = 0

    def options(self) -> dict[str, Any]:
        """As arguments of `Learner`."""
        return {**super().options(), "seed": self.seed}


ModelOption = Annotated[str, typer.Option("--model", metavar="RUN_DIR", help="Folder of a saved run.")]
ItemsArgument = Annotated[
    list[str] | None, typer.Argument(metavar="IMAGE|FOLDER|TABLE|SHARD.tar...", show_default=False)
]


@dataclass(frozen=True, kw_only=True)
class FileFlags:
    """What becomes of files that other flags name and that are there already."""

    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files of the names given.")] = False

    def check_free(self, *names: str | None) -> None:
        """Checks, before anything is computed, that files can be written under `names`; None stands for none.

        Raises:
            FeatureStoreError: if one exists and isn't to be replaced, or its folder isn't there.
        """
        for name in names:
            if name is None:
                continue
            if os.path.isdir(name) or (os.path.lexists(name) and not self.overwrite):
                remedy = "" if os.path.isdir(name) else ", or replace it with --overwrite"
                raise FeatureStoreError(f"{name} exists already. Choose another name{remedy}.")
            if not os.path.isdir(os.path.dirname(name) or "."):
                raise FeatureStoreError(f"{name} lies in a folder that isn't there. Make it, or choose another name.")


@dataclass(frozen=True, kw_only=True)
class ItemFlags(SetFlags):
    """Images that need no labels: by their paths, or as a set."""

    images: Annotated[
        str,
        typer.Option(
            metavar="FOLDER|TABLE|SHARDS",
            help="A set of images in the place of single paths: a folder, a .csv, .tsv or .parquet, a .tar.",
            show_default=False,
        ),
    ] = ""
    split: Annotated[
        str | None,
        typer.Option(
            metavar="|".join(SPLITS),
            help="Only these of a set's images; without a split of their own by what the run recorded.",
            show_default="all",
        ),
    ] = None

    def __post_init__(self) -> None:
        if self.split is not None:
            one_of("--split", self.split, SPLITS)
        super().__post_init__()

    def given(self, items: list[str] | None, runs: Sequence[str]) -> ImageSet:
        """The images that either `items` or the flags name, in order, unlabelled.

        Args:
            items: paths.
            runs: saved runs, by whose splits the images of one are chosen if they bring none.
        """
        if bool(items) == bool(self.images):
            raise ValueError("Give either images, folders or a table by their paths, or a set with --images.")
        if not items:
            return self._of_split(ImageFlags.unlabelled(self), runs)
        told = [each.name for each in fields(self) if getattr(self, each.name) != each.default]
        if told:
            raise ValueError(f"--{told[0].replace('_', '-')} belongs to a set. Give that with --images.")
        from training.predict import as_images  # torch

        return as_images(items)

    def _of_split(self, images: ImageSet, runs: Sequence[str]) -> ImageSet:
        if self.split is None:
            return images
        own = images.describe()
        if not (images.splits != "").any():
            images = _recorded(images, runs)
        chosen = images.select(images.splits == self.split)
        if not len(chosen):
            known = "" if images.describe() == own else f"; by {runs[0]}: {images.describe()}"
            raise ValueError(f"--split is {self.split}, and {self.images} has no such images ({own}{known}).")
        return chosen


def _recorded(images: ImageSet, runs: Sequence[str]) -> ImageSet:
    """`images` in the splits that `runs` recorded of their contents; what is new to them is in none."""
    from training.splits import PastSplit

    past = [PastSplit.read(Path(run)) for run in runs]
    digests = images.digests()
    found = [[""] * len(images) if each is None else each.recorded(digests) for each in past]
    for run, splits in zip(runs, found, strict=True):
        if splits != found[0]:
            raise ValueError(
                f"--split is of one run's split, and {runs[0]} and {run} deal these images differently. Expected "
                "images with a split of their own, or runs that share one. Give such images, or leave out --split."
            )
    if new := found[0].count(""):
        tell(f"{counted(new, 'image')} of {len(images):,} are new to {runs[0]}, and in none of its splits")
    return images.with_splits(found[0])


@dataclass(frozen=True, kw_only=True)
class TtaFlags:
    """Views of each image beside its evaluation view."""

    tta: Annotated[
        int | None,
        typer.Option(
            "--tta", min=1, metavar="N", help="The mean of the probabilities of the image and N views, seeds 0 to N-1."
        ),
    ] = None
    augment: Annotated[
        str | None,
        typer.Option(
            metavar="POLICY[:PARAMETER=VALUE,...][+POLICY...]",
            help="Policy of the views of --tta.",
            autocompletion=completed,
        ),
    ] = None
    tta_weight: Annotated[
        float | None,
        typer.Option(
            min=0, max=1, metavar="SHARE", help="Of the image itself in the mean.", show_default="that of a view"
        ),
    ] = None

    def __post_init__(self) -> None:
        if self.tta is None:
            for flag, value in (("--augment", self.augment), ("--tta-weight", self.tta_weight)):
                if value is not None:
                    raise ValueError(f"{flag} {value} is for views of an image. Say how many: --tta 8.")
        elif self.augment in (None, "none"):
            raise ValueError(
                f"--tta {self.tta} needs a policy, as without one all views would be the same. Give it: --augment flip."
            )
        else:
            self._flags()

    def _flags(self) -> AugmentFlags:
        return AugmentFlags(augment=self.augment, seeds=None if self.tta is None else f"0-{self.tta - 1}")

    def options(self) -> TtaOptions:
        """As arguments of `Learner.predict`."""
        return {"tta": self._flags().augmentation(), "tta_weight": self.tta_weight}


@spread
def evaluate(
    model: ModelOption,
    images: ImageFlags,
    how: ScoringFlags,
    views: TtaFlags,
    output: OutputFlags,
    split: Annotated[str, typer.Option(metavar="|".join(SPLITS), help="Which images to score.")] = "valid",
    per_class: Annotated[
        bool, typer.Option("--per-class", help="Also precision, recall and F1 of each class, with 95 % intervals.")
    ] = False,
) -> None:
    """Score a saved model on images of a split; without a split of their own they get the run's."""
    one_of("--split", split, SPLITS)
    from training.learner import Learner
    from training.saved import finite
    from training.scores.metrics import scores_line

    images = labelled_as(model, images)
    given = for_run(model, images, images.given())
    tell_all(given.notes)
    # The features it was trained on give its scores again exactly; images give them to the storage type's precision.
    learn = Learner.load(
        model,
        given.images,
        Learner.store_of(model),
        on_missing="images",
        trust_code=how.trust_code,
        **how.options(),
    )
    if per_class and learn.task == "regression":
        raise ValueError("--per-class is of classes, and this model gives numbers. Leave it out.")
    if per_class:
        values, outcomes = learn.evaluated(split, **views.options())
        report = outcomes.per_class()
    else:  # scores alone are told of a model that diverged too
        values, report = learn.evaluate(split, **views.options()), None
    scored = finite(values)
    calibration = scored.get("calibration_error")
    if output.json:
        by_class = {} if report is None else {"per_class": report.table(), "means": report.means}
        show_json({split: scored, "inputs": learn.read_from, **by_class})
    else:
        if report is not None:
            show(str(report))
        told = "" if calibration is None else f", calibration error {calibration:.3f}"
        show(f"{scores_line(split, scored)}{told}")


@spread
def predict(
    model: Annotated[
        list[str],
        typer.Option(metavar="RUN_DIR", help="Folder of a saved run; given several times, their mean predicts."),
    ],
    how: ScoringFlags,
    given: ItemFlags,
    views: TtaFlags,
    output: OutputFlags,
    files: FileFlags,
    items: ItemsArgument = None,
    csv: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Also write a table: image, label, probability, a column a class (or image, a column a number).",
        ),
    ] = None,
) -> None:
    """Name the class of images, with probabilities; or their numbers."""
    files.check_free(csv)
    from training.ensembles import Ensemble
    from training.predict import predictions, write_csv

    images = given.given(items, model)  # a path that isn't there is said before the model is loaded
    learn = Ensemble.load(model, trust_code=how.trust_code, **how.options())
    ids, values = learn.scored(images, **views.options())
    _tell_left_out(images, ids)
    if csv is not None:
        write_csv(Path(csv), ids, values, learn.classes, learn.task)
    records = predictions(ids, values, learn.classes, learn.task)
    if output.json:
        show_json([each.facts() for each in records])
    elif csv is None and learn.task == "regression":
        show(table([{"image": each.image, **dict(each.values)} for each in records]))
    elif csv is None:
        show(table([{"image": each.image, "label": each.label, "probability": each.probability} for each in records]))
    else:
        tell(f"{len(records):,} predictions in {csv}")


@spread
def embed(
    model: ModelOption,
    how: ScoringFlags,
    given: ItemFlags,
    output: OutputFlags,
    files: FileFlags,
    out: Annotated[
        str, typer.Option(metavar="FILE.npz", help="The new file, of numpy: ids, and values (images, ...) float32.")
    ],
    items: ItemsArgument = None,
    cut: Annotated[
        str | None, typer.Option("--cut", metavar="CUT", help="Where they are taken.", show_default="the head's")
    ] = None,
    reduce: Annotated[
        str | None,
        typer.Option("--reduce", metavar="|".join(REDUCTIONS), help="Reduction there.", show_default="the head's"),
    ] = None,
) -> None:
    """Write what a saved model makes of images at a cut: their embeddings."""
    if not out.endswith(".npz"):
        raise ValueError(f"--out is {out!r}. Expected a name that ends in .npz.")
    files.check_free(out)
    if reduce is not None:
        one_of("--reduce", reduce, REDUCTIONS)
    images = given.given(items, [model])
    import numpy as np

    from training.learner import Learner

    learn = Learner.load(model, trust_code=how.trust_code, **how.options())
    ids, values = learn.embed(images, cut, reduce)
    _tell_left_out(images, ids)
    np.savez(out, ids=np.array(ids), values=values)
    if output.json:
        show_json({"file": out, "images": len(ids), "shape": [*values.shape[1:]]})
    else:
        show(f"{len(ids):,} x {'x'.join(map(str, values.shape[1:]))} float32 in {out}")


def _tell_left_out(images: ImageSet, ids: Sequence[str]) -> None:
    are_scored = set(ids)
    left_out = [name for name in images.ids if name not in are_scored]
    if left_out:
        tell(f"{len(left_out):,} image{'s' * (len(left_out) > 1)} can't be read, left out:")
        tell_all(left_out, indent="  ")


@spread
def export(
    model: ModelOption,
    out: Annotated[
        str,
        typer.Option(
            metavar="|".join(f"FILE{each}" for endings in choices.EXPORTS.values() for each in endings),
            help="The new file; FILE.json beside it says how its input is prepared, and its classes.",
        ),
    ],
    output: OutputFlags,
    trust_code: TrustOption = False,
    kind: Annotated[
        str | None,
        typer.Option(
            "--format", metavar="|".join(choices.EXPORTS), help="Of the file.", show_default="what its ending says"
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files of these names.")] = False,
    images: Annotated[
        str | None,
        typer.Option(
            metavar="IMAGE|FOLDER", help="Images to compare outputs on.", show_default="pixels drawn at random"
        ),
    ] = None,
) -> None:
    """Write a saved model for other programs, from uint8 images to logits, once its outputs were compared.

    The state-dict holds the backbone's tensors under their own names, and FILE.head beside it the head's.
    """
    if kind is not None:
        one_of("--format", kind, list(choices.EXPORTS))
    from training.learner import Learner
    from training.predict import as_images

    given = None if images is None else as_images(images)
    learn = Learner.load(model, device="cpu", trust_code=trust_code, quiet=True)
    report = learn.export(out, format=kind, overwrite=overwrite, compare_on=given)
    if output.json:
        show_json(report.facts())
    else:
        show(str(report))


RepoOption = Annotated[str, typer.Option("--repo", metavar="USER/NAME", help="A repository of models on the hub.")]


@spread
def push(
    model: ModelOption,
    repo: RepoOption,
    output: OutputFlags,
    private: Annotated[bool, typer.Option("--private", help="For yourself alone, if it is a new repository.")] = False,
    revision: Annotated[
        str | None, typer.Option(metavar="BRANCH", help="A branch that is there.", show_default="the main one")
    ] = None,
) -> None:
    """Upload a saved run to a model hub, all its files and a model card; needs huggingface_hub (extra hub)."""
    from training import hub

    address = hub.push(model, repo, private=private, revision=revision)
    if output.json:
        show_json({"repo": repo, "commit": address})
    else:
        show(address)


@spread
def pull(
    repo: RepoOption,
    output: OutputFlags,
    out: Annotated[str, typer.Option(metavar="DIR", help="Folder of the run; a new one.")],
    revision: Annotated[
        str | None, typer.Option(metavar="BRANCH|TAG|COMMIT", help="Which.", show_default="the main branch")
    ] = None,
) -> None:
    """Download a saved run from a model hub, whole and checked; no code comes along."""
    from training import hub

    folder = hub.pull(repo, out, revision=revision)
    if output.json:
        show_json({"run": str(folder)})
    else:
        show(str(folder))


COMMANDS: dict[str, Callable[..., None]] = {
    "evaluate": evaluate,
    "predict": predict,
    "embed": embed,
    "export": export,
    "push": push,
    "pull": pull,
}
