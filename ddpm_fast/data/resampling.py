"""What augmentation does to pixels: flips and shifts, which are exact, and affine maps.

Images are resampled once, whatever maps are done one after another.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

BORDERS = {"edge": "border", "reflect": "reflection"}  # with torch's names


class Matrix(NamedTuple):
    """An affine map of a point, x to the right and y down: (a*x + b*y + dx, c*x + d*y + dy)."""

    a: float
    b: float
    c: float
    d: float
    dx: float = 0.0
    dy: float = 0.0

    @classmethod
    def rotation(cls, angle: float) -> Matrix:
        """By an angle in radians, counter-clockwise as one sees it, because y points down."""
        return cls(math.cos(angle), math.sin(angle), -math.sin(angle), math.cos(angle))

    def after(self, first: Matrix) -> Matrix:
        """The map that does the first one, and then this one."""
        return Matrix(
            self.a * first.a + self.b * first.c,
            self.a * first.b + self.b * first.d,
            self.c * first.a + self.d * first.c,
            self.c * first.b + self.d * first.d,
            self.a * first.dx + self.b * first.dy + self.dx,
            self.c * first.dx + self.d * first.dy + self.dy,
        )

    def inverse(self) -> Matrix:
        """The map back."""
        area = self.a * self.d - self.b * self.c
        a, b, c, d = self.d / area, -self.b / area, -self.c / area, self.a / area
        return Matrix(a, b, c, d, -(a * self.dx + b * self.dy), -(c * self.dx + d * self.dy))


class Change:
    """What is done to one image, in this order: the flips, the transposition, the shift, the affine map.

    Attributes:
        height: That of the image.
        width: That of the image.
        mirrored: Whether it is mirrored left to right.
        upside_down: Whether it is mirrored top to bottom.
        transposed: Whether rows become columns.
        shift: Pixels to the right and down; empty for none.
        matrix: Where its points go, seen from its middle, in pixels; None if it is not resampled.
    """

    def __init__(self, height: int, width: int) -> None:
        self.height, self.width = height, width
        self.mirrored = self.upside_down = self.transposed = False
        self.shift: tuple[int, ...] = ()
        self.matrix: Matrix | None = None

    def then(self, matrix: Matrix) -> None:
        """Do this map after what is there."""
        self.matrix = matrix if self.matrix is None else matrix.after(self.matrix)

    def moved(self, image: np.ndarray, border: str) -> np.ndarray:
        """The image [C, H, W] with all but the affine map."""
        image = image[..., ::-1] if self.mirrored else image
        image = image[..., ::-1, :] if self.upside_down else image
        image = image.swapaxes(1, 2) if self.transposed else image
        if any(self.shift):
            right, down = self.shift
            columns = _inside(np.arange(self.width) - right, self.width, border)
            rows = _inside(np.arange(self.height) - down, self.height, border)
            image = image[:, rows[:, None], columns]
        return image


def _inside(places: np.ndarray, size: int, border: str) -> np.ndarray:
    """Places of an axis, those beyond its ends replaced by what is taken for them."""
    if border == "edge" or size == 1:
        return places.clip(0, size - 1)
    return size - 1 - abs(size - 1 - places % (2 * size - 2))


def change_(images: torch.Tensor, changes: Sequence[Change | None], border: str) -> None:
    """Change images where they are. What becomes of one does not depend on the others.

    Args:
        images: [n, C, H, W], uint8 or floats, contiguous, on the CPU.
        changes: One for each; None leaves it as it is.
        border: One of `BORDERS`.
    """
    array = images.numpy()
    for k, change in enumerate(changes):
        if change is not None:
            array[k] = change.moved(array[k].copy(), border)
    mapped = [(k, change.matrix) for k, change in enumerate(changes) if change is not None and change.matrix]
    if mapped:
        places = torch.tensor([k for k, _ in mapped])
        images[places] = warped(images[places], [matrix for _, matrix in mapped], border)


def warped(images: torch.Tensor, matrices: Sequence[Matrix], border: str) -> torch.Tensor:
    """Images under affine maps, resampled by cubic convolution (Keys 1981, with a = -0.75), within their own range.

    Args:
        images: [n, C, H, W], uint8 or floats, on the CPU.
        matrices: Where the points of each go, seen from its middle, in pixels.
        border: One of `BORDERS`.

    Returns:
        As many of the same shape and dtype.
    """
    height, width = images.shape[2:]
    a, b, c, d, dx, dy = np.array([matrix.inverse() for matrix in matrices]).T[:, :, None, None]
    x, y = np.arange(width) - (width - 1) / 2, np.arange(height)[:, None] - (height - 1) / 2
    # As shares of half the distance between the outermost pixels, which is what torch counts in.
    columns = (a * x + b * y + dx) * (2 / max(1, width - 1))
    rows = (c * x + d * y + dy) * (2 / max(1, height - 1))
    grid = torch.from_numpy(np.stack([columns, rows], axis=-1).astype(np.float32))
    floats = images.float()
    low, high = (floats.amin((2, 3), keepdim=True), floats.amax((2, 3), keepdim=True))
    found = F.grid_sample(floats, grid, mode="bicubic", padding_mode=BORDERS[border], align_corners=True)
    found = torch.minimum(torch.maximum(found, low), high)
    return (found if images.is_floating_point() else found.round_()).to(images.dtype)
