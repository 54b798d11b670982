"""Saved: what a learner writes into a run folder beside its tensors, and what a run folder brings back."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from featstore.digest import Json
from featstore.errors import DamagedFileError, FeatureStoreError, ModelError
from featstore.images.image_set import ImageSet
from featstore.images.labels import composed_classes
from featstore.images.names import Task
from featstore.images.sources import AbsentSource
from featstore.images.views import View
from featstore.models.backbones import architecture, restored
from featstore.models.digests import module_digest
from featstore.models.names import PRECISIONS, Precision
from featstore.models.runs import FACTS as RUN_FACTS
from featstore.models.runs import Run, located, read_file
from featstore.models.staged import StagedModel
from featstore.models.stages import HeadStage, PoolStage
from featstore.store.part_facts import are_stages, stage_facts
from featstore.store.store import FeatureStore
from featstore.words import printable
from training.choices import BEST
from training.class_tables import with_classes
from training.loop.history import History
from training.placement import reduction_of
from training.predict import write_csv
from training.scores.calibration import Calibration
from training.scores.metrics import TASKS
from training.sidecar import FILE as RUN
from training.sidecar import Sidecar
from training.sidecar import finite as finite_number
from training.splits import PastSplit
from training.standardised import LinearHead, unstandardised

ASKED, HISTORY, METRICS, VALID_PREDICTIONS = "run.toml", "history.csv", "metrics.json", "valid_predictions.csv"


def run_facts(
    model: StagedModel,
    *,
    cut: str,
    view: View,
    head: str,
    classes: Sequence[str],
    task: Task,
    seed: int,
    passes: int,
    precision: Precision | None = None,
    calibration: Calibration | None = None,
) -> dict[str, Json]:
    """What `read_run` and `Learner.load` need beside the tensors.

    Args:
        model: with its head and its freeze point.
        cut: where the head sits.
        view: of its images.
        head: name of the head, or ``module``.
        classes: one a logit.
        task: single, multi or regression.
        seed: that the head was made with.
        passes: over training images that were made, from which a later fit counts on.
        precision: of the frozen part's arithmetic in what was trained on; None where nothing was.
        calibration: of its probabilities, if there is one.
    """
    origin, digests = model.origin, model.digests()
    frozen = [stage.name for stage in model.ordered[: model.num_frozen] if not isinstance(stage, PoolStage)]
    return {
        "model": {
            "name": model.name,
            "backbone": origin.get("backbone"),
            "architecture": origin.get("architecture"),
            "cut": model.cut_points[-1],
            "default_cut": cut,
            "reduction": reduction_of(model),
            "stages": stage_facts(model, digests, size=view.size),
            "digests": {name: digests[name] for name in model.cut_points},
            "class_tokens": model.class_tokens,
            **({} if model.prefix_tokens == model.class_tokens else {"prefix_tokens": model.prefix_tokens}),
            "view": view.facts(),
            "frozen": frozen[-1] if frozen else None,
            "is_absent": model.is_absent,
        },
        "head": {
            "name": head,
            "stage": str(model.stages[-1].name),
            "digest": head_digest(model) if head == "module" else None,
        },
        "classes": list(classes),
        "task": task,
        "seed": seed,
        "passes": passes,
        **({} if precision is None else {"precision": precision}),
        **({} if calibration is None else {"calibration": calibration.facts()}),
    }


def check_facts(facts: Mapping[str, Json], folder: Path) -> None:
    """Checks that the facts of the run in `folder`, as far as a learner is made of them, are of the right kinds.

    Their checksum says that they are as somebody wrote them, not that a learner did.

    Raises:
        FeatureStoreError: if it is the checkpoint of a fit.
        DamagedFileError: names the first one that isn't.
    """
    if "checkpoint" in facts:
        raise FeatureStoreError(
            f"{folder} is a checkpoint of a fit that isn't done, and no saved run. Go on with the fit: --resume (in "
            "Python: resume=True); or give the folder that --out named."
        )
    if "sweep_member" in facts:
        best = folder.parent / BEST
        hint = f", or give the best that is saved, {best}" * (best / RUN_FACTS).is_file()
        raise FeatureStoreError(
            f"{folder} is one setting of a sweep, of which the head alone is kept. Run the sweep again with the same "
            f"out={str(folder.parent)!r} (--out), which trains nothing anew, and take best(){hint}."
        )
    for name, is_so in _FACTS.items():
        value: Json = facts
        for part in name.split("."):
            value = value.get(part, _MISSING) if isinstance(value, dict) else _MISSING
        if not is_so(value):
            what = "lacks" if value is _MISSING else f"has {printable(f'{value!r:.60}', is_one_line=True)} as"
            raise DamagedFileError(
                f"{folder / RUN_FACTS} {what} the fact {name}, of which a model can't be made. Restore the file, or "
                "train the model again."
            )


_MISSING = object()


def _is_text(value: Json) -> bool:
    return isinstance(value, str)


def _is_text_or_none(value: Json) -> bool:
    return value is None or _is_text(value)


def _are_texts(values: Json) -> bool:
    return isinstance(values, list) and all(map(_is_text, values))


def _is_view(value: Json) -> bool:
    try:
        View.from_facts(value)
    except (ValueError, TypeError, KeyError, AttributeError):  # whatever stands in the place of a view's facts
        return False
    return True


def _is_architecture(value: Json) -> bool:
    """A name of a library's, or a function in a file; None for a model made in Python."""
    if not isinstance(value, dict):
        return value is None
    names = ("name",) if "name" in value else ("file", "function")
    return all(_is_text(value.get(name)) for name in names) and ("name" in value or "source" in value)


