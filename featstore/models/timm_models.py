"""timm's models as backbones: ``timm:NAME``, how they are cut, their weights and views; the one door to timm.

timm is imported when one of its names is asked for, not before.
"""

from __future__ import annotations

import difflib
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, nullcontext, suppress
from fnmatch import fnmatchcase
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

from featstore.digest import Json
from featstore.errors import FeatureStoreError, ModelError, WeightsError
from featstore.images.views import INTERPOLATIONS, View
from featstore.models.modes import WithoutValues, random_states_kept, seeded
from featstore.models.staged import StagedModel
from featstore.timing import timed

PREFIX = "timm:"
"""What the names of timm's models begin with here."""

HUB = "hf-hub:"
"""What timm's own names of models on the Hugging Face Hub begin with."""

_SECONDS = 10
"""How long the hub has for an answer. By itself its client tries again for minutes, for each file."""


def knows(name: str) -> bool:
    """Whether `name` has the form of a name of timm's."""
    return name.startswith(PREFIX)


def names(pattern: str | None = None) -> list[str]:
    """Those that match `pattern`, without tags of weights; without one none, as timm has more than a list can show."""
    if pattern is None or not knows(pattern):
        return []
    return [name for name in map(PREFIX.__add__, _timm().list_models()) if fnmatchcase(name, pattern)]


def weight_names(name: str) -> list[str]:
    """The tags of timm's weights for `name`: first the name's own or the default one."""
    chosen = _timm_name(name)
    if chosen.startswith(HUB):
        return []
    architecture, _, tag = chosen.partition(".")
    configurations = _timm().models.get_arch_pretrained_cfgs(architecture)
    tags = [each.partition(".")[2] for each, config in configurations.items() if config.has_weights]
    return sorted(filter(None, tags), key=lambda each: each != tag)


def about(name: str) -> dict[str, Json]:
    """Family and size, as timm says of the default weights; the number of parameters isn't known unmade."""
    chosen = _timm_name(name)
    config = _timm().get_pretrained_cfg(chosen)
    family = _timm().model_entrypoint(chosen).__module__.rpartition(".")[2]
    return {"family": family, "size": config.input_size[-1] if config else None, "parameters": None}


def outline(name: str) -> StagedModel:
    """Without any weights, on the meta device."""
    try:
        with WithoutValues(), random_states_kept():
            module = _made(_timm_name(name))
    except RuntimeError:  # it computes with what it makes
        with random_states_kept():
            module = _made(_timm_name(name))
    return _staged(module.to("meta"), name)


def initial(name: str, **architecture: Any) -> StagedModel:
    """With its seeded initialisation."""
    with seeded():
        module = _made(_timm_name(name), **architecture)
    return _staged(module, name, **architecture)


def pretrained(name: str, weights: str) -> StagedModel:
    """With timm's `weights`, from the cache or the network, and their view."""
    chosen = _timm_name(name)
    if not chosen.startswith(HUB):
        known = weight_names(name)
        if not known:
            raise WeightsError(f"timm has no weights for {name}. {_OTHERS}")
        chosen = f"{chosen.partition('.')[0]}.{known[0] if weights == 'DEFAULT' else weights}"
    with seeded():  # some have layers that their weights don't hold
        module = _made(chosen, pretrained=True)
    return _staged(module, name, weights=weights)


def class_names(name: str, weights: str) -> tuple[str, ...] | None:
    """ImageNet's names, where timm knows the weights as some ImageNet's; names that stand twice have their numbers."""
    timm, chosen = _timm(), _timm_name(name)
    if chosen.startswith(HUB):
        return None
    tagged = chosen if weights == "DEFAULT" else f"{chosen.partition('.')[0]}.{weights}"
    subset = timm.data.infer_imagenet_subset(timm.get_pretrained_cfg(tagged).to_dict())
    if subset is None:
        return None
    found = [each.partition(",")[0] for each in timm.data.ImageNetInfo(subset).label_descriptions()]
    counted = Counter(found)
    return tuple(f"{each} ({place})" if counted[each] > 1 else each for place, each in enumerate(found))


def unlisted() -> str | None:
    """How many models timm has, where it is installed, and how to list some."""
    if not find_spec("timm"):
        return None
    count = len(_timm().list_models())
    return f"timm is installed, with {count:,} more: featstore backbones '{PREFIX}*resnet*' lists those that match"


