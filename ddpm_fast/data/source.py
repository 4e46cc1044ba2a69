"""`Source`: images that are read one at a time, when they are asked for."""

from typing import NamedTuple, Protocol

import numpy as np


class Window(NamedTuple):
    """Where a random crop lies, as three fractions, each at least 0 and below 1.

    Attributes:
        zoom: How far the scale lies between the least that covers the wanted size and 1/0.8 of it.
        left: How far right the cut lies in what there is room for.
        top: How far down.
    """

    zoom: float
    left: float
    top: float


class Source(Protocol):
    """Images that are read one at a time. `read` may be called in several threads at once.

    Attributes:
        name: What the images are called: the name of their folder or file.
        shape: The channels, height and width of every image.
        dtype: That of the images, as numpy has it: uint8, float32 or float16.
        labels: Class numbers from 0, int64 [n]; or None.
        label_names: One name for each class, or None.
        crops: Whether `read` takes a window.
    """

    name: str
    shape: tuple[int, int, int]
    dtype: np.dtype
    labels: np.ndarray | None
    label_names: list[str] | None
    crops: bool

    def __len__(self) -> int: ...

    def read(self, i: int, window: Window | None = None) -> np.ndarray:
        """Image number i, [C, H, W] of the shape and dtype. It is not written to, and may be a view of a mapped file.

        Args:
            i: Its number, from 0 to n - 1.
            window: Where to cut it; None for the middle. Only given if `crops` is true.

        Raises:
            Unreadable: If it is broken. Another image takes its place, and the training goes on.
            InputError: If the training must end, as when the file has changed or gone.
        """

    def name_of(self, i: int) -> str:
        """What to call image number i in a message, such as the path of its file."""

    def identity(self) -> bytes:
        """Bytes that say which images these are: of an index or of checksums, without reading every image."""

    def close(self) -> None:
        """Close the files. Nothing is read after this."""
