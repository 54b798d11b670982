"""Batch norm: its statistics estimated anew on other images, which makes another backbone, with other keys."""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import nn

from featstore.errors import OnError
from featstore.images.image_set import ImageSet
from featstore.images.views import Augment, View
from featstore.models.modes import mode_of
from featstore.models.staged import StagedModel
from featstore.models.trunk import choose_device
from training.inputs.batches import Batches
from training.inputs.derive import find
from training.inputs.situation import Situation
from training.loop.fit import check_any


def reestimate_batch_norm(
    model: StagedModel,
    images: ImageSet,
    *,
    view: View | None = None,
    augment: Augment | None = None,
    batch_size: int = 64,
    device: torch.device | str = "auto",
    seed: int = 0,
    workers: int | None = None,
    on_error: OnError = "raise",
) -> StagedModel:
    """A copy of `model` whose batch norms have the statistics of `images`; extract features with it then.

    They are the means of those of all batches, in one pass over the images in random order, as torch's `update_bn`
    takes them, with all else in eval mode. A last batch of one image is left out.

    Args:
        model: all of it is run, and no weight moves.
        images: to be classified later; labels aren't looked at.
        view: geometry and normalisation; default: the model's.
        augment: the first of its views is what is seen; default: the evaluation view.
        batch_size: the larger, the better each batch's variance is known.
        device: auto, cpu, cuda or cuda:1.
        seed: of the order.
        workers: threads that read images.
        on_error: an image that can't be read: ``raise``, or ``skip`` it.

    Raises:
        ValueError: if it has no batch norm with statistics, or there are fewer than two images or images a batch.
    """
    # Nobody can name it as the weights that it was made of.
    made = copy.deepcopy(model.with_(origin={}))
    made.unfreeze()
    norms = [
        module
        for module in made.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats
    ]
    if not norms or len(images) < 2:
        raise ValueError(
            f"{model.name} has {len(norms):,} batch norms with statistics, and there are {len(images):,} images; "
            "expected one and two at least. Without batch norm there is nothing to estimate."
        )
    if batch_size < 2:
        raise ValueError(
            f"batch_size is {batch_size}, and a single image has no statistics. Expected at least 2; the larger, the "
            "better each batch's variance is known."
        )
    made.to_device(choose_device(device))
    shuffled = images.select(np.random.default_rng(seed).permutation(len(images)).tolist())
    situation = Situation.of(made, shuffled, view=(view or model.view).evaluation, on_error=on_error)
    batches = Batches(find(situation, shuffled, augment), situation, batch_size=batch_size, workers=workers)
    momenta = [norm.momentum for norm in norms]
    num_batches = 0
    with torch.no_grad(), mode_of(made, training=False):
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum, norm.training = None, True
        for inputs, _ in batches.in_order():
            if len(inputs) > 1:
                made(inputs)
                num_batches += 1
    check_any(num_batches, batches)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return made
