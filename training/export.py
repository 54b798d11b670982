"""Export: a whole model as a file for other programs, which is read anew and compared before it gets its name."""

from __future__ import annotations

import copy
import json
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from featstore import __version__
from featstore.digest import Json
from featstore.errors import FeatureStoreError, ModelError, check_choice
from featstore.images.image_set import ImageSet
from featstore.images.names import Task
from featstore.images.render import Job, render
from featstore.images.views import View
from featstore.models.backbones import architecture
from featstore.models.modes import mode_of, numerics
from featstore.models.runs import FACTS as RUN_FACTS
from featstore.models.staged import StagedModel
from featstore.models.stages import HeadStage, PoolStage, Stage
from featstore.models.weights import read_tensors
from featstore.words import printable, size_text
from training.choices import EXPORTS
from training.standardised import LinearHead, ValueHead

TOLERANCE = 1e-4
"""How far an exported model's logits may be from the live one's, as a part of the largest of these. Other programs join
layers and sum in another order: measured, 4e-6 at most for ten networks of torchvision's and timm's."""

NUM_COMPARED = 16
_MOST_ONNX_BYTES = 2**31 - 2**20  # a message of Protocol Buffers, less what the graph may take
_METADATA = "featstore"

_PROBABILITIES: dict[Task, str] = {
    "single": "softmax over the classes",
    "multi": "sigmoid of each logit",
    "regression": "none: the outputs are the numbers named by classes",
}


@dataclass(frozen=True, kw_only=True)
class ExportReport:
    """What an export wrote, and how it compares.

    Attributes:
        format: a key of `choices.EXPORTS`.
        files: the one that was asked for first; the last is the JSON about it.
        bytes: of all files.
        difference: the largest between the exported and the live model's outputs.
        tolerance: the largest that was allowed.
        compared: on what, in words.
    """

    format: str
    files: tuple[Path, ...]
    bytes: int
    difference: float
    tolerance: float
    compared: str

    def __str__(self) -> str:
        return (
            f"{', '.join(map(str, self.files))} ({self.format}, {size_text(self.bytes)}): on {self.compared} its "
            f"outputs differ from the model's by at most {self.difference:.2g}, of {self.tolerance:.2g} allowed"
        )

    def facts(self) -> Json:
        """As JSON."""
        return {**vars(self), "files": [str(path) for path in self.files]}


def exported(
    model: StagedModel,
    path: str | Path,
    *,
    format: str | None,
    overwrite: bool,
    view: View,
    images: ImageSet,
    compare_on: ImageSet | None = None,
    temperature: float = 1.0,
) -> ExportReport:
    """Writes `model` to `path`, and JSON of what its user must know beside it, ``PATH.json``.

    pt2 and onnx hold all from uint8 views ``(N, C, size, size)``, N any number, to logits ``(N, K)``: the mean and
    deviation are in them. Resizing and cropping are not; they stand in the JSON. state-dict holds the tensors up to
    the head under the names that the backbone's own library gives them; the head's lie in another file beside.

    Args:
        model: whose output is logits.
        path: of the new file.
        format: a key of `choices.EXPORTS`; default: what the path's ending says.
        overwrite: replaces files of these names.
        view: of its images.
        images: say classes and task.
        compare_on: images that outputs are compared on, the first of them; default: the first of `images` that are held
            out, or of all where fewer than two are. Pixels are drawn at random where fewer than two can be read.
        temperature: that the logits are divided by before they are probabilities. pt2 and onnx do so themselves; of
            tensors the JSON says it.

    Raises:
        ValueError: for a format or an ending that there isn't, and a folder that isn't there.
        FeatureStoreError: if a file exists, the trunk is absent, or the outputs differ; no file is left then.
        ModelError: if the network can't be written in this format.
    """
    path = Path(path)
    chosen = _format_of(path, format)
    if model.is_absent:
        raise FeatureStoreError(
            f"The trunk of {model.name} isn't here, only its digests, so there is no whole model to export. Expected "
            "one with its weights. Attach it first: learn.attach(model)."
        )
    _check_installed(chosen, model)
    has_head_file = chosen == "state-dict" and model.head is not None and bool(model.head.state_dict())
    files = (path, *([_head_path(path)] if has_head_file else []), path.with_name(f"{path.name}.json"))
    _check_free(files, overwrite=overwrite)
    folded = 1.0 if chosen == "state-dict" else temperature
    about = _about(path, chosen, model, view, images)
    if temperature != 1:
        about["temperature"] = {"value": temperature, "is_in_logits": folded != 1}
        if folded == 1:
            about["probabilities"] += f", after logits are divided by the temperature {temperature!r}"
    plain = _Plain.of(model, view, about, folded)
    pixels, compared = _pixels(images, compare_on, view)
    live = _outputs(model, view.normalise(pixels)) / folded
    with _made_beside(files) as made:
        run = _WRITERS[chosen](made / path.name, plain)
        with torch.no_grad(), numerics("fp32", pixels.device):
            outputs = torch.cat([run(pixels[:1]), run(pixels[1:])])  # in batches of two sizes
        difference, allowed = float((outputs - live).abs().max()), TOLERANCE * float(live.abs().max())
        if not difference <= allowed:  # NaN isn't either
            raise FeatureStoreError(
                f"What was written as {chosen} isn't the model: on {compared} its outputs differ by up to "
                f"{difference:.2g}; expected at most {allowed:.2g}. {path} was not kept. Choose another format: "
                f"{', '.join(each for each in EXPORTS if each != chosen)}."
            )
        plain.about["comparison"] = {"on": compared, "largest_difference": difference, "allowed": allowed}
        (made / files[-1].name).write_text(_json(plain.about) + "\n", encoding="ascii")
    return ExportReport(
        format=chosen,
        files=files,
        bytes=sum(file.stat().st_size for file in files),
        difference=difference,
        tolerance=allowed,
        compared=compared,
    )


