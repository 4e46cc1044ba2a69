"""Float data: arrays of float32, float16 or float64 with any number of channels, such as latents and sensor fields.

A channel has a range of its own, which is measured or given, and which becomes [-1, 1]. The array stays in its file
where it can be mapped, and each image is checked and converted when it is read.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from ddpm_fast.data.arrayfile import REMEDY, ArrayFile, Header, read_images
from ddpm_fast.data.bounds import allocating
from ddpm_fast.data.mapped import will_need
from ddpm_fast.data.selection import Selection
from ddpm_fast.errors import InputError
from ddpm_fast.values import ValueRange

_TO_NCHW = {"NCHW": (0, 1, 2, 3), "NHWC": (0, 3, 1, 2)}  # where an array has its images, channels, heights and widths
_BLOCK = 1 << 20  # values that are looked at, or converted, at a time
_ALWAYS_SCANNED = 1 << 30  # bytes of an array that is looked through even if its range is given


class FloatSource:
    """A `Source` of float data, in [-1, 1].

    Attributes:
        name: What the images are called.
        shape: The channels, height and width of every image.
        dtype: float32.
        labels: int64 [n], or None.
        label_names: One name for each class, or None.
        crops: False.
        value_range: What [-1, 1] stands for.
    """

    dtype = np.dtype(np.float32)
    crops = False

    def __init__(
        self,
        array: np.ndarray,
        value_range: ValueRange,
        name: str,
        labels: np.ndarray | None,
        label_names: list[str] | None,
        identity: bytes,
    ):
        """Keep the array, which may be mapped.

        Args:
            array: Floats [n, ...], laid out as value_range says.
            value_range: The range of the values.
            name: The name of the file.
            labels: int64 [n], or None.
            label_names: One name for each class, or None.
            identity: What says which file it is.
        """
        self._array, self.value_range, self._identity = array, value_range, identity
        self.name, self.labels, self.label_names = name, labels, label_names
        self.shape = image_shape(array.shape, value_range.layout)

    def __len__(self) -> int:
        return len(self._array)

    def read(self, i: int, window: object = None) -> np.ndarray:
        """Image number i: float32 [C, H, W] in [-1, 1]. Values beyond a range that was given are clipped to it.

        Raises:
            InputError: If a value is not finite.
        """
        return self._read(i, i + 1)[0]

    def _read(self, first: int, last: int) -> np.ndarray:
        """The images first .. last-1: float32 [last - first, C, H, W] in [-1, 1]."""
        stored = self._array[first:last]
        will_need(stored)
        if not np.isfinite(stored).all():
            raise InputError(not_finite(stored, first, self.name))
        layout = self.value_range.layout
        images = stored[:, None] if layout == "NHW" else stored.transpose(_TO_NCHW[layout])
        return self.value_range.array_to_model(images)

    def read_all(self, progress: Callable[[int, int], object] | None = None) -> np.ndarray:
        """All images in memory: float32 [N, C, H, W] in [-1, 1].

        Args:
            progress: Called as progress(done, total) meanwhile.

        Raises:
            InputError: If a value is not finite, or they do not fit into memory.
        """
        shape = len(self), *self.shape
        with allocating(4 * math.prod(shape), f"the images of {self.name}", REMEDY):
            images = np.empty(shape, np.float32)
        size = block_size(self._array)
        for first in range(0, len(self), size):
            last = min(first + size, len(self))
            images[first:last] = self._read(first, last)
            if progress is not None:
                progress(last, len(self))
        return images

    def name_of(self, i: int) -> str:
        """What to call image number i in a message."""
        return f"{self.name}[{i}]"

    def identity(self) -> bytes:
        """Bytes that say which images these are, and what they are in [-1, 1]."""
        return self._identity + repr(self.value_range).encode()

    def close(self) -> None:
        """Drop the array; a mapped file is closed once nothing refers to it."""
        self._array = self._array[:0]


def image_shape(shape: Sequence[int], layout: str) -> tuple[int, int, int]:
    """(C, H, W) of an array's images."""
    if layout == "NHW":
        return 1, shape[1], shape[2]
    _, channels, height, width = (shape[axis] for axis in _TO_NCHW[layout])
    return channels, height, width


