"""`ReadAhead`: threads that read the next training examples while the network works on the present ones.

Threads suffice because Pillow and numpy release Python's lock while they decode and copy. Processes that fork do not
get along with NCCL.
"""

import math
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, Protocol

import numpy as np
import torch

from ddpm_fast.data.imageset import ImageSet
from ddpm_fast.data.pixels import usable_cores
from ddpm_fast.data.resampling import Change, change_
from ddpm_fast.data.source import Window

_MOST_AHEAD = 256 << 20  # bytes of images that are read before they are asked for; one batch may be larger
_BLOCK = 8  # examples in a task of a thread
_MOST_THREADS = 16


class Plan(NamedTuple):
    """What training examples are made of.

    Attributes:
        indices: The numbers of their images.
        windows: Where each is cut; None for the middle.
        mirrored: Whether each is mirrored left to right.
        changes: How each is augmented after that; None without an augmentation.
        border: The augmentation's.
    """

    indices: list[int]
    windows: Sequence[Window | None]
    mirrored: Sequence[bool]
    changes: Sequence[Change | None] | None = None
    border: str = "edge"


class Readable(Protocol):
    """Images that several threads read, such as a `StoredDataset`."""

    @property
    def labels(self) -> torch.Tensor | None: ...

    @property
    def shape(self) -> tuple[int, int, int]: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def read(self, index: int, window: Window | None = None) -> tuple[np.ndarray, int]:
        """The image of that number, or the one that takes its place, and its number."""

    def tell_broken(self) -> None:
        """Warn of the images that could not be read since the last call."""


class InMemory:
    """Images that need no reading, for threads that change them.

    Args:
        dataset: The images.
    """

    def __init__(self, dataset: ImageSet) -> None:
        self._dataset, self.labels, self.shape, self.dtype = dataset, dataset.labels, dataset.shape, dataset.dtype

    def read(self, index: int, window: Window | None = None) -> tuple[np.ndarray, int]:
        """As `Readable.read`; they are cut already."""
        return self._dataset.batch(torch.tensor([index]))[0][0].numpy(), index

    def tell_broken(self) -> None:
        """Nothing is broken."""


class _Reading:
    """Examples that are being read.

    Attributes:
        images: What they are written to, [count, C, H, W].
        places: The numbers of the images that were read, which are others than the wanted ones if those are broken.
        parts: The tasks.
    """

    def __init__(self, plan: Plan, dataset: Readable, pool: ThreadPoolExecutor) -> None:
        count = len(plan.indices)
        self.images = torch.empty((count, *dataset.shape), dtype=dataset.dtype)
        self.places = np.empty(count, np.int64)
        self._plan, self._dataset, self._array = plan, dataset, self.images.numpy()
        blocks = [range(first, min(first + _BLOCK, count)) for first in range(0, count, _BLOCK)]
        self.parts: list[Future[None]] = [pool.submit(self._read, block) for block in blocks]

    def _read(self, block: range) -> None:
        for k in block:
            image, self.places[k] = self._dataset.read(self._plan.indices[k], self._plan.windows[k])
            self._array[k] = image[..., ::-1] if self._plan.mirrored[k] else image
        if self._plan.changes is not None:
            part = slice(block.start, block.stop)
            change_(self.images[part], self._plan.changes[part], self._plan.border)

    def cancel(self) -> None:
        for part in self.parts:
            part.cancel()


class ReadAhead:
    """Reads training examples in threads, some of them before they are asked for.

    Attributes:
        waited: The seconds that `take` has waited for images so far.

    Args:
        dataset: The images.
        plan: plan(first, count) says what the examples first .. first+count-1 are made of.
    """

    def __init__(self, dataset: Readable, plan: Callable[[int, int], Plan]) -> None:
        self.waited = 0.0
        self._dataset, self._plan = dataset, plan
        self._pool: ThreadPoolExecutor | None = None
        self._begun: dict[tuple[int, int], _Reading] = {}

    def take(self, first: int, count: int, upcoming: Sequence[int] = ()) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As `Examples.take`.

        Raises:
            InputError: What a thread raised for these examples. They are read again if they are asked for again.
        """
        ahead = math.prod(self._dataset.shape) * self._dataset.dtype.itemsize * count
        most = max(1, _MOST_AHEAD // max(1, ahead))
        wanted = dict.fromkeys([(first, count), *((number, count) for number in upcoming[:most])])
        for key in [key for key in self._begun if key not in wanted]:
            self._begun.pop(key).cancel()
        for key in wanted:
            if key not in self._begun:
                self._begun[key] = self._begin(*key)
        reading = self._begun.pop((first, count))
        start = time.perf_counter()
        try:
            for part in reading.parts:
                part.result()
        except BaseException:
            reading.cancel()
            raise
        finally:
            self.waited += time.perf_counter() - start
        self._dataset.tell_broken()
        labels = self._dataset.labels
        return reading.images, None if labels is None else labels[torch.from_numpy(reading.places)]

    def _begin(self, first: int, count: int) -> _Reading:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(reader_threads(), thread_name_prefix="ddpm_fast reader")
        return _Reading(self._plan(first, count), self._dataset, self._pool)

    def close(self) -> None:
        """End the threads. They start again if anything is asked for."""
        self._begun.clear()
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None


def reader_threads() -> int:
    """How many threads read: one for each core that this process may use, shared with the processes beside it.

    The launcher says in the environment variable LOCAL_WORLD_SIZE how many processes there are on this machine.
    """
    cores = usable_cores()
    beside = os.environ.get("LOCAL_WORLD_SIZE", "")
    processes = int(beside) if beside.isascii() and beside.isdigit() else 1
    return max(1, min(_MOST_THREADS, cores // max(1, processes)))