_FACTS: dict[str, Callable[[Json], bool]] = {
    "model.name": _is_text,
    "model.architecture": _is_architecture,
    "model.cut": _is_text,
    "model.default_cut": _is_text,
    "model.reduction": _is_text_or_none,
    "model.stages": are_stages,
    "model.digests": lambda value: isinstance(value, dict) and _are_texts([*value.values()]),
    "model.class_tokens": lambda value: isinstance(value, int),
    "model.view": _is_view,
    "model.frozen": _is_text_or_none,
    "model.is_absent": lambda value: isinstance(value, bool),
    "head.name": _is_text,
    "head.digest": _is_text_or_none,
    "classes": _are_texts,
    "task": lambda value: value in TASKS,
}
"""What `Learner.load` relies on; every version of a run has had it."""


def calibration_of(facts: Mapping[str, Json], folder: Path) -> Calibration | None:
    """The temperature of a saved run's probabilities; None if it has none.

    Raises:
        DamagedFileError: if its facts are none of a calibration.
    """
    given = facts.get("calibration")
    try:
        return None if given is None else Calibration.from_facts(given)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedFileError(
            f"{folder / RUN_FACTS} has a calibration that is none ({error!r}). Restore the file, or train the model "
            "again."
        ) from error


def write_history(folder: Path, history: History) -> None:
    """Writes history.csv, a row an epoch, if there was one."""
    if history.records:
        history.to_csv(folder / HISTORY)


def write_asked(folder: Path, asked: str | None) -> None:
    """Writes run.toml, if a command made the run: with ``--config`` it can be given again."""
    if asked is not None:
        (folder / ASKED).write_text(asked, encoding="utf-8", errors="surrogateescape")


def write_valid(
    folder: Path,
    scored: Mapping[str, float],
    images: ImageSet,
    values: NDArray[np.float64],
) -> None:
    """Writes metrics.json, the validation scores, null where one isn't finite; and a table of what was predicted.

    A model whose logits aren't finite predicts nothing, and gets no table.
    """
    text = json.dumps({"valid": finite(scored)}, indent=1) + "\n"
    (folder / METRICS).write_text(text, encoding="utf-8")
    if np.isfinite(values).all():
        path = folder / VALID_PREDICTIONS
        write_csv(path, images.ids, values, images.classes, images.task, images.targets)


def read_scores(run: Path) -> dict[str, Json] | None:
    """What the saved model scored on the images held out; None if there are none."""
    content = read_file(run, METRICS)
    return None if content is None else _parsed(content, run / METRICS, "valid")


