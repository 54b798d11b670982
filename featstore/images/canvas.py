"""Canvas: an image on its way to the square of a view: first its geometry, in one step, then changes of the square."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

from featstore.images.draws import Box
from featstore.images.geometry import Geometry
from featstore.images.warps import Affine, stretched, warped

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

Change: TypeAlias = "Callable[[NDArray[np.uint8]], NDArray[np.uint8]]"
"""A square `(3, S, S)`, which stays as it is, to another one."""


class Canvas:
    """An image that policies draw on, one after the other.

    What they do to its geometry is noted and done at the end, so that pixels are interpolated once however many turns
    and zooms there are, and only those of the square. It starts from the image scaled as for evaluation, or from a box
    fitted to the square. What they do to its pixels is done afterwards, to the square, in the order in which it came.

    Attributes:
        height: of what the image has become so far.
        width: likewise.
    """

    def __init__(self, image: Tensor, geometry: Geometry) -> None:
        """`image` is uint8 `(3, H, W)`, in any strides, and stays as it is."""
        self._geometry = geometry
        self._changes: list[Change] = []
        self._source, self._is_scaled = image, False
        self._where = Affine()  # in the source, of a pixel of the canvas
        self.height, self.width = image.shape[1:]

    @property
    def side(self) -> int:
        """Of the square."""
        return self._geometry.size

    def scale(self, factor: float = 1) -> None:
        """Makes it `factor` times as large as for evaluation; what has been scaled already, `factor` times as large."""
        if not self._is_scaled:
            self._start(self._geometry.scaled(self._source, int(factor * self._geometry.resize)))
        elif factor != 1:
            self._where = self._where.after(stretched(factor, factor).about(-0.5, -0.5))
            self.height, self.width = int(factor * self.height), int(factor * self.width)

    def pad(self, margin: int) -> None:
        """Adds so many pixels of its mirror image on each side."""
        self.scale()
        self._window(Box(-margin, -margin, self.height + 2 * margin, self.width + 2 * margin))

    def warp(self, where: Affine) -> None:
        """Maps it about its middle; its height and width stay."""
        self.scale()
        self._where = self._where.after(where.about((self.width - 1) / 2, (self.height - 1) / 2))

    def crop(self, top: int, left: int) -> None:
        """Cuts the square out of it."""
        self.scale()
        self._window(Box(top, left, self.side, self.side))

    def fit(self, box: Box | None = None) -> None:
        """Resizes it, or a box of it, to the square."""
        if box is not None:
            self._window(box)
        self._start(self._geometry.fitted(self._pixels()))

    def change(self, change: Change) -> None:
        """Has the square changed once it is there."""
        self._changes.append(change)

    def finished(self) -> Tensor:
        """The square, uint8 `(3, size, size)`, maybe in the image's memory; the central one, if none was cut out.

        Raises:
            RenderError: as `Geometry.evaluation`; so do all that scale it.
        """
        import numpy as np
        import torch

        self.scale()
        if (self.height, self.width) != (self.side, self.side):
            self.crop(self._geometry.margin(self.height), self._geometry.margin(self.width))
        square = self._pixels().numpy()
        for change in self._changes:
            square = change(square)
        return torch.from_numpy(np.ascontiguousarray(square))

    def _start(self, image: Tensor) -> None:
        self._source, self._where, self._is_scaled = image, Affine(), True
        self.height, self.width = image.shape[1:]

    def _window(self, box: Box) -> None:
        self._where = self._where.after(Affine(c=box.left, f=box.top))
        self.height, self.width = box.height, box.width

    def _pixels(self) -> Tensor:
        """What the image has become, `(3, height, width)`."""
        import torch

        left, top = self._where.c, self._where.f
        if self._where == Affine(c=left, f=top) and left == int(left) and top == int(top):
            top, left, (height, width) = int(top), int(left), self._source.shape[1:]
            if min(top, left) >= 0 and top + self.height <= height and left + self.width <= width:
                return self._source[:, top : top + self.height, left : left + self.width]
        return torch.from_numpy(warped(self._source.numpy(), self._where, self.height, self.width))
