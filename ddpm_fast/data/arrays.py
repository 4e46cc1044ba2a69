"""Array files as images: .npz (`images`, optionally `labels` and `label_names`) and .npy. They are never unpickled.

8-bit images are uint8, as here; floats.py has the others. The headers are checked first, and nothing of another kind is
read or mapped.
"""

import math
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from ddpm_fast.data.arrayfile import REMEDY, ArrayFile, Header, open_arrays, read_images, read_labels
from ddpm_fast.data.bounds import allocating
from ddpm_fast.data.floats import FloatSource, open_floats
from ddpm_fast.data.mapped import will_need
from ddpm_fast.data.pixels import fit, run_parallel
from ddpm_fast.data.selection import Selection
from ddpm_fast.data.size import Size
from ddpm_fast.data.source import Window
from ddpm_fast.errors import InputError

_LAYOUT = "uint8 [N, H, W] or [N, H, W, C]"
_MOST_CLASSES = 1 << 16  # that a few images may belong to; the largest public set of labels has 21,841


def open_array_source(
    path: Path,
    name: str,
    image_size: Size | None,
    channels: int | None,
    selection: Selection,
    progress: Callable[[int, int], object] | None,
) -> "tuple[ArraySource | FloatSource, list[str]]":
    """Open an .npz or .npy file.

    Args:
        path: The file. A ~ at its start is the home folder.
        name: What to call the images.
        image_size: The size to scale and cut 8-bit images to; None keeps the stored one.
        channels: 1 or 3 to convert 8-bit images to grey or RGB; None keeps the stored channels.
        selection: The layout and the range of floats.
        progress: Called as progress(done, total) while the range of floats is measured.

    Returns:
        The images, and what the user is to be warned of.

    Raises:
        InputError: If the file cannot be read without unpickling, does not hold such images and labels, or would not
            fit into memory.
    """
    path = Path(os.path.expanduser(path))
    with open_arrays(path, _LAYOUT) as file:
        is_float = file.headers["images"].dtype.kind == "f" and file.headers["images"].dtype.itemsize <= 8
        if not is_float:
            _check_images(file.headers["images"], path)
            if selection.is_of_floats:
                raise InputError(
                    f"{path} has 8-bit images; a layout and a range of values (in training: --layout, --value-range) "
                    "are for floats: leave them out"
                )
        _check_label_headers(file)
        stored = read_labels(file)
        labels, names = _check_labels(stored.get("labels"), stored.get("label_names"), path)
        if is_float:
            source, notes = open_floats(file, labels, names, name, selection, progress)
            asked = (channels or source.shape[0], *(image_size or source.shape[1:]))
            if asked != source.shape:
                raise InputError(
                    f"the images of {path} are floats of {'x'.join(map(str, source.shape))}, and "
                    f"{'x'.join(map(str, asked))} was asked for; floats are not scaled or converted here: do that "
                    "yourself, or leave the size and the channels (--image-size, --channels) out"
                )
            return source, notes
        return ArraySource(read_images(file), labels, names, file, image_size, channels, name), []


class ArraySource:
    """A `Source` of uint8 images in a mapped array.

    Attributes:
        name: What the images are called.
        shape: The channels, height and width of every image.
        dtype: uint8.
        labels: int64 [n], or None.
        label_names: One name for each class, or None.
        crops: Whether there is a size to cut the images to.
        value_range: None.
    """

    dtype = np.dtype(np.uint8)
    value_range = None

    def __init__(
        self,
        array: np.ndarray,
        labels: np.ndarray | None,
        label_names: list[str] | None,
        file: ArrayFile,
        image_size: Size | None,
        channels: int | None,
        name: str,
    ):
        """Keep the array.

        Args:
            array: uint8 [n, H, W] or [n, H, W, C].
            labels: int64 [n], or None.
            label_names: One name for each class, or None.
            file: The file that it is in.
            image_size: The size to scale and cut to; None keeps the stored one.
            channels: 1 or 3 to convert to grey or RGB; None keeps the stored channels.
            name: What the images are called.
        """
        self._array = array if array.ndim == 4 else array[..., None]
        self.name, self.labels, self.label_names = name, labels, label_names
        _, height, width, stored = self._array.shape
        self._channels = _wanted(stored, channels, file.path)
        self._path, self._size = file.path, image_size
        self.crops = image_size is not None
        self.shape = self._channels, *(image_size or (height, width))
        self._identity = file.identity() + repr(self.shape).encode()

    def __len__(self) -> int:
        return len(self._array)

    def read(self, i: int, window: Window | None = None) -> np.ndarray:
        """Image number i: uint8 [C, H, W]."""
        image = self._array[i]
        will_need(image)
        fits = image.shape[:2] == self.shape[1:] and window is None
        return _planes(image, None if fits else self._size, self._channels, window)

    def read_all(self, progress: Callable[[int, int], object] | None = None) -> np.ndarray:
        """All images in memory: uint8 [N, C, H, W].

        Args:
            progress: Called as progress(done, total) while images are resized or converted.

        Raises:
            InputError: If they do not fit into memory.
        """
        shape = len(self), *self.shape
        with allocating(math.prod(shape), f"the images of {self._path}", REMEDY):
            images = np.empty(shape, np.uint8)
            if self._array.shape[1:] == (*self.shape[1:], self.shape[0]):
                np.copyto(images, self._array.transpose(0, 3, 1, 2))
                return images

            def fill(i: int) -> None:
                images[i] = self.read(i)

            run_parallel(fill, len(self), progress)
            return images

    def name_of(self, i: int) -> str:
        """What to call image number i in a message."""
        return f"{self.name}[{i}]"

    def identity(self) -> bytes:
        """Bytes that say which images these are."""
        return self._identity

    def close(self) -> None:
        """Drop the array; its file is closed once nothing refers to it."""
        self._array = self._array[:0]


