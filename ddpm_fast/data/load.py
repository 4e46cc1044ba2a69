"""`load_dataset`: whatever the images are stored in, they become one uint8 tensor [N, C, H, W] in memory; and
`open_dataset`, which leaves large sets where they are.

The tensor is uint8 because the fused ops cast and normalise while they add noise. A float copy would take four times
the memory and another pass over the data.
"""

import math
import os
import stat
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from ddpm_fast.data.arrays import ArraySource, open_array_source
from ddpm_fast.data.bounds import open_regular
from ddpm_fast.data.cache import Cache
from ddpm_fast.data.cache_index import is_prepared
from ddpm_fast.data.dataset import Dataset
from ddpm_fast.data.files import Listing, class_labels, say_ignored
from ddpm_fast.data.floats import FloatSource
from ddpm_fast.data.imageset import ImageSet
from ddpm_fast.data.index import Entry, Index
from ddpm_fast.data.listing import list_pictures, refuse_columns, refuse_splits, stands_for_files
from ddpm_fast.data.parts import PartsSource, list_parts
from ddpm_fast.data.picturesource import PictureSource, spread
from ddpm_fast.data.reading import mean_area, read_pictures
from ddpm_fast.data.selection import Selection
from ddpm_fast.data.size import ImageSize, Size
from ddpm_fast.data.source import Source
from ddpm_fast.data.stored import StoredDataset
from ddpm_fast.errors import InputError, check_integer, printable

BUILTIN = ("emoji32", "mnist5k")
IN_MEMORY = 256 << 20  # bytes of pixels: larger sets are read on demand
_SIZED = 16  # pictures whose sizes say how large the others are
_BUILTIN_FOLDER = Path(__file__).resolve().parent.parent / "datasets"


def load_dataset(
    source: str | os.PathLike,
    image_size: ImageSize | None = None,
    channels: int | None = None,
    classes: bool = False,
    strict: bool = False,
    progress: Callable[[int, int], object] | None = None,
    selection: Selection | None = None,
) -> Dataset:
    """Load images into memory. `open_dataset` reads large sets on demand.

    Pictures are turned upright by their EXIF orientation, transparent pictures are drawn on white, and 16-bit values
    are scaled to 8 bits. Images come in the order of their paths. docs/training.md lists the formats and the limits.

    A warning (`warnings.warn`) counts the files that are no pictures, by kind. Another one says that 16-bit pictures
    use only a part of their range and come out dark.

    Args:
        source: A built-in set ("emoji32" or "mnist5k"; write ./mnist5k for a folder of that name), a folder of
            images with its sub-folders, a .zip of them, an .npz with uint8 `images` [N, H, W] or [N, H, W, C] and
            optionally `labels` [N] and `label_names` (without `images`, `arr_0` and `arr_1` are images and labels),
            a folder of such .npz files, or an .npy of such images. A ~ at its start is the home folder.
            Float data is an .npz or .npy of float32, float16 or float64 [N, C, H, W], [N, H, W, C] or [N, H, W].
        image_size: The size to make: the side of a square, or (height, width). An image is scaled so that it just
            covers it, and the middle is cut out. Without it images keep their size, which must then be the same for
            all.
        channels: 1 (grey) or 3 (RGB). By default, files become 1 if all of them are grey and 3 otherwise, and arrays
            keep their channels.
        classes: Whether the sub-folders of the first level are the classes, in natural order (2 before 10). The
            labels of array files are always read.
        strict: Whether a broken file raises an InputError that names it. Otherwise it is skipped and listed in
            `Dataset.skipped`, and a warning names the first three.
        progress: Called as progress(done, total) while pictures are decoded or resized.
        selection: What is said of the source besides its name.

    Raises:
        InputError: For anything else. The message says what was found, what was expected and what to do.
    """
    opened = open_dataset(source, image_size, channels, classes, strict, progress, True, selection)
    assert isinstance(opened, Dataset)
    return opened


