"""The features of images, batch by batch while they are read or drawn, by several ranks together."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ddpm_fast.commands.together import in_all
from ddpm_fast.errors import InputError
from ddpm_fast.loops.distributed import to_first_process
from ddpm_fast.metrics.feature_set import FeatureSet
from ddpm_fast.metrics.features.extract import extract
from ddpm_fast.metrics.features.extractor import Extractor
from ddpm_fast.metrics.statistics import Statistics


class Watched:
    """Batches on their way to the extractor: which images they had, and how long it took to get them.

    Attributes:
        spans: The number of the first image of each batch, and how many it had.
        seconds: The time that was spent on reading or drawing them.
    """

    def __init__(self, batches: Iterator[tuple[int, Tensor]]):
        """batches: Numbers of first images, and images."""
        self._batches = batches
        self.spans: list[tuple[int, int]] = []
        self.seconds = 0.0

    def __iter__(self) -> Iterator[Tensor]:
        while True:
            started = time.perf_counter()
            got = next(self._batches, None)
            self.seconds += time.perf_counter() - started
            if got is None:
                return
            first, images = got
            self.spans.append((first, len(images)))
            yield images


@dataclass(frozen=True)
class Counted:
    """What is known of images that the ranks have looked at.

    Attributes:
        features: Their features.
        getting: Seconds that this rank read or drew.
        looking: Seconds that it computed features.
    """

    features: FeatureSet
    getting: float
    looking: float


def count(
    batches: Iterator[tuple[int, Tensor]], extractor: Extractor, keeps: frozenset[str], source: str
) -> Counted | None:
    """The features of images that the ranks share. All ranks call it.

    The first rank puts the parts in the order of the images, so that the result does not depend on how they were
    shared. (The sums of the statistics round in the 16th digit.)

    Args:
        batches: This rank's: the number of the first image, and uint8 images.
        extractor: What computes the features.
        keeps: What is kept of each image beside the statistics: some of "features" and "logits".
        source: What the images are called.

    Returns:
        The features of all images in the first rank, and None in the others.
    """
    started, watched = time.perf_counter(), Watched(batches)
    own = in_all(lambda: extract(extractor, watched, source=source, keep=bool(keeps)))
    own = replace(
        own,
        features=own.features if "features" in keeps else None,
        logits=own.logits if "logits" in keeps else None,
    )
    looking = time.perf_counter() - started - watched.seconds
    parts = to_first_process((watched.spans, own))
    if parts is None:
        return None
    statistics = Statistics(extractor.dimensions)
    for _, part in parts:
        statistics.merge(part.statistics)
    features = _in_order([(spans, part.features) for spans, part in parts])
    logits = _in_order([(spans, part.logits) for spans, part in parts])
    return Counted(FeatureSet(extractor.kind, source, statistics, features, logits), watched.seconds, looking)


def _in_order(parts: list[tuple[list[tuple[int, int]], Tensor | None]]) -> Tensor | None:
    """The rows of all ranks as one tensor, in the order of the images; None if there are none."""
    batches: dict[int, Tensor] = {}
    for spans, rows in parts:
        if rows is not None and spans:
            split = rows.split([size for _, size in spans])
            batches |= dict(zip([first for first, _ in spans], split, strict=True))
    return torch.cat([batches[first] for first in sorted(batches)]) if batches else None


def probe(extractor: Extractor, shape: tuple[int, int, int]) -> bool:
    """Try an extractor with two grey images of a shape.

    Returns:
        Whether it has logits.

    Raises:
        InputError: If it cannot take such images, or gives something else than its features.
    """
    grey = torch.full((2, *shape), 127, dtype=torch.uint8, device=extractor.device)
    features, logits = extractor.compute(grey)
    if features.shape != (2, extractor.dimensions):
        raise InputError(
            f"--features: of two images the network gives {list(features.shape)}; expected [2, {extractor.dimensions}]"
        )
    return logits is not None
