"""Geometry: how the square of pixels of a view is made of an image, in uint8, with the same bits on every CPU level."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from featstore.images.decoders import MAX_PIXELS

if TYPE_CHECKING:
    from torch import Tensor

INTERPOLATIONS = ("bilinear", "bicubic", "nearest", "nearest-exact")
"""What torch can resize uint8 with; each gives the same bits on every CPU level."""

SMOOTH = ("bilinear", "bicubic")
"""Those that antialiasing has a meaning for."""


class RenderError(ValueError):
    """An image that can't be made into a view; the message is the reason, without the image's name."""


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """The geometry of one view; its fields are those of `View`. Images are uint8 `(3, H, W)`, in any strides."""

    size: int
    resize: int
    interpolation: str
    antialias: bool
    squash: bool = False

    def evaluation(self, image: Tensor) -> Tensor:
        """`(3, size, size)`, the central square of the resized image, with the roundings of torchvision's presets.

        Raises:
            RenderError: for an image that would be too large when resized.
        """
        image = self.scaled(image)
        top, left = (self.margin(side) for side in image.shape[1:])
        return image[:, top : top + self.size, left : left + self.size]

    def scaled(self, image: Tensor, shorter: int | None = None) -> Tensor:
        """The whole image, its shorter side (of a squashed one each) `shorter` pixels long; default: `resize`.

        Raises:
            RenderError: as `evaluation`.
        """
        height, width = image.shape[1:]
        shorter = self.resize if shorter is None else shorter
        long = shorter if self.squash else int(shorter * max(height, width) / min(height, width))
        if long * shorter > MAX_PIXELS:
            raise RenderError(
                f"{width} x {height} pixels would be {long:,} x {shorter} with the shorter side resized; at most "
                f"{MAX_PIXELS:,} pixels are made; crop the image"
            )
        return self._interpolated(image, *((long, shorter) if width <= height else (shorter, long)))

    def margin(self, side: int) -> int:
        """The pixels before the central `size` of a side."""
        return round((side - self.size) / 2)

    def fitted(self, image: Tensor) -> Tensor:
        """`(3, size, size)`, the whole image whatever its shape."""
        return self._interpolated(image, self.size, self.size)

    def _interpolated(self, image: Tensor, height: int, width: int) -> Tensor:
        """`(3, height, width)`. uint8 throughout: torch's float resize gives other last bits on other CPU levels."""
        from torch.nn import functional

        if image.shape[1:] == (height, width):
            return image
        align_corners = False if self.interpolation in SMOOTH else None
        return functional.interpolate(
            image[None],
            size=(height, width),
            mode=self.interpolation,
            align_corners=align_corners,
            antialias=self.antialias,
        )[0]
