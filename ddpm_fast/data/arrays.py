"""Array files: .npz (`images`, optionally `labels` and `label_names`) and .npy, uint8. They are never unpickled."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from ddpm_fast.data.pixels import fit_square, run_parallel
from ddpm_fast.errors import InputError

_KEYS = ("images", "labels", "label_names")
_LAYOUT = "uint8 [N, H, W] or [N, H, W, C]"


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


def read_arrays(
    path: Path,
    image_size: int | None,
    channels: int | None,
    progress: Callable[[int, int], object] | None,
) -> Arrays:
    """Read an .npz or .npy file.

    Args:
        path: The file.
        image_size: The side of the square to resize to; None keeps the stored size.
        channels: 1 or 3 to convert to grey or RGB; None keeps the stored channels.
        progress: Called as progress(done, total) while images are resized or converted.

    Raises:
        InputError: If the file cannot be read without unpickling, or does not hold such images and labels.
    """
    try:
        loaded = np.load(path, mmap_mode="r", allow_pickle=False)  # so that an .npy is copied once, not twice
        stored = {"images": loaded}
        if isinstance(loaded, np.lib.npyio.NpzFile):
            with loaded:
                found = loaded.files
                stored = {key: loaded[key] for key in _KEYS if key in found}
    except Exception as error:  # zipfile, zlib, struct and numpy each raise their own exceptions for damaged files
        raise InputError(
            f"cannot read {path} as numpy arrays (pickled objects are never loaded): {error}; the file is "
            f"damaged or holds something else: save {_LAYOUT} with np.savez(path, images=..., labels=...)"
        ) from error
    if "images" not in stored:
        raise InputError(
            f"{path} has no array called 'images', only {sorted(found)}; save it with "
            "np.savez(path, images=..., labels=...)"
        )
    images = _check_images(stored["images"], path)
    labels, names = _check_labels(stored.get("labels"), stored.get("label_names"), len(images), path)
    return Arrays(_convert(images, image_size, channels, path, progress), labels, names)


def _check_images(images: np.ndarray, path: Path) -> np.ndarray:
    """The images as [N, H, W, C] uint8, or InputError."""
    found = f"the images of {path} are {images.dtype} {list(images.shape)}"
    if images.dtype != np.uint8:
        raise InputError(f"{found}, expected {_LAYOUT}; scale to 0..255, round and cast to uint8")
    if images.ndim not in (3, 4):
        raise InputError(f"{found}, expected {_LAYOUT}")
    if images.size == 0:
        raise InputError(f"{found}, expected at least one image with at least one pixel")
    if images.ndim == 3:
        return images[..., None]
    if images.shape[1] in (1, 3, 4) and images.shape[3] > 4:
        raise InputError(
            f"{found}, which looks like [N, C, H, W]; expected {_LAYOUT}: save images.transpose(0, 2, 3, 1) instead"
        )
    return images


def _check_labels(
    labels: np.ndarray | None, names: np.ndarray | None, count: int, path: Path
) -> tuple[np.ndarray | None, list[str] | None]:
    """The labels as int64 [N] and the names as a list, each None if the file has none; or InputError."""
    if labels is None:
        return None, None
    found = f"the labels of {path} are {labels.dtype} {list(labels.shape)}"
    if labels.dtype.kind not in "iu" or labels.ndim != 1:
        raise InputError(f"{found}, expected integers [N], one class number for each image")
    if len(labels) != count:
        raise InputError(f"{found}, but there are {count} images; expected one label for each image")
    if labels.min() < 0:
        raise InputError(f"{found} and go down to {labels.min()}, expected class numbers from 0 up")
    if names is None:
        return labels.astype(np.int64), None
    if names.dtype.kind != "U" or names.ndim != 1 or len(names) <= labels.max():
        raise InputError(
            f"the label_names of {path} are {names.dtype} {list(names.shape)}, expected strings, one for "
            f"each class number from 0 to the largest label, {labels.max()}"
        )
    return labels.astype(np.int64), names.tolist()


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
