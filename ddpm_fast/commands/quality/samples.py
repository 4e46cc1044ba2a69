"""Images that features are computed of, wherever they are from: `Images` is what all of them can do, and `StoredImages`
are those of a data set."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ddpm_fast.commands.drawing import image_bar
from ddpm_fast.commands.ranks import Ranks
from ddpm_fast.data import ImageSet
from ddpm_fast.errors import InputError, printable

_CHOICE = 0  # the seed of the choice of real images, which is the same in every command


class Images(Protocol):
    """n images of one shape, which can be had batch by batch, and one by one."""

    @property
    def name(self) -> str:
        """What they are called."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Their channels, height and width."""

    def __len__(self) -> int: ...

    def batches(
        self, title: str, check: Callable[[], object], ranks: Ranks, batch_size: int
    ) -> Iterator[tuple[int, Tensor]]:
        """This rank's batches, with a progress bar: the number of the first image, and uint8 [b, C, H, W].

        Args:
            title: What the bar calls them.
            check: Called again and again; what it raises ends the work.
            ranks: This process, which gets each of its batches, among those that share them.
            batch_size: How many images are in a batch.
        """

    def take(self, indices: Tensor) -> Tensor:
        """Some of the images: uint8 [k, C, H, W]. indices: int64 [k], their numbers from 0."""

    def labels(self, indices: Tensor) -> Tensor | None:
        """Their classes, int64 [k], or None where there are none."""


class StoredImages:
    """The images of a data set, or some of them."""

    def __init__(self, dataset: ImageSet, chosen: Tensor | None = None):
        """Keep the set. chosen: int64 [n], the numbers of those that are meant; None for all."""
        self.dataset = dataset
        self._chosen = torch.arange(len(dataset)) if chosen is None else chosen

    @property
    def name(self) -> str:
        """That of the data set."""
        return self.dataset.name

    @property
    def shape(self) -> tuple[int, int, int]:
        """The channels, height and width of each image."""
        return self.dataset.shape

    def __len__(self) -> int:
        return len(self._chosen)

    def batches(
        self, title: str, check: Callable[[], object], ranks: Ranks, batch_size: int
    ) -> Iterator[tuple[int, Tensor]]:
        """See Images."""
        starts = [first for first in range(0, len(self), batch_size) if ranks.owns(first // batch_size)]
        started, done = time.perf_counter(), 0
        total = sum(min(batch_size, len(self) - first) for first in starts)
        with image_bar() as bar:
            task = bar.add_task(title, total=max(1, total), rate=0.0)
            for first in starts:
                check()
                images, _ = self.dataset.batch(self._chosen[first : first + batch_size])
                yield first, images
                done += len(images)
                bar.update(task, completed=done, rate=done / (time.perf_counter() - started))

    def take(self, indices: Tensor) -> Tensor:
        """See Images."""
        return self.dataset.batch(self._chosen[indices])[0]

    def labels(self, indices: Tensor) -> Tensor | None:
        """See Images."""
        return None if self.dataset.labels is None else self.dataset.labels[self._chosen[indices]]


def check_images(dataset: ImageSet, what: str) -> None:
    """Raises InputError for images that features cannot be computed of. what: the option that they are from."""
    if dataset.dtype != torch.uint8:
        raise InputError(f"{what}: {printable(dataset.name)} has floats; features are those of 8-bit images: give such")
    check_channels(dataset.shape[0], f"{what}: {printable(dataset.name)}")
    if len(dataset) < 2:
        raise InputError(f"{what}: {printable(dataset.name)} has {len(dataset)} image; expected at least 2")


def check_channels(channels: int, whose: str) -> None:
    """Raises InputError for images that are neither grey nor RGB."""
    if channels not in (1, 3):
        raise InputError(f"{whose} has {channels} channels; features are those of grey or RGB images (1 or 3)")


def some_of(count: int, n: int | None, option: str, name: str) -> Tensor | None:
    """Which n of so many images are meant: chosen at random, always the same ones, in their order; None for all.

    Images are often sorted by class, so the first ones would not stand for all.

    Raises:
        InputError: If there are fewer than n. option: what n is, for the message.
    """
    if n is None or n == count:
        return None
    if n > count:
        raise InputError(f"{option} is {n}, but {printable(name)} has {count} images: give fewer, or leave it out")
    return torch.from_numpy(np.sort(np.random.default_rng(_CHOICE).choice(count, n, replace=False)))
