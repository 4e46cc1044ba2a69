"""`StoredDataset`: images that stay where they are stored and are read when they are asked for."""

import hashlib
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch

from ddpm_fast.data.bounds import Unreadable
from ddpm_fast.data.imageset import HeldOut, ImageSet
from ddpm_fast.data.pixels import run_parallel
from ddpm_fast.data.reading import refusal
from ddpm_fast.data.source import Source, Window
from ddpm_fast.errors import InputError, printable
from ddpm_fast.values import ValueRange

INDEX_DIGEST = "index:"  # how a digest begins that is one of the index, not of the pixels
_NAMED = 3  # broken images that are named in a warning; of the others only the number is said
_BLOCK = 1024  # images that are held at one time while the digest of all pixels is computed


class Broken:
    """The images that turned out to be broken, and why. Threads may share it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._reasons: dict[int, str] = {}
        self._told = 0

    def __contains__(self, i: int) -> bool:
        return i in self._reasons

    def __len__(self) -> int:
        return len(self._reasons)

    def add(self, i: int, reason: str) -> None:
        """Remember that image i is broken, and why."""
        with self._lock:
            self._reasons.setdefault(i, reason)

    def found(self) -> list[int]:
        """The broken images, in the order of their numbers."""
        with self._lock:
            return sorted(self._reasons)

    def untold(self) -> list[tuple[int, int, str]]:
        """What is to be said now: how many there are, one of them, and why it is broken.

        Each of the first few is told, and then one whenever the number has ten times as many digits.
        """
        with self._lock:
            news = list(self._reasons.items())[self._told :]
            first, self._told = self._told + 1, len(self._reasons)
        numbered = enumerate(news, first)
        return [(k, i, reason) for k, (i, reason) in numbered if k <= _NAMED or set(str(k)[1:]) == {"0"}]


@dataclass(frozen=True)
class StoredDataset(ImageSet):
    """Images that are read from a source when they are asked for.

    In the place of a broken image comes the next one that is readable, with its label: a function of the number alone,
    so that every process and every resumed run sees the same.

    Attributes:
        source: Where they are stored.
        labels: int64 [N], class numbers from 0, or None.
        label_names: One name for each class, or None.
        name: What the images are called.
        strict: Whether a broken image raises an InputError instead of being replaced.
        broken: The images that turned out to be broken so far.
        value_range: What [-1, 1] stands for in float data; None for uint8.
        held_out: What was left out of these images, or None.
    """

    source: Source
    labels: torch.Tensor | None
    label_names: list[str] | None
    name: str
    strict: bool = False
    broken: Broken = field(default_factory=Broken, compare=False)
    value_range: ValueRange | None = None
    held_out: HeldOut | None = None

    @classmethod
    def of(cls, source: Source, strict: bool = False) -> "StoredDataset":
        """The images of a source, with the labels that it has."""
        labels = None if source.labels is None else torch.from_numpy(np.array(source.labels, np.int64))
        value_range = getattr(source, "value_range", None)  # only sources of floats have one
        return cls(source, labels, source.label_names, source.name, strict, value_range=value_range)

    def __len__(self) -> int:
        return len(self.source)

    @property
    def shape(self) -> tuple[int, int, int]:
        """The channels, height and width of each image."""
        return self.source.shape

    @cached_property
    def dtype(self) -> torch.dtype:
        """That of the images."""
        return torch.from_numpy(np.empty(0, self.source.dtype)).dtype

    @property
    def skipped(self) -> list[str]:
        """The images that turned out to be broken so far."""
        return [self.source.name_of(i) for i in self.broken.found()]

    @cached_property
    def digest(self) -> str:
        """The SHA-256 of the index and the labels, after the word "index:". No image is read for it.

        Two sets with the same digest give the same training, unless an image was changed and kept its name and its
        size. It is never that of a `Dataset`, which is one of the pixels; `pixel_digest` computes such a one.
        """
        hashed = hashlib.sha256(f"{self.source.dtype.str}{self.shape}{len(self)}".encode())
        hashed.update(self.source.identity())
        if self.labels is not None:
            hashed.update(self.labels.numpy().astype("<i8").tobytes())
        return INDEX_DIGEST + hashed.hexdigest()

    def pixel_digest(self, progress: Callable[[int, int], object] | None = None) -> str:
        """`Dataset.digest` of the same images in memory, without the broken ones. Every image is read.

        Args:
            progress: Called as progress(done, total) while images are read.
        """
        while True:
            assumed = len(self.broken)
            hashed = self._hash_pixels(len(self) - assumed, progress)
            if len(self.broken) == assumed:  # else the number of images, which is hashed first, was another
                break
        if self.labels is not None:
            kept = np.delete(self.labels.numpy(), self.broken.found())
            hashed.update(f"{kept.dtype.str}{kept.shape}".encode())
            hashed.update(kept.tobytes())
        return hashed.hexdigest()

    def _hash_pixels(self, count: int, progress: Callable[[int, int], object] | None) -> "hashlib._Hash":
        hashed = hashlib.sha256(f"{self.source.dtype.str}{(count, *self.shape)}".encode())

        def attempt(i: int) -> bytes:
            image = self._attempt(i, None)
            return b"" if image is None else image.tobytes()

        for first in range(0, len(self), _BLOCK):
            block = range(first, min(first + _BLOCK, len(self)))
            for part in run_parallel(lambda k, block=block: attempt(block[k]), len(block)):  # type: ignore[misc]
                hashed.update(part)
            if progress is not None:
                progress(block.stop, len(self))
        return hashed

    def read(self, i: int, window: Window | None = None) -> tuple[np.ndarray, int]:
        """Image number i, or the next readable one. Threads may call it side by side.

        Args:
            i: Its number.
            window: Where to cut it, for a source that crops; None for the middle.

        Returns:
            The image [C, H, W], which is not to be written to, and its number.

        Raises:
            InputError: If none is readable, one is not and the data set is strict, or a file has changed or gone.
        """
        for k in range(len(self)):
            place = (i + k) % len(self)
            image = self._attempt(place, window)
            if image is not None:
                return image, place
        raise InputError(
            f"none of the {len(self)} images of {printable(self.name)} is readable; give images of which some are"
        )

    def _attempt(self, i: int, window: Window | None) -> np.ndarray | None:
        """Image number i; None if it is broken."""
        if i in self.broken:
            return None
        try:
            return self.source.read(i, window)
        except Unreadable as error:
            if self.strict:
                raise InputError(refusal(self.source.name_of(i), str(error))) from error
            self.broken.add(i, str(error))
            return None

    def tell_broken(self) -> None:
        """Warn of the images that turned out to be broken since the last call."""
        for count, i, reason in self.broken.untold():
            so_far = f" ({count} broken images so far; StoredDataset.skipped lists them)" if count > 1 else ""
            warnings.warn(
                f"the image {printable(self.source.name_of(i))} is broken: {reason}; the next readable one takes its "
                f"place{so_far}",
                stacklevel=3,
            )

    def batch(self, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The images [B, C, H, W] and labels int64 [B] (or None) at `indices`, int64 [B]."""
        wanted = indices.tolist()
        images = torch.empty((len(wanted), *self.shape), dtype=self.dtype)
        array = images.numpy()

        def fill(k: int) -> int:
            array[k], place = self.read(wanted[k])
            return place

        places = run_parallel(fill, len(wanted))
        self.tell_broken()
        return images, None if self.labels is None else self.labels[torch.tensor(places, dtype=torch.int64)]

    def _relabelled(self, labels: torch.Tensor, label_names: list[str]) -> "StoredDataset":
        return replace(self, labels=labels, label_names=label_names)

    def close(self) -> None:
        """Close the files. Nothing can be read after this."""
        self.source.close()