# ---- what is compared


def _pixels(images: ImageSet, compare_on: ImageSet | None, view: View) -> tuple[Tensor, str]:
    """Views ``(N, C, size, size)`` uint8 to compare outputs on, two at least, and what they are."""
    is_valid = compare_on is None and len(images.valid) > 1
    chosen = images.valid if is_valid else images if compare_on is None else compare_on
    chosen = chosen.select(range(min(len(chosen), NUM_COMPARED)))
    digests = chosen.digests()
    jobs = (
        Job(row, bytes(digests.values[row]), (view.evaluation,))
        for row in range(len(chosen))
        if not digests.is_failed[row]
    )
    found = [each.views[0] for each in render(chosen, jobs, workers=0, on_error="skip") if each.views is not None]
    if len(found) > 1:
        return torch.stack(found), f"{len(found)} {'validation ' * is_valid}images"
    shape = NUM_COMPARED, view.channels, view.size, view.size
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    return drawn, f"{NUM_COMPARED} images of random pixels"


def _outputs(model: StagedModel, images: Tensor) -> Tensor:
    device = next(iter(model.tensors().values())).device
    with torch.no_grad(), mode_of(model, training=False), numerics("fp32", device):
        outputs: Tensor = model(images.to(device))
    return outputs.float().cpu()


# ---- the formats


@dataclass(frozen=True, kw_only=True, eq=False)
class _Plain:
    """A model's copy for other programs: on the CPU, in eval mode, the scaling of a linear head folded into it.

    Attributes:
        stages: in order.
        other_names: of tensors that have several names -> the one that stands for all.
        network: the stages behind what makes their input of uint8 views.
        about: the JSON about it.
    """

    stages: tuple[Stage, ...]
    other_names: Mapping[str, str]
    network: nn.Sequential
    about: dict[str, Json]

    @classmethod
    def of(cls, model: StagedModel, view: View, about: dict[str, Json], temperature: float) -> _Plain:
        stages: tuple[Stage, ...] = copy.deepcopy(model.ordered)
        last = stages[-1]
        if isinstance(last, HeadStage):
            last.module = _folded(last.module)
        end = [] if temperature == 1 else [_Divide(temperature)]
        network = nn.Sequential(_Normalise(view), *stages, *end).cpu().eval().requires_grad_(False)
        return cls(stages=stages, other_names=model.other_names, network=network, about=about)

    @property
    def trunk(self) -> dict[str, Tensor]:
        """All tensors but the head's, under all names that they have in the network they come from."""
        stages = [stage for stage in self.stages if not isinstance(stage, HeadStage)]
        tensors = {name: value for stage in stages for name, value in stage.tensors().items()}
        return tensors | {other: tensors[name] for other, name in self.other_names.items() if name in tensors}

    @property
    def head(self) -> dict[str, Tensor]:
        """The head's tensors under the names in its own module; empty without a head, or for one without tensors."""
        last = self.stages[-1]
        return dict(last.module.state_dict()) if isinstance(last, HeadStage) else {}