def open_dataset(
    source: str | os.PathLike,
    image_size: ImageSize | None = None,
    channels: int | None = None,
    classes: bool = False,
    strict: bool = False,
    progress: Callable[[int, int], object] | None = None,
    in_memory: bool | None = None,
    selection: Selection | None = None,
) -> ImageSet:
    """Load images into memory if they are few, and otherwise read each one from the disk when it is needed.

    The other arguments, and the rules, are those of `load_dataset`. On demand, nothing is decoded at the start, and
    some things differ: the size and the colours, where not given, are those of 1,000 pictures spread evenly over all; a
    picture that differs from them counts as broken; a broken picture is found when it is read, and the next readable
    one takes its place; and nothing is said of 16-bit pictures that are dark.

    Args:
        in_memory: Whether to load all into memory. By default, sets of up to 256 MiB of pixels are.
        selection: What is said of the source besides its name.

    Returns:
        A `Dataset` in memory, or a `StoredDataset`.
    """
    size = None if image_size is None else Size.of(image_size)
    channels = None if channels is None else check_integer("channels", channels, 1)
    builtin = str(source) in BUILTIN
    path = _BUILTIN_FOLDER / f"{source}.npz" if builtin else Path(os.path.expanduser(source))
    text = os.path.expanduser(source)
    if stands_for_files(text):
        name = text
    else:
        _check_is_there(path, source)
        name = str(source) if builtin else path.resolve().name
    selection = selection or Selection()
    if not stands_for_files(text) and is_prepared(path):
        refuse_splits(text, selection)
        refuse_columns(text, selection)
        if selection.is_of_floats:
            raise InputError(_refusal_of_floats(name, "prepared images"))
        return _from_source(Cache(path, name, size, channels), classes, strict, in_memory)
    wanted = _Wanted(size, channels, classes, strict, in_memory)
    if not stands_for_files(text) and (parts := list_parts(path)):
        return _from_arrays(parts, name, wanted, selection, progress)
    listing = list_pictures(str(path) if builtin else text, selection)
    if listing is not None:
        if selection.is_of_floats:
            raise InputError(_refusal_of_floats(name, "pictures"))
        if channels not in (None, 1, 3):
            raise InputError(f"image files can have 1 channel (grey) or 3 (RGB), got channels={channels}")
        return _from_files(listing, name, wanted, progress)
    if path.suffix.lower() not in (".npz", ".npy"):
        raise InputError(
            f"{path} is neither a folder, a .zip, a .tar, a .parquet, an .npz nor an .npy; put the images into a "
            "folder and give that"
        )
    return _from_arrays([path], name, wanted, selection, progress)


def _refusal_of_floats(name: str, what: str) -> str:
    return (
        f"{printable(name)} has {what}; a layout and a range of values (--layout and --value-range) are for arrays of "
        "floats: leave them out"
    )