def _check_images(images: Header, path: Path) -> None:
    """Raises InputError if these are not images."""
    found = f"the images of {path} are {images}"
    if images.dtype != np.uint8:
        raise InputError(
            f"{found}, expected {_LAYOUT}; scale to 0..255, round and cast to uint8, or cast to float32 for data whose "
            "values have a range of their own"
        )
    if len(images.shape) not in (3, 4):
        raise InputError(f"{found}, expected {_LAYOUT}")
    if images.nbytes == 0:
        raise InputError(f"{found}, expected at least one image with at least one pixel")
    if len(images.shape) == 4 and images.shape[1] in (1, 3, 4) and images.shape[3] > 4:
        raise InputError(
            f"{found}, which looks like [N, C, H, W]; expected {_LAYOUT}: save images.transpose(0, 2, 3, 1) instead"
        )


def _check_label_headers(file: ArrayFile) -> None:
    """Raises InputError if the labels, or the names of the classes, cannot be such."""
    headers, path = file.headers, file.path
    labels, names, count = headers.get("labels"), headers.get("label_names"), headers["images"].shape[0]
    if labels is None:
        return
    found = f"the labels of {path} are {labels}"
    if labels.dtype.kind not in "iu" or len(labels.shape) != 1:
        raise InputError(f"{found}, expected integers [N], one class number for each image")
    if labels.shape != (count,):
        raise InputError(f"{found}, but there are {count} images; expected one label for each image")
    if names is not None and (names.dtype.kind != "U" or len(names.shape) != 1):
        raise InputError(f"the label_names of {path} are {names}, expected strings, one for each class number")


def _check_labels(
    labels: np.ndarray | None, names: np.ndarray | None, path: Path
) -> tuple[np.ndarray | None, list[str] | None]:
    """The labels as int64 [N] and the names as a list, each None if the file has none; or InputError."""
    if labels is None:
        return None, None
    low, high = int(labels.min()), int(labels.max())
    found = f"the labels of {path} go"
    if low < 0:
        raise InputError(f"{found} down to {low}, expected class numbers from 0 up")
    if names is not None:
        if len(names) <= high:
            raise InputError(
                f"{found} up to {high}, but there are {len(names)} label_names; expected one for each class number "
                f"from 0 to {high}"
            )
        return labels.astype(np.int64), names.tolist()
    if high >= max(len(labels), _MOST_CLASSES):
        raise InputError(
            f"{found} up to {high}, but there are {len(labels)} images; expected class numbers from 0 up without "
            "gaps: number the classes with np.unique(labels, return_inverse=True)[1]"
        )
    return labels.astype(np.int64), None


def _wanted(stored: int, channels: int | None, path: Path) -> int:
    """The channels of the result, or InputError if the stored ones do not convert into those that were asked for."""
    channels = stored if channels is None else channels
    if channels != stored and {channels, stored} != {1, 3}:
        raise InputError(
            f"the images of {path} have {stored} channels and {channels} were asked for; only grey and RGB "
            f"(1 and 3) convert into each other, so ask for {stored} or leave channels out"
        )
    return channels


def _planes(image: np.ndarray, size: Size | None, channels: int, window: Window | None = None) -> np.ndarray:
    """[H, W, C] as [channels, *size], or of the same height and width if size is None."""
    if channels < image.shape[2]:
        layers = [Image.fromarray(image).convert("L")]
    elif size is None:
        return np.broadcast_to(image.transpose(2, 0, 1), (channels, *image.shape[:2]))
    else:
        layers = [Image.fromarray(layer) for layer in image.transpose(2, 0, 1)]
    fitted = [np.asarray(layer if size is None else fit(layer, size, window)) for layer in layers]
    return np.stack(fitted * (channels // len(fitted)))
