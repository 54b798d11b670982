"""Check of a split: at each cut of a StagedModel, the tail of a copy of the trunk's output is the model, bit for bit.

Every parameter and statistic is drawn at random first, and each stage is shown to matter, since default initialisation
would make the check empty: a ViT's head starts at zero, and a stage that changes nothing can't be lost.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from featstore.models.modes import mode_of
from featstore.models.staged import StagedModel
from featstore.models.stages import Stage

SEEN = 1e-3
"""The smallest change, relative to the largest value, that counts: float32 rounding stays far below it."""

GAIN = 1.6
"""Variance of a layer's weights times its fan-in. Through ReLUs 2 keeps values as large as they came in, but makes them
grow by 2 ** 25 through 50 residual blocks; with less than 1 the images can't be told apart behind 20 plain layers."""


@dataclass(frozen=True, kw_only=True)
class CheckedCut:
    """A cut that has passed: its name, the shape of the activations there, and how far its stage moves the logits."""

    name: str
    shape: tuple[int, ...]
    change: float


def check_split(model: StagedModel, images: Tensor, module: nn.Module | None = None, *, every: int = 1) -> None:
    """Randomises `model`, then asserts everything `checked_cuts` asserts, at every cut."""
    randomise_for(model, images)
    for _ in checked_cuts(model, images, module, every=every):
        pass


def randomise_for(model: StagedModel, images: Tensor) -> None:
    """Draws `model` such that it tells `images` apart: where gates and SiLUs make values smaller, with more gain."""
    for gain in (GAIN, 2.5, 4.0, 1.0):
        randomise(model, seed=1, gain=gain)
        with mode_of(model, training=False):
            logits = _run(model, images, False)
        # Ten times as much as is asked for: of efficientnet_b7's stages some move the logits by less than images do.
        if logits.isfinite().all() and _difference(logits[0], logits[1]) > 10 * SEEN:
            return


def checked_cuts(
    model: StagedModel, images: Tensor, module: nn.Module | None = None, *, every: int = 1
) -> Iterator[CheckedCut]:
    """The stages' cuts in order, each after its checks have passed.

    Args:
        model: randomised, with nothing frozen; it runs in eval mode and is left as it was.
        images: at least two different ones, float ``(N, 3, H, W)``.
        module: the network that `model` was made from, with the same tensors: its output is what is expected. Default:
            the model's own.
        every: checks every so manyth cut, from the last backwards.

    Raises:
        AssertionError: if a parameter is in no stage or in two; if the logits of two images hardly differ, or hardly
            change when a stage's tensors are drawn anew (where it has none: when its output is scaled); if
            ``tail(trunk(x))`` isn't the network's output to the last bit, with or without gradient.
    """
    assert model.num_frozen == 0, f"{model.name} has frozen stages, which never run with gradient; unfreeze() it first."
    _check_each_parameter_is_in_one_stage(model, module)
    network = module or model
    with mode_of(model, training=False), mode_of(network, training=False):
        expected = {with_gradient: _run(network, images, with_gradient).detach() for with_gradient in (False, True)}
        _check_images_differ(model, expected[False])
        yield from _walked(model, images, expected, every)