def _check_is_there(path: Path, source: str | os.PathLike) -> None:
    """Raises InputError if the path is neither that of a folder nor of a regular file."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:  # ValueError: a null byte
        why = "" if isinstance(error, FileNotFoundError) else f" that can be read ({error})"
        raise InputError(
            f"there is no file or folder {source}{why}; give a folder of images, a .zip of them, an .npz or .npy, "
            f"or a built-in set: {', '.join(BUILTIN)}"
        ) from error
    if not stat.S_ISDIR(mode) and not stat.S_ISREG(mode):
        raise InputError(
            f"{source} is neither a folder nor a regular file, but a pipe, a socket or a device; save it as a file and "
            "give that"
        )


def read_picture(path: Path, option: str, image_size: ImageSize | None = None) -> torch.Tensor:
    """The picture in a file of any format of raster.py: uint8 [C, H, W], with C = 1 if it is grey, else 3 (RGB).

    Args:
        path: The file. A ~ at its start is the home folder.
        option: The command's option that the path came from, for the message.
        image_size: The size to scale and cut the picture to, as for `load_dataset`; None keeps its own.

    Raises:
        InputError: If the file is not a picture.
    """
    path = Path(os.path.expanduser(path))
    entry = Entry(str(path), partial(open_regular, path))
    size = None if image_size is None else Size.of(image_size)
    try:
        read = read_pictures([entry], size, channels=None, strict=True, progress=None)
    except InputError as error:
        reason = error.__cause__ or error
        raise InputError(f"{option}: cannot read the image {path} ({reason}); give the path of a picture") from error
    _warn(read.notes, stacklevel=2)
    return torch.from_numpy(read.images[0])


def _warn(notes: list[str], stacklevel: int) -> None:
    for note in notes:
        warnings.warn(note, stacklevel=stacklevel + 1)


class _Wanted(NamedTuple):
    """Arguments of `open_dataset`."""

    image_size: Size | None
    channels: int | None
    classes: bool
    strict: bool
    in_memory: bool | None


def _from_files(
    listing: Listing, name: str, wanted: _Wanted, progress: Callable[[int, int], object] | None
) -> ImageSet:
    entries, size, channels, strict = listing.entries, wanted.image_size, wanted.channels, wanted.strict
    labels, label_names = listing.labels, listing.label_names
    if labels is None and wanted.classes:
        if listing.unlabelled:
            raise InputError(
                f"classes were asked for, but {printable(name)} has images without one, such as {listing.unlabelled}; "
                "give each a class, or train without classes"
            )
        labels, label_names = class_labels(entries)
    notes = [f"ignored {say_ignored(listing.ignored)}"] if listing.ignored else []
    if listing.unlabelled:
        notes.append(f"some images have a class and some, such as {listing.unlabelled}, have none: no class is used")
    in_memory = _is_small(entries, size, channels) if wanted.in_memory is None else wanted.in_memory
    if not in_memory:
        _warn(notes, stacklevel=3)  # the caller of open_dataset
        return StoredDataset.of(PictureSource(entries, name, size, channels, strict, labels, label_names), strict)
    read = read_pictures(entries, size, channels, strict, progress)
    _warn(notes + read.notes, stacklevel=4)
    entries.close()
    return _dataset(read.images, None if labels is None else labels[read.kept], label_names, name, read.skipped)


def _from_source(source: Source, classes: bool, strict: bool, in_memory: bool | None) -> ImageSet:
    """Images that need no decoding, in memory if they are few."""
    if classes and source.labels is None:
        raise InputError(
            f"classes were asked for, but {printable(source.name)} has none: prepare the images again with --classes"
        )
    stored = StoredDataset.of(source, strict)
    if not (len(source) * math.prod(source.shape) <= IN_MEMORY if in_memory is None else in_memory):
        return stored
    images, labels = stored.batch(torch.arange(len(source)))
    return Dataset(images, labels, source.label_names, source.name)


def _from_arrays(
    paths: list[Path],
    name: str,
    wanted: _Wanted,
    selection: Selection,
    progress: Callable[[int, int], object] | None,
) -> ImageSet:
    """The images of an array file, or of several as one data set."""
    notes: list[str] = []

    def open_one(path: Path, name: str) -> ArraySource | FloatSource:
        opened, noted = open_array_source(path, name, wanted.image_size, wanted.channels, selection, progress)
        notes.extend(noted)
        return opened

    opened = open_one(paths[0], name) if len(paths) == 1 else PartsSource(paths, name, open_one)
    if wanted.classes and opened.labels is None:
        raise InputError(f"classes were asked for, but {paths[0]} has no labels; save `labels` in an .npz too")
    _warn(list(dict.fromkeys(notes)), stacklevel=3)  # the caller of open_dataset
    size = len(opened) * math.prod(opened.shape) * opened.dtype.itemsize
    in_memory = size <= IN_MEMORY if wanted.in_memory is None else wanted.in_memory
    if not in_memory:
        return StoredDataset.of(opened)
    if isinstance(opened, PartsSource):
        images = StoredDataset.of(opened).batch(torch.arange(len(opened)))[0].numpy()
    else:
        images = opened.read_all(progress)
    return replace(_dataset(images, opened.labels, opened.label_names, name, []), value_range=opened.value_range)


def _is_small(entries: Index, image_size: Size | None, channels: int | None) -> bool:
    """Whether the pixels of all pictures are at most IN_MEMORY bytes, by the sizes of a few if none is given."""
    area = float(math.prod(image_size)) if image_size is not None else mean_area(spread(entries, _SIZED))
    return len(entries) * (channels or 3) * area <= IN_MEMORY


def _dataset(
    images: np.ndarray,
    labels: np.ndarray | None,
    label_names: list[str] | None,
    name: str,
    skipped: list[str],
) -> Dataset:
    labels_or_none = None if labels is None else torch.from_numpy(labels)
    return Dataset(torch.from_numpy(images), labels_or_none, label_names, name, skipped)