def twins(name: str) -> list[str]:
    """What the other of torchvision and timm calls the network `name`, if its tensors are called otherwise there."""
    if knows(name):
        architecture = name.removeprefix(PREFIX).partition(".")[0]
        return [theirs for theirs, ours in _TWINS.items() if ours == architecture]
    return [f"{PREFIX}{_TWINS[name]}"] if name in _TWINS and find_spec("timm") else []


def also_called(name: str) -> list[str]:
    """The name here of a model that was asked for by timm's own."""
    is_here = find_spec("timm") is not None and _timm().is_model(name.partition(".")[0])
    return [f"{PREFIX}{name}"] if is_here else []


def made_by(name: str) -> str:
    """The call that makes the module of `name`."""
    return f"timm.create_model({name.removeprefix(PREFIX)!r})"


_TWINS = {
    **{name: name for name in ("convnext_tiny", "convnext_small", "convnext_base", "convnext_large")},
    **{name: name for name in ("vgg11", "vgg11_bn", "vgg13", "vgg13_bn", "vgg16", "vgg16_bn", "vgg19", "vgg19_bn")},
    **{f"efficientnet_b{number}": f"efficientnet_b{number}" for number in range(8)},
    **{f"efficientnet_v2_{size}": f"efficientnetv2_{size}" for size in ("s", "m", "l")},
    "mobilenet_v2": "mobilenetv2_100",
    "mobilenet_v3_small": "mobilenetv3_small_100",
    "mobilenet_v3_large": "mobilenetv3_large_100",
    "mnasnet0_5": "mnasnet_050",
    "mnasnet0_75": "mnasnet_075",
    "mnasnet1_0": "mnasnet_100",
    "mnasnet1_3": "mnasnet_140",
    **{
        f"regnet_{kind}_{flops}": f"regnet{kind}_{ours}"
        for kind in ("x", "y")
        for flops, ours in (
            *(("400mf", "004"), ("800mf", "008"), ("1_6gf", "016"), ("3_2gf", "032")),
            *(("8gf", "080"), ("16gf", "160"), ("32gf", "320")),
        )
    },
    "vit_b_16": "vit_base_patch16_224",
    "vit_b_32": "vit_base_patch32_224",
    "vit_l_16": "vit_large_patch16_224",
    "vit_l_32": "vit_large_patch32_224",
    "vit_h_14": "vit_huge_patch14_224",
    **{f"swin_{size[0]}": f"swin_{size}_patch4_window7_224" for size in ("tiny", "small", "base")},
    **{f"swin_v2_{size[0]}": f"swinv2_{size}_window8_256" for size in ("tiny", "small", "base")},
}
"""torchvision's name -> timm's of the same network, where the two call its tensors otherwise."""


# ---------------------------------------------------------------------------------------------------------------- names


def _timm() -> ModuleType:
    try:
        import timm
        import timm.data
        import timm.layers
    except ImportError as error:
        raise FeatureStoreError(
            f"A backbone {PREFIX}NAME needs timm, which isn't installed. Install it with pip install 'featstore[timm]' "
            "(or pip install timm), or choose one of those that featstore backbones lists."
        ) from error
    return timm


def _timm_name(name: str) -> str:
    """What timm calls `name`; ValueError for a name that it doesn't have."""
    timm, chosen = _timm(), name.removeprefix(PREFIX)
    if chosen.startswith(HUB):
        return chosen
    architecture, _, tag = chosen.partition(".")
    if not timm.is_model(architecture):
        known = timm.list_models()
        inside = [each for each in known if architecture and architecture in each][:3]
        close = dict.fromkeys([*difflib.get_close_matches(architecture, known), *inside])
        raise ValueError(
            f"timm {timm.__version__} has no model {architecture!r}. Expected "
            f"{''.join(f'{PREFIX}{each}, ' for each in close)}{'or ' if close else ''}one of the {len(known):,} names "
            f"that featstore backbones '{PREFIX}*' lists (in Python: backbone_names(\"{PREFIX}*\"))."
        )
    if tag and not timm.is_model_pretrained(chosen):
        tags = weight_names(f"{PREFIX}{architecture}")
        raise ValueError(
            f"timm {timm.__version__} has no weights {tag!r} for {architecture}. Expected {', '.join(tags) or 'none'}: "
            f"{PREFIX}{'.'.join([architecture, *tags[:1]])}."
        )
    return chosen


# -------------------------------------------------------------------------------------------------------------- weights