def randomise(module: nn.Module, seed: int, gain: float = GAIN) -> None:
    """Draws each parameter and batch-norm statistic below `module` anew, such that values neither grow nor vanish."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for part in module.modules():
            for name, tensor in (*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)):
                _draw(tensor, name, part, generator, gain)


def _draw(tensor: Tensor, name: str, owner: nn.Module, generator: torch.Generator, gain: float) -> None:
    # A norm of another library that was traced is there as its operations; a weight of one dimension is a norm's.
    is_norm = isinstance(owner, nn.LayerNorm | nn.GroupNorm | nn.modules.batchnorm._NormBase) or tensor.ndim == 1
    if name == "running_var":
        tensor.uniform_(0.5, 1.5, generator=generator)
    elif is_norm and name == "weight":
        tensor.uniform_(0.8, 1.2, generator=generator)
    elif name == "running_mean" or (isinstance(tensor, nn.Parameter) and tensor.ndim < 2):
        tensor.normal_(0, 0.1, generator=generator)
    elif isinstance(tensor, nn.Parameter):
        # Else a token, an embedding of positions.
        is_layer = type(owner).__module__.startswith("torch.nn.") or isinstance(
            owner, nn.Linear | nn.modules.conv._ConvNd
        )
        fan_in = tensor[0].numel() if is_layer else 1
        tensor.normal_(0, math.sqrt(gain / fan_in), generator=generator)


def _check_each_parameter_is_in_one_stage(model: StagedModel, module: nn.Module | None) -> None:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    places = Counter(id(parameter) for stage in model.stages for parameter in stage.parameters())
    shared = [names[key] for key, count in places.items() if count > 1]
    assert not shared, f"{model.name} has parameters in more than one stage: {shared}."
    if module is not None:
        missing = (set(module.state_dict()) - model.unused) ^ {*model.tensors(), *model.other_names}
        assert not missing, f"The stages of {model.name} and the module hold different tensors: {sorted(missing)}."


def _check_images_differ(model: StagedModel, logits: Tensor) -> None:
    assert logits.isfinite().all(), f"{model.name} gives logits that aren't finite; the draw is too large for it."
    difference = _difference(logits[0], logits[1])
    assert difference > SEEN, f"The logits of two images of {model.name} differ by {difference:.1e} only."


def _walked(model: StagedModel, images: Tensor, expected: dict[bool, Tensor], every: int) -> Iterator[CheckedCut]:
    """One pass through the stages in each grad mode, which holds the activations at one cut at a time."""
    activations = dict.fromkeys(expected, images)
    for index, stage in enumerate(model.ordered):
        tail = model.tail(stage.name)
        assert [*model.trunk(stage.name), *tail] == list(model.ordered), (
            f"{stage.name}: trunk and tail aren't the model."
        )
        before = _stored(activations[False][:1])
        for with_gradient in expected:
            activations[with_gradient] = _run(stage, activations[with_gradient], with_gradient)
        if (len(model.stages) - 1 - index) % every:
            continue
        change = _change_by(stage, tail, before, expected[False][:1], seed=1000 + index)
        assert change > SEEN, f"{stage.name} of {model.name} changes the logits by {change:.1e} only."
        for with_gradient, logits in expected.items():
            # An in-place operation at the next stage's start writes into a copy here, as it does for stored features.
            result = _run(tail, _stored(activations[with_gradient]), with_gradient)
            off = _difference(logits, result)
            assert torch.equal(logits, result), (
                f"tail(trunk(x)) of {model.name} at {stage.name} isn't model(x) "
                f"{'with' if with_gradient else 'without'} gradient: off by {off:.1e} of the largest logit."
            )
        yield CheckedCut(name=stage.name, shape=tuple(activations[False].shape[1:]), change=change)


def _change_by(stage: Stage, tail: nn.Module, inputs: Tensor, logits: Tensor, *, seed: int) -> float:
    """How far the logits move when the stage's tensors are drawn anew, or its output is scaled where it has none."""
    if not any(True for _ in stage.parameters()):
        outputs = _run(stage, inputs, False)
        # A factor for each value: a norm behind the stage would undo a common one.
        factors = torch.empty_like(outputs).uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(seed))
        return _difference(logits, _run(tail, outputs * factors, False))
    before = {name: tensor.clone() for name, tensor in stage.state_dict().items()}
    try:
        randomise(stage, seed)
        return _difference(logits, _run(tail, _run(stage, inputs, False), False))
    finally:
        stage.load_state_dict(before)


def _run(module: nn.Module, inputs: Tensor, with_gradient: bool) -> Tensor:
    with torch.set_grad_enabled(with_gradient):
        outputs: Tensor = module(inputs)
    return outputs


def _stored(activations: Tensor) -> Tensor:
    """What a store gives back: the same values, in memory of their own, contiguous, without history."""
    return activations.detach().clone(memory_format=torch.contiguous_format)


def _difference(first: Tensor, second: Tensor) -> float:
    """The largest difference relative to the largest value of both."""
    first, second = first.detach(), second.detach()
    return float((first - second).abs().max() / torch.maximum(first.abs(), second.abs()).max())
