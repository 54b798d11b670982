"""Features of batches, for engines that map a class over batches of rows, as Ray Data does. Nothing is stored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from featstore.errors import ImageError
from featstore.images.digests import content_digest
from featstore.images.headers import DecodeError
from featstore.images.render import decode_for
from featstore.images.views import RenderError
from featstore.models.backbones import backbone
from featstore.models.names import DEFAULT_PRECISION, Batching, Precision
from featstore.models.purity import check_pure
from featstore.models.trunk import Trunk, choose_device, output_at


class MapBatches:
    """Maps batches with images to the same with features; a worker makes it once.

    For pipelines that exist already: it knows no store, so nothing is reused and no key says later what the features
    are of. Rows are those of an extraction with the same batch size, bit for bit on one kind of machine.

    ::

        photos = ray.data.read_binary_files("photos")
        photos.map_batches(MapBatches, fn_constructor_kwargs={"model": "resnet50"}, batch_size=256, concurrency=8)

    Args:
        model: name of a backbone, or a function in a file, as for `backbone`.
        weights: as for `backbone`.
        cut: ``CUT`` or ``CUT:REDUCTION``; default: the model's default cut.
        images: the column of encoded images (bytes), or of arrays ``(H, W)`` or ``(H, W, 3)`` of uint8.
        features: the column that is added, float32 ``(n, *F)``.
        precision: of the arithmetic.
        device: auto, cpu or cuda.
        batch_size: images a pass; shorter batches are padded.

    Raises:
        ModelError: for a model that isn't a function of one image.
    """

    def __init__(
        self,
        model: str,
        weights: str | None = None,
        cut: str | None = None,
        *,
        images: str = "bytes",
        features: str = "features",
        precision: Precision = DEFAULT_PRECISION,
        device: str = "auto",
        batch_size: int | None = None,
    ) -> None:
        staged = backbone(model, weights)
        output = output_at(staged, cut or staged.default_cut)
        self.images, self.features, self.view = images, features, staged.view
        self.trunk = Trunk(
            staged,
            [output],
            view=staged.view,
            batching=Batching(batch_size),
            precision=precision,
            device=choose_device(device),
        )
        check_pure(staged, output.cut, batch_size=self.trunk.batch_size, device=self.trunk.device)

    def __call__(self, batch: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """The batch with a column more.

        Raises:
            ImageError: for an image that can't be decoded or rendered, by its place in the batch.
        """
        views = [self._view(image, f"image {place} of a batch") for place, image in enumerate(batch[self.images])]
        stacked = torch.stack(views) if views else torch.empty((0, self.view.channels, *[self.view.size] * 2)).byte()
        (rows,) = self.trunk(stacked)
        return {**batch, self.features: rows.cpu().numpy()}

    def _view(self, image: bytes | NDArray[np.uint8], name: str) -> torch.Tensor:
        try:
            return self.view.render(decode_for(self.view, image).pixels, content_digest(image))
        except (DecodeError, RenderError) as error:
            raise ImageError(name, str(error)) from error