def sidecar_of_run(run: Path, *, identity: str) -> Sidecar | None:
    """What run.json says of a run; None if it has none that is understood here: the model is whole without it."""
    if not (located(run) / RUN).exists():
        return None
    content = read_file(run, RUN, identity=identity)
    with suppress(FeatureStoreError):  # of a newer format; its checksum says that it is as somebody wrote it
        return None if content is None else Sidecar.parsed(content, run / RUN)
    return None


def finite(scored: Mapping[str, float]) -> dict[str, Json]:
    """Scores as JSON has them: None where one isn't finite."""
    return {name: finite_number(value) for name, value in scored.items()}


def store_of(run: Path) -> FeatureStore | None:
    """The store that a saved run was trained with, if it is where it was and can be read; None also without run.json.

    Raises:
        DamagedFileError: if run.json isn't what was saved.
    """
    content = read_file(run, RUN)
    folder = None if content is None else _parsed(content, run / RUN, "store")
    if folder is None or Path(folder).is_file():
        return None
    with suppress(FeatureStoreError, OSError):  # an object store may be asked in vain
        store = FeatureStore(folder)
        return store if store.folder.is_dir() else None
    return None


def passes_of(facts: Mapping[str, Json], run: Path) -> int:
    """How many passes over training images a saved run has made.

    Earlier runs don't tell, and made one or more an epoch: the epochs of run.json, or 0 without it.
    """
    passes = facts.get("passes")
    if isinstance(passes, int) and passes >= 0:
        return passes
    content = read_file(run, RUN)
    return 0 if content is None else int(_parsed(content, run / RUN, "epochs"))


def precision_of(facts: Mapping[str, Json]) -> Precision | None:
    """That of the frozen part's arithmetic in what a saved run was trained on; None where it doesn't tell."""
    return next((each for each in PRECISIONS if each == facts.get("precision")), None)


def _parsed(content: bytes, path: Path, name: str) -> Json:
    """One fact of a JSON file of a run; runs of version 1 have no checksum of it."""
    try:
        return json.loads(content)[name]
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedFileError(
            f"{path} is damaged ({error!r}). Restore it, or delete it: the model is whole without it."
        ) from error


def run_images(
    facts: Mapping[str, Json],
    folder: Path,
    images: ImageSet | None,
    past: PastSplit | None,
    store: FeatureStore | None,
) -> ImageSet:
    """`images` in the class table and, without a split of their own, the split `past` of a saved run.

    None stands for no images: what a model that only predicts is given.

    Raises:
        FeatureStoreError: if they are labelled for another task, or have a class that the run lacks.
    """
    classes = composed_classes(facts["classes"])
    if images is None:
        images = no_images(classes, facts["task"])
    elif not images.is_labelled:
        images = replace(images, task=facts["task"])
    elif images.task != facts["task"]:
        raise FeatureStoreError(
            f"The model of {folder} is for the task {facts['task']}, and these images are labelled for "
            f"{images.task}. Give their labels so: --task {facts['task']}."
        )
    images = with_classes(images, classes, folder)
    if past is None:
        return images
    return past.applied(images, {} if store is None else store.known_digests(images))


def saved_backbone(saved: Run, folder: Path, module: nn.Module | None, *, trust_code: bool = False) -> StagedModel:
    """The backbone of a saved run, with the run's weights.

    Raises:
        FeatureStoreError: if it has no name and `module` isn't given, its source has changed, or it comes from a file
            that may not run here.
        WeightsError: if the tensors don't give the model that was saved.
    """
    facts = saved.facts["model"]
    if facts["is_absent"]:
        absent = StagedModel.absent(
            facts["stages"],
            view=View.from_facts(facts["view"]),
            name=facts["name"],
            class_tokens=facts["class_tokens"],
        )
        absent.prefix_tokens = facts.get("prefix_tokens", absent.class_tokens)
        return absent
    if module is not None:
        given = module if isinstance(module, StagedModel) else StagedModel.from_module(module)
        return restored(given, saved)
    if facts["architecture"] is None:
        raise FeatureStoreError(
            f"The backbone of {folder} was made in Python and has no name. Give it: Learner.load({str(folder)!r}, "
            "module=...)."
        )
    return restored(architecture(facts["architecture"], folder, trust_code=trust_code), saved, origin=str(folder))


