"""From images to a set of features."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from ddpm_fast.errors import InputError
from ddpm_fast.metrics.feature_set import FeatureSet
from ddpm_fast.metrics.features.extractor import Extractor
from ddpm_fast.metrics.statistics import Statistics

# Features stay on the device until there are so many: a GPU is waited for once in so many images, and 2,048 features
# and 1,008 logits of each take 50 MB.
_GATHERED = 4096


def extract(
    extractor: Extractor,
    batches: Iterable[Tensor],
    progress: Callable[[int], object] | None = None,
    source: str = "",
    keep: bool = True,
) -> FeatureSet:
    """The features of images, and their statistics.

    Args:
        extractor: The network.
        batches: uint8 images [n, C, H, W], grey or RGB; batches may differ in n and in size, and may be empty.
        progress: Called as progress(done) with the number of images after each batch.
        source: The name of the images, for people.
        keep: Whether the result holds features and logits; False where only the statistics are needed of more images
            than memory has room for.

    Returns:
        Features and logits in the order of the images.

    Raises:
        InputError: The images are not as said, or a feature is not finite.
    """
    gathering = _Gathering(extractor, keep)
    for images in batches:
        gathering.add(*extractor.compute(images))
        if progress is not None:
            progress(gathering.n)
    gathering.flush()
    features, logits = (torch.cat(parts) if parts else None for parts in (gathering.features, gathering.logits))
    if features is None and keep:
        features = torch.zeros(0, extractor.dimensions)
    return FeatureSet(extractor.kind, source, gathering.statistics, features, logits)


class _Gathering:
    """Features on their way from the device to the CPU.

    Attributes:
        n: How many images there are.
        features: Those that are kept, on the CPU, in parts.
        logits: In the same parts; empty if there are none.
        statistics: Of the features that are on the CPU.
    """

    def __init__(self, extractor: Extractor, keep: bool):
        self.n = 0
        self.features: list[Tensor] = []
        self.logits: list[Tensor] = []
        self.statistics = Statistics(extractor.dimensions)
        self._name, self._keep = extractor.kind.features, keep
        self._waiting: list[tuple[Tensor, Tensor | None]] = []
        self._waiting_n = 0

    def add(self, features: Tensor, logits: Tensor | None) -> None:
        """Take the features of a batch, on the device."""
        if not len(features):
            return
        self._waiting.append((features, logits))
        self._waiting_n += len(features)
        self.n += len(features)
        if self._waiting_n >= _GATHERED:
            self.flush()

    def flush(self) -> None:
        """Copy what is on the device to the CPU."""
        if not self._waiting:
            return
        features = torch.cat([part[0] for part in self._waiting]).cpu()
        logits = [part[1] for part in self._waiting if part[1] is not None]
        bad = ~torch.isfinite(features).all(1)
        if bad.any():
            first = self.n - self._waiting_n + int(bad.nonzero()[0])
            raise InputError(
                f"{self._name} gives features that are not finite, first for image {first} (counted from 0): "
                "use other weights, or check that the network takes images as it gets them"
            )
        self.statistics.add(features)
        if self._keep:
            self.features.append(features)
            if logits:
                self.logits.append(torch.cat(logits).cpu())
        self._waiting, self._waiting_n = [], 0