_OTHERS = (
    'Give --weights FILE, or --weights none for a random initialisation (in Python: weights=FILE, weights="none").'
)


@contextmanager
def _explained(chosen: str) -> Iterator[None]:
    """Turns whatever keeps weights from being had into a WeightsError that says where they belong."""
    files = _Files.of(chosen)
    try:
        files.refuse_unreachable()
        yield
    except Exception as error:
        # Of the hub's own errors some are no OSError: those of its HTTP client.
        if not isinstance(error, OSError) and type(error).__module__.partition(".")[0] not in _HTTP_CLIENTS:
            raise
        others = "" if chosen.startswith(HUB) else f"; or give{_OTHERS.removeprefix('Give').rstrip('.')}"
        command = f"python -c \"import timm; timm.create_model('{chosen}', pretrained=True)\""
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise WeightsError(
            f"The weights of {PREFIX}{chosen} aren't here and can't be downloaded ({reason}). They are {files.what}, "
            f"which belongs into {files.folder}. On a machine with network, run {command} and copy it{others}."
        ) from error


_HTTP_CLIENTS = {"httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3", "huggingface_hub"}


class _Files:
    """Where timm finds the weights that it calls by a name."""

    def __init__(self, what: str, folder: Path, repository: str | None) -> None:
        self.what, self.folder, self.repository = what, folder, repository

    @classmethod
    def of(cls, chosen: str) -> _Files:
        if chosen.startswith(HUB):
            repository = chosen.removeprefix(HUB)
        else:
            config = _timm().get_pretrained_cfg(chosen)
            if not config.hf_hub_id:
                file = str(config.url).rpartition("/")[2]
                return cls(f"the file {file}", Path(torch.hub.get_dir()) / "checkpoints", None)
            repository = config.hf_hub_id
        from huggingface_hub import constants

        repository = repository.partition("@")[0]
        cache = Path(constants.HF_HUB_CACHE)
        folder = f"models--{repository.replace('/', '--')}"
        return cls(f"the folder {folder} (the repository {repository} of huggingface.co)", cache, repository)

    def refuse_unreachable(self) -> None:
        """Raises the error of a first, short try to reach the hub, where nothing of the repository is in the cache."""
        if self.repository is None or any(
            self.folder.glob(f"models--{self.repository.replace('/', '--')}/snapshots/*/*")
        ):
            return
        from huggingface_hub import get_hf_file_metadata, hf_hub_url
        from huggingface_hub.errors import HfHubHTTPError

        with suppress(HfHubHTTPError):  # it answers
            get_hf_file_metadata(hf_hub_url(self.repository, "config.json"), timeout=_SECONDS)


# --------------------------------------------------------------------------------------------------------------- models


def _made(chosen: str, *, pretrained: bool = False, **arguments: Any) -> nn.Module:
    timm = _timm()
    with timed("load"), _timms_defaults():
        make: Callable[..., nn.Module] = timm.create_model
        with _explained(chosen) if pretrained or chosen.startswith(HUB) else nullcontext():
            module = make(chosen, pretrained=pretrained, **arguments)
            if getattr(module, "dynamic_img_size", False):  # its forward asks for the image's size: no trace has one
                module = make(chosen, pretrained=pretrained, **{**arguments, "dynamic_img_size": False})
    return module


@contextmanager
def _timms_defaults() -> Iterator[None]:
    """Layers as timm makes them by default, whatever switches of its own are set: they would make other operations."""
    layers = _timm().layers
    with layers.set_layer_config(scriptable=False, exportable=False, no_jit=False):
        before = layers.use_fused_attn(), layers.use_fused_attn(experimental=True)
        layers.set_fused_attn(True)
        try:
            yield
        finally:
            layers.set_fused_attn(*before)


def _staged(module: nn.Module, name: str, *, weights: str = "none", **architecture: Any) -> StagedModel:
    config: dict[str, Any] = module.pretrained_cfg  # type: ignore[assignment]
    view, arguments = _view(config, name), _arguments(module, config, architecture)
    size = arguments.get("img_size")
    if size is not None and view.size != size:
        view = view.resized(size=size)
    features = _features(module)
    tokens = {each.rpartition(".")[2]: value for each, value in module.named_parameters()}
    classes = [value.shape[1] for each, value in tokens.items() if each.startswith("cls_token")]
    prefix = getattr(module, "num_prefix_tokens", None)
    prefix = max(classes, default=0) if prefix is None else int(prefix)  # a distilled PiT's are two in one
    model = StagedModel.from_module(
        module.eval(),
        view=view,
        name=name,
        class_tokens=int(bool(classes) and prefix > 0),
        containers=_containers(module, features),
        origin={
            "backbone": name,
            "weights": weights,
            "architecture": {"name": f"{PREFIX}{config['architecture']}", **arguments},
        },
        fixed_size=size,
    )
    model.prefix_tokens = prefix
    _refuse_caches(model, name)
    with suppress(ModelError):  # it takes no images of its view's size: whoever asks for a shape is told
        model.find_patches()
        model = model.with_(default_cut=_default_cut(model, features))
    return model


