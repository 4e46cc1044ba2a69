"""`Size`: the height and width of images, as they are given and as they are said."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ddpm_fast.errors import InputError, check_integer

ImageSize = int | Sequence[int]  # the side of a square, or (height, width)


class Size(NamedTuple):
    """The height and width of an image in pixels. Its text is 64x32: the height first, as tensors have it."""

    height: int
    width: int

    @classmethod
    def of(cls, given: ImageSize, name: str = "image_size") -> Size:
        """The size that was given.

        Args:
            given: The side of a square, or (height, width).
            name: What it is called in a message.

        Raises:
            InputError: If it is neither, or a number is less than 1.
        """
        if not isinstance(given, Sequence) or isinstance(given, str):
            side = check_integer(name, given, 1)
            return cls(side, side)
        if len(given) != 2:
            raise InputError(f"{name} is {given!r:.200}; expected a side such as 64, or (height, width) as in (64, 32)")
        return cls(*(check_integer(f"{name}[{i}]", side, 1) for i, side in enumerate(given)))

    def __str__(self) -> str:
        return f"{self.height}x{self.width}"