def layout_of(header: Header, layout: str | None, path: Path) -> str:
    """How a float array is laid out.

    An array of three dimensions has one channel. Of the two layouts of four dimensions it is the one that has squares;
    where both have, or neither, it must be given.

    Args:
        header: The array's header.
        layout: "NCHW" or "NHWC" where it was given, or None.
        path: The file, for messages.

    Raises:
        InputError: If it cannot be told, or was given and cannot be.
    """
    found, shape = f"the images of {path} are {header}", header.shape
    if len(shape) not in (3, 4):
        raise InputError(f"{found}; expected floats [N, C, H, W], [N, H, W, C] or [N, H, W]")
    if header.nbytes == 0:
        raise InputError(f"{found}, expected at least one image with at least one value")
    fitting = ["NHW"] if len(shape) == 3 else ["NCHW", "NHWC"]
    if layout is not None:
        if layout not in fitting:
            raise InputError(f"{found}, which cannot be {layout}; expected {' or '.join(fitting)}, or no layout")
        return layout
    squares = [one for one in fitting if image_shape(shape, one)[1] == image_shape(shape, one)[2]]
    if len(squares) != 1 and len(fitting) > 1:
        kind = "both" if squares else "neither"
        raise InputError(
            f"{found}: as [N, C, H, W] and as [N, H, W, C], {kind} would have squares, so which one it is cannot be "
            "told; give layout (in training: --layout), NCHW or NHWC"
        )
    return squares[0] if squares else fitting[0]


def open_floats(
    file: ArrayFile,
    labels: np.ndarray | None,
    label_names: list[str] | None,
    name: str,
    selection: Selection,
    progress: Callable[[int, int], object] | None,
) -> tuple[FloatSource, list[str]]:
    """The float images of a file, mapped if they can be.

    Args:
        file: The file.
        labels: Its labels, checked.
        label_names: The names of its classes.
        name: What to call the images.
        selection: The layout and the range.
        progress: Called as progress(done, total) while the array is looked through.

    Returns:
        The images, and what the user is to be warned of.

    Raises:
        InputError: For an array of another kind, one that is compressed and too large, or values that are not finite;
            and for a range that does not fit it.
    """
    header, path = file.headers["images"], file.path
    layout = layout_of(header, selection.layout, path)
    channels = image_shape(header.shape, layout)[0]
    given = None if selection.value_range is None else ValueRange.given(selection.value_range, channels, layout)
    array = read_images(file)
    notes: list[str] = []
    if given is None or header.nbytes <= _ALWAYS_SCANNED:
        low, high = measure(array, layout, name, progress)
        measured = ValueRange(tuple(low), tuple(high), layout)
        notes = [] if given is None else _say_clipped(given, measured, name)
        given = given or measured
    return FloatSource(array, given, name, labels, label_names, file.identity()), notes


def measure(
    array: np.ndarray, layout: str, name: str, progress: Callable[[int, int], object] | None = None
) -> tuple[list[float], list[float]]:
    """The smallest and the largest value of each channel.

    Args:
        array: Floats, which may be mapped: a block of images is looked at after the other.
        layout: How it is laid out.
        name: The name of the file, for the message.
        progress: Called as progress(done, total), which are numbers of images.

    Raises:
        InputError: If a value is not finite; it names the first.
    """
    total, size = len(array), block_size(array)
    others = (0, 2, 3) if layout == "NCHW" else (0, 1, 2)
    lows, highs = [], []
    for first in range(0, total, size):
        block = torch.from_numpy(np.array(array[first : first + size], dtype=array.dtype.newbyteorder("=")))
        block = block if layout != "NHW" else block[..., None]
        lows.append(block.amin(others))
        highs.append(block.amax(others))
        # A value that is not finite is the smallest or the largest one, or, if it is NaN, both.
        if not (lows[-1].isfinite().all() and highs[-1].isfinite().all()):
            raise InputError(not_finite(array[first : first + size], first, name))
        if progress is not None:
            progress(min(first + size, total), total)
    return torch.stack(lows).amin(0).tolist(), torch.stack(highs).amax(0).tolist()


def block_size(array: np.ndarray) -> int:
    """How many images are looked at, or converted, at a time."""
    return max(1, _BLOCK * len(array) // array.size)


def not_finite(images: np.ndarray, first: int, name: str) -> str:
    """What to say of images of which a value is not finite. first: The number of the first of them."""
    place = np.argwhere(~np.isfinite(images))[0]
    index = ", ".join(map(str, [first + place[0], *place[1:]]))
    return (
        f"images[{index}] of {name} is {images[tuple(place)]}; expected finite floats: put another value in its place, "
        "such as with np.nan_to_num, or leave the image out (inf in float16 may be a value that float32 can hold)"
    )


def _say_clipped(given: ValueRange, measured: ValueRange, name: str) -> list[str]:
    """A warning of values beyond the range that was given."""
    for channel, ends in enumerate(zip(measured.low, measured.high, given.low, given.high, strict=True)):
        low, high, least, most = ends
        if low < least or high > most:
            return [
                f"the values of channel {channel} of {name} go from {low:.5g} to {high:.5g}; those beyond the "
                f"given range, {least:.5g} to {most:.5g}, are clipped to it"
            ]
    return []