def _refuse_caches(model: StagedModel, name: str) -> None:
    """Raises ModelError for modules that no trace enters, and that keep what they once made of their parameters."""
    parts = (part for part in model.modules() if not isinstance(part, GraphModule))
    keeping = next((part for part in parts if getattr(part, "attention_bias_cache", None) is not None), None)
    if keeping is not None:
        raise ModelError(
            f"{name} has code that can't be traced and that keeps a table of biases from its first run on "
            f"({type(keeping).__name__}.attention_bias_cache): no key can cover it, and training would go on with the "
            "old ones. Choose another backbone."
        )


def _arguments(module: nn.Module, config: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """What makes the architecture beside its name, and differs from weights to weights."""
    arguments = {**getattr(module, "pretrained_model_args", {}), **given}
    arguments["num_classes"] = int(module.num_classes)  # type: ignore[arg-type]
    if config.get("fixed_input_size"):
        arguments.setdefault("img_size", config["input_size"][-1])
    return arguments


def _features(module: nn.Module) -> list[str]:
    """The paths of the modules that timm itself takes features from."""
    entries = getattr(module, "feature_info", None) or []
    entries = getattr(entries, "info", entries)
    return [entry["module"] for entry in entries if isinstance(entry, dict) and "module" in entry]


def _containers(module: nn.Module, features: Collection[str]) -> set[str]:
    """Modules that end in one that timm takes features from: ``blocks.11`` says more than ``blocks``."""
    found = set()
    for feature in features:
        outer, _, last = feature.rpartition(".")
        while outer:
            with suppress(AttributeError):  # some names stand for no module
                *_, (end, _module) = module.get_submodule(outer).named_children()
                if end == last:
                    found.add(outer)
            outer, _, last = outer.rpartition(".")
    return found


def _default_cut(model: StagedModel, features: Collection[str]) -> str:
    """The model's own default, but before the slice of patches that timm's pooling takes, by timm's name for it."""
    stages, place = model.ordered, model.index(model.default_cut)
    while place and (
        stages[place].name in model.patch_cuts or stages[place].name.rpartition(".")[2].startswith("getitem")
    ):
        place -= 1
    for later in stages[place + 1 :]:
        if later.has_effect:
            break
        if later.name in features:
            return later.name
    return stages[place].name


# ---------------------------------------------------------------------------------------------------------------- views


def _view(config: dict[str, Any], name: str) -> View:
    """The view that timm evaluates the weights with.

    Raises:
        ModelError: for what a view can't do.
    """
    data = _timm().data.resolve_data_config(pretrained_cfg=config)
    channels, height, width = data["input_size"]
    resize = math.floor(height / data["crop_pct"])
    wrong = [
        (channels not in (1, 3), f"takes images of {channels} channels"),
        (height != width, f"takes images of {width} x {height} pixels"),
        (data["crop_mode"] not in ("center", "squash"), f"is evaluated with crop_mode {data['crop_mode']}"),
        (resize < height, f"is evaluated on images of {resize} pixels with a border up to {height}"),
        (data["interpolation"] not in INTERPOLATIONS, f"is evaluated with the interpolation {data['interpolation']}"),
    ]
    for is_so, what in wrong:
        if is_so:
            raise ModelError(
                f"{name} {what}, and a view here is the central square, in colours or gray. Choose other weights "
                f"(featstore backbones '{PREFIX}{config['architecture']}'), or accept another view in Python: "
                f"StagedModel.from_module(timm.create_model({name.removeprefix(PREFIX)!r}, pretrained=True), "
                "view=View(size=..., resize=...))."
            )
    return View(
        channels=channels,
        size=height,
        resize=resize,
        squash=data["crop_mode"] == "squash",
        interpolation=data["interpolation"],
        mean=tuple(data["mean"]),
        std=tuple(data["std"]),
    )
