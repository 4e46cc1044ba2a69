"""A set of images as a feature extractor sees it: what every metric compares."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ddpm_fast.metrics.statistics import Statistics


@dataclass(frozen=True)
class Kind:
    """What must be the same of two sets for their comparison to mean something.

    Attributes:
        features: The name of the extractor, such as "efficientnet-lite0".
        resizing: How images are brought to its size, such as "bicubic, antialiased, to 96x96".
        digest: The SHA-256 of its weights; empty if it is not known, as of another code's statistics.
    """

    features: str
    resizing: str
    digest: str = ""


@dataclass(frozen=True)
class FeatureSet:
    """The features of a set of images, or only their statistics.

    Attributes:
        kind: What the features are.
        source: The name of the images, for people.
        statistics: Their number, mean and covariance.
        features: fp32 [n, d] on the CPU, in the order of the images; None where only the statistics are known.
        logits: fp32 [n, classes] on the CPU, without the bias where the extractor says so; None if it has none.
    """

    kind: Kind
    source: str
    statistics: Statistics
    features: Tensor | None = None
    logits: Tensor | None = None

    @property
    def n(self) -> int:
        """How many images there are."""
        return self.statistics.n
