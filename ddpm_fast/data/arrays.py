"""Array files: .npz (`images`, optionally `labels` and `label_names`) and .npy, uint8. They are never unpickled.

The headers are read and checked first. An array is allocated only if it is of the right kind, and as large as the file
can hold.
"""

import math
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, BinaryIO, NamedTuple

import numpy as np
from PIL import Image

from ddpm_fast.data.bounds import allocating, held_bytes, open_regular
from ddpm_fast.data.pixels import fit_square, run_parallel
from ddpm_fast.errors import InputError

_KEYS = ("images", "labels", "label_names")
_LAYOUT = "uint8 [N, H, W] or [N, H, W, C]"
_MOST_CLASSES = 1 << 16  # that a few images may belong to; the largest public set of labels has 21,841
_REMEDY = "take fewer or smaller images"


class Arrays(NamedTuple):
    """What an array file holds.

    Attributes:
        images: uint8 [N, C, H, W], C-contiguous.
        labels: int64 [N], or None.
        label_names: One name for each class number, or None.
    """

    images: np.ndarray
    labels: np.ndarray | None
    label_names: list[str] | None


class _Header(NamedTuple):
    """What the header of a stored array says."""

    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


def read_arrays(
    path: Path,
    image_size: int | None,
    channels: int | None,
    progress: Callable[[int, int], object] | None,
) -> Arrays:
    """Read an .npz or .npy file.

    Args:
        path: The file. A ~ at its start is the home folder.
        image_size: The side of the square to resize to; None keeps the stored size.
        channels: 1 or 3 to convert to grey or RGB; None keeps the stored channels.
        progress: Called as progress(done, total) while images are resized or converted.

    Raises:
        InputError: If the file cannot be read without unpickling, does not hold such images and labels, or does not
            fit into memory.
    """
    path = Path(os.path.expanduser(path))
    try:
        with open_regular(path) as file:
            is_archive = file.read(2) == b"PK"
            file.seek(0)
            stored = _read_npz(file, path) if is_archive else {"images": _map_npy(file, path)}
    except InputError:  # the file can be read, and what it holds is wrong
        raise
    except Exception as error:  # zipfile, zlib, struct and numpy each raise their own exceptions for damaged files
        raise InputError(
            f"cannot read {path} as numpy arrays (pickled objects are never loaded): {error}; the file is "
            f"damaged or holds something else: save {_LAYOUT} with np.savez(path, images=..., labels=...)"
        ) from error
    images = stored["images"]
    labels, names = _check_labels(stored.get("labels"), stored.get("label_names"), path)
    return Arrays(
        _convert(images if images.ndim == 4 else images[..., None], image_size, channels, path, progress), labels, names
    )


def _map_npy(file: BinaryIO, path: Path) -> np.ndarray:
    """The array of an .npy file, mapped into memory so that it is copied once, not twice."""
    header = _read_header(file, os.fstat(file.fileno()).st_size)
    _check_images(header, path)
    with allocating(header.nbytes, f"the images of {path}", _REMEDY):
        return np.lib.format.open_memmap(path, mode="r")


def _read_npz(file: BinaryIO, path: Path) -> dict[str, np.ndarray]:
    """The arrays of an .npz file that we know, checked as far as their headers go."""
    archive_bytes = os.fstat(file.fileno()).st_size
    with zipfile.ZipFile(file) as archive:
        found = [name.removesuffix(".npy") for name in archive.namelist()]
        headers = {}
        for key in _KEYS:
            if found.count(key) > 1:
                raise InputError(f"{path} has {found.count(key)} arrays called '{key}'; save it again with one")
            if key in found:
                member = archive.getinfo(f"{key}.npy")
                held = held_bytes(member, archive_bytes)
                with archive.open(member) as stream:
                    headers[key] = _read_header(stream, held)
        if "images" not in headers:
            raise InputError(
                f"{path} has no array called 'images', only {sorted(found)}; save it with "
                "np.savez(path, images=..., labels=...)"
            )
        _check_images(headers["images"], path)
        _check_label_headers(headers, path)
        arrays = {}
        # The images are there twice while they are brought into our layout.
        with allocating(2 * sum(header.nbytes for header in headers.values()), f"the arrays of {path}", _REMEDY):
            for key in headers:
                with archive.open(f"{key}.npy") as stream:
                    arrays[key] = np.lib.format.read_array(stream, allow_pickle=False)
        return arrays