class _Normalise(nn.Module):
    """What `View.normalise` does, without a check of sizes, which tracing can't follow."""

    mean: Tensor
    std: Tensor

    def __init__(self, view: View) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(view.mean).reshape(-1, 1, 1))
        self.register_buffer("std", torch.tensor(view.std).reshape(-1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        return (images.to(torch.float32) / 255.0 - self.mean) / self.std


class _Divide(nn.Module):
    """Logits over the temperature of a calibration."""

    def __init__(self, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature

    def forward(self, logits: Tensor) -> Tensor:
        return logits / self.temperature


def _folded(head: nn.Module) -> nn.Module:
    if isinstance(head, LinearHead):
        return head.folded()
    if isinstance(head, ValueHead):
        head.head = _folded(head.head)
    return head


_Run = Callable[[Tensor], Tensor]
"""From uint8 views to logits, by what was written."""


def _write_pt2(path: Path, plain: _Plain) -> _Run:
    torch.export.save(_program(plain, "pt2"), path, extra_files={f"{_METADATA}.json": _json(plain.about)})
    with warnings.catch_warnings():  # torch 2.11 says so of what it has read itself
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        return torch.export.load(path).module()


def _write_onnx(path: Path, plain: _Plain) -> _Run:
    import onnxruntime

    program = _program(plain, "onnx")
    with _explained(plain, "onnx"):
        written = torch.onnx.export(
            program, (), dynamo=True, input_names=["images"], output_names=["logits"], verbose=False
        )
    assert written is not None
    written.model.metadata_props[_METADATA] = _json(plain.about)
    written.save(path, external_data=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def _write_tensors(path: Path, plain: _Plain) -> _Run:
    for file, tensors in ((path, plain.trunk), (_head_path(path), plain.head)):
        if tensors:
            _save(file, tensors, plain.about)
            read, _ = read_tensors(file)
            with torch.no_grad():
                for name, value in tensors.items():
                    value.copy_(read[name])  # what is compared is what the file holds
    return plain.network


def _save(path: Path, tensors: Mapping[str, Tensor], about: dict[str, Json]) -> None:
    # Copies: safetensors refuses tensors that share memory, and torch would write all of what they are a part of.
    own = {name: value.detach().contiguous().clone() for name, value in tensors.items()}
    if path.suffix != ".safetensors":
        torch.save(own, path)
        return
    from safetensors.torch import save

    path.write_bytes(save(own, {"format": "pt", _METADATA: _json(about)}))


_WRITERS: dict[str, Callable[[Path, _Plain], _Run]] = {
    "pt2": _write_pt2,
    "onnx": _write_onnx,
    "state-dict": _write_tensors,
}


def _program(plain: _Plain, format: str) -> torch.export.ExportedProgram:
    example = torch.zeros((2, *plain.about["input"]["shape"][1:]), dtype=torch.uint8)
    with _explained(plain, format):
        return torch.export.export(plain.network, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))


@contextmanager
def _explained(plain: _Plain, format: str) -> Iterator[None]:
    """Says of what torch can't write, which may fail in any way, which network it is and what else there is."""
    try:
        yield
    except Exception as error:
        first = printable(str(error).strip().partition("\n")[0], is_one_line=True)
        raise ModelError(
            f"torch can't write {plain.about['network']} as {format} ({type(error).__name__}: {first}). Expected one "
            "whose operations it can, for any number of images. Export its tensors: state-dict."
        ) from error


def _check_installed(format: str, model: StagedModel) -> None:
    """Checks that an onnx file can be made, before anything is computed."""
    if format != "onnx":
        return
    lacking = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
    if lacking:
        raise ModuleNotFoundError(
            f"An onnx file needs {' and '.join(lacking)}, which isn't installed. Run pip install 'featstore[onnx]', or "
            "export as pt2 or state-dict.",
            name=lacking[0],
        )
    num_bytes = sum(tensor.nbytes for tensor in model.tensors().values())
    if num_bytes > _MOST_ONNX_BYTES:
        raise FeatureStoreError(
            f"The tensors of {model.name} are {size_text(num_bytes)}, and a single onnx file holds at most "
            f"{size_text(_MOST_ONNX_BYTES)}. Export them as pt2 or state-dict."
        )


# ---- what its user must know


def _about(
    path: Path,
    format: str,
    model: StagedModel,
    view: View,
    images: ImageSet,
) -> dict[str, Json]:
    side = view.size
    how = "both sides" if view.squash else "the shorter side"
    preparation = [
        f"decode to RGB{', turned as the EXIF data say' * view.apply_exif}",
        f"resize {how} to {view.resize} pixels ({view.interpolation}, {'' if view.antialias else 'not '}antialiased)",
        f"crop the central {side} x {side} pixels",
    ]
    if view.channels == 1:
        preparation.append("make it gray, as Pillow's L")
    if format == "state-dict":
        preparation.append("divide by 255, subtract view.mean and divide by view.std, channel by channel")
    about: dict[str, Json] = {
        "format": format,
        "network": model.name,
        "input": {
            "name": "images",
            "type": "float32" if format == "state-dict" else "uint8",
            "shape": ["batch", view.channels, side, side],
        },
        "output": {"name": "logits", "type": "float32", "shape": ["batch", len(images.classes)]},
        "probabilities": _PROBABILITIES[images.task],
        "task": images.task,
        "classes": list(images.classes),
        "preparation": preparation,
        "view": view.facts(),
        "use": _USE[format].format(file=path.name),
        "made_by": {"featstore": __version__, "torch": torch.__version__},
    }
    return {**about, **_about_tensors(path, model)} if format == "state-dict" else about


_USE = {
    "pt2": "network = torch.export.load({file!r}).module(); logits = network(images)",
    "onnx": "(logits,) = onnxruntime.InferenceSession({file!r}).run(None, {{'images': images}})",
    "state-dict": "network.load_state_dict(tensors), with an Identity in place of each layer that is listed as absent",
}


def _about_tensors(path: Path, model: StagedModel) -> dict[str, Json]:
    """Which network the tensors are of, what it has besides, and what stands between it and the head."""
    facts = model.origin.get("architecture") or {}
    pools = [stage.pool.facts() for stage in model.ordered if isinstance(stage, PoolStage)]
    absent: Json = None
    if "name" in facts:
        whole = architecture(facts, path)
        absent = sorted({*whole.tensors(), *whole.unused, *whole.other_names} - {*model.tensors(), *model.other_names})
    return {
        "backbone": facts.get("name"),
        "cut": model.cut_points[-1],
        "absent": absent,
        "pool": pools[-1] if pools else None,
        "head": None if model.head is None else {"file": _head_path(path).name, "layers": str(model.head)},
    }


def _json(about: Mapping[str, Json]) -> str:
    return json.dumps(about, indent=1)  # ASCII, which every format's metadata take


# ---- files


def _format_of(path: Path, format: str | None) -> str:
    """The format that is asked for, by name or by the path's ending."""
    if format is not None:
        check_choice("format", format, list(EXPORTS))
    fitting = [each for each, endings in EXPORTS.items() if path.suffix in endings and format in (None, each)]
    if not fitting:
        endings = EXPORTS[format] if format is not None else [each for some in EXPORTS.values() for each in some]
        raise ValueError(
            f"The file {path} ends in {path.suffix or 'nothing'}; expected {' or '.join(endings)}"
            f"{'' if format is None else f' for the format {format}'}. Name it so."
        )
    return fitting[0]


def _head_path(path: Path) -> Path:
    return path.with_name(f"{path.stem}.head{path.suffix}")


def _check_free(files: Sequence[Path], *, overwrite: bool) -> None:
    folder = files[0].parent
    if not folder.is_dir():
        raise ValueError(f"There is no folder {folder}. Expected one for {files[0].name}. Make it first.")
    if (folder / RUN_FACTS).is_file():
        raise FeatureStoreError(
            f"{folder} holds a saved run, whose folder holds nothing else. Expected another one for {files[0].name}. "
            "Choose another folder."
        )
    taken = [file for file in files if os.path.lexists(file)]
    if taken and not (overwrite and all(file.is_file() for file in taken)):
        raise FeatureStoreError(
            f"{taken[0]} exists already. Choose another name, or replace it with --overwrite (in Python: "
            "overwrite=True)."
        )


@contextmanager
def _made_beside(files: Sequence[Path]) -> Iterator[Path]:
    """A hidden folder to write files of these names in; when the block ends well they lie where they belong, synced."""
    folder = files[0].parent
    with tempfile.TemporaryDirectory(prefix=f".{files[0].name}.", dir=folder) as made:
        yield Path(made)
        for file in reversed(files):  # the one that was asked for comes last
            with (Path(made) / file.name).open("rb+") as written:
                os.fsync(written.fileno())
            os.replace(Path(made) / file.name, file)