def saved_head(facts: Mapping[str, Json], head: nn.Module | None, folder: Path) -> str | nn.Module:
    """The name of a saved run's head, or the module that its owner gives again.

    Raises:
        FeatureStoreError: if the head was a module and none is given: code is never loaded.
        ValueError: if one is given for a run that has a head by name.
    """
    if facts["name"] != "module":
        if head is not None:
            raise ValueError(
                f"The head of {folder} is {facts['name']}, and head is for a run whose head was a module of your own. "
                f"Leave it out; or make a new head: Learner(backbone({str(folder)!r}), images, head=...)."
            )
        return str(facts["name"])
    if head is None:
        raise FeatureStoreError(
            f"The head of {folder} was a module of your own. Give it: Learner.load({str(folder)!r}, head=...)."
        )
    return head


def check_options(options: Mapping[str, object], folder: Path) -> None:
    """Raises ValueError for what a saved run brings and can't be said again."""
    if twice := [name for name in ("cut", "reduce", "classes", "view") if name in options]:
        raise ValueError(
            f"The run {folder} brings its {' and its '.join(twice)}. Leave that out; what may be changed of a learner "
            f"is set once it is loaded (learn.view = ...), and Learner(backbone({str(folder)!r}), images, ...) makes a "
            "new head."
        )


def head_digest(model: StagedModel) -> str | None:
    """What a head of a person's own computes in eval mode, its tensors included; None if that can't be traced."""
    if model.head is None:
        return None
    try:
        return module_digest(model.head)
    except ModelError:
        return None


def check_head(model: StagedModel, facts: Mapping[str, Json], folder: Path) -> None:
    """Checks that the head given again computes what the saved one did: tensors of the same names say little.

    Raises:
        FeatureStoreError: if it computes something else.
    """
    digest = head_digest(model)
    if facts["name"] == "module" and facts["digest"] is not None and digest != facts["digest"]:
        raise FeatureStoreError(
            f"The head given for {folder} computes something else than the one that was saved (digest "
            f"{facts['digest'][:8]} expected, {'none' if digest is None else digest[:8]} found). Give the head as it "
            "was, with its layers and settings; its tensors come from the run."
        )


def with_statistics(tensors: Mapping[str, Tensor], model: StagedModel) -> Mapping[str, Tensor]:
    """The tensors of a run; earlier linear heads have no statistics, as they took their inputs as they are."""
    head = list(model.stages)[-1]
    if not isinstance(head, HeadStage) or not isinstance(head.module, LinearHead):
        return tensors
    made = {f"{head.name}.{name}": value for name, value in unstandardised(head.module.in_features).items()}
    return tensors if any(name in tensors for name in made) else {**tensors, **made}


def scored_of(sidecar: Sidecar | None) -> tuple[str, float] | None:
    """The digest of the images that a run was scored on, and its loss on them; None where it doesn't tell."""
    scored_on = None if sidecar is None else sidecar.scored_on
    loss = None if sidecar is None or "loss" not in sidecar.scores else sidecar.scores["loss"].value
    return None if scored_on is None or loss is None else (scored_on.digest, loss)


def past_split(backbone: StagedModel) -> PastSplit | None:
    """The split of the run that `backbone` comes from, if it comes from one."""
    run = backbone.origin.get("run")
    return None if run is None else PastSplit.read(Path(run), identity=backbone.origin["run_identity"])


def no_images(classes: tuple[str, ...], task: Task) -> ImageSet:
    """An empty image set with a run's class table: what a model that only predicts is given."""
    return ImageSet(
        name="none",
        ids=(),
        targets=None,
        classes=classes,
        splits=np.zeros(0, dtype="<U5"),
        groups=None,
        task=task,
        source=AbsentSource(where="nowhere"),
    )
