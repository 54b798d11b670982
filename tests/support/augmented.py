"""Views of every policy of a made-up image, for processes that import little else."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import torch
from torch import Tensor

from featstore.images.digests import content_digest
from featstore.images.image_set import ImageSet
from featstore.images.policies import BUILT_IN
from featstore.images.render import Job, render
from featstore.images.views import View

EVERY = [
    *(name for name in BUILT_IN if name != "none"),
    "side_on:max_zoom=1.3,crop=googlenet",
    "side_on:crop=no",
    "basic:crop=centre,pad=9,rotation_probability=1",
    "rotate:probability=1+random_resized_crop+trivial_augment",
]
"""All built-in policies, and some that take other ways through them."""


def made_up() -> Tensor:
    """Shapes with edges, ramps and noise: many bits that could be wrong."""
    down, right = torch.meshgrid(torch.arange(97), torch.arange(141), indexing="ij")
    planes = [
        down * 2 + right // 2,
        (down // 12 + right // 17) % 2 * 200 + 20,
        (down * 141 + right) * 2654435761 // 2**24,
    ]
    return (torch.stack(planes) % 256).to(torch.uint8)


def digests_of_views() -> dict[str, str]:
    """Policy -> digest of some of its views; in front of torch's level and numpy's, as this process has them."""
    torch.set_num_threads(4 if torch.get_num_threads() == 1 else 1)
    features: Any = np._core._multiarray_umath  # type: ignore[attr-defined]
    level = [name for name in features.__cpu_dispatch__ if features.__cpu_features__[name]]
    found = {"level": f"{torch.backends.cpu.get_cpu_capability()} {' '.join(level)}"}
    for name in EVERY:
        digest = hashlib.sha256()
        for seed in range(8):
            view = View(size=48, resize=56).with_seed(name, seed)
            digest.update(view.render(made_up(), bytes(32)).numpy().tobytes())
        found[name] = digest.hexdigest()[:16]
    return found


def views_of(images: ImageSet, workers: int) -> list[bytes]:
    views = tuple(View(size=24, resize=28).with_seed(name, 1) for name in EVERY)
    jobs = [Job(index, content_digest(images.read(index)), views) for index in range(len(images))]
    return [view.numpy().tobytes() for each in render(images, jobs, workers=workers) for view in each.views or ()]
