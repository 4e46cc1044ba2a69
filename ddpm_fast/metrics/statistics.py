"""The number, mean and covariance of features, added up in float64 in any number of parts."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ddpm_fast.errors import InputError


class Statistics:
    """The number, mean and covariance of vectors that come in parts.

    Each part is centred before its products are summed, and parts are joined by the update of Chan et al. 1979, so that
    nothing cancels where the mean is large.

    Attributes:
        n: How many vectors there are.
        mean: float64 [d].
    """

    def __init__(self, dimensions: int):
        """Start without vectors."""
        self.n = 0
        self.mean = torch.zeros(dimensions, dtype=torch.float64)
        self._products = torch.zeros(dimensions, dimensions, dtype=torch.float64)  # of deviations from the mean

    @classmethod
    def of(cls, features: Tensor | np.ndarray) -> Statistics:
        """Those of vectors [n, d]."""
        features = torch.as_tensor(features)
        if features.ndim != 2:
            raise InputError(f"features have shape {list(features.shape)}; expected [n, d]")
        made = cls(features.shape[1])
        made.add(features)
        return made

    @property
    def covariance(self) -> Tensor:
        """float64 [d, d], divided by n - 1."""
        if self.n < 2:
            raise InputError(f"a covariance needs at least two images, and there are {self.n}")
        return self._products / (self.n - 1)

    def add(self, features: Tensor | np.ndarray) -> None:
        """Add vectors [n, d] of any float dtype."""
        part = torch.as_tensor(features).detach().to("cpu", torch.float64)
        if not len(part):
            return
        mean = part.mean(0)
        centred = part - mean
        self._join(len(part), mean, centred.T @ centred)

    def merge(self, other: Statistics) -> None:
        """Add the vectors that another has counted."""
        self._join(other.n, other.mean, other._products)

    def _join(self, n: int, mean: Tensor, products: Tensor) -> None:
        if not n:
            return
        both = self.n + n
        apart = mean - self.mean
        self._products += products + torch.outer(apart, apart) * (self.n * n / both)
        self.mean += apart * (n / both)
        self.n = both
