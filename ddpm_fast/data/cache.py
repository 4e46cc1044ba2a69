"""`Cache`: images that `python -m ddpm_fast.prepare` decoded once, in files that are mapped into memory.

A prepared folder holds `index.json` (see cache_index.py), `images-00000.npy` and so on, each uint8 [n, C, H, W], and
`labels.npy`, int64 [N], if there are classes. NumPy opens the arrays too. The folder is written by
ddpm_fast/commands/preparing.py.
"""

import hashlib
import io
import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ddpm_fast.data.bounds import open_regular
from ddpm_fast.data.cache_index import CacheIndex, read_index
from ddpm_fast.data.labels import check_class_numbers
from ddpm_fast.data.mapped import will_need
from ddpm_fast.data.pixels import fit
from ddpm_fast.data.size import Size
from ddpm_fast.data.source import Window
from ddpm_fast.errors import InputError, printable

LABELS = "labels.npy"
_MAX_HEADER = 4096  # bytes of the header of an array
_HASHED = 1 << 22  # bytes that are read at a time for a checksum
_HASHING = 4  # threads, of which each takes 2 GB/s at best
_NAMED = 5  # of many damaged files


def images_file(number: int) -> str:
    """The name of a file of images."""
    return f"images-{number:05d}.npy"


def array_header(dtype: np.dtype, shape: tuple[int, ...]) -> bytes:
    """What stands before the bytes of an array in an .npy file."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    )
    return header.getvalue()


class Cache:
    """The images of a prepared folder, as a `Source`.

    Args:
        folder: The folder.
        name: What the images are called.
        image_size: The size to make; None keeps the one that the images were prepared with.
        channels: 1 or 3 to convert to grey or RGB; None keeps the channels.

    Raises:
        InputError: If it is unfinished, or its files are not what its index says.
    """

    dtype = np.dtype(np.uint8)

    def __init__(self, folder: Path, name: str, image_size: Size | None = None, channels: int | None = None) -> None:
        index = read_index(folder)
        if not index.complete:
            done = sum(file is not None for file in index.files)
            raise InputError(
                f"{printable(str(folder))} is not finished: {done} of its {len(index.files)} files are there; run the "
                "same `python -m ddpm_fast.prepare` again, which goes on"
            )
        counts = [file.count for file in index.files if file is not None]
        self.name, self.label_names = name, index.label_names
        self._folder, self._index = folder, index
        self._ends = np.cumsum(counts)
        self._files = [_mapped(folder / images_file(k), (n, *index.shape)) for k, n in enumerate(counts)]
        self.labels = None if index.labels is None else self._read_labels()
        stored, height, width = index.shape
        wanted = stored if channels is None else channels
        if wanted != stored and {wanted, stored} != {1, 3}:
            raise InputError(
                f"the images of {printable(str(folder))} have {stored} channels and {wanted} were asked for; only grey "
                f"and RGB (1 and 3) convert into each other, so ask for {stored} or leave channels out"
            )
        # A set of the wanted size is what it is, and there is nothing to cut.
        self._size = image_size if image_size != (height, width) else None
        self.shape = wanted, *(self._size or (height, width))
        self.crops = self._size is not None

    def _read_labels(self) -> np.ndarray:
        path = self._folder / LABELS
        labels = _mapped(path, (len(self),), np.dtype("<i8"))
        check_class_numbers(labels, self.label_names, printable(str(path)))
        if labels.min() < 0:
            raise InputError(f"{printable(str(path))} has negative class numbers; prepare the images again")
        return labels

    def __len__(self) -> int:
        return int(self._ends[-1])

    def read(self, i: int, window: Window | None = None) -> np.ndarray:
        """Image number i as uint8 [C, H, W]; see `Source.read`."""
        if not 0 <= i < len(self):
            raise IndexError(i)
        file = int(np.searchsorted(self._ends, i, side="right"))
        image = self._files[file][i - int(self._ends[file])]  # from the end of the file, since the number is negative
        will_need(image)
        if self._size is None and self.shape[0] == len(image):
            return image
        return _converted(image, self._size, self.shape[0], window)

    def name_of(self, i: int) -> str:
        """What to call image number i."""
        return f"image {i}"

    def identity(self) -> bytes:
        """The SHA-256 of the checksums of the files."""
        parts = [file.sha256 for file in self._index.files if file is not None]
        return hashlib.sha256(" ".join(parts).encode()).digest()

    def close(self) -> None:
        """Give the mapped files up."""
        self._files = []


def _mapped(path: Path, shape: tuple[int, ...], dtype: np.dtype | None = None) -> np.ndarray:
    """An array of an .npy file, mapped into memory.

    torch.from_file, unlike numpy.memmap, keeps no descriptor of each file, of which a process may usually have 1,024.

    Raises:
        InputError: If the file does not hold such an array, and nothing else.
    """
    dtype = dtype or np.dtype(np.uint8)
    try:
        with open_regular(path) as file:
            start = io.BytesIO(file.read(_MAX_HEADER))
            size = os.fstat(file.fileno()).st_size
        version = np.lib.format.read_magic(start)
        if version != (1, 0):
            raise ValueError(f"it is of version {version} of numpy's format")
        stored = np.lib.format.read_array_header_1_0(start)
        expected = (shape, False, dtype)
        if stored != expected:
            raise ValueError(f"it holds {stored[2]} {list(stored[0])}, expected {dtype} {list(shape)}")
        nbytes = dtype.itemsize * math.prod(shape)
        if size != start.tell() + nbytes:
            raise ValueError(f"it has {size} bytes, expected {start.tell() + nbytes}")
        if nbytes == 0:
            return np.empty(shape, dtype)
        whole = torch.from_file(os.fspath(path), shared=False, size=size, dtype=torch.uint8).numpy()
    except Exception as error:  # numpy raises several of its own and Python's for headers that make no sense
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise InputError(
            f"cannot read {printable(str(path))}: {printable(reason[:300])}; copy it again, or prepare the images again"
        ) from error
    return whole[start.tell() :].view(dtype).reshape(shape)


def _converted(image: np.ndarray, size: Size | None, channels: int, window: Window | None) -> np.ndarray:
    """An image [C, H, W] as [channels, *size]; size None keeps its own."""
    if channels < len(image):
        layers = [Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0))).convert("L")]
    else:
        layers = [Image.fromarray(layer) for layer in image]
    planes = [np.asarray(layer if size is None else fit(layer, size, window)) for layer in layers]
    return np.stack(planes * (channels // len(planes)))


def verify(folder: Path, progress: Callable[[int, int], object] | None = None) -> CacheIndex:
    """Compare every file of a finished folder with its checksum.

    Args:
        folder: The folder.
        progress: Called as progress(done, total) with the number of files that have been read.

    Raises:
        InputError: If it cannot be opened, or a file is not what it was. The message names the first such files.
    """
    Cache(folder, "")  # the sizes, which take no time
    index = read_index(folder)
    expected = {images_file(k): file.sha256 for k, file in enumerate(index.files) if file is not None}
    if index.labels is not None:
        expected[LABELS] = index.labels
    damaged = []
    with ThreadPoolExecutor(_HASHING) as pool:
        sums = pool.map(lambda name: _sha256(folder / name), expected)
        for done, (name, found) in enumerate(zip(expected, sums, strict=True), 1):
            if found != expected[name]:
                damaged.append(name)
            if progress is not None:
                progress(done, len(expected))
    if damaged:
        more = f" and {len(damaged) - _NAMED} more" if len(damaged) > _NAMED else ""
        raise InputError(
            f"{printable(str(folder))}: the checksums of {', '.join(damaged[:_NAMED])}{more} are not those of the "
            "index; copy these files again, or prepare the images again"
        )
    return index


def _sha256(path: Path) -> str:
    hashed = hashlib.sha256()
    with open_regular(path) as file:
        while block := file.read(_HASHED):
            hashed.update(block)
    return hashed.hexdigest()