def _read_header(file: IO[bytes], held: int) -> _Header:
    """The header at the start of a stored array.

    Args:
        file: The array's file or archive member, of which no more than the header is read.
        held: The bytes that it can hold.

    Raises:
        ValueError: If it is no such array, has Python objects, or says that it is larger.
    """
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    elif version == (2, 0):
        shape, _, dtype = np.lib.format.read_array_header_2_0(file)
    else:
        raise ValueError(f"it is of version {version} of numpy's format, which only structured arrays need")
    header = _Header(dtype, shape)
    if dtype.hasobject:
        raise ValueError(f"an array of {dtype} holds pickled objects")
    if min(shape, default=0) < 0 or file.tell() + header.nbytes > held:
        raise ValueError(f"an array says that it is {header}, but the file holds {held} bytes of it")
    return header


def _check_images(images: _Header, path: Path) -> None:
    """Raises InputError if these are not images."""
    found = f"the images of {path} are {images}"
    if images.dtype != np.uint8:
        raise InputError(f"{found}, expected {_LAYOUT}; scale to 0..255, round and cast to uint8")
    if len(images.shape) not in (3, 4):
        raise InputError(f"{found}, expected {_LAYOUT}")
    if images.nbytes == 0:
        raise InputError(f"{found}, expected at least one image with at least one pixel")
    if len(images.shape) == 4 and images.shape[1] in (1, 3, 4) and images.shape[3] > 4:
        raise InputError(
            f"{found}, which looks like [N, C, H, W]; expected {_LAYOUT}: save images.transpose(0, 2, 3, 1) instead"
        )


def _check_label_headers(headers: dict[str, _Header], path: Path) -> None:
    """Raises InputError if the labels, or the names of the classes, cannot be such."""
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


def _convert(
    images: np.ndarray,
    image_size: int | None,
    channels: int | None,
    path: Path,
    progress: Callable[[int, int], object] | None,
) -> np.ndarray:
    """Turn [N, H, W, C] as stored into [N, C', S, S]."""
    count, height, width, stored = images.shape
    channels = stored if channels is None else channels
    if channels != stored and {channels, stored} != {1, 3}:
        raise InputError(
            f"the images of {path} have {stored} channels and {channels} were asked for; only grey and RGB "
            f"(1 and 3) convert into each other, so ask for {stored} or leave channels out"
        )
    side = image_size if image_size is not None and (height, width) != (image_size, image_size) else None
    area = height * width if side is None else side * side
    with allocating(count * channels * area, f"the images of {path}", _REMEDY):
        return _planes(images, side, channels, progress)


def _planes(
    images: np.ndarray, side: int | None, channels: int, progress: Callable[[int, int], object] | None
) -> np.ndarray:
    """[N, H, W, C] as [N, channels, side, side], or of the same height and width if side is None."""
    count, height, width, stored = images.shape
    to_grey = channels < stored
    if side is not None or to_grey:
        if side is not None:
            height = width = side
        planes = np.empty((count, 1 if to_grey else stored, height, width), dtype=np.uint8)

        def fill(i: int) -> None:
            if to_grey:
                layers = [Image.fromarray(images[i]).convert("L")]
            else:
                layers = [Image.fromarray(layer) for layer in images[i].transpose(2, 0, 1)]
            for plane, layer in enumerate(layers):
                planes[i, plane] = np.asarray(layer if side is None else fit_square(layer, side))

        run_parallel(fill, count, progress)
    else:
        planes = images.transpose(0, 3, 1, 2)
    if channels > planes.shape[1]:
        planes = np.broadcast_to(planes, (count, channels, height, width))
    # A view is copied, so that the memory map does not outlive this call and the tensor is not read-only.
    return planes if planes.flags.owndata else np.array(planes, order="C")
