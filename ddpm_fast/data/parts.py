"""A folder of .npz files, such as `python -m ddpm_fast.sample --format npz` writes, as one data set."""

import hashlib
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ddpm_fast.data.arrays import ArraySource
from ddpm_fast.data.files import files_alone
from ddpm_fast.data.floats import FloatSource
from ddpm_fast.data.pixels import run_parallel
from ddpm_fast.data.source import Window
from ddpm_fast.errors import InputError

# Parts that are open at the same time. Each takes a file, of which a process may have 1,024.
_OPEN = 64

_Open = Callable[[Path, str], ArraySource | FloatSource]


def list_parts(folder: Path) -> list[Path]:
    """The .npz files of a folder, in natural order (2 before 10). None if it has pictures or sub-folders too."""
    return files_alone(folder, (".npz",)) if folder.is_dir() else []


class _Kind(NamedTuple):
    """What the images of all parts must have in common."""

    dtype: str
    shape: tuple[int, int, int]
    has_labels: bool
    label_names: list[str] | None
    value_range: object

    def __str__(self) -> str:
        labels = f"{'' if self.has_labels else 'no '}labels, {len(self.label_names or [])} names of classes"
        floats = "" if self.value_range is None else f", values in {self.value_range}"
        return f"{self.dtype} {'x'.join(map(str, self.shape))}, {labels}{floats}"


class PartsSource:
    """A `Source` of the images in several array files, one after the other.

    Attributes:
        name: What the images are called.
        shape: The channels, height and width of every image.
        dtype: That of the images.
        labels: int64 [n], or None.
        label_names: One name for each class, or None.
        crops: Whether `read` takes a window.
        value_range: What [-1, 1] stands for in floats; None for 8-bit images.
    """

    def __init__(self, paths: list[Path], name: str, open_part: _Open):
        """Look at every part, and close it again.

        Args:
            paths: The files, in order.
            name: What to call the images.
            open_part: open_part(path, name) opens one of them.

        Raises:
            InputError: For a part that cannot be read, or whose images do not go with those of the first one.
        """
        self.name, self._paths, self._open_part = name, paths, open_part
        first = self._open(0)
        self.shape, self.dtype, self.crops = first.shape, first.dtype, first.crops
        self.label_names, self.value_range = first.label_names, first.value_range
        self._kind = _kind_of(first)
        looks = run_parallel(self._look, len(paths))
        self._starts = np.cumsum([0, *(count for count, _, _ in looks)])
        self._identity = hashlib.sha256(b"".join(identity for _, identity, _ in looks)).digest()
        labels = [part for _, _, part in looks if part is not None]
        self.labels = np.concatenate(labels) if labels else None
        self._opened = lru_cache(_OPEN)(self._reopen)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def read(self, i: int, window: Window | None = None) -> np.ndarray:
        """Image number i: [C, H, W]."""
        k = int(np.searchsorted(self._starts, i, "right")) - 1
        return self._opened(k).read(i - int(self._starts[k]), window)

    def name_of(self, i: int) -> str:
        """What to call image number i in a message."""
        k = int(np.searchsorted(self._starts, i, "right")) - 1
        return f"{self.name}/{self._paths[k].name}[{i - int(self._starts[k])}]"

    def identity(self) -> bytes:
        """Bytes that say which images these are."""
        return self._identity

    def close(self) -> None:
        """Close the files."""
        self._opened.cache_clear()

    def _open(self, k: int) -> ArraySource | FloatSource:
        return self._open_part(self._paths[k], f"{self.name}/{self._paths[k].name}")

    def _look(self, k: int) -> tuple[int, bytes, np.ndarray | None]:
        """The number of images of a part, what says which they are, and their labels."""
        part = self._open(k)
        if (kind := _kind_of(part)) != self._kind:
            raise InputError(
                f"the .npz files of a folder are read as one data set, but {self._paths[k]} has images of another kind "
                f"({kind}) than {self._paths[0].name} ({self._kind}): put files that belong together into a folder of "
                "their own"
            )
        return len(part), part.identity(), part.labels

    def _reopen(self, k: int) -> ArraySource | FloatSource:
        part = self._open(k)
        if _kind_of(part) != self._kind or len(part) != self._starts[k + 1] - self._starts[k]:
            raise InputError(f"{self._paths[k]} was changed while it was in use: start again")
        return part


def _kind_of(part: ArraySource | FloatSource) -> _Kind:
    return _Kind(str(part.dtype), part.shape, part.labels is not None, part.label_names, part.value_range)
